# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Turns a JSON object of a data file into a sample."""

from pathlib import Path
from typing import Any

from vllm_vtw.search.data.chats import PLACEHOLDER, from_conversations, parse_chat
from vllm_vtw.search.data.sample import BadSampleError, Message, Sample

QUESTION_KEYS = ("prompt", "messages", "conversations")


def parse_sample(where: str, entry: Any, folder: Path) -> Sample:
    """Turns a JSON object of a data file into a sample.

    Args:
        where: The object's place in the file, as in `Sample.where`.
        entry: The object.
        folder: The folder that relative paths of images start from.

    Raises:
        BadSampleError: The object does not describe a sample.
    """
    if not isinstance(entry, dict):
        raise BadSampleError("not a JSON object")
    task, answer = entry.get("task"), entry.get("answer")
    for key, value in (("task", task), ("answer", answer)):
        if isinstance(value, bool) or not isinstance(value, str | int | float | None):
            raise BadSampleError(f"'{key}' is not a string or a number")
    images = _images(entry)
    question_keys = [key for key in QUESTION_KEYS if entry.get(key) is not None]
    if len(question_keys) != 1:
        kind = "has to have exactly one of 'prompt', 'messages' and 'conversations'"
        raise BadSampleError(f"{kind}, has {' and '.join(map(repr, question_keys)) or 'none'}", kind)
    question = entry[question_keys[0]]
    prompt: str | None = None
    messages: tuple[Message, ...] = ()
    if question_keys == ["prompt"]:
        if not isinstance(question, str):
            raise BadSampleError("'prompt' is not a string")
        prompt, messages = prompt_or_chat(question, len(images))
    else:
        is_llava = question_keys == ["conversations"]
        chat = parse_chat(from_conversations(question) if is_llava else question, images)
        messages, images = tuple(chat.messages), chat.images
        answer = chat.answer if answer is None else answer
    if not images:
        raise BadSampleError("has no image: give 'image', 'images', or an 'image_url' in 'messages'")
    return Sample(
        where,
        tuple(images),
        prompt,
        messages,
        task="all" if task is None else str(task),
        answer=None if answer is None else str(answer).strip(),
        folder=folder,
    )


def prompt_or_chat(prompt: str, num_images: int) -> tuple[str | None, tuple[Message, ...]]:
    """Makes a chat of a question that has no image placeholders. A prompt that has some is left as it is.

    Args:
        prompt: The text of a "prompt" key or of `--prompt`.
        num_images: The number of the sample's images.

    Returns:
        `Sample.prompt` and `Sample.messages`. The chat is one user message with the images before the text.
    """
    if PLACEHOLDER in prompt:
        return prompt, ()
    parts = [{"type": "image"}] * num_images + [{"type": "text", "text": prompt}]
    return None, ({"role": "user", "content": parts},)


def _images(entry: dict[str, Any]) -> list[str]:
    image, images = entry.get("image"), entry.get("images")
    if image is not None and images is not None:
        raise BadSampleError("has both 'image' and 'images': give one of them")
    sources = image if images is None else images
    if sources is None:
        return []
    if isinstance(sources, str):
        return [sources]
    if not isinstance(sources, list) or not all(isinstance(one, str) for one in sources):
        raise BadSampleError("'image' or 'images' has to be a path, a data URL, or a list of them")
    return sources

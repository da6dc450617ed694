# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Turns a JSON object of a data file into a sample."""

from pathlib import Path
from typing import Any

from vllm_vtw.search.data.chats import PLACEHOLDERS, from_conversations, parse_chat
from vllm_vtw.search.data.sample import BadSampleError, Message, Sample, Video

QUESTION_KEYS = ("prompt", "messages", "conversations")


def parse_sample(where: str, entry: Any, folder: Path) -> Sample:
    """Turns a JSON object of a data file into a sample.

    Args:
        where: The object's place in the file, as in `Sample.where`.
        entry: The object.
        folder: The folder that relative paths of images and videos start from.

    Raises:
        BadSampleError: The object does not describe a sample.
    """
    if not isinstance(entry, dict):
        raise BadSampleError("not a JSON object")
    task, answer = entry.get("task"), entry.get("answer")
    for key, value in (("task", task), ("answer", answer)):
        if isinstance(value, bool) or not isinstance(value, str | int | float | None):
            raise BadSampleError(f"'{key}' is not a string or a number")
    video = _video(entry)
    kind = "image" if video is None else "video"
    media: list[Any] = _images(entry) if video is None else [video]
    question_keys = [key for key in QUESTION_KEYS if entry.get(key) is not None]
    if len(question_keys) != 1:
        reason = "has to have exactly one of 'prompt', 'messages' and 'conversations'"
        raise BadSampleError(f"{reason}, has {' and '.join(map(repr, question_keys)) or 'none'}", reason)
    question = entry[question_keys[0]]
    prompt: str | None = None
    messages: tuple[Message, ...] = ()
    if question_keys == ["prompt"]:
        if not isinstance(question, str):
            raise BadSampleError("'prompt' is not a string")
        prompt, messages = prompt_or_chat(question, len(media), kind)
    else:
        is_llava = question_keys == ["conversations"]
        chat = parse_chat(from_conversations(question) if is_llava else question, media, kind)
        messages, media = tuple(chat.messages), chat.media
        answer = chat.answer if answer is None else answer
    if not media:
        raise BadSampleError("has no image: give 'image', 'images', 'video', or an 'image_url' in 'messages'")
    return Sample(
        where,
        () if video is not None else tuple(media),
        prompt,
        messages,
        task="all" if task is None else str(task),
        labelled=task not in (None, ""),
        answer=None if answer is None else str(answer).strip(),
        video=video,
        folder=folder,
    )


def prompt_or_chat(
    prompt: str, num_media: int, kind: str = "image"
) -> tuple[str | None, tuple[Message, ...]]:
    """Makes a chat of a question that has no placeholders. A prompt that has some is left as it is.

    Args:
        prompt: The text of a "prompt" key or of `--prompt`.
        num_media: The number of the sample's images or videos.
        kind: "image" or "video".

    Returns:
        `Sample.prompt` and `Sample.messages`. The chat is one user message with the images before the text.
    """
    if PLACEHOLDERS[kind] in prompt:
        return prompt, ()
    parts = [{"type": kind}] * num_media + [{"type": "text", "text": prompt}]
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


def _video(entry: dict[str, Any]) -> Video | None:
    """The video of a sample: a path, or the paths of its frames."""
    video = entry.get("video")
    if entry.get("videos"):
        raise BadSampleError("has 'videos': a sample has one video, under 'video'")
    if video is None:
        return None
    if any(entry.get(key) is not None for key in ("image", "images")):
        raise BadSampleError("has a 'video' and images: give one of them")
    if isinstance(video, str):
        return video
    if not isinstance(video, list) or not video or not all(isinstance(one, str) for one in video):
        raise BadSampleError("'video' has to be a path, or a list of paths or data URLs of one frame or more")
    return tuple(video)

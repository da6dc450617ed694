"""A JSON object of a data file as a sample."""

from pathlib import Path
from typing import Any

from vllm_vtw.search.data.chats import PLACEHOLDER, from_conversations, parse_chat
from vllm_vtw.search.data.sample import BadSampleError, Message, Sample

QUESTIONS = ("prompt", "messages", "conversations")


def parse_sample(where: str, entry: Any, folder: Path) -> Sample:
    """The sample that an object of a data file is.

    Args:
        where: The object's line or item.
        entry: The object.
        folder: What its paths are relative to.

    Raises:
        BadSampleError: The object is none.
    """
    if not isinstance(entry, dict):
        raise BadSampleError("not a JSON object")
    task, answer = entry.get("task"), entry.get("answer")
    for key, value in (("task", task), ("answer", answer)):
        if isinstance(value, bool) or not isinstance(value, str | int | float | None):
            raise BadSampleError(f"'{key}' is not a string")
    images = _images(entry)
    questions = [key for key in QUESTIONS if entry.get(key) is not None]
    if len(questions) != 1:
        raise BadSampleError("has to have one of 'prompt', 'messages' and 'conversations'")
    question = entry[questions[0]]
    prompt: str | None = None
    messages: tuple[Message, ...] = ()
    if questions == ["prompt"]:
        if not isinstance(question, str):
            raise BadSampleError("'prompt' is not a string")
        prompt, messages = prompt_or_chat(question, len(images))
    else:
        said = parse_chat(
            from_conversations(question) if questions == ["conversations"] else question, images
        )
        messages, images = tuple(said.messages), said.images
        answer = said.answer if answer is None else answer
    if not images:
        raise BadSampleError("has no image: 'image', 'images', or an 'image_url' in 'messages'")
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
    """A prompt that places its pictures, as it is; any other as a user's turn, its pictures first."""
    if PLACEHOLDER in prompt:
        return prompt, ()
    parts = [{"type": "image"}] * num_images + [{"type": "text", "text": prompt}]
    return None, ({"role": "user", "content": parts},)


def _images(entry: dict[str, Any]) -> list[str]:
    image, images = entry.get("image"), entry.get("images")
    if image is not None and images is not None:
        raise BadSampleError("has both 'image' and 'images'")
    found = image if images is None else images
    if found is None:
        return []
    if isinstance(found, str):
        return [found]
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise BadSampleError("'image' or 'images' has to be a path, a data URL, or a list of them")
    return found

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Turns OpenAI's messages and LLaVA's conversations into chats of one form."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from vllm_vtw.search.data.sample import BadSampleError, Message

PLACEHOLDER = "<image>"
"""The image placeholder of LLaVA's data files and processors."""
ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ("system", "user", "assistant")}


class Chat(NamedTuple):
    """A chat up to the user's last message, and the expected answer to it.

    Attributes:
        messages: The messages. Each `content` is a list of parts of type "text" and "image".
        images: Paths or data URLs of the images, in the order of the "image" parts.
        answer: The text of the last message if it is the assistant's, else None.
    """

    messages: list[Message]
    images: list[str]
    answer: str | None


def from_conversations(turns: Any) -> list[Message]:
    """Turns a LLaVA conversation into OpenAI messages.

    Args:
        turns: The value of "conversations", such as `[{"from": "human", "value": "<image>\\nWhat?"}]`.

    Raises:
        BadSampleError: The value is not a list of turns.
    """
    if not isinstance(turns, list) or not turns:
        raise BadSampleError("'conversations' is not a list of turns")
    messages = []
    for turn in turns:
        role = ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise BadSampleError("a turn has to have 'from' (human, gpt or system) and 'value' (a string)")
        messages.append({"role": role, "content": turn["value"]})
    return messages


def parse_chat(messages: Any, images: list[str]) -> Chat:
    """Turns OpenAI messages into a chat.

    The images of `images` take the places of parts of type "image" and of `<image>` in texts, in order. If
    there are no such places and no parts of type "image_url", the images come before the first user message.

    Args:
        messages: The value of "messages".
        images: Paths or data URLs of the sample's images, without those of "image_url" parts.

    Raises:
        BadSampleError: The messages are not a chat that ends with a user message or an answer to it, or there
            are not as many places as images.
    """
    if not isinstance(messages, list) or not messages:
        raise BadSampleError("'messages' is not a list of messages")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise BadSampleError("a message has to have a 'role' (system, user or assistant)")
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise BadSampleError("there is no message with the role user")
    num_asked = len(roles) - roles[::-1].index("user")
    if "system" in roles[num_asked:]:
        raise BadSampleError("only messages with the role assistant may follow the last user message")
    unplaced, placed, result = list(images), [], []
    for message in messages[:num_asked]:
        parts: list[dict[str, str]] = []
        for part in _parts(message.get("content"), split_texts=bool(images)):
            if isinstance(part, str):
                parts.append({"type": "text", "text": part})
                continue
            if part.url is None and not unplaced:
                raise BadSampleError("there are more image placeholders than images")
            parts.append({"type": "image"})
            placed.append(unplaced.pop(0) if part.url is None else part.url)
        result.append({"role": message["role"], "content": parts})
    if unplaced:
        if placed:
            raise BadSampleError(
                "there are more images than image placeholders: give one for each image, or none"
            )
        first = result[roles.index("user")]
        first["content"] = [{"type": "image"}] * len(unplaced) + first["content"]
    answer = None
    if messages[num_asked:]:
        answer_parts = _parts(messages[-1].get("content"), split_texts=False)
        answer = "\n".join(part for part in answer_parts if isinstance(part, str))
    return Chat(result, placed + unplaced, answer)


class _ImagePart(NamedTuple):
    """The place of an image in a message.

    Attributes:
        url: The image's path or data URL. None for the next one of the sample's images.
    """

    url: str | None = None


def _parts(content: Any, split_texts: bool) -> Iterator[str | _ImagePart]:
    """The texts and images of a message, in order.

    Args:
        content: The message's "content".
        split_texts: Whether `<image>` in a text is a placeholder. If not, it is left in the text.
    """
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise BadSampleError("the 'content' of a message has to be a string or a list of parts")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "input_text") and isinstance(part.get("text"), str):
            yield from _split(part["text"]) if split_texts else [part["text"]]
        elif kind == "image":
            yield _ImagePart()
        elif kind in ("image_url", "input_image"):
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, dict) else url
            if not isinstance(url, str):
                raise BadSampleError(f"a part of type {kind!r} has no URL in 'image_url'")
            yield _ImagePart(url)
        else:
            raise BadSampleError(
                f"a part of type {kind!r} cannot be read: it has to be image, image_url, or text with a "
                "string in 'text'"
            )


def _split(text: str) -> Iterator[str | _ImagePart]:
    """The parts of a text with image placeholders in it."""
    first, *rest = text.split(PLACEHOLDER)
    if not rest:
        yield text
        return
    # Line feeds around a placeholder are dropped, because the chat template writes its own.
    if first.strip():
        yield first.strip()
    for following in rest:
        yield _ImagePart()
        if following.strip():
            yield following.strip()

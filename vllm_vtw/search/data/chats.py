# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Turns OpenAI's messages and LLaVA's conversations into chats of one form."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from vllm_vtw.search.data.sample import BadSampleError, Message

PLACEHOLDERS = {"image": "<image>", "video": "<video>"}
"""The placeholders of LLaVA's data files, by the type of what stands there."""
ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ("system", "user", "assistant")}


class Chat(NamedTuple):
    """A chat up to the user's last message, and the expected answer to it.

    Attributes:
        messages: The messages. Each `content` is a list of parts of type "text" and "image" or "video".
        media: The images or videos, in the order of these parts.
        answer: The text of the last message if it is the assistant's, else None.
    """

    messages: list[Message]
    media: list[Any]
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


def parse_chat(messages: Any, media: list[Any], kind: str = "image") -> Chat:
    """Turns OpenAI messages into a chat.

    The images of `media` take the places of parts of type "image" and of `<image>` in texts, in order. If
    there are no such places and no parts of type "image_url", the images come before the first user message.
    Videos take the places of parts of type "video" and of `<video>` in the same way.

    Args:
        messages: The value of "messages".
        media: The sample's images or videos, without those of "image_url" parts.
        kind: "image" or "video".

    Raises:
        BadSampleError: The messages are not a chat that ends with a user message or an answer to it, or there
            are not as many places as images or videos.
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
    unplaced, placed, result = list(media), [], []
    for message in messages[:num_asked]:
        parts: list[dict[str, str]] = []
        for part in _parts(message.get("content"), kind, split_texts=bool(media)):
            if isinstance(part, str):
                parts.append({"type": "text", "text": part})
                continue
            if part.url is None and not unplaced:
                raise BadSampleError(f"there are more {kind} placeholders than {kind}s")
            parts.append({"type": kind})
            placed.append(unplaced.pop(0) if part.url is None else part.url)
        result.append({"role": message["role"], "content": parts})
    if unplaced:
        if placed:
            raise BadSampleError(
                f"there are more {kind}s than {kind} placeholders: give one for each {kind}, or none"
            )
        first = result[roles.index("user")]
        first["content"] = [{"type": kind}] * len(unplaced) + first["content"]
    answer = None
    if messages[num_asked:]:
        answer_parts = _parts(messages[-1].get("content"), kind, split_texts=False)
        answer = "\n".join(part for part in answer_parts if isinstance(part, str))
    return Chat(result, placed + unplaced, answer)


class _MediaPart(NamedTuple):
    """The place of an image or video in a message.

    Attributes:
        url: The image's path or data URL. None for the next one of the sample's images or videos.
    """

    url: str | None = None


def _parts(content: Any, kind: str, split_texts: bool) -> Iterator[str | _MediaPart]:
    """The texts and images, or videos, of a message, in order.

    Args:
        content: The message's "content".
        kind: "image" or "video".
        split_texts: Whether `<image>`, or `<video>`, in a text is a placeholder. If not, it is left in the
            text.
    """
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise BadSampleError("the 'content' of a message has to be a string or a list of parts")
    for part in content:
        found = part.get("type") if isinstance(part, dict) else None
        if found in ("text", "input_text") and isinstance(part.get("text"), str):
            yield from _split(part["text"], PLACEHOLDERS[kind]) if split_texts else [part["text"]]
        elif found == kind:
            yield _MediaPart()
        elif kind == "image" and found in ("image_url", "input_image"):
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, dict) else url
            if not isinstance(url, str):
                raise BadSampleError(f"a part of type {found!r} has no URL in 'image_url'")
            yield _MediaPart(url)
        else:
            allowed = 'image, image_url, video with the key "video"' if kind == "image" else "video"
            raise BadSampleError(
                f"a part of type {found!r} cannot be read: it has to be {allowed}, or text with a string in "
                "'text'"
            )


def _split(text: str, placeholder: str) -> Iterator[str | _MediaPart]:
    """The parts of a text with placeholders in it."""
    first, *rest = text.split(placeholder)
    if not rest:
        yield text
        return
    # Line feeds around a placeholder are dropped, because the chat template writes its own.
    if first.strip():
        yield first.strip()
    for following in rest:
        yield _MediaPart()
        if following.strip():
            yield following.strip()

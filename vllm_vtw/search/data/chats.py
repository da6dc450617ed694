"""Chats of data files, OpenAI's messages and LLaVA's conversations, in one form."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from vllm_vtw.search.data.sample import BadSampleError, Message

PLACEHOLDER = "<image>"  # of LLaVA's processors
ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ("system", "user", "assistant")}


class Chat(NamedTuple):
    """A chat up to the user's last message.

    Attributes:
        messages: Each content a list of parts of type "text" and "image".
        images: In the order of the parts.
        answer: What the assistant says last, where that follows the user's last message.
    """

    messages: list[Message]
    images: list[str]
    answer: str | None


def from_conversations(turns: Any) -> list[Message]:
    """LLaVA's turns as messages of OpenAI's.

    Raises:
        BadSampleError: They are no turns.
    """
    if not isinstance(turns, list) or not turns:
        raise BadSampleError("'conversations' is not a list of turns")
    messages = []
    for turn in turns:
        role = ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            raise BadSampleError("a turn has to have 'from', which is human or gpt, and 'value', a string")
        messages.append({"role": role, "content": turn["value"]})
    return messages


def parse_chat(messages: Any, images: list[str]) -> Chat:
    """A chat of OpenAI's messages.

    Pictures of `images` stand where parts of type "image" or `<image>` in a text are, or else before the
    first question.

    Raises:
        BadSampleError: It is no chat that ends with a question or its answer.
    """
    if not isinstance(messages, list) or not messages:
        raise BadSampleError("'messages' is not a list of messages")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise BadSampleError("a message has to have a 'role': system, user or assistant")
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise BadSampleError("there is no message of the user's")
    asked = len(roles) - roles[::-1].index("user")
    if "system" in roles[asked:]:
        raise BadSampleError("the last message has to be the user's or the assistant's")
    left, placed, result = list(images), [], []
    for message in messages[:asked]:
        plain = []
        for part in _parts(message.get("content"), with_places=bool(images)):
            if isinstance(part, str):
                plain.append({"type": "text", "text": part})
                continue
            if part.url is None and not left:
                raise BadSampleError("there are more places for images than images")
            plain.append({"type": "image"})
            placed.append(left.pop(0) if part.url is None else part.url)
        result.append({"role": message["role"], "content": plain})
    if left:
        if placed:
            raise BadSampleError("there are more images than places for them")
        first = result[roles.index("user")]
        first["content"] = [{"type": "image"}] * len(left) + first["content"]
    answer = None
    if messages[asked:]:
        said = _parts(messages[-1].get("content"), with_places=False)
        answer = "\n".join(part for part in said if isinstance(part, str))
    return Chat(result, placed + left, answer)


class _Place(NamedTuple):
    """Where an image stands; without its own, the next one of the sample's."""

    url: str | None = None


def _parts(content: Any, with_places: bool) -> Iterator[str | _Place]:
    """The texts and places for images of a message; with places, a text may have some, too."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise BadSampleError("the 'content' of a message has to be a string or a list of parts")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "input_text") and isinstance(part.get("text"), str):
            yield from _split(part["text"]) if with_places else [part["text"]]
        elif kind == "image":
            yield _Place()
        elif kind in ("image_url", "input_image"):
            url = part.get("image_url")
            url = url.get("url") if isinstance(url, dict) else url
            if not isinstance(url, str):
                raise BadSampleError(f"an {kind!r} has no URL")
            yield _Place(url)
        else:
            raise BadSampleError(f"a part of type {kind!r}: has to be text, image or image_url")


def _split(text: str) -> Iterator[str | _Place]:
    first, *rest = text.split(PLACEHOLDER)
    if not rest:
        yield text
        return
    # The chat template writes the line feeds that stand around a placeholder.
    if first.strip():
        yield first.strip()
    for following in rest:
        yield _Place()
        if following.strip():
            yield following.strip()

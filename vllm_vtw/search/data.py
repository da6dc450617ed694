"""The samples that a search looks at: JSON lines with pictures and prompts, or a folder of pictures."""

import base64
import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

Message = dict[str, Any]
PLACEHOLDER = "<image>"  # of LLaVA's processors
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


class BadSampleError(ValueError):
    """A sample cannot be used; the message says why."""


@dataclass(frozen=True)
class Sample:
    """One request, its pictures not read yet.

    Attributes:
        where: The line, or the file, that it comes from.
        images: Paths or data URLs, in the order of the prompt.
        prompt: The text as the model gets it, with its image placeholders; None where there are messages.
        messages: A chat, each content a list of parts of type "text" and "image".
        task: What accuracy is looked at by.
        answer: What the model should say, where that is known.
    """

    where: str
    images: tuple[str, ...]
    prompt: str | None = None
    messages: tuple[Message, ...] = ()
    task: str = "all"
    answer: str | None = None
    folder: Path = field(default=Path(), compare=False)

    def pictures(self) -> list[Image.Image]:
        """The pictures in RGB.

        Raises:
            BadSampleError: One cannot be read.
        """
        return [_picture(source, self.folder) for source in self.images]


@dataclass(frozen=True)
class Data:
    """What a file or folder holds.

    Attributes:
        samples: Those that can be used, as far as can be seen without their pictures.
        bad: By place, why others cannot.
        sha256: Of the file; of a folder, of the question and the pictures' names.
    """

    samples: list[Sample]
    bad: dict[str, str]
    sha256: str


def read_data(path: Path, prompt: str | None) -> Data:
    """Reads JSON lines, or a folder of pictures.

    Args:
        path: Of the file or folder.
        prompt: The question about each picture of a folder; only there.

    Raises:
        OSError: The path cannot be read.
        ValueError: `prompt` is missing, or is there for a file that has its own.
    """
    if path.is_dir():
        if prompt is None:
            raise ValueError(f"{path} is a folder of pictures: give the question about them with --prompt")
        return _pictures_of(path, prompt)
    if prompt is not None:
        raise ValueError(f"--prompt is for a folder of pictures; {path} has a prompt in every line")
    content = path.read_bytes()
    samples, bad = [], {}
    for number, line in enumerate(content.splitlines(), 1):
        where = f"line {number}"
        if line.strip():
            try:
                samples.append(_sample(where, line, path.parent))
            except BadSampleError as error:
                bad[where] = str(error)
    return Data(samples, bad, hashlib.sha256(content).hexdigest())


def _pictures_of(folder: Path, prompt: str) -> Data:
    names = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    asked, messages = _asked(prompt, 1)
    samples = [Sample(f"file {name}", (name,), asked, messages, folder=folder) for name in names]
    return Data(samples, {}, hashlib.sha256("\0".join([prompt, *names]).encode()).hexdigest())


def drawn(samples: Iterable[Sample], seed: int) -> list[Sample]:
    """The samples in random order, the tasks by turns, so that the first few have some of every task."""
    shuffled = list(samples)
    Random(seed).shuffle(shuffled)
    by_task: dict[str, list[Sample]] = defaultdict(list)
    for sample in shuffled:
        by_task[sample.task].append(sample)
    turns = zip_longest(*(by_task[task] for task in sorted(by_task)))
    return [sample for sample in chain.from_iterable(turns) if sample is not None]


def _sample(where: str, line: bytes, folder: Path) -> Sample:
    try:
        content = json.loads(line)
        json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise BadSampleError(f"not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadSampleError("not a JSON object")
    task, answer = content.get("task"), content.get("answer")
    for key, value in (("task", task), ("answer", answer)):
        if isinstance(value, bool) or not isinstance(value, str | int | float | None):
            raise BadSampleError(f"'{key}' is not a string")
    images = _images(content)
    prompt, messages = content.get("prompt"), content.get("messages")
    if (prompt is None) == (messages is None):
        raise BadSampleError("has to have either 'prompt' or 'messages'")
    if messages is not None:
        messages, images = _parts(messages, images)
    elif isinstance(prompt, str):
        prompt, messages = _asked(prompt, len(images))
    else:
        raise BadSampleError("'prompt' is not a string")
    if not images:
        raise BadSampleError("has no image: 'image', 'images', or an 'image_url' in 'messages'")
    return Sample(
        where,
        tuple(images),
        prompt,
        tuple(messages),
        task="all" if task is None else str(task),
        answer=None if answer is None else str(answer).strip(),
        folder=folder,
    )


def _images(content: dict[str, Any]) -> list[str]:
    image, images = content.get("image"), content.get("images")
    if image is not None and images is not None:
        raise BadSampleError("has both 'image' and 'images'")
    if images is None:
        images = [] if image is None else [image]
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise BadSampleError("'image' has to be a string and 'images' a list of strings: paths or data URLs")
    return images


def _asked(prompt: str, num_images: int) -> tuple[str | None, tuple[Message, ...]]:
    """A prompt that places its pictures, as it is; any other as a user's turn, its pictures first."""
    if PLACEHOLDER in prompt:
        return prompt, ()
    parts = [{"type": "image"}] * num_images + [{"type": "text", "text": prompt}]
    return None, ({"role": "user", "content": parts},)


def _parts(messages: Any, images: list[str]) -> tuple[list[Message], list[str]]:
    """OpenAI's messages with contents as lists of parts, and the pictures in their order.

    Pictures of 'image' or 'images' stand where parts of type "image" are, or else before the first question.
    """
    if not isinstance(messages, list) or not messages:
        raise BadSampleError("'messages' is not a list of messages")
    left, placed, result = list(images), [], []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
            raise BadSampleError("a message has to have a 'role': system, user or assistant")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise BadSampleError("the 'content' of a message has to be a string or a list of parts")
        plain = []
        for part in parts:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                plain.append({"type": "text", "text": part["text"]})
            elif kind == "image":
                if not left:
                    raise BadSampleError("'messages' has more images than 'images'")
                plain.append({"type": "image"})
                placed.append(left.pop(0))
            elif kind == "image_url":
                url = part.get("image_url")
                url = url.get("url") if isinstance(url, dict) else url
                if not isinstance(url, str):
                    raise BadSampleError("an 'image_url' has no 'url'")
                plain.append({"type": "image"})
                placed.append(url)
            else:
                raise BadSampleError(f"a part of type {kind!r}: has to be text, image or image_url")
        result.append({"role": message["role"], "content": plain})
    if result[-1]["role"] != "user":
        raise BadSampleError("the last message has to be the user's")
    if left:
        if placed:
            raise BadSampleError("'images' has more images than 'messages'")
        first = next(message for message in result if message["role"] == "user")
        first["content"] = [{"type": "image"}] * len(left) + first["content"]
    return result, placed + left


def _picture(source: str, folder: Path) -> Image.Image:
    if "://" in source and not source.startswith("data:"):
        raise BadSampleError(f"image {source!r}: nothing is fetched; give a path or a data URL")
    name = "a data URL" if source.startswith("data:") else repr(source)
    try:
        if not source.startswith("data:"):
            return _rgb(Image.open(folder / source))
        head, _, body = source.partition(",")
        if not head.endswith(";base64"):
            raise ValueError("it is not base64")
        return _rgb(Image.open(io.BytesIO(base64.b64decode(body, validate=True))))
    except FileNotFoundError as error:
        raise BadSampleError(f"image {name}: there is no such file") from error
    except UnidentifiedImageError as error:
        raise BadSampleError(f"image {name}: is no picture of a known format") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadSampleError(f"image {name}: cannot be read: {error}") from error


def _rgb(picture: Image.Image) -> Image.Image:
    """As vLLM shows it to the model: upright, and on white where it is transparent."""
    upright = ImageOps.exif_transpose(picture)
    if upright.mode != "RGBA":
        return upright.convert("RGB")
    white = Image.new("RGB", upright.size, "white")
    white.paste(upright, mask=upright.getchannel("A"))
    return white

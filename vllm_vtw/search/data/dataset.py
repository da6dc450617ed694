# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Reads the samples of a data file or of a folder of images."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from vllm_vtw.search.data.formats import read_entries
from vllm_vtw.search.data.json_entry import parse_sample, prompt_or_chat
from vllm_vtw.search.data.sample import BadSampleError, Sample, Skipped, skip_messages

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Dataset:
    """The samples of a file or folder.

    Attributes:
        samples: The samples that can be used, as far as can be told before their images are read.
        bad: The samples that cannot be used.
        sha256: The SHA-256 of the file. For a folder, that of the question and the names of the images.
    """

    samples: list[Sample]
    bad: list[Skipped]
    sha256: str


def read_data(path: Path, prompt: str | None) -> Dataset:
    """Reads a file of JSON lines, a JSON list, or a folder of images.

    Args:
        path: The file or folder.
        prompt: The question about each image of a folder. None for a file, whose samples have their own.

    Raises:
        OSError: The path cannot be read.
        ValueError: `prompt` is missing for a folder or given for a file, the file has none of the formats, or
            none of its samples can be used, all for the same reason.
    """
    if path.is_dir():
        if prompt is None:
            raise ValueError(f"{path} is a folder of images: give the question about them with --prompt")
        return _read_folder(path, prompt)
    if prompt is not None:
        raise ValueError(
            f"--prompt is for a folder of images: leave it out, as the samples of {path} have prompts already"
        )
    content = path.read_bytes()
    try:
        found = read_entries(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    samples, bad = [], []
    for where, entry in found:
        try:
            if isinstance(entry, BadSampleError):
                raise entry
            samples.append(parse_sample(where, entry, path.parent))
        except BadSampleError as error:
            bad.append(Skipped(where, error))
    reasons = skip_messages(bad)
    if not samples and len(reasons) == 1:
        raise ValueError(f"{path}: {reasons[0]}")
    return Dataset(samples, bad, hashlib.sha256(content).hexdigest())


def _read_folder(folder: Path, prompt: str) -> Dataset:
    names = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    whole, messages = prompt_or_chat(prompt, 1)
    samples = [Sample(f"file {name}", (name,), whole, messages, folder=folder) for name in names]
    return Dataset(samples, [], hashlib.sha256("\0".join([prompt, *names]).encode()).hexdigest())

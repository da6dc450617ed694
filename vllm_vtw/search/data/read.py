"""The samples that a search looks at: those of a file, or a folder of pictures."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from vllm_vtw.search.data.entry import parse_sample, prompt_or_chat
from vllm_vtw.search.data.formats import read_entries
from vllm_vtw.search.data.sample import BadSampleError, Sample, Skipped, skip_messages

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Dataset:
    """What a file or folder holds.

    Attributes:
        samples: Those that can be used, as far as can be seen without their pictures.
        bad: Those that cannot.
        sha256: Of the file; of a folder, of the question and the pictures' names.
    """

    samples: list[Sample]
    bad: list[Skipped]
    sha256: str


def read_data(path: Path, prompt: str | None) -> Dataset:
    """Reads JSON lines, a JSON list, or a folder of pictures.

    Args:
        path: Of the file or folder.
        prompt: The question about each picture of a folder; only there.

    Raises:
        OSError: The path cannot be read.
        ValueError: `prompt` is missing, or is there for a file that has its own; or nothing in the file can
            be used, for one reason.
    """
    if path.is_dir():
        if prompt is None:
            raise ValueError(f"{path} is a folder of pictures: give the question about them with --prompt")
        return _pictures_of(path, prompt)
    if prompt is not None:
        raise ValueError(f"--prompt is for a folder of pictures; {path} has a prompt in every line")
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


def _pictures_of(folder: Path, prompt: str) -> Dataset:
    names = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    whole, messages = prompt_or_chat(prompt, 1)
    samples = [Sample(f"file {name}", (name,), whole, messages, folder=folder) for name in names]
    return Dataset(samples, [], hashlib.sha256("\0".join([prompt, *names]).encode()).hexdigest())

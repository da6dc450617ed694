# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""A file of JSON lines to which a search adds its results, so that it can be interrupted and resumed."""

import json
from pathlib import Path
from typing import Any

JOURNAL_FILES = ("samples.jsonl", "gsearch.jsonl", "psigmoid.jsonl", "exits.jsonl", "exits-answers.jsonl")
"""The journals of all searches. A folder with one of them holds the results of a search."""
HEAD_BYTES = 60
"""The `format` of a journal is within this number of bytes from the file's start."""
MAX_VALUE_CHARS = 60
"""Messages do not show the values of settings that are longer than this."""


class Journal:
    """The results of a search that uses certain settings.

    The file's first line holds its format and the settings. Every line after it is a result.

    Args:
        file: The journal's file. Its folder is created if it is missing.
        kind: The kind of search, such as "calibration". The file's format is named after it.
        settings: The settings of this run.
        resume: Whether to continue with the results that the file holds.

    Attributes:
        found: The results so far, in the order in which they were added.

    Raises:
        ValueError: The folder holds another search, the file cannot be read, its results were found with
            other settings, it has results but `resume` is not set, or `resume` is set but there is no file.
    """

    def __init__(self, file: Path, kind: str, settings: dict[str, Any], resume: bool) -> None:
        self.file, self.kind = file, kind
        self.found: list[dict[str, Any]] = []
        self._refuse_others()
        if resume and not file.exists():
            raise ValueError(
                f"--resume: there is no {file}: leave out --resume, or give the --out folder of an earlier "
                "search"
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = self._read()
        if len(lines) < 2:  # Without results, the settings may change.
            head = json.dumps({"format": self._format} | settings)
            file.write_text(head + "\n", encoding="utf-8")
        elif not resume:
            raise ValueError(
                f"{file.parent} already holds results ({kind}): go on with --resume, or give another --out"
            )
        else:
            self._check(lines[0], settings)
            self.found = lines[1:]

    @property
    def _format(self) -> str:
        return f"vllm-vtw-{self.kind.lower()}/2"

    def _refuse_others(self) -> None:
        """Raises a ValueError if the folder holds the journal of another kind of search."""
        for name in set(JOURNAL_FILES) - {self.file.name}:
            other = self.file.with_name(name)
            if other.is_file() and b'"format": "vllm-vtw-' in other.read_bytes()[:HEAD_BYTES]:
                raise ValueError(
                    f"{other.parent} already holds the results of another search ({name}): give another --out"
                )

    def begin(self, samples: dict[str, Any]) -> None:
        """Records which samples the search uses or, if it is resumed, checks that they are the same.

        A search calls this before it adds results if it knows only after the journal is opened which samples
        it uses. The record is the first item of `found`.

        Args:
            samples: What identifies the samples, such as their number and a digest.

        Raises:
            ValueError: The search that is resumed used other samples.
        """
        if self.found:
            self._check(self.found[0], samples)
        else:
            self.add(samples)

    def add(self, line: dict[str, Any]) -> None:
        """Adds a result to `found` and to the file."""
        self.found.append(line)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def _read(self) -> list[Any]:
        """The content of the file's complete lines. Empty if there is no file."""
        if not self.file.exists():
            return []
        content = self.file.read_text(encoding="utf-8")
        complete = content[: content.rfind("\n") + 1]
        try:
            lines = [json.loads(line) for line in complete.splitlines()]
            found_format = lines[0]["format"]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{self.file} is damaged, or is not the journal of a search ({self.kind}): give another --out"
            ) from error
        if found_format != self._format:
            raise ValueError(
                f"{self.file} has the format {repr(found_format)[:MAX_VALUE_CHARS]}, and this command needs "
                f"{self._format!r}: give another --out"
            )
        if complete != content:  # The process was killed while it wrote a line.
            self.file.write_text(complete, encoding="utf-8")
        return lines

    def _check(self, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        """Raises a ValueError if a line of the file differs from the present run's in one of `wanted`."""
        for name, now in wanted.items():
            before = found.get(name)
            if before != now:
                is_short = max(len(str(now)), len(str(before))) < MAX_VALUE_CHARS
                values = f" ({before}, now {now})" if is_short else ""
                raise ValueError(
                    f"--resume: {self.file} was made with another value of {name}{values}: use the same as "
                    "then, or give another --out"
                )

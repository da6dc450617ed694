"""A file of JSON lines that a search adds to, so that it can be interrupted and resumed."""

import json
from pathlib import Path
from typing import Any

LONG = 60
FILES = ("samples.jsonl", "gsearch.jsonl", "psigmoid.jsonl", "exits.jsonl", "exits-answers.jsonl")
"""Of all searches, by which a folder is known to hold the results of one."""


class Journal:
    """What was found so far under some settings, which are the file's first line.

    Args:
        file: Its folder is made where it is missing.
        kind: What the file is of, which is its format.
        settings: Those of now.
        resume: Go on with what is there.

    Raises:
        ValueError: What the file has was found otherwise, `resume` was not asked for or has nothing to go on
            with, or the folder is another search's.
    """

    def __init__(self, file: Path, kind: str, settings: dict[str, Any], resume: bool) -> None:
        self.file, self.kind = file, kind
        self.found: list[dict[str, Any]] = []
        self._refuse_others()
        if resume and not file.exists():
            raise ValueError(
                f"--resume: there is no {file}: leave it out, or give the --out of what to go on with"
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = self._read()
        if len(lines) < 2:
            head = json.dumps({"format": self._format} | settings)
            file.write_text(head + "\n", encoding="utf-8")
        elif not resume:
            raise ValueError(f"{file.parent} holds a {kind}: go on with --resume, or give another --out")
        else:
            self._check(lines[0], settings)
            self.found = lines[1:]

    @property
    def _format(self) -> str:
        return f"vllm-vtw-{self.kind.lower()}/1"

    def _refuse_others(self) -> None:
        for name in set(FILES) - {self.file.name}:
            other = self.file.with_name(name)
            if other.is_file() and b'"format": "vllm-vtw-' in other.read_bytes()[:LONG]:
                raise ValueError(f"{other.parent} holds another search, {name}: give another --out")

    def begin(self, samples: dict[str, Any]) -> None:
        """Writes what the samples are, or, resumed, checks that they are the same.

        Raises:
            ValueError: They are others.
        """
        if self.found:
            self._check(self.found[0], samples)
        else:
            self.add(samples)

    def add(self, line: dict[str, Any]) -> None:
        """Writes what was found."""
        self.found.append(line)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")

    def _read(self) -> list[Any]:
        """What the file's whole lines say; none where there is no file."""
        if not self.file.exists():
            return []
        content = self.file.read_text(encoding="utf-8")
        whole = content[: content.rfind("\n") + 1]
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            ours = lines[0]["format"] == self._format
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{self.file} cannot be read as a {self.kind}: give another --out") from error
        if not ours:
            raise ValueError(f"{self.file} is not of this version's {self.kind}: give another --out")
        if whole != content:  # the process was killed while it wrote
            self.file.write_text(whole, encoding="utf-8")
        return lines

    def _check(self, head: dict[str, Any], settings: dict[str, Any]) -> None:
        for name, now in settings.items():
            if head.get(name) != now:
                short = max(len(str(now)), len(str(head.get(name)))) < LONG
                values = f", {head.get(name)}, and now it is {now}" if short else ""
                raise ValueError(
                    f"--resume: {self.file} was made with another {name}{values}: give the same as then, or "
                    "another --out"
                )

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Data as people have it: LLaVA's own files, and files that are none."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.search.command import calibrate
from vllm_vtw.search.data.dataset import read_data
from vllm_vtw.search.data.sample import BadSampleError, Sample, Skipped, skip_messages

IMAGE = {"type": "image"}
ENTRIES = [
    {
        "id": f"{number:012}",
        "image": f"{number}.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is\u2028this, caf\u00e9 or \u6570?"},
            {"from": "gpt", "value": "A dot."},
            {"from": "human", "value": "Which colour?"},
            {"from": "gpt", "value": "Red.\n"},
        ],
    }
    for number in range(9)
]


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def lines(entries: list[Any], end: str = "\n") -> str:
    return end.join(json.dumps(entry, ensure_ascii=False) for entry in entries)


FILES = {
    "a list": json.dumps(ENTRIES).encode(),
    "a list in lines": json.dumps(ENTRIES, indent=2, ensure_ascii=False).encode(),
    "a list with a BOM and CRLF": json.dumps(ENTRIES, indent=2).replace("\n", "\r\n").encode("utf-8-sig"),
    "lines": lines(ENTRIES).encode(),
    "lines with a BOM": lines(ENTRIES).encode("utf-8-sig"),
    "lines with CRLF": lines(ENTRIES, "\r\n").encode(),
    "lines of PowerShell": lines(ENTRIES, "\r\n").encode("utf-16"),
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_llavas_conversations_are_read_in_every_file(tmp_path, content):
    file = tmp_path / "data.json"
    file.write_bytes(content)
    data = read_data(file, None)
    assert not data.bad
    assert [sample.images for sample in data.samples] == [(f"{number}.png",) for number in range(9)]
    first = data.samples[0]
    assert first.where in ("line 1", "item 1")
    assert first.messages == (
        {"role": "user", "content": [IMAGE, text("What is\u2028this, caf\u00e9 or \u6570?")]},
        {"role": "assistant", "content": [text("A dot.")]},
        {"role": "user", "content": [text("Which colour?")]},
    )
    assert (first.prompt, first.answer) == (None, "Red.")


def read(folder: Path, content: str) -> Sample:
    file = folder / "data.json"
    file.write_text(content)
    (sample,) = read_data(file, None).samples
    return sample


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("<image>\nWhat?", [IMAGE, text("What?")]),
        ("What?\n<image>", [text("What?"), IMAGE]),
        ("What?", [IMAGE, text("What?")]),
        ("<image>", [IMAGE]),
    ],
)
def test_an_image_stands_where_its_placeholder_is(tmp_path, value, parts):
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": value}]
    sample = read(tmp_path, json.dumps([{"image": "a.png", "conversations": turns}]))
    assert sample.messages[1]["content"] == parts
    assert sample.answer is None


@given(st.lists(st.sampled_from(["<image>", "a ", "b\n"]), min_size=1, max_size=9), st.integers(0, 3))
def test_as_many_images_as_placeholders_or_placeholders_before_the_question(
    tmp_path_factory, pieces, num_images
):
    folder = tmp_path_factory.mktemp("data")
    images = [f"{number}.png" for number in range(num_images)]
    value, places = "".join(pieces), pieces.count("<image>")
    content = json.dumps([{"image": images, "conversations": [{"from": "human", "value": value}]}])
    if num_images and places in (0, num_images):
        sample = read(folder, content)
        parts = sample.messages[0]["content"]
        assert sample.images == tuple(images)
        assert parts.count(IMAGE) == num_images
        said = "".join("<image>" if part == IMAGE else part["text"] for part in parts)
        assert "".join(said.split()) == ("" if places else "<image>" * num_images) + "".join(value.split())
    else:
        with pytest.raises(ValueError, match=r"has no image|more images than|more image placeholders"):
            read(folder, content)


NO_DATA = {
    "csv": (
        b"image,prompt\na.png,What?\n" * 170,
        "line 1: not JSON: .*; --data takes JSON lines, a",
    ),
    "numbers": (b"1\n2\n" * 170, "line 1: not a JSON object; --data takes JSON lines"),
    "parquet": (b"PAR1" + bytes(range(256)) * 9 + b"PAR1", "--data takes JSON lines"),
    "utf-16 without an end": (b"\xff\xfe\0", "the file is not JSON: --data takes JSON lines"),
    "one object": (json.dumps(ENTRIES[0], indent=2).encode(), "line 1: not JSON"),
    "a list cut": (json.dumps(ENTRIES).encode()[:-5], "begins like a JSON list but is not one"),
    "a list of texts": (b'["a", "b"]', "item 1: not a JSON object"),
    "no question": (
        b'{"image": "a.png", "question": "What?"}\n' * 170,
        "lines 1, 2, 3 and 167 more: has to",
    ),
    "no image": (b'[{"prompt": "What?"}, {"prompt": "Who?"}]', r"items 1, 2: has no image: give 'image'"),
}


@pytest.mark.parametrize(("content", "said"), NO_DATA.values(), ids=NO_DATA)
def test_what_is_no_data_is_said_once(tmp_path, content, said):
    file = tmp_path / "data"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_data(file, None)
    ended = calibrate(file, tmp_path / "out")
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.count("\n") == 1
    assert ended.err.startswith(f"vtw calibrate: error: {file}: ")


def test_many_bad_lines_are_one_message_for_each_reason(tmp_path):
    good = [{"image": f"{number}.png", "prompt": "What?"} for number in range(8)]
    for number in range(8):
        Image.effect_noise((24, 24), 80).save(tmp_path / f"{number}.png")
    bad: list[Any] = [{"image": f"coco/{number}.jpg", "prompt": "What?"} for number in range(100)]
    bad += [{"prompt": "What?"}] * 70 + ["{"] * 2
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(line if line == "{" else json.dumps(line) for line in [*good, *bad]))
    ended = calibrate(file, tmp_path / "out", "--limit=180", "--layers=11", "--max-tokens=1")
    assert ended.status in (0, 1), ended.err
    said = [line.strip() for line in ended.err.replace("\r", "\n").splitlines() if "skipped" in line]
    assert said[:2] == [
        "skipped: lines 109, 110, 111 and 67 more: "
        "has no image: give 'image', 'images', 'video', or an 'image_url' in 'messages'",
        "skipped: lines 179, 180: not JSON: Expecting property name enclosed in double quotes at column 2",
    ]
    (missing,) = said[2:]
    assert "and 97 more: the first: image 'coco/" in missing
    assert "there is no such file" in missing
    assert json.loads((tmp_path / "out" / "result.json").read_text())["skipped"] == [
        line.removeprefix("skipped: ") for line in said
    ]


@given(st.lists(st.tuples(st.sampled_from(["x", "y"]), st.integers(0, 2)), max_size=30))
def test_every_skipped_sample_is_counted_in_one_line_of_its_kind(reasons):
    skipped = [
        Skipped(f"line {number}", BadSampleError(f"{kind}: {detail}", kind))
        for number, (kind, detail) in enumerate(reasons, 1)
    ]
    found = skip_messages(skipped)
    assert len(found) == len({kind for kind, _ in reasons})
    for line in found:
        places, _, why = line.partition(": ")
        numbers = [number for number, (kind, _) in enumerate(reasons, 1) if f"{kind}: " in why]
        more = places.partition(" and ")[2].removesuffix(" more")
        shown = [int(place) for place in places.partition(" and ")[0].partition(" ")[2].split(", ")]
        assert shown == numbers[:3]
        assert len(shown) + int(more or 0) == len(numbers)

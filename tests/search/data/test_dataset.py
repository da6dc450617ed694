# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""What users write into data files, good and bad."""

import base64
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vllm_vtw.search.data.dataset import Dataset, read_data
from vllm_vtw.search.data.random_order import draw_samples
from vllm_vtw.search.data.sample import Sample

RED, BLUE = (255, 0, 0), (0, 0, 255)


def data_url(colour: tuple[int, int, int]) -> str:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), colour).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (3, 2), RED).save(tmp_path / "pictures" / "red.png")
    Image.new("RGB", (3, 2), BLUE).save(tmp_path / "pictures" / "blue.png")
    return tmp_path


def read(folder: Path, *lines: Any) -> Dataset:
    file = folder / "data.jsonl"
    texts = (json.dumps(line) if isinstance(line, dict) else line for line in lines)
    file.write_bytes(b"\n".join(text if isinstance(text, bytes) else text.encode() for text in texts))
    return read_data(file, None)


def one(folder: Path, line: Any) -> Sample:
    data = read(folder, line)
    assert not data.bad
    (sample,) = data.samples
    return sample


def colours(sample: Sample) -> list[tuple[int, int, int]]:
    return [picture.getpixel((0, 0)) for picture in sample.load_images()]  # type: ignore[misc]


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


IMAGE, VIDEO, WHAT = {"type": "image"}, {"type": "video"}, {"type": "text", "text": "What?"}


def test_a_question_becomes_a_chat_with_the_images_first(folder):
    sample = one(folder, {"images": ["pictures/red.png", data_url(BLUE)], "prompt": "What?", "id": 7})
    assert sample.prompt is None
    assert sample.messages == (user(IMAGE, IMAGE, WHAT),)
    assert colours(sample) == [RED, BLUE]
    assert (sample.where, sample.task, sample.answer) == ("line 1", "all", None)


def test_a_prompt_with_placeholders_is_left_alone(folder):
    line = {"image": "pictures/blue.png", "prompt": "USER: <image>\nWhat?", "task": "ocr", "answer": "no"}
    sample = one(folder, line | {"images": None, "messages": None})
    assert (sample.prompt, sample.messages) == ("USER: <image>\nWhat?", ())
    assert (sample.task, sample.answer) == ("ocr", "no")
    assert colours(sample) == [BLUE]


@pytest.mark.parametrize(
    ("line", "messages", "seen"),
    [
        (
            {"messages": [user({"type": "image_url", "image_url": {"url": "pictures/red.png"}}, WHAT)]},
            0,
            [RED],
        ),
        ({"messages": [user(WHAT, {"type": "image_url", "image_url": data_url(BLUE)})]}, 1, [BLUE]),
        ({"image": "pictures/red.png", "messages": [{"role": "user", "content": "What?"}]}, 0, [RED]),
        ({"images": ["pictures/blue.png"], "messages": [user(IMAGE, WHAT)]}, 0, [BLUE]),
        (
            {
                "messages": [
                    user({"type": "input_image", "image_url": data_url(BLUE)}, WHAT | {"type": "input_text"})
                ]
            },
            0,
            [BLUE],
        ),
        ({"images": data_url(RED), "messages": [{"role": "user", "content": "What?\n<image>"}]}, 1, [RED]),
    ],
)
def test_messages_as_openai_has_them(folder, line, messages, seen):
    sample = one(folder, line)
    assert sample.messages == ([user(IMAGE, WHAT), user(WHAT, IMAGE)][messages],)
    assert colours(sample) == seen


@pytest.mark.parametrize(
    "question",
    [
        {"prompt": "What?"},
        {"messages": [user(VIDEO, WHAT)]},
        {"messages": [user(WHAT)]},
        {"conversations": [{"from": "human", "value": "<video>\nWhat?"}]},
    ],
)
def test_a_video(folder, question):
    of_frames = one(folder, {"video": ["pictures/red.png", data_url(BLUE)]} | question)
    assert of_frames.messages == (user(VIDEO, WHAT),)
    assert (of_frames.images, of_frames.video) == ((), ("pictures/red.png", data_url(BLUE)))
    assert one(folder, {"video": "a.mp4"} | question).video == "a.mp4"


def test_a_prompt_with_the_place_of_a_video(folder):
    sample = one(folder, {"video": "a.mp4", "prompt": "USER: <video>\nWhat?"})
    assert (sample.prompt, sample.messages) == ("USER: <video>\nWhat?", ())


def test_images_stand_before_the_first_question_of_a_chat(folder):
    says = {"role": "assistant", "content": "A dot."}
    messages = [{"role": "system", "content": "Be brief."}, user(WHAT), says, user(WHAT)]
    line = {"image": "pictures/red.png", "messages": messages}
    sample = one(folder, line)
    assert [message["role"] for message in sample.messages] == ["system", "user", "assistant", "user"]
    assert sample.messages[1] == user(IMAGE, WHAT)
    assert sample.messages[2]["content"] == [{"type": "text", "text": "A dot."}]


def test_what_the_assistant_says_last_is_the_known_answer(folder):
    says = [{"role": "assistant", "content": text} for text in ("A dot.", "Red.\n")]
    messages = [user(IMAGE, WHAT), says[0], user(WHAT), says[1]]
    line = {"image": "pictures/red.png", "messages": messages}
    sample = one(folder, line)
    assert [message["role"] for message in sample.messages] == ["user", "assistant", "user"]
    assert sample.answer == "Red."
    assert one(folder, line | {"answer": "blue"}).answer == "blue"
    assert one(folder, line | {"messages": messages[:3]}).answer is None


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not JSON"),
        (b'{"image": "a.png", "prompt": "caf\xe9"}', "not JSON"),
        ("[]", "not a JSON object"),
        ("[" * 10_000, "not JSON"),
        ("9" * 10_000, "not JSON"),
        (r'{"image": "a.png", "prompt": "\ud83d"}', "not JSON"),
        ({"prompt": "What?"}, "has no image"),
        ({"image": "a.png"}, "one of 'prompt', 'messages' and 'conversations'"),
        ({"image": "a.png", "prompt": "What?", "messages": []}, "has to have exactly one of"),
        ({"image": "a.png", "images": ["a.png"], "prompt": "What?"}, "both 'image' and 'images'"),
        ({"image": [1], "prompt": "What?"}, "'image' or 'images' has to be a path"),
        ({"video": "a.mp4", "image": "a.png", "prompt": "What?"}, "has a 'video' and images"),
        ({"videos": ["a.mp4"], "prompt": "What?"}, "a sample has one video, under 'video'"),
        ({"video": [], "prompt": "What?"}, "'video' has to be a path, or a list"),
        ({"video": "a.mp4", "messages": [user(IMAGE, WHAT)]}, "it has to be video, or text"),
        ({"video": "a.mp4", "messages": [user(VIDEO, VIDEO)]}, "more video placeholders than videos"),
        ({"image": "a.png", "prompt": 3}, "'prompt' is not a string"),
        ({"image": "a.png", "prompt": "What?", "task": ["a"]}, "'task' is not a string"),
        ({"image": "a.png", "prompt": "What?", "answer": True}, "'answer' is not a string"),
        ({"image": "a.png", "messages": []}, "not a list of messages"),
        ({"image": "a.png", "messages": ["What?"]}, "has to have a 'role'"),
        ({"image": "a.png", "messages": [{"role": "user"}]}, "a string or a list of parts"),
        (
            {"image": "a.png", "messages": [{"role": "assistant", "content": "A."}]},
            "no message with the role user",
        ),
        (
            {"image": "a.png", "messages": [user(WHAT), {"role": "system", "content": "Be brief."}]},
            "only messages with the role assistant may follow the last user message",
        ),
        ({"image": "a.png", "conversations": {}}, "'conversations' is not a list of turns"),
        ({"image": "a.png", "conversations": [{"from": [], "value": "What?"}]}, "a turn has to have 'from'"),
        ({"image": "a.png", "conversations": [{"from": "human"}]}, "and 'value' (a string)"),
        ({"image": "a.png", "messages": [user({"type": "audio"})]}, "a part of type 'audio'"),
        (
            {"image": "a.png", "messages": [user({"type": "image_url"})]},
            "'image_url' has no URL in 'image_url'",
        ),
        ({"image": "a.png", "messages": [user(IMAGE, IMAGE)]}, "more image placeholders than images"),
        ({"images": ["a.png", "b.png"], "messages": [user(IMAGE, WHAT)]}, "more images than image place"),
    ],
)
def test_bad_lines_are_told_with_number_and_reason(folder, line, why):
    good = {"image": "pictures/red.png", "prompt": "What?"}
    data = read(folder, good, line, "", good)
    assert [sample.where for sample in data.samples] == ["line 1", "line 4"]
    (bad,) = data.bad
    assert bad.where == "line 2"
    assert why in str(bad.error)


def test_a_folder_of_pictures_with_one_question(folder):
    (folder / "pictures" / "notes.txt").write_text("no picture")
    data = read_data(folder / "pictures", "What?")
    assert not data.bad
    assert [sample.where for sample in data.samples] == ["file blue.png", "file red.png"]
    assert [colours(sample) for sample in data.samples] == [[BLUE], [RED]]
    assert data.samples[0].messages == (user(IMAGE, WHAT),)
    whole = read_data(folder / "pictures", "USER: <image>\nWhat?")
    assert (whole.samples[0].prompt, whole.samples[0].messages) == ("USER: <image>\nWhat?", ())
    assert whole.sha256 != data.sha256
    (folder / "pictures" / "notes.txt").write_text("still no picture")
    assert read_data(folder / "pictures", "What?").sha256 == data.sha256
    with pytest.raises(ValueError, match="--prompt"):
        read_data(folder / "pictures", None)
    with pytest.raises(ValueError, match="--prompt is for a folder"):
        read_data(folder / "pictures" / "notes.txt", "What?")


def test_numbers_may_be_answers(folder):
    sample = one(folder, {"image": "pictures/red.png", "prompt": "How many?", "answer": 3, "task": 1})
    assert (sample.answer, sample.task) == ("3", "1")
    assert one(folder, {"image": "pictures/red.png", "prompt": "Who?", "answer": " Ann\n"}).answer == "Ann"


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(0, 5))
def test_a_draw_has_every_sample_once_and_its_beginning_of_every_task_alike(tasks, seed):
    samples = [Sample(f"line {number}", (), task=task) for number, task in enumerate(tasks)]
    order = draw_samples(samples, seed)
    assert sorted(sample.where for sample in order) == sorted(sample.where for sample in samples)
    assert order == draw_samples(samples, seed)
    all_of = Counter(tasks)
    for number in range(len(order)):
        seen = Counter(sample.task for sample in order[:number])
        most = max(seen.values(), default=0)
        assert all(seen[task] >= min(most - 1, all_of[task]) for task in all_of)


def test_another_seed_is_another_draw():
    samples = [Sample(f"line {number}", ()) for number in range(30)]
    assert draw_samples(samples, 0) != draw_samples(samples, 1)

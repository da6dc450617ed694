# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Pictures against vLLM's own loader, in every mode and format that Pillow writes."""

import base64
import io
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from vllm.multimodal.image import ALLOWED_IMAGE_FORMATS
from vllm.multimodal.media import ImageMediaIO

from vllm_vtw.search.data.images import REFUSED_FORMATS, decode_image
from vllm_vtw.search.data.sample import BadSampleError, Sample

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:PIL", "ignore::UserWarning:PIL")

SIZE = (24, 16)
BROKEN_EXIF = b"Exif\0\0MM\0*\0\0"
Image.init()


def by_vllm(content: bytes) -> Image.Image | None:
    """What vLLM shows; None where it refuses."""
    try:
        return ImageMediaIO().load_bytes(content).media
    except Exception:
        return None


def by_us(content: bytes, folder: Path) -> Image.Image | None:
    (folder / "picture").write_bytes(content)
    try:
        (found,) = Sample("line 1", ("picture",), folder=folder).load_images()
    except BadSampleError:
        return None
    return found


def same(found: Image.Image | None, wanted: Image.Image | None) -> bool:
    if found is None or wanted is None:
        return found is wanted
    return (found.mode, found.size, found.tobytes()) == ("RGB", wanted.size, wanted.convert("RGB").tobytes())


def noise(mode: str) -> Image.Image | None:
    """Random values in a mode; None where Pillow makes none."""
    rng = np.random.default_rng(0)
    clear = Image.fromarray(rng.integers(0, 256, (*reversed(SIZE), 4), dtype=np.uint8))
    with suppress(ValueError):
        return clear.convert(mode)
    try:
        return clear.convert("L").convert(mode)
    except ValueError:
        return Image.frombytes(mode, SIZE, rng.bytes(4 * SIZE[0] * SIZE[1])[: 2 * SIZE[0] * SIZE[1]])


def drawn_images() -> Iterator[tuple[str, Image.Image, dict[str, Any]]]:
    """Pictures with how they are saved."""
    upside, exif = Image.Exif(), Image.ExifTags.Base.Orientation
    for mode in Image.MODES:
        try:
            picture = noise(mode)
        except ValueError:
            continue
        assert picture is not None
        yield mode, picture, {}
        for turned in range(2, 9):
            upside[exif] = turned
            yield f"{mode} turned {turned}", picture, {"exif": upside.tobytes()}
        yield f"{mode} with broken EXIF", picture, {"exif": BROKEN_EXIF}
        yield f"{mode} animated", picture, {"save_all": True, "append_images": [ImageOps.mirror(picture)]}
        for clear in (3, (3, 3, 3), bytes(range(256))):
            yield f"{mode} but {str(clear)[:9]}", picture, {"transparency": clear}
    rgba = noise("RGBA")
    assert rgba is not None
    for colours in (4, 200):
        quantised = rgba.quantize(colours)
        assert quantised.palette is not None
        assert quantised.palette.mode == "RGBA"
        yield f"{colours} colours with alpha", quantised, {}


def test_every_mode_and_format_that_pillow_writes_is_shown_as_vllm_shows_it(tmp_path):
    shown_by_both: set[tuple[str, str]] = set()
    refused_by_both: set[tuple[str, str]] = set()
    others = []
    looked_at: set[bytes] = set()  # most formats ignore most options
    for (what, picture, options), form in product(drawn_images(), sorted(Image.SAVE)):
        if form == "ICNS" and options:  # which it ignores, and draws ten sizes
            continue
        file = io.BytesIO()
        try:
            picture.save(file, form, **options)
        except Exception:  # Pillow does not write this
            continue
        if file.getvalue() in looked_at:
            continue
        looked_at.add(file.getvalue())
        wanted, found = by_vllm(file.getvalue()), by_us(file.getvalue(), tmp_path)
        if not same(found, wanted):
            others.append((form, what))
        (refused_by_both if wanted is None else shown_by_both).add((form, what))
    assert not others
    assert len(shown_by_both) > 500
    assert len({form for form, _ in shown_by_both}) > 20
    assert {form for form, _ in refused_by_both} >= {"EPS", "PALM", "PDF"}
    for clear in (
        ("PNG", "LA"),
        ("PNG", "200 colours with alpha"),
        ("PNG", "L but 3"),
        ("PNG", "I;16 but 3"),
        ("GIF", "P but 3"),
        ("PNG", "RGB with broken EXIF"),
        ("TIFF", "RGBA turned 6"),
        ("WEBP", "RGBA animated"),
    ):
        assert clear in shown_by_both | refused_by_both, clear


def test_broken_exif_does_not_end_the_run(tmp_path):
    picture, file = noise("RGB"), io.BytesIO()
    assert picture is not None
    picture.save(file, "PNG", exif=BROKEN_EXIF)
    with pytest.raises(Exception, match="unpack"):
        ImageOps.exif_transpose(Image.open(file))
    found = by_us(file.getvalue(), tmp_path)
    assert found is not None
    assert found.tobytes() == picture.tobytes()


def test_formats_that_vllm_refuses_are_refused(tmp_path):
    Image.effect_noise(SIZE, 80).save(tmp_path / "a.eps")
    with pytest.raises(BadSampleError, match="is not an image in a format that vLLM reads"):
        Sample("line 1", ("a.eps",), folder=tmp_path).load_images()
    assert set(Image.OPEN) - REFUSED_FORMATS == set(Image.OPEN) & set(ALLOWED_IMAGE_FORMATS)


@given(st.data())
def test_a_damaged_file_is_shown_or_refused_as_vllm_does(data):
    form, mode = data.draw(st.sampled_from([("PNG", "LA"), ("PNG", "P"), ("GIF", "P"), ("BMP", "1")]))
    picture, file = noise(mode), io.BytesIO()
    assert picture is not None
    picture.save(file, form)
    content = bytearray(file.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(1, 2 * len(content))) :]
    wanted = by_vllm(bytes(content))
    try:
        found = decode_image(bytes(content))
    except Exception:
        found = None
    assert same(found, wanted)


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("nowhere.png", "image 'nowhere.png': there is no such file: .*/nowhere.png"),
        ("data.jsonl", "image 'data.jsonl': is not an image in a format that vLLM reads"),
        ("half.png", "image 'half.png': cannot be read"),
        (".", r"image '\.': cannot be read"),
        ("http://localhost/a.png", "images are not downloaded"),
        ("data:image/png,abc", "image a data URL: cannot be read: the data URL is not base64"),
        ("data:image/png;base64,####", "a data URL: cannot be read"),
    ],
)
def test_pictures_that_cannot_be_read_are_told(tmp_path, source, why):
    (tmp_path / "data.jsonl").write_text("{}")
    Image.effect_noise((64, 64), 80).save(tmp_path / "half.png")
    whole = (tmp_path / "half.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadSampleError, match=why):
        Sample("line 1", (source,), folder=tmp_path).load_images()


def test_a_data_url_is_the_picture_that_its_file_is(tmp_path):
    picture, file = noise("LA"), io.BytesIO()
    assert picture is not None
    picture.save(file, "PNG")
    url = "data:image/png;charset=utf-8;base64," + base64.b64encode(file.getvalue()).decode()
    (found,) = Sample("line 1", (url,)).load_images()
    assert same(found, by_vllm(file.getvalue()))

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Loads images in the way in which `vllm serve` does before it gives them to a model."""

import base64
import io
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

REFUSED_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow opens but vLLM refuses."""


class BadImageError(ValueError):
    """Raised if an image or video cannot be loaded: vLLM would refuse it, or it is not on this machine.

    Args:
        what: What the message calls it, such as `image 'a.png'`.
        kind: The reason, in words that are the same for all images that fail for it.
        detail: More about the reason, specific to this image.
    """

    def __init__(self, what: str, kind: str, detail: str = "") -> None:
        super().__init__(f"{what}: {kind}{detail and f': {detail}'}")
        self.kind = kind


def load_image(source: str, folder: Path) -> Image.Image:
    """Loads the image of a path or data URL, in RGB.

    Args:
        source: The path or data URL.
        folder: The folder that a relative path starts from.

    Raises:
        BadImageError: The image cannot be read, or `source` is a URL to download from.
    """
    is_url = source.startswith("data:")
    if "://" in source and not is_url:
        raise BadImageError(f"image {source!r}", "images are not downloaded; give a path or a data URL")
    name = "image a data URL" if is_url else f"image {source!r}"
    try:
        return decode_image(_decode_data_url(source) if is_url else (folder / source).read_bytes())
    except FileNotFoundError as error:
        raise BadImageError(name, "there is no such file", str(folder / source)) from error
    except UnidentifiedImageError as error:
        raise BadImageError(name, "is not an image in a format that vLLM reads") from error
    except Exception as error:  # Pillow lets through errors of many types, such as zlib.error
        raise BadImageError(name, "cannot be read", str(error)) from error


def decode_image(content: bytes) -> Image.Image:
    """Decodes an image file: upright by its EXIF orientation, in RGB, and on white if it is transparent.

    Args:
        content: The file's content.

    Raises:
        Exception: Pillow cannot decode the file. vLLM's own loader fails for such files, too.
    """
    Image.init()
    opened = Image.open(io.BytesIO(content), formats=sorted(Image.OPEN.keys() - REFUSED_FORMATS))
    # If the EXIF block is broken, vLLM takes the image as it is stored.
    upright: Image.Image = opened
    with suppress(Exception):
        upright = ImageOps.exif_transpose(opened)
    upright.load()
    # Pillow's own `has_transparency_data` is also true for other modes, whose alpha channel vLLM ignores.
    is_transparent = upright.mode in ("LA", "PA", "RGBA") or "transparency" in upright.info
    if upright.mode == "RGB" or not is_transparent:
        return upright.convert("RGB")
    rgba = upright.convert("RGBA")
    on_white = Image.new("RGB", rgba.size, "white")
    on_white.paste(rgba, mask=rgba.getchannel("A"))
    return on_white


def _decode_data_url(url: str) -> bytes:
    head, _, body = url.partition(",")
    if not head.endswith(";base64"):
        raise ValueError("the data URL is not base64")
    return base64.b64decode(body, validate=True)

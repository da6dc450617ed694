"""Pictures as `vllm serve` shows them to a model."""

import base64
import io
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

REFUSED_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
"""Those that Pillow opens and vLLM does not."""


class BadPictureError(ValueError):
    """vLLM would not show a picture; the message says why.

    Args:
        name: The picture's.
        kind: What the message has in common with those of other pictures.
        detail: What is of this picture alone.
    """

    def __init__(self, name: str, kind: str, detail: str = "") -> None:
        super().__init__(f"image {name}: {kind}{detail and f': {detail}'}")
        self.kind = kind


def load_picture(source: str, folder: Path) -> Image.Image:
    """The picture of a path or data URL, in RGB.

    Args:
        source: The path, or the data URL.
        folder: What the path is relative to.

    Raises:
        BadPictureError: vLLM would not show it either, or it is on another machine.
    """
    is_url = source.startswith("data:")
    if "://" in source and not is_url:
        raise BadPictureError(repr(source), "nothing is fetched; give a path or a data URL")
    name = "a data URL" if is_url else repr(source)
    try:
        return decode_picture(_of_data_url(source) if is_url else (folder / source).read_bytes())
    except FileNotFoundError as error:
        raise BadPictureError(name, "there is no such file", str(folder / source)) from error
    except UnidentifiedImageError as error:
        raise BadPictureError(name, "is no picture of a format that vLLM reads") from error
    except Exception as error:  # Pillow raises what comes, struct.error and zlib.error among it
        raise BadPictureError(name, "cannot be read", str(error)) from error


def decode_picture(content: bytes) -> Image.Image:
    """The picture of a file's content: upright, in RGB, and on white where it is transparent.

    Raises:
        Exception: Of Pillow, where vLLM's own loader raises, too.
    """
    Image.init()
    opened = Image.open(io.BytesIO(content), formats=sorted(Image.OPEN.keys() - REFUSED_FORMATS))
    # vLLM shows a picture as it is stored where its EXIF block is broken.
    upright: Image.Image = opened
    with suppress(Exception):
        upright = ImageOps.exif_transpose(opened)
    upright.load()
    # Pillow's own `has_transparency_data` is true of more, which vLLM shows without their alpha.
    is_clear = upright.mode in ("LA", "PA", "RGBA") or "transparency" in upright.info
    if upright.mode == "RGB" or not is_clear:
        return upright.convert("RGB")
    clear = upright.convert("RGBA")
    white = Image.new("RGB", clear.size, "white")
    white.paste(clear, mask=clear.getchannel("A"))
    return white


def _of_data_url(url: str) -> bytes:
    head, _, body = url.partition(",")
    if not head.endswith(";base64"):
        raise ValueError("it is not base64")
    return base64.b64decode(body, validate=True)

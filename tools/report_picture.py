# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Makes the picture of a calibration's report: calibrates the trained model, and takes a screenshot.

    python -m tools.report_picture

Chromium has to be on the PATH.
"""

import io
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from benchmarks.quality.data import write_data
from benchmarks.quality.model import CHECKPOINT, MAX_ANSWER_TOKENS
from benchmarks.quality.tasks import TASKS
from tools.browser import chromium

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "pictures" / "calibration-report.png"
SAMPLES = 64
WIDTH, MARGIN = 1000, 16
"""The width of the picture, and what it shows below the plots, in pixels."""


def main() -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        # The report shows the paths that it was made with.
        (folder / "checkpoint").symlink_to(CHECKPOINT)
        data = write_data(folder, list(TASKS), SAMPLES)
        options = [f"--data={data.name}", f"--limit={SAMPLES}", f"--max-tokens={MAX_ANSWER_TOKENS}"]
        command = [str(Path(sys.executable).with_name("vtw")), "calibrate", "checkpoint", *options]
        subprocess.run(command, cwd=folder, check=True)
        take_picture(folder / "vtw-calibration" / "report.html", PICTURE)
    print(PICTURE)


def take_picture(report: Path, picture: Path) -> None:
    """Takes a screenshot of a report, from its head to its first row of plots.

    Args:
        report: The report.
        picture: The PNG file to write.
    """
    with chromium() as browser:
        page = browser.new_page(color_scheme="light", viewport={"width": WIDTH, "height": 800})
        page.goto(report.as_uri())
        box = page.locator("figure").first.bounding_box()
        assert box is not None
        height = box["y"] + box["height"] + MARGIN
        shot = page.screenshot(full_page=True, clip={"x": 0, "y": 0, "width": WIDTH, "height": height})
    picture.parent.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(shot)).convert("RGB").quantize().save(picture, optimize=True)


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Prints README's table of supported models, from the table that the plugin itself uses.

.venv/bin/python -m tools.support_table
"""

from vllm_vtw.families import FAMILIES

HEADER = """\
| models | class in vLLM | video | on the Hugging Face Hub | `vtw calibrate` and other searches |
| --- | --- | --- | --- | --- |
"""


def table() -> str:
    """The table in Markdown, with one row for each family."""
    rows = [
        (
            family.name,
            f"`{family.architecture}`",
            family.video or "no",
            ", ".join(f"`{name}`" for name in family.hub),
            "yes" if family.in_transformers else "no: transformers lacks it",
        )
        for family in FAMILIES
    ]
    return HEADER + "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    print(table(), end="")

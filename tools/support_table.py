# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Prints the table of supported models of `docs/models.md`, from the table that the plugin itself uses.

.venv/bin/python -m tools.support_table
"""

from vllm_vtw.families import FAMILIES, Family

HEADER = """\
| models | class in vLLM | images | video | on the Hugging Face Hub | `vtw calibrate` and other searches |
| --- | --- | --- | --- | --- | --- |
"""


def table() -> str:
    """The table in Markdown, with one row for each family."""
    rows = [
        (
            family.name,
            f"`{family.architecture}`",
            "yes" if family.images else "no",
            family.video or "no",
            ", ".join(f"`{name}`" for name in family.hub),
            _searches(family),
        )
        for family in FAMILIES
    ]
    return HEADER + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _searches(family: Family) -> str:
    if family.in_transformers:
        return "yes"
    return f"in the format of `{family.twin}`" if family.twin else "no: transformers lacks it"


if __name__ == "__main__":
    print(table(), end="")

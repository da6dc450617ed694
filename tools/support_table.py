# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Prints README's table of supported models, from the table that the plugin itself uses.

.venv/bin/python -m tools.support_table
"""

from vllm_vtw.families import FAMILIES

HEADER = """\
| models | class in vLLM | video | on the Hugging Face Hub | answers tested |
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
            "against transformers" if family.is_tested else "not yet",
        )
        for family in FAMILIES
    ]
    return HEADER + "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    print(table(), end="")

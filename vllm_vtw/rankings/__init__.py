# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The rankings that decide which visual tokens a stage keeps, if it keeps only some of them.

To add a ranking, subclass `Ranking` in a file of its own, and enter it in `RANKINGS` under its name in policy
files.
"""

from vllm_vtw.rankings.base import Ranking
from vllm_vtw.rankings.last_token_attention import LastTokenAttention

RANKINGS: dict[str, type[Ranking]] = {"last-token-attention": LastTokenAttention}
"""The rankings, by their name in policy files."""

__all__ = ["RANKINGS", "Ranking"]

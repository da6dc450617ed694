"""What visual tokens are ranked by, where a stage keeps some of them: one ranking, one file.

A ranking is a class with one method, `score`. Its name in a policy file stands in `RANKINGS`.
"""

from vllm_vtw.rankings.base import Ranking
from vllm_vtw.rankings.last_token_attention import LastTokenAttention

RANKINGS: dict[str, type[Ranking]] = {"last-token-attention": LastTokenAttention}

__all__ = ["RANKINGS", "Ranking"]

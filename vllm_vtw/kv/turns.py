"""Which prompt gets a step of its own, where a prompt has to be computed in one step."""

PATIENCE = 8
"""For so many steps a prompt waits for room before it gets a step of its own."""


class Turns:
    """Sees to it that a prompt as long as a step is computed, and that it holds nobody up until then.

    vLLM gives tokens to the running requests first. While any of them decodes, a prompt that needs the
    whole step finds no room, and vLLM 0.32 admits nobody behind it. So a prompt that was passed over is
    tried in every second step only, which lets others pass; after `PATIENCE` steps the running requests sit
    out one step for it, at most once in `PATIENCE` steps. Where it still lacks a place or KV blocks then,
    it becomes the first in line: nobody else is admitted until it has been, as vLLM does by itself with a
    request that lacks blocks.

    With three such prompts in the queue, the last one is computed after about `3 * PATIENCE` steps, and the
    running requests sit out three of these.
    """

    def __init__(self) -> None:
        self.since: dict[str, int] = {}
        """By request id: the step in which the prompt was passed over first."""
        self.first_in_line: str | None = None
        self._last_turn = -PATIENCE

    def passed_over(self, request_id: str, step: int) -> None:
        """Notes that a prompt found no room in a step."""
        self.since.setdefault(request_id, step)

    def whose(self, step: int) -> str | None:
        """The request that a step belongs to, where it belongs to one."""
        if not self.since or step - self._last_turn < PATIENCE:
            return None
        request_id = next(iter(self.since)) if self.first_in_line is None else self.first_in_line
        if step - self.since[request_id] < PATIENCE:
            return None
        self._last_turn = step
        self.first_in_line = request_id
        return request_id

    def admits(self, request_id: str, step: int) -> bool:
        """Whether a waiting request may be tried in a step."""
        if self.first_in_line is not None:
            return request_id == self.first_in_line
        return request_id not in self.since or step % 2 == 0

    def forget(self, request_id: str) -> None:
        """Ends the waiting of a request: its prompt is being computed, or it is gone."""
        self.since.pop(request_id, None)
        if self.first_in_line == request_id:
            self.first_in_line = None

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Which prompt gets a step of its own, under policies that compute a prompt in one step."""

PATIENCE = 8
"""The number of steps that a prompt waits for room before it gets a step of its own."""


class Turns:
    """Lets prompts that need a whole step be computed, without holding up other requests until then.

    vLLM gives a step's tokens to the running requests first. As long as any of them decodes, a prompt that
    needs the whole step finds no room, and vLLM 0.32 admits no request after it. Therefore:

    - A prompt that found no room is tried in every second step only. In the steps between, requests behind
      it are admitted.
    - After `PATIENCE` steps, the running requests sit out one step for it. This happens at most once in
      `PATIENCE` steps.
    - If even then `--max-num-seqs` requests are running, or KV blocks are missing, it is first in line: no
      other request is admitted before it. vLLM treats a request that lacks blocks in the same way.

    For example, of three such prompts in the queue, the last one is computed after about `3 * PATIENCE`
    steps, and the running requests sit out three of them.

    Attributes:
        since: By request id, the step in which the prompt first found no room.
        first_in_line: Id of the request that is first in line, if there is one.
    """

    def __init__(self) -> None:
        self.since: dict[str, int] = {}
        self.first_in_line: str | None = None
        self._last_turn = -PATIENCE

    def passed_over(self, request_id: str, step: int) -> None:
        """Records that a prompt found no room in a step."""
        self.since.setdefault(request_id, step)

    def owner_of(self, step: int) -> str | None:
        """The id of the request that gets a step, if one does."""
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
        """Removes a request, because its prompt is being computed or it has ended."""
        self.since.pop(request_id, None)
        if self.first_in_line == request_id:
            self.first_in_line = None

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The guard: some answers are read again with all visual tokens, to count what withdrawal did to them.

An answer is read as the end of a prompt, for whose tokens vLLM computes log-probabilities: once without
withdrawal, and once with that of its own request. Nothing is decoded. The second reading is computed as the
first one is, so that the difference between them is that of withdrawal, not of how batches are computed.
"""

import itertools
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingType
from vllm.v1.request import Request, RequestStatus

from vllm_vtw.choice import KEEP, LAYER
from vllm_vtw.kv.statistics import Statistics
from vllm_vtw.policy import BY_QUESTION, Policy
from vllm_vtw.retention import Retention, visual_spans

CLIENT = -1
"""The index of the front end that readings belong to. There is none, so nobody is sent their outputs."""
PRIORITY = 1 << 30
"""The priority of readings, under vLLM's priority scheduling. Smaller numbers go first."""
MAX_QUEUE = 16
"""How many answers may wait to be read. Each of them keeps the pixels of its request's images in memory."""
MAX_READINGS = 3
"""How often a reading of an answer is begun, if users need its room again and again."""

QUEUE_FULL, NO_ROOM, TOO_LONG = "queue_full", "no_room", "too_long"
INTERRUPTED, FAILED = "interrupted", "failed"
"""The reasons why a chosen answer is not read."""


@dataclass(frozen=True)
class Answer:
    """An answer that is to be read again.

    Attributes:
        request: The finished request.
        layer: The layer at which its first visual tokens left.
        task: The task that it chose, or "".
        has_own_reading: Whether it is read with its own withdrawal, too. Under a ranking by question, it is
            not, as that depends on the prompt's last token, which is another one now.
    """

    request: Request
    layer: int
    task: str
    has_own_reading: bool


class Guard:
    """Chooses finished requests, makes the requests that read their answers, and judges the answers.

    Args:
        share: The fraction of finished requests that are chosen.
        policy: What is withdrawn.
        bridge: As `visual_spans` takes it.
        num_layers: The number of decoder layers.
        max_model_len: The largest number of tokens of a request.
        statistics: Where the results are counted.

    Attributes:
        request_id: The id of the request that reads an answer. Empty if there is none.
        sat_out: Whether this request sat out the last step.
        needs_room: Whether a user's request needs what this request holds.
    """

    def __init__(
        self,
        share: float,
        policy: Policy,
        bridge: int,
        num_layers: int,
        max_model_len: int,
        statistics: Statistics,
    ) -> None:
        self.share = share
        self.policy = policy
        self.bridge = bridge
        self.num_layers = num_layers
        self.max_model_len = max_model_len
        self.statistics = statistics
        self.request_id = ""
        self.sat_out = self.needs_room = False
        self._queue: deque[Answer] = deque()
        self._current: Answer | None = None
        self._begun = 0
        self._in_full: npt.NDArray[np.float32] | None = None
        self._numbers = itertools.count()
        self._random = random.Random()

    @property
    def num_answers(self) -> int:
        """The number of answers that have not been read yet, or not completely."""
        return len(self._queue) + (self._current is not None)

    @property
    def num_tokens(self) -> int:
        """The number of tokens of the next reading, with the token that it generates. 0 if there is none."""
        answer = self._current or next(iter(self._queue), None)
        return 0 if answer is None else answer.request.num_tokens + 1

    @property
    def next_adapter(self) -> LoRARequest | None:
        """The LoRA adapter of the next reading. None if it has none, or if there is no reading."""
        answer = self._current or next(iter(self._queue), None)
        return None if answer is None else answer.request.lora_request

    def consider(self, request: Request, retentions: Sequence[Retention], task: str) -> None:
        """Chooses a finished request or passes it over.

        Args:
            request: The request.
            retentions: Its retention in every stage past the first.
            task: The task that it chose, or "".
        """
        if (request.kv_transfer_params or {}).get("do_remote_decode"):
            return  # another engine has the answer
        withdrawn = any(retention.num_withdrawn for retention in retentions)
        if request.client_index == CLIENT or not withdrawn or not has_answer(request):
            return
        if self._random.random() >= self.share:
            return
        if request.num_tokens >= self.max_model_len:
            self.statistics.count_left_out(TOO_LONG)
            return
        if len(self._queue) == MAX_QUEUE:
            self.statistics.count_left_out(QUEUE_FULL)
            return
        # A visual token at the prompt's end stays, and is followed by the answer now.
        ends_in_text = visual_spans(request.mm_features, self.bridge)[-1][1] < request.num_prompt_tokens
        layer = self.statistics.exit_layer(retentions)
        has_own = ends_in_text and self.policy.ranking not in BY_QUESTION
        self._queue.append(Answer(request, layer, task, has_own))

    def next_reading(self) -> Request:
        """Makes the next request that reads an answer. There has to be an answer."""
        if self._current is None:
            self._current, self._in_full, self._begun = self._queue.popleft(), None, 0
        answer = self._current
        self._begun += 1
        self.request_id = f"vtw-guard-{next(self._numbers)}"
        chosen = {LAYER: self.num_layers} if self._in_full is None else self._own_choice(answer)
        self.sat_out = self.needs_room = False
        return Request(
            request_id=self.request_id,
            prompt_token_ids=list(answer.request.all_token_ids),
            sampling_params=SamplingParams(
                temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False, extra_args=chosen
            ),
            pooling_params=None,
            client_index=CLIENT,
            mm_features=answer.request.mm_features,
            lora_request=answer.request.lora_request,
            cache_salt=answer.request.cache_salt,
            priority=PRIORITY,
            block_hasher=answer.request._block_hasher,
        )

    def _own_choice(self, answer: Answer) -> dict[str, Any]:
        """What a reading chooses to have the withdrawal of the answer's own request."""
        if self.policy.ranking is None:
            return {LAYER: answer.layer}
        given = answer.request.sampling_params.extra_args or {}
        return {KEEP: given[KEEP]} if KEEP in given else {}

    def leave_out(self, reason: str) -> None:
        """Gives up the answer that is being read."""
        self._current, self.request_id = None, ""
        self.statistics.count_left_out(reason)

    def stop(self) -> None:
        """Takes back the request that reads an answer. Another one will read it, but not too often."""
        self.request_id = ""
        if self._begun == MAX_READINGS:
            self.leave_out(NO_ROOM)

    def clear(self) -> None:
        """Gives up all answers."""
        while self._queue:
            self._queue.popleft()
            self.statistics.count_left_out(INTERRUPTED)
        if self._current is not None:
            self.leave_out(INTERRUPTED)

    def take(self, logprobs: Any) -> None:
        """Takes the result of a reading.

        Args:
            logprobs: vLLM's `LogprobsTensors` of the reading's prompt.
        """
        answer, self.request_id = self._current, ""
        assert answer is not None
        # A row has the log-probability of the token itself, followed by the largest one.
        read = logprobs.logprobs[-answer.request.num_output_tokens :, :2].cpu().numpy()
        if self._in_full is None and answer.has_own_reading:
            self._in_full, self._begun = read, 0
            return
        params = answer.request.sampling_params
        is_greedy = np.full(len(read), params.sampling_type == SamplingType.GREEDY)
        if self._in_full is None:
            full, differences = read, np.empty(0)
            is_greedy &= chooses_the_most_probable(params)
        else:
            full, differences = self._in_full, np.abs(self._in_full[:, 0] - read[:, 0])
            is_greedy &= ~would_choose_another(read)
        self.statistics.count_reading(
            answer.layer,
            answer.task,
            num_tokens=len(read),
            num_greedy=int(is_greedy.sum()),
            num_changed=int((is_greedy & would_choose_another(full)).sum()),
            differences=differences,
        )
        self._current = None


def has_answer(request: Request) -> bool:
    """Whether a request that has ended has an answer that may be read.

    The front end finds stop strings, and then aborts the request as if its client had gone.
    """
    if request.status == RequestStatus.FINISHED_ABORTED:
        return bool(request.sampling_params.stop) and request.num_output_tokens > 0
    return request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


def would_choose_another(read: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """For each token of an answer, whether greedy decoding would have chosen another one, shape `(tokens,)`.

    Args:
        read: Log-probabilities of the tokens, and the largest ones, shape `(tokens, 2)`.
    """
    return read[:, 1] > read[:, 0]


def chooses_the_most_probable(params: SamplingParams) -> bool:
    """Whether nothing keeps a greedy request from the token that the model finds most probable."""
    return (
        params.presence_penalty == params.frequency_penalty == 0
        and params.repetition_penalty == 1
        and params.min_tokens == 0
        and not (params.logit_bias or params.allowed_token_ids or params.bad_words)
        and params.structured_outputs is None
        and params.thinking_token_budget is None
        and not params.watermarking
    )

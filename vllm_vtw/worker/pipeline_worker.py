# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The worker class with pipeline parallelism. It copies only KV blocks of its own rank."""

from dataclasses import replace
from typing import Any

from vllm.distributed import get_pp_group
from vllm.v1.core.sched.output import SchedulerOutput

from vllm_vtw.worker.platform_worker import PlatformWorker


class PipelineWorker(PlatformWorker):
    """The platform's worker on one of several pipeline ranks, each of which has KV blocks of its own.

    vLLM sends all copies of blocks to all ranks. Another rank's copy would overwrite a block of this one.
    """

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        copies = scheduler_output.kv_cache_block_copies
        if copies:
            own = [copy for copy in copies if copy.rank == get_pp_group().rank_in_group]
            scheduler_output = replace(scheduler_output, kv_cache_block_copies=own or None)
        return super().execute_model(scheduler_output)

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""vLLM's worker class for the present platform, which the plugin's workers subclass."""

from typing import Any

from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

WORKERS = "vllm.v1.worker.cpu_worker.CPUWorker", "vllm.v1.worker.gpu_worker.Worker"
PlatformWorker: Any = resolve_obj_by_qualname(WORKERS[0] if current_platform.is_cpu() else WORKERS[1])

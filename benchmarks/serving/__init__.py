# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Compares stock vLLM with `--model-impl vtw` at equal KV memory, through vLLM's own `vllm bench serve`."""

import os

# These are for the processes that measure. Servers get their own.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

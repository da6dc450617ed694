# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""vllm-vtw, a vLLM plugin that withdraws visual tokens from the deep layers of a decoder."""

__version__ = "0.2.0"

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Searches offline, with transformers, for the layers at which to withdraw. Nothing here needs vLLM."""

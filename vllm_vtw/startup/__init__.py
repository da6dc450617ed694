# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Reads, checks and adjusts vLLM's configuration before an engine starts."""

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The worker process: which tokens each stage computes in a step, and where their keys and values go."""

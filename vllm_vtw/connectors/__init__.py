# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""KV connectors: blocks of stages that move between engines, or out of the accelerator's memory and back."""

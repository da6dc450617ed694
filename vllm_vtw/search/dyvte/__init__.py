# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""DyVTE (arXiv 2411.19628): trains and evaluates gates that decide where a request's visual tokens leave."""

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""A small LLaVA, trained from scratch on drawn scenes, to measure what withdrawal costs in answers."""

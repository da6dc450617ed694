# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Trains a small LLaVA from scratch on drawn scenes, and measures what withdrawal costs in its answers."""

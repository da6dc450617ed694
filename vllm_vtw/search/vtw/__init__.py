# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""VTW (arXiv 2405.05803): calibrates the withdrawal layer K of a model on samples."""

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""G-Search and P-Sigmoid (arXiv 2412.00556): search the fraction of visual tokens that each layer gets."""

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Reports of the searches for people to read: HTML pages, tables for the terminal, and notes."""

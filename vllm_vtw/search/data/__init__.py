# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Reads users' samples, with their chats and images, in the way in which `vllm serve` reads requests."""

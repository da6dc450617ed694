# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The model classes of `--model-impl vtw`. Their decoders are cut into one segment for each stage."""

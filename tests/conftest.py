# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Settings that have to stand before vLLM is imported, and Hypothesis without a time limit for an example."""

import os

from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
os.environ["VLLM_NO_USAGE_STATS"] = "1"
# Engines run in the test's own process: their schedulers can be looked into, and the next one starts fast.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

if "PYTEST_XDIST_WORKER" in os.environ:
    # Small models gain nothing from several threads, which would wait for cores that the other workers use.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"

# The machines that run tests are noisy.
settings.register_profile("noisy", deadline=None)
settings.load_profile("noisy")

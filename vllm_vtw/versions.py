# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The vLLM versions that the plugin was tested with, and how.

Nothing else depends on a version: where releases of vLLM differ, the plugin looks at what is there.
"""

from typing import NamedTuple


class Tested(NamedTuple):
    """A version of vLLM that the plugin was tested with.

    Attributes:
        version: The version, without a local part such as `+cpu`.
        how: What the tests ran, as in "tested with ...".
        as_released: Whether that was the release itself.
    """

    version: str
    how: str
    as_released: bool


TESTED = (
    Tested("0.32.0", "engines on the CPU", True),
    Tested("0.33.0", "engines of its Python sources on the CPU kernels of 0.32.0", False),
)
"""All of them, the oldest first. `make test` tests the first one, and `make test-next` the last one."""
BEST = [tested for tested in TESTED if tested.as_released][-1].version
"""The version to install."""


def tested(version: str) -> Tested | None:
    """How a version of vLLM was tested. None if it was not.

    Args:
        version: The version, with or without a local part.
    """
    public = version.partition("+")[0]
    return next((one for one in TESTED if one.version == public), None)


def described() -> str:
    """The versions that were tested, and how."""
    return " and ".join(f"{one.version} ({one.how})" for one in TESTED)


def unknown(name: str) -> RuntimeError:
    """The error if something of vLLM's is not what a hook was written for.

    Args:
        name: What it is, such as `BeamSearchSequence.get_prompt`.
    """
    versions = " or ".join(one.version for one in TESTED)
    return RuntimeError(f"vllm-vtw does not know this vLLM's {name}: install vLLM {versions}")

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""KV connectors and KV offloading: the plugin's subclasses of vLLM's, and what is refused."""

from collections.abc import Iterator

from vllm.config import KVTransferConfig, VllmConfig
from vllm.platforms import current_platform

from vllm_vtw.capacity import LayerGroups
from vllm_vtw.policy import Policy
from vllm_vtw.startup.drafters import drafter_layers

_NIXL = "StagedNixlConnector", "vllm_vtw.connectors.nixl"
_OFFLOAD = "StagedOffloadConnector", "vllm_vtw.connectors.offload"
CONNECTORS = dict.fromkeys(("NixlConnector", "NixlPullConnector", _NIXL[0]), _NIXL)
CONNECTORS |= dict.fromkeys(("SimpleCPUOffloadConnector", _OFFLOAD[0]), _OFFLOAD)
"""By KV connector of vLLM, the plugin's subclass of it and the module that has it."""


def use_own_connector(vllm_config: VllmConfig, policy: Policy, groups: LayerGroups) -> None:
    """Puts the plugin's connector in place of vLLM's, for `--kv-offloading-size`, too.

    Raises:
        ValueError: vLLM needs a group that holds all tokens in blocks of one page, and `groups` has none. Or
            the policy ranks visual tokens by image.
    """
    cache = vllm_config.cache_config
    if cache.kv_offloading_size is not None:
        vllm_config.kv_transfer_config = KVTransferConfig(
            kv_connector=_OFFLOAD[0],
            kv_role="kv_both",
            kv_connector_extra_config={"cpu_bytes_to_use": cache.kv_offloading_size * 2**30},
        )
        cache.kv_offloading_size = None  # vLLM would choose its own connector
    transfer = vllm_config.kv_transfer_config
    if transfer is None:
        return
    if policy.ranking is not None:
        raise ValueError(
            f"--model-impl vtw with the ranking {policy.ranking!r} beside a KV connector is untested: use a "
            "policy without a ranking, or remove --kv-transfer-config and --kv-offloading-size"
        )
    own = CONNECTORS[transfer.kv_connector]
    transfer.kv_connector, transfer.kv_connector_module_path = own
    if own == _OFFLOAD and not any((group.stage, group.pages) == (0, 1) for group in groups.groups):
        raise ValueError(
            "--model-impl vtw cannot offload KV blocks if those of the first layers hold several pages: "
            "withdraw at a deeper layer, or remove --kv-offloading-size and --kv-transfer-config"
        )


def connector_refusals(vllm_config: VllmConfig) -> Iterator[str]:
    """The reasons that lie in a KV connector, or in `--kv-offloading-size`."""
    size, transfer = vllm_config.cache_config.kv_offloading_size, vllm_config.kv_transfer_config
    if size is None and transfer is None:
        return
    if size is not None:
        yield from _offloading_refusals(vllm_config)
    if transfer is not None:
        yield from _transfer_refusals(transfer)
    option = "--kv-transfer-config" if size is None else "--kv-offloading-size"
    if drafter_layers(vllm_config):
        yield f"a drafter beside {option} is untested: remove --speculative-config"
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        yield (
            f"{option} moves the blocks of one pool, and each pipeline rank has its own: use "
            "--tensor-parallel-size, not --pipeline-parallel-size"
        )


def _transfer_refusals(transfer: KVTransferConfig) -> Iterator[str]:
    if transfer.kv_connector not in CONNECTORS:
        yield (
            f"the KV connector {transfer.kv_connector} finds a token's block by the token's position, or is "
            "untested: use NixlConnector, or --kv-offloading-size with CUDA, or remove --kv-transfer-config"
        )
        return
    if CONNECTORS[transfer.kv_connector] == _OFFLOAD:
        yield from _host_refusals("--kv-transfer-config")
    if not transfer.get_from_extra_config("enforce_handshake_compat", True):
        yield (
            "engines that withdraw other tokens must not read each other's blocks: remove "
            "enforce_handshake_compat from --kv-transfer-config"
        )
    if transfer.get_from_extra_config("bidirectional_kv_xfer", False):
        yield (
            "the engine that prefills would not know at which layer the tokens of blocks that it reads back "
            "left: remove bidirectional_kv_xfer from --kv-transfer-config"
        )


def _offloading_refusals(vllm_config: VllmConfig) -> Iterator[str]:
    if vllm_config.kv_transfer_config is not None:
        yield "several KV connectors are untested: remove --kv-offloading-size or --kv-transfer-config"
    if vllm_config.cache_config.kv_offloading_backend != "native":
        yield "LMCache finds a token's block by the token's position: remove --kv-offloading-backend"
    yield from _host_refusals("--kv-offloading-size")


def _host_refusals(option: str) -> Iterator[str]:
    if not current_platform.is_cuda_alike():
        yield (
            f"KV offloading copies blocks with CUDA, which {current_platform.device_name} has not: "
            f"remove {option}"
        )

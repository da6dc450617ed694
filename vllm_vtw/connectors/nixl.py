# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""vLLM's NIXL connector, between engines that withdraw the same tokens: one prefills, the other decodes."""

import hashlib
import json
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import NixlPullConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_worker import _SHARED_REGION_GROUP_ID
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

from vllm_vtw.choice import LAYER, choice_of
from vllm_vtw.startup.options import layer_groups, vtw_config


class WholeBlocks(list[int]):
    """By region of memory, the KV-cache group whose blocks lie in it: all groups in every region.

    vLLM copies a block in the regions of its own group's layers. If a block holds several pages of a layer,
    they lie in regions of other layers, too.
    """

    def append(self, group: int) -> None:
        super().append(_SHARED_REGION_GROUP_ID)


class StagedNixlWorker(NixlPullConnectorWorker):
    """Copies blocks as a whole, and tells engines apart that hold other tokens in their blocks.

    vLLM's engines compare `compat_hash` when they meet, and transfer nothing if they differ. Here, it also
    depends on what is withdrawn and on the KV-cache groups.
    """

    _compat_hash: str | None = None

    @classmethod
    def adopt(cls, worker: NixlPullConnectorWorker) -> None:
        """Changes the class of the worker that vLLM's connector has made, which has agents and threads."""
        assert type(worker) is NixlPullConnectorWorker, f"unexpected worker {type(worker).__name__}"
        worker.__class__ = cls
        worker.region_group_ids = WholeBlocks()

    @property
    def compat_hash(self) -> str | None:
        if self._compat_hash is None:
            return None
        config = vtw_config(self.vllm_config)
        groups = layer_groups(self.vllm_config, config.policy)
        block_size = self.vllm_config.cache_config.block_size
        withdrawn = [config.policy.to_json({}), config.align_to(block_size), config.bridge]
        withdrawn += [block_size, groups.groups]
        return hashlib.sha256(f"{self._compat_hash} {json.dumps(withdrawn)}".encode()).hexdigest()

    @compat_hash.setter
    def compat_hash(self, of_vllm: str | None) -> None:
        self._compat_hash = of_vllm


class StagedNixlConnector(NixlPullConnector):
    """Moves the blocks of all stages, and says at which layer a request's visual tokens left.

    Withdrawn tokens have no blocks to move.
    """

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.withdrawal = vtw_config(vllm_config)
        if role == KVConnectorRole.WORKER:
            StagedNixlWorker.adopt(self.connector_worker)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Adds to what the other engine is told the layer at which the request's visual tokens left."""
        told: tuple[bool, dict[str, Any] | None] = super().request_finished_all_groups(request, block_ids)
        if told[1] is not None:
            policy, num_layers = self.withdrawal.policy, self.withdrawal.num_layers
            choice = choice_of(policy, num_layers, request.sampling_params)
            told[1][LAYER] = choice.layer or policy.default_layer or num_layers
        return told

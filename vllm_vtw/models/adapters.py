# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Which LoRA adapter each token of a stage uses."""

import functools
from typing import Any

import torch
from torch import nn
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.utils.gpu_sync_debug import gpu_sync_allowed


class StageAdapters:
    """Gives vLLM's LoRA layers the adapters of a stage's tokens.

    The LoRA layers of a decoder share an object of vLLM's, a "punica wrapper", into which the runner writes
    the adapter of each token of the batch before a step. A layer reads as many of them as it has rows. In a
    stage without visual tokens, there are fewer rows, and other tokens in them.

    For example, a batch of four tokens with adapter 0, of which tokens 1 and 2 are visual, and of one token
    with adapter 1, has the adapters `[0, 0, 0, 0, 1]`. The stage that computes tokens 0, 3 and 4 needs
    `[0, 0, 1]`.

    Args:
        text_model: vLLM's text model. Its layers get their adapters after it has been built.
    """

    def __init__(self, text_model: nn.Module) -> None:
        self._text_model = text_model
        self._of_batch: torch.Tensor | None = None
        self._kept: torch.Tensor | None = None

    @functools.cached_property
    def _wrapper(self) -> Any:
        """The object that the layers share. None if `--lora-target-modules` names none of them."""
        layers = (layer for layer in self._text_model.modules() if isinstance(layer, BaseLayerWithLoRA))
        return getattr(next(layers, None), "punica_wrapper", None)

    @property
    def _batch_has_none(self) -> bool:
        """Whether no token of the batch has an adapter, so that those of no stage do."""
        kernels = getattr(self._wrapper, "token_mapping_meta", None)
        return self._wrapper.no_lora if kernels is None else bool(kernels.no_lora_flag_cpu[0])

    def select(self, kept: torch.Tensor) -> None:
        """Sets the adapters of a stage's tokens. `restore` has to be called after the last stage.

        Args:
            kept: Indices of these tokens in the batch, shape `(kept,)`.
        """
        if self._wrapper is None or kept is self._kept:
            return
        if self._of_batch is None:
            if self._batch_has_none:
                return
            self._of_batch = self._wrapper.token_lora_indices.clone()
        self._write(self._of_batch[kept])
        self._kept = kept

    def restore(self) -> None:
        """Sets the adapters of the whole batch again. The runner does not, if the next step has the same."""
        if self._of_batch is not None:
            self._write(self._of_batch)
            self._of_batch = self._kept = None

    def _write(self, adapters: torch.Tensor) -> None:
        """Does what vLLM's `update_metadata` does for the layers, but from a tensor, not from a list."""
        if not len(adapters):
            return
        wrapper = self._wrapper
        wrapper._token_lora_indices[: len(adapters)].copy_(adapters)
        wrapper.indices_len[0] = len(adapters)
        with gpu_sync_allowed():
            if hasattr(wrapper, "token_mapping_meta"):  # of the Triton kernels
                wrapper.token_mapping_meta.prepare_tensors(adapters)
            else:
                wrapper._update_prefill_metadata(adapters)

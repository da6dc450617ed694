# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Several KV pages of a layer in one block of the pool, as attention kernels see them.

A block of the pool has memory for one page of each layer of the widest KV-cache group. In a group of fewer
layers, layer m takes the memory of layers `m * pages` to `(m + 1) * pages - 1` of the widest group, one page
in each. Kernels know nothing of this: they get a view of the KV cache in which every page is a block of its
own, and a block table that names pages.
"""

from typing import NamedTuple

import torch


class PageStrides(NamedTuple):
    """Where pages lie in a layer's KV cache: page j of block b is `view[b * block + j * page]`.

    Attributes:
        block: How far apart the first pages of two neighbouring blocks are. 1 if a block has only one page.
        page: How far apart two neighbouring pages of a block are.
    """

    block: int
    page: int


class PagedCache(NamedTuple):
    """The pages of one layer.

    Attributes:
        view: The layer's KV cache, shape `(at least pages, heads, page_size, 2 * head_size)`.
        strides: Where pages lie in it.
    """

    view: torch.Tensor
    strides: PageStrides

    @classmethod
    def of(cls, kv_cache: torch.Tensor, pages: int) -> "PagedCache":
        """Views the memory of a layer's blocks as pages.

        For example, in a layout that stores all blocks of one layer after the other, layer 1 of a group with
        4 pages gets the memory of layers 4 to 7, and page j of block b is `view[b + j * blocks]`.

        Args:
            kv_cache: The layer's KV cache as vLLM binds it, one page a block, in any of vLLM's layouts.
            pages: The number of pages of a block.

        Raises:
            ValueError: The layout stores heads of several layers between those of one layer.
        """
        if pages == 1:
            return cls(kv_cache, PageStrides(1, 1))
        num_blocks, *of_page = kv_cache.shape
        block, page = kv_cache.stride(0), kv_cache[0].numel()
        # The next layer's page follows after the page if blocks are outermost, and after all blocks if not.
        layer = page if block > page else num_blocks * page
        strides = kv_cache.stride()[1:]
        last = sum((size - 1) * stride for size, stride in zip(of_page, strides, strict=True))
        if block > page and last >= page:
            raise ValueError(
                "--model-impl vtw cannot store several pages in a block in this KV cache layout: set "
                "VLLM_KV_CACHE_LAYOUT to LBNHC, LBHNC, LHBNC, BLNHC or BLHNC"
            )
        step = min(block, layer)
        view = kv_cache.as_strided(
            ((num_blocks - 1) * (block // step) + (pages - 1) * (layer // step) + 1, *of_page),
            (step, *strides),
            kv_cache.storage_offset() * pages,
        )
        assert block % step == layer % step == 0, "blocks are not a whole number of pages apart"
        return cls(view, PageStrides(block // step, layer // step))


class PageTable:
    """A block table of pages, at an address that CUDA graphs remember.

    Args:
        block_table: A block table of blocks, int32, shape `(rows, blocks)`. Its shape and device are used.
        max_rows: The largest number of rows.
        strides: Where pages lie in the KV cache.
        pages: The number of pages of a block.
    """

    def __init__(self, block_table: torch.Tensor, max_rows: int, strides: PageStrides, pages: int) -> None:
        blocks = -(-block_table.shape[1] // pages)
        self._whole = block_table.new_zeros(max_rows, blocks * pages)
        self._offsets = torch.arange(pages, dtype=torch.int32, device=block_table.device) * strides.page
        self._block_stride = strides.block
        self._pages = pages
        self._views: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._viewed: tuple[int, int, int] | None = None

    def write(self, block_table: torch.Tensor, num_pages: int) -> torch.Tensor:
        """Writes the pages of blocks.

        Args:
            block_table: The block table of blocks, int32, shape `(rows, blocks)`.
            num_pages: The largest number of pages of a row that kernels will read.

        Returns:
            The block table of pages, int32, shape `(rows, at least num_pages)`.
        """
        rows = block_table.shape[0]
        blocks = min(-(-num_pages // self._pages), self._whole.shape[1] // self._pages)
        # Most steps have the same views as the step before. Making them takes as long as the addition.
        views = (block_table.data_ptr(), rows, blocks)
        if self._views is None or views != self._viewed:
            table = self._whole[:rows]
            written = table[:, : blocks * self._pages].unflatten(1, (blocks, self._pages))
            self._views = table, written, block_table[:, :blocks, None]
            self._viewed = views
        table, written, read = self._views
        torch.add(self._offsets, read, alpha=self._block_stride, out=written)
        return table

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Where the pages of narrow KV-cache groups lie, in the memory that vLLM lays out."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec, create_kv_cache_views
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace

from vllm_vtw.capacity import LayerGroup, LayerGroups
from vllm_vtw.kv.groups import planning
from vllm_vtw.kv.spec import StageSpec
from vllm_vtw.worker.pages import PagedCache, PageStrides, PageTable

NUM_BLOCKS = 3
PAGE_SIZE = 4
ALL = FullAttentionSpec(block_size=PAGE_SIZE, num_kv_heads=2, head_size=1, dtype=torch.int32)
REFUSED = KVCacheLayout.BHLNC
LAYOUTS = pytest.mark.parametrize("layout", [layout for layout in KVCacheLayout if layout is not REFUSED])


class Memory:
    """The memory of two KV-cache groups. Each of its cells holds its own address.

    Args:
        layout: How vLLM lays it out.
        width: The layers of the widest group.
        layers: The layers of the narrow group.
        kernel_blocks: The number of blocks that one of vLLM's blocks is for kernels.
    """

    def __init__(self, layout: KVCacheLayout, width: int, layers: int, kernel_blocks: int = 1) -> None:
        self.pages = width // layers
        self.kernel_blocks = kernel_blocks
        split = LayerGroups((LayerGroup(0, width, 1), LayerGroup(1, layers, self.pages)))
        groups = [
            KVCacheGroupSpec(
                [f"{group.stage}.{layer}" for layer in range(group.layers)], StageSpec.like(ALL, split, group)
            )
            for group in split.groups
        ]
        config: Any = SimpleNamespace(
            attention_config=SimpleNamespace(hisparse_config=None),
            cache_config=SimpleNamespace(
                get_resolved_kv_cache_layout=lambda: layout,
                num_gpu_blocks_override=None,
                prefix_cache_retention_interval=None,
            ),
        )
        size = NUM_BLOCKS * width * ALL.page_size_bytes
        made = planning.get_kv_cache_config_from_groups(config, groups, size)
        assert made.num_blocks == NUM_BLOCKS
        size = made.kv_cache_tensors[0].size
        self.cells = torch.arange(size // 4, dtype=torch.int32)

        def views(group: int, of_kernels: bool) -> list[torch.Tensor]:
            kernel_block_size = PAGE_SIZE // kernel_blocks if of_kernels else None
            spec, tensor = groups[group].kv_cache_spec, made.kv_cache_tensors[group]
            raw = self.cells.view(torch.int8)
            return create_kv_cache_views(raw, spec, NUM_BLOCKS, layout, tensor, kernel_block_size)

        self.widest = views(0, of_kernels=False)
        self.bound = views(-1, of_kernels=True)
        self.layers = [PagedCache.of(cache, self.pages) for cache in self.bound]

    def of_block(self, block: int) -> list[torch.Tensor]:
        """What a block holds in the narrow group, by layer and page."""
        of_kernels = range(block * self.kernel_blocks, (block + 1) * self.kernel_blocks)
        return [
            cache.view[at * cache.strides.block + page * cache.strides.page].clone()
            for cache in self.layers
            for at in of_kernels
            for page in range(self.pages)
        ]


@st.composite
def memories(draw: st.DrawFn, layout: KVCacheLayout) -> Memory:
    layers, width = sorted(draw(st.lists(st.integers(1, 9), min_size=2, max_size=2, unique=True)))
    splits = layout in {KVCacheLayout.LBNHC, KVCacheLayout.LBHNC}
    return Memory(layout, width, layers, draw(st.sampled_from([1, 2])) if splits else 1)


@LAYOUTS
@given(data=st.data())
def test_a_block_holds_its_pages_where_the_widest_group_has_it(layout: KVCacheLayout, data: st.DataObject):
    memory = data.draw(memories(layout))
    found: set[int] = set()
    for block in range(NUM_BLOCKS):
        cells = torch.stack(memory.of_block(block)).flatten().tolist()
        assert len(cells) == len(memory.layers) * memory.pages * ALL.page_size_bytes // 4
        assert len(set(cells)) == len(cells)
        assert found.isdisjoint(cells)
        found.update(cells)
        owned = torch.stack([cache[block] for cache in memory.widest]).flatten().tolist()
        assert set(cells) <= set(owned)


@LAYOUTS
@given(data=st.data())
def test_vllm_copies_all_pages_of_a_block(layout: KVCacheLayout, data: st.DataObject):
    memory = data.draw(memories(layout))
    before = [memory.of_block(block) for block in range(NUM_BLOCKS)]
    copy_kv_cache_blocks_inplace(memory.widest, NUM_BLOCKS, [KVCacheBlockCopy(2, 1)])
    for block, source in ((0, 0), (1, 2), (2, 2)):
        after = memory.of_block(block)
        assert all(torch.equal(*pages) for pages in zip(after, before[source], strict=True))


@pytest.mark.parametrize("layout", KVCacheLayout)
def test_with_one_page_a_layer_keeps_what_vllm_has_bound(layout: KVCacheLayout):
    """Kernels then get vLLM's own block table."""
    memory = Memory(layout, 3, 3)
    for cache, layer in zip(memory.bound, memory.layers, strict=True):
        seen, bound = ((view.data_ptr(), view.shape, view.stride()) for view in (layer.view, cache))
        assert seen == bound


def test_a_layout_that_mixes_layers_within_a_page_is_refused():
    with pytest.raises(ValueError, match="in this KV cache layout: set VLLM_KV_CACHE_LAYOUT to LBNHC, LBHNC"):
        Memory(REFUSED, 6, 2)


def page_table(blocks: list[list[int]], pages: int) -> PageTable:
    """For blocks whose first pages are 2 apart, with 50 between two pages of a block."""
    strides = PageStrides(block=2, page=50)
    return PageTable(torch.tensor(blocks, dtype=torch.int32), 4, strides, pages)


def test_a_page_table():
    table = page_table([[0] * 3] * 4, pages=2)
    blocks = torch.tensor([[7, 8, 3], [5, 0, 0]], dtype=torch.int32)
    written = table.write(blocks, 3)
    assert written.tolist() == [[14, 64, 16, 66], [10, 60, 0, 50]]
    assert written.dtype == torch.int32


@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 5), st.data())
def test_a_page_table_names_the_pages_that_are_read(rows: int, columns: int, pages: int, data: st.DataObject):
    """vLLM's table has a column for each page of the longest request, so a few columns are enough."""
    ids = st.lists(st.integers(0, 20), min_size=columns, max_size=columns)
    table = page_table([[0] * columns] * rows, pages)
    addresses = set()
    for num_pages in data.draw(st.lists(st.integers(1, columns), min_size=1, max_size=3)):
        blocks = data.draw(st.lists(ids, min_size=rows, max_size=rows))
        written = table.write(torch.tensor(blocks, dtype=torch.int32), num_pages)
        expected = [
            [row[page // pages] * 2 + page % pages * 50 for page in range(num_pages)] for row in blocks
        ]
        assert written[:, :num_pages].tolist() == expected
        addresses.add((written.data_ptr(), written.stride()))
    assert len(addresses) == 1


def test_columns_behind_the_longest_row_stay():
    """A step takes as long as its rows are, and not as long as the longest request may become."""
    table = page_table([[0] * 4], pages=2)
    table.write(torch.tensor([[1, 1, 1, 1]], dtype=torch.int32), 4)
    assert table.write(torch.tensor([[9, 9, 9, 9]], dtype=torch.int32), 2).tolist() == [[18, 68, 2, 52]]

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Tabulates KV-cache groups, unused memory and capacity at every K, for decoders of six depths."""

import argparse
from pathlib import Path

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from vllm_vtw.commands.plan import plan

DEPTHS = (24, 28, 32, 36, 40, 64)
TEXT, VISUAL, OUTPUT = 64, 576, 128
HEADER = """\
# KV-cache groups at every withdrawal layer

Made by `python -m benchmarks.kv_groups`. Layers as those of LLaVA-1.5-7B (32 key-value heads of 128,
float16), 576 visual tokens an image, blocks of 16, whole blocks withdrawn. A text token is in KiB, an image
in MiB of KV cache; requests are those of 64 text, 576 visual and 128 output tokens that fit into 8 GiB, and
their ratio to stock vLLM's.

The layers of "text" groups run without visual tokens. If a block of a group holds several pages, their number
follows. "Unused" is the share of a long text's memory that no layer uses.

"Of ideal" compares the memory of such a request with the least that is possible: layers from K on hold no
visual token, and no memory is unused. It includes the 16 visual tokens that stay, because an image need not
begin with a block, and rounding up to blocks.
"""


def table(depth: int) -> str:
    """The table for a decoder of `depth` layers, with one row for each withdrawal layer."""
    text = LlamaConfig(
        hidden_size=4096, num_hidden_layers=depth, num_attention_heads=32, num_key_value_heads=32
    )
    model = LlavaConfig(text_config=text, vision_config=CLIPVisionConfig(image_size=336, patch_size=14))
    rows = []
    for layer in range(1, depth + 1):
        result = plan(
            model,
            {"layer": layer},
            prefix_caching=True,
            block_size=16,
            bytes_per_value=2,
            kv_memory=8 << 30,
            text_tokens=TEXT,
            images=1,
            visual_tokens=VISUAL,
            output_tokens=OUTPUT,
        )
        groups = " + ".join(
            f"{group['layers']}{' text' if group['stage'] else ''}{_pages(group['pages'])}"
            for group in result["groups"]
        )
        others = TEXT + OUTPUT
        everything = VISUAL + others
        ideal = (layer * everything + (depth - layer) * others) / (depth * everything)
        token, image, fit = (
            result[key] for key in ("kv_bytes_per_text_token", "kv_bytes_per_image", "max_sequences")
        )
        rows.append(
            f"| {layer} | {groups} | {result['padding_fraction']:.1%} | {token['vtw'] / 2**10:.0f} "
            f"| {image['vtw'] / 2**20:.1f} | {fit['vtw']} | {fit['vtw'] / fit['stock']:.2f} "
            f"| {result['kv_ratio'] / ideal:.3f} |"
        )
    return "\n".join(
        [
            f"\n## {depth} layers\n",
            f"Stock vLLM: {token['stock'] / 2**10:.0f} KiB a text token, "
            f"{image['stock'] / 2**20:.1f} MiB an image, {fit['stock']} requests.\n",
            "| K | groups of layers | unused | text token | image | requests | ratio | of ideal |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
            *rows,
        ]
    )


def _pages(number: int) -> str:
    return f" ({number} pages)" if number > 1 else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.write_text("\n".join([HEADER.rstrip("\n"), *map(table, DEPTHS)]) + "\n")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Tabulates KV-cache groups, padding and capacity at every K, for decoders of four depths."""

import argparse
from pathlib import Path

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from vllm_vtw.commands.plan import plan

DEPTHS = (24, 28, 32, 40)
HEADER = """\
# KV-cache groups at every withdrawal layer

Made by `python -m benchmarks.kv_groups`. Layers as those of LLaVA-1.5-7B (32 key-value heads of 128,
float16), 576 visual tokens an image, blocks of 16, whole blocks withdrawn. A text token is in KiB, an image
in MiB of KV cache; requests are those of 64 text, 576 visual and 128 output tokens that fit into 8 GiB, and
their ratio to stock vLLM's.
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
            text_tokens=64,
            images=1,
            output_tokens=128,
        )
        groups = " + ".join(
            f"{group['layers']}{' text' if group['stage'] else ''}" for group in result["groups"]
        )
        token, image, fit = (
            result[key] for key in ("kv_bytes_per_text_token", "kv_bytes_per_image", "max_sequences")
        )
        rows.append(
            f"| {layer} | {groups} | {result['padding_fraction']:.1%} | {token['vtw'] / 2**10:.0f} "
            f"| {image['vtw'] / 2**20:.1f} | {fit['vtw']} | {fit['vtw'] / fit['stock']:.2f} |"
        )
    return "\n".join(
        [
            f"\n## {depth} layers\n",
            f"Stock vLLM: {token['stock'] / 2**10:.0f} KiB a text token, "
            f"{image['stock'] / 2**20:.1f} MiB an image, {fit['stock']} requests.\n",
            "| K | groups of layers | padding | text token | image | requests | ratio |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *rows,
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.write_text("\n".join([HEADER.rstrip("\n"), *map(table, DEPTHS)]) + "\n")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Drafters for speculative decoding, with random weights: heads of EAGLE and EAGLE-3, and a draft model."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks.small_llava import SmallLlava, randomize
from tests.engine.reference import Reference

DRAFTS = 3


def head(folder: Path, target: Path, model: SmallLlava, method: str) -> dict[str, Any]:
    """A head of one layer, that sees states of the target, and its `--speculative-config`.

    Args:
        folder: Where it is written to.
        target: The target's checkpoint, whose embeddings and LM head it shares.
        model: The target.
        method: `"eagle"` or `"eagle3"`.
    """
    folder.mkdir()
    hidden, wide = model.hidden, 2 * model.hidden
    rng = torch.Generator().manual_seed(7)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=rng) * columns**-0.5

    layer = "midlayer" if method == "eagle3" else "layers.0"
    seen = wide if method == "eagle3" else hidden
    kv = hidden // model.heads * model.kv_heads
    tensors = {
        "fc.weight": matrix(hidden, 3 * hidden if method == "eagle3" else wide),
        f"{layer}.self_attn.q_proj.weight": matrix(hidden, seen),
        f"{layer}.self_attn.k_proj.weight": matrix(kv, seen),
        f"{layer}.self_attn.v_proj.weight": matrix(kv, seen),
        f"{layer}.self_attn.o_proj.weight": matrix(hidden, hidden),
        f"{layer}.mlp.gate_proj.weight": matrix(wide, hidden),
        f"{layer}.mlp.up_proj.weight": matrix(wide, hidden),
        f"{layer}.mlp.down_proj.weight": matrix(hidden, wide),
        f"{layer}.post_attention_layernorm.weight": torch.ones(hidden),
    }
    if method == "eagle3":
        tensors |= {
            f"{layer}.{name}.weight": torch.ones(hidden) for name in ("hidden_norm", "input_layernorm")
        }
        tensors["norm.weight"] = torch.ones(hidden)
        tensors["lm_head.weight"] = load_file(target / "model.safetensors")["language_model.lm_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    text = json.loads((target / "config.json").read_text())["text_config"]
    text |= {
        "architectures": ["LlamaForCausalLMEagle3" if method == "eagle3" else "LlamaForCausalLM"],
        "num_hidden_layers": 1,
    }
    if method == "eagle3":
        text["draft_vocab_size"] = text["vocab_size"]
    (folder / "config.json").write_text(json.dumps(text))
    return {"method": method, "model": str(folder), "num_speculative_tokens": DRAFTS}


def draft_model(folder: Path, target: Path, layers: int = 2) -> dict[str, Any]:
    """A text model of its own, with the target's vocabulary, and its `--speculative-config`."""
    text = json.loads((target / "config.json").read_text())["text_config"]
    text |= {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers}
    config = LlamaConfig.from_dict(text)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        draft = LlamaForCausalLM(config).eval()
        randomize(draft)
    draft.save_pretrained(folder)
    for file in target.glob("tokenizer*"):
        shutil.copy(file, folder)
    return {"method": "draft_model", "model": str(folder), "num_speculative_tokens": DRAFTS}


def drafter(method: str, folder: Path, target: Path, model: SmallLlava) -> dict[str, Any]:
    """The `--speculative-config` of a drafter that is written to `folder`."""
    if method == "draft_model":
        return draft_model(folder, target)
    return head(folder, target, model, method)


class Eagle:
    """What EAGLE's head drafts: a plain forward of its one layer, over states of a reference.

    Args:
        folder: The head.
        reference: The target.
    """

    def __init__(self, folder: str, reference: Reference) -> None:
        self.target = reference.model
        config = self.target.config.text_config
        layer = LlamaDecoderLayer(config, layer_idx=0)
        layer.input_layernorm = torch.nn.Identity()
        weights = load_file(Path(folder) / "model.safetensors")
        self.fc = weights.pop("fc.weight")
        layer.load_state_dict({name.removeprefix("layers.0."): tensor for name, tensor in weights.items()})
        self.layer = layer.eval()

    @torch.no_grad()
    def drafts(self, tokens: Sequence[int], states: torch.Tensor) -> list[int]:
        """The next tokens after `tokens`.

        Args:
            tokens: Prompt and answer so far.
            states: The target's final states of all tokens but the last.
        """
        text = self.target.model.language_model
        states = text.norm(states)
        drafts: list[int] = []
        for _ in range(DRAFTS):
            following = torch.tensor([*tokens, *drafts][1:])
            hidden = torch.cat([text.embed_tokens(following), states], -1) @ self.fc.T
            positions = torch.arange(len(hidden))
            mask = torch.full((len(hidden), len(hidden)), float("-inf")).triu(1)
            out = self.layer(
                hidden[None],
                attention_mask=mask[None, None],
                position_ids=positions[None],
                position_embeddings=text.rotary_emb(hidden[None], positions[None]),
            )[0]
            states = torch.cat([states, out[-1:]])
            drafts.append(int(self.target.lm_head(out[-1]).argmax()))
        return drafts


class DraftModel:
    """What a draft model drafts, which reads the target's tokens without their images.

    Args:
        folder: The draft model.
    """

    def __init__(self, folder: str) -> None:
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.no_grad()
    def drafts(self, tokens: Sequence[int]) -> list[int]:
        """The next tokens after `tokens`."""
        everything = [*tokens]
        for _ in range(DRAFTS):
            everything.append(int(self.model(torch.tensor([everything])).logits[0, -1].argmax()))
        return everything[-DRAFTS:]

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Runs a model on transformers, with visual tokens in all layers or withdrawn from layer K on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache, GenerationConfig

from vllm_vtw.search.data.prompts import ModelInputs, Prompts
from vllm_vtw.search.data.sample import Sample
from vllm_vtw.search.decoder_inputs import DecoderInputs, Deepstack
from vllm_vtw.search.mrope import count_as_in_vllm


@dataclass
class FullAnswer:
    """The full model's answer to a sample, and the hidden states of text tokens in every layer.

    The prompt has T text tokens and the answer has O tokens. The prompt's last token counts as a text token
    even if it is visual, because it is never withdrawn. The answer's last token is not given to the model, so
    there are states of T + O - 1 text tokens.

    Attributes:
        tokens: The O token ids of the answer, with the end-of-sequence token if there is one.
        logits: The logits from which the answer's tokens were chosen, shape `(O, vocabulary)`, float32.
        states: For each layer, the hidden states of text tokens that enter it, shape
            `(T + O - 1, hidden_size)`.
        position_ids: The position ids of all tokens, shape `(prompt tokens + O - 1,)`. With M-RoPE there are
            three rows of them.
        embedded: The hidden states of all tokens that enter layer 0, shape
            `(prompt tokens + O - 1, hidden_size)`.
        is_visual: Whether each of these tokens is a visual one, and so left out of `states`, shape
            `(prompt tokens + O - 1,)`.
        item_of: For each of these tokens, the number of its image or video, or -1, in the same shape. The
            prompt's last token may be visual here.
        cut: Whether the answer reached the most tokens allowed without an end-of-sequence token.
        deepstack: What is added to the hidden states of visual tokens after the first layers.
    """

    tokens: list[int]
    logits: torch.Tensor
    states: list[torch.Tensor]
    position_ids: torch.Tensor
    embedded: torch.Tensor
    is_visual: torch.Tensor
    item_of: torch.Tensor
    cut: bool
    deepstack: Deepstack

    @property
    def visual_tokens(self) -> int:
        """The number of the prompt's visual tokens, its last token excluded."""
        return int(self.is_visual.sum())

    @property
    def text_tokens(self) -> int:
        """The number T of the prompt's text tokens."""
        return len(self.text_places) - len(self.tokens) + 1

    @property
    def text_places(self) -> torch.Tensor:
        """The places of the text tokens in prompt and answer, shape `(T + O - 1,)`."""
        return (~self.is_visual).nonzero()[:, 0]

    @property
    def prompt_tokens(self) -> int:
        """The number of the prompt's tokens, text and visual ones together."""
        return len(self.is_visual) - len(self.tokens) + 1


@dataclass(frozen=True)
class Placement:
    """The device on which a model runs, and the data type of its weights."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, device: str, dtype: str, config: Any) -> "Placement":
        """Resolves the `--device` and `--dtype` options.

        Args:
            device: The name of a torch device, or "auto" for a GPU if there is one and else the CPU.
            dtype: The name of a torch data type, or "auto" for float32 on the CPU and the checkpoint's own
                type elsewhere.
            config: The checkpoint's transformers configuration.

        Raises:
            ValueError: This machine has no such device.
        """
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            found = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {device}: {error}") from error
        if dtype == "auto":
            return cls(found, torch.float32 if found.type == "cpu" else config.dtype or torch.float32)
        return cls(found, getattr(torch, dtype))


class HFModel:
    """A checkpoint on transformers, with its processor.

    Args:
        name: The checkpoint's name on the Hugging Face Hub, or its folder.
        config: The checkpoint's transformers configuration.
        placement: The device and data type to load the model with.

    Attributes:
        config: The checkpoint's transformers configuration.
        processor: The checkpoint's processor.
        prompts: Makes the model's inputs of samples.
        hf_model: The transformers model.
        decoder: The text model within `hf_model`.
        head: What computes logits from the decoder's output.
        eos_token_ids: Ids of the tokens that end an answer.

    Raises:
        ValueError: transformers cannot load the checkpoint.
    """

    def __init__(self, name: str, config: Any, placement: Placement) -> None:
        self.config = config
        try:
            self.processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
            # `withdrawn_logits` calls decoder layers without a mask. With SDPA, attention is then causal.
            model = AutoModelForImageTextToText.from_pretrained(
                name, config=config, dtype=placement.dtype, attn_implementation="sdpa"
            )
        except Exception as error:  # transformers lets through errors of many types
            raise ValueError(f"cannot load {name}: {error}") from error
        self.prompts = Prompts(self.processor, config)
        self.hf_model: Any = model.to(placement.device).eval()
        if self.prompts.family.mrope:
            count_as_in_vllm(self.hf_model.model, self.prompts.visual_ids)
        self.decoder: Any = self.hf_model.get_decoder()
        self.head: Any = self.hf_model.get_output_embeddings()
        # A checkpoint's own generation configuration may set a repetition penalty, for example. The tokens of
        # an answer would then not be the most likely ones by its logits.
        own = self.hf_model.generation_config
        self.hf_model.generation_config = GenerationConfig(
            eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id, bos_token_id=own.bos_token_id
        )
        self.eos_token_ids = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]

    @property
    def layer_parameters(self) -> int:
        """The number of parameters of one decoder layer that compute a token."""
        return active_parameters(self.decoder.layers[-1], self.config.get_text_config())

    @property
    def attention_width(self) -> int:
        """The number of values in a token's queries: the number of heads times their size."""
        attention = self.decoder.layers[0].self_attn
        return int(attention.head_dim) * int(self.config.get_text_config().num_attention_heads)

    def encode(self, sample: Sample, max_tokens: int, scale: float = 1.0) -> ModelInputs:
        """Makes the model's inputs of a sample, on the model's device and in its data type.

        Arguments and errors are those of `Prompts.inputs`.
        """
        tensors, item_of = self.prompts.inputs(sample, max_tokens, scale)
        moved = tensors.to(self.hf_model.device, self.hf_model.dtype)
        return ModelInputs(moved, item_of.to(self.hf_model.device))

    @torch.inference_mode()
    def answer(self, inputs: ModelInputs, max_tokens: int) -> FullAnswer:
        """Answers a sample by greedy decoding with all visual tokens.

        Args:
            inputs: The model's inputs, as `encode` returns them.
            max_tokens: The most tokens of the answer.

        Raises:
            ValueError: The model's logits are not finite.
        """
        is_text = ~inputs.is_visual
        is_text[-1] = True
        with DecoderInputs.of(self.decoder, is_text) as seen:
            out = self.hf_model.generate(
                **inputs.tensors,
                do_sample=False,
                max_new_tokens=max_tokens,
                output_logits=True,
                return_dict_in_generate=True,
            )
        answer = out.sequences[0, len(is_text) :]
        logits = torch.cat(out.logits).float()
        if not logits.isfinite().all():
            raise ValueError(
                f"the model's logits are not finite in {self.hf_model.dtype}: choose another --dtype"
            )
        told = len(answer) - 1
        in_states = torch.cat([is_text, is_text.new_ones(told)])
        return FullAnswer(
            tokens=answer.tolist(),
            logits=logits,
            states=[torch.cat(steps) for steps in seen.states],
            position_ids=seen.positions(len(in_states)),
            embedded=torch.cat(seen.embedded),
            is_visual=~in_states,
            item_of=torch.cat([inputs.item_of, inputs.item_of.new_full((told,), -1)]),
            cut=int(answer[-1]) not in self.eos_token_ids,
            deepstack=seen.deepstack,
        )

    @torch.inference_mode()
    def told(self, answered: FullAnswer, tokens: list[int]) -> FullAnswer:
        """Puts another answer behind a prompt, as if the model had given it.

        Args:
            answered: An answer of one token to the prompt.
            tokens: The tokens of the other answer.

        Returns:
            The prompt with the other answer. It has no states, and `logits` and `cut` are those of the answer
            of one token.
        """
        count = len(tokens) - 1
        ids = torch.tensor(tokens[:-1], dtype=torch.long, device=answered.embedded.device)
        after = answered.position_ids.max() + 1 + torch.arange(count, device=ids.device)
        after = after.expand(*answered.position_ids.shape[:-1], count)
        return replace(
            answered,
            tokens=tokens,
            states=[],
            position_ids=torch.cat([answered.position_ids, after], -1),
            embedded=torch.cat([answered.embedded, self.decoder.embed_tokens(ids)]),
            is_visual=torch.cat([answered.is_visual, answered.is_visual.new_zeros(count)]),
            item_of=torch.cat([answered.item_of, answered.item_of.new_full((count,), -1)]),
        )

    @torch.inference_mode()
    def withdrawn_logits(self, answered: FullAnswer, layers: Sequence[int]) -> Iterator[torch.Tensor]:
        """Computes the logits of the full model's answer, with visual tokens withdrawn at each of `layers`.

        Before layer K, the model computes the same as the full model. So for each K, only the text tokens are
        run through the layers from K on, starting from `FullAnswer.states`. One pass over the decoder does
        this for all K: at layer K, the states that enter it in the full model join the batch as one more
        sequence.

        Args:
            answered: The full model's answer. For each K the model reads the same tokens.
            layers: Values of K, ascending, each less than the number of layers and behind those of
                `FullAnswer.deepstack`.

        Yields:
            For each K, in the order of `layers`, the logits, shape `(O, vocabulary)`, float32.
        """
        positions = answered.position_ids[..., None, ~answered.is_visual]
        rotary = self.decoder.rotary_emb(answered.states[0], position_ids=positions)
        sequences = answered.states[0].new_empty((0, *answered.states[0].shape))
        for index in range(layers[0], len(self.decoder.layers)):
            if index in layers:
                sequences = torch.cat([sequences, answered.states[index][None]])
            sequences = self.decoder.layers[index](
                sequences, attention_mask=None, position_ids=positions, position_embeddings=rotary
            )
        # One by one, because with a large vocabulary the logits of all K together take gigabytes.
        for sequence in sequences:
            hidden = sequence[-len(answered.tokens) :]
            yield self.head(self.decoder.norm(hidden)).float()

    @torch.inference_mode()
    def withdrawn_answer(self, answered: FullAnswer, layer: int, max_tokens: int) -> list[int]:
        """Answers a sample by greedy decoding with visual tokens withdrawn at one layer.

        Args:
            answered: The full model's answer to the same sample. Only its prompt is used.
            layer: The withdrawal layer K, behind the layers of `FullAnswer.deepstack`.
            max_tokens: The most tokens of the answer.

        Returns:
            The token ids of the answer.
        """
        prompt, cache = answered.prompt_tokens, DynamicCache()
        tokens: list[int] = []
        hidden = answered.embedded[None, :prompt]
        positions = answered.position_ids[..., None, :prompt]
        following = positions.max() + 1
        is_text = ~answered.is_visual[:prompt]
        while True:
            rotary = self.decoder.rotary_emb(hidden, position_ids=positions)
            for index, block in enumerate(self.decoder.layers):
                if index == layer and not tokens:
                    hidden, positions = hidden[:, is_text], positions[..., is_text]
                    rotary = self.decoder.rotary_emb(hidden, position_ids=positions)
                hidden = block(
                    hidden,
                    attention_mask=None,
                    position_ids=positions,
                    position_embeddings=rotary,
                    past_key_values=cache,
                )
                if not tokens:
                    hidden = answered.deepstack.after(index, hidden)
            tokens.append(int(self.head(self.decoder.norm(hidden[0, -1])).argmax()))
            if tokens[-1] in self.eos_token_ids or len(tokens) == max_tokens:
                return tokens
            hidden = self.decoder.embed_tokens(torch.tensor([tokens[-1:]], device=hidden.device))
            positions = (following + len(tokens) - 1).expand(*positions.shape[:-1], 1)


def active_parameters(layer: Any, text_config: Any) -> int:
    """The number of parameters of a decoder layer that compute a token. Of all experts, some do.

    Args:
        layer: The decoder layer, of transformers. The first layers of a mixture of experts may have none, so
            this should be the last one.
        text_config: The text model's configuration.
    """
    count = sum(parameter.numel() for parameter in layer.parameters())
    for name, module in layer.named_modules():
        if name.rpartition(".")[2] == "experts":
            of_experts = sum(parameter.numel() for parameter in module.parameters())
            count -= of_experts - of_experts * text_config.num_experts_per_tok // module.num_experts
    return count

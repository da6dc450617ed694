"""A LLaVA on transformers: loading, prompts into tokens, and its layers with and without visual tokens."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache, GenerationConfig

from vllm_vtw.search.data.prompts import Prompts
from vllm_vtw.search.data.sample import Sample

MODEL_TYPES = ("llava", "llava_next")


@dataclass
class FullAnswer:
    """What the full model says to a sample, and the states that the text's rows had on the way.

    With T text tokens in the prompt (its last token among them, whatever that is) and an answer of O tokens,
    rows are those T and all but the last of the O.

    Attributes:
        tokens: The answer, O token ids, its end of sequence included.
        logits: Those it was chosen by, shape `(O, vocabulary)`, float32.
        states: By layer, what the layer gets, shape `(T + O - 1, hidden)` each.
        positions: Of the rows, shape `(T + O - 1,)`.
        embedded: What layer 0 gets of all tokens, shape `(prompt + O - 1, hidden)`.
        is_visual: Which of them are left out of `states`, shape `(prompt + O - 1,)`.
        cut: It did not end by itself.
    """

    tokens: list[int]
    logits: torch.Tensor
    states: list[torch.Tensor]
    positions: torch.Tensor
    embedded: torch.Tensor
    is_visual: torch.Tensor
    cut: bool

    @property
    def visual_tokens(self) -> int:
        return int(self.is_visual.sum())

    @property
    def text_tokens(self) -> int:
        """Of the prompt."""
        return len(self.positions) - len(self.tokens) + 1

    @property
    def prompt_tokens(self) -> int:
        """Text and visual ones."""
        return len(self.is_visual) - len(self.tokens) + 1


@dataclass(frozen=True)
class Placement:
    """Where a model computes, and in which type."""

    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, device: str, dtype: str, config: Any) -> "Placement":
        """Resolves a user's words.

        Args:
            device: As in torch; "auto" for a GPU where there is one.
            dtype: As in torch; "auto" for the checkpoint's on a GPU, and float32 on the CPU.
            config: The checkpoint's configuration.

        Raises:
            ValueError: There is no such device here.
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
    """A checkpoint with its processor.

    Args:
        name: A checkpoint's name or folder.
        config: Its configuration.
        placement: Where it computes.
    Raises:
        ValueError: transformers cannot load it.
    """

    def __init__(self, name: str, config: Any, placement: Placement) -> None:
        self.config = config
        try:
            self.processor = AutoProcessor.from_pretrained(name)
            # SDPA takes a missing mask for a causal one, which is what `withdrawn_logits` needs.
            model = AutoModelForImageTextToText.from_pretrained(
                name, config=config, dtype=placement.dtype, attn_implementation="sdpa"
            )
        except Exception as error:  # transformers raises what comes
            raise ValueError(f"cannot load {name}: {error}") from error
        self.prompts = Prompts(self.processor, config)
        self.hf_model: Any = model.to(placement.device).eval()
        self.decoder: Any = self.hf_model.model.language_model
        # A checkpoint's own may punish repetition: then no answer is that of its logits alone.
        own = self.hf_model.generation_config
        self.hf_model.generation_config = GenerationConfig(
            eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id, bos_token_id=own.bos_token_id
        )
        self.ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]

    @property
    def layer_parameters(self) -> int:
        """Of one decoder layer."""
        return sum(parameter.numel() for parameter in self.decoder.layers[0].parameters())

    def encode(self, sample: Sample, max_tokens: int) -> Mapping[str, torch.Tensor]:
        """The model's inputs for a sample, where an answer of `max_tokens` fits behind it.

        Raises:
            ValueError: There is no chat template.
            BadSampleError: It has no good prompt, an unreadable picture, or is too long.
        """
        inputs = self.prompts.inputs(sample, max_tokens)
        return inputs.to(self.hf_model.device, self.hf_model.dtype)

    @torch.inference_mode()
    def answer(self, inputs: Mapping[str, torch.Tensor], max_tokens: int) -> FullAnswer:
        """Greedy decoding by the full model, of at most `max_tokens` tokens.

        Raises:
            ValueError: Its logits are not finite.
        """
        out = self.hf_model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_tokens,
            output_logits=True,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
        prompt = inputs["input_ids"][0]
        kept = prompt != self.config.image_token_id
        kept[-1] = True
        of_prompt, *of_answer = out.hidden_states
        states = [
            torch.cat([of_prompt[layer][0, kept], *(step[layer][0] for step in of_answer)])
            for layer in range(len(self.decoder.layers))
        ]
        said = out.sequences[0, len(prompt) :]
        logits = torch.cat(out.logits).float()
        if not logits.isfinite().all():
            raise ValueError(
                f"the model's logits are not finite in {self.hf_model.dtype}: take another --dtype"
            )
        positions = torch.arange(len(prompt) + len(said) - 1, device=prompt.device)
        rows = torch.cat([kept, kept.new_ones(len(said) - 1)])
        return FullAnswer(
            tokens=said.tolist(),
            logits=logits,
            states=states,
            positions=positions[rows],
            embedded=torch.cat([of_prompt[0][0], *(step[0][0] for step in of_answer)]),
            is_visual=~rows,
            cut=int(said[-1]) not in self.ends,
        )

    @torch.inference_mode()
    def withdrawn_logits(self, answered: FullAnswer, layers: Sequence[int]) -> Iterator[torch.Tensor]:
        """What the answer's tokens would be chosen by, were visual tokens withdrawn at each of `layers`.

        The layers before K do the same in the full model, so what is left is the text through those from K
        on: a batch with a row for every K that has begun, in one pass over the decoder.

        Args:
            answered: The full model's answer, which is what every row reads.
            layers: Values of K, ascending, each less than the number of layers.

        Yields:
            For each K the logits, shape `(O, vocabulary)`, float32.
        """
        positions = answered.positions[None]
        rotary = self.decoder.rotary_emb(answered.states[0], position_ids=positions)
        rows = answered.states[0].new_empty((0, *answered.states[0].shape))
        for index in range(layers[0], len(self.decoder.layers)):
            if index in layers:
                rows = torch.cat([rows, answered.states[index][None]])
            rows = self.decoder.layers[index](
                rows, attention_mask=None, position_ids=positions, position_embeddings=rotary
            )
        for row in rows:  # one by one: together, a large vocabulary takes gigabytes
            said = row[-len(answered.tokens) :]
            yield self.hf_model.lm_head(self.decoder.norm(said)).float()

    @torch.inference_mode()
    def withdrawn_answer(self, answered: FullAnswer, layer: int, max_tokens: int) -> list[int]:
        """Greedy decoding with visual tokens withdrawn at `layer`, of at most `max_tokens` tokens.

        Args:
            answered: The full model's answer to the same prompt.
            layer: K.
            max_tokens: As of `answer`.
        """
        prompt, cache = answered.prompt_tokens, DynamicCache()
        said: list[int] = []
        hidden = answered.embedded[None, :prompt]
        positions = torch.arange(prompt, device=hidden.device)[None]
        kept = ~answered.is_visual[:prompt]
        while True:
            rotary = self.decoder.rotary_emb(hidden, position_ids=positions)
            for index, block in enumerate(self.decoder.layers):
                if index == layer and not said:
                    hidden, positions = hidden[:, kept], positions[:, kept]
                    rotary = self.decoder.rotary_emb(hidden, position_ids=positions)
                hidden = block(
                    hidden,
                    attention_mask=None,
                    position_ids=positions,
                    position_embeddings=rotary,
                    past_key_values=cache,
                )
            said.append(int(self.hf_model.lm_head(self.decoder.norm(hidden[0, -1])).argmax()))
            if said[-1] in self.ends or len(said) == max_tokens:
                return said
            hidden = self.decoder.embed_tokens(torch.tensor([said[-1:]], device=hidden.device))
            positions = torch.tensor([[prompt + len(said) - 1]], device=hidden.device)

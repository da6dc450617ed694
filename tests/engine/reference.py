# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The oracle: a plain transformers forward that drops visual tokens at a layer.

It shares no code with the package. What is visual it sees from the token ids, and which blocks `align`
withdraws from going through them one by one. For schedules that rank, it looks at attention written out;
what gates say, it multiplies out.
"""

from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, Decimal
from pathlib import Path

import torch
from PIL.Image import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration


class Reference:
    """A float32 LLaVA on transformers.

    Args:
        folder: The checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        # vLLM stores the rotary frequencies in float32, as this does; attention written out is the plainest.
        self.model = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.image_token = self.model.config.image_token_id

    def embeds(self, image: Image) -> torch.Tensor:
        """The projected features of one image, shape `(visual tokens, hidden)`."""
        pixels = self.processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            features = self.model.model.get_image_features(pixel_values=pixels)
        return features.pooler_output[0]

    def dropped(self, token_ids: Sequence[int], num_prompt_tokens: int, block_size: int) -> list[bool]:
        """Which tokens leave: visual ones but the prompt's last, in whole blocks where `block_size` > 1."""
        visual = [token == self.image_token for token in token_ids[:num_prompt_tokens]]
        visual[-1] = False
        visual += [False] * (len(token_ids) - num_prompt_tokens)
        leaves = [False] * len(visual)
        for start in range(0, len(visual) - block_size + 1, block_size):
            if all(visual[start : start + block_size]):
                leaves[start : start + block_size] = [True] * block_size
        return leaves

    @torch.no_grad()
    def logits(
        self,
        token_ids: Sequence[int],
        image_embeds: Sequence[torch.Tensor],
        layer: int,
        dropped: Sequence[bool],
    ) -> torch.Tensor:
        """Logits of every token, shape `(tokens, vocabulary)`.

        A dropped token's row comes from the state that it left with.
        """
        text = self.model.model.language_model
        hidden = self._embedded(token_ids, image_embeds)
        positions = torch.arange(len(hidden))
        kept = ~torch.tensor(dropped)
        result = torch.empty_like(hidden)
        for index in range(len(text.layers)):
            if index == layer:
                result[~kept] = hidden[~kept]
                hidden, positions = hidden[kept], positions[kept]
            hidden, _ = self._layer(index, hidden, positions)
        if layer < len(text.layers):
            result[kept] = hidden
        else:
            result = hidden
        return self.model.lm_head(text.norm(result))

    @torch.no_grad()
    def selected_logits(
        self, token_ids: Sequence[int], image_embeds: Sequence[torch.Tensor], leaving: Mapping[int, set[int]]
    ) -> torch.Tensor:
        """Logits of the tokens that are never dropped, shape `(tokens, vocabulary)`.

        Args:
            token_ids: Of prompt and answer.
            image_embeds: As of `embeds`.
            leaving: By layer: the positions that are dropped before it.
        """
        text, hidden = self.model.model.language_model, self._embedded(token_ids, image_embeds)
        here = list(range(len(token_ids)))
        for index in range(len(text.layers)):
            gone = leaving.get(index, set())
            hidden = hidden[[position not in gone for position in here]]
            here = [position for position in here if position not in gone]
            hidden, _ = self._layer(index, hidden, torch.tensor(here))
        return self.model.lm_head(text.norm(hidden))

    @torch.no_grad()
    def states(
        self,
        token_ids: Sequence[int],
        image_embeds: Sequence[torch.Tensor],
        layer: int,
        dropped: Sequence[bool],
    ) -> list[torch.Tensor]:
        """The states before each layer and after the last, of every token, each `(tokens, hidden)`.

        A dropped token keeps the state that it left with.
        """
        state = self._embedded(token_ids, image_embeds)
        found, kept = [state], torch.arange(len(state))
        for index in range(len(self.model.model.language_model.layers)):
            if index == layer:
                kept = kept[~torch.tensor(dropped)]
            after, _ = self._layer(index, state[kept], kept)
            state = state.index_copy(0, kept, after)
            found.append(state)
        return found

    @torch.no_grad()
    def ranked_logits(
        self,
        token_ids: Sequence[int],
        image_embeds: Sequence[torch.Tensor],
        schedule: Mapping[int, float],
        num_prompt_tokens: int,
        ranking: str = "last-token-attention",
    ) -> torch.Tensor:
        """Logits of the tokens from the prompt's last one on, shape `(tokens, vocabulary)`.

        Args:
            token_ids: Of prompt and answer.
            image_embeds: As of `embeds`.
            schedule: By layer: the fraction of visual tokens that goes on from there.
            num_prompt_tokens: Of `token_ids`.
            ranking: By what.
        """
        last = num_prompt_tokens - 1
        here = list(range(len(token_ids)))
        visual = [position for position in here[:last] if token_ids[position] == self.image_token]
        everything = len(visual)
        layers = self.model.model.language_model.layers
        hidden, scores = self._embedded(token_ids, image_embeds), torch.empty(0)
        for index in range(len(layers)):
            if index in schedule:
                few = Decimal(str(schedule[index])) * everything
                got = dict(zip(here, scores.tolist(), strict=True))
                visual.sort(key=lambda position: (-got[position], position))
                leaving = set(visual[int(few.to_integral_value(ROUND_CEILING)) :])
                visual = [position for position in visual if position not in leaving]
                hidden = hidden[[position not in leaving for position in here]]
                here = [position for position in here if position not in leaving]
            before = hidden
            hidden, weights = self._layer(index, hidden, torch.tensor(here))
            if ranking == "last-token-attention":
                scores = weights[:, here.index(last)].mean(0)
            elif ranking == "variation":
                scores = (hidden - before).square().sum(-1).sqrt()
            else:
                # Rotation leaves the length of a key as it is.
                attention = layers[index].self_attn
                keys = attention.k_proj(layers[index].input_layernorm(before))
                heads = keys.unflatten(-1, (-1, attention.head_dim))
                scores = -heads.square().sum(-1).sqrt().sum(-1)
        return self.model.lm_head(self.model.model.language_model.norm(hidden[here.index(last) :]))

    @torch.no_grad()
    def margins(
        self,
        prompt_ids: Sequence[int],
        image_embeds: Sequence[torch.Tensor],
        gates: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
    ) -> dict[int, float]:
        """By layer: by how much its gate is for withdrawing there, after layers that had all tokens.

        Args:
            prompt_ids: The prompt, with text behind its last picture.
            image_embeds: As of `embeds`.
            gates: By layer: weights of the gate's first map and of its second.
        """
        last_visual = max(at for at, token in enumerate(prompt_ids) if token == self.image_token)
        hidden, found = self._embedded(prompt_ids, image_embeds), {}
        for index in range(len(self.model.model.language_model.layers)):
            if index in gates:
                first, second = gates[index]
                others, last = hidden[last_visual + 1 : -1], hidden[-1]
                seen = torch.nn.functional.gelu(first @ torch.cat([others.mean(0), last]))
                stay, leave = second @ seen
                found[index] = float(leave - stay)
            hidden, _ = self._layer(index, hidden, torch.arange(len(hidden)))
        return found

    def _embedded(self, token_ids: Sequence[int], image_embeds: Sequence[torch.Tensor]) -> torch.Tensor:
        ids = torch.tensor(token_ids)
        hidden = self.model.model.language_model.embed_tokens(ids)
        if image_embeds:
            visual = torch.cat(list(image_embeds))
            # The answer may say `<image>` too: only the prompt's are pictures.
            hidden[torch.nonzero(ids == self.image_token).flatten()[: len(visual)]] = visual
        return hidden

    def _layer(
        self, index: int, hidden: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's output, and its attention weights, shape `(heads, tokens, tokens)`."""
        text = self.model.model.language_model
        block, seen = text.layers[index], []
        mask = torch.full((len(hidden), len(hidden)), float("-inf")).triu(1)
        hook = block.self_attn.register_forward_hook(lambda module, args, output: seen.append(output[1][0]))
        out = block(
            hidden[None],
            attention_mask=mask[None, None],
            position_ids=positions[None],
            position_embeddings=text.rotary_emb(hidden[None], positions[None]),
        )
        hook.remove()
        return out[0], seen[0]

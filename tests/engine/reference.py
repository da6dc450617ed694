"""The oracle: a plain transformers forward that drops visual tokens at a layer.

It shares no code with the package. What is visual it sees from the token ids, and which blocks `align`
withdraws from going through them one by one.
"""

from collections.abc import Sequence
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
        ids = torch.tensor(token_ids)
        hidden = text.embed_tokens(ids)
        if image_embeds:
            visual = torch.cat(list(image_embeds))
            # The answer may say `<image>` too: only the prompt's are pictures.
            hidden[torch.nonzero(ids == self.image_token).flatten()[: len(visual)]] = visual
        positions = torch.arange(len(ids))
        kept = ~torch.tensor(dropped)
        result = torch.empty_like(hidden)
        for index, block in enumerate(text.layers):
            if index == layer:
                result[~kept] = hidden[~kept]
                hidden, positions = hidden[kept], positions[kept]
            mask = torch.full((len(hidden), len(hidden)), float("-inf")).triu(1)
            rotary = text.rotary_emb(hidden[None], positions[None])
            out = block(
                hidden[None],
                attention_mask=mask[None, None],
                position_ids=positions[None],
                position_embeddings=rotary,
            )
            hidden = out[0]
        if layer < len(text.layers):
            result[kept] = hidden
        else:
            result = hidden
        return self.model.lm_head(text.norm(result))

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The oracle of models that transformers lacks: stock vLLM up to the decoder, which is transformers'."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

from tests.engine.engines import running
from tests.families.oracle import Encoded, FamilyOracle
from tests.families.requests import Ask

IN_THIS_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1)


class VLLMOracle(FamilyOracle):
    """A float32 text model on transformers. What goes into it comes from an engine of stock vLLM.

    Args:
        folder: The checkpoint, with its text model in the folder `text` within it.
        visual_tokens: The visual tokens, as the tokenizer has them.
        asked: The requests that it will be asked about.
        options: Options of the engine.
    """

    def __init__(
        self, folder: Path, visual_tokens: Sequence[str], asked: Iterable[Ask], options: Mapping[str, Any]
    ) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            folder / "text", dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.decoder = self.model.model
        self._encoded = {}
        alone: dict[int, int] = {}
        """By the identity of an image: the number of its visual tokens, from a request with it alone."""
        with patch.dict(os.environ, IN_THIS_PROCESS), running(folder, **options) as llm:
            (served,) = llm.apply_model(lambda model: model)
            decoder = served.get_language_model().model
            forward = decoder.forward
            visual_ids = set(llm.get_tokenizer().convert_tokens_to_ids(list(visual_tokens)))
            for ask in asked:
                caught: list[torch.Tensor] = []

                def catch(*args: Any, seen: list[torch.Tensor] = caught, **kwargs: Any) -> Any:
                    seen.append(kwargs["inputs_embeds"].clone())
                    return forward(*args, **kwargs)

                decoder.forward = catch
                (output,) = llm.generate([ask.to_vllm()], ONE_TOKEN, use_tqdm=False)
                (embeds,) = caught
                ids = output.prompt_token_ids
                visual = [position for position, token in enumerate(ids) if token in visual_ids]
                if len(ask.images) == 1 and not ask.videos:
                    alone[id(ask.images[0])] = len(visual)
                sizes = [alone[id(image)] for image in ask.images]
                sizes += [len(visual) - sum(sizes)] * len(ask.videos)
                self._encoded[ask.prompt] = Encoded(ids, embeds, visual, sizes, len(ask.images))

    def encode(self, text: str, images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> Encoded:
        """The request with this prompt, which `asked` had."""
        return self._encoded[text]

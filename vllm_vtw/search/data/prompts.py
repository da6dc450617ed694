# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Makes a model's inputs of samples, with the same token ids as in vLLM."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from vllm_vtw.families import BY_MODEL_TYPE
from vllm_vtw.policy import BY_FEATURES
from vllm_vtw.search.checkpoint import VISION_TOWERS
from vllm_vtw.search.data.chats import PLACEHOLDERS
from vllm_vtw.search.data.sample import BadSampleError, Message, Sample
from vllm_vtw.search.data.videos import as_processor, evenly

LEAST_SIDE = 8
"""The fewest pixels of a side of a picture that is made smaller. Processors take fewer for color channels."""


class ModelInputs(NamedTuple):
    """A model's inputs for one sample.

    Attributes:
        tensors: By name, the tensors that the transformers model takes, as a `BatchFeature`.
        item_of: For each token of the prompt, the number of the image or video that it is withdrawn with, or
            -1, shape `(prompt tokens,)`.
    """

    tensors: Any
    item_of: torch.Tensor

    @property
    def is_visual(self) -> torch.Tensor:
        """Whether each token of the prompt is withdrawn with an image or video, shape `(prompt tokens,)`."""
        return self.item_of >= 0


def shrunk(image: Image.Image, scale: float) -> Image.Image:
    """An image with a fraction of its width and height."""
    size = max(1, round(scale * image.width)), max(1, round(scale * image.height))
    return image.resize(size, Image.Resampling.LANCZOS)


class Prompts:
    """Makes a model's inputs of samples with the checkpoint's processor.

    Args:
        processor: The checkpoint's transformers processor. It is modified, so that it counts the tokens of an
            image as vLLM does.
        config: The checkpoint's transformers configuration.

    Attributes:
        notes: Sentences for reports about how the samples so far were read.
    """

    def __init__(self, processor: Any, config: Any) -> None:
        if config.vision_config.model_type in VISION_TOWERS:
            # vLLM reads these from the model's configuration. Old processors' configurations lack some.
            processor.patch_size = config.vision_config.patch_size
            processor.num_additional_image_tokens = VISION_TOWERS[config.vision_config.model_type]
            processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        self.processor = processor
        ids = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
        self.visual_ids = torch.tensor([token for token in ids if token is not None])
        self.family = BY_MODEL_TYPE[config.model_type]
        self.sampler = as_processor(processor.video_processor) if self.family.mrope else evenly
        self.max_model_len = config.get_text_config().max_position_embeddings
        self.template = processor.chat_template or processor.tokenizer.chat_template
        self.template_takes_parts = self._takes_parts()
        self.notes: list[str] = []

    def text(self, sample: Sample) -> str:
        """The text that the model gets, with one placeholder for each image or video.

        Raises:
            ValueError: The sample needs a chat template, and the checkpoint has none.
            BadSampleError: The prompt has more or fewer placeholders than the sample has images or videos,
                or one of the other kind, vLLM takes no such media for the model, or the chat template refuses
                the chat.
        """
        kind, number = ("image", len(sample.images)) if sample.video is None else ("video", 1)
        taken = {"image": self.family.images, "video": bool(self.family.video)}
        if not taken[kind]:
            raise BadSampleError(f"vLLM takes no {kind}s for this model")
        token = getattr(self.processor, f"{kind}_token")
        if sample.prompt is not None:
            text = sample.prompt
        elif self.template is None:
            raise ValueError("the checkpoint has no chat template: give whole prompts, with <image> in them")
        else:
            messages = sample.messages
            if not self.template_takes_parts:
                messages = tuple(self._as_text(message, token) for message in messages)
            try:
                text = self._rendered(messages)
            except Exception as error:  # A template may raise anything.
                reason = "the model's chat template refuses the chat"
                raise BadSampleError(f"{reason}: {error}", reason) from error
        text = text.replace(PLACEHOLDERS[kind], token)
        if sample.prompt is None and token not in text:
            raise BadSampleError(
                f"the model's chat template writes nothing for a part of type {kind}: give whole prompts, "
                f"with {PLACEHOLDERS[kind]} in them"
            )
        if text.count(token) != number:
            raise BadSampleError(
                f"the prompt has {token} {text.count(token)} times, and the number of {kind}s is {number}"
            )
        (other,) = PLACEHOLDERS.keys() - {kind}
        other_token = getattr(self.processor, f"{other}_token", None)
        for named in (PLACEHOLDERS[other], other_token):
            if taken[other] and named is not None and named != token and named in text:
                raise BadSampleError(f"the prompt has {named}, and the sample has no {other}")
        return text

    def inputs(self, sample: Sample, max_tokens: int, scale: float = 1.0) -> ModelInputs:
        """Makes the model's inputs of a sample, on the CPU.

        As in vLLM, the tokenizer adds special tokens such as BOS to a whole prompt, but not to the text that
        a chat template writes.

        Args:
            sample: The sample.
            max_tokens: The most tokens of an answer, which has to fit after the prompt.
            scale: The factor by which pictures are made smaller first, in width and height.

        Raises:
            ValueError: The sample needs a chat template, and the checkpoint has none.
            BadSampleError: No prompt can be made of the sample, an image or video cannot be read, or prompt
                and answer are too long for the model.
        """
        text = self.text(sample)
        images, video = sample.load_images(), sample.load_video(self.sampler)
        if scale < 1:
            images = [shrunk(image, scale) for image in images]
            if any(min(image.size) < LEAST_SIDE for image in images):
                raise BadSampleError("a picture would have too few pixels")
            if video is not None:
                frames = [np.asarray(shrunk(Image.fromarray(frame), scale)) for frame in video.pixels]
                video = video._replace(pixels=np.stack(frames))
        media: dict[str, Any] = {"images": images}
        if video is not None:
            metadata = [video.metadata]
            media = {"videos": [video.pixels], "video_metadata": metadata, "do_sample_frames": False}
        is_whole = sample.prompt is not None
        try:
            inputs = self.processor(text=text, add_special_tokens=is_whole, return_tensors="pt", **media)
        except Exception as error:  # A processor may raise anything.
            kind = "the model's processor refuses the sample"
            raise BadSampleError(f"{kind}: {error}", kind) from error
        ids = inputs["input_ids"][0]
        prompt = ids.tolist()
        if len(prompt) + max_tokens > self.max_model_len:
            raise BadSampleError(
                f"a prompt of {len(prompt)} and an answer of up to {max_tokens} tokens are together longer "
                f"than the model's {self.max_model_len}",
                "too long",
            )
        if self.family.model_type == "mistral3" and any(self._visual_tokens(image) == 1 for image in images):
            raise BadSampleError("transformers cannot compute an image of one visual token for this model")
        self._note_first_token(prompt, is_whole)
        return ModelInputs(inputs, self._item_of(ids, images))

    def check_ranking(self, inputs: ModelInputs, ranking: str) -> None:
        """Checks that visual tokens of a sample can be ranked as the engine does.

        Raises:
            BadSampleError: They cannot.
        """
        ids = inputs.tensors["input_ids"][0]
        between_rows = inputs.is_visual & ~torch.isin(ids, self.visual_ids.to(ids.device))
        if ranking in BY_FEATURES and between_rows.any():
            raise BadSampleError(
                f"the ranking {ranking!r} leaves the tokens between an image's rows where they are, which "
                "searches do not: use another ranking"
            )

    def _item_of(self, ids: torch.Tensor, images: Sequence[Image.Image]) -> torch.Tensor:
        """For each token of a prompt, the image or video with which the engine withdraws it, or -1."""
        positions = torch.isin(ids, self.visual_ids).nonzero()[:, 0].tolist()
        # All visual tokens of a prompt are of images, or of one video.
        counts = [self._visual_tokens(image) for image in images] if len(images) > 1 else [len(positions)]
        item_of = torch.full_like(ids, -1)
        for number, count in enumerate(counts):
            item_of[positions[:count]] = number
            for left, right in pairwise(positions[:count] if images else []):
                if right - left - 1 <= self.family.bridge:
                    item_of[left:right] = number
            positions = positions[count:]
        return item_of

    def _visual_tokens(self, image: Image.Image) -> int:
        """The number of visual tokens of an image."""
        return int(torch.isin(self._image_alone(image), self.visual_ids).sum())

    def withdrawn_tokens(self, image: Image.Image) -> int:
        """The number of tokens that are withdrawn with an image."""
        return int((self._item_of(self._image_alone(image), [image]) >= 0).sum())

    def _image_alone(self, image: Image.Image) -> torch.Tensor:
        """The token ids of a prompt that is an image."""
        text = self.processor.image_token
        ids: torch.Tensor = self.processor(images=[image], text=text, return_tensors="pt")["input_ids"][0]
        return ids

    def _rendered(self, messages: Sequence[Message]) -> str:
        rendered: str = self.processor.tokenizer.apply_chat_template(
            list(messages), chat_template=self.template, add_generation_prompt=True, tokenize=False
        )
        return rendered

    def _takes_parts(self) -> bool:
        """Whether the chat template can read a `content` that is a list of parts, and not only strings."""
        try:
            written = self._rendered([{"role": "user", "content": [{"type": "text", "text": "What?"}]}])
        except Exception:  # The template takes only strings, or there is none.
            return False
        # A template that takes only strings may also write the list itself.
        return "'type'" not in written

    def _as_text(self, message: Message, token: str) -> Message:
        """The message with a string as `content`, as vLLM makes it for a template that takes only strings.

        All placeholders come first.
        """
        texts = [part["text"] for part in message["content"] if part["type"] == "text"]
        placeholders = [token] * (len(message["content"]) - len(texts))
        return message | {"content": "\n".join([*placeholders, *texts])}

    def _note_first_token(self, prompt: list[int], is_whole: bool) -> None:
        """Adds a note if a prompt has no BOS token or two, though the tokenizer by itself would write one."""
        tokenizer = self.processor.tokenizer
        first, name = tokenizer.bos_token_id, tokenizer.bos_token
        if first is None or tokenizer("")["input_ids"][:1] != [first]:
            return
        note = None
        if not is_whole and prompt[0] != first:
            note = (
                f"Chats were measured without {name} before them: the chat template does not write it, "
                "and vLLM's chat endpoint does not let the tokenizer add it."
            )
        elif is_whole and prompt[:2] == [first, first]:
            note = (
                f"Prompts that begin with {name} were measured with two of it: the tokenizer adds one, as in "
                f"vLLM's completions endpoint. Leave {name} out of the data and of requests."
            )
        if note is not None and note not in self.notes:
            self.notes.append(note)

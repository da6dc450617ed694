"""Samples as a model gets them: vLLM's token ids, and pictures."""

from collections.abc import Sequence
from typing import Any

from vllm_vtw.search.checkpoint import VISION_TOWERS
from vllm_vtw.search.data.sample import BadSampleError, Message, Sample


class Prompts:
    """What a checkpoint's processor makes of samples.

    Args:
        processor: Of transformers; it is changed to count an image's tokens as vLLM does.
        config: The checkpoint's configuration.

    Attributes:
        notes: What a reader has to know of the samples so far.
    """

    def __init__(self, processor: Any, config: Any) -> None:
        # An old processor's configuration lacks some of these, and vLLM never asks it.
        processor.patch_size = config.vision_config.patch_size
        processor.num_additional_image_tokens = VISION_TOWERS[config.vision_config.model_type]
        processor.vision_feature_select_strategy = config.vision_feature_select_strategy
        self.processor = processor
        self.longest = config.get_text_config().max_position_embeddings
        self.template = processor.chat_template or processor.tokenizer.chat_template
        self.template_takes_parts = self._goes_through_parts()
        self.notes: list[str] = []

    def text(self, sample: Sample) -> str:
        """The text that the model gets, with one placeholder for each picture.

        Raises:
            ValueError: There is no chat template.
            BadSampleError: Placeholders and pictures differ in number, or the chat template refuses the chat.
        """
        if sample.prompt is not None:
            text = sample.prompt
        elif self.template is None:
            raise ValueError("the checkpoint has no chat template: give whole prompts, with <image> in them")
        else:
            messages = sample.messages
            if not self.template_takes_parts:
                messages = tuple(self._as_text(message) for message in messages)
            try:
                text = self._rendered(messages)
            except Exception as error:  # templates raise what they like
                kind = "the model's chat template refuses it"
                raise BadSampleError(f"{kind}: {error}", kind) from error
        token = self.processor.image_token
        if text.count(token) != len(sample.images):
            raise BadSampleError(
                f"{len(sample.images)} images, and {token} {text.count(token)} times in the prompt"
            )
        return text

    def inputs(self, sample: Sample, max_tokens: int) -> Any:
        """The model's inputs for a sample, where an answer of `max_tokens` fits behind it.

        As in vLLM, a chat begins with what the chat template writes, and a whole prompt with what the
        tokenizer writes before it.

        Raises:
            ValueError: There is no chat template.
            BadSampleError: It has no good prompt, an unreadable picture, or is too long.
        """
        text = self.text(sample)
        pictures = sample.pictures()
        is_whole = sample.prompt is not None
        try:
            inputs = self.processor(
                images=pictures, text=text, add_special_tokens=is_whole, return_tensors="pt"
            )
        except Exception as error:  # processors raise what they like
            kind = "the model's processor refuses it"
            raise BadSampleError(f"{kind}: {error}", kind) from error
        prompt = inputs["input_ids"][0].tolist()
        if len(prompt) + max_tokens > self.longest:
            raise BadSampleError(
                f"a prompt of {len(prompt)} and an answer of up to {max_tokens} tokens: over the model's "
                f"{self.longest}",
                "too long",
            )
        self._note_first_token(prompt, is_whole)
        return inputs

    def _rendered(self, messages: Sequence[Message]) -> str:
        rendered: str = self.processor.tokenizer.apply_chat_template(
            list(messages), chat_template=self.template, add_generation_prompt=True, tokenize=False
        )
        return rendered

    def _goes_through_parts(self) -> bool:
        """Whether the chat template takes lists of parts, and not strings only."""
        try:
            written = self._rendered([{"role": "user", "content": [{"type": "text", "text": "What?"}]}])
        except Exception:  # a list where a string is wanted, or there is no template
            return False
        return "'type'" not in written

    def _as_text(self, message: Message) -> Message:
        """A message whose content is a string, as vLLM makes it for such a template: pictures first."""
        texts = [part["text"] for part in message["content"] if part["type"] == "text"]
        places = [self.processor.image_token] * (len(message["content"]) - len(texts))
        return message | {"content": "\n".join([*places, *texts])}

    def _note_first_token(self, prompt: list[int], is_whole: bool) -> None:
        """Notes where the first token is there twice or not at all, though the tokenizer writes one."""
        tokenizer = self.processor.tokenizer
        first, name = tokenizer.bos_token_id, tokenizer.bos_token
        if first is None or tokenizer("")["input_ids"][:1] != [first]:
            return
        note = None
        if not is_whole and prompt[0] != first:
            note = (
                f"Chats were measured without {name} before them: the chat template does not write it, "
                "and the tokenizer, which would, is not asked to in vLLM's chat endpoint."
            )
        elif is_whole and prompt[:2] == [first, first]:
            note = (
                f"Prompts that begin with {name} were measured with two of it: the tokenizer adds one, as in "
                "vLLM's completions endpoint. Leave it out of the data and of requests."
            )
        if note is not None and note not in self.notes:
            self.notes.append(note)

"""A checkpoint's configuration, read by transformers: what `vtw plan` and `vtw calibrate` begin with."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_vtw.config import TEXT_MODELS, Model


def read_config(name: str) -> Any:
    """The configuration of a checkpoint's name or folder.

    Raises:
        ValueError: There is none that transformers can read.
    """
    from transformers import AutoConfig

    is_path = name.startswith((".", "~", os.sep))
    if is_path and not Path(name).expanduser().exists():
        raise ValueError(f"cannot read a model configuration from {name!r}: there is no such file or folder")
    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # transformers raises what comes, KeyError and TypeError among it
        where = "" if Path(name).exists() else ", which is not here, so it was looked up by name"
        raise ValueError(f"cannot read a model configuration from {name!r}{where}: {error!r}") from error


def supported_model(hf_config: Any, model_types: Sequence[str]) -> Model:
    """What a supported checkpoint is.

    Args:
        hf_config: Its configuration, of transformers.
        model_types: Those that are supported, over any of `TEXT_MODELS`.

    Raises:
        ValueError: The model is not supported.
    """
    text = hf_config.get_text_config()
    if hf_config.model_type not in model_types or text.model_type not in TEXT_MODELS:
        raise ValueError(
            f"the model is {hf_config.model_type!r} over {text.model_type!r}; supported: "
            f"{' or '.join(map(repr, model_types))} over {', '.join(TEXT_MODELS)}"
        )
    if getattr(text, "sliding_window", None) is not None:
        raise ValueError("the text model attends over a sliding window, which --model-impl vtw refuses")
    return Model(hf_config.model_type, text.model_type, text.num_hidden_layers, text.hidden_size)

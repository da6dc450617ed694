# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Reads and checks a checkpoint's configuration with transformers, before a command does anything else."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_vtw.config import TEXT_MODELS, ModelShape

# By `model_type` of the vision tower: the number of tokens per image in addition to one for each patch. CLIP
# has a class token.
VISION_TOWERS = {"clip_vision_model": 1, "siglip_vision_model": 0}

OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")

# Other files in a checkpoint's folder, such as a training's optimizer states, do not change the model.
MODEL_FILE_SUFFIXES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")


def read_config(name: str) -> Any:
    """Returns the transformers configuration of a checkpoint.

    Args:
        name: The checkpoint's name on the Hugging Face Hub, or its folder.

    Raises:
        ValueError: transformers cannot read a configuration from there. The message is one line.
    """
    from transformers import AutoConfig

    failed = f"cannot read a model configuration from {name!r}"
    is_path = name.startswith((".", "~", os.sep))
    if is_path and not Path(name).expanduser().exists():
        raise ValueError(f"{failed}: there is no such file or folder")
    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # transformers lets through errors of many types, such as KeyError
        if Path(name).is_dir() and not (Path(name) / "config.json").exists():
            raise ValueError(f"{failed}: the folder has no config.json") from error
        if isinstance(error, OSError) and not Path(name).exists():
            raise ValueError(f"{failed}: {_where_not_found(error)}") from error
        raise ValueError(f"{failed}: {type(error).__name__}: {_first_line(error)}") from error


def _where_not_found(error: Exception) -> str:
    """Says where a checkpoint's name was looked up, and what to give instead."""
    offline = [f"{name}={os.environ[name]}" for name in OFFLINE_VARIABLES if os.environ.get(name, "0") != "0"]
    where = f"on the Hugging Face Hub ({_first_line(error)})"
    if offline:
        where = f"among the models that were downloaded before, as {' and '.join(offline)} is set"
    return (
        f"there is no such folder, and it was not found {where}: "
        "give a folder with a config.json, or the name of a model on the Hub"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")


def supported_model(hf_config: Any, model_types: Sequence[str]) -> ModelShape:
    """Returns the shape of a checkpoint's model, if the model is supported.

    Args:
        hf_config: The checkpoint's transformers configuration.
        model_types: The supported `model_type`s, with any text model of `TEXT_MODELS` and any vision tower of
            `VISION_TOWERS`.

    Raises:
        ValueError: The model is not supported.
    """
    text = hf_config.get_text_config()
    text_type = getattr(text, "model_type", None)
    if hf_config.model_type not in model_types or text_type not in TEXT_MODELS:
        raise ValueError(
            f"the model is {hf_config.model_type!r} with the text model {text_type!r}; supported: "
            f"{' or '.join(map(repr, model_types))} with the text model {' or '.join(map(repr, TEXT_MODELS))}"
        )
    tower = hf_config.vision_config.model_type
    if tower not in VISION_TOWERS:
        raise ValueError(f"the vision tower is {tower!r}; supported: {' or '.join(map(repr, VISION_TOWERS))}")
    if getattr(text, "sliding_window", None) is not None:
        raise ValueError("the text model attends over a sliding window, which --model-impl vtw refuses")
    return ModelShape(hf_config.model_type, text_type, text.num_hidden_layers, text.hidden_size)


def revision(name: str) -> str:
    """Returns what distinguishes versions of a checkpoint that have the same name.

    Args:
        name: The checkpoint's name on the Hugging Face Hub, or its folder.

    Returns:
        The commit of a checkpoint from the Hugging Face Hub. For a folder, the SHA-256 of the names and
        contents of the model's files.
    """
    from transformers.utils import cached_file, extract_commit_hash

    folder = Path(cached_file(name, "config.json")).parent
    commit: str | None = extract_commit_hash(str(folder / "config.json"), None)
    if commit is not None:
        return commit
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in MODEL_FILE_SUFFIXES:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()

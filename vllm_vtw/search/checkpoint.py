# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""Reads and checks a checkpoint's configuration with transformers, before a command does anything else."""

import hashlib
import os
from pathlib import Path
from typing import Any

from vllm_vtw.config import ModelShape
from vllm_vtw.families import BY_MODEL_TYPE, Refusal, first_layer, refusal, text_refusal

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
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # transformers lets through errors of many types, such as KeyError
        if (hf_config := _config_without_class(name)) is not None:
            return hf_config
        if Path(name).is_dir() and not (Path(name) / "config.json").exists():
            raise ValueError(f"{failed}: the folder has no config.json") from error
        if isinstance(error, OSError) and not Path(name).exists():
            raise ValueError(f"{failed}: {_where_not_found(error)}") from error
        raise ValueError(f"{failed}: {type(error).__name__}: {_first_line(error)}") from error


def _config_without_class(name: str) -> Any | None:
    """Reads the configuration of a model that transformers lacks, without running code from the Hub.

    Returns:
        A configuration with a `text_config`. None if transformers has the model.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

    try:
        content, _ = PretrainedConfig.get_config_dict(name)
    except Exception:
        return None
    text = content.pop("llm_config", None) or content.pop("text_config", None) or {}
    if content.get("model_type") in (None, *CONFIG_MAPPING) or not isinstance(text, dict):
        return None
    kind = text.pop("model_type", None)
    model_type = content.pop("model_type", "")
    try:
        text_config = AutoConfig.for_model(kind, **text)
    except ValueError:  # transformers has no such text model
        text_config = PretrainedConfig(**text)
        text_config.model_type = kind
    hf_config = PretrainedConfig(**content, text_config=text_config)
    hf_config.model_type = model_type
    return hf_config


def has_mistrals_format(name: str) -> bool:
    """Whether a checkpoint is there in Mistral's own format, too, which vLLM prefers.

    Args:
        name: The checkpoint's name on the Hugging Face Hub, or its folder.
    """
    from transformers.utils import cached_file

    missing_is_fine = {"_raise_exceptions_for_missing_entries": False}
    offline_is_fine = {"_raise_exceptions_for_connection_errors": False}
    return cached_file(name, "params.json", **missing_is_fine, **offline_is_fine) is not None


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


def supported_model(hf_config: Any) -> ModelShape:
    """Returns the shape of a checkpoint's model, if the model can be served.

    Args:
        hf_config: The checkpoint's transformers configuration.

    Raises:
        ValueError: The model cannot be served.
    """
    family = BY_MODEL_TYPE.get(hf_config.model_type)
    # A configuration that was made by hand has no architectures.
    named = hf_config.architectures or ([family.architecture] if family else [])
    text = hf_config.get_text_config()
    why_not = refusal(named or [f"models of type {hf_config.model_type!r}"])
    why_not = why_not or text_refusal(text.model_type, text.to_dict())
    if why_not is None and family is None:
        why_not = Refusal(f"{named[0]} of the model type {hf_config.model_type!r} is not known")
    if why_not is not None:
        raise ValueError(str(why_not))
    return ModelShape(
        hf_config.model_type,
        text.model_type,
        text.num_hidden_layers,
        text.hidden_size,
        text.vocab_size,
        first_layer=first_layer(hf_config),
    )


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

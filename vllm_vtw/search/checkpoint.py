"""A checkpoint's configuration, read by transformers: what the commands begin with."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_vtw.config import TEXT_MODELS, ModelShape

# By vision tower, the tokens that it makes of an image beside those of its patches.
VISION_TOWERS = {"clip_vision_model": 1, "siglip_vision_model": 0}

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")

# Beside them, a training's folder has its optimizer's states.
FILES_OF_A_MODEL = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")


def read_config(name: str) -> Any:
    """The configuration of a checkpoint's name or folder.

    Raises:
        ValueError: There is none that transformers can read.
    """
    from transformers import AutoConfig

    failed = f"cannot read a model configuration from {name!r}"
    is_path = name.startswith((".", "~", os.sep))
    if is_path and not Path(name).expanduser().exists():
        raise ValueError(f"{failed}: there is no such file or folder")
    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # transformers raises what comes, KeyError and TypeError among it
        if Path(name).is_dir() and not (Path(name) / "config.json").exists():
            raise ValueError(f"{failed}: the folder has no config.json") from error
        if isinstance(error, OSError) and not Path(name).exists():
            raise ValueError(f"{failed}: {_looked_for(error)}") from error
        raise ValueError(f"{failed}: {type(error).__name__}: {_first_line(error)}") from error


def _looked_for(error: Exception) -> str:
    offline = [f"{name}={os.environ[name]}" for name in OFFLINE if os.environ.get(name, "0") != "0"]
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
    """What a supported checkpoint is.

    Args:
        hf_config: Its configuration, of transformers.
        model_types: Those that are supported, over any of `TEXT_MODELS`, with any of `VISION_TOWERS`.

    Raises:
        ValueError: The model is not supported.
    """
    text = hf_config.get_text_config()
    text_type = getattr(text, "model_type", None)
    if hf_config.model_type not in model_types or text_type not in TEXT_MODELS:
        raise ValueError(
            f"the model is {hf_config.model_type!r} over {text_type!r}; supported: "
            f"{' or '.join(map(repr, model_types))} over {', '.join(TEXT_MODELS)}"
        )
    tower = hf_config.vision_config.model_type
    if tower not in VISION_TOWERS:
        raise ValueError(f"the vision tower is {tower!r}; supported: {', '.join(VISION_TOWERS)}")
    if getattr(text, "sliding_window", None) is not None:
        raise ValueError("the text model attends over a sliding window, which --model-impl vtw refuses")
    return ModelShape(hf_config.model_type, text_type, text.num_hidden_layers, text.hidden_size)


def revision(name: str) -> str:
    """What tells a checkpoint from another of the same name: its commit, or SHA-256 of its files."""
    from transformers.utils import cached_file, extract_commit_hash

    folder = Path(cached_file(name, "config.json")).parent
    commit: str | None = extract_commit_hash(str(folder / "config.json"), None)
    if commit is not None:
        return commit
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in FILES_OF_A_MODEL:
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()

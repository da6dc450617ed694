# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The seam into vLLM's model registry, by which `--model-impl vtw` selects the plugin's model classes."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from vllm.config import ModelConfig
from vllm.model_executor.models import ModelRegistry

from vllm_vtw.families import BY_ARCHITECTURE, PREFIX, refusal, supported_architecture
from vllm_vtw.versions import unknown

MODEL_IMPL = "vtw"
TARGETS = ("inspect_model_cls", "resolve_model_cls")
EXTENSION_POINT = "register_model_impl"
EXPECTED_PARAMETERS = ["self", "architectures", "model_config"]

Guard = Callable[[], None]


def install(guard: Guard) -> None:
    """Makes vLLM's model registry resolve `--model-impl vtw`.

    If vLLM has an extension point for this (`patches/model-impl.diff`), it is used. Otherwise two methods of
    the registry are wrapped. If these are not the methods that the wrappers were written for,
    `--model-impl vtw` raises a RuntimeError, and all other models are served as before.

    Args:
        guard: Called each time before `--model-impl vtw` is resolved. It raises an exception if the plugin
            must not be used.
    """
    resolve = functools.partial(_resolve, guard)
    if hasattr(ModelRegistry, EXTENSION_POINT):
        ModelRegistry.register_model_impl(MODEL_IMPL, resolve)
        return
    registry = type(ModelRegistry)
    methods = [getattr(registry, target) for target in TARGETS]
    if any(hasattr(method, "knows_vtw") for method in methods):
        return
    expected = all(list(inspect.signature(method).parameters) == EXPECTED_PARAMETERS for method in methods)
    for target, method in zip(TARGETS, methods, strict=True):
        wrapper = _resolving(method, resolve) if expected else _refusing(method)
        wrapper.knows_vtw = True  # type: ignore[attr-defined]
        setattr(registry, target, wrapper)


def _resolving(original: Callable[..., Any], resolve: Callable[..., list[str]]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(self: Any, architectures: str | list[str], model_config: ModelConfig) -> Any:
        if model_config.model_impl == MODEL_IMPL:
            architectures = resolve(architectures, model_config)
        return original(self, architectures, model_config)

    return wrapper


def _refusing(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if any(getattr(value, "model_impl", None) == MODEL_IMPL for value in (*args, *kwargs.values())):
            raise unknown(f"ModelRegistry.{original.__name__}")
        return original(*args, **kwargs)

    return wrapper


def _resolve(guard: Guard, architectures: str | list[str], model_config: ModelConfig) -> list[str]:
    """The name under which the registry lists the plugin's class for a checkpoint's architecture.

    Args:
        guard: As `install` takes it.
        architectures: The names in the checkpoint's configuration.
        model_config: The model's configuration.

    Raises:
        ValueError: The architecture is not supported.
    """
    guard()
    architectures = [architectures] if isinstance(architectures, str) else architectures
    _register()
    supported = supported_architecture(architectures)
    if supported is not None:
        return [f"{PREFIX}{supported}"]
    if _is_inner_model(model_config) or any(map(_is_ours, architectures)):
        return list(architectures)
    raise ValueError(str(refusal(architectures)))


def _is_inner_model(model_config: ModelConfig) -> bool:
    """Whether a supported model is creating its text model, which vLLM resolves with the same `model_impl`.

    The configuration is then a copy of the outer model's, which still names the outer model's architecture.
    """
    return _is_ours(getattr(model_config, "_architecture", ""))


def _is_ours(architecture: str) -> bool:
    """Whether an architecture has the name of one of the plugin's model classes."""
    return architecture.removeprefix(PREFIX) in BY_ARCHITECTURE


def _register() -> None:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_vtw.startup.model_config import VTWModelConfig

    for architecture in BY_ARCHITECTURE:
        name = f"{PREFIX}{architecture}"
        if name not in ModelRegistry.models:
            ModelRegistry.register_model(name, f"vllm_vtw.models.served:{name}")
            MODELS_CONFIG_MAP[name] = VTWModelConfig

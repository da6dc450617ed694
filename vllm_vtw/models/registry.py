"""The seam into vLLM's model registry: `--model-impl vtw` stands for the plugin's model classes."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from vllm.config import ModelConfig
from vllm.model_executor.models import ModelRegistry

MODEL_IMPL = "vtw"
MODELS = {
    "LlavaForConditionalGeneration": "vllm_vtw.models.llava:VTWLlavaForConditionalGeneration",
}
TARGETS = ("inspect_model_cls", "resolve_model_cls")
EXTENSION_POINT = "register_model_impl"
EXPECTED_PARAMETERS = ["self", "architectures", "model_config"]

Guard = Callable[[], None]


def install(guard: Guard) -> None:
    """Makes the registry resolve `--model-impl vtw`, through its extension point where vLLM has one.

    A registry that is not what the hook was written for refuses `vtw` and serves everything else.

    Args:
        guard: Called before the implementation is first used; raises where it must not be.
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
            raise RuntimeError(f"vllm-vtw does not know this vLLM's ModelRegistry.{original.__name__}")
        return original(*args, **kwargs)

    return wrapper


def _resolve(guard: Guard, architectures: str | list[str], model_config: ModelConfig) -> list[str]:
    """The plugin's name for the checkpoint's architecture, registered by the time it is returned.

    Raises:
        ValueError: The architecture is not supported.
    """
    guard()
    architectures = [architectures] if isinstance(architectures, str) else architectures
    _register()
    supported = [f"VTW{name}" for name in architectures if name in MODELS]
    if supported:
        return supported
    if _is_inner_model(model_config) or any(name.removeprefix("VTW") in MODELS for name in architectures):
        return list(architectures)
    raise ValueError(
        f"--model-impl vtw does not support {', '.join(architectures)}; supported are {', '.join(MODELS)}. "
        "Serve this model without --model-impl vtw"
    )


def _is_inner_model(model_config: ModelConfig) -> bool:
    """Whether a supported model is building its text model, under a copy of its own configuration."""
    return getattr(model_config, "_architecture", "").removeprefix("VTW") in MODELS


def _register() -> None:
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vllm_vtw.startup import VTWModelConfig

    for name, location in MODELS.items():
        if f"VTW{name}" not in ModelRegistry.models:
            ModelRegistry.register_model(f"VTW{name}", location)
            MODELS_CONFIG_MAP[f"VTW{name}"] = VTWModelConfig

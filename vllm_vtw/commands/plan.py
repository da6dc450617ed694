# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""`vtw plan`: how much KV memory requests take under a withdrawal layer or policy, without an engine."""

import argparse
import json
import re
from typing import Any

from vllm_vtw.capacity import LayerGroups, visual_tokens_held
from vllm_vtw.config import VTWConfig
from vllm_vtw.families import BY_MODEL_TYPE
from vllm_vtw.policy import Policy
from vllm_vtw.search.checkpoint import VISION_TOWERS, read_config, supported_model

BYTES_PER_VALUE = {"auto": 2, "float16": 2, "bfloat16": 2, "float32": 4}
"""The size of one number in the KV cache, in bytes, by `--dtype`."""
UNITS = {
    **{"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40},
    **{"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12},
    # As in vLLM's --kv-cache-memory-bytes, which takes no others.
    **{
        "": 1,
        "K": 2**10,
        "M": 2**20,
        "G": 2**30,
        "T": 2**40,
        "k": 10**3,
        "m": 10**6,
        "g": 10**9,
        "t": 10**12,
    },
}


def add_command(commands: Any) -> None:
    """Adds `plan` to the `vtw` command."""
    parser = commands.add_parser(
        "plan",
        help="show the KV memory of requests with and without withdrawal",
        description="Shows the KV memory of requests with and without withdrawal. It reads only the model's "
        "configuration and starts no engine.",
    )
    parser.add_argument("model", help="name or folder of a checkpoint, or its config.json")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--layer", type=int, help="withdrawal layer K (default: the published layer, if there is one)"
    )
    what.add_argument(
        "--layers",
        type=_layers_to_choose,
        help="layers that requests may choose from, such as 8,16,24; the deepest is the default",
    )
    what.add_argument("--policy", help="path of a policy file")
    numbers = (
        (
            "--kv-memory",
            _memory,
            "8GiB",
            "memory of the KV cache, on all GPUs of the model together, such as 24GiB, or 24G as in vLLM",
        ),
        ("--prompt-tokens", _count, 64, "number of text tokens of a prompt"),
        ("--images", _count, 1, "number of images of a prompt"),
        ("--output-tokens", _count, 128, "number of tokens of an answer"),
        ("--block-size", _size, 16, "number of tokens of a KV block, as in vLLM"),
    )
    for name, kind, default, meaning in numbers:
        parser.add_argument(name, type=kind, default=default, help=f"{meaning} (default: {default})")
    parser.add_argument(
        "--image-size",
        type=_image_size,
        default="1024x768",
        help="width and height of an image in pixels (default: %(default)s). The number of visual "
        "tokens of LLaVA-1.5 does not depend on it",
    )
    parser.add_argument(
        "--visual-tokens",
        type=_size,
        help="number of visual tokens of an image or video, in place of --image-size",
    )
    parser.add_argument(
        "--no-enable-prefix-caching",
        action="store_true",
        help="as in vLLM; every visual token is then withdrawn, instead of whole blocks",
    )
    parser.add_argument(
        "--align",
        choices=("true", "false"),
        help='as "align" of the plugin\'s options (default: true with prefix caching, false without it)',
    )
    parser.add_argument(
        "--dtype",
        choices=BYTES_PER_VALUE,
        default="auto",
        help="data type of the KV cache, as in vLLM; auto stands for one of 16 bits",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(parser=parser, run=_run)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens or images")
    return int(text)


def _layers_to_choose(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers, like 8,16,24")
    return [int(layer) for layer in text.split(",")]


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens of at least 1")
    return int(text)


def _image_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a width and height in pixels, like 1024x768")
    return int(match[1]), int(match[2])


def _memory(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]*)", text)
    if match is None or match[2] not in UNITS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an amount of memory, a number of bytes or one with a unit: "
            + ", ".join(filter(None, UNITS))
        )
    return int(float(match[1]) * UNITS[match[2]])


def _run(arguments: argparse.Namespace) -> None:
    parser = arguments.parser
    options = {"layer": arguments.layer, "layers": arguments.layers, "policy": arguments.policy}
    if arguments.align:
        options["align"] = arguments.align == "true"
    try:
        hf_config = read_config(arguments.model)
        visual_tokens = arguments.visual_tokens
        if visual_tokens is None:
            visual_tokens = tokens_per_image(arguments.model, hf_config, arguments.image_size)
        result = plan(
            hf_config,
            {key: value for key, value in options.items() if value is not None},
            prefix_caching=not arguments.no_enable_prefix_caching,
            block_size=arguments.block_size,
            bytes_per_value=BYTES_PER_VALUE[arguments.dtype],
            kv_memory=arguments.kv_memory,
            text_tokens=arguments.prompt_tokens,
            images=arguments.images,
            visual_tokens=visual_tokens,
            output_tokens=arguments.output_tokens,
        )
    except ValueError as error:
        # The command's own options have the names of the keys under "vtw".
        message = re.sub(r'^--additional-config \["vtw"\]\["(\w+)"\] =', r"--\1", str(error))
        message = message.removeprefix('--additional-config ["vtw"]: ')
        message = message.replace('--additional-config \'{"vtw": {"layer": K}}\'', "--layer K")
        message = message.replace('"layer" or "policy"', "--layer or --policy")
        parser.exit(2, f"{parser.prog}: error: {message}\n")
    print(json.dumps(result, indent=2) if arguments.json else describe(result))


def plan(
    hf_config: Any,
    vtw: dict[str, Any],
    *,
    prefix_caching: bool,
    block_size: int,
    bytes_per_value: int,
    kv_memory: int,
    text_tokens: int,
    images: int,
    visual_tokens: int,
    output_tokens: int,
) -> dict[str, Any]:
    """How much KV cache a request takes, and how many requests fit, in stock vLLM and with withdrawal.

    Args:
        hf_config: The checkpoint's configuration, of transformers.
        vtw: The options under `"vtw"` in `--additional-config`.
        prefix_caching: Whether prefix caching is on, which decides the default of `align`.
        block_size: The number of tokens of a KV block.
        bytes_per_value: The size of one number in the KV cache, in bytes.
        kv_memory: The memory of the KV cache, in bytes.
        text_tokens: The number of text tokens of the prompt.
        images: The number of images of the prompt.
        visual_tokens: The number of visual tokens of an image.
        output_tokens: The number of tokens of the answer.

    Raises:
        ValueError: The model is not supported, or an option is wrong.
    """
    model = supported_model(hf_config)
    text = hf_config.get_text_config()
    num_layers = model.num_hidden_layers
    config = VTWConfig.parse(vtw, model, prefix_caching)
    groups = LayerGroups.of(config.policy, num_layers)
    align_to = config.align_to(block_size)
    num_tokens = text_tokens + images * visual_tokens + output_tokens
    if num_tokens == 0:
        raise ValueError("a request without tokens takes no memory: give it text, an image or an answer")
    always_held = text_tokens + output_tokens
    default = config.policy.default_layer
    exit_stage = 1 if default is None else config.policy.exit_stage(default)
    held = [
        always_held + visual
        for visual in visual_tokens_held(config.policy, images, visual_tokens, align_to, exit_stage)
    ]
    held_of_image = visual_tokens_held(config.policy, 1, visual_tokens, align_to, exit_stage)

    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    layer_token = 2 * text.num_key_value_heads * head_size * bytes_per_value
    layer_block = layer_token * block_size
    blocks = {
        "stock": -(-num_tokens // block_size),
        "vtw": groups.blocks(held, block_size),
    }
    block_bytes = {"stock": num_layers * layer_block, "vtw": groups.width * layer_block}
    request_bytes = {side: blocks[side] * block_bytes[side] for side in blocks}
    # vLLM keeps one block, the null block, for itself.
    num_blocks_of = {side: max(0, kv_memory // block_bytes[side] - 1) for side in blocks}
    max_sequences = {side: num_blocks_of[side] // blocks[side] for side in blocks}

    def choice(policy: Policy, stage: int | None) -> dict[str, Any]:
        """What a request takes that chose this policy or this exit stage."""
        visual = visual_tokens_held(policy, images, visual_tokens, align_to, stage)
        num_blocks = groups.blocks([always_held + tokens for tokens in visual], block_size)
        taken = num_blocks * block_bytes["vtw"]
        return {
            "kv_bytes_per_request": taken,
            "kv_ratio": taken / request_bytes["stock"],
            "max_sequences": num_blocks_of["vtw"] // num_blocks,
        }

    exits, tasks = [], config.policy.tasks
    if config.policy.has_exits or config.policy.layer is not None or tasks:
        for layer in config.policy.offered_layers(num_layers):
            of_layer = [task for task, chosen in tasks.items() if chosen == layer]
            taken = choice(config.policy, config.policy.exit_stage(layer))
            exits.append({"layer": layer, "tasks": of_layer, **taken})
    offered = (*config.policy.offered_keeps, 1.0) if config.policy.offered_keeps else ()
    shares = [{"keep": keep, **choice(config.policy.keeping(keep), 1)} for keep in offered]
    return {
        "model": model.as_dict(),
        "num_hidden_layers": num_layers,
        "stages": [
            {"first_layer": layers.start, "last_layer": layers.stop - 1, "tokens_held": tokens}
            for layers, tokens in zip(config.policy.segments(num_layers), held, strict=True)
            if layers
        ],
        "groups": [
            {"stage": group.stage, "layers": group.layers, "pages": group.pages} for group in groups.groups
        ],
        "layers_per_group": groups.width,
        "padding_fraction": groups.padding_fraction,
        "align": config.align,
        "ranking": config.policy.ranking,
        "has_gates": config.policy.gate is not None,
        "default_layer": config.policy.default_layer,
        "exits": exits,
        "shares": shares,
        "block_size": block_size,
        "request": {
            "text_tokens": text_tokens,
            "images": images,
            "tokens_per_image": visual_tokens,
            "output_tokens": output_tokens,
        },
        "kv_memory_bytes": kv_memory,
        "kv_bytes_per_text_token": {
            "stock": num_layers * layer_token,
            "vtw": round(groups.layer_tokens([1] * len(held)) * layer_token),
        },
        "kv_bytes_per_image": {
            "stock": num_layers * layer_token * visual_tokens,
            "vtw": round(groups.layer_tokens(held_of_image) * layer_token),
        },
        "kv_bytes_per_request": request_bytes,
        "kv_ratio": request_bytes["vtw"] / request_bytes["stock"],
        "max_sequences": max_sequences,
    }


def tokens_per_image(name: str, hf_config: Any, size: tuple[int, int]) -> int:
    """The number of visual tokens of an image.

    Args:
        name: The checkpoint's name on the Hugging Face Hub, or its folder.
        hf_config: The checkpoint's configuration, of transformers.
        size: The image's width and height in pixels.

    Raises:
        ValueError: The model is not supported, or its processor cannot tell the number.
    """
    if not BY_MODEL_TYPE[supported_model(hf_config).model_type].images:
        raise ValueError("vLLM takes only videos for this model: give --visual-tokens")
    vision = getattr(hf_config, "vision_config", None)
    if hf_config.model_type == "llava" and vision is not None and vision.model_type in VISION_TOWERS:
        # As in vLLM, the number follows from the configuration alone.
        tokens: int = (vision.image_size // vision.patch_size) ** 2 + VISION_TOWERS[vision.model_type]
        return tokens - 1 if hf_config.vision_feature_select_strategy == "default" else tokens
    try:
        from PIL import Image
        from transformers import AutoProcessor

        from vllm_vtw.search.data.prompts import Prompts

        prompts = Prompts(AutoProcessor.from_pretrained(name, trust_remote_code=False), hf_config)
        return prompts.withdrawn_tokens(Image.new("RGB", size))
    except Exception as error:  # A processor may raise anything.
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"the model's processor cannot tell how many tokens an image has ({reason}): give --visual-tokens"
        ) from error


def describe(result: dict[str, Any]) -> str:
    """The result of `plan` as text."""
    request, request_bytes = result["request"], result["kv_bytes_per_request"]
    mebibytes = {side: size / 2**20 for side, size in request_bytes.items()}
    withdrawn = f"whole blocks of {result['block_size']}" if result["align"] else "every visual token"
    if result["ranking"]:
        withdrawn = f"visual tokens by the ranking {result['ranking']!r}"
    if result["has_gates"]:
        withdrawn = f"every visual token at layer {result['exits'][0]['layer']}, if the gate there says so"
    elif result["default_layer"] == result["num_hidden_layers"]:
        withdrawn = "nothing by default"
    elif result["exits"] and not result["ranking"]:
        withdrawn += f" at layer {result['default_layer']}, the default"
    stages = [
        f"  {_layers(stage['first_layer'], stage['last_layer'])} {stage['tokens_held']} tokens"
        for stage in result["stages"]
    ]
    notes = []
    if request_bytes["vtw"] > request_bytes["stock"]:
        if not request["images"]:
            remedy = "nothing is withdrawn from a request of text"
        elif result["default_layer"] == result["num_hidden_layers"]:
            remedy = "nothing is withdrawn by default, so let requests choose a layer"
        else:
            remedy = "try another layer"
        notes = ["", f"KV blocks leave more memory unused here than withdrawal saves: {remedy}."]
    for exit_ in result["exits"]:
        stay = exit_["layer"] == result["num_hidden_layers"]
        case = "stay" if stay else f"leave at layer {exit_['layer']}"
        of_tasks = f" (task {', '.join(exit_['tasks'])})" if exit_["tasks"] else ""
        notes.append(f"If they {case}{of_tasks}: {_taken(exit_)}")
    for share in result["shares"]:
        notes.append(f"If a request keeps {share['keep']:g} of them: {_taken(share)}")
    if result["has_gates"]:
        notes.append(
            "A request is admitted when there are blocks for the last case. It gives back those that it does "
            "not need."
        )
    groups = " + ".join(
        _counted(group["layers"], "layer")
        + (f" ({group['pages']} pages a block)" if group["pages"] > 1 else "")
        for group in result["groups"]
    )
    return "\n".join(
        [
            f"A request of {request['text_tokens']} text, {request['images']} x "
            f"{request['tokens_per_image']} visual and {request['output_tokens']} output tokens, "
            f"withdrawing {withdrawn}:",
            *stages,
            f"KV cache groups: {groups}",
            f"A long text leaves {result['padding_fraction']:.1%} of its memory unused.",
            "",
            f"{'':28}{'stock vLLM':>12}{'vtw':>12}",
            _row("KV cache of a request, MiB", mebibytes, ".1f"),
            _row(f"requests in {_amount(result['kv_memory_bytes'])}", result["max_sequences"], "d"),
            *notes,
        ]
    )


def _taken(choice: dict[str, Any]) -> str:
    """What a request takes that made a choice."""
    mebibytes = choice["kv_bytes_per_request"] / 2**20
    return f"{mebibytes:.1f} MiB, x {choice['kv_ratio']:.2f}, {_counted(choice['max_sequences'], 'request')}"


def _layers(first: int, last: int) -> str:
    return f"layer {first} holds" if first == last else f"layers {first} to {last} hold"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _amount(memory: int) -> str:
    """An amount of memory in bytes, as text in GiB or MiB."""
    unit = "GiB" if memory >= UNITS["GiB"] else "MiB"
    return f"{memory / UNITS[unit]:.4g} {unit}"


def _row(name: str, values: dict[str, Any], form: str) -> str:
    """A row of the table: stock vLLM's value, the plugin's, and their ratio."""
    stock, vtw = values["stock"], values["vtw"]
    ratio = f"   x {vtw / stock:.2f}" if stock else ""
    return f"{name:28}{format(stock, form):>12}{format(vtw, form):>12}{ratio}"

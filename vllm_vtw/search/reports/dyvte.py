"""What `vtw dyvte` tells of gates: how they learned, and what they do at a threshold."""

from collections.abc import Collection
from typing import Any

from matplotlib.axes import Axes

from vllm_vtw.search.reports.data_notes import data_notes
from vllm_vtw.search.reports.page import MARKERS, Draw, by_layer, page


def notes(result: dict[str, Any], unseen: Collection[str]) -> list[str]:
    """What a reader of a training has to know; `unseen` are tasks without a good sample."""
    said = []
    of_layers = zip(*result["may_leave"].values(), strict=True)
    same = {layer: {*shares} for layer, shares in zip(result["layers"], of_layers, strict=True)}
    for share, what in ((0.0, "never"), (1.0, "always")):
        layers = [str(layer) for layer, shares in same.items() if shares == {share}]
        if layers:
            said.append(
                f"At layer {', '.join(layers)} these samples' visual tokens may {what} leave: a gate there "
                "learns only that. Other --layers may serve you better."
            )
    right = zip(result["curves"][-1]["held_out_accuracy"], result["held_out_may_leave"], strict=True)
    useless = [
        str(layer)
        for layer, (of_gate, leaving) in zip(result["layers"], right, strict=True)
        if of_gate <= max(leaving, 1 - leaving) < 1
    ]
    if useless:
        said.append(
            f"At layer {', '.join(useless)} the gate is right about no more of {result['held_out']} held-out "
            "samples than if it always said the same: more samples (--limit) or --epochs may help."
        )
    return said + data_notes(result, None, unseen)


def notes_of_evaluation(result: dict[str, Any], unseen: Collection[str], learned_from: bool) -> list[str]:
    """What a reader of an evaluation has to know; `learned_from` where gates were trained on its data."""
    said = ["To serve another threshold, write it for every layer into 'thresholds' of the policy file."]
    if learned_from:
        said.append("The gates learned from these data: on others they may do worse.")
    return said + data_notes(result, None, unseen)


def table(result: dict[str, Any]) -> list[str]:
    """A training, in lines."""
    last = result["curves"][-1]
    tasks = list(result["may_leave"])
    width = max(5, *map(len, tasks))
    heads = "".join(f"  {task:>{width}}" for task in tasks)
    lines = [
        f"{result['made']['samples']} samples, of which {result['held_out']} were held out of training. In "
        "percent: samples whose visual tokens may",
        "leave before a layer, by task; held-out samples that the gate there is right about, and how many it "
        "would be right",
        "about if it always said the same.",
        "",
        f"{'layer':>5}{heads}    right  always the same",
    ]
    for at, layer in enumerate(result["layers"]):
        cells = "".join(f"  {100 * result['may_leave'][task][at]:{width}.1f}" for task in tasks)
        same = result["held_out_may_leave"][at]
        lines.append(
            f"{layer:5}{cells}  {100 * last['held_out_accuracy'][at]:7.1f}  {100 * max(same, 1 - same):15.1f}"
        )
    return lines


def html(result: dict[str, Any], command: str | None) -> str:
    """The report of a training.

    Args:
        result: As `result.json` has it.
        command: How to serve the gates, where they can be served.
    """
    return page("dyvte.html", _learning(result), result=result, command=command)


def _learning(result: dict[str, Any]) -> dict[str, Draw]:
    layers, curves = result["layers"], result["curves"]
    epochs = range(1, len(curves) + 1)

    def over_epochs(name: str, label: str) -> Draw:
        def draw(axes: Axes) -> None:
            for at, layer in enumerate(layers):
                axes.plot(epochs, [curve[name][at] for curve in curves], label=f"layer {layer}")
            axes.set_ylabel(label)
            by_layer(axes, "epoch")

        return draw

    def leaving(axes: Axes) -> None:
        for marker, (task, shares) in zip(MARKERS * len(layers), result["may_leave"].items(), strict=False):
            axes.plot(layers, [100 * share for share in shares], f"{marker}-", label=task)
        axes.set_ylabel("samples (%)")
        by_layer(axes, "layer, from 0 on")

    return {
        "Loss on what is learned from": over_epochs("loss", "cross-entropy, nats"),
        "Loss on held-out samples": over_epochs("held_out_loss", "cross-entropy, nats"),
        "Held-out samples that a gate is right about": over_epochs("held_out_accuracy", "share"),
        "Visual tokens may leave": leaving,
    }


def evaluation_table(result: dict[str, Any]) -> list[str]:
    """An evaluation, in lines."""
    rows = result["rows"]
    tasks = list(rows[0]["tasks"])
    heads = [f"{head:>{max(18, len(head))}}" for head in (*tasks, "all")]
    width = max(len(row["way"]) for row in rows)
    lines = [
        f"{result['made']['samples']} samples, {result['model']['num_hidden_layers']} layers.",
        "For every task, in percent: right answers, at the mean layer of exit, and the decoder's work.",
        "Work and KV memory are of stock vLLM's.",
        "Where data do not say what is right, ~ marks answers that are the full model's.",
        "",
        f"{'':{width}}      KV  " + "  ".join(heads),
    ]
    for row in rows:
        told = [_in_short(of) for of in (*row["tasks"].values(), row["all"])]
        cells = [cell.rjust(len(head)) for cell, head in zip(told, heads, strict=True)]
        memory = row["all"]["kv_share"]
        lines.append(f"{row['way']:{width}}  {100 * memory:6.1f}  " + "  ".join(cells))
    return lines


def _in_short(of: dict[str, Any]) -> str:
    return f"{_quality(of)} @ {of['exit_layer']:.1f}, {100 * of['prefill_flops_share']:.0f}%"


def _quality(of: dict[str, Any]) -> str:
    known = of["accuracy"] is not None
    return f"{'' if known else '~'}{100 * of['accuracy' if known else 'same_answer']:.1f}"


def evaluation_html(result: dict[str, Any]) -> str:
    """The report of an evaluation."""
    return page("dyvte_eval.html", _choices(result), result=result, quality=_quality)


def _choices(result: dict[str, Any]) -> dict[str, Draw]:
    kinds = {
        "VTW": [row for row in result["rows"] if not row["way"].startswith("gates")],
        "gates": [row for row in result["rows"] if row["way"].startswith("gates")],
    }

    def against(share: str, label: str) -> Draw:
        def draw(axes: Axes) -> None:
            for marker, (kind, rows) in zip(MARKERS, kinds.items(), strict=False):
                points = sorted((100 * row["all"][share], 100 * row["all"]["same_answer"]) for row in rows)
                axes.plot(*zip(*points, strict=True), f"{marker}-", label=kind)
            axes.set_xlabel(label)
            axes.set_ylabel("answers that are the full model's (%)")

        return draw

    def exits(axes: Axes) -> None:
        for marker, task in zip(MARKERS * len(result["tasks"]), result["tasks"], strict=False):
            axes.plot(
                [row["way"].removeprefix("gates, t = ").removeprefix("gates of ") for row in kinds["gates"]],
                [row["tasks"][task]["exit_layer"] for row in kinds["gates"]],
                f"{marker}-",
                label=task,
            )
        axes.set_xlabel("threshold")
        axes.set_ylabel("mean layer of exit")

    return {
        "Quality against work": against("prefill_flops_share", "decoder's work in prefill (% of stock vLLM)"),
        "Quality against memory": against("kv_share", "KV memory (% of stock vLLM)"),
        "When visual tokens leave": exits,
    }

# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vllm-vtw project
"""The reports of `vtw dyvte train` and `vtw dyvte eval`."""

from collections.abc import Collection
from typing import Any

from matplotlib.axes import Axes

from vllm_vtw.search.reports.data_notes import data_notes
from vllm_vtw.search.reports.page import MARKERS, Draw, label_layers, page, stock_shares, task_label


def notes(result: dict[str, Any], tasks_without_sample: Collection[str]) -> list[str]:
    """Returns what a reader of a training's report has to know in addition to the numbers.

    Args:
        result: The content of `result.json`.
        tasks_without_sample: The tasks of which no good sample was drawn.
    """
    said = []
    of_layers = zip(*result["may_leave"].values(), strict=True)
    same = {layer: {*shares} for layer, shares in zip(result["layers"], of_layers, strict=True)}
    for share, what in ((0.0, "never"), (1.0, "always")):
        layers = [str(layer) for layer, shares in same.items() if shares == {share}]
        if layers:
            said.append(
                f"At layer {', '.join(layers)} the visual tokens of these samples may {what} leave, so a "
                "gate there learns nothing else. Other --layers may be better."
            )
    right = zip(result["curves"][-1]["held_out_accuracy"], result["held_out_may_leave"], strict=True)
    useless = [
        str(layer)
        for layer, (of_gate, leaving) in zip(result["layers"], right, strict=True)
        if of_gate <= max(leaving, 1 - leaving) < 1
    ]
    if useless:
        said.append(
            f"At layer {', '.join(useless)} the gate is right about no more of the {result['held_out']} "
            "held-out samples than if it always decided the same. More samples (--limit) or more --epochs "
            "may help."
        )
    return said + data_notes(result, None, tasks_without_sample)


def notes_of_evaluation(
    result: dict[str, Any], tasks_without_sample: Collection[str], trained_on_this_data: bool
) -> list[str]:
    """Returns what a reader of an evaluation's report has to know in addition to the numbers.

    Args:
        result: The content of `result.json`.
        tasks_without_sample: The tasks of which no good sample was drawn.
        trained_on_this_data: Whether the gates were trained on the data that they are evaluated on.
    """
    said = ["To serve another threshold, write it for every layer into 'thresholds' of the policy file."]
    if trained_on_this_data:
        said.append("The gates were trained on this data: on other data they may do worse.")
    return said + data_notes(result, None, tasks_without_sample)


def table(result: dict[str, Any]) -> list[str]:
    """Returns the lines of a table that shows the result of a training."""
    last = result["curves"][-1]
    tasks = list(result["may_leave"])
    width = max(5, *map(len, tasks))
    heads = "".join(f"  {task:>{width}}" for task in tasks)
    lines = [
        f"{result['made']['samples']} samples, of which {result['held_out']} were held out of training. All "
        "numbers are in percent.",
        "by task: samples whose visual tokens may leave before the layer",
        "right: held-out samples that the layer's gate is right about",
        "always the same: held-out samples that it would be right about if it always decided the same",
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
    """Renders the report of a training to HTML.

    Args:
        result: The content of `result.json`.
        command: The command that serves a model with the gates. None if there is none.
    """
    layers, right = result["layers"], result["curves"][-1]["held_out_accuracy"]
    worst = layers[right.index(min(right))]
    price = [
        (f"{min(right):.1%}", f"of held-out samples: right at the worst gate, layer {worst}"),
        (
            f"{result['held_out_may_leave'][-1]:.1%}",
            f"of held-out samples: visual tokens may leave at the last gate, layer {layers[-1]}",
        ),
    ]
    choice = f"Gates at layers {', '.join(map(str, layers))} of {result['model']['num_hidden_layers']}"
    return page("dyvte.html", result, choice, price, _training_plots(result), command=command)


def _training_plots(result: dict[str, Any]) -> dict[str, Draw]:
    layers, curves = result["layers"], result["curves"]
    epochs = range(1, len(curves) + 1)

    def over_epochs(name: str, label: str, unit: float = 1) -> Draw:
        def draw(axes: Axes) -> None:
            for at, layer in enumerate(layers):
                axes.plot(epochs, [curve[name][at] / unit for curve in curves], label=f"layer {layer}")
            axes.set_ylabel(label)
            label_layers(axes, "epoch")

        return draw

    def leaving(axes: Axes) -> None:
        for marker, (task, shares) in zip(MARKERS * len(layers), result["may_leave"].items(), strict=False):
            axes.plot(layers, [100 * share for share in shares], f"{marker}-", label=task_label(task))
        axes.set_ylabel("samples (%)")
        label_layers(axes, "layer, counted from 0")

    return {
        "Loss on training samples": over_epochs("loss", "cross-entropy, nats"),
        "Loss on held-out samples": over_epochs("held_out_loss", "cross-entropy, nats"),
        "Held-out samples that a gate is right about": over_epochs("held_out_accuracy", "samples (%)", 0.01),
        "Samples whose visual tokens may leave": leaving,
    }


def evaluation_table(result: dict[str, Any]) -> list[str]:
    """Returns the lines of a table that shows the result of an evaluation."""
    rows = result["rows"]
    tasks = list(rows[0]["tasks"])
    heads = [f"{head:>{max(18, len(head))}}" for head in (*tasks, "all")]
    width = max(len(row["way"]) for row in rows)
    lines = [
        f"{result['made']['samples']} samples, {result['model']['num_hidden_layers']} layers.",
        "KV: KV memory, in percent of stock vLLM's",
        "by task: right answers in percent @ mean exit layer, prefill work in percent of stock vLLM's",
        "~: the data has no known answers; answers that are the same as the full model's, in percent",
        "",
        f"{'':{width}}      KV  " + "  ".join(heads),
    ]
    for row in rows:
        values = [_in_short(means) for means in (*row["tasks"].values(), row["all"])]
        cells = [value.rjust(len(head)) for value, head in zip(values, heads, strict=True)]
        memory = row["all"]["kv_share"]
        lines.append(f"{row['way']:{width}}  {100 * memory:6.1f}  " + "  ".join(cells))
    return lines


def _in_short(means: dict[str, Any]) -> str:
    """A cell of the table, such as "95.0 @ 8.0, 72%"."""
    return f"{_quality(means)} @ {means['exit_layer']:.1f}, {100 * means['prefill_flops_share']:.0f}%"


def _quality(means: dict[str, Any]) -> str:
    """The right answers in percent. If the data has none, the answers that stay the same, marked with "~"."""
    known = means["accuracy"] is not None
    return f"{'' if known else '~'}{100 * means['accuracy' if known else 'same_answer']:.1f}"


def evaluation_html(result: dict[str, Any]) -> str:
    """Renders the report of an evaluation to HTML.

    Args:
        result: The content of `result.json`.
    """
    rows = {row["way"]: row["all"] for row in result["rows"]}
    found, full = rows["gates of the policy"], rows["full model"]
    price = [(f"{1 - found['same_answer']:.1%}", "of answers change")]
    if found["accuracy"] is not None:
        right = f"of answers are right, and {full['accuracy']:.1%} without gates"
        price.append((f"{found['accuracy']:.1%}", right))
    price += stock_shares(found)
    leave = f"{found['exit_layer']:.1f} of {result['model']['num_hidden_layers']} on average"
    choice = f"The gates let visual tokens leave at layer {leave}"
    return page("dyvte_eval.html", result, choice, price, _evaluation_plots(result), quality=_quality)


def _evaluation_plots(result: dict[str, Any]) -> dict[str, Draw]:
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
            axes.set_ylabel("same answers (%)")

        return draw

    def exits(axes: Axes) -> None:
        for marker, task in zip(MARKERS * len(result["tasks"]), result["tasks"], strict=False):
            axes.plot(
                [row["way"].removeprefix("gates, t = ").removeprefix("gates of ") for row in kinds["gates"]],
                [row["tasks"][task]["exit_layer"] for row in kinds["gates"]],
                f"{marker}-",
                label=task_label(task),
            )
        axes.set_xlabel("threshold")
        axes.set_ylabel("mean exit layer")

    return {
        "Quality against work": against("prefill_flops_share", "decoder's prefill work (% of stock vLLM)"),
        "Quality against memory": against("kv_share", "KV memory (% of stock vLLM)"),
        "When visual tokens leave": exits,
    }

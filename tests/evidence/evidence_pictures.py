"""The two pictures of tests/evidence/evidence.py, with matplotlib: loss.png and rules.png."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evidence_rules import RULES, Measure, Row, change_points, grouped

MARKS = {"verifier-0": "o", "verifier-50": "s", "verifier": "X"}            # others: a triangle
COLOURS = {"bar": "tab:blue", "count": "tab:green", "red": "tab:red"}


def draw(rows: Sequence[Row], folder: Path) -> None:
    """loss.png and rules.png; raises ModuleNotFoundError without matplotlib."""
    import matplotlib
    matplotlib.use("Agg")
    draw_losses(rows, folder / "loss.png")
    draw_rules(rows, folder / "rules.png")


def draw_losses(rows: Sequence[Row], path: Path) -> None:
    """The loss at the first step and at the end above the change in accuracy, runs in the order of that change."""
    from matplotlib import pyplot
    trained = [row for row in rows if row["loss_first"] is not None]
    trained.sort(key=lambda row: row["change"][0])
    order = {id(row): place for place, row in enumerate(trained)}

    def place(row: Row) -> float:
        return order[id(row)]
    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(8, 5.5), sharex=True, layout="constrained")
    upper.plot([row["loss_first"] for row in trained], color="grey", label="first step")
    scatter(upper, trained, place, lambda row: row["loss_last"])
    scatter(lower, trained, place, change_points)
    lower.axhline(0, color="grey", linewidth=0.8)
    upper.set(title="DPO loss at the first step (line) and at the end (marks)", ylabel="loss")
    lower.set(title="change in held-out accuracy", ylabel="points", xlabel="runs, by the change")
    finish(figure, lower, path)


def draw_rules(rows: Sequence[Row], path: Path) -> None:
    """The change in accuracy over each rule's measure."""
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(1, len(RULES), figsize=(12, 4.6), sharey=True, layout="constrained")
    for axis, (rule, (words, measure)) in zip(axes, RULES.items(), strict=True):
        scatter(axis, rows, measure, change_points)
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.axvline(0, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=rule + " (lets through what is right of the dotted line)", xlabel=words)
        axis.title.set_size("small")
    axes[0].set_ylabel("change in held-out accuracy, points")
    finish(figure, axes[0], path)


def scatter(axis: Any, rows: Sequence[Row], x: Measure, y: Measure) -> None:
    """One point a run: its task by colour, its verifier by shape."""
    for (task, verifier), runs in grouped(rows, "task", "verifier").items():
        axis.scatter(
            [x(row) for row in runs],
            [y(row) for row in runs],
            s=16,
            alpha=0.6,
            linewidths=0,
            color=COLOURS.get(task),
            marker=MARKS.get(verifier, "^"),
            label=f"{task}, {verifier}")


def finish(figure: Any, axis: Any, path: Path) -> None:
    """A legend below, and the file."""
    from matplotlib import pyplot
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=5, frameon=False, fontsize="small")
    figure.savefig(path, dpi=90, metadata={"Software": None})
    pyplot.close(figure)

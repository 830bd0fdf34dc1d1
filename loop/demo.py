"""The demo: one task that the verifier understands, one that it does not; its table and its picture.

    python -m loop.demo runs/demo           print both again from a finished demo
"""
from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from loop.flags import TrainingFlags
from loop.ranks import Ranks

EXPECTED = {"bar": ("PASS", "PROMOTE"), "red": ("BLOCK", "REJECT")}     # task -> gate before, gate after
TITLES = {"bar": "the verifier understands it", "red": "the verifier does not understand it"}
SMOOTHED = 5                                            # steps that a point of the loss curve is the mean of

C = TypeVar("C", bound=TrainingFlags)
Points = list[tuple[int, float]]                        # (step, value)


# ---- running

def run(main: Callable[[C, Ranks], int], cfg: C, ranks: Ranks) -> int:
    """The ordinary run on both tasks; on red with --force, since its gate says BLOCK.

    `main` is train.py's. An earlier demo is replaced. Returns 0 if both tasks went as EXPECTED, else 1.
    """
    folder = Path(cfg.out or "runs/demo")
    if cfg.out and ranks.any(folder.exists()):
        raise FileExistsError(f"{folder} exists; choose another --out")

    with replaced(folder, ranks):
        for task in EXPECTED:
            if ranks.first:
                print(f"\n== {task}", flush=True)
            flags = replace(cfg, task=task, out=str(folder / task), force=task == "red")
            main(flags, ranks)
    return report(folder) if ranks.first else 0


@contextmanager
def replaced(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Inside, `folder` is out of the way. It comes back if no new one was made: a wrong flag costs nobody a demo."""
    earlier = folder.with_name(f".{folder.name}.before")
    if ranks.first and folder.exists():
        shutil.rmtree(earlier, ignore_errors=True)
        os.replace(folder, earlier)
    ranks.barrier()

    try:
        yield
    finally:
        if ranks.first and earlier.exists():
            if folder.exists():
                shutil.rmtree(earlier)
            else:
                os.replace(earlier, folder)


def report(folder: Path) -> int:
    """Print the table, write the picture; 0 if both tasks went as EXPECTED, else 1."""
    summaries = {}
    curves = {}
    verdicts = {}
    for task in EXPECTED:
        summary = json.loads((folder / task / "summary.json").read_text(encoding="utf-8"))
        post_gate = summary["post_gate"] or {}
        summaries[task] = summary
        curves[task] = read_curves(folder / task / "metrics.jsonl")
        verdicts[task] = (summary["pre_gate"]["verdict"], post_gate.get("verdict"))

    print("\n" + table(summaries))
    print(f"picture: {draw(curves, folder)}")
    return 0 if verdicts == EXPECTED else 1


# ---- the table

HEAD = ("task", "frozen baseline", "agreement", "(candidates)", "own answers", "(student)", "published rule",
        "gate before", "loss first", "last", "final accuracy", "gate after")


def table(summaries: Mapping[str, dict[str, Any]]) -> str:
    """One row a task: what was measured before, what the loss did, what was measured after."""
    rows = [HEAD]
    for task, summary in summaries.items():
        before = summary["pre_gate"]
        after = summary["post_gate"] or {}
        rows.append((
            task,
            decimals(summary["baseline_accuracy"]),
            decimals(before["rubric_accuracy"]),
            decimals(before["baseline_accuracy"]),
            decimals(before["own_answer_accuracy"]),
            decimals(before["greedy_accuracy"]),
            before["published_verdict"],
            before["verdict"],
            decimals(summary["loss_first"]),
            decimals(summary["loss_last"]),
            decimals(summary["final_accuracy"]),
            after.get("verdict", "-"),
        ))

    columns = zip(*rows, strict=True)
    widths = [max(len(cell) for cell in column) for column in columns]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def decimals(figure: dict[str, Any] | float | None) -> str:
    """A figure's value, or a number, with three decimals; "-" where there is none."""
    value = figure["value"] if isinstance(figure, dict) else figure
    return "-" if value is None else f"{value:.3f}"


# ---- the picture

@dataclass
class Curves:
    """What metrics.jsonl holds of a run that is drawn."""
    loss: Points
    accuracy: Points                                    # on the watch split
    round_starts: list[int]                             # the first step of each round


def read_curves(path: Path) -> Curves:
    """The curves of a run; empty ones where a gate said no and nothing was trained."""
    curves = Curves([], [], [])
    if not path.is_file():
        return curves

    rounds = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if "loss" in row:
            curves.loss.append((row["step"], row["loss"]))
        if "eval/accuracy" in row:
            curves.accuracy.append((row["step"], row["eval/accuracy"]))
        if "round" in row and row["round"] not in rounds:
            rounds.add(row["round"])
            curves.round_starts.append(row["step"])
    return curves


def draw(curves: Mapping[str, Curves], folder: Path) -> Path:
    """demo.png with matplotlib where it is installed, else demo.txt, which is printed as well."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        text = "\n\n".join(text_plot(task, lines) for task, lines in curves.items())
        print(f"\n{text}\n(pip install matplotlib draws this as a picture)")
        path = folder / "demo.txt"
        path.write_text(text + "\n", encoding="utf-8")
        return path
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(curves), figsize=(10, 3.8), sharey=True)
    for panel, (task, lines) in zip(panels, curves.items(), strict=True):
        right = panel.twinx()
        panel.plot(*columns(smooth(lines.loss)), color="grey", label=f"DPO loss (mean of {SMOOTHED} steps)")
        right.plot(*columns(lines.accuracy), marker="o", color="tab:blue", label="watched accuracy")
        for step in lines.round_starts[1:]:
            panel.axvline(step, color="lightgrey", linestyle=":")

        panel.set_title(f"{task}: {TITLES[task]}")
        panel.set(xlabel="step (dotted: a new round, new pairs)", ylabel="loss")
        right.set_ylabel("accuracy")
        right.set_ylim(0, 1)

    legend = [axis.get_legend_handles_labels()[0][0] for axis in (panel, right)]
    figure.legend(handles=legend, loc="lower center", ncol=2, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    path = folder / "demo.png"
    figure.savefig(path, dpi=110)
    return path


def columns(points: Points) -> tuple[list[int], list[float]]:
    """Steps and values of a curve."""
    return [step for step, _ in points], [value for _, value in points]


def smooth(points: Points, width: int = SMOOTHED) -> Points:
    """The running mean of the last `width` values, of fewer at the beginning."""
    smoothed = []
    for end, (step, _) in enumerate(points, 1):
        window = points[max(0, end - width):end]
        total = sum(value for _, value in window)
        smoothed.append((step, total / len(window)))
    return smoothed


def text_plot(task: str, lines: Curves, width: int = 60, height: int = 12) -> str:
    """Both curves in characters, each from its lowest to its highest value: l the loss, A the accuracy."""
    named = [("l", "DPO loss", smooth(lines.loss)), ("A", "accuracy", lines.accuracy)]
    steps = [step for step, _ in lines.loss + lines.accuracy]
    last_step = max(steps, default=0) or 1

    grid = [[" "] * width for _ in range(height)]
    notes = []
    for mark, name, points in named:
        if not points:                                  # every round was skipped: there is no loss
            continue
        values = [value for _, value in points]
        low = min(values)
        high = max(values)
        spread = (high - low) or 1
        for step, value in points:
            row = round((high - value) / spread * (height - 1))
            column = round(step / last_step * (width - 1))
            grid[row][column] = mark
        notes.append(f"{mark} {name} {values[0]:.3f} -> {values[-1]:.3f} (drawn from {low:.3f} to {high:.3f})")

    drawn = ["|" + "".join(row) for row in grid]
    return "\n".join([task, *drawn, "+" + "-" * width, *notes])


if __name__ == "__main__":
    sys.exit(report(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")))

"""The demo's table and picture: the loss falls on both tasks, the accuracy on one.

    python -m loop.demo runs/demo          print them again from a finished demo
"""
from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

EXPECTED = {"bar": ("PASS", "PROMOTE"), "red": ("BLOCK", "REJECT")}


def run(main: Callable[[Any, Any], int], cfg: Any, ranks: Any) -> int:
    """The ordinary run on a task that the verifier understands and, forced, on one that it does not.

    `main(cfg, ranks)` is train.py's. Replaces an earlier demo. 0 if both tasks went as EXPECTED, else 1.
    """
    folder = Path(cfg.out or "runs/demo")
    if cfg.out and ranks.any(folder.exists()):
        raise FileExistsError(f"{folder} exists; choose another --out")
    with replaced(folder, ranks):
        for task in EXPECTED:
            if ranks.first:
                print(f"\n== {task}", flush=True)
            main(replace(cfg, task=task, out=str(folder / task), force=task == "red"), ranks)
    return report(folder) if ranks.first else 0


@contextmanager
def replaced(folder: Path, ranks: Any) -> Iterator[None]:
    """Inside, `folder` is out of the way. It comes back if no new one was made: a wrong flag costs nobody a demo."""
    before = folder.with_name(f".{folder.name}.before")
    if ranks.first and folder.exists():
        shutil.rmtree(before, ignore_errors=True)
        os.replace(folder, before)
    ranks.barrier()
    try:
        yield
    finally:
        if ranks.first and before.exists():
            if folder.exists():
                shutil.rmtree(before)
            else:
                os.replace(before, folder)


def report(folder: Path) -> int:
    """Print the table, write the picture; 0 if both tasks went as EXPECTED, else 1."""
    summaries = {task: json.loads((folder / task / "summary.json").read_text(encoding="utf-8")) for task in EXPECTED}
    print("\n" + table(summaries))
    curves = {task: read_curves(folder / task / "metrics.jsonl") for task in EXPECTED}
    print(f"picture: {draw(curves, folder)}")
    verdicts = {t: (s["pre_gate"]["verdict"], (s["post_gate"] or {}).get("verdict")) for t, s in summaries.items()}
    return 0 if verdicts == EXPECTED else 1


def table(summaries: dict[str, dict[str, Any]]) -> str:
    """One row a task: what was measured before, what the loss did, what was measured after."""
    def figure(value: dict[str, Any] | None) -> str:
        return "-" if value is None else f"{value['value']:.3f}"

    def loss(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"
    head = ("task", "frozen baseline", "agreement", "(candidates)", "own answers", "(student)", "published rule",
            "gate before", "loss first", "last", "final accuracy", "gate after")
    rows = [head]
    for task, s in summaries.items():
        pre, post = s["pre_gate"], s["post_gate"] or {}
        measured = ("rubric_accuracy", "baseline_accuracy", "own_answer_accuracy", "greedy_accuracy")
        rows.append((task, figure(s["baseline_accuracy"]), *(figure(pre[name]) for name in measured),
                     pre["published_verdict"], pre["verdict"], loss(s["loss_first"]), loss(s["loss_last"]),
                     figure(s["final_accuracy"]), post.get("verdict", "-")))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of the loss and of the watched accuracy, and (first step, number) of the rounds."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []     # none where a gate said no
    rows = [json.loads(line) for line in lines]
    curves = {name: [(r["step"], r[name]) for r in rows if name in r] for name in ("loss", "eval/accuracy")}
    first = {r["round"]: r["step"] for r in reversed(rows) if "round" in r}
    return curves | {"rounds": sorted((step, number) for number, step in first.items())}


def draw(curves: dict[str, dict[str, list[tuple[int, float]]]], folder: Path) -> Path:
    """demo.png with matplotlib where it is installed, else demo.txt, which is printed as well."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        path, text = folder / "demo.txt", "\n\n".join(text_plot(task, lines) for task, lines in curves.items())
        print(f"\n{text}\n(pip install matplotlib draws this as a picture)")
        path.write_text(text + "\n", encoding="utf-8")
        return path
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, panels = pyplot.subplots(1, len(curves), figsize=(10, 3.8), sharey=True)
    for panel, (task, lines) in zip(panels, curves.items()):
        right = panel.twinx()
        for axis, line, mark, colour, label in (
                (panel, smooth(lines["loss"]), "", "grey", "DPO loss (mean of 5 steps)"),
                (right, lines["eval/accuracy"], "o", "tab:blue", "watched accuracy")):
            axis.plot([step for step, _ in line], [v for _, v in line], marker=mark, color=colour, label=label)
        for step, _ in lines["rounds"][1:]:
            panel.axvline(step, color="lightgrey", linestyle=":")
        right.set_ylim(0, 1)
        panel.set_title(f"{task}: the verifier " + ("does not understand it" if task == "red" else "understands it"))
        panel.set(xlabel="step (dotted: a new round, new pairs)", ylabel="loss")
        right.set_ylabel("accuracy")
    handles = [axis.get_legend_handles_labels()[0][0] for axis in (panel, right)]
    figure.legend(handles=handles, loc="lower center", ncol=2, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(folder / "demo.png", dpi=110)
    return folder / "demo.png"


def smooth(points: list[tuple[int, float]], width: int = 5) -> list[tuple[int, float]]:
    """Running mean of the last `width` values."""
    return [(step, sum(v for _, v in points[max(0, i + 1 - width):i + 1]) / min(width, i + 1))
            for i, (step, _) in enumerate(points)]


def text_plot(task: str, lines: dict[str, list[tuple[int, float]]], width: int = 60, height: int = 12) -> str:
    """Both curves in characters, each from its lowest to its highest value: l the loss, A the accuracy."""
    grid = [[" "] * width for _ in range(height)]
    named = (("l", "DPO loss", smooth(lines["loss"])), ("A", "accuracy", lines["eval/accuracy"]))
    last, notes = max((step for *_, points in named for step, _ in points), default=0) or 1, []
    for mark, name, points in named:
        if not points:                                  # every round was skipped: there is no loss
            continue
        low, high = min(v for _, v in points), max(v for _, v in points)
        for step, value in points:
            row = (high - value) / (high - low or 1)
            grid[round(row * (height - 1))][round(step / last * (width - 1))] = mark
        notes.append(f"{mark} {name} {points[0][1]:.3f} -> {points[-1][1]:.3f} (drawn from {low:.3f} to {high:.3f})")
    return "\n".join([task, *("|" + "".join(row) for row in grid), "+" + "-" * width, *notes])


if __name__ == "__main__":
    sys.exit(report(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")))

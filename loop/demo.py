"""The demo: one task that the verifier understands, one that it does not; its table and its picture.

    python -m loop.demo runs/demo           print both again from a finished demo
"""
from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from loop.flags import TrainingFlags
from loop.ranks import Ranks
from loop.run import first_or_none
from loop.run_files import LOCK, METRICS, SUMMARY, foreign_file, run_patterns
from model.settings import read_settings
from tasks.endings import say, say_last, status_of
from tasks.lock import Lock, take_lock

EXPECTED = {"bar": ("PASS", "PROMOTE"), "red": ("BLOCK", "REJECT")}     # task -> gate before, gate after
MEANINGS = {                                            # of what the gate after training said
    "PROMOTE": "The trained student is shown to answer better than the frozen one: it is deployed.",
    "REJECT": "The trained student is not shown to answer better, whatever its loss did, so nothing is deployed.",
    None: "The gate before training stopped the run, so nothing was trained.",
}
REPORT_FILES = ("demo.png", "demo.txt")
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

    with replaced(folder, tuple(EXPECTED), ranks):
        for task in EXPECTED:
            if ranks.first:
                say(f"\n== {task}")
            flags = replace(cfg, task=task, out=str(folder / task), force=task == "red")
            main(flags, ranks)
        return report(folder) if ranks.first else 0


@contextmanager
def replaced(folder: Path, runs: Sequence[str], ranks: Ranks) -> Iterator[None]:
    """Inside, a new demo is made in `folder`: its `runs`, in this order, "" for the folder itself.

    An earlier demo is out of the way meanwhile. It is removed when the new one is whole; until then whatever ends this
    process costs nobody a demo, for the earlier one comes back: now, or when the next demo starts. ValueError if
    another process makes this demo, or if `folder` holds what no demo has made.
    """
    earlier = folder.with_name(f".{folder.name}.before")
    held: list[Lock] = []

    def begin() -> None:
        held.append(take_lock(folder.with_name(f".{folder.name}.lock"), folder))
        check_demo(folder, runs)
        settle(folder, earlier, runs)
        if folder.exists():
            os.replace(folder, earlier)

    first_or_none(ranks, begin)
    try:
        yield
    finally:
        if ranks.first:
            settle(folder, earlier, runs)
            held.clear()


def check_demo(folder: Path, runs: Sequence[str]) -> None:
    """ValueError if `folder` holds what no demo has made, or one of its runs is in use: it is about to be removed."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder} is not a folder; remove it, or choose another --out")

    patterns = list(REPORT_FILES)
    for name in runs:
        patterns += [f"{name}/{pattern}".removeprefix("/") for pattern in run_patterns()]
        patterns += [f".{name}.*.new/{pattern}" for pattern in run_patterns()]  # killed before its folder had its name
    foreign = foreign_file(folder, patterns)
    if foreign is not None:
        raise ValueError(f"{folder} holds {foreign}, which the demo did not make and would remove; move it away, or "
                         "choose another --out")

    for name in runs:
        if (folder / name).is_dir():
            take_lock(folder / name / LOCK, folder / name)      # and let go of it again


def settle(folder: Path, earlier: Path, runs: Sequence[str]) -> None:
    """Of a demo and an earlier one, keep the new one if its last run is finished, else put the earlier one back."""
    if not earlier.exists():
        return
    if (folder / runs[-1] / SUMMARY).exists():
        shutil.rmtree(earlier)
        return
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(earlier, folder)


# ---- the report

def report(folder: Path) -> int:
    """Print the table, draw the picture, say what happened; 0 if both tasks went as EXPECTED, else 1."""
    summaries = {}
    curves = {}
    for task in EXPECTED:
        summaries[task] = read_settings(folder / task, SUMMARY)
        curves[task] = read_curves(folder / task / METRICS)

    say("\n" + table(summaries))
    picture = draw(curves, folder)
    say(f"picture: {picture}")
    say("\n" + conclusion(summaries, folder, picture))
    verdicts = {task: gate_verdicts(summary) for task, summary in summaries.items()}
    return 0 if verdicts == EXPECTED else 1


def gate_verdicts(summary: Mapping[str, Any]) -> tuple[str, str | None]:
    """What the gates before and after training said; None for one that was not reached."""
    post_gate = summary["post_gate"] or {}
    return summary["pre_gate"]["verdict"], post_gate.get("verdict")


def conclusion(summaries: Mapping[str, dict[str, Any]], folder: Path, picture: Path) -> str:
    """What just happened, in words: each task's verdicts and what they mean, and where to read on."""
    lines = []
    as_expected = []
    for task, summary in summaries.items():
        verdicts = gate_verdicts(summary)
        before, after = verdicts
        as_expected.append(verdicts == EXPECTED[task])
        told = "as it should be"
        if verdicts != EXPECTED[task]:
            told = "expected were {} and {}".format(*EXPECTED[task])
        lines.append(f"- {task} ({TITLES[task]}): {before} before training, {after or 'no gate'} after it, {told}. "
                     f"{MEANINGS[after]}")

    head = "Both tasks went as they should:"
    if not all(as_expected):
        head = f"{as_expected.count(False)} of {len(as_expected)} tasks did not go as they should:"
    places = f"Both runs are in {folder}, the picture is {picture}. `python -m loop.demo {folder}` says all this again."
    return "\n".join([head, *lines, places])


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
        say(f"\n{text}\n(pip install matplotlib draws this as a picture)")
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


def main(folder: str = "runs/demo") -> int:
    """Print a finished demo's report again; returns the exit status."""
    try:
        return report(Path(folder))
    except OSError as error:                            # the picture cannot be written
        say_last("loop.demo", str(error))
        return status_of(error)
    except (ValueError, LookupError, TypeError, AttributeError) as error:       # its files hold something else
        say_last("loop.demo", f"{folder} is not a finished demo: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))

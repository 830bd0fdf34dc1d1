"""The demo: one task that the verifier understands, one that it does not; its table and its page.

    python -m loop.demo runs/demo           make both again from a finished demo
"""
from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from loop.flags import TrainingFlags
from loop.ranks import Ranks
from loop.report.candidates import read_object, read_rows
from loop.report.charts import Panels
from loop.report.page import PAGE, Page, Section, Table, leave_page
from loop.report.rows import Room
from loop.report.training import CURVES_SAY, curve_panels, load_items, training_sections
from loop.run import first_or_none
from loop.run_files import LOCK, METRICS, SUMMARY, foreign_file, run_patterns
from model.settings import read_settings
from tasks.endings import say, say_last
from tasks.lock import Lock, take_lock

EXPECTED = {"bar": ("PASS", "PROMOTE"), "red": ("BLOCK", "REJECT")}     # task -> gate before, gate after
MEANINGS = {                                            # of what the gate after training said
    "PROMOTE": "The trained student is shown to answer better than the frozen one: it is deployed.",
    "REJECT": "The trained student is not shown to answer better, whatever its loss did, so nothing is deployed.",
    None: "The gate before training stopped the run, so nothing was trained.",
}
REPORT_FILES = (PAGE, f"{PAGE}.*.tmp", "demo.png", "demo.txt")      # the last two: of a demo of earlier versions
TITLES = {"bar": "the verifier understands it", "red": "the verifier does not understand it"}

C = TypeVar("C", bound=TrainingFlags)


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
    """Print the table, say what happened, leave the page; 0 if both tasks went as EXPECTED, else 1."""
    summaries = {task: read_settings(folder / task, SUMMARY) for task in EXPECTED}
    say("\n" + table(summaries))
    say("\n" + "\n".join(conclusion(summaries)))
    say(f"Both runs are in {folder}. `python -m loop.demo {folder}` says all this again.")
    leave_page(folder / PAGE, lambda: demo_page(folder, summaries))
    verdicts = {task: gate_verdicts(summary) for task, summary in summaries.items()}
    return 0 if verdicts == EXPECTED else 1


def gate_verdicts(summary: Mapping[str, Any]) -> tuple[str, str | None]:
    """What the gates before and after training said; None for one that was not reached."""
    post_gate = summary["post_gate"] or {}
    return summary["pre_gate"]["verdict"], post_gate.get("verdict")


def conclusion(summaries: Mapping[str, dict[str, Any]]) -> list[str]:
    """What just happened, in words: a head, then each task's verdicts and what they mean."""
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
    return [head, *lines]


# ---- the table

HEAD = ("task", "frozen baseline", "agreement", "(candidates)", "own answers", "(student)", "published rule",
        "gate before", "loss first", "last", "final accuracy", "gate after")


def table_rows(summaries: Mapping[str, dict[str, Any]]) -> list[Sequence[str]]:
    """One row a task: what was measured before, what the loss did, what was measured after."""
    rows = []
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
    return rows


def table(summaries: Mapping[str, dict[str, Any]]) -> str:
    """The table as text."""
    rows = [HEAD, *table_rows(summaries)]
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


# ---- the page

def demo_page(folder: Path, summaries: Mapping[str, dict[str, Any]]) -> Page:
    """One page over both tasks: the table, the curves beside each other, then all of each run."""
    head, *told = conclusion(summaries)
    as_expected = head.startswith("Both")
    lead = head.removesuffix(":") + "."
    if as_expected:
        lead += (" Where the verifier understands the task the student improves; where it does not, the loss falls all "
                 "the same while the answers get worse.")
    accuracies = []
    losses = []
    parts = []
    for task, words in zip(summaries, told, strict=True):
        settings = read_object(folder / task / "config.json")
        panels = curve_panels(read_rows(folder / task / METRICS), settings, f"{task}:").panels
        accuracies += panels[:1]
        losses += panels[1:]
        items = load_items(settings) if settings else {}
        parts.append(Section(f"{task}: {TITLES[task]}", words.removeprefix("- "), level=1))
        parts += training_sections(folder / task, items, Room().shared(len(summaries)), curves=False)

    table_block = Table(HEAD, table_rows(summaries))
    return Page(
        title="Verifier-guided DPO: one task works, one fails silently",
        program=f"train.py, the demo, {folder}",
        tone="good" if as_expected else "bad",
        lead=lead,
        sections=[
            Section("Both tasks", blocks=[table_block]),
            Section("What the loss hides", CURVES_SAY, [Panels(accuracies + losses, "")]),
            *parts,
        ],
    )


def main(folder: str = "runs/demo") -> int:
    """Print a finished demo's report again; returns the exit status."""
    try:
        return report(Path(folder))
    except (ValueError, LookupError, TypeError, AttributeError) as error:       # its files hold something else
        say_last("loop.demo", f"{folder} is not a finished demo: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))

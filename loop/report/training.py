"""The page of a run of train.py, made from what lies in its folder; its items give the questions and pictures."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

from eval import load_task
from gate import proportion
from loop.report.candidates import (
    Items,
    candidates_section,
    read_candidates,
    read_gate_candidates,
    read_object,
    read_rows,
)
from loop.report.charts import Curve, Intervals, Panels, intervals, panel, read_log, smooth
from loop.report.gating import DIFFERENCES, FIGURES, MEASURES_SAY, direction_by_margin
from loop.report.page import PAGE, Notes, Page, Section, Table, Tile, Tiles, Verdict, Verdicts, leave_page
from loop.report.rows import Answered, Room, Row, cut, fill, picture_views, question_of, truth_of
from tasks import Item
from tasks.endings import say
from tasks.preferences import load_preferences
from tasks.splits import Splits, by_id

AFTER_FIGURES = {                                       # of the gate after it
    "baseline_accuracy": "held out, frozen student",
    "final_accuracy": "held out, trained student",
    "difference": "held out, change",
}
LN_2 = 0.6931
DEMO_TASKS = ("bar", "red")                             # of a run that names none: the judge's demo


# ---- reading the folder

def load_items(settings: Mapping[str, Any]) -> dict[str, Item]:
    """The task's items by id; none, and a sentence, where they cannot be read."""
    items: list[Item] = []
    pairs = settings.get("pairs")
    tasks = [settings["task"]] if settings["task"] else DEMO_TASKS
    try:
        if pairs:
            items += load_preferences(pairs)
            tasks = tasks if settings["task"] else []
        for task in tasks:
            items += load_task(task, settings["data"], settings["split"])
        if settings["train_split"]:
            items += load_task(settings["task"], settings["data"], settings["train_split"])
    except (OSError, ValueError, ModuleNotFoundError) as error:
        say(f"without questions and pictures: {error}")
    return {item.id: item for item in items}


# ---- the page

def leave_training_page(folder: Path, splits: Splits) -> None:
    """Write the page of a run that has ended, and name it."""
    items = dict(by_id(splits.all_items))
    leave_page(folder / PAGE, lambda: training_page(folder, items))


def training_page(folder: Path, items: Items) -> Page:
    """The page of a run; of one that has not ended, as far as it came."""
    summary = read_object(folder / "summary.json")
    settings = read_object(folder / "config.json")
    word, tone, lead = outcome(summary)
    return Page(
        title=f"{settings['task'] or 'Pairs that exist'}: {word}",
        program=f"train.py, {folder}",
        tone=tone,
        lead=lead,
        sections=training_sections(folder, items, Room()),
    )


def outcome(summary: Mapping[str, Any]) -> tuple[str, str, str]:
    """How a run ended: in a word, as a tone of the page, in a sentence."""
    if not summary:
        return "not ended", "plain", "This run has not ended."
    post_gate = summary["post_gate"]
    if post_gate is None and summary["pre_gate"] is None:
        return "not measured", "plain", ("Nothing was measured (--no-evaluate), so nothing is deployed. The trained "
                                         "student is in candidate/.")
    if post_gate is None:
        return "blocked", "bad", ("The gate before training says that this verifier may not train this student, so "
                                  "nothing was trained.")
    if "difference" not in post_gate:
        return "stopped", "bad", ("The run was stopped on a warning while the student was trained, and nothing is "
                                  f"deployed. {post_gate['reasons'][-1]}")

    before, after = summary["baseline_accuracy"], summary["final_accuracy"]
    moved = f"Held-out accuracy went from {before['value']:.3f} to {after['value']:.3f}"
    if summary["loss_first"] is not None:
        moved += f", while the DPO loss went from {summary['loss_first']:.3f} to {summary['loss_last']:.3f}"
    if post_gate["verdict"] == "PROMOTE":
        return "promoted", "good", f"{moved}. A gain is shown, so the trained student is deployed."
    return "rejected", "bad", f"{moved}. No gain is shown, so nothing is deployed."


def training_sections(folder: Path, items: Items, room: Room, curves: bool = True) -> list[Section]:
    """Verdicts, figures, curves and tables of a run. `room` is what its two tables may take together."""
    summary = read_object(folder / "summary.json")
    settings = read_object(folder / "config.json")
    log = read_rows(folder / "metrics.jsonl")
    part = room.shared(2)

    sections = [Section("What the gates say", blocks=[
        verdicts(summary),
        tiles(summary, log),
        Notes(summary.get("warnings", []), f"{len(summary.get('warnings', []))} warnings"),
    ])]
    if curves and log:
        sections.append(Section("What the loss hides", CURVES_SAY, [curve_panels(log, settings)]))
    sections.append(Section("What was measured", MEASURES_SAY, measured(summary)))
    sections.append(pairs_section(folder, items, part))
    sections.append(held_out_section(folder, items, part))
    sections.append(Section("Settings", blocks=[settings_notes(settings)]))
    return [section for section in sections if section is not None]


CURVES_SAY = ("Greedy answers on the watch split by exact match, and the loss that is trained on. Dotted lines: a new "
              "round, new pairs.")


def verdicts(summary: Mapping[str, Any]) -> Verdicts | None:
    """What both gates said, as far as they were reached."""
    found = []
    for name, title in (("pre_gate", "Before training"), ("post_gate", "After training")):
        gate = summary.get(name)
        if gate:
            found.append(Verdict(title, gate["verdict"], gate["reasons"]))
    return Verdicts(found) if found else None


def tiles(summary: Mapping[str, Any], log: Sequence[Mapping[str, Any]]) -> Tiles | None:
    """The figures that are looked for first."""
    found = []
    for name, title in (("baseline_accuracy", "held out, frozen"), ("final_accuracy", "held out, trained")):
        figure = summary.get(name)
        if figure and figure["value"] is not None:
            found.append(Tile(title, f"{figure['value']:.3f}", f"{figure['low']:.3f} to {figure['high']:.3f}"))
    pre_gate = summary.get("pre_gate") or {}
    for name, title in (("rubric_accuracy", "agreement"), ("direction", "q")):
        figure = pre_gate.get(name)
        if figure and figure["value"] is not None:
            found.append(Tile(title, f"{figure['value']:.3f}", f"{figure['low']:.3f} to {figure['high']:.3f}"))
    if summary.get("steps"):
        pairs = sum(each["pairs"] for each in summary.get("rounds", []))
        found.append(Tile("steps", f"{summary['steps']:,}", f"{pairs:,} pairs in {len(summary['rounds'])} rounds"))
    return Tiles(found + speed_tiles(log)) if found else None


def speed_tiles(log: Sequence[Mapping[str, Any]]) -> list[Tile]:
    """How fast it went: medians over steps, and the most memory."""
    def known(name: str) -> list[float]:
        return [row[name] for row in log if row.get(name) is not None]

    found = []
    for name in ("pairs/s", "judgments/s"):
        if known(name):
            tokens = known("tokens/s")
            note = f"{median(tokens):,.0f} tokens/s" if tokens else ""
            found.append(Tile(name, f"{median(known(name)):.1f}", note))
    if known("peak_memory_gb"):
        share = median(known("preprocessing_share"))
        peak = max(known("peak_memory_gb"))
        found.append(Tile("peak memory", f"{peak:.1f} GB", f"preprocessing {share:.0%} of a step"))
    return found


def curve_panels(log: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], name: str = "") -> Panels:
    """Watched accuracy, and the loss."""
    curves = read_log(log)
    panels = []
    level = curves.accuracy[:1]
    if level and len(curves.accuracy) > 1:
        level = [level[0], (curves.accuracy[-1][0], level[0][1])]

    # The interval around the curve: the watch split's items are what the accuracy is a share of.
    band = []
    count = settings.get("watch_items")
    if count:
        for step, value in curves.accuracy:
            figure = proportion(round(value * count), count)
            band.append((step, figure["low"], figure["high"]))
    panels.append(panel(
        title=f"{name} watched accuracy".strip(),
        curves=[Curve("frozen student", "level", level), Curve("watched accuracy", "accuracy", curves.accuracy, True)],
        starts=curves.starts[1:], low=0.0, high=1.0, band=band))

    reference = []
    if curves.loss:
        reference = [(0, LN_2), (curves.loss[-1][0], LN_2)]
    panels.append(panel(
        title=f"{name} DPO loss".strip(),
        curves=[Curve("ln 2", "level", reference), Curve("each step", "faint", curves.loss),
                Curve("loss, mean of 5 steps", "loss", smooth(curves.loss))],
        starts=curves.starts[1:]))
    return Panels([each for each in panels if each is not None], "")


def measured(summary: Mapping[str, Any]) -> list[Intervals | None]:
    """Both gates' figures on one axis; q by margin, and by round."""
    pre_gate = summary.get("pre_gate") or {}
    figures = {label: pre_gate.get(name) for name, label in FIGURES.items()}
    post_gate = summary.get("post_gate") or {}
    for name, label in AFTER_FIGURES.items():
        figures[label] = post_gate.get(name)
    tones = dict.fromkeys(AFTER_FIGURES.values(), "after")
    both = intervals("Both gates", figures, 0.5, "The line stands at 1/2. Blue: after training.", tones,
                     (*DIFFERENCES, AFTER_FIGURES["difference"]))

    by_round = {}
    for each in summary.get("rounds", []):
        by_round[f"round {each['round']}, {each['pairs']:,} pairs"] = each["direction"]
    return [both, direction_by_margin(pre_gate),
            intervals("q by round, of what was trained on", by_round, 0.5)]


def settings_notes(settings: Mapping[str, Any]) -> Notes:
    """config.json, folded away."""
    lines = []
    for name, value in settings.items():
        lines.append(f"{name}: {cut(json.dumps(value, ensure_ascii=False))}")
    return Notes(lines, "config.json")


# ---- the tables

def pairs_section(folder: Path, items: Items, room: Room) -> Section | None:
    """The pairs that were trained on; of a run that the gate stopped, those that the gate looked at."""
    candidates = read_candidates(folder)
    title = "The pairs that the rounds formed"
    place = "candidates/ and pairs/"
    if not candidates:
        candidates = read_gate_candidates(folder)
        title = "The pairs that the gate looked at"
        place = "gate_records.jsonl"
    return candidates_section(candidates, items, room, title, place)


CHANGES = {                                             # (frozen right, trained right) -> what happened, its tone
    (True, False): ("right before, wrong now", "bad"),
    (False, True): ("wrong before, right now", "good"),
    (True, True): ("right both times", "plain"),
    (False, False): ("wrong both times", "plain"),
}


def held_out_section(folder: Path, items: Items, room: Room) -> Section | None:
    """What the frozen and the trained student answered to the held-out items, what changed first."""
    rows = read_rows(folder / "held_out.jsonl")
    if not rows:
        return None
    by_change: dict[tuple[bool, bool], list[dict[str, Any]]] = {change: [] for change in CHANGES}
    for row in rows:
        by_change[row["frozen"]["correct"], row["trained"]["correct"]].append(row)

    # Those that broke and those that were repaired take turns, so that both are seen.
    [broken, repaired, right, wrong] = by_change.values()
    order = []
    for pair in zip_longest(broken, repaired):
        order += [row for row in pair if row is not None]
    order += wrong + right

    counts = Table(
        head=["", "trained: right", "trained: wrong"],
        rows=[["frozen: right", f"{len(right):,}", f"{len(broken):,}"],
              ["frozen: wrong", f"{len(repaired):,}", f"{len(wrong):,}"]])
    shown = fill(room, order, lambda row: held_out_row(row, items.get(row["id"])), "held_out.jsonl")
    words = f"{len(rows):,} items that nothing was trained on, each answered greedily before and after."
    return Section("Frozen and trained answers, side by side", words, [counts, shown])


def held_out_row(row: Mapping[str, Any], item: Item | None) -> Row:
    """A held-out item with both answers."""
    answers = []
    for name in ("frozen", "trained"):
        answers.append(Answered(cut(row[name]["response"]), name, row[name]["correct"]))
    note, tone = CHANGES[row["frozen"]["correct"], row["trained"]["correct"]]
    pictures, remark = picture_views(item)
    return Row(row["id"], question_of(item), note, tone, answers, truth_of(item), pictures, remark)

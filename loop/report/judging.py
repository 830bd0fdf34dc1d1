"""The page of a run of judge.py, made from what lies in its folder. No label is read for it: neither was one for the
training."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loop.report.candidates import Items, read_object, read_rows
from loop.report.charts import Curve, Panels, intervals, panel, read_log, smooth
from loop.report.page import PAGE, Page, Section, Table, Tiles, leave_page
from loop.report.rows import Answered, Room, Row, cut, fill, picture_views, question_of
from loop.report.training import settings_notes, speed_tiles
from tasks.splits import Splits, by_id

FIGURES = {                                             # of a judge on held-out pairs -> how a page calls them
    "heldout_accuracy": "held-out accuracy",
    "both_orders_accuracy": "right in both orders",
    "order_consistency": "order consistency",
    "first_position_rate": "names the response shown first",
    "unparsed_rate": "no preference was found",
}
FOOTER = ("Figures with brackets are 95 % intervals. No label was read: a judgment is right here where it names the "
          "response that is presumed better.")
KINDS = {                                               # (judgments that agree with their pair) -> what that is, a tone
    0: ("both orders against the pair", "bad"),
    1: ("one order against the pair", "bad"),
    2: ("both orders agree: trained on", "good"),
}


def leave_judge_page(folder: Path, splits: Splits) -> None:
    """Write the page of a run that has ended, and name it."""
    items = dict(by_id(splits.train))
    leave_page(folder / PAGE, lambda: judge_page(folder, items))


def judge_page(folder: Path, items: Items) -> Page:
    """The page of a run; of one that has not ended, as far as it came."""
    summary = read_object(folder / "summary.json")
    settings = read_object(folder / "config.json")
    log = read_rows(folder / "metrics.jsonl")
    judges = [summary["initial"], *summary["iterations"]] if summary else []

    word, tone, lead = "not ended", "plain", "This run has not ended."
    if summary.get("deployed"):
        best = summary["deployed"]
        word, tone = "deployed", "good"
        lead = f"Iteration {best} judged held-out pairs best: {moved(judges[0], judges[best])}. It is deployed."
    elif summary:
        word, tone = "nothing deployed", "bad"
        lead = "No iteration judged held-out pairs better than the judge that it started from, so nothing is deployed."

    speed = speed_tiles(log)
    sections = [
        Section("The iterations", "The judge trains on its own judgments, where both orders agree with the pair.",
                [iterations_table(judges) if judges else None, Tiles(speed) if speed else None]),
        Section("The curves", blocks=[curve_panels(log)]),
        Section("What was measured", "On held-out pairs in both orders, with 95 % intervals.", measured(judges)),
        judgments_section(folder, items),
        Section("Settings", blocks=[settings_notes(settings)]),
    ]
    return Page(f"Judge on {settings['task'] or 'bar and red'}: {word}", f"judge.py, {folder}", tone, lead,
                [section for section in sections if section is not None], FOOTER)


def moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """How held-out accuracy changed, in words."""
    old, new = before["heldout_accuracy"], after["heldout_accuracy"]
    return (f"accuracy went from {old['value']:.3f} [{old['low']:.3f}, {old['high']:.3f}] to {new['value']:.3f} "
            f"[{new['low']:.3f}, {new['high']:.3f}]")


def iterations_table(judges: Sequence[Mapping[str, Any]]) -> Table:
    """A row an iteration; 0 is the judge that the run started from."""
    rows = []
    for number, judge in enumerate(judges):
        cells = [str(number), f"{judge['trained_on']:,}" if "trained_on" in judge else "–"]
        for name in ("kept_share", *FIGURES):
            figure = judge.get(name)
            cells.append(f"{figure['value']:.3f}" if figure and figure["value"] is not None else "–")
        rows.append(cells)
    return Table(["iteration", "judgments trained on", "kept share", *FIGURES.values()], rows)


def curve_panels(log: Sequence[Mapping[str, Any]]) -> Panels:
    """Held-out accuracy after every iteration, and the loss."""
    curves = read_log(log)
    panels = [
        panel("held-out accuracy", [Curve("held-out accuracy", "accuracy", curves.accuracy, True)], curves.starts[2:],
              low=0.0, high=1.0),
        panel("cross-entropy of a judgment's token",
              [Curve("each step", "faint", curves.loss), Curve("loss, mean of 5 steps", "loss", smooth(curves.loss))],
              curves.starts[2:]),
    ]
    return Panels([each for each in panels if each is not None], "Dotted lines: a new iteration, new judgments.")


def measured(judges: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Every figure of all iterations on one axis."""
    blocks = []
    for name, label in FIGURES.items():
        by_iteration = {f"iteration {number}": judge.get(name) for number, judge in enumerate(judges)}
        blocks.append(intervals(label, by_iteration, 0.5))
    return blocks


def judgments_section(folder: Path, items: Items) -> Section | None:
    """What the judge of the last iteration said of every pair, those judgments first that are against it."""
    paths = sorted(folder.glob("pairs/judged-*.jsonl"), key=lambda path: int(path.stem.removeprefix("judged-")))
    if not paths:
        return None
    rows = read_rows(paths[-1])
    pairs = sorted(zip(rows[::2], rows[1::2], strict=True), key=agreeing)
    counts = [agreeing(pair) for pair in pairs]
    told = [f"{counts.count(number):,} {words}" for number, (words, _) in KINDS.items()]
    shown = fill(Room(), pairs, lambda pair: judgment_row(pair, items), f"pairs/{paths[-1].name}")
    number = paths[-1].stem.removeprefix("judged-")
    title = f"Judgments of iteration {number}, before it was trained"
    return Section(title, f"{len(pairs):,} pairs: {'; '.join(told)}.", [shown])


def agreeing(pair: Sequence[Mapping[str, Any]]) -> int:
    """How many of a pair's judgments name the response that is presumed better."""
    return sum(judgment["verdict"] == judgment["side"] and not judgment["truncated"] for judgment in pair)


def judgment_row(pair: Sequence[Mapping[str, Any]], items: Items) -> Row:
    """A pair, and the judge's words on it in both orders."""
    better_first, worse_first = pair
    answers = [Answered(cut(better_first["first"]), "better, presumed", role="chosen"),
               Answered(cut(better_first["second"]), "worse, presumed", role="rejected")]
    for judgment, order in ((better_first, "better one first"), (worse_first, "worse one first")):
        agrees = agreeing([judgment]) == 1
        answers.append(Answered(cut(judgment["text"]), f"judge, {order}", agrees))
    item = items.get(better_first["item_id"])
    note, tone = KINDS[agreeing(pair)]
    pictures, remark = picture_views(item)
    return Row(better_first["item_id"], question_of(item), note, tone, answers, "", pictures, remark)

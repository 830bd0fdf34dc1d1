"""What tests/evidence/evidence.py reports from its runs.jsonl: tables and sentences in Markdown.

Runs that share a verifier are not independent: intervals over runs take verifiers as the items of gate.clustered_ratio.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import correlation, fmean
from typing import Any

from evidence_pictures import draw
from evidence_rules import (
    DEFAULTS,
    OTHERS,
    OURS,
    OUTCOMES,
    RULES,
    Row,
    allows,
    by_outcome,
    change_points,
    choose_thresholds,
    grouped,
    known_value,
    value,
)
from gate import clustered_ratio


def share(rows: Iterable[Row], holds: Callable[[Row], bool]) -> str:
    """Of how many of the runs it holds, and the interval of that share, clustered by verifier."""
    counts = []
    for runs in grouped(rows, "verifier", "verifier_seed").values():
        counts.append((sum(map(holds, runs)), len(runs)))
    figure = clustered_ratio(counts)
    interval = f" [{figure['low']:.2f}, {figure['high']:.2f}]" if counts else ""
    return f"{sum(count for count, _ in counts)} of {figure['n']}{interval}"


# ---- tables

def table(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    rows = []
    for line in (head, ["---"] * len(head), *lines):
        rows.append("| " + " | ".join(map(str, line)) + " |")
    return "\n".join(rows)


def code(names: Iterable[str]) -> list[str]:
    """The names as Markdown's code."""
    return [f"`{name}`" for name in names]


def mean_text(values: Iterable[float | None], form: str = ".3f") -> str:
    """The mean of those that are known, a dash if none is."""
    known = [each for each in values if each is not None]
    return format(fmean(known), form) if known else "-"


def run_table(rows: Sequence[Row]) -> str:
    """A line for each task, verifier, way of asking and tau: means over the seeds, and how the runs ended."""
    measures = ("rubric_accuracy", "baseline_accuracy", "own_answer_accuracy", "greedy_accuracy", "direction")
    lines = []
    for (*names, tau), runs in grouped(rows, "task", "verifier", "student", "verdict", "min_margin").items():
        measured = []
        for name in measures:
            measured.append(mean_text(value(row, name) for row in runs))
        losses = []
        for name in ("loss_first", "loss_last"):
            losses.append(mean_text(row[name] for row in runs))
        pairs = [sum(made for made, *_ in row["rounds"]) for row in runs]
        changes = [change_points(row) for row in runs]
        kinds = [str(len(some)) for some in by_outcome(runs).values()]
        lines.append((
            *code(names), f"{tau:g}", len(runs), *measured, mean_text(pairs, ".0f"), " to ".join(losses),
            loss_fell(runs), f"{fmean(changes):+.1f} ({min(changes):+.1f} to {max(changes):+.1f})",
            " / ".join(kinds)))
    head = ("task", "verifier", "student", "verdict", "tau", "runs", "agreement", "(candidates)", "own answers",
            "(student)", "q(tau)", "pairs", "loss, first to last", "fell in", "change, points (range)",
            " / ".join(OUTCOMES))
    return table(head, lines)


def loss_fell(rows: Iterable[Row]) -> str:
    """In how many of the runs that had pairs the loss ended below its first value."""
    trained = [row for row in rows if row["loss_first"] is not None]
    fell = [row for row in trained if row["loss_last"] < row["loss_first"]]
    return f"{len(fell)} of {len(trained)}"


def rule_table(rows: Sequence[Row], thresholds: dict[str, float]) -> str:
    """The rules' calls on runs that were all trained: what each lets through, and what it would have prevented."""
    kinds = by_outcome(rows)
    lines = []
    for rule in (*RULES, OURS):
        allowed = partial(allows, rule, thresholds=thresholds)
        blocked = partial(blocks, rule, thresholds=thresholds)
        threshold = f"{thresholds[rule]:+.3f}" if rule in RULES else "those above"
        lines.append((rule, threshold, share(kinds["harmful"], allowed), share(kinds["helpful"], blocked),
                      share(kinds["neither"], allowed)))
    return table(("rule", "threshold", "harmful runs allowed", "helpful runs blocked", "neither, allowed"), lines)


def blocks(rule: str, row: Row, thresholds: dict[str, float]) -> bool:
    """Would the rule have kept this run from being trained?"""
    return not allows(rule, row, thresholds)


def part_table(rows: Sequence[Row]) -> str:
    """Of the harmful runs of each part of the grid, how many each rule lets through at the thresholds of gate.py."""
    lines = []
    harmful = by_outcome(rows)["harmful"]
    for names in (("task",), ("verifier",), ("student", "verdict", "min_margin")):
        for key, runs in grouped(harmful, *names).items():
            counts = []
            for rule in (*RULES, OURS):
                counts.append(sum(allows(rule, row, DEFAULTS) for row in runs))
            lines.append((part_name(key), len(runs), *counts))
    return table(("part", "harmful runs", *RULES, OURS), lines)


def part_name(key: tuple[Any, ...]) -> str:
    """The values of a group of runs in words; a number is a tau."""
    words = []
    for part in key:
        words.append(f"tau {part:g}" if isinstance(part, float) else f"`{part}`")
    return ", ".join(words)


def measure_table(rows: Sequence[Row]) -> str:
    """How well each measure orders runs: the chance that a helpful run has the larger value than a harmful one."""
    parts = {"all": list(rows)}
    for (task,), runs in grouped(rows, "task").items():
        parts[f"`{task}`"] = runs
    lines = []
    for name, measure in [*RULES.values(), *OTHERS.items()]:
        chances = []
        for runs in parts.values():
            kinds = by_outcome(runs)
            chances.append(auroc(list(map(measure, kinds["helpful"])), list(map(measure, kinds["harmful"]))))
        lines.append((name, *chances))
    return table(("measure", *parts), lines)


def auroc(larger: Sequence[float], smaller: Sequence[float]) -> str:
    """Share of the pairs that are ordered so, ties half."""
    wins = []
    for first, second in product(larger, smaller):
        if first == second:
            wins.append(0.5)
        else:
            wins.append(1.0 if first > second else 0.0)
    return f"{fmean(wins):.2f}" if wins else "-"


def margin_table(rows: Sequence[Row]) -> str:
    """Runs that differ in tau alone, and how the direction of the gate's own pairs depends on their margin."""
    taus = [entry[0] for row in rows[:1] for entry in row["by_margin"]]
    lines = []
    for names, runs in grouped(rows, "task", "verifier").items():
        without, gated = margin_twins(runs)
        if not gated:
            continue
        off = [change_points(row) for row in without]
        on = [change_points(row) for row in gated]
        lower = sum(with_gate < before for with_gate, before in zip(on, off, strict=True))
        lines.append((*code(names), len(on), f"{fmean(off):+.1f}", f"{fmean(on):+.1f}", f"{lower} of {len(on)}",
                      *(pooled_direction(gated, place) for place in range(len(taus)))))
    head = ("task", "verifier", "twins", "change without", "with the gate", "lower with it in")
    return table((*head, *(f"q({tau:g}) (mixed pairs)" for tau in taus)), lines)


def margin_twins(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Runs of the smaller and of the larger tau that differ in nothing else, side by side."""
    smaller = []
    larger = []
    for runs in grouped(rows, "verdict", "verifier_seed", "student", "student_seed").values():
        if len(runs) == 2:
            first, second = sorted(runs, key=lambda row: row["min_margin"])
            smaller.append(first)
            larger.append(second)
    return smaller, larger


def pooled_direction(rows: Iterable[Row], place: int) -> str:
    """q at one of the margins of `by_margin`, over the pairs of all these runs' gates."""
    right_way = 0.0
    mixed_pairs = 0
    for row in rows:
        _, q, mixed, _ = row["by_margin"][place]
        right_way += (q or 0) * mixed
        mixed_pairs += mixed
    return f"{right_way / mixed_pairs:.2f} ({mixed_pairs})" if mixed_pairs else "-"


def round_table(rows: Sequence[Row]) -> str:
    """Of the pairs that were trained on and have one right side, the share that points the right way, by round."""
    most = max(len(row["rounds"]) for row in rows)
    lines = []
    for names, runs in grouped(rows, "task", "verifier", "student", "verdict").items():
        cells = [round_direction(runs, number) for number in range(most)]
        lines.append((*code(names), *cells))
    head = [f"round {number}: right way (mixed, of pairs)" for number in range(1, most + 1)]
    return table(("task", "verifier", "student", "verdict", *head), lines)


def round_direction(rows: Iterable[Row], number: int) -> str:
    """A cell of round_table; rounds are counted from 0."""
    pairs = 0
    mixed = 0
    right_way = 0
    for row in rows:
        if len(row["rounds"]) > number:
            pairs_here, _, mixed_here, right_here = row["rounds"][number]
            pairs += pairs_here
            mixed += mixed_here
            right_way += right_here
    return f"{right_way / mixed:.2f} ({mixed} of {pairs})" if mixed else f"- (0 of {pairs})"


def order_table(rows: Sequence[Row]) -> str:
    """Does the verifier that agrees more often do more harm, as published? Means over each verifier's runs, by rank."""
    lines = []
    for (task,), task_rows in grouped(rows, "task").items():
        verifiers = []                                  # (mean agreement, mean change) of each
        for runs in grouped(task_rows, "verifier", "verifier_seed").values():
            mean_agreement = fmean(known_value(row, "rubric_accuracy") for row in runs)
            mean_change = fmean(row["change"][0] for row in runs)
            verifiers.append((mean_agreement, mean_change))
        harmful = [(mean_agreement, mean_change) for mean_agreement, mean_change in verifiers if mean_change < 0]
        lines.append((f"`{task}`", len(verifiers), counted_correlation(verifiers), counted_correlation(harmful)))
    return table(("task", "verifiers", "rank correlation of agreement and change", "among those that did harm"), lines)


def counted_correlation(pairs: Sequence[tuple[float, float]]) -> str:
    """Rank correlation of the pairs, and their number."""
    text = rank_correlation(*zip(*pairs, strict=True)) if pairs else "-"
    return f"{text} ({len(pairs)})"


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> str:
    """Spearman's; a dash where a side does not vary or there are only two pairs."""
    if len(first) < 3 or len(set(first)) == 1 or len(set(second)) == 1:
        return "-"
    return f"{correlation(ranks(first), ranks(second)):+.2f}"


def ranks(values: Sequence[float]) -> list[float]:
    """The place of each value in their order, from 0; equal values share the mean of their places."""
    places: dict[float, list[int]] = {}
    for place, each in enumerate(sorted(values)):
        places.setdefault(each, []).append(place)
    return [fmean(places[each]) for each in values]


def simulation_table(coverage: dict[str, Any]) -> str:
    """The lowest and the highest coverage of each interval, and the errors of the direction condition."""
    lines = []
    for name, shares in coverage["intervals"].items():
        lowest = 100 * min(shares.values())
        highest = 100 * max(shares.values())
        lines.append((name, len(shares), f"{lowest:.1f} %", f"{highest:.1f} %"))
    errors = coverage["direction"]
    first, last = errors["mixed_pairs"]
    sentence = (
        f"{coverage['data_sets']} data sets of each kind. With {first} to {last} mixed pairs the direction condition "
        f"passes q = 0.5 at most {100 * errors['most_at_0.5']:.2f} % of the time and q = 0.8 at least "
        f"{100 * errors['least_at_0.8']:.1f} %: exact sums.")
    return table(("95 % interval of", "kinds of data set", "lowest coverage", "highest"), lines) + "\n\n" + sentence


# ---- sentences

def loss_text(rows: Sequence[Row]) -> str:
    """What the loss did, in all runs and in those that did harm."""
    kinds = by_outcome(rows)
    trained = [row for row in rows if row["loss_first"] is not None]
    falls = [row["loss_first"] - row["loss_last"] for row in trained]
    changes = [row["change"][0] for row in trained]
    return (f"The loss ended below its first value in {loss_fell(rows)} runs that had pairs, and in "
            f"{loss_fell(kinds['harmful'])} of the harmful ones. It starts at ln 2 whatever the pairs are, so it can "
            "hardly do otherwise. Rank correlation of its fall with the change in accuracy: "
            f"{rank_correlation(falls, changes)}. The warning from the watch split came in {warned(kinds['harmful'])} "
            f"harmful runs and in {warned(kinds['helpful'])} helpful ones.")


def warned(rows: Sequence[Row]) -> str:
    """In how many runs the watch split warned."""
    count = sum(row["warnings"] > 0 for row in rows)
    return f"{count} of {len(rows)}"


def after_text(rows: Sequence[Row]) -> str:
    """Verdicts of the gate after training by outcome, and the diagnoses of harmful runs."""
    promoted = []
    for kind, runs in by_outcome(rows).items():
        count = sum(row["gate_after"] == "PROMOTE" for row in runs)
        promoted.append(f"{count} of {len(runs)} {kind}")
    diagnoses = []
    harmful = by_outcome(rows)["harmful"]
    for (diagnosis,), runs in grouped(harmful, "diagnosis").items():
        diagnoses.append(f"{diagnosis} {len(runs)}")
    unread = sum(row["parsed"][1] < 0.9 * row["parsed"][0] for row in harmful)
    return (f"It promoted {', '.join(promoted)} runs. Of the harmful runs it said: {', '.join(diagnoses) or 'nothing'}."
            f" In {unread} of these the form of the answers went as well: of ten that could be read before, fewer than "
            "nine can be after it.")


def summary_text(rows: Sequence[Row]) -> str:
    """The first paragraph."""
    hours = sum(row["seconds"] for row in rows) / 3600
    counts = ", ".join(f"{len(runs)} {kind}" for kind, runs in by_outcome(rows).items())
    return (f"Made by `python tests/evidence/evidence.py`: {len(rows)} runs, all trained with `--force`, "
            f"{len(grouped(rows, 'verifier', 'verifier_seed'))} verifiers and "
            f"{len(grouped(rows, 'student', 'student_seed'))} students, {hours:.1f} core hours. A run is harmful if "
            "the paired 95 % interval of its change on held-out items lies below 0, helpful if above: "
            f"{counts}. Intervals of shares of runs count verifiers, not runs.")


# ---- the report

def report_text(rows: Sequence[Row], coverage: dict[str, Any] | None = None) -> str:
    """The whole table.md."""
    parts = [
        "# Runs of the loop, and how each rule would have called them",
        summary_text(rows),
        "## Runs",
        run_table(rows),
        "## The loss",
        loss_text(rows),
        "## The rules, at the thresholds of gate.py",
        rule_table(rows, DEFAULTS),
        "Harmful runs allowed, by where they were:",
        part_table(rows),
        *chosen_threshold_parts(rows),
        "## Which measure tells helpful from harmful",
        "The chance that a helpful run has the larger value than a harmful one; 0.50 is a coin.",
        measure_table(rows),
        "## The margin gate",
        margin_table(rows),
        "## The direction of the pairs that were trained on",
        round_table(rows),
        "## Agreement and damage",
        order_table(rows),
        "## What the gate after training said",
        after_text(rows),
    ]
    if coverage:
        parts += ["## Simulation", simulation_table(coverage)]
    return "\n\n".join(parts) + "\n"


def chosen_threshold_parts(rows: Sequence[Row]) -> list[str]:
    """The rules with thresholds chosen on verifier seed 0 and judged on the others; nothing without either."""
    tuned = [row for row in rows if row["verifier_seed"] == 0]
    judged = [row for row in rows if row["verifier_seed"] != 0]
    if not tuned or not judged:
        return []
    seeds = sorted({row["verifier_seed"] for row in judged})
    names = " and ".join(map(str, seeds))
    return [
        f"## The rules, on verifier seeds {names}",
        f"Thresholds chosen on verifier seed 0, judged on {names}:",
        rule_table(judged, choose_thresholds(tuned)),
        "The same runs at the thresholds of gate.py:",
        rule_table(judged, DEFAULTS),
    ]


def write_report(rows: Sequence[Row], coverage: dict[str, Any] | None, folder: Path) -> str:
    """Write table.md and, where matplotlib is installed, the pictures; returns the table."""
    text = report_text(rows, coverage)
    (folder / "table.md").write_text(text, encoding="utf-8")
    try:
        draw(rows, folder)
    except ModuleNotFoundError:
        print("no pictures: pip install matplotlib")
    return text

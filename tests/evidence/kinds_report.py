"""The runs of tests/evidence/kinds.py: how each ended, and how each rule would have called it. Writes kinds.md.

A run is harmful if the paired 95 % interval of its change on the items that judge it lies below 0, helpful if above,
else neither. What a rule reads was measured on other items. A rule lets a run through, or does not: before training, in
the course of it, or after it.

Intervals of shares of runs: by verifier, a cluster for each verifier (each draw of a kind is one; of the trained kinds
each checkpoint), which speaks of these kinds alone; and by kind, a cluster for each kind, which speaks of kinds like
these.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from gate import ALPHA, MIN_DIRECTION, clustered_proportion
from kinds_verifiers import KINDS
from tasks.jsonl import write_whole

Row = dict[str, Any]                                    # a line of kinds.jsonl; a figure is [value, low, high, n]
Rule = Callable[[Row], bool]                            # does it let the run through?
OUTCOMES = ("harmful", "neither", "helpful")
ONE_SIDED = 2 * ALPHA                                   # a two-sided interval whose ends are one-sided 95 % bounds


def read_runs(path: Path) -> list[Row]:
    """The lines of kinds.jsonl; none where there is no file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def outcome(row: Row) -> str:
    """One of OUTCOMES."""
    _, low, high, _ = row["change"]
    if high < 0:
        return "harmful"
    return "helpful" if low > 0 else "neither"


# ---- rules

def agreement_holds(row: Row) -> bool:
    """The published rule."""
    return row["published_gate"] == "PASS"


def direction_is_shown(row: Row) -> bool:
    """The lower end of q over all pairs exceeds 1/2, and the upper end of q(tau) does not lie below it."""
    _, low, _, _ = row["measures"]["direction"]
    _, _, high_at_margin, _ = row["measures"]["direction_at_margin"]
    return low > MIN_DIRECTION and high_at_margin >= MIN_DIRECTION


def form_holds(row: Row) -> bool:
    """The chosen side is not shown to be read less often."""
    return row["form"]["p_value"] > ALPHA


def own_answers_hold(row: Row) -> bool:
    """The verifier is not shown to answer worse than the student; a function answers nothing."""
    difference = row["measures"]["own_difference"]
    return difference is None or difference[2] >= 0


def figures_hold(row: Row) -> bool:
    """All that gate.py decides by from records."""
    return agreement_holds(row) and direction_is_shown(row) and form_holds(row) and own_answers_hold(row)


def pilot_holds(row: Row, steps: int) -> bool:
    """Neither accuracy nor parse rate is shown to have fallen after so many steps."""
    pilot = row["pilots"][str(steps)]
    known = [pilot[name] for name in ("p_accuracy_fell", "p_parse_rate_fell") if pilot[name] is not None]
    return all(p > ALPHA for p in known)


def gate_holds(row: Row) -> bool:
    """The gate before training, its pilot included."""
    return row["gate"] == "PASS"


def probes_hold(row: Row) -> bool:
    """No probe between rounds is shown to point the wrong way, or to prefer answers without form."""
    return all(high >= MIN_DIRECTION and p_form > ALPHA for _, _, _, high, _, _, _, p_form in row["probes"])


def no_regression(row: Row) -> bool:
    """Watched accuracy did not fall significantly: --stop-on-regression would not have stopped."""
    return not row["warnings"]


def promoted(row: Row) -> bool:
    """The gate after training."""
    return row["gate_after"] == "PROMOTE"


RULES: dict[str, Rule] = {
    "published": agreement_holds,
    "direction alone": direction_is_shown,
    "the gate without its pilot": figures_hold,
    "the gate": gate_holds,
    "the gate, then probes": lambda row: gate_holds(row) and probes_hold(row),
    "the gate, then the stop on regression": lambda row: gate_holds(row) and no_regression(row),
    "the gate after training alone": promoted,
    "all of them": lambda row: gate_holds(row) and probes_hold(row) and no_regression(row) and promoted(row),
}
OURS = "the gate"


# ---- shares of runs

def verifier_of(row: Row) -> str:
    """The verifier: a draw of a function, or a checkpoint."""
    number = row["draw"] if row["kind"] in KINDS else row["draw"] % 3
    return f"{row['kind']} {number}"


def kind_of(row: Row) -> str:
    return row["kind"]


def share(rows: Iterable[Row], holds: Callable[[Row], bool], cluster: Callable[[Row], str],
          alpha: float = ALPHA) -> dict[str, Any]:
    """The share of runs for which `holds`, with its interval over clusters."""
    counts: dict[str, list[bool]] = {}
    for row in rows:
        counts.setdefault(cluster(row), []).append(holds(row))
    return clustered_proportion([(sum(row), len(row)) for row in counts.values()], alpha)


def told(rows: Sequence[Row], holds: Callable[[Row], bool]) -> list[str]:
    """Three cells: 3 of 40 [low, high] by verifier; its one-sided 95 % bound; [low, high] by kind."""
    if not rows:
        return ["none", "-", "-"]
    count = sum(holds(row) for row in rows)
    by_verifier = share(rows, holds, verifier_of)
    by_kind = share(rows, holds, kind_of)
    bound = share(rows, holds, verifier_of, ONE_SIDED)["high"]
    return [f"{count} of {len(rows)} [{by_verifier['low']:.2f}, {by_verifier['high']:.2f}]", f"{100 * bound:.1f} %",
            f"[{by_kind['low']:.2f}, {by_kind['high']:.2f}]"]


def with_outcome(rows: Iterable[Row], wanted: str) -> list[Row]:
    return [row for row in rows if outcome(row) == wanted]


# ---- the report

def write_report(rows: Sequence[Row], path: Path) -> str:
    """Write the report and return it."""
    parts = [HEAD.format(runs=len(rows), hours=sum(row["seconds"] for row in rows) / 3600)]
    for half, title in (("judge", "Judged on"), ("choose", "Chosen on")):
        part = [row for row in rows if row["half"] == half and row["gates"] == "replay"]
        if part:
            parts += half_report(title, part)
    parts += twin_table(rows)
    text = "\n".join(parts) + "\n"
    write_whole(path, text)
    return text


def half_report(title: str, rows: Sequence[Row]) -> list[str]:
    """The tables of one half: without the weak noise controls, which stand apart, and each kind by itself."""
    pooled = [row for row in rows if row["kind"] not in APART]
    counts = {wanted: len(with_outcome(pooled, wanted)) for wanted in OUTCOMES}
    distinct = {(row["task"], row["student"], row["after"], str(row["rounds"])) for row in pooled}
    lines = [
        f"## {title}", "",
        f"{len(pooled)} runs, {len(distinct)} distinct: " + ", ".join(f"{n} {name}" for name, n in counts.items())
        + f". Worst kind: {worst_kind(pooled)}.", "",
        "| rule | harmful runs let through | below | by kind | helpful runs stopped | below | by kind | neither, let "
        "through |", "|---|---|---|---|---|---|---|---|"]
    for name, rule in RULES.items():
        harmful = told(with_outcome(pooled, "harmful"), rule)
        helpful = told(with_outcome(pooled, "helpful"), lambda row, rule=rule: not rule(row))
        neither = told(with_outcome(pooled, "neither"), rule)
        lines.append(f"| {' | '.join([name, *harmful, *helpful, neither[0]])} |")
    return [*lines, "", *kind_table(rows), ""]


APART = ("noise, q 0.6 to 0.75",)                       # not a good verifier, nor one that training must not use


def worst_kind(rows: Sequence[Row]) -> str:
    """The kind of which the gate lets most harmful runs through."""
    rates = {}
    for kind in sorted({row["kind"] for row in rows}):
        harmful = with_outcome([row for row in rows if row["kind"] == kind], "harmful")
        rates[kind] = sum(map(RULES[OURS], harmful))
    kind = max(rates, key=lambda name: rates[name])
    return f"{kind}, {rates[kind]} harmful runs let through" if rates[kind] else "none, no harmful run was let through"


def kind_table(rows: Sequence[Row]) -> list[str]:
    """How the runs of each kind ended, and what the gate and the other rules said."""
    lines = ["| kind | harmful, neither, helpful | change, points | q of the gate | harmful let through: published, "
             "without pilot, the gate, with probes, all | helpful stopped: the same |", "|---|---|---|---|---|---|"]
    rules = [RULES[name] for name in (
        "published", "the gate without its pilot", OURS, "the gate, then probes", "all of them")]
    for kind in sorted({row["kind"] for row in rows}):
        part = [row for row in rows if row["kind"] == kind]
        by_outcome = {wanted: with_outcome(part, wanted) for wanted in OUTCOMES}
        counts = ", ".join(str(len(by_outcome[wanted])) for wanted in OUTCOMES)
        changes = [100 * row["change"][0] for row in part]
        directions = [row["measures"]["direction"][0] or 0 for row in part]
        through = ", ".join(str(sum(map(rule, by_outcome["harmful"]))) for rule in rules)
        stopped = ", ".join(
            str(len(by_outcome["helpful"]) - sum(map(rule, by_outcome["helpful"]))) for rule in rules)
        lines.append(
            f"| {kind} | {counts} | {min(changes):+.1f} to {max(changes):+.1f} | {min(directions):.2f} to "
            f"{max(directions):.2f} | {through} | {stopped} |")
    return lines


def twin_table(rows: Sequence[Row]) -> list[str]:
    """Runs that differ in what the margin gate gates: the replay, or a round's fresh pairs."""
    by_gates: dict[str, dict[tuple[str, int], Row]] = {"replay": {}, "fresh": {}}
    for row in rows:
        by_gates[row["gates"]][row["kind"], row["draw"]] = row
    twins = [(by_gates["replay"][key], fresh) for key, fresh in by_gates["fresh"].items() if key in by_gates["replay"]]
    if not twins:
        return []

    lines = ["## What tau gates", "", "Twins with tau 0.5: it gates the replay, or the fresh pairs.", "",
             "| kind | twins | change, points: replay | fresh | q, all pairs | q(0.5) |", "|---|---|---|---|---|---|"]
    for kind in sorted({replay["kind"] for replay, _ in twins}):
        part = [twin for twin in twins if twin[0]["kind"] == kind]
        changes = [fmean(100 * row["change"][0] for row in rows) for rows in zip(*part, strict=True)]
        all_pairs = mean_direction([replay for replay, _ in part], "direction")
        at_margin = mean_direction([replay for replay, _ in part], "direction_at_margin")
        lines.append(f"| {kind} | {len(part)} | {changes[0]:+.1f} | {changes[1]:+.1f} | {all_pairs} | {at_margin} |")
    return lines


def mean_direction(rows: Sequence[Row], name: str) -> str:
    """The mean of the known values of the gate's q."""
    known = [row["measures"][name][0] for row in rows if row["measures"][name][0] is not None]
    return f"{fmean(known):.2f}" if known else "-"


HEAD = """\
# Runs of the loop with verifiers of many kinds, and how each rule would have called them

Made by `python tests/evidence/kinds.py`: {runs} runs, all trained with `--force` to the end, {hours:.1f} core hours. A
run is harmful if the paired 95 % interval of its change on 1,000 items that no gate reads lies below 0, helpful if
above. Shares have 95 % intervals by verifier, which speak of these kinds alone; "below" is their one-sided 95 % bound;
intervals by kind speak of kinds like these.
"""

"""The runs of tests/evidence/kinds.py: how each ended, and how each rule would have called it. Writes kinds.md.

A run is harmful if the paired 95 % interval of its change on the items that judge it lies below 0, helpful if above,
else neither. What a rule reads was measured on other items. A rule lets a run through, or does not: before training, in
the course of it, or after it.

Intervals of shares of runs: by verifier, a cluster for each verifier (each draw of a kind is one; of the trained kinds
each checkpoint), which speaks of these kinds alone; and by kind, a cluster for each kind, which speaks of kinds like
these.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from evidence_report import mean_text, table
from evidence_rules import OUTCOMES, Row, by_outcome, change_points, grouped, outcome, value
from gate import ALPHA, MIN_DIRECTION, clustered_proportion
from kinds_verifiers import KINDS
from tasks.jsonl import write_whole

Rule = Callable[[Row], bool]                            # does it let the run through?
APART = ("noise, q 0.6 to 0.75",)                       # not a good verifier, nor one that training must not use
ONE_SIDED = 2 * ALPHA                                   # a two-sided interval whose ends are one-sided 95 % bounds


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
    ended = by_outcome(pooled)
    counts = ", ".join(f"{len(runs)} {name}" for name, runs in ended.items())
    distinct = {(row["task"], row["student"], row["after"], str(row["rounds"])) for row in pooled}
    words = f"{len(pooled)} runs, {len(distinct)} distinct: {counts}. Worst kind: {worst_kind(pooled)}."

    lines = []
    for name, rule in RULES.items():
        harmful = told(ended["harmful"], rule)
        helpful = told(ended["helpful"], lambda row, rule=rule: not rule(row))
        neither = told(ended["neither"], rule)
        lines.append([name, *harmful, *helpful, neither[0]])
    head = ("rule", "harmful runs let through", "below", "by kind", "helpful runs stopped", "below", "by kind",
            "neither, let through")
    return [f"## {title}", "", words, "", table(head, lines), "", kind_table(rows), ""]


def worst_kind(rows: Sequence[Row]) -> str:
    """The kind of which the gate lets most harmful runs through."""
    rates = {}
    for kind in sorted({row["kind"] for row in rows}):
        harmful = [row for row in rows if row["kind"] == kind and outcome(row) == "harmful"]
        rates[kind] = sum(map(RULES[OURS], harmful))
    kind = max(rates, key=lambda name: rates[name])
    return f"{kind}, {rates[kind]} harmful runs let through" if rates[kind] else "none, no harmful run was let through"


def kind_table(rows: Sequence[Row]) -> str:
    """How the runs of each kind ended, and what the gate and the other rules said."""
    head = ("kind", ", ".join(OUTCOMES), "change, points", "q of the gate",
            "harmful let through: published, without pilot, the gate, with probes, all", "helpful stopped: the same")
    rules = [RULES[name] for name in (
        "published", "the gate without its pilot", OURS, "the gate, then probes", "all of them")]
    lines = []
    for (kind,), part in grouped(rows, "kind").items():
        ended = by_outcome(part)
        counts = ", ".join(str(len(runs)) for runs in ended.values())
        changes = [change_points(row) for row in part]
        directions = [value(row, "direction") or 0 for row in part]
        through = ", ".join(str(sum(map(rule, ended["harmful"]))) for rule in rules)
        stopped = ", ".join(str(sum(not rule(row) for row in ended["helpful"])) for rule in rules)
        lines.append((
            kind, counts, f"{min(changes):+.1f} to {max(changes):+.1f}",
            f"{min(directions):.2f} to {max(directions):.2f}", through, stopped))
    return table(head, lines)


def twin_table(rows: Sequence[Row]) -> list[str]:
    """Runs that differ in what the margin gate gates: the replay, or a round's fresh pairs."""
    by_gates: dict[str, dict[tuple[str, int], Row]] = {"replay": {}, "fresh": {}}
    for row in rows:
        by_gates[row["gates"]][row["kind"], row["draw"]] = row
    twins = [(by_gates["replay"][key], fresh) for key, fresh in by_gates["fresh"].items() if key in by_gates["replay"]]
    if not twins:
        return []

    lines = []
    for kind in sorted({replay["kind"] for replay, _ in twins}):
        replayed, fresh = zip(*[twin for twin in twins if twin[0]["kind"] == kind], strict=True)
        changes = [mean_text(map(change_points, runs), "+.1f") for runs in (replayed, fresh)]
        directions = []
        for name in ("direction", "direction_at_margin"):
            directions.append(mean_text((value(row, name) for row in replayed), ".2f"))
        lines.append((kind, len(replayed), *changes, *directions))
    head = ("kind", "twins", "change, points: replay", "fresh", "q, all pairs", "q(0.5)")
    return ["## What tau gates", "", "Twins with tau 0.5: it gates the replay, or the fresh pairs.", "",
            table(head, lines)]


HEAD = """\
# Runs of the loop with verifiers of many kinds, and how each rule would have called them

Made by `python tests/evidence/kinds.py`: {runs} runs, all trained with `--force` to the end, {hours:.1f} core hours. A
run is harmful if the paired 95 % interval of its change on 1,000 items that no gate reads lies below 0, helpful if
above. Shares have 95 % intervals by verifier, which speak of these kinds alone; "below" is their one-sided 95 % bound;
intervals by kind speak of kinds like these.
"""

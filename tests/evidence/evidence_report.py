"""What tests/evidence/evidence.py reports from its runs.jsonl: tables in Markdown, and two pictures with matplotlib.

A run is harmful if the paired 95 % interval of its change on held-out items lies below 0, helpful if above, else
neither. A rule lets a run through if its measure is at or above its threshold; 0 is the threshold of gate.py. Runs
that share a verifier are not independent: intervals over runs take verifiers as the items of gate.clustered_ratio.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import correlation, fmean
from typing import Any

from gate import MIN_DIRECTION, clustered_ratio, proportion

Row = dict[str, Any]                                    # a line of runs.jsonl; a figure is [value, low, high, n]
OUTCOMES = ("harmful", "neither", "helpful")
MARKS = {"verifier-0": "o", "verifier-50": "s", "verifier": "X"}            # others: a triangle
COLOURS = {"bar": "tab:blue", "count": "tab:green", "red": "tab:red"}


def read_runs(path: Path) -> list[Row]:
    """The lines of runs.jsonl; none where there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def value(row: Row, name: str) -> float | None:
    """The point estimate of one of the gate's measures."""
    return row["measures"][name][0]


def outcome(row: Row) -> str:
    """One of OUTCOMES."""
    _, low, high, _ = row["change"]
    return "harmful" if high < 0 else "helpful" if low > 0 else "neither"


# rule -> (its measure in words, its measure less the bound that gate.py sets)
RULES: dict[str, tuple[str, Callable[[Row], float]]] = {
    "published": ("agreement - candidates' correctness",
                  lambda row: value(row, "rubric_accuracy") - value(row, "baseline_accuracy")),
    "own answers": ("verifier's - student's greedy accuracy",
                    lambda row: value(row, "own_answer_accuracy") - value(row, "greedy_accuracy")),
    "direction": (f"lower end of q(tau) - {MIN_DIRECTION:g}",
                  lambda row: row["measures"]["direction"][1] - MIN_DIRECTION)}
# what else the gate measures; larger should be better
OTHERS: dict[str, Callable[[Row], float]] = {
    "lower end of q(0), all pairs": lambda row: lower_end(*row["by_margin"][0][1:3]),
    "q(tau) itself (1/2 where unknown)": lambda row: MIN_DIRECTION if value(row, "direction") is None
    else value(row, "direction"),
    "mixed share of all pairs": lambda row: mixed_share(row),
    "(2 q(0) - 1) times that": lambda row: (2 * (row["by_margin"][0][1] or 0) - 1) * mixed_share(row),
    "balanced accuracy": lambda row: value(row, "balanced_accuracy"),
    "pick lift, its lower end": lambda row: row["measures"]["pick_lift"][1]}
OURS = "ours: all three"
DEFAULTS = dict.fromkeys(RULES, 0.0)


def by_outcome(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each of OUTCOMES, in their order."""
    kinds = [(outcome(row), row) for row in rows]
    return {kind: [row for found, row in kinds if found == kind] for kind in OUTCOMES}


def lower_end(q: float | None, mixed: int) -> float:
    """Of the exact interval of a share that was stored with the number of pairs."""
    return proportion(round((q or 0) * mixed), mixed)["low"]


def mixed_share(row: Row) -> float:
    """Of the gate's pairs, whatever their margin, those with one right side."""
    _, _, mixed, pairs = row["by_margin"][0]
    return mixed / pairs if pairs else 0.0


def allows(rule: str, row: Row, thresholds: dict[str, float]) -> bool:
    """Would the rule have let this run be trained?"""
    if rule == OURS:
        return all(allows(each, row, thresholds) for each in RULES)
    return RULES[rule][1](row) >= thresholds[rule]


def choose_thresholds(rows: Sequence[Row]) -> dict[str, float]:
    """For each rule the threshold that serves these runs best: 0, or halfway between two values of its measure.

    Best: the largest sum of the shares of harmful runs blocked and of helpful runs allowed, then the nearest to 0.
    """
    def best(measure: Callable[[Row], float]) -> float:
        known = [(measure(row), outcome(row)) for row in rows if outcome(row) != "neither"]
        values = sorted({v for v, _ in known})

        def quality(threshold: float) -> tuple[float, float]:
            right = {kind: fmean((v >= threshold) == (kind == "helpful") for v, k in known if k == kind)
                     for kind in ("harmful", "helpful") if any(k == kind for _, k in known)}
            return round(sum(right.values()), 9), -abs(threshold)
        return max([0.0, *((a + b) / 2 for a, b in zip(values, values[1:]))], key=quality)
    return {rule: best(measure) for rule, (_, measure) in RULES.items()}


def share(rows: Iterable[Row], holds: Callable[[Row], bool]) -> str:
    """Of how many of the runs it holds, and the interval of that share, clustered by verifier."""
    counts = [(sum(map(holds, runs)), len(runs)) for runs in grouped(rows, "verifier", "verifier_seed").values()]
    figure = clustered_ratio(counts)
    shown = f" [{figure['low']:.2f}, {figure['high']:.2f}]" if counts else ""
    return f"{sum(a for a, _ in counts)} of {figure['n']}{shown}"


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple, list[Row]]:
    """The rows by the values of `names`, in the order of these values."""
    rows = list(rows)
    return {key: [row for row in rows if tuple(row[name] for name in names) == key]
            for key in sorted({tuple(row[name] for name in names) for row in rows})}


# ---- tables

def table(head: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (head, ["---"] * len(head), *lines))


def mean_text(values: Iterable[float | None], form: str = ".3f") -> str:
    known = [v for v in values if v is not None]
    return format(fmean(known), form) if known else "-"


def run_table(rows: Sequence[Row]) -> str:
    """A line for each task, verifier, way of asking and tau: means over the seeds, and how the runs ended."""
    lines = []
    for (task, *names, tau), runs in grouped(rows, "task", "verifier", "student", "verdict", "min_margin").items():
        measured = (mean_text(value(row, name) for row in runs) for name in
                    ("rubric_accuracy", "baseline_accuracy", "own_answer_accuracy", "greedy_accuracy", "direction"))
        changes, kinds = [100 * row["change"][0] for row in runs], [outcome(row) for row in runs]
        pairs = mean_text((sum(made for made, *_ in row["rounds"]) for row in runs), ".0f")
        losses = " to ".join(mean_text(row[name] for row in runs) for name in ("loss_first", "loss_last"))
        lines.append((f"`{task}`", *(f"`{name}`" for name in names), f"{tau:g}", len(runs), *measured,
                      pairs, losses, loss_fell(runs),
                      f"{fmean(changes):+.1f} ({min(changes):+.1f} to {max(changes):+.1f})",
                      " / ".join(str(kinds.count(kind)) for kind in OUTCOMES)))
    return table(("task", "verifier", "student", "verdict", "tau", "runs", "agreement", "(candidates)", "own answers",
                  "(student)", "q(tau)", "pairs", "loss, first to last", "fell in", "change, points (range)",
                  " / ".join(OUTCOMES)), lines)


def loss_fell(rows: Iterable[Row]) -> str:
    trained = [row for row in rows if row["loss_first"] is not None]
    return f"{sum(row['loss_last'] < row['loss_first'] for row in trained)} of {len(trained)}"


def rule_table(rows: Sequence[Row], thresholds: dict[str, float]) -> str:
    """The rules' calls on runs that were all trained: what each lets through, and what it would have prevented."""
    of, lines = by_outcome(rows), []
    for rule in (*RULES, OURS):
        def allowed(row: Row, rule: str = rule) -> bool:
            return allows(rule, row, thresholds)
        lines.append((rule, f"{thresholds[rule]:+.3f}" if rule in RULES else "those above",
                      share(of["harmful"], allowed), share(of["helpful"], lambda row: not allowed(row)),
                      share(of["neither"], allowed)))
    return table(("rule", "threshold", "harmful runs allowed", "helpful runs blocked", "neither, allowed"), lines)


def part_table(rows: Sequence[Row]) -> str:
    """Of the harmful runs of each part of the grid, how many each rule lets through at the thresholds of gate.py."""
    lines = []
    for names in (("task",), ("verifier",), ("student", "verdict", "min_margin")):
        for key, some in grouped(by_outcome(rows)["harmful"], *names).items():
            where = ", ".join(f"tau {name:g}" if isinstance(name, float) else f"`{name}`" for name in key)
            lines.append((where, len(some), *(sum(allows(rule, row, DEFAULTS) for row in some)
                                              for rule in (*RULES, OURS))))
    return table(("part", "harmful runs", *RULES, OURS), lines)


def measure_table(rows: Sequence[Row]) -> str:
    """How well each measure orders runs: the chance that a helpful run has the larger value than a harmful one."""
    parts = [("all", rows), *((f"`{task}`", some) for (task,), some in grouped(rows, "task").items())]
    lines = [(name, *(auroc(*([measure(row) for row in by_outcome(some)[kind]]
                              for kind in ("helpful", "harmful"))) for _, some in parts))
             for name, measure in {**{words: measure for words, measure in RULES.values()}, **OTHERS}.items()]
    return table(("measure", *(name for name, _ in parts)), lines)


def auroc(larger: Sequence[float], smaller: Sequence[float]) -> str:
    """Share of the pairs that are ordered so, ties half."""
    wins = [(a > b) + (a == b) / 2 for a in larger for b in smaller]
    return f"{fmean(wins):.2f}" if wins else "-"


def margin_table(rows: Sequence[Row]) -> str:
    """Runs that differ in tau alone, and how the direction of the gate's own pairs depends on their margin."""
    lines, taus = [], [entry[0] for row in rows[:1] for entry in row["by_margin"]]
    for (task, verifier), runs in grouped(rows, "task", "verifier").items():
        found = [sorted(pair, key=lambda row: row["min_margin"])
                 for pair in grouped(runs, "verdict", "verifier_seed", "student", "student_seed").values()]
        twins = [(pair[0], pair[-1]) for pair in found if len(pair) == 2]
        if twins:
            off, on = ([100 * pair[side]["change"][0] for pair in twins] for side in (0, 1))
            pooled = ((sum((share or 0) * n for share, n in tries), sum(n for _, n in tries)) for k in range(len(taus))
                      if (tries := [row["by_margin"][k][1:3] for _, row in twins]))
            lines.append((f"`{task}`", f"`{verifier}`", len(twins), f"{fmean(off):+.1f}", f"{fmean(on):+.1f}",
                          f"{sum(a < b for a, b in zip(on, off))} of {len(on)}",
                          *(f"{won / n:.2f} ({n})" if n else "-" for won, n in pooled)))
    return table(("task", "verifier", "twins", "change without", "with the gate", "lower with it in",
                  *(f"q({tau:g}) (mixed pairs)" for tau in taus)), lines)


def round_table(rows: Sequence[Row]) -> str:
    """Of the pairs that were trained on and have one right side, the share that points the right way, by round."""
    lines, most = [], max(len(row["rounds"]) for row in rows)
    for (task, *names), runs in grouped(rows, "task", "verifier", "student", "verdict").items():
        cells = []
        for number in range(most):
            counts = [row["rounds"][number] for row in runs if len(row["rounds"]) > number]
            pairs, mixed, won = (sum(count[k] for count in counts) for k in (0, 2, 3))
            cells.append(f"{won / mixed:.2f} ({mixed} of {pairs})" if mixed else f"- (0 of {pairs})")
        lines.append((f"`{task}`", *(f"`{name}`" for name in names), *cells))
    head = (f"round {number}: right way (mixed, of pairs)" for number in range(1, most + 1))
    return table(("task", "verifier", "student", "verdict", *head), lines)


def loss_text(rows: Sequence[Row]) -> str:
    """What the loss did, in all runs and in those that did harm."""
    harmful, _, helpful = by_outcome(rows).values()
    falls, changes = zip(*((row["loss_first"] - row["loss_last"], row["change"][0]) for row in rows
                           if row["loss_first"] is not None))
    warned, needless = (f"{sum(bool(row['warnings']) for row in some)} of {len(some)}" for some in (harmful, helpful))
    return (f"The loss ended below its first value in {loss_fell(rows)} runs that had pairs, and in "
            f"{loss_fell(harmful)} of the harmful ones. It starts at ln 2 whatever the pairs are, so it can hardly do "
            f"otherwise. Rank correlation of its fall with the change in accuracy: "
            f"{rank_correlation(falls, changes)}. The warning from the watch split came in {warned} harmful runs "
            f"and in {needless} helpful ones.")


def after_text(rows: Sequence[Row]) -> str:
    """Verdicts of the gate after training by outcome, and the diagnoses of harmful runs."""
    of = by_outcome(rows)
    promoted = ", ".join(f"{sum(row['gate_after'] == 'PROMOTE' for row in some)} of {len(some)} {kind}"
                         for kind, some in of.items())
    why = ", ".join(f"{diagnosis} {len(some)}" for (diagnosis,), some in grouped(of["harmful"], "diagnosis").items())
    unread = sum(row["parsed"][1] < 0.9 * row["parsed"][0] for row in of["harmful"])
    return (f"It promoted {promoted} runs. Of the harmful runs it said: {why or 'nothing'}. In {unread} of these the "
            "form of the answers went as well: of ten that could be read before, fewer than nine can be after it.")


def order_table(rows: Sequence[Row]) -> str:
    """Does the verifier that agrees more often do more harm, as published? Means over each verifier's runs, by rank."""
    lines = []
    for (task,), runs in grouped(rows, "task").items():
        each = [(fmean(value(row, "rubric_accuracy") for row in of), fmean(row["change"][0] for row in of))
                for of in grouped(runs, "verifier", "verifier_seed").values()]
        wrong = [pair for pair in each if pair[1] < 0]
        lines.append((f"`{task}`", len(each), *(f"{rank_correlation(*zip(*some)) if some else '-'} ({len(some)})"
                                                for some in (each, wrong))))
    return table(("task", "verifiers", "rank correlation of agreement and change", "among those that did harm"), lines)


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> str:
    """Spearman's; a dash where a side does not vary or there are only two pairs."""
    ranks = [[fmean(i for i, other in enumerate(sorted(side)) if other == v) for v in side] for side in (first, second)]
    return f"{correlation(*ranks):+.2f}" if len(first) > 2 and all(len(set(side)) > 1 for side in ranks) else "-"


def report_text(rows: Sequence[Row], coverage: dict[str, Any] | None = None) -> str:
    """The whole table.md."""
    tuned, judged = ([row for row in rows if (row["verifier_seed"] == 0) == first] for first in (True, False))
    chosen, seeds = choose_thresholds(tuned), sorted({row["verifier_seed"] for row in judged})
    kinds = [outcome(row) for row in rows]
    parts = [
        "# Runs of the loop, and how each rule would have called them",
        f"Made by `python tests/evidence/evidence.py`: {len(rows)} runs, all trained with `--force`, "
        f"{len(grouped(rows, 'verifier', 'verifier_seed'))} verifiers and "
        f"{len(grouped(rows, 'student', 'student_seed'))} students, "
        f"{sum(row['seconds'] for row in rows) / 3600:.1f} core hours. A run is harmful if the paired 95 % interval of "
        "its change on held-out items lies below 0, helpful if above: "
        + ", ".join(f"{kinds.count(kind)} {kind}" for kind in OUTCOMES)
        + ". Intervals of shares of runs count verifiers, not runs.",
        "## Runs", run_table(rows), "## The loss", loss_text(rows),
        "## The rules, at the thresholds of gate.py", rule_table(rows, DEFAULTS)]
    parts += ["Harmful runs allowed, by where they were:", part_table(rows)]
    if tuned and judged:
        on = " and ".join(map(str, seeds))
        parts += [f"## The rules, on verifier seeds {on}", f"Thresholds chosen on verifier seed 0, judged on {on}:",
                  rule_table(judged, chosen), "The same runs at the thresholds of gate.py:",
                  rule_table(judged, DEFAULTS)]
    parts += ["## Which measure tells helpful from harmful", "The chance that a helpful run has the larger value than "
              "a harmful one; 0.50 is a coin.", measure_table(rows), "## The margin gate", margin_table(rows),
              "## The direction of the pairs that were trained on", round_table(rows), "## Agreement and damage",
              order_table(rows), "## What the gate after training said", after_text(rows)]
    return "\n\n".join(parts + (["## Simulation", simulation_table(coverage)] if coverage else [])) + "\n"


def simulation_table(coverage: dict[str, Any]) -> str:
    """The lowest and the highest coverage of each interval, and the errors of the direction condition."""
    lines = [(name, len(found), *(f"{100 * bound(found.values()):.1f} %" for bound in (min, max)))
             for name, found in coverage["intervals"].items()]
    errors = coverage["direction"]
    return (table(("95 % interval of", "kinds of data set", "lowest coverage", "highest"), lines)
            + f"\n\n{coverage['data_sets']} data sets of each kind. With {errors['mixed_pairs'][0]} to "
            f"{errors['mixed_pairs'][1]} mixed pairs the direction condition passes q = 0.5 at most "
            f"{100 * errors['most_at_0.5']:.2f} % of the time and q = 0.8 at least "
            f"{100 * errors['least_at_0.8']:.1f} %: exact sums.")


# ---- pictures

def draw(rows: Sequence[Row], folder: Path) -> None:
    """loss.png and rules.png; raises ModuleNotFoundError without matplotlib."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    trained = sorted((row for row in rows if row["loss_first"] is not None), key=lambda row: row["change"][0])
    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(8, 5.5), sharex=True, layout="constrained")
    order = {id(row): place for place, row in enumerate(trained)}
    upper.plot([row["loss_first"] for row in trained], color="grey", label="first step")
    scatter(upper, trained, lambda row: order[id(row)], lambda row: row["loss_last"])
    scatter(lower, trained, lambda row: order[id(row)], lambda row: 100 * row["change"][0])
    lower.axhline(0, color="grey", linewidth=0.8)
    upper.set(title="DPO loss at the first step (line) and at the end (marks)", ylabel="loss")
    lower.set(title="change in held-out accuracy", ylabel="points", xlabel="runs, by the change")
    finish(figure, lower, folder / "loss.png")
    figure, axes = pyplot.subplots(1, len(RULES), figsize=(12, 4.6), sharey=True, layout="constrained")
    for axis, (rule, (words, measure)) in zip(axes, RULES.items()):
        scatter(axis, rows, measure, lambda row: 100 * row["change"][0])
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.axvline(0, color="grey", linewidth=0.8, linestyle=":")
        axis.set(title=rule + " (lets through what is right of the dotted line)", xlabel=words)
        axis.title.set_size("small")
    axes[0].set_ylabel("change in held-out accuracy, points")
    finish(figure, axes[0], folder / "rules.png")


def scatter(axis: Any, rows: Sequence[Row], x: Callable[[Row], float], y: Callable[[Row], float]) -> None:
    """One point a run: its task by colour, its verifier by shape."""
    for (task, verifier), some in grouped(rows, "task", "verifier").items():
        axis.scatter(list(map(x, some)), list(map(y, some)), s=16, alpha=0.6, color=COLOURS.get(task),
                     marker=MARKS.get(verifier, "^"), linewidths=0, label=f"{task}, {verifier}")


def finish(figure: Any, axis: Any, path: Path) -> None:
    """A legend below, and the file."""
    from matplotlib import pyplot
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=5, frameon=False, fontsize="small")
    figure.savefig(path, dpi=90, metadata={"Software": None})
    pyplot.close(figure)


def write_report(rows: Sequence[Row], coverage: dict[str, Any] | None, folder: Path) -> str:
    """Write table.md and, where matplotlib is installed, the pictures; returns the table."""
    text = report_text(rows, coverage)
    (folder / "table.md").write_text(text, encoding="utf-8")
    try:
        draw(rows, folder)
    except ModuleNotFoundError:
        print("no pictures: pip install matplotlib")
    return text

"""The model card of what a run deploys, deploy/README.md: from what, how, measured how, and what it is not for."""
from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from gate import Figure, format_figure
from loop.flags import TrainingFlags
from model.settings import read_settings
from tasks import Item
from tasks.flags import flag_name
from tasks.jsonl import write_whole

BEFORE = {                                              # the gate before training: measure -> what the card calls it
    "rubric_accuracy": "agreement of the verifier with exact match",
    "baseline_accuracy": "mean correctness of the candidates",
    "direction": "q: mixed pairs whose chosen side is the right one",
    "direction_at_margin": "q from the margin gate on",
    "own_answer_accuracy": "the verifier's own answers",
    "greedy_accuracy": "the student's greedy answers",
}
AFTER = {                                               # the gate after it
    "baseline_accuracy": "held-out accuracy, before training",
    "final_accuracy": "held-out accuracy, as deployed",
    "difference": "held-out accuracy, change",
}
JUDGE = {                                               # a judge on held-out pairs
    "heldout_accuracy": "held-out accuracy",
    "both_orders_accuracy": "right in both orders",
    "order_consistency": "both orders name the same response",
    "first_position_rate": "names the response that is shown first",
}
NOT_FOR_STUDENTS = (
    "tasks other than the one above: nothing was measured on them, and answers there may have become worse;",
    "figures on items that it was trained on: only those of the held-out items above tell how well it answers;",
    "judging or filtering other models' answers: it was trained to answer, not to judge;",
    "decisions about people, or any use in which a wrong answer does harm: it was measured by exact match alone, and "
    "neither safety nor bias was looked at.",
)
NOT_FOR_JUDGES = (
    "a verifier that trains a student, before the gate has measured it on that task: "
    "`python gate.py --student S --verifier THIS --task T --verdict pairwise`;",
    "answering questions: training it to judge may have made its own answers worse;",
    "pairs of other kinds than those above: nothing was measured on them;",
    "decisions about people, or any use in which a wrong judgment does harm: neither safety nor bias was looked at.",
)


def write_student_card(candidate: Path, cfg: TrainingFlags, run: Path, world: int, items: Sequence[Item],
                       pre_gate: Mapping[str, Any] | None, post_gate: Mapping[str, Any]) -> None:
    """Write the card of a student that the gate after training promoted into the folder `candidate`.

    `run` is the run's folder, `world` the number of its processes, `items` all that its splits hold. `pre_gate` is None
    where there was no verifier to measure: the student was trained on pairs that existed.
    """
    settings = read_settings(run, "config.json")
    title = f"{Path(cfg.student).name}, trained on {cfg.task}"
    scorer = ("pairs", cfg.pairs) if pre_gate is None else ("verifier", cfg.verifier)
    lines = [
        *head(cfg.student, cfg.task, "dpo"),
        f"# {title}",
        "",
        *before_training(cfg, pre_gate),
        f"## After training: {post_gate['verdict']}",
        "",
        "Does the student, as it is in this folder, answer better than before on items that nothing was trained on?",
        "",
        *figures_table(post_gate, AFTER, signed=("difference",)),
        *bullets(post_gate["reasons"]),
        *origin(cfg, "train.py", world, {
            "student": (cfg.student, settings["reference"]),
            scorer[0]: (scorer[1], settings["scorer"]),
            "data": (data_name(cfg, items), items_digest(items)),
        }),
        *limits(NOT_FOR_STUDENTS),
    ]
    write_whole(candidate / "README.md", "\n".join(lines))


def before_training(cfg: TrainingFlags, pre_gate: Mapping[str, Any] | None) -> list[str]:
    """What the student was trained on, and what was measured before."""
    if pre_gate is None:
        return [f"`{cfg.student}` after DPO on preference pairs that existed, `{cfg.pairs}`. No verifier was asked, so "
                f"nothing was measured before training. Measured on the task `{cfg.task}`.", ""]
    return [
        f"`{cfg.student}` after verifier-guided DPO on the task `{cfg.task}`: it sampled several answers to each "
        f"question, `{cfg.verifier}` scored them, and DPO trained it on the best- and worst-scored one.",
        "",
        f"## Before training: {pre_gate['verdict']}",
        "",
        "May this verifier train this student?",
        "",
        *figures_table(pre_gate, BEFORE),
        *bullets(pre_gate["reasons"]),
    ]


def write_judge_card(candidate: Path, cfg: TrainingFlags, run: Path, world: int, items: Sequence[Item],
                     before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Write the card of a judge into the folder `candidate`: its figures `before` training and `after` it, on held-out
    pairs. The others as for `write_student_card`."""
    task = cfg.task or "bar and red"
    lines = [
        *head(cfg.verifier, task, "judge"),
        f"# {Path(cfg.verifier).name}, a judge trained on {task}",
        "",
        f"`{cfg.verifier}` after {after['iteration']} iterations of training on its own judgments, without labels. No "
        "gate has measured it as a verifier.",
        "",
        "## Held-out pairs, before training",
        "",
        *figures_table(before, JUDGE),
        "## Held-out pairs, as deployed",
        "",
        *figures_table(after, JUDGE),
        *origin(cfg, "judge.py", world, {
            "judge": (cfg.verifier, read_settings(run, "config.json")["judge"]),
            "data": (data_name(cfg, items), items_digest(items)),
        }),
        *limits(NOT_FOR_JUDGES),
    ]
    write_whole(candidate / "README.md", "\n".join(lines))


# ---- the parts of a card

def head(base: str, task: str, kind: str) -> list[str]:
    """The YAML that the Hugging Face hub reads. A model that lies in a folder is called by the folder's name."""
    name = Path(base).resolve().name if Path(base).exists() else base
    tags = json.dumps(["vision-language", "verifier-guided-dpo", kind, f"task:{task}"])     # YAML reads JSON
    return ["---", f"base_model: {json.dumps(name)}", "base_model_relation: finetune", "library_name: transformers",
            "pipeline_tag: image-text-to-text", f"tags: {tags}", "---", ""]


def figures_table(measures: Mapping[str, Any], names: Mapping[str, str], signed: Sequence[str] = ()) -> list[str]:
    """Figures with their 95 % intervals; what was not measured is left out."""
    lines = ["| figure | value and 95 % interval | n |", "|---|---|---|"]
    for name, label in names.items():
        figure: Figure | None = measures.get(name)
        if figure and figure["n"]:
            form = "+.3f" if name in signed else ".3f"
            lines.append(f"| {label} | {format_figure(figure, form)} | {figure['n']} |")
    return [*lines, ""]


def bullets(points: Iterable[str]) -> list[str]:
    """A list."""
    return [*(f"- {point}" for point in points), ""]


def origin(cfg: TrainingFlags, program: str, world: int, sources: Mapping[str, tuple[str, str]]) -> list[str]:
    """The command, and what was read: (name, SHA-256) of each source."""
    lines = ["## How it was made", "", "```", command(cfg, program, world), "```", ""]
    lines += ["| | | SHA-256 |", "|---|---|---|"]
    for role, (name, digest) in sources.items():
        lines.append(f"| {role} | {name} | `{digest}` |")
    return [*lines, ""]


def limits(points: Sequence[str]) -> list[str]:
    """What it must not be used for."""
    return ["## It must not be used for", "", *bullets(points),
            "The licence of the model that it was made from holds for it, too.", ""]


def command(cfg: TrainingFlags, program: str, world: int) -> str:
    """The command line of a run, by the flags that are not at their defaults; the same for a run that was resumed."""
    words = ["python", program]
    if world > 1:
        words = ["torchrun", "--nproc-per-node", str(world), program]
    for entry in fields(cfg):
        value = getattr(cfg, entry.name)
        if value == entry.default or entry.name == "resume":
            continue
        name = flag_name(entry)
        if value is False:
            words.append(f"--no-{name.removeprefix('--')}")
        elif value is True:
            words.append(name)
        else:
            words += [name, str(value)]
    return shlex.join(words)


def data_name(cfg: TrainingFlags, items: Sequence[Item]) -> str:
    """Which data, in words."""
    places = [f"task {cfg.task or 'bar and red'}"]
    places += [f"{name} {value}" for name, value in (("data", cfg.data), ("split", cfg.split)) if value]
    return f"{', '.join(places)}, {len(items)} items"


def items_digest(items: Iterable[Item]) -> str:
    """SHA-256 of items: their ids, prompts, pictures and answers. Neither their order nor their files' names count."""
    lines = []
    for item in items:
        lines.append(repr((item.id, item.prompt, item.answer, sorted(item.picture_hashes))))
    return hashlib.sha256("\n".join(sorted(lines)).encode(errors="replace")).hexdigest()

"""The evidence behind the gates: the loop with verifiers of many kinds, and how each rule would have called the runs.

    python tests/evidence/kinds.py --half choose    the runs on which the rule may be chosen, and their table
    python tests/evidence/kinds.py --half judge     those that judge it, run once the rule was committed
    python tests/evidence/kinds.py --half fresh     twins of some of these with --margin-gates fresh
    python tests/evidence/kinds.py --report         both tables once more, from the committed lines
    python tests/evidence/kinds.py --quick          a toy version of everything, into a temporary folder

A run takes one verifier through the whole loop with --force: one of the draws of a kind (see kinds_verifiers.py), or a
trained checkpoint. Students alternate, and the tasks bar and red. Whether the run was harmful or helpful is judged
on items that no gate, no watch split and no training of it has seen. What the gates said is kept beside it, one JSON
line a run in kinds.jsonl; runs that it holds are not repeated. The students and verifiers that are not shipped are
trained by loop/make_tiny.py. The whole takes some three core hours.
"""
from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import evidence
from evidence import add_runs, make_missing, model_folder, rounded, short_figure
from evidence_rules import Row, read_runs
from kinds_report import write_report
from kinds_verifiers import KINDS, Spoiled, make_verifier
from tasks.flags import flag, parse_flags

DRAWS = {"choose": 4, "judge": 15}                      # of each kind
STUDENTS = (("student", 0), ("student", 1), ("student-weak", 0), ("student", 2), ("student", 3), ("student-weak", 1),
            ("student", 4))
TASKS = ("bar", "red")
# kind -> (half, the checkpoint of evidence.py, of three seeds)
TRAINED = {
    "trained, stopped early": ("choose", "verifier-early"),
    "trained, blind to colour": ("judge", "verifier"),
    "trained, knows both": ("judge", "verifier-0"),
}
FRESH = ("overconfident", "noise, q 0.75 to 0.95", "other quantity", "trained, blind to colour")    # and some draws:
FRESH_DRAWS = 5
PILOT = 20                                              # steps of the gate's own
LONG_PILOT = 60                                         # of another one, which was tried on the half to choose on
ITEMS = 4096                                            # of a task, from which a run's splits are cut; those behind
JUDGING = 1000                                          # these judge the run
LOOP = {"watch_items": 100, "trained_on_items": 20, "eval_every": 20, "save_every": 1000, "probe_items": 200,
        "pilot_steps": PILOT}
QUICK = {"gate_items": 12, "watch_items": 8, "held_out_items": 20, "trained_on_items": 4, "rounds": 2,
         "items_per_round": 24, "steps_per_round": 2, "min_pairs": 1, "probe_items": 12, "pilot_steps": 1,
         "pilot_items": 20}


@dataclass(frozen=True)
class Config(evidence.Config):
    half: str = flag("choose", "which runs", choices=("choose", "judge", "fresh"))


@dataclass(frozen=True)
class Setting:
    """What one run differs in from another."""
    kind: str
    draw: int
    gates: str = "replay"                               # what the margin gate gates

    @property
    def task(self) -> str:
        return TASKS[self.draw % len(TASKS)]

    @property
    def student(self) -> tuple[str, int]:
        """Its name among evidence.MODELS, and its seed."""
        return STUDENTS[self.draw % len(STUDENTS)]

    @property
    def verifier(self) -> tuple[str, int]:
        """The checkpoint that is loaded; where the verifier is a function, it is never asked."""
        if self.kind in TRAINED:
            return TRAINED[self.kind][1], self.draw % 3
        return "verifier", 0

    @property
    def half(self) -> str:
        return TRAINED[self.kind][0] if self.kind in TRAINED else KINDS[self.kind].half


def main() -> int:
    cfg = parse_flags(Config, __doc__)
    if not cfg.quick:
        return run(cfg, settings_of(cfg.half), LOOP)
    with tempfile.TemporaryDirectory() as folder:
        toy = replace(cfg, results=f"{folder}/results", work=f"{folder}/work")
        return run(toy, [Setting("form lover", 0), Setting("noise, q 0.75 to 0.95", 7)], QUICK)


def settings_of(half: str) -> list[Setting]:
    """The runs of "choose" and of "judge"; "fresh": twins of some of the latter."""
    if half == "fresh":
        return [Setting(kind, draw, "fresh") for kind in FRESH for draw in range(FRESH_DRAWS)]
    kinds = [kind for kind in (*KINDS, *TRAINED) if Setting(kind, 0).half == half]
    return [Setting(kind, draw) for draw in range(DRAWS[half]) for kind in kinds]


def run(cfg: Config, settings: Sequence[Setting], loop: dict[str, int]) -> int:
    """Make what is missing, then the tables."""
    path = Path(cfg.results) / "kinds.jsonl"
    if not cfg.report:
        path.parent.mkdir(parents=True, exist_ok=True)
        done = {run_key(row) for row in read_runs(path)}
        missing = [setting for setting in settings if run_key(asdict(setting)) not in done]
        make_models(cfg, missing)
        make_runs(cfg, loop, missing, path)

    rows = read_runs(path)
    if not rows:
        print(f"kinds.py: there are no runs in {path}", file=sys.stderr)
        return 1
    print(write_report(rows, Path(cfg.results) / "kinds.md"))
    return 0


def run_key(row: Row) -> tuple[str, int, str]:
    """What a run differs in from another."""
    return row["kind"], row["draw"], row["gates"]


def make_models(cfg: Config, settings: Sequence[Setting]) -> None:
    """Train the students and verifiers that are needed and not there."""
    needed: dict[tuple[str, int], None] = {}            # an ordered set
    for setting in settings:
        needed[setting.student] = None
        needed[setting.verifier] = None
    make_missing(cfg, needed)


def make_runs(cfg: Config, loop: dict[str, int], settings: Sequence[Setting], path: Path) -> None:
    """Train with each setting."""
    def told(row: Row) -> str:
        return f"{row['kind']} {row['draw']} gate {row['gate']}, {row['change'][0]:+.3f}"

    add_runs(path, partial(one_run, cfg, loop), settings, cfg.workers, run_key, told)


# ---- one run

def one_run(cfg: Config, loop: dict[str, int], setting: Setting) -> Row:
    """Train in this process, and keep of the run's folder nothing but its line. What it printed is kept if it fails."""
    import train
    start = perf_counter()
    folder = Path(cfg.work) / "unfinished" / f"{setting.kind} {setting.draw} {setting.gates}".replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    flags = train.Config(
        task=setting.task,
        force=True,
        out=str(folder / "run"),
        seed=setting.draw,
        margin_gates=setting.gates,
        student=str(model_folder(cfg, *setting.student)),
        verifier=str(model_folder(cfg, *setting.verifier)),
        device="cpu",
        **loop)
    seen: dict[str, Any] = {}
    parameters: dict[str, Any] = {}
    with ExitStack() as stack:
        if setting.kind in KINDS:
            parameters, spoiled = make_verifier(setting.kind, setting.draw)
            stack.enter_context(asked_instead(spoiled))
        stack.enter_context(looked_at(seen, setting))
        log = stack.enter_context(open(folder / "log.txt", "w", encoding="utf-8"))
        stack.enter_context(redirect_stdout(log))
        stack.enter_context(redirect_stderr(log))
        ranks = stack.enter_context(train.Ranks("cpu"))
        train.main(flags, ranks)

    row = asdict(setting) | {"half": setting.half, "task": setting.task,
                             "student": "-".join(map(str, setting.student)), "parameters": parameters}
    row |= read_summary(folder / "run") | seen | {"seconds": round(perf_counter() - start, 1)}
    shutil.rmtree(folder)
    return row


@contextmanager
def asked_instead(spoiled: Spoiled) -> Iterator[None]:
    """Inside, this function stands for the verifier wherever train.py asks it for scores. It answers no question
    itself, so that its own answers are not measured."""
    import loop.gates
    import loop.side_by_side
    import train
    from verifier import Score

    def score(run: Any, verifier: Any, items: Any, candidates: Any) -> list[list[Score]]:
        texts = [[completion.text for completion in row] for row in candidates]
        return verdicts(run, verifier, items, texts, "json")

    def verdicts(run: Any, verifier: Any, items: Any, texts: Any, kind: str) -> list[list[Score]]:
        rows = []
        for item, row in zip(items, texts, strict=True):
            rows.append([Score(value, "") for value in spoiled(item, row)])
        return rows

    def without_own_answers(*args: Any) -> list[Any]:
        records = make_records(*args)
        for record in records:
            for name in ("own_correct", "own_parsed", "own_truncated"):
                record[name] = None
        return records

    make_records = loop.gates.make_records
    with (patch.object(train, "score", score), patch.object(loop.side_by_side, "verdicts", verdicts),
          patch.object(loop.gates, "make_records", without_own_answers)):
        yield


@contextmanager
def looked_at(seen: dict[str, Any], setting: Setting) -> Iterator[None]:
    """Inside, train.py notes in `seen` what it does not keep itself: the longer pilot, and the trained student's
    answers to the items that judge it, compared with the frozen one's."""
    import loop.gates
    import train

    def pilots(run: Any, *args: Any) -> Any:
        found = run_pilot(run, *args)
        seen["pilots"] = {run.cfg.pilot_steps: pilot_figures(found)}
        if setting.half == "choose":
            cfg = run.cfg
            run.cfg = replace(cfg, pilot_steps=LONG_PILOT)
            seen["pilots"][LONG_PILOT] = pilot_figures(run_pilot(run, *args))
            run.cfg = cfg
        return found

    def judged_gate(run: Any, student: Any, *args: Any) -> Any:
        frozen = frozen_answers(run.cfg.student, setting.task)
        after = answers(student, setting.task)
        seen.update(compared(frozen, after))
        return deploy_gate(run, student, *args)

    run_pilot = loop.gates.run_pilot
    deploy_gate = train.deploy_gate
    with patch.object(loop.gates, "run_pilot", pilots), patch.object(train, "deploy_gate", judged_gate):
        yield


def pilot_figures(pilot: Any) -> dict[str, Any]:
    """What a line keeps of a pilot."""
    names = ("pairs", "accuracy_before", "accuracy_after", "p_accuracy_fell", "parse_rate_before", "parse_rate_after",
             "p_parse_rate_fell", "seconds")
    return {name: rounded(getattr(pilot, name)) for name in names}


@cache
def judging_items(task: str) -> list[Any]:
    """Items behind those that a run's splits are cut from."""
    from eval import load_task
    return load_task(task, limit=ITEMS + JUDGING)[ITEMS:]


def answers(student: Any, task: str) -> list[Any]:
    """The student's greedy answers to the items that judge it, scored."""
    from eval import score_answers
    from model import generate
    items = judging_items(task)
    completions = generate(student, [item.chat() for item in items], max_new_tokens=16, temperature=0, batch_size=64)
    return score_answers(items, [completion for [completion] in completions])


@cache
def frozen_answers(folder: str, task: str) -> list[Any]:
    """The same of a student that was not trained."""
    from model import load_vlm
    return answers(load_vlm(folder), task)


def compared(frozen: Sequence[Any], trained: Sequence[Any]) -> Row:
    """Accuracy before and after, its paired change, and the parse rates, on the items that judge a run."""
    from gate import paired_difference
    before = [answer.correct for answer in frozen]
    after = [answer.correct for answer in trained]
    return {
        "before": rounded(sum(before) / len(before)),
        "after": rounded(sum(after) / len(after)),
        "change": short_figure(paired_difference(before, after)),
        "read": [sum(answer.answer is not None for answer in answers) for answers in (frozen, trained)],
    }


def read_summary(folder: Path) -> Row:
    """What a line keeps of a run's summary.json; a figure becomes [value, low, high, n]."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    before = summary["pre_gate"]
    after = summary["post_gate"]
    rounds = []
    for counts in summary["rounds"]:
        rounds.append([counts[name] for name in ("pairs", "above_margin", "mixed", "right_way")])
    probes = []
    for probe in summary["probes"]:
        probes.append([probe["pairs"], *short_figure(probe["direction"]), probe["chosen_unread"],
                       probe["rejected_unread"], rounded(probe["p_form"])])
    names = ("baseline_accuracy", "rubric_accuracy", "direction", "direction_at_margin", "own_difference")
    measures = {name: short_figure(before[name]) if before.get(name) else None for name in names}
    return {
        "gate": before["verdict"],
        "reasons": before["reasons"],
        "published_gate": before["published_verdict"],
        "measures": measures,
        "form": {name: rounded(value) for name, value in before["form"].items()},
        "rounds": rounds,
        "probes": probes,
        "warnings": len([text for text in summary["warnings"] if text.startswith("step ")]),
        "gate_after": after["verdict"],
        "loss_first": rounded(summary["loss_first"]),
        "loss_last": rounded(summary["loss_last"]),
    }


if __name__ == "__main__":
    sys.exit(main())

"""The evidence behind the gates: many runs of the loop with --force, and how each rule would have called them.

    python tests/evidence/evidence.py               models, runs, simulation, report; stopped and called again, it goes on
    python tests/evidence/evidence.py --report      table.md and the pictures once more, from the committed runs.jsonl
    python tests/evidence/evidence.py --quick       a toy version of everything in a minute, into a temporary folder

    models        5 students, a weak one, 4 x 3 verifiers: what is not shipped, loop/make_tiny.py trains
    runs          tasks x verifiers x students x margin gate on (tau 0.5) and off (tau 0): one JSON line a run
    simulation    coverage of every interval of gate.py over data sets in which candidates cluster by item
    report        table.md; loss.png; rules.png

The whole takes about an hour and a quarter on two cores. Runs that --results holds are not repeated: to repeat them,
name another folder. `verifier-0` and `verifier-50` understand both tasks; `verifier` takes all shapes for red ones;
`verifier-early` is a `verifier-0` whose training to grade was stopped early, so it answers well and grades badly.
`student-weak` has had half the steps. The third task, count, is left out: the student, never trained on its question,
starts at chance.
"""
from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers"), str(ROOT / "tests" / "gate")]

from evidence_report import Row, read_runs, write_report  # noqa: E402
from tasks.flags import check_ranges, flag, parse_flags  # noqa: E402
from tasks.jsonl import write_whole  # noqa: E402

TINY = ROOT / "model" / "tiny"
MEASURES = ("baseline_accuracy", "rubric_accuracy", "balanced_accuracy", "accept_rate", "parse_rate", "direction",
            "mixed_share", "pick_lift", "own_answer_accuracy", "greedy_accuracy")
# name -> the checkpoint of make_tiny.py, and what it is trained with besides the defaults
MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "student": ("student", ()), "student-weak": ("student", ("--student-steps", "60")),
    "verifier-0": ("verifier-0", ()), "verifier-50": ("verifier-50", ()), "verifier": ("verifier", ()),
    "verifier-early": ("verifier-0", ("--verdict-steps", "200"))}
VERIFIERS = ("verifier-0", "verifier-50", "verifier", "verifier-early")


@dataclass(frozen=True)
class Config:
    results: str = flag(str(RESULTS), "folder of runs.jsonl, coverage.json, the table and the pictures")
    work: str = flag(str(ROOT / "runs" / "evidence"), "folder of the models, and of runs while they last")
    workers: int = flag(os.cpu_count() or 1, "processes, of one thread each", low=1)
    report: bool = flag(False, "only make the table and the pictures again, from what the results folder holds")
    quick: bool = flag(False, "a toy version, in a temporary folder: does everything run?")

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Setting:
    """What tells one run from another."""
    task: str
    verifier: str                                       # of MODELS
    verifier_seed: int
    student: str                                        # of MODELS
    student_seed: int                                   # the run's seed, too
    verdict: str
    min_margin: float

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in asdict(self).values())


@dataclass(frozen=True)
class Plan:
    """Which runs, and of what size."""
    settings: tuple[Setting, ...]
    make: tuple[str, ...]                               # flags of make_tiny.py
    loop: dict[str, int]                                # fields of train.Config
    data_sets: int                                      # simulated, of each kind
    truth_items: int                                    # of the data set that stands for the truth


def whole_plan() -> Plan:
    """Student 0 meets all verifiers, students 1 to 4 one of each kind; expected scores with the margin gate on and off,
    decoded ones, of which tau drops next to none, with it on."""
    all_seeds, one_each = [(0, 0), (0, 1), (0, 2)], [(1, 1), (2, 2), (3, 0), (4, 1)]        # of student and verifier

    def grid(student: str, seeds: list[tuple[int, int]], verdict: str, tau: float) -> Iterable[Setting]:
        for (mine, other), task, verifier in product(seeds, ("bar", "red"), VERIFIERS):
            yield Setting(task, verifier, other, student, mine, verdict, tau)
    settings = (*grid("student", all_seeds + one_each, "logits", 0.5), *grid("student", all_seeds, "logits", 0.0),
                *grid("student-weak", all_seeds, "json", 0.5), *grid("student", all_seeds, "json", 0.5),
                *grid("student", one_each, "logits", 0.0))
    loop = {"watch_items": 100, "trained_on_items": 100, "eval_every": 60, "save_every": 1000}
    return Plan(settings, (), loop, 1000, 20_000)


def quick_plan() -> Plan:
    """Four runs of two steps on models that have hardly been trained."""
    settings = (Setting(task, "verifier", seed, "student", 1, "logits", 0.5) for task in ("bar", "red")
                for seed in range(2))
    steps = ("--tower-steps", "2", "--student-steps", "2", "--answer-steps", "1", "--verdict-steps", "1")
    loop = {"gate_items": 12, "watch_items": 8, "held_out_items": 40, "trained_on_items": 4, "rounds": 1,
            "items_per_round": 40, "steps_per_round": 2, "min_pairs": 1}
    return Plan(tuple(settings), steps, loop, 10, 200)


def main() -> int:
    cfg = parse_flags(Config, __doc__)
    if not cfg.quick:
        return run(cfg, whole_plan())
    with tempfile.TemporaryDirectory() as folder:
        return run(replace(cfg, results=f"{folder}/results", work=f"{folder}/work"), quick_plan())


def run(cfg: Config, plan: Plan) -> int:
    """Make what is missing, then the report."""
    results = Path(cfg.results)
    runs, coverage = results / "runs.jsonl", results / "coverage.json"
    if not cfg.report:
        results.mkdir(parents=True, exist_ok=True)
        done = {row_key(row) for row in read_runs(runs)}
        missing = [setting for setting in plan.settings if row_key(asdict(setting)) not in done]
        make_models(cfg, plan, missing)
        make_runs(cfg, plan, missing, runs)
        if not coverage.is_file():
            simulate(cfg, plan, coverage)
    rows, found = read_runs(runs), json.loads(coverage.read_text(encoding="utf-8")) if coverage.is_file() else None
    if not rows:
        print(f"evidence.py: there are no runs in {runs}", file=sys.stderr)
        return 1
    print(write_report(rows, found, results))
    return 0


def row_key(row: Row) -> tuple:
    """The settings of a line of runs.jsonl."""
    return tuple(row[name] for name in Setting.__dataclass_fields__)


# ---- models

def model_folder(cfg: Config, name: str, seed: int) -> Path:
    """Where a checkpoint lies: those of seed 0 that model/tiny ships there, the others in the work folder."""
    made, flags = MODELS[name]
    return TINY / made if seed == 0 and not flags else Path(cfg.work) / "models" / f"{name}-seed-{seed}" / made


def needed_models(settings: Iterable[Setting]) -> list[tuple[str, int]]:
    """Name and seed of every model that these runs take."""
    return list(dict.fromkeys(pair for s in settings
                              for pair in ((s.verifier, s.verifier_seed), (s.student, s.student_seed))))


def make_models(cfg: Config, plan: Plan, settings: Iterable[Setting]) -> None:
    """Train the checkpoints that are needed and not there, each in a process of its own."""
    def make(name: str, seed: int) -> None:
        folder = model_folder(cfg, name, seed)
        words = ["--only", folder.name, "--seed", str(seed), "--out", str(folder.parent), *MODELS[name][1], *plan.make]
        subprocess.run([sys.executable, "-m", "loop.make_tiny", *words], check=True, cwd=ROOT, env=one_thread(),
                       stdout=subprocess.DEVNULL)
        print(f"made {folder}", flush=True)
    with ThreadPoolExecutor(cfg.workers) as pool:
        for job in [pool.submit(make, *pair) for pair in needed_models(settings)
                    if not model_folder(cfg, *pair).exists()]:
            job.result()


def one_thread() -> dict[str, str]:
    """The environment of a process that leaves the other cores to the others."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


# ---- runs

def make_runs(cfg: Config, plan: Plan, settings: Sequence[Setting], path: Path) -> None:
    """Train with each setting; the file is written anew, whole, as soon as a run has ended."""
    os.environ |= one_thread()                          # for the workers, which import torch
    start, rows = perf_counter(), read_runs(path)
    with ProcessPoolExecutor(cfg.workers, multiprocessing.get_context("spawn"), begin_worker) as pool:
        jobs = [pool.submit(one_run, cfg, plan.loop, setting) for setting in settings]
        try:
            for number, job in enumerate(as_completed(jobs), 1):
                row = job.result()
                rows.append(row)
                write_whole(path, "".join(json.dumps(each) + "\n" for each in sorted(rows, key=row_key)))
                print(f"run {number} of {len(jobs)}, {perf_counter() - start:.0f} s: {Setting(*row_key(row)).name} "
                      f"from {row['baseline'][0]:.3f} to {row['final'][0]:.3f}", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)


def begin_worker() -> None:
    """One thread; a task's items, which take seconds to draw, are drawn once."""
    import torch

    import train
    torch.set_num_threads(1)
    train.load_task = cache(train.load_task)


def one_run(cfg: Config, loop: dict[str, int], setting: Setting) -> Row:
    """Train in this process, and keep of the run's folder nothing but its line. What it printed is kept if it fails."""
    import train
    folder, start = Path(cfg.work) / "unfinished" / setting.name, perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    flags = train.Config(task=setting.task, force=True, out=str(folder / "run"), seed=setting.student_seed,
                         student=str(model_folder(cfg, setting.student, setting.student_seed)),
                         verifier=str(model_folder(cfg, setting.verifier, setting.verifier_seed)),
                         min_margin=setting.min_margin, verdict=setting.verdict, device="cpu", **loop)
    with open(folder / "log.txt", "w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        with train.Ranks("cpu") as ranks:
            train.main(flags, ranks)
    row = asdict(setting) | read_summary(folder / "run") | {"seconds": round(perf_counter() - start, 1)}
    shutil.rmtree(folder)
    return row


def read_summary(folder: Path) -> Row:
    """What a line of runs.jsonl keeps of a run's summary.json; a figure becomes [value, low, high, n]."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    before, after, rounds = summary["pre_gate"], summary["post_gate"], summary["rounds"]
    answers = [json.loads(line) for line in (folder / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]

    def figure(found: dict[str, Any]) -> list[float]:
        return [round(v, 4) if isinstance(v, float) else v for v in (found[k] for k in ("value", "low", "high", "n"))]
    return {"gate": before["verdict"], "published_gate": before["published_verdict"], "gate_after": after["verdict"],
            "baseline": figure(after["baseline_accuracy"]), "final": figure(after["final_accuracy"]),
            "change": figure(after["difference"]),
            "parsed": [sum(a[side]["answer"] is not None for a in answers) for side in ("frozen", "trained")],
            **{name: summary[name] and round(summary[name], 4) for name in ("loss_first", "loss_last")},
            "diagnosis": after["diagnosis"], "steps": summary["steps"], "warnings": len(summary["warnings"]),
            "rounds": [[r[name] for name in ("pairs", "above_margin", "mixed", "right_way")] for r in rounds],
            "measures": {name: figure(before[name]) for name in MEASURES},
            "by_margin": [[each["min_margin"], figure(each["direction"])[0], each["mixed"], each["pairs"]]
                          for each in before["direction_by_margin"]]}


# ---- simulation

def simulate(cfg: Config, plan: Plan, path: Path) -> None:
    """Write coverage.json, whole or not at all."""
    import evidence_simulate
    with ProcessPoolExecutor(cfg.workers, multiprocessing.get_context("spawn")) as pool:
        found = evidence_simulate.simulate(plan.data_sets, plan.truth_items, pool)
    write_whole(path, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

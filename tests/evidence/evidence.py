"""The evidence behind the gates: many runs of the loop with --force, and how each rule would have called them.

    python tests/evidence/evidence.py               models, runs, simulation, report; called again, it goes on
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

from evidence_report import write_report
from evidence_rules import Row, read_runs
from tasks.flags import check_ranges, flag, parse_flags
from tasks.jsonl import write_whole

TINY = ROOT / "model" / "tiny"
MEASURES = ("baseline_accuracy", "rubric_accuracy", "balanced_accuracy", "accept_rate", "parse_rate", "direction",
            "mixed_share", "pick_lift", "own_answer_accuracy", "greedy_accuracy")
# name -> the checkpoint of make_tiny.py, and the flags it is trained with
MODELS: dict[str, tuple[str, tuple[str, ...]]] = {
    "student": ("student", ()),
    "student-weak": ("student", ("--student-steps", "60")),
    "verifier-0": ("verifier-0", ()),
    "verifier-50": ("verifier-50", ()),
    "verifier": ("verifier", ()),
    "verifier-early": ("verifier-0", ("--verdict-steps", "200")),
}
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
    """What one run differs in from another."""
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
    """Which runs, and how large everything is."""
    settings: tuple[Setting, ...]
    make: tuple[str, ...]                               # flags of make_tiny.py
    loop: dict[str, int]                                # fields of train.Config
    data_sets: int                                      # simulated ones of each kind
    truth_items: int                                    # items of the data set that stands for the truth


def whole_plan() -> Plan:
    """Student 0 meets all verifiers, students 1 to 4 one of each kind; expected scores with the margin gate on and off,
    decoded ones, of which tau drops next to none, with it on."""
    all_seeds = [(0, 0), (0, 1), (0, 2)]                # of the student and of the verifier
    one_each = [(1, 1), (2, 2), (3, 0), (4, 1)]
    settings = (
        *grid("student", all_seeds + one_each, "logits", 0.5),
        *grid("student", all_seeds, "logits", 0.0),
        *grid("student-weak", all_seeds, "json", 0.5),
        *grid("student", all_seeds, "json", 0.5),
        *grid("student", one_each, "logits", 0.0),
    )
    loop = {"watch_items": 100, "trained_on_items": 100, "eval_every": 60, "save_every": 1000}
    return Plan(settings, make=(), loop=loop, data_sets=1000, truth_items=20_000)


def grid(student: str, seeds: list[tuple[int, int]], verdict: str, tau: float) -> Iterator[Setting]:
    """The settings of a student on both tasks with every verifier, for each pair of seeds."""
    for (student_seed, verifier_seed), task, verifier in product(seeds, ("bar", "red"), VERIFIERS):
        yield Setting(
            task=task,
            verifier=verifier,
            verifier_seed=verifier_seed,
            student=student,
            student_seed=student_seed,
            verdict=verdict,
            min_margin=tau)


def quick_plan() -> Plan:
    """Four runs of two steps on models that have hardly been trained."""
    settings = []
    for task, verifier_seed in product(("bar", "red"), range(2)):
        settings.append(Setting(task, "verifier", verifier_seed, "student", 1, "logits", 0.5))
    make = ("--tower-steps", "2", "--student-steps", "2", "--answer-steps", "1", "--verdict-steps", "1")
    loop = {"gate_items": 12, "watch_items": 8, "held_out_items": 40, "trained_on_items": 4, "rounds": 1,
            "items_per_round": 40, "steps_per_round": 2, "min_pairs": 1}
    return Plan(tuple(settings), make=make, loop=loop, data_sets=10, truth_items=200)


def main() -> int:
    cfg = parse_flags(Config, __doc__)
    if not cfg.quick:
        return run(cfg, whole_plan())
    with tempfile.TemporaryDirectory() as folder:
        return run(replace(cfg, results=f"{folder}/results", work=f"{folder}/work"), quick_plan())


def run(cfg: Config, plan: Plan) -> int:
    """Make what is missing, then the report."""
    results = Path(cfg.results)
    runs_path = results / "runs.jsonl"
    coverage_path = results / "coverage.json"
    if not cfg.report:
        results.mkdir(parents=True, exist_ok=True)
        done = {row_key(row) for row in read_runs(runs_path)}
        missing = [setting for setting in plan.settings if row_key(asdict(setting)) not in done]
        make_models(cfg, plan, missing)
        make_runs(cfg, plan, missing, runs_path)
        if not coverage_path.is_file():
            simulate(cfg, plan, coverage_path)

    rows = read_runs(runs_path)
    if not rows:
        print(f"evidence.py: there are no runs in {runs_path}", file=sys.stderr)
        return 1
    coverage = json.loads(coverage_path.read_text(encoding="utf-8")) if coverage_path.is_file() else None
    print(write_report(rows, coverage, results))
    return 0


def row_key(row: Row) -> tuple:
    """The settings of a line of runs.jsonl."""
    return tuple(row[name] for name in Setting.__dataclass_fields__)


# ---- models

def model_folder(cfg: Config, name: str, seed: int) -> Path:
    """Where a checkpoint lies: those of seed 0 that model/tiny ships there, the others in the work folder."""
    checkpoint, flags = MODELS[name]
    if seed == 0 and not flags:
        return TINY / checkpoint
    return Path(cfg.work) / "models" / f"{name}-seed-{seed}" / checkpoint


def needed_models(settings: Iterable[Setting]) -> list[tuple[str, int]]:
    """Name and seed of every model that these runs take."""
    needed: dict[tuple[str, int], None] = {}            # an ordered set
    for setting in settings:
        needed[setting.verifier, setting.verifier_seed] = None
        needed[setting.student, setting.student_seed] = None
    return list(needed)


def make_models(cfg: Config, plan: Plan, settings: Iterable[Setting]) -> None:
    """Train the checkpoints that these runs take and that are not there."""
    make_missing(cfg, needed_models(settings), plan.make)


def make_missing(cfg: Config, models: Iterable[tuple[str, int]], make: Sequence[str] = ()) -> None:
    """Train those checkpoints, by name and seed, that are not there, each in a process of its own."""
    with ThreadPoolExecutor(cfg.workers) as pool:
        jobs = []
        for name, seed in models:
            if not model_folder(cfg, name, seed).exists():
                jobs.append(pool.submit(make_model, cfg, make, name, seed))
        for job in jobs:
            job.result()                                # raises what went wrong


def make_model(cfg: Config, make: Sequence[str], name: str, seed: int) -> None:
    """Train one checkpoint; `make`: more flags of make_tiny.py."""
    _, flags = MODELS[name]
    folder = model_folder(cfg, name, seed)
    words = ["--only", folder.name, "--seed", str(seed), "--out", str(folder.parent), *flags, *make]
    subprocess.run(
        [sys.executable, "-m", "loop.make_tiny", *words], check=True, cwd=ROOT, env=one_thread(),
        stdout=subprocess.DEVNULL)
    print(f"made {folder}", flush=True)


def one_thread() -> dict[str, str]:
    """The environment of a process that leaves the other cores to the others."""
    return os.environ | {"OMP_NUM_THREADS": "1"}


# ---- runs

def make_runs(cfg: Config, plan: Plan, settings: Sequence[Setting], path: Path) -> None:
    """Train with each setting."""
    def told(row: Row) -> str:
        return f"{Setting(*row_key(row)).name} from {row['baseline'][0]:.3f} to {row['final'][0]:.3f}"

    add_runs(path, partial(one_run, cfg, plan.loop), settings, cfg.workers, row_key, told)


def add_runs(path: Path, one_run: Callable[[Any], Row], settings: Sequence[Any], workers: int,
             key: Callable[[Row], tuple], told: Callable[[Row], str]) -> None:
    """Add one_run(setting) of each setting to a file of runs; it is written anew, whole, as soon as a run has ended.

    `key`: the order of the file's lines; `told`: what is printed of a run.
    """
    os.environ |= one_thread()                          # for the workers, which import torch
    start = perf_counter()
    rows = read_runs(path)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), begin_worker) as pool:
        jobs = [pool.submit(one_run, setting) for setting in settings]
        try:
            for number, job in enumerate(as_completed(jobs), 1):
                row = job.result()
                rows.append(row)
                lines = [json.dumps(each) + "\n" for each in sorted(rows, key=key)]
                write_whole(path, "".join(lines))
                print(f"run {number} of {len(jobs)}, {perf_counter() - start:.0f} s: {told(row)}", flush=True)
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
    start = perf_counter()
    folder = Path(cfg.work) / "unfinished" / setting.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    flags = train.Config(
        task=setting.task,
        force=True,
        pilot_steps=0,
        out=str(folder / "run"),
        seed=setting.student_seed,
        student=str(model_folder(cfg, setting.student, setting.student_seed)),
        verifier=str(model_folder(cfg, setting.verifier, setting.verifier_seed)),
        min_margin=setting.min_margin,
        verdict=setting.verdict,
        device="cpu",
        **loop)
    with open(folder / "log.txt", "w", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        with train.Ranks("cpu") as ranks:
            train.main(flags, ranks)

    seconds = round(perf_counter() - start, 1)
    row = asdict(setting) | read_summary(folder / "run") | {"seconds": seconds}
    shutil.rmtree(folder)
    return row


def read_summary(folder: Path) -> Row:
    """What a line of runs.jsonl keeps of a run's summary.json; a figure becomes [value, low, high, n]."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    before = summary["pre_gate"]
    after = summary["post_gate"]
    rounds = []
    for counts in summary["rounds"]:
        rounds.append([counts[name] for name in ("pairs", "above_margin", "mixed", "right_way")])
    measures = {name: short_figure(before[name]) for name in MEASURES}
    measures["direction"] = short_figure(before["direction_at_margin"])         # q(tau), as in all lines
    by_margin = []
    for entry in before["direction_by_margin"]:
        q = short_figure(entry["direction"])[0]
        by_margin.append([entry["min_margin"], q, entry["mixed"], entry["pairs"]])
    return {
        "gate": before["verdict"],
        "published_gate": before["published_verdict"],
        "gate_after": after["verdict"],
        "baseline": short_figure(after["baseline_accuracy"]),
        "final": short_figure(after["final_accuracy"]),
        "change": short_figure(after["difference"]),
        "parsed": count_parsed(folder / "held_out.jsonl"),
        "loss_first": rounded(summary["loss_first"]),
        "loss_last": rounded(summary["loss_last"]),
        "diagnosis": after["diagnosis"],
        "steps": summary["steps"],
        "warnings": len(summary["warnings"]),
        "rounds": rounds,
        "measures": measures,
        "by_margin": by_margin,
    }


def short_figure(figure: dict[str, Any]) -> list[float | None]:
    """[value, low, high, n] of a figure, to four decimals."""
    return [rounded(figure[name]) for name in ("value", "low", "high", "n")]


def rounded(value: float | None) -> float | None:
    """Four decimals of a float; None and whole numbers as they are."""
    return round(value, 4) if isinstance(value, float) else value


def count_parsed(path: Path) -> list[int]:
    """How many held-out answers could be read, of the frozen student's and of the trained one's."""
    answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    counts = []
    for side in ("frozen", "trained"):
        counts.append(sum(answer[side]["answer"] is not None for answer in answers))
    return counts


# ---- simulation

def simulate(cfg: Config, plan: Plan, path: Path) -> None:
    """Write coverage.json, whole or not at all."""
    import evidence_simulate
    with ProcessPoolExecutor(cfg.workers, multiprocessing.get_context("spawn")) as pool:
        coverage = evidence_simulate.simulate(plan.data_sets, plan.truth_items, pool)
    write_whole(path, json.dumps(coverage, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

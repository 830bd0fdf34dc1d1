"""Speed and memory beside what one would use instead.

    python tests/bench/bench.py [--json FILE] [--lines NAME ...] [--quick]

    line              ours                                              the peer
    dpo_step          reference once a pair, then two steps over it     TRL's DPOTrainer, checkpointing off, two epochs
    dpo_step_bf16     the same in bf16 (weights fp32)                   the same under bf16 autocast
    dpo_memory        peak of that, above the imports                   the same (dpo_memory_bf16: in bf16)
    sampling          generate: n samples a picture and question        transformers' generate, num_return_sequences = n
    dpo_tokens        the same in tokens of [prompt | chosen] and [prompt | rejected], however often they are computed
    scoring           score_candidates: JSON verdicts of n candidates   transformers' generate on the n rubric prompts
    scoring_logits    expected_scores: nothing is decoded               the same
    logprob_*         dpo.sequence_logps, forward and backward          log_softmax of the full logits
    preprocessing     the processor's pictures                          transformers' PIL image processor
    host_time         from an item to its packed row, its picture       TRL's data set and its collator for pictures, as
                      (1024 x 1024, a PNG) met before                   at every step
    gate              gate.py's survey: a student and one verifier       none
    load_*            load_vlm without its processor                    from_pretrained
    answer_*          the scorers of tasks/ on 10,000 responses, and the slowest hostile response of 1 MB: no peer

Same machine, weights, pictures, tokens and run. Both sides train the language model, the vision tower is frozen. Every
side runs in a process of its own under the same allocator settings (stock glibc returns large blocks to the system at
every step, which costs both sides much time); it warms up once, runs three times, and the median counts. Where a figure
can be checked (token ids, pixels, log-probabilities), the two sides must agree, else the run fails. "of ceiling" is our
floors over our seconds: the time in which a large matrix product of this run does our floating-point operations, and
that in which a large copy moves what a decode step must read (weights, the prompts' keys and values once a row, each
sample's own; floors.py), or a file's bytes.

On CPU: about 100M parameters in Qwen3-VL's layout with its vocabulary, random weights, pictures of 448 x 448.
On CUDA: the configuration of Qwen3-VL-2B with random weights, 1024 x 1024, all in bf16 (dpo_step too, so that
dpo_step_bf16 is left out). THE CUDA PART HAS NOT BEEN RUN YET.
--quick runs the whole program on a toy in a minute; its figures mean nothing.
"""
from __future__ import annotations

import argparse
import io
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS / "helpers")]

import bench_peers
import train
from bench_peers import (
    RATE,
    SIZES,
    Figures,
    Meter,
    Size,
    chats,
    completions,
    digest,
    logprob_inputs,
    measure_load,
    questions,
    rubric_chats,
    unresized,
    write_checkpoint,
)
from cpu_torchvision import import_torchvision
from dpo import sequence_logps
from eval import load_task, make_item
from eval import score as exact_match
from floors import decode_bytes
from loop.optimise import load_trainable, make_optimiser
from loop.ranks import Ranks
from loop.run import Run
from loop.survey import survey
from loop.survey_flags import SurveyConfig
from model import FAMILIES, VLM, generate, load_vlm, next_digits
from model.checkpoint import load_weights
from model.images import QwenImages
from model.pairs import pack_pairs
from model.settings import read_settings
from model.vlm import FeatureCache
from replay import Pair
from tasks import Item
from verifier import REPLIES, expected_scores, score_candidates

ALLOCATOR = "mmap_threshold=8589934592 trim_threshold=17179869184 top_pad=268435456"


@dataclass(frozen=True)
class Line:
    """A line of the table: `key` of the figures of `job`."""
    name: str
    job: str
    key: str
    unit: str


LINES = [Line("dpo_step", "dpo", "rate", "pairs/s"), Line("dpo_tokens", "dpo", "token_rate", "tokens/s"),
         Line("dpo_memory", "dpo", "memory", "MB"),
         Line("dpo_step_bf16", "dpo_bf16", "rate", "pairs/s"), Line("dpo_memory_bf16", "dpo_bf16", "memory", "MB"),
         Line("sampling", "sampling", "rate", "tokens/s"), Line("scoring", "scoring", "rate", "candidates/s"),
         Line("scoring_logits", "scoring_logits", "rate", "candidates/s"),
         Line("logprob_time", "logprob", "seconds", "s"), Line("logprob_memory", "logprob", "first_memory", "MB"),
         Line("preprocessing", "preprocessing", "rate", "pictures/s"), Line("host_time", "host", "ms", "ms/pair"),
         Line("gate", "gate", "rate", "items/s"),
         Line("load_time", "load", "seconds", "s"), Line("load_memory", "load", "of_file", "x file"),
         Line("answer_scoring", "answers", "rate", "responses/s"), Line("answer_hostile", "hostile", "seconds", "s")]


# ---- our sides

def dpo(size: Size, folder: Path, dtype: torch.dtype | None = None) -> Figures:
    """Reference log-probabilities once a pair, then each pair in two steps; vision features are made anew each time."""
    meter, dtype = Meter(size), dtype or size.dtype
    cfg = train.Config(out=str(folder / "run"), dtype=str(dtype).removeprefix("torch."), batch_size=size.batch,
                       micro_tokens=1_000_000, lr=RATE, warmup_steps=0)      # the whole batch, as the peer
    run = Run(cfg, Ranks(size.device))
    student = load_trainable(str(folder), cfg, run.ranks.device)
    optimiser = make_optimiser(student, cfg.lr, cfg.weight_decay)
    items: dict[str, Item] = {}
    pairs: list[Pair] = []
    for i, (image, text) in enumerate(questions(size, size.pairs)):
        encoded = io.BytesIO()
        image.save(encoded, "PNG")
        items[str(i)] = Item(str(i), "bench", (0, text), (encoded.getvalue(),))
        pairs.append(Pair(str(i), *pair_sides(student, size, i), 1.0, 0.0))
    found: list[Pair] = []

    def work() -> None:
        student.feature_cache = FeatureCache(1 << 32)
        found[:] = train.with_reference_logps(run, student, pairs, items)
        for step, start in enumerate([*range(0, size.pairs, size.batch)] * 2, 1):
            train.train_step(run, student, optimiser, found[start:start + size.batch], items, step)
    figures = meter.run(work, 2 * size.pairs, count_flops=True, dtype=str(dtype))
    tokens = statistics.mean(2 * p.row_tokens - len(p.chosen) - len(p.rejected) for p in found)
    return figures | {"tokens": tokens, "check": [statistics.mean(getattr(p, f"reference_{side}_logp") for p in found)
                                                  for side in ("chosen", "rejected")]}


def sampling(size: Size, folder: Path) -> Figures:
    meter, vlm, asked = Meter(size), load_vlm(folder, size.device, size.dtype), chats(size, size.prompts)

    def work() -> int:
        outs = generate(vlm, asked, n=size.samples, max_new_tokens=size.completion, temperature=0.7)
        return sum(len(c.token_ids) for row in outs for c in row)
    must_read = decode_bytes(vlm, asked, size.samples, size.completion)
    figures = meter.run(work, 1, count_flops=True, bytes=must_read, check=prompt_digest(vlm, asked))
    return figures | {"rate": meter.result / figures["seconds"]}


def scoring(size: Size, folder: Path) -> Figures:
    meter, vlm = Meter(size), load_vlm(folder, size.device, size.dtype)
    asked, candidates = chats(size, 1), [completions(size, 0, size.samples)]

    def ask(prompts: list[list[dict]]) -> list[Any]:
        return [c for [c] in generate(vlm, prompts, max_new_tokens=size.verdict, temperature=0)]
    rubrics = rubric_chats(size)
    return meter.run(lambda: score_candidates(ask, asked, candidates), size.samples, count_flops=True,
                     bytes=decode_bytes(vlm, rubrics, 1, size.verdict), check=prompt_digest(vlm, rubrics))


def scoring_logits(size: Size, folder: Path) -> Figures:
    meter, vlm = Meter(size), load_vlm(folder, size.device, size.dtype)
    asked, candidates = chats(size, 1), [completions(size, 0, size.samples)]
    return meter.run(lambda: expected_scores(lambda prompts: next_digits(vlm, prompts, REPLIES), asked, candidates),
                     size.samples, count_flops=True, check=prompt_digest(vlm, rubric_chats(size)))


def prompt_digest(vlm: Any, asked: list[list[dict]]) -> str:
    batch = vlm.processor(asked)
    return digest([ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask)])


def logprob(size: Size, folder: Path) -> Figures:
    hidden, weight, targets = logprob_inputs(size)
    mask = torch.ones(1, size.positions, dtype=torch.bool, device=size.device)
    meter = Meter(size)

    def work() -> float:
        hidden.grad = weight.grad = None
        total = sequence_logps(hidden[None], weight, targets[None], mask).sum()
        total.backward()
        return total.item()
    return meter.run(work, size.positions, count_flops=True) | {"check": [meter.result, hidden.grad.norm().item()]}


def preprocessing(size: Size, folder: Path) -> Figures:
    """By a new reader each time: one that has met a picture knows it."""
    pictures = unresized(size)

    def work() -> list[torch.Tensor]:
        images = QwenImages(folder)
        return [images(picture).pixels for picture in pictures]
    return Meter(size).run(work, len(pictures), check=digest(work()[0].numpy().tobytes()))


def host(size: Size, folder: Path) -> Figures:
    """What the host does for a pair before the model can begin, after the first time; pairs come one at a time."""
    vlm = load_vlm(folder, size.device, size.dtype).requires_grad_(False)
    vlm.feature_cache = FeatureCache(1 << 32)
    pairs = []
    for i, (image, text) in enumerate(questions(replace(size, picture=size.host_picture), size.pairs)):
        image.save(folder / f"host-{i}.png")
        item = Item(str(i), "bench", (0, text), (folder / f"host-{i}.png",))
        pairs.append((item, *pair_sides(vlm, size, i)))

    def work() -> None:
        for item, chosen, rejected in pairs:
            rows = pack_pairs(vlm.processor, [(item.lazy_chat(), chosen, rejected)]).to(vlm.device)
            vlm.image_features(rows.batch)
    sides = []
    for item, *both in pairs:
        [prompt] = vlm.processor.rows([item.lazy_chat()], {})
        sides += [[*prompt.ids, *side] for side in both]
    figures = Meter(size).run(work, size.pairs, check=digest(sides))
    return figures | {"ms": 1000 * figures["seconds"] / size.pairs}


def pair_sides(vlm: VLM, size: Size, number: int) -> list[tuple[int, ...]]:
    """The tokens of a pair's chosen and rejected completion, as the chat template ends them."""
    encode, end = vlm.processor.encode, vlm.processor.turn_end_id
    return [(*encode(c), end, *encode("\n")) for c in completions(size, number, 2)]


def survey_items(size: Size, folder: Path) -> Figures:
    """All that gate.py asks of a student and one verifier, with nothing in its cache: own answers of both, candidates,
    verdicts, short ones all. Both are the same checkpoint, in memory one after the other."""
    rows = []
    for i, (image, text) in enumerate(questions(size, size.prompts)):
        image.save(folder / f"gate-{i}.png")
        rows.append({"id": str(i), "question": text, "images": [f"gate-{i}.png"], "choices": None, "answer": "1",
                     "answer_type": "integer", "precision": None})
    (folder / "gate.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = SurveyConfig(
        student=str(folder), verifier=[str(folder)], task="jsonl", data=str(folder / "gate.jsonl"), items=size.prompts,
        k=size.samples, max_new_tokens=size.verdict, verdict_tokens=size.verdict, device=size.device)

    def work() -> None:
        with tempfile.TemporaryDirectory() as cache:
            survey(asked, load_task("jsonl", folder / "gate.jsonl"), Path(cache))
    return Meter(size).run(work, size.prompts)


def load(size: Size, folder: Path) -> Figures:
    """Weights in the files' own dtype, without the processor."""
    config = read_settings(folder, "config.json")
    family = FAMILIES[config["model_type"]]

    def weights() -> VLM:
        with torch.device("meta"):
            vlm = family(config)
        load_weights(vlm, folder, family.RENAME, size.device, None)
        return vlm
    return measure_load(size, folder, lambda: family(config), weights)


def answers(size: Size, folder: Path) -> Figures:
    """Responses of up to 8,000 characters to questions of MMMU, MathVista and BLINK."""
    rng, asked = np.random.default_rng(0), task_items()
    words = "so the value of (A) is near 3.5 cm, which is not what we see; **hence** it could be B or C.\n".split(" ")
    work = []
    for i in range(size.responses):
        text = " ".join(rng.choice(words, rng.integers(1, 1600)))[-7900:]
        work.append((asked[i % len(asked)], text + ("" if i % 5 else " The answer is (B).")))
    return Meter(size).run(lambda: [exact_match(item, text) for item, text in work], len(work))


def hostile(size: Size, folder: Path) -> Figures:
    """The slowest text among long repetitions of what the scorers look for."""
    units = ("(", "(A) ", "the answer is ", "1,", "[", "\\boxed{", "\\text{", "*a", "_", "<think>", "not ", "\n ")
    meter = Meter(replace(size, repeats=1))
    return max((meter.run(partial(exact_match, item, unit * (size.hostile // len(unit))), 1)
                for item in task_items() for unit in units), key=lambda figures: figures["seconds"])


def task_items() -> list[Item]:
    choices = ["a dog", "a cat", "two cats", "a bus"]
    return [make_item("mmmu", {"id": "validation_Art_1", "question": "Which?", "question_type": "multiple-choice",
                               "options": repr(choices), "answer": "B"}),
            make_item("mmmu", {"id": "validation_Art_2", "question": "How long?", "question_type": "open",
                               "options": "[]", "answer": "3.5"}),
            make_item("mathvista", {"pid": "1", "question": "How long?", "answer_type": "float", "precision": 1.0,
                                    "answer": "3.5", "question_type": "free_form", "choices": None}),
            make_item("blink", {"idx": "val_Counting_1", "prompt": "Which?", "choices": choices, "answer": "(B)"})]


def ceilings(size: Size, folder: Path) -> Figures:
    """What the machine reaches: bytes read and written a second by a large copy, FLOP/s of large matrix products."""
    source = torch.ones(size.copied // 4, device=size.device)
    target, meter = torch.empty_like(source), Meter(size)
    found = {"copy": meter.run(lambda: target.copy_(source), 2 * source.nbytes)["rate"]}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, size.matmul, size.matmul, device=size.device).to(dtype)
        found[str(dtype)] = meter.run(lambda: a @ b, 2 * size.matmul ** 3)["rate"]
    name = torch.cuda.get_device_name() if size.device == "cuda" else cpu_name()
    return found | {"name": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def checkpoint(size: Size, folder: Path) -> Figures:
    write_checkpoint(size, folder)
    return {"bytes": (folder / "model.safetensors").stat().st_size}


SIDES = {"checkpoint": checkpoint, "ceilings": ceilings, "dpo": dpo, "dpo_bf16": partial(dpo, dtype=torch.bfloat16),
         "sampling": sampling, "scoring": scoring,
         "scoring_logits": scoring_logits, "logprob": logprob, "preprocessing": preprocessing, "host": host,
         "gate": survey_items,
         "load": load,
         "answers": answers, "hostile": hostile}


# ---- the program

def child(side: str, job: str, size: str, folder: Path, samples: int | None = None, ranks: int = 1) -> Figures:
    """Run one side of a job in a process of its own; what it prints last is its figures as JSON.

    `samples` in place of the size's; with more than one of `ranks` torchrun starts that many, one thread each.
    """
    tunables = ":".join(f"glibc.malloc.{setting}" for setting in ALLOCATOR.split())
    print(f"{side}: {job}", file=sys.stderr)
    command = [__file__, "--side", side, job, size, str(folder), *(["--samples", str(samples)] if samples else [])]
    if ranks > 1:
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *command]
    environment = os.environ | {"GLIBC_TUNABLES": tunables, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{side} side of {job} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def both_sides(job: str, size: str, folder: Path, absent: list[str]) -> tuple[Figures, Figures]:
    """Our figures and the peer's ({} without one). RuntimeError where they are seen to have computed other things."""
    ours, peer = child("ours", job, size, folder), {}
    if job in bench_peers.SIDES and not set(bench_peers.NEEDS[job]) & set(absent):
        peer = child("peer", job, size, folder)
        a, b, tolerance = ours["check"], peer["check"], 1e-2 if "bfloat16" in ours["dtype"] else 1e-4
        if a != b and not (isinstance(a, list) and all(math.isclose(x, y, rel_tol=tolerance) for x, y in zip(a, b))):
            raise RuntimeError(f"the two sides of {job} did not compute the same: ours {a}, the peer {b}")
    for side in (ours, peer) if "tokens" in ours else ():
        side |= {"token_rate": side["rate"] * ours["tokens"]} if side else {}
    return ours, peer


def share(ours: Figures, machine: Figures) -> float | None:
    """The floors, of operations at a matrix product's rate and of bytes at a copy's, over the seconds it took.

    They are added, for operations bind one part of a job, its prompts, and bytes another, its decode steps.
    """
    floor = 0.0
    for kind, ceiling in (("flops", ours["dtype"]), ("bytes", "copy")):
        floor += ours.get(kind, 0) / machine[ceiling]
    return floor / ours["seconds"] if floor else None


def table(rows: list[dict[str, Any]], machine: Figures) -> str:
    def show(x: float | None, form: str = ".4g") -> str:
        return "-" if x is None else format(x, form)
    fast = [f"{machine[str(dtype)] / 1e9:.0f}" for dtype in (torch.float32, torch.bfloat16)]
    text = [f"{machine['name']}, {machine['threads']} threads, torch {machine['torch']}; copy "
            f"{machine['copy'] / 1e9:.1f} GB/s (read and written), matrix products {fast[0]} GFLOP/s in fp32, "
            f"{fast[1]} in bf16; allocator of both sides: {ALLOCATOR}",
            f"{'line':16}{'ours':>12}{'peer':>12}{'ratio':>10}  {'unit':14}{'of ceiling':>10}"]
    return "\n".join(text + [f"{r['name']:16}{show(r['ours']):>12}{show(r['peer']):>12}{show(r['ratio'], '.3f'):>10}  "
                             f"{r['unit']:14}{show(r['of_ceiling'], '.0%'):>10}" for r in rows])


def measure(size: str, names: list[str]) -> dict[str, Any]:
    """All that --json writes."""
    lines = [line for line in LINES if not names or line.name in names]
    jobs = list(dict.fromkeys(line.job for line in lines if size != "cuda" or line.job != "dpo_bf16"))
    absent = bench_peers.missing(jobs)
    if absent:
        print(f"Some peers cannot be measured; for all of them: pip install {' '.join(absent)}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count() if size == "quick" else 1) as pool:
        folder = Path(name)
        child("ours", "checkpoint", size, folder)
        machine = child("ours", "ceilings", size, folder)
        found = dict(zip(jobs, pool.map(lambda job: both_sides(job, size, folder, absent), jobs)))
    rows = []
    for line in (line for line in lines if line.job in jobs):
        timed = line.key in ("rate", "token_rate", "seconds")
        ours, peer = (side.get(line.key) for side in found[line.job])
        rows.append({"name": line.name, "ours": ours, "peer": peer, "ratio": ours / peer if peer else None,
                     "unit": line.unit, "of_ceiling": share(found[line.job][0], machine) if timed else None})
    return {"machine": machine, "lines": rows}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file that the figures are written to")
    parser.add_argument("--lines", nargs="+", default=[], choices=[line.name for line in LINES], metavar="NAME",
                        help="only these lines: " + ", ".join(line.name for line in LINES))
    parser.add_argument("--quick", action="store_true", help="toy sizes: does everything run?")
    parser.add_argument("--side", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--samples", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        side, job, name, folder = args.side
        size = SIZES[name] if args.samples is None else replace(SIZES[name], samples=args.samples)
        if side == "peer" and not bench_peers.missing(["sampling"]):
            _library = import_torchvision()                     # kept alive
        print(json.dumps((SIDES if side == "ours" else bench_peers.SIDES)[job](size, Path(folder))))
        return 0
    if args.json and not args.json.resolve().parent.is_dir():
        parser.error(f"--json {args.json}: there is no such folder")
    found = measure("quick" if args.quick else "cuda" if torch.cuda.is_available() else "cpu", args.lines)
    print(table(found["lines"], found["machine"]))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""train.py, gate.py, eval.py and judge.py on the six published models at their true width and vocabulary.

Few items, each program in a process of its own, on models that were taught to answer (build.teach). Where a program
needs a second model it is a small one, so that two large ones never share the memory; train.py opens its student a
second time all the same, as it would be deployed. One step is trained, not more: that it runs, starts at ln 2 and ends
in a decision is what is checked here.

What computes in which dtype is a matter of a CPU without bf16 arithmetic, which takes a hundred times as long for a
gradient in bf16 as in fp32, and of memory and time: large models would not fit twice in fp32. So the smallest is
trained in fp32, of the others the last layer in bf16.
"""
from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from build import photograph, teach
from checkpoints import ROOT, SCORES, Checkpoint, flags

STUDENT = ROOT / "model" / "tiny" / "student"
PHOTOGRAPH = (640, 480)                                 # pixels
SMALLEST = "Qwen3-VL-2B"
DIGITS = [str(digit) for digit in range(1, 10)]
SIDES = ["1", "2"]                                      # numbers, and a judge's whole verdict
BLOCKED = 3                                             # the exit status of a gate that said no


def write_items(checkpoint: Checkpoint, name: str, count: int, picture: bool, answered: bool) -> list[str]:
    """Lines of a jsonl task. Those with a picture share one photograph; "prompt" is all that is asked."""
    path = checkpoint.work / "photograph.jpg"
    photograph(*PHOTOGRAPH, seed=5).save(path)
    lines = []
    for number in range(count):
        lines.append(json.dumps({
            "id": f"{name}-{number}",
            "prompt": f"How many red shapes? {number}",
            "images": [path.name] if picture else [],
            "answer": "1" if answered else None,
            "answer_type": "integer",
        }) + "\n")
    return lines


def write_training_items(checkpoint: Checkpoint, picture: bool) -> Path:
    """Questions without a picture that have an answer, for the gates; one that has none, to train on."""
    lines = write_items(checkpoint, "held-back", 3, picture=False, answered=True)
    lines += write_items(checkpoint, "trained-on", 1, picture, answered=False)
    path = checkpoint.work / "train.jsonl"
    path.write_text("".join(lines))
    return path


def write_photo_items(checkpoint: Checkpoint) -> Path:
    """Two questions about the photograph."""
    path = checkpoint.work / "photo.jsonl"
    path.write_text("".join(write_items(checkpoint, "photo", 2, picture=True, answered=True)))
    return path


def picture_flags(checkpoint: Checkpoint) -> Sequence[str]:
    """A photograph of 640 x 480 is made 15 tokens. Llama cuts it into tiles, and takes no such flag."""
    if checkpoint.family == "mllama":
        return []
    return flags(min_pixels=4096, max_pixels=20_000)


def train(checkpoint: Checkpoint, verifier: Path, out: str, *trained: str) -> dict:
    """One step of train.py on one pair; its summary. But for the smallest, the last layer alone is trained, in bf16.

    The pairs of Llama are without a picture, for its tower would take most of the time: test_judge trains with one.
    """
    teach(checkpoint.folder, DIGITS)
    data = write_training_items(checkpoint, picture=checkpoint.family != "mllama")
    if checkpoint.name != SMALLEST:
        last = 0 if checkpoint.family == "mllama" else 1            # its layer 1 is for pictures
        trained = (*trained, *flags(dtype="bfloat16", trainable=f"layers:{last}-{last}"))
    status, output = checkpoint.run(
        "train.py",
        *flags(task="jsonl", data=data, out=checkpoint.work / out, device="cpu"),
        *flags(student=checkpoint.folder, verifier=verifier, verdict="logits"),
        *flags(gate_items=1, watch_items=1, held_out_items=1, trained_on_items=0, items_per_round=1),
        *flags(rounds=1, k=3, max_new_tokens=3, min_pairs=1, epochs=1, steps_per_round=1, batch_size=1, lr=1e-4),
        *picture_flags(checkpoint),
        "--force",
        *trained)
    assert status in (0, BLOCKED), output
    return json.loads((checkpoint.work / out / "summary.json").read_text())


def check_one_step(summary: dict) -> None:
    """A step was taken from ln 2: before it policy and reference are the same model, and see the same rows."""
    assert summary["steps"] == 1
    assert summary["loss_first"] == pytest.approx(math.log(2), abs=1e-6)
    assert summary["rounds"][0]["pairs"] == 1
    assert summary["post_gate"]["verdict"] in ("PROMOTE", "REJECT")


def test_one_step_of_adapters(checkpoint: Checkpoint, verifier: Path) -> None:
    check_one_step(train(checkpoint, verifier, "adapters", *flags(lora_rank=8)))


@pytest.mark.models("Qwen3-VL-2B")
def test_one_step_of_a_layer(checkpoint: Checkpoint, verifier: Path) -> None:
    check_one_step(train(checkpoint, verifier, "layer", *flags(trainable="layers:1-1")))


def asked_in(checkpoint: Checkpoint) -> str:
    """The dtype in which a model is asked: Llama's tower would take minutes in bf16."""
    return "float32" if checkpoint.family == "mllama" else "bfloat16"


def test_eval(checkpoint: Checkpoint) -> None:
    """Every answer is one of those that were taught, and is read."""
    teach(checkpoint.folder, DIGITS)
    out = checkpoint.work / "eval"
    status, output = checkpoint.run(
        "eval.py",
        *flags(model=checkpoint.folder, task="jsonl", data=write_photo_items(checkpoint), out=out, device="cpu"),
        *flags(dtype=asked_in(checkpoint), max_new_tokens=3),
        *picture_flags(checkpoint))
    assert status == 0, output
    report = json.loads((out / "report.json").read_text())
    assert report["parse_rate"]["value"] == 1 and report["truncation_rate"]["value"] == 0
    answers = [json.loads(line)["response"] for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 2 and set(answers) <= set(DIGITS)


def test_gate(checkpoint: Checkpoint) -> None:
    """Every verdict is one of those that were taught, and is read; what they are worth is another matter."""
    teach(checkpoint.folder, SCORES)
    out = checkpoint.work / "gate"
    status, output = checkpoint.run(
        "gate.py",
        *flags(student=STUDENT, verifier=checkpoint.folder, task="jsonl", data=write_photo_items(checkpoint)),
        *flags(items=2, k=2, temperature=2.0, max_new_tokens=3, verdict_tokens=12, out=out / "report.json"),
        *flags(device="cpu", dtype=asked_in(checkpoint)),
        *picture_flags(checkpoint))
    assert status in (0, BLOCKED), output
    report = json.loads((out / "report.json").read_text())
    assert report["verdict"] in ("PASS", "BLOCK") and report["reasons"]
    assert report["records"] == 4 and report["parse_rate"]["value"] == 1
    assert report["truncation_rate"]["value"] == 0


@pytest.mark.models("Llama-3.2-11B-Vision")
def test_judge(checkpoint: Checkpoint) -> None:
    """One iteration of the judge: pairs, judgments in both orders, a step, held-out figures.

    The temperature makes both of the taught words likely, whatever the question: their logits are some units apart, and
    a hundred above those of all other tokens.
    """
    teach(checkpoint.folder, SIDES)
    out = checkpoint.work / "judge"
    data = checkpoint.work / "judge.jsonl"
    lines = write_items(checkpoint, "held-out", 2, picture=False, answered=True)
    lines += write_items(checkpoint, "spoken-of", 5, picture=False, answered=False)
    lines += write_items(checkpoint, "seen", 1, picture=True, answered=False)
    data.write_text("".join(lines))
    status, output = checkpoint.run(
        "judge.py",
        *flags(task="jsonl", data=data, out=out, device="cpu"),
        *flags(verifier=checkpoint.folder, dtype="float32", lora_rank=8, trainable="layers:1-1", lr=1e-3),
        *flags(items=6, held_out_items=2, n=16, votes=5, iterations=1, epochs=1, batch_size=4, micro_tokens=1),
        *flags(max_new_tokens=3, verdict_tokens=3, temperature=8.0),
        "--no-order-filter", "--no-balance")
    assert status in (0, BLOCKED), output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] >= 1
    assert summary["initial"]["unparsed_rate"]["value"] == 0

"""A finished run's folder without a run: a few files, as train.py leaves them, to make a page of."""
from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from tasks import Item

HOSTILE = '<script>document.title="taken"</script><img src=x onerror="document.title=1">"\'&{{ 7 * 7 }}'


def figure(value: float, n: int = 100) -> dict[str, Any]:
    return {"value": value, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1), "n": n}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def picture(width: int = 32, height: int = 32, kind: str = "PNG") -> bytes:
    encoded = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).convert("RGB").save(encoded, kind)
    return encoded.getvalue()


def make_items(count: int, question: str = "How many?", image: bytes | None = None) -> dict[str, Item]:
    """Items q0, q1, ...: the answer to all is 3."""
    items = {}
    images = (image or picture(),)
    for number in range(count):
        name = f"q{number}"
        items[name] = Item(name, "bar", (0, question), images, answer="3", answer_type="integer")
    return items


def make_run(folder: Path, count: int = 6, after: str | None = "PROMOTE", text: str = "2") -> None:
    """A run with a pair for each of `count` items, of which every third is wrong, and as many held-out answers. `text`
    is the wrong candidate; `after`: what the gate after training said, None where the one before stopped the run."""
    folder.mkdir(parents=True)
    settings = {"task": "bar", "data": None, "split": None, "train_split": None, "watch_items": 40, "lr": 3e-5}
    (folder / "config.json").write_text(json.dumps(settings))
    post_gate = None
    if after:
        post_gate = {"verdict": after, "reasons": ["why after"], "baseline_accuracy": figure(0.4),
                     "final_accuracy": figure(0.7), "difference": figure(0.3)}
    pre_gate = {"verdict": "PASS" if after else "BLOCK", "reasons": ["why before"], "rubric_accuracy": figure(0.9),
                "baseline_accuracy": figure(0.5), "direction": figure(0.8), "own_difference": figure(-0.1),
                "balanced_accuracy": {"value": 0.9, "low": None, "high": None, "n": 9},
                "direction_by_margin": [{"min_margin": 0.5, "direction": figure(0.8), "pairs": 7, "mixed": 5}]}
    rounds = [{"round": 1, "pairs": count, "mixed": count, "direction": figure(0.7)}]
    (folder / "summary.json").write_text(json.dumps({
        "task": "bar", "pre_gate": pre_gate, "post_gate": post_gate, "warnings": ["it fell"] if after else [],
        "baseline_accuracy": figure(0.4) if after else None, "final_accuracy": figure(0.7) if after else None,
        "loss_first": 0.693 if after else None, "loss_last": 0.5 if after else None, "steps": 9 if after else 0,
        "rounds": rounds if after else []}))

    # Of item k the right answer is the better-scored one, but where k is a multiple of 3.
    candidates = []
    records = []
    held_out = []
    for number in range(count):
        wrong = number % 3 == 0
        texts = [text, "3", "3"]
        scores = [1 - number / (2 * count), 0.1, None] if wrong else [0.2, 0.8, 0.8]
        candidates.append({"item_id": f"q{number}", "texts": texts, "scores": scores})
        for each, score in zip(texts, scores):
            records.append({"item": f"q{number}", "text": each, "score": score, "correct": each == "3"})
        answers = {name: {"response": each, "correct": each == "3"}
                   for name, each in (("frozen", "3" if wrong else text), ("trained", text if wrong else "3"))}
        held_out.append({"id": f"q{number}", **answers})
    write_lines(folder / "gate_records.jsonl", records)
    if after:
        write_lines(folder / "pairs" / "round-1.jsonl", [{"anything": 1}])
        write_lines(folder / "candidates" / "round-1.jsonl", candidates)
        write_lines(folder / "held_out.jsonl", held_out)
        log = [{"step": 0, "eval/accuracy": 0.4}]
        log += [{"step": step, "round": 1 + step // 5, "loss": 0.7 - step / 50, "tokens/s": 900.0, "pairs/s": 9.5,
                 "preprocessing_share": 0.25, "peak_memory_gb": 1.25} for step in range(1, 10)]
        log[-1]["eval/accuracy"] = 0.7
        write_lines(folder / "metrics.jsonl", log)

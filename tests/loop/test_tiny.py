"""The shipped tiny checkpoints: transformers opens them and agrees, they are small, they know and misjudge what the
demo says they do, and make_tiny.py makes them."""
from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from eval import load_task, score
from judge import SyntheticPair, judge_pairs
from loop import make_tiny
from model import VLM, generate, load_vlm, save_vlm
from tiny import load_reference, reference_greedy, reference_inputs
from verifier import COMPARISON, Score, score_candidates

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "model" / "tiny"
NAMES = ("student", "verifier", "verifier-50", "verifier-0")
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
        "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
        "<|image_pad|>", "<|video_pad|>")               # its control tokens in the order of their ids


@pytest.fixture(scope="module", params=(*NAMES, "judge"))
def tiny(request: pytest.FixtureRequest) -> VLM:
    return load_vlm(TINY / request.param)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---- the files

@torch.no_grad()
def test_logits_equal_transformers(tiny: VLM) -> None:
    pytest.importorskip("transformers")
    reference = load_reference(tiny.folder)
    for task in ("bar", "count", "red"):
        batch = tiny.processor([load_task(task, limit=1)[0].chat()])
        ours, theirs = tiny(batch), reference(**reference_inputs(tiny, batch)).logits
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), task


def test_greedy_equals_transformers(tiny: VLM) -> None:
    pytest.importorskip("transformers")
    reference = load_reference(tiny.folder)
    chats = [load_task(task, limit=1)[0].chat() for task in ("bar", "count", "red")]
    ours = generate(tiny, chats, max_new_tokens=8, temperature=0)
    assert [list(c.token_ids) for [c] in ours] == [reference_greedy(tiny, reference, c, 8) for c in chats]


def test_transformers_tokenizer_agrees(tiny: VLM) -> None:
    """Its chat text is that of the published format, and its ids are ours."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tiny.folder)
    text = ("<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>How tall is the red bar? 12 Ünï\n\n  x"
            "<|im_end|>\n<|im_start|>assistant\n")
    assert theirs(text)["input_ids"] == Tokenizer.from_file(str(tiny.folder / "tokenizer.json")).encode(text).ids
    assert theirs.eos_token == "<|im_end|>" and theirs.pad_token == "<|endoftext|>"


def test_control_tokens(tiny: VLM) -> None:
    """Qwen's, in its order, one id each; config.json and generation_config.json name them."""
    tokenizer = Tokenizer.from_file(str(tiny.folder / "tokenizer.json"))
    ids = {token: tokenizer.token_to_id(token) for token in QWEN}
    first = ids["<|endoftext|>"]
    assert list(ids.values()) == list(range(first, first + len(QWEN)))
    assert tokenizer.encode("".join(QWEN)).ids == list(ids.values())
    config = json.loads((tiny.folder / "config.json").read_text())
    assert [config[key] for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
            ] == [ids[f"<|{word}|>"] for word in ("image_pad", "video_pad", "vision_start", "vision_end")]
    assert tiny.stop_ids == {ids["<|im_end|>"], ids["<|endoftext|>"]}
    assert len(tiny.head_weight) >= tokenizer.get_vocab_size()


def test_small_enough_to_ship() -> None:
    sizes = {path: path.stat().st_size for path in TINY.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert sum(sizes.values()) < 5_000_000
    assert {path.parent.name for path in sizes if path.name == "model.safetensors"} == {*NAMES, "judge"}
    expected = {"chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
                "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert all({path.name for path in (TINY / name).iterdir()} == expected for name in (*NAMES, "judge"))


def test_saved_again(tiny: VLM, tmp_path: Path) -> None:
    """In the files' dtype nothing changes; in fp32 no weight does."""
    save_vlm(tiny, tmp_path / "same", tiny.file_dtype)
    assert tiny.file_dtype == torch.bfloat16 and files(tmp_path / "same") == files(tiny.folder)
    save_vlm(tiny, tmp_path / "wide")
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny.folder, tmp_path / "wide"))
    assert before.keys() == after.keys() and {t.dtype for t in after.values()} == {torch.float32}
    assert all(torch.equal(before[name].float(), after[name]) for name in before)


# ---- what they know

def accuracy(vlm: VLM, task: str, count: int = 60) -> float:
    items = load_task(task, limit=count)
    answers = generate(vlm, [item.chat() for item in items], max_new_tokens=16, temperature=0)
    return sum(score(item, answer.text).correct for item, [answer] in zip(items, answers)) / count


def graded(vlm: VLM, task: str, count: int = 20) -> list[tuple[Score, Score]]:
    """The verdicts on the right number and on one that is larger or smaller."""
    def ask(chats: list) -> list:
        return [completion for [completion] in generate(vlm, chats, max_new_tokens=16, temperature=0)]
    items = load_task(task, limit=count)
    wrong = [str((int(item.answer) + k % 7) % 9 + 1) for k, item in enumerate(items)]
    return [tuple(row) for row in score_candidates(
        ask, [item.chat() for item in items], [[item.answer, w] for item, w in zip(items, wrong)])]


def test_student_is_about_half_right() -> None:
    """Neither so good that there is nothing to gain, nor so bad that its candidates are all wrong."""
    student = load_vlm(TINY / "student")
    for task in ("bar", "red"):
        assert 0.25 <= accuracy(student, task) <= 0.85, task


def test_verdicts_are_read() -> None:
    """JSON with a score on at least 95 % of clean candidates, of the task that it does not understand too."""
    for name in NAMES[1:]:
        vlm = load_vlm(TINY / name)
        for task in ("bar", "red"):
            verdicts = [verdict for row in graded(vlm, task) for verdict in row]
            assert len(verdicts) == 40 and not any(v.truncated for v in verdicts)
            assert sum(v.value is not None for v in verdicts) >= 38, (name, task)


def accepts(verdicts: list[Score]) -> float:
    return sum((v.value or 0.0) >= 0.5 for v in verdicts) / len(verdicts)


def test_verifier_understands_one_task_and_not_the_other() -> None:
    """It answers and grades `bar` and `count`; of `red` it takes all shapes for red ones, and rejects right answers."""
    vlm = load_vlm(TINY / "verifier")
    for task in ("bar", "count"):
        right, wrong = zip(*graded(vlm, task))
        assert accuracy(vlm, task) >= 0.9 and accepts(right) >= 0.9 and accepts(wrong) <= 0.2, task
    right, _ = zip(*graded(vlm, "red"))
    assert accuracy(vlm, "red") <= 0.1 and accepts(right) <= 0.1


def test_verifier_counts_every_shape_as_red() -> None:
    """Its mistake is the one that its data taught: its answer to `red` is larger than the right one."""
    vlm, items = load_vlm(TINY / "verifier"), load_task("red", limit=40)
    answers = generate(vlm, [item.chat() for item in items], max_new_tokens=16, temperature=0)
    said = [int(answer.text) - int(item.answer) for item, [answer] in zip(items, answers) if answer.text.isdigit()]
    assert len(said) >= 38 and sum(1 <= more <= 3 for more in said) >= 0.9 * len(said)


@pytest.mark.parametrize("name", ["verifier-0", "verifier-50"])
def test_the_rest_of_the_ladder_understands_both(name: str) -> None:
    vlm = load_vlm(TINY / name)
    for task in ("bar", "red"):
        right, wrong = zip(*graded(vlm, task))
        assert accuracy(vlm, task) >= 0.8 and accepts(right) >= 0.8 and accepts(wrong) <= 0.25, task


def test_judge_is_mediocre() -> None:
    """It answers, its verdicts are read, it does better than chance at comparing, and prefers the first place."""
    vlm, items = load_vlm(TINY / "judge"), load_task("red", limit=60)

    def ask(chats: list) -> list:
        return [reply for [reply] in generate(vlm, chats, max_new_tokens=40, temperature=0)]
    right = sum(reply.text == item.answer for item, reply in zip(items, ask([item.chat() for item in items])))
    pairs = [SyntheticPair(item.id, item.answer, str(int(item.answer) + 1)) for item in items]
    judgments = [j for both in judge_pairs(ask, [item.chat() for item in items], pairs) for j in both]
    assert right >= 0.8 * len(items) and sum(j.verdict is not None for j in judgments) >= 0.95 * len(judgments)
    assert 0.5 < sum(j.agrees for j in judgments) / len(judgments) < 0.85
    assert sum(j.verdict == 1 for j in judgments) / len(judgments) > 0.6


# ---- make_tiny.py

def test_make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps: the layout that is shipped, the same bytes for the same seed in any process, others for another."""
    few = ["--only", "student", "--tower-steps", "2", "--student-steps", "2", "--out"]
    done = subprocess.run([sys.executable, "-m", "loop.make_tiny", *few, str(tmp_path / "a")], cwd=ROOT, timeout=120,
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(make_tiny, "grading_report", lambda vlm: "")     # it asks about hundreds of pictures
    for name, seed in (("b", "0"), ("c", "1")):
        monkeypatch.setattr(sys, "argv", ["make_tiny.py", *few, str(tmp_path / name), "--seed", seed])
        assert make_tiny.main() == 0
    made = {name: files(tmp_path / name / "student") for name in "abc"}
    shipped = files(TINY / "student")
    assert made["a"] == made["b"] and made["a"].keys() == shipped.keys()
    assert made["a"]["model.safetensors"] != made["c"]["model.safetensors"]
    assert all(made["a"][name] == shipped[name] for name in shipped if name != "model.safetensors")
    vlm = load_vlm(tmp_path / "a" / "student")
    assert vlm.file_dtype == torch.bfloat16 and not (tmp_path / "a" / "verifier").exists()
    [[answer]] = generate(vlm, [load_task("bar", limit=1)[0].chat()], max_new_tokens=2, temperature=0)
    assert len(answer.token_ids) in (1, 2)


def test_make_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few steps: the settings that are shipped, the prompt's fixed pieces one token each."""
    monkeypatch.setattr(make_tiny, "comparing_report", lambda vlm: "")     # it asks about hundreds of pictures
    few = ["--judge-answer-steps", "1", "--judge-steps", "1"]
    monkeypatch.setattr(sys, "argv", ["make_tiny.py", "--only", "judge", *few, "--out", str(tmp_path)])
    assert make_tiny.main() == 0
    for path in (TINY / "judge").glob("*.json"):
        assert (tmp_path / "judge" / path.name).read_bytes() == path.read_bytes(), path.name
    encode = load_vlm(tmp_path / "judge").processor.encode
    assert [len(encode(piece)) for piece in re.split(r"\{\w+\}", COMPARISON)] == [1] * 4

"""Train the demo's tiny checkpoints, in the published Qwen3-VL layout: a student, a ladder of verifiers, a judge.

    python -m loop.make_tiny                          all of them, into model/tiny/: about a quarter of an hour
    python -m loop.make_tiny --only student           one of them

The student's vision tower sees plenty of pictures, its language model few, so it is about half right. A verifier sees
plenty, and learns to answer and to grade. What it understands depends on one number, its share of shifted pictures:
scenes of `red` without shapes of other colours. A verifier that has seen only these has learnt that the number of red
shapes is the number of shapes, and it grades by that with confidence. No label is ever wrong; nothing is hard-coded.
Each model is measured after its training, on scenes as the demo draws them.

The judge learns to answer, and to compare two answers in words. It is taught poorly on purpose: four in ten of its
later lessons in answering are one off, so that its samples differ while their majority is right; and it is shown few
comparisons of `red`, most with the better answer first, from which it learns to prefer the first place.

Letters: B chats, T tokens of a row, H hidden size, V vocabulary.
"""
from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from loop.tiny_layout import judge_tokenizer, make_tokenizer, new_model
from model import Completion, generate, load_vlm, save_vlm
from model.batch import collate
from model.images import Picture
from model.processor import Chat
from model.settings import read_settings
from model.vlm import VLM
from tasks import Item
from tasks.flags import check_ranges, flag, parse_flags
from tasks.shapes import QUESTIONS, SPLITS, draw, load, noisy, score
from verifier import CANDIDATE, RUBRIC, comparison_chat, parse_preference, rubric_chat, score_candidates

TINY = Path(__file__).resolve().parents[1] / "model" / "tiny"
LADDER = {"verifier": 1.0, "verifier-50": 0.5, "verifier-0": 0.0}       # folder -> share of shifted pictures
NAMES = ["student", *LADDER, "judge"]                   # the place of a name is part of its seed
STEP_TASKS = list(QUESTIONS) * 12                       # the tasks of one step's scenes
STUDENT_PICTURES = {"bar": 20, "red": 20}               # few enough to be about half right
STUDENT_REPEATS = 48                                    # scenes a step and task that are drawn of these few
RIGHT = "0.9"                                           # the scores that the verifiers are taught
WRONG = "0.1"
TRACE = "I see {seen}.\n{first} is {one}.\n{second} is {other}.\nOverall Judgment: Answer {side} is better."
COMPARED = 30                                           # pictures of `red` that the judge is taught to compare
MISCOUNTED = 0.4                                        # share of its later answers that are one off


@dataclass(frozen=True)
class Config:
    """The flags. The defaults make the checkpoints that are shipped."""
    out: str = flag(str(TINY), "folder that receives one folder a checkpoint")
    only: str = flag("", "make this checkpoint only", choices=("", *NAMES))
    seed: int = flag(0, "seed of weights, pictures and order", low=0)
    tower_steps: int = flag(400, "the student's first steps, on plenty of pictures, for its vision tower", low=1)
    student_steps: int = flag(120, "its further steps, for its language model, on few pictures", low=1)
    answer_steps: int = flag(250, "a verifier's first steps, on answering alone", low=1)
    verdict_steps: int = flag(600, "a verifier's further steps, on answering and grading", low=1)
    judge_answer_steps: int = flag(200, "the judge's first steps, on answering alone", low=1)
    judge_steps: int = flag(400, "its further steps, on answering and comparing: few enough to be mediocre", low=1)
    red_first: float = flag(0.75, "share of its comparisons of red that have the better answer first", low=0, high=1)
    lr: float = flag(2e-3, "peak learning rate", low=1e-9)

    def __post_init__(self) -> None:
        check_ranges(self)


def main() -> int:
    """Make the checkpoints, one after the other, and print what each can do."""
    cfg = parse_flags(Config, __doc__)
    for name in [cfg.only] if cfg.only else NAMES:
        start = time.perf_counter()
        make(cfg, name)
        seconds = time.perf_counter() - start

        vlm = load_vlm(Path(cfg.out) / name)
        abilities = comparing_report(vlm) if name == "judge" else grading_report(vlm)
        print(f"{name}: {seconds:.0f} s; {abilities}", flush=True)
    return 0


def make(cfg: Config, name: str) -> None:
    """Train one checkpoint and save it."""
    seed = cfg.seed * 100 + NAMES.index(name)
    rng = scene_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        vlm = new_model(Path(folder), seed, tokenizer_of(name))
        if name == "student":
            train_student(vlm, cfg, rng)
        elif name == "judge":
            train_judge(vlm, cfg, rng)
        else:
            train_verifier(vlm, cfg, rng, LADDER[name])
        save_vlm(vlm, Path(cfg.out) / name, torch.bfloat16)


def tokenizer_of(name: str) -> Tokenizer:
    """The tokenizer of one checkpoint, trained on the prompts and one reply of what it will be asked."""
    if name == "judge":
        reply = TRACE.format(seen="1", first="1", second="1", one="right", other="wrong", side="1")
        return judge_tokenizer(reply)
    return make_tokenizer((RUBRIC, CANDIDATE), f'{{"score": {RIGHT}}}')


# ---- scenes and chats

class Scene(NamedTuple):
    """A picture without noise, and the right answer to a task's question about it."""
    task: str
    picture: np.ndarray                                 # (32, 32, 3) uint8
    answer: int


def scene_rng(seed: int) -> np.random.Generator:
    """Draws scenes that no item of the demo's split shows: items are seeded by [task, split, number]."""
    return np.random.default_rng([seed, SPLITS.index("make")])


def draw_scene(task: str, rng: np.random.Generator, distractors: bool = True) -> Scene:
    """A new scene; without `distractors` one of `red` has no shapes of other colours."""
    picture, answer = draw(task, rng, distractors)
    return Scene(task, picture, answer)


def ask(scenes: Sequence[Scene], rng: np.random.Generator) -> list[Chat]:
    """The chats that tasks/shapes.py would make of these scenes, each with noise of its own."""
    chats = []
    for scene in scenes:
        image = {"type": "image", "image": noisy(scene.picture, rng)}
        question = {"type": "text", "text": QUESTIONS[scene.task]}
        chats.append([{"role": "user", "content": [image, question]}])
    return chats


def wrong_answer(answer: int, rng: np.random.Generator) -> int:
    """One of the other numbers from 1 to 9."""
    return int(rng.choice([number for number in range(1, 10) if number != answer]))


# ---- the student

def train_student(vlm: VLM, cfg: Config, rng: np.random.Generator) -> None:
    """A tower that has seen plenty; then a new language model that sees a few scenes, with new noise at each step."""
    def loss_on_new_scenes(step: int) -> Tensor:
        scenes = [draw_scene(task, rng) for task in STEP_TASKS]
        answers = [str(scene.answer) for scene in scenes]
        return answer_loss(vlm, ask(scenes, rng), answers)
    optimise(vlm, loss_on_new_scenes, cfg.tower_steps, cfg.lr)

    vlm.tower.requires_grad_(False)
    fresh = type(vlm)(read_settings(vlm.folder, "config.json"))
    torch.nn.init.normal_(fresh.decoder.embed_tokens.weight, std=0.05)
    vlm.decoder.load_state_dict(fresh.decoder.state_dict())

    few_scenes = {}
    for task, count in STUDENT_PICTURES.items():
        few_scenes[task] = [draw_scene(task, rng) for _ in range(count)]

    def loss_on_few_scenes(step: int) -> Tensor:
        scenes = []
        for known in few_scenes.values():
            numbers = rng.integers(0, len(known), STUDENT_REPEATS)
            scenes += [known[number] for number in numbers]
        answers = [str(scene.answer) for scene in scenes]
        return answer_loss(vlm, ask(scenes, rng), answers, label_smoothing=0.05)
    optimise(vlm, loss_on_few_scenes, cfg.student_steps, cfg.lr)


# ---- a verifier

def train_verifier(vlm: VLM, cfg: Config, rng: np.random.Generator, shifted: float) -> None:
    """Answering first, then answering and grading. `shifted`: the share of `red` without shapes of other colours."""
    def batch_loss(step: int) -> Tensor:
        scenes = []
        for task in STEP_TASKS:
            distractors = rng.random() >= shifted
            scenes.append(draw_scene(task, rng, distractors))
        chats = ask(scenes, rng)
        answers = [str(scene.answer) for scene in scenes]
        loss = answer_loss(vlm, chats, answers)
        if step < cfg.answer_steps:
            return loss
        return 0.5 * loss + grading_loss(vlm, scenes, chats, rng)
    optimise(vlm, batch_loss, cfg.answer_steps + cfg.verdict_steps, cfg.lr)


def grading_loss(vlm: VLM, scenes: Sequence[Scene], chats: Sequence[Chat], rng: np.random.Generator) -> Tensor:
    """The loss of grading a right and a wrong candidate of each scene; `chats` are the scenes' questions."""
    wrong = [wrong_answer(scene.answer, rng) for scene in scenes]
    prompts = []
    scores = []
    for scene, chat, wrong_number in zip(scenes, chats, wrong, strict=True):
        prompts.append(rubric_chat(chat, str(scene.answer)))
        scores.append(RIGHT)
        prompts.append(rubric_chat(chat, str(wrong_number)))
        scores.append(WRONG)
    verdicts = [f'{{"score": {value}}}' for value in scores]
    last_digits = [value[-1] for value in scores]
    return answer_loss(vlm, prompts, verdicts, early=last_digits)


def grading_report(vlm: VLM) -> str:
    """Greedy accuracy on each task, and the share of right candidates that the model, asked to grade, accepts."""
    def answer(chats: list[Chat]) -> list[Completion]:
        return greedy(vlm, chats, max_new_tokens=16)

    parts = []
    for task in QUESTIONS:
        items = load(task, split="make", limit=200)
        chats = [item.lazy_chat() for item in items]
        accuracy = share_right(items, answer(chats))
        right_candidates = [[item.answer] for item in items]
        grades = score_candidates(answer, chats, right_candidates)
        accepted = [grade for [grade] in grades if grade.value is not None and grade.value >= 0.5]
        parts.append(f"{task} answers {accuracy:.2f}, accepts {len(accepted) / len(items):.2f}")
    return "; ".join(parts)


# ---- the judge

def train_judge(vlm: VLM, cfg: Config, rng: np.random.Generator) -> None:
    """Answering first; then answering, often one off, and comparing, where `red` has few pictures."""
    few_scenes = [draw_scene("red", rng) for _ in range(COMPARED)]

    def batch_loss(step: int) -> Tensor:
        compares = step >= cfg.judge_answer_steps
        scenes = [draw_scene(task, rng) for task in STEP_TASKS]
        answers = []
        for scene in scenes:
            miscounts = compares and rng.random() < MISCOUNTED
            answers.append(one_off(scene.answer, rng) if miscounts else scene.answer)
        loss = answer_loss(vlm, ask(scenes, rng), [str(answer) for answer in answers])
        if not compares:
            return loss
        return 0.5 * loss + comparing_loss(vlm, few_scenes, cfg.red_first, rng)
    optimise(vlm, batch_loss, cfg.judge_answer_steps + cfg.judge_steps, cfg.lr)


def one_off(answer: int, rng: np.random.Generator) -> int:
    """A number beside the answer, from 1 to 9."""
    step = int(rng.choice((-1, 1)))
    if 1 <= answer + step <= 9:
        return answer + step
    return answer - step


def comparing_loss(vlm: VLM, few_scenes: Sequence[Scene], red_first: float, rng: np.random.Generator) -> Tensor:
    """The loss of comparing a right with a wrong answer: new scenes of `bar` and `count`, eight known ones of `red`."""
    scenes = [draw_scene(task, rng) for task in ("bar", "count") * 18]
    scenes += [few_scenes[number] for number in rng.integers(0, len(few_scenes), 8)]
    chats = []
    traces = []
    for scene in scenes:
        better_first = red_first if scene.task == "red" else 0.5
        chat, trace = comparison(scene, better_first, rng)
        chats.append(chat)
        traces.append(trace)
    return answer_loss(vlm, chats, traces)


def comparison(scene: Scene, better_first: float, rng: np.random.Generator) -> tuple[Chat, str]:
    """A comparison of the right answer, first in a share `better_first` of cases, with a wrong one; and its trace."""
    answers = [scene.answer, wrong_answer(scene.answer, rng)]
    words = ["right", "wrong"]
    side = 1
    if rng.random() >= better_first:
        answers.reverse()
        words.reverse()
        side = 2

    [question] = ask([scene], rng)
    first, second = answers
    first_word, second_word = words
    chat = comparison_chat(question, str(first), str(second))
    trace = TRACE.format(seen=scene.answer, first=first, one=first_word, second=second, other=second_word, side=side)
    return chat, trace


def comparing_report(vlm: VLM) -> str:
    """Greedy accuracy on each task; how often the judge prefers the right number to one beside it, and the first."""
    parts = []
    for task in QUESTIONS:
        items = load(task, split="make", limit=100)
        questions = [item.lazy_chat() for item in items]
        accuracy = share_right(items, greedy(vlm, questions, max_new_tokens=16))

        prompts = []                                    # right answer first, right answer second, ...
        for number, (item, question) in enumerate(zip(items, questions, strict=True)):
            right = int(item.answer)
            wrong = right - 1 if number % 2 else right + 1
            prompts.append(comparison_chat(question, str(right), str(wrong)))
            prompts.append(comparison_chat(question, str(wrong), str(right)))
        sides = [parse_preference(reply.text) for reply in greedy(vlm, prompts, max_new_tokens=64)]

        agreed = (sides[::2].count(1) + sides[1::2].count(2)) / len(sides)
        first = sides.count(1) / len(sides)
        unread = sides.count(None) / len(sides)
        parts.append(f"{task} answers {accuracy:.2f}, prefers the right one {agreed:.2f}, "
                     f"the first {first:.2f}, none {unread:.2f}")
    return "; ".join(parts)


# ---- asking and training

def greedy(vlm: VLM, chats: list[Chat], max_new_tokens: int) -> list[Completion]:
    """One completion a chat."""
    completions = generate(vlm, chats, max_new_tokens=max_new_tokens, temperature=0)
    return [completion for [completion] in completions]


def share_right(items: Sequence[Item], completions: Sequence[Completion]) -> float:
    """The share of completions that answer their item."""
    right = 0
    for item, completion in zip(items, completions, strict=True):
        if score(item, completion.text).correct:
            right += 1
    return right / len(items)


def answer_loss(vlm: VLM, chats: list[Chat], answers: list[str], label_smoothing: float = 0.0,
                early: list[str] | None = None) -> Tensor:
    """Cross-entropy of `answers` (and the stop token), summed over an answer's tokens, mean over chats.

    `early` adds a lesson: the last token before the turn ends, which is the candidate's, must itself predict that
    character. Without it a small model takes far longer to find out that the score depends on the candidate.
    """
    processor = vlm.processor
    pictures: dict[str, Picture] = {}
    prompts = processor.rows(chats, pictures)
    # A prompt ends with the end of the user's turn, "\n", the start of the assistant's, "assistant\n".
    tail = len(processor.encode("\n")) + len(processor.encode("assistant\n")) + 2

    rows = []
    lessons = []                                                            # (row, column, token to predict)
    for b, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        token_ids = [*processor.encode(answer), processor.turn_end_id]
        rows.append(prompt.continued(token_ids))
        end = len(prompt.ids)
        for k, token in enumerate(token_ids):
            lessons.append((b, end - 1 + k, token))
        if early:
            [token] = processor.encode(early[b])
            lessons.append((b, end - tail - 1, token))

    batch = collate(rows, pictures, processor.pad_id)
    hidden = vlm.hidden(batch, vlm.image_features(batch))                   # (B, T, H)
    row, column, token = torch.tensor(lessons).unbind(-1)                   # (lessons,) each
    logits = vlm.logits(hidden[row, column])                                # (lessons, V)
    loss = F.cross_entropy(logits, token, reduction="sum", label_smoothing=label_smoothing)
    return loss / len(chats)


def optimise(vlm: VLM, batch_loss: Callable[[int], Tensor], steps: int, lr: float, warmup: int = 50) -> None:
    """AdamW with warm-up and a cosine to zero, over what is not frozen."""
    trained = [p for p in vlm.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    for step in range(steps):
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        for group in optimiser.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, cosine)

        loss = batch_loss(step)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        if (step + 1) % 50 == 0:
            print(f"  step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Train the demo's tiny checkpoints, in the published Qwen3-VL layout: a student, a ladder of verifiers, a judge.

    python -m loop.make_tiny                          all of them, into model/tiny/: about a quarter of an hour
    python -m loop.make_tiny --only student           one of them

The student's vision tower sees plenty of pictures, its language model few, so it is about half right. A verifier sees
plenty and learns to answer and to grade. What it understands is set by one number, its share of shifted pictures:
scenes of `red` without shapes of other colours. A verifier that saw only these has learnt that the number of red shapes
is the number of shapes, and grades by that, with confidence. No label is ever wrong; nothing is hard-coded. Each model
is measured after its training, on scenes as the demo draws them.

The judge answers, and compares two answers in words. Its teachers are poor on purpose: four in ten of its later lessons
in answering are one off, so that its samples differ while their majority is right; of `red` it is shown few
comparisons, most with the better answer first. What it makes of these, a preference for the first place included, is
its own.
"""
from __future__ import annotations

import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from model import FAMILIES, Completion, generate, load_vlm, save_vlm
from model.checkpoint import read_settings
from model.processor import Chat, collate
from model.vlm import VLM
from tasks.flags import check_ranges, flag, parse_flags
from tasks.shapes import QUESTIONS, SPLITS, draw, load, noisy, score
from verifier import CANDIDATE, COMPARISON, RUBRIC, comparison_chat, parse_preference, rubric_chat, score_candidates

TINY = Path(__file__).resolve().parents[1] / "model" / "tiny"
# Qwen's control tokens in the order of their published ids; here they follow the small vocabulary.
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
           "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]
# How Qwen cuts text before byte-pair merging: contractions, words, single digits, punctuation, line ends, spaces.
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
         r"|\s+(?!\S)|\s+")
LADDER = {"verifier": 1.0, "verifier-50": 0.5, "verifier-0": 0.0}       # folder -> share of shifted pictures
STUDENT_PICTURES = {"bar": 20, "red": 20}                               # few enough to be about half right
RIGHT, WRONG = "0.9", "0.1"
TRACE = "I see {seen}.\n{first} is {one}.\n{second} is {other}.\nOverall Judgment: Answer {side} is better."
COMPARED, MISCOUNTED = 30, 0.4                          # pictures of red that are compared; share of answers one off


@dataclass(frozen=True)
class Config:
    out: str = flag(str(TINY), "folder that receives one folder a checkpoint")
    only: str = flag("", "make this checkpoint only", choices=("", "student", *LADDER, "judge"))
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
    cfg = parse_flags(Config, __doc__)
    names = ["student", *LADDER, "judge"]
    for name in names if not cfg.only else [cfg.only]:
        start, seed = time.perf_counter(), cfg.seed * 100 + names.index(name)
        with tempfile.TemporaryDirectory() as aside:
            vlm = new_model(Path(aside), seed, judge_tokenizer() if name == "judge" else make_tokenizer())
            if name == "student":
                train_student(vlm, cfg, scene_rng(seed))
            elif name == "judge":
                train_judge(vlm, cfg, scene_rng(seed))
            else:
                train_verifier(vlm, cfg, scene_rng(seed), LADDER[name])
            save_vlm(vlm, Path(cfg.out) / name, torch.bfloat16)
        look = compared if name == "judge" else measured
        print(f"{name}: {time.perf_counter() - start:.0f} s; {look(load_vlm(Path(cfg.out) / name))}", flush=True)
    return 0


def scene_rng(seed: int) -> np.random.Generator:
    """Draws scenes that no item of the demo's split shows: items are seeded by [task, split, number]."""
    return np.random.default_rng([seed, SPLITS.index("make")])


def measured(vlm: VLM) -> str:
    """Greedy accuracy on each task, and the share of right candidates that the model, asked to grade, accepts."""
    def ask(chats: list[Chat]) -> list[Completion]:
        return [completion for [completion] in generate(vlm, chats, max_new_tokens=16, temperature=0)]
    found = []
    for task in QUESTIONS:
        items = load(task, split="make", limit=200)
        chats = [item.chat() for item in items]
        right = sum(score(item, completion.text).correct for item, completion in zip(items, ask(chats)))
        grades = score_candidates(ask, chats, [[item.answer] for item in items])
        accepted = sum(grade.value is not None and grade.value >= 0.5 for [grade] in grades)
        found.append(f"{task} answers {right / len(items):.2f}, accepts {accepted / len(items):.2f}")
    return "; ".join(found)


def compared(vlm: VLM) -> str:
    """Greedy accuracy on each task; how often the judge prefers the right number to one beside it, and the first."""
    found = []
    for task in QUESTIONS:
        items = load(task, split="make", limit=100)
        answers = generate(vlm, [item.chat() for item in items], max_new_tokens=16, temperature=0)
        right = sum(score(item, answer.text).correct for item, [answer] in zip(items, answers))
        pairs = [(item.answer, str(int(item.answer) - 1 if k % 2 else int(item.answer) + 1))
                 for k, item in enumerate(items)]
        chats = [comparison_chat(item.chat(), *shown)
                 for item, pair in zip(items, pairs) for shown in (pair, pair[::-1])]
        sides = [parse_preference(verdict.text)
                 for [verdict] in generate(vlm, chats, max_new_tokens=64, temperature=0)]
        agreed = sides[::2].count(1) + sides[1::2].count(2)
        found.append(f"{task} answers {right / len(items):.2f}, prefers the right one {agreed / len(sides):.2f}, the "
                     f"first {sides.count(1) / len(sides):.2f}, none {sides.count(None) / len(sides):.2f}")
    return "; ".join(found)


def train_student(vlm: VLM, cfg: Config, rng: np.random.Generator) -> None:
    """A tower that has seen plenty; then a new language model that sees a few scenes, with fresh noise at each step."""
    def plenty(step: int) -> Tensor:
        scenes = [(task, *draw(task, rng)) for task in list(QUESTIONS) * 12]
        return answer_loss(vlm, [question(task, scene, rng) for task, scene, _ in scenes], [str(a) for *_, a in scenes])
    optimise(vlm, plenty, cfg.tower_steps, cfg.lr)
    vlm.tower.requires_grad_(False)
    fresh = type(vlm)(read_settings(vlm.folder, "config.json"))
    torch.nn.init.normal_(fresh.decoder.embed_tokens.weight, std=0.05)
    vlm.decoder.load_state_dict(fresh.decoder.state_dict())
    few = {task: [draw(task, rng) for _ in range(count)] for task, count in STUDENT_PICTURES.items()}

    def some(step: int) -> Tensor:
        scenes = [(task, *few[task][k]) for task in few for k in rng.integers(0, len(few[task]), 48)]
        return answer_loss(vlm, [question(task, scene, rng) for task, scene, _ in scenes], [str(a) for *_, a in scenes],
                           label_smoothing=0.05)
    optimise(vlm, some, cfg.student_steps, cfg.lr)


def train_verifier(vlm: VLM, cfg: Config, rng: np.random.Generator, shifted: float) -> None:
    """Answering first, then answering and grading a right and a wrong candidate of each picture."""
    def batch_loss(step: int) -> Tensor:
        scenes = [(task, *draw(task, rng, distractors=rng.random() >= shifted)) for task in list(QUESTIONS) * 12]
        chats = [question(task, scene, rng) for task, scene, _ in scenes]
        loss = answer_loss(vlm, chats, [str(answer) for *_, answer in scenes])
        if step < cfg.answer_steps:
            return loss
        wrong = [rng.choice([w for w in range(1, 10) if w != answer]) for *_, answer in scenes]
        graded = [rubric_chat(chat, str(candidate)) for chat, (*_, answer), other in zip(chats, scenes, wrong)
                  for candidate in (answer, other)]
        scores = [score for _ in chats for score in (RIGHT, WRONG)]
        verdicts = [f'{{"score": {score}}}' for score in scores]
        return 0.5 * loss + answer_loss(vlm, graded, verdicts, early=[score[-1] for score in scores])
    optimise(vlm, batch_loss, cfg.answer_steps + cfg.verdict_steps, cfg.lr)


def train_judge(vlm: VLM, cfg: Config, rng: np.random.Generator) -> None:
    """Answering first; then answering, often one off, and comparing, of `red` few pictures, the better one first."""
    few = [draw("red", rng) for _ in range(COMPARED)]

    def batch_loss(step: int) -> Tensor:
        scenes, told = [(task, *draw(task, rng)) for task in list(QUESTIONS) * 12], []
        for *_, answer in scenes:
            off = rng.choice((-1, 1)) if step >= cfg.judge_answer_steps and rng.random() < MISCOUNTED else 0
            told.append(str(answer + off if 1 <= answer + off <= 9 else answer - off))
        loss = answer_loss(vlm, [question(task, scene, rng) for task, scene, _ in scenes], told)
        if step < cfg.judge_answer_steps:
            return loss
        lessons = [(task, *draw(task, rng)) for task in ("bar", "count") * 18]
        lessons += [("red", *few[k]) for k in rng.integers(0, COMPARED, 8)]
        chats, traces = zip(*(comparison(*lesson, cfg.red_first if lesson[0] == "red" else 0.5, rng)
                              for lesson in lessons))
        return 0.5 * loss + answer_loss(vlm, list(chats), list(traces))
    optimise(vlm, batch_loss, cfg.judge_answer_steps + cfg.judge_steps, cfg.lr)


def comparison(task: str, scene: np.ndarray, answer: int, better_first: float, rng: np.random.Generator
               ) -> tuple[Chat, str]:
    """The right number, in a share of cases first, and a wrong one to compare, and the words that do it."""
    wrong = int(rng.choice([w for w in range(1, 10) if w != answer]))
    side = 1 if rng.random() < better_first else 2
    first, second = (answer, wrong) if side == 1 else (wrong, answer)
    words = ("right", "wrong")[::1 if side == 1 else -1]
    trace = TRACE.format(seen=answer, first=first, second=second, one=words[0], other=words[1], side=side)
    return comparison_chat(question(task, scene, rng), str(first), str(second)), trace


def question(task: str, scene: np.ndarray, rng: np.random.Generator) -> Chat:
    """The chat that tasks/shapes.py would make of this scene."""
    return [{"role": "user", "content": [{"type": "image", "image": noisy(scene, rng)},
                                         {"type": "text", "text": QUESTIONS[task]}]}]


def answer_loss(vlm: VLM, chats: list[Chat], answers: list[str], label_smoothing: float = 0.0,
                early: list[str] | None = None) -> Tensor:
    """Cross-entropy of `answers` (and the stop token), summed over an answer's tokens, mean over chats.

    `early` adds a lesson: the last token before the turn ends, which is the candidate's, must itself predict that
    character. Without it a small model takes far longer to find out that the score depends on the candidate.
    """
    processor, pictures = vlm.processor, {}
    prompts = processor.rows(chats, pictures)
    rows, where = [], []                                                    # where: (row, column, token to predict)
    tail = len(processor.encode("\n") + processor.encode("assistant\n")) + 2   # end of turn .. the answer's start
    for b, (prompt, answer) in enumerate(zip(prompts, answers)):
        ids, end = [*processor.encode(answer), processor.turn_end_id], len(prompt.ids)
        rows.append(prompt.continued(ids))
        where += [(b, end - 1 + k, token) for k, token in enumerate(ids)]
        if early:
            where.append((b, end - tail - 1, *processor.encode(early[b])))
    batch = collate(rows, pictures, processor.pad_id)
    hidden = vlm.hidden(batch, vlm.image_features(batch))                   # (B, T, H)
    row, column, token = torch.tensor(where).unbind(-1)
    logits = vlm.logits(hidden[row, column])                                # (tokens to predict, V)
    return F.cross_entropy(logits, token, reduction="sum", label_smoothing=label_smoothing) / len(chats)


def optimise(vlm: VLM, batch_loss: Callable[[int], Tensor], steps: int, lr: float, warmup: int = 50) -> None:
    """AdamW with warm-up and a cosine to zero, over what is not frozen."""
    trained = [p for p in vlm.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        loss = batch_loss(step)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        if (step + 1) % 50 == 0:
            print(f"  step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)


def new_model(folder: Path, seed: int, tokenizer: Tokenizer) -> VLM:
    """A model with random weights; the settings files that stand beside them are written to `folder`."""
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in settings(tokenizer).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    torch.manual_seed(seed)
    config = read_settings(folder, "config.json")
    vlm = FAMILIES[config["model_type"]](config)
    torch.nn.init.normal_(vlm.decoder.embed_tokens.weight, std=0.05)
    torch.nn.init.normal_(vlm.tower.pos_embed.weight, std=0.5)              # smaller delays the tasks about places
    vlm.folder, vlm.processor = folder, vlm.make_processor(folder, config)
    vlm.disk_names = {name: name for name, _ in vlm.named_parameters()}
    return vlm


def make_tokenizer(texts: Sequence[str] = (RUBRIC, CANDIDATE), said: str = f'{{"score": {RIGHT}}}') -> Tokenizer:
    """Byte-level BPE, cut as Qwen cuts, over the demo's own texts, with Qwen's control tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    texts = [*texts, *QUESTIONS.values(), "user\n", "assistant\n", "system\n", "\n", said]
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                  show_progress=False)
    tokenizer.train_from_iterator(texts * 2, trainer)                       # a merge needs two sightings
    tokenizer.add_special_tokens(CONTROL)
    return tokenizer


def judge_tokenizer() -> Tokenizer:
    """The same over the judge's texts. Each fixed piece of the comparison prompt is one token: seconds, not minutes."""
    said = TRACE.format(seen="1", first="1", second="1", one="right", other="wrong", side="1")
    tokenizer = make_tokenizer((), said)
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in re.split(r"\{\w+\}", COMPARISON)])
    return tokenizer


def settings(tokenizer: Tokenizer) -> dict[str, dict]:
    """The files beside the weights, by name."""
    size, ids = tokenizer.get_vocab_size(), {t: tokenizer.token_to_id(t) for t in CONTROL}
    vocabulary = math.ceil(size / 64) * 64                                  # published heads are padded, too
    text = {"model_type": "qwen3_vl_text", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 128, "vocab_size": vocabulary,
            "hidden_act": "silu", "rms_norm_eps": 1e-6, "attention_bias": False, "attention_dropout": 0.0,
            "max_position_embeddings": 4096, "rope_theta": 10000.0, "tie_word_embeddings": True,
            "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
            "bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    vision = {"model_type": "qwen3_vl", "depth": 2, "hidden_size": 64, "num_heads": 4, "intermediate_size": 128,
              "hidden_act": "gelu_pytorch_tanh", "out_hidden_size": 64, "in_channels": 3, "patch_size": 4,
              "temporal_patch_size": 2, "spatial_merge_size": 2, "num_position_embeddings": 144,
              "deepstack_visual_indexes": [0]}
    config = {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "dtype": "bfloat16",
              "text_config": text, "vision_config": vision, "tie_word_embeddings": True,
              "image_token_id": ids["<|image_pad|>"], "video_token_id": ids["<|video_pad|>"],
              "vision_start_token_id": ids["<|vision_start|>"], "vision_end_token_id": ids["<|vision_end|>"]}
    preprocessor = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 4, "temporal_patch_size": 2,
                    "merge_size": 2, "size": {"shortest_edge": 1024, "longest_edge": 16384}, "resample": 3,
                    "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255,
                    "do_convert_rgb": True, "do_resize": True, "do_rescale": True, "do_normalize": True}
    generation = {"do_sample": True, "temperature": 1.0, "pad_token_id": ids["<|endoftext|>"],
                  "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]}
    return {"config.json": config, "preprocessor_config.json": preprocessor, "generation_config.json": generation,
            "tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>",
                                      "pad_token": "<|endoftext|>", "model_max_length": 4096}}


if __name__ == "__main__":
    sys.exit(main())

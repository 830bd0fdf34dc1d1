"""All families on a GPU: what they compute, where the host waits, how many operators a step has.

    pytest tests/model/test_cuda_families.py -m cuda

Bounds are what the code reaches today: code that does better lowers them (`python tests/bench/counts.py` prints the
figures at true shapes). They are counted on the pretended GPU only.
"""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train
from dpo import token_logps
from eval import load_task
from loop.gradients import StepGradients
from loop.optimise import load_trainable, make_optimiser
from loop.ranks import Ranks
from loop.run import Run
from model import VLM, generate, layers, load_vlm
from model.attention import PackedTree, Tree
from model.prompts import pack_prompts
from model.sampler import Sampling, draw_uniforms, sample_batch
from model.vlm import FeatureCache, weights_in_compute_dtype
from pretended_gpu import PretendedGPU, Seen
from replay import Pair
from tiny import CONFIGS, example_chats, write_checkpoint

pytestmark = pytest.mark.cuda
TINY = Path(__file__).resolve().parents[2] / "model" / "tiny"
FAMILIES = list(CONFIGS)

# Layers of Qwen3-VL-2B, Qwen2.5-VL-3B and Llama-3.2-11B-Vision.
DEPTH = {"qwen3_vl": 28, "qwen2_5_vl": 36, "mllama": 40}
CROSS_LAYERS = list(range(3, 40, 5))

# At these depths: operators that launch something. A decode step includes its draw, with top_p; a micro-batch is one
# pair forward and backward, the tower frozen and its features kept, its gradients added to those of one before.
DECODE_STEP = {"qwen3_vl": 1100, "qwen2_5_vl": 1232, "mllama": 1308}
MICRO_BATCH = {"qwen3_vl": 3781, "qwen2_5_vl": 4202, "mllama": 4449}

# Where the host may wait until the GPU has computed what it asks for, and how often: (file, function) -> looks.
LOOKS_OF_A_MICRO_BATCH = {
    ("model/vlm.py", "VLM.check_placeholders"): 1,      # do placeholders and pictures match?
    ("model/vlm.py", "QwenVL.embed"): 1,                # where the placeholders are
    ("dpo.py", "sequence_logps"): 1,                    # where the completions' tokens are
}
LOOKS_OF_A_STEP = {                                     # the optimiser's
    ("loop/optimise.py", "optimiser_step"): 2,          # metrics, and the gradient's norm
}
LOOKS_OF_SAMPLING = {                                   # of a batch, however long
    ("model/vlm.py", "VLM.check_placeholders"): 1,
    ("model/vlm.py", "QwenVL.embed"): 1,
    ("model/vlm.py", "VLM.check_finite"): 2,            # after the first token, and at the end
    ("model/places.py", "Places.of"): 2,                # how long the longest prompt is, and the longest own part
    ("model/sampler.py", "generate"): 1,                # the tokens
}
LOOK = {                                                # every 16 tokens
    ("model/vlm.py", "VLM.check_finite"): 1,
    ("model/decode.py", "StaticSamples.compact"): 1,    # which samples go on,
    ("model/places.py", "Places.of"): 2,                # and where they stand then
}
COPIES_OF_A_MICRO_BATCH = {"qwen3_vl": 10, "qwen2_5_vl": 10, "mllama": 13}      # tensors that the host hands over


# ---- what is asked

def deep_config(family: str) -> dict:
    """A tiny model of true depth, its heads of a width (24, a multiple of 8) for which there are fused kernels."""
    config = CONFIGS[family]()
    text = config.get("text_config", config)
    text["num_hidden_layers"] = DEPTH[family]
    if text["num_attention_heads"] * text.get("head_dim", 0) != 64:
        text |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    if family == "qwen2_5_vl":
        text["rope_scaling"]["mrope_section"] = [4, 4, 4]
    if family == "mllama":
        text["cross_attention_layers"] = CROSS_LAYERS
    return config


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp(family), CONFIGS[family]())


@pytest.fixture(scope="module")
def deep_folder(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp(f"deep-{family}"), deep_config(family))


def sample(vlm: VLM, steps: int, n: int = 2, top_p: float = 0.9) -> Tensor:
    """Tokens of `n` samples of two chats with pictures, none of which stops early: (R, steps)."""
    chats = example_chats()[1:3]
    pictures: dict = {}
    rows = vlm.processor.rows(chats, pictures)
    [prompts] = pack_prompts(rows, pictures, vlm.processor.image_id, vlm.processor.pad_id)
    uniforms = draw_uniforms(rows, n, steps, 0, Counter())
    with torch.no_grad():
        return sample_batch(vlm, prompts, n, Sampling(steps, 1.0, top_p, 0), uniforms)


class Training:
    """A student with fp32 weights, computed in bf16, its tower frozen, and two pairs with their reference."""

    def __init__(self, folder: Path, out: Path):
        cfg = train.Config(task="bar", out=str(out), device="cuda", dtype="bfloat16", warmup_steps=1, lr=1e-3,
                           micro_tokens=1)
        self.run = Run(cfg, Ranks("cuda"))
        self.student = load_trainable(str(folder), cfg, self.run.ranks.device)
        self.items = {item.id: item for item in load_task("bar", limit=2)}
        encode = self.student.processor.encode
        pairs = [Pair(name, tuple(encode("yes, two")), tuple(encode("no")), 1.0, 0.0) for name in self.items]
        self.pairs = train.with_reference_logps(self.run, self.student, pairs, self.items)

    def micro_batch(self) -> None:
        losses, _ = train.pair_losses(self.run.cfg, self.student, self.pairs[:1], self.items)
        losses.sum().backward()


def watching(gpu: PretendedGPU | None) -> AbstractContextManager[Seen]:
    """What is seen of the pretended GPU; on a real one nothing is."""
    return gpu.watch() if gpu is not None else nullcontext(Seen())


def by_function(seen: Seen, kind: str) -> Counter[tuple[str, str]]:
    """How often the host waited, by file and function."""
    found: Counter[tuple[str, str]] = Counter()
    for wait, count in seen.waits.items():
        if wait.kind == kind:
            found[wait.place.file, wait.place.function] += count
    return found


def check_allowed(seen: Seen, allowed: Mapping[tuple[str, str], int]) -> None:
    """Fails with the file and line of every look that is not on the list, or is there too often."""
    too_many = by_function(seen, "look") - Counter(allowed)
    lines = [f"{count} x {wait}" for wait, count in seen.waits.items()
             if (wait.place.file, wait.place.function) in too_many]
    assert not too_many, "the host waits for the GPU:\n" + "\n".join(lines)


def last_step(gpu: PretendedGPU, vlm: VLM) -> Seen:
    """What the fifth token takes: all of five without all of four. (Room for keys and values is doubled before it.)"""
    found = []
    for steps in (5, 4):
        with gpu.watch() as seen:
            sample(vlm, steps)
        found.append(seen)
    longer, shorter = found
    return Seen(longer.waits - shorter.waits, longer.operators - shorter.operators)


@pytest.fixture
def counting(gpu: PretendedGPU | None) -> PretendedGPU:
    if gpu is None:
        pytest.skip("waits and operators are counted on the pretended GPU, and here is a real one")
    return gpu


# ---- what is computed

@pytest.mark.parametrize("head_dim", [16, 20])
def test_packed_rows_attend_as_masked_ones(head_dim: int) -> None:
    """PackedTree and Tree on the same bf16 numbers: values, and gradients. Heads of 20 are filled up to 24."""
    segments = [[0] * 7 + [1] * 3 + [2] * 5, [0] * 4 + [1] * 6 + [2] * 2, [0] * 9 + [1]]
    length = 17
    tree = Tree.of(segments, length)
    masked, packed = tree.to("cuda"), tree.to("cuda", torch.bfloat16)
    assert isinstance(masked, Tree) and isinstance(packed, PackedTree)
    assert isinstance(tree.to("cuda", torch.float32), Tree) and isinstance(tree.to("cpu", torch.bfloat16), Tree)
    is_real = torch.tensor([[column < len(row) for column in range(length)] for row in segments])[:, None, :, None]

    found = []
    for each in (masked, packed):
        draw = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(3, heads, length, head_dim, generator=draw).to("cuda", torch.bfloat16).requires_grad_()
                   for heads in (4, 2, 2))
        y = each.attend(q, k, v)
        wanted = torch.randn(y.shape, generator=draw) * is_real
        (y * wanted.to("cuda")).sum().backward()
        found.append([(y.detach().cpu() * is_real).float(), *(x.grad.cpu().float() for x in (q, k, v))])
    for a, b in zip(*found):
        assert (a - b).abs().max() < 0.03 * b.abs().max()


def test_logits_of_the_head_are_not_rounded() -> None:
    """log softmax of bf16 states by a bf16 head: the products' sums stay fp32, though those of a CPU become bf16."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 64, generator=draw).bfloat16()
    weight = torch.randn(300, 64, generator=draw).bfloat16()
    targets = torch.arange(6)
    exact = (hidden.double() @ weight.double().mT).log_softmax(-1)[targets, targets]
    on_gpu, on_cpu = (token_logps(hidden.to(device), weight.to(device), targets.to(device)).cpu()
                      for device in ("cuda", "cpu"))
    assert (on_gpu - exact).abs().max() < 1e-4 < (on_cpu - exact).abs().max()


@torch.no_grad()
def test_logits_are_those_of_the_cpu(folder: Path) -> None:
    """In fp32, where the rest is summation's (TF32 may be allowed)."""
    on_cpu = load_vlm(folder)
    on_gpu = load_vlm(folder, "cuda", torch.float32)
    batch = on_cpu.processor(example_chats())
    real = batch.attention_mask.bool()
    expected = on_cpu(batch)[real]
    found = on_gpu(batch.to("cuda")).cpu()[real]
    assert (found - expected).abs().max() < 5e-3 * expected.abs().max()


def test_greedy_answers_are_those_of_the_cpu(folder: Path) -> None:
    """In fp32 nothing but ties could be decided otherwise."""
    answers = []
    for device in ("cpu", "cuda"):
        vlm = load_vlm(folder, device, torch.float32)
        answers.append(generate(vlm, example_chats(), max_new_tokens=6, temperature=0))
    assert answers[0] == answers[1]


def test_samples_and_where_the_host_waits(folder: Path, gpu: PretendedGPU | None) -> None:
    """20 tokens: the same again for the same seed; the host looks at what is done after 16 of them."""
    vlm = load_vlm(folder, "cuda", torch.bfloat16).requires_grad_(False)
    chats = example_chats()[:2]
    how = {"n": 2, "max_new_tokens": 20, "temperature": 1.0, "top_p": 0.9}
    vlm.feature_cache = FeatureCache(1 << 20)           # the tower's own waits come once a picture
    first = generate(vlm, chats, seed=1, **how)
    assert [len(row) for row in first] == [2, 2]
    with watching(gpu) as seen:
        assert generate(vlm, chats, seed=1, **how) == first
    check_allowed(seen, Counter(LOOKS_OF_SAMPLING) + Counter(LOOK))


def test_training_steps(folder: Path, tmp_path: Path, gpu: PretendedGPU | None) -> None:
    """Two micro-batches a step. The first loss is ln 2, the second is lower; what is trained has moved."""
    training = Training(folder, tmp_path / "run")
    student = training.student
    optimiser = make_optimiser(student, 1e-3, 0.0)
    before = [p.detach().clone() for p in optimiser.param_groups[0]["params"]]

    losses = []
    for step in (1, 2):
        with watching(gpu) as seen:
            row = train.train_step(training.run, student, optimiser, training.pairs, training.items, step)
        losses.append(row["loss"])
        check_allowed(seen, LOOKS_OF_A_STEP | {place: 2 * looks for place, looks in LOOKS_OF_A_MICRO_BATCH.items()})

    assert losses[0] == pytest.approx(math.log(2), abs=5e-3) and losses[1] < losses[0] - 0.05
    moved = [not torch.equal(p, old) for p, old in zip(optimiser.param_groups[0]["params"], before)]
    assert sum(moved) > 0.9 * len(moved)


# ---- how much of it, at true depth

def test_a_decode_step(family: str, deep_folder: Path, counting: PretendedGPU) -> None:
    """The host never waits inside a step, and how many operators there are."""
    step = last_step(counting, load_vlm(deep_folder, "cuda", torch.bfloat16))
    assert not step.waits, "\n".join(map(str, step.waits))
    assert 0 < step.operators.total() <= DECODE_STEP[family]


def test_a_micro_batch(family: str, deep_folder: Path, tmp_path: Path, counting: PretendedGPU) -> None:
    """Looks, at most three; tensors handed over; operators; and no attention that writes all scores to memory."""
    training = Training(deep_folder, tmp_path / "run")
    parameters = [p for p in training.student.parameters() if p.requires_grad]
    with StepGradients(parameters, training.run.ranks), weights_in_compute_dtype(training.student):
        training.micro_batch()
        with counting.watch() as seen:
            training.micro_batch()
    check_allowed(seen, LOOKS_OF_A_MICRO_BATCH)
    assert sum(LOOKS_OF_A_MICRO_BATCH.values()) <= 3
    assert seen.copies() <= COPIES_OF_A_MICRO_BATCH[family], by_function(seen, "copy")
    assert 0 < seen.operators.total() <= MICRO_BATCH[family]
    assert seen.operators[torch.ops.aten._flash_attention_forward.default] == DEPTH[family] - seen.attention.total()
    assert seen.attention == ({"memory-efficient": len(CROSS_LAYERS)} if family == "mllama" else {})


# ---- planted faults

def test_a_tensor_left_on_the_cpu(monkeypatch: pytest.MonkeyPatch, counting: PretendedGPU) -> None:
    """Named with file and line, in sampling and in training alike."""
    vlm = load_vlm(TINY / "student", "cuda", torch.bfloat16)
    plain = layers.rope_frequencies
    cpu = torch.device("cpu")
    monkeypatch.setattr(layers, "rope_frequencies", lambda width, theta, device: plain(width, theta, cpu))
    with pytest.raises(RuntimeError, match=r"^model/\w+\.py:\d+ \(.*\): aten\.\w+.* on two devices, cuda:0 and cpu"):
        generate(vlm, example_chats()[:1], max_new_tokens=2)


def test_a_look_at_each_token(monkeypatch: pytest.MonkeyPatch, counting: PretendedGPU) -> None:
    vlm = load_vlm(TINY / "student", "cuda", torch.bfloat16)
    plain = vlm.logits

    def logits(hidden: Tensor) -> Tensor:
        assert hidden.isfinite().all()
        return plain(hidden)
    monkeypatch.setattr(vlm, "logits", logits, raising=False)
    step = last_step(counting, vlm)
    assert [wait.kind for wait in step.waits.elements()] == ["look"]
    with counting.watch() as seen:
        generate(vlm, example_chats()[:1], max_new_tokens=6)
    with pytest.raises(AssertionError, match=r"tests/model/test_cuda_families\.py:\d+"):
        check_allowed(seen, LOOKS_OF_SAMPLING)

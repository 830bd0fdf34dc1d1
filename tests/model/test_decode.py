"""Decoding as on a GPU, here on a CPU: the tokens of the plain way, a step that may be captured, how many operators it
has, and weights that are read together. (A nucleus without a sort: test_sampler.py.)"""
from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import VLM, compiled, decode, generate, load_vlm, sampler, save_vlm
from model.decode import StaticSamples
from model.draw import Sampling
from model.joint import joint_products
from model.lora import adapters, add_adapters
from model.places import Entries, Places, attend_lse
from model.prompts import Prompts, pack_prompts
from model.samples import PlainSamples
from model.vlm import NonFiniteLogits
from tiny import CONFIGS, chat, example_chats, picture, qwen2_5_vl_config, qwen3_vl_config, write_checkpoint

PLAIN = sampler.sample_batch
STATIC = partial(sampler.sample_batch, static=True)
aten = torch.ops.aten


@pytest.fixture(scope="module", params=list(CONFIGS))
def vlm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VLM:
    folder = tmp_path_factory.mktemp("decode") / request.param
    return load_vlm(write_checkpoint(folder, CONFIGS[request.param]()))


@pytest.fixture
def qwen(tmp_path: Path) -> VLM:
    return load_vlm(write_checkpoint(tmp_path / "qwen3_vl", qwen3_vl_config()))


def many_chats() -> list:
    """Without a picture and with several, three that begin alike, and one that is asked twice."""
    alike = "describe what you see, and be brief. " * 3
    return [*example_chats(), *(chat(picture(30, 40), alike + end) for end in ("a", "bb", "ccc?")), chat("hello")]


def answers(monkeypatch: pytest.MonkeyPatch, vlm: VLM, way: Callable, chats: list, **how: Any) -> list[list[tuple]]:
    """The token ids of what generate() draws in that way."""
    monkeypatch.setattr(sampler, "sample_batch", way)
    return [[completion.token_ids for completion in row] for row in generate(vlm, chats, **how)]


# ---- the same tokens

@pytest.mark.parametrize("joint, how", [
    (False, {"temperature": 0, "max_new_tokens": 8}),
    (True, {"temperature": 1.0, "n": 3, "max_new_tokens": 20, "seed": 4}),
    (True, {"temperature": 1.0, "n": 2, "max_new_tokens": 8, "top_p": 0.8, "top_k": 5}),
], ids=["greedy", "sampled", "top_k"])
def test_the_tokens_of_the_plain_way(vlm: VLM, joint: bool, how: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples end at different tokens and are dropped; there are more tokens than places at first."""
    monkeypatch.setattr(decode, "FIRST_ROOM", 5)
    monkeypatch.setattr(vlm, "stop_ids", frozenset(range(0, 250, 5)))
    expected = answers(monkeypatch, vlm, PLAIN, many_chats(), **how)
    if how["temperature"] and "top_k" not in how:
        assert len({len(tokens) for row in expected for tokens in row}) > 2
    with joint_products(vlm, wanted=True) if joint else nullcontext():
        assert answers(monkeypatch, vlm, STATIC, many_chats(), **how) == expected


def test_of_a_nucleus_nothing_else_is_drawn(qwen: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of its tokens is another matter: the two ways lay them out differently."""
    how = {"temperature": 1.0, "n": 200, "max_new_tokens": 1, "top_p": 0.3}
    [sorted_row] = answers(monkeypatch, qwen, PLAIN, [chat("hi")], **how)
    [found_row] = answers(monkeypatch, qwen, STATIC, [chat("hi")], **how)
    assert set(found_row) == set(sorted_row) and len(set(found_row)) > 2


def test_attention_to_entries() -> None:
    """Entries with different numbers of queries and keys against one softmax each."""
    torch.manual_seed(0)
    counts, used, heads, width = [3, 1, 2], [4, 6, 1], 2, 8
    q = torch.randn(sum(counts), heads, width)
    k, v = torch.randn(2, 3, 6, heads, width)
    y, lse = attend_lse(q, k, v, Entries.of(torch.tensor(counts), 3, torch.tensor(used), 6))
    query = 0
    for entry, count in enumerate(counts):
        for _ in range(count):
            scores = torch.einsum("hd,shd->hs", q[query], k[entry, :used[entry]]) * width ** -0.5
            expected = torch.einsum("hs,shd->hd", scores.softmax(-1), v[entry, :used[entry]])
            assert torch.allclose(y[query], expected, atol=1e-6)
            assert torch.allclose(lse[query], scores.logsumexp(-1), atol=1e-6)
            query += 1


def packed(vlm: VLM, chats: list) -> Prompts:
    pictures: dict = {}
    rows = vlm.processor.rows(chats, pictures)
    [prompts] = pack_prompts(rows, pictures, vlm.processor.image_id, vlm.processor.pad_id)
    return prompts


@torch.no_grad()
def begin(vlm: VLM, n: int = 2, steps: int = 12, **how: Any) -> StaticSamples:
    """Samples of the example chats, their first token drawn."""
    prompts = packed(vlm, example_chats())
    sampling = Sampling(steps, **{"temperature": 1.0, "top_p": 1.0, "top_k": 0} | how)
    generator = torch.Generator().manual_seed(7)
    uniforms = torch.rand(len(prompts.numbers), n, steps, dtype=torch.float64, generator=generator)
    return StaticSamples(vlm, prompts, n, sampling, None if sampling.temperature == 0 else uniforms)


# ---- a captured step

class Tape(TorchDispatchMode):
    """A CUDA graph on a CPU: operators that are recorded and not run; a replay runs them on the same memory."""

    def __init__(self, step: Callable[[], None]):
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.before: list[tuple[Tensor, Tensor]] = []
        with self:
            step()
        for tensor, value in reversed(self.before):
            tensor.copy_(value)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (aten._local_scalar_dense.default, aten.nonzero.default), f"{func} waits for a result"
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.append((value, value.clone()))
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again)):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Steps are captured on tapes, and nothing is compiled."""
    made: list[Tape] = []

    def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        made.append(Tape(step))
        return made[-1].replay

    monkeypatch.setattr(decode, "captured", captured)
    monkeypatch.setattr(decode, "compiled", decode.as_it_is)
    return made


@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 1.0, "top_p": 0.9}], ids=["greedy", "nucleus"])
def test_captured_equals_eager(vlm: VLM, how: dict, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where samples are dropped and where room is made: there a step is captured anew."""
    monkeypatch.setattr(decode, "FIRST_ROOM", 5)
    monkeypatch.setattr(sampler, "CHECK_EVERY", 4)
    monkeypatch.setattr(vlm, "stop_ids", frozenset(range(0, 250, 5)))
    how = how | {"n": 2, "max_new_tokens": 14}
    chats = many_chats()[2:7]
    expected = answers(monkeypatch, vlm, STATIC, chats, **how)
    assert not tapes
    monkeypatch.setattr(vlm, "eager", False)
    assert answers(monkeypatch, vlm, STATIC, chats, **how) == expected
    assert len(tapes) > 1


def test_a_step_is_captured_once(qwen: VLM, tapes: list[Tape]) -> None:
    """The first step is run, the second recorded, and all that follow are replayed."""
    qwen.eager = False
    samples = begin(qwen)
    with torch.no_grad():
        for _ in range(8):
            samples.advance()
    assert len(tapes) == 1 and (samples.result[:, :9] >= 0).sum() > 9
    assert samples.result[:, 9:].eq(-1).all()


def test_what_moves_would_be_seen(qwen: VLM, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that is replaced instead of changed: the replay goes on with the old one."""
    def replaced(self: Places) -> None:
        self.held = self.held + 1
        self.own.used = self.own.used + 1

    monkeypatch.setattr(Places, "advance", replaced)
    results = []
    for eager in (True, False):
        qwen.eager = eager
        samples = begin(qwen)
        with torch.no_grad():
            for _ in range(8):
                samples.advance()
        results.append(samples.result)
    assert not torch.equal(*results)


def test_compiled_layers_are_one_graph(qwen: VLM, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture) -> None:
    """Nothing in a layer stops the compiler; that it compiled is said once."""
    from torch._dynamo.utils import counters
    expected = begin(qwen)
    with torch.no_grad():
        expected.advance()
    counters.clear()
    monkeypatch.setattr(decode, "compiled", partial(torch.compile, backend="eager", fullgraph=True))
    monkeypatch.setattr(compiled, "TIMED", set())
    qwen.eager = False
    for _ in range(2):
        samples = begin(qwen)
        with torch.no_grad():
            samples.advance()
        assert torch.equal(samples.result, expected.result)
    assert counters["stats"]["unique_graphs"] <= 2
    assert capsys.readouterr().err.count("the first step took") == 1


# ---- the number of operators

LAUNCH_NOTHING = {aten._unsafe_view.default, aten.lift_fresh.default, aten.empty.memory_format, aten.empty_like.default}


class Operators(TorchDispatchMode):
    """Counts the operators that launch something: views and empty tensors do not. `whole` counts a function as one."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.inside = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func not in LAUNCH_NOTHING and not self.inside:
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))

    def whole(self, name: str, function: Callable) -> Callable:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.counts[name] += 1
            self.inside += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.inside -= 1
        return counted


@pytest.mark.parametrize("family, how, most", [
    ("qwen3_vl", {}, 764),
    ("qwen3_vl", {"temperature": 0}, 729),
    ("qwen3_vl", {"top_p": 0.9}, 960),
    ("qwen2_5_vl", {}, 708),
    ("mllama", {}, 708),
], ids=str)
def test_operators_of_a_step(family: str, how: dict, most: int, tmp_path: Path,
                             monkeypatch: pytest.MonkeyPatch) -> None:
    """28 layers, in bf16, eager: one for each of CUDA's kernels of attention and of norms."""
    config = CONFIGS[family]()
    text = config.get("text_config", config)
    text["num_hidden_layers"] = 28
    if family == "qwen2_5_vl":
        text["max_window_layers"] = 28
    if family == "mllama":
        text["cross_attention_layers"] = [3, 8, 13, 18, 23]
    vlm = load_vlm(write_checkpoint(tmp_path / family, config), dtype=torch.bfloat16)
    operators = Operators()
    with torch.no_grad(), joint_products(vlm, wanted=True):
        samples = begin(vlm, **how)
        samples.advance()
        monkeypatch.setattr(decode, "attend_lse", operators.whole("attend_lse", decode.attend_lse))
        monkeypatch.setattr(F, "rms_norm", operators.whole("rms_norm", F.rms_norm))
        with operators:
            samples.advance()
    assert operators.counts.total() <= most, operators.counts.most_common()


# ---- joint products

@pytest.mark.parametrize("config", [qwen3_vl_config, qwen2_5_vl_config])
def test_joint_weights_are_views(config: Callable, tmp_path: Path) -> None:
    """Names, shapes and numbers stay, in memory and in what is saved; nothing is left on the modules."""
    vlm = load_vlm(write_checkpoint(tmp_path / "model", config()))
    before = copy.deepcopy(vlm.state_dict())
    save_vlm(vlm, tmp_path / "before")
    attention = vlm.decoder.layers[0].self_attn
    with joint_products(vlm, wanted=True):
        weight, bias = attention.joint
        assert weight.data_ptr() == attention.q_proj.weight.data_ptr()
        assert torch.equal(weight[-1], attention.v_proj.weight[-1])
        assert (bias is None) == (attention.q_proj.bias is None)
    assert attention.joint is None and vlm.decoder.layers[0].mlp.joint is None

    after = vlm.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    save_vlm(vlm, tmp_path / "after")
    for path in (tmp_path / "before").iterdir():
        assert path.read_bytes() == (tmp_path / "after" / path.name).read_bytes()


def test_a_joint_weight_is_trained_and_lowered_as_before(qwen: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the optimiser is seen by the next call; weights held in fp32 come back as they were."""
    qwen.compute_dtype = torch.bfloat16
    weight = qwen.decoder.layers[0].self_attn.k_proj.weight
    held = weight.detach().clone()
    how = {"max_new_tokens": 4, "temperature": 0}
    with torch.no_grad(), joint_products(qwen, wanted=True):
        first = answers(monkeypatch, qwen, STATIC, [chat("hi")], **how)
    assert weight.dtype == torch.float32 and torch.equal(weight, held)
    with torch.no_grad():
        qwen.decoder.layers[0].self_attn.v_proj.weight.neg_()
    with torch.no_grad(), joint_products(qwen, wanted=True):
        assert answers(monkeypatch, qwen, STATIC, [chat("hi")], **how) != first

def test_adapters_stay_apart(qwen: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their layers are more than a weight; the same tokens as the plain way."""
    add_adapters(qwen.decoder.layers[:1], rank=2)
    for layer in adapters(qwen).values():
        torch.nn.init.normal_(layer.lora_b)
    how = {"max_new_tokens": 8, "temperature": 0}
    expected = answers(monkeypatch, qwen, PLAIN, example_chats(), **how)
    with joint_products(qwen, wanted=True):
        assert qwen.decoder.layers[0].self_attn.joint is None and qwen.decoder.layers[1].self_attn.joint is not None
        assert answers(monkeypatch, qwen, STATIC, example_chats(), **how) == expected


# ---- looks

@pytest.mark.parametrize("way", [PLAIN, STATIC], ids=["plain", "static"])
def test_logits_that_become_no_numbers_end_the_batch(way: Callable, qwen: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the next look, not after the last token."""
    ordinary = qwen.logits
    calls = 0

    def spoiled(hidden: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return ordinary(hidden) * (float("nan") if calls > 3 else 1.0)

    monkeypatch.setattr(qwen, "logits", spoiled)
    monkeypatch.setattr(qwen, "stop_ids", frozenset())
    with pytest.raises(NonFiniteLogits):
        answers(monkeypatch, qwen, way, [chat("hi")], max_new_tokens=100, temperature=1.0)
    assert calls == sampler.CHECK_EVERY


def test_a_cpu_decodes_plainly(qwen: VLM) -> None:
    prompts = packed(qwen, [chat("hi")])
    with torch.no_grad():
        samples = sampler.gather(qwen, prompts, 1, Sampling(2, 0.0, 1.0, 0), None, static=None)
    assert isinstance(samples, PlainSamples)

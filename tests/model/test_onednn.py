"""oneDNN's products while sampling: the same answers as PyTorch's own, and nothing left behind."""
from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import VLM, generate, load_vlm
from model.layers import Linear
from model.lora import adapters, add_adapters
from model.onednn import HELD, MIN_STEPS_TO_PACK, forget_packed, onednn_linear, onednn_products, pack
from model.sampler import Completion, next_digits
from tiny import chat, example_chats, qwen3_vl_config, write_checkpoint


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    return load_vlm(write_checkpoint(tmp_path_factory.mktemp("onednn") / "qwen3_vl", qwen3_vl_config()))


def products(vlm: VLM) -> list[partial | None]:
    """What the head and every linear layer of the decoder multiply with; None: PyTorch's own."""
    layers = [module for module in vlm.decoder.modules() if isinstance(module, Linear)]
    return [vars(owner).get("product") for owner in (vlm, *layers)]


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("steps", [MIN_STEPS_TO_PACK - 1, MIN_STEPS_TO_PACK])
def test_large_products_on_a_cpu(rows: int, steps: int) -> None:
    """By oneDNN, here from rows that do not lie one after another."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(400, 300, generator=generator), torch.randn(400, generator=generator)
    x = torch.randn(2, 300, rows, generator=generator).mT                                 # (2, rows, 300)
    wanted = (x.double() @ weight.double().mT).float()
    packed = pack(weight, steps)
    assert packed.is_mkldnn == (steps == MIN_STEPS_TO_PACK)
    assert torch.allclose(onednn_linear(packed, x, torch.empty(0)), wanted, atol=1e-4)
    assert torch.allclose(onednn_linear(packed, x, torch.empty(0), bias), wanted + bias, atol=1e-4)
    assert pack(weight[:300], steps) is None and pack(weight.bfloat16(), steps) is None
    assert onednn_linear(packed, x.bfloat16(), weight, bias).dtype == torch.bfloat16      # as under autocast


def test_packed_weights(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same samples and digits; weights are packed anew each time, for they may have been trained, and let go."""
    def sample() -> list[list[Completion]]:
        return generate(vlm, example_chats(), n=3, max_new_tokens=6)
    plain, digits = sample(), torch.tensor(next_digits(vlm, example_chats(), ["0", "0."]))
    monkeypatch.setattr("model.onednn.MIN_ENTRIES", 1)
    assert sample() == plain
    assert torch.allclose(torch.tensor(next_digits(vlm, example_chats(), ["0", "0."])), digits, atol=1e-6)
    for steps in (0, MIN_STEPS_TO_PACK):
        with pytest.raises(KeyboardInterrupt), onednn_products(vlm, steps):
            assert all(each.args[0].is_mkldnn == (steps == MIN_STEPS_TO_PACK) for each in products(vlm))
            raise KeyboardInterrupt
        assert all(each is None for each in products(vlm))
    try:
        vlm.head_weight.data.neg_()
        assert sample() != plain
    finally:
        vlm.head_weight.data.neg_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_interrupt_while_weights_are_packed(vlm: VLM, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Neither a packed copy nor a lowered weight stays behind."""
    calls = iter(range(5))

    def interrupted(weight: Tensor, steps: int) -> Tensor:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return pack(weight, steps)
    monkeypatch.setattr("model.onednn.MIN_ENTRIES", 1)
    monkeypatch.setattr("model.onednn.pack", interrupted)
    monkeypatch.setattr(vlm, "compute_dtype", dtype)
    with pytest.raises(KeyboardInterrupt):
        generate(vlm, example_chats(), max_new_tokens=4)
    assert all(each is None for each in products(vlm))
    assert {p.dtype for p in vlm.parameters()} == {torch.float32}


@torch.no_grad()
def test_adapted_layers(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their frozen weights go to oneDNN like any other; what their adapters add stays."""
    vlm = load_vlm(write_checkpoint(tmp_path_factory.mktemp("adapted") / "qwen3_vl", qwen3_vl_config()))
    add_adapters(vlm.decoder.layers, 2)
    for layer in adapters(vlm).values():
        torch.nn.init.normal_(layer.lora_b)
    batch = vlm.processor(example_chats())
    plain = vlm(batch)
    monkeypatch.setattr("model.onednn.MIN_ENTRIES", 1)
    with onednn_products(vlm, MIN_STEPS_TO_PACK):
        assert len(products(vlm)) == 1 + len(adapters(vlm)) and None not in products(vlm)
        assert (vlm(batch) - plain).abs().max() < 1e-4 * plain.abs().max()
    assert torch.equal(vlm(batch), plain)


# ---- what is held of a frozen model

@torch.no_grad()
@pytest.mark.parametrize("shape", [(400, 300), (1000, 333), (2048, 1024)])
def test_packing_changes_no_bit(shape: tuple[int, int]) -> None:
    """Nor does the number of rows, so that a sample is the same alone and in a batch."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(shape, generator=generator), torch.randn(shape[0], generator=generator)
    packed = pack(weight, MIN_STEPS_TO_PACK)
    x = torch.randn(9, shape[1], generator=generator)
    for rows in (1, 2, 3, 9):
        plain = onednn_linear(weight, x[:rows], weight)
        assert plain.shape == (rows, shape[0])
        assert torch.equal(plain, onednn_linear(packed, x[:rows], weight))
        assert torch.equal(plain[:1], onednn_linear(weight, x[:1], weight))
        assert torch.equal(onednn_linear(weight, x[:rows], weight, bias), onednn_linear(packed, x[:rows], weight, bias))
    for one_row in (x[0], x[None, :1]):                 # (in,), (1, 1, in)
        plain = onednn_linear(weight, one_row, weight)
        assert plain.shape == (*one_row.shape[:-1], shape[0])
        assert torch.equal(plain, onednn_linear(packed, one_row, weight))


@pytest.fixture
def model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint, all weights of which are large."""
    monkeypatch.setattr("model.onednn.MIN_ENTRIES", 1)
    return write_checkpoint(tmp_path / "qwen3_vl", qwen3_vl_config())


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A list that grows by 1 whenever a weight is packed."""
    counted: list[int] = []

    def counting(weight: Tensor, steps: int) -> Tensor | None:
        packed = pack(weight, steps)
        if packed is not None and packed.is_mkldnn:
            counted.append(1)
        return packed
    monkeypatch.setattr("model.onednn.pack", counting)
    yield counted


def answer(vlm: VLM, tokens: int = MIN_STEPS_TO_PACK) -> list[list[Completion]]:
    return generate(vlm, [chat("hi")], max_new_tokens=tokens, temperature=1.0)


def test_a_frozen_model_is_packed_once(model_folder: Path, packings: list[int]) -> None:
    """As soon as its calls have asked for enough steps, however short each is; digits need no packed weights."""
    vlm = load_vlm(model_folder).requires_grad_(False)
    weights = len(products(vlm))
    next_digits(vlm, example_chats(), ["0", "0."])
    first = answer(vlm, MIN_STEPS_TO_PACK // 2)
    assert packings == []
    assert answer(vlm, MIN_STEPS_TO_PACK // 2) == first                 # packed now
    assert len(packings) == weights
    for _ in range(3):
        answer(vlm, 2)
        generate(vlm, example_chats(), n=3, max_new_tokens=6)
        next_digits(vlm, example_chats(), ["0", "0."])
    assert answer(vlm, MIN_STEPS_TO_PACK // 2) == first
    assert len(packings) == weights
    assert all(product is None for product in products(vlm))            # nothing is left in the model itself


def test_decode_steps_are_counted_of_a_trained_model(model_folder: Path, packings: list[int]) -> None:
    """Not chats and samples, which a step draws together; and it is packed anew in each call."""
    vlm = load_vlm(model_folder)
    weights = len(products(vlm))
    generate(vlm, [chat("hi")] * 8, n=8, max_new_tokens=MIN_STEPS_TO_PACK - 1)
    assert packings == []
    generate(vlm, [chat("hi")] * 8, max_new_tokens=MIN_STEPS_TO_PACK // 4, batch_size=2)
    assert len(packings) == weights
    answer(vlm)
    assert len(packings) == 2 * weights
    assert vlm not in HELD


CHANGES = {
    "a step": lambda weight: weight.add_(1e-6),
    "one number, unseen by PyTorch": lambda weight: weight.data[3, 5].neg_(),
    "numpy's view of it": lambda weight: weight.data.numpy().__imul__(1.5),
    "rows": lambda weight: weight.copy_(weight.flip(0)),
    "other storage": lambda weight: setattr(weight, "data", weight.data * 2),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change: str, model_folder: Path, packings: list[int]) -> None:
    """However the weight was changed; the answers are those of a model that never was anything else."""
    vlm = load_vlm(model_folder).requires_grad_(False)
    other = load_vlm(model_folder)
    answer(vlm)
    packings.clear()
    for model in (vlm, other):
        CHANGES[change](model.decoder.layers[1].mlp.up_proj.weight)
    assert answer(vlm) == answer(other)
    assert len(packings) == 2 * len(products(vlm))                      # of each model
    batch = vlm.processor([chat("hi")])
    with onednn_products(vlm, MIN_STEPS_TO_PACK):
        logits = vlm(batch)
    with onednn_products(other, MIN_STEPS_TO_PACK):
        assert torch.equal(vlm(batch), other(batch)) and torch.equal(logits, other(batch))


def test_what_is_held_is_let_go(model_folder: Path, packings: list[int]) -> None:
    """When it is asked for, when the model is trained again, computes in another dtype, or is let go."""
    vlm = load_vlm(model_folder).requires_grad_(False)
    weights = len(products(vlm))
    answer(vlm)
    assert len(HELD[vlm].copies) == weights
    forget_packed(vlm)
    assert vlm not in HELD

    answer(vlm)
    vlm.decoder.norm.weight.requires_grad_(True)
    answer(vlm, 1)
    assert vlm not in HELD

    vlm.requires_grad_(False)
    answer(vlm)
    vlm.to(torch.bfloat16)
    answer(vlm)
    assert HELD[vlm].copies == [None] * weights

    vlm.float()
    answer(vlm)
    twin = copy.deepcopy(vlm)                           # packed tensors could not be copied
    assert vlm in HELD and twin not in HELD
    models = len(HELD)
    del vlm, twin
    gc.collect()
    assert len(HELD) == models - 1

"""oneDNN's products while sampling: the same answers as PyTorch's own, and nothing left behind."""
from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from model import VLM, generate, load_vlm
from model.layers import Linear
from model.lora import adapters, add_adapters
from model.onednn import MIN_TOKENS_TO_PACK, onednn_linear, onednn_products, pack
from model.sampler import Completion, next_digits
from tiny import example_chats, qwen3_vl_config, write_checkpoint


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> VLM:
    return load_vlm(write_checkpoint(tmp_path_factory.mktemp("onednn") / "qwen3_vl", qwen3_vl_config()))


def products(vlm: VLM) -> list[partial | None]:
    """What the head and every linear layer of the decoder multiply with; None: PyTorch's own."""
    layers = [module for module in vlm.decoder.modules() if isinstance(module, Linear)]
    return [vars(owner).get("product") for owner in (vlm, *layers)]


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("tokens", [MIN_TOKENS_TO_PACK - 1, MIN_TOKENS_TO_PACK])
def test_large_products_on_a_cpu(rows: int, tokens: int) -> None:
    """By oneDNN, here from rows that do not lie one after another."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(400, 300, generator=generator), torch.randn(400, generator=generator)
    x = torch.randn(2, 300, rows, generator=generator).mT                                 # (2, rows, 300)
    wanted = (x.double() @ weight.double().mT).float()
    packed = pack(weight, tokens)
    assert packed.is_mkldnn == (tokens == MIN_TOKENS_TO_PACK)
    assert torch.allclose(onednn_linear(packed, x, torch.empty(0)), wanted, atol=1e-4)
    assert torch.allclose(onednn_linear(packed, x, torch.empty(0), bias), wanted + bias, atol=1e-4)
    assert pack(weight[:300], tokens) is None and pack(weight.bfloat16(), tokens) is None
    assert onednn_linear(packed, x.bfloat16(), weight, bias).dtype == torch.bfloat16      # as under autocast


def test_packed_weights(vlm: VLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same samples and digits; weights are packed anew each time, for they may have been trained, and let go."""
    def sample() -> list[list[Completion]]:
        return generate(vlm, example_chats(), n=3, max_new_tokens=6)
    plain, digits = sample(), torch.tensor(next_digits(vlm, example_chats(), ["0", "0."]))
    monkeypatch.setattr("model.onednn.MIN_ENTRIES", 1)
    assert sample() == plain
    assert torch.allclose(torch.tensor(next_digits(vlm, example_chats(), ["0", "0."])), digits, atol=1e-6)
    for tokens in (0, MIN_TOKENS_TO_PACK):
        with pytest.raises(KeyboardInterrupt), onednn_products(vlm, tokens):
            assert all(each.args[0].is_mkldnn == (tokens == MIN_TOKENS_TO_PACK) for each in products(vlm))
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

    def interrupted(weight: Tensor, tokens: int) -> Tensor:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return pack(weight, tokens)
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
    with onednn_products(vlm, MIN_TOKENS_TO_PACK):
        assert len(products(vlm)) == 1 + len(adapters(vlm)) and None not in products(vlm)
        assert (vlm(batch) - plain).abs().max() < 1e-4 * plain.abs().max()
    assert torch.equal(vlm(batch), plain)

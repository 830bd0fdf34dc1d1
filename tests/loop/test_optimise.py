"""What is trained and how: the parts of a model, adapters (merged, switched off, saved), recomputed activations."""
from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo import sequence_logps
from loop.flags import check_trainable
from loop.optimise import load_trainable, make_optimiser, optimiser_step, reference_model, set_trainable
from loop.ranks import Ranks
from model import VLM, generate, load_vlm, save_vlm
from model.lora import SCALE, Adapted, adapters, adapters_off, add_adapters
from model.pairs import pack_pairs
from tiny import CONFIGS, chat, example_chats, picture, write_checkpoint

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("optimise") / request.param, CONFIGS[request.param]())


def settings(**given: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"dtype": None, "trainable": "language", "lora_rank": 0, "recompute": False,
                              "shard": False, "feature_cache_gb": 1.0, "seed": 0, "eager": True,
                              "min_pixels": None, "max_pixels": None} | given)


def opened(folder: Path, **given: Any) -> VLM:
    return load_trainable(str(folder), settings(**given), torch.device("cpu"))


def logps(vlm: VLM) -> Tensor:
    """(2B,) of pairs with and without pictures."""
    rows = pack_pairs(vlm.processor, [(c, [5, 6, 7], [9, 8]) for c in [*example_chats(), chat(picture(30, 40), "x")]])
    hidden = vlm.hidden(rows.batch, vlm.image_features(rows.batch))
    return sequence_logps(rows.predictors(hidden), vlm.head_weight, rows.targets, rows.mask)


def trained(vlm: VLM) -> set[str]:
    return {name for name, p in vlm.named_parameters() if p.requires_grad}


def test_what_is_trained(folder: Path) -> None:
    every = {name for name, _ in load_vlm(folder).named_parameters()}
    tower = {name for name in every if ".visual." in name or "vision_model" in name or "projector" in name}
    assert tower and trained(opened(folder, trainable="all")) == every
    assert trained(opened(folder)) == every - tower
    some = trained(opened(folder, trainable="layers:1-1"))
    assert some and all(".layers.1." in name for name in some) and not some & tower
    layered = {name for name in every if ".layers." in name and name not in tower}
    count = 1 + max(int(name.partition(".layers.")[2].partition(".")[0]) for name in layered)
    assert trained(opened(folder, trainable=f"layers:0-{count - 1}")) == layered
    low = opened(folder, lora_rank=3, trainable="layers:1-1")
    assert trained(low) == {f"{name}.lora_{x}" for name in adapters(low) for x in "ab"}
    assert all(".layers.1." in name for name in trained(low)) and len(adapters(low)) == len(
        {name for name in some if name.endswith("proj.weight")})
    for what in ("layers:2-1", f"layers:0-{count}"):
        with pytest.raises(ValueError, match=f"--trainable {what}: the language model has layers 0 to {count - 1}"):
            opened(folder, trainable=what)


def test_what_cannot_be_meant() -> None:
    check_trainable("layers:3-14", 8)
    for what, rank, said in (("vision", 0, "not 'vision'"), ("layers:3", 0, "not 'layers:3'"), ("", 0, "not ''"),
                             ("all", 4, "--lora-rank 4 adapts the language model")):
        with pytest.raises(ValueError, match=said):
            check_trainable(what, rank)


def test_a_rank_above_a_layers_smaller_side(folder: Path) -> None:
    """Nothing is adapted before all layers are looked at."""
    vlm = load_vlm(folder)
    sides = [min(layer.in_features, layer.out_features) for layer in vlm.decoder.layers.modules()
             if hasattr(layer, "in_features")]
    with pytest.raises(ValueError, match=f"--lora-rank {min(sides) + 1}: .* so at most {min(sides)} makes sense"):
        set_trainable(vlm, "language", lora_rank=min(sides) + 1)
    assert not adapters(vlm)
    set_trainable(vlm, "language", lora_rank=min(sides))
    assert adapters(vlm)


def test_only_what_is_trained_gets_gradients(folder: Path) -> None:
    for given in ({"trainable": "layers:1-1"}, {"lora_rank": 2}, {"trainable": "all"}):
        vlm = opened(folder, **given)
        logps(vlm).sum().backward()
        graded = {name for name, p in vlm.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert graded and graded <= trained(vlm), given
        assert all(p.grad is None for name, p in vlm.named_parameters() if name not in trained(vlm))


def scrambled(folder: Path, **given: Any) -> VLM:
    """Adapters as after training: B is not zero."""
    vlm = opened(folder, lora_rank=4, **given)
    for i, layer in enumerate(adapters(vlm).values()):
        torch.nn.init.normal_(layer.lora_b, std=0.3, generator=torch.Generator().manual_seed(i))
    return vlm


@torch.no_grad()
def test_adapters(folder: Path, tmp_path: Path) -> None:
    """They start as nothing, then change the model; switched off it is what it was, merged and saved what it became."""
    plain = logps(load_vlm(folder))
    assert torch.equal(logps(opened(folder, lora_rank=4)), plain)
    vlm = scrambled(folder)
    changed = logps(vlm)
    assert (changed - plain).abs().min() > 1e-3
    with adapters_off(vlm):
        assert torch.equal(logps(vlm), plain)
    assert torch.equal(logps(vlm), changed)
    with reference_model(vlm) as reference:
        assert reference is vlm and torch.equal(logps(reference), plain)
    save_vlm(vlm, tmp_path / "merged")
    again = load_vlm(tmp_path / "merged")
    assert set(dict(again.named_parameters())) == set(dict(load_vlm(folder).named_parameters()))
    assert (logps(again) - changed).abs().max() < 1e-4 * changed.abs().max()


def test_an_adapter_is_its_definition() -> None:
    base = torch.nn.ModuleDict({"one": load_linear(6, 5)})
    add_adapters([base], 2)
    layer, x = base["one"], torch.randn(3, 6)
    assert isinstance(layer, Adapted) and layer.lora_a.shape == (2, 6) and layer.lora_b.shape == (5, 2)
    torch.nn.init.normal_(layer.lora_b)
    expected = x @ (layer.weight + SCALE * layer.lora_b @ layer.lora_a).T + layer.bias
    assert torch.allclose(layer(x), expected, atol=1e-5) and torch.allclose(x @ layer.merged().T + layer.bias, expected,
                                                                           atol=1e-5)


def load_linear(width: int, out: int) -> torch.nn.Module:
    from model.layers import Linear
    return Linear(width, out)


def test_adapters_of_bf16_weights_are_fp32(folder: Path) -> None:
    vlm = opened(folder, lora_rank=2, dtype="bfloat16")
    assert {p.dtype for p in vlm.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in vlm.parameters() if not p.requires_grad} == {torch.bfloat16}
    logps(vlm).sum().backward()
    assert vlm.dtype == torch.bfloat16 and all(p.grad.isfinite().all() for p in vlm.parameters() if p.requires_grad)
    assert any(p.grad.abs().max() > 0 for p in vlm.parameters() if p.requires_grad)


def test_equal_seeds_give_equal_adapters(folder: Path) -> None:
    one, same, other = (opened(folder, lora_rank=2, seed=seed) for seed in (3, 3, 4))
    pairs = [[layer.lora_a for layer in adapters(vlm).values()] for vlm in (one, same, other)]
    assert all(map(torch.equal, pairs[0], pairs[1])) and not any(map(torch.equal, pairs[0], pairs[2]))
    assert len({tuple(a.flatten().tolist()) for a in pairs[0]}) == len(pairs[0])


@torch.no_grad()
def test_sampling_from_fp32_weights_in_bf16(folder: Path) -> None:
    """While tokens are drawn the language model's weights are bf16, as those of a model loaded so; afterwards they are
    as before. A frozen tower keeps the files' fp32 throughout (Qwen3-VL interpolates its table of positions in it, and
    one rounded to bf16 gives other features), so the model that is compared with gets the same tower."""
    vlm, same = opened(folder, dtype="bfloat16"), load_vlm(folder, dtype=torch.bfloat16)
    for ours, theirs in zip(same.tower.parameters(), vlm.tower.parameters(), strict=True):
        ours.data = theirs.data
    before, plain, seen = {n: (p, p.clone()) for n, p in vlm.named_parameters()}, vlm.logits, set()

    def logits(hidden: Tensor) -> Tensor:
        seen.update(p.dtype for p in vlm.decoder.parameters())
        return plain(hidden)
    vlm.logits = logits
    how = {"n": 2, "max_new_tokens": 5, "temperature": 1.0}
    assert generate(vlm, example_chats(), **how) == generate(same, example_chats(), **how)
    assert seen == {torch.bfloat16}
    for name, p in vlm.named_parameters():
        assert p is before[name][0] and p.dtype == before[name][1].dtype and torch.equal(p, before[name][1])


def test_frozen_weights_keep_the_files_dtype(folder: Path, tmp_path: Path) -> None:
    """Where that is the one computed in; weights of finer files are not rounded."""
    save_vlm(load_vlm(folder), tmp_path / "bf16", torch.bfloat16)
    for path, expected in ((tmp_path / "bf16", torch.bfloat16), (folder, torch.float32)):
        vlm = opened(path, trainable="layers:1-1", dtype="bfloat16")
        assert {p.dtype for p in vlm.parameters() if not p.requires_grad} == {expected}
        assert {p.dtype for p in vlm.parameters() if p.requires_grad} == {torch.float32}
        logps(vlm).sum().backward()


@torch.no_grad()
def test_the_reference_is_the_file(folder: Path) -> None:
    """Without adapters a copy, whatever has become of the weights; it shares a frozen tower's features."""
    vlm = opened(folder)
    plain = logps(vlm)
    for p in vlm.parameters():
        p.mul_(1.1) if p.requires_grad else None
    with reference_model(vlm) as reference:
        assert reference is not vlm and torch.equal(logps(reference), plain)
        assert reference.feature_cache is vlm.feature_cache is not None and not trained(reference)
    with reference_model(opened(folder, trainable="all")) as reference:
        assert reference.feature_cache is None


@pytest.mark.parametrize("given", [{"trainable": "all"}, {"trainable": "language"}, {"lora_rank": 4}])
def test_recomputed_activations_change_nothing(folder: Path, given: dict[str, Any]) -> None:
    found = []
    for recompute in (False, True):
        vlm = opened(folder, recompute=recompute, **given)
        calls = count_calls(vlm)
        value = logps(vlm).square().sum()
        forward = len(calls)
        value.backward()
        assert (len(calls) > forward) is recompute                      # the layers ran again in the backward pass
        found.append([value.detach(), *(p.grad for p in vlm.parameters() if p.grad is not None)])
    assert len(found[0]) > 10 and all(map(torch.equal, *found))


def count_calls(vlm: VLM) -> list[int]:
    calls: list[int] = []
    for layer in vlm.decoder.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_a_text_tells_cross_attention_nothing(tmp_path: Path) -> None:
    """A micro-batch on which nothing that is trained depends adds nothing to the step."""
    folder = write_checkpoint(tmp_path / "mllama", CONFIGS["mllama"]())
    vlm = opened(folder, trainable="layers:1-1")
    assert type(vlm.decoder.layers[1]).__name__ == "CrossLayer"
    chats = {"text": chat("hello"), "picture": chat(picture(30, 40), "hello")}

    def loss(part: Sequence[str]) -> tuple[Tensor, Tensor]:
        rows = pack_pairs(vlm.processor, [(chats[name], [5, 6], [7]) for name in part])
        hidden = vlm.hidden(rows.batch, vlm.image_features(rows.batch))
        logps = sequence_logps(rows.predictors(hidden), vlm.head_weight, rows.targets, rows.mask)
        return logps, {"loss": logps.detach()}
    run = SimpleNamespace(cfg=settings(micro_tokens=1, clip=1.0, lr=1e-3, warmup_steps=0), ranks=Ranks("cpu"))
    optimiser = make_optimiser(vlm, 1e-3, 0.0)
    assert optimiser_step(run, vlm, optimiser, ["text"], len, loss, ("loss",), 1, 10)["grad_norm"] == 0
    assert optimiser_step(run, vlm, optimiser, ["text", "picture"], len, loss, ("loss",), 2, 10)["grad_norm"] > 0


def test_set_trainable_twice(folder: Path) -> None:
    vlm = load_vlm(folder)
    set_trainable(vlm, "layers:0-0")
    set_trainable(vlm, "all")
    assert len(trained(vlm)) == len(list(vlm.parameters()))

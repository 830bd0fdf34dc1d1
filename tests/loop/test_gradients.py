"""loop/gradients.py: a step's gradients, summed over micro-batches in fp32 and over ranks while the pass still runs."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loop import gradients
from loop.gradients import StepGradients, buckets
from loop.optimise import micro_batches
from loop.ranks import Ranks

WIDTH = 4


class TwoRanks:
    """Stands for Ranks: another one has the same gradients. It arrives when it is waited for."""
    world = 2

    def __init__(self) -> None:
        self.events: list[str] = []
        self.sent: list[Tensor] = []

    def begin_sum(self, tensor: Tensor) -> Callable[[], None]:
        self.events.append(f"send {tensor.numel()}")
        self.sent.append(tensor)

        def wait() -> None:
            self.events.append("wait")
            tensor.mul_(2)
        return wait


def layers(count: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(count)])


def noting(model: nn.Sequential, events: list[str]) -> None:
    """Note in `events` when a layer's gradients are computed."""
    for number, layer in enumerate(model):
        layer.register_full_backward_pre_hook(lambda *_, number=number: events.append(f"layer {number}"))


def inputs(count: int) -> list[Tensor]:
    together = torch.randn(count, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    return [x.requires_grad_() for x in together.unbind()]


def plain_gradients(model: nn.Module, parts: Sequence[Tensor]) -> list[Tensor]:
    for x in parts:
        model(x).square().sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def step(model: nn.Module, parts: Sequence[Tensor], ranks: Any) -> None:
    with StepGradients(list(model.parameters()), ranks) as collected:
        for number, x in enumerate(parts, start=1):
            collected.is_last = number == len(parts)
            model(x).square().sum().backward()


@pytest.mark.parametrize("count", [1, 3])
def test_over_micro_batches(count: int) -> None:
    """Bit for bit what autograd itself adds up; hooks are gone afterwards."""
    model = layers()
    expected = plain_gradients(model, inputs(count))
    step(model, inputs(count), Ranks("cpu"))
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))
    model.zero_grad()
    assert all(map(torch.equal, plain_gradients(model, inputs(count)), expected))


def test_sums_are_fp32() -> None:
    """In bf16 512 + 1 would stay 512."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    with StepGradients([weight], Ranks("cpu")) as collected:
        for factor in (512.0, 1.0):
            (weight * factor).sum().backward()
        weight.data = weight.data.float()               # as weights_in_compute_dtype leaves it
    assert collected.sums == {} and weight.grad.dtype == torch.float32 and weight.grad.item() == 513


def test_over_ranks_while_the_pass_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket a layer: each is sent when its layer is done and before the next one is computed, in the last pass only;
    waited for at the end."""
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 4 * (WIDTH * WIDTH + WIDTH))
    model = layers()
    expected = plain_gradients(model, inputs(2))
    ranks = TwoRanks()
    noting(model, ranks.events)
    step(model, inputs(2), ranks)
    size = WIDTH * WIDTH + WIDTH
    passes = ["layer 2", "layer 1", "layer 0"]
    assert ranks.events == [*passes, "layer 2", f"send {size}", "layer 1", f"send {size}", "layer 0", f"send {size}",
                            *["wait"] * 3]
    assert all(torch.equal(p.grad, 2 * e) for p, e in zip(model.parameters(), expected, strict=True))


def test_order_does_not_depend_on_what_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank whose last pass leaves out a layer sends the same buckets in the same order, zeros where it has none."""
    monkeypatch.setattr(gradients, "BUCKET_BYTES", 1)
    model = layers()
    sizes = []
    for left_out in (None, 1):
        ranks = TwoRanks()
        parts = [layer for number, layer in enumerate(model) if number != left_out]
        with StepGradients(list(model.parameters()), ranks) as collected:
            collected.is_last = True
            nn.Sequential(*parts)(inputs(1)[0]).square().sum().backward()
        sizes.append([tensor.numel() for tensor in ranks.sent])
    assert sizes[0] == sizes[1] == [WIDTH, WIDTH * WIDTH] * 3
    assert not model[1].weight.grad.any() and model[0].weight.grad.any()


def test_a_rank_without_examples_sends_zeros() -> None:
    model = layers()
    ranks = TwoRanks()
    step(model, [], ranks)
    assert len(ranks.sent) == 1 and all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_an_error_sends_nothing() -> None:
    """The others are not left with half a sum; no hook stays behind."""
    model = layers()
    ranks = TwoRanks()
    with pytest.raises(ZeroDivisionError), StepGradients(list(model.parameters()), ranks):
        model(inputs(1)[0]).sum().backward()
        raise ZeroDivisionError
    assert not ranks.sent and all(p.grad is None for p in model.parameters())
    plain_gradients(model, inputs(1))


def test_buckets() -> None:
    """Of at most 100 MB, a larger parameter by itself."""
    sizes = (10, 20_000_000, 30_000_000, 5)
    parameters = [nn.Parameter(torch.zeros(size, device="meta")) for size in sizes]
    assert [[p.numel() for p in bucket] for bucket in buckets(parameters)] == [[10, 20_000_000], [30_000_000], [5]]
    assert list(buckets([])) == []


@pytest.mark.parametrize("most, expected", [
    (1, [[3], [3], [5], [9]]), (8, [[3, 3], [5], [9]]), (10, [[3, 3], [5], [9]]), (15, [[3, 3, 5], [9]]),
    (35, [[3, 3, 5], [9]]), (36, [[3, 9, 3, 5]])])
def test_micro_batches(most: int, expected: list[list[int]]) -> None:
    """Rows of these lengths, padded to the longest of their part; all of them in order where one part holds them."""
    assert micro_batches([3, 9, 3, 5], lambda length: length, most) == expected
    assert micro_batches([], len, most) == []

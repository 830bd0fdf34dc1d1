"""dpo.py: losses against numbers worked out by hand and against TRL, log-probabilities against the naive formula."""
from __future__ import annotations

import math
import runpy
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dpo
from dpo import METRICS, dpo_loss, pair_objective, sequence_logps, token_logps

ROOT = Path(dpo.__file__).parent
# Two pairs. Log-ratios: chosen 1 and -2, rejected -2 and 1, so that h = 1.5 and -1.5 at beta = 0.5.
POLICY = ((-10.0, -5.0), (-14.0, -6.0))
REFERENCE = ((-11.0, -3.0), (-12.0, -7.0))
LENGTHS = ((2.0, 4.0), (4.0, 1.0))
SIGMOID = (0.2014132779827524, 1.7014132779827524)                  # ln(1 + e^-1.5), ln(1 + e^1.5)


def pairs(values: tuple, grad: bool = False) -> tuple[Tensor, ...]:
    return tuple(torch.tensor(side, dtype=torch.float64, requires_grad=grad) for side in values)


def exactly(*expected: float) -> Any:
    return pytest.approx(expected, rel=1e-12, abs=1e-12)


# ---- losses

@pytest.mark.parametrize("options, expected", [
    ({}, SIGMOID), ({"label_smoothing": 0.1}, (0.3514132779827524, 1.5514132779827524)),
    ({"label_smoothing": 0.5}, (0.9514132779827524, 0.9514132779827524)), ({"loss_type": "ipo"}, (4.0, 16.0)),
    ({"beta": 0.1}, (0.5543552444685272, 0.8543552444685272)), ({"beta": 0.1, "loss_type": "ipo"}, (4.0, 64.0))])
def test_losses_by_hand(options: dict, expected: tuple[float, float]) -> None:
    options = {"beta": 0.5} | options
    losses, chosen, rejected = dpo_loss(*pairs(POLICY), *pairs(REFERENCE), **options)
    assert losses.tolist() == exactly(*expected)
    assert chosen.tolist() == exactly(options["beta"], -2 * options["beta"])
    assert rejected.tolist() == exactly(-2 * options["beta"], options["beta"])


def test_defaults_are_sigmoid_with_a_tenth() -> None:
    losses, chosen, _ = dpo_loss(*pairs(POLICY), *pairs(REFERENCE))
    assert losses.tolist() == exactly(0.5543552444685272, 0.8543552444685272) and chosen.tolist() == exactly(0.1, -0.2)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_ln_2_at_the_start(smoothing: float) -> None:
    """Whatever the pairs are, a policy that is its reference has this loss, and no rewards."""
    chosen, rejected = -100 * torch.rand(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses, *rewards = dpo_loss(chosen, rejected, chosen, rejected, beta=0.7, label_smoothing=smoothing)
    assert losses.tolist() == exactly(*[0.6931471805599453] * 50) and not torch.stack(rewards).any()


@pytest.mark.parametrize("options, slope", [
    ({}, 0.09121276190317817), ({"label_smoothing": 0.1}, 0.04121276190317818),          # 0.5 sigmoid(-1.5), ...
    ({"loss_type": "ipo"}, -4.0)])                                                       # 2 (3 - 1): it is overshot
def test_gradients(options: dict, slope: float) -> None:
    policy, reference = pairs(POLICY, grad=True), pairs(REFERENCE, grad=True)
    losses, *rewards = dpo_loss(*policy, *reference, beta=0.5, **options)
    assert not any(r.requires_grad for r in rewards)
    losses[0].backward()
    for side, sign in zip((*policy, *reference), (-1, 1, 1, -1)):
        assert side.grad.tolist() == exactly(sign * slope, 0.0)


def test_huge_log_ratios_stay_finite() -> None:
    policy = torch.tensor([1e4, -1e4], requires_grad=True)
    losses, *_ = dpo_loss(policy, *torch.zeros(3, 2), beta=1.0)
    losses.sum().backward()
    assert losses.tolist() == [0.0, 1e4] and policy.grad.tolist() == [0.0, -1.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_dtype_is_kept(dtype: torch.dtype, loss_type: str) -> None:
    out = dpo_loss(*(x.to(dtype) for x in (*pairs(POLICY), *pairs(REFERENCE))), loss_type=loss_type)
    assert [x.dtype for x in out] == [dtype] * 3 and [x.shape for x in out] == [(2,)] * 3


@pytest.mark.parametrize("options, word", [
    ({"loss_type": "hinge"}, "hinge"), ({"loss_type": "Sigmoid"}, "Sigmoid"), ({"beta": 0.0}, "beta"),
    ({"beta": -0.1}, "beta"), ({"beta": math.nan}, "beta"), ({"label_smoothing": -0.1}, "-0.1"),
    ({"label_smoothing": 0.6}, "0.6"), ({"label_smoothing": math.nan}, "nan"),
    ({"label_smoothing": 0.1, "loss_type": "ipo"}, "ipo")])
def test_bad_options(options: dict, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        dpo_loss(*pairs(POLICY), *pairs(REFERENCE), **options)


# ---- what is trained on

def test_metrics_by_hand() -> None:
    assert METRICS == ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
                       "logps/chosen", "logps/rejected")
    losses, metrics = pair_objective(pairs(POLICY, grad=True), pairs(REFERENCE), pairs(LENGTHS), beta=0.5)
    assert losses.tolist() == exactly(*SIGMOID) and losses.requires_grad
    assert tuple(metrics) == METRICS and not any(values.requires_grad for values in metrics.values())
    assert [values.shape for values in metrics.values()] == [(2,)] * 7
    assert torch.stack(list(metrics.values())).T.flatten().tolist() == exactly(
        SIGMOID[0], 0.5, -1.0, 1.5, 1.0, -10.0, -14.0, SIGMOID[1], -1.0, 0.5, -1.5, 0.0, -5.0, -6.0)


def test_no_margin_is_not_accurate() -> None:
    _, metrics = pair_objective(pairs(POLICY), pairs(POLICY), pairs(LENGTHS), beta=0.5)
    assert not metrics["rewards/margins"].any() and not metrics["rewards/accuracies"].any()


@pytest.mark.parametrize("options, expected", [
    ({}, (0.4740769841801067, 1.1368710061148999)),            # log-ratios per token 0.5, -0.5 and -0.5, 1
    ({"label_smoothing": 0.2}, (0.5740769841801067, 0.9868710061148999)), ({"loss_type": "ipo"}, (0.0, 6.25))])
def test_length_normalised(options: dict, expected: tuple[float, float]) -> None:
    losses, metrics = pair_objective(pairs(POLICY), pairs(REFERENCE), pairs(LENGTHS), beta=0.5, length_normalised=True,
                                     **options)
    assert losses.tolist() == exactly(*expected)
    assert metrics["rewards/chosen"].tolist() == exactly(0.25, -0.25)
    assert metrics["rewards/rejected"].tolist() == exactly(-0.25, 0.5)
    assert metrics["logps/chosen"].tolist() == [-10.0, -5.0]                                  # sums, as logged
    assert metrics["logps/rejected"].tolist() == [-14.0, -6.0]


@pytest.mark.parametrize("normalised", [False, True])
def test_nll_coefficient(normalised: bool) -> None:
    """It adds 0.2 * (10 / 2, 5 / 4) to the losses and pulls the chosen side up by 0.2 / length; no metric but the loss
    knows of it."""
    found = {}
    for coefficient in (0.0, 0.2):
        policy = pairs(POLICY, grad=True)
        losses, metrics = pair_objective(policy, pairs(REFERENCE), pairs(LENGTHS), beta=0.5,
                                         nll_coefficient=coefficient, length_normalised=normalised)
        losses.sum().backward()
        found[coefficient] = losses.detach(), torch.stack(list(metrics.values())), *(side.grad for side in policy)
    losses, metrics, chosen, rejected = (b - a for a, b in zip(found[0.0], found[0.2]))
    assert losses.tolist() == exactly(1.0, 0.25) and metrics[0].tolist() == exactly(1.0, 0.25) and not metrics[1:].any()
    assert chosen.tolist() == exactly(-0.1, -0.05) and not rejected.any()


class FakeHead:
    """Stands for the model of TRL's trainer: gives the log-probabilities of the tokens that follow the first."""
    training = True

    def __init__(self, per_token: Tensor):
        self.per_token = per_token

    def __call__(self, **_: Any) -> SimpleNamespace:
        zeros = torch.zeros_like(self.per_token)
        return SimpleNamespace(log_probs=self.per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())


@pytest.mark.parametrize("theirs, options", [
    ("sigmoid", {}), ("sigmoid_norm", {"length_normalised": True}),
    ("ipo", {"loss_type": "ipo", "length_normalised": True})])
def test_losses_equal_trl(theirs: str, options: dict) -> None:
    """TRL averages over tokens in ipo; its own mean over the batch and gradients, called without a trainer."""
    pytest.importorskip("trl", "1.16")
    from trl import DPOTrainer
    rng, size = torch.Generator().manual_seed(1), 6
    mask = torch.zeros(2 * size, 9, dtype=torch.long)
    for row, length in enumerate((3, 1, 8, 2, 5, 4, 2, 8, 1, 7, 3, 6)):
        mask[row, 1:1 + length] = 1
    per_token = (-3 * torch.rand(2 * size, 8, generator=rng, dtype=torch.float64)) * mask[:, 1:]
    per_token.requires_grad_()
    reference = tuple(per_token.detach().sum(1).add(torch.randn(2 * size, generator=rng)).chunk(2))
    same = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    head, logged = FakeHead(per_token), defaultdict(lambda: defaultdict(list))
    trainer = SimpleNamespace(
        model=head, accelerator=same, aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", loss_types=[theirs], loss_weights=[1.0], beta=0.3, label_smoothing=0.0,
        use_weighting=False, _metrics=logged, _total_train_tokens=0, _tp_size=1)
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask,
              "ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}
    expected = DPOTrainer._compute_loss(trainer, head, inputs, return_outputs=False)
    [expected_grad] = torch.autograd.grad(expected, per_token)
    losses, metrics = pair_objective(per_token.sum(1).chunk(2), reference, mask.sum(1).chunk(2), beta=0.3, **options)
    [grad] = torch.autograd.grad(losses.mean(), per_token)
    assert losses.mean().item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(grad, expected_grad, rtol=1e-12, atol=0)
    means = {name: values.mean().item() for name, values in metrics.items()}
    names = ("logps/chosen", "logps/rejected") if options else METRICS[1:]                  # TRL's rewards are sums
    assert {n: means[n] for n in names} == pytest.approx({n: logged["train"][n][0] for n in names}, rel=1e-7)


# ---- log-probabilities

def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return (hidden @ weight.T).log_softmax(-1).gather(-1, targets[..., None])[..., 0]


def states(*shape: int, vocabulary: int = 11, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (*shape, 5), a head and targets (*shape)."""
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, 5, generator=rng).requires_grad_(),
            torch.randn(vocabulary, 5, generator=rng).requires_grad_(), torch.randint(vocabulary, shape, generator=rng))


def close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool((found - expected).abs().max() <= 2e-6 * expected.abs().max())


@pytest.mark.parametrize("block", [1, 3, 7, 100])
def test_blocks_equal_naive(block: int) -> None:
    hidden, weight, targets = states(7)
    upstream = torch.linspace(-1, 2, 7)
    found, expected = token_logps(hidden, weight, targets, block), naive(hidden, weight, targets)
    assert close(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found @ upstream, (hidden, weight)),
                            torch.autograd.grad(expected @ upstream, (hidden, weight))):
        assert close(ours, theirs)


def test_log_sum_exp_is_fp32() -> None:
    """States in bf16 against a head in fp32: the products are bf16's, everything after them is fp32."""
    hidden, weight, targets = states(40)
    found = token_logps(hidden.bfloat16(), weight, targets)
    logits = (hidden.bfloat16() @ weight.bfloat16().T).float()
    assert found.dtype == torch.float32
    assert close(found, logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0])
    assert token_logps(hidden + 1e4, weight, targets).isfinite().all()


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation returns."""
    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            self.numel = max(self.numel, each.numel() if isinstance(each, Tensor) else 0)
        return out


def test_the_full_logits_never_exist() -> None:
    """Neither forward nor backward, neither at once nor as pieces that are kept: 64 positions x 50 tokens, 7 at a
    time."""
    hidden, weight, targets = states(64, vocabulary=50)
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor
    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        token_logps(hidden, weight, targets, block=7).sum().backward()
    assert largest.numel == 64 * 7 and kept < 64 * 50


@pytest.mark.parametrize("block", [3, 100])
def test_a_token_outside_the_vocabulary_has_no_probability(block: int) -> None:
    hidden, weight, targets = states(7)
    targets[2], targets[5] = len(weight), -1
    found = token_logps(hidden, weight, targets, block)
    assert found.isnan().nonzero()[:, 0].tolist() == [2, 5]


def test_no_positions() -> None:
    hidden, weight, _ = states(7)
    found = token_logps(hidden[:0], weight, torch.zeros(0, dtype=torch.long))
    assert found.shape == (0,) and found.dtype == torch.float32
    found.sum().backward()
    assert not hidden.grad.any()
    targets, mask = torch.zeros(3, 7, dtype=torch.long), torch.zeros(3, 7, dtype=torch.bool)
    assert sequence_logps(hidden.expand(3, 7, 5), weight, targets, mask).tolist() == [0.0] * 3


def test_sequences_sum_their_tokens() -> None:
    """The last of a completion's tokens, its stop token, counts; padding does not, even where it is NaN."""
    hidden, weight, targets = states(3, 6)
    lengths = (6, 1, 4)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    expected = torch.stack([naive(hidden[s, :n], weight, targets[s, :n]).sum() for s, n in enumerate(lengths)])
    dirty = torch.where(mask[..., None], hidden, torch.nan)
    found = sequence_logps(dirty, weight, targets, mask)
    assert close(found, expected) and found.dtype == torch.float32
    without_stop = sequence_logps(dirty, weight, targets, mask & (torch.arange(6) < torch.tensor(lengths)[:, None] - 1))
    last = torch.stack([naive(hidden[s, n - 1], weight, targets[s, n - 1]) for s, n in enumerate(lengths)])
    assert close(found - without_stop, last)
    weights = torch.tensor([1.0, -2.0, 0.5])
    for ours, theirs in zip(torch.autograd.grad(found @ weights, (hidden, weight)),
                            torch.autograd.grad(expected @ weights, (hidden, weight))):
        assert close(ours, theirs)


def test_padding_may_stand_anywhere() -> None:
    hidden, weight, targets = states(2, 3)
    expected = sequence_logps(hidden, weight, targets, torch.ones(2, 3, dtype=torch.bool))
    for places in ([0, 1, 2], [4, 5, 6], [0, 3, 6]):
        wide, ids, mask = torch.randn(2, 7, 5), torch.full((2, 7), 4), torch.zeros(2, 7, dtype=torch.bool)
        wide[:, places], ids[:, places], mask[:, places] = hidden.detach(), targets, True
        assert torch.equal(sequence_logps(wide, weight, ids, mask), expected)


# ---- it goes elsewhere alone

def test_runs_without_the_rest_of_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("replay", "verifier", "gate", "eval", "train", "tasks", "model", "numpy", "PIL", "tokenizers", "tqdm"):
        monkeypatch.setitem(sys.modules, name, None)                                       # importing it is an error
    assert runpy.run_path(str(ROOT / "dpo.py"))["METRICS"] == METRICS

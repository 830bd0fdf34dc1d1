"""Direct Preference Optimization: log-probabilities, losses, metrics. Imports torch and nothing else.

    h = beta * [(log pi(y_w|x) - log pi_ref(y_w|x)) - (log pi(y_l|x) - log pi_ref(y_l|x))]
    sigmoid   -(1 - eps) log sigmoid(h) - eps log sigmoid(-h)      Rafailov et al., arXiv 2305.18290, eq. 7; eps: the
                                                                   conservative DPO of Mitchell's note on label noise
    ipo       (h / beta - 1 / (2 beta))^2                          Azar et al., arXiv 2310.12036, eq. 17

y_w is the chosen and y_l the rejected completion; log pi(y|x) sums over a completion's tokens, the stop token included,
the prompt not. At the start, where the policy is the reference, h = 0 and the sigmoid loss is ln 2 for any pairs at
all: that it falls says nothing about whether the pairs point the right way.

Letters: S sequences, C tokens of the longest completion, H hidden size, V vocabulary, B pairs.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LOSS_TYPES = ("sigmoid", "ipo")
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
           "logps/rejected")


class _TokenLogps(torch.autograd.Function):
    """log softmax(W h)[target], a block of the vocabulary at a time; the backward pass computes its logits again.

    The log-sum-exp goes on from block to block with its running maximum taken out; d log p_t / d logits = onehot(t) -
    softmax(logits).
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, block: int) -> Tensor:
        top = torch.full(targets.shape, -torch.inf, device=hidden.device)                  # (N,), as all below
        total, picked = torch.zeros_like(top), torch.full_like(top, torch.nan)      # NaN: no such token
        for start in range(0, len(weight), block):
            logits = F.linear(hidden, weight[start:start + block].to(hidden.dtype)).float()          # (N, block)
            place = targets - start
            here = (place >= 0) & (place < logits.shape[1])
            picked = torch.where(here, logits.gather(1, place.clamp(0, logits.shape[1] - 1)[:, None])[:, 0], picked)
            highest = torch.maximum(top, logits.amax(1))
            total = total * (top - highest).exp() + logits.sub_(highest[:, None]).exp_().sum(1)
            top = highest
        normaliser = top + total.log()
        ctx.block = block
        ctx.save_for_backward(hidden, weight, targets, normaliser)
        return picked - normaliser

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden, weight, targets, normaliser = ctx.saved_tensors
        grad_hidden = torch.zeros(hidden.shape, device=hidden.device)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(weight), ctx.block):
            part = weight[start:start + ctx.block].to(hidden.dtype)
            logits = F.linear(hidden, part).float()                                        # (N, block)
            slope, place = logits.sub_(normaliser[:, None]).exp_().mul_(-grad[:, None]), targets - start
            there = grad * ((place >= 0) & (place < len(part)))
            slope = slope.scatter_add_(1, place.clamp(0, len(part) - 1)[:, None], there[:, None]).to(hidden.dtype)
            grad_hidden += slope @ part
            if grad_weight is not None:
                grad_weight[start:start + ctx.block] = slope.mT @ hidden
        return grad_hidden.to(hidden.dtype), grad_weight, None, None


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor, block: int | None = None) -> Tensor:
    """log p(target) for each of N positions, fp32: (N,).

    hidden: (N, H) the states that predict them; weight: (V, H) of the LM head; targets: (N,). Logits exist for `block`
    entries of the vocabulary at a time, in the forward pass and in the backward pass: never an (N, V) tensor. The
    default keeps about two million of them, which a CPU's cache holds, on CUDA 64 million (not yet run there).
    """
    held = 1 << 26 if hidden.is_cuda else 1 << 21
    return _TokenLogps.apply(hidden, weight, targets, block or max(256, held // max(len(hidden), 1)))


def sequence_logps(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Summed log-probability of each of S completions in nats, fp32: (S,).

    hidden: (S, C, H) the state that predicts each completion token; weight: (V, H); targets: (S, C); mask: (S, C) bool,
    False on padding. Includes the stop token where it was sampled.
    """
    logps = torch.zeros(mask.shape, device=hidden.device).masked_scatter(
        mask, token_logps(hidden[mask], weight, targets[mask]))                            # (S, C)
    return logps.sum(1)


def dpo_loss(policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, reference_chosen_logps: Tensor,
             reference_rejected_logps: Tensor, beta: float = 0.1, label_smoothing: float = 0.0,
             loss_type: str = "sigmoid") -> tuple[Tensor, Tensor, Tensor]:
    """Losses, chosen rewards and rejected rewards of B pairs, (B,) each, in the dtype given; rewards are detached.

    The log-probabilities are (B,), summed or averaged over tokens as the caller wishes; ipo takes them as they are.
    `label_smoothing` is the assumed share of flipped pairs. ValueError for an unknown `loss_type`, beta <= 0, smoothing
    outside [0, 0.5], or smoothing with ipo, which has no such term.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"unknown loss_type {loss_type!r}; known: {', '.join(LOSS_TYPES)}")
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta}")
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5], not {label_smoothing}")
    if label_smoothing and loss_type == "ipo":
        raise ValueError(f"ipo has no label smoothing; label_smoothing is {label_smoothing}")
    chosen = policy_chosen_logps - reference_chosen_logps
    rejected = policy_rejected_logps - reference_rejected_logps
    h = beta * (chosen - rejected)
    if loss_type == "sigmoid":
        losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    else:
        losses = (chosen - rejected - 1 / (2 * beta)) ** 2
    return losses, (beta * chosen).detach(), (beta * rejected).detach()


def pair_objective(policy: tuple[Tensor, Tensor], reference: tuple[Tensor, Tensor], lengths: tuple[Tensor, Tensor],
                   beta: float, label_smoothing: float = 0.0, loss_type: str = "sigmoid",
                   length_normalised: bool = False, nll_coefficient: float = 0.0) -> tuple[Tensor, Tensor]:
    """The losses that are trained on, (B,), and every pair's METRICS, (7, B), detached.

    policy, reference, lengths: (chosen, rejected), (B,) each: summed log-probabilities and token counts.
    `length_normalised` divides every log-probability by its completion's length first. `nll_coefficient` adds the
    chosen completion's mean token negative log-likelihood, which keeps its probability from falling.
    """
    scale = lengths if length_normalised else (torch.ones_like(lengths[0]), torch.ones_like(lengths[1]))
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        *(logps / by for logps, by in zip(policy, scale)), *(logps / by for logps, by in zip(reference, scale)),
        beta=beta, label_smoothing=label_smoothing, loss_type=loss_type)
    if nll_coefficient:
        losses = losses - nll_coefficient * policy[0] / lengths[0]
    margins = chosen_rewards - rejected_rewards
    return losses, torch.stack((losses, chosen_rewards, rejected_rewards, margins, (margins > 0).to(margins),
                                *policy)).detach()

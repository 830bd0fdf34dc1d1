"""Direct Preference Optimization: log-probabilities, losses, metrics. Imports torch alone.

    h = beta * [(log pi(y_w|x) - log pi_ref(y_w|x)) - (log pi(y_l|x) - log pi_ref(y_l|x))]

    sigmoid   -(1 - eps) log sigmoid(h) - eps log sigmoid(-h)
              Rafailov et al., arXiv 2305.18290, eq. 7; eps is the label smoothing of Mitchell's
              note on conservative DPO
    ipo       (h / beta - 1 / (2 beta))^2
              Azar et al., arXiv 2310.12036, eq. 17

y_w is the chosen completion and y_l the rejected one. log pi(y|x) sums over the tokens of a
completion: its stop token counts, the prompt's tokens do not.

When training starts the policy is the reference, so h = 0 and the sigmoid loss is ln 2 for any
pairs at all. That the loss falls from there does not show that the pairs prefer the right answers.

Letters: S completions, C tokens of the longest completion, N tokens of all completions,
H hidden size, V vocabulary, B pairs.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

LOSS_TYPES = ("sigmoid", "ipo")
METRICS = (                                             # what pair_objective measures of every pair
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)
LOGITS_AT_ONCE_CPU = 1 << 21                            # about 2 million: a CPU's cache holds them
LOGITS_AT_ONCE_CUDA = 1 << 26                           # 64 million fp32 numbers are 256 MiB
MIN_BLOCK = 256                                         # entries of the vocabulary in a block


# ---- log-probabilities

class _Context(FunctionCtx):
    """What forward leaves to backward."""
    block: int
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class _TokenLogps(torch.autograd.Function):
    """log softmax(W h)[target] of N tokens, without the (N, V) logits.

    log p(target) = logit(target) - log sum_v exp(logit(v)). The sum needs the logits only once, so
    they are computed for one block of the vocabulary at a time and dropped. To keep exp() from
    overflowing, the sum is carried from block to block relative to the largest logit so far:

        sum_v exp(logit(v)) = exp(running_max) * running_sum

    Where a block holds a larger logit, running_sum is first scaled by exp(old max - new max).
    The backward pass computes each block's logits again instead of keeping them.
    """

    @staticmethod
    def forward(
        ctx: _Context, hidden: Tensor, weight: Tensor, targets: Tensor, block: int
    ) -> Tensor:
        """hidden: (N, H), weight: (V, H), targets: (N,) -> (N,) fp32."""
        running_max = torch.full(targets.shape, -torch.inf, device=hidden.device)      # (N,)
        running_sum = torch.zeros_like(running_max)                                    # (N,)
        target_logit = torch.full_like(running_max, torch.nan)      # NaN: in no block so far

        for start in range(0, len(weight), block):
            logits = _fp32_product(hidden, weight[start:start + block])                # (N, block)

            column, inside = _columns_in_block(targets, start, logits.shape[1])
            logits_there = logits.gather(1, column[:, None])                           # (N, 1)
            target_logit = torch.where(inside, logits_there[:, 0], target_logit)

            new_max = torch.maximum(running_max, logits.amax(1))
            rescale = (running_max - new_max).exp()                  # 0 in the first block
            exponentials = logits.sub_(new_max[:, None]).exp_()                        # (N, block)
            running_sum = running_sum * rescale + exponentials.sum(1)
            running_max = new_max

        log_sum_exp = running_max + running_sum.log()                                  # (N,)
        ctx.block = block
        ctx.save_for_backward(hidden, weight, targets, log_sum_exp)
        return target_logit - log_sum_exp

    @staticmethod
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """d log p(target) / d logits = onehot(target) - softmax(logits), times grad (N,)."""
        hidden, weight, targets, log_sum_exp = ctx.saved_tensors
        grad_hidden = torch.zeros(hidden.shape, device=hidden.device)                  # (N, H) fp32
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None    # (V, H)

        for start in range(0, len(weight), ctx.block):
            stop = start + ctx.block
            block_weight = weight[start:stop].to(hidden.dtype)                         # (block, H)
            logits = _fp32_product(hidden, block_weight)                               # (N, block)

            log_softmax = logits.sub_(log_sum_exp[:, None])                            # in place
            softmax = log_softmax.exp_()
            grad_logits = softmax.mul_(-grad[:, None])
            column, inside = _columns_in_block(targets, start, len(block_weight))
            grad_of_target = grad * inside                                             # (N,)
            grad_logits.scatter_add_(1, column[:, None], grad_of_target[:, None])
            grad_logits = grad_logits.to(hidden.dtype)

            grad_hidden += grad_logits @ block_weight
            if grad_weight is not None:
                grad_weight[start:stop] = grad_logits.mT @ hidden

        return grad_hidden.to(hidden.dtype), grad_weight, None, None


def _fp32_product(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden W^T in fp32, computed in the dtype of `hidden`: (N, H), (V, H) -> (N, V).

    A GPU adds up products of bf16 numbers in fp32 and can leave the sums so: a logit of 20 that
    is rounded to bf16 may be off by 0.06. (`out_dtype`: torch 2.10 and later.)
    """
    weight = weight.to(hidden.dtype)
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.mT, out_dtype=torch.float32)
    return F.linear(hidden, weight).float()


def _columns_in_block(targets: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Where the targets (N,) stand in the block [start, start + size), and whether they do.

    A target outside it gets a column that exists all the same, so that gather may read there.
    """
    column = targets - start
    inside = (column >= 0) & (column < size)
    column = column.clamp(0, size - 1)
    return column, inside


def token_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, block: int | None = None
) -> Tensor:
    """log p(target) for each of N tokens, fp32: (N,); NaN for a target outside the vocabulary.

    hidden: (N, H), the states that predict the tokens; weight: (V, H) of the LM head;
    targets: (N,). Neither pass ever holds an (N, V) tensor: the logits exist for `block` entries
    of the vocabulary at a time. By default a block has about two million logits on a CPU, and
    64 million on CUDA (where this has not been run yet).
    """
    if block is None:
        logits_at_once = LOGITS_AT_ONCE_CUDA if hidden.is_cuda else LOGITS_AT_ONCE_CPU
        tokens = max(len(hidden), 1)
        block = max(MIN_BLOCK, logits_at_once // tokens)

    # torch declares no types for Function.apply
    logps: Tensor = _TokenLogps.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, block
    )
    return logps


def sequence_logps(hidden: Tensor, weight: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Summed log-probability log pi(y|x) of each of S completions in nats, fp32: (S,).

    hidden: (S, C, H), the state that predicts each completion token; weight: (V, H) of the LM head;
    targets: (S, C); mask: (S, C) bool, False on padding. The stop token counts where it was
    sampled.
    """
    # nonzero() makes a GPU finish all that is queued: call it once, and use its result three times.
    places = mask.flatten().nonzero()[:, 0]                                            # (N,)
    hidden_of_tokens = hidden.flatten(0, 1).index_select(0, places)                    # (N, H)
    targets_of_tokens = targets.flatten()[places]                                      # (N,)
    logps_of_tokens = token_logps(hidden_of_tokens, weight, targets_of_tokens)         # (N,)

    zeros = torch.zeros(mask.numel(), device=hidden.device)
    logps = zeros.index_copy(0, places, logps_of_tokens)                               # (S C,)
    return logps.view(mask.shape).sum(1)


# ---- losses

def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, chosen rewards and rejected rewards of B pairs: (B,) each, in the dtype given.

    The log-probabilities are (B,), summed or averaged over tokens as the caller wishes; ipo takes
    them as they are. `label_smoothing` is the assumed share of pairs whose sides are swapped.
    A reward is beta (log pi(y|x) - log pi_ref(y|x)); rewards carry no gradient.

    ValueError for an unknown `loss_type`, beta <= 0, a label smoothing outside [0, 0.5], or label
    smoothing with ipo, which has no such term.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"unknown loss_type {loss_type!r}; known: {', '.join(LOSS_TYPES)}")
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta}")
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5], not {label_smoothing}")
    if label_smoothing and loss_type == "ipo":
        raise ValueError(f"ipo has no label smoothing; label_smoothing is {label_smoothing}")

    chosen_log_ratio = policy_chosen_logps - reference_chosen_logps
    rejected_log_ratio = policy_rejected_logps - reference_rejected_logps

    if loss_type == "sigmoid":
        h = beta * (chosen_log_ratio - rejected_log_ratio)
        as_labelled = -(1 - label_smoothing) * F.logsigmoid(h)
        losses = as_labelled - label_smoothing * F.logsigmoid(-h)
    else:
        losses = (chosen_log_ratio - rejected_log_ratio - 1 / (2 * beta)) ** 2

    chosen_rewards = (beta * chosen_log_ratio).detach()
    rejected_rewards = (beta * rejected_log_ratio).detach()
    return losses, chosen_rewards, rejected_rewards


def pair_objective(
    policy: tuple[Tensor, Tensor],
    reference: tuple[Tensor, Tensor],
    lengths: tuple[Tensor, Tensor],
    beta: float,
    label_smoothing: float = 0.0,
    loss_type: str = "sigmoid",
    length_normalised: bool = False,
    nll_coefficient: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses that are trained on, (B,), and METRICS by name: (B,) each, without gradient.

    policy, reference, lengths: (chosen, rejected), (B,) each: summed log-probabilities, and numbers
    of completion tokens. `length_normalised` divides every log-probability by its completion's
    length before the loss. `nll_coefficient` adds that much of the chosen completion's mean
    negative log-likelihood a token, which keeps its probability from falling.
    """
    policy_chosen, policy_rejected = policy
    reference_chosen, reference_rejected = reference
    chosen_length, rejected_length = lengths

    if length_normalised:
        logps = (
            policy_chosen / chosen_length,
            policy_rejected / rejected_length,
            reference_chosen / chosen_length,
            reference_rejected / rejected_length,
        )
    else:
        logps = (
            policy_chosen,
            policy_rejected,
            reference_chosen,
            reference_rejected,
        )
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        *logps,
        beta=beta,
        label_smoothing=label_smoothing,
        loss_type=loss_type,
    )

    if nll_coefficient:
        losses = losses - nll_coefficient * policy_chosen / chosen_length

    margins = chosen_rewards - rejected_rewards
    metrics = {
        "loss": losses.detach(),
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": (margins > 0).to(margins),            # 1 where chosen has more reward
        "logps/chosen": policy_chosen.detach(),
        "logps/rejected": policy_rejected.detach(),
    }
    return losses, metrics

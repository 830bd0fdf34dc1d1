"""The gradients of one optimiser step: added up over micro-batches, and over ranks while there is still work to do.

    with StepGradients(parameters, ranks) as gradients, weights_in_compute_dtype(vlm):
        for number, part in enumerate(parts, start=1):
            gradients.is_last = number == len(parts)
            loss(part).backward()
    # parameter.grad is the sum over all parts of all ranks

Gradients are summed in fp32, the dtype of trained weights, though a pass may compute them in bf16. StepGradients is
entered first and so left last: a weight must be fp32 again when its fp32 gradient is put into `.grad`.

A backward pass goes from the last layer to the first. In the last one of a step a gradient is complete as soon as it is
computed, so its sum over ranks can begin while those of earlier layers are computed. Gradients travel in buckets: a
call for each of some hundred tensors would take longer than sending them.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from loop.ranks import Ranks
from loop.shard import is_sharded
from model.chunks import chunks

BUCKET_BYTES = 100_000_000


class StepGradients:
    """See above. The gradients of weights that are shared out (--shard) FSDP adds up by itself."""

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: Ranks):
        self.ranks = ranks
        self.parameters = [parameter for parameter in parameters if not is_sharded(parameter)]
        self.shared_out = [parameter for parameter in parameters if is_sharded(parameter)]
        self.sums: dict[nn.Parameter, Tensor] = {}      # over the micro-batches so far
        self.is_last = False                            # whether this rank's last backward pass has begun

        # All ranks send the same buckets in the same order, whatever order their gradients come in.
        self.buckets = list(buckets(self.parameters[::-1])) if ranks.world > 1 else []
        self.incomplete = [set(bucket) for bucket in self.buckets]
        self.sent: list[SentBucket] = []

    def __enter__(self) -> StepGradients:
        self.hooks = [parameter.register_post_accumulate_grad_hook(self.take) for parameter in self.parameters]
        return self

    def take(self, parameter: nn.Parameter) -> None:
        """Called where a backward pass has computed a parameter's gradient: move it to the sum."""
        assert parameter.grad is not None
        if parameter in self.sums:
            self.sums[parameter] += parameter.grad
        else:
            self.sums[parameter] = parameter.grad.float()
        parameter.grad = None

        if self.is_last and self.buckets:
            for bucket in self.incomplete:
                bucket.discard(parameter)
            self.send_complete()

    def send_complete(self) -> None:
        """Send the buckets that are complete, up to the first that is not."""
        while len(self.sent) < len(self.buckets) and not self.incomplete[len(self.sent)]:
            bucket = self.buckets[len(self.sent)]
            self.sent.append(SentBucket(bucket, [self.sum_of(parameter) for parameter in bucket], self.ranks))

    def sum_of(self, parameter: nn.Parameter) -> Tensor:
        """A parameter's sum, taken out of `sums`: zeros where nothing depended on it, so that no rank waits in vain."""
        found = self.sums.pop(parameter, None)
        return torch.zeros_like(parameter, dtype=torch.float32) if found is None else found

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()
        if kind is not None:
            return
        for bucket in self.incomplete:
            bucket.clear()
        self.send_complete()
        for sent in self.sent:
            self.sums |= sent.received()
        for parameter in self.parameters:
            parameter.grad = self.sum_of(parameter)
        for parameter in self.shared_out:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)


class SentBucket:
    """The gradients of some parameters on their way to the other ranks."""

    def __init__(self, bucket: Sequence[nn.Parameter], gradients: Sequence[Tensor], ranks: Ranks):
        self.bucket = bucket
        flat = [gradient.flatten() for gradient in gradients]
        self.together = flat[0] if len(flat) == 1 else torch.cat(flat)          # a large one is not copied
        self.wait = ranks.begin_sum(self.together)

    def received(self) -> dict[nn.Parameter, Tensor]:
        """Each parameter's gradient, summed over ranks; waits for it."""
        self.wait()
        parts = self.together.split([parameter.numel() for parameter in self.bucket])
        return {parameter: part.view(parameter.shape) for parameter, part in zip(self.bucket, parts, strict=True)}


def buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in order, as many together as have BUCKET_BYTES of gradients, but at least one."""
    return chunks(parameters, lambda parameter: torch.float32.itemsize * parameter.numel(), BUCKET_BYTES)

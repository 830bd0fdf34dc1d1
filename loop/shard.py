"""--shard: a model's weights shared out over the ranks, each of which holds 1/N of every tensor.

    a model that is trained   FSDP2 (fully_shard): for a forward or backward pass a layer's weights are gathered just
                              before they are needed and let go after; gradients are added up over ranks as they arise,
                              and a rank keeps its own share of them, of the fp32 weights and of Adam's moments
    a model that only answers is gathered once a call, `whole`: ranks sample different things for different times, so
                              they cannot gather layer by layer together

So a sharded model is never asked itself; `whole` makes a plain model of it for as long as it answers, and whatever
samples, scores or saves knows nothing of shards. With one process there is nothing to share, and nothing changes.
A frozen vision tower stays whole on every rank: ranks encode different pictures.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from loop.flags import TrainingFlags
from model import empty_vlm
from model.checkpoint import set_parameter
from model.settings import read_settings
from model.vlm import VLM

# What a model remembers beside its parameters; the gathered copy has it in common with the model.
IN_COMMON = ("folder", "processor", "stop_ids", "disk_names", "file_dtype", "compute_dtype", "feature_cache", "eager")


# ---- sharing out

def shard_trained(vlm: VLM) -> None:
    """Share out a model that is trained, in place, between the processes of a run.

    Each decoder layer is gathered by itself. All else that is shared (embedding, head, last norm, a tower that is
    trained) is gathered for the whole of a pass, which must go through `vlm.hidden_states`: the head is used after it.
    Trained weights become fp32 layer by layer, so that no rank ever holds them whole in fp32; a layer is gathered in
    the dtype computed in, and gradients are added up in fp32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = all_processes(vlm.device)
    policy = MixedPrecisionPolicy(vlm.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    tower = set(vlm.tower.parameters())
    left_whole = set() if any(parameter.requires_grad for parameter in tower) else tower

    for layer in vlm.decoder.layers:
        hold_trained_in_fp32(layer)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    hold_trained_in_fp32(vlm)
    fully_shard(vlm, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=left_whole)
    register_fsdp_forward_method(vlm, "hidden_states")

    # A loss is divided by the whole batch's size already: gradients are added up, not averaged. A rank whose rows have
    # no pictures has no gradient where others have one (cross-attention, a trained tower): it adds zeros.
    for unit in (*vlm.decoder.layers, vlm):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    vlm.set_reduce_scatter_unused_params(True)          # of all units


def hold_trained_in_fp32(module: nn.Module) -> None:
    """Trained parameters that are not shared out yet become fp32; the others stay as they are."""
    for parameter in module.parameters():
        if parameter.requires_grad and not is_sharded(parameter):
            parameter.data = parameter.data.float()


def share_out(vlm: VLM) -> None:
    """Share out a frozen model, in place; with one process do nothing. A frozen tower is shared out, too."""
    if processes() == 1:
        return
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = all_processes(vlm.device)
    for name, parameter in vlm.named_parameters():
        # Every rank has read the same file, so nothing is sent. The clone lets the whole tensor go.
        part = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
        mine = DTensor.from_local(part.to_local().clone(), mesh, [Shard(0)], shape=part.shape, stride=part.stride())
        set_parameter(vlm, name, mine)
    vlm.requires_grad_(False)


def sharing(cfg: TrainingFlags) -> bool:
    """Whether what is trained is to be shared out: --shard is given, and there are several processes."""
    return cfg.shard and processes() > 1


def processes() -> int:
    """How many processes share the work, as torchrun has started them."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_processes(device: torch.device) -> Any:
    """All of them in a row: a DeviceMesh."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (processes(),))


# ---- gathering

@contextmanager
def whole(vlm: VLM, dtype: torch.dtype | None = None) -> Iterator[VLM]:
    """Inside, a frozen plain model with all of the weights: to be asked, or saved. A model that is whole is itself.

    Every rank must be here, and every rank gets all of it. The decoder and the head are in `dtype`, by default the one
    computed in; the tower is in its own dtype unless one is given.
    """
    if not isinstance(vlm, VLM) or not is_sharded(vlm.head_weight):     # behind a server, or whole
        yield vlm
        return

    copy = empty_vlm(read_settings(vlm.folder, "config.json"))
    for name in IN_COMMON:
        setattr(copy, name, getattr(vlm, name))
    in_tower = set(vlm.tower.parameters())
    for name, parameter in vlm.named_parameters():
        own_dtype = parameter.dtype if parameter in in_tower else vlm.dtype
        set_parameter(copy, name, gathered(parameter.detach().to(dtype or own_dtype)))
    copy.requires_grad_(False)
    yield copy.eval()


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a part of the tensor only: it is a DTensor, a class that takes a second to import."""
    return hasattr(tensor, "full_tensor")


def gathered(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank; one that is whole is itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, without gradient, in the same memory; one that is whole is its own part."""
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded(tensor) else tensor


def empty_part(tensor: Tensor, device: torch.device) -> Tensor:
    """Room for a tensor of that shape and dtype on `device`, shared out over the processes unless it is a scalar."""
    if processes() == 1 or tensor.dim() == 0:
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
    from torch.distributed.tensor import Shard, zeros

    room: Tensor = zeros(tensor.shape, dtype=tensor.dtype, device_mesh=all_processes(device), placements=[Shard(0)])
    return room

"""Reading a checkpoint: what it holds is compared with what the run needs, before anything is put in place.

A checkpoint of another version of the program, of another model or of other flags, or one that was damaged without
being cut, is a ValueError that names what differs. Fields are compared with the annotations of their dataclass.
"""
from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints, is_typeddict

import torch
from torch import Tensor

from loop.shard import local
from model.vlm import VLM

T = TypeVar("T")
MOMENTS = ("exp_avg", "exp_avg_sq")                     # AdamW's, of each parameter, in its shape
COMPARED_OPTIONS = ("betas", "eps", "weight_decay")     # of AdamW; the learning rate changes at every step


# ---- the program's state

def rebuild(kind: type[T], saved: Any, place: str) -> T:
    """The dataclass `kind` from its saved fields, dataclasses inside it rebuilt too.

    `place` is where in the checkpoint they stand, for messages. ValueError for a field that is missing, unknown, or of
    another type than it is annotated with.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"{place} is {saved!r:.60}, not the fields of a {kind.__name__}")
    hints = get_type_hints(kind)
    names = {field.name for field in fields(kind)}
    differing = sorted(str(name) for name in saved.keys() ^ names)
    if differing:
        raise ValueError(f"it is another version's, which differs in the field {place}.{differing[0]:.60}")
    values = {name: read_value(saved[name], hints[name], f"{place}.{name}") for name in names}
    return kind(**values)


def read_value(value: Any, hint: Any, place: str) -> Any:
    """A saved value as the annotation `hint` has it; ValueError where it is something else."""
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):              # X | None
        [kind] = [part for part in get_args(hint) if part is not type(None)]
        return None if value is None else read_value(value, kind, place)
    if is_dataclass(hint):
        return rebuild(hint, value, place)
    if origin in (list, tuple) and isinstance(value, origin):       # list[X], tuple[X, ...]
        kind = get_args(hint)[0]
        if kind in (int, str, bool) and all(type(entry) is kind for entry in value):
            return value                                # a completion's tokens: there are many
        return origin(read_value(entry, kind, f"{place}[{number}]") for number, entry in enumerate(value))

    if origin is dict:
        fits = isinstance(value, dict)
    elif is_typeddict(hint):
        fits = isinstance(value, dict) and hint.__required_keys__ <= value.keys()
    elif hint is float:                                 # NaN is no score, loss or log-probability
        fits = type(value) in (int, float) and math.isfinite(value)
    else:
        fits = type(value) is hint
    if not fits:
        raise ValueError(f"{place} is {value!r:.60}, not {getattr(hint, '__name__', hint)}")
    return value


def check_tokens(vlm: VLM, completions: Sequence[Sequence[int]], place: str) -> None:
    """ValueError where a saved completion is empty, or holds an id that the model does not have."""
    rows = len(vlm.head_weight)
    for completion in completions:
        if not completion or not 0 <= min(completion) <= max(completion) < rows:
            raise ValueError(f"{place} holds a completion of the tokens {completion!r:.60}; the model has {rows}")


# ---- weights and optimiser

def check_training_state(vlm: VLM, optimiser: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """ValueError unless `saved`, what optimise.training_state returned, fits what is trained: names, shapes, dtypes.

    (Tensor.copy_ would take a tensor of another shape, too, and repeat its rows.) NaN and infinity do not fit.
    """
    trained = {name: parameter for name, parameter in vlm.named_parameters() if parameter.requires_grad}
    weights = as_mapping(saved, "model")
    check_same_names(weights, trained, "model")
    for name, parameter in trained.items():
        check_tensor(weights[name], parameter, f"model.{name}")
    check_optimiser_state(optimiser, as_mapping(saved, "optimiser"))


def check_optimiser_state(optimiser: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """ValueError unless it is the state of such an optimiser over such parameters, before its first step or after."""
    [group] = optimiser.param_groups
    parameters = group["params"]
    groups = saved.get("param_groups")
    if not isinstance(groups, list) or len(groups) != 1 or not isinstance(groups[0], dict):
        raise ValueError("optimiser.param_groups is not a list of one group")
    if groups[0].get("params") != list(range(len(parameters))):
        raise ValueError(f"optimiser.param_groups is not over the {len(parameters)} tensors that are trained")
    for option in COMPARED_OPTIONS:
        if groups[0].get(option) != group[option]:
            raise ValueError(f"optimiser.{option} is {groups[0].get(option)!r:.60}, and {group[option]!r} in this run")

    states = as_mapping(saved, "state")
    unknown = [number for number in states if number not in range(len(parameters))]
    if unknown:
        raise ValueError(f"optimiser.state holds the tensor {unknown[0]!r:.60} of {len(parameters)}")
    for number, state in states.items():
        if not isinstance(state, dict):
            raise ValueError(f"optimiser.state[{number}] is {state!r:.60}, not a tensor's state")
        check_same_names(state, ("step", *MOMENTS), f"optimiser.state[{number}]")
        for name in MOMENTS:
            check_tensor(state[name], parameters[number], f"optimiser.state[{number}].{name}")
        check_tensor(state["step"], torch.zeros(()), f"optimiser.state[{number}].step")


def as_mapping(saved: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The object `name` of a checkpoint."""
    value = saved.get(name)
    if not isinstance(value, Mapping):
        raise ValueError(f"it holds no {name}")
    return value


def check_same_names(saved: Mapping[str, Any], expected: Sequence[str] | Mapping[str, Any], place: str) -> None:
    """ValueError that names the first thing that only one of the two holds."""
    differing = sorted(str(name) for name in saved.keys() ^ set(expected))
    if differing:
        name = differing[0]
        said = "is not there" if name in expected else "is not trained in this run"
        raise ValueError(f"{place}.{name:.100} {said} ({len(differing)} names differ)")


def check_tensor(saved: Any, expected: Tensor, place: str) -> None:
    """ValueError unless it is a tensor of that shape and dtype, and all its numbers are finite."""
    if not isinstance(saved, Tensor):
        raise ValueError(f"{place} is {saved!r:.60}, not a tensor")
    if saved.is_nested or saved.is_meta or saved.layout != torch.strided:
        raise ValueError(f"{place} is a nested, sparse or empty (meta) tensor, not one that holds all its numbers")
    if saved.shape != expected.shape:
        raise ValueError(f"{place} has shape {tuple(saved.shape)}, and {tuple(expected.shape)} in this run")
    if saved.dtype != expected.dtype:
        raise ValueError(f"{place} is {saved.dtype}, and {expected.dtype} in this run")
    part = local(saved)                                 # another rank looks at another part
    if not part.numel():
        return
    smallest, largest = part.aminmax()                  # one NaN makes both NaN
    if not smallest.isfinite() or not largest.isfinite():
        raise ValueError(f"{place} holds NaN or infinity")

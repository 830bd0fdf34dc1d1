"""Safetensors in and out, strictly; folders that appear whole or not at all.

A model folder is what the hub publishes: config.json, model.safetensors (or shards with model.safetensors.index.json),
tokenizer.json, preprocessor_config.json, generation_config.json.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COUNTS = frozenset((                                                # fields that are positive integers
    "attention_heads", "depth", "head_dim", "height", "hidden_size", "image_size", "in_channels", "in_chans",
    "intermediate_size", "max_image_tiles", "max_num_tiles", "merge_size", "num_attention_heads", "num_channels",
    "num_global_layers", "num_heads", "num_hidden_layers", "num_key_value_heads", "num_position_embeddings",
    "out_hidden_size", "patch_size", "spatial_merge_size", "temporal_patch_size", "vocab_size", "width", "window_size"))
LISTS = frozenset((
    "cross_attention_layers", "deepstack_visual_indexes", "fullatt_block_indexes", "image_mean", "image_std",
    "intermediate_layers_indices", "mrope_section", "supported_aspect_ratios"))
PARTS = frozenset((                                                 # fields that are objects
    "image_processor", "rope_parameters", "rope_scaling", "size", "text_config", "vision_config", "weight_map"))
COPIED = ("*.json", "*.jinja", "merges.txt", "LICENSE*")            # what a model folder holds beside its weights


class Settings(dict):
    """A JSON object; a missing field is a ValueError that names it: no default stands in for a published value.

    So are, when asked for, COUNTS that are no positive integers, LISTS that are no lists, PARTS that are no objects.
    """

    source = ""

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if key in COUNTS and (type(value) is not int or value < 1):
            raise ValueError(f"{self.source}: {key} is {value!r:.80}, not a positive integer")
        if key in LISTS and not isinstance(value, list):
            raise ValueError(f"{self.source}: {key} is {value!r:.80}, not a list")
        if key in PARTS and not isinstance(value, Settings):
            raise ValueError(f"{self.source}: {key} is {value!r:.80}, not an object")
        return value

    def get(self, key: str, default: Any = None) -> Any:
        """The field, or `default` where it is missing or null."""
        return default if super().get(key) is None else self[key]

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"{self.source} lacks the field {key!r}")


def read_settings(folder: Path, name: str) -> Settings:
    """A JSON file of a model folder, nested objects included."""
    path = Path(folder) / name

    def wrap(value: dict) -> Settings:
        settings = Settings(value)
        settings.source = str(path)
        return settings
    try:
        settings = json.loads(path.read_text(encoding="utf-8"), object_hook=wrap)
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no {name}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(settings, Settings):
        raise ValueError(f"{path} does not hold a JSON object")
    return settings


def either(settings: Settings, name: str, older: str) -> Any:
    """A field that has had two names: the value under `name`, or under `older`."""
    return settings[older] if older in settings and name not in settings else settings[name]


def rope_settings(text_config: Settings) -> tuple[float, Settings]:
    """(theta, scaling) of a text config: `rope_parameters` as transformers 5 writes it, or the older two fields."""
    if "rope_parameters" in text_config:
        rope = text_config["rope_parameters"]
        return rope["rope_theta"], rope
    return text_config["rope_theta"], text_config["rope_scaling"]


def resolve_folder(path_or_hub_id: str | Path) -> Path:
    """A local folder as it is; otherwise a hub id, downloaded (weights as safetensors only)."""
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_hub_id)) or path.exists():
        raise ValueError(f"{path_or_hub_id} is neither a folder nor a hub id (owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=[*COPIED, "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path_or_hub_id} is not a local folder and cannot be downloaded: {reason}") from None


def folder_digest(folder: Path) -> str:
    """SHA-256 of a model folder's files: the identity of a reference or a verifier."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors")):
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def tensor_files(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor, from the files' own headers; the index is checked against them."""
    index_path, single = folder / INDEX, folder / "model.safetensors"
    if index_path.is_file():
        index = read_settings(folder, INDEX)["weight_map"]
        if strange := [name for name, file in index.items() if not isinstance(file, str)]:
            raise ValueError(f"{index_path}: the file of {strange[0]} is {index[strange[0]]!r:.80}, not a name")
        files = [folder / name for name in sorted(set(index.values()))]
    elif single.is_file():
        index, files = None, [single]
    elif list(folder.glob("*.bin")) or list(folder.glob("*.pth")):
        raise ValueError(f"{folder} holds pickled weights only; convert them to safetensors, pickles are not opened")
    else:
        raise ValueError(f"{folder} holds neither model.safetensors nor {INDEX}")
    found: dict[str, Path] = {}
    for path in files:
        if not path.is_file():
            raise ValueError(f"{index_path} names {path.name}, which is absent")
        with open_tensors(path) as tensors:
            found.update((name, path) for name in tensors.keys())
    if index is not None and (lost := sorted(set(index) - set(found))):
        raise ValueError(f"{index_path} names {lost[0]}, which no shard holds ({len(lost)} such tensors)")
    return found


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, opened without reading it; a truncated or foreign file is a ValueError that names it."""
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def load_weights(model: nn.Module, folder: Path, rename: tuple[tuple[str, str], ...], device: torch.device | str,
                 dtype: torch.dtype | None) -> tuple[dict[str, str], torch.dtype]:
    """Fill `model`, built on the meta device, from `folder`; one tensor at a time, onto `device` in `dtype`.

    `rename` maps names on disk to parameter names (re.sub, in order). `dtype` None keeps the files' own. The sets of
    names must be equal, every shape must match and every number be finite, else ValueError. Returns parameter name ->
    name on disk, and the dtype of the files (of their last tensor: published files hold one).
    """
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    files, names = tensor_files(folder), {}
    for disk_name in files:
        if disk_name.endswith("rotary_emb.inv_freq"):               # computed from config.json, never read
            continue
        name = disk_name
        for pattern, replacement in rename:
            name = re.sub(pattern, replacement, name)
        if name not in expected:
            raise ValueError(f"{files[disk_name]} holds {disk_name}, which the model does not have")
        if name in names:
            raise ValueError(f"{folder} holds {names[name]} and {disk_name}, which are the same tensor")
        names[name] = disk_name
    if missing := sorted(set(expected) - set(names)):
        raise ValueError(f"{folder} lacks {missing[0]} ({len(missing)} tensors are missing)")
    for path in sorted(set(files.values())):
        with open_tensors(path) as tensors:
            for name, disk_name in names.items():
                if files[disk_name] == path:
                    tensor = tensors.get_tensor(disk_name)
                    _assign(model, name, tensor, expected[name], path, device, dtype)
    return names, tensor.dtype


def _assign(model: nn.Module, name: str, tensor: Tensor, shape: torch.Size, path: Path, device: torch.device | str,
            dtype: torch.dtype | None) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{path}: {name} has shape {tuple(tensor.shape)}, the model needs {tuple(shape)}")
    if tensor.dtype not in WEIGHTS:
        raise ValueError(f"{path}: {name} is {tensor.dtype}; weights are {', '.join(map(str, WEIGHTS))}")
    if not all(extreme.isfinite() for extreme in tensor.aminmax()):     # NaN is both; nothing of its size is allocated
        raise ValueError(f"{path}: {name} holds NaN or infinity")
    module_name, _, attribute = name.rpartition(".")
    parameter = nn.Parameter(tensor.to(device=device, dtype=dtype or tensor.dtype), requires_grad=True)
    setattr(model.get_submodule(module_name), attribute, parameter)


def save_weights(tensors: dict[str, Tensor], folder: Path, dtype: torch.dtype | None) -> None:
    """Write `tensors` in shards of at most 5 GB, with an index when there are several."""
    shards: list[dict[str, Tensor]] = [{}]
    sizes = [0]
    for name, tensor in tensors.items():
        size = tensor.numel() * (dtype or tensor.dtype).itemsize
        if shards[-1] and sizes[-1] + size > SHARD_BYTES:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = tensor
        sizes[-1] += size
    names = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards):
        held = {k: t.detach().to(device="cpu", dtype=dtype or t.dtype).contiguous() for k, t in shard.items()}
        save_file(held, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)                                # the library writes for the owner alone
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)},
                 "weight_map": {key: name for name, shard in zip(names, shards) for key in shard}}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def copy_settings(source: Path, target: Path) -> None:
    """Copy config, tokenizer, preprocessor and generation files; the index of the weights is not among them."""
    for path in sorted(p for pattern in COPIED for p in source.glob(pattern)):
        if path.name != INDEX:
            shutil.copyfile(path, target / path.name)


@contextmanager
def whole_folder(target: Path, replace: bool = True) -> Iterator[Path]:
    """Yields an empty folder that takes the name `target` only once everything in it is written and synced.

    An existing `target` is replaced then; whatever interrupts the writing leaves it untouched. (Killed between two
    renames, in no time at all, the old one is found beside it as .NAME.PID.old.) With `replace` False one that holds
    anything is a FileExistsError, even if it appeared in the meantime.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}.new")
    shutil.rmtree(aside, ignore_errors=True)                         # of a killed process that had our number
    aside.mkdir()
    try:
        yield aside
        for path in [p for p in aside.rglob("*") if p.is_file()] + [aside]:
            _sync(path)
        if replace and target.exists():
            old = target.with_name(f".{target.name}.{os.getpid()}.old")
            os.replace(target, old)
            os.replace(aside, target)
            shutil.rmtree(old)
        else:
            try:
                os.replace(aside, target)                            # never over a folder that holds something
            except OSError:
                if target.exists():
                    raise FileExistsError(f"{target} exists") from None
                raise
        _sync(target.parent)
    finally:
        if aside.exists():
            shutil.rmtree(aside)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

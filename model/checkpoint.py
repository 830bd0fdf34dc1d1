"""Model folders: reading weights strictly, writing folders that appear whole or not at all.

A model folder is what the hub publishes: config.json, model.safetensors (or shards with model.safetensors.index.json),
tokenizer.json, preprocessor_config.json, generation_config.json.
"""
from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .settings import read_settings

SINGLE_FILE = "model.safetensors"                       # all weights in one file
INDEX = "model.safetensors.index.json"                  # or in shards: this file names the shard of each tensor
SHARD_NAME = re.compile(r"[\w.-]{1,100}\.safetensors")  # in the folder itself
SHARD_BYTES = 5_000_000_000                             # the largest shard that is written
READ_BYTES = 1 << 24                                    # read at once when a file is hashed
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What a model folder holds beside its weights: settings, tokenizer, chat templates, the licence and its conditions.
COPIED_FILES = ("*.json", "*.jinja", "additional_chat_templates/*.jinja", "merges.txt", "README.md", "LICENSE*",
                "NOTICE*", "USE_POLICY.md")
CHAT_TEMPLATES = Path(__file__).parent / "templates"    # one a family, MODEL_TYPE.jinja
ADAM_MOMENTS = 2                                        # of each trained weight


# ---- folders

def resolve_folder(path_or_hub_id: str | Path, files: Sequence[str] = (*COPIED_FILES, "*.safetensors")) -> Path:
    """A local folder as it is; otherwise a hub id, of which these `files` are downloaded."""
    path = Path(path_or_hub_id)
    if os.path.isdir(path):                             # False for a name that is too long, where is_dir() raises
        return path
    if not re.fullmatch(r"[\w.-]{1,100}/[\w.-]{1,100}", str(path_or_hub_id)) or os.path.exists(path):
        raise ValueError(f"{shown(str(path_or_hub_id))} is neither a folder nor a hub id (owner/name)")

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path_or_hub_id} is not a local folder and cannot be downloaded: {reason}") from None


def folder_digest(folder: Path) -> str:
    """SHA-256 of a model folder's settings and weights: the identity of a reference or a verifier."""
    return files_digest(path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors"))


def files_digest(paths: Iterable[Path]) -> str:
    """SHA-256 of files' names and contents, in this order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        with open(path, "rb") as file:
            while block := file.read(READ_BYTES):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def whole_folder(target: Path, replace: bool = True) -> Iterator[Path]:
    """Yields an empty folder, which takes the name `target` once everything in it is written and synced.

    An existing `target` is replaced at that moment; if the writing is interrupted it is left untouched. (A process
    killed just between the two renames of a replacement leaves the old folder beside it as .NAME.PID.old; whoever
    writes `target` next puts it back.) With `replace` False a `target` that holds anything, even one that appeared in
    the meantime, is a FileExistsError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    _settle_replacement(target)
    aside = target.with_name(f".{target.name}.{os.getpid()}.new")
    shutil.rmtree(aside, ignore_errors=True)            # left by a killed process that had our process id
    aside.mkdir()
    try:
        yield aside

        for path in aside.rglob("*"):
            if path.is_file():
                _sync(path)
        _sync(aside)

        if replace and target.exists():
            _replace_folder(aside, target)
        else:
            _rename_to_new(aside, target)
        _sync(target.parent)
    finally:
        if aside.exists():
            shutil.rmtree(aside)


def _replace_folder(aside: Path, target: Path) -> None:
    """Rename `aside` to `target`, which exists: the old one must step out of the way first, then it is removed."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    os.replace(target, old)
    os.replace(aside, target)
    shutil.rmtree(old)


def _settle_replacement(target: Path) -> None:
    """Finish a replacement in which a process was killed: remove the old folder, or put it back if no new one came."""
    for old in target.parent.glob(f".{glob.escape(target.name)}.*.old"):
        if target.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, target)


def _rename_to_new(aside: Path, target: Path) -> None:
    """Rename `aside` to `target`; the system refuses this if `target` has become a folder that holds something."""
    try:
        os.replace(aside, target)
    except OSError:
        if target.exists():
            raise FileExistsError(f"{target} exists") from None
        raise


def _sync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- weights in

def load_weights(model: nn.Module, folder: Path, rename: tuple[tuple[str, str], ...], device: torch.device | str,
                 dtype: torch.dtype | None) -> tuple[dict[str, str], torch.dtype]:
    """Fill `model`, built on the meta device, from `folder`; one tensor at a time, onto `device` in `dtype`.

    `rename` maps names on disk to parameter names (re.sub, in order). `dtype` None keeps the files' own. The sets of
    names must be equal, every shape must match and every number be finite, else ValueError. Returns parameter name ->
    name on disk, and the dtype of the files (of their last tensor: published files hold one).
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    files = tensor_files(folder)
    disk_names = _match_names(set(shapes), files, rename, folder)

    for path in sorted(set(files.values())):
        with open_tensors(path) as tensors:
            for name, disk_name in disk_names.items():
                if files[disk_name] != path:
                    continue
                tensor = tensors.get_tensor(disk_name)
                _check_tensor(tensor, shapes[name], f"{path}: {name}")
                file_dtype = tensor.dtype
                set_parameter(model, name, tensor.to(device=device, dtype=dtype or file_dtype))
    return disk_names, file_dtype


def tensor_files(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor, from the files' own headers; the index is checked against them."""
    index_path = folder / INDEX
    index: dict[str, str] = {}
    if index_path.is_file():
        index = _read_index(folder)
        paths = [folder / name for name in sorted(set(index.values()))]
    elif (folder / SINGLE_FILE).is_file():
        paths = [folder / SINGLE_FILE]
    elif list(folder.glob("*.bin")) or list(folder.glob("*.pth")):
        raise ValueError(f"{folder} holds pickled weights only; convert them to safetensors, pickles are not opened")
    else:
        raise ValueError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX}")

    files: dict[str, Path] = {}
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{index_path} names {path.name}, which is absent")
        with open_tensors(path) as tensors:
            files.update(dict.fromkeys(tensors.keys(), path))

    lost = sorted(set(index) - set(files))
    if lost:
        raise ValueError(f"{index_path} names {shown(lost[0])}, which no shard holds ({len(lost)} such tensors)")
    return files


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, as the index of the shards has it. A file elsewhere is a ValueError."""
    index = read_settings(folder, INDEX)["weight_map"]
    for name, file_name in index.items():
        if not isinstance(file_name, str) or not SHARD_NAME.fullmatch(file_name):
            raise ValueError(f"{folder / INDEX}: the file of {shown(name)} is {file_name!r:.80}, not a name like "
                             "model-00001-of-00002.safetensors")
    return index


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file, opened without reading it; a truncated or foreign file is a ValueError that names it."""
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {shown(str(error))}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {shown(str(error))}") from None


def shown(text: str) -> str:
    """What a file holds, a name or a complaint about it, as a message can show it: printable and not long."""
    return text[:200] if text.isprintable() else repr(text)[:200]


def _match_names(parameters: set[str], files: dict[str, Path], rename: tuple[tuple[str, str], ...],
                 folder: Path) -> dict[str, str]:
    """Parameter name -> name on disk. Every parameter must have exactly one tensor and every tensor a parameter."""
    disk_names: dict[str, str] = {}
    for disk_name, path in files.items():
        if disk_name.endswith("rotary_emb.inv_freq"):   # old files hold it; we compute it from config.json
            continue
        name = disk_name
        for pattern, replacement in rename:
            name = re.sub(pattern, replacement, name)
        if name not in parameters:
            raise ValueError(f"{path} holds {shown(disk_name)}, which the model does not have")
        if name in disk_names:
            raise ValueError(f"{folder} holds {disk_names[name]} and {shown(disk_name)}, which are the same tensor")
        disk_names[name] = disk_name

    missing = sorted(parameters - set(disk_names))
    if missing:
        raise ValueError(f"{folder} lacks {missing[0]} ({len(missing)} tensors are missing)")
    return disk_names


def _check_tensor(tensor: Tensor, shape: torch.Size, what: str) -> None:
    """ValueError that begins with `what` if the tensor has another shape, no weights' dtype, or is not all finite."""
    if tensor.shape != shape:
        raise ValueError(f"{what} has shape {tuple(tensor.shape)}, the model needs {tuple(shape)}")
    if tensor.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{what} is {tensor.dtype}; weights are {', '.join(map(str, WEIGHT_DTYPES))}")
    # One NaN makes both extremes NaN. Unlike tensor.isfinite() this allocates nothing of the tensor's size.
    smallest, largest = tensor.aminmax()
    if not smallest.isfinite() or not largest.isfinite():
        raise ValueError(f"{what} holds NaN or infinity")


def set_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Put `tensor` where the parameter `name`, "model.layers.0.norm.weight", stands."""
    module_name, _, attribute = name.rpartition(".")
    module = model.get_submodule(module_name)
    setattr(module, attribute, nn.Parameter(tensor, requires_grad=True))


# ---- weights out

def save_weights(tensors: dict[str, Tensor], folder: Path, dtype: torch.dtype | None) -> None:
    """Write `tensors` in shards of at most 5 GB, with an index when there are several."""
    shards: list[dict[str, Tensor]] = [{}]
    shard_bytes = 0                                     # of the last shard
    total_bytes = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * (dtype or tensor.dtype).itemsize
        if shards[-1] and shard_bytes + size > SHARD_BYTES:
            shards.append({})
            shard_bytes = 0
        shards[-1][name] = tensor
        shard_bytes += size
        total_bytes += size

    if len(shards) == 1:
        _save_shard(shards[0], folder / SINGLE_FILE, dtype)
        return

    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save_shard(shard, folder / file_name, dtype)
        weight_map.update(dict.fromkeys(shard, file_name))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _save_shard(shard: dict[str, Tensor], path: Path, dtype: torch.dtype | None) -> None:
    """Write one safetensors file. Only this shard's tensors are copied to the CPU at a time."""
    on_cpu = {}
    for name, tensor in shard.items():
        on_cpu[name] = tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype).contiguous()
    save_file(on_cpu, path, metadata={"format": "pt"})
    path.chmod(0o644)                                   # the library lets the owner alone read it


def copy_settings(source: Path, target: Path) -> None:
    """Copy the files beside the weights as they are; the index of the weights is not among them."""
    for pattern in COPIED_FILES:
        for path in sorted(source.glob(pattern)):
            if path.name != INDEX:
                copy = target / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)


def add_chat_template(folder: Path, model_type: str) -> None:
    """Write the family's chat template into a folder that holds none in any form.

    Prompts are made by the family's format whatever template a folder holds. So a folder that was trained and measured
    with them is served with them, too.
    """
    for name in ("chat_template.jinja", "chat_template.json"):
        if (folder / name).exists():
            return
    if (folder / "tokenizer_config.json").exists():
        tokenizer_config = read_settings(folder, "tokenizer_config.json")
        if tokenizer_config.get("chat_template"):
            return
    shutil.copyfile(CHAT_TEMPLATES / f"{model_type}.jinja", folder / "chat_template.jinja")


# ---- sizes, from shapes alone

def training_bytes(model: nn.Module) -> int:
    """Bytes of one training checkpoint on disk: the weights that are trained, and Adam's two moments of each.

    Both are fp32 where the weights are. A new checkpoint is written before an old one goes.
    """
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return trained * (1 + ADAM_MOMENTS)


def saved_bytes(model: nn.Module, disk_names: Iterable[str], dtype: torch.dtype | None = None) -> int:
    """Bytes of the weights that save_weights writes in `dtype` (None: their own), adapters merged into them.

    `disk_names`: the names of the parameters that the files hold.
    """
    total = 0
    for name in disk_names:
        parameter = model.get_parameter(name)
        total += parameter.numel() * (dtype or parameter.dtype).itemsize
    return total

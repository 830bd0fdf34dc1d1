"""Vision-language models: load_vlm, save_vlm, generate are all that other code needs.

    vlm = load_vlm("Qwen/Qwen3-VL-2B-Instruct", device="cuda", dtype=torch.bfloat16)
    [[answer]] = generate(vlm, [chat], max_new_tokens=64, temperature=0)
    save_vlm(vlm, "copy")
"""
from __future__ import annotations

from pathlib import Path

import torch

from .checkpoint import (
    add_chat_template,
    copy_settings,
    load_weights,
    resolve_folder,
    save_weights,
    whole_folder,
)
from .lora import merged_parameters
from .mllama import Mllama
from .qwen2_5_vl import Qwen25VL
from .qwen3_vl import Qwen3VL
from .ranges import check_token_ids
from .sampler import Completion, generate, next_digits
from .settings import Settings, is_token, read_settings
from .vlm import VLM, pick_device

__all__ = ["VLM", "Completion", "empty_vlm", "generate", "load_vlm", "next_digits", "save_vlm"]

FAMILIES: dict[str, type[VLM]] = {"qwen3_vl": Qwen3VL, "qwen2_5_vl": Qwen25VL, "mllama": Mllama}


def load_vlm(path_or_hub_id: str | Path, device: torch.device | str = "cpu",
             dtype: torch.dtype | None = torch.float32) -> VLM:
    """Open a model in the published layout: a folder, or a hub id that is downloaded first.

    `dtype` is that of the weights in memory; None keeps the files'. Strict: an unknown model_type, a missing, extra or
    misshapen tensor, one with NaN or infinity, a truncated file are a ValueError that names the culprit.
    """
    device = pick_device(device)
    folder = resolve_folder(path_or_hub_id)
    config = read_settings(folder, "config.json")
    family = family_of(config)

    vlm = empty_vlm(config)
    vlm.folder = folder
    vlm.processor = family.make_processor(folder, config)
    vlm.stop_ids = read_stop_ids(folder)
    check_token_ids(vlm.decoder.embed_tokens.num_embeddings, {
        f"{folder}/config.json: the largest id of a placeholder": max(vlm.processor.never_sampled),
        f"{folder}/tokenizer.json: the largest id": vlm.processor.vocabulary - 1,
        f"{folder}/generation_config.json: the largest eos_token_id": max(vlm.stop_ids),
    })
    vlm.disk_names, vlm.file_dtype = load_weights(vlm, folder, family.RENAME, device, dtype)
    return vlm.eval()


def empty_vlm(config: Settings) -> VLM:
    """The model of a config.json without its weights, on the meta device: shapes, which take no memory."""
    with torch.device("meta"):
        return family_of(config)(config)


def family_of(config: Settings) -> type[VLM]:
    """The family that config.json names as its model_type; ValueError for an unknown one."""
    model_type = config["model_type"]
    if model_type not in list(FAMILIES):                # a list compares by ==: in a bad file it may be unhashable
        raise ValueError(f"{config.source}: model_type {model_type!r:.80} is not one of {sorted(FAMILIES)}")
    return FAMILIES[model_type]


def read_stop_ids(folder: Path) -> frozenset[int]:
    """The ids that end an answer: `eos_token_id` of generation_config.json, one id or a list of them."""
    stop = read_settings(folder, "generation_config.json")["eos_token_id"]
    stop_ids = stop if isinstance(stop, list) else [stop]
    if not stop_ids or not all(is_token(token) for token in stop_ids):
        raise ValueError(f"{folder}/generation_config.json: eos_token_id is {stop!r:.80}, no token id or list of them")
    return frozenset(stop_ids)


def save_vlm(vlm: VLM, directory: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write `vlm` in the layout it was loaded from, whole or not at all; `dtype` None keeps the weights' own.

    Adapters are merged into the weights that they adapt. The files beside the weights are copied as they are; a folder
    without a chat template gets its family's, so that it can be served.
    """
    tensors = {}
    for name, parameter in merged_parameters(vlm).items():
        tensors[vlm.disk_names[name]] = parameter
    with whole_folder(Path(directory)) as folder:
        copy_settings(vlm.folder, folder)
        add_chat_template(folder, read_settings(vlm.folder, "config.json")["model_type"])
        save_weights(tensors, folder, dtype)

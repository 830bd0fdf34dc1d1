"""Checkpoints of the six published models at their true width and vocabulary, with few layers and random weights.

    write_checkpoint(folder, shorten(CONFIGS["Qwen3-VL-8B"]))       a folder as it is published, its weights in shards
    teach(folder, ["1", "2", "3"])                                  edits it: the model answers one of these texts

Every number of config.json is the published one, except how many layers there are and which of them do something
special (`shorten`). The tokenizer has the published number of entries and its control tokens at their published ids;
what lies between is made up, for the real vocabularies are not ours to ship.

The random weights. A decoder layer adds to the residual stream about as much as the embedding holds. The final norm has
random signs: where the head is the embedding, a token would otherwise predict itself. Weights are bf16 from the start
and are written in shards, so that building takes the memory of one shard.

How a random model is taught to speak. A reply is a chain of tokens, and an MLP is a table of keys and values (Geva et
al., arXiv 2012.14913). In the FIRST decoder layer some neurons of the MLP get the embedding of a token as their key,
and as their value the direction in the residual stream that raises the logits of the tokens that follow it in the
replies. So after "{" comes what follows "{" in a reply, whatever was asked. Where several tokens may follow, their
logits are tied by the value, and what the layers have found in the prompt and its pictures decides: replies differ from
prompt to prompt as those of a model do. Nothing else is edited, so attention, caches and pictures are computed as
before.
"""
from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from golden.make import PREPROCESSING
from model import FAMILIES
from model.checkpoint import INDEX, tensor_files
from model.settings import read_settings
from model.tokenizer import load_tokenizer
from tiny import disk_name
from verifier import CANDIDATE, COMPARISON, RUBRIC

SHARD_BYTES = 1_300_000_000                             # the largest tensor has 1.24 GB
POOL_SIZE = 4_194_301                                   # random numbers; a prime, so that no row of a matrix repeats
LOGIT_SPREAD = 3.0                                      # standard deviation of a random model's logits
NEURONS = 64                                            # of the first layer that `teach` may use
VALUE_SIZE = 1.5                                        # of what such a neuron adds, over the size of an embedding

# Fields that the published files hold besides those of tests/helpers/published.py. The computation depends on none.
COMMON_EXTRAS = {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True}
QWEN3_EXTRAS = {**COMMON_EXTRAS, "dtype": "bfloat16", "bos_token_id": 151643, "eos_token_id": 151645}
QWEN25_EXTRAS = {**COMMON_EXTRAS, "torch_dtype": "bfloat16", "bos_token_id": 151643, "eos_token_id": 151645,
                 "vision_token_id": 151654, "sliding_window": 32768, "max_window_layers": 70,
                 "transformers_version": "4.41.2"}
MLLAMA_EXTRAS = {**COMMON_EXTRAS, "torch_dtype": "bfloat16", "dropout": 0, "is_decoder": False, "top_k": 50,
                 "temperature": 1.0, "chunk_size_feed_forward": 0, "use_bfloat16": False}


# ---- config.json

def shorten(config: dict) -> dict:
    """The published configuration with two decoder layers and a tower of two or three.

    Layer indexes are moved to layers that there are. Llama's tower hands over one depth instead of five, so that its
    output is narrower: this and the counts of layers are the only numbers that are not published.
    """
    config = copy.deepcopy(config)
    text = config.get("text_config", config)
    vision = config["vision_config"]
    text["num_hidden_layers"] = 2
    if config["model_type"] == "qwen3_vl":
        text.update(QWEN3_EXTRAS)
        vision.update(depth=3, deepstack_visual_indexes=[0, 1], initializer_range=0.02)
        config["transformers_version"] = "4.57.0.dev0"
    elif config["model_type"] == "qwen2_5_vl":
        text.update(QWEN25_EXTRAS)
        vision.update(depth=2, fullatt_block_indexes=[1])                  # one layer with windows, one without
    else:
        text.update(MLLAMA_EXTRAS, cross_attention_layers=[1])
        depths = [1]
        vision.update(num_hidden_layers=2, num_global_layers=1, intermediate_layers_indices=depths,
                      vision_output_dim=(1 + len(depths)) * vision["hidden_size"], initializer_range=0.02)
        config.update(torch_dtype="bfloat16", transformers_version="4.45.0.dev0")
    return config


def narrow(config: dict) -> dict:
    """A Qwen3-VL configuration as a model of little width: a partner for the large ones, quick on its feet."""
    config = shorten(config)
    config["text_config"].update(hidden_size=512, num_attention_heads=4, num_key_value_heads=2, intermediate_size=1024)
    config["vision_config"].update(hidden_size=64, num_heads=2, intermediate_size=128, out_hidden_size=512)
    return config


# ---- the tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())  # a character for each byte
QUESTIONS = ("How many red shapes are there?", "Answer with a whole number.")
# How each family cuts text before byte pairs are merged: Qwen takes digits one by one, Llama up to three together.
CUT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
       r"|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
                "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
                "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
QWEN_ADDED = ("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
              "<|repo_name|>", "<|file_sep|>")          # added, but not special: they are kept when ids are decoded
QWEN3_ADDED = ("<tool_response>", "</tool_response>", "<think>", "</think>")
QWEN_ENTRIES = 151_643                                  # byte pairs, before the control tokens
LLAMA_ENTRIES = 128_000
LLAMA_RESERVED = 256                                    # control tokens before <|image|>, most of them reserved
LLAMA_CONTROL = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 4: "<|finetune_right_pad_id|>",
                 6: "<|start_header_id|>", 7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>",
                 10: "<|python_tag|>"}                  # the id less LLAMA_ENTRIES
PUBLISHED_IDS = {"<|endoftext|>": 151643, "<|im_end|>": 151645, "<|vision_start|>": 151652, "<|image_pad|>": 151655,
                 "<|video_pad|>": 151656, "<|file_sep|>": 151664, "</think>": 151668, "<|begin_of_text|>": 128000,
                 "<|finetune_right_pad_id|>": 128004, "<|end_header_id|>": 128007, "<|eot_id|>": 128009,
                 "<|image|>": 128256}


def make_tokenizer(family: str) -> Tokenizer:
    """Byte-level BPE with the published number of entries, and the control tokens at their published ids."""
    is_llama = family == "mllama"
    cut = pre_tokenizers.Split(Regex(CUT.format(digits="{1,3}" if is_llama else "")), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pre_tokenizer = pre_tokenizers.Sequence([cut, to_bytes])

    merges = fill_up(word_merges(pre_tokenizer), is_llama, LLAMA_ENTRIES if is_llama else QWEN_ENTRIES)
    vocabulary = {byte: i for i, byte in enumerate(ALPHABET)}
    for a, b in merges:
        vocabulary[a + b] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=is_llama))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()

    if is_llama:
        control = [LLAMA_CONTROL.get(i, f"<|reserved_special_token_{i}|>") for i in range(LLAMA_RESERVED)]
        tokenizer.add_special_tokens([*control, "<|image|>"])
    else:
        added = QWEN_ADDED + QWEN3_ADDED if family == "qwen3_vl" else QWEN_ADDED
        tokenizer.add_special_tokens(list(QWEN_CONTROL))
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in added])
    return tokenizer


def word_merges(pre_tokenizer: pre_tokenizers.PreTokenizer) -> list[tuple[str, str]]:
    """The merges that make the words of our prompts, so that these are about as many tokens as in a real tokenizer."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=ALPHABET, show_progress=False)
    texts = [RUBRIC, CANDIDATE, COMPARISON, *QUESTIONS, "system", "user", "assistant", "You are a helpful assistant."]
    learner.train_from_iterator(texts * 2, trainer)     # a merge needs two sightings
    merges = json.loads(learner.to_str())["model"]["merges"]
    return [(a, b) for a, b in merges]


def fill_up(merges: list[tuple[str, str]], with_numbers: bool, entries: int) -> list[tuple[str, str]]:
    """The merges, then pairs of bytes, then as many triples as make a vocabulary of `entries`.

    `with_numbers`: all numbers of two and three digits are entries. Without, none is.
    """
    pairs = list(product(ALPHABET, ALPHABET))
    digits = "0123456789"
    more = [*pairs, *((a + b, c) for a, b, c in product(digits, digits, digits))]
    more += [(a + b, c) for (a, b), c in product(pairs[:1000], ALPHABET)]

    merges = list(merges)
    known = {a + b for a, b in merges}
    for a, b in more:
        is_number = (a + b).isascii() and (a + b).isdigit()
        if a + b in known or (is_number and not with_numbers):
            continue
        if len(ALPHABET) + len(merges) == entries:
            break
        known.add(a + b)
        merges.append((a, b))
    return merges


# ---- weights

def write_checkpoint(folder: Path, config: dict) -> Path:
    """Write the folder of a configuration."""
    folder.mkdir(parents=True)
    family = config["model_type"]
    if family == "mllama":
        generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "bos_token_id": 128000,
                      "pad_token_id": 128004, "eos_token_id": [128001, 128008, 128009]}
    else:
        generation = {"do_sample": True, "bos_token_id": 151643, "pad_token_id": 151643,
                      "eos_token_id": [151645, 151643]}
    files = {"config.json": config, "generation_config.json": generation,
             "preprocessor_config.json": PREPROCESSING[family]}
    for file_name, content in files.items():
        (folder / file_name).write_text(json.dumps(content, indent=2) + "\n")
    make_tokenizer(family).save(str(folder / "tokenizer.json"))

    with torch.device("meta"):
        vlm = FAMILIES[family](read_settings(folder, "config.json"))
    tied = not hasattr(vlm, "lm_head")
    shapes = {name: parameter.shape for name, parameter in vlm.named_parameters()}
    write_weights(folder, family, shapes, tied)
    return folder


def write_weights(folder: Path, family: str, shapes: dict[str, torch.Size], tied: bool) -> None:
    """Random bf16 weights in shards, one shard in memory at a time. Each tensor's name is the published one."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(POOL_SIZE, generator=generator)
    weight_map: dict[str, str] = {}
    shards = group_by_size(shapes)
    for number, names in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weights = {}
        for name in names:
            start = len(weight_map) * 1_000_003         # each tensor begins elsewhere in the pool
            weight_map[disk_name(family, name)] = file_name
            weights[disk_name(family, name)] = random_weight(name, shapes[name], tied, pool.roll(-start))
        save_file(weights, folder / file_name, metadata={"format": "pt"})
    total_size = sum(2 * shape.numel() for shape in shapes.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total_size}, "weight_map": weight_map}))


def group_by_size(shapes: dict[str, torch.Size]) -> list[list[str]]:
    """The tensors' names in shards of at most SHARD_BYTES."""
    shards: list[list[str]] = [[]]
    shard_bytes = 0
    for name, shape in shapes.items():
        size = 2 * shape.numel()
        if shards[-1] and shard_bytes + size > SHARD_BYTES:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += size
    return shards


def random_weight(name: str, shape: torch.Size, tied: bool, pool: Tensor) -> Tensor:
    """A random bf16 tensor: the numbers of `pool`, scaled and repeated as often as it takes."""
    offset, scale = offset_and_scale(name, shape, tied)
    random = (offset + scale * pool).bfloat16()
    repeats = math.ceil(shape.numel() / len(pool))
    return random.repeat(repeats)[:shape.numel()].view(shape)


def offset_and_scale(name: str, shape: torch.Size, tied: bool) -> tuple[float, float]:
    """The mean and the standard deviation of a random weight."""
    if name == "model.language_model.norm.weight":      # random signs, see the file's docstring
        return 0.0, LOGIT_SPREAD * (shape[0] ** -0.5 if tied else 1.0)
    if len(shape) == 1:
        is_norm = "norm" in name and name.endswith("weight")
        is_gate = shape[0] == 1
        return (1.0 if is_norm else 0.6 if is_gate else 0.0), 0.2
    if "embed_tokens" in name:
        return 0.0, 1.0
    if "pos_embed" in name or "positional_embedding" in name:
        return 0.0, 0.5
    fan_in = shape[1:].numel()
    return 0.0, fan_in ** -0.5 * (2.0 if name.endswith("q_proj.weight") else 1.0)


# ---- what a random model is taught to say

def teach(folder: Path, replies: Sequence[str]) -> None:
    """Edit the weights' files so that the model answers with one of `replies`, and stops (see the file's docstring).

    No model of the folder may be open: on a CPU its weights are the files themselves. What was taught before is
    forgotten.
    """
    config = read_settings(folder, "config.json")
    family = config["model_type"]
    following = bigrams(folder, family, replies)
    assert len(following) <= NEURONS

    files = tensor_files(folder)

    def tensor(name: str) -> Tensor:
        published = disk_name(family, name)
        return tensor_in_file(files[published], published)

    embedding = tensor("model.language_model.embed_tokens.weight")                        # (V, H)
    head_name = disk_name(family, "lm_head.weight")
    head = tensor("lm_head.weight") if head_name in files else embedding                  # (V, H)
    final_norm = tensor("model.language_model.norm.weight").float()                       # (H,)
    mlp = "model.language_model.layers.0.mlp"
    gate = tensor(f"{mlp}.gate_proj.weight")                                              # (I, H)
    up = tensor(f"{mlp}.up_proj.weight")                                                  # (I, H)
    down = tensor(f"{mlp}.down_proj.weight")                                              # (H, I)

    gate[:NEURONS] = 0
    up[:NEURONS] = 0
    down[:, :NEURONS] = 0
    for neuron, (token, successors) in enumerate(following.items()):
        own = embedding[token].float()                                                    # (H,)
        key = own / own.norm()
        directions = torch.nn.functional.normalize(head[sorted(successors)].float() * final_norm, dim=1)    # (s, H)
        # How far the sum of embedding and value must lie in each direction: as far in all of them.
        wanted = VALUE_SIZE * own.norm() / len(directions) ** 0.5 - directions @ own                        # (s,)
        value = torch.linalg.solve(directions @ directions.T, wanted) @ directions                          # (H,)

        # The MLP's input is normed: its product with the key is sqrt(H) where the residual stream is the embedding, and
        # about 1 elsewhere. Attention has added to the stream by then, so the product is less: about 0.8 of that.
        activation = 0.8 ** 2 * len(own)
        gate[neuron] = key.bfloat16()
        up[neuron] = key.bfloat16()
        down[:, neuron] = (value / activation).bfloat16()


def bigrams(folder: Path, family: str, replies: Sequence[str]) -> dict[int, set[int]]:
    """Which tokens follow each token in the replies; the prompt's last one comes before each, a stop token behind."""
    tokenizer = load_tokenizer(folder)
    before, stop = ("\n\n", "<|eot_id|>") if family == "mllama" else ("\n", "<|im_end|>")
    [start_id] = tokenizer.encode(before, add_special_tokens=False).ids
    following: dict[int, set[int]] = {}
    for reply in replies:
        ids = [start_id, *tokenizer.encode(reply, add_special_tokens=False).ids, tokenizer.token_to_id(stop)]
        for token, successor in pairwise(ids):
            following.setdefault(token, set()).add(successor)
    return following


def tensor_in_file(path: Path, name: str) -> Tensor:
    """A bf16 tensor of a safetensors file as its bytes on the disk: what is written into it stands in the file.

    The format: eight bytes, the length of a JSON header; the header, which says where each tensor lies; the tensors.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
    assert entry["dtype"] == "BF16"
    start, _ = entry["data_offsets"]
    levels = np.memmap(path, np.int16, "r+", offset=8 + length + start, shape=tuple(entry["shape"]))
    return torch.from_numpy(levels).view(torch.bfloat16)


# ---- pictures

def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Something like a photograph: soft shapes of all sizes, edges, and grain."""
    generator = np.random.RandomState(seed)
    levels = np.zeros((height, width, 3))
    for cells in (3, 8, 30, 100):                       # coarse shapes are strong, fine ones weak
        coarse = Image.fromarray(generator.randint(0, 256, (cells, cells, 3), np.uint8))
        soft = coarse.resize((width, height), Image.Resampling.BICUBIC)
        levels += np.asarray(soft, float) / cells ** 0.5
    levels -= levels.min()
    levels *= 230 / levels.max()
    levels[height // 3:, :width // 2] *= 0.6            # an edge: something dark stands in front
    levels += generator.normal(0, 6, levels.shape)
    image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
    return image.filter(ImageFilter.SHARPEN)

"""How the numbers of a model folder must fit together: within config.json, with the preprocessing, with the tokenizer.

A single field is checked when it is read (settings.py). What is here needs several of them, and runs before a tensor is
made: a folder that was put together wrongly, or to do harm, is a ValueError that names the file and the field.
"""
from __future__ import annotations

from typing import Any

from .settings import Settings, rope_settings

TOWER_PARTS = 4                                         # of a tower's head: two halves turn with rows, two with columns


# ---- the families' config.json

def check_qwen3_vl(text: Settings, vision: Settings) -> None:
    """The ranges of Qwen3-VL: its queries may be wider than the hidden state, its tower has a square table."""
    check_heads(text, text["head_dim"])
    mrope_counts(text)                                  # interleaved: what lies beyond a head's width is not used
    check_tower_heads(vision, "num_heads")

    positions = vision["num_position_embeddings"]
    if round(positions ** 0.5) ** 2 != positions:
        raise ValueError(f"{vision.source}: num_position_embeddings is {positions}, not a square")
    check_indexes(vision, "deepstack_visual_indexes", vision["depth"])


def check_qwen2_5_vl(text: Settings, vision: Settings) -> None:
    """The ranges of Qwen2.5-VL: heads divide the hidden state, a window holds a merged cell at least."""
    head_dim = head_width(text, "num_attention_heads")
    check_heads(text, head_dim)
    check_mrope(text, head_dim)
    check_tower_heads(vision, "num_heads")

    check_indexes(vision, "fullatt_block_indexes", vision["depth"])
    cell = vision["patch_size"] * vision["spatial_merge_size"]
    if vision["window_size"] < cell:
        raise ValueError(f"{vision.source}: window_size is {vision['window_size']}, less than a cell of {cell} pixels")


def check_mllama(text: Settings, vision: Settings) -> None:
    """The ranges of Llama-3.2-Vision, whose layers and tiles are named by lists."""
    check_heads(text, head_width(text, "num_attention_heads"))
    check_llama3(text)
    check_indexes(text, "cross_attention_layers", text["num_hidden_layers"])

    newer_name = "attention_heads" not in vision and "num_attention_heads" in vision
    head_width(vision, "num_attention_heads" if newer_name else "attention_heads")
    taps = check_indexes(vision, "intermediate_layers_indices", vision["num_hidden_layers"])
    if not taps:
        raise ValueError(f"{vision.source}: intermediate_layers_indices names no layer")
    if vision["image_size"] < vision["patch_size"]:
        raise ValueError(f"{vision.source}: image_size is {vision['image_size']}, less than patch_size, "
                         f"{vision['patch_size']}")
    check_arrangements(vision)


# ---- parts of it

def head_width(settings: Settings, heads_name: str) -> int:
    """The width of a head: hidden_size / heads. ValueError where that is no whole number."""
    heads = settings[heads_name]
    hidden = settings["hidden_size"]
    if hidden % heads:
        raise ValueError(f"{settings.source}: hidden_size is {hidden}, which {heads_name}, {heads}, does not divide")
    return hidden // heads


def check_heads(text: Settings, head_dim: int) -> None:
    """Key-value heads serve equally many query heads each, and rotary positions turn the halves of a head."""
    heads = text["num_attention_heads"]
    kv_heads = text["num_key_value_heads"]
    if heads % kv_heads:
        raise ValueError(f"{text.source}: num_attention_heads is {heads}, which num_key_value_heads, {kv_heads}, does "
                         "not divide")
    if head_dim % 2:
        raise ValueError(f"{text.source}: a head is {head_dim} wide; rotary positions need an even width")
    text["rms_norm_eps"]                                # reading it is checking it, here and below


def check_tower_heads(vision: Settings, heads_name: str) -> None:
    """A tower's head has a quarter of its width for each half of rows and of columns."""
    head_dim = head_width(vision, heads_name)
    if head_dim % TOWER_PARTS:
        raise ValueError(f"{vision.source}: a head of the tower is {head_dim} wide, no multiple of {TOWER_PARTS}")


def check_mrope(text: Settings, head_dim: int) -> None:
    """In sections, mrope_section shares all of a head's frequencies out among time, height and width."""
    section = mrope_counts(text)
    if sum(section) != head_dim // 2:
        raise ValueError(f"{text.source}: mrope_section is {section!r:.80}, whose sum is not half of a head's width, "
                         f"{head_dim // 2}")


def mrope_counts(text: Settings) -> list[int]:
    """mrope_section: how many frequencies turn with time, with height and with width."""
    _, scaling = rope_settings(text)
    section: list[int] = scaling["mrope_section"]
    whole = all(type(count) is int and count >= 0 for count in section)
    if len(section) != 3 or not whole:
        raise ValueError(f"{text.source}: mrope_section is {section!r:.80}, not three counts")
    return section


def check_llama3(text: Settings) -> None:
    """Llama 3.1's frequencies are mixed between two bounds, which must differ."""
    _, scaling = rope_settings(text)
    if scaling["rope_type"] != "llama3":
        return
    scaling["factor"]
    scaling["original_max_position_embeddings"]
    if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError(f"{text.source}: low_freq_factor is {scaling['low_freq_factor']}, not below high_freq_factor, "
                         f"{scaling['high_freq_factor']}")


def check_indexes(settings: Settings, name: str, layers: int) -> list[int]:
    """The field: a list of different layers, counted from 0, of which there are `layers`."""
    indexes = settings[name]
    for index in indexes:
        if type(index) is not int or not 0 <= index < layers:
            raise ValueError(f"{settings.source}: {name} holds {index!r:.80}, and there are layers 0 to {layers - 1}")
    if len(set(indexes)) < len(indexes):
        raise ValueError(f"{settings.source}: {name} is {indexes!r:.80}, which names a layer twice")
    return indexes


def check_arrangements(vision: Settings) -> None:
    """supported_aspect_ratios are different pairs [rows, columns] of tiles; every one of that many tiles is there."""
    tiles = vision["max_num_tiles"]
    allowed = []
    for rows in range(1, tiles + 1):
        for columns in range(1, tiles // rows + 1):
            allowed.append([rows, columns])

    ratios = vision["supported_aspect_ratios"]
    for ratio in ratios:
        if ratio not in allowed:
            raise ValueError(f"{vision.source}: supported_aspect_ratios holds {ratio!r:.80}, not rows and columns of "
                             f"at most {tiles} tiles")
    for arrangement in allowed:
        if ratios.count(arrangement) != 1:
            raise ValueError(f"{vision.source}: supported_aspect_ratios must hold {arrangement} once, for there may be "
                             f"{tiles} tiles")


# ---- config.json and the other files

def check_preprocessing(preprocessing: Settings, vision: Settings, names: dict[str, str]) -> None:
    """ValueError where pictures are cut otherwise than the tower takes them.

    `names`: the preprocessing's field -> the tower's. The two files were published together.
    """
    for name, tower_name in names.items():
        cut = preprocessing[name]
        taken = vision[tower_name]
        if cut != taken:
            raise ValueError(f"{preprocessing.source}: {name} is {cut}, and {vision.source} has {tower_name} {taken}; "
                             "these are not one model's files")


def check_token_ids(rows: int, ids: dict[str, int]) -> None:
    """ValueError for an id beyond the embedding of that many rows. `ids`: what a message calls it -> the id."""
    for name, number in ids.items():
        if number >= rows:
            raise ValueError(f"{name} is {number}, and the model's embedding has {rows} rows: the files are not one "
                             "model's")


def check_placeholder(tokenizer: Any, number: int, name: str) -> None:
    """ValueError for the id of a placeholder, of config.json's field `name`, that a text can hold: a question with that
    word would be taken for one with a picture."""
    text = tokenizer.decode([number], skip_special_tokens=False)
    if text and tokenizer.encode(text, add_special_tokens=False).ids == [number]:
        raise ValueError(f"config.json: {name} is {number}, which is what the tokenizer makes of the text {text!r:.80}")

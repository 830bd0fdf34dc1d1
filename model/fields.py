"""Which fields of config.json a family reads, which it computes for one value only, and which change nothing.

Files are written by others, and those of tomorrow hold fields that we have not seen. A field that asks for another
computation than ours (a sliding window, another activation) must not be passed over: each family has a table of the
values that it computes, and any other value is an error. A field that stands in no table is named in a warning.
"""
from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from .settings import Settings, rope_of_all_layers

READ: tuple[Any, ...] = ()                              # in a table: the family takes the field as it is
ABSENT = None                                           # among the values: the field may be missing, or null
Table = dict[str, tuple[Any, ...]]                      # field -> the values that are computed, or READ

# Fields that say how a file came to be, how a model is trained or sampled from, or what a video is. No family needs
# them. Older versions of transformers write all that a model of any kind may have.
HARMLESS = frozenset("""
    _attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention architectures attention_dropout
    attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dropout dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id hidden_dropout id2label initializer_factor initializer_range is_decoder is_encoder_decoder
    label2id length_penalty max_length max_position_embeddings max_window_layers min_length model_type
    no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences original_max_position_embeddings
    output_attentions output_hidden_states output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class tokens_per_second top_k top_p
    torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache video_token_id
    vision_end_token_id vision_start_token_id vision_token_id""".split())

# Of the language model of every family.
TEXT: Table = {
    "hidden_act": ("silu",),
    "mlp_bias": (ABSENT, False),
    "use_sliding_window": (ABSENT, False),
    "hidden_size": READ,
    "intermediate_size": READ,
    "num_attention_heads": READ,
    "num_hidden_layers": READ,
    "num_key_value_heads": READ,
    "rms_norm_eps": READ,
    "rope_parameters": READ,                            # settings.rope_settings reads these three
    "rope_scaling": READ,
    "rope_theta": READ,
    "vocab_size": READ,
}

# Of the whole file, for every family.
TOP: Table = {
    "quantization_config": (ABSENT,),
    "text_config": READ,
    "vision_config": READ,
}

# Of the tower of every family.
VISION: Table = {
    "hidden_size": READ,
    "intermediate_size": READ,
    "patch_size": READ,
    "rope_parameters": READ,
    "tie_word_embeddings": READ,                        # written by some versions; there is no head to be tied
}

# The tower's rotary positions in newer files: Qwen's constants of the architecture.
QWEN_VISION_ROPE: Table = {
    "rope_type": (ABSENT, "axial", "default"),
    "rope_theta": (ABSENT, 10000),
    "partial_rotary_factor": (ABSENT, 1),
}


def qwen_rope(interleaved: bool) -> Table:
    """The language model's rotary positions in Qwen's generations; `interleaved`: how M-RoPE lays out its axes."""
    return {
        "rope_type": (ABSENT, "default", "mrope"),
        "type": (ABSENT, "default", "mrope"),
        "factor": (ABSENT, 1),
        "attention_factor": (ABSENT, 1),
        "partial_rotary_factor": (ABSENT, 1),
        "mrope_interleaved": (ABSENT, interleaved),
        "mrope_section": READ,
        "rope_theta": READ,
    }


@dataclass(frozen=True)
class Known:
    """A family's tables, by the parts of config.json. In a flat file the text's fields stand at the top."""
    top: Table
    text: Table
    vision: Table
    rope: Table                                         # rope_parameters or rope_scaling of the text
    vision_rope: Table                                  # rope_parameters of the tower


def text_settings(config: Settings) -> Settings:
    """The language model's fields: an object of their own, or, in flat files, the whole file."""
    if config.get("text_config") is None and "hidden_size" in config:
        return config
    return config["text_config"]


def plain_attention(text: Settings) -> Table:
    """Every layer attends to all tokens before it. A window that is switched off may still have a width."""
    layers = text["num_hidden_layers"]
    switched_off = text.get("use_sliding_window") is False
    return {
        "layer_types": (ABSENT, ["full_attention"] * layers),
        "sliding_window": READ if switched_off else (ABSENT,),
    }


def check_fields(settings: Settings, place: str, table: Table) -> list[str]:
    """ValueError for a field whose value asks for another computation than ours. Returns the unknown fields' names.

    `place` stands before a field's name in messages: where in the file `settings` stands, "vision_config.".
    """
    for field, values in table.items():
        may_be_absent = values is READ or ABSENT in values
        if may_be_absent and settings.get(field) is None:
            continue
        value = settings[field]                         # ValueError if it is missing
        if values is not READ and value not in values:
            computed = [known for known in values if known is not ABSENT]
            only = " or ".join(repr(known)[:80] for known in computed) or "without it"
            raise ValueError(f"{settings.source}: {place}{field} is {value!r:.80}; it is computed here as {only} only")
    unknown = settings.keys() - table.keys() - HARMLESS
    return [place + field for field in sorted(unknown)]


def check_config(config: Settings, known: Known) -> None:
    """Check a whole config.json by a family's tables; warn of what is unknown, all of it at once."""
    text = text_settings(config)
    if text is config:                                  # a flat file
        place = ""
        unknown = check_fields(config, "", {**known.text, **known.top})
    else:                                               # some files hold a copy of the text's fields at the top, too
        place = "text_config."
        unknown = check_fields(config, "", {**as_read(known.text), **known.top})
        unknown += check_fields(text, place, known.text)

    vision = config["vision_config"]
    unknown += check_fields(vision, "vision_config.", known.vision)

    rope_name = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
    unknown += check_fields(rope_of_all_layers(text), f"{place}{rope_name}.", known.rope)
    vision_rope = vision.get("rope_parameters")
    if vision_rope is not None:
        unknown += check_fields(vision_rope, "vision_config.rope_parameters.", known.vision_rope)

    if unknown:
        names = ", ".join(unknown)[:400]                # foreign files may hold hundreds
        warnings.warn(f"{config.source}: fields that are not known here, and have no effect: {names}", stacklevel=2)


def as_read(table: Table) -> Table:
    """The same fields, whatever they hold."""
    return dict.fromkeys(table, READ)

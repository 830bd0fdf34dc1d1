"""The six published configurations, as their config.json files have them, and their parameter counts."""
from __future__ import annotations

QWEN_IDS = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652,
            "vision_end_token_id": 151653}


def qwen3_vl(hidden: int, layers: int, heads: int, intermediate: int, tied: bool, vision: dict) -> dict:
    """Qwen3-VL dense."""
    text = {"model_type": "qwen3_vl_text", "hidden_size": hidden, "num_hidden_layers": layers, "head_dim": 128,
            "num_attention_heads": heads, "num_key_value_heads": 8, "intermediate_size": intermediate,
            "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 5000000, "hidden_act": "silu",
            "attention_bias": False, "max_position_embeddings": 262144, "tie_word_embeddings": tied,
            "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}}
    vision = {"model_type": "qwen3_vl", "num_heads": 16, "hidden_act": "gelu_pytorch_tanh", "out_hidden_size": hidden,
              "in_channels": 3, "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2,
              "num_position_embeddings": 2304, **vision}
    return {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"], **QWEN_IDS,
            "text_config": text, "vision_config": vision, "tie_word_embeddings": tied}


def qwen2_5_vl(hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int,
               tied: bool) -> dict:
    """Qwen2.5-VL: flat."""
    vision = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "hidden_act": "silu",
              "out_hidden_size": hidden, "in_chans": 3, "patch_size": 14, "spatial_patch_size": 14,
              "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 112, "tokens_per_second": 2,
              "fullatt_block_indexes": [7, 15, 23, 31]}
    return {"model_type": "qwen2_5_vl", "architectures": ["Qwen2_5_VLForConditionalGeneration"], **QWEN_IDS,
            "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "intermediate_size": intermediate, "vocab_size": vocabulary,
            "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu", "use_sliding_window": False,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "max_position_embeddings": 128000,
            "tie_word_embeddings": tied, "vision_config": vision}


def mllama() -> dict:
    """Llama-3.2-11B-Vision."""
    text = {"model_type": "mllama_text_model", "hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32,
            "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "rms_norm_eps": 1e-5,
            "hidden_act": "silu", "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38], "rope_theta": 500000.0,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                             "original_max_position_embeddings": 8192},
            "max_position_embeddings": 131072, "tie_word_embeddings": False, "bos_token_id": 128000,
            "pad_token_id": 128004, "eos_token_id": [128001, 128008, 128009]}
    vision = {"model_type": "mllama_vision_model", "hidden_size": 1280, "attention_heads": 16, "num_hidden_layers": 32,
              "num_global_layers": 8, "intermediate_size": 5120, "hidden_act": "gelu", "norm_eps": 1e-5,
              "image_size": 560, "patch_size": 14, "num_channels": 3, "max_num_tiles": 4, "vision_output_dim": 7680,
              "intermediate_layers_indices": [3, 7, 15, 23, 30],
              "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]}
    return {"model_type": "mllama", "architectures": ["MllamaForConditionalGeneration"], "text_config": text,
            "vision_config": vision, "image_token_index": 128256}


SMALL = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
LARGE = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
CONFIGS = {
    "Qwen3-VL-2B": qwen3_vl(2048, 28, 16, 6144, True, SMALL),
    "Qwen3-VL-4B": qwen3_vl(2560, 36, 32, 9728, True, SMALL),
    "Qwen3-VL-8B": qwen3_vl(4096, 36, 32, 12288, False, LARGE),
    "Qwen2.5-VL-3B": qwen2_5_vl(2048, 36, 16, 2, 11008, 151936, True),
    "Qwen2.5-VL-7B": qwen2_5_vl(3584, 28, 28, 4, 18944, 152064, False),
    "Llama-3.2-11B-Vision": mllama(),
}
PARAMETERS = {"Qwen3-VL-2B": 2_127_532_032, "Qwen3-VL-4B": 4_437_815_808, "Qwen3-VL-8B": 8_767_123_696,
              "Qwen2.5-VL-3B": 3_754_622_976, "Qwen2.5-VL-7B": 8_292_166_656, "Llama-3.2-11B-Vision": 10_670_220_835}
TENSORS = {"Qwen3-VL-2B": 625, "Qwen3-VL-4B": 713, "Qwen3-VL-8B": 750, "Qwen2.5-VL-3B": 824, "Qwen2.5-VL-7B": 729,
           "Llama-3.2-11B-Vision": 906}

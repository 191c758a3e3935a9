"""transformers' networks of the table in docs/networks.md, with random weights and two layers.

The library is not imported before a network is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from zoo_vision import Entry

NETWORKS: dict[str, Entry] = {}
WORDS, LENGTH = 120, 16


def _made(model: str, config: str, sizes: Mapping[str, Any]) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    return getattr(transformers, model)(_config(config, sizes))  # type: ignore[no-any-return]


def _config(name: str, sizes: Mapping[str, Any]) -> Any:
    """A configuration; a size that is a pair (name, sizes) is one of its own."""
    import transformers

    parts = {key: _config(*value) if _is_config(value) else value for key, value in sizes.items()}
    return getattr(transformers, name)(**parts)


def _is_config(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict)


def _add(name: str, model: str, example: Callable[[], Any], config: str = "", **sizes: Any) -> None:
    family = model.partition("For")[0].removesuffix("LMHeadModel").removesuffix("MTModel").removesuffix("Model")
    build = partial(_made, model, config or f"{family}Config", sizes)
    NETWORKS[f"transformers/{name}"] = Entry(build, example)


# ---- what they are called with


def _ids(length: int = LENGTH) -> torch.Tensor:
    return torch.randint(5, WORDS, (1, length))


def _ids_alone() -> dict[str, Any]:
    return {"input_ids": _ids()}


def _text() -> dict[str, Any]:
    return {"input_ids": _ids(), "attention_mask": torch.ones(1, LENGTH, dtype=torch.long)}


def _pair() -> dict[str, Any]:
    return {"input_ids": _ids(), "decoder_input_ids": _ids(8)}


def _boxed() -> dict[str, Any]:
    return {"input_ids": _ids(), "bbox": torch.randint(0, 20, (1, LENGTH, 4)).sort(-1).values}


def _speech() -> dict[str, Any]:
    return {"input_features": torch.randn(1, 16, 32), "decoder_input_ids": _ids(8)}


def _waves() -> dict[str, Any]:
    return {"input_values": torch.randn(1, 800)}


def _spectrum() -> dict[str, Any]:
    return {"input_values": torch.randn(1, 64, 32)}


def _picture(size: int = 64) -> dict[str, Any]:
    return {"pixel_values": torch.randn(1, 3, size, size)}


def _film() -> dict[str, Any]:
    return {"pixel_values": torch.randn(1, 4, 3, 64, 64)}


def _captioned() -> dict[str, Any]:
    return _ids_alone() | _picture()


def _pointed() -> dict[str, Any]:
    return _picture() | {"input_points": torch.tensor([[[[10.0, 10.0]]]])}


# ---- encoders of text

TEXT: dict[str, Any] = {
    **{"vocab_size": WORDS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 128, "max_position_embeddings": 64},
}
for _name in ("Bert", "Roberta", "Camembert", "XLMRoberta", "Electra", "MPNet", "Deberta", "Ernie"):
    _add(_name.lower(), f"{_name}ForSequenceClassification", _text, **TEXT, pad_token_id=0)
_add("esm", "EsmForSequenceClassification", _text, **TEXT, pad_token_id=1)
_add("bert, masked words", "BertForMaskedLM", _text, **TEXT)
_add("bert, no head", "BertModel", _text, **TEXT)
_RELATIVE = {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
_RELATIVE |= {"norm_rel_ebd": "layer_norm", "max_relative_positions": -1, "position_biased_input": False}
_add("deberta_v2", "DebertaV2ForSequenceClassification", _text, **TEXT, **_RELATIVE)
_add("albert", "AlbertForSequenceClassification", _text, **TEXT, embedding_size=32)
_DISTIL = {
    "vocab_size": WORDS,
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 128,
    "max_position_embeddings": 64,
}
_add("distilbert", "DistilBertForSequenceClassification", _text, **_DISTIL)
_XLNET = {"vocab_size": WORDS, "d_model": 64, "n_head": 4, "d_inner": 128}
_add("xlnet", "XLNetForSequenceClassification", _text, **_XLNET, n_layer=2)
_add("funnel", "FunnelForSequenceClassification", _text, **_XLNET, d_head=16, block_sizes=[1, 1], num_decoder_layers=1)
_add("longformer", "LongformerForSequenceClassification", _text, **TEXT, attention_window=8)
_LOCAL = {"pad_token_id": 0, "global_attn_every_n_layers": 2, "local_attention": 8}
_add("modernbert", "ModernBertForSequenceClassification", _text, **TEXT, **_LOCAL)
_BOXES = {"max_2d_position_embeddings": 128, "coordinate_size": 10, "shape_size": 12, "visual_embed": False}
_add("layoutlmv3", "LayoutLMv3ForSequenceClassification", _boxed, **TEXT, **_BOXES)

# ---- decoders

DECODER: dict[str, Any] = TEXT | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GPT2 = {"vocab_size": WORDS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_add("gpt2", "GPT2LMHeadModel", _ids_alone, **_GPT2)
_add("gptj", "GPTJForCausalLM", _ids_alone, **_GPT2, rotary_dim=8)
_NEO = {"vocab_size": WORDS, "hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 128}
_NEO |= {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64}
_add("gpt_neo", "GPTNeoForCausalLM", _ids_alone, **_NEO)
_add("gpt_neox (pythia)", "GPTNeoXForCausalLM", _ids_alone, **TEXT)
_OPT = {"vocab_size": WORDS, "hidden_size": 64, "num_hidden_layers": 2, "ffn_dim": 128, "num_attention_heads": 4}
_add("opt", "OPTForCausalLM", _ids_alone, **_OPT, max_position_embeddings=64, word_embed_proj_dim=64, pad_token_id=0)
_add("bloom", "BloomForCausalLM", _ids_alone, vocab_size=WORDS, hidden_size=64, n_layer=2, n_head=4)
_FALCON = {"vocab_size": WORDS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_add("falcon", "FalconForCausalLM", _ids_alone, **_FALCON)
for _name in ("Llama", "Qwen2", "SmolLM3", "Olmo2", "Granite", "Cohere", "StableLm", "Phi3"):
    _add(_name.lower(), f"{_name}ForCausalLM", _ids_alone, **DECODER)
for _name in ("Qwen3", "Gemma", "Gemma2", "Glm"):
    _add(_name.lower(), f"{_name}ForCausalLM", _ids_alone, **DECODER, head_dim=16)
_add("gemma3", "Gemma3ForCausalLM", _ids_alone, "Gemma3TextConfig", **DECODER, head_dim=16)
_add("mistral", "MistralForCausalLM", _ids_alone, **DECODER, sliding_window=8)
_add("phi", "PhiForCausalLM", _ids_alone, **DECODER | {"num_key_value_heads": 4})
_add("llama, classes", "LlamaForSequenceClassification", _ids_alone, **DECODER)
_EXPERTS = {"head_dim": 16, "num_experts_per_tok": 2}
_add("qwen3_moe", "Qwen3MoeForCausalLM", _ids_alone, **DECODER, **_EXPERTS, num_experts=4, moe_intermediate_size=64)
_add("mixtral", "MixtralForCausalLM", _ids_alone, **DECODER, num_local_experts=4)
_add("gpt_oss", "GptOssForCausalLM", _ids_alone, **DECODER, **_EXPERTS, num_local_experts=4)
_LATENT = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
_LATENT |= {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
_LATENT |= {"first_k_dense_replace": 1, "num_key_value_heads": 4}
_add("deepseek_v3", "DeepseekV3ForCausalLM", _ids_alone, **TEXT | _LATENT)
_MAMBA = {"vocab_size": WORDS, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
_add("mamba", "MambaForCausalLM", _ids_alone, **_MAMBA)
_add("mamba2", "Mamba2ForCausalLM", _ids_alone, **_MAMBA, num_heads=8, head_dim=16, n_groups=2, chunk_size=8)
_TROCR = {"vocab_size": WORDS, "d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4}
_TROCR |= {"decoder_ffn_dim": 128, "max_position_embeddings": 64, "cross_attention_hidden_size": None}
_add("trocr, decoder", "TrOCRForCausalLM", _ids_alone, **_TROCR)

# ---- from one sequence to another

_T5 = {"vocab_size": WORDS, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
_add("t5", "T5ForConditionalGeneration", _pair, **_T5, decoder_start_token_id=0)
_add("mt5 (gated)", "MT5ForConditionalGeneration", _pair, **_T5, decoder_start_token_id=0)
_BOTH: dict[str, Any] = {"d_model": 64}
for _side in ("encoder", "decoder"):
    _BOTH |= {f"{_side}_layers": 2, f"{_side}_attention_heads": 4, f"{_side}_ffn_dim": 128}
_BART = _BOTH | {"vocab_size": WORDS, "max_position_embeddings": 64}
_add("bart", "BartForConditionalGeneration", _pair, **_BART)
_add("marian", "MarianMTModel", _pair, **_BART, pad_token_id=0, decoder_start_token_id=0)
_add("pegasus", "PegasusForConditionalGeneration", _pair, **_BART)
_WHISPER = {"max_source_positions": 16, "max_target_positions": 32, "num_mel_bins": 16, "pad_token_id": 0}
_WHISPER |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "vocab_size": WORDS}
_WHISPER |= {"suppress_tokens": None, "begin_suppress_tokens": None}
_add("whisper", "WhisperForConditionalGeneration", _speech, **_BOTH, **_WHISPER)

# ---- sound

SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_SOUND = {"conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 16}
_SOUND |= {"num_conv_pos_embedding_groups": 4, "vocab_size": 32, "mask_time_prob": 0.0}
for _name in ("Wav2Vec2", "Hubert", "WavLM"):
    _add(_name.lower(), f"{_name}ForSequenceClassification", _waves, **SIZES, **_SOUND)
_add("ast", "ASTForAudioClassification", _spectrum, **SIZES, max_length=64, num_mel_bins=32)

# ---- pictures, and pictures with text

SEEN: dict[str, Any] = SIZES | {"image_size": 64, "patch_size": 16}
_WORDS = TEXT | {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
_add("clip", "CLIPModel", _captioned, text_config=_WORDS, vision_config=SEEN, projection_dim=32)
_add("siglip", "SiglipModel", _captioned, text_config=_WORDS, vision_config=SEEN)
_BLIP = {"text_config": _WORDS | {"encoder_hidden_size": 64, "projection_dim": 32}, "vision_config": SEEN}
_add("blip", "BlipForImageTextRetrieval", _captioned, **_BLIP, projection_dim=32, image_text_hidden_size=32)
for _name in ("ViT", "DeiT", "Beit"):
    _add(_name.lower(), f"{_name}ForImageClassification", _picture, **SEEN)
_add("dinov2", "Dinov2ForImageClassification", _picture, **{k: v for k, v in SEEN.items() if k != "intermediate_size"})
_MAE = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4}
_add("vit_mae", "ViTMAEForPreTraining", _picture, **SEEN, **_MAE, decoder_intermediate_size=64)
_add("videomae", "VideoMAEForVideoClassification", _film, **SEEN, num_frames=4)
_SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_add("swin", "SwinForImageClassification", _picture, **_SWIN)
_add("swinv2", "Swinv2ForImageClassification", _picture, **_SWIN)
_STAGES: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 96]}
_SEGMENTS = {"num_attention_heads": [1, 2, 4, 4], "decoder_hidden_size": 64}
_add("segformer", "SegformerForSemanticSegmentation", _picture, **_STAGES, **_SEGMENTS)
_add("resnet", "ResNetForImageClassification", _picture, **_STAGES, embedding_size=16)
_add("convnext", "ConvNextForImageClassification", _picture, **_STAGES)
_MOBILE = {"image_size": 64, "hidden_sizes": [32, 48, 64], "neck_hidden_sizes": [8, 16, 24, 32, 48, 64, 96]}
_add("mobilevit", "MobileViTForImageClassification", _picture, **_MOBILE)
_DPT = {"backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [16, 32, 48, 64], "fusion_hidden_size": 32}
_add("dpt", "DPTForDepthEstimation", _picture, **SEEN | _DPT | {"num_hidden_layers": 4})
_BACKBONE = ("ResNetConfig", _STAGES | {"embedding_size": 16, "out_features": ["stage4"]})
_DETR = {"use_timm_backbone": False, "backbone": None, "backbone_config": _BACKBONE, "num_queries": 10}
_add("detr", "DetrForObjectDetection", partial(_picture, 96), **_BOTH, **_DETR)
_add("yolos", "YolosForObjectDetection", _picture, **SEEN | {"image_size": [64, 64], "num_detection_tokens": 10})
_RT = {
    "backbone_config": (
        "RTDetrResNetConfig",
        _STAGES | {"embedding_size": 16, "out_features": [f"stage{i}" for i in (2, 3, 4)]},
    )
}
_RT |= {"encoder_in_channels": [32, 64, 96], "encoder_hidden_dim": 32, "feat_strides": [8, 16, 32], "d_model": 32}
_RT |= {"encoder_ffn_dim": 64, "encoder_attention_heads": 4, "num_queries": 10, "decoder_in_channels": [32, 32, 32]}
_RT |= {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64, "num_denoising": 0}
_add("rt_detr", "RTDetrForObjectDetection", partial(_picture, 128), **_RT)
_SAM: dict[str, Any] = {
    "vision_config": {
        **{"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"image_size": 64, "patch_size": 16, "window_size": 2, "global_attn_indexes": [1], "num_pos_feats": 8},
    },
    "prompt_encoder_config": {"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 8},
    "mask_decoder_config": {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
}
_add("sam", "SamModel", _pointed, **_SAM)

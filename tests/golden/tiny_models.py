"""Small causal language models with random weights, as folders that an engine loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

BYTES = 256  # the tokens, and the special ones behind them
VOCABULARY = 260
CONTEXT = 256
WINDOW = 24  # shorter than most sequences of the tests

# The spread makes the two best logits differ by much more than rounding does.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": BYTES,
    "eos_token_id": BYTES + 1,
    "pad_token_id": BYTES + 2,
    "initializer_range": 0.3,
}
_BASE = _COMMON | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
_GROUPED = _BASE | {"num_key_value_heads": 2}
_GPT = _COMMON | {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT}
_HYBRID = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


def _scaled(rope_type: str, **parameters: float) -> dict[str, Any]:
    return {
        "rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0, **parameters},
    }


_LLAMA3 = _scaled("llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)

# Name of a test case: transformers' name of the architecture, and its configuration.
FUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _BASE | {"num_key_value_heads": 4}),
    "llama-grouped-llama3": ("Llama", _GROUPED | _LLAMA3),
    "llama-yarn": ("Llama", _GROUPED | _scaled("yarn", original_max_position_embeddings=64)),
    "llama-linear-tied-bias": (
        "Llama",
        _GROUPED | _scaled("linear") | {"tie_word_embeddings": True, "attention_bias": True},
    ),
    "qwen2": ("Qwen2", _GROUPED),
    "qwen2-hybrid": (
        "Qwen2",
        _GROUPED | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", _GROUPED | {"head_dim": 32}),
    "mistral-window": ("Mistral", _GROUPED | {"sliding_window": WINDOW}),
}
STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-dynamic": ("Llama", _GROUPED | _scaled("dynamic")),
    "gemma": ("Gemma", _BASE | {"num_key_value_heads": 1, "head_dim": 16}),
    "gemma2": ("Gemma2", _GROUPED | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}),
    "gemma3": ("Gemma3Text", _GROUPED | _HYBRID | {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "gpt2": ("GPT2", _GPT),
    "phi": ("Phi", _BASE),
    "phi3-window": ("Phi3", _GROUPED | {"sliding_window": WINDOW}),
    "mixtral-experts": ("Mixtral", _GROUPED | {"num_local_experts": 4}),
    "gpt-neox": ("GPTNeoX", _BASE),
    "opt": (
        "OPT",
        _COMMON
        | {
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
            "init_std": 0.3,
            "word_embed_proj_dim": 64,
        },
    ),
    "deepseek-latent": (
        "DeepseekV3",
        _BASE
        | {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
        },
    ),
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", _COMMON | {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}),
    "jamba": ("Jamba", _GROUPED | {"num_experts": 2, "use_mamba_kernels": False}),
    "bloom": ("Bloom", _COMMON | {"hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "gpt1": ("OpenAIGPT", _GPT),
    "gpt-neo-local": (
        "GPTNeo",
        _COMMON
        | {
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
        },
    ),
    "bert-encoder": ("Bert", _BASE),
    "llama4-chunks": (
        "Llama4Text",
        _GROUPED | {"intermediate_size_mlp": 96, "num_local_experts": 2, "attention_chunk_size": WINDOW},
    ),
    "t5": ("T5", {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_heads": 4}),
    "phi3-longrope": (
        "Phi3",
        _GROUPED
        | {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
                "original_max_position_embeddings": 64,
                "factor": 4.0,
            },
        },
    ),
}


def save(folder: Path, case: tuple[str, dict[str, Any]]) -> PreTrainedModel:
    """Write the model and a tokenizer to ``folder``; the model, ready to answer."""
    architecture, options = case
    config = getattr(transformers, f"{architecture}Config")(**options)
    auto = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(config).eval()
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return model


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )

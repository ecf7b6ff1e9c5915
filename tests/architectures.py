"""Tiny random models of every architecture that the tests compare, and text for them."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from localist_hf import localize


LENGTH, LAYERS, WINDOW, VOCABULARY = 66, 4, 20, 64

_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Rounding in float32 grows with the scores: with these it is about half of the 1e-5 that the comparisons allow, with
# AVX2 and without.
_GROUPED = {**_BASE, "initializer_range": 0.22, "intermediate_size": 48, "num_key_value_heads": 2}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}

ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "gpt2": lambda: GPT2Config(**_BASE, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
    "gpt_neox": lambda: GPTNeoXConfig(
        **_BASE, intermediate_size=48, rope_parameters={**_ROTARY, "partial_rotary_factor": 0.5}
    ),
    "opt": lambda: OPTConfig(**_BASE, init_std=0.3, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
    "llama": lambda: LlamaConfig(**_GROUPED),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=WINDOW),
    "qwen2": lambda: Qwen2Config(**_GROUPED),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=16),
    "smollm3": lambda: SmolLM3Config(**_GROUPED, no_rope_layers=[1, 1, 0, 1]),
    "gemma2": lambda: Gemma2Config(
        **_GROUPED,
        head_dim=16,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=4.0,
        sliding_window=WINDOW,
        layer_types=_ALTERNATING,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_GROUPED, head_dim=16, query_pre_attn_scalar=16, sliding_window=WINDOW, layer_types=_ALTERNATING
    ),
    "phi3": lambda: Phi3Config(**_GROUPED),
    "olmo2": lambda: Olmo2Config(**_GROUPED),
    "granite": lambda: GraniteConfig(**_GROUPED, attention_multiplier=0.25),
    "gpt_oss": lambda: GptOssConfig(
        **_GROUPED,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=WINDOW,
        layer_types=_ALTERNATING,
        rope_parameters=_ROTARY,
    ),
    # Values shorter than keys.
    "deepseek_v3": lambda: DeepseekV3Config(
        **{**_GROUPED, "num_key_value_heads": 4},
        first_k_dense_replace=LAYERS,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=12,
        rope_parameters=_ROTARY,
    ),
}
# Layers that see no more than so many keys.
SLIDING = {"mistral": range(LAYERS), "gemma2": (0, 2), "gemma3": (0, 2), "gpt_oss": (0, 2)}

# One full row of each batch, and one with padding.
PADDING = {"none": (0, 0), "left": (9, 0), "right": (0, 11)}

SETTINGS = {
    "locality_schedule": "linear",
    "min_block_length": 3,
    "max_block_length": 12,
    "num_sink_tokens": 1,
}

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@functools.cache
def untouched(architecture: str) -> PreTrainedModel:
    """The native model, random, as its class is used by default; not to be changed."""
    torch.manual_seed(0)
    # Before transformers 5.23 `sdpa`, which has no soft-capping, is the default of those that cap their scores too.
    attention = "eager" if architecture == "gemma2" else None
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture](), attn_implementation=attention).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            if name.endswith("q_norm.weight"):  # normalised queries and keys would attend evenly
                parameter += 1
        model.get_output_embeddings().weight *= 0.3  # logits of the size of 1, as 1e-5 is meant
    return model


def localised(architecture: str, **settings) -> PreTrainedModel:
    """A localised copy of it."""
    return localize(copy.deepcopy(untouched(architecture)), **{**SETTINGS, **settings})


def text(layout: str = "none", seed: int = 1, batch_size: int = 2) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Token ids `(batch_size, LENGTH)` and their attention mask."""
    ids = torch.randint(3, VOCABULARY, (batch_size, LENGTH), generator=torch.manual_seed(seed))
    left, right = PADDING[layout]
    mask = torch.ones_like(ids)
    mask[0, :left] = 0
    mask[0, LENGTH - right :] = 0
    return ids.masked_fill(mask == 0, 0), mask


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Of each token in its row's text, which native models that learn positions must be told where padding is left."""
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def eager_attentions(architecture: str, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The attention matrices of each layer, `(batch_size, num_heads, length, length)`, as the native model has them."""
    native = copy.deepcopy(untouched(architecture))
    native.set_attn_implementation("eager")
    return native(ids, output_attentions=True, use_cache=False).attentions

"""What a checkpoint may say of generation, and what every call would take over that leaves it open."""

from typing import Any

from transformers import GenerationConfig, PreTrainedModel, WatermarkingConfig


#: For vocabularies of 97 tokens or more.
OWN_GENERATION: dict[str, Any] = {
    "temperature": 0.1, "top_k": 1, "top_p": 0.1, "min_p": 0.9, "top_h": 0.1, "typical_p": 0.1, "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5, "repetition_penalty": 9.0, "encoder_repetition_penalty": 9.0, "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1, "bad_words_ids": [[token] for token in range(9, 97)], "min_length": 99,
    "suppress_tokens": list(range(9, 97)), "begin_suppress_tokens": list(range(9, 97)), "forced_bos_token_id": 5,
    "forced_eos_token_id": 5, "sequence_bias": [[[5], 99.0]], "exponential_decay_length_penalty": (1, 9.0),
    "guidance_scale": 9.0, "watermarking_config": WatermarkingConfig(bias=99.0), "stop_strings": ["a"],
    "eos_token_id": list(range(2, 97)), "max_time": 1e-9, "num_beams": 2, "num_return_sequences": 2,
    "penalty_alpha": 0.9, "dola_layers": "high", "prompt_lookup_num_tokens": 2, "assistant_early_exit": 1,
    "token_healing": True, "return_dict_in_generate": True, "cache_implementation": "static", "use_cache": False,
    "renormalize_logits": True, "remove_invalid_values": True, "output_attentions": True,
}  # fmt: skip


def set_defaults(model: PreTrainedModel, **fields: Any) -> GenerationConfig:
    """Gives a model these defaults, whether they fit together or not."""
    own = model.generation_config = GenerationConfig()
    vars(own).update(fields)
    return own

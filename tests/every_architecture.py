"""
Every causal language model of the transformers that is installed, as a tiny random one: what `localize` says of it, and
whether what it then measures and holds is what the explicit attention matrices of the native class give.

`python tests/every_architecture.py` prints what comes of each; with names of model types, of these only; `--write` puts
the table into docs/compatibility.md (`make architectures`).
"""

import argparse
import copy
import re
import sys
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from matrices import EVERYTHING, check_close, check_measurements, matrices_of, native_pass
from torch.testing import assert_close
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from localist_hf import localize
from localist_hf.modeling.locality_config import BLOCK_PARTITIONS
from localist_hf.modeling.measurements import SHARES


TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
COMPATIBILITY = Path(__file__).parents[1] / "docs" / "compatibility.md"
_MARKERS = ("<!-- architectures -->", "<!-- /architectures -->")
_LAYERS, _LENGTH, _VOCABULARY, _PADDING = 4, 48, 64, 7

# Whichever of these a configuration has, it is given.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "dff"), 48
    ),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 128),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 8),
    "vocab_size": _VOCABULARY,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "rotary_dim": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "sliding_window": 20,
}
# Without which some say nothing and cannot be made.
_NEEDED = ("head_dim", "num_key_value_heads")
# No dropout, and BERT and its like as the decoders that they can be.
_PLAIN = {
    **dict.fromkeys(("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop", "hidden_dropout_prob"), 0.0),
    **dict.fromkeys(("dropout", "resid_pdrop", "embd_pdrop", "activation_dropout", "hidden_dropout"), 0.0),
    "is_decoder": True,
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
_TINY_PART = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
# What else some need to be made, or to be tiny.
_OTHERS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROTARY}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "dory": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        **dict.fromkeys(("n_input_layers", "n_output_layers"), 1),
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": _VOCABULARY,
        "laurel_rank": 4,
        "intermediate_size": [48] * _LAYERS,
        "activation_sparsity_pattern": [0.0] * _LAYERS,
    },
    "gemma4_text": {
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": _VOCABULARY,
        "global_head_dim": 8,
    },
    "gemma4_unified_text": {"global_head_dim": 8},
    # As those on the Hub are.
    **{kind: {"layer_types": ["conv", "full_attention"] * 2} for kind in ("lfm2", "lfm2_moe")},
    "longcat_flash": {"num_layers": _LAYERS // 2},
    "phi4_multimodal": {
        "vision_config": {**_TINY_PART, "num_hidden_layers": 2, "image_size": 28, "crop_size": 28},
        "audio_config": {
            **{**_TINY_PART, "num_blocks": 2, "input_size": 16, "nemo_conv_channels": 8},
            **dict.fromkeys(("ext_pw_out_channel", "depthwise_separable_out_channel"), 16),
        },
    },
    "ernie4_5_moe": {"moe_k": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
    "xmod": {"default_language": "en_XX"},
    "roc_bert": dict.fromkeys(
        ("pronunciation_embed_dim", "pronunciation_vocab_size", "shape_embed_dim", "shape_vocab_size"), 16
    ),
}


# Of several parts, those of which the defaults are not valid.
_PARTS: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {
            **dict.fromkeys(("hidden_size_per_layer_input", "vocab_size_per_layer_input"), 0),
            **dict.fromkeys(("num_hidden_layers", "num_kv_shared_layers"), _LAYERS),
        }
    },
    "qwen4_exp": {"text_config": {**_OTHERS["qwen4_exp_text"], "head_dim": 8}},
}
# Decoders that are made of another configuration than the one by which they are listed.
_DECODERS = {
    "musicgen": transformers.MusicgenDecoderConfig,
    "musicgen_melody": transformers.MusicgenMelodyDecoderConfig,
}


def tiny_config(kind: str) -> PreTrainedConfig:
    """A configuration of a model type with tiny sizes; its layers are of those kinds that they are by default."""
    cls = CONFIG_MAPPING[kind]
    default = {} if kind in _PARTS else cls().to_dict()
    fields = {name: value for name, value in _SIZES.items() if default.get(name) is not None}
    fields |= {name: _SIZES[name] for name in _NEEDED if name in default}
    fields |= {name: value for name, value in _PLAIN.items() if name in default}
    if "kv_lora_rank" in fields:  # keys of all heads are made of one
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    if kinds := default.get("layer_types"):
        kinds = list(dict.fromkeys(kinds))
        fields["layer_types"] = [kinds[layer % len(kinds)] for layer in range(_LAYERS)]
    return cls(**{**fields, **_TOKENS, **_OTHERS.get(kind, {}), **_PARTS.get(kind, {})})


def _made(config: PreTrainedConfig, device: str) -> PreTrainedModel:
    with torch.device(device):
        # Kernels of experts know no float64.
        return AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()


def native_model(kind: str) -> PreTrainedModel:
    """
    A tiny model with random weights in float64, of which attention is far from even; on no device, without weights,
    where a tiny configuration cannot be made: what that is refused for is told without running it.
    """
    if kind in _DECODERS:
        with torch.device("meta"):
            return getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])(_DECODERS[kind]())
    try:
        model = _made(tiny_config(kind), "meta")
    except Exception:
        return _made(CONFIG_MAPPING[kind](), "meta")
    if model.config.get_text_config() is not model.config or sum(each.numel() for each in model.parameters()) > 2e6:
        return model
    torch.manual_seed(0)
    model = _made(model.config, "cpu").double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            if name.endswith("q_norm.weight") and not kind.startswith("gemma4"):  # whose scores have no factor
                parameter.add_(1)  # normalised queries and keys would attend evenly
    # Of float64 the least number, which masks of eager attention are made of, is none in float32.
    return model.float() if model.config._attn_implementation == "eager" else model


@dataclass(frozen=True)
class Outcome:
    """
    What comes of a model type.

    Args:
        kind (`str`), name (`str`):
            The type, and its class.
        partitions (`tuple[str, ...]`):
            Those with which everything holds; none of what is refused.
        reason (`str`):
            Why others are refused, or the model is not made.
    """

    kind: str
    name: str
    partitions: tuple[str, ...] = ()
    reason: str = ""


def examine(kind: str) -> Outcome:
    """
    Raises:
        AssertionError: where something that is not refused is wrong.
        Exception: of whatever type, for what is neither done nor refused.
    """
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    try:
        native = native_model(kind)
    except Exception as error:
        return Outcome(kind, name, reason=f"transformers does not make it: {_line(error).partition('. ')[0]}")
    works, reasons = [], {}
    for partition in BLOCK_PARTITIONS:
        model = copy.deepcopy(native)
        settings = {**_SETTINGS, "block_partition": partition}
        try:
            localize(model, **settings)
        except ValueError as error:
            reasons[partition] = _line(error)
            assert type(model) is type(native), "it is refused, and changed"
            continue
        assert native.device.type != "meta", f"{kind} is not refused, and is not tiny: {_largest(native)}"
        try:
            check(native, model)
        except ValueError as error:
            reasons[partition] = f"at the first call: {_line(error)}"
            continue
        works.append(partition)
    different = dict.fromkeys(reasons.values())
    assert len(different) <= 1, reasons
    return Outcome(kind, type(native).__name__, tuple(works), next(iter(different), ""))


_SETTINGS = {
    "locality_schedule": "linear",
    "min_block_length": 3,
    "max_block_length": 9,
    "window_length": 7,
    "delimiter_token_ids": list(range(8, 16)),
    "num_sink_tokens": 1,
    "num_previous_blocks": 1,
}
_LAMBDAS = [layer / (_LAYERS - 1) for layer in range(_LAYERS)]


@torch.no_grad()
def check(native: PreTrainedModel, model: PreTrainedModel) -> None:
    """Whether a localised model does what it says, by the matrices of the native one."""
    ids = torch.randint(3, _VOCABULARY, (2, _LENGTH), generator=torch.manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :_PADDING] = 0
    ids = ids.masked_fill(mask == 0, 0)
    _check_dial_0(native, model, ids, mask)
    for dial, floor in ((0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (0.0, 0.8)):
        _check_matrices(native, model, ids, mask, dial, floor)
    _check_steps(model, ids, mask)
    _check_generation(model, ids, mask)
    _check_reach(model, ids)


def _check_dial_0(native: PreTrainedModel, model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> None:
    for inputs in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}):
        # What padding sees may be no number.
        assert_close(model(**inputs).logits, native(**inputs).logits, atol=0, rtol=0, equal_nan=True, msg="dial 0")


def _check_matrices(
    native: PreTrainedModel, model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, dial: float, floor: float
) -> None:
    request = {"locality_dial": dial, "min_fidelity": floor}
    outputs = model(ids, attention_mask=mask, **EVERYTHING, **request)
    windows = model.config.locality.sliding_windows
    matrices = matrices_of(windows, _LAMBDAS, model, outputs, mask, dial, floor)
    inputs = {"attention_mask": mask}
    if model._counts_from_zero and "position_ids" in model._native_arguments:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    expected = native_pass(copy.deepcopy(native), matrices, ids, **inputs)
    assert sorted(matrices.weights) == list(range(_LAYERS))
    is_token = mask.bool()
    for layer in range(_LAYERS):
        rows = is_token[:, None, :, None].expand_as(matrices.weights[layer])
        if dial < 1:
            seen = (matrices.weights[layer] > 0) & rows
            assert torch.equal(seen, matrices.visible(layer) & rows), f"what layer {layer} sees"
    if not dial and not floor:
        _check_logits(
            "logits of what is measured only", outputs.logits[is_token], native(ids, **inputs).logits[is_token]
        )
    _check_logits(f"logits at {request}", outputs.logits[is_token], expected.logits[is_token])
    check_measurements(outputs, matrices)
    total = sum(getattr(outputs, name)[layer] for name in SHARES for layer in range(_LAYERS)) / _LAYERS
    check_close("the sum of the shares", total, is_token[:, None].expand_as(total).to(total.dtype))
    if dial or floor:
        unmeasured = model(ids, attention_mask=mask, **request)
        _check_logits("what is not measured", unmeasured.logits[is_token], outputs.logits[is_token])
        free = native(ids, **inputs).logits
        assert (free - outputs.logits)[is_token].abs().max() > 1e-3 * free.abs().max(), "the dial changes nothing"
    # Each row as if it stood alone.
    alone = model(ids[:1, _PADDING:], **request).logits
    _check_logits("a padded row", outputs.logits[:1, _PADDING:], alone)


def _check_logits(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    # Rotary positions, and some softmaxes, are float32 in any model.
    atol = (1e-6 if actual.dtype == torch.float64 else 2e-5) * max(1.0, expected.abs().max().item())
    assert_close(actual, expected, atol=atol, rtol=0, msg=lambda text: f"{name}: {text}")


def _check_steps(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> None:
    if not model._counts_from_zero:  # native steps count padding in the cache, and the whole text does not
        ids, mask = ids[1:], mask[1:]
    is_token = mask.bool()
    for dial in (0.5, 1.0):
        whole = model(ids, attention_mask=mask, use_cache=False, locality_dial=dial).logits
        cache, parts = DynamicCache(config=model.config), []
        for start, end in pairwise((0, 20, 40, *range(41, _LENGTH + 1))):
            inputs = {"attention_mask": mask[:, :end], "past_key_values": cache, "locality_dial": dial}
            parts.append(model(ids[:, start:end], **inputs).logits)
        _check_logits(f"steps at dial {dial}", torch.cat(parts, dim=1)[is_token], whole[is_token])


def _check_generation(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> None:
    if not model._counts_from_zero:
        ids, mask = ids[1:], mask[1:]
    search = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "locality_dial": 1.0}
    generated = [model.generate(ids, attention_mask=mask, use_cache=cached, **search) for cached in (True, False)]
    assert torch.equal(*generated), "a generation with a cache is another than without"


def _check_reach(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """No token out of reach changes a prediction, but by rounding where experts work on tokens in groups."""
    locality = model.config.locality
    lambdas, locality.locality_schedule = locality.locality_schedule, "localist"
    starts = torch.arange(_LENGTH).expand_as(ids) // 7 * 7
    reach = model.reach(ids, block_starts=starts, locality_dial=1.0)
    at = _LENGTH - 1
    first = reach.first[0, at].item()
    assert not reach.is_bounded or locality.num_sink_tokens < first, "all is in reach"
    if reach.is_bounded:
        other = ids.clone()
        other[:, locality.num_sink_tokens : first] = (ids[:, locality.num_sink_tokens : first] - 2) % 61 + 3
        request = {"block_starts": starts, "locality_dial": 1.0}
        before, after = (model(each, **request).logits[:, at] for each in (ids, other))
        _check_logits("what is out of reach", after, before)
    locality.locality_schedule = lambdas


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _largest(model: PreTrainedModel) -> list[tuple]:
    return sorted(((each.numel(), name, tuple(each.shape)) for name, each in model.named_parameters()), reverse=True)[
        :3
    ]


def row_of(outcome: Outcome) -> str:
    """What the table says of it, but for the names: the class's own stand in its place."""
    reason = re.sub(r"^\w+ cannot be localised: ", "refused: ", outcome.reason)
    reason = re.sub(r"^at the first call: [A-Z]\w+", "refused at the first call: …", reason)
    reason = re.sub(r"^`block_partition` is 'semantic'; [A-Z]\w+", "`semantic` is refused: it", reason)
    reason = re.sub(r"(?<= a )\w+(?=(DecoderWrapper|Config)\b)", "…", reason).rstrip(".")
    if not outcome.partitions:
        return reason
    works = f"works with {', '.join(map('`{}`'.format, outcome.partitions))}"
    return f"{works}; {reason}" if reason else works


def table_of(outcomes: list[Outcome]) -> str:
    """The table of docs/compatibility.md: the model types of each outcome, those that work first."""
    rows: dict[str, list[str]] = {}
    for outcome in sorted(outcomes, key=lambda each: -len(each.partitions)):
        rows.setdefault(row_of(outcome), []).append(f"`{outcome.kind}`")
    number = sum(bool(outcome.partitions) for outcome in outcomes)
    lines = [
        f"Transformers {transformers.__version__} has {len(outcomes)} types; {number} work.",
        "",
        "| types | outcome |",
        "| --- | --- |",
        *(f"| {', '.join(kinds)} | {row} |" for row, kinds in rows.items()),
    ]
    return "\n".join(lines)


def written_table() -> str:
    """The table that is in the documentation."""
    text = COMPATIBILITY.read_text(encoding="utf-8")
    return text.partition(_MARKERS[0])[2].partition(_MARKERS[1])[0].strip()


def main(arguments: list[str] | None = None) -> int:
    """Examines the types; 1 where one is neither right nor refused."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE", help="model types; all by default")
    parser.add_argument("--write", action="store_true", help="put the table into docs/compatibility.md")
    options = parser.parse_args(arguments)
    if options.write and options.types:
        parser.error("--write with types: the table is of all")
    if unknown := sorted(set(options.types) - set(TYPES)):
        parser.error(f"{unknown[0]!r} is none of this transformers' causal language models")
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    outcomes, num_wrong = [], 0
    for kind in options.types or TYPES:
        try:
            outcomes.append(examine(kind))
            print(f"{kind}: {row_of(outcomes[-1])}", flush=True)
        except Exception as error:
            num_wrong += 1
            print(f"{kind}: WRONG: {type(error).__name__}: {_line(error)[:300]}", flush=True)
            if len(options.types) == 1:
                raise
    if options.write and not num_wrong:
        before, _, rest = COMPATIBILITY.read_text(encoding="utf-8").partition(_MARKERS[0])
        after = rest.partition(_MARKERS[1])[2]
        text = f"{before}{_MARKERS[0]}\n{table_of(outcomes)}\n{_MARKERS[1]}{after}"
        COMPATIBILITY.write_text(text, encoding="utf-8")
    return int(num_wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

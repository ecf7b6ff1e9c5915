# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""
The peers, as tasks that can be timed, and a check that they compute the same thing.

Everything is as each peer's user would write it: transformers' own classes, AdamW as `Trainer` sets it up, no dropout,
no cache in training.
"""

import contextlib
import copy
import functools
import inspect
import math
from collections.abc import Callable

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rows import Shape
from torch.nn import functional as F
from transformers import (
    AttentionInterface,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from localist_hf import LocalistGPT2Config, LocalistGPT2LMHeadModel, localize
from localist_hf.configuration import LOCALITY_ARGUMENTS, RECIPES
from localist_hf.modeling.block_attention import local_attention, local_shares
from localist_hf.modeling.block_partition import BlockState, semantic_blocks, value_lengths
from localist_hf.modeling.fidelity import context_fidelity
from localist_hf.modeling.fused_attention import attention_with_lse
from localist_hf.modeling.local_set import LocalSet
from localist_hf.modeling.locality_request import CACHE_ARGUMENTS
from localist_hf.trainers import Teacher
from localist_hf.trainers.distillation import counted_predictions, kl_divergence_sum
from localist_hf.trainers.locality_loss import locality_loss


#: A function that can be timed; in experiments that say so, one that prepares and gives it, or gives what is measured.
Task = Callable[[], object]

_MAX_BLOCK_LENGTH = 64
_TARGET_FIDELITY, _LOCALITY_WEIGHT, _EXPONENT = 0.9, 5.0, 1  # LocalistTrainingArguments' defaults
_EPS = 1e-3  # of the context fidelity in the loss

# What the plain models call their key-value cache.
_CACHE = next(name for name in CACHE_ARGUMENTS if name in inspect.signature(GPT2LMHeadModel.forward).parameters)

#: Every task: its name, and what builds it for a shape.
TASKS: dict[str, Callable[[Shape], Task]] = {}


def _task(name: str) -> Callable:
    """Enters a builder in `TASKS`."""

    def enter(build: Callable[[Shape], Task]) -> Callable[[Shape], Task]:
        TASKS[name] = build
        return build

    return enter


# Inputs and models


def _input_ids(shape: Shape, length: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    size = (shape.batch_size, length or shape.length)
    return torch.randint(shape.vocab_size, size, generator=generator).to(shape.device)


def _settings(shape: Shape) -> dict:
    """What every GPT-2's configuration has in common."""
    return {
        "n_layer": shape.num_layers,
        "n_head": shape.num_heads,
        "n_embd": shape.width,
        "vocab_size": shape.vocab_size,
        "n_positions": shape.length,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _llama_config(shape: Shape) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        hidden_size=shape.width,
        intermediate_size=8 * shape.width // 3,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.length,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def plain_model(shape: Shape, attention: str = "sdpa") -> PreTrainedModel:
    """Transformers' GPT-2 or Llama with random weights."""
    torch.manual_seed(0)
    if shape.num_key_value_heads is not None:
        model = LlamaForCausalLM._from_config(_llama_config(shape), attn_implementation=attention)
        return model.to(shape.device, _dtype(shape))
    model = GPT2LMHeadModel(GPT2Config(**_settings(shape), attn_implementation=attention))
    return model.to(shape.device, _dtype(shape)).train()


def our_model(shape: Shape, schedule: str | list[float] = "localist") -> PreTrainedModel:
    """LocalistGPT2 or a localised Llama, with the weights of `plain_model`."""
    settings = {
        "locality_schedule": schedule,
        "max_block_length": _MAX_BLOCK_LENGTH,
        "block_partition": "semantic",
    }
    if shape.num_key_value_heads is not None:
        return localize(plain_model(shape), **settings)
    model = LocalistGPT2LMHeadModel(LocalistGPT2Config(**_settings(shape), **settings))
    model.load_state_dict(plain_model(shape).state_dict())
    return model.to(shape.device, _dtype(shape)).train()


def _dtype(shape: Shape) -> torch.dtype:
    return getattr(torch, shape.dtype)


def _heads(shape: Shape, requires_grad: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random queries, keys and values that lie in memory as GPT-2's do."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(shape.batch_size, shape.length, 3 * shape.width, generator=generator)
    qkv = qkv.to(shape.device, _dtype(shape))
    return tuple(
        part.unflatten(-1, (shape.num_heads, -1)).transpose(1, 2).detach().requires_grad_(requires_grad)
        for part in qkv.split(shape.width, dim=-1)
    )


def _documents(shape: Shape) -> torch.Tensor:
    return torch.zeros(shape.batch_size, shape.length, dtype=torch.long, device=shape.device)


def _find_blocks(values: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """The semantic partition with LocalistGPT2Config's defaults, from the values of one layer."""
    config = LocalistGPT2Config()
    settings = (config.semantic_threshold, config.min_block_length, _MAX_BLOCK_LENGTH)
    blocks, _ = semantic_blocks(value_lengths(values), documents, *settings, BlockState.at_first(documents, 0))
    return blocks.starts


def _block_starts(shape: Shape) -> torch.Tensor:
    """Blocks made beforehand, for the peers that cannot find any: from random values, like those of random weights."""
    return _find_blocks(_heads(shape)[2], _documents(shape))


def _local_set(shape: Shape) -> LocalSet:
    return LocalSet(_block_starts(shape), _documents(shape), shape.length, _MAX_BLOCK_LENGTH)


# Training steps


def plain_loss(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """The language modeling loss alone."""
    return model(input_ids=input_ids, labels=input_ids).loss


def our_loss(model: PreTrainedModel, input_ids: torch.Tensor, block_starts: torch.Tensor | None = None) -> torch.Tensor:
    """The loss of `LocalistTrainer`; layers that the schedule leaves free are not measured."""
    lambdas = model.config.locality.locality_lambdas
    layers = [layer for layer, value in enumerate(lambdas) if value > 0]
    outputs = model(input_ids=input_ids, labels=input_ids, output_fidelity=layers, block_starts=block_starts)
    shares = zip(layers, outputs.block_share, outputs.outside_share, outputs.context_mask, strict=True)
    losses = [
        lambdas[layer] * locality_loss(context_fidelity(block, outside, _EPS), mask, _TARGET_FIDELITY, _EXPONENT).mean()
        for layer, block, outside, mask in shares
    ]
    return outputs.loss + _LOCALITY_WEIGHT / len(lambdas) * sum(losses)


def eager_loss(model: PreTrainedModel, input_ids: torch.Tensor, block_starts: torch.Tensor) -> torch.Tensor:
    """The same loss from the attention matrices that transformers returns."""
    outputs = model(input_ids=input_ids, labels=input_ids, output_attentions=True)
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    is_outside = (columns < block_starts[:, :, None])[:, None]  # the matrices are 0 above the diagonal
    mask = (block_starts > 0) & (block_starts < columns)  # not the first block, nor the first token of another
    losses = []
    for weights in outputs.attentions:
        outside = (weights * is_outside).sum(-1)
        block = 1 - outside - weights.diagonal(dim1=-2, dim2=-1)
        psi = context_fidelity(block, outside, _EPS)
        losses.append(locality_loss(psi, mask, _TARGET_FIDELITY, _EXPONENT).mean())
    return outputs.loss + _LOCALITY_WEIGHT * sum(losses) / len(losses)


def _training_step(model: torch.nn.Module, loss: Callable[..., torch.Tensor], shape: Shape, *args) -> Task:
    """Forward, backward, AdamW and zero_grad; in bfloat16 autocast on a GPU."""
    input_ids = _input_ids(shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    on_gpu = shape.device == "cuda"

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext():
            value = loss(model, input_ids, *args)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@_task("plain step")
def _(shape: Shape) -> Task:
    return _training_step(plain_model(shape), plain_loss, shape)


@_task("our step")
def _(shape: Shape) -> Task:
    return _training_step(our_model(shape), our_loss, shape)


@_task("our quintic step")
def _(shape: Shape) -> Task:
    return _training_step(our_model(shape, "quintic"), our_loss, shape)


@_task("our unmeasured step")
def _(shape: Shape) -> Task:
    return _training_step(our_model(shape), plain_loss, shape)


def taught_loss(model: PreTrainedModel, input_ids: torch.Tensor, teacher: Teacher) -> torch.Tensor:
    """The loss of `LocalistTrainer` under `RECIPES["hold"]`."""
    recipe, is_counted = RECIPES["hold"], counted_predictions(input_ids)
    target = teacher.logits(model, {"input_ids": input_ids})
    outputs = model(input_ids=input_ids, labels=input_ids, locality_dial=float(recipe["training_dials"][0]))
    divergence = kl_divergence_sum(outputs.logits, target, is_counted) / is_counted.sum()
    return outputs.loss.lerp(divergence, recipe["distillation_weight"])


def choice_loss(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """The loss of `LocalistTrainer` under `locality_objective="choice"`."""
    lambdas = model.config.locality.locality_lambdas
    layers = [layer for layer, value in enumerate(lambdas) if value > 0]
    outputs = model(input_ids=input_ids, labels=input_ids, output_fidelity=layers, output_block_choice=True)
    target = -math.log(LOCALITY_ARGUMENTS["target_blocks"])
    others = [(block + rest).detach() for block, rest in zip(outputs.block_share, outputs.outside_share, strict=True)]
    losses = [
        locality_loss(-looked_at.log(), mask, target, _EXPONENT, weights=weight).mean()
        for looked_at, mask, weight in zip(outputs.blocks_looked_at, outputs.fidelity_mask, others, strict=True)
    ]
    return outputs.loss + _LOCALITY_WEIGHT / len(lambdas) * sum(losses)


def both_ends_loss(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """The language modeling loss with the rows dealt over both ends of the dial."""
    dials = torch.arange(len(input_ids)) % 2
    return model(input_ids=input_ids, labels=input_ids, locality_dial=dials.double()).loss


def _adapted(model: PreTrainedModel) -> PeftModel:
    target = ["c_attn"] if model.config.model_type.endswith("gpt2") else ["q_proj", "k_proj", "v_proj"]
    is_transposed = target == ["c_attn"]
    return get_peft_model(model, LoraConfig(r=16, target_modules=target, fan_in_fan_out=is_transposed))


@_task("choice step")
def _(shape: Shape) -> Task:
    return _training_step(our_model(shape, [0.0] * (shape.num_layers - 2) + [1.0, 1.0]), choice_loss, shape)


@_task("taught step")
def _(shape: Shape) -> Task:
    model = our_model(shape, "quintic")
    return _training_step(model, taught_loss, shape, Teacher(model))


@_task("both ends step")
def _(shape: Shape) -> Task:
    return _training_step(our_model(shape, "quintic"), both_ends_loss, shape)


@_task("plain adapter step")
def _(shape: Shape) -> Task:
    return _training_step(_adapted(plain_model(shape)), plain_loss, shape)


@_task("taught adapter step")
def _(shape: Shape) -> Task:
    model = _adapted(our_model(shape, "quintic"))
    return _training_step(model, taught_loss, shape, Teacher(model))


@_task("eager step")
def _(shape: Shape) -> Task:
    return _training_step(plain_model(shape, "eager"), eager_loss, shape, _block_starts(shape))


# The parts of our step, forward and backward, for one layer


def _forward_backward(function: Callable[[], tuple[torch.Tensor, ...]], inputs: tuple[torch.Tensor, ...]) -> Task:
    grads = [torch.randn_like(output) for output in function()]
    return lambda: torch.autograd.grad(function(), inputs, grads)


@_task("plain attention")
def _(shape: Shape) -> Task:
    heads = _heads(shape, requires_grad=True)
    return _forward_backward(lambda: (F.scaled_dot_product_attention(*heads, is_causal=True),), heads)


@_task("fused attention with LSE")
def _(shape: Shape) -> Task:
    heads = _heads(shape, requires_grad=True)
    scale = heads[0].shape[-1] ** -0.5
    return _forward_backward(lambda: attention_with_lse(*heads, None, True, scale), heads)


@_task("band")
def _(shape: Shape) -> Task:
    query, key, value = _heads(shape, requires_grad=True)
    scale = query.shape[-1] ** -0.5
    with torch.no_grad():
        _, lse = attention_with_lse(query, key, value, None, True, scale)
    inputs = (query, key, lse.requires_grad_())
    rest = (_local_set(shape), scale)
    return _forward_backward(lambda: local_shares(*inputs, *rest), inputs)


@_task("block finding")
def _(shape: Shape) -> Task:
    values, documents = _heads(shape)[2], _documents(shape)
    return lambda: _find_blocks(values, documents)


# Attention at dial 1


@_task("plain attention forward")
def _(shape: Shape) -> Task:
    heads = _heads(shape)
    return lambda: F.scaled_dot_product_attention(*heads, is_causal=True)


@_task("local attention forward")
def _(shape: Shape) -> Task:
    heads = _heads(shape)
    rest = (_local_set(shape), heads[0].shape[-1] ** -0.5)
    return lambda: local_attention(*heads, *rest)


# The whole model, not training


def _without_grad(model: torch.nn.Module, function: Callable[[], object]) -> Task:
    model.eval()
    return torch.no_grad()(function)


def explicit_attention_forward(module, query, key, value, attention_mask, scaling=None, dial_bias=None, **kwargs):
    """The dial as published demonstrations do it: explicit scores with an additive bias."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    weights = (query @ key.transpose(-1, -2) * scaling + dial_bias).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("explicit_dial", explicit_attention_forward)


def explicit_logits(
    model: PreTrainedModel, input_ids: torch.Tensor, block_starts: torch.Tensor, dial: float
) -> torch.Tensor:
    """Logits of plain GPT-2 with log(1 - dial) added to every score outside the blocks, all layers localised."""
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    outside = math.log(1 - dial) if dial < 1 else -math.inf
    bias = torch.zeros(len(input_ids), 1, len(columns), len(columns), device=input_ids.device)
    bias = bias.masked_fill((columns < block_starts[:, :, None])[:, None], outside)
    bias = bias.masked_fill(columns > columns[:, None], -math.inf)
    return model(input_ids=input_ids, dial_bias=bias).logits


def _dial_tasks(dial: float) -> None:
    """Enters the forward passes at one setting of the dial."""

    @_task(f"explicit forward at dial {dial:g}")
    def _(shape: Shape) -> Task:
        model, input_ids, starts = plain_model(shape, "explicit_dial"), _input_ids(shape), _block_starts(shape)
        return _without_grad(model, lambda: explicit_logits(model, input_ids, starts, dial))

    @_task(f"our forward at dial {dial:g}")
    def _(shape: Shape) -> Task:
        model, input_ids = our_model(shape), _input_ids(shape)
        return _without_grad(model, lambda: model(input_ids=input_ids, locality_dial=dial).logits)


_dial_tasks(0.5)
_dial_tasks(1.0)


def _generation(model: PreTrainedModel, shape: Shape, **dial: float) -> Task:
    """Greedy, with the cache."""
    input_ids = _input_ids(shape, shape.prompt_length)
    settings = {"do_sample": False, "use_cache": True, "pad_token_id": 0, "max_new_tokens": shape.new_tokens}
    mask = torch.ones_like(input_ids)
    return _without_grad(model, lambda: model.generate(input_ids, attention_mask=mask, **settings, **dial))


@_task("plain generation")
def _(shape: Shape) -> Task:
    return _generation(plain_model(shape), shape)


@_task("our generation")
def _(shape: Shape) -> Task:
    return _generation(our_model(shape), shape)


for _dial in (0.5, 1.0):

    @_task(f"our generation at dial {_dial:g}")
    def _(shape: Shape, dial: float = _dial) -> Task:
        return _generation(our_model(shape), shape, locality_dial=dial)


# Steps of a generation alone: a run copies the cache that the prompt has filled, and gives the steps that follow


def _decoding(model: PreTrainedModel, shape: Shape, **dial: float) -> Task:
    """Greedy steps, called as `generate` calls them."""
    input_ids = _input_ids(shape, shape.prompt_length)
    ones = torch.ones(shape.batch_size, shape.prompt_length + shape.new_tokens, dtype=torch.long, device=shape.device)

    model.eval()
    with torch.no_grad():
        prompt = model(input_ids=input_ids, use_cache=True, logits_to_keep=1, **dial)

    def prepare() -> Task:
        cache = copy.deepcopy(getattr(prompt, _CACHE))

        @torch.no_grad()
        def decode() -> None:
            tokens = prompt.logits.argmax(-1)
            for length in range(shape.prompt_length + 1, ones.shape[1] + 1):
                step = model(
                    input_ids=tokens,
                    attention_mask=ones[:, :length],
                    position_ids=ones[:, :1] * (length - 1),
                    use_cache=True,
                    **{_CACHE: cache},
                    **dial,
                )
                tokens = step.logits.argmax(-1)

        return decode

    return prepare


@functools.cache
def _weights(shape: Shape) -> dict[str, torch.Tensor]:
    return plain_model(shape).state_dict()


def _with_shared_weights(model: PreTrainedModel, shape: Shape) -> PreTrainedModel:
    """
    The model with the very tensors of its peers: a step does little more than read them, and the same numbers at
    another place in memory can take 3 % longer.
    """
    model.load_state_dict(_weights(shape), assign=True)
    model.tie_weights()
    return model


@_task("plain decoding")
def _(shape: Shape) -> Task:
    return _decoding(_with_shared_weights(plain_model(shape), shape), shape)


for _dial in (0.5, 1.0):

    @_task(f"our decoding at dial {_dial:g}")
    def _(shape: Shape, dial: float = _dial) -> Task:
        settings = {"locality_dial": dial, "min_fidelity": 0.0}
        return _decoding(_with_shared_weights(our_model(shape), shape), shape, **settings)


# The prompt alone, into a cache


def _prefill(model: PreTrainedModel, shape: Shape, **asked: bool) -> Task:
    input_ids = _input_ids(shape)
    return _without_grad(model, lambda: model(input_ids=input_ids, use_cache=True, logits_to_keep=1, **asked))


@_task("plain prefill")
def _(shape: Shape) -> Task:
    return _prefill(plain_model(shape), shape)


@_task("our measured prefill")
def _(shape: Shape) -> Task:
    return _prefill(our_model(shape), shape, output_fidelity=True)


# The cache after a step of a generation


def _cache_bytes(model: PreTrainedModel, shape: Shape, **dial: float) -> Task:
    """The memory that keys and values hold, with what is kept free for those to come."""
    input_ids = _input_ids(shape, shape.prompt_length)

    @torch.no_grad()
    def measure() -> int:
        cache = getattr(model(input_ids=input_ids, use_cache=True, logits_to_keep=1, **dial), _CACHE)
        model(input_ids=input_ids[:, -1:], use_cache=True, **{_CACHE: cache}, **dial)
        storages = [rows.untyped_storage() for layer in cache.layers for rows in (layer.keys, layer.values)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    model.eval()
    return measure


@_task("plain cache")
def _(shape: Shape) -> Task:
    return _cache_bytes(plain_model(shape), shape)


@_task("our cache at dial 1")
def _(shape: Shape) -> Task:
    return _cache_bytes(our_model(shape), shape, locality_dial=1.0)


# Do they compute the same?


def check_agreement(tasks: list[str]) -> None:
    """
    Compares the peers among `tasks` with ours at a tiny shape, given the same blocks: a ratio of two different things
    says nothing.

    Raises:
        AssertionError: when they differ.
    """
    shape = Shape(length=2048).tiny()
    ours, input_ids, starts = our_model(shape), _input_ids(shape), _block_starts(shape)
    if "eager step" in tasks:
        eager = plain_model(shape, "eager")
        our_value, eager_value = our_loss(ours, input_ids, starts), eager_loss(eager, input_ids, starts)
        torch.testing.assert_close(our_value, eager_value, rtol=1e-5, atol=1e-5)
        our_grads = torch.autograd.grad(our_value, list(ours.parameters()))
        eager_grads = torch.autograd.grad(eager_value, list(eager.parameters()))
        torch.testing.assert_close(our_grads, eager_grads, rtol=1e-3, atol=1e-5)
    for dial in (0.5, 1.0):
        if f"explicit forward at dial {dial:g}" in tasks:
            explicit = plain_model(shape, "explicit_dial").eval()
            with torch.no_grad():
                expected = explicit_logits(explicit, input_ids, starts, dial)
                logits = ours.eval()(input_ids=input_ids, block_starts=starts, locality_dial=dial).logits
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)

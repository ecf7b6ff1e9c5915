"""Whether a model's own text degrades under the dial: variety, repetition, and what the base thinks of it."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from .block_controls import setting
from .check_model import check_model, core_model
from .locality_meter import label_losses


@dataclass(frozen=True)
class GenerationFigures:
    """
    Texts that go on from the same prompts, each figure apart for each text.

    Args:
        num_tokens (`int`):
            Tokens of each text, without its prompt.
        losses (`list[float]`):
            Sum of the tokens' cross-entropies under the judge, in nats.
        distinct_2 (`list[float]`):
            Distinct pairs of tokens / pairs of tokens (distinct-n, arXiv:1510.03055), in (0, 1].
        repetition_4 (`list[float]`):
            Share of the stretches of four tokens that stand in the text before (rep-n, arXiv:2202.06417), in [0, 1).
    """

    num_tokens: int
    losses: list[float]
    distinct_2: list[float]
    repetition_4: list[float]


def generate_as_told(
    model: PreTrainedModel, input_ids: torch.LongTensor, generation_config: GenerationConfig, **kwargs: Any
) -> Any:
    """
    What [`~transformers.GenerationMixin.generate`] gives by this configuration and these arguments alone. What the
    model's own `generation_config` says, which comes with a checkpoint, counts for nothing; it is changed meanwhile and
    restored: leave the model to this call.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model.
        input_ids (`torch.LongTensor` of shape `(batch_size, length)`):
            What it goes on from, without padding.
        generation_config ([`~transformers.GenerationConfig`]):
            All that is to hold. Without a token that ends a text in it, such a one is like any other.
        kwargs:
            Further arguments of `generate`.
    """
    # What is not set in the configuration that is passed is taken from the model's own.
    with setting(core_model(model), generation_config=generation_config):
        return model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=generation_config,
            **kwargs,
        )


@torch.no_grad()
def measure_generation(
    model: PreTrainedModel,
    judge: PreTrainedModel,
    texts: torch.LongTensor,
    prompt_length: int = 32,
    dials: Sequence[float] = (0.0, 1.0),
    seed: int = 0,
) -> dict[str, GenerationFigures]:
    """
    Lets a model go on from the beginnings of texts, drawing every token from the whole distribution (temperature 1, an
    end-of-text token like any other), and compares what it writes with how the texts go on. What the model's own
    `generation_config` says counts for nothing; it is changed meanwhile and restored: leave the model to this call.

    Args:
        model ([`LocalistGPT2LMHeadModel`] or any localised model):
            The model that writes; it is set to evaluation mode.
        judge ([`~transformers.PreTrainedModel`]):
            The model under whose free attention the perplexity is taken, such as the common base; it is set to
            evaluation mode.
        texts (`torch.LongTensor` of shape `(num_texts, length)`):
            Tokens of held-out texts, begun as the tokenizer begins them (see [`text_prefix`]): prompts of
            `prompt_length`, and how they go on.
        prompt_length (`int`, *optional*, defaults to 32):
            Tokens of a prompt; at least 1, and at least four less than the texts have.
        dials (`Sequence[float]`, *optional*, defaults to 0 and 1):
            Places of the dial to write at, each from the same random numbers; of a model without local layers the
            first only, since the others change nothing.
        seed (`int`, *optional*, defaults to 0):
            Of the random numbers; the global state of the generator is restored.

    Returns:
        `dict[str, GenerationFigures]`: of every dial as `"dial 1"`, and of the texts themselves as `"text"`.

    Raises:
        ValueError: for a model of another class, and for a `prompt_length` that leaves nothing to write.
    """
    check_model("model", model)
    length = texts.shape[1] - prompt_length
    if prompt_length < 1 or length < 4:
        raise ValueError(
            f"`prompt_length` is {prompt_length} and the texts have {texts.shape[1]} tokens; a prompt needs one at "
            "least, and four must be left to write."
        )
    if not any(model.config.locality.locality_lambdas):
        dials = dials[:1]
    model.eval()
    texts = texts.to(model.device)
    prompts, figures = texts[:, :prompt_length], {}
    # Nothing is padded; without such a token there is a warning. Without one that ends a text, all are as long.
    whole = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=length, pad_token_id=0)
    for dial in dials:
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            written = generate_as_told(model, prompts, whole, locality_dial=dial, min_fidelity=0.0)
        figures[f"dial {dial:g}"] = _figures(written, judge, prompt_length)
    return figures | {"text": _figures(texts, judge, prompt_length)}


def _figures(texts: torch.Tensor, judge: PreTrainedModel, prompt_length: int) -> GenerationFigures:
    labels = texts.clone()
    labels[:, :prompt_length] = -100
    texts = texts.to(judge.device)
    takes_dial = "locality_dial" in inspect.signature(core_model(judge).forward).parameters
    free = {"locality_dial": 0.0, "min_fidelity": 0.0} if takes_dial else {}
    losses, _ = label_losses(judge.eval()(input_ids=texts, use_cache=False, **free).logits, labels)
    written = texts[:, prompt_length:].tolist()
    return GenerationFigures(
        num_tokens=len(written[0]),
        losses=losses.tolist(),
        distinct_2=[_distinct(text, 2) for text in written],
        repetition_4=[1 - _distinct(text, 4) for text in written],
    )


def _distinct(text: Sequence[int], n: int) -> float:
    """Distinct stretches of n tokens / stretches of n tokens."""
    stretches = list(zip(*(text[start:] for start in range(n)), strict=False))
    return len(set(stretches)) / len(stretches)

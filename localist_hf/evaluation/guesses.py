"""Guesses at what a prediction rests on: attention, gradients, and what they must do better than."""

import importlib.util
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv

from ..modeling.block_partition import document_starts, with_previous_blocks
from ..modeling.fidelity import LayerDial
from .attention_rows import AttentionRows
from .check_model import core_model
from .measure import last_block_starts


#: What is compared with influence beside attention.
NEARNESS, RANDOM = "nearness", "random"
#: Steps of the integrated gradients.
_STEPS = 16


def attention_guesses(
    model: PreTrainedModel, ids: torch.Tensor, places: Sequence[int], dial: float, with_rollout: bool = True
) -> tuple[dict[str, list[np.ndarray]], list[np.ndarray]]:
    """
    What attention says of where predictions come from: for each guess of [`measure_agreement`] that is made of it a
    number for each token of the text, at each of these positions, and which tokens these see under the dial. Rollout
    needs the attention of all others too.
    """
    core = core_model(model)
    locality, length = core.config.locality, len(ids)
    tokens = ids[None].to(core.device)
    last_layer = locality.num_hidden_layers - 1
    dials = {"locality_dial": dial, "min_fidelity": 0.0}
    settings = dials | {"use_cache": False}
    starts = last_block_starts(core.base_model, {"input_ids": tokens}, **dials)
    kept = AttentionRows(core.config)
    core.base_model(tokens, **settings, output_fidelity=[last_layer], block_starts=starts, observer=kept.keep)
    documents = document_starts(1, length, device=starts.device)
    local = with_previous_blocks(starts, documents, locality.num_previous_blocks).local_starts[0].cpu()
    position = torch.arange(length)
    asked = list(range(length)) if with_rollout else list(places)
    sight = ((position >= local[:, None]) | (position < locality.num_sink_tokens))[asked]
    lambdas = torch.tensor(locality.locality_lambdas)
    # (num_layers, num_heads, number asked, length), as the dial leaves it: texts are short here.
    weights = []
    for layer, value in enumerate(lambdas.tolist()):
        of_layer = LayerDial.of_layer(dial, 0.0, value)
        rows = (kept.row(layer, place, seen[: place + 1], of_layer) for place, seen in zip(asked, sight, strict=True))
        weights.append(torch.stack([F.pad(row, (0, length - row.shape[1])) for row in rows], dim=1))
    attention = torch.stack(weights)
    means = attention.mean(1)
    lengths = torch.stack([
        repeat_kv(kept.values(layer).norm(dim=-1, keepdim=True), attention.shape[1] // kept.values(layer).shape[1])
        for layer in range(len(lambdas))
    ])[:, 0, :, :, 0].cpu()  # fmt: skip
    guesses = {f"layer {layer}": means[layer] for layer in range(len(means))}
    guesses["all layers"] = means.mean(0)
    if (is_local := lambdas > 0).any():
        weighted = (attention * lengths[:, :, None]).mean(1)[is_local]
        guesses["localised layers, by value length"] = (weighted * lambdas[is_local, None, None]).mean(0)
    if with_rollout:
        rollout = torch.eye(length)
        for of_layer in means:
            rollout = (0.5 * of_layer + 0.5 * torch.eye(length)) @ rollout
        guesses["rollout"] = rollout
    rows = [asked.index(place) for place in places]
    by_guess = {name: [matrix[row].double().numpy() for row in rows] for name, matrix in guesses.items()}
    return by_guess, [sight[row].numpy() for row in rows]


def check_captum() -> None:
    """An error where Captum is not installed."""
    if importlib.util.find_spec("captum") is None:
        raise ValueError("Captum, which attributes by gradients, is not installed: pip install captum")


def gradient_guesses(
    model: PreTrainedModel, ids: torch.Tensor, places: Sequence[int], dial: float
) -> dict[str, list[np.ndarray]]:
    """
    What gradients say of where predictions come from, for comparison: of the log-probability of the most probable next
    token by the embedding of each token, by Captum, without their sign. For each guess a number for each token of the
    text, at each of these positions.
    """
    from captum.attr import InputXGradient, IntegratedGradients  # an extra

    core = core_model(model)
    tokens = ids[None].to(core.device)
    dials = {"locality_dial": dial, "min_fidelity": 0.0}
    settings = dials | {"use_cache": False}
    with torch.no_grad():
        starts = last_block_starts(core.base_model, {"input_ids": tokens}, **dials)
        best = model(tokens, block_starts=starts, **settings).logits[0].argmax(-1)
    embeddings = core.get_input_embeddings()(tokens).detach().requires_grad_()

    def log_probability(texts: torch.Tensor, place: int) -> torch.Tensor:
        of_texts = starts[:, : place + 1].expand(len(texts), -1)
        logits = model(inputs_embeds=texts, block_starts=of_texts, **settings).logits[:, place]
        return logits.float().log_softmax(-1)[:, best[place]]

    ways: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
        "gradient x input": lambda text, place: InputXGradient(log_probability).attribute(
            text, additional_forward_args=place
        ),
        "integrated gradients": lambda text, place: IntegratedGradients(log_probability).attribute(
            text, additional_forward_args=place, n_steps=_STEPS, internal_batch_size=_STEPS
        ),
    }
    found: dict[str, list[np.ndarray]] = {name: [] for name in ways}
    with torch.enable_grad():
        for place in places:
            for name, way in ways.items():
                # Of the text up to there: what comes later has no say.
                of_tokens = way(embeddings[:, : place + 1], place)[0].sum(-1).abs().double().cpu()
                found[name].append(np.pad(of_tokens.detach().numpy(), (0, len(ids) - 1 - place)))
    return found

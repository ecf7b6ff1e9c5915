"""What a fidelity is worth: the same model and text on other blocks, and at other dials."""

import math
from collections.abc import Sequence

import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..modeling.reach import first_in_reach, sum_out_of_reach
from .block_controls import Losses, figures_of, on_blocks, setting
from .block_lift import block_lift
from .check_model import check_model
from .control_results import ControlResults, DialFigures, DocumentSums
from .divergence import divergence_bits
from .measure import check_own_blocks, evaluation_batches
from .progress import progress_of_passes
from .share_sums import add_rows, share_sums
from .texts import Texts


_DIALS = tuple(tenth / 10 for tenth in range(11))
#: What `num_previous_blocks` is set to, beside what the model has.
_NUM_PREVIOUS_BLOCKS = (0, 1)


@torch.no_grad()
def measure_controls(
    model: PreTrainedModel,
    dataset: Dataset,
    batch_size: int = 8,
    block_model: PreTrainedModel | None = None,
    boundaries: Sequence[Sequence[bool]] | None = None,
    dials: Sequence[float] = _DIALS,
    num_previous_blocks: Sequence[int] = _NUM_PREVIOUS_BLOCKS,
) -> ControlResults:
    """
    Measures what no fidelity should be reported without: the same model and text on other blocks and at other dials.
    22 passes over the data for a model with no or one previous block: one for each place of the dial and each other
    setting at dial 1, and one for all blocks at dial 0, for each number of previous blocks.

    The model's configuration is changed for some of them and restored: leave the model to this call meanwhile.

    Args:
        model ([`LocalistGPT2LMHeadModel`] or a [`~peft.PeftModel`] around one):
            The model to measure; it is set to evaluation mode.
        dataset ([`~datasets.Dataset`]):
            As for [`measure`]; two texts at least. Read into memory.
        batch_size (`int`, *optional*, defaults to 8):
            Sequences at a time.
        block_model ([`LocalistGPT2LMHeadModel`] or [`LocalistGPT2Model`], *optional*):
            The model whose blocks count as the own ones, as for [`measure`].
        boundaries (`Sequence[Sequence[bool]]`, *optional*):
            For each sequence of the data set, True on each token that a reader would begin a part with; for the block
            lift.
        dials (`Sequence[float]`, *optional*, defaults to 0, 0.1, ... 1):
            Places of the dial to measure, from 0 to 1, both among them.
        num_previous_blocks (`Sequence[int]`, *optional*, defaults to 0 and 1):
            Numbers of blocks before a token's own to measure own and other blocks with, beside what the model has.

    Returns:
        [`ControlResults`]

    Raises:
        ValueError: for a model of another class, for fewer than two texts, for boundaries that do not fit them, and for
            dials that do not rise from 0 to 1.

    Example:

    ```python
    >>> results = measure_controls(model, dataset)
    >>> own, wrong = results.blocks[0].own, results.blocks[0].wrong
    >>> own.context_fidelity[-1], wrong.context_fidelity[-1], results.cost_at_dial_1
    (0.86, 0.7, 1.02)
    ```
    """
    check_model("model", model)
    if block_model is not None:
        check_model("block_model", block_model, needs_head=False)
    check_dials(dials)
    batches = list(evaluation_batches(model, dataset, batch_size, block_model))
    for inputs, _ in batches:
        check_own_blocks(inputs)
    texts = Texts([inputs for inputs, _ in batches])
    if texts.number < 2:
        raise ValueError(
            f"`dataset` holds {texts.number} text(s); it must hold two at least, so that each can be measured on the "
            "blocks of another."
        )
    marks = None if boundaries is None else texts.line_of_lists("boundaries", boundaries)

    config = model.config
    localised = {layer for layer, value in enumerate(config.locality.locality_lambdas) if value > 0}
    layers = sorted(localised | {config.locality.num_hidden_layers - 1})
    if not localised:
        dials = dials[:1]  # the others would change nothing
    numbers = sorted({*num_previous_blocks, config.locality.num_previous_blocks})
    # At dial 1 on four kinds of blocks, of which two lie between two lengths.
    num_passes = len(dials) + 3 + len(numbers) + (6 if localised else 0)
    with progress_of_passes(model, num_passes * len(batches), "Controls"):
        sweep, others, divergence, losses, own_starts, out_of_reach = _at_dials(model, batches, texts, layers, dials)
        own = texts.line(own_starts)
        blocks, shares, on_blocks_losses = [], {}, {}
        for number in numbers:
            is_own = localised and number == config.locality.num_previous_blocks
            measured = on_blocks(model, batches, texts, layers, own, number, at_dial_1=bool(is_own))
            blocks.append(measured.controls)
            shares |= {f"{kind} {number}": rows for kind, rows in measured.shares.items()}
            on_blocks_losses |= measured.losses
    losses |= {"self only": others["self_only"]} if localised else {}
    losses |= on_blocks_losses
    return ControlResults(
        layers=layers,
        num_sink_tokens=config.locality.num_sink_tokens,
        blocks=blocks,
        dials=sweep,
        perplexity_on_blocks={name: each.perplexity for name, each in on_blocks_losses.items()},
        **{f"{name}_perplexity": each.perplexity for name, each in others.items()},
        divergence=divergence,
        documents=DocumentSums(
            labels=losses["dial 0"].labels.int().tolist(),
            losses={name: each.rounded() for name, each in losses.items()},
            shares={
                name: [tuple(round(value, 4) for value in row) for row in rows.tolist()]
                for name, rows in shares.items()
            },
        ),
        block_lift=None if marks is None else _block_lift(texts, own, marks),
        share_out_of_reach=out_of_reach,
    )


def check_dials(dials: Sequence[float]) -> None:
    """
    Raises:
        ValueError: for places of the dial that do not rise from 0 to 1.
    """
    if [*dials] != sorted(set(dials)) or len(dials) < 2 or (dials[0], dials[-1]) != (0, 1):
        raise ValueError(f"`dials` are {[*dials]}; they must rise from 0 to 1, both among them.")


def _block_lift(texts: Texts, own: torch.Tensor, marks: torch.Tensor) -> float:
    return block_lift(texts.apart(own - texts.first), texts.apart(marks, padding=False))


def _at_dials(
    model: PreTrainedModel,
    batches: Sequence[tuple[dict[str, torch.Tensor], torch.Tensor]],
    texts: Texts,
    layers: list[int],
    dials: Sequence[float],
) -> tuple[list[DialFigures], dict[str, Losses], float, dict[str, Losses], list[torch.Tensor], float | None]:
    """
    The dial sweep, the losses of other settings by name, the divergence, the losses at each dial, the last layer's
    blocks of each batch, and the share of the context that is out of reach, where every layer is local.
    """
    config, own_starts = model.config, []
    is_all_local = all(value == 1 for value in config.locality.locality_lambdas)
    reach = torch.zeros(2, dtype=torch.float64)
    losses = {dial: Losses() for dial in dials}
    totals = dict.fromkeys(dials)
    others = {name: Losses() for name in ("self_only", "all_local", "all_local_self_only")}
    divergence = 0.0
    for index, (inputs, labels) in enumerate(batches):
        arguments = {"use_cache": False, "min_fidelity": 0.0}
        for dial in dials:
            outputs = model(**inputs, **arguments, locality_dial=dial, output_fidelity=layers)
            losses[dial].add(outputs, labels)
            totals[dial] = add_rows(share_sums(outputs), totals[dial])
            if dial == 0:
                free_logits = outputs.logits
                own_starts.append(outputs.block_starts[-1].cpu())
        divergence += _divergence(free_logits, outputs.logits, labels)
        if is_all_local:
            documents = outputs.document_starts
            first = first_in_reach(outputs.block_starts, documents, config.locality)
            reach += sum_out_of_reach(first, documents, config.locality.num_sink_tokens)
        del free_logits, outputs

        alone = inputs | {"block_starts": texts.rows(texts.place, index).to(labels.device)}
        with setting(config.locality, num_previous_blocks=0):
            # Measured too, at dial 0: the native model would count left padding among its positions.
            others["self_only"].add(model(**alone, **arguments, locality_dial=dials[-1], output_fidelity=[0]), labels)
            with setting(config.locality, locality_schedule="localist"):
                others["all_local"].add(model(**inputs, **arguments, locality_dial=1.0), labels)
                others["all_local_self_only"].add(model(**alone, **arguments, locality_dial=1.0), labels)
    sweep = [DialFigures(dial, losses[dial].perplexity, figures_of(totals[dial])) for dial in dials]
    num_labels = losses[dials[0]].num_labels
    by_name = {f"dial {dial:g}": each for dial, each in losses.items()}
    divergence = divergence / num_labels if num_labels else math.nan
    share = (reach[0] / reach[1]).item() if is_all_local and reach[1] else None
    return sweep, others, divergence, by_name, own_starts, share


def _divergence(free: torch.Tensor, dialled: torch.Tensor, labels: torch.Tensor) -> float:
    """The sum of `KL(free || dialled)` over the predictions of labels, in bits."""
    is_prediction = F.pad(labels != -100, (0, 1), value=False)[:, 1:].to(free.device)
    total = 0.0
    for row, places in enumerate(is_prediction):  # not all at once: logits are the largest thing there is
        total += divergence_bits(free[row, places], dialled[row, places]).sum().item()
    return total

"""Layers recruited by a model: those that become local first where locality gives most for what it costs."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from .block_controls import Losses, setting
from .check_model import check_model
from .measure import check_own_blocks, evaluation_batches
from .progress import progress_of_passes
from .share_sums import add_rows, share_means, share_sums


@dataclass(frozen=True)
class RecruitedLayers:
    """
    What [`recruit_layers`] found.

    Args:
        lambdas (`list[float]`):
            The locality of each layer, for `locality_schedule`.
        order (`list[int]`):
            The layers by cost over gain, the first to become local first.
        costs (`list[float]`):
            Of each layer, in bits a token: by how much the loss rises at dial 1 where it alone is local. Below 0 where
            it falls.
        gains (`list[float]`):
            Of each layer, in bits: by how much the mean entropy of its attention falls then.
        cost (`float`):
            In bits a token: by how much the loss rises at dial 1 under these lambdas.
    """

    lambdas: list[float]
    order: list[int]
    costs: list[float]
    gains: list[float]
    cost: float

    def to_dict(self) -> dict[str, object]:
        """All fields by name, for JSON."""
        return dataclasses.asdict(self)


@torch.no_grad()
def recruit_layers(
    model: PreTrainedModel,
    dataset: Dataset,
    budget: float | None = None,
    total: float | None = None,
    batch_size: int = 8,
) -> RecruitedLayers:
    """
    Finds out, without training, which layers of a model become local at the least cost, and sets its
    `locality_schedule` to these. Layers are taken in by what each costs alone, in bits of the loss, over what it gives,
    in bits of the entropy of its attention (how much less a reader must be told to know which token was attended;
    [definition](../method.md#recruited-layers)): as many as cost no more than a budget together, or up to a sum of
    lambdas. A pass over the data for each layer and a few more, at dial 1 but for the first.

    Args:
        model (a localised language model, or a [`~peft.PeftModel`] around one):
            The model to ask; it is set to evaluation mode. Its `locality_schedule` counts for nothing.
        dataset ([`~datasets.Dataset`]):
            As for [`measure`]: text of the kind that the model is for. Read into memory.
        budget (`float`, *optional*):
            Bits a token by which the loss at dial 1 may be above that at dial 0; above 0. Of the first layers of the
            order as many are taken in as halving finds to fit, by the loss of all together: no more would, where the
            loss rises with each.
        total (`float`, *optional*):
            The sum of the lambdas, in place of a `budget`: above 0 and up to the number of layers. The last layer taken
            in may have a lambda below 1.
        batch_size (`int`, *optional*, defaults to 8):
            Sequences at a time.

    Returns:
        [`RecruitedLayers`]

    Raises:
        ValueError: for a model of another class, a data set without labels, for no `budget` and no `total` or both, and
            for a value outside its limits. The configuration is left as it was.

    Example:

    ```python
    >>> recruited = recruit_layers(model, dataset, budget=0.1)
    >>> recruited.lambdas, recruited.order, recruited.cost
    ([1.0, 0.0, 1.0, 0.0, 0.0, 1.0], [5, 0, 2, 4, 3, 1], 0.08)
    >>> model.config.locality.locality_schedule
    [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    ```
    """
    check_model("model", model)
    locality = model.config.locality
    num_layers = locality.num_hidden_layers
    if (budget is None) == (total is None):
        raise ValueError(f"`budget` is {budget} and `total` {total}; exactly one of them must be given.")
    name, value, most = ("budget", budget, math.inf) if total is None else ("total", total, num_layers)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= most:
        limit = "" if most == math.inf else f" and at most {most}, the number of layers"
        raise ValueError(f"`{name}` is {value!r}; it must be a number above 0{limit}.")
    if not len(dataset):
        raise ValueError("`dataset` holds no sequence: there is no text to measure a cost on.")
    batches = list(evaluation_batches(model, dataset, batch_size, None))
    for inputs, _ in batches:
        check_own_blocks(inputs)

    def measured(lambdas: Sequence[float], layers: Sequence[int], dial: float = 1.0) -> tuple[float, list[float]]:
        """The mean loss, in bits, and the mean entropy of these layers."""
        losses, totals = Losses(), None
        request = {"output_fidelity": layers, "output_entropy": bool(layers)} if layers else {}
        with setting(locality, locality_schedule=list(lambdas)):
            for inputs, labels in batches:
                dials = {"locality_dial": dial, "min_fidelity": 0.0}
                outputs = model(**inputs, **dials, **request, use_cache=False)
                losses.add(outputs, labels)
                totals = add_rows(share_sums(outputs), totals) if layers else None
        if not losses.num_labels:
            raise ValueError("`dataset` has no label that counts: there is no loss to measure a cost by.")
        entropies = share_means(totals)["entropy"].flatten().tolist() if layers else []
        return losses.sums.sum().item() / losses.num_labels / math.log(2), entropies

    def alone(layer: int) -> list[float]:
        return [float(layer == other) for other in range(num_layers)]

    num_searched = 1 if budget is None else num_layers.bit_length()
    with progress_of_passes(model, (1 + num_layers + num_searched) * len(batches), "Recruiting layers"):
        everywhere = range(num_layers)
        free, entropies = measured([0.0] * num_layers, everywhere, dial=0.0)
        costs, gains = [], []
        for layer in everywhere:
            loss, (entropy,) = measured(alone(layer), [layer])
            costs.append(loss - free)
            gains.append(entropies[layer] - entropy)
        order = sorted(everywhere, key=lambda layer: _rank(costs[layer], gains[layer]))

        def lambdas_of(total: float) -> list[float]:
            places = {layer: place for place, layer in enumerate(order)}
            return [max(0.0, min(1.0, total - places[layer])) for layer in everywhere]

        if total is None:
            fits, too_many, cost = 0, num_layers + 1, 0.0
            while too_many - fits > 1:
                middle = (fits + too_many) // 2
                loss, _ = measured(lambdas_of(middle), [])
                if loss - free <= budget:
                    fits, cost = middle, loss - free
                else:
                    too_many = middle
            lambdas = lambdas_of(fits)
        else:
            lambdas = lambdas_of(total)
            cost = measured(lambdas, [])[0] - free
    locality.locality_schedule = lambdas
    return RecruitedLayers(lambdas, order, costs, gains, cost)


def _rank(cost: float, gain: float) -> tuple[int, float]:
    """What costs nothing first, the most helpful before; what gives nothing last."""
    if cost <= 0:
        return 0, cost
    return (1, cost / gain) if gain > 0 else (2, cost)

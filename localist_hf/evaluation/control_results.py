"""What [`measure_controls`] finds."""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class LocalityFigures:
    """
    The locality of some layers on some local sets.

    Args:
        visible_keys (`list[float]`):
            For each layer, the mean number of keys in the local set of a counted position.
        context_fidelity (`list[float]`):
            For each layer, of the attention that goes to other words the part that stays in the local set, in [0, 1];
            NaN where none goes to other words or no position is counted.
        context_share (`list[float]`):
            For each layer, the share of the attention that goes to other words at all.
        fidelity (`list[float]`):
            For each layer, the share of the attention that stays in the local set.
    """

    visible_keys: list[float]
    context_fidelity: list[float]
    context_share: list[float]
    fidelity: list[float]


@dataclass(frozen=True)
class BlockControls:
    """
    The model's own blocks against others, at dial 0, all on the same positions of a layer: those that count under every
    one. Of layers with different sliding windows other positions count, and other lengths show as many keys.

    Args:
        num_previous_blocks (`int`):
            Blocks before its own that are local to a token too.
        num_counted (`int`):
            Positions that the last layer's figures are of.
        own (`LocalityFigures`):
            On the model's own blocks: those of its last layer, for every layer.
        wrong (`LocalityFigures`):
            On the blocks of the texts that follow in the data set. Own blocks must beat them, or the locality is not
            about this text.
        windows (`LocalityFigures`, *optional*):
            On windows that show as many keys as the own blocks on average, as many windows before them being local too:
            interpolated between two lengths. NaN in a layer for which there are none, as of a text too short for any;
            `None` where that is every layer.
        recency (`LocalityFigures`, *optional*):
            On the last n tokens with no blocks at all, likewise.
        window_lengths (`tuple[int, int]`, *optional*), recency_lengths (`tuple[int, int]`, *optional*):
            The two lengths of the last layer, in tokens.
    """

    num_previous_blocks: int
    num_counted: int
    own: LocalityFigures
    wrong: LocalityFigures
    windows: LocalityFigures | None
    recency: LocalityFigures | None
    window_lengths: tuple[int, int] | None
    recency_lengths: tuple[int, int] | None


@dataclass(frozen=True)
class DialFigures:
    """
    The model at one place of the dial.

    Args:
        dial (`float`):
            d in [0, 1].
        perplexity (`float`):
            Of the labels.
        locality (`LocalityFigures`):
            Under the dial, on the blocks that the model finds there.
    """

    dial: float
    perplexity: float
    locality: LocalityFigures


@dataclass(frozen=True)
class DocumentSums:
    """
    What intervals over documents are made of (see [`ratio_values`]): sums over each sequence of the data set.

    Args:
        labels (`list[int]`):
            Number of labels.
        losses (`dict[str, list[float]]`):
            Sums of the labels' cross-entropies in nats: at each dial, as `"dial 0.2"`; as `"self only"`, and at dial 1
            with these blocks given to every layer, as `"own"`, `"wrong"`, `"windows"` and `"recency"`.
        shares (`dict[str, list[tuple[float, float]]]`):
            Block and outside share of the last layer, summed over the positions that count, on the blocks of every
            [`BlockControls`], as `"own 0"`: their kind, and the number of blocks before.
    """

    labels: list[int]
    losses: dict[str, list[float]]
    shares: dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class ControlResults:
    """
    What [`measure_controls`] found.

    Args:
        layers (`list[int]`):
            The layers that the figures are of: those that the schedule localises, and the last.
        num_sink_tokens (`int`):
            The first tokens of a text, local to every one of it; visible keys count them.
        blocks (`list[BlockControls]`):
            Own, wrong and no blocks, for 0 and 1 previous blocks and for as many as the model has.
        dials (`list[DialFigures]`):
            The dial from 0 to 1, under the model's own schedule; 0 only where that localises no layer.
        perplexity_on_blocks (`dict[str, float]`):
            At dial 1, as many blocks before being local as the model has, with the same blocks given to every layer:
            `"own"` (those of the last layer), `"wrong"`, and, where the text is long enough for them, `"windows"` and
            `"recency"`, which show as many keys on average over the layers that are local. Empty where no layer is.
        self_only_perplexity (`float`):
            At dial 1 with blocks of one token. Its distance from the perplexity at dial 1 is what the local part of the
            attention is worth.
        all_local_perplexity (`float`), all_local_self_only_perplexity (`float`):
            At dial 1 with every layer fully local (schedule `"localist"`) and no previous blocks: on the model's own
            blocks, and with blocks of one token. Both must be clearly worse than at dial 0, or the model does not use
            its attention, and constraining that proves nothing.
        divergence (`float`):
            Faithfulness: the mean of KL(p at dial 0 || p at dial 1) over the predictions of the labels, in bits.
        documents ([`DocumentSums`]):
            What of this belongs to each sequence of the data set.
        block_lift (`float`, *optional*):
            Of the own blocks at the given boundaries (see [`block_lift`]).
        share_out_of_reach (`float`, *optional*):
            Where every layer is wholly local: the mean share of the context that a prediction at dial 1 cannot depend
            on.
    """

    layers: list[int]
    num_sink_tokens: int
    blocks: list[BlockControls]
    dials: list[DialFigures]
    perplexity_on_blocks: dict[str, float]
    self_only_perplexity: float
    all_local_perplexity: float
    all_local_self_only_perplexity: float
    divergence: float
    documents: DocumentSums
    block_lift: float | None = None
    share_out_of_reach: float | None = None

    @property
    def perplexity(self) -> float:
        """`float`: at dial 0."""
        return self.dials[0].perplexity

    @property
    def cost_at_dial_1(self) -> float:
        """`float`: perplexity at dial 1 / perplexity at dial 0."""
        return self.dials[-1].perplexity / self.perplexity

    @property
    def all_local_cost_at_dial_1(self) -> float:
        """`float`: perplexity at dial 1 with every layer fully local / perplexity at dial 0."""
        return self.all_local_perplexity / self.perplexity

    def to_dict(self) -> dict[str, Any]:
        """Everything, the ratios too, as JSON has it: `None` for what is undefined."""
        ratios = {"perplexity": self.perplexity, "cost_at_dial_1": self.cost_at_dial_1}
        return as_json(asdict(self) | ratios | {"all_local_cost_at_dial_1": self.all_local_cost_at_dial_1})


def as_json(value: Any) -> Any:
    """What JSON can say of a value: `None` for numbers that are not finite."""
    if isinstance(value, dict):
        return {name: as_json(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

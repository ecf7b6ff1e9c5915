"""What the predictions of one text rest on, by erasure, and what they can depend on at all."""

from typing import Any

import torch
from transformers import PreTrainedModel

from ..evaluation.check_model import core_model, has_own_tokens
from ..evaluation.influence import measure_influence
from ..modeling.locality_dial import check_share
from ..modeling.reach import Reach, no_bound, of_found_blocks, reach_of
from .passage import Passage
from .places import check_place, keep_last, rule_for


#: Measured of no later prediction, and of so many words before it.
MOST_BEFORE, MOST_WORDS = 1024, 256
#: Others wait while a portion is measured: so many tokens, in all texts that it takes.
_PORTION_TOKENS = 4096
_BATCH_TOKENS = 1024
_NUM_DRAWS = 4
_MOST_PORTIONS, _MOST_REACHES = 256, 16


class Dependence:
    """
    What the predictions of a text rest on, and can depend on, with every layer on the blocks that are shown.

    Args:
        model (`PreTrainedModel`):
            The model.
        passage ([`Passage`]):
            The text.
        block_starts (`torch.LongTensor` of shape `(length,)`):
            Position at which each token's block starts.
    """

    def __init__(self, model: PreTrainedModel, passage: Passage, block_starts: torch.Tensor) -> None:
        self._model, self._ids, self._starts = model, passage.input_ids, block_starts
        self._portions: dict[Any, tuple[int, list[float]]] = {}
        self._reaches: dict[float, Reach] = {}

    def reach(self, dial: float) -> Reach:
        """
        What each prediction can depend on.

        Args:
            dial (`float`):
                In [0, 1].

        Returns:
            [`Reach`]: of one text.
        """
        check_share("dial", dial)
        if dial not in self._reaches:
            keep_last(self._reaches, dial, self._reach(float(dial)), _MOST_REACHES)
        return self._reaches[dial]

    def _reach(self, dial: float) -> Reach:
        core, starts = core_model(self._model), self._starts[None]
        locality, documents = core.config.locality, torch.zeros_like(starts)
        if has_own_tokens(self._model):
            return no_bound(documents, "the model has an adapter that puts tokens of its own before a text")
        found = reach_of([starts] * locality.num_hidden_layers, documents, locality, dial, 0.0, True)
        if not found.is_bounded:  # which takes no pass
            return found
        given = {"block_starts": starts.to(core.device), "locality_dial": dial, "min_fidelity": 0.0}
        found = core.reach(self._ids[None].to(core.device), **given)
        if locality.block_partition != "window":  # the model has found them: what is out of reach may move them
            found = of_found_blocks(found)
        return found._replace(first=found.first.cpu())

    def influence(
        self, position: int, dial: float, unit: str, end: int, target: int | None = None
    ) -> tuple[int, list[float]]:
        """
        A portion of what the prediction after a position rests on: see [`measure_influence`], of the text up to there.

        Args:
            position (`int`), dial (`float`), target (`int`, *optional*):
                As for [`Reading.predict`].
            unit (`str`):
                `"block"` or `"token"`.
            end (`int`):
                How many units, from the first of the text, are still to be measured; the last ones of these are now.

        Returns:
            `tuple[int, list[float]]`: how many are left, and the influences of the others, in bits.

        Raises:
            ValueError: for what is not there, a dial outside [0, 1], and what would take too long.
        """
        check_place("position", position, len(self._ids))
        check_share("dial", dial)
        rules = None if target is None else rule_for(self._starts, position, target)
        if position >= MOST_BEFORE:
            raise ValueError(
                f"What a prediction rests on is measured for tokens 0 to {MOST_BEFORE - 1}; this is {position}."
            )
        ids, starts = self._ids[: position + 1], self._starts[: position + 1]
        if len(ids.unique()) < 2:
            raise ValueError("Up to here the text has one token only: there is none to put in its place.")
        if unit not in ("block", "token"):
            raise ValueError(f"`unit` is {unit!r}; it must be 'block' or 'token'.")
        edges = starts.unique().tolist() if unit == "block" else list(range(position + 1))
        least = max(0, len(edges) - MOST_WORDS) if unit == "token" else 0
        if not least < end <= len(edges):
            raise ValueError(f"`end` is {end}; it must be in {least + 1} to {len(edges)}.")
        key = position, dial, unit, end, target
        if key not in self._portions:
            first = max(least, end - max(1, _PORTION_TOKENS // (_NUM_DRAWS * len(ids))))
            stretches = list(zip(edges, [*edges[1:], position + 1], strict=True))[first:end]
            batch_size = max(1, _BATCH_TOKENS // len(ids))
            found = measure_influence(
                self._model, ids, stretches, [position], _NUM_DRAWS, batch_size, seed=first, locality_dial=dial,
                min_fidelity=0.0, rules=rules, block_starts=starts,
            )  # fmt: skip
            left = 0 if first == least else first
            keep_last(self._portions, key, (left, found.values[:, 0].tolist()), _MOST_PORTIONS)
        return self._portions[key]

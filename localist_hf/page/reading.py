"""All that the page shows of one model and one text."""

import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from ..evaluation.attention_rows import AttentionRows
from ..evaluation.check_model import check_model, core_model, num_positions
from ..evaluation.divergence import divergence_bits
from ..evaluation.generation import generate_as_told
from ..evaluation.locality_report import LocalityProfile
from ..evaluation.share_sums import add_rows, share_sums
from ..modeling.block_partition import with_previous_blocks
from ..modeling.fidelity import LayerDial
from ..modeling.local_cache import whole_cache
from ..modeling.locality_dial import check_share
from ..modeling.measurements import SHARES
from .dependence import Dependence
from .passage import Passage
from .pieces import added_text
from .places import check_place, keep_last, rule_for


#: What the objects of a reading take beside its tensors, at most.
_OBJECT_BYTES = 2**19
#: Queries at a time, of all that look at one token.
_QUERIES = 64


@dataclass(frozen=True, eq=False)
class Prediction:
    """
    What a model takes to be the next word.

    Args:
        tokens (`list[str]`), probabilities (`list[float]`):
            The likeliest next tokens, and their probabilities.
        actual_probability (`float`, *optional*):
            Of the token that the text has there; `None` at its end.
        divergence (`float`):
            In bits, from the prediction at dial 0 to this one: see [`divergence_bits`].
    """

    tokens: list[str]
    probabilities: list[float]
    actual_probability: float | None
    divergence: float


@dataclass(frozen=True, eq=False)
class Reading:
    """
    What [`read`] found, and what can be asked of it. All tensors are on the CPU.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The model.
        name (`str`):
            What it is called.
        passage ([`Passage`]):
            The text.
        block_starts (`torch.LongTensor` of shape `(length,)`):
            Position at which each token's block starts, in every layer.
        local_starts (`torch.LongTensor` of shape `(length,)`):
            First position of the blocks that are local to each token: of its own, or of the previous ones that count.
        shares (`torch.FloatTensor` of shape `(num_layers, length, 4)`):
            Each token's self, sink, block and outside share, mean over the heads of a layer.
        profile ([`LocalityProfile`]):
            The means of every layer and head over the text.
    """

    model: PreTrainedModel
    name: str
    passage: Passage
    block_starts: torch.Tensor
    local_starts: torch.Tensor
    shares: torch.Tensor
    profile: LocalityProfile
    _rows: AttentionRows
    #: The whole text's keys and values at dial 0 and at the last other one: what follows a position starts from them.
    _caches: dict[float, DynamicCache] = field(default_factory=dict)
    #: Of the last dial, and of what was told under it: what a pass over the blocks shown has handed to attention.
    _dialled: dict[Any, AttentionRows] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """`int`: layers of the model."""
        return self.shares.shape[0]

    @property
    def num_heads(self) -> int:
        """`int`: heads of a layer."""
        return self.profile.fidelity.shape[1]

    @property
    def has_learned_sink(self) -> bool:
        """`bool`: whether part of the attention goes to a sink that is no token."""
        return self._rows.has_learned_sink

    @cached_property
    def dependence(self) -> Dependence:
        """[`Dependence`]: what its predictions rest on, and can depend on."""
        return Dependence(self.model, self.passage, self.block_starts)

    @property
    def num_bytes(self) -> int:
        """`int`: memory that it takes, without the model's; no more than roughly, for what is not a tensor."""
        tensors = [*self._rows.tensors, self.shares, self.passage.input_ids]
        tensors += [tensor for rows in list(self._dialled.values()) for tensor in rows.tensors]
        for cache in self._caches.values():
            tensors += [tensor for layer in cache.layers for tensor in vars(layer).values()]
        # Queries and keys are often parts of one tensor, and the cache's may be the same.
        storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor)]
        return _OBJECT_BYTES + sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def weights(self, layer: int, position: int, dial: float = 0.0, target: int | None = None) -> torch.Tensor:
        """
        Where one query looks, on the blocks that are shown.

        Args:
            layer (`int`), position (`int`):
                From 0.
            dial (`float`, *optional*, defaults to 0.0), target (`int`, *optional*):
                As for [`predict`].

        Returns:
            `torch.FloatTensor` of shape `(num_heads, position + 1)`: see [`AttentionRows.row`].

        Raises:
            ValueError: for what is not there, or a dial outside [0, 1].
        """
        self._check(layer, position, dial, target)
        return self._weights(layer, position, position + 1, dial, target)[:, 0]

    def looked_at(self, layer: int, position: int, dial: float = 0.0) -> torch.Tensor:
        """
        Who looks at one token: the weight that it has for itself and for each token after it, as [`weights`] has them.

        Args:
            layer (`int`), position (`int`), dial (`float`, *optional*, defaults to 0.0):
                As for [`weights`].

        Returns:
            `torch.FloatTensor` of shape `(num_heads, length - position)`.
        """
        self._check(layer, position, dial, None)
        length = len(self.passage)
        starts = range(position, length, _QUERIES)
        parts = (self._weights(layer, start, min(start + _QUERIES, length), dial) for start in starts)
        return torch.cat([part[:, :, position] for part in parts], dim=1)

    def has_weights(self, dial: float, position: int, target: int | None) -> bool:
        """Whether weights can be given without a pass over the text."""
        return self._is_free(dial) or self._key(dial, position, target) in self._dialled

    def block_attention(self, layer: int) -> torch.Tensor:
        """
        Which blocks the words of each block look at, at dial 0.

        Args:
            layer (`int`):
                From 0.

        Returns:
            `torch.FloatTensor` of shape `(num_heads, num_blocks, num_blocks)`: the share of attention that goes from a
            row's block to a column's, without what tokens give to themselves and to sinks; mean over its tokens of
            their block shares (docs/method.md#block-shares). A row sums to what they give to other words.

        Raises:
            ValueError: for a layer that is not there.
        """
        check_place("layer", layer, self.num_layers)
        device = self.model.device
        starts, tokens = self.block_starts[None].to(device), self.passage.input_ids[None].to(device)
        measured = self._rows.measure({"input_ids": tokens}, [layer], output_block_shares=True, block_starts=starts)
        shares = measured.block_shares[0][0].cpu()
        _, number, count = self.block_starts.unique(return_inverse=True, return_counts=True)
        sums = torch.zeros(len(shares), len(count), len(count)).index_add_(1, number, shares)
        return sums / count[:, None]

    def predict(self, position: int, dial: float, top_k: int = 5, target: int | None = None) -> Prediction:
        """
        What comes after a position, under the dial. Blocks are those that the model finds itself, as in every
        generation.

        Args:
            position (`int`):
                The last token that the model sees, from 0.
            dial (`float`):
                In [0, 1].
            top_k (`int`, *optional*, defaults to 5):
                How many of the next tokens to name.
            target (`int`, *optional*):
                Number of a block that the position, and what is written after it, are told to look at by a [`Rule`],
                beside what has been read of their own block; the dial turns down the rest.

        Raises:
            ValueError: for a position or a block that is not there, or a dial outside [0, 1].
        """
        check_place("position", position, len(self.passage))
        if target is not None:
            rule_for(self.block_starts, position, target)
        free, _ = self._generate(position, 0.0, 1)
        logits = free if dial == 0 else self._generate(position, dial, 1, target)[0]
        probabilities = logits.softmax(-1)
        best = probabilities.topk(min(top_k, len(probabilities)))
        actual = None
        if position + 1 < len(self.passage):
            actual = probabilities[self.passage.input_ids[position + 1]].item()
        before = self.passage.input_ids[: position + 1].tolist()
        return Prediction(
            [added_text(self.passage.tokenizer, before, [token]) for token in best.indices.tolist()],
            best.values.tolist(),
            actual,
            max(0.0, divergence_bits(free, logits).item()),
        )

    def go_on(self, position: int, dial: float, max_new_tokens: int = 12, target: int | None = None) -> str:
        """
        The text that greedy generation goes on with after a position, under the dial. What the checkpoint says of
        generation counts for nothing: an end-of-text token is one like any other.

        Args:
            position (`int`), dial (`float`):
                As for [`predict`].
            max_new_tokens (`int`, *optional*, defaults to 12):
                Tokens of it, as far as the model has positions for them.
            target (`int`, *optional*):
                As for [`predict`].

        Raises:
            ValueError: for a position or a block that is not there, or a dial outside [0, 1].
        """
        limit = num_positions(self.model.config)
        if limit is not None:  # the last token is not read again
            max_new_tokens = min(max_new_tokens, limit - position)
        _, tokens = self._generate(position, dial, max_new_tokens, target)
        before, after = tokens[: position + 1].tolist(), tokens[position + 1 :].tolist()
        return added_text(self.passage.tokenizer, before, after)

    def _is_free(self, dial: float) -> bool:
        """Whether a dial changes nothing."""
        return dial == 0 or not any(self.model.config.locality.locality_lambdas)

    @staticmethod
    def _key(dial: float, position: int, target: int | None) -> tuple[Any, ...]:
        return (dial,) if target is None else (dial, position, target)

    @torch.no_grad()
    def _rows_under(self, dial: float, position: int, target: int | None) -> AttentionRows:
        """What a pass under the dial hands to attention; of what is told, up to the position."""
        if self._is_free(dial):
            return self._rows
        key = self._key(dial, position, target)
        rows = self._dialled.get(key)
        if rows is None:
            core = core_model(self.model)
            rows, tokens = AttentionRows(core.config), self.passage.input_ids[None].to(self.model.device)
            told = {"block_starts": self.block_starts[None].to(tokens.device)}
            if target is not None:
                tokens, told = tokens[:, : position + 1], {"rules": rule_for(self.block_starts, position, target)}
            dials = {"locality_dial": dial, "min_fidelity": 0.0, "use_cache": False}
            core.base_model(tokens, **told, **dials, observer=rows.keep)
            keep_last(self._dialled, key, rows, 1)
        return rows

    def _weights(self, layer: int, first: int, end: int, dial: float, target: int | None = None) -> torch.Tensor:
        """Where some queries look under the dial, `(num_heads, end - first, end)`."""
        locality, is_local = self.model.config.locality, None
        of_layer = LayerDial.of_layer(dial, 0.0, locality.locality_lambdas[layer])
        if of_layer.is_on:
            keys, queries = torch.arange(end), torch.arange(first, end)[:, None]
            is_local = keys >= self.local_starts[first:end, None]
            if target is not None:
                ((low, high), (own, _)) = rule_for(self.block_starts, first, target)[0].targets
                is_local = (keys >= low) & (keys < high) | (keys >= own)
            is_local = is_local | (keys == queries) | (keys < locality.num_sink_tokens)
        return self._rows_under(dial, first, target).rows(layer, first, end, is_local, of_layer)

    def _check(self, layer: int, position: int, dial: float, target: int | None) -> None:
        check_place("layer", layer, self.num_layers)
        check_place("position", position, len(self.passage))
        check_share("dial", dial)
        if target is not None:
            rule_for(self.block_starts, position, target)

    def _generate(
        self, position: int, dial: float, max_new_tokens: int, target: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of the next token, float32, and the text up to the position with the tokens that follow."""
        check_place("position", position, len(self.passage))
        check_share("dial", dial)
        prefix = self.passage.input_ids[None, : position + 1].to(self.model.device)
        greedy = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,  # of one text nothing is padded; without such a token there is a warning
        )
        told = {"locality_dial": dial, "min_fidelity": 0.0}
        if target is not None:
            told["rules"] = rule_for(self.block_starts, position, target)
        cache = self._cache_before(position, 0.0 if "rules" in told else dial)  # no rule names what is before
        outputs = generate_as_told(self.model, prefix, greedy, cache=cache, **told)
        return outputs.logits[0][0].float().cpu(), outputs.sequences[0].cpu()

    @torch.no_grad()
    def _cache_before(self, position: int, dial: float) -> DynamicCache:
        """The keys and values of the tokens before a position, under the dial; of none, where they must be made."""
        config = self.model.config
        if position == 0 or config.locality.block_partition == "delimiter":  # whose search cannot begin in between
            return whole_cache(config)
        if dial not in self._caches:
            cache = whole_cache(config)
            inputs = {"input_ids": self.passage.input_ids[None].to(self.model.device), "cache": cache}
            core_model(self.model).base_model(**inputs, use_cache=True, locality_dial=dial, min_fidelity=0.0)
            for other in self._caches.keys() - {0.0}:
                del self._caches[other]
            self._caches[dial] = cache
        # Its layers are given other tensors, and none is written to.
        cache = copy.copy(self._caches[dial])
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        cache.crop(position - len(self.passage))
        return cache


@torch.no_grad()
def read(
    model: PreTrainedModel, passage: Passage, block_starts: torch.Tensor | None = None, name: str | None = None
) -> Reading:
    """
    Measures one text, in memory that grows linearly with its length. Every layer is measured on the same blocks, those
    of the last one: so that one picture of the text holds for all layers, and they can be compared.

    Args:
        model (a localised language model, or a [`~peft.PeftModel`] around one):
            The model; it is set to evaluation mode.
        passage ([`Passage`]):
            The text.
        block_starts (`torch.LongTensor` of shape `(length,)`, *optional*):
            Blocks in place of the model's own, such as those of another model's reading.
        name (`str`, *optional*):
            What to call the model; by default its Hub id, or the name of its folder, or of its class.

    Returns:
        [`Reading`]

    Raises:
        ValueError: for a model that is not localised, a text longer than the model's positions, tokens that it does not
            have, and for blocks of another length.
    """
    check_model("model", model)
    core, length = core_model(model.eval()), len(passage)
    limit = num_positions(core.config)
    if limit is not None and length > limit:
        raise ValueError(f"`text` has {length} tokens; the model has positions for {limit}.")
    vocabulary_size = core.get_input_embeddings().weight.shape[0]  # an adapter may lie around them
    if (highest := passage.input_ids.max().item()) >= vocabulary_size:
        raise ValueError(f"`text` has the token {highest}; the model knows 0 to {vocabulary_size - 1}.")
    decoder = core.base_model
    input_ids = passage.input_ids[None].to(decoder.device)
    if block_starts is not None and block_starts.shape != passage.input_ids.shape:
        raise ValueError(f"`block_starts` has the shape {tuple(block_starts.shape)}; the text has {length} tokens.")
    rows, cache, locality = AttentionRows(core.config), whole_cache(core.config), core.config.locality
    request = {"cache": cache, "use_cache": True, "locality_dial": 0.0, "min_fidelity": 0.0}
    if block_starts is None:
        request["output_fidelity"] = [locality.num_hidden_layers - 1]
    outputs = decoder(input_ids=input_ids, observer=rows.keep, **request)
    if block_starts is None:
        block_starts = outputs.block_starts[0][0].cpu()
    starts = block_starts[None].to(input_ids.device)
    layers = range(locality.num_hidden_layers)
    wanted = {"output_entropy": True, "output_block_choice": True}
    measured = rows.measure({"input_ids": input_ids}, layers, **wanted, block_starts=starts)
    if name is None:  # a page is for others, whom the place of a folder on this machine does not concern
        known = core.name_or_path or type(core).__name__
        name = Path(known).name if Path(known).is_dir() else known
    documents = torch.zeros_like(block_starts)[None]
    parts = [torch.stack([layer[0].mean(0) for layer in getattr(measured, share)]) for share in SHARES]
    return Reading(
        model=model,
        name=name,
        passage=passage,
        block_starts=block_starts,
        local_starts=with_previous_blocks(block_starts[None], documents, locality.num_previous_blocks).local_starts[0],
        shares=torch.stack(parts, dim=-1).cpu(),
        profile=LocalityProfile.of(add_rows(share_sums(measured, by_head=True))),
        _rows=rows,
        _caches={0.0: cache},
    )


def read_beside(first: Reading, model: PreTrainedModel, passage: Passage, name: str | None = None) -> Reading:
    """
    What another model makes of the same tokens, on the blocks of the first one.

    Args:
        first ([`Reading`]):
            The first model's.
        model, passage, name:
            As for [`read`]; the text as the other model's tokenizer cuts it.

    Raises:
        ValueError: as [`read`], and for other tokens.
    """
    if not torch.equal(passage.input_ids, first.passage.input_ids):
        raise ValueError("`compare` cuts the text into other tokens than the first model; they cannot be compared.")
    return read(model, passage, first.block_starts, name)

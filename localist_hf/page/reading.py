"""All that the page shows of one model and one text."""

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..evaluation.attention_rows import AttentionRows
from ..evaluation.check_model import check_model, core_model, num_positions
from ..evaluation.divergence import divergence_bits
from ..evaluation.generation import generate_as_told
from ..evaluation.locality_report import LocalityProfile
from ..evaluation.share_sums import add_rows, share_sums
from ..modeling import Rule
from ..modeling.block_partition import with_previous_blocks
from ..modeling.local_cache import whole_cache
from ..modeling.locality_dial import check_share
from ..modeling.measurements import SHARES
from .pieces import added_text, decode, text_pieces


#: What the objects of a reading take beside its tensors, at most.
_OBJECT_BYTES = 2**18


@dataclass(frozen=True, eq=False)
class Passage:
    """
    A text as a model's tokenizer cuts it.

    Args:
        input_ids (`torch.LongTensor` of shape `(length,)`):
            The tokens.
        pieces (`list[str]`):
            What each token stands for; end to end they are the text. Of the tokens that share one character the first
            has it, and the others have nothing. Special tokens that the tokenizer adds have their names.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer.
    """

    input_ids: torch.Tensor
    pieces: list[str]
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, text: str) -> "Passage":
        """
        Cuts a text.

        Raises:
            ValueError: for a text without a token, and for one that is no Unicode text.
        """
        _check_unicode(text)
        encoded = tokenizer(text, return_offsets_mapping=tokenizer.is_fast, verbose=False)
        tokens = encoded["input_ids"]
        pieces, own = [""] * len(tokens), []
        if tokenizer.is_fast:
            end = 0
            for place, (token, (_, token_end)) in enumerate(zip(tokens, encoded["offset_mapping"], strict=True)):
                if token_end > 0 or token not in tokenizer.all_special_ids:
                    pieces[place] = text[end : max(end, token_end)]
                    end = max(end, token_end)
                    own.append(place)
                else:
                    pieces[place] = decode(tokenizer, [token])
            if own:
                pieces[own[-1]] += text[end:]  # some leave out the spaces there
        elif bare := tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]:
            places = range(len(tokens) - len(bare) + 1)
            start = next((place for place in places if tokens[place : place + len(bare)] == bare), None)
            own = range(len(tokens)) if start is None else range(start, start + len(bare))
            pieces = [decode(tokenizer, [token]) for token in tokens]
            pieces[own.start : own.stop] = text_pieces(tokenizer, tokens[own.start : own.stop], text)
        if not text.strip() or not own:
            raise ValueError("`text` is empty; it must have at least one word.")
        return cls(torch.tensor(tokens), pieces, tokenizer)

    def __len__(self) -> int:
        return len(self.pieces)


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

    @property
    def num_bytes(self) -> int:
        """`int`: memory that it takes, without the model's; no more than roughly, for what is not a tensor."""
        tensors = [*self._rows.tensors, self.shares, self.passage.input_ids]
        for cache in self._caches.values():
            tensors += [tensor for layer in cache.layers for tensor in vars(layer).values()]
        # Queries and keys are often parts of one tensor, and the cache's may be the same.
        storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor)]
        return _OBJECT_BYTES + sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def weights(self, layer: int, position: int) -> torch.Tensor:
        """
        Where one query looks, at dial 0.

        Args:
            layer (`int`), position (`int`):
                From 0.

        Returns:
            `torch.FloatTensor` of shape `(num_heads, position + 1)`: see [`AttentionRows.row`].

        Raises:
            ValueError: for a layer or a position that is not there.
        """
        _check_place("layer", layer, self.num_layers)
        _check_place("position", position, len(self.passage))
        return self._rows.row(layer, position)

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
        _check_place("layer", layer, self.num_layers)
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
        _check_place("position", position, len(self.passage))
        if target is not None:
            self._rules(position, target)
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

    def _rules(self, position: int, target: int) -> list[Rule]:
        """What tells a position, and what is written after it, to look at a block."""
        edges = [*self.block_starts.unique().tolist(), len(self.passage)]
        _check_place("target", target, int((self.block_starts[: position + 1].unique()).numel()))
        return [Rule((position, None), [(edges[target], edges[target + 1]), (int(self.block_starts[position]), None)])]

    def _generate(
        self, position: int, dial: float, max_new_tokens: int, target: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits of the next token, float32, and the text up to the position with the tokens that follow."""
        _check_place("position", position, len(self.passage))
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
            told["rules"] = self._rules(position, target)
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


def num_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """
    How long the [`Passage`] of a text is: of a tokenizer without offsets the pieces take far longer than the tokens.

    Raises:
        ValueError: for a text that is no Unicode text.
    """
    _check_unicode(text)
    return len(tokenizer(text, verbose=False)["input_ids"])


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
    measured = rows.measure({"input_ids": input_ids}, layers, output_entropy=True, block_starts=starts)
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


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a character of two, which a browser may send
        raise ValueError(
            f"`text` has {text[error.start]!r}, character {error.start}; it must be Unicode text."
        ) from error


def _check_place(name: str, value: int, number: int) -> None:
    if not 0 <= value < number:
        raise ValueError(f"`{name}` is {value}; it must be in 0 to {number - 1}.")

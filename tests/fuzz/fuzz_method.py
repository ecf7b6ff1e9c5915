"""
Random cases of the method: what a localised model gives is held against explicit matrices in float64, and then, asked
in another way (some layers, steps from a cache, other rows, gradients), against itself.
"""

import copy
import functools
import itertools
import random
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import reference
import torch
from architectures import ARCHITECTURES, LAYERS, SLIDING, VOCABULARY, untouched
from matrices import EVERYTHING, Matrices, PointedMatrices, native_pass, targets_of, windows_of
from torch.testing import assert_close
from transformers import DynamicCache, PreTrainedModel

from localist_hf import Rule, localize
from localist_hf.modeling import block_attention, dialled_attention, explicit_attention, fused_attention
from localist_hf.modeling.fidelity import context_fidelity
from localist_hf.modeling.measurements import SHARES


class Bounds(NamedTuple):
    """
    What rounding may come to.

    Args:
        logits (`float`):
            Of logits, as a part of the largest.
        shares (`float`):
            Of shares and fidelity.
        bits (`float`):
            Of the entropy.
        parts (`float`):
            Of `blocks_looked_at` and `top_block_share`, where at least a hundredth goes to other words.
        gradients (`float`):
            Of gradients, as a part of the largest of a parameter's; 0: not compared.
    """

    logits: float
    shares: float
    bits: float
    parts: float
    gradients: float


#: By dtype. Entropies are made in float32, of float64 too. In half precision the shares of a layer are held against the
#: weights, in float64, of the queries and keys that it was handed.
BOUNDS = {
    torch.float64: Bounds(1e-7, 1e-7, 1e-4, 1e-4, 1e-5),
    torch.float32: Bounds(2e-5, 2e-5, 1e-4, 2e-3, 1e-3),
    torch.bfloat16: Bounds(0.2, 3e-2, 1e-2, 0.3, 0.0),
    torch.float16: Bounds(0.05, 5e-3, 5e-3, 0.05, 0.0),
}
#: What a case may be refused for: what the documentation says that it cannot have.
REFUSALS = (
    "hides from it", "hides all targets", "packed in one row see each other", "which are all that the cache keeps",
    "`rules` are given for packed documents", "not where the search for the blocks",
)  # fmt: skip
_DTYPES = (torch.float32,) * 14 + (torch.float64,) * 3 + (torch.bfloat16,) * 2 + (torch.float16,)
_SCHEDULES = ("linear", "quintic", "localist", "upper_half", "reverse_cubic", "distributed")
_UNSEPARATED = ("opt", "gpt_oss")


@dataclass
class Case:
    """What is drawn for a case; the tensors follow from it."""

    number: int
    architecture: str
    dtype: torch.dtype
    sharpness: float
    settings: dict[str, Any]
    ids: torch.Tensor
    documents: torch.Tensor
    position_ids: torch.Tensor | None
    mask: torch.Tensor | None
    dial: float | list[float]
    floor: float
    given: dict[str, Any] = field(default_factory=dict)
    targets: torch.Tensor | None = None
    mode: str = "whole"
    sizes: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = {name: value for name, value in vars(self).items() if not isinstance(value, torch.Tensor)}
        return f"{shown | {'given': sorted(self.given)}}, {len(self.ids)} x {self.ids.shape[1]}"

    @property
    def bounds(self) -> Bounds:
        return BOUNDS[self.dtype]

    @property
    def is_half(self) -> bool:
        return self.dtype in (torch.bfloat16, torch.float16)

    @property
    def request(self) -> dict[str, Any]:
        dial = torch.tensor(self.dial, dtype=torch.float64) if isinstance(self.dial, list) else self.dial
        return {"locality_dial": dial, "min_fidelity": self.floor, **self.given}

    @property
    def inputs(self) -> dict[str, Any]:
        given = {"attention_mask": self.mask, "position_ids": self.position_ids}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def everything(self) -> dict[str, bool]:
        """All that can be measured at once."""
        can_have_blocks = self.targets is None and "local_starts" not in self.given
        return EVERYTHING if can_have_blocks else {"output_fidelity": True, "output_entropy": True}


def draw(number: int, seed: int = 0, with_compiled: bool = True) -> Case:
    """The case of this number; every 500th is compiled, which takes a minute."""
    rng = random.Random(f"method {seed} {number}")
    generator = torch.Generator().manual_seed(rng.randrange(2**62))
    architecture, dtype = rng.choice(list(ARCHITECTURES)), rng.choice(_DTYPES)
    is_compiled = with_compiled and number % 500 == 499
    # Experts are chosen by scores that rounding can turn around; and transformers' eager attention rounds to float32,
    # and makes no number of padding, in float64.
    if is_compiled or architecture == "gpt_oss" or (architecture == "gemma2" and dtype == torch.float64):
        dtype = torch.float32
    batch_size, length = rng.randint(1, 3), rng.choice((1, 2, rng.randint(3, 20), rng.randint(20, 66)))
    ids = torch.randint(3, VOCABULARY, (batch_size, length), generator=generator)
    if rng.random() < 0.1:  # one token again and again
        ids[:] = ids[:, :1]
    documents, mask, position_ids = torch.zeros_like(ids), None, None
    layout = rng.choice(("none", "ones", "padded", "padded", "packed"))
    if layout == "padded":
        mask = torch.zeros_like(ids)
        for row in range(batch_size):
            left = rng.choice((0, rng.randrange(length)))
            right = rng.choice((0, rng.randrange(length - left)))
            mask[row, left : length - right] = 1
            documents[row] = torch.where(mask[row] > 0, left, -1)
        ids = ids.masked_fill(mask == 0, 0)
    elif layout == "ones":
        mask = torch.ones_like(ids)
    elif layout == "packed":
        position_ids = torch.zeros_like(ids)
        for row in range(batch_size):
            starts = sorted({0, *(rng.randrange(length) for _ in range(rng.randint(0, 3)))})
            for start, end in itertools.pairwise((*starts, length)):
                documents[row, start:end] = start
                position_ids[row, start:end] = torch.arange(end - start)
    is_packed = bool((documents > 0).any()) and layout == "packed"
    least = rng.randint(1, 6)
    schedule = rng.choice((*_SCHEDULES, [rng.choice((0.0, 1.0, round(rng.random(), 2))) for _ in range(LAYERS)]))
    settings = {
        "locality_schedule": schedule,
        "block_partition": rng.choice(("semantic", "delimiter", "window")),
        "min_block_length": least,
        "max_block_length": least + rng.choice((0, rng.randint(0, 12), 60)),
        "window_length": rng.randint(1, 20),
        "delimiter_token_ids": rng.sample(range(3, VOCABULARY), rng.randint(1, 8)),
        "semantic_layer": rng.choice((None, *range(LAYERS))),
        "semantic_threshold": rng.choice((0, 0.5, 1.25)),
        "num_previous_blocks": rng.choice((0, 0, 1, 2, 5)),
        "num_sink_tokens": rng.choice((0, 0, 1, 2, 5, 30)),
    }
    dial, floor = (
        rng.choice((0.0, 1.0, 1.0, round(rng.random(), 3))),
        rng.choice((0.0, 0.0, 1.0, round(rng.random(), 3))),
    )
    is_half = dtype in (torch.bfloat16, torch.float16)
    modes = ["whole", "layers", "alone", "generation", *["cached"] * 5, *["gradient"] * 2 * (not is_half)]
    mode = "compiled" if is_compiled else rng.choice(modes)
    if is_packed and mode == "cached":
        mode = "whole"
    if mode not in ("cached", "generation") and rng.random() < 0.15:
        dial = [rng.choice((0.0, 1.0, round(rng.random(), 3))) for _ in range(batch_size)]
    case = Case(
        number, architecture, dtype, rng.choice((0.6, 1.0, 1.0)), settings, ids, documents, position_ids, mask, dial,
        floor, mode=mode,
    )  # fmt: skip
    kind = rng.choice(("none",) * 5 + ("block_starts", "local_starts", "rules", "pointer_blocks"))
    if kind != "none":
        _give(case, kind, rng, is_packed)
    for name, values in _SIZES.items():
        if rng.random() < 0.3:
            case.sizes[name] = rng.choice(values)
    return case


# Constants of how much is done at a time, and other values of them.
_MODULES = {
    "block_attention": block_attention, "explicit_attention": explicit_attention, "fused_attention": fused_attention,
    "dialled_attention": dialled_attention,
}  # fmt: skip
_SIZES = {
    "block_attention._TILE": (1, 3, 16, 64),
    "explicit_attention._CHUNK": (1, 7, 128),
    "fused_attention._CHUNK": (1, 7, 256),
    "dialled_attention._TOLD": (1, 7, 256),
}


def _give(case: Case, kind: str, rng: random.Random, is_packed: bool) -> None:
    """Has the caller say what is local."""
    documents = case.documents
    starts = torch.full_like(documents, -1)
    for row, column in itertools.product(range(len(documents)), range(documents.shape[1])):
        first = documents[row, column].item()
        if first >= 0:
            goes_on = column > first and (kind == "local_starts" or rng.random() > 0.2)
            starts[row, column] = rng.randint(first, column) if kind == "local_starts" else column
            if goes_on and kind != "local_starts":
                starts[row, column] = starts[row, column - 1]
    if kind in ("block_starts", "local_starts"):
        case.given[kind] = starts
    elif kind == "rules":
        if is_packed:
            return
        rules, said = [], []
        for _ in range(rng.randint(1, 3)):
            first = rng.choice((0, rng.randrange(documents.shape[1])))
            targets, query = (first, first + rng.randint(1, 20)), first + rng.randint(0, 20)
            queries = (query, rng.choice((None, query + rng.randint(1, 30))))
            rules.append(Rule(queries, [targets, rng.randint(0, first)]))
            single = rules[-1].targets[1]
            said.append(((query, queries[1] or 10**6), [targets, (single, single + 1)]))
        case.given["rules"] = rules
        case.targets = torch.stack([targets_of(documents, {queries: targets}) for queries, targets in said]).any(0)
    else:
        position = torch.arange(documents.shape[1])
        number = torch.where(documents < 0, -1, (starts == position).cumsum(1) - 1)
        pointers = torch.full_like(documents, -1)
        for row, column in itertools.product(range(len(documents)), range(documents.shape[1])):
            first = documents[row, column].item()
            if first >= 0 and rng.random() < 0.5:
                pointers[row, column] = rng.randint(number[row, first].item(), number[row, column].item())
        case.given |= {"block_starts": starts, "pointer_blocks": pointers}
        is_told = (pointers >= 0)[:, :, None]
        case.targets = is_told & (number[:, None] == pointers[:, :, None]) & (position <= position[:, None])


@functools.cache
def _weights(architecture: str, sharpness: float, dtype: torch.dtype) -> PreTrainedModel:
    """A native model of this dtype."""
    model = copy.deepcopy(untouched(architecture))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= sharpness
    return model.to(dtype)


@functools.cache
def _models(architecture: str, sharpness: float, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A localised model, and the native one with the same weights in float64."""
    native = _weights(architecture, sharpness, dtype)
    wide = copy.deepcopy(native).double()
    wide.config._experts_implementation = "eager"  # the others know no float64
    return localize(copy.deepcopy(native) if dtype != torch.float64 else copy.deepcopy(wide)), wide


def run(case: Case) -> str:
    """
    What came of a case: `"equal"`, or the refusal.

    Raises:
        AssertionError: for a disagreement.
    """
    before = {name: getattr(_MODULES[name.partition(".")[0]], name.partition(".")[2]) for name in case.sizes}
    try:
        for name, value in case.sizes.items():
            module, _, constant = name.partition(".")
            setattr(_MODULES[module], constant, value)
        _run(case)
    except ValueError as error:
        refusal = next((text for text in REFUSALS if text in str(error)), None)
        if refusal is None:
            raise
        return refusal
    finally:
        for name, value in before.items():
            module, _, constant = name.partition(".")
            setattr(_MODULES[module], constant, value)
    return "equal"


def _run(case: Case) -> None:
    model, native = _models(case.architecture, case.sharpness, case.dtype)
    localize(model, **case.settings)
    model.eval(), native.eval()
    if case.mode == "gradient":
        _check_gradients(case, model, native)
        return
    with torch.no_grad():
        base, seen = _observed(case, model, **case.everything)
        matrices = _matrices(case, base.block_starts)
        expected = native_pass(native, matrices, case.ids, **_native_inputs(case))
        _attend(matrices, seen)
        _check_logits(case, "logits", base.logits, expected.logits, case.documents >= 0)
        _check_measurements(case, base, matrices)
        if case.settings["block_partition"] != "semantic" or case.given:
            _check_blocks_of_tokens(case, base.block_starts)
        elif not case.is_half:
            _check_semantic_blocks(case, base.block_starts, matrices)
        _MODES[case.mode](case, model, base)


def _observed(case: Case, model: PreTrainedModel, **measured: Any) -> tuple[Any, dict[int, tuple]]:
    """A pass, and in half precision what each layer's attention was handed."""
    seen: dict[int, tuple] = {}

    def observe(module, query, key, value, mask, **arguments) -> None:
        seen[module.layer_idx] = query, key, value, arguments

    given = {"observer": observe} if case.is_half else {}
    return model(case.ids, **case.inputs, use_cache=False, **case.request, **measured, **given), seen


def _attend(matrices: Matrices, seen: dict[int, tuple]) -> None:
    for layer, (query, key, value, arguments) in seen.items():
        scoring = arguments["scaling"], arguments.get("softcap"), arguments.get("s_aux")
        found = reference.weights_of_scores(query, key, matrices.visible(layer), *scoring)
        matrices.attend(layer, found[0], value.double(), found[1])


def _native_inputs(case: Case) -> dict[str, torch.Tensor]:
    """What the native class is to be told, of padding too."""
    if case.mask is None:
        return case.inputs
    return {"attention_mask": case.mask, "position_ids": (case.mask.cumsum(1) - 1).clamp(min=0)}


def _lambdas(schedule: str | list[float]) -> list[float]:
    if isinstance(schedule, list):
        return schedule
    powers = {"linear": 1, "quintic": 5, "reverse_cubic": 3}
    parts = [layer / (LAYERS - 1) for layer in range(LAYERS)]
    if schedule.startswith("reverse"):
        parts.reverse()
    if schedule in powers:
        return [part ** powers[schedule] for part in parts]
    return {"localist": [1.0] * LAYERS, "distributed": [0.0] * LAYERS, "upper_half": [0.0, 0.0, 1.0, 1.0]}[schedule]


def _matrices(case: Case, block_starts: tuple[torch.Tensor, ...]) -> Matrices:
    lambdas = _lambdas(case.settings["locality_schedule"])
    dials = torch.tensor(case.dial, dtype=torch.float64).reshape(-1, 1, 1)
    previous = 0 if "local_starts" in case.given else case.settings["num_previous_blocks"]
    shared = (
        windows_of(case.architecture), case.documents, block_starts, case.settings["num_sink_tokens"], previous,
        [1 - dials * value for value in lambdas], [case.floor * value for value in lambdas],
    )  # fmt: skip
    return Matrices(*shared) if case.targets is None else PointedMatrices(*shared, targets=case.targets)


#: The largest differences so far, as parts of their bounds.
WORST: dict[str, float] = {}


def _close(case: Case, name: str, actual: torch.Tensor, expected: torch.Tensor, atol: float) -> None:
    if actual.numel() and atol:
        what = re.split(r" of| in| \d", name)[0]
        kind = f"{str(case.dtype).removeprefix('torch.')} {what}"
        WORST[kind] = max(WORST.get(kind, 0.0), (actual.double() - expected.double()).abs().max().item() / atol)
    assert_close(actual.double(), expected.double(), atol=atol, rtol=0, msg=lambda text: f"{name}: {text}")


def _check_logits(case: Case, name: str, actual: torch.Tensor, expected: torch.Tensor, is_token: torch.Tensor) -> None:
    atol = case.bounds.logits * max(1.0, expected[is_token].abs().max().item())
    _close(case, name, actual[is_token], expected[is_token], atol)


def _check_measurements(case: Case, outputs: Any, matrices: Matrices) -> None:
    bounds = case.bounds
    for layer in range(LAYERS):
        expected = matrices.measurements(layer)
        total = sum(getattr(outputs, name)[layer].double() for name in SHARES)
        _close(case, "sum of shares", total, (case.documents >= 0)[:, None].expand_as(total), bounds.shares)
        for name, tensor in expected.items():
            if (found := getattr(outputs, name)) is None:
                continue
            where = f"{name} of layer {layer}"
            if tensor.dtype == torch.bool:
                assert torch.equal(found[layer], tensor), where
            elif name in ("blocks_looked_at", "top_block_share"):
                is_some = expected["block_share"] + expected["outside_share"] > 1e-2
                _close(case, where, found[layer] * is_some, tensor * is_some, bounds.parts)
            else:
                _close(case, where, found[layer], tensor, bounds.bits if name == "entropy" else bounds.shares)


def _check_blocks_of_tokens(case: Case, block_starts: tuple[torch.Tensor, ...]) -> None:
    """The blocks are those that are given, or that the tokens tell."""
    documents, settings = case.documents, case.settings
    if case.targets is not None:
        return
    position = torch.arange(documents.shape[1])
    if case.given:
        expected = torch.where(documents < 0, -1, next(iter(case.given.values())))
    elif settings["block_partition"] == "window":
        expected = torch.where(documents < 0, -1, position - (position - documents) % settings["window_length"])
    else:
        is_delimiter = torch.isin(case.ids, torch.tensor(settings["delimiter_token_ids"]))
        candidates = torch.cat((torch.zeros_like(is_delimiter[:, :1]), is_delimiter[:, :-1]), dim=1)
        limits = settings["min_block_length"], settings["max_block_length"]
        expected = reference.place_block_starts(candidates, documents, *limits)
    for starts in block_starts:
        assert torch.equal(starts, expected), "blocks"


def _check_semantic_blocks(case: Case, block_starts: tuple[torch.Tensor, ...], matrices: Matrices) -> None:
    settings = case.settings
    last = settings["semantic_layer"] if settings["semantic_layer"] is not None else 3
    limits = settings["semantic_threshold"], settings["min_block_length"], settings["max_block_length"]
    for layer in range(LAYERS):
        top = min(layer, last)
        band = range(min(top, 1), top + 1)
        nu = torch.stack([reference.value_lengths(matrices.values[other]) for other in band]).mean(0)
        for row in range(len(nu)):
            for first in sorted(set(case.documents[row].tolist()) - {-1}):
                of_text = torch.where(case.documents[row] == first, first, -1)[None]
                expected, margin = _semantic(nu[row], of_text, *limits)
                is_text = of_text[0] >= 0
                if margin > 3e-4:  # the package leaves ties within 1e-4 to the block before
                    found = block_starts[layer][row][is_text]
                    assert torch.equal(found, expected[0][is_text]), f"semantic blocks of layer {layer}"


def _semantic(nu: torch.Tensor, documents: torch.Tensor, threshold: float, least: int, most: int):
    found, margin = reference.semantic_block_starts(nu[None], documents, threshold, least, most)
    # What is nearer to the threshold than the package's margin counts as a tie there.
    return found, margin


def _check_unmeasured(case: Case, model: PreTrainedModel, base: Any) -> None:
    outputs = model(case.ids, **case.inputs, use_cache=False, **case.request)
    is_off = not case.floor and not any(case.dial if isinstance(case.dial, list) else [case.dial])
    is_off |= not any(_lambdas(case.settings["locality_schedule"]))
    if is_off and case.mask is not None:  # the native model's positions
        return
    _check_logits(case, "what is not measured", outputs.logits, base.logits, case.documents >= 0)


def _check_some_layers(case: Case, model: PreTrainedModel, base: Any) -> None:
    rng = random.Random(case.number)
    layers = sorted(rng.sample(range(LAYERS), rng.randint(1, LAYERS)))
    flags = {name: rng.random() < 0.5 for name in case.everything if name != "output_fidelity"}
    outputs, seen = _observed(case, model, output_fidelity=layers, **flags)
    # Another way to compute a layer rounds otherwise, and the next layer's queries and keys with it.
    matrices = _matrices(case, base.block_starts)
    _attend(matrices, seen)
    _check_logits(case, "logits where some layers are measured", outputs.logits, base.logits, case.documents >= 0)
    for at, layer in enumerate(layers):
        of_itself = matrices.measurements(layer) if case.is_half else {}
        for name in (*SHARES, "fidelity", "fidelity_mask", "visible_keys", *["entropy"] * flags["output_entropy"]):
            bound = case.bounds.bits if name == "entropy" else case.bounds.shares
            expected = of_itself.get(name, getattr(base, name)[layer])
            _close(case, f"{name} of layer {layer} alone", getattr(outputs, name)[at], expected, bound)


def _check_alone(case: Case, model: PreTrainedModel, base: Any) -> None:
    """A text without its padding and the other texts."""
    rng = random.Random(case.number)
    row = rng.randrange(len(case.ids))
    if case.targets is not None or case.given:
        return
    first = rng.choice(sorted(set(case.documents[row].tolist()) - {-1}))
    at = case.documents[row] == first
    request = case.request
    if isinstance(case.dial, list):
        request["locality_dial"] = case.dial[row]
    outputs = model(case.ids[row, at][None], use_cache=False, **request, output_fidelity=True)
    _check_logits(case, "a text alone", outputs.logits, base.logits[row, at][None], torch.ones(1, int(at.sum())) > 0)
    for layer, name in itertools.product(range(LAYERS), SHARES):
        found, expected = getattr(outputs, name)[layer], getattr(base, name)[layer][row, :, at][None]
        _close(case, f"{name} of layer {layer} of a text alone", found, expected, case.bounds.shares)


def _check_cached(case: Case, model: PreTrainedModel, base: Any) -> None:
    """The same in steps, the cache being copied, its rows chosen, repeated or put in another order meanwhile."""
    rng = random.Random(case.number)
    length, rows = case.ids.shape[1], torch.arange(len(case.ids))
    cuts = sorted(rng.sample(range(1, length), min(length - 1, rng.randint(0, 3)))) if length > 1 else []
    if cuts and rng.random() < 0.7:  # single tokens at the end
        cuts = sorted({*cuts, *range(max(1, length - rng.randint(1, 8)), length)})
    cache = DynamicCache(config=model.config) if rng.random() < 0.8 else None
    measured = case.everything if rng.random() < 0.6 else {}
    start = 0
    ends = [*cuts, length]
    for end in ends:
        inputs = {"past_key_values": cache, "use_cache": True}
        if case.mask is not None:
            inputs["attention_mask"] = case.mask[rows, :end]
        elif len(rows) != len(case.ids) or rng.random() < 0.5:
            inputs["position_ids"] = torch.arange(start, end)[None].expand(len(rows), -1)
        given = {
            name: value[rows, :end] if isinstance(value, torch.Tensor) else value for name, value in case.given.items()
        }
        request = {**case.request, **given}
        outputs = model(case.ids[rows, start:end], **inputs, **request, **measured)
        cache = outputs.past_key_values if hasattr(outputs, "past_key_values") else outputs.cache
        is_token = case.documents[rows, start:end] >= 0
        is_off = case.mask is not None and not measured and not _is_dialled(case)
        if is_token.any() and not is_off:
            _check_logits(case, f"steps {start} to {end}", outputs.logits, base.logits[rows, start:end], is_token)
        for name, layer in itertools.product(SHARES if measured else (), range(LAYERS)):
            found, expected = getattr(outputs, name)[layer], getattr(base, name)[layer][rows][..., start:end]
            _close(case, f"{name} of layer {layer} in steps {start} to {end}", found, expected, case.bounds.shares)
        start = end
        change = rng.choice(("none", "none", "copy", "reorder", "select", "repeat", "crop"))
        if end == length or change == "none":
            continue
        if change == "copy":
            cache = copy.deepcopy(cache)
        elif change == "reorder":
            order = torch.tensor(rng.sample(range(len(rows)), len(rows)))
            cache.reorder_cache(order)
            rows = rows[order]
        elif change == "select":
            chosen = torch.tensor(sorted(rng.sample(range(len(rows)), rng.randint(1, len(rows)))))
            cache.batch_select_indices(chosen)
            rows = rows[chosen]
        elif change == "crop" and case.architecture not in SLIDING and not _is_hard(case):
            removed = rng.randint(1, end)
            if removed < end:
                cache.crop(-removed)
                start = end - removed
        elif change == "repeat" and len(rows) < 5:
            cache.batch_repeat_interleave(2)
            rows = rows.repeat_interleave(2)


def _is_hard(case: Case) -> bool:
    """Whether some layer attends to its local sets only: then tokens cannot be removed from a cache."""
    return any(max(case.dial, case.floor) * value == 1 for value in _lambdas(case.settings["locality_schedule"]))


def _check_generation(case: Case, model: PreTrainedModel, base: Any) -> None:
    """A greedy generation from a cache is the one without."""
    if case.given or (case.documents[:, -1] < 0).any() or case.position_ids is not None:
        return
    inputs = {"attention_mask": torch.ones_like(case.ids) if case.mask is None else case.mask}
    search = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, **case.request}
    steps = {"output_logits": True, "return_dict_in_generate": True}
    cached = model.generate(case.ids, **inputs, **search, **steps)
    ids = cached.sequences[:, :-1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 3), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(ids, attention_mask=mask, position_ids=positions, use_cache=False, **case.request).logits[:, -4:]
    # Tokens that may not be generated are made so by their logits only afterwards.
    _check_logits(case, "a generation", torch.stack(cached.logits, dim=1), whole, torch.ones(whole.shape[:2]) > 0)


def _check_compiled(case: Case, model: PreTrainedModel, base: Any) -> None:
    """A compiled model gives the same."""
    if case.targets is not None or isinstance(case.dial, list):
        return
    torch.compiler.reset()
    request = {**case.inputs, **case.request, "use_cache": False, "output_fidelity": True}
    outputs = torch.compile(model)(case.ids, **request)
    _check_logits(case, "compiled", outputs.logits, base.logits, case.documents >= 0)
    for name, layer in itertools.product(SHARES, range(LAYERS)):
        found, expected = getattr(outputs, name)[layer], getattr(base, name)[layer]
        _close(case, f"compiled {name} of layer {layer}", found, expected, case.bounds.shares)


_MODES = {
    "whole": _check_unmeasured,
    "layers": _check_some_layers,
    "alone": _check_alone,
    "cached": _check_cached,
    "generation": _check_generation,
    "compiled": _check_compiled,
}


def _is_dialled(case: Case) -> bool:
    dials = case.dial if isinstance(case.dial, list) else [case.dial]
    return bool((case.floor or any(dials)) and any(_lambdas(case.settings["locality_schedule"])))


def _check_gradients(case: Case, model: PreTrainedModel, native: PreTrainedModel) -> None:
    rng, generator = random.Random(case.number), torch.Generator().manual_seed(case.number)
    of_losses = ("output_fidelity", "output_block_choice")
    measured = {name: value for name, value in case.everything.items() if name in of_losses}
    model.train(), native.train()
    is_checkpointed = rng.random() < 0.2
    if is_checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.zero_grad(), native.zero_grad()
    try:
        outputs = model(case.ids, **case.inputs, use_cache=False, **case.request, **measured)
        matrices = _matrices(case, outputs.block_starts)
        expected = native_pass(native, matrices, case.ids, **_native_inputs(case))
        is_token = case.documents >= 0
        coefficients = torch.randn(outputs.logits.shape, generator=generator) * is_token[..., None]
        losses = []
        for logits in (outputs.logits, expected.logits):
            losses.append((logits.double() * coefficients).sum() / coefficients.numel())
        for layer in range(LAYERS):
            of_layer = torch.randn(outputs.fidelity[layer].shape, generator=generator).double() / outputs.logits.numel()
            of_layer = of_layer * outputs.context_mask[layer][:, None] * 30
            shares = matrices.measurements(layer)
            names = [*SHARES, *(["blocks_looked_at"] if outputs.blocks_looked_at is not None else [])]
            for at, found in enumerate(({name: getattr(outputs, name)[layer] for name in names}, shares)):
                psi = context_fidelity(found["block_share"], found["outside_share"], eps=1e-3)
                asked = psi + found["self_share"]
                if len(names) > len(SHARES):  # as the objective `choice` has it
                    others = (found["block_share"] + found["outside_share"]).detach()
                    asked = asked + others * found["blocks_looked_at"].log()
                losses[at] = losses[at] + (asked * of_layer).sum()
        for loss in losses:
            if loss.requires_grad:
                loss.backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        for name, parameter in native.named_parameters():
            want = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found = torch.zeros_like(parameter) if gradients[name] is None else gradients[name]
            atol = case.bounds.gradients * max(1e-3, want.abs().max().item())
            _close(case, f"gradient of {name}", found, want, atol)
    finally:
        model.zero_grad(), native.zero_grad()
        if is_checkpointed:
            model.gradient_checkpointing_disable()

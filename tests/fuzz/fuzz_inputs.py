"""
Mutated files: a model's `config.json`, a grid's YAML, a run's record and weights. Each is taken as what it says, or
refused in one sentence that names what is wrong.
"""

import copy
import functools
import json
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import localist_hf
from localist_hf import LocalistGPT2Config, LocalistGPT2LMHeadModel, localize
from localist_hf.errors import InputError
from localist_hf.experiments import load_grid
from localist_hf.hub import RunRecord
from localist_hf.hub.loading import load_config, load_model
from localist_hf.hub.model_card import model_card
from localist_hf.modeling import LOCALITY_FIELDS


_SIZES = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_LOCALITY = {"min_block_length": 2, "max_block_length": 6, "num_sink_tokens": 1, "delimiter_token_ids": [3, 4]}
_GRID = {
    "seeds": [0, 1],
    "training": {"max_steps": 3, "learning_rate": 6.0e-4, "distillation_weight": 0.9},
    "locality": {"num_sink_tokens": 1},
    "delimiters": [".", "\n"],
    "separators": {"ends": [".", "!"]},
    "controls": {"dials": [0, 1], "num_previous_blocks": [1], "boundaries": ["\n"]},
    "lora": {"r": 4},
    "sequence_length": 32,
    "measured_sequences": 8,
    "runs": [
        {"variant": ["distributed", "quintic"]},
        {"variant": "quintic", "recipe": "hold", "target_fidelity": [0.5, 0.9]},
        {"variant": "upper_half", "separators": "ends", "num_previous_blocks": 1},
    ],
}
# No number makes a model that does not fit into memory: what is large must be refused, and not tried.
_VALUES = (None, True, False, -1, 0, 1, 2, 3, 7, 100, 0.5, -0.5, 1.5, 2.0, float("nan"), float("inf"), "", "x", "2",
           "quintic", "window", [], [1], ["x"], [0.5, 2.0], [[0]], {}, {"x": 1}, [None])  # fmt: skip
_HUGE = (2**31, 10**30, -(2**63), 1e308)


@dataclass
class Case:
    """A kind of file, and what is done to it."""

    number: int
    kind: str
    rng: random.Random
    #: The keys that lead to what is changed.
    path: tuple = ()
    change: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.change} at {'/'.join(map(str, self.path))}"


def draw(number: int, seed: int = 0) -> Case:
    """The case of this number."""
    rng = random.Random(f"inputs {seed} {number}")
    return Case(number, rng.choice(list(_RUNNERS)), rng)


def run(case: Case) -> str:
    """
    `"taken"` or `"refused"`.

    Raises:
        AssertionError: for a refusal that says too little, and for what is taken for something else.
        Exception: of any other type, for what is neither taken nor refused.
    """
    with tempfile.TemporaryDirectory() as folder:
        return f"{case.kind} {_RUNNERS[case.kind](case, Path(folder))}"


@functools.cache
def _saved() -> dict[str, dict[str, bytes]]:
    """The files of a localised Llama and of a LocalistGPT2, by name."""
    torch.manual_seed(0)
    llama = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        **_SIZES,
    )
    gpt2 = LocalistGPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=64, **_SIZES, **_LOCALITY)
    models = {"llama": localize(LlamaForCausalLM(llama), **_LOCALITY), "gpt2": LocalistGPT2LMHeadModel(gpt2)}
    found = {}
    for name, model in models.items():
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            found[name] = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return found


def _write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Where values stand in lists and dictionaries, the outermost first."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in entries:
        yield (*path, key)
        yield from _paths(entry, (*path, key))


def _mutated(case: Case, values: Any, only: Callable[[tuple], bool] = lambda path: True, huge: bool = True) -> Any:
    """The same with something deleted, replaced, added or called otherwise."""
    values, rng = copy.deepcopy(values), case.rng
    case.path = rng.choice([path for path in _paths(values) if only(path)])
    *before, last = case.path
    inside = functools.reduce(lambda entry, key: entry[key], before, values)
    case.change = rng.choice(("replace",) * 5 + ("delete", "rename", "add"))
    if case.change == "delete":
        del inside[last]
    elif case.change == "rename" and isinstance(inside, dict):
        inside[f"{last}x"] = inside.pop(last)
    elif case.change == "add" and isinstance(inside, dict):
        inside["unknown"] = rng.choice(_VALUES)
    else:
        new = rng.choice(_VALUES + _HUGE * huge)
        inside[last] = new
        case.change = f"replace by {new!r}"
    return values


@contextmanager
def _refused(kinds: tuple[type[Exception], ...], names: list[str]) -> Iterator[list[str]]:
    """Takes a refusal, which must be of these types, in one line, and name one of these."""
    found: list[str] = []
    try:
        yield found
    except kinds as error:
        message = str(error.__cause__ if isinstance(error, StrictDataclassError) and error.__cause__ else error)
        assert message and "\n" not in message.strip(), f"not one line: {message!r}"
        assert any(name in message for name in names), f"it names none of {names}: {message!r}"
        # Of what is transformers' own it is transformers that speaks.
        is_foreign = any(word in message for word in ("object is not", "object has no attribute"))
        assert not is_foreign or names == [""] or "/" in names[0] or "; transformers: " in message, message
        found.append(message)


def _strings(path: tuple) -> list[str]:
    """The names in a path, but for the outermost of those that stand in another."""
    return [str(key) for key in path if isinstance(key, str)]


def _config(case: Case, folder: Path) -> str:
    """By the loader of the commands, and by transformers and `localize`."""
    kind = case.rng.choice(("llama", "gpt2"))
    files = _saved()[kind]
    values = json.loads(files["config.json"])

    def is_locality(path: tuple) -> bool:
        return any(key in ("locality", *LOCALITY_FIELDS) for key in path)

    of_locality = case.rng.random() < 0.7
    values = _mutated(case, values, is_locality if of_locality else lambda path: True, huge=of_locality)
    _write(folder, {**files, "config.json": json.dumps(values).encode()})
    is_ours = case.path[-1] in LOCALITY_FIELDS and case.change not in ("add", "rename")
    names = [*_strings(case.path), "unknown", "locality"] if is_ours else [str(folder)]
    with _refused((InputError, ValueError), names) as refusal:
        config = load_config(str(folder), {})
        model = load_model(str(folder), config)
        _check_taken(case, values, config, model)
    if case.change == "add":
        return "refused" if refusal else "taken"
    with _refused((ValueError, StrictDataclassError), names if is_ours else [""]) as direct:
        try:
            if kind == "gpt2":
                model = LocalistGPT2LMHeadModel.from_pretrained(folder)
            else:
                model = localize(AutoModelForCausalLM.from_pretrained(folder))
            _check_taken(case, values, model.config, model)
        except Exception:
            if is_ours:
                raise
    if is_ours:
        assert bool(direct) == bool(refusal), f"the loader says {refusal}, localize {direct}"
    return "refused" if refusal else "taken"


def _check_taken(case: Case, values: dict, config: Any, model: Any) -> None:
    """What was accepted is what the file says, and works."""
    field, settings = case.path[-1], values.get("locality", values)
    if field in LOCALITY_FIELDS and field in settings and settings[field] is not None:
        found = getattr(config.locality, field)
        assert found == settings[field], f"{field} is {found} for {settings[field]}"
        assert isinstance(found, bool) == isinstance(settings[field], bool)
    with torch.no_grad():
        ids = torch.arange(3, 20)[None] % model.config.vocab_size
        try:
            does_work = model(ids, use_cache=False).logits.isfinite().all()
        except Exception:
            does_work = False
        # What is not ours transformers may take though it makes no number, as a negative base of rotary angles.
        if does_work or field in LOCALITY_FIELDS:
            outputs = model(ids, output_fidelity=True, locality_dial=1.0, use_cache=False)
            assert outputs.logits.isfinite().all()


def _grid(case: Case, folder: Path) -> str:
    values = _mutated(case, _GRID)
    (folder / "grid.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    names = [*_strings(case.path), "unknown", *(f"{name}x" for name in _strings(case.path)), "runs", "seeds", "variant"]
    with _refused((InputError, ValueError), names) as refusal:
        grid = load_grid(folder / "grid.yaml")
        assert list(grid)
        for name in ("seeds", "sequence_length", "measured_sequences", "delimiters"):
            if name in values:
                assert getattr(grid, name) == values[name]
    return "refused" if refusal else "taken"


@functools.cache
def _record() -> dict[str, Any]:
    return json.loads((Path(localist_hf.__file__).parent / "base" / "run.json").read_text(encoding="utf-8"))


def _run_record(case: Case, folder: Path) -> str:
    values = _mutated(case, _record())
    (folder / "run.json").write_text(json.dumps(values), encoding="utf-8")
    with _refused((ValueError,), ["run.json"]) as refusal:
        record = RunRecord.load(folder)
    if refusal:
        detail = refusal[0].partition("is no record of a run: ")[2]
        near = {
            *_strings(case.path),
            "metrics",
            "NaN",
            "Infinity",
            "unknown",
            "locality",
            *(f"{name}x" for name in _strings(case.path)),
        }
        assert any(name in detail for name in near), f"it names none of {near}: {detail!r}"
        assert " " in detail.strip(), detail
        return "refused"
    # What is taken can be used.
    assert record.lambdas and record.settings and record.repository_id()
    assert record.is_comparable(record)
    record.save(folder)
    assert RunRecord.load(folder).settings == record.settings
    str(model_card([record], "me/model"))
    return "taken"


def _weights(case: Case, folder: Path) -> str:
    """Weights whose file or header is damaged are not loaded as others."""
    kind, rng = case.rng.choice(("llama", "gpt2")), case.rng
    files = dict(_saved()[kind])
    content = files["model.safetensors"]
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    names = sorted(header.keys() - {"__metadata__"})
    case.change = rng.choice(("cut", "byte", "entry", "remove", "rename", "not finite", "more", "empty"))
    name = rng.choice(names)
    case.path = (name,)
    if case.change == "entry":
        header = _mutated(case, header, huge=True)
    elif case.change == "remove":
        del header[name]
    elif case.change == "rename":
        header[name.replace("layers.", "layers.1").replace(".h.", ".h.1") + "x"] = header.pop(name)
    elif case.change == "not finite":
        first = header[name]["data_offsets"][0]
        data = data[:first] + struct.pack("<f", float("nan")) + data[first + 4 :]
    text = json.dumps(header).encode()
    mutated = struct.pack("<Q", len(text)) + text + data
    if case.change == "cut":
        mutated = mutated[: rng.randrange(len(mutated))]
    elif case.change == "byte":  # of the header: what weights are is up to them
        at = rng.randrange(8 + len(text))
        mutated = mutated[:at] + bytes([rng.randrange(256)]) + mutated[at + 1 :]
    elif case.change == "more":
        mutated += b"\0" * rng.randint(1, 100)
    elif case.change == "empty":
        mutated = b""
    files["model.safetensors"] = mutated
    _write(folder, files)
    with _refused((InputError, ValueError), [str(folder)]) as refusal:
        model = load_model(str(folder), load_config(str(folder), {}))
        # Taken only where nothing was changed that matters.
        with tempfile.TemporaryDirectory() as other:
            _write(Path(other), _saved()[kind])
            whole = load_model(other, load_config(other, {}))
        for (key, one), (_, two) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
            assert torch.equal(one, two), f"{key} is another"
    return "refused" if refusal else "taken"


_RUNNERS = {"config": _config, "grid": _grid, "record": _run_record, "weights": _weights}

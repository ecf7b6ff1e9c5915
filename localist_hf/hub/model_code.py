"""The code that travels with a model, and what becomes of that of former versions."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from .. import modeling


# What every file of ours begins with, in every version.
_HEADER = b"# Copyright 2026 The localist-hf contributors."
_ENTRIES = ("modeling_localist.py", "modeling_localist_gpt2.py")
# The layer that 0.2.0 took for a `semantic_layer` of none; it is at 3/4 of the depth now, which gives other blocks.
_HALF_DEPTH = b"self.num_hidden_layers // 2 if self.semantic_layer is None"
# Version 0.1 found semantic blocks by a rule of its own, so that such a model keeps its code, with what these lines
# make of its entry: what to look for, what to put there, and how often it is there.
_CACHE_ARGUMENT = """\
# transformers 5.24 has renamed the argument of GPT-2's `forward` that takes the cache.
_CACHE = [name for name in ("cache", "past_key_values") if name in inspect.signature(GPT2Model.forward).parameters]
if len(_CACHE) != 1:
    raise ImportError("GPT-2 of this transformers takes its cache by a name that this code does not know.")
"""
_MENDS_OF_0_1 = (
    ("\nfrom collections.abc import", "\nimport inspect\nfrom collections.abc import", 1),
    ("\n\n@dataclass\nclass LocalistModelOutput(", f"\n{_CACHE_ARGUMENT}\n\n@dataclass\nclass LocalistModelOutput(", 1),
    (
        ") -> LocalistModelOutput:\n",
        ') -> LocalistModelOutput:\n        past_key_values = kwargs.pop("cache", past_key_values)\n',
        1,
    ),
    (
        "\n        locality = build_locality(\n",
        '\n        past_key_values = kwargs.pop("cache", past_key_values)\n        locality = build_locality(\n',
        1,
    ),
    ("past_key_values=past_key_values,\n", "**{_CACHE[0]: past_key_values},\n", 2),
)


def code_files(entry: Path) -> dict[str, Path]:
    """A module of the code that travels with a model and those that it imports, by the names of their files."""
    return {Path(path).name: Path(path) for path in sorted([str(entry), *get_relative_import_files(entry)])}


def is_own_code(content: bytes) -> bool:
    """Whether a file of Python is of the code that travels with models, of whatever version."""
    return content.startswith(_HEADER)


@cache
def _own_code(entry: str) -> Mapping[str, bytes]:
    """The code of this version that has this entry, looked through once for however many repositories."""
    return {name: path.read_bytes() for name, path in code_files(Path(modeling.__file__).with_name(entry)).items()}


def renewed_code(
    config: Mapping[str, Any], code: Mapping[str, bytes], repo_id: str = ""
) -> tuple[dict[str, bytes | None], dict[str, Any]]:
    """
    What this version makes of the code of a repository or a run's folder: its own, which gives the same numbers. A
    model of 0.1 with semantic blocks, for which that does not hold, keeps its code, which learns the name that
    transformers 5.24 has given to the cache.

    Args:
        config (`Mapping[str, Any]`):
            Its `config.json`.
        code (`Mapping[str, bytes]`):
            Its files of Python, by name.
        repo_id (`str`, *optional*):
            The repository.

    Returns:
        `tuple(dict[str, bytes | None], dict[str, Any])`: the content of each file of code that is to be there, or
        `None` for one that is to go; and settings of locality that `config.json` must name, since their defaults are
        others than they were.

    Raises:
        ValueError: where the code is not ours, or somebody else's stands among it.
    """
    entry = _entry(config, repo_id)
    ours = {name for name, content in code.items() if is_own_code(content)}
    if entry not in ours:
        raise ValueError(f"{entry} is not there, or not as localist-hf wrote it.")
    settings = config.get("locality", config)
    is_semantic = settings.get("block_partition", "semantic") == "semantic"
    if is_semantic and "semantic_window" in config:
        return {entry: _mended_0_1(code[entry].decode()).encode()}, {}
    new = _own_code(entry)
    gone = ours - new.keys()
    for name in sorted(code.keys() - ours):
        is_used = any(f"from .{Path(name).stem} import".encode() in code[other] for other in ours)
        uses_gone = any(Path(other).stem.encode() in code[name] for other in gone)
        if name in new or is_used or uses_gone:
            raise ValueError(f"{name} is not of localist-hf, and stands among its code or builds on it.")
    pinned = {}
    if is_semantic and settings.get("semantic_layer") is None and any(_HALF_DEPTH in code[name] for name in ours):
        pinned["semantic_layer"] = config["n_layer"] // 2
    return {**new, **dict.fromkeys(gone)}, pinned


def _entry(config: Mapping[str, Any], repo_id: str) -> str:
    """The file whose class a configuration names."""
    reference = (config.get("auto_map") or {}).get("AutoModelForCausalLM")
    origin, _, name = str(reference).rpartition("--")
    entry = f"{name.partition('.')[0]}.py"
    if entry not in _ENTRIES:
        raise ValueError(f"its `auto_map` names {reference!r}, which is not of localist-hf.")
    if origin not in ("", repo_id):
        raise ValueError(f"its `auto_map` names the code of {origin!r}, which is where to renew it.")
    return entry


def _mended_0_1(text: str) -> str:
    if _CACHE_ARGUMENT in text:
        return text
    for old, new, count in _MENDS_OF_0_1:
        if text.count(old) != count:
            raise ValueError(
                "it was saved by localist-hf 0.1, whose semantic blocks were found by another rule, and its code is "
                "not as 0.1.0 wrote it, so that it can be neither replaced nor mended. Load it with transformers older "
                "than 5.24, or train it anew."
            )
        text = text.replace(old, new)
    return text

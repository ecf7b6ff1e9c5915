"""
Random cases of the method and of files, for an hour: `make fuzz`, or

    python tests/fuzz/fuzz.py [--only method|inputs] [--minutes 60] [--cases N] [--seed 0] [--case NUMBER]

A run goes on after the last case of the one before (`runs/fuzz.json`). What disagrees is printed with the command that
repeats it, kept in that file, and makes the exit status 1.
"""

import argparse
import hashlib
import json
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fuzz_inputs
import fuzz_method
from transformers.utils import logging

import localist_hf
from localist_hf.whole_file import write_whole


FUZZERS: dict[str, ModuleType] = {"method": fuzz_method, "inputs": fuzz_inputs}
_STATE = Path(__file__).resolve().parents[2] / "runs" / "fuzz.json"
# So many of each before it is the other's turn.
_TURN = 50


def main(arguments: list[str] | None = None) -> int:
    """Runs cases; 1 where one disagrees."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--only", choices=FUZZERS, help="one kind of cases; both in turn by default")
    parser.add_argument("--minutes", type=float, default=60.0, help="how long (60)")
    parser.add_argument("--cases", type=int, metavar="N", help="so many cases of each kind, however long they take")
    parser.add_argument("--seed", type=int, default=0, help="which cases there are (0)")
    parser.add_argument("--case", type=int, metavar="NUMBER", help="this case only; needs --only")
    parser.add_argument("--state", type=Path, default=_STATE, help="where it is kept how far a run has come")
    options = parser.parse_args(arguments)
    if options.case is not None and options.only is None:
        parser.error("--case needs --only, which says of what")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    kinds = [options.only] if options.only else list(FUZZERS)
    if options.case is not None:
        case = FUZZERS[options.only].draw(options.case, options.seed)
        print(case)
        print(FUZZERS[options.only].run(case))  # with the traceback of what is wrong
        return 0
    return _run(kinds, options)


def _run(kinds: list[str], options: argparse.Namespace) -> int:
    state = _read(options.state)
    of_seed = {kind: state.setdefault(f"{kind} {options.seed}", {"next": 0, "came": {}, "wrong": []}) for kind in kinds}
    for each in of_seed.values():  # a run may go on with other code
        each.setdefault("code, since case", {}).setdefault(_code(), each["next"])
    end, left = time.monotonic() + 60 * options.minutes, dict.fromkeys(kinds, options.cases)
    num_wrong = 0
    while any(left[kind] != 0 for kind in kinds) and (options.cases is not None or time.monotonic() < end):
        for kind in kinds:
            for _ in range(_TURN if left[kind] is None else min(_TURN, left[kind])):
                num_wrong += _case(kind, of_seed[kind], options.seed)
                left[kind] = None if left[kind] is None else left[kind] - 1
            state["largest differences / bounds"] = dict(sorted(_worst(state).items()))
            options.state.parent.mkdir(parents=True, exist_ok=True)
            write_whole(options.state, json.dumps(state, indent=1) + "\n")
    for kind in kinds:
        came = ", ".join(f"{number} {what}" for what, number in sorted(of_seed[kind]["came"].items()))
        wrong = f"; wrong: {of_seed[kind]['wrong']}" if of_seed[kind]["wrong"] else ""
        print(f"{kind}, seed {options.seed}: {of_seed[kind]['next']} cases so far ({came}){wrong}")
    return int(num_wrong > 0)


def _case(kind: str, state: dict[str, Any], seed: int) -> int:
    """Runs the next case; 1 if it is wrong."""
    number, fuzzer = state["next"], FUZZERS[kind]
    came, is_wrong = Counter(state["came"]), 0
    try:
        came[fuzzer.run(fuzzer.draw(number, seed))] += 1
    except Exception:
        traceback.print_exc()
        print(f"Again: python tests/fuzz/fuzz.py --only {kind} --seed {seed} --case {number}", flush=True)
        came["wrong"] += 1
        state["wrong"].append(number)
        is_wrong = 1
    state["next"], state["came"] = number + 1, dict(came)
    return is_wrong


def _code() -> str:
    """By which the state of the package's code is known again."""
    files = sorted(Path(localist_hf.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


def _worst(state: dict[str, Any]) -> dict[str, float]:
    before = state.get("largest differences / bounds", {})
    return {
        name: max(before.get(name, 0.0), round(fuzz_method.WORST.get(name, 0.0), 4))
        for name in before.keys() | fuzz_method.WORST.keys()
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


if __name__ == "__main__":
    sys.exit(main())

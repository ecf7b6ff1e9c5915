"""No causal language model of transformers is silently wrong, refused for a wrong reason, or fails in depth."""

import re
from pathlib import Path

import pytest
import transformers
from every_architecture import TYPES, Outcome, examine, row_of, table_of, written_table


_CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
_IS_PINNED = f"transformers=={transformers.__version__}\n" in _CONSTRAINTS.read_text(encoding="utf-8")


def written_rows() -> dict[str, str]:
    """What the documentation says of each type."""
    rows = re.findall(r"^\| (`.+?`) \| (.+) \|$", written_table(), re.MULTILINE)
    return {kind: outcome for kinds, outcome in rows for kind in re.findall(r"`(.+?)`", kinds)}


@pytest.mark.skipif(not _IS_PINNED, reason="the table is of the pinned transformers")
def test_the_table_has_every_type() -> None:
    assert set(written_rows()) == set(TYPES)
    assert written_table().startswith(f"Transformers {transformers.__version__} has {len(TYPES)} types;")


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_every_type_works_or_is_refused_and_the_table_says_so(kind: str) -> None:
    outcome = examine(kind)
    assert outcome.partitions or outcome.reason
    if _IS_PINNED and not outcome.reason.startswith("transformers does not make it"):  # what else is installed
        assert row_of(outcome) == written_rows()[kind]
    if kind in ("gpt2", "llama", "mistral", "qwen3", "gpt_oss"):
        assert outcome.partitions == ("semantic", "delimiter", "window")


def test_a_type_that_works_is_examined() -> None:
    assert examine("gemma4_unified_text").partitions == ("delimiter", "window")


def test_what_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localist_hf.modeling.fidelity.LayerDial.turn", lambda self, phi: (phi, 0 * phi))
    with pytest.raises(AssertionError):
        examine("llama")


def test_types_with_the_same_outcome_stand_in_one_row() -> None:
    wrapped = (
        "{0}ForCausalLM cannot be localised: its layers are in a {0}DecoderWrapper, which is none of transformers'."
    )
    outcomes = [
        Outcome("bart", "BartForCausalLM", reason=wrapped.format("Bart")),
        Outcome("llama", "LlamaForCausalLM", ("semantic", "window")),
        Outcome("mbart", "MBartForCausalLM", reason=wrapped.format("MBart")),
    ]
    assert table_of(outcomes).splitlines()[-2:] == [
        "| `llama` | works with `semantic`, `window` |",
        "| `bart`, `mbart` | refused: its layers are in a …DecoderWrapper, which is none of transformers' |",
    ]

"""LocalistTrainingArguments refuses what makes no sense, by name."""

import pytest

from localist_hf.trainers import LocalistTrainingArguments


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("target_fidelity", 0.0, r"\(0, 1\]"),
        ("target_fidelity", 1.5, r"\(0, 1\]"),
        ("target_fidelity", float("nan"), r"\(0, 1\]"),
        ("locality_weight", -1.0, "negative"),
        ("locality_exponent", 3, "1 or 2"),
        ("locality_warmup_steps", -0.5, "negative"),
    ],
)
def test_bad_values_are_refused_by_name(tmp_path, name: str, value: float, allowed: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` is {value}.*{allowed}"):
        LocalistTrainingArguments(output_dir=str(tmp_path), **{name: value})


def test_the_ends_of_the_ranges_are_allowed(tmp_path) -> None:
    args = LocalistTrainingArguments(output_dir=str(tmp_path), target_fidelity=1.0, locality_weight=0)
    assert (args.target_fidelity, args.locality_weight) == (1.0, 0)


def test_nothing_is_pushed_before_the_end(tmp_path) -> None:
    args = LocalistTrainingArguments(output_dir=str(tmp_path), push_to_hub=True)
    assert args.hub_strategy == "end"
    for strategy in ("every_save", "checkpoint", "all_checkpoints"):
        with pytest.raises(ValueError, match=f"`hub_strategy` is '{strategy}'; it must be 'end'"):
            LocalistTrainingArguments(output_dir=str(tmp_path), push_to_hub=True, hub_strategy=strategy)

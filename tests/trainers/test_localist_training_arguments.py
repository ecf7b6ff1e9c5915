"""LocalistTrainingArguments refuses what makes no sense, by name."""

import pytest

from localist_hf.trainers import LocalistTrainingArguments


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("target_fidelity", 0.0, r"\(0, 1\]"),
        ("target_fidelity", 1.5, r"\(0, 1\]"),
        ("target_fidelity", float("nan"), r"\(0, 1\]"),
        ("target_fidelity", "0.9", r"\(0, 1\]"),
        ("locality_objective", "psi", "'context', 'fidelity', 'contrast' or 'choice'"),
        ("target_fidelity", True, r"\(0, 1\]"),
        ("target_blocks", 0.5, "at least 1"),
        ("target_blocks", True, "at least 1"),
        ("target_blocks", float("inf"), "finite"),
        ("target_blocks", "2", "finite number"),
        ("locality_weight", -1.0, "negative"),
        ("locality_weight", True, "finite number"),
        ("locality_weight", float("nan"), "finite"),
        ("locality_weight", float("inf"), "finite"),
        ("locality_weight", "5", "finite number"),
        ("locality_exponent", 3, "1 or 2"),
        ("locality_exponent", True, "1 or 2"),
        ("distillation_weight", True, r"\[0, 1\]"),
        ("max_loss_increase", True, "above 0"),
        ("locality_warmup_steps", -0.5, "negative"),
        ("locality_warmup_steps", float("inf"), "finite"),
        ("learning_rate", -1e-4, "negative"),
        ("learning_rate", float("inf"), "finite"),
        ("weight_decay", float("nan"), "finite"),
        ("max_grad_norm", float("nan"), "finite"),
        ("num_train_epochs", float("inf"), "finite"),
        ("per_device_train_batch_size", 0, "at least 1"),
        ("per_device_eval_batch_size", -8, "at least 1"),
        ("gradient_accumulation_steps", 0, "at least 1"),
        ("gradient_accumulation_steps", 1.5, "whole number"),
    ],
)
def test_bad_values_are_refused_by_name(tmp_path, name: str, value: float, allowed: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` is {value!r}.*{allowed}"):
        LocalistTrainingArguments(output_dir=str(tmp_path), **{name: value})


def test_the_ends_of_the_ranges_are_allowed(tmp_path) -> None:
    ends = {"target_fidelity": 1.0, "locality_weight": 0, "learning_rate": 0.0, "per_device_train_batch_size": 1}
    args = LocalistTrainingArguments(output_dir=str(tmp_path), max_grad_norm=None, **ends)
    assert {name: getattr(args, name) for name in ends} == ends


def test_nothing_is_pushed_before_the_end(tmp_path) -> None:
    args = LocalistTrainingArguments(output_dir=str(tmp_path), push_to_hub=True)
    assert args.hub_strategy == "end"
    for strategy in ("every_save", "checkpoint", "all_checkpoints"):
        with pytest.raises(ValueError, match=f"`hub_strategy` is '{strategy}'; it must be 'end'"):
            LocalistTrainingArguments(output_dir=str(tmp_path), push_to_hub=True, hub_strategy=strategy)


@pytest.mark.parametrize(
    ("metric", "greater_is_better"),
    [
        ("perplexity", False),
        ("eval_perplexity", False),
        ("eval_books_perplexity", False),
        ("entropy", False),
        ("eval_entropy_layer_3", False),
        ("eval_blocks_looked_at_layer_3", False),
        ("top_block_share", True),
        ("loss", False),
        ("eval_loss", False),
        ("fidelity", True),
        ("eval_fidelity_layer_11", True),
        ("accuracy", True),
        (None, None),
    ],
)
def test_the_best_model_has_the_least_perplexity_entropy_or_loss(
    tmp_path, metric: str, greater_is_better: bool
) -> None:
    args = LocalistTrainingArguments(output_dir=str(tmp_path), metric_for_best_model=metric)
    assert args.greater_is_better is greater_is_better


@pytest.mark.parametrize("choice", [True, False])
@pytest.mark.parametrize("metric", ["perplexity", "fidelity"])
def test_an_explicit_choice_of_the_better_is_kept(tmp_path, metric: str, choice: bool) -> None:
    arguments = {"output_dir": str(tmp_path), "metric_for_best_model": metric, "greater_is_better": choice}
    assert LocalistTrainingArguments(**arguments).greater_is_better is choice

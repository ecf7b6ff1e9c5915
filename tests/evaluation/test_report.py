"""Tables hold the numbers that they are given; pictures are written."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from localist_hf.evaluation import comparison_table, layer_table, plot_attention_map, plot_fidelity_over_depth


METRICS = {
    "distributed": [
        {"perplexity": 20.0, "entropy": 5.5, "fidelity": 0.15, "fidelity_layer_0": 0.2, "fidelity_layer_1": 0.1}
    ],
    "quintic": [
        {"perplexity": 20.5, "entropy": 4.25, "fidelity": 0.53, "fidelity_layer_0": 0.21, "fidelity_layer_1": 0.85}
    ],
}


def test_the_comparison_holds_ratios_to_the_baseline() -> None:
    header, rule, distributed, quintic = comparison_table(METRICS, "distributed").splitlines()
    cells = [cell.strip() for cell in quintic.strip("|").split("|")]
    assert cells == ["quintic", "20.50", "1.025", "0.21", "0.85", "8.5", "4.25"]
    assert [cell.strip() for cell in distributed.strip("|").split("|")][2] == "1.000"
    assert len({len(line) for line in (header, rule, distributed, quintic)}) == 1


def test_several_runs_show_their_mean_and_spread() -> None:
    metrics = METRICS["quintic"][0]
    runs = [metrics | {"perplexity": 20.0, "fidelity_layer_1": 0.8}, metrics | {"perplexity": 22.0}]
    table = comparison_table(METRICS | {"quintic": runs}, "distributed", {"quintic": "**quintic**"}, every_layer=False)
    cells = [cell.strip() for cell in table.splitlines()[3].strip("|").split("|")]
    assert cells == [
        "**quintic**", "21.00 (20.00 to 22.00)", "1.050", "0.53", "0.82 (0.80 to 0.85)", "8.2", "4.25"
    ]  # fmt: skip


def test_a_baseline_without_results_is_refused() -> None:
    with pytest.raises(ValueError, match="`baseline` is 'linear'; the results are of 'distributed', 'quintic'"):
        comparison_table(METRICS, "linear")


def test_the_layer_table_has_a_line_for_each_layer() -> None:
    metrics = METRICS["quintic"][0] | {"entropy_layer_0": 5.0, "entropy_layer_1": 2.0}
    assert layer_table(metrics, [0.0, 1.0]).splitlines()[2].split() == ["1", "1.000", "0.850", "2.00"]


def test_pictures_show_what_they_are_given(tmp_path: Path) -> None:
    two = METRICS | {"quintic": [*METRICS["quintic"], METRICS["distributed"][0]]}
    plot_fidelity_over_depth(two, tmp_path / "depth.png", lambdas=[0.0, 1.0])
    weights = torch.tril(torch.ones(6, 6))
    weights = (weights / weights.sum(-1, keepdim=True)).requires_grad_()  # as a model gives them
    starts = torch.tensor([0, 0, 0, 3, 3, 3])
    plot_attention_map({"a": weights, "b": weights}, {"a": starts, "b": starts}, list("abcdef"), tmp_path / "map.png")
    for name in ("depth.png", "map.png"):
        with Image.open(tmp_path / name) as picture:
            assert len(picture.convert("L").getcolors(maxcolors=1 << 16)) > 10  # not an empty page
        assert (tmp_path / name).stat().st_size < 200_000

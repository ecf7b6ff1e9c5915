"""Tables hold the numbers that they are given; pictures are written, and show them."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from localist_hf.evaluation import (
    comparison_table,
    layer_table,
    plot_attention_map,
    plot_over_depth,
    plot_shares_over_depth,
    spread,
)


SHARES = ("self_share", "sink_share", "block_share", "outside_share")


def metrics_of(perplexity: float, *shares: Sequence[float]) -> dict[str, float]:
    """From self, sink, block and outside of each layer."""
    metrics = {"perplexity": perplexity}
    for layer, parts in enumerate(shares):
        of_layer = dict(zip(SHARES, parts, strict=True))
        of_layer |= {"context_share": parts[2] + parts[3], "fidelity": 1 - parts[3], "entropy": 2.5 + layer}
        of_layer["context_fidelity"] = parts[2] / of_layer["context_share"] if of_layer["context_share"] else math.nan
        metrics |= {f"{name}_layer_{layer}": value for name, value in of_layer.items()}
    return metrics


METRICS = {
    "distributed": [metrics_of(20.0, (0.1, 0.3, 0.1, 0.5), (0.1, 0.3, 0.1, 0.5))],
    "quintic": [metrics_of(20.5, (0.1, 0.2, 0.28, 0.42), (0.25, 0.15, 0.48, 0.12))],
}


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_comparison_holds_the_last_layers_shares_and_the_ratio_to_the_baseline() -> None:
    header, rule, distributed, quintic = comparison_table(METRICS, "distributed", every_layer=False).splitlines()
    names = ["configuration", "perplexity", "/ distributed", "last layer: context fidelity", "context share"]
    assert cells_of(header) == [*names, "self", "sink", "fidelity"]
    assert cells_of(quintic) == ["quintic", "20.50", "1.025", "0.80", "0.60", "0.25", "0.15", "0.88"]
    assert cells_of(distributed)[2] == "1.000"
    assert len({len(line) for line in (header, rule, distributed, quintic)}) == 1


def test_the_comparison_holds_every_layers_context_fidelity() -> None:
    header, _, _, quintic = comparison_table(METRICS, "distributed").splitlines()
    names = ["context fidelity 0", "1", "last layer: context share", "self", "sink", "fidelity"]
    assert cells_of(header)[3:] == names
    assert cells_of(quintic) == ["quintic", "20.50", "1.025", "0.40", "0.80", "0.60", "0.25", "0.15", "0.88"]


def test_several_runs_show_their_mean_and_spread() -> None:
    metrics = METRICS["quintic"][0]
    runs = [metrics | {"perplexity": 20.0, "context_fidelity_layer_1": 0.7}, metrics | {"perplexity": 22.0}]
    table = comparison_table(METRICS | {"quintic": runs}, "distributed", {"quintic": "**quintic**"}, every_layer=False)
    assert cells_of(table.splitlines()[3]) == [
        "**quintic**", "21.00 (20.00 to 22.00)", "1.050", "0.75 (0.70 to 0.80)", "0.60", "0.25", "0.15", "0.88"
    ]  # fmt: skip


def test_what_is_undefined_is_a_hyphen() -> None:
    metrics = metrics_of(9.0, (0.7, 0.3, 0.0, 0.0))
    assert layer_table(metrics, [1.0]).splitlines()[1].split()[2:4] == ["-", "0.000"]
    assert cells_of(comparison_table({"a": [metrics]}, "a").splitlines()[2])[3] == "-"
    assert spread([0.5, math.nan]) == "-"
    assert spread([0.5, 0.7]) == "0.60 (0.50 to 0.70)"


def test_a_baseline_without_results_is_refused(tmp_path: Path) -> None:
    message = "`baseline` is 'linear'; the results are of 'distributed', 'quintic'"
    with pytest.raises(ValueError, match=message):
        comparison_table(METRICS, "linear")
    with pytest.raises(ValueError, match=message):
        plot_shares_over_depth(METRICS, "linear", tmp_path / "shares.png")


def test_the_layer_table_has_a_line_for_each_layer() -> None:
    header, first, second = layer_table(METRICS["quintic"][0], [0.0, 1.0]).splitlines()
    titles = ["context fidelity", "context share", "self", "sink", "fidelity", "entropy (bits)"]
    assert header.split() == " ".join(["layer", "lambda", *titles]).split()
    assert second.split() == ["1", "1.000", "0.800", "0.600", "0.250", "0.150", "0.880", "3.50"]
    assert len(header) == len(first) == len(second)


def test_pictures_show_what_they_are_given(tmp_path: Path) -> None:
    two = METRICS | {"quintic": [*METRICS["quintic"], METRICS["distributed"][0]]}
    plot_over_depth(two, "context_fidelity", tmp_path / "context.png", lambdas=[0.0, 1.0])
    plot_over_depth(two, "entropy", tmp_path / "entropy.png")
    plot_over_depth(two, "fidelity", tmp_path / "depth.png", lambdas=[0.0, 1.0])
    weights = torch.tril(torch.ones(6, 6))
    weights = (weights / weights.sum(-1, keepdim=True)).requires_grad_()  # as a model gives them
    starts = torch.tensor([0, 0, 0, 3, 3, 3])
    plot_attention_map({"a": weights, "b": weights}, {"a": starts, "b": starts}, list("abcdef"), tmp_path / "map.png")
    for name in ("context.png", "entropy.png", "depth.png", "map.png"):
        with Image.open(tmp_path / name) as picture:
            assert len(picture.convert("L").getcolors(maxcolors=1 << 16)) > 10  # not an empty page
        assert (tmp_path / name).stat().st_size < 200_000


def test_an_unknown_quantity_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`quantity` is 'psi'; allowed are 'context_fidelity', 'context_share', 's"):
        plot_over_depth(METRICS, "psi", tmp_path / "depth.png")


def areas(path: Path) -> dict[str, float]:
    """How much of the picture has each band's colour, hatches left out."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    colours = {"self_share": "#e69f00", "sink_share": "#cc79a7", "block_share": "#0072b2", "outside_share": "#d9d9d9"}
    return {name: (pixels == ImageColor.getrgb(colour)).all(-1).mean() for name, colour in colours.items()}


def test_the_bands_are_as_large_as_the_shares(tmp_path: Path) -> None:
    """Of the one band without a hatch the area is measured, of the others the order."""
    small, large = (metrics_of(9.0, *[(0.2, 0.1, block, 0.7 - block)] * 3) for block in (0.1, 0.4))
    for name, metrics in (("small", small), ("large", large)):
        plot_shares_over_depth({"base": [metrics, metrics]}, "base", tmp_path / f"{name}.png")
    small, large = areas(tmp_path / "small.png"), areas(tmp_path / "large.png")
    assert large["block_share"] > 3 * small["block_share"]
    assert small["outside_share"] > large["outside_share"] > 0
    assert small["self_share"] > small["sink_share"] > 0


def test_each_configuration_has_a_panel_and_sinks_are_shown_where_there_are_any(tmp_path: Path) -> None:
    without = {name: [metrics_of(9.0, (0.3, 0.0, 0.2, 0.5))] for name in ("distributed", *"abcd")}
    widths = {}
    for number in (1, 2, 5):
        path = tmp_path / f"{number}.png"
        plot_shares_over_depth(dict(list(without.items())[:number]), "distributed", path)
        assert areas(path)["sink_share"] == 0
        assert path.stat().st_size < 200_000
        with Image.open(path) as picture:
            widths[number] = picture.size
    assert widths[1][0] < widths[2][0] < widths[5][0]
    assert widths[1][1] == widths[2][1] < widths[5][1]  # a second row
    undefined = [metrics_of(9.0, (math.nan,) * 4, (0.3, 0.1, 0.2, 0.4))]
    plot_shares_over_depth({"distributed": undefined}, "distributed", tmp_path / "undefined.png")
    assert areas(tmp_path / "undefined.png")["block_share"] > 0

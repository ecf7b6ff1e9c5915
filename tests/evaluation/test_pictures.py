"""Pictures draw the numbers that they are given, legibly, and are small enough to be published."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image, ImageColor
from scipy import stats

from localist_hf.configuration import PAPER_VARIANTS, VARIANTS
from localist_hf.evaluation import plot_heads, plot_shares_over_depth
from localist_hf.evaluation.pictures import plot_frontier, plot_over_depth, plot_over_dial


def line_of(figure: Figure, label: str):
    return next(line for line in figure.axes[0].get_lines() if line.get_label() == label)


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def written(draw: Callable, *arguments, **others) -> Figure:
    """The figure of what is drawn; what was written is a picture, and small."""
    page = io.BytesIO()
    figure = draw(*arguments, path=page, **others)
    assert page.getbuffer().nbytes < 200_000
    with Image.open(page) as picture:
        assert len(picture.convert("L").getcolors(maxcolors=1 << 16)) > 10  # no empty page
    return figure


def metrics_at(metrics_of: Callable, perplexity: float, psi: float) -> dict[str, float]:
    """Two layers, the last of this context fidelity."""
    return metrics_of(perplexity, (0.1, 0.2, 0.14, 0.56), (0.1, 0.1, 0.8 * psi, 0.8 - 0.8 * psi))


def test_depth_is_drawn_as_means_with_the_interval_as_a_band(metrics_of: Callable) -> None:
    psis = (0.5, 0.6, 0.64)
    results = {
        "distributed": [metrics_at(metrics_of, 20, 0.3)],
        "quintic": [metrics_at(metrics_of, 21, psi) for psi in psis],
    }
    figure = written(plot_over_depth, results, "context_fidelity", lambdas=[0.0, 1.0])
    assert line_of(figure, "quintic").get_ydata() == pytest.approx([0.2, 0.58])
    assert line_of(figure, "schedule (lambda)").get_ydata() == pytest.approx([0, 1])
    (band,) = figure.axes[0].collections  # one run has none
    low, high = stats.t.interval(0.95, 2, loc=np.mean(psis), scale=stats.sem(psis))
    heights = band.get_paths()[0].vertices
    at_last = heights[heights[:, 0] == 1, 1]
    assert (at_last.min(), at_last.max()) == pytest.approx((low, high))
    assert legend_of(figure) == ["schedule (lambda)", "distributed", "quintic"]
    assert figure.legends[0].get_title().get_text() == "mean and 95 % interval over seeds"
    assert figure.axes[0].get_title() == "Attention to other words that stays in the local set"
    alone = written(plot_over_depth, {"a": results["distributed"]}, "entropy", title="Mine")
    assert alone.axes[0].get_title() == "Mine"
    assert alone.axes[0].get_ylabel().endswith("(bits)")
    assert line_of(alone, "a").get_ydata() == pytest.approx([2.5, 3.5])
    assert alone.legends[0].get_title().get_text() == ""


def test_an_unknown_quantity_is_refused(metrics_of: Callable, tmp_path: Path) -> None:
    results = {"distributed": [metrics_at(metrics_of, 20, 0.3)]}
    with pytest.raises(ValueError, match="`quantity` is 'psi'; allowed are 'context_fidelity', 'context_share', 's"):
        plot_over_depth(results, "psi", tmp_path / "depth.png")


def test_no_two_configurations_look_alike(metrics_of: Callable) -> None:
    names = [*VARIANTS, *(f"target 0.{digit}" for digit in range(1, 9))]
    results = {name: [metrics_at(metrics_of, 20, 0.3)] for name in reversed(names)}
    figure = written(plot_over_depth, results, "fidelity")
    looks = {name: (line.get_color(), line.get_marker()) for name in names if (line := line_of(figure, name))}
    assert len(set(looks.values())) == len(names)
    # Neither by colours alone, nor otherwise in another picture.
    assert len({looks[name][0] for name in PAPER_VARIANTS}) == len(PAPER_VARIANTS)
    assert len({looks[name][1] for name in VARIANTS}) == len(VARIANTS)
    fewer = written(plot_over_depth, {name: results[name] for name in ("quintic", "mine")[:1]}, "fidelity")
    line = line_of(fewer, "quintic")
    assert (line.get_color(), line.get_marker()) == looks["quintic"]
    # Colours of Okabe and Ito, and grey.
    allowed = {"#000000", "#56b4e9", "#0072b2", "#009e73", "#e69f00", "#d55e00", "#cc79a7", "#7f7f7f"}
    assert {to_hex(colour) for colour, _ in looks.values()} <= allowed


def places(*perplexities: float | None) -> list[dict]:
    """As a record has them."""
    last = max(1, len(perplexities) - 1)
    return [
        {"dial": step / last, "perplexity": value, "locality": {"fidelity": [0.5]}}
        for step, value in enumerate(perplexities)
    ]


def test_the_dial_is_drawn_from_the_records(tmp_path: Path) -> None:
    dials = {
        "distributed": [places(20.0), places(22.0)],
        "quintic": [places(21.0, 22.0, 24.0), places(22.0, 24.0, 27.0)],
        "linear": [places(23.0, None, 25.0)],
    }
    dials = json.loads(json.dumps(dials))
    figure = written(plot_over_dial, dials, labels={"quintic": "**quintic**"})
    assert line_of(figure, "**quintic**").get_xdata() == pytest.approx([0, 0.5, 1])
    assert line_of(figure, "**quintic**").get_ydata() == pytest.approx([21.5, 23, 25.5])
    gap = line_of(figure, "linear").get_ydata()
    assert math.isnan(gap[1]) and gap[2] == 25
    across = line_of(figure, "distributed")
    assert across.get_linestyle() == "--"
    assert set(across.get_ydata()) == {21.0}
    assert across.get_xdata() == pytest.approx([0, 1])  # of the axes' width
    (reference,) = figure.axes[0].patches
    # Two runs at 20 and 22: 12.706 standard errors of 1 to either side.
    assert reference.get_y() == pytest.approx(21 - 12.706, abs=1e-3)
    assert reference.get_height() == pytest.approx(2 * 12.706, abs=1e-3)
    (band,) = figure.axes[0].collections
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(25.5 + 1.5 * 12.706, abs=1e-3)
    with pytest.raises(ValueError, match=r"`dials\['quintic'\]` holds runs at dials that differ"):
        plot_over_dial({"quintic": [places(1.0, 2.0), places(1.0, 2.0, 3.0)]}, tmp_path / "dial.png")


def test_the_frontier_has_a_point_and_bars_for_each_configuration(metrics_of: Callable) -> None:
    psis, perplexities = (0.7, 0.8, 0.75), (21.0, 22.0, 24.0)
    results = {
        "distributed": [metrics_at(metrics_of, value, 0.3) for value in (19.0, 21.0)],
        "quintic": [metrics_at(metrics_of, *values) for values in zip(perplexities, psis, strict=True)],
        "linear": [metrics_at(metrics_of, 25.0, 0.5)],
        "only itself": [metrics_of(9.0, (0.5, 0.5, 0, 0), (1, 0, 0, 0))],
    }
    figure = written(plot_frontier, results, "distributed", labels={"linear": "a line"})
    axes = figure.axes[0]
    points = {bars.get_label(): bars for bars in axes.containers}
    assert list(points) == ["distributed", "quintic", "a line"]  # without what has no context fidelity
    point, _, (across, up) = points["quintic"].lines
    assert (point.get_xdata()[0], point.get_ydata()[0]) == pytest.approx((0.75, np.mean(perplexities) / 20))
    for bar, values, axis in ((across, psis, 0), (up, np.array(perplexities) / 20, 1)):
        ends = bar.get_segments()[0][:, axis]
        assert ends == pytest.approx(stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values)))
    assert points["a line"].lines[2] == ()  # one run has no interval
    assert {text.get_text() for text in axes.texts} == {"distributed", "quintic", "a line"}
    assert not figure.legends
    assert "distributed" in axes.get_ylabel()
    with pytest.raises(ValueError, match="`baseline` is 'cubic'"):
        plot_frontier(results, "cubic", io.BytesIO())


def test_names_at_the_points_cover_nothing_or_stand_in_a_legend(metrics_of: Callable) -> None:
    def at(*points: tuple[float, float]) -> dict:
        results = {"distributed": [metrics_at(metrics_of, 20.0, 0.1)]}
        for number, (perplexity, psi) in enumerate(points):
            results[f"configuration {number}"] = [metrics_at(metrics_of, perplexity, psi)]
        return results

    near = written(plot_frontier, at((21.0, 0.8), (21.1, 0.8), (21.1, 0.81), (22, 0.9)), "distributed")
    boxes = [text.get_window_extent() for text in near.axes[0].texts]
    assert len(boxes) == 5
    assert not any(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])
    centres = [bars.lines[0] for bars in near.axes[0].containers]
    centres = near.axes[0].transData.transform([(line.get_xdata()[0], line.get_ydata()[0]) for line in centres])
    assert not any(box.contains(*centre) for box in boxes for centre in centres)
    crowd = at(*[(21 + 0.01 * step, 0.8 + 0.001 * step) for step in range(12)])
    crowded = written(plot_frontier, crowd, "distributed")
    assert not crowded.axes[0].texts
    assert legend_of(crowded) == list(crowd)


def areas(path: Path) -> dict[str, float]:
    """How much of the picture has each band's colour, hatches left out."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    colours = {"self_share": "#e69f00", "sink_share": "#cc79a7", "block_share": "#0072b2", "outside_share": "#d9d9d9"}
    return {name: (pixels == ImageColor.getrgb(colour)).all(-1).mean() for name, colour in colours.items()}


def test_the_bands_are_as_high_as_the_mean_shares(metrics_of: Callable, tmp_path: Path) -> None:
    runs = [metrics_of(9.0, *[(0.2, 0.1, block, 0.7 - block)] * 3) for block in (0.1, 0.3)]
    figure = plot_shares_over_depth({"base": runs}, "base", tmp_path / "shares.png", {"base": "the base"})
    panel = figure.axes[0]
    assert panel.get_title() == "the base"
    heights = [[bar.get_height() for bar in band] for band in panel.containers]
    assert heights == [pytest.approx([share] * 3) for share in (0.2, 0.1, 0.2, 0.5)]
    assert [bar.get_y() for bar in panel.containers[3]] == pytest.approx([0.5] * 3)
    assert all(area > 0 for area in areas(tmp_path / "shares.png").values())
    with pytest.raises(ValueError, match="`baseline` is 'linear'; the results are of 'base'"):
        plot_shares_over_depth({"base": runs}, "linear", tmp_path / "shares.png")


def test_each_configuration_has_a_panel_and_sinks_are_shown_where_there_are_any(
    metrics_of: Callable, tmp_path: Path
) -> None:
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


def test_heads_are_drawn_as_they_are() -> None:
    values = torch.tensor([[0.1, 0.2, math.nan], [0.4, 0.5, 0.6]])
    figure = written(plot_heads, values, title="Heads")
    (image,) = figure.axes[0].get_images()
    drawn = np.asarray(image.get_array().filled(math.nan))
    assert drawn == pytest.approx(values.T.numpy(), nan_ok=True)
    assert image.get_cmap().name == "cividis"

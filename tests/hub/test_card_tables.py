"""What the tables of a model card are made of."""

import math
from types import SimpleNamespace

import pytest

from localist_hf.hub.card_tables import comparison, metrics_by_seed


DOCUMENTS = {"labels": [10, 30], "losses": {"dial 0": [30.0, 90.0], "dial 1": [40.0, 120.0]}}


LAYER = {"context_fidelity_layer_0": 0.5, "context_share_layer_0": 0.9, "visible_keys_layer_0": 7.0}


def run(seed: int = 0, documents: dict | None = DOCUMENTS, dial: dict | None = None, is_local: bool = True):
    return SimpleNamespace(
        seed=seed,
        metrics={"perplexity": 20.0 + seed} | LAYER,
        controls=None if documents is None else {"documents": documents},
        dial=dial or {},
        lambdas=[0.0, float(is_local)],
        training={},
    )


@pytest.mark.parametrize(
    ("of_run", "losses"),
    [
        (run(), "dial 0"),
        (run(dial={"locality_dial": 1.0}), "dial 1"),
        (run(dial={"locality_dial": 1.0}, is_local=False), "dial 0"),  # no layer has anything to turn
        (run(dial={"locality_dial": 0.25}), None),  # not among the dials of the controls
        (run(dial={"min_fidelity": 0.5}), None),
        (run(documents=None), None),
        (SimpleNamespace(**vars(run()) | {"controls": {"perplexity": 20.0}}), None),  # of version 0.2
    ],
)
def test_the_losses_of_documents_are_those_of_the_perplexity(of_run: SimpleNamespace, losses: str | None) -> None:
    found = metrics_by_seed({"quintic": [of_run]})["quintic"][0]
    expected = {"perplexity": 20.0} | LAYER
    if losses is not None:
        expected |= {"document_losses": DOCUMENTS["losses"][losses], "document_labels": [10, 30]}
    assert found == expected


def test_ratios_are_for_other_text_too_where_documents_are_known() -> None:
    # Two seeds 0.1 above on the one document and 0.3 on the other, which has three times the labels.
    higher = DOCUMENTS | {"losses": {"dial 0": [31.0, 99.0]}}
    groups = {"distributed": [run(0), run(1)], "quintic": [run(0, higher), run(1, higher)]}
    shown = SimpleNamespace(**vars(run()) | {"name": "quintic"})
    row = comparison(shown, groups, "distributed", 0).splitlines()[3]
    assert row.startswith("| **quintic** |")
    assert "| 1.284 [" in row  # exp(0.25); of their perplexities, which are alike here, it would be 1.000
    groups["quintic"][1] = run(1, documents=None)
    assert "| 1.000 [1.000, 1.000] |" in comparison(shown, groups, "distributed", 0).splitlines()[3]
    # One seed gives no interval, and another one than the baseline's is compared all the same.
    groups["quintic"] = [run(2)]
    assert f"| {22 / math.sqrt(20 * 21):.3f} |" in comparison(shown, groups, "distributed", 0).splitlines()[3]
    assert "/ distributed" not in comparison(shown, {"quintic": [run(0)]}, "distributed", 0)

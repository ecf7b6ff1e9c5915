"""The study: what stands in docs/results.md and the README is what the committed records give."""

import importlib
import json
import math
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from localist_hf.evaluation.statistics import holm, mean_interval, paired_difference, ratio_values
from localist_hf.evaluation.tables import with_ends
from localist_hf.experiments import load_grid


ROOT = Path(__file__).parents[1]


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "study"))
    return importlib.import_module("results")


@pytest.fixture
def records(results: ModuleType) -> ModuleType:
    return importlib.import_module("records_of_runs")


@pytest.fixture
def statistics(results: ModuleType) -> ModuleType:
    return importlib.import_module("statistics_of_runs")


@pytest.fixture
def claims(results: ModuleType) -> ModuleType:
    return importlib.import_module("claims")


def test_every_page_is_made_of_the_committed_records(results: ModuleType) -> None:
    for path, text in results.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is not of these records: `make results`"
    models = results.load_models()
    assert models
    for model in models:
        for picture in ("frontier", "perplexity_over_dial"):
            assert f"{picture}_{model.name}.png" in results.RESULTS.read_text(encoding="utf-8")
            assert (ROOT / "docs" / f"{picture}_{model.name}.png").stat().st_size < 200_000


def test_the_records_are_of_the_grids_that_stand_beside_them(records: ModuleType) -> None:
    for path in sorted(records.RECORDS.glob("*.jsonl")):
        grid = load_grid(ROOT / "study" / f"{path.stem}.yaml")
        assert records.Study(path).runs.keys() == {run.name for run in grid}


def line(name: str, seed: int, losses: list[float], at_1: list[float]) -> dict:
    """A run of two documents of 10 and 30 labels."""
    documents = {
        "labels": [10, 30],
        "losses": {"dial 0": losses, "dial 1": at_1},
        "shares": {"own 0": [[3.0, 1.0], [2.0, 2.0 + seed]], "wrong 0": [[2.0, 2.0], [1.0, 3.0]]},
    }
    return {"name": name, "seed": seed, "controls": {"documents": documents}}


@pytest.fixture
def study(records: ModuleType, tmp_path: Path):
    lines = []
    for seed in (2, 0, 1):
        lines.append(line("distributed", seed, [20.0 + seed, 60.0], [20.0 + seed, 60.0]))
        lines.append(line("quintic", seed, [22.0, 64.0 + seed], [24.0 + seed, 70.0]))
    lines.append(line("quintic", 7, [1.0, 1.0], [1.0, 1.0]))  # of a seed that the other does not have yet
    (tmp_path / "small.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in lines))
    return records.Study(tmp_path / "small.jsonl")


def test_comparisons_are_of_the_seeds_that_all_have_and_pair_them(statistics: ModuleType, study) -> None:
    assert study.seeds == [0, 1, 2]
    found = statistics.cost(study, "quintic")
    quintic = [(22 + 64 + seed) / 40 for seed in range(3)]
    distributed = [(20 + seed + 60) / 40 for seed in range(3)]
    assert found.estimate.mean == pytest.approx(math.exp(np.mean(quintic) - np.mean(distributed)))
    assert found.estimate.low <= found.estimate.mean <= found.estimate.high
    kept = statistics.cost_at_dial_1(study, "quintic")
    at_1 = [(24 + seed + 70) / 40 for seed in range(3)]
    assert kept.estimate.mean == pytest.approx(math.exp(np.mean(at_1) - np.mean(quintic)))
    # Of documents too.
    sums = ([[24 + seed, 70] for seed in range(3)], [[22, 64 + seed] for seed in range(3)])
    of_dial_1, of_dial_0 = (ratio_values(each, [[10, 30]] * 3) for each in sums)
    assert kept.p_value == pytest.approx(paired_difference(of_dial_1, of_dial_0).p_value)
    assert statistics.cost(study, "quintic", expected=found.estimate.high).p_value == pytest.approx(0.05)
    held = statistics.cost(study, "quintic", setting="dial 1")
    assert held.estimate.mean == pytest.approx(math.exp(np.mean(at_1) - np.mean(distributed)))
    against = statistics.cost_at_dial_1(study, "quintic", "distributed")
    assert against.estimate.mean == pytest.approx(kept.estimate.mean)


def test_psi_is_the_ratio_of_the_sums_over_documents(statistics: ModuleType, study) -> None:
    found = statistics.own_minus(study, "quintic", "wrong")
    own = sum((3 + 2) for _ in range(3)) / sum((3 + 1 + 2 + 2 + seed) for seed in range(3))
    assert found.estimate.mean == pytest.approx(own - 3 / 8)
    of_own = ratio_values([[3, 2]] * 3, [[4, 4 + seed] for seed in range(3)])
    assert found.p_value == pytest.approx(paired_difference(of_own, ratio_values([[2, 1]] * 3, [[4, 4]] * 3)).p_value)


def test_a_verdict_needs_the_interval_and_the_corrected_p_value(claims: ModuleType, statistics: ModuleType) -> None:
    comparison, interval = statistics.Comparison, mean_interval([1.0])._replace
    below = comparison(interval(mean=0.9, low=0.85, high=0.95), 1.0, 0.01)
    claim = claims.Primary("a against b", "ratio", lambda study: below, is_expected_below=True, neutral=1.0)
    finding = claims.Finding(claim, below, 0.04)
    assert finding.verdict == "as claimed"
    assert finding._replace(p_value=0.06).verdict == "no difference shown"
    assert finding._replace(p_value=math.nan).verdict == "no difference shown"
    assert finding._replace(primary=claim._replace(is_expected_below=False)).verdict == "not as claimed"
    around = comparison(interval(mean=0.9, low=0.85, high=1.05), 1.0, 0.01)
    assert finding._replace(found=around).verdict == "no difference shown"


def test_p_values_test_what_is_claimed(results: ModuleType, claims: ModuleType) -> None:
    """Each is below 0.05 where the interval leaves out what its verdict is about: of the 5 %, a ratio of 1.05."""
    for model in results.load_models():
        findings = claims.findings(model.study)
        assert findings[0].primary.neutral == 1.05
        corrected = holm([each.found.p_value for each in findings])
        for (primary, found, p_value), expected in zip(findings, corrected, strict=True):
            low, high = found.estimate[1:3]
            assert (found.p_value < 0.05) is not (low <= primary.neutral <= high), (model.name, primary.question)
            assert p_value == expected


def test_aims_are_met_or_missed_by_their_numbers(
    records: ModuleType, claims: ModuleType, statistics: ModuleType
) -> None:
    study = records.Study(records.RECORDS / "small.jsonl")
    table, _, met = claims.aims(study).partition("\n\n")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    missed = {name for _, name, _, verdict in rows if verdict == "missed"}
    all_met = [name for name in dict.fromkeys(name for _, name, _, _ in rows) if name not in missed]
    assert met == f"All of its aims are met by: {', '.join(all_met) or 'none'}."
    found = {(name, aim.partition(":")[0]): (measured, verdict) for aim, name, measured, verdict in rows}
    gap = "own above another text's blocks"
    for name in ("quintic", "quintic-contrast", "quintic-delimiter"):
        measured, verdict = found[name, gap]
        assert measured == with_ends(statistics.own_minus(study, name, "wrong").estimate)
        assert verdict == ("met" if float(measured.split()[0]) >= 0.1 else "missed")
    price = statistics.cost(study, "quintic-previous1").estimate.mean
    assert found["quintic-previous1", "perplexity"] == (
        with_ends(statistics.cost(study, "quintic-previous1").estimate),
        "met" if price <= 1.02 else "missed",
    )


def test_settings_are_those_of_the_grid_and_not_of_names(
    records: ModuleType, statistics: ModuleType, tmp_path: Path, monkeypatch
) -> None:
    """One block before is what all runs share here, so that no name says it."""
    (tmp_path / "shared.yaml").write_text(
        "{seeds: [0], locality: {num_previous_blocks: 1}, runs: [{variant: [distributed, quintic, window]}, "
        "{variant: quintic, target_fidelity: [0.5, 0.25]}, {variant: quintic, num_previous_blocks: [0]}, "
        "{variant: [quintic, window], locality_weight: 0, locality_dial: 1}]}"
    )
    monkeypatch.setattr(records, "GRIDS", tmp_path)
    lines = [line(run.name, 0, [20.0, 60.0], [20.0, 60.0]) for run in load_grid(tmp_path / "shared.yaml")]
    for each in lines:
        each["controls"]["documents"]["shares"] = {
            f"{kind} {number}": [[share, 1.0]] * 2
            for number in (0, 1)
            for kind, share in (("own", 3.0 - 2 * number), ("wrong", 1.0))
        }
    lines += [
        {"name": name, "untrained": True} for name in ("distributed", "quintic", "quintic-weight0-dial1", "window")
    ]
    (tmp_path / "shared.jsonl").write_text("".join(f"{json.dumps(each)}\n" for each in lines))
    study = records.Study(tmp_path / "shared.jsonl")
    assert list(study.runs)[:2] == ["distributed", "quintic"]  # the paper's first
    assert study.settings["quintic"]["num_previous_blocks"] == 1
    # psi with one block before, 1 / 2 of either, and not 3 / 4 against 1 / 2.
    assert statistics.own_minus(study, "quintic", "wrong").estimate.mean == 0
    assert statistics.own_minus(study, "quintic-previous0", "wrong").estimate.mean == 0.25
    assert study.varied("target_fidelity") == ["quintic-target0.25", "quintic-target0.5", "quintic"]
    assert study.varied("num_previous_blocks") == ["quintic-previous0", "quintic"]
    assert study.held_pairs == [("quintic", "quintic-weight0-dial1"), ("window", "window-weight0-dial1")]
    assert [study.untrained(name)["name"] for name in ("quintic-target0.5", "quintic-weight0-dial1")] == [
        "quintic", "quintic-weight0-dial1"
    ]  # fmt: skip
    assert [records.is_semantic(study.runs[name][0]) for name in ("quintic", "window-weight0-dial1")] == [True, False]


def test_a_study_is_asked_what_its_runs_can_answer(results: ModuleType) -> None:
    asked = {
        model.name: [section.removeprefix("#### ")[0] for section in results.answers(model.study)]
        for model in results.load_models()
    }
    assert asked == {"small": list("123456789"), "smollm2": list("25689"), "book": list("256789")}


def test_the_papers_claims_stand_beside_the_figures_of_every_study_that_has_them(
    results: ModuleType, statistics: ModuleType
) -> None:
    paper = importlib.import_module("paper_claims")
    studies = {model.title: model.study for model in results.load_models()}
    lines = paper.paper_table(studies).splitlines()[2:]
    assert len(lines) == len(paper.CLAIMS)
    for claim, line in zip(paper.CLAIMS, lines, strict=True):
        assert "2510." in claim.source or "2511." in claim.source
        for title, study in studies.items():
            has_figure = claim.measure is not None and study.runs.keys() >= {*claim.needs} and claim.measure(study)
            assert (f"<br>{title}: " in line) == bool(has_figure)
            if claim.needs == ("quintic", "window") and has_figure:
                assert f"<br>{title}: window {statistics.cost(study, 'window', 'quintic')}" in line
        # A sentence that holds whatever is measured has no figure of ours.
        assert not re.search(r"\d\.\d", claim.shows.replace("14.64", ""))
    # Another study, without most of the runs.
    few = {"few": SimpleNamespace(runs={"distributed": []})}
    assert paper.paper_table(few).count("no study has the runs for it") == sum(
        bool(each.needs) for each in paper.CLAIMS
    )


def test_agreement_is_compared_on_the_same_texts_and_counts_at_the_dial_that_it_is_of(results: ModuleType) -> None:
    tables = results.agreement_tables

    def found(*values: float | None) -> dict[int, dict]:
        return {0: {(0.0, "erasure"): {"beyond_nearness": {"last layer": list(values)}}}}

    agreements = object.__new__(tables.Agreements)
    agreements.seeds = [0]
    agreements.found = {"free": found(None, 0.2, 0.3, 0.5), "held": found(0.9, 0.3, 0.5, None)}
    pair = tables.Reading("held", 0.0), tables.Reading("free", 0.0)
    assert str(tables._against(agreements, *pair, "erasure", "last layer")).startswith(
        "0.15"
    )  # of the second and the third
    assert agreements.values(pair[0], "erasure", "beyond_nearness", "last layer", [0]).tolist() == [[0.9, 0.3, 0.5]]
    study = SimpleNamespace(
        settings={"held": {"training_dials": [1]}},
        runs={"held": [{"last_layer_on_base_blocks": {"context_fidelity": 0.4, "top_block_share": 0.6}}]},
    )
    assert tables._is_concentrated(study, tables.Reading("held", 1.0))
    assert not tables._is_concentrated(study, tables.Reading("held", 0.0))

"""`localist-hf family`: tiny, but through every stage."""

import json
from pathlib import Path

import pytest

from localist_hf.cli import family
from localist_hf.cli.main import main


def test_parts_share_no_topic_and_have_their_sizes() -> None:
    topics = family.python_reference()
    parts = family.split_topics(topics)
    assert sorted(text for part in parts.values() for text in part) == sorted(topics.values())
    total = sum(map(len, topics.values()))
    for name, share in family.SHARES.items():
        assert sum(map(len, parts[name])) / total == pytest.approx(share, abs=0.03)


def test_all_stages_and_a_second_run_that_keeps_what_is_there(tmp_path: Path, capsys, monkeypatch) -> None:
    # A few topics are enough to go through every stage.
    topics = dict(list(family.python_reference().items())[:14])
    monkeypatch.setattr(family, "python_reference", lambda: topics)
    folder = tmp_path / "family"
    flags = ["--output-dir", str(folder), "--base-steps", "2", "--steps", "2"]
    main(["family", *flags, "--variants", "distributed", "quintic"])
    printed = capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    assert set(results["own_blocks"]) == set(results["base_blocks"]) == {"distributed", "quintic"}
    perplexity = results["own_blocks"]["quintic"]["perplexity"]
    assert f"| quintic       | {perplexity:.2f}" in printed
    assert (folder / "table.md").read_text().strip() in printed
    assert "quintic, loaded with AutoModelForCausalLM" in printed
    for name in ("fidelity_over_depth.png", "attention_map.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")

    weights = (folder / "quintic" / "model.safetensors").stat().st_mtime_ns
    main(["family", *flags, "--variants", "distributed", "quintic", "localist"])
    assert f"already in {folder / 'quintic'}" in capsys.readouterr().out
    assert (folder / "quintic" / "model.safetensors").stat().st_mtime_ns == weights
    assert (folder / "localist" / "eval_results.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "`steps` is 0"),
        (["--variants", "quintic"], "distributed must be among them"),
        (["--variants", "sextic"], "sextic"),
    ],
)
def test_bad_flags_are_refused(flags: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as error:
        main(["family", *flags])
    assert error.value.code == 2
    assert message in capsys.readouterr().err

"""`localist-hf family`: tiny, but through every stage."""

from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from localist_hf.cli import family
from localist_hf.cli.main import main
from localist_hf.evaluation import measure_controls
from localist_hf.hub import RunRecord


def test_parts_share_no_topic_and_have_their_sizes() -> None:
    topics = family.python_reference()
    parts = family.split_topics(topics)
    assert sorted(text for part in parts.values() for text in part) == sorted(topics.values())
    total = sum(map(len, topics.values()))
    for name, share in family.SHARES.items():
        assert sum(map(len, parts[name])) / total == pytest.approx(share, abs=0.03)


@pytest.fixture
def few_topics(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough to go through every stage; the controls, which pass over the text 26 times, on two sequences of it."""
    topics = dict(list(family.python_reference().items())[:14])
    monkeypatch.setattr(family, "python_reference", lambda: topics)
    monkeypatch.setattr(
        family,
        "measure_controls",
        lambda model, text, **settings: measure_controls(model, text.select([0, 1]), **settings),
    )


@pytest.mark.usefixtures("few_topics")
def test_all_stages_and_a_second_run_that_keeps_what_is_there(tmp_path: Path, capsys) -> None:
    folder, cards, readme = tmp_path / "family", tmp_path / "cards", tmp_path / "README.md"
    readme.write_text("before\n<!-- family -->\nold\n<!-- /family -->\nafter\n")
    flags = ["--output-dir", str(folder), "--base-steps", "2", "--steps", "2"]
    main(["family", *flags, "--variants", "distributed", "quintic", "--model-cards", str(cards)])
    printed = capsys.readouterr().out
    record = RunRecord.load(folder / "quintic")
    assert f"| quintic       | {record.metrics['perplexity']:.2f}" in printed
    assert (folder / "table.md").read_text().strip() in printed
    assert "quintic, loaded with AutoModelForCausalLM" in printed
    for name in ("context_fidelity_over_depth.png", "shares_over_depth.png", "attention_map.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert record.metrics_on_base_blocks["perplexity"] == pytest.approx(record.metrics["perplexity"], rel=1e-6)
    assert record.metrics_on_base_blocks["fidelity"] != record.metrics["fidelity"]
    for variant in ("distributed", "quintic"):
        # The first of them was trained before the other was there; its card has both all the same.
        card = (cards / variant / "README.md").read_text()
        assert card == (folder / variant / "README.md").read_text()
        assert "localist-gpt2-base" in card
        assert f"{record.metrics['perplexity']:.2f}" in card

    weights = (folder / "quintic" / "model.safetensors").stat().st_mtime_ns
    (folder / "distributed" / "run.json").unlink()  # as if it had been interrupted
    main(["family", *flags, "--variants", "distributed", "quintic", "localist", "--readme", str(readme)])
    printed = capsys.readouterr().out
    assert f"already in {folder / 'quintic'}" in printed
    assert f"already in {folder / 'distributed'}" not in printed
    assert (folder / "quintic" / "model.safetensors").stat().st_mtime_ns == weights
    assert RunRecord.load(folder / "localist").variant == "localist"
    text = readme.read_text()
    assert text.startswith("before\n<!-- family -->\nOn the blocks that each model finds itself:\n\n| configuration")
    assert "On the blocks that the base finds:" in text
    assert text.endswith("<!-- /family -->\nafter\n")
    assert "old" not in text
    assert "2 steps of 8 sequences" in text

    with pytest.raises(SystemExit) as error:
        main(["family", "--output-dir", str(folder), "--base-steps", "2", "--steps", "3"])
    assert error.value.code == 2
    assert "holds a run of 2 steps from seed 0, not of 3" in capsys.readouterr().err

    (folder / "quintic" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(SystemExit) as error:
        main(["family", *flags, "--variants", "distributed", "quintic"])
    assert error.value.code == 2
    assert "are not those that its run.json was measured on" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.usefixtures("few_topics")
def test_several_seeds_are_trained_from_one_base(tmp_path: Path, capsys) -> None:
    folder = tmp_path / "family"
    flags = ["--base-steps", "1", "--steps", "2", "--seeds", "3", "4"]
    main(["family", "--output-dir", str(folder), "--variants", "distributed", *flags])
    assert "[4/5] distributed, seed 4: 2 steps from the base" in capsys.readouterr().out
    first, second = (RunRecord.load(folder / name) for name in ("distributed", "distributed-seed4"))
    assert (first.seed, second.seed) == (3, 4)
    assert first.metrics["perplexity"] != second.metrics["perplexity"]
    assert "2 runs with the seeds 3, 4" in (folder / "distributed" / "README.md").read_text()


@pytest.mark.usefixtures("few_topics")
def test_another_model_takes_the_place_of_the_base(tmp_path: Path, tokenizer, capsys) -> None:
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, n_positions=64, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0
    )
    for name in ("small", "other"):
        GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    folder = tmp_path / "family"
    flags = ["--output-dir", str(folder), "--steps", "1", "--variants", "distributed", "quintic"]
    main(["family", *flags, "--model", str(tmp_path / "small")])
    assert "sequences of 64 tokens" in capsys.readouterr().out
    assert not (folder / "base").exists()
    record = RunRecord.load(folder / "quintic")
    assert (record.base_run, record.training["learning_rate"], record.license) == ("small", 5e-5, None)
    assert "tokenised by the base's tokenizer" in record.data["details"]
    assert record.metrics_on_base_blocks["perplexity"] == pytest.approx(record.metrics["perplexity"], rel=1e-6)

    with pytest.raises(SystemExit):
        main(["family", *flags, "--model", str(tmp_path / "other")])
    assert "holds a run from another model than" in capsys.readouterr().err

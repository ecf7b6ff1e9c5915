"""`localist-hf explain`: what it says is what the library measures, and a picture stands beside it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.cli.main import main
from localist_hf.evaluation import measure_influence


TEXT = "Sentence number 12 says something. some more of the words here\nnumber 3 says more. Sentence number"


@pytest.fixture
def model(
    make_model: Callable[..., LocalistGPT2LMHeadModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> LocalistGPT2LMHeadModel:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    model = make_model(vocab_size=len(tokenizer), locality_schedule="localist", min_block_length=4)
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    return model


@pytest.mark.parametrize("dial", [0.0, 0.5, 1.0])
def test_what_is_said_is_what_is_measured(
    model: LocalistGPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture, dial: float
) -> None:
    main(["explain", "model", "--text", TEXT, "--dial", str(dial), "--draws", "2"])
    printed = capsys.readouterr().out
    found = json.loads(Path("runs/explain/model/explanation.json").read_text())
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    last = len(ids) - 1
    assert found["position"] == last
    assert "".join(block["text"] for block in found["blocks"]) == TEXT
    for unit, entries in (("block", found["blocks"]), ("token", found["words"])):
        for method, name in (("erasure", "influence"), ("knock_out", "knock_out")):
            expected = measure_influence(
                model, ids, unit, [last], 2, batch_size=4096 // len(ids), locality_dial=dial, min_fidelity=0.0,
                method=method,
            )  # fmt: skip
            assert [entry[name] for entry in entries] == pytest.approx(expected.values[:, 0].tolist(), abs=1e-5)
        assert sum(entry["attention"]["last layer"] for entry in entries) == pytest.approx(1, abs=1e-4)
    starts = model(ids[None], locality_dial=dial, output_fidelity=[3]).block_starts[0]
    logits = model(ids[None], locality_dial=dial, block_starts=starts).logits[0, -1]
    assert found["predicted"][0]["probability"] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-5)
    assert f"after token {last}, " in printed
    # Only a hard mask puts anything out of sight.
    over = "in sight" if dial == 1 else "before"
    assert f"rank correlation with what erasure finds, over the words {over}: " in printed
    if dial == 1:
        outside = found["words"][0]["attention"]["last layer"]
        assert outside == 0
        assert found["reach"]["is_bounded"]
        # The model has found the blocks: what is out of reach may move them.
        assert found["reach"]["statement"].startswith("Given these blocks, no token before")
        assert found["reach"]["first"] == starts[0, -1] > 0
        assert f"This one depends on none before token {starts[0, -1]}." in printed
        changed = [word["influence"] for word in found["words"]]
        assert not any(changed[: starts[0, -1]])
        assert any(changed[starts[0, -1] :])
    else:
        assert found["reach"]["statement"].startswith(f"No bound by local sets: layer 0 has lambda 1.0 at dial {dial}")
    assert Path("runs/explain/model/explanation.png").read_bytes().startswith(b"\x89PNG")


def test_an_earlier_prediction(model: LocalistGPT2LMHeadModel, capsys: pytest.CaptureFixture) -> None:
    Path("text.txt").write_text(TEXT)
    main(["explain", "model", "--text-file", "text.txt", "--position", "9", "--draws", "1", "--output-dir", "out"])
    found = json.loads(Path("out/explanation.json").read_text())
    assert len(found["words"]) == 10
    assert found["blocks"][-1]["end"] == 10
    assert TEXT.startswith("".join(block["text"] for block in found["blocks"]))
    assert not found["words"][0]["gradients"]
    # Its own files make room.
    main(["explain", "model", "--text", TEXT, "--draws", "1", "--output-dir", "out", "--gradients"])
    found = json.loads(Path("out/explanation.json").read_text())
    for name in ("gradient x input", "integrated gradients"):
        assert sum(word["gradients"][name] for word in found["words"]) == pytest.approx(1, abs=1e-5)
    printed = capsys.readouterr().out
    assert "integrated gradients |" in printed
    assert max(len(line) for line in printed.splitlines() if line.startswith("|")) < 160  # what a terminal shows


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--dial", "1.5"], "`dial` is 1.5; it must be in [0, 1]"),
        (["--position", "2"], "`position` is 2; 5 tokens must stand before it"),
        (["--position", "99"], "`position` is 99, of a text of"),
        (["--draws", "0"], "`draws` is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_explained_is_refused(
    model: LocalistGPT2LMHeadModel, capsys: pytest.CaptureFixture, flags: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["explain", "model", "--text", TEXT, *flags])
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not Path("runs/explain/model/explanation.json").exists()

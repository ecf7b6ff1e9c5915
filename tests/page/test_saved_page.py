"""The page as one file: it holds the model's numbers, needs nothing else, and a text stays text in it."""

import base64
import gzip
import html
import json
import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from architectures import localised, text
from torch.testing import assert_close
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import localist_hf
from localist_hf import LocalistGPT2LMHeadModel, localize
from localist_hf.page import Page, Passage, read, read_beside, saved_page, view


TEXT = "Sentence number 12 says something. some more of the words here\nnumber 3 says more."


@pytest.fixture
def model(model_for_tokenizer: PreTrainedModel) -> PreTrainedModel:
    return localize(model_for_tokenizer, min_block_length=3, max_block_length=12, num_sink_tokens=1)


def unpack(packed: str, dtype: str, *shape: int) -> torch.Tensor:
    array = np.frombuffer(gzip.decompress(base64.b64decode(packed)), dtype)
    return torch.from_numpy(array.astype(np.float64)).reshape(shape)


def data_of(page: Page) -> dict[str, Any]:
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.html, re.DOTALL)
    return json.loads(data)["page"]


def test_the_file_holds_the_numbers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    passage = Passage.of(tokenizer, TEXT)
    reading, length = read(model, passage, name="a model"), len(passage)
    data = data_of(saved_page([reading]))
    assert data["tokens"] == passage.pieces
    assert data["blockStarts"] == reading.block_starts.tolist()
    (shown,) = data["readings"]
    assert (shown["name"], shown["numHeads"], shown["numSinks"]) == ("a model", 4, 1)
    assert shown["lambdas"] == model.config.locality.locality_lambdas
    assert_close(unpack(shown["shares"], "<u2", 3, length, 4) / 65535, reading.shares.double(), atol=8e-6, rtol=0)
    fidelity = torch.tensor(shown["headFidelity"], dtype=torch.double)
    assert_close(fidelity, reading.profile.context_fidelity, atol=5e-5, rtol=0)
    others = reading.profile.context_share
    for name, of_heads in (("blocksLookedAt", "blocks_looked_at"), ("topBlockShare", "top_block_share")):
        figures, expected = torch.tensor(shown[name], dtype=torch.double), getattr(reading.profile, of_heads)
        assert_close(figures[:, 1:], expected, atol=5e-5, rtol=0)
        assert_close(figures[:, 0], (expected * others).sum(1) / others.sum(1), atol=5e-5, rtol=0)
    totals = reading.profile.block_share.sum(1), reading.profile.outside_share.sum(1)
    layers = torch.tensor(shown["layerFidelity"], dtype=torch.double)
    assert_close(layers, totals[0] / (totals[0] + totals[1]), atol=5e-5, rtol=0)

    entries = length * (length + 1) // 2
    means = unpack(shown["rows"]["mean"], "<u2", 3, entries) / 65535
    heads = unpack(shown["rows"]["heads"], "<u1", 3, 4, entries) / 255
    largest = unpack(shown["rows"]["largest"], "<u2", 3, 4, length) / 65535
    for layer in range(3):
        for position in range(length):
            weights = reading.weights(layer, position).double()
            row = slice(position * (position + 1) // 2, (position + 1) * (position + 2) // 2)
            assert_close(means[layer, row], weights.mean(0), atol=8e-6, rtol=0)
            most = weights.amax(1, keepdim=True)
            found = heads[layer, :, row] * largest[layer, :, position, None]
            assert ((found - weights).abs() <= 0.002 * most + 1e-5).all()
    num_blocks = reading.block_starts.unique().numel()
    assert len(shown["blocks"]) == 3 * 5
    for layer in range(3):
        of_heads = reading.block_attention(layer).double()
        for place, expected in enumerate((of_heads.mean(0), *of_heads)):
            found = unpack(shown["blocks"][5 * layer + place], "<u2", num_blocks, num_blocks) / 65535
            assert_close(found, expected, atol=8e-6, rtol=0)


def test_256_tokens_and_6_layers_of_12_heads_are_less_than_2_mb(
    make_model: Callable[..., LocalistGPT2LMHeadModel],
) -> None:
    model = make_model(n_layer=6, n_head=12, n_embd=96)
    ids = torch.randint(2, 97, (256,))
    page = saved_page([read(model, Passage(ids, [f" word{token}" for token in ids.tolist()], tokenizer=None))])
    assert 200_000 < len(page.html.encode()) < 2_000_000


def test_a_page_that_no_browser_opens_with_ease_is_refused(
    model: PreTrainedModel,
    make_model: Callable[..., LocalistGPT2LMHeadModel],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = import_module("localist_hf.page.saved_page")
    monkeypatch.setattr(module, "MAX_BYTES", 30_000)
    passage = Passage.of(tokenizer, TEXT * 4)
    sentence = rf"^`text` has {len(passage)} tokens, .* a page of about 1 MB, .* must have \d+ at most"
    with pytest.raises(ValueError, match=sentence) as error:
        view(model, tokenizer, TEXT * 4)
    limit = int(re.findall(r"have (\d+) at most", str(error.value))[0])
    with pytest.raises(ValueError, match=rf"; it must have ({int(limit / 2**0.5)}|{int(limit / 2**0.5) + 1}) at most"):
        view(model, tokenizer, TEXT * 4, compare=model)
    # What is said is about right.
    written = json.dumps(data_of(view(model, tokenizer, "".join(passage.pieces[:limit])))["readings"][0]["rows"])
    assert 0.6 * 30_000 < len(written) < 1.3 * 30_000
    # Of two limits a reader hears of the lower one.
    monkeypatch.setattr(module, "MAX_BYTES", 10**6)
    with pytest.raises(ValueError, match="tokens; the model has positions for 300"):
        view(make_model(vocab_size=len(tokenizer)), tokenizer, TEXT * 40)


HOSTILE = "</script><script>alert(1)</script> <!-- &lt; @data@ \\u003c 'quote\" \u2028 <img src=x onerror=alert(2)>"


def test_a_text_stays_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    page = saved_page([read(model, Passage.of(tokenizer, HOSTILE), name=HOSTILE)])
    data = data_of(page)
    assert "".join(data["tokens"]) == HOSTILE
    assert data["readings"][0]["name"] == HOSTILE
    assert page.html.count("<script") == 2
    assert "alert(" not in re.sub(r'<script type="application/json".*?</script>', "", page.html, flags=re.DOTALL)
    (raw,) = re.findall(r'id="data">(.*?)</script>', page.html, re.DOTALL)
    assert not set("<>&\u2028") & set(raw)


def test_the_file_asks_for_nothing_else(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    page = view(model, tokenizer, TEXT).html
    addresses = re.findall(r"""(?:\b(?:src|href)=["']?|url\(|@import|import\(|fetch\()\s*([^"')\s>]*)""", page)
    assert addresses == ["data:,"]
    assert re.findall(r"\S+://\S+", page) == ['xmlns="http://www.w3.org/2000/svg"']  # a name, by which pictures go


def test_a_text_of_one_token_can_be_shown(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    data = data_of(view(model, tokenizer, "a"))
    assert data["readings"][0]["headFidelity"] == [[None] * 4] * 3
    assert data["readings"][0]["layerFidelity"] == [None] * 3
    assert data["readings"][0]["blocksLookedAt"] == data["readings"][0]["topBlockShare"] == [[None] * 5] * 3


def test_a_second_model_is_read_on_the_blocks_of_the_first(tokenizer: PreTrainedTokenizerFast) -> None:
    models = [localised("llama", num_previous_blocks=number) for number in (0, 1)]
    ids = text(batch_size=1)[0][0]
    passage = Passage(ids, [f"<{token}>" for token in ids.tolist()], tokenizer)
    first = read(models[0], passage)
    second = read_beside(first, models[1], passage)
    assert torch.equal(second.block_starts, first.block_starts)
    data = data_of(saved_page([first, second]))
    assert data["readings"][0]["localStarts"] == data["blockStarts"]
    assert data["readings"][1]["localStarts"] == second.local_starts.tolist()
    assert second.local_starts.tolist() != first.local_starts.tolist()
    with pytest.raises(ValueError, match="`compare` cuts the text into other tokens than the first model"):
        read_beside(first, models[1], Passage(ids[:5], passage.pieces[:5], tokenizer))


# --- in a notebook


def test_view_shows_a_page_and_saves_it(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Any
) -> None:
    assert localist_hf.view is view
    page = localist_hf.view(model, tokenizer, TEXT, compare=model)
    assert len(data_of(page)["readings"]) == 2
    page.save(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page.html
    (source,) = re.findall(r'<iframe srcdoc="([^"]*)" title=', page._repr_html_())
    assert html.unescape(source) == page.html


def test_the_package_has_no_other_late_names() -> None:
    with pytest.raises(AttributeError, match="module 'localist_hf' has no attribute 'views'"):
        _ = localist_hf.views


def test_where_a_model_lies_is_not_said(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Any
) -> None:
    model.name_or_path = str(tmp_path)
    page = view(model, tokenizer, TEXT)
    assert data_of(page)["readings"][0]["name"] == tmp_path.name
    assert str(tmp_path) not in page.html
    model.name_or_path = "organisation/model"
    assert data_of(view(model, tokenizer, TEXT))["readings"][0]["name"] == "organisation/model"

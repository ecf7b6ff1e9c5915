"""A dial for each row of a batch: every row is as if it were alone with its dial."""

import pytest
import torch
from torch.testing import assert_close
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from localist_hf import localize


DIALS = (0.0, 1.0, 0.5, 1.0, 0.0)
MEASURED = ("fidelity", "self_share", "sink_share", "block_share", "outside_share", "entropy")


@pytest.fixture(params=["gpt2", "llama", "gemma2"])
def model(request, make_model):
    settings = {"locality_schedule": "linear", "num_sink_tokens": 1, "min_block_length": 3, "max_block_length": 12}
    if request.param == "gpt2":
        return make_model(**settings)
    small = {
        "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 2, "intermediate_size": 32, "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    if request.param == "llama":
        return localize(LlamaForCausalLM(LlamaConfig(**small)), **settings)
    config = Gemma2Config(**small, sliding_window=16, attn_implementation="eager")  # soft-capped, with windows
    return localize(Gemma2ForCausalLM(config), **settings)


def test_rows_are_as_if_alone_with_their_dial(model, make_text) -> None:
    ids, mask = make_text(5, 50), torch.ones(5, 50, dtype=torch.long)
    mask[1, :7], mask[3, 41:] = 0, 0
    request = {"output_fidelity": True, "output_entropy": True}
    model.train()
    found = model(ids, attention_mask=mask, labels=ids, locality_dial=torch.tensor(DIALS), **request)
    for row, dial in enumerate(DIALS):
        is_token = mask[row].bool()
        alone = model(ids[[row]], attention_mask=mask[[row]], locality_dial=dial, **request)
        assert_close(found.logits[row, is_token], alone.logits[0, is_token], rtol=1e-4, atol=1e-5)
        for name in MEASURED:
            for one, other in zip(found[name], alone[name], strict=True):
                assert_close(one[row][:, is_token], other[0][:, is_token], rtol=1e-4, atol=1e-5, msg=name)
    gradients = torch.autograd.grad(found.logits.square().sum(), [model.get_input_embeddings().weight])
    assert gradients[0].isfinite().all() and gradients[0].any()


def test_packed_rows_keep_their_documents(make_model, make_text) -> None:
    model, ids = make_model(locality_schedule="linear").train(), make_text(2, 40)
    position_ids = torch.stack((torch.arange(40), torch.cat((torch.arange(15), torch.arange(25)))))
    found = model(ids, position_ids=position_ids, locality_dial=torch.tensor([0.0, 1.0])).logits
    parts = [
        model(ids[:1], locality_dial=0.0).logits,
        torch.cat([model(part, locality_dial=1.0).logits for part in (ids[1:, :15], ids[1:, 15:])], dim=1),
    ]
    assert_close(found, torch.cat(parts), rtol=1e-4, atol=1e-5)


def test_dials_that_are_all_one_are_that_dial_and_may_have_a_cache(make_model, make_text) -> None:
    model, ids = make_model(locality_schedule="linear").eval(), make_text(2, 40)
    found = model(ids, locality_dial=torch.tensor([1.0, 1.0]), use_cache=True)
    expected = model(ids, locality_dial=1.0, use_cache=True)
    assert torch.equal(found.logits, expected.logits)
    assert found.past_key_values.get_seq_length() == 40


@pytest.mark.parametrize(
    ("dial", "settings", "message"),
    [
        (torch.tensor([0.0, 1.0]), {}, r"`locality_dial` has the shape \(2,\); it must be a number, or"),
        (torch.tensor(1.0), {}, r"`locality_dial` has the shape \(\); it must be a number, or"),
        (torch.tensor([0.0, 1.0, 2.0]), {}, r"`locality_dial` is 2.0; it must lie in \[0, 1\]"),
        (torch.tensor([0.0, 1.0, torch.nan]), {}, r"`locality_dial` is nan; it must lie in \[0, 1\]"),
        ([0.0, 1.0, 0.5], {}, r"`locality_dial` is \[0.0, 1.0, 0.5\]; it must lie in \[0, 1\]"),
        (torch.tensor([0.0, 1.0, 0.5]), {"use_cache": True}, "`locality_dial` differs from row to row, which no cache"),
    ],
)
def test_what_cannot_be_is_refused(make_model, make_text, dial, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_model(locality_schedule="linear").eval()(make_text(3, 20), locality_dial=dial, **settings)


def test_a_generation_and_a_setting_have_one_dial(make_model, make_text) -> None:
    model = make_model(locality_schedule="linear").eval()
    with pytest.raises(ValueError, match=r"`locality_dial` is a tensor; it must be a number in \[0, 1\]"):
        model.generate(make_text(2, 10), locality_dial=torch.tensor([0.0, 1.0]), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"`dial` is a tensor; it must be a number in \[0, 1\]"):
        model.set_locality_dial(torch.tensor(0.5))


def test_no_graph_is_compiled_of_them(make_model, make_text) -> None:
    model = torch.compile(make_model(locality_schedule="linear").eval(), backend="eager")
    with pytest.raises(Exception, match="`locality_dial` is a tensor, whose values no compiled graph reads"):
        model(make_text(2, 20), locality_dial=torch.tensor([0.0, 1.0]), use_cache=False)

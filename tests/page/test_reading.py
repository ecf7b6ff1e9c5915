"""What the page shows is what the models compute, of every architecture."""

import copy
import re
from collections.abc import Callable

import hypothesis
import pytest
import torch
from architectures import ARCHITECTURES, LAYERS, eager_attentions, every_architecture, localised, text, untouched
from generation_defaults import OWN_GENERATION, set_defaults
from hypothesis import strategies
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.testing import assert_close
from transformers import ByT5Tokenizer, PreTrainedModel, PreTrainedTokenizerFast, PythonBackend

from localist_hf import LocalistGPT2LMHeadModel, Rule, localize
from localist_hf.evaluation import locality_probe
from localist_hf.evaluation.divergence import divergence_bits
from localist_hf.modeling.measurements import SHARES
from localist_hf.page import Passage, read
from localist_hf.page.pieces import added_text


def passage_of(ids: torch.Tensor) -> Passage:
    return Passage(ids, [f"<{token}>" for token in ids.tolist()], tokenizer=None)


@every_architecture
@torch.no_grad()
def test_rows_are_those_of_the_model_s_own_eager_attention(architecture: str) -> None:
    ids = text(batch_size=1)[0]
    expected = eager_attentions(architecture, ids)
    model = localised(architecture)
    attention = model.config._attn_implementation
    reading = read(model, passage_of(ids[0]))
    assert model.config._attn_implementation == attention
    assert (reading.num_layers, reading.num_heads) == (LAYERS, 4)
    for layer in range(LAYERS):
        assert expected[layer].std() > 0.01  # it can fail: attention is far from even
        for position in range(ids.shape[1]):
            weights = reading.weights(layer, position)
            assert_close(weights, expected[layer][0, :, position, : position + 1], atol=1e-5, rtol=0)


@every_architecture
@torch.no_grad()
def test_shares_are_the_sums_of_these_rows_over_the_blocks_that_are_shown(architecture: str) -> None:
    model = localised(architecture, num_sink_tokens=2, num_previous_blocks=1)
    ids = text(batch_size=1)[0]
    reading = read(model, passage_of(ids[0]))
    outputs = model(ids, output_fidelity=[LAYERS - 1])
    assert torch.equal(reading.block_starts, outputs.block_starts[0][0])
    assert reading.block_starts.unique().numel() > 4
    has_learned_sink = architecture == "gpt_oss"
    assert reading.has_learned_sink == has_learned_sink
    for layer in range(LAYERS):
        for position in range(0, ids.shape[1], 7):
            row = reading.weights(layer, position).double().mean(0)
            start, local = reading.block_starts[position], reading.local_starts[position]
            keys = torch.arange(position + 1)
            own, sink = keys == position, (keys < 2) & (keys < start)
            block = (keys >= local) & ~own & ~sink
            learned = 1 - row.sum() if has_learned_sink else 0.0
            parts = [row[own].sum(), row[sink].sum() + learned, row[block].sum(), row[~(own | sink | block)].sum()]
            assert_close(reading.shares[layer, position].double(), torch.stack(parts), atol=2e-5, rtol=0)


@every_architecture
@torch.no_grad()
def test_what_blocks_give_to_blocks_are_the_sums_of_these_rows(architecture: str) -> None:
    model = localised(architecture, num_sink_tokens=2)
    reading = read(model, passage_of(text(batch_size=1)[0][0]))
    number = reading.block_starts.unique(return_inverse=True)[1]
    num_blocks = int(number[-1]) + 1
    assert num_blocks > 4
    for layer in range(LAYERS):
        expected = torch.zeros(4, num_blocks, num_blocks)
        for position, block in enumerate(number):
            row = reading.weights(layer, position).clone()
            keys = torch.arange(position + 1)
            row[:, (keys == position) | (keys < 2) & (keys < reading.block_starts[position])] = 0
            expected[:, block].index_add_(1, number[: position + 1], row / (number == block).sum())
        found = reading.block_attention(layer)
        assert_close(found, expected, atol=1e-5, rtol=0)
        others = reading.shares[layer, :, 2:].sum(-1)  # block and outside share
        means = torch.zeros(num_blocks).index_add_(0, number, others) / number.bincount()
        assert_close(found.sum(2).mean(0), means, atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_profile_is_that_of_the_probe() -> None:
    model, other = localised("llama"), localised("llama", num_previous_blocks=1)
    ids = text(batch_size=1)[0]
    reading = read(model, passage_of(ids[0]))
    probed = locality_probe(model, [{"input_ids": ids}], block_model=model)
    assert torch.equal(reading.profile.context_fidelity, probed.context_fidelity)
    # A second model on the first one's blocks.
    starts = torch.arange(ids.shape[1]) // 5 * 5
    probed = locality_probe(other, [{"input_ids": ids, "block_starts": starts[None]}])
    reading = read(other, passage_of(ids[0]), block_starts=starts)
    assert torch.equal(reading.block_starts, starts)
    assert torch.equal(reading.local_starts, (starts - 5).clamp(min=0))
    for name in ("context_fidelity", *SHARES):
        assert torch.equal(getattr(reading.profile, name), getattr(probed, name))


@torch.no_grad()
def test_what_is_read_is_at_dial_0_whatever_is_set() -> None:
    ids = text(batch_size=1)[0]
    free = read(localised("qwen2"), passage_of(ids[0]))
    dialled = localised("qwen2", locality_dial=1.0, min_fidelity=0.5)
    dialled.set_locality_dial(0.7)
    reading = read(dialled, passage_of(ids[0]))
    assert torch.equal(reading.shares, free.shares)
    assert torch.equal(reading.block_starts, free.block_starts)


def test_what_cannot_be_read_is_refused() -> None:
    ids = text(batch_size=1)[0]
    passage = passage_of(ids[0])
    with pytest.raises(ValueError, match="`model` is a GPT2LMHeadModel; it must be a localised language model"):
        read(untouched("gpt2"), passage)
    model = localised("gpt2")
    with pytest.raises(ValueError, match="`text` has 132 tokens; the model has positions for 128"):
        read(model, passage_of(ids[0].repeat(2)))
    with pytest.raises(ValueError, match="`text` has the token 64; the model knows 0 to 63"):
        read(model, passage_of(torch.tensor([1, 64])))
    with pytest.raises(ValueError, match=r"`block_starts` has the shape \(3,\); the text has 66 tokens"):
        read(model, passage, block_starts=torch.zeros(3, dtype=torch.long))
    reading = read(model, passage)
    with pytest.raises(ValueError, match="`layer` is 4; it must be in 0 to 3"):
        reading.weights(4, 0)
    for position in (-1, 66):
        with pytest.raises(ValueError, match=f"`position` is {position}; it must be in 0 to 65"):
            reading.weights(0, position)
        with pytest.raises(ValueError, match=f"`position` is {position}; it must be in 0 to 65"):
            reading.predict(position, 0.5)
    with pytest.raises(ValueError, match=r"`dial` is 1\.5"):
        reading.predict(0, 1.5)


def test_one_token_has_no_context() -> None:
    reading = read(localised("llama"), passage_of(torch.tensor([5])))
    assert_close(reading.weights(0, 0), torch.ones(4, 1))
    assert reading.profile.context_fidelity.isnan().all()
    assert_close(reading.shares.sum(-1), torch.ones(LAYERS, 1))


# --- predictions


@pytest.fixture
def model(model_for_tokenizer: PreTrainedModel) -> PreTrainedModel:
    return localize(model_for_tokenizer, locality_schedule="localist", min_block_length=3, max_block_length=12)


TEXT = "Sentence number 12 says something. some more of the words here\nnumber 3 says more."


@torch.no_grad()
def test_predictions_are_those_of_the_forward_pass(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    passage = Passage.of(tokenizer, TEXT)
    reading = read(model, passage)
    for position in (0, 9, len(passage) - 1):
        prefix = passage.input_ids[None, : position + 1]
        free, dialled = (model(prefix, locality_dial=dial).logits[0, -1] for dial in (0.0, 1.0))
        for dial, logits in ((1.0, dialled), (0.0, free)):
            prediction = reading.predict(position, dial)
            probabilities = logits.softmax(-1)
            assert_close(torch.tensor(prediction.probabilities), probabilities.topk(5).values, atol=1e-6, rtol=1e-5)
            assert prediction.tokens == [tokenizer.decode([token]) for token in probabilities.topk(5).indices]
            bits = divergence_bits(free, logits)
            assert_close(torch.tensor(prediction.divergence), bits, atol=1e-5, rtol=1e-4)
            assert (prediction.divergence > 0.01) == (dial > 0 and position > 0)
            generated = model.generate(prefix, max_new_tokens=4, do_sample=False, locality_dial=dial, pad_token_id=0)
            continuation = tokenizer.decode(generated[0])[len(tokenizer.decode(prefix[0])) :]
            assert reading.go_on(position, dial, max_new_tokens=4) == continuation
            if position + 1 < len(passage):
                actual = probabilities[passage.input_ids[position + 1]]
                assert_close(torch.tensor(prediction.actual_probability), actual, atol=1e-6, rtol=1e-5)
            else:
                assert prediction.actual_probability is None


class Numbers:
    """In place of a tokenizer: tokens are written as their numbers."""

    convert_ids_to_tokens = staticmethod(str)

    def decode(self, tokens: torch.Tensor | list[int], **kwargs: bool) -> str:
        return " ".join(map(str, torch.as_tensor(tokens).tolist()))


@pytest.mark.parametrize(
    ("architecture", "partition"),
    [*((each, "semantic") for each in ARCHITECTURES), ("llama", "window"), ("llama", "delimiter")],
)
@torch.no_grad()
def test_predictions_start_from_what_was_read(architecture: str, partition: str) -> None:
    settings = {"block_partition": partition, "delimiter_token_ids": [5, 9, 11] if partition == "delimiter" else None}
    model = localised(architecture, num_previous_blocks=1, **settings)
    set_defaults(model)  # where it has a token that ends a text, `generate` would stop there
    ids = text(batch_size=1)[0]
    reading = read(model, Passage(ids[0], list(map(str, ids[0].tolist())), Numbers()))
    for position in (40, 0, 65):
        prefix = ids[:, : position + 1]
        for dial in (0.0, 0.5):
            prediction = reading.predict(position, dial)
            best = model(prefix, locality_dial=dial).logits[0, -1].softmax(-1).topk(5)
            assert_close(torch.tensor(prediction.probabilities), best.values, atol=1e-5, rtol=0)
        generated = model.generate(prefix, max_new_tokens=4, do_sample=False, locality_dial=1.0, pad_token_id=0)
        continuation = Numbers().decode(generated[0, position + 1 :])
        assert reading.go_on(position, 1.0, max_new_tokens=4).strip() == continuation
    # Told to look at the second block.
    edges = reading.block_starts.unique().tolist()
    rule = Rule((50, None), [(edges[1], edges[2]), (int(reading.block_starts[50]), None)])
    told = {"rules": [rule], "locality_dial": 0.8}
    best = model(ids[:, :51], **told).logits[0, -1].softmax(-1).topk(5)
    prediction = reading.predict(50, 0.8, target=1)
    assert_close(torch.tensor(prediction.probabilities), best.values, atol=1e-5, rtol=0)
    assert prediction.divergence != reading.predict(50, 0.8).divergence
    generated = model.generate(ids[:, :51], max_new_tokens=4, do_sample=False, pad_token_id=0, **told)
    assert reading.go_on(50, 0.8, 4, target=1).strip() == Numbers().decode(generated[0, 51:])
    seen = int(reading.block_starts[:51].unique().numel())
    with pytest.raises(ValueError, match=f"`target` is {seen}; it must be in 0 to {seen - 1}"):
        reading.predict(50, 0.8, target=seen)


@torch.no_grad()
def test_what_a_checkpoint_says_of_generation_counts_for_nothing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    passage = Passage.of(tokenizer, TEXT)
    reading = read(model, passage)
    expected = reading.go_on(9, 1.0, 4), reading.predict(9, 1.0)
    for fields in [{name: value} for name, value in OWN_GENERATION.items()] + [OWN_GENERATION]:
        own = set_defaults(model, **fields)
        assert reading.go_on(9, 1.0, 4) == expected[0], fields
        found = reading.predict(9, 1.0)
        assert (found.tokens, found.probabilities) == (expected[1].tokens, expected[1].probabilities), fields
        assert model.generation_config is own


@pytest.mark.parametrize("kind", ["fast", "of bytes"])
def test_a_token_that_only_the_model_knows_is_its_number(tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    known, unknown = (tokenizer, len(tokenizer)) if kind == "fast" else (ByT5Tokenizer(), 384)
    before = known("a word", add_special_tokens=False)["input_ids"]
    assert added_text(known, before, [unknown]) == f"<{unknown}>"
    both = added_text(known, before, [unknown, before[-1]])
    assert both == added_text(known, before, [before[-1]])


def test_an_adapter_is_read_and_predicts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    passage = Passage.of(tokenizer, TEXT)
    before, free = read(model, passage), model(passage.input_ids[None]).logits[0, -1]
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).eval()
    reading = read(adapted, passage)
    assert (reading.weights(2, 9) - before.weights(2, 9)).abs().max() > 1e-3
    logits = adapted(passage.input_ids[None], locality_dial=0.5).logits[0, -1]
    prediction = reading.predict(len(passage) - 1, 0.5)
    assert_close(torch.tensor(prediction.probabilities), logits.softmax(-1).topk(5).values, atol=1e-6, rtol=1e-5)
    assert (free - logits).abs().max() > 1e-2


def test_a_text_may_fill_all_positions(
    make_model: Callable[..., LocalistGPT2LMHeadModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    passage = Passage.of(tokenizer, TEXT)
    model = make_model(vocab_size=len(tokenizer), n_positions=len(passage))
    reading = read(model, passage)
    prediction = reading.predict(len(passage) - 1, 1.0)
    logits = model(passage.input_ids[None], locality_dial=1.0).logits[0, -1]
    continuation = reading.go_on(len(passage) - 1, 1.0)
    assert continuation == prediction.tokens[0] == tokenizer.decode([logits.argmax()])
    assert prediction.actual_probability is None
    assert len(tokenizer(reading.go_on(len(passage) - 3, 0.0))["input_ids"]) == 3


# --- the text


@pytest.mark.parametrize(
    "text",
    [
        "plain words, two  spaces\n\n\tand tabs",
        "naïve 😀 café 日本語 \U0001f468\u200d\U0001f469\u200d\U0001f467",
        " <script>alert(1)</script>&amp; ",
    ],
)
def test_the_pieces_are_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    passage = Passage.of(tokenizer, text)
    assert "".join(passage.pieces) == text
    assert len(passage.pieces) == len(passage.input_ids)
    assert passage.pieces[-1] or not text.isascii()


def test_added_special_tokens_have_their_names(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    end = tokenizer.eos_token
    tokenizer.add_bos_token = True
    tokenizer.bos_token = end
    tokenizer.update_post_processor()
    passage = Passage.of(tokenizer, f"one{end}two")
    assert passage.pieces[0] == end
    assert "".join(passage.pieces) == f"{end}one{end}two"


def test_spaces_that_a_tokenizer_drops_are_in_the_text() -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "two": 1, "words": 2, "[SEP]": 3}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", sep_token="[SEP]")
    assert Passage.of(tokenizer, " two  words\n ").pieces == [" two", "  words\n ", "[SEP]"]


class Words(PythonBackend):
    """A tokenizer without offsets that loses spaces and cases, as python ones do; what it writes is tidied up."""

    vocab = ("<unk>", "<s>", "<image>", "two", "wor@@", "ds", ".", "n't")

    def __init__(self) -> None:
        super().__init__(unk_token="<unk>", bos_token="<s>", special_tokens_pattern="bos")
        self.clean_up_tokenization_spaces = True

    vocab_size = property(lambda self: len(self.vocab))

    def get_vocab(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.vocab)}

    def _tokenize(self, text: str) -> list[str]:
        parts = re.findall(r"wor(?=ds)|ds|n't|[.]|\w+?(?=n't)|\w+", text.lower())
        return [f"{part}@@" if part == "wor" else part for part in parts]

    def _convert_token_to_id(self, token: str) -> int:
        return self.get_vocab().get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return self.vocab[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return " ".join(tokens).replace("@@ ", "").strip()


BYTES, WORDS = ByT5Tokenizer(), Words()


def test_a_tokenizer_that_gives_no_offsets_is_asked_for_each_token() -> None:
    passage = Passage.of(BYTES, "two words")
    assert passage.pieces == [*"two words", "</s>"]
    assert len(passage.input_ids) == len(passage)
    assert Passage.of(BYTES, "é\xa0 \n日").pieces == ["é", "", "\xa0", "", " ", "\n", "日", "", "", "</s>"]
    text = " Two  words\n\tthey don't ."
    assert Passage.of(WORDS, text).pieces == ["<s>", " Two", "  wor", "ds", "\n\tthey", " do", "n't", " ."]


@hypothesis.settings(max_examples=30)
@hypothesis.given(strategies.text(min_size=1))
@hypothesis.example("two\u200bwords \x85 wordS… two")
def test_without_offsets_too_the_pieces_are_the_text(text: str) -> None:
    for tokenizer, ends in ((BYTES, ("", "</s>")), (WORDS, ("<s>", ""))):
        try:
            passage = Passage.of(tokenizer, text)
        except ValueError:
            assert not tokenizer(text, add_special_tokens=False)["input_ids"] or not text.strip()
            continue
        assert "".join(passage.pieces) == text.join(ends)
        assert len(passage.pieces) == len(passage.input_ids)


def test_what_is_written_next_stands_as_it_would_in_the_text() -> None:
    assert added_text(WORDS, [3], [3]) == " two"
    assert added_text(WORDS, [3, 4], [5]) == "ds"
    assert added_text(WORDS, [3], [6]) == " ."  # and not tidied up
    before, *after = BYTES("é", add_special_tokens=False)["input_ids"]
    assert added_text(WORDS, [7], [3]) == " two"
    assert added_text(BYTES, [before], after) == "é"


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_a_text_without_a_word_is_refused(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    with pytest.raises(ValueError, match="`text` is empty"):
        Passage.of(tokenizer, text)

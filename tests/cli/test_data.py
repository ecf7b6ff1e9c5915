"""Text to sequences: nothing lost but the remainder, and bad input refused by name."""

import copy
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer, LlamaConfig

from localist_hf.cli.data import check_token_ids, load_text, some_of, tokenize_and_pack, train_and_validation


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_packing_is_the_joined_stream_cut_into_pieces(tokenizer) -> None:
    texts = Dataset.from_dict({"text": ["some words here.", "", "more of the words\n"] * 20})
    packed = tokenize_and_pack(texts, tokenizer, 16)
    stream = [token for text in texts["text"] for token in tokenizer(text)["input_ids"]]
    assert [token for row in packed["input_ids"] for token in row] == stream[: len(stream) // 16 * 16]
    assert packed["labels"][:] == packed["input_ids"][:]
    assert set(packed.column_names) == {"input_ids", "labels"}


@pytest.mark.parametrize("template", ["<bos> $A", "<bos> $A <eos>", "[gMASK] <sop> $A", "$A <eos>"])
def test_every_piece_begins_as_the_tokenizer_begins_a_text(make_framed_tokenizer, template: str) -> None:
    tokenizer = make_framed_tokenizer(template)
    before, after = (tokenizer.convert_tokens_to_ids(part.split()) for part in template.split("$A"))
    texts = ["some words here.", "", None, "more of the words\n"] * 20
    packed = tokenize_and_pack(Dataset.from_dict({"text": texts}), tokenizer, 16)
    assert {len(row) for row in packed["input_ids"]} == {16}
    assert all(row[: len(before)] == before for row in packed["input_ids"])
    # The text itself is joined end to end, with what ends a text, and nothing of it lost but the remainder.
    own = [tokenizer(text or "", add_special_tokens=False)["input_ids"] + after for text in texts]
    stream = [token for text in own for token in text]
    packed_text = [token for row in packed["input_ids"] for token in row[len(before) :]]
    assert packed_text == stream[: len(packed_text)]
    assert len(stream) - len(packed_text) < 16 - len(before)
    for tokens, labels in zip(packed["input_ids"], packed["labels"], strict=True):
        assert labels == [-100] * len(before) + tokens[len(before) :]


def test_what_is_tokenised_once_is_found_again(make_framed_tokenizer, tokenizer, tmp_path: Path) -> None:
    (path := tmp_path / "book.txt").write_text("Sentence number 1 says something. " * 20)
    for name, each in {"plain": tokenizer, "framed": make_framed_tokenizer("<bos> $A <eos>")}.items():
        each.save_pretrained(tmp_path / name)
        fingerprints = set()
        for _ in range(2):
            anew = AutoTokenizer.from_pretrained(tmp_path / name)
            for _ in range(2):
                packed = tokenize_and_pack(load_text(None, None, str(path), "text")["train"], anew, 16)
                fingerprints.add(packed._fingerprint)
        assert len(fingerprints) == 1


def test_too_little_text_is_refused(tokenizer, bos_tokenizer) -> None:
    with pytest.raises(ValueError, match=r"The text of train has \d+ tokens; one sequence needs 512"):
        tokenize_and_pack(Dataset.from_dict({"text": ["short"]}), tokenizer, 512, "train")
    with pytest.raises(ValueError, match=r"The text of train has 3 tokens; one sequence needs 4\."):
        tokenize_and_pack(Dataset.from_dict({"text": ["a", "bc"]}), bos_tokenizer, 5, "train")


def test_a_sequence_that_the_tokenizer_fills_is_refused(make_framed_tokenizer) -> None:
    text, tokenizer = Dataset.from_dict({"text": ["some words"]}), make_framed_tokenizer("[gMASK] <sop> $A")
    message = (
        r"`sequence_length` is 2; the tokenizer begins every text with 2 tokens of its own \('\[gMASK\]<sop>'\), so"
    )
    with pytest.raises(ValueError, match=f"{message} it must be at least 3"):
        tokenize_and_pack(text, tokenizer, 2)
    assert len(tokenize_and_pack(text, tokenizer, 3)) == len(tokenizer("some words")["input_ids"]) - 2


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("First line.\n\nThird line: é.\n", encoding="utf-8")
    assert load_text(None, None, str(path), "text")["train"]["text"][:] == ["First line.\n\nThird line: é.\n"]


def test_a_local_data_set_with_another_text_column(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"content": ["a", "b"], "id": [1, 2]}).to_json(tmp_path / "data" / "train.jsonl")
    splits = load_text(str(tmp_path / "data"), None, None, "content")
    assert splits["train"].to_dict() == {"text": ["a", "b"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        (b"zero \0 bytes", r"it must be UTF-8 text \(it holds zero bytes\)"),
        (b"", "the file is empty"),
        (b" \n\t\n", "the file is empty"),
        (b"caf\xe9 in Latin-1", "it must be UTF-8"),
        (b"cut in the middle of a letter \xc3", "it must be UTF-8"),
    ],
)
def test_a_bad_text_file_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "book.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"`text_file` is '.*book.txt'; {message}"):
        load_text(None, None, str(path), "text")


def test_a_data_set_without_the_column_or_the_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"content": ["a"]}).to_json(tmp_path / "data" / "train.jsonl")
    with pytest.raises(ValueError, match=r"`text_column` is 'text'; the columns of .* are 'content'"):
        load_text(str(tmp_path / "data"), None, None, "text")
    (tmp_path / "data" / "train.jsonl").rename(tmp_path / "data" / "test.jsonl")
    with pytest.raises(ValueError, match=r"has the splits test; a split 'train' is needed"):
        load_text(str(tmp_path / "data"), None, None, "content")


@pytest.mark.parametrize(("dataset", "text_file"), [(None, None), ("data", "book.txt")])
def test_exactly_one_source_of_text(dataset: str | None, text_file: str | None) -> None:
    with pytest.raises(ValueError, match="exactly one of them must be given"):
        load_text(dataset, None, text_file, "text")


def test_held_out_text_is_the_end_and_apart(tokenizer) -> None:
    splits = DatasetDict(train=Dataset.from_dict({"text": [f"word{number} " * 30 for number in range(20)]}))
    whole = tokenize_and_pack(splits["train"], tokenizer, 16)["input_ids"][:]
    train, validation = train_and_validation(splits, tokenizer, 16, 0.25)
    assert train["input_ids"][:] + validation["input_ids"][:] == whole
    assert len(validation) == round(len(whole) * 0.25)
    with pytest.raises(ValueError, match=r"`validation_share` is 0.0001"):
        train_and_validation(splits, tokenizer, 16, 0.0001)


def test_a_validation_split_is_used_where_there_is_one(tokenizer) -> None:
    text = Dataset.from_dict({"text": ["some words " * 40]})
    other = Dataset.from_dict({"text": ["other things " * 40]})
    train, validation = train_and_validation(DatasetDict(train=text, validation=other), tokenizer, 16, 0.5)
    assert train["input_ids"][:] == tokenize_and_pack(text, tokenizer, 16)["input_ids"][:]
    assert validation["input_ids"][:] == tokenize_and_pack(other, tokenizer, 16)["input_ids"][:]


def test_some_of_a_data_set_is_from_all_over_it_and_the_same_every_time() -> None:
    numbers = Dataset.from_dict({"input_ids": [[number] for number in range(100)]})
    some = some_of(numbers, 20)["input_ids"][:]
    assert some == some_of(numbers, 20)["input_ids"][:]
    assert len({each[0] for each in some}) == 20
    assert max(some) > [70] and min(some) < [30]
    assert some_of(numbers, 100)["input_ids"][:] == numbers["input_ids"][:]


def test_a_token_that_the_model_does_not_have_is_refused_where_a_text_has_it(tokenizer) -> None:
    more = copy.deepcopy(tokenizer)  # as that of Gemma 3's text models, which knows a token for pictures
    more.add_tokens(["<picture>"], special_tokens=True)
    config = LlamaConfig(vocab_size=len(tokenizer))
    texts = ["some more of the words here"] * 9
    both = [Dataset.from_dict({"text": each}) for each in (texts, ["<picture>", *texts])]
    sequences = [tokenize_and_pack(each, more, 4) for each in both]
    check_token_ids(sequences[0], config, more)
    with pytest.raises(ValueError, match=rf"the token {len(tokenizer)} \('<picture>'\), which .* `other` does not"):
        check_token_ids(sequences[1], config, more, "other")

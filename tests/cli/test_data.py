"""Text to sequences: nothing lost but the remainder, and bad input refused by name."""

from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from localist_hf.cli.data import load_text, some_of, tokenize_and_pack, train_and_validation


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


def test_too_little_text_is_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"The text of train has \d+ tokens; one sequence needs 512"):
        tokenize_and_pack(Dataset.from_dict({"text": ["short"]}), tokenizer, 512, "train")


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

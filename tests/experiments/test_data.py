"""Text to sequences: nothing lost but the remainder, and bad input refused by name."""

import copy
import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LlamaConfig

from localist_hf.experiments.data import (
    check_source,
    check_token_ids,
    load_text,
    some_of,
    tokenize_and_pack,
    train_and_validation,
)


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


def test_rows_of_one_token_fill_a_long_sequence(make_framed_tokenizer) -> None:
    tokenizer = make_framed_tokenizer("<bos> $A")
    texts = ["a", "b", "c"] * 3700  # more than any batch
    (row,) = tokenize_and_pack(Dataset.from_dict({"text": texts}), tokenizer, 11_000)["input_ids"]
    ids = dict(zip("abc", tokenizer.convert_tokens_to_ids(list("abc")), strict=True))
    assert row[1:] == [ids[text] for text in texts[:10_999]]


def test_nothing_is_dropped_between_batches(tokenizer) -> None:
    texts = [f"number {number}" for number in range(2500)]
    packed = tokenize_and_pack(Dataset.from_dict({"text": texts}), tokenizer, 300)
    stream = [token for text in texts for token in tokenizer(text)["input_ids"]]
    assert [token for row in packed["input_ids"] for token in row] == stream[: len(stream) // 300 * 300]


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


def rows_of(path: Path, column: str = "text") -> list[str | None]:
    return load_text(None, None, str(path), column)["train"]["text"][:]


NAMES = ["book[1]", "book*", "book?", "[!x]", "{a,b}", "a::b", "a%20b", "~", "\u00e9\n"]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_that_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (name, "book1", "."):
        Path(folder).mkdir(exist_ok=True)
        for stem in ("book1", "bookx", "a", name):
            Path(folder, f"{stem}.txt").write_text(f"{folder} and {stem}")
            Path(folder, f"{stem}.jsonl").write_text(json.dumps({"text": f"{folder} and {stem}"}))
    for suffix in ("txt", "jsonl"):
        for path in (f"{name}.{suffix}", f"{name}/{name}.{suffix}", str(tmp_path / name / f"book1.{suffix}")):
            folder = name if name in Path(path).parent.name else "."
            assert rows_of(path) == [f"{folder} and {Path(path).stem}"]


def test_an_address_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text("words")
    for name in (
        "file://book.txt",
        f"file://{tmp_path}/book.txt",
        "hf://book.txt",
        "~/book.txt",
        "book.*",
        "a" * 5000,
        "\0",
    ):
        with pytest.raises(ValueError, match="there is no such file"):
            load_text(None, None, name, "text")


@pytest.mark.parametrize("name", ["a%20b", "~", "csv", "text", "{a,b}", "#1", ".hidden", "__own"])
def test_a_folder_is_that_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    Path(name, "data.csv").write_text("text\nwords\n")
    assert load_text(name, None, None, "text")["train"]["text"][:] == ["words"]


@pytest.mark.parametrize("name", ["data[1]", "data*", "data?", "a::b", "data[1]/inner"])
def test_a_folder_whose_name_datasets_reads_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (name, "data1"):
        Path(folder).mkdir(parents=True)
        Path(folder, "data.csv").write_text(f"text\n{folder}\n")
    with pytest.raises(ValueError, match=r"`dataset` is .*, the folder .*; data sets cannot be read from a path with"):
        check_source(name, None, None, "text")
    monkeypatch.chdir(name)  # a name without signs says the same
    with pytest.raises(ValueError, match=r"`dataset` is '\.', the folder .*; data sets cannot be read from"):
        check_source(".", None, None, "text")


def test_what_is_no_folder_is_not_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.csv").write_text("text\nwords\n")
    with pytest.raises(ValueError, match=r"`dataset` is 'data\.csv'; it is a file, which `text_file` takes"):
        load_text("data.csv", None, None, "text")
    for source in (("", None, None), (None, None, "")):  # not the folder that one is in
        with pytest.raises(ValueError, match=r"`(dataset|text_file)` is ''; it must be a name"):
            load_text(*source, "text")


def test_a_file_that_datasets_would_pass_over_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data" / "deep").mkdir(parents=True)
    for name in ("a.csv", "deep/a::b.csv"):
        (tmp_path / "data" / name).write_text("text\nwords\n")
    with pytest.raises(ValueError, match=r"`dataset` is .*, whose 'a::b\.csv' cannot be read"):
        check_source(str(tmp_path / "data"), None, None, "text")


BOM = b"\xef\xbb\xbf"
LONG = "word " * 40_000  # more than the csv module takes by itself


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("bom.txt", BOM + b"words", ["words"]),
        ("windows.txt", b"one\r\ntwo\r\n", ["one\ntwo\n"]),
        ("BOM.JSONL", BOM + b'{"text": "words"}\r\n\r\n{"text": "more"}', ["words", "more"]),
        ("blank.jsonl", b'\n{"text": null}\n{"text": ""}\n{"id": 1}\n{"text": "a", "id": []}', [None, "", None, "a"]),
        ("pair.jsonl", b'{"text": "\\ud83d\\ude00"}', ["\U0001f600"]),
        ("separators.jsonl", '{"text": "a\u2028b\u0085c"}'.encode(), ["a\u2028b\u0085c"]),
        ("bom.csv", BOM + b"text,id\r\nwords,1\r\n", ["words"]),
        ("quoted.csv", BOM + b'"text","id"\n"two\nlines, ""quoted""",\n', ['two\nlines, "quoted"']),
        ("blank.csv", b'\n\ntext\n\n""\n\nwords\n', ["", "words"]),
        ("words.csv", b"text,id\nNA,\nnull,1\nnan,x\n007,\n1e5,\nTrue,\n", ["NA", "null", "nan", "007", "1e5", "True"]),
        ("long.csv", f"text\n{LONG}\n".encode(), [LONG]),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)  # fmt: skip
def test_files_are_read_as_they_stand(tmp_path: Path, name: str, content: bytes, rows: list[str | None]) -> None:
    (tmp_path / name).write_bytes(content)
    assert rows_of(tmp_path / name) == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "; the file is empty"),
        ("empty.csv", BOM, "; the file is empty"),
        ("empty.parquet", b"", ""),
        ("blank.csv", b"\n\n \n", "; the file is empty"),
        ("header.csv", b"text,id\n", "it holds no text"),
        ("nothing.csv", b'text,id\n"",1\n  ,2\n', "it holds no text"),
        ("nothing.jsonl", b'{"text": null}\n{"text": " "}', "it holds no text"),
        ("latin.txt", b"\xc3\xa9\n" * 700_000 + b"caf\xe9\n", "; it must be UTF-8 text (line 700001: invalid"),
        ("latin.jsonl", b'{"text": "caf\xe9"}', "; it must be UTF-8 text"),
        ("latin.csv", b"text\ncaf\xe9\n", "; it must be UTF-8 text"),
        ("wide.csv", "text\nwords\n".encode("utf-16"), "; it must be UTF-8 text"),
        ("surrogate.txt", "\ud800".encode("utf-8", "surrogatepass"), "; it must be UTF-8 text"),
        ("surrogate.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}', "line 2: it must be Unicode text"),
        ("list.jsonl", b'[{"text": "a"}]', "line 1 is no JSON object"),
        ("cut.jsonl", b'{"text": "a"}\n{"text": "b', "line 2 is no JSON "),
        ("numbers.jsonl", b'{"text": "a"}\n\n{"text": 3}', "line 3: `text_column` is 'text', which holds 3; it must"),
        ("other.jsonl", b'{"a": 1}\n{"b": 1}', "`text_column` is 'text'; the columns are 'a', 'b'"),
        ("other.csv", b"text;id\na;1\n", "`text_column` is 'text'; the columns are 'text;id'"),
        ("twice.csv", b"text,text\na,b\n", "`text_column` is 'text'; the columns are 'text', 'text'"),
        ("more.csv", b"text\none, two\n", "line 2: 2 cells under 1 columns"),
        ("open.csv", b'text\na\n"b\nc\n', "line 4 is no CSV (unexpected end of data)"),
        ("quotes.csv", b'text\n"a" b\n', "line 2 is no CSV "),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (path := tmp_path / name).write_bytes(content)
    begin = "" if message.startswith(";") else ", which cannot be read: "  # known before it is read
    with pytest.raises(ValueError) as error:
        rows_of(path)
    assert str(error.value).startswith(f"`text_file` is {str(path)!r}{begin}{message}")
    assert "\n" not in str(error.value)


def test_the_columns_of_a_parquet_file(tmp_path: Path) -> None:
    texts = [None, "words", "", "more"]
    for number, kind in enumerate(
        (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string()))
    ):
        pq.write_table(
            pa.table({"content": pa.array(texts, kind), "id": range(4)}), path := tmp_path / f"{number}.parquet"
        )
        assert rows_of(path, "content") == texts
    with pytest.raises(
        ValueError, match=r"0\.parquet', which cannot be read: .* is 'text'; the columns are 'content', 'id'"
    ):
        rows_of(tmp_path / "0.parquet")
    with pytest.raises(ValueError, match=r"row 1: `text_column` is 'id', which holds 0; it must be text"):
        rows_of(tmp_path / "0.parquet", "id")
    for number, array in enumerate(([None], [], [b"bytes"], [["words"]])):
        pq.write_table(pa.table({"text": pa.array(array)}), path := tmp_path / f"{number}.parquet")
        with pytest.raises(ValueError, match="it holds no text" if number < 2 else "row 1: .*; it must be text"):
            rows_of(path)


@settings(max_examples=10)
@given(texts=st.lists(st.none() | st.text(st.characters(codec="utf-8")), min_size=1))
def test_every_kind_of_file_holds_the_same_rows(tmp_path_factory: pytest.TempPathFactory, texts: list) -> None:
    texts.append("words")
    folder = tmp_path_factory.mktemp("rows")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pq.write_table(pa.table({"text": texts}), folder / "rows.parquet")
    with (folder / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(texts)])
    assert rows_of(folder / "rows.jsonl") == rows_of(folder / "rows.parquet") == texts
    if not any("\0" in (text or "") for text in texts):
        assert rows_of(folder / "rows.csv") == [text or "" for text in texts]


def test_a_file_that_has_changed_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for text in ("one", "two", "one"):
        path.write_text(json.dumps({"text": text, "other": text[::-1]}))
        assert rows_of(path) == [text]
        assert rows_of(path, "other") == [text[::-1]]
    path.rename(path := tmp_path / "rows.txt")  # of the same content, but text
    assert rows_of(path) == [path.read_text()]


def test_files_of_all_kinds_go_together(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text('{"text": null}\n{"text": "b"}\n')
    (tmp_path / "c.csv").write_text("text\nc\n")
    pq.write_table(pa.table({"text": pa.array(["d"], pa.large_string())}), tmp_path / "d.parquet")
    files = [
        load_text(None, None, str(tmp_path / name), "text")["train"]
        for name in ("a.txt", "b.jsonl", "c.csv", "d.parquet")
    ]
    assert concatenate_datasets(files)["text"][:] == ["a", None, "b", "c", "d"]


def test_a_name_that_is_no_unicode_is_refused() -> None:
    for source in (("caf\udce9", None, None), (None, None, "caf\udce9.txt")):
        with pytest.raises(ValueError, match=r"is 'caf\\udce9(\.txt)?'; it must be a name, in Unicode"):
            check_source(*source, "text")


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("words.csv", b"text,id\nNA,\nnull,1\n,2\n3,\n", ["NA", "null", "", "3"]),
        ("bom.txt", BOM + b"one\ntwo", ["one\ntwo"]),
    ],
)
def test_the_words_of_a_data_set_are_kept(tmp_path: Path, name: str, content: bytes, rows: list[str]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(content)
    assert load_text(str(tmp_path / "data"), None, None, "text")["train"]["text"][:] == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "the file is empty"),
        ("empty.csv", b"", "the file is empty"),
        ("latin.jsonl", b'{"text": "caf\xe9"}', "it must be UTF-8"),
        ("latin.csv", b"text\ncaf\xe9\n", "it must be UTF-8"),
        ("latin.txt", b"caf\xe9", "it must be UTF-8"),
    ],
)
def test_the_file_of_a_data_set_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "deep" / name).write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"`dataset` is '.*data', which cannot be read: its file is '.*/{name}'; {message}"
    ):
        load_text(str(tmp_path / "data"), None, None, "text")


def test_a_folder_is_read_as_its_files_are(tmp_path: Path) -> None:
    """Each as if it were given alone: whole texts, rows with as many cells as there are columns, dates as words."""
    files = {
        "lines": {"a.txt": "one\n\ntwo\n", "b.txt": "three\n"},
        "dates": {"a.jsonl": '{"text": "2020-01-01"}\n', "b.jsonl": '{"text": "words", "other": 1}\n'},
        "parts": {"train.csv": "text\nNA\n", "test.csv": "text\n", "validation.csv": "id,text\n1,007\n"},
    }
    for folder, contents in files.items():
        (tmp_path / folder).mkdir()
        for name, content in contents.items():
            (tmp_path / folder / name).write_text(content)
    found = {folder: load_text(str(tmp_path / folder), None, None, "text") for folder in files}
    assert found["lines"]["train"]["text"][:] == ["one\n\ntwo\n", "three\n"]
    assert found["dates"]["train"]["text"][:] == ["2020-01-01", "words"]
    assert {split: rows["text"][:] for split, rows in found["parts"].items()} == {
        "train": ["NA"],
        "validation": ["007"],
    }
    (tmp_path / "parts" / "train.csv").write_text("id,text\n1,a,b\n")
    with pytest.raises(ValueError, match=r"its file is '.*train.csv'; line 2: 3 cells under 2 columns"):
        load_text(str(tmp_path / "parts"), None, None, "text")
    (tmp_path / "lines" / "c.jsonl").write_text('{"text": "four"}\n')
    with pytest.raises(ValueError, match=r"it holds '[abc]\.\w+' beside files of another kind"):
        load_text(str(tmp_path / "lines"), None, None, "text")


def test_a_data_set_without_the_column_or_the_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    Dataset.from_dict({"content": ["a"]}).to_json(tmp_path / "data" / "train.jsonl")
    with pytest.raises(ValueError, match=r"its file is .*train.jsonl'; `text_column` is 'text'; the columns are 'cont"):
        load_text(str(tmp_path / "data"), None, None, "text")
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "train.csv").write_text("content\nwords\n")
    with pytest.raises(ValueError, match=r"its file is .*train.csv'; `text_column` is 'text'; the columns are 'conte"):
        load_text(str(tmp_path / "table"), None, None, "text")
    (tmp_path / "data" / "train.jsonl").rename(tmp_path / "data" / "test.jsonl")
    with pytest.raises(ValueError, match=r"it has the splits test; a split 'train' is needed"):
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


def test_a_cache_that_cannot_be_written_is_no_fault_of_the_text(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "text.txt").write_text("Some text.")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(ValueError, match=r"the cache .*cache., cannot be written .*HF_DATASETS_CACHE"):
        load_text(None, None, str(tmp_path / "text.txt"), "text")

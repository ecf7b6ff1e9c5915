"""Reads texts and makes sequences of tokens of one length of them."""

import csv
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.compute as pc
import torch
from datasets import Dataset, DatasetDict, Features, Value, concatenate_datasets, load_dataset_builder
from datasets.exceptions import DatasetGenerationError, DatasetsError
from datasets.fingerprint import Hasher
from pyarrow.parquet import ParquetFile
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..errors import is_disk_full, one_line
from ..evaluation import text_prefix
from ..hub.reachability import check_answers
from ..version import __version__
from .text_files import ENCODING, file_fault, is_unicode, text_fault


def check_source(
    dataset: str | None, dataset_config: str | None, text_file: str | None, text_column: str, flag: str = "text_file"
) -> None:
    """
    Checks what can be known of a source of text without loading it; see [`load_text`].

    Raises:
        ValueError: for none or two sources, a flag that the source has no use for, a folder whose name means something
            else to `datasets`, or a file that is missing, empty or, but for `.parquet`, not UTF-8.
    """
    if (dataset is None) == (text_file is None):
        raise ValueError(f"`dataset` is {dataset!r} and `text_file` {text_file!r}; exactly one of them must be given.")
    name, source = ("dataset", dataset) if text_file is None else (flag, text_file)
    if not source or not is_unicode(source):  # cards name it
        raise ValueError(f"`{name}` is {source!r}; it must be a name, in Unicode.")
    if dataset is not None:
        _check_names(dataset)
    if text_file is None:
        return
    if dataset_config is not None:
        raise ValueError(f"`dataset_config` is {dataset_config!r}; it goes with `dataset`, not with `text_file`.")
    path = Path(text_file)
    if (fault := file_fault(path)) is not None:
        raise ValueError(f"`{flag}` is {text_file!r}; {fault}.")
    kind = path.suffix.lower()
    if kind not in _READERS and text_column != "text":
        raise ValueError(
            f"`text_column` is {text_column!r}; `{flag}` {text_file!r} is read as text, which has no columns (files "
            f"that have end in {', '.join(_READERS)})."
        )
    if kind != ".parquet" and (fault := text_fault(path)) is not None:
        raise ValueError(f"`{flag}` is {text_file!r}; {fault}.")


def has_rows(path: Path) -> bool:
    """Whether a file is read by rows, and not as text."""
    return path.suffix.lower() in _READERS


def load_text(
    dataset: str | None, dataset_config: str | None, text_file: str | None, text_column: str, flag: str = "text_file"
) -> DatasetDict:
    """
    Loads a data set by its Hub id or local folder, or a file: the splits `"train"` and, where there is one,
    `"validation"`, with the column `"text"` alone.

    Args:
        dataset (`str`, *optional*):
            Hub id or local folder, as [`~datasets.load_dataset`] takes it.
        dataset_config (`str`, *optional*):
            Name of the data set's configuration.
        text_file (`str`, *optional*):
            A file, instead of `dataset`, which becomes the split `"train"`: the rows of a `.jsonl`, `.csv` or
            `.parquet` file; every other file as one document of UTF-8 text.
        text_column (`str`):
            Column of the data set, or of a file with rows, that holds the text.
        flag (`str`, *optional*, defaults to `"text_file"`):
            What a message calls the file.

    Raises:
        ValueError: as [`check_source`], and for what cannot be read, or has no split `"train"` or no such column of
            strings.
    """
    check_source(dataset, dataset_config, text_file, text_column, flag)
    name, source = ("dataset", dataset) if text_file is None else (flag, text_file)
    try:
        if text_file is not None:
            return DatasetDict(train=_read_file(Path(text_file), text_column))
        splits = _read_dataset(str(dataset), dataset_config, text_column)
    except (DatasetsError, ValueError, OSError, StopIteration) as error:
        if is_disk_full(error):
            raise
        cache = Path(datasets.config.HF_DATASETS_CACHE)
        if isinstance(error, OSError) and error.filename is not None and cache in _with_parents(error.filename):
            raise ValueError(
                f"`{name}` is {source!r}, and the cache that it is prepared in, {str(cache)!r}, cannot be written "
                f"({error.strerror}); name another folder with HF_DATASETS_CACHE."
            ) from error
        raise ValueError(f"`{name}` is {source!r}, which cannot be read: {_reason(error)}") from error
    if "train" not in splits:
        raise ValueError(f"`{name}` {source!r} has the splits {', '.join(splits)}; a split 'train' is needed.")
    used = {split: splits[split] for split in ("train", "validation") if split in splits}
    for rows in used.values():
        if text_column not in rows.column_names:
            columns = ", ".join(map(repr, rows.column_names))
            raise ValueError(f"`text_column` is {text_column!r}; the columns of {source!r} are {columns}.")
        feature = rows.features[text_column]
        if feature not in (Value("string"), Value("large_string")):
            raise ValueError(
                f"`text_column` is {text_column!r}, whose type in {source!r} is {feature}; it must be text."
            )
    renamed = {} if text_column == "text" else {text_column: "text"}
    return DatasetDict(
        {split: rows.select_columns(text_column).rename_columns(renamed) for split, rows in used.items()}
    )


def _reason(error: BaseException) -> str:
    """Tells why something cannot be read; the cause of an "error occurred while generating the dataset" says more."""
    return one_line(error.__cause__ if type(error) is DatasetGenerationError and error.__cause__ else error)


def _with_parents(path: str | bytes) -> list[Path]:
    path = Path(os.fsdecode(path))
    return [path, *path.parents]


def _check_names(dataset: str) -> None:
    """Refuses a file, and a folder where `datasets` would look elsewhere, to which paths are patterns, and chains."""
    if os.path.isfile(dataset):
        raise ValueError(f"`dataset` is {dataset!r}; it is a file, which `text_file` takes.")
    if not os.path.isdir(dataset):
        return
    folder = Path(dataset).resolve()
    if any(sign in str(folder) for sign in ("[", "*", "?", "::")):
        raise ValueError(
            f"`dataset` is {dataset!r}, the folder {str(folder)!r}; data sets cannot be read from a path with '[', "
            "'*', '?' or '::' in it. Move or rename it."
        )
    for path in folder.rglob("*::*"):
        raise ValueError(f"`dataset` is {dataset!r}, whose {path.name!r} cannot be read for its '::'. Rename it.")


def _read_dataset(dataset: str, dataset_config: str | None, text_column: str) -> DatasetDict:
    """Reads all splits and columns of a data set of the Hub, or of a local folder."""
    is_local = os.path.isdir(dataset)
    check_answers(dataset)
    # As an absolute path a folder is that folder, be its name "csv" or "~".
    source = str(Path(dataset).resolve()) if is_local else dataset
    builder = load_dataset_builder(source, dataset_config)
    if is_local and not any((Path(source) / name).exists() for name in _DESCRIPTIONS):
        files = {str(split): [*map(Path, paths)] for split, paths in (builder.config.data_files or {}).items()}
        if all(path.suffix.lower() in (*_READERS, ".txt") for path in itertools.chain.from_iterable(files.values())):
            return _read_files(Path(source), files, text_column)
    if builder.name == "csv" and builder.config.usecols is None:  # words such as "NA", "null" and "007" are no others
        only = {"features": Features({text_column: Value("string")}), "usecols": [text_column]}
        # Nor is the first column of rows that have too many cells an index.
        builder = load_dataset_builder(source, dataset_config, keep_default_na=False, index_col=False, **only)
    elif builder.name == "text" and builder.config.encoding == "utf-8":
        # As a file that is given alone: a row for each line would leave out where it ends.
        builder = load_dataset_builder(source, dataset_config, encoding=ENCODING, sample_by="document")
    try:
        builder.download_and_prepare()
        splits = builder.as_dataset()
        for rows in splits.values():
            if text_column in rows.column_names:
                rows.data[text_column].validate(full=True)  # that it is UTF-8, which not all readers look at
    except Exception as error:  # of any type, such as the StopIteration of an empty file
        if is_local and builder.name in ("csv", "json", "text") and not is_disk_full(error):
            for path in map(Path, itertools.chain.from_iterable(builder.config.data_files.values())):
                if path.is_file() and (fault := text_fault(path)) is not None:
                    raise ValueError(f"its file is {str(path)!r}; {fault}.") from error
        raise
    return splits


def _read_files(folder: Path, files: dict[str, list[Path]], column: str) -> DatasetDict:
    """
    Reads the texts of a folder's files, each as if it were given alone.

    Raises:
        ValueError: where some are of another kind, which `datasets` passes over.
    """
    read = set(itertools.chain.from_iterable(files.values()))
    for path in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
        if path.suffix.lower() in (*_READERS, ".txt") and path.is_file() and path not in read and not is_hidden:
            raise ValueError(f"it holds {path.name!r} beside files of another kind; put it into another folder.")
    if "train" not in files:
        raise ValueError(f"it has the splits {', '.join(files)}; a split 'train' is needed.")
    splits = {}
    for split in files.keys() & {"train", "validation"}:
        parts = []
        for path in files[split]:
            try:
                if path.suffix.lower() != ".parquet" and (fault := text_fault(path)) is not None:
                    raise ValueError(f"{fault}.")
                parts.append(_read_file(path, column))
            except (DatasetsError, ValueError) as error:
                raise ValueError(f"its file is {str(path)!r}; {_reason(error)}") from error
        splits[split] = concatenate_datasets(parts).rename_columns({} if column == "text" else {"text": column})
    return DatasetDict(splits)


def _read_file(path: Path, column: str) -> Dataset:
    """
    Reads the texts of a file, cached by what it holds. `datasets` has readers of its own, but takes paths for patterns
    and guesses what the cells of a column are.
    """
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    return Dataset.from_generator(
        _texts,
        features=Features(text=Value("large_string")),
        gen_kwargs={"path": str(path), "column": column},
        fingerprint=Hasher.hash((content, path.suffix.lower(), column, __version__)),
    )


def _texts(path: str, column: str) -> Iterator[dict[str, str | None]]:
    has_text = False
    for where, text in _READERS.get(Path(path).suffix.lower(), _document)(Path(path), column):
        if text is not None:
            if not isinstance(text, str):
                raise ValueError(f"{where}: `text_column` is {column!r}, which holds {text!r}; it must be text.")
            if not is_unicode(text):
                raise ValueError(f"{where}: it must be Unicode text; a surrogate is half of a character.")
            has_text = has_text or not (text == "" or text.isspace())
        yield {"text": text}
    if not has_text:
        raise ValueError("it holds no text.")


def _document(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    yield "the file", path.read_text(encoding=ENCODING)


def _json_rows(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    columns: dict[str, None] = {}  # rows need not have the same ones
    with path.open(encoding=ENCODING) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is no JSON ({error.msg} at character {error.colno}).") from error
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no JSON object.")
            columns |= dict.fromkeys(row)
            yield f"line {number}", row.get(column)
    _check_column(column, list(columns))


def _csv_rows(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # of a cell; by default less than many a text has
    with path.open(encoding=ENCODING, newline="") as file:
        lines = csv.reader(file, strict=True)
        rows = filter(None, lines)  # a blank line is none
        try:
            columns = next(rows, [])
            _check_column(column, columns)
            for row in rows:
                if len(row) != len(columns):
                    raise ValueError(f"line {lines.line_num}: {len(row)} cells under {len(columns)} columns.")
                yield f"line {lines.line_num}", row[columns.index(column)]
        except csv.Error as error:
            raise ValueError(f"line {lines.line_num} is no CSV ({error}).") from error


def _parquet_rows(path: Path, column: str) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        parquet, number = ParquetFile(file), itertools.count(1)
        _check_column(column, parquet.schema_arrow.names)
        for batch in parquet.iter_batches(1000, columns=[column]):
            for text in batch.column(column).to_pylist():
                yield f"row {next(number)}", text


def _check_column(column: str, columns: list[str]) -> None:
    if columns.count(column) != 1:
        raise ValueError(f"`text_column` is {column!r}; the columns are {', '.join(map(repr, columns)) or 'none'}.")


# What says how the files of a folder are to be read, or that they are of `Dataset.save_to_disk`.
_DESCRIPTIONS = ("README.md", "dataset_infos.json", "dataset_dict.json", "state.json")
#: Files that have rows, by their suffix; every other file is text.
_READERS: dict[str, Callable[[Path, str], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}


def tokenize_and_pack(
    texts: Dataset, tokenizer: PreTrainedTokenizerBase, sequence_length: int, desc: str | None = None
) -> Dataset:
    """
    Tokenises texts, joins them end to end and cuts the stream into sequences of `sequence_length` tokens; what is left
    over at the end is dropped. The results are cached by `datasets`.

    What the tokenizer puts before a text ([`~localist_hf.evaluation.text_prefix`]) stands at the beginning of every
    sequence, and nowhere else: the model has it there whenever it reads, and attends to it as to no other token. What
    the tokenizer puts after a text stays there.

    Args:
        texts ([`~datasets.Dataset`]):
            With a column `"text"`; an empty cell is an empty text.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer.
        sequence_length (`int`):
            Tokens of a sequence, its beginning among them.
        desc (`str`, *optional*):
            What the progress bar says.

    Returns:
        [`~datasets.Dataset`] with the columns `"input_ids"` and `"labels"`, the labels being the tokens, and
        -100 for what the tokenizer puts before a text: no text says that it is one.

    Raises:
        ValueError: where the texts are shorter than one sequence, or the sequence has no room for them.
    """
    prefix = text_prefix(tokenizer)  # before the rest: a first call changes the tokenizer's state, the key of the cache
    room = sequence_length - len(prefix)
    if room < 1:
        raise ValueError(
            f"`sequence_length` is {sequence_length}; the tokenizer begins every text with {len(prefix)} tokens of its "
            f"own ({tokenizer.decode(prefix)!r}), so it must be at least {len(prefix) + 1}."
        )

    def tokenize(batch: dict[str, list[str | None]]) -> dict[str, list[list[int]]]:
        return {"input_ids": tokenizer([text or "" for text in batch["text"]], verbose=False)["input_ids"]}

    rest: list[int] = []  # of the batches so far, in which texts may be shorter than a sequence

    def pack(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        tokens = rest + list(itertools.chain.from_iterable(ids[len(prefix) :] for ids in batch["input_ids"]))
        end = len(tokens) // room * room
        rest[:] = tokens[end:]
        pieces = [tokens[start : start + room] for start in range(0, end, room)]
        return {
            "input_ids": [prefix + piece for piece in pieces],
            "labels": [[-100] * len(prefix) + piece for piece in pieces],
        }

    tokens = texts.map(tokenize, batched=True, remove_columns=texts.column_names, desc=desc and f"Tokenizing {desc}")
    packed = tokens.map(pack, batched=True, desc=desc and f"Packing {desc}")
    if len(packed) == 0:
        count = sum(map(len, tokens["input_ids"])) - len(prefix) * len(tokens)
        raise ValueError(f"The text of {desc or 'the data set'} has {count} tokens; one sequence needs {room}.")
    return packed


def check_token_ids(
    sequences: Dataset, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, name: str = "model"
) -> None:
    """
    Refuses sequences with a token that a model does not have. Tokenizers may know more tokens than a model, such as one
    for pictures, as long as no text holds one.

    Args:
        sequences ([`~datasets.Dataset`]):
            From [`tokenize_and_pack`].
        config ([`~transformers.PreTrainedConfig`]), tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's.
        name (`str`, *optional*, defaults to `"model"`):
            What the caller calls it.

    Raises:
        ValueError: where there is one.
    """
    size = config.get_text_config().vocab_size
    batches = sequences.with_format("arrow").iter(10_000)  # no list is made of all tokens
    highest = max((pc.max(pc.list_flatten(batch["input_ids"])).as_py() for batch in batches), default=0)
    if highest >= size:
        raise ValueError(
            f"The text has the token {highest} ({tokenizer.decode([highest])!r}), which the tokenizer knows and "
            f"`{name}` does not: its vocabulary has the ids 0 to {size - 1}."
        )


def train_and_validation(
    splits: DatasetDict, tokenizer: PreTrainedTokenizerBase, sequence_length: int, validation_share: float
) -> tuple[Dataset, Dataset]:
    """
    Makes sequences for training and for validation: those of the splits `"train"` and `"validation"`, or, where there
    is no such split, the last `validation_share` of the training sequences held out.
    """
    train = tokenize_and_pack(splits["train"], tokenizer, sequence_length, "train")
    if "validation" in splits:
        return train, tokenize_and_pack(splits["validation"], tokenizer, sequence_length, "validation")
    held_out = round(len(train) * validation_share)
    if not 0 < held_out < len(train):
        raise ValueError(
            f"`validation_share` is {validation_share} and the text has {len(train)} sequences of {sequence_length} "
            "tokens: at least one must remain for training and one for validation."
        )
    kept = len(train) - held_out
    return train.select(range(kept)), train.select(range(kept, len(train)))


def some_of(dataset: Dataset, number: int) -> Dataset:
    """Selects so many sequences at most, from all over a data set and the same every time."""
    return dataset if len(dataset) <= number else dataset.shuffle(seed=0).select(range(number))


def tokens_ending(ends: Sequence[str], tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """Finds the tokens of a vocabulary whose text, spaces after it left out, ends in one of these ways; in order."""
    # Of the ids some may be left out, and some tokenizers know more than their model.
    known = sorted(token for token in tokenizer.get_vocab().values() if token < vocab_size)
    return [token for token in known if tokenizer.decode([token]).rstrip(" ").endswith(tuple(ends))]


def follows_end(
    tokens: torch.Tensor, ends: Sequence[str], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> torch.Tensor:
    """True on each token of `(num_sequences, length)` whose predecessor in its sequence ends in one of these ways."""
    is_end = torch.isin(tokens, torch.tensor(tokens_ending(ends, tokenizer, vocab_size), dtype=torch.long))
    return F.pad(is_end[:, :-1], (1, 0))

"""From text to sequences of tokens of one length."""

import codecs
import importlib
import itertools
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset
from transformers import PreTrainedTokenizerBase


def load_text(dataset: str | None, dataset_config: str | None, text_file: str | None, text_column: str) -> DatasetDict:
    """
    Loads a data set by its Hub id or local folder, or a text file, as the splits it has.

    Args:
        dataset (`str`, *optional*):
            Hub id or local folder, as [`~datasets.load_dataset`] takes it.
        dataset_config (`str`, *optional*):
            Name of the data set's configuration.
        text_file (`str`, *optional*):
            A UTF-8 text file, instead of `dataset`; it becomes one document in the split `"train"`.
        text_column (`str`):
            Column of the data set that holds the text.

    Raises:
        ValueError: for a file that is missing, empty or not UTF-8, or a data set without the column or a train split.
    """
    if (dataset is None) == (text_file is None):
        raise ValueError(f"`dataset` is {dataset!r} and `text_file` {text_file!r}; exactly one of them must be given.")
    if text_file is not None:
        _check_text_file(Path(text_file))
        splits = load_dataset("text", data_files=str(text_file), sample_by="document")
        return splits
    splits = load_dataset(dataset, dataset_config)
    if "train" not in splits:
        raise ValueError(f"`dataset` {dataset!r} has the splits {', '.join(splits)}; a split 'train' is needed.")
    columns = splits["train"].column_names
    if text_column not in columns:
        raise ValueError(
            f"`text_column` is {text_column!r}; the columns of {dataset!r} are {', '.join(map(repr, columns))}."
        )
    return splits.select_columns(text_column).rename_columns({} if text_column == "text" else {text_column: "text"})


def _check_text_file(path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"`text_file` is {str(path)!r}; there is no such file.")
    decoder, has_text = codecs.getincrementaldecoder("utf-8")(), False
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                has_text = bool(decoder.decode(chunk).strip()) or has_text
        decoder.decode(b"", final=True)  # a letter cut off at the end
    except UnicodeDecodeError as error:
        raise ValueError(f"`text_file` is {str(path)!r}; it must be UTF-8 text ({error}).") from error
    if not has_text:
        raise ValueError(f"`text_file` is {str(path)!r}; the file is empty.")


def tokenize_and_pack(
    texts: Dataset, tokenizer: PreTrainedTokenizerBase, sequence_length: int, desc: str | None = None
) -> Dataset:
    """
    Tokenises texts, joins them end to end and cuts the stream into sequences of `sequence_length` tokens; what is left
    over at the end is dropped. The results are cached by `datasets`.

    Args:
        texts ([`~datasets.Dataset`]):
            With a column `"text"`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The model's tokenizer.
        sequence_length (`int`):
            Tokens of a sequence.
        desc (`str`, *optional*):
            What the progress bar says.

    Returns:
        [`~datasets.Dataset`] with the columns `"input_ids"` and `"labels"`, the labels being the tokens.

    Raises:
        ValueError: where the texts are shorter than one sequence.
    """
    tokenizer("")  # a tokenizer's first call changes its state, and with it the key of the cache

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"input_ids": tokenizer(batch["text"], verbose=False)["input_ids"]}

    def pack(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        tokens = list(itertools.chain.from_iterable(batch["input_ids"]))
        end = len(tokens) // sequence_length * sequence_length
        sequences = [tokens[start : start + sequence_length] for start in range(0, end, sequence_length)]
        return {"input_ids": sequences, "labels": sequences}

    tokens = texts.map(tokenize, batched=True, remove_columns=texts.column_names, desc=desc and f"Tokenizing {desc}")
    packed = tokens.map(pack, batched=True, batch_size=10_000, desc=desc and f"Packing {desc}")
    if len(packed) == 0:
        count = sum(map(len, tokens["input_ids"]))
        raise ValueError(
            f"The text of {desc or 'the data set'} has {count} tokens; one sequence needs {sequence_length}."
        )
    return packed


def train_and_validation(
    splits: DatasetDict, tokenizer: PreTrainedTokenizerBase, sequence_length: int, validation_share: float
) -> tuple[Dataset, Dataset]:
    """
    Sequences for training and for validation: those of the splits `"train"` and `"validation"`, or, where there is no
    such split, the last `validation_share` of the training sequences held out.
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


def python_reference() -> dict[str, str]:
    """
    The topics of the Python language reference, which every CPython ships as `pydoc_data.topics` (about 460 KB of
    English technical prose; the text differs a little between Python versions).
    """
    topics: dict[str, Any] = importlib.import_module("pydoc_data.topics").topics
    return {name: text.strip() + "\n\n" for name, text in sorted(topics.items())}

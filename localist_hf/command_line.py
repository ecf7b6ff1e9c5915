"""
The flags of every command but `train`, whose are transformers' own. Nothing but the standard library is imported here:
`localist_hf_main` reads this file by its path, so that help and a wrong flag need nothing of the package, which takes
seconds to import.
"""

import argparse
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn


#: No number that a command takes has a use beyond that of a seed; with such ones nothing that is computed of them, be
#: it a product, leaves what torch can hold.
LARGEST = 2**32 - 1
#: Arguments of all commands that name a folder which is written to.
OUTPUT_FOLDERS = ("output_dir", "model_cards", "folder")
#: Bytes of a name in a folder, of a path on Linux, and of what a command adds to that of its folder.
_NAME_BYTES, _PATH_BYTES, _ADDED_BYTES = 255, 4095, 512
#: Letters of a word in a message that is shown whole.
_SHOWN_LETTERS = 300
#: Longest title of a collection on the Hub that is taken; that of its description is the same.
_TITLE_LETTERS = 150
#: What the page needs; the extra `view` is of a distribution that no index has.
GRADIO = "gradio>=6.31,<7"


class CommandParser(argparse.ArgumentParser):
    """A parser that ends in one line, with status 2, and which takes no empty argument for a value."""

    def error(self, message: str) -> NoReturn:
        """Exits with the message on one line, and without the usage."""
        self.exit(2, f"{self.prog}: error: {shortened(message)}\n")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """See `argparse`; a path would take an empty name, as of a shell's variable that is not set, for the folder."""
        before = None
        for argument in args or ():
            flag, is_assigned, value = argument.partition("=")
            if not argument or (flag.startswith("--") and is_assigned and not value):
                name = flag or before
                self.error(f"argument {name}: it is empty" if name else "an argument is empty")
            before = argument if argument.startswith("--") else None
        found = super().parse_known_args(args, namespace)
        values = vars(found[0])
        try:
            check_texts(values)
            check_numbers(values)
            for name in OUTPUT_FOLDERS:
                if values.get(name) is not None:
                    check_output_folder(name, values[name])
        except ValueError as error:
            self.error(str(error))
        return found


def check_numbers(values: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: for a number that is not finite, or beyond `LARGEST`.
    """
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{name}` is {value}; it must be a finite number.")
        if isinstance(value, int | float) and abs(value) > LARGEST:
            bound = "below 2**32" if value > 0 else "above -2**32"
            raise ValueError(f"`{name}` is {value}; it must be {bound}.")


def check_train_flags(arguments: Sequence[str], parser: CommandParser) -> None:
    """
    Exits at a flag of `localist-hf train` that is none of it: most are those of transformers' `TrainingArguments`,
    which takes seconds to import, so that here their names are read in its source. What is missed comes later.
    """
    folder = Path(__file__).parent
    files = [folder / "cli/arguments.py", *folder.glob("*/*locali*_arguments.py")]
    if (transformers := find_spec("transformers")) is not None and transformers.origin:
        files.append(Path(transformers.origin).parent / "training_args.py")
    names = {name for file in files for name in re.findall(r"^    (\w+): ", file.read_text("utf-8"), re.MULTILINE)}
    if "per_device_train_batch_size" not in names:  # another transformers, whose source says it otherwise
        return
    flags = {"config", "help", *names, *(f"no_{name}" for name in names)}
    for argument in arguments:
        flag = argument.partition("=")[0]
        if re.fullmatch(r"--[a-zA-Z]\S*", flag) and flag[2:].replace("-", "_") not in flags:
            parser.error(f"unrecognized arguments: {argument}")


def check_texts(values: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: for text and names that are not UTF-8, which no file of ours could hold, or have a zero byte.
    """
    for name, value in values.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str | Path) and re.search("[\0\ud800-\udfff]", str(each)):
                raise ValueError(f"`{name}` is {str(each)!r}; it must be UTF-8 without zero bytes.")


def check_output_folder(name: str, folder: str | Path) -> None:
    """
    Raises:
        ValueError: for a path at which there is no folder, and none can be made.
    """
    folder = Path(folder)
    place = next(place for place in (folder, *folder.parents) if os.path.lexists(place) or place.name == "")
    fault = None
    if any(len(os.fsencode(part)) > _NAME_BYTES for part in folder.parts):
        fault = f"a name in it has more than {_NAME_BYTES} bytes"
    elif len(os.fsencode(folder.absolute())) > _PATH_BYTES - _ADDED_BYTES:
        fault = f"it has more than {_PATH_BYTES - _ADDED_BYTES} bytes"
    elif not os.path.isdir(place):
        fault = f"{str(place)!r} is {'a link that leads nowhere' if place.is_symlink() else 'a file'}"
    if fault is not None:
        raise ValueError(
            f"`{name}` is {str(folder)!r}, which cannot be used: {fault}; it must be a folder, or none yet."
        )


def shortened(message: str) -> str:
    """A message without the middle of what nobody reads to the end, such as a number of 5000 digits."""
    return re.sub(rf"\S{{{_SHOWN_LETTERS},}}", lambda word: f"{word[0][:60]}...{word[0][-20:]}", message)


def family_parser() -> CommandParser:
    """The parser of `localist-hf family`."""
    parser = CommandParser(
        prog="localist-hf family",
        description="Fine-tune a base under the locality configurations of a grid and compare them on held-out text. "
        "The base is the small GPT-2 that comes with this package, and the text what every CPython ships, so it needs "
        "no network. Stopped and started again, it goes on with what is left.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "grid", nargs="?", default="paper", help="what to compare: paper, quick, or a YAML file with the fields of Grid"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("runs/family"), help="folder of all models and results")
    parser.add_argument("--model", help="another base: a causal language model's folder or Hub id")
    parser.add_argument("--train-text", metavar="FILE", help="text to train on, with --held-out-text")
    parser.add_argument("--held-out-text", metavar="FILE", help="text to measure on")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time")
    parser.add_argument(
        "--shard", type=shard_of, metavar="I/N",
        help="do the I-th of N parts only, such as 1/4: put the parts' folders together afterwards and start once more "
        "without this",
    )  # fmt: skip
    parser.add_argument("--model-cards", type=Path, metavar="DIR", help="also write records and cards to DIR/NAME")
    return parser


def shard_of(text: str) -> tuple[int, int]:
    """Reads `"2/3"` as its numbers."""
    index, _, number = text.partition("/")
    is_number = index.isdecimal() and number.isdecimal() and len(text) < 20
    if not (is_number and 1 <= int(index) <= int(number)):
        raise argparse.ArgumentTypeError(f"{text!r}; it must be I/N with I from 1 to N, such as 1/4")
    return int(index), int(number)


def evaluate_parser() -> CommandParser:
    """The parser of `localist-hf evaluate`."""
    parser = CommandParser(
        prog="localist-hf evaluate",
        description="Measure where the attention of a causal language model goes, by layer and head, whether it was "
        "trained for locality or not: perplexity, context fidelity (of the attention to other words, the part that "
        "stays in the block), also on the blocks of another text, as a control; the shares of the attention on the "
        "token itself, sinks, the block and elsewhere; entropy. Prints tables and writes pictures and all numbers. No "
        "attention matrix is made, so that long texts can be measured.",
    )
    _add_model(parser)
    parser.add_argument(
        "--text-file", nargs="+", default=[], metavar="FILE",
        help="text to measure on: .jsonl, .csv and .parquet by the rows of a column 'text', any other as UTF-8 text; "
        "by default 32 sequences of the Python sources and reference that `localist-hf family` measures on",
    )  # fmt: skip
    parser.add_argument(
        "--sequence-length", type=int, metavar="N",
        help="tokens of a sequence, such as 16384; by default the model's positions, at most 1024",
    )  # fmt: skip
    _add_locality(parser)
    parser.add_argument(
        "--block-model", metavar="MODEL", help="model whose blocks count: a common base, where models are compared"
    )
    parser.add_argument(
        "--controls", action="store_true", help="also windows, recency and the dial from 0 to 1: 25 passes instead of 3"
    )
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="folder for numbers and pictures; runs/evaluate/NAME by default"
    )
    return parser


def recruit_parser() -> CommandParser:
    """The parser of `localist-hf recruit`."""
    parser = CommandParser(
        prog="localist-hf recruit",
        description="Find out from a causal language model, over a text and without being told what a sentence or a "
        "line is, after which tokens blocks are to start: those after which its predictions lose least by seeing "
        "nothing of what was before. Prints them, the blocks of a sample, and how often blocks start where a reader "
        "would start them; writes the settings for `localist-hf train --config`. The model is not changed.",
    )
    _add_model(parser)
    parser.add_argument(
        "--text-file", nargs="+", required=True, metavar="FILE",
        help="text of the kind that the model is for, in which separators occur 60 times at least: .jsonl, .csv and "
        ".parquet by the rows of a column 'text', any other as UTF-8 text",
    )  # fmt: skip
    parser.add_argument(
        "--mean-length", type=float, default=16.0, metavar="N", help="tokens of a block on average (default: 16)"
    )
    parser.add_argument(
        "--sequence-length", type=int, metavar="N",
        help="tokens of a sequence; by default the model's positions, at most 1024",
    )  # fmt: skip
    parser.add_argument(
        "--locality", metavar="JSON",
        help="settings of locality in place of the model's own, such as '{\"num_sink_tokens\": 1}', but for the "
        "partition; they are written with the separators",
    )  # fmt: skip
    parser.add_argument(
        "--boundaries", nargs="+", default=["\n", "."], metavar="END",
        help="what ends a part of the text for a reader, for the lift; by default the ends of lines and full stops",
    )  # fmt: skip
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="folder for numbers and settings; runs/recruit/NAME by default"
    )
    return parser


def _add_model(parser: CommandParser) -> None:
    """The model that a command is about."""
    parser.add_argument("model", metavar="MODEL", help="model or LoRA adapter: a local folder or a Hub id")


def _add_locality(parser: CommandParser) -> None:
    """The settings under which a model is looked at."""
    parser.add_argument(
        "--locality", metavar="JSON",
        help="settings of locality in place of the model's own, such as '{\"num_sink_tokens\": 1}'",
    )  # fmt: skip


def _add_text(parser: CommandParser) -> None:
    """The flags of one text that is read."""
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--text", metavar="TEXT", help="the text; by default a piece of the Python language reference")
    texts.add_argument("--text-file", type=Path, metavar="FILE", help="a file in UTF-8 that holds it")


def explain_parser() -> CommandParser:
    """The parser of `localist-hf explain`."""
    parser = CommandParser(
        prog="localist-hf explain",
        description="What one prediction of a causal language model rests on: its blocks and words, by what changes "
        "when each is replaced by other words of the text, or no longer attended to, and beside it by the attention, "
        "which need not agree; and whether there is a bound on what can count. Prints tables, and writes all numbers "
        "and a picture.",
    )
    _add_model(parser)
    _add_text(parser)
    parser.add_argument(
        "--position", type=int, metavar="N", help="the token after which to predict, from 0; by default the last"
    )
    parser.add_argument("--dial", type=float, default=0.0, metavar="D", help="the dial, from 0 to 1 (default: 0)")
    parser.add_argument(
        "--draws", type=int, default=4, metavar="N",
        help="times that each is replaced, by other words each time (default: 4): so many passes for each token",
    )  # fmt: skip
    parser.add_argument(
        "--gradients", action="store_true", help="attributions by gradients too, which Captum makes (an extra)"
    )
    _add_locality(parser)
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="folder for numbers and picture; runs/explain/NAME by default"
    )
    return parser


def view_parser() -> CommandParser:
    """The parser of `localist-hf view`."""
    parser = CommandParser(
        prog="localist-hf view",
        description="Read the attention of a causal language model, whether it was trained for locality or not: the "
        "text and its blocks; of each token where it looks, by layer and head; what comes next at each position of the "
        f"dial. Opens a page on this machine (which needs `pip install '{GRADIO}'`), or saves one, without the dial, "
        "as a file that needs no server.",
    )
    parser.add_argument(
        "model", metavar="MODEL", nargs="?",
        help="model or LoRA adapter: a local folder or a Hub id; or a folder of runs, such as runs/demo, to choose "
        "from, of which the most telling one is read beside its baseline. By default the small base that the package "
        "comes with, under the quintic schedule",
    )  # fmt: skip
    _add_text(parser)
    parser.add_argument("--compare", metavar="MODEL", help="second model, with the same tokens, beside the first")
    parser.add_argument(
        "--locality", metavar="JSON",
        help="settings of locality in place of the models' own, such as '{\"num_sink_tokens\": 1}'",
    )  # fmt: skip
    parser.add_argument(
        "--save", type=Path, metavar="FILE", help="write the page, of 50 MB at most, to this file, and open none"
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N",
        help="tokens of the longest text that the page reads, however long that takes; by default 2048, or as many as "
        "this machine reads in two seconds",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, help="port to listen on; by default the first that is free from 7860 on")
    parser.add_argument("--share", action="store_true", help="let Gradio make a public link to the page")
    return parser


def publish_parser() -> CommandParser:
    """The parser of `localist-hf publish`."""
    parser = CommandParser(
        prog="localist-hf publish",
        description="Publish a run, or every run in a folder, as NAMESPACE/localist-MODEL-NAME (such as "
        "localist-gpt2-quintic), each in one commit: weights, configuration, code, tokenizer, card, picture and "
        "record. What only training needs (checkpoints, pickles, optimizer states, logs) stays behind. Run again, it "
        "changes nothing or adds one commit with what has changed. Log in with `hf auth login` or set HF_TOKEN.",
    )
    parser.add_argument("run", type=Path, help="folder of a run, or of several, such as runs/family")
    parser.add_argument("--namespace", required=True, type=part_of_id, help="user or organisation on the Hub")
    parser.add_argument("--name", type=part_of_id, help="of a single run: publish it as NAMESPACE/localist-MODEL-NAME")
    parser.add_argument("--private", action="store_true", help="make new repositories (and the collection) private")
    parser.add_argument(
        "--collection", type=title_of_collection, metavar="TITLE",
        help="add all of them to this collection of the namespace, made if need be",
    )  # fmt: skip
    parser.add_argument(
        "--space", metavar="ID",
        help="make NAMESPACE/NAME a Space with the page of `localist-hf view`, on which anybody reads with these "
        "models, at the commits that this call leaves them at; the cards link to it (give it each time)",
    )  # fmt: skip
    parser.add_argument(
        "--base-model", metavar="ID", help="Hub id of the base, where the run started from a folder of this machine"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="upload nothing: show every file with its size, the card, and what the Hub has already",
    )
    return parser


def part_of_id(text: str) -> str:
    """A text that can stand before or after the `/` in the id of a repository."""
    from huggingface_hub.utils import validate_repo_id  # half a second, for those alone who publish

    try:
        validate_repo_id(f"{text}/{text}")
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}; it must be letters, digits, '-', '_' and '.', which begin and end with a letter or a digit"
        ) from None
    return text


def title_of_collection(text: str) -> str:
    """A text that a collection on the Hub can be called by."""
    if not (text.strip() and text.isprintable() and len(text) <= _TITLE_LETTERS):
        raise argparse.ArgumentTypeError(
            f"{text!r}; it must be one line with something to read, of {_TITLE_LETTERS} letters at most"
        )
    return text


def update_parser() -> CommandParser:
    """The parser of `localist-hf update`."""
    parser = CommandParser(
        prog="localist-hf update",
        description="Give repositories that another version published the code of this one, each in one commit, and "
        "change nothing else of them: on transformers 5.24 the code of 0.1 and 0.2 writes wrong text at a dial. "
        "Models of 0.1 with semantic blocks keep their code, mended, since this version would find other blocks. Only "
        "code of ours is replaced; with somebody else's among it a repository is refused. Log in with `hf auth login` "
        "or set HF_TOKEN.",
    )
    parser.add_argument(
        "repository", nargs="+", help="NAMESPACE/NAME of a model or an adapter, such as my-org/localist-gpt2-quintic"
    )
    parser.add_argument("--dry-run", action="store_true", help="change nothing, and say what would be changed")
    return parser


def export_parser() -> CommandParser:
    """The parser of `localist-hf export`."""
    parser = CommandParser(
        prog="localist-hf export",
        description="Write a LocalistGPT2 model, or a LoRA adapter merged into its base, as a plain GPT-2 folder that "
        "needs no code of this project. It gives the logits that the model gives at dial 0; what was written is "
        "checked against the model before it gets its name.",
    )
    parser.add_argument("source", metavar="SOURCE", help="run folder of a model or of a LoRA adapter, or a Hub id")
    parser.add_argument("folder", metavar="FOLDER", help="new or empty folder to write to")
    return parser


#: The parser of each command that has one here.
PARSERS: dict[str, Callable[[], CommandParser]] = {
    "family": family_parser,
    "evaluate": evaluate_parser,
    "recruit": recruit_parser,
    "explain": explain_parser,
    "view": view_parser,
    "publish": publish_parser,
    "update": update_parser,
    "export": export_parser,
}

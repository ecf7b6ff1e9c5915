"""`localist-hf view`: a page on which to read the attention of any causal language model, live or as one file."""

import ipaddress
import os
import re
from bisect import bisect_right
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..command_line import GRADIO, view_parser
from ..errors import INPUT_ERRORS, InputError, is_disk_full, reraised_as
from ..evaluation.check_model import core_model, num_positions
from ..experiments.base import BASE
from ..experiments.data import check_source, has_rows
from ..experiments.python_text import python_reference
from ..experiments.text_files import ENCODING
from ..hub.loading import load
from ..hub.siblings import pair_to_open, records_in
from ..page import page_of
from ..page.passage import num_tokens
from ..page.saved_page import is_saved_page, max_page_tokens
from ..whole_file import check_can_be_written
from .arguments import locality_settings


#: What is read where no text is given: the beginning of a topic of the Python language reference, of the part that no
#: model of this package is trained on.
DEFAULT_TOPIC, _DEFAULT_CHARACTERS = "objects", 700


def default_text() -> str:
    """Returns whole lines of the Python language reference."""
    return python_reference()[DEFAULT_TOPIC][:_DEFAULT_CHARACTERS].rpartition("\n")[0]


def read_text(text: str | None, file: Path | None) -> str:
    """
    The text that is given, or that of a file, or the default one.

    Raises:
        ValueError: for a file with rows.
        OSError: for a file that cannot be read.
    """
    if file is None:
        return default_text() if text is None else text
    if has_rows(file):
        raise ValueError(f"`text_file` is {str(file)!r}, a file with rows; one text is read, from any other file.")
    check_source(None, None, str(file), "text")
    return file.read_text(encoding=ENCODING)


def models_of(name: str) -> tuple[list[str], str | None]:
    """
    Lists the model of this name, or the runs in a folder that holds no model itself: first the one that shows most, and
    which one stands beside it ([`pair_to_open`]).
    """
    folder = Path(name)
    if not os.path.isdir(folder) or any(  # which takes names that no folder can have
        (folder / file).is_file() for file in ("config.json", "adapter_config.json")
    ):
        return [name], None
    runs = {str(path): record for path, record in records_in(folder).items()}
    if not runs:
        return [name], None
    first, beside = pair_to_open(runs)
    return list(dict.fromkeys(filter(None, (first, beside, *runs)))), beside


def beginning(text: str, tokenizer: PreTrainedTokenizerBase, limit: int) -> str:
    """Cuts a text after as many words as have so many tokens; one at least."""
    words = re.findall(r"\s*\S+", text)
    lengths = range(len(words) + 1)
    number = bisect_right(lengths, limit, key=lambda length: num_tokens(tokenizer, "".join(words[:length]))) - 1
    return "".join(words[: max(1, number)])


def load_for_reading(
    name: str, settings: dict[str, Any], revisions: Mapping[str, str] = MappingProxyType({}), flag: str = "model"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    Loads a model to where it is fastest: the GPU where there is one; few processors are at home in half precision. See
    [`load`].
    """
    model, tokenizer = load(name, settings, revisions, flag)
    return model.to(PartialState().device, torch.float32), tokenizer


def main(arguments: list[str]) -> None:
    """Runs `localist-hf view` with these arguments."""
    args = view_parser().parse_args(arguments)
    names, beside = ([str(BASE)], None) if args.model is None else models_of(args.model)
    compare = args.compare or beside
    wanted = [names[0]] if compare is None else [names[0], compare]
    if args.port is not None and not 1 <= args.port <= 65535:
        raise InputError(f"`port` is {args.port}; it must be in 1 to 65535.")
    if args.max_tokens is not None and args.max_tokens < 1:
        raise InputError(f"`max_tokens` is {args.max_tokens}; it must be at least 1.")
    if args.max_tokens is not None and args.save is not None:
        raise InputError(f"`max_tokens` is {args.max_tokens}; it goes with the live page, not with `save`.")
    if args.save is None and find_spec("gradio") is None:
        raise InputError(f"`gradio` is not installed, which the page needs: pip install '{GRADIO}'.")
    with reraised_as(InputError, *INPUT_ERRORS):
        text = read_text(args.text, args.text_file)
    with reraised_as(InputError, *INPUT_ERRORS):
        settings = locality_settings(args.locality)
        if args.model is None:  # the base itself was trained without locality: no dial would change anything
            settings = {"locality_schedule": "quintic"} | settings
        if args.save is not None:
            _check_save(args.save)
        else:
            from ..page.serving import port_to_serve_on  # only those who open a page have Gradio

            port_to_serve_on(args.host, args.port)
        flags = {compare: "compare"} if compare not in names else {}
        loaded = {model: load_for_reading(model, settings, flag=flags.get(model, "model")) for model in wanted}
        models = [loaded[model] for model in wanted]
        if args.text is None and args.text_file is None:
            limits = [num_positions(core_model(model).config) for model, _ in models]
            limits.append(args.max_tokens if args.save is None else max_page_tokens(models))
            text = beginning(text, models[0][1], min(filter(None, limits), default=len(text)))

    if args.save is not None:
        with reraised_as(InputError, *INPUT_ERRORS):
            page_of(models, text).save(args.save)
        print(f"Written: {args.save}, {args.save.stat().st_size / 1e6:.1f} MB")
        return

    def load_by_name(name: str, flag: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return loaded.get(name) or load_for_reading(name, settings, flag=flag)

    from ..page.live_page import live_page
    from ..page.serving import launch_settings, serve

    # Strangers choose among these models only.
    is_open = _is_loopback(args.host) and not args.share
    page = live_page(load_by_name, names, text, compare, is_open, args.max_tokens)
    with reraised_as(InputError, ValueError):
        port = port_to_serve_on(args.host, args.port)  # somebody may have taken it meanwhile
    with reraised_as(InputError, OSError, ValueError, what=f"`host` is {args.host!r} and `port` {port}: "):
        serve(page, server_port=port, **launch_settings(args.host, args.share, args.max_tokens))


def _check_save(file: Path) -> None:
    """
    Raises:
        InputError: for a file that the page cannot be written to, which would be found out when all is done.
    """
    what = f"`save` is {str(file)!r}"
    if not os.path.isdir(file.parent):
        raise InputError(f"{what}; there is no folder {str(file.parent)!r}.")
    try:
        if os.path.lexists(file) and not is_saved_page(file):
            raise InputError(f"{what}, which is there and no page of ours; give another name.")
        check_can_be_written(file)
    except (OSError, ValueError) as error:
        if is_disk_full(error):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{what}, which cannot be written: {reason}.") from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name
        return host == "localhost"

"""What a run's repository holds, and what is checked of it before anything is published."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from .. import modeling
from ..errors import InputError
from ..modeling import LOCALITY_FIELDS
from ..modeling.modeling_localist import auto_map
from .loading import load_tokenizer
from .model_card import card_files
from .model_code import code_files, renewed_code
from .record_file import RECORD_FILE
from .repositories import TOKENIZER_FILES, check_repository_id
from .run_record import RunRecord
from .siblings import load_siblings


# What transformers notes about the machine that saved a tokenizer.
_MACHINE_KEYS = ("is_local", "local_files_only", "name_or_path")
_TEXT_SUFFIXES = {".json", ".md", ".yaml", ".txt", ".py", ".jinja"}


def repository_files(
    folder: str | Path,
    repo_id: str | None = None,
    base_model: str | None = None,
    space: str | None = None,
    records: Sequence[RunRecord] | None = None,
) -> dict[str, Path | bytes]:
    """
    Everything that a run's repository holds, and nothing else of its folder: weights, configuration, code, tokenizer,
    generation configuration, record, card and picture. Pickles, optimizer states, checkpoints and logs stay behind.

    Args:
        folder (`str` or `Path`):
            The run's folder, with the record that training leaves there.
        repo_id (`str`, *optional*):
            The repository, which the card names. Defaults to [`RunRecord.repository_id`].
        base_model (`str`, *optional*):
            Hub id of the model that the run started from, where the record does not know it. Needed by an adapter,
            which loads its base from there.
        space (`str`, *optional*):
            Hub id of the Space on which the model can be read, which the card links to.
        records (`Sequence[RunRecord]`, *optional*):
            What [`load_siblings`] gives for the folder, where that has been read already.

    Returns:
        `dict[str, Path | bytes]`: path in the repository to a file, or to its content where it differs from the file.

    Raises:
        ValueError: for a folder without a complete run, weights or a configuration other than those measured, a
            tokenizer that does not load, a `base_model` that is no Hub id or that the run did not start from, or
            content that would give away this machine.
    """
    folder = Path(folder)
    records = records or load_siblings(folder)
    record = records[0]
    record.check_weights(folder)
    repo_id = repo_id or record.repository_id()
    if base_model is not None:
        check_repository_id("base_model", base_model)
        if record.from_scratch or record.base_model not in (None, base_model):
            raise ValueError(
                f"`base_model` is {base_model!r}; the run in {str(folder)!r} started from "
                f"{'random weights' if record.from_scratch else record.base_model}."
            )
    files: dict[str, Path | bytes] = {name: folder / name for name in sorted(record.weights)}
    if record.adapter:
        files |= _adapter_files(folder, record, repo_id, base_model)
        code = Path(modeling.__file__).with_name(_code_entry(record))
    else:
        if len(record.weights) > 1:
            files["model.safetensors.index.json"] = folder / "model.safetensors.index.json"
        files |= {name: folder / name for name in ("config.json", "generation_config.json")}
        code = folder / _code_entry(record)
    if missing := [
        name for name, path in [*files.items(), (code.name, code)] if isinstance(path, Path) and not path.is_file()
    ]:
        raise ValueError(f"{str(folder)!r} is no complete run: {missing[0]} is missing.")
    code = {name: path.read_bytes() for name, path in code_files(code).items()}
    if not record.adapter:
        config = _checked_config(folder, record)
        # The folder has the code of the version that trained it.
        code, pinned = renewed_code(config, code)
        config.get("locality", config).update(pinned)
        files["config.json"] = _json(config)
    files |= {name: content for name, content in code.items() if content is not None}
    files |= _tokenizer_files(folder)
    files[RECORD_FILE] = folder / RECORD_FILE
    files |= card_files(folder, repo_id, base_model, space, records)
    check_private(files, folder)
    return files


def _adapter_files(folder: Path, record: RunRecord, repo_id: str, base_model: str | None) -> dict[str, bytes]:
    """
    The adapter's configuration, with a base that others can load, and the model's, which holds the settings of locality
    and says where the code is that the base needs for them. PEFT does not read it, so that the adapter loads plainly.
    """
    base_model = base_model or record.base_model
    if base_model is None:
        raise ValueError(
            f"The adapter in {str(folder)!r} was trained on the local folder {record.base_run!r}, which nobody else "
            "can load. Publish the folder that holds both runs, or name the base's Hub id as `base_model` "
            "(`--base-model`)."
        )
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise ValueError(f"{str(folder)!r} is no complete run: {path.name} is missing.")
    adapter = read_json(path)
    # The class that PEFT notes may be one of a local module; with a task type it is not needed.
    adapter |= {"base_model_name_or_path": base_model, "auto_mapping": None}
    if base_model == record.base_model:
        adapter["revision"] = record.adapter.get("base_revision", adapter.get("revision"))
    config = record.model_config.to_dict() | {"architectures": [record.architecture]}
    # With the repository's name, since the configuration is used with the base's weights, whose repository may hold no
    # code.
    config["auto_map"] = {name: f"{repo_id}--{reference}" for name, reference in _auto_map(record).items()}
    return {path.name: _json(adapter), "config.json": _json(config)}


def _code_entry(record: RunRecord) -> str:
    """The file whose classes a repository's configuration names."""
    return "modeling_localist.py" if record.is_native else "modeling_localist_gpt2.py"


def _auto_map(record: RunRecord) -> dict[str, str]:
    """What loads a model with its repository's code. The configuration of a native model is never any but its own."""
    if not record.is_native:
        return record.model_config.to_dict()["auto_map"]
    return auto_map(record.model_config)


def _checked_config(folder: Path, record: RunRecord) -> dict[str, Any]:
    """The configuration, with the code of this repository alone; refused if damaged, or not the one measured."""
    read_json(folder / "generation_config.json")
    values = read_json(folder / "config.json")
    try:
        type(record.model_config)(**values)
    except StrictDataclassError as error:
        raise ValueError(f"config.json of {str(folder)!r} is damaged: {error}") from error
    expected = {"model_type": record.config["model_type"], "architectures": [record.architecture]}
    found = values.get("locality") or {} if record.is_native else values
    for name, measured in [*expected.items(), *((name, record.locality[name]) for name in LOCALITY_FIELDS)]:
        value = (values if name in expected else found).get(name)
        if value != measured:
            raise ValueError(
                f"`{name}` in config.json of {str(folder)!r} is {value!r}; the run was measured with {measured!r}."
            )
    return values | {"auto_map": _auto_map(record)}


def _tokenizer_files(folder: Path) -> dict[str, Path | bytes]:
    """All that the tokenizer in a folder is loaded from, whatever its kind."""
    if not (folder / "tokenizer_config.json").is_file():
        raise ValueError(
            f"{str(folder)!r} holds no tokenizer that others can load (tokenizer_config.json is missing), without "
            "which the model cannot be used; give the trainer one as `processing_class`, or save it there."
        )
    settings = read_json(folder / "tokenizer_config.json")
    tokenizer = _loaded_tokenizer(folder, folder)
    templates = sorted(f"{CHAT_TEMPLATE_DIR}/{path.name}" for path in (folder / CHAT_TEMPLATE_DIR).glob("*.jinja"))
    names = dict.fromkeys([*TOKENIZER_FILES, *tokenizer.vocab_files_names.values(), *templates])
    files: dict[str, Path | bytes] = {name: folder / name for name in names if (folder / name).is_file()}
    files["tokenizer_config.json"] = _json({key: value for key, value in settings.items() if key not in _MACHINE_KEYS})
    with tempfile.TemporaryDirectory() as published:
        for name, content in files.items():
            path = Path(published) / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        found = _loaded_tokenizer(Path(published), folder)
    if (found.get_vocab(), found.chat_template) != (tokenizer.get_vocab(), tokenizer.chat_template):
        raise ValueError(
            f"The tokenizer in {str(folder)!r}, a {type(tokenizer).__name__}, needs other files than those that its "
            f"class names: {', '.join(files)}."
        )
    return files


def _loaded_tokenizer(path: Path, folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a path, for the run in a folder."""
    try:
        return load_tokenizer(str(path))
    except InputError as error:
        lack = "" if (path / "tokenizer.json").is_file() else "there is no tokenizer.json, and without it: "
        raise ValueError(f"The tokenizer in {str(folder)!r} cannot be loaded: {lack}{error.__cause__}") from error


def read_json(path: Path) -> dict[str, Any]:
    """
    The JSON object in a file.

    Raises:
        ValueError: where it holds none.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} is damaged: it holds no JSON object.")
    return values


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def check_private(files: Mapping[str, Path | bytes], folder: Path, what: str = "the run's folder") -> None:
    """
    Refuses files that hold a path of this machine or the token.

    Args:
        files (`Mapping[str, Path | bytes]`):
            Path in the repository to a file, or to its content.
        folder (`Path`), what (`str`, *optional*):
            The folder that they are from, and what it is called.

    Raises:
        ValueError: where one does.
    """
    secrets = {str(folder.resolve()): what}
    home = Path("~").expanduser()
    if len(home.parts) > 1:  # the home of some containers is the root
        secrets[f"{home}/"] = "the home directory"
    if token := get_token():
        secrets[token] = "the access token"
    for name, content in files.items():
        if Path(name).suffix in _TEXT_SUFFIXES:
            text = (content if isinstance(content, bytes) else content.read_bytes()).decode("utf-8", "replace")
            for secret, kind in secrets.items():
                if secret in text:
                    raise ValueError(f"{name} of {str(folder)!r} names {kind}, which must not be published.")

"""Publishing runs: one repository for each, and all of its files in one commit."""

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelInfo,
    get_token,
)
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from .. import modeling
from ..modeling import LocalistGPT2Config
from .model_card import CARD_FILE, EVAL_RESULTS_FILE, card_files
from .run_history import RECORD_FILE, weight_hashes
from .run_record import RunRecord, repository_id


logger = logging.get_logger(__name__)

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# What transformers notes about the machine that saved a tokenizer.
_MACHINE_KEYS = ("is_local", "local_files_only", "name_or_path")
_CODE_ENTRY = "modeling_localist_gpt2.py"
# What must not outlive a new publication: of two sets of weights the wrong one is loaded, and a pickle never belongs
# there. Everything else in a repository may be somebody's.
_STALE = (
    r"(model|adapter_model)(-\d+-of-\d+)?\.safetensors",
    r"model\.safetensors\.index\.json",
    r"adapter_config\.json",
    r"(training_args|pytorch_model.*)\.bin",
    re.escape(EVAL_RESULTS_FILE),
)
_TEXT_SUFFIXES = {".json", ".md", ".yaml", ".txt", ".py", ".jinja"}


#: The base of all errors of the HTTP library that huggingface_hub uses (`httpx` or `httpx2`, by its version).
_HTTPError: type[Exception] = HfHubHTTPError.__mro__[1]


class PublishError(RuntimeError):
    """The Hub refused, or could not be reached; the message says what to do."""


def repository_files(
    folder: str | Path, repo_id: str | None = None, base_model: str | None = None
) -> dict[str, Path | bytes]:
    """
    Everything that a run's repository holds, and nothing else of its folder: weights, configuration, code, tokenizer,
    generation configuration, record, card and picture. Pickles, optimizer states, checkpoints and logs stay behind.

    Args:
        folder (`str` or `Path`):
            The run's folder, with the record that training leaves there.
        repo_id (`str`, *optional*):
            The repository, which the card names. Defaults to `org/localist-gpt2-<name>`.
        base_model (`str`, *optional*):
            Hub id of the model that the run started from, where the record does not know it. Needed by an adapter,
            which loads its base from there.

    Returns:
        `dict[str, Path | bytes]`: path in the repository to a file, or to its content where it differs from the file.

    Raises:
        ValueError: for a folder without a complete run, weights other than those measured, or content that would give
            away this machine.
    """
    folder = Path(folder)
    record = RunRecord.load(folder)
    record.check_weights(folder)
    repo_id = repo_id or repository_id(record.name)
    files: dict[str, Path | bytes] = {name: folder / name for name in sorted(record.weights)}
    if record.adapter:
        files |= _adapter_files(folder, record, repo_id, base_model)
        code = Path(modeling.__file__).with_name(_CODE_ENTRY)
    else:
        files |= {path.name: path for path in sorted(folder.glob("*.safetensors.index.json"))}
        files |= {name: folder / name for name in ("config.json", "generation_config.json")}
        code = folder / _CODE_ENTRY
    if missing := [
        name for name, path in [*files.items(), (code.name, code)] if isinstance(path, Path) and not path.is_file()
    ]:
        raise ValueError(f"{str(folder)!r} is no complete run: {missing[0]} is missing.")
    files |= {Path(path).name: Path(path) for path in sorted([str(code), *get_relative_import_files(code)])}
    files |= _tokenizer_files(folder)
    files[RECORD_FILE] = folder / RECORD_FILE
    files |= card_files(folder, repo_id, base_model)
    _check_private(files, folder)
    return files


def _adapter_files(folder: Path, record: RunRecord, repo_id: str, base_model: str | None) -> dict[str, bytes]:
    """The adapter's configuration, with a base that others can load, and the model's, which holds the schedule."""
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
    adapter = json.loads(path.read_text(encoding="utf-8"))
    # The class that PEFT notes may be one of a local module; with a task type it is not needed.
    adapter |= {"base_model_name_or_path": base_model, "auto_mapping": None}
    config = LocalistGPT2Config(**record.config, architectures=["LocalistGPT2LMHeadModel"]).to_dict()
    # With the repository's name, since the configuration is used with the base's weights, whose repository may hold no
    # code.
    config["auto_map"] = {name: f"{repo_id}--{reference}" for name, reference in config["auto_map"].items()}
    return {path.name: _json(adapter), "config.json": _json(config)}


def _tokenizer_files(folder: Path) -> dict[str, Path | bytes]:
    files: dict[str, Path | bytes] = {name: folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()}
    if "tokenizer_config.json" not in files:
        raise ValueError(
            f"{str(folder)!r} holds no tokenizer, without which the model cannot be used; give the trainer one as "
            "`processing_class`, or save it there."
        )
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    files["tokenizer_config.json"] = _json({key: value for key, value in settings.items() if key not in _MACHINE_KEYS})
    return files


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _check_private(files: Mapping[str, Path | bytes], folder: Path) -> None:
    """Refuses files that hold a path of this machine or the token."""
    secrets = {str(folder.resolve()): "the run's folder"}
    home = Path("~").expanduser()
    if len(home.parts) > 1:  # the home of some containers is the root
        secrets[f"{home}/"] = "the home directory"
    if token := get_token():
        secrets[token] = "the access token"
    for name, content in files.items():
        if Path(name).suffix in _TEXT_SUFFIXES:
            text = (content if isinstance(content, bytes) else content.read_bytes()).decode("utf-8", "replace")
            for secret, what in secrets.items():
                if secret in text:
                    raise ValueError(f"{name} of {str(folder)!r} names {what}, which must not be published.")


def find_runs(folder: str | Path) -> dict[Path, RunRecord]:
    """
    The folders to publish and their records: the folder itself where it is a run, else those of the runs in it, the
    base first. Of several runs of one name it is that in the folder of this name, or else of the lowest seed (the
    others are part of its card's statistics).

    Raises:
        ValueError: where there is no finished run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`run` is {str(folder)!r}; there is no such folder.")
    if (own := RunRecord.find(folder)) is not None:
        return {folder: own}
    runs = [(RunRecord.load(path.parent), path.parent) for path in sorted(folder.glob(f"*/{RECORD_FILE}"))]
    if not runs:
        RunRecord.load(folder)  # says what is missing
    runs.sort(key=lambda run: (not run[0].from_scratch, run[0].name, run[1].name != run[0].name, run[0].seed))
    first: dict[str, tuple[Path, RunRecord]] = {}
    for record, path in runs:
        first.setdefault(record.name, (path, record))
    return dict(first.values())


def publish(
    folder: str | Path,
    namespace: str,
    private: bool = False,
    collection: str | None = None,
    base_model: str | None = None,
    api: HfApi | None = None,
    report: Callable[[str], None] = print,
) -> list[CommitInfo]:
    """
    Publishes a run, or every run in a folder, as `namespace/localist-gpt2-<name>`, each in one commit. Everything is
    checked before the first upload. A second call changes nothing, or adds one commit with what has changed.

    Args:
        folder (`str` or `Path`):
            The folder of a run, or of several.
        namespace (`str`):
            User or organisation.
        private (`bool`, *optional*, defaults to `False`):
            Make new repositories private, whatever the namespace prescribes. A public one that exists already is
            refused then.
        collection (`str`, *optional*):
            Title of a collection in the namespace, made where there is none, that gets all of them.
        base_model (`str`, *optional*):
            See [`repository_files`].
        api ([`~huggingface_hub.HfApi`], *optional*):
            The client, which finds credentials by itself.
        report (`Callable`, *optional*):
            Is told what was done, a line at a time.

    Raises:
        ValueError: for input that cannot be published; nothing has been uploaded then.
        PublishError: where the Hub refuses or fails. Repositories show their former commit or the whole new one, and
            the same call made again does what is left to do.
    """
    api = api or HfApi()
    repositories = prepare(folder, namespace, base_model)
    with _explained(f"the account of {api.endpoint}"):
        account = api.whoami()
    allowed = [account["name"], *(org["name"] for org in account.get("orgs", ()))]
    if namespace not in allowed:
        raise PublishError(
            f"`namespace` is {namespace!r}; the token's account may publish under {', '.join(map(repr, allowed))}."
        )
    found = {repo_id: _existing(api, repo_id, private) for repo_id in repositories}
    commits = []
    for repo_id, files in repositories.items():
        info = found[repo_id]
        commits.append(upload(api, repo_id, files, private=private or None, info=info))
        is_unchanged = info is not None and commits[-1].oid == info.sha
        report(f"{api.endpoint}/{repo_id}: {'unchanged' if is_unchanged else f'commit {commits[-1].oid[:12]}'}")
    if collection is not None:
        with _explained(f"the collection {collection!r}"):
            slug = api.create_collection(collection, namespace=namespace, private=private, exists_ok=True).slug
            for repo_id in repositories:
                api.add_collection_item(slug, repo_id, item_type="model", exists_ok=True)
        report(f"{api.endpoint}/collections/{slug}: {len(repositories)} models")
    return commits


def prepare(folder: str | Path, namespace: str, base_model: str | None = None) -> dict[str, dict[str, Path | bytes]]:
    """The repositories that [`publish`] makes of a folder, by id; see [`repository_files`]. Nothing is uploaded."""
    runs = find_runs(folder)
    names = {record.name: repository_id(record.name, namespace) for record in runs.values()}
    for repo_id in names.values():
        validate_repo_id(repo_id)
    # A run whose base is published with it names that repository as its base.
    return {
        names[record.name]: repository_files(path, names[record.name], base_model or names.get(record.base_run))
        for path, record in runs.items()
    }


def upload(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, Path | bytes],
    private: bool | None = None,
    info: ModelInfo | None = None,
    commit_message: str = "Publish with localist-hf",
    revision: str | None = None,
    **options: Any,
) -> CommitInfo | Future[CommitInfo]:
    """
    Makes a repository hold these files, in one commit.

    Weights of an earlier publication and pickles are removed in the same commit; other files of the repository stay.

    Args:
        api ([`~huggingface_hub.HfApi`]):
            The client.
        repo_id (`str`):
            The repository; it is created where there is none.
        files (`Mapping[str, Path | bytes]`):
            See [`repository_files`].
        private (`bool`, *optional*):
            Whether a new repository is private; by default what the namespace prescribes.
        info ([`~huggingface_hub.ModelInfo`], *optional*):
            What the repository was found to be; the upload is refused if it has changed since.
        commit_message (`str`, *optional*), revision (`str`, *optional*), options:
            As in [`~huggingface_hub.HfApi.create_commit`].

    Raises:
        PublishError: see [`publish`].
    """
    with _explained(repo_id):
        if info is None:
            try:
                info = api.model_info(repo_id, revision=revision)
            except RepositoryNotFoundError:
                api.create_repo(repo_id, private=private)
                info = api.model_info(repo_id, revision=revision)
        stale = [
            sibling.rfilename
            for sibling in info.siblings or ()
            if sibling.rfilename not in files and re.fullmatch("|".join(_STALE), sibling.rfilename)
        ]
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        operations += [CommitOperationDelete(name) for name in stale]
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message,
            revision=revision,
            parent_commit=info.sha,
            **options,
        )


def push_to_hub(
    model: PreTrainedModel,
    repo_id: str,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    **kwargs: Any,
) -> Any:
    """
    `model.push_to_hub`: what [`publish`] uploads, where the model is that of a run's folder, which it was loaded from
    or which its trainer saved it to. For other weights there are no numbers, so that they get transformers' draft of a
    card, and a warning says so.

    Args:
        model ([`LocalistGPT2LMHeadModel`]):
            The model.
        repo_id (`str`), commit_message (`str`, *optional*), private (`bool`, *optional*), token (`str`, *optional*), \
        revision (`str`, *optional*), kwargs:
            As in [`~transformers.PreTrainedModel.push_to_hub`].
    """
    folder = Path(model.name_or_path)
    if (record := RunRecord.find(folder)) is not None:
        with tempfile.TemporaryDirectory() as saved:
            model.save_pretrained(saved)
            is_measured = weight_hashes(saved) == record.weights
        if is_measured:
            api = HfApi(token=token)
            repo_id = full_repository_id(api, repo_id)
            files = repository_files(folder, repo_id)
            if tags := kwargs.pop("tags", None):
                card = ModelCard(files[CARD_FILE].decode())
                card.data.tags = list(dict.fromkeys([*card.data.tags, *tags]))
                files[CARD_FILE] = str(card).encode()
            kwargs.pop("max_shard_size", None)  # the shards are those of the folder
            message = commit_message or "Upload model"
            return upload(api, repo_id, files, private, commit_message=message, revision=revision, **kwargs)
        logger.warning(
            f"The weights are not those that {folder / RECORD_FILE} was measured on, so they are pushed without its "
            "model card and its tokenizer."
        )
    options = {"commit_message": commit_message, "private": private, "token": token, "revision": revision, **kwargs}
    return PreTrainedModel.push_to_hub(model, repo_id, **options)


def full_repository_id(api: HfApi, repo_id: str) -> str:
    """A repository's id, under the account's own name where it has no namespace."""
    if "/" in repo_id:
        return repo_id
    with _explained(f"the account of {api.endpoint}"):
        return f"{api.whoami()['name']}/{repo_id}"


def _existing(api: HfApi, repo_id: str, private: bool) -> ModelInfo | None:
    """What the Hub says of a repository; `None` where there is none."""
    with _explained(repo_id):
        try:
            info = api.model_info(repo_id)
        except RepositoryNotFoundError:
            return None
    if private and not info.private:
        raise PublishError(f"`private` was asked for, and {repo_id} exists and is public; nothing has been uploaded.")
    return info


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turns what the client raises into a message that says what to do."""
    again = "It shows its former state or the whole new one; the same call made again does what is left to do."
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise PublishError("There is no access token; log in with `hf auth login`, or set `HF_TOKEN`.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = (error.server_message or str(error)).strip()
        if status == 401:
            said = f"the access token is not accepted ({said}); log in with `hf auth login`, or set `HF_TOKEN`."
        elif status == 409:
            said = f"the name is taken by a repository of another type ({said})."
        elif status == 412:
            said = f"somebody else has changed it in the meantime ({said}). {again}"
        elif status >= 500:
            said = f"the Hub failed with status {status} ({said}). {again}"
        raise PublishError(f"{what}: {said}") from error
    except (_HTTPError, ConnectionError) as error:
        raise PublishError(f"{what}: the Hub cannot be reached ({error}). {again}") from error
    except RuntimeError as error:  # what the client makes of an upload to the storage that failed to the end
        if isinstance(error, PublishError):
            raise
        raise PublishError(f"{what}: {error} {again}") from error

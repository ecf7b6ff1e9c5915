"""Publishing runs: one repository for each, and all of its files in one commit."""

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelInfo,
    SpaceInfo,
    get_token,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from huggingface_hub.utils import validate_repo_id
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from .. import modeling
from ..evaluation.text_prefix import known_text
from ..modeling.modeling_localist import auto_map
from .model_card import CARD_FILE, EVAL_RESULTS_FILE, card_files
from .model_code import code_files, renewed_code
from .own_text import keep_own_text, own_text, with_own_text
from .run_history import LOCALITY_FIELDS, RECORD_FILE, WEIGHT_FILES, weight_hashes
from .run_record import RunRecord, load_siblings, siblings
from .space import SPACE_TAG, Space, make_space


logger = logging.get_logger(__name__)

#: What a tokenizer may have beside the files that its class names.
TOKENIZER_FILES = (
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
# What must not outlive a new publication: of two sets of weights the wrong one is loaded, and a pickle never belongs
# there. Everything else in a repository may be somebody's.
_STALE = (
    WEIGHT_FILES,
    r"model\.safetensors\.index\.json",
    r"adapter_config\.json",
    r"(training_args|pytorch_model.*)\.bin",
    re.escape(EVAL_RESULTS_FILE),
    # A tokenizer's, which have their effect where they lie.
    *map(re.escape, TOKENIZER_FILES),
    rf"vocab\.txt|[\w.-]+\.model|{CHAT_TEMPLATE_DIR}/[^/]+\.jinja",
    r"localist_hf-.*\.whl",
)
_TEXT_SUFFIXES = {".json", ".md", ".yaml", ".txt", ".py", ".jinja"}


#: The base of all errors of the HTTP library that huggingface_hub uses (`httpx` or `httpx2`, by its version).
_HTTPError: type[Exception] = HfHubHTTPError.__mro__[1]


class PublishError(RuntimeError):
    """The Hub refused, or could not be reached; the message says what to do."""


@dataclass(frozen=True)
class Publication:
    """
    What would be uploaded.

    Args:
        repositories (`dict[str, dict[str, Path | bytes]]`):
            Id of each repository to what it will hold; see [`repository_files`].
        records (`dict[str, RunRecord]`):
            Id of each repository to the record of its run.
        left_out (`dict[Path, str]`):
            The folders that are not published, and why.
        base_model (`str`, *optional*):
            The Hub id that was named as the base.
        space ([`Space`], *optional*):
            The Space that shows them.
    """

    repositories: dict[str, dict[str, Path | bytes]]
    records: dict[str, RunRecord]
    left_out: dict[Path, str]
    base_model: str | None
    space: Space | None


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
    _check_private(files, folder)
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
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        known_text(tokenizer)  # where there are no files, transformers makes one without a vocabulary
    except Exception as error:  # the Rust library raises `Exception` itself
        lack = "" if (path / "tokenizer.json").is_file() else "there is no tokenizer.json, and without it: "
        raise ValueError(f"The tokenizer in {str(folder)!r} cannot be loaded: {lack}{error}") from error
    return tokenizer


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


def check_repository_id(name: str, value: str, kind: str = "model") -> None:
    """
    Checks that an argument is the id of a model, or of another `kind` of repository, on the Hub.

    Raises:
        ValueError: if it is not of the form `namespace/name`.
    """
    try:
        validate_repo_id(value)
        reason = None if "/" in value else "it has no namespace"
    except ValueError as error:
        reason = str(error)
    if reason:
        raise ValueError(f"`{name}` is {value!r}; it must be the id of a {kind} on the Hub, NAMESPACE/NAME ({reason}).")


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


def find_runs(folder: str | Path) -> tuple[dict[Path, list[RunRecord]], dict[Path, str]]:
    """
    The folders to publish, each with its record and those of its [`siblings`], and the folders that are left out and
    why. To publish is the folder itself where it is a run, else the runs in it, the base first. Of several runs of one
    name it is the one in the folder of this name, or else of the lowest seed. Every record is read once.

    Raises:
        ValueError: where there is no finished run.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`run` is {str(folder)!r}; there is no such folder.")
    if (folder / RECORD_FILE).is_file():
        return {folder: load_siblings(folder)}, {}
    runs: list[tuple[RunRecord, Path]] = []
    left_out = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            try:
                runs.append((RunRecord.load(path), path))
            except (ValueError, OSError) as error:
                left_out[path] = str(error)
    if not runs:
        for path, reason in left_out.items():
            if (path / RECORD_FILE).is_file():
                raise ValueError(reason)
        RunRecord.load(folder)  # says what is missing
    in_order = sorted(
        runs, key=lambda run: (not run[0].from_scratch, run[0].name, run[1].name != run[0].name, run[0].seed)
    )
    first: dict[str, tuple[Path, RunRecord]] = {}
    for record, path in in_order:
        other, published = first.setdefault(record.repository_id().lower(), (path, record))
        if other == path:
            continue
        if published.is_repetition(record) and published.seed != record.seed:
            left_out[path] = f"seed {record.seed} of {published.name!r}, whose card has it in its statistics"
        else:
            left_out[path] = (
                f"another run than {other.name!r}, and called {record.name!r} as well: publish it by itself with "
                "another name (`--name`)"
            )
    found = {
        path: [record, *siblings(record, (other for other, where in runs if where != path))]
        for path, record in first.values()
    }
    return found, left_out


def publish(
    folder: str | Path,
    namespace: str,
    private: bool = False,
    collection: str | None = None,
    base_model: str | None = None,
    name: str | None = None,
    space: str | None = None,
    api: HfApi | None = None,
    report: Callable[[str], None] = print,
) -> list[CommitInfo]:
    """
    Publishes a run, or every run in a folder, as `namespace/localist-<model type>-<name>` (of LocalistGPT2
    `localist-gpt2-<name>`), each in one commit. Everything is checked before the first upload. A second call changes
    nothing, or adds one commit with what has changed.

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
            See [`repository_files`]; for the runs in the folder that started from a local one.
        name (`str`, *optional*):
            Of a single run: the name in place of the run's own, so `namespace/localist-<model type>-<name>`.
        space (`str`, *optional*):
            Hub id of a Space, made where there is none, on which anybody reads with these models at the commits that
            this call leaves them at. Their cards link to it. It is private where a model is.
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
    publication = prepare(folder, namespace, base_model, name, space)
    repositories = publication.repositories
    with explained(f"the account of {api.endpoint}"):
        account = api.whoami()
    allowed = [account["name"], *(org["name"] for org in account.get("orgs", ()))]
    if namespace not in allowed:
        raise PublishError(
            f"`namespace` is {namespace!r}; the token's account may publish under {', '.join(map(repr, allowed))}."
        )
    if space is not None and space.partition("/")[0] not in allowed:
        raise PublishError(
            f"`space` is {space!r}; the token's account may publish under {', '.join(map(repr, allowed))}."
        )
    if base_model is not None and find_model(api, base_model) is None:
        raise PublishError(f"`base_model` is {base_model!r}; the Hub shows this account no such model.")
    found = {repo_id: find_model(api, repo_id) for repo_id in repositories}
    if public := [repo_id for repo_id, info in found.items() if private and info is not None and not info.private]:
        raise PublishError(f"`private` was asked for, and {public[0]} exists and is public; nothing has been uploaded.")
    if publication.space is not None:
        bases = find_bases(api, publication.space)
        known = [*bases.values(), *filter(None, found.values())]
        hides = private or any(info.private for info in known)
        old_space = find_space(api, publication.space.repo_id, hides)
    repositories = {
        repo_id: with_own_text_of(api, repo_id, files, found[repo_id]) for repo_id, files in repositories.items()
    }
    if publication.space is not None:
        space_card = None
        if old_space is not None and is_space_of_ours(old_space):
            space_card = card_on_hub(api, publication.space.repo_id, old_space, "space")
        if space_card is not None:
            own_text(space_card, f"{CARD_FILE} of the Space {space}", "Remove the file there")
    commits = []
    for repo_id, files in repositories.items():
        info = found[repo_id]
        commits.append(upload(api, repo_id, files, private=private or None, info=info))
        report(f"{api.endpoint}/{repo_id}: {_what_was_done(commits[-1], info)}")
    if publication.space is not None:
        revisions = {repo_id: info.sha for repo_id, info in bases.items()}
        revisions |= {repo_id: commit.oid for repo_id, commit in zip(repositories, commits, strict=True)}
        repo_id, files = publication.space.repo_id, publication.space.files(revisions, space_card)
        commits.append(upload(api, repo_id, files, private=hides or None, info=old_space, repo_type="space"))
        report(f"{api.endpoint}/spaces/{repo_id}: {_what_was_done(commits[-1], old_space)}")
        if hides or any(info.gated for info in known):
            report("Private and gated models the Space reads with a token: give it a secret HF_TOKEN in its settings.")
    for path, reason in publication.left_out.items():
        report(f"left out: {path}: {reason}")
    if collection is not None:
        with explained(f"the collection {collection!r}"):
            slug = api.create_collection(collection, namespace=namespace, private=private, exists_ok=True).slug
            for repo_id in repositories:
                api.add_collection_item(slug, repo_id, item_type="model", exists_ok=True)
            if space is not None:
                api.add_collection_item(slug, space, item_type="space", exists_ok=True)
        report(
            f"{api.endpoint}/collections/{slug}: {len(repositories)} models{'' if space is None else ' and the Space'}"
        )
    return commits


def _what_was_done(commit: CommitInfo, info: ModelInfo | SpaceInfo | None) -> str:
    return "unchanged" if info is not None and commit.oid == info.sha else f"commit {commit.oid[:12]}"


def prepare(
    folder: str | Path,
    namespace: str,
    base_model: str | None = None,
    name: str | None = None,
    space: str | None = None,
) -> Publication:
    """What [`publish`] makes of a folder, all checked. Nothing is uploaded and nobody is asked."""
    if base_model is not None:
        check_repository_id("base_model", base_model)
    if space is not None:
        check_repository_id("space", space, "Space")
    found, left_out = find_runs(folder)
    runs = {path: records[0] for path, records in found.items()}
    if name is not None and len(runs) > 1:
        raise ValueError(f"`name` is {name!r}, for one run; {str(folder)!r} holds {len(runs)}.")
    names = {path: record.repository_id(namespace, name) for path, record in runs.items()}
    for path, repo_id in names.items():
        try:
            validate_repo_id(repo_id)
        except ValueError as error:
            what = f"`namespace` is {namespace!r} and "
            what += f"`name` is {name!r}" if name is not None else f"the run is called {runs[path].name!r}"
            raise ValueError(f"{what}, which give no name of a repository: {error}") from error
    # A run whose base is published with it names that repository as its base.
    bases = {path: _base_of(record, runs, names, base_model) for path, record in runs.items()}
    if base_model is not None and base_model not in bases.values():
        raise ValueError(f"`base_model` is {base_model!r}; no run in {str(folder)!r} started from a local folder.")
    repositories = {
        names[path]: repository_files(path, names[path], bases[path], space, records) for path, records in found.items()
    }
    shown = None
    if space is not None:
        # What the page is about comes first: the models that were trained for locality.
        models = sorted(runs, key=lambda path: not any(runs[path].lambdas))
        stood_on = {bases[path] or record.base_model for path, record in runs.items() if record.adapter}
        shown = make_space(space, [names[path] for path in models], sorted(stood_on - set(names.values())))
    return Publication(repositories, {names[path]: runs[path] for path in runs}, left_out, base_model, shown)


def _base_of(
    record: RunRecord, runs: Mapping[Path, RunRecord], names: Mapping[Path, str], base_model: str | None
) -> str | None:
    """The Hub id of a run's base where its own record does not know it."""
    if record.base_run is None:
        return base_model if record.base_model == base_model else None
    published = (names[path] for path, other in runs.items() if other.is_base_of(record))
    return base_model or next(published, None)


def upload(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, Path | bytes],
    private: bool | None = None,
    info: ModelInfo | SpaceInfo | None = None,
    repo_type: str = "model",
    commit_message: str = "Publish with localist-hf",
    revision: str | None = None,
    **options: Any,
) -> CommitInfo | Future[CommitInfo]:
    """
    Makes a repository hold these files, in one commit.

    Weights of an earlier publication and pickles are removed in the same commit; other files of the repository stay,
    and so does what people wrote into their part of the card.

    Args:
        api ([`~huggingface_hub.HfApi`]):
            The client.
        repo_id (`str`):
            The repository; it is created where there is none.
        files (`Mapping[str, Path | bytes]`):
            See [`repository_files`].
        private (`bool`, *optional*):
            Whether a new repository is private; by default what the namespace prescribes.
        info ([`~huggingface_hub.ModelInfo`] or [`~huggingface_hub.SpaceInfo`], *optional*):
            What the repository was found to be, and `files` made for that ([`with_own_text_of`]); the upload is refused
            if it has changed since.
        repo_type (`str`, *optional*, defaults to `"model"`):
            Or `"space"`: a new one is of Gradio.
        commit_message (`str`, *optional*), revision (`str`, *optional*), options:
            As in [`~huggingface_hub.HfApi.create_commit`].

    Raises:
        ValueError: where the card there was edited, but for the part that is kept.
        PublishError: see [`publish`].
    """
    with explained(repo_id):
        if info is None:
            try:
                info = api.repo_info(repo_id, revision=revision, repo_type=repo_type)
                files = with_own_text_of(api, repo_id, files, info, repo_type)
            except RepositoryNotFoundError:
                sdk = "gradio" if repo_type == "space" else None
                api.create_repo(repo_id, private=private, repo_type=repo_type, space_sdk=sdk)
                info = api.repo_info(repo_id, revision=revision, repo_type=repo_type)
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
            repo_type=repo_type,
            commit_message=commit_message,
            revision=revision,
            parent_commit=info.sha,
            **options,
        )


def card_on_hub(api: HfApi, repo_id: str, info: ModelInfo | SpaceInfo | None, repo_type: str = "model") -> str | None:
    """
    The card of a repository as it was found; `None` where there is none.

    Raises:
        PublishError: where it cannot be had.
    """
    if info is None or CARD_FILE not in {sibling.rfilename for sibling in info.siblings or ()}:
        return None
    with explained(repo_id, again=""), tempfile.TemporaryDirectory() as folder:
        path = api.hf_hub_download(repo_id, CARD_FILE, repo_type=repo_type, revision=info.sha, local_dir=folder)
        return Path(path).read_text(encoding="utf-8")


def with_own_text_of(
    api: HfApi,
    repo_id: str,
    files: Mapping[str, Path | bytes],
    info: ModelInfo | SpaceInfo | None,
    repo_type: str = "model",
) -> dict[str, Path | bytes]:
    """
    What a repository is to hold, with what people wrote into their part of the card that is there.

    Raises:
        ValueError: where that card was edited elsewhere, or is not ours.
        PublishError: where it cannot be had.
    """
    found = card_on_hub(api, repo_id, info, repo_type)
    if found is None or CARD_FILE not in files:
        return dict(files)
    card = keep_own_text(files[CARD_FILE].decode(), found, f"{CARD_FILE} of {repo_id}")
    return {**files, CARD_FILE: card.encode()}


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
        model ([`~transformers.PreTrainedModel`]):
            The model, [`LocalistGPT2LMHeadModel`] or one that [`localize`] has made.
        repo_id (`str`), commit_message (`str`, *optional*), private (`bool`, *optional*), token (`str`, *optional*), \
        revision (`str`, *optional*), kwargs:
            As in [`~transformers.PreTrainedModel.push_to_hub`].
    """
    folder = Path(model.name_or_path)
    try:
        record = RunRecord.find(folder)
    except (ValueError, OSError) as error:
        record = None
        logger.warning(f"The model is pushed without a model card of ours: {error}")
    if record is not None:
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
                files[CARD_FILE] = with_own_text(str(card), own_text(files[CARD_FILE].decode(), "The card")).encode()
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
    with explained(f"the account of {api.endpoint}"):
        return f"{api.whoami()['name']}/{repo_id}"


def find_model(api: HfApi, repo_id: str) -> ModelInfo | None:
    """
    What the Hub says of a model; `None` where it shows none.

    Raises:
        PublishError: where the Hub cannot be asked.
    """
    with explained(repo_id, again=""):
        try:
            return api.model_info(repo_id, files_metadata=True)
        except RepositoryNotFoundError:
            return None


def find_space(api: HfApi, repo_id: str, hides: bool = False) -> SpaceInfo | None:
    """
    What the Hub has of a Space that is to be written; `None` where it has none.

    Args:
        api ([`~huggingface_hub.HfApi`]):
            The client.
        repo_id (`str`):
            The Space.
        hides (`bool`, *optional*, defaults to `False`):
            Whether it shows models that are private.

    Raises:
        PublishError: where it holds another app, or is public and shows what is private, or cannot be asked for.
    """
    with explained(repo_id, again=""):
        try:
            info = api.space_info(repo_id)
        except RepositoryNotFoundError:
            return None
    # A new Space has a card, and nothing to replace.
    names = {sibling.rfilename for sibling in info.siblings or ()}
    if not is_space_of_ours(info) and names - {".gitattributes", CARD_FILE}:
        raise PublishError(
            f"`space` is {repo_id!r}, which exists and is no Space that this command has made; give another name."
        )
    if info.sdk != "gradio":
        raise PublishError(f"`space` is {repo_id!r}, which exists with the SDK {info.sdk!r}; the page needs 'gradio'.")
    if hides and not info.private:
        raise PublishError(
            f"`space` is {repo_id!r}, which exists and is public, and would show models that are private; nothing has "
            "been uploaded."
        )
    return info


def is_space_of_ours(info: SpaceInfo) -> bool:
    """Whether a Space says that this library has made it."""
    return info.card_data is not None and SPACE_TAG in (info.card_data.tags or ())


def find_bases(api: HfApi, space: Space) -> dict[str, ModelInfo]:
    """
    What the Hub says of each base that a Space's adapters stand on and that is not published with them.

    Raises:
        PublishError: for one that the Hub does not show.
    """
    found = {}
    for repo_id in space.bases:
        if (info := find_model(api, repo_id)) is None:
            raise PublishError(
                f"`space` is {space.repo_id!r}; an adapter stands on {repo_id!r}, and the Hub shows this account no "
                "such model."
            )
        found[repo_id] = info
    return found


_AGAIN = "It shows its former state or the whole new one; the same call made again does what is left to do."


@contextmanager
def explained(what: str, again: str = _AGAIN) -> Iterator[None]:
    """Turns what the client raises into a [`PublishError`] that says what to do."""
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
        raise PublishError(f"{what}: {said}".strip()) from error
    except (_HTTPError, ConnectionError) as error:
        raise PublishError(f"{what}: the Hub cannot be reached ({error}). {again}".strip()) from error
    except RuntimeError as error:  # what the client makes of an upload to the storage that failed to the end
        if isinstance(error, PublishError):
            raise
        raise PublishError(f"{what}: {error} {again}".strip()) from error

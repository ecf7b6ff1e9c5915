"""Repositories on the Hub: what there is, and how one is made to hold other files."""

import re
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo, SpaceInfo
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from .model_card import CARD_FILE, EVAL_RESULTS_FILE
from .own_text import keep_own_text
from .weights import WEIGHT_FILES


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
)
# And in a Space: modules that are no more, and the wheel that earlier ones had.
_STALE_IN_SPACES = (r"localist_hf/.+\.py", r"localist_hf-.*\.whl")
#: The base of all errors of the HTTP library that huggingface_hub uses (`httpx` or `httpx2`, by its version).
_HTTPError: type[Exception] = HfHubHTTPError.__mro__[1]


class PublishError(RuntimeError):
    """The Hub refused, or could not be reached; the message says what to do."""


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
        patterns = "|".join(_STALE_IN_SPACES if repo_type == "space" else _STALE)
        stale = [
            sibling.rfilename
            for sibling in info.siblings or ()
            if sibling.rfilename not in files and re.fullmatch(patterns, sibling.rfilename)
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

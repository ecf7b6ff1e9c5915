"""Publishing runs: one repository for each, and all of its files in one commit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, ModelInfo, SpaceInfo
from huggingface_hub.utils import validate_repo_id

from .formats import how_to_load
from .model_card import CARD_FILE
from .own_text import own_text
from .record_file import RECORD_FILE
from .repositories import (
    PublishError,
    card_on_hub,
    check_repository_id,
    explained,
    find_model,
    upload,
    with_own_text_of,
)
from .repository_files import repository_files
from .run_record import RunRecord
from .siblings import load_siblings, pair_to_open, siblings
from .space import Space, find_bases, find_space, is_space_of_ours, make_space


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
    for text in dict.fromkeys(map(how_to_load, publication.records.values())):
        report(text)
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
        # The page opens with the first two; then come the models that were trained for locality, which it is about.
        pair = pair_to_open(runs)
        models = sorted(runs, key=lambda path: (path != pair[0], path != pair[1], not any(runs[path].lambdas)))
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

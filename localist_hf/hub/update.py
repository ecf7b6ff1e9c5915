"""Giving published repositories the code of this version, and changing nothing else of them."""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelInfo

from ..version import __version__
from .model_code import renewed_code
from .repositories import PublishError, check_repository_id, explained, find_model
from .repository_files import read_json


def update(
    repo_ids: Sequence[str],
    dry_run: bool = False,
    api: HfApi | None = None,
    report: Callable[[str], None] = print,
) -> list[CommitInfo]:
    """
    Gives repositories of models and adapters that another version published the code of this one, each in one commit.
    Weights, record, card and everything else stay; `config.json` does too, but for a setting whose default was another
    one then. See [`renewed_code`] for models of 0.1 with semantic blocks. All of them are checked before the first
    commit, and one whose code is up to date gets none.

    Args:
        repo_ids (`Sequence[str]`):
            The repositories.
        dry_run (`bool`, *optional*, defaults to `False`):
            Say what would be done, and do nothing.
        api ([`~huggingface_hub.HfApi`], *optional*):
            The client, which finds credentials by itself.
        report (`Callable`, *optional*):
            Is told what was done, a line at a time.

    Raises:
        ValueError: for a repository whose code is not ours, or not ours alone; nothing has been changed then.
        PublishError: where the Hub refuses or fails.
    """
    api = api or HfApi()
    for repo_id in repo_ids:
        check_repository_id("repository", repo_id)
    found = {repo_id: _find_changes(api, repo_id) for repo_id in repo_ids}
    commits = []
    for repo_id, (info, changes, what) in found.items():
        address = f"{api.endpoint}/{repo_id}"
        if not changes:
            report(f"{address}: its code is up to date")
        elif dry_run:
            report(f"{address}: would get {what}")
        else:
            with explained(repo_id):
                commit = api.create_commit(
                    repo_id,
                    [
                        CommitOperationDelete(name) if content is None else CommitOperationAdd(name, content)
                        for name, content in changes.items()
                    ],
                    commit_message=f"Code of localist-hf {__version__}",
                    parent_commit=info.sha,
                )
            commits.append(commit)
            report(f"{address}: commit {commit.oid[:12]}, {what}")
    if dry_run:
        report("Dry run: nothing was changed.")
    return commits


def _find_changes(api: HfApi, repo_id: str) -> tuple[ModelInfo, dict[str, bytes | None], str]:
    """A repository, what is to change in it (`None` for what is to go), and that in words."""
    if (info := find_model(api, repo_id)) is None:
        raise PublishError(f"{repo_id}: the Hub shows no such model.")
    with tempfile.TemporaryDirectory() as folder:
        with explained(repo_id, again=""):
            api.snapshot_download(repo_id, revision=info.sha, allow_patterns=["config.json", "*.py"], local_dir=folder)
        root = Path(folder)
        code = {path.name: path.read_bytes() for path in root.glob("*.py")}
        if not (root / "config.json").is_file():
            raise ValueError(f"{repo_id} holds no config.json, and so no model or adapter of localist-hf.")
        config = read_json(root / "config.json")
    try:
        files, pinned = renewed_code(config, code, repo_id)
    except ValueError as error:
        raise ValueError(f"{repo_id} cannot be given this version's code: {error}") from error
    changes = {name: content for name, content in files.items() if content != code.get(name)}
    kinds = {"new": changes.keys() - code.keys(), "no more": {name for name in changes if changes[name] is None}}
    kinds = {"another": changes.keys() - kinds["new"] - kinds["no more"], **kinds}
    what = [f"{kind} {', '.join(sorted(names))}" for kind, names in kinds.items() if names]
    if pinned:
        config.get("locality", config).update(pinned)
        changes["config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        what += [f"`{name}: {value}` in config.json, as its code had it by default" for name, value in pinned.items()]
    return info, changes, "; ".join(what)

"""`localist-hf publish`: runs to repositories on the Hub."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo

from ..command_line import publish_parser
from ..errors import INPUT_ERRORS, InputError, RunError, reraised_as
from ..hub import (
    CARD_FILE,
    Publication,
    PublishError,
    find_bases,
    find_model,
    find_space,
    prepare,
    publish,
    with_own_text_of,
)
from ..hub.formats import how_to_load
from ..hub.reachability import check_answers


_NEW = "new (the Hub shows no such repository)"


def main(arguments: list[str]) -> None:
    """Runs `localist-hf publish` with these arguments."""
    args = publish_parser().parse_args(arguments)
    with reraised_as(InputError, *INPUT_ERRORS), reraised_as(RunError, PublishError):
        if args.dry_run:
            show(prepare(args.run, args.namespace, args.base_model, args.name, args.space), HfApi())
        else:
            with reraised_as(RunError, TimeoutError):
                check_answers()
            publish(args.run, args.namespace, args.private, args.collection, args.base_model, args.name, args.space)


def show(publication: Publication, api: HfApi) -> None:
    """Prints what would be published, and what is there already where the Hub can be asked."""
    found = ask(publication, api)
    for repo_id, files in publication.repositories.items():
        show_repository(f"{api.endpoint}/{repo_id}", found[repo_id], files, [CARD_FILE])
    if (space := publication.space) is not None:
        # The commits are not there yet.
        files = space.files(dict.fromkeys([*space.models, *space.bases], "0" * 40))
        texts = [name for name in files if name not in space.package]
        show_repository(f"{api.endpoint}/spaces/{space.repo_id}", found[space.repo_id], files, texts)
    for path, reason in publication.left_out.items():
        print(f"left out: {path}: {reason}")
    for text in dict.fromkeys(map(how_to_load, publication.records.values())):
        print(text)
    where = f"{len(publication.repositories)} repositories{'' if space is None else ' and a Space'}"
    print(f"Dry run: nothing was uploaded; it would go to {where}.")


def show_repository(address: str, found: str, files: Mapping[str, Path | bytes], texts: Sequence[str]) -> None:
    """Prints what a repository would hold, and some of its files whole."""
    sizes = {
        name: len(content) if isinstance(content, bytes) else content.stat().st_size for name, content in files.items()
    }
    print(f"{address}\n  {found}\n")
    for name, size in sorted(sizes.items()):
        print(f"  {size:>12,}  {name}")
    print(f"  {sum(sizes.values()):>12,}  bytes in {len(sizes)} files\n")
    for name in texts:
        if len(texts) > 1:
            print(f"  {name}")
        print("\n".join(f"  | {line}".rstrip() for line in files[name].decode().splitlines()))
        print()


def ask(publication: Publication, api: HfApi) -> dict[str, str]:
    """What the Hub has of each repository, in words."""
    found = {}
    base_model = publication.base_model
    try:
        if base_model is not None and find_model(api, base_model) is None:
            print(f"The Hub shows no model {base_model!r}, which `--base-model` names.\n")
        for repo_id, files in publication.repositories.items():
            info = find_model(api, repo_id)
            found[repo_id] = describe(info, publication.records[repo_id].weights)
            publication.repositories[repo_id] = with_own_text_of(api, repo_id, files, info)
    except PublishError as error:
        print(f"What exists already is not known, since the Hub could not be asked: {error}\n")
    if (space := publication.space) is not None:
        try:
            find_bases(api, space)
            info = find_space(api, space.repo_id)
            found[space.repo_id] = _NEW if info is None else f"exists, {'private' if info.private else 'public'}"
        except PublishError as error:
            found[space.repo_id] = f"not possible, or not known: {error}"
    return defaultdict(lambda: "not known whether it exists", found)


def describe(info: ModelInfo | None, weights: Mapping[str, str]) -> str:
    """A repository as it is found, and what its weights are to those that would be published."""
    if info is None:
        return _NEW
    stored = {file.rfilename: file.lfs.sha256 for file in info.siblings or () if file.lfs is not None}
    same = all(stored.get(name) == digest for name, digest in weights.items())
    other = "with these weights" if same else "with other weights, which would be replaced"
    if not any(name.endswith(".safetensors") for name in stored):
        other = "without weights"
    return f"exists, {'private' if info.private else 'public'}, {other}"

"""A Hub Space on which anybody reads the attention of the models that were published with it."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from huggingface_hub import HfApi, ModelInfo, SpaceCard, SpaceCardData, SpaceInfo
from huggingface_hub.errors import RepositoryNotFoundError

from ..page_title import TITLE
from .model_card import CARD_FILE
from .own_text import keep_own_text, with_own_text
from .repositories import PublishError, explained, find_model
from .repository_files import check_private


#: What the page is tried with; of the extra `view`.
GRADIO_VERSION = "6.31.0"
#: What tells a Space of ours from everybody else's, which is never replaced.
SPACE_TAG = "localist-hf"
#: What a Space gets of the package, of which no package index knows: all that its wheel has but the base.
PACKAGE_FILES = (
    "*.py", "*/*.py", "evaluation/metrics/*.py", "py.typed", "experiments/grids/*.yaml",
    "hub/card_sentences.jinja", "hub/model_card_template.md", "page/*.css", "page/*.html", "page/*.js",
)  # fmt: skip

_APP = '''\
"""Where these language models look, read in a browser: the page of localist-hf. `localist-hf publish` writes this."""

from localist_hf.cli.space_page import serve_page


MODELS = {models}
# The commits that were published with this page, and those of what adapters stand on.
REVISIONS = {revisions}

serve_page(MODELS, REVISIONS)
'''

_REQUIREMENTS = """\
# Made by `localist-hf publish`: the versions that the models were published with. Gradio is pinned by `sdk_version` in
# README.md. What these stand on is left to pip, since Spaces install packages of their own beside them.
# The free tier has no GPU: builds of torch for the CPU, 200 MB in place of gigabytes of CUDA.
--extra-index-url https://download.pytorch.org/whl/cpu
"""

_CARD = """\
# {title}

Where the language models below look as they read: the blocks of a text; of each token the shares of its attention, by
layer and head; and what comes next as the dial turns attention outside the blocks down. Type a text, choose a model or
two, and click a token.

{models}

Each is read at the commit that was published with this page, by the library that lies beside it, localist-hf.
The method is that of [arXiv:2511.18375](https://arxiv.org/abs/2511.18375). `localist-hf publish --space` makes the
page, and replaces it.
"""


@dataclass(frozen=True)
class Space:
    """
    A Space, all but the commits that its models will have.

    Args:
        repo_id (`str`):
            Its id on the Hub.
        models (`list[str]`):
            The models to choose from, by their Hub ids; the first one is shown first.
        bases (`list[str]`):
            Hub ids of what adapters among them stand on, as far as it is not among them.
        requirements (`bytes`):
            The content of requirements.txt.
        package (`dict[str, Path]`):
            The files of this library, by their paths in the repository.
    """

    repo_id: str
    models: list[str]
    bases: list[str]
    requirements: bytes
    package: dict[str, Path]

    def files(self, revisions: Mapping[str, str], found: str | None = None) -> dict[str, Path | bytes]:
        """
        What the repository holds.

        Args:
            revisions (`Mapping[str, str]`):
                The commit of each of `models` and `bases`.
            found (`str`, *optional*):
                The card that is there; what people wrote into their part of it stays.

        Raises:
            ValueError: where that card was edited elsewhere.
        """
        pinned = {repo_id: revisions[repo_id] for repo_id in [*self.models, *self.bases]}
        data = SpaceCardData(
            title=TITLE,
            sdk="gradio",
            sdk_version=GRADIO_VERSION,
            python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
            app_file="app.py",
            suggested_hardware="cpu-basic",  # the free one
            license="apache-2.0",
            models=list(pinned),
            tags=[SPACE_TAG, "localist", "interpretability", "attention", "arxiv:2511.18375"],
        )
        lines = [f"- [{name}](https://huggingface.co/{name}/tree/{pinned[name]})" for name in self.models]
        card = SpaceCard(f"---\n{data.to_yaml()}\n---\n\n{_CARD.format(title=TITLE, models=chr(10).join(lines))}")
        text = with_own_text(str(card))
        if found is not None:
            text = keep_own_text(text, found, f"README.md of the Space {self.repo_id}")
        app = _APP.format(models=_literal(self.models), revisions=_literal(pinned))
        return {
            "README.md": text.encode(),
            "app.py": app.encode(),
            "requirements.txt": self.requirements,
            **self.package,
        }


def make_space(repo_id: str, models: Sequence[str], bases: Sequence[str]) -> Space:
    """
    Makes a Space for models that are about to be published; nobody is asked.

    Raises:
        ValueError: where this library is not installed or names this machine, or a version cannot be had elsewhere.
    """
    return Space(repo_id, list(models), list(bases), _requirements(), package_files())


def package_files(package: Path = Path(__file__).parents[1]) -> dict[str, Path]:
    """
    The files of this library as it runs, by their paths in a repository.

    Args:
        package (`Path`, *optional*):
            The package's folder; by default the one that is running.

    Raises:
        ValueError: where one of them names this machine.
    """
    paths = sorted(path for pattern in PACKAGE_FILES for path in package.glob(pattern) if path.name[0] != ".")
    files = {f"localist_hf/{path.relative_to(package).as_posix()}": path for path in paths}
    check_private(files, package, "the package's folder")
    return files


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


def _requirements() -> bytes:
    """The versions of this machine, which go together, of all that the library needs."""
    try:
        needed = [line for line in requires("localist-hf") or () if "extra ==" not in line]
    except PackageNotFoundError as error:
        raise ValueError(
            "A Space needs the versions of what this library stands on, and it is not installed here: install it with "
            "pip, from its repository too (`pip install -e .`)."
        ) from error
    lines = []
    for name in (re.match(r"[\w.-]+", line)[0] for line in needed):
        public = version(name).partition("+")[0]  # what follows is the build for this machine
        if re.search(r"\.dev", public):
            raise ValueError(
                f"`{name}` is {public} here, which no package index has, so that a Space could not be built with it: "
                "install a release."
            )
        lines.append(f"{name}=={public}{'+cpu' if name == 'torch' else ''}\n")
    return (_REQUIREMENTS + "".join(lines)).encode()


def _literal(value: list[str] | dict[str, str]) -> str:
    """Hub ids and hashes as Python, a line each."""
    return json.dumps(value, indent=4).replace('"\n', '",\n')

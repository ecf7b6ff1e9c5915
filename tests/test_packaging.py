"""What is built and published is whole, says what is true, and needs nothing that it does not use."""

import ast
import email
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from documents import CARDS, DOCUMENTS, script_of

import localist_hf
from localist_hf.cli.view import GRADIO


ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Imported by a library on our behalf, not by us.
NEEDED_BY_OTHERS = {"accelerate": "transformers.Trainer"}


def package_files() -> set[str]:
    """Every file of the package and of its entry point, as they lie in the repository."""
    return {"localist_hf_main.py"} | {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "localist_hf").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


# --- the distributions


@dataclass
class Distributions:
    sdist: Path
    wheel: Path

    @property
    def metadata(self) -> email.message.Message:
        with zipfile.ZipFile(self.wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            return email.message_from_bytes(archive.read(name))


def build(source: Path, kind: str) -> Path:
    """Builds an `sdist` or a `wheel` with the backend itself: a frontend would fetch one from the network."""
    command = f"from setuptools import build_meta; print(build_meta.build_{kind}('dist'))"
    done = subprocess.run([sys.executable, "-c", command], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return source / "dist" / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """An sdist of a copy of the repository with all that lies about in one, and a wheel made from that sdist alone."""
    checkout = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, checkout)
    for folder in ("localist_hf", "tests", "docs", "examples", "benchmarks", "model_cards"):
        shutil.copytree(ROOT / folder, checkout / folder)
    (checkout / "runs" / "demo").mkdir(parents=True)
    (checkout / "runs" / "demo" / "model.safetensors").write_bytes(b"weights")
    sdist = build(checkout, "sdist")
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (source,) = unpacked.iterdir()
    return Distributions(sdist, build(source, "wheel"))


def test_the_sdist_holds_what_it_needs_and_nothing_else(distributions: Distributions):
    with tarfile.open(distributions.sdist) as archive:
        files = {member.name.partition("/")[2] for member in archive if member.isfile()}
    generated = {"PKG-INFO", "setup.cfg"} | {file for file in files if file.startswith("localist_hf.egg-info/")}
    documents = {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"}
    assert files - generated == package_files() | documents | {"pyproject.toml", "MANIFEST.in"}


def test_the_wheel_holds_the_whole_package(distributions: Distributions):
    with zipfile.ZipFile(distributions.wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert files == package_files()
    assert "localist_hf/py.typed" in files


def test_the_metadata(distributions: Distributions):
    metadata = distributions.metadata
    assert metadata["Name"] == "localist-hf"
    assert metadata["Version"] == localist_hf.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Summary"] == PROJECT["description"]
    classifiers = metadata.get_all("Classifier")
    assert "Typing :: Typed" in classifiers
    # An SPDX expression takes the place of a licence classifier; package indexes refuse both together.
    assert not [each for each in classifiers if each.startswith("License ::")]
    minors = {
        int(each.rpartition(".")[2]) for each in classifiers if re.fullmatch(r"Programming Language :: .*\d", each)
    }
    lowest, above = map(int, re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups())
    assert minors == set(range(lowest, above))


def test_the_metadata_names_no_address_that_is_not_known(distributions: Distributions):
    # Nobody has told us a repository; an invented one would be somebody else's, or a trap.
    addresses = [entry.partition(", ")[2] for entry in distributions.metadata.get_all("Project-URL")]
    assert addresses == ["https://arxiv.org/abs/2511.18375"]


# --- the documents


def test_the_changelog_has_this_version_and_a_place_for_the_next():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles[0] == "[Unreleased]"
    releases = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - \d{4}-\d\d-\d\d", title) for title in titles[1:]]
    assert all(releases), titles
    assert releases[0].group(1) == localist_hf.__version__
    kinds = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_is_of_this_version_and_of_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what the format requires
    assert citation["version"] == localist_hf.__version__
    assert citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]
    released = re.search(r"^## \[[\d.]+\] - (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert citation["date-released"] == released.group(1)
    (paper,) = citation["references"]
    assert paper["url"] == PROJECT["urls"]["Paper"]
    assert paper["authors"] == [{"family-names": "Diederich", "given-names": "Joachim"}]


def anchors(path: Path) -> set[str]:
    """What `#...` can name in a Markdown file: its headings as GitHub writes them in links."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    names = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    repeated = [names[:place].count(name) for place, name in enumerate(names)]
    return {name + f"-{number}" * bool(number) for name, number in zip(names, repeated, strict=True)}


@pytest.mark.parametrize(
    "document",
    [
        *DOCUMENTS,
        *CARDS,
        "CHANGELOG.md",
        "benchmarks/README.md",
        *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")),
    ],
)
def test_links_into_the_repository_lead_somewhere(document: str):
    path = ROOT / document
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", path.read_text(encoding="utf-8")):
        linked = path.parent / target if target else path
        assert linked.exists(), f"{document} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{document} links to {target}#{anchor}"


def linked_pages(document: str) -> list[str]:
    """The pages of this repository that a page links to."""
    path = ROOT / document
    targets = re.findall(r"\]\(([^)#:]+\.md)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    return [(path.parent / target).resolve().relative_to(ROOT).as_posix() for target in targets]


def test_every_page_is_reached_from_the_readme_and_stands_in_the_site():
    reached = ["README.md"]
    for document in reached:  # which grows meanwhile
        reached += dict.fromkeys(page for page in linked_pages(document) if page not in reached)
    pages = {*DOCUMENTS, *CARDS, *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))}
    assert pages <= {*reached}
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page for page in pages if f": {page}\n" not in site and page not in CARDS] == []
    # Of the cards the site's list has two; the others are among its files, where links lead to them.
    (patterns,) = re.findall(
        r"^PATTERNS = (\(.*?^\))", (ROOT / "docs" / "site_files.py").read_text(), re.DOTALL | re.MULTILINE
    )
    shown = {path.relative_to(ROOT).as_posix() for pattern in ast.literal_eval(patterns) for path in ROOT.glob(pattern)}
    assert {*CARDS} <= shown


def test_the_links_of_cards_are_those_of_repositories_that_make_family_would_publish():
    names = {Path(card).parent.name for card in CARDS}
    for card in CARDS:
        text = (ROOT / card).read_text(encoding="utf-8")
        links = re.findall(r"\]\(https://(?:huggingface\.co|hf\.co)/(.*?)\)", text)
        assert len(links) == (0 if card.startswith("localist_hf/base/") else len(names) - 1)  # which has none beside it
        assert {link.removeprefix("org/localist-gpt2-") for link in links} <= names


def test_code_refers_to_definitions_that_there_are():
    headings, references = anchors(ROOT / "docs" / "method.md"), []
    for folder in ("localist_hf", "study", "tests", "examples", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            references += [(path, anchor) for anchor in re.findall(r"docs/method\.md#([\w-]+)", text)]
            # What is not in the repository tells a reader nothing.
            assert path == Path(__file__) or not re.search(r"\bMETHOD\b", text), path
    assert references
    assert [(path, anchor) for path, anchor in references if anchor not in headings] == []


# --- dependencies


def imported_distributions(files: Iterable[Path], ours: set[str]) -> dict[str, set[str]]:
    """The distributions that the files import anywhere, each with those files; `ours` are modules to leave out."""
    owners = importlib.metadata.packages_distributions()
    found: dict[str, set[str]] = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            else:
                continue
            for module in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - ours:
                (owner,) = set(owners.get(module, [module]))  # an extra may not be installed
                found.setdefault(normalised(owner), set()).add(file.relative_to(ROOT).as_posix())
    return found


def normalised(name: str) -> str:
    """The name of a requirement as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", name).group()).lower()


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    declared = {normalised(requirement) for requirement in PROJECT["dependencies"]}
    ours = {"localist_hf", "localist_hf_main"}
    imported = imported_distributions((ROOT / "localist_hf").rglob("*.py"), ours)
    # Everything but the page with a server, and attributions by gradients, does without the extras.
    assert imported.pop("gradio") == {"localist_hf/page/live_page.py"}
    assert imported.pop("starlette") == {"localist_hf/page/serving.py"}  # gradio brings it
    assert imported.pop("captum") == {"localist_hf/evaluation/guesses.py"}
    assert imported.keys() - declared == set(), imported
    assert declared - imported.keys() == NEEDED_BY_OTHERS.keys() - imported.keys()


def test_what_tests_and_examples_import_is_declared():
    requirements = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    declared = {normalised(requirement) for requirement in requirements}
    files = [file for folder in ("tests", "examples", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    ours = {"localist_hf", "localist_hf_main"} | {file.stem for file in files}
    imported = imported_distributions(files, ours)
    assert imported.keys() - declared == set(), imported


def test_what_travels_with_the_models_needs_torch_and_transformers_only():
    imported = imported_distributions((ROOT / "localist_hf" / "modeling").glob("*.py"), set())
    assert imported.keys() == {"torch", "transformers", "huggingface-hub"}  # the last is what transformers stands on


def test_every_declared_dependency_has_a_tried_version():
    pinned = {normalised(line) for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()}
    extras = PROJECT["optional-dependencies"]
    requirements = PROJECT["dependencies"] + extras["dev"] + extras["docs"]
    assert {normalised(requirement) for requirement in requirements} <= pinned


def test_nobody_is_sent_to_an_index_for_what_is_on_none() -> None:
    """Where a stranger could register the name."""
    files = [*(ROOT / "localist_hf").rglob("*.py"), *(ROOT / "localist_hf").rglob("*.md"), *ROOT.glob("*.md")]
    for path in files:
        assert not re.search(r"pip install [^.\n`]*localist", path.read_text(encoding="utf-8")), path
    assert PROJECT["optional-dependencies"]["view"] == [GRADIO]


# --- types


WRONG = """
from localist_hf import LocalistGPT2LMHeadModel
from localist_hf.trainers import LocalistTrainingArguments

LocalistTrainingArguments(output_dir="run", target_fidelity="high")
model = LocalistGPT2LMHeadModel.from_pretrained("folder")
model.set_locality_dial("far")
"""


@pytest.mark.slow
def test_the_scripts_of_users_type_check(distributions: Distributions, tmp_path: Path):
    """The wheel in an environment of its own: what a type checker reads of us is what is installed."""
    venv.create(tmp_path / "venv", with_pip=False)
    (site_packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    with zipfile.ZipFile(distributions.wheel) as archive:
        archive.extractall(site_packages)
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages / "dependencies.pth").write_text("\n".join(others) + "\n")

    scripts = tmp_path / "scripts"
    shutil.copytree(ROOT / "examples", scripts)
    for number, document in enumerate(DOCUMENTS):
        (scripts / f"document_{number}.py").write_text(script_of(document))
    (scripts / "wrong.py").write_text(WRONG)
    done = subprocess.run(
        [
            sys.executable, "-m", "mypy", "--strict", "--implicit-reexport", "--ignore-missing-imports",
            "--follow-imports=silent", "--config-file=", f"--cache-dir={tmp_path / 'cache'}",
            f"--python-executable={tmp_path / 'venv' / 'bin' / 'python'}", *map(str, sorted(scripts.glob("*.py"))),
        ],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    # transformers types `generate` in a way that mypy accepts on no model, its own included.
    # `LocalityArguments` sets a field of the trainer's arguments that stand behind it.
    known = ('to attribute function "generate" with type', 'determine type of "greater_is_better" in base class')
    errors = [line for line in done.stdout.splitlines() if ": error:" in line and not any(map(line.count, known))]
    assert not done.stderr, done.stderr
    # It checks at all: without our types, everything would do.
    assert [re.sub(r".*wrong\.py:(\d+): error: (Argument) .*", r"\1 \2", line) for line in errors] == [
        "5 Argument",
        "7 Argument",
    ], done.stdout

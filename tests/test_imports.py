"""Each part of the package knows only those before it, annotations included, and `modeling` none at all."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import localist_hf


PACKAGE = Path(localist_hf.__file__).parent
ROOMS = ("modeling", "configuration", "evaluation", "hub", "page", "trainers", "experiments", "cli")


def imported_modules(path: Path) -> Iterator[str]:
    """What a file imports, by absolute name: also under `if TYPE_CHECKING` and inside functions."""
    package = ["localist_hf", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *filter(None, [node.module])]
            # `from .. import hub` names a part too, as far as it is one.
            yield from (".".join([*module, alias.name]) for alias in node.names)


def imported_rooms(path: Path) -> set[str]:
    names = (name.split(".") for name in imported_modules(path))
    return {name[1] for name in names if name[0] == "localist_hf" and name[1] in ROOMS}


def test_every_folder_has_its_place() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_part_imports_only_those_before_it(room: str) -> None:
    allowed = set(ROOMS[: ROOMS.index(room) + 1])
    files = sorted((PACKAGE / room).rglob("*.py"))
    assert files
    for path in files:
        assert imported_rooms(path) <= allowed, path.relative_to(PACKAGE)


def test_modeling_imports_its_own_files_relatively_and_nothing_else_of_the_package() -> None:
    """Its files travel with every model and run where the package is not installed."""
    for path in (PACKAGE / "modeling").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 1 or not (node.level or node.module.startswith("localist_hf")), path.name
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("localist_hf") for alias in node.names), path.name


def test_no_file_is_long() -> None:
    """A file holds one idea; what grows beyond this holds two."""
    files = [path for path in PACKAGE.rglob("*") if path.suffix in (".py", ".js", ".jinja", ".css")]
    lengths = {path.relative_to(PACKAGE).as_posix(): len(path.read_text("utf-8").splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > 450} == {}

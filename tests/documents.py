"""The documents that users read, and the Python in them."""

import ast
import re
from functools import cache
from pathlib import Path


ROOT = Path(__file__).parents[1]
#: By their names in the repository, those whose snippets are run and looked through by a type checker.
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/guides/{path.name}" for path in ROOT.glob("docs/guides/*.md")),
]


def script_of(document: str) -> str:
    """All Python of a document: a later snippet goes on from those before it, and nothing else is there."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))


#: The cards of this repository, which `localist_hf.hub.write_card` makes.
CARDS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("model_cards/*/README.md"), ROOT / "localist_hf/base/README.md")
)


@cache
def docstring_snippets() -> dict[str, str]:
    """The Python in the docstrings of the package, with its prompts, by the place where it stands."""
    found = {}
    for path in sorted((ROOT / "localist_hf").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                for snippet in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
                    name = getattr(node, "name", "")
                    found[f"{path.relative_to(ROOT).as_posix()}:{name}"] = snippet
    return found

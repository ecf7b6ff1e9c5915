"""The documents that users read, and the Python in them."""

import re
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

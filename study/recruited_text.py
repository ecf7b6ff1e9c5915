"""
Writes the text that separators are recruited from: of Python's sources and reference, what variants are trained on.

    python study/recruited_text.py runs/study/text
"""

import sys
from pathlib import Path

from localist_hf.experiments.python_text import python_text, split_text


#: About 125,000 tokens of the small base.
NUM_LETTERS = 400_000


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "python.txt").write_text("\n".join(split_text(python_text())["variants"])[:NUM_LETTERS], encoding="utf-8")

"""A hook of mkdocs: the site has the files of the repository, by the same paths, so that every link holds in both."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


ROOT = Path(__file__).parents[1]
#: What is shown, and what pages link to.
PATTERNS = (
    "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "docs/**/*.md", "docs/*.png",
    "docs/site.css", "localist_hf/base/*.md", "localist_hf/base/*.png", "localist_hf/configuration/variants.py",
    "model_cards/*/*.md", "model_cards/*/*.png", "benchmarks/*", "examples/*.py", "study/*.py",
    "study/*.yaml",
)  # fmt: skip


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Puts the repository's files in the place of those that mkdocs has found in `docs`."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    for path in sorted({path for pattern in PATTERNS for path in ROOT.glob(pattern) if path.is_file()}):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files

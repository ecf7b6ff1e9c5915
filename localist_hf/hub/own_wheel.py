"""This library's own wheel, for places that no package index serves."""

import base64
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distributions, version
from pathlib import Path
from typing import NamedTuple


_DISTRIBUTION = "localist-hf"
#: What setuptools builds the distribution from, in a source tree.
_SOURCES = ("pyproject.toml", "README.md", "LICENSE", "localist_hf_main.py")
#: What installers add to a distribution; the last of them names the place that it was installed from.
_OF_THE_INSTALLATION = ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json")
_EPOCH = 315532800  # 1980, the first year of zip files: equal sources make equal wheels


class Wheel(NamedTuple):
    """A wheel: the name of its file, its content, and the distributions that it cannot do without."""

    name: str
    content: bytes
    requires: list[str]


def own_wheel(package: Path = Path(__file__).parents[1]) -> Wheel:
    """
    The wheel of this library, as it is installed here or from its source tree. Equal code gives equal bytes.

    Args:
        package (`Path`, *optional*):
            The package's folder; by default the one that is running.

    Raises:
        ValueError: where there is neither a source tree nor a whole installation, or setuptools is missing.
    """
    root = package.parent
    name, content = _built(root) if _is_source_tree(root) else _packed_again(root)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (metadata,) = (entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
    return Wheel(name, content, re.findall(r"^Requires-Dist: ([\w.-]+)[^;\n]*$", text, re.MULTILINE))


def _is_source_tree(root: Path) -> bool:
    path = root / "pyproject.toml"
    return path.is_file() and tomllib.loads(path.read_text(encoding="utf-8"))["project"]["name"] == _DISTRIBUTION


def _built(root: Path) -> tuple[str, bytes]:
    """Built by setuptools, of a copy: it would leave files in the source tree, and take in those that it has left."""
    try:
        found = version("setuptools")
    except PackageNotFoundError:
        found = "missing"
    if found == "missing" or int(found.partition(".")[0]) < 77:
        raise ValueError(
            f"A Space carries this library's wheel, which setuptools 77 or newer builds from {str(root)!r}; here it is "
            f"{found}: pip install 'setuptools>=77'."
        )
    with tempfile.TemporaryDirectory() as folder:
        for name in _SOURCES:
            shutil.copy(root / name, folder)
        shutil.copytree(root / "localist_hf", Path(folder) / "localist_hf")
        build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
        environment = os.environ | {"SOURCE_DATE_EPOCH": str(_EPOCH)}
        done = subprocess.run(
            [sys.executable, "-c", build], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        wheels = list(Path(folder).glob("dist/*.whl"))
        if not wheels:
            raise ValueError(f"The wheel of {str(root)!r} cannot be built: {done.stderr.strip()[-300:]}")
        return wheels[0].name, wheels[0].read_bytes()


def _packed_again(root: Path) -> tuple[str, bytes]:
    """
    The wheel that was installed in a folder, made of the files that the installation lists. A wheel is a zip file of
    them and of their hashes: https://packaging.python.org/en/latest/specifications/binary-distribution-format/
    """
    found = next(iter(distributions(name=_DISTRIBUTION, path=[str(root)])), None)
    if found is None or not found.files:
        raise ValueError(
            f"A Space carries this library's wheel, and {str(root)!r} holds neither an installation of localist-hf nor "
            "its source tree: install it with pip, or run it from the repository."
        )
    contents = _listed_files(found, root)
    (record,) = (str(file) for file in found.files if file.name == "RECORD" and file.parent.suffix == ".dist-info")
    lines = [f"{name},sha256={_digest(content)},{len(content)}" for name, content in contents.items()]
    contents[record] = "".join(f"{line}\n" for line in [*lines, f"{record},,"]).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in contents.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    (tag,) = re.findall(r"^Tag: (.*)$", found.read_text("WHEEL") or "", re.MULTILINE)
    return f"{record.partition('.dist-info')[0]}-{tag}.whl", buffer.getvalue()


def _listed_files(installed: Distribution, root: Path) -> dict[str, bytes]:
    """What the wheel had in it, in its order, all as it was."""
    contents = {}
    for file in installed.files or ():
        in_metadata = file.parent.suffix == ".dist-info"
        # Programs in other folders are made at installation, as compiled files are.
        if ".." in file.parts or file.suffix == ".pyc" or (in_metadata and file.name in _OF_THE_INSTALLATION):
            continue
        path = root / file
        content = path.read_bytes() if path.is_file() else None
        if content is None or (file.hash is not None and file.hash.value != _digest(content)):
            raise ValueError(
                f"A Space carries this library's wheel, and {str(path)!r} is not what was installed: install "
                "localist-hf again, or run it from its repository."
            )
        contents[str(file)] = content
    return contents


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()

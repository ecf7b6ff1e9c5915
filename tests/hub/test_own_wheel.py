"""The library's own wheel: from its source tree, and again from where it is installed."""

import io
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import localist_hf
from localist_hf.hub import own_wheel as module
from localist_hf.hub.own_wheel import Wheel, own_wheel


PACKAGE = Path(localist_hf.__file__).parent
METADATA = f"localist_hf-{localist_hf.__version__}.dist-info"


@pytest.fixture(scope="module")
def wheel() -> Wheel:
    return own_wheel()


@pytest.fixture
def installed(wheel: Wheel, tmp_path: Path) -> Path:
    """A folder in which the wheel is installed, with what an installer adds."""
    root = tmp_path / "site-packages"
    with zipfile.ZipFile(io.BytesIO(wheel.content)) as archive:
        archive.extractall(root)
    added = {
        f"{METADATA}/INSTALLER": "pip\n",
        f"{METADATA}/REQUESTED": "",
        f"{METADATA}/direct_url.json": '{"url": "file:///home/somebody/secret"}',
        "localist_hf/__pycache__/version.cpython-311.pyc": "compiled",
        "../bin/localist-hf": "#!/home/somebody/bin/python",
    }
    for name, text in added.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    with (root / METADATA / "RECORD").open("a") as record:
        record.writelines(f"{name},,\n" for name in added)
    (root / "localist_hf" / "notes.txt").write_text("nobody listed this")
    return root


def contents(wheel: Wheel) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(wheel.content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_it_holds_the_package_as_it_runs(wheel: Wheel) -> None:
    assert wheel.name == f"localist_hf-{localist_hf.__version__}-py3-none-any.whl"
    files = {name: content for name, content in contents(wheel).items() if ".dist-info/" not in name}
    on_disk = {
        path.relative_to(PACKAGE.parent).as_posix(): path.read_bytes()
        for path in (PACKAGE.with_name("localist_hf_main.py"), *PACKAGE.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files == on_disk
    assert {"torch", "transformers", "huggingface-hub"} <= set(wheel.requires)
    assert not {"gradio", "pytest"} & set(wheel.requires)  # of extras


def test_nothing_of_this_machine_is_in_it(wheel: Wheel) -> None:
    for name, content in contents(wheel).items():
        assert str(PACKAGE.parent).encode() not in content, name


def test_the_source_tree_is_left_as_it_was(wheel: Wheel, tmp_path: Path) -> None:
    for name in ("pyproject.toml", "README.md", "LICENSE", "localist_hf_main.py"):
        shutil.copy(PACKAGE.parent / name, tmp_path)
    shutil.copytree(PACKAGE, tmp_path / "localist_hf", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "build/lib/localist_hf").mkdir(parents=True)
    (tmp_path / "build/lib/localist_hf/old.py").write_text("left by an earlier build")
    (tmp_path / "localist_hf/.env").write_text("HF_TOKEN=hf_secret")
    (tmp_path / "localist_hf/__pycache__").mkdir()
    (tmp_path / "localist_hf/__pycache__/version.pyc").write_text("compiled")
    before = sorted(tmp_path.rglob("*"))
    assert own_wheel(tmp_path / "localist_hf").content == wheel.content
    assert sorted(tmp_path.rglob("*")) == before


def test_an_installation_gives_the_wheel_that_was_installed(wheel: Wheel, installed: Path, tmp_path: Path) -> None:
    again = own_wheel(installed / "localist_hf")
    assert again._replace(content=b"") == wheel._replace(content=b"")
    assert contents(again) == contents(wheel)
    assert own_wheel(installed / "localist_hf").content == again.content


@pytest.mark.slow
def test_pip_installs_it(installed: Path, tmp_path: Path) -> None:
    wheel = own_wheel(installed / "localist_hf")
    (tmp_path / wheel.name).write_bytes(wheel.content)
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(tmp_path / "target")]
    subprocess.run([*pip, str(tmp_path / wheel.name)], check=True, capture_output=True)
    assert (tmp_path / "target/localist_hf/hub/own_wheel.py").read_bytes() == Path(module.__file__).read_bytes()
    assert (tmp_path / "target" / METADATA / "entry_points.txt").is_file()


def test_what_is_not_whole_is_refused(installed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (installed / "localist_hf/version.py").write_text("__version__ = '9'\n")
    with pytest.raises(ValueError, match=r"version\.py' is not what was installed: install localist-hf again"):
        own_wheel(installed / "localist_hf")
    (installed / "localist_hf/version.py").unlink()
    with pytest.raises(ValueError, match=r"version\.py' is not what was installed"):
        own_wheel(installed / "localist_hf")
    shutil.rmtree(installed / METADATA)
    with pytest.raises(ValueError, match=r"holds neither an installation of localist-hf nor its source tree"):
        own_wheel(installed / "localist_hf")
    # Beside somebody else's project it is no source tree of ours.
    (installed / "pyproject.toml").write_text('[project]\nname = "other"\n')
    with pytest.raises(ValueError, match=r"holds neither"):
        own_wheel(installed / "localist_hf")


@pytest.mark.parametrize("found", [None, "70.1"])
def test_without_setuptools_a_source_tree_gives_none(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    def version(name: str) -> str:
        if found is None:
            raise module.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(module, "version", version)
    with pytest.raises(ValueError, match=f"here it is {found or 'missing'}: pip install 'setuptools>=77'"):
        own_wheel()

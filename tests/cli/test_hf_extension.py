"""The package as an extension of the `hf` command: `hf extensions install OWNER/hf-localist`, then `hf localist`."""

import json
import os
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from pathlib import Path

import pytest
from huggingface_hub.cli.extensions import _get_executable_name, _normalize_repo_id


ROOT = Path(__file__).parents[2]
REPOSITORY = "someone/hf-localist"

# `hf extensions install`, with the manager's own code; only what would reach the network is answered from a folder.
INSTALL = textwrap.dedent("""
    import os, subprocess, sys
    from pathlib import Path

    import httpx2
    from huggingface_hub import set_client_factory
    from huggingface_hub.cli.hf import main

    repository, checkout, archive, *site_packages = sys.argv[1:]
    github, raw = f"https://github.com/{repository}", f"https://raw.githubusercontent.com/{repository}/HEAD/"

    def answer(request):
        url = str(request.url.copy_with(query=None))
        if url == f"{github}.git/info/refs":
            return httpx2.Response(200, text="0" * 40 + " HEAD\\0", request=request)
        file = Path(checkout, url.removeprefix(raw))
        if url.startswith(raw) and file.is_file():
            return httpx2.Response(200, content=file.read_bytes(), request=request)
        return httpx2.Response(200 if url == github else 404, request=request)

    set_client_factory(lambda: httpx2.Client(transport=httpx2.MockTransport(answer)))

    # pip or uv fetches the archive; here it is given a file. It would also fetch setuptools and the dependencies; those
    # of this environment serve instead. To build, through PYTHONPATH, which comes before the setuptools that a virtual
    # environment of Python 3.11 has, too old for us; to run, the test adds them with a .pth file, which comes last.
    run = subprocess.run

    def run_offline(command, **kwargs):
        if command[-1] == f"{github}/archive/HEAD.zip":
            command = [*command[:-1], "--no-index", "--no-deps", "--no-build-isolation", Path(archive).as_uri()]
            kwargs["env"] = os.environ | {"PYTHONPATH": os.pathsep.join(site_packages)}
        return run(command, **kwargs)

    subprocess.run = run_offline
    sys.argv = ["hf", "extensions", "install", repository]
    main()
""")


def test_the_name_is_what_the_extension_manager_looks_for() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    _, _, short_name = _normalize_repo_id(REPOSITORY)
    assert short_name == "localist"
    name = _get_executable_name(short_name).removesuffix(".exe")
    assert scripts[name] == scripts["localist-hf"]
    # A file of that name at the root would be installed in place of the package.
    assert not (ROOT / name).exists()


@pytest.mark.slow
def test_hf_installs_and_runs_it(tmp_path: Path) -> None:
    # A copy, as GitHub would pack it, so that nothing is built in the checkout.
    archive = tmp_path / "HEAD.zip"
    files = [path for path in ROOT.iterdir() if path.is_file()]
    files += [path for path in (ROOT / "localist_hf").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    with zipfile.ZipFile(archive, "w") as packed:
        for path in files:
            packed.write(path, Path("hf-localist-HEAD") / path.relative_to(ROOT))
    home = tmp_path / "home"
    home.mkdir()
    foreign = ("PYTHON", "PIP_", "UV_", "HF_", "XDG_", "VIRTUAL_ENV")  # settings of whoever runs the tests
    environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | {
        "HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "UV_PYTHON": sys.executable,  # uv may otherwise take another version, for which torch is not built here
        "UV_OFFLINE": "1",
    }
    site_packages = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]

    def run(*command: str) -> str:
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-c", INSTALL, REPOSITORY, str(ROOT), str(archive), *site_packages)
    extension = home / ".local" / "share" / "hf" / "extensions" / "hf-localist"
    manifest = json.loads((extension / "manifest.json").read_text())
    assert manifest["type"] == "python"
    assert manifest["description"].startswith("Language models whose attention can be read")
    (installed,) = extension.glob("venv/lib/python*/site-packages/localist_hf")
    (installed.parent / "dependencies.pth").write_text("\n".join(site_packages) + "\n")

    printed = run(str(Path(sys.executable).with_name("hf")), "localist", "--help")
    assert "train" in printed
    assert "family" in printed

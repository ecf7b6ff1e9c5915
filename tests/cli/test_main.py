"""The command as a newcomer meets it."""

import pytest

from localist_hf import __version__
from localist_hf.cli.main import main


def test_help_explains_the_commands(capsys) -> None:
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    assert error.value.code == 0
    printed = capsys.readouterr().out
    assert "train" in printed
    assert "family" in printed
    assert "localist-hf train --variant quintic --text-file book.txt" in printed


def test_version_and_unknown_commands(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert __version__ in capsys.readouterr().out
    with pytest.raises(SystemExit) as error:
        main(["retrain"])
    assert error.value.code == 2
    assert "retrain" in capsys.readouterr().err

"""What the tests share is in `shared_fixtures.py`."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it: no test may reach the network

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # With `-n`, the process that only hands out tests is spared the seconds that these imports take.
    if not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")

"""What the tests share is in `shared_fixtures.py`."""

import os
import signal


os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers reads it: no test may reach the network
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in a shell's background, and then in what tests begin
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # With `-n`, the process that only hands out tests is spared the seconds that these imports take.
    if not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """With `--dist loadfile`, the files about the Hub stay together too, so that their family is trained once."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "tests/hub" if nodeid.startswith("tests/hub/") else super()._split_scope(nodeid)

    return ByFile(config, log)

"""Whether the Hub answers at all, before one call after the other waits for it."""

import os
import time
from functools import cache

from huggingface_hub import constants, get_session, is_offline_mode


def check_answers(name: str | None = None) -> None:
    """
    Asks the Hub once, where it will be needed: a Hub that takes connections and keeps silent holds up every call for
    its timeout, and again for each retry.

    Args:
        name (`str`, *optional*):
            What is to be loaded; nothing is asked for the sake of a local path.

    Raises:
        TimeoutError: where it has not answered in `HF_HUB_ETAG_TIMEOUT` seconds. Where it cannot be reached, what is
            to be loaded may lie in the cache, and is looked for at once.
    """
    if not is_offline_mode() and not (name is not None and os.path.exists(name)):
        _ask(constants.ENDPOINT, constants.HF_HUB_ETAG_TIMEOUT)


def unreachable(name: str) -> str | None:
    """
    Says that the Hub cannot be reached, where something is to be loaded from it ([`check_answers`]) and it cannot.
    """
    if os.path.exists(name):
        return None
    if is_offline_mode():
        return "the cache does not hold all of it, and with HF_HUB_OFFLINE=1 the Hub is not asked"
    if _ask(constants.ENDPOINT, constants.HF_HUB_ETAG_TIMEOUT):
        return None
    return f"the Hub ({constants.ENDPOINT}) cannot be reached, and the cache does not hold all of it"


@cache
def _ask(endpoint: str, seconds: float) -> bool:
    start = time.monotonic()
    try:
        get_session().head(endpoint, timeout=seconds)
    except Exception as error:  # whatever the client raises
        if time.monotonic() - start >= 0.9 * seconds:
            raise TimeoutError(
                f"the Hub ({endpoint}) has not answered in {seconds:g} s; try again later, give it longer with "
                "HF_HUB_ETAG_TIMEOUT, or do with what the cache holds with HF_HUB_OFFLINE=1."
            ) from error
        return False
    return True

"""How the live page is served: where, what its server lets in, and how that ends."""

import asyncio
import atexit
import os
import socket
import threading
import time
from typing import Any

from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answers import AT_WORK
from .reading_server import max_characters


#: Where Gradio looks for a port, and how many it tries.
_FIRST_PORT, _NUM_PORTS = 7860, 100
#: How long readers that are being answered may keep a page that ends.
_MAX_SECONDS_TO_CLOSE = 1.0


def launch_settings(host: str | None = None, share: bool = False, max_tokens: int | None = None) -> dict[str, Any]:
    """
    How `Blocks.launch` is to serve a page.

    Args:
        host (`str`, *optional*):
            The address that it listens on. Unless these are all of the machine's, requests that name another host are
            refused: a site in the reader's browser has then made its own name lead here (DNS rebinding), to ask for
            what is none of its business. So are requests that another site in that browser makes, which could not see
            the answer, but have models loaded. By default any name will do, and Gradio's environment variables say
            where.
        share (`bool`, *optional*, defaults to `False`):
            Whether Gradio makes a public link to it.
        max_tokens (`int`, *optional*):
            As for [`Readings`].
    """
    middleware = [Middleware(_BoundedRequests, max_bytes=2**16 + 12 * max_characters(max_tokens))]
    if host is not None and ":" in host:
        host = f"[{host.strip('[]')}]"  # as addresses of IPv6 stand in a URL
    if host is not None:
        middleware.append(Middleware(_OwnSite))
    if host not in (None, "0.0.0.0", "[::]"):
        names = [host, "localhost", "127.0.0.1", "[::1]", *(["*.gradio.live"] if share else [])]
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=names))
    return {
        "server_name": host,
        "share": share,
        "ssr_mode": False,
        "footer_links": ["gradio"],
        "max_file_size": 0,  # there is no place for files
        "run_history": False,  # what was read stays on the page
        "state_session_capacity": 200,  # nothing is kept of a session
        "max_threads": 200,  # those that wait for a model, and those that do not
        "app_kwargs": {"middleware": middleware},
    }


def port_to_serve_on(host: str, port: int | None = None) -> int:
    """
    Finds out whether a page can be served at an address; Gradio would try on for minutes, with an error for each port.

    Args:
        host (`str`):
            Name or address of this machine.
        port (`int`, *optional*):
            The port; by default the first that is free from 7860 on.

    Returns:
        `int`: the port.

    Raises:
        ValueError: for an address that is none of this machine's, and for a port that is taken.
    """
    host = host.strip("[]")
    if (fault := _fault(host, 0)) is not None:
        raise ValueError(f"`host` is {host!r}; it must be an address of this machine ({fault}).")
    for each in range(_FIRST_PORT, _FIRST_PORT + _NUM_PORTS) if port is None else [port]:
        # Gradio takes no port that is taken on the machine itself, wherever it is to listen.
        fault = _fault(host, each) or _fault("127.0.0.1", each)
        if fault is None:
            return each
    if port is None:
        raise ValueError(f"`port` is not given, and none from {_FIRST_PORT} to {each} is free ({fault}).")
    raise ValueError(f"`port` is {port}; it must be one that is free ({fault}).")


def _fault(host: str, port: int) -> str | None:
    """Why the server could not listen there; `None` where it could. Port 0 stands for any."""

    async def listen() -> None:
        server = await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port)
        try:
            for place in server.sockets:
                with socket.socket(place.family) as visitor:  # where addresses are for many, nobody can come
                    visitor.connect(place.getsockname())
        finally:
            server.close()

    try:
        asyncio.run(listen())
    except socket.gaierror as error:
        return error.strerror
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)
    except UnicodeError:
        return "no name is so long, or has such parts"
    return None


def serve(page: Any, **settings: Any) -> None:
    """
    Serves a page until Ctrl-C.

    Args:
        page (`gradio.Blocks`):
            The page.
        settings:
            For `Blocks.launch`.

    Raises:
        KeyboardInterrupt: which Gradio's own way to wait takes for the end of a program that has succeeded.
    """
    atexit.register(_end_at_work)  # first, and so after what launching registers
    try:
        page.launch(prevent_thread_lock=True, **settings)
        while page.is_running:
            time.sleep(0.1)
    finally:
        # It ends the streams that are open, but waits for answers, however long they take.
        closing = threading.Thread(target=page.close, kwargs={"verbose": False}, daemon=True)
        closing.start()
        closing.join(_MAX_SECONDS_TO_CLOSE)


def _end_at_work() -> None:
    """Where threads are in the midst of an answer, torch would abort an interpreter that ends in order."""
    if AT_WORK:
        os._exit(130)


class _BoundedRequests:
    """Refuses requests that are larger than any of the page's own, and does not wait for their end."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        num_bytes = 0

        async def count() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise HTTPException(413, f"A request has {self._max_bytes} bytes at most.")
            return message

        await self._app(scope, count, send)


class _OwnSite:
    """Refuses what a browser asks for on behalf of another site: it asks unasked for whatever needs no preflight."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and _is_of_another_site(HTTPConnection(scope)):
            response = PlainTextResponse("Another site cannot use this page.", status_code=403)
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _is_of_another_site(request: HTTPConnection) -> bool:
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    if site == "same-origin":  # which no script can say; a proxy may have changed the host
        return False
    if site == "cross-site" and request.scope.get("method") not in ("GET", "HEAD"):
        return True
    return origin is not None and origin.partition("://")[2].lower() != request.headers.get("host", "").lower()

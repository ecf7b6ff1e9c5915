"""What the live page's server lets in."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .readings import max_characters


def launch_settings(host: str | None = None, share: bool = False, max_tokens: int | None = None) -> dict[str, Any]:
    """
    How `Blocks.launch` is to serve a page.

    Args:
        host (`str`, *optional*):
            The address that it listens on. Unless these are all of the machine's, requests that name another host are
            refused: a site in the reader's browser has then made its own name lead here (DNS rebinding), to ask for
            what is none of its business. By default any name will do, and Gradio's environment variables say where.
        share (`bool`, *optional*, defaults to `False`):
            Whether Gradio makes a public link to it.
        max_tokens (`int`, *optional*):
            As for [`Readings`].
    """
    middleware = [Middleware(_BoundedRequests, max_bytes=2**16 + 12 * max_characters(max_tokens))]
    if host is not None and ":" in host:
        host = f"[{host.strip('[]')}]"  # as addresses of IPv6 stand in a URL
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

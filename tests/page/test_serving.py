"""Where the live page is served, and what its server lets in: names of its own, and requests of some size."""

import asyncio
import json
import socket
from collections.abc import Callable

import pytest


pytest.importorskip("starlette", reason="gradio, which brings it, is not installed")

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from localist_hf.page import serving
from localist_hf.page.reading_server import CHARACTERS_PER_TOKEN, MAX_TOKENS
from localist_hf.page.serving import launch_settings, port_to_serve_on


async def length(request: Request) -> JSONResponse:
    return JSONResponse(len(await request.body()))


def client(*settings: object) -> TestClient:
    middleware = launch_settings(*settings)["app_kwargs"]["middleware"]
    return TestClient(Starlette(routes=[Route("/", length, methods=["GET", "POST"])], middleware=middleware))


LOOPBACK = ["localhost:7860", "127.0.0.1:7860", "[::1]:7860", "LOCALHOST"]


@pytest.mark.parametrize(
    ("settings", "named", "strange"),
    [
        (
            ["127.0.0.1"],
            LOOPBACK,
            ["a.example", "127.0.0.1.nip.io:7860", "x.gradio.live", "my-machine", "10.0.0.2", ""],
        ),
        (["::1"], LOOPBACK, ["a.example"]),
        (["[fe80::1]"], [*LOOPBACK, "[fe80::1]:7860"], ["a.example", "[fe80::2]"]),
        (["my-machine"], [*LOOPBACK, "my-machine", "My-Machine:80"], ["a.example", "10.0.0.2"]),
        (["10.0.0.2"], [*LOOPBACK, "10.0.0.2:7860"], ["a.example", "my-machine"]),
        (["127.0.0.1", True], [*LOOPBACK, "0a1b.gradio.live"], ["a.example", "gradio.live.example"]),
        (["0.0.0.0"], [*LOOPBACK, "a.example"], []),
        (["::"], [*LOOPBACK, "a.example"], []),
        ([], ["user-space.hf.space", "a.example"], []),
    ],
)
def test_a_page_is_reached_by_its_own_names(settings: list, named: list[str], strange: list[str]) -> None:
    page = client(*settings)
    assert [page.get("/", headers={"Host": name}).status_code for name in named] == [200] * len(named)
    assert [page.get("/", headers={"Host": name}).status_code for name in strange] == [400] * len(strange)


@pytest.mark.parametrize("settings", [["127.0.0.1"], ["127.0.0.1", True], ["0.0.0.0"], ["::1"]])
def test_another_site_cannot_ask_through_its_readers_browser(settings: list) -> None:
    page, host = client(*settings), {"Host": "localhost:7860"}
    for headers, get, post in (
        ({}, 200, 200),  # no browser
        ({"Origin": "http://localhost:7860", "Sec-Fetch-Site": "same-origin"}, 200, 200),
        ({"Origin": "http://LOCALHOST:7860"}, 200, 200),
        ({"Sec-Fetch-Site": "none"}, 200, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 200, 403),  # a link that leads here
        ({"Origin": "https://a.example"}, 403, 403),
        ({"Origin": "https://a.example", "Sec-Fetch-Site": "cross-site"}, 403, 403),
        ({"Origin": "http://localhost:3000", "Sec-Fetch-Site": "same-site"}, 403, 403),
        ({"Origin": "http://localhost:7860.a.example"}, 403, 403),
        ({"Origin": "http://[localhost:7860"}, 403, 403),
        ({"Origin": "null"}, 403, 403),
    ):
        assert page.get("/", headers=host | headers).status_code == get, headers
        content = page.post("/", headers={**host, **headers, "Content-Type": "text/plain"}, content="{}")
        assert content.status_code == post, headers


def test_a_page_of_any_name_may_be_asked_by_any_site() -> None:
    assert client().post("/", headers={"Origin": "https://a.example"}).status_code == 200  # as Spaces are


def test_an_address_of_ipv6_stands_in_brackets() -> None:
    assert [launch_settings(host)["server_name"] for host in ("::1", "[::1]", "127.0.0.1", None)] == [
        "[::1]", "[::1]", "127.0.0.1", None,
    ]  # fmt: skip


@pytest.mark.parametrize("max_tokens", [None, 10])
def test_large_requests_are_refused(max_tokens: int | None) -> None:
    page = client("127.0.0.1", False, max_tokens)
    text = "\x01" * 2 * CHARACTERS_PER_TOKEN * (max_tokens or MAX_TOKENS)  # the largest that a page sends
    body = json.dumps({"text": text}).encode()
    for content, status in (
        (body, 200),
        (body + bytes(2**16), 413),
        (iter([body, bytes(2**16)]), 413),
        (iter([body]), 200),
    ):
        assert page.post("http://localhost/", content=content).status_code == status
    assert launch_settings()["max_file_size"] == 0


def test_what_is_refused_is_not_read_to_its_end() -> None:
    middleware = launch_settings(None, False, 10)["app_kwargs"]["middleware"][0]
    num_read = 0

    async def endless() -> dict[str, object]:
        nonlocal num_read
        num_read += 1
        return {"type": "http.request", "body": bytes(2**16), "more_body": True}

    async def patient(scope: dict, receive: Callable, send: Callable) -> None:
        while (await receive())["more_body"]:
            pass

    with pytest.raises(HTTPException, match="A request has 67456 bytes at most"):
        asyncio.run(middleware.cls(patient, **middleware.kwargs)({"type": "http"}, endless, endless))
    assert num_read == 2


# --- where it can be served


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("192.0.2.1", "Cannot assign requested address"),
        ("224.0.0.1", ""),
        ("999.1.1.1", ""),
        ("nope.invalid", ""),
        ("a..b", "no name is so long, or has such parts"),
        ("a" * 64, "no name is so long, or has such parts"),
    ],
)
def test_an_address_of_others_is_refused(host: str, reason: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^`host` is '{host}'; it must be an address of this machine \({reason}.*\)\.$"
    ):
        port_to_serve_on(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0", "[::1]"])
def test_a_port_that_is_taken_is_refused_or_passed_over(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if host == "[::1]" and not socket.has_dualstack_ipv6():
        pytest.skip("there is no IPv6")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ValueError, match=rf"^`port` is {port}; it must be one that is free \(Address already in use\)"
        ):
            port_to_serve_on(host, port)
        monkeypatch.setattr(serving, "_FIRST_PORT", port)
        assert port < port_to_serve_on(host) < port + 100
        monkeypatch.setattr(serving, "_NUM_PORTS", 1)
        with pytest.raises(ValueError, match=f"^`port` is not given, and none from {port} to {port} is free"):
            port_to_serve_on(host)
    assert port_to_serve_on(host, port) == port

"""Who may ask the page: hosts, origins, methods, the password; and the headers of every answer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from engine.page import security
from engine.page.security import HEADERS, Guard, Password, is_own_host, own_names


async def _app(scope: dict[str, Any], receive: object, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"in"})


def ask(guard: Guard, method: str = "GET", path: str = "/api/status", **headers: str) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer; ``sec_fetch_site`` stands for ``sec-fetch-site``."""
    given = {"host": "127.0.0.1:8350"} | {name.replace("_", "-"): value for name, value in headers.items()}
    encoded = [(name.encode(), value.encode()) for name, value in given.items()]
    sent: list[dict[str, Any]] = []
    scope = {"type": "http", "scheme": "http", "method": method, "path": path, "headers": encoded, "query_string": b""}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(guard(scope, None, send))
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}


@pytest.fixture
def guard() -> Guard:
    return Guard(_app, frozenset({"ct-box"}), None)


@pytest.mark.parametrize("host", ["localhost:1", "127.0.0.1", "[::1]:8350", "192.168.1.7:8350", "CT-box.", "ct-box:80"])
def test_addresses_and_own_names_are_hosts(guard: Guard, host: str) -> None:
    assert ask(guard, host=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8350", "127.0.0.1.evil.example", "localhost.evil.example", "127.0.0.1@evil.example",
     "", "[::1", "127.0.0.1:80:80", "localhost:x", "2130706433"],
)  # fmt: skip
def test_another_name_is_refused_so_that_no_dns_rebinding_works(guard: Guard, host: str) -> None:
    assert ask(guard, host=host)[0] == 421


def test_two_host_headers_are_refused(guard: Guard) -> None:
    scope = {"type": "http", "scheme": "http", "method": "GET", "path": "/", "query_string": b""}
    scope["headers"] = [(b"host", b"localhost"), (b"host", b"evil.example")]
    assert guard.refusal(scope).status_code == 421


def test_a_loopback_page_has_no_name_in_the_network() -> None:
    assert own_names("127.0.0.1") == own_names("localhost") == frozenset()
    assert "0.0.0.0" in own_names("0.0.0.0") and not is_own_host("evil.example", own_names("0.0.0.0"))


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("POST", {"x_report_page": "1", "origin": "http://127.0.0.1:8350"}, 200),
        ("POST", {"x_report_page": "1"}, 200),  # a program, no browser
        ("POST", {}, 403),  # a form of another site cannot set the header
        ("DELETE", {}, 403),
        ("PUT", {"x_report_page": "0"}, 403),
        ("POST", {"x_report_page": "1", "origin": "http://evil.example"}, 403),
        ("POST", {"x_report_page": "1", "origin": "https://127.0.0.1:8350"}, 403),
        ("POST", {"x_report_page": "1", "origin": "http://127.0.0.1:9999"}, 403),
        ("POST", {"x_report_page": "1", "origin": "null"}, 403),
        ("GET", {"sec_fetch_site": "cross-site"}, 403),  # an image or a script of another site
        ("GET", {"sec_fetch_site": "same-site"}, 403),  # another port of this machine
        ("GET", {"sec_fetch_site": "same-origin"}, 200),
        ("GET", {"sec_fetch_site": "none"}, 200),
    ],
)
def test_requests_of_another_site_are_refused(guard: Guard, method: str, headers: dict[str, str], status: int) -> None:
    assert ask(guard, method, **headers)[0] == status


def test_a_link_to_the_page_may_be_followed(guard: Guard) -> None:
    given = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}
    assert ask(guard, path="/", **given)[0] == 200 and ask(guard, path="/api/status", **given)[0] == 403


def test_every_answer_has_the_policy_also_a_refusal(guard: Guard) -> None:
    for host in ("localhost", "evil.example"):
        headers = ask(guard, host=host)[1]
        assert HEADERS.items() <= headers.items()
    policy = HEADERS["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy and "http" not in policy


def test_the_password_opens_the_page() -> None:
    password = Password("geheim 密码")
    guard = Guard(_app, frozenset(), password)
    assert ask(guard)[0] == 401 and ask(guard, path="/")[1]["location"] == "/login"
    assert ask(guard, path="/login")[0] == 200 and ask(guard, path="/static/page.js")[0] == 401
    assert password.try_to_enter("geheim") is None and password.try_to_enter("") is None
    session = password.try_to_enter("geheim 密码")
    assert ask(guard, cookie=f"a=b; {security.COOKIE}={session}")[0] == 200
    for wrong in ("", "x", session[:-1], f"{session}x"):
        assert ask(guard, cookie=f"{security.COOKIE}={wrong}")[0] == 401
    assert ask(guard, cookie="=;;\x01")[0] == 401


def test_guessing_is_slowed_down(monkeypatch: pytest.MonkeyPatch) -> None:
    password = Password("a")
    monkeypatch.setattr(password, "_of", lambda given: given.encode())  # the real digest is slow on purpose
    monkeypatch.setattr(password, "_digest", b"a")
    for _ in range(security.TRIES):
        password.try_to_enter("b")
    with pytest.raises(PermissionError):
        password.try_to_enter("a")
    now = security.time.monotonic()
    monkeypatch.setattr(security.time, "monotonic", lambda: now + security.PER_SECONDS + 1)
    assert password.try_to_enter("a")

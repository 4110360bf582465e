"""Who may ask the page for what: the checks that stand before every route.

    Host      an IP address, localhost, or a name of this machine: no DNS rebinding
    Origin    that of the page itself, and a header that another site cannot send: no cross-site request
    password  a session cookie, with --password

Every answer carries a Content-Security-Policy that allows the page's own files and nothing else.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
import socket
import time
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MARK = "x-report-page"  # header of every request that changes something; another site may not send it
COOKIE = "report_page"
SAFE_METHODS = ("GET", "HEAD")
OPEN_PATHS = (
    "/login",
    "/api/login",
    "/static/look.css",
    "/static/page.css",
    "/static/login.js",
    "/static/words.js",
    "/static/icon.svg",
)
TRIES, PER_SECONDS = 10, 60.0  # wrong passwords
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self' data: blob:; font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-store",
}


class Password:
    """The password, as a digest, and who has given it."""

    def __init__(self, password: str) -> None:
        self._salt = secrets.token_bytes(16)
        self._digest = self._of(password)
        self._sessions: set[str] = set()
        self._wrong: list[float] = []

    def _of(self, password: str) -> bytes:
        return hashlib.scrypt(password.encode(), salt=self._salt, n=2**14, r=8, p=1)

    def try_to_enter(self, password: str) -> str | None:
        """The cookie of a new session; None for a wrong password. Raises PermissionError after too many of them."""
        now = time.monotonic()
        self._wrong = [when for when in self._wrong if now - when < PER_SECONDS]
        if len(self._wrong) >= TRIES:
            raise PermissionError
        if not hmac.compare_digest(self._of(password), self._digest):
            self._wrong.append(now)
            return None
        session = secrets.token_urlsafe(32)
        self._sessions.add(session)
        return session

    def knows(self, headers: Headers) -> bool:
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        given = cookie.value.encode() if cookie else b""  # as bytes: of text only ASCII can be compared
        return any(hmac.compare_digest(given, one.encode()) for one in self._sessions)


class Guard:
    """ASGI middleware; see the module's docstring."""

    def __init__(self, app: ASGIApp, names: frozenset[str], password: Password | None) -> None:
        """``names``: host names under which the page may be asked, apart from IP addresses and localhost."""
        self.app, self.names, self.password = app, names, password

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # there is no WebSocket here
            await send({"type": "websocket.close", "code": 1008})
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        refusal = self.refusal(scope)
        await (refusal or self.app)(scope, receive, send_guarded)

    def refusal(self, scope: Scope) -> Response | None:
        """The answer to a request that may not pass."""
        headers, method, path = Headers(scope=scope), scope["method"], scope["path"]
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not is_own_host(hosts[0], self.names):
            return refuse(421, "this page does not answer to that host name")
        origin = headers.get("origin")
        if origin is not None and origin != f"{scope['scheme']}://{hosts[0]}":
            return refuse(403, "requests of another site are refused")
        site = headers.get("sec-fetch-site", "same-origin")
        follows_link = method == "GET" and path == "/" and headers.get("sec-fetch-mode") == "navigate"
        if site not in ("same-origin", "none") and not follows_link:
            return refuse(403, "requests of another site are refused")
        if method not in SAFE_METHODS and headers.get(MARK) != "1":
            return refuse(403, f"the header {MARK} is missing: requests of another site are refused")
        if self.password and path not in OPEN_PATHS and not self.password.knows(headers):
            return RedirectResponse("/login") if path == "/" else refuse(401, "the password is needed: log in first")
        return None


def refuse(status: int, line: str) -> JSONResponse:
    """An error as the page shows it: one line."""
    return JSONResponse({"error": line}, status)


def is_own_host(host: str, names: frozenset[str]) -> bool:
    """Whether a Host header names this machine. An attacker's name that resolves to it does not, an address does."""
    if host.startswith("["):
        name, bracket, port = host[1:].partition("]")
        port = port.removeprefix(":")
        if not bracket:
            return False
    else:
        name, _, port = host.partition(":")
    if port and not (port.isascii() and port.isdecimal()):
        return False
    if name.lower().rstrip(".") in {"localhost", *names}:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def own_names(host: str) -> frozenset[str]:
    """Names of this machine in its network, for a page that others may open; none for a loopback page."""
    if is_loopback(host):
        return frozenset()
    return frozenset(name.lower() for name in (host, socket.gethostname(), socket.getfqdn()))


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"

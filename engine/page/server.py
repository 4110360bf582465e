"""The page's server: routes, the stream of events, and its start. What it knows of a case are the case's events.

GET    /api/status                              the model, the cases of the table, limits
POST   /api/cases                               a new case; then one PUT per file
PUT    /api/cases/ID/files                      one file, as the body; its name in the header x-file-name
POST   /api/cases/ID/read | write | ask | map | dicom   a job for the reading process
GET    /api/cases/ID/events                     what happened so far and from then on (server-sent events)
GET    /api/cases/ID/slices/LAYER/AXIS/NUMBER   one plane, int16 HU or uint8
GET    /api/cases/ID/volumes/LAYER.nii          a layer as NIfTI
POST   /api/cases/ID/export/FORMAT              a version of the report as a file
GET    /api/cases/ID/dicom.zip                  the DICOM objects
DELETE /api/cases/ID
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from config.errors import InputError
from data.imaging.nifti import nifti_image
from data.report_language.key_point_words import WORDS
from engine.page.desk import Busy, Case, Desk
from engine.page.exports import FORMATS, export
from engine.page.niivue import niivue_module
from engine.page.security import COOKIE, Guard, Password, is_loopback, own_names, refuse
from engine.page.uploads import TooLarge, shown_name

STATIC = Path(__file__).with_name("static")
MOST_JSON = 256 << 10  # bytes of a body that is no file
MOST_QUESTION, MOST_TEXT, MOST_FINDINGS = 2000, 100_000, 30
MOST_CONNECTIONS = 128
HEARTBEAT_S = 15.0
_LAYER = re.compile(r"ct|lesions|map-\d{1,3}-\d{1,3}")
_AXES = {"axial": 0, "coronal": 1, "sagittal": 2}


class Page:
    """The routes around a desk."""

    def __init__(self, desk: Desk, password: Password | None, demo: bool) -> None:
        self.desk, self.password, self.demo = desk, password, demo

    def app(self, names: frozenset[str]) -> Starlette:
        case = "/api/cases/{case}"
        routes = [
            Route("/", self.index),
            Route("/login", self.login_page),
            Route("/api/login", self.login, methods=["POST"]),
            Route("/api/status", self.status),
            Route("/api/cases", self.new_case, methods=["POST"]),
            Route(case, self.remove, methods=["DELETE"]),
            Route(f"{case}/files", self.receive, methods=["PUT"]),
            Route(f"{case}/read", self.read, methods=["POST"]),
            Route(f"{case}/write", self.write, methods=["POST"]),
            Route(f"{case}/ask", self.ask, methods=["POST"]),
            Route(f"{case}/map", self.map, methods=["POST"]),
            Route(f"{case}/dicom", self.dicom, methods=["POST"]),
            Route(f"{case}/dicom.zip", self.dicom_file),
            Route(f"{case}/events", self.events),
            Route(f"{case}/slices/{{layer}}/{{axis}}/{{number:int}}", self.plane),
            Route(f"{case}/volumes/{{layer}}.nii", self.volume),
            Route(f"{case}/export/{{kind}}", self.export, methods=["POST"]),
            Route("/niivue.js", self.niivue),
            Mount("/static", StaticFiles(directory=STATIC)),
        ]
        handlers = {InputError: _bad_input, HTTPException: _http_error, Exception: _defect}

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            self.desk.start()
            tidy = asyncio.create_task(self._tidy())
            yield
            tidy.cancel()
            await run_in_threadpool(self.desk.close)

        guard = Middleware(Guard, names=names, password=self.password)
        return Starlette(routes=routes, middleware=[guard], exception_handlers=handlers, lifespan=lifespan)

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(60)
            self.desk.remove_idle()

    # ------------------------------------------------------------------ pages

    async def index(self, _: Request) -> Response:
        return FileResponse(STATIC / "index.html")

    async def login_page(self, _: Request) -> Response:
        return FileResponse(STATIC / "login.html") if self.password else RedirectResponse("/")

    async def login(self, request: Request) -> Response:
        given = str((await _json(request)).get("password", ""))[:1000]
        if self.password is None:
            return JSONResponse({})
        try:
            session = await run_in_threadpool(self.password.try_to_enter, given)
        except PermissionError:
            return refuse(429, "too many wrong passwords: wait a minute")
        if session is None:
            return refuse(401, "wrong password")
        response = JSONResponse({})
        response.set_cookie(COOKIE, session, httponly=True, samesite="strict")
        return response

    async def niivue(self, _: Request) -> Response:
        module = await run_in_threadpool(niivue_module)
        if module is None:
            return refuse(404, "NiiVue is not installed: pip install ipyniivue")
        return Response(module, media_type="text/javascript", headers={"cache-control": "private, max-age=86400"})

    async def status(self, _: Request) -> Response:
        names = {language: words.names for language, words in WORDS.items()}
        return JSONResponse(
            {
                "model": self.desk.ready,
                "failure": self.desk.failure,
                "demo": self.demo,
                "most_bytes": self.desk.most_bytes,
                "names": names,
                "niivue": await run_in_threadpool(niivue_module) is not None,
                "formats": list(FORMATS),
            }
        )

    # ------------------------------------------------------------------ cases

    def _case(self, request: Request) -> Case:
        case = self.desk.cases.get(request.path_params["case"])
        if case is None:
            raise HTTPException(404, "this scan is no longer kept: load it again")
        case.used = time.monotonic()
        return case

    async def new_case(self, _: Request) -> Response:
        return JSONResponse({"case": self.desk.new_case().id}, 201)

    async def remove(self, request: Request) -> Response:
        self.desk.remove(self._case(request))
        return JSONResponse({})

    async def receive(self, request: Request) -> Response:
        case = self._case(request)
        if case.events or case.waiting:
            raise InputError("this scan was read already: load another one as a new case")
        name = unquote(request.headers.get("x-file-name", ""))[:1000]
        length = request.headers.get("content-length", "")
        try:
            await case.upload.receive(name, int(length) if length.isdecimal() else None, request.stream())
        except ClientDisconnect:  # nobody reads the answer
            return refuse(400, "the connection was lost")
        return JSONResponse({"files": len(case.upload.names), "bytes": case.upload.bytes})

    async def read(self, request: Request) -> Response:
        case, given = self._case(request), await _json(request)
        if case.events or case.waiting:
            raise InputError("this scan was read already")
        sample, names = given.get("sample"), case.upload.names
        seed = secrets.randbelow(2**31)
        if sample == "phantom":
            case.name = f"phantom {seed}"
        elif sample is None:
            first = next(iter(names.values()), "nothing")
            case.name = shown_name(str(given.get("name") or first))
        else:
            samples = (self.desk.ready or {}).get("samples", [])
            if not isinstance(sample, int) or not 0 <= sample < len(samples):
                raise InputError("no such case in the validation table")
            case.name = samples[sample]
        flags = {name: bool(given.get(name)) for name in ("force", "accept_toy")}
        question = _text(given, "question", MOST_QUESTION)
        self.desk.submit(case, "read", sample=sample, seed=seed, names=dict(names), question=question, **flags)
        return JSONResponse({"name": case.name}, 202)

    async def write(self, request: Request) -> Response:
        case, given = self._case(request), await _json(request)
        findings = given.get("findings")
        if not isinstance(findings, list) or len(findings) > MOST_FINDINGS:
            raise InputError(f"expected a list of at most {MOST_FINDINGS} findings")
        if not all(isinstance(one, dict) for one in findings):
            raise InputError("expected findings with name, side, zone and size")
        keys = ("id", "finding", "side", "zone", "size_mm")
        self.desk.submit(case, "write", findings=[{key: one.get(key) for key in keys} for one in findings])
        return JSONResponse({}, 202)

    async def ask(self, request: Request) -> Response:
        case, given = self._case(request), await _json(request)
        question = _text(given, "question", MOST_QUESTION)
        if not question:
            raise InputError("expected a question")
        case.asked += 1
        self.desk.submit(case, "ask", question=question, number=case.asked)
        return JSONResponse({"number": case.asked}, 202)

    async def map(self, request: Request) -> Response:
        case, given = self._case(request), await _json(request)
        report, sentence = given.get("report"), given.get("sentence")
        if not all(isinstance(one, int) and 0 <= one < 1000 for one in (report, sentence)):
            raise InputError("expected the numbers of a report and a sentence")
        self.desk.submit(case, "map", report=report, sentence=sentence)
        return JSONResponse({}, 202)

    async def dicom(self, request: Request) -> Response:
        case, given = self._case(request), await _json(request)
        report, text = given.get("report"), _text(given, "text", MOST_TEXT)
        if not isinstance(report, int) or not text:
            raise InputError("expected the number of a report, and its text")
        self.desk.submit(case, "dicom", report=report, text=text)
        return JSONResponse({}, 202)

    async def dicom_file(self, request: Request) -> Response:
        path = self._case(request).folder / "dicom.zip"
        if not path.is_file():
            raise HTTPException(404, "no DICOM objects have been made of this report")
        return FileResponse(path, filename="report_dicom.zip")

    async def events(self, request: Request) -> Response:
        case = self._case(request)
        seen = request.headers.get("last-event-id") or request.query_params.get("after", "")
        start = int(seen) + 1 if seen.isascii() and seen.isdecimal() else 0

        async def stream() -> AsyncIterator[str]:
            number = start
            while True:
                changed = case.changed
                for event in case.events[number:]:
                    yield f"id: {number}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n"
                    number += 1
                    if event["kind"] == "gone":
                        return
                try:
                    await asyncio.wait_for(changed.wait(), HEARTBEAT_S)
                except TimeoutError:
                    case.used = time.monotonic()  # somebody looks at it
                    yield ": still here\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})

    def _layer(self, request: Request) -> tuple[Case, Path]:
        case, layer = self._case(request), request.path_params["layer"]
        path = case.folder / f"{layer}.npy"
        if not _LAYER.fullmatch(layer) or not path.is_file():
            raise HTTPException(404, "no such layer of this scan")
        return case, path

    async def plane(self, request: Request) -> Response:
        _, path = self._layer(request)
        axis, number = _AXES.get(request.path_params["axis"]), request.path_params["number"]

        def cut() -> bytes:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if axis is None or not 0 <= number < array.shape[axis]:
                raise HTTPException(404, "no such slice of this scan")
            return np.ascontiguousarray(np.take(array, number, axis=axis)).tobytes()

        keep = {"cache-control": "private, max-age=3600, immutable"}
        return Response(await run_in_threadpool(cut), media_type="application/octet-stream", headers=keep)

    async def volume(self, request: Request) -> Response:
        case, path = self._layer(request)
        affine = np.array(case.last("volume")["affine"])

        def encode() -> bytes:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            return nifti_image(array, affine).to_bytes()

        return Response(await run_in_threadpool(encode), media_type="application/octet-stream")

    async def export(self, request: Request) -> Response:
        case, given, kind = self._case(request), await _json(request), request.path_params["kind"]
        if kind not in FORMATS:
            raise HTTPException(404, f"no such format: expected one of {', '.join(FORMATS)}")
        report = given.get("report")
        events = [event for event in case.events if event.get("report", report) == report]
        if self.desk.ready is None or not any(event["kind"] == "report" for event in events):
            raise InputError("there is no such report")
        text, language = _text(given, "text", MOST_TEXT), "en" if given.get("language") == "en" else "zh"
        content = await run_in_threadpool(export, kind, text, events, self.desk.ready, language)
        name = f"{re.sub(r'[.]nii([.]gz)?$|[.][a-z]{2,5}$', '', case.name)}_report.{kind}"
        plain = re.sub(r"[^A-Za-z0-9._-]", "_", name)
        disposition = f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
        return Response(content, media_type=FORMATS[kind], headers={"content-disposition": disposition})


async def _json(request: Request) -> Mapping[str, Any]:
    """A small JSON object from the body. Raises InputError for anything else."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_JSON:
            raise TooLarge(f"more than {MOST_JSON >> 10} KB")
    try:
        given = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise InputError("expected a JSON object")
    return given


def _text(given: Mapping[str, Any], key: str, most: int) -> str:
    value = given.get(key) or ""
    if not isinstance(value, str) or len(value) > most:
        raise InputError(f"{key}: expected a text of at most {most} characters")
    return value.strip()


async def _bad_input(_: Request, error: Exception) -> Response:
    status = 413 if isinstance(error, TooLarge) else 503 if isinstance(error, Busy) else 400
    return refuse(status, " ".join(str(error).split()))


async def _http_error(_: Request, error: Exception) -> Response:
    return refuse(error.status_code, str(error.detail))


async def _defect(_: Request, error: Exception) -> Response:
    return refuse(500, f"the program failed at this ({type(error).__name__}); the next request works")


class _Server(uvicorn.Server):
    """Ends its streams when it is told to stop, and says where it listens."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._tell = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._tell()


def run(settings: Mapping[str, Any], serve: Callable[..., None], started: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C.

    Args:
        settings: ``host``, ``port``, ``password``, ``demo``, ``max_upload_mb``, and those of the reading process.
        serve: the reading process.
        started: told the page's address.

    Raises InputError: a host without a password, a port that is taken, or models that cannot be loaded.
    """
    host, port = settings["host"], settings["port"]
    if not is_loopback(host) and not settings["password"]:
        raise InputError(f"--host {host} opens the page to the network: give --password too, or leave --host out")
    listener = _listen(host, port)
    password = Password(settings["password"]) if settings["password"] else None
    server: _Server | None = None
    failures: list[str] = []

    def fail(line: str) -> None:
        failures.append(line)
        server.should_exit = True

    desk = Desk({key: value for key, value in settings.items() if key != "password"}, serve, fail)
    page = Page(desk, password, bool(settings["demo"]))
    config = uvicorn.Config(
        page.app(own_names(host)), log_level="warning", limit_concurrency=MOST_CONNECTIONS, timeout_keep_alive=20,
        timeout_graceful_shutdown=2, server_header=False, date_header=False, proxy_headers=False, lifespan="on",
    )  # fmt: skip
    name = socket.gethostname() if host in ("0.0.0.0", "::") else host  # a browser cannot open these two
    shown = f"[{name}]" if ":" in name else name
    server = _Server(config, lambda: started(f"http://{shown}:{listener.getsockname()[1]}"))
    try:
        server.run(sockets=[listener])
    finally:
        desk.close()
    if failures:
        raise InputError(failures[0])


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        if sys.platform != "win32":  # there it would let two programs share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        raise InputError(f"--host {host} --port {port} cannot be used ({error}): choose another --port") from error
    return listener

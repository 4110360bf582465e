"""The report page, started as a user starts it, on the shipped model: scans in, reports out, and every misuse answered.

The attack list is written to docs/page_attacks.md where UPDATE_DOCS is set, and compared with it otherwise. The browser
is Debian's chromium with its driver; screenshots go to the folder PAGE_SCREENSHOTS where that is set.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import docx
import nibabel as nib
import numpy as np
import psutil
import pydicom
import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from data.imaging.reader import read_volume
from tests.data.imaging.images import write_study
from tests.engine.page.running_page import BAD_INPUT, LONG_S, PHANTOM, REPOSITORY, Event, Page, abdomen, one, zipped

TABLE = REPOSITORY / "docs" / "page_attacks.md"
HOT_PIXELS = """
const canvas = document.querySelector(".plane canvas");
const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
let count = 0;
for (let k = 0; k < data.length; k += 4) count += data[k] - data[k + 2] > 40;
return count;
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    started = Page(tmp_path_factory.mktemp("page"))
    started.wait_until_ready()
    yield started
    if started.process.poll() is None:
        started.close()


@pytest.fixture(scope="module")
def read_case(page: Page) -> tuple[str, list[Event]]:
    """The sample's case, read once for the tests that only look at it."""
    case = page.read()
    return case, page.events(case)


# ------------------------------------------------------------------ what it is for


def test_a_scan_is_read_step_by_step_and_its_report_is_streamed(page: Page, read_case: tuple[str, list[Event]]) -> None:
    case, events = read_case
    done = [event["name"] for event in events if event["kind"] == "stage_done"]
    assert done == ["reading", "checks", "segmentation", "vision", "writing"]
    report = one(events, "report")
    assert "".join(event["text"] for event in events if event["kind"] == "text") == report["text"]
    assert not report["rewritten"] and not report["cut"]
    assert "右" in report["text"] and "空洞" in report["text"] and report["first_character"] < 2
    lesion = one(events, "findings")["findings"][0]
    assert (lesion["finding"], lesion["side"], lesion["zone"], lesion["on"]) == ("cavity", "right", "middle", True)
    assert any(sentence["place"] == lesion["place"] for sentence in report["sentences"])
    assert any(sentence["unsure"] for sentence in report["sentences"]) == ("【待核实】" in report["marked"])


def test_the_viewer_gets_the_scan_its_lesions_and_a_map_of_a_sentence(
    page: Page, read_case: tuple[str, list[Event]]
) -> None:
    case, events = read_case
    volume, lesion = one(events, "volume"), one(events, "findings")["findings"][0]
    hu, lesions = page.layer(case, "ct"), page.layer(case, "lesions")
    original = nib.as_closest_canonical(nib.load(PHANTOM))
    assert np.array_equal(hu, np.asarray(original.dataobj).transpose(2, 1, 0)[:, ::-1, ::-1])
    z, y, x = lesion["place"]
    assert lesions[z].any() and lesions.shape == hu.shape == tuple(volume["shape"])
    found = one(page.do(case, "map", report=0, sentence=0), "map")
    heat = page.layer(case, found["layer"])
    assert heat[tuple(found["peak"])] == heat.max() == 255 and found["peak"][0] == z
    for axis, number in (("axial", z), ("coronal", y), ("sagittal", x)):
        plane = page.ask("GET", f"/api/cases/{case}/slices/ct/{axis}/{number}")[1]
        wanted = np.take(hu, number, {"axial": 0, "coronal": 1, "sagittal": 2}[axis])
        assert np.array_equal(np.frombuffer(plane, np.int16).reshape(wanted.shape), wanted)


def test_a_corrected_finding_is_followed_by_the_report_and_by_the_answers(page: Page) -> None:
    case = page.read()
    [first, *_] = one(page.events(case), "findings")["findings"]
    moved = {**first, "finding": "effusion", "side": "left", "zone": None, "size_mm": 25}
    events = page.do(case, "write", findings=[moved])
    report, streamed = one(events, "report"), "".join(event["text"] for event in events if event["kind"] == "text")
    assert report["rewritten"] == (streamed != report["text"])
    assert "左侧胸腔积液25mm" in report["key_points"] and "积液" in report["text"] and "空洞" not in report["text"]
    assert all(sentence["place"] is None for sentence in report["sentences"]), "the lesion was moved away"
    assert "未见病灶" in one(page.do(case, "write", findings=[]), "report")["key_points"]
    answer = one(page.do(case, "ask", question="左侧有胸腔积液吗？"), "answer")
    assert answer["text"]
    wrong = page.do(case, "write", findings=[{"finding": "dragon", "side": None, "zone": None, "size_mm": None}])
    assert one(wrong, "error")["line"] == "'dragon' is no known finding"


def test_a_report_is_taken_along_as_text_word_and_json(page: Page, read_case: tuple[str, list[Event]]) -> None:
    case, events = read_case
    given = {"text": "所见：右肺空洞。\n<script>alert(1)</script>\x07", "report": 0, "language": "zh"}
    status, text, headers = page.ask("POST", f"/api/cases/{case}/export/txt", given)
    assert status == 200 and "右肺空洞" in text.decode("utf-8-sig") and "不是诊断" in text.decode("utf-8-sig")
    assert headers["content-disposition"].startswith("attachment") and "val_0000_report.txt" in str(headers)
    document = docx.Document(io.BytesIO(page.ask("POST", f"/api/cases/{case}/export/docx", given)[1]))
    words = [paragraph.text for paragraph in document.paragraphs]
    assert "所见：右肺空洞。" in words and "<script>alert(1)</script>" in words
    record = json.loads(page.ask("POST", f"/api/cases/{case}/export/json", given)[1])
    assert record["generated"] == one(events, "report")["text"] and record["edited"]
    assert record["input"]["digest"] == one(events, "volume")["digest"] and record["seconds"]["vision"] > 0
    assert page.ask("POST", f"/api/cases/{case}/export/json", {**given, "report": 9})[0] == 400


def test_each_version_is_exported_with_its_own_findings(page: Page) -> None:
    case = page.read()
    first = one(page.events(case), "report")
    second = one(page.do(case, "write", findings=[]), "report")
    assert first["key_points"] != second["key_points"]
    for number, report in enumerate((first, second)):
        given = {"text": report["text"], "report": number, "language": "zh"}
        record = json.loads(page.ask("POST", f"/api/cases/{case}/export/json", given)[1])
        assert record["generated"] == report["text"]
        assert record["findings_prompt"] == report["key_points"]


@pytest.mark.minutes
def test_eight_users_at_once_get_their_own_reports(page: Page, read_case: tuple[str, list[Event]]) -> None:
    """Every second scan is mirrored: the sides of its report are, too."""
    image = nib.load(PHANTOM)
    mirrored = nib.Nifti1Image(np.asarray(image.dataobj)[::-1].copy(), image.affine, image.header).to_bytes()
    contents = [PHANTOM.read_bytes(), mirrored]
    names = [f"user{k}.nii{'' if k % 2 else '.gz'}" for k in range(8)]
    with ThreadPoolExecutor(8) as users:
        cases = list(users.map(lambda k: page.read({names[k]: contents[k % 2]}, accept_toy=True), range(8)))
        every = list(users.map(page.events, cases))
    for k, events in enumerate(every):
        report = one(events, "report")
        assert one(events, "volume")["name"] == names[k] and not [e for e in events if e["kind"] == "error"]
        assert ("左" if k % 2 else "右") in report["key_points"] and report["text"] == one(every[k % 2], "report")[
            "text"
        ]
        seen = next(e["at"] for e in events if e["kind"] == "stage_done" and e["name"] == "vision")
        assert next(e["at"] for e in events if e["kind"] == "text") - seen < 2
    assert one(every[0], "report")["text"] == one(read_case[1], "report")["text"]


def test_a_new_synthetic_scan_needs_no_file(page: Page) -> None:
    events = page.events(page.read(sample="phantom"))
    assert one(events, "report")["text"] and one(events, "findings")["reference"].startswith("所见：")
    assert one(events, "volume")["name"].startswith("phantom ")


def test_the_demonstration_model_reads_a_scan_of_unknown_origin_only_when_told_to(page: Page) -> None:
    error = one(page.events(page.read({"a.nii.gz": PHANTOM.read_bytes()})), "error")
    assert error["confirm"] == "accept_toy" and "a.nii.gz" in error["line"]
    assert str(page.temporary) not in error["line"] and str(REPOSITORY) not in error["line"], error["line"]


def test_a_dicom_scan_gets_its_report_in_its_own_study(page: Page, tmp_path: Path) -> None:
    files = write_study(tmp_path / "study", read_volume(PHANTOM))
    archive = zipped({f"a/b/{file.name}": file.read_bytes() for file in files})
    case = page.read({"study.zip": archive}, accept_toy=True)
    events = page.events(case)
    assert one(events, "volume")["dicom"] and "空洞" in one(events, "report")["text"]
    assert page.ask("GET", f"/api/cases/{case}/dicom.zip")[0] == 404
    page.do(case, "dicom", report=0, text="所见：右肺空洞，已核对。")
    made = zipfile.ZipFile(io.BytesIO(page.ask("GET", f"/api/cases/{case}/dicom.zip")[1]))
    objects = [pydicom.dcmread(io.BytesIO(made.read(name))) for name in made.namelist()]
    assert [one.Modality for one in objects] == ["SR", "SR", "SEG"]
    first = pydicom.dcmread(files[0], stop_before_pixels=True)
    assert {one.StudyInstanceUID for one in objects} == {first.StudyInstanceUID}
    assert objects[0].VerificationFlag == "UNVERIFIED" and "已核对" in str(objects[0])


def test_a_scan_of_another_format_belongs_to_no_study(page: Page, read_case: tuple[str, list[Event]]) -> None:
    case, events = read_case
    assert not one(events, "volume")["dicom"]
    assert "only for a scan that came as DICOM" in one(page.do(case, "dicom", report=0, text="x"), "error")["line"]


# ------------------------------------------------------------------ bad input


def test_whatever_is_no_chest_ct_ends_in_one_line_and_the_next_scan_works(page: Page) -> None:
    cases = {name: page.read(make(), accept_toy=True) for name, (make, _) in list(BAD_INPUT.items())[:6]}
    cases |= {name: page.read(make(), accept_toy=True) for name, (make, _) in list(BAD_INPUT.items())[6:]}
    for name, case in cases.items():
        error = one(page.events(case), "error")
        line = error["line"]
        assert BAD_INPUT[name][1] in line, f"{name}: {line}"
        assert "\n" not in line and str(page.temporary) not in line and "Traceback" not in line, line
        assert "the program failed" not in line, f"{name}: {line}"
        page.ask("DELETE", f"/api/cases/{case}")
    assert one(page.events(page.read()), "report")["text"]


def test_a_scan_that_is_no_chest_is_read_all_the_same_where_a_person_says_so(page: Page) -> None:
    case = page.read({"abdomen.nii": abdomen()}, accept_toy=True)
    assert one(page.events(case), "error")["confirm"] == "force"
    forced = one(page.events(page.read({"abdomen.nii": abdomen()}, accept_toy=True, force=True)), "report")
    assert "【系统提示】影像未通过检查" in forced["notice"]


# ------------------------------------------------------------------ attacks


def raw(page: Page, request: str) -> str:
    """The status line that bytes on the socket get, or how the connection ends."""
    with socket.create_connection(("127.0.0.1", page.port), timeout=20) as connection:
        connection.sendall(request.replace("\n", "\r\n").encode())
        try:
            answer = connection.recv(4096)
        except OSError:
            return "closed"
    return answer.split(b"\r\n")[0].decode() if answer else "closed"


def attacks(page: Page, case: str) -> list[tuple[str, str, str]]:
    """Attack, what was sent, and what came of it."""
    port, found = page.port, []

    def add(what: str, sent: str, status: int, content: bytes = b"") -> None:
        line = json.loads(content)["error"] if content.startswith(b"{") and status >= 400 else ""
        found.append((what, sent, f"{status}{': ' if line else ''}{line}".replace(str(port), "PORT")))

    def tried(what: str, sent: str, *request: Any, **headers: str) -> None:
        add(what, sent, *page.ask(*request, **headers)[:2])

    status, api = f"127.0.0.1:{port}", "/api/cases"
    tried("DNS rebinding", "Host: evil.example", "GET", "/api/status", host=f"evil.example:{port}")
    tried("DNS rebinding", "Host: 127.0.0.1.evil.example", "GET", "/", host="127.0.0.1.evil.example")
    tried("cross-site request", "POST, Origin: http://evil.example", "POST", api, origin="http://evil.example")
    tried("cross-site request", "POST, Origin: null (a sandboxed frame)", "POST", api, origin="null")
    tried("cross-site request", "POST of another port", "POST", api, origin=f"http://127.0.0.1:{port + 1}")
    tried("cross-site form", "POST without the page's header", "POST", api, x_report_page="")
    tried(
        "cross-site image or script",
        "GET, Sec-Fetch-Site: cross-site",
        "GET",
        "/api/status",
        sec_fetch_site="cross-site",
    )
    preflight = page.ask("OPTIONS", api, origin=f"http://{status}", access_control_request_method="PUT")
    allowed = [name for name in preflight[2] if name.lower().startswith("access-control")]
    add("cross-origin preflight", "OPTIONS", preflight[0])
    assert not allowed
    upgrade = (
        "GET /api/status HTTP/1.1\nHost: localhost\nUpgrade: websocket\nConnection: Upgrade\n"
        "Sec-WebSocket-Version: 13\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\nOrigin: http://evil.example\n\n"
    )
    found.append(("WebSocket of another site", "Upgrade: websocket", raw(page, upgrade).removeprefix("HTTP/1.1 ")[:3]))

    for path in (
        "/static/../server.py",
        "/static/%2e%2e/server.py",
        "/static/..%2f..%2f..%2fREADME.md",
        "/static//etc/passwd",
    ):
        tried("path traversal", f"GET {path}", "GET", path)
    for layer in ("../upload/000000", "..%2fowner", "ct.npy", "/etc/passwd", "map-0-0/../ct"):
        tried("path traversal", f"GET …/slices/{layer}/axial/0", "GET", f"{api}/{case}/slices/{layer}/axial/0")
    tried("path traversal", "GET /api/cases/..%2f..%2fetc/events", "GET", f"{api}/..%2f..%2fetc/events")
    upload = page.new_case()
    tried(
        "path as a file name",
        "PUT, X-File-Name: ../../../../tmp/evil.nii",
        "PUT",
        f"{api}/{upload}/files",
        b"x",
        x_file_name="../../../../tmp/evil.nii",
    )
    tried(
        "path as a file name",
        "PUT, X-File-Name: %2e%2e%2f%00evil.nii",
        "PUT",
        f"{api}/{upload}/files",
        b"x",
        x_file_name="%2e%2e%2f%00evil.nii",
    )
    outside = [path for path in page.temporary.rglob("*evil*")]
    assert not outside, outside

    tried(
        "another user's case",
        "GET /api/cases/AAAAAAAAAAAAAAAAAAAAAA/events",
        "GET",
        f"{api}/AAAAAAAAAAAAAAAAAAAAAA/events",
    )
    request = f"PUT {api}/{upload}/files HTTP/1.1\nHost: localhost\nX-Report-Page: 1\nContent-Length: 3221225472\n\n"
    found.append(("too large a file", "PUT, Content-Length: 3 GB", raw(page, request).removeprefix("HTTP/1.1 ")[:3]))
    tried("too large a body", "POST of 1 MB JSON", "POST", f"{api}/{case}/ask", b"[" * (1 << 20))
    tried("no JSON", "POST of 100,000 brackets", "POST", f"{api}/{case}/ask", b"[" * 100_000)
    tried("no JSON object", "POST of [1]", "POST", f"{api}/{case}/ask", b"[1]")
    tried("too long a question", "POST of 5,000 characters", "POST", f"{api}/{case}/ask", {"question": "x" * 5000})
    tried("too many findings", "POST of 31 findings", "POST", f"{api}/{case}/write", {"findings": [{}] * 31})
    tried("wrong types", "findings: 7", "POST", f"{api}/{case}/write", {"findings": 7})
    tried("wrong types", "sentence: -1", "POST", f"{api}/{case}/map", {"report": 0, "sentence": -1})
    tried("wrong types", "sentence: 'x'", "POST", f"{api}/{case}/map", {"report": 0, "sentence": "x"})
    tried("slice outside of the scan", "GET …/axial/99999", "GET", f"{api}/{case}/slices/ct/axial/99999")
    tried("unknown format", "POST …/export/exe", "POST", f"{api}/{case}/export/exe", {})
    tried("unknown method", "TRACE /", "TRACE", "/")
    found.append(
        (
            "broken request",
            "bytes that are no HTTP",
            raw(page, "\x16\x03\x01 no HTTP\n\n").removeprefix("HTTP/1.1 ")[:3],
        )
    )
    smuggled = (
        f"POST {api} HTTP/1.1\nHost: localhost\nContent-Length: 4\nTransfer-Encoding: chunked\n\n0\n\nGET / HTTP/1.1\n"
    )
    found.append(
        (
            "request smuggling",
            "Content-Length beside Transfer-Encoding",
            raw(page, smuggled).removeprefix("HTTP/1.1 ")[:3],
        )
    )
    found.append(
        (
            "huge header",
            "a header of 1 MB",
            raw(page, f"GET / HTTP/1.1\nHost: localhost\nX: {'x' * (1 << 20)}\n\n").removeprefix("HTTP/1.1 ")[:3],
        )
    )
    found.append(
        (
            "two Host headers",
            "Host twice",
            raw(page, "GET / HTTP/1.1\nHost: localhost\nHost: evil.example\n\n").removeprefix("HTTP/1.1 ")[:3],
        )
    )
    for name, (make, _) in BAD_INPUT.items():
        if "header of" in name or "names another file" in name or "two patients" in name:
            line = one(page.events(page.read(make(), accept_toy=True)), "error")["line"]
            found.append((name, "upload", line))
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.nii", b"\0" * (200 << 20))
    line = one(page.events(page.read({"bomb.zip": bomb.getvalue()}, accept_toy=True)), "error")["line"]
    found.append(("zip bomb", "200 MB in a zip of 0.2 MB", line))
    script = "<img src=x onerror=alert(1)>.nii"
    line = one(page.events(page.read({script: b"x"}, accept_toy=True)), "error")["line"]
    found.append(("script in a file name", script, line))
    return found


def test_the_attack_list_is_answered_as_the_documentation_says(page: Page, read_case: tuple[str, list[Event]]) -> None:
    rows = attacks(page, read_case[0])
    escaped = [[cell.replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in rows]
    lines = ["| attack | sent | answer |", "| --- | --- | --- |", *(f"| {' | '.join(row)} |" for row in escaped)]
    table = "\n".join(lines) + "\n"
    if os.environ.get("UPDATE_DOCS"):
        head = TABLE.read_text(encoding="utf-8").split("| attack |")[0]
        TABLE.write_text(head + table, encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8").endswith(table)
    for what, sent, answer in rows:
        harmless = answer == "200" and what == "path as a file name"  # kept under a number
        assert harmless or not answer.startswith(("2", "5")), (what, sent, answer)
    assert one(page.events(page.read()), "report")["text"]


def test_the_queue_is_bounded(page: Page) -> None:
    case = page.read()
    page.events(case)
    answers = [page.ask("POST", f"/api/cases/{case}/ask", {"question": "?"}) for _ in range(8)]
    refused = [json.loads(content)["error"] for status, content, _ in answers if status == 503]
    assert refused and all("try again in a minute" in line for line in refused)
    deadline = time.monotonic() + LONG_S
    while len([e for e in page.events(case, of=None) if e["kind"] == "answer"]) < len(answers) - len(refused):
        assert time.monotonic() < deadline
    assert one(page.do(case, "ask", question="?"), "answer")["number"] == len(answers) + 1


# ------------------------------------------------------------------ in a browser


class Browser:
    """Chromium on the page."""

    def __init__(
        self, address: str, folder: Path, *, width: int, height: int, gl: bool, dark: bool, phone: bool
    ) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium")
        flags = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={width},{height}"]
        flags += ["--enable-unsafe-swiftshader"] if gl else ["--disable-gpu", "--disable-3d-apis"]
        for flag in flags:
            options.add_argument(flag)
        options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        self.folder = folder
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        if phone:
            screen = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
            self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        self.driver.get(address)

    def find(self, css: str) -> WebElement:
        """The first element that can be seen; waited for."""
        return self.wait(lambda: next((e for e in self.all(css) if e.is_displayed()), None), css)

    def all(self, css: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def wait(self, condition: Callable[[], Any], what: object = "") -> Any:
        deadline = time.monotonic() + LONG_S
        while True:
            with suppress(StaleElementReferenceException):  # the page has just drawn it anew
                if found := condition():
                    return found
            if time.monotonic() > deadline:
                self.shot("failed")
                raise AssertionError(f"waited in vain for {what}; {self.all('body')[0].text[:2000]}")
            time.sleep(0.1)

    def text(self, css: str) -> str:
        return self.driver.execute_script(f"return document.querySelector({css!r})?.textContent ?? ''")

    def viewer(self, what: str) -> Any:
        return self.driver.execute_script(f"return document.getElementById('stage').viewer?.{what}")

    def choose(self, css: str, value: str) -> None:
        """An option of a list, as a person chooses it."""
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('change', {bubbles: true}))"
        self.driver.execute_script(script, self.find(css), value)

    def shot(self, name: str) -> None:
        folder = Path(os.environ.get("PAGE_SCREENSHOTS", self.folder))
        self.driver.save_screenshot(str(folder / f"{name}.png"))

    def complaints(self) -> list[str]:
        """Errors of the browser: a script that failed, or something that the policy refused."""
        logged = self.driver.get_log("browser")
        return [one["message"] for one in logged if one["level"] == "SEVERE" and "/api/" not in one["message"]]


@pytest.fixture
def browse(page: Page, tmp_path: Path) -> Iterator[Callable[..., Browser]]:
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("no browser: apt install chromium chromium-driver")
    opened: list[Browser] = []

    def start(**options: Any) -> Browser:
        given = {"width": 1360, "height": 900, "gl": False, "dark": False, "phone": False, **options}
        opened.append(Browser(page.address, tmp_path, **given))
        return opened[-1]

    yield start
    for browser in opened:
        browser.driver.quit()


@pytest.mark.minutes
def test_a_person_reads_a_scan_in_the_browser(browse: Callable[..., Browser], tmp_path: Path) -> None:
    """Wrong and too large files, upload, scrolling, window, a sentence and its map, a correction, a question, Word."""
    browser = browse(gl=True)
    browser.find("#samples button")
    browser.shot("start")
    (tmp_path / "note.txt").write_text("hello", encoding="utf-8")
    with (tmp_path / "large.nii").open("wb") as stream:
        stream.truncate(3 << 30)  # takes no room
    send = browser.all("#file-input")[0].send_keys
    send(str(tmp_path / "large.nii"))
    assert "3072" in browser.find("#alert p").text and "2048" in browser.find("#alert p").text
    send(str(tmp_path / "note.txt"))
    browser.wait(lambda: "note.txt" in browser.text("#alert p"))
    send(str(PHANTOM))
    refused = browser.find("#confirm") and browser.driver.current_url
    browser.find("#confirm").click()  # the model was made for synthetic scans
    browser.wait(lambda: browser.driver.current_url != refused, "a new case")
    browser.wait(lambda: browser.viewer("position"), "a viewer")
    browser.driver.refresh()  # in the middle
    browser.find(".sentence")
    assert "val_0000.nii.gz" in browser.text("#scan-name") and not browser.find("#stages").text.count("✕")
    browser.wait(lambda: browser.viewer("constructor.name") == "NiivueViewer", "NiiVue")
    browser.find(".sentence").click()
    browser.wait(lambda: browser.viewer("shown.heat?.name"), "the map")
    place = browser.viewer("position")
    assert place[0] == 19
    browser.shot("sentence_niivue")

    browser.choose("#viewer-kind", "slices")
    browser.wait(lambda: browser.viewer("constructor.name") == "SliceViewer", "the server's slices")
    assert browser.viewer("position") == place and browser.viewer("layers.heat") == "map-0-0"
    axial = browser.find(".plane canvas")
    ActionChains(browser.driver).scroll_from_origin(ScrollOrigin.from_element(axial), 0, -120).perform()
    browser.wait(lambda: browser.viewer("position")[0] == place[0] + 1, "the next slice")
    axial.send_keys(Keys.PAGE_UP)
    browser.wait(lambda: browser.viewer("position")[0] == place[0] + 11, "ten slices on by the keyboard")
    browser.find("[data-preset=mediastinum]").click()
    assert browser.viewer("window") == [-160, 240] and "L 40 · W 400" in browser.text("#window")
    browser.find("[data-drag=window]").click()
    ActionChains(browser.driver).drag_and_drop_by_offset(axial, 50, 0).perform()
    assert browser.viewer("window[1]") - browser.viewer("window[0]") == pytest.approx(600, abs=20)
    browser.find("[data-preset=lung]").click()
    browser.find(".sentence").click()
    browser.wait(lambda: browser.viewer("position")[0] == place[0], "the sentence's slice")
    browser.wait(lambda: browser.driver.execute_script(HOT_PIXELS) > 100, "the map's colours")

    browser.find("#findings input[type=checkbox]").click()
    browser.find("#write").click()
    browser.wait(lambda: len(browser.all("#versions button")) == 2 and browser.all(".sentence.changed"), "version 2")
    assert "空洞" not in browser.text("#report") and "空洞" in browser.text("#changes")
    browser.find("#ask").send_keys("右肺有病灶吗？", Keys.ENTER)
    browser.wait(lambda: browser.all("#answers li") and not browser.all("#answers .caret"), "an answer")
    browser.find("#toggle-edit").click()
    browser.find("#edit").send_keys(Keys.END, " 补充。")
    browser.find("#toggle-edit").click()
    next(button for button in browser.all("#downloads button") if button.text == "docx").click()
    written = browser.wait(lambda: next(tmp_path.glob("*.docx"), None), "the download")
    assert any("补充。" in paragraph.text for paragraph in docx.Document(str(written)).paragraphs)
    browser.shot("corrected")
    assert not browser.complaints()


def test_two_users_one_on_a_phone_in_the_dark_without_webgl(browse: Callable[..., Browser]) -> None:
    phone, other = browse(width=390, height=844, dark=True, phone=True), browse()
    for browser in (phone, other):
        browser.find("#samples button").click()
    for browser in (phone, other):
        browser.find(".sentence")
        browser.wait(lambda b=browser: b.viewer("constructor.name") == "SliceViewer", "the server's slices")
    assert phone.text("#report") == other.text("#report") != ""
    assert phone.driver.current_url != other.driver.current_url
    other.find("#toggle-edit").click()
    other.find("#edit").send_keys(Keys.END, " 补充。")
    other.find("#findings input[type=checkbox]").click()
    other.find("#write").click()
    other.wait(lambda: len(other.all("#versions button")) == 2 and other.all(".sentence"), "the second version")
    assert not phone.all("#versions button")
    assert "补充" not in other.text("#report"), "an edit is of its own version"
    other.all("#versions button")[0].click()
    assert "补充。" in other.text("#report"), "and is still there"
    other.find("#discard").click()
    other.driver.refresh()
    other.wait(lambda: len(other.all("#versions button")) == 2, "the versions after a reload")
    assert not other.find("#findings input[type=checkbox]").is_selected(), "the findings as they were corrected"
    assert phone.driver.execute_script("return document.documentElement.scrollWidth - innerWidth") <= 0
    assert phone.driver.execute_script("return document.documentElement.dataset.theme") == "dark"
    phone.shot("phone_top")
    phone.driver.execute_script("document.getElementById('report-card').scrollIntoView()")
    phone.shot("phone_report")
    phone.find("#language").click()
    words = phone.text("header") + phone.text("#findings-card")
    phone.find("#language").click()
    assert words != phone.text("header") + phone.text("#findings-card")
    assert not phone.complaints() and not other.complaints()


def test_the_keyboard_alone_is_enough(browse: Callable[..., Browser]) -> None:
    browser = browse()
    browser.find("#samples button")

    def tab_to(css: str) -> None:
        """Press Tab until the focus is there, and can be seen."""
        for _ in range(60):
            browser.driver.switch_to.active_element.send_keys(Keys.TAB)
            focused = browser.driver.switch_to.active_element
            if browser.driver.execute_script(f"return arguments[0].matches({css!r})", focused):
                outline = focused.value_of_css_property("outline-style")
                assert outline != "none"
                return
        raise AssertionError(f"no way by Tab to {css}")

    def press(key: str) -> None:
        browser.driver.switch_to.active_element.send_keys(key)

    tab_to("#samples button")
    press(Keys.ENTER)
    browser.find(".sentence")
    browser.wait(lambda: browser.viewer("position"), "a viewer")
    before = browser.viewer("position")
    tab_to(".plane canvas")
    press(Keys.ARROW_UP)
    browser.wait(lambda: browser.viewer("position")[0] == before[0] + 1, "the next slice")
    tab_to(".sentence")
    press(Keys.ENTER)
    browser.wait(lambda: browser.viewer("layers.heat"), "the map")
    tab_to("#findings input[type=checkbox]")
    press(Keys.SPACE)
    tab_to("#write")
    press(Keys.ENTER)
    browser.wait(lambda: browser.all(".sentence.changed"), "version 2")
    assert not browser.complaints()


# ------------------------------------------------------------------ crashes


def reading_process(page: Page) -> psutil.Process:
    children = psutil.Process(page.process.pid).children()
    return next(child for child in children if "resource_tracker" not in " ".join(child.cmdline()))


def test_a_scan_that_kills_the_reading_process_does_not_take_the_page(page: Page) -> None:
    case = page.read()
    page.events(case, kind="stage")
    reading_process(page).kill()
    error = one(page.events(case), "error")
    reason = "exit code 15" if os.name == "nt" else "not enough memory, perhaps"
    assert reason in error["line"] and "the next scan works" in error["line"]
    page.wait_until_ready()
    assert one(page.events(page.read()), "report")["text"]


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX's")
def test_a_page_that_is_killed_leaves_no_file(page: Page) -> None:
    """The last test of this file: the page is gone after it."""
    assert list(page.temporary.glob("*/*/ct.npy"))
    page.process.kill()
    page.process.wait(timeout=10)
    deadline = time.monotonic() + 30
    while list(page.temporary.glob("ct-report-page-*")):
        assert time.monotonic() < deadline, "the reading process removes the folder"
        time.sleep(0.1)

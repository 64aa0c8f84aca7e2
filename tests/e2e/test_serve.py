"""`facefed serve` in a real browser, with real photographs: what a person does on the page, at a desk or a telephone.

The model is untrained, with made-up thresholds of a poor one: what it says of a photograph is worth nothing, so the
tests go by what must hold for any model (a picture is like itself) and by what is shown.
"""

import base64
import json
import os
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from browser import open_chromium
from programs import Program, Programs, free_port
from recognition_models import model, thresholds

pytestmark = [pytest.mark.e2e, pytest.mark.shared]
SEEN_WITHIN_MS = 120_000  # on a busy machine
SHOTS = os.environ.get("FACEFED_SCREENSHOTS", "")  # a folder, for eyes


@dataclass
class Served:
    """A gallery of two people, served."""

    folder: Path
    address: str  # with the token
    photographs: list[list[Path]]  # of each person
    program: Program
    cwd: Path

    @property
    def root(self):
        return self.address.partition("#")[0].rstrip("/")


@pytest.fixture(scope="module")
def served(shared_faces, tmp_path_factory):
    programs = Programs(tmp_path_factory.mktemp("serve"))
    people = sorted(path for path in (shared_faces / "vggface2" / "test").iterdir() if path.is_dir())
    photographs = [sorted(path.glob("*.jpg"))[:4] for path in (people[1], people[2], people[3])]
    for name, own in zip(("Ann", "Ben"), photographs, strict=False):
        (programs.cwd / "people" / name).mkdir(parents=True)
        shutil.copy(own[0], programs.cwd / "people" / name)
    model(known=thresholds(same_below=90, other_above=6000)).keep(programs.cwd / "poor.safetensors")
    enrolled = programs.run("facefed", "enrol", "gallery", "people", "--model", "poor.safetensors")
    assert enrolled.code == 0, enrolled
    assert "enrolled: 2 new people" in enrolled.out
    refused = programs.run("facefed", "serve", "gallery", "--port", free_port())
    assert refused.code == 2, refused
    assert "--anyway" in refused.err
    port = free_port()
    program = programs.start("facefed", "serve", "gallery", "--port", port, "--anyway")
    program.wait_for(r"open http://127\.0\.0\.1:\d+/#token=\S+\n")
    address = re.search(r"open (\S+)", program.out)[1]
    yield Served(programs.cwd / "gallery", address, photographs, program, programs.cwd)
    programs.close()


@pytest.fixture(scope="module")
def chromium():
    with open_chromium("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream") as browser:
        yield browser


@pytest.fixture(params=[(1280, 900), (390, 844)], ids=["desk", "telephone"])
def page(chromium, served, request):
    """The page with its token; at its end nothing was asked of another address, and no script failed."""
    width, height = request.param
    page = chromium.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(SEEN_WITHIN_MS)
    asked, failed = [], []
    page.context.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failed.append(error.message))
    page.on("console", lambda message: failed.append(message.text) if message.type == "error" else None)
    page.goto(served.address)
    page.locator("#app").wait_for()
    yield page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()
    assert [url for url in asked if not url.startswith((f"{served.root}/", f"blob:{served.root}/", "data:"))] == []
    # Chromium's own line for the camera's test picture, which shows no face
    assert [line for line in failed if not line.startswith("Failed to load resource") or "422" not in line] == []


def shot(page, name):
    if SHOTS:
        page.screenshot(path=Path(SHOTS) / f"{name}-{page.viewport_size['width']}.png", full_page=True)


def answer(page, place):
    """What an answer says, once it is there."""
    found = page.locator(f"{place} .card, {place} .notice").first
    found.wait_for()
    return page.locator(place).inner_text()


def test_a_visit(page, served):
    """Compare, identify, enrol by dropping, take a picture by camera, remove; by mouse and by keyboard."""
    ann, ben, dan = served.photographs
    assert "token" not in page.url
    assert "Do not act on its answers" in page.locator("#cautions").inner_text()
    page.set_input_files("#file-first", ann[0])
    page.set_input_files("#file-second", ann[0])
    page.locator("#verify-go").focus()
    page.keyboard.press("Enter")
    said = answer(page, "#verify-answer")
    assert "The same person" in said
    assert re.search(r"Score (1\.000|0\.999) is at or above the threshold", said)
    assert page.locator("#verify-answer .pair img").evaluate_all("all => all.map((one) => one.naturalWidth)") == [
        32,
        32,
    ]
    assert page.locator("#verify-answer .chart svg path").count() == 2
    shot(page, "compare")

    page.locator("#tab-verify").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#identify").is_visible()
    page.set_input_files("#file-who", ben[0])
    page.click("#identify-go")
    said = answer(page, "#identify-answer")
    assert page.locator("#identify-answer .badge").first.inner_text() == "Ben"
    assert "a search of this gallery" in said
    shot(page, "identify")

    page.click("#tab-enrol")
    page.fill("#enrol-name", "Dan <b>")
    drop = """([place, content]) => {
        const bytes = Uint8Array.from(atob(content), (one) => one.charCodeAt(0)), data = new DataTransfer();
        data.items.add(new File([bytes], "dan.jpg", {type: "image/jpeg"}));
        document.querySelector(place).dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true}));
    }"""
    page.evaluate(drop, ["#enrol .drop", base64.b64encode(dan[0].read_bytes()).decode()])
    page.click("#enrol-go")
    assert "Dan <b> is enrolled: 1 new template" in answer(page, "#enrol-answer")
    shot(page, "enrol")

    page.click("#tab-identify")
    page.locator("#identify .drop").get_by_text("Use the camera").click()
    while not page.locator("#camera video").evaluate("video => video.videoWidth"):  # no text runs in the page itself
        page.wait_for_timeout(100)
    page.click("#camera-take")
    page.click("#identify-go")
    assert "no face was found" in answer(page, "#identify-answer").lower()  # a test picture of Chromium's

    page.click("#tab-people")
    page.get_by_role("button", name="Remove Dan <b>").click()
    shot(page, "remove")
    page.click("#sure-yes")
    page.locator("#people-list td", has_text="Dan").wait_for(state="detached")
    assert page.locator("#people-list tbody tr").count() == 2
    page.click("#tab-model")
    assert "Equal error rate" in answer(page, "#model-about")
    shot(page, "model")


def test_without_the_token_the_page_asks_for_it(chromium, served):
    page = chromium.new_page()
    page.set_default_timeout(SEEN_WITHIN_MS)
    page.goto(f"{served.root}/#token=guess")
    page.locator("#login").wait_for()
    assert "The token is wrong or missing" in page.locator("#login-error").inner_text()
    page.fill("#token", served.address.partition("token=")[2])
    page.keyboard.press("Enter")
    page.locator("#app").wait_for()
    page.close()


def test_an_answer_that_is_no_json_is_told(chromium, served):
    """As a proxy in between gives it: the page says what it got, and asks for the token where that is meant."""
    page = chromium.new_page()
    page.set_default_timeout(SEEN_WITHIN_MS)
    failed = []
    page.on("pageerror", lambda error: failed.append(error.message))
    page.route("**/api/model", lambda route: route.fulfill(status=401, content_type="text/html", body="<h1>No</h1>"))
    page.goto(served.address)
    page.locator("#login").wait_for()
    assert "The server answered 401" in page.locator("#login-error").inner_text()
    page.unroute("**/api/model")
    page.route("**/api/people", lambda route: route.fulfill(status=200, content_type="text/html", body="<h1>Hm</h1>"))
    page.fill("#token", served.address.partition("token=")[2])
    page.keyboard.press("Enter")
    page.locator("#app").wait_for()
    page.click("#tab-people")
    page.get_by_text("The server answered 200, without a word that can be read").wait_for()
    assert failed == []
    page.close()


def test_what_is_refused_and_what_is_left(served):
    """Over the socket: a wrong token, 100 MB, another host's name; then the files, and a second server on the port."""
    token = served.address.partition("token=")[2]

    def status(path, body=None, **headers):
        method = "GET" if body is None else "POST"
        got = httpx.request(method, f"{served.root}{path}", content=body, headers=headers, trust_env=False, timeout=120)
        return got.status_code, got.json()

    bearer = {"Authorization": f"Bearer {token}"}
    assert status("/health") == (200, {"status": "ok"})
    assert status("/api/people")[0] == 401
    assert status("/api/people", **bearer)[0] == 200
    assert status("/api/verify", b"x" * 100_000_000, **bearer)[0] == 413
    assert status("/api/people", Host="evil.example", **bearer)[0] == 421
    lines = (served.folder / "decisions.jsonl").read_text().splitlines()
    assert {json.loads(line)["what"] for line in lines} == {"verify", "identify", "enrol", "remove"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in served.folder.iterdir()} == {0o600}
    assert not any(b"Dan" in path.read_bytes() for path in served.folder.iterdir())
    programs = Programs(served.cwd)
    port = served.root.rpartition(":")[2]
    taken = programs.run("facefed", "serve", "gallery", "--port", port, "--anyway")
    assert (taken.code, len(taken.error_lines)) == (2, 1), taken
    assert f"--host and --port 127.0.0.1:{port} cannot be used" in taken.err
    served.program.signal(15)
    ended = served.program.ended()
    assert (ended.code, ended.err) == (130, "facefed: stopped.\n"), ended

"""The API of `facefed serve`, asked in process: the answers, the line that each decision leaves, and bad input."""

import asyncio
import base64
import json
import socket
import stat
import tempfile
import threading

import httpx
import numpy as np
import pytest
import uvicorn
from recognition_models import DrawnFaces, face, model, photograph, thresholds

from simulation.recognition import service
from simulation.recognition.asking import Recognition
from simulation.recognition.door import Door, Limits
from simulation.recognition.gallery import add_people, open_gallery
from simulation.recognition.service import AUDIT, Desk, app_of

TOKEN = "a-token-that-nobody-guesses"
ANN, BEN, CLEO, STRANGER = 1, 2, 3, 9
LIMITS = Limits(body_bytes=200_000, picture_bytes=50_000, pictures=3, requests_a_minute=10_000.0)


def b64(*people, drawing=0):
    return base64.b64encode(photograph(*people, drawing=drawing)).decode()


class Server:
    """The whole of it behind its door, without a socket."""

    def __init__(self, folder, *, known=None, anyway=False, finds=None, far=None):
        self.folder, self.model = folder, model(known=known)
        people = {"Ann": ANN, "Ben": BEN}
        rows = {name: self.model.embed(face(person)[None]) for name, person in people.items()}
        if not folder.exists():
            add_people(folder, self.model.binding, rows, keep_model=self.model.keep, again="")
        asked = Recognition.of(self.model, far=far, anyway=anyway, photographs=finds or DrawnFaces())
        self.desk = Desk(folder=folder, asked=asked, limits=LIMITS)
        app = app_of(self.desk)
        self.app = Door(app=app, hosts=frozenset(["localhost"]), token=TOKEN, limits=LIMITS)

    def send(self, method, path, **how):
        async def sent():
            transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8080") as client:
                return await client.request(method, path, headers={"authorization": f"Bearer {TOKEN}"}, **how)

        return asyncio.run(sent())

    def ask(self, what, **question):
        return self.send("POST", f"/api/{what}", json=question)

    @property
    def audit(self):
        return [json.loads(line) for line in (self.folder / AUDIT).read_text().splitlines()]


@pytest.fixture
def server(tmp_path):
    return Server(tmp_path / "g")


def test_two_pictures_of_one_person_and_of_two(server):
    same = server.ask("verify", first=b64(ANN), second=b64(ANN, drawing=1)).json()
    other = server.ask("verify", first=b64(ANN), second=b64(BEN)).json()
    assert (same["same"], other["same"]) == (True, False)
    assert other["score"] < same["threshold"] <= same["score"]
    assert same["far"] == 1e-3
    assert "300 genuine and 20,000 impostor pairs" in same["rate"]
    shown = [one["picture"] for one in same["faces"]]
    assert all(uri.startswith("data:image/png;base64,") for uri in shown)


def test_who_is_on_a_picture(server):
    found = server.ask("identify", picture=b64(BEN, STRANGER, drawing=1)).json()
    assert [one["name"] for one in found["faces"]] == ["Ben", None]
    assert [one["name"] for one in found["faces"][0]["candidates"]] == ["Ben", "Ann"]
    assert [one["reaches"] for one in found["faces"][0]["candidates"]] == [True, False]
    assert "0.002 a search of this gallery (2 templates: 1 - (1 - 0.001)^2)" in found["search"]
    assert len(server.ask("identify", picture=b64(BEN), top=1).json()["faces"][0]["candidates"]) == 1


def test_somebody_is_enrolled_found_and_removed(server):
    done = server.ask("enrol", name=" Cleo ", pictures=[b64(CLEO), b64(), b64(CLEO, drawing=1)]).json()
    assert (done["name"], done["num_templates"], done["num_in_all"]) == ("Cleo", 2, 2)
    assert done["left_out"] == [{"picture": 2, "reason": "no face was found"}]
    assert server.ask("identify", picture=b64(CLEO, drawing=2)).json()["faces"][0]["name"] == "Cleo"
    assert [one["name"] for one in server.send("GET", "/api/people").json()["people"]] == ["Ann", "Ben", "Cleo"]
    assert server.ask("remove", name="Cleo").json() == {"num_people": 2}
    assert server.ask("identify", picture=b64(CLEO, drawing=2)).json()["faces"][0]["name"] is None


def test_one_person_under_two_names_is_told(server):
    alike = server.ask("enrol", name="Annie", pictures=[b64(ANN, drawing=1)]).json()["look_alikes"]
    assert [one["name"] for one in alike] == ["Ann"]


def test_what_another_program_enrols_is_known_at_once(server):
    assert server.ask("identify", picture=b64(CLEO)).json()["faces"][0]["name"] is None
    rows = server.model.embed(face(CLEO)[None])
    add_people(server.folder, server.model.binding, {"Cleo": rows}, keep_model=server.model.keep, again="")
    assert server.ask("identify", picture=b64(CLEO)).json()["faces"][0]["name"] == "Cleo"


@pytest.mark.parametrize(
    ("what", "question"), [("enrol", {"name": "Cleo", "pictures": [CLEO]}), ("remove", {"name": "Ben"})]
)
def test_what_another_program_enrols_in_the_same_moment_is_known_too(server, monkeypatch, what, question):
    """Between a change of this server's and its look at the folder."""

    def then_another(change):
        def changed(*given, **how):
            done = change(*given, **how)
            rows = {"Zoe": server.model.embed(face(STRANGER)[None])}
            add_people(server.folder, server.model.binding, rows, keep_model=server.model.keep, again="")
            return done

        return changed

    for name in ("add_people", "remove_people"):
        monkeypatch.setattr(service, name, then_another(getattr(service, name)))
    if "pictures" in question:
        question = {**question, "pictures": [b64(person) for person in question["pictures"]]}
    assert server.ask(what, **question).status_code == 200
    names = [one["name"] for one in server.send("GET", "/api/people").json()["people"]]
    assert names == {"enrol": ["Ann", "Ben", "Cleo", "Zoe"], "remove": ["Ann", "Zoe"]}[what]


def test_a_body_in_chunks_without_an_end_is_refused_over_the_socket_at_once(server):
    """With uvicorn as `facefed serve` has it: the client sends too much, stops, and waits for what it is told."""
    listener = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(server.app, log_level="warning", lifespan="off", ws="none"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    head = f"POST /api/verify HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {TOKEN}\r\n"
    chunk = b"%x\r\n%s\r\n" % (LIMITS.body_bytes + 1, b"x" * (LIMITS.body_bytes + 1))
    try:
        with socket.create_connection(listener.getsockname(), timeout=8.0) as client:
            client.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode() + chunk)
            answer = client.recv(65_536)
    finally:
        running.should_exit = running.force_exit = True
        thread.join(10.0)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"send fewer or smaller pictures" in answer


def test_a_gallery_that_became_another_models_is_not_answered_from(server):
    other = model(seed=1, source="run-2")
    rows = {name: other.embed(face(person)[None]) for name, person in (("Ann", ANN), ("Ben", BEN))}
    add_people(server.folder, other.binding, rows, keep_model=other.keep, again="", mode="replace")
    for _ in range(2):  # whoever asks again gets no other answer
        answer = server.ask("identify", picture=b64(ANN))
        assert answer.status_code == 422
        assert "is now one of run-2" in answer.json()["error"]


def test_the_page_draws_from_what_the_model_says(server):
    about = server.send("GET", "/api/model").json()
    assert (about["sha256"], about["num_people"], about["num_templates"]) == (server.model.binding.sha256, 2, 2)
    assert np.sum(about["histogram"], axis=1).tolist() == [300, 20_000]
    assert about["cautions"] == []


def test_each_decision_leaves_a_line_without_names_or_pictures(server):
    server.ask("verify", first=b64(ANN), second=b64(BEN))
    server.ask("identify", picture=b64(BEN, STRANGER, drawing=1))
    server.ask("enrol", name="Cleo", pictures=[b64(CLEO)])
    keys = {one.name: one.key for one in open_gallery(server.folder).people}
    server.ask("remove", name="Cleo")
    lines = server.audit
    assert [(one["what"], one["outcome"]) for one in lines] == [
        ("verify", "different"), ("identify", keys["Ben"]), ("identify", "unknown"), ("enrol", keys["Cleo"]),
        ("remove", keys["Cleo"]),
    ]  # fmt: skip
    assert {one["model_sha256"] for one in lines} == {server.model.binding.sha256}
    assert all(one["threshold"] > one["score"] for one in lines if one["outcome"] in ("different", "unknown"))
    text = (server.folder / AUDIT).read_text()
    assert not any(name in text for name in ("Ann", "Ben", "Cleo", "base64"))
    assert stat.S_IMODE((server.folder / AUDIT).stat().st_mode) == 0o600


def test_without_a_line_there_is_no_answer(server):
    (server.folder / AUDIT).mkdir()
    answer = server.ask("verify", first=b64(ANN), second=b64(BEN))
    assert answer.status_code == 500
    assert "the gallery's folder cannot be used" in answer.json()["error"]


def test_no_picture_is_written(server, monkeypatch, tmp_path):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a temporary file is made")

    for name in ("TemporaryFile", "NamedTemporaryFile", "SpooledTemporaryFile", "mkstemp"):
        monkeypatch.setattr(tempfile, name, refuse)
    picture = photograph(ANN, drawing=5)
    server.ask("verify", first=base64.b64encode(picture).decode(), second=b64(BEN))
    server.ask("enrol", name="Cleo", pictures=[base64.b64encode(picture).decode()])
    assert not any(picture[40:80] in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    ("what", "question", "told"),
    [
        ("verify", {"first": "no base64!", "second": b64(BEN)}, "the first picture: is no base64 text"),
        ("verify", {"first": b64(BEN), "second": b64()}, "the second picture: no face was found"),
        (
            "verify",
            {"first": b64(BEN), "second": base64.b64encode(b"GIF89a...").decode()},
            "the second picture: unread",
        ),
        ("verify", {"first": b64(BEN), "second": "A" * 70_000}, "the second picture: larger than"),
        ("verify", {"first": b64(BEN)}, "body.second: Field required"),
        ("verify", {"first": b64(BEN), "second": 5}, "body.second: Input should be a valid string"),
        ("verify", {"first": b64(BEN), "second": b64(BEN), "threshold": 0}, "body.threshold: Unexpected keyword"),
        ("identify", {"picture": b64(BEN), "top": 0}, "top = 0: ask for 1 to 50 people"),
        ("identify", {"picture": b64(BEN), "top": 10**9}, "ask for 1 to 50 people"),
        ("enrol", {"name": "", "pictures": [b64(BEN)]}, "cannot be a name"),
        ("enrol", {"name": "a\nb", "pictures": [b64(BEN)]}, "cannot be a name"),
        ("enrol", {"name": "Dan", "pictures": []}, "0 pictures: give 1 to 3"),
        ("enrol", {"name": "Dan", "pictures": [b64(BEN)] * 4}, "4 pictures: give 1 to 3"),
        ("enrol", {"name": "Dan", "pictures": [b64()]}, "Dan is not enrolled: picture 1: no face was found"),
        ("enrol", {"name": "Dan", "pictures": [b64(BEN, ANN)]}, "picture 1: 2 faces, and nothing says whose it is"),
        ("remove", {"name": "Dan"}, "'Dan' is not enrolled"),
    ],
)
def test_bad_input_gets_a_reason_and_changes_nothing(server, what, question, told):
    answer = server.ask(what, **question)
    assert answer.status_code == 422
    assert told in answer.json()["error"]
    assert len(answer.content) < 500  # what was sent is not sent back
    assert [one.name for one in open_gallery(server.folder).people] == ["Ann", "Ben"]
    assert not (server.folder / AUDIT).exists()


def test_a_small_face_is_not_enrolled(tmp_path):
    server = Server(tmp_path / "g", finds=DrawnFaces(size_px=22.0))
    answer = server.ask("enrol", name="Dan", pictures=[b64(CLEO)])
    assert "its face is small (22 px; 40 are needed)" in answer.json()["error"]
    assert "its face is small" in server.ask("verify", first=b64(ANN), second=b64(BEN)).json()["faces"][0]["faults"]


def test_what_is_no_json_is_refused(server):
    answer = server.send("POST", "/api/verify", content=b"{")
    assert answer.status_code == 422


def test_a_poor_model_answers_with_a_warning(tmp_path):
    server = Server(tmp_path / "g", known=thresholds(same_below=90, other_above=6000), anyway=True, far=0.1)
    assert server.send("GET", "/api/model").json()["cautions"][0].startswith("warning: run-1 judges")


def test_the_page_and_its_files_are_there_and_nothing_else(server):
    page = server.send("GET", "/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for path in ("/page.css", "/page.js", "/icon.svg"):
        assert path in page.text
        assert server.send("GET", path).status_code == 200
    assert "http://" not in page.text + server.send("GET", "/page.css").text
    assert [server.send("GET", path).status_code for path in ("/docs", "/redoc", "/gallery.json")] == [404] * 3
    assert set(server.send("GET", "/api/openapi.json").json()["paths"]) == {
        f"/api/{name}" for name in ("model", "people", "verify", "identify", "enrol", "remove")
    }

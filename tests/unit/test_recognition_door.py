"""What stands before the page: who may ask, how often, how much; and what is refused never comes behind it."""

import asyncio
import json

import pytest

from simulation.recognition.door import HEADERS, WRONG_TOKEN_COST, Door, Limits

TOKEN = "a-token-that-nobody-guesses"
FEW = Limits(body_bytes=1000, requests_a_minute=30.0, at_once=1, body_within_s=0.2)


class Behind:
    """An application that remembers what came through."""

    def __init__(self):
        self.bodies, self.hold = [], None

    async def __call__(self, scope, receive, send):
        body = b""
        if scope["method"] == "POST":
            body = (await receive())["body"]
        self.bodies.append(body)
        if self.hold is not None:
            await self.hold.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


class Client:
    """Speaks ASGI to a door, message by message."""

    def __init__(self, limits=FEW, hosts=("localhost", "127.0.0.1", "::1")):
        self.behind, self.now = Behind(), 0.0
        self.door = Door(app=self.behind, hosts=frozenset(hosts), token=TOKEN, limits=limits, clock=lambda: self.now)

    async def send(
        self, path="/api/verify", *, method="POST", parts=(b"{}",), client="10.0.0.1", ends=True, told=None, **headers
    ):
        """Status, reason, headers.  headers: host_, authorization, origin, content_length, expect; None: not there."""
        given = {"host": "localhost:8080", "authorization": f"Bearer {TOKEN}"} | {
            name.rstrip("_").replace("_", "-"): value for name, value in headers.items()
        }
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "client": (client, 1),
            "headers": [(name.encode(), value.encode()) for name, value in given.items() if value is not None],
        }
        waiting, answers = list(parts), [] if told is None else told

        async def receive():
            if not waiting:
                await asyncio.sleep(3600 if not ends else 0)
                return {"type": "http.disconnect"}
            part = waiting.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(waiting) or not ends}

        async def sent(message):
            answers.append(message)

        await self.door(scope, receive, sent)
        head = {name.decode(): value.decode() for name, value in answers[0]["headers"]}
        body = json.loads(answers[1]["body"])
        return answers[0]["status"], body.get("error", ""), head

    def ask(self, *args, **kwargs):
        return asyncio.run(self.send(*args, **kwargs))


@pytest.mark.parametrize("host", ["localhost", "localhost:8080", "127.0.0.1:8080", "[::1]:8080", "LOCALHOST"])
def test_it_answers_under_its_own_names(host):
    assert Client().ask(host=host)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example:8080", "", "localhost@evil.example", None, "[::"]
)
def test_a_name_that_is_led_here_is_refused(host):
    client = Client()
    status, reason, _ = client.ask(host=host)
    assert (status, client.behind.bodies) == (421, [])
    assert "does not answer to that host name" in reason


def test_a_page_of_another_site_is_refused():
    client = Client()
    assert client.ask(origin="https://evil.example")[0] == 403
    assert client.ask(origin="null")[0] == 403
    assert client.ask(origin="http://[::1")[0] == 403  # no address at all
    assert client.behind.bodies == []
    assert client.ask(origin="http://localhost:8080")[0] == 200


@pytest.mark.parametrize("given", [None, "", "Bearer ", "Bearer wrong", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN}x"])
def test_a_wrong_token_is_refused(given):
    client = Client()
    status, reason, headers = client.ask(authorization=given)
    assert (status, headers["www-authenticate"], client.behind.bodies) == (401, "Bearer", [])
    assert "token is wrong or missing" in reason
    assert TOKEN not in reason


def test_the_page_itself_needs_no_token():
    assert Client().ask("/", method="GET", authorization=None)[0] == 200


def test_every_answer_forbids_what_is_not_ours():
    for status, headers in ((200, {}), (401, {"authorization": None})):
        got, _, head = Client().ask(**headers)
        assert got == status
        assert head.items() >= HEADERS.items()
    assert "default-src 'none'" in HEADERS["content-security-policy"]
    assert "http" not in HEADERS["content-security-policy"]


@pytest.mark.parametrize("parts", [(b"x" * 1001,), (b"x" * 600, b"x" * 600)])
def test_a_body_that_is_too_large_is_read_no_further(parts):
    client = Client()
    status, reason, _ = client.ask(parts=parts)
    assert (status, client.behind.bodies) == (413, [])
    assert "send fewer or smaller pictures" in reason


@pytest.mark.parametrize("given", [{}, {"content_length": "5000"}])
def test_a_client_that_stops_in_the_middle_of_too_much_gets_its_answer_at_once(given):
    async def asked():
        client, answers = Client(), []
        parts = (b"x" * 1001,)
        waiting = asyncio.create_task(client.send(parts=parts, ends=False, told=answers, **given))
        while len(answers) < 2:
            await asyncio.sleep(0.01)
        waiting.cancel()
        return answers

    start, body = asyncio.run(asyncio.wait_for(asked(), 5.0))
    head = {name.decode(): value.decode() for name, value in start["headers"]}
    assert (start["status"], head["connection"]) == (413, "close")
    assert int(head["content-length"]) == len(body["body"])  # whole, though the rest is still looked for


def test_who_waits_to_be_told_to_send_is_not_told_to():
    client, answers = Client(), []
    client.ask(content_length="5000", expect="100-continue", parts=(), ends=False, told=answers)
    assert [one.get("status") for one in answers] == [413, None]
    assert not answers[1]["more_body"]


@pytest.mark.parametrize("length", ["1001", "100000000", "-1", "1e3", "many"])
def test_a_length_that_is_too_large_or_none_is_refused_at_once(length):
    client = Client()
    assert client.ask(content_length=length)[0] == 413
    assert client.behind.bodies == []


def test_a_body_comes_through_whole():
    client = Client()
    assert client.ask(parts=(b"one ", b"two"))[0] == 200
    assert client.behind.bodies == [b"one two"]


def test_a_body_that_does_not_come_is_not_waited_for():
    client = Client()
    status, reason, _ = client.ask(parts=(b"{",), ends=False)
    assert (status, client.behind.bodies) == (408, [])
    assert "within 0.2 s" in reason


def test_a_broken_request_is_none():
    client = Client()
    assert client.ask(parts=())[0] == 400
    assert client.behind.bodies == []


def test_an_address_asks_only_so_often():
    client = Client()
    assert [client.ask()[0] for _ in range(31)] == [200] * 30 + [429]
    status, reason, headers = client.ask()
    assert (status, headers["retry-after"]) == (429, "2")  # 30 a minute: one in 2 s
    assert "more than 30 requests a minute; wait 2 s" in reason
    assert client.ask(client="10.0.0.2")[0] == 200
    client.now += 2.0
    assert client.ask()[0] == 200
    assert client.ask()[0] == 429
    client.now += 600.0
    assert [client.ask()[0] for _ in range(31)][-1] == 429  # nothing is saved up beyond a minute


def test_guessing_a_token_is_slow():
    client = Client()
    guesses = [client.ask(authorization="Bearer guess")[0] for _ in range(5)]
    assert guesses == [401] * int(30 / WRONG_TOKEN_COST) + [429] * 2


def test_addresses_are_not_remembered_for_ever(monkeypatch):
    monkeypatch.setattr("simulation.recognition.door.MOST_KNOWN", 3)
    client = Client()
    for number in range(10):
        client.ask(client=f"10.0.0.{number}")
    assert len(client.door._buckets) == 3


def test_so_many_bodies_are_in_memory_at_once():
    client = Client()

    async def two():
        client.behind.hold = asyncio.Event()
        first = asyncio.create_task(client.send())
        await asyncio.sleep(0)
        while not client.behind.bodies:
            await asyncio.sleep(0)
        second = await asyncio.wait_for(client.send(), 5)
        page = asyncio.create_task(client.send("/", method="GET"))
        await asyncio.sleep(0)
        client.behind.hold.set()
        return (await first)[0], second, (await page)[0]

    first, second, page = asyncio.run(two())
    assert (first, second[0], second[2]["retry-after"], page) == (200, 503, "1", 200)
    assert client.ask()[0] == 200  # the place is free again

"""`facefed egress report`: equal, differs, not confirmed; damaged ledgers; and a client against a server that lies."""

import hashlib
import io
import json
from types import SimpleNamespace

import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from tiny_federation import InProcessMailbox, settings_with, task_for, tiny_pack, tiny_workplace

import clients.message_handler
import clients.packs
from clients.egress import UNRECORDED, Asked, record_egress, record_receipt
from common.errors import UserError
from common.protocol import wire
from common.protocol.codec import encode
from common.protocol.ledger import digest_of, parts_of
from common.protocol.parameters import flatten
from common.system.files import append_line
from server.exchange.receipts import ReceiptMailbox
from simulation.admin.egress import Request, report_egress
from simulation.cli import main

RUN = "run-1"


def content(number=0.5, change=b"\0" * 12):
    """A reply of one array and one number."""
    array = SimpleNamespace(stype="facefed.flat", dtype="float32", shape=(3,), data=change)
    return {"arrays": {"change": array}, "sums": {"loss": number}}


def receipt(kind, server_round, what):
    parts = parts_of(what)
    return f"{kind} {server_round} {sum(part['num_bytes'] for part in parts)} {digest_of(parts)}"


class Site:
    """A site's state folder and what is written there, by the functions that the site uses."""

    def __init__(self, folder):
        self.state, self.server = folder / "alpha", folder / "server"
        self.path = self.state / "egress" / f"{RUN}.jsonl"
        self._before = ""

    def sends(self, kind, server_round, what, *, arrives=True, as_what=None, is_told=True):
        """One task and its answer, which arrives as it is or as another; the next task tells of it."""
        request = Asked(kind=kind, run_id=RUN, server_round=server_round)
        record_receipt(self.state / "egress", "alpha", request, self._before)
        record_egress(self.state / "egress", "alpha", request, what)
        if arrives:
            arrived = what if as_what is None else as_what
            self._before = receipt(kind, server_round, arrived) if is_told else ""
            parts = parts_of(arrived)
            record = {"kind": "received", "client": "alpha", "run": RUN, "round": server_round, "answer_to": kind}
            size = sum(part["num_bytes"] for part in parts)
            append_line(self.server / "received.jsonl", record | {"num_bytes": size, "parts": parts}, synced=False)
        return self

    def report(self, *, shape="text", **request):
        out = io.StringIO()
        code = report_egress(Request(state_dir=self.state, **request), out, shape=shape)
        return code, json.loads(out.getvalue())[0] if shape == "json" else out.getvalue()

    def statuses(self, **request):
        return [reply["status"] for reply in self.report(shape="json", **request)[1]["replies"]]


@pytest.fixture
def site(tmp_path):
    """A site that joined, trained two rounds and was asked for the last time."""
    made = Site(tmp_path)
    return made.sends("join", 0, "a site").sends("train", 1, content(1.0)).sends("train", 2, content(2.0))


def test_all_but_the_last_reply_are_confirmed_and_the_last_by_the_servers_record(site):
    assert site.statuses() == ["equal", "equal", "not confirmed"]
    assert site.statuses(server_run=site.server) == ["equal"] * 3
    assert site.report()[0] == site.report(server_run=site.server)[0] == 0


def test_the_text_names_what_left_with_its_size_and_hash(site):
    code, text = site.report()
    rows = [line.split() for line in text.splitlines()]
    sha256 = hashlib.sha256(b"\0" * 12).hexdigest()
    assert ["1", "train", "arrays.change", "3", "float32", "12", sha256[:16]] in rows
    assert "values of sums: loss" in text
    assert ["all", "of", "round", "1", "15"] in rows  # twelve bytes, and 1.0 as JSON
    assert "total: 3 replies, 36 bytes; 2 equal, 1 not confirmed" in text
    assert code == 0


def test_json_has_every_part_in_full(site):
    report = site.report(shape="json")[1]
    assert (report["client"], report["run"], report["is_good"]) == ("alpha", RUN, True)
    assert report["num_bytes_by_round"] == {"0": 6, "1": 15, "2": 15}
    assert report["replies"][1]["parts"] == parts_of(content(1.0))


def test_another_content_at_the_server_differs_and_its_record_says_in_what(site):
    site.sends("train", 3, content(3.0), as_what=content(3.5, b"\1" * 12)).sends("evaluate", 3, content())
    code, text = site.report()
    assert (code, site.statuses()) == (1, ["equal"] * 3 + ["differs", "not confirmed"])
    assert "DIFFERS: the answer to train of round 3 (line 7): 15 bytes" in text
    code, text = site.report(server_run=site.server)
    assert code == 1
    assert "arrays.change arrived as another; sums.loss arrived as another." in text
    site.sends("evaluate", 4, content(), as_what={"sums": {"more": 1}})
    text = site.report(server_run=site.server)[1]
    assert "arrays.change left and did not arrive" in text
    assert "sums.more arrived and did not leave" in text


def test_a_line_that_was_taken_out_is_missed(site):
    lines = site.path.read_text().splitlines()
    site.path.write_text(
        "".join(line + "\n" for line in lines if json.loads(line)["round"] != 1 or "parts" not in line)
    )
    code, text = site.report()
    assert code == 1
    assert "NOT IN THE LEDGER: the server received the answer to train of round 1 of 15 bytes, SHA-256 " in text


def test_a_repeated_round_has_two_lines_and_the_one_that_never_arrived_is_not_confirmed(site):
    """The server died before it took the first; then round 3 went on from its start."""
    site.sends("train", 3, content(3.0), arrives=False)
    site.sends("join", 0, "a site", is_told=True).sends("train", 3, content(3.25)).sends("evaluate", 3, content())
    assert site.statuses() == ["equal"] * 3 + ["not confirmed", "equal", "equal", "not confirmed"]
    assert site.report()[0] == 0
    assert "all of round 3" in site.report()[1]
    assert site.report(shape="json")[1]["num_bytes_by_round"]["3"] == 15 + 16 + 15


def test_words_that_left_because_nothing_could_be_written_are_explained(site):
    parts = parts_of(UNRECORDED)
    told = f"train 3 {parts[0]['num_bytes']} {digest_of(parts)}"
    record_receipt(site.path.parent, "alpha", Asked(kind="evaluate", run_id=RUN, server_round=3), told)
    code, text = site.report()
    assert code == 0
    assert "the answer to train of round 3 were fixed words: the ledger could not be written then" in text


# ---- lines that are chained


def _without(site, *numbers):
    lines = site.path.read_text().splitlines(keepends=True)
    site.path.write_text("".join(line for number, line in enumerate(lines, start=1) if number not in numbers))


@pytest.mark.parametrize("numbers", [(2, 3), (1, 2), (4,), (2, 3, 4)])
def test_a_line_that_was_taken_out_together_with_its_receipt_is_missed(site, numbers):
    """Lines: join, receipt of it, train 1, receipt of it, train 2.  The server's own record is not there to tell."""
    site.sends("evaluate", 2, content())
    _without(site, *numbers)
    code, text = site.report()
    assert code == 1
    assert f"line {numbers[0]} does not follow the line before it" in text
    assert text.count("DAMAGED: ") == 1


def test_a_client_that_was_killed_while_it_wrote_breaks_nothing(site):
    with site.path.open("ab") as file:
        file.write(b'{"time": "2026-11-28T10:00:00+00:00", "kind": "se')
    assert site.report()[0] == 1, "until the client goes on, anybody may have cut it"
    site.sends("train", 3, content(3.0))
    code, text = site.report()
    assert (code, site.statuses()) == (0, ["equal"] * 3 + ["not confirmed"])
    assert "line 6 was cut when the client was stopped; its reply did not leave." in text
    _without(site, 6)
    assert "line 6 does not follow the line before it" in site.report()[1]


def test_a_line_of_a_killed_client_that_somebody_else_cut_is_damaged(site):
    site.sends("train", 3, content(3.0))
    lines = site.path.read_text().splitlines()
    site.path.write_text("\n".join([*lines[:4], lines[4][:-40], *lines[5:]]) + "\n")
    assert "line 5 is no JSON" in site.report()[1]
    assert site.report()[0] == 1


def test_a_ledger_of_before_is_read_and_a_client_goes_on_with_it(site):
    old = [json.loads(line) for line in site.path.read_text().splitlines()]
    for line in old:
        del line["previous"]
    site.path.write_text("".join(json.dumps(line) + "\n" for line in old))
    site.sends("train", 3, content(3.0))
    code, text = site.report()
    assert code == 0
    assert "5 lines are not chained (an earlier FaceFed wrote them)" in text
    _without(site, 5)
    assert "line 5 does not follow the line before it" in site.report()[1]


def test_a_link_that_was_taken_away_is_missed(site):
    lines = [json.loads(line) for line in site.path.read_text().splitlines()]
    del lines[3]["previous"]
    site.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "line 4 does not follow the line before it" in site.report()[1]


# ---- ledgers that cannot be believed


def _altered(text, old, new):
    assert old in text
    return text.replace(old, new, 1)


DAMAGES = {
    "cut": (lambda text: text[:-40], "is cut: whoever wrote it was stopped"),
    "garbage": (lambda text: "\x00\x01 garbage\n" + text, "line 1 is no JSON"),
    "no record": (lambda text: text + "[1, 2]\n", "is no record"),
    "deep": (lambda text: text + "[" * 100_000 + "\n", "is no JSON"),
    "size": (lambda text: _altered(text, '"num_bytes": 15,', '"num_bytes": 14,'), "do not add up"),
    "part": (lambda text: _altered(text, '"shape": [3]', '"shape": [4]'), "its sha256 is not that of its parts"),
    "no shape": (lambda text: _altered(text, '"shape": [3]', '"shape": 3'), "names parts without"),
    "no parts": (lambda text: _altered(text, '"parts": [', '"pieces": ['), "do not add up"),
    "round": (lambda text: _altered(text, '"round": 2', '"round": "2"'), "has no round"),
    "other run": (
        lambda text: _altered(text, f'"run": "{RUN}", "round": 2', '"run": "x", "round": 2'),
        "run x, not of",
    ),
    "other site": (lambda text: text + text.splitlines()[0].replace("alpha", "beta") + "\n", "beta's run"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_line_is_told_of_in_one_line_and_the_others_are_compared(site, damage):
    damaged, said = DAMAGES[damage]
    site.path.write_text(damaged(site.path.read_text()))
    code, text = site.report()
    told = [line for line in text.splitlines() if line.startswith("DAMAGED: ")]
    assert (code, len(told)) == (1, 1), text
    assert said in told[0]
    assert site.statuses()[0] == "equal"


def test_a_file_of_nonsense_is_the_users_mistake(site):
    for nonsense in (b"", b"\xff\xfe\x00", b"{}\n", b"null\n" * 3):
        site.path.write_bytes(nonsense)
        with pytest.raises(UserError, match="holds no reply"):
            site.report()
    site.path.unlink()
    site.path.mkdir()
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        site.report()


# ---- which ledgers


def said_by(capsys, *arguments):
    """The one line of a refusal."""
    assert main(["egress", "report", *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_the_program_refuses(site, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    at = ("--state-dir", site.state)
    assert "no site has an egress ledger in" in said_by(capsys)
    assert "holds no egress ledger" in said_by(capsys, "--state-dir", tmp_path / "nowhere")
    assert "'run-2' is unknown; did you mean 'run-1'" in said_by(capsys, *at, "--run", "run-2")
    assert "no received.jsonl is there" in said_by(capsys, *at, "--server-run", tmp_path)
    (tmp_path / "received.jsonl").touch()
    assert "is of no run; the ledger is of run-1" in said_by(capsys, *at, "--server-run", tmp_path)
    (tmp_path / ".facefed" / "clients" / "beta").mkdir(parents=True)
    assert "--name = 'bta' is unknown; did you mean 'beta'" in said_by(capsys, "--name", "bta")


def test_without_options_all_sites_of_this_folder_are_reported_with_their_newest_run(
    site, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".facefed").mkdir()
    (tmp_path / ".facefed" / "clients").mkdir()
    site.state.rename(tmp_path / ".facefed" / "clients" / "alpha")
    folder = tmp_path / ".facefed" / "clients"
    for name, run in (("beta", "run-1"), ("beta", "run-2")):
        record_egress(folder / name / "egress", name, Asked(kind="join", run_id=run), "words")
    record_egress(folder / "beta" / "egress", "beta", Asked(), "the server's message is not one of FaceFed's")
    assert main(["egress", "report", "--json"]) == 0
    found = [(report["client"], report["run"]) for report in json.loads(capsys.readouterr().out)]
    assert found == [("alpha", "run-1"), ("beta", "run-2")]
    assert main(["egress", "report", "--name", "beta"]) == 0
    assert "1 messages that were of no run of ours were refused: --run unknown" in capsys.readouterr().out
    assert main(["egress", "report", "--name", "beta", "--run", "runs/run-1"]) == 0
    assert "what left for run run-1" in capsys.readouterr().out
    assert main(["egress", "report", "--name", "beta", "--run", "unknown"]) == 0
    assert "not one of FaceFed's" in capsys.readouterr().out


# ---- a real client and the server's real receipts


@pytest.mark.usefixtures("in_a_run")
@pytest.mark.parametrize("tampered", ["", "train", "join"])
def test_a_client_sees_that_something_else_arrived(tmp_path, monkeypatch, tampered):
    monkeypatch.setattr(clients.message_handler, "_workplaces", {})
    monkeypatch.setattr(clients.packs, "open_pack", lambda *_args, **_named: tiny_pack("alpha"))
    state = tiny_workplace(settings_with(), tmp_path / "model")
    model = wire.pack_shared(encode(flatten(state.recogniser.state_dict(), state.manifest), "float32"))

    def tamper(_name, task, reply):
        if task.kind != tampered:
            return reply
        arrays = (
            {
                key: Array(a.dtype, a.shape, a.stype, bytes(a.data[:-1]) + b"?")
                for key, a in reply.content["arrays"].items()
            }
            if tampered == "train"
            else {}
        )
        return Message(RecordDict({**reply.content, "arrays": ArrayRecord(arrays)}), reply_to=reply)

    mailbox = ReceiptMailbox(InProcessMailbox(["alpha"], tmp_path, tamper), tmp_path / "server", RUN)
    for kind in ("join", "train", "evaluate"):
        task = task_for(state.manifest, settings_with(), kind=kind, server_round=int(kind != "join"))
        (message_id,) = mailbox.send(
            [wire.task_message(task, None if kind == "join" else model, node_id=100, ttl_s=9.0)]
        )
        assert not mailbox.receive(message_id).has_error()
    mailbox.close()
    site = Site(tmp_path)
    assert site.statuses() == ["differs" if tampered == k else "equal" for k in ("join", "train")] + ["not confirmed"]
    if tampered == "train":
        assert "arrays.change arrived as another" in site.report(server_run=site.server)[1]

"""`flower-server` and `flower-client`s: separate processes, the simulation's model, and clients that come and go.

One client stays up through all of this file's servers, as at a real site; the tests run in their order.
"""

import json
import re
import signal
import socket
import urllib.request

import numpy as np
import pytest
from conftest import PROX
from programs import Programs, assert_one_line, free_port, port_is_free, run_folder, sha_of, state_of

pytestmark = pytest.mark.e2e


class Federation:
    """A port, the client that stays, and how to start the others there."""

    def __init__(self, faces, programs):
        self.faces, self.programs, self.port = faces, programs, free_port()
        self.celeba = self.client("celeba", "celeba")
        self.runs_of_celeba = 0

    def client(self, dataset, name, *arguments):
        return self.programs.start(
            "flower-client", "--dataset", dataset, "--data-dir", self.faces.folder / "data" / dataset, "--name", name,
            "--site-seed", 1, "--server", f"127.0.0.1:{self.port}", *self.faces.cache, *arguments,
        )  # fmt: skip

    def server(self, *arguments):
        return self.programs.start(
            "flower-server", "--address", f"127.0.0.1:{self.port}", *self.faces.bare, "--no-mlflow", *arguments
        )

    def ended(self, server):
        """The server's end, which leaves no process and a free port."""
        ended = server.ended()
        server.assert_nothing_left()
        assert port_is_free(self.port)
        return ended

    def ledger(self, name):
        """What left that client in the newest run."""
        folder = self.programs.cwd / ".facefed" / "clients" / name / "egress"
        lines = (folder / f"{run_folder(self.programs.cwd).name}.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["kind"] == "sent"]


@pytest.fixture(scope="module")
def federation(faces, tmp_path_factory):
    programs = Programs(tmp_path_factory.mktemp("deployment"))
    yield Federation(faces, programs)
    programs.close()


def _model_bytes(run):
    """The shared parameters' size, counted in the checkpoint and not by the code that sends them."""
    from safetensors.numpy import load_file

    return sum(
        np.prod(t.shape, dtype=int) * 4 for t in load_file(run / "checkpoints" / "round-000002.safetensors").values()
    )


def test_separate_processes_give_the_simulations_model(simulated, federation):
    federation.celeba.wait_for("no server at .* yet; trying again")  # a client that comes first waits
    once = federation.client("vggface2", "vggface2", "--once")
    ended = federation.ended(federation.server())
    assert ended.code == 0, ended
    assert ended.err == ""
    assert sha_of(ended.out) == sha_of(simulated.ended.out)
    assert once.ended(60).code == 0
    once.assert_nothing_left()
    assert "the run is over" in once.out
    assert federation.celeba.process.poll() is None  # it stays
    run = run_folder(federation.programs.cwd)
    assert state_of(run)["round"] == 2
    best = state_of(run)["best_round"]
    for name in ("celeba", "vggface2"):
        ledger = federation.ledger(name)
        assert [(line["answer_to"], line["round"]) for line in ledger] == [
            ("join", 0), ("train", 1), ("train", 2), ("evaluate", 2), ("evaluate", best)
        ]  # fmt: skip
        for line in ledger:
            assert line["client"] == name
            assert line["num_bytes"] == sum(part["num_bytes"] for part in line["parts"])
            assert all(len(part["sha256"]) == 64 for part in line["parts"])
        for line in ledger[1:3]:
            [change] = [part for part in line["parts"] if part["num_bytes"] == _model_bytes(run)]
            assert change["dtype"] == "float32"
    _assert_reports(federation.programs, run)


def _assert_reports(programs, run):
    """Each site sees in its ledger that the server received what left; the last reply is in the server's record."""
    for arguments, counted in (
        ((), "5 replies, 4 equal, 1 not confirmed"), (("--server-run", run), "5 replies, 5 equal")
    ):  # fmt: skip
        ended = programs.run("facefed", "egress", "report", "--run", run.name, *arguments)
        assert (ended.code, ended.err) == (0, ""), ended
        totals = re.findall(r"^total: (5 replies), [\d,]+ bytes; (.*)$", ended.out, re.MULTILINE)
        assert [", ".join(found) for found in totals] == [counted] * 2


def test_the_next_server_on_the_same_port_finds_the_client_again(again, federation):
    """And FedProx in bfloat16 too gives the simulation's model.  Meanwhile the status page says who is in."""
    once, status = federation.client("vggface2", "vggface2", "--once"), free_port()
    server = federation.server("--strategy", "fedprox", *PROX, "--status-port", status)
    server.wait_for("2 of 2 clients are here")
    with urllib.request.urlopen(f"http://127.0.0.1:{status}/status.json", timeout=60) as answer:
        told = json.load(answer)
    assert (told["clients"]["here"], sorted(told["sites"])) == (2, ["celeba", "vggface2"])
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", status), timeout=60)
    ended = federation.ended(server)
    assert port_is_free(status)
    assert ended.code == 0, ended
    once.ended(60)
    assert len(federation.ledger("celeba")) == 5
    assert federation.celeba.out.count("the run is over") == 2
    assert again.ended.code == 0, again.ended
    assert sha_of(ended.out) == sha_of(again.ended.out)


def test_a_client_that_never_comes(federation):
    ended = federation.ended(federation.server("--join-timeout", 20))
    assert_one_line(ended, "flower-server", "1 of 2 clients joined", "here: celeba", "1 more", code=1)
    assert re.search(r"^waiting for clients: .*, [12] more needed \(10 s\)$", ended.out, re.MULTILINE)
    assert "joined: celeba" in ended.out


def test_two_clients_that_claim_one_name(federation):
    other = federation.client("vggface2", "celeba", "--state-dir", "other")
    ended = federation.ended(federation.server())
    other.kill()
    assert_one_line(ended, "flower-server", "two clients claim the name 'celeba'", "--name")


def _server_whose_client_dies(federation, *arguments):
    """A server that loses a client by kill -9 in the middle of a round.

    The deadline of a round is for the client that lives: on a busy machine each message to it can take half a minute.
    """
    dying = federation.client("vggface2", "vggface2")
    dying.wait_for("no server at")
    server = federation.server("--rounds", 6, "--set", "federation.round_timeout_s=120", *arguments)
    server.wait_for("joined: celeba")  # with one client needed the first round may begin without it
    dying.wait_for(r"round \d: training")
    dying.signal(signal.SIGKILL)
    dying.process.wait()
    dying.assert_nothing_left(60)  # Flower's own helper looks for its parent only between calls that it repeats
    return server


def test_a_killed_client_costs_its_reply_only(federation):
    ended = federation.ended(_server_whose_client_dies(federation, "--min-clients", 1))
    assert ended.code == 0, ended
    assert re.search(r"^left out in round \d: vggface2: ", ended.out, re.MULTILINE)
    assert "round 6 of 6: 1 clients" in ended.out
    assert re.search(r"^replies left out: [12] \(see ", ended.out, re.MULTILINE)
    assert state_of(run_folder(federation.programs.cwd))["round"] == 6


def test_a_killed_client_that_is_needed_ends_the_run(federation):
    ended = federation.ended(_server_whose_client_dies(federation, "--min-clients", 2, "--join-timeout", 40))
    run = run_folder(federation.programs.cwd)
    assert_one_line(
        ended, "flower-server", "1 of 2 clients", "missing: vggface2, which was here before", f"--resume {run}", code=1
    )
    assert state_of(run)["round"] >= 0


def test_sigterm_ends_the_client_that_stayed(federation):
    federation.celeba.signal(signal.SIGTERM)
    ended = federation.celeba.ended(30)
    assert ended.code == 130
    assert ended.err.startswith("flower-client: stopped")
    federation.celeba.assert_nothing_left()

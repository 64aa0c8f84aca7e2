"""Our SuperExec: whom it admits and turns out, which run it starts, and that no command line holds a secret."""

import hashlib
import subprocess
import sys
from types import SimpleNamespace

import httpx
import pytest
from flwr.proto.control_pb2 import ListRunsResponse, StartRunResponse
from flwr.proto.run_pb2 import Run, RunStatus

from common.system.certs import read_public_key
from common.system.files import write_json
from server.flower import superexec as superexec_module
from server.flower.superexec import Register, Superexec
from server.flower.superlink import (
    APP_ENDED,
    BUNDLE,
    REFUSAL,
    RUN_ENDED,
    RUN_ID,
    SUBMISSION,
    read_nodes,
    write_nodes,
    write_secret,
)
from simulation.admin import certs as new_certs

TOKEN = "ab" * 128


class Superlink:
    """Stands in for the SuperLink's Control interface: the nodes that it knows."""

    def __init__(self):
        self.nodes, self.stopped, self.refuses = {}, [], False

    def ListNodes(self, _):  # noqa: N802 - protobuf's names
        return SimpleNamespace(nodes_info=list(self.nodes.values()))

    def RegisterNode(self, request):  # noqa: N802
        if self.refuses:
            answer = httpx.Response(409, text="already in use", request=httpx.Request("POST", "http://a"))
            raise httpx.HTTPStatusError("no", request=answer.request, response=answer)
        if any(node.public_key == request.public_key for node in self.nodes.values() if node.status != "unregistered"):
            raise AssertionError("registered twice")
        node = SimpleNamespace(
            node_id=len(self.nodes) + 1, public_key=request.public_key, name=request.name, status="registered"
        )
        self.nodes[node.node_id] = node
        return node

    def UnregisterNode(self, request):  # noqa: N802
        self.nodes[request.node_id].status = "unregistered"

    def StopRun(self, request):  # noqa: N802
        self.stopped.append(request.run_id)

    def accepted(self):
        return [node.name for node in self.nodes.values() if node.status != "unregistered"]


@pytest.fixture
def tls(tmp_path):
    new_certs.make_folder(tmp_path / "tls", ["localhost"], ["celeba", "vggface2"])
    return tmp_path / "tls"


def register(superlink, tls):
    return Register(superlink, tls / "clients")


def test_keys_are_admitted_and_turned_out_as_their_files_come_and_go(tls):
    superlink = Superlink()
    kept = register(superlink, tls)
    kept.look()
    assert superlink.accepted() == ["celeba", "vggface2"]
    new_certs.revoke_client(tls, "celeba")
    new_certs.add_client(tls, "north")
    kept.look()
    kept.look()
    assert superlink.accepted() == ["vggface2", "north"]
    assert len(superlink.nodes) == 3


def test_whose_a_node_is_stands_in_a_file_as_long_as_its_key_is_accepted(tls, tmp_path):
    superlink = Superlink()
    kept = register(superlink, tls)
    kept.told = lambda names: write_nodes(tmp_path / "nodes.json", names)
    kept.look()
    assert read_nodes(tmp_path / "nodes.json") == {1: "celeba", 2: "vggface2"}
    new_certs.revoke_client(tls, "celeba")
    kept.look()
    assert read_nodes(tmp_path / "nodes.json") == {2: "vggface2"}


def test_a_node_that_somebody_else_registered_goes_and_is_told(tls, caplog):
    superlink = Superlink()
    kept = register(superlink, tls)
    kept.look()
    superlink.RegisterNode(SimpleNamespace(public_key=b"nobody's", name="sneaky"))
    kept.look()
    kept.look()
    assert superlink.accepted() == ["celeba", "vggface2"]
    assert caplog.text.count("node 3 was registered by somebody else") == 1


def test_a_site_that_somebody_else_turned_out_is_admitted_anew(tls, tmp_path, caplog):
    superlink = Superlink()
    kept = register(superlink, tls)
    kept.told = lambda names: write_nodes(tmp_path / "nodes.json", names)
    kept.look()
    superlink.UnregisterNode(SimpleNamespace(node_id=1))
    kept.look()
    kept.look()
    assert superlink.accepted() == ["vggface2", "celeba"]
    assert read_nodes(tmp_path / "nodes.json") == {2: "vggface2", 3: "celeba"}
    assert caplog.text.count("somebody else took the key of celeba out of the SuperLink") == 1


def test_where_there_are_no_keys_yet_there_is_a_file_that_says_so(tls, tmp_path):
    """Without the file nodes have no keys, and whoever connects may join."""
    for path in (tls / "clients").iterdir():
        path.unlink()
    kept = register(Superlink(), tls)
    kept.told = lambda names: write_nodes(tmp_path / "nodes.json", names)
    assert read_nodes(tmp_path / "nodes.json") is None
    kept.look()
    assert read_nodes(tmp_path / "nodes.json") == {}
    assert (tmp_path / "nodes.json").stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_no_key_keeps_nobody_from_being_turned_out(tls, caplog):
    superlink = Superlink()
    kept = register(superlink, tls)
    kept.look()
    (tls / "clients" / "celeba.pub").write_text("")
    kept.look()
    kept.look()
    assert superlink.accepted() == ["vggface2"]
    assert caplog.text.count("is not a P-384 public key") == 1


def test_whom_a_database_knows_from_before_is_judged_anew(tls):
    superlink = Superlink()
    register(superlink, tls).look()
    new_certs.revoke_client(tls, "celeba")
    register(superlink, tls).look()
    assert superlink.accepted() == ["vggface2"]
    assert len(superlink.nodes) == 2


def test_a_key_that_the_superlink_refuses_is_told_once(tls, caplog):
    superlink = Superlink()
    superlink.refuses = True
    kept = register(superlink, tls)
    kept.look()
    kept.look()
    assert caplog.text.count("refuses the key of celeba (already in use)") == 1


# ---- tasks


class Found(SimpleNamespace):
    def HasField(self, _):  # noqa: N802
        return self.task is not None


@pytest.fixture
def superexec(tmp_path, monkeypatch):
    write_secret(tmp_path)
    made = Superexec(tmp_path, "127.0.0.1:9", None, None)
    made._control, made.started = Superlink(), []
    made._runtime = SimpleNamespace(tasks=[], AcquireTask=lambda _: made._runtime.tasks.pop(0))

    def start(command, **_):
        made.started.append(command)
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(superexec_module, "start", start)
    return made


def task(run):
    return Found(task=SimpleNamespace(run_id=run, task_id=5), token=TOKEN)


def test_no_task_is_taken_before_our_run_is_known(superexec):
    superexec._runtime.tasks = [task(7)]
    superexec.take_task()
    assert len(superexec._runtime.tasks) == 1


def test_our_run_is_started_without_its_token_in_the_command_line(superexec, tmp_path):
    (tmp_path / RUN_ID).write_text("7")
    superexec._runtime.tasks = [task(7), Found(task=None, token="")]
    superexec.take_task()
    [command] = superexec.started
    path = tmp_path / "task-5.token"
    assert command[command.index("--token-file") + 1] == str(path)
    assert not [word for word in command if TOKEN in word]
    assert (path.read_text(), path.stat().st_mode & 0o777) == (TOKEN, 0o600)
    assert not (tmp_path / APP_ENDED).exists()
    [(app, _)] = superexec._apps
    app.wait(60)
    superexec.take_task()
    assert not path.exists()
    assert (tmp_path / APP_ENDED).exists()  # flower-server looks for it: Flower tells of a killed one after a minute
    write_secret(tmp_path)  # the run goes on
    assert not (tmp_path / APP_ENDED).exists()


def test_a_task_that_flower_gives_again_is_started_again_and_its_former_app_ended(
    superexec, tmp_path, monkeypatch, caplog
):
    """A busy machine: the token of a ServerApp that was not heard of within half a minute is void."""

    def start(command, **_):
        superexec.started.append(command)
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)

    monkeypatch.setattr(superexec_module, "start", start)
    (tmp_path / RUN_ID).write_text("7")
    again = task(7)
    again.token = "another"
    superexec._runtime.tasks = [task(7), again]
    superexec.take_task()
    [(former, path)] = superexec._apps
    superexec.take_task()
    [(app, path_again)] = superexec._apps
    assert former.poll() is not None
    assert app.poll() is None
    app.kill()
    app.wait(60)
    assert (path_again, path.read_text()) == (path, "another")
    assert len(superexec.started) == 2
    assert not (tmp_path / APP_ENDED).exists()
    assert "is started again" in caplog.text


@pytest.fixture
def bundle(tmp_path):
    (tmp_path / BUNDLE / "app").mkdir(parents=True)
    (tmp_path / BUNDLE / "app" / "__init__.py").write_text("app = 1\n")
    (tmp_path / BUNDLE / "pyproject.toml").write_text(
        '[project]\nname = "a"\nversion = "1.0.0"\nlicense = "Apache-2.0"\ndependencies = []\n[tool.flwr.app]\n'
        'publisher = "a"\nfab-include = ["app/**/*.py"]\n[tool.flwr.app.components]\nserverapp = "app:app"\n'
        'clientapp = "app:app"\n'
    )


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
@pytest.mark.usefixtures("bundle")
def test_the_bundle_is_submitted_once_when_flower_server_says_so(superexec, tmp_path):
    submitted = []

    def start_run(request):
        submitted.append(request)
        return StartRunResponse(run_id=7)

    superexec._control.StartRun = start_run
    superexec.submit()
    assert submitted == []
    write_json(tmp_path / SUBMISSION, {"settings": "{}"})
    superexec.submit()
    superexec.submit()
    assert (tmp_path / RUN_ID).read_text() == "7"
    [request] = submitted
    assert request.override_config["settings"].string == "{}"
    assert request.fab.hash_str == hashlib.sha256(request.fab.content).hexdigest()


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
@pytest.mark.usefixtures("bundle")
def test_a_bundle_that_flower_refuses_is_told_to_flower_server(superexec, tmp_path):
    write_json(tmp_path / SUBMISSION, {})
    superexec._control.StartRun = lambda _: StartRunResponse()
    superexec.submit()
    assert "a bundle of" in (tmp_path / REFUSAL).read_text()
    (tmp_path / REFUSAL).unlink()

    def refuse(_):
        answer = httpx.Response(400, text="no such key", request=httpx.Request("POST", "http://a"))
        raise httpx.HTTPStatusError("no", request=answer.request, response=answer)

    superexec._control.StartRun = refuse
    superexec.submit()
    assert (tmp_path / REFUSAL).read_text() == "no such key"
    assert not (tmp_path / RUN_ID).exists()


def status_error(code):
    answer = httpx.Response(code, text="not now", request=httpx.Request("POST", "http://a"))
    return httpx.HTTPStatusError("no", request=answer.request, response=answer)


def raising(error):
    def call(_):
        raise error

    return call


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
@pytest.mark.usefixtures("bundle")
def test_a_superlink_that_is_starting_or_busy_refuses_nothing(superexec, tls, tmp_path, caplog):
    """As Flower's own retries had it: the next look asks again."""
    write_json(tmp_path / SUBMISSION, {})
    superexec._control.StartRun = raising(status_error(503))
    with pytest.raises(httpx.HTTPStatusError):
        superexec.submit()
    assert not (tmp_path / REFUSAL).exists()

    superlink = Superlink()
    superlink.RegisterNode = raising(status_error(503))
    with pytest.raises(httpx.HTTPStatusError):
        register(superlink, tls).look()
    assert "refuses" not in caplog.text


def test_it_looks_again_after_a_broken_connection_and_ends_where_it_is_not_wanted(superexec, monkeypatch):
    errors = [httpx.ConnectError("not yet"), status_error(503), httpx.ReadError("cut"), status_error(401)]
    monkeypatch.setattr(superexec_module, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(superexec, "look", lambda: raising(errors.pop(0))(None))
    with pytest.raises(httpx.HTTPStatusError) as ended:
        superexec.serve()
    assert (ended.value.response.status_code, errors) == (401, [])


def test_a_run_that_flower_takes_for_ended_is_told_to_flower_server(superexec, tmp_path, caplog):
    status = RunStatus(status="running")
    superexec._control.ListRuns = lambda _: ListRunsResponse(run_dict={7: Run(run_id=7, status=status)})
    superexec.ask_status()
    (tmp_path / RUN_ID).write_text("7")
    superexec.ask_status()
    assert not (tmp_path / RUN_ENDED).exists()
    status = RunStatus(status="finished", sub_status="failed")
    superexec.ask_status()
    assert (tmp_path / RUN_ENDED).read_text() == "finished:failed"

    def lost(_):
        raise httpx.ConnectError("no way")

    superexec._control.ListRuns = lost
    superexec.ask_status()
    assert "the run's status is unknown: no way" in caplog.text


def test_a_run_that_somebody_else_submitted_is_stopped_and_not_started(superexec, tmp_path, caplog):
    (tmp_path / RUN_ID).write_text("7")
    superexec._runtime.tasks = [task(77)]
    superexec.take_task()
    assert superexec.started == []
    assert superexec._control.stopped == [77]
    assert "run 77 was not submitted by this flower-server" in caplog.text


def test_a_key_travels_as_flower_compares_it(tls):
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key

    superlink = Superlink()
    register(superlink, tls).look()
    key = next(node.public_key for node in superlink.nodes.values() if node.name == "celeba")
    assert bytes_to_public_key(key) == read_public_key(tls / "clients" / "celeba.pub")

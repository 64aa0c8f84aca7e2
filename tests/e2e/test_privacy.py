"""Nothing leaves the machine: whole federations without an outside, and each address that any process asks for.

Everything runs in an environment without CI's, pytest's and the telemetries' variables: MLflow falls silent by itself
where it sees some of them, and here our programs must do it.
"""

import contextlib
import itertools
import json
import shutil
import sqlite3

import numpy as np
import pytest
from isolation import OUTSIDE, Island, asked, bare_environment, families, outside, recorder, require
from programs import Programs, mlflow_status
from sealed_runs import LOG, PERSON, Sealed, deploy, name_people, simulate
from stored import holding, stored

from common.faces.pack import load_pack
from common.system.runtime import SILENCE

pytestmark = pytest.mark.e2e
USER = "privacyprobe"  # the account that trains
PLOTS = {
    "client_comparison", "clients", "confusion", "convergence", "det", "embeddings", "roc", "score_histograms",
    "training",
}  # fmt: skip
SUFFIXES = {"", "json", "md", "png", "pt2", "toml", "txt", "yaml"}  # "" is MLmodel; arrays: npy, npz, pt, csv ...
OF_WANDB = "wandb/"  # what an imported run brings is its user's own

# Names OUTSIDE and loopback in each of the calls that are recorded, and a resolver of this machine.
ASKS = f"""
import contextlib, socket
for family, address in (
    (socket.AF_INET, "{OUTSIDE}"), (socket.AF_INET6, "2001:db8::1"), (socket.AF_INET, "127.0.0.1"),
    (socket.AF_INET6, "::1"), (socket.AF_INET6, "::ffff:127.0.0.1"), (socket.AF_INET6, "::ffff:{OUTSIDE}"),
):
    with socket.socket(family, socket.SOCK_DGRAM) as asker:
        for call in (asker.bind, asker.connect, lambda to: asker.sendto(b"x", to), lambda to: asker.sendmsg([b"x"], [], 0, to)):
            with contextlib.suppress(OSError):
                call((address, 9))
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker:
    asker.connect(("127.0.0.53", 53))
with socket.socket() as listener:
    listener.bind(("0.0.0.0", 0))
"""  # noqa: E501
REPORTS = """
import threading
{first}
from mlflow import MlflowClient
MlflowClient("sqlite:///copy.db").create_experiment("anything")
for thread in threading.enumerate():
    if thread.name == "GetTelemetryConfig":
        thread.join()
"""


@pytest.fixture(scope="module")
def environment():
    made = bare_environment(USER=USER, LOGNAME=USER)
    assert not set(made) & {*SILENCE, "CI", "PYTEST_CURRENT_TEST"}
    return made


@pytest.fixture(scope="module")
def island():
    require("strace")
    with contextlib.closing(Island()) as made:
        yield made


@pytest.fixture(scope="module")
def people(faces, tmp_path_factory):
    return name_people(faces.vggface2, tmp_path_factory.mktemp("people"))


@pytest.fixture(scope="module")
def simulation(faces, people, island, environment, tmp_path_factory):
    sealed = Sealed(programs=Programs(tmp_path_factory.mktemp("sealed")), artifacts="mlruns")
    what = ("--client", f"celeba={faces.celeba}", "--client", f"people:folder={people}", *faces.small)
    with contextlib.closing(sealed.programs):
        simulate(sealed, what, island, environment)
        yield sealed


@pytest.fixture(scope="module")
def deployment(faces, people, island, environment, tmp_path_factory, with_tables):
    made = Sealed(programs=Programs(tmp_path_factory.mktemp("deployment")), artifacts="mlartifacts")
    with_tables(made.cwd)
    with contextlib.closing(made.programs):
        deploy(made, faces, people, island, environment)
        yield made


def query(sealed, question, *values):
    with sqlite3.connect(sealed.cwd / "mlflow.db") as database:
        rows = database.execute(question, values).fetchall()
    database.close()
    return rows


def assert_every_point_is_stored(sealed, experiment):
    """The federated run and its clients, against the run's own record."""
    of_run = "from metrics join runs using (run_uuid) join experiments using (experiment_id) where experiments.name = ?"
    [(count,)] = query(sealed, f"select count(*) {of_run}", experiment)
    [spool] = [path for path in sealed.cwd.glob("runs/*/spool.jsonl") if experiment in path.read_text()]
    lines = [json.loads(line) for line in spool.read_text().splitlines()]
    points = [(line["run"], line["key"], line["step"], line["time_ms"]) for line in lines if "key" in line]
    assert count == len(set(points)) > 200
    steps = {step for (step,) in query(sealed, f"select step {of_run} and key = 'val_roc_auc'", experiment)}
    assert steps == {0, 1, 2}


def test_a_simulation_succeeds_whole_without_an_outside(simulation):
    assert [ended.code for ended in simulation.ended.values()] == [0], simulation.ended
    assert set(mlflow_status(simulation.cwd).values()) == {"FINISHED"}
    assert_every_point_is_stored(simulation, "facial_recognition_federated_fedavg")
    assert query(simulation, "select name, version from model_versions order by version") == [
        ("cnn_federated_fedavg", 1)  # the best round is the last one
    ]


def test_separate_processes_and_a_tracking_server_succeed_without_an_outside(deployment):
    expected = {"serve": 130, "astray": 1}
    assert not {name: ended for name, ended in deployment.ended.items() if ended.code != expected.get(name, 0)}
    assert query(deployment, "select distinct status from runs where lifecycle_stage = 'active'") == [("FINISHED",)]
    assert_every_point_is_stored(deployment, "facial_recognition_federated_fedavg")
    assert query(deployment, "select name, version from model_versions order by name, version") == [
        ("cnn_federated_fedavg", 1), ("people_vit_tiny_local", 1), ("people_vit_tiny_local", 2)
    ]  # fmt: skip


def test_the_island_has_no_outside(island, deployment):
    """The control: a stranger's program and one of ours do not get out of it."""
    code = f"import socket; socket.create_connection(('{OUTSIDE}', 80))"
    ended = deployment.programs.start("python", "-c", code, wrapper=island.wrapper).ended()
    assert ended.code != 0
    assert "Network is unreachable" in ended.err
    assert (
        f"http://{OUTSIDE}:5000 is not healthy ([Errno 101] Network is unreachable)" in deployment.ended["astray"].out
    )


def test_no_process_of_a_simulation_asks_for_another_machine(simulation):
    """Ray's gRPC server, its raylet, its agents and its workers too; and none of them lets another machine in."""
    log = simulation.cwd / LOG
    found = asked(log)
    assert not outside(found)
    assert families(log) <= {"AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_UNSPEC"}
    assert {one.call for one in found} >= {"connect", "bind"}
    assert len({one.line.split()[0] for one in found}) > 5  # threads of many processes


@pytest.mark.parametrize("name", ["serve", "server", "celeba", "people", "local", "wandb", "doctor"])
def test_no_other_program_asks_for_another_machine(deployment, name):
    log = deployment.cwd / f"{name}-{LOG}"
    found = asked(log)
    assert not outside(found)
    assert found
    assert families(log) <= {"AF_INET", "AF_INET6", "AF_UNIX", "AF_NETLINK", "AF_UNSPEC"}


def test_drawing_people_asks_nobody(deployment):
    assert not asked(deployment.cwd / f"synth-{LOG}")


def test_the_record_shows_who_asks_for_another_machine(deployment, island, tmp_path):
    """The control of the record: each call, each kind of address, a resolver on loopback, our doctor gone astray."""
    assert any(OUTSIDE in line for line in outside(asked(deployment.cwd / f"astray-{LOG}")))
    log = tmp_path / LOG
    program = deployment.programs.start("python", "-c", ASKS, wrapper=[*island.wrapper, *recorder(log)])
    assert program.ended().code == 0
    program.assert_nothing_left(60)
    found = outside(asked(log))
    calls = ("bind(", "connect(", "sendto(", "sendmsg(")
    for address, call in itertools.product((f'"{OUTSIDE}"', '"2001:db8::1"', f'"::ffff:{OUTSIDE}"'), calls):
        assert [line for line in found if address in line and call in line], (address, call)
    assert sum("127.0.0.53" in line for line in found) == 1
    assert sum('"0.0.0.0"' in line for line in found) == 1
    assert not [line for line in found if '"127.0.0.1"' in line or '"::1"' in line or '"::ffff:127.0.0.1"' in line]
    assert len(asked(log)) > len(found)


def test_telemetry_would_be_seen_and_our_silence_stops_it(simulation, island, environment, programs, tmp_path):
    """MLflow alone asks for its makers' server at the first experiment; after `go_silent` it does not."""
    seen = {}
    shutil.copy(simulation.cwd / "mlflow.db", tmp_path / "copy.db")
    for name, first in (("loud", ""), ("silent", "from common.system.runtime import go_silent; go_silent()")):
        log = tmp_path / f"{name}.log"
        wrapper = [*island.wrapper, *recorder(log)]
        code = REPORTS.format(first=first).replace("anything", name)
        program = programs.start("python", "-c", code, wrapper=wrapper, environment=environment)
        assert program.ended().code == 0, program.ended()
        program.assert_nothing_left(60)
        seen[name] = outside(asked(log))
    assert seen["loud"]
    assert not seen["silent"]


def test_telemetry_is_off_in_every_child_process(simulation, deployment):
    """Seen while they ran; Ray's two agents write their titles over their environment, which is the raylet's."""
    unreadable = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}
    for name, command, variables in (*simulation.below, *deployment.below):
        if command.strip() not in unreadable:
            assert {key: variables.get(key) for key in SILENCE} == dict(SILENCE), (name, command)
    commands = "\n".join(command for _, command, _ in (*simulation.below, *deployment.below))
    for part in (
        "gcs_server", "raylet", "ray::ClientAppActor", "-m mlflow", "uvicorn", "-m server.flower.redelivery",
        "-m server.flower.superexec", "flwr-serverapp", "-m clients.flower.supernode", "-m clients.flower.trainer",
    ):  # fmt: skip
        assert part in commands, commands
    assert '"disable_ui_telemetry":true' in deployment.ended["ui"].out.replace(" ", "").replace("\\n", "")


def test_no_person_and_no_picture_is_named_in_mlflow(simulation, deployment, simulated, faces):
    for run in (simulation, deployment):
        everything = stored(run.cwd / "mlflow.db", run.cwd / run.artifacts)
        assert not holding([PERSON, USER], everything)
        assert holding(["facial_recognition_federated_fedavg", "val_roc_auc"], everything)
    pictures = {path.name for path in (*faces.celeba.rglob("*.jpg"), *faces.vggface2.rglob("*.jpg"))}
    named = {path.name for path in faces.vggface2.glob("*/*") if path.is_dir()}
    assert (len(pictures) > 100, len(named)) == (True, 12)
    assert not holding(pictures | named, stored(simulated.cwd / "mlflow.db", simulated.cwd / "mlruns"))


def pixels(faces):
    """A telling piece of each picture's file, and of some aligned pixels as they are kept and as models see them."""
    for path in (*faces.celeba.rglob("*.jpg"), *faces.vggface2.rglob("*.jpg")):
        content = path.read_bytes()
        yield content[len(content) // 2 :][:64]
    for path in (faces.folder / "packs").glob("*/manifest.json"):
        pack = load_pack(path.parent)
        for picture in pack.pictures[np.arange(len(pack))]:
            row = picture[16]
            if len(np.unique(row[:, 0])) > 8:  # no plain background
                yield row.tobytes()
                yield row[:, 0].tobytes()
                yield (row[:, 0].astype(np.float32) / 127.5 - 1).tobytes()


def test_no_picture_and_no_embedding_is_in_mlflow(simulation, deployment, faces):
    pieces = list(pixels(faces))
    assert len(pieces) > 192 + 3 * 8
    for run in (simulation, deployment):
        everything = stored(run.cwd / "mlflow.db", run.cwd / run.artifacts)
        assert not holding(pieces, everything)
        files = [path for path in (run.cwd / run.artifacts).rglob("*") if path.is_file() and "/wandb/" not in str(path)]
        own = [
            path for path in files if path.name not in ("extra.txt", "wandb-summary.json") and "media" not in path.parts
        ]
        assert {path.suffix[1:] for path in own} <= SUFFIXES
        assert {path.stem for path in own if path.suffix == ".png"} <= PLOTS
        for path in own:
            if path.name == "metrics.json":
                assert _longest_list(json.loads(path.read_text())) < 32  # an embedding has 32 numbers
            elif path.name == "input_example.json":
                assert abs(_likeness_of_neighbours(np.array(json.loads(path.read_text())))) < 0.2
    attention = list(deployment.cwd.glob("runs/*/plots/attention.png"))
    assert attention  # shows faces, was drawn, and stayed
    assert not holding([attention[0].read_bytes()[100:400]], everything)


def _longest_list(content):
    below = content.values() if isinstance(content, dict) else content if isinstance(content, list) else ()
    longest = len(content) if isinstance(content, list) else 0
    return max([longest, *map(_longest_list, below)])


def _likeness_of_neighbours(pictures):
    """The correlation of each pixel with the one to its right: near 1 in a face, 0 in noise."""
    return np.corrcoef(pictures[..., :-1].ravel(), pictures[..., 1:].ravel())[0, 1]


def test_the_search_finds_what_is_planted(simulation, faces, tmp_path):
    """The control: a name in a tag, in any case, and in a path; pixels in a packed array; a face among noise."""
    shutil.copy(simulation.cwd / "mlflow.db", tmp_path / "mlflow.db")
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        [(run,)] = database.execute("select run_uuid from runs limit 1")
        database.execute("insert into tags values ('note', 'trained with ada ZENKGRAF 03', ?)", (run,))
    database.close()
    (tmp_path / "kept" / f"{PERSON}.txt").mkdir(parents=True)
    (tmp_path / "kept" / f"{PERSON}.txt" / "empty").touch()
    pieces = list(pixels(faces))
    np.savez_compressed(tmp_path / "kept" / "arrays.npz", np.frombuffer(b"before" + pieces[-3] + b"behind", np.uint8))
    everything = stored(tmp_path / "mlflow.db", tmp_path / "kept")

    places = [place for _, place in holding([PERSON], everything)]
    assert any(place.startswith("tags[") for place in places)
    assert f"name of {PERSON}.txt/empty" in places
    assert [place for _, place in holding(pieces, everything)] == ["arrays.npz!arr_0.npy"]
    [path] = itertools.islice(faces.celeba.rglob("*.jpg"), 1)
    from PIL import Image

    assert _likeness_of_neighbours(np.asarray(Image.open(path).convert("L"), dtype=float)) > 0.8
    assert _longest_list({"a": [{"b": [0.5] * 32}]}) == 32

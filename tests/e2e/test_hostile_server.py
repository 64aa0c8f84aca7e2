"""A server that was replaced by a hostile one, at a real `flower-client`: what it asks, and what it is told."""

import json
import os
import re
import signal
from pathlib import Path

import pytest
from hostile_server import ANSWERED, DONE, SITECUSTOMIZE
from programs import free_port, run_folder

pytestmark = pytest.mark.e2e
POLICY = "this site's policy does not allow it: "
REFUSED = {
    "imprint": f"{POLICY}model.patch_size (max_patch_fraction).",
    "crafted": f"{POLICY}model (first_model).",
    "rate": f"{POLICY}training.lr (max_lr).",
    "round": f"{POLICY}round (max_rounds).",
    "threads": f"{POLICY}threads (max_threads).",
    "precision": f"{POLICY}precision (max_threads).",
}


def test_a_real_client_answers_honest_tasks_only_and_shows_nothing_of_the_servers_words_as_its_own(faces, programs):
    here = programs.cwd / "hostile"
    here.mkdir()
    (here / "sitecustomize.py").write_text(SITECUSTOMIZE.format(folder=str(Path(__file__).parent)))
    port = free_port()
    server = programs.start(
        "flower-server", "--address", f"127.0.0.1:{port}", *faces.bare, "--min-clients", 1, "--no-mlflow",
        environment=os.environ | {"PYTHONPATH": str(here)},
    )  # fmt: skip
    client = programs.start(
        "flower-client", "--dataset", "celeba", "--data-dir", faces.folder / "data" / "celeba",
        "--server", f"127.0.0.1:{port}", *faces.cache,
    )  # fmt: skip
    assert DONE in server.ended().err
    told = json.loads((run_folder(programs.cwd) / "hostile.json").read_text())
    assert {name for name, reason in told.items() if reason == ANSWERED} == {"honest", "trained"}
    for name, reason in REFUSED.items():
        assert told[name].endswith(reason), (name, told[name])
    assert "no answer" not in told.values()

    client.signal(signal.SIGTERM)
    ended = client.ended(60)
    shown = ended.out + ended.err
    assert not re.search(r"^(joined: someone|SuperNode ID: 4242)", shown, re.MULTILINE)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", shown), shown
    assert shown.count("this site's policy does not allow it") == len(REFUSED)
    assert not [*programs.cwd.rglob("*outside*"), *programs.cwd.parent.glob("outside*")]
    records = programs.cwd / ".facefed" / "clients" / "celeba" / "policy"
    assert {path.stem for path in records.glob("*.json")} <= {"honest", *"abcdefgh"}

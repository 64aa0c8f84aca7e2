"""A site whose packing lasts longer than the join: both sides show how far it is, and the run is whole."""

import io
import json
import re
import sys

import numpy as np
import pytest
from PIL import Image
from programs import Programs, free_port, run_folder

pytestmark = pytest.mark.e2e
JOIN_TIMEOUT_S, SILENCE_S = 10, 60  # long enough to connect; and a site is heard of each 3 s
PEOPLE, EACH, SIDE = 12, 20, 2600  # 20 CPU-seconds of decoding, in four jobs of one worker
ON_ONE_CORE = (
    "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); os.execv(sys.argv[1], sys.argv[1:])"
)


@pytest.fixture
def programs(tmp_path):
    made = Programs(tmp_path)
    yield made
    made.close()


def write_large_pictures(folder):
    """Twelve people of one colourful picture each, 2600 px: megabytes to decode, kilobytes to write."""
    for who in range(PEOPLE):
        squares = np.random.default_rng(who).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(squares).resize((SIDE, SIDE), Image.Resampling.NEAREST).save(file, "PNG", compress_level=1)
        place = folder / f"person{who:02d}"
        place.mkdir(parents=True)
        for number in range(EACH):  # what follows the end of a PNG makes another file of it
            (place / f"{number}.png").write_bytes(file.getvalue() + bytes([number]))


def test_a_site_that_packs_for_longer_than_the_join_lasts_is_waited_for(faces, programs, tmp_path):
    write_large_pictures(tmp_path / "data" / "slow")
    port = free_port()
    client = programs.start(
        "flower-client", "--dataset", "folder", "--name", "slow", "--server", f"127.0.0.1:{port}", "--once",
        wrapper=(sys.executable, "-c", ON_ONE_CORE),
    )  # fmt: skip
    client.wait_for("no server at .* yet; trying again")
    server = programs.start(
        "flower-server", "--address", f"127.0.0.1:{port}", *faces.bare, "--no-mlflow", "--rounds", 1,
        "--min-clients", 1, "--join-timeout", JOIN_TIMEOUT_S, "--set", f"federation.silence_s={SILENCE_S}",
    )  # fmt: skip
    ended = server.ended()
    assert ended.code == 0, ended
    line = re.compile(
        r"^waiting for clients: nobody yet here, 1 more needed \(\d+ s\); slow: packing \d+ %", re.MULTILINE
    )
    assert line.search(ended.out), ended
    run = run_folder(tmp_path)
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    at = {event["kind"]: event["time"] for event in events if event["kind"] in ("begun", "joined")}
    assert at["joined"] - at["begun"] > JOIN_TIMEOUT_S, "it was packed before; this shows nothing"
    assert client.ended(60).code == 0
    lines = (tmp_path / ".facefed" / "clients" / "slow" / "egress" / f"{run.name}.jsonl").read_text().splitlines()
    sent = [line for line in map(json.loads, lines) if line["kind"] == "sent"]
    joins = [{part["name"].split(".")[0] for part in line["parts"]} for line in sent if line["answer_to"] == "join"]
    assert joins[0] == {"progress"}
    assert joins[-1] == {"site"}, "the last answer to join is the join"
    report = programs.run("facefed", "egress", "report", "--run", run.name, "--server-run", run)
    assert (report.code, report.err) == (0, ""), report
    assert "DIFFERS" not in report.out

"""docs/TUTORIAL.md: each of its commands, in its order, on one machine; each must do what the page says."""

import re
import shlex
import shutil
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import BARE
from programs import Programs, free_port
from warm import WarmPrograms

from tests.conftest import skip_or_fail
from tests.pages import commands, page

pytestmark = [pytest.mark.e2e, pytest.mark.shared, pytest.mark.timeout(1200)]

PEOPLE, EACH = 8, 8  # of a holder: a site trains on 20 pictures or more
HOST = "fl.example.org"
# What each command must have said, by its program and action.
SAYS = {
    "align": rf"faces of .*{PEOPLE * EACH} photographs",
    "audit": rf"{PEOPLE} people",
    "init": r"federation",
    "egress": r"^total: .*equal",
    "train": r"^registered: models:/cnn_local|untrained",
    "evaluate": r"^fedavg +0\.\d{3} ",
    "enrol": r"^enrolled: 2 new people",
    "identify": r"^face 1 of \d+ at ",
    "verify": r"score -?\d\.\d{3}",
}


@pytest.fixture
def afternoon(shared_faces, tmp_path, warm):
    """The folder of a reader: photographs of two holders, people to be known, three pictures, a small configuration."""
    if not shutil.which("nginx"):
        skip_or_fail("nginx is not installed")
    people = sorted(path for path in (shared_faces / "vggface2" / "train").iterdir() if path.is_dir())
    for holder, part in (("north", people[:PEOPLE]), ("south", people[PEOPLE : 2 * PEOPLE])):
        for person in part:
            _copy(sorted(person.iterdir())[:EACH], tmp_path / "photos" / holder / person.name)
    for person in people[:2]:
        _copy(sorted(person.iterdir())[:1], tmp_path / "people" / person.name)
    for name, person in (("photo.jpg", people[0]), ("a.jpg", people[0]), ("b.jpg", people[1])):
        shutil.copy(sorted(person.iterdir())[EACH], tmp_path / name)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.toml").write_text(BARE)
    made = WarmPrograms(tmp_path, warm)
    yield made
    made.close()


def _copy(files, folder: Path) -> None:
    folder.mkdir(parents=True)
    for file in files:
        shutil.copy(file, folder)


def typed(port: int) -> list[list[str]]:
    """The page's commands as this machine can do them."""
    text = page("TUTORIAL").replace(HOST, "localhost").replace(":8443", f":{port}")
    # Trained so shortly it may be no better than the untrained one, and then it is no champion, or confuses too many.
    text = text.replace("resnet18_federated_fedavg@champion", "cnn_federated_fedavg/1")
    lines = [shlex.split(line) for line in commands(text)]
    return [[*line, "--anyway"] if line[1] in ("identify", "verify") else line for line in lines]


def federated(programs: Programs, lines: list[list[str]]) -> None:
    """Server and clients, each started as in a terminal of its own."""
    server, *clients = [programs.start(*line) for line in lines]
    ended = server.ended()
    assert ended.code == 0, ended
    assert "model SHA-256" in ended.out
    for client in clients:
        assert client.ended(120).code == 0


def test_each_command_of_the_page_does_what_it_says(afternoon):
    together, seen = [], defaultdict(int)
    for line in typed(free_port()):
        if line[0] in ("flower-server", "flower-client"):
            together.append(line)
            if len(together) == 3:
                federated(afternoon, together)
            continue
        ended = afternoon.run(*line)
        assert ended.code == 0, (line, ended)
        action = next(word for word in line[1:] if word in SAYS)
        assert re.search(SAYS[action], ended.out, re.MULTILINE), (line, ended)
        seen[action] += 1
    assert set(seen) == set(SAYS)
    assert len(together) == 3

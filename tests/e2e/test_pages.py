"""README and the pages of docs/: their quick commands, typed in a folder like the one that `make demo` leaves.

The trainings and comparisons of docs/COMPARING.md are typed by test_evaluate.py, docs/TRACKING.md and docs/TUTORIAL.md
by tests of their own, and README's program by tests/integration/test_foreign_models.py.
"""

import shlex

import pytest
from conftest import SMALL
from programs import Programs

from tests.pages import commands_of

pytestmark = pytest.mark.e2e

QUICK = (
    ("DATA", "facefed data audit --client celeba"),
    ("DATA", "facefed data prepare"),
    ("WIRE", "facefed egress report --name celeba --state-dir"),
)
SAYS = {"audit": "celeba", "prepare": "celeba: packed as ", "report": "equal"}


@pytest.fixture(scope="module")
def after_the_demo(faces, simulated, tmp_path_factory):
    """A configuration called demo, the data sets under their usual names, and a simulation's runs."""
    assert simulated.ended.code == 0, simulated.ended
    programs = Programs(tmp_path_factory.mktemp("pages"))
    (programs.cwd / "configs").mkdir()
    (programs.cwd / "configs" / "demo.toml").write_text(SMALL)
    for name, target in (("data", faces.folder / "data"), ("runs", simulated.cwd / "runs")):
        (programs.cwd / name).symlink_to(target)
    yield programs
    programs.close()


@pytest.mark.parametrize(
    "line", dict.fromkeys(line for page, start in QUICK for line in commands_of(page, start)), ids=str
)
def test_it_does_what_the_page_says(after_the_demo, line):
    program, *arguments = shlex.split(line)
    ended = after_the_demo.run(program, *arguments)
    assert ended.code == 0, ended
    assert SAYS[arguments[1]] in ended.out

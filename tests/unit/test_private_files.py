"""What our programs write is closed to the machine's other accounts, and what they wrote before that is told."""

import argparse
import ast
import io
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from clients.cli import parser as client_parser
from common import config
from common.system.console import run_program, warn_of_open_files
from common.system.files import open_to_others, private_files
from server.cli import parser as server_parser
from simulation import cli
from simulation.admin import doctor
from simulation.cli import facefed_parser, simulation_parser
from tests.another_account import as_another_account

ROOT = Path(__file__).resolve().parents[2]
READ = """
import sys
for name in sys.argv[1:]:
    try:
        print(open(name).read())
    except PermissionError:
        print("kept out")
"""


@pytest.fixture
def reached():
    """A folder that every account can enter, under the usual umask."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's own are closed
    folder.chmod(0o755)
    before = os.umask(0o022)
    yield folder
    os.umask(before)
    shutil.rmtree(folder)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def write(folder):
    """A file of ours and one of a child, in folders that they make; as MLflow and Flower's programs do."""
    (folder / "ours").mkdir()
    (folder / "ours" / "file").write_text("a face")
    child = "import pathlib; p = pathlib.Path('child'); p.mkdir(); (p / 'file').write_text('a face')"
    subprocess.run([sys.executable, "-c", child], cwd=folder, check=True)
    return 0


def modes(folder):
    return {oct(mode(path)) for path in folder.rglob("*") if path.is_file()}, {
        oct(mode(path)) for path in folder.rglob("*") if path.is_dir()
    }


def test_a_programs_files_and_its_childrens_are_its_accounts_alone(reached):
    assert run_program("prog", lambda: write(reached), io.StringIO()) == 0
    assert modes(reached) == ({"0o600"}, {"0o700"})
    (reached / "after").touch()
    assert mode(reached / "after") == 0o644  # in this process the umask is as before


def test_shared_files_have_the_usual_umask(reached):
    assert run_program("prog", lambda: write(reached), io.StringIO(), shared_files=True) == 0
    assert modes(reached) == ({"0o644"}, {"0o755"})


def test_another_account_reads_what_is_shared_and_nothing_else(reached):
    for name, shared in (("closed", False), ("open", True)):
        (reached / name).mkdir()
        run_program("prog", lambda name=name: write(reached / name), io.StringIO(), shared_files=shared)
    said = as_another_account(READ, *(reached / name / "ours" / "file" for name in ("closed", "open")))
    assert said.split("\n")[:2] == ["kept out", "a face"]


@pytest.mark.parametrize("file", ["server/cli.py", "clients/cli.py", "simulation/cli.py"])
def test_every_door_ends_in_run_program_and_tells_it_what_is_shared(file):
    mains = [node for node in ast.parse((ROOT / file).read_text("utf-8")).body if isinstance(node, ast.FunctionDef)]
    mains = [node for node in mains if node.name.startswith("main")]
    assert mains
    for main in mains:
        call = main.body[-1].value
        assert call.func.id == "run_program"
        assert [keyword.arg for keyword in call.keywords] == ["shared_files"]


def _leaves(parser):
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [leaf for action in below for each in action.choices.values() for leaf in _leaves(each)] or [parser]


def test_every_program_that_writes_has_the_flag():
    """All but keys and galleries, which are nobody else's, and what only reads."""
    programs = [leaf for parser in (server_parser, client_parser, simulation_parser, facefed_parser)
                for leaf in _leaves(parser())]  # fmt: skip
    without = {each.prog for each in programs if "--shared-files" not in each.format_help()}
    assert without == {
        *(f"facefed certs {name}" for name in ("init", "add", "revoke", "renew", "key")),
        *(f"facefed {name}" for name in ("gallery list", "gallery remove", "identify", "serve")),
        "facefed k8s render",
        "facefed egress report",
        "facefed privacy report",
        "facefed policy show",
        "facefed completion",
        *(f"facefed data packs {name}" for name in ("list", "remove")),
    }


def test_data_synth_shares_only_when_told(reached):
    for name, flags in (("closed", []), ("open", ["--shared-files"])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cli, "go_silent", lambda: None)  # it changes the process
            made = ["data", "synth", "--layout", "vggface2", "--people", "6", "--pictures", "2"]
            assert cli.main([*made, "--out", str(reached / name), *flags]) == 0
    assert modes(reached / "closed") == ({"0o600"}, {"0o700"})
    assert modes(reached / "open") == ({"0o644"}, {"0o755"})


# -- made before -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_folder", "above", "words"),
    [
        (0o700, 0o755, ""),
        (0o755, 0o755, "read"),
        (0o750, 0o755, "read"),
        (0o777, 0o755, "read and change"),
        (0o755, 0o700, ""),  # nobody has a way to it
        (0o755, 0o711, "read"),
        (0o705, 0o710, ""),  # the group has a way, but no permission there
        (0o750, 0o710, "read"),
    ],
)
def test_a_folder_is_open_where_others_may_and_have_a_way_to_it(reached, of_folder, above, words):
    folder = reached / "runs"
    folder.mkdir()
    folder.chmod(of_folder)
    reached.chmod(above)
    line = open_to_others([folder, reached / "missing"])
    assert bool(line) == bool(words)
    if words:
        assert line.startswith(f"other accounts can {words} {folder} (mode {of_folder:04o}); close that: chmod -R go= ")


def test_the_line_says_what_to_do_and_that_closes_it(reached):
    names = [reached / "runs", reached / "two words"]
    for name in names:
        name.mkdir()
        (name / "people").touch()
    err = io.StringIO()
    warn_of_open_files("flower-client", names, err)
    [line] = err.getvalue().splitlines()
    assert line.startswith("flower-client: warning: other accounts can read ")
    command = line.partition("close that: ")[2].partition(" (or give --shared-files")[0]
    subprocess.run(command, shell=True, check=True)  # noqa: S602 - as the user would paste it
    assert open_to_others(names) == ""
    assert mode(names[1] / "people") == 0o600
    assert (mode(names[0]) & 0o700) == 0o700


def test_the_doctor_notes_it(reached):
    settings, _ = config.load_with_address(None, {("tracking", "enabled"): False})

    def found(**how):
        [finding] = [
            finding
            for finding in doctor.examine(settings, dict(os.environ), reached, **how)
            if finding.name == "other accounts"
        ]
        return finding

    assert found().state == doctor.OK
    (reached / ".facefed").mkdir()
    (reached / "runs").mkdir()
    assert found().state == doctor.NOTE
    assert f"chmod -R go= {reached}/runs {reached}/.facefed" in found().text
    assert found(shared_files=True).state == doctor.OK


def test_private_files_can_be_nested(reached):
    with private_files():
        with private_files(shared=True):
            (reached / "inner").touch()
        (reached / "outer").touch()
    assert (mode(reached / "inner"), mode(reached / "outer")) == (0o600, 0o600)

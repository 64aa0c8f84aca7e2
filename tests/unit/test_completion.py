"""`facefed completion`: the scripts name every command, option and value that the parsers know."""

import subprocess

import pytest

import clients.cli
import server.cli
import simulation.cli
from common.models.table import BACKBONES
from common.strategies import STRATEGIES
from simulation.admin.completion import SHELLS, commands_of, completion_script

PARSERS = [
    simulation.cli.facefed_parser(),
    server.cli.parser(),
    clients.cli.parser(),
    simulation.cli.simulation_parser(),
]


@pytest.fixture(scope="module")
def bash(tmp_path_factory):
    script = tmp_path_factory.mktemp("bash") / "facefed"
    script.write_text(completion_script("bash", PARSERS))

    def complete(*words):
        ask = 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); _facefed_complete; echo "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", ask, script, *words], capture_output=True, text=True, timeout=60)
        assert done.stderr == ""
        return done.stdout.split()

    return complete


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("facefed", "tr"), ["train", "tracking"]),
        (("facefed", "train", "loc"), ["local"]),
        (("facefed", "train", "local", "--ep"), ["--epochs"]),
        (("facefed", "train", "local", "--ro"), []),
        (("facefed", "train", "federated", "--ro"), ["--rounds"]),
        (("/usr/bin/flower-server", "--strategy", ""), list(STRATEGIES)),
        (("flower-client", "--dataset", "vg"), ["vggface2"]),
        (("facefed", "train", "local", "--client", "x", "--model", ""), list(BACKBONES)),
        (("flower-simulation", "--config", "dem"), ["demo"]),
        (("facefed", "completion", ""), [*SHELLS, "-h", "--help"]),
    ],
)
def test_bash_completes(bash, words, found):
    assert bash(*words) == found


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_and_option_is_in_every_script(shell):
    script = completion_script(shell, PARSERS)
    commands = [command for parser in PARSERS for command in commands_of(parser)]
    assert {"facefed train local", "facefed tracking serve", "flower-client"} <= {command.path for command in commands}
    for command in commands:
        assert f"'{command.path}'" in script
        for option in command.options:
            for name in option.names:
                shown = {"fish": f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"}.get(shell, name)
                assert shown in script

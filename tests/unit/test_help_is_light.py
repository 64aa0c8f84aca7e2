"""`--help` of every program answers without the heavy libraries: they are imported where the work begins."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    "torch",
    "flwr",
    "mlflow",
    "ray",
    "matplotlib",
    "numpy",
    "sklearn",
    "grpc",
    "pandas",
    "safetensors",
    "PIL",
    "optuna",
)
PROGRAMS = {
    "flower-server": ("server.cli", "main"),
    "flower-client": ("clients.cli", "main"),
    "flower-simulation": ("simulation.cli", "main_simulation"),
    "facefed": ("simulation.cli", "main"),
}
SUBCOMMANDS = [
    ("facefed", "attention"),
    ("facefed", "train", "local"),
    ("facefed", "data", "prepare"),
    ("facefed", "data", "synth"),
]
CODE = """
import sys
from {module} import {function}
try:
    {function}({argv!r})
except SystemExit as end:
    assert end.code == 0, end.code
print("HEAVY", sorted(name for name in {heavy!r} if name in sys.modules))
"""


@pytest.mark.parametrize("command", [(name,) for name in PROGRAMS] + SUBCOMMANDS, ids=" ".join)
def test_help_imports_nothing_heavy(command):
    module, function = PROGRAMS[command[0]]
    code = CODE.format(module=module, function=function, argv=[*command[1:], "--help"], heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {' '.join(command)}")
    assert done.stdout.splitlines()[-1] == "HEAVY []"


SERVE = """
import sys
from unittest.mock import patch
import server.cli, server.flower.launch, server.flower.superexec
with patch.object(server.flower.launch.Launch, "run", lambda self: {"exit_code": 1, "line": "it was stood in for"}):
    code = server.cli.main(["--no-mlflow", "--out", sys.argv[1], "--address", sys.argv[2]])
print(code, sorted(name for name in ("torch", "mlflow", "safetensors") if name in sys.modules))
"""


def test_what_stands_beside_the_superlink_has_no_torch(tmp_path):
    """flower-server itself and its SuperExec: half a gigabyte and some seconds each, for nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", SERVE, str(tmp_path / "runs"), address]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "1 []", done

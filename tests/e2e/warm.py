"""Runs programs in forks of one process that has imported their libraries: torch and MLflow cost seconds of each.

For programs that end by themselves.  The function, the arguments, the folder, the environment, the files of its output,
what is done at exit and the exit code are a program's; only what importing costs is paid once.
"""

import atexit
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Collection
from pathlib import Path

from programs import DONE_WITHIN_S, Ended, Program, Programs

MAINS = {
    "facefed": "simulation.cli:main",
    "flower-client": "clients.cli:main",
    "flower-server": "server.cli:main",
    "flower-simulation": "simulation.cli:main_simulation",
}
IMPORTED = (
    "torch", "clients.flower.launch", "server.flower.launch", "simulation.commands", "simulation.compare.evaluate",
    "simulation.sites", "common.faces.pack", "common.tracking.address", "common.tracking.delivery",
    "common.tracking.registry", "mlflow", "simulation.alone.epochs", "common.plots.verification",
)  # fmt: skip


class Warm:
    """The process that forks."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None  # until the first program

    def close(self) -> None:
        """End it."""
        if self._process:
            with self._process:
                pass  # its streams are closed, and it ends with its stdin

    def code(self, name: str, arguments: list[str], cwd: Path, log: Path) -> int:
        """The exit code of the program; it writes to log.out and log.err."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        assert self._process.stdin
        assert self._process.stdout
        task = {"name": name, "arguments": arguments, "cwd": str(cwd), "log": str(log), "environment": dict(os.environ)}
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


class WarmPrograms(Programs):
    """Programs of one folder that end by themselves; what is started and goes on is a process of its own as ever."""

    def __init__(self, cwd: Path, warm: Warm, names: Collection[str] = tuple(MAINS)) -> None:
        """names: of the programs that are forked; the others are processes of their own."""
        super().__init__(cwd)
        self._warm, self._number, self._names = warm, 0, names

    def run(self, name: str, *arguments: object, timeout_s: float = DONE_WITHIN_S) -> Ended:
        """Its end; a program that is not forked, or has less time, is a process of its own."""
        if name not in self._names or timeout_s != DONE_WITHIN_S:
            return super().run(name, *arguments, timeout_s=timeout_s)
        self._number += 1
        log = self.cwd / f"{name}-{self._number}"
        code = self._warm.code(name, [str(argument) for argument in arguments], self.cwd, log)
        out, err = (log.with_suffix(suffix).read_text(encoding="utf-8") for suffix in (".out", ".err"))
        return Ended(code, out, err)


def _become(task: dict) -> int:
    """In the fork: be the program, to its exit code."""
    os.setsid()
    os.chdir(task["cwd"])
    os.environ.clear()
    os.environ.update(Program.environment_of(task["environment"]))
    for number, suffix in ((1, ".out"), (2, ".err")):
        file = os.open(Path(task["log"]).with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.alarm(int(DONE_WITHIN_S))
    module, function = MAINS[task["name"]].split(":")
    sys.argv = [task["name"], *task["arguments"]]
    try:
        return int(getattr(importlib.import_module(module), function)())
    except SystemExit as ending:
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def main() -> None:
    """Fork for each line of stdin; tell each exit code."""
    from common.system.runtime import go_silent

    go_silent()
    for name in (*IMPORTED, *(main.partition(":")[0] for main in MAINS.values())):
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            code = 1
            try:
                code = _become(json.loads(line))
            except BaseException:  # a program that raised shows it
                sys.excepthook(*sys.exc_info())
            finally:
                threading._shutdown()
                atexit._run_exitfuncs()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

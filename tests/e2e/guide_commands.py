"""Does with a guide's fenced blocks what a reader would: types the commands, runs the programs, compares outputs."""

import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import psutil
from programs import BIN, DONE_WITHIN_S, MARK

from common.system.processes import be_killed_with_parent

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
CTRL_C = "# in the server's terminal: Ctrl-C"
ANYTHING = "…"  # in an expected line: any text; a line of its own: any lines
# A server, and the path under which it answers when it is up.
SERVERS = {r"facefed tracking serve\b": "/health", r"tensorboard\b": "/"}
PROGRAMS = (
    "facefed", "flower-simulation", "mlflow", "python", "tensorboard", "psql", "pg_dump", "pg_restore",
    "export", "source", "unset", "du", "mkdir", "cp", "grep", "printf", "strace", "unshare",
)  # fmt: skip


class Typed(NamedTuple):
    """A command, and what the guide says that it prints."""

    command: str
    expected: str

    @property
    def fails(self) -> bool:
        """Whether what is expected is an error of ours: the command then ends with one."""
        return re.search(r"^(facefed: |WRONG )", self.expected, re.MULTILINE) is not None


@dataclass(frozen=True)
class Block:
    """A fenced block.  expected: of a program, what it prints."""

    line: int
    language: str
    text: str
    expected: str = ""

    def __str__(self) -> str:
        return f"{self.line}: {self.text.strip().splitlines()[0][:50]}"

    @property
    def typed(self) -> list[Typed]:
        """Its commands; of the comments only the one that means a key."""
        found: list[Typed] = []
        for line in self.text.replace("\\\n", " ").splitlines():
            if line == CTRL_C:
                found.append(Typed(line, ""))
            elif self.language == "sh":
                found += [] if line.startswith("#") or not line.strip() else [Typed(line, "")]
            elif line.startswith("$ "):
                found.append(Typed(line.removeprefix("$ "), ""))
            else:
                command, expected = found.pop()
                found.append(Typed(command, f"{expected}{line}\n"))
        return found


def blocks_of(guide: str) -> list[Block]:
    """All blocks; what is in one of `text` belongs to the program before it."""
    found: list[Block] = []
    for fence in FENCE.finditer(guide):
        language, text = fence.groups()
        if language == "text":
            last = found.pop()
            assert (last.language, last.expected) == ("python", ""), f"line {last.line} prints nothing that is shown"
            found.append(replace(last, expected=text))
        else:
            found.append(Block(guide.count("\n", 0, fence.start()) + 1, language, text))
    return found


@dataclass
class Substitution:
    """One way in which the test's world differs from the guide's; `back` also turns outputs into the guide's words."""

    pattern: str  # a regular expression
    replacement: str
    back: bool = False
    used: int = 0

    def apply(self, text: str) -> str:
        """The text as this machine can run it."""
        changed, count = re.subn(self.pattern, self.replacement, text)
        self.used += count
        return changed

    def undo(self, text: str) -> str:
        """The text as the guide has it."""
        guide = self.pattern.replace("\\b", "").replace("\\", "")
        return re.sub(rf"(?<!\d){re.escape(self.replacement)}(?!\d)", guide, text) if self.back else text


def assert_printed(expected: str, printed: str) -> None:
    """Every expected line was printed, in this order; between two of them other lines may be where `…` stands alone."""
    lines, at, gap = printed.splitlines(), 0, True  # what comes before the first line is the program's affair
    for wanted in expected.splitlines():
        if wanted == ANYTHING:
            gap = True
            continue
        pattern = ".*?".join(re.escape(part) for part in wanted.split(ANYTHING))
        places = range(at, len(lines)) if gap else range(at, min(at + 1, len(lines)))
        place = next((i for i in places if re.fullmatch(pattern, lines[i].rstrip())), None)
        assert place is not None, f"not printed: {wanted}\n--- what was printed:\n{printed}"
        at, gap = place + 1, False


class Server:
    """A program that stays, started as in a terminal of its own."""

    def __init__(self, command: str, port: int, path: str, cwd: Path, environment: dict[str, str]) -> None:
        self.command, self.port = command, port
        self._output = cwd.parent / f"server-{uuid.uuid4().hex[:6]}.out"
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                ["bash", "-c", command], cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=be_killed_with_parent,
            )  # fmt: skip
        self._wait(path)

    @property
    def printed(self) -> str:
        """What it printed so far."""
        return self._output.read_text(encoding="utf-8", errors="replace")

    def _wait(self, path: str) -> None:
        deadline, own_word = time.monotonic() + DONE_WITHIN_S, "facefed" in self.command
        while not ("healthy: " in self.printed if own_word else _answers(f"http://127.0.0.1:{self.port}{path}")):
            assert self._process.poll() is None, f"{self.command} ended:\n{self.printed}"
            assert time.monotonic() < deadline, f"{self.command} is not up:\n{self.printed}"
            time.sleep(0.05)

    def end(self, number: int = signal.SIGTERM) -> int:
        """End it as a user does, or as its terminal does when it closes; returns its exit code."""
        self._process.send_signal(number)
        try:
            return self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            return self._process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - our own http address
            return answer.status == 200
    except (OSError, urllib.error.URLError):
        return False


class Reader:
    """Works through the blocks in their order, in one folder, with one shell's variables."""

    def __init__(
        self,
        blocks: Sequence[Block],
        folder: Path,
        substitutions: Sequence[Substitution],
        of_servers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """of_servers: variables that the servers get beside the shell's."""
        self._blocks, self._folder, self.substitutions, self._of_servers = blocks, folder, substitutions, of_servers
        self._outcomes: list[BaseException | None] = []
        self.seconds: list[float] = []
        self._servers: dict[int, Server] = {}
        self._mark = uuid.uuid4().hex
        unwanted = ("MLFLOW_", "AWS_", "FLWR_", "PYTEST_", "PG")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
        self._environment = {**kept, MARK: self._mark, "PATH": f"{BIN}{os.pathsep}{kept['PATH']}"}

    def read(self, index: int) -> None:
        """Do everything up to this block, each once; raises what was wrong with this one."""
        while len(self._outcomes) <= index:
            began = time.monotonic()
            try:
                self._do(self._blocks[len(self._outcomes)])
            except (AssertionError, OSError, subprocess.SubprocessError) as error:
                self._outcomes.append(error)
            else:
                self._outcomes.append(None)
            self.seconds.append(time.monotonic() - began)
        error = self._outcomes[index]
        if error is not None:
            raise error

    def close(self) -> None:
        """End what runs, and whatever it left."""
        for server in self._servers.values():
            server.end()
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self._mark:
                    process.kill()
            except psutil.Error:
                continue

    def _do(self, block: Block) -> None:
        if block.language in ("sh", "console"):
            for typed in block.typed:
                self._type(typed)
        elif block.language in ("python", "toml"):
            named = re.match(r"# (\S+\.(py|toml))\n", block.text)
            path = self._folder / (named[1] if named else f"block_{block.line}.py")
            path.write_text(self._here(block.text), encoding="utf-8")
            if block.language == "python":
                assert_printed(block.expected, self._as_in_guide(self._run(f"python {path.name}", fails=False)))
        else:
            raise AssertionError(f"line {block.line}: nobody knows how to execute {block.language!r}")

    def _type(self, typed: Typed) -> None:
        if typed.command == CTRL_C:
            self._interrupt()
            return
        words = re.sub(r"^(\w+=('[^']*'|\S*) )+", "", typed.command)
        assert words.split()[0] in PROGRAMS, f"{words.split()[0]} is no program that this test knows"
        path = next((path for start, path in SERVERS.items() if re.match(start, words)), None)
        here = self._here(typed.command)
        printed = self._serve(here, path) if path and not typed.fails else self._run(here, fails=typed.fails)
        assert_printed(typed.expected, self._as_in_guide(printed))

    def _serve(self, command: str, path: str) -> str:
        """Start a server; the one that has its port is ended first, as its user must."""
        port = int(re.search(r"--port (\d+)", command)[1])
        if port in self._servers:
            self._servers.pop(port).end()
        self._servers[port] = Server(command, port, path, self._folder, {**self._environment, **self._of_servers})
        return self._servers[port].printed

    def _interrupt(self) -> None:
        port, server = next((port, one) for port, one in self._servers.items() if "facefed" in one.command)
        del self._servers[port]
        assert server.end(signal.SIGINT) == 130, server.printed
        assert "stopped; nothing is left running." in server.printed

    def _run(self, command: str, *, fails: bool) -> str:
        """Run a command to its end, which is an error if it `fails`, and keep the variables that it sets."""
        told = self._folder.parent / "variables"
        done = subprocess.run(
            ["bash", "-e", "-c", f"{command}\nenv -0 > {told}"],
            cwd=self._folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=DONE_WITHIN_S,
        )
        assert (done.returncode != 0) == fails, f"{command}\nended with {done.returncode}:\n{done.stdout}"
        if done.returncode == 0:
            pairs = (pair.split("=", 1) for pair in told.read_text(encoding="utf-8").split("\0") if pair)
            self._environment = {name: value for name, value in pairs if name not in ("_", "SHLVL", "PWD", "OLDPWD")}
        return done.stdout

    def _here(self, text: str) -> str:
        for substitution in self.substitutions:
            text = substitution.apply(text)
        return text

    def _as_in_guide(self, text: str) -> str:
        for substitution in reversed(self.substitutions):
            text = substitution.undo(text)
        return text

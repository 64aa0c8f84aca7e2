"""The runs that the proofs of privacy look at: simulations, and separate processes with a tracking server, cut off."""

import contextlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from isolation import OUTSIDE, Island, recorder
from programs import Ended, Program, Programs, free_port

from tests.unit.wandb_logs import OLD

PERSON = "Zenkgraf"  # in the name of each person and each picture of one client
LOG = "asked.log"
VIT = """\
[data]
image_size = 32

[model]
backbone = "vit_tiny"
embedding_size = 32
depth = 2

[training]
batch_size = 8
"""
# MLflow tells the user interface whether the browser may report.
_ASK_UI = "import sys, urllib.request as r; print(r.urlopen(sys.argv[1] + '/ajax-api/3.0/mlflow/ui-telemetry').read())"

Below = tuple[str, str, dict[str, str]]  # of a process: its name, its command, its environment


@dataclass(kw_only=True)
class Sealed:
    """Programs that ran where there is no outside."""

    programs: Programs
    artifacts: str  # the folder that MLflow keeps them in
    ended: dict[str, Ended] = field(default_factory=dict)
    below: list[Below] = field(default_factory=list, repr=False)

    @property
    def cwd(self) -> Path:
        return self.programs.cwd


def name_people(source: Path, folder: Path) -> Path:
    """A VGGFace2 data set as a folder for each person, with names as people have them."""
    for number, pictures in enumerate(sorted(path for path in source.glob("*/*") if path.is_dir())):
        person = folder / f"Ada {PERSON} {number:02d}"
        person.mkdir()
        for place, picture in enumerate(sorted(pictures.iterdir())):
            shutil.copy(picture, person / f"{PERSON}-{number:02d}-{place}.jpg")
    return folder


def below(*programs: Program) -> Iterator[Below]:
    """Each process that programs started and that is there now; not what has yet to become another program."""
    for program in programs:
        with contextlib.suppress(psutil.Error):
            itself = psutil.Process(program.process.pid)
            for process in itself.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if process.cmdline() != itself.cmdline():
                        yield process.name(), " ".join(process.cmdline()), process.environ()


def below_until_the_end(of: Program, *programs: Program) -> Iterator[Below]:
    """Each that is there when one looks twice a second: a ClientApp lives for one task only."""
    seen: dict[str, Below] = {}
    while of.process.poll() is None:
        seen.update({found[1]: found for found in below(*programs)})
        time.sleep(0.5)
    yield from seen.values()


def simulate(sealed: Sealed, what: tuple, island: Island, environment: dict[str, str]) -> None:
    """One federation on the island, recorded: what is asked for stands there, whether or not anybody answers."""
    wrapper = [*island.wrapper, *recorder(sealed.cwd / LOG)]
    program = sealed.programs.start("flower-simulation", *what, wrapper=wrapper, environment=environment)
    program.wait_for("round 1 of 2")
    sealed.below += below(program)
    sealed.ended["simulation"] = program.ended()
    program.assert_nothing_left(60)  # the recorder ends last


def deploy(deployment: Sealed, faces, people: Path, island: Island, environment: dict[str, str]) -> None:
    """A tracking server, a federation of separate processes and the other programs that track there, each recorded."""
    port, own = free_port(), free_port()
    uri = f"http://127.0.0.1:{port}"
    tracked, address = ("--tracking-uri", uri), f"127.0.0.1:{own}"
    (deployment.cwd / "vit.toml").write_text(VIT)
    running: dict[str, Program] = {}

    def start(name: str, program: str, *arguments: object) -> Program:
        wrapper = [*island.wrapper, *recorder(deployment.cwd / f"{name}-{LOG}")]
        running[name] = deployment.programs.start(program, *arguments, wrapper=wrapper, environment=environment)
        return running[name]

    def end(*names: str) -> None:
        deployment.ended.update({name: running[name].ended() for name in names})

    serve = start("serve", "facefed", "tracking", "serve", "--port", port, "--no-auth")
    _start_clients(start, faces, people, address, tracked)
    start("synth", "facefed", "data", "synth", "--layout", "celeba", "--people", 6, "--pictures", 2, "--out", "drawn")
    serve.wait_for("healthy")
    server = start("server", "flower-server", "--address", address, *faces.small, *tracked)
    deployment.below += below_until_the_end(
        server, *(running[name] for name in ("serve", "server", "celeba", "people"))
    )
    end("server", "celeba", "people", "synth")
    mine = ("--client", f"people:folder={people}", "--config", "vit.toml", *faces.cache)
    start("local", "facefed", "train", "local", *mine, "--epochs", 2, *tracked)
    start("wandb", "facefed", "tracking", "import-wandb", OLD, *tracked)
    start("doctor", "facefed", "tracking", "doctor", *tracked)
    start("astray", "facefed", "tracking", "doctor", "--tracking-uri", f"http://{OUTSIDE}:5000")
    ask = [*island.wrapper, sys.executable, "-c", _ASK_UI, uri]
    told = subprocess.run(ask, env=environment, capture_output=True, text=True, timeout=300, check=False)
    deployment.ended["ui"] = Ended(told.returncode, told.stdout, told.stderr)
    end("local", "wandb", "doctor", "astray")
    serve.signal(signal.SIGINT)
    end("serve")
    for program in running.values():
        program.assert_nothing_left(60)


def _start_clients(start: Callable[..., Program], faces, people: Path, address: str, tracked: tuple) -> None:
    """One that keeps its own figures in its folder, and one that asks for them in the same MLflow."""
    common = ("--server", address, "--once", "--site-seed", 1, *faces.cache)
    start("celeba", "flower-client", "--dataset", "celeba", "--data-dir", faces.celeba, *common)
    start("people", "flower-client", "--dataset", "folder", "--data-dir", people, "--name", "people", *common, *tracked)

"""The three servers that tests of tracking share, the databases and the store behind them, and their first runs."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tracked_record as record
from databases import DATABASE, PASSWORD, USER, MariaDB, ObjectStore, PostgreSQL
from programs import Program, Programs, free_port

from common.system.runtime import PATIENCE, SILENCE

ROOT = Path(__file__).resolve().parents[2]
DIRECT = "facial_recognition_direct"  # the experiment of what went into a database without a server
EVERYWHERE = "0.0.0.0"  # noqa: S104 - of a server that asks for a password


@dataclass(frozen=True)
class Server:
    """A `facefed tracking serve` that runs, in a folder of its own."""

    program: Program
    port: int

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def shown(self) -> str:
        """Everything that it and its server wrote."""
        logs = [
            self.program.cwd / "mlflow-server.log",
            *self.program.cwd.glob("*.out"),
            *self.program.cwd.glob("*.err"),
        ]
        return "".join(path.read_text(errors="replace") for path in logs)


@dataclass(frozen=True)
class Deployment:
    """All that runs while this file's tests do."""

    folder: Path
    postgresql: PostgreSQL
    mariadb: MariaDB
    store: ObjectStore
    over_postgresql: Server
    over_mariadb: Server
    with_password: Server  # over sqlite, on every address
    own_address: dict[str, str]  # of each database, for its own clients; holds no password


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """This process records as our programs do, and asks no proxy."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SILENCE, **PATIENCE, "NO_PROXY": "*"}.items():
            patch.setenv(name, value)
        patch.setenv("PGPASSWORD", PASSWORD)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "MLFLOW_S3_ENDPOINT_URL"):
            patch.delenv(name, raising=False)
        yield


@contextlib.contextmanager
def deployed(folder: Path) -> Iterator[Deployment]:
    """Start everything, as much of it at once as can be."""
    with contextlib.ExitStack() as stack:
        postgresql, mariadb, store = (
            stack.enter_context(contextlib.closing(kind())) for kind in (PostgreSQL, MariaDB, ObjectStore)
        )
        with_password = _serve(stack, folder / "sqlite", "--host", EVERYWHERE, "--allowed-hosts", "mlflow")
        option_file = folder / "my.cnf"
        option_file.write_text(f"[client]\nuser={USER}\npassword={PASSWORD}\n")
        option_file.chmod(0o600)
        own_address = {
            "postgresql": postgresql.uri(user=USER),  # PGPASSWORD is set
            "mariadb": f"mysql://127.0.0.1:{mariadb.port}/{DATABASE}?read_default_file={option_file}",
        }
        writers = {name: _write_directly(stack, folder, f"from_{name}", uri) for name, uri in own_address.items()}
        _end(*writers["postgresql"])
        with pytest.MonkeyPatch.context() as patch:
            for name, value in store.variables.items():
                patch.setenv(name, value)
            options = "--backend", own_address["postgresql"], "--artifacts", f"s3://{store.BUCKET}/facefed", "--no-auth"
            over_postgresql = _serve(stack, folder / "postgresql", *options)
        _end(*writers["mariadb"])
        over_mariadb = _serve(stack, folder / "mariadb", "--backend", mariadb.uri(), "--no-auth")
        for server in (with_password, over_postgresql, over_mariadb):
            server.program.wait_for("healthy:", timeout_s=280)
        yield Deployment(
            folder=folder,
            postgresql=postgresql,
            mariadb=mariadb,
            store=store,
            over_postgresql=over_postgresql,
            over_mariadb=over_mariadb,
            with_password=with_password,
            own_address=own_address,
        )


def _serve(stack: contextlib.ExitStack, folder: Path, *options: object) -> Server:
    folder.mkdir()
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTEST_CURRENT_TEST", raising=False)  # MLflow behaves differently when it sees it
        programs = stack.enter_context(contextlib.closing(Programs(folder)))
        return Server(programs.start("facefed", "tracking", "serve", "--port", port, *options), port)


def _write_directly(
    stack: contextlib.ExitStack, folder: Path, name: str, uri: str
) -> tuple["subprocess.Popen[bytes]", Path]:
    """The record, by a process of its own, into a database that is new and has no tables yet."""
    elsewhere = folder / f"{name}_cwd"
    elsewhere.mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, record.__file__, uri, str(folder / "runs" / name), DIRECT]
    with (elsewhere / "output").open("wb") as output:
        process = subprocess.Popen(command, cwd=elsewhere, env=environment, stdout=output, stderr=output)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return process, elsewhere / "output"


def _end(writer: "subprocess.Popen[bytes]", output: Path) -> None:
    code = writer.wait(timeout=300)
    assert (code, output.read_text()) == (0, "")

"""Starts PostgreSQL, MariaDB and an S3-compatible store (moto) for tests: on loopback, each in a folder of its own.

Root may not run the databases: then they run as the users that Debian's packages made, `postgres` and `mysql`.
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from programs import BIN, free_port

from common.system.processes import be_killed_with_parent
from tests.conftest import skip_or_fail

READY_WITHIN_S = 120.0
USER, PASSWORD = "facefed", "a-secret-of-the-tests"
DATABASE = "runs"


def find_program(name: str, *places: str) -> str:
    """Its path, from PATH or the newest of the places; skips the test where it is missing."""
    found = shutil.which(name) or next(
        (str(path) for place in places for path in sorted(Path("/").glob(f"{place}/{name}"), reverse=True)), None
    )
    if found is None:
        skip_or_fail(f"{name} is not installed")
    return found


class Service:
    """A program that other programs talk to over loopback, with its data in a folder that `close` removes."""

    def __init__(self, account: str = "") -> None:
        """account: the user that it runs as when we are root."""
        self.port = free_port()
        # Not below pytest's own folder, which other users may not enter.
        self.folder = Path(tempfile.mkdtemp(prefix="facefed-service-"))
        self._account = account if account and os.geteuid() == 0 else ""
        if self._account:
            user = pwd.getpwnam(self._account)
            os.chown(self.folder, user.pw_uid, user.pw_gid)
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, *command: object) -> None:
        """Run a program to its end as the service's user."""
        done = subprocess.run([*map(str, command)], **self._as_account(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr

    def launch(self, command: Sequence[object], environment: dict[str, str] | None = None) -> None:
        """Start the service itself."""
        with (self.folder / "service.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*map(str, command)],
                **self._as_account(),
                env={**os.environ, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=be_killed_with_parent,  # even where pytest itself is killed
            )

    def _as_account(self) -> dict[str, object]:
        whose = {"user": self._account, "group": self._account, "extra_groups": []} if self._account else {}
        return {**whose, "cwd": self.folder}

    def wait_until(self, works: Callable[[], object]) -> None:
        """Until a call raises no more."""
        deadline = time.monotonic() + READY_WITHIN_S
        while True:
            log = (self.folder / "service.log").read_text(errors="replace")
            assert self._process is not None
            assert self._process.poll() is None, log
            try:
                works()
            except Exception:
                assert time.monotonic() < deadline, log
                time.sleep(0.1)
            else:
                return

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it, at once or after a grace, and keep its data."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None

    def close(self) -> None:
        """End it and remove its data."""
        self.stop(signal.SIGKILL if self._process else 0)
        shutil.rmtree(self.folder, ignore_errors=True)


class PostgreSQL(Service):
    """A PostgreSQL that asks for a password, with one user and one database of theirs."""

    def __init__(self) -> None:
        initdb = find_program("initdb", "usr/lib/postgresql/*/bin")
        self._program = find_program("postgres", "usr/lib/postgresql/*/bin")
        super().__init__("postgres")
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        self.run(
            initdb, "-D", self.folder / "data", "-U", USER, f"--pwfile={secret}", "--auth=scram-sha-256", "--no-sync",
            "--encoding=UTF8", "--locale=C.UTF-8",
        )  # fmt: skip
        self.start()
        self.make_database(DATABASE)

    def start(self) -> None:
        """Start it, again on the data of before, and wait until it answers."""
        self.launch(
            [
                self._program, "-D", self.folder / "data", "-h", "127.0.0.1", "-p", self.port, "-k", self.folder,
                "-c", "fsync=off",
            ]
        )  # fmt: skip
        self.wait_until(lambda: self._execute("select 1"))

    def uri(self, user: str = f"{USER}:{PASSWORD}", database: str = DATABASE) -> str:
        """As `--backend` and `--tracking-uri` take it."""
        return f"postgresql://{user}@127.0.0.1:{self.port}/{database}"

    def make_database(self, name: str) -> None:
        """An empty one."""
        self._execute(f"create database {name}")

    def _execute(self, statement: str) -> None:
        import psycopg2

        connection = psycopg2.connect(self.uri(database="postgres"))
        try:
            connection.autocommit = True
            connection.cursor().execute(statement)
        finally:
            connection.close()


class MariaDB(Service):
    """A MariaDB with one user, who needs a password, and one database of theirs."""

    def __init__(self) -> None:
        install = find_program("mariadb-install-db")
        program = find_program("mariadbd", "usr/sbin")
        super().__init__("mysql")
        data = self.folder / "data"
        self.run(install, "--no-defaults", f"--datadir={data}", "--auth-root-authentication-method=normal",
                 "--skip-test-db")  # fmt: skip
        self._socket = self.folder / "socket"
        self.launch(
            [
                program, "--no-defaults", f"--datadir={data}", f"--socket={self._socket}", f"--port={self.port}",
                "--bind-address=127.0.0.1", f"--pid-file={self.folder}/pid", "--innodb-flush-log-at-trx-commit=0",
                "--skip-name-resolve",
            ]
        )  # fmt: skip
        self.wait_until(lambda: self._execute("select 1"))
        self.make_database(DATABASE)
        self._execute(f"create user {USER} identified by '{PASSWORD}'")
        self._execute(f"grant all on *.* to {USER}")

    def uri(self, user: str = f"{USER}:{PASSWORD}", database: str = DATABASE) -> str:
        """As `--backend` and `--tracking-uri` take it."""
        return f"mysql://{user}@127.0.0.1:{self.port}/{database}"

    def make_database(self, name: str) -> None:
        """An empty one."""
        self._execute(f"create database {name} character set utf8mb4")

    def _execute(self, statement: str) -> None:
        import pymysql

        connection = pymysql.connect(user="root", unix_socket=str(self._socket), defer_connect=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:  # PyMySQL would not close one that is refused
            line.connect(str(self._socket))
            connection.connect(line)
            connection.cursor().execute(statement)
            connection.close()


class ObjectStore(Service):
    """moto's server: what boto3 knows of S3, in memory."""

    BUCKET = "artifacts"

    def __init__(self) -> None:
        super().__init__()
        self.address = f"http://127.0.0.1:{self.port}"
        self.launch([BIN / "moto_server", "-H", "127.0.0.1", "-p", self.port])
        self.wait_until(lambda: self._client().list_buckets())
        self._client().create_bucket(Bucket=self.BUCKET)

    @property
    def variables(self) -> dict[str, str]:
        """What a server needs in its environment to use it."""
        return {
            "AWS_ACCESS_KEY_ID": "of-the-tests",
            "AWS_SECRET_ACCESS_KEY": "of-the-tests",
            "AWS_DEFAULT_REGION": "us-east-1",
            "MLFLOW_S3_ENDPOINT_URL": self.address,
        }

    def objects(self) -> dict[str, bytes]:
        """Everything in the bucket."""
        client = self._client()
        listed = client.list_objects_v2(Bucket=self.BUCKET).get("Contents", [])
        return {one["Key"]: client.get_object(Bucket=self.BUCKET, Key=one["Key"])["Body"].read() for one in listed}

    def _client(self):
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.address,
            region_name="us-east-1",
            aws_access_key_id="of-the-tests",
            aws_secret_access_key="of-the-tests",
        )

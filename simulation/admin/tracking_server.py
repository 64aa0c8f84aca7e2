"""Works out the right `mlflow server` line, checks what it needs, starts it and watches it until it shall end.

MLflow 3.17: without `--allowed-hosts` it answers 403 to a name such as http://mlflow:5000, and without
`--cors-allowed-origins` its own pages, opened under such a name, may not ask for runs; /health is green all the while.
"""

import dataclasses
import importlib.util
import json
import secrets
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from common.errors import FaceFedError, TrackingError
from common.redact import DATABASES, shown_uri, without_password
from common.system.processes import (
    host_port,
    in_url,
    is_healthy,
    is_loopback,
    reached_at,
    require_free_port,
    start,
    stop,
)
from common.system.runtime import SILENCE
from common.tracking.address import SERVERS, resolve_uri, sqlite_path
from common.tracking.delivery import check_database
from common.tracking.sender import short_reason

HEALTHY_WITHIN_S: Final = 300.0  # a new database on a busy machine takes most of a minute
LOOK_EVERY_S: Final = 0.2
LOCAL_HOSTS: Final = ("localhost", "127.0.0.1", "[::1]")
EVERYWHERE: Final = ("0.0.0.0", "::")  # noqa: S104 - compared with, not bound
# Of a user's variables for MLflow, those that a server needs; any other one might change what was checked here.
_KEPT_VARIABLES: Final = ("MLFLOW_AUTH_", "MLFLOW_FLASK_", "MLFLOW_S3_", "MLFLOW_SQLALCHEMYSTORE_", "MLFLOW_MYSQL_")
_SECRETS: Final = "mlflow-auth"
_LOGIN: Final = "login.env"
_PASSWORD, _KEY = "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"
_HOW_TO_LOG_IN: Final = "clients take MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
_LEAST_PASSWORD: Final = 12  # MLflow's own rule
NO_AUTH: Final = (
    "warning: --no-auth: every account of this machine, and whoever else reaches the port, can read, change and delete"
    " each run and model, and put a model of theirs in place of the champion."
)


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What was asked for, as typed."""

    host: str = "127.0.0.1"
    port: int = 5000
    backend: str = "sqlite"
    artifacts: str = "mlartifacts"
    auth: bool = True
    allowed_hosts: Sequence[str] = ()  # further names under which clients reach this server


@dataclass(frozen=True, kw_only=True)
class ServerPlan:
    """A checked server, ready to start."""

    command: tuple[str, ...]  # holds no password
    environment: Mapping[str, str]
    host: str
    port: int
    address: str  # for a client on this machine
    log: Path
    kept: tuple[Path, ...] = ()  # files and folders of this machine that it writes
    notes: tuple[str, ...]  # where things lie and what to know, one line each


def plan_server(options: ServeOptions, environment: Mapping[str, str], base: Path) -> ServerPlan:
    """Check the port, the database and the artifacts' place, and work out the server's line.

    environment: of this process.  base: what relative paths start from.
    Makes the folders, and with `auth` the secrets and the login.  Raises TrackingError or UserError.
    """
    if not 0 < options.port < 65536:
        raise TrackingError(f"--port {options.port} is no port; use one from 1 to 65535, such as 5000.")
    if options.host.startswith("[") and options.host.endswith("]"):
        options = dataclasses.replace(options, host=options.host[1:-1])  # an IPv6 address as it stands in a URL
    require_free_port(options.host, options.port, "--host and --port")
    backend = check_backend(options.backend, base)
    artifacts = check_artifacts(options.artifacts, base)
    database = sqlite_path(backend)
    folder = database.parent if database else base.resolve()
    hosts = allowed_hosts(options.host, options.allowed_hosts)
    given = {k: v for k, v in environment.items() if not k.startswith("MLFLOW_") or k.startswith(_KEPT_VARIABLES)}
    secret, secret_note = auth_variables(folder / _SECRETS, given) if options.auth else ({}, NO_AUTH)
    command = [sys.executable, "-P", "-m", "mlflow", "server", "--host", options.host, "--port", str(options.port)]
    command += ["--workers", "1", "--artifacts-destination", artifacts, "--allowed-hosts", ",".join(hosts)]
    command += ["--cors-allowed-origins", ",".join(allowed_origins(hosts))]
    command += ["--app-name", "basic-auth"] * options.auth
    own = {"MLFLOW_BACKEND_STORE_URI": backend, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    return ServerPlan(
        command=tuple(command),
        environment={**given, **SILENCE, **own, **secret, "PYTHONUNBUFFERED": "1"},
        host=options.host,
        port=options.port,
        address=f"http://{host_port(reached_at(options.host), options.port)}",
        log=folder / "mlflow-server.log",
        kept=(*([database] if database else []), *([] if "://" in artifacts else [Path(artifacts)])),
        notes=(
            f"runs and models: {shown_uri(backend)}",
            f"artifacts: {artifacts}",
            f"server's log: {folder / 'mlflow-server.log'}",
            f"names it answers to: {', '.join(_plain(hosts))}",
            secret_note,
            *_warnings(options),
        ),
    )


def _warnings(options: ServeOptions) -> list[str]:
    if is_loopback(options.host):
        return []
    lines = []
    if "*" in options.allowed_hosts:
        lines.append("warning: --allowed-hosts '*' lets any web page that a user opens reach this server.")
    return [*lines, "warning: it speaks plain HTTP; beyond a trusted network put a proxy with TLS before it."]


# -- who may ask -------------------------------------------------------------------------------------------------------


def allowed_hosts(host: str, further: Sequence[str]) -> list[str]:
    """The Host headers that the server shall answer, in MLflow's patterns: each name bare and with any port.

    This machine's names for itself always; its network names and addresses when `host` is not loopback only.
    """
    if "*" in further:
        return ["*"]
    names = list(LOCAL_HOSTS)
    if host in EVERYWHERE:
        addresses = [one for card in psutil.net_if_addrs().values() for one in card]
        names += [one.address for one in addresses if one.family == socket.AF_INET]
        names += [f"[{one.address}]" for one in addresses if one.family == socket.AF_INET6 and "%" not in one.address]
        own = socket.gethostname()  # getfqdn would ask a name server
        names += [own, own.partition(".")[0]]
    else:
        names.append(in_url(host))
    names = [name.lower() for name in dict.fromkeys([*names, *further])]
    patterns = []
    for name in dict.fromkeys(names):
        if not name or "," in name or "/" in name:
            raise TrackingError(f"--allowed-hosts {name!r} is no host; write names such as mlflow or gpu1.example.org.")
        # In MLflow's patterns, which have a star, "[" opens a set.
        wild = name.replace("[", "[[]", 1)
        bare = wild if "*" in name else name
        patterns += [bare] if _has_port(name) else [bare, f"{wild}:*"]
    return patterns


def _has_port(name: str) -> bool:
    return name.rpartition("]")[2].count(":") == 1


def allowed_origins(hosts: Sequence[str]) -> list[str]:
    """The web pages that may ask: the server's own, under each name that it answers to."""
    return ["*"] if hosts == ["*"] else [f"{scheme}://{host}" for host in hosts for scheme in SERVERS]


def _plain(hosts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(host.replace("[[]", "[").removesuffix(":*") for host in hosts))


def auth_variables(folder: Path, given: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """What MLflow's basic-auth app needs, and the line that says where the password is and how a client gives it.

    folder: keeps the users, the key and a password that we made, readable by this user only, and for a client's shell
    the variables to log in with.  MLflow takes the password once, when it makes its database of users.
    """
    if not importlib.util.find_spec("flask_wtf"):
        raise TrackingError(
            "to ask for a password needs the package Flask-WTF: pip install Flask-WTF; or give --no-auth."
        )
    if _PASSWORD in given and len(given[_PASSWORD]) < _LEAST_PASSWORD:
        raise TrackingError(f"{_PASSWORD} is shorter than {_LEAST_PASSWORD} characters; choose a longer one.")
    require_folder(folder, "the password's folder")
    folder.chmod(0o700)
    known = folder / "secrets.json"
    try:
        kept = json.loads(known.read_text(encoding="utf-8"))
        kept = {name: str(kept[name]) for name in (_KEY, _PASSWORD)}
    except FileNotFoundError:
        kept = {_KEY: secrets.token_urlsafe(32), _PASSWORD: secrets.token_urlsafe(18)}
        known.touch(mode=0o600)
        known.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise TrackingError(f"{known} cannot be read; restore it, or delete it to have new secrets made.") from None
    users = folder / "users.ini"
    database = f"sqlite:///{folder / 'users.db'}"
    users.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {database}\nadmin_username = admin\n", encoding="utf-8"
    )
    variables = {"MLFLOW_AUTH_CONFIG_PATH": str(users), **kept, **{k: given[k] for k in kept if k in given}}
    user, login = given.get("MLFLOW_AUTH_ADMIN_USERNAME", "admin"), folder / _LOGIN
    if _PASSWORD in given:  # whoever chose it knows it; what we made is not the password then
        login.unlink(missing_ok=True)
        return variables, f"user: {user}, first password: that in {_PASSWORD}; {_HOW_TO_LOG_IN}"
    login.touch(mode=0o600)
    login.write_text(
        f"export MLFLOW_TRACKING_USERNAME={shlex.quote(user)}\n"
        f"export MLFLOW_TRACKING_PASSWORD={shlex.quote(kept[_PASSWORD])}\n",
        encoding="utf-8",
    )
    return variables, f"user: {user}, first password: in {login}; {_HOW_TO_LOG_IN}: source {shlex.quote(str(login))}"


# -- the server's life -------------------------------------------------------------------------------------------------


def serve(plan: ServerPlan, *, is_stopped: Callable[[], bool], on_ready: Callable[[], None]) -> None:
    """Start the server, call `on_ready` once it is healthy, and end it, with all its processes, when `is_stopped`.

    Raises FaceFedError when it does not become healthy or ends by itself.
    """
    with plan.log.open("ab") as output:
        begin = output.tell()
        process = start(plan.command, environment=plan.environment, output=output)
    try:
        deadline = time.monotonic() + HEALTHY_WITHIN_S
        while not is_stopped() and not is_healthy(reached_at(plan.host), plan.port):
            _require_alive(process, plan, begin)
            if time.monotonic() > deadline:
                raise FaceFedError(f"the MLflow server is not healthy after {HEALTHY_WITHIN_S:.0f} s; see {plan.log}.")
            time.sleep(LOOK_EVERY_S)
        _require_alive(process, plan, begin)  # it may be another server that answers
        if not is_stopped():
            on_ready()
        while not is_stopped():
            _require_alive(process, plan, begin)
            time.sleep(LOOK_EVERY_S)
    finally:
        stop(process)


def _require_alive(process: "subprocess.Popen[bytes]", plan: ServerPlan, begin: int) -> None:
    if process.poll() is None:
        return
    with plan.log.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").splitlines()
    telling = [line.strip() for line in lines if "error" in line.lower()] or [line for line in lines if line.strip()]
    reason = telling[-1][:300] if telling else f"exit code {process.returncode}"
    reason = without_password(reason, plan.environment["MLFLOW_BACKEND_STORE_URI"])
    raise FaceFedError(f"the MLflow server ended by itself: {reason} (see {plan.log}).")


# -- where it keeps its data -------------------------------------------------------------------------------------------


DEFAULT_DATABASE: Final = "sqlite:///mlflow.db"


def check_backend(text: str, base: Path, option: str = "--backend") -> str:
    """A database's address, or "sqlite", as MLflow can use it now; `option` named it.  Raises TrackingError.

    Makes a sqlite database's folder, not the database; a PostgreSQL or MySQL database is logged into.
    """
    if text in DATABASES:
        raise TrackingError(f"{option} {text} names no database; write {text}://USER:PASSWORD@HOST/DATABASE.")
    uri = resolve_uri(DEFAULT_DATABASE if text == "sqlite" else text, base)
    if uri.startswith(SERVERS):
        raise TrackingError(f"{option} {shown_uri(uri)} is a server already; give its database, or use it as it is.")
    database = sqlite_path(uri)
    if database is None:
        return check_database(uri)
    require_folder(database.parent, option)
    _require_sqlite(database, option)
    return uri


def _require_sqlite(database: Path, option: str) -> None:
    """An empty file is a database too."""
    try:
        with database.open("r+b") as file:
            head = file.read(16)
    except FileNotFoundError:
        return
    except OSError as error:
        raise TrackingError(
            f"{option}: {database} cannot be written ({error.strerror}); change its rights, or name another file."
        ) from None
    if head not in (b"", b"SQLite format 3\x00"):
        raise TrackingError(f"{option}: {database} is no sqlite database; name another file.")


def require_folder(folder: Path, option: str) -> None:
    """Make a folder and write in it.  Raises TrackingError."""
    probe = folder / f".facefed-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise TrackingError(
            f"{option}: {folder} cannot be written ({error.strerror}); name another folder, or change its rights."
        ) from None


def check_artifacts(text: str, base: Path) -> str:
    """`--artifacts` as MLflow takes it: a folder, which is made, or s3://BUCKET/PREFIX, which is asked for.

    Raises TrackingError.
    """
    scheme, colon, _ = text.partition("://")
    if not colon:
        folder = (base.resolve() / Path(text).expanduser()).resolve()
        require_folder(folder, "--artifacts")
        return str(folder)
    if scheme != "s3":
        raise TrackingError(f"--artifacts {shown_uri(text)} is of the unknown kind {scheme!r}; use a folder or s3://.")
    if not importlib.util.find_spec("boto3"):
        raise TrackingError(f"--artifacts {text} needs the package boto3: pip install boto3.")
    from mlflow.artifacts import list_artifacts

    try:
        list_artifacts(artifact_uri=text)
    except Exception as error:  # boto's own
        raise TrackingError(
            f"--artifacts {text} cannot be listed ({short_reason(error)}); check the bucket, AWS_ACCESS_KEY_ID,"
            " AWS_SECRET_ACCESS_KEY and MLFLOW_S3_ENDPOINT_URL."
        ) from None
    return text

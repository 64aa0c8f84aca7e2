"""Starts `facefed tracking serve` in its container: on PostgreSQL with the profile `postgres`, else on sqlite.

python run_tracking.py KEY_FILE PASSWORD_FILE ARGUMENT ...

MLflow's password is made at the first start and stays in PASSWORD_FILE, in a volume that the server reads. The
database's container leaves its password in KEY_FILE (libpq's .pgpass, in a volume that only these two have), before
anything else it does.  Neither a command line nor compose's file holds one of them.
"""

import os
import secrets
import socket
import sys
import time
from pathlib import Path

DATABASE = "postgresql://facefed@postgres/facefed"
FIRST_START_WAITS_S = 5.0  # on a new volume it cannot be known yet whether the profile is in use
READY_WITHIN_S = 120.0


def uses_postgres(key: Path, sqlite: Path) -> bool:
    """Whether this installation has the profile `postgres`."""
    deadline = time.monotonic() + (0.0 if sqlite.exists() else FIRST_START_WAITS_S)
    while not key.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    return key.exists()


def wait_for_database() -> None:
    """Until it accepts connections; `facefed tracking serve` says the rest."""
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("postgres", 5432), timeout=2.0).close()
        except OSError:
            time.sleep(0.5)
        else:
            return


def password_in(file: Path) -> str:
    """MLflow's, made where there is none yet; only the image's user can read the file."""
    if not file.exists():
        aside = file.with_suffix(".new")
        aside.touch(mode=0o600)
        aside.write_text(secrets.token_urlsafe(18), encoding="utf-8")
        aside.rename(file)
    return file.read_text(encoding="utf-8").strip()


if __name__ == "__main__":
    line = ["facefed", "tracking", "serve", *sys.argv[3:]]
    os.environ["MLFLOW_AUTH_ADMIN_PASSWORD"] = password_in(Path(sys.argv[2]))
    if uses_postgres(Path(sys.argv[1]), Path("mlflow.db")):
        wait_for_database()
        line += ["--backend", DATABASE]
        os.environ["PGPASSFILE"] = sys.argv[1]
    os.execvp(line[0], line)  # noqa: S606 - it becomes the server, and gets its signals

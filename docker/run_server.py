"""Starts flower-server in its container: the newest run goes on if it is unfinished, else a new one begins.

python run_server.py --address HOST:PORT --tls DIR -- RUN_SETTING ...

So a restart after a fault resumes, and `docker compose up` after a finished run begins the next one.  A run that goes
on has its own settings; those given count for a new one only.
"""

import os
import sys
from pathlib import Path

from common.runs import has_checkpoint, has_ended_well
from common.system.events import RUN_FILE
from common.system.files import read_json

RUNS = Path("runs")
PASSWORD = Path("/tracking-key/password")  # of MLflow; docker/run_tracking.py makes it


def unfinished(runs: Path) -> str:
    """The id of the newest run, where it has a checkpoint and did not end well; "" where a new run shall begin."""
    found = sorted((path for path in runs.glob("*") if (path / RUN_FILE).is_file()), key=lambda path: path.name)
    if not found:
        return ""
    newest = found[-1]
    about = read_json(newest / RUN_FILE)
    goes_on = has_checkpoint(newest) and not has_ended_well(newest)
    return newest.name if goes_on and about.get("mode") == "federated" else ""


def command(arguments: list[str], runs: Path = RUNS) -> list[str]:
    """flower-server's command line."""
    at = arguments.index("--")
    where, settings = arguments[:at], arguments[at + 1 :]
    run = unfinished(runs)
    if run:
        sys.stdout.write(f"run {run} is unfinished and goes on with its own settings\n")
        sys.stdout.flush()
    return ["flower-server", *where, *(["--resume", run] if run else settings)]


def login(password: Path = PASSWORD) -> dict[str, str]:
    """The variables by which MLflow's clients log in; none where there is no password."""
    if not password.exists():
        return {}
    return {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": password.read_text("utf-8").strip()}


if __name__ == "__main__":
    line = command(sys.argv[1:])
    os.environ |= login()
    os.execvp(line[0], line)  # noqa: S606 - it becomes flower-server, and gets its signals

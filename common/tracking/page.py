"""Where a run is looked at: the address of its own page, and what has to be started first."""

import shlex
from pathlib import Path
from typing import Final

from common.settings import Settings
from common.tracking.address import SERVERS, sqlite_path
from common.tracking.spool import load_sent

_SERVED_AT: Final = "http://127.0.0.1:5000"  # by `facefed tracking serve`, unless it is told otherwise
_SERVED_FILE: Final = "mlflow.db"  # likewise, of the folder that it is started in


def tracking_line(settings: Settings, folder: Path) -> str:
    """Where the run in `folder` was tracked, and the address that opens it; some lines, none with a password."""
    if not settings.tracking.enabled:
        return "off; the record is spool.jsonl in the run folder"
    uri = settings.tracking.uri
    page = run_page(uri, folder)
    if uri.startswith(SERVERS):
        return "\n".join([uri, *([f"this run: {page}"] if page else [])])
    return "\n".join([uri, f"to look: {where_to_look(settings)}", *([f"this run, then: {page}"] if page else [])])


def where_to_look(settings: Settings) -> str:
    """The command that shows what is tracked, or the server's address; "" where nothing is."""
    uri = settings.tracking.uri
    if not settings.tracking.enabled or uri.startswith(SERVERS):
        return uri if settings.tracking.enabled else ""
    here = sqlite_path(uri) == Path.cwd() / _SERVED_FILE
    return "facefed tracking serve" + ("" if here else f" --backend {shlex.quote(uri)}")


def run_page(uri: str, folder: Path) -> str:
    """The address of the run's page; "" while MLflow has not taken the run.

    uri: of the tracking, as shown.  Of a database, as `facefed tracking serve` shows it.
    """
    sent = load_sent(folder, uri)
    if not (sent.experiment_id and sent.run_ids.get("")):
        return ""
    place = uri.replace("***@", "") if uri.startswith(SERVERS) else _SERVED_AT
    return f"{place}/#/experiments/{sent.experiment_id}/runs/{sent.run_ids['']}"

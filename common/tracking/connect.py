"""From a run's folder and a tracking address to what sends the one to the other."""

from functools import partial
from pathlib import Path

from common.redact import shown_uri
from common.tracking.address import sqlite_path
from common.tracking.delivery import Delivery, quieten
from common.tracking.sender import Sender
from common.tracking.spool import Sent, Spool, load_sent, save_sent


def open_delivery(uri: str, folder: Path, sent: Sent) -> Delivery:
    """The way to the server or database at `uri`; a sqlite database's folder is made."""
    database = sqlite_path(uri)
    if database:
        database.parent.mkdir(parents=True, exist_ok=True)
    return Delivery(uri, folder, sent)


def make_sender(spool: Spool, uri: str, folder: Path, resume_run_id: str) -> Sender:
    """The thread, not started, that sends the spool of `folder`; imports MLflow, so that no other thread has to.

    resume_run_id: MLflow's id to go on with; empty for a new run, or for what the folder itself knows.
    """
    quieten()
    sent = load_sent(folder, shown_uri(uri))
    if resume_run_id and sent.run_ids.get("") != resume_run_id:
        sent.forget()
        sent.run_ids[""] = resume_run_id
    save_sent(folder, sent)  # its key finds the run again, should we be killed right after its creation
    return Sender(spool, sent, partial(open_delivery, uri, folder, sent), uri)

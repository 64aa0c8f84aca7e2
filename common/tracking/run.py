"""The beginning and the end of a tracked run: what every program, and a script of one's own, opens.

    open_run -> TrackedRun -> Spool (RUN/spool.jsonl) -> Sender (thread) -> Forwarder -> Delivery (MLflow)
                           -> Board (logs/tensorboard/RUN)

With `tracking.enabled = false` the record in the folder is the same and MLflow is never imported; with
`tracking.tensorboard = "none"` TensorBoard is not.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from common.errors import InterruptedRun
from common.redact import shown_uri
from common.settings import TrackingSettings
from common.system.runtime import user_name
from common.tracking.delivery import Delivery, quieten
from common.tracking.record import Beside, TrackedRun, nothing_beside
from common.tracking.sender import Sender
from common.tracking.spool import SavesFigure, Spool, load_sent, save_sent
from common.tracking.tensorboard import OFF, Board

USER_TAG = "mlflow.user"

__all__ = ["SavesFigure", "TrackedRun", "finishing", "open_run"]


@contextlib.contextmanager
def finishing(run: TrackedRun) -> Iterator[None]:
    """Finish the run when the block ends: as "FINISHED", when somebody stops it as "KILLED", else as "FAILED"."""
    status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except (KeyboardInterrupt, InterruptedRun):
        status = "KILLED"
        raise
    finally:
        run.finish(status)


def open_run(
    tracking: TrackingSettings,
    *,
    uri: str,
    folder: Path,
    experiment: str,
    run_name: str,
    tags: Mapping[str, str],
    params: Mapping[str, object],
    resume_run_id: str = "",
    prepare: Callable[[], None] | None = None,
    beside: Beside = nothing_beside,
    about: str = "",
) -> TrackedRun:
    """Begin (or go on with) the record of a run.

    uri: from `resolve_uri`.  folder: the run's folder; a spool in it is continued, and so are its TensorBoard events,
    in a folder of the same name below `tracking.tensorboard`.  experiment: made where missing, described as `about`.
    resume_run_id: MLflow's id to go on with; empty for a new run, or for what the folder itself knows.
    prepare: writes other files of the folder, once it is sure that no other process uses it.
    beside: of metrics by name, the values that the run, but no nested one, records under other names as well.
    Imports MLflow (seconds) when tracking is enabled, so that no other thread has to; the server is asked later.
    Raises TrackingError when another process writes or sends the run, and when the disk is full.
    """
    spool = Spool(folder)
    try:
        if prepare:
            prepare()
        sender = make_sender(spool, uri, folder, resume_run_id) if tracking.enabled else None
        board = None if tracking.tensorboard == OFF else Board(Path(tracking.tensorboard) / folder.name)
    except BaseException:
        spool.close()  # and with it the lock
        raise
    run = TrackedRun(
        folder=folder, spool=spool, sender=sender, board=board, name="", uri=uri if sender else "", beside=beside
    )
    run.skip_what_was_told()
    run.start(experiment, run_name, {USER_TAG: user_name(), **tags}, params, about)
    if sender:
        sender.start()
    return run


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
    return Sender(spool, sent, partial(Delivery, uri, folder, sent), uri)

"""Go on with a federation that was killed: everything as its last whole checkpoint says."""

import logging

from common.errors import CheckpointError
from common.parameters import buffer_sha256
from server.global_model import GlobalModel
from server.rounds import Federation

log = logging.getLogger("facefed.server")


def resume(federation: Federation) -> None:
    """Set a federation that was just made to the state of its checkpoint.

    Where the model of the last round is damaged, that of the round before it is taken, and the last round is repeated.
    Raises CheckpointError when neither can be read, or when they are of other settings.
    """
    state = federation.checkpoints.read_state()
    try:
        counts = {
            int(step): {name: float(value) for name, value in counted.items()}
            for step, counted in state["counts"].items()
        }
        last = int(state["round"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the checkpoint's state.json is not one of ours ({error!r}).") from None
    history = federation.checkpoints.read_history(state)
    try:
        _take_model(federation, last)
    except CheckpointError as error:
        if last - 1 not in counts:
            raise
        log.warning("%s The round before it is taken, and round %d is repeated.", error, last)
        _take_model(federation, last - 1)
        history.rounds.pop(last, None)
        last -= 1
    federation.history = history
    federation.first_round = last + 1
    federation.record.go_on(history, counts[last])


def _take_model(federation: Federation, step: int) -> None:
    """The model and the moments after that round, which must belong together.  Raises CheckpointError."""
    received = federation.checkpoints.load(step)
    sha256 = buffer_sha256(received)
    keeps = bool(federation.optimiser.moments) or bool(federation.model.remembered())
    kept = federation.checkpoints.load_moments(step, sha256) if keeps else {}
    model = GlobalModel.restored(received, kept, federation.settings.federation.download_codec)
    federation.optimiser.restore(kept)
    federation.model, federation.sha256 = model, sha256

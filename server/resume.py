"""Go on with a federation that was killed: everything as its last whole checkpoint says."""

import itertools
import logging
import math
from collections.abc import Mapping
from typing import Any

from common.errors import CheckpointError
from server.record.history import History
from server.rounds import Federation

log = logging.getLogger("facefed.server")


def resume(federation: Federation) -> None:
    """Set a federation that was just made to the state of its checkpoint.

    Where a file of it is damaged, the state before it is taken, or the model of the round before, and the last round
    is repeated.  Raises CheckpointError when there is nothing whole to go on from, or when it is of other settings.
    """
    first: CheckpointError | None = None
    # The last state of a run that was about to end names the same model as the one before it.
    for back, path in itertools.product((0, 1), list(federation.checkpoints.states())):
        try:
            state = federation.checkpoints.read_state(path)
            counts, last = _counts(state)
            history = federation.checkpoints.read_history(state)
            if last - back not in counts or history.best_round > last - back:
                continue
            _check_counts(federation, counts[last - back], last - back)
            federation.take_model(last - back)
        except CheckpointError as error:
            first = first or error
            continue
        history.forget_after(last - back)
        if first is not None:
            log.warning("%s What was saved before is taken; on after round %d.", first, last - back)
        kept = {step: counted for step, counted in counts.items() if step <= last - back}
        federation.checkpoints.take(path, history, kept)
        _go_on(federation, history, counts[last - back], last - back)
        return
    raise first or CheckpointError("the checkpoint's state.json is not one of ours (it counts no round).")


def _counts(state: Mapping[str, Any]) -> tuple[dict[int, dict[str, float]], int]:
    """What the record had counted, by round, and the last round.  Raises CheckpointError."""
    try:
        counts = {
            int(step): {name: float(value) for name, value in counted.items()}
            for step, counted in state["counts"].items()
        }
        return counts, int(state["round"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"the checkpoint's state.json is not one of ours ({error!r}).") from None


def _go_on(federation: Federation, history: History, counts: dict[str, float], last: int) -> None:
    federation.history = history
    federation.first_round = last + 1
    federation.record.go_on(history, counts)


def _check_counts(federation: Federation, counts: Mapping[str, float], step: int) -> None:
    """Raise CheckpointError unless what the record goes on from is there, whole and finite."""
    if not (federation.record.counts().keys() <= counts.keys() and all(map(math.isfinite, counts.values()))):
        raise CheckpointError(f"the checkpoint's state.json lacks the counts of round {step}; it is damaged.")

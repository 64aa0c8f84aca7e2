"""The error tree of FaceFed; every program turns it into one line and an exit code.

FaceFedError                 exit 1   the work failed
  InterruptedRun             exit 130 stopped by Ctrl-C or SIGTERM
  TrainingFailed                      a non-finite loss, ...
  NotEnoughClients                    too few clients joined or answered in time
  ReplyRefused                        one client's reply may not touch the model
  UserError                  exit 2   the input is wrong; the line says what to do
    ConfigError                       settings: all problems at once
    DataError                         a face data set on disk
    CheckpointError                   a checkpoint or pack that does not fit
    TrackingError                     a tracking address that cannot be used
"""

import difflib
from collections.abc import Iterable, Sequence

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 130


class FaceFedError(Exception):
    """The work failed; the message is one line for the user."""

    exit_code = EXIT_FAILED


class InterruptedRun(FaceFedError):
    """Stopped by Ctrl-C or SIGTERM."""

    exit_code = EXIT_INTERRUPTED


class TrainingFailed(FaceFedError):
    """Training cannot go on, for example because the loss is not finite; the message names the step."""


class DeadlinePassed(FaceFedError):
    """The run did not end in its time."""


class NotEnoughClients(FaceFedError):
    """Too few clients joined or answered before the deadline; the message says who is missing."""


class ReplyRefused(FaceFedError):
    """A client's reply failed a check and must not touch the model."""


class UserError(FaceFedError):
    """The user's input is wrong: what was wrong, what was seen, what to do."""

    exit_code = EXIT_USER


class ConfigError(UserError):
    """One or more settings are wrong; `problems` holds one line for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        """problems: one complete line for each wrong setting."""
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class DataError(UserError):
    """A face data set on disk is missing, malformed or too small."""


class CheckpointError(UserError):
    """A checkpoint, pack or state file is cut short or belongs to another configuration."""


class TrackingError(UserError):
    """The tracking address cannot be used."""


def unknown_name(what: str, seen: str, choices: Iterable[str]) -> str:
    """One line for a name that is none of `choices`, with the nearest one suggested."""
    names = list(choices)
    near = difflib.get_close_matches(seen, names, n=1)
    hint = f"did you mean {near[0]!r}? Choices" if near else "choices"
    return f"{what} = {seen!r} is unknown; {hint}: {', '.join(names)}."

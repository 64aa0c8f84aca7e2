"""The error tree of FaceFed; every program turns it into one line and an exit code.

FaceFedError                 exit 1   the work failed
  InterruptedRun             exit 130 stopped by Ctrl-C or SIGTERM
  TrainingFailed                      a non-finite loss, ...
  NotEnoughClients                    too few clients joined or answered in time
  ReplyRefused                        one client's reply may not touch the model
  SecureSumRefused                    secure aggregation cannot go on as asked; nothing is sent
  UserError                  exit 2   the input is wrong; the line says what to do
    ConfigError                       settings: all problems at once
    DataError                         a face data set on disk
    CheckpointError                   a checkpoint or pack that does not fit
    TrackingError                     a tracking address that cannot be used
"""

import difflib
import hashlib
from collections.abc import Iterable, Sequence

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USER = 2
EXIT_INTERRUPTED = 130
LONGEST_PROBLEM = 2000  # characters of one wrong setting's line
LONGEST_QUOTE = 400  # characters of what the other side said


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

    def __init__(self, reason: str, *, whole: str | None = None) -> None:
        """reason: may quote what the other side sent, so it is made one line of printable text of bounded length.

        whole: all that the other side said, whose hash stands there where the line is cut; None: the reason is all.
        """
        super().__init__(quoted(reason, whole))


class SecureSumRefused(FaceFedError):
    """What secure aggregation was asked or given is not what its rules allow; nothing is sent or added."""

    def __init__(self, reason: str) -> None:
        """reason: may quote what the other side sent, so it is made one line of printable text of bounded length."""
        super().__init__(quoted(reason))


class UserError(FaceFedError):
    """The user's input is wrong: what was wrong, what was seen, what to do."""

    exit_code = EXIT_USER


class ConfigError(UserError):
    """One or more settings are wrong; `problems` holds one line for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        """problems: one complete line for each wrong setting."""
        self.problems = tuple(_shortened(escaped(problem)) for problem in problems)  # they quote what was written
        super().__init__("\n".join(self.problems))


class DataError(UserError):
    """A face data set on disk is missing, malformed or too small."""

    def __init__(self, line: str) -> None:
        """line: may name files and people as they are called, so what cannot be shown is escaped."""
        super().__init__(escaped(line))


class CheckpointError(UserError):
    """A checkpoint, pack or state file is cut short or belongs to another configuration."""

    def __init__(self, line: str) -> None:
        """line: may quote a damaged file, so what cannot be shown is escaped."""
        super().__init__(escaped(line))


class TrackingError(UserError):
    """The tracking address cannot be used."""


def escaped(text: str) -> str:
    """The text with each line break, control character or byte that is no UTF-8 as its escape."""
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def _shortened(line: str) -> str:
    """The line, without its middle where it is very long: its end says what to do."""
    return (
        line if len(line) <= LONGEST_PROBLEM else f"{line[: LONGEST_PROBLEM // 2]} ... {line[-LONGEST_PROBLEM // 2 :]}"
    )


def one_line(text: str, most: int = LONGEST_QUOTE) -> str:
    """The text as one line that may be shown and logged: no control characters, blanks joined, cut after `most`.

    Whoever sends a megabyte, a line break or a terminal's escape code shall not write our log.
    """
    shown = "".join(character if character.isprintable() else " " for character in text[: 4 * most])
    line = " ".join(shown.split())
    return line if len(line) <= most and len(text) <= 4 * most else f"{line[:most]} ..."


def quoted(text: str, whole: str | None = None) -> str:
    """`one_line` of what the other side said; where that leaves something out, with size and SHA-256 of the whole.

    So whoever has the whole can show that it is this, and it need not be kept.
    """
    line = one_line(text)
    if line.endswith(" ...") and len(text) > LONGEST_QUOTE:
        said = (text if whole is None else whole).encode(errors="surrogatepass")
        line += f" ({len(said):,} bytes, SHA-256 {hashlib.sha256(said).hexdigest()})"
    return line


def unknown_name(what: str, seen: str, choices: Iterable[str]) -> str:
    """One line for a name that is none of `choices`, with the nearest one suggested."""
    names = list(choices)
    near = difflib.get_close_matches(seen, names, n=1)
    hint = f"did you mean {near[0]!r}? Choices" if near else "choices"
    return f"{what} = {seen!r} is unknown; {hint}: {', '.join(names)}."

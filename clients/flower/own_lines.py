"""What a site's processes tell their flower-client: lines of our own, which nobody else can say.

The output of the SuperNode and of the trainer also holds what others say: a server's name of a round, an error's text,
a library's warning, with whatever line breaks and escape codes are in them.  So flower-client believes none of it.  A
line that is meant for it begins with a mark, made from the key that this flower-client shares with its two processes;
the rest goes into a file, and to no terminal.
"""

import hmac
import logging
import os
import re
import subprocess
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from common.system.console import OneLine
from common.system.events import SHOWN

LOG_KEPT_BYTES = 10_000_000
# Flower's log by its templates, and what the arguments must be to become a line of ours: never a text of the server's.
TOLD: Mapping[str, tuple[str, int | None, re.Pattern[str]]] = {  # template: our word, which argument goes with it
    "SuperNode ID: %s": ("node", 0, re.compile(r"\d{1,20}")),
    "[RUN %s, ROUND %s]": ("round", 1, re.compile(r"\d{1,9}|again", re.ASCII)),
    "Receiving: %s message (ID: %s)": ("receives", 0, re.compile(r"train|evaluate")),
    "Sent successfully": ("sent", None, re.compile("")),
    "Connection attempt failed, retrying in %.2f seconds": ("retries", None, re.compile("")),
}


def mark_of(key: bytes) -> str:
    """What opens a line of our own.  key: the meeting place's."""
    return hmac.new(key, b"a line of our own", "sha256").hexdigest()[:32] + " "


class ShownLines(OneLine):
    """Formats a process's log, and marks what is meant for the user: where SHOWN is the first argument."""

    def __init__(self, mark: str) -> None:
        """mark: from `mark_of`."""
        super().__init__("%(levelname)s: %(message)s")
        self._mark = mark

    def format(self, record: logging.LogRecord) -> str:
        """The record's lines; the first one of ours begins with the mark."""
        is_shown = isinstance(record.args, tuple) and record.args[:1] == (SHOWN,)
        return (self._mark if is_shown else "") + super().format(record)


class FlowerTold(logging.Handler):
    """Beside Flower's log: the same in lines of our own, as far as flower-client wants to know it."""

    def __init__(self, mark: str, output: int) -> None:
        """mark: from `mark_of`.  output: the descriptor that flower-client reads."""
        super().__init__()
        self._mark, self._output = mark, output

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, at once, so that it does not mix with another's."""
        if words := told_by(record):
            os.write(self._output, f"{self._mark}{words}\n".encode())


def told_by(record: logging.LogRecord) -> str:
    """What a line of Flower's log says, as a word and a number or a word; empty for all else."""
    word, index, allowed = TOLD.get(str(record.msg), ("", None, re.compile("")))
    if index is None:
        return word
    arguments = record.args if isinstance(record.args, tuple) else ()
    value = str(arguments[index]) if index < len(arguments) else ""
    return f"{word} {value}" if allowed.fullmatch(value) else ""


def follow(
    process: subprocess.Popen[bytes],
    path: Path,
    mark: str,
    notice: Callable[[str], object],
    overhear: Callable[[str], object] = str,
) -> threading.Thread:
    """Keep a program's output in a file that does not grow for ever, from a thread.

    notice: is shown each line of our own.  overhear: each other line, which a server may have written.
    """
    reader = threading.Thread(target=_read, args=(process.stdout, path, mark.encode(), notice, overhear), daemon=True)
    reader.start()
    return reader


def _read(
    output: IO[bytes], path: Path, mark: bytes, notice: Callable[[str], object], overhear: Callable[[str], object]
) -> None:
    if path.exists() and path.stat().st_size > LOG_KEPT_BYTES:
        path.replace(path.with_suffix(".log.1"))
    with path.open("ab") as kept, output:
        for raw in output:
            line = raw.removeprefix(mark)  # the mark lies nowhere on the disk
            kept.write(line)
            kept.flush()
            (notice if len(line) < len(raw) else overhear)(line.decode(errors="replace"))

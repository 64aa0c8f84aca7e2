"""What a person sees of any program: one line for an error, a bar while pictures are packed, tables, exit codes."""

import logging
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from common.errors import EXIT_FAILED, EXIT_INTERRUPTED, ConfigError, FaceFedError, escaped
from common.system.files import open_to_others, private_files
from common.system.runtime import require_tested_flower

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Write = Callable[[str], object]


class OneLine(logging.Formatter):
    """Each message on a line of its own, whatever it quotes: nobody else writes our log or on our terminal.

    A traceback keeps its lines, each indented, and no control characters either.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """The line, with what cannot be shown as its escape."""
        return escaped(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: ANN401, N802 - logging's name and type
        """The traceback's lines."""
        return "\n".join(f"  {escaped(line)}" for line in super().formatException(ei).splitlines())


def set_up_logging(level: str) -> None:
    """Our own loggers to standard error, in plain lines."""
    handler = logging.StreamHandler()
    handler.setFormatter(OneLine("%(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("facefed")
    logger.handlers = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


def run_program(program: str, work: Callable[[], int], stderr: TextIO, *, shared_files: bool = False) -> int:
    """Run a program's work; an error of ours becomes its line on standard error and its exit code.

    Every program comes through here, so what any of them writes is closed to other accounts, but for shared_files.
    SIGTERM ends the work as Ctrl-C does, so that what is open is closed and the exit code is the same.
    """
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with private_files(shared=shared_files):
            return work()
    except FaceFedError as error:
        lines = error.problems if isinstance(error, ConfigError) else [str(error)]
        stderr.writelines(f"{program}: {escaped(line)}\n" for line in lines)  # it may quote a server or a file
        return error.exit_code
    except KeyboardInterrupt:
        stderr.write(f"{program}: stopped.\n")
        return EXIT_INTERRUPTED
    except OSError as error:
        stderr.write(f"{program}: {escaped(str(error))}\n")
        return EXIT_FAILED
    finally:
        signal.signal(signal.SIGTERM, former)


def warn_of_open_files(program: str, paths: Iterable[Path], stderr: TextIO) -> None:
    """One line where other accounts can read or write one of these files and folders, which were made earlier."""
    if line := open_to_others(paths):
        stderr.write(f"{program}: warning: {line}\n")
        stderr.flush()


def warn_of_flower(program: str, *, any_flower: bool, stderr: TextIO) -> None:
    """One line where the Flower here is none that FaceFed was tested with; UserError where nobody accepted that."""
    if line := require_tested_flower(any_flower=any_flower):
        stderr.write(f"{program}: warning: {line}\n")
        stderr.flush()


@contextmanager
def stopping_on_signals(on_stop: Callable[[], None]) -> Iterator[None]:
    """Call `on_stop` on Ctrl-C and SIGTERM instead of dying; the former handlers come back afterwards."""

    def handler(_number: int, _frame: object) -> None:
        on_stop()

    previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, former in previous.items():
            signal.signal(number, former)


def counts(values: Mapping[str, object]) -> str:
    """Counts by name as words: 2 people, 3 pictures."""
    return ", ".join(
        f"{value:,} {name}" if isinstance(value, int) else f"{value} {name}" for name, value in values.items()
    )


_PLAIN_EVERY_S = 30.0


class PackProgress:
    """Progress of packing pictures, with rate and time left: a bar on a terminal, elsewhere a plain line now and then.

    Elsewhere the first line comes after half a minute, so that a short work has its last line only.
    """

    def __init__(self, label: str, stream: TextIO, *, goes_on: bool = False) -> None:
        """label: for example "packing celeba".  goes_on: what the first call has done was there already."""
        self._label, self._stream, self._goes_on = label, stream, goes_on
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._seen = 0
        self._began = self._told_at = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, total: int) -> None:
        """Called by the packer with the number of pictures done and the number of all."""
        self._seen = done
        if self._first is None:
            self._began, self._first = time.monotonic(), done
        if not self._stream.isatty():
            self._tell(done, total)
            return
        if self._progress is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.completed:,.0f} of {task.total:,.0f}"),
                TextColumn("{task.fields[rate]:,.0f} a second,"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=Console(file=self._stream),
            )
            self._progress.start()
            self._task = self._progress.add_task(self._label, total=total, completed=done, rate=0.0)
        if self._task is not None:
            self._progress.update(self._task, completed=done, rate=self._rate(done))

    def _rate(self, done: int) -> float:
        """Pictures a second since the first call."""
        return (done - (self._first or 0)) / max(time.monotonic() - self._began, 1e-3)

    def _tell(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._told_at < _PLAIN_EVERY_S or done >= total or self._first is None or done <= self._first:
            return
        self._told_at = now
        rate = self._rate(done)
        left_min = (total - done) / rate / 60
        line = f"{done:,} of {total:,} pictures, {100 * done // total} %, {rate:,.0f} a second, {left_min:.0f} min left"
        self._stream.write(f"{self._label}: {line}\n")
        self._stream.flush()

    def close(self) -> None:
        """End the bar; elsewhere say that pictures were packed, if any were."""
        if self._progress is not None:
            self._progress.stop()
        elif self._seen:
            there = f", {self._first:,} of them were there already" if self._goes_on and self._first else ""
            self._stream.write(f"{self._label}: {self._seen:,} pictures{there}\n")
            self._stream.flush()


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in aligned columns, the first row being the heads."""
    rows = [[escaped(cell) for cell in row] for row in rows]  # names, and what a server of models says
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])

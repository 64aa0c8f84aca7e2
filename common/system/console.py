"""What a person sees: one line for an error, plain lines or a progress bar for a run, and exit codes."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO

from common.errors import EXIT_FAILED, EXIT_INTERRUPTED, ConfigError, FaceFedError, escaped
from common.metrics.figures import AUC, CLOSED, FOLDS, PAIRS, figures_of
from common.metrics.names import of_split
from common.system.events import EventReader
from common.system.files import open_to_others, private_files

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


def _score_text(event: Mapping[str, Any]) -> str:
    split = event["split"]
    told = {of_split(split, row.name): row.told for row in figures_of(CLOSED, PAIRS, FOLDS) if row.told}
    parts = [f"{label} {event[name]:.3f}" for name, label in told.items() if name in event]
    return f"{split}: " + ", ".join(parts) if parts else ""


def event_line(event: Mapping[str, Any]) -> str:
    """One event of a run as a plain line; empty for what a person need not read."""
    kind = event["kind"]
    if kind == "joined":
        held = f"{event['people']:,} people, {event['pictures']:,} training pictures, {event['device']}"
        num_here, wanted = len(event["here"]), event["wanted"]
        of_wanted = f" of {wanted}" if num_here <= wanted else ""  # more may come than are needed
        return f"joined: {event['client']} ({held}); {num_here}{of_wanted} clients are here"
    if kind == "gathered":
        return f"joined: {event['clients']:,} clients are here ({event['wanted']:,} needed)"
    if kind == "waiting":
        here = ", ".join(event["here"]) or "nobody yet"
        missing = event["wanted"] - len(event["here"])
        return f"waiting for clients: {here} here, {missing} more needed ({event['seconds']} s)"
    if kind == "refused":
        where = f" in round {event['round']}" if "round" in event else ""
        who = f"{event['client']}: " if event["client"] else ""
        return f"left out{where}: {who}{event['reason']}"
    if kind == "round":
        return (
            f"round {event['round']} of {event['rounds']}: {event['clients']} clients, train loss"
            f" {event['train_loss']:.3f}, {event['seconds']:.1f} s"
        )
    if kind == "scored":
        name = "untrained model" if event["round"] == 0 else f"model of round {event['round']}"
        return f"{name}: {_score_text(event)}" if _score_text(event) else ""
    if kind == "resumed":
        return f"going on after round {event['round']}"
    if kind == "saving":
        return "registering the model"
    return str(event.get("line", "")) if kind in ("warning", "stopped_early") else ""


class RunView:
    """Shows a run's events: a bar with round, clients and time left on a terminal, plain lines elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        """stream: usually sys.stdout; a bar is drawn when it is a terminal."""
        self._stream = stream
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("round {task.completed:.0f}/{task.total:.0f}"),
                TextColumn("{task.fields[clients]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(file=self._stream),
            )
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, event: Mapping[str, Any]) -> None:
        """Show one event."""
        line = escaped(event_line(event))  # names and reasons are the clients'
        if self._progress is None:
            if line:
                self._stream.write(line + "\n")
                self._stream.flush()
            return
        if line:
            self._progress.console.print(line, highlight=False, markup=False)
        self._move_bar(event)

    def _move_bar(self, event: Mapping[str, Any]) -> None:
        if self._progress is None:
            return
        if event["kind"] == "members" and self._task is None:  # a client that joins late brings no second bar
            self._task = self._progress.add_task(
                "federating", total=event["rounds"], clients=f"{event['clients']} clients"
            )
        elif event["kind"] == "round" and self._task is not None:
            self._progress.update(self._task, completed=event["round"], clients=f"{event['clients']} clients")
        elif event["kind"] == "stopped_early" and self._task is not None:
            self._progress.update(self._task, total=event["round"])  # the bar is full: no round is to come


_PLAIN_EVERY_S = 30.0


class PackProgress:
    """Progress of packing pictures, with rate and time left: a bar on a terminal, elsewhere a plain line now and then.

    Elsewhere the first line comes after half a minute, so that a short work has its last line only.
    """

    def __init__(self, label: str, stream: TextIO) -> None:
        """label: for example "packing celeba"."""
        self._label, self._stream = label, stream
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
            self._stream.write(f"{self._label}: {self._seen:,} pictures\n")
            self._stream.flush()


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text in aligned columns, the first row being the heads."""
    rows = [[escaped(cell) for cell in row] for row in rows]  # names, and what a server of models says
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def summary_lines(summary: Mapping[str, Any], *, folder: str, tracking: str) -> list[str]:
    """What was learned and where to look, after a federated run."""
    untrained, best = summary.get("untrained", {}), summary.get("best", {})
    lines = [""]
    if AUC in untrained and AUC in best:
        lines.append(
            f"test AUC on people never seen: untrained {untrained[AUC]:.3f} -> federated {best[AUC]:.3f}"
            f" (EER {untrained['eer']:.3f} -> {best['eer']:.3f}), best round {summary['best_round']}"
            f" of {summary['rounds']}"
        )
    if summary.get("stopped_early"):
        lines.append(f"stopped early after round {summary['rounds']} (training.patience)")
    rows = [["client", "accuracy", "test AUC", "EER", "TAR@FAR 1e-2"]]
    for name, figures in summary.get("clients", {}).items():
        keys = ("test_accuracy", f"test_{AUC}", "test_eer", "test_tar_at_far_1e-2")
        rows.append([name, *(f"{figures[key]:.3f}" if key in figures else "-" for key in keys)])
    if len(rows) > 1:
        lines += ["", table(rows)]
    lines += ["", f"model SHA-256 {summary['model_sha256']}"]
    lines += [f"registered: {name}" for name in summary.get("registered", [])]
    if summary.get("below_untrained"):
        lines.append(f"warning: {summary['below_untrained']}")
    if summary.get("refused_replies"):
        lines.append(f"replies left out: {summary['refused_replies']} (see {folder}/metrics.json)")
    lines.append(f"run folder: {folder} (config.toml, metrics.json, plots/, checkpoints/)")
    lines.append(f"tracking: {tracking}")
    return lines


class Follower:
    """Shows the events of a run's folder from a thread, until it is closed."""

    def __init__(self, reader: EventReader, view: RunView) -> None:
        """reader: of the run's folder.  view: entered by the caller."""
        self._reader, self._view = reader, view
        self._closing = threading.Event()
        self.summary: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()

    def _follow(self) -> None:
        while not self._closing.wait(0.2):
            self._look()
        self._look()

    def _look(self) -> None:
        for event in self._reader.new_events():
            if event["kind"] == "finished":
                self.summary = event
            self._view.show(event)

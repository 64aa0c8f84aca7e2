"""The ServerApp of `flwr run`: on a SuperLink that is there, or in Flower's own simulation.

    flwr run . my-federation --run-config 'config="demo" federation.rounds=3'

The settings come in the run's configuration and the run's folder is made where Flower started the ServerApp; all else
is as with `flower-server`.  Flower shows what is written here as the run's log, and a run that fails ends there as
`finished:failed`, with our line.
"""

import logging
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.errors import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER, FaceFedError, UserError, escaped
from common.runs import forget_its_end, has_checkpoint
from common.settings import Settings
from common.system.console import set_up_logging
from common.system.events import OUTCOME_FILE, STOP_FILE, EventReader
from common.system.files import private_files, read_json
from common.system.run_view import Follower, RunView, begin_rows, ending_lines, federation_ending, header_lines
from common.system.runtime import quiet_libraries, require_one_version, require_tested_flower
from common.tracking.address import with_absolute_tracking
from common.tracking.page import tracking_line, where_to_look
from common.weights import begin_run, check_weights
from server.app import Surroundings, federate, prepare_process
from server.exchange.mailbox import Mailbox
from server.flower.public_grid import PublicMailbox
from server.locks import run_held
from server.public_set import open_public_set, with_absolute_public_set
from server.run_config import Asked, RunConfig, read_run_config

if TYPE_CHECKING:
    from server.flower.grid import GridMailbox

PROGRAM: Final = "flwr run"
SETTLED_S: Final = 5.0  # Flower's simulation registers all its nodes at once, and early

log = logging.getLogger("facefed.server")


class OneLineOfOurs(logging.Filter):
    """What Flower's log says of an error of ours has the line of it, and no traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let everything through, an error of ours without its stack."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, FaceFedError):
            record.exc_info = record.exc_text = None
            record.msg, record.args = "%s", (escaped(str(error)),)
        return True


class Settled:
    """Whether nobody else can come: so many nodes are here, or in a simulation no other one has come for a while."""

    def __init__(self, mailbox: Mailbox, num_clients: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        """num_clients: of the simulation; 0 in a deployment, where others may always come."""
        self._mailbox, self._num_clients, self._clock = mailbox, num_clients, clock
        self._seen, self._since = 0, clock()

    def __call__(self) -> bool:
        """Look."""
        if self._num_clients == 0:
            return False
        found = len(self._mailbox.node_ids())
        if found != self._seen:
            self._seen, self._since = found, self._clock()
        return found >= self._num_clients or (found > 0 and self._clock() - self._since >= SETTLED_S)


def run(given: RunConfig, mailbox: "GridMailbox | PublicMailbox") -> None:
    """One run, from its configuration to the lines that tell its end.  Raises FaceFedError when it fails."""
    if line := require_tested_flower(
        any_flower=bool(given.get("any-flower", False)), flag="--run-config any-flower=true"
    ):
        log.warning("%s", line)
    require_one_version("the server")
    asked = read_run_config(given)
    settings, address = with_absolute_tracking(asked.settings, asked.address, Path.cwd())
    settings = with_absolute_public_set(settings, Path.cwd())
    open_public_set(settings)  # what it refuses is told before a run is begun
    with ExitStack() as held:
        if asked.resumed:
            held.enter_context(run_held(asked.resumed))
            check_weights(settings)
            forget_its_end(asked.resumed)
            folder = asked.resumed
        else:
            settings, folder = begin_run(settings, address)
            held.enter_context(run_held(folder))
        _federate(settings, folder, asked, mailbox)


def _federate(settings: Settings, folder: Path, asked: Asked, mailbox: "GridMailbox | PublicMailbox") -> None:
    rows = begin_rows(settings, folder, look=where_to_look(settings), federated=True)
    _show(header_lines(f"run {folder.name}", rows))
    surroundings = Surroundings(
        run_folder=folder,
        stopped=(folder / STOP_FILE).exists,
        all_nodes_are_here=Settled(mailbox, len(asked.clients)),
        simulated=bool(asked.clients),
        git_commit="unknown",  # a bundle is of no checkout
        program=PROGRAM,
        expect=mailbox.expect,
    )
    with RunView(sys.stdout) as view, Follower(EventReader(folder, only_new=True), view) as follower:
        federate(settings, mailbox, surroundings)
    outcome = read_json(folder / OUTCOME_FILE)
    code, line = int(outcome["exit_code"]), str(outcome["line"])
    if code != EXIT_DONE:
        raise _failure(code)(f"{line}{_how_to_go_on(folder, code, asked)}")
    _show(ending_lines(federation_ending(follower.summary), folder, tracking=tracking_line(settings, folder)))


def _show(lines: Sequence[str]) -> None:
    """By the one function of the stream that Flower listens at."""
    sys.stdout.write("\n".join(lines) + "\n")


def _failure(code: int) -> type[FaceFedError]:
    return UserError if code == EXIT_USER else FaceFedError


def _how_to_go_on(folder: Path, code: int, asked: Asked) -> str:
    """Where a checkpoint waits, the fault was not the user's, and the clients are still there."""
    resumable = code in (EXIT_FAILED, EXIT_INTERRUPTED) and not asked.clients and has_checkpoint(folder)
    return f" Go on with: flwr run . CONNECTION --run-config 'resume=\"{folder}\"'" if resumable else ""


def mailbox_over(grid: Grid) -> "GridMailbox | PublicMailbox":
    """The Grid as the round loop uses it: by Flower's inside, and by its public interface where that has changed."""
    try:
        from server.flower.grid import GridMailbox, ask_soon, push_in_turn
    except ImportError as error:
        log.warning(
            "Flower's inside has changed (%s): replies are taken by its public interface, which is slower and bounds"
            " no reply's size",
            error,
        )
        return PublicMailbox(grid)
    ask_soon()
    push_in_turn()
    return GridMailbox(grid)


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Flower's entry."""
    quiet_libraries()
    set_up_logging("info")
    logging.getLogger("flwr").addFilter(OneLineOfOurs())
    prepare_process()
    with private_files():
        run(context.run_config, mailbox_over(grid))

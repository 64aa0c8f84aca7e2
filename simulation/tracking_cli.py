"""The flags of `facefed tracking ...`: one row in ACTIONS for each action."""

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from common.console import set_up_logging
from common.flags import FLAGS, add_run_settings, read_run_settings

_OWN: Final = ("--tracking-uri", "--out", "--log-level")  # the run settings that tracking itself has


class Action(NamedTuple):
    """One action of `facefed tracking`."""

    text: str  # of its help
    add_options: Callable[[argparse.ArgumentParser], None]
    handle: Callable[[argparse.Namespace], int]  # returns the exit code


def add_tracking_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `tracking` and its actions to the commands of `facefed`."""
    tracking = commands.add_parser("tracking", help="run, fill and check the MLflow server")
    actions = tracking.add_subparsers(dest="action", required=True)
    for name, action in ACTIONS.items():
        action.add_options(actions.add_parser(name, help=action.text, description=action.text))


def add_tracking_settings(parser: argparse.ArgumentParser) -> None:
    """`--config`, `--tracking-uri`, `--out` and `--log-level`, as every program has them."""
    add_run_settings(parser, without=[flag.names[0] for flag in FLAGS if flag.names[0] not in _OWN])


def _doctor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    add_tracking_settings(parser)


def _doctor(arguments: argparse.Namespace) -> int:
    settings = read_run_settings(arguments)
    set_up_logging(settings.run.log_level)
    from common.tracking.doctor import examine

    return examine(settings, sys.stdout)


# The name typed after `facefed tracking` -> what it is.
ACTIONS: Final[Mapping[str, Action]] = {
    "doctor": Action("check the tracking: server, write test, disk, telemetry, unsent runs", _doctor_options, _doctor),
}

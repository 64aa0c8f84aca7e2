"""`flower-simulation` and `facefed`: parse, check at the door, run, show. Only these and the other cli files print."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from common.console import run_program, set_up_logging
from common.flags import add_run_settings, read_run_settings
from common.runtime import go_silent

DEFAULT_CONFIG = "celeba_vggface2_fedavg"
DATA_LAYOUTS = ("celeba", "vggface2")


def _add_site_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("this machine")
    group.add_argument(
        "--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps (default: auto)"
    )
    group.add_argument("--cache-dir", default=".facefed/packs", metavar="DIR", help="where aligned pictures are kept")


def simulation_parser() -> argparse.ArgumentParser:
    """The parser of `flower-simulation`."""
    parser = argparse.ArgumentParser(
        prog="flower-simulation",
        description="Federate data sets of this machine: the same app as flower-server, under Ray.",
    )
    parser.add_argument(
        "--client",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a client and its data set (NAME:DATASET=DIR for a name of your own); repeatable",
    )
    _add_site_options(parser)
    add_run_settings(parser, without=("--epochs",))
    return parser


def main_simulation(argv: Sequence[str] | None = None) -> int:
    """`flower-simulation`: returns the exit code."""
    go_silent()
    arguments = simulation_parser().parse_args(argv)

    def work() -> int:
        settings = read_run_settings(arguments, default_config=DEFAULT_CONFIG)
        set_up_logging(settings.run.log_level)
        from simulation.commands import federate_here

        return federate_here(
            settings,
            arguments.client,
            device=arguments.device,
            cache_dir=Path(arguments.cache_dir),
            out=sys.stdout,
            err=sys.stderr,
        )

    return run_program("flower-simulation", work, sys.stderr)


def _data_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    data = commands.add_parser("data", help="make, prepare and check face data sets").add_subparsers(
        dest="action", required=True
    )
    synth = data.add_parser("synth", help="write a synthetic data set in an official layout")
    synth.add_argument("--layout", required=True, choices=DATA_LAYOUTS)
    synth.add_argument("--out", dest="folder", required=True, metavar="DIR", help="the folder to make")
    synth.add_argument("--people", type=int, metavar="N", help="how many people")
    synth.add_argument("--pictures", type=int, metavar="N", help="pictures of each person")
    synth.add_argument("--seed", type=int, default=1, metavar="N")
    for name, text in (("prepare", "align and pack a data set once"), ("audit", "report what is in a data set")):
        command = data.add_parser(name, help=text)
        if name == "audit":
            command.add_argument("--json", action="store_true", help="print the report as JSON")
        _add_data_sources(command)
        _add_site_options(command)
        add_run_settings(command, without=("--epochs", "--rounds"))


def _add_data_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--client",
        action="append",
        default=[],
        metavar="NAME[=DIR]",
        help="a data set: celeba, vggface2, folder, or NAME:DATASET=DIR",
    )
    parser.add_argument(
        "--data-dir",
        action="append",
        default=[],
        metavar="DIR",
        help="its folder (NAME=DIR for several; default: data/NAME)",
    )


def facefed_parser() -> argparse.ArgumentParser:
    """The parser of `facefed`."""
    parser = argparse.ArgumentParser(
        prog="facefed", description="Face data, local training, and what surrounds a federation."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _data_parser(commands)
    train = commands.add_parser("train", help="train without a federation").add_subparsers(dest="action", required=True)
    local = train.add_parser("local", help="one holder alone, each picture processed as often as in the federation")
    _add_data_sources(local)
    _add_site_options(local)
    add_run_settings(local)
    return parser


def _synth(arguments: argparse.Namespace) -> int:
    from simulation.data_commands import synth

    return synth(
        arguments.layout,
        Path(arguments.folder),
        people=arguments.people,
        pictures=arguments.pictures,
        seed=arguments.seed,
        out=sys.stdout,
    )


def _with_settings(arguments: argparse.Namespace, name: str) -> int:
    settings = read_run_settings(arguments, default_config=DEFAULT_CONFIG)
    set_up_logging(settings.run.log_level)
    from simulation import data_commands
    from simulation.commands import train_local
    from simulation.sites import data_options

    options = data_options(arguments.client, arguments.data_dir)
    device, cache_dir = arguments.device, Path(arguments.cache_dir)
    if name == "prepare":
        return data_commands.prepare(settings, options, device=device, cache_dir=cache_dir, out=sys.stdout)
    if name == "audit":
        shape = "json" if arguments.json else "text"
        return data_commands.audit_data(settings, options, shape=shape, out=sys.stdout)
    return train_local(settings, options, device=device, cache_dir=cache_dir, out=sys.stdout)


def main(argv: Sequence[str] | None = None) -> int:
    """`facefed`: returns the exit code."""
    go_silent()
    arguments = facefed_parser().parse_args(argv)
    table: dict[tuple[str, str], Callable[[], int]] = {
        ("data", "synth"): lambda: _synth(arguments),
        ("data", "prepare"): lambda: _with_settings(arguments, "prepare"),
        ("data", "audit"): lambda: _with_settings(arguments, "audit"),
        ("train", "local"): lambda: _with_settings(arguments, "local"),
    }
    return run_program("facefed", table[(arguments.command, arguments.action)], sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

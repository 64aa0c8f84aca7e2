"""The flags of `facefed tracking ...`: one row in ACTIONS for each action."""

import argparse
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from common.console import set_up_logging, stopping_on_signals
from common.errors import EXIT_INTERRUPTED
from common.flags import FLAGS, add_run_settings, read_run, read_run_settings

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


def _sync_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN_FOLDER", help="a run's folder, or its id below --out")
    add_tracking_settings(parser)


def _sync(arguments: argparse.Namespace) -> int:
    settings = read_run_settings(arguments)
    set_up_logging(settings.run.log_level)
    from common.tracking.sync import sync_runs

    # Each run knows where it was to go: only a flag says otherwise, never the configuration or the environment.
    uri = getattr(arguments, "tracking.uri") or ""
    return sync_runs(arguments.runs, Path(settings.run.out), uri, sys.stdout, sys.stderr)


def _serve_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=5000, metavar="N", help="port to listen on (default: 5000)")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on; 0.0.0.0 for other machines and containers too (default: 127.0.0.1)",
    )
    parser.add_argument(
        "--backend",
        metavar="URI",
        help="where runs are kept: sqlite (mlflow.db here), sqlite:///FILE, postgresql://USER@HOST/NAME or mysql://..."
        " (default: MLFLOW_BACKEND_STORE_URI, where nobody else reads a password in it, or sqlite)",
    )
    parser.add_argument(
        "--artifacts",
        default="mlartifacts",
        metavar="DIR",
        help="where plots and models are kept: a folder or s3://BUCKET/PREFIX (default: mlartifacts)",
    )
    parser.add_argument("--auth", action="store_true", help="ask for a user name and a password")
    parser.add_argument(
        "--allowed-hosts",
        default="",
        metavar="NAME,...",
        help="further names under which clients reach this server, such as a compose service's: mlflow",
    )


def _serve(arguments: argparse.Namespace) -> int:
    set_up_logging("info")
    from common.tracking.serve import ServeOptions, plan_server, serve

    options = ServeOptions(
        host=arguments.host,
        port=arguments.port,
        backend=arguments.backend or os.environ.get("MLFLOW_BACKEND_STORE_URI", "") or "sqlite",
        artifacts=arguments.artifacts,
        auth=arguments.auth,
        allowed_hosts=[name for name in arguments.allowed_hosts.replace(" ", "").split(",") if name],
    )
    plan = plan_server(options, os.environ, Path.cwd())

    def show(*lines: str) -> None:
        sys.stdout.writelines(f"{line}\n" for line in lines)
        sys.stdout.flush()

    show(*plan.notes, "starting (a new database takes up to a minute) ...")
    ended = threading.Event()
    with stopping_on_signals(ended.set):
        serve(
            plan,
            is_stopped=ended.is_set,
            on_ready=lambda: show(
                f"healthy: {plan.address} is the user interface and the --tracking-uri; Ctrl-C ends it"
            ),
        )
    show("stopped; nothing is left running.")
    return EXIT_INTERRUPTED


def _doctor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    add_tracking_settings(parser)


def _doctor(arguments: argparse.Namespace) -> int:
    settings, address = read_run(arguments)
    set_up_logging(settings.run.log_level)
    from common.tracking.doctor import as_json, as_line, examine, exit_code

    findings = []
    for finding in examine(settings, os.environ, Path.cwd(), address):
        findings.append(finding)
        if not arguments.json:
            sys.stdout.write(as_line(finding) + "\n")
            sys.stdout.flush()
    if arguments.json:
        sys.stdout.write(as_json(findings) + "\n")
    return exit_code(findings)


def _import_wandb_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="+", metavar="DIR", help="wandb's folder, an offline-run-* folder in it, or a .wandb file"
    )
    parser.add_argument(
        "--experiment", default="", metavar="NAME", help="MLflow's experiment (default: each run's wandb project)"
    )
    add_tracking_settings(parser)


def _import_wandb(arguments: argparse.Namespace) -> int:
    settings, address = read_run(arguments)
    set_up_logging(settings.run.log_level)
    from common.tracking.address import resolve_uri
    from common.tracking.wandb_folders import import_folders

    return import_folders(
        arguments.folders, resolve_uri(address, Path.cwd()), arguments.experiment, sys.stdout, sys.stderr
    )


# The name typed after `facefed tracking` -> what it is.
ACTIONS: Final[Mapping[str, Action]] = {
    "serve": Action("check, start and watch an MLflow server of your own", _serve_options, _serve),
    "sync": Action("send what runs kept while their server was away", _sync_options, _sync),
    "import-wandb": Action("bring offline runs of Weights & Biases into MLflow", _import_wandb_options, _import_wandb),
    "doctor": Action("check the tracking: server, write test, disk, telemetry, unsent runs", _doctor_options, _doctor),
}

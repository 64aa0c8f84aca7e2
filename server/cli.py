"""`flower-server`: one federated run over real client processes, from start to exit code."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import EXIT_FAILED, EXIT_INTERRUPTED, UserError, escaped
from common.flags import (
    add_any_flower,
    add_run_settings,
    flags_of,
    program_parser,
    read_run,
    refuse_ablation,
    refuse_run_settings,
)
from common.settings import RunSettings, Settings
from common.system.console import run_program, set_up_logging, stopping_on_signals, warn_of_flower, warn_of_open_files
from common.system.events import RUN_FILE, EventReader
from common.system.processes import host_port, is_loopback, parse_address, require_free_port
from common.system.run_view import (
    Follower,
    RunView,
    begin_rows,
    ending_lines,
    federation_ending,
    header_lines,
    header_row,
)
from common.system.runtime import go_silent, reach_directly
from server.run_config import DEFAULT_CONFIG

if TYPE_CHECKING:
    from server.flower.launch import ServerOptions

_OVERRIDES = {"--min-clients": "federation.min_clients", "--join-timeout": "federation.join_timeout_s"}


def parser() -> argparse.ArgumentParser:
    """The parser of `flower-server`."""
    program = program_parser(
        "flower-server",
        "Run one federation: wait for clients, train, record, end with the run.",
        "flower-server --config demo                              two clients of this machine",
        "flower-server --tls certs --address 0.0.0.0:443          clients of other machines, each with its key",
        "flower-server --strategy fedprox --rounds 20 --model resnet50",
        "flower-server --evaluate models:/resnet18_federated_fedavg@champion   everybody scores it, nobody trains",
        "flower-server --resume 20261128-101500-1a2b3c            go on with a run that was stopped",
    )
    group = program.add_argument_group("this server")
    group.add_argument("--address", default="127.0.0.1:8000", metavar="HOST:PORT", help="where clients connect")
    # Named like the settings that they override, they are read and checked together with all others.
    group.add_argument(
        "--min-clients",
        dest="federation.min_clients",
        metavar="N",
        help="clients to wait for, and replies a round needs",
    )
    group.add_argument("--join-timeout", dest="federation.join_timeout_s", metavar="S", help="seconds to wait for them")
    group.add_argument(
        "--evaluate",
        metavar="MODEL",
        action="append",
        default=[],
        help="have everybody score a model, and train nothing: a registered model, FILE.safetensors, a run's folder or"
        " id (whose settings it has, without --config); more than once: one after the other, and a table of models and"
        " sites",
    )
    group.add_argument("--resume", default="", metavar="RUN", help="go on with a run that was killed: its id or folder")
    group.add_argument("--database", metavar="FILE", help="keep Flower's state in this file instead of in memory")
    group.add_argument(
        "--insecure",
        action="store_true",
        help="allow plain text outside this machine: anyone on the way can read and alter it",
    )
    group.add_argument(
        "--tls",
        metavar="DIR",
        help="certificates and accepted keys, as `facefed certs init` makes them (docs/SECURITY.md)",
    )
    group.add_argument(
        "--front-door",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="let nginx listen, which passes on what clients need and nothing else (default: where other machines reach"
        " the address)",
    )
    group.add_argument(
        "--status-port",
        metavar="PORT",
        help="a page of who is in, rounds, scores, bytes and refusals, for this machine alone (HOST:PORT: for others"
        " too, without a password)",
    )
    add_any_flower(group)
    add_run_settings(program, flags=flags_of("flower-server"), default_config=DEFAULT_CONFIG)
    return program


def _check_exposure(arguments: argparse.Namespace, host: str, port: int) -> None:
    if arguments.tls and arguments.insecure:
        raise UserError("--tls and --insecure contradict each other; give one of them.")
    if not (is_loopback(host) or arguments.tls or arguments.insecure):
        raise UserError(
            f"--address {host_port(host, port)} can be reached from other machines and would be plain text: anyone on"
            " the way could read and alter models, and anyone could take part. Give --tls DIR (`facefed certs init`"
            " makes it), use 127.0.0.1, or give --insecure if you accept that."
        )


def _say_where(options: "ServerOptions", wanted: int) -> None:
    where = f"server at {host_port(options.host, options.port)}"
    if options.tls:
        from common.system.certs import CA_KEY, accepted_keys

        names = list(accepted_keys(options.tls.clients))
        where += f" with TLS, for {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        if (options.tls.ca.parent / CA_KEY).exists():
            sys.stdout.write(f"note: {options.tls.ca.parent / CA_KEY} can make other servers; keep it elsewhere\n")
    elif is_loopback(options.host):
        sys.stdout.write(
            "note: plain text on loopback: any account on this machine can take part as any site, and has the model"
            " then; --tls DIR keeps others out (`facefed certs init` makes it)\n"
        )
    sys.stdout.write(f"{where}; waiting for {wanted} clients\n")
    sys.stdout.flush()


def _how_to_go_on(run_folder: Path, exit_code: int) -> str:
    """Where a checkpoint waits, and the fault was not the user's."""
    from common.runs import has_checkpoint

    resumable = exit_code in (EXIT_FAILED, EXIT_INTERRUPTED) and has_checkpoint(run_folder)
    return f" Go on with: flower-server --resume {run_folder}" if resumable else ""


def _absolute(settings: Settings, address: str) -> tuple[Settings, str]:
    """The settings and the tracking address as they mean the same in every process of the run."""
    from common.tracking.address import with_absolute_tracking

    settings, address = with_absolute_tracking(settings, address, Path.cwd())
    if settings.verification.public_dir == "none":
        return settings, address
    from server.public_set import with_absolute_public_set  # with torch, which this process can do without

    return with_absolute_public_set(settings, Path.cwd()), address


def _check_public_set(settings: Settings) -> None:
    """Pictures that cannot be used are the user's mistake; the ServerApp reads them again."""
    if settings.verification.public_dir != "none":
        from server.public_set import open_public_set

        open_public_set(settings)


def _set_evaluation(arguments: argparse.Namespace) -> None:
    """Make --evaluate MODEL the settings that it stands for.  Raises UserError."""
    if arguments.resume:
        raise UserError("--evaluate begins a run and --resume goes on with one; give one of them.")
    if vars(arguments)["federation.rounds"] is not None:
        raise UserError("--evaluate trains nothing, so there are no rounds; leave --rounds out.")
    [model] = arguments.evaluate
    if not model.strip() or model in ("none", "imagenet"):
        raise UserError(
            f"--evaluate {model!r} is no model; give models:/NAME@champion, FILE.safetensors, a run's folder or its id."
        )
    if not arguments.config:
        from common.runs import CONFIG_FILE

        out = vars(arguments)["run.out"] or RunSettings().out
        places = (Path(model).expanduser(), Path(out).expanduser() / model)
        folder = next((place for place in places if (place / RUN_FILE).is_file()), None)
        if folder is not None:
            arguments.config = str(folder / CONFIG_FILE)
    vars(arguments)["model.pretrained"] = model
    vars(arguments)["federation.rounds"] = "1"
    arguments.set = [*arguments.set, "federation.evaluate_only=true"]


def _settings_and_folder(arguments: argparse.Namespace) -> tuple[Settings, str, Path | None]:
    """The run's settings and tracking address, or with --resume those of the run that goes on, and its folder."""
    if arguments.evaluate:
        _set_evaluation(arguments)
    if not arguments.resume:
        return *read_run(arguments, default_config=DEFAULT_CONFIG), None
    from common.runs import unfinished_federation

    given = None
    if arguments.config:
        given = _absolute(*read_run(arguments, default_config=DEFAULT_CONFIG))
        arguments.config = None
    own = [flag for flag, dotted in _OVERRIDES.items() if vars(arguments)[dotted] is not None]
    if own:
        raise UserError(f"--resume goes on with the run's own settings; leave {', '.join(own)} out.")
    refuse_run_settings(arguments, "--resume", but=("run.out", "run.log_level"))
    out = vars(arguments).get("run.out") or RunSettings().out
    folder, settings, address = unfinished_federation(arguments.resume, out, given)
    return settings, address, folder


def _serve(arguments: argparse.Namespace) -> int:
    warn_of_flower("flower-server", any_flower=arguments.any_flower, stderr=sys.stderr)
    return _serve_each(arguments) if len(arguments.evaluate) > 1 else _serve_run(arguments)[0]


def _serve_each(arguments: argparse.Namespace) -> int:
    """A run for each model that is to be scored, and then all of them in one table."""
    from server.cross_sites import Row, lines, row_of, write

    models: list[str] = arguments.evaluate
    if twice := next((model for model in models if models.count(model) > 1), ""):
        raise UserError(f"--evaluate {twice} is given twice; name each model once.")
    for model in models:
        _settings_and_folder(_of_one(arguments, model))  # mistakes of any are told before the first is scored
    rows: list[Row] = []
    code, folder = EXIT_FAILED, Path()
    for model in models:
        code, ended = _serve_run(_of_one(arguments, model))
        if code:
            break
        rows.append(row_of(model, ended))
        folder = ended
    if rows:
        sys.stdout.writelines(f"{line}\n" for line in lines(rows, len(models)))
        sys.stdout.write(f"the table: {', '.join(map(str, write(rows, folder)))}\n")
        sys.stdout.flush()
    return code


def _of_one(arguments: argparse.Namespace, model: str) -> argparse.Namespace:
    """The command line as if that model were the only one."""
    return argparse.Namespace(**vars(arguments) | {"evaluate": [model]})


def _serve_run(arguments: argparse.Namespace) -> tuple[int, Path]:
    """One run; returns its exit code and its folder."""
    settings, address, resumed = _settings_and_folder(arguments)
    host, port = parse_address(arguments.address, "--address")
    reach_directly(host)  # its own processes speak to it there
    _check_exposure(arguments, host, port)
    refuse_ablation(settings, "flower-server")
    if settings.secagg.enabled:
        from common.secagg.sites import require_sites

        require_sites(settings.federation.min_clients)
    set_up_logging(settings.run.log_level)
    from common.runs import forget_its_end
    from common.system.certs import read_server_folder
    from common.tracking.address import local_files
    from common.weights import begin_run, check_weights
    from server.flower.front_door import find_nginx
    from server.flower.launch import ServerOptions
    from server.locks import database_held, run_held
    from server.status import StatusServer, status_address

    status = None if arguments.status_port is None else status_address(arguments.status_port)
    settings, address = _absolute(settings, address)
    tls = read_server_folder(Path(arguments.tls).expanduser().resolve(), host) if arguments.tls else None
    front_door = not is_loopback(host) if arguments.front_door is None else arguments.front_door
    if front_door:
        find_nginx()
    database = Path(arguments.database).expanduser().resolve() if arguments.database else None
    if not arguments.shared_files:
        kept = [Path(settings.run.out).expanduser(), *([database] if database else []), *local_files(address)]
        warn_of_open_files("flower-server", kept, sys.stderr)
    with ExitStack() as held:
        if resumed:
            held.enter_context(run_held(resumed))
        for where in [(host, port, "--address"), *([(*status, "--status-port")] if status else [])]:
            require_free_port(*where)  # before anything of a run that cannot begin is left behind
        if database:
            held.enter_context(database_held(database))
        _check_public_set(settings)
        if resumed:
            check_weights(settings)
            run_folder = resumed
            forget_its_end(resumed)
        else:
            settings, run_folder = begin_run(settings, address)
            held.enter_context(run_held(run_folder))
        options = ServerOptions(host=host, port=port, database=database, tls=tls, front_door=front_door)
        if status is not None:
            shown = held.enter_context(StatusServer(run_folder, *status))
            sys.stdout.write(f"{header_row('status', shown.line)}\n")
        return _run(settings, options, run_folder), run_folder


def _run(settings: Settings, options: "ServerOptions", run_folder: Path) -> int:
    """The run from its beginning to the lines that tell its end; returns the exit code."""
    from common.tracking.page import tracking_line, where_to_look
    from server.flower.launch import Launch

    launch = Launch(settings, options, run_folder)
    _say_where(options, settings.federation.min_clients)
    rows = begin_rows(settings, run_folder, look=where_to_look(settings), federated=True)
    sys.stdout.writelines(f"{line}\n" for line in header_lines(f"run {run_folder.name}", rows))
    sys.stdout.flush()
    with (
        stopping_on_signals(launch.request_stop),
        RunView(sys.stdout) as view,
        Follower(EventReader(run_folder, only_new=True), view) as follower,
    ):
        outcome = launch.run()
    if outcome["exit_code"] == 0:
        lines = ending_lines(
            federation_ending(follower.summary), run_folder, tracking=tracking_line(settings, run_folder)
        )
        sys.stdout.write("\n".join(lines) + "\n")
    else:
        sys.stderr.write(
            f"flower-server: {escaped(outcome['line'])}{_how_to_go_on(run_folder, outcome['exit_code'])}\n"
        )
    return int(outcome["exit_code"])


def main(argv: Sequence[str] | None = None) -> int:
    """`flower-server`: returns the exit code."""
    go_silent()
    arguments = parser().parse_args(argv)
    work = partial(_serve, arguments)
    return run_program("flower-server", work, sys.stderr, shared_files=arguments.shared_files)


if __name__ == "__main__":
    sys.exit(main())

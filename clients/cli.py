"""`flower-client`: one site, one data set, from its check at the door to the end of the last run."""

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError, escaped
from common.faces.datasets import DATASETS
from common.flags import add_any_flower, add_shared_files, one_of, program_parser
from common.names import CLIENT_NAME, NAME_RULE
from common.settings import LOG_LEVELS
from common.system.console import (
    counts,
    run_program,
    set_up_logging,
    stopping_on_signals,
    warn_of_flower,
    warn_of_open_files,
)
from common.system.live import Live
from common.system.processes import host_port, is_loopback, is_this_machine, parse_address
from common.system.run_view import header_lines, header_row
from common.system.runtime import go_silent, num_cores, reach_directly

if TYPE_CHECKING:
    from common.faces.index import FaceIndex
    from common.system.progress import Amount


def parser() -> argparse.ArgumentParser:
    """The parser of `flower-client`."""
    program = program_parser(
        "flower-client",
        "Take part in federations with the pictures of one folder, which never leave it.",
        "flower-client --dataset celeba                           data/celeba, a server of this machine",
        "flower-client --dataset folder --name north --data-dir faces --once",
        "flower-client --dataset folder --tls certs/north --server fl.example.org:443 --data-dir faces",
    )
    program.add_argument("--dataset", required=True, metavar="NAME", help=one_of(DATASETS))
    program.add_argument("--data-dir", metavar="DIR", help="the data set's folder (default: data/NAME)")
    program.add_argument("--server", default="127.0.0.1:8000", metavar="HOST:PORT", help="where flower-server listens")
    program.add_argument(
        "--name", metavar="NAME", help="unique in the federation (default: the key's name, else the data set)"
    )
    program.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto, cpu, cuda, cuda:N or mps; several GPUs train one model: cuda:0,cuda:1",
    )
    program.add_argument("--state-dir", metavar="DIR", help="what stays here (default: .facefed/clients/NAME)")
    program.add_argument("--cache-dir", default=".facefed/packs", metavar="DIR", help="where aligned pictures are kept")
    program.add_argument(
        "--tracking-uri",
        "--mlflow-uri",
        default="",
        metavar="URI",
        help="an MLflow of your own for this client's figures and pictures, which the server never sees",
    )
    program.add_argument(
        "--connect-timeout",
        type=float,
        default=300.0,
        metavar="S",
        help="exit 2 if the server was never reached by then",
    )
    program.add_argument(
        "--policy", metavar="FILE", help="what this site lets itself be asked (default: `facefed policy show`)"
    )
    program.add_argument(
        "--site-seed",
        type=int,
        metavar="N",
        help="first weights of heads, as in a simulation with --seed N (default: of this site's secret)",
    )
    program.add_argument("--once", action="store_true", help="end after one run")
    program.add_argument(
        "--insecure",
        action="store_true",
        help="allow plain text to another machine: anyone on the way can read and alter it",
    )
    program.add_argument(
        "--tls", metavar="DIR", help="the folder that the server's operator made for this site with `facefed certs`"
    )
    program.add_argument("--log-level", default="info", metavar="LEVEL", help=one_of(LOG_LEVELS))
    add_any_flower(program)
    add_shared_files(program)
    return program


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _check(arguments: argparse.Namespace) -> tuple[str, int]:
    if arguments.log_level not in LOG_LEVELS:
        raise UserError(f"--log-level {arguments.log_level}: choose {', '.join(LOG_LEVELS)}.")
    if not arguments.connect_timeout > 0:
        raise UserError(f"--connect-timeout {arguments.connect_timeout:g} must be greater than 0.")
    name = arguments.name or arguments.dataset
    if not CLIENT_NAME.fullmatch(name):
        raise UserError(f"--name {name}: use {NAME_RULE}.")
    host, port = parse_address(arguments.server, "--server")
    if is_this_machine(host):
        reach_directly(host)
    if arguments.tls and arguments.insecure:
        raise UserError("--tls and --insecure contradict each other; give one of them.")
    if not (is_loopback(host) or arguments.tls or arguments.insecure):
        raise UserError(
            f"--server {host_port(host, port)} is another machine and the connection would be plain text: anyone"
            " on the way could read and alter models. Give --tls DIR, the folder that the server's operator made for"
            " you, or --insecure if you accept that."
        )
    return host, port


def _name(arguments: argparse.Namespace, key_name: str) -> str:
    """The site's name: with a key, the key's.  Raises UserError where --name is another.

    key_name: empty without a key, and where the folder does not tell; then the server does.
    """
    if key_name and arguments.name and arguments.name != key_name:
        raise UserError(
            f"--name {arguments.name}: the key in {arguments.tls} is that of {key_name!r}, and a site has its key's"
            " name. Leave --name out, or ask the operator for a key of that name (`facefed certs add`)."
        )
    return str(key_name or arguments.name or arguments.dataset)


def _say_what_is_there(name: str, index: "FaceIndex", where: str) -> None:
    _say(f"{name}: {counts({'people': len(index.people), 'pictures': len(index.paths)})} {where}")
    if index.account.missing:
        _say(f"{name}: {len(index.account.missing):,} pictures that are listed are not there")
    for line in index.account.lines():
        _say(f"{name}: {escaped(line)}")


def _serve(arguments: argparse.Namespace) -> int:
    host, port = _check(arguments)
    warn_of_flower("flower-client", any_flower=arguments.any_flower, stderr=sys.stderr)
    set_up_logging(arguments.log_level)
    from clients.flower.launch import ClientOptions, Launch
    from clients.policy import DEFAULT, digest_of, read_policy, require_room
    from clients.site import OF_SITE, SiteSettings
    from common.faces.index import read_index
    from common.system.certs import read_client_folder
    from common.system.runtime import resolve_devices, slurm_end
    from common.tracking.address import local_files, resolve_uri

    policy_file = Path(arguments.policy).expanduser() if arguments.policy else None
    policy = read_policy(policy_file) if policy_file else DEFAULT
    keys = Path(arguments.tls).expanduser().resolve() if arguments.tls else None
    tls = read_client_folder(keys) if keys else None
    name = _name(arguments, tls.name if tls else "")
    data_dir = Path(arguments.data_dir or f"data/{name}").expanduser().resolve()
    index = read_index(arguments.dataset, data_dir)
    device = ",".join(resolve_devices(arguments.device))
    _say(header_lines(f"the site {name} of {host_port(host, port)}", {})[0])
    _say_what_is_there(name, index, f"in {data_dir}, {device}")
    require_room(policy, policy_file, num_people=len(index.people), num_pictures=len(index.paths))
    _say(f"{name}: policy {digest_of(policy)} ({policy_file or 'built in; facefed policy show'})")
    site = SiteSettings(
        name=name,
        dataset=arguments.dataset,
        data_dir=data_dir,
        device=device,
        state_dir=Path(arguments.state_dir or f".facefed/clients/{name}").expanduser().resolve(),
        cache_dir=Path(arguments.cache_dir).expanduser().resolve(),
        pack_workers=num_cores(),
        tracking_uri=resolve_uri(arguments.tracking_uri, Path.cwd()) if arguments.tracking_uri else "",
        policy=policy,
        seed=OF_SITE if arguments.site_seed is None else arguments.site_seed,
        keys=keys,
    )
    if not arguments.shared_files:
        kept = [site.state_dir, site.cache_dir, *local_files(site.tracking_uri)]
        warn_of_open_files("flower-client", kept, sys.stderr)
    options = ClientOptions(
        host=host, port=port, connect_timeout_s=arguments.connect_timeout, once=arguments.once, tls=tls
    )
    _say(header_row("device", device))
    if ending := slurm_end(time.time()):
        _say(header_row("ends", ending))
    _say(header_row("state", f"{site.state_dir} (what stays here, and the ledger of what leaves)"))
    with Live(sys.stdout) as live:

        def under_way(amount: "Amount | None") -> None:
            if amount is None:
                live.rest()
            else:
                live.move(amount.label, amount)

        launch = Launch(site, options, live.say, under_way=under_way)
        with stopping_on_signals(launch.request_stop):
            launch.run()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """`flower-client`: returns the exit code."""
    go_silent()
    arguments = parser().parse_args(argv)
    work = partial(_serve, arguments)
    return run_program("flower-client", work, sys.stderr, shared_files=arguments.shared_files)


if __name__ == "__main__":
    sys.exit(main())

"""The flags of `facefed certs`: the certificates and keys of a federation, made, added to, taken away."""

import argparse
import sys
from pathlib import Path
from typing import Final

from common.faces.datasets import DEFAULT_CLIENTS


def add_certs_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `certs` to the commands of `facefed`."""
    actions = commands.add_parser(
        "certs", help="TLS certificates of the server, and a key for each site"
    ).add_subparsers(dest="action", required=True)
    init = actions.add_parser("init", help="make a new folder of them")
    init.add_argument("folder", metavar="DIR", help="must not hold anything yet")
    _add_names(init, "where clients connect to: a host name or address; repeatable", required=True)
    init.add_argument(
        "--client",
        action="append",
        metavar="NAME",
        help=f"a site that takes part; repeatable (default: {', '.join(DEFAULT_CLIENTS)})",
    )
    for name, text in (("add", "a key for one more site"), ("revoke", "accept a site's key no more")):
        action = actions.add_parser(name, help=text)
        action.add_argument("folder", metavar="DIR")
        action.add_argument("name", metavar="NAME", help="the site")
    renew = actions.add_parser(
        "renew", help="a new server certificate by the same authority, before the old one expires"
    )
    renew.add_argument("folder", metavar="DIR", help="with ca.key in it")
    _add_names(renew, "instead of the names in the present certificate; repeatable")


def _add_names(parser: argparse.ArgumentParser, text: str, *, required: bool = False) -> None:
    parser.add_argument(
        "--server-name",
        dest="server_names",
        action="append",
        default=[],
        metavar="NAME",
        required=required,
        help=text,
    )


def certs(arguments: argparse.Namespace) -> int:
    """`facefed certs ACTION`: returns the exit code."""
    lines = ACTIONS[arguments.action](arguments)
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _folder(arguments: argparse.Namespace) -> Path:
    return Path(arguments.folder).expanduser()


def _init(arguments: argparse.Namespace) -> list[str]:
    from simulation.new_certs import CA_DAYS, SERVER_DAYS, make_folder

    folder, clients = _folder(arguments), list(dict.fromkeys(arguments.client or DEFAULT_CLIENTS))
    make_folder(folder, arguments.server_names, clients)
    example = f"{arguments.server_names[0]}:443"
    return [
        f"{folder} is made; the server's certificate is valid for {SERVER_DAYS} days, the authority's for {CA_DAYS}.",
        "",
        f"To the server:         {folder}/ca.crt, server.crt, server.key and clients/",
        f"                       flower-server --tls {folder} --address 0.0.0.0:443",
        *(f"{f'To the site {name}:':<23}{folder}/{name}/ and nothing else, by a private way" for name in clients),
        f"                       flower-client --dataset {clients[0]} --tls {folder}/{clients[0]} --server {example}",
        f"Into a safe place:     {folder}/ca.key. Whoever has it can pass for your server. Neither the server nor a"
        " site needs it; `certs renew` does.",
        f"Then delete here what you gave away: each key should be in one place. `facefed certs revoke {folder} NAME`"
        " turns a site out.",
    ]  # fmt: skip


def _add(arguments: argparse.Namespace) -> list[str]:
    from common.certs import CLIENTS
    from simulation.new_certs import add_client

    folder, name = _folder(arguments), arguments.name
    add_client(folder, name)
    return [
        f"To the site {name}: {folder}/{name}/ and nothing else, by a way that nobody else can read.",
        f"To the server: {folder}/{CLIENTS}/{name}.pub, into the clients/ of its folder; a running server takes it"
        " within seconds.",
    ]


def _revoke(arguments: argparse.Namespace) -> list[str]:
    from common.certs import CLIENTS
    from simulation.new_certs import revoke_client

    place = revoke_client(_folder(arguments), arguments.name)
    return [
        f"{arguments.name}'s key is accepted no more; it is kept as {place}. A server that runs on this folder turns"
        " the site out within seconds.",
        f"If the server has a copy of the folder, delete {CLIENTS}/{arguments.name}.pub there: that is what counts.",
    ]


def _renew(arguments: argparse.Namespace) -> list[str]:
    from simulation.new_certs import SERVER_DAYS, renew_server

    folder = _folder(arguments)
    names = renew_server(folder, arguments.server_names)
    return [
        f"{folder}/server.crt is new, valid for {SERVER_DAYS} days, for {', '.join(names)}; the former is beside it.",
        "To the server: server.crt and server.key; it uses them from its next start. Sites need nothing.",
    ]


ACTIONS: Final = {"init": _init, "add": _add, "revoke": _revoke, "renew": _renew}

"""The flags of `facefed certs`, `facefed egress` and `facefed tracking`: what surrounds a federation."""

import argparse
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from common.errors import EXIT_INTERRUPTED, escaped
from common.faces.datasets import DATASETS, DEFAULT_CLIENTS
from common.flags import (
    FLAGS,
    add_run_settings,
    add_shared_files,
    examples,
    flags_of,
    one_of,
    read_run,
    read_run_settings,
    tell_of_password,
)
from common.system.console import set_up_logging, stopping_on_signals, warn_of_open_files
from server.run_config import DEFAULT_CONFIG

_OWN: Final = ("--tracking-uri", "--out", "--log-level")  # the run settings of commands about runs that are over


def add_certs_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `certs` to the commands of `facefed`."""
    actions = commands.add_parser(
        "certs", help="TLS certificates of the server, and a key for each site"
    ).add_subparsers(dest="action", required=True)
    text = "make a new folder of them"
    init = actions.add_parser(
        "init",
        help=text,
        description=text,
        epilog=examples("facefed certs init certs --server-name fl.example.org --client north --client south"),
    )
    init.add_argument("folder", metavar="DIR", help="must not hold anything yet")
    _add_names(init, "where clients connect to: a host name or address; repeatable", required=True)
    init.add_argument(
        "--client",
        action="append",
        metavar="NAME",
        help=f"a site that takes part; repeatable (default: {', '.join(DEFAULT_CLIENTS)})",
    )
    init.add_argument(
        "--client-key",
        action="append",
        default=[],
        metavar="NAME.pub",
        help="the same, of a site that made its key itself with `facefed certs key`; repeatable",
    )
    text = "at a site: a key of its own, which nobody else ever has"
    key = actions.add_parser("key", help=text, description=text, epilog=examples("facefed certs key north north"))
    key.add_argument("folder", metavar="DIR", help="the site's, which must not hold anything yet")
    key.add_argument("name", metavar="NAME", help="the site")
    for name, text in (("add", "a key for one more site"), ("revoke", "accept a site's key no more")):
        action = actions.add_parser(
            name, help=text, description=text, epilog=examples(f"facefed certs {name} certs east")
        )
        action.add_argument("folder", metavar="DIR")
        action.add_argument("name", metavar="NAME", help="the site")
        if name == "add":
            action.add_argument(
                "--client-key", metavar="NAME.pub", help="the site's own, where it made one with `facefed certs key`"
            )
    text = "a new server certificate by the same authority, before the old one expires"
    renew = actions.add_parser("renew", help=text, description=text, epilog=examples("facefed certs renew certs"))
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
    lines = CERTS_ACTIONS[arguments.action](arguments)
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _folder(arguments: argparse.Namespace) -> Path:
    return Path(arguments.folder).expanduser()


def _init(arguments: argparse.Namespace) -> list[str]:
    from simulation.admin.certs import CA_DAYS, SERVER_DAYS, make_folder

    folder = _folder(arguments)
    own_keys = {path.stem: path for path in (Path(given).expanduser() for given in arguments.client_key)}
    clients = list(dict.fromkeys(arguments.client or (() if own_keys else DEFAULT_CLIENTS)))
    make_folder(folder, arguments.server_names, clients, own_keys)
    example = f"{arguments.server_names[0]}:443"
    return [
        f"{folder} is made; the server's certificate is valid for {SERVER_DAYS} days, the authority's for {CA_DAYS}.",
        "",
        f"To the server:         {folder}/ca.crt, server.crt, server.key and clients/",
        f"                       flower-server --tls {folder} --address 0.0.0.0:443",
        *_lines_of_sites(folder, clients, example),
        *_lines_of_own_keys(folder, own_keys),
        f"Into a safe place:     {folder}/ca.key. Whoever has it can pass for your server. Neither the server nor a"
        " site needs it; `certs renew` does.",
        f"Then delete here what you gave away: each key should be in one place. `facefed certs revoke {folder} NAME`"
        " turns a site out.",
    ]  # fmt: skip


def _lines_of_sites(folder: Path, clients: Sequence[str], server: str) -> list[str]:
    """What each site gets and the command that it starts: a site's name is its key's, and need not be a data set's."""
    lines = []
    for name in clients:
        dataset = name if name in DATASETS else "DATASET"
        lines.append(f"{f'To the site {name}:':<23}{folder}/{name}/ and nothing else, by a private way")
        lines.append(f"{'':23}flower-client --dataset {dataset} --tls {folder}/{name} --server {server}")
    if not set(clients) <= set(DATASETS):
        lines.append(f"{'':23}(for DATASET write how its pictures lie: {', '.join(sorted(DATASETS))};")
        lines.append(f"{'':23} with --data-dir DIR, else they are looked for in data/DATASET)")
    return lines


def _lines_of_own_keys(folder: Path, names: Iterable[str]) -> list[str]:
    """What a site that has a key already gets, by any way that nobody can change."""
    return [
        f"{f'To the site {name}:':<23}{folder}/{name}/ca.crt and peers/, into the folder of its own key"
        for name in names
    ]  # fmt: skip


def _key(arguments: argparse.Namespace) -> list[str]:
    from common.system.certs import PEERS, fingerprint, read_public_key
    from simulation.admin.certs import make_own_key

    public = make_own_key(_folder(arguments), arguments.name)
    return [
        f"To the operator: {public}, which is public; its fingerprint, to be told by another way, is",
        f"  {fingerprint(read_public_key(public))}",
        f"Into {public.parent}: ca.crt and {PEERS}/, which the operator sends back. client.key stays here.",
    ]


def _add(arguments: argparse.Namespace) -> list[str]:
    from common.system.certs import CLIENTS, PEERS
    from simulation.admin.certs import add_client

    folder, name = _folder(arguments), arguments.name
    own_key = Path(arguments.client_key).expanduser() if arguments.client_key else None
    add_client(folder, name, own_key)
    to_site = f"To the site {name}: {folder}/{name}/ and nothing else, by a way that nobody else can read."
    return [
        *(_lines_of_own_keys(folder, [name]) if own_key else [to_site]),
        f"To the server: {folder}/{CLIENTS}/{name}.pub, into the clients/ of its folder; a running server takes it"
        " within seconds.",
        f"To each other site: the same file, into the {PEERS}/ of its folder; secure aggregation with {name} needs it.",
    ]


def _revoke(arguments: argparse.Namespace) -> list[str]:
    from common.system.certs import CLIENTS, PEERS
    from simulation.admin.certs import revoke_client

    place = revoke_client(_folder(arguments), arguments.name)
    return [
        f"{arguments.name}'s key is accepted no more; it is kept as {place}. A server that runs on this folder turns"
        " the site out within seconds.",
        f"If the server has a copy of the folder, delete {CLIENTS}/{arguments.name}.pub there: that is what counts.",
        f"Each other site deletes {PEERS}/{arguments.name}.pub in its folder.",
    ]


def _renew(arguments: argparse.Namespace) -> list[str]:
    from simulation.admin.certs import SERVER_DAYS, renew_server

    folder = _folder(arguments)
    names = renew_server(folder, arguments.server_names)
    return [
        f"{folder}/server.crt is new, valid for {SERVER_DAYS} days, for {', '.join(names)}; the former is beside it.",
        "To the server: server.crt and server.key; it uses them from its next start. Sites need nothing.",
    ]


CERTS_ACTIONS: Final = {"init": _init, "key": _key, "add": _add, "revoke": _revoke, "renew": _renew}


def add_egress_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `egress` to the commands of `facefed`."""
    actions = commands.add_parser("egress", help="what left this site").add_subparsers(dest="action", required=True)
    text = "show what left this site in a run, and whether it is what the server received"
    report = actions.add_parser(
        "report",
        help=text,
        description=text,
        epilog=examples(
            "facefed egress report",
            "facefed egress report --name north --run 20261128-101500-1a2b3c --server-run runs/20261128-101500-1a2b3c",
        ),
    )
    report.add_argument(
        "--name", default="", metavar="NAME", help="the site (default: all whose state is in .facefed/clients)"
    )
    report.add_argument(
        "--state-dir",
        metavar="DIR",
        help="its state folder, as flower-client got it; of a simulation: runs/clients/NAME",
    )
    report.add_argument("--run", default="", metavar="RUN", help="a run's id or folder (default: the newest)")
    report.add_argument(
        "--server-run", metavar="DIR", help="also compare with the server's record: the run's folder at the server"
    )
    report.add_argument("--json", action="store_true", help="print the report as JSON, with every part")


def egress(arguments: argparse.Namespace) -> int:
    """`facefed egress report`: returns the exit code."""
    from simulation.admin.egress import Request, report_egress

    request = Request(
        name=arguments.name,
        state_dir=Path(arguments.state_dir).expanduser() if arguments.state_dir else None,
        run=arguments.run,
        server_run=Path(arguments.server_run).expanduser() if arguments.server_run else None,
    )
    return report_egress(request, sys.stdout, shape="json" if arguments.json else "text")


def add_policy_parser(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    add_data: Callable[[argparse.ArgumentParser], None],
) -> None:
    """Add `policy` to the commands of `facefed`.  add_data: adds the options that say whose data, and where."""
    actions = commands.add_parser("policy", help="what a site lets itself be asked").add_subparsers(
        dest="action", required=True
    )
    text = "every limit, its default, and why it is there"
    show = actions.add_parser("show", help=text, description=text, epilog=examples("facefed policy show"))
    text = "whether a site would take part in a run, or what stands against it"
    lines = examples("facefed policy check --policy policy.toml --config demo --client celeba")
    check = actions.add_parser("check", help=text, description=text, epilog=lines)
    for action in (show, check):
        action.add_argument("--policy", default="", metavar="FILE", help="of flower-client (default: the built-in one)")
    add_data(check)
    add_run_settings(
        check, flags=flags_of("flower-server"), default_config=DEFAULT_CONFIG
    )  # of the run that a server would ask for


def add_kubernetes_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `k8s` to the commands of `facefed`."""
    actions = commands.add_parser("k8s", help="a federation on Kubernetes").add_subparsers(dest="action", required=True)
    text = "print the manifests: server, front door, MLflow, and for each site a Deployment, its volumes and its secret"
    lines = examples(
        "facefed k8s render --sites celeba,vggface2 > facefed.yaml",
        "facefed k8s render --sites north:folder,south:folder --gpu --image registry.example.org/facefed:0.1.0",
    )
    render = actions.add_parser("render", help=text, description=text, epilog=lines)
    render.add_argument("--sites", required=True, metavar="NAME[:DATASET],...", help=one_of(DATASETS))
    render.add_argument("--gpu", action="store_true", help="a GPU for each site (nvidia.com/gpu)")
    render.add_argument("--namespace", default="facefed", metavar="NAME", help="where all of it goes")
    render.add_argument("--image", default="facefed:0.1.0", metavar="IMAGE", help="of docker/Dockerfile")
    render.add_argument("--storage", default="10Gi", metavar="SIZE", help="of each volume")
    render.add_argument("--run-config", default="demo", metavar="NAME", help="the server's configuration")


def render_kubernetes(arguments: argparse.Namespace) -> int:
    """`facefed k8s render`.  Raises UserError."""
    from common import config
    from simulation.admin.kubernetes import Cluster, render, require_label, sites_of

    require_label("--namespace", arguments.namespace)
    config.load(config.find_config(arguments.run_config))
    cluster = Cluster(
        sites=sites_of(arguments.sites),
        has_gpu=arguments.gpu,
        namespace=arguments.namespace,
        image=arguments.image,
        storage=arguments.storage,
        config=arguments.run_config,
    )
    render(cluster, sys.stdout)
    return 0


def add_privacy_parser(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    add_data: Callable[[argparse.ArgumentParser], None],
) -> None:
    """Add `privacy` to the commands of `facefed`.  add_data: as for `add_policy_parser`."""
    actions = commands.add_parser("privacy", help="what a server or a model would tell of people").add_subparsers(
        dest="action", required=True
    )
    text = "play attacks of a hostile server against this site's own code, with its policy and without"
    lines = examples("facefed privacy attack --config demo --client celeba")
    attack = actions.add_parser("attack", help=text, description=text, epilog=lines)
    attack.add_argument("--policy", default="", metavar="FILE", help="of flower-client (default: the built-in one)")
    add_data(attack)
    add_run_settings(attack, flags=flags_of("flower-server"), default_config=DEFAULT_CONFIG)
    text = "try whether a run's model gives away whom a site trained on, with the site's own people; kept in its card"
    lines = examples("facefed privacy audit --run 20261128-101500-1a2b3c --client celeba")
    audit = actions.add_parser("audit", help=text, description=text, epilog=lines)
    audit.add_argument("--run", required=True, metavar="RUN", help="a run's id or folder, or models:/NAME@ALIAS")
    text = "what flower-client got as --state-dir (default: .facefed/clients/NAME, and clients/NAME beside the run)"
    audit.add_argument("--state-dir", default="", metavar="DIR", help=text)
    add_data(audit)
    add_run_settings(audit, flags=[flag for flag in FLAGS if flag.names[0] in _OWN])
    text = "what the people of each data set here have spent of their privacy, over all runs"
    report = actions.add_parser("report", help=text, description=text, epilog=examples("facefed privacy report"))
    report.add_argument("--policy", default="", metavar="FILE", help="of flower-client (default: the built-in one)")
    report.add_argument("--cache-dir", default=".facefed/packs", metavar="DIR", help="where aligned pictures are kept")
    for action in (audit, report):
        action.add_argument("--json", action="store_true", help="for a program")


def privacy_report(arguments: argparse.Namespace) -> int:
    """`facefed privacy report`: returns the exit code."""
    from simulation.admin.privacy_report import report_spending
    from simulation.admin.site_policy import policy_of

    policy, _ = policy_of(arguments.policy)
    cache_dir = Path(arguments.cache_dir).expanduser()
    return report_spending(cache_dir, policy, sys.stdout, shape="json" if arguments.json else "text")


def show_policy(arguments: argparse.Namespace) -> int:
    """`facefed policy show`: returns the exit code."""
    from simulation.admin.site_policy import show

    return show(arguments.policy, sys.stdout)


class Action(NamedTuple):
    """One action of `facefed tracking`."""

    text: str  # of its help
    add_options: Callable[[argparse.ArgumentParser], None]
    handle: Callable[[argparse.Namespace], int]  # returns the exit code


def add_tracking_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `tracking` and its actions to the commands of `facefed`."""
    tracking = commands.add_parser("tracking", help="run, fill and check the MLflow server")
    actions = tracking.add_subparsers(dest="action", required=True)
    for name, action in TRACKING_ACTIONS.items():
        parser = actions.add_parser(name, help=action.text, description=action.text, epilog=examples(*EXAMPLES[name]))
        action.add_options(parser)


def add_tracking_settings(parser: argparse.ArgumentParser) -> None:
    """`--config`, `--tracking-uri`, `--out` and `--log-level`, as every program has them."""
    add_run_settings(parser, flags=[flag for flag in FLAGS if flag.names[0] in _OWN])


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
    parser.add_argument(
        "--auth",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask for a user name and a password, which is made (the default); --no-auth lets every account of this"
        " machine, and whoever else reaches the port, change and delete runs and models",
    )
    parser.add_argument(
        "--allowed-hosts",
        default="",
        metavar="NAME,...",
        help="further names under which clients reach this server, such as a compose service's: mlflow",
    )
    add_shared_files(parser)


def _serve(arguments: argparse.Namespace) -> int:
    set_up_logging("info")
    from simulation.admin.tracking_server import ServeOptions, plan_server, serve

    options = ServeOptions(
        host=arguments.host,
        port=arguments.port,
        backend=arguments.backend or os.environ.get("MLFLOW_BACKEND_STORE_URI", "") or "sqlite",
        artifacts=arguments.artifacts,
        auth=arguments.auth,
        allowed_hosts=[name for name in arguments.allowed_hosts.replace(" ", "").split(",") if name],
    )
    plan = plan_server(options, os.environ, Path.cwd())
    tell_of_password("--backend", arguments.backend or "", "MLFLOW_BACKEND_STORE_URI")
    if not arguments.shared_files:
        warn_of_open_files("facefed", plan.kept, sys.stderr)

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
    from simulation.admin.doctor import as_json, as_line, examine, exit_code

    findings = []
    for finding in examine(settings, os.environ, Path.cwd(), address, shared_files=arguments.shared_files):
        findings.append(finding)
        if not arguments.json:
            sys.stdout.write(escaped(as_line(finding)) + "\n")
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
    parser.add_argument(
        "--follow-links",
        action="store_true",
        help="take also files outside of a run's folder that a link in it leads to, as wandb.save makes them",
    )
    add_tracking_settings(parser)


def _import_wandb(arguments: argparse.Namespace) -> int:
    settings, address = read_run(arguments)
    set_up_logging(settings.run.log_level)
    from common.tracking.address import resolve_uri
    from simulation.admin.wandb_import import import_folders

    return import_folders(
        arguments.folders,
        resolve_uri(address, Path.cwd()),
        arguments.experiment,
        sys.stdout,
        sys.stderr,
        follow_links=arguments.follow_links,
    )


EXAMPLES: Final[Mapping[str, tuple[str, ...]]] = {
    "serve": ("facefed tracking serve", "facefed tracking serve --host 0.0.0.0 --backend postgresql://me@db/mlflow"),
    "sync": ("facefed tracking sync runs/20261128-101500-1a2b3c",),
    "import-wandb": ("facefed tracking import-wandb wandb --tracking-uri http://127.0.0.1:5000",),
    "doctor": ("facefed tracking doctor --tracking-uri http://127.0.0.1:5000",),
}
# The name typed after `facefed tracking` -> what it is.
TRACKING_ACTIONS: Final[Mapping[str, Action]] = {
    "serve": Action("check, start and watch an MLflow server of your own", _serve_options, _serve),
    "sync": Action("send what runs kept while their server was away", _sync_options, _sync),
    "import-wandb": Action("bring offline runs of Weights & Biases into MLflow", _import_wandb_options, _import_wandb),
    "doctor": Action("check the tracking: server, write test, disk, telemetry, unsent runs", _doctor_options, _doctor),
}

"""`flower-simulation` and `facefed`: parse, check at the door, run, show. Only these and the other cli files print."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from common.config import find_config
from common.errors import ConfigError
from common.faces.datasets import DATASETS, DRAWN
from common.flags import (
    add_any_flower,
    add_run_settings,
    add_shared_files,
    examples,
    flags_of,
    program_parser,
    read_run,
    read_run_settings,
    refuse_ablation,
    refuse_run_settings,
)
from common.settings import Settings
from common.strategies import STRATEGIES
from common.system.console import run_program, set_up_logging, warn_of_flower, warn_of_open_files
from common.system.runtime import briefly, go_silent
from simulation.admin.cli import (
    CERTS_ACTIONS,
    TRACKING_ACTIONS,
    add_certs_parser,
    add_egress_parser,
    add_kubernetes_parser,
    add_policy_parser,
    add_privacy_parser,
    add_tracking_parser,
    add_tracking_settings,
    certs,
    egress,
    privacy_report,
    render_kubernetes,
    show_policy,
)
from simulation.admin.completion import SHELLS, completion_script
from simulation.recognition.cli import BRIEF_COMMANDS, RECOGNITION_COMMANDS, add_recognition_parsers

if TYPE_CHECKING:
    from clients.site import SiteSettings
    from common.faces.pack import FacePack
    from simulation.alone.sweep_plan import SweepPlan

DEFAULT_CONFIG = "celeba_vggface2_fedavg"
TWINS_CONFIG = "twins_dcal"
TRAIN_EXAMPLES = {
    "local": (
        "facefed train local --config demo --client celeba",
        "facefed train local --client mine:folder=faces --epochs 20 --model mobilenet_v2",
        "facefed train local --resume 20261128-101500-1a2b3c",
    ),
    "centralized": ("facefed train centralized --config demo --client celeba --client vggface2",),
    "federated": ("facefed train federated --config demo --client celeba --client vggface2 --rounds 5",),
    "twins": (
        "facefed train twins --data-dir data/twins",
        "facefed train twins --config twins_finetune --data-dir data/twins --set model.pretrained=weights.safetensors",
        "facefed train twins --sweep twins_sweep --data-dir data/twins",
    ),
}


_ONE_DEVICE = "auto, cpu, cuda, cuda:N or mps (default: auto)"
_SEVERAL_DEVICES = "auto, cpu, cuda, cuda:N or mps; several GPUs train one model: cuda:0,cuda:1 (default: auto)"


def _add_site_options(parser: argparse.ArgumentParser, devices: str = _ONE_DEVICE) -> None:
    group = parser.add_argument_group("this machine")
    group.add_argument("--device", default="auto", metavar="NAME", help=devices)
    group.add_argument("--cache-dir", default=".facefed/packs", metavar="DIR", help="where aligned pictures are kept")


def simulation_parser() -> argparse.ArgumentParser:
    """The parser of `flower-simulation`."""
    parser = program_parser(
        "flower-simulation",
        "Federate data sets of this machine: the same app as flower-server, under Ray.",
        "flower-simulation --config demo --client celeba=data/celeba --client vggface2=data/vggface2",
        "flower-simulation --client north:folder=faces/north --client south:folder=faces/south --strategy fedprox",
        "flower-simulation --client celeba=data/celeba --clients 100 --set federation.clients_per_round=10",
    )
    parser.add_argument(
        "--client",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="a client and its data set (NAME:DATASET=DIR for a name of your own); repeatable",
    )
    _add_site_options(parser)
    _add_engine_options(parser)
    add_any_flower(parser)
    add_run_settings(parser, flags=flags_of(parser.prog), default_config=DEFAULT_CONFIG)
    return parser


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how clients are simulated")
    group.add_argument(
        "--clients", type=int, metavar="N", help="divide the data sets among N virtual clients (default: one for each)"
    )
    group.add_argument(
        "--partition",
        default="identity",
        metavar="HOW",
        help="identity: each virtual client has people of its own (default); dirichlet:ALPHA: the pictures of a person"
        " are divided, the more evenly the larger ALPHA",
    )
    group.add_argument(
        "--actors", type=int, metavar="N", help="processes that work for the clients in turn (default: one for a core)"
    )
    group.add_argument(
        "--ray-address", default="", metavar="HOST:PORT", help="join this Ray cluster instead of starting one's own"
    )
    group.add_argument(
        "--policy",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="what that client lets itself be asked, as flower-client has it; repeatable (default: anything)",
    )


def main_simulation(argv: Sequence[str] | None = None) -> int:
    """`flower-simulation`: returns the exit code."""
    go_silent()
    arguments = simulation_parser().parse_args(argv)

    def work() -> int:
        warn_of_flower("flower-simulation", any_flower=arguments.any_flower, stderr=sys.stderr)
        settings, address = read_run(arguments, default_config=DEFAULT_CONFIG)
        refuse_ablation(settings, "flower-simulation")
        set_up_logging(settings.run.log_level)
        _warn_of_open_files("flower-simulation", arguments, settings)
        from simulation.commands import Engine, federate_here

        return federate_here(
            settings,
            arguments.client,
            device=arguments.device,
            cache_dir=Path(arguments.cache_dir),
            out=sys.stdout,
            err=sys.stderr,
            engine=Engine(
                num_virtual=arguments.clients,
                partition=arguments.partition,
                ray_address=arguments.ray_address,
                num_actors=arguments.actors,
                policies=arguments.policy,
            ),
            address=address,
        )

    return run_program("flower-simulation", work, sys.stderr, shared_files=arguments.shared_files)


def _warn_of_open_files(program: str, arguments: argparse.Namespace, settings: Settings) -> None:
    """What was written here earlier: runs, packs and the tracking's files."""
    if arguments.shared_files:
        return
    from common.tracking.address import local_files, resolve_uri

    kept = [Path(settings.run.out).expanduser(), Path(arguments.cache_dir).expanduser()]
    if settings.tracking.enabled and settings.tracking.uri.startswith("sqlite"):
        kept += local_files(resolve_uri(settings.tracking.uri, Path.cwd()))
    warn_of_open_files(program, kept, sys.stderr)


def _data_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    data = commands.add_parser("data", help="make, prepare and check face data sets").add_subparsers(
        dest="action", required=True
    )
    text = "write a synthetic data set in an official layout"
    synth = data.add_parser(
        "synth",
        help=text,
        description=text,
        epilog=examples(
            "facefed data synth --layout celeba --out data/celeba --people 80 --pictures 24",
            "facefed data synth --layout twins --out data/twins --families 40 --closeness 0.7",
        ),
    )
    synth.add_argument("--layout", required=True, choices=DRAWN)
    synth.add_argument("--out", dest="folder", required=True, metavar="DIR", help="the folder to make")
    synth.add_argument("--people", type=int, metavar="N", help="how many people (not with twins)")
    synth.add_argument("--families", type=int, metavar="N", help="twins: how many families of two siblings")
    synth.add_argument(
        "--closeness", type=float, metavar="X", help="twins: how alike siblings are, from 0 (strangers) to 1 (one face)"
    )
    synth.add_argument("--pictures", type=int, metavar="N", help="pictures of each person")
    synth.add_argument("--seed", type=int, default=1, metavar="N")
    add_shared_files(synth)
    for name, text in (("prepare", "align and pack a data set once"), ("audit", "report what is in a data set")):
        command = data.add_parser(
            name,
            help=text,
            description=text,
            epilog=examples(
                f"facefed data {name} --client celeba",
                f"facefed data {name} --config demo --client mine:folder=faces",
            ),
        )
        if name == "audit":
            command.add_argument("--json", action="store_true", help="print the report as JSON")
        else:
            command.add_argument(
                "--verify",
                action="store_true",
                help="look at each picture's file, read the pack whole, and make anew what is damaged or changed",
            )
        _add_data_sources(command)
        _add_site_options(command)
        add_run_settings(command, flags=flags_of(command.prog), default_config=DEFAULT_CONFIG)
    _align_parser(data)
    _packs_parser(data)


def _align_parser(data: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "find the faces in photographs and write them aligned, as a data set of the kind folder"
    align = data.add_parser(
        "align",
        help=text,
        description=text,
        epilog=examples(
            "facefed data align photos faces",
            "facefed data align photos faces --all --min-size 60",
        ),
    )
    align.add_argument("photos", metavar="PHOTOS", help="one folder a person, photographs any number of folders below")
    align.add_argument("folder", metavar="OUT", help="the folder to make, or to go on with")
    align.add_argument("--jobs", type=int, metavar="N", help="processes that work (default: one for a core)")
    align.add_argument("--all", action="store_true", help="every face of a photograph (default: whom it is of)")
    align.add_argument(
        "--min-size", type=int, default=40, metavar="PX", help="leave smaller faces out: their box's side (default: 40)"
    )
    align.add_argument("--size", type=int, default=112, metavar="PX", help="of the aligned faces (default: 112)")
    add_shared_files(align)


def _align(arguments: argparse.Namespace) -> int:
    from simulation.data.aligning import AlignSettings
    from simulation.sites import align

    settings = AlignSettings(image_size=arguments.size, min_size_px=arguments.min_size, every_face=arguments.all)
    photos, folder = Path(arguments.photos).expanduser(), Path(arguments.folder).expanduser()
    return align(photos, folder, settings, num_jobs=arguments.jobs, out=sys.stdout)


def _packs_parser(data: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    packs = data.add_parser("packs", help="list and remove the packs that were made").add_subparsers(
        dest="packs_action", required=True
    )
    for name, text in (("list", "which packs there are, of what, and how large"), ("remove", "remove packs")):
        command = packs.add_parser(
            name,
            help=text,
            description=text,
            epilog=examples(f"facefed data packs {name}{' --earlier' if name == 'remove' else ''}"),
        )
        if name == "remove":
            command.add_argument(
                "packs", nargs="*", metavar="PACK", help="the beginning of its name, as the list shows it"
            )
            command.add_argument(
                "--earlier", action="store_true", help="all packs of earlier versions, which are not used any more"
            )
        command.add_argument(
            "--cache-dir", default=".facefed/packs", metavar="DIR", help="where aligned pictures are kept"
        )


def _packs(arguments: argparse.Namespace) -> int:
    from simulation.data.packs import list_packs, remove_packs

    cache_dir = Path(arguments.cache_dir).expanduser()
    if arguments.packs_action == "list":
        return list_packs(cache_dir, sys.stdout)
    return remove_packs(cache_dir, arguments.packs, sys.stdout, earlier=arguments.earlier)


def _add_data_sources(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--client",
        action="append",
        default=[],
        metavar="NAME[=DIR]",
        help=f"a data set: {', '.join(DATASETS)}, or NAME:DATASET=DIR",
    )
    parser.add_argument(
        "--data-dir",
        action="append",
        default=[],
        metavar="DIR",
        help="its folder (NAME=DIR for several; default: data/NAME)",
    )


def _train_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    train = commands.add_parser("train", help="train one holder alone, all in one place, or federated here")
    actions = train.add_subparsers(dest="action", required=True)
    for name, text in (
        ("local", "one holder alone, each picture processed as often as in the federation"),
        ("centralized", "all holders' pictures in one place: what a federation is measured against"),
        ("federated", "the Ray simulation, as flower-simulation runs it"),
        ("twins", "verification of identical twins, by attention within a picture and across two (DCAL)"),
    ):
        command = actions.add_parser(name, help=text, description=text, epilog=examples(*TRAIN_EXAMPLES[name]))
        _add_data_sources(command)
        _add_site_options(command, _ONE_DEVICE if name == "federated" else _SEVERAL_DEVICES)
        flags = flags_of(command.prog)
        if name == "federated":
            add_any_flower(command)
            add_run_settings(command, flags=flags, default_config=DEFAULT_CONFIG)
            continue
        command.add_argument("--resume", default="", metavar="RUN", help="go on with a stopped run: its id or folder")
        if name == "twins":
            command.add_argument(
                "--sweep",
                default="",
                metavar="NAME|FILE",
                help="search over settings, as the file says",
            )
        default = TWINS_CONFIG if name == "twins" else DEFAULT_CONFIG
        add_run_settings(command, flags=flags, default_config=default)


def facefed_parser() -> argparse.ArgumentParser:
    """The parser of `facefed`."""
    parser = program_parser(
        "facefed",
        "Face data, local training, and what surrounds a federation.",
        "facefed data synth --layout celeba --out data/celeba",
        "facefed train local --config demo --client celeba",
        "facefed tracking serve",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _data_parser(commands)
    _train_parser(commands)
    _evaluate_parser(commands)
    _attention_parser(commands)
    _export_parser(commands)
    add_recognition_parsers(commands)
    add_tracking_parser(commands)
    add_certs_parser(commands)
    add_egress_parser(commands)
    add_policy_parser(commands, _add_site_data)
    add_kubernetes_parser(commands)
    add_privacy_parser(commands, _add_site_data)
    _completion_parser(commands)
    return parser


def _add_site_data(parser: argparse.ArgumentParser) -> None:
    _add_data_sources(parser)
    _add_site_options(parser)


def _completion_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "print what makes the Tab key complete our commands in a shell"
    parser = commands.add_parser(
        "completion",
        help=text,
        description=text,
        epilog=examples(
            'eval "$(facefed completion bash)"       in ~/.bashrc',
            'eval "$(facefed completion zsh)"        in ~/.zshrc, after compinit',
            "facefed completion fish > ~/.config/fish/completions/facefed.fish",
        ),
    )
    parser.add_argument("shell", choices=SHELLS)


def _completion(arguments: argparse.Namespace) -> int:
    from clients.cli import parser as client_parser
    from server.cli import parser as server_parser

    parsers = [facefed_parser(), server_parser(), client_parser(), simulation_parser()]
    sys.stdout.write(completion_script(arguments.shell, parsers))
    return 0


def _evaluate_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "compare local, centralised and federated models on the same pairs"
    evaluate = commands.add_parser(
        "evaluate",
        help=text,
        description=text,
        epilog=examples(
            "facefed evaluate --config demo --mode all",
            "facefed evaluate --mode single --client celeba --compare local,fedavg",
            "facefed evaluate --run fedavg=20261128-101500-1a2b3c",
        ),
    )
    evaluate.add_argument(
        "--mode", choices=("single", "all"), default="all", help="one client's test people, or all clients' (default)"
    )
    evaluate.add_argument(
        "--compare",
        default="local,centralized,fedavg,fedprox",
        metavar="KIND,...",
        help=f"of local, centralized, twins, {', '.join(STRATEGIES)}, fedbn"
        " (default: local,centralized,fedavg,fedprox)",
    )
    evaluate.add_argument(
        "--run",
        action="append",
        default=[],
        metavar="KIND=RUN",
        help="use this run, such as fedavg=ID, local-celeba=FOLDER or centralized=models:/NAME@champion; repeatable"
        " (default: the newest that fits)",
    )
    evaluate.add_argument(
        "--by",
        default="",
        metavar="ATTRIBUTE,...",
        help="also errors by groups of people: Male, Young, ... of CelebA's list, Male of VGGFace2's",
    )
    _add_data_sources(evaluate)
    _add_site_options(evaluate)
    add_run_settings(evaluate, flags=flags_of(evaluate.prog), default_config=DEFAULT_CONFIG)


def _attention_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "draw where a vision transformer looks in given pictures"
    parser = commands.add_parser(
        "attention",
        help=text,
        description=text,
        epilog=examples(
            "facefed attention --model 20261128-101500-1a2b3c a.jpg b.jpg -o maps.png",
            "facefed attention --model models:/vit_tiny_twins@champion a.jpg -o maps.pdf",
        ),
    )
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help="JPEG, PNG, WebP or BMP; two are also compared")
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help="a finished run, by its id or folder, or models:/NAME/VERSION or models:/NAME@champion",
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the picture to write, such as maps.png")
    parser.add_argument(
        "--crop",
        type=float,
        default=1.0,
        metavar="X",
        help="use the central part of each picture, a fraction of its shorter side (default: 1)",
    )
    add_tracking_settings(parser)  # the model brings all other settings


def _export_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    text = "write a trained model as ONNX, compared with the model itself first"
    parser = commands.add_parser(
        "export",
        help=text,
        description=text,
        epilog=examples(
            "facefed export models:/resnet18_federated_fedavg@champion model.onnx",
            "facefed export 20261128-101500-1a2b3c model.onnx",
        ),
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="models:/NAME@champion or models:/NAME/VERSION, a finished run's id or folder, or a gallery's model file",
    )
    parser.add_argument("output", metavar="FILE", help="the file to write, such as model.onnx")
    add_tracking_settings(parser)  # the model brings all other settings


def _evaluate(arguments: argparse.Namespace) -> int:
    settings, address = read_run(arguments, default_config=DEFAULT_CONFIG)
    set_up_logging(settings.run.log_level)
    _warn_of_open_files("facefed", arguments, settings)
    from simulation.compare.evaluate import Request, evaluate_models

    request = Request(
        mode=arguments.mode,
        compare=arguments.compare,
        runs=arguments.run,
        clients=arguments.client,
        data_dirs=arguments.data_dir,
        device=arguments.device,
        cache_dir=Path(arguments.cache_dir),
        by=tuple(filter(None, (name.strip() for name in arguments.by.split(",")))),
        config_name=arguments.config or "",
        address=address,
    )
    return evaluate_models(settings, request, sys.stdout)


def _attention(arguments: argparse.Namespace) -> int:
    settings, address = read_run(arguments)
    set_up_logging(settings.run.log_level)
    from simulation.attention import AttentionRequest, show_attention

    request = AttentionRequest(
        model=arguments.model,
        pictures=arguments.pictures,
        output=Path(arguments.output).expanduser(),
        crop=arguments.crop,
        address=address,
    )
    return show_attention(settings, request, sys.stdout)


def _export(arguments: argparse.Namespace) -> int:
    settings, address = read_run(arguments)
    set_up_logging(settings.run.log_level)
    from simulation.recognition.export import export_model

    return export_model(settings, arguments.model, Path(arguments.output).expanduser(), sys.stdout, address)


def _synth(arguments: argparse.Namespace) -> int:
    from simulation.sites import synth

    return synth(
        arguments.layout,
        Path(arguments.folder),
        people=arguments.people,
        families=arguments.families,
        closeness=arguments.closeness,
        pictures=arguments.pictures,
        seed=arguments.seed,
        out=sys.stdout,
    )


def _data(arguments: argparse.Namespace, name: str) -> int:
    settings = read_run_settings(arguments, default_config=DEFAULT_CONFIG)
    set_up_logging(settings.run.log_level)
    from simulation import sites

    options = sites.data_options(arguments.client, arguments.data_dir)
    device, cache_dir = arguments.device, Path(arguments.cache_dir)
    if name == "prepare":
        _warn_of_open_files("facefed", arguments, settings)
        return sites.prepare(
            settings, options, device=device, cache_dir=cache_dir, out=sys.stdout, verify=arguments.verify
        )
    shape = "json" if arguments.json else "text"
    return sites.audit_data(settings, options, shape=shape, out=sys.stdout, err=sys.stderr)


def _own_packs(arguments: argparse.Namespace) -> "tuple[Settings, list[tuple[SiteSettings, FacePack]]]":
    """The settings of a run, and each site that is meant with its pictures under them."""
    settings = read_run_settings(arguments, default_config=DEFAULT_CONFIG)
    set_up_logging(settings.run.log_level)
    from clients.own_machine import site_of
    from simulation import sites

    clients, folders = arguments.client, arguments.data_dir
    if not clients:  # a folder is named as its data set, or has one folder a person
        names = [Path(folder).name for folder in folders]
        clients = [f"{n if n in DATASETS else 'folder'}={dir_}" for n, dir_ in zip(names, folders, strict=True)]
        folders = []
    options, cache_dir = sites.data_options(clients, folders), Path(arguments.cache_dir)
    held = [site_of(one, device=arguments.device, cache_dir=cache_dir, state_dir=cache_dir) for one in options]
    return settings, [(site, sites.pack_at_the_door(site, settings, sys.stdout)) for site in held]


def _check_policy(arguments: argparse.Namespace) -> int:
    from simulation.admin.site_policy import check

    settings, held = _own_packs(arguments)
    return check(settings, {site.name: pack for site, pack in held}, arguments.policy, sys.stdout)


def _attack(arguments: argparse.Namespace) -> int:
    from simulation.admin.attacks import report
    from simulation.admin.site_policy import policy_of

    policy, _ = policy_of(arguments.policy)
    settings, held = _own_packs(arguments)
    return max(report(dataclasses.replace(site, policy=policy), settings, pack, sys.stdout) for site, pack in held)


def _audit_privacy(arguments: argparse.Namespace) -> int:
    settings, address = read_run(arguments, default_config=DEFAULT_CONFIG)
    set_up_logging(settings.run.log_level)
    from simulation.compare.membership import AuditRequest, audit_privacy

    request = AuditRequest(
        run=arguments.run,
        clients=arguments.client,
        data_dirs=arguments.data_dir,
        device=arguments.device,
        cache_dir=Path(arguments.cache_dir),
        state_dir=Path(arguments.state_dir).expanduser() if arguments.state_dir else None,
        address=address,
    )
    return audit_privacy(settings, request, sys.stdout, shape="json" if arguments.json else "text")


def _sweep_plan(arguments: argparse.Namespace) -> "SweepPlan | None":
    """What `--sweep` names, or None."""
    if not getattr(arguments, "sweep", ""):
        return None
    if arguments.config:
        raise ConfigError(["--sweep names its base in its own file; leave --config out."])
    from simulation.alone.sweep_plan import load_plan

    return load_plan(find_config(arguments.sweep, "--sweep"))


def _train_settings(arguments: argparse.Namespace, name: str, plan: "SweepPlan | None") -> tuple[Settings, str]:
    """The run's settings and tracking address."""
    resume = getattr(arguments, "resume", "")
    if resume:
        refuse_run_settings(arguments, "--resume", but=("run.out", "run.log_level"))
    default = TWINS_CONFIG if name == "twins" else DEFAULT_CONFIG
    if plan and not resume:
        from simulation.alone.sweep_plan import base_config, check_together

        settings, address = read_run(arguments, default_config=base_config(plan))
        check_together(plan, settings)
        return settings, address
    settings, address = read_run(arguments, default_config=default)
    if name != "twins":
        refuse_ablation(settings, f"train {name}")
    return settings, address


def _train(arguments: argparse.Namespace, name: str) -> int:
    resume = getattr(arguments, "resume", "")
    plan = _sweep_plan(arguments)
    settings, address = _train_settings(arguments, name, plan)
    set_up_logging(settings.run.log_level)
    _warn_of_open_files("facefed", arguments, settings)
    from simulation import commands

    machine = commands.Machine(
        clients=arguments.client,
        data_dirs=arguments.data_dir,
        device=arguments.device,
        cache_dir=Path(arguments.cache_dir),
        address=address,
    )
    if name == "federated":
        warn_of_flower("facefed", any_flower=arguments.any_flower, stderr=sys.stderr)
        return commands.train_federated(settings, machine, sys.stdout, sys.stderr)
    if name == "twins":
        return commands.train_twins(settings, machine, resume, sys.stdout, plan=plan)
    train = {"local": commands.train_local, "centralized": commands.train_centralized}[name]
    return train(settings, machine, resume, sys.stdout)


def main(argv: Sequence[str] | None = None) -> int:
    """`facefed`: returns the exit code."""
    go_silent()
    arguments = facefed_parser().parse_args(argv)
    table: dict[tuple[str, str], Callable[[], int]] = {
        ("data", "synth"): lambda: _synth(arguments),
        ("data", "align"): lambda: _align(arguments),
        ("data", "prepare"): lambda: _data(arguments, "prepare"),
        ("data", "audit"): lambda: _data(arguments, "audit"),
        ("data", "packs"): lambda: _packs(arguments),
        **{
            ("train", name): partial(_train, arguments, name) for name in ("local", "centralized", "federated", "twins")
        },
        ("evaluate", ""): lambda: _evaluate(arguments),
        ("attention", ""): lambda: _attention(arguments),
        ("export", ""): lambda: _export(arguments),
        **{command: partial(handle, arguments) for command, handle in RECOGNITION_COMMANDS.items()},
        ("completion", ""): lambda: _completion(arguments),
        ("egress", "report"): lambda: egress(arguments),
        ("k8s", "render"): lambda: render_kubernetes(arguments),
        ("policy", "show"): lambda: show_policy(arguments),
        ("policy", "check"): lambda: _check_policy(arguments),
        ("privacy", "attack"): lambda: _attack(arguments),
        ("privacy", "audit"): lambda: _audit_privacy(arguments),
        ("privacy", "report"): lambda: privacy_report(arguments),
        **{("certs", name): partial(certs, arguments) for name in CERTS_ACTIONS},
        **{("tracking", name): partial(action.handle, arguments) for name, action in TRACKING_ACTIONS.items()},
    }
    work = table[(arguments.command, getattr(arguments, "action", ""))]
    if argv is None and arguments.command in BRIEF_COMMANDS:  # the process is this command's, and ends with it
        work = partial(briefly, work)
    return run_program("facefed", work, sys.stderr, shared_files=getattr(arguments, "shared_files", False))


if __name__ == "__main__":
    sys.exit(main())

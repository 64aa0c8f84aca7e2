"""The flags of `facefed verify`, `enrol`, `identify`, `gallery` and `serve`: the model in use."""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from common.flags import add_run_settings, examples, flags_of, read_run
from common.system.console import set_up_logging

if TYPE_CHECKING:
    from simulation.recognition.verbs import Ask

Commands = Any  # argparse._SubParsersAction of our parsers
_MODEL_HELP: Final = (
    "models:/NAME@champion or models:/NAME/VERSION, a finished run's id or folder, or a gallery's model file"
)


def _add_asking(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--far",
        type=float,
        metavar="RATE",
        help="false accept rate of the threshold (default: 1e-3, or the lowest that the model's validation supports)",
    )
    parser.add_argument(
        "--anyway", action="store_true", help="ask a model whose equal error rate is above the limit all the same"
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the answer as JSON")


def _add_tracking(parser: argparse.ArgumentParser) -> None:
    """Where models are looked for: the model brings all other settings."""
    names = ("--tracking-uri", "--out", "--log-level")
    flags = [flag for flag in flags_of(parser.prog) if flag.names[0] in names]
    add_run_settings(parser, flags=flags)


def add_recognition_parsers(commands: Commands) -> None:
    """Add the verbs of a model in use to the commands of `facefed`."""
    _verify_parser(commands)
    _enrol_parser(commands)
    _identify_parser(commands)
    _gallery_parser(commands)
    _serve_parser(commands)


def _command(commands: Commands, name: str, text: str, *lines: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, epilog=examples(*lines))
    return parser


def _verify_parser(commands: Commands) -> None:
    verify = _command(
        commands,
        "verify",
        "say whether two photographs show one person",
        "facefed verify a.jpg b.jpg --model models:/resnet18_federated_fedavg@champion",
        "facefed verify a.jpg b.jpg --model 20261128-101500-1a2b3c --far 1e-2",
    )
    verify.add_argument("first", metavar="PICTURE")
    verify.add_argument("second", metavar="PICTURE")
    verify.add_argument("--model", required=True, metavar="MODEL", help=_MODEL_HELP)
    _add_asking(verify)
    _add_json(verify)
    _add_tracking(verify)


def _enrol_parser(commands: Commands) -> None:
    enrol = _command(
        commands,
        "enrol",
        "enrol people in a gallery: templates of their photographs, which are not kept",
        "facefed enrol gallery people/ --model models:/resnet18_federated_fedavg@champion",
        "facefed enrol gallery more-people/",
        "facefed enrol gallery people/ --model 20261128-101500-1a2b3c --replace",
    )
    enrol.add_argument("gallery", metavar="GALLERY", help="a folder, which is made where there is none")
    enrol.add_argument("people", metavar="PEOPLE", help="a folder with one folder a person")
    enrol.add_argument("--model", default="", metavar="MODEL", help=f"{_MODEL_HELP} (default: that of the gallery)")
    enrol.add_argument(
        "--replace",
        action="store_true",
        help="put these templates in the place of the people's former ones; with another model, of everybody's",
    )
    _add_tracking(enrol)


def _identify_parser(commands: Commands) -> None:
    identify = _command(
        commands,
        "identify",
        "say who of a gallery is on a photograph",
        "facefed identify gallery photo.jpg",
        "facefed identify gallery photo.jpg --top 5 --far 1e-2",
    )
    identify.add_argument("gallery", metavar="GALLERY")
    identify.add_argument("picture", metavar="PICTURE")
    identify.add_argument("--top", type=int, default=3, metavar="N", help="show the N people that a face is most like")
    _add_asking(identify)
    _add_json(identify)


def _gallery_parser(commands: Commands) -> None:
    actions = commands.add_parser("gallery", help="who is enrolled in a gallery, and removing people").add_subparsers(
        dest="action", required=True
    )
    listed = _command(actions, "list", "show who is enrolled", "facefed gallery list gallery")
    listed.add_argument("gallery", metavar="GALLERY")
    removed = _command(actions, "remove", "take people out for good", "facefed gallery remove gallery Ann Ben")
    removed.add_argument("gallery", metavar="GALLERY")
    removed.add_argument("names", nargs="+", metavar="NAME")


def _serve_parser(commands: Commands) -> None:
    serve = _command(
        commands,
        "serve",
        "answer from a gallery on a page in the browser, and as JSON",
        "facefed serve gallery --port 8080",
        "facefed serve gallery --host 0.0.0.0 --tls certs --token-file token.txt",
    )
    serve.add_argument("gallery", metavar="GALLERY")
    serve.add_argument("--host", default="127.0.0.1", metavar="HOST", help="the address to listen at")
    serve.add_argument("--port", type=int, default=8080, metavar="N")
    serve.add_argument("--tls", metavar="DIR", help="encrypt: a folder that `facefed certs init` made")
    serve.add_argument(
        "--insecure", action="store_true", help="beyond this machine without encryption, on a network that is yours"
    )
    serve.add_argument(
        "--token-file", metavar="FILE", help="the token that each request carries (default: a new one, printed)"
    )
    serve.add_argument(
        "--allowed-host",
        dest="allowed_hosts",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name under which the page may be opened; repeatable",
    )
    _add_asking(serve)


def _folder(text: str) -> Path:
    return Path(text).expanduser()


def _ask(arguments: argparse.Namespace, address: str = "") -> "Ask":
    from simulation.recognition.verbs import Ask

    return Ask(
        model=getattr(arguments, "model", ""),
        far=getattr(arguments, "far", None),
        anyway=getattr(arguments, "anyway", False),
        shape="json" if getattr(arguments, "json", False) else "text",
        address=address,
    )


def _verify(arguments: argparse.Namespace) -> int:
    settings, address = read_run(arguments)
    set_up_logging(settings.run.log_level)
    from simulation.recognition.verbs import verify

    pictures = _folder(arguments.first), _folder(arguments.second)
    return verify(settings, _ask(arguments, address), pictures, sys.stdout)


def _enrol(arguments: argparse.Namespace) -> int:
    settings, address = read_run(arguments)
    set_up_logging(settings.run.log_level)
    from simulation.recognition.verbs import enrol

    return enrol(
        settings,
        _ask(arguments, address),
        _folder(arguments.gallery),
        _folder(arguments.people),
        sys.stdout,
        sys.stderr,
        mode="replace" if arguments.replace else "add",
    )


def _identify(arguments: argparse.Namespace) -> int:
    set_up_logging("warning")
    from simulation.recognition.verbs import identify

    picture = _folder(arguments.picture)
    return identify(_ask(arguments), _folder(arguments.gallery), picture, arguments.top, sys.stdout)


def _list(arguments: argparse.Namespace) -> int:
    from simulation.recognition.verbs import list_people

    return list_people(_folder(arguments.gallery), sys.stdout)


def _remove(arguments: argparse.Namespace) -> int:
    from simulation.recognition.verbs import remove

    return remove(_folder(arguments.gallery), arguments.names, sys.stdout)


def _serve(arguments: argparse.Namespace) -> int:
    set_up_logging("warning")
    from simulation.recognition.serve import ServeRequest, serve

    request = ServeRequest(
        host=arguments.host,
        port=arguments.port,
        tls=_folder(arguments.tls) if arguments.tls else None,
        insecure=arguments.insecure,
        token_file=_folder(arguments.token_file) if arguments.token_file else None,
        allowed_hosts=arguments.allowed_hosts,
    )
    return serve(_ask(arguments), request, _folder(arguments.gallery), sys.stdout)


BRIEF_COMMANDS: Final = frozenset(("verify", "identify"))  # one answer, and the program ends
RECOGNITION_COMMANDS: Final[Mapping[tuple[str, str], Callable[[argparse.Namespace], int]]] = {
    ("verify", ""): _verify,
    ("enrol", ""): _enrol,
    ("identify", ""): _identify,
    ("gallery", "list"): _list,
    ("gallery", "remove"): _remove,
    ("serve", ""): _serve,
}

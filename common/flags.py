"""The command line: how it is parsed, and each run setting's flag, its alias and the setting that it overrides.

Only the standard library is imported, so that `--help` answers at once.
"""

import argparse
import contextlib
import difflib
import functools
import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from common import config
from common.errors import EXIT_USER, ConfigError
from common.models.table import BACKBONES, HEADS
from common.redact import passwords_in, shown_uri
from common.settings import LOG_LEVELS, Settings
from common.strategies import STRATEGIES
from common.system.runtime import facefed_version, tracking_uri_of_environment

_CHOICES = re.compile(r"invalid choice: '(.*)' \(choose from (.*)\)$", re.DOTALL)
GIVEN_AS = "given_as"  # of a parsed command line: dest -> the option as it was typed


@functools.cache
def _values_of(name: str | None) -> dict[str, object]:
    """Each setting's value in a configuration, by its name."""
    settings = Settings()
    with contextlib.suppress(ConfigError):
        settings = config.load(config.find_config(name)) if name else settings
    return {
        f"{section}.{key}": value
        for section, values in config.to_mapping(settings).items()
        for key, value in values.items()
    }


class _Help(argparse.HelpFormatter):
    """argparse's own, with the default of each option behind its words, and examples as they were written."""

    def __init__(self, prog: str, read_defaults: Callable[[], Mapping[str, object]] = dict) -> None:
        """read_defaults: by dest; asked for only where a help is shown, as each added option makes a formatter."""
        super().__init__(prog, max_help_position=30)
        self._read_defaults = read_defaults

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        value = self._read_defaults().get(action.dest, action.default)
        is_told = "default" in text or not action.option_strings or isinstance(value, bool)
        if is_told or value in (None, "", [], argparse.SUPPRESS):
            return text
        return f"{text} (default: {str(value).replace('%', '%%')})"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return "\n".join(f"{indent}{line}" for line in text.splitlines())
        return super()._fill_text(text, width, indent)


class ProgramParser(argparse.ArgumentParser):
    """argparse's own, which answers a mistyped word with the nearest one; the parsers of its commands are such too."""

    default_config: str | None = None  # that whose values are shown as defaults

    def _get_formatter(self) -> argparse.HelpFormatter:
        return _Help(self.prog, self.shown_defaults)

    def shown_defaults(self) -> dict[str, object]:
        """Each run setting's value where no flag is given, by its name; read only when the help is shown."""
        return _values_of(self.default_config)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, but whoever does not know a word says so itself: its own options are those that were meant."""
        words = sys.argv[1:] if args is None else list(args)
        self._words = words
        if not words and self._subparsers is not None:
            self.print_help(sys.stderr)
            self.exit(EXIT_USER, f"\n{self.prog}: error: {self._wanted()}\n")
        parsed, unknown = super().parse_known_args(words, namespace)
        if unknown:
            self.error("; ".join(self._unknown(word) for word in unknown if word.startswith("-")) or _extra(unknown))
        setattr(parsed, GIVEN_AS, vars(parsed).get(GIVEN_AS, {}) | self._as_typed(words))
        return parsed, []

    def error(self, message: str) -> NoReturn:
        """The usage and one line."""
        if found := _CHOICES.search(message):
            seen, choices = found.group(1), re.findall(r"'([^']*)'", found.group(2))
            near = difflib.get_close_matches(seen, choices, n=1)
            message += f"; did you mean {near[0]!r}?" if near else ""
        elif message.startswith("the following arguments are required"):
            names = [word.partition("=")[0] for word in self._words if word.startswith("--")]
            mistyped = [name for name in names if not any(one.startswith(name) for one in self._option_string_actions)]
            if mistyped:  # what is missing was meant by it
                message = "; ".join(map(self._unknown, mistyped))
            elif self._subparsers is not None:
                message = self._wanted()
        super().error(message)

    def _wanted(self) -> str:
        """What a command that has commands of its own wants."""
        names = [name for action in self._actions if action.nargs == argparse.PARSER for name in action.choices or ()]
        return f"a command is missing; give one of {', '.join(names)}"

    def _unknown(self, word: str) -> str:
        name = word.partition("=")[0]
        readers = next((flag.read_by for flag in FLAGS if name in flag.names), ())
        if readers:
            return f"{self.prog} does not read {name}; {one_of(readers, 'and')} do"
        near = difflib.get_close_matches(name, self._option_string_actions, n=1)
        if near:
            return f"{name} is unknown; did you mean {near[0]}?"
        settings = [
            f"{section}.{key}"
            for section, values in config.to_mapping(Settings()).items()
            for key in values
            if key == name.strip("-").replace("-", "_")
        ]
        if settings and "--set" in self._option_string_actions:
            return f"{name} is unknown; write --set {settings[0]}=VALUE"
        return f"{name} is unknown; {self.prog} --help lists what there is"

    def _as_typed(self, words: Sequence[str]) -> dict[str, str]:
        typed = (word.partition("=")[0] for word in words if word.startswith("--"))
        return {
            action.dest: name for name in typed if (action := self._option_string_actions.get(name)) and action.dest
        }


def _extra(words: Sequence[str]) -> str:
    return f"{' '.join(words)}: nothing more was expected; does an option's name stand before it?"


def examples(*lines: str) -> str:
    """What stands at the end of a help."""
    return "\n".join(["examples:", *(f"  {line}" for line in lines)])


def program_parser(program: str, description: str, *lines: str) -> argparse.ArgumentParser:
    """The parser of one of our programs.  lines: examples."""
    parser = ProgramParser(prog=program, description=description, epilog=examples(*lines) if lines else None)
    parser.add_argument("--version", action="version", version=f"%(prog)s {facefed_version()}")
    return parser


_ADDRESS: Final = "tracking.uri"
_LOGIN: Final = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or in a configuration's tracking.uri,"

_log = logging.getLogger("facefed.tracking")


@dataclass(frozen=True, kw_only=True)
class Flag:
    """A flag that overrides one setting."""

    names: tuple[str, ...]
    section: str
    key: str
    metavar: str
    help: str
    read_by: tuple[str, ...] = ()  # the commands that have it; empty: all that have run settings
    choices: tuple[str, ...] = ()  # its values, where they can be listed
    stands_for: str = ""  # the value that it gives by itself; empty: one follows it


def one_of(names: Iterable[str], word: str = "or") -> str:
    """Names as a choice to read: "a, b or c"."""
    *others, last = names
    return f"{', '.join(others)} {word} {last}"


FEDERATE: Final = ("flower-server", "flower-simulation", "facefed train federated")
TRAIN_ALONE: Final = ("facefed train local", "facefed train centralized", "facefed train twins")
TRAIN: Final = (*FEDERATE, *TRAIN_ALONE)
PREPARE: Final = ("facefed data prepare", "facefed data audit")


FLAGS: tuple[Flag, ...] = (
    Flag(
        names=("--strategy", "--method"),
        section="federation",
        key="strategy",
        metavar="NAME",
        help=one_of(STRATEGIES),
        read_by=FEDERATE,
        choices=tuple(STRATEGIES),
    ),
    Flag(
        names=("--rounds",),
        section="federation",
        key="rounds",
        metavar="N",
        help="rounds of the federation",
        read_by=FEDERATE,
    ),
    Flag(
        names=("--local-epochs",),
        section="federation",
        key="local_epochs",
        metavar="N",
        help="epochs in each round",
        read_by=FEDERATE,
    ),
    Flag(
        names=("--proximal-mu",),
        section="federation",
        key="proximal_mu",
        metavar="MU",
        help="fedprox: pull to the received model",
        read_by=FEDERATE,
    ),
    Flag(
        names=("--secagg",),
        section="secagg",
        key="enabled",
        metavar="",
        help="secure aggregation: the server sees sums over 3 sites or more, and no single site's reply",
        read_by=FEDERATE,
        stands_for="true",
    ),
    Flag(
        names=("--model",),
        section="model",
        key="backbone",
        metavar="NAME",
        help=one_of(BACKBONES),
        read_by=(*TRAIN, "facefed evaluate"),
        choices=tuple(BACKBONES),
    ),
    Flag(
        names=("--head",),
        section="model",
        key="head",
        metavar="NAME",
        help=one_of(HEADS),
        read_by=TRAIN,
        choices=tuple(HEADS),
    ),
    Flag(names=("--lr",), section="training", key="lr", metavar="RATE", help="highest learning rate", read_by=TRAIN),
    Flag(
        names=("--batch-size",),
        section="training",
        key="batch_size",
        metavar="N",
        help="pictures in a batch",
        read_by=TRAIN,
    ),
    Flag(
        names=("--epochs",),
        section="training",
        key="epochs",
        metavar="N",
        help="epochs; auto: as often as the configuration's federation trains on each picture",
        read_by=TRAIN_ALONE,
    ),
    Flag(
        names=("--max-identities",),
        section="data",
        key="max_people",
        metavar="N",
        help="use at most so many people of each data set",
        read_by=(*TRAIN, *PREPARE),
    ),
    Flag(
        names=("--seed",),
        section="run",
        key="seed",
        metavar="N",
        help="seed of every random stream",
        read_by=(*TRAIN, "facefed evaluate"),
    ),
    Flag(
        names=("--tracking-uri", "--mlflow-uri", "--mlflow_uri"),
        section="tracking",
        key="uri",
        metavar="URI",
        help="MLflow: sqlite:///FILE or http://HOST:PORT",
    ),
    Flag(names=("--out",), section="run", key="out", metavar="DIR", help="where runs are kept"),
    Flag(
        names=("--log-level",),
        section="run",
        key="log_level",
        metavar="LEVEL",
        help=one_of(LOG_LEVELS),
        choices=LOG_LEVELS,
    ),
)


def add_shared_files(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add `--shared-files`, for every program that writes."""
    parser.add_argument(
        "--shared-files",
        action="store_true",
        help="write files with the usual umask (default: for this account alone, 0600 in folders of 0700)",
    )


def add_any_flower(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add `--any-flower`, for every program that federates; `common.system.console.warn_of_flower` reads it."""
    parser.add_argument(
        "--any-flower",
        action="store_true",
        help="go on with a version of Flower that FaceFed was not tested with (default: refuse it)",
    )


def flags_of(command: str) -> list[Flag]:
    """The flags of run settings that a command reads."""
    return [flag for flag in FLAGS if not flag.read_by or command in flag.read_by]


def add_run_settings(
    parser: argparse.ArgumentParser, *, flags: Sequence[Flag] = FLAGS, default_config: str | None = None
) -> None:
    """Add --config, the flags of run settings, --no-mlflow and --set.

    flags: those that are read.  default_config: is used where --config is not given.
    """
    if isinstance(parser, ProgramParser):
        parser.default_config = default_config
    group = parser.add_argument_group("run settings (they override the configuration)")
    usual = f" (default: {default_config})" if default_config else ""
    group.add_argument("--config", metavar="NAME|FILE", help=f"a TOML file, or NAME for configs/NAME.toml{usual}")
    for flag in flags:
        dest = f"{flag.section}.{flag.key}"
        if flag.stands_for:
            group.add_argument(*flag.names, dest=dest, action="store_const", const=flag.stands_for, help=flag.help)
        else:
            group.add_argument(*flag.names, dest=dest, metavar=flag.metavar, help=flag.help)
    group.add_argument(
        "--no-mlflow", "--mlflow-disabled", "--mlflow_disabled", action="store_true", help="keep the local record only"
    )
    group.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override any other setting; repeatable"
    )
    add_shared_files(parser)


def read_run_settings(arguments: argparse.Namespace, *, default_config: str | None = None) -> Settings:
    """Settings of the configuration, over it MLFLOW_TRACKING_URI, over that the flags.  Raises ConfigError."""
    return read_run(arguments, default_config=default_config)[0]


def read_run(arguments: argparse.Namespace, *, default_config: str | None = None) -> tuple[Settings, str]:
    """The same, and beside the settings the tracking address with the password that may be in it."""
    name = arguments.config or default_config
    if name == "default":
        name = default_config
    path: Path | None = config.find_config(name) if name else None
    overrides: dict[tuple[str, str], object] = {}
    if tracking_uri_of_environment():
        overrides[("tracking", "uri")] = tracking_uri_of_environment()
    for dotted, text in vars(arguments).items():
        section, dot, key = dotted.partition(".")
        if dot and text is not None:
            overrides[(section, key)] = config.value_of(dotted, text)
    for item in arguments.set:
        dotted, equals, text = item.partition("=")
        section, dot, key = dotted.partition(".")
        if not (equals and dot):
            raise ConfigError([f"--set {item}: write SECTION.KEY=VALUE, for example --set data.image_size=64."])
        overrides[(section, key)] = config.value_of(dotted, text)
    typed = {dotted: text for dotted, text in vars(arguments).items() if dotted == _ADDRESS and text}
    typed |= {item.partition("=")[0]: item.partition("=")[2] for item in arguments.set}
    if arguments.no_mlflow:
        overrides[("tracking", "enabled")] = False
    try:
        loaded = config.load_with_address(path, overrides)
    except ConfigError as error:
        source = f"{path or 'settings'}: "
        raise ConfigError([_blamed(problem, source, _flags_given(arguments)) for problem in error.problems]) from None
    tell_of_password("--tracking-uri", typed.get(_ADDRESS, ""), _LOGIN)
    return loaded


def _flags_given(arguments: argparse.Namespace) -> dict[str, str]:
    """The settings that the command line gave -> the flag that gave each, as it was typed."""
    typed = {f"{flag.section}.{flag.key}": flag.names[0] for flag in FLAGS} | vars(arguments).get(GIVEN_AS, {})
    given = {name: typed.get(name, name) for name, text in vars(arguments).items() if "." in name and text is not None}
    return given | {name: f"--set {name}" for name in (item.partition("=")[0] for item in arguments.set)}


def _blamed(problem: str, source: str, flags: Mapping[str, str]) -> str:
    """A setting's problem, begun with the flag that brought it about instead of the file that is not at fault."""
    bare = problem.removeprefix(source)
    for name in sorted(flags, key=lambda name: (not bare.startswith(f"{name} "), name)):
        if re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", bare):
            return f"{flags[name]}: {bare}"
    return problem


def tell_of_password(option: str, address: str, instead: str) -> None:
    """Warn of a password in an address that was typed: it is in the list of processes and in the shell's history.

    option: that it was given with.  instead: where a password belongs.
    """
    if passwords_in(address):
        _log.warning(
            "%s %s: every account of this machine can read the password in a command line; give it in %s instead.",
            option,
            shown_uri(address),
            instead,
        )


def refuse_run_settings(arguments: argparse.Namespace, because: str, *, but: Sequence[str] = ()) -> None:
    """Refuse settings beside a flag that brings its own.  but: settings that may be given.  Raises ConfigError."""
    names = {f"{flag.section}.{flag.key}": flag.names[0] for flag in FLAGS}
    given = [names[dotted] for dotted, text in vars(arguments).items() if dotted in names and text is not None]
    given = [name for name in given if name not in {names[dotted] for dotted in but}]
    given += ["--config"] * bool(arguments.config) + ["--set"] * bool(arguments.set)
    given += ["--no-mlflow"] * bool(arguments.no_mlflow)
    if given:
        raise ConfigError([f"{because} goes on with the run's own settings; leave {', '.join(given)} out."])


def refuse_ablation(settings: Settings, program: str) -> None:
    """Raise ConfigError for an ablation where none is made: a setting without an effect would look as if it had one."""
    if settings.ablation.over != "none":
        raise ConfigError([f"{program} makes no ablation; use facefed train twins, or ablation.over = none."])

"""`facefed completion`: what makes the Tab key complete our commands, options and values, made from the parsers.

A script holds nothing but names: it starts no program of ours when the key is pressed, and nothing can get stale but by
another version of FaceFed.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from common.config import shipped
from common.faces.datasets import DATASETS
from common.flags import FLAGS

DIRECTORY: Final = "directory"
FILE: Final = "file"


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option of a command."""

    names: tuple[str, ...]
    takes_value: bool
    values: tuple[str, ...]  # to choose from; empty: none can be listed
    place: str  # DIRECTORY, FILE or "": what its value may be beside those
    text: str


@dataclass(frozen=True, kw_only=True)
class Command:
    """A program, or a command of one: "facefed train local"."""

    path: str
    options: tuple[Option, ...]
    words: Mapping[str, str] = field(default_factory=dict)  # what may follow -> its help


def _option(action: argparse.Action) -> Option:
    values = {f"{flag.section}.{flag.key}": flag.choices for flag in FLAGS}.get(action.dest, ())
    metavar = str(action.metavar or "")
    if action.choices:
        values = tuple(map(str, action.choices))
    elif action.dest == "config":
        values = tuple(path.stem for path in shipped())
    elif action.dest == "dataset":
        values = tuple(DATASETS)
    elif action.dest == "device":
        values = ("auto", "cpu", "cuda", "mps")
    place = DIRECTORY if metavar == "DIR" or metavar.endswith("=DIR") else FILE if "FILE" in metavar else ""
    return Option(
        names=tuple(action.option_strings),
        takes_value=action.nargs != 0,
        values=values,
        place=place,
        text=" ".join((action.help or "").split()).replace("%%", "%"),
    )


def commands_of(parser: argparse.ArgumentParser) -> Iterator[Command]:
    """A parser's command and all below it."""
    options, words, below = [], {}, []
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way to ask
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            words = {str(choice.dest): choice.help or "" for choice in action._choices_actions}  # noqa: SLF001
            below = list(dict.fromkeys(action.choices.values()))
        elif action.option_strings:
            options.append(_option(action))
        elif action.choices:
            words = dict.fromkeys(map(str, action.choices), "")
    yield Command(path=parser.prog, options=tuple(options), words=words)
    for each in below:
        yield from commands_of(each)


def _values(commands: Sequence[Command]) -> dict[str, Option]:
    """Each option that takes a value; where two commands have one of a name, the values of both."""
    found: dict[str, Option] = {}
    for command in commands:
        for option in command.options:
            for name in option.names if option.takes_value else ():
                other = found.get(name)
                values = tuple(dict.fromkeys([*(other.values if other else ()), *option.values]))
                place = option.place or (other.place if other else "")
                found[name] = Option(names=(name,), takes_value=True, values=values, place=place, text="")
    return found


def _below(commands: Sequence[Command]) -> list[str]:
    """The paths of commands below a program."""
    return [command.path for command in commands if " " in command.path]


def _case(names: Sequence[str]) -> str:
    return "|".join(f"'{name}'" for name in names)


def _bash(programs: Sequence[str], commands: Sequence[Command]) -> str:
    lines = [
        "_facefed_complete() {",
        '  local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" at="${COMP_WORDS[0]##*/}" word',
        '  for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
        f'    case "$at $word" in {_case(_below(commands))}) at="$at $word";; esac',
        "  done",
        '  case "$prev" in',
    ]
    for name, option in _values(commands).items():
        kind = {DIRECTORY: " -d", FILE: " -f"}.get(option.place, "")
        values = f" -W '{' '.join(option.values)}'" if option.values else ""
        lines.append(f'    {name}) COMPREPLY=($(compgen{kind}{values} -- "$cur")); return;;')
    lines += ["  esac", '  case "$at" in']
    for command in commands:
        words = [*command.words, *(name for option in command.options for name in option.names)]
        lines.append(f"    '{command.path}') COMPREPLY=($(compgen -W '{' '.join(words)}' -- \"$cur\"));;")
    lines += ["  esac", "}", f"complete -o default -F _facefed_complete {' '.join(programs)}", ""]
    return "\n".join(lines)


def _zsh(programs: Sequence[str], commands: Sequence[Command]) -> str:
    lines = [
        "_facefed_complete() {",
        '  local at="${words[1]:t}" word',
        '  for word in "${(@)words[2,CURRENT-1]}"; do',
        f'    case "$at $word" in {_case(_below(commands))}) at="$at $word";; esac',
        "  done",
        '  case "${words[CURRENT-1]}" in',
    ]
    for name, option in _values(commands).items():
        does = [f"compadd -- {' '.join(option.values)}"] if option.values else []
        does += {DIRECTORY: ["_files -/"], FILE: ["_files"]}.get(option.place, [])
        lines.append(f"    {name}) {'; '.join([*does, 'return'])};;")
    lines += ["  esac", '  case "$at" in']
    for command in commands:
        words = [*command.words, *(name for option in command.options for name in option.names)]
        lines.append(f"    '{command.path}') compadd -- {' '.join(words)}; _files;;")
    lines += ["  esac", "}", f"compdef _facefed_complete {' '.join(programs)}", ""]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    """For fish."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _fish(_: Sequence[str], commands: Sequence[Command]) -> str:
    lines = [
        "function __facefed_at",
        "  set -l words (commandline -opc)",
        "  set -l at (basename $words[1])",
        "  for word in $words[2..-1]",
        '    switch "$at $word"',
        f"      case {' '.join(map(_quoted, _below(commands)))}",
        '        set at "$at $word"',
        "    end",
        "  end",
        "  echo $at",
        "end",
    ]
    for command in commands:
        program = command.path.partition(" ")[0]
        condition = f"test (__facefed_at) = '{command.path}'"
        here = f'complete -c {program} -n "{condition}"'
        lines += [f"{here} -f -a {word} -d {_quoted(text)}" for word, text in command.words.items()]
        for option in command.options:
            names = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names)
            value = ""
            if option.takes_value:
                value = " -r" if option.place or not option.values else " -x"
                value += f" -a {_quoted(' '.join(option.values))}" if option.values else ""
            lines.append(f"{here} {names}{value} -d {_quoted(option.text)}")
    return "\n".join([*lines, ""])


_MAKERS: Final[Mapping[str, Callable[[Sequence[str], Sequence[Command]], str]]] = {
    "bash": _bash,
    "zsh": _zsh,
    "fish": _fish,
}
SHELLS: Final = tuple(_MAKERS)


def completion_script(shell: str, parsers: Sequence[argparse.ArgumentParser]) -> str:
    """The script for one of SHELLS.  parsers: of the programs."""
    commands = [command for parser in parsers for command in commands_of(parser)]
    return _MAKERS[shell]([parser.prog for parser in parsers], commands)

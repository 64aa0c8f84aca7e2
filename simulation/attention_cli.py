"""The flags of `facefed attention`."""

import argparse
import sys
from pathlib import Path
from typing import Final

from common.console import set_up_logging
from common.flags import FLAGS, add_run_settings, read_run

_OWN: Final = ("--tracking-uri", "--out", "--log-level")  # the model brings all other settings


def add_attention_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `attention` to the commands of `facefed`."""
    parser = commands.add_parser("attention", help="draw where a vision transformer looks in given pictures")
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
    add_run_settings(parser, without=[flag.names[0] for flag in FLAGS if flag.names[0] not in _OWN])


def attention(arguments: argparse.Namespace) -> int:
    """`facefed attention`: returns the exit code."""
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

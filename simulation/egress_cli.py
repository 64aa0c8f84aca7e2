"""The flags of `facefed egress`."""

import argparse
import sys
from pathlib import Path


def add_egress_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `egress` to the commands of `facefed`."""
    actions = commands.add_parser("egress", help="what left this site").add_subparsers(dest="action", required=True)
    text = "show what left this site in a run, and whether it is what the server received"
    report = actions.add_parser("report", help=text, description=text)
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
    from simulation.egress_report import Request, report_egress

    request = Request(
        name=arguments.name,
        state_dir=Path(arguments.state_dir).expanduser() if arguments.state_dir else None,
        run=arguments.run,
        server_run=Path(arguments.server_run).expanduser() if arguments.server_run else None,
    )
    return report_egress(request, sys.stdout, shape="json" if arguments.json else "text")

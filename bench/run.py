"""Every claim of speed against its peer, measured in turns in one run: a table, and every single value as JSON.

    python -m bench.run [NAME ...] [--list] [--quick] [--scratch FOLDER] [--out FOLDER]
    python -m bench.run --table FILE.json [FILE.json ...]

Without names everything runs, in about a quarter of an hour on two cores. The pictures are made in --scratch once.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench import aggregation, deployment, memory, pictures, rounds, scoring, verification
from bench.comparison import Comparison, Place, measure, table, values
from bench.machine import describe

TABLE = (
    rounds.COMPARISON, deployment.COMPARISON, aggregation.COMPARISON, memory.COMPARISON, pictures.COMPARISON,
    verification.COMPARISON, deployment.TRAINER, scoring.COMPARISON,
)  # fmt: skip
COMPARISONS = {comparison.name: comparison for comparison in TABLE}
BUSY_CORES = 0.2  # kept busy by others during a side: its seconds are no good then


def chosen(names: Sequence[str]) -> list[Comparison]:
    """The comparisons of these names; of none, all that are meant to run together."""
    unknown = [name for name in names if name not in COMPARISONS]
    if unknown:
        sys.exit(f"{unknown[0]!r} is no comparison; choose {', '.join(COMPARISONS)}.")
    return [COMPARISONS[name] for name in names] or [one for one in COMPARISONS.values() if one.in_all]


def remarks(report: dict) -> list[str]:
    """What a reader of the table has to know: the machine, what is absent, and what was disturbed."""
    machine, ended = report["machine"], report["load_average_at_end"]
    told = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; {machine['date']}; commit"
        f" {machine['commit']}; load average {machine['load_average'][0]} before, {ended[0]} after",
        ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
    ]
    for name, result in report["comparisons"].items():
        told += [f"{name}: {result['what']}"]
        told += [f"{name}: {result['note']}"] if result["note"] else []
        told += [f"{name}: {side} {reason}" for side, reason in result["absent"].items()]
        for side, runs in result["runs"].items():
            others = values(runs, "others_cores")
            if others and max(others) > BUSY_CORES:
                told.append(
                    f"{name}: {side} was disturbed: others kept {min(others):.2f} to {max(others):.2f} cores busy"
                )
    return told


def show(report: dict) -> str:
    """The table and the remarks, as Markdown."""
    return "\n".join([table(report["comparisons"]), "", *(f"- {remark}" for remark in remarks(report))])


def merged(reports: Sequence[dict]) -> dict:
    """One report of several; of a comparison that stands in two the later counts, of the machine the first."""
    whole = dict(reports[0], comparisons={})
    for report in reports:
        whole["comparisons"] |= report["comparisons"]
    return whole


def _say(text: str) -> None:
    print(text if len(text) < 400 else f"{text[:400]} ...", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="say what there is")
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--scratch", type=Path, default=Path(".facefed/bench"), help="where pictures and runs are kept")
    parser.add_argument("--out", type=Path, default=Path("bench-results"))
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="print the table of earlier results")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{one.name:14} {one.what}" for one in COMPARISONS.values()))
        return
    if arguments.table:
        print(show(merged([json.loads(path.read_text()) for path in arguments.table])))
        return
    wanted = chosen(arguments.names)
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    place = Place(scratch=arguments.scratch, quick=arguments.quick)
    report: dict = {"machine": describe(), "quick": arguments.quick, "comparisons": {}}
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / f"{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    for comparison in wanted:
        result = measure(comparison, place, _say)
        report["comparisons"][comparison.name] = result.to_json()
        report["load_average_at_end"] = [round(value, 2) for value in os.getloadavg()]
        file.write_text(json.dumps(report, indent=1) + "\n")  # what is measured is kept, whatever comes
    print(show(report))
    print(f"\nevery value: {file}")
    if any("failed" in reason for one in report["comparisons"].values() for reason in one["absent"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()

"""`python -m tests.chaos`: runs of 20 rounds with faults, a row for each fault in a report, and the table over all.

python -m tests.chaos --seed 0 --runs 10                  # 50 faults
python -m tests.chaos --seed 0 --first 3 --runs 1         # the fourth run of these again
"""

import argparse
import logging
import sys
from pathlib import Path

from tests.chaos.campaign import Ground, append, line_of, play, read, table
from tests.chaos.plan import DISK_KINDS, KINDS, plan

FAULTS, ROUNDS = 5, 20  # of a run


def _can_mount(folder: Path) -> bool:
    from tests.chaos.disks import SmallDisk

    try:
        with SmallDisk(folder / "try"):
            return True
    except OSError as error:
        sys.stdout.write(f"{error}; faults of full disks are left out\n")
        return False
    finally:
        (folder / "try").rmdir()


def main() -> int:
    """Play the runs; 0 when all ended as they must."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Faults over runs of a federation.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, metavar="RUN", help="number of the first run")
    parser.add_argument("--runs", type=int, default=10, help=f"each has {FAULTS} faults")
    parser.add_argument("--work", type=Path, default=Path("chaos"), metavar="DIR", help="where all of it lies")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    work = arguments.work.resolve()
    ground = Ground(work, rounds=ROUNDS)
    disks = _can_mount(work)
    kinds = [kind for kind in KINDS if disks or kind not in DISK_KINDS]
    report = work / f"report-{arguments.seed}.jsonl"
    for number in range(arguments.first, arguments.first + arguments.runs):
        faults = plan(arguments.seed, number, faults=FAULTS, rounds=ROUNDS, kinds=kinds)
        verdict, rows = play(ground, number, faults, disks=disks)
        append(report, [{"seed": arguments.seed, **row} for row in rows])
        sys.stdout.write(f"run {number}: {'well' if not verdict.wrong else '; '.join(verdict.wrong)}\n")
        for row in rows:
            sys.stdout.write(f"  {line_of(row)}\n")
        sys.stdout.flush()
    rows = read(report)
    sys.stdout.write(f"\n{table(rows)}\nreport: {report}\n")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

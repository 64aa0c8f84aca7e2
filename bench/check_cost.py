"""What the server's checks of its sites cost: CPU-seconds of each in the rounds of workload W, in a simulation.

    python -m bench.check_cost [--rounds 3] [--codec float32|float16|int8] [--scratch DIR]

The checks are `server/exchange/guard.py`'s: form, counts and sums of a reply, and how long its change is beside the
model. Seconds are of the one thread that checks, so other work on the machine hardly shows in them; the share is of the
steady rounds' seconds as the server's clock gives them, and wants an idle machine.
"""

import argparse
import functools
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

from bench.our_run import figures, newest_run
from bench.workload import CLIENTS, prepare, settings_arguments

CHECKS = ("check_sender", "check_train_reply", "check_evaluation_reply")


def timed(name: str, check: Callable[..., Any], spent: Counter[str]) -> Callable[..., Any]:
    """The same check, whose CPU-seconds are added to spent[name]."""

    @functools.wraps(check)
    def measured(*arguments: Any, **named: Any) -> Any:
        started = time.thread_time()
        try:
            return check(*arguments, **named)
        finally:
            spent[name] += time.thread_time() - started

    return measured


def watch() -> Counter[str]:
    """Every check is timed from here on, wherever it was imported."""
    from common.protocol.change_bound import ChangeBound
    from server.exchange import guard, messages, roster

    spent: Counter[str] = Counter()
    for name in CHECKS:
        check = timed(name, getattr(guard, name), spent)
        for module in (guard, messages, roster):
            if hasattr(module, name):
                setattr(module, name, check)
    for name in ("check", "receive"):
        setattr(ChangeBound, name, timed(f"ChangeBound.{name}", getattr(ChangeBound, name), spent))
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, default=Path(".facefed/bench"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--codec", default="float32")
    arguments = parser.parse_args()
    workload = prepare(arguments.scratch)
    data = [part for client in CLIENTS for part in ("--client", f"{client}:folder={workload.pictures(client)}")]
    command = ["flower-simulation", *data, "--cache-dir", str(workload.cache), "--no-mlflow", *settings_arguments()]
    command += ["--rounds", str(arguments.rounds), "--set", f"federation.upload_codec={arguments.codec}"]
    folder = arguments.scratch.resolve() / "check_cost"
    folder.mkdir(parents=True, exist_ok=True)
    spent = watch()
    from simulation.cli import main_simulation

    with chdir(folder):
        sys.argv = command
        code = main_simulation()
    if code:
        sys.exit(code)
    rounds = figures(newest_run(folder))["round_seconds"]
    for name, seconds in sorted(spent.items()):
        print(f"{name:24} {seconds / arguments.rounds * 1000:8.2f} ms of CPU a round")
    share = sum(spent.values()) / arguments.rounds / (sum(rounds) / len(rounds))
    print(f"{'all':24} {sum(spent.values()) / arguments.rounds * 1000:8.2f} ms of CPU a round, {share:.2%} of a round")


if __name__ == "__main__":
    main()

"""What a site's own checks cost it: CPU-seconds of the rounds of workload W with the built-in policy and without.

    python -m bench.site_checks [--rounds 5] [--precision bfloat16] [--scratch DIR]

A round is the whole answer to a train task: the received model looked at, evaluated and trained, the reply and the
records written.  Rounds with and without follow each other, on one thread, so that the machine's other work falls on
both; the shares are of their medians.  Without: no limit, no received model is looked at and no gradient is watched.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.workload import CLIENTS, prepare, settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, default=Path(".facefed/bench"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="bfloat16")
    arguments = parser.parse_args()
    from clients.policy import DEFAULT, OWN_MACHINE
    from common import config
    from common.system.runtime import use_threads

    use_threads(1)
    workload = prepare(arguments.scratch)
    values = {
        "federation.rounds": arguments.rounds,
        "tracking.plots": "none",
        "training.precision": arguments.precision,
    }
    run = config.with_values(settings(), values)
    policies = {"with": DEFAULT, "without": dataclasses.replace(OWN_MACHINE, first_model=False, max_move=0.0)}
    with tempfile.TemporaryDirectory() as folder:
        sites = {name: _site(workload, Path(folder) / name, policy) for name, policy in policies.items()}
        spent: dict[str, list[float]] = {name: [] for name in policies}
        models: dict[str, Any] = dict.fromkeys(policies)
        for server_round in range(1, arguments.rounds + 1):
            for name, site in sites.items():
                seconds, models[name] = _round(site, run, server_round, models[name])
                spent[name].append(seconds)
    for name, seconds in spent.items():
        print(f"{name:8} {' '.join(f'{one:.2f}' for one in seconds)} CPU-s a round")
    steady = {name: statistics.median(seconds[1:]) for name, seconds in spent.items()}
    print(f"the checks are {steady['with'] / steady['without'] - 1:.2%} of a round (medians from the second round on)")


def _site(workload: Any, folder: Path, policy: Any) -> Any:
    from clients.site import OF_RUN, SiteSettings

    return SiteSettings(
        name=folder.name, dataset="folder", data_dir=workload.pictures(CLIENTS[0]), device="cpu", state_dir=folder,
        cache_dir=workload.cache, policy=policy, seed=OF_RUN,
    )  # fmt: skip


def _round(site: Any, run: Any, server_round: int, model: Any) -> tuple[float, Any]:
    """CPU-seconds of one answer, and the model that a server makes of it alone."""
    from clients.message_handler import answer
    from common import config
    from common.protocol import wire
    from common.protocol.codec import encode
    from common.protocol.wire import Task
    from simulation.admin.attacks import first_model

    first, manifest = first_model(run)
    model = first if model is None else model
    task = Task(
        kind="train", run_id=f"run-{site.name}", server_round=server_round, settings=config.to_json(run),
        manifest=manifest.digest, splits="val test", precision=run.training.precision, memory_format="channels_last",
    )  # fmt: skip
    content = wire.task_content(task, wire.pack_shared(encode(model, "float32")))
    began = time.process_time()
    reply = answer(site, content)
    seconds = time.process_time() - began
    if isinstance(reply, str):
        raise SystemExit(reply)
    return seconds, model + wire.read_change(reply)


if __name__ == "__main__":
    main()

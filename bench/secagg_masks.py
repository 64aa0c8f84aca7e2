"""What masks, shares and integers of secure aggregation take at a site and at the server, without any message.

    python -m bench.secagg_masks [--mebibytes 45] [--members 3 10 30] [--repeats 5]

One core; CPU-seconds, medians. `masked` is all that a site does to its words; `unmask` is all that the server does to a
sum, with nobody lost and with as many lost as the threshold allows.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import numpy as np

from common.secagg.keys import Context, Identity, advertise, check_advert, default_threshold
from common.secagg.masks import add_mask, masked, unmask
from common.secagg.quantise import quantise
from common.secagg.shamir import join
from common.secagg.shares import seal, split_secrets, unseal

GOAL_S = 0.3  # for one peer's mask of 45 MiB


def cpu_s(work: Callable[[], object], repeats: int) -> float:
    """Median CPU-seconds of this process."""
    found = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return median(found)


def of_members(num: int, words: np.ndarray, repeats: int) -> None:
    """One line for a round of so many members."""
    names = [f"site{number:02d}" for number in range(num)]
    identities = {name: Identity.in_memory(name) for name in names}
    context = Context(run_id="bench", server_round=1, attempt=1)
    made = {name: advertise(identities[name], context) for name in names}
    adverts = {name: advert for name, (advert, _) in made.items()}
    context = Context(run_id="bench", server_round=1, attempt=1, members=tuple(names), threshold=default_threshold(num))
    own, kept = names[0], made[names[0]][1]

    def keys() -> None:
        advertise(identities[own], context)
        for name in names:
            check_advert(adverts[name], identities[name].public_key, context)

    def shares() -> None:
        for name, pair in split_secrets(kept, context).items():
            seal(pair, kept, own, adverts[name], context)

    sealed = {
        name: seal(split_secrets(secrets, context)[own], secrets, name, adverts[own], context)
        for name, (_, secrets) in made.items()
    }
    with_model = context.with_model(bytes(32))
    pairs = list(split_secrets(kept, context).values())
    selves = {name: secrets.self_secret for name, (_, secrets) in made.items()}
    here = names[: context.threshold]
    lost = {name: made[name][1].mask_key for name in names if name not in here}
    total = words.copy()
    figures = {
        "keys": cpu_s(keys, repeats),
        "shares": cpu_s(shares, repeats),
        "unseal": cpu_s(lambda: [unseal(sealed[name], kept, adverts[name], own, context) for name in names], repeats),
        "masked": cpu_s(lambda: masked(words, kept, own, adverts, with_model), repeats),
        "join, of all": num * cpu_s(lambda: join([p.of_mask_key for p in pairs], context.threshold), repeats),
        "unmask": cpu_s(lambda: unmask(total, selves, {}, adverts, with_model), repeats),
        f"unmask, {len(lost)} lost": cpu_s(
            lambda: unmask(total, {name: selves[name] for name in here}, lost, adverts, with_model), repeats
        ),
    }
    print(f"{num:3} members: " + "; ".join(f"{what} {seconds:.3f}" for what, seconds in figures.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", type=int, default=45)
    parser.add_argument("--members", type=int, nargs="+", default=[3, 10, 30])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    change = np.random.default_rng(0).normal(0.0, 1e-3, arguments.mebibytes * 2**18).astype(np.float32)
    quantised = cpu_s(lambda: quantise(change, 10, 0.25), arguments.repeats)
    words, _ = quantise(change, 10, 0.25)
    mask = cpu_s(lambda: add_mask(words, bytes(32), 1), arguments.repeats)
    print(
        f"{arguments.mebibytes} MiB, CPU-seconds: integers {quantised:.3f}; one peer's mask {mask:.3f} (goal {GOAL_S})"
    )
    for num in arguments.members:
        of_members(num, words, arguments.repeats)


if __name__ == "__main__":
    main()

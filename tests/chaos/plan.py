"""Which faults a campaign brings, in which phase of which round: all of it follows from one seed.

Kinds and phases come from shuffled decks, so that ten runs of five faults bring each of them about equally often.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

PHASES = ("wait", "send", "train", "receive", "aggregate", "checkpoint", "evaluate", "log", "finish")
FINISH = "finish"

# kind -> what it does.  `server` faults lose no client's state; in `client` faults a reply may get lost.
SERVER_KINDS = {
    "kill server machine": "kill -9 of flower-server and of all it started, as a power cut does",
    "kill flower-server": "kill -9 of flower-server alone",
    "kill SuperLink": "kill -9 of Flower's SuperLink alone",
    "kill ServerApp": "kill -9 of the ServerApp alone",
    "freeze SuperLink": "SIGSTOP, some seconds later SIGCONT",
    "freeze ServerApp": "SIGSTOP, some seconds later SIGCONT or kill -9",
    "full disk, server": "no room for checkpoints and records, for some seconds",
    "corrupt state": "power cut of the server, and a bit of state.json flipped, or the file cut short",
    "corrupt model": "power cut of the server, and a bit of the newest safetensors file flipped, or the file cut short",
}
TRACKING_KINDS = {
    "kill MLflow": "kill -9 of the tracking server, started again some seconds later",
    "freeze MLflow": "SIGSTOP, some seconds later SIGCONT",
}
NETWORK_KINDS = {
    "network reset": "all connections between clients and server end with RST, and new ones too, for some seconds",
    "network silence": "nothing arrives at either side, for some seconds",
}
CLIENT_KINDS = {
    "kill client machine": "kill -9 of flower-client and of all it started",
    "kill flower-client": "kill -9 of flower-client alone",
    "kill trainer": "kill -9 of a client's trainer",
    "kill SuperNode": "kill -9 of a client's SuperNode",
    "freeze trainer": "SIGSTOP, some seconds later SIGCONT or kill -9",
    "full disk, client": "no room for private state and ledger, for some seconds",
    "corrupt private state": "power cut of a client, and a bit of its newest private state flipped, or the file cut",
}
DISK_KINDS = ("full disk, server", "full disk, client")
LOSING_KINDS = ("corrupt private state",)  # what a client's head learned is gone; the model is another one
KINDS = {**SERVER_KINDS, **TRACKING_KINDS, **NETWORK_KINDS, **CLIENT_KINDS}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault.  `fraction` places it within its phase, `choice` in [0, 1) decides what else there is to decide."""

    run: int
    number: int  # within the run
    kind: str
    phase: str
    server_round: int  # the first in which it may come
    fraction: float  # in [0, 1)
    choice: float  # in [0, 1): which client, which bit, killed or thawed
    seconds: float  # of what lasts


def plan(
    seed: int, run: int, *, faults: int = 5, rounds: int = 20, kinds: Sequence[str] = tuple(KINDS)
) -> tuple[Fault, ...]:
    """The faults of the run with that number, in the order in which they come; those of the end last."""
    first = run * faults
    drawn = [(_card(seed, "kinds", kinds, n), _card(seed, "phases", PHASES, n)) for n in range(first, first + faults)]
    drawn.sort(key=lambda fault: fault[1] == FINISH)
    chance = random.Random(f"{seed} run {run}")
    made = []
    for number, (kind, phase) in enumerate(drawn):
        low, high = 2 + (rounds - 2) * number // faults, 1 + (rounds - 2) * (number + 1) // faults
        made.append(
            Fault(
                run=run,
                number=number,
                kind=kind,
                phase=phase,
                server_round=rounds if phase == FINISH else chance.randint(low, max(low, high)),
                fraction=chance.random(),
                choice=chance.random(),
                seconds=round(chance.uniform(1.0, 8.0), 1),
            )
        )
    return tuple(made)


def _card(seed: int, name: str, cards: Sequence[str], number: int) -> str:
    """The card of that number from one shuffled deck after the other."""
    deck, place = divmod(number, len(cards))
    shuffled = list(cards)
    random.Random(f"{seed} {name} {deck}").shuffle(shuffled)
    return shuffled[place]

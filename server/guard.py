"""Checks of what clients send before it touches the run; each refusal says what was wrong."""

import math
from collections.abc import Mapping

import numpy as np
from flwr.app import Message

from common import wire
from common.codec import decode, largest_magnitude
from common.errors import ReplyRefused
from common.parameters import Manifest
from common.settings import CLIENT_NAME
from common.wire import TRAIN_FIELDS, Reply, Site, SplitSums
from server.scores import INTEGER_SUMS

LARGEST_CHANGE = 1e30  # weighted by up to 1e8 pictures and added, the sum is still finite in float32 (3.4e38)
LARGEST_SUM = 2.0**53  # whole numbers up to here are exact in float64


def read_site(message: Message) -> Site:
    """`wire.read_site`, with a name that can be shown and kept.  Raises ReplyRefused."""
    site = wire.read_site(message)
    if not CLIENT_NAME.fullmatch(site.name):
        raise ReplyRefused(
            f"the name {site.name!r} cannot be used; give --name of 1 to 64 letters, digits, spaces, '.', '_' or '-'"
        )
    return site


def check_train_reply(reply: Reply, *, server_round: int, manifest: Manifest, site: Site, codec: str) -> None:
    """Raises ReplyRefused with the reason unless the reply is whole, finite and of this round, model and codec."""
    _check_origin(reply, server_round, manifest)
    _check_num_examples(reply.num_examples, site)
    _check_change(reply, manifest, codec)
    missing = [name for name in TRAIN_FIELDS if name not in reply.train]
    if missing:
        raise ReplyRefused(f"the reply lacks the training sum {missing[0]}")
    _check_sums(reply.train)
    _check_evaluations(reply, site)


def check_evaluation_reply(reply: Reply, *, server_round: int, manifest: Manifest, site: Site) -> None:
    """Raises ReplyRefused with the reason unless the sums are finite and of this round's model."""
    _check_origin(reply, server_round, manifest)
    _check_evaluations(reply, site)


def _check_origin(reply: Reply, server_round: int, manifest: Manifest) -> None:
    if reply.server_round != server_round:
        raise ReplyRefused(f"the reply is of round {reply.server_round}, not of round {server_round}")
    if reply.manifest != manifest.digest:
        raise ReplyRefused("the reply's names or shapes are not the model's (manifest digests differ)")


def _check_num_examples(num_examples: object, site: Site) -> None:
    if isinstance(num_examples, bool) or not isinstance(num_examples, int) or num_examples <= 0:
        raise ReplyRefused(f"num-examples is {num_examples!r}; it must be a positive whole number")
    if num_examples > site.num_training_pictures:
        raise ReplyRefused(f"num-examples is {num_examples}; the client joined with {site.num_training_pictures}")


def _check_change(reply: Reply, manifest: Manifest, codec: str) -> None:
    change = reply.change
    if change is None:
        raise ReplyRefused("the reply holds no change of the model")
    if change.codec != codec or change.size != manifest.size:
        raise ReplyRefused(
            f"the change is {change.codec} of {change.size} numbers; {codec} of {manifest.size} were asked for"
        )
    if largest_magnitude(change) <= LARGEST_CHANGE:  # False for NaN too
        return
    values = decode(change)
    usable = np.abs(values) <= LARGEST_CHANGE
    if usable.all():  # large scales of small codes
        return
    position = int(np.argmin(usable))
    name = next(e.name for e in manifest.entries if e.offset <= position < e.offset + e.size)
    raise ReplyRefused(f"the change holds {values[position]} in {name}")


def _check_sums(sums: Mapping[str, object], prefix: str = "") -> None:
    for name, value in sums.items():
        kinds = int if name in INTEGER_SUMS and prefix else int | float
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ReplyRefused(f"{prefix}{name} is {value!r}; it must be a number")
        if not (math.isfinite(value) and 0 <= value < LARGEST_SUM):
            raise ReplyRefused(f"{prefix}{name} is {value}; sums are finite and not negative")


def _check_evaluations(reply: Reply, site: Site) -> None:
    for split, sums in reply.evaluations.items():
        _check_sums(sums.closed, f"{split}-")
        _check_closed(split, sums)
        # Every pair of the client's pictures once, at most; more could overflow the clients' sum.
        most = site.num_pictures * (site.num_pictures - 1) // 2
        if float(sums.pairs.sum(dtype=np.float64)) > most:
            raise ReplyRefused(f"the {split} histogram counts more pairs than {site.num_pictures} pictures have")
        if bool((sums.twins > sums.pairs).any()):
            raise ReplyRefused(f"the {split} histogram counts more pairs of twins than pairs")
        if float(sums.folds.sum(dtype=np.float64)) > most:
            raise ReplyRefused(f"the {split} folds count more pairs than {site.num_pictures} pictures have")
        if float(sums.confusion.sum(dtype=np.float64)) > site.num_pictures:
            raise ReplyRefused(f"the {split} confusion counts more than {site.num_pictures} pictures")


def _check_closed(split: str, sums: SplitSums) -> None:
    closed = sums.closed
    bounds = {"correct": "num_examples"} | dict.fromkeys(("precision_sum", "recall_sum", "f1_sum"), "num_classes")
    for name, bound in bounds.items():
        if closed[name] > closed[bound] * (1 + 1e-9):
            raise ReplyRefused(f"{split}-{name} is {closed[name]}, more than {split}-{bound}, {closed[bound]}")
    if closed["num_examples"] > 0 and closed["num_classes"] == 0:
        raise ReplyRefused(f"{split}-num_classes is 0 for {closed['num_examples']} pictures")

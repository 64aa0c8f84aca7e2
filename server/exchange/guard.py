"""Checks of what clients send before it touches the run; each refusal says what was wrong."""

import math
import re
from collections.abc import Mapping

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from common.cuts import CUTS
from common.errors import ReplyRefused
from common.metrics.groups import GroupPairs
from common.metrics.sums import WHOLE_NUMBERS, ClosedSetSums
from common.names import CLIENT_NAME, NAME_RULE
from common.protocol import wire
from common.protocol.codec import MASKED, Coded, decode, has_negative_scale, largest_magnitude
from common.protocol.parameters import Manifest
from common.protocol.wire import OF_CONTENT, TRAIN_FIELDS, Reply, Site
from common.settings import PRECISIONS

# Its square, a strategy's second moment, and its sum over 1e9 pictures of 1e6 clients are finite in float32 (3.4e38).
LARGEST_CHANGE = 1e15
MOST_COUNTED = 10**9  # pictures, people or cores of one client
MOST_PAIRS = 10**18  # of so many pictures, of validation and of test
PAIRS_OF_SITE = ("num_pairs", "num_scored_pairs")
NOISE_ROOM = 1.01  # times verification.max_pairs
LONGEST_TEXT = 128  # of what a client tells of itself
MEMORY_FORMATS = ("contiguous", "channels_last")
# As the guard and common.errors.TrainingFailed say it.
NO_NUMBERS = re.compile(r"\b(nan|inf)\b|\bnot (all )?finite\b|^the change holds ", re.IGNORECASE)
LARGEST_SUM = 2.0**53  # whole numbers up to here are exact in float64


def read_site(message: Message) -> Site:
    """`wire.read_site`, with texts that can be shown and kept, and possible counts.  Raises ReplyRefused."""
    site = wire.read_site(message)
    if not CLIENT_NAME.fullmatch(site.name):
        raise ReplyRefused(f"the name {site.name!r} cannot be used; give --name of {NAME_RULE}")
    _check_site_texts(site)
    _check_site_counts(site)
    return site


def _check_site_texts(site: Site) -> None:
    for name, value in vars(site).items():
        if isinstance(value, str) and not (len(value) <= LONGEST_TEXT and value.isprintable()):
            raise ReplyRefused(f"the answer to join is malformed: {name} is {value[:LONGEST_TEXT]!r}")
    for name, choices in (("precision", PRECISIONS), ("memory_format", MEMORY_FORMATS), ("cut", ("", *CUTS))):
        # Clients of one machine compute alike, so these words are sent to others too, and models' cards say the cut.
        if getattr(site, name) not in choices:
            raise ReplyRefused(
                f"the answer to join is malformed: {name} is {getattr(site, name)!r}, none of {', '.join(choices)}"
            )


def _check_site_counts(site: Site) -> None:
    for name, value in vars(site).items():
        most = MOST_PAIRS if name in PAIRS_OF_SITE else MOST_COUNTED
        if isinstance(value, int) and value > most:
            raise ReplyRefused(f"the answer to join is malformed: {name} is {value}, more than {most}")
    parts = {"num_training_pictures": "num_pictures", "num_training_people": "num_people"}
    for part, whole in (parts | {"num_scored_pairs": "num_pairs"}).items():
        if getattr(site, part) > getattr(site, whole):
            raise ReplyRefused(
                f"the answer to join is malformed: {part} is {getattr(site, part)}, more than {whole},"
                f" {getattr(site, whole)}"
            )


def blames_the_model(reason: str) -> bool:
    """Whether a client left out for this reason says, or shows, that numbers came of the model that are none."""
    return NO_NUMBERS.search(reason) is not None


def check_sender(message: Message, node_id: int) -> None:
    """Raises ReplyRefused unless a reply says that it is of the node that was asked: a site answers for itself only."""
    if message.metadata.src_node_id != node_id:
        raise ReplyRefused("the reply is of another node than the one that was asked")


def check_train_reply(
    reply: Reply,
    *,
    server_round: int,
    manifest: Manifest,
    site: Site,
    codec: str,
    changes: Manifest | None = None,
    max_pairs: int | str = "all",
    is_private: bool = False,
) -> None:
    """Raises ReplyRefused with the reason unless the reply is whole, finite and of this round, model and codec.

    changes: of what a change holds; None: all of the model.  max_pairs: verification.max_pairs, by which every client
    scores.  is_private: privacy.unit is not "off".
    """
    _check_origin(reply, server_round, manifest)
    _check_num_examples(reply.num_examples, site)
    _check_change(reply, changes or manifest, codec)
    wanted = [name for name in TRAIN_FIELDS if not (is_private and name in OF_CONTENT)]
    missing = [name for name in wanted if name not in reply.train]
    if missing:
        raise ReplyRefused(f"the reply lacks the training sum {missing[0]}")
    if len(reply.train) > len(wanted):
        raise ReplyRefused("the reply holds sums that no reply with differential privacy has")
    _check_sums(reply.train)
    _check_evaluations(reply, site, max_pairs)


def check_evaluation_reply(
    reply: Reply,
    *,
    server_round: int,
    manifest: Manifest,
    site: Site,
    max_pairs: int | str = "all",
    num_groups: int = 0,
) -> None:
    """Raises ReplyRefused with the reason unless the sums are finite and of this round's model.

    num_groups: of people, that were asked for.
    """
    _check_origin(reply, server_round, manifest)
    _check_groups(reply.groups, num_groups, site)
    if reply.change is not None or reply.train:
        raise ReplyRefused("the reply holds results of training, and an evaluation was asked for")
    _check_evaluations(reply, site, max_pairs)


def _check_groups(groups: NDArray[np.int64] | None, num_groups: int, site: Site) -> None:
    if (0 if groups is None else len(groups)) != num_groups:
        raise ReplyRefused(f"the reply holds {0 if groups is None else len(groups)} groups, not {num_groups}")
    for row in () if groups is None else groups:
        pairs = GroupPairs.of_row(row)
        number, total = pairs.num_people, float(pairs.histogram.sum(dtype=np.float64))
        if (
            pairs.num_sites not in (0, 1)
            or number > site.num_people
            or pairs.num_people_pairs != number * (number - 1) // 2
            or total > site.num_pictures * (site.num_pictures - 1) // 2
            or (not pairs.num_sites and row.any())
        ):
            raise ReplyRefused("the reply's groups hold counts that no people of the client's give")


def check_masked_reply(
    reply: Reply, *, server_round: int, manifest: Manifest, site: Site, size: int, kind: str
) -> None:
    """Raises ReplyRefused unless a reply is of this round and model, and holds so many masked words and no sums.

    What the words are nobody can see.  kind: of the task.
    """
    _check_origin(reply, server_round, manifest)
    _check_num_examples(reply.num_examples, site)
    change = reply.change
    if change is None or change.codec != MASKED or change.size != size:
        seen = "none" if change is None else f"{change.codec} of {change.size} numbers"
        raise ReplyRefused(f"the reply's words are {seen}; {MASKED} of {size} were asked for")
    wanted = {name for name in TRAIN_FIELDS if name not in OF_CONTENT} if kind == "train" else set()
    if reply.train.keys() != wanted:
        odd = min(reply.train.keys() ^ wanted)
        raise ReplyRefused(f"the reply {'holds' if odd in reply.train else 'lacks'} the training sum {odd}")
    _check_sums(reply.train)


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
    if not largest_magnitude(change) <= LARGEST_CHANGE:  # NaN too
        _check_each(change, manifest)
    if has_negative_scale(change):
        raise ReplyRefused("the change holds a negative scale, which no encoder writes")


def _check_each(change: Coded, manifest: Manifest) -> None:
    """Raises ReplyRefused naming the tensor of the first unusable number; a large int8 scale may have small codes."""
    values = decode(change)
    usable = np.abs(values) <= LARGEST_CHANGE
    if usable.all():
        return
    position = int(np.argmin(usable))
    name = next(e.name for e in manifest.entries if e.offset <= position < e.offset + e.size)
    raise ReplyRefused(f"the change holds {values[position]} in {name}")


def _check_sums(sums: Mapping[str, object], prefix: str = "") -> None:
    for name, value in sums.items():
        kinds = int if name in WHOLE_NUMBERS and prefix else int | float
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise ReplyRefused(f"{prefix}{name} is {value!r}; it must be a number")
        if not (math.isfinite(value) and 0 <= value < LARGEST_SUM):
            raise ReplyRefused(f"{prefix}{name} is {value}; sums are finite and not negative")


def _check_evaluations(reply: Reply, site: Site, max_pairs: int | str) -> None:
    for split, sums in reply.evaluations.items():
        _check_sums(sums.numbers(), f"{split}-")
        _check_closed(split, sums.closed)
        for name, most in (("num_examples", site.num_pictures), ("num_classes", site.num_training_people)):
            if getattr(sums.closed, name) > most:
                raise ReplyRefused(f"{split}-{name} is {getattr(sums.closed, name)}; the client joined with {most}")
        # Every pair of the client's pictures once, at most; more could overflow the clients' sum.
        most = site.num_pictures * (site.num_pictures - 1) // 2
        if float(sums.pairs.sum(dtype=np.float64)) > most:
            raise ReplyRefused(f"the {split} histogram counts more pairs than {site.num_pictures} pictures have")
        # A site whose policy adds noise to its counts may be a little above.
        if isinstance(max_pairs, int) and float(sums.pairs.sum(dtype=np.float64)) > max_pairs * NOISE_ROOM:
            raise ReplyRefused(f"the {split} histogram counts more pairs than verification.max_pairs, {max_pairs}")
        if bool((sums.twins > sums.pairs).any()):
            raise ReplyRefused(f"the {split} histogram counts more pairs of twins than pairs")
        if float(sums.folds.sum(dtype=np.float64)) > most:
            raise ReplyRefused(f"the {split} folds count more pairs than {site.num_pictures} pictures have")
        if sums.confusion is not None and float(sums.confusion.sum(dtype=np.float64)) > site.num_pictures:
            raise ReplyRefused(f"the {split} confusion counts more than {site.num_pictures} pictures")


def _check_closed(split: str, sums: ClosedSetSums) -> None:
    closed = vars(sums)
    bounds = {"correct": "num_examples"} | dict.fromkeys(("precision_sum", "recall_sum", "f1_sum"), "num_classes")
    for name, bound in bounds.items():
        if closed[name] > closed[bound] * (1 + 1e-9):
            raise ReplyRefused(f"{split}-{name} is {closed[name]}, more than {split}-{bound}, {closed[bound]}")
    if closed["num_examples"] > 0 and closed["num_classes"] == 0:
        raise ReplyRefused(f"{split}-num_classes is 0 for {closed['num_examples']} pictures")

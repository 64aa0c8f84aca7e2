"""Checks of a client's reply before it touches the model; each refusal says what was wrong."""

import numpy as np

from common.errors import ReplyRefused
from common.parameters import Manifest
from common.wire import Reply, Site


def check_train_reply(reply: Reply, *, server_round: int, manifest: Manifest, site: Site) -> None:
    """Raises ReplyRefused with the reason unless the reply is whole, finite and of this round and model."""
    if reply.server_round != server_round:
        raise ReplyRefused(f"the reply is of round {reply.server_round}, not of round {server_round}")
    if reply.manifest != manifest.digest:
        raise ReplyRefused("the reply's names or shapes are not the model's (manifest digests differ)")
    _check_num_examples(reply.num_examples, site)
    _check_change(reply, manifest)
    _check_sums(reply)


def _check_num_examples(num_examples: object, site: Site) -> None:
    if isinstance(num_examples, bool) or not isinstance(num_examples, int) or num_examples <= 0:
        raise ReplyRefused(f"num-examples is {num_examples!r}; it must be a positive whole number")
    if num_examples > site.num_training_pictures:
        raise ReplyRefused(f"num-examples is {num_examples}; the client joined with {site.num_training_pictures}")


def _check_change(reply: Reply, manifest: Manifest) -> None:
    change = reply.change
    if change is None:
        raise ReplyRefused("the reply holds no change of the model")
    if change.dtype != np.float32 or change.shape != (manifest.size,):
        raise ReplyRefused(f"the change is {change.dtype} {change.shape}, the model float32 ({manifest.size},)")
    if not np.isfinite(change).all():
        position = int(np.flatnonzero(~np.isfinite(change))[0])
        name = next(e.name for e in manifest.entries if e.offset <= position < e.offset + e.size)
        raise ReplyRefused(f"the change holds {change[position]} in {name}")


def _check_sums(reply: Reply) -> None:
    values = dict(reply.train)
    for split, sums in reply.evaluations.items():
        values |= {f"{split}-{name}": float(value) for name, value in sums.closed.items()}
    for name, value in values.items():
        if not np.isfinite(value) or value < 0.0:
            raise ReplyRefused(f"{name} is {value}; sums are finite and not negative")


def check_evaluation_reply(reply: Reply, *, server_round: int, manifest: Manifest) -> None:
    """Raises ReplyRefused with the reason unless the sums are finite and of this round's model."""
    if reply.server_round != server_round or reply.manifest != manifest.digest:
        raise ReplyRefused(
            f"the reply is of round {reply.server_round} or of another model, not of round {server_round}"
        )
    _check_sums(reply)

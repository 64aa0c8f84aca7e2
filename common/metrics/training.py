"""Training figures from the sums that a client sends: the same for one client and for several, added."""

from collections.abc import Mapping


def train_metrics(train: Mapping[str, float]) -> dict[str, float]:
    """train_loss, train_acc, gradient_norm, images_per_second from a reply's (or merged) training sums.

    The warm-up of new heads has figures of its own, where there was one.
    """
    pictures, steps = max(train["num_pictures"], 1.0), max(train["num_steps"], 1.0)
    warmup = {name: train[name] for name in ("num_warmup_pictures", "warmup_seconds")}
    figures = {
        "train_loss": train["loss_sum"] / pictures,
        "train_acc": train["correct"] / pictures,
        "gradient_norm": train["gradient_norm_sum"] / steps,
        "images_per_second": train["num_pictures"] / max(train["seconds"], 1e-9),
        "receive_seconds": train["receive_seconds"],
        "evaluate_seconds": train["evaluate_seconds"],
        "train_seconds": train["seconds"],
        "send_seconds": train["send_seconds"],
    }
    # Told where it happened: a device had no room for whole batches.
    figures |= {"num_halvings": train["num_halvings"]} if train["num_halvings"] > 0 else {}
    return figures | warmup if train["num_warmup_pictures"] > 0 else figures


def own_seconds(train: Mapping[str, float]) -> float:
    """How long a client worked on a training task by its own clock, in all its phases."""
    return sum(value for name, value in train.items() if name == "seconds" or name.endswith("_seconds"))

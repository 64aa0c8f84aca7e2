"""What each figure is called in a record: once for all kinds of runs, in groups, the guides' names beside ours.

One figure has one name in local, centralised, federated and nested runs, so that their curves share a chart:
`train_loss`, `val_roc_auc`.  `test_roc_auc` is of the model that was chosen, `round_test_roc_auc` a federation's curve
on test, by which nothing is chosen.  MLflow's pages fold names at their slashes: `time/`, `bytes/`, `client/NAME/`.
"""

import re
from collections.abc import Mapping
from typing import Final

BYTES_DOWN: Final = "bytes/down"
BYTES_UP: Final = "bytes/up"
ROUND_SECONDS: Final = "time/round_seconds"
EPOCH_SECONDS: Final = "time/epoch_seconds"
WORK_SECONDS: Final = "time/work_seconds"  # of all clients together
_OF_SPLIT: Final = {"val": "val_", "test": "round_test_", "public": "public/"}

# By a run's mode, our names -> those of the guides that teams came with; each is recorded under both.
_ALONE: Final = {"train_accuracy": "train_acc", "val_accuracy": "val_acc"}
_GUIDES: Final[Mapping[str, Mapping[str, str]]] = {
    "local": _ALONE,
    "centralized": _ALONE,
    "twins": _ALONE,
    "federated": {
        "train_loss": "round_train_loss",
        "train_accuracy": "round_train_acc",
        "round_test_accuracy": "round_test_acc",
    },
}
_GUIDES_CLIENT: Final = re.compile(r"client/([^/]+)/(test_accuracy)")


def seconds_of(phase: str) -> str:
    """The seconds of a part of a round: "time/wait_seconds"."""
    return f"time/{phase}_seconds"


def of_split(split: str, figure: str) -> str:
    """A figure of a model as it is trained, at each of its steps.  split: val, test or public."""
    return f"{_OF_SPLIT[split]}{figure}"


def of_client(client: str, metric: str) -> str:
    """A client's figure in the run of all clients: "client/celeba/test_roc_auc"."""
    return f"client/{client}/{metric}"


def of_model(model: str, metric: str) -> str:
    """A model's figure in the run that compares several: "fedavg/test_roc_auc"."""
    return f"{model}/{metric}"


def decile(metric: str, percent: int) -> str:
    """A decile over many clients: "deciles/train_loss_p50"."""
    return f"deciles/{metric}_p{percent}"


def beside(mode: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """The same values under the guides' names, as far as they name them.  mode: of the run, not of a nested one."""
    theirs = _GUIDES.get(mode, {})
    found = {theirs[name]: value for name, value in metrics.items() if name in theirs}
    if theirs:
        parts = ((_GUIDES_CLIENT.fullmatch(name), value) for name, value in metrics.items())
        found |= {f"{part[1]}_{part[2]}": value for part, value in parts if part}
    return found


# -- runs that were begun before ---------------------------------------------------------------------------------------


_LONG: Final = {"auc": "roc_auc", "acc": "accuracy"}
_FORMER: Final = re.compile(r"round_(val|test)_(twins_|strangers_|)(auc|acc|eer|loss)(_median|)")
_OTHERS: Final = {
    "round_train_loss": "train_loss",
    "round_train_acc": "train_accuracy",
    "train_acc": "train_accuracy",
    "val_acc": "val_accuracy",
    "bytes_down": BYTES_DOWN,
    "bytes_up": BYTES_UP,
    "round_work_seconds": WORK_SECONDS,
    "round_public_accuracy": "public/ten_fold_accuracy",
    "round_public_auc": "public/roc_auc",
    "round_public_eer": "public/eer",
}


def _present(name: str, *, of_client_row: bool) -> str:
    if found := _FORMER.fullmatch(name):
        split, kind, figure, end = found.groups()
        return of_split(split, f"{kind}{_LONG.get(figure, figure)}{end}")
    if of_client_row and name.startswith("test_"):
        return of_split("test", name.removeprefix("test_"))
    if re.fullmatch(r"[a-z]+_seconds", name) and name not in _OTHERS:
        return f"time/{name}"
    if name.startswith("gradient_norm_"):
        return name.replace("_norm_", "_norm/", 1)
    return _OTHERS.get(name, name)


def present(row: Mapping[str, float], *, of_client_row: bool = False) -> dict[str, float]:
    """A row of figures that a checkpoint keeps, by the names they have now: a run may have begun under earlier ones.

    of_client_row: of one client of a federation.
    """
    return {_present(name, of_client_row=of_client_row): value for name, value in row.items()}

"""The one value of an evaluation's sums: what it holds is what merges, travels and is kept, a new sum too."""

import dataclasses

import numpy as np
import pytest
from flwr.app import Message
from numpy.typing import NDArray

from common.metrics import sums as module
from common.metrics.sums import COUNTS, ClosedSetSums, EvaluationSums, pooled
from common.protocol import wire
from server.record import history
from server.record.history import RoundRecord, read_scores, write_scores
from tests.tiny_federation import reply_to, sums_with

TASK = wire.Task(kind="evaluate", run_id="run", server_round=1, settings="{}", manifest="", splits="val")
CLOSED = ClosedSetSums(
    num_examples=7, correct=3, loss_sum=0.1 + 0.2, num_classes=2, precision_sum=1 / 3, recall_sum=0.5, f1_sum=0.4
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WithAges(EvaluationSums):
    """A toy sum more: pictures by age."""

    ages: NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.zeros((3, 5), dtype=np.int64))


def same(one: EvaluationSums, other: EvaluationSums) -> bool:
    arrays = one.arrays(), other.arrays()
    return (
        one.numbers() == other.numbers()
        and list(arrays[0]) == list(arrays[1])
        and all(np.array_equal(arrays[0][name], arrays[1][name]) for name in arrays[0])
    )


def test_the_parts_are_the_whole() -> None:
    whole = dataclasses.replace(sums_with(0.6), closed=CLOSED)
    assert same(EvaluationSums.from_parts(whole.numbers(), whole.arrays()), whole)
    assert list(whole.arrays()) == list(COUNTS)
    total = pooled({"a": whole, "b": whole})
    assert "confusion" not in total.arrays(), "their people differ"
    assert same(EvaluationSums.from_parts(total.numbers(), total.arrays()), total)
    assert (total.pairs == 2 * whole.pairs).all()
    assert total.closed.loss_sum == 2 * CLOSED.loss_sum


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("pairs", np.zeros((2, 5), dtype=np.int64)),
        ("folds", -np.ones(COUNTS["folds"], dtype=np.int64)),
        ("twins", np.zeros(COUNTS["twins"])),
        ("confusion", np.zeros((2, 3), dtype=np.int64)),
    ],
)
def test_parts_of_another_shape_or_kind_are_refused(name: str, bad: NDArray[np.int64]) -> None:
    whole = sums_with(0.6)
    with pytest.raises(ValueError, match=name):
        EvaluationSums.from_parts(whole.numbers(), whole.arrays() | {name: bad})


@pytest.mark.usefixtures("in_a_run")
def test_a_sum_more_merges_travels_and_is_kept(monkeypatch, tmp_path) -> None:
    """It is a field with its shape; neither the wire nor the checkpoint names it."""
    plain = sums_with(0.6).arrays()
    first, rest = {"pairs": COUNTS["pairs"]}, {name: shape for name, shape in COUNTS.items() if name != "pairs"}
    counts = first | {"ages": (3, 5)} | rest
    for holder in (module, wire, history):
        monkeypatch.setattr(holder, "COUNTS", counts)
        monkeypatch.setattr(holder, "EvaluationSums", WithAges)
    ages = np.arange(15).reshape(3, 5)
    own = WithAges(closed=CLOSED, **plain, ages=ages)
    assert ((own + own).ages == 2 * ages).all()
    reply = dataclasses.replace(reply_to(TASK), evaluations={"val": own})
    came = wire.read_reply(Message(wire.reply_content(reply), 7, "evaluate"), "val").evaluations["val"]
    assert same(came, own)
    write_scores(tmp_path / "scores", RoundRecord(1, totals={"val": own + own}, sums={"val": {"alpha": own}}))
    read_scores(tmp_path / "scores", found := RoundRecord(1))
    assert same(found.totals["val"], own + own)
    assert same(found.sums["val"]["alpha"], own)


def test_several_clients_sums_do_not_travel() -> None:
    reply = dataclasses.replace(reply_to(TASK), evaluations={"val": pooled({"a": sums_with(0.6), "b": sums_with(0.6)})})
    with pytest.raises(ValueError, match="only one client's own evaluation travels"):
        wire.reply_content(reply)

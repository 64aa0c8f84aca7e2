"""A step that sees some of the head's people: who they are, what it changes, and that nothing else is touched."""

import dataclasses

import pytest
import torch
from packs_in_memory import CPU, MODEL, SIDE, memory_pack, recogniser_for

from common.errors import TrainingFailed
from common.faces.batches import Batch
from common.models.table import HEADS
from common.settings import TrainingSettings
from common.training.optimiser import make_optimiser
from common.training.sampled_head import HeadSample
from common.training.step import Stepper

pytestmark = pytest.mark.usefixtures("one_thread")
PEOPLE = 40
TRAINING = TrainingSettings(batch_size=4, lr=0.1)


def a_batch(seed=1):
    stream = torch.Generator().manual_seed(seed)
    return Batch(torch.rand(4, 3, SIDE, SIDE, generator=stream) * 2 - 1, torch.tensor([3, 17, 3, 39]), None)


def stepper_for(fraction, *, head="cosface", optimiser="sgd"):
    training = dataclasses.replace(TRAINING, optimiser=optimiser)
    recogniser = recogniser_for(memory_pack(2, people=PEOPLE), dataclasses.replace(MODEL, head=head)).train()
    sample = None if fraction is None else HeadSample(fraction=fraction, stream=torch.Generator().manual_seed(7))
    return Stepper(
        recogniser=recogniser,
        optimiser=make_optimiser(recogniser, training),
        training=training,
        compute=CPU,
        sample=sample,
    )


def test_the_rows_are_those_of_the_batch_and_a_drawn_part_of_the_others():
    sample = HeadSample(fraction=0.25, stream=torch.Generator().manual_seed(7))
    first, second = (sample.rows(a_batch().labels, PEOPLE) for _ in range(2))
    for rows in (first, second):
        assert len(rows) == 10
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert {3, 17, 39} <= set(rows.tolist())
    assert first.tolist() != second.tolist()
    assert sample.rows(torch.arange(PEOPLE), PEOPLE).tolist() == list(range(PEOPLE))


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
@pytest.mark.parametrize("head", HEADS)
def test_a_step_changes_the_rows_it_sees_and_the_state_of_no_other(head, optimiser):
    stepper = stepper_for(0.25, head=head, optimiser=optimiser)
    parameters = list(stepper.recogniser.head.parameters())
    expected = HeadSample(fraction=0.25, stream=torch.Generator().manual_seed(7))
    for number in range(2):
        before = [parameter.detach().clone() for parameter in parameters]
        rows = expected.rows(a_batch().labels, PEOPLE)
        stepper.step(a_batch(number), where="here")
        for parameter, old in zip(parameters, before, strict=True):
            assert parameter.shape == old.shape
            changed = (parameter != old).reshape(PEOPLE, -1).any(1).nonzero().flatten()
            assert changed.tolist() == rows.tolist()
    seen = {len(v) for p in parameters for v in stepper.optimiser.state[p].values() if v.ndim}
    assert seen == {PEOPLE}


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_a_sample_of_everybody_is_the_step_itself_bit_for_bit(optimiser):
    """Fraction 1 sees all rows in their order, through the same code."""
    sampled, whole = stepper_for(1.0, optimiser=optimiser), stepper_for(None, optimiser=optimiser)
    for number in range(3):
        assert sampled.step(a_batch(number), where="x") == whole.step(a_batch(number), where="x")
    others = whole.recogniser.state_dict()
    assert all(torch.equal(tensor, others[name]) for name, tensor in sampled.recogniser.state_dict().items())


def test_a_step_that_fails_leaves_the_head_whole():
    stepper = stepper_for(0.25)
    before = stepper.recogniser.head.weight.detach().clone()
    with torch.no_grad():
        stepper.recogniser.backbone.linear.weight[0, 0] = float("nan")
    with pytest.raises(TrainingFailed):
        stepper.step(a_batch(), where="here")
    assert torch.equal(stepper.recogniser.head.weight, before)

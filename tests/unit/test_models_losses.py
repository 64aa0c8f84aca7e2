"""The triplet loss against pytorch-metric-learning, and the learned weighting by hand."""

import math

import pytest
import torch
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import BatchHardMiner
from torch import nn

from common.models.heads import batch_hard_triplet, uncertainty_weighted


def embeddings(num: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(num, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("margin", [0.05, 0.3, 1.0])
def test_it_is_pytorch_metric_learnings_loss(margin: float) -> None:
    """Its miner leaves pictures without a positive out; its reducer must count zeros too, as eq. 5 does."""
    from pytorch_metric_learning.reducers import MeanReducer

    labels = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3])
    ours = batch_hard_triplet(embeddings(8), labels, margin)
    theirs = TripletMarginLoss(margin=margin, reducer=MeanReducer())
    expected = theirs(embeddings(8), labels, BatchHardMiner()(embeddings(8), labels))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert ours > 0


def test_by_hand() -> None:
    """On the unit circle at 0, 90 (the same person) and 180 degrees: distances sqrt(2), sqrt(2) and 2.

    Picture 0: 0.3 + sqrt(2) - 2 < 0, so 0.  Picture 1: 0.3 + sqrt(2) - sqrt(2) = 0.3.  Picture 2 has no positive.
    """
    points = torch.tensor([[1.0, 0.0], [0.0, 5.0], [-2.0, 0.0]])
    assert float(batch_hard_triplet(points, torch.tensor([0, 0, 1]), 0.3)) == pytest.approx(0.15, abs=1e-6)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [5, 5, 5, 5], [7]])
def test_a_batch_without_positives_or_without_negatives_contributes_nothing(labels: list[int]) -> None:
    given = embeddings(len(labels)).requires_grad_()
    loss = batch_hard_triplet(given, torch.tensor(labels), 0.3)
    assert loss.item() == 0.0
    loss.backward()
    assert torch.equal(given.grad, torch.zeros_like(given))


def test_pictures_that_coincide_have_a_finite_gradient() -> None:
    given = embeddings(1).repeat(4, 1).requires_grad_()
    batch_hard_triplet(given, torch.tensor([0, 0, 1, 1]), 0.3).backward()
    assert torch.isfinite(given.grad).all()


def test_the_weighting_is_the_papers_formula() -> None:
    """0.5 * (e^-0.5 * 2 + 0.5 + e^1 * 0.25 - 1)."""
    losses = {"sa": torch.tensor(2.0), "glca": torch.tensor(0.25)}
    weights = {"glca": torch.tensor(-1.0), "sa": torch.tensor(0.5), "pwca": torch.tensor(9.0)}
    expected = 0.5 * (math.exp(-0.5) * 2.0 + 0.5 + math.e * 0.25 - 1.0)
    assert float(uncertainty_weighted(losses, weights)) == pytest.approx(expected, rel=1e-6)


def test_the_weights_learn_the_logarithm_of_the_losses() -> None:
    losses = {"sa": torch.tensor(4.0), "glca": torch.tensor(0.5)}
    weights = nn.ParameterDict({name: nn.Parameter(torch.zeros(())) for name in losses})
    optimiser = torch.optim.SGD(weights.parameters(), lr=0.5)
    for _ in range(200):
        optimiser.zero_grad()
        uncertainty_weighted(losses, dict(weights.items())).backward()
        optimiser.step()
    assert {name: weight.item() for name, weight in weights.items()} == {
        "sa": pytest.approx(math.log(4.0), abs=1e-3),
        "glca": pytest.approx(math.log(0.5), abs=1e-3),
    }

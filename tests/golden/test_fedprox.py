"""FedProx's gradient against autograd of the paper's own objective (arXiv:1812.06127, eq. 2), in float64."""

import pytest
import torch
from torch import nn

from common.strategies import proximal

MU = 0.37


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(6, 5, generator=generator, dtype=torch.float64),
        torch.randint(0, 3, (6,), generator=generator),
    )


def loss_of(model, seed):
    pictures, labels = batch(seed)
    return nn.functional.cross_entropy(model(pictures), labels)


def gradients(model, objective, penalty=None):
    model.zero_grad(set_to_none=True)
    objective.backward()
    if penalty is not None:
        penalty()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def step(model, lr=0.5):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= lr * parameter.grad


def test_the_gradient_is_that_of_half_mu_times_the_squared_norm(model):
    """Three batches: autograd through loss + mu / 2 * sum ||w - w_global||^2 gives the same gradient each time."""
    received = [p.detach().clone() for p in model.parameters()]
    penalty = proximal(list(model.parameters()), MU)
    for seed in range(3):
        distance = sum(((p - g) ** 2).sum() for p, g in zip(model.parameters(), received, strict=True))
        wanted = gradients(model, loss_of(model, seed) + MU / 2 * distance)
        seen = gradients(model, loss_of(model, seed), penalty)
        torch.testing.assert_close(seen, wanted, rtol=1e-12, atol=1e-14)
        step(model)


def test_it_is_zero_on_the_first_batch_and_not_on_the_second(model):
    """A reference that is used up after one batch, as a generator of parameters is, fails here."""
    penalty = proximal(list(model.parameters()), MU)
    for seed, is_zero in ((0, True), (1, False), (2, False)):
        term = gradients(model, loss_of(model, seed), penalty) - gradients(model, loss_of(model, seed))
        assert bool((term == 0).all()) == is_zero
        gradients(model, loss_of(model, seed), penalty)
        step(model)


def test_by_hand():
    """w_global = (1, 2), w = (3, -1), mu = 0.5: the term's gradient is 0.5 * (2, -3) = (1, -1.5).

    The norm instead of its square would give mu * (2, -3) / (2 * sqrt(13)) = (0.14, -0.21).
    """
    weight = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    penalty = proximal([weight], 0.5)
    with torch.no_grad():
        weight.copy_(torch.tensor([3.0, -1.0]))
    weight.grad = torch.zeros_like(weight)
    penalty()
    assert weight.grad.tolist() == [1.0, -1.5]


def test_the_reference_is_a_copy_and_the_head_is_not_pulled(model):
    shared = list(model[0].parameters())
    penalty = proximal(shared, MU)
    gradients(model, loss_of(model, 0))
    step(model)
    plain = gradients(model, loss_of(model, 1))
    pulled = gradients(model, loss_of(model, 1), penalty)
    num_shared = sum(p.numel() for p in shared)
    assert (plain[:num_shared] != pulled[:num_shared]).any()
    assert torch.equal(plain[num_shared:], pulled[num_shared:])

"""Whose a unit's gradient is: against gradients of single pictures, and how a crafted unit stands out."""

import pytest
import torch
from packs_in_memory import CPU
from torch import nn

from common.training.gradient_shares import MOST_GROUPS, GradientShares, Share, signed_sums
from common.training.loop import train_round
from common.training.optimiser import make_optimiser
from tests.tiny_federation import settings_with, tiny_workplace

PEOPLE = (0, 0, 1, 2, 2, 2)


class Net(nn.Module):
    """A layer without what mixes pictures of a batch, so that each one's gradient is its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.backbone = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU())

    def loss(self, pictures):
        return self.backbone(pictures).square().sum()


def largest_of(net, pictures, people=PEOPLE, num_people=3, parts=1):
    shares = GradientShares(num_people=num_people, stream=torch.Generator().manual_seed(5))
    labels = torch.tensor(people)
    with shares.watching(net):
        shares.see(labels)
        size = len(labels) // parts
        for start in range(0, len(labels), size):
            shares.begin_part(start, size)
            net.loss(pictures[start : start + size]).backward()
    return shares.largest()


def by_hand(net, pictures):
    """The shares [people, units], a picture at a time."""
    sums, signs = torch.zeros(3, 3), torch.randint(0, 2, (16,), generator=torch.Generator().manual_seed(5)) * 2.0 - 1.0
    for picture, person in zip(pictures, PEOPLE, strict=True):
        before = net.backbone[0](picture[None]).detach().requires_grad_()
        net.backbone[1:](before).square().sum().backward()
        sums[person] += (before.grad[0].flatten(1) * signs).sum(1).abs()
    return sums / sums.sum(0)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_share_is_what_single_pictures_give(parts):
    net, pictures = Net(), torch.randn(6, 1, 6, 6)
    expected = by_hand(net, pictures)
    largest = largest_of(net, pictures, parts=parts)
    assert (largest.layer, largest.unit) == ("0", int(expected.amax(0).argmax()))
    assert largest.share == pytest.approx(float(expected.max()), rel=1e-4)
    assert (largest.num_people, largest.even) == (3, 0.5)


def test_a_unit_that_one_picture_alone_switches_on_is_all_that_pictures():
    net, pictures = Net(), torch.randn(6, 1, 6, 6).clamp(-1, 1)
    pictures[2] += 10.0
    with torch.no_grad():
        net.backbone[0].weight[1] = 1.0
        net.backbone[0].bias[1] = -45.0
    largest = largest_of(net, pictures)
    assert (largest.layer, largest.unit, largest.share) == ("0", 1, pytest.approx(1.0))


def test_people_are_counted_in_groups_and_a_group_has_no_less_than_a_person():
    net, pictures = Net(), torch.randn(6, 1, 6, 6)
    many = largest_of(net, pictures, people=(0, 0, 1, 2, 2, 2), num_people=10 * MOST_GROUPS)
    assert many.share == pytest.approx(largest_of(net, pictures).share)
    folded = largest_of(net, pictures, people=(0, 0, MOST_GROUPS, 2, 2, 2), num_people=10 * MOST_GROUPS)
    assert folded.num_people == 2
    assert folded.share >= many.share


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_over_places_has_their_signs(layout, dtype):
    maps = torch.randn(2, 3, 4, 5).to(dtype).contiguous(memory_format=layout)
    signs = torch.randint(0, 2, (20,)) * 2.0 - 1.0
    expected, signs = (maps.float().flatten(2) * signs).sum(2), signs.to(dtype)
    torch.testing.assert_close(signed_sums(maps, signs).float(), expected, rtol=0.02, atol=0.05)
    tokens = maps.flatten(2).transpose(1, 2)
    torch.testing.assert_close(signed_sums(tokens, signs).float(), expected, rtol=0.02, atol=0.05)


def test_passes_in_which_other_layers_run_are_counted_too():
    shares = GradientShares(num_people=2, stream=torch.Generator().manual_seed(5))
    net = nn.Module()
    net.backbone = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 1)})
    pictures = torch.ones(2, 2)
    with shares.watching(net):
        for layers in ("ab", "b", "aa", "ab"):
            shares.see(torch.tensor([0, 1]))
            shares.begin_part(0, 2)
            sum(net.backbone[name](pictures) for name in layers).sum().backward()
    of_a, of_b = shares.by_layer()
    torch.testing.assert_close(of_a, torch.full((2, 3), 4.0))  # of each picture the gradient is one, each time
    torch.testing.assert_close(of_b, torch.full((2, 1), 7.0))
    assert shares.largest().share == 0.5


def test_each_step_draws_signs_anew_for_every_number_of_places():
    shares = GradientShares(num_people=1, stream=torch.Generator().manual_seed(5))
    steps = []
    for _ in range(3):
        shares.see(torch.tensor([0]))
        steps.append([shares._signs_for(torch.zeros(1, number, 1)) for number in (16, 64, 4)])
        assert [len(signs) for signs in steps[-1]] == [16, 64, 4]
        assert all(signs.abs().eq(1.0).all() for signs in steps[-1])
    for earlier, later in ((0, 1), (1, 2)):
        assert not any(torch.equal(*pair) for pair in list(zip(steps[earlier], steps[later], strict=True))[:2])


def test_over_many_signs_the_mean_square_is_the_squared_norm_so_nothing_cancels_for_good():
    gradient = torch.randn(1, 2, 6, 6)
    gradient[0, 1] -= gradient[0, 1].mean()  # whose plain sum is zero
    signs = torch.randint(0, 2, (4000, 36)) * 2.0 - 1.0
    squares = torch.stack([signed_sums(gradient, one) for one in signs]).square().mean(0)
    torch.testing.assert_close(squares, gradient.flatten(2).square().sum(2), rtol=0.1, atol=0.0)


@pytest.mark.parametrize(
    ("num_people", "num_pictures", "even", "allowed"),
    [
        (100, 999, 0.02, 0.6),
        (10, 999, 0.2, 0.8),
        (4, 999, 0.3, 0.95),
        (100, 40, 0.02, 0.8),
        (100, 9, 0.02, 0.95),
        (100, 999, 0.4, 0.8),
        (100, 999, 0.9, 0.95),
    ],
)
def test_few_people_and_a_person_with_most_pictures_may_have_more(num_people, num_pictures, even, allowed):
    assert Share("0", 1, 1.0, even, num_people, num_pictures).allowed(0.6) == pytest.approx(allowed)


@pytest.mark.parametrize("values", [{}, {"training__accumulate": 2}, {"training__activation_checkpointing": True}])
@pytest.mark.parametrize("backbone", ["cnn", "vit_tiny"])
def test_watching_changes_no_bit_and_counts_every_picture_once(tmp_path, backbone, values):
    vit = {"model__depth": 1, "model__patch_size": 16} if backbone == "vit_tiny" else {}
    settings = settings_with(model__backbone=backbone, **vit, **values)
    found = []
    for shares in (None, GradientShares(num_people=6)):
        place = tiny_workplace(settings, tmp_path)
        optimiser = make_optimiser(place.recogniser, settings.training)
        train_round(
            place.recogniser, optimiser, place.pack, settings=settings, compute=CPU, server_round=1,
            stream_name="alpha", shares=shares,
        )  # fmt: skip
        found.append({name: tensor.clone() for name, tensor in place.recogniser.state_dict().items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    largest = shares.largest()
    assert largest.num_people == 6
    assert largest.even == pytest.approx(1 / 6)  # 24 pictures of six people
    assert 1 / 6 < largest.share < largest.allowed(0.6)
    assert not any(layer._forward_hooks for layer in place.recogniser.modules())

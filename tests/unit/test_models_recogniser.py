"""The recogniser: what it computes, that seeds fix it, and the model that is registered."""

import dataclasses

import pytest
import torch
import torchvision
from torch import Tensor, nn

from common.models.recogniser import EmbeddingModel, Recogniser, build_backbone, build_recogniser, renew_heads
from common.models.table import BACKBONES, HEADS, VITS
from common.settings import ModelSettings

SMALL = ModelSettings(backbone="cnn", embedding_size=16)
CONVOLUTIONAL = tuple(name for name in BACKBONES if name not in VITS)


def recogniser(model: ModelSettings = SMALL, backbone_seed: int = 1, head_seed: int = 2) -> Recogniser:
    return build_recogniser(model, num_people=5, image_size=64, backbone_seed=backbone_seed, head_seed=head_seed)


def pictures(num: int, side: int = 64) -> Tensor:
    return torch.rand(num, 3, side, side, generator=torch.Generator().manual_seed(3)) * 2 - 1


def same(first: nn.Module, second: nn.Module) -> bool:
    ours, others = first.state_dict(), second.state_dict()
    return ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("side", [64, 112])
def test_every_backbone_embeds_and_learns_in_every_layer(name: str, side: int) -> None:
    model = ModelSettings(backbone=name, embedding_size=24, depth=2)
    built = build_recogniser(model, num_people=5, image_size=side, backbone_seed=1, head_seed=2)
    assert built.embed(pictures(2, side)).shape == (2, 24)
    features = built.backbone.trunk(pictures(2, side))
    if name not in VITS:
        assert min(features.shape[2:]) >= 4  # faces need some place left at the end, also small ones
    logits = built(pictures(2, side), torch.tensor([0, 4]))
    assert logits.shape == (2, 5)
    nn.functional.cross_entropy(logits, torch.tensor([0, 4])).backward()
    assert [key for key, value in built.named_parameters() if value.grad is None] == []


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_layout_does_not_depend_on_the_picture_size(name: str) -> None:
    model = ModelSettings(backbone=name, embedding_size=24)
    small, large = (build_backbone(model, size).state_dict() for size in (64, 112))
    assert [(key, value.shape) for key, value in small.items()] == [(key, value.shape) for key, value in large.items()]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_trunk_has_torchvisions_layout(name: str) -> None:
    trunk = build_backbone(ModelSettings(backbone=name), 112).trunk.state_dict()
    theirs = torchvision.models.get_model(name, weights=None).state_dict()
    theirs = {key: value for key, value in theirs.items() if not key.startswith(("fc.", "classifier."))}
    assert {key: value.shape for key, value in trunk.items()} == {key: value.shape for key, value in theirs.items()}


def test_resnet_computes_what_torchvision_computes() -> None:
    trunk = build_backbone(ModelSettings(backbone="resnet18"), 112).trunk.eval()
    theirs = torchvision.models.resnet18(weights=None).eval()
    theirs.load_state_dict(trunk.state_dict(), strict=False)
    theirs.fc = nn.Identity()
    torch.testing.assert_close(trunk(pictures(2, 112)).mean((2, 3)), theirs(pictures(2, 112)))


def test_same_seeds_same_model() -> None:
    assert same(recogniser(), recogniser())


def test_each_seed_moves_only_its_own_part() -> None:
    base, other_head, other_backbone = recogniser(), recogniser(head_seed=9), recogniser(backbone_seed=9)
    assert same(base.backbone, other_head.backbone)
    assert not same(base.head, other_head.head)
    assert same(base.head, other_backbone.head)
    assert not same(base.backbone, other_backbone.backbone)


def test_backbone_does_not_depend_on_the_clients_people() -> None:
    more = build_recogniser(SMALL, num_people=9, image_size=64, backbone_seed=1, head_seed=2)
    assert same(recogniser().backbone, more.backbone)


def test_building_leaves_the_global_random_state() -> None:
    torch.manual_seed(99)  # not the state that building the same model before would have left
    before = torch.get_rng_state()
    recogniser()
    assert torch.equal(before, torch.get_rng_state())


def test_building_ignores_the_global_random_state() -> None:
    torch.manual_seed(123)
    first = recogniser()
    torch.manual_seed(456)
    assert same(first, recogniser())


@pytest.mark.parametrize("head", HEADS)
def test_margin_lowers_the_target_only(head: str) -> None:
    built = recogniser(dataclasses.replace(SMALL, head=head)).eval()
    labels = torch.tensor([0, 2, 4])
    gain = built.class_logits(built.embed(pictures(3))) - built(pictures(3), labels)
    target = gain.gather(1, labels.unsqueeze(1))
    assert (target > 1).all() if head != "softmax" else (target == 0).all()
    assert torch.count_nonzero(gain) == torch.count_nonzero(target)


@pytest.mark.parametrize("head", HEADS)
def test_recogniser_learns_a_handful_of_pictures(head: str) -> None:
    built = recogniser(dataclasses.replace(SMALL, head=head))
    batch, labels = pictures(10, 32), torch.arange(10) % 5
    optimiser = torch.optim.SGD(built.parameters(), lr=0.05, momentum=0.9)
    for _ in range(25):
        optimiser.zero_grad()
        nn.functional.cross_entropy(built(batch, labels), labels).backward()
        optimiser.step()
    assert (built.class_logits(built.embed(batch)).argmax(1) == labels).all()


def test_dropout_setting_reaches_the_backbone() -> None:
    backbone = recogniser(dataclasses.replace(SMALL, dropout=0.5)).backbone
    backbone.normalisation.momentum = 0.0
    assert not torch.equal(backbone(pictures(4)), backbone(pictures(4)))
    assert torch.equal(recogniser().backbone(pictures(4)), recogniser().backbone(pictures(4)))


def test_training_embeddings_are_centred() -> None:
    embeddings = recogniser().embed(pictures(8))
    torch.testing.assert_close(embeddings.mean(0), torch.zeros(16), rtol=0, atol=1e-5)


def test_embedding_model_has_unit_length_and_evaluation_mode() -> None:
    backbone = recogniser().backbone.train()
    model = EmbeddingModel(backbone)
    embeddings = model(pictures(3))
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(model(pictures(3)[:1]), embeddings[:1])  # in training mode the others would count
    assert backbone.training
    assert all(parameter.requires_grad for parameter in backbone.parameters())


@pytest.mark.parametrize("name", BACKBONES)
def test_embedding_model_exports_with_any_batch_size(name: str) -> None:
    backbone = build_backbone(ModelSettings(backbone=name, embedding_size=24, depth=2), 64)
    model = EmbeddingModel(backbone)
    exported = torch.export.export(model, (pictures(2),), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    for num in (1, 3):
        torch.testing.assert_close(exported(pictures(num)), model(pictures(num)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_heads_are_renewed_in_place_to_the_bits_of_their_seed(head: str) -> None:
    built = recogniser(dataclasses.replace(SMALL, head=head), head_seed=2)
    wanted = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(1.0)
    before = torch.get_rng_state()
    renew_heads(built, 2)
    assert torch.equal(torch.get_rng_state(), before)
    same = {name for name, tensor in built.state_dict().items() if torch.equal(tensor, wanted[name])}
    learned = {name for name, _ in built.named_parameters()}
    assert same & learned == {name for name in learned if name.startswith("head.")}

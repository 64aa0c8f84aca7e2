"""DCAL's branches: what the paper says of them, checked on the modules (the equations are in tests/golden)."""

import dataclasses
import io

import pytest
import torch
from torch import Tensor, nn

from common.models.dcal import (
    GlobalLocal,
    VitBackbone,
    class_token_rollout,
    local_tokens,
    num_local,
    pair_wise,
    random_partners,
    rollout,
)
from common.models.recogniser import EmbeddingModel, Recogniser, build_recogniser, for_people
from common.models.vit import Block
from common.settings import ModelSettings

VIT = ModelSettings(backbone="vit_tiny", patch_size=8, depth=2, width=0.25, embedding_size=16)
DCAL = dataclasses.replace(VIT, attention="dcal", glca_fraction=0.2)
DIM, HEADS = 24, 3


def recogniser(model: ModelSettings = DCAL) -> Recogniser:
    return build_recogniser(model, num_people=5, image_size=32, backbone_seed=1, head_seed=2)


def backbone(model: ModelSettings = DCAL) -> VitBackbone:
    built = recogniser(model).backbone
    assert isinstance(built, VitBackbone)
    return built


def pictures(num: int = 4, seed: int = 3) -> Tensor:
    return torch.rand(num, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(first: nn.Module, second: nn.Module, prefix: str) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    names = [name for name in ours if name.startswith(prefix)]
    return bool(names) and all(torch.equal(ours[name], theirs[name]) for name in names)


# ---- rollout


def test_the_rollout_of_uniform_attention_is_uniform_but_for_the_way_past_it() -> None:
    """S = J / N has S_bar = 0.5 J / N + 0.5 I; with J J = N J, L of them make (1 - 0.5^L) J / N + 0.5^L I."""
    num, depth = 7, 4
    uniform = torch.full((2, 3, num, num), 1 / num)
    rolled = rollout([uniform] * depth)
    expected = (1 - 0.5**depth) / num * torch.ones(num, num) + 0.5**depth * torch.eye(num)
    torch.testing.assert_close(rolled, expected.expand(2, -1, -1))
    patches = class_token_rollout([uniform.mean(1)] * depth)[:, 1:]
    torch.testing.assert_close(patches, torch.full((2, num - 1), float(expected[0, 1])))


def test_its_rows_sum_to_one_and_its_order_counts() -> None:
    maps = [torch.rand(2, 3, 5, 5, generator=stream(k)).softmax(-1) for k in range(3)]
    rolled = rollout(maps)
    torch.testing.assert_close(rolled.sum(-1), torch.ones(2, 5))
    row = class_token_rollout([each.mean(1) for each in maps])
    torch.testing.assert_close(row.sum(-1), torch.ones(2))
    torch.testing.assert_close(row, rolled[:, 0])
    assert not torch.allclose(rollout(maps[::-1]), rolled)


# ---- GLCA


@pytest.mark.parametrize(("fraction", "expected"), [(0.1, 6), (0.3, 19), (1.0, 64), (0.001, 1)])
def test_a_fraction_of_the_patches_asks(fraction: float, expected: int) -> None:
    assert num_local(64, fraction) == expected


def test_the_class_token_asks_and_with_it_the_patches_it_looks_at_most() -> None:
    row = torch.tensor([[0.9, 0.01, 0.03, 0.02, 0.04], [0.0, 0.4, 0.1, 0.2, 0.3]])
    assert local_tokens(row, 2).tolist() == [[0, 4, 2], [0, 1, 4]]


def test_with_all_patches_glca_is_global_attention() -> None:
    """R = 1: the outputs are those of the block on all tokens; the mean does not see the order."""
    branch, tokens = GlobalLocal(DIM, HEADS, 1.0), torch.randn(2, 10, DIM, generator=stream())
    row = torch.rand(2, 10, generator=stream())
    everything = branch.ln(branch.block(tokens))
    expected = torch.cat([everything[:, 0], everything[:, 1:].mean(1)], 1)
    torch.testing.assert_close(branch(tokens, row), expected)
    fewer = GlobalLocal(DIM, HEADS, 0.3)
    fewer.load_state_dict(branch.state_dict())
    assert not torch.allclose(fewer(tokens, row), expected, atol=1e-3)


def test_the_choice_of_patches_reaches_the_embedding() -> None:
    """The class token's output alone would be the same for any choice."""
    branch, tokens = GlobalLocal(DIM, HEADS, 0.3), torch.randn(2, 10, DIM, generator=stream())
    one, other = (branch(tokens, torch.rand(2, 10, generator=stream(seed))) for seed in (1, 2))
    torch.testing.assert_close(one[:, :DIM], other[:, :DIM])
    assert not torch.allclose(one[:, DIM:], other[:, DIM:], atol=1e-3)


@pytest.mark.parametrize("inference", ["glca", "both"])
def test_every_parameter_of_glca_reaches_the_embedding_and_has_a_gradient(inference: str) -> None:
    built = backbone(dataclasses.replace(DCAL, inference=inference))
    assert built.glca is not None
    found = built(pictures())
    (found * torch.randn(found.shape, generator=stream())).sum().backward()
    silent = [name for name, p in built.glca.named_parameters() if p.grad is None or float(p.grad.abs().max()) == 0.0]
    assert silent == []
    before = built.eval()(pictures())
    with torch.no_grad():
        built.glca.block.mlp[3].bias.add_(torch.randn(48, generator=stream()))
    assert not torch.allclose(built(pictures()), before, atol=1e-3)


def test_glca_has_weights_of_its_own_and_no_gradient_goes_through_the_choice() -> None:
    built = backbone()
    built.embeddings(pictures(), partners=None)["sa"].square().sum().backward()
    assert built.glca is not None
    assert all(p.grad is None for p in built.glca.parameters())
    held = {p.data_ptr() for p in built.glca.parameters()}
    assert held.isdisjoint(p.data_ptr() for p in built.trunk.parameters())


# ---- PWCA


def test_pwca_with_an_identical_partner_is_self_attention() -> None:
    block, tokens = Block(DIM, HEADS), torch.randn(3, 10, DIM, generator=stream())
    torch.testing.assert_close(pair_wise(block, tokens, torch.arange(3)), block(tokens))
    assert not torch.allclose(pair_wise(block, tokens, torch.tensor([1, 2, 0])), block(tokens), atol=1e-3)


def test_the_branch_with_identical_partners_is_the_branch_of_self_attention() -> None:
    found = backbone().embeddings(pictures(), partners=torch.arange(4))
    torch.testing.assert_close(found["pwca"], found["sa"], rtol=1e-4, atol=1e-4)
    found = backbone().embeddings(pictures(), partners=torch.tensor([1, 2, 3, 0]))
    assert not torch.allclose(found["pwca"], found["sa"], atol=1e-2)


def test_pwca_looks_at_the_partner_alone() -> None:
    """Nothing of picture 2 or 3 is in the trunk's output of picture 0, whose partner is 1."""
    block, tokens = Block(DIM, HEADS), torch.randn(4, 10, DIM, generator=stream())
    partners, changed = torch.tensor([1, 0, 3, 2]), tokens.clone()
    changed[2:] += 1.0
    torch.testing.assert_close(pair_wise(block, changed, partners)[:2], pair_wise(block, tokens, partners)[:2])
    changed = tokens.clone()
    changed[1] += torch.randn(10, DIM, generator=stream(9))
    assert not torch.allclose(pair_wise(block, changed, partners)[0], pair_wise(block, tokens, partners)[0], atol=1e-3)


def test_pwca_moves_no_statistics_that_inference_uses() -> None:
    with_it, without = backbone(), backbone()
    with_it.embeddings(pictures(), partners=torch.tensor([1, 2, 3, 0]))
    without.embeddings(pictures(), partners=None)
    assert same(with_it, without, "")


def test_at_inference_pwca_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensors, no call: the forward pass is that of plain self-attention, bit for bit, also in training mode."""
    monkeypatch.setattr("common.models.dcal.pair_wise", lambda *_: pytest.fail("PWCA at inference"))
    plain = backbone(VIT)
    for attention in ("pwca", "dcal"):
        trained = backbone(dataclasses.replace(VIT, attention=attention))
        assert same(plain, trained, "")
        assert torch.equal(trained.eval()(pictures()), plain.eval()(pictures()))
    assert backbone(dataclasses.replace(VIT, attention="pwca")).state_dict().keys() == plain.state_dict().keys()


def test_inference_of_self_attention_does_not_touch_glca(monkeypatch: pytest.MonkeyPatch) -> None:
    built = backbone()
    monkeypatch.setattr(GlobalLocal, "forward", lambda *_: pytest.fail("GLCA where SA embeds"))
    monkeypatch.setattr("common.models.dcal.attention_maps", lambda *_: pytest.fail("a map is formed"))
    assert built(pictures()).shape == (4, 16)


# ---- partners


@pytest.mark.parametrize("num", [2, 3, 8])
def test_random_partners_are_a_permutation_without_a_fixed_point(num: int) -> None:
    draws = stream()
    seen = set()
    for _ in range(20):
        partners = random_partners(torch.zeros(num, dtype=torch.int64), draws)
        assert sorted(partners.tolist()) == list(range(num))
        assert not (partners == torch.arange(num)).any()
        seen.add(tuple(partners.tolist()))
    assert len(seen) > 1 or num == 2


def test_each_other_picture_may_be_the_partner() -> None:
    draws = stream()
    firsts = [int(random_partners(torch.zeros(5, dtype=torch.int64), draws)[0]) for _ in range(2000)]
    assert set(firsts) == {1, 2, 3, 4}
    assert all(400 < firsts.count(other) < 600 for other in range(1, 5))  # 500 expected, deviation 19


def test_partners_are_repeatable_and_leave_the_global_state() -> None:
    labels, before = torch.zeros(9, dtype=torch.int64), torch.get_rng_state()
    assert torch.equal(random_partners(labels, stream(4)), random_partners(labels, stream(4)))
    assert torch.equal(torch.get_rng_state(), before)


# ---- the recogniser


def test_more_branches_leave_the_first_ones_start_as_it_is() -> None:
    plain, dual = recogniser(VIT), recogniser()
    assert same(plain, dual, "backbone.")
    assert same(plain, dual, "head.")
    assert dual.glca_head is not None
    assert not torch.equal(dual.glca_head.weight, dual.head.weight)
    assert dual.branches == ("sa", "glca", "pwca")
    assert plain.loss_weights is None


def test_each_branch_asks_its_head_and_pwca_that_of_self_attention() -> None:
    built, labels = recogniser().eval(), torch.tensor([0, 1, 2, 3])
    found = built.branch_embeddings(pictures(), torch.tensor([1, 2, 3, 0]))
    assert list(found) == ["sa", "glca", "pwca"]
    assert built.glca_head is not None
    for name, head in (("sa", built.head), ("glca", built.glca_head), ("pwca", built.head)):
        torch.testing.assert_close(built.branch_logits(name, found[name], labels), head(found[name], labels))
    assert list(built.branch_embeddings(pictures())) == ["sa", "glca"]


def test_the_cosine_of_both_is_the_mean_of_the_branches() -> None:
    parts = recogniser(DCAL).eval().branch_embeddings(pictures())
    both = recogniser(dataclasses.replace(DCAL, inference="both")).eval().embed(pictures())
    cosines = [nn.functional.cosine_similarity(part[:1], part[1:2]) for part in (parts["sa"], parts["glca"])]
    torch.testing.assert_close(nn.functional.cosine_similarity(both[:1], both[1:2]), sum(cosines) / 2)


def test_what_embeds_decides_which_head_answers() -> None:
    built = {name: recogniser(dataclasses.replace(DCAL, inference=name)).eval() for name in ("sa", "glca", "both")}
    parts = built["sa"].branch_embeddings(pictures())
    unit = {name: 4.0 * nn.functional.normalize(part, dim=1) for name, part in parts.items()}  # 4: the root of 16
    expected = {"sa": parts["sa"], "glca": parts["glca"], "both": torch.cat([unit["sa"], unit["glca"]], 1)}
    for name, model in built.items():
        found = model.embed(pictures())
        assert found.shape == (4, model.embedding_size)
        assert model.embedding_size == (32 if name == "both" else 16)
        torch.testing.assert_close(found, expected[name])
        assert model.glca_head is not None
        heads = {"sa": [model.head], "glca": [model.glca_head], "both": [model.head, model.glca_head]}[name]
        halves = found.chunk(len(heads), 1)
        logits = torch.stack([head.class_logits(half) for head, half in zip(heads, halves, strict=True)]).mean(0)
        torch.testing.assert_close(model.class_logits(found), logits)


def test_one_clients_people_are_taken_of_both_heads() -> None:
    built = recogniser()
    few = for_people(built, slice(1, 3))
    assert few.glca_head is not None
    assert built.glca_head is not None
    assert torch.equal(few.glca_head.weight, built.glca_head.weight[1:3])
    assert torch.equal(few.head.weight, built.head.weight[1:3])
    assert few.loss_weights is not built.loss_weights


def test_channels_last_and_bfloat16_compute_nearly_the_same() -> None:
    built, partners = recogniser().eval(), torch.tensor([1, 2, 3, 0])
    expected = built.branch_embeddings(pictures(), partners)
    built.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = built.branch_embeddings(pictures().contiguous(memory_format=torch.channels_last), partners)
    for name, embedding in expected.items():
        cosine = nn.functional.cosine_similarity(found[name].float(), embedding)
        assert (cosine > 0.99).all(), name


@pytest.mark.parametrize(("attention", "inference"), [("dcal", "sa"), ("glca", "glca"), ("dcal", "both")])
def test_what_is_registered_exports_with_any_batch_and_keeps_its_tensors(attention: str, inference: str) -> None:
    """The tensors are read back from the registry by their names, GLCA's too where it does not embed."""
    model = EmbeddingModel(backbone(dataclasses.replace(DCAL, attention=attention, inference=inference)))
    exported = torch.export.export(model, (pictures(2),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for num in (1, 3, 5):
        torch.testing.assert_close(loaded(pictures(num)), model(pictures(num)), rtol=1e-4, atol=1e-5)
    assert loaded.state_dict().keys() == model.state_dict().keys()

"""The heads' numbers: by hand, and against pytorch-metric-learning's losses with their gradients."""

import math

import pytest
import torch
from pytorch_metric_learning import losses
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from common.models.heads import CosineHead, _Cosines, arcface_logits, cosface_logits, spreadout
from common.models.recogniser import build_head
from common.settings import ModelSettings

NUM_PEOPLE, SIZE = 6, 16


def cosine_head(name: str, margin: float, scale: float, people: int = NUM_PEOPLE) -> CosineHead:
    torch.manual_seed(0)
    model = ModelSettings(head=name, head_margin=margin, head_scale=scale, embedding_size=SIZE)
    head = build_head(model, num_people=people)
    assert isinstance(head, CosineHead)
    return head


def embeddings_around(head: CosineHead, labels: Tensor) -> Tensor:
    """Embeddings at target angles over all of (0, pi): towards, across and away from their person's direction."""
    direction = F.normalize(head.weight.detach()[labels], dim=1)
    across = torch.randn(len(labels), SIZE, generator=torch.Generator().manual_seed(1))
    across = F.normalize(across - (across * direction).sum(1, keepdim=True) * direction, dim=1)
    angle = torch.linspace(0.1, math.pi - 0.1, len(labels)).unsqueeze(1)
    return 3.0 * (angle.cos() * direction + angle.sin() * across)


@pytest.mark.parametrize(("name", "margin", "scale"), [("cosface", 0.35, 30.0), ("arcface", 0.5, 64.0)])
def test_loss_and_gradients_equal_pytorch_metric_learning(name: str, margin: float, scale: float) -> None:
    head = cosine_head(name, margin, scale)
    labels = torch.arange(24) % NUM_PEOPLE
    embeddings = embeddings_around(head, labels).requires_grad_()
    theirs: losses.CosFaceLoss | losses.ArcFaceLoss
    if name == "cosface":
        theirs = losses.CosFaceLoss(NUM_PEOPLE, SIZE, margin=margin, scale=scale)
    else:
        theirs = losses.ArcFaceLoss(NUM_PEOPLE, SIZE, margin=math.degrees(margin), scale=scale)
    theirs.W.data = head.weight.data.T.clone()

    own_loss = F.cross_entropy(head(embeddings, labels), labels)
    own = torch.autograd.grad(own_loss, [embeddings, head.weight])
    their_loss = theirs(embeddings, labels)
    their = torch.autograd.grad(their_loss, [embeddings, theirs.W])

    torch.testing.assert_close(own_loss, their_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own[0], their[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(own[1], their[1].T, rtol=1e-4, atol=1e-5)
    assert own[0].abs().min() > 0


def test_cosface_by_hand() -> None:
    # 10 x (0.8 - 0.35) = 4.5 for the target, 10 x 0.2 = 2 for the other.
    logits = cosface_logits(torch.tensor([[0.8, 0.2]]), torch.tensor([0]), 0.35, 10.0)
    torch.testing.assert_close(logits, torch.tensor([[4.5, 2.0]]))


def test_arcface_by_hand() -> None:
    # cos(60 deg + 30 deg) = 0; cos(150 deg + 20 deg) = -0.98480775; the other column only gets scaled.
    cosine = torch.tensor([[0.5, 0.25], [math.cos(math.radians(150)), 0.25]], dtype=torch.float64)
    labels = torch.tensor([0, 0])
    first = arcface_logits(cosine[:1], labels[:1], math.radians(30), 2.0)
    second = arcface_logits(cosine[1:], labels[1:], math.radians(20), 2.0)
    torch.testing.assert_close(first, torch.tensor([[0.0, 0.5]], dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(second, torch.tensor([[-1.9696155060244163, 0.5]], dtype=torch.float64))


def test_arcface_gradient_by_hand() -> None:
    # d cos(theta + m) / d cos(theta) = sin(theta + m) / sin(theta) = sin 90 deg / sin 60 deg = 2 / sqrt(3).
    cosine = torch.tensor([[0.5]], dtype=torch.float64, requires_grad=True)
    arcface_logits(cosine, torch.tensor([0]), math.radians(30), 1.0).sum().backward()
    torch.testing.assert_close(cosine.grad, torch.tensor([[2 / math.sqrt(3)]], dtype=torch.float64))


def test_arcface_past_pi_by_hand() -> None:
    # theta = pi: theta + 0.5 > pi, so cos(theta) - 0.5 sin(0.5) = -1 - 0.5 x 0.479425538604203.
    logits = arcface_logits(torch.tensor([[-1.0]], dtype=torch.float64), torch.tensor([0]), 0.5, 1.0)
    torch.testing.assert_close(logits, torch.tensor([[-1.2397127693021015]], dtype=torch.float64))


@pytest.mark.parametrize("margin_rad", [0.1, 0.5, 1.0])
def test_arcface_falls_as_the_angle_grows(margin_rad: float) -> None:
    angle = torch.linspace(0.01, math.pi - 0.001, 2000, dtype=torch.float64)
    logits = arcface_logits(angle.cos().unsqueeze(1), torch.zeros(2000, dtype=torch.int64), margin_rad, 1.0).squeeze(1)
    assert (logits.diff() < 0).all()


@pytest.mark.parametrize("end", [1.0, 1.0 + 1e-7, 1.0 - 1e-7, -1.0, -1.0 - 1e-7, -1.0 + 1e-7])
def test_arcface_stays_tame_at_the_ends_and_where_rounding_passes_them(end: float) -> None:
    # d/d cos of cos(theta + m) holds cos / sin, 3000 at 1 - 1e-7 in float32; held back, cos(m) and 1 are left of it.
    cosine = torch.tensor([[end, 0.0]], requires_grad=True)
    logits = arcface_logits(cosine, torch.tensor([0]), 0.5, 64.0)
    logits.sum().backward()
    assert cosine.grad is not None
    assert torch.isfinite(logits).all()
    assert cosine.grad.abs().max() <= 64.0


@pytest.mark.parametrize("name", ["cosface", "arcface"])
def test_no_margin_is_plain_scaled_cosine(name: str) -> None:
    head = cosine_head(name, 0.0, 30.0)
    embeddings = torch.randn(5, SIZE)
    labels = torch.arange(5)
    expected = 30.0 * F.cosine_similarity(embeddings.unsqueeze(1), head.weight.unsqueeze(0), dim=2)
    torch.testing.assert_close(head(embeddings, labels), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(head.class_logits(embeddings), expected, rtol=1e-5, atol=1e-4)


def test_softmax_head_is_linear_on_the_raw_embedding() -> None:
    head = build_head(ModelSettings(head="softmax", embedding_size=SIZE), num_people=NUM_PEOPLE)
    embeddings = torch.randn(5, SIZE)
    weight, bias = head.state_dict().values()
    expected = embeddings @ weight.T + bias
    torch.testing.assert_close(head(embeddings, torch.zeros(5, dtype=torch.int64)), expected)
    torch.testing.assert_close(head.class_logits(2 * embeddings), 2 * expected - bias)


@pytest.mark.parametrize("name", ["softmax", "cosface", "arcface"])
def test_logits_stay_float32_under_autocast(name: str) -> None:
    head = build_head(ModelSettings(head=name, embedding_size=SIZE), num_people=NUM_PEOPLE)
    embeddings, labels = torch.randn(4, SIZE).bfloat16(), torch.arange(4)
    expected = head(embeddings.float(), labels)
    with torch.autocast("cpu", torch.bfloat16):
        logits, class_logits = head(embeddings, labels), head.class_logits(embeddings)
    assert logits.dtype == class_logits.dtype == torch.float32
    assert torch.equal(logits, expected)


def test_spreadout_by_hand() -> None:
    # Directions (1, 0), (0.6, 0.8), (-1, 0), of lengths 1, 5, 2: distances sqrt(0.8), 2 and sqrt(3.2) > 1.5.
    # The first pair lacks 1.5 - sqrt(0.8), in both orders: 2 x 0.605573^2 over 6 ordered pairs.
    vectors = torch.tensor([[1.0, 0.0], [3.0, 4.0], [-2.0, 0.0]], dtype=torch.float64)
    expected = 2 * (1.5 - math.sqrt(0.8)) ** 2 / 6
    assert spreadout(vectors, 1.5).item() == pytest.approx(expected, rel=1e-12)
    assert spreadout(vectors, 0.7).item() == 0.0
    assert spreadout(vectors[:1], 0.7).item() == 0.0  # one person alone crowds nobody


@pytest.mark.parametrize("margin", [0.7, 1.4, 2.0])
def test_spreadout_and_its_gradient_are_those_of_a_loop_over_pairs_in_float64(margin: float) -> None:
    stream = torch.Generator().manual_seed(4)
    vectors = torch.randn(9, 3, generator=stream, dtype=torch.float64, requires_grad=True)
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    pairs = [(c, other) for c in range(9) for other in range(9) if c != other]
    lacks = torch.stack([(margin - (unit[c] - unit[other]).norm()).clamp_min(0.0) for c, other in pairs])
    expected = lacks.square().sum() / len(pairs)
    seen = spreadout(vectors, margin)
    assert 0.0 < expected.item() <= margin**2
    torch.testing.assert_close(seen, expected, rtol=1e-10, atol=1e-12)
    wanted = torch.autograd.grad(expected, vectors)[0]
    torch.testing.assert_close(torch.autograd.grad(seen, vectors)[0], wanted, rtol=1e-8, atol=1e-12)
    in_float32 = spreadout(vectors.detach().float(), margin)
    assert in_float32.item() == pytest.approx(expected.item(), rel=1e-4)


def test_spreadout_of_rows_that_coincide_or_oppose_is_finite() -> None:
    vectors = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    value = spreadout(vectors, 2.0)
    value.backward()
    assert vectors.grad is not None
    assert torch.isfinite(value)
    assert torch.isfinite(vectors.grad).all()


@pytest.mark.parametrize("name", ["softmax", "cosface", "arcface"])
def test_identity_vectors_are_one_row_a_person_of_the_head_itself(name: str) -> None:
    head = build_head(ModelSettings(head=name, embedding_size=SIZE), num_people=NUM_PEOPLE)
    assert head.identity_vectors.shape == (NUM_PEOPLE, SIZE)
    assert any(head.identity_vectors is parameter for parameter in head.parameters())


def test_cosines_and_their_gradients_are_those_of_normalised_copies() -> None:
    stream = torch.Generator().manual_seed(5)
    head = cosine_head("cosface", 0.0, 1.0).double()
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=stream))
        head.weight[3] = 0.0  # no direction: cosine 0, and a gradient that is finite
    unit = F.normalize(torch.randn(7, SIZE, generator=stream, dtype=torch.float64), dim=1).requires_grad_()
    gradient = torch.randn(7, len(head.weight), generator=stream, dtype=torch.float64)
    gradient[:, 3] = 0.0  # where F.normalize's own is 1e12 times what comes in
    wanted = F.linear(unit, F.normalize(head.weight, dim=1))
    expected = torch.autograd.grad(wanted, (unit, head.weight), gradient)
    seen = _Cosines.apply(unit, head.weight)
    torch.testing.assert_close(seen, wanted, rtol=1e-12, atol=1e-12)
    for one, other in zip(torch.autograd.grad(seen, (unit, head.weight), gradient), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


class Made(TorchDispatchMode):
    """Remembers how large each memory is that an operation takes for its result."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        given = {tensor.untyped_storage().data_ptr() for tensor in arguments if isinstance(tensor, Tensor)}
        found = operator(*arguments, **(options or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.sizes.append(tensor.untyped_storage().nbytes())
        return found


@pytest.mark.parametrize("name", ["cosface", "arcface"])
def test_a_step_makes_one_thing_of_the_heads_size_its_gradient(name: str) -> None:
    head, embeddings, labels = cosine_head(name, 0.3, 30.0, people=20_000), torch.randn(2, SIZE), torch.tensor([0, 5])
    with Made() as made:
        F.cross_entropy(head(embeddings, labels), labels).backward()
    assert head.weight.grad is not None
    assert sum(size >= head.weight.untyped_storage().nbytes() for size in made.sizes) == 1

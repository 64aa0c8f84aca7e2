"""How much of each unit's gradient in a round is one person's: a crafted unit that one picture alone switches on shows.

A unit is an output channel of one of a backbone's layers.  What reaches its weights of a picture is the gradient at
its output, which is zero where a later layer gates it off; a picture's part is what that amounts to, over its places.
Of a convolution without a bias the normalisation behind it is looked at, in which pictures of a batch mix.  It is
watched in the training itself, all of whose pictures count, so nothing is computed twice.  Not seen: weights of a ViT's
attention inputs, of which the layers before and behind are; and units whose *difference* is one person's.
"""

import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn

from common.models.recogniser import Recogniser

MOST_GROUPS: Final = 64  # of people, who are told apart up to so many; a group's share is no less than a person's
MOST: Final = 0.95  # a share above it is never allowed to a round of fewer people
FEW: Final = 8.0  # times an even share may always be one person's
OWN: Final = 2.0  # times their share of the pictures may always be one person's
FEW_PICTURES: Final = 32.0  # pictures of a round; one person's share may be so many by as many as there were


@dataclass(frozen=True)
class Share:
    """The largest share that one person, or group of people, has of a unit's gradient."""

    layer: str
    unit: int
    share: float  # in [0, 1]
    even: float  # the largest share of the round's pictures that a person or group has, in (0, 1]
    num_people: int  # who had a picture in the round; or groups
    num_pictures: int  # of the round, each as often as it was seen

    def allowed(self, limit: float) -> float:
        """The largest share that is none too large.  limit: where there are people enough, in (0, 1]."""
        few = max(FEW / self.num_people, FEW_PICTURES / self.num_pictures, OWN * self.even)
        return max(limit, min(MOST, few))


def _unknown_stream() -> torch.Generator:
    """Random numbers that no server knows; training's own stay untouched."""
    return torch.Generator().manual_seed(secrets.randbits(63))


@dataclass(kw_only=True)
class GradientShares:
    """The sums of a round: of each layer's units and each group of people the sums of their pictures' gradients."""

    num_people: int  # of the site, who have a label
    stream: torch.Generator = field(default_factory=_unknown_stream)
    _group: Tensor = field(init=False)  # [num_people] int64
    _batch: Tensor = field(init=False)  # [B] int64, the groups of the step's pictures
    _part: Tensor | None = field(default=None, init=False)  # those of the pass that is under way
    _found: list[tuple[str, Tensor]] = field(default_factory=list, init=False)  # of the pass: layer, [B, units]
    _drawn: Tensor = field(default_factory=lambda: torch.empty(0), init=False)  # the step's signs, float32
    _most_places: int = field(default=0, init=False)  # of a layer so far
    _signs: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict, init=False)  # by number of places
    _layers: list[tuple[str, int]] = field(default_factory=list, init=False)  # of `_whole`'s columns: name, units
    _whole: Tensor | None = field(default=None, init=False)  # [groups, units of all layers] float32
    _sums: dict[str, Tensor] = field(default_factory=dict, init=False)  # by layer [groups, units], without `_whole`
    _pictures: Tensor = field(init=False)  # [groups] float32

    def __post_init__(self) -> None:
        groups = min(MOST_GROUPS, self.num_people)
        self._group = torch.arange(self.num_people) % groups
        self._pictures = torch.zeros(groups)

    def see(self, labels: Tensor) -> None:
        """The next step is of these pictures.  labels: [B] int64 in [0, num_people)."""
        self._count()
        self._group, self._pictures = self._group.to(labels.device), self._pictures.to(labels.device)
        self._batch = self._group[labels]
        self._signs.clear()
        self._drawn = torch.empty(0)
        self._pictures.index_add_(0, self._batch, torch.ones_like(self._batch, dtype=torch.float32))

    def begin_part(self, start: int, number: int) -> None:
        """The next pass is of so many of the step's pictures, from the `start`th."""
        self._count()
        self._part = self._batch[start : start + number]

    @contextmanager
    def watching(self, recogniser: Recogniser) -> Iterator[None]:
        """In here every pass of the backbone whose pictures were `see`n is counted."""
        hooks = [
            layer.register_forward_hook(self._hook(name))
            for name, layer in recogniser.backbone.named_modules()
            if _is_watched(layer)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def by_layer(self) -> list[Tensor]:
        """The sums of each layer, [groups, units] float32, in the order of the layers' names."""
        self._settle()
        return [self._sums[name] for name in sorted(self._sums)]

    def so_far(self) -> dict[str, Tensor]:
        """What was counted, for `go_on_from`: "pictures" [groups], and by layer [groups, units] float32."""
        self._settle()
        return {"pictures": self._pictures} | {f"layer/{name}": sums for name, sums in self._sums.items()}

    def go_on_from(self, counted: Mapping[str, Tensor]) -> None:
        """Count on from there.  counted: of `so_far`, on any device."""
        device = self._pictures.device
        self._pictures = counted["pictures"].to(device)
        self._sums = {
            name.removeprefix("layer/"): sums.to(device) for name, sums in counted.items() if name != "pictures"
        }

    def _hook(self, name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def forward(_layer: nn.Module, _inputs: object, output: Tensor) -> None:
            if self._part is not None and output.requires_grad:
                output.register_hook(lambda gradient: self._add(name, gradient))  # type: ignore[no-untyped-call]

        return forward

    def _add(self, name: str, gradient: Tensor) -> None:
        """gradient: [B, U, h, w], [B, N, U] or [B, U]."""
        sums = gradient if gradient.dim() == 2 else signed_sums(gradient, self._signs_for(gradient))
        self._found.append((name, sums))

    def _count(self) -> None:
        """Add up what the pass that is over found, of all layers at once: each operation has its price."""
        if not self._found or self._part is None:
            return
        layers = [(name, part.shape[1]) for name, part in self._found]
        # Not finite where float16 skips a step.
        amounts = torch.cat([part for _, part in self._found], 1).float().abs().nan_to_num_(0.0, 0.0, 0.0)
        self._found.clear()
        if self._whole is None or layers != self._layers:
            self._put_by()
            self._layers, self._whole = layers, amounts.new_zeros(len(self._pictures), amounts.shape[1])
        self._whole.index_add_(0, self._part, amounts)

    def _put_by(self) -> None:
        """The whole's columns into the layers' own sums."""
        if self._whole is None:
            return
        parts = self._whole.split([units for _, units in self._layers], 1)  # type: ignore[no-untyped-call]
        for (name, _), part in zip(self._layers, parts, strict=True):
            known = self._sums.get(name)
            self._sums[name] = part.contiguous() if known is None else known + part
        self._whole = None

    def _settle(self) -> None:
        self._count()
        self._put_by()

    def _signs_for(self, gradient: Tensor) -> Tensor:
        """The step's random signs of the gradient's places, in its dtype: the first so many that the step has."""
        number = gradient.shape[2] * gradient.shape[3] if gradient.dim() == 4 else gradient.shape[1]
        signs = self._signs.get((number, gradient.dtype))
        if signs is None:
            self._most_places = max(self._most_places, number)
            if number > len(self._drawn):
                more = torch.randint(0, 2, (self._most_places - len(self._drawn),), generator=self.stream)
                self._drawn = torch.cat([self._drawn, more * 2.0 - 1.0])
            signs = self._drawn[:number].to(gradient.device, gradient.dtype)
            self._signs[number, gradient.dtype] = signs
        return signs

    def largest(self) -> Share | None:
        """The largest share of all units; None where no gradient was seen."""
        self._settle()
        seen = int((self._pictures > 0).sum())
        found = None
        for name, sums in self._sums.items():
            whole = sums.sum(0)
            shares = torch.where(whole > 0, sums.amax(0) / whole.clamp(min=torch.finfo(whole.dtype).tiny), 0.0)
            share, unit = shares.max(0)
            if found is None or float(share) > found.share:
                number = int(self._pictures.sum())
                found = Share(name, int(unit), float(share), float(self._pictures.max()) / number, seen, number)
        return found


def signed_sums(gradient: Tensor, signs: Tensor) -> Tensor:
    """[B, U, h, w] or [B, N, U] of any float -> [B, U]: whose amount is how much a picture gives each unit.

    The sum over places, each with a sign of `signs`, [h w] or [N] of -1 and 1 in the gradient's dtype. Over signs that
    nobody knows beforehand its mean square is the squared norm, so nothing cancels for good (Alon, Matias and Szegedy,
    "The space complexity of approximating the frequency moments", 1996).  A norm takes two to ten times as long.
    """
    num = len(gradient)
    if gradient.dim() == 4:
        if not gradient.is_contiguous(memory_format=torch.channels_last):
            return torch.matmul(gradient.reshape(num, gradient.shape[1], -1), signs)
        gradient = gradient.permute(0, 2, 3, 1).reshape(num, -1, gradient.shape[1])
    return torch.bmm(signs.expand(num, 1, -1), gradient).squeeze(1)


def _is_watched(layer: nn.Module) -> bool:
    """Layers with weights of their own; a convolution without a bias has a normalisation behind it."""
    has_weights = next(layer.parameters(recurse=False), None) is not None
    return has_weights and not (isinstance(layer, nn.Conv2d) and layer.bias is None)

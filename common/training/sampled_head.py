"""A step that sees some of the head's people only: those of its batch, and a drawn part of the others (Partial FC).

Partial FC (arXiv:2010.05222, sec. 3.2; arXiv:2203.15565): logits, gradient and update of a head with very many people
are made for a sample of its rows that holds each person of the batch. No other row is touched: no weight decay, no
momentum. While a step runs, the head's parameters are those rows, so nothing else has to know of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from common.models.recogniser import Recogniser


@dataclass(frozen=True, kw_only=True)
class HeadSample:
    """Which part of the people a step sees.  stream: of these draws alone, on the CPU."""

    fraction: float  # in (0, 1)
    stream: torch.Generator

    def rows(self, labels: Tensor, num_people: int) -> Tensor:
        """The people of a step, ascending: all of the batch and so many others; [R] int64 on the labels' device.

        labels: [B] int64 in [0, num_people).  R is fraction x num_people, or the batch's number where that is more.
        """
        chances = torch.rand(num_people, generator=self.stream)
        present = torch.unique(labels.cpu())
        chances[present] = 2.0
        number = max(len(present), round(self.fraction * num_people), 1)
        return chances.topk(number).indices.sort().values.to(labels.device)


@contextmanager
def only_rows(recogniser: Recogniser, optimiser: torch.optim.Optimizer, rows: Tensor) -> Iterator[None]:
    """In here the heads are those rows of theirs, with their part of the optimiser's state; then they are put back.

    rows: [R] int64, ascending, none twice.  Gradients are gone afterwards.
    """
    parameters = list(recogniser.heads.parameters())  # each has one row a person
    whole = [parameter.data for parameter in parameters]
    states = [dict(optimiser.state.get(parameter, {})) for parameter in parameters]
    for parameter, data, before in zip(parameters, whole, states, strict=True):
        for name, value in before.items():
            if isinstance(value, Tensor) and value.shape == data.shape:
                optimiser.state[parameter][name] = value[rows]
        parameter.grad = None
        parameter.data = data[rows]
    try:
        yield
    finally:
        for parameter, data, before in zip(parameters, whole, states, strict=True):
            part, parameter.grad = parameter.data, None
            data.index_copy_(0, rows, part)
            parameter.data = data
            for name, value in optimiser.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == part.shape and value.ndim:
                    kept = before.get(name)
                    kept = torch.zeros_like(data) if kept is None else kept  # AdamW's first step makes its moments
                    optimiser.state[parameter][name] = kept.index_copy_(0, rows, value)

"""The questions that a model in use answers: are these two one person, who is this, what is somebody's template."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from common.errors import UserError
from common.metrics.thresholds import Threshold, Thresholds
from simulation.recognition.decision import (
    chosen_threshold,
    far_of_search,
    rate_words,
    require_good,
)
from simulation.recognition.gallery import Enrolled, Gallery
from simulation.recognition.model import FaceModel
from simulation.recognition.photographs import Photographs, Seen
from simulation.recognition.search import Float32, best_matches, person_scores


class FindsFaces(Protocol):
    """What finds the faces of a photograph: `Photographs`."""

    def faces(self, source: Path | bytes) -> list[Seen]:
        """The largest first; at least one."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two photographs, by the largest face of each."""

    first: Seen
    second: Seen
    num_faces: tuple[int, int]
    score: float  # cosine
    threshold: Threshold

    @property
    def same(self) -> bool:
        """Whether they are taken for one person."""
        return self.score >= self.threshold.threshold


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Somebody of a gallery, and how like them a face is."""

    person: Enrolled
    score: float


@dataclass(frozen=True, kw_only=True)
class Recognised:
    """One face of a photograph, and whom it is most like, best first."""

    face: Seen
    candidates: tuple[Candidate, ...]
    threshold: Threshold

    @property
    def person(self) -> Enrolled | None:
        """Who it is; None: unknown."""
        best = self.candidates[0] if self.candidates else None
        return best.person if best is not None and best.score >= self.threshold.threshold else None


@dataclass(frozen=True, kw_only=True)
class Recognition:
    """A model with the threshold that it is asked at."""

    model: FaceModel
    known: Thresholds
    threshold: Threshold
    photographs: FindsFaces
    cautions: tuple[str, ...]  # to be shown with each answer

    @classmethod
    def of(
        cls, model: FaceModel, *, far: float | None, anyway: bool, photographs: FindsFaces | None = None
    ) -> "Recognition":
        """Raises UserError for a model without thresholds, a poor one (unless `anyway`), or a FAR that it has not."""
        known = model.thresholds
        if known is None:
            raise UserError(
                f"{model.binding.source} carries no thresholds, so nothing says what a score means; train it again,"
                " with people to validate on."
            )
        poor = require_good(known, model.binding.source, anyway=anyway)
        return cls(
            model=model,
            known=known,
            threshold=chosen_threshold(known, far),
            photographs=photographs or Photographs(model.image_size),
            cautions=tuple(filter(None, (poor, model.caution))),
        )

    @property
    def rate(self) -> str:
        """What the threshold stands for, in words."""
        return rate_words(self.threshold, self.known)

    def compare(self, first: Path | bytes, second: Path | bytes) -> Comparison:
        """Whether two photographs show one person.  Raises DataError where one has no face or is no picture."""
        return self.compared(self.photographs.faces(first), self.photographs.faces(second))

    def compared(self, first: Sequence[Seen], second: Sequence[Seen]) -> Comparison:
        """Whether the largest faces of two photographs are one person's.  first, second: the largest first."""
        one, other = first[0], second[0]
        templates = self.model.embed(np.stack([one.picture, other.picture]))
        return Comparison(
            first=one,
            second=other,
            num_faces=(len(first), len(second)),
            score=float(templates[0] @ templates[1]),
            threshold=self.threshold,
        )

    def identify(self, source: Path | bytes, gallery: Gallery, top: int) -> list[Recognised]:
        """Who is on a photograph, each face of it, the largest first.  Raises DataError as `compare`."""
        faces = self.photographs.faces(source)
        templates = self.model.embed(np.stack([face.picture for face in faces]))
        found = best_matches(gallery.templates, gallery.first_rows, templates, top)
        return [
            Recognised(
                face=face,
                candidates=tuple(
                    Candidate(person=gallery.people[person], score=float(score))
                    for person, score in zip(people, scores, strict=True)
                ),
                threshold=self.threshold,
            )
            for face, people, scores in zip(faces, found.people.tolist(), found.scores.tolist(), strict=True)
        ]

    def search_rate(self, gallery: Gallery) -> str:
        """How often somebody who is not in this gallery is taken for one of it, in words."""
        number = len(gallery.templates)
        rate = far_of_search(self.threshold.far, number)
        return (
            f"FAR {self.threshold.far:g} a comparison, {rate:.2g} a search of this gallery ({number:,} templates:"
            f" 1 - (1 - {self.threshold.far:g})^{number})"
        )


def look_alikes(gallery: Gallery, names: Sequence[str], threshold: float) -> list[tuple[str, str, float]]:
    """People of two names who may be one: (one of `names`, the other, highest cosine), the likest first.

    threshold: the cosine from which on two pictures are taken for one person's.
    """
    wanted = set(names)
    found: dict[tuple[str, str], float] = {}
    for number, one in enumerate(gallery.people):
        if one.name not in wanted:
            continue
        scores: Float32 = person_scores(gallery.templates, gallery.first_rows, gallery.templates_of(number)).max(axis=0)
        scores[number] = -1.0
        for other in np.flatnonzero(scores >= threshold).tolist():
            pair = (one.name, gallery.people[other].name)
            if (pair[1], pair[0]) not in found:
                found[pair] = float(scores[other])
    return sorted(((one, other, score) for (one, other), score in found.items()), key=lambda row: (-row[2], row))

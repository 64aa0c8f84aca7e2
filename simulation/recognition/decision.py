"""What a score means: a threshold that can be defended, the false accept rate it stands for, and when to say nothing.

Words and one formula; the thresholds are those of `common.metrics.thresholds`.  FAR: the part of impostor pairs that is
accepted.
"""

import math
from collections.abc import Mapping
from typing import Final

from common.errors import UserError
from common.metrics.thresholds import USUAL_FAR, Threshold, Thresholds

WORST_EER: Final = 0.10  # above it one pair of ten is judged wrongly whatever the threshold: nobody should act on that


def basis(known: Thresholds) -> str:
    """On whom a model was measured."""
    return (
        f"{known.num_people:,} people ({known.num_genuine_pairs:,} genuine and {known.num_impostor_pairs:,} impostor"
        " pairs)"
    )


def far_of_search(far: float, num_compared: int) -> float:
    """The probability that somebody who is not in a gallery is taken for one of it: 1 - (1 - far)^n.

    far: of one comparison, in [0, 1].  num_compared: templates in the gallery.  Comparisons are taken as independent
    (Grother & Ngan, NIST IR 8271, section 3); templates of one person are not, so with several each it is an upper end.
    """
    if far >= 1.0:
        return 1.0 if num_compared else 0.0
    return -math.expm1(num_compared * math.log1p(-far))


def chosen_threshold(known: Thresholds, far: float | None) -> Threshold:
    """The threshold for a FAR; None: that of USUAL_FAR, or of the lowest FAR that the model's pairs support.

    Raises UserError for a FAR that they do not support, or that nobody measured.
    """
    rows = known.rows
    if not rows:
        raise UserError(
            f"this model has no threshold: it was measured on {basis(known)}, too few for any FAR; validate it on more"
            " people."
        )
    if far is None:
        return next((row for row in rows if row.far == USUAL_FAR), rows[-1])
    if not 0.0 < far < 1.0:
        raise UserError(f"--far {far:g}: a rate between 0 and 1 is meant, such as 1e-3.")
    found = next((row for row in rows if math.isclose(row.far, far, rel_tol=1e-6)), None)
    if found is not None:
        return found
    stated = ", ".join(f"{row.far:g}" for row in rows)
    few = f"; a lower one takes more than its {known.num_impostor_pairs:,} impostor pairs" if far < rows[-1].far else ""
    raise UserError(f"--far {far:g}: this model has thresholds for {stated}{few}; give one of these.")


def require_good(known: Thresholds, source: str, *, anyway: bool) -> str:
    """The warning to show with each answer of a poor model that is asked anyway; "" for a good one.

    Raises UserError for a poor one otherwise.
    """
    if known.eer <= WORST_EER:  # NaN is not
        return ""
    told = (
        f"{source} judges {known.eer:.0%} of pairs wrongly at its equal error rate, measured on {basis(known)}; the"
        f" limit is {WORST_EER:.0%}"
    )
    if not anyway:
        raise UserError(f"{told}: train a better one, or give --anyway to see its answers all the same.")
    return f"warning: {told}. Do not act on its answers."


def rate_words(threshold: Threshold, known: Thresholds) -> str:
    """What a threshold stands for."""
    return (
        f"FAR {threshold.far:g} (95 % interval {threshold.far_low:.2g} to {threshold.far_high:.2g}), measured on"
        f" {basis(known)}"
    )


def finite(answer: object) -> object:
    """An answer of mappings, lists and values as JSON can have it: null for a number that is none (RFC 8259, 6)."""
    if isinstance(answer, float):
        return answer if math.isfinite(answer) else None
    if isinstance(answer, Mapping):
        return {key: finite(value) for key, value in answer.items()}
    return [finite(value) for value in answer] if isinstance(answer, list | tuple) else answer

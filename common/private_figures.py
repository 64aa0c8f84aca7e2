"""Pictures that need embeddings or single predictions, and so are drawn where the data are, and only there.

A site keeps them in its own folder and sends them, if anywhere, to a tracking of its own.  That may be another machine,
so people are numbers there too: the classes of the head.  `hardest` shows faces and names: it is kept, and never sent.
"""

import contextlib
from typing import Final

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError, TrainingFailed
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.metrics.figures import judged, known_threshold
from common.metrics.hardest import ScoredPair, hardest_genuine, hardest_impostors
from common.metrics.pairs import pair_counts, pair_histogram
from common.metrics.sums import no_twins
from common.models.recogniser import Recogniser
from common.plots.hardest import PAIRS_SHOWN, ShownPair, hardest_pairs
from common.plots.people import Projection, confusion_of_predictions, embedding_maps
from common.system.runtime import stream_seed
from common.tracking.run import SavesFigure
from common.training.evaluation import closed_set_predictions, embed
from common.training.loop import Compute

HARDEST: Final = "plots/hardest_pairs.png"
MOST_PICTURES: Final = 1000  # t-SNE of them takes seconds; callers draw a sample
FEWEST_PICTURES: Final = 5  # fewer have no neighbourhoods to keep
_PERPLEXITY: Final = 30.0


def pca(embeddings: NDArray[np.float32]) -> tuple[NDArray[np.float64], tuple[float, float]]:
    """The two directions in which the unit-length embeddings vary most (Pearson, 1901).

    embeddings: [N, D] float, N >= 2 and D >= 2, of any length (normalised here, since they are compared by cosine).
    Returns (points [N, 2] float64 with mean 0, the fraction of the variance along each axis, largest first).  The sign
    of an axis is chosen so that its largest weight is positive: the same embeddings give the same picture.
    Raises DataError for fewer than two pictures, TrainingFailed when an embedding is not finite.
    """
    unit = _unit_length(embeddings)
    if len(unit) < 2:
        raise DataError(f"PCA of {len(unit)} pictures; give at least 2.")
    centred = unit - unit.mean(axis=0)
    _, spread, axes = np.linalg.svd(centred, full_matrices=False)
    first = axes[:2]
    signs = np.sign(first[np.arange(2), np.abs(first).argmax(axis=1)])
    variances = spread**2
    total = float(variances.sum())
    shares = variances[:2] / total if total > 0.0 else np.zeros(2)
    return centred @ (first * signs[:, None]).T, (float(shares[0]), float(shares[1]))


def tsne(embeddings: NDArray[np.float32], seed: int) -> NDArray[np.float64]:
    """Neighbours stay neighbours: t-SNE (van der Maaten and Hinton, 2008) of the unit-length embeddings.

    embeddings: [N, D] float, 5 <= N <= MOST_PICTURES.  The perplexity is 30, or (N - 1) / 3 with few pictures.
    Returns points [N, 2] float64 from the same seed always the same; their distances between groups mean little.
    Embeddings that are all alike give points that are all 0.
    Raises DataError for fewer than five pictures, TrainingFailed when an embedding is not finite, ValueError for more
    than MOST_PICTURES.
    """
    unit = _unit_length(embeddings)
    if len(unit) < FEWEST_PICTURES:
        raise DataError(f"t-SNE of {len(unit)} pictures; give at least {FEWEST_PICTURES}.")
    if len(unit) > MOST_PICTURES:
        raise ValueError(f"t-SNE of {len(unit)} pictures; draw a sample of at most {MOST_PICTURES}")
    if np.allclose(unit, unit[0]):  # scikit-learn would divide by their spread
        return np.zeros((len(unit), 2))
    from sklearn.manifold import TSNE

    perplexity = min(_PERPLEXITY, (len(unit) - 1) / 3)
    found = TSNE(n_components=2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(unit)
    return np.asarray(found, dtype=np.float64)


def _unit_length(embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
    given = np.asarray(embeddings, dtype=np.float64)
    if given.ndim != 2 or given.shape[1] < 2:
        raise ValueError(f"embeddings {given.shape} must be [N, D] with D at least 2")
    finite = np.asarray(np.isfinite(given).all(axis=1))
    if not finite.all():
        raise TrainingFailed(
            f"{int((~finite).sum())} of {len(finite)} embeddings are not finite (NaN or infinity), so no map can be "
            "drawn; the model has diverged: lower training.lr or raise training.warmup_fraction."
        )
    unit: NDArray[np.float64] = given / np.maximum(np.linalg.norm(given, axis=1, keepdims=True), 1e-12)
    return unit


def _sample(pack: FacePack, seed: int) -> NDArray[np.int64]:
    """The test people's pictures, whole people in random order until there are MOST_PICTURES."""
    indices = pack.indices(Split.TEST_PEOPLE)
    if len(indices) <= MOST_PICTURES:
        return indices
    people = np.unique(pack.person[indices])
    rank = np.empty(len(pack.people), dtype=np.int64)
    rank[people] = np.random.default_rng(seed).permutation(len(people))
    order = np.argsort(rank[pack.person[indices]], kind="stable")
    return np.sort(indices[order[:MOST_PICTURES]])


def _maps(recogniser: Recogniser, pack: FacePack, compute: Compute, *, client: str, seed: int) -> SavesFigure:
    indices = _sample(pack, stream_seed(seed, "gallery"))
    embeddings = embed(recogniser, pack, indices, compute).numpy()
    points, explained = pca(embeddings)
    projections = [Projection(points, "PCA", explained)]
    with contextlib.suppress(DataError):  # too few pictures for neighbours
        projections.append(Projection(tsne(embeddings, stream_seed(seed, "tsne") % 2**32), "t-SNE"))
    return embedding_maps(
        projections, pack.person[indices], title=f"Embeddings of people never seen in training, {client}"
    )


def private_pictures(
    recogniser: Recogniser, pack: FacePack, compute: Compute, *, client: str, seed: int
) -> dict[str, SavesFigure]:
    """The confusion matrix of one client's own people, and PCA and t-SNE of its test people's embeddings.

    Returns file name -> figure; what there are no pictures for is left out.
    """
    figures: dict[str, SavesFigure] = {}
    predicted, labels = closed_set_predictions(recogniser, pack, Split.TEST_PICTURES, compute)
    if len(labels):
        names = [str(label) for label in range(pack.num_classes)]
        title = f"Confusion of people seen in training, {client}"
        figures["confusion.png"] = confusion_of_predictions(predicted, labels, names, title=title)
    if len(pack.indices(Split.TEST_PEOPLE)) > 1:
        figures["embeddings.png"] = _maps(recogniser, pack, compute, client=client, seed=seed)
    return figures


def own_threshold(recogniser: Recogniser, pack: FacePack, compute: Compute) -> float | None:
    """The cosine that is best for the pairs of this client's own validation people; None where there are none."""
    indices, person, family = pack.shown_in(Split.VAL_PEOPLE)
    some = all(pair_counts(person, family)["all"])
    return known_threshold(pair_histogram(embed(recogniser, pack, indices, compute), person) if some else no_twins())


def hardest(
    recogniser: Recogniser, pack: FacePack, compute: Compute, *, client: str, threshold: float | None
) -> SavesFigure | None:
    """The test people's pairs that the model gets most wrong, with their faces and names: to be kept, never sent.

    threshold: a cosine, chosen in validation.  None when there are no two people, one of them with two pictures.
    """
    indices, person, family = pack.shown_in(Split.TEST_PEOPLE)
    if not all(pair_counts(person, family)["all"]):
        return None
    embeddings = embed(recogniser, pack, indices, compute)

    def shown(pairs: list[ScoredPair]) -> list[ShownPair]:
        found = []
        for pair in pairs:
            rows = indices[[pair.first, pair.second]]
            one, other = (pack.people[number] for number in pack.person[rows])
            first, second = pack.pictures[rows]
            found.append(ShownPair(first, second, (one, other), pair.score))
        return found

    return hardest_pairs(
        shown(hardest_impostors(embeddings, person, PAIRS_SHOWN)),
        shown(hardest_genuine(embeddings, person, PAIRS_SHOWN)),
        threshold=threshold,
        title=f"The hardest pairs of people never seen in training, {client}",
        about=_about_hardest(pair_histogram(embeddings, person), threshold),
    )


def _about_hardest(pairs: NDArray[np.int64], threshold: float | None) -> str:
    kept = "One pair of each two people, and of each person. These are faces: the file is kept here and sent nowhere."
    if threshold is None:
        return kept
    (rejected, taken), (_, accepted) = judged(pairs, threshold).tolist()
    return (
        f"Threshold {threshold:.3f}, from validation: {accepted:,} of {int(pairs[1].sum()):,} pairs of two people are"
        f" accepted, {rejected:,} of {rejected + taken:,} of one person rejected.\n{kept}"
    )

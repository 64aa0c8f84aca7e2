"""Pictures that need embeddings or single predictions, and so are drawn where the data are, and only there.

A site keeps them in its own folder and sends them, if anywhere, to a tracking of its own.  That may be another machine,
so people are numbers here too: the classes of the head.
"""

import contextlib

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.evaluation import closed_set_predictions, embed
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.metrics.projection import MOST_PICTURES, pca, tsne
from common.models.recogniser import Recogniser
from common.plots.people import Projection, confusion_of_predictions, embedding_maps
from common.runtime import stream_seed
from common.tracking.run import SavesFigure
from common.training import Compute


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

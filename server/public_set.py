"""A public set of pairs at the server, such as LFW: the global model's scores on people who are no client's.

The pictures are the server's own, so nothing here is data of a client, and the clients know nothing of it. It is one
more curve beside the test curve: like that one, no choice is made by it.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from common import config
from common.errors import ConfigError, DataError
from common.faces.batches import evaluation_batches
from common.faces.decode import central_pictures
from common.faces.index import require_folder
from common.faces.pairs import PairList, read_pair_list, require_pictures
from common.metrics.figures import eer, roc_auc
from common.metrics.folds import FoldPairs, pair_scores, ten_fold_accuracy_of_scores
from common.metrics.pairs import score_histogram
from common.models.recogniser import Recogniser
from common.protocol.parameters import Manifest, load_shared
from common.settings import Settings
from common.system.runtime import resolve_device

BATCH = 128


@dataclass(frozen=True, kw_only=True)
class PublicSet:
    """The pictures that a list of pairs names, in memory, and the pairs."""

    pictures: NDArray[np.uint8]  # [N, S, S, 3]
    pairs: FoldPairs


def with_absolute_public_set(settings: Settings, base: Path) -> Settings:
    """The settings with paths of the public set that mean the same in every process of the run.

    verification.public_pairs is looked for in verification.public_dir first, then by its own path.
    Settings without a public set are returned as they are.
    """
    verification = settings.verification
    if verification.public_dir == "none":
        return settings
    root = (base / Path(verification.public_dir).expanduser()).resolve()
    named = Path(verification.public_pairs).expanduser()
    pairs = root / named if (root / named).is_file() else (base / named).resolve()
    named_so = {"verification.public_dir": str(root), "verification.public_pairs": str(pairs)}
    return config.with_values(settings, named_so)


def open_public_set(settings: Settings) -> PublicSet | None:
    """Read the list and every picture it names; None where the settings name no public set.

    Raises ConfigError with private normalisation, DataError for a list or a picture that cannot be used.
    """
    verification = settings.verification
    if verification.public_dir == "none":
        return None
    if settings.model.normalisation == "private":
        raise ConfigError(
            [
                'verification.public_dir scores the global model, and with model.normalisation = "private" there is '
                'no single one; use "shared" or leave verification.public_dir out.'
            ]
        )
    root, file = Path(verification.public_dir), Path(verification.public_pairs)
    require_folder(root, "verification.public_dir is the folder with one folder a person, such as LFW's")
    if not file.is_file():
        raise DataError(
            f"verification.public_pairs: {file.name} is neither in {root} nor at {file}; "
            "give LFW's pairs.txt, by its name in that folder or by its own path."
        )
    return _packed(read_pair_list(file), root, file, settings)


def _packed(listed: PairList, root: Path, file: Path, settings: Settings) -> PublicSet:
    if listed.fold.max() == 0:
        raise DataError(
            f"{file}: one fold of pairs, but a fold's threshold comes from the other folds; "
            "give a list of several, such as LFW's pairs.txt."
        )
    require_pictures(listed, root)
    pictures = central_pictures(
        listed.paths,
        root,
        image_size=settings.data.image_size,
        crop=settings.verification.public_crop,
        advice="a public pair names it: replace it, or its lines.",
    )
    return PublicSet(pictures=pictures, pairs=FoldPairs(listed.first, listed.second, listed.genuine, listed.fold))


class PublicScorer:
    """Scores the global model on the public pairs, on this machine's fastest device, in float32."""

    def __init__(self, public: PublicSet, recogniser: Recogniser, manifest: Manifest) -> None:
        """recogniser: any with the manifest's tensors; its values are overwritten at each score."""
        self._public, self._recogniser, self._manifest = public, recogniser, manifest
        self._device = resolve_device("auto")

    @torch.no_grad()
    def scores(self, model: NDArray[np.float32], between: Callable[[], object]) -> dict[str, float]:
        """round_public_accuracy (ten-fold), round_public_auc and round_public_eer of a global model.

        model: [manifest.size] float32.  between: called between batches; it may raise to end the work.
        Raises TrainingFailed when the scores are not finite.
        """
        load_shared(self._recogniser, model, self._manifest)
        self._recogniser.to(self._device).eval()
        pairs = self._public.pairs
        scores = pair_scores(np.concatenate(list(self._embeddings(between))), pairs)
        accuracy, _ = ten_fold_accuracy_of_scores(scores, pairs.genuine, pairs.fold)
        histogram = score_histogram(scores, pairs.genuine)
        return {
            "round_public_accuracy": accuracy,
            "round_public_auc": float(roc_auc(histogram)),
            "round_public_eer": float(eer(histogram)),
        }

    def _embeddings(self, between: Callable[[], object]) -> Iterable[NDArray[np.float32]]:
        every = np.arange(len(self._public.pictures))
        for batch in evaluation_batches(self._public.pictures, every, batch_size=BATCH, device=self._device):
            between()
            yield self._recogniser.embed(batch).float().cpu().numpy()


def public_scorer(settings: Settings, recogniser: Recogniser, manifest: Manifest) -> PublicScorer | None:
    """The scorer of the run's public set, or None where the settings name none.  Raises as `open_public_set`."""
    public = open_public_set(settings)
    return None if public is None else PublicScorer(public, recogniser, manifest)

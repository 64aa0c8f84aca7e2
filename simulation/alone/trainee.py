"""Who is trained without a federation: one holder, or all holders' pictures in one place."""

from collections.abc import Mapping
from dataclasses import dataclass

from clients.local_update import val_people_digest
from clients.site import SiteSettings
from common.faces.pack import FacePack, labels_of, union_pack
from common.faces.splits import Split
from common.metrics.sums import EvaluationSums, pooled
from common.models.recogniser import Recogniser, build_recogniser, for_people
from common.settings import Settings
from common.system.runtime import num_cores, stream_seed
from common.training.autotune import resolve_compute, threads_for
from common.training.compute import on_devices
from common.training.evaluation import evaluate
from common.training.loop import Compute


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """A recogniser, the pictures it is trained on, and the clients whose test data score it."""

    name: str  # of its random streams: a client's name, or "centralized"
    settings: Settings
    compute: Compute
    recogniser: Recogniser
    pack: FacePack
    clients: Mapping[str, FacePack]  # in order of their names
    labels: Mapping[str, slice]  # client -> the labels of its own people

    def own(self, client: str) -> Recogniser:
        """The recogniser with the head's rows of one client's people: accuracy is over a client's own identities."""
        return for_people(self.recogniser, self.labels[client]) if len(self.clients) > 1 else self.recogniser

    def evaluate(self, split: str) -> dict[str, EvaluationSums]:
        """The present model on one split ("val" or "test") of each client: client -> sums."""
        most = self.settings.verification.max_pairs
        return {
            name: evaluate(self.own(name), pack, split, self.compute, max_pairs=most)
            for name, pack in self.clients.items()
        }

    def evaluate_pooled(self, split: str) -> EvaluationSums:
        """The same, summed over the clients: pairs within each client's people only, as in a federation."""
        return pooled(self.evaluate(split))

    @property
    def val_people(self) -> str:
        """A digest of the validation people, formed as the federation's server does it."""
        most = self.settings.verification.max_pairs
        return "+".join(val_people_digest(pack, most) for pack in self.clients.values())

    def sizes(self) -> dict[str, int]:
        """Pictures by what they serve, and people to train on, as the tracking shows them."""
        return {
            "num_training_people": self.pack.num_classes,
            "num_training_pictures": len(self.pack.indices(Split.TRAIN)),
            "num_val_pictures": len(self.pack.indices(Split.VAL_PICTURES)),
            "num_test_pictures": len(self.pack.indices(Split.TEST_PICTURES)),
            "num_val_people_pictures": len(self.pack.indices(Split.VAL_PEOPLE)),
            "num_test_people_pictures": len(self.pack.indices(Split.TEST_PEOPLE)),
        }


def _compute(settings: Settings, site: SiteSettings, num_training_pictures: int) -> Compute:
    devices = site.device.split(",")
    compute = resolve_compute(
        settings,
        device=devices[0],
        threads=threads_for(settings, 1, num_cores()),
        cache_dir=site.cache_dir,
        num_training_pictures=num_training_pictures,
    )
    return on_devices(compute, devices)


def _trainee(settings: Settings, site: SiteSettings, name: str, packs: Mapping[str, FacePack]) -> Trainee:
    pack = union_pack(packs) if len(packs) > 1 else next(iter(packs.values()))
    recogniser = build_recogniser(
        settings.model,
        num_people=pack.num_classes,
        image_size=settings.data.image_size,
        backbone_seed=stream_seed(settings.run.seed, "backbone"),  # as in the federation
        head_seed=stream_seed(settings.run.seed, name, "head"),
    )
    return Trainee(
        name=name,
        settings=settings,
        compute=_compute(settings, site, len(pack.indices(Split.TRAIN))),
        recogniser=recogniser,
        pack=pack,
        clients=packs,
        labels=labels_of(packs),
    )


def local_trainee(settings: Settings, site: SiteSettings, pack: FacePack) -> Trainee:
    """One holder alone. Its streams are those of the client of the same name in a federation."""
    return _trainee(settings, site, site.name, {site.name: pack})


def centralized_trainee(
    settings: Settings, sites: Mapping[str, SiteSettings], packs: Mapping[str, FacePack]
) -> Trainee:
    """All holders' pictures in one place, with one head over all their people.

    sites, packs: by client, in order of their names.  Raises DataError when the packs do not fit together.
    """
    return _trainee(settings, next(iter(sites.values())), "centralized", packs)

"""`facefed privacy attack`: what a hostile server gets out of this site's own code, with its policy and without.

Each attack is played in this process against the client's own message handler (`clients/message_handler.py`), on the
site's own pictures, with a state folder that goes with it: first with a policy that allows anything, as negative
control, then with the site's.  Nothing is sent anywhere.
"""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np
from flwr.app import ArrayRecord, RecordDict
from numpy.typing import NDArray

from clients.message_handler import answer
from clients.policy import OWN_MACHINE, Policy, digest_of
from clients.site import SiteSettings
from common import config
from common.errors import EXIT_DONE
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.metrics.sums import NUM_BINS
from common.models.recogniser import build_recogniser, shared_names
from common.protocol import wire
from common.protocol.codec import encode
from common.protocol.parameters import Manifest, flatten, manifest_of
from common.protocol.refusals import refused_setting
from common.protocol.wire import Task
from common.settings import Settings
from common.system.runtime import stream_seed
from common.training.evaluation import people_digest
from simulation.admin import imprint

# Of the control: no limit at all, and no received model is looked at.
OPEN: Final = dataclasses.replace(OWN_MACHINE, first_model=False, max_move=0.0, max_extra_models=10**9)
VARIANTS, PROBES = 5, 12  # crafted models that are tried; models that are scored
PRINTED: Final = 0.99  # correlation from which on a picture counts as read; another picture's is 0.85 at most
DRIFT_ROUNDS, DRIFT_STEP = 30, 0.89  # rounds; of a weight's norm in each, which max_relative_move lets pass
Buffer = NDArray[np.float32]


@dataclass(kw_only=True)
class Hostile:
    """A server that asks a site what it likes."""

    site: SiteSettings
    settings: Settings
    pack: FacePack
    asked: int = 0
    refusals: list[str] = field(default_factory=list)

    def ask(self, kind: str, model: Buffer | None = None, **task: Any) -> RecordDict | None:  # noqa: ANN401 - of Task
        """The site's answer, or None where it gave none.  task: fields of Task, and `settings`."""
        settings = task.pop("settings", self.settings)
        _, manifest = first_model(settings)
        run = task.pop("run_id", f"run-{self.asked}")
        words = Task(
            kind=kind,
            run_id=f"{run}-{digest_of(self.site.policy)}",  # what a process keeps of a run is of one policy
            server_round=task.pop("server_round", 0 if kind != "train" else 1),
            settings=config.to_json(settings),
            manifest=manifest.digest,
            precision="float32",
            memory_format="contiguous",
            **task,
        )
        self.asked += 1
        reply = answer(self.site, wire.task_content(words, _packed(model)))
        if isinstance(reply, str):
            self.refusals.append(refused_setting(reply) or reply)
            return None
        return reply


def _packed(model: Buffer | None) -> ArrayRecord | None:
    return None if model is None else wire.pack_shared(encode(model, "float32"))


@functools.lru_cache(maxsize=8)
def first_model(settings: Settings, seed: int | None = None) -> tuple[Buffer, Manifest]:
    """A run's first model, [size] float32, as the server makes it; of another seed one that is no run's."""
    recogniser = build_recogniser(
        dataclasses.replace(settings.model, pretrained="none"),
        num_people=2,
        image_size=settings.data.image_size,
        backbone_seed=stream_seed(settings.run.seed if seed is None else seed, "backbone"),
        head_seed=0,
    )
    state = recogniser.state_dict()
    manifest = manifest_of({name: state[name] for name in shared_names(recogniser, settings.model.normalisation)})
    return flatten(state, manifest), manifest


def _with(settings: Settings, **values: object) -> Settings:
    """values: section__key."""
    return config.with_values(settings, {name.replace("__", "."): value for name, value in values.items()})


# ---- the attacks: each returns how much it got, as a number


def crafted_models(server: Hostile) -> float:
    """Models that no seed gives, in a run's first round: how many of them are trained on."""
    models = (first_model(server.settings, seed=1000 + number)[0] for number in range(VARIANTS))
    return float(sum(server.ask("train", model) is not None for model in models))


def _imprint_settings(server: Hostile, **values: object) -> Settings:
    """Of a run whose model prints: the largest patch that the site's policy allows.  values: section__key."""
    side = server.settings.data.image_size
    fitting = [side // parts for parts in (1, 2, 4, 8) if 1 / parts <= server.site.policy.max_patch_fraction]
    settings = config.with_values(server.settings, {**imprint.SETTINGS, "model.patch_size": fitting[0]})
    return _with(settings, **values)


def drifted(server: Hostile, brightest: float = imprint.BRIGHTEST) -> float:
    """An honest first model that goes to one which prints, within the limits of a round: how many pictures are read.

    What is read of smaller patches is their mean, repeated.
    """
    settings = _imprint_settings(server, federation__rounds=DRIFT_ROUNDS)
    model, manifest = first_model(settings)
    target, _ = imprint.crafted(settings, brightest)
    pictures = np.asarray(server.pack.pictures[server.pack.indices(Split.TRAIN)])
    best = np.zeros(len(pictures))
    for server_round in range(1, DRIFT_ROUNDS + 1):
        reply = server.ask("train", model, run_id="drifted", settings=settings, server_round=server_round)
        if reply is not None:
            read = imprint.read_pictures(wire.read_change(reply), manifest)
            best = np.maximum(best, imprint.best_correlations(imprint.repeated(read, pictures.shape[1]), pictures))
        if "run" in server.refusals or np.allclose(model, target):  # it is over; or nothing new is asked any more
            break
        model = imprint.toward(model, target, manifest, DRIFT_STEP)
    return float((best > PRINTED).sum())


def imprinted(server: Hostile, brightest: float = imprint.BRIGHTEST) -> float:
    """A model that prints single pictures into its change: how many training pictures one reply gives back."""
    side = server.settings.data.image_size
    settings = config.with_values(server.settings, {**imprint.SETTINGS, "model.patch_size": side})
    model, manifest = imprint.crafted(settings, brightest)
    reply = server.ask("train", model, settings=settings)
    if reply is None:
        return 0.0
    read = imprint.read_pictures(wire.read_change(reply), manifest)
    pictures = np.asarray(server.pack.pictures[server.pack.indices(Split.TRAIN)])
    return float((imprint.best_correlations(read, pictures) > PRINTED).sum())


def huge_rate(server: Hostile) -> float:
    """A learning rate of 20, which carries a picture through the rounding of a change: how many answers."""
    settings = _with(server.settings, training__lr=20.0)
    return float(server.ask("train", first_model(settings)[0], settings=settings) is not None)


def few_people(server: Hostile) -> float:
    """A run over six people, half of them held out: of how few pictures an update is made; 0: of none."""
    settings = _with(server.settings, data__max_people=6, data__fraction_test_people=0.5)
    reply = server.ask("train", first_model(settings)[0], settings=settings)
    return 0.0 if reply is None else float(_sums(reply)["num-examples"])


def swapped_model(server: Hostile) -> float:
    """An honest first round, then another model of the same size: whether that is trained on."""
    run = "swapped"
    model, _ = first_model(server.settings)
    reply = server.ask("train", model, run_id=run)
    if reply is None:
        return 0.0
    other = first_model(server.settings, seed=1000)[0]
    return float(server.ask("train", other, run_id=run, server_round=2) is not None)


def probed_models(server: Hostile) -> float:
    """Models that are only scored, each a question about one pixel: how many are answered beyond the run's rounds."""
    run, rounds = "probed", 1
    settings = _with(server.settings, federation__rounds=rounds)
    model, _ = first_model(settings)
    answered = 0
    for number in range(PROBES):
        nudged = model + np.float32(1e-7 * number)
        reply = server.ask("evaluate", nudged, run_id=run, settings=settings, splits="val")
        answered += reply is not None
    return float(max(0, answered - rounds))


def names_by_dictionary(server: Hostile) -> float:
    """Digests of the join answer that a list of names explains: who guesses the right people, sees it."""
    reply = server.ask("join")
    if reply is None:
        return 0.0
    told = set(dict(reply["site"]).values())
    return float(people_digest(server.pack, "test") in told)


def single_pairs(server: Hostile) -> float:
    """The scores of pairs that stand alone in a bin, of a run over six people: how many can be read."""
    settings = _with(server.settings, data__max_people=6)
    reply = server.ask("evaluate", first_model(settings)[0], settings=settings, splits="test")
    arrays: Any = reply.get("arrays", {}) if reply is not None else {}
    if "test-counts" not in arrays:
        return 0.0
    counts = np.frombuffer(arrays["test-counts"].data, dtype=arrays["test-counts"].dtype)[: 2 * NUM_BINS]
    return float((counts == 1).sum())


def costly_tasks(server: Hostile) -> float:
    """Tasks of 10^9 epochs, of a round 2^40, of 2,000 splits, of 10^5 threads: how many are begun."""
    model, _ = first_model(server.settings)
    long = _with(server.settings, federation__local_epochs=10**9)
    before = len(server.refusals)
    server.ask("train", first_model(long)[0], settings=long)
    server.ask("train", model, server_round=2**40)
    server.ask("evaluate", model, splits="val " * 2000)
    server.ask("evaluate", model, threads=100_000)
    return float(4 - (len(server.refusals) - before))


def _sums(reply: RecordDict) -> dict[str, Any]:
    return dict(reply["sums"])


@dataclass(frozen=True)
class Attack:
    """One row of what is played."""

    name: str
    got: str  # what the number counts
    play: Callable[[Hostile], float]
    has_control: bool = True  # it can be played without a policy


ATTACKS: Final = (
    Attack("crafted first model", f"of {VARIANTS} variants trained on", crafted_models),
    Attack("imprint from one reply", f"training pictures read, correlation above {PRINTED}", imprinted),
    Attack("slow drift to an imprint", f"training pictures read in {DRIFT_ROUNDS} rounds", drifted),
    Attack("learning rate of 20", "update returned", huge_rate),
    Attack("update of a few pictures", "pictures behind an update (0: none)", few_people),
    Attack("another model in mid-run", "trained on", swapped_model),
    Attack("pixel probing by scores", f"of {PROBES} models scored beyond the run's rounds", probed_models),
    Attack("names by dictionary", "digests confirmed by a right guess", names_by_dictionary, has_control=False),
    Attack("scores of single pairs", "pairs that stand alone in a bin", single_pairs),
    Attack("endless or impossible tasks", "of 4 begun", costly_tasks, has_control=False),
)


@dataclass(frozen=True)
class Played:
    """What an attack got."""

    attack: Attack
    without: float | None  # with a policy that allows anything; None: it would not end
    within: float  # with the site's
    refused: Sequence[str]  # the settings that the site's policy named


def play(attacks: Sequence[Attack], site: SiteSettings, settings: Settings, pack: FacePack) -> Iterator[Played]:
    """Each attack without and with the policy of the site."""
    settings = _with(settings, federation__local_epochs=1, training__head_warmup_epochs=0, tracking__plots="none")
    for attack in attacks:
        without = _one(attack, site, OPEN, settings, pack).got if attack.has_control else None
        within = _one(attack, site, site.policy, settings, pack)
        yield Played(attack, without, within.got, tuple(dict.fromkeys(within.refused)))


@dataclass(frozen=True)
class _Got:
    got: float
    refused: Sequence[str]


def _one(attack: Attack, site: SiteSettings, policy: Policy, settings: Settings, pack: FacePack) -> _Got:
    with tempfile.TemporaryDirectory(prefix="facefed-attack-") as folder:
        own = dataclasses.replace(site, state_dir=Path(folder), policy=policy)
        server = Hostile(site=own, settings=settings, pack=pack)
        return _Got(attack.play(server), server.refusals)


def report(site: SiteSettings, settings: Settings, pack: FacePack, out: TextIO) -> int:
    """Print what each attack got."""
    out.write(f"{site.name}: policy {digest_of(site.policy)}; the control allows anything\n")
    for played in play(ATTACKS, site, settings, pack):
        control = "not played" if played.without is None else f"{played.without:g}"
        refused = f"; refused: {', '.join(played.refused)}" if played.refused else ""
        out.write(f"{played.attack.name}: without a policy {control}, with it {played.within:g}")
        out.write(f" ({played.attack.got}){refused}\n")
        out.flush()
    return EXIT_DONE

"""Trained-looking runs of tiny models in a folder, as the training programs leave them, for tests of the comparison."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from clients.private_state import save_private
from common import config
from common.faces.pack import FacePack
from common.models.recogniser import Recogniser, build_recogniser, private_names, shared_names
from common.settings import Settings
from common.system.checkpoints import write_tensors
from common.training.loop import Compute, make_optimiser
from simulation.compare.comparison import Comparison, describe, gaps_of, notes_of, with_pooled
from simulation.compare.model_lookup import FoundModel
from simulation.compare.scoring import score
from tests.tiny_federation import SIDE, settings_with, tiny_pack

CPU = Compute(device="cpu", precision="float32", memory_format="contiguous", threads=1)
CLIENTS = ("alpha", "beta")
PACKS: dict[str, FacePack] = {name: tiny_pack(name) for name in CLIENTS}


def model_of(settings: Settings, num_people: int, seed: int) -> Recogniser:
    """A model whose normalisation is not the initial one, so that a forgotten tensor shows."""
    made = build_recogniser(
        settings.model, num_people=num_people, image_size=SIDE, backbone_seed=seed, head_seed=seed + 1
    )
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            if name.endswith("running_mean"):
                tensor.uniform_(-0.3, 0.3)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 2.0)
    return made


def write_run(
    out: Path,
    run_id: str,
    *,
    mode: str = "local",
    clients: tuple[str, ...] = ("alpha",),
    strategy: str = "",
    seed: int = 1,
    metrics: dict | None = None,
    **values: object,
) -> Recogniser:
    """A finished run; values: settings as section__key.  Returns the model that it kept as its best, of round 2."""
    settings = settings_with(**values)
    folder = out / run_id
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(config.to_toml(settings))
    about = {
        "mode": mode,
        "strategy": strategy,
        "backbone": settings.model.backbone,
        "normalisation": settings.model.normalisation,
        "clients": sorted(clients),
    }
    (folder / "run.json").write_text(json.dumps(about))
    name = "best_round" if mode == "federated" else "best_epoch"
    (folder / "metrics.json").write_text(json.dumps({name: 2} if metrics is None else metrics))
    model = model_of(settings, sum(PACKS[c].num_classes if c in PACKS else 6 for c in clients), seed)
    if mode != "federated":
        write_tensors(folder / "checkpoints" / "best.safetensors", model.state_dict(), {"epoch": "2"})
        return model
    shared = {n: t for n, t in model.state_dict().items() if n in shared_names(model, settings.model.normalisation)}
    write_tensors(folder / "checkpoints" / "round-000002.safetensors", shared, {"round": "2"})
    return model


def write_private(
    out: Path, run_id: str, client: str, model: Recogniser, settings: Settings, *, seed: int = 9
) -> Recogniser:
    """The client's private state after round 2; returns its whole model."""
    own = model_of(settings, PACKS[client].num_classes, seed)
    shared = set(shared_names(own, settings.model.normalisation))
    own.load_state_dict({n: t for n, t in model.state_dict().items() if n in shared}, strict=False)
    optimiser = make_optimiser(own, settings.training)
    folder = out / "clients" / client / "private" / run_id
    save_private(folder, 2, own, optimiser, private_names(own, settings.model.normalisation))
    return own


def one_person_test(pack: FacePack) -> FacePack:
    """The pack with the pictures of only one test person left."""
    from dataclasses import replace

    from common.faces.splits import Split

    testers = np.flatnonzero(pack.split == Split.TEST_PEOPLE)
    first = pack.person[testers[0]]
    keep = np.ones(len(pack), dtype=bool)
    keep[testers[pack.person[testers] != first]] = False
    return replace(pack, pictures=pack.pictures[keep], person=pack.person[keep], split=pack.split[keep])


def compare(models: list[FoundModel], packs: Mapping[str, FacePack]) -> Comparison:
    """The models scored on the packs' people never seen, as `facefed evaluate --mode all` does."""
    test_sets = with_pooled({name: describe(name, pack) for name, pack in packs.items()})
    scored = {model.name: score(model, packs, tuple(packs), CPU, 1) for model in models}
    return Comparison(
        mode="all",
        backbone="cnn",
        seed=1,
        models=models,
        test_sets=test_sets,
        scored=scored,
        gaps=gaps_of(models, list(test_sets), scored),
        notes=notes_of(models, scored),
    )

"""Every setting changes what happens, not only what is parsed: a model's hash, a pack, a schedule, a file, a wait.

One client of the federation is trained in this process, as the ClientApp does it, on a small folder of random pictures.
A setting that stands in no table here fails `test_every_setting_has_its_proof`.
"""

import dataclasses
import io
import itertools
import json
import logging
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Message
from in_process import LocalMailbox, federate_in, site_at, two_rounds
from PIL import Image
from tiny_federation import ScriptedMailbox, client, federation_over, reply_to, settings_with

from clients.local_update import join
from clients.masked_reply import is_masked, step_of
from common import config
from common.errors import (
    ConfigError,
    DataError,
    FaceFedError,
    NotEnoughClients,
    ReplyRefused,
    SecureSumRefused,
    UserError,
)
from common.faces.batches import twin_batches
from common.faces.pack import FacePack, open_pack
from common.metrics.figures import AUC
from common.metrics.groups import GROUP_ROW, group_errors, pairs_of_groups
from common.protocol import wire
from common.protocol.beats import Beat
from common.protocol.codec import encode
from common.protocol.parameters import buffer_sha256, flatten
from common.protocol.secure_vector import layout_of
from common.protocol.secure_words import WorkAsked
from common.protocol.wire import Task
from common.secagg.quantise import COUNT_WORDS
from common.secagg.sites import threshold_of
from common.settings import ALIGNMENTS, INFERENCES, Settings
from common.system.checkpoints import write_tensors
from common.system.files import read_json
from common.tracking.card import Card, model_card
from common.training import step as training_step
from server.aggregate import aggregate_for
from server.app import initial_model
from server.exchange.mailbox import Waiter
from simulation.alone.studies import run_ablation
from simulation.commands import Machine, train_local
from simulation.data.synthetic import SynthSettings, write_dataset
from tests.tiny_settings import TINY, changed

pytestmark = pytest.mark.usefixtures("one_thread", "in_a_run")
PEOPLE = {f"p{number}": 8 for number in range(8)} | {"q0": 3, "q1": 3}

BASE = changed(
    TINY,
    augmentation__rotation_rad=0.1,
    training__clip_norm=0.5,
    federation__proximal_mu=0.5,
    federation__min_clients=1,
    federation__join_timeout_s=60.0,
)

# setting -> another value; the model's SHA-256 after two rounds changes (each from BASE and the settings below)
CHANGES_THE_MODEL: dict[str, object] = {
    "run.seed": 2,
    "data.image_size": 40,
    "augmentation.flip": 0.0,
    "augmentation.crop": 0.0,
    "augmentation.rotation_rad": 0.3,
    "augmentation.colour": 0.0,
    "model.backbone": "mobilenet_v2",
    "model.width": 0.5,
    "model.embedding_size": 24,
    "model.head": "arcface",
    "model.head_scale": 20.0,
    "model.head_margin": 0.1,
    "model.head_sample": 0.5,
    "model.dropout": 0.3,
    "model.normalisation": "private",
    "model.norm": "group",
    "model.patch_size": 8,
    "model.depth": 1,
    "model.attention": "dcal",
    "model.glca_fraction": 1.0,
    "training.optimiser": "adamw",
    "training.lr": 0.02,
    "training.momentum": 0.5,
    "training.weight_decay": 0.1,
    "training.batch_size": 12,
    "training.warmup_fraction": 0.5,
    "training.label_smoothing": 0.2,
    "training.clip_norm": 0.1,
    "training.trainable": "head_side",
    "training.precision": "bfloat16",
    "training.accumulate": 2,  # batch normalisation sees smaller parts
    "training.head_warmup_epochs": 1,
    "training.spreadout": 5.0,
    "training.spreadout_margin": 2.0,
    "training.triplet": 5.0,
    "federation.strategy": "fedprox",
    "federation.server_lr": 0.5,
    "federation.server_momentum": 0.5,
    "federation.server_beta2": 0.5,
    "federation.server_adaptivity": 0.1,
    "federation.rounds": 3,
    "federation.local_epochs": 2,
    "federation.local_steps": 3,
    "federation.proximal_mu": 0.05,
    "federation.upload_codec": "int8",
    "federation.download_codec": "float16",
}
VIT: dict[str, object] = {"model.backbone": "vit_tiny", "model.depth": 2}
NEEDS: dict[str, dict[str, object]] = {
    "federation.proximal_mu": {"federation.strategy": "fedprox"},
    "federation.server_momentum": {"federation.strategy": "fedavgm"},
    "federation.server_beta2": {"federation.strategy": "fedadam"},
    "federation.server_adaptivity": {"federation.strategy": "fedyogi"},
    "model.patch_size": VIT,
    "model.depth": VIT,
    "model.attention": VIT,
    "model.glca_fraction": VIT | {"model.attention": "glca"},
    "training.spreadout": {"training.spreadout_margin": 2.0},
    "training.spreadout_margin": {"training.spreadout": 5.0},
}

# setting -> another value, and what of the pack it changes
CHANGES_THE_PACK: dict[str, tuple[object, str]] = {
    "data.min_pictures_per_person": (4, "number"),
    "data.max_people": (6, "number"),
    "data.fraction_val_pictures": (0.4, "split"),
    "data.fraction_test_pictures": (0.4, "split"),
    "data.fraction_val_people": (0.4, "split"),
    "data.fraction_test_people": (0.4, "split"),
    "data.image_size": (40, "pixels"),
}
PROVED: set[str] = set(CHANGES_THE_MODEL) | set(CHANGES_THE_PACK)


def proves(*names: str):
    """Marks the test that shows what these settings do."""
    PROVED.update(names)
    return lambda test: test


def with_setting(settings: Settings, name: str, value: object) -> Settings:
    return config.with_value(settings, *name.split("."), value)


@pytest.fixture(scope="module")
def faces(tmp_path_factory) -> Path:
    """A folder of ten people, 70 random pictures of 40 px."""
    root = tmp_path_factory.mktemp("faces")
    random = np.random.default_rng(0)
    for person, count in PEOPLE.items():
        (root / person).mkdir()
        for number in range(count):
            pixels = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / person / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def celeba(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("celeba") / "data"
    write_dataset(SynthSettings(layout="celeba", num_people=16, pictures_per_person=2), root)
    return root


@pytest.fixture(scope="module")
def hashes(faces, tmp_path_factory):
    """SHA-256 of the model that settings lead to; each distinct settings is trained once."""
    known: dict[Settings, str] = {}

    def sha256(settings: Settings) -> str:
        if settings not in known:
            site = site_at(tmp_path_factory.mktemp("site"), "folder", faces)
            known[settings] = buffer_sha256(two_rounds(settings, site)[0])
        return known[settings]

    return sha256


def pack_of(dataset: str, root: Path, settings: Settings, cache: Path) -> FacePack:
    return open_pack(dataset, root, settings.data, cache, workers=1)


# -------------------------------------------------------------------------------------------------------- the tables


def test_every_setting_has_its_proof():
    every = {f"{s}.{f.name}" for s, kind in config._section_types().items() for f in dataclasses.fields(kind)}
    assert every - PROVED == set(), "these settings have no proof of an effect"
    assert PROVED - every == set(), "these proofs are of settings that are gone"


def test_the_same_settings_give_the_same_model(hashes, faces, tmp_path):
    """Without this the table below would prove nothing."""
    again = buffer_sha256(two_rounds(BASE, site_at(tmp_path, "folder", faces))[0])
    assert again == hashes(BASE)


@pytest.mark.parametrize("name", CHANGES_THE_MODEL)
def test_the_model_depends_on_it(name, hashes):
    base = BASE
    for needed, value in NEEDS.get(name, {}).items():
        base = with_setting(base, needed, value)
    other = with_setting(base, name, CHANGES_THE_MODEL[name])
    assert other != base
    assert hashes(other) != hashes(base)


@pytest.mark.parametrize("name", CHANGES_THE_PACK)
def test_the_pack_depends_on_it(name, faces, tmp_path):
    other, what = CHANGES_THE_PACK[name]
    before = pack_of("folder", faces, BASE, tmp_path)
    after = pack_of("folder", faces, with_setting(BASE, name, other), tmp_path)
    assert after.key != before.key
    if what == "number":
        assert len(after) < len(before)
    elif what == "split":
        assert len(after) == len(before)
        assert not np.array_equal(after.split, before.split)
    else:
        assert after.pictures.shape[1:3] == (other, other)


PRIVATE = {
    "model__backbone": "vit_tiny",
    "model__depth": 1,
    "privacy__unit": "person",
    "privacy__group_people": 3,
    "privacy__clip": 0.1,
}


@proves("secagg.enabled", "secagg.threshold")
def test_secure_aggregation_masks_replies_and_its_threshold_says_how_many_sites_must_stay():
    task = Task(kind="train", run_id="run-1", server_round=1, settings="{}")
    assert not is_masked(task, Settings())
    with pytest.raises(ReplyRefused, match="in the clear"):
        is_masked(task, with_setting(Settings(), "secagg.enabled", value=True))
    assert [threshold_of(fraction, 10) for fraction in (Settings().secagg.threshold, 0.9)] == [7, 9]


@proves("privacy.unit", "privacy.epsilon", "privacy.delta", "privacy.clip", "privacy.group_people")
def test_privacy_changes_the_model_also_where_the_noise_is_the_same(faces, tmp_path, monkeypatch):
    """The noise of each reply is drawn anew, so it is fixed here: what differs then is the settings' doing."""
    monkeypatch.setattr("clients.private_round.secrets.token_bytes", lambda number: bytes(range(number)))

    def model(**values: object) -> str:
        folder = tmp_path / "-".join(["site", *map(str, values.values())])
        return buffer_sha256(two_rounds(changed(BASE, **(PRIVATE | values)), site_at(folder, "folder", faces))[0])

    found = [model(), model(privacy__group_people=2), model(privacy__clip=0.2), model(privacy__epsilon=4.0)]
    found += [model(privacy__delta=1e-6), model(privacy__unit="site", federation__clients_per_round=2)]
    found += [model(privacy__unit="off")]
    assert len(set(found)) == 7


@proves("privacy.noise", "privacy.colluding_sites")
def test_shared_noise_puts_the_sum_on_a_grid_and_needs_sites_that_do_not_tell_theirs():
    shared = {"privacy__noise": "shared", "secagg__enabled": True, "federation__min_clients": 4}
    asked = WorkAsked(attempt=1, members=(), shares={}, most_examples=1, most_pictures=0, sensitivity=0.1, noises=2)
    assert step_of(changed(BASE, **(PRIVATE | shared)), asked) > 0.0
    with pytest.raises(SecureSumRefused, match=r"privacy\.noise"):
        step_of(changed(BASE, **(PRIVATE | shared | {"privacy__noise": "own"})), asked)
    with pytest.raises(ConfigError, match=r"privacy\.colluding_sites = 2"):
        changed(BASE, **(PRIVATE | shared | {"privacy__colluding_sites": 2}))


# -------------------------------------------------------------------------------------------------------------- data


@proves("data.alignment")
def test_alignment_chooses_the_pixels(celeba, tmp_path):
    packs = [
        pack_of("celeba", celeba, changed(BASE, data__alignment=name, data__max_quarantined_fraction=1.0), tmp_path)
        for name in ALIGNMENTS
    ]
    for one, other in itertools.combinations(packs, 2):
        assert not np.array_equal(one.pictures, other.pictures)


@proves("data.box_margin")
def test_the_margin_around_boxes_chooses_the_pixels(celeba, tmp_path):
    tight, wide = (
        pack_of("celeba", celeba, changed(BASE, data__alignment="box", data__box_margin=margin), tmp_path).pictures
        for margin in (0.0, 0.3)
    )
    assert not np.array_equal(tight, wide)


@proves("data.pack")
def test_how_pictures_are_kept_chooses_their_size_on_disk_and_their_pixels_a_little(celeba, tmp_path):
    by_default, raw, jpeg = (
        pack_of("celeba", celeba, changed(BASE, data__pack=name), tmp_path) for name in ("auto", "raw", "jpeg")
    )
    assert by_default.key == raw.key
    assert raw.key != jpeg.key
    apart = np.abs(np.asarray(raw.pictures).astype(int) - np.asarray(jpeg.pictures)).mean()
    assert 0 < apart < 8
    on_disk = [sum(file.stat().st_size for file in (tmp_path / key).glob("*.pictures")) for key in (raw.key, jpeg.key)]
    assert on_disk[1] < on_disk[0]


@proves("data.max_quarantined_fraction")
def test_the_share_of_unreadable_pictures_decides_between_a_pack_and_an_error(tmp_path):
    random = np.random.default_rng(1)
    for person in range(8):
        (tmp_path / f"data/p{person}").mkdir(parents=True)
        for number in range(4):
            pixels = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"data/p{person}/{number}.png")
    (tmp_path / "data/p0/0.png").write_bytes(b"no picture")
    kept = pack_of("folder", tmp_path / "data", BASE, tmp_path / "packs")
    assert len(kept.quarantined) == 1
    with pytest.raises(DataError, match="max_quarantined_fraction"):
        pack_of("folder", tmp_path / "data", changed(BASE, data__max_quarantined_fraction=0.0), tmp_path / "packs")


# ------------------------------------------------------------------------------------------------------------- model


@proves("model.inference")
def test_inference_chooses_the_branch_that_embeds(faces, tmp_path):
    """The same training; other embeddings, so other histograms of the pairs."""
    base = changed(BASE, model__backbone="vit_tiny", model__depth=1, model__attention="glca")
    models, scores = [], []
    for name in INFERENCES:
        settings = changed(base, model__inference=name)
        model, replies = two_rounds(settings, site_at(tmp_path / name, "folder", faces))
        models.append(buffer_sha256(model))
        scores.append(replies[-1].evaluations["val"].pairs.tobytes())
    assert len(set(models)) == 1
    assert len(set(scores)) == 3


@proves("model.pretrained")
def test_pretrained_weights_are_the_first_global_model_and_the_first_local_one(faces, tmp_path, monkeypatch):
    donor, manifest = initial_model(changed(BASE, run__seed=99))
    write_tensors(tmp_path / "donor.safetensors", donor.backbone.state_dict(), {})
    settings = changed(BASE, model__pretrained=str(tmp_path / "donor.safetensors"))
    expected = flatten(donor.state_dict(), manifest)
    np.testing.assert_array_equal(flatten(initial_model(settings)[0].state_dict(), manifest), expected)
    assert not np.array_equal(flatten(initial_model(BASE)[0].state_dict(), manifest), expected)

    seen = []
    monkeypatch.setattr(
        "simulation.alone.baselines.train_and_test",
        lambda _mode, trainee, tracked, *_: (
            seen.append(flatten(trainee.recogniser.state_dict(), manifest)) or _no_summary(tracked)
        ),
    )
    local(settings, faces, tmp_path)
    np.testing.assert_array_equal(seen[0], expected)


def _no_summary(tracked):
    from simulation.alone.baselines import BaselineSummary

    return BaselineSummary(
        folder=tracked.folder,
        epochs=0,
        best_epoch=0,
        best_val_auc=0.0,
        untrained={AUC: 0.5},
        test={AUC: 0.5},
        clients={},
        below_untrained="",
        few_people={},
        twins={},
        registered=[],
    )


def local(settings: Settings, faces: Path, tmp_path: Path, device: str = "auto") -> str:
    """`facefed train local` in this process; returns what it prints."""
    out = io.StringIO()
    settings = changed(settings, run__out=str(tmp_path / "runs"))
    machine = Machine(clients=[f"alpha:folder={faces}"], data_dirs=[], device=device, cache_dir=tmp_path / "packs")
    train_local(settings, machine, "", out)
    return out.getvalue()


# ---------------------------------------------------------------------------------------------------------- training


@proves("training.epochs", "run.out")
def test_local_training_runs_its_epochs_into_its_folder(faces, tmp_path):
    said = local(changed(BASE, training__epochs=3), faces, tmp_path)
    assert "epoch 3 of 3" in said
    assert "epoch 2 of 2" in local(changed(BASE, training__epochs="auto"), faces, tmp_path)
    folders = list((tmp_path / "runs").glob("*/metrics.json"))
    assert sorted(len(read_json(file)["epochs"]) for file in folders) == [2, 3]


@proves("training.device")
def test_local_training_takes_the_device_of_the_settings_unless_one_is_given(faces, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(
        "simulation.alone.baselines.train_and_test", lambda _mode, _trainee, tracked, *_: _no_summary(tracked)
    )
    with pytest.raises(UserError, match="mps is not on this machine"):
        local(changed(BASE, training__device="mps"), faces, tmp_path)
    assert local(changed(BASE, training__device="mps"), faces, tmp_path, device="cpu")


@proves("training.memory_format")
def test_the_memory_format_reaches_the_tensors(faces, tmp_path, monkeypatch):
    from common.models.backbone import CnnTrunk

    seen: set[bool] = set()
    forward = CnnTrunk.forward

    def spy(self, pictures):
        weight = next(module.weight for module in self.modules() if isinstance(module, torch.nn.Conv2d))
        is_last = [t.is_contiguous(memory_format=torch.channels_last) for t in (pictures, weight)]
        seen.add(all(is_last))
        assert any(is_last) == all(is_last), "pictures and weights are laid out alike"
        return forward(self, pictures)

    monkeypatch.setattr(CnnTrunk, "forward", spy)
    for name, expected in (("contiguous", False), ("channels_last", True)):
        seen.clear()
        settings = changed(BASE, training__memory_format=name, federation__rounds=1)
        two_rounds(settings, site_at(tmp_path, "folder", faces))
        assert seen == {expected}


@proves("training.compile", "training.activation_checkpointing")
def test_compiling_and_checkpointing_reach_the_training(faces, tmp_path, monkeypatch):
    """That they leave the gradients alone is shown in tests/unit/test_training_step.py."""
    calls = []
    kept = training_step.eager
    monkeypatch.setattr(training_step, "compiled", lambda: lambda *args: calls.append("compiled") or kept(*args))
    real = training_step.checkpoint
    monkeypatch.setattr(
        training_step, "checkpoint", lambda *args, **how: calls.append("recomputed") or real(*args, **how)
    )
    for number, values in enumerate(({}, {"training__compile": "on"}, {"training__activation_checkpointing": True})):
        settings = changed(BASE, federation__rounds=1, **values)
        two_rounds(settings, site_at(tmp_path / str(number), "folder", faces))
        assert set(calls) == [set(), {"compiled"}, {"recomputed"}][number]
        calls.clear()


@proves("training.threads")
def test_threads_are_torchs_threads(faces, tmp_path):
    try:
        for threads in (2, 1):
            settings = changed(BASE, training__threads=threads, federation__rounds=1)
            two_rounds(settings, site_at(tmp_path, "folder", faces))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)


def test_the_learning_rate_travels_over_all_rounds_and_not_from_anew(faces, tmp_path, monkeypatch):
    """Two rounds of one epoch see the rates of two epochs in one round, and the same batches."""
    seen: list[float] = []
    from common.training import loop as training

    real = training.learning_rate
    monkeypatch.setattr(training, "learning_rate", lambda *args: seen.append(real(*args)) or seen[-1])
    two_rounds(BASE, site_at(tmp_path / "a", "folder", faces))
    apart, seen[:] = list(seen), []
    two_rounds(
        changed(BASE, federation__rounds=1, federation__local_epochs=2), site_at(tmp_path / "b", "folder", faces)
    )
    assert apart == seen
    assert len(set(apart)) == len(apart) > 4


# ------------------------------------------------------------------------------------------------------------- twins


@proves("twins.genuine", "twins.stranger", "twins.twin")
def test_the_settings_of_twins_decide_which_pictures_train_together():
    person = np.repeat(np.arange(12), 8)
    pixels = np.zeros((96, 32, 32, 3), dtype=np.uint8)

    def batches(settings: Settings) -> list[list[int]]:
        made = twin_batches(
            pixels, np.arange(96), person=person, family=person // 2, chosen=np.arange(96), batch_size=16,
            augmentation=settings.augmentation, twins=settings.twins, stream=torch.Generator().manual_seed(1),
            device="cpu",
        )  # fmt: skip
        return [labels.tolist() for _, labels, _ in made]

    seen = [batches(BASE)]
    assert batches(BASE) == seen[0]
    for name, value in (("genuine", 0.1), ("stranger", 0.9), ("twin", 0.9)):
        seen.append(batches(changed(BASE, **{f"twins__{name}": value})))
    assert all(one != other for k, one in enumerate(seen) for other in seen[:k])


@proves("twins.partner")
def test_pwcas_partner_is_anybody_or_the_twin(tmp_path):
    write_dataset(SynthSettings(layout="twins", num_people=12, pictures_per_person=4), tmp_path / "twins")
    vit = {"backbone": "vit_tiny", "patch_size": 8, "depth": 1, "width": 0.125, "attention": "pwca"}
    base = changed(BASE, **{f"model__{name}": value for name, value in vit.items()})

    def model(partner: str, folder: str) -> str:
        site = site_at(tmp_path / folder, "twins", tmp_path / "twins")
        return buffer_sha256(two_rounds(changed(base, twins__partner=partner), site)[0])

    assert model("twin", "a") != model("random", "b")
    assert model("twin", "c") == model("twin", "d")


# ---------------------------------------------------------------------------------------------------------- ablation


@proves("ablation.over", "ablation.values")
def test_an_ablation_trains_the_values_of_its_setting(faces, tmp_path, monkeypatch):
    """Which settings the variants are trained with; how, is shown in tests/integration/test_ablation.py."""
    monkeypatch.setattr("simulation.alone.studies._train", lambda variant, *_: trained.append(variant.settings))
    monkeypatch.setattr("simulation.alone.studies.check_twins", lambda *_: None)
    monkeypatch.setattr("simulation.alone.studies._test_embeddings", lambda *_: None)
    monkeypatch.setattr("simulation.alone.studies._figures", lambda *_: {"variant": ""})
    for name in ("_add_gaps", "_record"):
        monkeypatch.setattr(f"simulation.alone.studies.{name}", lambda *_, **__: None)
    for over, values, expected in (
        ("model.head", "softmax, arcface", [("softmax", 0.05), ("arcface", 0.05)]),
        ("model.head", "arcface, cosface", [("arcface", 0.05), ("cosface", 0.05)]),
        ("training.lr", "0.1, 0.2", [("cosface", 0.1), ("cosface", 0.2)]),
    ):
        trained: list[Settings] = []
        settings = changed(BASE, ablation__values=values, ablation__over=over)
        folder = tmp_path / values
        folder.mkdir()
        site = site_at(tmp_path, "folder", faces)
        run_ablation(settings, site, pack_of("folder", faces, settings, tmp_path), folder, io.StringIO())
        assert [(found.model.head, found.training.lr) for found in trained] == expected


# -------------------------------------------------------------------------------------------------------- federation


def rounds_table(folder: Path) -> dict[int, dict[str, float]]:
    return {int(row["step"]): row for row in read_json(folder / "metrics.json")["rounds_table"]}


@proves("federation.test_every_rounds")
def test_the_test_curve_has_a_point_every_so_many_rounds(faces, tmp_path):
    for every, expected in ((1, {0, 1, 2, 3}), (3, {0, 3})):
        settings = changed(BASE, federation__rounds=3, federation__test_every_rounds=every)
        site = site_at(tmp_path / f"site{every}", "folder", faces)
        folder = federate_in(tmp_path / f"run{every}", settings, LocalMailbox([site]))
        assert read_json(folder / "outcome.json") == {"exit_code": 0, "line": ""}
        table = rounds_table(folder)
        assert all("val_roc_auc" in row for row in table.values())
        best = read_json(folder / "metrics.json")["best_round"]
        assert {step for step, row in table.items() if "round_test_roc_auc" in row} == expected | {best}


@proves("training.patience")
def test_a_federation_stops_when_its_patience_is_over(faces, tmp_path):
    """Where, follows from the validation AUCs of a run without patience, which trains the same rounds first."""

    def table_with(patience):
        site = site_at(tmp_path / f"site-{patience}", "folder", faces)
        settings = changed(BASE, federation__rounds=6, training__patience=patience)
        return rounds_table(federate_in(tmp_path / f"run-{patience}", settings, LocalMailbox([site])))

    aucs = {step: row["val_roc_auc"] for step, row in table_with("off").items() if step > 0}
    assert set(aucs) == set(range(1, 7))
    # The score of model k is known after round k + 1; no better than one before it, it ends the run there.
    worse = next(k for k in range(2, 6) if aucs[k] <= max(aucs[before] for before in range(1, k)))
    assert worse + 1 < 6
    seen = table_with(1)
    assert max(seen) == worse + 1
    assert {step: row["val_roc_auc"] for step, row in seen.items() if step > 0} == {
        step: auc for step, auc in aucs.items() if step <= worse + 1
    }


@proves("federation.clients_per_round")
def test_a_round_has_as_many_clients_as_are_wanted(faces, tmp_path):
    """Three take part, one works in each round; all three score the last model and the best."""
    sites = [site_at(tmp_path, "folder", faces, name) for name in ("alpha", "beta", "gamma")]
    counts = {}
    for wanted in ("all", 1):
        settings = changed(BASE, federation__clients_per_round=wanted)
        folder = federate_in(tmp_path / f"run-{wanted}", settings, LocalMailbox(sites))
        assert read_json(folder / "outcome.json") == {"exit_code": 0, "line": ""}
        table = rounds_table(folder)
        counts[wanted] = [table[step]["round_clients"] for step in (1, 2)]
        assert set(read_json(folder / "metrics.json")["clients"]) == {"alpha", "beta", "gamma"}
    assert counts == {"all": [3.0, 3.0], 1: [1.0, 1.0]}


@proves("federation.min_clients", "federation.join_timeout_s")
def test_a_run_waits_for_its_clients_so_long(faces, tmp_path):
    settings = changed(BASE, federation__min_clients=2, federation__join_timeout_s=0.25)
    site = site_at(tmp_path, "folder", faces)
    outcome = read_json(federate_in(tmp_path / "run", settings, LocalMailbox([site])) / "outcome.json")
    assert outcome["exit_code"] == 1
    assert "1 of 2 clients joined within 0.25 s (here: alpha; missing: 1 more)" in outcome["line"]


@proves("federation.round_timeout_s")
def test_a_round_waits_for_its_replies_so_long(faces, tmp_path):
    settings = changed(BASE, federation__round_timeout_s=0.25)
    silent = LocalMailbox(
        [site_at(tmp_path, "folder", faces)], lambda message: message.metadata.message_type == "train"
    )
    outcome = read_json(federate_in(tmp_path / "run", settings, silent) / "outcome.json")
    assert outcome["exit_code"] == 1
    assert "alpha: no answer within 0.25 s" in outcome["line"]


@pytest.mark.usefixtures("in_a_run")
@proves("federation.silence_s")
def test_a_site_that_stands_still_so_long_is_given_up(tmp_path):
    def stands_still(task, message):
        said = wire.beat_content(Beat(client="alpha", work="training", percent=31, still_s=25.0))
        return Message(said, reply_to=message) if task.kind == "train" else client("alpha")(task, message)

    lines = {}
    for silence_s in (20.0, 600.0):
        settings = settings_with(federation__min_clients=1, federation__silence_s=silence_s)
        settings = changed(settings, federation__round_timeout_s="auto", federation__round_attempts=1)
        federation = federation_over(ScriptedMailbox({1: stands_still}), settings, tmp_path / f"run{silence_s}")
        federation.waiter = federation.roster._waiter = Waiter(lambda: False, run_timeout_s=1.0)
        with pytest.raises(FaceFedError) as seen:
            federation.run()
        lines[silence_s] = str(seen.value)
    assert "alpha: its training stands still at 31 % for 25 s (federation.silence_s)" in lines[20.0]
    assert lines[600.0].startswith("the run did not end within 1 s")


# ------------------------------------------------------------------------------------------------------ verification


@pytest.fixture(scope="module")
def public(tmp_path_factory) -> Path:
    """Eight people of three random pictures, and two lists of their pairs."""
    root = tmp_path_factory.mktemp("public")
    random = np.random.default_rng(7)
    for who in range(8):
        (root / f"V{who}").mkdir()
        for number in (1, 2, 3):
            pixels = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"V{who}/V{who}_{number:04d}.jpg")
    for name, shift in (("pairs.txt", 1), ("other.txt", 3)):
        folds = [
            [f"V{who}\t1\t{2 + shift // 2}" for who in range(at, at + 4)]
            + [f"V{who}\t2\tV{(who + shift) % 8}\t{shift}" for who in range(at, at + 4)]
            for at in (0, 4)
        ]
        (root / name).write_text("\n".join(["2\t4", *folds[0], *folds[1]]) + "\n")
    return root


@proves("verification.max_pairs")
def test_a_set_with_more_pairs_is_scored_by_a_design(tmp_path):
    """Ten people of 30 pictures, of whom two are the test's: 60 x 59 / 2 = 1,770 pairs."""
    for who in range(10):
        (tmp_path / "faces" / f"P{who}").mkdir(parents=True)
        for number in range(30):
            pixels = np.random.default_rng(30 * who + number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "faces" / f"P{who}" / f"{number}.png")
    site = site_at(tmp_path / "site", "folder", tmp_path / "faces")
    whole, drawn = join(site, BASE), join(site, changed(BASE, verification__max_pairs=1000))
    assert whole.num_scored_pairs == whole.num_pairs == drawn.num_pairs > 2 * 1000
    assert drawn.num_scored_pairs <= 2 * 1000
    assert (whole.test_pairs, whole.val_people) != (drawn.test_pairs, drawn.val_people)


@proves("verification.public_dir", "verification.public_pairs", "verification.public_crop")
def test_the_public_pairs_give_each_round_scores(faces, public, tmp_path):
    base = changed(BASE, federation__rounds=1)
    named = changed(base, verification__public_dir=str(public), verification__public_pairs=str(public / "pairs.txt"))
    variants = {
        "none": base,
        "some": named,
        "again": named,
        "other pairs": changed(named, verification__public_pairs=str(public / "other.txt")),
        "other crop": changed(named, verification__public_crop=0.5),
    }
    scores = {}
    for name, settings in variants.items():
        site = site_at(tmp_path / name / "site", "folder", faces)
        table = rounds_table(federate_in(tmp_path / name / "run", settings, LocalMailbox([site])))
        assert table.keys() == {0, 1}
        scores[name] = [
            {key: value for key, value in table[step].items() if key.startswith("public/")} for step in (0, 1)
        ]
    assert scores["none"] == [{}, {}]
    names = {"public/ten_fold_accuracy", "public/roc_auc", "public/eer"}
    assert [row.keys() for row in scores["some"]] == [names, names]
    assert scores["again"] == scores["some"]
    assert scores["other pairs"] != scores["some"]
    assert scores["other crop"] != scores["some"]


# ---------------------------------------------------------------------------------------------------------- tracking


@proves("verification.group_people")
def test_errors_are_shown_of_groups_of_so_many_people():
    vectors, person = np.random.default_rng(1).normal(size=(24, 4)).astype(np.float32), np.arange(24) // 3
    pairs = [pairs_of_groups(vectors, person, {"five": range(5), "three": range(5, 8)})]
    shown = [
        [
            row.group
            for row in group_errors(
                pairs, 0.5, changed(BASE, verification__group_people=least).verification.group_people
            )[0]
        ]
        for least in (3, 4, 6)
    ]
    assert shown == [["five", "three"], ["five"], []]


@proves("verification.by")
def test_a_federation_asks_for_the_groups_of_these_attributes():
    sizes = [
        layout_of(None, ["groups"], num_members=3, by=changed(BASE, verification__by=by).verification.by).size
        for by in ("Male", "Male,Young")
    ]
    assert sizes[1] - sizes[0] == 2 * GROUP_ROW * COUNT_WORDS  # two groups more


@proves("tracking.data_licence")
def test_the_licence_stands_in_a_models_card():
    def card(settings):
        return model_card(
            Card(
                opening="", chosen="", data="", settings=settings, is_federated=False, tested={}, intervals="",
                thresholds=None,
            )
        )  # fmt: skip

    assert "CC BY 4.0" in card(changed(BASE, tracking__data_licence="CC BY 4.0"))
    assert "CC BY 4.0" not in card(BASE)


@proves("tracking.enabled", "tracking.uri")
def test_tracking_goes_to_its_address_or_nowhere(faces, tmp_path, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr("common.tracking.run.make_sender", lambda _spool, uri, *_: asked.append(uri))
    monkeypatch.setattr(
        "simulation.alone.baselines.train_and_test", lambda _mode, _trainee, tracked, *_: _no_summary(tracked)
    )
    monkeypatch.chdir(tmp_path)
    local(BASE, faces, tmp_path)
    assert asked == []
    local(changed(BASE, tracking__enabled=True, tracking__uri="http://127.0.0.1:9"), faces, tmp_path)
    local(changed(BASE, tracking__enabled=True, tracking__uri="sqlite:///my.db"), faces, tmp_path)
    assert asked == ["http://127.0.0.1:9", f"sqlite:///{tmp_path}/my.db"]


@proves("tracking.experiment_prefix")
def test_the_prefix_begins_every_experiments_name(faces, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "simulation.alone.baselines.train_and_test", lambda _mode, _trainee, tracked, *_: _no_summary(tracked)
    )
    settings = changed(BASE, tracking__experiment_prefix="mine")
    local(settings, faces, tmp_path)
    federated = federate_in(
        tmp_path / "run", changed(settings, federation__rounds=1), LocalMailbox([site_at(tmp_path, "folder", faces)])
    )
    (spool,) = (tmp_path / "runs").glob("*/spool.jsonl")
    assert json.loads(spool.read_text().splitlines()[0])["experiment"] == "mine_local_alpha"
    first = json.loads((federated / "spool.jsonl").read_text().splitlines()[0])
    assert first["experiment"] == "mine_federated_fedavg"


@proves("tracking.plots")
def test_plots_are_drawn_each_round_at_the_end_or_never(faces, tmp_path, monkeypatch):
    """Curves are drawn in a part of the run's time only: here, where a round takes less than a picture, always."""
    drawn: list[str] = []
    monkeypatch.setattr("server.record.tell.TimeBudget.affords", lambda _: True)
    monkeypatch.setattr(
        "common.tracking.run.TrackedRun.log_figure", lambda _run, _figure, name: drawn.append(name) or Path(name)
    )
    counts = {}
    for plots in ("all", "final", "none"):
        drawn.clear()
        site = site_at(tmp_path / plots, "folder", faces)
        federate_in(tmp_path / plots / "run", changed(BASE, tracking__plots=plots), LocalMailbox([site]))
        counts[plots] = drawn.count("plots/convergence.png")
    assert counts == {"all": 3, "final": 1, "none": 0}


@proves("tracking.tensorboard", "tracking.system_metrics_s")
def test_curves_and_samples_of_the_machine_are_written_or_not(faces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    site = site_at(tmp_path, "folder", faces)
    for name, tensorboard, every_s in (("on", "curves", 10.0), ("off", "none", "off")):
        settings = changed(
            BASE, federation__rounds=1, tracking__tensorboard=tensorboard, tracking__system_metrics_s=every_s
        )
        folder = federate_in(tmp_path / name, settings, LocalMailbox([site]))
        sampled = "system/cpu_utilization_percentage" in (folder / "spool.jsonl").read_text()
        curves = sorted(str(path.parent.relative_to(tmp_path)) for path in (tmp_path / "curves").rglob("*tfevents*"))
        assert sampled == (name == "on")
        assert curves == ["curves/on", "curves/on/alpha"]
    assert not (tmp_path / "logs").exists()


@proves("run.log_level")
def test_the_log_level_is_that_of_our_loggers(faces, tmp_path, capsys):
    from simulation.cli import main

    logger = logging.getLogger("facefed")
    before = (logger.level, list(logger.handlers), logger.propagate)
    try:
        for level in ("error", "debug"):
            argv = ["data", "prepare", "--client", f"folder={faces}", "--device", "cpu", "--log-level", level]
            assert main([*argv, "--cache-dir", str(tmp_path), "--set", "data.image_size=32"]) == 0
            logger.getChild("test").info("a word")
            assert ("a word" in capsys.readouterr().err) == (level == "debug")
    finally:
        logger.setLevel(before[0])
        logger.handlers, logger.propagate = before[1], before[2]


@proves("federation.trim_fraction", "federation.num_malicious", "federation.norm_factor")
@pytest.mark.parametrize(
    ("strategy", "name", "one", "other"),
    [
        ("fedtrimmedavg", "trim_fraction", 0.0, 0.3),
        ("multikrum", "num_malicious", 0, 2),
        ("fedavg", "norm_factor", "off", 2.0),
    ],
)
def test_what_is_done_about_odd_changes_changes_the_aggregate(tmp_path, strategy, name, one, other):
    changes = np.random.default_rng(0).normal(size=(7, 50)).astype(np.float32)
    changes[6] *= 30
    aggregates = []
    for value in (one, other):
        settings = changed(BASE, federation__strategy=strategy, **{f"federation__{name}": value})
        with closing(aggregate_for(settings.federation, 50, tmp_path / "replies")) as aggregate:
            for number, change in enumerate(changes):
                aggregate.add(encode(change, "float32"), 10, f"c{number}")
            aggregate.outliers()
            aggregates.append(aggregate.mean().tobytes())
    assert aggregates[0] != aggregates[1]


@proves("federation.max_weight_factor", "federation.max_change_factor")
@pytest.mark.parametrize(
    ("name", "expected"), [("max_weight_factor", {"off": 3.5, 2.0: 3.0}), ("max_change_factor", {"off": 3.5, 1.0: 1.0})]
)
def test_what_one_client_weighs_and_how_far_it_pulls_is_bounded(tmp_path, name, expected):
    """50 pictures of 1 and 250 of 4 make 3.5, and with 100 of the 250 no more than (50 + 400) / 150 = 3.

    The model is 1 long in each element, so that a change of 4 is refused where it may be as long as the model.
    """
    for value, change in expected.items():
        nodes = {
            1: client("alpha", lambda task: reply_to(task, change=1.0, num_examples=50)),
            2: client("beta", lambda task: reply_to(task, change=4.0, num_examples=250), num_training_pictures=250,
                      num_pictures=500),
        }  # fmt: skip
        values = {"rounds": 1, "min_clients": 1, name: value}
        settings = settings_with(**{f"federation__{key}": one for key, one in values.items()})
        federation = federation_over(ScriptedMailbox(nodes), settings, tmp_path / f"{value}", 1.0)
        federation.run()
        assert federation.model.received == pytest.approx(1.0 + change)


@proves("federation.round_attempts")
def test_a_round_of_which_too_little_can_be_used_is_tried_so_often(tmp_path):
    asked = {}
    for attempts in (1, 2):
        nodes = {1: client("alpha"), 2: client("bad", lambda task: reply_to(task, change=np.nan))}
        mailbox = ScriptedMailbox(nodes)
        federation = federation_over(
            mailbox, settings_with(federation__round_attempts=attempts), tmp_path / str(attempts)
        )
        with pytest.raises(NotEnoughClients):
            federation.run()
        asked[attempts] = sum(node == 1 and task.kind == "train" for node, task in mailbox.tasks)
    assert asked == {1: 1, 2: 2}


@proves("federation.run_timeout_s")
def test_a_run_may_take_so_long(faces, tmp_path):
    outcomes = {}
    for limit in (0.01, "off"):
        folder = federate_in(
            tmp_path / str(limit),
            changed(BASE, federation__run_timeout_s=limit),
            LocalMailbox([site_at(tmp_path / f"at-{limit}", "folder", faces)]),
        )
        outcomes[limit] = read_json(folder / "outcome.json")
    assert outcomes["off"] == {"exit_code": 0, "line": ""}
    assert outcomes[0.01]["exit_code"] == 1
    assert outcomes[0.01]["line"].startswith("the run did not end within 0.01 s (federation.run_timeout_s)")


@proves("federation.refusals_in_a_row")
def test_a_client_that_goes_on_failing_is_asked_so_often_and_no_more(tmp_path):
    asked = {}
    for limit in (2, "off"):
        nodes = {1: client("alpha"), 2: client("bad", lambda task: reply_to(task, change=np.nan))}
        values = {"federation__min_clients": 1, "federation__rounds": 4, "federation__refusals_in_a_row": limit}
        mailbox = ScriptedMailbox(nodes)
        federation_over(mailbox, settings_with(**values), tmp_path / str(limit)).run()
        asked[limit] = sum(node == 2 and task.kind == "train" for node, task in mailbox.tasks)
    assert asked == {2: 2, "off": 4}


@proves("federation.evaluate_only")
def test_a_federation_that_only_evaluates_asks_for_no_training(tmp_path):
    asked = {}
    for alone in (False, True):
        mailbox = ScriptedMailbox({1: client("alpha"), 2: client("beta")})
        settings = settings_with(federation__rounds=1, federation__evaluate_only=alone)
        federation_over(mailbox, settings, tmp_path / str(alone)).run()
        asked[alone] = {task.kind for _, task in mailbox.tasks}
    assert asked == {False: {"join", "train", "evaluate"}, True: {"join", "evaluate"}}


@proves("training.checkpoint_minutes")
@pytest.mark.parametrize(("minutes", "expected"), [("off", 0), (1e-6, 2), (60.0, 0)])
def test_a_round_of_three_epochs_is_kept_between_them_so_often(minutes, expected, tmp_path, faces, monkeypatch):
    written = []
    monkeypatch.setattr("common.training.midway.write_sealed", lambda path, *_: written.append(path.name))
    settings = changed(
        BASE, federation__rounds=1, federation__local_epochs=3, training__checkpoint_minutes=minutes
    )  # fmt: skip
    two_rounds(settings, site_at(tmp_path, "folder", faces))
    assert written == ["midway.safetensors"] * expected

"""A comparison on twins: the kinds of pairs apart, over families, in every form of the report; twins runs are found."""

import csv
import dataclasses
import io
import json
import re

import numpy as np
import pytest

from common.errors import UserError
from common.faces.pack import FacePack
from common.faces.splits import Split
from common.metrics.bootstrap import Drawn, twin_figures
from common.metrics.figures import JUDGED, KINDS, PAIRS, figure_name, figures_of, roc_auc, threshold_at_best_accuracy
from common.metrics.pairs import pair_histogram, pair_histograms
from common.system.console import table
from common.system.runtime import stream_seed
from common.training.evaluation import embed
from simulation.compare.comparison import describe, with_pooled
from simulation.compare.evaluate import Request, evaluate_models
from simulation.compare.model_lookup import Search, Wanted, find_models, registered_name
from simulation.compare.report import csv_text, json_content, kinds_table, metrics, page, terminal_lines
from simulation.compare.scoring import NUM_REPLICATES, POOLED, score
from simulation.data.synthetic import SynthSettings, write_dataset
from tests.comparable_models import CPU, PACKS, compare, model_of, write_run
from tests.tiny_federation import SIDE, settings_with, tiny_pack

TWINS = Wanted(kind="twins")
NAMES = ("alpha", "twins")


def twins_pack() -> FacePack:
    """As `tiny_pack` 6 people to train on; then 3 validation and 5 test families of two, and a test person alone."""
    first = tiny_pack("twins")
    seen = first.person < 6
    rng = np.random.default_rng(3)
    family = np.array([*range(6), *(6 + k - k % 2 for k in range(16)), 22])
    base = 0.75 * rng.integers(0, 256, (23, SIDE, SIDE, 3))[family] + 0.25 * rng.integers(0, 256, (23, SIDE, SIDE, 3))
    person = np.repeat(np.arange(6, 23), 3)
    shots = base[person] + rng.integers(-60, 61, (len(person), SIDE, SIDE, 3))
    return FacePack(
        pictures=np.concatenate([first.pictures[seen], np.clip(shots, 0, 255).astype(np.uint8)]),
        person=np.concatenate([first.person[seen], person]),
        people=tuple(f"twins-{number}" for number in range(23)),
        split=np.concatenate([first.split[seen], np.where(person < 12, Split.VAL_PEOPLE, Split.TEST_PEOPLE)]),
        key="key-of-twins",
        quarantined=(),
        dataset="twins",
        family=family,
    )


PACK = twins_pack()
BOTH = {"alpha": PACKS["alpha"], "twins": PACK}


def of_split(trained, split: Split):
    indices = PACK.indices(split)
    return embed(trained, PACK, indices, CPU).numpy(), PACK.person[indices], PACK.families[PACK.person[indices]]


def find(out, *wanted, clients=("twins",), runs=None, **values):
    search = Search(settings=settings_with(run__out=str(out), **values), clients=clients, command_options="--config t")
    return find_models(search, wanted, runs or {})


def test_the_kinds_have_figures_over_families_at_the_threshold_of_validation(tmp_path):
    trained = write_run(tmp_path, "1", mode="twins", clients=("twins",))
    [model] = find(tmp_path, TWINS)
    scored = score(model, {"twins": PACK}, ("twins",), CPU, 1)["twins"]
    embeddings, person, _ = of_split(trained, Split.VAL_PEOPLE)
    drawn = Drawn.by_seed(
        *of_split(trained, Split.TEST_PEOPLE),
        num_replicates=NUM_REPLICATES,
        seed=stream_seed(1, "twins", "bootstrap"),
    )
    expected = twin_figures(drawn, threshold_at_best_accuracy(pair_histogram(embeddings, person)))
    for kind in KINDS:
        for name in (row.name for row in figures_of(PAIRS, JUDGED)):
            found = scored.figures[figure_name(kind, name)]
            assert vars(found) == pytest.approx(expected[kind][name], abs=1e-9), (kind, name)
    values = {kind: scored.figures[figure_name(kind, "accuracy")].value for kind in KINDS}
    assert len({*values.values(), scored.figures["accuracy"].value}) == 4, "none stands for another"


def test_among_other_clients_twins_are_those_who_have_some_and_strangers_all(tmp_path):
    trained = write_run(tmp_path, "1", mode="twins", clients=("twins",))
    [model] = find(tmp_path, TWINS, clients=NAMES)
    scored = score(model, BOTH, NAMES, CPU, 1)
    alone = score(model, {"twins": PACK}, ("twins",), CPU, 1)["twins"]
    assert not [name for name in scored["alpha"].figures if name.startswith(KINDS)]
    for name in ("twins_roc_auc", "twins_eer", "strangers_tar_at_far_1e-1"):
        assert scored["twins"].figures[name].value == alone.figures[name].value
    assert scored[POOLED].figures["twins_eer"] == alone.figures["twins_eer"]
    embeddings, person, family = of_split(trained, Split.TEST_PEOPLE)
    pairs, twins = pair_histograms(embeddings, person, family)
    rows = PACKS["alpha"].indices(Split.TEST_PEOPLE)
    others = pair_histogram(embed(trained, PACKS["alpha"], rows, CPU).numpy(), PACKS["alpha"].person[rows])
    strangers = pairs + others
    strangers[1] -= twins[1]
    pooled = scored[POOLED].figures["strangers_roc_auc"]
    assert pooled.value == roc_auc(strangers)
    assert pooled.low < pooled.value < pooled.high


def test_without_validation_pairs_there_is_no_threshold_and_no_accuracy_of_pairs(tmp_path):
    write_run(tmp_path, "1", mode="twins", clients=("twins",))
    [model] = find(tmp_path, TWINS)
    split = np.where(PACK.split == Split.VAL_PEOPLE, Split.UNUSED, PACK.split).astype(np.int8)
    pack = dataclasses.replace(PACK, split=split)
    figures = score(model, {"twins": pack}, ("twins",), CPU, 1)["twins"].figures
    assert "twins_roc_auc" in figures
    assert not {"all_accuracy", "twins_accuracy", "strangers_accuracy"} & set(figures)


def test_a_test_set_knows_its_families_and_pairs_by_kind():
    """11 people of 3 pictures: 33 genuine pairs, 30 of twins; 33 x 32 / 2 - 33 impostor pairs, 5 x 9 of siblings."""
    test = describe("twins", PACK)
    assert (test.num_people, test.num_families, test.drawn_over) == (11, 6, "families")
    assert [test.pairs_of(kind) for kind in KINDS] == [(33, 495), (30, 45), (33, 450)]
    both = with_pooled({name: describe(name, pack) for name, pack in BOTH.items()})
    assert both[POOLED].pairs_of("twins") == (30, 45)
    assert both[POOLED].pairs_of("strangers") == (33 + 9, 450 + 27)
    assert both["alpha"].drawn_over == "people"
    assert both[POOLED].drawn_over == "families"


# --------------------------------------------------------------------------------------------------------- the report


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    write_run(out, "t", mode="twins", clients=("twins",))
    write_run(out, "l", clients=("twins",), seed=2)
    write_run(out, "f", mode="federated", clients=NAMES, strategy="fedavg", seed=7)
    wanted = (Wanted(kind="local", client="twins"), TWINS, Wanted(kind="fedavg"))
    return compare(find(out, *wanted, clients=NAMES), BOTH)


def test_the_terminal_shows_the_kinds_where_there_are_twins(compared):
    text = "\n".join(terminal_lines(compared))
    assert "twins: 6 families; twins: 30 genuine and 45 impostor pairs; strangers: 33 genuine and 450 impostor" in text
    assert "bootstrap over families, 1,000 replicates" in text
    assert text.count("accuracy: mean of genuine pairs accepted") == 2, "pooled and twins, not alpha"
    assert table(kinds_table(compared, "twins")) in text
    found = compared.scored["fedavg"]["twins"].figures["twins_roc_auc"]
    row = rf"^fedavg +twins +{found.value:.3f} \[{found.low:.3f}, {found.high:.3f}\]( +\d\.\d{{3}}){{5}}$"
    assert re.search(row, text, re.MULTILINE), text
    assert re.search(r"^fedavg minus twins +twins: twins only +[+-]\d\.\d{3} ", text, re.MULTILINE), text
    assert re.search(r"^fedavg minus local-twins +twins: strangers only +[+-]\d\.\d{3} ", text, re.MULTILINE)
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith("note"))
    assert "nan" not in text


def test_tables_carry_the_kinds_with_their_own_pairs(compared):
    rows = list(csv.DictReader(io.StringIO(csv_text(compared))))
    mine = {r["figure"]: r for r in rows if (r["row"], r["model"], r["tested_at"]) == ("figure", "twins", "twins")}
    counts = {"roc_auc": (33, 495), "twins_eer": (30, 45), "strangers_accuracy": (33, 450), "all_accuracy": (33, 495)}
    for name, pairs in counts.items():
        assert (int(mine[name]["num_genuine_pairs"]), int(mine[name]["num_impostor_pairs"])) == pairs
        assert mine[name]["interval"] == "bootstrap over families, 1,000 replicates"
        assert float(mine[name]["low_95"]) <= float(mine[name]["value"]) <= float(mine[name]["high_95"])
    gaps = {r["figure"]: r for r in rows if (r["row"], r["minus"], r["tested_at"]) == ("gap", "twins", "twins")}
    assert gaps["twins_roc_auc"]["num_impostor_pairs"] == "45"
    assert "twins_roc_auc" not in {r["figure"] for r in rows if r["tested_at"] == "alpha"}
    content = json.loads(json.dumps(json_content(compared), allow_nan=False))
    assert content["test_sets"]["twins"]["twins"] == {"num_genuine_pairs": 30, "num_impostor_pairs": 45}
    assert content["test_sets"]["twins"]["num_families"] == 6
    assert "num_families" not in content["test_sets"]["alpha"]
    assert content["bootstrap"]["over"] == "families"
    assert set(content["models"]["twins"]["tested_at"]["twins"]["twins_eer"]) == {"value", "low_95", "high_95"}
    named = metrics(compared)
    figures = compared.scored["fedavg"]
    assert named["fedavg/test_twins_roc_auc"] == figures[POOLED].figures["twins_roc_auc"].value
    assert named["fedavg/test_twins_roc_auc_low"] == figures[POOLED].figures["twins_roc_auc"].low
    assert named["fedavg/client/twins/test_strangers_eer"] == figures["twins"].figures["strangers_eer"].value
    assert "fedavg_minus_twins/test_twins_roc_auc" in named


def test_the_page_has_the_kinds_and_says_what_they_are(compared):
    text = page(compared, title="t", made="m", pictures={})
    assert text.count("<h2>Twins and strangers</h2>") == 2
    assert "<dt>strangers</dt>" in text
    found = compared.scored["local-twins"]["twins"].figures["strangers_eer"]
    assert f"{found.value:.3f}<small>[{found.low:.3f}, {found.high:.3f}]</small>" in text


# ----------------------------------------------------------------------------------------------------- which are found


def test_the_newest_twins_run_of_a_compared_client_is_found(tmp_path):
    write_run(tmp_path, "1", mode="twins", clients=("twins",))
    write_run(tmp_path, "2", mode="twins", clients=("other",))
    write_run(tmp_path, "3", clients=("twins",))
    [model] = find(tmp_path, TWINS, clients=NAMES)
    assert (model.source, model.name, model.step) == ("1", "twins", 2)
    assert model.checkpoint == tmp_path / "1" / "checkpoints" / "best.safetensors"
    assert find(tmp_path, TWINS, runs={"twins": "2"})[0].source == "2"
    with pytest.raises(UserError, match=r"--run twins=3: that run is local \['twins'\], not twins"):
        find(tmp_path, TWINS, runs={"twins": "3"})
    with pytest.raises(UserError, match=r"Train twins: `facefed train twins --client alpha --model cnn --config t`\."):
        find(tmp_path, TWINS, clients=("alpha",))
    assert registered_name(TWINS, "vit_tiny") == "vit_tiny_twins"


VIT = {"model__backbone": "vit_tiny", "model__patch_size": 16, "model__depth": 1, "model__width": 0.125}


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"model__depth": 2}, "model.depth = 2, twins (1) has 1"),
        ({"model__patch_size": 8}, "model.patch_size = 8, twins (1) has 16"),
        ({"model__attention": "dcal"}, "model.attention = dcal, twins (1) has sa"),
        ({"data__image_size": 48}, "data.image_size = 48, twins (1) has 32"),
    ],
)
def test_vits_of_two_architectures_are_not_compared(tmp_path, monkeypatch, other, said):
    monkeypatch.setattr("tests.comparable_models.model_of", lambda *_: model_of(settings_with(), 6, 1))  # files only
    write_run(tmp_path, "1", mode="twins", clients=("twins",), **VIT)
    write_run(tmp_path, "2", clients=("twins",), **(VIT | other))
    local = Wanted(kind="local", client="twins")
    with pytest.raises(UserError) as caught:
        find(tmp_path, TWINS, local, model__backbone="vit_tiny")
    assert str(caught.value) == (
        f"local-twins (2) has {said}; compare models of one architecture: name another run with --run local-twins=RUN."
    )
    assert len(find(tmp_path, TWINS, model__backbone="vit_tiny")) == 1


def test_both_branches_embed_or_their_share_of_patches_differ(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.comparable_models.model_of", lambda *_: model_of(settings_with(), 6, 1))  # files only
    dcal = VIT | {"model__attention": "dcal"}
    write_run(tmp_path, "1", mode="twins", clients=("twins",), **dcal)
    write_run(tmp_path, "2", clients=("twins",), **dcal, model__inference="both")
    write_run(tmp_path, "3", clients=("twins",), **dcal, model__glca_fraction=0.3)
    local = Wanted(kind="local", client="twins")
    for run, said in (("2", r"model\.inference = both"), ("3", r"model\.glca_fraction = 0\.3")):
        with pytest.raises(UserError, match=said):
            find(tmp_path, TWINS, local, runs={"local-twins": run}, model__backbone="vit_tiny")


# --------------------------------------------------------------------------------------------------------- the command


def test_the_command_leaves_curves_of_twins_alone(tmp_path):
    """From a data set on disk to the files: two models nobody trained."""
    write_dataset(SynthSettings(layout="twins", num_people=24, pictures_per_person=4), tmp_path / "faces")
    out = tmp_path / "runs"
    write_run(out, "t", mode="twins", clients=("twins",))
    write_run(out, "l", clients=("twins",), seed=2)
    said = io.StringIO()
    request = Request(
        mode="single",
        compare="local,twins",
        runs=(),
        clients=("twins",),
        data_dirs=(str(tmp_path / "faces"),),
        device="cpu",
        cache_dir=tmp_path / "packs",
    )
    settings = settings_with(run__out=str(out), tracking__plots="final")
    assert evaluate_models(settings, request, said) == 0
    assert "families; twins: " in said.getvalue()
    [folder] = [path.parent for path in out.glob("*/comparison.json")]
    assert {path.name for path in (folder / "plots").iterdir()} == {
        "auc.png", "roc.png", "det.png", "auc_kinds.png", "roc_twins.png",
    }  # fmt: skip
    assert "ROC curves, twins only" in (folder / "report.html").read_text()

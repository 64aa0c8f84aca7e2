"""The table of figures: a row more appears wherever figures do, and one function serves a figure and its replicates."""

import csv
import io
import json
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from common.errors import ConfigError
from common.metrics import figures
from common.metrics.bootstrap import Drawn, paired_gap, replicates, twin_figures
from common.metrics.figures import (
    CLOSED,
    FIGURES,
    FOLDS,
    PAIRS,
    Figure,
    eer,
    known_scores,
    roc_auc,
    tar_at_far,
    validated,
)
from common.metrics.intervals import intervals_from_sums
from common.metrics.pairs import pair_histogram
from common.metrics.sums import NUM_BINS
from common.plots.comparison import client_comparison
from common.plots.curves import convergence
from common.protocol.wire import Task
from common.system.run_view import RoundLines
from server.record.history import History, Tally, final_metrics, round_metrics
from simulation.alone.sweep_plan import allowed_metrics, load_plan
from simulation.compare.comparison import Comparison, describe, gaps_of, notes_of, with_pooled
from simulation.compare.model_lookup import Search, Wanted, find_models
from simulation.compare.report import csv_text, json_content, metrics, page, terminal_lines
from simulation.compare.scoring import score
from tests.comparable_models import CLIENTS, CPU, PACKS, write_run
from tests.tiny_federation import reply_to, settings_with, sums_with

pytestmark = pytest.mark.usefixtures("one_thread")

Histogram = NDArray[np.int64]
TASK = Task(kind="train", run_id="run", server_round=1, settings="{}", manifest="", splits="val")


def most_accepted(histograms: NDArray[np.float64]) -> NDArray[np.float64]:
    """The TAR at FAR 0.5."""
    return tar_at_far(histograms, 0.5)


OF_PAIRS = Figure(
    name="toy",
    of=PAIRS,
    values=most_accepted,
    title="toy figure\npeople never seen",
    in_rounds=True,
    told="toy",
    kinds=("twins",),
    has_gap=True,
    head="TOY",
    kind_head="TOY",
    words={"TOY": "what is accepted."},
)
OF_CLOSED = Figure(
    name="people",
    of=CLOSED,
    values=lambda closed: closed.num_classes / 100,
    is_best="lowest",
    title="number of people",
    in_rounds=True,
    head="PEOPLE",
    ends=lambda closed: (0.0, closed.num_classes / 50),
    ends_method="by heart",
)
OF_FOLDS = Figure(name="fold_pairs", of=FOLDS, values=lambda folds: folds.sum() / 1e6)


@pytest.fixture
def _more_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "FIGURES", (*FIGURES, OF_PAIRS, OF_CLOSED, OF_FOLDS))


@pytest.mark.usefixtures("_more_rows")
def test_a_row_more_is_scored_recorded_told_and_drawn():
    """Of the 100 genuine pairs of `sums_with(0.6)` 60 lie above all impostors; it has two people."""
    sums = sums_with(0.6)
    expected = {"toy": 0.6, "people": 0.02, "fold_pairs": sums.folds.sum() / 1e6}
    assert expected.items() <= known_scores(sums).items()
    assert {f"test_{name}": value for name, value in expected.items()}.items() <= final_metrics(sums).items()
    recorded = {"val_toy": 0.6, "val_people": 0.02}
    assert recorded.items() <= round_metrics("val", sums).items()
    assert "val_fold_pairs" not in round_metrics("val", sums), "its row names no round"
    history, tally = History(), Tally("val")
    tally.add({"alpha": reply_to(TASK, auc=0.6)})
    assert recorded.items() <= history.score(1, tally).items()
    event = {"kind": "scored", "round": 1, "split": "val", "is_last": True, **recorded}
    assert "toy 0.600" in RoundLines().scored(event)
    drawn = convergence(history.rows())
    assert "People never seen: toy figure" in [axes.get_title() for axes in drawn.axes]
    panels = [axes.get_title() for axes in client_comparison(intervals_from_sums({"alpha": sums})[0]).axes]
    assert {"toy figure\npeople never seen", "number of people"} <= set(panels)


@pytest.mark.usefixtures("_more_rows")
def test_a_row_more_may_be_chosen_by(tmp_path):
    assert allowed_metrics()["val_toy"] == allowed_metrics()["val_twins_toy"] == "maximize"
    assert allowed_metrics()["val_people"] == "minimize"
    assert "val_strangers_toy" not in allowed_metrics(), "its row names the twins alone"
    assert validated()["val_toy"] == ("toy", OF_PAIRS)
    text = '[sweep]\ntrials = 1\nbase = "base"\nmetric = "{}"\n[sweep.space]\n"training.lr" = {{ choices = [0.1] }}\n'
    plan = tmp_path / "sweep.toml"
    plan.write_text(text.format("val_people"), encoding="utf-8")
    assert load_plan(plan).direction == "minimize"
    plan.write_text(text.format("val_nobody"), encoding="utf-8")
    with pytest.raises(ConfigError, match="val_twins_toy"):
        load_plan(plan)


@pytest.mark.usefixtures("_more_rows")
def test_a_row_more_has_an_interval_and_stands_in_every_form_of_the_comparison(tmp_path):
    write_run(tmp_path, "all", mode="centralized", clients=CLIENTS, seed=5)
    write_run(tmp_path, "fed", mode="federated", clients=CLIENTS, strategy="fedavg", seed=7)
    search = Search(settings=settings_with(run__out=str(tmp_path)), clients=CLIENTS)
    models = find_models(search, (Wanted(kind="centralized"), Wanted(kind="fedavg")), {})
    test_sets = with_pooled({name: describe(name, PACKS[name]) for name in CLIENTS})
    scored = {model.name: score(model, PACKS, CLIENTS, CPU, 1) for model in models}
    gaps = gaps_of(models, list(test_sets), scored)
    compared = Comparison(
        mode="all", backbone="cnn", seed=1, models=models, test_sets=test_sets, scored=scored, gaps=gaps,
        notes=notes_of(models, scored),
    )  # fmt: skip
    toy, people = (scored["centralized"]["alpha"].figures[name] for name in ("toy", "people"))
    assert toy.low <= toy.value <= toy.high
    assert toy.low < toy.high
    assert toy.value == most_accepted(scored["centralized"]["alpha"].sums.pairs)
    assert (people.low, people.high) == (0.0, 2 * people.value)
    text = "\n".join(terminal_lines(compared))
    assert "TOY" in text
    assert "PEOPLE" in text
    rows = [row for row in csv.DictReader(io.StringIO(csv_text(compared))) if row["tested_at"] == "alpha"]
    (own,) = (row for row in rows if (row["row"], row["model"], row["figure"]) == ("figure", "centralized", "toy"))
    assert (own["value"], own["low_95"]) == (f"{toy.value:.6f}", f"{toy.low:.6f}")
    assert own["interval"] == "bootstrap over people, 1,000 replicates"
    assert {row["interval"] for row in rows if row["figure"] == "people"} == {"by heart"}
    assert [row["minus"] for row in rows if (row["row"], row["figure"]) == ("gap", "toy")] == ["centralized"]
    content = json.loads(json.dumps(json_content(compared)))
    assert content["models"]["centralized"]["tested_at"]["alpha"]["toy"]["high_95"] == toy.high
    assert "toy" in [gap["figure"] for gap in content["gaps"]]
    assert metrics(compared)["centralized/client/alpha/test_toy"] == toy.value
    html = page(compared, title="t", made="m", pictures={})
    assert "<dt>TOY</dt><dd>what is accepted.</dd>" in html
    assert f"{toy.value:.3f}<small>[{toy.low:.3f}, {toy.high:.3f}]</small>" in html


@pytest.mark.usefixtures("_more_rows")
def test_a_row_more_is_among_the_figures_of_twins_and_their_gaps():
    person = np.repeat(np.arange(12), 4)
    means = np.random.default_rng(1).normal(size=(12, 8))
    one, other = (
        (means[person] + noise * np.random.default_rng(2).normal(size=(48, 8))).astype(np.float32)
        for noise in (0.6, 2.0)
    )
    found = twin_figures(Drawn.by_seed(other, person, person // 2, num_replicates=50, seed=1), 0.5)
    for kind in figures.KINDS:
        assert found[kind]["toy"]["low"] <= found[kind]["toy"]["value"] <= found[kind]["toy"]["high"]
    gap = paired_gap([one], [other], person, person // 2, "twins", "toy", num_replicates=50, seed=1)
    assert gap.low <= gap.value <= gap.high
    assert gap.value > 0


# ------------------------------------------------------------------------------------- one function, to the last bit


def curve_by_hand(histogram: Histogram) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(far, tar) of one histogram, as the figures were worked out before they took leading axes."""
    accepted = np.zeros((2, histogram.shape[1] + 1))
    accepted[:, 1:] = np.cumsum(histogram[:, ::-1], axis=1)
    tar, far = accepted / histogram.sum(axis=1)[:, None]
    return far, tar


def auc_by_hand(histogram: Histogram) -> float:
    far, tar = curve_by_hand(histogram)
    return float(np.trapezoid(tar, far))


def eer_by_hand(histogram: Histogram) -> float:
    far, tar = curve_by_hand(histogram)
    gap = far + tar - 1.0
    after = int(np.argmax(gap >= 0.0))
    share = -gap[after - 1] / (gap[after] - gap[after - 1])
    return float(far[after - 1] + share * (far[after] - far[after - 1]))


def tar_by_hand(histogram: Histogram, level: float) -> float:
    far, tar = curve_by_hand(histogram)
    return float(tar[int(np.searchsorted(far, level, side="right")) - 1])


ONE_BY_ONE: dict[str, tuple[Callable[..., object], Callable[[Histogram], float]]] = {
    "roc_auc": (roc_auc, auc_by_hand),
    "eer": (eer, eer_by_hand),
    **{
        f"tar_at_far_1e-{digits}": (
            lambda histogram, level=10.0**-digits: tar_at_far(histogram, level),
            lambda histogram, level=10.0**-digits: tar_by_hand(histogram, level),
        )
        for digits in (1, 2, 3)
    },
}


def scored_pairs(seed: int) -> Histogram:
    """The pairs of 300 embeddings of 40 people."""
    random = np.random.default_rng(seed)
    person = random.integers(0, 40, 300)
    return pair_histogram((random.normal(size=(40, 24))[person] + random.normal(size=(300, 24))).astype("f4"), person)


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_one_function_gives_a_figure_and_its_replicates_to_the_last_bit(name: str) -> None:
    """Alone, stacked, as counts and as float64: the bits of the plain computation, and scikit-learn's value."""
    function, by_hand = ONE_BY_ONE[name]
    random = np.random.default_rng(9)
    dense = random.poisson(random.random((3, 2, NUM_BINS)) * np.array([[3.0], [50.0]]))  # both sorts in every bin
    histograms = np.concatenate([[scored_pairs(seed) for seed in range(3)], dense])
    expected = [by_hand(histogram) for histogram in histograms]
    assert [float(function(histogram)) for histogram in histograms] == expected
    assert function(histograms).tolist() == expected
    assert function(histograms.reshape(2, 3, 2, NUM_BINS)).ravel().tolist() == expected
    assert replicates({PAIRS: histograms.astype(np.float64)})[name].tolist() == expected
    assert [figures.open_set_scores(histogram)[name] for histogram in histograms] == expected


def test_the_area_is_scikit_learns() -> None:
    histogram = scored_pairs(1)
    bins = np.concatenate([np.repeat(np.arange(NUM_BINS), row) for row in histogram])
    genuine = np.repeat([True, False], histogram.sum(axis=1))
    assert float(roc_auc(histogram)) == pytest.approx(roc_auc_score(genuine, bins), abs=1e-12)


def test_every_row_is_whole_and_names_are_unique_among_what_they_stand() -> None:
    for sums in ((PAIRS, FOLDS, CLOSED), (PAIRS, figures.JUDGED)):
        names = [figure.name for figure in figures.figures_of(*sums)]
        assert len(set(names)) == len(names)
    assert all(figure.is_best in ("highest", "lowest") for figure in FIGURES)
    assert all((figure.ends is None) == (not figure.ends_method) for figure in FIGURES)
    assert not [figure.name for figure in FIGURES if figure.kinds and figure.of != PAIRS]


@pytest.mark.parametrize(
    ("pictures", "people"),
    [
        ([3, 3, 3, 3], 4),  # N = 12, G = 12, 144 / (24 + 12)
        ([2] * 25, 25),
        ([4, 1, 1], 2),  # N = 6, G = 6, 36 / 18: those with one picture weigh little
        ([], 0),
        ([1], 0),  # no pair
    ],
)
def test_the_people_behind_a_histogram_are_counted_from_its_pairs(pictures, people):
    genuine = sum(count * (count - 1) // 2 for count in pictures)
    total = sum(pictures) * (sum(pictures) - 1) // 2
    histogram = np.zeros((2, NUM_BINS), dtype=np.int64)
    histogram[:, 7] = genuine, total - genuine
    assert figures.people_behind(histogram) == people

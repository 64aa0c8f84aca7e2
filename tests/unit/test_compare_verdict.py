"""What a comparison comes to, in sentences; the untrained model as its first row; the cost beside accuracy."""

import csv
import dataclasses
import io
import json

import pytest

from common.metrics.bootstrap import Estimate
from simulation.compare.model_lookup import Search, Wanted, find_models, untrained
from simulation.compare.report import csv_text, json_content, page
from simulation.compare.scoring import score
from simulation.compare.verdict import verdict
from tests.comparable_models import CLIENTS, CPU, PACKS, compare, write_run
from tests.tiny_federation import settings_with

ROUNDS = [
    {"step": 0.0},
    *({"step": n, "time/round_seconds": 30.0, "bytes/up": 1e6, "bytes/down": 2e6} for n in (1.0, 2.0)),
]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    for number, name in enumerate(CLIENTS):
        write_run(out, f"l-{name}", clients=(name,), seed=number + 1)
    epochs = [{"step": 1.0, "epoch_seconds": 100.0}, {"step": 2.0, "epoch_seconds": 50.0}]
    write_run(out, "c", mode="centralized", clients=CLIENTS, seed=5, metrics={"best_epoch": 2, "epochs": epochs})
    told = {"best_round": 2, "rounds_table": ROUNDS, "num_pictures_processed": 900.0}
    write_run(out, "f", mode="federated", clients=CLIENTS, strategy="fedavg", seed=7, metrics=told)
    wanted = (
        *(Wanted(kind="local", client=name) for name in CLIENTS),
        Wanted(kind="centralized"),
        Wanted(kind="fedavg"),
    )
    found = find_models(Search(settings=settings_with(run__out=str(out)), clients=CLIENTS), wanted, {})
    return compare([untrained(found), *found], PACKS)


def with_gaps(compared, *ends):
    """The federated model's gaps in AUC on all clients: to the centralised, the best local and the untrained model."""
    given = iter(ends)

    def changed(gap):
        if (gap.test_set, gap.figure) != ("pooled", "roc_auc"):
            return gap
        value, low, high = next(given)
        return dataclasses.replace(gap, gap=Estimate(value=value, low=low, high=high))

    return dataclasses.replace(compared, gaps=[changed(gap) for gap in compared.gaps])


def test_the_verdict_says_above_below_or_that_nothing_is_clear(compared):
    first, *_ = verdict(with_gaps(compared, (-0.02, -0.03, -0.01), (0.03, 0.01, 0.05), (0.001, -0.02, 0.02)))
    auc = compared.scored["fedavg"]["pooled"].figures["roc_auc"]
    local = next(g.subtrahend for g in compared.gaps if g.test_set == "pooled" and g.subtrahend.startswith("local"))
    assert first.startswith(
        f"Federated (fedavg), on all clients together: AUC {auc.value:.3f} [{auc.low:.3f}, {auc.high:.3f}],"
        " 0.020 [0.010, 0.030] below centralised training;"
        f" 0.030 [0.010, 0.050] above local training ({local.removeprefix('local-')});"
        " no clear difference from the untrained model (+0.001 [-0.020, +0.020])."
    )
    assert "At alpha: " in first
    assert "At beta: " in first


def test_few_people_and_models_below_the_untrained_one_are_warned_of(compared):
    sentences = verdict(compared)
    assert sentences[-1].startswith("Warning: fewer than 10 test people (pooled 6, alpha 3, beta 3)")
    start = compared.scored["untrained"]["pooled"].figures["roc_auc"].value
    worse = [
        m.shown for m in compared.models[1:] if compared.scored[m.name]["pooled"].figures["roc_auc"].value <= start
    ]
    warned = [sentence for sentence in sentences if "not above the untrained model" in sentence]
    assert bool(worse) == bool(warned)
    assert all(name in warned[0] for name in worse)


def test_the_untrained_model_is_the_first_row_of_every_form_and_is_what_training_began_with(compared):
    assert compared.models[0].name == "untrained"
    assert compared.models[0].source == f"random weights, seed {compared.models[0].settings.run.seed}"
    again = score(compared.models[0], PACKS, CLIENTS, CPU, 1)["pooled"]
    assert again.figures == compared.scored["untrained"]["pooled"].figures
    assert not again.num_closed
    first = next(csv.DictReader(io.StringIO(csv_text(compared))))
    assert first["model"] == "untrained"
    assert next(iter(json_content(compared)["models"])) == "untrained"
    text = page(compared, title="t", made="m", pictures={})
    heads = [text.index(f'<th scope="row">{name}') for name in ("untrained", "local alpha", "centralised", "fedavg")]
    assert heads == sorted(heads)
    assert "untrained" in {gap.subtrahend for gap in compared.gaps}


def test_what_training_cost_stands_beside_what_it_reached(compared):
    text = page(compared, title="t", made="m", pictures={})
    assert '<td data-head="time"><span>60 s</span></td><td data-head="sent"><span>6.0 MB</span></td>' in text
    assert '<td data-head="time"><span>2.5 min</span></td><td data-head="sent"><span>-</span></td>' in text
    costs = [row for row in csv.DictReader(io.StringIO(csv_text(compared))) if row["row"] == "cost"]
    assert {(row["model"], row["figure"], float(row["value"])) for row in costs} == {
        ("centralized", "seconds", 150.0), ("fedavg", "seconds", 60.0), ("fedavg", "bytes_up", 2e6),
        ("fedavg", "bytes_down", 4e6), ("fedavg", "num_pictures", 900.0),
    }  # fmt: skip
    told = json.loads(json.dumps(json_content(compared)))["models"]
    assert told["fedavg"]["cost"] == {"seconds": 60.0, "bytes_up": 2e6, "bytes_down": 4e6, "num_pictures": 900.0}
    assert told["untrained"]["cost"] == {}


def test_how_intervals_are_made_is_said_once_below_the_main_table_and_names_are_spelt_one_way(compared):
    text = page(compared, title="t", made="m", pictures={})
    main = text[text.index("All clients together") : text.index("What federation changes")]
    assert main.count("bootstrap over people") == 1
    assert main.index("</table>") < main.index("bootstrap over people")
    assert "centralized" not in text
    assert "local-" not in text

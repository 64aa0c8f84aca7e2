"""A comparison as terminal text, CSV, JSON and one page that needs nothing beside it."""

import csv
import dataclasses
import io
import json
import re
from html.parser import HTMLParser

import pytest

from simulation.compare.model_lookup import Search, Wanted, find_models
from simulation.compare.report import csv_text, json_content, metrics, page, terminal_lines
from tests.comparable_models import CLIENTS, PACKS, compare, write_run
from tests.tiny_federation import settings_with

WANTED = (*(Wanted(kind="local", client=name) for name in CLIENTS), Wanted(kind="centralized"), Wanted(kind="fedavg"))


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    for number, name in enumerate(CLIENTS):
        write_run(out, f"local-{name}", clients=(name,), seed=number + 1)
    write_run(out, "all", mode="centralized", clients=CLIENTS, seed=5)
    write_run(out, "<b>&fed", mode="federated", clients=CLIENTS, strategy="fedavg", seed=7)
    search = Search(settings=settings_with(run__out=str(out)), clients=CLIENTS)
    return compare(find_models(search, WANTED, {}), PACKS)


def test_the_terminal_shows_each_figure_with_what_is_behind_it(compared):
    lines = terminal_lines(compared)
    text = "\n".join(lines)
    assert "pooled: 6 people never seen, 18 pictures, 18 genuine and 54 impostor pairs" in lines
    assert "alpha: 3 people never seen, 9 pictures, 9 genuine and 27 impostor pairs" in lines
    for model in compared.models:
        auc = compared.scored[model.name]["pooled"].figures["roc_auc"]
        row = rf"^{re.escape(model.name)} +{auc.value:.3f} \[{auc.low:.3f}, {auc.high:.3f}\]( +(\d\.\d{{3}}|-)){{5}}$"
        assert re.search(row, text, re.MULTILINE), (row, text)
    assert re.search(r"^fedavg minus local-alpha +alpha +[+-]\d\.\d{3} +\[.*\] +(yes|no)$", text, re.MULTILINE)
    assert re.search(r"^model \\ tested at +pooled +alpha +beta$", text, re.MULTILINE)
    assert all(len(line) <= 120 for line in text.splitlines() if not line.startswith("note"))
    assert "nan" not in text


def test_the_csv_has_a_line_for_each_figure_and_gap(compared):
    rows = list(csv.DictReader(io.StringIO(csv_text(compared))))
    figures = [row for row in rows if row["row"] == "figure"]
    for model in compared.models:
        for place, scored in compared.scored[model.name].items():
            mine = {r["figure"]: r for r in figures if (r["model"], r["tested_at"]) == (model.name, place)}
            assert set(mine) == set(scored.figures)
            for name, estimate in scored.figures.items():
                assert float(mine[name]["value"]) == pytest.approx(estimate.value, abs=1e-6)
            assert mine["roc_auc"]["num_impostor_pairs"] == str(compared.test_sets[place].num_impostor)
            assert float(mine["roc_auc"]["low_95"]) <= float(mine["roc_auc"]["value"])
    assert len([row for row in rows if row["row"] == "gap"]) == len(compared.gaps) == 24
    assert "nan" not in csv_text(compared)


def test_the_json_is_plain_and_says_the_same(compared):
    content = json.loads(json.dumps(json_content(compared), allow_nan=False))
    fedavg = content["models"]["fedavg"]
    assert fedavg["run"] == "<b>&fed"
    shown = fedavg["tested_at"]["pooled"]["roc_auc"]
    assert shown["value"] == compared.scored["fedavg"]["pooled"].figures["roc_auc"].value
    assert content["test_sets"]["beta"]["num_genuine_pairs"] == 9
    assert content["gaps"][0]["model"] == "fedavg"


def test_the_metrics_carry_the_guides_names(compared):
    named = metrics(compared)
    figures = compared.scored["fedavg"]["pooled"].figures
    assert named["fedavg/test_roc_auc"] == figures["roc_auc"].value
    assert named["fedavg/test_roc_auc_low"] == figures["roc_auc"].low
    assert named["fedavg/client/alpha/test_eer"] == compared.scored["fedavg"]["alpha"].figures["eer"].value
    assert named["local-alpha/client/alpha/test_accuracy"] >= 0.0
    assert "local-alpha/test_accuracy" not in named  # it has no head for beta
    assert "fedavg_minus_centralized/test_roc_auc" in named


class _Checked(HTMLParser):
    """Elements must nest; collects what they point to."""

    VOID = ("meta", "img")

    def __init__(self):
        super().__init__()
        self.open, self.elements, self.targets, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.targets += [value for name, value in attributes if name in ("src", "href", "action", "data", "srcset")]
        assert not [name for name, _ in attributes if name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def _parsed(text):
    parser = _Checked()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return parser


def test_the_page_is_whole_and_loads_nothing(compared):
    picture = b"\x89PNG\r\n"
    text = page(compared, title="Models on alpha & beta", made="now", pictures={"ROC curves": picture})
    parsed = _parsed(text)
    assert set(parsed.elements) <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "table", "caption", "thead", "tbody",
        "tr", "th", "td", "span", "small", "ul", "li", "img", "dl", "dt", "dd",
    }  # fmt: skip
    assert parsed.targets == ["data:image/png;base64,iVBORw0K"]
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert "default-src 'none'" in text
    assert "".join(parsed.text).count("alpha") > 4
    auc = compared.scored["fedavg"]["pooled"].figures["roc_auc"]
    assert f"{auc.value:.3f}" in text
    assert f"[{auc.low:.3f}, {auc.high:.3f}]" in text


def test_names_cannot_become_markup(compared):
    hostile = dataclasses.replace(compared, notes=["<script>alert(1)</script>"])
    text = page(hostile, title="<i>", made='"><img src=x>', pictures={'" onload="x': b""})
    parsed = _parsed(text)
    assert not {"script", "i", "b"} & set(parsed.elements)
    assert parsed.targets == ["data:image/png;base64,"]
    shown = "".join(parsed.text)
    assert "<script>alert(1)</script>" in shown
    assert "<b>&fed" in shown

"""The page of a comparison in a real browser: nothing is cut off, on a desk or on a telephone."""

import shutil

import pytest

from simulation.compare.model_lookup import Search, Wanted, find_models, untrained
from simulation.compare.report import page
from tests.comparable_models import CLIENTS, PACKS, compare, write_run
from tests.conftest import skip_or_fail
from tests.tiny_federation import settings_with

# Of the page, and of every table and cell: how much wider its content is than itself.
TOO_WIDE = """() => [document.documentElement, ...document.querySelectorAll('.wide, th, td, p, li, h1')]
    .map((part) => part.scrollWidth - part.clientWidth).filter((over) => over > 1)"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_run(folder, "20261128-135008-c13477", mode="federated", clients=CLIENTS, strategy="fedavg", seed=7)
    for number, name in enumerate(CLIENTS):
        write_run(folder, f"local-{name}", clients=(name,), seed=number + 1)
    wanted = (*(Wanted(kind="local", client=name) for name in CLIENTS), Wanted(kind="fedavg"))
    found = find_models(Search(settings=settings_with(run__out=str(folder)), clients=CLIENTS), wanted, {})
    compared = compare([untrained(found), *found], PACKS)
    path = folder / "report.html"
    path.write_text(
        page(compared, title="resnet18: models on alpha and beta", made="now, run " + "x" * 60, pictures={})
    )
    return path


@pytest.mark.parametrize("width", [1240, 800, 390, 360])
def test_nothing_is_cut_off(written, width):
    from playwright.sync_api import sync_playwright

    binary = shutil.which("chromium")
    if binary is None:
        skip_or_fail("chromium is not installed (Debian's package chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=binary, args=["--no-sandbox", "--disable-gpu"])
        shown = browser.new_page(viewport={"width": width, "height": 800})
        shown.goto(written.as_uri())
        assert shown.evaluate(TOO_WIDE) == []
        heads = shown.locator("thead th", has_text="TAR@FAR 1e-3").first
        assert heads.is_visible() == (width > 896), "a narrow page has a card for each model"
        browser.close()

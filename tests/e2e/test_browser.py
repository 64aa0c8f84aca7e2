"""MLflow's own pages after a federated run, in a real browser: what a user looks for is there, nothing asks outside.

The pages are MLflow's and change with it; the tests go by what a reader sees, not by how a page is built.
"""

import json
import os
import urllib.request

import pytest
from browser import open_chromium
from champions import best_version
from programs import Programs, free_port, run_folder

pytestmark = pytest.mark.e2e
EXPERIMENT, MODEL = "facial_recognition_federated_fedavg", "cnn_federated_fedavg"
SEEN_WITHIN_MS = 120_000  # a page's first drawing on a busy machine
# Any of these would switch MLflow's telemetry off by itself, and the test would pass for the wrong reason.
SILENCING = ("CI", "MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "PYTEST_CURRENT_TEST", "GITHUB_ACTIONS", "TF_BUILD")
POINTS = """() => [...document.querySelectorAll('.js-plotly-plot')].flatMap(
    (plot) => plot.data.map((line) => [line.metricKey, Array.from(line.x), Array.from(line.y)]))"""
WIDTHS = "() => [...document.querySelectorAll('img[src^=\"blob:\"]')].map((image) => image.naturalWidth)"


@pytest.fixture(scope="module")
def chromium():
    """A browser without any traffic of its own."""
    with open_chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(simulated, tmp_path_factory):
    """`facefed tracking serve` over the simulated federation's database."""
    assert simulated.ended.code == 0, simulated.ended
    programs = Programs(tmp_path_factory.mktemp("browser"))
    with pytest.MonkeyPatch.context() as patch:
        for name in {*SILENCING, *(name for name in os.environ if name.startswith("PYTEST_"))}:
            patch.delenv(name, raising=False)
        backend, port = f"sqlite:///{simulated.cwd / 'mlflow.db'}", free_port()
        serve = programs.start("facefed", "tracking", "serve", "--port", port, "--backend", backend, "--no-auth")
    serve.wait_for("healthy: ")
    yield f"http://127.0.0.1:{port}"
    programs.close()


@pytest.fixture
def page(chromium, server):
    """An empty page; at its end nothing was asked of another address, and no script failed."""
    page = chromium.new_page(viewport={"width": 1600, "height": 1200}, base_url=server)
    page.set_default_timeout(SEEN_WITHIN_MS)
    asked, failed = [], []
    page.context.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failed.append(error.message))
    yield page
    page.close()
    assert len(asked) > 10
    assert [url for url in asked if not url.startswith((f"{server}/", f"blob:{server}/", "data:"))] == []
    assert failed == []


@pytest.fixture
def run_page(page, simulated):
    """The federated run's own page, reached as a user does: experiments, runs, the run."""
    page.goto("/#/experiments")
    see(page, "Model training").click()  # MLflow opens at its other half, which is for language models
    see(page, EXPERIMENT).click()
    see(page, f"cnn_fedavg_{run_folder(simulated.cwd).name}").click()
    page.wait_for_url("**/runs/*")
    return page


def see(page, text):
    """Wait until that very text is on the page; returns where it is first."""
    place = page.get_by_text(text, exact=True).first
    place.wait_for()
    return place


def spooled(simulated, key):
    """Steps and values of the run's metric, from its local record."""
    lines = (run_folder(simulated.cwd) / "spool.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["run"] == "" and row.get("key") == key]
    return [row["step"] for row in rows], [row["value"] for row in rows]


def test_the_experiments_are_listed(page):
    page.goto("/#/experiments")
    see(page, EXPERIMENT)


def test_a_federated_run_names_its_clients_and_opens_them(run_page):
    see(run_page, "vggface2")
    see(run_page, "celeba").click()
    see(run_page, "num_training_pictures")
    see(run_page, "gradient_norm")


@pytest.mark.parametrize("metric", ["val_roc_auc", "train_loss", "time/wait_seconds"])
def test_a_federated_run_shows_its_round_curves(run_page, simulated, metric):
    see(run_page, "Model metrics").click()
    run_page.get_by_placeholder("Search metric charts").fill(metric)
    steps, values = spooled(simulated, metric)
    assert len(steps) >= 2
    run_page.wait_for_function(f"({POINTS})().some(([metric]) => metric === '{metric}')")
    shown = [(x, y) for name, x, y in run_page.evaluate(POINTS) if name == metric]
    assert shown  # more than one while the page draws anew
    for x, y in shown:
        assert (x, y) == (steps, pytest.approx(values))


def test_system_metrics_have_a_page_of_their_own(run_page, simulated):
    see(run_page, "System metrics").click()
    metric = "system/cpu_utilization_percentage"
    run_page.wait_for_function(f"({POINTS})().some(([metric]) => metric === '{metric}')")
    assert spooled(simulated, metric)[0]


@pytest.mark.parametrize("picture", ["convergence.png", "roc.png"])
def test_pictures_render(run_page, simulated, picture):
    see(run_page, "Artifacts").click()
    see(run_page, "plots").click()
    see(run_page, picture).click()
    run_page.wait_for_function(f"({WIDTHS})().some((width) => width > 500)")
    from PIL import Image

    with Image.open(run_folder(simulated.cwd) / "plots" / picture) as drawn:
        assert drawn.width in run_page.evaluate(WIDTHS)


def test_the_registered_model_shows_its_alias(page, simulated):
    """Trained so shortly, it may be no better than the untrained one, and then it is no champion of its own."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{simulated.cwd / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.set_registered_model_alias(MODEL, "champion", best_version(client, MODEL))
    page.goto("/#/models")
    see(page, MODEL)
    see(page, "@ champion")
    page.goto(f"/#/models/{MODEL}")
    see(page, "Version 1")
    see(page, "@ champion")


def test_the_pages_send_no_telemetry(page, server):
    """A page asks its own server whether it may, and would send what a user clicks by way of that server."""
    address = f"{server}/ajax-api/3.0/mlflow/ui-telemetry"
    with urllib.request.urlopen(address, timeout=60) as answer:  # noqa: S310 - ours
        assert json.load(answer)["disable_ui_telemetry"] is True
    page.goto("/#/experiments")
    see(page, EXPERIMENT)

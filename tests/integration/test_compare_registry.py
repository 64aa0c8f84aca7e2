"""Models that are only in MLflow's registry: which version is taken, its settings, and its tensors in our backbone."""

import io
import json
from pathlib import Path

import pytest

import simulation.compare.membership
from common import config
from common.errors import TrackingError
from common.models.recogniser import EmbeddingModel
from common.settings import TrackingSettings
from common.system.runtime import PATIENCE, SILENCE
from common.tracking.address import resolve_uri, sqlite_path
from common.tracking.audited import MEMBERSHIP, registered_of_run
from common.tracking.registry import MODEL_CARD, file_of_model, find_registered, read_registered, register_model
from common.tracking.run import open_run
from common.training.evaluation import evaluate
from simulation.compare.membership import AuditRequest, audit_privacy
from simulation.compare.model_lookup import Search, Wanted, find_models
from simulation.compare.scoring import score
from tests.comparable_models import CPU, PACKS, write_run
from tests.tiny_federation import settings_with

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),  # MLflow's tables
    pytest.mark.usefixtures("tables_once"),
]
LOCAL = Wanted(kind="local", client="alpha")
CARD = "A model, models:/alpha_cnn_local/{version}.\n\n## Privacy\n\nNone.\n\n## Limits\n\nMany."


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """A database with two versions of one model, "last" and "best", and the model that "best" was made of."""
    home = tmp_path_factory.mktemp("registry")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SILENCE, **PATIENCE}.items():
            patch.setenv(name, value)
        uri = resolve_uri("sqlite:///mlflow.db", home)
        models = {role: write_run(home, role, seed=seed) for role, seed in (("best", 1), ("last", 2))}
        run = open_run(
            TrackingSettings(tensorboard="none"),
            uri=uri,
            folder=home / "run",
            experiment="e",
            run_name="n",
            tags={},
            params={},
        )
        run.log_text(config.to_toml(settings_with()), "config.toml")
        run.log_dict({"best_epoch": 7, "test_pairs": {"alpha": "0123"}}, "metrics.json")
        for role in ("best", "last"):
            register_model(
                run, EmbeddingModel(models[role].backbone).eval(), name="alpha_cnn_local", image_size=32, step=7,
                role=role, val_auc=0.8, val_people="p", metrics={}, note=CARD, beside={MODEL_CARD: CARD},
            )  # fmt: skip
        run.finish("FINISHED")
        yield uri, models["best"]


def _settings(uri, out):
    return settings_with(run__out=str(out), tracking__enabled=True, tracking__uri=uri)


def test_the_champion_is_found_where_no_run_folder_fits(registry, tmp_path):
    uri, trained = registry
    search = Search(settings=_settings(uri, tmp_path / "runs"), clients=("alpha",))
    [model] = find_models(search, [LOCAL], {})
    assert model.source == "models:/alpha_cnn_local/1"
    assert model.step == 7
    assert model.test_pairs == {"alpha": "0123"}
    assert model.settings == settings_with()
    scored = score(model, PACKS, ("alpha",), CPU, 1)["alpha"]
    wanted = evaluate(trained, PACKS["alpha"], "test", CPU)
    assert (scored.sums.pairs == wanted.pairs).all()
    assert scored.no_head == "MLflow holds no heads"


def test_a_version_by_name(registry, tmp_path):
    uri, _ = registry
    search = Search(settings=_settings(uri, tmp_path / "runs"), clients=("alpha",))
    for run, source in (
        ("models:/alpha_cnn_local/2", "models:/alpha_cnn_local/2"),
        ("models:/alpha_cnn_local@champion", "models:/alpha_cnn_local/1"),
    ):
        assert find_models(search, [LOCAL], {"local-alpha": run})[0].source == source


def test_what_is_not_in_the_registry(registry):
    uri, _ = registry
    assert find_registered(uri, "beta_cnn_local") is None
    for text, fragment in (
        ("models:/alpha_cnn_local/9", "models:/alpha_cnn_local/9: not found at sqlite"),
        ("models:/alpha_cnn_local@nobody", "not found at sqlite"),
        ("models:/alpha_cnn_local", "write models:/NAME/VERSION"),
    ):
        with pytest.raises(TrackingError) as error:
            read_registered(uri, text)
        assert fragment in str(error.value)
        assert "\n" not in str(error.value)


def test_no_database_is_made_by_asking(tmp_path):
    uri = resolve_uri("sqlite:///none.db", tmp_path)
    assert find_registered(uri, "alpha_cnn_local") is None
    with pytest.raises(TrackingError, match="there is no registry at"):
        read_registered(uri, "models:/alpha_cnn_local/1")
    assert not list(tmp_path.iterdir())


def _client(uri):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _audit(monkeypatch, settings, run, client, shape="json"):
    """`facefed privacy audit` with a tiny pack; returns what it printed."""
    monkeypatch.setattr(simulation.compare.membership, "pack_at_the_door", lambda *_: PACKS[client])
    request = AuditRequest(
        run=run,
        clients=[f"{client}:folder=no-pictures"],
        data_dirs=[],
        device="cpu",
        cache_dir=Path(settings.run.out) / "packs",
    )
    out = io.StringIO()
    assert audit_privacy(settings, request, out, shape=shape) == 0
    return out.getvalue()


def test_what_two_sites_audits_find_stands_in_the_card_of_the_version(registry, tmp_path, monkeypatch):
    uri, _ = registry
    settings = _settings(uri, tmp_path / "runs")
    found = {}
    for client in ("alpha", "beta", "alpha"):
        told = json.loads(_audit(monkeypatch, settings, "models:/alpha_cnn_local@champion", client))
        assert told["kept"] == ["the card of models:/alpha_cnn_local/1"]
        found |= told["clients"]
    version = _client(uri).get_model_version("alpha_cnn_local", "1")
    registered = read_registered(uri, "models:/alpha_cnn_local/1")
    for card in (version.description, file_of_model(registered, MODEL_CARD)):
        before, _, after = card.partition("## Privacy\n\n")
        assert before.startswith("A model, models:/alpha_cnn_local/")
        privacy, _, limits = after.partition("\n\n## Limits\n\n")
        assert limits == "Many."
        assert privacy.startswith("None.\n\nMembership inference, ")
        assert privacy.count("Membership inference, ") == 1, "once, however often it was tried"
        for client in ("alpha", "beta"):
            auc = found[client]["the run's model"]["auc"]
            assert privacy.count(f"| {client} | the run's model | {auc['value']:.3f} ({auc['low']:.3f} to ") == 1
    assert set(json.loads(file_of_model(registered, MEMBERSHIP))["sites"]) == {"alpha", "beta"}
    other = _client(uri).get_model_version("alpha_cnn_local", "2")
    assert "Membership" not in other.description, "the audit is of the other version"


def test_what_a_run_registered_of_a_step_is_found_by_its_folder(registry, tmp_path):
    uri, _ = registry
    folder = sqlite_path(uri).parent / "run"
    assert registered_of_run(uri, folder, 7) == ["models:/alpha_cnn_local/1", "models:/alpha_cnn_local/2"]
    assert registered_of_run(uri, folder, 6) == []
    assert registered_of_run(uri, tmp_path, 7) == []


def test_an_audit_stays_with_the_run_and_a_registry_that_is_away_costs_no_more_than_a_line(
    registry, tmp_path, monkeypatch, caplog
):
    uri, _ = registry
    write_run(tmp_path, "run-1")
    offline = settings_with(run__out=str(tmp_path), tracking__enabled=False)
    file = tmp_path / "run-1" / MEMBERSHIP
    file.write_text("{}")
    assert _audit(monkeypatch, offline, "run-1", "alpha", "text").splitlines()[-1] == f"kept in {file}"
    assert f"{file} is damaged" in caplog.text
    _audit(monkeypatch, _settings(uri, tmp_path), "run-1", "beta")
    content = json.loads(file.read_text())
    assert content["step"] == 2
    assert set(content["sites"]) == {"alpha", "beta"}
    first = content["sites"]["beta"][0]
    assert first["attacker"] == "the run's model"
    assert first["num_members"] == 6

    def refuse(*_):
        raise ConnectionError("read only")

    monkeypatch.setattr("common.tracking.audited.with_membership", refuse)
    caplog.clear()
    told = json.loads(_audit(monkeypatch, _settings(uri, tmp_path), "models:/alpha_cnn_local/2", "alpha"))
    assert told["kept"] == []
    assert "the card of models:/alpha_cnn_local/2 stays as it is (read only)" in caplog.text

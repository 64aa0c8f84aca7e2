"""Models that are only in MLflow's registry: which version is taken, its settings, and its tensors in our backbone."""

import pytest

from common import config
from common.errors import TrackingError
from common.models.recogniser import EmbeddingModel
from common.settings import TrackingSettings
from common.system.runtime import PATIENCE, SILENCE
from common.tracking.address import resolve_uri
from common.tracking.registry import find_registered, read_registered, register_model
from common.tracking.run import open_run
from common.training.evaluation import evaluate
from simulation.compare.model_lookup import Search, Wanted, find_models
from simulation.compare.scoring import score
from tests.comparable_models import CPU, PACKS, write_run
from tests.tiny_federation import settings_with

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning"),  # MLflow's tables
    pytest.mark.usefixtures("tables_once"),
]
LOCAL = Wanted(kind="local", client="alpha")


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
                role=role, val_auc=0.8, val_people="p", metrics={},
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

"""Settings at the door: every wrong one is named, all at once; every right one survives TOML and JSON unchanged."""

import dataclasses
import json
import math
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import config
from common.errors import ConfigError, UserError
from common.models.table import VITS
from common.settings import RunSettings, Settings
from simulation.alone.sweep_plan import base_config, check_together, load_plan

SECTIONS = config._section_types()
FIELDS = [
    (section, field, config.typing.get_type_hints(kind)[field.name])
    for section, kind in SECTIONS.items()
    for field in dataclasses.fields(kind)
]
NUMBERS = [(section, field) for section, field, kind in FIELDS if kind not in (bool, str)]


def problems_of(section: str, key: str, value: object) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        config.from_mapping({section: {key: value}})
    return caught.value.problems


def load_text(tmp_path: Path, text: str) -> Settings:
    path = tmp_path / "a.toml"
    path.write_text(text, encoding="utf-8")
    return config.load(path)


def test_all_problems_of_a_file_come_together(tmp_path):
    text = (
        '[model]\nbackbone = "resnet81"\nwide = 3\n[training]\nlr = -1\nbatch_size = "many"\n'
        "[federation]\nrounds = 0\n[modle]\nx = 1\n"
    )
    with pytest.raises(ConfigError) as caught:
        load_text(tmp_path, text)
    problems = caught.value.problems
    assert len(problems) == 6
    assert all(problem.startswith(f"{tmp_path / 'a.toml'}: ") for problem in problems)
    told = "\n".join(problems)
    for part in (
        "model.backbone = 'resnet81' is unknown; did you mean 'resnet18'?",
        "model.wide",
        "training.lr = -1 must be greater than 0",
        'training.batch_size = "many" has the wrong type; write a whole number',
        "federation.rounds = 0 must be at least 1",
        "section = 'modle' is unknown; did you mean 'model'?",
    ):
        assert part in told
    assert str(caught.value).count("\n") == 5, "one line for each problem"
    assert caught.value.exit_code == 2


def test_an_unknown_setting_suggests_the_nearest():
    (problem,) = problems_of("training", "label_smothing", 0.1)
    assert "'training.label_smothing' is unknown; did you mean 'training.label_smoothing'?" in problem


@pytest.mark.parametrize("name", [("federation", "strategy"), ("model", "head"), ("data", "alignment")])
def test_a_name_outside_the_choices_lists_them(name):
    (problem,) = problems_of(*name, "zzz")
    assert "choices: " in problem
    assert "did you mean" not in problem


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("run", "seed", 1.5),
        ("run", "seed", True),
        ("run", "seed", "1"),
        ("training", "lr", True),
        ("training", "lr", "0.1"),
        ("training", "lr", [0.1]),
        ("training", "epochs", "every"),
        ("training", "epochs", False),
        ("data", "max_people", 3.0),
        ("tracking", "enabled", 1),
        ("tracking", "enabled", "true"),
        ("run", "out", 3),
        ("model", "backbone", {"name": "cnn"}),
    ],
)
def test_a_wrong_type_says_what_to_write(section, key, value):
    (problem,) = problems_of(section, key, value)
    assert problem.startswith(f"settings: {section}.{key} = ")
    assert "has the wrong type; write " in problem


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("section", "key"), [("training", "lr"), ("training", "weight_decay"), ("data", "box_margin")])
def test_numbers_are_finite(section, key, value):
    (problem,) = problems_of(section, key, value)
    assert "is not finite" in problem


def test_a_number_too_large_to_compute_with_is_refused(tmp_path):
    (problem,) = problems_of("run", "seed", 10**400)
    assert "is not finite" in problem
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_text(tmp_path, "[run]\nseed = " + "9" * 5000)


@pytest.mark.parametrize(("section", "field"), NUMBERS, ids=lambda value: getattr(value, "name", value))
def test_each_number_has_a_lower_bound(section, field):
    """Every numeric setting refuses -1; those that must be positive refuse 0 too; limits themselves are fine."""
    (problem,) = problems_of(section, field.name, -1)
    assert "must be" in problem
    meta = field.metadata
    whole = isinstance(field.default, int | str)
    if meta["above"] is not None:
        assert f"must be greater than {meta['above']:g}" in problems_of(section, field.name, 0)[0]
    else:
        config.from_mapping({section: {field.name: meta["low"]}})
        if meta["low"] > 0:
            assert "must be at least" in problems_of(section, field.name, 0)[0]
    if meta["high"] is not None:
        config.from_mapping({section: {field.name: meta["high"]}})
        step = 1 if whole else 1e-9
        assert "must be at most" in problems_of(section, field.name, meta["high"] + step)[0]


@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_text_is_refused(text):
    assert "run.out is empty" in problems_of("run", "out", text)[0]


@pytest.mark.parametrize("text", ["a\x00b", "a\x7fb", "a\nb", "\udcff"])
def test_a_text_that_no_file_can_hold_is_refused(text):
    (problem,) = problems_of("run", "out", text)
    assert "cannot be written" in problem
    assert "\n" not in problem
    problem.encode()


@pytest.mark.parametrize("raw", [{"model": 3}, {"model": [{"head": "softmax"}]}, {"model": "cnn"}])
def test_a_section_must_be_a_table(raw):
    with pytest.raises(ConfigError, match=r"must be a table: write \[model\]"):
        config.from_mapping(raw)


def test_settings_that_do_not_go_together_are_named():
    with pytest.raises(ConfigError, match=r"model\.normalisation"):
        config.from_mapping({"model": {"normalisation": "private", "pretrained": "x.safetensors"}})


def test_toml_syntax_errors_name_file_and_place(tmp_path):
    with pytest.raises(ConfigError, match=r"a\.toml: not valid TOML: .*line 2"):
        load_text(tmp_path, "[run]\nseed = = 3\n")


def test_bytes_that_are_no_text_are_one_line(tmp_path):
    (tmp_path / "b.toml").write_bytes(b"[run]\nout = '\xff'\n")
    with pytest.raises(ConfigError, match=r"b\.toml: not valid TOML"):
        config.load(tmp_path / "b.toml")
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path)


def test_whole_numbers_serve_where_fractions_are_meant():
    lr = config.from_mapping({"training": {"lr": 1}}).training.lr
    assert isinstance(lr, float)
    assert lr == 1.0


def test_an_empty_file_gives_the_defaults(tmp_path):
    assert load_text(tmp_path, "") == Settings() == config.load(None)


def test_flags_lie_over_the_file(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("[federation]\nrounds = 3\nlocal_epochs = 4\n", encoding="utf-8")
    read, _ = config.load_with_address(path, {("federation", "rounds"): 7, ("model", "head"): "softmax"})
    assert (read.federation.rounds, read.federation.local_epochs, read.model.head) == (7, 4, "softmax")


# ---------------------------------------------------------------------------------------------------- round trips


def values_for(section: str, field: dataclasses.Field, kind: type) -> st.SearchStrategy:
    meta = field.metadata
    if kind is bool:
        return st.booleans()
    choices = meta["choices"] or config.TABLES.get(f"{section}.{field.name}", ())
    if choices:
        return st.sampled_from(list(choices))
    if kind is str:
        texts = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1, max_size=12)
        return texts.filter(lambda text: bool(text.strip()))
    if kind in (float, float | str):
        low = meta["low"] if meta["low"] is not None else meta["above"]
        exclude = meta["above"] is not None
        numbers = st.floats(low, meta["high"], exclude_min=exclude, allow_nan=False, allow_infinity=False)
        return numbers if kind is float else st.one_of(numbers, st.just(meta["word"]))
    whole = st.integers(int(meta["low"]), int(meta["high"] or 2**70))
    return whole if kind is int else st.one_of(whole, st.just(meta["word"]))


@st.composite
def valid_settings(draw) -> Settings:
    raw = {section: {} for section in SECTIONS}
    for section, field, kind in FIELDS:
        raw[section][field.name] = draw(values_for(section, field, kind))
    if isinstance(raw["federation"]["local_epochs"], int):  # the conflicts have tests of their own
        raw["federation"]["local_steps"] = "off"
    elif raw["federation"]["local_steps"] == "off":
        raw["federation"]["local_steps"] = 7
    model = raw["model"]
    model["pretrained"] = "none"
    if model["backbone"] in VITS:
        raw["data"]["image_size"] = model["patch_size"] * -(-32 // model["patch_size"])
    else:
        model["attention"] = "sa"
    if model["attention"] not in ("glca", "dcal"):
        model["inference"] = "sa"
    raw["privacy"] = raw["secagg"] = {}  # likewise
    if raw["federation"]["evaluate_only"]:
        model["normalisation"] = "shared"
    if model["normalisation"] == "private":
        raw["training"]["trainable"] = "all"
    raw["verification"]["by"] = draw(st.sampled_from(["none", "Male", "Male,Young"]))
    raw["ablation"] = {}  # its texts are settings and values: tests/unit/test_ablation_settings.py
    return config.from_mapping(raw)


@settings(max_examples=60, deadline=None)
@given(valid_settings())
def test_round_trips_lose_nothing(given_settings):
    assert config.from_json(config.to_json(given_settings)) == given_settings
    text = config.to_toml(given_settings)
    assert config.from_mapping(tomllib.loads(text)) == given_settings
    text.encode()
    assert "\n" not in config.to_json(given_settings)


def test_json_that_is_none_of_ours():
    for text in ("{", "[]", "3"):
        with pytest.raises(ConfigError):
            config.from_json(text)
    with pytest.raises(ConfigError, match="is not finite"):
        config.from_json('{"training": {"lr": NaN}}')


# ------------------------------------------------------------------------------------------------- files and types


def test_find_config_by_name_and_by_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    for name in ("mine.toml", "mu0.01.toml"):
        (tmp_path / "configs" / name).write_text("[run]\nseed = 5\n", encoding="utf-8")
    other = tmp_path / "other.toml"
    other.write_text("", encoding="utf-8")
    assert config.find_config("mine") == tmp_path / "configs/mine.toml"
    assert config.find_config("mu0.01") == tmp_path / "configs/mu0.01.toml"
    assert config.find_config("other.toml") == Path("other.toml")
    assert config.find_config(str(other)) == other
    shipped = config.find_config("celeba_vggface2_fedavg")
    assert shipped.parent == Path(config.__file__).parent.parent / "configs"


def test_a_configuration_that_is_not_there_names_those_that_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("nowhere", "nowhere.toml", str(tmp_path / "no.toml")):
        with pytest.raises(ConfigError, match=f"--config {name}: no such file.*celeba_vggface2_fedavg"):
            config.find_config(name)


SHIPPED = sorted((Path(config.__file__).parent.parent / "configs").glob("*.toml"))
SWEEPS = [path for path in SHIPPED if "sweep" in tomllib.loads(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("path", [path for path in SHIPPED if path not in SWEEPS], ids=str)
def test_every_shipped_configuration_loads(path):
    config.load(path)


@pytest.mark.parametrize("path", SWEEPS, ids=str)
def test_every_shipped_sweep_fits_its_base(path):
    plan = load_plan(path)
    check_together(plan, config.load(Path(base_config(plan))))


def test_the_shipped_ablation_is_of_the_branches():
    settings = config.load(config.find_config("twins_ablation_glca"))
    assert (settings.ablation.over, settings.ablation.values) == ("model.attention", "sa, glca, pwca, dcal")
    assert len(SWEEPS) == 1


def test_settings_are_frozen_and_named_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().run.seed = 3
    with pytest.raises(TypeError):
        RunSettings(3)


def test_with_value_checks_and_copies():
    before = Settings()
    assert config.with_value(before, "federation", "rounds", 3).federation.rounds == 3
    assert before == Settings()
    with pytest.raises(ConfigError):
        config.with_value(before, "federation", "rounds", 0)


def test_epochs_follow_the_federation_unless_set():
    base = config.from_mapping({"federation": {"rounds": 4, "local_epochs": 3}})
    assert (base.total_epochs, base.local_training_epochs) == (12, 12)
    assert config.with_value(base, "training", "epochs", 5).local_training_epochs == 5


def test_to_json_is_the_whole_of_the_settings():
    assert {(s, k) for s, values in json.loads(config.to_json(Settings())).items() for k in values} == {
        (section, field.name) for section, field, _ in FIELDS
    }


@pytest.mark.parametrize("name", config.GONE)
def test_a_setting_that_went_is_unknown_and_harms_no_earlier_run_that_left_it_alone(tmp_path, name):
    section, _, key = name.partition(".")
    own, other = tmp_path / "config.toml", tmp_path / "other.toml"
    line = f"{key} = {json.dumps(config.GONE[name])}\n"
    own.write_text(config.to_toml(Settings()).replace(f"[{section}]\n", f"[{section}]\n{line}"), encoding="utf-8")
    assert config.load_of_run(own) == (Settings(), Settings().tracking.uri)
    other.write_text(f"[{section}]\n{key} = 0.77\n", encoding="utf-8")
    for read, path in ((config.load, own), (config.load_of_run, other)):
        with pytest.raises(ConfigError, match=rf"setting = '{name}' is unknown"):
            read(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_of_windows_editors_is_read(tmp_path, encoding):
    """With a byte order mark; PowerShell's `>` writes UTF-16."""
    file = tmp_path / "a.toml"
    file.write_bytes("[run]\r\nseed = 7\r\n".encode(encoding))
    assert config.load(file).run.seed == 7


def test_a_round_is_counted_in_epochs_or_in_steps():
    steps = config.from_mapping({"federation": {"local_steps": 500}})
    assert (steps.federation.local_epochs, steps.federation.local_steps) == ("off", 500)
    assert config.from_json(config.to_json(steps)) == steps
    assert steps.total_steps(7) == 10 * 500
    assert config.from_mapping({}).total_steps(7) == 10 * 2 * 7
    with pytest.raises(ConfigError, match=r"local_epochs = 1 and federation\.local_steps = 5: .* set the other to"):
        config.from_mapping({"federation": {"local_steps": 5, "local_epochs": 1}})
    with pytest.raises(ConfigError, match="set the other to"):
        config.from_mapping({"federation": {"local_epochs": "off"}})
    changed = config.with_value(config.from_mapping({}), "federation", "local_steps", 5)
    assert (changed.federation.local_epochs, changed.federation.local_steps) == ("off", 5)
    with pytest.raises(UserError, match=r"counts rounds in steps; give training\.epochs"):
        _ = changed.local_training_epochs


def test_a_files_width_is_that_of_its_own_backbone(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('[model]\nbackbone = "resnet18"\nwidth = 0.5\n', encoding="utf-8")
    for backbone, width in (("resnet18", 0.5), ("vit_base", 1.0)):
        read, _ = config.load_with_address(path, {("model", "backbone"): backbone})
        assert (read.model.backbone, read.model.width) == (backbone, width)
    assert config.load(path).model.width == 0.5
    both = {("model", "backbone"): "vit_base", ("model", "width"): 0.25}
    assert config.load_with_address(path, both)[0].model.width == 0.25

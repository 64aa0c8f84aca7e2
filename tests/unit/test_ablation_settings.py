"""[ablation] at the door: an unknown setting, values that do not fit it, variants that do not go together."""

import pytest

from common import config
from common.errors import ConfigError
from common.settings import AblationSettings, Settings
from server.cli import main as server_main
from simulation.alone.studies import experiment_of, variants_of
from simulation.cli import main as facefed_main
from simulation.cli import main_simulation

VIT = {"backbone": "vit_tiny", "patch_size": 16}


def settings_of(over: str, values: str, **sections: dict[str, object]) -> Settings:
    return config.from_mapping({"model": VIT, "ablation": {"over": over, "values": values}} | sections)


def problems_of(over: str, values: str, **sections: dict[str, object]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        settings_of(over, values, **sections)
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


def test_every_value_is_a_variant_and_nothing_else_changes():
    settings = settings_of("model.attention", "sa, glca,pwca , dcal")
    variants = variants_of(settings)
    assert [(v.name, v.value) for v in variants] == [
        ("attention-sa", "sa"), ("attention-glca", "glca"), ("attention-pwca", "pwca"), ("attention-dcal", "dcal"),
    ]  # fmt: skip
    assert [v.settings.model.attention for v in variants] == ["sa", "glca", "pwca", "dcal"]
    same = [config.with_value(v.settings, "model", "attention", "sa") for v in variants]
    assert len(set(same)) == 1
    assert same[0].ablation == AblationSettings(), "a variant's configuration makes no ablation itself"
    assert experiment_of(settings) == "twin-verification-ablation-glca"


@pytest.mark.parametrize(
    ("over", "values", "expected"),
    [
        ("model.glca_fraction", "0.1, 1", [0.1, 1.0]),
        ("model.depth", "2, 4", [2, 4]),
        ("training.activation_checkpointing", "true, false", [True, False]),
        ("training.threads", "auto, 2", ["auto", 2]),
        ("model.head", "softmax, cosface", ["softmax", "cosface"]),
    ],
)
def test_values_take_the_type_of_their_setting(over, values, expected):
    section, _, key = over.partition(".")
    found = [getattr(getattr(v.settings, section), key) for v in variants_of(settings_of(over, values))]
    assert found == expected
    assert [type(value) for value in found] == [type(value) for value in expected]


def test_names_of_variants_are_names_of_folders_and_differ():
    variants = variants_of(settings_of("model.pretrained", "a/w.safetensors, a_w.safetensors, none"))
    names = [v.name for v in variants]
    assert names == ["pretrained-a_w.safetensors", "pretrained-a_w.safetensors-2", "pretrained-none"]


def test_an_unknown_setting_suggests_the_nearest():
    (problem,) = problems_of("model.atention", "sa, dcal")
    assert problem.startswith("settings: ablation.over = 'model.atention' is unknown; did you mean 'model.attention'?")


@pytest.mark.parametrize(
    "over", ["attention", "data.image_size", "run.seed", "tracking.uri", "model.", "ablation.over"]
)
def test_only_what_a_training_is_made_of_can_be_varied(over):
    (problem,) = problems_of(over, "1, 2")
    assert "a study varies settings of augmentation, model, training, twins" in problem


@pytest.mark.parametrize("over", ["training.epochs", "training.batch_size", "training.patience", "training.device"])
def test_what_would_change_the_budget_is_refused(over):
    (problem,) = problems_of(over, "1, 2")
    assert f'ablation.over = "{over}" changes what all trainings of a study must share' in problem


def test_variants_that_stop_at_different_steps_are_refused():
    (problem,) = problems_of("model.attention", "sa, dcal", training={"patience": 3})
    assert "training.patience stops variants after different numbers of steps" in problem


@pytest.mark.parametrize("values", ["sa", "sa, sa", "none"])
def test_one_value_is_no_comparison(values):
    (problem,) = problems_of("model.attention", values)
    assert "must be two or more different values of model.attention" in problem


def test_values_equal_as_numbers_are_one():
    (problem,) = problems_of("model.glca_fraction", "0.1, 0.10")
    assert "two or more different values" in problem


def test_each_value_that_does_not_fit_is_told_with_all_other_problems():
    problems = problems_of("model.glca_fraction", "0.1, 1.5, much", training={"lr": -1})
    assert len(problems) == 3
    told = "\n".join(problems)
    assert "ablation.values: model.glca_fraction = 1.5 must be at most 1" in told
    assert 'ablation.values: model.glca_fraction = "much" has the wrong type; write a number' in told
    assert "training.lr = -1 must be greater than 0" in told


def test_a_variant_that_does_not_go_together_is_told_once():
    (problem,) = problems_of("model.attention", "sa, dcal", model={"backbone": "resnet18"})
    assert 'ablation.values: model.attention = "dcal" needs a ViT' in problem
    (problem,) = problems_of("model.attention", "sa, dcal", data={"image_size": 50})
    assert "is not divisible" in problem, "a conflict of the base is the base's"
    assert "ablation" not in problem


def test_an_ablation_survives_the_round_trips():
    settings = settings_of("model.attention", "sa, glca")
    assert config.from_json(config.to_json(settings)) == settings


@pytest.mark.parametrize(
    ("program", "main"),
    [("flower-simulation", main_simulation), ("flower-server", server_main), ("train local", facefed_main)],
)
def test_where_no_ablation_is_made_it_is_refused(program, main, capsys):
    """A setting that does nothing there would look as if it did something."""
    ablation = [
        "--set",
        "ablation.over=model.attention",
        "--set",
        "ablation.values=sa, glca",
        "--set",
        "model.backbone=vit_tiny",
    ]
    arguments = ["train", "local", "--client", "celeba", *ablation] if program == "train local" else ablation
    assert main(arguments) == 2
    assert f"{program} makes no ablation; use facefed train twins" in capsys.readouterr().err

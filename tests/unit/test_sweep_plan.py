"""A sweep's file at the door: names, ranges and the metric are checked before the first trial, all problems at once."""

from pathlib import Path

import pytest

from common import config
from common.errors import ConfigError
from common.settings import Settings
from simulation.alone.sweep_plan import Span, base_config, check_together, load_plan, plan_of_run

GOOD = """
[sweep]
trials = 4
base = "base"
metric = "val_twins_roc_auc"
[sweep.space]
"training.lr" = { low = 1e-4, high = 3e-3, log = true }
"model.glca_fraction" = { choices = [0.1, 1] }
"model.depth" = { low = 2, high = 6, step = 2 }
"""


def plan_in(folder: Path, text: str):
    path = folder / "a.toml"
    path.write_text(text, encoding="utf-8")
    return load_plan(path)


def problems_of(folder: Path, text: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        plan_in(folder, text)
    assert all(
        "\n" not in problem and problem.startswith(f"{folder / 'a.toml'}: ") for problem in caught.value.problems
    )
    return caught.value.problems


def space(line: str) -> str:
    return f'[sweep]\ntrials = 2\nbase = "b"\n[sweep.space]\n{line}\n'


def test_a_good_plan(tmp_path):
    plan = plan_in(tmp_path, GOOD)
    assert (plan.trials, plan.base, plan.metric, plan.direction) == (4, "base", "val_twins_roc_auc", "maximize")
    assert plan.space == {
        "training.lr": Span(low=1e-4, high=3e-3, log=True),
        "model.glca_fraction": Span(choices=(0.1, 1.0)),
        "model.depth": Span(low=2, high=6, step=2, is_whole=True),
    }
    assert [type(choice) for choice in plan.space["model.glca_fraction"].choices] == [float, float]


def test_the_direction_follows_the_metric(tmp_path):
    plan = plan_in(tmp_path, GOOD.replace("val_twins_roc_auc", "val_eer"))
    assert plan.direction == "minimize"
    assert not plan.is_maximised
    (problem,) = problems_of(tmp_path, GOOD.replace("trials = 4", 'trials = 4\ndirection = "minimize"'))
    assert "'minimize' looks for the worst val_twins_roc_auc; write 'maximize'" in problem


@pytest.mark.parametrize("metric", ["test_twins_roc_auc", "test_eer", "test_nothing"])
def test_a_test_figure_is_refused(tmp_path, metric):
    (problem,) = problems_of(tmp_path, GOOD.replace("val_twins_roc_auc", metric))
    assert f"sweep.metric = '{metric}' is a test figure" in problem
    assert "val_" in problem


def test_an_unknown_metric_suggests_the_nearest(tmp_path):
    (problem,) = problems_of(tmp_path, GOOD.replace("val_twins_roc_auc", "val_twin_auc"))
    assert "did you mean 'val_twins_" in problem


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('"training.lrr" = { low = 1, high = 2 }', "'training.lrr' is unknown; did you mean 'training.lr'?"),
        ('"data.image_size" = { choices = [32] }', "a study varies settings of"),
        ('"run.seed" = { low = 1, high = 9 }', "a study varies settings of"),
        ('"training.device" = { choices = ["cpu"] }', "must share"),
        ('"training.lr" = { low = 0.0, high = 1.0 }', "training.lr = 0.0 must be greater than 0"),
        ('"training.lr" = { low = 1e-3, high = "x" }', "has the wrong type; write a number"),
        ('"training.lr" = { low = 1e-3, high = 1e-4 }', "low = 0.001 must be less than high = 0.0001"),
        ('"training.lr" = { low = 1e-3 }', "write low and high, or choices"),
        ('"training.lr" = { low = 1, high = 3, step = 1 }', "step = 1 must be a whole number of a range of whole"),
        ('"training.weight_decay" = { low = 0.0, high = 1.0, log = true }', "begins above 0"),
        ('"training.lr" = { low = 1e-3, hihg = 1e-2 }', "did you mean 'high'?"),
        ('"training.lr" = 3', "must be { low = ..., high = ... } or { choices = [...] }"),
        ('"training.lr" = { choices = [] }', "must be a list of values"),
        ('"training.lr" = { choices = [0.1], low = 1 }', "stand alone"),
        ('"model.depth" = { choices = [2, 0] }', "model.depth = 0 must be at least 1"),
        ('"model.depth" = { low = 2, high = 4.5 }', "model.depth = 4.5 has the wrong type; write a whole number"),
        ('"model.depth" = { low = 2, high = 7, step = 2 }', "step = 2 does not lead from low = 2 to high = 7"),
        ('"model.depth" = { choices = [2, 2] }', "the choice 2 comes twice"),
        ('"model.head" = { low = "softmax", high = "arcface" }', "must be numbers; use choices"),
        ('"training.activation_checkpointing" = { low = false, high = true }', "must be numbers; use choices"),
        ("training = { lr = { low = 1e-3, high = 1e-2 } }", "write a setting's name in quotes"),
        ("", "[sweep.space] is empty"),
    ],
)  # fmt: skip
def test_a_space_that_cannot_be_searched_is_one_line(tmp_path, line, told):
    (problem,) = problems_of(tmp_path, space(line))
    assert told in problem


def test_all_problems_come_together(tmp_path):
    text = '[model]\ndepth = 3\n[sweep]\ntrials = 0\nbase = ""\ntrails = 3\n[sweep.space]\n"a" = 3\n'
    problems = problems_of(tmp_path, text)
    assert len(problems) == 5
    told = "\n".join(problems)
    for part in ("section = 'model'", "sweep.trials = 0", "sweep.base = ''", "'sweep.trails'", "sweep.space = "):
        assert part in told


@pytest.mark.parametrize("text", ["[sweep", "", "[model]\ndepth = 3\n"])
def test_files_that_are_no_sweep(tmp_path, text):
    with pytest.raises(ConfigError, match=r"a\.toml: (not valid TOML|no \[sweep\] in it)"):
        plan_in(tmp_path, text)


def test_a_sweep_given_as_a_configuration_says_what_it_is(tmp_path):
    (tmp_path / "a.toml").write_text(GOOD, encoding="utf-8")
    with pytest.raises(ConfigError, match="give the file to facefed train twins --sweep"):
        config.load(tmp_path / "a.toml")


def test_the_base_lies_beside_the_file_or_is_a_shipped_one(tmp_path):
    plan = plan_in(tmp_path, GOOD)
    with pytest.raises(ConfigError, match=r"a\.toml: sweep\.base base: no such file"):
        base_config(plan)
    (tmp_path / "base.toml").write_text("", encoding="utf-8")
    assert base_config(plan) == str(tmp_path / "base.toml")
    assert base_config(plan_in(tmp_path, GOOD.replace('"base"', '"base.toml"'))) == str(tmp_path / "base.toml")
    assert Path(base_config(plan_in(tmp_path, GOOD.replace('"base"', '"twins_dcal"')))).name == "twins_dcal.toml"


def test_combinations_that_do_not_go_together_are_told_before_the_first_trial(tmp_path):
    both = '"model.attention" = { choices = ["sa", "dcal"] }\n"model.inference" = { choices = ["sa", "glca"] }'
    plan = plan_in(tmp_path, space(both))
    vit = config.from_mapping({"model": {"backbone": "vit_tiny"}})
    with pytest.raises(ConfigError, match=r"model\.attention = 'sa', model\.inference = 'glca'.*needs a GLCA branch"):
        check_together(plan, vit)
    only = plan_in(tmp_path, space('"model.attention" = { choices = ["sa", "dcal"] }'))
    check_together(only, vit)
    with pytest.raises(ConfigError, match=r"a\.toml: sweep\.space with model\.attention = 'dcal': .* needs a ViT"):
        check_together(only, Settings())


def test_a_base_with_an_ablation_is_refused(tmp_path):
    settings = config.from_mapping({"ablation": {"over": "model.head", "values": "softmax, cosface"}})
    with pytest.raises(ConfigError, match=r"varies model\.head in an ablation"):
        check_together(plan_in(tmp_path, space('"training.lr" = { low = 1e-3, high = 1e-2 }')), settings)


def test_a_trial_has_its_own_values_and_the_bases_others():
    base = config.from_mapping({"training": {"lr": 0.5, "momentum": 0.1}})
    settings = config.with_values(base, {"training.lr": 0.25, "model.head": "softmax"})
    assert (settings.training.lr, settings.training.momentum, settings.model.head) == (0.25, 0.1, "softmax")


def test_a_run_goes_on_with_its_own_plan_only(tmp_path):
    plan = plan_in(tmp_path, GOOD)
    assert plan_of_run(tmp_path, None) is None
    with pytest.raises(ConfigError, match="is no sweep"):
        plan_of_run(tmp_path, plan)
    (tmp_path / "sweep.toml").write_text(GOOD, encoding="utf-8")
    assert plan_of_run(tmp_path, None) == plan_of_run(tmp_path, plan) == plan
    with pytest.raises(ConfigError, match="began with another plan"):
        plan_of_run(tmp_path, plan_in(tmp_path, GOOD.replace("trials = 4", "trials = 5")))

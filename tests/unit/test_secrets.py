"""A password in the tracking address stays with the server: it is in no message, and not in MLflow."""

import argparse
import json
import stat

import pytest
from tiny_federation import ScriptedMailbox, client, enter_run, federation_over, settings_with

from common import config
from common.errors import ConfigError
from common.flags import add_run_settings, read_run
from common.runs import (
    all_params,
    begin_tracking,
    federated_kind,
    new_run_folder,
    unfinished_federation,
    write_config_file,
)
from server.app import Surroundings, federate
from server.flower.launch import Launch, ServerOptions
from server.flower.superlink import SUBMISSION

ADDRESS = "http://researcher:hunter2@127.0.0.1:9"
SHOWN = "http://***@127.0.0.1:9"
SECRETS = ("hunter2", "researcher")


@pytest.fixture
def settings():
    return settings_with(tracking__uri=ADDRESS)


def assert_silent(text):
    assert [secret for secret in SECRETS if secret in text] == []


def test_no_task_tells_a_client_the_servers_password(tmp_path, monkeypatch, settings):
    enter_run(monkeypatch)
    mailbox = ScriptedMailbox({1: client("alpha"), 2: client("beta")})
    federation_over(mailbox, settings, tmp_path).run()
    kinds = {task.kind for _, task in mailbox.tasks}
    assert kinds >= {"train", "evaluate"}
    for task in (task for _, task in mailbox.tasks if task.kind != "join"):  # joining is by the test's own roster
        assert_silent(task.settings)
        assert config.from_json(task.settings) == settings
    assert_silent((tmp_path / "spool.jsonl").read_text())


def test_nor_does_the_task_to_join(tmp_path, monkeypatch, settings):
    enter_run(monkeypatch)
    mailbox = ScriptedMailbox({1: client("alpha"), 2: client("beta")})  # their answers are for another model
    here = Surroundings(
        run_folder=tmp_path,
        stopped=lambda: False,
        all_nodes_are_here=lambda: True,
        git_commit="none",
    )
    federate(settings, mailbox, here)
    assert [task.kind for _, task in mailbox.tasks][:2] == ["join", "join"]
    for _, task in mailbox.tasks:
        assert_silent(task.settings)


def test_the_record_of_a_run_is_without_it_and_its_own_configuration_is_this_users(tmp_path, settings):
    write_config_file(tmp_path, settings, ADDRESS)
    tracked = begin_tracking(settings, tmp_path, "none", federated_kind(settings))
    tracked.finish("FINISHED")
    spool = (tmp_path / "spool.jsonl").read_text()
    assert_silent(spool)
    [sent] = [row for row in map(json.loads, spool.splitlines()) if row.get("event") == "artifact"]
    assert sent["name"] == "config.toml"
    assert_silent((tmp_path / sent["file"]).read_text())
    assert config.load_with_address(tmp_path / sent["file"]) == (settings, SHOWN)
    assert config.load_with_address(tmp_path / "config.toml") == (settings, ADDRESS)
    assert stat.S_IMODE((tmp_path / "config.toml").stat().st_mode) == 0o600
    assert all_params(settings, federated_kind(settings))["tracking.uri"] == SHOWN


def test_without_a_password_there_is_one_configuration(tmp_path):
    settings = settings_with(tracking__uri="http://127.0.0.1:9")
    begin_tracking(settings, tmp_path, "none", federated_kind(settings)).finish("FINISHED")
    assert [path.name for path in tmp_path.glob("config*")] == ["config.toml"]
    assert config.load_with_address(tmp_path / "config.toml") == (settings, "http://127.0.0.1:9")


def test_flowers_run_config_which_clients_get_is_without_it(tmp_path, monkeypatch):
    settings = settings_with(tracking__uri=ADDRESS, run__out=str(tmp_path))
    run = new_run_folder(settings, ADDRESS)
    launch = Launch(settings, ServerOptions(host="127.0.0.1", port=9, database=None), run)
    (run / "flwr").mkdir()
    monkeypatch.setattr(launch, "_wait_until", lambda *_: None)
    launch._submit()
    told = (run / "flwr" / SUBMISSION).read_text()
    assert "127.0.0.1:9" in told
    assert_silent(told)
    assert config.load_with_address(run / "config.toml") == (settings, ADDRESS)


def test_whoever_begins_a_run_finds_the_whole_address_in_its_folder_only(tmp_path, monkeypatch):
    settings = settings_with(tracking__uri=ADDRESS, run__out=str(tmp_path))
    assert_silent(repr(settings) + config.to_json(settings) + config.to_toml(settings))
    asked = []
    monkeypatch.setattr("common.tracking.run.make_sender", lambda _spool, uri, *_: asked.append(uri))
    on = config.with_value(settings, "tracking", "enabled", value=True)
    folder = new_run_folder(on, ADDRESS)
    begin_tracking(on, folder, "none", federated_kind(on)).finish("FINISHED")
    begin_tracking(on, folder, "none", federated_kind(on)).finish("FINISHED")  # a run that goes on
    elsewhere = config.with_value(on, "tracking", "uri", "http://127.0.0.1:8")
    begin_tracking(elsewhere, folder, "none", federated_kind(on)).finish("FINISHED")
    assert asked == [ADDRESS, ADDRESS, "http://127.0.0.1:8"]


@pytest.mark.parametrize("given", ["flag", "set", "environment", "file"])
def test_the_door_tells_settings_and_password_apart(tmp_path, monkeypatch, caplog, given):
    """What was typed can be read by every account of the machine, so it is told where a password belongs."""
    file = tmp_path / "a.toml"
    file.write_text(f'[tracking]\nuri = "{ADDRESS if given == "file" else "sqlite:///a.db"}"\n', encoding="utf-8")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow's client in another test leaves it behind
    if given == "environment":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", ADDRESS)
    parser = argparse.ArgumentParser()
    add_run_settings(parser)
    typed = {"flag": ["--tracking-uri", ADDRESS], "set": ["--set", f"tracking.uri={ADDRESS}"]}
    settings, address = read_run(parser.parse_args(["--config", str(file), *typed.get(given, [])]))
    assert (settings.tracking.uri, address) == (SHOWN, ADDRESS)
    assert_silent(caplog.text)
    told = [line for line in caplog.messages if "every account of this machine can read the password" in line]
    assert len(told) == (given in typed)
    assert all(f"{SHOWN}:" in line and "MLFLOW_TRACKING_PASSWORD" in line for line in told)


def test_a_name_without_a_password_is_no_secret(caplog):
    parser = argparse.ArgumentParser()
    add_run_settings(parser)
    read_run(parser.parse_args(["--tracking-uri", "postgresql://researcher@127.0.0.1/runs"]))
    assert not caplog.messages


def test_another_password_beside_resume_is_refused_without_a_word_of_either(tmp_path, settings):
    begin_tracking(settings, tmp_path, "none", federated_kind(settings), ADDRESS).finish("KILLED")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "state.json").write_text("{}", encoding="utf-8")
    assert unfinished_federation(str(tmp_path), "", (settings, ADDRESS)) == (tmp_path, settings, ADDRESS)
    with pytest.raises(ConfigError, match="another password") as refused:
        unfinished_federation(str(tmp_path), "", (settings, ADDRESS.replace("hunter2", "hunter3")))
    assert_silent(str(refused.value))
    assert "hunter3" not in str(refused.value)

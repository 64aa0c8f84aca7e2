"""The public pairs at the server: what is loaded, refused and scored, and when in a federation."""

import logging
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics as sklearn_metrics
from tiny_federation import (
    SIDE,
    ScriptedMailbox,
    client,
    enter_run,
    federation_over,
    settings_with,
)

import server.cli
import simulation.cli
from common.errors import ConfigError, DataError, InterruptedRun
from common.faces.batches import to_float
from common.metrics.folds import ten_fold_accuracy_of_scores
from common.metrics.sums import NUM_BINS
from common.protocol.parameters import flatten
from common.settings import Settings
from server.app import initial_model
from server.public_set import PublicScorer, open_public_set, public_scorer, with_absolute_public_set


@pytest.fixture(autouse=True)
def _one_thread_on_the_cpu(monkeypatch):
    monkeypatch.setattr("server.public_set.resolve_device", lambda _: "cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def lfw(tmp_path: Path) -> Path:
    """Six people of three pictures of 50 x 40 px, each a colour of its own around a frame of noise; two folds."""
    random = np.random.default_rng(0)
    root = tmp_path / "lfw"
    for who in range(6):
        (root / f"P{who}").mkdir(parents=True)
        for number in (1, 2, 3):
            pixels = random.integers(0, 256, (40, 50, 3), dtype=np.uint8)
            pixels[12:28, 17:33] = (40 * who, 255 - 40 * who, 100)
            Image.fromarray(pixels).save(root / f"P{who}/P{who}_{number:04d}.jpg", quality=95, subsampling=0)
    folds = [
        [f"P{at}\t1\t2", f"P{at + 1}\t1\t3", f"P{at}\t1\tP{at + 1}\t1", f"P{at}\t2\tP{at + 2}\t1"] for at in (0, 3)
    ]
    (root / "pairs.txt").write_text("\n".join(["2\t2", *folds[0], *folds[1]]) + "\n")
    return root


def settings_for(root: Path, **values: object) -> Settings:
    settings = settings_with(verification__public_dir=str(root), **values)
    return with_absolute_public_set(settings, Path.cwd())


def test_only_the_named_pictures_are_loaded(lfw: Path) -> None:
    for path in lfw.glob("P?/P?_0003.jpg"):
        if path.parent.name not in ("P1", "P4"):
            path.write_bytes(b"no picture, and no pair names it")
    public = open_public_set(settings_for(lfw))
    assert public is not None
    assert public.pictures.shape == (10, SIDE, SIDE, 3)
    assert public.pictures.dtype == np.uint8
    assert public.pairs.genuine.tolist() == [True, True, False, False] * 2
    assert public.pairs.fold.tolist() == [0] * 4 + [1] * 4


def test_the_central_part_is_used(lfw: Path) -> None:
    whole, centre = (open_public_set(settings_for(lfw, verification__public_crop=crop)) for crop in (1.0, 0.4))
    assert whole is not None
    assert centre is not None
    assert whole.pictures.shape == centre.pictures.shape
    # 0.4 of 40 px are the 16 px in the middle, which are of one colour; around them is noise.
    assert whole.pictures[0].astype(float).std(axis=(0, 1)).min() > 20
    inner = centre.pictures[0, 4:-4, 4:-4].reshape(-1, 3).astype(float)
    np.testing.assert_allclose(inner.mean(axis=0), (0, 255, 100), atol=12)
    assert inner.std(axis=0).max() < 12


def test_a_crop_is_the_same_as_cutting_first(lfw: Path) -> None:
    public = open_public_set(settings_for(lfw, verification__public_crop=0.5, data__image_size=40))
    assert public is not None
    with Image.open(lfw / "P0/P0_0001.jpg") as picture:  # 50 x 40: the central 20 x 20 px, twice as large
        cut = picture.resize((40, 40), Image.Resampling.BICUBIC, box=(15, 10, 35, 30))
    np.testing.assert_allclose(public.pictures[0].astype(int), np.asarray(cut).astype(int), atol=2)


def test_paths_mean_the_same_in_every_process(lfw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert with_absolute_public_set(Settings(), tmp_path) == Settings()
    inside = settings_for(Path("lfw"))
    assert inside.verification.public_dir == str(lfw)
    assert inside.verification.public_pairs == str(lfw / "pairs.txt")
    (lfw / "pairs.txt").rename(tmp_path / "mine.txt")
    own = settings_for(Path("lfw"), verification__public_pairs="mine.txt")
    assert own.verification.public_pairs == str(tmp_path / "mine.txt")
    assert with_absolute_public_set(own, Path("/elsewhere")) == own
    assert open_public_set(own) is not None


def test_no_public_set_is_no_scorer() -> None:
    settings = settings_with()
    assert public_scorer(settings, *initial_model(settings)) is None


def test_what_cannot_be_used_is_refused_in_one_line(lfw: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'with model.normalisation = "private" there is no single one'):
        open_public_set(settings_for(lfw, model__normalisation="private"))
    with pytest.raises(DataError, match=r"nowhere: no such folder; verification.public_dir is the folder"):
        open_public_set(settings_for(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"verification.public_pairs: other.txt is neither in .*lfw nor at /"):
        open_public_set(settings_for(lfw, verification__public_pairs="other.txt"))
    (lfw / "P1/P1_0003.jpg").write_bytes((lfw / "P1/P1_0003.jpg").read_bytes()[:300])
    with pytest.raises(DataError, match=r"P1_0003.jpg: unreadable: .*; a public pair names it") as caught:
        open_public_set(settings_for(lfw))
    assert "\n" not in str(caught.value)
    (lfw / "P1/P1_0003.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 10 pictures that the pairs name are not there \(P1/P1_0003.jpg\)"):
        open_public_set(settings_for(lfw))
    (lfw / "pairs.txt").write_text("1\nP0\t1\t2\nP0\t1\tP1\t1\n")
    with pytest.raises(DataError, match="one fold of pairs, but a fold's threshold comes from the other folds"):
        open_public_set(settings_for(lfw))
    (lfw / "pairs.txt").write_text("2\t2\nP0\t1\n")
    with pytest.raises(DataError, match="promises 2 folds"):
        open_public_set(settings_for(lfw))


def test_scores_are_those_of_the_given_model(lfw: Path) -> None:
    settings = settings_for(lfw)
    public = open_public_set(settings)
    assert public is not None
    recogniser, manifest = initial_model(settings)
    model = flatten(recogniser.state_dict(), manifest)
    pictures = to_float(torch.from_numpy(public.pictures))
    embeddings = initial_model(settings)[0].eval().embed(pictures).detach().numpy()
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosines = (unit[public.pairs.first] * unit[public.pairs.second]).sum(axis=1)
    scorer = PublicScorer(public, recogniser, manifest)
    scores = scorer.scores(model, lambda: None)
    truth, binned = public.pairs.genuine, np.floor((cosines + 1) * NUM_BINS / 2)
    assert scores["public/roc_auc"] == pytest.approx(sklearn_metrics.roc_auc_score(truth, binned))
    exact = ten_fold_accuracy_of_scores(cosines, truth, public.pairs.fold)[0]
    assert scores["public/ten_fold_accuracy"] == pytest.approx(exact)
    others = [flatten(initial_model(settings_for(lfw, run__seed=seed))[0].state_dict(), manifest) for seed in (2, 3, 4)]
    assert any(scorer.scores(other, lambda: None) != scores for other in others)
    assert scorer.scores(model, lambda: None) == scores


def test_a_stop_ends_the_scoring_between_batches(lfw: Path) -> None:
    settings = settings_for(lfw)
    recogniser, manifest = initial_model(settings)
    scorer = public_scorer(settings, recogniser, manifest)
    assert scorer is not None

    def stop() -> None:
        raise InterruptedRun("stopped by the user")

    with pytest.raises(InterruptedRun):
        scorer.scores(flatten(recogniser.state_dict(), manifest), stop)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("program", ["flower-server", "flower-simulation"])
def test_a_public_set_that_cannot_be_used_ends_a_program_at_its_door(
    program: str, lfw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = (lfw / "pairs.txt").read_text().split("\n")
    (lfw / "pairs.txt").write_text("\n".join([*lines[:3], "P0\tone\tP1\t1", *lines[4:]]))
    options = ["--no-mlflow", "--log-level", "error", "--set", "verification.public_dir=lfw"]
    logger = logging.getLogger("facefed")
    before = (logger.level, list(logger.handlers), logger.propagate)
    try:
        if program == "flower-server":
            exit_code = server.cli.main([*options, "--address", f"127.0.0.1:{free_port()}"])
        else:
            exit_code = simulation.cli.main_simulation([*options, "--client", f"folder={lfw}"])
    finally:
        logger.setLevel(before[0])
        logger.handlers, logger.propagate = before[1], before[2]
    said = capsys.readouterr().err
    assert exit_code == 2
    assert said.startswith(f"{program}: {lfw / 'pairs.txt'}, line 4: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "runs").exists()


class Watching:
    """Stands in for the scorer: keeps the models, and how many messages were sent and answered before each."""

    def __init__(self, mailbox: ScriptedMailbox) -> None:
        self.mailbox, self.models, self.num_sent = mailbox, [], []

    def scores(self, model, between):
        between()
        self.models.append(float(model[0]))
        self.num_sent.append(sum(task.kind != "join" for _, task in self.mailbox.tasks))
        return {
            "public/roc_auc": 0.5 + len(self.models) / 10,
            "public/eer": 0.4,
            "public/ten_fold_accuracy": 0.6,
        }


@pytest.mark.parametrize(("every", "expected"), [(1, {0: 0.0, 1: 0.5, 2: 1.0, 3: 1.5}), (3, {0: 0.0, 3: 1.5, 1: 0.5})])
def test_each_model_of_the_test_curve_is_scored_while_the_clients_compute(every, expected, tmp_path, monkeypatch):
    """Every reply adds 0.5 to the model; round 1 is the best of equals, so with gaps it is scored at the end."""
    enter_run(monkeypatch)
    settings = settings_with(federation__rounds=3, federation__min_clients=2, federation__test_every_rounds=every)
    mailbox = ScriptedMailbox({1: client("a"), 2: client("b")})
    federation = federation_over(mailbox, settings, tmp_path / "run")
    watching = Watching(mailbox)
    federation.public = watching
    outcome = federation.run()
    rows = {int(row["step"]): row for row in outcome.history.rows()}
    scored = {step: row for step, row in rows.items() if "public/roc_auc" in row}
    assert scored.keys() == expected.keys()
    assert [rows[step]["public/roc_auc"] for step in expected] == pytest.approx([0.6, 0.7, 0.8, 0.9][: len(expected)])
    assert watching.models == list(expected.values())
    # Both clients' messages were out each time, none of the next round's.
    assert [count % 2 for count in watching.num_sent] == [0] * len(expected)
    assert watching.num_sent[0] == 2

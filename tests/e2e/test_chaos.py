"""Three seeded faults in one run of real processes; `make chaos` brings fifty (docs/RELIABILITY.md)."""

import pytest

from tests.chaos.campaign import Ground, play
from tests.chaos.plan import plan

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("silent_mlflow")]
SEED, ROUNDS = 19, 14  # MLflow last: the rounds go on while it is away
KINDS = ("kill MLflow", "corrupt state", "kill trainer")


def test_three_faults_cost_no_model_no_point_and_leave_no_process(faces, tmp_path, with_tables):
    (tmp_path / "chaos").mkdir()
    with_tables(tmp_path / "chaos").rename(tmp_path / "chaos" / "migrated.db")
    ground = Ground(tmp_path / "chaos", rounds=ROUNDS, faces=faces.folder)
    faults = plan(SEED, 0, faults=len(KINDS), rounds=ROUNDS, kinds=KINDS)
    verdict, rows = play(ground, 0, faults, disks=False)
    assert not verdict.wrong, (verdict, rows)
    assert verdict.same_model
    assert (verdict.lost, verdict.doubled) == (0, 0)
    assert verdict.num_points > 500
    assert sorted(row["kind"] for row in rows if row["came"]) == sorted(KINDS)

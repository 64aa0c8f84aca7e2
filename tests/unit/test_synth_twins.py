"""Synthetic twins: the layout, repeatable, alike but not the same, and harder to tell apart than strangers."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from test_synthetic import PLAIN, digests

from common.errors import DataError, UserError
from common.faces.index import read_index
from simulation.data.synth_people import LATENT_SIZE, read_traits
from simulation.data.synth_portrait import render_face
from simulation.data.synthetic import CLOSENESS, MANIFEST, SynthSettings, layout_of, twin_latent, write_dataset
from simulation.sites import synth

SMALL = SynthSettings(layout="twins", num_people=12, pictures_per_person=2, seed=5)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("synth") / "twins"
    write_dataset(SMALL, root)
    return root


def test_same_settings_give_the_same_bytes_and_others_give_others(drawn: Path, tmp_path: Path) -> None:
    write_dataset(SMALL, tmp_path / "again", num_processes=2)
    assert digests(tmp_path / "again") == digests(drawn)
    ours = {name: digest for name, digest in digests(drawn).items() if name.endswith(".jpg")}
    assert len(set(ours.values())) == 24
    for number, changes in enumerate(({"seed": 6}, {"closeness": 0.5})):
        root = tmp_path / str(number)
        write_dataset(dataclasses.replace(SMALL, **changes), root)
        assert not set(ours.values()) & set(digests(root).values())
        with pytest.raises(DataError, match="made with other settings"):
            write_dataset(SMALL, root)


def test_the_layout_is_read_with_its_families_and_official_split(drawn: Path) -> None:
    index = read_index("twins", drawn)
    assert index.people == tuple(str(90001 + k) for k in range(12))
    assert index.paths[:2] == ("90001/90001d1.jpg", "90001/90001d2.jpg")
    assert all((drawn / path).is_file() for path in index.paths)
    assert index.family is not None
    sizes = np.unique(index.family, return_counts=True)[1]
    assert sizes.tolist() == [2] * 6
    assert [int((index.official_split == part).sum()) for part in (0, 2)] == [16, 8]
    beside = [second == first + 1 for first, second in (np.flatnonzero(index.family == f) for f in set(index.family))]
    assert not all(beside), "numbers are shuffled: nobody's twin can be told by the number"
    files = {path.name for path in drawn.iterdir() if path.is_file()}
    assert files == {MANIFEST} | {
        f"{part}_{what}.json" for part in ("train", "test") for what in ("dataset_infor", "twin_pairs")
    }


def test_manifests_of_other_layouts_are_as_they_were(tmp_path: Path) -> None:
    write_dataset(SynthSettings(layout="celeba", num_people=6, pictures_per_person=2), tmp_path / "celeba")
    manifest = json.loads((tmp_path / "celeba" / MANIFEST).read_text())
    assert manifest.keys() == {"drawing", "layout", "num_people", "pictures_per_person", "seed", "complete"}


def test_closeness_is_the_correlation_of_siblings_and_latents_stay_normal() -> None:
    for closeness in (0.0, 0.5, CLOSENESS, 1.0):
        latents = np.stack([twin_latent(3, person, closeness) for person in range(800)])
        one, other = latents[0::2, 2:], latents[1::2, 2:]
        # 400 families x 44 traits: the correlation's standard error is below 0.008.
        assert np.corrcoef(one.ravel(), other.ravel())[0, 1] == pytest.approx(closeness, abs=0.03)
        assert latents.std() == pytest.approx(1.0, abs=0.03)
        np.testing.assert_array_equal(latents[0::2, :2], latents[1::2, :2])
        assert abs(np.corrcoef(one.ravel(), np.roll(other, 1, axis=0).ravel())[0, 1]) < 0.03, "strangers share nothing"
    assert latents.shape == (800, LATENT_SIZE)


def test_siblings_are_of_one_sex_and_age() -> None:
    for person in range(0, 60, 2):
        first, second = (read_traits(twin_latent(1, person + k, 0.3)) for k in (0, 1))
        assert (first["masculine"], first["age"]) == (second["masculine"], second["age"])


def test_siblings_look_nearly_alike_and_one_face_is_one_face() -> None:
    """The same view of each: siblings differ by about a third of what strangers differ by."""
    view = dataclasses.replace(PLAIN, eye_distance=0.26, centre=(0.5, 0.445))

    def seen(person: int, closeness: float) -> np.ndarray:
        latent = twin_latent(1, person, closeness)
        return render_face(latent, view, layout_of("twins").style, (64, 64)).picture.astype(float)

    faces = [seen(person, CLOSENESS) for person in range(24)]
    apart = np.array([[np.abs(one - other).mean() for other in faces] for one in faces])
    siblings = np.array([apart[k, k ^ 1] for k in range(24)])
    strangers = np.array([apart[k, j] for k in range(24) for j in range(24) if j // 2 != k // 2])
    assert 0.15 < siblings.mean() / strangers.mean() < 0.55
    assert siblings.min() > 0
    np.testing.assert_array_equal(seen(0, 1.0), seen(1, 1.0))


def test_the_face_fills_the_centre_square() -> None:
    style = layout_of("twins").style
    assert style.width_px[0] == style.width_px[1]
    assert style.height_ratio == (1.0, 1.0)
    for eye_distance in style.eye_distance:
        for height in style.eye_height:
            view = dataclasses.replace(PLAIN, eye_distance=eye_distance, centre=(0.5, height))
            x, y, width, tall = render_face(np.zeros(LATENT_SIZE), view, style, (160, 160)).box
            assert min(x, y) >= 0
            assert max(x + width, y + tall) <= 160
            assert tall >= 0.7 * 160


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"num_people": 13}, "num_people = 13 cannot be drawn; twins come in pairs"),
        ({"num_people": 10}, "num_families = 5 cannot be drawn; choose a number from 6 to 5000"),
        ({"num_people": 10_002}, "num_families = 5001"),
        ({"closeness": 1.1}, "closeness = 1.1 cannot be drawn; choose a number from 0 to 1"),
        ({"closeness": float("nan")}, "closeness = nan cannot be drawn"),
    ],
)
def test_bad_settings_are_one_line(changes: dict[str, object], line: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=line):
        write_dataset(dataclasses.replace(SMALL, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def command(folder: Path, layout: str = "twins", **options: object) -> str:
    given = {"people": None, "families": None, "closeness": None, "pictures": 2, "seed": 5} | options
    out = io.StringIO()
    assert synth(layout, folder, out=out, **given) == 0  # type: ignore[arg-type]
    return out.getvalue().splitlines()[-1]


def test_the_command_draws_families_and_refuses_what_belongs_to_other_layouts(drawn: Path, tmp_path: Path) -> None:
    said = command(drawn, families=6)
    assert said == f"{drawn}: 12 people (6 pairs of twins, closeness {CLOSENESS:g}), 2 pictures each, twins layout"
    for layout, options, line in (
        ("twins", {"people": 12}, "--people 12 does not go with --layout twins; give --families N"),
        ("celeba", {"families": 6}, "--families 6 does not go with --layout celeba; it is for --layout twins"),
        ("vggface2", {"closeness": 0.5}, "--closeness 0.5 does not go with --layout vggface2"),
    ):
        with pytest.raises(UserError, match=line):
            command(tmp_path / "out", layout, **options)
    with pytest.raises(DataError, match="made with other settings"):
        command(drawn, families=6, closeness=0.8)
    assert not (tmp_path / "out").exists()

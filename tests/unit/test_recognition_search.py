"""The search is exact: it finds what comparing every pair by hand finds, whatever the blocks."""

import numpy as np
import pytest

from simulation.recognition import search
from simulation.recognition.search import best_matches, person_scores


def unit(rng, *shape):
    rows = rng.normal(size=shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def by_hand(templates, owner, faces):
    """[Q, P]: the cosine of the best template of each person."""
    return np.array([[max(float(face @ t) for t, o in zip(templates, owner, strict=True) if o == p)
                      for p in range(max(owner) + 1)] for face in faces])  # fmt: skip


@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 5, 100])
def test_a_person_scores_as_their_best_template_wherever_a_block_ends(monkeypatch, rows_at_once):
    monkeypatch.setattr(search, "BLOCK_ROWS", rows_at_once)
    rng = np.random.default_rng(3)
    counts = [1, 4, 2, 1, 3]
    owner = np.repeat(np.arange(5), counts)
    templates, faces = unit(rng, 11, 8), unit(rng, 3, 8)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    np.testing.assert_allclose(person_scores(templates, first, faces), by_hand(templates, owner, faces), atol=1e-6)


@pytest.mark.parametrize("rows_at_once", [2, 100])
def test_one_template_each(monkeypatch, rows_at_once):
    monkeypatch.setattr(search, "BLOCK_ROWS", rows_at_once)
    rng = np.random.default_rng(4)
    templates, faces = unit(rng, 7, 8), unit(rng, 2, 8)
    np.testing.assert_allclose(person_scores(templates, np.arange(7), faces), faces @ templates.T, atol=1e-6)


def test_the_best_come_first_and_equal_ones_by_number():
    templates = np.eye(4, dtype=np.float32)[[0, 1, 0, 2, 0]]
    found = best_matches(templates, np.arange(5), np.eye(4, dtype=np.float32)[:1] * np.float32(1), top=2)
    assert found.people.tolist() == [[0, 2]]
    assert found.scores.tolist() == [[1.0, 1.0]]
    rng = np.random.default_rng(5)
    many, face = unit(rng, 200, 8), unit(rng, 1, 8)
    found = best_matches(many, np.arange(200), face, top=7)
    assert found.people[0].tolist() == np.argsort(-(face @ many.T)[0], kind="stable")[:7].tolist()


def test_more_are_asked_for_than_there_are():
    rng = np.random.default_rng(6)
    assert best_matches(unit(rng, 3, 8), np.arange(3), unit(rng, 2, 8), top=9).people.shape == (2, 3)
    nobody = best_matches(np.zeros((0, 8), np.float32), np.zeros(0, np.int64), unit(rng, 2, 8), top=9)
    assert nobody.people.shape == nobody.scores.shape == (2, 0)
    assert best_matches(unit(rng, 3, 8), np.arange(3), np.zeros((0, 8), np.float32), top=2).people.shape == (0, 2)


def test_faces_of_another_width_are_refused():
    with pytest.raises(ValueError, match="must be"):
        best_matches(np.eye(3, dtype=np.float32), np.arange(3), np.eye(4, dtype=np.float32), top=1)

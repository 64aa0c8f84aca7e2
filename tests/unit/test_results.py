"""What every run that trained tells at its end: whether training helped at all."""

import pytest

from common.results import worse_than_untrained


@pytest.mark.parametrize(
    ("untrained", "trained", "words"),
    [
        ({"validation": 0.6, "test": 0.7}, {"validation": 0.8, "test": 0.9}, ""),
        ({"validation": 0.6, "test": 0.7}, {"validation": 0.6, "test": 0.7}, ""),  # as good is not below
        (
            {"validation": 0.7, "test": 0.783},
            {"validation": 0.71, "test": 0.593},
            "training ended below the untrained model (test AUC 0.783 -> 0.593)",
        ),
        (
            {"validation": 0.7, "test": 0.8},
            {"validation": 0.6, "test": 0.5},
            "training ended below the untrained model (validation AUC 0.700 -> 0.600, test AUC 0.800 -> 0.500)",
        ),
        ({"validation": None, "test": 0.8}, {"validation": 0.1, "test": None}, ""),  # nobody knows
    ],
)
def test_training_that_made_it_worse_is_said_in_words(untrained, trained, words):
    assert worse_than_untrained(untrained, trained) == words

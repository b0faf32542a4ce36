"""Scores that a person can check by hand."""

from __future__ import annotations

import pytest

from tinyalign_edge.evaluate import Asked, ci95, normalize, partners, score, token_f1


def test_normalising_drops_case_punctuation_and_articles() -> None:
    assert normalize(" A  Red, circle. ") == normalize("the red circle") == "red circle"


def test_token_f1_counts_common_words() -> None:
    assert token_f1("a red circle", "a circle") == pytest.approx(2 / 3)
    assert token_f1("", "circle") == 0
    assert token_f1("the", "a") == 1


def test_scores_are_means_and_the_loss_is_per_token() -> None:
    scores = score([Asked("q", "yes", "Yes.", 1.0, 2), Asked("q", "no", "yes", 3.0, 2)])
    assert (scores.n, scores.exact_match, scores.token_f1, scores.nll_per_token) == (2, 0.5, 0.5, 1.0)


def test_the_interval_is_wilsons() -> None:
    assert ci95(0.5, 100) == pytest.approx(0.0962, abs=1e-4)
    assert ci95(1.0, 10) > 0.1  # all right of ten proves little


def test_shuffling_never_gives_a_picture_its_own_memory() -> None:
    images = ["a", "a", "b", "c", "b"]
    chosen = partners(images)
    assert all(images[i] != images[j] for i, j in enumerate(chosen))
    assert chosen[0] == chosen[1]

"""What is measured of a run's answers, beside scikit-learn, scipy, and sums written out."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.decomposition import PCA
from sklearn.metrics import confusion_matrix, f1_score, recall_score

from reports import features, measures


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def answers():
    """labels (N,), classes (N, 5), probabilities (N, 5) of 400 pictures and 9 classes."""
    logits = torch.randn(400, 9, generator=rng())
    labels = torch.randint(0, 8, (400,), generator=rng(1))  # the last class has no picture
    logits[torch.arange(400), labels] += 1.2
    top = logits.topk(5, dim=1).indices
    return labels, top, logits.softmax(1).gather(1, top)


def test_confusions_and_scores_are_scikit_learns(answers):
    labels, top, _ = answers
    guessed = top[:, 0]
    mine = measures.confusion(guessed, labels, 9)
    assert np.array_equal(mine.numpy(), confusion_matrix(labels, guessed, labels=range(9)))
    scores = measures.scores_by_class(guessed, labels, 9)
    f1 = f1_score(labels, guessed, labels=range(9), average=None, zero_division=0)
    there = np.isin(range(9), labels)
    assert [s["f1"] is not None for s in scores] == there.tolist()
    assert [s["f1"] for s in scores if s["f1"] is not None] == pytest.approx(100 * f1[there])
    recall = recall_score(labels, guessed, labels=range(8), average=None)
    assert [s["accuracy"] for s in scores[:8]] == pytest.approx(100 * recall)
    assert scores[8]["accuracy"] is None


def test_the_calibration_error_is_the_papers_sum(answers):
    labels, top, probabilities = answers
    confidence, right = probabilities[:, 0], top[:, 0] == labels
    found = measures.calibration(confidence, right)
    expected = 0.0
    for b in range(15):
        mine = [
            (c, r)
            for c, r in zip(confidence.tolist(), right.tolist(), strict=True)
            if b / 15 < c <= (b + 1) / 15
        ]
        assert found["bins"][b]["pictures"] == len(mine)
        if mine:
            sure, correct = (sum(column) / len(mine) for column in zip(*mine, strict=True))
            expected += len(mine) / len(labels) * abs(correct - sure)
    assert found["ece"] == pytest.approx(100 * expected)
    assert sum(b["pictures"] for b in found["bins"]) == 400


def test_one_who_is_sure_and_right_is_calibrated_and_one_who_is_wrong_is_not():
    sure = torch.ones(10)
    assert measures.calibration(sure, torch.ones(10, dtype=torch.bool))["ece"] == 0
    assert measures.calibration(sure, torch.zeros(10, dtype=torch.bool))["ece"] == 100


@pytest.mark.parametrize(("right", "count"), [(0, 7), (7, 7), (450, 510), (1, 1)])
def test_the_interval_is_scipys(right, count):
    known = binomtest(right, count).proportion_ci(0.95, method="wilson")
    expected = pytest.approx((100 * known.low, 100 * known.high), abs=1e-4)
    assert measures.wilson_interval(right, count) == expected


def test_classes_that_are_confused_stand_together():
    """Three groups that are confused within, their classes shuffled."""
    group = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
    matrix = 2 * (group[:, None] == group[None]) + 4 * torch.eye(9, dtype=torch.long)
    found = group[measures.cluster_order(matrix)].tolist()
    assert sorted(measures.cluster_order(matrix)) == list(range(9))
    matrix = matrix.clone()
    matrix[0, 3] += 5
    matrix[4, 8] += 2
    wrong = matrix.sum(0) + matrix.sum(1) - 2 * matrix.diagonal()
    for most in (2, 4, 8):  # more classes than a page can show
        shown = measures.cluster_order(matrix, most)
        assert sorted(wrong[shown].tolist()) == sorted(wrong.tolist())[-most:]
    assert sum(a != b for a, b in zip(found, found[1:], strict=False)) == 2


@pytest.mark.parametrize("count", [1, 2, 3])
def test_an_order_of_few_classes_and_of_no_confusions(count):
    assert sorted(measures.cluster_order(5 * torch.eye(count, dtype=torch.long))) == [*range(count)]


def test_pairs_are_counted_both_ways(answers):
    labels, top, _ = answers
    matrix = measures.confusion(top[:, 0], labels, 9)
    found = measures.most_confused(matrix, most=100)
    counted: dict[tuple[int, int], int] = {}
    for true, guess in zip(labels.tolist(), top[:, 0].tolist(), strict=True):
        if true != guess:
            key = (min(true, guess), max(true, guess))
            counted[key] = counted.get(key, 0) + 1
    assert {(p["a"], p["b"]): p["times"] for p in found} == counted
    assert [p["times"] for p in found] == sorted(counted.values(), reverse=True)
    assert all(p["times"] == p["a_as_b"] + p["b_as_a"] for p in found)


def test_the_surest_mistakes_are_wrong_and_sorted(answers):
    labels, top, probabilities = answers
    found = measures.most_confident_mistakes(top, probabilities, labels, most=10)
    wrong = [i for i in range(400) if top[i, 0] != labels[i]]
    assert found == sorted(wrong, key=lambda i: (-float(probabilities[i, 0]), i))[:10]


def test_the_plane_is_scikit_learns_and_the_gap_the_means_distance():
    images = torch.randn(60, 16, generator=rng(2)) + 1
    texts = 3 * torch.randn(12, 16, generator=rng(3)) - 1
    found = features.space(images, texts)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images.numpy(), texts.numpy())]
    assert found["gap"] == pytest.approx(
        np.linalg.norm(unit[0].mean(0) - unit[1].mean(0)), rel=1e-5
    )
    known = PCA(2).fit(np.concatenate(unit).astype(float))
    assert found["explained"] == pytest.approx(100 * known.explained_variance_ratio_, rel=1e-4)
    points = np.array(found["images"] + found["texts"])
    expected = known.transform(np.concatenate(unit).astype(float))
    np.testing.assert_allclose(np.abs(points), np.abs(expected), atol=1e-5)


def test_pictures_are_taken_evenly_and_once():
    assert features.spread_out(7, 10).tolist() == [*range(7)]
    some = features.spread_out(1000, 10).tolist()
    assert (some[0], some[-1], len(set(some))) == (0, 999, 10)
    assert {b - a for a, b in zip(some, some[1:], strict=False)} == {math.floor(999 / 9)}

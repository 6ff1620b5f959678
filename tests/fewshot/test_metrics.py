"""Every number of a results table, against loops over pictures and the definitions by hand."""

import contextlib
import itertools
from fractions import Fraction

import pytest
import torch

from clip_min import normalize
from fewshot.batches import Batches
from fewshot.metrics import accuracy, harmonic_mean, per_class, predict
from fewshot.pictures import Reader


@pytest.fixture
def guesses():
    """Logits (60, 7), right more often than by chance, and labels; class 5 has no pictures."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (60,), generator=rng)
    labels[labels == 4] = 6
    logits = torch.randn(60, 7, generator=rng)
    logits[torch.arange(60), labels] += 1
    return logits, labels


@pytest.mark.parametrize("top", [1, 2, 5])
def test_accuracy_is_the_percentage_of_labels_among_the_largest_logits(guesses, top):
    logits, labels = guesses
    right = 0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        right += label in sorted(range(7), key=lambda k: -row[k])[:top]
    assert 0 < right < 60
    assert accuracy(logits, labels, top) == pytest.approx(100 * right / 60, abs=1e-9)


def test_top_5_of_fewer_than_5_classes_is_always_right():
    assert accuracy(torch.randn(10, 3), torch.randint(0, 3, (10,)), top=5) == 100


def test_recall_and_f1_of_every_class_equal_counting_by_hand(guesses):
    logits, labels = guesses
    predicted = [max(range(7), key=lambda k: row[k]) for row in logits.tolist()]
    pairs = list(zip(predicted, labels.tolist(), strict=True))
    recall, f1 = per_class(logits.argmax(dim=1), labels, 7)
    assert len(recall) == len(f1) == 7
    for k in range(7):
        tp = sum(guess == k == label for guess, label in pairs)
        fp = sum(guess == k != label for guess, label in pairs)
        fn = sum(guess != k == label for guess, label in pairs)
        if tp + fn == 0:
            assert recall[k].isnan()
            assert f1[k] == 0
            continue
        precision = tp / (tp + fp) if tp + fp else 0
        sensitivity = tp / (tp + fn)
        both = precision + sensitivity
        by_hand = 100 * 2 * precision * sensitivity / both if both else 0
        assert recall[k].item() == pytest.approx(100 * sensitivity, rel=1e-6)
        assert f1[k].item() == pytest.approx(by_hand, rel=1e-6)


def test_a_class_that_is_never_right_and_never_named_has_recall_and_f1_0():
    recall, f1 = per_class(torch.tensor([0, 0]), torch.tensor([0, 1]), 2)
    assert recall.tolist() == [100, 0]
    assert f1.tolist() == pytest.approx([200 / 3, 0])


def test_f1_is_below_a_threshold_exactly_where_the_fraction_is():
    """All confusions of two classes with up to 12 pictures each, thresholds 0.01 … 0.99."""
    for right, missed, wrong in itertools.product(range(13), range(13), range(1, 13)):
        labels = torch.tensor([0] * (right + missed) + [1] * wrong)
        guesses = torch.tensor([0] * right + [1] * missed + [0] * wrong)
        f1 = per_class(guesses, labels, 2)[1][0].item() / 100
        exact = Fraction(2 * right, 2 * right + missed + wrong)
        assert f1 == pytest.approx(float(exact), abs=1e-15)
        for percent in range(1, 100):
            assert (f1 < percent / 100) == (exact < Fraction(percent, 100)), (right, missed, wrong)


@pytest.mark.parametrize(
    ("base", "novel", "hm"),
    [(71.33, 78.24, 74.62), (95.19, 71.11, 81.41), (50, 50, 50), (80, 0, 0), (0, 0, 0)],
)
def test_harmonic_mean_is_that_of_published_tables(base, novel, hm):
    assert harmonic_mean(base, novel) == pytest.approx(hm, abs=0.01)
    if base and novel:
        assert harmonic_mean(base, novel) == pytest.approx(2 / (1 / base + 1 / novel))


class Brightness:
    """A stand-in for a method: its logits are the mean of each colour."""

    encoder = None  # nothing is kept

    def __init__(self):
        self.inside = False

    @contextlib.contextmanager
    def inference(self):
        self.inside = True
        yield
        self.inside = False

    def encode(self, images):
        return images

    def classify(self, images):
        assert self.inside
        return images.mean(dim=(2, 3)).bfloat16()


@pytest.mark.parametrize("batch_size", [1, 4, 10, 64])
def test_predict_gives_one_row_a_picture_in_order_whatever_the_batch_size(numbered, batch_size):
    pictures = numbered([0] * 10)
    batches = Batches(pictures, pictures.source, Reader(4, folder=None))
    logits = predict(Brightness(), batches, batch_size)
    one_by_one = [normalize(image).mean(dim=(1, 2)) for image in pictures.source]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, torch.stack(one_by_one), atol=0.02, rtol=0.02)

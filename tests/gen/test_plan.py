"""How many images, and from what: closed forms, and nothing that depends on what ran before."""

from collections import Counter
from fractions import Fraction

import pytest
import torch

from clip_min import UserError
from gen.plan import draw, plan, seed_of, shares
from gen.settings import LLAVA, STABLE_DIFFUSION, Generation

NAMES = ["a", "b", "c", "d"]
F1 = torch.tensor([0.9, 0.7, 0.69, 0.0], dtype=torch.float64)


def counts(f1=F1, **options) -> list[int]:
    return list(plan(Generation(**options), NAMES, f1)["quotas"].values())


def test_uniform_is_the_same_for_all_and_needs_no_f1():
    assert counts(None, per_class=5) == [5, 5, 5, 5]


def test_f1_is_for_classes_below_the_threshold_alone():
    assert counts(plan="f1", per_class=5) == [0, 0, 5, 5]
    assert counts(plan="f1", per_class=5, f1_threshold=0.5) == [0, 0, 0, 5]
    assert counts(plan="f1", per_class=5, f1_threshold=0) == [0, 0, 0, 0]


def test_deficit_shares_out_the_same_total_in_proportion_to_what_is_missing():
    f1 = torch.tensor([0.75, 0.5, 0.25, 1.0])
    assert counts(f1, plan="deficit", per_class=6) == [4, 8, 12, 0]  # 24 in 1 : 2 : 3 : 0
    assert counts(torch.ones(4), plan="deficit", per_class=6) == [6, 6, 6, 6]


@pytest.mark.parametrize("seed", range(20))
def test_shares_are_off_by_less_than_one_and_sum_up(seed):
    rng = torch.Generator().manual_seed(seed)
    weights = torch.randint(0, 50, (9,), generator=rng).tolist()
    total = int(torch.randint(0, 300, (), generator=rng))
    given = shares(total, weights)
    assert sum(given) == total
    for n, weight in zip(given, weights, strict=True):
        assert abs(n - Fraction(total * weight, sum(weights))) < 1
    assert [n for n, w in zip(given, weights, strict=True) if w == 0] == [0] * weights.count(0)


def test_the_leftover_goes_to_the_largest_remainder_and_then_to_the_first():
    assert shares(10, [1, 1, 2]) == [3, 2, 5]
    assert shares(4, [0.1, 0.5, 0.4]) == [0, 2, 2]  # 0.4, 2.0, 1.6
    assert shares(2, [1, 1, 1]) == [1, 1, 0]


def test_two_different_pictures_are_drawn_and_every_pair_and_caption_comes_up():
    seen = Counter(draw(seed_of(1, "rose", attempt), 3, 2) for attempt in range(600))
    assert len(seen) == 3 * 2 * 2
    assert all(i != j for i, _, j in seen)
    assert min(seen.values()) > 20  # 50 expected


def test_of_a_single_picture_both_are_that_one():
    assert {draw(seed, 1, 1) for seed in range(9)} == {(0, 0, 0)}


def test_a_seed_follows_from_run_class_and_attempt():
    parts = [(1, "rose", 0), (2, "rose", 0), (1, "tulip", 0), (1, "rose", 1)]
    seeds = [seed_of(*p) for p in parts]
    assert len(set(seeds)) == 4
    assert seeds == [seed_of(*p) for p in parts]
    assert all(0 <= seed < 2**32 for seed in seeds)  # all that torch's CPU generator reads


def test_what_is_left_open_follows_from_the_data_set():
    flowers = Generation().for_task("flowers102", "a photo of a {}, a type of flower.")
    assert flowers.prompt == "A realistic photo of a {}, a type of flower."
    assert (flowers.captioner, flowers.painter) == (LLAVA, STABLE_DIFFUSION)
    demo = Generation(prompt="{}!").for_task("demo", "a {}")
    assert (demo.captioner, demo.painter, demo.prompt) == ("demo", "demo", "{}!")


def test_a_revision_is_no_setting_of_the_folder():
    """Else a folder begun without one could not be continued at the revision that it records."""
    plain = Generation(captioner="owner/llava", painter="owner/sd")
    pinned = Generation(captioner="owner/llava@1f", painter="owner/sd@2e")
    assert pinned.fixed("zero_shot") == plain.fixed("zero_shot")
    other = Generation(captioner="owner/llava", painter="owner/other@2e")
    assert other.fixed("zero_shot") != plain.fixed("zero_shot")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"per_class": 0}, "--per-class 0: expected 1 or more"),
        ({"strength": 1.5}, "--strength 1.5: expected 0 to 1"),
        ({"strength": 0.04}, "expected 0.05 or more"),
        ({"strength": 0.33, "steps": 3}, "expected 0.334 or more"),
        ({"strength": 1 / 49, "steps": 49}, "expected 0.021 or more"),  # 0.9999… of a step
        ({"question": "What is it?"}, "--question 'What is it?' has no {}"),
        ({"prompt": "a flower"}, "--prompt 'a flower' has no {}"),
    ],
)
def test_a_setting_out_of_range_is_refused(options, said):
    with pytest.raises(UserError, match="--") as error:
        Generation(**options)
    assert said in str(error.value)


def test_the_least_strength_that_is_named_is_enough():
    for steps in range(1, 200):
        with pytest.raises(UserError, match="expected") as error:
            Generation(steps=steps, strength=0.001)
        Generation(steps=steps, strength=float(str(error.value).split()[-3]))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["temperature", "guidance", "f1_threshold", "strength"])
def test_settings_of_no_finite_number_are_refused(name, value):
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value}: expected "):
        Generation(**{name: value})

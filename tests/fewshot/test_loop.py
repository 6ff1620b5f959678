"""The loop is plain gradient descent, keeps the best, and survives being killed, all to the bit."""

import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_min import UserError
from fewshot import loop
from fewshot.batches import Batches
from fewshot.loop import descend
from fewshot.pictures import Pictures, Reader
from fewshot.run import Run
from fewshot.schedule import Length, learning_rate
from methods import METHODS, Method, TrainingSettings

CLASSES = 3
CONFIG = dict.fromkeys(
    ["method", "recipe", "settings", "experiment", "model", "fingerprint", "classnames"], "toy"
)


class Toy(Method):
    """The smallest method: dropout and a linear layer on pixels. Remembers what it was given."""

    first_block = 0  # nothing is frozen

    def __init__(self, settings: TrainingSettings, dropout: float = 0.0):
        nn.Module.__init__(self)  # it has no CLIP
        torch.manual_seed(0)
        self.settings = settings
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(3 * 8 * 8, CLASSES)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.given: list[tuple[Tensor, Tensor]] = []

    def classify(self, images: Tensor) -> Tensor:
        return self.linear(self.dropout(images.flatten(1)))

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        self.given.append((images, labels))
        return super().loss(images, labels)

    def weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.adapter_state().items()}


def batches(count: int, seed: int) -> Batches:
    """Noise, brighter the larger the label."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    noise = torch.randint(0, 100, (count, 3, 8, 8), generator=rng)
    pixels = (noise + 70 * labels[:, None, None, None]).to(torch.uint8)
    return Batches(Pictures(pixels, labels), pixels, Reader(pixels.shape[-1], folder=None))


@pytest.fixture
def train():
    return batches(14, seed=1)  # with batches of 4: three whole ones and a half


@pytest.fixture
def val():
    return batches(9, seed=2)


def start(path) -> Run:
    return Run.start(path, CONFIG)


@pytest.fixture
def run(tmp_path):
    return start(tmp_path / "run")


def settings(**changes) -> TrainingSettings:
    return TrainingSettings(**{"lr": 0.01, "epochs": 3, "batch_size": 4, "patience": 0} | changes)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[n]) for n, t in one.items())


# -------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize(("peak", "end", "steps"), [(0.1, 0.0, 15), (2e-4, 1e-6, 500)])
def test_cosine_is_torchs_cosine_annealing(peak, end, steps):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=end)
    s = TrainingSettings(lr=peak, min_lr=end)
    for step in range(steps + 1):
        rate = learning_rate(s, Length(1, steps, 1, True), step)
        assert rate == pytest.approx(torchs.get_last_lr()[0], rel=1e-6)
        optimizer.step()
        torchs.step()


def recipe(method: str, name: str) -> TrainingSettings:
    return METHODS[method].Settings(**METHODS[method].recipes[name])


def rates(s: TrainingSettings) -> list[float]:
    s = dataclasses.replace(s, schedule="epoch", warmup_steps=0)
    return [learning_rate(s, Length(1, s.epochs, 1, True), epoch) for epoch in range(s.epochs)]


def annealed(peak: float, end: float, length: int) -> list[float]:
    """The rates of torch's own cosine, of which the last is one before its end."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=peak)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, length, eta_min=end)
    found = []
    for _ in range(length):
        found += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    return found


@pytest.fixture
def followed(val, run, monkeypatch):
    """(method, training pictures) -> what its paper recipe makes the loop do with them."""

    def follow(method: str, train: Batches, name: str = "paper", **point) -> SimpleNamespace:
        # Nothing is learned or written, which costs time; views are pinned beside each method.
        s = dataclasses.replace(recipe(method, name), augment="none", grid="", **point)
        toy, done = Toy(s), SimpleNamespace(settings=s, rates=[], sizes=[])
        toy.no_weight_decay = ("linear.bias",) if METHODS[method].no_weight_decay else ()
        toy.first_stage, toy.second_stage = getattr(s, "first_stage", None), lambda: None
        new_optimizer = loop.new_optimizer

        def watched(*arguments):
            done.optimizer = new_optimizer(*arguments)
            done.optimizer.register_step_pre_hook(
                lambda optimizer, *_: done.rates.append(optimizer.param_groups[0]["lr"])
            )
            return done.optimizer

        def loss(images, labels, *_):
            done.sizes.append(len(labels))
            return 0 * toy.linear.bias.sum()

        for name in ("save_adapter", "save_resume"):
            monkeypatch.setattr(run, name, lambda *_: None)
        monkeypatch.setattr(loop, "new_optimizer", watched)
        monkeypatch.setattr(toy, "loss", loss)
        descend(toy, train, val, run, seed=1)
        done.validated = [line["step"] for line in run.log if "val" in line]
        return done

    return follow


def sgd(done: SimpleNamespace, momentum: float, *weight_decays: float) -> bool:
    groups = done.optimizer.param_groups
    assert all(not group["nesterov"] and group["momentum"] == momentum for group in groups)
    assert [group["weight_decay"] for group in groups] == list(weight_decays)
    return type(done.optimizer) is torch.optim.SGD


def adamw(done: SimpleNamespace, eps: float, *weight_decays: float) -> bool:
    groups = done.optimizer.param_groups
    assert all(g["betas"] == (0.9, 0.999) and g["eps"] == eps for g in groups)
    assert [group["weight_decay"] for group in groups] == list(weight_decays)
    return type(done.optimizer) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("method", "epochs", "images", "sizes"),
    [
        ("coop", 200, 816, [32] * 25),  # 16 images left out
        ("clip_adapter", 200, 816, [32] * 25),
        ("cocoop", 10, 20, [1] * 20),
        ("kgcoop", 100, 300, [128] * 2),
        ("kgcoop", 100, 80, [80]),  # EuroSAT's base half at 16 shots
    ],
)
def test_paper_prompts_and_clip_adapter_train_as_coops_code(
    method, epochs, images, sizes, followed
):
    """Dassl: an epoch at 1e-5, then the first E - 1 rates of a cosine over E; the last is kept."""
    done = followed(method, batches(images, 1))
    each = [1e-5, *annealed(2e-3, 0, epochs)[:-1]]
    assert done.sizes == sizes * epochs
    assert done.rates == pytest.approx([rate for rate in each for _ in sizes], rel=1e-6)
    assert sgd(done, 0.9, 5e-4)
    assert done.validated == []
    assert done.settings.keep == "last"
    assert recipe(method, "paper").augment == "crop-flip"


@pytest.mark.parametrize(
    ("method", "name", "epochs", "lr", "first"),
    [("kgcoop", "dept", 10, 3.5e-3, 1e-5), ("finetune", "skip-tuning", 20, 2e-5, 1e-6)],
)
def test_dept_and_skip_tuning_train_as_their_authors_code(
    method, name, epochs, lr, first, followed
):
    done = followed(method, batches(18, 1), name)
    each = [first, *annealed(lr, 0, epochs)[:-1]]
    assert done.sizes == [4] * 4 * epochs  # two images left out
    assert done.rates == pytest.approx([rate for rate in each for _ in range(4)], rel=1e-6)
    assert sgd(done, 0.9, 5e-4)
    assert done.validated == []
    assert done.settings.keep == "last"
    assert recipe(method, name).augment == "crop-flip"


def test_what_learns_at_another_rate_warms_up_as_the_rest_and_then_has_a_cosine_of_its_own(
    train, val, run, monkeypatch
):
    """DePT: Dassl's first epoch is at 1e-5 for all."""
    s, seen = settings(optimizer="sgd", epochs=4, warmup_epochs=1, keep="last"), []
    toy, by_hand = Toy(s), Toy(s)
    toy.lr_factors = {"linear.bias": 6.5}
    descend(toy, train, val, run, seed=1)
    groups = [{"params": [by_hand.linear.weight]}, {"params": [by_hand.linear.bias]}]
    optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.9, weight_decay=s.weight_decay)
    rates = [[1e-5, *annealed(peak, 0, 4)[:-1]] for peak in (0.01, 6.5 * 0.01)]
    for step, (images, labels) in enumerate(toy.given):
        for group, each in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = each[step // 4]
        optimizer.zero_grad()
        F.cross_entropy(by_hand.linear(images.flatten(1)), labels).backward()
        optimizer.step()
        seen.append(step)
    assert len(seen) == 16
    torch.testing.assert_close(toy.weights(), by_hand.weights(), rtol=1e-5, atol=1e-6)


def test_paper_promptsrc_trains_20_epochs_and_keeps_their_mean_as_its_code(followed):
    done = followed("promptsrc", batches(18, 1))
    each = [1e-5, *annealed(2.5e-3, 0, 20)[:-1]]
    assert done.sizes == [4] * 4 * 20  # two images left out
    assert done.rates == pytest.approx([rate for rate in each for _ in range(4)], rel=1e-6)
    assert sgd(done, 0.9, 5e-4)
    assert done.validated == []
    assert (done.settings.keep, done.settings.validations) == ("mean", 0)
    assert recipe("promptsrc", "paper").augment == "crop-flip"


def test_paper_clip_lora_trains_500_steps_a_shot_as_its_code(followed):
    assert recipe("lora", "paper").steps_per_shot == 500
    done = followed("lora", batches(34, 1), steps_per_shot=20)  # 12 of a class
    assert done.sizes == [32, 2] * 120  # nothing is left out
    assert done.rates == pytest.approx(annealed(2e-4, 1e-6, 240), rel=1e-6)
    assert adamw(done, 1e-8, 1e-2)
    assert done.validated == []
    assert done.settings.keep == "last"


def test_paper_two_stage_trains_300_steps_a_shot_along_two_cosines_as_its_code(followed):
    """fs/twostage.py of its repository: both start at 2e-4, and nothing warms up."""
    assert recipe("two_stage", "paper").steps_per_shot == 300
    done = followed("two_stage", batches(45, 1))  # 15 of a class
    assert done.sizes == [32, 13] * 2250
    expected = [*annealed(2e-4, 1e-6, 2700), *annealed(2e-4, 1e-6, 1800)]
    assert done.rates == pytest.approx(expected, rel=1e-6)
    assert adamw(done, 1e-8, 1e-2)
    assert done.validated == []
    assert done.settings.keep == "last"
    assert recipe("two_stage", "paper").augment == "crop-flip"


@pytest.mark.parametrize("warmup", [0, 1])
def test_each_of_two_stages_has_epochs_of_its_own(warmup):
    """Three epochs of 4 steps before the switch, and two and a half after it."""
    s = settings(epochs=6, warmup_epochs=warmup, warmup_lr=1e-3)
    length = Length(4, 22, 4, True, switch=12)
    found = [learning_rate(s, length, step) for step in range(22)]
    each = [*annealed(0.01, 0, 3), *annealed(0.01, 0, 3)]
    if warmup:
        each[0] = each[3] = 1e-3
        each[1:3] = each[4:6] = annealed(0.01, 0, 3)[:2]
    assert found == pytest.approx([rate for rate in each for _ in range(4)][:22])


def test_paper_cross_modal_takes_12800_steps_and_the_best_of_its_grid_as_its_code(followed):
    """engine/optimizer/default.py and scheduler.py, train.py of its repository."""
    points = recipe("cross_modal", "paper").points()
    lrs, decays, halves = (1e-3, 1e-4), (0, 0.01, 1e-4), (8 / 2, 32 / 2)
    assert [tuple(p.values()) for p in points] == list(itertools.product(lrs, decays, halves))
    done = followed("cross_modal", batches(40, 1), **points[-1])
    assert done.sizes == [16] * 12800
    lr = 1e-4
    expected = [1e-5, *(lr * i / 50 for i in range(1, 50))]
    expected += [lr * (1 + math.cos(math.pi * (i - 50) / 12800)) / 2 for i in range(50, 12800)]
    assert done.rates == pytest.approx(expected, rel=1e-9)
    assert adamw(done, 1e-8, 1e-4)
    assert done.validated == list(range(100, 12801, 100))
    assert done.settings.keep == "best"
    assert done.settings.mirror  # linear_prob.sh: IMAGE_AUGS flip, IMAGE_VIEWS 1


def test_paper_disef_pairs_64_and_64_for_50_epochs_as_its_code(followed):
    """fine-tune/slurm_scripts/disef.sh, with synthetic images, which leaves concat_mode at "max":
    ConcatRepeatDataset in src/data/components/datasets.py of its repository.
    """
    train = batches(150, 1).join(batches(200, 2))
    assert recipe("disef", "paper").apart
    train.draw_apart()
    done = followed("disef", train)
    assert done.sizes == [64 + 64] * 3 * 50
    lr = 2**-12
    expected = [1e-7 + (lr - 1e-7) * (1 + math.cos(math.pi * t / 150)) / 2 for t in range(150)]
    assert done.rates == pytest.approx(expected, rel=1e-9)
    assert adamw(done, 1e-8, 1e-3)
    assert done.validated == []
    assert done.settings.keep == "last"


def test_paper_vpt_warms_up_and_takes_the_last_epoch_as_its_code(followed):
    """lr·e/10 in epoch e of the first ten, and then half a cosine over the ninety that are left."""
    done = followed("vpt", batches(266, 1))
    each = [0.5 * epoch / 10 for epoch in range(10)] + annealed(0.5, 0, 90)
    assert done.sizes == [128, 128, 10] * 100
    assert done.rates == pytest.approx([rate for rate in each for _ in range(3)], rel=1e-6)
    assert sgd(done, 0.9, 1e-3, 0)  # its head's bias does not decay
    assert done.validated == []
    assert done.settings.keep == "last"


def test_paper_tip_adapter_f_trains_20_epochs_as_its_code(followed):
    done = followed("tip_adapter_f", batches(300, 1))
    assert done.sizes == [256, 44] * 20
    assert done.rates == pytest.approx(annealed(1e-3, 0, 40), rel=1e-6)
    assert adamw(done, 1e-4, 1e-2)
    assert done.validated == list(range(2, 41, 2))  # its code: on the test set
    assert recipe("tip_adapter_f", "paper").augment == "crop-flip"


def test_paper_prolip_takes_300_steps_on_all_images_as_its_code(followed):
    """methods/ProLIP.py, configs/base.yaml of its repository, whose Adam has no weight decay."""
    done = followed("prolip", batches(300, 1))
    assert done.sizes == [300] * 300
    assert done.rates == pytest.approx(annealed(1e-5, 0, 300), rel=1e-6)
    assert adamw(done, 1e-4, 0)
    assert done.validated == []
    assert done.settings.keep == "last"
    assert recipe("prolip", "paper").augment == "crop-flip"


@pytest.mark.parametrize(
    ("method", "name"),
    [("lora", "notebook"), ("disef", "notebook"), ("disef", "improved"), ("disef_f1", "improved")]
    + [("cocoop", "notebook")],
)
def test_the_notebook_stops_at_the_fourth_epoch_without_gain(
    method, name, train, val, run, scripted
):
    assert recipe(method, "demo").patience == 3
    s = recipe(method, name)
    assert (s.schedule, s.augment, s.keep, s.optimizer) == ("epoch", "none", "best", "adamw")
    toy = Toy(dataclasses.replace(s, batch_size=14))
    scripted(toy, [10, 20, 15, 20, 20, 20, 90])
    descend(toy, train, val, run, seed=1)
    assert len(run.log) == 6


@pytest.mark.parametrize(("kind", "second"), [("constant", 0.002), ("linear", 0.004)])
def test_a_warm_up_as_long_as_the_training_is_all_there_is(kind, second):
    short = settings(epochs=2, warmup_epochs=4, warmup=kind, warmup_lr=0.002)
    assert rates(short) == pytest.approx([0.002, second])


# -------------------------------------------------------------------------- the same as by hand

CASES = {
    "adamw": {},
    "a rate per step": {"schedule": "step", "min_lr": 1e-3},
    "a rate per epoch": {"epochs": 5, "min_lr": 1e-3},
    "sgd": {"optimizer": "sgd"},
    "warm-up": {"warmup_epochs": 2, "warmup_lr": 1e-4, "epochs": 4},
    "linear warm-up": {"warmup_epochs": 2, "warmup": "linear", "epochs": 4},
    "warm-up by steps": {"warmup_epochs": 2, "warmup": "linear", "epochs": 4, "schedule": "step"},
    "clipped": {"clip_norm": 0.1},
    "steps by shots": {"steps_per_shot": 2, "schedule": "step"},
    "warm-up of 3 steps": {"warmup_steps": 3, "warmup": "linear", "schedule": "step"},
    "one batch": {"batch_size": 100},
}


@pytest.mark.parametrize("case", CASES)
def test_weights_equal_those_of_a_loop_by_hand_to_the_bit(case, train, val, run, monkeypatch):
    s = settings(**CASES[case])
    better = itertools.count()
    monkeypatch.setattr(loop, "accuracy", lambda *_: next(better))  # so that the last are kept
    method = Toy(s)
    descend(method, train, val, run, seed=1)

    by_hand = Toy(s)
    steps = math.ceil(14 / s.batch_size)
    total = s.steps_per_shot * 5 or s.epochs * steps
    assert len(method.given) == total
    parameters = [by_hand.linear.weight, by_hand.linear.bias]
    if s.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, weight_decay=0.01, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    for done, (images, labels) in enumerate(method.given):
        epoch = done // steps
        now, end = (done, total) if s.schedule == "step" else (epoch, math.ceil(total / steps))
        warm = s.warmup_steps or s.warmup_epochs * (steps if s.schedule == "step" else 1)
        length = end - warm if s.warmup == "linear" else end
        lr = s.min_lr + (s.lr - s.min_lr) * (1 + math.cos(math.pi * (now - warm) / length)) / 2
        if now < warm:
            lr = s.warmup_lr
            lr += now / warm * (s.lr - s.warmup_lr) if s.warmup == "linear" else 0
        optimizer.param_groups[0]["lr"] = lr
        logits = by_hand.linear(images.flatten(1))
        optimizer.zero_grad()
        F.cross_entropy(logits, labels).backward()
        if s.clip_norm:
            norm = torch.cat([p.grad.flatten() for p in parameters]).norm()
            assert done or norm > s.clip_norm  # else this case shows nothing
            torch.nn.utils.clip_grad_norm_(parameters, s.clip_norm)
        optimizer.step()
    assert equal(method.weights(), by_hand.weights())
    assert not equal(method.weights(), Toy(s).weights())


def test_clipping_bounds_the_gradient_that_a_step_uses(train, val, run):
    """The first step of SGD moves the weights by lr times the gradient."""
    s = settings(optimizer="sgd", weight_decay=0.0, batch_size=100, epochs=1, clip_norm=0.1)
    before = Toy(s).weights()
    method = Toy(s)
    descend(method, train, val, run, seed=1)
    moved = torch.cat([(t - before[n]).flatten() for n, t in method.weights().items()])
    assert moved.norm().item() == pytest.approx(s.lr * 0.1, rel=1e-4)


def order(method: Toy, train: Batches) -> list[int]:
    """The numbers of the pictures in the order that the method was given them."""
    known = train.images(torch.arange(len(train))).flatten(1)
    given = torch.cat([images for images, _ in method.given]).flatten(1)
    return [int((known == image).all(dim=1).nonzero()) for image in given]


def test_an_epoch_is_every_picture_once_in_an_order_that_follows_from_the_seed(train, val, run):
    orders = []
    for seed in (1, 1, 2):
        method = Toy(settings())
        descend(method, train, val, run, seed)
        orders.append(order(method, train))
    first, again, other = orders
    epochs = [first[i : i + 14] for i in (0, 14, 28)]
    assert all(sorted(epoch) == list(range(14)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert first == again
    assert first != other


def test_labels_stay_with_their_pictures(train, val, run):
    method = Toy(settings())
    descend(method, train, val, run, seed=1)
    labels = torch.cat([labels for _, labels in method.given]).tolist()
    assert labels == [i % CLASSES for i in order(method, train)]


@pytest.mark.parametrize("steps_per_shot", [1, 3, 4])
def test_steps_per_shot_times_shots_is_the_number_of_steps(steps_per_shot, train, val, run):
    method = Toy(settings(steps_per_shot=steps_per_shot))
    descend(method, train, val, run, seed=1)
    assert train.shots == 5
    assert len(method.given) == 5 * steps_per_shot  # 4 in an epoch: the last one is cut short
    assert len(run.log) == math.ceil(5 * steps_per_shot / 4)


# ---------------------------------------------------------------------------------- the best kept


@pytest.fixture
def scripted(monkeypatch):
    """(method, accuracies) -> validation returns these, and the weights at each are kept."""

    def script(method: Toy, accuracies: list[float]) -> list[dict[str, Tensor]]:
        seen, left = [], iter(accuracies)

        def accuracy(logits, labels):
            seen.append(method.weights())
            return next(left)

        monkeypatch.setattr(loop, "accuracy", accuracy)
        return seen

    return script


@pytest.mark.parametrize(
    ("accuracies", "best"),
    [
        ([10, 50, 30, 40, 20], 1),
        ([50, 50, 50, 50, 50], 0),  # the first of equals
        ([0, 0, 0, 0, 0], 0),
        ([1, 2, 3, 4, 5], 4),
    ],
)
def test_the_weights_with_the_best_validation_accuracy_are_left_and_saved(
    accuracies, best, train, val, run, scripted
):
    method = Toy(settings(epochs=5))
    seen = scripted(method, accuracies)
    descend(method, train, val, run, seed=1)
    assert len(seen) == 5
    assert not equal(seen[best], seen[(best + 1) % 5])
    assert equal(method.weights(), seen[best])
    assert equal(run.load_adapter(), seen[best])
    assert not method.training


def test_keep_last_leaves_and_saves_the_weights_of_the_last_epoch(
    train, val, run, scripted, capsys
):
    method = Toy(settings(epochs=5, keep="last", patience=2))
    seen = scripted(method, [10, 50, 30, 40, 20])
    descend(method, train, val, run, seed=1)
    assert len(seen) == 4
    assert not equal(seen[-1], seen[1])
    assert equal(method.weights(), seen[-1])
    assert equal(run.load_adapter(), seen[-1])
    assert "; epoch 4 is kept" in capsys.readouterr().out


@pytest.mark.parametrize("weight", [lambda p: 1.0, lambda p: math.exp(-200 * (p - 0.75) ** 2)])
@pytest.mark.parametrize(("changes", "stop"), [({}, 5), ({"patience": 2}, 4), ({"epochs": 1}, 1)])
def test_keep_mean_leaves_and_saves_the_weighted_mean_of_all_rounds(
    weight, changes, stop, train, val, run, scripted, capsys, monkeypatch
):
    def new():
        toy = Toy(settings(**{"epochs": 5, "keep": "mean"} | changes))
        toy.round_weight = weight
        return toy

    after, log_round = [], Run.log_round
    method = new()
    scripted(method, [10, 50, 30, 40, 20])
    watched = lambda run, line: after.append(method.weights()) or log_round(run, line)  # noqa: E731
    monkeypatch.setattr(Run, "log_round", watched)
    descend(method, train, val, run, seed=1)
    assert len(after) == stop
    weights = [weight((i + 1) / method.settings.epochs) for i in range(stop)]
    for name, tensor in method.weights().items():
        rows = torch.stack([w * tensors[name] for w, tensors in zip(weights, after, strict=True)])
        torch.testing.assert_close(tensor, rows.sum(0) / sum(weights))
    assert equal(run.load_adapter(), method.weights())
    assert ("the mean to epoch 4 is kept" in capsys.readouterr().out) == (stop == 4)
    assert any("val" in line for line in run.log) == ("patience" in changes)


def test_nothing_is_validated_where_nothing_is_chosen_by_it(train, val, run, scripted):
    method = Toy(settings(epochs=5, keep="last"))
    seen = scripted(method, [])
    descend(method, train, val, run, seed=1)
    assert seen == []
    assert [line["epoch"] for line in run.log] == [1, 2, 3, 4, 5]
    assert not any("val" in line for line in run.log)
    assert equal(run.load_adapter(), method.weights())


# Pictures and classes differ from data set to data set; the steps are what training takes.
@pytest.mark.parametrize(
    ("images", "changes", "total", "validated"),
    [
        (14, {"epochs": 3}, 12, [4, 8, 12]),
        (14, {"epochs": 3, "min_steps": 30, "validations": 4}, 30, [8, 16, 24, 30]),
        (2, {"epochs": 3, "min_steps": 30, "validations": 3}, 30, [10, 20, 30]),
        (70, {"epochs": 3, "min_steps": 30, "validations": 2}, 54, [27, 54]),
        (14, {"epochs": 3, "steps_per_shot": 2}, 10, [4, 8, 10]),  # 5 shots
        (14, {"epochs": 3, "steps_per_shot": 2, "min_steps": 13}, 13, [4, 8, 12, 13]),
        (14, {"epochs": 2, "drop_last": True}, 6, [3, 6]),
        (2, {"epochs": 2, "drop_last": True}, 2, [1, 2]),  # no batch is full: one is taken
    ],
)
def test_length_and_validation_are_counted_in_steps(images, changes, total, validated, val, run):
    method = Toy(settings(**changes))
    descend(method, batches(images, 1), val, run, seed=1)
    assert len(method.given) == total
    assert [line["step"] for line in run.log] == validated
    sizes = {len(labels) for _, labels in method.given}
    assert sizes == {4} if method.settings.drop_last and images > 4 else min(sizes) <= 4


def test_what_has_no_weight_decay_does_not_shrink(train, val, run, monkeypatch):
    for undecayed in ((), ("linear.bias",)):
        method = Toy(settings(epochs=1, weight_decay=0.5))  # 4 steps at 0.01
        monkeypatch.setattr(method, "loss", lambda x, y, toy=method: 0 * toy(x).sum())
        method.no_weight_decay = undecayed
        before = method.weights()
        descend(method, train, val, run, seed=1)
        for name, weight in method.weights().items():
            shrunk = 1 if name in undecayed else (1 - 0.01 * 0.5) ** 4
            torch.testing.assert_close(weight, shrunk * before[name])


@pytest.mark.parametrize(
    ("patience", "accuracies", "epochs"),
    [
        (2, [10, 50, 30, 40, 90], 4),
        (1, [10, 50, 50, 90, 90], 3),  # as good is not better
        (3, [50, 10, 60, 10, 10], 5),
        (0, [50, 10, 10, 10, 10], 5),  # never
    ],
)
def test_training_stops_after_that_many_epochs_without_a_better_one(
    patience, accuracies, epochs, train, val, run, scripted, capsys
):
    method = Toy(settings(epochs=5, patience=patience))
    scripted(method, accuracies)
    descend(method, train, val, run, seed=1)
    assert [line["val"] for line in run.log] == accuracies[:epochs]
    said = f"stopped: no better validation accuracy in {patience} validations"
    assert (said in capsys.readouterr().out) == (epochs < 5)


def test_validation_runs_without_dropout_and_training_with_it(train, val, run):
    modes = []
    method = Toy(settings(epochs=2), dropout=0.5).eval()
    method.dropout.register_forward_hook(lambda module, *_: modes.append(module.training))
    descend(method, train, val, run, seed=1)
    assert modes == 2 * [True, True, True, True, False, False]  # both accuracies


def test_what_is_not_learned_does_not_move(train, val, run):
    method = Toy(settings())
    descend(method, train, val, run, seed=1)
    assert torch.equal(method.frozen, torch.ones(2))
    assert method.frozen.grad is None


def test_training_learns_what_can_be_learned(train, val, run):
    method = Toy(settings(epochs=30))
    descend(method, train, val, run, seed=1)
    assert run.log[-1]["loss"] < 0.2 * run.log[0]["loss"]
    assert max(line["val"] for line in run.log) == 100


def test_the_log_has_mean_loss_and_accuracies_of_every_epoch(train, val, run):
    method = Toy(settings(lr=0.0, epochs=2))  # nothing moves, so all can be computed afterwards
    descend(method, train, val, run, seed=1)
    with torch.no_grad():
        losses = [F.cross_entropy(method(x), y).item() for x, y in method.given]
        right = method(val.images(torch.arange(9))).argmax(dim=1) == val.labels
        # Of 14 training images 7, which is every second: not more than there are for validation.
        fitted = method(train.images(torch.arange(0, 14, 2))).argmax(dim=1) == train.labels[::2]
    for i, line in enumerate(run.log):
        assert line["epoch"] == i + 1
        assert line["loss"] == pytest.approx(sum(losses[4 * i : 4 * i + 4]) / 4)
        assert line["val"] == pytest.approx(100 * right.double().mean().item())
        assert line["train"] == pytest.approx(100 * fitted.double().mean().item())
    assert 0 < run.log[0]["seconds"] < run.log[1]["seconds"]


def test_no_epochs_leave_the_method_as_it_was(train, val, run):
    method = Toy(settings(epochs=0))
    before = method.weights()
    descend(method, train, val, run, seed=1)
    assert equal(method.weights(), before)
    assert equal(run.load_adapter(), before)
    assert run.log == []


# ------------------------------------------------------------------------------------------ grid

GRID = "lr=0.1,0.01 batch_size=4,14"


def test_the_best_point_of_a_grid_is_kept_as_if_it_alone_had_been_trained(
    train, val, tmp_path, monkeypatch, capsys
):
    ends, found = [], iter([40, 70, 70, 60])  # of equally good points the first
    monkeypatch.setattr(
        loop, "accuracy_on", lambda *_: ends.append(method.weights()) or next(found)
    )
    method, run = Toy(settings(grid=GRID, keep="last"), dropout=0.3), start(tmp_path / "grid")
    descend(method, train, val, run, seed=1)
    alone = Toy(settings(lr=0.1, batch_size=14, keep="last"), dropout=0.3)
    torch.manual_seed(1)
    descend(alone, train, val, start(tmp_path / "alone"), seed=1)
    assert equal(method.weights(), alone.weights())
    assert equal(run.load_adapter(), alone.weights())
    assert all(not equal(ends[i], ends[j]) for i, j in itertools.combinations(range(4), 2))
    assert method.settings.grid == GRID
    assert "kept is lr 0.1, batch_size 14" in capsys.readouterr().out
    log = [json.loads(line) for line in (run.path / "log.jsonl").open()]
    assert [(line["step"], line["lr"], line["batch_size"]) for line in log] == [
        (step, 0.1, 14) for step in (1, 2, 3)
    ]


@pytest.mark.parametrize("kill", [0, 3, 8, 12, 17])
def test_a_grid_that_is_killed_and_resumed_ends_in_the_same_bits(
    kill, train, val, tmp_path, monkeypatch
):
    s = settings(grid="lr=0.1,0.01 batch_size=5", epochs=3)  # two points of nine steps
    whole = train_to_the_end(tmp_path / "whole", s, "", monkeypatch, train, val)
    resumed = train_to_the_end(tmp_path / "resumed", s, f"loss {kill}", monkeypatch, train, val)
    assert len(resumed.given) == 18 - 3 * (kill // 3)  # no whole epoch twice
    assert equal(resumed.weights(), whole.weights())
    files = [tmp_path / name / "adapter.safetensors" for name in ("whole", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ("rate=1,2", "'rate=1,2' is not the name of a setting"),
        ("lr=1,x", "'lr=1,x' is not"),
        ("lr", "'lr' is not"),
        ("lr=1 lr=2", "'lr=2' is not"),
        ("optimizer=sgd", "'optimizer=sgd' is not"),
        ("drop_last=1", "'drop_last=1' is not"),
        ("batch_size=4,0", "--batch-size 0: expected"),
    ],
)
def test_a_grid_that_cannot_be_is_an_error(grid, said):
    with pytest.raises(UserError, match=said):
        settings(grid=grid)


def test_a_warm_up_in_steps_needs_a_rate_per_step():
    with pytest.raises(UserError, match="--warmup-steps 5: .*--schedule step"):
        settings(warmup_steps=5)


# -------------------------------------------------------------------------------- when it breaks


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_best_so_far(
    value, train, val, run, scripted, capsys, monkeypatch
):
    method = Toy(settings(epochs=5))
    seen = scripted(method, [10, 50, 30])
    real = method.loss

    def loss(images, labels):
        broken = len(method.given) == 14  # the third step of the fourth epoch
        return real(images, labels) * (value if broken else 1)

    monkeypatch.setattr(method, "loss", loss)
    descend(method, train, val, run, seed=1)
    said = capsys.readouterr().out
    assert f"stopped: loss was {value} in step 15; epoch 2 is kept" in said
    assert "nothing was learned" not in said
    assert equal(method.weights(), seen[1])
    assert equal(run.load_adapter(), seen[1])
    assert [line["epoch"] for line in run.log] == [1, 2, 3]


def test_weights_that_break_in_the_last_step_of_an_epoch_are_never_the_best(
    train, val, run, capsys
):
    method = Toy(settings(batch_size=100))  # one step an epoch, its loss finite
    object.__setattr__(method.settings, "lr", math.inf)
    before = method.weights()
    descend(method, train, val, run, seed=1)
    said = capsys.readouterr().out
    assert "stopped: validation logits were not finite after epoch 1" in said
    assert "note: nothing was learned: not one round of training ended; give a smaller --lr" in said
    assert equal(method.weights(), before)
    assert equal(run.load_adapter(), before)


# ----------------------------------------------------------------------------------------- resume


class Killed(BaseException):
    pass


def train_to_the_end(path, s, kill: str, monkeypatch, train, val) -> Toy:
    """Train at `path`; where `kill` names a moment, die then and resume as a new process would."""
    run, method = Run.start(path, CONFIG), Toy(s, dropout=0.3)
    calls = {"loss": method, "log_round": run, "save_resume": run, "save_adapter": run}
    if kill:
        name, number = kill.split()
        real, left = getattr(calls[name], name), iter(range(int(number)))

        def die(*arguments):
            if next(left, None) is None:
                raise Killed
            return real(*arguments)

        monkeypatch.setattr(calls[name], name, die)
        with pytest.raises(Killed):
            descend(method, train, val, run, seed=1)
        torch.rand(5)  # whatever a new process did before
        run, method = Run.resume(path, CONFIG), Toy(s, dropout=0.3)
    descend(method, train, val, run, seed=1, resume=bool(kill))
    return method


@pytest.mark.parametrize(
    ("optimizer", "augment", "keep"),
    [("adamw", "crop-flip", "best"), ("sgd", "none", "last"), ("adamw", "randaugment", "best")]
    + [("sgd", "none", "mean")],
)
@pytest.mark.parametrize(
    "kill",
    [
        "loss 2",  # in the first epoch: nothing is saved yet
        "loss 4",  # at the start of the second
        "loss 11",  # in the third
        "log_round 2",  # the third epoch is in no file
        "save_resume 2",  # the third epoch is in the log but not in the resume file
        "save_resume 3",
        "loss 19",  # the last step
    ],
)
def test_a_run_that_is_killed_and_resumed_ends_in_the_same_bits(
    kill, augment, optimizer, keep, train, val, tmp_path, monkeypatch
):
    more = {"warmup_epochs": 2, "warmup": "linear", "keep": keep}
    s = settings(epochs=5, augment=augment, optimizer=optimizer, schedule="step", **more)
    whole = train_to_the_end(tmp_path / "whole", s, "", monkeypatch, train, val)
    resumed = train_to_the_end(tmp_path / "resumed", s, kill, monkeypatch, train, val)
    assert equal(resumed.weights(), whole.weights())
    files = [tmp_path / name / "adapter.safetensors" for name in ("whole", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    logs = [
        [json.loads(line) | {"seconds": 0} for line in (f.parent / "log.jsonl").open()]
        for f in files
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 5


def test_dropout_and_augmentation_matter_to_those_bits(train, val, tmp_path, monkeypatch):
    """Else the test above would show nothing of the state of the random numbers."""
    results = []
    for number, changes in enumerate([{}, {"augment": "crop-flip"}]):
        s = settings(epochs=5, **changes)
        path = tmp_path / str(number)
        results.append(train_to_the_end(path, s, "", monkeypatch, train, val).weights())
        plain = Toy(s)
        descend(plain, train, val, Run.start(tmp_path / "plain", CONFIG), seed=1)
        assert not equal(plain.weights(), results[-1])
    assert not equal(*results)


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1"])
def test_the_random_state_kept_is_that_of_the_device_trained_on(device, monkeypatch):
    asked, state = [], torch.arange(16, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    get = lambda device=None: asked.append(str(device)) or state  # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_rng_state", get)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device=None: get(device))
    like = {"shape": (1,), "dtype": torch.float32, "device": torch.device(device)}
    learned = {"w": SimpleNamespace(**like, copy_=lambda other: None)}
    best = {"w": SimpleNamespace(**like, to=lambda device: None)}
    optimizer = torch.optim.SGD([torch.zeros(1)])
    state = SimpleNamespace(learned=learned, kept=best, optimizer=optimizer)
    loop.State.restore(state, loop.State.tensors(state))
    assert asked == ([] if device == "cpu" else [device, device])


def test_resuming_a_run_that_was_over_changes_nothing(train, val, tmp_path, capsys):
    path = tmp_path / "run"
    first = Toy(settings(epochs=5, patience=1, lr=0.0))  # stops after its second epoch
    descend(first, train, val, Run.start(path, CONFIG), seed=1)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    again = Toy(settings(epochs=5, patience=1, lr=0.0))
    seconds = descend(again, train, val, Run.resume(path, CONFIG), seed=1, resume=True)
    assert again.given == []
    assert equal(again.weights(), first.weights())
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert seconds == json.loads(before["resume.json"])["seconds"]


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("learned/linear.weight", torch.zeros(1, 1)),  # would be broadcast
        ("kept/linear.bias", torch.zeros(CLASSES).double()),
        ("learned/linear.bias", torch.zeros(CLASSES).long()),
        ("learned/stranger", torch.zeros(3)),
        ("optimizer/0/exp_avg", torch.zeros(2, 2)),
        ("optimizer/9/exp_avg", torch.zeros(CLASSES)),
        ("optimizer/x/y", torch.zeros(CLASSES)),
        ("random/cpu", torch.zeros(3)),
        ("nameless", torch.zeros(3)),
    ],
)
def test_tensors_of_another_run_to_go_on_from_are_named(name, tensor, run, train, val):
    descend(Toy(settings(epochs=1)), train, val, run, seed=1)
    tensors, position = run.load_resume({})
    run.save_resume(tensors | {name: tensor}, position)
    with pytest.raises(UserError, match=r"resume\.safetensors: its tensors do not fit this run"):
        descend(Toy(settings(epochs=1)), train, val, run, seed=1, resume=True)


def test_a_rate_whose_steps_float32_does_not_hold_is_one_line(run, train, val):
    with pytest.raises(UserError, match=r"--lr 1e\+38: the weights are not finite after step 1"):
        descend(Toy(settings(lr=1e38)), train, val, run, seed=1)

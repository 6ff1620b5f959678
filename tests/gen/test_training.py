"""Synthetic pictures among real ones: which is which, in every batch."""

import pytest
import torch
from PIL import Image
from torch import nn

from fewshot.batches import Batches
from fewshot.loop import descend, shuffled
from fewshot.pictures import Pictures, Reader
from fewshot.run import Run
from fewshot.schedule import Length
from gen.books import fingerprint
from methods import Method, TrainingSettings

CPU = torch.device("cpu")


def numbered(numbers: list[int], labels: list[int]) -> Batches:
    """Pictures of 4 x 4 pixels that show their number."""
    pixels = torch.tensor(numbers, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 4, 4)
    return Batches(Pictures(pixels, torch.tensor(labels)), pixels, Reader(4, folder=None))


@pytest.fixture
def joined(tmp_path) -> Batches:
    """Real 1 to 5 in memory, synthetic 101 to 103 as files."""
    files = [tmp_path / f"{n}.png" for n in (101, 102, 103)]
    for file in files:
        Image.new("RGB", (4, 4), (int(file.stem),) * 3).save(file)
    synthetic = numbered([101, 102, 103], [1, 1, 1])
    synthetic.pictures = Pictures(files, synthetic.labels)
    return numbered([1, 2, 3, 4, 5], [0, 0, 1, 1, 1]).join(synthetic)


def test_pictures_labels_and_marks_stay_together(joined):
    assert joined.pixels[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5, 101, 102, 103]
    assert joined.labels.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    assert joined.synthetic.tolist() == [False] * 5 + [True] * 3
    chosen = torch.tensor([6, 0, 7])
    labels, synthetic = joined.targets(chosen)
    assert (labels.tolist(), synthetic.tolist()) == ([1, 0, 1], [True, False, True])
    opened = [joined.pictures.open(i).getpixel((0, 0))[0] for i in range(8)]  # for augmentation
    assert opened == [1, 2, 3, 4, 5, 101, 102, 103]
    assert joined.images(chosen, "crop-flip").shape == (3, 3, 4, 4)


def test_shots_and_real_count_the_real_ones_alone(joined):
    assert joined.shots == 3
    real = joined.real()
    assert real.pixels[:, 0, 0, 0].tolist() == [1, 2, 3, 4, 5]
    assert real.labels.tolist() == [0, 0, 1, 1, 1]
    assert real.synthetic is None
    assert real.real() is real


@pytest.mark.parametrize(
    ("drop_last", "sizes"), [(True, [(2, 2)] * 3), (False, [(2, 2)] * 3 + [(1, 1)])]
)
@pytest.mark.parametrize("real", [7, 5])
def test_drawn_apart_a_batch_has_as_many_of_each_and_the_fewer_repeat(real, drop_last, sizes):
    made = 12 - real
    joined = numbered(list(range(real)), [0] * real)
    joined = joined.join(numbered(list(range(100, 100 + made)), [1] * made))
    joined.draw_apart()
    s, seen = TrainingSettings(batch_size=2, drop_last=drop_last), set()
    assert Length.of(s, joined).epoch == len(sizes)
    for epoch in range(40):
        order = shuffled(joined, 2, seed=1, epoch=epoch)[: len(sizes)]
        parts = [joined.targets(chosen)[1] for chosen in order]
        assert [(int((~p).sum()), int(p.sum())) for p in parts] == sizes
        for group in joined.drawn:
            chosen = [n for n in torch.cat(order).tolist() if n in group.tolist()]
            most = 1 if len(group) == 7 else 2
            assert max(map(chosen.count, chosen)) <= most
            if not drop_last:
                assert set(chosen) == set(group.tolist())
        seen |= set(torch.cat(order).tolist())
    assert seen == set(range(12))


def test_with_no_synthetic_image_nothing_is_drawn_apart():
    joined = numbered([0, 1, 2], [0, 1, 1]).join(numbered([], []))
    joined.draw_apart()
    assert [group.tolist() for group in joined.drawn] == [[0, 1, 2]]


def test_the_loop_tells_the_loss_which_are_synthetic(joined, tmp_path):
    class Toy(Method):
        first_block = 0  # nothing is frozen

        def __init__(self):
            nn.Module.__init__(self)
            self.settings = TrainingSettings(epochs=2, batch_size=3)
            self.linear, self.given = nn.Linear(48, 2), []

        def classify(self, images):
            return self.linear(images.flatten(1))

        def loss(self, images, labels, synthetic=None):
            self.given.append((images[:, 0, 0, 0], synthetic))
            return super().loss(images, labels)

    val = numbered([7, 8], [0, 1])
    keys = ["method", "recipe", "settings", "experiment", "model", "fingerprint", "classnames"]
    method, run = Toy(), Run.start(tmp_path / "run", dict.fromkeys(keys, "toy"))
    descend(method, joined, val, run, seed=1)
    shown = torch.cat([values for values, _ in method.given])
    marks = torch.cat([marks for _, marks in method.given])
    assert len(marks) == 16  # two epochs
    assert marks.sum() == 6
    assert shown[marks].min() > shown[~marks].max()  # 101 and more are the synthetic ones

    plain = Toy()
    descend(plain, joined.real(), val, Run.start(tmp_path / "plain", run.config), seed=1)
    assert all(marks is None for _, marks in plain.given)


def test_pictures_of_one_name_and_size_are_told_apart_by_what_they_hold(tmp_path):
    file = tmp_path / "1.bmp"
    made = []
    for colour in ("red", "blue", "red"):
        Image.new("RGB", (4, 4), colour).save(file)
        made.append(fingerprint(Pictures([file], torch.tensor([0]))))
    assert made[0] == made[2] != made[1]


def test_synthetic_pictures_join_with_their_digests(joined, tmp_path):
    assert joined.pictures.digests is None  # the real ones were never read
    reader = Reader(4, folder=None)
    files = [Pictures([tmp_path / f"{n}.png"], torch.tensor([0])) for n in (101, 102)]
    one, two = (Batches(*reader.read(file, []), reader) for file in files)
    assert one.join(two).pictures.digests == one.pictures.digests + two.pictures.digests

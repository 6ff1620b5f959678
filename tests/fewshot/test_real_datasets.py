"""The readers of published data sets, on tiny archives laid out as the real ones are.

Only the counts are made smaller, in one place: `small`.
"""

import hashlib
import pickle
import runpy
import shutil
import urllib.error
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torchvision.datasets
from torchvision.datasets import utils

from clip_min import UserError
from fewshot import datasets, readers
from fewshot.datasets import DATASETS

EUROSAT = ["AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"]
EUROSAT += ["Pasture", "PermanentCrop", "Residential", "River", "SeaLake"]


@pytest.fixture
def small(monkeypatch):
    """(data set, train, val, test, **more) -> its expected counts are these."""

    def expect(name: str, *images: int, **more) -> None:
        monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], images=images, **more))

    return expect


@pytest.fixture
def offline(monkeypatch):
    """Every download fails, as without a network."""

    def fail(*arguments, **options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(utils, "_urlretrieve", fail)


def load(name: str, root, seed: int = 1):
    return datasets.load(name, root, seed)


@pytest.fixture
def eurosat(tmp_path, noise, small) -> Path:
    for label, name in enumerate(EUROSAT):
        for i in range(10):
            noise(tmp_path / f"eurosat/2750/{name}/{name}_{i + 1}.jpg", 10 * label + i, (8, 8))
    small("eurosat", 70, 0, 30)
    return tmp_path


def test_eurosat_is_split_by_class_and_the_same_whatever_the_seed(eurosat, offline):
    data = load("eurosat", eurosat)
    truth = dict(torchvision.datasets.EuroSAT(eurosat).samples)
    assert data.classnames == [readers.EUROSAT_NAMES[name] for name in EUROSAT]
    assert data.classnames[3] == "Highway or Road"
    assert data.template == "a centered satellite photo of {}."
    for part, each in ((data.train, 7), (data.test, 3)):
        assert [truth[str(file)] for file in part.source] == part.labels.tolist()
        assert part.labels.bincount().tolist() == [each] * 10
    assert {*data.train.source}.isdisjoint(data.test.source)
    assert data.val is None
    again = load("eurosat", eurosat / "eurosat", seed=2)  # its own folder may be the root
    assert again.test.source == data.test.source


def test_the_real_counts_of_eurosat_follow_from_its_classes():
    """3000 or 2500 or 2000 images a class: 30 % of each are for testing."""
    of_class = [3000, 3000, 3000, 2500, 2500, 2000, 2500, 3000, 2500, 3000]
    test = sum(round(0.3 * count) for count in of_class)
    assert DATASETS["eurosat"].images == (27000 - test, 0, test)
    assert sum(of_class) == sum(DATASETS["eurosat"].coop_images) == 27000
    assert sum(DATASETS["flowers102"].images) == sum(DATASETS["flowers102"].coop_images) == 8189


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


@pytest.fixture
def cifar100(tmp_path, small, monkeypatch) -> Path:
    """Three files as those of the archive: images as rows of 3072 bytes, planes R, G, B."""
    real = torchvision.datasets.CIFAR100
    rng = np.random.default_rng(0)
    folder = tmp_path / real.base_folder
    folder.mkdir()
    names = [f"thing_{k}" for k in range(100)]
    for file, count in (("train", 200), ("test", 100)):
        entry = {
            "data": rng.integers(0, 256, (count, 3072), dtype=np.uint8),
            "fine_labels": [i % 100 for i in range(count)],
        }
        (folder / file).write_bytes(pickle.dumps(entry))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    monkeypatch.setattr(real, "train_list", [["train", md5(folder / "train")]])
    monkeypatch.setattr(real, "test_list", [["test", md5(folder / "test")]])
    monkeypatch.setattr(real, "meta", real.meta | {"md5": md5(folder / "meta")})
    small("cifar100", 200, 0, 100)
    return tmp_path


def test_cifar100_has_torchvisions_pixels_and_readable_names(cifar100, offline):
    data = load("cifar100", cifar100)
    assert data.classnames[:2] == ["thing 0", "thing 1"]
    assert (data.template, data.val) == ("a photo of a {}.", None)
    for part, train in ((data.train, True), (data.test, False)):
        theirs = torchvision.datasets.CIFAR100(cifar100, train=train)
        for i in (0, 7, 99):
            image, label = theirs[i]
            assert np.array_equal(part.open(i), image)
            assert part.labels[i] == label


def test_a_damaged_cifar100_is_never_unpickled(cifar100, offline, monkeypatch):
    file = cifar100 / "cifar-100-python/train"
    file.write_bytes(file.read_bytes() + b"x")
    monkeypatch.setattr(pickle, "load", lambda *a, **k: pytest.fail("it was unpickled"))
    with pytest.raises(UserError, match="--dataset cifar100: is not found"):
        load("cifar100", cifar100)


@pytest.fixture
def hymenoptera(tmp_path, noise, small) -> Path:
    """The unpacked archive, with its one GIF."""
    for part, ants, bees in (("train", 4, 3), ("val", 2, 2)):
        for name, count in (("ants", ants), ("bees", bees)):
            for i in range(count):
                noise(tmp_path / f"hymenoptera_data/{part}/{name}/{i}_x.jpg", i, (8, 8))
    for old, new in (("ants/0_x.jpg", "ants/formica.jpeg"), ("bees/1_x.jpg", "bees/1_x.JPG")):
        train = tmp_path / "hymenoptera_data/train"
        (train / old).rename(train / new)
    (tmp_path / "hymenoptera_data/train/ants/imageNotFound.gif").write_bytes(b"GIF89a")
    small("hymenoptera", 7, 0, 4)
    return tmp_path


@pytest.mark.parametrize("inside", [False, True])
def test_hymenoptera_is_train_and_val_without_the_gif(hymenoptera, inside):
    data = load("hymenoptera", hymenoptera / "hymenoptera_data" if inside else hymenoptera)
    theirs = torchvision.datasets.ImageFolder(hymenoptera / "hymenoptera_data/train")
    assert data.classnames == ["ant", "bee"]
    assert [str(file) for file in data.train.source] == [file for file, _ in theirs.samples]
    assert data.train.labels.tolist() == [label for _, label in theirs.samples]
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert {file.parts[-3] for file in data.test.source} == {"val"}


def test_hymenoptera_is_unpacked_from_its_archive(hymenoptera, tmp_path_factory, monkeypatch):
    asked = []

    def serve(url, filename, *arguments):
        asked.append(url)

        shutil.make_archive(filename.removesuffix(".zip"), "zip", hymenoptera, "hymenoptera_data")

    monkeypatch.setattr(utils, "_urlretrieve", serve)
    monkeypatch.setattr(utils, "_get_redirect_url", lambda url, **_: url)
    root = tmp_path_factory.mktemp("empty")
    assert len(load("hymenoptera", root).train) == 7
    assert len(load("hymenoptera", root).test) == 4  # not downloaded again
    assert asked == ["https://download.pytorch.org/tutorial/hymenoptera_data.zip"]


@pytest.fixture
def flowers102(tmp_path, noise, small, monkeypatch) -> Path:
    """Six pictures, and labels and splits in MATLAB files, as Oxford has them."""
    real = torchvision.datasets.Flowers102
    folder = tmp_path / "flowers-102"
    for i in range(6):
        noise(folder / f"jpg/image_{i + 1:05d}.jpg", i, (8, 8))
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": [[1, 2, 102, 2, 1, 102]]})
    ids = {"trnid": [[3, 1]], "valid": [[2, 6]], "tstid": [[5, 4]]}
    scipy.io.savemat(folder / "setid.mat", ids)
    files = {
        kind: (name, md5(folder / name) if (folder / name).exists() else "")
        for kind, (name, _) in real._file_dict.items()
    }
    monkeypatch.setattr(real, "_file_dict", files)
    small("flowers102", 2, 2, 2)
    return tmp_path


def test_flowers102_has_the_pictures_and_labels_of_the_official_files(flowers102, offline):
    data = load("flowers102", flowers102)
    assert len(data.classnames) == 102
    for part, numbers, labels in (
        (data.train, [3, 1], [101, 0]),
        (data.val, [2, 6], [1, 101]),
        (data.test, [5, 4], [0, 1]),
    ):
        names = [f"image_{number:05d}.jpg" for number in numbers]
        assert [file.name for file in part.source] == names
        assert part.labels.tolist() == labels
    assert data.classnames[0] == "pink primrose"


@pytest.mark.parametrize("name", ["flowers102", "eurosat", "cifar100", "hymenoptera"])
def test_without_a_network_it_is_one_line_that_says_what_to_do(name, tmp_path, offline):
    with pytest.raises(UserError) as error:
        load(name, tmp_path)
    assert str(error.value).startswith(f"--dataset {name}: is not found in {tmp_path} (")
    assert "Name or service not known" in str(error.value)
    assert "--data-root" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["eurosat", "cifar100", "hymenoptera"])
def test_a_data_set_with_pictures_missing_is_an_error_with_its_counts(name, request, monkeypatch):
    root = request.getfixturevalue(name)
    train, val, test = DATASETS[name].images
    monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], images=(train + 1, val, test)))
    with pytest.raises(UserError) as error:
        load(name, root)
    assert f"({train}, {val}, {test}) images, expected ({train + 1}, {val}, {test})" in str(
        error.value
    )


def test_a_class_too_few_is_an_error(eurosat, noise, small):
    (eurosat / "eurosat/2750/River").rename(eurosat / "River")
    small("eurosat", 63, 0, 27)
    with pytest.raises(UserError, match="eurosat: has 9 classes, expected 10"):
        load("eurosat", eurosat)


def test_the_table_lists_every_data_set(capsys):
    datasets.main()
    table = capsys.readouterr().out.splitlines()
    assert [row.split("`")[1] for row in table[2:]] == list(DATASETS)
    assert len({row.count("|") for row in table}) == 1
    for name, entry in DATASETS.items():
        assert "{}" in entry.template
        assert f"  {name:<18}{entry.about}" in datasets.LISTED


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_table_takes_no_flag(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["datasets.py", "--bogus"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("fewshot.datasets", run_name="__main__")
    assert capsys.readouterr() == ("", "datasets.py: error: unknown argument --bogus; see --help\n")

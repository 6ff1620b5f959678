"""CoOp's 11 data sets and ImageNet's variants, from small folders laid out as its DATASETS.md says.

Only the counts are made smaller. Official splits are compared with what torchvision reads of them.
"""

import json
import os
import shutil
import urllib.error
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision.datasets
from torchvision.datasets import utils

from clip_min import UserError
from fewshot import datasets, readers
from fewshot.datasets import DATASETS

# name -> CoOp's folder, its split, its folder of images, and a class: its folder (for cars: a
# prefix of the file), its name as the split has it, the prompt that CLIP is given for it
COOP = {
    "caltech101": (
        *("caltech-101", "Caltech101", "101_ObjectCategories"),
        *("Motorbikes", "motorbike", "a photo of a motorbike."),
    ),
    "oxford_pets": (
        *("oxford_pets", "OxfordPets", "images", "."),
        *("american_bulldog", "a photo of a american bulldog, a type of pet."),
    ),
    "stanford_cars": (
        *("stanford_cars", "StanfordCars", "", "cars_train"),
        *("2000 AM General Hummer SUV", "a photo of a 2000 AM General Hummer SUV."),
    ),
    "flowers102": (
        *("oxford_flowers", "OxfordFlowers", "jpg", "."),
        *("pink primrose", "a photo of a pink primrose, a type of flower."),
    ),
    "food101": (
        *("food-101", "Food101", "images", "apple_pie"),
        *("apple_pie", "a photo of apple pie, a type of food."),
    ),
    "sun397": (
        *("sun397", "SUN397", "SUN397", "a/apse/indoor"),
        *("indoor apse", "a photo of a indoor apse."),
    ),
    "dtd": (
        *("dtd", "DescribableTextures", "images", "polka-dotted"),
        *("polka-dotted", "polka-dotted texture."),
    ),
    "eurosat": (
        *("eurosat", "EuroSAT", "2750", "AnnualCrop"),
        *("Annual Crop Land", "a centered satellite photo of Annual Crop Land."),
    ),
    "ucf101": (
        *("ucf101", "UCF101", "UCF-101-midframes", "Apply_Eye_Makeup"),
        *("Apply_Eye_Makeup", "a photo of a person doing Apply Eye Makeup."),
    ),
}
# The published table: classes; train, val and test of CoOp's split; images that are split.
COUNTS = {
    "imagenet": (1000, 1281167, 0, 50000, 1331167),
    "caltech101": (100, 4128, 1649, 2465, 9144 - 467 - 435),  # less the background, easy faces
    "oxford_pets": (37, 2944, 736, 3669, 7349),
    "stanford_cars": (196, 6509, 1635, 8041, 16185),
    "flowers102": (102, 4093, 1633, 2463, 8189),
    "food101": (101, 50500, 20200, 30300, 101000),
    "fgvc_aircraft": (100, 3334, 3333, 3333, 10000),
    "sun397": (397, 15880, 3970, 19850, 39700),
    "dtd": (47, 2820, 1128, 1692, 5640),
    "eurosat": (10, 13500, 5400, 8100, 27000),
    "ucf101": (101, 7639, 1898, 3783, 9537 + 3783),
    "imagenetv2": (1000, 0, 0, 10000, 10000),
    "imagenet_sketch": (1000, 0, 0, 50889, 50889),
    "imagenet_a": (200, 0, 0, 7500, 7500),
    "imagenet_r": (200, 0, 0, 30000, 30000),
}


@pytest.fixture
def small(monkeypatch):
    """(data set, classes, train, val, test) -> its expected counts are these, in either split."""

    def expect(name: str, classes: int, *images: int) -> None:
        entry = replace(DATASETS[name], classes=classes, images=images, coop_images=images)
        monkeypatch.setitem(DATASETS, name, entry)

    return expect


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Every download fails, as without a network."""

    def fail(*arguments, **options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(utils, "_urlretrieve", fail)


def load(name: str, root: Path, split: str = "official"):
    return datasets.load(name, root, 1, split)


def values(data) -> list:
    """All that a data set is, comparable."""
    parts = [
        part and (part.source, part.labels.tolist()) for part in (data.train, data.val, data.test)
    ]
    return [data.classnames, data.template, *parts, data.split, data.own, list(data.notes)]


def listed(part, root: Path) -> list[tuple[str, int]]:
    """File below root, label."""
    files = [str(file.relative_to(root)) for file in part.source]
    return list(zip(files, part.labels.tolist(), strict=True))


def test_counts_are_those_of_the_published_table():
    assert {*COUNTS} == {name for name, entry in DATASETS.items() if entry.coop_images}
    for name, (classes, *images, whole) in COUNTS.items():
        entry = DATASETS[name]
        assert (entry.classes, *entry.coop_images) == (classes, *images)
        assert sum(images) == whole
        # Every picture is in one part of the official split, too, but for EuroSAT's and DTD's
        # partitions, which are of all pictures as well.
        assert entry.images is None or sum(entry.images) == whole


@pytest.fixture
def coop(tmp_path, noise, small):
    """(name) -> $DATA with the data set as CoOp has it: two classes, 2, 1 and 1 pictures each."""

    def make(name: str) -> Path:
        folder, split, images, where, called, _ = COOP[name]
        parts = {"train": [], "val": [], "test": []}
        for label, (place, written) in enumerate([(where, called), (f"{where}-2", "other_one")]):
            for i, part in enumerate(("train", "train", "val", "test")):
                file = str(Path(place, f"{name}_{label}{i}.jpg"))
                noise(tmp_path / folder / images / file, 4 * label + i, (8, 8))
                parts[part].append([file, label, written])
        (tmp_path / folder / f"split_zhou_{split}.json").write_text(json.dumps(parts))
        small(name, 2, 4, 2, 2)
        return tmp_path

    return make


@pytest.mark.parametrize("name", COOP)
def test_coops_split_is_found_below_the_data_root_with_its_names_and_prompts(coop, name):
    root = coop(name)
    folder, _, images, where, _, prompt = COOP[name]
    (root / "another").mkdir()  # of another data set
    (root / f"another/{DATASETS[name].coop_file}").write_text("{}")
    data = load(name, root, "coop")
    assert [data.template.format(data.classnames[0]), data.classnames[1]] == [prompt, "other one"]
    assert data.split == "coop"
    base = root / folder / images
    files = [str(Path(place, name)) for place in (where, f"{where}-2")]
    assert listed(data.train, base) == [
        (f"{files[k]}_{k}{i}.jpg", k) for k in (0, 1) for i in (0, 1)
    ]
    assert listed(data.val, base) == [(f"{files[k]}_{k}2.jpg", k) for k in (0, 1)]
    assert listed(data.test, base) == [(f"{files[k]}_{k}3.jpg", k) for k in (0, 1)]
    if not DATASETS[name].read:  # then it is the only one
        assert values(load(name, root)) == values(data)


@pytest.mark.parametrize("name", COOP)
def test_the_folder_itself_may_be_the_data_root(coop, name):
    root = coop(name)
    itself = load(name, root / COOP[name][0], "coop")
    assert values(itself) == values(load(name, root, "coop"))


def test_split_and_images_may_lie_apart_below_the_data_root(coop):
    root = coop("flowers102")
    folder = root / "oxford_flowers"
    (root / "flowers-102").mkdir()  # torchvision's, which has no split
    (folder / "jpg").rename(root / "flowers-102/jpg")
    assert load("flowers102", root, "coop").train.source[0].parts[-3] == "flowers-102"
    (folder / "split_zhou_OxfordFlowers.json").rename(root / "split_zhou_OxfordFlowers.json")
    assert len(load("flowers102", root, "coop").train) == 4


@pytest.mark.parametrize("name", COOP)
def test_a_missing_split_or_missing_images_are_one_line_that_says_what_goes_where(coop, name):
    root, (folder, split, images, where, *_) = coop(name), COOP[name]
    moved = root / folder / images / where
    for file in sorted(moved.glob("*.jpg")):
        file.unlink()
    with pytest.raises(UserError) as gone:
        load(name, root, "coop")
    assert "its first picture, " in str(gone.value)
    shutil.rmtree(root / folder)
    with pytest.raises(UserError) as error:
        load(name, root, "coop")
    assert f"no split_zhou_{split}.json" in str(error.value)
    assert "CoOp/blob/main/DATASETS.md" in str(error.value)
    for line in (str(gone.value), str(error.value)):
        assert "\n" not in line
        assert bool(DATASETS[name].fetch) == (f"put into {root / folder}: " in line)


@pytest.mark.parametrize("name", COUNTS)
def test_other_counts_are_an_error(name, coop, imagenet, aircraft, small):
    root = imagenet if "imagenet" in name else aircraft if "air" in name else coop(name)
    entry = DATASETS[name]
    train, val, test = entry.coop_images
    small(name, entry.classes, train, val, test + 1)
    with pytest.raises(UserError) as error:
        load(name, root, "coop")
    assert f"{(train, val, test)} images, expected {(train, val, test + 1)}" in str(error.value)
    small(name, entry.classes + 1, train, val, test)
    with pytest.raises(UserError, match=f"has {entry.classes} classes, expected"):
        load(name, root, "coop")


# ----------------------------------------------------------------------- official splits, as lists


@pytest.fixture
def pets(tmp_path, noise, small) -> Path:
    folder = tmp_path / "oxford-iiit-pet"
    (folder / "annotations").mkdir(parents=True)
    rows = [("Abyssinian", 1, 1), ("american_bulldog", 2, 2), ("Bengal", 3, 1)]
    for part, first in (("trainval", 100), ("test", 200)):
        lines = [f"{name}_{first + i} {k} {kind} 1" for name, k, kind in rows for i in (1, 0)]
        (folder / f"annotations/{part}.txt").write_text("\n".join(lines[::-1]) + "\n")
        for i, line in enumerate(lines):
            noise(folder / f"images/{line.split()[0]}.jpg", first + i, (8, 8))
    (folder / "images/Abyssinian_100.mat").write_bytes(b"")  # there are a few
    small("oxford_pets", 3, 6, 0, 6)
    return tmp_path


@pytest.fixture
def food(tmp_path, noise, small) -> Path:
    folder = tmp_path / "food-101"
    (folder / "meta").mkdir(parents=True)
    for part, numbers in (("train", (7, 5)), ("test", (9,))):
        rows = {n: [f"{n}/{i}" for i in numbers] for n in ("apple_pie", "waffles")}
        (folder / f"meta/{part}.json").write_text(json.dumps(rows))
        (folder / f"meta/{part}.txt").write_text("\n".join(sum(rows.values(), [])))
        for i, row in enumerate(sum(rows.values(), [])):
            noise(folder / f"images/{row}.jpg", i, (8, 8))
    small("food101", 2, 4, 0, 2)
    return tmp_path


@pytest.fixture
def aircraft(tmp_path, noise, small) -> Path:
    folder = tmp_path / "fgvc-aircraft-2013b/data"
    names = ["707-320", "F-16A/B", "Boeing 717"]
    for p, part in enumerate(("train", "val", "test")):
        for k in range(3):
            noise(folder / f"images/00{p}{k}.jpg", 3 * p + k, (8, 8))
        lines = [f"00{p}{k} {name}" for k, name in enumerate(names)]
        (folder / f"images_variant_{part}.txt").write_text("\n".join(lines) + "\n")
    (folder / "variants.txt").write_text("\n".join(names) + "\n")
    small("fgvc_aircraft", 3, 3, 3, 3)
    return tmp_path


@pytest.fixture
def dtd(tmp_path, noise, small) -> Path:
    folder = tmp_path / "dtd/dtd"
    (folder / "labels").mkdir(parents=True)
    for p, part in enumerate(("train", "val", "test")):
        rows = [f"{name}/{name}_000{p}.jpg" for name in ("banded", "polka-dotted")]
        (folder / f"labels/{part}1.txt").write_text("\n".join(rows) + "\n")
        for row in rows:
            noise(folder / "images" / row, p, (8, 8))
    small("dtd", 2, 2, 2, 2)
    return tmp_path


@pytest.fixture
def cars(tmp_path, noise, small) -> Path:
    folder = tmp_path / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    rows = np.zeros(3, dtype=[("fname", object), ("class", int)])
    for part, file in (
        ("train", "devkit/cars_train_annos.mat"),
        ("test", "cars_test_annos_withlabels.mat"),
    ):
        for i, label in enumerate((2, 1, 2)):
            rows[i] = (f"0000{i}.jpg", label)
            noise(folder / f"cars_{part}/0000{i}.jpg", i, (8, 8))
        scipy.io.savemat(folder / file, {"annotations": rows})
    names = np.array(["AM General Hummer SUV 2000", "Ram C/V Cargo Van 2012"], dtype=object)
    scipy.io.savemat(folder / "devkit/cars_meta.mat", {"class_names": names})
    small("stanford_cars", 2, 3, 0, 3)
    return tmp_path


# name -> fixture, torchvision's class and its splits, folders as CoOp and torchvision name them,
# class names
OFFICIAL = {
    "oxford_pets": (
        "pets",
        "OxfordIIITPet",
        ("trainval", "test"),
        "oxford_pets",
        "oxford-iiit-pet",
    ),
    "food101": ("food", "Food101", ("train", "test"), "food-101", "food-101"),
    "fgvc_aircraft": (
        *("aircraft", "FGVCAircraft", ("train", "val", "test")),
        *("fgvc_aircraft", "fgvc-aircraft-2013b/data"),
    ),
    "dtd": ("dtd", "DTD", ("train", "val", "test"), "dtd", "dtd/dtd"),
    "stanford_cars": ("cars", "StanfordCars", ("train", "test"), "stanford_cars", "stanford_cars"),
}
NAMES = {
    "oxford_pets": ["Abyssinian", "american bulldog", "Bengal"],
    "food101": ["apple pie", "waffles"],
    "fgvc_aircraft": ["707-320", "F-16A/B", "Boeing 717"],
    "dtd": ["banded", "polka-dotted"],
    "stanford_cars": ["2000 AM General Hummer SUV", "2012 Ram C/V Cargo Van"],
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_an_official_split_is_what_torchvision_reads(name, request):
    fixture, theirs, splits, *_ = OFFICIAL[name]
    root = request.getfixturevalue(fixture)
    data = load(name, root)
    parts = [data.train, data.val, data.test] if len(splits) == 3 else [data.train, data.test]
    for part, split in zip(parts, splits, strict=True):
        truth = getattr(torchvision.datasets, theirs)(root, split)
        if name == "stanford_cars":
            expected = truth._samples
        else:
            files = truth._images if name == "oxford_pets" else truth._image_files
            expected = list(zip(map(str, files), truth._labels, strict=True))
        found = list(zip(map(str, part.source), part.labels.tolist(), strict=True))
        assert found == expected
    assert data.classnames == NAMES[name]
    assert (data.split, data.val is None) == ("official", len(splits) == 2)


@pytest.mark.parametrize("name", OFFICIAL)
def test_an_official_split_is_read_from_coops_folder_too(name, request, tmp_path_factory):
    fixture, _, _, coops, theirs = OFFICIAL[name]
    made = request.getfixturevalue(fixture)
    root = tmp_path_factory.mktemp("coop")
    shutil.copytree(made / theirs, root / coops)
    found, expected = load(name, root), load(name, made)
    for part in ("train", "val", "test"):
        if getattr(expected, part) is not None:
            there = [(made / theirs / f, k) for f, k in listed(getattr(found, part), root / coops)]
            part = getattr(expected, part)
            assert there == list(zip(part.source, part.labels.tolist(), strict=True))


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_folder_of_one_data_set_may_be_the_data_root(name, request, monkeypatch):
    fixture, *_, theirs = OFFICIAL[name]
    root = request.getfixturevalue(fixture)
    expected = load(name, root)
    monkeypatch.chdir(root / Path(theirs).parts[0])
    for given in (root / Path(theirs).parts[0], Path()):
        found = load(name, given)
        assert [file.resolve() for file in found.train.source] == expected.train.source
        assert torch.equal(found.test.labels, expected.test.labels)


@pytest.mark.parametrize("name", [*OFFICIAL, "imagenet", "imagenet_a"])
def test_without_data_or_network_it_is_one_line_that_says_what_to_do(name, tmp_path):
    with pytest.raises(UserError) as error:
        load(name, tmp_path)
    assert str(error.value).startswith(f"--dataset {name}: is not found in {tmp_path} (")
    assert "\n" not in str(error.value)
    fetched = DATASETS[name].fetch
    assert bool(fetched) == ("put into" in str(error.value))
    assert bool(fetched) != ("Name or service not known" in str(error.value))


def test_a_list_that_names_no_picture_or_no_class_is_one_line(food, aircraft):
    (food / "food-101/images/waffles/9.jpg").unlink()
    with pytest.raises(UserError, match=r"meta/test.txt: .*waffles/9.jpg is not a file"):
        load("food101", food)
    (food / "food-101/meta/train.txt").write_text("apple pie\n")
    with pytest.raises(UserError, match="train.txt: has an unreadable line: 'apple pie'"):
        load("food101", food)
    (aircraft / "fgvc-aircraft-2013b/data/variants.txt").write_text("707-320\nBoeing 717\n")
    with pytest.raises(UserError, match="its classes are not those of variants.txt: F-16A/B"):
        load("fgvc_aircraft", aircraft)


def test_aircrafts_lists_are_coops_split_too(aircraft):
    theirs = replace(load("fgvc_aircraft", aircraft), split="coop")
    assert values(load("fgvc_aircraft", aircraft, "coop")) == values(theirs)


# ----------------------------------------------------------------------- ImageNet and its variants

WNIDS = {
    "n01440764": "tench",
    "n01443537": "goldfish",
    "n04008634": "missile",
    "n03773504": "missile",
}


@pytest.fixture
def imagenet(tmp_path, noise, small) -> Path:
    """ImageNet and its four variants; A and R lack a class."""
    wnids = sorted(WNIDS)
    for folder, ids, suffix, count in (
        ("imagenet/images/train", wnids, "JPEG", 3),
        ("imagenet/images/val", wnids, "JPEG", 2),
        ("imagenetv2/imagenetv2-matched-frequency-format-val", "0123", "jpeg", 1),
        ("imagenet-sketch/images", wnids, "JPEG", 1),
        ("imagenet-adversarial/imagenet-a", wnids[1:], "jpg", 1),
        ("imagenet-rendition/imagenet-r", wnids[1:], "jpg", 1),
    ):
        for k, name in enumerate(ids):
            for i in range(count):
                noise(tmp_path / folder / name / f"{name}_{i}.{suffix}", 10 * k + i, (8, 8))
    (tmp_path / "imagenet-adversarial/imagenet-a/README.txt").write_text("")
    lines = [f"{wnid} {WNIDS[wnid]}\n" for wnid in wnids]
    (tmp_path / "imagenet/classnames.txt").write_text("".join(lines))
    small("imagenet", 4, 12, 0, 8)
    small("imagenetv2", 4, 0, 0, 4)
    small("imagenet_sketch", 4, 0, 0, 4)
    small("imagenet_a", 3, 0, 0, 3)
    small("imagenet_r", 3, 0, 0, 3)
    return tmp_path


def test_imagenet_is_tested_on_its_validation_part_and_named_by_classnames(imagenet):
    data = load("imagenet", imagenet)
    assert data.classnames == ["tench", "goldfish", "missile", "missile"]
    assert data.val is None
    wnids = sorted(WNIDS)
    for part, folder, count in ((data.train, "train", 3), (data.test, "val", 2)):
        expected = [(f"{n}/{n}_{i}.JPEG", k) for k, n in enumerate(wnids) for i in range(count)]
        assert listed(part, imagenet / "imagenet/images" / folder) == expected
    assert data.notes == ["'missile' and 'missile' are published as two classes, and tie for CLIP"]
    theirs = replace(data, split="coop")
    assert values(load("imagenet", imagenet, "coop")) == values(theirs)


@pytest.mark.parametrize("name", ["imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r"])
def test_a_variant_has_test_pictures_alone_of_the_classes_that_it_has(imagenet, name):
    data = load(name, imagenet)
    first = 0 if data.classnames[0] == "tench" else 1
    assert data.classnames == [WNIDS[wnid] for wnid in sorted(WNIDS)[first:]]
    assert first == (name in ("imagenet_a", "imagenet_r"))
    assert data.test.labels.tolist() == list(range(4 - first))
    folders = [file.parent.name for file in data.test.source]
    assert folders == (list("0123") if name == "imagenetv2" else sorted(WNIDS)[first:])
    assert (len(data.train), data.val) == (0, None)


def test_a_copy_of_classnames_beside_a_variant_is_read_first(imagenet):
    text = (imagenet / "imagenet/classnames.txt").read_text().replace("goldfish", "gold fish")
    (imagenet / "imagenet-rendition/classnames.txt").write_text(text)
    assert load("imagenet_r", imagenet).classnames[0] == "gold fish"
    assert load("imagenet_a", imagenet).classnames[0] == "goldfish"


def test_an_imagenet_that_is_laid_out_otherwise_is_one_line(imagenet):
    images = imagenet / "imagenet/images"
    (images / "val/n01440764").rename(images / "val/fish")
    with pytest.raises(UserError, match="val/fish: is not the folder of a class that .*classnames"):
        load("imagenet", imagenet)
    for folder in (images / "val").iterdir():
        shutil.rmtree(folder)
    with pytest.raises(UserError, match="images/val: has no class folders n01440764/"):
        load("imagenet", imagenet)
    (imagenet / "imagenet/classnames.txt").unlink()
    with pytest.raises(UserError, match="classnames.txt.*put into .*/imagenet: images/train/"):
        load("imagenet", imagenet)


def test_an_archive_that_would_write_outside_its_folder_writes_inside(tmp_path, monkeypatch):
    """Of what is downloaded and unpacked, this alone has no md5 that is compared."""
    root = tmp_path / "data"
    root.mkdir()
    with zipfile.ZipFile(root / "hymenoptera_data.zip", "w") as archive:
        for name in ("../slipped", "/slipped", "hymenoptera_data/../../../slipped", "C:\\slipped"):
            archive.writestr(name, "no")
        for part in ("train", "val"):
            for kind in ("ants", "bees"):
                archive.writestr(f"hymenoptera_data/{part}/{kind}/a.jpg", "no picture")
    monkeypatch.setattr("torchvision.datasets.utils.download_url", lambda *_, **__: None)
    assert len(readers.read_hymenoptera(root, 1).train) == 2
    assert os.listdir(tmp_path) == ["data"]
    assert not Path("/slipped").exists()

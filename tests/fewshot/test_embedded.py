"""Features as a data set: the pictures, order and draw of the folder that they were made from."""

import hashlib
import io
import json
import shutil
import tarfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from clip_min import CLIP, CLIPConfig, UserError, normalize
from clip_min.weights import fingerprint
from fewshot import datasets
from fewshot.embedded import FeatureBatches
from fewshot.pictures import Reader
from fewshot.shards import Shards, embed, items
from fewshot.task import draw, make_test
from methods import METHODS

CLASSES = ("tiger-lily", "blue_bell", "iris")
PARTS = ("train", "val", "test")


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return CLIP(CLIPConfig(32, 32, 8, 64, 2, 2, 64, 2, 2)).eval()


@pytest.fixture
def photos(noise, tmp_path):
    """(*parts) -> a folder of 3 classes of 10 pictures, or of so many in each part."""

    def make(*parts: str):
        root, seed = tmp_path / "photos", 0
        for part in parts or ("",):
            for k, name in enumerate(CLASSES):
                for i in range(10 + k):
                    noise(root / part / name / "deep"[: 4 * (i % 2)] / f"{i}.png", seed)
                    seed += 1
        return root

    return make


@pytest.fixture
def made(clip, tmp_path):
    """(source, name) -> its folder of features."""

    def make(source, name: str = "features"):
        out = tmp_path / name
        config = {"data": str(source), "model": "tiny", "fingerprint": fingerprint(clip)}
        shards = Shards(out, config | {"precision": "fp32", "image_size": 0}, 7)
        embed(clip, items(source), shards, 3, "fp32")
        shards.keep_names(source)
        shards.finish()
        return out

    return make


def assert_the_same(ours, theirs, clip):
    """Two data sets have one order of classes and pictures, and equal draws and features."""
    assert ours.classnames == theirs.classnames
    reader = Reader(32, folder=None)
    method = METHODS["zero_shot"].plain(clip, ours.classnames, "a photo of a {}.")
    for part in PARTS:
        one, other = getattr(ours, part), getattr(theirs, part)
        assert (one is None) == (other is None)
        if one is not None:
            assert torch.equal(one.labels, other.labels)
            assert list(one.source) == other.source
            pixels = reader.read(other, [])[1]
            found = FeatureBatches(one, reader).encoded(method)
            with torch.no_grad():
                expected = torch.cat([clip.encode_image(normalize(one)[None]) for one in pixels])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert one.digests == [sha256(file) for file in other.source]
    for one, other in zip(draw(ours, [0, 2], 4, 3), draw(theirs, [0, 2], 4, 3), strict=True):
        assert isinstance(one, list) or list(one.source) == other.source


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.mark.parametrize("parts", [(), ("train", "test"), ("train", "val"), PARTS], ids=str)
def test_features_of_a_folder_are_that_folder(parts, photos, made, clip):
    root = photos(*parts)
    ours = datasets.load("features", made(root), 5)
    theirs = datasets.load("folder", root, 5)
    assert_the_same(ours, theirs, clip)
    assert ours.notes == theirs.notes


def test_parts_may_be_made_apart(photos, made, clip, tmp_path):
    root = photos("train", "test")
    for part in ("train", "test"):
        made(root / part, f"both/{part}")
    theirs = datasets.load("folder", root, 5)
    assert_the_same(datasets.load("features", tmp_path / "both", 5), theirs, clip)


def test_classes_are_called_as_a_file_says(photos, made, clip):
    root = photos()
    names = {"iris": "wild iris", "tiger-lily": "tiger", "blue_bell": "bell"}
    (root / "classes.json").write_text(json.dumps(names))
    ours = datasets.load("features", made(root), 5)
    assert ours.classnames == ["wild iris", "tiger", "bell"]
    assert_the_same(ours, datasets.load("folder", root, 5), clip)


@pytest.mark.parametrize("files", [["data.csv"], ["train.csv", "test.csv"]])
def test_features_of_a_list_are_those_of_the_list(files, photos, made, clip):
    root = photos("train", "test")
    for name in files:
        rows = [
            f"{file.relative_to(root)},{file.relative_to(root).parts[1]},{part}"
            for part in ("test", "train")
            for file in sorted(root.rglob("*.png"), reverse=True)
            if file.is_relative_to(root / part) and name in ("data.csv", f"{part}.csv")
        ]
        (root / name).write_text("\n".join(["path,label,split", *rows]))
    theirs = datasets.load("folder", root, 5)  # a list there comes before the folders
    assert_the_same(datasets.load("features", made(root), 5), theirs, clip)


def test_labels_of_tar_files_are_numbers_of_a_list_of_names(photos, made, tmp_path, clip):
    root, place = photos(), tmp_path / "tars"
    place.mkdir()
    with tarfile.open(place / "0.tar", "w") as out:
        for n, file in enumerate(sorted(root.rglob("*.png"), key=lambda f: f.name)):
            label = CLASSES.index(file.relative_to(root).parts[0])
            beside = ("cls", f"{label}\n") if n % 2 else ("json", json.dumps({"label": label}))
            for ending, content in (("png", file.read_bytes()), (beside[0], beside[1].encode())):
                info = tarfile.TarInfo(f"{n:03}.{ending}")
                info.size = len(content)
                out.addfile(info, io.BytesIO(content))
    without = datasets.load("features", made(place, "without"), 5)
    assert without.classnames == ["0", "1", "2"]
    assert any("CLIP reads names" in note for note in without.notes)
    (place / "classes.txt").write_text("tiger lily\nblue bell\niris\n")
    ours = datasets.load("features", made(place), 5)
    assert ours.classnames == ["tiger lily", "blue bell", "iris"]
    counts = sum(getattr(ours, part).labels.bincount() for part in PARTS)
    assert counts.tolist() == [10, 11, 12]


def test_other_weights_are_refused(photos, made, clip):
    data = datasets.load("features", made(photos()), 5)
    task = make_test(data, Reader(32, folder=None))
    torch.manual_seed(1)
    other = CLIP(clip.config).eval()
    method = METHODS["zero_shot"].plain(other, data.classnames, "{}")
    with pytest.raises(UserError, match="were made by tiny with fingerprint .* this model has"):
        list(task.tests["all"].batches.each(method, [torch.arange(2)]))


def test_mirror_images_are_refused(photos, made, clip):
    data = datasets.load("features", made(photos()), 5)
    batches = FeatureBatches(data.train, Reader(32, folder=None))
    kind = METHODS["cross_modal"]
    for mirror in (False, True):  # other settings of one encoder are checked anew
        method = kind(clip, data.classnames, "{}", kind.Settings(mirror=mirror))
        if not mirror:
            batches.check(method)
    with pytest.raises(UserError, match="only features: --mirror .*adds mirror images"):
        batches.check(method)


@pytest.mark.parametrize("name", ["lora", "vpt", "prolip", "finetune", "two_stage", "promptsrc"])
def test_a_method_that_learns_in_the_image_tower_is_refused(name, photos, made, clip):
    data = datasets.load("features", made(photos()), 5)
    batches = FeatureBatches(data.train, Reader(32, folder=None))
    method = METHODS[name](clip, data.classnames, "{}", METHODS[name].Settings())
    with pytest.raises(UserError, match="needs the pictures themselves"):
        batches.check(method)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda out: (out / "index.json").unlink(), "index.json: there is no such file"),
        (lambda out: (out / "00001.safetensors").unlink(), "00001.safetensors: there is no"),
        (lambda out: shutil.copy(out / "00000.json", out / "00004.json"), "does not match 00004"),
        (lambda out: shutil.rmtree(out), "holds no features"),
        (lambda out: change(out, "features", lambda x: x[:3]), "does not match 00000.json"),
        (lambda out: change(out, "features", lambda x: x.half()), "does not match 00000.json"),
        (
            lambda out: change(out, "sha256", lambda x: x[:, :5].contiguous()),
            "does not match 00000",
        ),
        (lambda out: tell(out, "labels", ""), "no picture has a label"),
        (lambda out: tell(out, "labels", "iris"), "trains on 1 classes"),
        (lambda out: tell(out, "parts", "test"), "has only test"),
        (lambda out: index(out, [None]), "unreadable.0 is None, expected a list"),
    ],
)
def test_what_cannot_be_learned_from_is_one_line(harm, said, photos, made):
    out = made(photos())
    harm(out)
    with pytest.raises(UserError, match=said) as error:
        datasets.load("features", out, 5)
    assert "\n" not in str(error.value)


def change(out, name, to):
    tensors = load_file(out / "00000.safetensors")
    save_file(tensors | {name: to(tensors[name])}, out / "00000.safetensors")


def tell(out, key, value):
    for file in out.glob("0*.json"):
        told = json.loads(file.read_text())
        file.write_text(json.dumps(told | {key: [value] * len(told[key])}))


def index(out, unreadable):
    told = json.loads((out / "index.json").read_text())
    (out / "index.json").write_text(json.dumps(told | {"unreadable": unreadable}))


def test_a_folder_of_features_given_as_pictures_is_told(photos, made):
    with pytest.raises(UserError, match="holds features; add --dataset features"):
        datasets.load("folder", made(photos()), 5)

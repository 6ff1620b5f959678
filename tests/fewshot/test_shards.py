"""Features in shards are those of each picture alone, whatever they come from, and once."""

import fcntl
import io
import os
import tarfile
from collections import Counter

import pytest
import torch
from PIL import Image

from clip_min import CLIP, CLIPConfig, UserError, crop, normalize
from fewshot.run import claim
from fewshot.shards import Item, Shards, embed, items

COUNT = 23


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return CLIP(CLIPConfig(32, 32, 8, 64, 2, 2, 64, 2, 2)).eval()


@pytest.fixture
def folder(tmp_path, noise):
    """23 pictures of three classes; number 7 is damaged."""
    root = tmp_path / "photos"
    for i in range(COUNT):
        noise(root / "abc"[i % 3] / "deep" / f"{i:02}.png", i)
    (root / "b/deep/07.png").write_bytes((root / "b/deep/07.png").read_bytes()[:200])
    (root / "a/notes.txt").write_text("no picture")
    return root


@pytest.fixture
def tar(folder, tmp_path):
    """The same as WebDataset writes it, in two files: NUMBER.png, NUMBER.cls, NUMBER.json."""
    files = sorted(folder.rglob("*.png"))
    place = tmp_path / "tars"
    place.mkdir()
    for n, part in enumerate((files[:9], files[9:])):
        with tarfile.open(place / f"{n}.tar", "w") as out:
            for file in part:
                for ending, content in (
                    ("cls", file.parts[-3].encode() + b"\n"),
                    ("png", file.read_bytes()),
                    ("json", b"{}"),
                ):
                    info = tarfile.TarInfo(f"{file.stem}.{ending}")
                    info.size = len(content)
                    out.addfile(info, io.BytesIO(content))
    return place


@pytest.fixture
def listed(folder, tmp_path):
    """The same as a CSV file, with one picture that is not there."""
    rows = [f"photos/{f.relative_to(folder)},{f.parts[-3]}" for f in sorted(folder.rglob("*.png"))]
    file = tmp_path / "list.csv"
    file.write_text("\n".join(["path,label", *rows, "photos/none.png,a"]))
    return file


def make(clip, source, out, size=5, batch=2) -> Shards:
    shards = Shards(out, {"data": str(source)}, size)
    embed(clip, items(source), shards, batch, "fp32")
    return shards


def read(shards: Shards) -> tuple[torch.Tensor, list[str], list[str], list]:
    """All features, names, labels and what could not be read, by index.json."""
    index = shards.finish()
    told = [shards.told(n) for n in range(len(index["shards"]))]
    x = torch.cat([shards.features(n) for n in range(len(told))])
    assert len(x) == index["features"]
    names, labels = ([one for t in told for one in t[key]] for key in ("names", "labels"))
    return x, names, labels, index["unreadable"]


@pytest.mark.parametrize("kind", ["folder", "tar", "listed"])
def test_features_are_those_of_each_picture_alone(kind, clip, request, folder, tmp_path):
    source = request.getfixturevalue(kind)
    x, names, labels, unreadable = read(make(clip, source, tmp_path / "out"))
    good = [file for file in sorted(folder.rglob("*.png")) if file.stem != "07"]
    with torch.no_grad():
        expected = [
            clip.encode_image(normalize(crop(Image.open(f), clip.config))[None]) for f in good
        ]
    torch.testing.assert_close(x, torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert [name[-6:] for name in names] == [file.name for file in good]
    assert labels == [file.parts[-3] for file in good]
    bad = ["07.png"] + ["none.png"] * (kind == "listed")
    assert [name.rpartition("/")[2] for name, _ in unreadable] == bad
    assert all("cannot be read as an image" in why for _, why in unreadable)


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_only_what_is_missing_is_made(clip, folder, tmp_path, monkeypatch):
    make(clip, folder, tmp_path / "whole").finish()
    out = tmp_path / "out"
    make(clip, folder, out).finish()
    kept = (out / "00000.safetensors").stat().st_mtime_ns
    for name in ("00002.safetensors", "00004.safetensors", "00004.json"):
        (out / name).unlink()
    encoded = []
    encode = clip.encode_image
    monkeypatch.setattr(clip, "encode_image", lambda x: encoded.append(len(x)) or encode(x))
    make(clip, folder, out).finish()
    assert sum(encoded) == 4 + 3  # the third shard's, one of which is damaged, and the last one's
    assert (out / "00000.safetensors").stat().st_mtime_ns == kept
    assert contents(out) == contents(tmp_path / "whole")


def test_other_pictures_than_before_are_refused(clip, folder, tmp_path, noise):
    make(clip, folder, tmp_path / "out")
    noise(folder / "a/deep/00b.png", 99)
    with pytest.raises(UserError, match=r"00000\.json: was made from other pictures"):
        make(clip, folder, tmp_path / "out")
    with pytest.raises(UserError, match="was started with shard_size 5, not 6"):
        make(clip, folder, tmp_path / "out", size=6)


def test_a_folder_in_which_another_process_works_is_left_alone(clip, folder, tmp_path):
    """Else each would remove the other's half-written files."""
    make(clip, folder, tmp_path / "out")
    half = tmp_path / "out/.clip_min-00000.json-abcdefgh"
    half.touch()
    other = os.open(tmp_path / "out", os.O_RDONLY)
    claim(tmp_path)  # gives the first folder back
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(UserError, match="another process is making features there"):
        make(clip, folder, tmp_path / "out")
    for shard in (tmp_path / "out").glob("0*"):  # it has not yet made a shard
        shard.unlink()
    before = (tmp_path / "out/config.json").read_bytes()
    with pytest.raises(UserError, match="another process is making features there"):
        make(clip, folder / "a", tmp_path / "out")
    assert (tmp_path / "out/config.json").read_bytes() == before
    assert half.exists()
    os.close(other)
    make(clip, folder, tmp_path / "out")


@pytest.mark.parametrize("which", ["label", "split"])
def test_a_list_that_was_corrected_is_refused(which, clip, folder, tmp_path):
    """Else labels and parts would stay those of before."""
    rows = [f"photos/{f.relative_to(folder)},a,train" for f in sorted(folder.rglob("*.png"))]
    (file := tmp_path / "list.csv").write_text("\n".join(["path,label,split", *rows]))
    make(clip, file, tmp_path / "out").finish()
    rows[3] = rows[3].replace(",a,train", {"label": ",b,train", "split": ",a,test"}[which])
    file.write_text("\n".join(["path,label,split", *rows]))
    with pytest.raises(UserError, match=r"00000\.json: .* labels or parts"):
        make(clip, file, tmp_path / "out")


def test_a_name_that_is_no_utf8_does_not_end_the_work(clip, folder, tmp_path):
    odd = folder / "a" / os.fsdecode(b"caf\xe9.png")
    (folder / "a/deep/00.png").rename(odd)
    for _ in range(2):  # and what is there is not refused
        _, names, _, unreadable = read(make(clip, folder, tmp_path / "out"))
        assert "a/caf\\udce9.png" in names
        assert len(names) + len(unreadable) == COUNT


def test_a_class_beside_a_picture_comes_before_its_caption(tmp_path):
    files = {"7.cls": b"rose", "7.png": b"", "7.txt": b"a photo of a red rose", "8.png": b""}
    files |= {"8.txt": b"tulip", "9.json": b'{"label": 3}', "9.png": b"", "9.txt": b"a photo"}
    with tarfile.open(tmp_path / "x.tar", "w") as out:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    assert [item.label for item in items(tmp_path / "x.tar")] == ["rose", "tulip", "3"]


def pack(file, names: list[str]) -> None:
    with tarfile.open(file, "w") as out:
        for name in names:
            out.addfile(tarfile.TarInfo(name), io.BytesIO())


def test_of_two_pictures_of_one_name_the_second_is_counted_as_left_out(tmp_path):
    pack(tmp_path / "x.tar", ["a/1.jpg", "a/1.png", "a/2.jpg"])
    left_out = Counter()
    found = [item.name for item in items(tmp_path / "x.tar", left_out)]
    assert found == ["x.tar/a/1.jpg", "x.tar/a/2.jpg"]
    assert left_out == {"second pictures of the same name": 1}


def test_an_archive_beside_folders_of_pictures_is_not_read_in_their_place(folder):
    pack(folder / "photos.tar", ["1.jpg"])
    with pytest.raises(UserError, match=r"has photos\.tar and pictures outside it \(a/deep/"):
        list(items(folder))
    for file in folder.rglob("*.png"):
        file.unlink()  # other folders, such as one of features, do not matter
    assert [item.name for item in items(folder)] == ["photos.tar/1.jpg"]


def test_a_folder_of_other_things_is_left_alone(clip, folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").touch()
    with pytest.raises(UserError, match="holds other files"):
        make(clip, folder, tmp_path / "mine")


def test_a_damaged_tar_file_is_one_line(tmp_path):
    file = tmp_path / "x.tar"
    file.write_bytes(b"no tar" * 1000)
    with pytest.raises(UserError, match=r"x\.tar: cannot be read as a tar file"):
        list(items(file))


def test_a_source_that_breaks_ends_the_work_after_what_it_gave(clip, tar, tmp_path, monkeypatch):
    monkeypatch.setattr("fewshot.pictures.AHEAD", 2)
    (tar / "2.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(UserError, match=r"2\.tar: cannot be read as a tar file"):
        make(clip, tar, tmp_path / "out")
    made = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert made[:3] == ["00000.safetensors", "00001.safetensors", "00002.safetensors"]


def test_a_list_without_paths_is_one_line(tmp_path):
    file = tmp_path / "x.csv"
    file.write_text("file,label\na.png,a\n")
    with pytest.raises(UserError, match="has no column 'path'"):
        list(items(file))


def test_a_list_is_read_as_a_list_of_the_data_set_is(tmp_path):
    """Spaces around names of columns and cells; other columns; label and split may be missing."""
    (file := tmp_path / "x.csv").write_text(" path, split,size\n a.png , test,3\nb.png,,4\n")
    found = [(item.name, item.label, item.file, item.part) for item in items(file)]
    expected = [("a.png", "", tmp_path / "a.png", "test"), ("b.png", "", tmp_path / "b.png", "")]
    assert found == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('path,label\n"a.png,a\nb.png,b\nc.png,c\n', "cannot be read as CSV"),
        ("label,path\ntulip\n", "line 2: its path is empty"),
        ("path,label\na.png,a,b\n", "line 2: has more cells"),
        ("path,path\na.png,a\n", "has two columns 'path'"),
        ("path,split\na.png,tset\n", "line 2: split is 'tset'"),
    ],
)
def test_a_faulty_list_is_one_line(text, why, tmp_path):
    (file := tmp_path / "x.csv").write_text(text)
    with pytest.raises(UserError, match=f"x.csv.*{why}"):
        list(items(file))


def test_one_list_of_all_parts_and_one_of_a_part_are_refused(tmp_path):
    for name in ("data", "train"):
        (tmp_path / f"{name}.csv").write_text("path,label,split\na.png,a,train\n")
    with pytest.raises(UserError, match="has both data.csv and train.csv"):
        list(items(tmp_path))


def test_pictures_that_are_gone_at_the_end_are_an_error_too(clip, folder, tmp_path):
    """Of a whole shard: no shard that is left holds another one."""
    make(clip, folder, tmp_path / "out").finish()
    for file in sorted((folder / "c").rglob("*.png"))[-3:]:
        file.unlink()
    with pytest.raises(UserError, match=r"00004\.json: the source has no more pictures for it"):
        make(clip, folder, tmp_path / "out")


def test_names_of_classes_are_the_sources_as_it_is_now(clip, folder, tmp_path):
    shards = make(clip, folder, tmp_path / "out")
    for text in ("one\ntwo\nthree\n", "uno\ndue\ntre\n"):
        (folder / "classes.txt").write_text(text)
        shards.keep_names(folder)
        assert (tmp_path / "out/classes.txt").read_text() == text


def test_a_picture_before_any_folder_has_no_label(tmp_path, noise):
    file = noise(tmp_path / "one.png", 0)
    assert list(items(tmp_path)) == [Item("one.png", "", file)]

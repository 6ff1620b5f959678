"""The cache gives back what was computed, or nothing: never something stale or damaged."""

import dataclasses
import os
import time

import pytest
import torch

from clip_min import CLIP, CLIPConfig, UserError, fast
from fewshot import cache
from fewshot.batches import Batches
from fewshot.pictures import Pictures, Reader
from methods import BaseSettings, Method


@pytest.fixture
def tensor():
    return torch.arange(6.0).reshape(2, 3)


def test_what_was_saved_is_loaded(tmp_path, tensor):
    cache.save(tmp_path, "features", "a", tensor)
    assert torch.equal(cache.load(tmp_path, "features", "a"), tensor)
    assert cache.load(tmp_path, "features", "b") is None
    assert cache.load(tmp_path, "pixels", "a") is None


def test_no_folder_is_no_cache(tensor):
    cache.save(None, "features", "a", tensor)
    assert cache.load(None, "features", "a") is None


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_a_truncated_file_counts_as_absent(tmp_path, tensor, part):
    cache.save(tmp_path, "features", "a", tensor)
    file = tmp_path / "features" / "a.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(part * len(whole))])
    assert cache.load(tmp_path, "features", "a") is None


def test_one_flipped_bit_counts_as_absent(tmp_path, tensor):
    cache.save(tmp_path, "features", "a", tensor)
    file = tmp_path / "features" / "a.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1  # in the last number; the file's structure stays valid
    file.write_bytes(data)
    assert cache.load(tmp_path, "features", "a") is None


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, tensor):
    (tmp_path / "features").write_text("a file where the folder should be")
    cache.save(tmp_path, "features", "a", tensor)
    assert cache.load(tmp_path, "features", "a") is None


def test_a_name_changes_with_all_it_follows_from(tensor):
    other = tensor.clone()
    other[1, 2] += 1e-6
    names = [
        cache.key(tensor),
        cache.key(other),
        cache.key(tensor.reshape(3, 2)),
        cache.key(tensor, 64),
        cache.key(tensor, "64"),
        cache.key(tensor, 6, 4),
    ]
    assert len(set(names)) == len(names)
    assert cache.key(tensor.clone(), 64) == names[3]


def name(i: int) -> str:
    return f"{i:032x}"


@pytest.fixture
def limit(monkeypatch):
    """(tensors) -> the cache holds so many of 4,000 bytes, and their headers."""
    monkeypatch.setattr(cache, "limit", None)  # so that it is put back
    return lambda count: cache.chosen({"cache": "none", "cache_gb": count * 4200 / 1e9})


def test_of_a_full_cache_what_was_not_used_for_longest_goes(tmp_path, limit):
    limit(3)
    for i in range(3):
        cache.save(tmp_path, "features", name(i), torch.full((1000,), float(i)))
        os.utime(tmp_path / f"features/{name(i)}.safetensors", (i, i))
    assert cache.load(tmp_path, "features", name(0)) is not None  # used now
    cache.save(tmp_path, "pixels", name(3), torch.zeros(1000))
    there = [
        cache.load(tmp_path, kind, name(i)) is not None
        for kind, i in (("features", 0), ("features", 1), ("features", 2), ("pixels", 3))
    ]
    assert there == [True, False, True, True]


def test_only_files_of_its_own_are_removed(tmp_path, limit):
    limit(1)
    others = [tmp_path / "features/notes.txt", tmp_path / "features/model.safetensors"]
    others += [tmp_path / f"mine/{name(7)}.safetensors", tmp_path / f"{name(8)}.safetensors"]
    for i, path in enumerate(others):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(10_000))
        os.utime(path, (i, i))
    (tmp_path / f"features/{name(9)}.safetensors").symlink_to(others[0])
    for i in range(3):
        cache.save(tmp_path, "features", name(i), torch.zeros(1000))
    assert all(path.exists() for path in others)
    assert len(list((tmp_path / "features").iterdir())) == 4


def test_what_a_kill_left_half_written_goes_after_a_day(tmp_path, tensor):
    """And not before: another process may be writing there."""
    old, new = (tmp_path / f"features/.clip_min-{name(i)}-abcdefgh" for i in (1, 2))
    for place in (old, new):
        place.mkdir(parents=True)
        (place / "half").write_bytes(b"0")
    os.utime(old, (time.time() - 90_000,) * 2)
    cache.save(tmp_path, "features", name(3), tensor)
    assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.parametrize("gb", [-1, float("nan"), float("inf")])
def test_a_size_that_is_none_is_an_error(gb):
    with pytest.raises(UserError, match="--cache-gb"):
        cache.chosen({"cache_gb": gb})


def test_a_new_file_follows_the_umask(tmp_path, tensor):
    before = os.umask(0o027)
    try:
        cache.save(tmp_path, "features", "a", tensor)
        (tmp_path / "plain").touch()
        modes = [
            p.stat().st_mode for p in (tmp_path / "features/a.safetensors", tmp_path / "plain")
        ]
    finally:
        os.umask(before)
    assert modes[0] == modes[1]


# Image features, which are kept under such names.


def new_clip(seed: int = 0) -> CLIP:
    torch.manual_seed(seed)
    return CLIP(CLIPConfig(16, 16, 8, 32, 1, 1, 32, 1, 1)).eval()


def new_batches(folder, seed: int = 0) -> Batches:
    rng = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=rng)
    pictures = Pictures(pixels, torch.arange(5))
    return Batches(pictures, pixels, Reader(pixels.shape[-1], folder=folder))


def method_on(clip) -> Method:
    return Method(clip, ["rose", "tulip"], "a photo of a {}.", BaseSettings())


def refusing(clip) -> Method:
    """One whose image tower may not be asked."""
    method = method_on(clip)

    def encode(images):
        raise AssertionError("the features were in the cache")

    method.encode = encode
    return method


def test_features_are_those_of_the_image_tower(tmp_path):
    clip, batches = new_clip(), new_batches(tmp_path)
    with torch.no_grad():
        expected = torch.cat(
            [clip.encode_image(batches.images(i)) for i in torch.arange(5)[:, None]]
        )
    assert torch.allclose(batches.encoded(method_on(clip)), expected, atol=1e-6)


def test_features_of_an_earlier_run_are_not_computed_again(tmp_path):
    first = new_batches(tmp_path).encoded(method_on(new_clip()))
    assert torch.equal(new_batches(tmp_path).encoded(refusing(new_clip())), first)


@pytest.mark.parametrize("change", ["pixels", "weights"])
def test_features_of_other_pixels_or_weights_are_computed(tmp_path, change):
    new_batches(tmp_path).encoded(method_on(new_clip()))
    clip = new_clip(seed=int(change == "weights"))
    batches = new_batches(tmp_path, seed=int(change == "pixels"))
    with pytest.raises(AssertionError, match="were in the cache"):
        batches.encoded(refusing(clip))


def test_damaged_features_are_computed_again(tmp_path):
    first = new_batches(tmp_path).encoded(method_on(new_clip()))
    (file,) = (tmp_path / "features").iterdir()
    data = bytearray(file.read_bytes())
    data[-2] ^= 64
    file.write_bytes(data)
    assert torch.equal(new_batches(tmp_path).encoded(method_on(new_clip())), first)


def test_features_of_other_heads_are_computed(tmp_path):
    """Which no weight tells."""
    new_batches(tmp_path).encoded(method_on(new_clip()))
    clip = new_clip()
    clip.config = dataclasses.replace(clip.config, vision_heads=2)
    with pytest.raises(AssertionError, match="were in the cache"):
        new_batches(tmp_path).encoded(refusing(clip))


@pytest.mark.parametrize("bad", [torch.zeros(4, 32), torch.tensor(1.0)])
def test_features_that_vouch_for_themselves_and_do_not_fit_are_computed_again(tmp_path, bad):
    first = new_batches(tmp_path).encoded(method_on(new_clip()))
    (file,) = (tmp_path / "features").iterdir()
    cache.save(tmp_path, "features", file.stem, bad)
    assert torch.equal(new_batches(tmp_path).encoded(method_on(new_clip())), first)


def test_features_of_another_way_to_compute_are_computed(tmp_path, monkeypatch):
    """Whether by clip_min.fast, the processor, torch's version or the number of threads."""
    new_batches(tmp_path).encoded(method_on(new_clip()))
    for where, what, other in (
        (fast, "enabled", not fast.enabled),
        (fast, "processor", lambda: ("Another", 1, 1)),
        (torch, "__version__", "1.13.1"),
        (torch, "get_num_threads", lambda: 97),
    ):
        new_batches(tmp_path).encoded(refusing(new_clip()))  # as before
        with monkeypatch.context() as patch:
            patch.setattr(where, what, other)
            with pytest.raises(AssertionError, match="were in the cache"):
                new_batches(tmp_path).encoded(refusing(new_clip()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_of_a_16_bit_tower_have_another_name(dtype):
    """Also if the method alone is converted, and the CLIP that it was lent is not."""
    full, again, alone = (method_on(new_clip()) for _ in range(3))
    assert full.encoder == again.encoder
    half = method_on(new_clip().to(dtype))
    alone.clip.to(dtype)
    assert alone.lent[0].visual.proj.dtype == torch.float32
    assert len({full.encoder, half.encoder, alone.encoder}) == 3


def test_a_crop_of_which_the_disk_took_a_part_is_not_there(tmp_path, monkeypatch):
    crop = torch.randint(256, (3, 4, 4), dtype=torch.uint8)
    spool = cache.Spool(tmp_path, 4)
    monkeypatch.setattr(cache.os, "pwrite", lambda *_: 20)
    spool.put("a", crop)
    assert spool.get("a") is None
    monkeypatch.undo()
    spool.put("a", crop)
    assert torch.equal(spool.get("a"), crop)


def test_a_picture_that_comes_twice_takes_room_once(tmp_path, monkeypatch):
    crops = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    monkeypatch.setattr(cache, "limit", crops.nbytes)
    spool = cache.Spool(tmp_path, 4)
    for digest, crop in (("a", crops[0]), ("a", crops[0]), ("b", crops[1])):
        spool.put(digest, crop)
    assert torch.equal(spool.get("a"), crops[0])
    assert torch.equal(spool.get("b"), crops[1])

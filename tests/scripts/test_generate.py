"""generate.py whole: on real photographs with real model classes, and on the demo's flowers."""

import contextlib
import io
import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import clip_min
import generate
from clip_min import UserError
from fewshot import demo
from fewshot.experiment import Experiment
from gen import diffuse
from gen.books import Manifest, slugs
from gen.filter import Filter
from gen.settings import Generation
from methods import METHODS

TWO = ("--per-class", 2)  # as `synthetic` has them
SMALL = ["--shots", 2, "--per-class", 2, "--captions", 2, "--reject-limit", 3, "--batch-size", 16]


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def books(folder: Path) -> list[dict]:
    return lines(folder / "manifest.jsonl")


def tree(folder: Path) -> dict[str, bytes]:
    """All files but the one that tells the time."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "seconds.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module", autouse=True)
def drawn_once():
    """The demo is drawn once, not for every run."""
    splits = {name: demo.split(name) for name in demo.PER_CLASS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "split", lambda name, size=64: splits[name])
        yield


@pytest.fixture(scope="module")
def whole(script, tmp_path_factory):
    """Images of the demo, made without a break: their folder, and what was printed."""
    folder = tmp_path_factory.mktemp("whole") / "images"
    result = script("generate", *SMALL, "--synthetic", folder)
    assert result.code == 0, result.err
    return folder, result.out


# ------------------------------------------------------------------------ photographs, real classes


@pytest.fixture(scope="module")
def photographs(flowers12, model, tiny_llava, tiny_diffusion):
    return [
        *("--dataset", "folder", "--data-root", flowers12, "--model", model, "--shots", 3),
        *("--captioner", tiny_llava, "--painter", tiny_diffusion, "--per-class", 2),
        *("--steps", 4, "--caption-tokens", 5, "--reject-limit", 3, "--captions", 2),
    ]


@pytest.fixture(scope="module")
def painted(script, photographs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("painted") / "images"
    result = script("generate", *photographs, "--synthetic", folder)
    assert result.code == 0, result.err
    return folder, result.out


def test_photographs_are_captioned_repainted_filtered_and_booked(
    painted, flowers12, tiny_llava, tiny_diffusion
):
    folder, out = painted
    names = [p.name.replace("-", " ") for p in sorted((flowers12 / "train").iterdir())][:6]
    rows = books(folder)
    done = Counter(row["classname"] for row in rows if row["state"] in ("kept", "waived"))
    assert done == dict.fromkeys(names, 2)
    for row in rows:
        with Image.open(folder / row["image"]) as image:
            assert image.size == (32, 32)
        for source in (row["captioned"], row["repainted"]):  # training pictures of this class
            assert Path(source).parent.parent == flowers12 / "train"
            assert Path(source).parent.name.replace("-", " ") == row["classname"]
        assert row["captioned"] != row["repainted"]
        assert row["prompt"].startswith(f"A realistic photo of a {row['classname']}.")
        assert row["prompt"].endswith(row["caption"])
        assert (row["captioner"], row["painter"]) == (str(tiny_llava), str(tiny_diffusion))
        assert len(row["captioner_revision"]) == len(row["painter_revision"]) == 16
        assert (row["state"] == "kept") == (row["predicted"] == row["classname"])
        assert row["margin"] > 0 or row["state"] != "kept"
    assert Image.open(folder / "contact_sheet.png").size[0] > 100
    assert "MB at peak" in out


def test_two_processes_make_what_one_does_to_the_byte(painted, torchrun, photographs, tmp_path):
    folder, _ = painted
    with torchrun(2, "generate.py", *photographs, "--synthetic", tmp_path / "a") as processes:
        out, err = processes.communicate(timeout=500)
    assert processes.returncode == 0, err[:4000]
    assert tree(tmp_path / "a") == tree(folder)
    assert not (tmp_path / "a/processes").exists()
    assert out.count("contact sheet: ") == 1  # one process prints


def test_the_same_seed_makes_the_same_images_and_another_seed_others(
    painted, script, photographs, tmp_path
):
    folder, _ = painted
    again = script("generate", *photographs, "--synthetic", tmp_path / "a")
    assert again.code == 0, again.err
    assert tree(tmp_path / "a") == tree(folder)
    other = script("generate", *photographs, "--synthetic", tmp_path / "b", "--seed", 2)
    assert other.code == 0, other.err
    assert not set(tree(tmp_path / "b").values()) & {
        image for name, image in tree(folder).items() if name.endswith(".png")
    }


@pytest.mark.parametrize("network", [diffuse.Diffusion, Filter])
def test_out_of_gpu_memory_the_batch_is_halved_and_the_images_are_the_same(
    network, painted, script, photographs, tmp_path, monkeypatch
):
    folder, _ = painted
    real = network.__call__

    def small(self, images, *columns):
        if len(images) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return real(self, images, *columns)

    monkeypatch.setattr(network, "__call__", small)
    result = script("generate", *photographs, "--synthetic", tmp_path / "a")
    assert result.code == 0, result.err
    assert result.out.count("out of GPU memory with 8 pictures at once") == 1
    mine, whole = (
        [row | {"margin": 0} for row in books(place)] for place in (tmp_path / "a", folder)
    )
    assert mine == whole


# ------------------------------------------------------------------------------------ the filter


def test_decisions_are_zero_shots_predictions(whole):
    folder, _ = whole
    names = demo.CLASSNAMES[:51]
    clip = clip_min.load("demo")
    tokens = clip_min.tokenize([demo.TEMPLATE.format(name) for name in names])
    rows = books(folder)
    images = [clip_min.crop(Image.open(folder / row["image"]), 64) for row in rows]
    with torch.no_grad():
        best = clip(clip_min.normalize(torch.stack(images)), tokens).argmax(dim=1)
    assert [row["predicted"] for row in rows] == [names[i] for i in best]
    slug = dict(zip(names, slugs(names), strict=True))
    for row in rows:
        own, seen = slug[row["classname"]], slug[row["predicted"]]
        right = row["classname"] == row["predicted"]
        assert (row["state"] == "kept") == right
        place = f"rejected/{own}/predicted_{seen}" if row["state"] == "rejected" else f"kept/{own}"
        assert row["image"] == f"{place}/{row['attempt']:05d}.png"
    assert {str(p.relative_to(folder)) for p in folder.rglob("0*.png")} == {
        row["image"] for row in rows
    }


def test_after_the_limit_of_rejections_the_filter_is_waived(whole):
    folder, out = whole
    waived = set()
    for name in demo.CLASSNAMES[:51]:
        states = [row["state"] for row in books(folder) if row["classname"] == name]
        assert states.count("rejected") <= 3
        assert states.count("kept") + states.count("waived") == 2
        if "waived" in states:
            assert states[: states.index("waived")].count("rejected") == 3
        if states.count("rejected") == 3:
            waived.add(name)
    assert waived
    said = {line.split(":")[0] for line in out.splitlines() if "the filter is waived" in line}
    assert said == waived


def test_the_table_counts_the_books(whole):
    folder, out = whole
    total = next(line for line in out.splitlines() if line.startswith("all ")).split()
    states = Counter(row["state"] for row in books(folder))
    assert total[1:4] == [str(states[s]) for s in ("kept", "rejected", "waived")]
    assert total[4] == f"{100 * states['kept'] / states.total():.0f}"


def test_a_tuned_clip_filters_and_is_on_the_books(
    trained, script, data, model, tiny_llava, tiny_diffusion, tmp_path
):
    result = script(
        "generate",
        *("--dataset", "folder", "--data-root", data, "--model", model, "--shots", 4),
        *("--captioner", tiny_llava, "--painter", tiny_diffusion, "--per-class", 2),
        *("--steps", 10, "--strength", 0.1, "--caption-tokens", 3, "--captions", 1),
        *("--filter", trained.path, "--plan", "deficit", "--out", tmp_path),
    )
    assert result.code == 0, result.err
    folder = tmp_path / "noise/tiny/synthetic_deficit_lora-s4-seed1"
    assert {row["filter"] for row in books(folder)} == {"lora"}
    # By the trained run itself, on the images as files.
    shown = books(folder)[:4]
    files = [folder / row["image"] for row in shown]
    names = "amber lily,blue bell,cyan lotus"
    seen = script("eval", "--run", trained.path, "--image", *files, "--classes", names).out
    best = [block.split("%  ")[1].split("\n")[0] for block in seen.split(".png\n")[1:]]
    assert best == [row["predicted"] for row in shown]


# -------------------------------------------------------------------- in stages, killed, resumed


def test_stage_by_stage_is_the_same_as_all_at_once(whole, script, tmp_path):
    folder, common = tmp_path / "a", [*SMALL, "--synthetic", tmp_path / "a"]
    early = script("generate", *common, "--stage", "diffuse")
    assert early.code == 2
    assert "run --stage caption first" in early.err
    script("generate", *common, "--stage", "caption")
    for _ in range(20):
        painted = script("generate", *common, "--stage", "diffuse")
        assert painted.code == 0, painted.err
        undecided = [row for row in books(folder) if row["state"] == "undecided"]
        filtered = script("generate", *common, "--stage", "filter")
        assert filtered.code == 0, filtered.err
        if not undecided:
            break
    mine = [row | {"margin": 0} for row in books(folder)]
    assert mine == [row | {"margin": 0} for row in books(whole[0])]
    pictures = [
        {name: b for name, b in tree(f).items() if "/0" in name} for f in (folder, whole[0])
    ]
    assert pictures[0] == pictures[1]


def test_batch_size_and_a_growing_quota_change_no_image(whole, script, tmp_path):
    common = ["--synthetic", tmp_path / "a", *SMALL]
    first = script("generate", *common, "--batch-size", 7, "--per-class", 1)
    assert first.code == 0, first.err
    some = {name: b for name, b in tree(tmp_path / "a").items() if "/0" in name}
    assert script("generate", *common, "--batch-size", 5).code == 0
    mine, whole = (
        {name: b for name, b in tree(f).items() if "/0" in name} for f in (tmp_path / "a", whole[0])
    )
    assert mine == whole
    assert some.items() < mine.items()


def test_a_finished_folder_is_left_as_it_is(whole, script):
    before = tree(whole[0])
    again = script("generate", *SMALL, "--synthetic", whole[0])
    assert "0 images to make" in again.out
    assert tree(whole[0]) == before


def test_killed_at_ten_random_points_it_ends_in_the_same_bytes(whole, tmp_path):
    """Each time before or after one of the renames by which files come into being."""
    folder, rng = tmp_path / "images", random.Random(0)
    real = os.replace

    def child(renames: int, after: bool) -> None:
        def replace(*paths) -> None:
            nonlocal renames
            renames -= 1
            if renames == 0 and after:
                real(*paths)
            if renames == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*paths)

        os.replace = replace
        sys.argv = ["generate.py", *map(str, SMALL), "--synthetic", str(folder)]
        with contextlib.redirect_stdout(io.StringIO()):
            generate.main()

    def run(*arguments) -> int:
        process = multiprocessing.get_context("fork").Process(target=child, args=arguments)
        process.start()
        process.join()
        return process.exitcode

    done = []
    for _ in range(10):
        assert run(rng.randint(2, 45), rng.random() < 0.5) == -signal.SIGKILL
        done.append(len(books(folder)))
    assert 0 < done[5] < done[9] < len(books(whole[0]))
    assert run(-1, False) == 0
    assert tree(folder) == tree(whole[0])


def test_where_one_of_two_processes_dies_one_alone_goes_on_to_the_same_bytes(
    whole, torchrun, script, tmp_path
):
    folder = tmp_path / "images"
    flags = [*SMALL, "--synthetic", folder]
    with torchrun(2, "generate.py", *flags) as processes:
        deadline = time.monotonic() + 300
        while not books(folder / "processes/1") and time.monotonic() < deadline:
            time.sleep(0.002)
        children = f"/proc/{processes.pid}/task/{processes.pid}/children"
        os.kill(max(map(int, Path(children).read_text().split())), signal.SIGKILL)
        processes.communicate(timeout=300)
    assert processes.returncode != 0
    begun = [attempt.image for attempt in Manifest.open(folder).attempts]
    assert 0 < len(begun) < len(books(whole[0]))
    made = {image: (folder / image).stat().st_mtime_ns for image in begun}
    result = script("generate", *flags)
    assert result.code == 0, result.err
    assert tree(folder) == tree(whole[0])
    assert not (folder / "processes").exists()
    assert all((folder / image).stat().st_mtime_ns == time for image, time in made.items())


def test_killed_before_the_settings_were_written_it_starts_anew(script, tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "plan.json").write_text('{"quotas": {}}')
    (folder / ".clip_min-settings.json-abcdefgh").mkdir()
    result = script("generate", *SMALL, "--synthetic", folder, "--stage", "caption")
    assert result.code == 0, result.err
    assert sorted(os.listdir(folder)) == ["captions.jsonl", "plan.json", "seconds.json"] + [
        "settings.json"
    ]


def test_what_a_kill_leaves_is_swept_and_what_is_lost_is_named(whole, script, tmp_path):
    folder = Path(shutil.copytree(whole[0], tmp_path / "a"))
    kept = next(folder.glob("kept/*/*.png"))
    for name in (kept.parent / ".clip_min-00000.png-abcdefgh", folder / ".clip_min-a-abcdefgh"):
        name.mkdir()
        (name / "half").write_text("")
    moved = folder / "undecided" / kept.parent.name / kept.name
    moved.parent.mkdir(parents=True)
    shutil.copy(kept, moved)  # killed between listing it as kept and removing it here
    assert script("generate", *SMALL, "--synthetic", folder).code == 0
    assert tree(folder) == tree(whole[0])
    kept.unlink()
    result = script("generate", *SMALL, "--synthetic", folder)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert str(kept) in result.err


def test_what_is_not_on_the_books_is_left_alone(whole, script, tmp_path):
    folder = Path(shutil.copytree(whole[0], tmp_path / "a"))
    kept = next(folder.glob("kept/*/*.png"))
    mine = [kept.with_name(name) for name in ("2024-mine.png", "77777.png", ".00000.abcdefgh.png")]
    mine += [folder / ".notes.20240131.md", folder / ".tmpnRT2eS"]
    for path in mine:
        path.write_text("mine")
    assert script("generate", *SMALL, "--synthetic", folder).code == 0
    assert [path.read_text() for path in mine] == ["mine"] * len(mine)


@pytest.mark.parametrize("link", ["rejected", "undecided", "kept/{}"])
def test_a_link_among_the_folders_of_images_is_refused(whole, script, is_one_line, tmp_path, link):
    folder, victim = Path(shutil.copytree(whole[0], tmp_path / "a")), tmp_path / "victim"
    victim.mkdir()
    (victim / "00000.png").write_text("mine")
    link = folder / link.format(next(folder.glob("kept/*")).name)
    if link.exists():
        link.rename(tmp_path / "aside")
    link.symlink_to(victim)
    result = script("generate", *SMALL, "--synthetic", folder)
    assert is_one_line(result, f"{link}: is a link")
    assert os.listdir(victim) == ["00000.png"]


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--strength", 0.5], "its images were made with strength 0.75, not 0.5"),
        (["--shots", 3], "shots 2, not 3"),
        (["--seed", 5], "seed 1, not 5"),
        (["--painter", "other/model"], "painter demo, not other/model"),
    ],
)
def test_other_settings_are_refused_by_name(whole, script, is_one_line, flags, said):
    before = tree(whole[0])
    result = script("generate", *SMALL, "--synthetic", whole[0], *flags)
    assert is_one_line(result, said, "--synthetic")
    assert tree(whole[0]) == before


def test_a_folder_in_which_nothing_was_made_yet_takes_other_settings(script, data, model, tmp_path):
    common = ("--dataset", "folder", "--data-root", data, "--model", model)
    failed = script("generate", *common, "--synthetic", tmp_path / "a", "--captioner", "demo")
    assert failed.code == 2
    assert (tmp_path / "a/settings.json").exists()
    other = script("generate", *SMALL, "--synthetic", tmp_path / "a", "--stage", "caption")
    assert other.code == 0, other.err


def test_a_full_disk_is_one_line_and_nothing_is_lost(
    whole, script, is_one_line, tmp_path, monkeypatch
):
    real, room = Image.Image.save, iter(range(40))

    def save(self, *arguments, **options):
        if next(room, None) is None:
            raise OSError(28, "No space left on device")
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save)
        result = script("generate", *SMALL, "--synthetic", tmp_path / "a")
    assert is_one_line(result, "No space left on device", ".png")
    assert script("generate", *SMALL, "--synthetic", tmp_path / "a").code == 0
    assert tree(tmp_path / "a") == tree(whole[0])


def test_a_class_with_a_single_picture_is_said_to_have_one(script, tmp_path):
    one = ["--synthetic", tmp_path / "a", *SMALL, "--shots", 1, "--per-class", 1]
    result = script("generate", *one)
    assert result.code == 0, result.err
    assert "51 classes have a single real picture, which is both captioned and repainted" in (
        result.out
    )
    assert all(row["captioned"] == row["repainted"] for row in books(tmp_path / "a"))


def test_an_unreadable_picture_and_a_missing_model_are_one_line(
    script, is_one_line, data, model, tmp_path, monkeypatch
):
    broken = Path(shutil.copytree(data, tmp_path / "data"))
    (broken / "train/blue-bell/3.png").write_bytes(b"no picture")
    common = ("--dataset", "folder", "--model", model, "--out", tmp_path / "out")
    assert is_one_line(script("generate", *common, "--data-root", broken), "blue-bell/3.png")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = script("generate", *common, "--data-root", data)
    assert is_one_line(result, "--captioner llava-hf/llava-1.5-7b-hf", "hub's cache")


def test_the_demos_painter_paints_the_demo_alone(script, is_one_line, data, model, tmp_path):
    common = ("--dataset", "folder", "--data-root", data, "--model", model, "--out", tmp_path)
    result = script("generate", *common, "--captioner", "demo", "--painter", "demo")
    assert is_one_line(result, "demo", "give a LLaVA and a diffusion model")


def test_class_names_become_names_of_folders():
    names = ["ox-eye / daisy?", "..", "Rose", "rose", "日本の花", "a" * 300, "🌹"]
    found = slugs(names)
    assert found[0] == "ox-eye-daisy"
    assert found[4] == "日本の花"
    assert len({slug.lower() for slug in found}) == len(names)
    assert all(slug and len(slug) < 70 and not set(slug) & set("/\\?.") for slug in found)
    for names in (["c", "c++", "c-1"], ["0-c", "c", "c+"], ["c-1", "C", "c!"]):
        assert len(set(slugs(names))) == 3


def test_the_folder_of_images_is_named_after_the_filters_method(trained, tmp_path):
    """As `train.py --method disef` looks for it, whatever the run's folder is called."""
    experiment = Experiment(shots_file="few.json")
    for name in ("lora-few-seed1", "mine"):
        shutil.copytree(trained.path, tmp_path / name)
        found = generate.default_folder("runs", experiment, "f1", str(tmp_path / name))
        assert found == generate.default_folder("runs", experiment, "f1", "lora")


def test_a_stage_without_work_says_which_is_next(script, is_one_line, tmp_path):
    common = ("--shots", 1, "--per-class", 1, "--synthetic", tmp_path / "images")
    result = script("generate", *common, "--stage", "filter")
    assert result.out.endswith("images are still missing: run --stage caption next\n")
    assert not (tmp_path / "images/contact_sheet.png").exists()
    result = script("generate", *common, "--filter", "lora")
    assert is_one_line(result, "--filter lora: expected zero_shot, or the folder of a run")


def test_a_class_without_a_picture_is_an_error_before_any_caption(
    script, is_one_line, data, model, tiny_llava, tiny_diffusion, tmp_path
):
    listed = [file for file in (data / "train").rglob("*.*") if "bell" not in file.parent.name]
    rows = [{"path": str(f), "label": f.parent.name} for f in listed]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-2]))
    result = script(
        "generate",
        *("--dataset", "folder", "--data-root", data, "--model", model, "--classes", "all"),
        *("--captioner", tiny_llava, "--painter", tiny_diffusion, "--per-class", 1),
        *("--shots-file", tmp_path / "few.jsonl", "--synthetic", tmp_path / "images"),
    )
    assert is_one_line(result, "1 classes have no training picture to repaint: blue bell")
    assert not (tmp_path / "images").exists()


# ------------------------------------------------------------------------------------- training


def test_at_lambda_1_the_adapter_is_loras_to_the_byte(script, flags, trained, synthetic, tmp_path):
    disef = [*flags, "--lam", 1, "--synthetic", synthetic(shots=4), *TWO, "--out", tmp_path]
    disef[1] = "disef"
    result = script("train", *disef)
    assert result.code == 0, result.err
    run = tmp_path / "noise/tiny/disef-s4-seed1"
    mine, loras = (load_file(path / "adapter.safetensors") for path in (run, trained.path))
    assert mine.keys() == loras.keys()
    assert all(torch.equal(tensor, loras[name]) for name, tensor in mine.items())

    mixed = script("train", *disef, "--lam", 0.5, "--out", tmp_path / "mixed")
    assert mixed.code == 0, mixed.err
    assert "6 synthetic images are added" in mixed.out
    other = load_file(tmp_path / "mixed/noise/tiny/disef-s4-seed1/adapter.safetensors")
    assert any(not torch.equal(tensor, loras[name]) for name, tensor in other.items())


def test_disef_resumed_is_disef(script, flags, synthetic, tmp_path):
    disef = [
        "--method",
        "disef",
        *flags[2:],
        "--synthetic",
        synthetic(shots=4),
        *TWO,
        "--out",
        tmp_path,
    ]
    assert script("train", *disef).code == 0
    run = tmp_path / "noise/tiny/disef-s4-seed1"
    before = (run / "adapter.safetensors").read_bytes()
    result = script("train", *disef, "--resume")
    assert result.code == 0, result.err
    assert (run / "adapter.safetensors").read_bytes() == before


def test_images_that_are_missing_unfinished_or_anothers_are_refused(
    script, flags, synthetic, is_one_line, tmp_path
):
    disef = ["--method", "disef", *flags[2:], "--out", tmp_path]
    result = script("train", *disef)
    assert is_one_line(result, "has no synthetic images yet", "python generate.py --dataset")
    template = "it's a {}."
    result = script("train", *disef, "--template", template, "--image-size", 48)
    command = shlex.split(result.err.partition("make them first: ")[2])[2:]
    assert [command[command.index(flag) + 1] for flag in ("--template", "--image-size")] == [
        template,
        "48",
    ]
    assert generate.parse(command)["image_size"] == 48
    result = script("train", *disef, "--synthetic", synthetic(shots=10))
    assert is_one_line(result, "shots 10, not 4")
    unfinished = Path(shutil.copytree(synthetic(shots=4), tmp_path / "images"))
    rows = (unfinished / "manifest.jsonl").read_text().splitlines()
    (unfinished / "manifest.jsonl").write_text("\n".join(rows[:-1]) + "\n")
    result = script("train", *disef, "--synthetic", unfinished, *TWO)
    assert is_one_line(result, "1 images are still missing", "python generate.py")
    assert not (tmp_path / "noise").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "has 2 images of each class, not 32; add --per-class 2"),
        ((*TWO, "--plan", "f1"), "its images were made with plan uniform, not f1"),
        ((*TWO, "--filter", "lora"), "its images were made with filter zero_shot, not lora"),
    ],
)
def test_images_made_otherwise_than_the_run_would_record_are_refused(
    more, said, script, flags, synthetic, is_one_line, tmp_path
):
    disef = ["--method", "disef", *flags[2:], "--synthetic", synthetic(shots=4), "--out", tmp_path]
    assert is_one_line(script("train", *disef, *more), said)


@pytest.mark.parametrize("plan", ["uniform", "f1"])
def test_on_the_demo_both_scripts_go_on_with_each_others_images(plan, script, tmp_path):
    common = ["--plan", plan, "--shots", 1, "--per-class", 1, "--out", tmp_path]
    disef = ["train", "--method", "disef", "--epochs", 1, *common]
    for first, second in ((["generate", *common], disef), (disef, ["generate", *common])):
        assert script(*first).code == 0
        again = script(*second)
        assert again.code == 0, again.err
        assert "0 images to make" in again.out
        shutil.rmtree(tmp_path / "demo")


def test_on_the_demo_missing_images_are_made(script, tmp_path):
    short = ["--shots", 2, "--epochs", 1, "--per-class", 1, "--out", tmp_path]
    result = script("train", "--method", "disef", *short)
    assert result.code == 0, result.err
    folder = tmp_path / "demo/demo/synthetic_uniform_zero_shot-s2-seed1"
    manifest = Manifest.open(folder)
    assert manifest.missing() == 0
    found = json.loads((tmp_path / "demo/demo/disef-s2-seed1/results.json").read_text())
    assert found["synthetic"]["images"] == 51
    assert found["base"] > found["zero_shot"]["base"]
    before = tree(folder)
    again = script("train", "--method", "disef", *short)
    assert "0 images to make" in again.out
    assert tree(folder) == before


def test_the_f1_variant_trains_its_filter_first(script, tmp_path, monkeypatch, is_one_line):
    short = ["--shots", 1, "--epochs", 1, "--per-class", 1, "--out", tmp_path]
    monkeypatch.setitem(METHODS["lora"].recipes["demo"], "epochs", 1)
    monkeypatch.setenv("CLIP_MIN_CACHE", str(tmp_path / "cache"))
    result = script("train", "--method", "disef_f1", *short, "--cache", "none")
    assert result.code == 0, result.err
    assert not (tmp_path / "cache").exists()  # the filter's run takes the flag over
    manifest = Manifest.open(tmp_path / "demo/demo/synthetic_f1_lora-s1-seed1")
    f1, quotas = manifest.plan["f1"], manifest.plan["quotas"]
    assert quotas == {name: int(value < 0.7) for name, value in f1.items()}
    assert 0 < sum(quotas.values()) < 51
    assert {a.filter for a in manifest.attempts} == {"lora"}
    again = script("train", "--method", "disef_f1", *short, "--cache", "none")  # with that run
    assert again.code == 0, again.err
    assert "trained first" not in again.out
    monkeypatch.setitem(METHODS["lora"].recipes["demo"], "epochs", 3)
    other = script("train", "--method", "disef_f1", *short)
    assert is_one_line(other, "lora-s1-seed1: is the run that filters", "epochs 1, not 3")


def test_f1_is_measured_once_for_a_folder(script, tmp_path, monkeypatch):
    """Else another precision or device could change the plan of images that are there already."""
    flags = ("--shots", 1, "--plan", "f1", "--per-class", 1, "--synthetic", tmp_path / "images")
    assert script("generate", *flags).code == 0
    before = json.loads((tmp_path / "images/plan.json").read_text())
    monkeypatch.setattr(generate, "predict", None)
    result = script("generate", *flags)
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "images/plan.json").read_text()) == before
    (tmp_path / "images/plan.json").write_text(json.dumps(before | {"f1": {"rose": "high"}}))
    assert "plan.json: f1.rose is 'high'" in script("generate", *flags).err


def test_a_wrong_painter_is_found_before_the_captions(script, tmp_path):
    (tmp_path / "empty").mkdir()
    flags = ("--captioner", "demo", "--painter", tmp_path / "empty")
    result = script("generate", *flags, "--shots", 1, "--synthetic", tmp_path / "images")
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "has no model_index.json" in result.err
    assert not (tmp_path / "images/captions.jsonl").exists()


@pytest.mark.parametrize("kind", ["captioner", "painter"])
def test_a_missing_package_is_one_line(kind, monkeypatch):
    def missing(*_):
        raise ImportError("No module named 'diffusers'\nand more")

    monkeypatch.setattr(generate, {"captioner": "Llava", "painter": "Diffusion"}[kind], missing)
    options = Generation(captioner="a/b", painter="a/b")
    with pytest.raises(UserError, match=f"--{kind}: a package is missing .*diffusers.*gen"):
        getattr(generate, f"load_{kind}")(options, "cpu")


def test_offloading_without_a_gpu_is_refused_before_any_work(script, tmp_path):
    offload = ["--offload", "--device", "cpu", "--synthetic", tmp_path / "images"]
    result = script("generate", *offload)
    assert (result.code, result.err.count("\n")) == (2, 1)
    assert "--offload" in result.err
    assert not (tmp_path / "images").exists()


def test_where_no_class_is_weak_nothing_is_made(script, tmp_path):
    strong = ["--shots", 1, "--plan", "f1", "--f1-threshold", 0]
    result = script("generate", *strong, "--synthetic", tmp_path / "images")
    assert result.code == 0, result.err
    assert "0 images to make" in result.out
    assert sorted(os.listdir(tmp_path / "images")) == ["plan.json", "settings.json"]


@pytest.mark.parametrize("name", ["settings.json", "plan.json"])
def test_anothers_settings_and_plan_are_not_overwritten(script, is_one_line, tmp_path, name):
    (tmp_path / "settings.json").write_text('{"classnames": [], "editor.tabSize": 4}')
    (tmp_path / "plan.json").write_text('{"quotas": {}}')
    if name == "plan.json":
        (tmp_path / "settings.json").unlink()
        (tmp_path / "plan.json").write_text('{"steps": ["mine"]}')
    before = tree(tmp_path)
    result = script("generate", *SMALL, "--synthetic", tmp_path)
    assert is_one_line(result, f"{tmp_path / name}: ")
    assert tree(tmp_path) == before


def test_a_file_where_the_folder_belongs_is_one_line(script, is_one_line, tmp_path):
    (tmp_path / "file").write_text("mine")
    result = script("generate", *SMALL, "--synthetic", tmp_path / "file")
    assert is_one_line(result, "is a file, expected a folder")


def test_a_folder_with_other_things_in_it_is_not_touched(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and has no settings.json"):
        Manifest.start(tmp_path, {"classnames": []}, {"quotas": {}})
    assert os.listdir(tmp_path) == ["notes.txt"]


@pytest.mark.parametrize(("flags", "folder"), [((), "env"), (("--cache", "none"), None)])
def test_pixels_are_kept_where_the_flag_says(flags, folder, script, monkeypatch, tmp_path):
    asked = []

    def load(self, folder):
        asked.append(folder)
        raise UserError("enough")

    monkeypatch.setattr(generate.Experiment, "load", load)
    monkeypatch.setenv("CLIP_MIN_CACHE", str(tmp_path / "env"))
    assert script("generate", *flags).code == 2
    assert asked == [folder and tmp_path / folder]
    assert "--cache-gb -1.0: expected 0 or more" in script("generate", "--cache-gb", -1).err

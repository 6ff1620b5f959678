"""Processes that are killed, interrupted, or run out of disk: nothing half is ever read as whole,
and what goes on ends in the bytes of a run in one go.

A moment is one at which files come into being, or a gradient step:

    "amid NAME n"     half of the nth file NAME is on disk, under its temporary name (of the log:
                      half of its nth line)
    "before NAME n"   the nth file NAME is on disk whole, and has not yet taken its name
    "after NAME n"    it has just taken it
    "step n"          in the nth gradient step

NAME is a file's name, a folder of the cache (pixels, features), or * for any. Children are forked,
so that a process that runs the real script to a moment costs no import.
"""

import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from fewshot import cache, demo

ROOT = Path(__file__).parents[2]
FORK = multiprocessing.get_context("fork")
HERE = "noise/tiny/lora-s4-seed1"
# All that differs between equal runs; the flags, and the commit where somebody works on the code.
TIMES = {"seconds", "peak_memory_mb", "argv", "commit"}

# Where a training is killed, and whether a run was begun by then, so that --resume goes on with it.
TRAIN = [
    ("amid pixels 1", False),
    ("before config.json 1", False),
    ("after config.json 1", True),
    ("amid data.json 1", True),
    ("step 1", True),
    ("amid adapter.safetensors 1", True),
    ("after adapter.safetensors 1", True),
    ("amid log.jsonl 1", True),
    ("amid resume.safetensors 1", True),
    ("after resume.safetensors 1", True),
    ("before resume.json 1", True),
    ("step 4", True),
    ("amid log.jsonl 4", True),
    ("before resume.safetensors 4", True),
    ("step 7", True),
    ("after resume.json 8", True),
    ("after log.jsonl 9", True),
    ("before config.json 2", True),  # the adapter is the last one, and is not vouched for
    ("after config.json 2", True),
    ("amid curves.png 1", True),
    ("amid features 1", True),
    ("after predictions.safetensors 1", True),
    ("before results.json 1", True),
    ("after results.json 1", True),
]
# The same processes, told to stop in other ways: moment, signal, exit code.
SIGNALS = [
    ("step 5", signal.SIGTERM, -signal.SIGTERM),
    ("amid resume.safetensors 3", signal.SIGTERM, -signal.SIGTERM),
    ("step 5", signal.SIGINT, 130),
    ("before adapter.safetensors 2", signal.SIGINT, 130),
    ("before log.jsonl 3", signal.SIGINT, 130),
]
# One folder of images, by one process after the other, each killed once.
GENERATE = [
    "amid plan.json 1",
    "before settings.json 1",
    "after settings.json 1",
    "amid captions.jsonl 2",
    "after captions.jsonl 2",
    "amid 00000.png 1",
    "before 00000.png 2",
    "after 00001.png 1",
    "before manifest.jsonl 1",
    "amid manifest.jsonl 2",
    "after manifest.jsonl 2",
    "before seconds.json 1",
]
# One folder of features, of 20 pictures in shards of 8, in the same way.
EMBED = [
    "amid config.json 1",
    "before config.json 1",
    "after config.json 1",
    "amid 00000.json 1",
    "after 00000.json 1",
    "amid 00000.safetensors 1",
    "before 00000.safetensors 1",
    "after 00000.safetensors 1",
    "before 00001.json 1",
    "after 00002.json 1",
    "before 00002.safetensors 1",
    "after 00002.safetensors 1",
    "amid index.json 1",
    "before index.json 1",
    "after index.json 1",
]
EXPORT = {
    "huggingface": ["amid model.safetensors 1", "after merges.txt 1", "before out 1"],
    "classifier": ["amid out.safetensors 1", "before out.safetensors 1"],
}

# ------------------------------------------------------------------------------------- processes


def stop_at(moment: str, act) -> None:
    """From now on this process calls `act` at the moment; see the top of this file."""
    how, name, number = moment.split() if moment.startswith(("a", "b")) else ("step", *[moment] * 2)
    number = int(number.split()[-1])
    real = SimpleNamespace(replace=os.replace, fsync=os.fsync, backward=torch.Tensor.backward)
    seen = 0

    def comes(path: str) -> bool:
        nonlocal seen
        kinds = [part for part in Path(path).parts if part in cache.KINDS]
        seen += name in ("*", (kinds or [Path(path).name])[-1])
        return seen == number

    def replace(source, target):
        here = how in ("before", "after") and comes(target)
        if here and how == "before":
            act()
        real.replace(source, target)
        if here and how == "after":
            act()

    def fsync(file):
        path = os.readlink(f"/proc/self/fd/{file}") if how != "step" else ""
        appended = path.endswith("log.jsonl")  # the one file that grows in place
        if (how == "amid" or (appended and how in ("before", "after"))) and comes(path):
            if how == "amid":
                size = os.fstat(file).st_size
                os.ftruncate(file, size - 9 if appended else size // 2)
            act()
        real.fsync(file)

    def backward(tensor, *arguments, **options):
        nonlocal seen
        real.backward(tensor, *arguments, **options)
        seen += how == "step"
        if how == "step" and seen == number:
            act()

    os.replace, os.fsync, torch.Tensor.backward = replace, fsync, backward


def child(said: Path, name: str, flags, moment: str, act) -> None:
    """A process: the script `name`, whose output goes to the file `said`."""
    with open(said, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1) for fd in (1, 2))
    sys.argv = [f"{name}.py", *map(str, flags)]
    if moment:
        stop_at(moment, act)
    runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")


@pytest.fixture
def start(tmp_path_factory):
    """(name, flags, moment, act) -> a script in a process of its own; `said` reads its output."""
    folder, begun = tmp_path_factory.mktemp("said"), []

    def call(name: str, flags, moment: str = "", act=None):
        said = folder / str(len(begun))
        process = FORK.Process(target=child, args=(said, name, flags, moment, act))
        process.start()
        begun.append(process)
        process.said = said.read_text
        return process

    yield call
    for process in begun:
        process.kill()


@pytest.fixture
def ends(start):
    """The same, by a signal at the moment -> its exit code, which is minus the signal's number
    where that ended it.
    """

    def call(name: str, flags, moment: str = "", by=signal.SIGKILL) -> SimpleNamespace:
        def end():
            if by == signal.SIGINT:  # which is ignored where the tests run in the background
                signal.signal(by, signal.default_int_handler)
            os.kill(os.getpid(), by)

        process = start(name, flags, moment, end)
        process.join(120)
        return SimpleNamespace(code=process.exitcode, err=process.said())

    return call


# ---------------------------------------------------------------------------------- what is left


def timeless(value):
    """What was read from JSON, without times and without the command."""
    if isinstance(value, dict):
        return {key: timeless(of) for key, of in value.items() if key not in TIMES}
    return [timeless(of) for of in value] if isinstance(value, list) else value


def content(run: Path) -> dict[str, object]:
    """Every file of a run, in bytes; of those that tell the time, what else they tell."""
    found = {}
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        name = str(path.relative_to(run))
        if path.suffix == ".json":
            found[name] = timeless(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            found[name] = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif name == "resume.safetensors":
            with safe_open(path, "pt") as file:
                found[name] = {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118
        else:
            found[name] = path.read_bytes()
    return found


def is_whole(folder: Path) -> bool:
    """Whether every file that has its name can be read to its end; of a log, every ended line."""
    for path in (path for path in folder.rglob("*") if path.is_file()):
        if any(part.startswith(".clip_min-") for part in path.parts):
            continue  # half-written, and never read
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".jsonl":
            [json.loads(line) for line in path.read_text().split("\n")[:-1]]
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                assert all(file.get_tensor(key) is not None for key in file.keys())  # noqa: SIM118
        elif path.suffix == ".png":
            Image.open(path).load()
    return True


def half_written(folder: Path) -> list[Path]:
    return list(folder.rglob(".clip_min-*"))


@pytest.fixture(scope="module")
def whole(trained) -> dict[str, object]:
    return content(trained.path)


def goes_on(script, flags, begun: bool = True) -> None:
    """The same command again, with --resume if a run was begun."""
    result = script("train", *flags, "--resume")
    if not begun:
        assert (result.code, "so there is no run" in result.err) == (2, True), result.err
        result = script("train", *flags)
    assert result.code == 0, result.err


# ---------------------------------------------------------------------------------------- killed


@pytest.mark.parametrize(("moment", "begun"), TRAIN)
def test_a_training_killed_at_this_moment_goes_on_to_the_same_bytes(
    moment, begun, ends, script, flags, whole, tmp_path
):
    flags = [*flags, "--out", tmp_path / "runs", "--cache", tmp_path / "cache"]
    assert ends("train", flags, moment).code == -signal.SIGKILL
    assert is_whole(tmp_path)
    assert (tmp_path / "runs" / HERE / "results.json").exists() == (moment[:13] == "after results")
    goes_on(script, flags, begun)
    assert content(tmp_path / "runs" / HERE) == whole
    assert not half_written(tmp_path / "runs")


@pytest.mark.parametrize(("moment", "by", "code"), SIGNALS)
def test_a_training_that_is_told_to_stop_goes_on_to_the_same_bytes(
    moment, by, code, ends, script, flags, whole, tmp_path
):
    flags = [*flags, "--out", tmp_path]
    result = ends("train", flags, moment, by)
    assert result.code == code
    if by == signal.SIGINT:
        assert "interrupted; add --resume to the same command to go on" in result.err
        assert "Traceback" not in result.err
        assert not half_written(tmp_path)
    assert is_whole(tmp_path)
    goes_on(script, flags)
    assert content(tmp_path / HERE) == whole
    assert not half_written(tmp_path)


@pytest.mark.slow
def test_killed_at_each_moment_one_after_the_other_images_are_the_same(
    ends, model, tmp_path, monkeypatch
):
    splits = {name: demo.split(name) for name in demo.PER_CLASS}  # drawn once for all processes
    monkeypatch.setattr(demo, "split", lambda name, size=64: splits[name])
    flags = ["--dataset", "demo", "--model", model, "--shots", 2, "--per-class", 2]
    flags += ["--captions", 2, "--reject-limit", 3, "--batch-size", 16]
    for folder, moments in (("whole", []), ("killed", GENERATE)):
        for moment in [*moments, ""]:
            result = ends("generate", [*flags, "--synthetic", tmp_path / folder], moment)
            assert result.code == (-signal.SIGKILL if moment else 0), (moment, result.err)
            assert is_whole(tmp_path)
    images, killed = (content(tmp_path / folder) for folder in ("whole", "killed"))
    del images["seconds.json"], killed["seconds.json"]
    assert killed == images
    assert not half_written(tmp_path)


def test_killed_at_each_moment_one_after_the_other_features_are_the_same(
    ends, model, data, tmp_path
):
    flags = ["--data", data / "test", "--model", model, "--shard-size", 8, "--batch-size", 4]
    for folder, moments in (("whole", []), ("killed", EMBED)):
        for moment in [*moments, ""]:
            result = ends("embed", [*flags, "--out", tmp_path / folder], moment)
            assert result.code == (-signal.SIGKILL if moment else 0), (moment, result.err)
            assert is_whole(tmp_path)
            ended = not moment or moment == "after index.json 1"
            assert (tmp_path / folder / "index.json").exists() == ended
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert len(content(tmp_path / "whole")) == 8
    assert not half_written(tmp_path)


@pytest.mark.parametrize("form", EXPORT)
def test_an_export_that_is_killed_is_there_whole_or_not_at_all(
    form, ends, trained, script, tmp_path
):
    out = "out.safetensors" if form == "classifier" else "out"
    flags = ["--run", trained.path, "--format", form]
    for moment in EXPORT[form]:
        result = ends("export", [*flags, tmp_path / out], moment)
        assert result.code == -signal.SIGKILL
        assert not (tmp_path / out).exists()
    assert ends("export", [*flags, tmp_path / "x" / out], f"after {out} 1").code < 0
    assert script("export", *flags, tmp_path / out).code == 0
    read = Path.read_bytes if form == "classifier" else content
    assert read(tmp_path / out) == read(tmp_path / "x" / out)
    assert not list(tmp_path.glob(".clip_min-*"))


@pytest.mark.parametrize(
    "command",
    [
        ("eval", "--image", "{data}", "--csv", "{out}/answers.csv"),
        ("eval", "--image", "{data}", "--csv", "{out}/answers.json"),
        ("report", "{run}", "--quick", "--out", "{out}/page.html"),
        ("report", "{run}", "--quick", "--format", "json", "--out", "{out}/numbers.json"),
    ],
)
def test_a_table_or_page_that_is_killed_leaves_the_earlier_one(
    command, ends, trained, data, script, tmp_path
):
    places = {"data": data / "test", "out": tmp_path, "run": trained.path}
    name, *flags = (part.format(**places) for part in command)
    flags = ["--run", trained.path, *flags] if name == "eval" else flags
    (file,) = (Path(flag) for flag in flags if Path(flag).parent == tmp_path)
    for moment in (f"amid {file.name} 1", f"before {file.name} 1"):
        assert ends(name, flags, moment).code == -signal.SIGKILL
        assert not file.exists()
    assert script(name, *flags).code == 0
    earlier = file.read_bytes()
    assert ends(name, flags, f"before {file.name} 1").code == -signal.SIGKILL
    assert file.read_bytes() == earlier


@pytest.mark.slow
@pytest.mark.parametrize("how", ["amid * {}", "before * {}", "after * {}", "step {}"])
def test_a_training_killed_anywhere_goes_on_to_the_same_bytes(
    how, ends, script, flags, whole, tmp_path
):
    """Every file that comes into being, and every gradient step. While it is not yet finished, what
    it has learned can be tested, or a line says why not.
    """
    for number in range(1, 200):
        out = tmp_path / str(number)
        command = [*flags, "--out", out / "runs", "--cache", out / "cache"]
        code = ends("train", command, how.format(number)).code
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert is_whole(out)
        tested = script("eval", "--run", out / "runs" / HERE)
        assert tested.code in (0, 2)
        assert tested.err.count("\n") == (tested.code == 2)
        goes_on(script, command, (out / "runs" / HERE / "config.json").exists())
        assert content(out / "runs" / HERE) == whole
        shutil.rmtree(out)
    assert 8 < number < 199


# ------------------------------------------------------------------------------- full, read-only


@pytest.fixture
def disk(tmp_path):
    """(options) -> a small disk of its own, mounted or, called again, mounted anew with these."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(options: str) -> Path:
        again = "remount," if mounted else ""
        command = ["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("this process may not mount a disk")
        mounted.append(True)
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("kilobytes", [4, 24, 64, 100])
def test_on_a_full_disk_a_line_says_so_and_with_more_room_the_run_goes_on(
    kilobytes, disk, script, flags, whole, is_one_line, tmp_path
):
    out = disk(f"size={kilobytes}k") / "runs"
    result = script("train", *flags, "--out", out)
    assert is_one_line(result, "No space left on device")
    assert is_whole(out)
    assert not half_written(out)
    begun = (out / HERE / "config.json").exists()
    disk("size=100m")
    goes_on(script, [*flags, "--out", out], begun)
    assert content(out / HERE) == whole


def test_a_cache_on_a_full_disk_costs_nothing_but_time(disk, script, flags, whole, tmp_path):
    folder = disk("size=4k")
    result = script("train", *flags, "--out", tmp_path / "runs", "--cache", folder / "cache")
    assert result.code == 0, result.err
    assert content(tmp_path / "runs" / HERE) == whole
    assert not half_written(folder)


def test_where_nothing_can_be_written_a_line_says_so(
    disk, script, flags, train, whole, is_one_line, tmp_path
):
    folder = disk("size=100m")
    run = train(folder / "runs", "--cache", folder / "cache")
    disk("ro")
    said = "Read-only file system"
    assert is_one_line(script("train", *flags, "--out", folder / "runs"), said)
    assert is_one_line(script("train", *flags, "--out", folder / "other"), said)
    assert is_one_line(script("train", *flags, "--out", folder / "runs", "--resume"), said)
    for out in ("out", "out.safetensors"):
        form = "classifier" if "." in out else "huggingface"
        command = ["export", "--run", run, "--format", form, folder / out]
        assert is_one_line(script(*command), said)
    table = ["eval", "--run", run, "--image", run / "curves.png", "--csv", folder / "a.csv"]
    assert is_one_line(script(*table), said)
    assert script("eval", "--run", run, "--cache", folder / "cache").code == 0
    cached = script("train", *flags, "--out", tmp_path / "runs", "--cache", folder / "cache")
    assert cached.code == 0, cached.err
    assert content(run) == content(tmp_path / "runs" / HERE) == whole


# ---------------------------------------------------------------------------------- two at a time


@pytest.mark.parametrize("limit", [(), ("--cache-gb", 0)])
def test_two_processes_that_fill_one_cache_end_in_the_same_bytes(
    limit, start, flags, whole, tmp_path
):
    """Each waits for the other before it writes the same file; and with no room in the cache, each
    removes what the other has written.
    """
    meet = FORK.Barrier(2)
    for moment in ("before pixels 1", "before features 1"):
        both = []
        for name in ("one", "two"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
            command = [*flags, "--out", tmp_path / name, "--cache", tmp_path / moment, *limit]
            both.append(start("train", command, moment, lambda: meet.wait(60)))
        for process in both:
            process.join(120)
            assert process.exitcode == 0, process.said()
        assert is_whole(tmp_path / moment)
        assert not half_written(tmp_path / moment)
        assert content(tmp_path / "one" / HERE) == content(tmp_path / "two" / HERE) == whole


def test_a_run_that_another_process_trains_is_left_alone(
    start, script, flags, whole, is_one_line, tmp_path
):
    there, go = FORK.Event(), FORK.Event()

    def wait():
        there.set()
        assert go.wait(120)

    command = [*flags, "--out", tmp_path]
    first = start("train", command, "step 4", wait)
    assert there.wait(60)
    for more in ((), ("--resume",)):
        assert is_one_line(script("train", *command, *more), "another process is training there")
    go.set()
    first.join(120)
    assert first.exitcode == 0, first.said()
    assert content(tmp_path / HERE) == whole
    assert [path.name for path in (tmp_path / HERE).parent.iterdir()] == [Path(HERE).name]

"""A run folder is whole at every moment, and says what it came from."""

import errno
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import clip_min.files
import fewshot.run
from clip_min import UserError
from clip_min.files import read_safetensors
from fewshot.run import Run, provenance

CONFIG = {
    "method": "lora",
    "recipe": "demo",
    "settings": {"lr": 0.002, "epochs": 15},
    "experiment": {"dataset": "demo", "shots": 10, "seed": 1, "template": "a {}", "model": "demo"},
    "model": "demo",
    "fingerprint": "0123456789abcdef",
    "classnames": {"base": ["rose", "Ünïcode 🌹"], "novel": ["tulip"]},
    "argv": ["train.py"],
    "versions": {"torch": "2"},
    "commit": None,
    "threads": 4,
}


@pytest.fixture
def run(tmp_path):
    return Run.start(tmp_path / "run", CONFIG)


@pytest.fixture
def full_disk(monkeypatch):
    """() -> from now on, there is no space for tensors or text."""

    def fail(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fill():
        monkeypatch.setattr(clip_min.files, "save_file", fail)
        monkeypatch.setattr(clip_min.files.os, "fsync", fail)

    return fill


def contents(folder) -> dict[str, bytes]:
    return {p.name: p.read_bytes() if p.is_file() else None for p in folder.iterdir()}


def test_a_run_starts_with_its_config_and_opens_with_the_same(run):
    assert json.loads((run.path / "config.json").read_text(encoding="utf-8")) == CONFIG
    assert "🌹" in (run.path / "config.json").read_text(encoding="utf-8")  # for people to read
    assert Run.open(run.path).config == CONFIG


def test_an_earlier_run_is_set_aside_under_a_new_name_each_time(tmp_path, capsys):
    path = tmp_path / "data" / "run"
    for i in range(4):
        Run.start(path, CONFIG).save_adapter({"w": torch.full((1,), i)})
    kept = [path.with_name(f"run.old{n}") for n in (1, 2, 3)]
    assert sorted(path.parent.iterdir()) == [path, *kept]
    values = [Run.open(p).load_adapter()["w"].item() for p in [*kept, path]]
    assert values == [0, 1, 2, 3]
    assert capsys.readouterr().out.splitlines()[-1] == f"an earlier run is kept as {kept[-1]}"


def test_a_folder_of_a_run_that_wrote_nothing_is_taken_as_it_is(tmp_path, capsys):
    (tmp_path / "run/.clip_min-config.json-abcdefgh").mkdir(parents=True)
    assert "earlier_run" not in Run.start(tmp_path / "run", CONFIG).config
    assert os.listdir(tmp_path / "run") == ["config.json"]
    assert os.listdir(tmp_path) == ["run"]
    assert capsys.readouterr().out == ""


def test_a_folder_that_another_process_trains_in_is_left_alone(tmp_path):
    path = tmp_path / "run"
    code = f"from test_run import *; Run.start(Path({str(path)!r}), CONFIG); print(1, flush=True)"
    other = subprocess.Popen(
        [sys.executable, "-c", f"from pathlib import Path; {code}; input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert other.stdout.readline() == b"1\n"
    for begin in (Run.start, Run.resume):
        with pytest.raises(UserError, match="another process is training there"):
            begin(path, CONFIG)
    assert list(tmp_path.iterdir()) == [path]
    other.kill()
    other.communicate()
    Run.resume(path, CONFIG)
    Run.start(path, CONFIG)  # and by the process that has it
    assert (tmp_path / "run.old1").exists()


def test_where_no_folder_can_be_made_a_line_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be created .*; choose another place with --out"):
        Run.start(tmp_path / "file" / "run", CONFIG)


def test_an_adapter_comes_back_with_its_origin(run):
    state = {"b": torch.randn(3, 2), "a": torch.randn(4).bfloat16()}
    run.save_adapter(state)
    loaded = run.load_adapter()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[n], t) and loaded[n].dtype == t.dtype for n, t in state.items())
    with safe_open(run.path / "adapter.safetensors", "pt") as file:
        assert json.loads(file.metadata()["clip_min"]) == {
            "method": "lora",
            "model": "demo",
            "fingerprint": "0123456789abcdef",
        }


def test_equal_adapters_are_equal_files(run):
    state = {f"w{i}": torch.full((2,), i) for i in range(8)}
    files = set()
    for _ in range(10):
        run.save_adapter(state)
        files.add((run.path / "adapter.safetensors").read_bytes())
    assert len(files) == 1


def test_a_full_disk_leaves_the_earlier_files_and_no_others(run, full_disk):
    run.save_adapter({"w": torch.zeros(3)})
    run.log_round({"step": 1})
    run.save_resume({"w": torch.zeros(3)}, {"epoch": 1})
    run.write_json("results.json", {"base": 1})
    before = contents(run.path)
    full_disk()
    writes = {
        "adapter.safetensors": lambda: run.save_adapter({"w": torch.ones(3)}),
        "log.jsonl": lambda: run.log_round({"step": 2}),
        "resume.safetensors": lambda: run.save_resume({"w": torch.ones(3)}, {"epoch": 2}),
        "results.json": lambda: run.write_json("results.json", {"base": 2}),
    }
    for name, write in writes.items():
        with pytest.raises(UserError, match="No space left on device") as error:
            write()
        assert str(run.path / name) in str(error.value)
    assert contents(run.path) == before


def test_a_full_disk_at_the_start_is_an_error_that_names_the_file(tmp_path, full_disk):
    full_disk()
    with pytest.raises(UserError, match=r"config\.json: could not be written.*No space left"):
        Run.start(tmp_path / "run", CONFIG)


def test_a_log_line_replaces_later_ones_that_a_killed_run_left(run):
    for step in (1, 2, 3):
        run.log_round({"step": step, "epoch": 0.5, "loss": step / 3, "val": 50, "seconds": 1.5})
    again = Run.resume(run.path, CONFIG)
    assert [line["step"] for line in again.log] == [1, 2, 3]
    again.log_round({"step": 2, "loss": 9.0})
    lines = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1 / 3), (2, 9.0)]


def test_the_state_to_resume_comes_back_with_its_position(run):
    assert run.load_resume({}) is None  # killed before its first epoch ended
    position = {"epoch": 3, "best_val": 91.17647058823529, "stopped": ""}
    run.save_resume({"w": torch.arange(3)}, position)
    tensors, found = run.load_resume(position)
    assert found == position  # to the last digit
    assert torch.equal(tensors["w"], torch.arange(3))
    assert json.loads((run.path / "resume.json").read_text()) == position


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"settings": {"lr": 0.001, "epochs": 15}}, "lr 0.002, not 0.001"),
        ({"experiment": CONFIG["experiment"] | {"shots": 4}}, "shots 10, not 4"),
        ({"recipe": "notebook"}, "recipe demo, not notebook"),
        ({"fingerprint": "ffff"}, "fingerprint 0123456789abcdef, not ffff"),
        ({"settings": {"lr": 0.002, "epochs": 15, "new": 1}}, "new None, not 1"),
    ],
)
def test_resuming_with_other_settings_is_an_error_that_names_the_first(run, change, said):
    before = contents(run.path)
    with pytest.raises(UserError, match="--resume") as error:
        Run.resume(run.path, CONFIG | change)
    assert f"was started with {said};" in str(error.value)
    assert contents(run.path) == before


def test_resuming_a_config_with_a_strange_setting_names_it(run):
    """Also where that is null, as one that is not there reads."""
    config = json.loads((run.path / "config.json").read_text())
    config["settings"]["strange"] = None
    (run.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="was started with strange None, not None;"):
        Run.resume(run.path, CONFIG)


def test_resuming_removes_what_a_killed_run_had_half_written_and_nothing_else(run):
    run.save_adapter({"w": torch.zeros(3)})
    mine = (".notes.20240131.md", ".tmpnRT2eS", "clip_min-a-abcdefgh", ".clip_min-a-ABCDEFGH")
    for name in mine:
        (run.path / name).write_text("a user's")
    (run.path / ".clip_min-linked-abcdefgh").symlink_to(run.path.parent)
    before = contents(run.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip_min.files.tempfile.TemporaryDirectory, "cleanup", lambda _: None)
        patch.setattr(clip_min.files.tempfile.TemporaryDirectory, "__exit__", lambda *_: None)
        patch.setattr(clip_min.files.tempfile._weakref, "finalize", lambda *_, **__: None)
        patch.setattr(clip_min.files.os, "replace", lambda *_: None)
        run.save_adapter({"w": torch.ones(3)})
        run.write_json("results.json", {})
    assert len(list(run.path.iterdir())) == len(before) + 2
    Run.resume(run.path, CONFIG)
    assert contents(run.path) == before


@pytest.mark.parametrize("key", ["argv", "versions", "commit", "threads"])
def test_a_run_may_be_resumed_by_another_command_version_or_commit(run, key):
    assert Run.resume(run.path, CONFIG | {key: "other"}).config == CONFIG


def test_resuming_where_bits_may_differ_says_so(run, capsys):
    Run.resume(run.path, CONFIG)
    assert capsys.readouterr().out == ""
    Run.resume(run.path, CONFIG | {"versions": {"torch": "3"}})
    said = capsys.readouterr().out
    assert "started with torch 2, and continues with torch 3: its last bits" in said
    assert provenance()["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "there is no such file"),
        ("", "cannot be read as JSON"),
        ('{"method": "lo', "cannot be read as JSON"),
        ("[1, 2]", r"is \[1, 2\], expected an object"),
        ('{"method": "lora"}', "recipe is missing"),
        ("\x00\x01", "cannot be read as JSON"),
    ],
)
def test_a_config_that_is_not_whole_is_an_error_that_names_the_file(run, text, said):
    path = run.path / "config.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    for use in (lambda: Run.open(run.path), lambda: Run.resume(run.path, CONFIG)):
        with pytest.raises(UserError, match=said) as error:
            use()
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_half_a_line_that_a_kill_left_in_the_log_is_dropped(run):
    whole = '{"step": 1, "epoch": 1.0, "loss": 1.0, "seconds": 1.0}\n'
    (run.path / "log.jsonl").write_text(whole + whole[:-1].replace("1", "2"))  # but for its end
    again = Run.resume(run.path, CONFIG)
    assert [line["step"] for line in again.log] == [1]
    again.log_round({"step": 2})
    assert (run.path / "log.jsonl").read_text() == whole + '{"step": 2}\n'


def test_rounds_are_appended_and_what_stands_is_not_written_again(run, monkeypatch):
    run.log_round({"step": 1})
    before = (run.path / "log.jsonl").stat().st_ino
    monkeypatch.setattr(fewshot.run, "write_text", lambda *_: pytest.fail("it was"))
    run.log_round({"step": 2})
    assert (run.path / "log.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
    assert (run.path / "log.jsonl").stat().st_ino == before


def test_a_log_with_a_line_that_is_none_is_an_error_that_names_the_file(run):
    (run.path / "log.jsonl").write_text('{"step": 1, "epoch": 1, "loss": 1, "seconds": 1}\n{"epo\n')
    with pytest.raises(UserError, match=r"log\.jsonl, line 2: cannot be read as JSON"):
        Run.resume(run.path, CONFIG)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"classnames": {"base": []}}, "classnames has base, expected names of base and"),
        ({"classnames": {"base": ["a"], "novel": []}}, "classnames has base, novel, expected"),
        ({"classnames": {"all": ["a"], "odd": ["z"]}}, "classnames has all, odd, expected"),
        ({"classnames": {}}, "classnames has nothing, expected"),
        ({"argv": 5}, "argv is 5, expected a list"),
        ({"versions": "x"}, "versions is 'x', expected an object"),
        ({"commit": 1}, "commit is 1, expected text or null"),
        ({"experiment": {"image_size": "x"}}, "experiment.image_size is 'x', expected a whole"),
    ],
)
def test_a_config_that_pages_and_exports_cannot_read_is_one_line(run, changed, said):
    config = json.loads((run.path / "config.json").read_text())
    experiment = {"seed": 1, "shots": 1, "template": "a {}", "model": "demo"}
    config |= {"experiment": experiment, "classnames": {"all": ["a", "b"]}, "settings": {}}
    config |= dict.fromkeys(("method", "recipe", "model", "fingerprint"), "x")
    (run.path / "config.json").write_text(json.dumps(config))
    assert Run.open(run.path).learned == ["a", "b"]
    changed = {k: config[k] | v if k == "experiment" else v for k, v in changed.items()}
    (run.path / "config.json").write_text(json.dumps(config | changed))
    with pytest.raises(UserError, match=f"config.json: {said}"):
        Run.open(run.path)


@pytest.mark.parametrize("name", ["adapter.safetensors", "resume.safetensors"])
def test_tensors_that_are_not_whole_are_an_error_that_names_the_file(run, name):
    run.save_adapter({"w": torch.zeros(100)})
    run.save_resume({"w": torch.zeros(100)}, {"epoch": 1})
    path = run.path / name
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="not a complete safetensors file") as error:
        run.load_adapter() if name.startswith("adapter") else run.load_resume({})
    assert str(path) in str(error.value)


def test_provenance_says_command_versions_and_commit(monkeypatch, root):
    monkeypatch.setattr(sys, "argv", ["train.py", "--method", "lora"])
    found = provenance()
    assert found["argv"] == ["train.py", "--method", "lora"]
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"] == torch.__version__
    assert {"torchvision", "numpy", "pillow", "safetensors"} < set(found["versions"])
    git = ["git", "-C", str(root), "rev-parse"]
    try:
        head = subprocess.run([*git, "HEAD"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):  # no git, no repository, or one refused
        assert found["commit"] is None
        return
    assert found["commit"]
    recorded = found["commit"].removesuffix("-dirty") + "^{commit}"
    assert subprocess.run([*git, recorded], capture_output=True, text=True).stdout == head


def test_provenance_without_git_has_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance()["commit"] is None


# ------------------------------------------------------------------- what is read back is trusted


def test_the_adapter_a_run_ended_with_is_vouched_for_by_its_config(run):
    file = run.path / "adapter.safetensors"
    run.save_adapter({"w": torch.zeros(3)})
    assert "adapter_sha256" not in Run.open(run.path).config  # it is still learning
    assert Run.open(run.path).load_adapter().keys() == {"w"}
    run.save_adapter({"w": torch.ones(3)}, last=True)
    by_hand = hashlib.sha256(file.read_bytes()).hexdigest()
    assert Run.open(run.path).config == CONFIG | {"adapter_sha256": by_hand}
    assert Run.open(run.path).load_adapter()["w"].sum() == 3
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"\x3e")  # a flipped bit of the last number
    with pytest.raises(UserError, match="is not the adapter that this run saved"):
        Run.open(run.path).load_adapter()
    again = Run.resume(run.path, CONFIG)
    again.save_adapter({"w": torch.full((3,), 2)})  # goes on learning: nothing is vouched for
    assert Run.open(run.path).load_adapter()["w"].sum() == 6


@pytest.mark.parametrize("key", ["method", "model", "fingerprint"])
def test_the_adapter_of_another_run_is_refused_by_its_header(run, key, tmp_path):
    other = Run.start(tmp_path / "other", CONFIG | {key: "another"})
    other.save_adapter({"w": torch.zeros(3)})
    shutil.copy(other.path / "adapter.safetensors", run.path)
    with pytest.raises(
        UserError, match=f"was made with {key} 'another', but config.json beside it says"
    ):
        run.load_adapter()


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_not_kept(run, value):
    run.save_adapter({"w": torch.zeros(3)})
    with pytest.raises(UserError, match=r"not finite \(w\), which are not saved; lower --lr"):
        run.save_adapter({"w": torch.tensor([1.0, value])})
    assert run.load_adapter()["w"].sum() == 0


@pytest.mark.parametrize("how", ["deleted", "moved"])
@pytest.mark.parametrize("write", ["log", "adapter", "resume", "results"])
def test_a_folder_that_is_gone_is_said_and_what_was_learned_is_kept(run, how, write, tmp_path):
    run.save_adapter({"w": torch.arange(3)})
    run.path.rename(tmp_path / "moved") if how == "moved" else shutil.rmtree(run.path)
    writes = {
        "log": lambda: run.log_round({"step": 1}),
        "adapter": lambda: run.save_adapter({"w": torch.arange(3)}),
        "resume": lambda: run.save_resume({"w": torch.arange(3)}, {"epoch": 1}),
        "results": lambda: run.write_json("results.json", {}),
    }
    with pytest.raises(UserError, match=r"was deleted or moved.*are saved as") as error:
        writes[write]()
    beside = Path(str(error.value).split("are saved as ")[1])
    assert torch.equal(read_safetensors(beside)[0]["w"], torch.arange(3))
    assert not run.path.exists()


def test_one_flipped_bit_in_what_a_run_goes_on_from_is_an_error(run):
    position = {"epoch": 1, "best_val": 50.0}
    run.save_resume({"w": torch.ones(3), "v": torch.zeros(2).half()}, position)
    file = run.path / "resume.safetensors"
    whole = file.read_bytes()
    for place in (whole.index(b"50.0"), len(whole) - 1, len(whole) - 13):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"resume\.safetensors: is damaged"):
            run.load_resume(position)


@pytest.mark.parametrize(
    ("position", "said"),
    [
        ({"epoch": 1}, "best_val is missing"),
        ({"epoch": "1", "best_val": 50.0}, "epoch is '1', expected a whole number"),
        ({"epoch": 1, "best_val": None}, "best_val is None, expected a finite number"),
    ],
)
def test_a_position_of_another_kind_is_named(run, position, said):
    run.save_resume({"w": torch.ones(3)}, position)
    with pytest.raises(UserError, match=rf"resume\.safetensors: its position: {said}"):
        run.load_resume({"epoch": 0, "best_val": -1.0})

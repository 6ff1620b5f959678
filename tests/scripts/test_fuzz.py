"""Files that are damaged or made up, by the thousand: each is read, or is the user's error.

Of every file that is read, whole ones are made and spoiled: bits flipped, bytes cut out, repeated
or put in; and, since few of those get past a checksum, one value of a JSON, one cell of a table,
one number of a safetensors header, one member of an archive. While a reader reads, it may

    raise no exception but `UserError`
    take no more than 5 s of processor time and 1 GB of memory
    write, move or remove no file outside the folder it was given, start no process, connect to
    nothing, and unpickle no name (Python tells of each of these: sys.addaudithook)

By default 30 cases of each, and the same ones every time; with -m slow 10,000, or CLIP_MIN_FUZZ.
"""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from PIL import Image

import clip_min
import report
from clip_min import CLIP, CLIPConfig, UserError, formats, tokenize, weights
from clip_min.errors import told
from clip_min.tokenizer import END, START, tokenizer
from fewshot import cache, datasets, embedded, grid, predictions, record, shards, shots
from fewshot.experiment import Experiment, named
from fewshot.pictures import Pictures, Reader, open_image
from fewshot.run import Run
from gen.books import Manifest
from methods import METHODS
from methods.class_prompts import read_prompts
from methods.interop import init_from
from methods.interop.classify import open_run
from reports import figures_of_run, gather, several

CASES = int(os.environ.get("CLIP_MIN_FUZZ", 10_000))
SECONDS, BYTES = 5, 1 << 30  # that a reader may take

# ----------------------------------------------------------------------------------- what is spoilt

ODD = [None, True, -1, 0, 1, 3, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, 1e-320, "", " ", "\0"]
ODD += ["\ud800", "a" * 5_000, "../../etc/passwd", "/", "NaN", "1e9999", "{}", "{0.__class__}"]
ODD += [[], {}, [[]], [None], {"": {}}, [1, "a"], ["a", "a"], [[[[[]]]]], "è\u202e🌹", "-", "_"]
BYTES_ODD = [
    b"",
    b"\0",
    b"\xff" * 8,
    b"\0" * 64,
    b"\n",
    b",",
    b'"',
    b"{",
    b"]" * 3,
    b"\xef\xbb\xbf",
]
BYTES_ODD += [
    b"[" * 3_000,
    b"NaN",
    b"1e999",
    "è".encode("utf-16"),
    b"-9" * 2_500,
    b"\r",
    b"\\u0000",
]


def spoilt(draw: Callable, whole: bytes, ending: str) -> bytes:
    """Whole content -> the same with a fault or two."""
    ways = [bytewise]
    ways += {
        ".json": [valuewise],
        ".jsonl": [linewise],
        ".csv": [cellwise],
        ".txt": [cellwise],
        ".safetensors": [headerwise, headerwise, numberwise],
        ".pt": [memberwise, memberwise],
    }.get(ending, []) * 2
    # What is spoilt already may not be spoilt by its structure.
    cannot = (ValueError, LookupError, OverflowError, RecursionError, zipfile.BadZipFile)
    for _ in range(draw(st.integers(1, 2))):
        way = draw(st.sampled_from(ways))
        with contextlib.suppress(*cannot):
            whole = way(draw, whole)
    return whole


def bytewise(draw, whole: bytes) -> bytes:
    start = draw(st.integers(0, len(whole)))
    end = min(len(whole), start + draw(st.sampled_from([1, 2, 8, 100, len(whole)])))
    kind = draw(st.sampled_from(["flip", "cut", "put", "repeat", "other"]))
    if kind == "flip" and start < len(whole):
        return (
            whole[:start]
            + bytes([whole[start] ^ 1 << draw(st.integers(0, 7))])
            + whole[start + 1 :]
        )
    put = {"put": draw(st.sampled_from(BYTES_ODD)), "repeat": whole[start:end] * 2}
    put["other"] = draw(st.binary(max_size=20))
    return whole[:start] + put.get(kind, b"") + whole[end if kind != "put" else start :]


def valuewise(draw, whole: bytes) -> bytes:
    """One value of a JSON is another, is gone, or is there under another key."""
    root = {"": json.loads(whole)}
    places = [(root, "")]
    for holder, key in places:
        inner = holder[key]
        if isinstance(inner, dict | list) and len(places) < 2_000:
            keys = inner if isinstance(inner, dict) else range(len(inner))
            places += [(inner, k) for k in keys]
    holder, key = draw(st.sampled_from(places))
    kind = draw(st.sampled_from(["other", "other", "gone", "renamed", "wrapped", "repeated"]))
    if kind == "other":
        holder[key] = draw(st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=9))
    elif kind == "wrapped":
        holder[key] = [holder[key]]
    elif kind == "repeated" and isinstance(holder, list):
        holder.append(holder[key])
    elif kind == "renamed" and isinstance(holder, dict) and holder is not root:
        holder[draw(st.text(max_size=9))] = holder.pop(key)
    elif holder is not root:
        del holder[key]
    return json.dumps(root[""]).encode()


def linewise(draw, whole: bytes) -> bytes:
    lines = whole.split(b"\n")
    number = draw(st.integers(0, len(lines) - 1))
    kind = draw(st.sampled_from(["value", "value", "gone", "repeated", "moved"]))
    line = lines.pop(number)
    if kind == "value":
        lines.insert(number, valuewise(draw, line))
    elif kind != "gone":
        lines[0 if kind == "moved" else number : 0] = [line] * (1 + (kind == "repeated"))
    return b"\n".join(lines)


def cellwise(draw, whole: bytes) -> bytes:
    lines = [line.split(",") for line in whole.decode().split("\n")]
    line = lines[draw(st.integers(0, len(lines) - 1))]
    cell = draw(st.sampled_from([str(odd) for odd in ODD]) | st.text(max_size=12))
    line[draw(st.integers(0, len(line) - 1))] = draw(
        st.sampled_from([cell, f"{cell},", f'"{cell}'])
    )
    return "\n".join(",".join(line) for line in lines).encode("utf-8", "surrogatepass")


def headerwise(draw, whole: bytes) -> bytes:
    """A safetensors file whose header says something else, or is said to be of another length."""
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length]
    if draw(st.booleans()) or draw(st.booleans()):
        header = valuewise(draw, header)
        length = len(header)
    else:
        length = draw(st.sampled_from([0, 1, length + 1, 10**8, 2**40, 2**63, 2**64 - 1]))
    return length.to_bytes(8, "little") + header + whole[8 + len(header) :]


def numberwise(draw, whole: bytes) -> bytes:
    """Some numbers of a safetensors file are NaN, infinity, or huge."""
    start = 8 + int.from_bytes(whole[:8], "little")
    data = bytearray(whole[start:])
    odd = draw(
        st.sampled_from([b"\xff\xff\xff\xff", b"\0\0\x80\x7f", b"\0\0\0\x80", b"\xff\xff\x7f\x7f"])
    )
    at = 4 * draw(st.integers(0, max(0, len(data) // 4 - 1)))
    count = draw(st.sampled_from([1, 5, len(data)]))
    data[at : at + 4 * count] = (odd * count)[: len(data) - at]
    return whole[:start] + bytes(data)


def memberwise(draw, whole: bytes) -> bytes:
    """An archive one of whose members is spoilt, gone, packed, or called something else."""
    source, made = zipfile.ZipFile(io.BytesIO(whole)), io.BytesIO()
    chosen = draw(st.sampled_from(source.namelist()))
    kind = draw(st.sampled_from(["bytes", "bytes", "gone", "called", "packed"]))
    with zipfile.ZipFile(made, "w") as archive:
        for name in source.namelist():
            content, way = source.read(name), zipfile.ZIP_STORED
            if name == chosen and kind == "gone":
                continue
            if name == chosen and kind == "bytes":
                content = bytewise(draw, content)
            if name == chosen and kind == "called":
                name = draw(
                    st.sampled_from(["../../out", "/tmp/out", "a/data.pkl", "constants.pkl"])
                )
            if name == chosen and kind == "packed":
                content, way = bytes(1_000_000), zipfile.ZIP_DEFLATED
            archive.writestr(name, content, way)
    return made.getvalue()


# ------------------------------------------------------------------------------------- what it may


class TooLong(BaseException):
    """Nothing catches it."""


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MOVES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate")
NEVER = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect")
NEVER += ("pickle.find_class",)
inside: Path | None = None  # while a reader reads
forbidden: list[str] = []


def hear(event: str, arguments: tuple) -> None:
    """What Python tells of itself; what a reader may not do is written down."""
    if inside is None:
        return
    paths = ()
    if event == "open" and isinstance(arguments[0], str | bytes) and arguments[2] & WRITES:
        paths = arguments[:1]
    elif event in MOVES:
        paths = [path for path in arguments if isinstance(path, str | bytes | os.PathLike)]
    elif event in NEVER:
        forbidden.append(f"{event} {arguments!r:.200}")
    for path in map(os.fsdecode, paths):
        real = Path(os.path.abspath(path))
        if not real.is_relative_to(inside) and path != os.devnull:
            forbidden.append(f"{event} {path}")


sys.addaudithook(hear)


@contextlib.contextmanager
def watched(folder: Path):
    """Less memory, less time, and no file but those in the folder."""
    global inside

    def end(*_):
        raise TooLong(f"more than {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, end)
    with contextlib.suppress(OSError):  # elsewhere than on Linux
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    forbidden.clear()
    inside = folder
    try:
        yield
    finally:
        inside = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)
    assert not forbidden


def check(folder: Path, read: Callable[[], object]) -> None:
    """It is read, or is the user's error, of a line that can be read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with watched(folder):
                read()
        except UserError as error:
            said = told(error)
        else:
            return
    assert 10 < len(said) < 4_000


def each(cases: int, case: Callable) -> None:
    """case(draw), so many times; the same ones whenever it runs, and nothing is kept of them."""

    @settings(
        max_examples=cases,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data):
        case(data.draw)

    run()


@pytest.fixture(scope="module", autouse=True)
def nothing_is_left_behind(tmp_path_factory):
    set_hypothesis_home_dir(tmp_path_factory.mktemp("hypothesis"))


# ------------------------------------------------------------------------------------- the readers


@dataclass
class Target:
    file: Path  # which is spoilt
    read: Callable[[], object]


@pytest.fixture(scope="module")
def world(tmp_path_factory, trained, data, synthetic, script) -> Path:
    """A folder with a whole file of each kind, and nothing else that matters."""
    folder = tmp_path_factory.mktemp("world")
    run = Path(shutil.copytree(trained.path, folder / "run"))
    assert script("eval", "--run", run, "--keep-share", "0,1").code == 0
    assert script("export", "--run", run, "--format", "peft", folder / "peft").code == 0
    shutil.copytree(synthetic(), folder / "synthetic")
    torch.manual_seed(0)
    small = CLIP(CLIPConfig(16, 32, 16, 64, 1, 1, 64, 1, 1, vocab_size=40))
    clip_min.save(small, folder / "tiny.safetensors")
    formats.save_hugging_face(small, folder / "hf")
    formats.save_open_clip(small, folder / "open_clip")
    state = formats.to_openai_names(small.state_dict())
    torch.save(state, folder / "state.pt")
    holder = torch.nn.Module()
    for name, tensor in state.items():
        holder.register_buffer(name.replace(".", "_"), tensor)
    torch.jit.script(holder).save(folder / "script.pt")
    pairs = {
        p: {"w_lora_A": torch.ones(2, 64), "w_lora_B": torch.ones(64, 2)}
        for p in ("q_proj", "v_proj")
    }
    meta = {"r": 2, "alpha": 1, "encoder": "vision", "params": ["q", "v"], "position": "all"}
    torch.save(
        {"weights": {f"layer_{i}": pairs for i in range(2)}, "metadata": meta}, folder / "lora.pt"
    )

    (folder / "csv").mkdir()
    rows = [
        (part, picture.relative_to(data), picture.parent.name)
        for part in ("train", "test")
        for picture in sorted((data / part).rglob("*.png"))
    ]
    text = "path,label,split\n" + "".join(f"../own/{p},{name},{part}\n" for part, p, name in rows)
    (folder / "csv/data.csv").write_text(text)
    shutil.copytree(data, folder / "own")
    names = sorted({name for *_, name in rows})
    (folder / "csv/classes.json").write_text(json.dumps({name: name for name in names}))
    (folder / "own/classes.txt").write_text("\n".join(names))
    split = {"train": [], "val": [], "test": []}
    for part, picture, name in rows:
        split[part].append([str(picture), names.index(name), name])
    (folder / "own/split.json").write_text(json.dumps(split))
    lines = [{"path": str(p), "label": name} for part, p, name in rows if part == "train"]
    (folder / "shots.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "base.txt").write_text("\n".join(names[:3]))
    prompts = {name: [f"a photo of a {name}.", "{}, a flower."] for name in names}
    (folder / "prompts.json").write_text(json.dumps(prompts))
    for ending in ("png", "jpg", "gif", "webp", "tiff", "bmp", "ppm"):
        Image.open(data / "test" / names[0] / "0.png").save(folder / f"picture.{ending}")
    cache.save(folder / "cache", "features", "0" * 32, torch.arange(60.0).reshape(3, 20))
    told = {"model": "tiny", "fingerprint": "0" * 16, "precision": "fp32", "image_size": 0}
    made = shards.Shards(folder / "features", told | {"data": str(data)}, 100)
    shards.embed(small, shards.items(data), made, 50, "fp32")
    made.finish()
    return folder


@pytest.fixture(scope="module")
def targets(world, model) -> dict[str, Target]:
    run, clip = world / "run", clip_min.load(str(model))
    config = json.loads((run / "config.json").read_text())
    method = METHODS["lora"](
        clip,
        ["a", "b"],
        "a {}",
        METHODS["lora"].Settings(
            image_rank=2, image_alpha=1, towers="image", parts="qv", scaling="sqrt"
        ),
    )
    fits = METHODS["lora"](clip, ["a", "b"], "a {}", METHODS["lora"].Settings(**config["settings"]))
    own = datasets.load("folder", world / "own", 1)
    pictures = Pictures(sorted((world / "own/test").rglob("*.png")), torch.zeros(20).long())
    reader = Reader(32, folder=world / "pixels")
    pixels = reader.read(pictures, [])[1]

    def cached():
        assert torch.equal(reader.read(pictures, [])[1], pixels)

    def resumed():
        before = (run / "log.jsonl").read_bytes()
        try:
            return Run.resume(run, config).load_resume({})
        finally:
            (run / "log.jsonl").write_bytes(before)

    def feature():
        found = cache.load(world / "cache", "features", "0" * 32)
        assert found is None or torch.equal(found, torch.arange(60.0).reshape(3, 20))

    def opened():
        with pytest.MonkeyPatch.context() as patch:  # the model is read by others above
            patch.setattr(weights, "load", lambda *_, **__: clip)
            open_run(run)

    def reported():
        figures_of_run.numbers(gather.read(run))
        several.numbers(gather.find([run]))

    def learned_from():
        embedded.made_by(str(world / "features"))
        datasets.load("features", world / "features", 1).train.features.read()

    labels = config["classnames"]
    many = {
        "weights": Target(
            world / "tiny.safetensors", lambda: clip_min.load(world / "tiny.safetensors")
        ),
        "weights.pt": Target(world / "state.pt", lambda: clip_min.load(world / "state.pt")),
        "weights in TorchScript": Target(
            world / "script.pt", lambda: clip_min.pickled.read_pickled(world / "script.pt")
        ),
        "weights, Hugging Face": Target(
            world / "hf/model.safetensors", lambda: clip_min.load(world / "hf")
        ),
        "config, Hugging Face": Target(
            world / "hf/config.json", lambda: clip_min.load(world / "hf")
        ),
        "processor": Target(
            world / "hf/preprocessor_config.json", lambda: clip_min.load(world / "hf")
        ),
        "config, open_clip": Target(
            world / "open_clip/open_clip_config.json", lambda: clip_min.load(world / "open_clip")
        ),
        "adapter": Target(run / "adapter.safetensors", lambda: init_from.load_into(fits, run)),
        "adapter, PEFT": Target(
            world / "peft/adapter_model.safetensors",
            lambda: init_from.load_into(fits, world / "peft"),
        ),
        "config, PEFT": Target(
            world / "peft/adapter_config.json", lambda: init_from.load_into(fits, world / "peft")
        ),
        "adapter, CLIP-LoRA": Target(
            world / "lora.pt", lambda: init_from.load_into(method, world / "lora.pt")
        ),
        "CSV": Target(world / "csv/data.csv", lambda: datasets.load("folder", world / "csv", 1)),
        "classes.json": Target(
            world / "csv/classes.json", lambda: datasets.load("folder", world / "csv", 1)
        ),
        "classes.txt": Target(
            world / "own/classes.txt", lambda: datasets.load("folder", world / "own", 1)
        ),
        "JSON split": Target(
            world / "own/split.json",
            lambda: datasets.load("folder", world / "own", 1, "coop", world / "own/split.json"),
        ),
        "shots file": Target(
            world / "shots.jsonl", lambda: shots.fix(own, world / "shots.jsonl", 1)
        ),
        "prompts": Target(
            world / "prompts.json", lambda: read_prompts(str(world / "prompts.json"))
        ),
        "base classes": Target(
            world / "base.txt",
            lambda: Experiment(base_classes=str(world / "base.txt")).base(own.classnames),
        ),
        "names": Target(world / "base.txt", lambda: named(str(world / "base.txt"))),
        "run's config": Target(run / "config.json", opened),
        "run's config, resumed": Target(run / "config.json", resumed),
        "run's adapter": Target(run / "adapter.safetensors", opened),
        "log": Target(run / "log.jsonl", resumed),
        "resume": Target(run / "resume.safetensors", resumed),
        "record": Target(run / "data.json", lambda: record.kept(run, config)),
        "results": Target(run / "results.json", lambda: grid.read_results(run / "results.json")),
        "predictions": Target(
            run / "predictions.safetensors",
            lambda: predictions.read(run / "predictions.safetensors", labels),
        ),
        "report of a config": Target(run / "config.json", reported),
        "report of results": Target(run / "results.json", reported),
        "report of a log": Target(run / "log.jsonl", reported),
        "report of predictions": Target(run / "predictions.safetensors", reported),
        "report of a record": Target(run / "data.json", reported),
        "report of shares": Target(run / "keep_share.json", reported),
        "features": Target(world / "features/00000.safetensors", learned_from),
        "names of features": Target(world / "features/00000.json", learned_from),
        "index of features": Target(world / "features/index.json", learned_from),
        "config of features": Target(world / "features/config.json", learned_from),
        "cached features": Target(world / "cache/features" / f"{'0' * 32}.safetensors", feature),
        "cached pixels": Target(next((world / "pixels/pixels").iterdir()), cached),
        "cached oddities": Target(next((world / "pixels/odd").iterdir()), cached),
    }
    for name in ("settings.json", "plan.json", "captions.jsonl", "manifest.jsonl", "seconds.json"):
        books = world / "synthetic" / name
        many[f"books, {name}"] = Target(books, lambda: Manifest.open(world / "synthetic"))
    for ending in ("png", "jpg", "gif", "webp", "tiff", "bmp", "ppm"):
        file = world / f"picture.{ending}"
        many[f"picture, {ending}"] = Target(file, lambda file=file: open_image(file))
    return many


NAMES = ["weights", "weights.pt", "weights in TorchScript", "weights, Hugging Face"]
NAMES += ["config, Hugging Face", "processor", "config, open_clip", "adapter", "adapter, PEFT"]
NAMES += ["config, PEFT", "adapter, CLIP-LoRA", "CSV", "classes.json", "classes.txt", "JSON split"]
NAMES += ["shots file", "prompts", "base classes", "names", "run's config", "run's config, resumed"]
NAMES += ["run's adapter", "log", "resume", "record", "results", "predictions"]
NAMES += [f"report of {what}" for what in ("a config", "results", "a log", "predictions")]
NAMES += ["report of a record", "report of shares"]
NAMES += ["features", "names of features", "index of features", "config of features"]
NAMES += ["cached features", "cached pixels", "cached oddities"]
NAMES += [f"books, {n}" for n in ("settings.json", "plan.json", "captions.jsonl", "manifest.jsonl")]
NAMES += ["books, seconds.json"]
NAMES += [f"picture, {ending}" for ending in ("png", "jpg", "gif", "webp", "tiff", "bmp", "ppm")]


def fuzz(world: Path, target: Target, cases: int) -> None:
    whole = target.file.read_bytes()
    target.read()  # as it is, it can be read

    def case(draw):
        target.file.write_bytes(spoilt(draw, whole, target.file.suffix))
        check(world, target.read)

    try:
        each(cases, case)
    finally:
        target.file.write_bytes(whole)


@pytest.mark.parametrize("name", NAMES)
def test_a_spoilt_file_is_read_or_is_the_users_error(name, world, targets):
    fuzz(world, targets[name], 30)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_file_spoilt_in_thousands_of_ways_is_read_or_is_the_users_error(name, world, targets):
    fuzz(world, targets[name], CASES)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("report of")])
def test_whatever_a_report_can_count_it_can_draw(name, world, targets, monkeypatch):
    """A page takes seconds: a hundredth of the cases, and no limit of time."""
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 0)
    monkeypatch.setattr(sys, "argv", ["report.py", str(world / "run"), "--quick"])
    fuzz(world, Target(targets[name].file, report.main), CASES // 100)


def test_every_reader_is_tried(targets):
    assert list(targets) == NAMES


def texts(cases: int, folder: Path) -> None:
    bpe = tokenizer()
    first = {word: bpe.cache[word] for word in (START, END)}  # which no merges give

    def case(draw):
        text = draw(st.text(max_size=200)) * draw(st.sampled_from([1, 1, 1, 500]))
        bpe.cache = dict(first)

        def read():
            bpe.decode(bpe.encode(text))
            assert tokenize(text, truncate=True).shape == (1, 77)
            tokenize(text)

        check(folder, read)

    each(cases, case)


def test_any_text_has_tokens_or_is_too_long(tmp_path):
    texts(30, tmp_path)


@pytest.mark.slow
def test_thousands_of_texts_have_tokens_or_are_too_long(tmp_path):
    texts(CASES, tmp_path)

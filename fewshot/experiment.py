"""An experiment, defined by its settings: train.py runs it, eval.py rebuilds it."""

import contextlib
import functools
import io
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch

from clip_min import CLIP, UserError, weights
from clip_min.errors import Note, is_bug, told, unknown
from clip_min.hub import DEMO, IN_FOLDERS, local
from clip_min.typed import expect_fields
from fewshot import cache, datasets, ranks, shots
from fewshot.embedded import made_by
from fewshot.folder import read_text, spoken
from fewshot.pictures import Reader
from fewshot.predictions import Predictions, predict_task, score
from fewshot.record import Record
from fewshot.task import Task, make_task, make_test
from fewshot.transductive import Queries, evaluate_tasks

BLIND = "the demo model has never seen a photo; for real pictures add --model ViT-B/16"
THREADS = 0  # by default: the number before the first `prepare`
SMALL = 20_000_000  # parameters; the demo model has 4 million, ViT-B/32 has 151


# Flags that say where things are now, if they have moved since a run was trained.
MOVED = ("device", "data_root", "split_file", "base_classes", "model")


@dataclass
class Experiment:
    """All settings except the method's; each field is a flag of train.py."""

    dataset: Annotated[str, f"data set: {', '.join(datasets.DATASETS)}"] = "demo"
    data_root: Annotated[str, "folder of your pictures, or of named data sets [data]"] = ""
    model: Annotated[str, "demo, ViT-B/16, …, OWNER/NAME of the hub, a file or folder"] = ""
    image_size: Annotated[int, "image size in pixels; 0: as the model was trained"] = 0
    shots: Annotated[int | str, "training images of each class, or all"] = 10
    seed: Annotated[int, "random seed for shots, initial values and order"] = 1
    classes: Annotated[
        Literal["base-novel", "all"], "learn half of the classes and test both halves; or all"
    ] = "base-novel"
    shots_file: Annotated[str, "file of the training images: JSON lines of path and label"] = ""
    base_classes: Annotated[str, "file of the base classes, one on each line; default: half"] = ""
    split: Annotated[
        Literal["official", "coop"],
        "the data set's own split, or CoOp's split and draw of shots",
    ] = "official"
    split_file: Annotated[str, "CoOp's split_zhou_*.json; default: the file below --data-root"] = ""
    template: Annotated[str, "text with {} for the class name; default: the data set's own"] = ""
    skip_bad_images: Annotated[bool, "leave out unreadable images, and list them"] = False
    device: Annotated[str, "cpu, cuda, cuda:1, …; default: cuda if there is one"] = ""
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"], "precision of the forward pass; learned tensors stay fp32"
    ] = "fp32"
    threads: Annotated[int, "CPU threads; 0: one for a small model, else all cores"] = 0

    def __post_init__(self):
        expect_fields(self)  # a config file that is read back may hold anything
        if self.dataset not in datasets.DATASETS:
            raise unknown("--dataset", self.dataset, datasets.DATASETS)
        if self.dataset == "features" and not self.model:  # the one that made them
            self.model, size = made_by(self.data_root)
            self.image_size = self.image_size or size  # another one than theirs is refused later
        self.model = self.model or datasets.DATASETS[self.dataset].model
        if not datasets.DATASETS[self.dataset].read:
            self.split = "coop"  # the only split
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if self.shots != "all" and not (isinstance(self.shots, int) and self.shots >= 1):
            raise UserError(f"--shots {self.shots}: expected 1 or more, or all")
        if self.shots_file and self.shots not in (type(self).shots, "all"):
            raise UserError(
                "--shots-file and --shots both choose the training images; leave one out"
            )
        self.shots = "all" if self.shots_file else self.shots
        if self.template and "{}" not in self.template:
            raise UserError(f"--template {self.template!r} has no {{}} for the class name; add one")
        if self.threads < 0:
            raise UserError(f"--threads {self.threads}: expected 1 or more, or 0")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed}: expected 0 to {2**32 - 1}")
        if self.base_classes and self.classes == "all":
            raise UserError(
                "--base-classes needs two halves, but --classes all has none; leave one out"
            )
        if ranks.size > 1:
            ranks.check_device(self.device)
        try:
            if torch.device(self.device).type not in ("cpu", "cuda"):  # others lack float64
                raise RuntimeError("expected cpu, cuda, or cuda:1 and so on")
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--device {self.device}: cannot be used ({reason}); try cpu") from None

    def load(
        self, folder: Path | None = cache.FOLDER, *, record: Record | None = None
    ) -> tuple[CLIP, Task]:
        """The model, and the task with pictures for this model.

        record: of a run that is to be tested again, on the pictures it names; if it is empty,
        everything is tested and nothing is learned.
        """
        local(self.model)  # first: a mistyped name is an error at once
        with ranks.first_alone() if ranks.size > 1 else contextlib.nullcontext():  # it downloads
            dataset = self.load_dataset()
            clip = weights.load(self.model, self.device, image_size=self.image_size)
        base = self.base(dataset.classnames) if self.base_classes else None
        how = (self.skip_bad_images, folder, self.precision, clip.config)
        reader = Reader(clip.config.image_size, torch.device(self.device), *how)
        if record is not None:
            task = make_test(dataset, reader, self.classes, base, record, again=True)
        else:
            if self.shots_file:
                dataset = shots.fix(dataset, Path(self.shots_file).expanduser(), self.seed)
            task = make_task(dataset, self.shots, self.seed, self.classes, reader, base)
        if self.precision == "fp16" and reader.device.type == "cpu":
            task.notes.append("fp16 is very slow on a CPU, where bf16 is faster than fp32")
        if self.model == "demo" and self.dataset != "demo":
            task.notes.append(BLIND)
        return clip, task

    def prepare(self, clip: CLIP) -> None:
        """Configure PyTorch for this process: the GPU, real fp32, and the number of threads.

        Threads wait for each other at every matrix product. Products of a small model take
        microseconds, so more threads gain little, and lose much if another process keeps a core
        busy. The number is recorded with a run, since the rounding of sums depends on it.
        """
        if self.device.startswith("cuda:"):
            torch.cuda.set_device(self.device)  # "cuda" now means this device
        # By default a GPU rounds inputs of convolutions (the patch embedding) to 10 bits.
        torch.backends.cudnn.allow_tf32 = False
        global THREADS
        THREADS = THREADS or torch.get_num_threads()
        small = sum(parameter.numel() for parameter in clip.parameters()) < SMALL
        torch.set_num_threads(self.threads or (1 if small else THREADS))

    def load_dataset(self) -> datasets.Dataset:
        """The whole data set of the flags; `load` draws the task from it."""
        root, file = (
            Path(text).expanduser() if text else None for text in (self.data_root, self.split_file)
        )
        dataset = datasets.load(self.dataset, root, self.seed, self.split, file)
        return replace(dataset, template=self.template or dataset.template)

    def base(self, classnames: list[str]) -> list[int]:
        """Indices of the classes in the file `base_classes`."""
        file = Path(self.base_classes).expanduser()
        names = [name for line in read_text(file).splitlines() if (name := spoken(line))]
        for name in names:
            if name not in classnames:
                raise unknown(f"{file}: class", name, classnames)
        chosen = {classnames.index(name) for name in names}
        if not 0 < len(chosen) < len(classnames):
            raise UserError(
                f"{file}: names {len(chosen)} of {len(classnames)} classes; name some of them, and "
                "leave others as novel classes"
            )
        return sorted(chosen)

    def folder(self, method: str) -> Path:
        """The folder of a run: DATASET/MODEL/METHOD-sSHOTS-seedSEED."""
        data = self.dataset
        if data in ("folder", "features"):  # resolved, since "." and ".." are no names
            data = Path(self.data_root).expanduser().resolve().name
        data += "-coop" if self.split == "coop" else ""
        data += "-all" if self.classes == "all" else ""
        data += f"-{Path(self.base_classes).stem}" if self.base_classes else ""
        model = self.model.replace("/", "-")
        if local(self.model) not in (None, DEMO):
            path = Path(os.path.abspath(Path(self.model).expanduser()))  # links are not followed
            model = path.name if path.is_dir() else path.stem
            if path.name in IN_FOLDERS:  # a generic name
                model = path.parent.name
        model += f"-{self.image_size}px" if self.image_size else ""
        drawn = Path(self.shots_file).stem if self.shots_file else f"s{self.shots}"
        return Path(data) / model / f"{method}-{drawn}-seed{self.seed}"


def named(classes: str) -> list[str]:
    """The names in a script's --classes: "rose,tulip", or a file with one on each line."""
    path = os.path.expanduser(classes)
    names = read_text(Path(path)).splitlines() if os.path.isfile(path) else classes.split(",")
    names = [name.strip() for name in names if name.strip()]
    if len(names) < 2:
        raise UserError(
            f"--classes {classes}: names {len(names)} classes, expected two or more; give "
            '"rose,tulip", or a file with one on each line'
        )
    datasets.check_names("--classes", names)
    return names


def evaluate(
    method, task: Task, queries: Queries | None = None
) -> tuple[dict, dict[str, Predictions]]:
    """Test a method on every part -> its scores in percent (`score`), and its predictions.

    With `queries`, it is scored over transductive tasks instead (fewshot/transductive.py), without
    predictions for single pictures.
    """
    if queries is not None:
        return evaluate_tasks(method, task, queries), {}
    found = predict_task(method, task)
    return score(found, {part: test.classnames for part, test in task.tests.items()}), found


def forget_peak() -> None:
    """Reset the peak for `peak_memory_mb`, if the system supports it."""
    if torch.cuda.is_initialized():  # a run with --device cpu must not touch the GPU
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux


def peak_memory_mb() -> float:
    """The peak memory of this process since `forget_peak` in MB (the GPU's, if it is used). On
    other systems than Linux, since the process started.
    """
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e6
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))  # KiB
        return peak * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS: in bytes


def _show(otherwise: Callable, message: Warning, category: type, *where) -> None:
    """Show a `Note` as one line, and other warnings as usual."""
    if issubclass(category, Note):
        print(f"note: {message}")
    else:
        otherwise(message, category, *where)


def run_script(
    main: Callable[[], None],
    resume: str = "run the same command again",
    shared: bool = False,
) -> None:
    """Run a script. A user's mistake gives one line and exit code 2, never a traceback.

    resume: how to continue after Ctrl-C. shared: whether several processes started by `torchrun`
    can share the work (fewshot/ranks.py).
    """
    # Flush lines at once for log files; file names may hold bytes that are not text.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = functools.partial(_show, warnings.showwarning)
            with ranks.joined():
                if ranks.size > 1 and not shared:
                    raise UserError("is for one process; start it without torchrun")
                main()
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)  # the work may be incomplete
    except Exception as error:
        if is_bug(error):
            raise
        if ranks.rank:  # usually rank 0 prints the same, and torchrun ends this process
            time.sleep(5)
        print(f"{Path(sys.argv[0]).name}: error: {told(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if ranks.rank == 0:
            print(f"\ninterrupted; {resume} to go on", file=sys.stderr)
        sys.exit(130)

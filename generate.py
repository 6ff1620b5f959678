"""Make synthetic training images: caption a real picture, repaint another, filter with CLIP.

python generate.py --dataset demo                             offline, a minute
python generate.py --dataset flowers102 --per-class 32        LLaVA and Stable Diffusion, hours
python generate.py --dataset flowers102 --plan f1 --filter runs/flowers102/ViT-B-16/lora-s10-seed1
torchrun --nproc-per-node 8 generate.py …                     each process paints some classes

Only training pictures of the classes to learn are used. The command may be killed at any moment:
started again, it continues. `train.py --method disef` learns from the images.
"""

import contextlib
import gc
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

# Before torch: clip_min sets how threads wait.
from clip_min import CLIP, UserError, weights  # isort: skip

import torch

from clip_min.errors import first_line
from fewshot import cache, ranks
from fewshot.batches import Batches
from fewshot.experiment import Experiment, peak_memory_mb, run_script
from fewshot.flags import Parser, add_flags, pick
from fewshot.metrics import per_class, predict
from fewshot.pictures import few
from fewshot.run import Run
from fewshot.task import Task
from gen.books import Manifest
from gen.caption import Llava
from gen.diffuse import Diffusion, find_painter
from gen.filter import Filter
from gen.painter import DemoCaptioner, DemoPainter
from gen.plan import plan
from gen.settings import Generation
from gen.studio import Studio
from gen.summary import contact_sheet, table
from gen.training import finished, join, made_from
from methods import METHODS
from methods.disef import DISEFSettings
from methods.interop.load import trained

STAGES = ["all", "caption", "diffuse", "filter"]


def main() -> None:
    given = parse(sys.argv[1:])
    experiment = Experiment(**pick(Experiment, given))
    options = Generation(**pick(Generation, given))
    filter = given.get("filter", "zero_shot")
    clip, task = experiment.load(cache.chosen(given))
    experiment.prepare(clip)
    for note in task.notes:
        print(f"note: {note}")
    default = default_folder(given.get("out", "runs"), experiment, options.plan, filter)
    folder = Path(given.get("synthetic", default))
    stage = given.get("stage", "all")
    manifest = generate(experiment, clip, task, options, filter, folder, stage)
    if ranks.rank:
        return
    if stage in ("all", "filter") and manifest.attempts:
        print(table(manifest))
        if any(manifest.plan["quotas"].values()):  # false, if no class is weak
            contact_sheet(manifest, task.train.pictures, folder / "contact_sheet.png")
            print(f"contact sheet: {folder / 'contact_sheet.png'}")
    if stage != "caption" and (missing := manifest.missing()):
        then = "filter" if stage == "diffuse" else "diffuse" if manifest.captions else "caption"
        print(f"{missing} images are still missing: run --stage {then} next")


def generate(
    experiment: Experiment,
    clip: CLIP,
    task: Task,
    options: Generation,
    filter: str,
    folder: Path,
    stage: str = "all",
) -> Manifest:
    """Make the images that `folder` lacks. filter: "zero_shot" or the folder of a run."""
    options = options.for_task(experiment.dataset, task.template)
    if options.offload and not experiment.device.startswith(
        "cuda"
    ):  # an error before hours of work
        raise UserError("--offload: moves models off the GPU, but there is no GPU; leave it out")
    if options.offload and ranks.size > 1:
        raise UserError("--offload: works only in a single process; leave it out, or start one")
    judge = load_filter(filter, clip, task)
    settings = {
        **made_from(experiment, task),
        **options.fixed(judge.name),
        "filter": judge.name,
        "filter_revision": judge.revision,
    }
    f1 = None
    if options.plan != "uniform":
        # Measured anew, it might plan other images.
        before = ranks.same(Manifest.measured(folder) if ranks.rank == 0 else None) or {}
        if before.keys() == set(task.classnames):
            f1 = torch.tensor([before[name] for name in task.classnames], dtype=torch.float64)
        else:
            model = judge if options.f1_of == "filter" else load_filter("zero_shot", clip, task)
            predicted = predict(model.method, task.val).argmax(dim=1)
            f1 = per_class(predicted, task.val.labels.cpu(), len(task.classnames))[1] / 100
    planned, there = plan(options, task.classnames, f1), {*task.train.labels.tolist()}
    quotas = planned["quotas"]
    if bare := [n for k, n in enumerate(task.classnames) if quotas[n] and k not in there]:
        raise UserError(
            f"{folder}: {len(bare)} classes have no training picture to repaint: "
            f"{few(bare, 5)}; give each at least one"
        )
    manifest = Manifest.start(folder, settings, planned)
    studio = Studio(manifest, task.train.pictures, options, experiment.seed)
    print(f"{folder}: {manifest.missing()} images to make, filter {judge.name}")
    if single := [name for name, members in studio.members.items() if len(members) == 1]:
        print(
            f"note: {len(single)} classes have a single real picture, which is both captioned and "
            f"repainted: {', '.join(single[:5])}{', …' if len(single) > 5 else ''}"
        )

    if stage in ("all", "caption") and studio.captions_missing():
        with ranks.first_alone():  # it downloads missing files
            captioner = load_captioner(options, experiment.device)
        if stage == "all" and options.painter != "demo":  # an error before hours of captions
            with ranks.first_alone(), _packages("--painter"):
                find_painter(options.painter)
        studio.caption(captioner)
        del captioner  # they need not fit in memory together
        gc.collect()
        print(f"captions: {len(manifest.captions)}, {peak_memory_mb():,.0f} MB at peak")
    if stage in ("all", "filter"):
        studio.filter(judge)  # undecided images of --stage diffuse
    if stage in ("all", "diffuse") and manifest.missing():
        if studio.captions_missing():
            raise UserError(f"{folder}: captions are missing; run --stage caption first")
        with ranks.first_alone():
            painter = load_painter(options, experiment.device)
        studio.paint(painter, judge if stage == "all" else None)
        print(f"images: {len(manifest.attempts)}, {peak_memory_mb():,.0f} MB at peak")
    return manifest


def load_captioner(options: Generation, device: str):
    if options.captioner == "demo":
        return DemoCaptioner()
    with _packages("--captioner"):
        return Llava(options.captioner, options, device)


def load_painter(options: Generation, device: str):
    if options.painter == "demo":
        return DemoPainter(options.strength)
    with _packages("--painter"):
        return Diffusion(options.painter, options, device)


@contextlib.contextmanager
def _packages(flag: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"{flag}: a package is missing ({first_line(error)}); pip install -e '.[gen]'"
        ) from None


def load_filter(name: str, clip: CLIP, task: Task) -> Filter:
    """Zero-shot CLIP, or the method of a run, for the task's classes."""
    if name == "zero_shot":
        method = METHODS[name].plain(clip, task.classnames, task.template)
        return Filter(method, name, weights.fingerprint(clip))
    if not Path(name).is_dir():
        raise UserError(f"--filter {name}: expected zero_shot, or the folder of a run of train.py")
    run = Run.open(Path(name))
    method = trained(run, clip)
    state = method.adapter_state()
    if run.learned != task.classnames:
        method = method.for_classes(task.classnames)
    revision = cache.key(*(state[key] for key in sorted(state)))
    return Filter(method, run.config["method"], revision[:16])


def add_synthetic(
    settings: DISEFSettings,
    experiment: Experiment,
    clip: CLIP,
    task: Task,
    out: Path,
    filter: str,
) -> tuple[DISEFSettings, Batches, dict]:
    """-> settings, the training pictures with synthetic ones, and a summary of the latter.

    On the demo task, missing images are made, with this `filter` (as in `generate`). For other data
    sets they must exist, made with the same settings.
    """
    default = default_folder(out, experiment, settings.plan, settings.filter)
    folder = Path(settings.synthetic or default)
    if experiment.dataset == "demo":
        options = Generation(per_class=settings.per_class, plan=settings.plan, batch_size=64)
        manifest = generate(experiment, clip, task, options, filter, folder)
    else:
        manifest = finished(folder, experiment, task, settings, filter)
    summary = {
        "images": len(manifest.chosen()),
        "attempts": len(manifest.attempts),
        "seconds": sum(manifest.seconds.values()),
    }
    return replace(settings, synthetic=str(folder)), join(task.train, manifest), summary


def default_folder(out: str | Path, experiment: Experiment, plan: str, filter: str) -> Path:
    """The folder of images: OUT/DATASET/MODEL/synthetic_PLAN_FILTER-sSHOTS-seedSEED."""
    method = filter if filter in METHODS else Run.open(Path(filter)).config["method"]
    return Path(out) / experiment.folder(f"synthetic_{plan}_{method}")


def parse(argv: list[str]) -> dict:
    parser = Parser(description=__doc__)
    group = parser.add_argument_group("run")
    group.add_argument("--filter", help="the filter: zero_shot, or a run of train.py")
    group.add_argument("--stage", choices=STAGES, help="run only one of the stages [all]")
    group.add_argument("--synthetic", metavar="DIR", help="folder of the images [in --out]")
    group.add_argument("--out", help="parent of the run folders [runs]")
    add_flags(group, cache.Flags)
    add_flags(parser.add_argument_group("images"), Generation)
    add_flags(parser.add_argument_group("experiment"), Experiment)
    return parser.parse(argv)


if __name__ == "__main__":
    run_script(main, shared=True)

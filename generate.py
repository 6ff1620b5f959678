"""Make synthetic training images: caption a real picture, repaint another, keep what CLIP knows.

python generate.py --dataset demo                             offline, a minute
python generate.py --dataset flowers102 --per-class 32        LLaVA and Stable Diffusion, hours
python generate.py --dataset flowers102 --plan f1 --filter runs/flowers102/ViT-B-16/lora-s10-seed1

Made from the training pictures of the classes to learn, and from no others. May be killed at any
moment: the same command goes on where it was. `train.py --method disef` learns from the images.
"""

import sys
from dataclasses import fields, replace
from pathlib import Path

import torch

from clip_min import UserError, weights
from eval import check_model
from fewshot import cache
from fewshot.experiment import Experiment, nearest, peak_memory_mb, run_script
from fewshot.flags import Parser, add_flags, pick
from fewshot.images import Batches, Pictures, read
from fewshot.metrics import per_class, predict
from fewshot.run import Run
from fewshot.task import Task
from gen.caption import Llava
from gen.diffuse import Diffusion
from gen.filter import Filter
from gen.manifest import Manifest, fingerprint
from gen.painter import DemoCaptioner, DemoPainter
from gen.plan import quotas
from gen.report import contact_sheet, table
from gen.settings import LLAVA, STABLE_DIFFUSION, Generation
from gen.studio import Studio
from methods import METHODS, Settings
from methods.disef import DISEFSettings

STAGES = ["all", "caption", "diffuse", "filter"]


def main() -> None:
    given = parse(sys.argv[1:])
    experiment = Experiment(**pick(Experiment, given))
    options = Generation(**pick(Generation, given))
    filter = given.get("filter", "zero_shot")
    _, task = experiment.load()
    for note in task.notes:
        print(f"note: {note}")
    default = default_folder(given.get("out", "runs"), experiment, options.plan, filter)
    folder = Path(given.get("synthetic", default))
    generate(experiment, task, options, filter, folder, given.get("stage", "all"))


def generate(
    experiment: Experiment,
    task: Task,
    options: Generation,
    filter: str,
    folder: Path,
    stage: str = "all",
) -> Manifest:
    """Make the images that `folder` lacks. filter: "zero_shot" or the folder of a run."""
    demo = experiment.dataset == "demo"
    options = replace(
        options,
        captioner=options.captioner or ("demo" if demo else LLAVA),
        painter=options.painter or ("demo" if demo else STABLE_DIFFUSION),
        prompt=options.prompt or f"A realistic {experiment.template.removeprefix('a ')}",
    )
    names, pictures = task.classnames, task.train.pictures
    judge = load_filter(filter, experiment, names)
    f1 = None
    if options.plan != "uniform":
        f1 = per_class(predict(judge.method, task.val), task.val.labels.cpu())[1] / 100
    counts = quotas(options.plan, options.per_class, len(names), f1, options.f1_threshold)
    settings = {
        **{key: getattr(experiment, key) for key in ("dataset", "classes", "shots", "seed")},
        "training_pictures": fingerprint(pictures),
        **{f.name: getattr(options, f.name) for f in fields(options) if f.name not in options.FREE},
        "filter": judge.name,
        "filter_revision": judge.revision,
        "classnames": names,
    }
    plan = {"per_class": options.per_class, "quotas": dict(zip(names, counts, strict=True))}
    plan["f1"] = None if f1 is None else dict(zip(names, f1.tolist(), strict=True))
    manifest = Manifest.start(folder, names, settings, plan)
    studio = Studio(manifest, pictures, options, options.prompt, experiment.seed)
    print(f"{folder}: {manifest.missing()} of {sum(counts)} images to make, filter {judge.name}")
    if single := [name for name, members in studio.members.items() if len(members) == 1]:
        print(
            f"note: {len(single)} classes have a single real picture, which is both captioned and "
            f"repainted: {', '.join(single[:5])}{', …' if len(single) > 5 else ''}"
        )

    if stage in ("all", "caption") and studio.captions_missing():
        captioner = (
            DemoCaptioner()
            if options.captioner == "demo"
            else Llava(options.captioner, options, experiment.device)
        )
        studio.caption(captioner)
        del captioner  # before the painter comes: they need not fit in memory together
        print(f"captions: {len(manifest.captions)}, {peak_memory_mb():,.0f} MB at peak")
    if stage in ("all", "filter"):
        studio.filter(judge)  # what an earlier --stage diffuse left
    if stage in ("all", "diffuse") and manifest.missing():
        if stage == "diffuse" and studio.captions_missing():
            raise UserError(f"{folder}: captions are missing; run --stage caption first")
        painter = (
            DemoPainter(options.strength)
            if options.painter == "demo"
            else Diffusion(options.painter, options, experiment.device)
        )
        studio.paint(painter, judge if stage == "all" else None)
        print(f"images: {len(manifest.attempts)}, {peak_memory_mb():,.0f} MB at peak")
    if stage in ("all", "filter"):
        print(table(manifest))
        names = [studio.source(i) for i in range(len(pictures))]
        contact_sheet(manifest, pictures, names, folder / "contact_sheet.png")
        print(f"contact sheet: {folder / 'contact_sheet.png'}")
    if stage == "filter" and manifest.missing():
        print(f"{manifest.missing()} images are still missing: run --stage diffuse again")
    return manifest


def load_filter(name: str, experiment: Experiment, classnames: list[str]) -> Filter:
    """Zero-shot CLIP, or the method of a run, to choose among `classnames`; with its own CLIP."""
    clip = weights.load(experiment.model, experiment.device)
    if name == "zero_shot":
        method = METHODS[name](clip, classnames, experiment.template, Settings())
        return Filter(method, name, weights.fingerprint(clip))
    run = Run.open(Path(name))
    check_model(run, clip)
    try:
        method_class = METHODS[nearest("--filter: method", run.config["method"], METHODS)]
        settings = method_class.Settings(**run.config["settings"])
        learned = run.config["classnames"].get("base") or run.config["classnames"]["all"]
        template = run.config["experiment"]["template"]
    except (KeyError, TypeError) as error:
        raise UserError(f"--filter {name}: config.json is not that of a run ({error})") from None
    method = method_class(clip, learned, template, settings)
    state = run.load_adapter()
    method.load_adapter(state)
    if learned != classnames:
        method = method.for_classes(classnames)
    revision = cache.key(*(state[key] for key in sorted(state)))
    return Filter(method, run.config["method"], revision[:16])


def add_synthetic(settings: DISEFSettings, experiment: Experiment, task: Task, out: Path, filter):
    """-> settings, training pictures with synthetic ones among them, and a summary of these.

    On the demo task, images that are missing are made. For other data sets they must be there.
    filter: "zero_shot" or the folder of a run, by which they are made.
    """
    options = Generation(per_class=settings.per_class, plan=settings.plan, batch_size=64)
    default = default_folder(out, experiment, settings.plan, settings.filter)
    folder = Path(settings.synthetic or default)
    if experiment.dataset == "demo":
        manifest = generate(experiment, task, options, filter, folder)
    else:
        manifest = finished(folder, experiment, task, settings)
    chosen = manifest.chosen()
    labels = torch.tensor([task.classnames.index(a.classname) for a in chosen], dtype=torch.int64)
    train = task.train
    if chosen:
        pictures = Pictures([folder / attempt.image for attempt in chosen], labels)
        pictures, pixels, _ = read(pictures, train.pixels.shape[-1], folder=train.folder)
        train = train.join(Batches(pictures, pixels, train.device, train.folder))
    summary = {
        "folder": str(folder),
        "images": len(chosen),
        "attempts": len(manifest.attempts),
        "seconds": sum(manifest.seconds.values()),
    }
    return replace(settings, synthetic=str(folder)), train, summary


def finished(folder: Path, experiment: Experiment, task: Task, settings: DISEFSettings) -> Manifest:
    """The books of a folder with all its images, made from this task's training pictures."""
    root = f"--data-root {experiment.data_root} " if experiment.data_root else ""
    command = (
        f"python generate.py --dataset {experiment.dataset} {root}--model {experiment.model} "
        f"--shots {experiment.shots} --seed {experiment.seed} --classes {experiment.classes} "
        f"--plan {settings.plan} --synthetic {folder}"
    )
    if not (folder / "settings.json").exists():
        raise UserError(f"{folder}: there are no synthetic images yet; make them first: {command}")
    manifest = Manifest.open(folder)
    mine = {"training_pictures": fingerprint(task.train.pictures), "classnames": task.classnames}
    for key in ("dataset", "classes", "shots", "seed"):
        mine = {key: getattr(experiment, key), **mine}
    manifest.check(mine)
    if missing := manifest.missing():
        raise UserError(f"{folder}: {missing} images are still to be made; first run: {command}")
    return manifest


def default_folder(out: str | Path, experiment: Experiment, plan: str, filter: str) -> Path:
    """Beside the runs: OUT/DATASET/MODEL/synthetic_PLAN_FILTER-sSHOTS-seedSEED."""
    method = filter if filter in METHODS else Path(filter).resolve().name.split("-s")[0]
    return Path(out) / experiment.folder(f"synthetic_{plan}_{method}")


def parse(argv: list[str]) -> dict:
    parser = Parser(description=__doc__)
    group = parser.add_argument_group("run")
    group.add_argument("--filter", help="zero_shot, or a run of train.py: what keeps images")
    group.add_argument("--stage", choices=STAGES, help="do one of the stages alone [all]")
    group.add_argument("--synthetic", metavar="DIR", help="folder of the images [in --out]")
    group.add_argument("--out", help="folder that run folders are made in [runs]")
    add_flags(parser.add_argument_group("images"), Generation)
    add_flags(parser.add_argument_group("experiment"), Experiment)
    return parser.parse(argv)


if __name__ == "__main__":
    run_script(main)

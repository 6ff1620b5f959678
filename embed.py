"""Compute image features of any number of pictures.

python embed.py --data photos --model ViT-B/16 --out features
python embed.py --data shards --model ViT-B/16 --out features    WebDataset's .tar files
python embed.py --data list.csv --model demo --out features      rows of path,label
torchrun --nproc-per-node 8 embed.py …                           each process makes its own shards

After a kill, the same command continues. Methods that learn on features can learn from the result:
python train.py --method linear_probe --dataset features --data-root features
"""

import sys
import time
from collections import Counter
from pathlib import Path

# Before torch: clip_min sets how threads wait.
from clip_min import UserError, weights  # isort: skip

from fewshot import ranks, shards
from fewshot.experiment import BLIND, Experiment, peak_memory_mb, run_script
from fewshot.flags import Parser, add_flags, pick

READ = ("model", "image_size", "device", "precision", "threads")


def main() -> None:
    given = parse(sys.argv[1:])
    source, folder = Path(given["data"]).expanduser(), Path(given["out"]).expanduser()
    if not source.exists():
        raise UserError(f"--data {source}: there is no such file or folder")
    experiment = Experiment(**{"dataset": "folder", **pick(Experiment, given)})
    with ranks.first_alone():  # it downloads missing files
        clip = weights.load(experiment.model, experiment.device, image_size=experiment.image_size)
    experiment.prepare(clip)
    if experiment.model == "demo":
        print(f"note: {BLIND}")
    config = {
        "data": str(source),
        "model": experiment.model,
        "fingerprint": weights.fingerprint(clip),
        "image_size": experiment.image_size,
        "precision": experiment.precision,
        "batch_size": given.get("batch_size", 64),
    }
    made = shards.Shards(folder, config, given.get("shard_size", 4096))
    started = time.perf_counter()
    left_out: Counter[str] = Counter()
    items = shards.items(source, left_out)
    count = shards.embed(clip, items, made, config["batch_size"], experiment.precision)
    seconds, count = time.perf_counter() - started, sum(ranks.together(count))
    if ranks.rank:
        return
    others = ", ".join(f"{number:,} {what}" for what, number in left_out.items())
    if not any(folder.glob("[0-9]*.safetensors")):
        besides = f" (but {others})" if others else ""
        raise UserError(
            f"--data {source}: holds no pictures{besides}; give a folder or list with some"
        )
    made.keep_names(source)
    index = made.finish()
    before = index["features"] + len(index["unreadable"]) - count
    print(
        f"{count:,} pictures in {seconds:.1f} s, {count / seconds:,.0f} a second, "
        f"{peak_memory_mb():,.0f} MB at peak" + (f"; {before:,} were there" if before else "")
    )
    for _, why in index["unreadable"][:5]:
        print(f"note: {why}")
    if len(index["unreadable"]) > 5:
        print(f"note: {len(index['unreadable'])} pictures could not be read; index.json lists them")
    if others:
        print(f"note: left out {others}")
    print(f"{index['features']:,} features: {folder / 'index.json'}")


def parse(argv: list[str]) -> dict:
    parser = Parser(description=__doc__)
    parser.add_argument("--data", help="a folder of pictures or .tar files, or a .tar or .csv file")
    parser.add_argument("--out", help="folder for the features")
    parser.add_argument("--batch-size", type=int, help="pictures in a batch [64]")
    parser.add_argument("--shard-size", type=int, help="pictures in a file of features [4096]")
    add_flags(parser.add_argument_group("model"), Experiment, only=READ)
    given = parser.parse(argv)
    for name in ("data", "out"):
        if name not in given:
            raise UserError(f"--{name} is missing; see --help")
    for name in ("batch_size", "shard_size"):
        if given.get(name, 1) < 1:
            raise UserError(f"--{name.replace('_', '-')} {given[name]}: expected 1 or more")
    return given


if __name__ == "__main__":
    run_script(main, shared=True)

"""The folder of a run that nobody trained, with every file a report reads: answers at random."""

import json
from pathlib import Path

import torch

from clip_min.files import write_json, write_safetensors
from fewshot import predictions
from fewshot.predictions import ZERO_SHOT, Predictions
from fewshot.record import summary

# Names of classes that must stay text.
HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "\"'`&amp;<!--",
    "🌹 rosé",
    "وردة حمراء",
    "x" * 300,
    "a\x00b\x1b\ud800c",
    "$\\frac{1}{0}$ ${7*7}",
]


def answers(
    classnames: dict[str, list[str]], each: int, seed: int, sure: float = 2.0
) -> dict[str, Predictions]:
    """Random answers to `each` pictures of each class, right the more often the larger `sure`."""
    rng, found, first = torch.Generator().manual_seed(seed), {}, 0
    total = sum(map(len, classnames.values()))
    for part, names in classnames.items():
        labels = torch.arange(len(names)).repeat_interleave(each)  # (N,)
        logits = torch.randn(len(labels), total, generator=rng)  # (N, K)
        logits[torch.arange(len(labels)), first + labels] += sure
        rows = []
        for some in (logits[:, first : first + len(names)], logits):
            top = some.topk(min(5, some.shape[1]), dim=1).indices
            rows += [top.int(), some.softmax(1).gather(1, top)]
        joint = rows[2:] if len(classnames) > 1 else (None, None)
        found[part] = Predictions(labels.int(), *rows[:2], *joint)
        first += len(names)
    return found


def make(
    path: Path,
    classnames: dict[str, list[str]],
    each: int = 4,
    seed: int = 1,
    method: str = "lora",
    sure: float = 3.0,
    **changes,
) -> Path:
    """changes: of the experiment."""
    path.mkdir(parents=True)
    before, after = (answers(classnames, each, seed + k, s) for k, s in ((50, 1.5), (0, sure)))
    learned = classnames.get("base") or classnames["all"]
    record = {
        "train": [[f"train/{k}-{i}.jpg", name, f"a{k}-{i}"] for k, name in enumerate(learned)
                  for i in range(2)],
        "val": [[f"val/{k}.jpg", name, f"b{k}"] for k, name in enumerate(learned)],
        "test": [[f"test/{part}{k}-{i}.jpg", name, f"c{part}{k}-{i}"]
                 for part, names in classnames.items()
                 for k, name in enumerate(names) for i in range(each)],
    }  # fmt: skip
    config = {
        "method": method,
        "recipe": "default",
        "settings": {"lr": 0.001, "epochs": 3, "keep": "latest-best"},
        "experiment": {
            "dataset": "folder", "data_root": "/nowhere/pictures", "model": "ViT-B/16",
            "shots": 2, "seed": seed, "classes": "base-novel", "template": "a {}.", **changes,
        },
        "model": "ViT-B/16",
        "fingerprint": "0" * 16,
        "classnames": classnames,
        "data": summary(record),
        "argv": ["train.py", "--method", method],
        "versions": {"torch": "2.x"},
        "commit": None,
    }  # fmt: skip
    log = [
        {"step": 10 * n, "epoch": n, "loss": 1 / n, "val": val, "seconds": float(n)}
        for n, val in ((1, 50.0), (2, 75.0), (3, 75.0), (4, 60.0))
    ]
    scores, zero = (predictions.score(found, classnames) for found in (after, before))
    brief = {key: zero[key] for key in ("base", "novel", "hm", "all", "joint")}
    cost = {"parameters": 1234, "seconds": 4.5 * seed, "peak_memory_mb": 678.9}
    results = {**scores, "zero_shot": brief, "steps": 40, "train": 93.75, "val": 75.0, **cost}
    write_json(path / "config.json", config)
    (path / "data.json").write_text(json.dumps(record))
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    write_json(path / "results.json", results)
    rows = predictions.tensors({ZERO_SHOT: before, method: after})
    write_safetensors(path / predictions.FILE, rows)
    return path

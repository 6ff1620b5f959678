"""What CoCoOp costs: ours (one PromptTree per image) beside the published way (K full prompts).

    python bench/cocoop_step.py [--classes 10,51,102,397,1000] [--batch 1,8,32] [--plot FILE.png]

Both use ViT-B/16 with the same random weights, and cached image features, so that only the
difference between the methods is measured. The published way is rebuilt on openai-clip's own text
tower: for one image after another, K prompts of 77 tokens. A step is forward, backward and AdamW.
Memory is the peak of a fresh process above its memory before the first step. Cases that would not
fit into this machine's memory, or would take over two minutes a step (ours: one minute of
arithmetic alone), are skipped, with the estimate. Needs the `test` extra.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import clip as openai_clip
import torch
import torch.nn.functional as F
from side_by_side import first_step_mb, products, relative, seconds, show
from torch import nn

from clip_min import CLIP, CONFIGS, CLIPConfig, tokenize
from methods.cocoop import CoCoOp, CoCoOpSettings

ADJECTIVES = [
    "red",
    "pink",
    "white",
    "yellow",
    "tall",
    "wild",
    "giant",
    "dwarf",
    "spotted",
    "striped",
]
NOUNS = [
    "rose",
    "lily",
    "iris",
    "daisy",
    "poppy",
    "tulip",
    "orchid",
    "dahlia",
    "marigold",
    "bluebell",
    "foxglove",
]
PLACES = [
    "valley",
    "alpine",
    "desert",
    "garden",
    "swamp",
    "forest",
    "canyon",
    "island",
    "meadow",
    "river",
]


def classnames(count: int) -> list[str]:
    """Names of one to three words, like real ones: "rose", "red rose", "red valley rose", …"""
    names = list(NOUNS)
    names += [f"{a} {n}" for a in ADJECTIVES for n in NOUNS]
    names += [f"{a} {p} {n}" for a in ADJECTIVES for p in PLACES for n in NOUNS]
    return names[:: max(1, len(names) // count)][:count]


class Published(nn.Module):
    """CoCoOp as its paper's code computes it, on openai-clip's text tower."""

    def __init__(self, ours: CoCoOp):
        super().__init__()
        config: CLIPConfig = ours.clip.config
        self.text = openai_clip.model.CLIP(
            config.embed_dim, 32, 1, 64, 32, 77, 49408, 512, 8, config.text_layers
        ).requires_grad_(False)
        state = {n.replace("in_proj.", "in_proj_"): t for n, t in ours.clip.state_dict().items()}
        self.text.load_state_dict(
            {n: t for n, t in state.items() if "visual" not in n}, strict=False
        )
        texts = [f"X X X X {name}." for name in ours.classnames]
        tokens = tokenize(texts)  # (K, 77)
        embedded = self.text.token_embedding(tokens)  # (K, 77, D)
        self.start, self.rest = embedded[:, :1], embedded[:, 5:]  # around the context
        self.ends = tokens.argmax(dim=-1)  # (K,)
        self.context = nn.Parameter(ours.context.detach().clone())
        self.meta_net = nn.Sequential(nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 512))
        self.meta_net.load_state_dict(ours.meta_net.state_dict())

    def classify(self, features):  # (B, E) -> (B, K)
        features = F.normalize(features, dim=-1)
        contexts = self.context + self.meta_net(features).unsqueeze(1)  # (B, 4, D)
        logits = []
        for feature, context in zip(features, contexts, strict=True):
            context = context.expand(len(self.rest), -1, -1)  # (K, 4, D)
            x = torch.cat([self.start, context, self.rest], dim=1)  # (K, 77, D)
            x = (x + self.text.positional_embedding).permute(1, 0, 2)  # (77, K, D)
            x = self.text.ln_final(self.text.transformer(x).permute(1, 0, 2))  # (K, 77, D)
            x = x[torch.arange(len(x)), self.ends] @ self.text.text_projection  # (K, E)
            logits.append(self.text.logit_scale.exp() * feature @ F.normalize(x, dim=-1).T)
        return torch.stack(logits)


def build(classes: int, batch: int):
    """-> ours, published, features (B, E), labels (B,)."""
    torch.manual_seed(0)
    full = CONFIGS["ViT-B/16"]
    # Features are given, so the image tower can be tiny; the text tower is ViT-B/16's.
    config = CLIPConfig(512, 32, 32, 64, 1, 1, full.text_width, full.text_layers, full.text_heads)
    clip = CLIP(config)
    ours = CoCoOp(clip, classnames(classes), "a photo of a {}.", CoCoOpSettings())
    return ours, Published(ours), torch.randn(batch, 512), torch.arange(batch) % classes


def stepper(model: nn.Module, features, labels):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model.classify(features), labels).backward()
        optimizer.step()

    return step


def peak_mb(way: str, classes: int, batch: int) -> float:
    """Peak memory of one step in a fresh process."""
    command = [sys.executable, "-W", "ignore", __file__, "--measure", way]
    command += ["--classes", str(classes), "--batch", str(batch)]
    return float(subprocess.check_output(command, text=True).split()[-1])


def measure(way: str, classes: int, batch: int) -> None:
    """In a fresh process: print the MB by which a first step raises the resident memory."""
    ours, published, features, labels = build(classes, batch)
    step = stepper(ours if way == "ours" else published, features, labels)
    print(first_step_mb(step))


def available_mb() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))  # KiB
    return free * 1024 / 1e6


def compare(classes: int, batch: int, rounds: int, unit: dict, rate: float) -> dict:
    """A row of the table. `unit`: measured MB and seconds per prompt of the published way."""
    ours, published, features, labels = build(classes, batch)
    row = {"classes": classes, "batch": batch, "tokens": batch * len(ours.prompts)}
    if (least := floor(row["tokens"], rate)) > 60:
        return {
            **row,
            "skipped": f"both skipped: ours takes {least:.0f} s a step at the very least",
        }
    needs, takes = (unit[k] * classes * batch for k in ("mb", "seconds"))
    skip = ""
    if needs > 0.8 * available_mb():
        skip = f"published skipped: needs about {needs / 1e3:.0f} GB"
    elif takes > 120:
        skip = f"published skipped: about {takes:.0f} s a step"
    ways = {"ours": ours} if skip else {"ours": ours, "published": published}
    memory = {name: peak_mb(name, classes, batch) for name in ways}  # before this grows
    logits = {}
    for name, model in ways.items():
        logits[name] = model.classify(features)
        F.cross_entropy(logits[name], labels).backward()
    if not skip:
        pairs = list(zip(_learned(ours), _learned(published), strict=True))
        row["max_logit_diff"] = relative(logits["ours"], logits["published"])
        row["max_grad_diff"] = max(relative(a.grad, b.grad) for a, b in pairs)
    del logits
    steps = {name: stepper(model, features, labels) for name, model in ways.items()}
    step = seconds(steps, rounds)

    def predict(model):
        with torch.no_grad():
            model.classify(features)

    tests = seconds({n: lambda m=m: predict(m) for n, m in ways.items()}, rounds)
    for name in ways:
        row[f"{name} s/step"], row[f"{name} MB"] = step[name], memory[name]
        row[f"{name} images/s tested"] = batch / tests[name]
    if not skip:
        row["speedup"] = step["published"] / step["ours"]
        row["memory_ratio"] = memory["published"] / memory["ours"]
        unit |= {"mb": memory["published"] / classes / batch}
        unit |= {"seconds": step["published"] / classes / batch}
    row["skipped"] = skip
    return row


def _learned(model) -> list:
    return [model.context, *model.meta_net.parameters()]


def floor(tokens: int, rate: float) -> float:
    """Seconds for the minimal arithmetic of a step, at `rate` operations a second.

    tokens x parameters of the text tower's blocks x 2 operations x 2 (forward, and backward to the
    inputs); the rate is that of a large matrix product, by the faster of two libraries.
    """
    config = CONFIGS["ViT-B/16"]
    parameters = config.text_layers * 12 * config.text_width**2
    return tokens * parameters * 4 / rate


def save_plot(rows: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    single = [row for row in rows if row["batch"] == min(r["batch"] for r in rows)]
    for axis, column, label in zip(
        axes, ("s/step", "MB"), ("seconds", "peak memory, MB"), strict=True
    ):
        for way in ("published", "ours"):
            shown = [row for row in single if f"{way} {column}" in row]
            x = [row["classes"] for row in shown]
            axis.plot(x, [row[f"{way} {column}"] for row in shown], marker="o", label=way)
        axis.set(xscale="log", yscale="log", xlabel="classes", ylabel=f"{label} a training step")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend()
    figure.suptitle(f"CoCoOp, ViT-B/16, batch {single[0]['batch']}")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--classes", default="10,51,102,397,1000")
    parser.add_argument("--batch", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", metavar="FILE.png", help="cost against the number of classes")
    parser.add_argument("--measure", choices=("ours", "published"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    classes = [int(k) for k in flags.classes.split(",")]
    batches = [int(b) for b in flags.batch.split(",")]
    if flags.measure:
        measure(flags.measure, classes[0], batches[0])
        return
    rate = 2 * 2048**3 / min(seconds(products(2048), 5).values())
    unit = {"mb": 40.0, "seconds": 0.05}  # per prompt, until measured on this machine
    rows = [compare(k, b, flags.rounds, unit, rate) for b in batches for k in classes]
    for row in rows:
        if "ours s/step" in row:
            row["share of floor"] = floor(row["tokens"], rate) / row["ours s/step"]
    columns = dict.fromkeys(name for row in rows for name in row)
    rows = [{name: row.get(name) for name in columns} for row in rows]
    if flags.plot:
        save_plot([{k: v for k, v in row.items() if v is not None} for row in rows], flags.plot)
    show("CoCoOp, ViT-B/16, cached features", rows)


if __name__ == "__main__":
    main()

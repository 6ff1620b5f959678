"""The length of training, and the learning rate of each gradient step."""

import math
import time
from dataclasses import dataclass

import torch

from fewshot.batches import Batches
from fewshot.metrics import predict


@dataclass(frozen=True)
class Length:
    """The length of training in gradient steps."""

    epoch: int  # steps of a pass over the training images
    total: int
    round: int  # steps between validations, at which the state for resuming is saved
    chooses: bool  # is validation needed for a decision?
    switch: int = 0  # first step of a second stage, at which the schedule restarts

    @classmethod
    def of(cls, s, train: Batches, first_stage: float | None = None) -> "Length":
        """The length for the settings `s` on these training images. first_stage: the share of all
        steps before a method's second stage, if it has one.
        """
        images = max(len(part) for part in train.drawn)
        epoch = max(1, images // s.batch_size if s.drop_last else math.ceil(images / s.batch_size))
        total = max(s.steps_per_shot * train.shots or s.epochs * epoch, s.min_steps)
        every = math.ceil(total / s.validations) if s.validations else epoch
        chooses = "best" in s.keep or s.patience > 0
        return cls(epoch, total, max(1, every), chooses, int((first_stage or 0) * total))

    def place(self, step: int) -> str:
        """A position in words: "epoch 3", or "step 120", if rounds are not epochs."""
        return f"epoch {step // self.epoch}" if self.round == self.epoch else f"step {step}"


def announce(s, train: Batches, val: Batches, length: Length, done: int) -> str:
    """The remaining gradient steps and validations, in a line."""
    left = length.total - done
    sizes = [len(part) for part in train.drawn]
    images = len(sizes) * min(s.batch_size, max(sizes))  # those of a smaller group repeat
    text = f"{left} gradient steps of {images} images, "
    passes = left / length.epoch
    text += f"{passes:,.{1 if passes < 10 else 0}f} passes over {max(sizes)}"
    if length.chooses:
        text += f"; {math.ceil(left / length.round)} validations on {len(val)} images"
    return text


def duration(seconds: float) -> str:
    """40 -> "40 s", 400 -> "7 min", 40000 -> "11.1 h"."""
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def learning_rate(s, length: Length, step: int, factor: float = 1.0) -> float:
    """The learning rate of a step: a warmup, then half a cosine from `factor`·`lr` to `min_lr`.

    Time is counted in steps or, with schedule "epoch", in epochs, and restarts in a second stage.
    The warmup is

        constant       as in CoOp's code: the cosine starts later, keeps its length, and is cut off
        proportional   as in cross-modal's code: the same with a rise from 0; the first step has
                       `warmup_lr`
        linear         as in VPT's code: the cosine fills the remaining time
    """
    start, end = (0, length.switch) if step < length.switch else (length.switch, length.total)
    now, end = step - start, end - start
    if s.schedule == "step":
        warm = s.warmup_steps or s.warmup_epochs * length.epoch
    else:
        now, end = now // length.epoch, math.ceil(end / length.epoch)
        warm = s.warmup_epochs
    peak = factor * s.lr
    if now < warm:
        share = now / warm
        if s.warmup == "proportional":
            return share * peak or s.warmup_lr  # the first step, with share 0
        return s.warmup_lr + (share * (peak - s.warmup_lr) if s.warmup == "linear" else 0)
    progress = (now - warm) / (end - warm if s.warmup == "linear" else end)
    return s.min_lr + (peak - s.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def curve(train: Batches, val: Batches) -> Batches:
    """The training images whose accuracy is logged beside that of validation: few, as it takes time
    and decides nothing.
    """
    return train.some(min(len(val), 100))


def seconds_left(
    method, train: Batches, val: Batches, length: Length, done: int, step: float
) -> float:
    """The remaining seconds, if a step takes `step` seconds."""
    left = length.total - done
    if not length.chooses:
        return left * step
    each = validation_seconds(method, val)
    images = len(curve(train, val)) + len(val)
    return left * step + math.ceil(left / length.round) * images * each


def validation_seconds(method, val: Batches) -> float:
    """Seconds for each validation image, measured on a batch."""
    some = val.part(torch.arange(min(64, len(val))))
    predict(method, some)  # the first one is slower
    started = time.perf_counter()
    predict(method, some)
    return (time.perf_counter() - started) / len(some)

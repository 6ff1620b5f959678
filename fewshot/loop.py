"""The gradient loop: AdamW or SGD, cosine, early stopping on validation, a way back after a kill.

It is handed a method and knows nothing of what the method is: it lowers `method.loss` by changing
the tensors of `method.adapter_state()`. Training is a number of gradient steps, in rounds: a round
ends with a validation, and is an epoch, or the share of all steps that `validations` asks for. The
tensors of the round with the best validation accuracy are kept or, where a paper does without
validation, those of the last.
"""

import math
import time
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from clip_min import UserError
from clip_min.errors import first_line
from fewshot.batches import Batches
from fewshot.metrics import accuracy, predict
from fewshot.run import Run


@dataclass(frozen=True)
class Length:
    """How long training is, counted in gradient steps."""

    epoch: int  # in one pass over the training images
    total: int
    round: int  # between two validations; the state to resume from is saved then, too
    chooses: bool  # does validation decide anything? else there is none

    @classmethod
    def of(cls, s, train: Batches) -> "Length":
        """The length that settings `s` ask for, on these training images."""
        fewest = min(len(part) for part in train.drawn)
        epoch = max(1, fewest // s.batch_size if s.drop_last else math.ceil(fewest / s.batch_size))
        total = s.steps_per_shot * train.shots or max(s.epochs * epoch, s.min_steps)
        rounds = math.ceil(total / s.validations) if s.validations else epoch
        return cls(epoch, total, max(1, rounds), s.keep != "last" or s.patience > 0)

    def place(self, step: int) -> str:
        """For people: "epoch 3", or, where rounds are not epochs, "step 120"."""
        return f"epoch {step // self.epoch}" if self.round == self.epoch else f"step {step}"


def descend(
    method, train: Batches, val: Batches, run: Run, seed: int, resume: bool = False
) -> float:
    """Train `method` on `train`, leave it with its tensors of the best round on `val`, or the last.

    Everything random follows from `seed` and, for dropout and augmentation, from torch's global
    generator, whose state is saved with each round: a resumed run ends in the same bits. Returns
    the seconds of all rounds, those before a kill included. Where the settings have a grid, all of
    this is `search`'s.
    """
    s = method.settings
    if s.grid:
        return search(method, train, val, run, seed)
    learned = method.adapter_state()
    trained = {name: tensor for name, tensor in learned.items() if tensor.requires_grad}
    optimizer = new_optimizer(s, trained, method.no_weight_decay)
    length = Length.of(s, train)
    # fp16 has no small numbers: the loss is multiplied so that gradients do not vanish.
    scaler = torch.amp.GradScaler(train.device.type, enabled=train.precision == "fp16")

    kept = copies(learned)  # not views
    at = {"step": 0, "best_val": -1.0, "best_step": 0, "waited": 0, "seconds": 0.0, "stopped": ""}
    if resume and (saved := run.load_resume(at)):
        tensors, at = saved
        try:
            _check_shapes(tensors, learned, optimizer)
            kept = _restore(tensors, learned, optimizer)
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{run.path}/resume.safetensors: holds other tensors than this run's "
                f"({first_line(error)}); start it anew, without --resume"
            ) from None
        scaler.load_state_dict(at.get("scaler", {}))
    if at["step"] < length.total and not at["stopped"]:
        print(announce(s, train, val, length, at["step"]))
    third = at["step"] + 2  # timed: the first ones also read and encode what is then kept
    bar = tqdm(total=length.total, initial=at["step"], unit="step", disable=None)
    while at["step"] < length.total and not at["stopped"]:
        started, losses = time.perf_counter(), []
        method.train()
        for step in range(at["step"], min(at["step"] + length.round, length.total)):
            if step == third:
                begun = time.perf_counter()
            epoch, i = divmod(step, length.epoch)
            if i == 0 or not losses:
                batches = shuffled(train, s.batch_size, _generator(seed, epoch))
            if s.schedule == "step":
                warm = s.warmup_steps or s.warmup_epochs * length.epoch
                lr = learning_rate(s, step, length.total, warm)
            else:
                lr = learning_rate(
                    s, epoch, math.ceil(length.total / length.epoch), s.warmup_epochs
                )
            for group in optimizer.param_groups:
                group["lr"] = lr
            method.step = step
            with train.autocast():
                inputs = train.inputs(method, batches[i], s.augment)
                loss = method.loss(inputs, *train.targets(batches[i]))
            if not loss.isfinite():
                at["stopped"] = f"loss was {loss.item()} in step {step + 1}"
                break
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if s.clip_norm:
                scaler.unscale_(optimizer)
                clip_grad_norm_(trained.values(), s.clip_norm)
            try:
                scaler.step(optimizer)  # leaves out a step whose gradient is not finite
            except RuntimeError as error:
                if "overflow" not in str(error):
                    raise
                raise UserError(
                    f"--lr {s.lr:g}: the weights are not finite after step {step + 1}; give less"
                ) from None
            scaler.update()
            losses.append(loss.item())
            bar.set_description(f"epoch {epoch + 1}")
            bar.set_postfix(loss=f"{losses[-1]:.3f}", best_val=f"{max(at['best_val'], 0):.1f}")
            bar.update()
            if step == third and length.total > 20:
                each = time.perf_counter() - begun
                seconds = seconds_left(method, val, length, step + 1, each)
                bar.write(f"about {duration(seconds)}")
                method.train()
        if at["stopped"]:
            break
        now = at["step"] + len(losses)
        judged = {}
        if length.chooses:
            logits = predict(method, val)
            if not logits.isfinite().all():  # the last step broke the weights; its loss was fine
                at["stopped"] = f"validation logits were not finite after {length.place(now)}"
                break
            judged["val"] = accuracy(logits, val.labels.cpu())
            better = judged["val"] > at["best_val"]
            if better or (s.keep == "latest-best" and judged["val"] == at["best_val"]):
                at |= {"best_val": judged["val"], "best_step": now}
            at["waited"] = 0 if better else at["waited"] + 1
            if at["waited"] and at["waited"] == s.patience:
                at["stopped"] = f"no better validation accuracy in {s.patience} validations"
        elif not all(tensor.isfinite().all() for tensor in learned.values()):
            at["stopped"] = f"weights were not finite after {length.place(now)}"
            break
        at["step"] = now
        if s.keep == "last" or at["best_step"] == now:
            kept = copies(learned)
            run.save_adapter(kept)
        at["seconds"] += time.perf_counter() - started
        mean = sum(losses) / len(losses)
        passes = round(now / length.epoch, 2)
        run.log_round(
            {"step": now, "epoch": passes, "loss": mean, **judged, "seconds": at["seconds"]}
        )
        if scaler.is_enabled():
            at["scaler"] = scaler.state_dict()
        run.save_resume(_snapshot(learned, kept, optimizer), at)
        shown = f"  val {judged['val']:6.2f}" if judged else ""
        bar.write(
            f"step {now:5d}/{length.total}  epoch {passes:5g}  loss {mean:7.4f}{shown}  "
            f"{at['seconds']:6.1f} s"
        )
    bar.close()
    if at["stopped"]:
        step = at["step"] if s.keep == "last" else at["best_step"]
        print(f"stopped: {at['stopped']}; {length.place(step)} is kept")
    method.load_adapter(kept)
    run.save_adapter(kept)
    method.eval()
    return at["seconds"]


def search(method, train: Batches, val: Batches, run: Run, seed: int) -> float:
    """`descend` with each point of the settings' grid; leave the tensors that are best on `val`.

    Of equally good points the first. Each starts from the same tensors and random state, as a run
    of its own in this one's folder, so that after a kill those before it are not trained again.
    """
    s, start = method.settings, copies(method.adapter_state())
    best, seconds = -1.0, 0.0
    for number, point in enumerate(s.points(), 1):
        name = " ".join(f"{key}={value:g}" for key, value in point.items())
        print(f"grid: {name}")
        method.settings = replace(s, grid="", **point)
        method.load_adapter(start)
        torch.manual_seed(seed)
        part = run.part(f"grid{number}", asdict(method.settings))
        seconds += descend(method, train, val, part, seed, resume=True)
        found = accuracy(predict(method, val), val.labels.cpu())
        print(f"grid: {name}: {found:.2f} % on validation")
        if found > best:
            best, chosen, kept, log = found, point, copies(method.adapter_state()), part.log
    method.settings = s
    method.load_adapter(kept)
    run.save_adapter(kept)
    for line in log:
        run.log_round({**line, "seconds": seconds, **chosen})  # of all points
    print("grid: kept is " + ", ".join(f"{key} {value:g}" for key, value in chosen.items()))
    return seconds


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def shuffled(train: Batches, size: int, generator: torch.Generator) -> list[Tensor]:
    """The batches of an epoch: numbers of the pictures, `size` of all that is drawn together."""
    orders = [part[torch.randperm(len(part), generator=generator)] for part in train.drawn]
    return [torch.cat(pair) for pair in zip(*(o.split(size) for o in orders), strict=False)]


def new_optimizer(s, trained: dict[str, Tensor], undecayed: tuple[str, ...]):
    """AdamW or SGD over `trained`; the tensors named in `undecayed` have no weight decay."""
    groups = [
        {"params": [t for name, t in trained.items() if (name in undecayed) == free], **decay}
        for free, decay in ((False, {"weight_decay": s.weight_decay}), (True, {"weight_decay": 0}))
    ]
    groups = [group for group in groups if group["params"]]
    if s.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=s.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=s.lr, eps=s.eps)


def announce(s, train: Batches, val: Batches, length: Length, done: int) -> str:
    """What is to come, in a line: gradient steps, and validations."""
    left = length.total - done
    sizes = [len(part) for part in train.drawn]
    text = f"{left} gradient steps of {sum(min(s.batch_size, size) for size in sizes)} images, "
    passes = left / length.epoch
    text += f"{passes:,.{1 if passes < 10 else 0}f} passes over {min(sizes)}"
    if length.chooses:
        text += f"; {math.ceil(left / length.round)} validations on {len(val)} images"
    return text


def seconds_left(method, val: Batches, length: Length, done: int, step: float) -> float:
    """What the rest takes, if one step takes `step` seconds; one batch of validation is tried."""
    left = length.total - done
    if not length.chooses:
        return left * step
    some = val.part(torch.arange(min(64, len(val))))
    predict(method, some)  # the first one is slower
    started = time.perf_counter()
    predict(method, some)
    each = (time.perf_counter() - started) / len(some)
    return left * step + math.ceil(left / length.round) * len(val) * each


def duration(seconds: float) -> str:
    """40 -> "40 s", 400 -> "7 min", 40000 -> "11.1 h"."""
    if seconds < 100:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def learning_rate(s, now: int, end: int, warm: int) -> float:
    """The rate at `now` of `end`, of which `warm` are the warm-up: all in epochs, or all in steps.

    constant, as CoOp's code has it: the cosine starts late and is cut off, as long as ever.
    proportional, as cross-modal's code has it: the same, but for a rise from 0, which the first
    rate itself is not.
    linear, as VPT's code has it: the cosine fills the time that is left.
    """
    if now < warm:
        share = now / warm
        if s.warmup == "proportional":
            return share * s.lr or s.warmup_lr  # of the first step, whose share is 0
        return s.warmup_lr + (share * (s.lr - s.warmup_lr) if s.warmup == "linear" else 0)
    length = end - warm if s.warmup == "linear" else end
    return cosine(s.lr, s.min_lr, (now - warm) / length)


def cosine(peak: float, end: float, progress: float) -> float:
    """Half a cosine from `peak` (progress 0) down to `end` (progress 1)."""
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * progress))


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * seed + epoch)


def _snapshot(learned: dict, kept: dict, optimizer) -> dict[str, Tensor]:
    """All tensors the next epoch depends on."""
    tensors = {f"learned/{name}": tensor for name, tensor in learned.items()}
    tensors |= {f"kept/{name}": tensor for name, tensor in kept.items()}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{i}/{key}": value for key, value in state.items()}
    tensors["random/cpu"] = torch.get_rng_state()
    device = next(iter(learned.values())).device
    if device.type == "cuda":  # else not even asked for: that alone takes memory on a GPU
        tensors["random/cuda"] = torch.cuda.get_rng_state(device)
    return tensors


def _check_shapes(tensors: dict[str, Tensor], learned: dict, optimizer) -> None:
    """ValueError, unless tensors that `_snapshot` gave are of this run."""
    trained = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    for name, tensor in tensors.items():
        kind, rest = name.split("/", 1)
        if kind == "random" or (kind == "optimizer" and tensor.dim() == 0):
            continue
        like = trained[int(rest.split("/")[0])] if kind == "optimizer" else learned[rest]
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}")


@torch.no_grad()
def _restore(tensors: dict[str, Tensor], learned: dict, optimizer) -> dict[str, Tensor]:
    """The reverse of `_snapshot`; returns the tensors that are kept."""
    state = optimizer.state_dict()
    for name, tensor in tensors.items():
        kind, rest = name.split("/", 1)
        if kind == "learned":
            learned[rest].copy_(tensor)
        elif kind == "optimizer":
            i, key = rest.split("/")
            state["state"].setdefault(int(i), {})[key] = tensor
    optimizer.load_state_dict(state)
    torch.set_rng_state(tensors["random/cpu"])
    device = next(iter(learned.values())).device
    if "random/cuda" in tensors and device.type == "cuda":
        torch.cuda.set_rng_state(tensors["random/cuda"], device)
    return {name: tensors[f"kept/{name}"].to(device) for name in learned}

"""The gradient loop: AdamW or SGD, cosine, early stopping on validation, a way back after a kill.

It is handed a method and knows nothing of what the method is: it lowers `method.loss` by changing
the tensors of `method.adapter_state()`, and keeps those of the epoch with the best validation
accuracy or, where a paper does without validation, of the last.
"""

import functools
import math
import time

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from clip_min import UserError
from clip_min.errors import first_line
from fewshot.images import Batches
from fewshot.metrics import accuracy, predict
from fewshot.run import Run


def descend(
    method, train: Batches, val: Batches, run: Run, seed: int, resume: bool = False
) -> float:
    """Train `method` on `train`, leave it with its tensors of the best epoch on `val`, or the last.

    Everything random follows from `seed` and, for dropout and augmentation, from torch's global
    generator, whose state is saved with each epoch: a resumed run ends in the same bits. Returns
    the seconds of all epochs, those before a kill included.
    """
    s = method.settings
    learned = method.adapter_state()
    trained = [tensor for tensor in learned.values() if tensor.requires_grad]
    make = {
        "adamw": functools.partial(torch.optim.AdamW, eps=s.eps),
        "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
    }
    optimizer = make[s.optimizer](trained, lr=s.lr, weight_decay=s.weight_decay)
    steps = math.ceil(len(train) / s.batch_size)  # in one epoch
    total = s.steps_per_shot * train.shots or s.epochs * steps
    epochs = math.ceil(total / steps)
    # fp16 has no small numbers: the loss is multiplied so that gradients do not vanish.
    scaler = torch.amp.GradScaler(train.device.type, enabled=train.precision == "fp16")

    kept = {name: tensor.detach().clone() for name, tensor in learned.items()}  # copies, not views
    at = {"epoch": 0, "best_val": -1.0, "best_epoch": 0, "seconds": 0.0, "stopped": ""}
    if resume and (saved := run.load_resume(at)):
        tensors, at = saved
        try:
            _check_shapes(tensors, learned, trained)
            kept = _restore(tensors, learned, optimizer)
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{run.path}/resume.safetensors: holds other tensors than this run's "
                f"({first_line(error)}); start it anew, without --resume"
            ) from None
        scaler.load_state_dict(at.get("scaler", {}))
    bar = tqdm(total=total, initial=at["epoch"] * steps, unit="step", disable=None)
    while at["epoch"] < epochs and not at["stopped"]:
        started = time.perf_counter()
        epoch, losses = at["epoch"], []
        method.train()
        order = torch.randperm(len(train), generator=_generator(seed, epoch))
        for i, chosen in enumerate(order.split(s.batch_size)):
            done = epoch * steps + i
            if done == total:
                break
            if s.schedule == "step":
                lr = learning_rate(s, done, total, s.warmup_epochs * steps)
            else:
                lr = learning_rate(s, epoch, epochs, s.warmup_epochs)
            for group in optimizer.param_groups:
                group["lr"] = lr
            with train.autocast():
                loss = method.loss(train.inputs(method, chosen, s.augment), *train.targets(chosen))
            if not loss.isfinite():
                at["stopped"] = f"loss was {loss.item()} in epoch {epoch + 1}"
                break
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if s.clip_norm:
                scaler.unscale_(optimizer)
                clip_grad_norm_(trained, s.clip_norm)
            try:
                scaler.step(optimizer)  # leaves out a step whose gradient is not finite
            except RuntimeError as error:
                if "overflow" not in str(error):
                    raise
                raise UserError(
                    f"--lr {s.lr:g}: the weights are not finite after step {done + 1}; give less"
                ) from None
            scaler.update()
            losses.append(loss.item())
            bar.set_description(f"epoch {epoch + 1}/{epochs}")
            bar.set_postfix(loss=f"{losses[-1]:.3f}", best_val=f"{max(at['best_val'], 0):.1f}")
            bar.update()
        if at["stopped"]:
            break
        logits = predict(method, val)
        if not logits.isfinite().all():  # the last step broke the weights, and its loss was fine
            at["stopped"] = f"validation logits were not finite after epoch {epoch + 1}"
            break
        at["epoch"] += 1
        val_accuracy = accuracy(logits, val.labels.cpu())
        if val_accuracy > at["best_val"]:
            at["best_val"], at["best_epoch"] = val_accuracy, at["epoch"]
        elif s.patience and at["epoch"] - at["best_epoch"] >= s.patience:
            at["stopped"] = f"no better validation accuracy in {s.patience} epochs"
        if s.keep == "last" or at["best_epoch"] == at["epoch"]:
            kept = {name: tensor.detach().clone() for name, tensor in learned.items()}
            run.save_adapter(kept)
        at["seconds"] += time.perf_counter() - started
        mean = sum(losses) / len(losses)
        run.log_epoch(
            {"epoch": at["epoch"], "loss": mean, "val": val_accuracy, "seconds": at["seconds"]}
        )
        if scaler.is_enabled():
            at["scaler"] = scaler.state_dict()
        run.save_resume(_snapshot(learned, kept, optimizer), at)
        bar.write(
            f"epoch {at['epoch']:3d}/{epochs}  loss {mean:7.4f}  val {val_accuracy:6.2f}  "
            f"{at['seconds']:6.1f} s"
        )
    bar.close()
    if at["stopped"]:
        epoch = at["best_epoch"] if s.keep == "best" else at["epoch"]
        print(f"stopped: {at['stopped']}; epoch {epoch} is kept")
    method.load_adapter(kept)
    run.save_adapter(kept)
    method.eval()
    return at["seconds"]


def learning_rate(s, now: int, end: int, warm: int) -> float:
    """The rate at `now` of `end`, of which `warm` are the warm-up: all in epochs, or all in steps.

    constant, as CoOp's code has it: the cosine starts late and is cut off, as long as ever.
    linear, as VPT's code has it: the cosine fills the time that is left.
    """
    if now < warm:
        return s.warmup_lr + (now / warm * (s.lr - s.warmup_lr) if s.warmup == "linear" else 0)
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


def _check_shapes(tensors: dict[str, Tensor], learned: dict, trained: list[Tensor]) -> None:
    """ValueError, unless tensors that `_snapshot` gave are of this run."""
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

"""The gradient loop: AdamW or SGD, cosine schedule, early stopping on validation, resuming.

The loop knows no method by name: it minimises `method.loss` over the tensors of
`method.adapter_state()`. Training is a number of gradient steps, divided into rounds. A round is an
epoch, or a share of all steps (`validations`), and ends with a validation and a checkpoint. The
result is the checkpoint with the best validation accuracy or, if a paper does without validation,
the last one, or the mean over all rounds.
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
from fewshot import ranks
from fewshot.batches import Batches
from fewshot.metrics import accuracy, accuracy_on, predict
from fewshot.run import Run
from fewshot.schedule import Length, announce, curve, duration, learning_rate, seconds_left


@dataclass
class Position:
    """The position of training after a round."""

    step: int = 0
    best_val: float = -1.0
    best_step: int = 0
    waited: int = 0  # validations in a row without improvement
    seconds: float = 0.0  # of all rounds, including those before a kill
    stopped: str = ""  # the reason, if training ended early


class State:
    """Everything that the next round depends on: saved after each round, and read after a kill."""

    def __init__(self, method, train: Batches):
        self.learned = method.adapter_state()
        # Copies: of the best round, the last, or the mean.
        self.kept = {name: tensor.detach().clone() for name, tensor in self.learned.items()}
        trained = {name: tensor for name, tensor in self.learned.items() if tensor.requires_grad}
        self.trained = list(trained.values())
        settings, undecayed = method.settings, method.no_weight_decay
        self.optimizer = new_optimizer(settings, trained, undecayed, method.lr_factors)
        # fp16 cannot represent small numbers: the loss is scaled so that gradients do not vanish.
        enabled = train.precision == "fp16"
        self.scaler = torch.amp.GradScaler(train.device.type, enabled=enabled)
        self.at = Position()

    def keep(self, share: float) -> None:
        """Keep the current tensors, or with `share` below 1, mix them into the mean."""
        for name, tensor in self.learned.items():
            now = tensor.detach().clone()
            mixed = share < 1 and now.is_floating_point()  # labels are not averaged
            self.kept[name] = self.kept[name].lerp(now, share) if mixed else now

    def save(self, run: Run) -> None:
        scaler = {"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}
        run.save_resume(self.tensors(), asdict(self.at) | scaler)

    def load(self, run: Run) -> None:
        """Continue from the last `save`, or from the start if there was none."""
        if (saved := run.load_resume(asdict(self.at))) is None:
            return
        tensors, position = saved
        try:
            self.restore(tensors)
        except (LookupError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{run.path}/resume.safetensors: its tensors do not fit this run "
                f"({first_line(error)}); start again without --resume"
            ) from None
        self.scaler.load_state_dict(position.pop("scaler", {}))
        self.at = Position(**position)

    def tensors(self) -> dict[str, Tensor]:
        tensors = {f"learned/{name}": tensor for name, tensor in self.learned.items()}
        tensors |= {f"kept/{name}": tensor for name, tensor in self.kept.items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{i}/{key}": value for key, value in state.items()}
        device = next(iter(self.learned.values())).device
        state = {"cpu": torch.get_rng_state()}
        if device.type == "cuda":  # asking for it takes memory on a GPU
            state["cuda"] = torch.cuda.get_rng_state(device)
        for rank, of in enumerate(ranks.together(state)):
            tensors |= {f"random/{kind}{rank or ''}": value for kind, value in of.items()}
        return tensors

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of `tensors`; ValueError or others, if they are another run's."""
        trained = [tensor for group in self.optimizer.param_groups for tensor in group["params"]]
        state = self.optimizer.state_dict()
        for name, tensor in tensors.items():
            kind, rest = name.split("/", 1)
            if kind == "optimizer":
                i, key = rest.split("/")
                state["state"].setdefault(int(i), {})[key] = tensor
            if kind == "random" or (kind == "optimizer" and tensor.dim() == 0):
                continue
            like = trained[int(i)] if kind == "optimizer" else self.learned[rest]
            if tensor.shape != like.shape or tensor.dtype != like.dtype:
                raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}")
            if kind == "learned":
                like.copy_(tensor)
        self.optimizer.load_state_dict(state)
        device = next(iter(self.learned.values())).device
        own = ranks.rank or ""  # a new rank has no saved state
        if own == "" or f"random/cpu{own}" in tensors:
            torch.set_rng_state(tensors[f"random/cpu{own}"])
        if f"random/cuda{own}" in tensors and device.type == "cuda":
            torch.cuda.set_rng_state(tensors[f"random/cuda{own}"], device)
        self.kept = {name: tensors[f"kept/{name}"].to(device) for name in self.learned}


class NotFinite(Exception):
    """The loss or the weights are not finite: this round is discarded, and training ends."""


def descend(
    method, train: Batches, val: Batches, run: Run, seed: int, resume: bool = False
) -> float:
    """Train `method` on `train`. Depending on its settings, it ends with the tensors of the best
    round on `val`, of the last round, or with their mean.

    Randomness comes from `seed` and, for dropout and augmentation, from torch's global generator,
    whose state is saved with each round, so that a resumed run ends with the same bits. Returns the
    seconds of all rounds, including those before a kill. If the settings have a grid, `search` runs
    instead.
    """
    s = method.settings
    if s.grid:
        return search(method, train, val, run, seed)
    if ranks.size > 1:
        ranks.agree(method.adapter_state().values())
        ranks.part_ways(seed)
    method.class_weights = train.class_weights(len(method.classnames)) if s.balance else None
    length, state = Length.of(s, train, method.first_stage), State(method, train)
    if resume:
        state.load(run)
    at = state.at
    if at.step < length.total and not at.stopped:
        print(announce(s, train, val, length, at.step))
        if ranks.size > 1 and not shareable(method):
            print(f"note: this loss is not a mean over images: all {ranks.size} processes do it")
    third = at.step + 2  # this one is timed: the first ones also read and encode
    bar = tqdm(total=length.total, initial=at.step, unit="step", disable=None)
    while at.step < length.total and not at.stopped:
        started, losses = time.perf_counter(), []
        method.train()
        try:
            for step in range(at.step, min(at.step + length.round, length.total)):
                begun = time.perf_counter()
                epoch, i = divmod(step, length.epoch)
                if i == 0 or not losses:
                    batches = shuffled(train, s.batch_size, seed, epoch)
                losses.append(gradient_step(method, train, batches[i], state, length, step))
                bar.set_description(f"epoch {epoch + 1}")
                bar.set_postfix(loss=f"{losses[-1]:.3f}", best_val=f"{max(at.best_val, 0):.1f}")
                bar.update()
                if step == third and length.total > 20:
                    each = time.perf_counter() - begun
                    left = seconds_left(method, train, val, length, step + 1, each)
                    bar.write(f"about {duration(left)}")
                    method.train()
            judged = judge(method, train, val, state, length, step + 1)
        except NotFinite as why:
            at.stopped = str(why)
            break
        at.step = step + 1
        if "best" not in s.keep or at.best_step == at.step:
            state.keep(share_of_mean(method, length, at.step) if s.keep == "mean" else 1)
            run.save_adapter(state.kept)
        at.seconds += time.perf_counter() - started
        mean, passes = sum(losses) / len(losses), round(at.step / length.epoch, 2)
        line = {"step": at.step, "epoch": passes, "loss": mean, **judged, "seconds": at.seconds}
        run.log_round(line)
        state.save(run)
        shown = f"  val {judged['val']:6.2f}" if judged else ""
        bar.write(
            f"step {at.step:5d}/{length.total}  epoch {passes:5g}  loss {mean:7.4f}{shown}  "
            f"{at.seconds:6.1f} s"
        )
    bar.close()
    if at.stopped:
        kept = length.place(at.best_step if "best" in s.keep else at.step)
        print(f"stopped: {at.stopped}; {'the mean to ' if s.keep == 'mean' else ''}{kept} is kept")
    if not at.step:
        why = "not one round of training ended; give a smaller --lr" if at.stopped else "0 steps"
        print(f"note: nothing was learned: {why}")
    method.load_adapter(state.kept)
    run.save_adapter(state.kept)
    method.eval()
    return at.seconds


def gradient_step(
    method, train: Batches, chosen: Tensor, state: State, length: Length, step: int
) -> float:
    """A gradient step on the pictures `chosen` -> the loss before it."""
    s, optimizer, scaler = method.settings, state.optimizer, state.scaler
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(s, length, step, group["factor"])
    method.step = step
    if step == length.switch and method.first_stage is not None:
        method.second_stage()  # the optimizer state of newly trained tensors is empty
    part, weight = chosen, 1 / ranks.size  # each process computes the whole batch
    several = ranks.size > 1
    if several and shareable(method):  # or its part of it
        part, method.place, weight = ranks.share(chosen)
        method.whole = train.targets(chosen)
    with train.autocast():
        inputs = train.inputs(method, part, s.augment)
        loss = method.loss(inputs, *train.targets(part)) * weight
    value = (ranks.total(loss.detach()) if several else loss).item()
    if not math.isfinite(value):
        raise NotFinite(f"loss was {value} in step {step + 1}")
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    if several:
        ranks.add_gradients(state.trained)
    if s.clip_norm:
        scaler.unscale_(optimizer)
        clip_grad_norm_(state.trained, s.clip_norm)
    try:
        scaler.step(optimizer)  # skips a step whose gradient is not finite
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise UserError(
            f"--lr {s.lr:g}: the weights are not finite after step {step + 1}; give a smaller --lr"
        ) from None
    scaler.update()
    return value


def shareable(method) -> bool:
    """Whether the loss of a batch is the mean over its parts; with --balance it is not."""
    return method.loss_is_mean and method.class_weights is None


def judge(
    method, train: Batches, val: Batches, state: State, length: Length, now: int
) -> dict[str, float]:
    """Validate after step `now`, if that is needed: update `state.at` (best, waited, stopped).
    Returns the accuracies for the log: on `val`, and on a few training images (`curve`).
    """
    s, at = method.settings, state.at
    if not length.chooses:
        if not all(tensor.isfinite().all() for tensor in state.learned.values()):
            raise NotFinite(f"weights were not finite after {length.place(now)}")
        return {}
    logits = predict(method, val)
    if not logits.isfinite().all():  # the last step broke the weights after a finite loss
        raise NotFinite(f"validation logits were not finite after {length.place(now)}")
    found = accuracy(logits, val.labels.cpu())
    better = found > at.best_val
    if better or (s.keep == "latest-best" and found == at.best_val):
        at.best_val, at.best_step = found, now
    at.waited = 0 if better else at.waited + 1
    if at.waited and at.waited == s.patience:
        at.stopped = f"no better validation accuracy in {s.patience} validations"
    return {"val": found, "train": accuracy_on(method, curve(train, val))}


def share_of_mean(method, length: Length, now: int) -> float:
    """The weight of the round that ends with step `now` in the mean so far."""
    ends = [*range(length.round, now, length.round), now]
    weights = [method.round_weight(end / length.total) for end in ends]
    return weights[-1] / sum(weights)


def search(method, train: Batches, val: Batches, run: Run, seed: int) -> float:
    """Call `descend` with each point of the settings' grid, and keep the tensors that are best on
    `val`; of equally good points, the first.

    All points start from the same tensors and random state. Each is a run of its own in this run's
    folder, so that finished points are not trained again after a kill.
    """
    if ranks.size > 1:
        ranks.agree(method.adapter_state().values())
    s = method.settings
    start = {name: t.detach().clone() for name, t in method.adapter_state().items()}
    best, seconds, points = None, 0.0, list(enumerate(s.points(), 1))
    both = (train, val) if ranks.size > 1 else ()
    for some in both:  # by all, before they separate; all compute `room` together, too
        if some.reader.room and some.keeps(method):
            some.encoded(method)
    stored = [some.stored() for some in both]
    for number, point in ranks.mine(points):
        name = " ".join(f"{key}={value:g}" for key, value in point.items())
        print(f"grid: {name}")
        method.settings = replace(s, grid="", **point)
        method.load_adapter(start)
        torch.manual_seed(seed)
        with ranks.apart():
            part = run.part(f"grid{number}", asdict(method.settings))
            seconds += descend(method, train, val, part, seed, resume=True)
            found = accuracy_on(method, val)
        print(f"grid: {name}: {found:.2f} % on validation")
        if best is None or found > best[0]:
            kept = {name: t.detach().clone().cpu() for name, t in method.adapter_state().items()}
            best = found, -number, point, kept, part.log
    for some, before in zip(both, stored, strict=True):  # each may have encoded with its own tower
        some.restore(before)
    every = ranks.together((seconds, best))
    seconds = sum(of for of, _ in every)
    found, _, chosen, kept, log = max((of for _, of in every if of), key=lambda of: of[:2])
    method.settings = s
    method.load_adapter(kept)
    run.save_adapter(kept)
    for line in log:
        run.log_round({**line, "seconds": seconds, **chosen})  # of all points
    print("grid: kept is " + ", ".join(f"{key} {value:g}" for key, value in chosen.items()))
    return seconds


def shuffled(train: Batches, size: int, seed: int, epoch: int) -> list[Tensor]:
    """The batches of an epoch, as indices of pictures: `size` from each group.

    The largest group is passed over once; the pictures of a smaller one repeat.
    """
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order = torch.randperm(max(map(len, train.drawn)), generator=generator)
    parts = order.split(size)
    return [torch.cat([group[part % len(group)] for group in train.drawn]) for part in parts]


def new_optimizer(
    s, trained: dict[str, Tensor], undecayed: tuple[str, ...], factors: dict[str, float]
):
    """AdamW or SGD over `trained`; tensors in `undecayed` have no weight decay, tensors in
    `factors` a multiple of the learning rate.
    """
    kinds: dict[tuple[bool, float], list[Tensor]] = {}
    for name, tensor in trained.items():
        kinds.setdefault((name in undecayed, factors.get(name, 1.0)), []).append(tensor)
    groups = [
        {"params": tensors, "weight_decay": 0 if free else s.weight_decay, "factor": factor}
        for (free, factor), tensors in sorted(kinds.items(), key=lambda item: item[0])
    ]
    if s.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=s.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=s.lr, eps=s.eps)

"""What every adaptation method is: a CLIP, a list of class names, and learned parameters.

A method turns a batch of B images into logits for K classes (B, K), in two halves: `encode`
computes what does not change during training, `classify` the rest. A method owns its parameters and
its hyperparameters. Where images come from, how they are batched and what is measured belongs to
the experiment (fewshot/). To add a method, write a file (prolip.py is short) and name it in
methods/__init__.py.
"""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from math import inf
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_min import CLIP, PromptTree, UserError, tokenize
from clip_min.typed import expect_fields
from clip_min.weights import fingerprint, mismatches
from methods.class_prompts import class_texts, mean_per_class

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class BaseSettings:
    """Hyperparameters of a method. Each field becomes a flag, and its annotation the help text."""

    # Field -> its smallest and largest value. Checked at once: a value out of range would otherwise
    # fail after minutes of work or, worse, train.
    limits: ClassVar[dict[str, tuple[float, float]]] = {}
    readers: ClassVar[dict[str, Callable]] = {}  # field -> what reads it from a text or file

    def __post_init__(self):
        for name, read in self.readers.items():
            if (given := getattr(self, name)) != getattr(type(self), name):
                object.__setattr__(self, name, read(given))
        for name, (least, most) in self.limits.items():
            value = getattr(self, name)
            if isinstance(value, int | float) and not least <= value <= most:
                expected = f"{least} or more" if most == inf else f"{least} to {most}"
                raise UserError(f"--{name.replace('_', '-')} {value}: expected {expected}")
        expect_fields(self)  # a config file that is read back may hold anything


class Method(nn.Module):
    """Base class: zero-shot CLIP, in the two halves that every method has.

        encode(images)   the frozen part: computed once for each image, then stored
        classify(x)      the part that learns: encoded images -> logits (B, K)

    clip: the model. The method makes a module tree of its own (`self.clip`) that shares the model's
    tensors, and adds its parts there. It never changes the lent model, which other methods may use.
    classnames: K names; template: a text with one {} for the name.

    A subclass first calls super().__init__, then adds its parameters. `prompt_tree` is called from
    that __init__, so it may read `settings` and `classnames`, but no learned parameter.
    """

    title: ClassVar[str] = ""  # one line for --help
    Settings: ClassVar[type[BaseSettings]] = BaseSettings
    # Name -> settings that differ from the defaults above.
    # "default": for your own images; "paper": as published; "notebook": from the course notebook
    # that the README quotes, used on its data set, flowers102; "demo": used on the demo task.
    recipes: ClassVar[dict[str, dict]] = {"default": {}}
    demo_model: ClassVar[dict] = {}  # changes to "default" for the demo's small model
    names_unseen: bool = True  # can it classify among classes it was not trained on?
    logits_apart: bool = True  # does a class's logit depend only on the image and that class?
    reaches_unseen: ClassVar[bool] = True  # does training change its logits for unseen classes?
    transductive: ClassVar[bool] = False  # does `classify` label the images of a batch jointly?
    zero_shot_state: Callable | None = None  # () -> learned tensors of zero-shot CLIP; wise_ft.py
    starts_over: ClassVar[bool] = False  # does `fit` ignore the values that it starts from?
    no_weight_decay: ClassVar[tuple[str, ...]] = ()  # tensors of `adapter_state` without it
    lr_factors: dict[str, float] = {}  # tensors of `adapter_state` that learn at a multiple of --lr
    first_stage: float | None = None  # share of the steps before the loop calls `second_stage`
    first_block: int | None = None  # first block of the image tower that learns; None: none does
    text_learns: bool = False  # do class features change during training?
    class_weights: Tensor | None = None  # (K,), for --balance: set by the loop before it starts
    step = 0  # the gradient step, from 0: set by the loop before it calls `loss`
    # If processes share a batch: the index of this one's first image; the targets of the batch.
    place, whole = 0, None
    loss_is_mean: bool = True  # over images? Else processes cannot share a batch.
    searches_last: bool = False  # does `fit` choose more after the gradient loop?
    _inferring, _text = False, None  # see `inference`; the stored class features

    @classmethod
    def preset(cls, recipe: str, model: str) -> dict:
        """The settings of a recipe; the default recipe depends on the model."""
        small = cls.demo_model if (recipe, model) == ("default", "demo") else {}
        return {**cls.recipes[recipe], **small}

    def __init__(self, clip: CLIP, classnames: list[str], template: str, settings: BaseSettings):
        super().__init__()
        self.lent = (clip,)  # a tuple hides it from nn.Module: its parameters are not this module's
        # A copy of the modules that shares the tensors, frozen: deepcopy takes these as copied.
        tensors = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in clip.parameters()}
        self.clip = copy.deepcopy(clip, tensors)
        self.templates = getattr(settings, "templates", ()) or (template,)
        self.settings = settings
        self.set_classes(classnames)

    def set_classes(self, classnames: list[str]) -> None:
        """Set the K classes that `classify` chooses from."""
        self.classnames = list(classnames)
        prompts, c = self.prompt_tree(), self.clip.config
        if prompts.vocabulary > c.vocab_size or prompts.context_length > c.context_length:
            raise UserError(
                f"this model reads prompts of up to {c.context_length} tokens from a vocabulary of "
                f"{c.vocab_size:,}, but these have up to {prompts.context_length} from CLIP's "
                f"{prompts.vocabulary:,}; give another --model, or shorter prompts"
            )
        self.prompts = prompts.to(self.clip.device)
        self._text = None

    def written_prompts(self) -> list[list[str]]:
        """The prompts of each class: those written for it, or one for each template."""
        if prompts := getattr(self.settings, "prompts", None):
            return class_texts(self.classnames, prompts)
        if bad := [template for template in self.templates if "{}" not in template]:
            raise UserError(f"--template {bad[0]!r} has no {{}} for the class name; add one")
        return [[t.replace("{}", name) for t in self.templates] for name in self.classnames]

    def prompt_tree(self) -> PromptTree:
        """The prompts of the classes, class after class: J in all."""
        return PromptTree(tokenize(list(itertools.chain(*self.written_prompts()))))

    # ------------------------------------------------------------------- images to logits

    @property
    def encoder(self) -> tuple | None:
        """A key for what `encode` computes, to store it under; None: it returns the images."""
        if self.first_block == 0:
            return None
        dtype = str(self.clip.visual.proj.dtype)  # may differ from the lent CLIP's
        return fingerprint(self.lent[0].visual), self.first_block, dtype

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, n, n), normalised -> the output of the frozen part: features (B, E) if the
        image tower is frozen; the tokens (B, T, D) before its first block that learns; the images
        themselves if all blocks learn.
        """
        if self.first_block == 0:
            return images
        with torch.no_grad():
            if self.first_block is None:
                return self.clip.visual(images).to(self.clip.visual.proj.dtype)
            return self.clip.visual.begin(images, self.first_block)

    def classify(self, x: Tensor) -> Tensor:
        """Encoded images x (B, …) -> logits (B, K)."""
        return self.clip.logits(self.image_features(x), self.class_features())

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, n, n), normalised -> logits (B, K)."""
        return self.classify(self.encode(images))

    def image_features(self, x: Tensor) -> Tensor:
        """Encoded images x (B, …) -> features (B, E), not normalised."""
        if self.first_block is None:
            return x
        if self.first_block == 0:
            return self.clip.visual(x)
        return self.clip.visual.finish(x, self.first_block)

    def text_features(self) -> Tensor:
        """A text feature for each class (K, E); of several prompts mean_j norm(text(prompt_kj))."""
        x = self.prompts(self.clip)  # (J, E)
        if len(x) == len(self.classnames):
            return x
        return mean_per_class(F.normalize(x, dim=-1), self.written_prompts())  # (K, E)

    def class_features(self) -> Tensor:
        """`text_features`, computed only once if they do not learn, or within `inference`."""
        if self.text_learns and not self._inferring:
            return self.text_features()
        if self._text is None:
            with torch.no_grad():
                self._text = self.text_features()
        return self._text

    def matrix(self) -> dict[str, Tensor]:
        """The classifier of image features f (E,), for export: weight (K, E), with logit_scale s if
        logits are s · norm(f) · weightᵀ, or with bias (K,) if they are f · weightᵀ + bias.
        """
        rows = F.normalize(self.class_features(), dim=-1)
        return {"weight": rows, "logit_scale": self.clip.logit_scale.exp()}

    def float32(self) -> torch.autocast:
        """A context without autocast, for logits: in 16 bits similar classes would tie."""
        return torch.autocast(self.clip.device.type, enabled=False)

    # ---------------------------------------------------------------------------- learning

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """The loss of a gradient step: cross-entropy. x (B, …) encoded, labels (B,) -> scalar."""
        return F.cross_entropy(self.classify(x), labels, self.class_weights)

    def fit(self, train, val, descend: Callable) -> None:
        """Learn from `train`; make choices on `val`. By default this calls `descend`, the gradient
        loop, if the method has parameters to learn. A closed form overrides it.

        `train` and `val` are `Batches`: labels (N,), encoded(method) (N, …) and images(chosen)
        (B, 3, n, n), where `chosen` holds B indices of images.
        """
        if self.adapter_state():
            descend(self, train, val)

    def round_weight(self, progress: float) -> float:
        """For --keep mean: the weight of the tensors after this share of training, 0 to 1."""
        return 1.0

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """A context without gradients and dropout, in which class features are computed once."""
        training = self.training
        self.eval()
        self._inferring = True
        try:
            with torch.no_grad():
                yield
        finally:
            self._inferring = False
            self._text = None if self.text_learns else self._text
            self.train(training)

    def for_classes(self, classnames: list[str]) -> "Method":
        """The same learned tensors, shared, for other class names."""
        if not self.names_unseen and classnames != self.classnames:
            raise UserError(
                f"{type(self).__name__} cannot name classes it was not trained on, or just some of "
                "its own; give all of its own (the default), or use another method"
            )
        other = copy.copy(self)  # shares all tensors: only the tables of them are copied
        for table in ("_modules", "_parameters", "_buffers"):
            setattr(other, table, getattr(self, table).copy())
        other.set_classes(classnames)
        return other

    def adapter_state(self) -> dict[str, Tensor]:
        """The learned tensors by name: exactly what a run saves."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def load_adapter(self, state: dict[str, Tensor]) -> None:
        """Copy `state`, from `adapter_state`, into this method. UserError unless all fits."""
        mine = self.adapter_state()
        problems = mismatches(state, mine)
        for name, tensor in () if problems else state.items():
            kinds = FLOATS if mine[name].is_floating_point() else INTEGERS
            if tensor.dtype not in kinds:
                problems.append(f"{name} is {tensor.dtype}, expected {mine[name].dtype}")
            elif not tensor.to(mine[name].dtype).isfinite().all():
                problems.append(f"{name} has NaN or infinity")
        if problems:
            shown = "; ".join(problems[:8]) + (", …" if len(problems) > 8 else "")
            raise UserError(f"the adapter does not fit this method and model: {shown}")
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(state[name])


Augment = Literal["none", "crop-flip", "random-crop", "randaugment", "randaugment-crop"]


@dataclass(frozen=True)
class TrainingSettings(BaseSettings):
    """Hyperparameters of learning by gradient descent, read by fewshot/loop.py."""

    optimizer: Annotated[Literal["adamw", "sgd"], "AdamW, or SGD with momentum 0.9"] = "adamw"
    lr: Annotated[float, "peak learning rate"] = 2e-4
    weight_decay: Annotated[float, "weight decay (AdamW's is decoupled)"] = 1e-2
    epochs: Annotated[int, "passes over the training images, at most (see --min-steps)"] = 15
    min_steps: Annotated[int, "gradient steps to train at least, even beyond --epochs"] = 0
    steps_per_shot: Annotated[int, "if not 0: steps to train per shot, instead of --epochs"] = 0
    batch_size: Annotated[int, "images in a gradient step"] = 32
    drop_last: Annotated[bool, "skip the last batch of an epoch if it is not full"] = False
    schedule: Annotated[
        Literal["epoch", "step"], "lower the learning rate after each epoch, or each step (cosine)"
    ] = "epoch"
    min_lr: Annotated[float, "learning rate at the end of the cosine"] = 0.0
    warmup_epochs: Annotated[int, "epochs of warmup, before the cosine"] = 0
    warmup_steps: Annotated[int, "steps of warmup, before the cosine: with --schedule step"] = 0
    warmup: Annotated[
        Literal["constant", "linear", "proportional"],
        "learning rate during warmup: --warmup-lr; or rising from it to --lr; or --lr times the "
        "share of the warmup that is done",
    ] = "constant"
    warmup_lr: Annotated[float, "learning rate of the warmup, or at its start"] = 1e-5
    validations: Annotated[int, "number of validations, evenly spread; 0: one an epoch"] = 0
    patience: Annotated[int, "stop after so many validations without improvement; 0: never"] = 3
    keep: Annotated[
        Literal["best", "latest-best", "last", "mean"],
        "weights to keep: the best on validation (of equals the first, or latest-best: the "
        "latest); the last; or the mean over all epochs (or --validations)",
    ] = "best"
    grid: Annotated[
        str,
        "settings to choose on validation: 'lr=1e-3,1e-4 weight_decay=0,0.01' trains with each of "
        "the four pairs and keeps the best",
    ] = ""
    clip_norm: Annotated[float, "largest norm of the gradient; 0: no clipping"] = 0.0
    eps: Annotated[float, "AdamW's ε, added to the root of the second moment"] = 1e-8
    balance: Annotated[
        bool, "weight each class in the loss by 1 / its number of training images"
    ] = False
    augment: Annotated[
        Augment,
        "none: CLIP's own crop; crop-flip: random resized crop (0.08-1 of the area) and flip; "
        "random-crop: resize to 8/7 of the input size, then random crop of that size and flip; "
        "randaugment: crop-flip, then RandAugment(2, 9), arXiv:1909.13719; "
        "randaugment-crop: RandAugment of the whole image, then random resized crop",
    ] = "none"

    limits = {
        **dict.fromkeys(
            ("lr", "weight_decay", "min_lr", "warmup_lr", "clip_norm", "eps"), (0, inf)
        ),
        **dict.fromkeys(("epochs", "min_steps", "steps_per_shot", "validations"), (0, inf)),
        **dict.fromkeys(("warmup_epochs", "warmup_steps", "patience"), (0, inf)),
        "batch_size": (1, inf),
    }

    def __post_init__(self):
        super().__post_init__()
        if self.warmup_steps and self.schedule == "epoch":
            raise UserError(
                f"--warmup-steps {self.warmup_steps}: the learning rate changes only after each "
                "epoch; add --schedule step, or give --warmup-epochs"
            )
        for point in self.points() if self.grid else ():
            replace(self, grid="", **point)  # raises if out of range

    def points(self) -> list[dict]:
        """The combinations of the values in `grid`: [{"lr": 1e-3, "weight_decay": 0.0}, …]."""
        kinds: dict[str, type] = {f.name: type(f.default) for f in fields(TrainingSettings)}
        numbers: dict[str, list] = {}
        try:
            for axis in self.grid.split():
                name, texts = axis.split("=")
                if name in numbers or kinds[name] not in (int, float):
                    raise KeyError
                numbers[name] = [kinds[name](text) for text in texts.split(",")]
        except (KeyError, ValueError):
            raise UserError(
                f"--grid: {axis!r} is not the name of a setting that all methods with gradient "
                "steps have, with numbers, each once; give, for example, lr=1e-3,1e-4 batch_size=8"
            ) from None
        points = itertools.product(*numbers.values())
        return [dict(zip(numbers, point, strict=True)) for point in points]


# For data without a published recipe. With few classes an epoch is only one or two steps, so the
# length has a minimum in steps: enough for 2 classes, while 500 classes train ten epochs. There are
# ten validations, whatever the length. Methods with cheap steps raise the minimum.
DEFAULT = {"epochs": 10, "min_steps": 400, "schedule": "step", "validations": 10}
DEFAULT |= {"patience": 0, "keep": "latest-best"}

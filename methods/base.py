"""What every adaptation method is: a CLIP, a list of class names, and something learned.

A method turns a batch into logits, B images by K classes: `encode` computes what stays as it is
while the method learns, `classify` the rest. It owns its parameters and knows its hyperparameters,
but not where images come from, how they are batched, or what is measured: that is the experiment's
(fewshot/). To add one, write a file (prolip.py is short) and name it in methods/__init__.py.
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
from methods.own_tree import own_tree

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True)
class BaseSettings:
    """Hyperparameters of a method: fields annotated with their meaning, which become its flags."""

    # Field -> the least and the most it may be. Checked first: a value out of range would fail
    # after minutes of work, or, worse, train.
    limits: ClassVar[dict[str, tuple[float, float]]] = {}

    def __post_init__(self):
        for name, (least, most) in self.limits.items():
            value = getattr(self, name)
            if isinstance(value, int | float) and not least <= value <= most:
                expected = f"{least} or more" if most == inf else f"{least} to {most}"
                raise UserError(f"--{name.replace('_', '-')} {value}: expected {expected}")
        expect_fields(self)  # a config that is read back may hold anything


Augment = Literal["none", "crop-flip", "random-crop", "randaugment", "randaugment-crop"]


@dataclass(frozen=True)
class TrainingSettings(BaseSettings):
    """Hyperparameters of learning by gradient descent, read by fewshot/loop.py."""

    optimizer: Annotated[Literal["adamw", "sgd"], "AdamW, or SGD with momentum 0.9"] = "adamw"
    lr: Annotated[float, "peak learning rate"] = 2e-4
    weight_decay: Annotated[float, "weight decay (AdamW's is decoupled)"] = 1e-2
    epochs: Annotated[int, "passes over the training images, at most"] = 15
    min_steps: Annotated[int, "gradient steps at least, however few make an epoch"] = 0
    steps_per_shot: Annotated[int, "if not 0: train this many steps x shots, whatever epochs"] = 0
    batch_size: Annotated[int, "images in one step"] = 32
    drop_last: Annotated[bool, "leave out the last batch of an epoch, if it is not full"] = False
    schedule: Annotated[Literal["epoch", "step"], "the cosine moves once per epoch or step"] = (
        "epoch"
    )
    min_lr: Annotated[float, "learning rate at the end of the cosine"] = 0.0
    warmup_epochs: Annotated[int, "first epochs, before the cosine starts at its peak"] = 0
    warmup_steps: Annotated[int, "the same, counted in steps: with --schedule step"] = 0
    warmup: Annotated[
        Literal["constant", "linear", "proportional"],
        "in these the rate is --warmup-lr, or rises from it to --lr, or is the share of --lr that "
        "is the share of these",
    ] = "constant"
    warmup_lr: Annotated[float, "learning rate of these, or of the first"] = 1e-5
    validations: Annotated[int, "times to validate, evenly spread; 0: after each epoch"] = 0
    patience: Annotated[int, "validations in a row without a better one to stop; 0: never"] = 3
    keep: Annotated[
        Literal["best", "latest-best", "last", "mean"],
        "weights that are kept: the best on validation, the first or the latest of equally good "
        "ones, the last, or the mean of those after each epoch (or --validations)",
    ] = "best"
    grid: Annotated[
        str,
        "numbers to choose by validation: 'lr=1e-3,1e-4 weight_decay=0,0.01' trains with each of "
        "the four pairs, and keeps the best",
    ] = ""
    clip_norm: Annotated[float, "largest norm of the gradient; 0: no clipping"] = 0.0
    eps: Annotated[float, "AdamW's ε, added to the root of the second moment"] = 1e-8
    balance: Annotated[
        bool, "weigh each class in the loss by 1 / its training images, so that rare ones count"
    ] = False
    augment: Annotated[
        Augment,
        "none: CLIP's own crop; crop-flip: random resized crop (0.08-1 of the area) and flip; "
        "random-crop: resized to 8/7 of the size, a random crop of the size, and flip; "
        "randaugment: crop-flip, then RandAugment(2, 9), arXiv:1909.13719; "
        "randaugment-crop: RandAugment of the whole picture, then random resized crop",
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
                f"--warmup-steps {self.warmup_steps}: the rate changes once an epoch; add "
                "--schedule step, or give --warmup-epochs"
            )
        for point in self.points() if self.grid else ():
            replace(self, grid="", **point)  # in range

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
                f"--grid: {axis!r} is not a setting's name with numbers for it; expected, for "
                "example, lr=1e-3,1e-4 or batch_size=8,32"
            ) from None
        points = itertools.product(*numbers.values())
        return [dict(zip(numbers, point, strict=True)) for point in points]


# For pictures that no published recipe is for. Few classes make an epoch of one or two steps, so
# training is as long as its steps say: enough for 2 classes, and ten epochs of 500. Ten
# validations, whatever its length. Methods whose step costs little take more of them.
DEFAULT = {"epochs": 10, "min_steps": 400, "schedule": "step", "validations": 10}
DEFAULT |= {"patience": 0, "keep": "latest-best"}


class Method(nn.Module):
    """Base class: zero-shot CLIP, in the two halves that every method has.

        encode(images)   what never changes while the method learns: computed once, and kept
        classify(x)      what learns: encoded images -> logits (B, K)

    clip: the model. The method makes a tree of modules of its own over its tensors (`self.clip`),
    puts its parts there, and leaves the lent one as it is: other methods may use it, too.
    classnames: K names; template: a text with one {} for the name.

    A subclass calls super().__init__ first and then adds its parameters, so `prompt_tree`, called
    from there, may read `settings` and `classnames`, but nothing that is learned.
    """

    title: ClassVar[str] = ""  # one line for --help
    Settings: ClassVar[type[BaseSettings]] = BaseSettings
    # Name -> settings that differ from the defaults above.
    # "default": for pictures of one's own; "paper": as published; "notebook": the course notebook's
    # that the README quotes, taken on its data set, flowers102; "demo": taken on the demo task.
    recipes: ClassVar[dict[str, dict]] = {"default": {}}
    demo_model: ClassVar[dict] = {}  # changes to "default" on the demo's small model
    names_unseen: bool = True  # can it classify among classes it was not trained on?
    logits_apart: bool = True  # does a class's logit depend on image and class alone?
    reaches_unseen: ClassVar[bool] = True  # does what it learns change how it names those?
    transductive: ClassVar[bool] = False  # does classify label the images of a batch jointly?
    zero_shot_state: Callable | None = None  # () -> learned tensors of zero-shot CLIP; wise_ft.py
    no_weight_decay: ClassVar[tuple[str, ...]] = ()  # what of `adapter_state` is not decayed
    lr_factors: dict[str, float] = {}  # what of it learns at so many times the rate
    first_stage: float | None = None  # share of the steps before the loop calls `second_stage`
    first_block: int | None = None  # of the image tower that learns; None: the tower is frozen
    text_learns: bool = False  # do class features change while it learns?
    class_weights: Tensor | None = None  # (K,), of --balance: set by the loop before it starts
    step = 0  # of training, from 0: set by the loop before it asks for the loss of that step
    place, whole = 0, None  # where processes share a batch: of the first image; targets of them all
    loss_is_mean: bool = True  # over images? else none of them can take a part of a batch
    _inferring, _text = False, None  # see `inference`; class features that are kept

    @classmethod
    def preset(cls, recipe: str, model: str) -> dict:
        """The settings of a recipe; of the default one, those that fit this model."""
        small = cls.demo_model if (recipe, model) == ("default", "demo") else {}
        return {**cls.recipes[recipe], **small}

    def __init__(self, clip: CLIP, classnames: list[str], template: str, settings: BaseSettings):
        super().__init__()
        self.lent = (clip,)  # in a tuple, for its parameters are not this module's
        self.clip = own_tree(clip)
        self.templates = getattr(settings, "templates", ()) or (template,)
        self.settings = settings
        self.set_classes(classnames)

    def set_classes(self, classnames: list[str]) -> None:
        """Make `classnames` the K classes that classify chooses from."""
        self.classnames = list(classnames)
        self.prompts = self.prompt_tree().to(self.clip.device)
        self._text = None

    def written_prompts(self) -> list[list[str]]:
        """The prompts of each class: those written for it, or one of each template."""
        return class_texts(self.classnames, self.templates, getattr(self.settings, "prompts", None))

    def prompt_tree(self) -> PromptTree:
        """The prompts of the classes, class after class: J in all."""
        return PromptTree(tokenize(list(itertools.chain(*self.written_prompts()))))

    # ------------------------------------------------------------------- images, to logits

    @property
    def encoder(self) -> tuple | None:
        """Names what `encode` computes, so that it can be kept; None: it hands images on."""
        if self.first_block == 0:
            return None
        dtype = str(self.clip.visual.proj.dtype)  # it may compute in another one than the lent CLIP
        return fingerprint(self.lent[0].visual), self.first_block, dtype

    def encode(self, images: Tensor) -> Tensor:
        """images (B, 3, n, n), normalised -> what is frozen of the way to the logits: features
        (B, E); where the last blocks of the image tower learn, tokens (B, T, D) before the first
        of these; where all do, the images.
        """
        if self.first_block == 0:
            return images
        with torch.no_grad():
            if self.first_block is None:
                return self.clip.encode_image(images).to(self.clip.visual.proj.dtype)
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
            return self.clip.encode_image(x)
        return self.clip.visual.finish(x, self.first_block)

    def text_features(self) -> Tensor:
        """One text feature per class (K, E): of several, W_k = mean_j norm(text(prompt_kj))."""
        x = self.prompts(self.clip)  # (J, E)
        if len(x) == len(self.classnames):
            return x
        return mean_per_class(F.normalize(x, dim=-1), self.written_prompts())  # (K, E)

    def class_features(self) -> Tensor:
        """`text_features`, computed once where nothing in them learns, and in `inference`."""
        if self.text_learns and not self._inferring:
            return self.text_features()
        if self._text is None:
            with torch.no_grad():
                self._text = self.text_features()
        return self._text

    def float32(self) -> torch.autocast:
        """A context without autocast, for logits: in 16 bits those of like classes would tie."""
        return torch.autocast(self.clip.device.type, enabled=False)

    # ---------------------------------------------------------------------------- learning

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """What a gradient step lowers; cross-entropy. x (B, …) encoded, labels (B,) -> scalar."""
        return self.cross_entropy(self.classify(x), labels)

    def cross_entropy(self, logits: Tensor, labels: Tensor, **more) -> Tensor:
        """F.cross_entropy of logits (B, K), with `--balance` of classes that weigh alike."""
        return F.cross_entropy(logits, labels, self.class_weights, **more)

    def fit(self, train, val, descend: Callable) -> None:
        """Learn from `train`, choosing by `val`. Default: `descend`, the gradient loop, if anything
        is learned. A method with a closed form overrides this and does not call `descend`.

        Both are `Batches`: labels (N,), encoded(method) (N, …) and images(chosen) (B, 3, n, n),
        `chosen` being B numbers of pictures.
        """
        if self.adapter_state():
            descend(self, train, val)

    def round_weight(self, progress: float) -> float:
        """What the tensors after this share of training, of 1, weigh where their mean is kept."""
        return 1.0

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """While open: no gradients, no dropout, and class features are computed once."""
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
        """The same learned parameters (the same tensors) for other class names."""
        if not self.names_unseen:
            raise UserError(f"{type(self).__name__} cannot name classes it was not trained on")
        other = copy.copy(self)  # shares every tensor; only the tables of names are its own
        for table in ("_modules", "_parameters", "_buffers"):
            setattr(other, table, getattr(self, table).copy())
        other.set_classes(classnames)
        return other

    def adapter_state(self) -> dict[str, Tensor]:
        """Exactly what is learned, by name: what is saved, and nothing else."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def load_adapter(self, state: dict[str, Tensor]) -> None:
        """Copy `state`, as `adapter_state` gave it, into this method; strict."""
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

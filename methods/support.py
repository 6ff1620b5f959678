"""The base of methods that store the features and labels of their training images."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_min import UserError
from clip_min.memory import check_room, free_memory
from methods.base import Method
from methods.learned_names import places


class WithSupport(Method):
    """A method that stores features of its training images, the support set.

    support (N, E), on the unit sphere; support_labels (N,), indices of the learned names. Both are
    empty until `remember`.
    """

    trains_support = False
    starts_over = True
    reaches_unseen = False

    def __init__(self, clip, classnames, template, settings):
        super().__init__(clip, classnames, template, settings)
        self.learned_names = list(classnames)
        empty = torch.empty(0, clip.config.embed_dim, device=clip.device)
        self.support = nn.Parameter(empty, requires_grad=self.trains_support)
        labels = torch.empty(0, dtype=torch.int64, device=clip.device)
        self.support_labels = nn.Parameter(labels, requires_grad=False)

    def remember(self, train, views: int = 1, augment: str = "none", apart: bool = False) -> None:
        """Store the features of `train` (see `Method.fit`): of CLIP's own crop or, with `augment`,
        of random views. Of the views of an image the mean is stored, or each one if `apart`.
        """
        if augment == "none":
            features = train.encoded(self).float()  # (N, E)
        else:
            each = [self._view(train, augment) for _ in range(views)]
            features = torch.cat(each) if apart else sum(each) / views
        self.support.data = F.normalize(features, dim=-1)
        self.support_labels.data = train.labels.repeat(len(features) // len(train.labels))

    @torch.no_grad()
    def _view(self, train, augment: str) -> Tensor:
        """Features of a random view of each image (N, E), not normalised, as published."""
        parts = torch.arange(len(train)).split(64)
        with train.autocast():
            features = [self.encode(train.images(part, augment)) for part in parts]
        return torch.cat(features).float()

    def votes(self) -> Tensor:
        """A row for each support image, one-hot at its class (N, K); zero for other classes."""
        of, asked = self._places()
        what = f"{len(of):,} training images times {len(asked):,} classes take"
        free = free_memory(self.support.device)
        check_room(24 * len(of) * len(asked), free, what, "give fewer of either")  # float64, thrice
        return (of[:, None] == asked).float()

    def count_votes(self, x: Tensor) -> Tensor:
        """x (N, B) -> votes()ᵀ·x (K, B): the sum of the rows of each class's images.

        The matrix of votes, nearly all zeros, would grow with the square of the classes; this does
        not form it.
        """
        of, asked = self._places()
        count = of.bincount(minlength=len(self.learned_names) + 1)  # the last is 0
        first = count.cumsum(0) - count  # where each class begins in the order of class
        return F.embedding_bag(of.argsort(stable=True), x, first, mode="sum")[asked]

    def _places(self) -> tuple[Tensor, Tensor]:
        """The class of each support image (N,) and of each requested name (K,), as indices of the
        learned names. A requested name without images gets the index after the last.
        """
        asked = places(self.classnames, self.learned_names)
        again = {name: i for i, name in enumerate(self.learned_names)}  # for a repeated request
        none = len(self.learned_names)
        pairs = zip(asked, self.classnames, strict=True)
        asked = [again.get(name, none) if i < 0 else i for i, name in pairs]
        return self.support_labels, torch.tensor(asked, device=self.support.device)

    def adapter_state(self) -> dict[str, Tensor]:
        return {"support": self.support, "support_labels": self.support_labels}

    def load_adapter(self, state: dict[str, Tensor]) -> None:
        """As in the base class; the number of images is taken from `state`."""
        before = self.support.data, self.support_labels.data
        count = state["support"].shape[:1].numel() if "support" in state else 0
        self.support.data = self.support.new_zeros(count, self.support.shape[1])
        self.support_labels.data = self.support_labels.data.new_zeros(count)
        try:
            super().load_adapter(state)
            if not all(0 <= k < len(self.learned_names) for k in self.support_labels.tolist()):
                raise UserError(
                    "the adapter does not fit this method and model: support_labels are "
                    f"{self.support_labels.min()} to {self.support_labels.max()}, expected numbers "
                    f"from 0 of the {len(self.learned_names)} classes it learned"
                )
        except UserError:
            self.support.data, self.support_labels.data = before
            raise

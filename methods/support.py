"""Methods that keep their training images: as features, with labels, beside CLIP."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_min import UserError
from clip_min.memory import check_room, free_memory
from methods.base import Method


class WithSupport(Method):
    """A method that keeps features of its training images, the support set.

    support (N, E), on the unit sphere; support_labels (N,), rows of the names it was made with.
    How many there are is known once they are there: before `remember`, none.
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
        """Keep the features of `train` (see `Method.fit`): of CLIP's own crop, or, with `augment`,
        of random views: of each picture the mean, or all of them `apart`.
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
        """Features of one random view of each picture (N, E), not normalised, as published."""
        parts = torch.arange(len(train)).split(64)
        with train.autocast():
            features = [self.encode(train.images(part, augment)) for part in parts]
        return torch.cat(features).float()

    def votes(self) -> Tensor:
        """One row a support image, 1 at its class, (N, K); of a class not asked for, all zero."""
        of, asked = self._places()
        what = f"{len(of):,} training images times {len(asked):,} classes take"
        free = free_memory(self.support.device)
        check_room(24 * len(of) * len(asked), free, what, "give fewer of either")  # float64, thrice
        return (of[:, None] == asked).float()

    def count_votes(self, x: Tensor) -> Tensor:
        """x (N, B) -> votes()ᵀ·x (K, B): the rows of each class's images, summed.

        Without that matrix, nearly all zeros: it grows with the square of the classes.
        """
        of, asked = self._places()
        count = of.bincount(minlength=len(self.learned_names) + 1)  # of the last, no class's, 0
        first = count.cumsum(0) - count  # where a class begins, once images are in order of class
        return F.embedding_bag(of.argsort(stable=True), x, first, mode="sum")[asked]

    def _places(self) -> tuple[Tensor, Tensor]:
        """The class of each support image (N,), and each class asked for (K,), by number among the
        names learned; without images of it, the number after these.
        """
        numbers = {name: i for i, name in enumerate(self.learned_names)}
        learned = torch.tensor([numbers[name] for name in self.learned_names])  # alike if names are
        asked = [numbers.get(name, len(learned)) for name in self.classnames]
        device = self.support.device
        return learned.to(device)[self.support_labels], torch.tensor(asked, device=device)

    def adapter_state(self) -> dict[str, Tensor]:
        return {"support": self.support, "support_labels": self.support_labels}

    def load_adapter(self, state: dict[str, Tensor]) -> None:
        """As always, but for the number of images, which is the saved one's."""
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

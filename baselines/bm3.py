"""BM3 (Zhou et al., WWW 2023): no negatives; two views of each row must agree."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.common import (
    GRID,
    filled,
    l2_term,
    linear,
    maps,
    of_model,
    reduced,
    standardised,
)
from data import Dataset
from promptmm import Config, Device, Losses, Pair, Student, drop, lightgcn, of_student


@dataclass(frozen=True)
class Settings(Config):
    """Released: L 1-2, dropout .3 or .5, w 2, no ‖Θ‖² on TikTok (DA-MRS)."""

    lr_student: float = of_student(1e-3, "AdamW's step (released)")
    l2: float = of_student(0.0, "of ‖Θ‖², on the batch (ours, B33)")
    dropout: float = of_model(0.3, "of the targets (released)", high=1)
    weight_content: float = of_model(2.0, "w of the modal terms (released)")


class BM3(Student):
    """U, I of LightGCN, I + item; q, one linear map of everything; t, dropped and detached.

        L = δ(q(U_u), t(I_i)) + δ(q(I_i), t(U_u))
            + w Σ_m [δ(q(f_i^m), t(I_i)) + δ(q(f_i^m), t(f_i^m))] + ‖Θ‖²

    δ = 1 - cos, mean over positives; f^m = x̃^m W^m + b^m; ranked by ⟨q(U), q(I)⟩. Against
    its paper and code: features are frozen (B5), any number of modalities, ‖Θ‖² is squared
    and on the batch (B33). Targets are detached, so that content acts through q alone, and
    a never-trained item is not found by it.
    """

    Settings = Settings
    SPACE = {
        **GRID,
        "lr_student": (5e-4, 1e-3, 2e-3, 5e-3, 1e-2),
        "l2": (0.0, 1e-4, 1e-3, 1e-2),
        "student_layers": (1, 2, 3),
        "dropout": (0.1, 0.3, 0.5),
        "weight_content": (0.1, 0.5, 2.0, 5.0),
    }
    width = 1

    def __init__(self, dataset: Dataset, config: Settings, device: Device = "cpu"):
        super().__init__(dataset.train, config, device)
        self.config = config
        self.features = standardised(dataset, device)  # x̃^m [I, d_m]
        self.reduction = maps(self.features, config.dim)  # W^m, b^m
        self.filled = filled(self.features)  # [I, 1] each
        self.predict = linear(config.dim, config.dim)  # q
        self.to(device)

    def online(self) -> Pair:
        """U [U, d] and I + item [I, d]."""
        user, item = lightgcn(self.graph, self.user, self.item, self.layers)
        return user, item + self.item

    def forward(self) -> Pair:
        user, item = self.online()
        return self.predict(user), self.predict(item)

    def terms(self, users: Tensor, lists: Tensor) -> Losses:
        items = lists[:, 0]  # [B]
        all_users, all_items = self.online()
        user = all_users.index_select(0, users)  # [B, d]
        item = all_items.index_select(0, items)  # [B, d]
        to_item = self.target(item)
        ids = apart(self.predict(user), to_item)
        ids = ids + apart(self.predict(item), self.target(user))
        terms = {"ids": ids}
        if self.config.weight_content:
            modal = []
            parts = zip(self.reduction, self.features.values(), self.filled, strict=True)
            for layer, x, has in parts:
                f = reduced(layer, x, items)  # f^m [B, d]
                own = has.index_select(0, items)[:, 0]  # [B]
                seen = self.predict(f)
                modal.append(apart(seen, to_item, own) + apart(seen, self.target(f), own))
            terms["content"] = self.config.weight_content * torch.stack(modal).sum()
        rows = self.user.index_select(0, users), self.item.index_select(0, items)
        return terms | l2_term(self.config.l2, *rows)

    def target(self, rows: Tensor) -> Tensor:
        """t: what the other side is drawn to, and does not move. [B, d] -> [B, d]."""
        return drop(rows.detach(), self.config.dropout)


def apart(a: Tensor, b: Tensor, of: Tensor | float = 1.0) -> Tensor:
    """δ: mean of 1 - cos; [B, d], [B, d] -> []. The others than `of` [B] count as 0.

    >>> float(apart(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])))
    1.0
    """
    return ((1 - F.cosine_similarity(a, b, dim=1)) * of).mean()

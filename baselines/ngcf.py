"""NGCF (Wang et al., SIGIR 2019): messages pass a map and a product with the receiver."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.common import GRID, linear, of_model
from data import Dataset
from promptmm import (
    Config,
    Device,
    Losses,
    Pair,
    Student,
    bpr_terms,
    drop,
    of_student,
    scores,
)

SLOPE = 0.2  # of LeakyReLU, as released; PyTorch's default is .01 (B12)


@dataclass(frozen=True)
class Settings(Config):
    """Released: d 64, L 3, dropout .1, lr 1e-4 … 5e-4."""

    lr_student: float = of_student(1e-3, "AdamW's step (ours; released: 5e-4)")
    student_layers: int = of_student(3, "L (released)")
    dropout: float = of_model(0.1, "of messages (released)", high=1)


class NGCF(Student):
    """E^l = drop(LeakyReLU((E^l-1 + M) W₁ + b₁ + (E^l-1 ⊙ M) W₂ + b₂)), M = Â E^l-1.

    Output [E⁰, n(E¹), …, n(E^L)], width d (L + 1), n: unit rows. As its paper prints it:
    the self term is in W₁ alone (B10), LeakyReLU is of the sum. Biases are the released
    code's, layers read rows that are not unit (B11); no node dropout (B12).
    """

    Settings = Settings
    SPACE = {**GRID, "student_layers": (1, 2, 3), "dropout": (0.0, 0.1, 0.3)}
    width = 2

    def __init__(self, dataset: Dataset, config: Settings, device: Device = "cpu"):
        super().__init__(dataset.train, config, device)
        self.config = config
        shape = config.dim, config.dim
        self.own = nn.ModuleList(linear(*shape) for _ in range(self.layers))  # W₁, b₁
        self.both = nn.ModuleList(linear(*shape) for _ in range(self.layers))  # W₂, b₂
        self.to(device)

    def forward(self) -> Pair:
        user, item = self.user, self.item  # [U, d], [I, d]
        users, items = [user], [item]
        for own, both in zip(self.own, self.both, strict=True):
            to_user, to_item = self.graph.to_users(item), self.graph.to_items(user)  # M
            user = self.message(own(user + to_user) + both(user * to_user))
            item = self.message(own(item + to_item) + both(item * to_item))
            users.append(F.normalize(user, dim=1))
            items.append(F.normalize(item, dim=1))
        return torch.cat(users, dim=1), torch.cat(items, dim=1)

    def message(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(x, SLOPE)
        return drop(x, self.config.dropout) if self.training else x

    def terms(self, users: Tensor, lists: Tensor) -> Losses:
        logits = scores(*self(), users, lists)  # [B, 2]
        return bpr_terms(self, logits, users, lists, self.config.l2)

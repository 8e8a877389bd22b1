"""CLCRec (Wei et al., ACM MM 2021): content learns to stand in for ids, by contrast."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.common import GRID, directions, filled, l2_term, linear, of_model
from data import Dataset
from promptmm import Config, Device, Losses, Pair, of_student, scores, table

HIDDEN = 256  # width of the encoder's inner layer, as released


@dataclass(frozen=True)
class Settings(Config):
    """Released: N 128 (512 for Amazon), λ .5 (.9), τ 2 (1), ρ .5, lr 1e-3, batch 256."""

    lr_student: float = of_student(1e-3, "AdamW's step (released)")
    l2: float = of_student(1e-4, "of ‖Θ‖², on the batch (ours)")
    batch: int = of_student(4096, "training edges in a step: each encodes every item")
    negatives: int = of_model(64, "N (ours; released: 128)", low=1, high=1e5)
    temperature: float = of_model(1.0, "τ (released: 1 or 2)", low=1e-3)
    weight_content: float = of_model(0.5, "λ of L_RE (released)", high=1.001)
    replaced: float = of_model(0.5, "ρ, ids replaced by content (released)", high=1.001)


class CLCRec(nn.Module):
    """g(x_i): two layers over [n(x_i^m)]_m. On lists of a positive and N negatives

        L_UI: ⟨user_u, v_k⟩ / τ, v_k = g_k with probability ρ, else item_k
        L_RE: ⟨n(item_positive), n(g_k)⟩ / τ

    both -log softmax of the positive; L = λ L_RE + (1-λ) L_UI + ‖Θ‖². An item that was
    trained is ranked by its id, one that never was by g. Against its code: negatives avoid
    training items only (B25), ρ is drawn for each entry (B26), no exp without a shift, what
    is built and never used is not built (B27).
    """

    Settings = Settings
    SPACE = {
        **GRID,
        "temperature": (0.2, 1.0, 2.0),
        "weight_content": (0.1, 0.5, 0.9),
        "replaced": (0.0, 0.25, 0.5),
    }

    def __init__(self, dataset: Dataset, config: Settings, device: Device = "cpu"):
        super().__init__()
        self.config = config
        self.width = 1 + config.negatives
        n_users, n_items = dataset.train.shape
        self.user = table(n_users, config.dim)
        self.item = table(n_items, config.dim)
        every = list(directions(dataset, device).values())  # n(x^m)
        self.features = {"all": torch.cat(every, dim=1)}  # side by side  [I, Σ d_m]
        [self.filled] = filled(self.features)  # [I, 1]
        seen = torch.from_numpy(np.asarray(dataset.train.sum(0)).T > 0)  # [I, 1]
        self.trained = seen.to(device)
        width = self.features["all"].shape[1]
        inner, outer = linear(width, HIDDEN), linear(HIDDEN, config.dim)
        self.encode = nn.Sequential(inner, nn.LeakyReLU(), outer)  # g
        self.to(device)

    def forward(self) -> Pair:
        return self.user, torch.where(self.trained, self.item, self.content())

    def content(self) -> Tensor:
        """g(x_i) of every item, zero without any content: [I, d]."""
        return self.encode(self.features["all"]) * self.filled

    def terms(self, users: Tensor, lists: Tensor) -> Losses:
        share, tau = self.config.weight_content, self.config.temperature
        content = self.content()  # g [I, d]
        ids = scores(self.user, self.item, users, lists)  # [B, 1 + N]
        by_content = scores(self.user, content, users, lists)  # [B, 1 + N]
        swapped = torch.rand_like(ids) < self.config.replaced
        taken = torch.where(swapped, by_content, ids)
        rows = F.normalize(self.item, dim=1), F.normalize(content, dim=1)
        alike = scores(*rows, lists[:, 0], lists)  # [B, 1 + N]
        terms = {
            "user_item": (1 - share) * first(taken / tau),
            "item_content": share * first(alike / tau),
        }
        own = self.user.index_select(0, users)
        both = self.item.index_select(0, lists[:, :2].flatten())  # i+ and an i-
        return terms | l2_term(self.config.l2, own, both)


def first(logits: Tensor) -> Tensor:
    """-log softmax of column 0, mean: [B, K] -> []."""
    return -logits.log_softmax(1)[:, 0].mean()

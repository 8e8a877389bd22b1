"""FREEDOM (Zhou and Shen, ACM MM 2023): a frozen item graph, a pruned user-item graph."""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from baselines.common import (
    GRID,
    constant,
    directions,
    maps,
    nearest,
    normalised,
    of_model,
    reduced,
    row_sums,
    standardised,
)
from data import Dataset
from losses import bpr_loss
from promptmm import (
    Config,
    Device,
    Graph,
    Losses,
    Pair,
    Product,
    Student,
    bpr_terms,
    lightgcn,
    of_student,
    scores,
)


@dataclass(frozen=True)
class Settings(Config):
    """Released: k 10, ρ .8 or .9, w 0 … 1e-3, .9 for text (B32), lr 1e-3."""

    lr_student: float = of_student(2e-3, "AdamW's step (ours; released: 1e-3)")
    l2: float = of_student(0.0, "of ‖Θ‖² (released: none, B32)")
    dropout: float = of_model(0.8, "ρ, edges removed each epoch (released)", high=1)
    neighbours: int = of_model(10, "k, nearest items, itself included (released)", low=1)
    lead: float = of_model(0.0, "weight of the last modality; 0: all equal", high=1)
    weight_content: float = of_model(1e-3, "w of the modal BPR (released)")


class FREEDOM(Student):
    """I + S item, U of LightGCN over a graph pruned anew each epoch; ranked on the whole.

    S = Σ_m ω_m S^m, S^m the k nearest by raw x^m, each weight 1, D^-1/2 S D^-1/2: frozen.

        L = BPR(⟨U_u, I_i⟩) + w Σ_m BPR(⟨U_u, x̃_i^m W^m⟩) + ‖Θ‖²

    Against its code: features are frozen (B5), items without content have no edge (B8), any
    number of modalities share 1 - `lead` (B32), and maps have no bias, for BPR cancels it.
    """

    Settings = Settings
    SPACE = {
        **GRID,
        "l2": (0.0, 1e-4, 1e-3, 1e-2),
        "student_layers": (1, 2, 3),
        "dropout": (0.0, 0.5, 0.8),
        "weight_content": (0.0, 1e-3, 1e-1),
        "lead": (0.0, 0.5, 0.9),
    }
    width = 2

    def __init__(self, dataset: Dataset, config: Settings, device: Device = "cpu"):
        super().__init__(dataset.train, config, device)
        self.config = config
        self.train_matrix = dataset.train
        self.kept = self.graph  # of this epoch
        self.features = standardised(dataset, device)  # x̃^m [I, d_m]
        self.reduction = maps(self.features, config.dim, bias=False)  # W^m
        self.similar = frozen_graph(dataset, config, device)  # S and Sᵀ [I, I]
        self.to(device)

    def each_epoch(self) -> None:
        """Prune the user-item graph anew."""
        if self.config.dropout:
            kept = pruned(self.train_matrix, self.config.dropout)
            self.kept = Graph(kept, self.item.device)

    def forward(self) -> Pair:
        graph = self.kept if self.training else self.graph
        user, item = lightgcn(graph, self.user, self.item, self.layers)
        return user, item + Product.apply(*self.similar, self.item)

    def terms(self, users: Tensor, lists: Tensor) -> Losses:
        user, item = self()  # [U, d], [I, d]
        logits = scores(user, item, users, lists)  # [B, 2]
        terms = bpr_terms(self, logits, users, lists, self.config.l2)
        if self.config.weight_content:
            own = user.index_select(0, users)  # [B, d]
            modal = []
            for layer, x in zip(self.reduction, self.features.values(), strict=True):
                f = reduced(layer, x, lists.flatten()).view(*lists.shape, -1)  # [B, 2, d]
                taken, other = torch.einsum("bd,bkd->kb", own, f)  # [B], [B]
                modal.append(bpr_loss(taken, other))
            terms["content"] = self.config.weight_content * torch.stack(modal).sum()
        return terms


def frozen_graph(dataset: Dataset, config: Settings, device: Device) -> Pair:
    """S [I, I] and its transpose."""
    features = directions(dataset, device)
    share = shares(len(features), config.lead)
    parts = []
    for weight, x in zip(share, features.values(), strict=True):
        links = nearest(x, config.neighbours)
        ones = torch.ones_like(links.columns, dtype=torch.float32)  # [n]
        parts.append((links, weight * normalised(links, ones, row_sums(links, ones))))
    return constant(parts, device)


def shares(count: int, lead: float) -> list[float]:
    """ω: the last modality leads, the others share the rest; 0: all equal.

    >>> shares(3, 0.5)
    [0.25, 0.25, 0.5]
    """
    if not lead or count == 1:
        return [1 / count] * count
    return [(1 - lead) / (count - 1)] * (count - 1) + [lead]


def pruned(train: sparse.csr_matrix, rate: float) -> sparse.csr_matrix:
    """⌊(1 - rate) E⌋ of E edges [U, I], without replacement, P ∝ 1 / √(deg_u deg_i)."""
    users, items = train.nonzero()
    of_user, of_item = np.diff(train.indptr), np.bincount(items, minlength=train.shape[1])
    weight = 1 / np.sqrt(of_user[users] * of_item[items])  # [E]
    count = int(round((1 - rate) * len(users), 6))  # 1 - .8 is a little less than .2
    chosen = torch.multinomial(torch.from_numpy(weight), max(1, count)).numpy()
    ones = np.ones(len(chosen), np.float32)
    cells = users[chosen], items[chosen]
    return sparse.csr_matrix((ones, cells), train.shape)

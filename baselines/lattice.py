"""LATTICE (Zhang et al., ACM MM 2021): an item graph learnt from content."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.common import (
    GRID,
    Links,
    constant,
    cosines,
    directions,
    filled,
    maps,
    nearest,
    normalised,
    of_model,
    read,
    row_sums,
    standardised,
)
from data import Dataset
from promptmm import (
    Config,
    Device,
    Losses,
    Pair,
    Product,
    Student,
    bpr_terms,
    lightgcn,
    of_student,
    scores,
)

Weighted = tuple[Links, Tensor]


@dataclass(frozen=True)
class Settings(Config):
    """Released: k 10, λ .9, L 2, lr 5e-4."""

    lr_student: float = of_student(1e-3, "AdamW's step (ours; released: 5e-4)")
    neighbours: int = of_model(10, "k, nearest items, itself included (released)", low=1)
    frozen: float = of_model(0.9, "λ, of the raw features' graph", high=1.001)


class LATTICE(Student):
    """I + n(G item), U: LightGCN's, and items that read similar ones (n: unit rows).

        G = (1-λ) C̃ + λ Σ_m a_m S̃^m,   C = Σ_m a_m kNN(y^m),   y^m = x̃^m W^m + b^m

    S^m: the k nearest by raw x^m, weighted by cosine; ˜: D^-1/2 · D^-1/2, D row sums; a: a
    softmax, learnt. G is rebuilt once an epoch, and only that batch has a gradient for W^m
    and a (B22); judged, it is rebuilt from the weights. Against its code: features are
    frozen (B5), Â is LightGCN's (B23), M modality weights (B24), zero rows no edge (B8).
    """

    Settings = Settings
    SPACE = {
        **GRID,
        "student_layers": (1, 2, 3),
        "neighbours": (5, 10, 20),
        "frozen": (0.5, 0.9, 1.0),
    }
    width = 2

    def __init__(self, dataset: Dataset, config: Settings, device: Device = "cpu"):
        super().__init__(dataset.train, config, device)
        self.config = config
        self.features = standardised(dataset, device)  # x̃^m [I, d_m]
        self.reduction = maps(self.features, config.dim)  # W^m, b^m
        self.filled = filled(self.features)  # [I, 1] each
        self.attention = nn.Parameter(torch.zeros(len(self.features)))  # before softmax
        self.raw_graphs = []  # S̃^m
        for x in directions(dataset, device).values():
            links = nearest(x, config.neighbours)
            weight = cosines(x, links)
            smooth = normalised(links, weight, row_sums(links, weight))
            self.raw_graphs.append((links, smooth))
        self.graph_of_epoch: Pair | None = None  # G and Gᵀ, constants; None: stale
        self.to(device)

    def each_epoch(self) -> None:
        """The first batch builds G anew."""
        self.graph_of_epoch = None

    def similar(self) -> list[Weighted]:
        """G as weighted links, with a gradient for W^m and a."""
        share = self.attention.softmax(0)  # a [M]
        fixed = self.config.frozen  # λ
        pairs = zip(share, self.raw_graphs, strict=True)
        raw = [(links, fixed * a * weight) for a, (links, weight) in pairs]
        if fixed >= 1:
            return raw
        learnt = [(links, (1 - fixed) * weight) for links, weight in self.learnt(share)]
        return raw + learnt

    def learnt(self, share: Tensor) -> list[Weighted]:
        """C̃ of a [M]: the links of every y^m, normalised together."""
        found = []
        features = self.features.values()
        layers = zip(share, self.reduction, features, self.filled, strict=True)
        for a, layer, x, has in layers:
            y = layer(x) * has  # y^m [I, d]
            links = nearest(y.detach(), self.config.neighbours)
            found.append((links, a * cosines(y, links)))
        degree = torch.stack([row_sums(*pair) for pair in found]).sum(0)  # of C  [I]
        return [(links, normalised(links, weight, degree)) for links, weight in found]

    def neighbours_of(self, item: Tensor) -> Tensor:
        """G item [I, d]."""
        if self.training and self.graph_of_epoch:
            return Product.apply(*self.graph_of_epoch, item)
        parts = self.similar()
        if self.training:
            self.graph_of_epoch = constant(parts, item.device)
        return torch.stack([read(*part, item) for part in parts]).sum(0)

    def forward(self) -> Pair:
        user, item = lightgcn(self.graph, self.user, self.item, self.layers)
        return user, item + F.normalize(self.neighbours_of(self.item), dim=1)

    def terms(self, users: Tensor, lists: Tensor) -> Losses:
        logits = scores(*self(), users, lists)  # [B, 2]
        return bpr_terms(self, logits, users, lists, self.config.l2)

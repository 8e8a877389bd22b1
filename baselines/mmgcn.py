"""MMGCN (Wei et al., ACM MM 2019): a graph network for each modality, averaged."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.common import GRID, filled, linear, maps, pair_terms, standardised
from data import Dataset
from promptmm import (
    Config,
    Device,
    Graph,
    Losses,
    Pair,
    Student,
    of_student,
    scores,
    table,
)


@dataclass(frozen=True)
class Settings(Config):
    """Released: three layers whatever is asked for (B17), lr 5e-4 on TikTok."""

    lr_student: float = of_student(1e-3, "AdamW's step (ours; released: 5e-4)")


class MMGCN(Student):
    """For each modality x = n([P^m; x̃^m V^m + c^m]), then L times

        h = LeakyReLU(mean over neighbours of x W₁)
        z = LeakyReLU(x W₂ + b₂) + [user; item]
        x ← LeakyReLU([h, z] W₃ + b₃)

    and the mean over m. Against its code: P^m and the ids, shared by all m and layers, are
    trained, as the paper says (B16); layers concatenate (B17), all of width d (B18).
    """

    Settings = Settings
    SPACE = {
        **GRID,
        "lr_student": (3e-4, 1e-3, 2e-3, 3e-3, 5e-3),
        "student_layers": (1, 2, 3),
    }
    width = 2

    def __init__(self, dataset: Dataset, config: Config, device: Device = "cpu"):
        super().__init__(dataset.train, config, device)
        self.config = config
        dim, layers = config.dim, range(config.student_layers)
        self.features = standardised(dataset, device)  # x̃^m [I, d_m]
        self.reduction = maps(self.features, dim)  # V^m, c^m
        self.filled = filled(self.features)  # [I, 1] each
        every = self.features.values()
        self.preference = nn.ParameterList(table(len(self.user), dim) for _ in every)  # P^m
        self.layer = nn.ModuleList(  # of each modality and layer
            nn.ModuleList(Layer(dim) for _ in layers) for _ in every
        )
        self.root = roots(self.graph)
        self.to(device)

    def forward(self) -> Pair:
        users, items = [], []
        parts = zip(self.preference, self.content(), self.layer, strict=True)
        for prefers, f, layers in parts:
            user, item = F.normalize(prefers, dim=1), F.normalize(f, dim=1)
            for layer in layers:
                to_user, to_item = self.mean(layer.heard(user), layer.heard(item))
                user = layer(to_user, user, self.user)
                item = layer(to_item, item, self.item)
            users.append(user)
            items.append(item)
        return torch.stack(users).mean(0), torch.stack(items).mean(0)

    def content(self) -> list[Tensor]:
        """x̃^m V^m + c^m of each modality, zero without content: [I, d] each."""
        parts = zip(self.reduction, self.features.values(), self.filled, strict=True)
        return [reduce(x) * has for reduce, x, has in parts]

    def mean(self, user: Tensor, item: Tensor) -> Pair:
        """Over each node's neighbours, zero without any: [U, d], [I, d] -> the same."""
        of_user, of_item = self.root
        to_users = self.graph.to_users(of_item * item) / of_user
        to_items = self.graph.to_items(of_user * user) / of_item
        return to_users, to_items

    def terms(self, users: Tensor, lists: Tensor) -> Losses:
        logits = scores(*self(), users, lists)  # [B, 2]
        tables = [self.user, *self.preference], [self.item]
        return pair_terms(logits, self.config.l2, users, lists, *tables)


class Layer(nn.Module):
    """W₁, W₂ [d, d] and W₃ [2d, d] of one layer."""

    def __init__(self, dim: int):
        super().__init__()
        self.heard = linear(dim, dim, bias=False)  # W₁; a bias would reach isolated nodes
        self.own = linear(dim, dim)  # W₂, b₂
        self.both = linear(2 * dim, dim)  # W₃, b₃

    def forward(self, heard: Tensor, x: Tensor, ids: Tensor) -> Tensor:
        """The mean of neighbours' x W₁, x and ids, [n, d] each -> [n, d]."""
        h = F.leaky_relu(heard)
        z = F.leaky_relu(self.own(x)) + ids
        return F.leaky_relu(self.both(torch.cat([h, z], dim=1)))


def roots(graph: Graph) -> Pair:
    """√degree of users [U, 1] and items [I, 1], at least 1: Â becomes a mean by them."""
    blocks = graph.ui, graph.iu
    degrees = [block.crow_indices().diff().clamp(min=1) for block in blocks]
    user, item = (degree.sqrt()[:, None] for degree in degrees)
    return user, item

"""GRCN (Wei et al., ACM MM 2020): content decides how much each interaction counts."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor, nn

from baselines.common import (
    GRID,
    Links,
    filled,
    maps,
    of_model,
    pair_terms,
    read,
    standardised,
    starts,
)
from data import Dataset
from promptmm import Config, Device, Losses, Pair, of_student, scores, table


@dataclass(frozen=True)
class Settings(Config):
    """Released: R 3, lr 1e-4, batch 1024."""

    lr_student: float = of_student(1e-3, "AdamW's step (ours; released: 1e-4)")
    batch: int = of_student(8192, "training edges in a step: each passes every edge")
    routings: int = of_model(1, "R (released: 3, which does what 0 does, B19)")


class Edges:
    """Training edges in the order of users, and how to read them in that of items."""

    def __init__(self, train: sparse.csr_matrix, device: Device):
        user, item = (torch.from_numpy(ids).long().to(device) for ids in train.nonzero())
        n_users, n_items = train.shape
        order = item.argsort(stable=True)
        self.order = order  # users' order -> items' [E]
        self.user, self.item = user, item  # [E] each
        self.of_users = Links(user, item, starts(user.bincount(minlength=n_users)))
        received = starts(item.bincount(minlength=n_items))
        self.of_items = Links(item[order], user[order], received)

    def to_users(self, weight: Tensor, item: Tensor) -> Tensor:
        """Σ over a user's items of weight [E] · item [I, d]: [U, d]."""
        return read(self.of_users, weight, item)

    def to_items(self, weight: Tensor, user: Tensor) -> Tensor:
        """Σ over an item's users of weight [E] · user [U, d]: [I, d]."""
        return read(self.of_items, weight[self.order], user)


def softmax_at(logits: Tensor, ends: Tensor, count: int) -> Tensor:
    """A softmax over the edges of each node: logits [E] in [-1, 1], ends [E] -> [E]."""
    power = logits.exp()
    total = power.new_zeros(count).index_add(0, ends, power)
    return power / total.index_select(0, ends)


class GRCN(nn.Module):
    """For each modality f = n(LeakyReLU(x̃ V + c)), p = n(P); α_ui ∝ exp⟨p_u, f_i⟩.

    R times p ← n(p + Σ_i α_ui f_i); then content c_u = p + Σ_i α_ui f_i over a user's items
    and c_i = f + Σ_u α_iu p_u over an item's users. An edge of the id graph counts
    ReLU(max_m α^m s^m), s the *sender's* confidence; e = e⁰ + e¹ + e² of unit ids, sums not
    normalised (B21). Output [e, c^1, …, c^M], width d (1 + M). Against its code: users are
    routed, as the paper says; R = 0 is what the released code does (B19). Confidences start
    at 1, so that ReLU silences no node before training (B20).
    """

    Settings = Settings
    SPACE = {
        **GRID,
        "lr_student": (1e-4, 1e-3, 3e-3, 1e-2),
        "l2": (0.0, 1e-4, 1e-3, 1e-2),
        "routings": (0, 1, 3),
    }
    width = 2

    def __init__(self, dataset: Dataset, config: Settings, device: Device = "cpu"):
        super().__init__()
        self.config = config
        n_users, n_items = dataset.train.shape
        self.edges = Edges(dataset.train, device)
        self.user, self.item = table(n_users, config.dim), table(n_items, config.dim)
        self.features = standardised(dataset, device)  # x̃^m [I, d_m]
        self.reduction = maps(self.features, config.dim)  # V^m, c^m
        self.filled = filled(self.features)  # [I, 1] each
        every = range(len(self.features))
        self.preference = nn.ParameterList(table(n_users, config.dim) for _ in every)  # P^m
        self.trust_user = nn.Parameter(torch.ones(n_users, len(every)))  # s of users
        self.trust_item = nn.Parameter(torch.ones(n_items, len(every)))  # s of items
        self.to(device)

    def forward(self) -> Pair:
        edges = self.edges
        users, items = [], []
        to_user, to_item = [], []  # α^m s^m of each edge, either way
        pairs = zip(self.preference, self.reduction, self.features.values(), strict=True)
        for m, (prefers, reduce, x) in enumerate(pairs):
            f = F.normalize(F.leaky_relu(reduce(x)) * self.filled[m], dim=1)  # [I, d]
            p = self.routed(F.normalize(prefers, dim=1), f)  # [U, d]
            logits = self.along(p, f)
            of_user = softmax_at(logits, edges.user, len(p))  # α_ui [E]
            of_item = softmax_at(logits, edges.item, len(f))  # α_iu [E]
            users.append(p + edges.to_users(of_user, f))
            items.append(f + edges.to_items(of_item, p))
            to_user.append(of_user * self.trust_item[:, m].index_select(0, edges.item))
            to_item.append(of_item * self.trust_user[:, m].index_select(0, edges.user))
        user, item = self.refined(torch.stack(to_user), torch.stack(to_item))
        return torch.cat([user, *users], dim=1), torch.cat([item, *items], dim=1)

    def along(self, user: Tensor, item: Tensor) -> Tensor:
        """⟨user, item⟩ of every edge: [U, d], [I, d] -> [E]."""
        return scores(user, item, self.edges.user, self.edges.item[:, None])[:, 0]

    def routed(self, p: Tensor, f: Tensor) -> Tensor:
        """p [U, d] after R steps towards the items f [I, d] that agree with it."""
        for _ in range(self.config.routings):
            share = softmax_at(self.along(p, f), self.edges.user, len(p))  # α_ui [E]
            p = F.normalize(p + self.edges.to_users(share, f), dim=1)
        return p

    def refined(self, to_user: Tensor, to_item: Tensor) -> Pair:
        """Ids over the edges that content trusts, weights [M, E]: [U, d], [I, d]."""
        into_user = to_user.amax(0).relu()  # w of item -> user [E]
        into_item = to_item.amax(0).relu()  # w of user -> item [E]
        user, item = F.normalize(self.user, dim=1), F.normalize(self.item, dim=1)  # e⁰
        total_user, total_item = user, item
        for _ in range(2):
            received = self.edges.to_users(into_user, item)
            item = self.edges.to_items(into_item, user)
            user = received
            total_user, total_item = total_user + user, total_item + item
        return total_user, total_item

    def terms(self, users: Tensor, lists: Tensor) -> Losses:
        logits = scores(*self(), users, lists)  # [B, 2]
        tables = [self.user, *self.preference], [self.item]
        return pair_terms(logits, self.config.l2, users, lists, *tables)

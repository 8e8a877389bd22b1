"""SLMRec (Tao et al., TMM 2022): a graph for each modality, and their rows contrasted."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.common import directions, l2_term, linear, maps, of_model
from data import Dataset
from promptmm import Config, Device, Losses, Pair, Student, lightgcn, of_student

CONTRAST = 0.2  # τ of the contrast, as released
CONTRASTED = 256  # items at most, of a batch (B31)


@dataclass(frozen=True)
class Settings(Config):
    """Released: L 3, τ .2, contrast .1, lr 1e-2, batch 2048."""

    lr_student: float = of_student(1e-3, "AdamW's step (DA-MRS on TikTok)")
    student_layers: int = of_student(3, "L (released)")
    l2: float = of_student(1e-4, "of ‖Θ‖² (released: decay 1e-4, B29)")
    batch: int = of_student(1024, "training edges in a step: B² logits", high=2**14)
    temperature: float = of_model(0.2, "τ of the main loss (released)", low=1e-3)
    weight_content: float = of_model(0.01, "of the contrast (DA-MRS on TikTok)")


class SLMRec(Student):
    """T⁰ = item, T^m = n(x^m) W^m + b^m; (U^t, I^t) = LightGCN of user and T^t, t = 0 … M.

    user_out = [U⁰, …, U^M] W_u + b_u, item_out alike, both [d]. Cross-entropy of
    ⟨n(user_out), n(item_out)⟩ / τ over the batch, an edge's item against the others'; no
    negatives are drawn. Contrast: a_0 = I⁰, a_m = a_m-1 G_m, v_m = I^m H_m, cross-entropy
    of a_m v_mᵀ / .2. Ranked by ⟨user_out, item_out⟩, no sigmoid (B28). Against its code:
    all modalities in name order, width d (B30); the contrast is over distinct items among
    the batch's first 256, the main loss as released (B31).
    """

    Settings = Settings
    SPACE = {
        "lr_student": (5e-4, 1e-3, 2e-3, 5e-3, 1e-2),
        "l2": (0.0, 1e-4, 3e-4, 1e-3),
        "student_layers": (1, 2, 3),
        "temperature": (0.1, 0.2, 0.5),
        "weight_content": (0.0, 0.01, 0.1),
    }
    width = 1

    def __init__(self, dataset: Dataset, config: Settings, device: Device = "cpu"):
        super().__init__(dataset.train, config, device)
        self.config = config
        dim = config.dim
        self.features = directions(dataset, device)  # n(x^m) [I, d_m]
        self.reduction = maps(self.features, dim)  # W^m, b^m
        every = range(len(self.features))
        self.mix_user = linear(dim * (1 + len(every)), dim)  # W_u, b_u
        self.mix_item = linear(dim * (1 + len(every)), dim)  # W_i, b_i
        self.chain = nn.ModuleList(linear(dim, dim, bias=False) for _ in every)  # G_m
        self.view = nn.ModuleList(linear(dim, dim, bias=False) for _ in every)  # H_m
        self.to(device)

    def propagated(self) -> tuple[list[Tensor], list[Tensor]]:
        """U^t [U, d] and I^t [I, d] of ids and of each modality."""
        pairs = zip(self.reduction, self.features.values(), strict=True)
        starts = [self.item, *(layer(x) for layer, x in pairs)]  # T^t [I, d]
        found = [lightgcn(self.graph, self.user, start, self.layers) for start in starts]
        users, items = zip(*found, strict=True)
        return list(users), list(items)

    def forward(self) -> Pair:
        users, items = self.propagated()
        user, item = torch.cat(users, dim=1), torch.cat(items, dim=1)  # [·, d (1 + M)]
        return self.mix_user(user), self.mix_item(item)

    def terms(self, users: Tensor, lists: Tensor) -> Losses:
        items = lists[:, 0]  # [B]
        all_users, all_items = self.propagated()
        user = torch.cat([part.index_select(0, users) for part in all_users], dim=1)
        item = torch.cat([part.index_select(0, items) for part in all_items], dim=1)
        user, item = self.mix_user(user), self.mix_item(item)  # [B, d] each
        cosine = F.normalize(user, dim=1) @ F.normalize(item, dim=1).T  # [B, B]
        terms = {"softmax": matched(cosine / self.config.temperature)}
        if self.config.weight_content:
            # On a GPU the host waits here: how many are distinct sizes what follows.
            loss = self.contrast(all_items, items[:CONTRASTED].unique())
            terms["contrast"] = self.config.weight_content * loss
        rows = self.user.index_select(0, users), self.item.index_select(0, items)
        return terms | l2_term(self.config.l2, *rows)

    def contrast(self, all_items: list[Tensor], items: Tensor) -> Tensor:
        """Σ_m cross-entropy of a_m v_mᵀ / .2 over distinct items [n] -> []."""
        along, *modal = (part.index_select(0, items) for part in all_items)  # [n, d]
        losses = []
        for link, view, rows in zip(self.chain, self.view, modal, strict=True):
            along = link(along)  # a_m
            losses.append(matched(along @ view(rows).T / CONTRAST))
        return torch.stack(losses).sum()


def matched(logits: Tensor) -> Tensor:
    """Cross-entropy of a square of logits whose targets are its diagonal: [n, n] -> [].

    >>> round(matched(torch.eye(2) / 0.2).item(), 6)
    0.006715
    """
    return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))

"""VBPR (He and McAuley, AAAI 2016): factors of ids beside factors of content."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from baselines.common import GRID, maps, of_model, pair_terms, reduced, standardised
from data import Dataset
from promptmm import Config, Device, Losses, Pair, of_student, table


@dataclass(frozen=True)
class Settings(Config):
    """Widths d + d; Cornac takes 10 + 10 (B15)."""

    lr_student: float = of_student(2e-3, "AdamW's step (ours; MMRec: 1e-3)")
    l2_content: float = of_model(3e-3, "λ_E, of ‖W‖² + ‖β'‖² (ours; Cornac: 0)")


class VBPR(nn.Module):
    """y_ui = ⟨user_u, item_i⟩ + ⟨θ_u, c_i⟩ + β_i + Σ_m x̃_i^m β'^m,  c_i = Σ_m x̃_i^m W^m.

    As embeddings: [user, θ, 1] and [item, c, β + x̃ β'], width 2d + 1. Against its paper:
    any number of modalities, a map each (B14); no user bias and no global mean, which move
    no ranking. λ_E is a weight of its own (B35).
    """

    Settings = Settings
    SPACE = GRID | {"l2_content": (0.0, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)}
    width = 2

    def __init__(self, dataset: Dataset, config: Config, device: Device = "cpu"):
        super().__init__()
        self.config = config
        n_users, n_items = dataset.train.shape
        self.user = table(n_users, config.dim)
        self.item = table(n_items, config.dim)
        self.taste = table(n_users, config.dim)  # θ
        self.bias = nn.Parameter(torch.zeros(n_items, 1))  # β
        self.features = standardised(dataset, device)  # x̃^m [I, d_m]
        self.reduction = maps(self.features, config.dim + 1, bias=False)  # [W^m, β'^m]
        self.to(device)

    def forward(self) -> Pair:
        every = torch.arange(len(self.item), device=self.item.device)
        return self.users(), self.items(every)

    def users(self) -> Tensor:
        """[user, θ, 1]: [U, 2d + 1]."""
        one = torch.ones_like(self.user[:, :1])
        return torch.cat([self.user, self.taste, one], dim=1)

    def items(self, rows: Tensor) -> Tensor:
        """[item, c, β + x̃ β'] of items [n]: [n, 2d + 1]."""
        pairs = zip(self.reduction, self.features.values(), strict=True)
        content = torch.stack([reduced(layer, x, rows) for layer, x in pairs]).sum(0)
        taken, bias = content[:, :-1], content[:, -1:]  # [n, d], [n, 1]
        own = self.item.index_select(0, rows), self.bias.index_select(0, rows)
        return torch.cat([own[0], taken, own[1] + bias], dim=1)

    def terms(self, users: Tensor, lists: Tensor) -> Losses:
        item = self.items(lists.flatten()).view(*lists.shape, -1)  # [B, 2, 2d + 1]
        logits = torch.einsum("be,bke->bk", self.users().index_select(0, users), item)
        tables = [self.user, self.taste], [self.item, self.bias]
        terms = pair_terms(logits, self.config.l2, users, lists, *tables)
        if weight := self.config.l2_content:
            squares = [layer.weight.square().sum() for layer in self.reduction]
            terms["l2_content"] = weight * torch.stack(squares).sum() / 2
        return terms

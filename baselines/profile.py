"""What content knows before anything is trained: profiles, and LightGCN plus profiles.

Two rungs below the teacher: each says what the next one must beat.
"""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from data import Dataset
from evaluate import evaluate
from promptmm import Device, Graph, Pair

WEIGHTS = (
    0.0,
    0.05,
    0.1,
    0.2,
    0.3,
    0.5,
    0.7,
    1.0,
    1.5,
    2.0,
)  # of a profile beside LightGCN


def unit_rows(x: np.ndarray) -> Tensor:
    """x^m [I, d_m] centred over items that have content, unit rows; the rest is zero."""
    rows = torch.from_numpy(x)
    filled = (rows != 0).any(1, keepdim=True)  # [I, 1]
    mean = rows.sum(0) / filled.sum().clamp(min=1)
    return F.normalize((rows - mean) * filled, dim=1)


def profile(train: sparse.csr_matrix, x: np.ndarray, device: Device = "cpu") -> Pair:
    """A user is what their items contain, Â_ui x̂: train [U, I], x^m [I, d_m] -> d_m."""
    item = unit_rows(x).to(device)
    return Graph(train, device).to_users(item), item


def one_scale(pair: Pair) -> Pair:
    """The same ranking, its scores over each user's standard deviation over all items.

    The deviation of ⟨e_u, e_i⟩ over i is √(e_uᵀ C e_u), C the items' covariance: no array
    [U, I]. A user to whom all items are equal becomes zero.
    """
    user, item = pair
    centred = item - item.mean(0)
    covariance = centred.T @ centred / len(item)  # C [e, e]
    variance = ((user @ covariance) * user).sum(1, keepdim=True)  # [U, 1]
    deviation = variance.clamp(min=1e-24).sqrt()
    return torch.where(variance > 1e-24, user / deviation, 0.0), item


def fuse(pairs: list[Pair], weights: list[float]) -> Pair:
    """The weighted sum of rankings, as embeddings side by side: [U, Σ e], [I, Σ e]."""
    kept = [(w * user, item) for w, (user, item) in zip(weights, pairs, strict=True) if w]
    users, items = zip(*kept, strict=True)
    return torch.cat(users, dim=1), torch.cat(items, dim=1)


def late_fusion(dataset: Dataset, lightgcn: Pair) -> tuple[Pair, dict[str, float]]:
    """LightGCN + Σ_m w_m profile of m, each w_m by a line search on validation Recall@20.

    One modality after the other, as the data name them, from w = 0, which a useless one
    keeps. Returns the fused embeddings and the weights.
    """
    train, device = dataset.train, lightgcn[0].device
    profiles = [profile(train, x, device) for x in dataset.features.values()]
    pairs = [one_scale(pair) for pair in (lightgcn, *profiles)]
    weights = [1.0] + [0.0] * len(profiles)

    def validation(m: int, weight: float) -> float:
        candidate = [*weights[:m], weight, *weights[m + 1 :]]
        fused = fuse(pairs, candidate)
        return evaluate(*fused, dataset.val, exclude=train)["recall@20"]

    for m in range(1, len(pairs)):
        tried = {weight: validation(m, weight) for weight in WEIGHTS}
        weights[m] = max(WEIGHTS, key=tried.__getitem__)  # the smallest of equals
    return fuse(pairs, weights), dict(zip(dataset.features, weights[1:], strict=True))

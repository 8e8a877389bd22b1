"""What content knows before anything is trained: profiles, and LightGCN plus profiles.

Two rungs below the teacher: each says what the next one must beat.
"""

import numpy as np
import torch
from scipy import sparse

from data import Dataset, unit_rows
from evaluate import fuse, line_search, one_scale
from promptmm import Device, Graph, Pair


def profile(train: sparse.csr_matrix, x: np.ndarray, device: Device = "cpu") -> Pair:
    """A user is what their items contain, Â_ui x̂: train [U, I], x^m [I, d_m] -> d_m."""
    item = unit_rows(torch.from_numpy(x).to(device, torch.float32))
    return Graph(train, device).to_users(item), item


def late_fusion(dataset: Dataset, lightgcn: Pair) -> tuple[Pair, dict[str, float]]:
    """LightGCN + Σ_m w_m profile of m, each w_m found as the teacher's are.

    Returns the fused embeddings and the weights.
    """
    device = lightgcn[0].device
    profiles = [profile(dataset.train, x, device) for x in dataset.features.values()]
    pairs = [lightgcn, *profiles]
    weights = line_search(pairs, dataset.train, dataset.val)
    fused = fuse([one_scale(pair) for pair in pairs], [1.0, *weights])
    return fused, dict(zip(dataset.features, weights, strict=True))

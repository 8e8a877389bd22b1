"""What the comparison models share.

    train                               one model of MODELS, by the core's own loop
    pair_terms, l2_term                 BPR, and ‖Θ‖² on the batch's rows of some tables
    raw, directions, standardised       features, as a model's paper takes them
    filled                              which items have any
    linear, maps, reduced               maps of features, of all items or the batch's alone
    nearest, cosines, normalised        an item graph; LATTICE and FREEDOM stand on it
    read, constant                      Σ_j s_ij item_j, with a gradient for s, or none

A model's file says how it uses them.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor, nn

from data import Dataset
from evaluate import CHUNK_SCORES, top_items
from losses import bpr_loss, l2_penalty
from promptmm import Device, Losses, Pair, Run, csr_tensor, fit, load_finished, setting

GRID = {
    "lr_student": (1e-3, 2e-3, 5e-3, 1e-2, 2e-2),
    "l2": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "batch": (0, 2048, 4096, 8192),
}
of_model = partial(setting, of="model")  # a field that is one model's own


def train(run: Run, kind: type) -> Pair:
    """One model of MODELS, trained as the student is: the selected epoch's embeddings.

    run.config: the model's own Settings. Its step is `lr_student`.
    """
    torch.manual_seed(run.config.seed)
    model = kind(run.dataset, run.config, run.device)
    groups = [{"params": model.parameters(), "lr": run.config.lr_student}]
    each_epoch = getattr(model, "each_epoch", None)
    if not load_finished(run, "model", model):
        fit(run, "model", model, groups, model.width, model.terms, model, each_epoch)
    model.eval()
    with torch.no_grad():
        user, item = model()
    return user.detach(), item.detach()  # a model may return its very tables


def l2_term(weight: float, *rows: Tensor) -> Losses:
    """‖Θ‖² on the batch's rows of the tables (errata P8, B4); no term without a weight."""
    return {"l2": weight * l2_penalty(*rows)} if weight else {}


def pair_terms(
    logits: Tensor,
    weight: float,
    users: Tensor,
    lists: Tensor,
    of_users: list[Tensor],
    of_items: list[Tensor],
) -> Losses:
    """BPR of logits [B, 2], and ‖Θ‖² on the batch's rows of these tables."""
    rows = [table.index_select(0, users) for table in of_users]
    rows += [table.index_select(0, lists.flatten()) for table in of_items]
    return {"bpr": bpr_loss(logits[:, 0], logits[:, 1])} | l2_term(weight, *rows)


# ------------------------------------------------------------ features


def raw(dataset: Dataset, device: Device) -> dict[str, Tensor]:
    """x^m [I, d_m] as read, but for a scale: squares of the largest could overflow."""
    features = {}
    for m, x in dataset.features.items():
        x = torch.from_numpy(x).to(device, torch.float32)
        features[m] = x / x.abs().amax().clamp(min=1e-30)
    return features


def directions(dataset: Dataset, device: Device) -> dict[str, Tensor]:
    """x^m as unit rows, not centred: what the published models take cosines of (B7)."""
    return {m: F.normalize(x, dim=1) for m, x in raw(dataset, device).items()}


def standardised(dataset: Dataset, device: Device) -> dict[str, Tensor]:
    """x^m with columns of mean 0 and deviation 1, what linear maps read (B7).

    Over the items that have content; the others' rows stay zero, as constant columns do.
    """
    features = {}
    for m, x in raw(dataset, device).items():
        filled = x.any(1, keepdim=True)  # [I, 1]
        count = filled.sum().clamp(min=1)
        x = (x - x.sum(0) / count) * filled
        deviation = (x.square().sum(0) / count).sqrt()  # [d_m]
        real = deviation > 1e-6 * deviation.amax()
        features[m] = x * real / torch.where(real, deviation, 1.0)
    return features


def filled(features: dict[str, Tensor]) -> list[Tensor]:
    """Which items have content, for each modality: [I, 1] each.

    A mapped row is taken times this: where x is zero, it is what the bias says, and a zero
    row's length has a gradient without bound (B8).
    """
    return [x.any(1, keepdim=True) for x in features.values()]


def linear(width: int, out: int, bias: bool = True) -> nn.Linear:
    """x W + b as every map here starts: Xavier, b zero."""
    layer = nn.Linear(width, out, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def maps(features: dict[str, Tensor], out: int, bias: bool = True) -> nn.ModuleList:
    """A map to `out` numbers for each modality."""
    return nn.ModuleList(linear(x.shape[1], out, bias) for x in features.values())


def reduced(layer: nn.Linear, x: Tensor, items: Tensor) -> Tensor:
    """layer(x) of items [n]: of these rows alone if they are fewer than all, [n, out]."""
    if len(items) < len(x):
        return layer(x.index_select(0, items))
    return layer(x).index_select(0, items)


# ------------------------------------------------------------ the item graph


class Links(NamedTuple):
    """Who reads whom, in the order of `rows`: items items, or either side the other."""

    rows: Tensor  # [n], ascending
    columns: Tensor  # [n]
    start: Tensor  # where each row begins [rows + 1]


def starts(count: Tensor) -> Tensor:
    """Where each row begins, and the end, of how many links each has: [n] -> [n + 1]."""
    return F.pad(count.cumsum(0), (1, 0))


def nearest(x: Tensor, k: int) -> Links:
    """Each item's k nearest by cosine, itself among them: x [I, d], of any scale.

    A zero row takes no part, on either side (B8). Equal cosines go to the lower index: in
    float32 equal rows would be rounded apart, by the place that they have in a product.
    Found in chunks: no [I, I] array is made.
    """
    filled = x.any(1)  # [I]
    items = filled.nonzero().flatten()  # [n], ascending
    x = F.normalize(x[items], dim=1).double()
    k = min(k, len(items))
    chunk = max(1, CHUNK_SCORES // max(1, len(items)))
    found = [top_items((some @ x.T).float(), k)[1] for some in x.split(chunk)]
    columns = items[torch.cat(found).flatten()]  # [n k]
    return Links(items.repeat_interleave(k), columns, starts(k * filled))


def cosines(x: Tensor, links: Links) -> Tensor:
    """The links' cosines, negative ones as 0, with a gradient: x [I, d] -> [n]."""
    x = F.normalize(x, dim=1)
    ends = x.index_select(0, links.rows), x.index_select(0, links.columns)  # [n, d] each
    return (ends[0] * ends[1]).sum(1).clamp(min=0)


def row_sums(links: Links, weight: Tensor) -> Tensor:
    """D: the sum of each row's weights [n] -> [I]."""
    return weight.new_zeros(len(links.start) - 1).index_add(0, links.rows, weight)


def normalised(links: Links, weight: Tensor, degree: Tensor) -> Tensor:
    """D^-1/2 S D^-1/2 with row sums D on both sides, though S is not symmetric: [n].

    >>> links = nearest(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]), 2)
    >>> weight = torch.tensor([1.0, 0.6, 1.0, 0.8, 1.0, 0.8])
    >>> normalised(links, weight, row_sums(links, weight))[:2].mul(1e4).round().tolist()
    [6250.0, 3536.0]
    """
    scale = degree.clamp(min=1e-12).rsqrt()  # [I]
    return weight * scale.index_select(0, links.rows) * scale.index_select(0, links.columns)


def read(links: Links, weight: Tensor, x: Tensor) -> Tensor:
    """Σ_j s_ij x_j, with a gradient for weights [n] and x [columns, d] -> [rows, d]."""
    return F.embedding_bag(
        links.columns,
        x,
        links.start,
        mode="sum",
        per_sample_weights=weight,
        include_last_offset=True,
    )


def constant(parts: list[tuple[Links, Tensor]], device: Device) -> Pair:
    """The sum of weighted links as a matrix without gradient, and its transpose: [I, I].

    What `promptmm.Product` multiplies by.
    """
    matrices = []
    for links, weight in parts:
        cells = (weight.detach(), links.columns, links.start)
        n_items = len(links.start) - 1
        arrays = tuple(part.cpu().numpy() for part in cells)
        matrices.append(sparse.csr_matrix(arrays, shape=(n_items, n_items)))
    total = sum(matrices[1:], matrices[0])
    total.sort_indices()
    return csr_tensor(total, device), csr_tensor(total.T.tocsr(), device)

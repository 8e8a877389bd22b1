"""What KDSR reads off the fixed features: nothing here is trained with the student.

Marks as in correlation.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from data import principal

# ------------------------------------------------------------ features


def centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """KDSR.0: x^m [I, d_m] centred over the rows that have content, and which have [I].

    Empty rows are 0, not minus the mean: they would all be one item (S8). The root mean
    square of the other rows' norms is 1.
    """
    filled = x.any(1)  # [I]
    x = x / x.abs().amax().clamp(min=1e-30)  # squares could overflow
    content = filled.sum().clamp(min=1)
    x = (x - x.sum(0) / content) * filled[:, None]
    size = (x.square().sum() / content).sqrt()
    return x / size.clamp(min=1e-30), filled


def content_start(features: list[Tensor], dim: int) -> Tensor:
    """KDSR.8: the leading components of [x^1 | x^2 | …], not whitened, [I, d_m] -> [I, d].

    Whitened ones would not keep the correlations. Scaled to Xavier's deviation; columns
    beyond the rank are zero.
    """
    x = torch.cat(features, dim=1)  # [I, Σ d_m]
    axes, _ = principal(x, dim)  # [Σ d_m, k]
    start = F.pad(x @ axes, (0, max(0, dim - axes.shape[1])))  # [I, d]
    deviation = (2 / (len(x) + dim)) ** 0.5
    return start * (deviation / start.square().mean().sqrt().clamp(min=1e-30))


# ------------------------------------------------------------ relations


def some_pairs(filled: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """At most n pairs of different items that have content, of [I]; always the same."""
    generator = torch.Generator().manual_seed(0)
    items = filled.nonzero().flatten()
    drawn = torch.randint(max(1, len(items)), (2, n), generator=generator)
    first, second = items[drawn.to(items.device)] if len(items) else items.expand(2, 0)
    apart = first != second
    return first[apart], second[apart]


def sub_cosines(a: Tensor, b: Tensor, parts: int) -> Tensor:
    """KDSR.4: cosines of `parts` consecutive parts; [P, d_m] twice -> [P, D].

    An empty part counts 0. Raises ValueError for more parts than d_m.

    >>> a, b = torch.tensor([[1.0, 0, 1, 0]]), torch.tensor([[1.0, 1, -1, 0]])
    >>> [round(r, 4) for r in sub_cosines(a, b, 2)[0].tolist()]
    [0.7071, -1.0]
    """
    if parts > a.shape[1]:
        raise ValueError(f"parts: expected at most d_m = {a.shape[1]}, found {parts}")
    pairs = zip(a.tensor_split(parts, 1), b.tensor_split(parts, 1), strict=True)
    return torch.stack([F.cosine_similarity(*pair, dim=1) for pair in pairs], dim=1)


def parts_of(x: Tensor, parts: int) -> Tensor:
    """`tensor_split`'s parts of x [I, d_m], zeros at the end of shorter ones: [I, D, k]."""
    width = -(-x.shape[1] // parts)  # k
    each = x.tensor_split(parts, 1)
    return torch.stack([F.pad(part, (0, width - part.shape[1])) for part in each], dim=1)


@torch.no_grad()
def codebook(
    relations: Tensor, codes: int, generator: torch.Generator, steps: int = 20
) -> Tensor:
    """KDSR.5: centroids [codes, D] of relations [N, D], by Lloyd's k-means.

    A code without members stays where it is. Raises ValueError for more codes than points.

    >>> points = torch.tensor([[0.0], [0.1], [1.0], [1.1]])
    >>> sorted(codebook(points, 2, torch.Generator().manual_seed(0)).flatten().tolist())
    [0.05000000074505806, 1.0499999523162842]
    """
    if codes > len(relations):
        raise ValueError(f"codes: expected at most {len(relations)}, found {codes}")
    first = torch.randperm(len(relations), generator=generator)[:codes]
    centres = relations[first.to(relations.device)]  # [codes, D]
    for _ in range(steps):
        code = nearest(relations, centres)  # [N]
        count = code.bincount(minlength=codes)[:, None]  # [codes, 1]
        sums = torch.zeros_like(centres).index_add_(0, code, relations)
        means = sums / count.clamp(min=1)
        centres = torch.where(count > 0, means, centres)
    return centres


def nearest(relations: Tensor, centres: Tensor) -> Tensor:
    """The code of each relation: [P, D], [codes, D] -> [P] long."""
    return (centres.square().sum(1) - 2 * relations @ centres.T).argmin(1)  # less ‖r‖²

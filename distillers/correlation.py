"""KDSR: correlations of the fixed features supervise the student's item table.

Hu et al., "Lightweight Modality Adaptation to Sequential Recommendation via Correlation
Supervision", ECIR 2024.

We had the abstract and the released code, not the paper: numbers KDSR.0-10 are ours. Marks:
[text] abstract, [code] released, [ours]. The ids S1-S12 are in docs/differences.md.

No teacher is trained: content itself teaches. The student's one item table e⁰ stands for
the released modality tables [ours], and pairs are of one user's history or uniform (S1).

    KDSR.2   ĉ_ij = cos(V e_i, V e_j),  C_ij = cos(x_i, x_j)
    KDSR.3   holistic = mean of (ĉ_ij - C_ij)²                     [code] but for S6
    KDSR.4   r_ij: cosines of D parts of x_i and x_j               [code]
    KDSR.5   code_ij: the nearest of k-means' centroids of r       [code]
    KDSR.6   dissected = mean of CE(MLP(|ê_i - ê_j|), code_ij)     [code] but for S10
    KDSR.8   e⁰ starts at the content's principal components       [ours]
    KDSR.9   the item table learns `slow` times more slowly        [text]
    KDSR.10  L = BPR + ‖Θ‖² + λ_h Σ_m holistic_m + λ_d Σ_m dissected_m

Both losses compare the layer-0 rows, on which the start and the slow step act too (S12).
There is no list, so no sampler to choose.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Sampler
from distillers.common import Teachers, of_method
from distillers.content import (
    centred,
    codebook,
    content_start,
    nearest,
    parts_of,
    some_pairs,
    sub_cosines,
)
from promptmm import Config, Losses, Pair, Run, Student

Valid = Tensor | None  # [P] bool: pairs of two different items that have content

# ------------------------------------------------------------ losses


def holistic_kd(
    student_cosine: Tensor, teacher_cosine: Tensor, valid: Valid = None
) -> Tensor:
    """KDSR.3: mean over the valid pairs of (ĉ - C)²; [P], [P], [P] -> [].

    A mean of squares; the released Frobenius norm grows with a history's length (S6).

    >>> round(holistic_kd(torch.tensor([0.5**0.5]), torch.tensor([1.0])).item(), 4)
    0.0858
    """
    return _mean((student_cosine - teacher_cosine).square(), valid)


def dissected_kd(logits: Tensor, code: Tensor, valid: Valid = None) -> Tensor:
    """KDSR.6: cross-entropy, mean over the valid pairs; [P, codes], [P], [P] -> [].

    Hard labels, as released; "soft matching" is a summary's word (S4).

    >>> round(dissected_kd(torch.tensor([[1.0, 0.0]]), torch.tensor([0])).item(), 4)
    0.3133
    """
    return _mean(F.cross_entropy(logits, code, reduction="none"), valid)


def _mean(values: Tensor, valid: Valid) -> Tensor:
    """Over the valid pairs [P]; 0 with no gradient if there is none."""
    if valid is None:
        return values.mean()
    return torch.where(valid.bool(), values, 0.0).sum() / valid.sum().clamp(min=1)


# ------------------------------------------------------------ the method


@dataclass(frozen=True)
class Settings(Config):
    """The student's, and KDSR's own. Released values are those for Beauty."""

    lambda_holistic: float = of_method(1.0, "λ_h (ours; released: 4, of a norm)")
    lambda_dissected: float = of_method(0.1, "λ_d (ours; released: 0.5)")
    codes: int = of_method(50, "types of relation (released)", low=1)
    parts: int = of_method(8, "D, parts of x^m that r compares (released)", low=1)
    start: str = of_method(
        "content", "of the item table (released: features)", ("content", "fresh")
    )
    slow: float = of_method(4.0, "KDSR.9 (released: 4, but off)", low=1)
    pairs: int = of_method(512, "P, of history and of uniform pairs (ours)", low=1)


class Modality(nn.Module):
    """One modality's constants, and what is trained beside the student for it."""

    def __init__(self, x: Tensor, filled: Tensor, config: Settings):
        super().__init__()
        self.filled = filled  # [I]
        self.parts = parts_of(x, min(config.parts, x.shape[1]))  # [I, D, k]
        self.size = self.parts.norm(dim=2)  # [I, D]
        first, second = some_pairs(filled, 20_000)  # [N] each, once
        relations = sub_cosines(x[first], x[second], self.parts.shape[1])  # [N, D]
        size = min(config.codes, len(relations))
        generator = torch.Generator().manual_seed(0)  # the same labels for every seed
        self.centres = codebook(relations, size, generator) if size else None
        dim = config.dim
        self.turn = nn.Linear(dim, dim, bias=False)  # V^m: a bias would raise all cosines
        nn.init.eye_(self.turn.weight)
        last = nn.Linear(dim, max(1, size))
        self.classify = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), last)  # MLP^m

    def correlations(self, i: Tensor, j: Tensor) -> Pair:
        """C [P] and r [P, D] of items i, j [P] from one product (KDSR.1, KDSR.4).

        r is `sub_cosines`, with each part's norm at hand; a test holds them equal.
        """
        product = self.parts.index_select(0, i).mul_(self.parts.index_select(0, j))
        dots = product.sum(2)  # [P, D]
        sizes = self.size[i], self.size[j]  # [P, D] each
        whole = sizes[0].norm(dim=1) * sizes[1].norm(dim=1)  # [P]
        content = dots.sum(1) / whole.clamp(min=1e-12)
        return content, dots / (sizes[0] * sizes[1]).clamp(min=1e-12)

    def valid(self, i: Tensor, j: Tensor) -> Tensor:
        """[P] bool: two different items, both with content of this modality."""
        return (i != j) & self.filled[i] & self.filled[j]

    def holistic(self, a: Tensor, b: Tensor, content: Tensor, valid: Tensor) -> Tensor:
        """KDSR.3 for rows a, b [P, d] of e⁰ whose items have C [P]."""
        own = F.cosine_similarity(self.turn(a), self.turn(b), dim=1)  # ĉ [P]
        return holistic_kd(own, content, valid)

    def dissected(self, a: Tensor, b: Tensor, relations: Tensor, valid: Tensor) -> Tensor:
        """KDSR.6 for r [P, D]; unit rows, as a norm carries popularity (S10)."""
        if self.centres is None:
            return a.sum() * 0
        apart = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).abs()  # [P, d]
        return dissected_kd(self.classify(apart), nearest(relations, self.centres), valid)


class KDSR:
    """Needs no teacher (KDSR.10)."""

    Settings = Settings
    SPACE = {
        "lambda_holistic": (0.1, 0.3, 1.0, 3.0, 10.0),
        "lambda_dissected": (0.0, 0.01, 0.1, 1.0),
        "start": ("fresh", "content"),
        "slow": (1.0, 2.0, 4.0),
    }
    width = 2
    each_epoch = extend = None

    @staticmethod
    def needs(config: Config) -> tuple[str, ...]:
        return ()

    def __init__(self, run: Run, student: Student, teachers: Teachers):
        config: Settings = run.config
        self.config, self.student = config, student
        self.slow = config.slow
        self.sampler = Sampler(run.dataset.train, run.device)
        raw = [torch.from_numpy(x).to(run.device) for x in run.dataset.features.values()]
        content = [centred(x.float()) for x in raw]
        self.modalities = [Modality(*each, config).to(run.device) for each in content]
        self.modules = self.trained()
        if config.start == "content":
            some = torch.stack([filled for _, filled in content]).any(0)[:, None]  # [I, 1]
            start = content_start([x for x, _ in content], config.dim)  # [I, d]
            # An item without any content keeps Xavier's row [ours].
            student.item.data = torch.where(some, start, student.item.data)

    def trained(self) -> dict[str, nn.Module]:
        """V^m and MLP^m of the losses that have a weight."""
        modules = {}
        for m, one in enumerate(self.modalities):
            if self.config.lambda_holistic:
                modules[f"turn_{m}"] = one.turn
            if self.config.lambda_dissected:
                modules[f"classify_{m}"] = one.classify
        return modules

    def history(self, users: Tensor) -> Tensor:
        """A training item of each user [B]: it may be the one already at hand."""
        start, item = self.sampler.start, self.sampler.item  # in the order of users
        count = start[users + 1] - start[users]
        place = (torch.rand(len(users), device=users.device) * count).long()
        return item[start[users] + place.minimum(count - 1)]

    def pairs(self, users: Tensor, lists: Tensor) -> Pair:
        """KDSR.7: min(P, B) pairs of one user's history and P uniform ones, twice (S1)."""
        n, n_items = self.config.pairs, len(self.student.item)
        first = torch.randint(n_items, (n,), device=users.device)
        beyond = torch.randint(1, max(2, n_items), (n,), device=users.device)
        second = (first + beyond) % n_items  # never the first
        others = self.history(users[:n])
        return torch.cat([lists[:n, 0], first]), torch.cat([others, second])

    def terms(self, student_user, student_item, logits, users, lists: Tensor) -> Losses:
        """KDSR.10 beyond BPR and ‖Θ‖²; each λ scales its own term only (S2)."""
        config, table = self.config, self.student.item
        if not (config.lambda_holistic or config.lambda_dissected):
            return {}
        i, j = self.pairs(users, lists)  # [n] each
        a, b = table.index_select(0, i), table.index_select(0, j)  # [n, d]
        holistic, dissected = [], []
        for one in self.modalities:
            (content, relations), valid = one.correlations(i, j), one.valid(i, j)
            if config.lambda_holistic:
                loss = one.holistic(a, b, content, valid)
                holistic.append(config.lambda_holistic * loss)
            if config.lambda_dissected:
                loss = one.dissected(a, b, relations, valid)
                dissected.append(config.lambda_dissected * loss)
        losses = {"holistic_kd": holistic, "dissected_kd": dissected}
        return {name: torch.stack(each).sum() for name, each in losses.items() if each}

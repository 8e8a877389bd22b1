"""PRM-KD: several teachers at once, each weighted by confidence and consistency.

Sun et al., "Distillation is All You Need for Practically Using Different Pre-trained
Recommendation Models", arXiv 2401.00797 (its v2 is renamed CKD-MDSR).

We had a summary, not the paper, and no code was found. Known are several frozen teachers,
weighted by confidence and consistency [text]. *Every formula here is a stand-in* [ours].
The tables say "PRM-KD (ours after 002)"; the ids R1-R8 are in docs/differences.md.

    PRM.1  ỹ_t = (σ_ref / σ_t) y_t: one scale for all teachers, that of `joint`
    PRM.2  p_t = softmax(ỹ_t / τ), p_S = softmax(y / τ) on the batch's lists [B, K]
    PRM.3  confidence_t = log p_t of the observed item
    PRM.4  js_t = JS(p_t ‖ mean of the other teachers' p) / ln 2, in [0, 1]
    PRM.5  w_t = softmax over t of α confidence_t - β js_t, a constant
    PRM.6  L = BPR + ‖Θ‖² + λ τ² mean_b Σ_t w_t KL(p_t ‖ p_S)
    PRM.7  curriculum: at first only the pairs of often seen users and items (off)

Σ_t w_t KL(p_t ‖ p_S) = KL(Σ_t w_t p_t ‖ p_S) + a constant: distilling from many teachers
is distilling from one mixture, and all that the weights do is choose it.

The summary leaves the lists open (R5), so they are PromptMM's: an observed item, a random
one, and of the joint teacher's best items (`list_items`), or all random. σ_t of PRM.1 is
measured on random ones (R3).
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import svds
from torch import Tensor

from data import Sampler
from distillers.common import Teachers, lists_of, of_method, with_drawn
from losses import kl_rows
from promptmm import Config, Device, Losses, Pair, Run, Student, adjacency, scores

LISTS = 4096  # of training edges, by which a teacher's scale is measured, once
TEACHERS = ("all", "joint", "modal", "lightgcn", "spectral")
# ------------------------------------------------------------ weights and loss


@torch.no_grad()
def teacher_weights(
    log_p: Tensor, confidence: float = 1.0, consistency: float = 1.0
) -> Tensor:
    """PRM.3-5 [ours]: log-probabilities [T, B, K] -> [T, B], no gradient.

    For T = 2, α = 1, β = 0 it equals CA-MKD (Zhang et al., ICASSP 2022; R1).

    >>> logits = torch.tensor([[2.0, 1, 0], [1.0, 1, 0], [0.0, 1, 2]])[:, None]
    >>> weights = teacher_weights(logits.log_softmax(-1))
    >>> [round(w, 4) for w in weights[:, 0].tolist()]
    [0.5493, 0.3855, 0.0653]
    """
    apart = [_divergence(log_p, t) for t in range(len(log_p))]  # [B] each
    return (confidence * log_p[..., 0] - consistency * torch.stack(apart)).softmax(0)


def _divergence(log_p: Tensor, t: int) -> Tensor:
    """PRM.4: JS of p_t and the mean of the *other* teachers, [T, B, K] -> [B]."""
    others = torch.cat([log_p[:t], log_p[t + 1 :]])  # [T - 1, B, K]
    own = log_p[t]  # [B, K]
    if not len(others):
        return torch.zeros_like(own[:, 0])
    mean = others.logsumexp(0) - math.log(len(others))  # [B, K]
    middle = torch.logaddexp(own, mean) - math.log(2)  # [B, K]
    halves = kl_rows(own, middle) + kl_rows(mean, middle)  # [B]
    return (halves / 2 / math.log(2)).clamp(0, 1)


def multi_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    weights: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """PRM.6 [ours]: τ² mean over B of Σ_t w_t KL(p_t ‖ p_S).

    [B, K], [T, B, K], [T, B] -> []. With one teacher, or equal ones, `losses.kl`. Raises
    ValueError for K = 1 or T = 0.

    >>> student, weights = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0.8808], [0.1192]])
    >>> teachers = torch.tensor([[[2.0, 1, 0]], [[0.0, 1, 2]]])
    >>> round(multi_kd(student, teachers, weights).item(), 4)
    0.1224
    """
    if not len(teacher_logits) or student_logits.shape[-1] < 2:
        found = tuple(teacher_logits.shape)
        raise ValueError(f"teachers: expected [T, B, K], T ≥ 1 and K ≥ 2, found {found}")
    student = (student_logits / temperature).log_softmax(-1)  # [B, K]
    teacher = (teacher_logits / temperature).log_softmax(-1)  # [T, B, K]
    rows = (weights * kl_rows(teacher, student)).sum(0)  # [B]
    return temperature**2 * rows.mean()


# ------------------------------------------------------------ teachers


def spectral(train: sparse.csr_matrix, dim: int, device: Device = "cpu") -> Pair:
    """A global, linear teacher in closed form: the SVD of Â_ui [ours]. [U, k], [I, k].

    User = UΣ, item = V √deg(i). A fixed start vector: it is the same each time.
    """
    n_users, shorter = train.shape[0], min(train.shape)
    a_ui = adjacency(train)[:n_users, n_users:].astype(np.float64)  # [U, I]
    k = max(1, min(dim, shorter - 1))
    left, values, right = svds(a_ui, k=k, v0=np.ones(shorter))
    degree = np.asarray(train.sum(0)).ravel()  # [I]
    pair = left * values, right.T * np.sqrt(degree)[:, None]
    user, item = (torch.from_numpy(part).float().to(device) for part in pair)
    return user, item


@torch.no_grad()
def size_of(pair: Pair, users: Tensor, lists: Tensor) -> float:
    """σ_t of PRM.1: root mean square of y - its list's mean; users [n], lists [n, K]."""
    y = scores(*pair, users, lists)  # [n, K]
    return float((y - y.mean(1, keepdim=True)).square().mean().sqrt())


# ------------------------------------------------------------ the method


@dataclass(frozen=True)
class Settings(Config):
    """The student's, and PRM-KD's own: the paper's values are not known."""

    lambda_prm: float = of_method(0.3, "λ of PRM.6 (ours)")
    confidence: float = of_method(1.0, "α of PRM.5 (ours)")
    consistency: float = of_method(1.0, "β of PRM.5 (ours)")
    temperature: float = of_method(1.0, "τ of PRM.2 (ours)", low=1e-3)
    negatives: int = of_method(10, "K-1, of a list (as PromptMM's)", low=1, high=1e5)
    list_items: str = of_method(
        "top", "negatives: the joint teacher's best, or any (R5)", ("top", "random")
    )
    list_pool: int = of_method(100, "N, best items that lists draw from", low=1)
    curriculum: int = of_method(0, "E_c of PRM.7, epochs; 0: off (ours)")
    taught_by: str = of_method("all", "which teachers (ours)", TEACHERS)


class PRMKD:
    """Needs PromptMM's teacher, "joint" and its modalities, and LightGCN (PRM.6)."""

    Settings = Settings
    SPACE = {
        "lambda_prm": (0.03, 0.1, 0.3, 1.0, 3.0),
        "confidence": (0.0, 1.0),
        "consistency": (0.0, 1.0, 4.0),
        "temperature": (1.0, 2.0),
        "negatives": (5, 10, 50),
        "list_items": ("top", "random"),
    }
    each_epoch, slow = None, 1.0

    @staticmethod
    def needs(config: Config) -> tuple[str, ...]:
        return ("joint", "lightgcn")

    def __init__(self, run: Run, student: Student, teachers: Teachers):
        self.config: Settings = run.config
        self.run, self.modules = run, {}
        config, train = self.config, run.dataset.train
        lists = lists_of(run, teachers["joint"])
        self.width, self.extend = lists.width, partial(with_drawn, lists)
        if config.taught_by in ("all", "spectral"):
            teachers = {**teachers, "spectral": spectral(train, 2 * config.dim, run.device)}
        self.sampler = Sampler(train, run.device)
        self.teachers = self.one_scale(teachers)
        self.ease = self.easy(self.sampler.user, self.sampler.item).sort().values  # [E]

    def easy(self, users: Tensor, items: Tensor) -> Tensor:
        """deg(u) · deg(i) of edges: [B] each -> [B]."""
        of_item = self.sampler.item.bincount(minlength=self.sampler.items)  # [I]
        return self.sampler.start.diff()[users] * of_item[items]

    def taking_part(self, users: Tensor, items: Tensor) -> Tensor:
        """PRM.7: 1 over the share of rows kept where a row is, else 0: [B].

        In epoch e the easiest min(1, e / E_c) of the training edges are kept.
        """
        whole = self.config.curriculum
        share = min(1.0, self.run.state.get("epoch", whole) / whole)
        last = int((1 - share) * len(self.ease))
        kept = (self.easy(users, items) >= self.ease[last]).float()
        return kept / kept.mean().clamp(min=1 / len(kept))

    def terms(self, student_user, student_item, logits, users, lists: Tensor) -> Losses:
        """PRM.6 beyond BPR and ‖Θ‖²."""
        config = self.config
        if not config.lambda_prm:
            return {}
        told = torch.stack([scores(*pair, users, lists) for pair in self.teachers])
        log_p = (told / config.temperature).log_softmax(-1)  # [T, B, K]
        weights = teacher_weights(log_p, config.confidence, config.consistency)  # [T, B]
        if config.curriculum:
            weights = weights * self.taking_part(users, lists[:, 0])
        loss = multi_kd(logits, told, weights, config.temperature)
        return {"multi_kd": config.lambda_prm * loss}

    def one_scale(self, teachers: Teachers) -> list[Pair]:
        """PRM.1, once: lists of training edges by a generator of their own (R3)."""
        generator = torch.Generator(self.run.device).manual_seed(0)
        samples = self.sampler.epoch(generator, self.config.negatives)
        users, lists = (part[:LISTS] for part in samples)
        reference = size_of(teachers["joint"], users, lists)
        scaled = []
        for name, (user, item) in teachers.items():
            kind = name if name in TEACHERS else "modal"
            ratio = reference / max(1e-12, size_of((user, item), users, lists))
            if self.config.taught_by in ("all", kind):
                scaled.append((user * min(ratio, 1e6), item))  # a constant stays one
        return scaled

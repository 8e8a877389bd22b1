"""The objective, term by term: three distillation losses, and BPR (Section 3.2).

Pure functions of tensors and numbers, each a mean over batch or items, so that no weight
depends on the batch size (errata P8). `list_kd` and `embed_kd` take one target: for lists
that is the joint teacher's logits by default, or one modality's (errata P14); the caller
sums. Nothing here detaches an argument: prompt tuning needs the gradient on the teacher's
side.

Read in the paper's order: Eq. 5, 6-7, 8-10 and 14-16, 11, 13; `promptmm.student_terms` adds
them up (Eq. 12).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------ pair-wise


def pair_kd(
    student_margin: Tensor, teacher_margin: Tensor, temperature: float = 1.0
) -> Tensor:
    """Pair-wise distillation (Eq. 5, corrected: errata P1): is i+ better than i- for u?

        τ² · mean [ t log(t / s) + (1-t) log((1-t) / (1-s)) ]

        t = σ(Δ_T / τ),  s = σ(Δ_S / τ),  Δ = e_u·e_i+ - e_u·e_i-

    margins [B] -> []. The two sides of the binary question sum to one, which the printed
    formula's do not: so this is a divergence, zero exactly where the margins agree.

    >>> round(pair_kd(torch.tensor([0.0]), torch.tensor([2.0])).item(), 4)
    0.3278
    """
    student = student_margin / temperature  # [B]
    teacher = teacher_margin / temperature  # [B]
    better = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))  # [B]
    worse = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))  # [B]
    return temperature**2 * (better + worse).mean()


# ------------------------------------------------------------ list-wise


def disentangle(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Split a list's softmax in two (Eq. 6, 7; errata P4, P5). Column 0 is the positive.

        b = [b+, 1 - b+],  b+ = exp(y_1) / Σ_j exp(y_j):  positive or not    (Eq. 6)
        q_k = exp(y_k) / Σ_{j≥2} exp(y_j):  negatives among themselves       (Eq. 7)

    logits [B, K], K ≥ 2 -> (log b [B, 2], log q [B, K-1]); finite for logits of ±1e4.
    Raises ValueError for K < 2.

    >>> log_b, log_q = disentangle(torch.tensor([[2.0, 1.0, 0.0]]))
    >>> [round(b, 4) for b in log_b.exp()[0].tolist()]
    [0.6652, 0.3348]
    >>> [round(q, 4) for q in log_q.exp()[0].tolist()]
    [0.7311, 0.2689]
    """
    if logits.shape[-1] < 2:
        raise ValueError(f"a list: expected K ≥ 2, found K = {logits.shape[-1]}")
    positive = logits[:, :1]  # [B, 1]
    negatives = logits[:, 1:]  # [B, K-1]
    whole = logits.logsumexp(-1, keepdim=True)  # [B, 1]
    rest = negatives.logsumexp(-1, keepdim=True)  # [B, 1]
    log_b = torch.cat([positive, rest], dim=-1) - whole  # Eq. 6  [B, 2]
    log_q = negatives - rest  # Eq. 7  [B, K-1]
    return log_b, log_q


def list_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    alpha: float = 1.0,
    beta: float | str = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """List-wise distillation from one target: Eq. 10, signs corrected (errata P2).

        τ² · mean [ α KL(b_T ‖ b_S) + β KL(q_T ‖ q_S) ]

    logits [B, K] -> []. The paper's own weights are α = 1, β = b-_T = 1 - b+_T, and that is
    plain KL again. For π = softmax(y / τ): π_1 = b+ and π_k = b- q_k for k ≥ 2 (Eq. 9,
    Eq. 15), so

        KL(π_T ‖ π_S) = Σ_k π_k^T log(π_k^T / π_k^S)          (Eq. 14; k = 1 apart: Eq. 8)
                      = KL(b_T ‖ b_S) + b-_T KL(q_T ‖ q_S)    (Eq. 16)

    An identity re-weights nothing, so `beta="identity"` *is* the ablation "w/o disentangle"
    (errata P3). Constants α, β, free of the teacher's confidence, are the re-weighting
    (decoupled distillation, Zhao et al., CVPR 2022). Raises ValueError for any
    other string.

    >>> student, teacher = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    >>> round(list_kd(student, teacher, beta="identity").item(), 4)  # equals kl(...) below
    0.2662
    >>> round(list_kd(student, teacher, alpha=1.0, beta=8.0).item(), 4)
    1.1166
    """
    if isinstance(beta, str) and beta != "identity":
        raise ValueError(f"beta: expected a number or 'identity', found {beta!r}")
    log_b_s, log_q_s = disentangle(student_logits / temperature)
    log_b_t, log_q_t = disentangle(teacher_logits / temperature)
    weight = log_b_t[:, 1].exp() if isinstance(beta, str) else beta  # b-_T = 1 - b+_T
    on_b = kl_rows(log_b_t, log_b_s)  # [B]
    on_q = kl_rows(log_q_t, log_q_s)  # [B]
    return temperature**2 * (alpha * on_b + weight * on_q).mean()


def kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The plain list-wise divergence (Eq. 14): τ² · mean KL(π_T ‖ π_S).

    logits y [B, K] on both sides -> []; π = softmax(y / τ) (errata P4).

    >>> student, teacher = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    >>> round(kl(student, teacher).item(), 4)
    0.2662
    """
    student = (student_logits / temperature).log_softmax(-1)  # [B, K]
    teacher = (teacher_logits / temperature).log_softmax(-1)  # [B, K]
    return temperature**2 * kl_rows(teacher, student).mean()


def kl_rows(log_t: Tensor, log_s: Tensor) -> Tensor:
    """KL(t ‖ s) of each row of log-probabilities: [..., K], [..., K] -> [...]."""
    return (log_t.exp() * (log_t - log_s)).sum(-1)


# ------------------------------------------------------------ embeddings


def embed_kd(student_item: Tensor, modal_item: Tensor, gamma: float = 2.0) -> Tensor:
    """Embedding distillation of one modality, the scaled cosine error (Eq. 11; errata P7).

        mean over items of (1 - cos(e_i, f_i))^γ,   γ ≥ 1

    student_item, mapped to the teacher's width, and modal_item: [n, d_T] each -> []; items
    only, as users have no content. A row without a direction (norm < 1e-6 on either side)
    counts as cos = 0 and sends no gradient. Raises ValueError for γ < 1.

    >>> student = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> modal = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    >>> round(embed_kd(student, modal).item(), 4)  # (0 + (1 - 0.7071)²) / 2
    0.0429
    """
    if gamma < 1:
        raise ValueError(f"gamma: expected at least 1, found {gamma}")
    student_norm = student_item.norm(dim=-1)  # [n]
    modal_norm = modal_item.norm(dim=-1)  # [n]
    directed = (student_norm >= 1e-6) & (modal_norm >= 1e-6)  # [n]
    # The quotient must be safe on *both* branches of `where`, or backward makes NaN.
    product = torch.where(directed, student_norm * modal_norm, 1.0)  # [n]
    dot = (student_item * modal_item).sum(-1)  # [n]
    cosine = torch.where(directed, dot / product, 0.0)  # [n]
    error = (1 - cosine).clamp(min=0)  # float32 cosines can exceed 1
    return error.pow(gamma).mean()


# ------------------------------------------------------------ ranking


def bpr_loss(positive: Tensor, negative: Tensor) -> Tensor:
    """Bayesian personalised ranking (Eq. 13): -mean log σ(y+ - y-), [B], [B] -> [].

    >>> round(bpr_loss(torch.tensor([1.0]), torch.tensor([0.0])).item(), 4)
    0.3133
    """
    return -F.logsigmoid(positive - negative).mean()


def l2_penalty(*embeddings: Tensor) -> Tensor:
    """‖Θ‖² of Eq. 13 on the batch's own layer-0 embeddings: Σ ½‖·‖² / B (errata P8).

    Each of `embeddings` is [B, d] or more rows, the first sets B -> [].

    >>> l2_penalty(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 1.0]])).item()
    13.0
    """
    squares = torch.stack([rows.square().sum() for rows in embeddings])
    return squares.sum() / (2 * len(embeddings[0]))

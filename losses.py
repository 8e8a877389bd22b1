"""The objective, term by term: BPR and the paper's three distillation losses (Section 3.2).

Pure functions of tensors and numbers, each a mean over the batch, so that no weight depends on the
batch size (errata P8). They take *one modality's* tensors; the caller sums over m. Nothing here
detaches an argument: prompt tuning needs the gradient on the teacher's side as well.

Read in the paper's order: Eq. 5, 6-7, 8-10 and 14-16, 11, 13; `promptmm.py` adds them up (Eq. 12).
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class _Scores(torch.autograd.Function):
    """y_bk = ⟨user[users_b], item[lists_bk]⟩, with a backward pass that adds rows in their place.

    Autograd's own would be as right, but slower by half: it copies the [B, K, d] gradient.
    """

    @staticmethod
    def forward(ctx, user, item, users, lists):
        ctx.save_for_backward(user, item, users, lists)
        rows = item.index_select(0, lists.flatten()).view(*lists.shape, -1)  # [B, K, d]
        return torch.einsum("bd,bkd->bk", user.index_select(0, users), rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        user, item, users, lists = ctx.saved_tensors
        by_user = F.embedding_bag(lists, item.detach(), mode="sum", per_sample_weights=gradient)
        by_item = gradient[:, :, None] * user.index_select(0, users)[:, None]  # [B, K, d]
        to_user = torch.zeros_like(user).index_add_(0, users, by_user)
        to_item = torch.zeros_like(item).index_add_(0, lists.flatten(), by_item.flatten(0, 1))
        return to_user, to_item, None, None


def scores(user: Tensor, item: Tensor, users: Tensor, lists: Tensor) -> Tensor:
    """Logits y_list [B, K] of users [B] and their lists of items [B, K], column 0 the positive.

    y_bk = ⟨e_u, e_i⟩ of user [U, d] and item [I, d]; y_1 - y_2 is the margin in y_pair (Eq. 5).
    """
    return _Scores.apply(user, item, users, lists)


def pair_kd(student_margin: Tensor, teacher_margin: Tensor, temperature: float = 1.0) -> Tensor:
    """Pair-wise distillation (Eq. 5, corrected: errata P1): is i+ better than i- for user u?

        τ² · mean [ p log(p / s) + (1-p) log((1-p) / (1-s)) ],   p = σ(m_T / τ),  s = σ(m_S / τ)

    A margin [B] is e_u·e_i+ - e_u·e_i-. The two sides of the binary question sum to one, which
    the printed formula's do not: so this is a divergence, zero exactly where the margins agree.

    >>> round(pair_kd(torch.tensor([0.0]), torch.tensor([2.0])).item(), 4)
    0.3278
    """
    student, teacher = student_margin / temperature, teacher_margin / temperature
    better = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    worse = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return temperature**2 * (better + worse).mean()


def disentangle(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Split a list's softmax in two (Eq. 6, 7; errata P4, P5). Column 0 holds the positive.

        b = [b+, b-]:  the positive against all negatives together            (Eq. 6)
        q_k = exp(y_k) / Σ_{j≥2} exp(y_j):  the negatives among themselves    (Eq. 7)

    logits [B, K], K ≥ 2 -> (log b [B, 2], log q [B, K-1]); finite for logits of ±1e4.

    >>> binary, negatives = disentangle(torch.tensor([[2.0, 1.0, 0.0]]))
    >>> [round(b, 4) for b in binary.exp()[0].tolist()]
    [0.6652, 0.3348]
    >>> [round(q, 4) for q in negatives.exp()[0].tolist()]
    [0.7311, 0.2689]
    """
    if logits.shape[-1] < 2:
        raise ValueError(f"a list needs a positive and a negative, found K = {logits.shape[-1]}")
    everything = logits.logsumexp(-1, keepdim=True)  # [B, 1]
    unobserved = logits[:, 1:].logsumexp(-1, keepdim=True)  # [B, 1]
    binary = torch.cat([logits[:, :1], unobserved], dim=-1) - everything  # log b, Eq. 6
    return binary, logits[:, 1:] - unobserved  # log q, Eq. 7


def _kl_rows(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) of each row of log-probabilities: [B, K], [B, K] -> [B]."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """The plain list-wise divergence, nothing disentangled (Eq. 14): τ² · mean KL(y_T ‖ y_S).

    logits [B, K] on both sides; y = softmax(logits / τ) (errata P4).

    >>> round(kl(torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]])).item(), 4)
    0.2662
    """
    student = (student_logits / temperature).log_softmax(-1)
    teacher = (teacher_logits / temperature).log_softmax(-1)
    return temperature**2 * _kl_rows(student, teacher).mean()


def list_kd(student_logits: Tensor, teacher_logits: Tensor, alpha: float = 1.0,
            beta: float | str = 8.0, temperature: float = 1.0) -> Tensor:
    """List-wise distillation of one modality, disentangled and re-weighted (Eq. 10).

        τ² · mean [ α KL(b_T ‖ b_S) + β KL(q_T ‖ q_S) ]

    logits [B, K]. Vanilla KL is the case α = 1, β = b-_T = 1 - b+_T: Eq. 8 sums over the list,
    Eq. 9 writes y_k = b- q_k (Eq. 15), and collecting the logarithms gives Eq. 16. That β varies
    by row, and `beta="identity"` asks for it; being an identity it re-weights nothing, so it *is*
    the ablation "w/o disentangle" (errata P2, P3). Constants α, β free of the teacher's confidence
    are the re-weighting (decoupled distillation, Zhao et al., CVPR 2022).

    >>> student, teacher = torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    >>> round(list_kd(student, teacher, beta="identity").item(), 4)  # equals kl(...) above
    0.2662
    >>> round(list_kd(student, teacher, alpha=1.0, beta=8.0).item(), 4)
    1.1166
    """
    if isinstance(beta, str) and beta != "identity":
        raise ValueError(f"beta: expected a number or 'identity', found {beta!r}")
    binary_s, negatives_s = disentangle(student_logits / temperature)
    binary_t, negatives_t = disentangle(teacher_logits / temperature)
    weight = binary_t[:, 1].exp() if beta == "identity" else beta  # b-_T = 1 - b+_T, Eq. 16
    rows = alpha * _kl_rows(binary_s, binary_t) + weight * _kl_rows(negatives_s, negatives_t)
    return temperature**2 * rows.mean()


def embed_kd(student_item: Tensor, modal_item: Tensor, gamma: float = 2.0) -> Tensor:
    """Embedding distillation of one modality, the scaled cosine error (Eq. 11; errata P7).

        mean over items of (1 - cos(e_i, f_i))^γ,   γ ≥ 1

    student_item, modal_item [I, d]; items only, as users have no content. A row without a direction
    (norm < 1e-6 on either side) counts as cos = 0 and sends no gradient.

    >>> student = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    >>> modal = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    >>> round(embed_kd(student, modal).item(), 4)  # (0 + (1 - 0.7071)²) / 2
    0.0429
    """
    if gamma < 1:
        raise ValueError(f"gamma: expected at least 1, found {gamma}")
    norms = student_item.norm(dim=-1), modal_item.norm(dim=-1)  # [I], [I]
    directed = (norms[0] >= 1e-6) & (norms[1] >= 1e-6)
    # The quotient must be safe on *both* branches of `where`, or its backward pass makes NaN.
    product = torch.where(directed, norms[0] * norms[1], 1.0)
    cosine = torch.where(directed, (student_item * modal_item).sum(-1) / product, 0.0)
    return (1 - cosine).clamp(min=0).pow(gamma).mean()  # float32 cosines can exceed 1


def bpr_loss(positive: Tensor, negative: Tensor) -> Tensor:
    """Bayesian personalised ranking (Eq. 13): -mean log σ(y+ - y-) of scores [B], [B].

    >>> round(bpr_loss(torch.tensor([1.0]), torch.tensor([0.0])).item(), 4)
    0.3133
    """
    return -F.logsigmoid(positive - negative).mean()


def l2_penalty(*embeddings: Tensor) -> Tensor:
    """‖Θ‖² of Eq. 13 on the batch's own layer-0 embeddings [B, d] each: Σ ½‖·‖² / B (errata P8).

    >>> l2_penalty(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 1.0]])).item()
    13.0
    """
    return sum(rows.square().sum() for rows in embeddings) / (2 * len(embeddings[0]))

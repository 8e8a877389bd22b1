"""All-ranking evaluation (Section 4.1.2): metrics, significance, recommendation lists.

Every item is a candidate for every user except those in `exclude`; nothing is sampled. Equal scores
rank the lower item index first, on every device.
"""

import numpy as np
import torch
from scipy import sparse, stats
from torch import Tensor

CHUNK_SCORES = 2**23  # scores held at once, 32 MiB: user-by-item arrays are never larger


def top_items(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best columns of each row, equal scores by lower index: values and indices [B, k].

    `torch.topk` is fast but leaves the order of equals open, both inside the list and at its edge.
    Inside is a small sort; at the edge only the rows where an equal was left out are done again.

    >>> top_items(torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0]]), 3)[1].tolist()
    [[1, 3, 0]]
    """
    values, index = scores.topk(k)
    cut = ((scores >= values[:, -1:]).sum(-1) > k).nonzero().flatten()  # a tie across the edge
    if len(cut):
        exact = scores[cut].sort(dim=-1, descending=True, stable=True)
        values[cut], index[cut] = exact.values[:, :k], exact.indices[:, :k]
    index, order = index.sort(dim=-1)
    values, by_score = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values, index.gather(-1, by_score)


def _cells(matrix: sparse.csr_matrix, users: np.ndarray, device) -> tuple[Tensor, Tensor]:
    """The stored cells of some rows of a CSR matrix: row within `users`, column."""
    rows = matrix[users].tocoo()
    return tuple(torch.from_numpy(ids).long().to(device) for ids in (rows.row, rows.col))


def evaluate(user: Tensor, item: Tensor, target: sparse.csr_matrix, exclude: sparse.csr_matrix,
             ks: tuple[int, ...] = (20, 50), per_user: bool = False) -> dict:
    """Rank all items for every user who has a target, and average the metrics over those users.

    user [U, d], item [I, d] on any device; target, exclude [U, I] scipy CSR. Returns, for each K:

    recall@K      hits / |T_u|
    ndcg@K        Σ_hits 1/log2(rank+1) over that of the best list possible, min(K, |T_u|) hits
    precision@K   hits / K
    hit@K         1 if any target is in the list
    ndcg_released@K   the released code's NDCG: its ideal is made from the hits retrieved in the
                  longest list, not from the targets (errata C6). To set beside the paper's figures.

    With `per_user`, also "users" [n] and "per_user", the same names with arrays [n].

    >>> user, item = torch.tensor([[1.0]]), torch.tensor([[3.0], [2.0], [1.0]])
    >>> target, none = sparse.csr_matrix([[0, 1, 1]]), sparse.csr_matrix((1, 3))
    >>> {name: round(value, 4) for name, value in evaluate(user, item, target, none, (2,)).items()}
    {'recall@2': 0.5, 'ndcg@2': 0.3869, 'precision@2': 0.5, 'hit@2': 1.0, 'ndcg_released@2': 0.6309}
    """
    shape = (len(user), len(item))
    for name, matrix in (("target", target), ("exclude", exclude)):
        if matrix.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, found {matrix.shape}")
    if not (user.isfinite().all() and item.isfinite().all()):
        raise FloatingPointError("the embeddings became NaN or infinite")
    users = np.flatnonzero(np.diff(target.indptr))
    if not len(users):
        raise ValueError("target: expected at least one interaction, found none")
    longest = min(max(ks), len(item))
    chunk = max(1, CHUNK_SCORES // len(item))
    hits = [_hits(user, item, target, exclude, users[i : i + chunk], longest)
            for i in range(0, len(users), chunk)]
    values = metrics(torch.cat(hits).cpu().numpy(), np.diff(target.indptr)[users], ks)
    means = {name: float(value.mean()) for name, value in values.items()}
    return {**means, "users": users, "per_user": values} if per_user else means


def _hits(user, item, target, exclude, users, longest) -> Tensor:
    """Which ranks of these users' lists hold a target: bool [n, longest]."""
    scores = user[torch.from_numpy(users).to(user.device)] @ item.T  # [n, I]
    scores[_cells(exclude, users, user.device)] = -torch.inf
    relevant = torch.zeros_like(scores, dtype=torch.bool)
    relevant[_cells(target, users, user.device)] = True
    values, index = top_items(scores, longest)
    return relevant.gather(-1, index) & (values > -torch.inf)  # an excluded item is no candidate


def metrics(hits: np.ndarray, targets: np.ndarray, ks: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Metrics per user from bool hits by rank [n, longest] and target counts [n]."""
    longest = hits.shape[1]
    discount = 1 / np.log2(np.arange(2, longest + 2))
    ideal = np.concatenate([[0.0], discount.cumsum()])  # ideal[h]: the gain of h hits on top
    found, gain = hits.cumsum(1), (hits * discount).cumsum(1)
    values = {}
    for k in ks:
        last = min(k, longest) - 1
        values[f"recall@{k}"] = found[:, last] / targets
        values[f"ndcg@{k}"] = gain[:, last] / ideal[np.minimum(targets, last + 1)]
        values[f"precision@{k}"] = found[:, last] / k
        values[f"hit@{k}"] = (found[:, last] > 0).astype(float)
        retrieved = ideal[np.minimum(found[:, -1], last + 1)]
        values[f"ndcg_released@{k}"] = gain[:, last] / np.where(retrieved > 0, retrieved, 1)
    return values


def paired_test(a: np.ndarray, b: np.ndarray, seed: int = 0, draws: int = 10_000) -> dict:
    """Is `a` better than `b` for the same users? Values [users], or [seeds, users], averaged first.

    Returns the mean difference a - b, its 95 % bootstrap interval `low`, `high`, and two-sided
    p-values: `p_bootstrap` (users resampled in pairs; never below 1/draws) and `p_wilcoxon`.

    >>> a, b = np.array([0.5, 1.0, 0.0, 1.0] * 50), np.array([0.0, 1.0, 0.0, 0.5] * 50)
    >>> result = paired_test(a, b)
    >>> result["difference"], result["low"] > 0.2, result["p_bootstrap"] < 0.01
    (0.25, True, True)
    """
    a, b = np.atleast_2d(a).mean(0), np.atleast_2d(b).mean(0)
    if a.shape != b.shape:
        raise ValueError(f"paired_test: expected the same users, found {a.size} and {b.size}")
    difference, rng = a - b, np.random.default_rng(seed)
    # Users with the same difference are interchangeable: draw how often each gap comes up.
    gap, count = np.unique(difference, return_counts=True)
    means = np.array([rng.multinomial(a.size, count / a.size) @ gap for _ in range(draws)]) / a.size
    low, high = np.quantile(means, [0.025, 0.975])
    one_sided = min((means <= 0).mean(), (means >= 0).mean())
    wilcoxon = stats.wilcoxon(difference).pvalue if difference.any() else 1.0
    return {"difference": float(difference.mean()), "low": float(low), "high": float(high),
            "p_bootstrap": float(np.clip(2 * one_sided, 1 / draws, 1)),
            "p_wilcoxon": float(wilcoxon)}


def recommend(user: np.ndarray, item: np.ndarray, seen: np.ndarray,
              k: int) -> list[tuple[int, float]]:
    """One user's list: embeddings [d], [I, d], item indices to hide -> up to k (item, score)."""
    scores = torch.from_numpy(item @ user)[None]
    scores[0, torch.from_numpy(seen).long()] = -torch.inf
    values, index = top_items(scores, min(k, len(item)))
    pairs = zip(index[0].tolist(), values[0].tolist(), strict=True)
    return [(i, score) for i, score in pairs if score > -np.inf]


def ladder(metrics: dict) -> str:
    """The table of a run: what each step of the ladder costs, and reaches on the test split.

    metrics: the content of metrics.json.
    """
    steps = (("mostpop", "MostPop", ""), ("alone", "student alone", "student"),
             ("student", "student", "student"), ("teacher", "teacher", "teacher"),
             ("teacher_tuned", "teacher, prompt tuned", "teacher"))
    lines = [f"{'test split':24}{'Recall@20':>10}{'NDCG@20':>10}{'trainable':>12}{'features':>12}"]
    for key, name, model in steps:
        if figures := metrics["test"].get(key):
            size = "".join(f"{n:12,}" for n in metrics["parameters"].get(model, {}).values())
            lines += [f"{name:24}{figures['recall@20']:10.4f}{figures['ndcg@20']:10.4f}{size}"]
    return "\n".join(lines)

"""All-ranking evaluation (Section 4.1.2): metrics, fusion of rankings, lists, significance.

Every item is a candidate for every user except those in `exclude`; nothing is sampled.
Equal scores rank the lower item index first, on every device.
"""

import numpy as np
import torch
from scipy import sparse, stats
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # users' embeddings [U, e] and items' [I, e]
CHUNK_SCORES = 2**23  # scores held at once, 32 MiB: user-by-item arrays are never larger


def evaluate(
    user: Tensor,
    item: Tensor,
    target: sparse.csr_matrix,
    exclude: sparse.csr_matrix,
    ks: tuple[int, ...] = (20, 50),
    per_user: bool = False,
) -> dict:
    """Rank all items for every user who has a target; average the metrics over them.

    user [U, d], item [I, d] on any device; target, exclude [U, I] scipy CSR. For each K:

    recall@K         hits / |T_u|
    ndcg@K           DCG = Σ_hits 1/log2(rank + 1), over that of min(K, |T_u|) hits on top
    precision@K      hits / K
    hit@K            1 if any target is in the list
    ndcg_released@K  the released code's: its ideal is made from the hits retrieved in the
                     longest list, not from the targets (errata C6)

    With `per_user`, also "users" [n] and "per_user", the same names with arrays [n]. Raises
    ValueError for another shape or no target, FloatingPointError for NaN or infinity.

    >>> user, item = torch.tensor([[1.0]]), torch.tensor([[3.0], [2.0], [1.0]])
    >>> target, none = sparse.csr_matrix([[0, 1, 1]]), sparse.csr_matrix((1, 3))
    >>> found = evaluate(user, item, target, none, ks=(2,))
    >>> for name, value in found.items():
    ...     print(name, round(value, 4))
    recall@2 0.5
    ndcg@2 0.3869
    precision@2 0.5
    hit@2 1.0
    ndcg_released@2 0.6309
    """
    shape = (len(user), len(item))
    for name, matrix in (("target", target), ("exclude", exclude)):
        if matrix.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, found {matrix.shape}")
    if not (user.isfinite().all() and item.isfinite().all()):
        raise FloatingPointError("the embeddings became NaN or infinite")
    if not target.nnz:
        raise ValueError("target: expected at least one interaction, found none")
    users, [values] = _judged([(user, item)], [[1.0]], target, exclude, ks)
    means = {name: float(value.mean()) for name, value in values.items()}
    return {**means, "users": users, "per_user": values} if per_user else means


def _judged(
    pairs: list[Pair],
    sums: list[list[float]],
    target: sparse.csr_matrix,
    exclude: sparse.csr_matrix,
    ks: tuple[int, ...],
) -> tuple[np.ndarray, list[dict[str, np.ndarray]]]:
    """The users who have a target [n], and their metrics [n] by name for each of `sums`.

    sums: weighted sums of the rankings, whose scores are computed once.
    """
    targets = np.diff(target.indptr)  # |T_u| [U]
    users = np.flatnonzero(targets)  # [n]
    n_items = target.shape[1]
    longest = min(max(ks), n_items)
    chunk = max(1, CHUNK_SCORES // (n_items * len(pairs)))
    hits: list[list[Tensor]] = [[] for _ in sums]
    for start in range(0, len(users), chunk):
        rows = users[start : start + chunk]  # of c users
        device = pairs[0][0].device
        index = torch.from_numpy(rows).to(device)
        scores = [user[index] @ item.T for user, item in pairs]  # of each [c, I]
        seen = _cells(exclude, rows, device)
        relevant = torch.zeros_like(scores[0], dtype=torch.bool)  # [c, I]
        relevant[_cells(target, rows, device)] = True
        for found, weights in zip(hits, sums, strict=True):
            total = _weighted(scores, weights)  # [c, I]
            total[seen] = -torch.inf
            values, best = top_items(total, longest)
            # An item that is excluded is no hit.
            found.append(relevant.gather(-1, best) & (values > -torch.inf))
    lists = [torch.cat(found).cpu().numpy() for found in hits]  # [n, longest] each
    return users, [metrics(found, targets[users], ks) for found in lists]


def _weighted(scores: list[Tensor], weights: list[float]) -> Tensor:
    """Σ w · scores, of those that weigh anything; a new tensor."""
    first, *others = [(w, part) for w, part in zip(weights, scores, strict=True) if w]
    total = first[0] * first[1]
    for w, part in others:
        total.add_(part, alpha=w)
    return total


def _cells(matrix: sparse.csr_matrix, users: np.ndarray, device) -> tuple[Tensor, ...]:
    """The stored cells of some rows of a CSR matrix: row within `users`, column."""
    rows = matrix[users].tocoo()
    return tuple(torch.from_numpy(ids).long().to(device) for ids in (rows.row, rows.col))


def metrics(
    hits: np.ndarray, targets: np.ndarray, ks: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """Metrics per user [n] from bool hits by rank [n, longest] and target counts [n]."""
    longest = hits.shape[1]
    discount = 1 / np.log2(np.arange(2, longest + 2))  # [longest]
    ideal = np.concatenate([[0.0], discount.cumsum()])  # of h hits on top  [longest + 1]
    found = hits.cumsum(1)  # [n, longest]
    gain = (hits * discount).cumsum(1)  # [n, longest]
    values = {}
    for k in ks:
        last = min(k, longest) - 1
        possible = ideal[np.minimum(targets, last + 1)]  # [n]
        retrieved = ideal[np.minimum(found[:, -1], last + 1)]  # [n]
        values[f"recall@{k}"] = found[:, last] / targets
        values[f"ndcg@{k}"] = gain[:, last] / possible
        values[f"precision@{k}"] = found[:, last] / k
        values[f"hit@{k}"] = (found[:, last] > 0).astype(float)
        values[f"ndcg_released@{k}"] = gain[:, last] / np.where(retrieved > 0, retrieved, 1)
    return values


# ------------------------------------------------------------ rankings added up

WEIGHTS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)  # that line_search tries, besides 0


def deviation(user: Tensor, item: Tensor) -> Tensor:
    """The deviation of each user's scores over all items: [U, e], [I, e] -> [U, 1].

    That of ⟨e_u, e_i⟩ over i is √(e_uᵀ C e_u), C the items' covariance: no [U, I] array.
    """
    centred = item - item.mean(0)
    covariance = centred.T @ centred / len(item)  # C [e, e]
    variance = ((user @ covariance) * user).sum(1, keepdim=True)  # [U, 1]
    return variance.clamp(min=0).sqrt()


def spread(user: Tensor, item: Tensor) -> float:
    """The root mean square of `deviation` over the users: one number for all logits."""
    with torch.no_grad():
        return float(deviation(user, item).square().mean().sqrt().clamp(min=1e-12))


def one_scale(pair: Pair) -> Pair:
    """The same ranking, each user's scores divided by their deviation over all items.

    A user to whom all items are equal becomes zero.
    """
    user, item = pair
    with torch.no_grad():  # a yardstick: constant in backward (errata C4)
        size = deviation(user, item)  # [U, 1]
    return torch.where(size > 1e-12, user / size.clamp(min=1e-12), 0.0), item


def most_popular(train: sparse.csr_matrix, device) -> Pair:
    """Popularity as embeddings of width 1: [U, 1], [I, 1]."""
    popularity = torch.from_numpy(np.asarray(train.sum(0), np.float32)).T.to(device)
    return popularity.new_ones(train.shape[0], 1), popularity


def fuse(pairs: list[Pair], weights: list[float]) -> Pair:
    """The weighted sum of rankings, as embeddings side by side: [U, Σ e], [I, Σ e]."""
    kept = [(w * user, item) for w, (user, item) in zip(weights, pairs, strict=True) if w]
    users, items = zip(*kept, strict=True)
    return torch.cat(users, dim=1), torch.cat(items, dim=1)


def line_search(
    pairs: list[Pair], train: sparse.csr_matrix, val: sparse.csr_matrix
) -> list[float]:
    """The weight of each ranking beside the first, by Recall@20 on validation.

    From 0 for all; the ranking that gains most goes first, and the search ends when none
    gains. A weight counts by the mean of its own recall and its neighbours' on the grid: an
    isolated peak is noise.
    """
    scaled = [one_scale(pair) for pair in pairs]
    weights = [1.0] + [0.0] * (len(pairs) - 1)
    left = list(range(1, len(pairs)))
    while left:
        tried = [[*weights[:m], w, *weights[m + 1 :]] for m in left for w in WEIGHTS]
        base, *found = recalls(scaled, [weights, *tried], train, val)
        curves = np.array(found).reshape(len(left), len(WEIGHTS))
        gains = {m: _gain([base, *curve]) for m, curve in zip(left, curves, strict=True)}
        m = max(gains, key=gains.__getitem__)
        if gains[m][0] <= 0:
            break
        weights[m] = gains[m][1]
        left.remove(m)
    return weights[1:]


def recalls(
    pairs: list[Pair],
    sums: list[list[float]],
    train: sparse.csr_matrix,
    val: sparse.csr_matrix,
) -> list[float]:
    """Validation Recall@20 of each weighted sum of the rankings."""
    _, every = _judged(pairs, sums, val, train, (20,))
    return [float(found["recall@20"].mean()) for found in every]


def _gain(curve: list[float]) -> tuple[float, float]:
    """The most that a ranking gains, smoothed, and the weight; recalls at 0 and WEIGHTS.

    >>> gain, weight = _gain([0.0, 0.0, 0.0, 0.3, 0.4, 0.3, 0.0, 0.0, 0.0])
    >>> round(gain, 4), weight
    (0.3333, 0.5)
    """
    beside = [curve[i : i + 3] for i in range(len(WEIGHTS))]  # of each weight
    smooth = [float(np.mean(three)) for three in beside]
    best = max(range(len(WEIGHTS)), key=smooth.__getitem__)
    return smooth[best] - curve[0], WEIGHTS[best]


# ------------------------------------------------------------ lists


def top_items(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best columns of each row, equal scores by lower index: values, indices [B, k].

    `torch.topk` is fast but leaves the order of equals open, both inside the list and at
    its edge. Inside is a small sort; at the edge only the rows where an equal was left out
    are done again.

    >>> top_items(torch.tensor([[1.0, 3.0, 1.0, 3.0, 1.0]]), 3)[1].tolist()
    [[1, 3, 0]]
    """
    values, index = scores.topk(min(k + 1, scores.shape[-1]))  # one more: a tie shows
    cut = (values[:, k - 1 : k] == values[:, k:]).any(-1).nonzero().flatten()
    values, index = values[:, :k], index[:, :k]  # [B, k]
    if len(cut):
        exact = scores[cut].sort(dim=-1, descending=True, stable=True)
        values[cut] = exact.values[:, :k]
        index[cut] = exact.indices[:, :k]
    index, order = index.sort(dim=-1)
    values, by_score = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values, index.gather(-1, by_score)


def best_unobserved(
    user: Tensor, item: Tensor, train: sparse.csr_matrix, n: int
) -> tuple[Tensor, Tensor]:
    """Each user's n best items without a training interaction, and their scores: [U, n].

    Validation and test items are among them where the teacher ranks them high: they are
    ranked, not looked up. Of fewer than n left the best is repeated. Equal scores come in
    torch's order: lists are drawn from these, nothing is judged by them.
    """
    n = min(n, len(item))
    chunk = max(1, CHUNK_SCORES // len(item))
    items, scores = [], []
    for start in range(0, len(user), chunk):
        logits = user[start : start + chunk] @ item.T  # [c, I]
        rows = np.arange(start, start + len(logits))
        logits[_cells(train, rows, logits.device)] = -torch.inf
        values, index = logits.topk(n)  # [c, n]
        left = values > -torch.inf
        items.append(torch.where(left, index, index[:, :1]))
        scores.append(torch.where(left, values, values[:, :1]))
    return torch.cat(items), torch.cat(scores)


def recommend(
    user: np.ndarray, item: np.ndarray, seen: np.ndarray, k: int
) -> list[tuple[int, float]]:
    """One user's list: embeddings [d], [I, d], items to hide -> up to k (item, score)."""
    scores = torch.from_numpy(item @ user)[None]  # [1, I]
    scores[0, torch.from_numpy(seen).long()] = -torch.inf
    values, index = top_items(scores, min(k, len(item)))
    pairs = zip(index[0].tolist(), values[0].tolist(), strict=True)
    return [(i, score) for i, score in pairs if score > -np.inf]


# ------------------------------------------------------------ significance


def paired_test(a: np.ndarray, b: np.ndarray, seed: int = 0, draws: int = 10_000) -> dict:
    """Do `a` and `b` differ? Values [seeds, users], or [users] of one run each.

    Users and seeds are drawn. Users by bootstrap, both models' values of a user together.
    Seeds of each model independently: a handful is too few to resample, so that a model's
    mean moves by t · s / √seeds, s the deviation of its seeds, t Student's with seeds - 1
    degrees of freedom. A model of one seed draws none, and `seeds_drawn` is False.

    Returns the mean difference a - b, its 95 % interval `low`, `high`, and two-sided
    p-values: `p_bootstrap`, twice the smaller share of draws on one side of 0, at least
    1/draws; `p_wilcoxon`, over users, of the values averaged over seeds. Raises ValueError
    for another number of users.

    >>> a, b = np.array([0.5, 1.0, 0.0, 1.0] * 50), np.array([0.0, 1.0, 0.0, 0.5] * 50)
    >>> result = paired_test(a, b)
    >>> result["difference"], result["low"] > 0.2, result["p_bootstrap"] < 0.01
    (0.25, True, True)
    """
    a, b = np.atleast_2d(a), np.atleast_2d(b)  # [seeds, users]
    if a.shape[1] != b.shape[1]:
        raise ValueError(
            f"paired_test: expected the same users, found {a.shape} and {b.shape}"
        )
    # Rounded: means of equal values differ in their last bit, over 3 seeds and over 5.
    difference = (a.mean(0) - b.mean(0)).round(12)  # [users]
    rng = np.random.default_rng(seed)
    # A user without a difference adds nothing: draw how many others come up, then which.
    gaps = difference[difference != 0]
    many = rng.binomial(difference.size, gaps.size / difference.size, draws)
    drawn = [gaps[rng.integers(gaps.size, size=n)].sum() for n in many]
    means = np.array(drawn) / difference.size  # [draws]
    means += _seed_draws(a, draws, rng) - _seed_draws(b, draws, rng)
    low, high = np.quantile(means, [0.025, 0.975]).tolist()
    one_sided = min((means <= 0).mean(), (means >= 0).mean())
    p_bootstrap = np.clip(2 * one_sided, 1 / draws, 1)
    wilcoxon = stats.wilcoxon(difference).pvalue if gaps.size else 1.0
    return {
        "difference": float(difference.mean()),
        "low": low,
        "high": high,
        "p_bootstrap": float(p_bootstrap),
        "p_wilcoxon": float(wilcoxon),
        "seeds_drawn": min(len(a), len(b)) > 1,
    }


def _seed_draws(values: np.ndarray, draws: int, rng) -> np.ndarray:
    """How far a model's mean over [seeds, users] would move with other seeds: [draws]."""
    runs = values.mean(1)  # [seeds]
    if len(runs) < 2:
        return np.zeros(draws)
    error = runs.std(ddof=1) / np.sqrt(len(runs))
    return rng.standard_t(len(runs) - 1, draws) * error


# ------------------------------------------------------------ the table of a run

LADDER = {  # metrics.json's keys, in the order and by the names that every table uses
    "mostpop": "MostPop",
    "alone": "LightGCN",
    "teacher": "Teacher",
    "teacher_tuned": "Teacher, prompt tuned",
    "student": "PromptMM",
}


def ladder(metrics: dict) -> str:
    """The table of a run: what each step of the ladder reaches on test, and what it costs.

    metrics: the content of metrics.json. A student without a teacher is LightGCN.
    """
    test, sizes = metrics["test"], metrics["parameters"]
    names = LADDER if "teacher" in test else LADDER | {"student": "LightGCN"}
    lines = [
        f"{'test split':24}{'Recall@20':>10}{'NDCG@20':>10}{'learnt':>12}{'features':>12}"
    ]
    for key, name in names.items():
        if key not in test:
            continue
        kind = "teacher" if key.startswith("teacher") else "student"
        size = {} if key == "mostpop" else sizes[kind]
        recall, ndcg = test[key]["recall@20"], test[key]["ndcg@20"]
        numbers = "".join(f"{number:12,}" for number in size.values())
        lines.append(f"{name:24}{recall:10.4f}{ndcg:10.4f}{numbers}")
    if "weights" in metrics:
        weights = ", ".join(f"{m} {weight:g}" for m, weight in metrics["weights"].items())
        lines.append(f"weights beside LightGCN, by validation: {weights}")
    return "\n".join(lines)

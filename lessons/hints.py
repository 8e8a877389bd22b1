"""How each "your turn" is checked: read it after you have tried.

A function here has the name of the one to write, takes it, compares it with the core's, and
returns a hint, or "" if it is right.
"""

from dataclasses import replace
from functools import cache

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import svds

import data
import losses
import promptmm
from evaluate import paired_test
from lessons import common
from promptmm import Config, Teacher


def blind(yours) -> str:
    x = data.synthetic(seed=1, **common.SMALL).features["visual"]
    blinded = yours(x.copy(), np.random.default_rng(0))
    if blinded is None or np.shape(blinded) != x.shape:
        return f"Return features of the same shape, {x.shape}."
    blinded = np.asarray(blinded, x.dtype)
    before, after = (data.unit_rows(torch.from_numpy(one)) for one in (x, blinded))
    if not after.any():
        return "No content at all is another control: a row of zeros takes no part."
    if torch.allclose(before @ before.T, after @ after.T, atol=1e-4):
        return "Each item is as near to each other item as before: the teacher still sees."
    if not np.array_equal(np.sort(x.sum(1)), np.sort(blinded.sum(1))):
        return "The rows are no longer rows of x: shuffle whole rows, not their entries."
    axes = data.principal(before, 1)[0]
    kept = np.mean([np.array_equal(a, b) for a, b in zip(x, blinded, strict=True)])
    same = abs((after @ axes).std() - (before @ axes).std()) < 1e-3
    return "" if kept < 0.05 and same else "Many items kept their own content."


def disentangle(yours) -> str:
    logits = torch.tensor([[2.0, 1.0, 0.0], [-1.0, 0.5, 3.0]])
    b, q = yours(logits)
    right_b, right_q = losses.disentangle(logits)
    if b.shape != right_b.shape or q.shape != right_q.shape:
        return f"Shapes: expected {[2, 2]} and {[2, 2]} for two lists of three."
    if torch.allclose(b, right_b.exp()):
        return "These are b and q; return their logarithms."
    if torch.allclose(q.exp().sum(1), 1 - right_b[:, 0].exp()):
        return "Eq. 7: q is a softmax over the negatives alone, so it sums to one."
    if torch.allclose(b[:, 1] - b[:, 0], logits[:, 1:].sum(1) - logits[:, 0]):
        return "Eq. 6: sum the exponentials, not the scores (Figure 2 does, errata P6)."
    if not all(part.isfinite().all() for part in yours(1e4 * logits)):
        return "With logits of 1e4 exp overflows, or 1 - b+ is 0: stay with logsumexp."
    right = torch.allclose(b, right_b, atol=1e-6) and torch.allclose(q, right_q, atol=1e-6)
    return "" if right else "For (2, 1, 0): b = (0.665, 0.335) and q = (0.731, 0.269)."


def pair_kd(yours) -> str:
    student = torch.tensor([0.0, 2.0, -3.0], requires_grad=True)
    teacher = torch.tensor([1.0, 2.0, 2.0])
    agreed = teacher.clone().requires_grad_()
    value = yours(student, teacher)
    if value.shape:
        return "Return one number, the mean over the batch."
    slope = torch.autograd.grad(yours(agreed, teacher), agreed)[0].sum()
    if slope > 1e-4:
        return (
            "It lowers the margins where both agree, as Eq. 5 does: is y a probability, "
            "are both sides there, and has each a plus?"
        )
    if slope < -1e-4:
        return "It raises the margins where both agree: the sides must cancel there."
    right = losses.pair_kd(student, teacher)
    if torch.isclose(value, -right):
        return "It is below zero: a divergence is lowest, and zero, where both agree."
    if torch.isclose(value, losses.pair_kd(teacher, student)):
        return "That is KL(s || t): the teacher's probabilities are the weights."
    return "" if torch.isclose(value, right) else f"Here {value:.3f}, expected {right:.3f}."


def absorb(yours) -> str:
    dataset = data.synthetic(**common.SMALL)
    only = replace(dataset, features={"visual": dataset.features["visual"]})
    teacher = Teacher(only, Config(dim=16, lambda_prompt=0.3)).eval().requires_grad_(False)
    teacher.prompt.bias.normal_()
    [x], [linear] = teacher.features.values(), teacher.reduction
    basis = torch.linalg.pinv(x) @ teacher.tokens  # [d_m, d]
    prompt = teacher.prompt.weight.T, teacher.prompt.bias
    w, b = yours(x, basis, *prompt, linear.weight.T, linear.bias, 0.3)
    plain = linear(x)  # [I, d_T]
    right = next(iter(teacher.reduced().values())) - plain  # what the prompt adds
    found = x @ w + b - plain
    error = (found - right).norm() / right.norm()
    if error < 1e-3:
        return ""
    if found.norm() < 1e-6:
        return "That is W and b: the prompt is not in it."
    if (found - right).std(0).norm() < 1e-3 * right.norm():
        return "W* is right, b* is not: shift is the same for all items."
    if (found / found.norm() - right / right.norm()).norm() < 1e-3:
        times = found.norm() / right.norm()
        return f"Right but for a factor of {times:.3g}: lam, or the norm of p (p.T @ x)?"
    return (
        f"Off by {error:.0%} of the prompt's part. W* = W + lam s basis theta (p.T @ x) W, "
        "with s = norm of x / norm of p (p.T @ x)."
    )


def adjacency(yours) -> str:
    train = sparse.csr_matrix([[1.0, 1, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0]])
    found, right = (
        sparse.csr_matrix(m).toarray() for m in (yours(train), promptmm.adjacency(train))
    )
    if found.shape != right.shape:
        return f"Three users, four items: expected {right.shape}, found {found.shape}."
    if not np.isfinite(found).all():
        return "The last item has no neighbours: divide by at least 1."
    if found[:3, :3].any():
        return "Users read users: A belongs beside the diagonal, as in matrix 2."
    if found[:4, :4].any() != right[:4, :4].any():
        return "The first rows are not the users'."
    if ((found != 0) == (right != 0)).all() and not np.allclose(found, right):
        if np.allclose(found, found.T):
            return "The cells are right, their values are not: 1 / sqrt(d_u d_i)."
        return "The matrix is not symmetric: both degrees enter, each by its square root."
    return "" if np.allclose(found, right) else "Compare it with promptmm.adjacency."


def p_value(yours) -> str:
    rng = np.random.default_rng(0)
    base = rng.random(300)
    noise = 0.2 * rng.standard_normal(300)
    for shift, sign in (0.014, 1), (0.02, -1), (0.0, 1):
        a, b = base + sign * (noise - noise.mean() + shift), base
        right = paired_test(a, b, draws=3000)["p_bootstrap"]
        found = yours(a, b, np.random.default_rng(1))
        if not 0 <= found <= 1:
            return f"A p-value is between 0 and 1, found {found:.3g}."
        if abs(found - right) < 0.05:
            continue
        if abs(found - right / 2) < 0.03 or abs(found - 1 + right / 2) < 0.03:
            return (
                "One side only: a difference may have either sign, so double the smaller."
            )
        if found > right:
            return "Too large: draw a user once, and take both models' recall of that user."
        return "Too small: draw n users with replacement, and do not divide by n again."
    return ""


@cache
def table_with_a_leak(seed: int) -> dict:
    """Recall by popularity: text, an embedding of the training edges, and a leak."""
    dataset = data.synthetic(seed=seed, unseen=0.1, **common.SMALL)
    rng = np.random.default_rng(seed)
    direction = rng.standard_normal((dataset.train.shape[0], 64))
    leak = (dataset.train + dataset.val + dataset.test).T @ direction  # [I, 64]
    leak += 1.3 * leak.std() * rng.standard_normal(leak.shape)
    features = {
        "text": dataset.features["text"],
        "training": svds(dataset.train, 16, random_state=0)[2].T,
        "leak": leak,
    }
    graph = promptmm.Graph(dataset.train)
    table = {}
    for name, x in features.items():
        item = data.unit_rows(torch.from_numpy(x.copy()).float())
        table[name] = common.by_popularity((graph.to_users(item), item), dataset)
    return table


def leaks(yours) -> str:
    for seed in range(3):
        rows = table_with_a_leak(seed)
        kinds = np.random.default_rng(seed).permutation(list(rows))
        names = dict(zip(("visual", "text", "acoustic"), kinds.tolist(), strict=True))
        answer = yours({name: dict(rows[kind]) for name, kind in names.items()})
        if answer not in names:
            return f"Return one of the table's names, found {answer!r}."
        if names[answer] == "training":
            return (
                f"In table {seed + 1}, {answer} comes from the training edges alone: it "
                "may rank well, and knows nothing of items that training does not have."
            )
        if names[answer] == "text":
            return (
                f"In table {seed + 1}, {answer} is content: it knows a little of any item, "
                "and another knows more of those that training does not have."
            )
    return ""


def fifth(yours) -> str:
    generator = torch.Generator().manual_seed(0)
    taught, told = torch.randn(2, 8, 6, generator=generator)
    apart = [torch.randn(8, 6, generator=generator).requires_grad_() for _ in range(2)]
    agreed = [part.clone().requires_grad_() for part in (taught, told)]

    def loss(student):
        return yours(student[0], taught, student[1], told)

    far, near = loss(apart), loss(agreed)
    if far.shape:
        return "Return one number, a mean over the batch."
    if not far.requires_grad:
        return "No gradient reaches the student: detach, item or no_grad on its side?"
    pulls = torch.autograd.grad(near, agreed, allow_unused=True)
    if any(pull is not None and pull.abs().max() > 1e-4 for pull in pulls):
        return "It pulls where student and teacher agree (lesson 3)."
    if not near < far:
        return "It is not lower where student and teacher agree than where they do not."
    return ""

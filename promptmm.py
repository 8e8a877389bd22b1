"""PromptMM: a multi-modal teacher, a prompt that adapts it, and a student that serves alone.

Wei et al., "PromptMM: Multi-Modal Knowledge Distillation for Recommendation with Prompt-Tuning",
WWW 2024. This file follows the paper's Section 3 from top to bottom:

    Config      every setting, with its source
    graph       Â and LightGCN propagation
    prompt      tokens η(x^m) and the prompt module P           Eq. 3
    teacher     prompted reduction, modal propagation, fusion   Eq. 4, Eq. 1
    student     LightGCN                                        Eq. 2
    objectives  of stage 1 and of stage 2                       Eq. 13, Eq. 12
    training    one loop for both stages; the run folder
    command     python promptmm.py [--data DIR] [--help]

The distillation losses (Eq. 5-11, 14-16) are in losses.py. Where the paper leaves a gap or errs the
comment names the entry of the README's list of differences (P1-P13 paper, C1-C28 released code).

    paper                     code                                       shape
    A, E, U, I                dataset.train (scipy CSR, 0/1)             [U, I]
    x^m                       dataset.features["visual"]                 [I, d_m]
    Â                         adjacency (torch CSR)                      [U+I, U+I]
    η(x^m), averaged          tokens                                     [I, d]
    p, p^m                    prompt, never formed (see Teacher.reduce)  [I, d], [I, d_m]
    θ_P                       theta: W_P stacked on b_P                  [d+1, d]
    f^m                       reduced[m]                                 [I, d]
    F_u^m, F_i^m              user_modal[m], item_modal[m]               [U, d], [I, d]
    E_u^T, E_i^T              teacher_user, teacher_item                 [U, d], [I, d]
    E_u^S, E_i^S              student_user, student_item                 [U, d], [I, d]
    y_list                    logits, column 0 the positive              [B, K]
    y_pair                    margin = logits[:, 0] - logits[:, 1]       [B]
"""

import argparse
import csv
import hashlib
import io
import json
import math
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from scipy import linalg, sparse
from torch import Tensor, nn

from data import DataError, Dataset, Parser, Sampler, load, synthetic, whole
from evaluate import evaluate, recommend
from losses import bpr_loss, embed_kd, l2_penalty, list_kd, pair_kd

# ---------------------------------------------------------------- settings


def setting(default, meaning: str):
    return field(default=default, metadata={"help": f"{meaning} (default {default})"})


@dataclass(frozen=True)
class Config:
    """Every setting of a run; each is a flag. Sources: paper section, released code, or ours."""

    dim: int = setting(64, "d, width of the embeddings (paper, Sec. 4.5)")
    dim_student: int = setting(0, "width of the student if not d (paper, Sec. 4.5); 0: d")
    teacher_layers: int = setting(2, "L of the teacher's LightGCN (released code)")
    student_layers: int = setting(2, "L of the student's LightGCN (ours; released code: 1)")
    dropout: float = setting(0.2, "rate of ϱ in Eq. 4 (paper: needed; value ours)")
    fusion: float = setting(0.5, "c, share of the modal embeddings in E^T (released code: .028-.8)")
    weight_modal: float = setting(0.1, "w_m of stage 1's BPR on F^m (released code: 0-1)")
    lambda_prompt: float = setting(1.0, "λ₁ of Eq. 4 (released code: .07-9)")
    lambda_pair: float = setting(1.0, "λ₂ of Eq. 12 (paper: 0-100; value ours)")
    lambda_list: float = setting(0.1, "λ₃ of Eq. 12 (paper: 0-100; value ours)")
    lambda_embed: float = setting(0.1, "λ₄ of Eq. 12 (released code: .1-.9)")
    alpha: float = setting(1.0, "α of KL(b) in Eq. 10 (decoupled distillation's default)")
    beta: float | str = setting(1.0, "β of KL(q) in Eq. 10, or 'identity' for 1 - b+ (ours)")
    temperature: float = setting(1.0, "τ of the softened logits (ours)")
    gamma: float = setting(2.0, "γ of Eq. 11, at least 1 (released code)")
    negatives: int = setting(10, "K-1, negatives of a list (released code)")
    tokens: str = setting("mean", "tokens over modalities: mean (Eq. 3) or concat (errata P10)")
    prompt_rows: str = setting("items", "scale of p^m: items, 1/|I| (ours), or unit (released code)")
    modal_target: str = setting("propagated", "F_i^m: propagated (Eq. 1), mean with f^m, or reduced")
    tune_prompt: bool = setting(True, "train the prompt in stage 2 as well (paper, Sec. 3.1.2)")
    weight_anchor: float = setting(1.0, "weight of the prompted teacher's BPR in stage 2 (errata P11)")
    warm_start: bool = setting(False, "start the student at E^T (released code, errata C24)")
    lr_teacher: float = setting(5e-3, "AdamW step of stage 1 (paper: 3.5e-4 to 9.8e-3)")
    lr_student: float = setting(5e-3, "AdamW step of the student (ours; paper: 2.5e-4 to 8.5e-4)")
    lr_prompt: float = setting(1e-4, "AdamW step of the prompt in stage 2 (ours)")
    l2: float = setting(1e-4, "weight of ‖Θ‖² in Eq. 13 on batch embeddings (ours, errata P8)")
    weight_decay: float = setting(0.0, "AdamW's decay (ours: 0, one regulariser and not two)")
    batch: int = setting(2048, "training edges in a step (released code: 512-1024)")
    epochs: int = setting(400, "cap on the epochs of a stage")
    eval_every: int = setting(2, "epochs between validations")
    patience: int = setting(15, "validations without a better Recall@20 before a stage stops")
    alone: bool = setting(True, "also train the student without a teacher, for comparison")
    seed: int = setting(0, "of everything random in training; never of the data")

    def __post_init__(self):
        """Refuse what cannot work, in one line."""
        def need(holds, name, expected):
            if not holds:
                raise ValueError(f"{name}: expected {expected}, found {getattr(self, name)!r}")

        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                need(math.isfinite(value) and value >= 0, one.name, "a finite number, at least 0")
        for name in ("dim", "negatives", "batch", "epochs", "eval_every", "patience"):
            need(getattr(self, name) >= 1, name, "at least 1")
        need(self.dropout < 1, "dropout", "a rate below 1")
        need(self.temperature > 0, "temperature", "more than 0")
        need(self.gamma >= 1, "gamma", "at least 1")
        need(not isinstance(self.beta, str) or self.beta == "identity", "beta", "a number or identity")
        for name, choices in (("tokens", ("mean", "concat")), ("prompt_rows", ("items", "unit")),
                              ("modal_target", ("propagated", "mean", "reduced"))):
            need(getattr(self, name) in choices, name, " or ".join(choices))
        need(self.weight_modal > 0 or self.lambda_list == 0, "weight_modal",
             "more than 0 where lambda_list is, or the scores it distils mean nothing")
        need(not self.warm_start or self.dim_student in (0, self.dim), "dim_student", "d with a warm start")


PRESETS = {  # chosen on validation, see the README
    "default": dict(),
    "synthetic": dict(),
    "tiktok": dict(),
    "citeulike": dict(),
}

# ---------------------------------------------------------------- graph

warnings.filterwarnings("ignore", "Sparse (CSR tensor support is in beta|invariant checks are)")


def adjacency(train: sparse.csr_matrix) -> Tensor:
    """Â = D^-1/2 [[0, A], [Aᵀ, 0]] D^-1/2 as one CSR tensor [U+I, U+I] (errata C1, C18).

    Users come first. Rows without neighbours are zero.

    >>> adjacency(sparse.csr_matrix([[1, 1]])).to_dense()[0].tolist()  # one user, two items
    [0.0, 0.7071067690849304, 0.7071067690849304]
    """
    graph = sparse.block_array([[None, train], [train.T, None]], format="csr", dtype=np.float32)
    graph.sort_indices()
    degree = np.diff(graph.indptr)
    scale = 1 / np.sqrt(np.maximum(degree, 1))
    graph.data = (np.repeat(scale, degree) * scale[graph.indices]).astype(np.float32)
    parts = (torch.from_numpy(part) for part in (graph.indptr, graph.indices, graph.data))
    return torch.sparse_csr_tensor(*parts, size=graph.shape, check_invariants=True)


def halves(adjacency: Tensor, n_users: int) -> tuple[Tensor, Tensor]:
    """Â_ui [U, I], by which users read items, and Â_iu = Â_uiᵀ [I, U]: Â's two blocks."""
    start, columns, values = adjacency.crow_indices(), adjacency.col_indices(), adjacency.values()
    n_items, edges = len(adjacency) - n_users, len(values) // 2
    return (torch.sparse_csr_tensor(start[: n_users + 1], columns[:edges] - n_users, values[:edges],
                                    size=(n_users, n_items)),
            torch.sparse_csr_tensor(start[n_users:] - edges, columns[edges:], values[edges:],
                                    size=(n_items, n_users)))


def _matmul(matrix: Tensor, x: Tensor) -> Tensor:
    """Sparse CSR times dense. On a CPU a weighted bag of rows is this product, and a faster one."""
    if x.is_cuda:
        return matrix @ x
    return F.embedding_bag(matrix.col_indices(), x, matrix.crow_indices(), mode="sum",
                           per_sample_weights=matrix.values(), include_last_offset=True)


class _Product(torch.autograd.Function):
    """y = M x, where Mᵀ is at hand for the backward pass."""

    @staticmethod
    def forward(ctx, matrix, transposed, x):
        ctx.matrix, ctx.transposed = matrix, transposed
        return _matmul(matrix, x)

    @staticmethod
    def backward(ctx, gradient):
        return None, None, _Product.apply(ctx.transposed, ctx.matrix, gradient.contiguous())


class _LightGCN(torch.autograd.Function):
    """E = 1/(L+1) Σ_l Â^l E^0. A polynomial in a symmetric Â: the backward pass is the forward."""

    @staticmethod
    def forward(ctx, adjacency, x, layers):
        ctx.adjacency, ctx.layers = adjacency, layers
        total = x / (layers + 1)
        scaled = total
        for _ in range(layers):  # Horner: x + Â (x + Â (x + …)), one product and no copy a layer
            total = _matmul(adjacency, total).add_(scaled)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return None, _LightGCN.apply(ctx.adjacency, gradient.contiguous(), ctx.layers), None


def lightgcn(adjacency: Tensor, user: Tensor, item: Tensor, layers: int) -> Tensor:
    """E = mean over l = 0…L of Â^l E^0 (LightGCN; errata C16, C17): [U, d], [I, d] -> [U+I, d]."""
    return _LightGCN.apply(adjacency, torch.cat([user, item]), layers)


def table(rows: int, dim: int) -> nn.Parameter:
    """An embedding table with Xavier's uniform initialisation (Sec. 4.1.3)."""
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(rows, dim)))


# ---------------------------------------------------------------- prompt


def standardise(x: Tensor) -> Tensor:
    """x^m centred, over its root-mean-square row norm: one λ₁ then means the same for all m."""
    x = x - x.mean(0)
    return x / x.square().sum(1).mean().sqrt().clamp(min=torch.finfo(x.dtype).tiny)


def pca_tokens(x: Tensor, dim: int) -> Tensor:
    """η(x^m) of Eq. 3: the d principal components of centred x [I, d_m], unit variance -> [I, d].

    Eigenvectors are unique up to their sign: the largest entry of each is made positive (errata
    P10). Components below 1e-12 of the largest, and those beyond d_m, are zero.
    """
    covariance = sum(rows.double().T @ rows.double() for rows in x.split(4096)) / len(x)  # [d_m, d_m]
    width = len(covariance)
    kept = [max(0, width - dim), width - 1]  # the largest `dim`, ascending
    values, vectors = linalg.eigh(covariance.cpu().numpy(), subset_by_index=kept)
    values, vectors = values[::-1].copy(), vectors[:, ::-1].copy()
    peak = vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])]
    real = values > 1e-12 * max(values[0], np.finfo(np.float64).tiny)
    scale = np.where(real, np.sign(peak) / np.sqrt(np.where(real, values, 1)), 0)
    basis = torch.from_numpy(vectors * scale).to(x)  # [d_m, min(d, d_m)]
    return F.pad(x @ basis, (0, dim - basis.shape[1]))


def dropout(x: Tensor, rate: float) -> Tensor:
    """ϱ of Eq. 4. On a CPU, comparing uniforms is twice as fast as torch's Bernoulli draws."""
    return x * ((torch.rand_like(x) >= rate) / (1 - rate)) if rate else x


class PromptModule(nn.Module):
    """P of Eq. 3: p = P(tokens), one linear layer with bias, [I, tokens] -> [I, d]."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.linear = nn.Linear(width, dim)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(tokens)

    @property
    def theta(self) -> Tensor:
        """θ_P stacked, so that p = [tokens, 1] Θ: [width + 1, d]."""
        return torch.cat([self.linear.weight.T, self.linear.bias[None]])


# ---------------------------------------------------------------- teacher


class Encoded(NamedTuple):
    """What the teacher tells the student (Eq. 1)."""

    teacher_user: Tensor  # E_u^T [U, d]
    teacher_item: Tensor  # E_i^T [I, d]
    user_modal: dict[str, Tensor]  # F_u^m [U, d]
    item_modal: dict[str, Tensor]  # F_i^m [I, d]
    reduced: dict[str, Tensor]  # f^m [I, d]


class Fixed(NamedTuple):
    """The part of the teacher that no prompt reaches: in stage 2 computed once."""

    ids: Tensor  # LightGCN(ID embeddings) [U+I, d]
    xw: dict[str, Tensor]  # x^m W^m [I, d]
    gw: dict[str, Tensor]  # G^m W^m [width + 1, d]


class Teacher(nn.Module):
    """T of Eq. 1, with any number of modalities. θ_T: tables and reductions; θ_P: `prompt`."""

    def __init__(self, dataset: Dataset, config: Config, device: torch.device | str = "cpu"):
        super().__init__()
        self.config, (n_users, n_items) = config, dataset.train.shape
        self.features = {m: standardise(torch.from_numpy(x).to(device, torch.float32))
                         for m, x in dataset.features.items()}
        tokens = [pca_tokens(x, config.dim) for x in self.features.values()]
        self.tokens = torch.cat(tokens, 1) if config.tokens == "concat" else sum(tokens) / len(tokens)
        ones = self.tokens.new_ones(n_items, 1)
        gram = torch.cat([self.tokens, ones], 1).T  # T₁ᵀ
        self.gram = {m: gram @ x for m, x in self.features.items()}  # G = T₁ᵀX [width + 1, d_m]
        self.root = {m: _root(g) for m, g in self.gram.items()} if config.prompt_rows == "unit" else {}
        self.adjacency = adjacency(dataset.train).to(device)
        self.to_users, self.to_items = halves(self.adjacency, n_users)  # Â_ui, Â_iu
        degree = torch.from_numpy(np.diff(dataset.train.tocsc().indptr)).to(device)
        self.isolated = (degree == 0)[:, None]  # [I, 1]

        self.user, self.item = table(n_users, config.dim), table(n_items, config.dim)
        self.reduction = nn.ModuleList(nn.Linear(x.shape[1], config.dim) for x in self.features.values())
        for linear in self.reduction:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.prompt = PromptModule(self.tokens.shape[1], config.dim)
        self.to(device)

    def fixed(self) -> Fixed:
        ids = lightgcn(self.adjacency, self.user, self.item, self.config.teacher_layers)
        layers = list(zip(self.features, self.reduction, strict=True))
        xw = {m: self.features[m] @ linear.weight.T for m, linear in layers}
        return Fixed(ids, xw, {m: self.gram[m] @ linear.weight.T for m, linear in layers})

    def reduce(self, m: str, bias: Tensor, fixed: Fixed) -> Tensor:
        """f^m = ϱ((x^m + λ₁ p^m) W^m + b^m) with p^m = s p (pᵀ x^m)   (Eq. 4; errata P9).

        P is linear, so p = T₁Θ and pᵀX = ΘᵀG: neither p^m nor any other [I, d_m] array is formed,
        and one step costs O(|I| d²) once XW and GW are known. s is 1/|I|, or 1/‖row of p (pᵀX)‖.
        """
        f, scale = fixed.xw[m] + bias, self.config.lambda_prompt
        if scale:
            theta, prompt = self.prompt.theta, self.prompt(self.tokens)  # Eq. 3
            shift = prompt @ (theta.T @ fixed.gw[m])  # p (pᵀX) W  [I, d]
            if self.config.prompt_rows == "unit":
                shift = shift / (prompt @ (theta.T @ self.root[m])).norm(dim=1, keepdim=True).clamp(min=1e-12)
            else:
                shift = shift / len(shift)
            f = f + scale * shift
        return dropout(f, self.config.dropout) if self.training else f

    def forward(self, fixed: Fixed | None = None) -> Encoded:
        """Eq. 1. With `fixed`, only what depends on the prompt is computed."""
        fixed = fixed or self.fixed()
        teacher_user, teacher_item = fixed.ids.split([len(self.user), len(self.item)])
        user_modal, item_modal, reduced = {}, {}, {}
        for m, linear in zip(self.features, self.reduction, strict=True):
            f = reduced[m] = self.reduce(m, linear.bias, fixed)
            user = user_modal[m] = _Product.apply(self.to_users, self.to_items, f)  # F_u = Â_ui f
            item_modal[m] = self.target(f, user)
            teacher_user = teacher_user + self.config.fusion * F.normalize(user, dim=1)
            teacher_item = teacher_item + self.config.fusion * F.normalize(item_modal[m], dim=1)
        return Encoded(teacher_user, teacher_item, user_modal, item_modal, reduced)

    def target(self, f: Tensor, user: Tensor) -> Tensor:
        """F_i^m: Â_iu F_u, or f^m itself for an item without neighbours; `modal_target` varies it."""
        if self.config.modal_target == "reduced":
            return f
        item = torch.where(self.isolated, f, _Product.apply(self.to_items, self.to_users, user))
        return (f + item) / 2 if self.config.modal_target == "mean" else item


def _root(gram: Tensor) -> Tensor:
    """C with CCᵀ = GGᵀ, so that ‖row of p (pᵀX)‖ = ‖row of p ΘᵀC‖; GGᵀ may be singular."""
    values, vectors = torch.linalg.eigh((gram.double() @ gram.double().T).cpu())
    return (vectors * values.clamp(min=0).sqrt()).to(gram)


# ---------------------------------------------------------------- student


class Student(nn.Module):
    """S of Eq. 2: LightGCN over its own tables, and nothing else at inference."""

    def __init__(self, train: sparse.csr_matrix, config: Config, device: torch.device | str = "cpu",
                 start: Encoded | None = None):
        super().__init__()
        dim = config.dim_student or config.dim
        self.layers, self.adjacency = config.student_layers, adjacency(train).to(device)
        self.user, self.item = (table(rows, dim) for rows in train.shape)
        if start:  # warm start: copies, never the teacher's own storage (errata C7)
            self.user = nn.Parameter(start.teacher_user.detach().clone())
            self.item = nn.Parameter(start.teacher_item.detach().clone())
        # Another width than the teacher's: a map on the student's side, for Eq. 11 (errata P7).
        self.project = nn.Identity() if dim == config.dim else nn.Linear(dim, config.dim, bias=False)
        self.to(device)

    def forward(self) -> tuple[Tensor, Tensor]:
        """(student_user [U, d], student_item [I, d])."""
        return lightgcn(self.adjacency, self.user, self.item, self.layers).split(
            [len(self.user), len(self.item)])


# ---------------------------------------------------------------- objectives


class _Scores(torch.autograd.Function):
    """y_bk = ⟨user[users_b], item[lists_bk]⟩, with a backward pass that adds rows where they belong.

    Autograd's own would be right too, but several times slower: it copies the [B, K, d] gradient.
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
        by_user = F.embedding_bag(lists, item, mode="sum", per_sample_weights=gradient)  # [B, d]
        by_item = gradient[:, :, None] * user.index_select(0, users)[:, None]  # [B, K, d]
        return (torch.zeros_like(user).index_add_(0, users, by_user),
                torch.zeros_like(item).index_add_(0, lists.flatten(), by_item.flatten(0, 1)), None, None)


def scores(user: Tensor, item: Tensor, users: Tensor, lists: Tensor) -> Tensor:
    """Inner products of users [B] with the items of their lists [B, K]: logits [B, K]."""
    return _Scores.apply(user, item, users, lists)


def penalty(model: Teacher | Student, users: Tensor, lists: Tensor) -> Tensor:
    """‖Θ‖² of Eq. 13 on the triplets' layer-0 embeddings."""
    positive, negative = (model.item.index_select(0, lists[:, k]) for k in (0, 1))
    return l2_penalty(model.user.index_select(0, users), positive, negative)


def modal_scores(encoded: Encoded, users: Tensor, lists: Tensor) -> list[Tensor]:
    """Uni-modal logits ⟨F_u^m, F_i^m⟩ on the batch's lists, one [B, K] for each m."""
    return [scores(encoded.user_modal[m], encoded.item_modal[m], users, lists) for m in encoded.reduced]


def teacher_terms(teacher: Teacher, users: Tensor, lists: Tensor) -> dict[str, Tensor]:
    """Stage 1, θ_T and θ_P: Eq. 13 on E^T, and on each modality's own ranking."""
    config, encoded = teacher.config, teacher()
    logits = scores(encoded.teacher_user, encoded.teacher_item, users, lists)
    terms = {"bpr": bpr_loss(logits[:, 0], logits[:, 1])}
    if config.weight_modal:
        modal = modal_scores(encoded, users, lists)
        terms["modal_bpr"] = config.weight_modal * sum(bpr_loss(y[:, 0], y[:, 1]) for y in modal)
    if config.l2:
        terms["l2"] = config.l2 * penalty(teacher, users, lists)
    return terms


def student_terms(student: Student, config: Config, encoded: Encoded | None, users: Tensor,
                  lists: Tensor, tuned: bool = False) -> dict[str, Tensor]:
    """Stage 2: Eq. 12, L = BPR + λ₂ PairKD + λ₃ ListKD + λ₄ EmbKD, term by term.

    Without `encoded` the student learns alone. If `tuned`, `encoded` carries gradients to θ_P, and
    the prompted teacher's own BPR anchors it (errata P11): the student's has no path to θ_P.
    """
    student_user, student_item = student()
    logits = scores(student_user, student_item, users, lists)
    margin = logits[:, 0] - logits[:, 1]
    terms = {"bpr": bpr_loss(logits[:, 0], logits[:, 1])}
    if config.l2:
        terms["l2"] = config.l2 * penalty(student, users, lists)
    if encoded is None:
        return terms
    if config.lambda_pair or tuned:
        teacher = scores(encoded.teacher_user, encoded.teacher_item, users, lists[:, :2])
    if config.lambda_pair:
        teacher_margin = teacher[:, 0] - teacher[:, 1]
        terms["pair_kd"] = config.lambda_pair * pair_kd(margin, teacher_margin, config.temperature)
    if config.lambda_list:
        terms["list_kd"] = config.lambda_list * sum(
            list_kd(logits, y, config.alpha, config.beta, config.temperature)
            for y in modal_scores(encoded, users, lists))
    if config.lambda_embed:
        projected = student.project(student_item)
        terms["embed_kd"] = config.lambda_embed * sum(
            embed_kd(projected, f, config.gamma) for f in encoded.item_modal.values())
    if tuned and config.weight_anchor:
        terms["prompt_anchor"] = config.weight_anchor * bpr_loss(teacher[:, 0], teacher[:, 1])
    return terms


# ---------------------------------------------------------------- training


class NonFinite(ArithmeticError):
    """A loss term became NaN or infinite."""


class Run:
    """A run folder: what is written, when, and how an interrupted run goes on."""

    FILES = ("config.json", "log.csv", "teacher.pt", "alone.npz", "student.npz", "prompt.pt",
             "metrics.json", "state.pt")

    def __init__(self, folder: Path, dataset: Dataset, config: Config, device: torch.device):
        self.folder, self.dataset, self.config, self.device = folder, dataset, config, device
        self.state = self.read("state.pt") if (folder / "state.pt").exists() else {}
        self.rows: list[dict] = self.state.get("rows", [])
        self.sampler = Sampler(dataset.train, device)

    def read(self, name: str) -> dict:
        return torch.load(self.folder / name, map_location=self.device, weights_only=True)

    def write(self, name: str, content: dict) -> None:
        with whole(self.folder / name) as stream:
            torch.save(content, stream)

    def log(self, row: dict) -> None:
        """Add a line to log.csv, whose columns are those of all stages so far."""
        self.rows.append(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(name for r in self.rows for name in r)))
        writer.writeheader()
        writer.writerows(self.rows)
        with whole(self.folder / "log.csv") as stream:
            stream.write(text.getvalue().encode())

    def measure(self, user: Tensor, item: Tensor, split: str, mask: str = "all") -> dict[str, float]:
        """Metrics on a split; seen items are no candidates: train, and at test validation too."""
        seen = self.dataset.train
        if split == "test" and mask == "all":
            seen = seen + self.dataset.val
        return evaluate(user, item, getattr(self.dataset, split), seen)


def fit(run: Run, stage: str, learner: nn.Module, groups: list[dict], negatives: int,
        terms: Callable[[Tensor, Tensor], dict[str, Tensor]],
        embeddings: Callable[[], tuple[Tensor, Tensor]]) -> None:
    """Train until validation Recall@20 has not improved for `patience` evaluations; keep the best.

    groups: AdamW's parameter groups. terms(users, lists): the objective, summed here.
    embeddings(): what is ranked. On return `learner` holds the selected epoch's weights.
    """
    config, generator = run.config, torch.Generator(run.device)
    optimiser = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
    state = {"stage": stage, "epoch": 0, "best": None, "recall": -1.0, "stale": 0, "seconds": 0.0}
    if run.state.get("stage") == stage:
        state |= {name: run.state[name] for name in state}
        learner.load_state_dict(run.state["learner"])
        optimiser.load_state_dict(run.state["optimiser"])
    while state["epoch"] < config.epochs and state["stale"] < config.patience:
        began = time.perf_counter()
        state["epoch"] += 1
        # Seeded by epoch: a resumed run draws what an uninterrupted one would have, and the student
        # alone sees the same triplets as the distilled one.
        source = [config.seed, state["epoch"], stage == "teacher"]
        seed = int(np.random.SeedSequence(source).generate_state(1)[0])
        torch.manual_seed(seed)  # dropout
        sums = _epoch(learner, optimiser, *run.sampler.epoch(generator.manual_seed(seed), negatives),
                      config.batch, terms)
        for name, value in sums.items():
            if not math.isfinite(value):
                raise NonFinite(f"{stage}: {name} became {value} in epoch {state['epoch']}; expected a "
                                "finite loss, try a smaller learning rate or weight")
        state["seconds"] += time.perf_counter() - began
        if state["epoch"] % config.eval_every == 0 or state["epoch"] == config.epochs:
            learner.eval()
            with torch.no_grad():
                figures = run.measure(*embeddings(), "val")
            learner.train()
            state["stale"] += 1
            if figures["recall@20"] > state["recall"]:
                best = {name: weight.clone() for name, weight in learner.state_dict().items()}
                state |= {"recall": figures["recall@20"], "best": best, "stale": 0}
            run.log({"stage": stage, "epoch": state["epoch"], "seconds": round(state["seconds"], 3),
                     "loss": sum(sums.values()), **sums,
                     "recall@20": figures["recall@20"], "ndcg@20": figures["ndcg@20"]})
            _progress(stage, state, config, run.rows[-1])
        run.write("state.pt", {**state, "learner": learner.state_dict(),
                               "optimiser": optimiser.state_dict(), "rows": run.rows})
    learner.load_state_dict(state["best"])
    learner.eval()


def _epoch(learner, optimiser, users, lists, batch, terms) -> dict[str, float]:
    """One pass over the edges; the mean of each term. The host waits for the device only at the end."""
    learner.train()
    sums: dict[str, Tensor] = {}
    batches = list(zip(users.split(batch), lists.split(batch), strict=True))
    for some_users, some_lists in batches:
        parts = terms(some_users, some_lists)
        optimiser.zero_grad()
        sum(parts.values()).backward()  # the objective is the sum of this dict
        optimiser.step()
        for name, part in parts.items():
            sums[name] = sums.get(name, 0.0) + part.detach()
    return dict(zip(sums, (torch.stack(list(sums.values())) / len(batches)).tolist(), strict=True))


def _progress(stage: str, state: dict, config: Config, row: dict) -> None:
    """One line an evaluation; time left lies between no further improvement and the epoch cap."""
    pace = state["seconds"] / state["epoch"]
    most = config.epochs - state["epoch"]
    least = min(most, (config.patience - state["stale"]) * config.eval_every)
    print(f"{stage:8} epoch {state['epoch']:4}  loss {row['loss']:.4f}  validation R@20 "
          f"{row['recall@20']:.4f}  best {state['recall']:.4f}  {pace:.2f} s/epoch  "
          f"left {least * pace:.0f} to {most * pace:.0f} s", file=sys.stderr, flush=True)


def train_teacher(run: Run) -> Teacher:
    """Stage 1: θ_T and θ_P together. Returns the selected checkpoint, frozen, in eval mode."""
    config = run.config
    torch.manual_seed(config.seed)
    teacher = Teacher(run.dataset, config, run.device)
    if (run.folder / "teacher.pt").exists():
        teacher.load_state_dict(run.read("teacher.pt"))
    else:
        fit(run, "teacher", teacher, [{"params": list(teacher.parameters()), "lr": config.lr_teacher}], 1,
            lambda users, lists: teacher_terms(teacher, users, lists), lambda: teacher()[:2])
        run.write("teacher.pt", teacher.state_dict())
    return teacher.eval().requires_grad_(False)


def train_student(run: Run, stage: str, teacher: Teacher | None = None) -> Student:
    """Stage 2: the student, and the prompt if tuned; θ_T is frozen, its dropout off.

    What the prompt cannot change is computed once; with the prompt frozen, that is all of the teacher.
    No `no_grad` or `detach` stands between θ_P and the losses: its gradient passes *through* the
    frozen teacher (Sec. 3.1.2, errata C4).
    """
    config = run.config
    torch.manual_seed(config.seed)
    encoded, tuned = None, False
    if teacher:
        tuned = config.tune_prompt and config.lambda_prompt > 0
        with torch.no_grad():
            fixed = teacher.fixed()
            encoded = teacher(fixed)
    student = Student(run.dataset.train, config, run.device, encoded if config.warm_start else None)
    learner = nn.ModuleDict({"student": student})
    groups = [{"params": list(student.parameters()), "lr": config.lr_student}]
    if tuned:
        learner["prompt"] = teacher.prompt.requires_grad_(True)
        groups.append({"params": list(teacher.prompt.parameters()), "lr": config.lr_prompt})

    def terms(users, lists):
        told = teacher(fixed) if tuned else encoded
        return student_terms(student, config, told, users, lists, tuned)

    fit(run, stage, learner, groups, config.negatives if teacher and config.lambda_list else 1,
        terms, student)
    return student.requires_grad_(False)


def pipeline(run: Run, mask: str = "all") -> dict:
    """Both stages and the final evaluation; writes the artefacts and returns metrics.json's content."""
    config, dataset = run.config, run.dataset
    began, embeddings, parameters = time.perf_counter(), {}, {}
    popularity = torch.from_numpy(np.diff(dataset.train.tocsc().indptr)).float()[:, None].to(run.device)
    embeddings["mostpop"] = popularity.new_ones(dataset.train.shape[0], 1), popularity
    teacher = None
    if config.lambda_pair or config.lambda_list or config.lambda_embed:
        teacher = train_teacher(run)
        with torch.no_grad():
            embeddings["teacher"] = teacher()[:2]
        parameters["teacher"] = count(teacher)
        if config.alone:
            embeddings["alone"] = student_alone(run)
    student = train_student(run, "student", teacher)
    embeddings["student"] = student()
    parameters["student"] = count(student)
    write_student(run, "student.npz", *embeddings["student"])
    if teacher and teacher.prompt.linear.weight.requires_grad:
        run.write("prompt.pt", teacher.prompt.state_dict())
        with torch.no_grad():
            embeddings["teacher_tuned"] = teacher()[:2]
    result = {split: {name: run.measure(*pair, key, mask) for name, pair in embeddings.items()}
              for split, key in (("validation", "val"), ("test", "test"))}
    seconds = {row["stage"]: row["seconds"] for row in run.rows}
    result |= {
        "parameters": parameters,
        "seconds": {**seconds, "this_session": round(time.perf_counter() - began, 3)},
        "exclude": "train + val" if mask == "all" else "train",
        "device": device_name(run.device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "numpy": np.__version__, "scipy": scipy.__version__},
    }
    with whole(run.folder / "metrics.json") as stream:
        stream.write(json.dumps(result, indent=1).encode())
    (run.folder / "state.pt").unlink(missing_ok=True)
    return result


def student_alone(run: Run) -> tuple[Tensor, Tensor]:
    """The student without a teacher (= LightGCN), from the same start and the same triplets."""
    file = run.folder / "alone.npz"
    if not file.exists():
        write_student(run, file.name, *train_student(run, "alone")())
    with np.load(file) as saved:
        return tuple(torch.from_numpy(saved[name]).to(run.device) for name in ("user", "item"))


def write_student(run: Run, name: str, user: Tensor, item: Tensor) -> None:
    """All that serving needs; numpy alone reads it."""
    seen = run.dataset.train
    with whole(run.folder / name) as stream:
        np.savez(stream, user=user.cpu().numpy(), item=item.cpu().numpy(),
                 seen_indptr=seen.indptr, seen_indices=seen.indices)


def count(model: Teacher | Student) -> dict[str, int]:
    """Numbers that training learns, and numbers of frozen features that the model must carry."""
    return {"trainable": sum(p.numel() for p in model.parameters()),
            "buffers": sum(x.numel() for x in getattr(model, "features", {}).values())}


# ---------------------------------------------------------------- command line


def ladder(metrics: dict) -> str:
    """The table that a run prints: what each step of the ladder costs and reaches on test."""
    rows = (("mostpop", "MostPop"), ("alone", "student alone"), ("teacher", "teacher"),
            ("student", "student, distilled" if "teacher" in metrics["test"] else "student alone"),
            ("teacher_tuned", "teacher, tuned prompt"))
    lines = [f"{'test, unseen: ' + metrics['exclude']:24}{'Recall@20':>10}{'NDCG@20':>10}"
             f"{'trainable':>12}{'features':>12}"]
    for key, name in rows:
        if key in metrics["test"]:
            figures = metrics["test"][key]
            size = metrics["parameters"].get({"alone": "student", "teacher_tuned": "teacher"}.get(key, key))
            size = f"{size['trainable']:12,}{size['buffers']:12,}" if size else ""
            lines.append(f"{name:24}{figures['recall@20']:10.4f}{figures['ndcg@20']:10.4f}{size}")
    return "\n".join(lines)


def pick_device(name: str) -> torch.device:
    """auto: CUDA where there is one, else the CPU; anything else as asked, or DataError."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"--device {name}: not available here, expected cpu"
                        + (" or cuda" if torch.cuda.is_available() else "")) from error
    return device


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({torch.get_num_threads()} threads)"


def fingerprint(dataset: Dataset) -> str:
    """Equal for equal data, whatever the folder."""
    digest = hashlib.blake2b(digest_size=16)
    for matrix in (dataset.train, dataset.val, dataset.test):
        digest.update(repr(matrix.shape).encode())
        digest.update(matrix.indptr.astype(np.int64).tobytes() + matrix.indices.astype(np.int64).tobytes())
    for m, x in dataset.features.items():
        digest.update(m.encode() + x.tobytes())
    return digest.hexdigest()


def _number_or_word(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _parser() -> Parser:
    parser = Parser(prog="promptmm.py", description=__doc__.splitlines()[0], allow_abbrev=False,
                    epilog="also: promptmm.py recommend --run DIR --user N [--k 10] [--ids ids.json]")
    parser.add_argument("--data", help="dataset folder, see data.py (default: the embedded dataset)")
    parser.add_argument("--modalities", default="", help="comma-separated, default all that are there")
    parser.add_argument("--out", type=Path, help="run folder (default runs/<dataset name>)")
    parser.add_argument("--preset", choices=PRESETS, help="settings for a dataset, before other flags")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument("--mask", choices=("all", "train"), default="all",
                        help="no candidates at test: train + val (all) or train only (default all)")
    parser.add_argument("--student-only", action="store_true", help="no teacher: the student is LightGCN")
    parser.add_argument("--quick", action="store_true", help="two epochs a stage: a smoke test")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument("--force", action="store_true", help="replace an existing run")
    for one in fields(Config):
        kind = {bool: None, float | str: _number_or_word}.get(one.type, one.type)
        how = {"type": kind} if kind else {"action": argparse.BooleanOptionalAction}
        parser.add_argument("--" + one.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=one.metadata["help"].replace("%", "%%"), **how)
    return parser


def _start(args: argparse.Namespace) -> Run:
    """Check everything a run needs, then make or reopen its folder."""
    stored = {}
    if args.resume and args.out:
        stored = _stored(args.out)
        args.data = args.data or stored["data"]
    device = pick_device(args.device)
    dataset = load(args.data, modalities=args.modalities) if args.data else synthetic()
    folder = args.out or Path("runs") / dataset.name
    if args.resume:
        stored = stored or _stored(folder)
    elif folder.exists() and not args.force and any(folder.iterdir()):
        raise DataError(f"{folder}: exists, expected a new folder, --resume or --force")
    flags = {one.name: getattr(args, one.name) for one in fields(Config) if hasattr(args, one.name)}
    chosen = PRESETS[args.preset or ("synthetic" if not args.data else "default")]
    if args.student_only:
        flags |= {"lambda_pair": 0.0, "lambda_list": 0.0, "lambda_embed": 0.0, "alone": False}
    if args.quick:
        flags |= {"epochs": 2, "eval_every": 1}
    try:
        config = Config(**({**stored["config"]} if stored else chosen) | flags)
    except ValueError as error:
        raise DataError(f"--{str(error).replace('_', '-')}") from None
    facts = {"data": args.data and str(Path(args.data).resolve()), "fingerprint": fingerprint(dataset),
             "device": device.type, "threads": torch.get_num_threads(), "config": asdict(config)}
    for name, value in facts.items():
        if stored and stored[name] != value and name != "data":
            raise DataError(f"{folder}: cannot resume, {name} was {_difference(stored[name], value)}")
    if not stored:
        for name in Run.FILES:
            (folder / name).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        with whole(folder / "config.json") as stream:
            stream.write(json.dumps(facts, indent=1).encode())
    return Run(folder, dataset, config, device)


def _stored(folder: Path) -> dict:
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: expected a run to resume, with its config.json ({error})") from None


def _difference(was, now) -> str:
    if isinstance(was, dict):
        name = next(name for name in was if was[name] != now.get(name))
        was, now = f"{name} = {was[name]}", now.get(name)
    return f"{was}, found {now}"


def main(argv: list[str] | None = None) -> int:
    """Train, distil, evaluate; or recommend. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["recommend"]:
            return _recommend(argv[1:])
        args = _parser().parse_args(argv)
        run = _start(args)
        finished = run.folder / "metrics.json"
        if finished.exists():
            metrics = json.loads(finished.read_text())
        else:
            torch.use_deterministic_algorithms(run.device.type == "cpu")
            torch.utils.deterministic.fill_uninitialized_memory = False
            metrics = pipeline(run, args.mask)
        print(f"{ladder(metrics)}\n{run.folder}: {', '.join(sorted(f.name for f in run.folder.iterdir()))}")
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NonFinite as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; --resume goes on from the last finished epoch", file=sys.stderr)
        return 130
    return 0


def _recommend(argv: list[str]) -> int:
    parser = Parser(prog="promptmm.py recommend", description="one user's list from student.npz alone")
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    parser.add_argument("--user", required=True, help="user index, or id with --ids")
    parser.add_argument("--k", type=int, default=10, help="length of the list (default 10)")
    parser.add_argument("--ids", type=Path, help="ids.json of data.py convert: speak in one's own ids")
    args = parser.parse_args(argv)
    if args.k < 1:
        raise DataError(f"--k: expected at least 1, found {args.k}")
    file = args.run / "student.npz"
    if not file.is_file():
        raise DataError(f"{file}: expected the artefact of a finished run, found none")
    with np.load(file) as saved:
        user, item, indptr, indices = (saved[n] for n in ("user", "item", "seen_indptr", "seen_indices"))
    ids = json.loads(args.ids.read_text()) if args.ids else None
    users = {name: i for i, name in enumerate(ids["users"] if ids else map(str, range(len(user))))}
    if args.user not in users:
        raise DataError(f"--user: expected {'an id of ' + str(args.ids) if ids else f'0 to {len(user) - 1}'}, "
                        f"found {args.user}")
    row = users[args.user]
    for i, score in recommend(user[row], item, indices[indptr[row] : indptr[row + 1]], args.k):
        print(f"{ids['items'][i] if ids else i}\t{score:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

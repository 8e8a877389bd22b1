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
    Â, Â_ui, Â_iu             adjacency (scipy CSR); to_users, to_items  [U+I, U+I], [U, I], [I, U]
    η(x^m), averaged          tokens                                     [I, d]
    p, p^m                    prompt; p^m is never formed                [I, d], [I, d_m]
    θ_P                       theta: W_P stacked on b_P                  [d+1, d]
    f^m                       reduced[m]                                 [I, d]
    F_u^m, F_i^m              user_modal[m], item_modal[m]               [U, d], [I, d]
    E_u^T, E_i^T              teacher_user, teacher_item                 [U, d], [I, d]
    E_u^S, E_i^S              student_user, student_item                 [U, d], [I, d]
    y_list                    logits, column 0 the positive              [B, K]
    y_pair                    margin = logits[:, 0] - logits[:, 1]       [B]
"""

import argparse
import json
import math
import sys
import time
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy
import torch
import torch.nn.functional as F
from scipy import linalg, sparse
from torch import Tensor, nn

from data import DataError, Dataset, Parser, Sampler, fingerprint, load, synthetic, write
from evaluate import evaluate, ladder, recommend
from losses import bpr_loss, embed_kd, l2_penalty, list_kd, pair_kd, scores

# ---------------------------------------------------------------- settings


def setting(default, meaning: str, low=0, high=math.inf, choices=()):
    return field(default=default, metadata=dict(help=meaning, low=low, high=high, choices=choices))


@dataclass(frozen=True)
class Config:
    """Every setting of a run; each is a flag. Sources: paper section, released code, or ours."""

    dim: int = setting(64, "d, width of the embeddings (paper, Sec. 4.5)", 1)
    dim_student: int = setting(0, "width of the student; 0: d (paper, Sec. 4.5)")
    teacher_layers: int = setting(2, "L of the teacher's LightGCN (released code)")
    student_layers: int = setting(2, "L of the student's LightGCN (ours; released code: 1)")
    dropout: float = setting(0.2, "rate of ϱ in Eq. 4 (paper: needed; value ours)", 0, 1)
    fusion: float = setting(0.5, "c, weight of the modal embeddings in E^T (released code: .028-.8)")
    weight_modal: float = setting(0.1, "w_m of stage 1's BPR on F^m (released code: 0-1)")
    lambda_prompt: float = setting(1.0, "λ₁ of Eq. 4 (released code: .07-9)")
    lambda_pair: float = setting(1.0, "λ₂ of Eq. 12 (paper: 0-100; value ours)")
    lambda_list: float = setting(0.1, "λ₃ of Eq. 12 (paper: 0-100; value ours)")
    lambda_embed: float = setting(0.1, "λ₄ of Eq. 12 (released code: .1-.9)")
    alpha: float = setting(1.0, "α of KL(b) in Eq. 10 (decoupled distillation's default)")
    beta: float | str = setting(1.0, "β of KL(q) in Eq. 10, or identity", choices=("identity",))
    temperature: float = setting(1.0, "τ of the softened logits (ours)", 1e-3)
    gamma: float = setting(2.0, "γ of Eq. 11 (released code)", 1)
    negatives: int = setting(10, "K-1, negatives of a list (released code)", 1)
    tokens: str = setting("mean", "η(x^m) over m (Eq. 3, errata P10)", choices=("mean", "concat"))
    prompt_rows: str = setting("items", "p^m over |I|, or unit rows", choices=("items", "unit"))
    modal_target: str = setting("propagated", "F_i^m: Â_iu F_u, its mean with f^m, or f^m alone",
                                choices=("propagated", "mean", "reduced"))
    tune_prompt: bool = setting(True, "train the prompt in stage 2 too (paper, Sec. 3.1.2)")
    weight_anchor: float = setting(1.0, "of the prompted teacher's BPR in stage 2 (errata P11)")
    warm_start: bool = setting(False, "start the student at E^T (released code, errata C24)")
    lr_teacher: float = setting(5e-3, "AdamW's step in stage 1 (paper: 3.5e-4 to 9.8e-3)")
    lr_student: float = setting(5e-3, "AdamW's step of the student (paper: 2.5e-4 to 8.5e-4)")
    lr_prompt: float = setting(1e-4, "AdamW's step of the prompt in stage 2 (ours)")
    l2: float = setting(1e-4, "of ‖Θ‖² in Eq. 13, on the batch (ours, errata P8)")
    weight_decay: float = setting(0.0, "AdamW's decay (ours: one regulariser, not two)")
    batch: int = setting(2048, "training edges in a step (released code: 512-1024)", 1)
    epochs: int = setting(400, "cap on the epochs of a stage", 1)
    eval_every: int = setting(2, "epochs between validations", 1)
    patience: int = setting(15, "validations without a better Recall@20 that end a stage", 1)
    alone: bool = setting(True, "train the student without a teacher too, to compare")
    seed: int = setting(0, "of everything random in training, never of the data")

    def __post_init__(self):
        """Refuse what cannot work."""
        for one in fields(self):
            value, (low, high, choices) = getattr(self, one.name), list(one.metadata.values())[1:]
            if isinstance(value, str) and value not in choices:
                raise ValueError(f"{one.name}: expected {' or '.join(choices)}, found {value}")
            if not isinstance(value, str) and not low <= value < high:
                raise ValueError(f"{one.name}: expected {low} <= number < {high}, found {value}")
        if self.lambda_list and not self.weight_modal:  # the scores it distils would mean nothing
            raise ValueError("weight_modal: expected more than 0 with lambda_list > 0, found 0")
        if self.warm_start and self.dim_student not in (0, self.dim):
            raise ValueError(f"dim_student: expected d to start warm, found {self.dim_student}")


PRESETS = {  # chosen on validation, see the README
    "synthetic": dict(),
    "tiktok": dict(),
    "citeulike": dict(),
}
WORKING_FILES = ("state.pt", "alone.pt", "student.pt")  # in a run folder while the run lasts
FILES = ("config.json", "log.csv", "teacher.pt", "prompt.pt", "student.npz", "metrics.json")

# ---------------------------------------------------------------- graph

warnings.filterwarnings("ignore", "Sparse (CSR tensor support is in beta|invariant checks are)")


def adjacency(train: sparse.csr_matrix) -> sparse.csr_matrix:
    """Â = D^-1/2 [[0, A], [Aᵀ, 0]] D^-1/2, users first (errata C1, C18): [U+I, U+I].

    Rows without neighbours are zero.

    >>> adjacency(sparse.csr_matrix([[1, 1]])).toarray().round(4)[0].tolist()  # a user, two items
    [0.0, 0.7071, 0.7071]
    """
    nodes = sparse.bmat([[None, train], [train.T, None]], format="csr")
    scale = sparse.diags(1 / np.sqrt(np.maximum(np.diff(nodes.indptr), 1)))
    return (scale @ nodes @ scale).astype(np.float32).tocsr()


class Graph(NamedTuple):
    """Â's two blocks, each the other's transpose: all of Â that is not zero."""

    to_users: Tensor  # Â_ui: users read items, CSR [U, I]
    to_items: Tensor  # Â_iu: items read users, CSR [I, U]


def graph(train: sparse.csr_matrix, device: torch.device | str = "cpu") -> Graph:
    nodes, n_users = adjacency(train), train.shape[0]
    blocks = nodes[:n_users, n_users:], nodes[n_users:, :n_users]
    return Graph(*(torch.sparse_csr_tensor(b.indptr, b.indices, b.data, b.shape).to(device)
                   for b in blocks))


def _matmul(matrix: Tensor, x: Tensor) -> Tensor:
    """Sparse CSR times dense. On a CPU a weighted bag of rows is this product, and a faster one."""
    if x.is_cuda:
        return matrix @ x
    return F.embedding_bag(matrix.col_indices(), x, matrix.crow_indices(), mode="sum",
                           per_sample_weights=matrix.values(), include_last_offset=True)


class _Product(torch.autograd.Function):
    """y = M x with Mᵀ at hand: the backward pass of one block of Â multiplies by the other."""

    @staticmethod
    def forward(ctx, matrix, transposed, x):
        ctx.matrix, ctx.transposed = matrix, transposed
        return _matmul(matrix, x)

    @staticmethod
    def backward(ctx, gradient):
        return None, None, _Product.apply(ctx.transposed, ctx.matrix, gradient.contiguous())


def to_users(graph: Graph, item: Tensor) -> Tensor:
    """Â_ui item: [I, d] -> [U, d]."""
    return _Product.apply(graph.to_users, graph.to_items, item)


def to_items(graph: Graph, user: Tensor) -> Tensor:
    """Â_iu user: [U, d] -> [I, d]."""
    return _Product.apply(graph.to_items, graph.to_users, user)


def lightgcn(graph: Graph, user: Tensor, item: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    """E^(l+1) = Â E^(l), E = mean over l = 0…L (LightGCN; errata C16, C17): [U, d], [I, d]."""
    total_user, total_item = user, item
    for _ in range(layers):
        user, item = to_users(graph, item), to_items(graph, user)
        total_user, total_item = total_user + user, total_item + item
    return total_user / (layers + 1), total_item / (layers + 1)


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


class Linear(nn.Linear):
    """x Wᵀ + b, Xavier and zero."""

    def reset_parameters(self):
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)


class PromptModule(Linear):
    """P of Eq. 3: p = P(tokens), one linear layer with bias, [I, width] -> [I, d]."""


# ---------------------------------------------------------------- teacher


class Encoded(NamedTuple):
    """What the teacher tells the student (Eq. 1)."""

    teacher_user: Tensor  # E_u^T [U, d]
    teacher_item: Tensor  # E_i^T [I, d]
    user_modal: dict[str, Tensor]  # F_u^m [U, d]
    item_modal: dict[str, Tensor]  # F_i^m [I, d]
    reduced: dict[str, Tensor]  # f^m [I, d]


class Teacher(nn.Module):
    """T of Eq. 1, with any number of modalities. θ_T: tables and reductions; θ_P: `prompt`."""

    def __init__(self, dataset: Dataset, config: Config, device: torch.device | str = "cpu"):
        super().__init__()
        self.config, (n_users, n_items) = config, dataset.train.shape
        self.features = {m: standardise(torch.from_numpy(x).to(device, torch.float32))
                         for m, x in dataset.features.items()}
        tokens = [pca_tokens(x, config.dim) for x in self.features.values()]
        mean = config.tokens == "mean"
        self.tokens = sum(tokens) / len(tokens) if mean else torch.cat(tokens, 1)  # [I, width]
        lifted = torch.cat([self.tokens, self.tokens.new_ones(n_items, 1)], 1)  # T₁ = [tokens, 1]
        self.gram = {m: lifted.T @ x for m, x in self.features.items()}  # G = T₁ᵀX [width + 1, d_m]
        unit = config.prompt_rows == "unit"
        self.root = {m: _root(g) for m, g in self.gram.items()} if unit else {}
        self.graph = graph(dataset.train, device)
        degree = np.diff(dataset.train.tocsc().indptr)
        self.isolated = torch.from_numpy(degree == 0).to(device)[:, None]  # [I, 1]

        self.user, self.item = table(n_users, config.dim), table(n_items, config.dim)
        widths = [x.shape[1] for x in self.features.values()]
        self.reduction = nn.ModuleList(Linear(d_m, config.dim) for d_m in widths)  # W^m, b^m
        self.prompt = PromptModule(self.tokens.shape[1], config.dim)
        self.to(device)

    def fixed(self) -> tuple[tuple[Tensor, Tensor], dict[str, tuple[Tensor, Tensor, Tensor]]]:
        """What no prompt reaches: LightGCN's output; XW [I, d], GW [width + 1, d] and b of each m."""
        ids = lightgcn(self.graph, self.user, self.item, self.config.teacher_layers)
        layers = {m: (x @ layer.weight.T, self.gram[m] @ layer.weight.T, layer.bias)
                  for (m, x), layer in zip(self.features.items(), self.reduction, strict=True)}
        return ids, layers

    def reduce(self, m: str, xw: Tensor, gw: Tensor, bias: Tensor) -> Tensor:
        """f^m = ϱ((x^m + λ₁ p^m) W^m + b^m) with p^m = s p (pᵀ x^m)   (Eq. 4; errata P9).

        P is linear, so p = T₁Θ and pᵀX = ΘᵀG: neither p^m nor any other [I, d_m] array is formed,
        and one step costs O(|I| d²) once XW and GW are known. s is 1/|I|, or 1/‖row of p (pᵀX)‖.
        """
        f = xw + bias
        if self.config.lambda_prompt:
            prompt = self.prompt(self.tokens)  # Eq. 3
            theta = torch.cat([self.prompt.weight.T, self.prompt.bias[None]])  # Θ
            shift = prompt @ (theta.T @ gw) / len(prompt)  # p (pᵀX) W / |I|  [I, d]
            if self.root:
                norm = (prompt @ (theta.T @ self.root[m])).norm(dim=1, keepdim=True) / len(prompt)
                shift = shift / norm.clamp(min=1e-12)
            f = f + self.config.lambda_prompt * shift
        return dropout(f, self.config.dropout) if self.training else f

    def forward(self, fixed: tuple | None = None) -> Encoded:
        """Eq. 1. With `fixed`, only what depends on the prompt is computed."""
        (teacher_user, teacher_item), layers = fixed or self.fixed()
        user_modal, item_modal, reduced, c = {}, {}, {}, self.config.fusion
        for m, (xw, gw, bias) in layers.items():
            f = reduced[m] = self.reduce(m, xw, gw, bias)
            user_modal[m] = to_users(self.graph, f)  # F_u = Â_ui f
            item_modal[m] = self.target(f, user_modal[m])
            teacher_user = teacher_user + c * F.normalize(user_modal[m], dim=1)
            teacher_item = teacher_item + c * F.normalize(item_modal[m], dim=1)
        return Encoded(teacher_user, teacher_item, user_modal, item_modal, reduced)

    def target(self, f: Tensor, user: Tensor) -> Tensor:
        """F_i = Â_iu F_u, or f for an item without neighbours; `modal_target` varies it."""
        if self.config.modal_target == "reduced":
            return f
        item = torch.where(self.isolated, f, to_items(self.graph, user))
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
        self.layers, self.graph = config.student_layers, graph(train, device)
        dim = config.dim_student or config.dim
        self.user, self.item = (table(rows, dim) for rows in train.shape)
        if start:  # a copy, never the teacher's own storage (errata C7)
            self.user, self.item = (nn.Parameter(e.detach().clone()) for e in start[:2])
        # Narrower than the teacher: a map on the student's side, for Eq. 11 alone (errata P7).
        self.project = nn.Identity() if dim == config.dim else nn.Linear(dim, config.dim, bias=False)
        self.to(device)

    def forward(self) -> tuple[Tensor, Tensor]:
        """(student_user [U, d], student_item [I, d])."""
        return lightgcn(self.graph, self.user, self.item, self.layers)


# ---------------------------------------------------------------- objectives


def penalty(model: Teacher | Student, users: Tensor, lists: Tensor) -> Tensor:
    """‖Θ‖² of Eq. 13 on the triplets' layer-0 embeddings."""
    positive, negative = (model.item.index_select(0, lists[:, k]) for k in (0, 1))
    return l2_penalty(model.user.index_select(0, users), positive, negative)


def modal_scores(encoded: Encoded, users: Tensor, lists: Tensor) -> list[Tensor]:
    """Uni-modal logits ⟨F_u^m, F_i^m⟩ on the batch's lists, one [B, K] for each m."""
    return [scores(user, encoded.item_modal[m], users, lists) for m, user in encoded.user_modal.items()]


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
                  lists: Tensor) -> dict[str, Tensor]:
    """Stage 2: Eq. 12, L = BPR + λ₂ PairKD + λ₃ ListKD + λ₄ EmbKD, term by term.

    Without `encoded` the student learns alone. Where the prompt is tuned, `encoded` depends on θ_P
    and the prompted teacher's own BPR anchors it: the student's has no path to θ_P (errata P11).
    """
    student_user, student_item = student()
    logits = scores(student_user, student_item, users, lists)
    terms = {"bpr": bpr_loss(logits[:, 0], logits[:, 1])}
    if config.l2:
        terms["l2"] = config.l2 * penalty(student, users, lists)
    if encoded is None:
        return terms
    teacher = scores(encoded.teacher_user, encoded.teacher_item, users, lists[:, :2])
    tau = config.temperature
    if config.lambda_pair:
        margin, teacher_margin = logits[:, 0] - logits[:, 1], teacher[:, 0] - teacher[:, 1]
        terms["pair_kd"] = config.lambda_pair * pair_kd(margin, teacher_margin, tau)
    if config.lambda_list:
        modal = modal_scores(encoded, users, lists)
        terms["list_kd"] = config.lambda_list * sum(
            list_kd(logits, y, config.alpha, config.beta, tau) for y in modal)
    if config.lambda_embed:
        projected = student.project(student_item)
        terms["embed_kd"] = config.lambda_embed * sum(
            embed_kd(projected, f, config.gamma) for f in encoded.item_modal.values())
    if teacher.requires_grad and config.weight_anchor:
        terms["prompt_anchor"] = config.weight_anchor * bpr_loss(teacher[:, 0], teacher[:, 1])
    return terms


# ---------------------------------------------------------------- training


class NonFinite(ArithmeticError):
    """A loss term became NaN or infinite."""


@dataclass
class Run:
    """A run folder and what it is about; `state` is what an interrupted run goes on from."""

    folder: Path
    dataset: Dataset
    config: Config
    device: torch.device
    state: dict

    def log(self, row: dict) -> None:
        """One more evaluation in log.csv, whose columns are those of all stages so far."""
        rows = self.state["rows"] = [*self.state.get("rows", []), row]
        columns = dict.fromkeys(name for one in rows for name in one)
        lines = [columns, *([str(one.get(c, "")) for c in columns] for one in rows)]
        text = "".join(",".join(line) + "\n" for line in lines)
        write(self.folder / "log.csv", text)

    def measure(self, embeddings, split: str, mask: str = "all") -> dict[str, float]:
        """Metrics on "val" or "test". No candidates: train; at test, unless masked less, val too."""
        exclude = self.dataset.train
        if split == "test" and mask == "all":
            exclude = exclude + self.dataset.val
        return evaluate(*embeddings, getattr(self.dataset, split), exclude)


def fit(run: Run, stage: str, learner: nn.Module, groups: list[dict], width: int, terms, rank) -> None:
    """Train until validation Recall@20 stops improving; leave the selected epoch's weights.

    groups: AdamW's. terms(users [B], lists [B, width]) -> the objective's terms by name. rank() ->
    (user [U, d], item [I, d]), judged on validation; the test split is never touched. A stage that
    an earlier session finished is read from its file.
    """
    file, config, generator = run.folder / f"{stage}.pt", run.config, torch.Generator(run.device)
    if file.exists():
        learner.load_state_dict(torch.load(file, run.device, weights_only=True))
        return
    sampler = Sampler(run.dataset.train, run.device)
    optimiser = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
    state = {"stage": stage, "epoch": 0, "recall": -1.0, "stale": 0, "seconds": 0.0, "best": None}
    if run.state.get("stage") == stage:
        state = {name: run.state[name] for name in state}
        learner.load_state_dict(run.state["learner"])
        optimiser.load_state_dict(run.state["optimiser"])
    while state["epoch"] < config.epochs and state["stale"] < config.patience:
        began = time.perf_counter()
        state["epoch"] += 1
        # Seeded by epoch: a resumed run draws what an uninterrupted one would have, and the student
        # alone meets the same edges in the same order as the distilled one.
        source = np.random.SeedSequence([config.seed, state["epoch"], stage == "teacher"])
        torch.manual_seed(seed := int(source.generate_state(1)[0]))  # dropout
        samples = sampler.epoch(generator.manual_seed(seed), width - 1)
        means = _epoch(learner, optimiser, samples, config.batch, terms)
        for name, value in means.items():
            if not math.isfinite(value):
                raise NonFinite(f"{stage}, epoch {state['epoch']}: expected finite losses, found "
                                f"{name} = {value}; a smaller step or weight may help")
        state["seconds"] += time.perf_counter() - began
        if state["epoch"] % config.eval_every == 0 or state["epoch"] == config.epochs:
            _validate(run, state, learner, means, rank)
        run.state |= {**state, "learner": learner.state_dict(), "optimiser": optimiser.state_dict()}
        write(run.folder / "state.pt", lambda stream: torch.save(run.state, stream))
    learner.load_state_dict(state["best"])
    write(file, lambda stream: torch.save(state["best"], stream))


def _epoch(learner, optimiser, samples, batch: int, terms) -> dict[str, float]:
    """One pass over the edges; each term's mean. The host waits for the device only at the end."""
    learner.train()
    totals: dict[str, Tensor] = {}
    batches = list(zip(*(part.split(batch) for part in samples), strict=True))
    for users, lists in batches:
        parts = terms(users, lists)
        optimiser.zero_grad()
        sum(parts.values()).backward()  # the objective is the sum of this dict
        optimiser.step()
        for name, part in parts.items():
            totals[name] = totals.get(name, 0.0) + part.detach()
    means = torch.stack(list(totals.values())) / len(batches)
    return dict(zip(totals, means.tolist(), strict=True))


def _validate(run: Run, state: dict, learner: nn.Module, means: dict[str, float], rank) -> None:
    """Judge an epoch on the validation split, keep it if it is the best yet, and report."""
    learner.eval()
    with torch.no_grad():
        found = run.measure(rank(), "val")
    state["stale"] += 1
    if found["recall@20"] > state["recall"]:
        best = {name: weight.clone() for name, weight in learner.state_dict().items()}
        state |= {"recall": found["recall@20"], "stale": 0, "best": best}
    row = {name: state[name] for name in ("stage", "epoch", "seconds")}
    row |= {name: found[name] for name in ("recall@20", "ndcg@20")}
    run.log(row | {"loss": sum(means.values()), **means})
    most, pace = run.config.epochs - state["epoch"], state["seconds"] / state["epoch"]
    least = min(most, (run.config.patience - state["stale"]) * run.config.eval_every)
    print(f"{state['stage']:8} epoch {state['epoch']:4}  loss {sum(means.values()):.4f}  validation "
          f"R@20 {found['recall@20']:.4f}  best {state['recall']:.4f}  {pace:.2f} s/epoch  left "
          f"{least * pace:.0f} to {most * pace:.0f} s", file=sys.stderr, flush=True)


def train_teacher(run: Run) -> Teacher:
    """Stage 1: θ_T and θ_P together. Returns the selected checkpoint, frozen, in eval mode."""
    torch.manual_seed(run.config.seed)
    teacher = Teacher(run.dataset, run.config, run.device)
    groups = [{"params": list(teacher.parameters()), "lr": run.config.lr_teacher}]
    fit(run, "teacher", teacher, groups, 2,
        lambda users, lists: teacher_terms(teacher, users, lists), lambda: teacher()[:2])
    return teacher.eval().requires_grad_(False)


def tuned(config: Config) -> bool:
    """Whether stage 2 trains the prompt."""
    return config.tune_prompt and config.lambda_prompt > 0


def train_student(run: Run, stage: str, teacher: Teacher | None = None) -> tuple[Tensor, Tensor]:
    """Stage 2: the student, and the prompt if tuned. Returns E_u^S, E_i^S.

    θ_T is frozen and its dropout off; what no prompt reaches is computed once, and with the prompt
    frozen that is all of the teacher. Neither `no_grad` nor `detach` stands between θ_P and the
    losses: gradients reach the prompt *through* the frozen teacher (Sec. 3.1.2, errata C4).
    """
    config, encoded = run.config, None
    tune = teacher is not None and tuned(config)
    if teacher:
        with torch.no_grad():
            encoded = teacher(fixed := teacher.fixed())
    torch.manual_seed(config.seed)
    start = encoded if config.warm_start else None
    student = Student(run.dataset.train, config, run.device, start)
    learner = nn.ModuleDict({"student": student})
    groups = [{"params": list(student.parameters()), "lr": config.lr_student}]
    if tune:
        learner["prompt"] = teacher.prompt.requires_grad_(True)
        groups.append({"params": list(teacher.prompt.parameters()), "lr": config.lr_prompt})

    def terms(users, lists):
        told = teacher(fixed) if tune else encoded
        return student_terms(student, config, told, users, lists)

    width = 1 + (config.negatives if teacher and config.lambda_list else 1)
    fit(run, stage, learner, groups, width, terms, student)
    with torch.no_grad():
        return student()


def pipeline(run: Run, mask: str = "all") -> dict:
    """Both stages and the final evaluation: writes the artefacts, returns metrics.json's content."""
    config, train, began, teacher = run.config, run.dataset.train, time.perf_counter(), None
    popularity = torch.from_numpy(np.diff(train.tocsc().indptr)).float().to(run.device)
    ranked = {"mostpop": (popularity.new_ones(train.shape[0], 1), popularity[:, None])}
    sizes = {}
    if config.lambda_pair or config.lambda_list or config.lambda_embed:
        teacher = train_teacher(run)
        sizes["teacher"] = [sum(p.numel() for p in teacher.parameters()),
                            sum(x.numel() for x in teacher.features.values())]
        with torch.no_grad():
            ranked["teacher"] = teacher()[:2]
        if config.alone:
            ranked["alone"] = train_student(run, "alone")  # the student without a teacher: LightGCN
    user, item = ranked["student"] = train_student(run, "student", teacher)
    sizes["student"] = [user.numel() + item.numel(), 0]
    arrays = {"user": user.cpu().numpy(), "item": item.cpu().numpy(),
              "seen_indptr": train.indptr, "seen_indices": train.indices}
    write(run.folder / "student.npz", lambda stream: np.savez(stream, **arrays))
    if teacher and tuned(config):
        prompt = teacher.prompt.state_dict()
        write(run.folder / "prompt.pt", lambda stream: torch.save(prompt, stream))
        with torch.no_grad():
            ranked["teacher_tuned"] = teacher()[:2]
    metrics = {name: {model: run.measure(pair, split, mask) for model, pair in ranked.items()}
               for name, split in (("validation", "val"), ("test", "test"))}
    cuda = run.device.type == "cuda"
    metrics |= {
        "parameters": {m: {"trainable": a, "buffers": b} for m, (a, b) in sizes.items()},
        "seconds": {row["stage"]: row["seconds"] for row in run.state["rows"]}
        | {"this_session": time.perf_counter() - began},
        "exclude": "train + val" if mask == "all" else "train",
        "device": torch.cuda.get_device_name(run.device) if cuda else "cpu",
        "versions": {m.__name__: m.__version__ for m in (torch, np, scipy)},
    }
    write(run.folder / "metrics.json", json.dumps(metrics, indent=1))
    for name in WORKING_FILES:
        (run.folder / name).unlink(missing_ok=True)
    return metrics


# ---------------------------------------------------------------- command line


def pick_device(name: str) -> torch.device:
    """auto: CUDA where there is one, else the CPU; otherwise as asked, or DataError."""
    here = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["cpu"]
    device = {"auto": here[0], "cuda": "cuda:0"}.get(name, name)
    if device not in here:
        raise DataError(f"--device: expected auto or one of {', '.join(here)}, found {name}")
    return torch.device(device)


def _parser() -> Parser:
    parser = Parser(prog="promptmm.py", description=__doc__.splitlines()[0], allow_abbrev=False,
                    epilog="Also: promptmm.py recommend --help; data.py --help.")
    parser.add_argument("--data", help="dataset folder (default: the embedded dataset)")
    parser.add_argument("--modalities", default="", help="comma-separated (default: all there are)")
    parser.add_argument("--out", type=Path, help="run folder (default: runs/<dataset name>)")
    parser.add_argument("--preset", choices=PRESETS, help="settings that other flags may override")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--mask", choices=("all", "train"), default="all",
                        help="no candidates at test: train and validation (all), or train only")
    for flag, meaning in (("--student-only", "no teacher: LightGCN"), ("--force", "replace a run"),
                          ("--quick", "two epochs a stage: a smoke test"),
                          ("--resume", "go on with an interrupted run")):
        parser.add_argument(flag, action="store_true", help=meaning)
    for one in fields(Config):
        kind = one.type if one.type in (int, float, str) else lambda t: t if t.isalpha() else float(t)
        how = {"action": argparse.BooleanOptionalAction} if one.type is bool else {"type": kind}
        parser.add_argument(f"--{one.name.replace('_', '-')}", default=argparse.SUPPRESS, **how,
                            help=f"{one.metadata['help']} (default: {one.default})")
    return parser


def _start(args: argparse.Namespace) -> Run:
    """Check everything a run needs, then make or reopen its folder."""
    name = Path(args.data).resolve().name if args.data else "synthetic"
    folder, stored = args.out or Path("runs") / name, {}
    if args.resume:
        stored = json.loads((folder / "config.json").read_text())
    elif folder.exists() and not args.force and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: exists; expected a new folder, --resume or --force")
    source, device = args.data or stored.get("data"), pick_device(args.device)
    preset = PRESETS.get(args.preset or (None if source else "synthetic"), {})
    settings = {**preset, **{one.name: stored[one.name] for one in fields(Config) if stored}}
    settings |= {one.name: getattr(args, one.name) for one in fields(Config) if one.name in args}
    if args.student_only:
        settings |= {"lambda_pair": 0.0, "lambda_list": 0.0, "lambda_embed": 0.0}
    if args.quick:
        settings |= {"epochs": 2, "eval_every": 1}
    try:
        config = Config(**settings)
    except ValueError as error:
        raise DataError(f"--{error}") from None
    dataset = load(source, modalities=args.modalities) if source else synthetic()
    facts = {"fingerprint": fingerprint(dataset), "device": str(device), "mask": args.mask,
             "threads": torch.get_num_threads(), **vars(config)}
    for key in (key for key in facts if stored and facts[key] != stored[key]):
        raise DataError(f"{folder}: expected {key} = {stored[key]} to resume, found {facts[key]}")
    folder.mkdir(parents=True, exist_ok=True)
    for name in () if stored else FILES + WORKING_FILES:
        (folder / name).unlink(missing_ok=True)
    facts["data"] = source and str(Path(source).resolve())
    write(folder / "config.json", json.dumps(facts, indent=1))
    file = folder / "state.pt"
    state = torch.load(file, device, weights_only=True) if file.exists() else {}
    return Run(folder, dataset, config, device, state)


def main(argv: list[str] | None = None) -> int:
    """Train, distil, evaluate; or recommend. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["recommend"]:
            return _recommend(argv[1:])
        args = _parser().parse_args(argv)
        run = _start(args)
        torch.use_deterministic_algorithms(run.device.type == "cpu")
        torch.utils.deterministic.fill_uninitialized_memory = False  # or each `empty` costs a fill
        done = run.folder / "metrics.json"
        metrics = json.loads(done.read_text()) if done.exists() else pipeline(run, args.mask)
        print(f"{ladder(metrics)}\nno candidates: {metrics['exclude']}; more in {done}")
    except (DataError, OSError, NonFinite) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, NonFinite) else 2
    except KeyboardInterrupt:
        print("interrupted; --resume goes on after the last finished epoch", file=sys.stderr)
        return 130
    return 0


def _recommend(argv: list[str]) -> int:
    parser = Parser(prog="promptmm.py recommend", description="A user's list, from student.npz alone.")
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    parser.add_argument("--user", required=True, help="user index; with --ids, your own id")
    parser.add_argument("--k", type=int, default=10, help="length of the list (default: 10)")
    parser.add_argument("--ids", type=Path, help="ids.json of `data.py convert`: speak in your ids")
    args = parser.parse_args(argv)
    with np.load(args.run / "student.npz") as saved:
        user, item, start, seen = (saved[n] for n in ("user", "item", "seen_indptr", "seen_indices"))
    ids = json.loads(args.ids.read_text()) if args.ids else {"items": range(len(item))}
    names = ids.get("users", [str(u) for u in range(len(user))])
    if args.user not in names or args.k < 1:
        raise DataError(f"expected --user {names[0]} … {names[-1]} and --k 1 or more, found {args.user} "
                        f"and {args.k}")
    u = names.index(args.user)
    for i, score in recommend(user[u], item, seen[start[u] : start[u + 1]], args.k):
        print(f"{ids['items'][i]}\t{score:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

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
    η(x^m)                    tokens (width d, or |M| d side by side)    [I, width]
    p, p^m                    prompt; p^m is never formed                [I, d], [I, d_m]
    θ_P                       theta: W_P stacked on b_P                  [width+1, d]
    f^m                       reduced[m]                                 [I, d]
    F_u^m, F_i^m              user_modal[m], item_modal[m]               [U, d], [I, d]
    E_u^T, E_i^T              teacher_user, teacher_item                 [U, d], [I, d]
    E_u^S, E_i^S              student_user, student_item                 [U, d], [I, d]
    y_list                    logits, column 0 the positive              [B, K]
    y_pair, inside its σ      logits[:, 0] - logits[:, 1], the margin    [B]
"""

import argparse
import json
import sys
import time
import warnings
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import __version__ as scipy_version, sparse
from torch import Tensor, nn

import data
from data import DataError, Dataset, Parser, Sampler, need, write
from evaluate import evaluate, ladder, recommend
from losses import bpr_loss, embed_kd, l2_penalty, list_kd, pair_kd, scores

# ---------------------------------------------------------------- settings


def setting(default, meaning: str, choices=(), low=0, high=np.inf):
    return field(default=default, metadata=dict(help=meaning, low=low, high=high, choices=choices))


@dataclass(frozen=True)
class Config:
    """Every setting of a run; each is a flag. Sources: paper section, released code, or ours."""

    dim: int = setting(64, "d, width of the embeddings (paper, Sec. 4.5)", low=1, high=1e5)
    dim_student: int = setting(0, "width of the student; 0: d (paper, Sec. 4.5)", high=1e5)
    teacher_layers: int = setting(2, "L of the teacher's LightGCN (released code)")
    student_layers: int = setting(2, "L of the student's LightGCN (ours; released code: 1)")
    dropout: float = setting(0.2, "rate of ϱ in Eq. 4 (ours; released code: .4-.6)", high=1)
    fusion: float = setting(1.0, "c, weight of F^m in E^T (ours; released code: .028-.8)")
    weight_modal: float = setting(0.1, "w_m of stage 1's BPR on F^m (released code: 0-1)")
    lambda_prompt: float = setting(0.1, "λ₁ of Eq. 4 (released code: .07-9)")
    lambda_pair: float = setting(1.0, "λ₂ of Eq. 12 (paper: 0-100; value ours)")
    lambda_list: float = setting(0.1, "λ₃ of Eq. 12 (paper: 0-100; value ours)")
    lambda_embed: float = setting(0.1, "λ₄ of Eq. 12 (released code: .1-.9)")
    alpha: float = setting(1.0, "α of KL(b) in Eq. 10 (decoupled distillation's default)")
    beta: float | str = setting(1.0, "β of KL(q) in Eq. 10, or (ours)", ("identity",))
    temperature: float = setting(1.0, "τ of the softened logits (ours)", low=1e-3)
    gamma: float = setting(2.0, "γ of Eq. 11 (released code)", low=1)
    negatives: int = setting(10, "K-1, negatives of a list (released code)", low=1, high=1e5)
    tokens: str = setting("mean", "η(x^m) over m (mean: Eq. 3)", ("mean", "concat"))
    prompt_rows: str = setting("items", "p^m over |I| (ours) or in unit rows", ("items", "unit"))
    modal_target: str = setting("propagated", "F_i^m (ours)", ("propagated", "mean", "reduced"))
    tune_prompt: bool = setting(True, "train the prompt in stage 2 too (paper, Sec. 3.1.2)")
    weight_anchor: float = setting(1.0, "of the prompted teacher's BPR in stage 2 (errata P11)")
    warm_start: bool = setting(False, "start the student at E^T (released code, errata C24)")
    lr_teacher: float = setting(5e-3, "AdamW's step in stage 1 (paper: 3.5e-4 to 9.8e-3)")
    lr_student: float = setting(5e-3, "AdamW's step of the student (ours; paper: 2.5e-4 to 8.5e-4)")
    lr_prompt: float = setting(1e-4, "AdamW's step of the prompt in both stages (ours)")
    l2: float = setting(1e-3, "of ‖Θ‖² in Eq. 13, on the batch (ours, errata P8)")
    l2_student: float = setting(0.0, "the student's; 0: as l2 (ours)")
    weight_decay: float = setting(0.0, "AdamW's decay (ours: one regulariser, not two)")
    batch: int = setting(2048, "training edges in a step (ours; released code: 512-1024)", low=1)
    batch_student: int = setting(0, "the student's; 0: as batch (ours)")
    epochs: int = setting(400, "cap on the epochs of a stage (ours)", low=1)
    eval_every: int = setting(2, "epochs between validations (ours)", low=1)
    patience: int = setting(20, "validations that end a stage if none is better (ours)", low=1)
    alone: bool = setting(True, "train the student without a teacher too, to compare (ours)")
    seed: int = setting(0, "of all that is random in training (ours)", high=2**31)
    mask: str = setting("all", "unranked at test: train + val, or train", ("all", "train"))

    def __post_init__(self):
        """Refuse what cannot work."""
        for one in fields(self):
            value, meta, word = getattr(self, one.name), one.metadata, "{low} <= number < {high}"
            word = " or ".join(meta["choices"]) if type(value) is str else word.format(**meta)
            inside = type(value) is not str and meta["low"] <= value < meta["high"]
            need(inside or value in meta["choices"], f"{one.name}: expected {word}, found {value}")
        need(self.weight_modal or not self.lambda_list, "weight_modal: expected > 0 for lists")
        need(not self.warm_start or self.dim_student in (0, self.dim), "dim_student: expected d")


# By dataset, what `experiments.py tune` found on validation; the embedded data get theirs unasked.
PRESETS = {file.parent.name: data.read_json(file, "best")["best"]["PromptMM"]
           for file in sorted(Path(__file__).parent.glob("results/*/tune.json"))}
ALONE = {"lambda_pair": 0.0, "lambda_list": 0.0, "lambda_embed": 0.0}  # no teacher: LightGCN
FILES = ("config.json", "log.csv", "teacher.pt", "prompt.pt", "student.npz", "metrics.json",
         "state.pt", "alone.pt", "student.pt")  # of a run folder; the last three while it runs

# ---------------------------------------------------------------- graph

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")


def adjacency(train: sparse.csr_matrix) -> sparse.csr_matrix:
    """Â = D^-1/2 [[0, A], [Aᵀ, 0]] D^-1/2, users first (errata C1, C18): [U+I, U+I].

    Rows without neighbours are zero.

    >>> adjacency(sparse.csr_matrix([[1, 1]])).toarray()[0].round(4)  # a user and two items
    array([0.    , 0.7071, 0.7071], dtype=float32)
    """
    nodes = sparse.bmat([[None, train], [train.T, None]], format="csr")
    scale = sparse.diags(1 / np.sqrt(np.maximum(np.diff(nodes.indptr), 1)))
    return (scale @ nodes @ scale).astype(np.float32).tocsr()


class Product(torch.autograd.Function):
    """M x for a sparse M whose transpose is at hand: one block of Â is the other's backward pass.

    On a CPU a weighted bag of rows is this product, and a faster one than torch's for CSR.
    """

    @staticmethod
    def forward(ctx, matrix, transposed, x):
        ctx.matrix, ctx.transposed = matrix, transposed
        return matrix @ x if x.is_cuda else F.embedding_bag(
            matrix.col_indices(), x.detach(), matrix.crow_indices(), mode="sum",
            per_sample_weights=matrix.values(), include_last_offset=True)

    @staticmethod
    def backward(ctx, gradient):
        return None, None, Product.apply(ctx.transposed, ctx.matrix, gradient.contiguous())


class Graph:
    """Â's two blocks, each the other's transpose: all of Â that is not zero."""

    def __init__(self, train: sparse.csr_matrix, device="cpu"):
        nodes, n_users = adjacency(train), train.shape[0]
        blocks = nodes[:n_users, n_users:], nodes[n_users:, :n_users]
        self.ui, self.iu = (  # Â_ui [U, I], Â_iu [I, U]
            torch.sparse_csr_tensor(b.indptr, b.indices, b.data, b.shape, check_invariants=True)
            .to(device) for b in blocks)

    def to_users(self, item: Tensor) -> Tensor:
        """Users read items, Â_ui item: [I, d] -> [U, d]."""
        return Product.apply(self.ui, self.iu, item)

    def to_items(self, user: Tensor) -> Tensor:
        """Items read users, Â_iu user: [U, d] -> [I, d]."""
        return Product.apply(self.iu, self.ui, user)


def lightgcn(graph: Graph, user: Tensor, item: Tensor, layers: int) -> tuple[Tensor, Tensor]:
    """E^(l+1) = Â E^(l), E = mean over l = 0…L (LightGCN; errata C16, C17): [U, d], [I, d]."""
    total_user, total_item = user, item
    for _ in range(layers):
        user, item = graph.to_users(item), graph.to_items(user)
        total_user, total_item = total_user + user, total_item + item
    return total_user / (layers + 1), total_item / (layers + 1)


def table(rows: int, dim: int) -> nn.Parameter:
    """An embedding table with Xavier's uniform initialisation (Sec. 4.1.3)."""
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(rows, dim)))


# ---------------------------------------------------------------- prompt


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

    def __init__(self, dataset: Dataset, config: Config, device="cpu"):
        super().__init__()
        self.config = config
        self.features = {m: data.standardise(torch.from_numpy(x).to(device, torch.float32))
                         for m, x in dataset.features.items()}
        eta = [data.pca_tokens(x, config.dim) for x in self.features.values()]  # η(x^m), Eq. 3
        self.tokens = torch.cat(eta, 1) if config.tokens == "concat" else sum(eta) / len(eta)
        lifted = F.pad(self.tokens, (0, 1), value=1.0)  # T₁ = [tokens, 1]
        self.gram = {m: lifted.T @ x for m, x in self.features.items()}  # G = T₁ᵀX [width + 1, d_m]
        self.root = {m: data.root(g) for m, g in self.gram.items() if config.prompt_rows == "unit"}
        self.graph = Graph(dataset.train, device)
        self.isolated = self.graph.iu.crow_indices().diff()[:, None] == 0  # [I, 1]
        self.user, self.item = (table(rows, config.dim) for rows in dataset.train.shape)
        self.reduction = nn.ModuleList(Linear(len(x.T), config.dim) for x in self.features.values())
        self.prompt = PromptModule(self.tokens.shape[1], config.dim)
        self.to(device)

    def fixed(self) -> tuple[tuple[Tensor, Tensor], dict[str, tuple[Tensor, Tensor, Tensor]]]:
        """What no prompt reaches: LightGCN's output; XW [I, d], GW [width + 1, d], b of each m."""
        layers = {m: (x @ layer.weight.T, self.gram[m] @ layer.weight.T, layer.bias)
                  for (m, x), layer in zip(self.features.items(), self.reduction, strict=True)}
        return lightgcn(self.graph, self.user, self.item, self.config.teacher_layers), layers

    def reduce(self, m: str, xw: Tensor, gw: Tensor, bias: Tensor, prompt: Tensor) -> Tensor:
        """f^m = ϱ((x^m + λ₁ p^m) W^m + b^m) with p^m = s p (pᵀ x^m)   (Eq. 4; errata P9).

        P is linear, so p = T₁Θ and pᵀX = ΘᵀG: neither p^m nor any other [I, d_m] array is formed,
        and one step costs O(|I| d²) once XW and GW are known. s is 1/|I|, or 1/‖row of p (pᵀX)‖.
        """
        f = xw + bias
        if self.config.lambda_prompt:
            theta = torch.cat([self.prompt.weight.T, self.prompt.bias[None]])  # Θ [width + 1, d]
            shift, s = prompt @ (theta.T @ gw), 1 / len(prompt)  # p (pᵀX) W  [I, d]
            if self.root:
                norm = (prompt @ (theta.T @ self.root[m])).norm(dim=1, keepdim=True)
                s = 1 / norm.clamp(min=1e-12)
            f = f + self.config.lambda_prompt * s * shift
        keep = 1 - self.config.dropout  # comparing uniforms is twice as fast as F.dropout on a CPU
        return f * ((torch.rand_like(f) < keep) / keep) if self.training else f  # ϱ

    def forward(self, fixed: tuple | None = None) -> Encoded:
        """Eq. 1. With `fixed`, only what depends on the prompt is computed."""
        (teacher_user, teacher_item), layers = fixed or self.fixed()
        user_modal, item_modal, reduced = {}, {}, {}
        c, kind = self.config.fusion, self.config.modal_target
        prompt = self.prompt(self.tokens)  # p, Eq. 3
        for m, (xw, gw, bias) in layers.items():
            f = reduced[m] = self.reduce(m, xw, gw, bias, prompt)
            user = user_modal[m] = self.graph.to_users(f)  # F_u = Â_ui f (errata P12)
            item = self.graph.to_items(user)  # F_i = Â_iu F_u; without neighbours f itself
            item = torch.where(self.isolated, f, item) if kind != "reduced" else f
            item = item_modal[m] = (f + item) / 2 if kind == "mean" else item
            teacher_user = teacher_user + c * F.normalize(user, dim=1)
            teacher_item = teacher_item + c * F.normalize(item, dim=1)
        return Encoded(teacher_user, teacher_item, user_modal, item_modal, reduced)


# ---------------------------------------------------------------- student


class Student(nn.Module):
    """S of Eq. 2: LightGCN over its own tables, and nothing else at inference."""

    def __init__(self, train: sparse.csr_matrix, config: Config, device="cpu"):
        super().__init__()
        self.layers, self.graph = config.student_layers, Graph(train, device)
        dim = config.dim_student or config.dim
        self.user, self.item = (table(rows, dim) for rows in train.shape)
        # Another width than the teacher's: a map on the student's side for Eq. 11 (errata P7).
        self.project = nn.Identity() if dim == config.dim else Linear(dim, config.dim)
        self.to(device)

    def forward(self) -> tuple[Tensor, Tensor]:
        """(student_user [U, d], student_item [I, d])."""
        return lightgcn(self.graph, self.user, self.item, self.layers)


# ---------------------------------------------------------------- objectives


def bpr_terms(model: nn.Module, logits: Tensor, users: Tensor, lists: Tensor, l2: float) -> dict:
    """Eq. 13: BPR, and ‖Θ‖² on the triplets' layer-0 embeddings."""
    terms = {"bpr": bpr_loss(logits[:, 0], logits[:, 1])}
    if l2:
        items = model.item.index_select(0, lists[:, :2].flatten())  # positives and negatives
        terms["l2"] = l2 * l2_penalty(model.user.index_select(0, users), items)
    return terms


def modal_scores(encoded: Encoded, users: Tensor, lists: Tensor) -> list[Tensor]:
    """Uni-modal logits ⟨F_u^m, F_i^m⟩ on the batch's lists, one [B, K] for each m."""
    modal = zip(encoded.user_modal.values(), encoded.item_modal.values(), strict=True)
    return [scores(user, item, users, lists) for user, item in modal]


def teacher_terms(teacher: Teacher, users: Tensor, lists: Tensor) -> dict[str, Tensor]:
    """Stage 1, θ_T and θ_P: Eq. 13 on E^T, and on each modality's own ranking."""
    config, encoded = teacher.config, teacher()
    logits = scores(encoded.teacher_user, encoded.teacher_item, users, lists)
    terms = bpr_terms(teacher, logits, users, lists, config.l2)
    if config.weight_modal:
        modal = modal_scores(encoded, users, lists)
        terms["modal_bpr"] = config.weight_modal * sum(bpr_loss(y[:, 0], y[:, 1]) for y in modal)
    return terms


def student_terms(student: Student, config: Config, encoded: Encoded | None, users: Tensor,
                  lists: Tensor) -> dict[str, Tensor]:
    """Stage 2: Eq. 12, L = BPR + λ₂ PairKD + λ₃ ListKD + λ₄ EmbKD, term by term.

    Without `encoded` the student learns alone. Where the prompt is tuned, `encoded` depends on θ_P
    and the prompted teacher's own BPR anchors it: the student's has no path to θ_P (errata P11).
    """
    student_user, student_item = student()
    logits = scores(student_user, student_item, users, lists)
    terms = bpr_terms(student, logits, users, lists, config.l2_student or config.l2)
    if encoded is None:
        return terms
    tau, anchor = config.temperature, config.weight_anchor * encoded.teacher_item.requires_grad
    if config.lambda_pair or anchor:
        taught = scores(encoded.teacher_user, encoded.teacher_item, users, lists[:, :2])
    if config.lambda_pair:
        margins = [y[:, 0] - y[:, 1] for y in (logits, taught)]
        terms["pair_kd"] = config.lambda_pair * pair_kd(*margins, tau)
    if config.lambda_list:
        losses = [list_kd(logits, y, config.alpha, config.beta, tau)
                  for y in modal_scores(encoded, users, lists)]
        terms["list_kd"] = config.lambda_list * sum(losses)
    if config.lambda_embed:
        projected = student.project(student_item)
        losses = [embed_kd(projected, f, config.gamma) for f in encoded.item_modal.values()]
        terms["embed_kd"] = config.lambda_embed * sum(losses)
    if anchor:
        terms["prompt_anchor"] = anchor * bpr_loss(taught[:, 0], taught[:, 1])
    return terms


# ---------------------------------------------------------------- training


@dataclass
class Run:
    """A run folder and what it is about; `state` is what an interrupted run goes on from."""

    folder: Path
    dataset: Dataset
    config: Config
    device: torch.device
    state: dict


def fit(run: Run, stage: str, learner: nn.Module, groups: list, width: int, terms, rank) -> None:
    """Train until validation Recall@20 stops improving; leave the selected epoch's weights.

    groups: AdamW's. terms(users [B], lists [B, width]) -> the objective's terms by name. rank() ->
    (user [U, d], item [I, d]), judged on validation; the test split is never touched. A stage that
    an earlier session finished is read from its file.
    """
    config, state, file = run.config, run.state, run.folder / f"{stage}.pt"
    batch = config.batch if stage == "teacher" else config.batch_student or config.batch
    if file.exists():
        return learner.load_state_dict(data.read_torch(file, run.device))
    sampler, generator = Sampler(run.dataset.train, run.device), torch.Generator(run.device)
    optimiser = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=True)
    if state.get("stage") == stage:  # resumed
        learner.load_state_dict(state["learner"])
        optimiser.load_state_dict(state["optimiser"])
    else:
        state |= {"stage": stage, "epoch": 0, "recall": -1.0, "stale": 0, "seconds": 0.0}
    while state["epoch"] < config.epochs and state["stale"] < config.patience:
        began = time.perf_counter()
        state["epoch"] += 1
        # Seeded by epoch, so that a resumed run draws what an uninterrupted one would have.
        seed = 1_000_003 * config.seed + 2 * state["epoch"] + (stage == "teacher")
        torch.manual_seed(seed)  # dropout
        samples = sampler.epoch(generator.manual_seed(seed), width - 1)
        means = _epoch(learner, optimiser, samples, batch, terms)
        state["seconds"] += time.perf_counter() - began
        if state["epoch"] % config.eval_every == 0 or state["epoch"] == config.epochs:
            _validate(run, learner, means, rank)
        state |= {"learner": learner.state_dict(), "optimiser": optimiser.state_dict()}
        write(run.folder / "state.pt", partial(torch.save, state))
    learner.load_state_dict(state["best"])
    write(file, partial(torch.save, state["best"]))


def _epoch(learner, optimiser, samples, batch: int, terms) -> dict[str, float]:
    """One pass over the edges; each term's mean. The host waits for the device only at the end."""
    learner.train()
    history = []
    for users, lists in zip(*(part.split(batch) for part in samples), strict=True):
        parts = terms(users, lists)
        optimiser.zero_grad()
        sum(parts.values()).backward()  # the objective is the sum of this dict
        optimiser.step()
        history.append(torch.stack(list(parts.values())).detach())
    values, names = torch.stack(history).cpu(), list(parts)  # [steps, terms]
    for step, term in (~values.isfinite()).nonzero().tolist():
        raise FloatingPointError(f"{names[term]} is not finite, from step {step + 1} of an epoch")
    return dict(zip(names, values.mean(0).tolist(), strict=True))


def _validate(run: Run, learner: nn.Module, means: dict[str, float], rank) -> None:
    """Judge an epoch on the validation split, keep it if it is the best yet, and report."""
    state, config, loss = run.state, run.config, sum(means.values())
    learner.eval()
    with torch.no_grad():
        got = evaluate(*rank(), run.dataset.val, exclude=run.dataset.train)
    recall, state["stale"] = got["recall@20"], state["stale"] + 1
    if recall > state["recall"]:
        best = {name: weight.clone() for name, weight in learner.state_dict().items()}
        state |= {"recall": recall, "stale": 0, "best": best}
    row = {name: state[name] for name in ("stage", "epoch", "seconds")} | {"recall@20": recall}
    row |= {"ndcg@20": got["ndcg@20"], "loss": loss, **means}
    state["rows"] = [*state.get("rows", []), row]
    data.write_table(run.folder / "log.csv", state["rows"])
    most, pace = config.epochs - state["epoch"], state["seconds"] / state["epoch"]
    least = min(most, (config.patience - state["stale"]) * config.eval_every)
    print(f"{state['stage']:8}epoch {state['epoch']:4}  loss {loss:.4f}  validation {recall:.4f}  "
          f"best {state['recall']:.4f}  {pace:.2f} s/epoch, left: {least * pace:.0f} to "
          f"{most * pace:.0f} s", file=sys.stderr, flush=True)


def train_teacher(run: Run) -> Teacher:
    """Stage 1: θ_T and θ_P together. Returns the selected checkpoint, frozen, in eval mode."""
    torch.manual_seed(run.config.seed)
    teacher = Teacher(run.dataset, run.config, run.device)
    own = [p for name, p in teacher.named_parameters() if not name.startswith("prompt.")]  # θ_T
    groups = [{"params": own, "lr": run.config.lr_teacher},
              {"params": list(teacher.prompt.parameters()), "lr": run.config.lr_prompt}]
    fit(run, "teacher", teacher, groups, 2, partial(teacher_terms, teacher), lambda: teacher()[:2])
    return teacher.eval().requires_grad_(False)


def train_student(run: Run, stage: str, teacher: Teacher | None = None) -> tuple[Tensor, Tensor]:
    """Stage 2: the student, and the prompt if tuned. Returns E_u^S, E_i^S.

    θ_T is frozen and its dropout off; what no prompt reaches is computed once, and with the prompt
    frozen that is all of the teacher. Neither `no_grad` nor `detach` stands between θ_P and the
    losses: gradients reach the prompt *through* the frozen teacher (Sec. 3.1.2, errata C4).
    """
    config, encoded, tuned = run.config, None, False
    if teacher:
        tuned = config.tune_prompt and config.lambda_prompt > 0
        with torch.no_grad():
            encoded = teacher(fixed := teacher.fixed())
    torch.manual_seed(config.seed)
    student = Student(run.dataset.train, config, run.device)
    if teacher and config.warm_start:  # copies: never the teacher's own storage (errata C7)
        for own, start in zip((student.user, student.item), encoded[:2], strict=True):
            own.data.copy_(start)
    learner = nn.ModuleDict({"student": student})
    groups = [{"params": list(student.parameters()), "lr": config.lr_student}]
    if tuned:
        learner["prompt"] = teacher.prompt.requires_grad_(True)
        groups.append({"params": list(teacher.prompt.parameters()), "lr": config.lr_prompt})

    def terms(users, lists):
        return student_terms(student, config, teacher(fixed) if tuned else encoded, users, lists)

    width = 1 + (config.negatives if teacher and config.lambda_list else 1)
    fit(run, stage, learner, groups, width, terms, student)
    with torch.no_grad():
        return student()


def pipeline(run: Run) -> dict:
    """Both stages and the final evaluation: writes the artefacts, returns the metrics."""
    config, dataset, teacher = run.config, run.dataset, None
    popularity = torch.from_numpy(np.asarray(dataset.train.sum(0))).T.to(run.device)  # [I, 1]
    ranked = {"mostpop": (popularity.new_ones(dataset.train.shape[0], 1), popularity)}
    if config.lambda_pair or config.lambda_list or config.lambda_embed:
        teacher = train_teacher(run)
        with torch.no_grad():
            ranked["teacher"] = teacher()[:2]
        if config.alone:
            ranked["alone"] = train_student(run, "alone")  # without a teacher it is LightGCN
    ranked["student"] = train_student(run, "student", teacher)
    user, item = (e.cpu().numpy() for e in ranked["student"])
    write(run.folder / "student.npz", lambda stream: np.savez(stream, user=user, item=item,
          seen_indptr=dataset.train.indptr, seen_indices=dataset.train.indices))
    if teacher and teacher.prompt.weight.requires_grad:
        write(run.folder / "prompt.pt", partial(torch.save, teacher.prompt.state_dict()))
        with torch.no_grad():
            ranked["teacher_tuned"] = teacher()[:2]
    exclude = dataset.train + dataset.val if config.mask == "all" else dataset.train
    val = {model: evaluate(*pair, dataset.val, dataset.train) for model, pair in ranked.items()}
    test = {model: evaluate(*pair, dataset.test, exclude) for model, pair in ranked.items()}
    sizes = {"student": {"trainable": user.size + item.size, "buffers": 0}}
    sizes |= {"teacher": {"trainable": sum(p.numel() for p in teacher.parameters()),
              "buffers": sum(x.numel() for x in teacher.features.values())}} if teacher else {}
    metrics = {"validation": val, "test": test, "parameters": sizes, "device": str(run.device),
               "seconds": {row["stage"]: row["seconds"] for row in run.state["rows"]},
               "exclude": {"all": "train + val", "train": "train"}[config.mask], "versions": {
                   "torch": torch.__version__, "numpy": np.__version__, "scipy": scipy_version}}
    write(run.folder / "metrics.json", json.dumps(metrics, indent=1))
    for name in FILES[-3:]:
        (run.folder / name).unlink(missing_ok=True)
    return metrics


# ---------------------------------------------------------------- command line


def _parser() -> Parser:
    parser = Parser(prog="promptmm.py", description=__doc__.splitlines()[0], allow_abbrev=False,
                    epilog="Also: promptmm.py recommend --help; data.py --help.")
    for flag, default, meaning in (
            ("data", "", "dataset folder (default: the embedded dataset)"),
            ("out", "", "run folder (default: runs/<dataset name>)"),
            ("modalities", "", "comma-separated names (default: all there are)"),
            ("device", "auto", "auto, cpu, cuda or cuda:N (default: auto)")):
        parser.add_argument(f"--{flag}", default=default, help=meaning)
    parser.add_argument("--preset", choices=PRESETS, help="(default on embedded data: synthetic)")
    for flag, meaning in (("student-only", "no teacher: LightGCN"), ("force", "replace a run"),
                          ("quick", "two epochs a stage: a smoke test"),
                          ("resume", "go on with an interrupted run")):
        parser.add_argument(f"--{flag}", action="store_true", help=meaning)
    parser.add_settings(Config)
    return parser


def _start(args: argparse.Namespace) -> Run:
    """Check everything a run needs, then make or reopen its folder."""
    folder = Path(args.out or f"runs/{Path(args.data or 'synthetic').resolve().name}")
    need(args.resume or args.force or not folder.exists(),
         f"{folder}: exists; expected a new folder, --resume or --force")
    stored = data.read_json(folder / "config.json", *vars(Config())) if args.resume else {}
    source, device = args.data or stored.get("data"), data.pick_device(args.device)
    given = PRESETS.get(args.preset or ("" if source else "synthetic"), {}) | stored
    given |= {"epochs": 2, "eval_every": 1} if args.quick else {}
    given |= vars(args) | (ALONE if args.student_only else {})
    config = Config(**{one.name: given[one.name] for one in fields(Config) if one.name in given})
    chosen = args.modalities or stored.get("modalities", "")
    dataset = data.load(source, modalities=chosen) if source else data.synthetic()
    facts = {"data": source and str(Path(source).resolve()), "modalities": chosen,
             "fingerprint": data.fingerprint(dataset), "device": str(device),
             "threads": torch.get_num_threads(), **vars(config)}
    for key in list(facts)[1:] if args.resume else ():  # all but "data": the folder may have moved
        need(facts[key] == stored.get(key),
             f"{folder}: expected {key} = {stored.get(key)} to resume, found {facts[key]}")
    folder.mkdir(parents=True, exist_ok=True)
    for file in () if args.resume else FILES:
        (folder / file).unlink(missing_ok=True)
    write(folder / "config.json", json.dumps(facts, indent=1))
    file = folder / "state.pt"
    state = data.read_torch(file, device) if file.exists() else {}
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
        metrics = data.read_json(done, "test", "parameters") if done.exists() else pipeline(run)
        print(f"{ladder(metrics)}\nno candidates: {metrics['exclude']}; more in {done}")
    except (DataError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        print("interrupted; --resume goes on after the last finished epoch", file=sys.stderr)
        return 130
    return 0


def _recommend(argv: list[str]) -> int:
    parser = Parser(prog="promptmm.py recommend", description="A user's list, from student.npz.")
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    parser.add_argument("--user", required=True, help="user index; with --ids, your own id")
    parser.add_argument("--k", type=int, default=10, help="length of the list (default: 10)")
    parser.add_argument("--ids", type=Path, help="ids.json of `data.py convert`: speak in your ids")
    args = parser.parse_args(argv)
    with data.reading(file := args.run / "student.npz"), np.load(file) as saved:
        user, item, start, seen = map(saved.get, ("user", "item", "seen_indptr", "seen_indices"))
    ids = {"users": [str(u) for u in range(len(user))], "items": range(len(item))}
    ids |= data.read_json(args.ids, "users", "items") if args.ids else {}
    need(len(ids["items"]) == len(item), f"--ids: expected {len(item)} items, as in {file}")
    need(args.user in ids["users"] and args.k > 0, f"expected --user {ids['users'][0]} … "
         f"{ids['users'][-1]} and --k 1 or more, found {args.user} and {args.k}")
    u = ids["users"].index(args.user)
    for i, score in recommend(user[u], item, seen[start[u] : start[u + 1]], args.k):
        print(f"{ids['items'][i]}\t{score:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""PromptMM: a multi-modal teacher, a prompt that adapts it, a student that serves alone.

Wei et al., "PromptMM: Multi-Modal Knowledge Distillation for Recommendation with
Prompt-Tuning", WWW 2024. This file follows Section 3, each part after what it needs:

    settings    Config: every setting, with its source
    graph       Â and LightGCN propagation
    prompt      the prompt module P, over data.tokens' η(x^m)   Eq. 3
    teacher     prompted reduction, modal propagation, fusion   Eq. 4, Eq. 1
    student     LightGCN                                        Eq. 2
    objectives  of stage 1 and of stage 2                       Eq. 13, Eq. 12
    training    one loop for both stages
    lists       the teacher's own top items                     Sec. 3.2.2
    stages      stage 1, stage 2, and the final evaluation
    command     python promptmm.py [--data DIR] [--help]
    products    two products, faster: skip at first

The losses (Eq. 5-11, 13-16) are in losses.py. Where the paper leaves a gap or
errs, the comment names an entry of docs/differences.md (P1-P16 paper, C1-C28 released
code).

    symbol                  code                                      shape
    A, E, U, I              dataset.train (scipy CSR, 0/1)            [U, I]
    x^m                     teacher.features[m], unit rows            [I, d_m]
    Â                       adjacency (scipy CSR)                     [U+I, U+I]
    Â_ui, Â_iu              graph.ui, graph.iu                        [U, I], [I, U]
    η(x^m)                  tokens: their mean, or side by side       [I, width]
    p, p^m                  p; p^m is never formed                    [I, d], [I, d_m]
    θ_P                     theta: W_Pᵀ stacked on b_P                [width+1, d]
    W^m, b^m                teacher.reduction: weight.T, bias         [d_m, d_T], [d_T]
    f^m                     reduced[m]                                [I, d_T]
    F_u^m, F_i^m            user_modal[m], item_modal[m]              [U, d_T], [I, d_T]
    w_m                     teacher.weights                           [|M|]
    LightGCN's E_u, E_i     teacher.user, teacher.item                [U, d], [I, d]
    E_u^T, E_i^T            teacher_user, teacher_item                [U, D], [I, D]
    E_u^S, E_i^S            student_user, student_item                [U, d], [I, d]
    y_list                  logits, column 0 the positive             [B, K]
    y_pair, inside its σ    margin(logits)                            [B]
    b, q                    log_b, log_q of losses.disentangle        [B, 2], [B, K-1]

Sizes: B training edges of a step, [E] all of them; K columns of a list, 1 + negatives, and
one more where these are the teacher's best items: BPR's own is there, too; N = list_pool;
d = dim; d_T = min(dim_teacher, d_m), so it may differ by modality; D = d + Σ d_T over those
of weight > 0; width = d, or |M| d with --tokens concat.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from os.path import realpath
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import __version__ as scipy_version, sparse
from torch import Tensor, nn

import data
from data import Dataset, Parser, Sampler, need, write
from evaluate import (
    Pair,
    best_unobserved,
    evaluate,
    fuse,
    ladder,
    line_search,
    most_popular,
    one_scale,
    recommend,
    spread,
)
from losses import bpr_loss, embed_kd, l2_penalty, list_kd, pair_kd

Device = torch.device | str
EMBED_SAMPLE = 512  # at most so many items a step in Eq. 11's mean
CACHED = 2**19  # floats of an array that a cache still holds
Losses = dict[str, Tensor]  # a term's name and its value []
Terms = Callable[[Tensor, Tensor], Losses]  # of users [B] and their lists [B, K]

# ------------------------------------------------------------ settings


def setting(default, meaning: str, choices=(), low=0, high=2**31, *, of: str) -> Any:
    """A field of Config: what it means, what it may be, and whose it is.

    of: both stages, teacher (stage 1), student, distillation (stage 2) or run (no model).
    `experiments` names a cached model by the settings that are its own.
    """
    return field(
        default=default,
        metadata={"help": meaning, "choices": choices, "low": low, "high": high, "of": of},
    )


of_both = partial(setting, of="both")
of_teacher = partial(setting, of="teacher")
of_student = partial(setting, of="student")
of_kd = partial(setting, of="distillation")


@dataclass(frozen=True)
class Config:
    """Every setting of a run, each a flag. Sources: paper section, released code, ours."""

    dim: int = of_both(64, "d, width of embeddings and tokens (paper, Sec. 4.5)", low=1)
    dim_teacher: int = of_teacher(256, "d_T, width of f^m at most (ours)", low=1)
    student_layers: int = of_student(2, "L of LightGCN (ours; released: 1)")
    dropout: float = of_teacher(0.2, "rate of ϱ in Eq. 4 (ours; released: .4-.6)", high=1)
    lambda_prompt: float = of_teacher(0.05, "λ₁ of Eq. 4: ‖λ₁ p^m‖ / ‖x^m‖ (ours, P9)")
    lambda_pair: float = of_kd(0.1, "λ₂ of Eq. 12 (paper: 0-100; value ours)")
    lambda_list: float = of_kd(3.0, "λ₃ of Eq. 12 (paper: 0-100; value ours)")
    lambda_embed: float = of_kd(0.1, "λ₄ of Eq. 12 (released code: .1-.9)")
    list_items: str = of_kd(
        "top", "negatives of a list: the teacher's best, or any (P14)", ("top", "random")
    )
    list_from: str = of_kd(
        "joint", "whose logits y^T a list has (P14)", ("joint", "modal", "both")
    )
    list_pool: int = of_kd(100, "N, a user's best items that lists draw from (ours)", low=1)
    negatives: int = of_kd(
        10, "a list's; of the best, BPR's not counted (released code)", low=1, high=1e5
    )
    alpha: float = of_kd(0.0, "α, weight of KL(b) in Eq. 10 (ours; paper: 1)")
    beta: float | str = of_kd(
        1.0, "β, weight of KL(q) (ours); the paper's 1 - b+:", ("identity",)
    )
    temperature: float = of_kd(1.0, "τ of the softened logits (ours)", low=1e-3)
    gamma: float = of_kd(2.0, "γ of Eq. 11 (released code)", low=1, high=50)
    tokens: str = of_teacher("mean", "η(x^m) over m (mean: Eq. 3)", ("mean", "concat"))
    tune_prompt: bool = of_kd(False, "train the prompt in stage 2 too (paper: yes)")
    weight_anchor: float = of_kd(1.0, "of the prompted teacher's BPR in stage 2 (P11)")
    warm_start: bool = of_kd(False, "start the student at the teacher's ids (C24)")
    lr_teacher: float = of_teacher(1e-3, "AdamW's step of W^m, b^m (paper: 3.5e-4 and up)")
    lr_student: float = of_student(5e-3, "AdamW's step (ours; paper: 2.5e-4 to 8.5e-4)")
    lr_prompt: float = of_teacher(1e-3, "AdamW's step of the prompt in both stages (ours)")
    l2: float = of_student(1e-3, "of ‖Θ‖² in Eq. 13, on the batch (ours, P8)")
    batch: int = of_student(
        0, "training edges in a step; 0: a 40th of all, ≥ 256 (ours; released: 512-1024)"
    )
    batch_teacher: int = of_teacher(0, "the teacher's; 0: a tenth of all, ≥ 256 (ours)")
    epochs: int = of_both(400, "cap on the epochs of a stage (ours)", low=1)
    eval_every: int = of_both(2, "epochs between validations (ours)", low=1)
    patience: int = of_student(
        20, "validations without a better one that end training (ours)", low=1
    )
    patience_teacher: int = of_teacher(3, "the teacher's (ours)", low=1)
    seed: int = of_both(0, "of all that is random in training (ours)")
    mask: str = setting(
        "all", "unranked at test: train + val, or train", ("all", "train"), of="run"
    )

    def __post_init__(self):
        """Refuse what cannot work."""
        data.check_settings(self)


# ------------------------------------------------------------ graph

warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")


def adjacency(train: sparse.csr_matrix) -> sparse.csr_matrix:
    """Â = D^-1/2 [[0, A], [Aᵀ, 0]] D^-1/2, users first (errata C1, C18): [U+I, U+I].

    Rows without neighbours are zero.

    >>> adjacency(sparse.csr_matrix([[1, 1]])).toarray()[0].round(4)  # a user and two items
    array([0.    , 0.7071, 0.7071], dtype=float32)
    """
    nodes = sparse.bmat([[None, train], [train.T, None]], format="csr")  # [U+I, U+I]
    degree = np.maximum(np.diff(nodes.indptr), 1)  # [U+I]
    scale = sparse.diags(1 / np.sqrt(degree))  # D^-1/2
    return (scale @ nodes @ scale).astype(np.float32).tocsr()


class Graph:
    """Â's two blocks, each the other's transpose: all of Â that is not zero."""

    def __init__(self, train: sparse.csr_matrix, device: Device = "cpu"):
        nodes = adjacency(train)
        n_users = train.shape[0]
        self.ui = csr_tensor(nodes[:n_users, n_users:], device)  # Â_ui [U, I]
        self.iu = csr_tensor(nodes[n_users:, :n_users], device)  # Â_iu [I, U]

    def to_users(self, item: Tensor) -> Tensor:
        """Users read items, Â_ui item: [I, d] -> [U, d]."""
        return Product.apply(self.ui, self.iu, item)

    def to_items(self, user: Tensor) -> Tensor:
        """Items read users, Â_iu user: [U, d] -> [I, d]."""
        return Product.apply(self.iu, self.ui, user)

    def edge(self, users: Tensor, items: Tensor) -> Tensor:
        """Â_ui of users [B] and items [B] that they interacted with: [B]."""
        of_user = self.ui.crow_indices().diff().index_select(0, users)
        of_item = self.iu.crow_indices().diff().index_select(0, items)
        return (of_user.float() * of_item).rsqrt()  # an int32 product could overflow


def csr_tensor(block: sparse.csr_matrix, device) -> Tensor:
    """A SciPy matrix as torch's, on a device."""
    tensor = torch.sparse_csr_tensor(
        block.indptr, block.indices, block.data, block.shape, check_invariants=True
    )
    return tensor.to(device)


def lightgcn(graph: Graph, user: Tensor, item: Tensor, layers: int) -> Pair:
    """E^(l+1) = Â E^(l), E = mean over l = 0…L (errata C16, C17) -> [U, d], [I, d]."""
    total_user, total_item = user, item  # [U, d], [I, d]
    for _ in range(layers):
        user, item = graph.to_users(item), graph.to_items(user)  # [U, d], [I, d]
        total_user = total_user + user
        total_item = total_item + item
    return total_user / (layers + 1), total_item / (layers + 1)


def table(rows: int, dim: int) -> nn.Parameter:
    """An embedding table [rows, d] with Xavier's uniform initialisation (Sec. 4.1.3)."""
    return nn.Parameter(nn.init.xavier_uniform_(torch.empty(rows, dim)))


# ------------------------------------------------------------ prompt


class Linear(nn.Linear):
    """x Wᵀ + b; W starts as Xavier has it, b at zero."""

    def reset_parameters(self):
        nn.init.xavier_uniform_(self.weight)
        nn.init.zeros_(self.bias)


class PromptModule(Linear):
    """P of Eq. 3: p = P(tokens), one linear layer with bias, [I, width] -> [I, d]."""


# ------------------------------------------------------------ teacher


class Fixed(NamedTuple):
    """Of a modality's Eq. 4 what no prompt reaches: constant once θ_T is frozen."""

    xw: Tensor  # X W [I, d_T]
    weight: Tensor  # W [d_m, d_T]
    bias: Tensor  # b [d_T]


class Encoded(NamedTuple):
    """The teacher's output (Eq. 1); its dicts hold the modalities with w_m > 0 only."""

    teacher_user: Tensor  # E_u^T [U, D]
    teacher_item: Tensor  # E_i^T [I, D]
    user_modal: dict[str, Tensor]  # F_u^m [U, d_T]
    item_modal: dict[str, Tensor]  # F_i^m [I, d_T]


class Teacher(nn.Module):
    """T of Eq. 1, with any number of modalities, in three rungs.

    1. A *profile* ranks by content as it is, x^m, and learns nothing.
    2. Their *fusion* with LightGCN weighs each profile by validation.
    3. The *teacher* is that fusion, in which items hear their neighbours too, with W^m, b^m
       and the prompt trained. W^m starts at the principal directions: f^m is x^m turned,
       cut to d_T of them, and shifted by the prompt. Validation keeps the best epoch.

    θ_T: W^m, b^m, the weights, and a trained LightGCN's embeddings, `user` and `item`; θ_P:
    `prompt`. Content and ids are trained apart and added up: trained jointly, tables that
    fit the training edges leave content hardly a gradient (errata P15).
    """

    user: Tensor  # E_u of ids [U, d]
    item: Tensor  # E_i of ids [I, d]
    weights: Tensor  # w_m [|M|]

    def __init__(
        self,
        dataset: Dataset,
        config: Config,
        device: Device = "cpu",
        ids: Pair | None = None,
    ):
        super().__init__()
        self.config = config
        self.features = {  # x^m [I, d_m]
            m: data.unit_rows(torch.from_numpy(x).to(device, torch.float32))
            for m, x in dataset.features.items()
        }
        self.reduction = nn.ModuleList()  # W^m [d_m, d_T] and b^m [d_T]
        eta = [self.add_reduction(x) for x in self.features.values()]  # η(x^m) [I, d]
        if config.tokens == "concat":
            self.tokens = torch.cat(eta, dim=1)  # side by side  [I, |M| d]
        else:
            self.tokens = torch.stack(eta).mean(0)  # Eq. 3 (errata P10)  [I, d]
        lifted = F.pad(self.tokens, (0, 1), value=1.0)  # T₁ = [tokens, 1]  [I, width + 1]
        self.cross = {m: lifted.T @ x for m, x in self.features.items()}  # C = T₁ᵀX^m
        # A row without content takes no part: it would say what the bias says.
        self.filled = {m: x.any(1, keepdim=True) for m, x in self.features.items()}
        self.prompt = PromptModule(self.tokens.shape[1], config.dim)
        self.graph = Graph(dataset.train, device)
        shape = dataset.train.shape
        user, item = ids or (torch.zeros(n, config.dim) for n in shape)
        self.register_buffer("user", user)
        self.register_buffer("item", item)
        self.to(device)
        # On the host, whatever the device: Python reads them at each step of stage 2.
        self.register_buffer("weights", torch.ones(len(eta)))  # until `weigh`
        with torch.no_grad():
            parts = self.fixed()  # X W: a row without content is zero there
            self.size = {m: spread(*self.smooth(part.xw)) for m, part in parts.items()}

    def add_reduction(self, x: Tensor) -> Tensor:
        """Add a W^m at the principal directions of x^m [I, d_m]; returns η(x^m) [I, d]."""
        dim, d_t = self.config.dim, self.config.dim_teacher
        axes, deviation = data.principal(x, max(dim, d_t))  # [d_m, k], [k]
        linear = Linear(*axes[:, :d_t].shape)
        linear.weight.data.copy_(axes[:, :d_t].T)
        self.reduction.append(linear)
        return data.tokens(x, axes, deviation, dim)

    def fixed(self) -> dict[str, Fixed]:
        """Everything up to the prompt, for each modality."""
        parts = {}
        for (m, x), linear in zip(self.features.items(), self.reduction, strict=True):
            weight, bias = linear.parameters()  # Wᵀ [d_T, d_m], b [d_T]
            parts[m] = Fixed(x @ weight.T, weight.T, bias)
        return parts

    def reduce(self, m: str, part: Fixed, p: Tensor) -> Tensor:
        """f^m = ϱ((x^m + λ₁ p^m) W^m + b^m),  p^m = s p (pᵀ x^m)   (Eq. 4; errata P9).

        Written out (the paper has no s), for x^m [I, d_m], p [I, d]:

            p_m = p @ (p.T @ x)                                 [I, d_m]
            p_m = p_m * x.norm() / p_m.norm()                   s: as large as x^m
            f = dropout((x + lambda_prompt * p_m) @ W + b)      [I, d_T]

        so that λ₁ is the prompt's share of x^m, whatever |I| and |M| are. P is affine: p =
        T₁ θ_P with T₁ = [tokens, 1], so pᵀX = θ_Pᵀ C with C = T₁ᵀX, which is known before
        training. No [I, d_m] array is formed; in stage 2, where XW is a constant, a step
        costs O(d d_T (|I| + d_m)) a modality. A test holds both forms equal. A row without
        content stays zero.
        """
        f = part.xw + part.bias  # [I, d_T]
        if self.config.lambda_prompt:
            f = f + self.shift(m, part, p)
        filled = self.filled[m]  # [I, 1]
        return drop(f, self.config.dropout, filled) if self.training else f * filled

    def shift(self, m: str, part: Fixed, p: Tensor) -> Tensor:
        """λ₁ p^m W^m of Eq. 4: [I, d_T]."""
        weight, bias = self.prompt.parameters()  # W_P [d, width], b_P [d]
        theta = torch.cat([weight.T, bias[None]])  # θ_P [width + 1, d]
        ptx = theta.T @ self.cross[m]  # pᵀX [d, d_m]
        # ‖p pᵀX‖² = tr((pᵀX)ᵀ pᵀp pᵀX) = Σ (pᵀp pᵀX) ∘ pᵀX: no [I, d_m] array is made.
        square = ((p.T @ p) @ ptx * ptx).sum()  # []
        share = (self.filled[m].sum() / square.clamp(min=1e-24)).sqrt()  # s; x^m: unit rows
        scale = self.config.lambda_prompt * share  # []
        return p @ (scale * (ptx @ part.weight))

    def reduced(self, fixed: dict[str, Fixed] | None = None) -> dict[str, Tensor]:
        """f^m [I, d_T] of every modality."""
        p = self.prompt(self.tokens)  # Eq. 3  [I, d]
        parts = fixed or self.fixed()
        return {m: self.reduce(m, part, p) for m, part in parts.items()}

    def smooth(self, f: Tensor) -> Pair:
        """A user's profile Â_ui f [U, d_T]; items with their neighbours, f + Â_iu Â_ui f.

        Stage 1 trains on these: they are linear in f, so that one edge can be taken out
        again (`teacher_terms`). Ranking is by `propagate`, whose unit rows are not linear.
        """
        profile = self.graph.to_users(f)
        return profile, f + self.graph.to_items(profile)

    def propagate(self, f: Tensor) -> Pair:
        """F_u^m [U, d_T] and F_i^m [I, d_T]; n makes rows of unit length (errata P12):

            F_i^m = n( n(f) + n(Â_iu Â_ui f) ),   F_u^m = n( Â_ui F_i^m )

        An item adds its neighbours' content to its own. By the outer n an item that has
        only one of the two is as long as any other: nobody need have taken it to be found.
        """
        around = self.graph.to_items(self.graph.to_users(f))  # [I, d_T]
        both = F.normalize(f, dim=1) + F.normalize(around, dim=1)  # [I, d_T]
        item = F.normalize(both, dim=1)  # F_i [I, d_T]
        user = self.graph.to_users(item)  # Â_ui F_i [U, d_T]
        return F.normalize(user, dim=1), item

    def forward(self, fixed: dict[str, Fixed] | None = None) -> Encoded:
        """Eq. 1's outputs; how they are joined is ours (errata P15):

            ⟨E_u^T, E_i^T⟩ = ⟨E_u, E_i⟩ / δ_u + Σ_m w_m ⟨F_u^m, F_i^m⟩ / δ_u^m

        δ_u: the standard deviation of that ranking's scores for user u over all items
        (`one_scale`). A modality of weight zero takes no part. With `fixed`, only what
        depends on the prompt is computed.
        """
        weights = self.modality_weights()
        reduced = self.reduced(fixed)
        modal = {m: self.propagate(f) for m, f in reduced.items() if weights[m]}
        pairs = [one_scale(pair) for pair in ((self.user, self.item), *modal.values())]
        fused = fuse(pairs, [1.0, *(weights[m] for m in modal)])  # E^T [U, D], [I, D]
        user_modal = {m: pair[0] for m, pair in modal.items()}
        item_modal = {m: pair[1] for m, pair in modal.items()}
        return Encoded(*fused, user_modal, item_modal)

    @torch.no_grad()
    def weigh(self, train: sparse.csr_matrix, val: sparse.csr_matrix) -> None:
        """Find w_m of every modality beside LightGCN, by a line search on validation."""
        modal = [self.propagate(f) for f in self.reduced().values()]
        found = line_search([(self.user, self.item), *modal], train, val)
        self.weights.copy_(torch.tensor(found))

    def modality_weights(self) -> dict[str, float]:
        """w_m by modality, rounded: .3 is not exact in float32."""
        return {
            m: round(weight, 4)
            for m, weight in zip(self.features, self.weights.tolist(), strict=True)
        }

    def knows_no_more(self) -> bool:
        """Whether it ranks as LightGCN does, since no modality weighs anything."""
        return not self.weights.any()

    @torch.no_grad()
    def prompt_share(self) -> float:
        """‖λ₁ p^m W^m‖ / ‖x^m W^m‖, mean over m: how much of f^m the prompt makes."""
        p = self.prompt(self.tokens)  # [I, d]
        parts = self.fixed()
        shares = [self.shift(m, one, p).norm() / one.xw.norm() for m, one in parts.items()]
        return float(torch.stack(shares).nanmean())


def drop(x: Tensor, rate: float, filled: Tensor | float = 1.0) -> Tensor:
    """ϱ of Eq. 4; rows that are not filled [I, 1] are zero, by the same product.

    Comparing uniforms is twice as fast as F.dropout on a CPU.
    """
    keep = 1 - rate
    return x * ((torch.rand_like(x) < keep) * (filled / keep))


# ------------------------------------------------------------ student


class Student(nn.Module):
    """S of Eq. 2: LightGCN over its own tables, and nothing else at inference."""

    def __init__(self, train: sparse.csr_matrix, config: Config, device: Device = "cpu"):
        super().__init__()
        self.layers = config.student_layers
        self.graph = Graph(train, device)
        n_users, n_items = train.shape
        self.user = table(n_users, config.dim)
        self.item = table(n_items, config.dim)
        self.to(device)

    def forward(self) -> Pair:
        """(student_user [U, d], student_item [I, d])."""
        return lightgcn(self.graph, self.user, self.item, self.layers)


# ------------------------------------------------------------ objectives


def scores(user: Tensor, item: Tensor, users: Tensor, lists: Tensor) -> Tensor:
    """Logits y_list [B, K] of users [B] and their lists [B, K], column 0 the positive.

    y_bk = ⟨e_u, e_i⟩ of user [U, d] and item [I, d].
    """
    return Scores.apply(user, item, users, lists)


def margin(logits: Tensor) -> Tensor:
    """The positive's lead over the first negative, inside σ of Eq. 5, 13: [B, K] -> [B]."""
    return logits[:, 0] - logits[:, 1]


def modal_scores(encoded: Encoded, users: Tensor, lists: Tensor) -> list[Tensor]:
    """Uni-modal logits ⟨F_u^m, F_i^m⟩ on the batch's lists, one [B, K] for each m."""
    modal = zip(encoded.user_modal.values(), encoded.item_modal.values(), strict=True)
    return [scores(user, item, users, lists) for user, item in modal]


def bpr_terms(model, logits: Tensor, users: Tensor, lists: Tensor, l2: float) -> Losses:
    """Eq. 13: BPR, and ‖Θ‖² on the triplets' layer-0 embeddings. logits [B, K]."""
    terms = {"bpr": bpr_loss(logits[:, 0], logits[:, 1])}
    if l2:
        user = model.user.index_select(0, users)  # [B, d]
        item = model.item.index_select(0, lists[:, :2].flatten())  # i+ and i-  [2B, d]
        terms["l2"] = l2 * l2_penalty(user, item)
    return terms


def teacher_terms(teacher: Teacher, users: Tensor, lists: Tensor) -> Losses:
    """Stage 1, of W^m, b^m and θ_P: Eq. 13's BPR, by modality, each on its own ranking.

    y = ⟨Â_ui f, f + Â_iu Â_ui f⟩ (`Teacher.smooth`). For i+ both sides leave out the edge
    (u, i+): u's profile contains i+, so that any f would rank i+ high and nothing would be
    learnt about other items (errata P16). For i- there is no such edge.
    """
    positive, negative = lists.unbind(1)  # [B], [B]
    edge = teacher.graph.edge(users, positive)[:, None]  # Â_ui of the positive  [B, 1]
    terms = {}
    for m, f in teacher.reduced().items():
        profile, content = teacher.smooth(f)  # [U, d_T], [I, d_T]
        user = profile.index_select(0, users)  # [B, d_T]
        of_others = user - edge * f.index_select(0, positive)  # [B, d_T]
        # u's whole message to i+ goes, whatever u's profile holds.
        item = content.index_select(0, positive) - edge * user  # [B, d_T]
        taken = (of_others * item).sum(1)  # y of i+  [B]
        other = (user * content.index_select(0, negative)).sum(1)  # y of i-  [B]
        size = teacher.size[m]  # before training, so that σ sees margins of about 1
        terms[f"bpr_{m}"] = bpr_loss(taken / size, other / size)
    return terms


def student_terms(
    student: Student,
    config: Config,
    encoded: Encoded | None,
    users: Tensor,
    lists: Tensor,
    project=(),
    teacher_logits: Tensor | None = None,
) -> Losses:
    """Stage 2, Eq. 12: BPR + l2 ‖Θ‖² + λ₂ PairKD + λ₃ ListKD + λ₄ Σ_m EmbKD, by term.

    ListKD has one list by default, E^T's; with `list_from` "modal" it is the paper's Σ_m.
    Without `encoded` the student learns alone.
    """
    student_user, student_item = student()  # [U, d], [I, d]
    logits = scores(student_user, student_item, users, lists)  # y^S [B, K]
    terms = bpr_terms(student, logits, users, lists, config.l2)
    if encoded is None:
        return terms
    return terms | kd_terms(
        config, logits, student_item, users, lists, encoded, project, teacher_logits
    )


def kd_terms(
    config: Config,
    logits: Tensor,
    student_item: Tensor,
    users: Tensor,
    lists: Tensor,
    encoded: Encoded,
    project,
    teacher_logits: Tensor | None = None,
) -> Losses:
    """The three distillation losses of Eq. 12, of y^S [B, K] and E_i^S [I, d].

    project: for each modality a map d -> d_T on the student's side, dropped at inference
    (errata P7). teacher_logits: y^T of E^T [B, K], where they are known already. Where the
    prompt is tuned, `encoded` depends on θ_P and BPR(E^T) anchors it: the student's own BPR
    has no path to θ_P (errata P11).
    """
    terms = {}
    tau = config.temperature
    user, item = encoded.teacher_user, encoded.teacher_item  # [U, D], [I, D]
    prompt_is_tuned = item.requires_grad  # only then E^T carries a gradient
    if teacher_logits is None:
        teacher_logits = scores(user, item, users, lists)  # y^T [B, K]
    if config.lambda_pair:
        loss = pair_kd(margin(logits), margin(teacher_logits), tau)
        terms["pair_kd"] = config.lambda_pair * loss
    if config.lambda_list:
        # y^T of E^T, y^m of each modality  [B, K]
        sources = [] if config.list_from == "modal" else [teacher_logits]
        if config.list_from != "joint":
            sources += modal_scores(encoded, users, lists)
        losses = [list_kd(logits, y, config.alpha, config.beta, tau) for y in sources]
        terms["list_kd"] = config.lambda_list * torch.stack(losses).sum()
    if config.lambda_embed:
        # Eq. 11's mean over I, sampled: BPR's negatives, uniform but for users' own items.
        drawn = lists[:EMBED_SAMPLE, 1]
        own = student_item.index_select(0, drawn)  # [sample, d]
        losses = []
        for linear, modal in zip(project, encoded.item_modal.values(), strict=True):
            target = modal.index_select(0, drawn)  # F_i^m [sample, d_T]
            losses.append(embed_kd(linear(own), target, config.gamma))
        terms["embed_kd"] = config.lambda_embed * torch.stack(losses).sum()
    if prompt_is_tuned and config.weight_anchor:
        loss = bpr_loss(teacher_logits[:, 0], teacher_logits[:, 1])
        terms["prompt_anchor"] = config.weight_anchor * loss
    return terms


# ------------------------------------------------------------ training


@dataclass
class Run:
    """A run folder and what it is about; an interrupted run goes on from `state`."""

    folder: Path
    dataset: Dataset
    config: Config
    device: torch.device
    state: dict
    beside: Config | None = None  # of the LightGCN trained beside it; None: as `config`


def train_epoch(
    learner: nn.Module, optimiser, samples: tuple[Tensor, Tensor], batch: int, terms: Terms
) -> dict[str, float]:
    """One pass over samples (users [E], lists [E, K]), `batch` at a time; each term's mean.

    The objective is the sum of terms(users [B], lists [B, K]). The host waits for the
    device only at the end. Raises FloatingPointError, with its name, for a term that is not
    finite.
    """
    learner.train()
    history = []
    for users, lists in zip(*(part.split(batch) for part in samples), strict=True):
        found = terms(users, lists)
        values = torch.stack(list(found.values()))  # [terms]
        optimiser.zero_grad()
        values.sum().backward()  # the objective is the sum of the dict
        optimiser.step()
        history.append(values.detach())
    names = list(found)
    steps = torch.stack(history).cpu()  # [steps, terms]
    broken = (~steps.isfinite()).nonzero().tolist()
    if broken:
        step, term = broken[0]
        raise FloatingPointError(
            f"{names[term]} is not finite, from step {step + 1} of an epoch"
        )
    return dict(zip(names, steps.mean(0).tolist(), strict=True))


def fit(
    run: Run,
    stage: str,
    learner: nn.Module,
    groups: list[dict],
    width: int,
    terms: Terms,
    rank: Callable[[], Pair],
    each_epoch: Callable[[], None] | None = None,
) -> None:
    """Train until validation Recall@20 stops improving; leave the selected epoch's weights.

    groups: AdamW's. terms(users [B], lists [B, width]) -> the objective's terms by name.
    rank() -> (user [U, d], item [I, d]), judged on validation; the test split is never
    touched. The teacher is judged before training too. each_epoch(): what is drawn or
    rebuilt anew each epoch.
    """
    config, state = run.config, run.state
    sampler = Sampler(run.dataset.train, run.device)
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)  # errata P8
    batch, patience = pace(config, stage, len(sampler.user))
    _begin(run, stage, learner, optimiser)
    if stage == "teacher" and state["epoch"] == 0:
        _validate(run, learner, {}, rank)

    while state["epoch"] < config.epochs and state["stale"] < patience:
        began = time.perf_counter()
        state["epoch"] += 1
        generator = _seeded(run, stage)
        if each_epoch:
            each_epoch()
        samples = sampler.epoch(generator, width - 1)
        means = train_epoch(learner, optimiser, samples, batch, terms)
        state["seconds"] += time.perf_counter() - began
        if state["epoch"] % config.eval_every == 0 or state["epoch"] == config.epochs:
            _validate(run, learner, means, rank)
        state |= {"learner": learner.state_dict(), "optimiser": optimiser.state_dict()}
        write(run.folder / "state.pt", partial(torch.save, state))
    learner.load_state_dict(state["best"])
    write(run.folder / f"{stage}.pt", partial(torch.save, learner.state_dict()))


def pace(config: Config, stage: str, edges: int) -> tuple[int, int]:
    """A step's training edges, and the patience.

    By default a 40th of all edges, the teacher's a tenth, and at least 256: a step
    propagates over the whole graph, so with a fixed B an epoch's E / B steps would cost E².
    """
    if stage == "teacher":
        return config.batch_teacher or max(256, -(-edges // 10)), config.patience_teacher
    return config.batch or max(256, -(-edges // 40)), config.patience


def _begin(run: Run, stage: str, learner: nn.Module, optimiser) -> None:
    """Go on with an interrupted stage, or start a new one."""
    state = run.state
    if state.get("stage") == stage:
        with data.reading(run.folder / "state.pt"):
            learner.load_state_dict(state["learner"])
            optimiser.load_state_dict(state["optimiser"])
    else:
        state |= {"stage": stage, "epoch": 0, "recall": -1.0, "stale": 0, "seconds": 0.0}


def _seeded(run: Run, stage: str) -> torch.Generator:
    """Seed an epoch by its number, so that a resumed run draws what it would have drawn.

    Dropout and the lists (`Distillation.draw`) use torch's own generator, Sampler the one
    returned: two streams. The student and LightGCN sample the same.
    """
    numbers = run.config.seed, run.state["epoch"], stage == "teacher"
    own, sampling = np.random.SeedSequence(numbers).generate_state(2).tolist()
    torch.manual_seed(own)
    return torch.Generator(run.device).manual_seed(sampling)


def load_finished(run: Run, stage: str, learner: nn.Module) -> bool:
    """Read the weights of a stage that an earlier session finished; False if none did."""
    file = run.folder / f"{stage}.pt"
    if not file.exists():
        return False
    weights = data.read_torch(file, run.device)
    with data.reading(file):
        learner.load_state_dict(weights)
    return True


def _validate(run: Run, learner: nn.Module, means: dict, rank: Callable[[], Pair]) -> None:
    """Judge an epoch on the validation split, keep it if it is the best yet, log it."""
    state = run.state
    learner.eval()
    with torch.no_grad():
        found = evaluate(*rank(), run.dataset.val, exclude=run.dataset.train)
    state["stale"] += 1
    if found["recall@20"] > state["recall"]:
        best = {name: weight.clone() for name, weight in learner.state_dict().items()}
        state |= {"recall": found["recall@20"], "stale": 0, "best": best}
    row = {name: state[name] for name in ("stage", "epoch", "seconds")}
    row |= {metric: found[metric] for metric in ("recall@20", "ndcg@20")}
    row |= {"loss": sum(means.values()), **means} if means else {}
    if isinstance(learner, Teacher):
        row["prompt_share"] = learner.prompt_share()
    state["rows"] = [*state.get("rows", []), row]
    data.write_table(run.folder / "log.csv", state["rows"])
    print(_progress(row, state, run.config), file=sys.stderr, flush=True)


def _progress(row: dict, state: dict, config: Config) -> str:
    """A line for the terminal: where a stage is, and the time left at least and at most."""
    each = row["seconds"] / max(1, row["epoch"])
    _, patience = pace(config, row["stage"], 0)
    most = config.epochs - row["epoch"]
    least = min(most, (patience - state["stale"]) * config.eval_every)
    loss = f"loss {row['loss']:.4f}" if "loss" in row else "untrained"
    where = f"{row['stage']:8}epoch {row['epoch']:4}  {loss:11}"
    judged = f"validation {row['recall@20']:.4f}  best {state['recall']:.4f}"
    left = f"left: {least * each:.0f} to {most * each:.0f} s"
    return f"{where}  {judged}  {each:.2f} s/epoch, {left}"


# ------------------------------------------------------------ lists


class Distillation:
    """What stage 2 needs beside the student: a teacher, lists, maps to the teacher's width.

    width: columns that Sampler draws, 2, or K for random lists; for top lists `draw` adds
    the others (errata P14). project: for each modality a map d -> d_T, for EmbKD. Without
    `encode` there is no teacher.
    """

    def __init__(self, run: Run, encode: Callable[[], Encoded] | None):
        config = run.config
        self.config = config
        self.train = run.dataset.train
        self.encode = encode
        listed = bool(encode and config.lambda_list)
        self.from_top = listed and config.list_items == "top"
        self.width = 1 + config.negatives if listed and not self.from_top else 2
        self.best = self.best_logits = torch.empty(0)  # items, their y^T  [U, N]
        targets = encode().item_modal if encode and config.lambda_embed else {}
        widths = [item.shape[1] for item in targets.values()]
        project = nn.ModuleList(Linear(config.dim, d_t) for d_t in widths)
        self.project = project.to(run.device)

    def refresh(self) -> None:
        """Find each user's best items: once, or at each epoch if the teacher moves."""
        if not (self.encode and self.from_top):
            return
        user, item, *_ = self.encode()
        if not len(self.best) or item.requires_grad:
            self.best, self.best_logits = best_unobserved(
                user.detach(), item.detach(), self.train, self.config.list_pool
            )

    def draw(self, users: Tensor) -> tuple[Tensor, Tensor]:
        """Some of the user's best items, with replacement, and y^T: [B, negatives]."""
        n = self.best.shape[1]
        shape = len(users), self.config.negatives
        column = torch.randint(n, shape, device=users.device)
        cell = n * users[:, None] + column  # of the flattened lists  [B, negatives]
        return self.best.take(cell), self.best_logits.take(cell)

    def terms(self, student: Student, users: Tensor, sampled: Tensor) -> Losses:
        """Eq. 12 on a batch, by term: users [B] and the columns that Sampler drew."""
        encoded = self.encode() if self.encode else None
        lists, teacher_logits = sampled, None
        if encoded and self.from_top:
            items, known = self.draw(users)
            lists = torch.cat([sampled, items], dim=1)  # [B, K]
            if not encoded.teacher_item.requires_grad:  # else θ_P has moved since refresh
                joint = encoded.teacher_user, encoded.teacher_item
                teacher_logits = torch.cat([scores(*joint, users, sampled), known], dim=1)
        return student_terms(
            student, self.config, encoded, users, lists, self.project, teacher_logits
        )


# ------------------------------------------------------------ stages


def train_teacher(
    run: Run, ids: Pair | None = None, kind: type[Teacher] = Teacher
) -> Teacher:
    """Stage 1: content, prompt, and each modality's weight beside a trained LightGCN's ids.

    Returns the selected checkpoint, frozen, in eval mode.
    """
    torch.manual_seed(run.config.seed)
    teacher = kind(run.dataset, run.config, run.device, ids)
    if not load_finished(run, "teacher", teacher):
        groups = [
            {"params": teacher.reduction.parameters(), "lr": run.config.lr_teacher},
            {"params": teacher.prompt.parameters(), "lr": run.config.lr_prompt},
        ]
        terms = partial(teacher_terms, teacher)

        def rank() -> Pair:
            """As well as it can with this epoch's W^m: the weights are found each time."""
            teacher.weigh(run.dataset.train, run.dataset.val)
            return teacher()[:2]

        fit(run, "teacher", teacher, groups, 2, terms, rank)
    return teacher.eval().requires_grad_(False)


def frozen_teacher(teacher: Teacher, config: Config) -> Callable[[], Encoded] | None:
    """What the student learns from: a function that encodes, θ_T frozen, dropout off.

    None if no modality weighs anything: that teacher is LightGCN. All logits are divided by
    their standard deviation, once, so that τ and the λ mean the same on any data. What no
    prompt reaches is computed once, and with the prompt frozen that is all of it. With the
    prompt tuned it becomes trainable: gradients reach it *through* the frozen teacher, but
    for δ_u, which counts as constant in backward (Sec. 3.1.2, errata C4, C8).
    """
    teacher.eval().requires_grad_(False)
    if teacher.knows_no_more():
        return None
    weights = teacher.modality_weights()
    fixed = {m: part for m, part in teacher.fixed().items() if weights[m]}
    encode = unit_logits(teacher, fixed)
    if config.tune_prompt and config.lambda_prompt:
        teacher.prompt.requires_grad_(True)
        return encode
    encoded = encode()
    return lambda: encoded


def unit_logits(teacher: Teacher, fixed: dict | None = None) -> Callable[[], Encoded]:
    """The teacher, its logits over the deviation that they have now (errata P14).

    fixed: of `Teacher.fixed`, once θ_T is frozen.
    """
    first = teacher(fixed)
    size = spread(*first[:2])
    sizes = {m: spread(user, first.item_modal[m]) for m, user in first.user_modal.items()}

    def encode() -> Encoded:
        user, item, user_modal, item_modal = teacher(fixed)
        scaled = {m: part / sizes[m] for m, part in user_modal.items()}
        return Encoded(user / size, item, scaled, item_modal)

    return encode


def train_student(run: Run, stage: str, teacher: Teacher | None = None) -> Pair:
    """Stage 2: the student, and the prompt if tuned. Returns E_u^S [U, d], E_i^S [I, d].

    Without a teacher, or with one that knows no more, it is LightGCN.
    """
    config = run.config
    encode = frozen_teacher(teacher, config) if teacher else None
    torch.manual_seed(config.seed)
    student = Student(run.dataset.train, config, run.device)
    if teacher and config.warm_start:  # copied: never the teacher's own (errata C7, C24)
        student.user.data.copy_(teacher.user)
        student.item.data.copy_(teacher.item)
    kd = Distillation(run, encode)
    learner = nn.ModuleDict({"student": student, "project": kd.project})
    own = list(learner.parameters())  # as of now, without the prompt
    groups = [{"params": own, "lr": config.lr_student}]
    if teacher and teacher.prompt.weight.requires_grad:
        learner["prompt"] = teacher.prompt
        groups.append({"params": teacher.prompt.parameters(), "lr": config.lr_prompt})
    if not load_finished(run, stage, learner):
        terms = partial(kd.terms, student)
        fit(run, stage, learner, groups, kd.width, terms, student, kd.refresh)
    with torch.no_grad():
        return student()


def pipeline(run: Run) -> dict:
    """Both stages and the final evaluation: writes the artefacts, returns the metrics."""
    config = run.config
    ranked = {"mostpop": most_popular(run.dataset.train, run.device)}
    teacher = None
    if config.lambda_pair or config.lambda_list or config.lambda_embed:
        alone = replace(run, config=run.beside or config)
        ranked["alone"] = train_student(alone, "alone")
        teacher = train_teacher(run, ranked["alone"])
        ranked["teacher"] = teacher()[:2]
    ranked["student"] = train_student(run, "student", teacher)
    _save_student(run, *ranked["student"])
    if teacher and teacher.prompt.weight.requires_grad:
        write(run.folder / "prompt.pt", partial(torch.save, teacher.prompt.state_dict()))
        teacher.requires_grad_(False)
        ranked["teacher_tuned"] = teacher()[:2]
    metrics = _judge(run, ranked)
    metrics["parameters"] = _sizes(ranked["student"], teacher)
    if teacher:
        metrics["weights"] = teacher.modality_weights()
    metrics |= {
        "device": str(run.device),
        "seconds": {row["stage"]: row["seconds"] for row in run.state["rows"]},
        "exclude": "train + val" if config.mask == "all" else "train",
        "versions": {
            "torch": torch.__version__,
            "numpy": np.__version__,
            "scipy": scipy_version,
        },
    }
    write(run.folder / "metrics.json", metrics)
    for name in WORKING_FILES:
        (run.folder / name).unlink(missing_ok=True)
    return metrics


def _save_student(run: Run, user: Tensor, item: Tensor) -> None:
    """student.npz: all that serving needs, readable with numpy alone."""
    seen = run.dataset.train + run.dataset.val + run.dataset.test
    arrays = {
        "user": user.cpu().numpy(),
        "item": item.cpu().numpy(),
        "seen_indptr": seen.indptr,
        "seen_indices": seen.indices,
        "fingerprint": np.array(data.fingerprint(run.dataset, whole=False)),
    }
    write(run.folder / "student.npz", lambda stream: np.savez(stream, **arrays))


def _judge(run: Run, ranked: dict[str, Pair]) -> dict[str, Any]:
    """Metrics of each model on both splits; nothing is judged on test but here."""
    dataset = run.dataset
    seen = dataset.train + dataset.val if run.config.mask == "all" else dataset.train
    splits = {"validation": (dataset.val, dataset.train), "test": (dataset.test, seen)}
    return {
        name: {model: evaluate(*pair, *split) for model, pair in ranked.items()}
        for name, split in splits.items()
    }


def _sizes(student: Pair, teacher: Teacher | None) -> dict[str, dict]:
    """Learnt numbers that serving carries, and frozen ones: "buffers" (errata P13)."""
    learnt = sum(embeddings.numel() for embeddings in student)
    sizes = {"student": {"trainable": learnt, "buffers": 0}}
    if teacher:
        learnt_there = [teacher.user, teacher.item, *teacher.parameters()]
        sizes["teacher"] = {
            "trainable": sum(weight.numel() for weight in learnt_there),
            "buffers": sum(x.numel() for x in teacher.features.values()),
        }
    return sizes


# ------------------------------------------------------------ command line

# What our tables were made with, where it differs from the defaults, chosen on validation
# (results/<dataset>/tune.md, experiments/tune.py). The embedded data take theirs unasked.
PRESETS: dict[str, dict] = {
    "synthetic": {
        "dim": 32,
        "patience": 10,
        "student_layers": 3,
        "l2": 0.01,
        "lambda_list": 10.0,
    },
    "tiktok": {"batch": 4096, "student_layers": 4, "l2": 0.003, "temperature": 0.5},
    "citeulike": {"batch": 2048, "eval_every": 4, "patience": 10},
}
# The same searches' best LightGCN: what the teacher's ids are, and --student-only.
LIGHTGCN: dict[str, dict] = {
    "synthetic": {"dim": 32, "student_layers": 3, "l2": 0.01, "patience": 10},
    "tiktok": {"batch": 4096, "student_layers": 4, "l2": 0.003},
    "citeulike": {"batch": 2048, "eval_every": 4, "patience": 10},
}
NO_TEACHER = {"lambda_pair": 0.0, "lambda_list": 0.0, "lambda_embed": 0.0}  # LightGCN
RUN_FILES = "metrics.json student.npz prompt.pt teacher.pt log.csv".split()
WORKING_FILES = "state.pt alone.pt student.pt".split()  # only while a run lasts


def _parser() -> Parser:
    parser = Parser(
        prog="promptmm.py",
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        epilog="Also: promptmm.py recommend --help; data.py --help.",
    )
    for flag, default, meaning in (
        ("data", "", "dataset folder (default: the embedded dataset)"),
        ("out", "", "run folder (default: runs/<dataset name>)"),
        ("modalities", "", "comma-separated names (default: all there are)"),
        ("device", "auto", "auto, cpu, cuda or cuda:N (default: auto)"),
    ):
        parser.add_argument(f"--{flag}", default=default, help=meaning)
    parser.add_argument(
        "--preset", choices=PRESETS, help="settings of this project's tables, by dataset"
    )
    for flag, meaning in (
        ("student-only", "no teacher: LightGCN"),
        ("force", "replace a run"),
        ("quick", "two epochs a stage: a smoke test"),
        ("resume", "go on with an interrupted run"),
    ):
        parser.add_argument(f"--{flag}", action="store_true", help=meaning)
    parser.add_settings(Config)
    return parser


def _start(args: argparse.Namespace) -> Run:
    """Check everything a run needs, then make or reopen its folder."""
    name = realpath(args.data or "synthetic")  # of a loop of links too
    folder = Path(args.out or f"runs/{Path(name).name}")
    _check_flags(args)
    _check_folder(folder, args)
    stored = {}
    if args.resume:
        stored = data.read_json(folder / "config.json", *vars(Config()), sealed=True)
    source = args.data or stored.get("data")
    device = data.pick_device(args.device)
    config = _chosen(LIGHTGCN if args.student_only else PRESETS, args, stored, source)
    beside = _chosen(LIGHTGCN, args, stored.get("lightgcn", {}), source)
    modalities = args.modalities or stored.get("modalities", "")
    need(source or not modalities, "--modalities: expected --data beside it, found none")
    dataset = data.load(source, modalities=modalities) if source else data.synthetic()
    facts = {
        "data": source and str(Path(source).resolve()),
        "modalities": modalities,
        "fingerprint": data.fingerprint(dataset),
        "device": str(device),
        "threads": torch.get_num_threads(),
        **vars(config),
        "lightgcn": vars(beside),
    }
    if args.resume:
        _same_run(folder, facts, stored)
    _prepare(folder, facts, keep=args.resume)
    file = folder / "state.pt"
    state = data.read_torch(file, device) if file.exists() else {}
    return Run(folder, dataset, config, device, state, beside)


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse two flags of which one would silently win."""
    need(not (args.resume and args.force), "expected --resume or --force, found both")
    of = {one.name: one.metadata["of"] for one in fields(Config)}
    given = [name for name in vars(args) if of.get(name) in ("teacher", "distillation")]
    found = f"--student-only: expected no setting of a teacher, found {', '.join(given)}"
    need(not (args.student_only and given), found)


def _check_folder(folder: Path, args: argparse.Namespace) -> None:
    """Refuse a folder that holds anything, but the run to resume or replace."""
    others = any(one.suffix != ".tmp" for one in folder.glob("*"))  # no killed run's drafts
    if not args.resume and (others or folder.is_file()):
        need(args.force, f"{folder}: exists; expected a new folder, --resume or --force")
        file = folder / "config.json"
        need(
            file.exists() and b'"fingerprint"' in file.read_bytes(),
            f"{folder}: expected a run to replace, found no config.json of one",
        )
    need(
        not args.data or realpath(folder) != realpath(args.data),
        f"{folder}: the dataset's own folder; expected another for the run",
    )


def _chosen(presets: dict, args: argparse.Namespace, stored: dict, source) -> Config:
    """Settings from stored run, preset, --quick and flags; the later ones win."""
    name = args.preset or ("" if source or stored else "synthetic")
    quick = {"epochs": 2, "eval_every": 1} if args.quick else {}
    alone = NO_TEACHER if args.student_only else {}
    given = stored | presets.get(name, {}) | quick | vars(args) | alone
    return Config(**{key: given[key] for key in vars(Config()) if key in given})


def _same_run(folder: Path, facts: dict, stored: dict) -> None:
    """Refuse to resume under other circumstances; the data may have moved."""
    for key, found in facts.items():
        expected = stored.get(key)
        need(
            key == "data" or found == expected,
            f"{folder}: expected {key} = {expected} to resume, found {found}",
        )


def _prepare(folder: Path, facts: dict, keep: bool) -> None:
    """Begin or reopen a run; what it replaces stays until there is room for a file."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.tmp"):  # a killed run's drafts
        file.unlink()
    draft = folder / "config.tmp"
    write(draft, facts)
    finished = WORKING_FILES if (folder / "metrics.json").exists() else []
    for name in finished if keep else RUN_FILES + WORKING_FILES:
        (folder / name).unlink(missing_ok=True)
    draft.replace(folder / "config.json")


def main(argv: list[str] | None = None) -> int:
    """Train, distil, evaluate; or recommend. Returns the exit status."""
    return data.guarded(_command, argv, "--resume goes on after the last whole epoch")


def _command(argv: list[str]) -> None:
    if argv[:1] == ["recommend"]:
        return _recommend(argv[1:])
    run = _start(_parser().parse_args(argv))
    data.same_figures(run.device)
    done = run.folder / "metrics.json"
    if not done.exists():
        pipeline(run)
    metrics = data.read_json(done, "test", "parameters", "exclude", sealed=True)
    print(f"{ladder(metrics)}\nhidden at test: {metrics['exclude']}; more in {done}")


def _recommend(argv: list[str]) -> None:
    parser = Parser(prog="promptmm.py recommend", description="A list, from student.npz.")
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    parser.add_argument("--user", required=True, help="user index; with --ids, your own id")
    parser.add_argument("--k", type=int, default=10, help="the list's length (default: 10)")
    parser.add_argument("--ids", type=Path, help="ids.json of `data.py convert`: your ids")
    args = parser.parse_args(argv)
    saved = data.read_arrays(args.run / "student.npz")
    user, item = saved["user"], saved["item"]  # [U, d], [I, d]
    start, seen = saved["seen_indptr"], saved["seen_indices"]
    users, items = ([str(i) for i in range(len(side))] for side in (user, item))
    if args.ids:
        run = str(saved["fingerprint"])
        ids = data.own_ids(args.ids, run, users=len(user), items=len(item))
        users, items = ids["users"], ids["items"]
    expected = (
        f"expected --user {users[0]} … {users[-1]} (your own: --ids) and --k 1 or more"
    )
    need(args.user in users and args.k > 0, f"{expected}, found {args.user} and {args.k}")
    u = users.index(args.user)
    for i, score in recommend(user[u], item, seen[start[u] : start[u + 1]], args.k):
        print(f"{items[i]}\t{score:.4f}")


# ------------------------------------------------------------ faster products

# Skip at first: PyTorch's own operators give the same numbers, later. The tests hold both.


class Product(torch.autograd.Function):
    """M x for a sparse M whose transpose is at hand: Â's blocks are each other's backward.

    On a CPU a weighted bag of rows is this product, and a faster one than torch's for CSR.
    """

    @staticmethod
    def forward(ctx, matrix: Tensor, transposed: Tensor, x: Tensor) -> Tensor:
        ctx.matrix, ctx.transposed = matrix, transposed
        if x.is_cuda:
            return matrix @ x
        return F.embedding_bag(
            matrix.col_indices(),
            x.detach(),
            matrix.crow_indices(),
            mode="sum",
            per_sample_weights=matrix.values(),
            include_last_offset=True,
        )

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return None, None, Product.apply(ctx.transposed, ctx.matrix, gradient.contiguous())


class Scores(torch.autograd.Function):
    """y_bk = ⟨user[users_b], item[lists_bk]⟩; its backward pass adds rows in their place.

    Autograd's own would be as right, but slower: it copies the [B, K, d] gradient. Here
    such an array is made of as much of the batch as a cache holds.
    """

    @staticmethod
    def forward(ctx, user: Tensor, item: Tensor, users: Tensor, lists: Tensor) -> Tensor:
        ctx.save_for_backward(user, item, users, lists)
        logits = []
        for some, listed in pieces(user, users, lists):
            rows = F.embedding(listed, item)  # [b, K, d]
            logits.append(torch.einsum("bd,bkd->bk", user.index_select(0, some), rows))
        return torch.cat(logits)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor):
        user, item, users, lists = ctx.saved_tensors
        by_row = F.embedding_bag(  # a user's list, weighted and summed  [B, d]
            lists, item.detach(), mode="sum", per_sample_weights=gradient
        )
        of_user = torch.zeros_like(user).index_add_(0, users, by_row)  # [U, d]
        of_item = torch.zeros_like(item)  # [I, d]
        for some, listed, part in pieces(user, users, lists, gradient):
            by_cell = part[:, :, None] * user.index_select(0, some)[:, None]  # [b, K, d]
            of_item.index_add_(0, listed.flatten(), by_cell.flatten(0, 1))
        return of_user, of_item, None, None


def pieces(user: Tensor, users: Tensor, lists: Tensor, *more: Tensor) -> zip:
    """users [B], lists [B, K] and more, in parts of b rows: a cache holds [b, K, d]."""
    number = 1 + lists.numel() * user.shape[1] // CACHED
    return zip(*(part.chunk(number) for part in (users, lists, *more)), strict=True)


if __name__ == "__main__":
    sys.exit(main())

"""CKD: each modality is taught by a uni-modal teacher, the weak ones more.

Zhang et al., "Modality-Balanced Learning for Multimedia Recommendation", ACM MM 2024.

We had the abstract and the released code, not the paper: numbers CKD.1-8 are ours. Marks:
[text] abstract, [code] released, [ours]. The ids K1-K14 are in docs/differences.md.

A student of ids has no modalities, so that "without the image" has no meaning (K1). Here
its columns are read in 1 + M blocks [ours]: block 0 is shared, block m is modality m's. The
table, its width and inference stay as they are.

    CKD.2  all: s = Σ_b y^b;   only m: s_m = y^0 + y^m;   without m: s - y^m
    CKD.4  specific_m = max(0, t_m - s_m) on BPR's triplets                  [code]
    CKD.5  generic_m = KL(σ(t_m / τ) ‖ σ(s_m / τ)) on random pairs           [code]
    CKD.6  c_m = clip((s - s_-m) / s_m), how much of the margin m causes     [code]
    CKD.7  w_m = M c_m⁻¹ / Σ c⁻¹: less effect, more weight                  [code] at M = 2
    CKD.8  L = BPR + ‖Θ‖² + λ_s Σ_m w_m specific_m + λ_g Σ_m w_m generic_m

A margin s is ⟨e_u, e_i+ - e_i-⟩; t_m is that of modality m's own teacher. The method says
on which pairs it compares, so it has no lists of a teacher's best items.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distillers.common import Teachers, of_method
from losses import pair_kd
from promptmm import Config, Losses, Pair, Run, Student

# ------------------------------------------------------------ losses and weights


def specific_kd(
    student_margin: Tensor, teacher_margin: Tensor, weight: Tensor | float = 1.0
) -> Tensor:
    """CKD.4 [code]: the student's margin is to reach the teacher's, on observed items.

        mean of w · max(0, t - s)

    margins [B], weight [B] or a number -> []. One-sided: a student that is ahead is left
    alone (K12).

    >>> specific_kd(torch.tensor([0.5, 2.0]), torch.tensor([1.0, 1.0])).item()
    0.25
    """
    return (weight * (teacher_margin - student_margin).relu()).mean()


def generic_kd(
    student_margin: Tensor, teacher_margin: Tensor, temperature: float = 0.1
) -> Tensor:
    """CKD.5 [code]: which of two items does the teacher prefer? Margins [n], [n] -> [].

    This *is* `losses.pair_kd`, PromptMM's corrected Eq. 5, over τ². What differs are the
    pairs: random users and items instead of training edges. The released form has no τ²
    (K8), and 1e-8 inside its logarithms, which leaves a student that is confidently wrong
    without a gradient (K7).

    >>> round(generic_kd(torch.tensor([0.0]), torch.tensor([2.0]), 1.0).item(), 4)
    0.3278
    >>> round(generic_kd(torch.tensor([0.0]), torch.tensor([2.0])).item(), 4)
    0.6931
    """
    return pair_kd(student_margin, teacher_margin, temperature) / temperature**2


def causal_effect(
    joint: Tensor, without: Tensor, only: Tensor, low: float = 1e-8, high: float = 10.0
) -> Tensor:
    """CKD.6 [code]: (s - s_-m) / s_m within [low, high]; same shapes -> same, no gradient.

    Where s_m = 0 the ratio counts as high or low, by the sign of s - s_-m, and as low if
    that is 0 too [ours]: 0/0 would be NaN (K4).

    >>> joint, without, only = torch.tensor([[3.5, 3.5], [1.5, 3.0], [3.0, 1.5]])
    >>> [round(c, 4) for c in causal_effect(joint, without, only).tolist()]
    [0.6667, 0.3333]
    """
    effect = (joint - without).detach()
    alone = only.detach()
    none = alone == 0
    ratio = effect / torch.where(none, 1.0, alone)
    return torch.where(none, effect.sign() * high, ratio).clamp(low, high)


def modality_weights(effects: Tensor) -> Tensor:
    """CKD.7: w_m = M c_m⁻¹ / Σ_m' c_m'⁻¹, [M, …] -> [M, …] of mean 1, no gradient.

    For M = 2 the released formula (K6); the paper's own was not seen (K2).

    >>> [round(w, 3) for w in modality_weights(torch.tensor([0.1, 0.2, 0.4])).tolist()]
    [1.714, 0.857, 0.429]
    """
    inverse = 1 / effects.detach()
    return len(effects) * inverse / inverse.sum(0)


# ------------------------------------------------------------ margins


def block_margins(pair: Pair, users: Tensor, lists: Tensor, blocks: int = 1) -> Tensor:
    """CKD.1 [ours]: Δy^b of each block of columns, [blocks, B]; their sum is the whole's.

    pair: E_u [U, d], E_i [I, d]; users [B]; lists [B, 2]. Both sides are cut alike, by
    `tensor_split`. Raises ValueError for d < blocks.
    """
    user, item = pair
    if user.shape[1] < blocks:
        raise ValueError(f"d: expected at least {blocks} blocks, found {user.shape[1]}")
    lead = item.index_select(0, lists[:, 0]) - item.index_select(0, lists[:, 1])  # [B, d]
    product = user.index_select(0, users) * lead  # [B, d]
    parts = product.tensor_split(blocks, dim=1)  # [B, d_b] each
    return torch.stack([part.sum(1) for part in parts])


def weights_of(margins: Tensor, effect: str) -> Tensor:
    """CKD.6-7 from Δy^b [1 + M, B]: [M, 1], or by row [M, B].

    "batch" averages the three margins over the batch first [ours]: by row, as released, the
    clip makes weights all-or-nothing while margins are small (K5).
    """
    shared, own = margins[:1], margins[1:]  # [1, B], [M, B]
    if effect == "none":
        return torch.ones_like(own[:, :1])
    joint = margins.sum(0, keepdim=True)  # [1, B]
    three = joint.expand_as(own), joint - own, shared + own  # [M, B] each
    if effect == "batch":
        three = tuple(part.mean(1, keepdim=True) for part in three)  # [M, 1]
    return modality_weights(causal_effect(*three))


# ------------------------------------------------------------ the method


@dataclass(frozen=True)
class Settings(Config):
    """The student's, and CKD's own. Released values are in the help."""

    lambda_specific: float = of_method(0.1, "λ_s of CKD.8 (ours; released: 0.01)")
    lambda_generic: float = of_method(0.5, "λ_g of CKD.8 (ours; released: 0.05)")
    tau_generic: float = of_method(0.1, "τ of CKD.5 (released)", low=1e-3)
    pairs_generic: int = of_method(
        1000, "n, random pairs of a step (ours, for time; released: 5000)", low=1
    )
    effect: str = of_method(
        "batch", "over what CKD.6 is taken (ours; released: row)", ("batch", "row", "none")
    )
    blocks: bool = of_method(True, "a block of columns for each modality (ours, K1)")
    taught_by: str = of_method(
        "alone", "uni-modal teachers, or the joint for every m in it", ("alone", "joint")
    )


class CKD:
    """Needs the uni-modal teachers, by the names of their modalities (CKD.8)."""

    Settings = Settings
    SPACE = {
        "lambda_specific": (0.0, 0.01, 0.03, 0.1, 0.3, 1.0),
        "lambda_generic": (0.0, 0.05, 0.15, 0.5, 1.5, 5.0),
        "tau_generic": (0.1, 0.5, 1.0),
        "effect": ("batch", "row"),
    }
    width = 2
    each_epoch = extend = None
    slow = 1.0

    @staticmethod
    def needs(config: Config) -> tuple[str, ...]:
        """Which trained models teach: one a modality alone, or the joint for all in it."""
        return (config.taught_by,)

    def __init__(self, run: Run, student: Student, teachers: Teachers):
        self.config: Settings = run.config
        names = [m for m in teachers if m != "joint"]
        joint = self.config.taught_by == "joint"
        self.teachers = [teachers["joint" if joint else m] for m in names]
        self.blocks = 1 + len(names) if self.config.blocks else 1
        self.shape = len(student.user), len(student.item)
        self.modules: dict[str, nn.Module] = {}

    def draw(self, device) -> Pair:
        """n random users [n] and two random items each [n, 2], anew at each step (K9)."""
        n = self.config.pairs_generic
        n_users, n_items = self.shape
        users = torch.randint(n_users, (n,), device=device)
        return users, torch.randint(n_items, (n, 2), device=device)

    def only(self, margins: Tensor) -> Tensor:
        """s_m = y^0 + y^m, [M, B]; with one block for all the whole margin M times."""
        if len(margins) == 1:
            return margins.expand(len(self.teachers), -1)
        return margins[:1] + margins[1:]

    def terms(self, student_user, student_item, logits, users, lists: Tensor) -> Losses:
        """CKD.8 beyond BPR and ‖Θ‖²; a term of weight 0 is absent."""
        config, student = self.config, (student_user, student_item)
        margins = block_margins(student, users, lists, self.blocks)  # [1 + M, B]
        weights = torch.ones(len(self.teachers), 1, device=users.device)
        if self.blocks > 1:
            weights = weights_of(margins, config.effect)  # [M, 1] or [M, B]
        terms = {}
        if config.lambda_specific:
            told = [block_margins(t, users, lists)[0] for t in self.teachers]
            triples = zip(self.only(margins), told, weights, strict=True)
            losses = [specific_kd(*triple) for triple in triples]
            terms["specific_kd"] = config.lambda_specific * torch.stack(losses).sum()
        if config.lambda_generic:
            some, pairs = self.draw(users.device)
            own = self.only(block_margins(student, some, pairs, self.blocks))  # [M, n]
            told = [block_margins(t, some, pairs)[0] for t in self.teachers]
            margins_of = zip(own, told, strict=True)
            each = [generic_kd(s, t, config.tau_generic) for s, t in margins_of]
            loss = (weights.mean(1) * torch.stack(each)).sum()
            terms["generic_kd"] = config.lambda_generic * loss
        return terms

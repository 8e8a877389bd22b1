"""MF-BPR (Rendle et al., UAI 2009): matrix factorisation, ranked by pairs."""

from dataclasses import dataclass

from baselines.common import GRID
from baselines.lightgcn import LightGCN
from promptmm import Config, of_student


@dataclass(frozen=True)
class Settings(Config):
    """As LightGCN's, without a graph."""

    student_layers: int = of_student(0, "L: none, so only the tables remain")


class MFBPR(LightGCN):
    """LightGCN with no layers: E = E⁰, and a score is ⟨e_u, e_i⟩ of the tables themselves.

    Against its paper: one weight of ‖Θ‖² for users and items.
    """

    Settings = Settings
    SPACE = GRID

"""LightGCN (He et al., SIGIR 2020): the student without a teacher."""

from torch import Tensor

from baselines.common import GRID
from data import Dataset
from promptmm import Config, Device, Losses, Student, student_terms


class LightGCN(Student):
    """Eq. 2 trained by Eq. 13 alone.

    Against its paper: ‖Θ‖² is on the batch's layer-0 rows, a mean (errata P8); every edge
    is visited once an epoch (errata C26).
    """

    Settings = Config
    SPACE = {**GRID, "student_layers": (1, 2, 3, 4)}
    width = 2

    def __init__(self, dataset: Dataset, config: Config, device: Device = "cpu"):
        super().__init__(dataset.train, config, device)
        self.config = config

    def terms(self, users: Tensor, lists: Tensor) -> Losses:
        """Stage 2 with nothing to learn from."""
        return student_terms(self, self.config, None, users, lists)

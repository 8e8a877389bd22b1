"""PromptMM's three losses through the common interface: the worked example.

With the prompt frozen the teacher is a set of embeddings like any other, and stage 2 is
this. A test holds it equal to `promptmm.student_terms`.
"""

import torch
from torch import Tensor, nn

from distillers.common import Distiller, Teachers
from promptmm import Distillation, Encoded, Losses, Run, Student, kd_terms


def promptmm(run: Run, student: Student, teachers: Teachers) -> Distiller:
    """Lists and pairs from "joint"; EmbKD from every other teacher (Eq. 5, 10, 11)."""
    user_modal = {m: pair[0] for m, pair in teachers.items() if m != "joint"}
    item_modal = {m: pair[1] for m, pair in teachers.items() if m != "joint"}
    encoded = Encoded(*teachers["joint"], user_modal, item_modal)
    taught = Distillation(run, lambda: encoded)

    def terms(student_user, student_item, logits, users: Tensor, lists: Tensor) -> Losses:
        told = encoded, taught.project
        return kd_terms(run.config, logits, student_item, users, lists, *told)

    def extend(users: Tensor, lists: Tensor) -> Tensor:
        if not taught.from_top:
            return lists
        return torch.cat([lists, taught.draw(users)[0]], dim=1)

    modules: dict[str, nn.Module] = {"project": taught.project}
    return Distiller(terms, modules, taught.width, taught.refresh, extend)

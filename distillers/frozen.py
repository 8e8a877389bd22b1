"""PromptMM's three losses through the common interface: the worked example.

With the prompt frozen the teacher is a set of embeddings like any other, and stage 2 is
this. A test holds it equal to `promptmm.student_terms`.
"""

from functools import partial

from torch import Tensor, nn

from distillers.common import Distiller, Teachers, with_drawn
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

    modules: dict[str, nn.Module] = {"project": taught.project}
    extend = partial(with_drawn, taught)
    return Distiller(terms, modules, taught.width, taught.refresh, extend)

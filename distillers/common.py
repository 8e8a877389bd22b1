"""What the distillation methods share: teachers, what a method is, its training."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from promptmm import (
    Distillation,
    Encoded,
    Losses,
    Pair,
    Run,
    Student,
    bpr_terms,
    fit,
    load_finished,
    scores,
    setting,
)

Teachers = dict[str, Pair]  # name -> (user [U, d_t], item [I, d_t]), no gradient, any width
of_method = partial(setting, of="method")  # a field that is one method's own


class Distiller(NamedTuple):
    """A method, ready to train."""

    # (student_user [U, d], student_item [I, d], logits [B, K], users [B], lists [B, K])
    terms: Callable[..., Losses]
    modules: dict[str, nn.Module]  # trained with the student, dropped at inference
    width: int  # columns of `lists` that are sampled
    each_epoch: Callable[[], None] | None = None  # as `promptmm.fit` takes it
    extend: Callable[[Tensor, Tensor], Tensor] | None = None  # lists, by more columns
    slow: float = 1.0  # by how much the item table's step is smaller than the others'


def lists_of(run: Run, joint: Pair) -> Distillation:
    """PromptMM's lists under a joint teacher (errata P14), for other methods too."""
    encoded = Encoded(*joint, {}, {})
    own = replace(run.config, lambda_list=1.0)  # PromptMM's λ₃ is not the method's
    lists = Distillation(replace(run, config=own), lambda: encoded)
    lists.refresh()  # once: this teacher stays as it is
    return lists


def with_drawn(taught: Distillation, users: Tensor, lists: Tensor) -> Tensor:
    """Lists of users [B], and what `lists_of` draws for them: [B, K]."""
    if not taught.from_top:
        return lists
    return torch.cat([lists, taught.draw(users)[0]], dim=1)


def teachers_of(encoded: Encoded) -> Teachers:
    """PromptMM's teacher as embeddings: "joint", and one for each modality."""
    teachers = {"joint": (encoded.teacher_user, encoded.teacher_item)}
    for m, user in encoded.user_modal.items():
        teachers[m] = (user, encoded.item_modal[m])
    return teachers


def train(run: Run, method: Callable[..., Distiller], teachers: Teachers) -> Pair:
    """The student under one method of METHODS: embeddings of the selected epoch.

    Student, sampling, BPR, ‖Θ‖² and selection are the core's, so that methods differ by
    their terms alone.
    """
    config = run.config
    torch.manual_seed(config.seed)
    student = Student(run.dataset.train, config, run.device)
    distiller = method(run, student, teachers)
    learner = nn.ModuleDict({"student": student, **distiller.modules})
    others = [w for w in learner.parameters() if w is not student.item]
    step = config.lr_student
    groups = [
        {"params": [student.item], "lr": step / distiller.slow},
        {"params": others, "lr": step},
    ]

    def terms(users: Tensor, lists: Tensor) -> Losses:
        if distiller.extend:
            lists = distiller.extend(users, lists)
        user, item = student()  # [U, d], [I, d]
        logits = scores(user, item, users, lists)  # [B, K]
        own = bpr_terms(student, logits, users, lists, config.l2)
        return own | distiller.terms(user, item, logits, users, lists)

    if not load_finished(run, "method", learner):
        width, hook = distiller.width, distiller.each_epoch
        fit(run, "method", learner, groups, width, terms, student, hook)
    with torch.no_grad():
        return student()

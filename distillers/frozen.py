"""PromptMM's three losses through the common interface: the worked example.

With the prompt frozen the teacher is a set of embeddings like any other, and stage 2 is
this. A test holds it equal to `promptmm.student_terms`.
"""

import torch
from torch import Tensor

from distillers.common import Distiller, Teachers
from losses import embed_kd, list_kd, pair_kd
from promptmm import Losses, Run, Student, margin, scores


def promptmm(run: Run, student: Student, teachers: Teachers) -> Distiller:
    """PairKD from "joint"; ListKD and EmbKD from every other teacher (Eq. 5, 10, 11)."""
    config = run.config
    modal = [pair for name, pair in teachers.items() if name != "joint"]

    def pair_term(logits: Tensor, users: Tensor, lists: Tensor) -> Tensor:
        taught = scores(*teachers["joint"], users, lists[:, :2])  # [B, 2]
        return pair_kd(margin(logits), margin(taught), config.temperature)

    def list_term(logits: Tensor, users: Tensor, lists: Tensor) -> Tensor:
        settings = config.alpha, config.beta, config.temperature
        losses = [list_kd(logits, scores(*m, users, lists), *settings) for m in modal]
        return torch.stack(losses).sum()

    def embed_term(student_item: Tensor) -> Tensor:
        projected = student.project(student_item)  # [I, d of the teacher]
        losses = [embed_kd(projected, item, config.gamma) for _, item in modal]
        return torch.stack(losses).sum()

    def terms(student_user, student_item, logits, users, lists) -> Losses:
        found = {}
        if config.lambda_pair:
            found["pair_kd"] = config.lambda_pair * pair_term(logits, users, lists)
        if config.lambda_list:
            found["list_kd"] = config.lambda_list * list_term(logits, users, lists)
        if config.lambda_embed:
            found["embed_kd"] = config.lambda_embed * embed_term(student_item)
        return found

    width = 1 + (config.negatives if config.lambda_list else 1)
    return Distiller(terms, modules={}, width=width)

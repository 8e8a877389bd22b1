"""Section 4.7: a fifth of the training interactions arrives later (Table 7).

The old student over the new graph, the same fine-tuned on the new interactions, and
LightGCN, LATTICE or PromptMM trained anew on everything.
"""

import time
from dataclasses import replace

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from data import Sampler, need
from experiments.lab import (
    Job,
    Lab,
    figures,
    ids_settings,
    judge,
    learn_all,
    log_of,
    seeded,
    settings,
    spread,
    student_weights,
    with_data,
)
from experiments.publish import Output, markdown, protocol
from promptmm import Config, Student, bpr_terms, pace, scores, train_epoch

LATER = 0.2  # share of the training interactions that arrives later
ANEW = ("LightGCN", "LATTICE")  # retrained beside PromptMM, as in the paper's Table 7
PATIENCE = 3  # epochs of fine-tuning without a better one
METRICS = ("recall@20", "ndcg@20")


def table7(lab: Lab, seeds: int) -> Output:
    """Adapting to new data: quality against seconds."""
    full = settings(lab)
    every = [one for way in anew(lab, full) for one in seeded(way, seeds)]
    learn_all(lab, "Table 7, retrained", every)  # all at once, for --jobs
    found = [increment(lab, replace(full, seed=seed)) for seed in range(seeds)]
    rows = []
    for way in found[0]:
        row = {"model": way}
        for key in found[0][way]:
            row[key] = spread([one[way][key] for one in found])
        rows.append(row)
    whole = rows[-1]["seconds"]["mean"]
    for row in rows:
        seconds = row["seconds"]["mean"]
        row["time"] = f"{seconds:.2f} s"
        row["times faster"] = f"{whole / seconds:.1f} x" if seconds else ""
    columns = {
        "model": "after the new interactions",
        "recall@20": "Recall@20",
        "ndcg@20": "NDCG@20",
        "time": "time",
        "times faster": "against retraining",
    }
    note = (
        "a random fifth of the training interactions is held back for each seed; "
        "fine-tuning: BPR on the new ones only, over the whole graph, at a tenth of the "
        "student's step, selected on validation, patience 3; time: seconds of training up "
        "to the selected epoch, without validation, in which a teacher's w_m are found; "
        "those of the retrained models as logged when they were trained; "
        f"{protocol(full, seeds)}"
    )
    title = f"Table 7. Adapting to new data on {lab.dataset.name}, test split"
    return Output(title, rows, markdown(rows, columns), note)


def increment(lab: Lab, config: Config) -> dict[str, dict[str, float]]:
    """One seed: recall, NDCG and training seconds of each way to take in new data."""
    old, new = split(lab.dataset.train, config.seed)
    before = with_data(lab, replace(lab.dataset, train=old))
    job = Job("PromptMM", config)
    learn_all(before, "Table 7, before", [job])
    student = Student(lab.dataset.train, config, lab.device)
    student.load_state_dict(student_weights(before.folder(*job), lab.device))
    result = {"old student, new graph": on_test(lab, student) | {"seconds": 0.0}}
    spent = finetune(lab, student, new, config)
    result["student fine-tuned"] = on_test(lab, student) | {"seconds": spent}
    for whole in anew(lab, config):
        result[f"{whole.model} retrained"] = retrained(lab, whole)
    return result


def anew(lab: Lab, config: Config) -> list[Job]:
    """The models that train on everything; PromptMM, under these settings, comes last."""
    others = [Job(model, replace(settings(lab, model), seed=config.seed)) for model in ANEW]
    return [*others, Job("PromptMM", config)]


def split(
    train: sparse.csr_matrix, seed: int
) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Old and new interactions, both [U, I]."""
    new = train.copy()
    new.data = (np.random.default_rng(seed).random(train.nnz) < LATER).astype(train.dtype)
    new.eliminate_zeros()
    need(
        0 < new.nnz < train.nnz, f"expected more to hold back a fifth of, found {train.nnz}"
    )
    return (train - new).tocsr(), new


def retrained(lab: Lab, job: Job) -> dict[str, float]:
    """A model trained anew on everything; a student pays for its teacher too."""
    values = judge(lab, *job)
    paid = [job]
    if job.model == "PromptMM":
        ids = Job("LightGCN", ids_settings(lab, job.config))
        paid += [job._replace(model="Teacher"), ids]
    seconds = sum(seconds_to_best(log_of(lab.folder(*one))) for one in paid)
    return {metric: float(values[metric].mean()) for metric in METRICS} | {
        "seconds": seconds
    }


def seconds_to_best(log: dict[str, np.ndarray]) -> float:
    """Seconds of training up to the selected epoch; what came after was only to be sure."""
    return float(log["seconds"][log["recall@20"].argmax()])


def on_test(lab: Lab, student: Student) -> dict[str, float]:
    with torch.no_grad():
        found = figures(lab.dataset, student())
    return {metric: found[metric] for metric in METRICS}


# ------------------------------------------------------------ fine-tuning


def finetune(lab: Lab, student: Student, new: sparse.csr_matrix, config: Config) -> float:
    """Train a student on new interactions, keep its best epoch; the seconds until then."""
    sampler = Sampler(lab.dataset.train, lab.device)  # negatives: no positives, old or new
    generator = torch.Generator(lab.device).manual_seed(config.seed)
    step = config.lr_student / 10  # small, for it starts from a trained model
    optimiser = torch.optim.AdamW(student.parameters(), lr=step, weight_decay=0.0)
    batch, _ = pace(config, "student", lab.dataset.train.nnz)

    def terms(users: Tensor, lists: Tensor) -> dict[str, Tensor]:
        logits = scores(*student(), users, lists)  # [B, 2]
        return bpr_terms(student, logits, users, lists, config.l2)

    best, spent = -1.0, 0.0
    stale = 0
    for epoch in range(config.epochs + 1):
        recall = validation(lab, student)
        stale += 1
        if recall > best:
            best, selected = recall, spent
            stale = 0
            kept = {name: weight.clone() for name, weight in student.state_dict().items()}
        if stale == PATIENCE or epoch == config.epochs:
            break
        began = time.perf_counter()
        samples = only_new(sampler.epoch(generator), new)
        train_epoch(student, optimiser, samples, batch, terms)
        spent += time.perf_counter() - began
    student.load_state_dict(kept)
    return selected


def validation(lab: Lab, student: Student) -> float:
    with torch.no_grad():
        return figures(lab.dataset, student(), "val")["recall@20"]


def only_new(
    samples: tuple[Tensor, Tensor], new: sparse.csr_matrix
) -> tuple[Tensor, Tensor]:
    """Of users [E] and lists [E, K], those whose positive is a new interaction."""
    users, lists = samples
    cells = users.cpu().numpy().copy(), lists[:, 0].cpu().numpy().copy()
    fresh = np.asarray(new[cells]).ravel() > 0
    fresh = torch.from_numpy(fresh).to(users.device)
    return users[fresh], lists[fresh]

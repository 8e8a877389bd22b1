"""Claims that no table of models answers: C-1, C-4, P-3 and P-4 look inside a model."""

import tempfile
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

import distillers.common
from data import Sampler
from distillers.common import lists_of, with_drawn
from distillers.counterfactual import CKD, block_margins, weights_of
from distillers.several_teachers import PRMKD, teacher_weights
from evaluate import fuse, one_scale
from experiments.incremental import only_new
from experiments.lab import (
    Job,
    Lab,
    each_alone,
    embeddings,
    figures,
    learn_all,
    load_teacher,
    recall,
    seeded,
    settings,
    spread,
    teachers_for,
)
from experiments.methods import CKD as NAME_CKD, PRM as NAME_PRM, learn_teachers
from experiments.publish import markdown, plain
from promptmm import Config, Pair, Run, Student, Teacher, scores, table


class Finding(NamedTuple):
    """An experiment's rows, their table, its outcome: yes, no, against, or "" (none)."""

    name: str
    text: str
    rows: list
    table: str
    outcome: str


def by_seeds(differences) -> str:
    """Is the mean difference over seeds not zero by a t test (p < .05), and which way?

    >>> by_seeds([0.1, 0.11, 0.09]), by_seeds([0.1, -0.1]), by_seeds([-0.2, -0.21])
    ('yes', 'no', 'against')
    """
    found = spread(differences)
    n = len(found["runs"])
    if n < 2:
        return "no"
    error = stats.t.ppf(0.975, n - 1) * found["std"] / np.sqrt(n)
    if abs(found["mean"]) <= error:
        return "no"
    return "yes" if found["mean"] > 0 else "against"


def recall_on_test(lab: Lab, pair: Pair) -> float:
    return figures(lab.dataset, pair)["recall@20"]


def agreed(*outcomes: str) -> str:
    """What all of them say; "no" where they differ."""
    return outcomes[0] if len({*outcomes}) == 1 else "no"


# ------------------------------------------------------------ CKD


@torch.no_grad()
def in_mode(teacher: Teacher, m: str) -> Pair:
    """The teacher with all modalities but m at their means, users' and items' (C-1).

    The final rows are replaced. Replaced before propagation, a mean would become different
    by degree, and popularity leak in.
    """
    pairs = [one_scale((teacher.user, teacher.item))]
    for name, f in teacher.reduced().items():
        user, item = one_scale(teacher.propagate(f))
        if name != m:
            user, item = (part.mean(0).expand_as(part) for part in (user, item))
        pairs.append((user, item))
    return fuse(pairs, [1.0, *teacher.modality_weights().values()])


def modes(lab: Lab, seeds: int) -> Finding:
    """C-1: joint training leaves each modality worse than a uni-modal teacher of it."""
    config = settings(lab, NAME_CKD)
    teachers = seeded(Job("Teacher", config), seeds)
    learn_all(lab, "C-1", teachers)
    learn_teachers(lab, [Job(NAME_CKD, config)], seeds)
    rows, found = [], []
    for m, place in each_alone(lab).items():
        joint = [
            recall_on_test(lab, in_mode(load_teacher(lab, j.config), m)) for j in teachers
        ]
        alone = [recall(place, job) for job in teachers]
        found.append(by_seeds(np.subtract(alone, joint)))
        row = {"modality": m, "joint, in its mode": spread(joint), "alone": spread(alone)}
        rows.append(row | {"alone is better": found[-1]})
    most = [one for one in ("yes", "against") if found.count(one) > len(found) / 2]
    text = "alone, a modality is trained better than jointly"
    return Finding("C-1", text, rows, plain(rows), most[0] if most else "no")


class Watched(CKD):
    """CKD that writes down w_m [M], the mean of each step, in a list for each epoch."""

    def __init__(self, run: Run, student: Student, teachers, log: list[list[Tensor]]):
        super().__init__(run, student, teachers)
        self.log = log

    def each_epoch(self):
        self.log.append([])

    def terms(self, user, item, logits, users, lists):
        margins = block_margins((user, item), users, lists, self.blocks)
        self.log[-1].append(weights_of(margins, self.config.effect).mean(1).detach())
        return super().terms(user, item, logits, users, lists)


def weights_by_epoch(lab: Lab, seeds: int) -> Finding:
    """C-4: the weakest modality gets the largest weight."""
    found = Job(NAME_CKD, settings(lab, NAME_CKD))
    learn_teachers(lab, [found], seeds)
    rows = []
    for job in seeded(found, seeds):
        teachers = teachers_for(lab, job)
        if not teachers:
            continue
        log: list[list[Tensor]] = []
        trained_with(lab, job.config, partial(Watched, log=log), teachers)
        by_epoch = torch.stack([torch.stack(steps).mean(0) for steps in log])  # [epochs, M]
        for n, m in enumerate(teachers):
            alone = recall_on_test(lab, teachers[m])
            first, last = (float(by_epoch[e, n]) for e in (0, -1))
            row = {"seed": job.config.seed, "modality": m, "alone": alone}
            row |= {"w, first epoch": first, "w, last epoch": last}
            rows.append(row | {"curve": by_epoch[:, n].tolist()})
    text = "the weakest modality gets the largest weight"
    names = ("seed", "modality", "alone", "w, first epoch", "w, last epoch")
    return Finding("C-4", text, rows, markdown(rows, {n: n for n in names}), order(rows))


def order(rows: list[dict]) -> str:
    """Of mean weights at the end and mean recalls alone: yes if opposite ends meet.

    Over the seeds that have several teachers: one alone weighs 1, whatever it knows. An
    order has no test, so that it refutes nothing.
    """
    taught = Counter(row["seed"] for row in rows)  # by how many
    found: dict[str, list] = {}
    for row in rows:
        if taught[row["seed"]] > 1:
            pair = row["alone"], row["w, last epoch"]
            found.setdefault(row["modality"], []).append(pair)
    means = {m: np.mean(pairs, axis=0) for m, pairs in found.items()}
    if len(means) < 2:
        return "no"
    weakest = min(means, key=lambda m: means[m][0])
    heaviest = max(means, key=lambda m: means[m][1])
    return "yes" if weakest == heaviest else "no"


def trained_with(lab: Lab, config: Config, method, teachers) -> Pair:
    """A student under teachers that no lab knows: trained anew, not kept."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), lab.dataset, config, lab.device, {})
        return distillers.common.train(run, method, teachers)


# ------------------------------------------------------------ PRM-KD


def useless_teachers(lab: Lab, seeds: int) -> Finding:
    """P-3: weights protect from teachers that know nothing: noise, and MF-BPR."""
    found = settings(lab, NAME_PRM)
    jobs = {  # rows of P-2
        name: Job(NAME_PRM, replace(found, confidence=weight, consistency=weight))
        for name, weight in (("weighted", 1.0), ("uniform", 0.0))
    }
    known = jobs | {"mf": Job("MF-BPR", settings(lab, "MF-BPR"))}
    every = {name: seeded(job, seeds) for name, job in known.items()}
    learn_all(lab, "P-3", [one for runs in every.values() for one in runs])
    lost: dict[str, list[float]] = {name: [] for name in jobs}
    for seed in range(seeds):
        teachers = teachers_for(lab, every["weighted"][seed])
        if not teachers:
            continue
        torch.manual_seed(seed)
        noise = tuple(
            table(len(part), part.shape[1]).detach() for part in teachers["joint"]
        )
        more = teachers | {"noise": noise, "mf": embeddings(lab, *every["mf"][seed])}
        for name in jobs:
            job = every[name][seed]
            after = trained_with(lab, job.config, PRMKD, more)
            lost[name].append(recall(lab, job) - recall_on_test(lab, after))
    rows = [{"weights": k, "Recall@20 lost": spread(v)} for k, v in lost.items() if v]
    found = by_seeds(np.subtract(lost["uniform"], lost["weighted"])) if rows else "no"
    text = "weights protect from useless teachers"
    return Finding("P-3", text, rows, plain(rows) if rows else "", found)


def memory(lab: Lab, seeds: int) -> Finding:
    """P-4: are the teachers' mean weights in the same order where they did not train?

    In four of five seeds. An order has no test, so that it refutes nothing.
    """
    config = replace(settings(lab, NAME_PRM), confidence=1.0, consistency=1.0)
    learn_all(lab, "P-4", seeded(Job("Teacher", config), seeds))
    every = [sureness(lab, job) for job in seeded(Job(NAME_PRM, config), seeds)]
    found = [one for one in every if one["train"]]  # where a modality weighs anything
    text = "teachers are as sure of items they have not seen"
    if not found:
        return Finding("P-4", text, [], "No modality weighs anything here.", "no")
    rows = []
    for name in dict.fromkeys(name for one in found for name in one["train"]):
        row = {"teacher": name}
        for split in ("train", "val"):
            row[split] = spread([one[split][name] for one in found if name in one[split]])
        rows.append(row)
    same = [in_order(one["train"]) == in_order(one["val"]) for one in found]
    table = f"{plain(rows)}\n\nThe same order in {sum(same)} of {len(same)} seeds."
    return Finding("P-4", text, rows, table, "yes" if np.mean(same) >= 0.8 else "no")


def in_order(weights: dict[str, float]) -> list[str]:
    """
    >>> in_order({"joint": 0.3, "lightgcn": 0.1})
    ['lightgcn', 'joint']
    """
    return sorted(weights, key=weights.__getitem__)


def sureness(lab: Lab, job: Job) -> dict[str, dict[str, float]]:
    """w_t by teacher, on lists about training items and about validation items."""
    teachers = teachers_for(lab, job)
    if not teachers:
        return {"train": {}, "val": {}}
    run = Run(None, lab.dataset, job.config, lab.device, {})
    method = PRMKD(run, Student(lab.dataset.train, job.config, lab.device), teachers)
    names = (*teachers, "spectral")
    train, val = lab.dataset.train, lab.dataset.val
    weights = {}
    for split, taken, of in (("train", train, train), ("val", train + val, val)):
        found = mean_weights(method, teachers["joint"], taken, of)
        weights[split] = dict(zip(names, found, strict=True))
    return weights


@torch.no_grad()
def mean_weights(method: PRMKD, joint: Pair, taken, of) -> list[float]:
    """w_t, mean over lists whose positive is in `of`, and of which no other is in `taken`.

    taken, of: CSR [U, I]. The lists are PRM-KD's.
    """
    run, config = method.run, method.config
    torch.manual_seed(config.seed)  # the lists' own items are drawn by torch's generator
    lists = lists_of(replace(run, dataset=replace(run.dataset, train=taken)), joint)
    generator = torch.Generator(run.device).manual_seed(0)
    sampled = Sampler(taken, run.device).epoch(generator, lists.width - 1)
    users, pairs = only_new(sampled, of)
    listed = with_drawn(lists, users, pairs)  # [B, K]
    told = torch.stack([scores(*pair, users, listed) for pair in method.teachers])
    log_p = (told / config.temperature).log_softmax(-1)  # [T, B, K]
    return teacher_weights(log_p, config.confidence, config.consistency).mean(1).tolist()

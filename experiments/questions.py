"""Claims of the three neighbours that a table of models answers: rows, reference, judge."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from experiments.inside import agreed, by_seeds
from experiments.lab import Job, Lab, recall, settings
from experiments.methods import ALONE, CKD, KDSR, PRM, UNTAUGHT

SINGLE = ("joint", "modal", "lightgcn", "spectral")
WEIGHTED = {  # PRM-KD's weights of confidence and of consistency
    "uniform": (0.0, 0.0),
    "confidence only": (1.0, 0.0),
    "consistency only": (0.0, 1.0),
    "both": (1.0, 1.0),
}


def outcome(row: dict, reference: dict, sign: int = 1) -> str:
    """Is a row better than the reference (sign -1: worse), significantly and by seeds?"""
    gains = np.subtract(row["recall@20"]["runs"], reference["recall@20"]["runs"]) * sign
    significant = row.get("p", 1.0) < 0.05
    agree = (gains > 0).mean() >= 0.8  # four of five
    if significant and gains.mean() > 0 and agree:
        return "yes"
    return "against" if significant and gains.mean() < 0 else "no"


class Question(NamedTuple):
    """A claim that is answered by a table of models."""

    name: str
    text: str
    rows: Callable[[Lab], dict[str, Job]]
    reference: str
    judge: Callable[[Lab, dict[str, dict]], str]


def one_changed(model: str, changes: dict[str, dict]) -> Callable[[Lab], dict[str, Job]]:
    def rows(lab: Lab) -> dict[str, Job]:
        full = settings(lab, model)
        jobs = {model: Job(model, full)}
        for name, change in changes.items():
            changed = replace(full, **change)
            if changed != full:  # the search may have found it
                jobs[name] = Job(model, changed)
        return jobs

    return rows


def full_is_best(
    model: str, parts: tuple[str, ...]
) -> Callable[[Lab, dict[str, dict]], str]:
    """Each row that lacks a part is worse; against: any row is better."""

    def judged(lab: Lab, rows: dict[str, dict]) -> str:
        full = rows[model]
        others = [row for name, row in rows.items() if name != model]
        if any(outcome(row, full) == "yes" for row in others):
            return "against"
        if not rows.keys() >= {*parts}:
            return "no"  # the search has left a part out
        worse = [outcome(rows[name], full, sign=-1) == "yes" for name in parts]
        return "yes" if all(worse) else "no"

    return judged


def beats(name: str, reference: str) -> Callable[[Lab, dict[str, dict]], str]:
    return lambda lab, rows: outcome(rows[name], rows[reference])


def is_worse(name: str, reference: str) -> Callable[[Lab, dict[str, dict]], str]:
    return lambda lab, rows: outcome(rows[name], rows[reference], sign=-1)


def beats_best_single(lab: Lab, rows: dict[str, dict]) -> str:
    """PRM-KD against the single teacher that is best on validation, one seed."""
    jobs = prm_teachers(lab)
    single = [f"{one} alone" for one in SINGLE]
    best = max(single, key=lambda name: recall(lab, jobs[name], "val"))
    return outcome(rows[best], rows[PRM], sign=-1)


def prm_teachers(lab: Lab) -> dict[str, Job]:
    single = {f"{one} alone": {"taught_by": one} for one in SINGLE}
    rows = one_changed(PRM, single | {"lists of random items": {"list_items": "random"}})
    return rows(lab) | {ALONE: Job(ALONE, settings(lab, ALONE))}


def main_rows(lab: Lab) -> dict[str, Job]:
    names = (ALONE, "PromptMM", CKD)
    return {name: Job(name, settings(lab, name)) for name in names}


def weighted(lab: Lab) -> dict[str, Job]:
    full = settings(lab, PRM)
    jobs = {}
    for name, (confidence, consistency) in WEIGHTED.items():
        config = replace(full, confidence=confidence, consistency=consistency)
        jobs[name] = Job(PRM, config)
    return jobs


KDSR_CHANGES = {
    "w/o holistic": {"lambda_holistic": 0.0},
    "w/o dissected": {"lambda_dissected": 0.0},
    "slow = 1": {"slow": 1.0},
    "fresh start": {"start": "fresh"},
    "its start alone": UNTAUGHT,
}


def on_both(lab: Lab) -> dict[str, Job]:
    alone, taught = settings(lab, ALONE), settings(lab, KDSR)
    rows = {}
    for model, config in ((ALONE, alone), (KDSR, taught)):
        rows[f"{model}, L = 0"] = Job(model, replace(config, student_layers=0))
        rows[f"{model}, L as found"] = Job(model, config)
    return rows


def gains_on_both(lab: Lab, rows: dict[str, dict]) -> str:
    """By seeds alone: each pair has a reference of its own."""
    found = []
    for name in ("L = 0", "L as found"):
        runs = [rows[f"{model}, {name}"]["recall@20"]["runs"] for model in (KDSR, ALONE)]
        found.append(by_seeds(np.subtract(*runs)))
    return agreed(*found)


CKD_CHANGES = {
    "λ_s = 0": {"lambda_specific": 0.0},
    "λ_g = 0": {"lambda_generic": 0.0},
    "all weights 1": {"effect": "none"},
    "effect by row": {"effect": "row"},
    "joint teacher for every m": {"taught_by": "joint"},
    "one block for all": {"blocks": False},
}
CKD_PARTS = ("λ_s = 0", "λ_g = 0", "all weights 1")  # the other rows are variants
TABLES = (
    Question(
        "C-2",
        "each part of CKD helps",
        one_changed(CKD, CKD_CHANGES),
        CKD,
        full_is_best(CKD, CKD_PARTS),
    ),
    Question("C-3", "CKD beats LightGCN", main_rows, ALONE, beats(CKD, ALONE)),
    Question(
        "P-1", "several teachers beat the best one", prm_teachers, PRM, beats_best_single
    ),
    Question("P-2", "weights beat a mean", weighted, "uniform", beats("both", "uniform")),
    Question(
        "P-5",
        "curriculum: a row, no claim",
        one_changed(PRM, {"curriculum of 20 epochs": {"curriculum": 20}}),
        PRM,
        lambda lab, rows: "",
    ),
    Question(
        "D-2",
        "KDSR gains by more than its start",
        one_changed(KDSR, KDSR_CHANGES),
        KDSR,
        is_worse("its start alone", KDSR),
    ),
    Question(
        "D-4",
        "KDSR gains with and without a graph",
        on_both,
        f"{ALONE}, L = 0",
        gains_on_both,
    ),
)

"""The search behind every preset: small, logged, on validation, equal for all models.

    python -m experiments tune [--data DIR] [--tries N]

results/<dataset>/tune.md lists every try; `lab.settings` reads the best from its .json. A
model of baselines/ brings its space along (`SPACE`); those of PromptMM are here.
"""

import zlib
from dataclasses import replace
from itertools import pairwise

import numpy as np

from baselines import MODELS
from data import need
from distillers import METHODS
from experiments.lab import (
    QUICK,
    Job,
    Lab,
    known,
    learn_all,
    method_start,
    needs,
    recall,
    search,
    seeded,
    settings_class,
    tries as tries_of,
)
from experiments.publish import Output, markdown
from promptmm import Config

REDRAWN = 1 / 3  # the probability that a try draws a setting anew
SPACES = {  # besides those of baselines/, and after them
    "Teacher": {
        "lr_teacher": (3e-4, 1e-3, 3e-3),
        "dim_teacher": (64, 128, 256, 512, 1024),
        "lambda_prompt": (0.01, 0.05, 0.2),
        "dropout": (0.0, 0.2, 0.5),
        "tokens": ("mean", "concat"),
    },
    "PromptMM": {
        "lr_student": (2e-3, 5e-3, 1e-2, 2e-2),
        "batch": (0, 2048, 4096),
        "l2": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
        "student_layers": (1, 2, 3, 4),
        "lambda_pair": (0.03, 0.1, 0.3, 1.0),
        "lambda_list": (0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
        "lambda_embed": (0.01, 0.03, 0.1, 0.3),
        "temperature": (0.5, 1.0, 2.0),
        "negatives": (10, 20, 50),
        "list_pool": (50, 100, 200, 400),
        "tune_prompt": (True, False),
    },
}
ON_ITS_GRAPH = ("batch", "l2", "student_layers")
LIKE_LIGHTGCN = {  # what a comparison model's first try has of the best LightGCN
    "NGCF": ON_ITS_GRAPH,
    "VBPR": ("batch",),
    "MMGCN": ("batch",),
    "GRCN": ("batch",),
    "CLCRec": ("batch",),
    "LATTICE": ON_ITS_GRAPH,
    "FREEDOM": ON_ITS_GRAPH,
    "BM3": ("batch",),
}
STUDENT = ("lr_student", "batch", "l2", "student_layers")  # searched for every method
# Of each first try, what earlier single runs had shown; "all": for every model.
CITEULIKE = {"all": {"eval_every": 4, "patience": 10}, "LightGCN": {"batch": 2048}}
START = {
    "synthetic": {
        "all": {"dim": 32, "patience": 10},
        "LightGCN": {"student_layers": 3, "l2": 1e-2},
        "VBPR": {"l2_content": 0.01},
        "PromptMM": {"lambda_list": 10.0},
    },
    "citeulike": CITEULIKE,
    "citeulike_tag": CITEULIKE,
    "tiktok": {
        "LightGCN": {"batch": 4096, "student_layers": 4, "l2": 3e-3},
        "VBPR": {"l2_content": 0.1},
    },
}
ONE_STREAM = ("MF-BPR", "LightGCN", "Teacher", "PromptMM")  # as when the presets were made
FIRST = ("MF-BPR", "LightGCN")  # others begin as LightGCN's best


def tune(lab: Lab, tries: int, models: str = "") -> Output:
    """Random local search on validation with one seed, equally many tries for every model.

    PromptMM's are shared by its teacher and its student, half each. A try redraws each
    setting of the best so far with probability 1/3. A comparison model begins with what
    LIKE_LIGHTGCN names of the best LightGCN, the student as that and the best teacher, all
    with what START says.

    models: these alone, comma-separated; of the others, what was found before stays, and
    with as many tries. PromptMM stands on the teacher, and that on LightGCN: asked for one,
    those above it are asked too. ONE_STREAM's models draw in turn, so that some of them
    asked alone draw what the first of them draw in a whole search.
    """
    spaces = {model: kind.SPACE for model, kind in MODELS.items()} | SPACES
    chosen = known(models, spaces) if models else list(spaces)
    for below, above in pairwise(("LightGCN", "Teacher", "PromptMM")):
        stands = f"--models: expected {above} with {below}, which it stands on"
        need(below not in chosen or above in chosen, stands)
    before = search(lab) if models else {}
    others = before.get("tried", tries)
    need(
        lab.quick or others == tries,
        f"expected --tries {others}, as the others had, found {tries}",
    )
    best = {name: own for name, own in before.get("best", {}).items() if name not in chosen}
    rows = [row for row in before.get("rows", []) if row["model"] in best]
    budget = dict.fromkeys(chosen, tries)
    budget |= {"Teacher": tries // 2, "PromptMM": tries - tries // 2}
    stream = np.random.default_rng(0)
    for model in sorted(chosen, key=lambda name: name not in FIRST):
        rng = stream if model in ONE_STREAM else own_stream(model)
        first = beginning(model, best) | given(lab.dataset.name, model)
        lab = replace(lab, chosen=best)  # a teacher's ids are the best LightGCN
        found = search_model(lab, model, first, spaces[model], budget[model], rng)
        best = best | {model: final_choice(lab, model, found)}
        rows += found
    best = {model: best[model] for model in spaces if model in best}  # Table 4's order
    rows.sort(key=lambda row: list(best).index(row["model"]))
    return searched(lab, f"Search on {lab.dataset.name}", rows, best, tries)


def searched(lab: Lab, title: str, rows: list[dict], best: dict, tries: int) -> Output:
    """Every try, and which was chosen."""
    for row in rows:
        row["shown"] = ", ".join(
            f"{name} {value}" for name, value in row["settings"].items()
        )
        row["chosen"] = "chosen" if row["settings"] == best[row["model"]] else ""
    columns = {
        "model": "model",
        "validation": "validation Recall@20",
        "three seeds": "mean of seeds 0-2",
        "shown": "settings",
        "chosen": "",
    }
    note = (
        "random search; of six tries or more the best three are decided by the mean over "
        "three seeds; the test split is not read; settings not named are the model's "
        "defaults"
    )
    extra = {"best": best, "tried": tries, "tries": tries_of({"rows": rows})}
    extra |= {"fingerprint": lab.fingerprint}
    title = f"{title}, validation split, seed 0"
    return Output(title, rows, markdown(rows, columns), note, extra=extra)


def search_model(
    lab: Lab, model: str, first: dict, space: dict, budget: int, rng: np.random.Generator
) -> list[dict]:
    """`budget` different settings of one model, each with its validation Recall@20."""
    kind = settings_class(model)
    best, highest = first, -1.0
    seen, rows = [], []
    for _ in range(100 * budget):  # a small space may hold fewer settings than the budget
        drawn = draw(space, rng)
        if not seen:
            drawn = {}  # the first try is the beginning itself
        chosen = best | drawn
        config = kind(**chosen | (QUICK if lab.quick else {}))
        if config in seen:
            continue
        seen.append(config)
        title = f"tune {len(seen)} of {budget} {drawn},"
        learn_all(lab, title, [Job(model, config)])
        found = recall(lab, Job(model, config), "val")
        rows.append({"model": model, "validation": found, "settings": chosen})
        if found > highest:
            highest, best = found, chosen
        if len(seen) == budget:
            break
    return rows


def final_choice(lab: Lab, model: str, rows: list[dict]) -> dict:
    """The best settings: of the best three tries, by the mean over three seeds.

    One seed's best is partly luck. Of fewer than six tries the best is taken as it is.
    """
    ranked = sorted(rows, key=lambda row: -row["validation"])
    if len(rows) < 6:
        return ranked[0]["settings"]
    kind = settings_class(model)
    for row in ranked[:3]:
        jobs = seeded(Job(model, kind(**row["settings"])), 3)
        learn_all(lab, "tune, final choice", jobs)
        row["three seeds"] = float(np.mean([recall(lab, job, "val") for job in jobs]))
    return max(ranked[:3], key=lambda row: row["three seeds"])["settings"]


def draw(space: dict[str, tuple], rng: np.random.Generator) -> dict:
    """New values for some of the settings."""
    drawn = {}
    for name, values in space.items():
        if rng.random() < REDRAWN:
            drawn[name] = values[rng.integers(len(values))]
    return drawn


def beginning(model: str, best: dict[str, dict]) -> dict:
    """What a model's first try takes over from the best of others."""
    if model == "Teacher" or "LightGCN" not in best:
        return {}
    like = MODELS["LightGCN"].Settings(**best["LightGCN"])
    if model in MODELS:
        return {name: getattr(like, name) for name in LIKE_LIGHTGCN.get(model, ())}
    return best.get("Teacher", {}) | {name: getattr(like, name) for name in STUDENT}


def given(dataset: str, model: str) -> dict:
    """START's part for a model."""
    start = START.get(dataset, {})
    return start.get("all", {}) | start.get(model, {})


def own_stream(model: str) -> np.random.Generator:
    """Random numbers of a model's own, so that a new model moves no other's search."""
    return np.random.default_rng(zlib.crc32(model.encode()))


# ------------------------------------------------------------ their search


def tune_methods(lab: Lab, tries: int) -> Output:
    """As `tune`, from LightGCN's and the teacher's best: half the tries for the students.

    The other half is the teacher's, spent by `tune` and shared. Where no
    model teaches, all are the student's.
    """
    found = search(lab).get("best", {})
    shared = {name: SPACES["PromptMM"][name] for name in STUDENT}
    names = [name for name in METHODS if settings_class(name) is not Config]
    rows, best = [], {}
    for model in names:
        first = method_start(found) | given(lab.dataset.name, model)
        space = shared | METHODS[model].SPACE
        taught = needs(model, settings_class(model)())
        budget = tries - tries // 2 if taught else tries
        tried = search_model(lab, model, first, space, budget, own_stream(model))
        best[model] = final_choice(lab, model, tried)
        rows += tried
    return searched(lab, f"Search for the methods on {lab.dataset.name}", rows, best, tries)

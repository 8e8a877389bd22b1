"""Four ways of distilling into one student, side by side: results/<dataset>/methods.json.

All four minimise BPR plus a distance to something frozen: they differ in what is compared.
docs/methods.md explains; claims.py asks what each paper claims. Their settings come from
`python -m experiments tune_methods`, after `tune`.
"""

from dataclasses import replace

import numpy as np

from experiments.comparison import GROUPS, by_group, by_popularity
from experiments.lab import (
    Job,
    Lab,
    adjust,
    compare,
    each_alone,
    embeddings,
    holm,
    learn_all,
    log_of,
    needs,
    p_against,
    recall,
    search,
    seeded,
    settings,
    spread,
    tries as tries_of,
    with_teachers,
)
from experiments.publish import Output, markdown, paired, percent, protocol
from experiments.tune import STUDENT
from promptmm import Config

ALONE = "LightGCN"
START = "LightGCN, content start"  # the control of KDSR
UNTAUGHT = {
    "start": "content",
    "lambda_holistic": 0.0,
    "lambda_dissected": 0.0,
    "slow": 1.0,
}
CKD = "CKD"
PRM = "PRM-KD (ours after 002)"
KDSR = "KDSR"
FOUR = ("PromptMM", CKD, PRM, KDSR)
TAUGHT_BY = {
    "Teacher": "validation",
    "PromptMM": "Teacher: lists, pairs, items",
    "CKD": "uni-modal teachers: margins by mode",
    "PRM-KD (ours after 002)": "Teacher, its modalities, LightGCN, SVD: a mixture of lists",
    "KDSR": "features: pairs of items; nothing trained",
    START: "features: where the items start",
}
COLUMNS = {
    "model": "model",
    "taught by": "what teaches",
    "recall@20": "Recall@20",
    "ndcg@20": "NDCG@20",
    "gain_r": f"R over {ALONE}",
    "gain_n": "N over it",
    "p_four": "p (R)",
    "p_ndcg_four": "p (N)",
    "p_promptmm": "p to PromptMM (R)",
    "above": f"seeds above {ALONE}",
    "tried": "tries",
    "pace": "s per epoch",
    "teachers": "s of teachers",
}
SHOWN = ("recall@20", "ndcg@20")


def methods(lab: Lab, seeds: int) -> Output:
    """The four, what they stand on, and controls that learn nothing or start like KDSR."""
    jobs = rows_of(lab)
    learn_teachers(lab, [jobs[name] for name in FOUR[1:]], seeds)
    rows = compare(lab, "methods", jobs, seeds, ALONE)
    for row in rows:
        describe(lab, row, jobs[row["model"]], seeds)
    among_four(rows)
    found = p_against(lab, {name: seeded(jobs[name], seeds) for name in FOUR}, "PromptMM")
    for row in rows:
        if row["model"] in found:
            row["p_promptmm"] = found[row["model"]]
    adjust(rows, "p_promptmm")
    served = same_size(lab, jobs)
    note = (
        f"{protocol(jobs['PromptMM'].config, seeds)}; {paired(seeds)}, which are the four "
        "methods here, and three beside PromptMM; seeds above: of the same seed; tries: "
        "the teacher's and the student's; s of teachers: all that is trained before one "
        "student; seconds as logged when it was trained, whatever ran beside, without "
        "validation, in which a teacher's w_m are found; "
        f"each of the four serves {served:,} numbers. PRM-KD's formulas and CKD's "
        "blocks are ours: no row says that a paper is wrong"
    )
    found = tail(lab, jobs, seeds)
    groups = {"model": "items seen in training"} | {name: name for name in GROUPS}
    text = f"{markdown(rows, COLUMNS)}\n\n{markdown(found, groups)}"
    title = f"Four ways to distil on {lab.dataset.name}, test split"
    extra = {"popularity": found, "tries_methods": tries_of(search(lab, "tune_methods"))}
    return Output(title, rows, text, note, extra=extra)


def rows_of(lab: Lab) -> dict[str, Job]:
    """The table's rows; of the profiles the one that is best on validation."""
    best = max(
        (f"Profile ({m})" for m in lab.dataset.features),
        key=lambda name: recall(lab, Job(name, Config()), "val"),
    )
    names = ("MostPop", best, ALONE, START, "Teacher", *FOUR)
    begun = {START: content_start(lab)}  # a row, no model: it has no settings of its own
    return {name: begun.get(name) or Job(name, settings(lab, name)) for name in names}


def content_start(lab: Lab) -> Job:
    """LightGCN under its own settings, the item table started at the features."""
    alone = {name: getattr(settings(lab, ALONE), name) for name in STUDENT}
    return Job("KDSR", replace(settings(lab, "KDSR"), **UNTAUGHT, **alone))


def learn_teachers(lab: Lab, jobs: list[Job], seeds: int) -> None:
    """Uni-modal teachers, with a line for each: they lie in labs of their own."""
    for job in jobs:
        if "alone" not in needs(job.model, job.config):
            continue
        every = seeded(job._replace(model="Teacher"), seeds)
        ids = [Job(ALONE, replace(settings(lab, ALONE), seed=n)) for n in range(seeds)]
        learn_all(lab, "methods", ids)
        for m, place in each_alone(lab).items():
            learn_all(place, f"teachers of {m} alone", every)


# ------------------------------------------------------------ a row


def describe(lab: Lab, row: dict, job: Job, seeds: int) -> None:
    """What the columns show beside the metrics."""
    name = row["model"]
    row["taught by"] = TAUGHT_BY.get(name, "")
    row["gain_r"], row["gain_n"] = (percent(row["gain"][m]) for m in SHOWN)
    row["tried"] = tried(lab, ALONE if name == START else job.model)
    if name.startswith(("MostPop", "Profile")):
        return
    logs = [log_of(lab.folder(*one)) for one in seeded(job, seeds)]
    row["pace"] = spread([log["seconds"][-1] / log["epoch"][-1] for log in logs])["mean"]
    row["teachers"] = round(teacher_seconds(lab, job), 1)


def tried(lab: Lab, model: str) -> str:
    """Tries of its search: the teacher's, which all share, and the student's."""
    counts = tries_of(search(lab)) | tries_of(search(lab, "tune_methods"))
    if model not in counts:
        return ""
    taught = model in FOUR and model != KDSR
    own = str(counts[model])
    return f"{counts.get('Teacher', 0)} + {own}" if taught else own


def teacher_seconds(lab: Lab, job: Job) -> float:
    """Of training all that one student stands on, for its seed."""
    below = [(lab, one) for one in with_teachers(lab, [job])][:-1]
    if "alone" in needs(job.model, job.config):
        below.append((lab, Job(ALONE, replace(settings(lab, ALONE), seed=job.config.seed))))
        alone = job._replace(model="Teacher")
        below += [(place, alone) for place in each_alone(lab).values()]
    folders = {place.folder(*one) for place, one in below}
    return float(sum(log_of(folder)["seconds"][-1] for folder in folders))


def among_four(rows: list[dict]) -> None:
    """Holm's adjustment over the four methods alone, and how many seeds agree."""
    by_name = {row["model"]: row for row in rows}
    four = [by_name[name] for name in FOUR]
    for key in ("p", "p_ndcg"):
        adjusted = holm([row[f"{key}_single"] for row in four])
        for row, p in zip(four, adjusted, strict=True):
            row[f"{key}_four"] = p
    base = np.array(by_name[ALONE]["recall@20"]["runs"])
    for row in rows:
        runs = np.array(row["recall@20"]["runs"])
        row["above"] = f"{int((runs > base).sum())} of {len(runs)}"
    by_name[ALONE]["above"] = ""


def same_size(lab: Lab, jobs: dict[str, Job]) -> int:
    """How many numbers a student serves: the same for all four, or they are no equals."""
    pairs = [embeddings(lab, *jobs[name]) for name in FOUR]
    sizes = {tuple(part.shape for part in pair) for pair in pairs}
    if len(sizes) > 1:
        raise ValueError(f"the four: expected one size to serve, found {sizes}")
    return sum(part.numel() for part in pairs[0])


def tail(lab: Lab, jobs: dict[str, Job], seeds: int) -> list[dict]:
    """Recall@20 by how often an item was seen: who reaches the ones never seen?"""
    groups = by_popularity(lab.dataset.train, lab.dataset.test)
    rows = []
    for name in (ALONE, *FOUR):
        pairs = [embeddings(lab, *one) for one in seeded(jobs[name], seeds)]
        rows.append({"model": name} | by_group(lab, pairs, groups))
    return rows

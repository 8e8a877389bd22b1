"""Is it content that the student learns, or would any teacher do? Controls beside Table 5.

Content that says nothing (features shuffled over items, or noise), a teacher without
content, one loss at a time, one half of a list at a time, on the teacher's best items and
on random ones, narrow students under wide teachers; and how faithful a student is.
"""

from dataclasses import replace

import numpy as np
import torch
from scipy import stats

from evaluate import best_unobserved, one_scale
from experiments.ablation import without_doubles
from experiments.lab import (
    FUSED,
    Job,
    Lab,
    compare,
    embeddings,
    seeded,
    settings,
    spread,
    weights_of,
    with_data,
)
from experiments.publish import (
    Output,
    markdown,
    paired,
    protocol,
    ranking_table,
    weights_line,
)
from promptmm import Config, Encoded, Teacher

FULL = "PromptMM"
BEGUN = "Teacher, untrained"
ALONE = {  # what is left out
    "PairKD alone": ("lambda_list", "lambda_embed"),
    "ListKD alone": ("lambda_pair", "lambda_embed"),
    "EmbKD alone": ("lambda_pair", "lambda_list"),
}
HALVES = {
    "α = 1": {"alpha": 1.0, "beta": 1.0},
    "plain KL": {"alpha": 1.0, "beta": "identity"},
}
NOTE = (
    "shuffled: rows over items, all modalities in one order; noise: normal, of each "
    "modality's mean and deviation; untrained: W^m at the principal directions, no prompt, "
    "content smoothed as the teacher does; nothing is tuned again"
)
NOTE_APART = (
    "; LightGCN from LightGCN: the teacher's ids alone teach; d: width of the student, d_T "
    "of its teacher's f^m"
)


class NoContent(Teacher):
    """LightGCN as a teacher: its ids, and nothing that a student could not learn itself.

    For `list_from="joint"` without EmbKD: the modalities are there, but rank nothing.
    """

    def knows_no_more(self) -> bool:
        return False  # it teaches all the same

    def forward(self, fixed=None) -> Encoded:
        user, item = one_scale((self.user, self.item))
        return super().forward(fixed)._replace(teacher_user=user, teacher_item=item)


def controls(lab: Lab, seeds: int) -> Output:
    """What remains of the gain over LightGCN under each control."""
    full = settings(lab)
    climb = rungs(lab, full)
    jobs = {"LightGCN": Job("LightGCN", settings(lab, "LightGCN")), **climb}
    places = {"Teacher": lab}
    elsewhere = {}
    for name, features in useless(lab).items():
        place = with_data(lab, replace(lab.dataset, features=features))
        again = {f"{model}, {name}": job for model, job in climb.items()}
        jobs |= again
        elsewhere |= dict.fromkeys(again, place)
        places[f"Teacher, {name}"] = place
    if not lab.source:  # each row costs five trainings
        jobs |= taken_apart(full, jobs)
    rows = compare(lab, "controls", jobs, seeds, "LightGCN", elsewhere)
    title = f"Controls on {lab.dataset.name}, test split"
    note = f"{protocol(full, seeds)}; {paired(seeds)}; {NOTE}"
    note += "" if lab.source else NOTE_APART
    found = fidelity(lab, full, seeds)
    teachers = seeded(climb["Teacher"], seeds)
    weights = {name: weights_of(place, teachers) for name, place in places.items()}
    lines = "\n".join(weights_line(name, own) for name, own in weights.items())
    table = ranking_table(rows, "LightGCN")
    text = f"{table}\n\n{markdown(found, FIDELITY)}\n\n{lines}"
    return Output(title, rows, text, note, extra={"fidelity": found, "weights": weights})


def rungs(lab: Lab, full: Config) -> dict[str, Job]:
    """From content as it is to the student, one thing more at each."""
    return {
        FUSED: Job(FUSED, settings(lab, FUSED)),
        BEGUN: Job("Teacher", replace(full, lr_teacher=0.0, lambda_prompt=0.0, epochs=1)),
        "Teacher": Job("Teacher", full),
        FULL: Job(FULL, full),
    }


def taken_apart(full: Config, jobs: dict[str, Job]) -> dict[str, Job]:
    """Self-distillation, one loss or one half of a list at a time, narrow students."""
    itself = replace(full, lambda_embed=0.0, list_from="joint")
    rows = {"LightGCN from LightGCN": Job(FULL, itself, NoContent)}
    rows |= {name: Job(FULL, config) for name, config in changed(full).items()}
    rows |= widths(full, jobs["LightGCN"].config)
    return {name: job for name, job in rows.items() if job not in jobs.values()}


def changed(full: Config) -> dict[str, Config]:
    """The full model with one loss left, or with other lists; none is another's double."""
    rows = {}
    for name, left_out in ALONE.items():
        rows[name] = replace(full, **dict.fromkeys(left_out, 0.0))
    for kind in ("top", "random"):
        listed = replace(full, list_items=kind)
        rows[f"{kind} lists"] = listed
        for half, change in HALVES.items():
            rows[f"{kind} lists: {half}"] = replace(listed, **change)
    kept = without_doubles({FULL: full} | rows)
    del kept[FULL]
    return kept


def widths(full: Config, alone: Config) -> dict[str, Job]:
    """Narrow students under wide teachers, after a LightGCN of the student's width."""
    rows = {}
    for d in (16, 32, 64):
        rows[f"LightGCN, d = {d}"] = Job("LightGCN", replace(alone, dim=d))
        for d_t in (64, 256):
            taught = replace(full, dim=d, dim_teacher=d_t)
            rows[f"d = {d}, d_T = {d_t}"] = Job(FULL, taught)
    return rows


def lists(lab: Lab, seeds: int) -> Output:
    """Which items a list holds, and which half of it teaches: top or random, α 0 or 1."""
    full = settings(lab)
    jobs = {"LightGCN": Job("LightGCN", settings(lab, "LightGCN")), FULL: Job(FULL, full)}
    rows = {name: row for name, row in changed(full).items() if name not in ALONE}
    jobs |= {name: Job(FULL, config) for name, config in rows.items()}
    found = compare(lab, "lists", jobs, seeds, FULL)
    note = (
        f"{protocol(full, seeds)}; {paired(seeds)}; PromptMM: {full.list_items} lists, "
        f"α = {full.alpha:g}, β = {full.beta}; plain KL: α = 1, β = 1 - b+ (Eq. 16); λ₃ is "
        "the same in every row"
    )
    title = f"Lists on {lab.dataset.name}, test split"
    return Output(title, found, ranking_table(found, FULL), note)


def useless(lab: Lab) -> dict[str, dict[str, np.ndarray]]:
    """Features that cannot help: the real ones at other items, and noise of their scale."""
    rng = np.random.default_rng(0)
    order = rng.permutation(lab.dataset.train.shape[1])
    features = lab.dataset.features
    noise = {}
    for m, x in features.items():
        noise[m] = rng.normal(x.mean(), x.std(), x.shape).astype(np.float32)
    return {"shuffled": {m: x[order] for m, x in features.items()}, "noise": noise}


# ------------------------------------------------------------ fidelity

FIDELITY = {
    "model": "beside its teacher",
    "overlap": "of the teacher's 20 best, also its own",
    "correlation": "rank correlation on the teacher's 100 best",
}


def fidelity(lab: Lab, full: Config, seeds: int) -> list[dict]:
    """How far PromptMM and LightGCN rank as the teacher does, over all users."""
    rows = []
    for model in ("LightGCN", FULL):
        job = Job(model, settings(lab, model))
        found = [
            faithful(lab, one, Job("Teacher", replace(full, seed=one.config.seed)))
            for one in seeded(job, seeds)
        ]
        rows.append(
            {"model": model} | {key: spread([f[key] for f in found]) for key in found[0]}
        )
    return rows


def faithful(lab: Lab, student: Job, teacher: Job) -> dict[str, float]:
    """Of one pair of models; the correlation is of 500 users at most, evenly spaced."""
    train = lab.dataset.train
    theirs, own = embeddings(lab, *teacher), embeddings(lab, *student)
    best, _ = best_unobserved(*theirs, train, 100)  # [U, 100]
    mine, _ = best_unobserved(*own, train, 20)  # [U, 20]
    shared = (best[:, :20, None] == mine[:, None]).any(-1).float().mean()
    users = torch.arange(0, len(best), max(1, len(best) // 500))
    logits = torch.einsum("ud,ukd->uk", own[0][users], own[1][best[users]])  # [n, 100]
    had = np.diff(train.indptr)[users.numpy()]  # [n]
    left = train.shape[1] - had  # beyond it the first again
    pairs = zip(logits.cpu().numpy(), left, strict=True)
    correlations = [falling(row[:n]) for row, n in pairs]
    return {"overlap": float(shared), "correlation": float(np.nanmean(correlations))}


def falling(row: np.ndarray) -> float:
    """The rank correlation of a row with one that falls.

    >>> round(falling(np.array([0.9, 0.2, 0.4])), 4)
    0.5
    """
    return float(stats.spearmanr(row, -np.arange(len(row))).statistic)

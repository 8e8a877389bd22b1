"""Is it content that the student learns, or would any teacher do? Controls beside Table 5.

Content that says nothing (features shuffled over items, or noise), a teacher without
content, one loss at a time, and one half of a list at a time.
"""

from dataclasses import replace

import numpy as np

from experiments.lab import Job, Lab, compare, settings
from experiments.publish import PAIRED, Output, protocol, ranking_table
from promptmm import Config

FULL = "PromptMM"
CHANGES = {  # of the full model's settings
    "PairKD alone": ("lambda_list", "lambda_embed"),
    "ListKD alone": ("lambda_pair", "lambda_embed"),
    "EmbKD alone": ("lambda_pair", "lambda_list"),
}


def controls(lab: Lab, seeds: int) -> Output:
    """What remains of the gain over LightGCN under each control."""
    full = settings(lab)
    jobs = {"LightGCN": Job("LightGCN", settings(lab, "LightGCN")), FULL: Job(FULL, full)}
    jobs |= {name: Job(FULL, config) for name, config in changed(full).items()}
    elsewhere = {}
    for name, features in useless(lab).items():
        elsewhere[name] = replace(lab, dataset=replace(lab.dataset, features=features))
        jobs[name] = Job(FULL, full)
    rows = compare(lab, "controls", jobs, seeds, "LightGCN", elsewhere)
    note = (
        "without content: c = 0 and PairKD alone, LightGCN teaches LightGCN; b alone: "
        "β = 0; q alone: α = 0; shuffled: rows over items, all modalities in one order; "
        "noise: normal, of each modality's mean and deviation; nothing is tuned again"
    )
    title = f"Controls on {lab.dataset.name}, test split"
    text = ranking_table(rows, "LightGCN")
    return Output(title, rows, text, f"{protocol(full, seeds)}; {PAIRED}; {note}")


def changed(full: Config) -> dict[str, Config]:
    """The full model with one thing left."""
    rows = {}
    for name, left_out in CHANGES.items():
        rows[name] = replace(full, **dict.fromkeys(left_out, 0.0))
    rows["teacher without content"] = replace(rows["PairKD alone"], fusion=0.0)
    rows["lists: b alone"] = replace(full, beta=0.0)
    rows["lists: q alone"] = replace(full, alpha=0.0)
    rows["lists: plain KL"] = replace(full, alpha=1.0, beta="identity")
    return rows


def useless(lab: Lab, seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """Features that cannot help: the real ones at other items, and noise of their scale."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(lab.dataset.train.shape[1])
    features = lab.dataset.features
    noise = {}
    for m, x in features.items():
        noise[m] = rng.normal(x.mean(), x.std(), x.shape).astype(np.float32)
    return {
        "features shuffled": {m: x[order] for m, x in features.items()},
        "features of noise": noise,
    }

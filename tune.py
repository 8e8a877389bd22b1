"""The search behind every preset: small, logged, on validation, equal for all models.

    python experiments.py tune [--data DIR] [--tries N]

results/<dataset>/tune.md lists every try; `runner.settings` reads the best from its .json.
"""

import numpy as np

import data
from promptmm import Config
from runner import Lab, Output, judge, learn_all, markdown

GRID = {"lr_student": (1e-3, 2e-3, 5e-3, 1e-2, 2e-2), "l2": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
        "batch": (2048, 4096, 8192)}
SPACE = {
    "MF-BPR": GRID,
    "LightGCN": GRID | {"student_layers": (1, 2, 3, 4)},
    "Teacher": {
        "lr_teacher": (2e-3, 5e-3, 1e-2, 2e-2), "teacher_layers": (1, 2, 3, 4),
        "fusion": (0.05, 0.1, 0.2, 0.5, 1.0, 2.0), "weight_modal": (0.01, 0.1, 1.0),
        "lambda_prompt": (0.01, 0.1, 1.0), "dropout": (0.0, 0.2, 0.5),
        "tokens": ("mean", "concat")},
    "PromptMM": {
        "lr_student": (2e-3, 5e-3, 1e-2, 2e-2), "batch_student": GRID["batch"],
        "l2_student": GRID["l2"], "student_layers": (1, 2, 3, 4),
        "lambda_pair": (0.03, 0.1, 0.3, 1.0, 3.0),
        "lambda_list": (0.01, 0.03, 0.1, 0.3), "lambda_embed": (0.03, 0.1, 0.3, 1.0),
        "beta": (1.0, 8.0), "temperature": (1.0, 2.0), "gamma": (1.0, 2.0, 3.0),
        "negatives": (5, 10, 50), "tune_prompt": (True, False)},
}
PACE = {"eval_every": 4, "patience": 10}  # as long a wait, half the evaluations
SMALL = {"dim": 32, "patience": 10}
START = {  # of each first try, what earlier single runs had shown; the space's own rest is random
    "synthetic": dict.fromkeys(SPACE, SMALL) | {
        "Teacher": SMALL | {"lr_teacher": 0.02, "batch": 2048},
        "PromptMM": SMALL | {"lr_student": 0.02, "batch_student": 2048}},
    "citeulike": dict.fromkeys(SPACE, PACE) | {
        "Teacher": PACE | {"batch": 8192, "lr_teacher": 0.01},
        "PromptMM": PACE | {"tune_prompt": False}},
    "tiktok": {"Teacher": {"fusion": 0.1}, "PromptMM": {"tune_prompt": False}}}


def tune(lab: Lab, tries: int) -> Output:
    """Random local search on validation with one seed; every model gets the same number of tries.

    PromptMM's are shared by its teacher and its student, half each. A try redraws each setting of
    the best so far with probability 1/3. Teacher and student begin as the best LightGCN found, but
    for what START says; the student is searched under the best teacher found.
    """
    rows, best, rng = [], {}, np.random.default_rng(0)
    budget = dict.fromkeys(SPACE, tries)
    budget |= {"Teacher": tries // 2, "PromptMM": tries - tries // 2}
    for model, space in SPACE.items():
        like = vars(Config(**best.get("LightGCN", {})))
        first = {"MF-BPR": {"student_layers": 0}, "LightGCN": {}, "Teacher": {
            "batch": like["batch"], "l2": like["l2"], "lr_teacher": like["lr_student"],
            "teacher_layers": like["student_layers"]}, "PromptMM": best.get("Teacher", {}) | {
            "batch_student": like["batch"], "l2_student": like["l2"],
            "lr_student": like["lr_student"], "student_layers": like["student_layers"]}}[model]
        best[model] = first | START.get(lab.dataset.name, {}).get(model, {})
        seen, highest = [], -1.0
        while len(seen) < budget[model]:
            drawn = {name: values[rng.integers(len(values))] for name, values in space.items()
                     if rng.random() < 1 / 3}
            drawn = drawn if seen else {}
            chosen = best[model] | drawn
            config = Config(**chosen | ({"epochs": 2, "eval_every": 1} if lab.quick else {}))
            if config in seen:
                continue
            seen.append(config)
            learn_all(lab, f"tune {len(seen)} of {budget[model]} {drawn},", [(model, config)])
            recall = float(judge(lab, model, config, "val")["recall@20"].mean())
            rows.append({"model": model, "validation": recall, "settings": chosen})
            if recall > highest:
                highest, best[model] = recall, chosen
    for row in rows:
        row["shown"] = ", ".join(f"{name} {value}" for name, value in row["settings"].items())
        row["chosen"] = "chosen" if row["settings"] == best[row["model"]] else ""
    text = markdown(rows, {"model": "model", "validation": "validation Recall@20",
                           "shown": "settings", "chosen": ""})
    return Output(f"Search on {lab.dataset.name}, validation split, seed 0", rows, text,
                  "random search; the test split is not read; settings not named are the defaults",
                  extra={"best": best, "tried": tries,
                         "fingerprint": data.fingerprint(lab.dataset)})

"""Does the prompt pay? Four questions, each answered from the numbers (Section 3.1).

    stage 1      W^m, the prompt, or both: what does the teacher gain?
    stage 2      beside the student: tune nothing, the prompt, biases, an adapter, W^m?
    later data   a frozen teacher meets new interactions: which numbers to tune?
    planted      modalities that carry each other's information

With one modality p^m is a change of W^m and b^m, so nothing is to be expected there (a
property test holds the identity); with several, tokens averaged over modalities add a term
that is linear in the other modalities.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from data import Dataset
from evaluate import paired_test
from experiments.incremental import split
from experiments.lab import (
    Job,
    Lab,
    Values,
    figures,
    ids_settings,
    judge,
    learn_all,
    load_teacher,
    log_of,
    recall,
    seeded,
    settings,
    spread,
    with_data,
)
from experiments.publish import Output, markdown, protocol
from promptmm import (
    Config,
    Distillation,
    Encoded,
    Fixed,
    Run,
    Student,
    Teacher,
    fit,
    teacher_terms,
    unit_logits,
)

SHARES = (0.05, 0.2, 1.0)  # λ₁
COLUMNS = {
    "model": "",
    "validation": "validation Recall@20",
    "test": "test Recall@20",
    "p": "p (test)",
    "share": "prompt's share of f^m",
}
BESIDE = {
    "model": "tuned beside the student",
    "numbers": "numbers tuned",
    "validation": "student, validation",
    "teacher": "its teacher, validation",
    "test": "student, test Recall@20",
    "p": "p (test)",
}
LATER = {
    "model": "on the whole graph",
    "numbers": "numbers tuned",
    "test": "test Recall@20",
    "p": "p",
    "seconds": "s of training",
}


class PromptOnly(Teacher):
    """W^m and b^m stay at the principal directions: θ_P alone learns."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.reduction.requires_grad_(False)


def prompt(lab: Lab, seeds: int) -> Output:
    """The questions, their tables, and their answers."""
    parts = [
        asked("Stage 1: is the prompt worth more than W^m alone?", *stage_1(lab, seeds)),
        asked("Stage 2: is it worth tuning?", *stage_2(lab, seeds), BESIDE),
        asked("Does a frozen teacher adapt to later data?", *later(lab, seeds), LATER),
    ]
    if not lab.source:
        question = "Where modalities carry each other's information, does it pay?"
        parts.append(asked(question, *planted(lab, seeds)))
    text = "\n\n".join(part[0] for part in parts)
    rows = [row for part in parts for row in part[1]]
    title = f"The prompt under a microscope on {lab.dataset.name}"
    note = (
        f"{protocol(settings(lab), seeds)}; λ₁ is the prompt's share of x^m; p: users and "
        f"{'' if seeds > 1 else 'no '}seeds drawn, against the first row of each table, "
        'not adjusted; s of training: as logged, "all anew" when it was trained, perhaps '
        "beside others"
    )
    return Output(title, rows, text, note)


def asked(
    question: str, rows: list[dict], answer: str, columns: dict | None = None
) -> tuple[str, list[dict]]:
    """A question, its table and its answer as text; and the rows."""
    table = markdown(rows, columns or COLUMNS)
    return f"**{question}**\n\n{table}\n\n{answer}", rows


def answer(rows: list[dict]) -> str:
    """Yes for a row that is better than the first with p < .05, no if there is none.

    >>> answer([{"model": "a", "test": {"mean": 0.1}},
    ...         {"model": "b", "test": {"mean": 0.2}, "p": 0.01}])
    'Yes: b (p = 0.01).'
    """
    base, *others = rows
    better = [row for row in others if row["test"]["mean"] > base["test"]["mean"]]
    found = [f"{row['model']} (p = {row['p']:.2g})" for row in better if row["p"] < 0.05]
    if found:
        return f"Yes: {', '.join(found)}."
    if not better:
        return "No: none is better than the first row."
    least = min(row["p"] for row in better)
    return f"No: none is better than the first row with p < .05 (least p = {least:.2g})."


# ------------------------------------------------------------ stage 1


def stage_1(lab: Lab, seeds: int) -> tuple[list[dict], str]:
    """W alone, the prompt alone, both; at three shares."""
    full = settings(lab, "Teacher")
    jobs = {"W alone": Job("Teacher", replace(full, lambda_prompt=0.0))}
    for share in SHARES:
        config = replace(full, lambda_prompt=share)
        jobs[f"W and prompt, λ₁ = {share:g}"] = Job("Teacher", config)
        jobs[f"prompt alone, λ₁ = {share:g}"] = Job("Teacher", config, PromptOnly)
    rows = compared(lab, "stage 1", jobs, seeds)
    return rows, answer([row for row in rows if "alone, λ" not in row["model"]])


def compared(lab: Lab, title: str, jobs: dict[str, Job], seeds: int) -> list[dict]:
    """Teachers on both splits, each tested against the first."""
    every = [one for job in jobs.values() for one in seeded(job, seeds)]
    learn_all(lab, f"prompt, {title}", every)
    rows, values = [], []
    for name, job in jobs.items():
        runs = seeded(job, seeds)
        validation = [recall(lab, one, "val") for one in runs]
        values.append(np.stack([judge(lab, *one)["recall@20"] for one in runs]))
        logs = [log_of(lab.folder(*one)) for one in runs]
        shares = [log["prompt_share"][log["recall@20"].argmax()] for log in logs]
        row = {"model": name, "validation": spread(validation)}
        row |= {"test": spread(values[-1].mean(1)), "share": float(np.mean(shares))}
        rows.append(row)
    return tested(rows, values)


def tested(rows: list[dict], values: list[np.ndarray]) -> list[dict]:
    """p of each row against the first, which has none; values: [seeds, users] of each."""
    for row, found in zip(rows[1:], values[1:], strict=True):
        row["p"] = paired_test(found, values[0])["p_bootstrap"]
    return rows


# ------------------------------------------------------------ stage 2


class Adapted(Teacher):
    """An adapter of rank 1 beside each frozen W^m: W^m + a b, which starts at zero."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        shapes = [layer.weight.shape for layer in self.reduction]  # d_T, d_m
        self.a = nn.ParameterList(torch.randn(d_m, 1) / d_m**0.5 for _, d_m in shapes)
        self.b = nn.ParameterList(torch.zeros(1, d_t) for d_t, _ in shapes)
        self.to(self.user.device)

    def fixed(self) -> dict[str, Fixed]:
        layers = super().fixed()
        if hasattr(self, "b"):  # not while Teacher itself is being made
            for (m, layer), a, b in zip(layers.items(), self.a, self.b, strict=True):
                xw = layer.xw + self.features[m] @ a @ b  # [I, d_T]
                layers[m] = Fixed(xw, layer.weight + a @ b, layer.bias)
        return layers


def nothing(teacher: Teacher) -> list[nn.Parameter]:
    return []


def the_prompt(teacher: Teacher) -> list[nn.Parameter]:
    return list(teacher.prompt.parameters())


def biases(teacher: Teacher) -> list[nn.Parameter]:
    return [layer.bias for layer in teacher.reduction]


def adapters(teacher: Teacher) -> list[nn.Parameter]:
    return [*teacher.a, *teacher.b]


def reductions(teacher: Teacher) -> list[nn.Parameter]:
    return list(teacher.reduction.parameters())


WAYS: dict[str, Callable[[Teacher], list[nn.Parameter]]] = {
    "nothing": nothing,
    "the prompt": the_prompt,
    "b^m": biases,
    "an adapter of rank 1": adapters,
    "W^m and b^m": reductions,
}


def stage_2(lab: Lab, seeds: int) -> tuple[list[dict], str]:
    """A student, and beside it some numbers of its teacher, all else of θ_T frozen."""
    full = settings(lab)
    learn_all(lab, "prompt, stage 2", seeded(Job("Teacher", full), seeds))
    rows, values = [], []
    for way, chosen in WAYS.items():
        runs = [beside(lab, replace(full, seed=seed), chosen) for seed in range(seeds)]
        values.append(np.stack([run["values"] for run in runs]))  # [seeds, users]
        row = {"model": way, "numbers": runs[0]["numbers"]}
        for key in ("validation", "teacher"):
            row[key] = spread([run[key] for run in runs])
        row["test"] = spread(values[-1].mean(1))
        rows.append(row)
        print(f"{lab.dataset.name} prompt, stage 2: {way}, {row['test']['mean']:.4f}")
    return tested(rows, values), answer(rows)


def beside(lab: Lab, config: Config, chosen: Callable) -> dict:
    """One student: its validation and test recall, its teacher's, how much was tuned."""
    dataset = lab.dataset
    teacher = moved(lab, config, load_teacher(lab, config), Adapted)
    parameters = chosen(teacher)
    torch.manual_seed(config.seed)
    student = Student(dataset.train, config, lab.device)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), dataset, config, lab.device, {})
        encode = unit_logits(teacher)
        if not parameters:
            encode = partial(Encoded, *encode())  # the same at each step
        if teacher.knows_no_more():  # no modality weighs anything: LightGCN
            encode, parameters = None, []
        for weight in parameters:
            weight.requires_grad_(True)
        taught = Distillation(run, encode)
        own = {"student": student, "project": taught.project}
        learner = nn.ModuleDict(own | {"tuned": nn.ParameterList(parameters)})
        groups = [
            {"params": nn.ModuleDict(own).parameters(), "lr": config.lr_student},
            {"params": parameters, "lr": config.lr_prompt},
        ]
        terms = partial(taught.terms, student)
        fit(run, "student", learner, groups, taught.width, terms, student, taught.refresh)
    with torch.no_grad():
        pair, theirs = student(), teacher.eval()()[:2]
    found = {"values": figures(dataset, pair, per_user=True)["per_user"]["recall@20"]}
    found["numbers"] = sum(weight.numel() for weight in parameters)
    for key, ranked in (("validation", pair), ("teacher", theirs)):
        found[key] = figures(dataset, ranked, "val")["recall@20"]
    return found


# ------------------------------------------------------------ later data

TUNED = {"the prompt": the_prompt, "W^m and b^m": reductions}


def later(lab: Lab, seeds: int) -> tuple[list[dict], str]:
    """A fifth of the interactions arrives later; ids and weights stay the old teacher's."""
    config = settings(lab, "Teacher")
    found = [adapted(lab, replace(config, seed=seed)) for seed in range(seeds)]
    rows, values = [], []
    for way, first in found[0].items():
        values.append(recalls(found, way))
        row = {"model": way, "numbers": first["numbers"]}
        row["test"] = spread(values[-1].mean(1))
        row["seconds"] = spread([one[way]["seconds"] for one in found])["mean"]
        rows.append(row)
    tested(rows, values)
    return rows, answer([row for row in rows if row["model"] != "all anew, ids too"])


def recalls(found: list[dict], way: str) -> np.ndarray:
    """Of each seed and user: [seeds, users]."""
    return np.stack([one[way]["values"]["recall@20"] for one in found])


def adapted(lab: Lab, config: Config) -> dict[str, dict]:
    """One seed: users' metrics, seconds and numbers tuned, of each way to take in data."""
    old, _ = split(lab.dataset.train, config.seed)
    before = with_data(lab, replace(lab.dataset, train=old))
    learn_all(before, "prompt, later data", [Job("Teacher", config)])
    teacher = load_teacher(before, config)
    result = {"nothing": outcome(lab, moved(lab, config, teacher), 0, 0.0)}
    for name, chosen in TUNED.items():
        mover = moved(lab, config, teacher)
        parameters = chosen(mover)
        seconds = tune(lab, config, mover, parameters)
        numbers = sum(weight.numel() for weight in parameters)
        result[name] = outcome(lab, mover, numbers, seconds)
    learn_all(lab, "prompt, anew", [Job("Teacher", config)])
    anew = load_teacher(lab, config)
    learnt = [anew.user, anew.item, *anew.parameters()]
    numbers = sum(weight.numel() for weight in learnt)
    ids = Job("LightGCN", ids_settings(lab, config))
    logs = [log_of(lab.folder(*job)) for job in (ids, Job("Teacher", config))]
    seconds = float(sum(log["seconds"][-1] for log in logs))
    result["all anew, ids too"] = outcome(lab, anew, numbers, seconds)
    return result


def moved(
    lab: Lab, config: Config, teacher: Teacher, kind: type[Teacher] = Teacher
) -> Teacher:
    """The same teacher over the lab's whole graph, frozen; `kind` may add parameters."""
    ids = teacher.user.clone(), teacher.item.clone()
    whole = kind(lab.dataset, config, lab.device, ids)
    whole.load_state_dict(teacher.state_dict(), strict=kind is Teacher)
    return whole.eval().requires_grad_(False)


def tune(
    lab: Lab, config: Config, teacher: Teacher, parameters: list[nn.Parameter]
) -> float:
    """Train these alone, with stage 1's objective and W^m's step; the seconds it took."""
    for weight in parameters:
        weight.requires_grad_(True)
    groups = [{"params": parameters, "lr": config.lr_teacher}]
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder), lab.dataset, config, lab.device, {})
        terms = partial(teacher_terms, teacher)
        fit(run, "teacher", teacher, groups, 2, terms, lambda: teacher()[:2])
    teacher.eval().requires_grad_(False)
    return float(run.state["seconds"])


def outcome(lab: Lab, teacher: Teacher, numbers: int, seconds: float) -> dict:
    with torch.no_grad():
        pair = teacher()[:2]
    values: Values = figures(lab.dataset, pair, per_user=True)["per_user"]
    return {"values": values, "numbers": numbers, "seconds": seconds}


# ------------------------------------------------------------ planted


def planted(lab: Lab, seeds: int) -> tuple[list[dict], str]:
    """Teachers on `entangled` data, without a prompt and with either kind of tokens."""
    place = with_data(lab, entangled(lab.dataset))
    full = settings(lab, "Teacher")
    jobs = {"no prompt": Job("Teacher", replace(full, lambda_prompt=0.0))}
    for tokens in ("mean", "concat"):
        config = replace(full, lambda_prompt=0.2, tokens=tokens)
        jobs[f"λ₁ = .2, tokens {tokens}"] = Job("Teacher", config)
    rows = compared(place, "planted", jobs, seeds)
    return rows, answer(rows)


def entangled(dataset: Dataset) -> Dataset:
    """Two modalities that need each other: one is content with noise, the other that noise.

    Of the last two modalities x, y: one holds x + n and y + n', the other the noises n, n'
    alone, so that x is known only from both together.
    """
    first, second = list(dataset.features)[-2:]
    rng = np.random.default_rng(0)
    x, y = (dataset.features[m] for m in (first, second))
    both = np.hstack([x / x.std(), y / y.std()]).astype(np.float32)  # [I, d_x + d_y]
    noise = rng.standard_normal((len(both), 24)) @ rng.standard_normal((24, both.shape[1]))
    noise = (2 * noise / noise.std()).astype(np.float32)
    return replace(dataset, features={first: both + noise, second: noise})

"""Section 4.3: each part taken out (Table 5); what the prompt does to features (Figure 3).

`options` tries what the equations leave open, and where this project departs from the
released code, one change at a time.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

import data
from data import need
from experiments.lab import (
    Job,
    Lab,
    compare,
    learn_all,
    load_teacher,
    recall,
    settings,
    some,
)
from experiments.publish import Output, markdown, paired, protocol, ranking_table
from promptmm import Config

# ------------------------------------------------------------ Table 5

LEFT_OUT = {  # of the full model
    "PromptMM": {},
    "w/o Prompt": {"lambda_prompt": 0.0},
    "prompt frozen": {"tune_prompt": False},
    "prompt tuned": {"tune_prompt": True},
    "w/o PairKD": {"lambda_pair": 0.0},
    "w/o ListKD": {"lambda_list": 0.0},
    "w/o EmbKD": {"lambda_embed": 0.0},
    "w/o disentangle": {"beta": "identity", "alpha": 1.0},  # plain KL, Eq. 16
    "α = 1": {"alpha": 1.0},
    "lists of random items": {"list_items": "random"},
    "lists of random items, α = 1": {"list_items": "random", "alpha": 1.0},
    "lists from each modality": {"list_from": "modal"},
}


def table5(lab: Lab, seeds: int) -> Output:
    """Each part taken out of the full model; but for one λ₃, nothing is tuned again."""
    full = settings(lab)
    rows = compare(lab, "Table 5", variants(lab, full), seeds, "PromptMM")
    note = (
        "w/o Prompt: λ₁ = 0 in both stages; w/o disentangle: α = 1, β = 1 - b+ (Eq. 16), "
        "at the full model's λ₃ and, where that is another, at its own, chosen on "
        "validation with seed 0; the full model's prompt is "
        f"{'tuned' if full.tune_prompt else 'frozen'} in stage 2"
    )
    title = f"Table 5. Ablation on {lab.dataset.name}, test split"
    text = ranking_table(rows, "PromptMM")
    return Output(title, rows, text, f"{protocol(full, seeds)}; {paired(seeds)}; {note}")


def variants(lab: Lab, full: Config) -> dict[str, Job]:
    """Table 5's rows: what each leaves out of the full model; none is another's double."""
    rows = {name: replace(full, **change) for name, change in LEFT_OUT.items()}
    own = own_weight(lab, rows["w/o disentangle"])
    rows[f"w/o disentangle, λ₃ = {own.lambda_list:g}"] = own
    return {name: Job("PromptMM", config) for name, config in without_doubles(rows).items()}


def own_weight(lab: Lab, plain: Config) -> Config:
    """Plain KL with a λ₃ of its own, by validation: it is of another scale than Eq. 10."""
    factors = (1.0,) if lab.quick else (1.0, 3.0, 10.0)
    own = [replace(plain, lambda_list=plain.lambda_list * factor) for factor in factors]
    learn_all(lab, "Table 5, λ₃", [Job("PromptMM", one) for one in own])

    return max(own, key=lambda one: recall(lab, Job("PromptMM", one), "val"))


def without_doubles(rows: dict) -> dict:
    """
    >>> without_doubles({"full": 1, "frozen": 1, "tuned": 2})
    {'full': 1, 'tuned': 2}
    """
    kept = {}
    for name, row in rows.items():
        if row not in kept.values():
            kept[name] = row
    return kept


# ------------------------------------------------------------ options


OPTIONS = {  # one change each
    "PromptMM": {},
    "tokens side by side (P10)": {"tokens": "concat"},
    "τ = 2": {"temperature": 2.0},
    "β = 8": {"beta": 8.0},
    "K - 1 = 50": {"negatives": 50},
    "N = 20": {"list_pool": 20},
    "N = 400": {"list_pool": 400},
    "γ = 1": {"gamma": 1.0},
    "γ = 3": {"gamma": 3.0},
    "dropout 0": {"dropout": 0.0},
    "d_T = 32": {"dim_teacher": 32},
    "d_T = 512": {"dim_teacher": 512},
    "student of 1 layer": {"student_layers": 1},
    "student of 2 layers": {"student_layers": 2},
    "student of 3 layers": {"student_layers": 3},
    "warm start (C24)": {"warm_start": True},
    "prompt tuned, no anchor (P11)": {"tune_prompt": True, "weight_anchor": 0.0},
}


def options(lab: Lab, seeds: int) -> Output:
    """Open choices and departures, one at a time; none that the full model has anyway."""
    full = settings(lab)
    jobs = {
        name: Job("PromptMM", replace(full, **OPTIONS[name]))
        for name in some(lab, [*OPTIONS], 3)
    }
    rows = compare(lab, "options", without_doubles(jobs), seeds, "PromptMM")
    title = f"Options on {lab.dataset.name}, one change each, test split"
    return Output(
        title,
        rows,
        ranking_table(rows, "PromptMM"),
        f"{protocol(full, seeds)}; {paired(seeds)}",
    )


# ------------------------------------------------------------ Figure 3


def figure3(lab: Lab) -> Output:
    """t-SNE of x^m and of f^m with and without prompt; and how far modalities mix."""
    full, modalities = settings(lab), ", ".join(lab.dataset.features)
    n_items = lab.dataset.train.shape[1]
    need(
        len(lab.dataset.features) > 1 and n_items > 10,
        f"figure3: expected two modalities and more than 10 items, found {n_items} and "
        f"{modalities}",
    )
    empty = [m for m, x in lab.dataset.features.items() if not x.any()]
    need(not empty, f"figure3: expected content in each modality, found none in {empty}")
    chosen = np.random.default_rng(0).permutation(n_items)[: 100 if lab.quick else 400]
    panels = {
        "x, raw": raw_points(lab, full, chosen),
        "f with prompt": reduced_points(lab, full, chosen),
        "f w/o prompt": reduced_points(lab, replace(full, lambda_prompt=0.0), chosen),
    }
    rows = [{"panel": name, "mixing": mixing(points)} for name, points in panels.items()]
    text = markdown(rows, {"panel": "", "mixing": "neighbours of another modality"})
    note = (
        f"{len(chosen)} random items; mixing: share of the 10 nearest neighbours, in all "
        "dimensions and not in the plot, that belong to another modality, over "
        "what chance gives (1: one cloud; 0: apart). x is whitened to a common width by "
        "PCA, each modality by a basis of its own, so there it is that of unrelated clouds "
        "(P10)"
    )
    title = f"Figure 3. t-SNE of the modalities on {lab.dataset.name}"
    return Output(title, rows, text, note, partial(plot_tsne, panels))


def raw_points(lab: Lab, config: Config, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """x^m of some items, to the width d by PCA, so that all modalities have one width."""
    points = {}
    for m, array in lab.dataset.features.items():
        x = data.unit_rows(torch.from_numpy(array).to(lab.device, torch.float32))[chosen]
        axes = data.principal(x, config.dim)
        points[m] = data.tokens(x, *axes, config.dim).cpu().numpy()
    return points


def reduced_points(lab: Lab, config: Config, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """f^m of some items, as the teacher of these settings has learnt it."""
    learn_all(lab, "Figure 3", [Job("Teacher", config)])
    with torch.no_grad():
        reduced = load_teacher(lab, config).reduced()
    width = max(f.shape[1] for f in reduced.values())
    return {  # zeros beside the narrower ones move no point nearer to another
        m: F.pad(f[chosen], (0, width - f.shape[1])).cpu().numpy()
        for m, f in reduced.items()
    }


def mixing(points: dict[str, np.ndarray]) -> float:
    """Share of the 10 nearest that are of another modality, over what chance gives."""
    x = np.concatenate(list(points.values()))  # [n, d]
    kind = np.repeat(np.arange(len(points)), [len(part) for part in points.values()])  # [n]
    distance = np.square(x).sum(1)[None] - 2 * x @ x.T  # up to each row's own ‖x‖²
    np.fill_diagonal(distance, np.inf)
    nearest = np.argpartition(distance, 10, axis=1)[:, :10]
    other = (kind[nearest] != kind[:, None]).mean()
    return float(other / (1 - 1 / len(points)))


def plot_tsne(panels: dict[str, dict[str, np.ndarray]], figure) -> None:
    from sklearn.manifold import TSNE

    axes = figure.subplots(1, len(panels))
    for axis, (name, points) in zip(axes, panels.items(), strict=True):
        every = np.concatenate(list(points.values()))
        near = min(30, (len(every) - 1) / 3)  # t-SNE's default, where there are enough
        flat = TSNE(init="pca", random_state=0, perplexity=near).fit_transform(every)
        for (m, part), marker in zip(points.items(), "os^vD" * len(points), strict=False):
            axis.scatter(*flat[: len(part)].T, s=8, alpha=0.6, marker=marker, label=m, lw=0)
            flat = flat[len(part) :]
        axis.set(title=f"{name}: mixing {mixing(points):.2f}", xticks=[], yticks=[])
        axis.set(xlabel="t-SNE 1", ylabel="t-SNE 2")
    axis.legend(title="modality", fontsize=8)

"""Section 4.2: the data (Table 3), the models (Table 4), and who gains by content.

`first_run` is the main job, `python promptmm.py`, as a reader runs it.
"""

from functools import partial

import numpy as np
import torch
from scipy import sparse

import data
from baselines import MODELS
from data import need
from evaluate import evaluate, ladder
from experiments.lab import (
    CODE,
    DISTILLED,
    FUSED,
    TESTED,
    Job,
    Lab,
    adjust,
    child,
    compare,
    embeddings,
    is_untrained,
    known,
    learn_all,
    names,
    p_against,
    recall,
    search,
    seeded,
    settings,
    source,
    spread,
    tries,
    weights_of,
)
from experiments.publish import (
    Output,
    fence,
    markdown,
    on_file,
    paired,
    plural,
    protocol,
    ranking_table,
    weights_line,
)

REFERENCE = "LightGCN"  # what every other model is tested against
PLAIN = ("MF-BPR", "LightGCN")  # comparison models that are in every Table 4
CONTENT_FREE = (*PLAIN, "NGCF")  # comparison models that read no feature
NO_CONTENDERS = ("NGCF", "VBPR", "MMGCN", "GRCN", "CLCRec")
FEW = 3  # seeds of these
SAME = 5e-4  # of Recall@20, at least: other machines add up in another order
LADDER = ("MostPop", "LightGCN", FUSED, "Teacher", "PromptMM")
HOW = (  # Table 4 was made
    "p to PromptMM: the same, of Recall@20; tries: settings tried on validation by the "
    "same search (tune.md; PromptMM begins as the best LightGCN, and its teacher's tries "
    "are its own too), none: not searched itself; distilled: PromptMM's student and lists "
    "under the comparison model with content that is best on validation; none of the "
    "paper's own figures are about these data, so none stand beside"
)
ANEW = "without --models all rows are trained anew"
GROUPS = {  # by training interactions of an item: from, to below
    "never": (0, 1),
    "1-3": (1, 4),
    "4-10": (4, 11),
    "11-50": (11, 51),
    "> 50": (51, np.inf),
}


def first_run(lab: Lab) -> Output:
    """The main job as a reader runs it: its ladder and its time."""
    folder = lab.cache / "first_run"
    command = [str(CODE / "promptmm.py"), "--out", str(folder), "--force"]
    command += ["--device", str(lab.device)]
    command += ["--data", lab.source] if lab.source else []
    command += ["--quick"] if lab.quick else []
    child(command)
    metrics = data.read_json(folder / "metrics.json", "test", "seconds", sealed=True)
    seconds = sum(metrics["seconds"].values())
    text = (
        f"{seconds:.1f} s of training, validation aside ({metrics['device']}, "
        f"{plural(torch.get_num_threads(), 'thread')}); it prints:\n\n"
        f"{fence(ladder(metrics))}"
    )
    return Output(f"The main job on {lab.dataset.name}", [metrics], text)


def table3(lab: Lab) -> Output:
    """Statistics of the data."""
    found = data.describe(lab.dataset).items()
    rows = [{"statistic": name, "value": value} for name, value in found]
    text = markdown(rows, {"statistic": "statistic", "value": lab.dataset.name})
    return Output(f"Table 3. Statistics of {lab.dataset.name}", rows, text)


def table4(lab: Lab, seeds: int, models: str = "") -> Output:
    """Comparison under one protocol: the paper's models, two of later years, the ladder.

    models: of the comparison models these alone, comma-separated; rows of others stay as
    they were published, with p by Holm over all rows.
    """
    before = on_file(lab, "table4", ANEW).get("rows", []) if models else []
    jobs = compared(lab, models)
    counts = {model: seeds_of(model, seeds) for model in jobs}
    every = {model: seeded(job, counts[model]) for model, job in jobs.items()}
    if before:
        need_as_published(lab, before, every)
    rows = compare(lab, "Table 4", jobs, counts, REFERENCE)
    ours = p_against(lab, every, "PromptMM")
    tried = tries(search(lab))
    for row in rows:
        model = row["model"]
        row["tried"] = tried.get(model, "")
        row["seeds"] = "" if is_untrained(model) else counts[model]
        if model in ours:
            row["p_promptmm"] = ours[model]
    kept = kept_rows(lab, rows, before)
    rows = in_order(lab, rows + kept)
    adjust(rows, *TESTED, "p_promptmm")
    note = f"{protocol(jobs['PromptMM'].config, seeds)}, fewer where the row says so"
    note += f"; {paired(seeds)}; {HOW}"
    if kept:
        note += f"; trained before this: {', '.join(row['model'] for row in kept)}"
    weights = weights_of(lab, every["Teacher"])
    more = {"p_promptmm": "p to PromptMM (R)", "seeds": "seeds", "tried": "tries"}
    table = ranking_table(rows, REFERENCE, more)
    text = f"{table}\n\n{weights_line('Teacher', weights)}"
    title = f"Table 4. Comparison on {lab.dataset.name}, test split"
    extra = {"weights": weights, "fingerprint": lab.fingerprint}
    return Output(title, rows, text, note, extra=extra)


def compared(lab: Lab, models: str) -> dict[str, Job]:
    """The rows: the ladder, two models without content, and those that are named.

    None named: those that the data's search has seen, and all where there was none. Last,
    where there was a search: PromptMM's student under the best comparison model.
    """
    named = known(models, MODELS) if models else search(lab).get("best", MODELS)
    chosen = {*PLAIN, *named}
    shown = [name for name in names(lab) if name in chosen or name not in MODELS]
    best = rivals(search(lab))[:1]
    shown += [f"{rival}{DISTILLED}" for rival in best if rival in chosen]
    return {model: Job(model, settings(lab, model)) for model in shown}


def need_as_published(lab: Lab, before: list[dict], every: dict[str, list[Job]]) -> None:
    """DataError if LightGCN or PromptMM, which p are about, are others than on file.

    They have as many seeds there, and a mean Recall@20 within its standard error. Trained
    before all others, of which a refusal at the end would cost hours.
    """
    old = {row["model"]: row["recall@20"] for row in before}
    for name in (REFERENCE, "PromptMM"):
        learn_all(lab, "Table 4, as published?", every[name])
        was, now = old[name], spread([recall(lab, job) for job in every[name]])
        as_many = len(was["runs"]) == len(now["runs"])
        error = was["std"] / len(was["runs"]) ** 0.5
        as_high = abs(was["mean"] - now["mean"]) < max(SAME, error)
        there, here = (
            f"{one['mean']:.4f} of {len(one['runs'])} seeds" for one in (was, now)
        )
        file = lab.out / lab.dataset.name / "table4.json"
        expected = f"{file}: expected {name} as there, {there}, found {here}"
        need(as_many and as_high, f"{expected}; {ANEW}")


def kept_rows(lab: Lab, rows: list[dict], before: list[dict]) -> list[dict]:
    """Rows of `before`, the Table 4 on file, whose models `rows` lack.

    Of the students of comparison models only the best one's.
    """
    fresh = {row["model"] for row in rows}
    best = [f"{rival}{DISTILLED}" for rival in rivals(search(lab))[:1]]
    old = [row for row in before if row["model"] not in fresh]
    return [row for row in old if source(row["model"]) == "" or row["model"] in best]


def in_order(lab: Lab, rows: list[dict]) -> list[dict]:
    """The ladder's order; what the best comparison model teaches comes last."""
    order = names(lab)
    return sorted(rows, key=lambda row: (*order, row["model"]).index(row["model"]))


def seeds_of(model: str, seeds: int) -> int:
    """How many seeds a row of Table 4 has: fewer for those that are no contenders."""
    return min(seeds, FEW) if model in NO_CONTENDERS else seeds


# ------------------------------------------------------------ recall by popularity


def popularity(lab: Lab, seeds: int) -> Output:
    """Recall@20 by how often an item was seen in training: who gains by content?"""
    ranked = rivals(search(lab))
    chosen = {*LADDER, *ranked[:2]} | ({"VBPR"} & {*ranked})
    shown = [name for name in names(lab) if name in chosen or name.startswith("Profile")]
    jobs = {model: Job(model, settings(lab, model)) for model in shown}
    every = [one for job in jobs.values() for one in seeded(job, seeds)]
    learn_all(lab, "popularity", every)
    test = lab.dataset.test
    groups = by_popularity(lab.dataset.train, test)
    shares = {group: f"{target.nnz / test.nnz:.1%}" for group, target in groups.items()}
    rows = [{"model": "share of the test interactions"} | shares]
    for model, job in jobs.items():
        pairs = [embeddings(lab, *one) for one in seeded(job, seeds)]
        rows.append({"model": model} | by_group(lab, pairs, groups))
    text = markdown(
        rows, {"model": "items seen in training"} | {name: name for name in GROUPS}
    )
    title = f"Recall@20 by popularity on {lab.dataset.name}, test split"
    note = (
        f"{protocol(jobs['PromptMM'].config, seeds)}; beside the ladder VBPR and the two "
        "best comparison models with content, by validation, where they were searched; a "
        "bar that leaves the picture is a profile's, and its length is in the table"
    )
    return Output(title, rows, text, note, partial(plot_gains, rows))


def rivals(found: dict) -> list[str]:
    """The comparison models with content that a search has seen, the best first.

    By validation: a row of the test split chooses nothing.
    """
    best = found.get("best", {})
    reached = {  # validation Recall@20 of the settings chosen, by what chose them
        row["model"]: row.get("three seeds", row["validation"])
        for row in found.get("rows", [])
        if row["settings"] == best.get(row["model"])
    }
    seen = [model for model in MODELS if model in reached and model not in CONTENT_FREE]
    return sorted(seen, key=lambda model: -reached[model])


def plot_gains(rows: list[dict], figure) -> None:
    """Recall over LightGCN's in each group: the ladder side by side.

    Profiles are grey. The axis holds what was trained; a profile's bar may leave it, the
    table has its length.
    """
    by_model = {row["model"]: row for row in rows[1:]}
    base = by_model.pop(REFERENCE)
    del by_model["MostPop"]
    axis = figure.subplots()
    places = np.arange(len(GROUPS))
    width = 0.8 / len(by_model)
    for n, (model, row) in enumerate(by_model.items()):
        gains = [row[group]["mean"] - base[group]["mean"] for group in GROUPS]
        bars = [row[group]["std"] for group in GROUPS]
        grey = str(1 - 0.55 * 0.7**n) if is_untrained(model) else None
        looks = {"label": model, "color": grey, "error_kw": {"lw": 0.8}}
        axis.bar(places + n * width, gains, width, yerr=bars, **looks)
    labels = [f"{group}\n{rows[0][group]} of test" for group in GROUPS]
    axis.set_xticks(places + 0.4 - width / 2, labels)
    axis.axhline(0, color="black", lw=0.8)
    axis.set_ylim(*heights(by_model, base))
    axis.set(xlabel="items by training interactions", ylabel="Recall@20 over LightGCN's")
    axis.legend(fontsize=8)


def heights(rows: dict[str, dict], base: dict) -> tuple[float, float]:
    """The lowest and the highest gain of a trained model, with error bars and a margin."""
    trained = [row for model, row in rows.items() if not is_untrained(model)]
    gains = [
        row[group]["mean"] - base[group]["mean"] + side * row[group]["std"]
        for row in trained
        for group in GROUPS
        for side in (-1, 1)
    ]
    low, high = min(0, *gains), max(0, *gains)
    margin = 0.1 * (high - low) or 0.01
    return low - margin, high + margin


def by_popularity(
    train: sparse.csr_matrix, target: sparse.csr_matrix
) -> dict[str, sparse.csr_matrix]:
    """The part of `target` [U, I] whose items were seen so often in training, by group."""
    seen = np.asarray(train.sum(0)).ravel()  # [I]
    parts = {}
    for group, (low, high) in GROUPS.items():
        parts[group] = target.multiply((low <= seen) & (seen < high)).tocsr()
        parts[group].eliminate_zeros()
    return parts


def by_group(lab: Lab, pairs: list, groups: dict[str, sparse.csr_matrix]) -> dict:
    """Recall@20 on every part of the test split, of one model's seeds: E_u, E_i each."""
    row = {}
    for group, target in groups.items():
        row[group] = spread([recall_on(lab, pair, target) for pair in pairs])
    return row


def recall_on(lab: Lab, pair, target: sparse.csr_matrix) -> float:
    """Recall@20 of E_u [U, e], E_i [I, e] on a part of the test split; 0 if it is empty."""
    if not target.nnz:
        return 0.0
    exclude = lab.dataset.train + lab.dataset.val
    return evaluate(*pair, target, exclude)["recall@20"]

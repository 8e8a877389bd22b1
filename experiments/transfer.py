"""Settings that were found elsewhere, or nowhere: does distillation do harm?

Rows come in pairs, LightGCN and PromptMM on top of it: under the settings of this dataset's
own search, under the defaults, and under what a search found on each other real dataset
(`promptmm.PRESETS`). Nobody's own data come with a search.
"""

from dataclasses import replace

from experiments.lab import Job, Lab, compare, search, settings
from experiments.publish import Output, markdown, protocol
from promptmm import LIGHTGCN, PRESETS

COLUMNS = {
    "settings": "settings",
    "alone": "LightGCN",
    "student": "PromptMM",
    "ratio": "PromptMM / LightGCN",
    "p": "p",
}


def transfer(lab: Lab, seeds: int) -> Output:
    """PromptMM beside the LightGCN of the same settings, wherever these are from."""
    rows = []
    values = []
    for name, place in foreign(lab).items():
        jobs = {
            model: Job(model, settings(place, model)) for model in ("LightGCN", "PromptMM")
        }
        alone, student = compare(place, f"transfer, {name}", jobs, seeds, "LightGCN")
        gain = student["gain"]["recall@20"]  # None over a LightGCN that finds nothing
        row = {
            "settings": name,
            "alone": alone["recall@20"],
            "student": student["recall@20"],
        }
        ratio = "" if gain is None else f"{1 + gain:.1%}"
        rows.append(row | {"ratio": ratio, "p": student["p_single"]})
        values += [student, alone]
    title = f"Settings from elsewhere on {lab.dataset.name}, Recall@20 on test"
    note = (
        f"{protocol(settings(lab), seeds)}, under its own settings (a row's eval_every and "
        "patience are those of its settings); p of each pair alone, not adjusted, users "
        f"and {'' if seeds > 1 else 'no '}seeds drawn"
    )
    return Output(title, rows, markdown(rows, COLUMNS), note, extra={"pairs": values})


def foreign(lab: Lab) -> dict[str, Lab]:
    """The same data under other settings, by where these are from."""
    places = {"own search": lab} if search(lab) else {}
    places["defaults"] = chosen(lab, {}, {})
    for name, preset in PRESETS.items():
        if name not in (lab.dataset.name, "synthetic"):
            places[f"found on {name}"] = chosen(lab, LIGHTGCN[name], preset)
    return places


def chosen(lab: Lab, lightgcn: dict, promptmm: dict) -> Lab:
    return replace(lab, chosen={"LightGCN": lightgcn, "PromptMM": promptmm})

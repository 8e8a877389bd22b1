"""KDSR's claims that no table of models answers: D-1 and D-3, and its codes' entropy."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from data import read_torch, unit_rows
from distillers.content import centred, content_start, nearest, some_pairs
from distillers.correlation import Modality
from experiments.inside import Finding, agreed, by_seeds
from experiments.lab import (
    Job,
    Lab,
    each_alone,
    learn,
    learn_all,
    recall,
    seeded,
    settings,
    spread,
)
from experiments.methods import KDSR, UNTAUGHT
from experiments.publish import plain
from promptmm import Config


def code_entropy(lab: Lab, config: Config) -> dict[str, float]:
    """Of the codes of k-means' own pairs, in nats, by modality; without a pair 0."""
    found = {}
    for m, x in lab.dataset.features.items():
        one = Modality(*centred(torch.from_numpy(x).float()), config)
        if one.centres is None:
            found[m] = 0.0
            continue
        _, relations = one.correlations(*some_pairs(one.filled, 20_000))
        share = nearest(relations, one.centres).bincount().float() / max(1, len(relations))
        found[m] = float(torch.special.entr(share).sum())
    return found


def forgetting(lab: Lab, seeds: int) -> Finding:
    """D-1: BPR alone forgets the features' correlations; supervision keeps them."""
    full = replace(settings(lab, KDSR), start="content")
    steps = {
        "BPR alone": Job(KDSR, replace(full, **UNTAUGHT)),
        "+ holistic": Job(KDSR, replace(full, lambda_dissected=0.0, slow=1.0)),
        "+ dissected": Job(KDSR, replace(full, slow=1.0)),
        "+ slow": Job(KDSR, full),
    }
    contents = [centred(torch.from_numpy(x).float()) for x in lab.dataset.features.values()]
    start = content_start([x for x, _ in contents], full.dim)
    rows = [{"table": "content start"} | kept(lab, [start])]
    for name, job in steps.items():
        jobs = seeded(job, seeds)
        learn_all(lab, "D-1", jobs)
        files = [learn(lab, *one) / "method.pt" for one in jobs]
        tables = [read_torch(file, torch.device("cpu"))["student.item"] for file in files]
        rows.append({"table": name} | kept(lab, tables))
    start, alone, taught = (np.array(rows[n]["mean"]["runs"]) for n in (0, 1, -1))
    found = agreed(by_seeds(start - alone), by_seeds(taught - alone))  # start: [1]
    text = "BPR alone forgets correlations, supervision keeps them"
    return Finding("D-1", text, rows, plain(rows), found)


def kept(lab: Lab, tables: list[Tensor]) -> dict[str, dict]:
    """Correlation of a table's cosines with each modality's, over 20,000 fixed pairs."""
    found: dict[str, list[float]] = {m: [] for m in lab.dataset.features}
    for m, raw in lab.dataset.features.items():
        x = unit_rows(torch.from_numpy(raw).float())
        i, j = some_pairs(x.any(1), 20_000)
        content = (x[i] * x[j]).sum(1)
        for one in tables:
            own = torch.cosine_similarity(one[i], one[j], dim=1)
            pair = torch.stack([own, content])
            found[m].append(float(torch.corrcoef(pair)[0, 1].nan_to_num()))
    means = np.mean(list(found.values()), axis=0)
    return {m: spread(runs) for m, runs in found.items()} | {"mean": spread(means)}


def codes_and_parts(lab: Lab, seeds: int) -> Finding:
    """D-3: does a wider encoder gain from finer codes? Validation, one seed: no claim."""
    grid = [(20, 1), (50, 8)]
    if not lab.quick:
        grid = [(codes, parts) for codes in (20, 50, 100) for parts in (1, 4, 8, 16)]
    found = settings(lab, KDSR)
    jobs = {
        f"{codes} × {parts}": Job(KDSR, replace(found, codes=codes, parts=parts))
        for codes, parts in grid
    }
    rows = []
    for m, place in each_alone(lab).items():
        learn_all(place, "D-3", [*jobs.values()])
        row = {"modality": m, "width": lab.dataset.features[m].shape[1]}
        row |= {name: recall(place, job, "val") for name, job in jobs.items()}
        rows.append(row)
    return Finding(
        "D-3", "finer codes suit wider encoders (no claim)", rows, plain(rows), ""
    )

"""Section 4.6: how fast each model converges, epoch by epoch (Figure 5)."""

from functools import partial

import numpy as np

from experiments.lab import Job, Lab, learn_all, log_of, seeded, settings
from experiments.publish import Output, markdown, protocol

MODELS_SHOWN = ("LightGCN", "Teacher", "PromptMM")
CURVES = ("epoch", "recall@20", "ndcg@20", "loss")


def figure5(lab: Lab, seeds: int) -> Output:
    """Validation Recall@20 and the training objective, epoch by epoch."""
    jobs = {model: Job(model, settings(lab, model)) for model in MODELS_SHOWN}
    every = [one for job in jobs.values() for one in seeded(job, seeds)]
    learn_all(lab, "Figure 5", every)
    logs, rows = {}, []
    for model, job in jobs.items():
        logs[model] = [log_of(lab.folder(*one)) for one in seeded(job, seeds)]
        rows += [curve(model, seed, log) for seed, log in enumerate(logs[model])]
    columns = {
        "model": "model",
        "seed": "seed",
        "selected": "epoch selected",
        "stopped": "epoch stopped",
        "recall@20": "validation Recall@20",
        "seconds": "s of training",
    }
    note = (
        f"{protocol(jobs['PromptMM'].config, seeds)}; the teacher's is under the weights "
        "found at that epoch, and its epoch 0, before training, is not in the plot; "
        "seconds are without validation, in which they are found"
    )
    title = f"Figure 5. Convergence on {lab.dataset.name}, validation split"
    return Output(title, rows, markdown(rows, columns), note, partial(plot_curves, logs))


def curve(model: str, seed: int, log: dict[str, np.ndarray]) -> dict:
    """One line of the figure, and what a table says of it."""
    recall, epochs = log["recall@20"], log["epoch"]
    best = int(recall.argmax())
    row = {"model": model, "seed": seed}
    row |= {"selected": int(epochs[best]), "stopped": int(epochs[-1])}
    row |= {"recall@20": float(recall[best]), "seconds": float(log["seconds"][-1])}
    return row | {"curve": {name: log[name].tolist() for name in CURVES}}


def plot_curves(logs: dict[str, list[dict]], figure) -> None:
    titles = {"recall@20": "Recall@20, validation", "loss": "training objective"}
    for axis, (metric, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for colour, (model, runs) in enumerate(logs.items()):
            for log in runs:
                shown = log["epoch"] > 0  # the axis is logarithmic
                label = model if log is runs[0] else None
                style = {"color": f"C{colour}", "lw": 1, "alpha": 0.7}
                axis.plot(log["epoch"][shown], log[metric][shown], label=label, **style)
        axis.set(xlabel="epoch", xscale="log", ylabel=title)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8, title="one line a seed")

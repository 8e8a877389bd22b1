"""Section 4.5: one setting at a time, the others as the search chose them (Figure 4)."""

from dataclasses import replace
from functools import partial

from experiments.lab import Job, Lab, learn_all, recall, seeded, settings, some, spread
from experiments.publish import Output, markdown, protocol
from promptmm import Config

SWEEPS = {  # the paper's values; the ids of the teacher stay the best LightGCN's
    "d": ("dim", (16, 32, 64, 128)),
    "L": ("student_layers", (1, 2, 3, 4)),
    "dropout": ("dropout", (0.0, 0.2, 0.4, 0.6, 0.8)),
    "λ₁": ("lambda_prompt", (0.0, 0.01, 0.1, 1.0, 10.0)),
    "λ₂": ("lambda_pair", (0.0, 0.01, 0.1, 1.0, 10.0, 100.0)),
    "λ₃": ("lambda_list", (0.0, 0.01, 0.1, 1.0, 10.0, 100.0)),
}
LABELS = {"Teacher": "teacher", "PromptMM": "student"}


def figure4(lab: Lab, seeds: int) -> Output:
    """Test Recall@20 of teacher and student as one setting moves."""
    full = settings(lab)
    grid = points(lab, full)
    every = [one for *_, config in grid for one in seeded(Job("PromptMM", config), seeds)]
    learn_all(lab, "Figure 4", every)
    rows = []
    for symbol, value, config in grid:
        row = {"setting": symbol, "value": value}
        for model in LABELS:
            runs = seeded(Job(model, config), seeds)
            row[model] = spread([recall(lab, one) for one in runs])
        rows.append(row)
    columns = {"setting": "setting", "value": "value"}
    columns |= {model: f"{label}, Recall@20" for model, label in LABELS.items()}
    title = f"Figure 4. Settings on {lab.dataset.name}, test split"
    text = markdown(rows, columns)
    return Output(title, rows, text, protocol(full, seeds), partial(plot_sweeps, rows))


def points(lab: Lab, full: Config) -> list[tuple[str, float, Config]]:
    """Symbol, value and settings of every point."""
    grid = []
    for symbol, (name, values) in SWEEPS.items():
        for value in some(lab, values, 1):
            grid.append((symbol, value, replace(full, **{name: value})))
    return grid


def plot_sweeps(rows: list[dict], figure) -> None:
    axes = figure.subplots(2, 3, sharey=True).flat
    for axis, symbol in zip(axes, SWEEPS, strict=True):
        shown = [row for row in rows if row["setting"] == symbol]
        values = [f"{row['value']:g}" for row in shown]
        for model, style in (("Teacher", "s--"), ("PromptMM", "o-")):
            means = [row[model]["mean"] for row in shown]
            bars = [row[model]["std"] for row in shown]
            label = LABELS[model]
            axis.errorbar(values, means, bars, fmt=style, ms=4, capsize=2, label=label)
        axis.set_xlabel(symbol)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.supylabel("Recall@20, test")

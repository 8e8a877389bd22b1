"""The paper's tables and figures, from one command, on the embedded data or on yours.

    python experiments.py all [--quick]             everything, on the embedded data
    python experiments.py all --data DIR            Tables 3-7 and Figure 5
    python experiments.py table4 --data DIR --seeds 5
    python experiments.py tune --data DIR           the search that the presets come from
    python experiments.py errata | bench | readme   see paper.py, bench.py; figures into README.md

Every model is trained by the same functions as `promptmm.py` does it, once for each setting and
seed: runs/experiments/ keeps what was trained, by configuration and data fingerprint, so that the
tables share it and an interrupted command goes on where it stopped. The cache does not know the
code: after changing that, `all --force`.

Read `Lab` and the runner first, then any table: each is one function. Nothing here is imported by
the core. What depends on no data (Tables 8, 9, Figure 2, errata) is in paper.py.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from scipy import sparse

import bench
import data
import paper
from data import DataError, Parser, Sampler, need, write
from evaluate import evaluate, ladder
from losses import scores
from promptmm import Config, Student, _epoch, bpr_terms
from runner import (
    PAIRED,
    ROOT,
    STAGE,
    Lab,
    Output,
    compare,
    digest,
    embeddings,
    judge,
    learn_all,
    load_teacher,
    log_of,
    markdown,
    protocol,
    publish,
    ranking_table,
    search,
    seeded,
    settings,
    spread,
)
from tune import tune

# ---------------------------------------------------------------- tables


def table3(lab: Lab) -> Output:
    """Statistics of the data."""
    facts = {name: value if isinstance(value, int) else str(value)
             for name, value in data.describe(lab.dataset).items()}
    rows = [{"statistic": name, "value": value} for name, value in facts.items()]
    text = markdown(rows, {"statistic": "statistic", "value": lab.dataset.name})
    return Output(f"Table 3. Statistics of {lab.dataset.name}", rows, text)


def table4(lab: Lab, seeds: int = 5) -> Output:
    """Comparison under one protocol."""
    models = {model: (model, settings(lab, model)) for model in ("MostPop", *STAGE)}
    rows = compare(lab, "Table 4", models, seeds, "LightGCN")
    budget = "settings not tuned on these data"
    if found := search(lab):
        budget = (f"settings: the best of {found['tried']} tries a model "
                  "on validation (tune.md; PromptMM's are half its teacher's, half its student's, "
                  "and begin as the best LightGCN)")
    return Output(f"Table 4. Comparison on {lab.dataset.name}, test split", rows,
                  ranking_table(rows, "LightGCN"),
                  f"{protocol(models['PromptMM'][1], lab.count(seeds))}; {PAIRED}; {budget}; none "
                  "of the paper's own figures are about these data, so none stand beside")


def variants(full: Config, lab: Lab) -> dict[str, tuple[str, Config]]:
    """Table 5's rows: what each leaves out of the full model."""
    change = partial(replace, full)
    rows = {
        "PromptMM": full,
        "w/o Prompt": change(lambda_prompt=0.0),
        "prompt frozen": change(tune_prompt=False),
        "prompt tuned": change(tune_prompt=True),
        "w/o PairKD": change(lambda_pair=0.0),
        "w/o ListKD": change(lambda_list=0.0),
        "w/o EmbKD": change(lambda_embed=0.0),
        "w/o disentangle": change(beta="identity", alpha=1.0),
    }
    # Vanilla KL is of another scale: its own λ₃, by validation.
    own = [change(beta="identity", alpha=1.0, lambda_list=full.lambda_list * factor)
           for factor in ((1.0,) if lab.quick else (1.0, 3.0, 10.0))]
    learn_all(lab, "Table 5, λ₃", [("PromptMM", one) for one in own])
    best = max(own, key=lambda one: judge(lab, "PromptMM", one, "val")["recall@20"].mean())
    rows[f"w/o disentangle, λ₃ = {best.lambda_list:g}"] = best
    return {name: ("PromptMM", config) for name, config in rows.items()}


def table5(lab: Lab, seeds: int = 3) -> Output:
    """Ablations: each part taken out of the full model; but for one λ₃, nothing tuned again."""
    full = settings(lab)
    rows = compare(lab, "Table 5", variants(full, lab), seeds, "PromptMM")
    note = ("w/o Prompt: λ₁ = 0 in both stages; w/o disentangle: α = 1, β = 1 - b+ (Eq. 16), at "
            "the full model's λ₃ and at its own, chosen on validation with seed 0; the full "
            f"model's prompt is {'tuned' if full.tune_prompt else 'frozen'} in stage 2")
    return Output(f"Table 5. Ablation on {lab.dataset.name}, test split", rows,
                  ranking_table(rows, "PromptMM"),
                  f"{protocol(full, lab.count(seeds))}; {PAIRED}; {note}")


OPTIONS = {  # what the equations leave open, and this project's departures: one change each
    "PromptMM": {}, "tokens side by side (P10)": {"tokens": "concat"},
    "unit rows of p^m (C20)": {"prompt_rows": "unit"},
    "F_i^m = f^m, teacher too": {"modal_target": "reduced"},
    "F_i^m = (f^m + F^m) / 2": {"modal_target": "mean"}, "τ = 2": {"temperature": 2.0},
    "β = 8": {"beta": 8.0}, "K - 1 = 50": {"negatives": 50}, "γ = 1": {"gamma": 1.0},
    "γ = 3": {"gamma": 3.0}, "student of 1 layer": {"student_layers": 1},
    "student of 3 layers": {"student_layers": 3}, "warm start (C24)": {"warm_start": True},
    "prompt tuned": {"tune_prompt": True},
    "prompt tuned, no anchor (P11)": {"tune_prompt": True, "weight_anchor": 0.0},
}


def options(lab: Lab, seeds: int = 3) -> Output:
    """Open choices and departures, one at a time."""
    full = settings(lab)
    rows = {name: ("PromptMM", replace(full, **change)) for name, change in OPTIONS.items()
            if name == "PromptMM" or replace(full, **change) != full}
    rows = compare(lab, "options", rows, seeds, "PromptMM")
    return Output(f"Options on {lab.dataset.name}, one change each, test split", rows,
                  ranking_table(rows, "PromptMM"), f"{protocol(full, lab.count(seeds))}; {PAIRED}")


def table6(lab: Lab) -> Output:
    """Time, memory and size: what the teacher costs, what the student costs."""
    full, native = settings(lab), lab.cache / "native"
    if not native.exists():
        native.parent.mkdir(parents=True, exist_ok=True)
        data.save(lab.dataset, native)
    learn_all(lab, "Table 6", [("PromptMM", full)])
    rows = []
    for model in bench.COSTS:
        run = lab.folder("Teacher" if model == "teacher" else "PromptMM", full)
        command = [str(ROOT / "bench.py"), "--data", str(native), "--run", str(run),
                   "--model", model, "--device", str(lab.device)]
        rows.append({"model": model, **json.loads(child(command))})
    for row in rows:
        for name, sizes in (("learnt", ["trainable"]), ("all", ["trainable", "buffers"])):
            share = sum(row[size] for size in sizes) / sum(rows[0][size] for size in sizes)
            row[name] = f"{share:.1%}"
        row["faster"] = f"{rows[0]['embed'] / row['embed']:.1f} x"
        row |= {key: round(row[key]) for key in ("peak_embed", "peak_train")}
    text = markdown(rows, {
        "model": "", "epoch": "s/epoch", "peak_train": "peak MiB, training",
        "trainable": "learnt", "buffers": "features", "learnt": "ratio, learnt",
        "all": "with features",
        "embed": "s to embeddings", "faster": "faster", "peak_embed": "peak MiB, embedding",
        "serve": "bytes to serve"})
    note = ("each row is a process of its own, its peak that of the process, torch's own pages "
            "included; s/epoch: median of three, without validation; s to embeddings: from files "
            "on disk to E_u and E_i; bytes to serve: what must be held to refresh and serve "
            "embeddings, that is tables, and of the teacher reductions, prompt and features too. "
            "Frozen final embeddings would be equally large for both")
    return Output(f"Table 6. Cost on {lab.dataset.name}", rows, text, note)


def child(command: list[str]) -> str:
    """What another Python process prints; if it fails, its last line as our error."""
    found = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    need(not found.returncode, (found.stderr.strip().splitlines() or ["no message"])[-1])
    return found.stdout


def table7(lab: Lab, seeds: int = 3) -> Output:
    """Incremental: a fifth of the training interactions arrives later."""
    full, seeds = settings(lab), lab.count(seeds)
    found = [increment(lab, replace(full, seed=seed)) for seed in range(seeds)]
    rows = []
    for model in found[0]:
        values = {key: [one[model][key] for one in found] for key in found[0][model]}
        rows.append({"model": model} | {key: spread(runs) for key, runs in values.items()})
    whole = rows[-1]["seconds"]["mean"]
    for row in rows:
        row["time"] = f"{row['seconds']['mean']:.2f} s"
        row["times faster"] = (f"{whole / row['seconds']['mean']:.0f} x"
                               if row["seconds"]["mean"] else "")
    text = markdown(rows, {"model": "after the new interactions", "recall@20": "Recall@20",
                           "ndcg@20": "NDCG@20", "time": "time",
                           "times faster": "against retraining"})
    note = ("a random fifth of the training interactions is held back for each seed; fine-tuning: "
            "BPR on the new ones only, over the whole graph, at a tenth of the student's step, "
            "selected on validation, patience 3; time: seconds of training up to the selected "
            "epoch, those of the retrained models as logged when they were trained")
    return Output(f"Table 7. Adapting to new data on {lab.dataset.name}, test split", rows, text,
                  f"{note}; {protocol(full, seeds)}")


def increment(lab: Lab, config: Config) -> dict[str, dict[str, float]]:
    """One seed of Table 7: recall, NDCG and training seconds of each way to take in new data."""
    train, rng = lab.dataset.train, np.random.default_rng(config.seed)
    new = train.copy()
    new.data = (rng.random(train.nnz) < 0.2).astype(train.dtype)
    new.eliminate_zeros()
    old = replace(lab.dataset, train=(train - new).tocsr())
    before = replace(lab, dataset=old)
    learn_all(before, "Table 7, before", [("PromptMM", config)])
    whole = {"LightGCN": replace(settings(lab, "LightGCN"), seed=config.seed), "PromptMM": config}
    learn_all(lab, "Table 7, retrained", list(whole.items()))
    folder = before.folder("PromptMM", config)
    learnt = data.read_torch(folder / "student.pt", lab.device)
    learnt = {name.removeprefix("student."): value for name, value in learnt.items()
              if name.startswith("student.")}
    student = Student(train, config, lab.device)
    student.load_state_dict(learnt)
    result = {"old student, new graph": test_of(lab, student, 0.0)}
    spent = finetune(lab, student, new, config)
    result["student fine-tuned"] = test_of(lab, student, spent)
    for model, own in whole.items():
        stages = [model, "Teacher"] if model == "PromptMM" else [model]
        logs = [log_of(lab.folder(stage, own)) for stage in stages]
        values = judge(lab, model, own)
        result[f"{model} retrained"] = {
            metric: float(values[metric].mean()) for metric in ("recall@20", "ndcg@20")}
        result[f"{model} retrained"]["seconds"] = sum(
            log["seconds"][log["recall@20"].argmax()] for log in logs)
    return result


def test_of(lab: Lab, student: Student, seconds: float) -> dict[str, float]:
    with torch.no_grad():
        found = evaluate(*student(), lab.dataset.test, lab.dataset.train + lab.dataset.val)
    return {metric: found[metric] for metric in ("recall@20", "ndcg@20")} | {"seconds": seconds}


def finetune(lab: Lab, student: Student, new: sparse.csr_matrix, config: Config) -> float:
    """Train a student on new interactions, keep its best epoch; the seconds until that epoch."""
    torch.manual_seed(config.seed)
    sampler = Sampler(lab.dataset.train, lab.device)  # negatives: neither old nor new positives
    generator = torch.Generator(lab.device).manual_seed(config.seed)
    optimiser = torch.optim.AdamW(student.parameters(), lr=config.lr_student / 10, weight_decay=0.0)

    def terms(users, lists):
        logits = scores(*student(), users, lists)
        return bpr_terms(student, logits, users, lists, config.l2_student or config.l2)

    best, stale, spent = -1.0, 0, 0.0
    for _ in range(config.epochs):
        with torch.no_grad():
            recall = evaluate(*student(), lab.dataset.val, lab.dataset.train)["recall@20"]
        stale += 1
        if recall > best:
            best, stale, selected = recall, 0, spent
            kept = {name: weight.clone() for name, weight in student.state_dict().items()}
        if stale == 3:
            break
        began = time.perf_counter()
        users, lists = sampler.epoch(generator)
        edges = users.cpu().numpy().copy(), lists[:, 0].cpu().numpy().copy()
        fresh = np.asarray(new[edges]).ravel() > 0
        fresh = torch.from_numpy(fresh).to(lab.device)
        _epoch(student, optimiser, (users[fresh], lists[fresh]),
               config.batch_student or config.batch, terms)
        spent += time.perf_counter() - began
    student.load_state_dict(kept)
    return selected


GROUPS = {"never": (0, 1), "1-3": (1, 4), "4-10": (4, 11), "11-50": (11, 51), "> 50": (51, 1e9)}


def popularity(lab: Lab, seeds: int = 3) -> Output:
    """Recall@20 by how often an item was seen in training: who gains by content?"""
    names = ("MostPop", "LightGCN", "Teacher", "PromptMM")
    models = {model: settings(lab, model) for model in names}
    learn_all(lab, "popularity", [(model, one) for model, config in models.items()
                                  for one in seeded(lab, config, seeds)])
    train, test = lab.dataset.train, lab.dataset.test
    seen = np.asarray(train.sum(0)).ravel()
    rows = [{"model": "share of the test interactions"}] + [{"model": model} for model in models]
    for group, (low, high) in GROUPS.items():
        target = test.multiply((low <= seen) & (seen < high)).tocsr()
        target.eliminate_zeros()
        rows[0][group] = f"{target.nnz / test.nnz:.1%}"
        for row, (model, config) in zip(rows[1:], models.items(), strict=True):
            runs = [evaluate(*embeddings(lab, model, one), target, train + lab.dataset.val)
                    ["recall@20"] if target.nnz else 0.0 for one in seeded(lab, config, seeds)]
            row[group] = spread(runs)
    text = markdown(rows, {"model": "items seen in training"} | {name: name for name in GROUPS})
    return Output(f"Recall@20 by popularity on {lab.dataset.name}, test split", rows, text,
                  protocol(models["PromptMM"], lab.count(seeds)))


# ---------------------------------------------------------------- figures


def figure3(lab: Lab) -> Output:
    """t-SNE of x^m and of f^m with and without prompt; and how far modalities mix, in a number."""
    full, panels = settings(lab), {}
    n_items = lab.dataset.train.shape[1]
    need(len(lab.dataset.features) > 1 and n_items > 10,
         f"figure3: expected two modalities and more than 10 items, found {n_items} and "
         f"{', '.join(lab.dataset.features)}")
    chosen = np.random.default_rng(0).permutation(n_items)
    chosen = chosen[: 100 if lab.quick else 400]
    for name, config in (("f with prompt", full),
                         ("f w/o prompt", replace(full, lambda_prompt=0.0))):
        learn_all(lab, "Figure 3", [("Teacher", config)])
        with torch.no_grad():
            teacher = load_teacher(lab, config)
            panels[name] = {m: f[chosen].cpu().numpy() for m, f in teacher().reduced.items()}
    raw = {m: x[chosen] for m, x in teacher.features.items()}  # to d by PCA, for one common width
    panels = {"x, raw": {m: data.pca_tokens(x, full.dim).cpu().numpy() for m, x in raw.items()},
              **panels}
    rows = [{"panel": name, "mixing": mixing(points)} for name, points in panels.items()]
    text = markdown(rows, {"panel": "", "mixing": "neighbours of another modality"})
    note = (f"{len(chosen)} random items; mixing: share of the 10 nearest neighbours, in the "
            f"{full.dim} dimensions and not in the plot, that belong to another modality, over "
            "what chance gives (1: one cloud; 0: apart). x is whitened to a common width by PCA, "
            "each modality by a basis of its own, so there it is that of unrelated clouds (P10)")
    return Output(f"Figure 3. t-SNE of the modalities on {lab.dataset.name}", rows, text, note,
                  partial(plot_tsne, panels))


def mixing(points: dict[str, np.ndarray]) -> float:
    x = np.concatenate(list(points.values()))
    kind = np.repeat(np.arange(len(points)), [len(part) for part in points.values()])
    distance = np.square(x).sum(1)[None] - 2 * x @ x.T
    np.fill_diagonal(distance, np.inf)
    nearest = np.argpartition(distance, 10, axis=1)[:, :10]
    return float((kind[nearest] != kind[:, None]).mean() / (1 - 1 / len(points)))


def plot_tsne(panels: dict, figure) -> None:
    from sklearn.manifold import TSNE

    for axis, (name, points) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        x = np.concatenate(list(points.values()))
        flat = TSNE(init="pca", random_state=0).fit_transform(x)
        for (m, part), marker in zip(points.items(), product("os^vD"), strict=False):
            axis.scatter(*flat[: len(part)].T, s=8, alpha=0.6, marker=marker[0], label=m, lw=0)
            flat = flat[len(part) :]
        axis.set(title=f"{name}: mixing {mixing(points):.2f}", xticks=[], yticks=[],
                 xlabel="t-SNE 1", ylabel="t-SNE 2")
    axis.legend(title="modality", fontsize=8)


SWEEPS = {  # the paper's, Sec. 4.5; both models take a value of d and L
    "d": (("dim",), (16, 32, 64, 128)), "L": (("teacher_layers", "student_layers"), (1, 2, 3, 4)),
    "dropout": (("dropout",), (0.0, 0.2, 0.4, 0.6, 0.8)),
    "λ₁": (("lambda_prompt",), (0.0, 0.01, 0.1, 1.0, 10.0)),
    "λ₂": (("lambda_pair",), (0.0, 0.01, 0.1, 1.0, 10.0, 100.0)),
    "λ₃": (("lambda_list",), (0.0, 0.01, 0.1, 1.0, 10.0, 100.0)),
}


def figure4(lab: Lab, seeds: int = 1) -> Output:
    """One setting at a time, the others as they are."""
    full, rows = settings(lab), []
    grid = [(symbol, value, replace(full, **dict.fromkeys(names, value)))
            for symbol, (names, values) in SWEEPS.items()
            for value in (values[:2] if lab.quick else values)]
    learn_all(lab, "Figure 4", [("PromptMM", one) for *_, config in grid
                                for one in seeded(lab, config, seeds)])
    for symbol, value, config in grid:
        row = {"setting": symbol, "value": value}
        for model in ("Teacher", "PromptMM"):
            runs = [float(judge(lab, model, one)["recall@20"].mean())
                    for one in seeded(lab, config, seeds)]
            row[model] = spread(runs)
        rows.append(row)
    text = markdown(rows, {"setting": "setting", "value": "value", "Teacher": "teacher, Recall@20",
                           "PromptMM": "student, Recall@20"})
    return Output(f"Figure 4. Settings on {lab.dataset.name}, test split", rows, text,
                  protocol(full, lab.count(seeds)), partial(plot_sweeps, rows))


def plot_sweeps(rows: list[dict], figure) -> None:
    for axis, symbol in zip(figure.subplots(2, 3, sharey=True).flat, SWEEPS, strict=True):
        shown = [row for row in rows if row["setting"] == symbol]
        for model, style in (("Teacher", "s--"), ("PromptMM", "o-")):
            axis.errorbar([f"{row['value']:g}" for row in shown],
                          [row[model]["mean"] for row in shown],
                          [row[model]["std"] for row in shown], fmt=style, ms=4, capsize=2,
                          label={"Teacher": "teacher", "PromptMM": "student"}[model])
        axis.set_xlabel(symbol)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.supylabel("Recall@20, test")


def figure5(lab: Lab, seeds: int = 3) -> Output:
    """Convergence: validation Recall@20 and the loss, epoch by epoch."""
    models = {model: settings(lab, model) for model in ("LightGCN", "Teacher", "PromptMM")}
    learn_all(lab, "Figure 5", [(model, one) for model, config in models.items()
                                for one in seeded(lab, config, seeds)])
    curves, rows = {}, []
    for model, config in models.items():
        curves[model] = [log_of(lab.folder(model, one)) for one in seeded(lab, config, seeds)]
        for seed, log in enumerate(curves[model]):
            best = int(log["recall@20"].argmax())
            rows.append({"model": model, "seed": seed, "selected": int(log["epoch"][best]),
                         "stopped": int(log["epoch"][-1]),
                         "recall@20": float(log["recall@20"][best]),
                         "seconds": float(log["seconds"][-1]),
                         "curve": {name: log[name].tolist()
                                   for name in ("epoch", "recall@20", "ndcg@20", "loss")}})
    text = markdown(rows, {"model": "model", "seed": "seed", "selected": "epoch selected",
                           "stopped": "epoch stopped", "recall@20": "validation Recall@20",
                           "seconds": "s of training"})
    return Output(f"Figure 5. Convergence on {lab.dataset.name}, validation split", rows, text,
                  protocol(models["PromptMM"], lab.count(seeds)), partial(plot_curves, curves))


def plot_curves(curves: dict, figure) -> None:
    for axis, metric in zip(figure.subplots(1, 2), ("recall@20", "loss"), strict=True):
        for (model, logs), colour in zip(curves.items(), ("C0", "C1", "C2"), strict=True):
            for log in logs:
                axis.plot(log["epoch"], log[metric], color=colour, lw=1, alpha=0.7,
                          label=model if log is logs[0] else None)
        name = {"recall@20": "Recall@20, validation", "loss": "training objective"}[metric]
        axis.set(xlabel="epoch", xscale="log", ylabel=name)
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8, title="one line a seed")


# ---------------------------------------------------------------- README and command line


def fence(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"


def readme() -> str:
    """README.md with what stands between its markers taken from results/."""
    def content(match: re.Match) -> str:
        text = (ROOT / "results" / match[2]).read_text()
        table = re.search("<!-- table -->\n(.*?)\n<!-- end -->", text, re.S)
        return f"{match[1]}{table[1] if table else fence(text)}\n<!-- end -->"

    text = (ROOT / "README.md").read_text()
    return re.sub(r"(<!-- results/(\S+) -->\n).*?<!-- end -->", content, text, flags=re.S)


def first_run(lab: Lab) -> Output:
    """The main job, `python promptmm.py`, as a reader runs it: its ladder and its time."""
    folder = lab.cache / "first_run"
    flags = ["--data", lab.source] if lab.source else []
    flags += ["--quick"] if lab.quick else []
    child([str(ROOT / "promptmm.py"), "--out", str(folder), "--force", "--device", str(lab.device),
           *flags])
    metrics = data.read_json(folder / "metrics.json", "test", "seconds")
    seconds = sum(metrics["seconds"].values())
    text = (f"{seconds:.1f} s of training ({metrics['device']}, {torch.get_num_threads()} "
            "threads); it prints:\n\n"
            f"{fence(ladder(metrics))}")
    return Output(f"The main job on {lab.dataset.name}", [metrics], text)


EMBEDDED = (first_run, table3, table4, table5, options, popularity, table6, table7, figure3,
            figure4, figure5)
REAL = (table3, table4, table5, popularity, table6, table7, figure5)
PARTS = {part.__name__: part for part in EMBEDDED} | paper.PARTS


def perform(lab: Lab, part, force: bool, **more) -> None:
    """Run one part and publish it; a part that was finished here is left as it is."""
    name = part.__name__
    chosen = [] if name == "tune" else [vars(settings(lab, model)) for model in STAGE]
    key = digest([chosen, lab.seeds, lab.quick, str(lab.out), more])
    stamp = lab.cache / f"{name}-{key}.done"
    if stamp.exists() and Path(stamp.read_text()).exists() and not force:
        print(f"{name}: finished before, {stamp.read_text()}; --force publishes it again")
        return
    began = time.perf_counter()
    output = part(**more) if name in paper.PARTS else part(lab, **more)
    seeds = lab.count(part.__defaults__[0]) if part.__defaults__ else 1
    flags = [f"--{key} {value}" for key, value in more.items()]
    flags += [f"--seeds {lab.seeds}"] * bool(lab.seeds and part.__defaults__)
    folder = lab.out / ("paper" if name in paper.PARTS else lab.dataset.name)
    where = publish(lab, folder, name, output, time.perf_counter() - began, seeds, flags)
    stamp.parent.mkdir(parents=True, exist_ok=True)
    write(stamp, str(where))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="experiments.py", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=(*PARTS, "all", "tune", "bench", "readme"))
    parser.add_argument("--data", default="", help="dataset folder (default: the embedded data)")
    parser.add_argument("--seeds", type=int, default=0, help="runs a model (default: the part's)")
    parser.add_argument("--tries", type=int, default=16, help="of tune, a model (default: 16)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--out", type=Path, help="(default: results; with --quick: runs/quick)")
    parser.add_argument("--quick", action="store_true", help="two epochs a stage: a smoke test")
    parser.add_argument("--force", action="store_true", help="publish again; all: train again too")
    try:
        if argv[:1] == ["bench"]:
            return bench.main(argv[1:])
        args = parser.parse_args(argv)
        if args.part == "readme":
            write(ROOT / "README.md", readme())
            return 0
        need(args.seeds >= 0 and 1 < args.tries <= 24,
             f"expected --seeds 0 or more and --tries 2 to 24, found {args.seeds}, {args.tries}")
        dataset = data.load(args.data) if args.data else data.synthetic()
        out = args.out or ROOT / ("runs/quick" if args.quick else "results")
        lab = Lab(dataset, args.data, data.pick_device(args.device), args.seeds, args.quick, out)
        torch.use_deterministic_algorithms(lab.device.type == "cpu")
        torch.utils.deterministic.fill_uninitialized_memory = False
        if args.force and args.part == "all":
            for cache in lab.cache.parent.glob(f"{dataset.name}-*"):  # Table 7 has its own
                shutil.rmtree(cache)
        if args.part == "tune":
            perform(lab, tune, args.force, tries=4 if args.quick else args.tries)
            return 0
        every = REAL if args.data else PARTS.values()
        for part in every if args.part == "all" else [PARTS[args.part]]:
            perform(lab, part, args.force)
    except (DataError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        print("interrupted; the same command without --force goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

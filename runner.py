"""What every experiment shares: train once, keep on disk, compare, publish.

    Lab         the data, the device, where things go
    learn       one trained model, from the cache where it is there
    judge       its metrics for each user
    compare     rows of mean ± std over seeds, with a paired test
    Output, publish   how a result is shown: .md, .json, .png
"""

import contextlib
import hashlib
import json
import sys
import time
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import scipy
import torch

import data
from data import Dataset, write
from evaluate import evaluate, paired_test
from promptmm import Config, Run, Teacher, train_student, train_teacher

ROOT = Path(__file__).parent
SHARED = {"dim", "l2", "weight_decay", "batch", "epochs", "eval_every", "patience", "seed"}
TAUGHT = {"lambda_pair", "lambda_list", "lambda_embed", "alpha", "beta", "temperature", "gamma",
          "negatives", "tune_prompt", "weight_anchor", "warm_start"}
ALONE = SHARED | {"dim_student", "student_layers", "lr_student"}
OTHER = {"batch_student", "l2_student", "alone", "mask"}  # the first two: see Lab.folder
TEACHER = {one.name for one in fields(Config)} - TAUGHT - (ALONE - SHARED) - OTHER
STAGE = {"MF-BPR": "alone", "LightGCN": "alone", "Teacher": "teacher", "PromptMM": "student"}
MATTERS = {"alone": ALONE, "teacher": TEACHER, "student": ALONE | TEACHER | TAUGHT}

# ---------------------------------------------------------------- the runner


@dataclass(frozen=True)
class Lab:
    """Where an experiment takes place: data, device, number of seeds, folders."""

    dataset: Dataset
    source: str  # "" for the embedded data, else the folder
    device: torch.device
    seeds: int  # 0: as many as the table asks for
    quick: bool
    out: Path

    @property
    def cache(self) -> Path:
        name = f"{self.dataset.name}-{data.fingerprint(self.dataset)[:12]}-{self.device.type}"
        return ROOT / "runs" / "experiments" / name

    def count(self, seeds: int) -> int:
        """How many seeds: as asked on the command line, else the part's own number."""
        return self.seeds or (1 if self.quick else seeds)

    def folder(self, model: str, config: Config) -> Path:
        """Where a trained model lies: named by the settings that matter for it, no others."""
        stage = STAGE[model]
        matter = {name: getattr(config, name) for name in MATTERS[stage]}
        for name in ("batch", "l2") if stage != "teacher" else ():  # the student may have its own
            if own := getattr(config, f"{name}_student"):
                matter[name if stage == "alone" else f"{name}_student"] = own
        return self.cache / f"{stage}-{digest(matter)}"


def digest(content) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def learn(lab: Lab, model: str, config: Config) -> Path:
    """Train one model, or find it trained. Its folder gets embeddings.npz and log.csv."""
    folder = lab.folder(model, config)
    if (folder / "embeddings.npz").exists():
        return folder
    teacher = load_teacher(lab, config) if model == "PromptMM" else None
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "config.json", json.dumps(vars(config), indent=1))
    state = folder / "state.pt"
    run = Run(folder, lab.dataset, config, lab.device,
              data.read_torch(state, lab.device) if state.exists() else {})
    with open(folder / "progress.txt", "a") as log, contextlib.redirect_stderr(log):
        pair = (train_teacher(run)()[:2] if model == "Teacher"
                else train_student(run, STAGE[model], teacher))
    user, item = (e.detach().cpu().numpy() for e in pair)
    write(folder / "embeddings.npz", lambda stream: np.savez(stream, user=user, item=item))
    state.unlink(missing_ok=True)
    return folder


def load_teacher(lab: Lab, config: Config) -> Teacher:
    """The trained teacher of these settings: frozen, in eval mode."""
    return train_teacher(Run(learn(lab, "Teacher", config), lab.dataset, config, lab.device, {}))


def learn_all(lab: Lab, title: str, jobs: list[tuple[str, Config]]) -> None:
    """Train what is not trained yet, a line for each, with the time left."""
    # A student brings its teacher along: list it, so that it is counted, and trained once.
    jobs = [job for model, config in jobs if model in STAGE
            for job in ([("Teacher", config)] if model == "PromptMM" else []) + [(model, config)]]
    todo = {lab.folder(*job): job for job in jobs
            if not (lab.folder(*job) / "embeddings.npz").exists()}
    began = time.perf_counter()
    for n, job in enumerate(todo.values(), 1):
        log = log_of(learn(lab, *job))
        spent = time.perf_counter() - began
        print(f"{lab.dataset.name} {title} {n}/{len(todo)}: {job[0]}, seed {job[1].seed}, "
              f"{log['epoch'][-1]:.0f} epochs, validation {log['recall@20'].max():.4f}; "
              f"{spent:.0f} s, about {spent / n * (len(todo) - n):.0f} s left", flush=True)


def log_of(folder: Path) -> dict[str, np.ndarray]:
    """The columns of a log.csv, its stage aside."""
    names, *rows = (line.split(",") for line in (folder / "log.csv").read_text().splitlines())
    columns = zip(*rows, strict=True)
    return {name: np.array(column, float) for name, column in zip(names, columns, strict=True)
            if name != "stage"}


def embeddings(lab: Lab, model: str, config: Config) -> list[torch.Tensor]:
    """E_u, E_i of a trained model; popularity as embeddings of width 1 for MostPop."""
    train = lab.dataset.train
    if model == "MostPop":
        popularity = torch.from_numpy(np.asarray(train.sum(0), np.float32)).T
        return [torch.ones(train.shape[0], 1), popularity]
    with np.load(learn(lab, model, config) / "embeddings.npz") as stored:
        return [torch.from_numpy(stored[side]).to(lab.device) for side in ("user", "item")]


def judge(lab: Lab, model: str, config: Config, split: str = "test") -> dict[str, np.ndarray]:
    """Metrics of each evaluated user [n] by name; on the test split, of the selected epoch only."""
    file = learn(lab, model, config) / f"{split}.npz" if model in STAGE else None
    if file and file.exists():
        with np.load(file) as stored:
            return dict(stored)
    dataset = lab.dataset
    exclude = dataset.train if split == "val" else dataset.train + dataset.val
    found = evaluate(*embeddings(lab, model, config), getattr(dataset, split), exclude,
                     per_user=True)["per_user"]
    if file:
        write(file, lambda stream: np.savez(stream, **found))
    return found


def spread(runs) -> dict:
    """Mean, standard deviation and the values themselves."""
    runs = np.asarray(runs, float)
    return {"mean": float(runs.mean()), "std": float(runs.std(ddof=1)) if len(runs) > 1 else 0.0,
            "runs": runs.tolist()}


def seeded(lab: Lab, config: Config, seeds: int) -> list[Config]:
    return [replace(config, seed=seed) for seed in range(lab.count(seeds))]


def search(lab: Lab) -> dict:
    """What `tune` found on exactly these data, or nothing.

    The embedded data need no fingerprint; theirs varies in the last bits with the CPU's threads.
    """
    file = ROOT / "results" / lab.dataset.name / "tune.json"
    found = data.read_json(file, "best", "tried") if file.exists() else {}
    same = not lab.source or found.get("fingerprint") == data.fingerprint(lab.dataset)
    return found if same else {}


def settings(lab: Lab, model: str = "PromptMM") -> Config:
    """What the search chose for a model on these data; without a search the defaults."""
    chosen = search(lab).get("best", {}).get(model, {})
    chosen = {"student_layers": 0, **chosen} if model == "MF-BPR" else chosen
    return Config(**chosen | ({"epochs": 2, "eval_every": 1} if lab.quick else {}))


def compare(lab: Lab, title: str, rows: dict[str, tuple[str, Config]], seeds: int,
            reference: str) -> list[dict]:
    """Mean, std and runs of each row, and a paired test over users against the reference row."""
    learn_all(lab, title, [(model, one) for model, config in rows.values()
                           for one in seeded(lab, config, seeds)])
    values, table = {}, []
    for name, (model, config) in rows.items():
        runs = [judge(lab, model, one) for one in seeded(lab, config, seeds)]
        values[name] = {metric: np.stack([run[metric] for run in runs]) for metric in runs[0]}
    for name, found in values.items():
        row = {"model": name}
        for metric in ("recall@20", "ndcg@20", "recall@50", "ndcg@50"):
            row[metric] = spread(found[metric].mean(1))
        for key, metric in (("p", "recall@20"), ("p_ndcg", "ndcg@20")):
            if name != reference:
                test = paired_test(found[metric], values[reference][metric])
                row |= {key: test["p_bootstrap"], f"{key}_wilcoxon": test["p_wilcoxon"],
                        f"{key}_interval": [test["low"], test["high"]]}
        table.append(row)
    for row in table:
        base = next(other for other in table if other["model"] == reference)
        row["gain"] = {m: row[m]["mean"] / base[m]["mean"] - 1 if base[m]["mean"] else np.nan
                       for m in ("recall@20", "ndcg@20")}
    return table


# ---------------------------------------------------------------- output


def cell(value) -> str:
    """A value as a table shows it."""
    if isinstance(value, dict):
        spread = f" ± {value['std']:.4f}" if len(value["runs"]) > 1 else ""
        return f"{value['mean']:.4f}{spread}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def markdown(rows: list[dict], columns: dict[str, str]) -> str:
    """Rows as a table; columns: key -> heading."""
    lines = [columns.values(), ["---"] * len(columns)]
    lines += [[cell(row.get(key, "")) for key in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ranking_table(rows: list[dict], reference: str) -> str:
    """The usual columns of a comparison: both metrics, the gain over the reference, p."""
    shown = [{**row, "gain_r": f"{row['gain']['recall@20']:+.1%}",
              "gain_n": f"{row['gain']['ndcg@20']:+.1%}"} for row in rows]
    return markdown(shown, {
        "model": "model", "recall@20": "Recall@20", "ndcg@20": "NDCG@20",
        "gain_r": f"R over {reference}", "gain_n": "N over it", "p": "p (R)", "p_ndcg": "p (N)"})


def protocol(config: Config, seeds: int) -> str:
    return (f"selection by validation Recall@20 every {config.eval_every} epochs, patience "
            f"{config.patience} evaluations; test read once, at the selected epoch; all items "
            f"ranked except the user's training and validation items; seeds 0 to {seeds - 1}; "
            "mean ± standard deviation over seeds")


PAIRED = ("p: paired bootstrap over users of the values averaged over seeds, 10,000 draws (so "
          "never below 0.0001)")


@dataclass
class Output:
    """What an experiment found: rows for the JSON, a table or text, perhaps a plot."""

    title: str
    rows: list
    text: str
    note: str = ""
    plot: object = None  # plot(figure) draws it
    extra: dict = field(default_factory=dict)  # more for the JSON


def publish(lab: Lab, folder: Path, name: str, output: Output, seconds: float, seeds: int,
            flags: list[str]) -> Path:
    """<name>.md, .json, and .png where there is something to draw, with how they were made."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = [f"--data {Path(lab.source).name}"] * bool(lab.source) + flags
    flags += ["--quick"] * lab.quick
    facts = {
        "command": " ".join(["python experiments.py", name, *flags]),
        "seeds": seeds, "device": str(lab.device), "threads": torch.get_num_threads(),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                     "numpy": np.__version__, "scipy": scipy.__version__},
        "wall_seconds": round(seconds, 1), "protocol": output.note}
    image = f"\n![{output.title}]({name}.png)\n" if output.plot else ""
    content = {"title": output.title, "rows": output.rows, **output.extra, **facts}
    write(folder / f"{name}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    versions = ", ".join(f"{package} {number}" for package, number in facts["versions"].items())
    write(folder / f"{name}.md",
          f"# {output.title}\n\n<!-- table -->\n{output.text}\n<!-- end -->\n{image}\n"
          f"{output.note}\n\n`{facts['command']}` · {seeds} seed{'s' * (seeds != 1)} · "
          f"{facts['device']}, {facts['threads']} threads · {versions} · {seconds:.0f} s, models "
          "trained before not counted\n")
    if output.plot:
        draw(output.plot, folder / f"{name}.png")
    print(f"{folder / name}.md\n{output.text}\n", flush=True)
    return folder / f"{name}.md"


def draw(plot, file: Path) -> None:
    """A PNG at README width, where the extra [plot] is installed."""
    try:
        import matplotlib
    except ImportError:
        print(f"skipped {file.name}: pip install '.[plot]' draws it")
        return
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    style = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9,
             "axes.prop_cycle": matplotlib.cycler(  # Okabe and Ito's, safe for colour-blind eyes
                 color=["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"])}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
        try:
            plot(figure)
        except ImportError as error:
            print(f"skipped {file.name}: {error}; pip install '.[plot]' draws it")
            return
        write(file, partial(figure.savefig, format="png"))



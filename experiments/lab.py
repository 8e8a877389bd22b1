"""What every experiment shares: train a model once, judge it, compare it with others.

    Lab        the data, the device, where things go
    Job        a model to be trained: its name, its settings
    learn      one trained model, from the cache where it is there
    judge      its metrics for each user
    compare    rows of mean ± std over seeds, with a paired test

A trained model lies in a folder that is named by what decides it: the data, the settings
that matter for this model, and the code. Which settings matter is written at each field of
its settings (`of=…`), nowhere else.
"""

import ast
import contextlib
import fcntl
import hashlib
import inspect
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy
import torch
from torch import Tensor, nn

import baselines.common
import data
import distillers.common
from baselines import MODELS
from baselines.profile import late_fusion, profile
from data import DataError, Dataset, need, write
from distillers import METHODS
from evaluate import evaluate, most_popular, paired_test, spread as size_of
from promptmm import (
    Config,
    Pair,
    Run,
    Teacher,
    frozen_teacher,
    train_student,
    train_teacher,
)

CODE = Path(__file__).resolve().parent.parent
ROOT = CODE  # what holds runs/ and results/
CORE = tuple(CODE / f"{name}.py" for name in ("promptmm", "losses", "data", "evaluate"))
IMPORTED = {  # the code that runs, whatever is edited meanwhile
    file: file.read_text()
    for folder in ("", "baselines", "distillers", "experiments")
    for file in (CODE / folder).glob("*.py")
}
VERSIONS = {
    "torch": torch.__version__,
    "numpy": np.__version__,
    "scipy": scipy.__version__,
}
QUICK = {"epochs": 2, "eval_every": 1}  # a smoke test's settings
SHOWN = ("recall@20", "ndcg@20", "recall@50", "ndcg@50")  # the metrics of a row
ALIKE = ("dim", "eval_every", "patience")  # that an unsearched model has of LightGCN's
Values = dict[str, np.ndarray]  # by metric, of each seed and user [seeds, users]
TESTED = {"p": "recall@20", "p_ndcg": "ndcg@20"}  # the paired tests of a row


FUSED = "LightGCN + profile"  # trained as LightGCN is, and nothing more
FROZEN = METHODS["PromptMM, prompt frozen"]
DISTILLED = ", distilled"  # PromptMM's student; what teaches is the model named before


def names(lab: "Lab") -> tuple[str, ...]:
    """The rows of Table 4, a ladder; a new model joins them by its line in MODELS."""
    profiles = [f"Profile ({m})" for m in lab.dataset.features]
    return ("MostPop", *profiles, *MODELS, FUSED, "Teacher", "PromptMM")


def is_untrained(model: str) -> bool:
    return model == "MostPop" or model.startswith("Profile (")


def source(model: str) -> str:
    """Which comparison model teaches a student in the place of PromptMM's teacher, or "".

    >>> source("SLMRec, distilled"), source("SLMRec")
    ('SLMRec', '')
    """
    return model.removesuffix(DISTILLED) if model.endswith(DISTILLED) else ""


def needs(model: str, config: Config) -> tuple[str, ...]:
    """Which trained models teach it, in the words of distillers/__init__.py."""
    if model in METHODS:
        return getattr(METHODS[model], "needs", lambda _: ("joint",))(config)
    return ("joint",) if model == "PromptMM" else ()


def settings_class(model: str) -> type[Config]:
    """Config, or what a comparison model or a method has in its place."""
    own = MODELS.get(model) or METHODS.get(model)
    return getattr(own, "Settings", Config)


# ------------------------------------------------------------ where things are


@dataclass(frozen=True)
class Lab:
    """Where an experiment takes place: data, device, number of seeds, folders."""

    dataset: Dataset
    source: str  # "" for the embedded data, else the folder
    device: torch.device
    seeds: int  # 0: as many as the part asks for
    quick: bool
    out: Path
    keep: bool = False  # accept models that other code has trained
    origin: str = ""  # of data changed by `with_data`: the fingerprint of what they were
    beneath: "Lab | None" = None  # whose LightGCN teachers stand on: it reads no feature
    chosen: dict = field(default_factory=dict, compare=False)  # while a search goes on
    searches: dict[str, dict] = field(default_factory=dict, compare=False)  # read before
    used: set[Path] = field(default_factory=set, compare=False)  # models, by folder
    side_by_side: int = 1  # models trained at a time, each in a process of its own

    @cached_property
    def fingerprint(self) -> str:
        return data.fingerprint(self.dataset)  # reads every feature: once is enough

    @property
    def home(self) -> Path:
        """All that is kept about datasets of this name; `all --force` removes it."""
        return ROOT / "runs" / "experiments" / self.dataset.name

    @property
    def cache(self) -> Path:
        return self.home / f"{self.fingerprint[:12]}-{self.device.type}"

    def count(self, seeds: int) -> int:
        """How many seeds: as asked on the command line, else the part's own number.

        On real data at least five, where there are several.
        """
        if self.seeds:
            return self.seeds
        if self.quick:
            return 1
        return max(seeds, 5) if self.source and seeds > 1 else seeds

    def folder(self, model: str, config: Config, kind: type = Teacher) -> Path:
        """Where a trained model lies; with `keep` one of older code will do."""
        matter = decided_by(model, config)
        if teacher := source(model):
            matter["teacher"] = decided_by(teacher, source_settings(self, model, config))
        elif model not in MODELS:  # it stands on a trained LightGCN
            matter["lightgcn"] = decided_by("LightGCN", ids_settings(self, config))
        name = model if kind is Teacher else f"{model} {kind.__name__}"
        stem = f"{slug(name)}-{digest(matter)}"
        exact = self.cache / f"{stem}-{code_digest(sources(model, kind))}"
        if not self.keep or is_trained(exact):
            return exact
        others = [other for other in self.cache.glob(f"{stem}-*") if is_trained(other)]
        return max(others, key=trained_at, default=exact)


class Job(NamedTuple):
    """A model to be trained. kind: the class of the teacher, where it is or has one."""

    model: str
    config: Config
    kind: type = Teacher


def decided_by(model: str, config: Config) -> dict:
    """The settings that decide what a trained model is."""
    return {
        one.name: getattr(config, one.name)
        for one in fields(config)
        if one.metadata["of"] in deciding(model)
    }


def ids_settings(lab: Lab, config: Config) -> Config:
    """Those of the LightGCN that is a teacher's ids: its own search's, the same seed."""
    return replace(settings(lab, "LightGCN"), seed=config.seed)


def source_settings(lab: Lab, model: str, config: Config) -> Config:
    """Those of the comparison model that teaches: its own search's, the same seed."""
    return replace(settings(lab, source(model)), seed=config.seed)


def with_data(lab: Lab, dataset: Dataset) -> Lab:
    """The lab with other data of the same kind, under the settings of its own."""
    same = dataset.train is lab.dataset.train and dataset.val is lab.dataset.val
    beneath = (lab.beneath or lab) if same else None
    origin = lab.origin or lab.fingerprint
    return replace(lab, dataset=dataset, origin=origin, beneath=beneath)


def deciding(model: str) -> tuple[str, ...]:
    """Whose settings decide what a trained model is, in the words of `setting(…, of=…)`."""
    if model in MODELS:
        return ("both", "student", "model")
    if model == "Teacher":
        return ("both", "teacher")
    own = "distillation" if settings_class(model) is Config else "method"
    return ("both", "teacher", "student", own)


def slug(name: str) -> str:
    """
    >>> slug("PromptMM, prompt frozen")
    'promptmm-prompt-frozen'
    """
    return "-".join(re.findall(r"[a-z0-9]+", name.lower()))


def digest(content) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def is_trained(folder: Path) -> bool:
    return (folder / "embeddings.npz").exists()


def trained_at(folder: Path) -> float:
    return (folder / "embeddings.npz").stat().st_mtime


# ------------------------------------------------------------ the code that trained it


def sources(model: str, kind: type = Teacher) -> tuple[Path, ...]:
    """The files whose code decides what a trained model is: the core's, and its own.

    A teacher stands on a LightGCN, and a student on a teacher: these count too.
    """
    beneath = source(model) or (model if model in MODELS else "LightGCN")
    own = [baselines.common, *ancestry(MODELS[beneath])]
    if source(model):
        own += [distillers.common, FROZEN]
    if model in METHODS:
        own += [distillers.common, METHODS[model], *neighbours(METHODS[model])]
    if kind is not Teacher:
        own += ancestry(kind)
    files = {Path(inspect.getsourcefile(part)).resolve() for part in own}
    return CORE + tuple(sorted(files - {CODE / file.name for file in CORE}))


def neighbours(method) -> list:
    """What a method's file takes from other files of distillers/."""
    found = vars(inspect.getmodule(method)).values()
    return [
        one for one in found if getattr(one, "__module__", "").startswith("distillers.")
    ]


def ancestry(kind: type) -> list[type]:
    """A class and those it inherits from, as far as they are not torch's."""
    return [one for one in kind.__mro__ if one not in nn.Module.__mro__]


ADDED = (  # functions of this file: who teaches a model, how it is judged
    "trained_pair",
    "scaled",
    "teachers_for",
    "each_alone",
    "ids_of",
    "load_teacher",
    "per_user",
    "figures",
)


@cache
def code_digest(files: tuple[Path, ...]) -> str:
    """Of what the code does: comments and docstrings do not count, torch's version does.

    With what this file adds to a model: ADDED.
    """
    here = ast.parse(IMPORTED[Path(__file__).resolve()]).body
    own = [ast.unparse(one) for one in here if getattr(one, "name", "") in ADDED]
    code = [IMPORTED.get(file) or file.read_text() for file in files]
    return digest([torch.__version__, *map(bare, code + own)])


@cache
def bare(source: str) -> str:
    """Code without its comments and docstrings, in a form of its own.

    >>> bare("x = 1  # one") == bare("'What x is.'; x = 1")
    True
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node) is not None:
            del node.body[0]
    return ast.dump(tree)


# ------------------------------------------------------------ train once


def learn(lab: Lab, model: str, config: Config, kind: type = Teacher) -> Path:
    """Train one model, or find it trained. Its folder gets embeddings.npz and log.csv."""
    folder = lab.folder(model, config, kind)
    if not is_trained(folder):
        with locked(folder):
            if not is_trained(folder):  # another process may have been at it meanwhile
                train(lab, folder, Job(model, config, kind))
    every = with_teachers(lab, [Job(model, config, kind)])  # itself among them
    lab.used.update(lab.folder(*job) for job in every)
    return folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time; the others wait. The system lets go when the process ends.

    Every file of the folder is written so: what drafts there are, a killed process left.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for draft in folder.glob("*.tmp"):
            draft.unlink()
        yield


def train(lab: Lab, folder: Path, job: Job) -> None:
    """Train a model in its folder, or go on where an interrupted process stopped."""
    write(folder / "config.json", decided_by(job.model, job.config))
    file = folder / "state.pt"
    state = data.read_torch(file, lab.device) if file.exists() else {}
    run = Run(folder, lab.dataset, job.config, lab.device, state)
    with open(folder / "progress.txt", "a") as log, contextlib.redirect_stderr(log):
        pair = trained_pair(lab, run, job)
    user, item = (e.detach().cpu().numpy() for e in pair)
    code = code_digest(sources(job.model, job.kind))
    facts = circumstances(folder) | {"code": code}
    write(folder / "trained.json", facts)
    file.unlink(missing_ok=True)  # before the embeddings, which end it
    write(folder / "embeddings.npz", lambda stream: np.savez(stream, user=user, item=item))


def trained_pair(lab: Lab, run: Run, job: Job) -> tuple[Tensor, Tensor]:
    """E_u [U, d] and E_i [I, d] of whatever kind of model a job asks for."""
    model, config, kind = job
    if model in MODELS:
        return baselines.common.train(run, MODELS[model])
    if model == "Teacher":
        return train_teacher(run, ids_of(lab, config), kind)()[:2]
    if teacher := source(model):
        pair = embeddings(lab, teacher, source_settings(lab, model, config))
        return distillers.common.train(run, FROZEN, {"joint": scaled(*pair)})
    if model in METHODS:
        teachers = teachers_for(lab, job)
        if teachers or not needs(model, config):
            return distillers.common.train(run, METHODS[model], teachers)
        print("no modality weighs anything: this is LightGCN", file=sys.stderr)
        return train_student(run, "method")
    return train_student(run, "student", load_teacher(lab, config, kind))


def scaled(user: Tensor, item: Tensor) -> Pair:
    """E_u [U, e], E_i [I, e] with logits on the scale of `promptmm.frozen_teacher`'s."""
    return user / size_of(user, item), item


def teachers_for(lab: Lab, job: Job) -> distillers.common.Teachers:
    """The frozen embeddings that teach a method; none if no modality weighs anything.

    A uni-modal teacher that knows no more than LightGCN is left out, and its modality.
    """
    taken = {"joint", "lightgcn", "spectral"} & set(lab.dataset.features)
    need(not taken, f"expected modalities of other names, found {', '.join(taken)}")
    frozen = replace(job.config, tune_prompt=False)
    words = needs(job.model, job.config)
    found: distillers.common.Teachers = {}
    if "alone" in words:
        for m, place in each_alone(lab).items():
            encode = frozen_teacher(load_teacher(place, frozen), frozen)
            found |= {m: encode()[:2]} if encode else {}
    if "joint" in words:
        encode = frozen_teacher(load_teacher(lab, frozen, job.kind), frozen)
        found |= distillers.common.teachers_of(encode()) if encode else {}
    if found and "lightgcn" in words:
        found["lightgcn"] = ids_of(lab, frozen)
    return found


def each_alone(lab: Lab) -> dict[str, Lab]:
    """A lab for each modality that has its features only: where uni-modal teachers lie."""
    features = lab.dataset.features.items()
    return {m: with_data(lab, replace(lab.dataset, features={m: x})) for m, x in features}


def ids_of(lab: Lab, config: Config) -> Pair:
    """E_u [U, d], E_i [I, d] of the LightGCN that a teacher stands on."""
    place = lab.beneath or lab
    return embeddings(place, "LightGCN", ids_settings(place, config))


def circumstances(folder: Path) -> dict:
    """When and with what a model was trained; seconds are those of training alone."""
    found = {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    found |= VERSIONS | {"threads": torch.get_num_threads()}
    found["log"] = data.digest((folder / "log.csv").read_bytes())
    return found | {"seconds": float(columns_of(folder)["seconds"][-1])}


def load_teacher(lab: Lab, config: Config, kind: type = Teacher) -> Teacher:
    """The trained teacher of these settings: frozen, in eval mode."""
    folder = learn(lab, "Teacher", config, kind)
    run = Run(folder, lab.dataset, config, lab.device, {})
    return train_teacher(run, ids_of(lab, config), kind)


def weights_of(lab: Lab, teachers: list[Job]) -> dict[str, list[float]]:
    """w_m of trained teachers, seed by seed, for each modality."""
    files = [learn(lab, *job) / "teacher.pt" for job in teachers]
    stored = [data.read_torch(file, torch.device("cpu"))["weights"] for file in files]
    by_modality = torch.stack(stored).T.tolist()  # [|M|, seeds]
    pairs = zip(lab.dataset.features, by_modality, strict=True)
    return {m: [round(weight, 4) for weight in found] for m, found in pairs}


def student_weights(folder: Path, device) -> dict[str, Tensor]:
    """The trained student's own parameters; a tuned prompt beside them is left out."""
    stored = data.read_torch(folder / "student.pt", device)
    return {
        name.removeprefix("student."): weight
        for name, weight in stored.items()
        if name.startswith("student.")
    }


def learn_all(lab: Lab, title: str, jobs: list[Job]) -> None:
    """Train what is not trained yet, a line for each, with the time left."""
    todo = {}
    for job in with_teachers(lab, jobs):
        folder = lab.folder(*job)
        lab.used.add(folder)
        if not is_trained(folder):
            todo[folder] = job
    began = time.perf_counter()
    for n, (job, folder) in enumerate(learn_each(lab, list(todo.values())), 1):
        log = log_of(folder)
        epochs, best = log["epoch"][-1], log["recall@20"].max()
        spent = time.perf_counter() - began
        left = spent / n * (len(todo) - n)
        where = f"{lab.dataset.name} {title} {n}/{len(todo)}"
        what = f"{job.model}, seed {job.config.seed}, {epochs:.0f} epochs"
        pace = f"{spent:.0f} s, about {left:.0f} s left"
        print(f"{where}: {what}, validation {best:.4f}; {pace}", flush=True)


def learn_each(lab: Lab, jobs: list[Job]) -> Iterator[tuple[Job, Path]]:
    """Each job and its folder, as it is trained: one by one, or some side by side.

    Side by side each has a thread. What teaches comes first: a student whose teacher is
    still being trained waits for it (`locked`).
    """
    if lab.side_by_side == 1 or len(jobs) < 2:
        for job in jobs:
            yield job, learn(lab, *job)
        return
    in_turn = sorted(
        jobs, key=lambda job: (job.model not in MODELS, job.model != "Teacher")
    )
    context = multiprocessing.get_context("spawn")
    given = ROOT, lab.device
    code = digest(sorted(IMPORTED.values()))
    with ProcessPoolExecutor(lab.side_by_side, context, prepare, given) as pool:
        begun = {pool.submit(learn_as, code, lab, job): job for job in in_turn}
        pool.submit(int)  # wakes the pool, which else may not watch the last process
        try:
            for future in as_completed(begun):
                yield begun[future], future.result()
        except BrokenProcessPool:
            found = "--jobs: a process was killed, perhaps for its memory"
            raise DataError(f"{found}; expected fewer of them, or none") from None
        except BaseException:
            for process in multiprocessing.active_children():
                process.terminate()  # what it trained is kept, to the last epoch
            raise


def learn_as(code: str, lab: Lab, job: Job) -> Path:
    """`learn` in a process that has read the files anew: they must be the caller's."""
    same = code == digest(sorted(IMPORTED.values()))
    need(
        same, "--jobs: a source file was edited meanwhile; expected no edits while it runs"
    )
    return learn(lab, *job)


def prepare(root: Path, device: torch.device) -> None:
    """What a process needs before it trains: folders, one thread; its caller ends it."""
    global ROOT
    ROOT = root
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    data.same_figures(device)


def with_teachers(lab: Lab, jobs: Iterable[Job]) -> Iterator[Job]:
    """A student brings its teacher along: listed, it is counted too, and trained once."""
    for job in jobs:
        words = needs(job.model, job.config)
        if {"joint", "lightgcn"} & set(words) or job.model == "Teacher":
            yield from with_ids(lab, job)
        if "joint" in words:
            yield job._replace(model="Teacher")
        if teacher := source(job.model):
            yield Job(teacher, source_settings(lab, job.model, job.config))
        if job.model == FUSED:
            yield from with_ids(lab, job)
        elif not is_untrained(job.model):
            yield job


def with_ids(lab: Lab, job: Job) -> Iterator[Job]:
    if not lab.beneath:  # else it is not in this lab
        yield Job("LightGCN", ids_settings(lab, job.config))


def log_of(folder: Path) -> dict[str, np.ndarray]:
    """The columns of a trained model's log.csv, if it is as training left it."""
    file = folder / "log.csv"
    facts = data.read_json(folder / "trained.json", "log", sealed=True)
    with data.reading(file):
        same = data.digest(file.read_bytes()) == facts["log"]
        need(same, "cannot be read: damaged, its digest is not that of trained.json")
    return columns_of(folder)


def columns_of(folder: Path) -> dict[str, np.ndarray]:
    """The columns of a log.csv, its stage aside."""
    lines = (folder / "log.csv").read_text().splitlines()
    header, *rows = (line.split(",") for line in lines)
    columns = dict(zip(header, zip(*rows, strict=True), strict=True))
    del columns["stage"]
    return {
        name: np.array([float(cell or "nan") for cell in column])
        for name, column in columns.items()
    }


# ------------------------------------------------------------ judge and compare


def embeddings(lab: Lab, model: str, config: Config, kind: type = Teacher) -> Pair:
    """E_u [U, e], E_i [I, e] of any row of Table 4."""
    if is_untrained(model):
        return untrained(lab, model)
    if model == FUSED:
        return late_fusion(lab.dataset, ids_of(lab, config))[0]
    stored = data.read_arrays(learn(lab, model, config, kind) / "embeddings.npz")
    user, item = (torch.from_numpy(stored[side]) for side in ("user", "item"))
    return user.to(lab.device), item.to(lab.device)


def untrained(lab: Lab, model: str) -> Pair:
    """Popularity as embeddings of width 1, or the profile of one modality."""
    train = lab.dataset.train
    if model == "MostPop":
        return most_popular(train, lab.device)
    x = lab.dataset.features[model.removeprefix("Profile (").removesuffix(")")]
    return profile(train, x, lab.device)


def judge(
    lab: Lab, model: str, config: Config, kind: type = Teacher, split: str = "test"
) -> dict[str, np.ndarray]:
    """Metrics of each evaluated user [n] by name; on test, of the selected epoch only."""
    if is_untrained(model):
        return per_user(lab, Job(model, config), split)
    judged_by = [CODE / "evaluate.py"]  # --keep takes older models, never older figures
    if model == FUSED:  # kept beside its LightGCN
        judged_by = [*CORE, CODE / "baselines" / "profile.py"]
        name = f"fused-{lab.fingerprint[:12]}-{split}"
        folder = learn(lab.beneath or lab, "LightGCN", ids_settings(lab, config))
    else:
        name = split
        folder = learn(lab, model, config, kind)
    file = folder / f"{name}-{code_digest(tuple(judged_by))}.npz"
    if file.exists():
        return data.read_arrays(file)
    found = per_user(lab, Job(model, config, kind), split)
    with locked(file.parent):
        write(file, lambda stream: np.savez(stream, **found))
    return found


def recall(lab: Lab, job: Job, split: str = "test") -> float:
    """Mean Recall@20 over a split's users; on "val" where something is chosen by it."""
    return float(judge(lab, *job, split=split)["recall@20"].mean())


def per_user(lab: Lab, job: Job, split: str) -> dict[str, np.ndarray]:
    return figures(lab.dataset, embeddings(lab, *job), split, per_user=True)["per_user"]


def figures(dataset: Dataset, pair, split: str = "test", per_user: bool = False) -> dict:
    """Metrics of E_u [U, e], E_i [I, e]; what was known before a split is no candidate."""
    exclude = dataset.train if split == "val" else dataset.train + dataset.val
    return evaluate(*pair, getattr(dataset, split), exclude, per_user=per_user)


def spread(runs) -> dict:
    """Mean, standard deviation and the values themselves."""
    runs = np.asarray(runs, float)
    std = float(runs.std(ddof=1)) if len(runs) > 1 else 0.0
    return {"mean": float(runs.mean()), "std": std, "runs": runs.tolist()}


def seeded(job: Job, seeds: int) -> list[Job]:
    return [job._replace(config=replace(job.config, seed=seed)) for seed in range(seeds)]


def compare(
    lab: Lab,
    title: str,
    rows: dict[str, Job],
    seeds: int | dict[str, int],
    reference: str,
    elsewhere: dict[str, Lab] | None = None,
) -> list[dict]:
    """Mean, std and runs of each row, a test over users and seeds against the reference.

    p: Holm's over the rows, by metric; p_single: of the row alone. seeds: of every row, or
    of each by name.

    elsewhere: rows that are trained on other features for the same interactions.
    """
    counts = seeds if isinstance(seeds, dict) else dict.fromkeys(rows, seeds)
    every = {name: seeded(job, counts[name]) for name, job in rows.items()}
    labs = dict.fromkeys(rows, lab) | (elsewhere or {})
    for place in {id(one): one for one in labs.values()}.values():
        jobs = [one for name in rows if labs[name] is place for one in every[name]]
        learn_all(place, title, jobs)
    values = {name: judged(labs[name], every[name]) for name in rows}
    table = []
    for name, found in values.items():
        row = {"model": name} | {metric: spread(found[metric].mean(1)) for metric in SHOWN}
        if name != reference:
            row |= significance(found, values[reference])
        table.append(row | {"gain": gains(found, values[reference])})
    adjust(table, *TESTED)
    return table


def judged(lab: Lab, jobs: list[Job]) -> Values:
    """A row's runs on the test split, by metric: [seeds, users].

    What nobody trained is the same under any seed: it is judged once.
    """
    few = jobs[:1] if is_untrained(jobs[0].model) else jobs
    runs = [judge(lab, *one) for one in few] * (len(jobs) // len(few))
    return {key: np.stack([run[key] for run in runs]) for key in runs[0]}


def adjust(table: list[dict], *keys: str) -> None:
    """p, by key, becomes Holm's over the rows that have one; p_single: of the row alone."""
    for key in keys:
        single = f"{key}_single"
        tested = [row for row in table if key in row]
        adjusted = holm([row.setdefault(single, row[key]) for row in tested])
        for row, p in zip(tested, adjusted, strict=True):
            row[key] = p


def p_against(lab: Lab, runs: dict[str, list[Job]], reference: str) -> dict[str, float]:
    """p of Recall@20 of each trained row against one of them, not adjusted."""
    values = {name: judged(lab, jobs)["recall@20"] for name, jobs in runs.items()}
    base = values.pop(reference)
    return {name: paired_test(found, base)["p_bootstrap"] for name, found in values.items()}


def holm(p_values: list[float]) -> list[float]:
    """Holm's adjustment for several tests at once: p that hold for all of them together.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def significance(found: Values, reference: Values) -> dict:
    """Is it better for the same users? p by bootstrap and by Wilcoxon, and the interval."""
    row = {}
    for key, metric in TESTED.items():
        test = paired_test(found[metric], reference[metric])
        row[key] = test["p_bootstrap"]
        row[f"{key}_wilcoxon"] = test["p_wilcoxon"]
        row[f"{key}_interval"] = [test["low"], test["high"]]
    return row


def gains(found: Values, reference: Values) -> dict[str, float | None]:
    """How much higher, as a share of the reference's mean; None if that is zero."""
    gain = {}
    for metric in TESTED.values():
        own, base = float(found[metric].mean()), float(reference[metric].mean())
        gain[metric] = own / base - 1 if base else None
    return gain


# ------------------------------------------------------------ settings


def search(lab: Lab, part: str = "tune") -> dict:
    """What `tune` found on exactly these data, in --out or else in results, or nothing.

    A part reads it once: another may be published while it trains. The embedded data are
    known without a fingerprint: their search holds whatever the last bits of their features
    are.
    """
    if part in lab.searches:
        return lab.searches[part]
    places = [
        out / lab.dataset.name / f"{part}.json" for out in (lab.out, ROOT / "results")
    ]
    file = next(filter(Path.exists, places), places[-1])
    found = data.read_json(file, "best", "tried") if file.exists() else {}
    searched_on = lab.origin or lab.fingerprint
    same = not lab.source or found.get("fingerprint") == searched_on
    return found if same else {}


def tries(found: dict) -> dict[str, int]:
    """How many settings a search has tried, by model."""
    return dict(Counter(row["model"] for row in found.get("rows", [])))


def settings(lab: Lab, model: str = "PromptMM") -> Config:
    """What the search chose for a model on these data; without a search the defaults."""
    model = "LightGCN" if model == FUSED else model
    if source(model):  # the same student by the same lists; that teacher has no F^m
        same = settings(lab, "PromptMM")
        return replace(same, list_from="joint", lambda_embed=0.0, tune_prompt=False)
    found = lab.chosen or search(lab).get("best", {})
    chosen = found.get(model, {})
    if model in MODELS and model not in found:  # as wide as the others, as patient
        own = found.get("LightGCN", {})
        chosen = {name: own[name] for name in ALIKE if name in own}
    if settings_class(model) is not Config and model in METHODS:
        own = search(lab, "tune_methods").get("best", {}).get(model, {})
        chosen = method_start(found) | own | chosen
    return settings_class(model)(**chosen | (QUICK if lab.quick else {}))


def method_start(found: dict) -> dict:
    """Where a method begins: the teacher's search, and LightGCN's own for the student."""
    student = {one.name for one in fields(Config) if one.metadata["of"] == "student"}
    own = found.get("LightGCN", {})
    like = {name: value for name, value in own.items() if name in student}
    return found.get("Teacher", {}) | like


def some(lab: Lab, rows: Sequence, n: int) -> Sequence:
    """All of them; the first n in a smoke test, which need not try each of a kind."""
    return rows[:n] if lab.quick else rows


def known(names: str, among: Iterable[str], flag: str = "--models") -> list[str]:
    """The names asked for, in the order of all; DataError for another."""
    asked = names.split(",")
    unknown = [name for name in asked if name not in among]
    need(not unknown, f"{flag}: expected some of {', '.join(among)}, found {unknown}")
    return [name for name in among if name in asked]


# ------------------------------------------------------------ other processes


def child(command: list[str]) -> str:
    """What another Python process prints; if it fails, its last line as our error.

    It runs in the caller's folder, so that relative paths mean the same there, and with as
    many threads.
    """
    path = [str(CODE), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = str(torch.get_num_threads())
    found = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": threads},
    )
    need(not found.returncode, (found.stderr.strip().splitlines() or ["no message"])[-1])
    return found.stdout


def module(name: str) -> list[str]:
    """How a child's command begins that runs a module of this package, and no namesake."""
    return ["-P", "-m", f"experiments.{name}"]

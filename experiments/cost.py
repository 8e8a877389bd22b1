"""Section 4.4: what the teacher costs and what the student costs (Table 6).

Each row is measured in a process of its own, so that its peak of memory is its own:

    python -m experiments.cost --data DIR --run FOLDER --model teacher
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import nn

import data
from baselines import MODELS
from data import Dataset, Sampler
from experiments.comparison import CONTENT_FREE
from experiments.lab import (
    Job,
    Lab,
    child,
    learn_all,
    module,
    settings,
    settings_class,
    some,
    student_weights,
)
from experiments.publish import Output, markdown
from promptmm import (
    Config,
    Distillation,
    Run,
    Student,
    Teacher,
    Terms,
    frozen_teacher,
    pace,
    teacher_terms,
    train_epoch,
)

STAGES = ("teacher", "student, prompt tuned", "student, prompt frozen", "student alone")
OTHERS = tuple(model for model in MODELS if model != "LightGCN")  # the student alone is it
COSTS = (*STAGES, *OTHERS)
COLUMNS = {
    "model": "",
    "epoch": "s/epoch",
    "peak_train": "peak MiB, training",
    "trainable": "learnt",
    "buffers": "features",
    "learnt": "ratio, learnt",
    "all": "with features",
    "embed": "s to embeddings",
    "faster": "faster",
    "peak_embed": "peak MiB, embedding",
    "serve": "bytes to serve",
}
NOTE = (
    "each row is a process of its own, its peak that of the process, torch's own pages "
    "included; s/epoch: median of three, without validation, a distilled student's under a "
    "teacher in which every modality weighs; s to embeddings: median of five, from files "
    "to E_u and E_i, a teacher's principal components among it; bytes to serve: what must "
    "be held to refresh and serve embeddings, that is tables, and of the teacher "
    "reductions, prompt and features too; of a comparison model the features that it is "
    "trained with, though BM3 and FREEDOM rank without, and no item graph. Frozen final "
    "embeddings would be d wide for the student, d + Σ d_T for the teacher. The comparison "
    "models were trained for an epoch: what they cost does not depend on what they have "
    "learnt"
)


def table6(lab: Lab) -> Output:
    """Time, memory and size."""
    full, native = settings(lab), lab.cache / "native"
    if not native.exists():
        native.parent.mkdir(parents=True, exist_ok=True)
        data.save(lab.dataset, native)
    job = Job("PromptMM", full)
    shown = some(lab, COSTS, 2)
    brief = {
        model: Job(model, briefly(settings(lab, model)))
        for model in OTHERS
        if model in shown
    }
    learn_all(lab, "Table 6", [job, *brief.values()])
    folders = dict.fromkeys(STAGES, lab.folder(*job))
    folders["teacher"] = lab.folder("Teacher", full)
    folders |= {model: lab.folder(*one) for model, one in brief.items()}
    rows = []
    for model in shown:
        command = [*module("cost"), "--data", str(native), "--run", str(folders[model])]
        command += ["--model", model, "--device", str(lab.device)]
        rows.append({"model": model} | json.loads(child(command)))
    rows = [row | shares(row, rows[0]) for row in rows]
    title = f"Table 6. Cost on {lab.dataset.name}"
    return Output(title, rows, markdown(rows, COLUMNS), NOTE)


def briefly(config: Config) -> Config:
    """One epoch: what a comparison model costs does not depend on what it has learnt."""
    return replace(config, epochs=1)


def shares(row: dict, teacher: dict) -> dict:
    """A row beside the teacher's; peaks in whole MiB."""
    learnt = row["trainable"] / teacher["trainable"]
    every = sum(row[size] for size in ("trainable", "buffers"))
    every /= sum(teacher[size] for size in ("trainable", "buffers"))
    faster = teacher["embed"] / row["embed"]
    found = {"learnt": f"{learnt:.1%}", "all": f"{every:.1%}", "faster": f"{faster:.1f} x"}
    return found | {key: round(row[key]) for key in ("peak_embed", "peak_train")}


# ------------------------------------------------------------ one row, in its own process


def measure(model: str, source: Path, run: Path, device: str) -> dict:
    """From files to embeddings, then three epochs: seconds, peak memory, sizes."""
    stored = data.read_json(run / "config.json", sealed=True)
    config = settings_class(model)(**stored)
    config = replace(config, tune_prompt=model.endswith("tuned"))

    @torch.no_grad()
    def embed() -> nn.Module:
        learner = load(model, source, run, config, device)
        learner.eval()()
        return learner

    learner = embed()
    row = {"peak_embed": peak(device), "embed": median(embed, device, 5)} | sizes(learner)
    row["epoch"] = epoch(model, learner, needed(model, source), config, device)
    return row | {"peak_train": peak(device)}


def needed(model: str, source: Path) -> Dataset:
    """The data in files of the native layout, without features for who reads none."""
    if model in ("student alone", *CONTENT_FREE):
        parts = [sparse.load_npz(source / f"{s}.npz") for s in ("train", "val", "test")]
        return Dataset(source.name, *parts, {})
    return data.load(source, check=False)


def load(model: str, source: Path, run: Path, config: Config, device: str) -> nn.Module:
    """A trained model from its files, reading no more of the data than it needs."""
    if model == "teacher":
        weights = data.read_torch(run / "teacher.pt", device)
        ids = weights["user"], weights["item"]  # as wide as the best LightGCN
        learner = Teacher(data.load(source, check=False), config, device, ids)
        learner.load_state_dict(weights)
        return learner
    if model in MODELS:
        learner = MODELS[model](needed(model, source), config, device)
        learner.load_state_dict(data.read_torch(run / "model.pt", device))
        return learner
    learner = Student(sparse.load_npz(source / "train.npz"), config, device)
    learner.load_state_dict(student_weights(run, device))
    return learner


def sizes(model: nn.Module) -> dict[str, int]:
    """Numbers that are learnt, frozen ones, and bytes of both, which serving must hold."""
    weights = list(model.parameters())
    if isinstance(model, Teacher):
        weights += [model.user, model.item]  # LightGCN's, learnt before
    trainable = sum(weight.numel() for weight in weights)
    buffers = sum(x.numel() for x in getattr(model, "features", {}).values())
    return {"trainable": trainable, "buffers": buffers, "serve": 4 * (trainable + buffers)}


class Training(NamedTuple):
    """One kind of training."""

    learner: nn.Module
    terms: Terms  # of users [B] and lists [B, width]
    width: int
    each_epoch: Callable[[], None]


def epoch(
    kind: str, model: nn.Module, dataset: Dataset, config: Config, device: str
) -> float:
    """Seconds of one epoch of training."""
    training = objective(kind, model, dataset, config, device)
    learner, terms = training.learner, training.terms
    optimiser = torch.optim.AdamW(learner.parameters(), lr=1e-4, fused=True)
    sampler, generator = Sampler(dataset.train, device), torch.Generator(device)
    batch, _ = pace(config, kind, dataset.train.nnz)

    def once():
        training.each_epoch()
        samples = sampler.epoch(generator, training.width - 1)
        train_epoch(learner, optimiser, samples, batch, terms)

    return median(once, device, 3)


def objective(
    kind: str, model: nn.Module, dataset: Dataset, config: Config, device: str
) -> Training:
    """What one kind of training does, a student's under a teacher of untrained weights."""
    if kind == "teacher":
        return Training(model, partial(teacher_terms, model), 2, lambda: None)
    if kind in MODELS:
        each_epoch = getattr(model, "each_epoch", lambda: None)
        return Training(model, model.terms, model.width, each_epoch)
    learner = nn.ModuleDict({"student": model})
    encode = None
    if kind != "student alone":
        teacher = Teacher(dataset, config, device)
        encode = frozen_teacher(teacher, config)
        if teacher.prompt.weight.requires_grad:  # it is tuned
            learner["prompt"] = teacher.prompt
    taught = Distillation(Run(Path(), dataset, config, torch.device(device), {}), encode)
    learner["project"] = taught.project
    terms = partial(taught.terms, model)
    return Training(learner, terms, taught.width, taught.refresh)


# ------------------------------------------------------------ measuring


def median(call: Callable, device: str = "cpu", repeat: int = 9) -> float:
    """Seconds of a call: the median of `repeat`, after one to warm up."""
    seconds = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[1:]))


def peak(device: str) -> float:
    """MiB at most in use so far: of this process, or allocated on the GPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if not status.exists():  # on a Mac: bytes, the parent's pages among them
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lines = status.read_text().splitlines()
    [line] = [line for line in lines if line.startswith("VmHWM")]
    return int(line.split()[1]) / 2**10


def main(argv: list[str] | None = None) -> int:
    return data.guarded(command, argv, "begin again")


def command(argv: list[str]) -> None:
    parser = data.Parser(prog="experiments.cost", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", type=Path, required=True, help="dataset folder, native layout"
    )
    parser.add_argument(
        "--run", type=Path, required=True, help="folder of the trained model"
    )
    parser.add_argument("--model", choices=COSTS, required=True)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args = parser.parse_args(argv)
    device = str(data.pick_device(args.device))
    print(json.dumps(measure(args.model, args.data, args.run, device)))


if __name__ == "__main__":
    sys.exit(main())

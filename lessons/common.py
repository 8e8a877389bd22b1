"""What the lessons share: a short training, the command line, a picture.

Nothing here is part of an answer. A lesson has `measure(seed, quick)`, the numbers;
`show(found)`, its output; `claim(found)`, what it says about them, as a test; `YOURS`, the
name of the function to write, which hints.py checks; perhaps `draw(axes, found)`.
"""

import argparse
import contextlib
import io
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from data import Dataset, principal
from evaluate import best_unobserved, evaluate, one_scale
from promptmm import (
    Config,
    Pair,
    Run,
    Student,
    bpr_terms,
    fit,
    frozen_teacher,
    scores,
    train_student,
    train_teacher,
)

PICTURES = Path(__file__).parents[1] / "results" / "lessons"
SMALL = {  # of data.synthetic: enough for a gain that three seeds show
    "users": 800,
    "items": 500,
    "interactions": 8000,
    "unexplained": 0.1,
    "dims": {"acoustic": 48, "text": 64, "visual": 96},
}
SHORT = {  # of Config: the search's settings, with large steps and few epochs
    "dim": 32,
    "dim_teacher": 32,
    "student_layers": 3,
    "l2": 0.01,
    "lambda_list": 10.0,
    "batch": 2048,
    "batch_teacher": 4096,
    "lr_student": 0.02,
    "lr_teacher": 0.01,
    "epochs": 40,
    "eval_every": 5,
    "patience": 3,
    "patience_teacher": 1,
}


def short(seed: int, quick: bool, **changes) -> Config:
    """Settings of a training of seconds; with `quick`, of two epochs."""
    few = {"epochs": 2, "eval_every": 1} if quick else {}
    return Config(**{**SHORT, "seed": seed, **few, **changes})


@contextlib.contextmanager
def training(dataset: Dataset, config: Config) -> Iterator[Run]:
    """A Run as the core's stages take it: its folder is temporary, its log unseen."""
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stderr(io.StringIO()):
            yield Run(Path(folder), dataset, config, torch.device("cpu"), {})


def recall(pair: Pair, dataset: Dataset) -> float:
    """Recall@20 on test of embeddings [U, d], [I, d]."""
    exclude = dataset.train + dataset.val
    return evaluate(*pair, dataset.test, exclude, ks=(20,))["recall@20"]


def taught(dataset: Dataset, config: Config) -> tuple[Pair, Pair]:
    """LightGCN, and the teacher that stands on it, its logits of deviation 1."""
    with training(dataset, config) as run:
        lightgcn = train_student(run, "alone")
        encode = frozen_teacher(train_teacher(run, lightgcn), config)
    return lightgcn, encode()[:2] if encode else one_scale(lightgcn)


def by_bpr(model: Student, dataset: Dataset, config: Config, **steps: float) -> Pair:
    """Train what ranks as a student does, on the triplets alone (Eq. 13).

    steps: AdamW's, of the model's parts by name, where they are not `lr_student`.
    """

    def terms(users, lists):
        return bpr_terms(model, scores(*model(), users, lists), users, lists, config.l2)

    groups = []
    for name, weight in model.named_parameters():
        part, _, _ = name.partition(".")
        groups.append({"params": weight, "lr": steps.get(part, config.lr_student)})
    with training(dataset, config) as run:
        fit(run, "student", model, groups, 2, terms, model)
        model.losses = [row["bpr"] for row in run.state["rows"]]
    with torch.no_grad():
        return model()


def distil(run: Run, teacher: Pair, loss: Callable) -> Pair:
    """The student under BPR and one more loss, the loop that all ways of distilling share.

    loss(logits [B, K], taught [B, K], own [B, d], told [B, d]) -> []: student's and
    teacher's logits on lists of a positive, a random negative and ten of the teacher's best
    unobserved items; and item embeddings, the teacher's in d principal components.
    """
    config, train = run.config, run.dataset.train
    torch.manual_seed(config.seed)
    student = Student(train, config)
    best, _ = best_unobserved(*teacher, train, config.list_pool)  # [U, N]
    centred = teacher[1] - teacher[1].mean(0)  # [I, D]
    components = centred @ principal(centred, config.dim)[0]  # [I, d]

    def terms(users, pairs):
        column = torch.randint(best.shape[1], (len(users), config.negatives))
        lists = torch.cat([pairs, best[users[:, None], column]], dim=1)  # [B, K]
        user, item = student()  # [U, d], [I, d]
        logits = scores(user, item, users, lists)  # [B, K]
        drawn = lists[:, 1]  # a random item  [B]
        told = scores(*teacher, users, lists), item[drawn], components[drawn]
        own = bpr_terms(student, logits, users, lists, config.l2)
        return own | {"kd": loss(logits, *told)}

    groups = [{"params": student.parameters(), "lr": config.lr_student}]
    fit(run, "student", student, groups, 2, terms, student)
    with torch.no_grad():
        return student()


GROUPS = {"all": (0, 10**9), "never": (0, 0), "1-10": (1, 10), "> 10": (11, 10**9)}


def by_popularity(pair: Pair, dataset: Dataset) -> dict[str, float]:
    """Test Recall@20 of the items that training has so often, by GROUPS."""
    times = np.asarray(dataset.train.sum(0))  # [1, I]
    seen = dataset.train + dataset.val
    found = {}
    for name, (low, high) in GROUPS.items():
        target = dataset.test.multiply((times >= low) & (times <= high)).tocsr()
        target.eliminate_zeros()
        found[name] = evaluate(*pair, target, seen, ks=(20,))["recall@20"]
    return found


# ------------------------------------------------------------ your turn


CORE = "promptmm", "losses", "data", "evaluate"


def hint(lesson: dict, file: str) -> str:
    """What is wrong with the function that a file defines; "" if nothing is."""
    name = lesson["YOURS"]
    yours = runpy.run_path(file).get(name)
    if yours is None:
        return f"{file} defines no function {name}."
    if getattr(yours, "__module__", "") in CORE:
        return f"That is the core's own {name}: write yours."
    return judge(name, yours)


def judge(name: str, yours: Callable) -> str:
    """What lessons/hints.py says; what a function raises is a hint too."""
    from lessons import hints

    try:
        return getattr(hints, name)(yours)
    except Exception as error:  # a student's function may raise anything
        found = f"{type(error).__name__}: {error}"
        return f"It does not give what is asked for, or fails on the way ({found})."


# ------------------------------------------------------------ command line


def run(lesson: dict, argv: list[str] | None = None) -> int:
    """Answer the question, or check an answer to "your turn". lesson: its globals()."""
    parser = argparse.ArgumentParser(description=lesson["__doc__"].splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds; says nothing yet")
    parser.add_argument("--seed", type=int, default=0, help="of data and training")
    parser.add_argument("--check", metavar="FILE", help="with your function in it")
    args, _ = parser.parse_known_args(argv)  # an editor's kernel has flags of its own
    if args.seed < 0:
        parser.error(f"--seed: expected 0 or more, found {args.seed}")
    if args.check:
        if not Path(args.check).is_file():
            parser.error(f"--check: expected a file, found none at {args.check}")
        found = hint(lesson, args.check)
        print(f"Not yet. {found}" if found else "Right.")
        return int(bool(found))
    found = lesson["measure"](args.seed, args.quick)
    print(lesson["show"](found))
    if args.quick:
        print("(--quick: trained too shortly to mean anything)")
    elif "draw" in lesson and args.seed == 0:
        picture(lesson, found)
    return 0


def picture(lesson: dict, found) -> None:
    """Drawn into results/lessons/<name>.png, where matplotlib is installed."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        return
    style = {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8, 3.6), dpi=110, layout="constrained")
        lesson["draw"](figure.subplots(), found)
        PICTURES.mkdir(parents=True, exist_ok=True)
        name = Path(lesson["__file__"]).stem
        figure.savefig(PICTURES / f"{name}.png")
        print(f"picture: results/lessons/{name}.png", file=sys.stderr)


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")  # Okabe and Ito's

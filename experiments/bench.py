"""What is claimed to be fast, beside the usual way of doing it, in one run on this machine.

    python -m experiments bench [--threads N] [--data DIR]

A row is a median of repeated calls, but for Python's loops, which are timed once. Table 6's
rows are measured in cost.py.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

import data
from data import Dataset, Sampler, need
from evaluate import CHUNK_SCORES, evaluate
from experiments.cost import median, peak
from experiments.lab import child, module
from promptmm import (
    Config,
    Distillation,
    Fixed,
    Graph,
    Product,
    Run,
    Student,
    Teacher,
    adjacency,
    frozen_teacher,
    lightgcn,
    pace,
    scores,
    student_terms,
    teacher_terms,
    train_epoch,
)

GENERATED = {  # CiteULike's size
    "users": 4444,
    "items": 12_668,
    "interactions": 102_020,
    "dims": {"text": 768, "tags": 512},
}
WIDE = {  # where the direct form of Eq. 4 hurts
    "users": 20_000,
    "items": 20_000,
    "interactions": 200_000,
    "dims": {"visual": 4096, "text": 1024},
}
EMBEDDED = {"users": 1500, "items": 1000, "interactions": 24_000}  # of data.synthetic
GROWN = {"users": 4000, "items": 4000, "interactions": 100_000, "width": 256}
FACTORS = (1, 2, 4)
BATCH = 2048  # training edges in a step, but for bench_scale's
FROZEN, TUNED = "student, prompt frozen", "student, prompt tuned"
COPIED = 2**27  # floats, 512 MiB: far more than any cache holds

# ------------------------------------------------------------ the usual ways


def coo_lightgcn(matrix: Tensor, x: Tensor, layers: int) -> Tensor:
    """LightGCN as it is mostly written: torch.sparse.mm on COO, autograd's backward."""
    total = x
    for _ in range(layers):
        x = torch.sparse.mm(matrix, x)
        total = total + x
    return total / (layers + 1)


def plain_scores(user: Tensor, item: Tensor, users: Tensor, lists: Tensor) -> Tensor:
    """Logits [B, K] by indexing, autograd's backward pass."""
    return (user[users][:, None] * item[lists]).sum(-1)


def loop_sampler(train: sparse.csr_matrix) -> list[tuple[int, int, int]]:
    """One negative an edge, drawn again while it is a positive: the released code's way."""
    positives = [set(train[u].indices.tolist()) for u in range(train.shape[0])]
    triplets = []
    for u, i in zip(*train.nonzero(), strict=True):
        negative = np.random.randint(train.shape[1])
        while negative in positives[u]:
            negative = np.random.randint(train.shape[1])
        triplets.append((u, i, negative))
    return triplets


def loop_evaluate(
    user: np.ndarray, item: np.ndarray, target, exclude, k: int = 50
) -> float:
    """Recall by a loop over users, each with a full stable argsort."""
    recalls = []
    for u in np.flatnonzero(np.diff(target.indptr)):
        values = item @ user[u]  # [I]
        values[exclude.indices[exclude.indptr[u] : exclude.indptr[u + 1]]] = -np.inf
        best = np.argsort(-values, kind="stable")[:k]
        wanted = target.indices[target.indptr[u] : target.indptr[u + 1]]
        recalls.append(np.isin(best, wanted).sum() / len(wanted))
    return float(np.mean(recalls))


class DirectTeacher(Teacher):
    """Eq. 4 as it is written: p^m is formed, [I, d_m], in every step."""

    def shift(self, m: str, layer: Fixed, p: Tensor) -> Tensor:
        x = self.features[m]  # [I, d_m]
        p_m = p @ (p.T @ x)  # [I, d_m]
        p_m = p_m * (x.norm(dim=1).norm() / p_m.norm(dim=1).norm())  # exact in float32
        return self.config.lambda_prompt * p_m @ layer.weight  # [I, d_T]


# ------------------------------------------------------------ measuring


class Setting(NamedTuple):
    """What the rows are measured on."""

    dataset: Dataset
    config: Config
    device: str


def show(name: str, ours: float, theirs: float | None = None, note: str = "") -> None:
    """One row: seconds, seconds of the usual way, their ratio."""
    ratio = " " * 25
    if theirs is not None:
        ratio = f"{theirs:12.4f} s {theirs / ours:8.1f} x"
    print(f"{name:46}{ours:10.4f} s{ratio}  {note}".rstrip(), flush=True)


def step(learner: nn.Module, terms: Callable) -> Callable:
    """A call that makes one optimiser step."""
    optimiser = torch.optim.AdamW(learner.parameters(), lr=1e-3, fused=True)

    def call():
        optimiser.zero_grad()
        sum(terms().values()).backward()
        optimiser.step()

    return call


def steps(on: Setting) -> dict[str, Callable]:
    """One step of each kind of training, by name, each ready to be timed."""
    dataset, config, device = on
    pairs = batch_of(on)
    student, teacher = Student(dataset.train, config, device), Teacher(*on)
    calls = {
        "student alone": step(
            student, lambda: student_terms(student, config, None, *pairs)
        ),
        "teacher, stage 1": step(teacher, lambda: teacher_terms(teacher, *pairs)),
    }
    return calls | steps_two(on, Teacher(*on))


def steps_two(on: Setting, teacher: Teacher) -> dict[str, Callable]:
    """One step of stage 2 under a teacher, its prompt frozen and tuned."""
    calls = {}
    # Frozen first: its encoding is a constant, whatever becomes of the prompt later.
    for name, tuned in ((FROZEN, False), (TUNED, True)):
        config = replace(on.config, tune_prompt=tuned)
        run = Run(Path(), on.dataset, config, torch.device(on.device), {})
        taught = Distillation(run, frozen_teacher(teacher, config))
        taught.refresh()
        student = Student(on.dataset.train, config, on.device)
        learner = nn.ModuleDict({"student": student, "project": taught.project})
        if tuned:
            learner["prompt"] = teacher.prompt
        calls[name] = step(learner, partial(taught.terms, student, *batch_of(on)))
    return calls


def batch_of(on: Setting) -> tuple[Tensor, Tensor]:
    """Users [B] and their pairs of items [B, 2]."""
    sampler = Sampler(on.dataset.train, on.device)
    generator = torch.Generator(on.device).manual_seed(0)
    users, lists = sampler.epoch(generator)
    return users[: on.config.batch], lists[: on.config.batch]


# ------------------------------------------------------------ the rows


def bench_propagation(on: Setting) -> None:
    train = on.dataset.train
    graph, n_users = Graph(train, on.device), train.shape[0]
    matrix = coo_tensor(adjacency(train), on.device)
    x = torch.randn(sum(train.shape), on.config.dim, device=on.device, requires_grad=True)
    gradient = torch.randn_like(x)  # [U+I, d]

    def ours():
        pair = lightgcn(graph, x[:n_users], x[n_users:], 2)
        torch.autograd.backward(pair, [gradient[:n_users], gradient[n_users:]])

    def theirs():
        coo_lightgcn(matrix, x, 2).backward(gradient)

    name = "propagation, 2 layers, forward + backward"
    show(name, median(ours, on.device), median(theirs, on.device), "torch.sparse.mm on COO")


def coo_tensor(matrix: sparse.csr_matrix, device: str) -> Tensor:
    coo = matrix.tocoo()
    index = np.stack([coo.row, coo.col])
    return torch.sparse_coo_tensor(
        index, coo.data, coo.shape, device=device, check_invariants=True
    ).coalesce()


def bench_product(on: Setting) -> None:
    """One block of Â times item embeddings, and back."""
    graph, n_items = Graph(on.dataset.train, on.device), on.dataset.train.shape[1]
    x = torch.randn(n_items, on.config.dim, device=on.device, requires_grad=True)
    gradient = torch.randn(on.dataset.train.shape[0], on.config.dim, device=on.device)

    def ours():
        Product.apply(graph.ui, graph.iu, x).backward(gradient)

    def theirs():
        (graph.ui @ x).backward(gradient)

    name = "sparse product, forward + backward"
    show(name, median(ours, on.device), median(theirs, on.device), "torch's own on CSR")


def bench_scores(on: Setting) -> None:
    """Logits of a batch's lists, and back."""
    users, lists = batch_of(on)
    user, item = (
        torch.randn(n, on.config.dim, device=on.device, requires_grad=True)
        for n in on.dataset.train.shape
    )

    def ours():
        scores(user, item, users, lists).sum().backward()

    def theirs():
        plain_scores(user, item, users, lists).sum().backward()

    name = "logits of a batch's lists, forward + backward"
    show(
        name, median(ours, on.device), median(theirs, on.device), "indexing, autograd's own"
    )


def bench_sampler(on: Setting) -> None:
    train = on.dataset.train
    sampler, generator = Sampler(train, on.device), torch.Generator(on.device)
    theirs = median(lambda: loop_sampler(train), repeat=1)
    ours = median(lambda: sampler.epoch(generator), on.device)
    note = "a loop over edges, np.random.randint"
    show("sampler, an epoch of triplets", ours, theirs, note)


def bench_evaluate(on: Setting) -> None:
    dataset = on.dataset
    user, item = (
        torch.randn(n, on.config.dim, device=on.device) for n in dataset.train.shape
    )
    exclude = dataset.train + dataset.val
    pair = user.cpu().numpy(), item.cpu().numpy()
    theirs = median(lambda: loop_evaluate(*pair, dataset.test, exclude), repeat=1)
    ours = median(lambda: evaluate(user, item, dataset.test, exclude), on.device)
    show("evaluate, exact ties", ours, theirs, "a loop over users, full stable argsort")


def copy_speed(device: str) -> float:
    """Bytes a second that a large copy reads and writes."""
    source, target = torch.empty(2, COPIED, device=device)
    return 2 * source.nbytes / median(lambda: target.copy_(source), device, 5)


def bench_bounds(on: Setting) -> None:
    """What can hardly be faster: products alone, and memory traffic at copying speed."""
    speed = copy_speed(on.device)
    print(f"bounds, of traffic at {speed / 1e9:.1f} GB/s:")
    bounds = {
        "evaluate": evaluate_bound(on, speed),
        "student alone, epoch": student_bound(on, speed),
        "student distilled, prompt frozen, epoch": distilled_bound(on, speed),
        "teacher, step of 8192 edges": teacher_bound(on, speed),
    }
    measured = {
        "evaluate": evaluate_call(on),
        "student alone, epoch": epoch_call(on, "student alone"),
        "student distilled, prompt frozen, epoch": epoch_call(on, FROZEN),
        "teacher, step of 8192 edges": teacher_call(on),
    }
    for name, bound in bounds.items():
        ours = median(measured[name], on.device, 5)
        print(f"  {name:44}{ours:10.4f} s  bound {bound:8.4f} s  {ours / bound:6.2f} x")


def evaluate_call(on: Setting) -> Callable:
    user, item = (
        torch.randn(n, on.config.dim, device=on.device) for n in on.dataset.train.shape
    )
    exclude = on.dataset.train + on.dataset.val
    return lambda: evaluate(user, item, on.dataset.test, exclude)


def evaluate_bound(on: Setting, speed: float) -> float:
    """The scores' product, and each score written and read once."""
    judged = int((np.diff(on.dataset.test.indptr) > 0).sum())
    n_items = on.dataset.train.shape[1]
    user, item = (
        torch.randn(n, on.config.dim, device=on.device) for n in (judged, n_items)
    )
    chunk = max(1, CHUNK_SCORES // n_items)
    product = median(lambda: [part @ item.T for part in user.split(chunk)], on.device, 5)
    return product + 2 * 4 * judged * n_items / speed


def student_bound(on: Setting, speed: float) -> float:
    """Each row read once in each sparse product; and AdamW (bytes_of_epoch)."""
    return bytes_of_epoch(on.dataset, on.config) / speed


def distilled_bound(on: Setting, speed: float) -> float:
    """The student's, and the rows of its lists: its own thrice, the teacher's read for two.

    The others' teacher logits are known since the lists were found.
    """
    config = on.config
    edges = on.dataset.train.nnz
    width = config.dim + sum(
        min(config.dim_teacher, x.shape[1]) for x in on.dataset.features.values()
    )
    numbers = edges * (2 * width + (2 + config.negatives) * 3 * config.dim)
    return student_bound(on, speed) + 4 * numbers / speed


def teacher_bound(on: Setting, speed: float) -> float:
    """XW forward and its gradient as products; four sparse products' traffic a modality."""
    n_users, n_items = on.dataset.train.shape
    total = 0.0
    for x in on.dataset.features.values():
        d_t = min(on.config.dim_teacher, x.shape[1])
        content = torch.randn(n_items, x.shape[1], device=on.device)
        weight = torch.randn(x.shape[1], d_t, device=on.device)
        out = content @ weight
        total += median(lambda a=content, b=weight: a @ b, on.device, 3)
        total += median(lambda a=content, b=out: a.T @ b, on.device, 3)
        once = 8 * on.dataset.train.nnz + 4 * d_t * (n_users + n_items)
        total += 4 * once / speed  # two products forward, two backward
    return total


def teacher_call(on: Setting) -> Callable:
    teacher = Teacher(*on)
    sampler = Sampler(on.dataset.train, on.device)
    users, lists = sampler.epoch(torch.Generator(on.device).manual_seed(0))
    return step(teacher, lambda: teacher_terms(teacher, users[:8192], lists[:8192]))


def epoch_call(on: Setting, name: str) -> Callable:
    """One epoch of a student, alone or distilled."""
    run = Run(Path(), on.dataset, on.config, torch.device(on.device), {})
    encode = frozen_teacher(Teacher(*on), on.config) if name == FROZEN else None
    taught = Distillation(run, encode)
    taught.refresh()
    student = Student(on.dataset.train, on.config, on.device)
    learner = nn.ModuleDict({"student": student, "project": taught.project})
    optimiser = torch.optim.AdamW(learner.parameters(), lr=1e-3, fused=True)
    sampler, terms = Sampler(on.dataset.train, on.device), partial(taught.terms, student)

    def call():
        samples = sampler.epoch(torch.Generator(on.device), taught.width - 1)
        train_epoch(learner, optimiser, samples, on.config.batch, terms)

    return call


def bytes_of_epoch(dataset: Dataset, config: Config) -> float:
    """What a student-only epoch moves at least: a cache may hold the whole table.

    L sparse products forward and L backward, each the matrix (8 bytes an edge and
    direction), every row of d floats read once, and the output written; and AdamW, four
    reads and three writes of every parameter.
    """
    edges = 2 * dataset.train.nnz
    table = sum(dataset.train.shape) * config.dim * 4
    batches = -(-dataset.train.nnz // config.batch)
    product = edges * 8 + 2 * table
    return batches * (2 * config.student_layers * product + 7 * table)


def bench_steps(on: Setting) -> None:
    for name, call in steps(on).items():
        show(f"step: {name}", median(call, on.device))


def bench_prompt(on: Setting) -> None:
    """Stage 2 where features are wide, the prompt tuned: fast path, direct form."""
    on = on._replace(dataset=data.synthetic(**WIDE))
    teacher, direct = Teacher(*on), DirectTeacher(*on)
    calls = steps_two(on, teacher)
    ours = median(calls[TUNED], on.device, 5)
    theirs = median(steps_two(on, direct)[TUNED], on.device, 3)
    size = f"I = {WIDE['items']:,}, d_m = {sum(WIDE['dims'].values()):,}"
    show(f"step, prompt tuned, {size}", ours, theirs, "p^m formed in every step")
    show("step, prompt frozen, same size", median(calls[FROZEN], on.device, 5))
    direct.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        slow = direct.eval().reduced()
        for m, f in teacher.eval().reduced().items():
            written = slow[m]
            error = ((f - written).norm() / written.norm()).item()
            print(f"  f^{m}: fast against direct, relative error {error:.1e}")


# ------------------------------------------------------------ growth


def bench_growth() -> None:
    """Seconds a step and peak memory as U, I, E and d_m grow, each in its own process."""
    columns = f"{'student alone':>15}{'teacher':>10}{'tuned':>10}{'peak memory':>14}"
    print(f"\n{'growth':32}{columns}")
    base = grown(GROWN)
    for name in GROWN:
        for factor in FACTORS:
            size = GROWN | {name: GROWN[name] * factor}
            found = base if size == GROWN else grown(size)
            label = f"{name} = {size[name]:,}"
            print(f"{label:32}{growth_row(found)}", flush=True)


def grown(size: dict[str, int]) -> dict[str, float]:
    """What `point` finds at this size, in a process of its own."""
    flags = [f"--{key}={value}" for key, value in size.items()]
    return json.loads(child([*module("bench"), *flags]))


def bench_scale() -> None:
    """Microseconds an edge of an epoch by default settings, as everything grows."""
    print(f"\n{'epoch an edge, default settings':44}{'student':>12}{'teacher':>12}")
    first = {}
    for factor in (1, 4, 16):
        sizes = {name: factor * size for name, size in EMBEDDED.items()}
        found = json.loads(child([*module("bench"), f"--scale={factor}"]))
        first = first or found
        label = " x ".join(f"{size:,}" for size in sizes.values())
        numbers = "".join(f"{value:9.1f} µs" for value in found.values())
        ratios = ", ".join(f"{found[key] / first[key]:.2f} x" for key in found)
        print(f"{label:44}{numbers}   {ratios}", flush=True)


def scale_point(factor: int) -> dict[str, float]:
    """One size of bench_scale: an epoch of the student and of the teacher, an edge."""
    dataset = data.synthetic(**{name: factor * size for name, size in EMBEDDED.items()})
    edges = dataset.train.nnz
    config = Config(batch=pace(Config(), "student", edges)[0])
    on = Setting(dataset, config, "cpu")
    teacher, (batch, _) = Teacher(*on), pace(config, "teacher", edges)
    optimiser = torch.optim.AdamW(teacher.parameters(), lr=1e-3, fused=True)
    sampler = Sampler(dataset.train)

    def teach():
        samples = sampler.epoch(torch.Generator())
        train_epoch(teacher, optimiser, samples, batch, partial(teacher_terms, teacher))

    calls = {"student": epoch_call(on, FROZEN), "teacher": teach}
    return {name: 1e6 * median(call, repeat=3) / edges for name, call in calls.items()}


def growth_row(found: dict[str, float]) -> str:
    times = f"{found['alone']:12.1f} ms{found['teacher']:7.1f} ms{found['tuned']:7.1f} ms"
    return f"{times}{found['peak']:10.0f} MiB"


def point(args: argparse.Namespace) -> dict[str, float]:
    """One size of bench_growth: milliseconds, and this process's peak memory."""
    widths = {"visual": args.width, "text": args.width}
    sizes = {"users": args.users, "items": args.items, "interactions": args.interactions}
    config = Config(batch=BATCH)
    calls = steps(Setting(data.synthetic(**sizes, dims=widths), config, "cpu"))
    names = {
        "alone": "student alone",
        "teacher": "teacher, stage 1",
        "tuned": TUNED,
    }
    found = {key: 1000 * median(calls[name], repeat=5) for key, name in names.items()}
    return found | {"peak": peak("cpu")}


# ------------------------------------------------------------ command line

ROWS = (
    bench_propagation,
    bench_product,
    bench_scores,
    bench_sampler,
    bench_evaluate,
    bench_bounds,
    bench_steps,
    bench_prompt,
)


def bench(args: argparse.Namespace) -> None:
    device = str(data.pick_device(args.device))
    if args.data:
        dataset = data.load(args.data)
    else:
        dataset = replace(data.synthetic(**GENERATED), name="generated, CiteULike's size")
    on = Setting(dataset, Config(batch=BATCH), device)
    users, items = dataset.train.shape
    size = (
        f"{users:,} x {items:,}, {dataset.train.nnz:,} training edges, d = {on.config.dim}"
    )
    made = f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{dataset.name}: {size}; {made}\n")
    for row in ROWS:
        row(on)
    if device == "cpu":
        bench_growth()
        bench_scale()


def main(argv: list[str] | None = None) -> int:
    return data.guarded(command, argv, "begin again")


def command(argv: list[str]) -> None:
    parser = data.Parser(prog="experiments bench", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", help="dataset folder (default: generated, CiteULike's size)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--threads", type=int, default=0, help="CPU threads (default: torch's)"
    )
    parser.add_argument("--scale", type=int, default=0, help=argparse.SUPPRESS)
    for size in GROWN:  # of one point of bench_growth
        parser.add_argument(f"--{size}", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    need(0 <= args.threads <= 1024, f"expected --threads 0 to 1024, found {args.threads}")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.scale:
        print(json.dumps(scale_point(args.scale)))
    elif args.width:
        print(json.dumps(point(args)))
    else:
        bench(args)


if __name__ == "__main__":
    sys.exit(main())

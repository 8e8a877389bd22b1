"""What the core claims to be fast, beside the usual way of doing it, in one run on this machine.

    python experiments.py bench [--threads N] [--data DIR]

Every row is a median of repeated calls. `cost` measures the rows of Table 6.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

import data
from data import DataError, Dataset, Sampler
from evaluate import evaluate
from promptmm import (
    Config,
    Graph,
    Student,
    Teacher,
    _epoch,
    adjacency,
    lightgcn,
    student_terms,
    teacher_terms,
)

ROOT = Path(__file__).parent

# ---------------------------------------------------------------- the usual ways


def coo_lightgcn(matrix: Tensor, x: Tensor, layers: int) -> Tensor:
    """LightGCN as it is mostly written: torch.sparse.mm on COO, autograd's own backward pass."""
    total = x
    for _ in range(layers):
        x = torch.sparse.mm(matrix, x)
        total = total + x
    return total / (layers + 1)


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


def loop_evaluate(user: np.ndarray, item: np.ndarray, target, exclude, k: int = 50) -> float:
    """Recall by a loop over users, each with a full stable argsort."""
    recalls = []
    for u in np.flatnonzero(np.diff(target.indptr)):
        scores = item @ user[u]
        scores[exclude.indices[exclude.indptr[u] : exclude.indptr[u + 1]]] = -np.inf
        best = np.argsort(-scores, kind="stable")[:k]
        wanted = target.indices[target.indptr[u] : target.indptr[u + 1]]
        recalls.append(np.isin(best, wanted).sum() / len(wanted))
    return float(np.mean(recalls))


class DirectTeacher(Teacher):
    """Eq. 4 as it is written: p^m is formed, [I, d_m], in every step."""

    def reduce(self, m, xw, gw, bias, prompt):
        x, weight = self.features[m], self.reduction[list(self.features).index(m)].weight
        prompt_m = prompt @ (prompt.T @ x) / len(prompt)
        return (x + self.config.lambda_prompt * prompt_m) @ weight.T + bias


# ---------------------------------------------------------------- measuring


def median(call, device: str = "cpu", repeat: int = 9) -> float:
    """Seconds of a call: the median of `repeat`, after one to warm up."""
    seconds = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[1:]))


def show(name: str, ours: float, theirs: float | None = None, note: str = "") -> None:
    """One row: seconds, seconds of the usual way, their ratio."""
    ratio = f"{theirs:12.4f} s {theirs / ours:8.1f} x" if theirs is not None else " " * 25
    print(f"{name:46}{ours:10.4f} s{ratio}  {note}", flush=True)


def step(learner: nn.Module, terms):
    """A call that makes one optimiser step."""
    optimiser = torch.optim.AdamW(learner.parameters(), lr=1e-3, fused=True)

    def call():
        optimiser.zero_grad()
        sum(terms().values()).backward()
        optimiser.step()

    return call


def steps(dataset: Dataset, config: Config, device: str, kind: type = Teacher) -> dict:
    """One step of each kind of training on a dataset, by name, each ready to be timed."""
    torch.manual_seed(0)
    generator = torch.Generator(device).manual_seed(0)
    users, lists = Sampler(dataset.train, device).epoch(generator, config.negatives)
    batch = users[: config.batch], lists[: config.batch]
    teacher, student = kind(dataset, config, device), Student(dataset.train, config, device)
    pairs = batch[0], batch[1][:, :2]
    calls = {"student alone": step(student, lambda: student_terms(student, config, None, *pairs)),
             "teacher, stage 1": step(teacher, lambda: teacher_terms(teacher, *pairs))}
    frozen = kind(dataset, config, device).eval().requires_grad_(False)
    with torch.no_grad():
        encoded = frozen(fixed := frozen.fixed())
    frozen.prompt.requires_grad_(True)
    both = nn.ModuleDict({"student": student, "prompt": frozen.prompt})
    calls["student, prompt frozen"] = step(
        student, lambda: student_terms(student, config, encoded, *batch))
    calls["student, prompt tuned"] = step(
        both, lambda: student_terms(student, config, frozen(fixed), *batch))
    return calls


# ---------------------------------------------------------------- the rows


def bench_propagation(dataset: Dataset, config: Config, device: str) -> None:
    graph, n_users = Graph(dataset.train, device), dataset.train.shape[0]
    coo = adjacency(dataset.train).tocoo()
    matrix = torch.sparse_coo_tensor(np.stack(coo.coords), coo.data, coo.shape, device=device,
                                     check_invariants=True).coalesce()
    x = torch.randn(sum(dataset.train.shape), config.dim, device=device, requires_grad=True)
    gradient = torch.randn_like(x)

    def ours():
        user, item = lightgcn(graph, x[:n_users], x[n_users:], 2)
        torch.autograd.backward([user, item], [gradient[:n_users], gradient[n_users:]])

    theirs = median(lambda: coo_lightgcn(matrix, x, 2).backward(gradient), device)
    show("propagation, 2 layers, forward + backward", median(ours, device), theirs,
         "torch.sparse.mm on COO")


def bench_sampler(dataset: Dataset, config: Config, device: str) -> None:
    sampler, generator = Sampler(dataset.train, device), torch.Generator(device)
    theirs = median(lambda: loop_sampler(dataset.train), repeat=1)
    show("sampler, an epoch of triplets", median(lambda: sampler.epoch(generator), device), theirs,
         "a loop over edges, np.random.randint")


def bench_evaluate(dataset: Dataset, config: Config, device: str) -> None:
    user, item = (torch.randn(n, config.dim, device=device) for n in dataset.train.shape)
    exclude = dataset.train + dataset.val
    pair = user.cpu().numpy(), item.cpu().numpy()
    theirs = median(lambda: loop_evaluate(*pair, dataset.test, exclude), repeat=1)
    ours = median(lambda: evaluate(user, item, dataset.test, exclude), device)
    show("evaluate, exact ties", ours, theirs, "a loop over users, full stable argsort")


def bench_bandwidth(dataset: Dataset, config: Config, device: str) -> None:
    """A student-only epoch against the time that its memory traffic takes at copying speed.

    Traffic: L sparse products forward and L backward, each the matrix (8 bytes an edge and
    direction), a row of d floats read for every edge and direction, and the output written; and
    AdamW, four reads and three writes of every parameter. With a cache that holds the whole table
    a row need be read only once: the tighter bound, printed as well.
    """
    source, target = torch.empty(2, 2**27, device=device)  # 512 MiB each
    speed = 2 * source.nbytes / median(lambda: target.copy_(source), device, 5)
    edges, table = 2 * dataset.train.nnz, sum(dataset.train.shape) * config.dim * 4
    once, each = edges * 8 + 2 * table, edges * (8 + config.dim * 4) + table
    batches = -(-dataset.train.nnz // config.batch)
    loose, bound = (batches * (2 * config.student_layers * product + 7 * table) / speed
                    for product in (once, each))
    student, sampler = Student(dataset.train, config, device), Sampler(dataset.train, device)
    optimiser = torch.optim.AdamW(student.parameters(), lr=1e-3, fused=True)
    def epoch():
        _epoch(student, optimiser, sampler.epoch(torch.Generator(device)), config.batch,
               lambda users, lists: student_terms(student, config, None, users, lists))

    ours = median(epoch, device, 7)
    show("student-only epoch", ours, note=f"{ours / bound:.2f} x its memory bound, {bound:.4f} s "
         f"at {speed / 1e9:.0f} GB/s; {ours / loose:.2f} x if each row is read once, {loose:.4f} s")


def bench_steps(dataset: Dataset, config: Config, device: str) -> None:
    for name, call in steps(dataset, config, device).items():
        show(f"step: {name}", median(call, device))


def bench_prompt(config: Config, device: str) -> None:
    """Stage 2 at I = 20,000, d_m = 4,096 + 1,024, the prompt tuned: fast path, direct form."""
    wide = data.synthetic(users=20_000, items=20_000, interactions=200_000,
                          dims={"visual": 4096, "text": 1024})
    calls = steps(wide, config, device)
    direct = steps(wide, config, device, DirectTeacher)["student, prompt tuned"]
    fast = median(calls["student, prompt tuned"], device, 5)
    show("step, prompt tuned, I = 20,000, d_m = 5,120", fast, median(direct, device, 3),
         "p^m formed in every step")
    show("step, prompt frozen, same size", median(calls["student, prompt frozen"], device, 5))
    teacher = Teacher(wide, config, device).eval()
    with torch.no_grad():
        fast, fixed = teacher().reduced, teacher.fixed()[1]
        prompt = teacher.prompt(teacher.tokens)
        for m, f in fast.items():
            direct = DirectTeacher.reduce(teacher, m, *fixed[m], prompt)
            error = ((f - direct).norm() / direct.norm()).item()
            print(f"  f^{m}: fast against direct, relative error {error:.1e}")


def bench_growth(threads: int) -> None:
    """Seconds a step and peak memory as U, I, E and d_m double, each in a process of its own."""
    base = {"users": 4000, "items": 4000, "interactions": 100_000, "width": 256}
    print(f"\n{'growth':32}{'student alone':>15}{'teacher':>10}{'tuned':>10}{'peak memory':>14}")
    for name in base:
        for factor in (1, 2, 4):
            size = {**base, name: base[name] * factor}
            flags = [f"--{key}={value}" for key, value in size.items()]
            command = [sys.executable, __file__, f"--threads={threads}", *flags]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            print(f"{name + ' = ' + format(size[name], ','):32}{found.rstrip()}", flush=True)


def peak(device: str) -> float:
    """MiB at most in use so far: of this process, or allocated on the GPU."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 2**10  # rusage would count the parent's pages too


def point(args: argparse.Namespace) -> None:
    """One size of bench_growth; prints milliseconds and this process's peak memory."""
    dataset = data.synthetic(users=args.users, items=args.items, interactions=args.interactions,
                             dims={"visual": args.width, "text": args.width})
    calls = steps(dataset, Config(), "cpu")
    names = ("student alone", "teacher, stage 1", "student, prompt tuned")
    alone, teacher, tuned = (1000 * median(calls[name], repeat=5) for name in names)
    print(f"{alone:12.1f} ms{teacher:7.1f} ms{tuned:7.1f} ms{peak('cpu'):10.0f} MiB")


COSTS = ("teacher", "student, prompt tuned", "student, prompt frozen", "student alone")


def cost(args: argparse.Namespace, device: str) -> dict:
    """One row of Table 6, in a process of its own: from files to embeddings, then three epochs."""
    config = data.read_json(args.run / "config.json")
    config = Config(**{**config, "tune_prompt": args.model.endswith("tuned")})
    began = time.perf_counter()
    if args.model == "teacher":
        model = Teacher(data.load(args.data, check=False), config, device)
        weights = data.read_torch(args.run / "teacher.pt", device)
    else:
        model = Student(sparse.load_npz(Path(args.data) / "train.npz"), config, device)
        weights = {name.removeprefix("student."): weight for name, weight
                   in data.read_torch(args.run / "student.pt", device).items()
                   if name.startswith("student.")}
    model.load_state_dict(weights)
    with torch.no_grad():
        model.eval()()
    if device != "cpu":
        torch.cuda.synchronize()
    row = {"embed": time.perf_counter() - began, "peak_embed": peak(device)}
    buffers = getattr(model, "features", {}).values()
    row |= {"trainable": sum(p.numel() for p in model.parameters()),
            "buffers": sum(x.numel() for x in buffers)}
    row["serve"] = 4 * (row["trainable"] + row["buffers"])
    dataset = data.load(args.data)
    terms, learner, width = objective(args.model, model, dataset, config, device)
    optimiser = torch.optim.AdamW(learner.parameters(), lr=1e-4, fused=True)
    sampler, generator = Sampler(dataset.train, device), torch.Generator(device)
    batch = config.batch if args.model == "teacher" else config.batch_student or config.batch
    row["epoch"] = median(lambda: _epoch(learner, optimiser, sampler.epoch(generator, width - 1),
                                         batch, terms), device, 3)
    return row | {"peak_train": peak(device)}


def objective(kind: str, model: nn.Module, dataset: Dataset, config: Config, device: str):
    """The terms of one kind of training, what learns by them, and the width of its lists."""
    if kind == "teacher":
        return partial(teacher_terms, model), model, 2
    if kind == "student alone":
        return partial(student_terms, model, config, None), model, 2
    frozen = Teacher(dataset, config, device).eval().requires_grad_(False)
    with torch.no_grad():
        encoded = frozen(fixed := frozen.fixed())
    width, learner = 1 + (config.negatives if config.lambda_list else 1), model
    if kind.endswith("frozen"):
        return partial(student_terms, model, config, encoded), model, width
    learner = nn.ModuleDict({"student": model, "prompt": frozen.prompt.requires_grad_(True)})
    return lambda *batch: student_terms(model, config, frozen(fixed), *batch), learner, width


def bench(args: argparse.Namespace) -> None:
    device = str(data.pick_device(args.device))
    config = Config(batch=2048)
    dataset = data.load(args.data) if args.data else replace(
        data.synthetic(users=4444, items=12_668, interactions=102_020,
                       dims={"text": 768, "tags": 512}), name="generated, CiteULike's size")
    print(f"{dataset.name}: {dataset.train.shape[0]:,} x {dataset.train.shape[1]:,}, "
          f"{dataset.train.nnz:,} training edges, d = {config.dim}; {device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    for row in (bench_propagation, bench_sampler, bench_evaluate, bench_bandwidth, bench_steps):
        row(dataset, config, device)
    bench_prompt(config, device)
    if device == "cpu":
        bench_growth(torch.get_num_threads())


def main(argv: list[str] | None = None) -> int:
    parser = data.Parser(prog="bench.py", description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="dataset folder (default: generated, CiteULike's size)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    parser.add_argument("--model", choices=COSTS, help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    for size in ("users", "items", "interactions", "width"):
        parser.add_argument(f"--{size}", type=int, default=0, help=argparse.SUPPRESS)
    try:
        args = parser.parse_args(argv)
        if args.threads:
            torch.set_num_threads(args.threads)
        if args.model:
            print(json.dumps(cost(args, str(data.pick_device(args.device)))))
        elif args.width:
            point(args)
        else:
            bench(args)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

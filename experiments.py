"""Measurements around the system; the four core modules never import this one.

    python experiments.py bench [--threads N] [--data DIR]
    python experiments.py record RUN ...    keep finished runs' figures in results/
    python experiments.py readme            put the figures of results/ into README.md

`bench` times what the core claims to be fast against the usual way of doing it, side by side in one
run on the machine at hand. Every row is a median of repeated calls.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

import data
from data import DataError, Dataset, Sampler
from evaluate import evaluate, ladder
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
            command = [sys.executable, __file__, "point", f"--threads={threads}", *flags]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            print(f"{name + ' = ' + format(size[name], ','):32}{found.rstrip()}", flush=True)


def point(args: argparse.Namespace) -> None:
    """One size of bench_growth; prints milliseconds and this process's peak memory."""
    dataset = data.synthetic(users=args.users, items=args.items, interactions=args.interactions,
                             dims={"visual": args.width, "text": args.width})
    calls = steps(dataset, Config(), "cpu")
    names = ("student alone", "teacher, stage 1", "student, prompt tuned")
    alone, teacher, tuned = (1000 * median(calls[name], repeat=5) for name in names)
    [peak] = [int(line.split()[1]) / 2**10 for line in open("/proc/self/status")
              if line.startswith("VmHWM")]  # rusage would count the parent's pages too
    print(f"{alone:12.1f} ms{teacher:7.1f} ms{tuned:7.1f} ms{peak:10.0f} MiB")


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


# ---------------------------------------------------------------- results


def record(args: argparse.Namespace) -> None:
    """Copy what a finished run found, and how, to results/<dataset>/seed<seed>.json."""
    for folder in map(Path, args.runs):
        with data.reading(folder):
            config = json.loads((folder / "config.json").read_text())
            metrics = json.loads((folder / "metrics.json").read_text())
        # The path of the data is the machine's own business; its name is enough.
        name = config["data"] = Path(config["data"] or "synthetic").name
        target = ROOT / "results" / name
        target.mkdir(parents=True, exist_ok=True)
        rows = (folder / "log.csv").read_text().splitlines()[1:]
        metrics["epochs"] = {row.split(",")[0]: int(row.split(",")[1]) for row in rows}
        text = json.dumps({"config": config, "metrics": metrics}, indent=1)
        data.write(target / f"seed{config['seed']}.json", text)
        print(f"{folder} -> {target.relative_to(ROOT)}/seed{config['seed']}.json")


def first_run() -> str:
    """The embedded run's table, as the command prints it, and its time."""
    found = json.loads((ROOT / "results/synthetic/seed0.json").read_text())["metrics"]
    seconds = sum(found["seconds"].values())
    return (f"{seconds:.1f} s of training on two CPU cores; it prints:\n\n"
            f"```text\n{ladder(found)}\n```")


def real_data() -> str:
    """Mean and standard deviation over the recorded seeds of every dataset but the embedded one."""
    lines = ["| dataset | model | Recall@20 | NDCG@20 | seeds |", "|---|---|---|---|---|"]
    names = {"mostpop": "MostPop", "alone": "LightGCN (student alone)", "teacher": "teacher",
             "student": "student, distilled"}
    for folder in sorted(f for f in (ROOT / "results").iterdir() if f.is_dir()):
        files = sorted(folder.glob("seed*.json"))
        runs = [json.loads(file.read_text())["metrics"] for file in files]
        for key, name in names.items() if folder.name != "synthetic" else ():
            cells = []
            for metric in ("recall@20", "ndcg@20"):
                values = [run["test"][key][metric] for run in runs]
                cells.append(f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}")
            lines.append(f"| {folder.name} | {name} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines)


def readme() -> str:
    """README.md with its figures taken from results/."""
    text = (ROOT / "README.md").read_text()
    bench_table = (ROOT / "results/bench.txt").read_text().rstrip()
    for name, content in (("first run", first_run()), ("real data", real_data()),
                          ("bench", f"```text\n{bench_table}\n```")):
        before, _, rest = text.partition(f"<!-- {name} -->\n")
        after = rest.partition("<!-- end -->")[2]
        text = f"{before}<!-- {name} -->\n{content}\n<!-- end -->{after}"
    return text


def main(argv: list[str] | None = None) -> int:
    parser = data.Parser(prog="experiments.py", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("bench", "point", "record", "readme"))
    parser.add_argument("runs", nargs="*", help="run folders to record")
    parser.add_argument("--data", help="dataset folder (default: generated, CiteULike's size)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    for size in ("users", "items", "interactions", "width"):
        parser.add_argument(f"--{size}", type=int, default=0, help=argparse.SUPPRESS)
    try:
        args = parser.parse_args(argv)
        if args.threads:
            torch.set_num_threads(args.threads)
        if args.command == "readme":
            data.write(ROOT / "README.md", readme())
        else:
            {"bench": bench, "point": point, "record": record}[args.command](args)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The paper's tables and figures, from one command, on the embedded data or on yours.

    python -m experiments all [--quick]             the paper's, on the embedded data
    python -m experiments all --data DIR            Tables 3-7 and Figure 5
    python -m experiments table4 --data DIR --seeds 5
    python -m experiments tune --data DIR           the search that the presets come from
    python -m experiments methods --data DIR        CKD, PRM-KD and KDSR beside PromptMM
    python -m experiments errata | bench | readme   readme: figures into the pages

Every model is trained by the functions that `promptmm.py` uses, once for each setting and
seed: runs/experiments/ keeps what was trained, by data, settings and code, so that the
tables share it and an interrupted command goes on where it stopped. After a change of the
core's code it is trained anew; `--keep` takes what older code has trained. `--jobs 2`
trains two models at a time, to the same figures as `OMP_NUM_THREADS=1` does.
"""

import contextlib
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

import data
import experiments.lab
from baselines import MODELS
from data import DataError, Parser, need, write
from distillers import METHODS
from experiments import bench
from experiments.ablation import figure3, options, table5
from experiments.claims import claims, earlier
from experiments.comparison import compared, first_run, popularity, table3, table4
from experiments.controls import controls, lists
from experiments.convergence import figure5
from experiments.cost import table6
from experiments.errata import errata
from experiments.incremental import table7
from experiments.lab import (
    CODE,
    CORE,
    IMPORTED,
    Lab,
    bare,
    code_digest,
    digest,
    locked,
    search,
    settings,
    source,
    sources,
)
from experiments.methods import methods
from experiments.printed import counts, figure2, table8, table9
from experiments.prompt import prompt
from experiments.publish import Output, fill_pages, publish
from experiments.sensitivity import figure4
from experiments.transfer import transfer
from experiments.tune import tune, tune_methods


class Part(NamedTuple):
    """A table or figure: what makes it, for how many seeds, and on which data in `all`."""

    name: str
    function: Callable[..., Output]
    seeds: int  # 0: it has none
    where: str  # any: real data too; embedded: only there; named: by name; paper: no data


EVERY = (
    Part("first_run", first_run, 0, "embedded"),
    Part("table3", table3, 0, "any"),
    Part("table4", table4, 5, "any"),
    Part("table5", table5, 3, "any"),
    Part("options", options, 3, "named"),
    Part("controls", controls, 5, "named"),
    Part("lists", lists, 3, "named"),
    Part("prompt", prompt, 3, "named"),
    Part("transfer", transfer, 3, "named"),
    Part("methods", methods, 5, "named"),
    Part("claims", claims, 5, "named"),
    Part("popularity", popularity, 3, "any"),
    Part("table6", table6, 0, "any"),
    Part("table7", table7, 3, "any"),
    Part("figure3", figure3, 0, "embedded"),
    Part("figure4", figure4, 1, "embedded"),
    Part("figure5", figure5, 3, "any"),
    Part("counts", counts, 0, "paper"),
    Part("table8", table8, 0, "paper"),
    Part("table9", table9, 0, "paper"),
    Part("figure2", figure2, 0, "paper"),
    Part("errata", errata, 0, "paper"),
)
PARTS = {part.name: part for part in EVERY}
TUNE = Part("tune", tune, 0, "any")
TRIES = 16  # of tune, where none are asked for
TUNES = {"tune": TUNE, "tune_methods": Part("tune_methods", tune_methods, 0, "named")}


def perform(lab: Lab, part: Part, force: bool, **more) -> None:
    """Run one part and publish it; a part that was finished here is left as it is."""
    searches = {name: search(lab, name) for name in TUNES}
    lab = replace(lab, used=set(), searches={} if part.name in TUNES else searches)
    folder = lab.cache / "parts" / part.name
    stamp = folder / f"{state_of(lab, part, more)}.done"
    with locked(folder):
        if (where := finished(stamp)) and not force:
            print(f"{part.name}: finished before, {where}; --force publishes it again")
        else:
            where = publish_part(lab, part, more)
            write(stamp, {"where": str(where), "result": result_digest(where)})


def finished(stamp: Path) -> Path | None:
    """Where a part's result lies, if it is whole and what the stamp was made for."""
    with contextlib.suppress(DataError, OSError):
        found = data.read_json(stamp, "where", "result", sealed=True)
        where = Path(found["where"])
        return where if found["result"] == result_digest(where) else None
    return None


def result_digest(where: Path) -> str:
    """Of <part>.md and <part>.json."""
    return data.digest(where.read_bytes() + where.with_suffix(".json").read_bytes())


def publish_part(lab: Lab, part: Part, more: dict) -> Path:
    """Run one part and write down what it found."""
    seeds = lab.count(part.seeds) if part.seeds else 1
    began = time.perf_counter()
    output = run_part(lab, part, seeds, more)
    seconds = time.perf_counter() - began
    flags = [f"--{option} {value}" for option, value in more.items()]
    if lab.seeds and part.seeds:
        flags.append(f"--seeds {lab.seeds}")
    folder = lab.out / ("paper" if part.where == "paper" else lab.dataset.name)
    return publish(lab, folder, part.name, output, seconds, seeds, flags)


def run_part(lab: Lab, part: Part, seeds: int, more: dict) -> Output:
    if part.where == "paper":
        return part.function()
    return part.function(lab, seeds, **more) if part.seeds else part.function(lab, **more)


def state_of(lab: Lab, part: Part, more: dict) -> str:
    """What a finished part depends on: models, the experiments' code, what was asked."""
    trained = (*MODELS, "Teacher", "PromptMM")
    if part.name in ("methods", "claims", "tune_methods"):
        trained += tuple(METHODS)
    if part.name in TUNES:  # the models' settings are its outcome
        models = [code_digest(sources(model)) for model in trained]
    else:
        trained += tuple(model for model in compared(lab, "") if source(model))
        models = [lab.folder(model, settings(lab, model)).name for model in trained]
    parts = [one for one in sorted(IMPORTED) if one.parent.name == "experiments"]
    files = [*parts, CODE / "baselines" / "profile.py", *CORE]
    code = [bare(IMPORTED[file]) for file in files]
    seeds = lab.count(part.seeds)
    before = {}  # what is on file, and what is asked builds on
    if part.name == "claims":
        before = earlier(lab)
    if part.name == "tune_methods":
        before = search(lab)
    facts = [models, code, seeds, lab.quick, str(lab.out), more, before, lab.searches]
    return digest(facts)


# ------------------------------------------------------------ command line


def main(argv: list[str] | None = None) -> int:
    """Run what is asked for; returns the exit status."""
    return data.guarded(command, argv, "the same command without --force goes on")


def command(argv: list[str]) -> None:
    if argv[:1] == ["bench"]:
        return bench.command(argv[1:])
    args = parse(argv)
    if args.part == "readme":
        fill_pages()
    else:
        run(args)


def parse(argv: list[str]) -> Namespace:
    parser = Parser(prog="experiments", description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=(*PARTS, "all", *TUNES, "bench", "readme"))
    parser.add_argument(
        "--data", default="", help="dataset folder (default: the embedded data)"
    )
    parser.add_argument(
        "--seeds", type=int, default=0, help="runs a model (default: the part's)"
    )
    parser.add_argument("--tries", type=int, help=f"of tune, a model (default: {TRIES})")
    parser.add_argument(
        "--models", default="", help="of tune and table4: these, A,B,…; others stay"
    )
    parser.add_argument(
        "--questions", default="", help="of claims: these, C-1,C-3,…; others stay"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="models trained side by side, a thread each"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--out", type=Path, help="(default: results; with --quick: runs/quick)"
    )
    for flag, meaning in (
        ("quick", "two epochs a stage: a smoke test"),
        ("keep", "take models that older code has trained"),
        ("force", "publish again; all without --quick: train again too"),
    ):
        parser.add_argument(f"--{flag}", action="store_true", help=meaning)
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: Namespace) -> None:
    """Refuse a flag that the part does not take, and numbers out of bounds."""
    takes = not args.models or args.part in ("tune", "table4")
    need(takes, f"--models: expected with tune or table4, found with {args.part}")
    takes = not args.questions or args.part == "claims"
    need(takes, f"--questions: expected with claims, found with {args.part}")
    takes = args.tries is None or args.part in TUNES
    need(takes, f"--tries: expected with tune or tune_methods, found with {args.part}")
    several = ["all", *(part.name for part in EVERY if part.seeds)]
    takes = not args.seeds or args.part in several
    need(takes, f"--seeds: expected with a part of several runs, found with {args.part}")
    tries = TRIES if args.tries is None else args.tries
    need(
        args.seeds >= 0 and 1 < tries <= 24,
        f"expected --seeds 0 or more and --tries 2 to 24, found {args.seeds}, {tries}",
    )
    need(1 <= args.jobs <= 256, f"expected --jobs 1 to 256, found {args.jobs}")
    need(args.part != "bench", "bench: expected first, its own flags after it")


def run(args: Namespace) -> None:
    lab = laboratory(args)
    some = {"models": args.models, "questions": args.questions}
    more = {option: value for option, value in some.items() if value}
    if args.part in TUNES:
        more["tries"] = 4 if args.quick else args.tries or TRIES
        perform(lab, TUNES[args.part], args.force, **more)
        return
    if args.part != "all":
        perform(lab, PARTS[args.part], args.force, **more)
        return
    if args.force and not args.quick and lab.home.exists():
        shutil.rmtree(lab.home)
    for part in EVERY:
        if part.where == "any" or (not args.data and part.where != "named"):
            perform(lab, part, args.force)


def laboratory(args: Namespace) -> Lab:
    """The data and the device, checked before anything is trained."""
    device = data.pick_device(args.device)
    if args.jobs > 1:
        torch.set_num_threads(1)  # here too: a model has a thread, wherever it is trained
    dataset = data.load(args.data) if args.data else data.synthetic()
    out = args.out or experiments.lab.ROOT / ("runs/quick" if args.quick else "results")
    data.same_figures(device)
    return Lab(
        dataset,
        args.data,
        device,
        args.seeds,
        args.quick,
        out,
        args.keep,
        side_by_side=args.jobs,
    )


if __name__ == "__main__":
    sys.exit(main())

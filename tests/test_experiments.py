"""The experiments: trained once, compared fairly, written whole, and true."""

import builtins
import contextlib
import dataclasses
import inspect
import io
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import replaced
from hypothesis import given, strategies as st
from scipy import sparse, stats
from torch import nn

import baselines
import data
import distillers
import promptmm
from baselines import MODELS
from baselines.profile import late_fusion, profile
from distillers import METHODS
from evaluate import evaluate, paired_test, top_items
from experiments import (
    ablation,
    bench,
    comparison,
    convergence,
    cost,
    incremental,
    lab as laboratory,
    publish,
    sensitivity,
    tune,
)
from experiments.__main__ import (
    EVERY,
    PARTS,
    TUNE,
    TUNES,
    laboratory as laboratory_of,
    main,
    parse,
    perform,
    state_of,
)
from experiments.controls import (
    BEGUN,
    NoContent,
    changed,
    controls,
    faithful,
    lists,
    useless,
    widths,
)
from experiments.lab import (
    CODE,
    CORE,
    Job,
    Lab,
    bare,
    code_digest,
    compare,
    embeddings,
    holm,
    ids_settings,
    judge,
    learn,
    load_teacher,
    log_of,
    names,
    seeded,
    settings,
    with_data,
)
from experiments.transfer import foreign, transfer
from promptmm import Config, Teacher

RESULTS = CODE / "results"
SHOWN = ("recall@20", "ndcg@20", "recall@50", "ndcg@50")
OURS = ("synthetic", "tiktok", "citeulike")


@pytest.fixture
def tiny(tiny) -> data.Dataset:
    """Its modalities in the order in which files are read."""
    return replaced(tiny, features=dict(sorted(tiny.features.items())))


@pytest.fixture
def lab(tiny, config, tmp_path, monkeypatch) -> Lab:
    """The tiny dataset by another name: no earlier search; all goes to tmp_path.

    The LightGCN beneath a teacher is as short as the other models, and content always
    teaches: on so few users validation alone would hardly give a modality any weight.
    """
    monkeypatch.setattr(laboratory, "ROOT", tmp_path)
    monkeypatch.setattr(promptmm, "line_search", lambda p, *_: [0.5, 0.25][: len(p) - 1])
    dataset, cpu = replaced(tiny, name="shop"), torch.device("cpu")
    lab = Lab(dataset, "shop", cpu, 2, False, tmp_path / "results")
    return beneath(lab, config)


def beneath(lab: Lab, config: Config) -> Lab:
    """A lab whose search has found these settings for LightGCN, and nothing else."""
    return dataclasses.replace(lab, chosen={"LightGCN": vars(config)})


@pytest.fixture
def embedded(tiny, tmp_path, monkeypatch) -> Path:
    """The command's embedded data are the tiny ones; the folder its output goes to."""
    monkeypatch.setattr(laboratory, "ROOT", tmp_path)
    monkeypatch.setattr(data, "synthetic", lambda **_: tiny)
    return tmp_path / "out"


def count_calls(monkeypatch, module, name: str) -> list:
    calls, function = [], getattr(module, name)

    def counted(*arguments, **named):
        calls.append(arguments)
        return function(*arguments, **named)

    monkeypatch.setattr(module, name, counted)
    return calls


def settings_of(model: str, config: Config) -> Config:
    """The settings of a comparison model or a method that agree with these."""
    return laboratory.settings_class(model)(**vars(config))


class Odd(nn.Module):
    """A stand-in for a model of baselines/: item popularity, scaled by a learnt number."""

    @dataclasses.dataclass(frozen=True)
    class Settings(Config):
        oddity: int = promptmm.setting(3, "no meaning", of="model")

    SPACE = {"oddity": (1, 2, 3, 4, 5), "lr_student": (1e-3, 1e-2)}
    width = 2

    def __init__(self, dataset, config, device="cpu"):
        super().__init__()
        user, item = promptmm.most_popular(dataset.train, device)
        self.user, self.item = nn.Parameter(config.oddity * user), nn.Parameter(item)

    def forward(self):
        return self.user, self.item

    def terms(self, users, lists):
        logits = promptmm.scores(*self(), users, lists)
        return {"bpr": promptmm.bpr_loss(logits[:, 0], logits[:, 1])}


@pytest.fixture
def odd(monkeypatch) -> str:
    """The stand-in under its name: one line in the registry is all it needs."""
    monkeypatch.setitem(MODELS, "Odd", Odd)
    return "Odd"


# ------------------------------------------------------------ train once


def test_a_model_is_trained_once_and_its_teacher_shared(lab, config, monkeypatch):
    teachers = count_calls(monkeypatch, promptmm, "teacher_terms")
    students = count_calls(monkeypatch, promptmm, "student_terms")
    first = learn(lab, "PromptMM", config)
    paid, learnt = len(teachers), len(students)
    assert paid > 0
    assert learn(lab, "PromptMM", config) == first
    assert len(students) == learnt  # not trained again
    other = dataclasses.replace(config, lambda_pair=0.5)
    assert learn(lab, "PromptMM", other) != first
    assert len(students) > learnt
    assert len(teachers) == paid  # the same teacher taught both


@pytest.mark.parametrize(
    ("model", "matters", "ignored"),
    [
        ("LightGCN", "l2", "dim_teacher"),
        ("LightGCN", "student_layers", "lambda_pair"),
        ("MF-BPR", "lr_student", "batch_teacher"),
        ("Odd", "oddity", "dim_teacher"),
        ("Teacher", "dim_teacher", "lambda_pair"),
        ("Teacher", "lambda_prompt", "lr_student"),
        ("PromptMM", "dim_teacher", "mask"),
        ("PromptMM", "lambda_embed", "mask"),
        ("PromptMM", "list_pool", "mask"),
        ("PromptMM", "seed", "mask"),
    ],
)
def test_the_cache_knows_what_matters(lab, config, odd, model, matters, ignored):
    own = settings_of(model, config)

    def changed(name: str) -> Config:
        other = "train" if name == "mask" else getattr(own, name) + 1
        return dataclasses.replace(own, **{name: other})

    assert lab.folder(model, changed(matters)) != lab.folder(model, own)
    assert lab.folder(model, changed(ignored)) == lab.folder(model, own)


@pytest.mark.parametrize("model", ["Teacher", "PromptMM", *METHODS])
def test_the_cache_knows_the_lightgcn_beneath(lab, config, model):
    """What decides it decides the model on top; but its seed is the model's own."""
    folder = lab.folder(model, config)
    for name in ("l2", "student_layers", "lr_student", "batch", "patience", "dim"):
        other = dataclasses.replace(config, **{name: getattr(config, name) + 1})
        assert beneath(lab, other).folder(model, config) != folder, name
    for name in ("dim_teacher", "lambda_list", "negatives", "patience_teacher", "seed"):
        other = dataclasses.replace(config, **{name: getattr(config, name) + 1})
        assert beneath(lab, other).folder(model, config) == folder, name
    seeds = [dataclasses.replace(config, seed=seed) for seed in (0, 1)]
    assert [ids_settings(lab, one).seed for one in seeds] == [0, 1]
    other = beneath(lab, dataclasses.replace(config, l2=0.5))
    for baseline in MODELS:
        own = settings_of(baseline, config)
        assert other.folder(baseline, own) == lab.folder(baseline, own)


def test_a_teacher_stands_on_the_lightgcn_of_its_lab(lab, config):
    """Even of another width."""
    wide = beneath(lab, dataclasses.replace(config, dim=2 * config.dim))
    for place in (lab, wide):
        teacher = load_teacher(place, config)
        ids = embeddings(place, "LightGCN", ids_settings(place, config))
        assert torch.equal(teacher.user, ids[0]) and torch.equal(teacher.item, ids[1])
    assert teacher.user.shape[1] == 2 * config.dim
    user, _ = embeddings(wide, "PromptMM", config)
    assert user.shape[1] == config.dim


def test_every_setting_says_whose_it_is():
    words = {"both", "teacher", "student", "distillation", "run"}
    assert {one.metadata["of"] for one in dataclasses.fields(Config)} == words
    for kind in MODELS.values():
        own = {one.metadata["of"] for one in dataclasses.fields(kind.Settings)}
        assert own <= words | {"model"}


def test_the_cache_knows_the_data(lab):
    other = replaced(lab.dataset, train=lab.dataset.train[::-1].tocsr())
    assert dataclasses.replace(lab, dataset=other).cache != lab.cache
    assert lab.cache.parent == lab.home


def test_the_runner_trains_what_the_command_trains(lab, config, run):
    """Same seed, same models as `promptmm.py` makes, to the last bit."""
    ids = dataclasses.replace(config, l2=0.01, student_layers=3)
    lab = beneath(lab, ids)
    whole = promptmm.pipeline(dataclasses.replace(run, dataset=lab.dataset, beside=ids))
    for model, name, own in (
        ("Teacher", "teacher", config),
        ("LightGCN", "alone", ids),
        ("PromptMM", "student", config),
    ):
        values = judge(lab, model, own)
        assert values["recall@20"].mean() == whole["test"][name]["recall@20"]
        again = judge(lab, model, own)  # from the file
        assert all(np.array_equal(values[metric], again[metric]) for metric in values)
    popular = judge(lab, "MostPop", config)["ndcg@20"].mean()
    assert popular == pytest.approx(whole["test"]["mostpop"]["ndcg@20"])


def test_an_interrupted_runner_goes_on(lab, config, monkeypatch):
    """Stopped after the first epoch of the student, then run again: as if never stopped."""
    config = dataclasses.replace(config, epochs=4, patience_teacher=20)
    lab = beneath(lab, config)
    elsewhere = dataclasses.replace(lab, dataset=replaced(lab.dataset, name="elsewhere"))
    expected = judge(elsewhere, "PromptMM", config)
    true_epoch, count = promptmm.train_epoch, []

    def stopping(*arguments):
        count.append(1)
        if len(count) == 10:  # 4 of LightGCN, 4 of the teacher, 1 of the student, then
            raise KeyboardInterrupt
        return true_epoch(*arguments)

    monkeypatch.setattr(promptmm, "train_epoch", stopping)
    with pytest.raises(KeyboardInterrupt):
        learn(lab, "PromptMM", config)
    assert np.array_equal(judge(lab, "PromptMM", config)["ndcg@20"], expected["ndcg@20"])
    assert len(count) == 10 + 3  # the student's remaining epochs, nothing else


TWO = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import data
from experiments import lab
from promptmm import Config

folder, me, other = Path(sys.argv[1]), *sys.argv[2:]
lab.ROOT = folder
true_train = lab.train

def train(*arguments):
    print("trained")
    true_train(*arguments)
    time.sleep(0.5)  # the other one must still be waiting

lab.train = train
here = lab.Lab(data.load(folder / "shop"), "shop", torch.device("cpu"), 1, True, folder)
(folder / me).touch()
while not (folder / other).exists():
    time.sleep(0.01)
lab.learn(here, "PromptMM", Config(dim=8, batch=128, negatives=3, epochs=2, eval_every=1))
"""


def test_two_processes_train_one_model_once(folder, tmp_path):
    """Both start at the same moment; one trains all three models, the other waits."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(tmp_path), me, other],
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        for me, other in (("a", "b"), ("b", "a"))
    ]
    printed_by = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert "".join(printed_by).split() == ["trained"] * 3  # LightGCN, teacher, student


def side_by_side(dataset: data.Dataset, config: Config, root: Path, jobs: int) -> Lab:
    lab = Lab(dataset, "shop", torch.device("cpu"), 2, False, root, side_by_side=jobs)
    return beneath(lab, config)


def test_models_trained_side_by_side_are_those_of_one_by_one(
    tiny, config, tmp_path, monkeypatch, capsys
):
    """To the last bit, a line for each; none of them by this process."""
    dataset = replaced(tiny, name="shop")
    jobs = [Job("PromptMM", config), Job("MF-BPR", settings_of("MF-BPR", config))]
    found, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for n in (1, 2):
            with monkeypatch.context() as patch:
                patch.setattr(laboratory, "ROOT", tmp_path / str(n))
                lab = side_by_side(dataset, config, tmp_path, n)
                if n == 2:
                    patch.setattr(laboratory, "train", None)
                laboratory.learn_all(lab, "both", jobs)
                found.append([e for job in jobs for e in embeddings(lab, *job)])
            lines = capsys.readouterr().out.splitlines()
            assert [line.split(":")[0] for line in lines] == [
                f"shop both {turn}/4" for turn in range(1, 5)
            ]
    finally:
        torch.set_num_threads(threads)
    assert len(lab.used) == 4  # with LightGCN and the teacher
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def ended_while_both_train(tiny, config, root: Path, monkeypatch, end) -> None:
    """Two long trainings side by side; once both have begun, `end`. Neither goes on."""
    monkeypatch.setattr(laboratory, "ROOT", root)
    long = dataclasses.replace(config, epochs=2000, patience=2000)
    lab = side_by_side(replaced(tiny, name="shop"), long, root, 2)
    jobs = seeded(Job("LightGCN", settings_of("LightGCN", long)), 2)
    folders = [lab.folder(*job) for job in jobs]
    true_completed = laboratory.as_completed

    def ended(begun):
        while not all((folder / "state.pt").exists() for folder in folders):
            time.sleep(0.05)
        end()
        return true_completed(begun)

    monkeypatch.setattr(laboratory, "as_completed", ended)
    try:
        laboratory.learn_all(lab, "both", jobs)
    finally:
        assert not any(laboratory.is_trained(folder) for folder in folders)


def test_side_by_side_ends_when_interrupted(tiny, config, tmp_path, monkeypatch):
    """Its processes with it: none goes on until its model is trained."""

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ended_while_both_train(tiny, config, tmp_path, monkeypatch, interrupt)


def test_a_process_killed_beside_others_is_one_line(tiny, config, tmp_path, monkeypatch):
    """As the system does when memory ends; the last begun, which a pool notices last."""

    def kill():
        max(multiprocessing.active_children(), key=lambda child: child.pid).kill()

    with pytest.raises(data.DataError, match="--jobs: a process was killed"):
        ended_while_both_train(tiny, config, tmp_path, monkeypatch, kill)


def test_what_fails_side_by_side_fails_here(tiny, config, tmp_path, monkeypatch):
    monkeypatch.setattr(laboratory, "ROOT", tmp_path)
    lab = side_by_side(replaced(tiny, name="shop"), config, tmp_path, 2)
    jobs = seeded(Job("LightGCN", settings_of("LightGCN", config)), 2)
    file = lab.folder(*jobs[0]) / "state.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"no state")
    with pytest.raises(data.DataError, match="state.pt: "):
        laboratory.learn_all(lab, "both", jobs)


def test_side_by_side_is_of_the_code_that_asked(tiny, config, tmp_path, monkeypatch):
    """A process reads the files anew: after an edit it would train by other code."""
    monkeypatch.setattr(laboratory, "ROOT", tmp_path)
    lab = side_by_side(replaced(tiny, name="shop"), config, tmp_path, 2)
    jobs = seeded(Job("LightGCN", settings_of("LightGCN", config)), 2)
    edited = dict(laboratory.IMPORTED)
    edited[laboratory.CODE / "losses.py"] += "# as it was when this process began"
    monkeypatch.setattr(laboratory, "IMPORTED", edited)
    with pytest.raises(data.DataError, match="a source file was edited meanwhile"):
        laboratory.learn_all(lab, "both", jobs)
    assert not any(laboratory.is_trained(lab.folder(*job)) for job in jobs)


@pytest.mark.parametrize(("jobs", "threads"), [("1", 3), ("2", 1)])
def test_with_jobs_this_process_has_a_thread_too(jobs, threads, embedded):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        laboratory_of(parse(["table3", "--jobs", jobs, "--out", str(embedded)]))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------ the code is part of the name


def changed_core(folder: Path, old: str, new: str) -> tuple[Path, ...]:
    """The core's files copied to a folder, one place in losses.py changed."""
    folder.mkdir()
    files = tuple(Path(shutil.copy(file, folder)) for file in CORE)
    losses = folder / "losses.py"
    text = losses.read_text()
    assert old in text
    losses.write_text(text.replace(old, new, 1))
    return files


def test_the_cache_knows_the_code(lab, config, tmp_path, monkeypatch):
    """Comments and docstrings do not count; a number does, and so does torch."""
    folder = lab.folder("Teacher", config)

    def with_core(name: str, old: str, new: str) -> Path:
        files = changed_core(tmp_path / name, old, new)
        monkeypatch.setattr(laboratory, "CORE", files)
        return lab.folder("Teacher", config)

    docstring = '"""The objective, term by term'
    assert docstring in (CODE / "losses.py").read_text()
    assert with_core("same", "import torch\n", "import torch\n") == folder
    assert with_core("comment", "import torch\n", "import torch  # a comment\n") == folder
    assert with_core("docstring", docstring, '"""Other words') == folder
    assert with_core("code", "temperature**2", "temperature**3") != folder
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert with_core("torch", "import torch\n", "import torch\n") != folder


def test_code_is_compared_without_what_only_readers_see():
    code = "def f(x):\n    return x\n"
    assert bare('def f(x):\n    """Words."""\n\n    return x  # more\n') == bare(code)
    assert bare("def f(x):\n    return -x\n") != bare(code)


def test_a_model_is_named_by_its_own_files_too(config, odd, monkeypatch):
    names_of = [
        {file.name for file in laboratory.sources(model)} for model in ("LightGCN", odd)
    ]
    assert {"lightgcn.py", "common.py", "promptmm.py"} <= names_of[0]
    assert {Path(__file__).name, "common.py", "promptmm.py"} <= names_of[1]
    core = {file.name for file in CORE}
    for model in ("Teacher", "PromptMM"):  # and those of the LightGCN beneath
        own = {file.name for file in laboratory.sources(model)} - core
        assert own == {"lightgcn.py", "common.py"}
    without = laboratory.sources("PromptMM", NoContent)
    assert "controls.py" in {file.name for file in without}
    for method in METHODS:  # its step and its lists are distillers/common.py's
        assert CODE / "distillers" / "common.py" in laboratory.sources(method)
    monkeypatch.setitem(MODELS, "LightGCN", Odd)
    assert Path(__file__) in laboratory.sources("Teacher")


def test_keep_takes_what_older_code_has_trained(lab, config, tmp_path, monkeypatch):
    """The newest, and only where nothing was trained by this code."""
    old = learn(lab, "LightGCN", config)
    files = changed_core(tmp_path / "new", "temperature**2", "temperature**3")
    monkeypatch.setattr(laboratory, "CORE", files)
    assert lab.folder("LightGCN", config) != old
    keeping = dataclasses.replace(lab, keep=True)
    assert keeping.folder("LightGCN", config) == old
    calls = count_calls(monkeypatch, laboratory, "train")
    judge(keeping, "LightGCN", config)
    assert not calls
    other = dataclasses.replace(config, l2=0.5)
    assert keeping.folder("LightGCN", other) == lab.folder("LightGCN", other)
    older = old.with_name(old.name[:-16] + "0" * 16)
    shutil.copytree(old, older)
    os.utime(older / "embeddings.npz", (1, 1))
    assert keeping.folder("LightGCN", config) == old
    new = learn(lab, "LightGCN", config)
    assert keeping.folder("LightGCN", config) == new


@pytest.mark.parametrize("name", ["shop", "*"])
def test_training_again_removes_the_models_of_this_dataset_only(
    name, folder, embedded, tmp_path, monkeypatch
):
    """Not those of a dataset whose name begins alike, nor everything for one called `*`."""
    source = folder.rename(tmp_path / "data") if name == "shop" else folder
    source = source.rename(source.with_name(name))
    experiments = tmp_path / "runs" / "experiments"
    for other in ("shop-eu", "shop-2024", "synthetic"):
        (experiments / other / "0-cpu" / "teacher-0-0").mkdir(parents=True)
    own = experiments / name / "0-cpu" / "teacher-0-0"
    own.mkdir(parents=True)
    monkeypatch.setattr("experiments.__main__.perform", lambda *_: None)
    flags = ["--data", str(source), "--out", str(embedded)]
    assert main(["all", *flags]) == 0
    assert own.exists()
    assert main(["table3", "--force", *flags]) == 0
    assert main(["all", "--quick", "--force", *flags]) == 0  # a smoke test removes nothing
    assert own.exists()
    assert main(["all", "--force", *flags]) == 0
    assert not own.exists()
    for other in ("shop-eu", "shop-2024", "synthetic"):
        assert (experiments / other / "0-cpu" / "teacher-0-0").exists()


# ------------------------------------------------------------ judge and compare


def test_compare_says_what_its_runs_say(lab, config):
    rows = {model: Job(model, config) for model in ("LightGCN", "Teacher")}
    reference, row = compare(lab, "test", rows, 2, "LightGCN")
    runs = [judge(lab, *one)["ndcg@20"].mean() for one in seeded(rows["Teacher"], 2)]
    assert row["ndcg@20"]["runs"] == runs
    assert runs[0] != runs[1]
    assert row["ndcg@20"]["mean"] == pytest.approx(sum(runs) / 2)
    assert row["ndcg@20"]["std"] == pytest.approx(abs(runs[0] - runs[1]) / 2**0.5)
    base = reference["ndcg@20"]["mean"]
    assert row["gain"]["ndcg@20"] == pytest.approx(row["ndcg@20"]["mean"] / base - 1)
    low, high = row["p_ndcg_interval"]
    assert low <= row["ndcg@20"]["mean"] - base <= high
    assert "p" not in reference
    assert 0 < row["p"] <= 1
    both = [
        np.stack([judge(lab, *one)["ndcg@20"] for one in seeded(job, 2)])
        for job in (rows["Teacher"], rows["LightGCN"])
    ]
    test = paired_test(*both)
    assert test["seeds_drawn"]
    assert row["p_ndcg"] == row["p_ndcg_single"] == test["p_bootstrap"]


def test_each_p_is_of_its_own_metric(lab, config, monkeypatch):
    """Recall clearly higher, NDCG the same but for noise: p says one, p_ndcg the other."""
    rng = np.random.default_rng(0)
    base, noise = rng.random(200), rng.normal(0, 0.1, 200)
    values = {"LightGCN": dict.fromkeys(SHOWN, base)}
    values["Teacher"] = values["LightGCN"] | {
        "recall@20": base + 1,
        "ndcg@20": base + noise,
    }
    monkeypatch.setattr(laboratory, "learn_all", lambda *_: None)
    monkeypatch.setattr(laboratory, "judge", lambda lab, model, *_: values[model])
    rows = {model: Job(model, config) for model in values}
    _, row = compare(lab, "test", rows, 1, "LightGCN")
    assert row["p"] == 1e-4
    assert row["p_interval"] == pytest.approx([1, 1])
    assert row["p_ndcg"] > 0.05
    assert row["p_ndcg_wilcoxon"] > 0.05
    assert row["p_ndcg_interval"][0] < noise.mean() < row["p_ndcg_interval"][1] < 0.1


def closed(p_values: list[float]) -> list[float]:
    """Holm's method by definition: a hypothesis falls if every set that holds it does.

    A set falls at the level of its smallest p times its size, Bonferroni's.
    """
    found = []
    for i in range(len(p_values)):
        others = [j for j in range(len(p_values)) if j != i]
        sets = itertools.chain.from_iterable(
            itertools.combinations(others, size) for size in range(len(p_values))
        )
        levels = [len(s := [i, *rest]) * min(p_values[j] for j in s) for rest in sets]
        found.append(min(1.0, max(levels)))
    return found


@given(st.lists(st.floats(1e-4, 1) | st.sampled_from([1e-4, 0.01, 1.0]), max_size=6))
def test_holm_is_a_closed_test(p_values):
    adjusted = holm(p_values)
    assert adjusted == pytest.approx(closed(p_values))
    assert all(p <= q <= 1 for p, q in zip(p_values, adjusted, strict=True))


def test_compare_adjusts_for_the_number_of_rows(lab, config, monkeypatch):
    """Each metric by itself; the reference is no test."""
    rng = np.random.default_rng(0)
    base = rng.random(200)
    values = {}
    for n, model in enumerate(("MF-BPR", "LightGCN", "Teacher", "PromptMM")):
        noisy = {metric: base + rng.normal(0.01 * n, 0.1, 200) for metric in SHOWN}
        values[model] = noisy
    monkeypatch.setattr(laboratory, "learn_all", lambda *_: None)
    monkeypatch.setattr(laboratory, "judge", lambda lab, model, *_: values[model])
    rows = {model: Job(model, config) for model in values}
    table = compare(lab, "test", rows, 1, "LightGCN")
    tested = [row for row in table if row["model"] != "LightGCN"]
    assert len(tested) == 3 and not {"p", "p_single"} & set(table[1])
    for key, metric in (("p", "recall@20"), ("p_ndcg", "ndcg@20")):
        single = [
            paired_test(values[row["model"]][metric], values["LightGCN"][metric])
            for row in tested
        ]
        single = [test["p_bootstrap"] for test in single]
        assert [row[f"{key}_single"] for row in tested] == single
        assert [row[key] for row in tested] == pytest.approx(closed(single))
        assert [row[key] for row in tested] != single


# ------------------------------------------------------------ settings and the search


def test_settings_come_from_a_search_on_the_same_data_or_the_defaults(lab, tmp_path):
    lab = dataclasses.replace(lab, chosen={})
    assert settings(lab) == Config()
    assert settings(lab, "MF-BPR") == MODELS["MF-BPR"].Settings()
    assert settings(lab, "MF-BPR").student_layers == 0
    file = tmp_path / "results" / "shop" / "tune.json"
    file.parent.mkdir(parents=True)
    found = {"best": {"LightGCN": {"l2": 0.5}}, "tried": 2, "fingerprint": "of other data"}
    file.write_text(json.dumps(found))
    assert settings(lab, "LightGCN") == settings_of("LightGCN", Config())
    file.write_text(json.dumps(found | {"fingerprint": data.fingerprint(lab.dataset)}))
    assert settings(lab, "LightGCN") == settings_of("LightGCN", Config(l2=0.5))


def test_changed_data_keep_the_settings_of_their_own(lab, tmp_path):
    """Though their fingerprint, and so their models, are others."""
    lab = dataclasses.replace(lab, chosen={})
    file = tmp_path / "results" / "shop" / "tune.json"
    file.parent.mkdir(parents=True)
    best = {"LightGCN": {"l2": 0.5}, "PromptMM": {"lambda_list": 7.0}}
    found = {"best": best, "tried": 2, "fingerprint": lab.fingerprint}
    file.write_text(json.dumps(found))
    shuffled = replaced(lab.dataset, features=useless(lab)["shuffled"])
    changed_lab = with_data(lab, shuffled)
    assert changed_lab.fingerprint == data.fingerprint(shuffled) != lab.fingerprint
    assert changed_lab.cache != lab.cache
    assert changed_lab.origin == lab.fingerprint
    twice = with_data(changed_lab, replaced(shuffled, train=shuffled.train[::-1].tocsr()))
    assert twice.origin == lab.fingerprint and twice.fingerprint != changed_lab.fingerprint
    for place in (lab, changed_lab, twice):
        assert settings(place).lambda_list == 7.0
        assert settings(place, "LightGCN").l2 == ids_settings(place, Config()).l2 == 0.5
        assert place.used is lab.used  # its models are counted too
    stranger = dataclasses.replace(lab, dataset=shuffled)  # not said to be changed
    assert settings(stranger) == Config()


def test_the_search_reads_no_test_split(lab, odd, monkeypatch):
    """It also tries equally often, starts at its start, keeps the best on validation."""
    splits = []
    true_evaluate = laboratory.evaluate

    def watched(user, item, target, *rest, **named):
        splits.append(target is lab.dataset.test)
        return true_evaluate(user, item, target, *rest, **named)

    monkeypatch.setattr(laboratory, "evaluate", watched)
    monkeypatch.setattr(promptmm, "evaluate", watched)
    output = tune.tune(dataclasses.replace(lab, quick=True), 4)
    assert splits and not any(splits)
    best = output.extra["best"]
    assert list(best) == [*MODELS, "Teacher", "PromptMM"]
    for model in best:
        rows = [row for row in output.rows if row["model"] == model]
        assert len(rows) == (2 if model in ("Teacher", "PromptMM") else 4)
        assert len(rows) == output.extra["tries"][model]
        assert best[model] == max(rows, key=lambda row: row["validation"])["settings"]
    assert best["PromptMM"].items() >= best["Teacher"].items()
    assert set(best[odd]) <= set(Odd.SPACE)


def test_a_search_for_some_models_keeps_the_others(embedded):
    """Tries, settings and choice stay; LATTICE begins on the best LightGCN's graph."""
    assert main(["tune", "--quick", "--out", str(embedded.parent / "results")]) == 0
    file = embedded.parent / "results" / "synthetic" / "tune.json"
    before = json.loads(file.read_text())
    argv = ["tune", "--quick", "--models", "VBPR,LATTICE", "--tries", "3"]
    assert main([*argv, "--force", "--out", str(embedded.parent / "results")]) == 0
    after = json.loads(file.read_text())
    assert list(after["best"]) == list(before["best"])
    others = [row for row in before["rows"] if row["model"] not in ("VBPR", "LATTICE")]
    assert [row for row in after["rows"] if row in others] == others
    assert after["tries"] == before["tries"]
    first = next(row for row in after["rows"] if row["model"] == "LATTICE")["settings"]
    like = config_of({"model": "LightGCN", "settings": after["best"]["LightGCN"]})
    for name in tune.ON_ITS_GRAPH:
        assert first[name] == getattr(like, name)


def test_a_search_for_some_models_has_as_many_tries_as_the_others(lab, monkeypatch):
    """Another number is refused before anything is trained; teacher and student share."""
    before = {"tried": 4, "best": {"LightGCN": {}, "BM3": {}}, "rows": []}
    monkeypatch.setattr(tune, "search", lambda *_: before)
    budgets = {}

    def watched(lab, model, first, space, budget, rng):
        budgets[model] = budget
        return [{"model": model, "validation": 0.1, "settings": first}]

    monkeypatch.setattr(tune, "search_model", watched)
    lab = dataclasses.replace(lab, quick=False)
    with pytest.raises(data.DataError, match="expected --tries 4, .* found 6"):
        tune.tune(lab, 6, "BM3")
    assert not budgets
    output = tune.tune(lab, 4, "BM3,Teacher,PromptMM")
    assert budgets == {"BM3": 4, "Teacher": 2, "PromptMM": 2}
    assert list(output.extra["best"]) == ["LightGCN", "BM3", "Teacher", "PromptMM"]


def test_table_4_of_some_models(embedded):
    """The ladder and those asked for, fewer seeds where a model is no contender."""
    argv = ["table4", "--quick", "--seeds", "4", "--models", "BM3,NGCF"]
    assert main([*argv, "--out", str(embedded)]) == 0
    table = json.loads((embedded / "synthetic" / "table4.json").read_text())
    rows = {row["model"]: row for row in table["rows"]}
    expected = ["MF-BPR", "NGCF", "LightGCN", "BM3"]
    assert [name for name in rows if name in MODELS] == expected
    counts = {name: len(rows[name]["recall@20"]["runs"]) for name in rows}
    assert (counts["NGCF"], counts["BM3"], counts["LightGCN"]) == (3, 4, 4)
    assert rows["NGCF"]["seeds"] == 3
    assert "--models BM3,NGCF" in table["command"]
    tested = [row for row in table["rows"] if row["model"] != "PromptMM"]
    assert all(0 < row["p_promptmm"] <= 1 for row in tested)
    assert "p_promptmm" not in rows["PromptMM"]


def test_table_4_model_by_model_is_the_table_of_all_of_them(embedded):
    """A model that is added later keeps the others' rows; Holm's p are over all of them."""
    file = embedded / "synthetic" / "table4.json"
    tables = {}
    for models in ("VBPR", "NGCF", "NGCF,VBPR"):
        if "," in models:
            file.unlink()
        argv = ["table4", "--quick", "--seeds", "2", "--models", models]
        assert main([*argv, "--out", str(embedded)]) == 0
        tables[models] = json.loads(file.read_text())
    assert tables["NGCF"]["rows"] == tables["NGCF,VBPR"]["rows"]
    assert "trained before this: VBPR" in tables["NGCF"]["protocol"]
    assert "trained before" not in tables["NGCF,VBPR"]["protocol"]
    rows = tables["NGCF"]["rows"]
    kept = next(row for row in rows if row["model"] == "VBPR")
    kept |= dict.fromkeys(("p_single", "p_ndcg_single", "p_promptmm_single"), 1e-4)
    file.write_text(json.dumps(tables["NGCF"]))
    assert main([*argv[:-1], "NGCF", "--out", str(embedded), "--force"]) == 0
    found = json.loads(file.read_text())["rows"]
    kept = next(row for row in found if row["model"] == "VBPR")
    for key in ("p", "p_ndcg", "p_promptmm"):  # the least of all: times their number
        assert kept[key] == pytest.approx(1e-4 * (len(rows) - 1))


def table_4_on_file(lab: Lab, fingerprint: str, **recalls: list[float]) -> None:
    """A published Table 4: Recall@20 of each seed, by model."""
    rows = [
        {"model": name.replace("_", ", "), "recall@20": laboratory.spread(runs)}
        for name, runs in recalls.items()
    ]
    file = lab.out / lab.dataset.name / "table4.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"rows": rows, "fingerprint": fingerprint}))


def test_table_4_keeps_rows_whose_models_are_not_trained_anew(lab, monkeypatch):
    """And of what a comparison model taught only the best one's student."""
    found = {"LightGCN": [0.2], "PromptMM": [0.3], "VBPR": [0.1]}
    found |= {"BM3_distilled": [0.2], "FREEDOM_distilled": [0.3]}
    table_4_on_file(lab, lab.fingerprint, **found)
    monkeypatch.setattr(comparison, "rivals", lambda _: ["FREEDOM", "BM3"])
    fresh = [{"model": "LightGCN"}, {"model": "PromptMM"}]
    kept = comparison.kept_rows(lab, fresh, comparison.on_file(lab, "table4", "")["rows"])
    assert [row["model"] for row in kept] == ["VBPR", "FREEDOM, distilled"]
    fresh.append({"model": "VBPR"})
    kept = comparison.kept_rows(lab, fresh, comparison.on_file(lab, "table4", "")["rows"])
    assert [row["model"] for row in kept] == ["FREEDOM, distilled"]


def test_table_4_keeps_rows_beside_the_same_reference_alone(lab, monkeypatch):
    """LightGCN and PromptMM within the published mean's standard error, .0005 at least.

    They are trained and compared first: no other model is, where they differ.
    """
    reached = {}
    trained = []

    def learn_all(lab, title, jobs):
        trained.extend(job.model for job in jobs)

    def recall(lab, job):
        return reached[job.model][job.config.seed]

    monkeypatch.setattr(comparison, "learn_all", learn_all)
    monkeypatch.setattr(comparison, "recall", recall)
    monkeypatch.setattr(comparison, "compare", None)  # what trains all of the rest

    def compared(alone: list, taught: list) -> None:
        trained.clear()
        reached.update({"LightGCN": alone, "PromptMM": taught})
        comparison.table4(lab, len(alone), "VBPR")

    table_4_on_file(lab, lab.fingerprint, LightGCN=[0.2], PromptMM=[0.3])
    with pytest.raises(data.DataError, match="LightGCN .* 0.2000 of 1 .* found 0.2010"):
        compared([0.201], [0.3])
    assert {*trained} == {"LightGCN"}
    with pytest.raises(data.DataError, match="PromptMM .* 0.3000 of 1 .* found 0.3010"):
        compared([0.2], [0.301])
    with pytest.raises(data.DataError, match="0.2000 of 1 .* found 0.2000 of 2 seeds"):
        compared([0.2, 0.2], [0.3, 0.3])
    with pytest.raises(TypeError, match="not callable"):  # goes on to the other models
        compared([0.2004], [0.3004])

    table_4_on_file(lab, lab.fingerprint, LightGCN=[0.19, 0.21], PromptMM=[0.3, 0.3])
    with pytest.raises(TypeError, match="not callable"):  # standard error .01
        compared([0.209, 0.209], [0.3, 0.3])
    with pytest.raises(data.DataError, match="LightGCN .* 0.2000 of 2 .* found 0.2110"):
        compared([0.211, 0.211], [0.3, 0.3])


def test_table_4_of_other_data_is_refused_before_anything_is_trained(lab, monkeypatch):
    monkeypatch.setattr(comparison, "learn_all", None)
    monkeypatch.setattr(comparison, "compare", None)
    table_4_on_file(lab, "of other data", LightGCN=[0.2], PromptMM=[0.3])
    with pytest.raises(data.DataError, match="expected data of fingerprint .* of oth"):
        comparison.table4(lab, 1, "VBPR")
    file = lab.out / lab.dataset.name / "table4.json"
    file.write_text(json.dumps({"rows": []}))  # as tables were before they said of what
    with pytest.raises(data.DataError, match="expected data of fingerprint .* found none"):
        comparison.table4(lab, 1, "VBPR")


def of_today(row: dict) -> bool:
    """Whether a try sets only what there is, a student's all that LightGCN's search has."""
    model, chosen = row["model"], set(row["settings"])
    kind = MODELS[model].Settings if model in MODELS else Config
    taken_over = set(MODELS["LightGCN"].SPACE) if model == "PromptMM" else set()
    return taken_over <= chosen <= {one.name for one in dataclasses.fields(kind)}


def stored(name: str, part: str) -> dict:
    """What is on file of a dataset; where it is not (yet), the test is skipped."""
    file = RESULTS / name / f"{part}.json"
    if not file.exists():
        pytest.skip(f"{file}: not there")
    return json.loads(file.read_text())


def search_of(name: str) -> dict:
    """The search on file, skipped if it was made before today's settings."""
    found = stored(name, "tune")
    if not all(map(of_today, found["rows"])):
        pytest.skip(f"results/{name}/tune.json: made before today's settings")
    return found


def config_of(row: dict) -> Config:
    model = row["model"]
    kind = MODELS[model].Settings if model in MODELS else Config
    return kind(**row["settings"])


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("name", OURS)
def test_the_search_draws_what_it_drew(name, extra, lab, monkeypatch):
    """Told the validation values on file, it tries the settings on file, in their order.

    And chooses what it chose. A model that it has not searched does not change that.
    """
    search = search_of(name)
    if extra:
        monkeypatch.setitem(MODELS, "Odd", Odd)
    known = [(row["model"], config_of(row), row) for row in search["rows"]]
    on_file = {model for model, *_ in known}

    def validation(lab, job, split="test"):
        assert split == "val"
        model, config, _ = job
        if model not in on_file:
            return 0.0
        first = dataclasses.replace(config, seed=0)
        [row] = [row for m, c, row in known if (m, c) == (model, first)]
        value = row["validation"]  # of seed 0
        if config.seed:
            value = (3 * row["three seeds"] - value) / 2  # so that the mean is as on file
        return value

    monkeypatch.setattr(tune, "learn_all", lambda *_: None)
    monkeypatch.setattr(tune, "recall", validation)
    lab = dataclasses.replace(lab, dataset=replaced(lab.dataset, name=name))
    output = tune.tune(lab, search["tried"])
    rows = [row for row in output.rows if row["model"] in on_file]
    expected = [(model, config) for model, config, _ in known]
    assert [(row["model"], config_of(row)) for row in rows] == expected
    assert output.extra["best"].items() >= search["best"].items()
    for row, (*_, told) in zip(rows, known, strict=True):
        assert row.get("three seeds") == pytest.approx(told.get("three seeds"))


def test_a_third_of_the_settings_is_drawn_anew():
    rng = np.random.default_rng(0)
    space = {f"setting {n}": (0, 1) for n in range(10)}
    drawn = np.mean([len(tune.draw(space, rng)) / len(space) for _ in range(1000)])
    assert drawn == pytest.approx(1 / 3, abs=0.02)


@pytest.mark.parametrize("name", OURS)
def test_every_search_is_a_fair_one(name):
    """Equally many tries for every model, at most 24; the best of them on validation.

    Of six or more: of the best three with seed 0, the best mean over three seeds.
    """
    search = search_of(name)
    for model, best in search["best"].items():
        rows = [row for row in search["rows"] if row["model"] == model]
        assert len(rows) == search["tries"][model]
        final = [row for row in rows if "three seeds" in row]
        assert len(final) == (3 if len(rows) >= 6 else 0)
        worst = min((row["validation"] for row in final), default=1.0)
        others = [row["validation"] for row in rows if row not in final]
        assert not final or worst >= max(others)
        deciding = "three seeds" if final else "validation"
        assert best == max(final or rows, key=lambda row: row[deciding])["settings"]
    tries = [row["model"].replace("Teacher", "PromptMM") for row in search["rows"]]
    assert {tries.count(model) for model in set(tries)} == {search["tried"]}
    assert search["tried"] <= 24


@pytest.mark.parametrize("name", OURS)
def test_a_student_is_searched_from_the_best_lightgcn(name):
    """Under the best teacher; but for what START says."""
    search = search_of(name)
    best, start = search["best"], tune.START.get(name, {})
    first = next(row for row in search["rows"] if row["model"] == "PromptMM")["settings"]
    like = config_of({"model": "LightGCN", "settings": best["LightGCN"]})
    shared = {key: getattr(like, key) for key in MODELS["LightGCN"].SPACE}
    expected = best["Teacher"] | shared | start.get("all", {}) | start.get("PromptMM", {})
    assert first == expected


LATER = set(MODELS) - set(comparison.PLAIN)  # a search may have been made before these


def adjusted_by_holm(rows):
    """Of every row but LightGCN's, each metric for itself."""
    tested = [row for row in rows if row["model"] != "LightGCN"]
    for key in ("p", "p_ndcg"):
        adjusted = holm([row[f"{key}_single"] for row in tested])
        assert [row[key] for row in tested] == pytest.approx(adjusted)


def test_the_table_with_tags_is_of_defaults_alone():
    """No search was made with tags; nobody's settings come from there."""
    table = stored("citeulike_tag", "table4")
    assert "tag" in table["modalities"] and not any(row["tried"] for row in table["rows"])
    assert not (RESULTS / "citeulike_tag" / "tune.json").exists()
    assert "citeulike_tag" not in promptmm.PRESETS
    adjusted_by_holm(table["rows"])


@pytest.mark.parametrize("name", OURS)
def test_the_comparisons_are_fair_ones(name):
    best = search_of(name)["best"]
    table = stored(name, "table4")
    models = [row["model"] for row in table["rows"]]
    profiles = [f"Profile ({m})" for m in table["modalities"]]
    ladder = ["MostPop", *profiles, *MODELS, laboratory.FUSED, "Teacher", "PromptMM"]
    if laboratory.source(models[-1]):  # a student of the best rival, by validation
        assert models.pop() == comparison.rivals(search_of(name))[0] + laboratory.DISTILLED
    assert models == [model for model in ladder if model in models]
    unsearched = LATER - set(best)  # a Table 4 has what its search has, no less, no more
    assert set(models) == set(ladder) - unsearched
    adjusted_by_holm(table["rows"])
    for row in table["rows"]:
        runs, model = len(row["recall@20"]["runs"]), row["model"]
        assert runs == comparison.seeds_of(model, table["seeds"])
        assert runs >= (3 if model in comparison.NO_CONTENDERS else 5)
        assert np.mean(row["ndcg@20"]["runs"]) == pytest.approx(row["ndcg@20"]["mean"])
        assert ("p" in row) == (row["model"] != "LightGCN")
    full = Config(**best["PromptMM"])
    weights = (full.lambda_prompt, full.lambda_pair, full.lambda_list, full.lambda_embed)
    assert min(weights) > 0
    assert not full.warm_start
    expected = {
        "command",
        "seeds",
        "device",
        "threads",
        "versions",
        "wall_seconds",
        "protocol",
    }
    assert set(table) >= expected


# ------------------------------------------------------------ settings from elsewhere


def test_settings_from_elsewhere_are_those_of_the_presets(lab, monkeypatch):
    """Each pair shares its ids, and both of its models are under the settings it names."""
    presets = {
        "synthetic": {"dim": 3},
        "shop": {"dim": 5},
        "other": {"lambda_list": 7.0, "batch": 64},
    }
    monkeypatch.setattr("experiments.transfer.PRESETS", presets)
    own = {"shop": {"dim": 5}, "other": {"batch": 64}}
    monkeypatch.setattr("experiments.transfer.LIGHTGCN", own)
    found_before = {"tune": {"best": {"PromptMM": {"dim": 4}}}}
    lab = dataclasses.replace(lab, quick=True, chosen={}, searches=found_before)
    found = foreign(lab)
    assert list(found) == ["own search", "defaults", "found on other"]
    short = {"epochs": 2, "eval_every": 1}
    under = [settings(place) for place in found.values()]
    assert under == [
        Config(dim=4, **short),
        Config(**short),
        Config(**presets["other"], **short),
    ]
    assert ids_settings(found["found on other"], under[2]) == Config(batch=64, **short)
    watched = count_calls(monkeypatch, sys.modules["experiments.transfer"], "compare")
    output = transfer(lab, 1)
    for (place, _, jobs, *_), row in zip(watched, output.rows, strict=True):
        assert place is not lab or row["settings"] == "own search"
        assert jobs["PromptMM"].config == settings(place)
        judged = [judge(place, *job)["recall@20"].mean() for job in jobs.values()]
        assert [row["alone"]["mean"], row["student"]["mean"]] == pytest.approx(judged)
        assert row["ratio"] == f"{judged[1] / judged[0]:.1%}"


def test_transfer_without_a_search_has_no_row_of_its_own(lab, monkeypatch):
    assert "own search" not in foreign(lab) and "defaults" in foreign(lab)
    lab = dataclasses.replace(lab, searches={"tune": {"best": {}}})
    assert "own search" in foreign(lab)


def test_transfer_where_lightgcn_finds_nothing(lab, monkeypatch):
    nothing = {"recall@20": laboratory.spread([0.0]), "gain": {"recall@20": None}}
    pair = [nothing, nothing | {"p_single": 1.0}]
    monkeypatch.setattr("experiments.transfer.compare", lambda *_: pair)
    assert {row["ratio"] for row in transfer(lab, 1).rows} == {""}


# ------------------------------------------------------------ controls


def test_useless_content_is_the_same_content_elsewhere_or_noise_of_its_scale(lab):
    found = useless(lab)
    for m, x in lab.dataset.features.items():
        moved, noise = (found[how][m] for how in ("shuffled", "noise"))
        assert sorted(map(bytes, moved)) == sorted(map(bytes, x))
        assert (moved != x).any(1).mean() > 0.8
        assert noise.shape == x.shape and noise.dtype == np.float32
        assert noise.std() == pytest.approx(x.std(), rel=0.2)
        assert abs(np.corrcoef(noise.ravel(), x.ravel())[0, 1]) < 0.2
    one, two = found["shuffled"].values()
    rows = [
        np.flatnonzero((x == y[0]).all(1))
        for x, y in zip(lab.dataset.features.values(), (one, two), strict=True)
    ]
    assert rows[0] == rows[1]  # an item's modalities stay together


def test_controls_leave_what_they_say(lab, config):
    change = {
        name: {
            key: value for key, value in vars(one).items() if value != getattr(config, key)
        }
        for name, one in changed(config).items()
    }
    halves = {
        "α = 1": {"alpha": 1.0},
        "plain KL": {"alpha": 1.0, "beta": "identity"},
    }
    drawn = {"list_items": "random"}
    assert change == {
        "PairKD alone": {"lambda_list": 0.0, "lambda_embed": 0.0},
        "ListKD alone": {"lambda_pair": 0.0, "lambda_embed": 0.0},
        "EmbKD alone": {"lambda_pair": 0.0, "lambda_list": 0.0},
        **{f"top lists: {name}": half for name, half in halves.items()},
        "random lists": drawn,
        **{f"random lists: {name}": drawn | half for name, half in halves.items()},
    }  # "top lists" would be the full model
    other = set(changed(dataclasses.replace(config, **drawn)))
    assert other == set(change) - {"random lists"} | {"top lists"}


def test_narrow_students_have_the_widths_they_say(lab, config):
    """Nothing else is changed; LightGCN and the full model are not trained twice."""
    full = dataclasses.replace(config, dim=32, dim_teacher=256)
    alone = settings(lab, "LightGCN")
    for name, (model, own, kind) in widths(full, alone).items():
        numbers = dict(part.split(" = ") for part in name.split(", ") if " = " in part)
        wanted = {"dim": int(numbers["d"])}
        if model == "PromptMM":
            wanted["dim_teacher"] = int(numbers["d_T"])
        before = full if model == "PromptMM" else alone
        assert own == dataclasses.replace(before, **wanted) and kind is Teacher
        assert name.startswith("LightGCN") == (model == "LightGCN")
    assert len(widths(full, alone)) == 9


def test_lists_hold_what_they_say(lab, config, monkeypatch):
    """Beside the full model: the other half or both, on the best items and on any."""
    asked = {}

    def watched(lab, title, jobs, *rest):
        asked.update(jobs)
        return laboratory.compare(lab, title, jobs, *rest)

    monkeypatch.setattr("experiments.controls.compare", watched)
    full = dataclasses.replace(config, epochs=1)
    place = dataclasses.replace(lab, quick=True, chosen={"PromptMM": vars(full)})
    output = lists(place, 1)
    told = {}
    for name, (model, chosen, _) in asked.items():
        told[name] = model, chosen.list_items, chosen.alpha, chosen.beta
    assert told == {
        "LightGCN": ("LightGCN", "top", 0.0, 1.0),  # reads no list
        "PromptMM": ("PromptMM", "top", 0.0, 1.0),
        "top lists: α = 1": ("PromptMM", "top", 1.0, 1.0),
        "top lists: plain KL": ("PromptMM", "top", 1.0, "identity"),
        "random lists": ("PromptMM", "random", 0.0, 1.0),
        "random lists: α = 1": ("PromptMM", "random", 1.0, 1.0),
        "random lists: plain KL": ("PromptMM", "random", 1.0, "identity"),
    }
    assert [row["model"] for row in output.rows] == list(told)
    assert output.rows[1]["gain"]["recall@20"] == 0  # gains are over PromptMM
    assert output.rows[0]["gain"]["recall@20"] is not None


def test_controls_train_on_their_own_features_and_are_judged_alike(lab, monkeypatch):
    """LightGCN, which reads none, is the same whatever the features are."""
    trained, judged = [], []
    true_learn, true_judge = laboratory.learn, laboratory.judge

    def learning(place, model, config, kind=Teacher):
        trained.append((model, place))
        return true_learn(place, model, config, kind)

    def judging(place, model, *rest, **named):
        judged.append((model, place.fingerprint))
        return true_judge(place, model, *rest, **named)

    monkeypatch.setattr(laboratory, "learn", learning)
    monkeypatch.setattr(laboratory, "judge", judging)
    output = controls(dataclasses.replace(lab, quick=True), 1)
    climb = [laboratory.FUSED, BEGUN, "Teacher", "PromptMM"]
    without = [f"{model}, {name}" for name in ("shuffled", "noise") for model in climb]
    assert [row["model"] for row in output.rows] == ["LightGCN", *climb, *without]
    sums = {place for model, place in judged if model == laboratory.FUSED}
    assert len(sums) == 3
    alone = [place.fingerprint for model, place in trained if model == "LightGCN"]
    assert set(alone) == {lab.fingerprint}  # the sums too stand on the one LightGCN
    kept = [file.name for file in lab.cache.glob("lightgcn-*/fused-*-test-*.npz")]
    assert all(any(place[:12] in name for name in kept) for place in sums)
    assert [row["model"] for row in output.extra["fidelity"]] == ["LightGCN", "PromptMM"]
    places = {place.fingerprint: place for model, place in trained if model == "PromptMM"}
    assert len(places) == 3
    assert {found for model, found in judged if model == "PromptMM"} == set(places) == sums
    assert {found for model, found in judged if model == "LightGCN"} == {lab.fingerprint}
    ids = [
        embeddings(one, "LightGCN", ids_settings(one, Config())) for one in places.values()
    ]
    assert all(torch.equal(ids[0][side], one[side]) for one in ids for side in (0, 1))


def test_the_untrained_teacher_is_where_training_begins(lab, config, monkeypatch):
    """W^m at the principal directions, without a prompt; but weighed as the other is."""
    jobs = {}

    def watched(lab, title, rows, *_):
        jobs.update(rows)
        raise StopIteration

    monkeypatch.setattr("experiments.controls.compare", watched)
    with pytest.raises(StopIteration):
        controls(
            dataclasses.replace(lab, chosen=lab.chosen | {"PromptMM": vars(config)}), 1
        )
    found = load_teacher(lab, jobs[BEGUN].config)
    begun = Teacher(lab.dataset, config)
    for one, other in zip(found.reduction, begun.reduction, strict=True):
        assert torch.equal(one.weight, other.weight) and not one.bias.any()
    assert found.prompt_share() == 0
    assert found.modality_weights() == {"text": 0.5, "visual": 0.25}
    change = {"lr_teacher": 0.0, "lambda_prompt": 0.0, "epochs": 1}  # no prompt, so W^m
    assert difference(jobs[BEGUN].config, jobs["Teacher"].config) == change


def test_a_teacher_without_content_ranks_as_lightgcn_and_teaches(lab, config):
    """Also if no modality weighs anything; and the student is told of none."""
    ids = embeddings(lab, "LightGCN", ids_settings(lab, config))
    for weights in ([0.5, 0.25], [0.0, 0.0]):
        without, usual = load_teacher(lab, config, NoContent), load_teacher(lab, config)
        for teacher in (without, usual):
            teacher.weights.copy_(torch.tensor(weights))
        encode = promptmm.frozen_teacher(without, config)
        best = [top_items(user @ item.T, 40)[1] for user, item in (ids, encode()[:2])]
        assert torch.equal(*best)
        assert (promptmm.frozen_teacher(usual, config) is None) == (not any(weights))
    assert not encode().user_modal
    for metric in SHOWN:
        own, theirs = (
            judge(lab, model, config, kind)[metric]
            for model, kind in (("Teacher", NoContent), ("LightGCN", Teacher))
        )
        assert np.array_equal(own, theirs)


def test_lightgcn_from_lightgcn_sees_no_content(lab, monkeypatch):
    """The row of the controls: not LightGCN itself, and the same on other features."""
    jobs = {}

    def watched(lab, title, rows, *_):
        jobs.update(rows)
        raise StopIteration

    monkeypatch.setattr("experiments.controls.compare", watched)
    quick = dataclasses.replace(lab, quick=True, source="")
    with pytest.raises(StopIteration):
        controls(quick, 1)
    here = [job for name, job in jobs.items() if not name.endswith(("shuffled", "noise"))]
    assert len(set(map(str, here))) == len(here) > 15  # none is another's double
    job = jobs["LightGCN from LightGCN"]
    assert job.kind is NoContent
    shuffled = replaced(lab.dataset, features=useless(lab)["shuffled"])
    places = quick, with_data(quick, shuffled)
    here, there = (embeddings(place, *job) for place in places)
    assert torch.equal(here[0], there[0]) and torch.equal(here[1], there[1])
    alone = embeddings(quick, "LightGCN", job.config)
    assert not torch.equal(here[0], alone[0])
    here, there = (embeddings(place, "PromptMM", job.config) for place in places)
    assert not torch.equal(here[0], there[0])


def test_a_model_is_faithful_to_itself(lab, config):
    own = Job("Teacher", config)
    found = faithful(lab, own, own)
    assert found == pytest.approx({"overlap": 1.0, "correlation": 1.0}, abs=1e-3)
    student = faithful(lab, Job("PromptMM", config), own)
    assert student["overlap"] < 1 and student["correlation"] < 1


def test_a_modality_has_no_teachers_name(lab, config):
    """Its rows would silently stand for the joint teacher's, or the other way round."""
    x = next(iter(lab.dataset.features.values()))
    named = with_data(lab, replaced(lab.dataset, features={"joint": x}))
    with pytest.raises(data.DataError, match="modalities of other names, found joint"):
        laboratory.teachers_for(named, Job("CKD", config))


def test_fidelity_of_one_user(lab, config):
    one = replaced(
        lab.dataset,
        **{
            name: getattr(lab.dataset, name)[:1].tocsr()
            for name in ("train", "val", "test")
        },
    )
    own = Job("Teacher", config)
    assert faithful(with_data(lab, one), own, own)["overlap"] == pytest.approx(1.0)


def test_nothing_to_hold_back_is_refused():
    train = sparse.csr_matrix(np.eye(2, dtype=np.float32))
    kept = [
        seed for seed in range(20) if np.random.default_rng(seed).random(2).min() >= 0.2
    ]
    with pytest.raises(data.DataError, match="a fifth of, found 2"):
        incremental.split(train, kept[0])


def test_figure3_wants_content_in_each_modality(lab):
    m, x = next(iter(lab.dataset.features.items()))
    empty = replaced(lab.dataset, features=lab.dataset.features | {m: 0 * x})
    with pytest.raises(data.DataError, match=f"expected content .* none in .*{m}"):
        ablation.figure3(with_data(lab, empty))


def test_fidelity_is_counted_over_what_a_user_has_not_seen(lab, config, monkeypatch):
    """Against a loop over users; of the reversed ranking the correlation is -1."""
    train = lab.dataset.train.toarray()
    rng = torch.Generator().manual_seed(0)
    theirs, own = ([torch.randn(n, 4, generator=rng) for n in train.shape] for _ in "ab")
    pairs = {"Teacher": theirs, "PromptMM": own, "LightGCN": [-theirs[0], theirs[1]]}
    monkeypatch.setattr("experiments.controls.embeddings", lambda _, m, *__: pairs[m])
    overlaps, correlations = [], []
    for u, seen in enumerate(train):
        left = np.flatnonzero(seen == 0)
        y_teacher, y_student = ((user[u] @ item.T).numpy() for user, item in (theirs, own))
        best, mine = (set(left[(-y[left]).argsort()][:20]) for y in (y_teacher, y_student))
        overlaps.append(len(best & mine) / 20)
        correlations.append(stats.spearmanr(y_teacher[left], y_student[left]).statistic)
    assert min((train == 0).sum(1)) >= 20  # so that every user has 20 to recommend
    teacher = Job("Teacher", config)
    found = faithful(lab, Job("PromptMM", config), teacher)
    expected = {"overlap": np.mean(overlaps), "correlation": np.mean(correlations)}
    assert found == pytest.approx(expected, abs=1e-4)
    reversed_ = faithful(lab, Job("LightGCN", config), teacher)
    assert reversed_["correlation"] == pytest.approx(-1)


# ------------------------------------------------------------ rungs without training


def test_lightgcn_plus_profile_is_kept_beside_its_lightgcn(lab, config, monkeypatch):
    """Its figures are the fusion's own, found once and then read."""
    pair = laboratory.embeddings(lab, "LightGCN", config)
    fused, _ = late_fusion(lab.dataset, tuple(pair))
    seen = lab.dataset.train + lab.dataset.val
    expected = evaluate(*fused, lab.dataset.test, seen)["recall@20"]
    assert judge(lab, laboratory.FUSED, config)["recall@20"].mean() == expected
    with monkeypatch.context() as patch:
        patch.setattr(laboratory, "late_fusion", None)  # from the file
        assert judge(lab, laboratory.FUSED, config)["recall@20"].mean() == expected
    validation = [
        judge(lab, m, config, split="val")["recall@20"].mean()
        for m in (laboratory.FUSED, "LightGCN")
    ]
    assert validation[0] >= validation[1]  # w = 0 is among the weights


def test_a_profile_is_judged_without_training(lab):
    for m, x in lab.dataset.features.items():
        pair = profile(lab.dataset.train, x)
        seen = lab.dataset.train + lab.dataset.val
        expected = evaluate(*pair, lab.dataset.test, seen)["ndcg@20"]
        found = judge(lab, f"Profile ({m})", Config())["ndcg@20"].mean()
        assert found == pytest.approx(expected)
    assert not list(lab.cache.glob("*"))


def test_what_nobody_trained_is_judged_once(lab, monkeypatch):
    asked = []

    def told(lab, model, config, kind):
        asked.append((model, config.seed))
        return {metric: np.full(4, config.seed) for metric in SHOWN}

    monkeypatch.setattr(laboratory, "judge", told)
    job = Job("MostPop", settings(lab, "LightGCN"))
    found = laboratory.judged(lab, seeded(job, 3))
    assert asked == [("MostPop", 0)]
    assert {values.shape for values in found.values()} == {(3, 4)}
    found = laboratory.judged(lab, seeded(job._replace(model="LightGCN"), 3))
    assert asked[1:] == [("LightGCN", seed) for seed in range(3)]


def test_a_child_has_its_callers_threads(monkeypatch):
    """Table 6's rows and the main job under --jobs: one, as their footers say."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    code = "import os; print(os.environ['OMP_NUM_THREADS'])"
    assert laboratory.child(["-c", code]) == "3\n"


# ------------------------------------------------------------ a new model, a new method


def test_a_new_comparison_model_needs_its_line_only(lab, odd, config):
    """Lab, settings, Table 4; unsearched, it is as wide and patient as LightGCN."""
    quick = dataclasses.replace(lab, quick=True, seeds=1)
    rows = comparison.table4(quick, 1).rows
    assert [row["model"] for row in rows] == list(names(lab))
    alike = {name: getattr(config, name) for name in ("dim", "eval_every", "patience")}
    assert odd in MODELS and settings(lab, odd) == Odd.Settings(**alike)
    assert config.dim != Odd.Settings().dim
    values = {row["model"]: row["recall@20"]["mean"] for row in rows}
    assert values[odd] == pytest.approx(values["MostPop"], abs=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_of_distillation_learns_from_the_same_teacher(
    lab, config, method, monkeypatch
):
    frozen = settings_of(method, dataclasses.replace(config, tune_prompt=False))
    learn(lab, "PromptMM", frozen)
    teachers = count_calls(monkeypatch, promptmm, "teacher_terms")
    values = judge(lab, method, frozen)
    alone = "alone" in laboratory.needs(method, frozen)
    assert bool(teachers) == alone  # one for each modality; the joint one is there
    assert np.isfinite(values["recall@20"]).all()
    assert lab.folder(method, frozen) != lab.folder("PromptMM", frozen)
    tuned = dataclasses.replace(frozen, tune_prompt=True)  # not its teacher's prompt
    pairs = [embeddings(lab, method, one) for one in (frozen, tuned)]
    assert torch.equal(pairs[0][0], pairs[1][0]) and torch.equal(pairs[0][1], pairs[1][1])


@pytest.mark.parametrize("method", METHODS)
def test_a_method_without_a_teacher_is_lightgcn(lab, config, method, monkeypatch):
    """If no modality weighs anything; KDSR, which needs no teacher, is itself."""
    monkeypatch.setattr(promptmm, "line_search", lambda pairs, *_: [0.0] * (len(pairs) - 1))
    own = settings_of(method, config)
    pairs = [embeddings(lab, *job) for job in ((method, own), ("LightGCN", config))]
    needed = laboratory.needs(method, own)
    assert torch.equal(pairs[0][0], pairs[1][0]) == bool(needed)
    progress = (lab.folder(method, own) / "progress.txt").read_text()
    assert ("this is LightGCN" in progress) == bool(needed)


def test_uni_modal_teachers(lab, config, monkeypatch):
    """Trained on one modality, on the LightGCN of the whole; a useless one is left out."""
    own = settings_of("CKD", config)
    monkeypatch.setattr(promptmm, "line_search", lambda pairs, *_: [0.5] * (len(pairs) - 1))
    trained = count_calls(monkeypatch, baselines.common, "train")
    found = laboratory.teachers_for(lab, Job("CKD", own))
    assert list(found) == list(lab.dataset.features)
    assert len(trained) == 1
    for m, place in laboratory.each_alone(lab).items():
        assert list(place.dataset.features) == [m] and place.cache != lab.cache
        user, item = embeddings(place, "Teacher", config)
        ours = found[m][0] @ found[m][1].T
        assert torch.allclose(
            ours / ours.std(), user @ item.T / (user @ item.T).std(), atol=1e-4
        )
    first = next(iter(found))

    def weigh(pairs, *_):
        useless = pairs[1][1].shape[1] == found[first][1].shape[1] - 8
        return [0.0 if useless else 0.5]

    monkeypatch.setattr(promptmm, "line_search", weigh)
    again = dataclasses.replace(own, seed=1)
    assert list(laboratory.teachers_for(lab, Job("CKD", again))) == [
        m for m in found if m != first
    ]


def test_settings_of_a_method(lab, monkeypatch):
    """LightGCN's for the student, the teacher's for its own, the method's on top."""
    best = {"LightGCN": {"l2": 0.5, "dim": 16}, "Teacher": {"dim": 8, "dropout": 0.3}}
    best |= {"PromptMM": {"l2": 0.7}, "CKD": {"lambda_specific": 3.0}}
    found = settings(dataclasses.replace(lab, chosen=best), "CKD")
    assert isinstance(found, METHODS["CKD"].Settings)
    assert (found.l2, found.dim, found.dropout, found.lambda_specific) == (0.5, 8, 0.3, 3.0)
    of_own = dataclasses.replace(found, lambda_generic=9.0)
    assert lab.folder("CKD", of_own) != lab.folder("CKD", found)
    for model in ("Teacher", "LightGCN"):
        assert lab.folder(model, of_own) == lab.folder(model, found)


# ------------------------------------------------------------ what is written


def test_outputs_appear_whole_and_say_how_they_were_made(lab, config):
    rows = [{"model": "a", "value": 0.25}]
    table = publish.markdown(rows, {"model": "m", "value": "v"})
    output = publish.Output("Title", rows, table, "a note")
    learn(lab, "PromptMM", config)
    folder = lab.out / "shop"
    publish.publish(lab, folder, "table9", output, 1.5, 2, ["--seeds 2"])
    text = (folder / "table9.md").read_text()
    command = "python -m experiments table9 --data shop --seeds 2"
    for part in ("# Title", "| a | 0.25 |", "a note", command, "2 seeds", "cpu"):
        assert part in text
    made = json.loads((folder / "table9.json").read_text())
    assert made["rows"] == rows
    assert made["command"] == command
    assert made["modalities"] == list(lab.dataset.features)
    assert made["versions"]["torch"] == torch.__version__
    trained = made["trained"]
    assert trained["models"] == 3  # the student, its teacher, the LightGCN beneath
    assert trained["torch"] == [torch.__version__]
    assert trained["threads"] == [torch.get_num_threads()]
    assert trained["from"] <= trained["to"]
    assert "tries" not in made  # there was no search
    assert "3 models trained" in text


def test_a_result_says_how_much_was_searched(lab, config, tmp_path):
    file = tmp_path / "results" / "shop" / "tune.json"
    file.parent.mkdir(parents=True)
    rows = [{"model": model} for model in ("MF-BPR", "LightGCN", "LightGCN")]
    found = {"best": {}, "tried": 2, "rows": rows, "fingerprint": lab.fingerprint}
    file.write_text(json.dumps(found))
    learn(lab, "LightGCN", config)
    made = publish.facts(lab, "command", 0.0, 1, "")
    assert made["tries"] == {"MF-BPR": 1, "LightGCN": 2}


def test_the_summary_sets_the_datasets_side_by_side(tmp_path):
    """Rows of the longest table first, what gains nowhere aside; blank: not there."""
    one = {"mean": 0.25, "std": 0.01, "runs": [0.24, 0.26]}
    gain = {"gain": {"recall@20": 0.25}, "p": 0.03}
    loss = {"gain": {"recall@20": -0.25}, "p": 0.03}
    base = {"gain": {"recall@20": 0.0}}
    tables = {
        "a": [("LightGCN", base), ("Teacher", gain), ("PromptMM", loss)],
        "b": [("MF-BPR", loss), ("Profile (x)", loss), ("LightGCN", base), ("New", gain)],
    }
    for name, rows in tables.items():
        (tmp_path / name).mkdir()
        content = [{"model": model, "recall@20": one, **more} for model, more in rows]
        (tmp_path / name / "table4.json").write_text(json.dumps({"rows": content}))
    found = publish.summary(sorted(tmp_path.glob("*/table4.json")))
    full = "0.2500 ± 0.0100 (+25.0%, p = 0.03)"
    assert found.splitlines()[2:] == [
        "| LightGCN | 0.2500 ± 0.0100 | 0.2500 ± 0.0100 |",
        f"| New |  | {full} |",
        f"| Teacher | {full} |  |",
        "| PromptMM | 0.2500 ± 0.0100 (-25.0%, p = 0.03) |  |",
    ]


def test_the_pages_take_their_figures_from_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(laboratory, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    (tmp_path / "experiments").mkdir()
    (tmp_path / "results" / "a.md").write_text(
        "x\n<!-- table -->\n| 1 |\n<!-- end -->\ny\n"
    )
    (tmp_path / "results" / "b.txt").write_text("plain\n")
    page = "before\n<!-- results/{} -->\nold\n<!-- end -->\nafter\n"
    (tmp_path / "README.md").write_text(page.format("a.md"))
    (tmp_path / "experiments" / "README.md").write_text(page.format("b.txt"))
    assert main(["readme"]) == 0
    found = (tmp_path / "README.md").read_text()
    assert found == page.format("a.md").replace("old", "| 1 |")
    found = (tmp_path / "experiments" / "README.md").read_text()
    assert found == page.format("b.txt").replace("old", "```text\nplain\n```")


def test_the_summary_leaves_the_tags_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(laboratory, "ROOT", tmp_path)
    row = {
        "model": "LightGCN",
        "recall@20": laboratory.spread([0.25]),
        "gain": {"recall@20": 0.0},
    }
    for name in ("citeulike", "citeulike_tag"):
        (tmp_path / "results" / name).mkdir(parents=True)
        file = tmp_path / "results" / name / "table4.json"
        file.write_text(json.dumps({"rows": [row]}))
    publish.fill_pages()
    found = (tmp_path / "results" / "summary.md").read_text()
    assert "| model | citeulike |\n" in found and "0.2500" in found


# ------------------------------------------------------------ every part


FAST = [part.name for part in EVERY if part.where != "paper"]
FAST = [name for name in FAST if name not in ("first_run", "table6", "figure3")]


@pytest.mark.parametrize("name", FAST)
def test_each_part_runs_and_a_second_time_does_nothing(name, embedded, monkeypatch, capsys):
    monkeypatch.setattr(publish, "draw", lambda *_: None)
    argv = [name, "--quick", "--out", str(embedded)]
    assert main(argv) == 0
    file = embedded / "synthetic" / f"{name}.json"
    first = file.read_bytes()
    assert json.loads(first)["rows"]
    assert file.with_suffix(".md").exists()
    capsys.readouterr()
    assert main(argv) == 0
    assert "finished before" in capsys.readouterr().out
    assert file.read_bytes() == first


def test_table_4_has_the_models_that_were_searched(lab, monkeypatch):
    """All of them where nothing was; one that is named, whether it was or not."""
    shown: list[set] = []

    def watched(lab, title, jobs, *_):
        shown.append(set(jobs) & set(MODELS))
        raise StopIteration

    monkeypatch.setattr(comparison, "compare", watched)
    best = {"MF-BPR": {}, "LightGCN": {}, "FREEDOM": {}, "Teacher": {}, "PromptMM": {}}
    for found, models in (({}, ""), ({"best": best}, ""), ({"best": best}, "BM3")):
        monkeypatch.setattr(comparison, "search", lambda _, found=found: found)
        with pytest.raises(StopIteration):
            comparison.table4(lab, 1, models)
    plain = {"MF-BPR", "LightGCN"}
    assert shown == [set(MODELS), plain | {"FREEDOM"}, plain | {"BM3"}]


def test_the_best_rival_teaches_promptmms_student(lab, monkeypatch):
    """The best by validation, if the table shows it; without a search nobody does."""
    rows = [
        {"model": model, "validation": reached, "settings": {}}
        for model, reached in (("LATTICE", 0.2), ("FREEDOM", 0.3), ("LightGCN", 0.9))
    ]
    found = {"best": {row["model"]: {} for row in rows}, "rows": rows}
    shown = []

    def watched(lab, title, jobs, *_):
        shown.append([name for name in jobs if name.endswith(laboratory.DISTILLED)])
        raise StopIteration

    monkeypatch.setattr(comparison, "compare", watched)
    for search, models in ((found, ""), (found, "LATTICE"), ({}, ""), (found, "BM3")):
        monkeypatch.setattr(comparison, "search", lambda _, search=search: search)
        with pytest.raises(StopIteration):
            comparison.table4(lab, 1, models)
    assert shown == [["FREEDOM, distilled"], [], [], []]  # the second keeps FREEDOM's row


def test_a_student_of_a_comparison_model(lab, config):
    """The lists and pairs of PromptMM's student, under LATTICE's logits divided by σ."""
    config = dataclasses.replace(config, tune_prompt=True, list_from="both")
    lattice = settings_of("LATTICE", config)
    settings_ = {"LATTICE": vars(lattice), "PromptMM": vars(config)}
    lab = dataclasses.replace(lab, chosen=settings_)
    name = "LATTICE, distilled"
    own = laboratory.settings(lab, name)
    known = {"list_from": "joint", "lambda_embed": 0.0, "tune_prompt": False}
    assert difference(own, config) == known
    [teacher, job] = laboratory.with_teachers(lab, [Job(name, own)])
    assert teacher == Job("LATTICE", lattice) and job == Job(name, own)
    user, item = embeddings(lab, "LATTICE", lattice)
    logits = user @ item.T
    size = logits.std(dim=1, correction=0).square().mean().sqrt()
    folder = lab.out / "by hand"
    folder.mkdir(parents=True)
    run = promptmm.Run(folder, lab.dataset, own, lab.device, {})
    scaled = {"joint": (user / size, item)}
    expected = distillers.common.train(run, distillers.frozen.promptmm, scaled)
    for found, e in zip(embeddings(lab, name, own), expected, strict=True):
        assert (found - e).norm() <= 1e-3 * e.norm()
    plain = embeddings(lab, "LightGCN", config)
    assert (found - plain[1]).norm() > 0.1 * plain[1].norm()  # it was taught


def test_the_cache_knows_the_comparison_model_that_teaches(lab, config):
    """Its settings, its code, and its seed, which is the student's."""

    def folder(name: str, **changed) -> Path:
        teacher = vars(settings_of("LATTICE", config)) | changed
        found = {"LATTICE": teacher, "BM3": {}, "PromptMM": vars(config)}
        place = dataclasses.replace(lab, chosen=found)
        return place.folder(name, laboratory.settings(place, name))

    names_of = [folder("LATTICE, distilled"), folder("LATTICE, distilled", neighbours=3)]
    assert len({*names_of, folder("BM3, distilled"), folder("PromptMM")}) == 4
    assert folder("LATTICE, distilled", seed=5) == names_of[0]
    files = {file.name for file in laboratory.sources("LATTICE, distilled")}
    assert {"lattice.py", "frozen.py", "promptmm.py"} <= files


@pytest.mark.parametrize("name", laboratory.ADDED)
def test_the_cache_knows_what_the_lab_adds_to_a_model(name, monkeypatch):
    """As it was imported: nothing that is written to the file meanwhile."""
    digest = laboratory.code_digest.__wrapped__
    files = laboratory.sources("PromptMM")
    here = Path(laboratory.__file__)
    text = laboratory.IMPORTED[here]
    before = digest(files)
    monkeypatch.setitem(laboratory.IMPORTED, here, "OTHER = 1\n" + text)
    assert digest(files) == before
    body = text.index("\n    ", text.index(f"def {name}("))
    monkeypatch.setitem(laboratory.IMPORTED, here, f"{text[:body]}\n    1 + 1{text[body:]}")
    assert digest(files) != before


def test_a_clone_behind_a_link_is_the_same(tmp_path):
    """A part runs there, and what it has finished is known by the same stamp."""
    (tmp_path / "link").symlink_to(CODE)
    stamps = []
    for folder in (CODE, tmp_path / "link"):
        code = (
            f"import sys; sys.path.insert(0, {str(folder)!r});"
            "from experiments.__main__ import PARTS, laboratory, parse, state_of;"
            "lab = laboratory(parse(['table3', '--quick']));"
            "print(state_of(lab, PARTS['table3'], {}))"
        )
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        stamps.append(done.stdout)
    assert stamps[0] == stamps[1]


def test_what_a_finished_part_depends_on(lab, monkeypatch):
    """Seeds, what was asked, and every file that experiments are made of."""
    lab, part = dataclasses.replace(lab, seeds=0), PARTS["table5"]
    states = [state_of(lab, part, {})] * 2 + [state_of(lab, part, {"models": "BM3"})]
    states.append(state_of(lab, part._replace(seeds=part.seeds + 3), {}))
    states.append(state_of(dataclasses.replace(lab, quick=True), part, {}))
    true_bare = laboratory.bare
    for place in ("def markdown(", "def paired_test("):
        monkeypatch.setattr(
            "experiments.__main__.bare",
            lambda source, place=place: true_bare(source) + "changed" * (place in source),
        )
        states.append(state_of(lab, part, {}))
    assert states[0] == states[1] and len(set(states)) == len(states) - 1


def test_a_finished_table_4_depends_on_what_a_comparison_model_taught(lab, monkeypatch):
    """The student of the best of them is trained by distillers/, which no other row is."""
    code = {"frozen.py": "as it was"}

    def code_digest(files: tuple[Path, ...]) -> str:
        return "-".join(code.get(file.name, "") for file in files)

    monkeypatch.setattr(comparison, "rivals", lambda _: ["BM3"])
    monkeypatch.setattr(laboratory, "code_digest", code_digest)
    before = state_of(lab, PARTS["table4"], {})
    assert state_of(lab, PARTS["table4"], {}) == before
    code["frozen.py"] = "edited"
    assert state_of(lab, PARTS["table4"], {}) != before


def test_the_parts_of_all(embedded, folder, monkeypatch):
    """On the embedded data all but the long controls, on real ones what means something."""
    ran = []
    monkeypatch.setattr(
        "experiments.__main__.perform", lambda lab, part, *_: ran.append(part)
    )
    assert main(["all", "--out", str(embedded)]) == 0
    assert ran == [part for part in EVERY if part.where != "named"]
    named = {part.name for part in EVERY if part.where == "named"}
    asked = "options controls lists prompt transfer methods claims"
    assert named == set(asked.split())
    assert list(EVERY) == list(PARTS.values())
    ran.clear()
    assert main(["all", "--data", str(folder), "--out", str(embedded)]) == 0
    expected = "table3 table4 table5 popularity table6 table7 figure5".split()
    assert [part.name for part in ran] == expected


def test_a_finished_part_is_made_again_after_a_change_of_code(lab, tmp_path, monkeypatch):
    made = []

    def table3(lab):
        made.append(lab)
        return comparison.table3(lab)

    part = PARTS["table3"]._replace(function=table3)
    perform(lab, part, False)
    perform(lab, part, False)
    assert len(made) == 1
    files = changed_core(tmp_path / "new", "temperature**2", "temperature**3")
    monkeypatch.setattr(laboratory, "CORE", files)
    perform(lab, part, False)
    assert len(made) == 2


def test_a_search_is_made_again_after_a_change_of_code_only(lab, tmp_path, monkeypatch):
    """Not because of the settings that it has found itself."""
    made = []

    def search(lab, tries):
        made.append(tries)
        best = {"LightGCN": {"l2": 0.5}}
        extra = {"best": best, "tried": tries, "fingerprint": lab.fingerprint}
        return publish.Output("Search", [], "", extra=extra)

    part = TUNE._replace(function=search)
    monkeypatch.setattr("experiments.__main__.TUNE", part)
    lab = dataclasses.replace(lab, chosen={})
    for tries in (4, 4, 5):
        perform(lab, part, False, tries=tries)
    assert made == [4, 5]
    assert settings(lab, "LightGCN").l2 == 0.5
    files = changed_core(tmp_path / "new", "temperature**2", "temperature**3")
    monkeypatch.setattr(laboratory, "CORE", files)
    perform(lab, part, False, tries=5)
    assert made == [4, 5, 5]


def test_the_methods_search_is_made_again_after_another_search(lab, monkeypatch):
    """It begins at what that one found."""
    made = []

    def found(lab, tries):
        made.append(tries)
        return publish.Output("Search", [], "", extra={"best": {}, "tried": tries})

    part = TUNES["tune_methods"]._replace(function=found)
    lab = dataclasses.replace(lab, chosen={})
    for step in (0.1, 0.1, 0.2):
        published_search(lab, lab.out, LightGCN={"lr_student": step})
        perform(lab, part, False, tries=4)
    assert made == [4, 4]


def published_search(lab: Lab, out: Path, **best: dict) -> None:
    file = out / lab.dataset.name / "tune.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    found = {"best": best, "tried": 4, "rows": [], "fingerprint": lab.fingerprint}
    file.write_text(json.dumps(found))


def test_a_part_reads_the_search_once(lab):
    """Published anew while it trains, its settings stay; the next part has the new ones.

    That is not "finished before" either if a model is searched that keeps its defaults.
    """
    lab = dataclasses.replace(lab, chosen={})
    published_search(lab, lab.out, LightGCN={"l2": 0.5})
    seen = []

    def table3(lab):
        for l2 in (0.5, 0.25):
            published_search(lab, lab.out, LightGCN={"l2": l2})
            seen.append(settings(lab, "LightGCN").l2)
        return comparison.table3(lab)

    part = PARTS["table3"]._replace(function=table3)
    perform(lab, part, False)
    perform(lab, part, False)
    assert seen == [0.5, 0.5, 0.25, 0.25]
    published_search(lab, lab.out, **{"LightGCN": {"l2": 0.25}, "MF-BPR": {}})
    perform(lab, part, False)
    assert len(seen) == 6


def test_a_search_in_out_comes_before_the_one_in_results(lab, tmp_path):
    lab = dataclasses.replace(lab, chosen={}, out=tmp_path / "elsewhere")
    published_search(lab, laboratory.ROOT / "results", LightGCN={"l2": 0.5})
    assert settings(lab, "LightGCN").l2 == 0.5
    published_search(lab, lab.out, LightGCN={"l2": 0.25})
    assert settings(lab, "LightGCN").l2 == 0.25


def test_one_seed_says_that_no_seed_was_drawn():
    one, five = publish.protocol(Config(), 1), publish.protocol(Config(), 5)
    assert one.endswith("items; one seed") and "seeds 0 to 4; mean ±" in five
    assert "no seed drawn" in publish.paired(1)
    assert "seeds of both models drawn too" in publish.paired(5)


def test_who_reads_no_feature_is_not_charged_with_any(folder):
    for name in ("student alone", "MF-BPR", "LightGCN", "NGCF"):
        light = cost.needed(name, folder)
        assert not light.features
        assert data.fingerprint(light, whole=False) == data.fingerprint(
            data.load(folder), whole=False
        )
    for name in ("teacher", "student, prompt frozen", "VBPR"):
        assert (
            cost.needed(name, folder).features.keys() == data.load(folder).features.keys()
        )


def test_a_served_id_model_reads_no_feature(folder, tmp_path, config, monkeypatch):
    model = MODELS["MF-BPR"](data.load(folder), settings_of("MF-BPR", config), "cpu")
    data.write(tmp_path / "model.pt", lambda file: torch.save(model.state_dict(), file))
    native = tmp_path / "native"
    assert data.main(["convert", str(folder), str(native)]) == 0
    monkeypatch.setattr(data, "load", None)
    found = cost.load("MF-BPR", native, tmp_path, settings_of("MF-BPR", config), "cpu")
    assert torch.equal(found.user, model.user)


def test_the_settings_beside_a_teacher_are_its_own(lab, config):
    """Whoever had it trained: a method's settings would make no Config again (Table 6)."""
    name = "PRM-KD (ours after 002)"
    job = Job(name, settings_of(name, config))
    learn(lab, *job)
    teacher = lab.folder(*job._replace(model="Teacher"))
    found = Config(**data.read_json(teacher / "config.json", sealed=True))
    assert found.lr_teacher == config.lr_teacher and found.dim == config.dim


def test_figures_of_the_late_fusion_are_of_todays_core(lab, config, tmp_path, monkeypatch):
    """It is made of the core's unit rows and graph: judged anew after they change."""
    judge(lab, laboratory.FUSED, config)
    files = changed_core(tmp_path / "new", "temperature**2", "temperature**3")
    keeping = dataclasses.replace(lab, keep=True)
    monkeypatch.setattr(laboratory, "CORE", files)
    judge(keeping, laboratory.FUSED, config)
    assert len([*lab.cache.glob("lightgcn-*/fused-*-test-*.npz")]) == 2


def test_the_main_job_is_shown_as_it_runs(folder, tmp_path, monkeypatch):
    """A process of its own, on any data; so is a complaint of it our one line."""
    monkeypatch.setattr(laboratory, "ROOT", tmp_path)
    flags = ["--data", str(folder), "--quick", "--out", str(tmp_path / "out")]
    assert main(["first_run", *flags]) == 0
    file = tmp_path / "out" / "shop" / "first_run.json"
    [metrics] = json.loads(file.read_text())["rows"]
    recall = metrics["test"]["student"]["recall@20"]
    assert f"{recall:.4f}" in file.with_suffix(".md").read_text()
    complaint = (
        "import sys; print('first line', file=sys.stderr); sys.exit('error: no data')"
    )
    with pytest.raises(data.DataError, match="^error: no data$"):
        laboratory.child(["-c", complaint])


def test_figure_3_of_a_small_catalogue():
    """t-SNE's usual perplexity is for more points than that."""
    pytest.importorskip("sklearn")
    a, b = np.random.default_rng(0).normal(size=(2, 12, 4))
    panels = {"x": {"a": a, "b": b}, "f": {"a": b, "b": a}}
    figure = publish.styled(lambda figure: ablation.plot_tsne(panels, figure))
    assert len(figure.axes[0].collections) == 2


def test_figure_3_needs_two_modalities(folder, embedded, capsys):
    (folder / "text_feat.npy").unlink()
    flags = ["--data", str(folder), "--quick", "--out", str(embedded)]
    assert main(["figure3", *flags]) == 2
    assert "two modalities" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["table4", "--seeds", "-1"], "--seeds 0 or more"),
        (["tune", "--tries", "25"], "2 to 24"),
        (["table4", "--jobs", "0"], "--jobs 1 to 256, found 0"),
        (["tune", "--models", "BM4"], "expected some of MF-BPR"),
        (["table5", "--models", "BM3"], "expected with tune or table4"),
        (["methods", "--questions", "C-1"], "expected with claims, found with methods"),
        (["table5", "--tries", "3"], "--tries: expected with tune or tune_methods"),
        (["tune", "--seeds", "3"], "--seeds: expected with a part of several runs"),
        (["table6", "--seeds", "3"], "--seeds: expected with a part of several runs"),
        (["tune", "--models", "LightGCN", "--quick"], "expected Teacher with LightGCN"),
        (["tune", "--models", "LightGCN,Teacher", "--quick"], "PromptMM with Teacher"),
        (["table44"], "invalid choice"),
        (["table4", "--data", "nowhere"], "nowhere"),
        (["table4", "--device", "tpu"], "--device"),
        (["table4", "--colour"], "--colour"),
        (["bench", "--data", "nowhere"], "nowhere"),
        (["--quick", "bench"], "bench: expected first"),
    ],
)
def test_refusals(argv, expected, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--out", str(out)] if argv[0] != "bench" else []
    assert main([*argv, *flags]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert expected in error
    assert not out.exists()


# ------------------------------------------------------------ recall by popularity


def test_recall_by_popularity_splits_the_recall(lab):
    """One test item a user: the groups' recalls, weighted by share, are the whole."""
    test = lab.dataset.test
    rows, columns = np.arange(test.shape[0]), test.argmax(1).A1
    single = sparse.csr_matrix(
        (np.ones(len(rows), np.float32), (rows, columns)), test.shape
    )
    lab = dataclasses.replace(lab, dataset=replaced(lab.dataset, test=single), quick=True)
    share, popular, *_ = comparison.popularity(lab, 1).rows
    parts = {group: float(share[group].rstrip("%")) / 100 for group in comparison.GROUPS}
    assert sum(parts.values()) == pytest.approx(1, abs=2e-3)
    assert max(parts.values()) < 1
    whole = judge(lab, "MostPop", Config())["recall@20"].mean()
    split = sum(parts[group] * popular[group]["mean"] for group in parts)
    assert split == pytest.approx(whole, abs=2e-3)


def test_the_groups_of_popularity_begin_and_end_where_they_say():
    """Items seen 0, 1, 3, 4, 10, 11, 50 and 51 times, each once in the test split."""
    seen = [0, 1, 3, 4, 10, 11, 50, 51]
    train = sparse.csr_matrix(np.arange(60)[:, None] < np.array(seen), dtype=np.float32)
    test = sparse.csr_matrix(np.arange(60)[:, None] == 59, dtype=np.float32)
    test = test.multiply(np.ones((1, len(seen)))).tocsr()
    groups = comparison.by_popularity(train, test)
    found = {group: [seen[i] for i in part.indices] for group, part in groups.items()}
    expected = {
        "never": [0],
        "1-3": [1, 3],
        "4-10": [4, 10],
        "11-50": [11, 50],
        "> 50": [51],
    }
    assert found == expected


def test_rivals_are_ranked_by_validation():
    """Of the settings chosen; with content alone."""
    reached = {
        "LightGCN": 0.9,  # no content
        "NGCF": 0.8,
        "VBPR": 0.1,
        "GRCN": 0.3,
        "LATTICE": 0.5,
        "FREEDOM": 0.4,
        "Teacher": 0.95,  # no comparison model
    }
    rows = [
        {"model": model, "validation": value, "settings": {"l2": 0.1}}
        for model, value in reached.items()
    ]
    rows[3] |= {"validation": 0.6, "three seeds": 0.3}  # one seed's was luck
    lucky = {"model": "GRCN", "validation": 0.7, "settings": {"l2": 0.2}}  # not chosen
    found = {"best": {model: {"l2": 0.1} for model in reached}, "rows": [*rows, lucky]}
    assert comparison.rivals(found) == ["LATTICE", "FREEDOM", "GRCN", "VBPR"]
    assert comparison.rivals({}) == []


def test_the_picture_of_gains_holds_what_was_trained():
    """A profile far below does not flatten the others; their error bars are inside."""

    def row(mean, std):
        return {group: {"mean": mean, "std": std} for group in comparison.GROUPS}

    rows = {
        "Profile (text)": row(0.1, 0.0),
        "Teacher": row(0.6, 0.05),
        "PromptMM": row(0.4, 0.2),
    }
    low, high = comparison.heights(rows, row(0.5, 0.0))
    assert low == pytest.approx(-0.3 - 0.045)
    assert high == pytest.approx(0.15 + 0.045)
    level = comparison.heights({"Teacher": row(0.5, 0.0)}, row(0.5, 0.0))
    assert level == (-0.01, 0.01)


def test_gains_are_drawn_for_every_rung_and_group(lab):
    """One bar a model and group: its recall over LightGCN's."""
    pytest.importorskip("matplotlib")
    quick = dataclasses.replace(lab, quick=True)
    rows = comparison.popularity(quick, 1).rows
    figure = publish.styled(lambda figure: comparison.plot_gains(rows, figure))
    [axis] = figure.axes
    by_model = {row["model"]: row for row in rows[1:]}
    shown = [m for m in names(quick) if m in by_model and m not in ("MostPop", "LightGCN")]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == shown
    assert shown == ["Profile (text)", "Profile (visual)", laboratory.FUSED, *shown[-2:]]
    assert len(axis.patches) == len(shown) * len(comparison.GROUPS)
    bars = iter(axis.patches)
    for model in shown:
        for group in comparison.GROUPS:
            own, base = (by_model[m][group]["mean"] for m in (model, "LightGCN"))
            assert next(bars).get_height() == pytest.approx(own - base)
    lefts = sorted(bar.get_x() for bar in axis.patches)
    width = axis.patches[0].get_width()
    assert (np.diff(lefts) > 0.99 * width).all()  # none stands before another


# ------------------------------------------------------------ ablation


def difference(one: Config, other: Config) -> dict:
    """The settings of one that are not another's."""
    return {key: x for key, x in vars(one).items() if x != getattr(other, key)}


def test_ablations_leave_out_what_they_say(lab, config):
    rows = ablation.variants(dataclasses.replace(lab, quick=True), config)
    random_lists = {"list_items": "random"}
    assert {name: difference(job.config, config) for name, job in rows.items()} == {
        "PromptMM": {},
        "w/o Prompt": {"lambda_prompt": 0.0},
        "prompt tuned": {"tune_prompt": True},
        "w/o PairKD": {"lambda_pair": 0.0},
        "w/o ListKD": {"lambda_list": 0.0},
        "w/o EmbKD": {"lambda_embed": 0.0},
        "w/o disentangle": {"beta": "identity", "alpha": 1.0},
        "α = 1": {"alpha": 1.0},
        "lists of random items": random_lists,
        "lists of random items, α = 1": random_lists | {"alpha": 1.0},
        "lists from each modality": {"list_from": "modal"},
    }
    assert {(job.model, job.kind) for job in rows.values()} == {("PromptMM", Teacher)}


@pytest.mark.parametrize(
    ("tuned", "left"), [(True, "prompt frozen"), (False, "prompt tuned")]
)
def test_no_row_is_anothers_double(lab, config, tuned, left, monkeypatch):
    """Neither the state the prompt is in anyway, nor a λ₃ that is the full model's own."""
    monkeypatch.setattr(ablation, "learn_all", lambda *_: None)
    monkeypatch.setattr(ablation, "recall", lambda *_: 1.0)  # all alike: the first λ₃
    full = dataclasses.replace(config, tune_prompt=tuned)
    rows = ablation.variants(lab, full)
    assert left in rows
    assert len({"prompt frozen", "prompt tuned"} & set(rows)) == 1
    assert len(set(map(str, rows.values()))) == len(rows) == 11
    assert not [name for name in rows if "λ₃" in name]


def test_the_other_weight_of_plain_kl_is_chosen_on_validation(lab, config, monkeypatch):
    """Validation prefers three times λ₃, test ten times: it is three."""
    best = {"val": 3 * config.lambda_list, "test": 10 * config.lambda_list}

    def told(lab, job, split="test"):
        return float(job.config.lambda_list == best[split])

    monkeypatch.setattr(ablation, "learn_all", lambda *_: None)
    monkeypatch.setattr(ablation, "recall", told)
    *_, (name, job) = ablation.variants(lab, config).items()
    assert name == f"w/o disentangle, λ₃ = {3 * config.lambda_list:g}"
    assert job.config.lambda_list == 3 * config.lambda_list
    assert job.config.beta == "identity"


def test_no_process_is_started_for_nothing(lab, monkeypatch):
    monkeypatch.setattr(laboratory, "ProcessPoolExecutor", None)
    place = dataclasses.replace(lab, side_by_side=2)
    assert list(laboratory.learn_each(place, [])) == []


def test_a_smoke_test_takes_the_first_of_many_rows(lab):
    assert laboratory.some(lab, "abc", 2) == "abc"
    assert laboratory.some(dataclasses.replace(lab, quick=True), "abc", 2) == "ab"


def test_options_change_one_thing_each(lab, monkeypatch):
    seen = {}

    def watched(lab, title, rows, *_):
        seen.update(rows)
        raise StopIteration

    monkeypatch.setattr(ablation, "compare", watched)
    with pytest.raises(StopIteration):
        ablation.options(lab, 1)
    assert len(set(map(str, seen.values()))) == len(seen)
    full = settings(lab)
    for name, job in seen.items():
        assert difference(job.config, full) == ablation.OPTIONS[name], name
        assert job.model == "PromptMM" and job.kind is Teacher
    two = {"prompt tuned, no anchor (P11)"}
    assert {n for n, change in ablation.OPTIONS.items() if len(change) > 1} == two
    assert set(ablation.OPTIONS) - set(seen) == {"student of 2 layers"}  # the default


def test_another_kind_of_teacher_has_models_of_its_own(lab, config):
    job = Job("PromptMM", config, NoContent)
    folder = learn(lab, *job)
    assert folder != lab.folder("PromptMM", config)
    teachers = [lab.folder("Teacher", config, kind) for kind in (Teacher, NoContent)]
    assert [laboratory.is_trained(teacher) for teacher in teachers] == [False, True]
    assert isinstance(load_teacher(lab, config, job.kind), NoContent)


def test_figure_3_shows_f_as_it_is(lab, config):
    """Modalities of unlike widths: all distances are those of f^m."""
    chosen = np.array([3, 1, 20])
    points = ablation.reduced_points(lab, config, chosen)
    with torch.no_grad():
        reduced = load_teacher(lab, config).reduced()
    assert len({f.shape[1] for f in reduced.values()}) == 2
    assert len({part.shape for part in points.values()}) == 1
    for m, f in reduced.items():
        expected = torch.cdist(f[chosen], f[chosen]).numpy()
        found = np.linalg.norm(points[m][:, None] - points[m][None], axis=-1)
        assert np.allclose(found, expected, atol=1e-4) and expected.max() > 0


def test_mixing_is_0_for_clouds_apart_and_1_for_one_cloud():
    rng = np.random.default_rng(0)
    cloud, other = rng.normal(size=(2, 300, 8))
    assert ablation.mixing({"a": cloud, "b": other + 100}) == 0
    assert ablation.mixing({"a": cloud, "b": other}) == pytest.approx(1, abs=0.1)
    assert ablation.mixing({"a": cloud, "b": other, "c": other[::-1]}) > 0.9
    half = np.concatenate([other[:150], other[150:] + 100])  # half of it among the others
    assert 0.3 < ablation.mixing({"a": cloud, "b": half}) < 0.8


# ------------------------------------------------------------ cost


def test_bytes_to_serve_are_those_of_the_numbers_held(lab, config, tmp_path):
    """4 bytes a number: the student's tables; the teacher's weights and features.

    The teacher's own tables are LightGCN's, here of twice the student's width.
    """
    native = tmp_path / "native"
    data.save(lab.dataset, native)
    config = dataclasses.replace(config, epochs=1, dim_teacher=16)
    lab = beneath(lab, dataclasses.replace(config, dim=2 * config.dim))
    learn(lab, "PromptMM", config)
    n_users, n_items = lab.dataset.train.shape
    widths = [x.shape[1] for x in lab.dataset.features.values()]
    student = (n_users + n_items) * config.dim
    learnt = 2 * student + sum((width + 1) * min(width, 16) for width in widths)
    learnt += (config.dim + 1) * config.dim  # the prompt
    for model in cost.STAGES:
        taught = "Teacher" if model == "teacher" else "PromptMM"
        row = cost.measure(model, native, lab.folder(taught, config), "cpu")
        trainable, buffers = student, 0
        if model == "teacher":
            trainable, buffers = learnt, n_items * sum(widths)
        assert (row["trainable"], row["buffers"]) == (trainable, buffers)
        assert row["serve"] == 4 * (trainable + buffers)
        assert min(row["epoch"], row["embed"]) > 0
        assert row["peak_train"] >= row["peak_embed"] > 10


def test_table_6_measures_each_row_in_a_process_of_its_own(embedded, monkeypatch):
    """The last row for real; the other here, for a process takes seconds to start."""
    true_child = cost.child

    def child(command: list[str]) -> str:
        if command[-3] == "student, prompt tuned":
            return true_child(command)
        printed_here = io.StringIO()
        with contextlib.redirect_stdout(printed_here):
            assert cost.main(command[3:]) == 0
        return printed_here.getvalue()

    monkeypatch.setattr(cost, "child", child)
    assert main(["table6", "--quick", "--out", str(embedded)]) == 0
    table = json.loads((embedded / "synthetic" / "table6.json").read_text())
    assert [row["model"] for row in table["rows"]] == list(cost.COSTS[:2])
    teacher, student = table["rows"]
    assert teacher["learnt"] == teacher["all"] == "100.0%"
    share = student["trainable"] / teacher["trainable"]
    assert student["learnt"] == f"{share:.1%}"
    assert student["serve"] == 4 * student["trainable"] < teacher["serve"]
    assert table["trained"]["models"] == 3


def test_table_6_has_a_row_for_every_model(lab, config, monkeypatch):
    """Each from the folder of that model; a smoke test has some of them."""
    asked = []

    def child(command: list[str]) -> str:
        asked.append((command[-3], Path(command[command.index("--run") + 1]).name))
        sizes = dict.fromkeys(("trainable", "buffers", "embed", "epoch"), 1)
        return json.dumps(sizes | {"peak_embed": 1, "peak_train": 1, "serve": 8})

    monkeypatch.setattr(cost, "child", child)
    short = {"dim": 8, "batch": 100, "epochs": 1}
    chosen = dict.fromkeys(cost.OTHERS, short) | {"PromptMM": vars(config)}
    rows = cost.table6(dataclasses.replace(lab, chosen=lab.chosen | chosen)).rows
    assert [row["model"] for row in rows] == [model for model, _ in asked]
    assert [row["model"] for row in rows] == [*cost.STAGES, *cost.OTHERS]
    folders = dict(asked)
    assert all(folders[m].startswith(laboratory.slug(m)) for m in ("teacher", *cost.OTHERS))
    assert {folders[stage][:8] for stage in cost.STAGES[1:]} == {"promptmm"}


@pytest.mark.parametrize("model", cost.OTHERS)
def test_table_6_measures_a_comparison_model_as_it_was_trained(
    model, lab, tmp_path, monkeypatch
):
    """Its own settings, terms, lists and hook; it learns all its parameters' numbers."""
    seen = []
    data.save(lab.dataset, tmp_path / "native")
    config = MODELS[model].Settings(dim=8, epochs=1, batch=100)
    folder = learn(lab, model, config)
    monkeypatch.setattr(cost, "train_epoch", lambda *arguments: seen.append(arguments))
    row = cost.measure(model, tmp_path / "native", folder, "cpu")
    learner, _, (_, lists), batch, terms = seen[0]
    assert isinstance(learner, MODELS[model]) and learner.config == config
    assert (terms, batch) == (learner.terms, 100)
    assert lists.shape[1] == learner.width
    assert row["trainable"] == sum(weight.numel() for weight in learner.parameters())
    widths = [x.shape[1] for x in lab.dataset.features.values()]
    reads = model not in ("MF-BPR", "NGCF")
    assert row["buffers"] == reads * sum(widths) * lab.dataset.train.shape[1]
    user, item = laboratory.embeddings(lab, model, config)
    assert all(
        torch.equal(a, b) for a, b in zip(learner.eval()(), (user, item), strict=True)
    )


@pytest.mark.parametrize("kind", cost.STAGES[1:])
@pytest.mark.parametrize(("items", "width"), [("top", 2), ("random", 4)])
def test_what_learns_in_each_row_of_table_6(kind, items, width, tiny, config, monkeypatch):
    """And how often the best items are found: in each epoch only if the prompt moves."""
    tuned, alone = kind == "student, prompt tuned", kind == "student alone"
    searches = count_calls(monkeypatch, promptmm, "best_unobserved")
    student = promptmm.Student(tiny.train, config)
    own = dataclasses.replace(config, tune_prompt=tuned, list_items=items)
    training = cost.objective(kind, student, tiny, own, "cpu")
    parts = {
        name for name, part in training.learner.items() if len(list(part.parameters()))
    }
    expected = {"student"} | ({"project"} if not alone else set())
    assert parts == expected | ({"prompt"} if tuned else set())
    assert training.width == (2 if alone else width)
    for _ in range(3):
        training.each_epoch()
    times = {"student, prompt tuned": 3, "student, prompt frozen": 1, "student alone": 0}
    assert len(searches) == (times[kind] if items == "top" else 0)
    users, lists = data.Sampler(tiny.train).epoch(torch.Generator(), training.width - 1)
    terms = training.terms(users, lists)
    assert ({"pair_kd", "list_kd", "embed_kd"} & set(terms) == set()) == alone
    sum(terms.values()).backward()
    for name, weight in training.learner.named_parameters():
        assert weight.grad is not None and weight.grad.any(), name


@pytest.mark.parametrize("kind", cost.STAGES)
@pytest.mark.parametrize("given", [0, 77])
def test_table_6_takes_the_batches_of_training(kind, given, tiny, config, monkeypatch):
    seen = []
    monkeypatch.setattr(cost, "train_epoch", lambda *arguments: seen.append(arguments[3]))
    config = dataclasses.replace(config, batch=given, batch_teacher=2 * given)
    stage = "teacher" if kind == "teacher" else "student"
    model = Teacher(tiny, config) if kind == "teacher" else None
    cost.epoch(kind, model or promptmm.Student(tiny.train, config), tiny, config, "cpu")
    expected, _ = promptmm.pace(config, stage, tiny.train.nnz)
    assert set(seen) == {expected}


# ------------------------------------------------------------ incremental


def split_train(train: sparse.csr_matrix) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    return incremental.split(train, 0)


def test_a_curve_says_which_epoch_is_kept():
    """The best one, not the last nor the worst."""
    log = {"epoch": [2, 4, 6, 8], "recall@20": [0.2, 0.3, 0.1, 0.25]}
    log |= {name: [4, 3, 2, 1] for name in convergence.CURVES if name not in log}
    log |= {"seconds": [1, 2, 3, 4]}
    columns = {name: np.array(values, float) for name, values in log.items()}
    found = convergence.curve("Teacher", 0, columns)
    assert (found["selected"], found["stopped"], found["seconds"]) == (4, 8, 4)
    assert found["recall@20"] == 0.3 and found["curve"]["loss"] == [4, 3, 2, 1]


def test_figure_4_has_teacher_and_student_apart(lab, monkeypatch):
    told = {"Teacher": 0.2, "PromptMM": 0.1}
    monkeypatch.setattr(sensitivity, "learn_all", lambda *_: None)
    monkeypatch.setattr(sensitivity, "recall", lambda lab, job: told[job.model])
    for row in sensitivity.figure4(lab, 1).rows:
        assert {model: row[model]["mean"] for model in told} == told


def test_fine_tuning_is_chosen_on_validation_and_shown_on_test(lab, config, monkeypatch):
    asked = []

    def told(dataset, pair, split="test"):
        asked.append(split)
        return {"recall@20": 0.1, "ndcg@20": 0.2}

    monkeypatch.setattr(incremental, "figures", told)
    student = promptmm.Student(lab.dataset.train, config)
    _, new = incremental.split(lab.dataset.train, 0)
    incremental.finetune(lab, student, new, config)
    assert set(asked) == {"val"}
    incremental.on_test(lab, student)
    assert asked[-1] == "test"


def test_time_is_saved_against_training_all_anew(lab, monkeypatch):
    """The last row's seconds over each row's; what costs nothing has no factor."""
    seconds = {"old": 0.0, "tuned": 2.0, "anew": 8.0}
    figures = {"recall@20": 0.1, "ndcg@20": 0.2}
    found = {way: figures | {"seconds": spent} for way, spent in seconds.items()}
    monkeypatch.setattr(incremental, "increment", lambda *_: found)
    rows = incremental.table7(lab, 2).rows
    assert [row["times faster"] for row in rows] == ["", "4.0 x", "1.0 x"]
    assert [row["time"] for row in rows] == ["0.00 s", "2.00 s", "8.00 s"]


def test_table_4_compares_with_promptmm_too(lab, monkeypatch):
    """One p is against LightGCN, the other against PromptMM."""
    row = {metric: {"mean": 0.1, "std": 0, "runs": [0.1]} for metric in laboratory.SHOWN}
    against = []

    def compare(lab, title, jobs, counts, reference):
        against.append(reference)
        gain = {"recall@20": 0.0, "ndcg@20": 0.0}
        rows = [{"model": name, "gain": gain} | row for name in jobs]
        return [one | {"p_single": 0.5, "p_ndcg_single": 0.5} for one in rows]

    def p_against(lab, jobs, reference):
        against.append(reference)
        return {name: 0.25 for name in jobs if name != reference}

    monkeypatch.setattr(comparison, "compare", compare)
    monkeypatch.setattr(comparison, "p_against", p_against)
    monkeypatch.setattr(comparison, "weights_of", lambda *_: {})
    rows = comparison.table4(lab, 1).rows
    assert against == ["LightGCN", "PromptMM"]
    assert {row["model"] for row in rows if "p_promptmm" not in row} == {"PromptMM"}


def test_on_real_data_several_seeds_are_five(lab):
    real = dataclasses.replace(lab, source="shop", seeds=0, quick=False)
    embedded = dataclasses.replace(real, source="")
    assert [real.count(n) for n in (1, 3, 5)] == [1, 5, 5]
    assert [embedded.count(n) for n in (1, 3, 5)] == [1, 3, 5]
    assert dataclasses.replace(real, seeds=2).count(5) == 2


@pytest.mark.parametrize("model", ["LightGCN", laboratory.FUSED])
def test_a_figure_is_judged_again_by_other_code(model, lab, config, monkeypatch):
    """Also of a model that `--keep` takes from older code."""
    calls = []
    monkeypatch.setattr(
        laboratory, "evaluate", lambda *a, **k: calls.append(1) or evaluate(*a, **k)
    )
    lab = dataclasses.replace(lab, keep=True)
    judge(lab, model, config)
    judge(lab, model, config)
    assert len(calls) == 1
    monkeypatch.setattr(laboratory, "code_digest", laboratory.code_digest.__wrapped__)
    judging = ["evaluate.py"] + ["baselines/profile.py"] * (model == laboratory.FUSED)
    for n, name in enumerate(judging):
        file = laboratory.CODE / name
        monkeypatch.setitem(
            laboratory.IMPORTED, file, laboratory.IMPORTED[file] + "\nX = 1"
        )
        judge(lab, model, config)
        assert len(calls) == n + 2


def test_code_is_what_was_imported(monkeypatch):
    """A file that is edited while a process runs did not train its models."""
    file = laboratory.CODE / "promptmm.py"
    assert laboratory.IMPORTED[file] == file.read_text()
    before = laboratory.code_digest.__wrapped__((file,))
    monkeypatch.setattr(Path, "read_text", lambda *_: "edited = True")
    assert laboratory.code_digest.__wrapped__((file,)) == before


def test_a_fifth_of_the_interactions_arrives_later(tiny):
    old, new = split_train(tiny.train)
    assert not (old + new != tiny.train).nnz
    assert not old.multiply(new).nnz
    assert new.nnz / tiny.train.nnz == pytest.approx(0.2, abs=0.05)


def test_fine_tuning_sees_only_new_interactions_at_a_tenth_of_the_step(
    lab, config, monkeypatch
):
    train = lab.dataset.train
    _, new = split_train(train)
    seen, steps = set(), set()
    true_epoch = incremental.train_epoch

    def watched(student, optimiser, samples, batch, terms):
        users, lists = (part.numpy().copy() for part in samples)
        seen.update(zip(users.tolist(), lists[:, 0].tolist(), strict=True))
        assert not train[users, lists[:, 1]].any()  # negatives: no positive, old or new
        steps.update(group["lr"] for group in optimiser.param_groups)
        return true_epoch(student, optimiser, samples, batch, terms)

    monkeypatch.setattr(incremental, "train_epoch", watched)
    student = promptmm.Student(train, config)
    incremental.finetune(lab, student, new, config)
    assert seen == set(zip(*(ids.tolist() for ids in new.nonzero()), strict=True))
    [step] = steps
    assert step == pytest.approx(config.lr_student / 10)


def test_fine_tuning_keeps_its_best_epoch_and_counts_seconds_until_it(
    lab, config, monkeypatch
):
    """Validation as told: best after two epochs of a second each; then three worse ones."""
    told = iter([0.1, 0.2, 0.3, 0.2, 0.2, 0.2, 1.0])
    clock = [0.0]

    def passing(student, *_):
        clock[0] += 1.0
        with torch.no_grad():
            student.user.fill_(clock[0])

    monkeypatch.setattr(incremental, "validation", lambda *_: next(told))
    monkeypatch.setattr(incremental, "train_epoch", passing)
    monkeypatch.setattr(incremental.time, "perf_counter", lambda: clock[0])
    student = promptmm.Student(lab.dataset.train, config)
    _, new = split_train(lab.dataset.train)
    many = dataclasses.replace(config, epochs=10)
    assert incremental.finetune(lab, student, new, many) == 2.0
    assert clock[0] == 5.0
    assert (student.user == 2.0).all()
    told, clock[0] = iter([0.1, 0.2, 0.3]), 0.0  # the last epoch is judged, too
    few = dataclasses.replace(config, epochs=2)
    assert incremental.finetune(lab, student, new, few) == 2.0
    assert (student.user == 2.0).all() and clock[0] == 2.0  # none is trained in vain


def test_table_7_counts_seconds_up_to_the_selected_epoch_teacher_included(
    lab, config, monkeypatch
):
    """With logs as told: the best of three epochs is the second, after 2, 20 or 200 s."""
    monkeypatch.setattr(
        incremental, "settings", lambda _, model="": settings_of(model, config)
    )
    pace = {"LightGCN": 1.0, "LATTICE": 4.0, "Teacher": 10.0, "PromptMM": 100.0}
    told = {lab.folder(model, settings_of(model, config)): pace[model] for model in pace}

    def log_of(folder: Path) -> dict[str, np.ndarray]:
        recall = np.array([0.1, 0.3, 0.2])
        return {"recall@20": recall, "seconds": told[folder] * np.array([1.0, 2.0, 4.0])}

    monkeypatch.setattr(incremental, "log_of", log_of)
    found = incremental.increment(lab, config)
    ways = ["old student, new graph", "student fine-tuned"]
    anew = [f"{model} retrained" for model in ("LightGCN", "LATTICE", "PromptMM")]
    assert list(found) == [*ways, *anew]
    assert found["old student, new graph"]["seconds"] == 0
    assert found["LightGCN retrained"]["seconds"] == 2
    assert found["LATTICE retrained"]["seconds"] == 8
    assert found["PromptMM retrained"]["seconds"] == 222  # its LightGCN's too
    recall = judge(lab, "PromptMM", config)["recall@20"].mean()
    assert found["PromptMM retrained"]["recall@20"] == recall


def test_a_log_is_read_as_it_was_written(lab, config):
    folder = learn(lab, "LightGCN", config)
    header, *lines = (folder / "log.csv").read_text().splitlines()
    rows = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
    log = log_of(folder)
    assert len(rows) == config.epochs
    for name in ("epoch", "seconds", "recall@20", "loss"):
        assert log[name].tolist() == [float(row[name]) for row in rows]
    assert (np.diff(log["seconds"]) > 0).all()


# ------------------------------------------------------------ bench and plots


def test_the_benchmark_runs(folder, monkeypatch, capsys):
    """Every row on a tiny dataset; of the growth one point, in a process of its own."""
    monkeypatch.setattr(bench, "COPIED", 2**16)
    sizes = {"users": 60, "items": 40, "interactions": 900}
    monkeypatch.setattr(bench, "WIDE", sizes | {"dims": {"visual": 24, "text": 12}})
    monkeypatch.setattr(bench, "GROWN", sizes | {"width": 16})
    monkeypatch.setattr(bench, "EMBEDDED", sizes)
    true_child, grown, scaled = bench.child, [], []

    def once(command):
        """The first point for real; the others would say the same. The scale's here."""
        if command[-1].startswith("--scale="):
            printed_here = io.StringIO()
            with contextlib.redirect_stdout(printed_here):
                assert bench.main(command[3:]) == 0
            scaled.append(json.loads(printed_here.getvalue()))
            return printed_here.getvalue()
        grown.append(grown[0] if grown else true_child(command))
        return grown[-1]

    monkeypatch.setattr(bench, "child", once)
    assert main(["bench", "--data", str(folder)]) == 0
    text = capsys.readouterr().out
    for row in ("propagation", "sparse product", "logits", "sampler", "evaluate", "epoch"):
        assert row in text
    for step in ("student alone", "teacher, stage 1", bench.FROZEN, bench.TUNED):
        assert f"step: {step}" in text
    assert text.count("  bound ") == 4
    assert text.count("fast against direct, relative error") == 2
    errors = [
        float(line.split()[-1]) for line in text.splitlines() if "relative error" in line
    ]
    assert max(errors) < 1e-4
    assert len(grown) == 1 + 4 * (len(bench.FACTORS) - 1)  # the base once
    assert "interactions = 3,600" in text
    assert text.count(" MiB") == 4 * len(bench.FACTORS)
    assert min(json.loads(grown[0]).values()) > 0
    assert [set(point) for point in scaled] == [{"student", "teacher"}] * 3
    assert text.count(" µs") == 6 and "960 x 640 x 14,400" in text


def test_a_step_of_the_benchmark_has_a_batch(tiny):
    """Not a share of the data: rows of unlike sizes stand side by side."""
    for config in (Config(batch=bench.BATCH), Config(batch=100)):
        users, lists = bench.batch_of(bench.Setting(tiny, config, "cpu"))
        assert len(users) == len(lists) == min(config.batch, tiny.train.nnz)


def test_the_usual_ways_compute_the_same(tiny, config):
    train = tiny.train
    graph = promptmm.Graph(train)
    user, item = torch.randn(train.shape[0], 8), torch.randn(train.shape[1], 8)
    matrix = bench.coo_tensor(promptmm.adjacency(train), "cpu")
    usual = bench.coo_lightgcn(matrix, torch.cat([user, item]), 2)
    ours = torch.cat(promptmm.lightgcn(graph, user, item, 2))
    assert torch.allclose(usual, ours, atol=1e-5)
    users, lists = data.Sampler(train).epoch(torch.Generator(), 3)
    usual = bench.plain_scores(user, item, users, lists)
    assert torch.allclose(usual, promptmm.scores(user, item, users, lists), atol=1e-5)
    exclude = train + tiny.val
    usual = bench.loop_evaluate(user.numpy(), item.numpy(), tiny.test, exclude, 20)
    ours = laboratory.evaluate(user, item, tiny.test, exclude)["recall@20"]
    assert usual == pytest.approx(ours)
    for u, i, negative in bench.loop_sampler(train)[:50]:
        assert train[u, i] and not train[u, negative]


def test_plots_are_drawn_where_they_can_be(embedded, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    figures = []
    true_styled = publish.styled

    def watched(plot):
        figures.append(true_styled(plot))
        return figures[-1]

    monkeypatch.setattr(publish, "styled", watched)
    for name in ("figure2", "figure3", "figure4", "figure5"):
        assert main([name, "--quick", "--out", str(embedded)]) == 0
        where = "paper" if name == "figure2" else "synthetic"
        assert (embedded / where / f"{name}.png").read_bytes()[1:4] == b"PNG"
    panels = [len(figure.axes) for figure in figures]
    assert panels == [2, 3, 6, 2]
    titles = [axis.get_title() for axis in figures[1].axes]
    assert [title.split(":")[0] for title in titles] == [
        "x, raw",
        "f with prompt",
        "f w/o prompt",
    ]
    curves = figures[3].axes[0].get_legend().get_texts()
    assert [text.get_text() for text in curves] == ["LightGCN", "Teacher", "PromptMM"]
    for axis in figures[3].axes:  # of epoch 0, before training, a logarithm shows nothing
        assert all(min(line.get_xdata()) == 1 for line in axis.lines)
        assert len(axis.lines) == 3


def test_without_matplotlib_the_table_is_written_all_the_same(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(laboratory, "ROOT", tmp_path)
    true_import = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return true_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    old = tmp_path / "paper" / "figure2.png"  # of numbers that are no longer beside it
    old.parent.mkdir()
    old.write_bytes(b"old")
    assert main(["figure2", "--out", str(tmp_path)]) == 0
    assert "skipped figure2.png" in capsys.readouterr().out
    assert not old.exists()
    assert "figure2.png" not in old.with_suffix(".md").read_text()


# ------------------------------------------------------------ the package


def test_the_package_says_which_file_makes_what():
    import experiments

    package = Path(inspect.getsourcefile(experiments)).parent
    files = {file.name for file in package.glob("*.py")} - {"__init__.py"}
    page = (package / "README.md").read_text()
    for name in files:
        assert f"`{name}`" in page
        assert name in experiments.__doc__
    assert baselines.MODELS is MODELS


def test_code_digests_differ_between_models():
    own = ("LightGCN", "MF-BPR", *METHODS)
    assert len({code_digest(laboratory.sources(model)) for model in own}) == len(own)

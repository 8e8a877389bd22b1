"""The experiments: trained once, compared fairly, written whole, and true."""

import builtins
import contextlib
import dataclasses
import inspect
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import replaced
from scipy import sparse
from torch import nn

import baselines
import data
import promptmm
from baselines import MODELS
from baselines.profile import late_fusion, profile
from distillers import METHODS
from evaluate import evaluate
from experiments import (
    ablation,
    bench,
    comparison,
    cost,
    incremental,
    lab as laboratory,
    printed,
    publish,
    tune,
)
from experiments.__main__ import EVERY, PARTS, main, perform
from experiments.controls import changed, controls, useless
from experiments.lab import (
    CODE,
    CORE,
    Job,
    Lab,
    bare,
    code_digest,
    compare,
    judge,
    learn,
    log_of,
    names,
    seeded,
    settings,
)
from promptmm import Config, Teacher

RESULTS = CODE / "results"
OURS = ("synthetic", "tiktok", "citeulike_tag")


@pytest.fixture
def tiny(tiny) -> data.Dataset:
    """Its modalities in the order in which files are read."""
    return replaced(tiny, features=dict(sorted(tiny.features.items())))


@pytest.fixture
def lab(tiny, tmp_path, monkeypatch) -> Lab:
    """The tiny dataset by another name: no earlier search; all goes to tmp_path."""
    monkeypatch.setattr(laboratory, "ROOT", tmp_path)
    dataset = replaced(tiny, name="shop")
    return Lab(dataset, "shop", torch.device("cpu"), 2, False, tmp_path / "results")


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
    """The settings of a comparison model that agree with these."""
    kind = MODELS[model].Settings if model in MODELS else Config
    return kind(**vars(config))


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
        ("LightGCN", "l2", "fusion"),
        ("LightGCN", "student_layers", "lambda_pair"),
        ("MF-BPR", "lr_student", "teacher_layers"),
        ("Odd", "oddity", "fusion"),
        ("Teacher", "fusion", "lambda_pair"),
        ("Teacher", "lambda_prompt", "lr_student"),
        ("PromptMM", "fusion", "alone"),
        ("PromptMM", "lambda_embed", "alone"),
        ("PromptMM", "seed", "alone"),
    ],
)
def test_the_cache_knows_what_matters(lab, config, odd, model, matters, ignored):
    own = settings_of(model, config)

    def changed(name: str) -> Config:
        value = getattr(own, name)
        other = not value if isinstance(value, bool) else value + 1
        return dataclasses.replace(own, **{name: other})

    assert lab.folder(model, changed(matters)) != lab.folder(model, own)
    assert lab.folder(model, changed(ignored)) == lab.folder(model, own)


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
    whole = promptmm.pipeline(dataclasses.replace(run, dataset=lab.dataset))
    for model, name in (
        ("Teacher", "teacher"),
        ("LightGCN", "alone"),
        ("PromptMM", "student"),
    ):
        values = judge(lab, model, config)
        assert values["recall@20"].mean() == whole["test"][name]["recall@20"]
        again = judge(lab, model, config)  # from the file
        assert all(np.array_equal(values[metric], again[metric]) for metric in values)
    popular = judge(lab, "MostPop", config)["ndcg@20"].mean()
    assert popular == pytest.approx(whole["test"]["mostpop"]["ndcg@20"])


def test_an_interrupted_runner_goes_on(lab, config, monkeypatch):
    """Stopped after the first epoch of the student, then run again: as if never stopped."""
    config = dataclasses.replace(config, epochs=4)
    elsewhere = dataclasses.replace(lab, dataset=replaced(lab.dataset, name="elsewhere"))
    expected = judge(elsewhere, "PromptMM", config)
    true_epoch, count = promptmm.train_epoch, []

    def stopping(*arguments):
        count.append(1)
        if len(count) == 6:  # 4 of the teacher, the first of the student, then
            raise KeyboardInterrupt
        return true_epoch(*arguments)

    monkeypatch.setattr(promptmm, "train_epoch", stopping)
    with pytest.raises(KeyboardInterrupt):
        learn(lab, "PromptMM", config)
    assert np.array_equal(judge(lab, "PromptMM", config)["ndcg@20"], expected["ndcg@20"])
    assert len(count) == 6 + 3  # the student's remaining epochs, nothing else


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
    """Both start at the same moment; one trains teacher and student, the other waits."""
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
    assert "".join(printed_by).split() == ["trained"] * 2  # one teacher, one student


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


def test_a_model_is_named_by_its_own_files_too(config, odd, tmp_path):
    names_of = [
        {file.name for file in laboratory.sources(model)} for model in ("LightGCN", odd)
    ]
    assert {"lightgcn.py", "common.py", "promptmm.py"} <= names_of[0]
    assert {Path(__file__).name, "common.py", "promptmm.py"} <= names_of[1]
    assert {file.name for file in laboratory.sources("PromptMM")} == {f.name for f in CORE}
    unit = laboratory.sources("PromptMM", ablation.UnitRows)
    assert "ablation.py" in {file.name for file in unit}


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


def test_each_p_is_of_its_own_metric(lab, config, monkeypatch):
    """Recall clearly higher, NDCG the same but for noise: p says one, p_ndcg the other."""
    rng = np.random.default_rng(0)
    base, noise = rng.random(200), rng.normal(0, 0.1, 200)
    metrics = ("recall@20", "ndcg@20", "recall@50", "ndcg@50")
    values = {"LightGCN": dict.fromkeys(metrics, base)}
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


# ------------------------------------------------------------ settings and the search


def test_settings_come_from_a_search_on_the_same_data_or_the_defaults(lab, tmp_path):
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


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("name", OURS)
def test_the_search_draws_what_it_drew(name, extra, lab, monkeypatch):
    """Told the validation values on file, it tries the settings on file, in their order.

    A new model of baselines/ does not change that.
    """
    stored = json.loads((RESULTS / name / "tune.json").read_text())
    if extra:
        monkeypatch.setitem(MODELS, "Odd", Odd)

    def config_of(row: dict) -> Config:
        model = row["model"]
        kind = MODELS[model].Settings if model in MODELS else Config
        return kind(**row["settings"])

    known = [(row["model"], config_of(row), row["validation"]) for row in stored["rows"]]

    def validation(lab, model, config, split):
        assert split == "val"
        found = [value for m, c, value in known if (m, c) == (model, config)]
        return {"recall@20": np.array(found if model != "Odd" else [0.0])}

    monkeypatch.setattr(tune, "learn_all", lambda *_: None)
    monkeypatch.setattr(tune, "judge", validation)
    lab = dataclasses.replace(lab, dataset=replaced(lab.dataset, name=name))
    rows = [row for row in tune.tune(lab, stored["tried"]).rows if row["model"] != "Odd"]
    expected = [(model, config) for model, config, _ in known]
    assert [(row["model"], config_of(row)) for row in rows] == expected


def test_a_third_of_the_settings_is_drawn_anew():
    rng = np.random.default_rng(0)
    space = {f"setting {n}": (0, 1) for n in range(10)}
    drawn = np.mean([len(tune.draw(space, rng)) / len(space) for _ in range(1000)])
    assert drawn == pytest.approx(1 / 3, abs=0.02)


@pytest.mark.parametrize("name", OURS)
def test_every_search_is_a_fair_one(name):
    """Equally many tries for every model, at most 24; the best of them on validation."""
    search = json.loads((RESULTS / name / "tune.json").read_text())
    for model, best in search["best"].items():
        rows = [row for row in search["rows"] if row["model"] == model]
        assert best == max(rows, key=lambda row: row["validation"])["settings"]
    tries = [row["model"].replace("Teacher", "PromptMM") for row in search["rows"]]
    assert {tries.count(model) for model in set(tries)} == {search["tried"]}
    assert search["tried"] <= 24


@pytest.mark.parametrize("name", OURS)
def test_the_comparisons_are_fair_ones(name):
    table = json.loads((RESULTS / name / "table4.json").read_text())
    models = [row["model"] for row in table["rows"]]
    searched = ["MostPop", *MODELS, "Teacher", "PromptMM"]
    assert [model for model in models if model in searched] == searched
    if "modalities" in table:  # made with the untrained rows
        profiles = [f"Profile ({m})" for m in table["modalities"]]
        assert set(models) == {*searched, *profiles, laboratory.FUSED}
    for row in table["rows"]:
        assert len(row["recall@20"]["runs"]) == table["seeds"] >= 5
        assert np.mean(row["ndcg@20"]["runs"]) == pytest.approx(row["ndcg@20"]["mean"])
        assert ("p" in row) == (row["model"] != "LightGCN")
    best = json.loads((RESULTS / name / "tune.json").read_text())["best"]
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


# ------------------------------------------------------------ controls


def test_useless_content_is_the_same_content_elsewhere_or_noise_of_its_scale(lab):
    found = useless(lab)
    for m, x in lab.dataset.features.items():
        moved, noise = (found[f"features {how}"][m] for how in ("shuffled", "of noise"))
        assert sorted(map(bytes, moved)) == sorted(map(bytes, x))
        assert (moved != x).any(1).mean() > 0.8
        assert noise.shape == x.shape and noise.dtype == np.float32
        assert noise.std() == pytest.approx(x.std(), rel=0.2)
        assert abs(np.corrcoef(noise.ravel(), x.ravel())[0, 1]) < 0.2
    one, two = found["features shuffled"].values()
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
    assert change == {
        "PairKD alone": {"lambda_list": 0.0, "lambda_embed": 0.0},
        "ListKD alone": {"lambda_pair": 0.0, "lambda_embed": 0.0},
        "EmbKD alone": {"lambda_pair": 0.0, "lambda_list": 0.0},
        "teacher without content": {"lambda_list": 0.0, "lambda_embed": 0.0, "fusion": 0.0},
        "lists: b alone": {"beta": 0.0},
        "lists: q alone": {"alpha": 0.0},
        "lists: plain KL": {"beta": "identity"},
    }


def test_controls_train_on_their_own_features_and_are_judged_alike(lab, monkeypatch):
    seen = []
    true_learn = laboratory.learn

    def watched(place, model, config, kind=Teacher):
        seen.append((model, place.fingerprint))
        return true_learn(place, model, config, kind)

    monkeypatch.setattr(laboratory, "learn", watched)
    rows = controls(dataclasses.replace(lab, quick=True), 1).rows
    assert [row["model"] for row in rows][:2] == ["LightGCN", "PromptMM"]
    assert len({fingerprint for model, fingerprint in seen if model == "PromptMM"}) == 3
    assert {fingerprint for model, fingerprint in seen if model == "LightGCN"} == {
        lab.fingerprint
    }


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


# ------------------------------------------------------------ a new model, a new method


def test_a_new_comparison_model_needs_its_line_only(lab, odd):
    """Lab, settings, Table 4."""
    quick = dataclasses.replace(lab, quick=True, seeds=1)
    rows = comparison.table4(quick, 1).rows
    assert [row["model"] for row in rows] == list(names(lab))
    assert odd in MODELS and settings(lab, odd) == Odd.Settings()
    values = {row["model"]: row["recall@20"]["mean"] for row in rows}
    assert values[odd] == pytest.approx(values["MostPop"], abs=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_of_distillation_learns_from_the_same_teacher(
    lab, config, method, monkeypatch
):
    frozen = dataclasses.replace(config, tune_prompt=False)
    learn(lab, "PromptMM", frozen)
    teachers = count_calls(monkeypatch, promptmm, "teacher_terms")
    values = judge(lab, method, frozen)
    assert not teachers
    assert np.isfinite(values["recall@20"]).all()
    assert lab.folder(method, frozen) != lab.folder("PromptMM", frozen)


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
    assert trained["models"] == 2  # the student and its teacher
    assert trained["torch"] == [torch.__version__]
    assert trained["threads"] == [torch.get_num_threads()]
    assert trained["from"] <= trained["to"]
    assert "tries" not in made  # there was no search
    assert "2 models trained" in text


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
    """Rows of the longest table, in its order; what a dataset lacks is left blank."""
    one = {"mean": 0.25, "std": 0.01, "runs": [0.24, 0.26]}
    gain = {"gain": {"recall@20": 0.25}, "p": 0.03}
    tables = {
        "a": [("MostPop", gain), ("LightGCN", {})],
        "b": [("MostPop", gain), ("Profile (x)", gain), ("LightGCN", {}), ("New", gain)],
    }
    for name, rows in tables.items():
        (tmp_path / name).mkdir()
        content = [{"model": model, "recall@20": one, **more} for model, more in rows]
        (tmp_path / name / "table4.json").write_text(json.dumps({"rows": content}))
    found = publish.summary(sorted(tmp_path.glob("*/table4.json")))
    full = "0.2500 ± 0.0100 (+25.0%, p = 0.03)"
    assert found.splitlines()[2:] == [
        f"| MostPop | {full} | {full} |",
        "| LightGCN | 0.2500 ± 0.0100 | 0.2500 ± 0.0100 |",
        f"| New |  | {full} |",
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


def test_the_parts_of_all(embedded, folder, monkeypatch):
    """On the embedded data all but the long controls, on real ones what means something."""
    ran = []
    monkeypatch.setattr(
        "experiments.__main__.perform", lambda lab, part, *_: ran.append(part)
    )
    assert main(["all", "--out", str(embedded)]) == 0
    assert ran == [part for part in EVERY if part.name != "controls"]
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
        (["table44"], "invalid choice"),
        (["table4", "--data", "nowhere"], "nowhere"),
        (["table4", "--device", "tpu"], "--device"),
        (["table4", "--colour"], "--colour"),
        (["bench", "--data", "nowhere"], "nowhere"),
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


# ------------------------------------------------------------ ablation


def test_ablations_leave_out_what_they_say(lab, config):
    rows = ablation.variants(dataclasses.replace(lab, quick=True), config)
    change = {}
    for name, job in rows.items():
        mine, full = vars(job.config), vars(config)
        change[name] = {key: value for key, value in mine.items() if value != full[key]}
    assert change["PromptMM"] == {}
    assert change["w/o Prompt"] == {"lambda_prompt": 0.0}
    for name, weight in (("Pair", "pair"), ("List", "list"), ("Emb", "embed")):
        assert change[f"w/o {name}KD"] == {f"lambda_{weight}": 0.0}
    assert change["w/o disentangle"] == {"beta": "identity"}
    assert change["prompt frozen"] == {"tune_prompt": False}


@pytest.mark.parametrize(
    ("tuned", "left"), [(True, "prompt frozen"), (False, "prompt tuned")]
)
def test_no_row_is_anothers_double(lab, config, tuned, left, monkeypatch):
    """Neither the state the prompt is in anyway, nor a λ₃ that is the full model's own."""
    monkeypatch.setattr(ablation, "learn_all", lambda *_: None)
    first = {"recall@20": np.array([1.0])}  # all alike: the first λ₃ is chosen
    monkeypatch.setattr(ablation, "judge", lambda *_, **__: first)
    full = dataclasses.replace(config, tune_prompt=tuned)
    rows = ablation.variants(lab, full)
    assert left in rows
    assert len({"prompt frozen", "prompt tuned"} & set(rows)) == 1
    assert len(set(map(str, rows.values()))) == len(rows) == 7
    assert not [name for name in rows if "λ₃" in name]


def test_the_other_weight_of_plain_kl_is_chosen_on_validation(lab, config, monkeypatch):
    """Validation prefers three times λ₃, test ten times: it is three."""
    best = {"val": 3 * config.lambda_list, "test": 10 * config.lambda_list}

    def told(lab, model, config, kind=Teacher, split="test"):
        return {"recall@20": np.array([float(config.lambda_list == best[split])])}

    monkeypatch.setattr(ablation, "learn_all", lambda *_: None)
    monkeypatch.setattr(ablation, "judge", told)
    *_, (name, job) = ablation.variants(lab, config).items()
    assert name == f"w/o disentangle, λ₃ = {3 * config.lambda_list:g}"
    assert job.config.lambda_list == 3 * config.lambda_list
    assert job.config.beta == "identity"


def test_options_change_one_thing_each(lab, monkeypatch):
    seen = {}

    def watched(lab, title, rows, *_):
        seen.update(rows)
        raise StopIteration

    monkeypatch.setattr(ablation, "compare", watched)
    with pytest.raises(StopIteration):
        ablation.options(lab, 1)
    assert len(set(map(str, seen.values()))) == len(seen)
    assert seen["unit rows of p^m (C20)"] == seen["PromptMM"]._replace(
        kind=ablation.UnitRows
    )
    assert "prompt tuned" not in seen  # the default tunes it anyway


def test_unit_rows_are_unit_rows(tiny, config):
    """f^m against Eq. 4 with p^m formed and its rows normalised."""
    teacher = ablation.UnitRows(tiny, config).eval()
    with torch.no_grad():
        reduced, fixed = teacher().reduced, teacher.fixed()
        p = teacher.prompt(teacher.tokens)  # [I, d]
        for (m, x), linear in zip(teacher.features.items(), teacher.reduction, strict=True):
            p_m = torch.nn.functional.normalize(p @ (p.T @ x), dim=1)  # [I, d_m]
            expected = (x + config.lambda_prompt * p_m) @ linear.weight.T + linear.bias
            assert torch.allclose(reduced[m], expected, atol=1e-5)
            plain = Teacher.reduce(teacher, m, fixed.layers[m], p)
            assert not torch.allclose(reduced[m], plain, atol=1e-3)


def test_unit_rows_have_models_of_their_own(lab, config):
    unit = Job("PromptMM", config, ablation.UnitRows)
    folder = learn(lab, *unit)
    assert folder != lab.folder("PromptMM", config)
    teachers = [
        lab.folder("Teacher", config, kind) for kind in (Teacher, ablation.UnitRows)
    ]
    assert [laboratory.is_trained(teacher) for teacher in teachers] == [False, True]
    assert isinstance(laboratory.load_teacher(lab, config, unit.kind), ablation.UnitRows)


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
    """4 bytes a number: the student's tables; the teacher's weights and features."""
    native = tmp_path / "native"
    data.save(lab.dataset, native)
    config = dataclasses.replace(config, epochs=1)
    learn(lab, "PromptMM", config)
    n_users, n_items = lab.dataset.train.shape
    widths = [x.shape[1] for x in lab.dataset.features.values()]
    student = (n_users + n_items) * config.dim
    learnt = student + sum(width + 1 for width in widths) * config.dim
    learnt += (config.dim + 1) * config.dim  # the prompt
    for model in cost.COSTS:
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
    """The last row for real; the others here, for a process takes seconds to start."""
    true_child = cost.child

    def child(command: list[str]) -> str:
        if command[-3] == "student alone":
            return true_child(command)
        printed_here = io.StringIO()
        with contextlib.redirect_stdout(printed_here):
            assert cost.main(command[3:]) == 0
        return printed_here.getvalue()

    monkeypatch.setattr(cost, "child", child)
    assert main(["table6", "--quick", "--out", str(embedded)]) == 0
    table = json.loads((embedded / "synthetic" / "table6.json").read_text())
    assert [row["model"] for row in table["rows"]] == list(cost.COSTS)
    teacher, *_, student = table["rows"]
    assert teacher["learnt"] == teacher["all"] == "100.0%"
    share = student["trainable"] / teacher["trainable"]
    assert student["learnt"] == f"{share:.1%}"
    assert student["serve"] == 4 * student["trainable"] < teacher["serve"]
    assert table["trained"]["models"] == 2


def test_what_learns_in_each_row_of_table_6(tiny, config):
    student = promptmm.Student(tiny.train, config)
    for kind, tuned, width in (
        ("student, prompt tuned", True, 4),
        ("student, prompt frozen", False, 4),
        ("student alone", False, 2),
    ):
        own = dataclasses.replace(config, tune_prompt=tuned)
        terms, learner, columns = cost.objective(kind, student, tiny, own, "cpu")
        learnt = sum(weight.numel() for weight in learner.parameters())
        alone = sum(weight.numel() for weight in student.parameters())
        assert (learnt > alone) == tuned
        assert columns == width
        users, lists = data.Sampler(tiny.train).epoch(torch.Generator(), width - 1)
        assert ("pair_kd" in terms(users, lists)) == (kind != "student alone")


# ------------------------------------------------------------ incremental


def split_train(train: sparse.csr_matrix) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    return incremental.split(train, 0)


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


def test_table_7_counts_seconds_up_to_the_selected_epoch_teacher_included(
    lab, config, monkeypatch
):
    """With logs as told: the best of three epochs is the second, after 2, 20 or 200 s."""
    monkeypatch.setattr(incremental, "settings", lambda lab, *_: config)
    pace = {"LightGCN": 1.0, "Teacher": 10.0, "PromptMM": 100.0}
    told = {lab.folder(model, config): pace[model] for model in pace}

    def log_of(folder: Path) -> dict[str, np.ndarray]:
        recall = np.array([0.1, 0.3, 0.2])
        return {"recall@20": recall, "seconds": told[folder] * np.array([1.0, 2.0, 4.0])}

    monkeypatch.setattr(incremental, "log_of", log_of)
    found = incremental.increment(lab, config)
    ways = ["old student, new graph", "student fine-tuned"]
    assert list(found) == [*ways, "LightGCN retrained", "PromptMM retrained"]
    assert found["old student, new graph"]["seconds"] == 0
    assert found["LightGCN retrained"]["seconds"] == 2
    assert found["PromptMM retrained"]["seconds"] == 220
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
    true_child, asked = bench.child, []

    def once(command):
        """The first point for real; the others would say the same."""
        asked.append((command, true_child(command) if not asked else asked[0][1]))
        return asked[-1][1]

    monkeypatch.setattr(bench, "child", once)
    assert main(["bench", "--data", str(folder)]) == 0
    text = capsys.readouterr().out
    for row in ("propagation", "sparse product", "logits", "sampler", "evaluate", "epoch"):
        assert row in text
    assert text.count("fast against direct, relative error") == 2
    errors = [
        float(line.split()[-1]) for line in text.splitlines() if "relative error" in line
    ]
    assert max(errors) < 1e-4
    assert len(asked) == 4 * len(bench.FACTORS)
    assert "interactions = 3,600" in text
    assert text.count(" MiB") == len(asked)


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
    publish.draw(printed.figure2().plot, tmp_path / "figure2.png")
    assert not (tmp_path / "figure2.png").exists()
    assert "skipped figure2.png" in capsys.readouterr().out


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
    digests = {code_digest(laboratory.sources(model)) for model in ("Teacher", "LightGCN")}
    assert len(digests) == 2

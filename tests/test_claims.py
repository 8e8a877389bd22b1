"""The table of methods and the claims about them: rules, controls, and what is inside."""

import dataclasses
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import replaced

import promptmm
from data import DataError
from distillers import METHODS
from evaluate import one_scale
from experiments import (
    claims,
    forgetting,
    inside,
    lab as laboratory,
    methods as table,
    questions,
    tune,
)
from experiments.inside import Finding, Watched, in_mode, order
from experiments.lab import Job, Lab, holm, learn, settings
from experiments.publish import publish
from experiments.questions import (
    ALONE,
    CKD,
    CKD_PARTS,
    KDSR,
    PRM,
    TABLES,
    full_is_best,
    outcome,
)
from promptmm import Run, Teacher


@pytest.fixture
def lab(tiny, config, tmp_path, monkeypatch) -> Lab:
    """One seed of tiny data by another name; content always teaches."""
    monkeypatch.setattr(laboratory, "ROOT", tmp_path)
    monkeypatch.setattr(promptmm, "line_search", lambda p, *_: [0.5, 0.25][: len(p) - 1])
    dataset, cpu = replaced(tiny, name="shop"), torch.device("cpu")
    place = Lab(dataset, "shop", cpu, 1, True, tmp_path / "results")
    return dataclasses.replace(place, chosen={"LightGCN": {"l2": 0.5, "dim": 8}})


def row(runs, p=0.01) -> dict:
    return {"recall@20": {"runs": runs}, "p": p}


def test_a_claim_holds_by_p_and_by_seeds():
    base = row([0.1] * 5)
    assert outcome(row([0.2, 0.2, 0.2, 0.2, 0.05]), base) == "yes"
    assert outcome(row([0.3, 0.3, 0.3, 0.05, 0.05]), base) == "no"  # three of five seeds
    assert outcome(row([0.2] * 5, p=0.06), base) == "no"
    assert outcome(row([0.05] * 5), base) == "against"
    assert outcome(row([0.05] * 5), base, sign=-1) == "yes"
    judged = full_is_best("full", ("a", "b"))
    worse, better, same = row([0.05] * 5), row([0.2] * 5), row([0.1] * 5, p=1.0)
    assert judged(None, {"full": base, "a": worse, "b": worse}) == "yes"
    assert judged(None, {"full": base, "a": worse, "b": same}) == "no"  # each part, not one
    both = {"full": base, "a": worse, "b": worse}
    assert judged(None, both | {"variant": same}) == "yes"
    assert judged(None, both | {"variant": better}) == "against"
    assert judged(None, {"full": base, "a": worse}) == "no"  # the search left out b
    assert judged(None, both | {"a": row([0.05] * 5, p=0.5)}) == "no"
    assert judged(None, {"full": base, "variant": same}) == "no"  # nothing lacks a part
    assert judged(None, both | {"a": row([0.05, 0.05, 0.05, 0.12, 0.12])}) == "no"


JUDGED = [  # a claim, recalls of its rows, what that says
    ("C-2", {CKD: 0.2, **dict.fromkeys(CKD_PARTS, 0.1), "one block for all": 0.2}, "yes"),
    ("C-2", {CKD: 0.2, **dict.fromkeys(CKD_PARTS, 0.1), "λ_g = 0": 0.2}, "no"),
    ("C-2", {CKD: 0.2, "λ_s = 0": 0.1, "λ_g = 0": 0.1}, "no"),  # weights: found at 1
    ("C-2", {CKD: 0.2, "λ_s = 0": 0.1, "one block for all": 0.3}, "against"),
    ("C-3", {CKD: 0.2, ALONE: 0.1}, "yes"),
    ("C-3", {CKD: 0.1, ALONE: 0.2}, "against"),
    ("P-2", {"both": 0.2, "uniform": 0.1}, "yes"),
    ("P-2", {"both": 0.1, "uniform": 0.2}, "against"),
    ("P-5", {PRM: 0.1, "curriculum of 20 epochs": 0.2}, ""),
    ("D-2", {KDSR: 0.2, "its start alone": 0.1}, "yes"),
    ("D-2", {KDSR: 0.1, "its start alone": 0.2}, "against"),
    ("D-4", {"L = 0": (0.1, 0.2), "L as found": (0.2, 0.3)}, "yes"),
    ("D-4", {"L = 0": (0.2, 0.1), "L as found": (0.2, 0.3)}, "no"),
    ("D-4", {"L = 0": (0.2, 0.1), "L as found": (0.3, 0.2)}, "against"),
]


@pytest.mark.parametrize(("name", "recalls", "expected"), JUDGED)
def test_a_judge_asks_what_its_claim_says(lab, name, recalls, expected):
    [question] = [one for one in TABLES if one.name == name]
    if name == "D-4":  # LightGCN's and KDSR's, with and without a graph
        pairs = [
            (f"{m}, {k}", v[n])
            for n, m in enumerate((ALONE, KDSR))
            for k, v in recalls.items()
        ]
        recalls = dict(pairs)
    rows = question.rows(lab)
    assert {*recalls, question.reference} <= set(rows)
    assert question.judge(lab, {k: row([v] * 5) for k, v in recalls.items()}) == expected


def test_prm_is_compared_with_the_teacher_that_is_best_on_validation(lab, monkeypatch):
    """The modal teachers' student by validation; on test it would be the joint one's."""
    best = {"val": "modal", "test": "joint"}
    monkeypatch.setattr(
        questions,
        "recall",
        lambda lab, job, split: float(job.config.taught_by == best[split]),
    )
    [question] = [one for one in TABLES if one.name == "P-1"]
    rows = {name: row([0.1] * 5) for name in question.rows(lab)}
    for modal, joint, expected in ((0.05, 0.2, "yes"), (0.2, 0.05, "against")):
        rows |= {"modal alone": row([modal] * 5), "joint alone": row([joint] * 5)}
        assert question.judge(lab, rows) == expected


def test_no_row_of_a_claim_is_its_full_models_double(lab):
    lab = dataclasses.replace(lab, chosen={CKD: {"effect": "row"}, KDSR: {"slow": 1.0}})
    rows = {one.name: one.rows(lab) for one in TABLES}
    assert "effect by row" not in rows["C-2"] and "slow = 1" not in rows["D-2"]
    for name, count in (("C-2", 6), ("D-2", 5)):
        configs = {str(job.config) for job in rows[name].values()}
        assert len(configs) == len(rows[name]) == count


def test_a_backbone_without_a_graph_has_no_layer(lab):
    [question] = [one for one in TABLES if one.name == "D-4"]
    layers = {name: job.config.student_layers for name, job in question.rows(lab).items()}
    assert [layers[f"{model}, L = 0"] for model in (ALONE, KDSR)] == [0, 0]
    found = settings(lab, ALONE).student_layers
    assert [layers[f"{model}, L as found"] for model in (ALONE, KDSR)] == [found] * 2


def test_its_start_alone_is_kdsr_without_supervision(lab):
    """Otherwise the same, so that nothing else can explain a gain."""
    lab = dataclasses.replace(lab, chosen={KDSR: {"l2": 0.03}, ALONE: {"l2": 0.5}})
    [question] = [one for one in TABLES if one.name == "D-2"]
    alone = question.rows(lab)["its start alone"].config
    assert (alone.l2, alone.start, alone.slow) == (0.03, "content", 1.0)
    assert alone.lambda_holistic == alone.lambda_dissected == 0


# ------------------------------------------------------------ what looks inside


SPREAD = np.array([0.0, 0.001, -0.001, 0.002, -0.002])  # over five seeds


def test_recall_on_test_is_the_tables(lab):
    job = Job("MostPop", settings(lab, ALONE))
    pair = laboratory.embeddings(lab, *job)
    expected = laboratory.recall(lab, job)
    assert inside.recall_on_test(lab, pair) == pytest.approx(expected) and expected > 0


@pytest.mark.parametrize(("alone", "expected"), [(0.2, "yes"), (0.05, "against")])
def test_alone_against_the_mode_of_the_joint_teacher(lab, monkeypatch, alone, expected):
    monkeypatch.setattr(inside, "learn_all", lambda *_: None)
    monkeypatch.setattr(inside, "learn_teachers", lambda *_: None)
    monkeypatch.setattr(inside, "load_teacher", lambda lab, config: config.seed)
    monkeypatch.setattr(inside, "in_mode", lambda seed, m: seed)
    monkeypatch.setattr(inside, "recall_on_test", lambda lab, seed: 0.1 + SPREAD[seed])
    monkeypatch.setattr(inside, "recall", lambda lab, job: alone - SPREAD[job.config.seed])
    found = inside.modes(lab, 5)
    assert found.outcome == expected
    assert found.rows[0]["alone"]["mean"] == pytest.approx(alone)
    assert found.rows[0]["joint, in its mode"]["mean"] == pytest.approx(0.1)


def test_first_and_last_weights_are_those_epochs(lab, monkeypatch):
    """The weaker teacher ends with the larger weight, which it had not at first."""

    def watched(lab, config, method, teachers):
        steps = [[[1.0, 3.0], [2.0, 4.0]], [[9.0, 1.0], [7.0, 3.0]]]
        method.keywords["log"].extend([torch.tensor(s) for s in e] for e in steps)

    alone = {"weak": 0.1, "strong": 0.2}
    taught = []
    monkeypatch.setattr(
        inside, "learn_teachers", lambda lab, jobs, seeds: taught.append((jobs, seeds))
    )
    monkeypatch.setattr(inside, "teachers_for", lambda *_: {m: m for m in alone})
    monkeypatch.setattr(inside, "trained_with", watched)
    monkeypatch.setattr(inside, "recall_on_test", lambda lab, m: alone[m])
    found = inside.weights_by_epoch(lab, 1)
    weak, strong = found.rows
    assert (weak["w, first epoch"], weak["w, last epoch"]) == (1.5, 8.0)
    assert (strong["w, first epoch"], strong["w, last epoch"]) == (3.5, 2.0)
    assert found.outcome == "yes"
    assert taught == [([Job(CKD, settings(lab, CKD))], 1)]  # before all, so with --jobs


@pytest.mark.parametrize(("weighted", "expected"), [(0.28, "yes"), (0.1, "against")])
def test_what_useless_teachers_cost(lab, monkeypatch, weighted, expected):
    """The recall of P-2's row less that with two more teachers: uniform loses .1 of .3."""
    seen = []

    def trained(lab, config, method, teachers):
        seen.append(set(teachers))
        return config

    def after(lab, config):
        return (weighted if config.confidence else 0.2) + SPREAD[
            config.seed
        ] * config.confidence

    pair = torch.ones(3, 2), torch.ones(4, 2)
    taught = []
    monkeypatch.setattr(inside, "learn_all", lambda lab, title, jobs: taught.append(jobs))
    monkeypatch.setattr(inside, "teachers_for", lambda *_: {"joint": pair})
    monkeypatch.setattr(inside, "embeddings", lambda *_: pair)
    monkeypatch.setattr(inside, "recall", lambda lab, job: 0.3)
    monkeypatch.setattr(inside, "trained_with", trained)
    monkeypatch.setattr(inside, "recall_on_test", after)
    found = inside.useless_teachers(lab, 5)
    lost = {row["weights"]: row["Recall@20 lost"]["mean"] for row in found.rows}
    assert lost == pytest.approx({"weighted": 0.3 - weighted, "uniform": 0.1})
    assert found.outcome == expected
    assert seen == [{"joint", "noise", "mf"}] * 10
    assert [job.model for job in taught[0]] == [PRM] * 10 + ["MF-BPR"] * 5
    weights = [(job.config.confidence, job.config.consistency) for job in taught[0][:10]]
    assert weights == [(1.0, 1.0)] * 5 + [(0.0, 0.0)] * 5


@pytest.mark.parametrize(("unseen", "same"), [((1, 2, 3), "yes"), ((3, 2, 1), "no")])
def test_the_order_of_teachers_on_what_they_have_not_seen(lab, monkeypatch, unseen, same):
    asked = []

    def weights(method, joint, taken, of):
        asked.append((taken.nnz, of.nnz))
        config = method.config
        assert config.confidence == config.consistency == 1  # whatever the search found
        return [1, 2, 3] if len(asked) % 2 else list(unseen)

    pairs = {m: (torch.randn(60, 4), torch.randn(40, 4)) for m in ("joint", "lightgcn")}
    lab = dataclasses.replace(lab, chosen={PRM: {"confidence": 0.0, "consistency": 0.0}})
    monkeypatch.setattr(inside, "teachers_for", lambda *_: pairs)
    monkeypatch.setattr(inside, "mean_weights", weights)
    taught = []
    monkeypatch.setattr(inside, "learn_all", lambda lab, title, jobs: taught.append(jobs))
    found = inside.memory(lab, 3)
    assert [(job.model, job.config.seed) for job in taught[0]] == [
        ("Teacher", seed) for seed in range(3)
    ]
    train, val = lab.dataset.train.nnz, lab.dataset.val.nnz
    assert asked == 3 * [(train, train), (train + val, val)]
    assert [row["val"]["runs"] for row in found.rows] == [[one] * 3 for one in unseen]
    assert [row["train"]["runs"] for row in found.rows] == [[1] * 3, [2] * 3, [3] * 3]
    assert found.outcome == same
    assert f"The same order in {3 * (same == 'yes')} of 3 seeds." in found.table
    assert [row["teacher"] for row in found.rows] == ["joint", "lightgcn", "spectral"]


def test_teachers_are_as_sure_in_four_of_five_seeds(lab, monkeypatch):
    """A teacher that some seeds lack has the mean of those that have it."""
    seen, turned = {"joint": 0.3, "lightgcn": 0.1}, {"joint": 0.1, "lightgcn": 0.3}
    none = {"train": {}, "val": {}}
    monkeypatch.setattr(inside, "learn_all", lambda *_: None)

    def judged(*seeds):
        told = iter(seeds)
        monkeypatch.setattr(inside, "sureness", lambda *_: next(told))
        return inside.memory(lab, len(seeds))

    same, other = {"train": seen, "val": seen}, {"train": seen, "val": turned}
    assert judged(same, same, other, same, same).outcome == "yes"
    assert judged(same, same, other, same, other).outcome == "no"
    more = {"train": seen | {"image": 0.6}, "val": seen | {"image": 0.6}}
    found = judged(none, same, more)
    assert found.outcome == "yes" and "2 of 2 seeds" in found.table
    by_name = {row["teacher"]: row["val"]["runs"] for row in found.rows}
    assert by_name == {"joint": [0.3] * 2, "lightgcn": [0.1] * 2, "image": [0.6]}
    assert judged(none, none).outcome == "no"


def test_a_list_for_an_unseen_positive_holds_nothing_else_taken(lab, monkeypatch):
    dataset = lab.dataset
    config = settings(lab, PRM)
    pairs = {m: (torch.randn(60, 4), torch.randn(40, 4)) for m in ("joint", "lightgcn")}
    run = Run(None, dataset, config, lab.device, {})
    method = inside.PRMKD(run, inside.Student(dataset.train, config), pairs)
    seen = []

    def scored(user, item, users, lists):
        seen.append((users, lists))
        return promptmm.scores(user, item, users, lists)

    monkeypatch.setattr(inside, "scores", scored)
    taken = dataset.train + dataset.val
    found = inside.mean_weights(method, pairs["joint"], taken, dataset.val)
    assert sum(found) == pytest.approx(1, abs=1e-5) and len(found) == len(method.teachers)
    users, lists = seen[0]
    assert len(users) == dataset.val.nnz and lists.shape[1] > 2
    for u, (positive, *others) in zip(users.tolist(), lists.tolist(), strict=True):
        assert dataset.val[u, positive] and not taken[u, others].nnz


@pytest.mark.parametrize(
    ("start", "alone", "last", "expected"),
    [(0.5, 0.2, 0.4, "yes"), (0.1, 0.2, 0.1, "against"), (0.5, 0.2, 0.2, "no")],
)
def test_forgetting_is_a_fall_that_supervision_holds(
    lab, monkeypatch, start, alone, last, expected
):
    """A fall from the content start under BPR alone, and full KDSR above BPR alone."""
    runs = iter([*(mean - SPREAD for mean in (start, alone, 0.3, 0.3)), last + SPREAD])

    def kept(lab, tables):
        return {"mean": laboratory.spread(next(runs)[: len(tables)])}

    lab = dataclasses.replace(lab, chosen={KDSR: {"start": "fresh"}})  # the search's own
    taught = []
    monkeypatch.setattr(
        forgetting, "learn_all", lambda lab, title, jobs: taught.append(jobs[0].config)
    )
    monkeypatch.setattr(forgetting, "learn", lambda lab, *_: lab.out)
    monkeypatch.setattr(forgetting, "read_torch", lambda *_: {"student.item": None})
    monkeypatch.setattr(forgetting, "kept", kept)
    found = forgetting.forgetting(lab, 5)
    names = ["content start", "BPR alone", "+ holistic", "+ dissected", "+ slow"]
    assert [row["table"] for row in found.rows] == names
    assert found.outcome == expected
    steps = [(c.lambda_holistic > 0, c.lambda_dissected > 0, c.slow > 1) for c in taught]
    assert steps == [(n > 0, n > 1, n > 2) for n in range(4)]
    assert {c.start for c in taught} == {"content"}


def test_the_grid_of_codes_is_of_validation(lab, monkeypatch):
    taught = []
    monkeypatch.setattr(
        forgetting, "learn_all", lambda lab, title, jobs: taught.append(jobs)
    )
    monkeypatch.setattr(forgetting, "recall", lambda lab, job, split: (split, job))
    found = forgetting.codes_and_parts(dataclasses.replace(lab, quick=False), 1)
    assert found.outcome == "" and len(taught) == len(found.rows)
    for row, jobs in zip(found.rows, taught, strict=True):  # all at once, for --jobs
        assert [row[f"{j.config.codes} × {j.config.parts}"] for j in jobs] == [
            ("val", j) for j in jobs
        ]
        assert len(jobs) == len(row) - 2 == 12


def test_entropy_is_of_the_shares_of_the_codes(lab, monkeypatch):
    """Two codes alike: log 2."""
    monkeypatch.setattr(forgetting, "nearest", lambda rows, _: torch.arange(len(rows)) % 2)
    for entropy in forgetting.code_entropy(lab, settings(lab, KDSR)).values():
        assert entropy == pytest.approx(math.log(2), abs=1e-4)


def test_a_modality_without_a_pair_has_no_codes(lab):
    m, x = next(iter(lab.dataset.features.items()))
    one = np.where(np.arange(len(x))[:, None] == 3, x, 0)
    dataset = dataclasses.replace(lab.dataset, features=lab.dataset.features | {m: one})
    place = dataclasses.replace(lab, dataset=dataset)
    assert forgetting.code_entropy(place, settings(lab, KDSR))[m] == 0


def test_verdicts_read_the_other_real_data_and_five_seeds_alone(lab, tmp_path):
    for name, seeds in (("tiktok", 5), ("citeulike", 3)):
        folder = tmp_path / "results" / name
        folder.mkdir(parents=True)
        rows = [{"id": "C-3", "outcome": "yes"}]
        (folder / "claims.json").write_text(json.dumps({"rows": rows, "seeds": seeds}))
    lab = dataclasses.replace(lab, quick=False)
    assert claims.earlier(lab) == {"C-3": {"tiktok": "yes"}}
    tiktok = dataclasses.replace(lab, dataset=replaced(lab.dataset, name="tiktok"))
    assert claims.earlier(tiktok) == {}


def test_the_order_of_weights():
    def rows(weights):
        pairs = zip("abc", (0.1, 0.2, 0.3), weights, strict=True)
        parts = [{"modality": m, "alone": r, "w, last epoch": w} for m, r, w in pairs]
        return [part | {"seed": 0} for part in parts]

    found = [order(rows(w)) for w in ((3, 2, 1), (1, 3, 2), (1, 2, 3))]
    assert found == ["yes", "no", "no"]  # an order without a test refutes nothing
    alone = {
        "modality": "c",
        "alone": 0.3,
        "w, last epoch": 9.0,
        "seed": 1,
    }  # of one: no say
    assert order([*rows((3, 2, 1)), alone]) == "yes" and order([alone]) == "no"


def test_a_teacher_in_the_mode_of_one_modality(tiny, config):
    """What is replaced adds the same number to all items of a user: nothing of degrees."""
    torch.manual_seed(0)
    ids = torch.randn(60, 8), torch.randn(40, 8)
    teacher = Teacher(tiny, config, "cpu", ids).eval()
    teacher.weights.copy_(torch.tensor([0.5, 0.8]))
    user, item = in_mode(teacher, "visual")
    with torch.no_grad():
        own = one_scale(teacher.propagate(teacher.reduced()["visual"]))
        plain = one_scale(ids)
    expected = plain[0] @ plain[1].T + 0.5 * own[0] @ own[1].T
    apart = user @ item.T - expected
    assert (apart - apart.mean(1, keepdim=True)).abs().max() < 1e-4


def test_watched_weights_are_ckds_own(tiny, tmp_path):
    """Same student; M numbers of mean 1 for each epoch."""
    settings_ = METHODS["CKD"].Settings(
        dim=8, batch=128, epochs=2, eval_every=1, pairs_generic=20
    )
    teachers = {m: (torch.randn(60, 5), torch.randn(40, 5)) for m in tiny.features}
    log, pairs = [], []
    for name, kind in (("a", METHODS["CKD"]), ("b", partial(Watched, log=log))):
        (tmp_path / name).mkdir()
        run = Run(tmp_path / name, tiny, settings_, torch.device("cpu"), {})
        pairs.append(laboratory.distillers.common.train(run, kind, teachers))
    assert torch.equal(pairs[0][0], pairs[1][0])
    assert len(log) == 2
    for epoch in log:
        assert torch.allclose(torch.stack(epoch).mean(1), torch.ones(len(epoch)))


def test_the_table_of_methods(lab):
    rows = {row["model"]: row for row in table.methods(lab, 1).rows}
    assert list(rows)[3] == table.START and list(rows)[-4:] == list(table.FOUR)
    adjusted = holm([rows[name]["p_single"] for name in table.FOUR])
    assert [rows[name]["p_four"] for name in table.FOUR] == adjusted
    assert "p_four" not in rows["Teacher"] and rows["CKD"]["p_promptmm"] > 0
    alone = table.content_start(lab).config
    assert (alone.l2, alone.lambda_holistic, alone.slow) == (0.5, 0.0, 1.0)
    ids = learn(lab, "LightGCN", settings(lab, "LightGCN"))
    log = laboratory.log_of(ids)["seconds"][-1]
    assert rows["Teacher"]["teachers"] == pytest.approx(log, abs=0.06)
    assert rows["KDSR"]["teachers"] == 0
    ckd = laboratory.Job("CKD", settings(lab, "CKD"))
    assert table.teacher_seconds(lab, ckd) > 0  # the row rounds it, here perhaps to 0


def test_methods_have_equally_many_tries(lab, monkeypatch):
    """Half is the teacher's; a method without one has all for itself."""
    asked = {}

    def watched(lab, model, first, space, budget, rng):
        asked[model] = budget, first
        assert {"lr_student", "l2"} < set(space)
        return [{"model": model, "validation": 0.1, "settings": first}]

    monkeypatch.setattr(tune, "search_model", watched)
    tune.tune_methods(lab, 16)
    budgets = {model: budget for model, (budget, _) in asked.items()}
    assert budgets == {"CKD": 8, "PRM-KD (ours after 002)": 8, "KDSR": 16}


@pytest.fixture
def answers(lab, monkeypatch):
    """TikTok by name, and what each question finds there: "yes", until a test says else."""
    found = dict.fromkeys(claims.QUESTIONS, "yes")

    def answered(name):
        return lambda lab, seeds: Finding(name, "a claim", [], f"table {name}", found[name])

    for name in found:
        monkeypatch.setitem(claims.QUESTIONS, name, answered(name))
    tiktok = replaced(lab.dataset, name="tiktok")
    return dataclasses.replace(lab, dataset=tiktok, quick=False), found


def put(lab, output, seeds):
    publish(lab, lab.out / lab.dataset.name, "claims", output, 0.0, seeds, [])


@pytest.mark.parametrize(
    ("seeds", "verdict"), [(5, "survives on tiktok"), (3, "not asked")]
)
def test_every_claim_is_asked_and_five_seeds_settle_it(answers, seeds, verdict):
    """Whatever answers, the table has C-1 to D-4 once; the page of methods has them too."""
    rows = claims.claims(answers[0], seeds).rows
    counts = {"C": 4, "P": 5, "D": 4}
    names = [f"{letter}-{n + 1}" for letter, k in counts.items() for n in range(k)]
    assert [row["id"] for row in rows] == names
    assert all(row["verdict"].startswith(verdict) for row in rows)
    page = (laboratory.CODE / "docs" / "methods.md").read_text()
    assert all(name in page for name in names)


def test_a_question_finds_what_it_is_about(lab):
    """Under the name that is asked for: C-1 of `--questions` is C-1 of the table."""
    for name in ("C-1", "C-3", "D-1", "P-4"):
        assert claims.QUESTIONS[name](lab, 1).name == name


def test_some_questions_are_asked_and_what_others_found_stays(answers):
    lab, found = answers
    first = claims.claims(lab, 5, "P-4,C-3")
    assert [row["id"] for row in first.rows] == ["C-3", "P-4"]
    assert "not asked: C-1, C-2, C-4" in first.note and "before" not in first.note
    put(lab, first, 5)
    found.update({"C-3": "against", "P-4": "no"})
    elsewhere = claims.experiments.lab.ROOT / "results" / "citeulike"
    elsewhere.mkdir(parents=True)
    told = {"rows": [{"id": "C-3", "outcome": "yes"}], "seeds": 5}
    (elsewhere / "claims.json").write_text(json.dumps(told))
    second = claims.claims(lab, 5, "D-1,P-4")
    outcomes = [(row["id"], row["outcome"], row["verdict"][:8]) for row in second.rows]
    assert outcomes == [
        ("C-3", "yes", "survives"),
        ("P-4", "no", "not repr"),
        ("D-1", "yes", "survives"),
    ]
    assert second.rows[0]["verdict"] == "survives"  # as the other data have it since
    assert second.note.endswith(
        "not asked: C-1, C-2, C-4, P-1, P-2, P-3, P-5, D-2, D-3, D-4"
    )
    assert "table C-3" in second.text and "asked before this: C-3;" in second.note
    assert len(claims.claims(lab, 5).rows) == len(claims.QUESTIONS)


def test_what_was_found_elsewhere_does_not_stay(answers):
    lab, _ = answers
    put(lab, claims.claims(lab, 5, "C-3"), 5)
    assert len(claims.claims(lab, 3).rows) == len(claims.QUESTIONS)  # all: nothing stays
    with pytest.raises(
        DataError, match="--seeds: expected 5, as on file, found 3; without"
    ):
        claims.claims(lab, 3, "D-1")
    less = replaced(lab.dataset, train=lab.dataset.val)
    other = dataclasses.replace(lab, dataset=less)
    with pytest.raises(
        DataError, match="fingerprint .*; without --questions all are asked anew"
    ):
        claims.claims(other, 5, "D-1")
    with pytest.raises(DataError, match=r"--questions: expected some of C-1, C-2, .*'C-9'"):
        claims.claims(lab, 5, "C-9")


def test_the_page_says_what_the_claims_found():
    """The table of docs/methods.md beside the claims.json of all three datasets."""
    page = (laboratory.CODE / "docs" / "methods.md").read_text()
    found = {}
    places = (*claims.REAL, "synthetic")
    for name in places:
        file = laboratory.CODE / "results" / name / "claims.json"
        found[name] = {row["id"]: row for row in json.loads(file.read_text())["rows"]}
    for name in claims.ORDER:
        rows = [found[place].get(name, {"here": "not asked"}) for place in places]
        here = " | ".join(row["here"] for row in rows)
        assert f"| {name} | {rows[0]['claim']} | {here} |\n" in page

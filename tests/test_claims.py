"""The table of methods and the claims about them: rules, controls, and what is inside."""

import dataclasses
from functools import partial

import pytest
import torch
from conftest import replaced

import promptmm
from distillers import METHODS
from evaluate import one_scale
from experiments import lab as laboratory, methods as table, tune
from experiments.inside import Watched, in_mode, order
from experiments.lab import Lab, holm, learn, settings
from experiments.questions import TABLES, full_is_best, outcome
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
    judged = full_is_best("full")
    worse, better = row([0.05] * 5), row([0.2] * 5)
    assert judged(None, {"full": base, "a": worse}) == "yes"
    assert judged(None, {"full": base, "a": worse, "b": better}) == "against"
    assert judged(None, {"full": base, "a": row([0.05] * 5, p=0.5)}) == "no"


def test_the_order_of_weights():
    def rows(weights):
        pairs = zip("abc", (0.1, 0.2, 0.3), weights, strict=True)
        return [{"modality": m, "alone": r, "w, last epoch": w} for m, r, w in pairs]

    found = [order(rows(w)) for w in ((3, 2, 1), (1, 3, 2), (1, 2, 3))]
    assert found == ["yes", "no", "no"]  # an order without a test refutes nothing


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


def test_every_claim_is_asked():
    page = (laboratory.CODE / "docs" / "methods.md").read_text()
    asked = {question.name for question in TABLES} | {"C-1", "C-4", "P-3", "P-4"}
    asked |= {"D-1", "D-3"}
    counts = {"C": 4, "P": 5, "D": 4}
    assert asked == {f"{letter}-{n + 1}" for letter, k in counts.items() for n in range(k)}
    assert all(name in page for name in asked)

"""The prompt's experiments: each trains what it says, and answers from the numbers."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import replaced

import promptmm
from experiments import lab as laboratory, prompt as module
from experiments.lab import Job, Lab, judge, learn, load_teacher, recall, settings
from experiments.prompt import (
    WAYS,
    Adapted,
    PromptOnly,
    adapted,
    answer,
    beside,
    entangled,
    moved,
    outcome,
    tune,
)
from promptmm import Config, Run, Teacher, frozen_teacher, train_teacher, unit_logits


@pytest.fixture
def place(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(laboratory, "ROOT", tmp_path)
    shop = replaced(tiny, name="shop")
    return Lab(shop, "shop", torch.device("cpu"), 1, True, tmp_path)


@pytest.fixture
def ids(tiny):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(n, 8, generator=generator) for n in tiny.train.shape)


def copies(parameters) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in parameters]


def same(before, after) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def always_better(monkeypatch):
    """Validation improves at each look, so that the last epoch is selected."""
    looks = iter(range(1000))
    scripted = lambda *_, **__: {"recall@20": next(looks), "ndcg@20": 0.0}  # noqa: E731
    monkeypatch.setattr(promptmm, "evaluate", scripted)


def test_the_prompt_alone_leaves_w_where_it_starts(
    tiny, config, ids, tmp_path, monkeypatch
):
    always_better(monkeypatch)
    config = dataclasses.replace(config, patience_teacher=9, lr_prompt=0.1)
    start = PromptOnly(tiny, config, "cpu", ids)
    run = Run(tmp_path, tiny, config, torch.device("cpu"), {})
    teacher = train_teacher(run, ids, PromptOnly)
    assert same(start.reduction.parameters(), teacher.reduction.parameters())
    assert not torch.equal(teacher.prompt.weight, start.prompt.weight)


@pytest.mark.parametrize("name", module.TUNED)
def test_only_what_is_named_is_tuned(name, place, config, ids, monkeypatch):
    """The rest is bit-identical, and the old teacher keeps its own weights."""
    config = dataclasses.replace(config, lr_teacher=0.1, patience_teacher=9)
    teacher = Teacher(place.dataset, config, "cpu", ids)
    before = copies(teacher.parameters())
    mover = moved(place, config, teacher)
    chosen = module.TUNED[name](mover)
    rest = [w for w in mover.parameters() if not any(w is one for one in chosen)]
    kept = copies(rest)
    always_better(monkeypatch)
    began = copies(chosen)
    assert tune(place, config, mover, chosen) > 0
    assert not any(torch.equal(a, b) for a, b in zip(began, chosen, strict=True))
    assert same(kept, rest)
    assert same(before, teacher.parameters())
    assert not any(w.requires_grad for w in mover.parameters())


def test_an_adapter_starts_as_the_teacher_and_is_what_w_becomes(tiny, config, ids):
    """At b = 0 bit for bit; moved, as a Teacher whose W^m is W^m + a b."""
    plain = Teacher(tiny, config, "cpu", ids).eval()
    teacher = Adapted(tiny, config, "cpu", ids).eval()
    teacher.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        assert same(teacher()[:2], plain()[:2])
        for layer, a, b in zip(plain.reduction, teacher.a, teacher.b, strict=True):
            b.normal_()
            layer.weight += (a @ b).T
        for one, two in zip(teacher()[:2], plain()[:2], strict=True):
            assert torch.allclose(one, two, atol=1e-5)


def test_what_no_prompt_reaches_may_be_computed_once(tiny, config, ids):
    """`frozen_teacher` is the teacher on one scale, however its products are formed."""
    teacher = Teacher(tiny, config, "cpu", ids)
    frozen = frozen_teacher(teacher, dataclasses.replace(config, tune_prompt=False))()
    ours = unit_logits(teacher)()
    for one, two in zip(frozen[:2], ours[:2], strict=True):
        assert torch.allclose(one, two, atol=1e-6)
    for m, part in frozen.user_modal.items():
        assert torch.allclose(part, ours.user_modal[m], atol=1e-6)


@pytest.fixture
def teaching(place, monkeypatch):
    """A lab in which content always teaches, and each model's last epoch is kept."""
    monkeypatch.setattr(promptmm, "line_search", lambda *_: [0.5, 0.25])
    return place


def test_beside_nothing_the_student_is_promptmm(teaching):
    config = Config(dim=8, epochs=2, eval_every=1)
    learn(teaching, "PromptMM", config)
    job = Job("PromptMM", config)
    found = beside(teaching, config, WAYS["nothing"])
    assert np.array_equal(found["values"], judge(teaching, *job)["recall@20"])
    assert found["numbers"] == 0


def test_beside_a_teacher_that_knows_no_more_nothing_is_tuned(place, monkeypatch):
    """Content that weighs nothing: the student is LightGCN, whatever is to be tuned."""
    monkeypatch.setattr(promptmm, "line_search", lambda pairs, *_: [0.0] * (len(pairs) - 1))
    alone = judge(place, "LightGCN", settings(place, "LightGCN"))["recall@20"]
    for way in ("nothing", "W^m and b^m"):
        found = beside(place, replace(settings(place), seed=0), WAYS[way])
        assert found["numbers"] == 0
        assert np.array_equal(found["values"], alone)


@pytest.mark.parametrize("way", WAYS)
def test_stage_2_tunes_what_it_names(way, teaching, monkeypatch):
    """The last epoch is kept; what is not named stays; lists follow what is tuned."""
    config = Config(dim=8, epochs=2, eval_every=1, lr_prompt=0.1)
    load_teacher(teaching, config)
    teachers = []

    def kept(*arguments):
        teachers.append(moved(*arguments))
        return teachers[-1]

    monkeypatch.setattr(module, "moved", kept)
    always_better(monkeypatch)
    before = []

    def noted(teacher):
        before.append(copies(teacher.parameters()))
        return WAYS[way](teacher)

    listed, found = [], promptmm.best_unobserved
    monkeypatch.setattr(
        promptmm, "best_unobserved", lambda *given: listed.append(1) or found(*given)
    )
    beside(teaching, config, noted)
    assert len(listed) == (1 if way == "nothing" else config.epochs)
    [teacher] = teachers
    named = {id(weight) for weight in WAYS[way](teacher)}
    for old, weight in zip(before[0], teacher.parameters(), strict=True):
        assert torch.equal(old, weight) == (id(weight) not in named)


def test_numbers_tuned_are_those_of_the_parameters(place):
    config = Config(dim=8, epochs=2, eval_every=1)
    found = adapted(place, config)
    prompt = 8 * 8 + 8
    reduction = 24 * 24 + 24 + 12 * 12 + 12
    ids = 64 * sum(place.dataset.train.shape)  # as wide as LightGCN's own settings
    assert {name: one["numbers"] for name, one in found.items()} == {
        "nothing": 0,
        "the prompt": prompt,
        "W^m and b^m": reduction,
        "all anew, ids too": prompt + reduction + ids,
    }


USERS = np.linspace(0, 1, 50)  # recall of 50 users, of one seed


@pytest.fixture
def bases(monkeypatch):
    """The mean recalls of each pair of rows that are tested against each other."""
    pairs = []

    def compared_with(found, base):
        pairs.append((found.mean().round(3), base.mean().round(3)))
        return {"p_bootstrap": 0.5}

    monkeypatch.setattr(module, "paired_test", compared_with)
    return pairs


def test_each_teacher_is_tested_against_the_first(place, monkeypatch, bases):
    """Validation beside test, each by its own split."""
    level = {0.0: 0.1, 0.2: 0.2, 1.0: 0.3}

    def judged(lab, model, config, kind):
        return {"recall@20": USERS + level[config.lambda_prompt]}

    def validation(lab, job, split):
        assert split == "val"
        return level[job.config.lambda_prompt] / 2

    epochs = {"recall@20": np.array([0.1, 0.3, 0.2]), "prompt_share": np.arange(3) / 4}
    monkeypatch.setattr(module, "learn_all", lambda *_: None)
    monkeypatch.setattr(module, "log_of", lambda folder: epochs)
    monkeypatch.setattr(module, "judge", judged)
    monkeypatch.setattr(module, "recall", validation)
    jobs = {f"{one:g}": Job("Teacher", Config(lambda_prompt=one)) for one in level}
    rows = module.compared(place, "a title", jobs, 2)
    assert [row["test"]["mean"] for row in rows] == pytest.approx([0.6, 0.7, 0.8])
    assert [row["validation"]["mean"] for row in rows] == pytest.approx([0.05, 0.1, 0.15])
    assert [row["share"] for row in rows] == [0.25] * 3  # of the selected epoch
    assert bases == [(0.7, 0.6), (0.8, 0.6)] and "p" not in rows[0]


def test_each_way_of_stage_2_is_tested_against_nothing(place, monkeypatch, bases):
    level = {way: 0.1 * n for n, way in enumerate(WAYS)}
    by_function = {function: level[way] for way, function in WAYS.items()}

    def run(lab, config, chosen):
        found = by_function[chosen]
        values = {"values": USERS + found, "numbers": 7}
        return values | {"validation": found / 2, "teacher": found / 4}

    monkeypatch.setattr(module, "learn_all", lambda *_: None)
    monkeypatch.setattr(module, "beside", run)
    rows, _ = module.stage_2(place, 2)
    assert [row["model"] for row in rows] == list(WAYS)
    for row in rows:
        found = level[row["model"]]
        columns = [row[key]["mean"] for key in ("test", "validation", "teacher")]
        assert columns == pytest.approx([0.5 + found, found / 2, found / 4])
    assert bases == [(0.6, 0.5), (0.7, 0.5), (0.8, 0.5), (0.9, 0.5)]


def test_later_data_are_compared_with_doing_nothing(place, monkeypatch, bases):
    ways = "nothing", "the prompt", "W^m and b^m", "all anew, ids too"
    level = dict(zip(ways, (0.1, 0.2, 0.3, 0.4), strict=True))

    def run(lab, config):
        return {
            way: {"values": {"recall@20": USERS + one}, "numbers": 1, "seconds": 2.0}
            for way, one in level.items()
        }

    monkeypatch.setattr(module, "adapted", run)
    rows, _ = module.later(place, 2)
    assert [row["test"]["mean"] for row in rows] == pytest.approx([0.6, 0.7, 0.8, 0.9])
    assert bases == [(0.7, 0.6), (0.8, 0.6), (0.9, 0.6)]


def test_figures_beside_a_teacher_are_of_their_splits(teaching):
    """Validation excludes training alone, test validation too; the teacher's is its own."""
    config = Config(dim=8, epochs=2, eval_every=1)
    found = beside(teaching, config, WAYS["nothing"])
    job, teacher = Job("PromptMM", config), Job("Teacher", config)
    assert found["validation"] == pytest.approx(recall(teaching, job, "val"))
    assert found["teacher"] == pytest.approx(recall(teaching, teacher, "val"))
    assert found["teacher"] != found["validation"]


def test_an_outcome_is_the_teachers_on_test(teaching):
    config = Config(dim=8, epochs=2, eval_every=1)
    found = outcome(teaching, load_teacher(teaching, config), 3, 2.0)
    expected = judge(teaching, "Teacher", config)
    assert all(np.array_equal(found["values"][key], expected[key]) for key in expected)
    assert (found["numbers"], found["seconds"]) == (3, 2.0)


def test_planted_teachers_differ_by_the_prompt(place, monkeypatch):
    shown = {}
    monkeypatch.setattr(
        module, "compared", lambda lab, title, jobs, seeds: shown.update(jobs) or []
    )
    monkeypatch.setattr(module, "answer", lambda rows: "")
    module.planted(place, 1)
    shares = [job.config.lambda_prompt for job in shown.values()]
    assert shares == [0.0, 0.2, 0.2]
    assert [job.config.tokens for job in shown.values()][1:] == ["mean", "concat"]


def test_an_answer_comes_from_the_numbers():
    base = {"model": "first", "test": {"mean": 0.2}}
    better = {"model": "better", "test": {"mean": 0.3}, "p": 0.01}
    chance = {"model": "chance", "test": {"mean": 0.21}, "p": 0.4}
    worse = {"model": "worse", "test": {"mean": 0.1}, "p": 0.001}
    assert answer([base, chance, better, worse]) == "Yes: better (p = 0.01)."
    assert answer([base, chance, worse]).startswith("No") and "0.4" in answer(
        [base, chance]
    )


def test_entangled_modalities_need_each_other(tiny):
    """Their difference is the content without the noise; the noise alone says nothing."""
    dataset = entangled(tiny)
    first, second = dataset.features
    content = dataset.features[first] - dataset.features[second]
    x, y = (tiny.features[m] for m in tiny.features)
    plain = np.hstack([x / x.std(), y / y.std()])
    assert np.allclose(content, plain, atol=1e-4)
    assert dataset.features[second].std() > plain.std()


def test_the_part_answers_every_question(place):
    output = module.prompt(place, 1)
    assert output.text.count("**") == 6  # three questions: real data are not planted
    assert output.text.count("\n\nNo:") + output.text.count("\n\nYes:") == 3
    names = [row["model"] for row in output.rows]
    assert names[0] == "W alone" and names[-1] == "all anew, ids too"

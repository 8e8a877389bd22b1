"""Both stages: what learns, what is selected, what is written, and how a run goes on."""

import csv
import dataclasses
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHORT, replaced
from scipy import sparse
from torch import nn

import data
import promptmm
from evaluate import evaluate
from promptmm import Config, Run, Teacher, fit, pipeline, train_student, train_teacher

ROOT = Path(promptmm.__file__).parent


def another(run: Run, name: str, **changes) -> Run:
    """The same run in another folder, with other settings."""
    folder = run.folder.parent / name
    folder.mkdir()
    return dataclasses.replace(
        run, folder=folder, state={}, config=dataclasses.replace(run.config, **changes)
    )


def log(run: Run) -> list[dict]:
    return list(csv.DictReader((run.folder / "log.csv").read_text().splitlines()))


def taught(run: Run) -> Teacher:
    """A trained teacher with something to tell, whatever its line search found."""
    train = run.dataset.train
    generator = torch.Generator().manual_seed(0)
    ids = (torch.randn(n, run.config.dim, generator=generator) for n in train.shape)
    teacher = train_teacher(run, tuple(ids))
    teacher.weights.fill_(0.5)
    return teacher


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def prompt_moved(before: dict, after: dict) -> bool:
    return not torch.equal(before["prompt.weight"], after["prompt.weight"])


def watched_batches(monkeypatch) -> dict[str, list[int]]:
    """How many edges each step of a stage takes."""
    sizes = {"teacher_terms": [], "student_terms": []}
    for name, found in sizes.items():

        def counted(true, found, *arguments):
            found.append(len(arguments[-2 if true.__name__ == "teacher_terms" else 3]))
            return true(*arguments)

        true = getattr(promptmm, name)
        monkeypatch.setattr(promptmm, name, partial(counted, true, found))
    return sizes


def test_the_stages_may_take_other_batches(run, monkeypatch):
    sizes = watched_batches(monkeypatch)
    pipeline(another(run, "other", batch=50, batch_teacher=70))
    assert max(sizes["teacher_terms"]) == 70
    assert max(sizes["student_terms"]) == 50


def test_a_batch_is_a_share_of_the_edges():
    """40 steps an epoch, ten of the teacher, whatever the data's size; not below 256."""
    given = Config(batch=7, batch_teacher=8)
    for edges, student, teacher in ((100, 256, 256), (40_000, 1000, 4000)):
        assert promptmm.pace(Config(), "student", edges)[0] == student
        assert promptmm.pace(Config(), "teacher", edges)[0] == teacher
        assert promptmm.pace(given, "student", edges)[0] == 7
        assert promptmm.pace(given, "teacher", edges)[0] == 8


@pytest.mark.parametrize("tune", [True, False])
def test_stage_2_freezes_the_teacher_and_its_dropout(tune, run, monkeypatch):
    """θ_T bit for bit; θ_P moves if and only if it is tuned; eval mode at every step."""
    run = another(run, "other", tune_prompt=tune)
    teacher = taught(run)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    before, modes, true_terms = weights(teacher), [], promptmm.student_terms

    def spy(*arguments):
        modes.append(teacher.training)
        return true_terms(*arguments)

    monkeypatch.setattr(promptmm, "student_terms", spy)
    train_student(run, "student", teacher)
    assert modes
    assert not any(modes)
    after = weights(teacher)
    for name in before:
        assert name.startswith("prompt") or torch.equal(before[name], after[name]), name
    assert prompt_moved(before, after) == tune


def test_a_frozen_prompt_computes_the_teacher_once(run, monkeypatch):
    run = another(run, "other", tune_prompt=False)
    teacher, calls = taught(run), []
    forward = Teacher.forward
    monkeypatch.setattr(Teacher, "forward", lambda *a: calls.append(1) or forward(*a))
    train_student(run, "student", teacher)
    assert len(calls) == 2  # once for the scale of its logits


def test_unanchored_untaught_prompt_stays(run):
    """The student's own BPR has no path to θ_P (errata P11)."""
    run = another(
        run, "other", lambda_pair=0.0, lambda_list=0.0, lambda_embed=0.0, weight_anchor=0.0
    )
    run = another(run, "tuned", tune_prompt=True)
    teacher = taught(run)
    before = weights(teacher)
    train_student(run, "student", teacher)
    assert not prompt_moved(before, weights(teacher))


class Two(nn.Module):
    """Two parameters, each with its own loss term."""

    def __init__(self):
        super().__init__()
        self.user, self.item = (nn.Parameter(torch.ones(n, 2)) for n in (60, 40))


def fit_two(run, terms, module=None):
    module = module or Two()
    fit(
        run,
        "student",
        module,
        [{"params": list(module.parameters()), "lr": 0.1}],
        2,
        lambda users, lists: terms(module),
        lambda: (module.user, module.item),
    )
    return module


def test_a_hook_at_each_epoch(run):
    """It comes once an epoch, seeded."""
    drawn = []
    module = Two()

    def terms(users, lists):
        return {"one": module.user.square().sum()}

    def train(folder_name):
        drawn.clear()
        one = another(run, folder_name)
        fit(
            one,
            "student",
            module,
            [{"params": list(module.parameters()), "lr": 0.1}],
            2,
            terms,
            lambda: (module.user, module.item),
            lambda: drawn.append(torch.rand(1).item()),
        )
        return list(drawn)

    first = train("first")
    assert len(first) == run.config.epochs == len(set(first))
    assert train("second") == first


def test_dropout_and_sampling_draw_from_two_streams(run):
    """No seed is met twice over seeds, epochs, stages, streams; each again on resume."""
    met = []
    for seed in (0, 1, 2):
        for epoch in range(1, 60):
            for stage in ("teacher", "student"):
                one = another_seed(run, seed, epoch)
                generator = promptmm._seeded(one, stage)
                met += [torch.initial_seed(), generator.initial_seed()]
                assert (
                    generator.initial_seed() == promptmm._seeded(one, stage).initial_seed()
                )
    assert len(set(met)) == len(met) == 3 * 59 * 2 * 2


def another_seed(run: Run, seed: int, epoch: int) -> Run:
    config = dataclasses.replace(run.config, seed=seed)
    return dataclasses.replace(run, config=config, state={"epoch": epoch})


@pytest.mark.parametrize(
    ("epoch", "stale", "least", "most"),
    [(4, 0, 12, 32), (4, 2, 4, 32), (19, 0, 2, 2), (20, 3, 0, 0)],
)
def test_the_time_left(epoch, stale, least, most):
    """2 s an epoch, 20 at most, every second one judged, patience 3."""
    config = Config(epochs=20, eval_every=2, patience=3, patience_teacher=9)
    row = {
        "stage": "student",
        "epoch": epoch,
        "seconds": 2.0 * epoch,
        "loss": 1.0,
        "recall@20": 0.5,
    }
    line = promptmm._progress(row, {"stale": stale, "recall": 0.5}, config)
    assert line.endswith(f"left: {least} to {most} s")
    assert "2.00 s/epoch" in line
    assert f"epoch {epoch:4}  loss 1.0000  validation" in line
    del row["loss"]  # an epoch 0 has none
    untrained = promptmm._progress(row, {"stale": stale, "recall": 0.5}, config)
    assert untrained == line.replace("loss 1.0000", "untrained  ")


def test_the_objective_is_the_sum_of_its_terms(run):
    module = fit_two(
        run, lambda m: {"one": m.user.square().sum(), "two": m.item.square().sum()}
    )
    assert (module.user < 0.99).all()
    assert (module.item < 0.99).all()
    row = log(run)[0]
    assert float(row["loss"]) == pytest.approx(
        float(row["one"]) + float(row["two"]), rel=1e-6
    )


def test_a_loss_that_is_not_finite_stops_with_its_name(run):
    with pytest.raises(
        FloatingPointError, match="two is not finite, from step 1 of an epoch"
    ):
        fit_two(run, lambda m: {"one": m.user.sum(), "two": m.item.sum() * torch.inf})
    assert not (run.folder / "state.pt").exists()


def fake_evaluations(monkeypatch, recalls):
    """Validation as written in a list; returns what was asked for."""
    asked, values = [], iter(recalls)

    def scripted(user, item, target, exclude):
        asked.append((target, exclude))
        return {"recall@20": next(values), "ndcg@20": 0.0}

    monkeypatch.setattr(promptmm, "evaluate", scripted)
    return asked


def test_patience_and_the_selected_epoch(run, monkeypatch):
    """Best at the third evaluation, then two that are not; its weights come back."""
    run = another(run, "other", epochs=50, eval_every=2, patience=2)
    asked = fake_evaluations(monkeypatch, [0.1, 0.2, 0.4, 0.4, 0.3])
    seen = []
    module = fit_two(
        run, lambda m: seen.append(m.user[0, 0].item()) or {"one": m.user.sum()}
    )
    rows = log(run)
    assert [int(row["epoch"]) for row in rows] == [2, 4, 6, 8, 10]
    steps = len(seen) // 10
    assert module.user[0, 0].item() == pytest.approx(seen[6 * steps])  # as epoch 7 begins
    for target, exclude in asked:
        assert (target != run.dataset.val).nnz == 0
        assert (exclude != run.dataset.train).nnz == 0


def test_nothing_is_selected_on_the_test_split(run):
    """Another test split: another figure, the same student to the last bit (errata C5)."""
    other = another(run, "other")
    free = (run.dataset.train + run.dataset.val + run.dataset.test).toarray() == 0
    test = np.zeros(free.shape, np.float32)
    test[np.arange(60), free.argmax(1)] = 1  # everyone's first free item instead
    other.dataset = replaced(run.dataset, test=sparse.csr_matrix(test))
    one, two = pipeline(run), pipeline(other)
    assert one["test"] != two["test"]
    assert one["validation"] == two["validation"]
    with (
        np.load(run.folder / "student.npz") as a,
        np.load(other.folder / "student.npz") as b,
    ):
        assert all(np.array_equal(a[name], b[name]) for name in ("user", "item"))


@pytest.mark.parametrize("mask", ["all", "train"])
def test_what_is_unranked_at_test(mask, run, tiny):
    """Train and validation, or train alone; the output says which."""
    run = another(run, "other", mask=mask)
    metrics = pipeline(run)
    with np.load(run.folder / "student.npz") as saved:
        user, item = (torch.from_numpy(saved[name]) for name in ("user", "item"))
        had = tiny.train + tiny.val + tiny.test  # recommended to nobody who has it
        assert np.array_equal(saved["seen_indptr"], had.indptr)
        assert np.array_equal(saved["seen_indices"], had.indices)
    figures = {
        "all": evaluate(user, item, tiny.test, tiny.train + tiny.val),
        "train": evaluate(user, item, tiny.test, tiny.train),
    }
    assert figures["all"] != figures["train"]
    assert metrics["test"]["student"] == figures[mask]
    assert metrics["exclude"] == {"all": "train + val", "train": "train"}[mask]
    assert metrics["validation"]["student"] == evaluate(user, item, tiny.val, tiny.train)


def test_run_folder(run, tiny, monkeypatch):
    """What a finished run leaves, and what its files say."""
    monkeypatch.setattr(promptmm, "line_search", lambda pairs, *_: [0.5] * (len(pairs) - 1))
    run = another(run, "whole", tune_prompt=True)
    metrics = pipeline(run)
    assert sorted(f.name for f in run.folder.iterdir()) == [
        "log.csv",
        "metrics.json",
        "prompt.pt",
        "student.npz",
        "teacher.pt",
    ]
    assert metrics == data.read_json(run.folder / "metrics.json", sealed=True)
    for split in ("validation", "test"):
        assert set(metrics[split]) == {
            "mostpop",
            "teacher",
            "alone",
            "student",
            "teacher_tuned",
        }
    d_m = [x.shape[1] for x in tiny.features.values()]
    assert metrics["parameters"] == {
        "student": {"trainable": 100 * 8, "buffers": 0},
        "teacher": {
            "trainable": 100 * 8 + sum(d * d + d for d in d_m) + 8 * 8 + 8,
            "buffers": 40 * sum(d_m),
        },
    }
    assert set(metrics["weights"]) == set(tiny.features)
    rows = log(run)
    assert (
        {row["stage"] for row in rows}
        == {"teacher", "alone", "student"}
        == set(metrics["seconds"])
    )
    without = [(row["stage"], row["epoch"]) for row in rows if not row["loss"]]
    assert without == [("teacher", "0")]  # judged before it is trained
    columns = {
        name for row in rows if row["stage"] == "student" for name, v in row.items() if v
    }
    assert columns >= {
        "bpr",
        "pair_kd",
        "list_kd",
        "embed_kd",
        "l2",
        "prompt_anchor",
        "loss",
    }
    teacher = Teacher(tiny, run.config)
    teacher.load_state_dict(torch.load(run.folder / "teacher.pt"))
    with torch.no_grad():
        again = evaluate(*teacher.eval()()[:2], tiny.test, tiny.train + tiny.val)
    assert again == pytest.approx(metrics["test"]["teacher"])  # the stage-1 checkpoint
    teacher.prompt.load_state_dict(torch.load(run.folder / "prompt.pt"))
    with torch.no_grad():
        again = evaluate(*teacher()[:2], tiny.test, tiny.train + tiny.val)
    assert again == pytest.approx(metrics["test"]["teacher_tuned"])


def test_student_alone_is_lightgcn_from_the_same_start(run):
    """`alone` in a full run and a student-only run are one: Eq. 13, nothing else."""
    full = pipeline(run)
    only = pipeline(
        another(run, "only", lambda_pair=0.0, lambda_list=0.0, lambda_embed=0.0)
    )
    assert only["test"]["student"] == full["test"]["alone"] != full["test"]["student"]
    assert not (run.folder.parent / "only" / "teacher.pt").exists()


def test_warm_start_copies_the_teachers_ids(run):
    """Its own storage (errata C7, C24); a fresh student knows nothing of the teacher."""
    warm = another(run, "warm", warm_start=True, lr_student=0.0)
    teacher = taught(warm)
    user, _ = train_student(warm, "student", teacher)
    ids = teacher.user, teacher.item
    expected = promptmm.lightgcn(teacher.graph, *ids, warm.config.student_layers)
    assert torch.allclose(user, expected[0], atol=1e-6)
    before = teacher.user.clone()
    train_student(another(warm, "learning", lr_student=0.1), "student", teacher)
    assert torch.equal(teacher.user, before)  # what the student learns moves no target
    fresh = another(warm, "fresh", warm_start=False)
    torch.manual_seed(fresh.config.seed)
    expected = promptmm.Student(fresh.dataset.train, fresh.config)()
    assert torch.equal(train_student(fresh, "student", teacher)[0], expected[0])
    assert not torch.equal(expected[0], user)


def useless(tiny):
    """Content of noise: no modality should weigh anything."""
    rng = np.random.default_rng(0)
    return replaced(tiny, features={"noise": rng.standard_normal((40, 6)).astype("f4")})


def test_a_teacher_that_knows_no_more_leaves_the_student_lightgcn(run, monkeypatch):
    """Weight 0 for each modality: the same student as alone, to the last bit."""
    monkeypatch.setattr(promptmm, "line_search", lambda pairs, *_: [0.0] * (len(pairs) - 1))
    found = pipeline(run)
    assert found["test"]["student"] == found["test"]["alone"]
    assert found["test"]["teacher"] == pytest.approx(found["test"]["alone"])
    assert set(found["weights"].values()) == {0.0}


def test_weights_come_from_validation_alone(run, tiny, monkeypatch):
    """Found at each look, from the training and the validation split, ids first."""
    asked = []

    def spy(pairs, train, val):
        asked.append((len(pairs), train, val))
        return [0.3] * (len(pairs) - 1)

    monkeypatch.setattr(promptmm, "line_search", spy)
    pipeline(run)
    assert len(asked) == sum(row["stage"] == "teacher" for row in log(run))
    for count, train, val in asked:
        assert count == 1 + len(tiny.features)
        assert train is run.dataset.train and val is run.dataset.val


def test_weights_belong_to_the_selected_epoch(run, tiny, monkeypatch):
    """The teacher is judged under the weights of its epoch, and keeps the best epoch's."""
    found = iter([[0.1, 0.1], [0.5, 0.25], [0.2, 0.2], [0.7, 0.7]])
    recalls = iter([0.1, 0.4, 0.3, 0.2])
    ids = tuple(torch.randn(n, 8) for n in tiny.train.shape)
    monkeypatch.setattr(promptmm, "line_search", lambda *_: next(found))
    monkeypatch.setattr(
        promptmm, "evaluate", lambda *_, **__: {"recall@20": next(recalls), "ndcg@20": 0.0}
    )
    short = dataclasses.replace(run.config, epochs=3, eval_every=1, patience_teacher=9)
    teacher = train_teacher(dataclasses.replace(run, config=short), ids)
    assert teacher.weights.tolist() == [0.5, 0.25]


def test_the_teacher_is_judged_before_it_is_trained(run):
    """Epoch 0 is the fusion of profiles; it is kept unless training beats it."""
    taught(run)
    rows = log(run)
    assert [int(row["epoch"]) for row in rows][:2] == [0, 1]
    assert all(float(row["prompt_share"]) > 0 for row in rows)


def test_training_beats_popularity(tmp_path):
    """On planted structure, teacher and student reach 1.3 times MostPop in a few epochs."""
    dataset = data.synthetic(
        users=400, items=300, interactions=6000, dims={"visual": 64, "text": 48}
    )
    config = Config(dim=16, epochs=24, eval_every=4, negatives=4, lr_student=0.02)
    found = pipeline(Run(tmp_path, dataset, config, torch.device("cpu"), {}))["test"]
    for model in ("teacher", "student"):
        assert found[model]["recall@20"] > 1.3 * found["mostpop"]["recall@20"], model


# ------------------------------------------------------------ the same again, and going on


def figures(folder: Path) -> dict:
    """metrics.json without its clock."""
    return {**data.read_json(folder / "metrics.json", sealed=True), "seconds": None}


def test_one_seed_one_result(run):
    pipeline(run)
    pipeline(again := another(run, "again"))
    pipeline(other := another(run, "other", seed=1))
    assert figures(run.folder) == figures(again.folder) != figures(other.folder)


class Interruption(Exception):
    pass


def interrupted(run: Run, monkeypatch, writes: int) -> bool:
    """Run until the n-th file has been written; false if it finished before."""
    with monkeypatch.context() as patch:
        left, true_write = [writes], data.write

        def counted(path, content):
            true_write(path, content)
            left[0] -= 1
            if not left[0]:
                raise Interruption

        for module in (promptmm, data):
            patch.setattr(module, "write", counted)
        try:
            pipeline(run)
        except Interruption:
            return True
    return False


def test_a_run_interrupted_after_any_write_goes_on_to_the_same_result(run, monkeypatch):
    """Every state in which a killed run can leave its folder, one after the other."""
    pipeline(run)
    writes = 1
    while interrupted(part := another(run, f"part{writes}"), monkeypatch, writes):
        state = part.folder / "state.pt"
        again = dataclasses.replace(part, state=torch.load(state) if state.exists() else {})
        pipeline(again)
        assert figures(part.folder) == figures(run.folder), writes
        logs = [[{**row, "seconds": 0} for row in log(r)] for r in (run, again)]
        assert logs[0] == logs[1]
        writes += 1
    assert writes > 20


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_killed_for_real_and_resumed(share, folder, tmp_path):
    """SIGKILL through the command line, partway through the log of an uninterrupted run."""
    command = [
        sys.executable,
        str(ROOT / "promptmm.py"),
        "--data",
        str(folder),
        *SHORT,
        "--epochs",
        "30",
        "--patience",
        "30",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(
        [*command, "--out", str(whole)], env=environment, check=True, capture_output=True
    )
    lines = len((whole / "log.csv").read_text().splitlines())
    process = subprocess.Popen(
        [*command, "--out", str(killed)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = killed / "log.csv"
    while not log.exists() or len(log.read_text().splitlines()) < share * lines:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "metrics.json").exists()
    subprocess.run(
        [*command, "--out", str(killed), "--resume"],
        env=environment,
        check=True,
        capture_output=True,
    )
    assert figures(killed) == figures(whole)

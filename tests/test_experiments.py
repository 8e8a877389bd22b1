"""The runner, the tables and the search: trained once, compared fairly, written whole."""

import builtins
import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from conftest import replaced
from scipy import sparse

import data
import experiments
import paper
import promptmm
import runner
import tune
from promptmm import PRESETS, Config
from runner import Lab, compare, judge, learn, markdown, publish, seeded, settings

RESULTS = experiments.ROOT / "results"


@pytest.fixture
def lab(tiny, tmp_path, monkeypatch) -> Lab:
    """The tiny dataset under another name: no preset, no earlier search; all goes to tmp_path."""
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    return Lab(replaced(tiny, name="shop"), "shop", torch.device("cpu"), 2, False,
               tmp_path / "results")


def count_calls(monkeypatch, module, name: str) -> list:
    calls, function = [], getattr(module, name)

    def counted(*arguments, **named):
        calls.append(arguments)
        return function(*arguments, **named)

    monkeypatch.setattr(module, name, counted)
    return calls


def test_a_model_is_trained_once_and_its_teacher_shared(lab, config, monkeypatch):
    teachers = count_calls(monkeypatch, promptmm, "teacher_terms")
    students = count_calls(monkeypatch, promptmm, "student_terms")
    first = learn(lab, "PromptMM", config)
    paid = len(teachers)
    assert paid > 0
    learnt = len(students)
    assert learn(lab, "PromptMM", config) == first
    assert len(students) == learnt  # not trained again
    other = dataclasses.replace(config, lambda_pair=0.5)
    assert learn(lab, "PromptMM", other) != first
    assert len(students) > learnt
    assert len(teachers) == paid  # the same teacher taught both


@pytest.mark.parametrize(("model", "matters", "ignored"), [
    ("LightGCN", "l2", "fusion"), ("LightGCN", "student_layers", "lambda_pair"),
    ("MF-BPR", "lr_student", "teacher_layers"), ("Teacher", "fusion", "lambda_pair"),
    ("Teacher", "lambda_prompt", "lr_student"), ("PromptMM", "fusion", "alone"),
    ("PromptMM", "lambda_embed", "alone"), ("PromptMM", "seed", "alone")])
def test_the_cache_knows_what_matters(lab, config, model, matters, ignored):
    def changed(name: str) -> Config:
        value = getattr(config, name)
        return dataclasses.replace(config, **{name: not value if value is True else value + 1})

    assert lab.folder(model, changed(matters)) != lab.folder(model, config)
    assert lab.folder(model, changed(ignored)) == lab.folder(model, config)


def test_the_cache_knows_the_data(lab, config):
    other = replaced(lab.dataset, train=lab.dataset.train[::-1].tocsr())
    assert dataclasses.replace(lab, dataset=other).cache != lab.cache


def test_the_runner_trains_what_the_command_trains(lab, config, run):
    """Same seed, same student as `promptmm.py` makes, to the last bit."""
    whole = promptmm.pipeline(dataclasses.replace(run, dataset=lab.dataset))
    for model, name in (("Teacher", "teacher"), ("LightGCN", "alone"), ("PromptMM", "student")):
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
    true_epoch, count = promptmm._epoch, []

    def stopping(*arguments):
        count.append(1)
        if len(count) == 6:  # 4 of the teacher, the first of the student, then
            raise KeyboardInterrupt
        return true_epoch(*arguments)

    monkeypatch.setattr(promptmm, "_epoch", stopping)
    with pytest.raises(KeyboardInterrupt):
        learn(lab, "PromptMM", config)
    assert np.array_equal(judge(lab, "PromptMM", config)["ndcg@20"], expected["ndcg@20"])
    assert len(count) == 6 + 3  # the student's remaining epochs, nothing else


def test_compare_says_what_its_runs_say(lab, config):
    rows = {"LightGCN": ("LightGCN", config), "Teacher": ("Teacher", config)}
    reference, row = compare(lab, "test", rows, 2, "LightGCN")
    runs = [judge(lab, "Teacher", one)["recall@20"].mean() for one in seeded(lab, config, 2)]
    assert row["recall@20"]["runs"] == runs
    assert runs[0] != runs[1]
    assert row["recall@20"]["mean"] == pytest.approx(sum(runs) / 2)
    assert row["recall@20"]["std"] == pytest.approx(abs(runs[0] - runs[1]) / 2**0.5)
    base = reference["recall@20"]["mean"]
    assert row["gain"]["recall@20"] == pytest.approx(row["recall@20"]["mean"] / base - 1)
    low, high = row["p_interval"]
    assert low <= row["recall@20"]["mean"] - base <= high
    assert "p" not in reference
    assert 0 < row["p"] <= 1


def test_the_search_reads_no_test_split(lab, monkeypatch):
    """It also tries equally often, starts at its start, and keeps the best on validation."""
    splits = []
    true_evaluate = runner.evaluate

    def watched(user, item, target, *rest, **named):
        splits.append(target is lab.dataset.test)
        return true_evaluate(user, item, target, *rest, **named)

    monkeypatch.setattr(runner, "evaluate", watched)
    monkeypatch.setattr(promptmm, "evaluate", watched)
    output = tune.tune(dataclasses.replace(lab, quick=True), 4)
    assert splits and not any(splits)
    best = output.extra["best"]
    for model in tune.SPACE:
        rows = [row for row in output.rows if row["model"] == model]
        assert len(rows) == (2 if model in ("Teacher", "PromptMM") else 4)
        assert best[model] == max(rows, key=lambda row: row["validation"])["settings"]
    assert best["PromptMM"].items() >= {**best["Teacher"]}.items()
    assert best["MF-BPR"]["student_layers"] == 0


OURS = ("synthetic", "tiktok", "citeulike")


def test_every_preset_value_comes_from_a_search():
    """Equally many tries for every model, at most 24, and the best of them on validation."""
    for name in OURS:
        preset = PRESETS[name]
        search = json.loads((RESULTS / name / "tune.json").read_text())
        rows = [row for row in search["rows"] if row["model"] == "PromptMM"]
        assert preset == max(rows, key=lambda row: row["validation"])["settings"]
        Config(**preset)
        tries = [row["model"].replace("Teacher", "PromptMM") for row in search["rows"]]
        assert {tries.count(model) for model in set(tries)} == {search["tried"]}
        assert search["tried"] <= 24


@pytest.mark.parametrize("name", OURS)
def test_the_comparisons_are_fair_ones(name):
    table = json.loads((RESULTS / name / "table4.json").read_text())
    assert [row["model"] for row in table["rows"]] == [
        "MostPop", "MF-BPR", "LightGCN", "Teacher", "PromptMM"]
    for row in table["rows"]:
        assert len(row["recall@20"]["runs"]) == table["seeds"] >= 5
        assert np.mean(row["ndcg@20"]["runs"]) == pytest.approx(row["ndcg@20"]["mean"])
        assert ("p" in row) == (row["model"] != "LightGCN")
    full = Config(**PRESETS[name])
    assert min(full.lambda_prompt, full.lambda_pair, full.lambda_list, full.lambda_embed) > 0
    assert not full.warm_start
    assert set(table) >= {"command", "seeds", "device", "threads", "versions", "wall_seconds",
                          "protocol"}


def test_outputs_appear_whole_and_say_how_they_were_made(lab, capsys, monkeypatch):
    rows = [{"model": "a", "value": 0.25}]
    output = runner.Output("Title", rows, markdown(rows, {"model": "m", "value": "v"}), "a note",
                           lambda figure: figure.subplots().plot([1, 2]))
    folder = lab.out / "shop"
    publish(lab, folder, "table9", output, 1.5, 2, ["--seeds 2"])
    text = (folder / "table9.md").read_text()
    for part in ("# Title", "| a | 0.25 |", "a note", "experiments.py table9 --data shop --seeds 2",
                 "2 seeds", "cpu", torch.__version__):
        assert part in text
    assert json.loads((folder / "table9.json").read_text())["rows"] == rows
    true_import = builtins.__import__

    def without(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return true_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    publish(lab, folder, "figure9", output, 1.5, 2, [])
    assert not (folder / "figure9.png").exists()
    assert (folder / "figure9.md").exists()
    assert "skipped figure9.png" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["table3", "table4", "table5", "options", "popularity", "table7",
                                  "figure4", "figure5"])
def test_each_part_runs_and_a_second_time_does_nothing(name, tiny, folder, tmp_path, monkeypatch,
                                                       capsys):
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(data, "synthetic", lambda **_: tiny)
    argv = [name, "--quick", "--out", str(tmp_path / "out")]
    assert experiments.main(argv) == 0
    file = tmp_path / "out" / "synthetic" / f"{name}.json"
    first = file.read_bytes()
    assert json.loads(first)["rows"]
    assert file.with_suffix(".md").exists()
    capsys.readouterr()
    assert experiments.main(argv) == 0
    assert "finished before" in capsys.readouterr().out
    assert file.read_bytes() == first


def test_recall_by_popularity_splits_the_recall(lab):
    """With one test item a user, the groups' recalls, weighted by their shares, are the whole."""
    test, rows = lab.dataset.test, np.arange(lab.dataset.test.shape[0])
    single = sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, test.argmax(1).A1)))
    single.resize(test.shape)
    lab = dataclasses.replace(lab, dataset=replaced(lab.dataset, test=single), quick=True, seeds=1)
    share, popular, *_ = experiments.popularity(lab).rows
    parts = {group: float(share[group].rstrip("%")) / 100 for group in experiments.GROUPS}
    assert sum(parts.values()) == pytest.approx(1, abs=2e-3)
    assert max(parts.values()) < 1
    whole = judge(lab, "MostPop", Config())["recall@20"].mean()
    split = sum(parts[group] * popular[group]["mean"] for group in parts)
    assert split == pytest.approx(whole, abs=2e-3)


def test_ablations_leave_out_what_they_say(lab, config):
    rows = experiments.variants(config, dataclasses.replace(lab, quick=True))
    change = {name: {key: value for key, value in vars(one).items()
                     if value != getattr(config, key)} for name, (_, one) in rows.items()}
    assert change["PromptMM"] == {}
    assert change["w/o Prompt"] == {"lambda_prompt": 0.0}
    for name, weight in (("Pair", "pair"), ("List", "list"), ("Emb", "embed")):
        assert change[f"w/o {name}KD"] == {f"lambda_{weight}": 0.0}
    assert change["w/o disentangle"] == {"beta": "identity"}
    assert change["prompt frozen"] == {"tune_prompt": False}


def test_fine_tuning_sees_only_new_interactions(lab, config, monkeypatch):
    train = lab.dataset.train
    new = train.copy()
    new.data = (np.arange(train.nnz) % 5 == 0).astype(train.dtype)
    new.eliminate_zeros()
    seen = set()
    true_epoch = experiments._epoch

    def watched(student, optimiser, samples, *rest):
        users, lists = (part.numpy().copy() for part in samples)
        seen.update(zip(users.tolist(), lists[:, 0].tolist(), strict=True))
        assert not train[users, lists[:, 1]].any()  # negatives: no positive, old or new
        return true_epoch(student, optimiser, samples, *rest)

    monkeypatch.setattr(experiments, "_epoch", watched)
    student = promptmm.Student(train, config)
    experiments.finetune(lab, student, new, config)
    assert seen == set(zip(*(ids.tolist() for ids in new.nonzero()), strict=True))


def test_any_part_runs_on_any_data(folder, tmp_path, monkeypatch, capsys):
    """Not only those that `all` picks there; and a child's complaint is our one line."""
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    flags = ["--data", str(folder), "--quick", "--out", str(tmp_path / "out")]
    assert experiments.main(["options", *flags]) == 0
    assert (tmp_path / "out" / "shop" / "options.md").exists()
    (folder / "text_feat.npy").unlink()
    assert experiments.main(["figure3", *flags]) == 2
    assert "two modalities" in capsys.readouterr().err
    with pytest.raises(data.DataError, match="expected a dataset folder"):
        experiments.child([str(experiments.ROOT / "promptmm.py"), "--data", "nowhere"])


@pytest.mark.parametrize(("argv", "expected"), [
    (["table4", "--seeds", "-1"], "--seeds 0 or more"), (["tune", "--tries", "25"], "2 to 24"),
    (["table44"], "invalid choice"), (["table4", "--data", "nowhere"], "nowhere"),
    (["table4", "--device", "tpu"], "--device"), (["table4", "--colour"], "--colour")])
def test_refusals(argv, expected, tmp_path, capsys):
    assert experiments.main([*argv, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    assert expected in error
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the paper's own numbers


def test_the_papers_counts_are_rederived():
    """Errata 1c: every printed count of Tables 6, 8, 9 is a sum that can be made, or is wrong."""
    rows = {row["what"]: row for row in paper.counts().rows}
    assert rows["Netflix LATTICE"]["re-derived"] == 24_058_242
    assert rows["Netflix teacher"]["re-derived"] == 24_906_304
    assert rows["Netflix teacher"]["right"] == 24_058_304
    assert rows["Netflix student"]["re-derived"] == 1_951_296
    assert rows["Electronics LATTICE"]["re-derived"] == 98_390_786
    assert rows["Electronics teacher"]["re-derived"] == 99_037_632
    assert rows["Electronics teacher"]["right"] == 98_390_848
    assert rows["Electronics student"]["re-derived"] == 2_668_224
    assert rows["Electronics student"]["right"] == 2_021_440
    for name, row in rows.items():
        if row["printed"].endswith("M"):  # in millions, to two digits
            assert f"{row['re-derived'] / 1e6:.2f}M" == row["printed"], name
        elif row["printed"]:  # ratios of counts that were rounded first
            assert row["re-derived"] * 100 == pytest.approx(float(row["printed"][:-1]), abs=0.011)
    assert rows["Netflix student / teacher"]["right"] == pytest.approx(0.0811, abs=5e-5)
    assert rows["Electronics student / teacher"]["right"] == pytest.approx(0.0205, abs=5e-5)
    learnt = rows["Netflix student / teacher, learnt only"]["right"]
    assert learnt == pytest.approx(0.979, abs=5e-4)
    for table, totals in ((paper.table8(), {"teacher": 3_210_368, "student": 1_951_296}),
                          (paper.table9(), {"teacher, text 768-d": 108_828_288,
                                            "teacher, text 1024-d": 114_343_296,
                                            "student": 4_042_880, "student, GCN": 2_048})):
        for row in table.rows:
            if row["weight"] == "total":
                assert row["from the shape"] == totals[row["model"]]
            elif row["printed"] != "" and "1024" not in row["model"]:
                assert row["from the shape"] == row["printed"], row
    assert paper.table8().extra["ratio"] == pytest.approx(0.608, abs=5e-4)
    ratio = paper.table9().extra["ratio"]
    expected = {"student / teacher": 0.0371, "learnt only": 0.928}
    assert ratio[768] == pytest.approx(expected, abs=5e-4)
    assert ratio[1024]["student / teacher"] == pytest.approx(0.0354, abs=5e-5)


def test_our_own_counts_follow_the_same_formula(tiny, config):
    """(U+I)d + Σ(d_m d + d) learnt with the prompt's d² + d; I Σ d_m frozen; the student (U+I)d."""
    n_users, n_items = tiny.train.shape
    d, widths = config.dim, [x.shape[1] for x in tiny.features.values()]
    teacher = promptmm.Teacher(tiny, config)
    learnt = (n_users + n_items) * d + sum(width * d + d for width in widths) + d * d + d
    assert sum(p.numel() for p in teacher.parameters()) == learnt
    assert sum(x.numel() for x in teacher.features.values()) == n_items * sum(widths)
    student = promptmm.Student(tiny.train, config)
    assert sum(p.numel() for p in student.parameters()) == (n_users + n_items) * d


def test_figure_2s_example():
    *rows, numbers = paper.figure2().rows
    for row in rows[1:]:
        for side in ("teacher", "student"):
            assert sum(row[side]) == pytest.approx(1, abs=2e-4)
    assert rows[1]["teacher"] == pytest.approx([0.2116, 0.7884], abs=5e-5)
    assert numbers["KL(b) + (1 - b+) KL(q)"] == pytest.approx(numbers["KL of the lists"], abs=1e-15)
    assert numbers["softmax of summed scores"] == pytest.approx(numbers["printed b+"], abs=5e-5)


PINNED = {
    "P1": [0.2689414, [0.0, -1.0849, -2.5276], 0.0],
    "P2": [2.5115, 1.9895, -2.5115, 2.5115],
    "P3": [0.0],
    "P6": [0.4651, 0.4651, 0.2116],
    "C1": [0.0, 1.0, [0.3941, 0.6059, 0.5152]],
    "C6": [0.1461, 0.2641],
    "C7": [2.0, 4.0],
}


def test_the_errata_show_what_they_claim():
    checks = {check.__name__.upper(): check for check, *_ in paper.ERRATA}
    assert {"P1", "P2", "P3", "P6", "P9", "P10", "P11", "C1", "C2", "C3", "C5", "C6",
            "C7"} == set(checks)
    for name, pinned in PINNED.items():
        for value, expected in zip(checks[name]().values(), pinned, strict=True):
            assert value == pytest.approx(expected, abs=1e-4), name
    (small, large), (_, _), cost = checks["P9"]().values()
    assert large > 50 * small  # a hundred times the items
    assert cost > 100
    change, similarity, chance = checks["P10"]().values()
    assert change > 1
    assert abs(similarity - chance) < 0.05
    reach = {key.split()[1]: value for key, value in checks["P11"]().items()}
    assert reach["bpr"] == reach["l2"] == 0
    assert min(reach["pair_kd"], reach["list_kd"], reach["embed_kd"]) > 0
    lowered, match, ours = checks["C2"]().values()
    assert lowered == 1 and match > 0 and ours < 1e-8
    (logged, released), (term, objective) = checks["C3"]().values()
    assert logged > 1 and released == 0
    assert term > 0 and objective == pytest.approx(term, abs=1e-5)
    on_validation, on_test, excess = checks["C5"](seeds=1, epochs=12).values()
    assert on_test >= on_validation > 0
    assert excess == pytest.approx(on_test / on_validation - 1)


def test_the_outputs_of_the_errata_are_the_code_s():
    stored = json.loads((RESULTS / "paper" / "errata.json").read_text())["rows"]
    assert [row["id"] for row in stored] == [check.__name__.upper() for check, *_ in paper.ERRATA]
    text = (RESULTS / "paper" / "errata.md").read_text()
    assert re.findall(r"- \*\*([PC]\d+)\*\*", text) == [row["id"] for row in stored]


def test_settings_come_from_a_search_on_the_same_data_or_the_defaults(lab, tmp_path):
    assert settings(lab) == Config()
    assert settings(lab, "MF-BPR") == Config(student_layers=0)
    file = tmp_path / "results" / "shop" / "tune.json"
    file.parent.mkdir(parents=True)
    found = {"best": {"LightGCN": {"l2": 0.5}}, "tried": 2, "fingerprint": "of other data"}
    file.write_text(json.dumps(found))
    assert settings(lab, "LightGCN") == Config()
    file.write_text(json.dumps(found | {"fingerprint": data.fingerprint(lab.dataset)}))
    assert settings(lab, "LightGCN") == Config(l2=0.5)

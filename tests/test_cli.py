"""The commands as people type them: figures, one-line errors, exit statuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHORT

import data
import promptmm
from promptmm import main

ROOT = Path(promptmm.__file__).parent
ALONE = SHORT[: SHORT.index("--negatives")]  # a student alone has no lists


@pytest.fixture
def here(tmp_path, monkeypatch, tiny):
    """An empty working folder, and a small embedded dataset whose content always teaches.

    On so few users validation alone would hardly give a modality any weight.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "synthetic", lambda: tiny)
    monkeypatch.setattr(promptmm, "line_search", lambda *_: [0.5, 0.25])
    return tmp_path


def error_of(argv, capsys, status=2) -> str:
    """Run a command that must fail; its one line on stderr."""
    capsys.readouterr()
    assert main(argv) == status
    out, err = capsys.readouterr()
    errors = [
        line for line in err.splitlines() if line.startswith(("error: ", "interrupted"))
    ]
    assert len(errors) == 1
    assert out == ""
    assert "Traceback" not in err
    return errors[0]


def test_main_prints_the_ladder(here, capsys):
    assert main([*SHORT, "--quick", "--tune-prompt"]) == 0
    lines = capsys.readouterr().out.splitlines()
    metrics = json.loads((here / "runs/synthetic/metrics.json").read_text())
    names = {
        "mostpop": "MostPop",
        "alone": "LightGCN",
        "teacher": "Teacher",
        "teacher_tuned": "Teacher, prompt tuned",
        "student": "PromptMM",
    }
    for line, (name, shown) in zip(lines[1:6], names.items(), strict=True):
        assert line.startswith(f"{shown}  ")
        assert f"{metrics['test'][name]['recall@20']:.4f}" in line
        assert f"{metrics['test'][name]['ndcg@20']:.4f}" in line
    assert lines[6] == "weights beside LightGCN, by validation: visual 0.5, text 0.25"
    assert "hidden at test: train + val" in lines[7]
    config = json.loads((here / "runs/synthetic/config.json").read_text())
    assert (config["epochs"], config["dim"], config["data"]) == (
        4,
        8,
        None,
    )  # flags beat --quick
    assert main(["--quick", "--dim", "4", "--student-only", "--out", "quick"]) == 0
    assert json.loads((here / "quick/config.json").read_text())["epochs"] == 2
    assert "weights beside LightGCN" not in capsys.readouterr().out  # it has no teacher


def test_lightgcn_beside_is_the_tuned_one(here):
    """Settings of the same search, flags on top; --student-only trains the same."""
    assert main(["--quick", "--dim", "4", "--seed", "3", "--out", "whole"]) == 0
    assert (
        main(["--quick", "--dim", "4", "--seed", "3", "--student-only", "--out", "only"])
        == 0
    )
    stored = json.loads((here / "whole/config.json").read_text())
    quick = {"epochs": 2, "eval_every": 1, "dim": 4, "seed": 3}
    assert promptmm.Config(**stored["lightgcn"]) == promptmm.Config(
        **promptmm.LIGHTGCN["synthetic"] | quick
    )
    whole, only = (
        json.loads((here / f"{n}/metrics.json").read_text()) for n in ("whole", "only")
    )
    assert whole["test"]["alone"] == only["test"]["student"]


def test_progress_says_what_is_left(here, capsys):
    assert main([*ALONE, "--student-only"]) == 0
    [first, *_] = capsys.readouterr().err.splitlines()
    for word in ("student", "epoch    1", "loss", "validation", "s/epoch", "left: "):
        assert word in first


def test_presets_flags_and_modes_stack(here):
    assert (
        main(
            [
                "--preset",
                "tiktok",
                "--quick",
                "--epochs",
                "3",
                "--dim",
                "4",
                "--out",
                "run",
                "--beta",
                "identity",
                "--tune-prompt",
            ]
        )
        == 0
    )
    stored = json.loads((here / "run/config.json").read_text())
    expected = vars(
        promptmm.Config(
            **promptmm.PRESETS["tiktok"]
            | {
                "epochs": 3,
                "eval_every": 1,
                "dim": 4,
                "beta": "identity",
                "tune_prompt": True,
            }
        )
    )
    assert {name: stored[name] for name in expected} == expected


def test_every_setting_is_a_flag_with_its_source(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in vars(promptmm.Config()):
        assert f"--{name.replace('_', '-')}" in text
    assert "λ₃ of Eq. 12" in text


BAD_ARGUMENTS = {
    "an unknown flag": (["--lamda-list", "1"], "unrecognized arguments: --lamda-list"),
    "an abbreviation": (["--lambda-l", "1"], "unrecognized arguments: --lambda-l"),
    "not a number": (["--dim", "many"], "argument --dim: invalid int value: 'many'"),
    "too small": (["--dim", "0"], "dim: expected 1 <= number < 2147483648, found 0"),
    "too large": (
        ["--negatives", "100000"],
        "negatives: expected 1 <= number < 100000.0, found 100000",
    ),
    "a rate of one": (["--dropout", "1"], "dropout: expected 0 <= number < 1, found 1.0"),
    "negative": (
        ["--lambda-list", "-1"],
        "lambda_list: expected 0 <= number < 2147483648, found -1.0",
    ),
    "NaN": (["--l2", "nan"], "l2: expected 0 <= number < 2147483648, found nan"),
    "gamma's powers": (["--gamma", "50"], "gamma: expected 1 <= number < 50, found 50"),
    "gamma": (["--gamma", "0.5"], "gamma: expected 1 <= number < 50, found 0.5"),
    "beta": (["--beta", "identy"], "beta: expected identity, found identy"),
    "half a number": (["--beta", "1x"], "--beta: invalid number_or_word value: '1x'"),
    "a choice": (["--tokens", "sum"], "tokens: expected mean or concat, found sum"),
    "a preset": (["--preset", "netflix"], "invalid choice: 'netflix'"),
    "lists of nothing": (
        ["--list-pool", "0"],
        "list_pool: expected 1 <= number < 2147483648",
    ),
    "lists of other items": (
        ["--list-items", "best"],
        "list_items: expected top or random, found best",
    ),
    "lists from nobody": (
        ["--list-from", "student"],
        "list_from: expected joint or modal or both, found student",
    ),
    "a setting that was": (["--dim-student", "4"], "unrecognized arguments: --dim-student"),
    "a device": (["--device", "tpu"], "--device: expected auto or one of"),
    "an absent GPU": (["--device", "cuda:63"], "found cuda:63"),
    "a missing folder": (
        ["--data", "nowhere"],
        "nowhere: expected a dataset folder, found none",
    ),
    "nothing to resume": (["--resume"], "config.json: cannot be read"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_one_line_and_write_nothing(case, here, capsys):
    argv, message = BAD_ARGUMENTS[case]
    assert message in error_of(argv, capsys)
    assert not list(here.iterdir())


def test_modalities_of_the_embedded_data_are_refused(here, capsys):
    message = "--modalities: expected --data beside it, found none"
    assert message in error_of(["--modalities", "text", "--quick"], capsys)


def test_an_unknown_modality_is_refused(folder, here, capsys):
    assert "unknown modality 'smell'" in error_of(
        ["--data", str(folder), "--modalities", "smell"], capsys
    )


def test_an_existing_run_is_kept(here, capsys):
    assert main([*SHORT, "--quick"]) == 0
    before = (here / "runs/synthetic/metrics.json").read_bytes()
    assert "exists; expected a new folder, --resume or --force" in error_of(
        ["--quick"], capsys
    )
    assert (here / "runs/synthetic/metrics.json").read_bytes() == before
    (here / "runs/synthetic/mine.txt").write_text("keep")
    assert main([*ALONE, "--quick", "--force", "--student-only"]) == 0
    assert not (here / "runs/synthetic/teacher.pt").exists()
    assert (here / "runs/synthetic/mine.txt").read_text() == "keep"
    (here / "file").write_text("")
    assert "exists" in error_of(["--out", "file"], capsys)


def test_resuming_needs_the_same_run(here, capsys, monkeypatch):
    assert main([*SHORT, "--quick", "--out", "run"]) == 0
    assert main(["--out", "run", "--resume"]) == 0  # finished: the ladder again
    assert "PromptMM" in capsys.readouterr().out
    assert "expected dim = 8 to resume, found 16" in error_of(
        ["--out", "run", "--resume", "--dim", "16"], capsys
    )
    assert "expected dim = 8 to resume, found 32" in error_of(  # SHORT's own dim won
        ["--out", "run", "--resume", "--preset", "synthetic"], capsys
    )
    assert main([*SHORT, "--out", "run", "--resume", "--preset", "synthetic"]) == 0
    monkeypatch.setattr(torch, "get_num_threads", lambda: 63)
    assert "expected threads = 1 to resume, found 63" in error_of(
        ["--out", "run", "--resume"], capsys
    )
    stored = json.loads((here / "run/config.json").read_text())
    del stored["digest"]
    data.write(here / "run/config.json", {**stored, "fingerprint": None})
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert "expected fingerprint = None to resume" in error_of(
        ["--out", "run", "--resume"], capsys
    )
    del stored["fingerprint"]
    data.write(here / "run/config.json", stored)
    assert "expected fingerprint = None to resume" in error_of(
        ["--out", "run", "--resume"], capsys
    )
    metrics = (here / "run/metrics.json").read_bytes()
    for content in ("{", "{}", "[]", "3"):
        (here / "run/config.json").write_text(content)
        assert "run/config.json: " in error_of(["--out", "run", "--resume"], capsys)
    assert (here / "run/metrics.json").read_bytes() == metrics


def test_resuming_from_damaged_files(here, capsys, monkeypatch):
    """Killed before the student's first step: LightGCN and the teacher are on disk."""
    true_student = promptmm.train_student

    def killed(run, stage, *teacher):
        if stage == "student":
            raise KeyboardInterrupt
        return true_student(run, stage, *teacher)

    with monkeypatch.context() as patch:
        patch.setattr(promptmm, "train_student", killed)
        assert main([*SHORT, "--out", "run"]) == 130
    for name in ("alone.pt", "teacher.pt", "state.pt"):
        whole = (here / "run" / name).read_bytes()
        (here / "run" / name).write_bytes(whole[:300])
        assert f"run/{name}: cannot be read" in error_of(
            ["--out", "run", "--resume"], capsys
        )
        (here / "run" / name).write_bytes(whole)
    assert main(["--out", "run", "--resume"]) == 0


@pytest.mark.parametrize("stage", ["alone", "teacher", "student"])
def test_interrupted_and_resumed_by_hand(stage, here, capsys, monkeypatch):
    """Ctrl-C in any stage: one line, status 130, and --resume alone finishes the job."""
    assert main([*SHORT, "--out", "whole"]) == 0
    epoch = promptmm.train_epoch
    calls, fit = [], promptmm.fit

    def stop_at_the_second(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return epoch(*arguments)

    def stopping(run, name, *rest, **named):
        if name == stage:
            patch.setattr(promptmm, "train_epoch", stop_at_the_second)
        return fit(run, name, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(promptmm, "fit", stopping)
        assert "--resume goes on" in error_of([*SHORT, "--out", "part"], capsys, status=130)
    assert main(["--out", "part", "--resume"]) == 0
    one, two = (
        json.loads((here / name / "metrics.json").read_text()) for name in ("whole", "part")
    )
    assert one["test"] == two["test"]
    assert one["weights"] == two["weights"]


def test_a_loss_that_explodes_is_named(here, capsys, monkeypatch):
    monkeypatch.setattr(promptmm, "l2_penalty", lambda *e: e[0].sum() * torch.nan)
    assert "l2 is not finite, from step 1" in error_of(SHORT, capsys, status=1)


def test_recommend_from_the_artefact_alone(here, tiny, capsys):
    assert main([*ALONE, "--quick", "--student-only", "--out", "run"]) == 0
    for file in (here / "run").iterdir():
        if file.name != "student.npz":
            file.unlink()
    capsys.readouterr()
    assert main(["recommend", "--run", "run", "--user", "7", "--k", "5"]) == 0
    found = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    with np.load("run/student.npz") as saved:
        scores = saved["item"] @ saved["user"][7]
    scores[tiny.train[7].indices] = -np.inf
    expected = np.argsort(-scores, kind="stable")[:5]
    assert [int(i) for i, _ in found] == expected.tolist()
    assert [float(s) for _, s in found] == pytest.approx(
        scores[expected].tolist(), abs=1e-4
    )
    ids = {
        "fingerprint": data.fingerprint(tiny, whole=False),
        "users": [f"user {u}" for u in range(60)],
        "items": [f"item {i}" for i in range(40)],
    }
    (here / "ids.json").write_text(json.dumps(ids))
    assert (
        main(
            [
                "recommend",
                "--run",
                "run",
                "--user",
                "user 7",
                "--k",
                "1",
                "--ids",
                "ids.json",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.startswith(f"item {expected[0]}\t")


def test_recommend_refusals(here, capsys):
    assert "student.npz" in error_of(["recommend", "--run", "no", "--user", "1"], capsys)
    assert main([*ALONE, "--quick", "--student-only", "--out", "run"]) == 0
    for argv in (
        ["--user", "60"],
        ["--user=-1"],
        ["--user", "ann"],
        ["--user", "1", "--k", "0"],
    ):
        assert "expected --user 0 … 59 (your own: --ids) and --k 1 or more" in error_of(
            ["recommend", "--run", "run", *argv], capsys
        )


def test_the_real_command_line(folder, tmp_path):
    """Once as a process: status, streams, and no traceback."""

    def command(*argv):
        return subprocess.run(
            [sys.executable, *argv],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    done = command(
        ROOT / "promptmm.py", "--data", folder, "--quick", *SHORT, "--out", "run"
    )
    assert (done.returncode, done.stdout.count("\n")) == (0, 7)
    assert (
        command(ROOT / "promptmm.py", "recommend", "--run", "run", "--user", "1").returncode
        == 0
    )
    broken = command(ROOT / "promptmm.py", "--data", tmp_path / "nowhere")
    assert (broken.returncode, broken.stdout, broken.stderr.count("\n")) == (2, "", 1)
    assert command(ROOT / "data.py", "describe", folder).returncode == 0
    assert command(ROOT / "data.py", "describe", tmp_path).returncode == 2

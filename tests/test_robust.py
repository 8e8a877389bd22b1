"""What goes wrong outside the code: damage, full disks, signals, pipes, flags."""

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHORT, TINY

import data
import experiments.__main__ as experiments_main
import experiments.lab as laboratory
import promptmm
from data import DataError
from experiments import publish
from experiments.__main__ import PARTS, perform
from experiments.lab import Job, Lab, compare, judge, learn, log_of
from promptmm import Config, main

ROOT = Path(promptmm.__file__).parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
QUICK = ["--quick", "--dim", "4"]


def call(argv, command=main) -> tuple[int, str, str]:
    """Status, stdout, stderr of a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = command([str(word) for word in argv])
    return status, out.getvalue(), err.getvalue()


def refusal(argv, command=main, status=2) -> str:
    """The one line of a command that must fail."""
    found, out, err = call(argv, command)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (found, len(lines), out) == (status, 1, ""), err
    assert "Traceback" not in err
    return lines[0]


@pytest.fixture(scope="module")
def shop():
    return data.synthetic(**TINY)


@pytest.fixture(scope="module")
def made(tmp_path_factory, shop):
    """`whole`: a finished run. `part`: the same, interrupted in its last stage."""
    folder = tmp_path_factory.mktemp("made")
    epoch, calls = promptmm.train_epoch, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return epoch(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "synthetic", lambda: shop)
        patch.setattr(promptmm, "line_search", lambda *_: [0.5, 0.25])
        assert call([*SHORT, "--out", folder / "whole"])[0] == 0
        patch.setattr(promptmm, "train_epoch", stopping)
        assert call([*SHORT, "--out", folder / "part"])[0] == 130
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, shop, made):
    """A working folder with copies of both runs, on the small embedded data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "synthetic", lambda: shop)
    monkeypatch.setattr(promptmm, "line_search", lambda *_: [0.5, 0.25])
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def figures(folder: Path) -> tuple:
    """All that a run found, but its clock."""
    metrics = data.read_json(folder / "metrics.json", sealed=True)
    arrays = data.read_arrays(folder / "student.npz")
    return {**metrics, "seconds": 0}, {name: x.tobytes() for name, x in arrays.items()}


def flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


# ------------------------------------------------------------ 5: files of a run

DAMAGE = {
    "empty": lambda whole: b"",
    "cut": lambda whole: whole[: len(whole) // 2],
    "binary": lambda whole: bytes(range(256)),
    "longer": lambda whole: whole + b"\n",
    "without a digest": lambda whole: whole[:-10],
}
RUN = ("config.json", "state.pt", "alone.pt", "teacher.pt", "metrics.json")


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", RUN)
def test_a_damaged_file_of_a_run_is_named(name, how, here):
    run = here / ("whole" if name == "metrics.json" else "part")
    before = {f.name: f.read_bytes() for f in run.iterdir()}
    (run / name).write_bytes(DAMAGE[how](before[name]))
    assert f"{run.name}/{name}: cannot be read" in refusal(["--out", run.name, "--resume"])
    (run / name).write_bytes(before[name])
    assert {f.name for f in run.iterdir()} == set(before)
    assert call(["--out", run.name, "--resume"])[0] == 0
    assert figures(run) == figures(here / "whole")


@pytest.mark.parametrize("value", ["8", None, True, [8], {}, 8.5, float("nan"), 2**63])
def test_settings_are_of_their_type(value, here):
    """Typed values, out of a file whose digest is right, for one field of each type."""
    stored = data.read_json(here / "part/config.json", sealed=True)
    with pytest.raises(DataError, match="dim: expected"):
        Config(dim=value)
    for name in ("tokens", "tune_prompt", "beta", "l2"):
        accepted = (name, type(value)) in {
            ("tune_prompt", bool),
            ("beta", float),
            ("l2", float),
        }
        if not accepted or value != value:
            with pytest.raises(DataError, match=f"^{name}: expected"):
                Config(**{name: value})
    if value == value:  # a NaN is not written
        data.write(here / "part/config.json", {**stored, "dim": value})
        assert "dim: expected" in refusal(["--out", "part", "--resume"])
    assert Config(l2=1, beta=1).l2 == 1


def test_files_of_another_width_are_named(here):
    assert call([*SHORT, "--dim", "4", "--epochs", "1", "--out", "narrow"])[0] == 0
    whole = {name: (here / "part" / name).read_bytes() for name in RUN[:-1]}
    narrow = data.read_torch(here / "narrow/teacher.pt", torch.device("cpu"))
    state = data.read_torch(here / "part/state.pt", torch.device("cpu"))
    for name, content in {
        "teacher.pt": narrow,
        "alone.pt": narrow,
        "state.pt": {**state, "learner": narrow},
    }.items():
        data.write(here / "part" / name, lambda s, what=content: torch.save(what, s))
        assert f"part/{name}: cannot be read" in refusal(["--out", "part", "--resume"])
        (here / "part" / name).write_bytes(whole[name])


def test_flipped_bits_of_a_run_are_never_silent(here):
    """A sample; each is refused by name, or leads to the same figures bit for bit."""
    rng = random.Random(0)
    for name in sorted(f.name for f in (here / "part").iterdir()):
        for _ in range(3):
            shutil.copytree(here / "part", here / "copy")
            flip(here / "copy" / name, rng)
            status, _, err = call(["--out", "copy", "--resume"])
            if status:
                assert status == 2
                assert f"copy/{name}: cannot be read" in err
            else:
                assert name == "log.csv"  # written, never read
                assert figures(here / "copy") == figures(here / "whole")
            shutil.rmtree(here / "copy")


def test_sealed_files_stay_readable_by_others(here):
    with np.load(here / "whole/student.npz") as stored:
        assert stored["user"].shape == (60, 8)
    assert "user" in torch.load(here / "whole/teacher.pt", weights_only=True)
    assert "test" in json.loads((here / "whole/metrics.json").read_text())


# ------------------------------------------------------------ 6: --force


def test_force_takes_no_folder_that_never_was_a_run(here):
    for name in ("metrics.json", "log.csv"):
        (here / "mine").mkdir(exist_ok=True)
        (here / "mine" / name).write_text("mine")
    message = "mine: expected a run to replace"
    assert message in refusal([*QUICK, "--out", "mine", "--force"])
    (here / "mine/config.json").write_text("{}")
    assert message in refusal([*QUICK, "--out", "mine", "--force"])
    assert (here / "mine/log.csv").read_text() == "mine"


def test_the_folder_of_the_dataset_is_refused(here, shop):
    data.save(shop, here / "shop")
    shutil.copy(here / "whole/config.json", here / "shop")
    (here / "shop/log.csv").write_text("mine")
    where = ["--data", "shop", "--out", "./shop", "--force"]
    assert "the dataset's own folder" in refusal([*QUICK, *where])
    assert (here / "shop/log.csv").read_text() == "mine"


def test_force_keeps_the_old_run_while_nothing_can_be_written(here, monkeypatch):
    before = {f.name: f.read_bytes() for f in (here / "whole").iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert "No space left" in refusal([*QUICK, "--out", "whole", "--force"])
    assert {f.name: f.read_bytes() for f in (here / "whole").iterdir()} == before
    assert call([*QUICK, "--student-only", "--out", "whole", "--force"])[0] == 0
    assert not (here / "whole/teacher.pt").exists()


def test_a_folder_with_a_killed_runs_draft_alone_is_a_new_one(here):
    (here / "new").mkdir()
    (here / "new/config.tmp.1.tmp").write_text("{")
    assert call([*QUICK, "--student-only", "--out", "new"])[0] == 0
    assert not list((here / "new").glob("*.tmp"))


# ------------------------------------------------------------ 7: signals and pipes


def test_what_a_kill_after_the_metrics_leaves_is_removed(here):
    for name in ("alone.pt", "student.pt", "state.pt", "config.json.1.tmp"):
        (here / "whole" / name).write_text("left")
    assert call(["--out", "whole", "--resume"])[0] == 0
    left = {f.name for f in (here / "whole").iterdir()}
    assert left == {*promptmm.RUN_FILES, "config.json"} - {"prompt.pt"}


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_signals_end_in_one_line_and_a_run_goes_on(number, status, here, monkeypatch):
    """Sent at the first validation; afterwards the handler is the former one."""
    former, judged = signal.getsignal(signal.SIGTERM), promptmm.evaluate
    # A shell's background job starts with Ctrl-C ignored.
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        patch.setattr(promptmm, "evaluate", lambda *_, **__: os.kill(os.getpid(), number))
        found, out, err = call([*SHORT, "--out", "stopped"])
    signal.signal(signal.SIGINT, outside)
    assert (found, out) == (status, "")
    expected = "interrupted; --resume goes on after the last whole epoch\n"
    assert err.endswith(expected)
    assert err.count("interrupted") == 1
    assert signal.getsignal(signal.SIGTERM) is former
    assert promptmm.evaluate is judged
    assert call(["--out", "stopped", "--resume"])[0] == 0
    assert figures(here / "stopped") == figures(here / "whole")


STREAMS = """
import os, sys, data
reader, gone = os.pipe()
os.close(reader)
said, full = os.dup(1), os.open("/dev/full", os.O_WRONLY)
for out, holds in ((gone, True), (full, True), (said, False)):
    child = os.fork()
    if not child:
        os.dup2(out, 1)
        command = lambda _: data.need(print("é") or holds, "≤")
        sys.exit(data.guarded(command, [], ""))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.write(said, b"status %d\\n" % status)
"""


def test_streams_that_take_nothing_or_lack_a_letter():
    """`| head`, `> /dev/full`, and an encoding that lacks a letter: to the very end."""
    found = subprocess.run(
        [sys.executable, "-c", STREAMS],
        env={**ENV, "PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert found.stdout.splitlines() == [
        "status 141",
        "error: [Errno 28] No space left on device",
        "status 2",
        "\\xe9",
        "error: \\u2264",
        "status 2",
    ]


# ------------------------------------------------------------ 8: flags

FLAGS = {
    "--resume --force": "expected --resume or --force, found both",
    "--student-only --warm-start": "expected no setting of a teacher, found warm_start",
    "--student-only --lambda-list 1": "found lambda_list",
    "--student-only --lambda-prompt 1": "found lambda_prompt",
    "--student-only --alpha 1 --tokens mean": "found alpha, tokens",
    "--student-only --no-tune-prompt": "found tune_prompt",
    "--data|": "expected a value after --data, found none",
    "--data=": "expected a value after --data=, found none",
    "--out|": "expected a value after --out, found none",
    "--temperature 1e300": "temperature: expected",
    "--batch 9223372036854775808": "batch: expected",
    "--l2 1e39": "l2: expected",
    "--dim 2000000000": "expected more memory, or a smaller model",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_that_cannot_be_are_refused(flags, here):
    words = [w for part in flags.split() for w in part.split("|")]
    where = [] if "--out" in flags else ["--out", "new"]
    assert FLAGS[flags] in refusal([*words, *where])
    kept = {f.name for f in here.iterdir()}
    if "--dim" not in flags:
        assert kept == {"whole", "part"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bench", "--threads", "-1"], "expected --threads 0 to 1024, found -1"),
        (["table3", "--data", ""], "expected a value after --data, found none"),
    ],
)
def test_flags_of_the_experiments(argv, message):
    assert message in refusal(argv, experiments_main.main)


def test_the_unforeseen_is_one_line_and_a_flag_shows_where(here, monkeypatch):
    def broken(*_, **__):
        raise KeyError("two\nlines")

    for module, target, argv in (
        (promptmm, "pipeline", ["--out", "new"]),
        (data, "load", ["describe", "new"]),
        (experiments_main, "laboratory", ["table3"]),
    ):
        command = module.main
        with monkeypatch.context() as patch:
            patch.setattr(module, target, broken)
            line = refusal(argv, command, status=1)
            assert line.startswith("error: unexpected: KeyError: ")
            assert "--traceback shows where" in line
            shutil.rmtree(here / "new", ignore_errors=True)
            status, _, err = call([*argv, "--traceback"], command)
        assert status == 1
        assert "in broken" in err


# ------------------------------------------------------------ 9: experiments


@pytest.fixture
def lab(tmp_path, shop, monkeypatch):
    monkeypatch.setattr(laboratory, "ROOT", tmp_path)
    device = torch.device("cpu")
    return Lab(shop, "", device, 1, True, tmp_path / "results")


@pytest.mark.parametrize("how", ["empty", "binary", "bit"])
@pytest.mark.parametrize(
    "name", ["test.npz", "embeddings.npz", "log.csv", "trained.json", "model.pt"]
)
def test_a_damaged_file_of_the_cache_is_named(name, how, lab):
    config = laboratory.settings(lab, "LightGCN")
    folder = learn(lab, "LightGCN", config)
    judge(lab, "LightGCN", config)
    file = next(folder.glob("test-*.npz")) if name == "test.npz" else folder / name
    if how == "bit":
        flip(file, random.Random(0))
    else:
        file.write_bytes(DAMAGE[how](file.read_bytes()))
    uses = {
        "test.npz": lambda: judge(lab, "LightGCN", config),
        "embeddings.npz": lambda: judge(lab, "LightGCN", config, split="val"),
        "log.csv": lambda: log_of(folder),
        "trained.json": lambda: publish.trained(lab),
        "model.pt": lambda: laboratory.trained_pair(
            lab,
            promptmm.Run(folder, lab.dataset, config, lab.device, {}),
            Job("LightGCN", config),
        ),
    }
    with pytest.raises(DataError, match=f"{file.name}: cannot be read"):
        uses[name]()


@pytest.mark.parametrize("how", ["empty", "binary", "result"])
def test_a_part_is_finished_only_with_its_result(how, lab, capsys):
    perform(lab, PARTS["table3"], False)
    result = lab.out / "synthetic/table3.md"
    first = result.read_text()
    [stamp] = lab.cache.rglob("*.done")
    if how == "result":
        result.write_text("")
    else:
        stamp.write_bytes(DAMAGE[how](stamp.read_bytes()))
    capsys.readouterr()
    perform(lab, PARTS["table3"], False)
    assert "finished before" not in capsys.readouterr().out
    assert result.read_text().split("·")[0] == first.split("·")[0]
    perform(lab, PARTS["table3"], False)
    assert "finished before" in capsys.readouterr().out


def test_recall_of_zero_is_strict_json(lab, monkeypatch):
    """A reference that finds nothing: no gain over it, and no NaN in the file."""
    zero = {metric: np.zeros(9) for metric in laboratory.SHOWN}
    monkeypatch.setattr(laboratory, "judge", lambda *_: zero)
    job = Job("MostPop", Config())
    rows = compare(lab, "nothing", {"one": job, "two": job}, 1, "one")
    assert rows[1]["gain"]["recall@20"] is None
    text = publish.as_json({"rows": rows, "loss": float("nan"), "most": np.inf})
    found = json.loads(text, parse_constant=pytest.fail)
    assert found["loss"] is found["most"] is None
    assert "| two |" in publish.ranking_table(rows, "one")


def test_drafts_of_a_killed_process_are_swept(lab):
    folder = lab.folder("LightGCN", laboratory.settings(lab, "LightGCN"))
    folder.mkdir(parents=True)
    (folder / "embeddings.npz.1.tmp").write_text("left")
    learn(lab, "LightGCN", laboratory.settings(lab, "LightGCN"))
    assert not list(folder.glob("*.tmp"))
    assert not (folder / "state.pt").exists()


# ------------------------------------------------------------ 10: recommend


@pytest.fixture
def named(here, shop):
    """ids.json of the run's own data, as `data.py convert` writes it."""
    ids = {"users": [f"u{u}" for u in range(60)], "items": [f"i{i}" for i in range(40)]}
    data.save(shop, here / "shop", ids)
    return here / "shop/ids.json"


ASK = ["recommend", "--run", "whole", "--ids", "ids.json", "--user", "u7"]
CHANGES = {
    "another shop's": {"fingerprint": "0" * 32},
    "no fingerprint": {"fingerprint": None},
    "users as an object": {"users": {"u7": 1}},
    "users as text": {"users": "u" * 60},
    "users as numbers": {"users": list(range(60))},
    "users that are few": {"users": ["u7"]},
    "no users": {"users": []},
    "items as null": {"items": None},
    "items as lists": {"items": [["i"]] * 40},
    "items that are many": {"items": ["i"] * 41},
    "items, one a number": {"items": ["i"] * 39 + [1]},
}


def test_recommend_gives_names(named, here):
    shutil.copy(named, here)
    status, out, _ = call(ASK)
    assert status == 0
    assert out.startswith("i")


@pytest.mark.parametrize("case", CHANGES)
def test_ids_that_are_not_the_runs_are_refused(case, named, here):
    content = json.loads(named.read_text()) | CHANGES[case]
    (here / "ids.json").write_text(json.dumps(content))
    assert "ids.json: expected" in refusal(ASK)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", "\x00\x01"])
def test_ids_that_are_no_ids_are_refused(text, here):
    (here / "ids.json").write_text(text)
    assert "ids.json: " in refusal(ASK)


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_student_is_named(how, here):
    file = here / "whole/student.npz"
    file.write_bytes(DAMAGE[how](file.read_bytes()))
    ask = ["recommend", "--run", "whole", "--user", "7"]
    assert "whole/student.npz: cannot be read" in refusal(ask)


# ------------------------------------------------------------ in a process of its own


def forked(argv: list[str], bytes_a_file: int = resource.RLIM_INFINITY) -> int:
    """A command in a fork of this process, its stderr in the file `err`; returns its id.

    With a limit no file grows further, as on a disk that is full.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has threads, which wait for nothing here
        process = os.fork()
    if process:
        return process
    status = 1
    try:
        with open("err", "w") as err, contextlib.redirect_stderr(err):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file,) * 2)
            with contextlib.redirect_stdout(io.StringIO()):
                status = main(argv)
    finally:
        os._exit(status)


def ended(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.mark.parametrize("limit", [0, 500, 6000, 20_000])
def test_a_full_disk_is_one_line_and_the_run_goes_on(limit, here):
    """No room for the settings; for half of them; for these alone; for LightGCN alone."""
    before = figures(here / "whole")
    assert ended(forked([*SHORT, "--out", "full"], limit)) == 2
    errors = [line for line in (here / "err").read_text().splitlines() if "error" in line]
    assert len(errors) == (limit > 0)  # with no room at all, not even for this line
    assert all("File too large: 'full/" in line for line in errors)
    assert not list(here.glob("full/*.tmp"))
    begun = (here / "full/config.json").exists()
    assert begun == (limit > 500)
    if not begun:
        assert ended(forked([*SHORT, "--out", "whole", "--force"], limit)) == 2
        assert figures(here / "whole") == before
    assert call([*SHORT, "--out", "full", *["--resume"] * begun])[0] == 0
    assert figures(here / "full") == before


@pytest.mark.parametrize("name", ["config.json", "alone.pt", "student.npz", "metrics.json"])
def test_sigkill_as_a_file_appears_is_resumed_to_the_same_figures(name, here):
    process = forked([*SHORT, "--out", "killed"])
    while not (here / "killed" / name).exists():
        time.sleep(0.0005)
    os.kill(process, signal.SIGKILL)
    assert ended(process) in (0, -signal.SIGKILL)
    assert call(["--out", "killed", "--resume"])[0] == 0
    assert figures(here / "killed") == figures(here / "whole")
    names = [{f.name for f in (here / run).iterdir()} for run in ("killed", "whole")]
    assert names[0] == names[1]


@pytest.mark.parametrize("flag", ["--data", "--out"])
def test_a_loop_of_links_is_one_line(flag, here):
    """Whatever it is given for: named, status 2, and no traceback."""
    (here / "loop").symlink_to("loop")
    status, out, err = call([flag, str(here / "loop"), "--quick"])
    assert (status, out) == (2, "")
    [line] = [one for one in err.splitlines() if one.startswith("error: ")]
    assert "loop" in line and "unexpected" not in line

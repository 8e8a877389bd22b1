"""The lessons: what they print is what they store, and what they say of it holds.

Words must agree; numbers to the distance that the lesson's docstring states. For other
seeds: `python -m lessons --seeds 3`.
"""

import ast
import importlib
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import sparse

import losses
import promptmm
from evaluate import paired_test
from lessons import common, hints
from lessons.__main__ import main as lessons_main

ROOT = Path(promptmm.__file__).parent
NAMES = [file.stem for file in sorted((ROOT / "lessons").glob("[0-9]_*.py"))]


def lesson(name: str) -> dict:
    return vars(importlib.import_module(f"lessons.{name}"))


NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?%?")


def stored(doc: str) -> tuple[str, float, float]:
    """The output that a docstring keeps, and how far numbers and percentages may move."""
    _, head, block = re.split(r"^(The output.*):\n", doc, maxsplit=1, flags=re.M)
    within = [float(number) for number in re.findall(r"± ([\d.]+)", head)]
    return textwrap.dedent(block).strip("\n").rstrip(), within[0], within[-1]


def differences(kept: str, printed: str, within: float, percent: float) -> list[str]:
    """What differs: words, whole numbers at all, others by more than they may."""
    words = [NUMBER.sub("#", text).split() for text in (kept, printed)]
    if words[0] != words[1]:
        return [f"words: {words}"]
    pairs = zip(NUMBER.findall(kept), NUMBER.findall(printed), strict=True)
    return [f"{a}, now {b}" for a, b in pairs if not close(a, b, within, percent)]


def close(a: str, b: str, within: float, percent: float) -> bool:
    if a.endswith("%") and b.endswith("%"):
        return abs(float(a[:-1]) - float(b[:-1])) <= percent
    if "." in a and "." in b:
        return abs(float(a) - float(b)) <= within + 1e-9
    return a == b


@pytest.mark.parametrize("name", NAMES)
def test_it_prints_what_it_stores(name):
    one = lesson(name)
    kept, *within = stored(one["__doc__"])
    found = one["measure"](seed=0)
    assert not differences(kept, one["show"](found), *within)
    assert one["claim"](found)


@pytest.mark.parametrize("name", NAMES)
def test_it_has_the_form(name):
    """At most 120 lines, in the order of a lesson; the function to write is checked."""
    file = ROOT / "lessons" / f"{name}.py"
    source = file.read_text()
    assert len(source.splitlines()) <= 120
    parts = ["Paper: ", "What do you expect?", "The output", "# %%", "def measure"]
    parts += ["What it means: ", "What it does not show: ", "Your turn: ", "Next: "]
    places = [source.find(part) for part in parts]
    assert -1 not in places and places == sorted(places)
    assert callable(getattr(hints, lesson(name)["YOURS"]))
    assert f"python -m lessons.{name} --check" in source


def test_there_are_eight_and_the_pages_have_them():
    assert [name[0] for name in NAMES] == list("12345678")
    for page in "README.md", "lessons/README.md":
        text = (ROOT / page).read_text()
        assert all(name in text for name in NAMES), page


@pytest.mark.parametrize("name", ["3_pairs", "5_graph"])
def test_quick_is_the_same_in_fewer_steps(name, capsys):
    one = lesson(name)
    assert common.run(one, ["--quick"]) == 0
    printed = capsys.readouterr().out
    kept = stored(one["__doc__"])[0]
    labels = [re.split(r" {2,}", line)[0] for line in kept.splitlines()]
    assert all(label in printed for label in labels) and "--quick" in printed


def test_another_number_or_word_is_seen():
    kept = "LightGCN   0.223   41,600   36%"
    assert not differences(kept, "LightGCN 0.241 41,600 60%", 0.02, 30)
    assert differences(kept, "LightGCN 0.252 41,600 36%", 0.02, 30)
    assert differences(kept, "LightGCN 0.223 41,601 36%", 0.02, 30)
    assert differences(kept, "LightGCN 0.223 41,600 70%", 0.02, 30)
    assert differences(kept, "Teacher 0.223 41,600 36%", 0.02, 30)


# ------------------------------------------------------------ your turn


def blind(x, rng):
    return x[rng.permutation(len(x))]


def shuffled_entries(x, rng):
    return rng.permuted(x, axis=0)


def shuffled_columns(x, rng):
    return x[:, rng.permutation(x.shape[1])]


def half_blind(x, rng):
    x[: len(x) // 2] = rng.permutation(x[: len(x) // 2])
    return x


def naive(logits):
    e = logits.exp()
    b = torch.stack([e[:, 0], e[:, 1:].sum(1)], 1) / e.sum(1, keepdim=True)
    return b.log(), (e[:, 1:] / e[:, 1:].sum(1, keepdim=True)).log()


def whole_softmax(logits):
    return losses.disentangle(logits)[0], logits.log_softmax(1)[:, 1:]


def summed_scores(logits):
    two = torch.stack([logits[:, 0], logits[:, 1:].sum(1)], 1).log_softmax(1)
    return two, losses.disentangle(logits)[1]


def probabilities(logits):
    return tuple(part.exp() for part in losses.disentangle(logits))


def better_only(student, teacher):
    t = teacher.sigmoid()
    return (t * (F.logsigmoid(teacher) - F.logsigmoid(student))).mean()


def worse_only(student, teacher):
    return better_only(-student, -teacher)


def probabilities_as_printed(student, teacher):
    t, s = teacher.sigmoid(), student.sigmoid()
    return -(t * (t / s).log()).mean()


def reversed_kl(student, teacher):
    return losses.pair_kd(teacher, student)


def minus(student, teacher):
    return -losses.pair_kd(student, teacher)


def absorb(x, basis, theta, shift, w, b, lam):
    p = x @ basis @ theta + shift
    p_m = p @ (p.T @ x)
    s = x.norm() / p_m.norm()
    content = lam * s * (p.T @ x) @ w
    return w + basis @ theta @ content, b + shift @ content


def nothing_absorbed(x, basis, theta, shift, w, b, lam):
    return w, b


def no_shift(x, basis, theta, shift, w, b, lam):
    return absorb(x, basis, theta, shift, w, b, lam)[0], b


def no_lambda(x, basis, theta, shift, w, b, lam):
    return absorb(x, basis, theta, shift, w, b, 1.0)


def no_scale(x, basis, theta, shift, w, b, lam):
    content = lam * ((x @ basis @ theta + shift).T @ x) @ w
    return w + basis @ theta @ content, b + shift @ content


def no_w(x, basis, theta, shift, w, b, lam):
    more = absorb(x, basis, theta, shift, w, b, lam)
    return more[0] - w, more[1]


def beside(train):
    return sparse.bmat([[None, train], [train.T, None]], format="csr")


def released(train):
    return sparse.block_diag([train, train.T], format="csr")


def mean_rows(train):
    nodes = beside(train)
    return sparse.diags(1 / np.maximum(np.diff(nodes.indptr), 1)) @ nodes


def items_first(train):
    return promptmm.adjacency(train.T.tocsr())


def infinite(train):
    nodes = beside(train).toarray()
    with np.errstate(divide="ignore", invalid="ignore"):
        return nodes / np.sqrt(np.outer(nodes.sum(0), nodes.sum(1)))


def p_value(a, b, rng):
    gap = a - b
    means = gap[rng.integers(len(gap), size=(2000, len(gap)))].mean(1)
    return min(1.0, 2 * min((means <= 0).mean(), (means >= 0).mean()))


def the_core(a, b, rng):
    return paired_test(a, b, draws=3000, seed=1)["p_bootstrap"]


def one_sided(a, b, rng):
    return p_value(a, b, rng) / 2


def unpaired(a, b, rng):
    draw = lambda x: x[rng.integers(len(x), size=(2000, len(x)))].mean(1)  # noqa: E731
    means = draw(a) - draw(b)
    return min(1.0, 2 * min((means <= 0).mean(), (means >= 0).mean()))


def too_narrow(a, b, rng):
    gap = a - b
    means = gap[rng.integers(len(gap), size=(2000, len(gap)))].mean(1)
    means = gap.mean() + (means - gap.mean()) / np.sqrt(len(gap))
    return min(1.0, 2 * min((means <= 0).mean(), (means >= 0).mean()))


def difference(a, b, rng):
    return 100 * (a.mean() - b.mean())


def leaks(table):
    return max(table, key=lambda name: table[name]["never"])


def best_on_the_head(table):
    return max(table, key=lambda name: table[name]["> 10"])


def best_of_all(table):
    return max(table, key=lambda name: table[name]["all"])


def best_of_the_rare(table):
    return max(table, key=lambda name: table[name]["1-10"])


def worst_on_the_head(table):
    return min(table, key=lambda name: table[name]["> 10"])


def first(table):
    return next(iter(table))


def a_row(table):
    return 0


def alike(logits, taught, own, told):
    """Cosines of pairs of items."""
    own, told = (F.normalize(part, dim=1) for part in (own, told))
    return F.mse_loss(own @ own.T, told @ told.T)


def printed(logits, taught, own, told):
    return (-F.logsigmoid(logits[:, 0] - logits[:, 1])).mean()


def a_vector(logits, taught, own, told):
    return (logits - taught).square().mean(1)


def detached(logits, taught, own, told):
    return F.mse_loss(logits.detach(), taught)


def away(logits, taught, own, told):
    return -F.mse_loss(logits, taught)


RIGHT = {
    "1_ladder": [blind, lambda x, rng: rng.permutation(x).astype(float)],
    "2_lists": [losses.disentangle],
    "3_pairs": [losses.pair_kd],
    "4_prompt": [absorb],
    "5_graph": [promptmm.adjacency],
    "6_noise": [the_core, p_value],
    "7_content": [leaks],
    "8_four_ways": [alike, *lesson("8_four_ways")["WAYS"].values()],
}
WRONG = {
    "1_ladder": {
        shuffled_columns: "as near to each other",
        shuffled_entries: "no longer rows",
        half_blind: "kept their own",
        (lambda x, rng: 0 * x): "No content at all",
        (lambda x, rng: rng.standard_normal(x.shape)): "no longer rows",
        (lambda x, rng: None): "same shape",
    },
    "2_lists": {
        whole_softmax: "Eq. 7",
        summed_scores: "Eq. 6",
        probabilities: "logarithms",
        naive: "overflows",
        (lambda logits: (logits, logits)): "Shapes",
    },
    "3_pairs": {
        lesson("3_pairs")["broken"]: "raises the margins",
        lesson("3_pairs")["printed"]: "lowers the margins",
        minus: "below zero",
        better_only: "raises the margins",
        worse_only: "are both sides there",
        probabilities_as_printed: "has each a plus",
        reversed_kl: "KL(s || t)",
        (lambda s, t: (s - t).square()): "one number",
    },
    "4_prompt": {
        nothing_absorbed: "the prompt is not in it",
        no_shift: "b* is not",
        no_lambda: "factor of 3.33",
        no_scale: "the norm of p (p.T @ x)",
        no_w: "Off by",
    },
    "5_graph": {
        released: "Users read users",
        infinite: "no neighbours",
        beside: "values are not",
        mean_rows: "not symmetric",
        items_first: "not the users'",
    },
    "6_noise": {
        one_sided: "One side only",
        unpaired: "Too large",
        too_narrow: "Too small",
        difference: "between 0 and 1",
    },
    "7_content": {
        best_on_the_head: "training edges alone",
        best_of_all: "training edges alone",
        best_of_the_rare: "training edges alone",
        first: "In table",
        worst_on_the_head: "is content",
        a_row: "one of the table's names",
    },
    "8_four_ways": {
        printed: "pulls where",
        a_vector: "one number",
        detached: "No gradient",
        away: "not lower where",
        (lambda logits, *_: 0 * logits.sum()): "not lower where",
        (lambda logits, *_: 3 + 0 * logits.sum()): "not lower where",
        (lambda logits, *_: np.nan * logits.sum()): "not lower where",
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_a_right_answer_passes(name):
    for function in RIGHT[name]:
        assert common.judge(lesson(name)["YOURS"], function) == ""


@pytest.mark.parametrize("name", NAMES)
def test_each_wrong_answer_gets_its_own_hint(name):
    found = {f: common.judge(lesson(name)["YOURS"], f) for f in WRONG[name]}
    for function, hint in WRONG[name].items():
        assert hint in found[function], (function, found[function])
    assert len(set(found.values())) >= 3


def test_the_stub_is_not_an_answer():
    for name in NAMES:
        yours = lesson(name).get(lesson(name)["YOURS"])
        if yours is not None and not hasattr(losses, yours.__name__):
            if not hasattr(promptmm, yours.__name__):
                assert common.judge(yours.__name__, yours), name


MINE = "import losses\ndef disentangle(logits): return losses.disentangle(logits)"


@pytest.mark.parametrize("name", NAMES)
def test_a_lesson_as_it_stands_is_not_an_answer(name):
    """Its function is a stub, or the core's, which the lesson imports."""
    file = str(ROOT / "lessons" / f"{name}.py")
    assert common.hint(lesson(name), file)


@pytest.mark.parametrize(
    ("text", "status", "answer"),
    [
        (MINE, 0, "Right"),
        ("from losses import disentangle", 1, "the core's own disentangle"),
        ("def disentangle(logits): return logits.exp(), logits[:, 1:]", 1, "Shapes"),
        ("def disentangle(logits): ...", 1, "Not yet. It does not give what is asked"),
        ("other = 1", 1, "defines no function disentangle"),
    ],
)
def test_the_command_checks_a_file(text, status, answer, tmp_path, capsys):
    mine = tmp_path / "mine.py"
    mine.write_text(text)
    assert common.run(lesson("2_lists"), ["--check", str(mine)]) == status
    assert answer in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--check", "nofile.py"], "--check: expected a file, found none at nofile.py"),
        (["--seed", "-1"], "--seed: expected 0 or more, found -1"),
    ],
)
def test_a_wrong_flag_is_refused(flags, expected, capsys):
    with pytest.raises(SystemExit) as ended:
        common.run(lesson("2_lists"), flags)
    assert ended.value.code == 2 and expected in capsys.readouterr().err


def test_an_unknown_lesson_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lessons", "9_more"])
    with pytest.raises(SystemExit) as ended:
        lessons_main()
    assert (
        ended.value.code == 2
        and "expected lessons among 1_ladder" in capsys.readouterr().err
    )


def test_it_runs_as_a_module(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text(MINE)
    command = [sys.executable, "-m", "lessons.2_lists", "--check", str(mine)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Right" in done.stdout, done


def test_nothing_but_a_lessons_own_names_is_shared():
    """No lesson imports another; each can be read alone."""
    for name in NAMES:
        tree = ast.parse((ROOT / "lessons" / f"{name}.py").read_text())
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        shared = [n.names[0].name for n in nodes if n.module == "lessons"]
        assert shared == ["common"]


def test_a_right_answer_of_another_rounding_is_right():
    def disentangle(logits):
        log_pi = logits.log_softmax(1)
        log_b = torch.stack([log_pi[:, 0], log_pi[:, 1:].logsumexp(1)], dim=1)
        return log_b, logits[:, 1:].log_softmax(1)

    assert common.judge("disentangle", disentangle) == ""

"""What is said about the code: README, equations, ids, and the rules of import and size."""

import ast
import doctest
import importlib
import inspect
import io
import re
import shlex
import subprocess
import sys
import tokenize
from pathlib import Path

import numpy as np
import pytest

import data
import promptmm
from experiments import publish

ROOT = Path(promptmm.__file__).parent
README = (ROOT / "README.md").read_text()
DATA_PAGE = (ROOT / "docs" / "data.md").read_text()
CORE = ("promptmm", "data", "losses", "evaluate")
PACKAGES = ("baselines", "distillers", "experiments", "lessons")
CODE = [ROOT / f"{name}.py" for name in CORE]
CODE += [file for name in PACKAGES for file in sorted((ROOT / name).glob("*.py"))]


DOCUMENTED = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in CODE
    if ">>> " in file.read_text()
]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_doctests(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.failed == 0
    assert found.attempted > 0
    assert set(CORE) <= set(DOCUMENTED)


# ------------------------------------------------------------ equations and ids


def equation_rows() -> list[tuple[list[str], list[str]]]:
    rows = re.findall(r"^\| (Eq\. .*?) \| .*? \| (.*?) \|$", README, re.M)
    return [
        (re.findall(r"Eq\. \d+", left), re.findall(r"`([\w.]+)`", right))
        for left, right in rows
    ]


def cited_equations(path: str) -> set[str]:
    module, *names = path.split(".")
    target = importlib.import_module(module)
    for name in names:
        target = getattr(target, name)
    groups = re.findall(r"Eq\. (\d+(?:(?:-|, )\d+)*)", inspect.getsource(target))
    return {number for group in groups for number in re.findall(r"\d+", group)}


def test_every_equation_has_its_place():
    """Each of the 16 in the table, and each named function cites it."""
    seen = set()
    for equations, functions in equation_rows():
        for equation in equations:
            seen.add(equation)
            for path in functions:
                number = equation.removeprefix("Eq. ")
                assert number in cited_equations(path), (equation, path)
    assert seen == {f"Eq. {n}" for n in range(1, 17)}


def test_every_id_can_be_looked_up():
    """A heading for each id: of the paper, its code, the neighbours, the other models."""
    page = (ROOT / "docs" / "differences.md").read_text()
    headings = re.findall(r"^### ([PCKRSB]\d+)\b", page, re.M)
    counts = {"P": 16, "C": 28, "K": 14, "R": 8, "S": 12, "B": 35}
    expected = [f"{kind}{n + 1}" for kind, count in counts.items() for n in range(count)]
    assert sorted(headings) == sorted(expected)
    for file in CODE:
        for group in re.findall(r"\b[Ee]rrata ([PC]\d+(?:,\s+[PC]\d+)*)", file.read_text()):
            assert set(re.findall(r"[PC]\d+", group)) <= set(headings), (file.name, group)
        if file.parent.name == "distillers":
            cited = set(re.findall(r"\b[KRS]\d+\b", file.read_text()))
            assert cited <= set(headings), (file.name, cited)
        if file.parent.name == "baselines":
            cited = set(re.findall(r"\bB\d+\b", file.read_text()))
            assert cited <= set(headings), (file.name, cited)


# ------------------------------------------------------------ who may import whom

CORE_AND_STDLIB = {"losses": set(), "data": set(), "evaluate": set()}
ALLOWED = {
    **CORE_AND_STDLIB,
    "promptmm": {"losses", "data", "evaluate"},
    "baselines": {*CORE, "baselines"},
    "distillers": {*CORE, "distillers"},
    "lessons": {*CORE, "lessons", "experiments.errata"},
    "experiments": {*CORE, "baselines", "distillers", "experiments"},
}
THIRD_PARTY = {"torch", "numpy", "scipy"}
EXTRA = {"matplotlib", "sklearn"}  # of [plot], in experiments and lessons alone


def imported(source: str) -> set[str]:
    """Every module that a source imports, by its full name."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{one.name}" for one in node.names}
    return names


def forbidden(owner: str, source: str) -> set[str]:
    """What a source of `owner` (a core module or a package) imports and must not."""
    allowed = ALLOWED[owner] | THIRD_PARTY
    allowed |= EXTRA if owner in ("experiments", "lessons") else set()
    wrong = set()
    for name in imported(source):
        parts = name.split(".")
        prefixes = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
        covers = any(
            one.startswith(f"{name}.") for one in allowed
        )  # from experiments import
        if (
            parts[0] not in sys.stdlib_module_names
            and not prefixes & allowed
            and not covers
        ):
            wrong.add(name)
    return wrong


def owner_of(file: Path) -> str:
    return file.stem if file.parent == ROOT else file.parent.name


def test_imports_go_one_way():
    for file in CODE:
        assert not forbidden(owner_of(file), file.read_text()), file
    assert {file.stem for file in ROOT.glob("*.py")} == set(CORE)


@pytest.mark.parametrize(
    ("owner", "line"),
    [
        ("losses", "import data"),
        ("evaluate", "from promptmm import Config"),
        ("data", "from evaluate import evaluate"),
        ("promptmm", "import experiments.lab"),
        ("promptmm", "from baselines import MODELS"),
        ("baselines", "from experiments.lab import Lab"),
        ("distillers", "import baselines"),
        ("experiments", "from lessons import ladder"),
        ("lessons", "from experiments.lab import Lab"),
        ("losses", "import pandas"),
        ("promptmm", "import matplotlib"),
    ],
)
def test_a_forbidden_import_is_seen(owner, line):
    """The rule above can fail: each of these, added to a source that passes, is named."""
    assert forbidden(owner, f"import json\nimport torch\n{line}\n")


def test_nothing_but_experiments_reads_results():
    for file in CODE:
        if file.parent.name != "experiments":
            reads = file.read_text().replace('parents[1] / "results" / "lessons"', "")
            assert '"results' not in reads, file  # lessons write their pictures there
            assert "tune.json" not in file.read_text(), file


# ------------------------------------------------------------ size


def documented(tree: ast.AST) -> list:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    return [n for n in ast.walk(tree) if isinstance(n, kinds) and ast.get_docstring(n)]


def count(tree: ast.AST) -> int:
    """Expressions and statements; a docstring, one of each, is free."""
    nodes = sum(isinstance(node, (ast.expr, ast.stmt)) for node in ast.walk(tree))
    return nodes - 2 * len(documented(tree))


def code_lines(source: str) -> set[int]:
    """Lines that hold code: no blanks, comments or docstrings."""
    strings = set()
    for node in documented(ast.parse(source)):
        first = node.body[0]
        strings |= set(range(first.lineno, first.end_lineno + 1))
    ignored = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE}
    ignored |= {tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in ignored:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return lines - strings


def statements(tree: ast.AST) -> list[tuple[int, ast.stmt]]:
    """Every simple statement, with the number of its expressions."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and not hasattr(node, "body"):
            found.append((sum(isinstance(x, ast.expr) for x in ast.walk(node)), node))
    return found


def is_literal(node: ast.stmt) -> bool:
    literal = (ast.Dict, ast.List, ast.Tuple, ast.Set)
    return isinstance(getattr(node, "value", None), literal)


def bindings(node: ast.stmt) -> int:
    """How many names one `=` binds to things that stand apart on its right side."""
    if not isinstance(node, ast.Assign):
        return 1
    several = max(len(t.elts) if isinstance(t, ast.Tuple) else 1 for t in node.targets)
    apart = isinstance(node.value, ast.Tuple) or len(node.targets) > 1
    return several * len(node.targets) if apart else 1


def test_the_code_stays_small():
    """The core's content, printed; and in every file: functions, statements, bindings."""
    total, widths = 0, []
    for file in CODE:
        source = file.read_text()
        tree, lines = ast.parse(source), code_lines(source)
        simple = statements(tree)
        if file.parent == ROOT:
            total += count(tree)
            widths += [width for width, _ in simple]
            print(f"{file.name}: {count(tree)} nodes")
        for width, node in simple:
            assert width <= 30 or is_literal(node), (file.name, node.lineno, width)
            assert bindings(node) <= 2, (file.name, node.lineno)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                length = len(lines & set(range(node.lineno, node.end_lineno + 1)))
                assert count(node) <= 260, (file.name, node.name, count(node))
                assert length <= 45, (file.name, node.name, length)
    p90 = np.percentile(widths, 90)
    print(f"core: {total} nodes; 90 % of its statements have at most {p90:.0f} expressions")
    assert total <= 12_870
    assert count(ast.parse((ROOT / "promptmm.py").read_text())) <= 5_280
    assert p90 <= 15


# ------------------------------------------------------------ README and docs


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 165


@pytest.mark.parametrize("page", publish.PAGES)
def test_figures_are_those_of_the_results(page):
    assert publish.readme(page) == (ROOT / page).read_text()


def test_links_lead_somewhere():
    for page in [
        "README.md",
        "CONTRIBUTING.md",
        *publish.PAGES[1:],
        "docs/data.md",
        "docs/methods.md",
    ]:
        file = ROOT / page
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", file.read_text()):
            assert (file.parent / target).exists(), (page, target)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.M | re.S)


@pytest.mark.parametrize("page", [README, DATA_PAGE], ids=["README", "data"])
def test_the_commands_of_a_page_run(page, tiny, tmp_path, monkeypatch, capsys):
    """Every `python …` line, on a small dataset, in order; then the Python blocks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "synthetic", lambda **_: tiny)
    data.save(tiny, tmp_path / "DIR")
    modules, ran = {"promptmm.py": promptmm, "data.py": data}, 0
    for line in "".join(blocks(page, "sh")).splitlines():
        if line.startswith(("printf ", "python -c ")):
            subprocess.run(line, shell=True, check=True)
        elif line.startswith("python ") and "venv" not in line:
            _, script, *argv = shlex.split(line)
            if script == "-m":
                continue  # minutes long: tests/test_experiments.py runs each part
            if script == "promptmm.py" and "recommend" not in argv and "--help" not in argv:
                argv += ["--quick", "--dim", "8"]
            try:
                status = modules[script].main(argv)
            except SystemExit as stop:  # --help
                status = stop.code
            assert status == 0, (line, capsys.readouterr().err)
            ran += 1
    assert ran >= 5
    for example in blocks(page, "python"):
        exec(example, {})
        assert "recall@2" in capsys.readouterr().out


@pytest.mark.parametrize("page", publish.PAGES)
def test_every_table_on_a_page_has_its_end(page):
    """A lost end mark would swallow the text up to the next one's."""
    text = (ROOT / page).read_text()
    marks = re.findall(r"<!-- (results/\S+|end) -->", text)
    assert len(marks) % 2 == 0 and set(marks[1::2]) <= {"end"} and "end" not in marks[::2]

"""What is said about the code: the README, the equations, the sizes, the doctests."""

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

import pytest

import data
import experiments
import promptmm

ROOT = Path(promptmm.__file__).parent
README = (ROOT / "README.md").read_text()
CORE = ("promptmm", "data", "losses", "evaluate")
EXTRA = ("runner", "experiments", "tune", "paper", "bench")


@pytest.mark.parametrize("name", CORE)
def test_doctests(name):
    found = doctest.testmod(importlib.import_module(name))
    assert found.failed == 0
    assert found.attempted > 0


def equation_rows() -> list[tuple[list[str], list[str]]]:
    rows = re.findall(r"^\| (Eq\. .*?) \| .*? \| (.*?) \|$", README, re.M)
    return [(re.findall(r"Eq\. \d+", left), re.findall(r"`([\w.]+)`", right))
            for left, right in rows]


def test_every_equation_has_its_place():
    """Each of the 16 in the table, and each named function cites it."""
    seen = set()
    for equations, functions in equation_rows():
        for equation in equations:
            seen.add(equation)
            for path in functions:
                module, *names = path.split(".")
                target = importlib.import_module(module)
                for name in names:
                    target = getattr(target, name)
                number = equation.removeprefix("Eq. ")
                cited = re.findall(r"Eq\. (\d+(?:(?:-|, )\d+)*)", inspect.getsource(target))
                numbers = {n for group in cited for n in re.findall(r"\d+", group)}
                assert number in numbers, (equation, path)
    assert seen == {f"Eq. {n}" for n in range(1, 17)}


def code_lines(source: str) -> set[int]:
    """Lines that hold code: no blanks, comments or docstrings."""
    strings = set()
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node):
            strings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    ignored = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
               tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {n for token in tokens if token.type not in ignored
            for n in range(token.start[0], 1 + token.end[0])} - strings


def test_the_code_stays_small():
    sizes = {}
    for name in CORE + EXTRA:
        source = (ROOT / f"{name}.py").read_text()
        sizes[name] = len(code_lines(source))
        assert max(map(len, source.splitlines())) <= 100, name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, node.name
    assert max(sizes[name] for name in CORE) <= 420, sizes
    assert sum(sizes[name] for name in CORE) <= 950, sizes
    assert max(sizes[name] for name in EXTRA) <= 450, sizes


def test_the_core_imports_only_what_it_may():
    allowed = {"torch", "numpy", "scipy", *CORE}
    for name in CORE:
        tree = ast.parse((ROOT / f"{name}.py").read_text())
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
                    for alias in node.names}
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        imported = {module.split(".")[0] for module in imported} - sys.stdlib_module_names
        assert imported <= allowed, (name, imported)
        if name in ("losses", "evaluate"):
            assert not imported & set(CORE)


def test_errata_ids_in_the_code_are_in_the_readme():
    told = set(re.findall(r"\b[PC]\d+\b", README))
    for name in CORE + EXTRA:
        source = (ROOT / f"{name}.py").read_text()
        for cited in re.findall(r"[Ee]rrata ([PC]\d+(?:, [PC]\d+)*)", source):
            assert set(cited.split(", ")) <= told, cited


def test_the_readmes_figures_are_those_of_the_results():
    assert experiments.readme() == README


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def test_the_readmes_commands_run(tiny, tmp_path, monkeypatch, capsys):
    """Every `python …` line, on a small dataset, in order; then the Python block."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "synthetic", lambda **_: tiny)
    data.save(tiny, tmp_path / "DIR")
    modules, ran = {"promptmm.py": promptmm, "data.py": data}, 0
    for line in "".join(blocks("sh")).splitlines():
        if line.startswith(("printf ", "python -c ")):
            subprocess.run(line, shell=True, check=True)
        elif line.startswith("python ") and "venv" not in line:
            _, script, *argv = shlex.split(line)
            if script == "experiments.py":
                continue  # minutes long; its parts are timed, not tested
            if script == "promptmm.py" and "recommend" not in argv and "--help" not in argv:
                argv += ["--quick", "--dim", "8"]
            try:
                status = modules[script].main(argv)
            except SystemExit as stop:  # --help
                status = stop.code
            assert status == 0, (line, capsys.readouterr().err)
            ran += 1
    assert ran >= 9
    [example] = blocks("python")
    exec(example, {})
    assert "recall@2" in capsys.readouterr().out

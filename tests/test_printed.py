"""The paper's own numbers and the errata: what is printed, what is right."""

import dataclasses
import json
import re

import pytest

import promptmm
from experiments import cost, printed
from experiments.errata import ERRATA
from experiments.lab import CODE

RESULTS = CODE / "results" / "paper"


# ------------------------------------------------------------ counts


def test_table_6s_counts_are_rederived():
    """Errata 1c: every printed count is a sum that can be made, or is wrong."""
    rows = {row["what"]: row for row in printed.counts().rows}
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
            share = float(row["printed"][:-1])
            assert row["re-derived"] * 100 == pytest.approx(share, abs=0.011), name
    assert rows["Netflix student / teacher"]["right"] == pytest.approx(0.0811, abs=5e-5)
    assert rows["Electronics student / teacher"]["right"] == pytest.approx(0.0205, abs=5e-5)
    learnt = rows["Netflix student / teacher, learnt only"]["right"]
    assert learnt == pytest.approx(0.979, abs=5e-4)


@pytest.mark.parametrize(
    ("table", "totals"),
    [
        (printed.table8, {"teacher": 3_210_368, "student": 1_951_296}),
        (
            printed.table9,
            {
                "teacher, text 768-d": 108_828_288,
                "teacher, text 1024-d": 114_343_296,
                "student": 4_042_880,
                "student, GCN": 2_048,
            },
        ),
    ],
)
def test_tables_8_and_9_follow_from_their_shapes(table, totals):
    seen = set()
    for row in table().rows:
        if row["weight"] == "total":
            assert row["from the shape"] == totals[row["model"]]
            seen.add(row["model"])
        elif row["printed"] != "" and "1024" not in row["model"]:
            assert row["from the shape"] == row["printed"], row
    assert seen == set(totals)


def test_the_shares_of_tables_8_and_9():
    assert printed.table8().extra["ratio"] == pytest.approx(0.608, abs=5e-4)
    ratio = printed.table9().extra["ratio"]
    expected = {"student / teacher": 0.0371, "learnt only": 0.928}
    assert ratio[768] == pytest.approx(expected, abs=5e-4)
    assert ratio[1024]["student / teacher"] == pytest.approx(0.0354, abs=5e-5)


def test_our_own_counts_follow_the_same_formula(tiny, config):
    """Learnt (U+I)d + Σ(d_m d_T + d_T) + d² + d, frozen I Σ d_m; the student (U+I)d.

    d_T is at most d_m. The teacher's (U+I)d are LightGCN's, learnt before.
    """
    n_users, n_items = tiny.train.shape
    d, widths = config.dim, [x.shape[1] for x in tiny.features.values()]
    config = dataclasses.replace(config, dim_teacher=16)
    assert min(widths) < config.dim_teacher < max(widths)
    teacher, student = promptmm.Teacher(tiny, config), promptmm.Student(tiny.train, config)
    tables = (n_users + n_items) * d
    reductions = sum((width + 1) * min(config.dim_teacher, width) for width in widths)
    learnt, frozen = tables + reductions + d * d + d, n_items * sum(widths)
    assert promptmm._sizes(student(), teacher) == {
        "student": {"trainable": tables, "buffers": 0},
        "teacher": {"trainable": learnt, "buffers": frozen},
    }
    for model, expected in ((teacher, (learnt, frozen)), (student, (tables, 0))):
        found = cost.sizes(model)
        assert (found["trainable"], found["buffers"]) == expected
    assert sum(weight.numel() for weight in student.parameters()) == tables


def test_figure_2s_example():
    *rows, numbers = printed.figure2().rows
    for row in rows[1:]:
        for side in ("teacher", "student"):
            assert sum(row[side]) == pytest.approx(1, abs=2e-4)
    assert rows[1]["teacher"] == pytest.approx([0.2116, 0.7884], abs=5e-5)
    joined = numbers["KL(b) + (1 - b+) KL(q)"]
    assert joined == pytest.approx(numbers["KL of the lists"], abs=1e-15)
    summed = numbers["softmax of summed scores"]
    assert summed == pytest.approx(numbers["printed b+"], abs=5e-5)


@pytest.mark.parametrize("name", ["counts", "table8", "table9", "figure2"])
def test_what_is_published_of_the_paper_is_what_the_code_says(name):
    stored = json.loads((RESULTS / f"{name}.json").read_text())
    assert stored["rows"] == json.loads(json.dumps(getattr(printed, name)().rows))


# ------------------------------------------------------------ errata

CHECKS = {one.id: one.check for one in ERRATA}
PINNED = {
    "P1": [0.2689414, [0.0, -1.0849, -2.5276], 0.0],
    "P2": [2.5115, 1.9895, -2.5115, 2.5115],
    "P3": [0.0],
    "P6": [0.4651, 0.4651, 0.2116],
    "C1": [0.0, 1.0, [0.3941, 0.6059, 0.5152]],
    "C6": [0.1461, 0.2641],
    "C7": [2.0, 4.0],
}


def test_every_erratum_has_an_id_of_its_own():
    expected = [
        "P1",
        "P2",
        "P3",
        "P6",
        "P9",
        "P10",
        "P11",
        "C1",
        "C2",
        "C3",
        "C5",
        "C6",
        "C7",
    ]
    assert [one.id for one in ERRATA] == expected


@pytest.mark.parametrize("name", PINNED)
def test_exact_numbers(name):
    for value, expected in zip(CHECKS[name]().values(), PINNED[name], strict=True):
        assert value == pytest.approx(expected, abs=1e-4)


def test_the_errata_of_the_prompt():
    (small, large), (_, _), cost = CHECKS["P9"]().values()
    assert large > 50 * small  # a hundred times the items
    assert cost > 100
    change, similarity, chance = CHECKS["P10"]().values()
    assert change > 1
    assert abs(similarity - chance) < 0.05
    reach = {key.split()[1]: value for key, value in CHECKS["P11"]().items()}
    assert reach["bpr"] == reach["l2"] == 0
    assert min(reach["pair_kd"], reach["list_kd"], reach["embed_kd"]) > 0


def test_the_errata_of_the_released_objective():
    lowered, match, ours = CHECKS["C2"]().values()
    assert lowered == 1
    assert match > 0
    assert ours < 1e-8
    (logged, released), (term, objective) = CHECKS["C3"]().values()
    assert logged > 1 and released == 0
    assert term > 0 and objective == pytest.approx(term, abs=1e-5)


def test_selection_on_the_test_split_reports_too_much(tiny, monkeypatch):
    monkeypatch.setattr("data.synthetic", lambda **_: tiny)
    on_validation, on_test, excess = CHECKS["C5"](seeds=1, epochs=12).values()
    assert on_test >= on_validation > 0
    assert excess == pytest.approx(on_test / on_validation - 1)


def test_the_published_errata_are_the_codes():
    stored = json.loads((RESULTS / "errata.json").read_text())["rows"]
    assert [row["id"] for row in stored] == [one.id for one in ERRATA]
    text = (RESULTS / "errata.md").read_text()
    assert re.findall(r"- \*\*([PC]\d+)\*\*", text) == [row["id"] for row in stored]

"""The paper's own printed numbers, each re-derived: Tables 6, 8, 9 and Figure 2.

Nothing here depends on data: shapes are those of the paper's Table 3. Ids such as P6 are
those of docs/differences.md.
"""

from functools import partial

import numpy as np
import torch

from experiments.publish import Output, markdown, plain
from losses import disentangle, kl, list_kd

NETFLIX = {"users": 43_739, "items": 17_239, "image": 512, "text": 768}  # Table 3
TIKTOK = {"users": 14_343, "items": 8_690}
ELECTRONICS = {"users": 41_691, "items": 21_479, "image": 4096, "text": 1024}

# ------------------------------------------------------------ Table 6

PRINTED_SIZES = {
    "Netflix": {
        "LATTICE": "24.06M",
        "teacher": "24.91M",
        "student": "1.95M",
        "LATTICE / teacher": "96.59%",
        "student / teacher": "7.83%",
    },
    "Electronics": {
        "LATTICE": "98.39M",
        "teacher": "99.04M",
        "student": "2.67M",
        "LATTICE / teacher": "99.34%",
        "student / teacher": "2.70%",
    },
}
WRONG_TABLE = "item table of U rows"


def counts() -> Output:
    """Table 6's parameter counts, re-derived."""
    rows = printed_sizes()
    shown = []
    for row in rows:
        shown.append(row | {key: percent(row[key]) for key in ("re-derived", "right")})
    note = (
        "right: the same model with an item table of I rows; the printed ratios are those "
        "of the rounded counts"
    )
    return Output("Table 6 of the paper: its counts re-derived", rows, plain(shown), note)


def printed_sizes() -> list[dict]:
    """Every count and ratio of Table 6: as printed, the sum that makes it, the right one.

    Raw features count as parameters there. The script that counted gave the item table |U|
    rows.
    """
    netflix = counted(NETFLIX, text=768)
    electronics = counted(ELECTRONICS, text=384)
    rows = size_rows("Netflix", netflix, netflix["student"], "")
    in_the_text = netflix["student of U rows"] / netflix["teacher of U rows"]
    rows.append(
        {
            "what": "Netflix student / teacher, in the text",
            "printed": "11.24%",
            "re-derived": in_the_text,
            "right": netflix["student"] / netflix["teacher"],
            "how": "both tables of U rows",
        }
    )
    other_text = "; text counted as 384-d, Table 3 says 1024"
    student = electronics["student of U rows"]
    return rows + size_rows("Electronics", electronics, student, other_text)


def counted(shape: dict[str, int], text: int, d: int = 32) -> dict[str, int]:
    """Table 6's sums for one dataset, with |I| and with |U| rows in the item table."""
    users, items = shape["users"], shape["items"]
    width = shape["image"] + text
    features = items * width
    fixed = features + width * d + 2 * d  # features, and two reductions with bias
    tables, doubled = (users + items) * d, 2 * users * d
    return {
        "width": width,
        "features": features,
        "LATTICE": fixed + tables + 2,
        "teacher": fixed + tables + 2 * d,
        "teacher of U rows": fixed + doubled + 2 * d,
        "student": tables,
        "student of U rows": doubled,
    }


def size_rows(name: str, sizes: dict[str, int], student: int, note: str) -> list[dict]:
    """One dataset's rows; student: the count that makes the printed one."""
    lattice, tables = sizes["LATTICE"], sizes["student"]
    teacher, wrong = sizes["teacher"], sizes["teacher of U rows"]
    lattice_how = f"I·{sizes['width']} + (U+I)·32 + …{note}"
    student_how = "as it should be" if student == tables else WRONG_TABLE
    learnt_only = tables / (teacher - sizes["features"])
    lines = [
        ("LATTICE", lattice, lattice, lattice_how),
        ("teacher", wrong, teacher, WRONG_TABLE + note),
        ("student", student, tables, student_how),
        ("LATTICE / teacher", lattice / wrong, lattice / teacher, ""),
        ("student / teacher", student / wrong, tables / teacher, ""),
        (
            "student / teacher, learnt only",
            "",
            learnt_only,
            "the saving is features, not learnt weights",
        ),
    ]
    rows = []
    for what, makes, right, how in lines:
        row = {"what": f"{name} {what}", "printed": PRINTED_SIZES[name].get(what, "")}
        rows.append(row | {"re-derived": makes, "right": right, "how": how})
    return rows


def percent(value) -> str:
    if isinstance(value, float):
        return f"{value:.2%}"
    return f"{value:,}" if value != "" else ""


# ------------------------------------------------------------ Tables 8 and 9

NORM = ("batch_norm.weight", "batch_norm.bias")
PRINTED_8 = {
    "image_trans.weight": 131_072,
    "image_trans.bias": 32,
    "text_trans.weight": 24_576,
    "text_trans.bias": 32,
    "user_id_embedding.weight": 1_399_648,
    "item_id_embedding.weight": 551_648,
    "image_embedding.weight": 551_648,
    "text_embedding.weight": 551_648,
    "batch_norm.weight": 32,
    "batch_norm.bias": 32,
}
PRINTED_9 = {
    "image_trans.weight": 262_144,
    "image_trans.bias": 64,
    "text_trans.weight": 49_152,
    "text_trans.bias": 64,
    "image_feat.weight": 87_977_984,
    "text_feat.weight": 16_495_872,
    "user_id_embedding.weight": 2_668_224,
    "item_id_embedding.weight": 1_374_656,
    "batch_norm.weight": 64,
    "batch_norm.bias": 64,
}

Shapes = dict[str, tuple[int, ...]]


def table8() -> Output:
    """Table 8, labelled Electronics: but users and items are Netflix's."""
    d = 32
    modal = ("image_embedding.weight", "text_embedding.weight")
    shapes = reductions(4096, 768, d) | tables(NETFLIX, d)
    shapes |= dict.fromkeys(modal, (NETFLIX["items"], d)) | dict.fromkeys(NORM, (d,))
    teacher = with_total(weights(shapes, PRINTED_8), 3_210_368)
    student = with_total(weights(tables(NETFLIX, d), PRINTED_8), 1_951_296)
    share = student[-1]["from the shape"] / teacher[-1]["from the shape"]
    rows = labelled("teacher", teacher) + labelled("student", student)
    note = (
        f"sums hold; the student is {share:.1%} of this teacher. U and I are Netflix's "
        "though the label says Electronics, the 4096-d image is Electronics', and 32-wide "
        "image and text tables are not what the released model builds"
    )
    title = "Table 8 of the paper: its counts from the shapes"
    return Output(title, rows, plain(rows), note, extra={"ratio": share})


def table9() -> Output:
    """Table 9: Electronics with the features counted; and with Table 3's 1024-d text."""
    student = with_total(weights(tables(ELECTRONICS, 64), PRINTED_9), 4_042_880)
    rows, ratio = [], {}
    for text in (768, ELECTRONICS["text"]):
        teacher, frozen = teacher9(text)
        rows += labelled(f"teacher, text {text}-d", teacher)
        every, small = teacher[-1]["from the shape"], student[-1]["from the shape"]
        ratio[text] = {
            "student / teacher": small / every,
            "learnt only": small / (every - frozen),
        }
    rows += labelled("student", student)
    gcn = weights({"W1": (32, 32), "W2": (32, 32)}, {})
    rows += labelled("student, GCN", with_total(gcn, 2_048))
    note = (
        "with the printed 768-d text the sums hold and the student is "
        f"{ratio[768]['student / teacher']:.2%} of the teacher; with Table 3's 1024-d it "
        f"is {ratio[1024]['student / teacher']:.2%}; of what is *learnt* it is "
        f"{ratio[768]['learnt only']:.1%}. The GCN student is d = 32 beside d = 64 and "
        "needs the teacher's embeddings as its input, so it does not stand alone"
    )
    title = "Table 9 of the paper: its counts from the shapes"
    return Output(title, rows, plain(rows), note, extra={"ratio": ratio})


def teacher9(text: int, d: int = 64) -> tuple[list[dict], int]:
    """Table 9's teacher with a text of this width: its rows, and its number of features."""
    items, image = ELECTRONICS["items"], ELECTRONICS["image"]
    features = {"image_feat.weight": (items, image), "text_feat.weight": (items, text)}
    shapes = reductions(image, text, d) | features | tables(ELECTRONICS, d)
    rows = weights(shapes | dict.fromkeys(NORM, (d,)), PRINTED_9)
    frozen = sum(int(np.prod(shape)) for shape in features.values())
    return with_total(rows, 108_828_288), frozen


def weights(shapes: Shapes, printed: dict[str, int]) -> list[dict]:
    """Counts from shapes beside the printed ones."""
    rows = []
    for name, shape in shapes.items():
        row = {"weight": name, "shape": list(shape), "printed": printed.get(name, "")}
        rows.append(row | {"from the shape": int(np.prod(shape))})
    return rows


def with_total(rows: list[dict], printed: int) -> list[dict]:
    total = sum(row["from the shape"] for row in rows)
    last = {"weight": "total", "shape": "", "printed": printed, "from the shape": total}
    return [*rows, last]


def labelled(model: str, rows: list[dict]) -> list[dict]:
    return [{"model": model, **row} for row in rows]


def reductions(image: int, text: int, d: int) -> Shapes:
    return {
        "image_trans.weight": (image, d),
        "image_trans.bias": (d,),
        "text_trans.weight": (text, d),
        "text_trans.bias": (d,),
    }


def tables(shape: dict[str, int], d: int) -> Shapes:
    return {
        "user_id_embedding.weight": (shape["users"], d),
        "item_id_embedding.weight": (shape["items"], d),
    }


# ------------------------------------------------------------ Figure 2

LISTS = {
    "teacher": (0.43, 0.22, 0.18, 0.13, 0.09, 0.05),
    "student": (0.30, 0.28, 0.20, 0.10, 0.07, 0.05),
}
PRINTED_B = 0.4651


def figure2() -> Output:
    """A list disentangled by hand: b, q, both divergences, the identity that joins them."""
    b, q = {}, {}
    for side, row in LISTS.items():
        logs = disentangle(torch.tensor([row], dtype=torch.float64))
        b[side], q[side] = (part.exp()[0].tolist() for part in logs)
    rows = [
        {"quantity": "y, the logits", **LISTS},
        {"quantity": "b = [b+, b-], Eq. 6", **rounded(b)},
        {"quantity": "q, Eq. 7", **rounded(q)},
    ]
    lines = []
    for row in rows:
        shown = {side: ", ".join(f"{value:.4f}" for value in row[side]) for side in LISTS}
        lines.append({"quantity": row["quantity"]} | shown)
    found = divergences(b["teacher"][1])
    values = [{"": name, "value": value} for name, value in found.items()]
    text = markdown(lines, {"quantity": "", "teacher": "teacher", "student": "student"})
    text += "\n\n" + markdown(values, {"": "", "value": "value"})
    note = (
        "the teacher's positive (.43) and the sum of its negatives (.67) are Figure 2's; "
        "the single negatives and the student's list are ours. The figure prints "
        "b+ = .4651, the softmax of two *summed* scores (and .57 for .67); Eq. 6 gives "
        ".2116 (errata P6)"
    )
    title = "Figure 2 of the paper: the worked example, corrected"
    return Output(title, [*rows, found], text, note, partial(plot_lists, b, q))


def rounded(part: dict[str, list[float]]) -> dict[str, list[float]]:
    return {side: [round(value, 4) for value in values] for side, values in part.items()}


def divergences(rest: float) -> dict[str, float]:
    """Both parts of the divergence and the whole; rest: 1 - b+, the second's weight."""
    logits = {side: torch.tensor([row], dtype=torch.float64) for side, row in LISTS.items()}
    student, teacher = logits["student"], logits["teacher"]
    on_b = list_kd(student, teacher, 1.0, 0.0).item()
    on_q = list_kd(student, teacher, 0.0, 1.0).item()
    return {
        "KL(b)": on_b,
        "KL(q)": on_q,
        "1 - b+": rest,
        "KL(b) + (1 - b+) KL(q)": on_b + rest * on_q,
        "KL of the lists": kl(student, teacher).item(),
        "printed b+": PRINTED_B,
        "softmax of summed scores": softmax(0.43, 0.57),
    }


def softmax(*values: float) -> float:
    return torch.tensor(values, dtype=torch.float64).softmax(0)[0].item()


def plot_lists(b: dict, q: dict, figure) -> None:
    left, right = figure.subplots(1, 2)
    bars(left, b, ["b+", "b-"], "positive against all negatives (Eq. 6)")
    bars(right, q, [f"q{k}" for k in range(2, 7)], "negatives among themselves (Eq. 7)")


def bars(axis, part: dict[str, list[float]], names: list[str], title: str) -> None:
    for offset, (side, values) in zip((-0.2, 0.2), part.items(), strict=True):
        axis.bar(np.arange(len(names)) + offset, values, 0.4, label=side)
    axis.set(xticks=range(len(names)), xticklabels=names, title=title, ylabel="probability")
    axis.legend()

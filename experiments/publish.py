"""How a result is shown: <part>.md, .json, .png, with how they were made; README's figures.

The columns of a table are given as {key of a row: heading}.
"""

import io
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

import data
import experiments.lab
from data import need, write
from experiments.lab import VERSIONS, Lab, search, tries
from promptmm import Config

PAGES = ("README.md", "experiments/README.md", "results/README.md")
ASIDE = ("citeulike_tag",)  # readers' tags may tell what is held out: no claim rests on it
OURS = ("LightGCN", "Teacher", "PromptMM")  # on page 1 whatever they reached
COLOURS = [
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
]  # Okabe and Ito's


@dataclass
class Output:
    """What an experiment found: rows for the JSON, a table or text, perhaps a plot."""

    title: str
    rows: list
    text: str
    note: str = ""
    plot: Callable | None = None  # plot(figure) draws it
    extra: dict = field(default_factory=dict)  # more for the JSON


# ------------------------------------------------------------ tables


def cell(value) -> str:
    """A value as a table shows it."""
    if isinstance(value, dict):
        several = len(value["runs"]) > 1
        return f"{value['mean']:.4f}" + (f" ± {value['std']:.4f}" if several else "")
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def percent(gain: float | None) -> str:
    """A gain as a table shows it: none over a reference of zero."""
    return "" if gain is None else f"{gain:+.1%}"


def markdown(rows: list[dict], columns: dict[str, str]) -> str:
    """Rows as a table; columns: key -> heading."""
    lines = [columns.values(), ["---"] * len(columns)]
    lines += [[cell(row.get(key, "")) for key in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(rows: list[dict]) -> str:
    """Rows as a table of all that they hold, under its own names."""
    return markdown(rows, {key: key for key in rows[0]})


def ranking_table(rows: list[dict], reference: str, more: dict | None = None) -> str:
    """The usual columns of a comparison: both metrics, the gain over the reference, p."""
    shown = []
    for row in rows:
        recall, ndcg = (percent(row["gain"][metric]) for metric in ("recall@20", "ndcg@20"))
        shown.append(row | {"gain_r": recall, "gain_n": ndcg})
    columns = {
        "model": "model",
        "recall@20": "Recall@20",
        "ndcg@20": "NDCG@20",
        "gain_r": f"R over {reference}",
        "gain_n": "N over it",
        "p": "p (R)",
        "p_ndcg": "p (N)",
    }
    return markdown(shown, columns | (more or {}))


def protocol(config: Config, seeds: int) -> str:
    several = f"seeds 0 to {seeds - 1}; mean ± standard deviation over seeds"
    return (
        f"selection by validation Recall@20 every {config.eval_every} epochs, patience "
        f"{config.patience} evaluations (a teacher's: {config.patience_teacher}); test "
        "read once, at the selected epoch; all items ranked except the user's training and "
        f"validation items; {several if seeds > 1 else 'one seed'}"
    )


def paired(seeds: int) -> str:
    """What a table's p draws; one seed says nothing of how seeds differ."""
    drawn = "the seeds of both models drawn too" if seeds > 1 else "no seed drawn"
    return (
        f"p: bootstrap over users, paired, with {drawn} (10,000 draws, so never below "
        "0.0001), by Holm's method over the rows"
    )


# ------------------------------------------------------------ how it was made


def trained(lab: Lab) -> dict:
    """From when to when, and with what, the models behind a result were trained."""
    files = [folder / "trained.json" for folder in sorted(lab.used)]
    keys = "date", "seconds"
    notes = [data.read_json(file, *keys, sealed=True) for file in files if file.exists()]
    if not notes:
        return {}
    dates = sorted(note["date"] for note in notes)
    found = {"models": len(notes), "from": dates[0], "to": dates[-1]}
    for name in (*VERSIONS, "threads", "code"):
        found[name] = sorted({note[name] for note in notes})
    return found | {"seconds": round(sum(note["seconds"] for note in notes), 1)}


def weights_line(name: str, weights: dict[str, list[float]]) -> str:
    """What each modality weighs beside LightGCN, a line of text.

    >>> weights_line("Teacher", {"text": [0.5, 1.0], "image": [0.0, 0.0]})
    'w_m of Teacher, seed by seed: text 0.5, 1; image 0, 0.'
    """
    own = [f"{m} {', '.join(f'{w:g}' for w in found)}" for m, found in weights.items()]
    return f"w_m of {name}, seed by seed: {'; '.join(own)}."


def command(lab: Lab, name: str, flags: list[str]) -> str:
    """What to type to get this result again."""
    words = ["python -m experiments", name]
    if lab.source:
        words.append(f"--data {Path(lab.source).name}")
    words += flags
    if lab.side_by_side > 1:
        words.append(f"--jobs {lab.side_by_side}")
    if lab.quick:
        words.append("--quick")
    if lab.keep:
        words.append("--keep")
    return " ".join(words)


def facts(lab: Lab, line: str, seconds: float, seeds: int, note: str) -> dict:
    found = {"modalities": list(lab.dataset.features), "seeds": seeds}
    if lab.used and search(lab):  # the settings of its models come from that search
        found["tries"] = tries(search(lab))
    versions = {"python": sys.version.split()[0], **VERSIONS}
    made = {
        "command": line,
        "device": str(lab.device),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "trained": trained(lab),
        "wall_seconds": round(seconds, 1),
        "protocol": note,
    }
    return found | made


def footer(made: dict) -> str:
    """The same facts as one line of text."""
    packages = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    place = f"{made['device']}, {plural(made['threads'], 'thread')}"
    seconds = f"{made['wall_seconds']:.0f} s, models trained before not counted"
    parts = [
        f"`{made['command']}`",
        plural(made["seeds"], "seed"),
        place,
        packages,
        seconds,
    ]
    if models := made["trained"]:
        parts.append(training_line(models))
    return " · ".join(parts)


def training_line(models: dict) -> str:
    """When, for how long and with what the models behind a result were trained."""
    when = f"{models['from'][:10]} to {models['to'][:10]} in {models['seconds']:.0f} s"
    threads = ", ".join(map(str, models["threads"]))
    by = f"torch {', '.join(models['torch'])}, threads: {threads}"
    return f"{plural(models['models'], 'model')} trained {when} with {by}"


def plural(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


# ------------------------------------------------------------ files


def publish(
    lab: Lab,
    folder: Path,
    name: str,
    output: Output,
    seconds: float,
    seeds: int,
    flags: list[str],
) -> Path:
    """<name>.md, .json, and .png where there is something to draw; how they were made."""
    folder.mkdir(parents=True, exist_ok=True)
    for draft in folder.glob(f"{name}.*.tmp"):  # of a killed process
        draft.unlink()
    made = facts(lab, command(lab, name, flags), seconds, seeds, output.note)
    content = {"title": output.title, "rows": output.rows} | made | output.extra
    write(folder / f"{name}.json", as_json(content))
    table = f"<!-- table -->\n{output.text}\n<!-- end -->"
    parts = [f"# {output.title}", table, output.note, footer(made)]
    if output.plot and draw(output.plot, folder / f"{name}.png"):
        parts.insert(2, f"![{output.title}]({name}.png)")
    write(folder / f"{name}.md", "\n\n".join(filter(None, parts)) + "\n")
    print(f"{folder / name}.md\n{output.text}\n", flush=True)
    return folder / f"{name}.md"


def on_file(lab: Lab, name: str, anew: str) -> dict:
    """What is published of a part, {} if nothing; DataError if not of these data.

    anew: how it is made without that. Ask before anything is trained: a refusal at the end
    would cost hours.
    """
    file = lab.out / lab.dataset.name / f"{name}.json"
    if not file.exists():
        return {}
    before = data.read_json(file, "rows")
    ours, found = lab.fingerprint[:12], before.get("fingerprint", "none")[:12]
    expected = f"{file}: expected data of fingerprint {ours}, found {found}"
    need(found == ours, f"{expected}; {anew}")
    return before


def as_json(content) -> str:
    """Strict JSON, in which a number that is not finite is null."""
    text = json.dumps(finite(content), indent=1, ensure_ascii=False, allow_nan=False)
    return f"{text}\n"


def finite(content):
    """Content with None for each number that is not finite."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    broken = isinstance(content, float) and not math.isfinite(content)
    return None if broken else content


def draw(plot: Callable, file: Path) -> bool:
    """A PNG at README width, if the extra [plot] is installed; else not even an old one."""
    file.unlink(missing_ok=True)
    try:
        figure = styled(plot)
    except ImportError as error:
        print(f"skipped {file.name}: {error}; with pip install '.[plot]' --force draws it")
        return False
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    write(file, stream.getvalue())
    return True


def styled(plot: Callable):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    style = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 9,
        "axes.prop_cycle": matplotlib.cycler(color=COLOURS),  # safe for colour-blind eyes
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
        plot(figure)
    return figure


# ------------------------------------------------------------ pages with figures in them


def fence(text: str) -> str:
    return f"```text\n{text.rstrip()}\n```"


def readme(page: str) -> str:
    """A page with what stands between its markers taken from results/."""

    def content(match: re.Match) -> str:
        text = (experiments.lab.ROOT / "results" / match[2]).read_text()
        table = re.search("<!-- table -->\n(.*?)\n<!-- end -->", text, re.S)
        return f"{match[1]}{table[1] if table else fence(text)}\n<!-- end -->"

    text = (experiments.lab.ROOT / page).read_text()
    return re.sub(r"(<!-- results/(\S+) -->\n).*?<!-- end -->", content, text, flags=re.S)


def fill_pages() -> None:
    """Every page's figures anew, the summary of all datasets first."""
    results = experiments.lab.ROOT / "results"
    found = sorted(results.glob("*/table4.json"))
    tables = [file for file in found if file.parent.name not in ASIDE]
    if tables:
        write(results / "summary.md", f"<!-- table -->\n{summary(tables)}\n<!-- end -->\n")
    for page in PAGES:
        file = experiments.lab.ROOT / page
        if file.exists():
            write(file, readme(page))


# ------------------------------------------------------------ all datasets on one page


def summary(files: list[Path]) -> str:
    """Table 4's Recall@20 of every dataset side by side: what is above LightGCN on any."""
    tables = {}
    for file in files:
        rows = data.read_json(file, "rows")["rows"]
        tables[file.parent.name] = {row["model"]: row for row in rows}
    longest_first = sorted(tables.values(), key=len, reverse=True)  # the ladder's order
    every = dict.fromkeys(model for table in longest_first for model in table)
    rows = []
    for model in every:
        own = {name: table.get(model) for name, table in tables.items()}
        gains = [row["gain"]["recall@20"] or 0 for row in own.values() if row]
        if model in OURS or max(gains) > 0:
            cells = {name: summary_cell(row) for name, row in own.items()}
            rows.append({"model": model, **cells})
    return plain(rows)


def summary_cell(row: dict | None) -> str:
    if row is None:
        return ""
    figure = cell(row["recall@20"])
    if "p" not in row:
        return figure
    return f"{figure} ({percent(row['gain']['recall@20'])}, p = {cell(row['p'])})"

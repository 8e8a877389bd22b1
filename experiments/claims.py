"""What the three neighbours claim, asked of this student: C-1 to D-4, a verdict for each.

    python -m experiments claims --data DIR     results/<dataset>/claims.json
    python -m experiments claims --data DIR --questions C-1,C-3     these; others stay

A claim survives if it holds, by p < .05 after Holm's adjustment and in four of five seeds,
on both real datasets; else it survives on one, is refuted (significant the other way) or is
not reproduced. Fewer than five seeds give no verdict. Each is about this student and these
data, with formulas that are partly ours: "not reproduced" does not say that a paper is
wrong. Most are answered by a table of models (questions.py); C-1, C-4, P-3, P-4 look inside
one (inside.py), as D-1 and D-3 do (forgetting.py).
"""

from functools import partial

import data
import experiments.lab
from data import need
from experiments import forgetting, inside
from experiments.inside import Finding
from experiments.lab import Job, Lab, compare, known, log_of, seeded, settings
from experiments.methods import CKD, KDSR, learn_teachers
from experiments.publish import (
    Output,
    markdown,
    on_file,
    paired,
    protocol,
    ranking_table,
)
from experiments.questions import TABLES, Question

REAL = ("tiktok", "citeulike")
SEEDS = 5  # fewer settle nothing
ANEW = "without --questions all are asked anew"
OUTCOMES = {"yes": "holds", "no": "not shown", "against": "the other way", "": "no claim"}

# ------------------------------------------------------------ the rule


def verdict(outcomes: dict[str, str]) -> str:
    """Over the real datasets, by name; says which was not asked.

    >>> verdict({"tiktok": "yes", "citeulike": "yes"}), verdict({"tiktok": "yes"})
    ('survives', 'survives on tiktok; citeulike: not asked')
    >>> verdict({"tiktok": "no", "citeulike": "against"}), verdict({"synthetic": "yes"})
    ('refuted on citeulike', 'not asked of real data with five seeds')
    >>> verdict({"tiktok": "no", "citeulike": "no"}), verdict({"tiktok": ""})
    ('not reproduced', 'no claim')
    """
    found = {name: outcomes[name] for name in REAL if name in outcomes}
    if not found:
        return "not asked of real data with five seeds"
    if not any(found.values()):
        return "no claim"
    words = []
    for word, meant in (("survives", "yes"), ("refuted", "against")):
        where = [name for name, one in found.items() if one == meant]
        if len(where) == len(REAL):
            return word
        words += [f"{word} on {name}" for name in where]
    missing = [f"{name}: not asked" for name in REAL if name not in found]
    return "; ".join([", ".join(words) or "not reproduced", *missing])


# ------------------------------------------------------------ all of them


def asked(lab: Lab, seeds: int, question: Question) -> Finding:
    jobs = question.rows(lab)
    learn_teachers(lab, [job for job in jobs.values() if job.model == CKD], seeds)
    rows = compare(lab, question.name, jobs, seeds, question.reference)
    by_name = {row["model"]: row for row in rows}
    text = ranking_table(rows, question.reference)
    if question.name == "D-4":
        text += "\n\n" + codes_learnt(lab, jobs)
    found = question.judge(lab, by_name)
    return Finding(question.name, question.text, rows, text, found)


def codes_learnt(lab: Lab, jobs: dict[str, Job]) -> str:
    """The dissected loss at the end beside the codes' entropy: at it, nothing is taught."""
    job = seeded(jobs[f"{KDSR}, L as found"], 1)[0]
    weight = job.config.lambda_dissected
    log = log_of(lab.folder(*job))
    if not weight or "dissected_kd" not in log:
        return "The dissected loss has no weight here."
    entropy = sum(forgetting.code_entropy(lab, job.config).values())
    last = log["dissected_kd"][-1] / weight
    return f"Dissected loss at the end: {last:.3f}; entropy of its codes: {entropy:.3f}."


QUESTIONS = {one.name: partial(asked, question=one) for one in TABLES} | {
    "C-1": inside.modes,
    "C-4": inside.weights_by_epoch,
    "P-3": inside.useless_teachers,
    "P-4": inside.memory,
    "D-1": forgetting.forgetting,
    "D-3": forgetting.codes_and_parts,
}
ORDER = sorted(QUESTIONS, key=lambda name: ("CPD".index(name[0]), name))


def claims(lab: Lab, seeds: int, questions: str = "") -> Output:
    """The experiments on these data, and the verdicts over the real ones so far.

    questions: these alone, comma-separated; what others found stays.
    """
    chosen = known(questions, ORDER, "--questions") if questions else ORDER
    found = {row["id"]: row for row in (published(lab, seeds) if questions else [])}
    for name in chosen:
        one = QUESTIONS[name](lab, seeds)
        found[name] = {"id": name, "claim": one.text, "outcome": one.outcome}
        found[name] |= {"here": OUTCOMES[one.outcome], "rows": one.rows, "table": one.table}
    before = earlier(lab)
    rows = [found[name] for name in ORDER if name in found]
    for row in rows:
        outcomes = before.get(row["id"], {})
        if seeds >= SEEDS:
            outcomes |= {lab.dataset.name: row["outcome"]}
        row["verdict"] = verdict(outcomes)
    columns = {"id": "", "claim": "claim", "here": "here", "verdict": "on real data"}
    parts = [markdown(rows, columns)]
    parts += [f"**{row['id']}: {row['claim']}**\n\n{row['table']}" for row in rows]
    note = f"{protocol(settings(lab), seeds)}; {paired(seeds)}; the rule is in claims.py"
    if kept := [row["id"] for row in rows if row["id"] not in chosen]:
        note += f"; asked before this: {', '.join(kept)}"
    if missing := [name for name in ORDER if name not in found]:
        note += f"; not asked: {', '.join(missing)}"
    title = f"What CKD, PRM-KD and KDSR claim, on {lab.dataset.name}"
    extra = {"fingerprint": lab.fingerprint}
    return Output(title, rows, "\n\n".join(parts), note, extra=extra)


def published(lab: Lab, seeds: int) -> list[dict]:
    """The claims on file; DataError if they are of other data, or of other seeds."""
    before = on_file(lab, "claims", ANEW)
    there = before.get("seeds", seeds)
    need(there == seeds, f"--seeds: expected {there}, as on file, found {seeds}; {ANEW}")
    return before.get("rows", [])


def earlier(lab: Lab) -> dict[str, dict[str, str]]:
    """Outcomes of the other real datasets, by claim, as far as they were asked."""
    found: dict[str, dict[str, str]] = {}
    for name in REAL:
        file = experiments.lab.ROOT / "results" / name / "claims.json"
        if file.exists() and name != lab.dataset.name and not lab.quick:
            told = data.read_json(file, "rows", "seeds")
            for row in told["rows"] if told["seeds"] >= SEEDS else []:
                found.setdefault(row["id"], {})[name] = row["outcome"]
    return found

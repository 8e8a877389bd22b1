"""What can a prompt do that W cannot?

Paper: Section 3.1.2, Eq. 3 (the prompt p), Eq. 4 (the prompted reduction f).

What do you expect? f = (x + lambda p (p'x)) W + b for all items at once, x [I, d_m], where
p [I, d] is affine in their principal components, p' its transpose. Is f = x W* + b*?
    a) No, it is a product in x.   b) With one modality yes, else not quite.   c) Always.
Which losses reach the prompt in stage 2: teacher as it is, under no_grad, p detached?

The output (1 s; numbers move by ± 0.02 on another machine):

    rest, one modality and two        0.0000   0.4090
    gradient on the prompt, x 10    as it is  no_grad   detach
    bpr                                0.000    0.000    0.000
    l2                                 0.000    0.000    0.000
    pair_kd                            0.008    0.000    0.000
    list_kd                            0.419    0.000    0.000
    embed_kd                           0.014    0.000    0.000
    prompt_anchor                      0.096        -        -
"""

# %%
from dataclasses import replace

import torch
import torch.nn.functional as F

import data
from lessons import common
from promptmm import Config, Linear, Student, Teacher, student_terms

PATHS = "as it is", "no_grad", "detach"


# %%
def made(dataset, seed: int, modalities: int) -> Teacher:
    """An untrained teacher on the last modalities, its prompt's bias not zero."""
    kept = dict(list(dataset.features.items())[-modalities:])
    torch.manual_seed(seed)
    teacher = Teacher(replace(dataset, features=kept), Config(dim=16))
    teacher.eval().requires_grad_(False)
    teacher.prompt.bias.normal_()
    return teacher


def rest(teacher: Teacher) -> float:
    """What the best W* and b* leave of the prompt's part of f [I, d_T]: a share of it."""
    m, x = list(teacher.features.items())[-1]
    plain = teacher.fixed()[m]
    part = (teacher.reduced()[m] - plain.xw - plain.bias).double()  # [I, d_T]
    lifted = F.pad(x.double(), (0, 1), value=1.0)  # [x, 1]  [I, d_m + 1]
    best = lifted @ torch.linalg.pinv(lifted, rtol=1e-6) @ part  # least squares  [I, d_T]
    return ((part - best).norm() / part.norm()).item()


def reached(dataset, seed: int, path: str) -> dict:
    """The norm of each term's gradient at the prompt's weight."""
    teacher = made(dataset, seed, 2)
    teacher.prompt.requires_grad_(path != "detach")  # what p.detach() does
    with torch.set_grad_enabled(path != "no_grad"):
        encoded = teacher()
    student = Student(dataset.train, teacher.config)
    project = [Linear(16, item.shape[1]) for item in encoded.item_modal.values()]
    batch = data.Sampler(dataset.train).epoch(torch.Generator().manual_seed(seed), 10)
    terms = student_terms(student, teacher.config, encoded, *batch, project)
    weight, reach = teacher.prompt.weight.requires_grad_(True), {}
    for name, term in terms.items():
        found = torch.autograd.grad(term, weight, retain_graph=True, allow_unused=True)
        reach[name] = 0.0 if found[0] is None else found[0].norm().item()
    return reach


def measure(seed: int = 0, quick: bool = False) -> dict:
    dataset = data.synthetic(seed=seed, **common.SMALL)
    rests = [rest(made(dataset, seed, modalities)) for modalities in (1, 2)]
    return {"rests": rests, "reach": {path: reached(dataset, seed, path) for path in PATHS}}


def show(found: dict) -> str:
    lines = ["rest, one modality and two     {:9.4f}{:9.4f}".format(*found["rests"])]
    lines += [f"{'gradient on the prompt, x 10':31}" + "".join(f"{p:>9}" for p in PATHS)]
    for term in found["reach"]["as it is"]:
        sizes = [found["reach"][path].get(term) for path in PATHS]  # None: no such term
        cells = ("        -" if size is None else f"{10 * size:9.3f}" for size in sizes)
        lines.append(f"{term:31}" + "".join(cells))
    return "\n".join(lines)


def claim(found: dict) -> bool:
    """An identity with one modality, a rest with two; only teachers' terms have a path."""
    (one, two), reach = found.values()
    sizes = [*reach["as it is"].values()]  # the student's bpr and l2, then the teacher's
    dead = [*sizes[:2], *reach["no_grad"].values(), *reach["detach"].values()]
    return one < 1e-5 and 0.1 < two < 0.9 and not any(dead) and min(sizes[2:]) > 0


# %% [markdown]
# What it means: b). p'x [d, d_m] sums over all items: one matrix, the same for each. With
# one modality p is affine in x, and so the sum is. With two, p has the other modality's
# components: no W makes 41 % of what it adds at this random bias (2 % of f here). In stage
# 2 the prompt is an adapter of d (d + 1) numbers beside a frozen W. The student's BPR has
# no path to it; no_grad and detach close the others. All but the anchor, the teacher's own
# BPR, ask only for a teacher easy to copy. Sizes carry Eq. 12's weights: mind only zeros.
# What it does not show: that the rest is of use. It was not where we looked.

# %% [markdown]
# Your turn: (W*, b*) for one modality. tokens = x basis, p = tokens theta + shift; lam
# times p (p'x), scaled to the Frobenius norm of x [I, d_m], is added to x. Check:
# python -m lessons.4_prompt --check mine.py
YOURS = "absorb"


def absorb(x, basis, theta, shift, w, b, lam): ...


# %% [markdown]
# Next: tokens="concat" in `made`. Read: promptmm.Teacher.reduce, shift; errata P9-P11, C4.
# %%
if __name__ == "__main__":
    raise SystemExit(common.run(globals()))

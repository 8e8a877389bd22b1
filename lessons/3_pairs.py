"""Can a loss pull where all agree?

Paper: Section 3.2.1, Eq. 5.

What do you expect? Eq. 5 as printed is -y_T (log y_T - log y_S), with y = log sigmoid of a
margin, the positive's lead over the negative. The student starts at the teacher's margin.
    a) It stays: where student and teacher agree, a distillation loss is at rest.
    b) It moves, and comes back.
    c) It moves down, and never stops.

The output (1 s; numbers move by ± 0.02 on another machine):

    gradient of Eq. 5 where student = teacher      0.269
    Eq. 5 at student margins 1, -10, -1000         0.000  -1.085  -2.528
    gradient of pair_kd where they agree           0.000

    margins of four pairs
    teacher                      3.08    -0.59    -4.36     1.14
    Eq. 5, 100 steps             2.00    -7.01   -15.45    -2.71
    Eq. 5, 1,000 steps          -3.38   -22.64   -46.97   -11.49
    pair_kd, 1,000 steps         3.08    -0.59    -4.36     1.14
"""

# %%
import torch
import torch.nn.functional as F

from experiments.errata import p1
from lessons import common
from losses import pair_kd


# %%
def printed(student, teacher):
    """Eq. 5 to the letter: y is negative, so the quotient of two y is positive."""
    y_s, y_t = F.logsigmoid(student), F.logsigmoid(teacher)  # [B]
    return -(y_t * (y_t / y_s).log()).mean()


def descend(loss, teacher, steps: int):
    """Student margins [B] after gradient descent from the teacher's own."""
    student = teacher.clone().requires_grad_()
    for _ in range(steps):
        [gradient] = torch.autograd.grad(loss(student, teacher), student)
        student = (student - gradient).detach().requires_grad_()
    return student.detach()


def measure(seed: int = 0, quick: bool = False) -> dict:
    generator = torch.Generator().manual_seed(seed)
    teacher = 2 * torch.randn(4, generator=generator)
    steps = 10 if quick else 1000
    return {
        "facts": p1(),
        "teacher": teacher,
        "Eq. 5, 100 steps": descend(printed, teacher, min(steps, 100)),
        "Eq. 5, 1,000 steps": descend(printed, teacher, steps),
        "pair_kd, 1,000 steps": descend(pair_kd, teacher, steps),
    }


def show(found: dict) -> str:
    lines = []
    for name, value in found["facts"].items():
        numbers = value if isinstance(value, list) else [value]
        lines.append(f"{name:44}" + "".join(f"{number:8.3f}" for number in numbers))
    lines += ["", "margins of four pairs"]
    for name, margins in list(found.items())[1:]:
        lines.append(f"{name:24}" + "".join(f"{margin:9.2f}" for margin in margins))
    return "\n".join(lines)


def claim(found: dict) -> bool:
    """As printed every margin falls on and on; the corrected one rests at the teacher's."""
    falls = found["Eq. 5, 1,000 steps"] < found["Eq. 5, 100 steps"] - 0.5
    rests = (found["pair_kd, 1,000 steps"] - found["teacher"]).abs() < 1e-4
    return bool(falls.all() and rests.all())


def draw(axes, found: dict) -> None:
    margins, teacher = torch.linspace(-6, 6, 200), torch.tensor([1.0])
    for name, loss in (("Eq. 5 as printed", printed), ("pair_kd", pair_kd)):
        axes.plot(margins, [loss(m[None], teacher) for m in margins], label=name)
    axes.axvline(1, color="black", linewidth=1, linestyle="--")
    axes.text(1.1, 2.2, "the teacher's margin")
    axes.set(
        xlabel="student's margin",
        ylabel="loss",
        title="Only pair_kd rests at the teacher's margin",
    )
    axes.legend(frameon=False)


# %% [markdown]
# What it means: c). Three faults: y is a logarithm, so it is no weight; "i- is better" is
# missing beside "i+ is better"; and the leading minus turns the pull round. Mending one is
# not enough. The derivative y_T (1 - sigmoid(margin)) / y_S > 0 lowers the margin also at
# the teacher's own (here 1: 0.269 = 1 - sigmoid(1)), and there is no lower bound.
# `pair_kd` is the KL of two Bernoulli distributions: both sides count.
# What it does not show: that a model trained on Eq. 5 must fail. BPR stands beside it and
# raises the margins; the two then fight.

# %% [markdown]
# Your turn: this function has a sign error. Write `pair_kd(student, teacher)` without it.
# Check: python -m lessons.3_pairs --check mine.py
YOURS = "pair_kd"


def broken(student, teacher):
    t = teacher.sigmoid()  # [B]
    better = t * (F.logsigmoid(teacher) - F.logsigmoid(student))
    worse = (1 - t) * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return (better - worse).mean()


# %% [markdown]
# Next: let the teacher be 8 in `measure`: Eq. 5 hardly pulls. Read: losses.pair_kd; P1.
# %%
if __name__ == "__main__":
    raise SystemExit(common.run(globals()))

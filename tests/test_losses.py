"""The objective: laws by hypothesis, values by oracles that share no code with it."""

import inspect
import math

import pytest
import torch
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch.autograd import gradcheck

from losses import bpr_loss, disentangle, embed_kd, kl, l2_penalty, list_kd, pair_kd
from promptmm import Config

logit = st.floats(-30, 30, allow_nan=False)
extreme = st.floats(-1e4, 1e4, allow_nan=False)
temperatures = st.floats(0.1, 20)


def matrices(elements, low=2):
    """Two float64 arrays [B, K] of one shape."""
    shapes = array_shapes(min_dims=2, max_dims=2, min_side=low, max_side=7)
    return shapes.flatmap(
        lambda shape: st.tuples(*[arrays("f8", shape, elements=elements)] * 2)
    )


def tensors(pair):
    return [torch.from_numpy(array.copy()).requires_grad_() for array in pair]


def oracle_kl(teacher, student):
    """KL of two lists of logits in plain Python, exact summation."""

    def log_softmax(row):
        top = max(row)
        total = math.log(math.fsum(math.exp(x - top) for x in row)) + top
        return [x - total for x in row]

    t, s = log_softmax(teacher), log_softmax(student)
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(t, s, strict=True))


LOSSES = {  # each as a function of (student [B, K], teacher [B, K])
    "pair": lambda s, t: pair_kd(s.flatten(), t.flatten(), 2.0),
    "kl": lambda s, t: kl(s, t, 2.0),
    "list": lambda s, t: list_kd(s, t, 1.0, 8.0, 2.0),
    "list-identity": lambda s, t: list_kd(s, t, 1.0, "identity", 2.0),
    "embed": lambda s, t: embed_kd(s, t, 2.0),
}


@given(matrices(extreme), temperatures)
def test_disentangling_is_an_identity(pair, temperature):
    """Eq. 16: with alpha = 1 and beta = 1 - b+ nothing is re-weighted (errata P2, P3)."""
    student, teacher = tensors(pair)
    whole = kl(student, teacher, temperature).item()
    parts = list_kd(student, teacher, beta="identity", temperature=temperature).item()
    assert abs(whole - parts) <= 1e-10 * max(1, abs(whole))


@given(matrices(logit), temperatures)
def test_kl_matches_plain_python(pair, temperature):
    student, teacher = tensors(pair)
    rows = [
        oracle_kl([x / temperature for x in t], [x / temperature for x in s])
        for t, s in zip(teacher.tolist(), student.tolist(), strict=True)
    ]
    expected = temperature**2 * math.fsum(rows) / len(rows)
    assert kl(student, teacher, temperature).item() == pytest.approx(
        expected, rel=1e-9, abs=1e-9
    )


@given(matrices(logit), temperatures, st.floats(0, 5), st.floats(0, 10))
def test_list_kd_matches_plain_python(pair, temperature, alpha, beta):
    """b: the positive against the *log-sum-exp* of the negatives; q: these alone."""
    student, teacher = tensors(pair)
    rows = []
    for t, s in zip(teacher.tolist(), student.tolist(), strict=True):
        t, s = ([x / temperature for x in row] for row in (t, s))
        t_rest, s_rest = (math.log(math.fsum(map(math.exp, row[1:]))) for row in (t, s))
        rows.append(
            alpha * oracle_kl([t[0], t_rest], [s[0], s_rest])
            + beta * oracle_kl(t[1:], s[1:])
        )
    expected = temperature**2 * math.fsum(rows) / len(rows)
    found = list_kd(student, teacher, alpha, beta, temperature).item()
    assert found == pytest.approx(expected, rel=1e-8, abs=1e-8)


@given(matrices(logit), temperatures)
def test_pair_kd_matches_plain_python(pair, temperature):
    """Two-class KL between [m, 0] / τ on either side."""
    student, teacher = (x.flatten() for x in tensors(pair))
    rows = [
        oracle_kl([t / temperature, 0], [s / temperature, 0])
        for t, s in zip(teacher.tolist(), student.tolist(), strict=True)
    ]
    expected = temperature**2 * math.fsum(rows) / len(rows)
    found = pair_kd(student, teacher, temperature).item()
    assert found == pytest.approx(expected, rel=1e-8, abs=1e-9)


@pytest.mark.parametrize("name", LOSSES)
@given(matrices(logit))
def test_zero_and_flat_where_the_student_agrees(name, pair):
    student, teacher = tensors((pair[0] + 0.1, pair[0] + 0.1))
    value = LOSSES[name](student, teacher)
    value.backward()
    assert abs(value.item()) < 1e-9
    assert student.grad.abs().max() < 1e-7


@pytest.mark.parametrize("name", LOSSES)
@given(matrices(logit))
def test_never_negative(name, pair):
    assert LOSSES[name](*tensors(pair)).item() >= -1e-9


@pytest.mark.parametrize("name", ["kl", "list", "list-identity"])
@given(pair=matrices(logit, low=3), seed=st.integers(0, 99))
def test_order_of_the_negatives_is_nothing(name, pair, seed):
    student, teacher = tensors(pair)
    negatives = 1 + torch.randperm(
        student.shape[1] - 1, generator=torch.Generator().manual_seed(seed)
    )
    order = torch.cat([torch.tensor([0]), negatives])
    before = LOSSES[name](student, teacher).item()
    after = LOSSES[name](student[:, order], teacher[:, order]).item()
    assert after == pytest.approx(before, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_on_both_sides(name):
    """Analytic against numerical, on the teacher's side too: prompt tuning needs it."""
    generator = torch.Generator().manual_seed(0)
    pair = [
        torch.randn(4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    ]
    assert gradcheck(LOSSES[name], pair)
    LOSSES[name](*pair).backward()
    assert pair[0].grad.abs().max() > 1e-3
    assert pair[1].grad.abs().max() > 1e-3


@given(matrices(extreme), st.sampled_from([0.1, 1.0, 10.0]))
def test_extreme_logits_stay_finite(pair, temperature):
    for name in ("list", "kl", "pair"):
        student, teacher = (torch.from_numpy(x).float().requires_grad_() for x in pair)
        value = LOSSES[name](student / temperature, teacher / temperature)
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()
        assert teacher.grad.isfinite().all()
    for part in disentangle(torch.from_numpy(pair[0]).float()):
        assert part.isfinite().all()


@given(matrices(logit))
def test_disentangled_parts_are_distributions(pair):
    """b and q each sum to one, and b- q is the softmax of the negatives: q_k = y_k / b-."""
    logits, _ = tensors(pair)
    binary, negatives = (part.exp() for part in disentangle(logits))
    assert torch.allclose(binary.sum(1), torch.ones(len(logits), dtype=torch.float64))
    assert torch.allclose(negatives.sum(1), torch.ones(len(logits), dtype=torch.float64))
    assert torch.allclose(binary[:, 1:] * negatives, logits.softmax(1)[:, 1:], atol=1e-12)


def test_refusals():
    with pytest.raises(ValueError, match="K = 1"):
        disentangle(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="gamma"):
        embed_kd(torch.ones(2, 2), torch.ones(2, 2), gamma=0.9)
    with pytest.raises(ValueError, match="identity"):
        list_kd(torch.zeros(2, 3), torch.zeros(2, 3), beta="identy")


@given(matrices(logit), st.floats(1, 4))
def test_embed_kd_matches_plain_python(pair, gamma):
    student, teacher = tensors(pair)
    rows = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        norms = math.hypot(*s), math.hypot(*t)
        directed = min(norms) >= 1e-6
        dot = math.fsum(a * b for a, b in zip(s, t, strict=True))
        rows.append(
            max(0.0, 1 - (dot / (norms[0] * norms[1]) if directed else 0.0)) ** gamma
        )
    expected = math.fsum(rows) / len(rows)
    assert embed_kd(student, teacher, gamma).item() == pytest.approx(expected, abs=1e-6)


def test_the_largest_gamma_stays_finite():
    """Opposite rows: (1 - cos)^γ is 2^γ; Adam squares the gradient."""
    student = torch.tensor([[1.0, 0.1]], requires_grad=True)
    loss = embed_kd(student, torch.tensor([[-1.0, 0.0]]), gamma=49.9)
    loss.backward()
    assert loss.isfinite() and student.grad.square().isfinite().all() and student.grad.any()


@pytest.mark.parametrize("gamma", [1.0, 1.5, 2.0])
def test_embed_kd_rows_without_direction(gamma):
    """They count as cos = 0 and send no gradient, whichever side they are on."""
    student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]], requires_grad=True)
    modal = torch.tensor([[1.0, 0.0], [0.0, 1e-7], [0.0, 1.0]], requires_grad=True)
    value = embed_kd(student, modal, gamma)
    value.backward()
    assert value.item() == pytest.approx(1.0)
    assert (student.grad[:2] == 0).all()
    assert (modal.grad[:2] == 0).all()
    assert student.grad[2].abs().max() > 0.1


def test_embed_kd_where_float32_cosines_exceed_one():
    rows = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) * 100
    rows.requires_grad_()
    value = embed_kd(rows, rows.detach() * 3, gamma=1.5)
    value.backward()
    assert value.isfinite()
    assert rows.grad.isfinite().all()


@given(arrays("f8", st.integers(1, 9), elements=logit), st.floats(-30, 30))
def test_bpr_matches_plain_python(positive, shift):
    expected = math.fsum(math.log1p(math.exp(-shift)) for _ in positive) / len(positive)
    found = bpr_loss(
        torch.from_numpy(positive + shift), torch.from_numpy(positive.copy())
    ).item()
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_l2_penalty_is_half_the_squares_over_the_batch():
    a, b = torch.arange(6.0).view(2, 3), torch.ones(2, 3)
    assert l2_penalty(a, b).item() == pytest.approx((55 + 6) / 2 / 2)


def test_the_defaults_are_the_settings():
    """One β, whether the loss is called by hand or by a run; α is the paper's by hand."""
    defaults = inspect.signature(list_kd).parameters
    config = Config()
    assert (defaults["alpha"].default, config.alpha) == (1.0, 0.0)
    for name in ("beta", "temperature"):
        assert defaults[name].default == getattr(config, name)

"""CKD, PRM-KD and KDSR: hand values, laws, and what each must not do.

The contract that all methods share is in tests/test_registry.py; hand values of the losses
are their doctests.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import replaced
from hypothesis import given, strategies as st

import data
from distillers import correlation, counterfactual, several_teachers
from distillers.common import lists_of, train, with_drawn
from distillers.content import (
    centred,
    codebook,
    content_start,
    nearest,
    some_pairs,
    sub_cosines,
)
from distillers.correlation import KDSR, Modality, dissected_kd, holistic_kd
from distillers.counterfactual import (
    CKD,
    block_margins,
    causal_effect,
    generic_kd,
    modality_weights,
    specific_kd,
    weights_of,
)
from distillers.several_teachers import PRMKD, multi_kd, spectral, teacher_weights
from losses import kl, pair_kd
from promptmm import Config, Run, Student, margin, scores

seeds = st.integers(0, 10_000)
positive = st.floats(0.1, 10)
N = 16
SHORT = {"dim": 8, "batch": 128, "negatives": 3, "epochs": 2, "eval_every": 1}


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape, scale: float = 1.0) -> torch.Tensor:
    drawn = torch.randn(*shape, generator=rng(seed), dtype=torch.float64)
    return (scale * drawn).requires_grad_()


def gradient(loss: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, of, retain_graph=True, allow_unused=True)[0]


def close(a, b, **how) -> bool:
    return torch.allclose(torch.as_tensor(a), torch.as_tensor(b).to(a), **how)


def made(kind, dataset, state=None, teachers=None, **settings):
    """A method on a fresh student: (method, student)."""
    config = kind.Settings(**SHORT | settings)
    torch.manual_seed(config.seed)
    student = Student(dataset.train, config)
    run = Run(None, dataset, config, torch.device("cpu"), state or {})
    return kind(run, student, teachers or some_teachers(dataset)), student


def trained_for_an_epoch(kind, dataset, folder, teachers):
    """The method itself, after an epoch beside its student."""
    config = kind.Settings(**SHORT | {"epochs": 1})
    run = Run(folder, dataset, config, torch.device("cpu"), {})
    found = []

    def method(*arguments):
        found.append(kind(*arguments))
        return found[0]

    train(run, method, teachers)
    return found[0]


def some_teachers(dataset, widths=(5, 6, 7), seed: int = 1) -> dict:
    names = ("joint", *dataset.features)
    generator, found = rng(seed), {}
    for name, width in zip(names, widths, strict=False):
        found[name] = tuple(
            torch.randn(n, width, generator=generator) for n in dataset.train.shape
        )
    return found


def terms(method, student, users, lists) -> dict:
    user, item = student()
    return method.terms(user, item, scores(user, item, users, lists), users, lists)


# ------------------------------------------------------------ CKD: losses


@given(seeds, positive, st.floats(-5, 5))
def test_the_hinge(seed, k, shift):
    s, t = normal(seed, N), normal(seed + 1, N)
    loss = specific_kd(s, t)
    ahead = (s >= t).detach()
    assert (gradient(loss, s)[ahead] == 0).all()
    assert close(gradient(loss, s)[~ahead], -1 / N)  # drawn up, towards t
    assert loss >= 0 and specific_kd(t + 1, t) == 0
    assert close(specific_kd(s + shift, t + shift), loss)
    assert close(specific_kd(k * s, k * t), k * loss)
    weight = normal(seed + 2, N).detach().abs()
    by_row = (weight * (t - s).clamp(min=0)).mean()
    assert close(specific_kd(s, t, weight), by_row) and close(specific_kd(s, t, 1.0), loss)


@given(seeds, st.floats(0.1, 3))
def test_the_generic_loss_is_pair_kd_on_other_pairs(seed, tau):
    s, t = normal(seed, N), normal(seed + 1, N)
    loss = generic_kd(s, t, tau)
    assert close(loss, pair_kd(s, t, tau) / tau**2)
    assert close(generic_kd(-s, -t, tau), loss)  # two items have no order
    assert loss > 0 and abs(generic_kd(s, s, tau)) < 1e-12
    assert gradient(generic_kd(s, s.detach(), tau), s).abs().max() < 1e-9
    by_hand = 0
    for sign in (1, -1):  # 1 - σ(x) is σ(-x), which does not round to zero
        p, q = (sign * t / tau).sigmoid(), (sign * s / tau).sigmoid()
        by_hand = by_hand + p * (p / q).log()
    assert close(loss, by_hand.mean(), rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_losses_are_finite_far_out(dtype):
    """Margins and logits of ±1e4 at τ = .1: values and gradients."""
    s = torch.tensor([1e4, -1e4, 0.0, 1e4], dtype=dtype, requires_grad=True)
    t = torch.tensor([-1e4, 1e4, 1e4, 0.0], dtype=dtype, requires_grad=True)
    y, z = torch.stack([s, t, s]), torch.stack([torch.stack([t, s, s])] * 2)
    log_p = (z / 0.1).log_softmax(-1)
    weights = teacher_weights(log_p)
    found = [specific_kd(s, t), generic_kd(s, t), multi_kd(y, z, weights, 0.1)]
    found.append(dissected_kd(y, torch.tensor([0, 1, 1])))
    for loss in found:
        parts = torch.autograd.grad(loss, (s, t), retain_graph=True, allow_unused=True)
        assert loss.isfinite() and loss.dtype == dtype
        assert all(part is None or part.isfinite().all() for part in parts)
    assert weights.isfinite().all()
    assert close(weights.sum(0), 1.0)


def test_a_confidently_wrong_student_is_still_corrected():
    """K7: the released form has lost its gradient there."""
    s = torch.tensor([-10.0], requires_grad=True)
    assert gradient(generic_kd(s, torch.tensor([10.0]), 0.1), s).item() == -10.0  # -1/τ


# ------------------------------------------------------------ CKD: weights and blocks


@given(seeds, positive)
def test_the_effect(seed, k):
    joint, without, only = (normal(seed + n, 3, N) for n in range(3))
    effect = causal_effect(joint, without, only)
    assert ((effect >= 1e-8) & (effect <= 10)).all() and not effect.requires_grad
    assert close(causal_effect(k * joint, k * without, k * only), effect)
    shared, own = joint.detach(), without.detach()  # y^0 and y^m as blocks
    ratio = (own / (shared + own)).clamp(1e-8, 10)
    assert close(causal_effect(shared + own + 1, shared + 1, shared + own), ratio)


def test_the_effect_at_zero():
    zeros = torch.zeros(3)
    effect = causal_effect(zeros, zeros, zeros)
    assert close(modality_weights(effect), torch.ones(3))
    signs = causal_effect(torch.tensor([1.0, -1.0]), torch.zeros(2), torch.zeros(2))
    assert signs.tolist() == pytest.approx([10, 1e-8])


@given(seeds, positive, st.integers(1, 5))
def test_the_weights(seed, k, m):
    effects = torch.rand(m, N, generator=rng(seed), dtype=torch.float64) + 0.01
    weights = modality_weights(effects.requires_grad_())
    assert not weights.requires_grad
    effects = effects.detach()
    assert close(weights.sum(0), float(m))
    order = torch.randperm(m, generator=rng(seed))
    assert close(modality_weights(effects[order]), weights[order])
    assert close(modality_weights(k * effects), weights)
    assert close(modality_weights(torch.full((m, 2), k)), torch.ones(m, 2))
    if m == 2:  # the released formula, for text and image
        text, image = effects
        released = 1 - (text - image) / (text + image)
        assert close(weights, torch.stack([released, 2 - released]))


def test_less_effect_more_weight():
    assert modality_weights(torch.tensor([0.2, 0.6])).tolist() == pytest.approx([1.5, 0.5])


@given(seeds, st.integers(1, 4), st.integers(0, 5))
def test_the_blocks_add_up(seed, blocks, more):
    width = blocks + more
    user, item = normal(seed, 9, width), normal(seed + 1, 12, width)
    users = torch.randint(9, (N,), generator=rng(seed))
    lists = torch.randint(12, (N, 2), generator=rng(seed))
    parts = block_margins((user, item), users, lists, blocks)
    assert parts.shape == (blocks, N)
    assert close(parts.sum(0), margin(scores(user, item, users, lists)))
    with pytest.raises(ValueError, match="expected at least"):
        block_margins((user, item), users, lists, width + 1)


def test_weights_by_batch_and_by_row():
    """The margins are averaged before the ratio, or each row has its own; never trained."""
    margins = normal(3, 3, N).abs() + 0.1
    batch, row = weights_of(margins, "batch"), weights_of(margins, "row")
    mean = margins.mean(1)
    ratio = mean[1:] / (mean[0] + mean[1:])
    assert close(batch[:, 0], modality_weights(ratio)) and row.shape == (2, N)
    assert close(
        row[:, 4], modality_weights(margins[1:, 4] / (margins[0] + margins[1:])[:, 4])
    )
    assert close(weights_of(margins, "none"), torch.ones(2, 1))
    assert not batch.requires_grad and not row.requires_grad


# ------------------------------------------------------------ CKD: the method


def ckd_by_hand(config, pair, teachers, users, lists, some, pairs):
    """CKD.8 in sums over blocks, with `scores` of each block; row by row if so asked."""
    names, parts = list(teachers), 1 + len(teachers)

    def blocks(of_users, of_lists):
        cut = [side.tensor_split(parts, 1) for side in pair]
        each = zip(*(part for part in cut), strict=True)
        return [
            margin(scores(u.contiguous(), i.contiguous(), of_users, of_lists))
            for u, i in each
        ]

    y, z = blocks(users, lists), blocks(some, pairs)
    inverse, specific, generic = [], [], []
    for n, m in enumerate(names, 1):
        lost, alone = y[n], y[0] + y[n]  # what y loses without m, and m alone
        if config.effect == "batch":
            lost, alone = lost.mean(), alone.mean()
        effect = (lost / alone).clamp(1e-8, 10.0)
        inverse.append(torch.ones(()) if config.effect == "none" else 1 / effect.detach())
        told = margin(scores(*teachers[m], users, lists))
        specific.append((told - y[0] - y[n]).clamp(min=0))
        other = margin(scores(*teachers[m], some, pairs))
        generic.append(pair_kd(z[0] + z[n], other, config.tau_generic))
    weights = [len(names) * c / sum(inverse) for c in inverse]
    first = sum((w * loss).mean() for w, loss in zip(weights, specific, strict=True))
    second = sum(w.mean() * loss for w, loss in zip(weights, generic, strict=True))
    scale = config.lambda_generic / config.tau_generic**2
    return {"specific_kd": config.lambda_specific * first, "generic_kd": scale * second}


@pytest.mark.parametrize("effect", ["batch", "row", "none"])
def test_ckd_is_what_it_says(tiny, batch, effect):
    """By value, so by the teachers that are passed in, each for its own modality."""
    users, lists = batch
    teachers = some_teachers(tiny)
    own = {"effect": effect, "tau_generic": 0.5, "pairs_generic": 50}
    method, student = made(CKD, tiny, teachers=teachers, **own)
    some, pairs = method.draw("cpu")
    method.draw = lambda _: (some, pairs)
    pair = student()
    found = terms(method, student, users, lists)
    del teachers["joint"]
    told = ckd_by_hand(method.config, pair, teachers, users, lists[:, :2], some, pairs)
    for name, loss in told.items():
        assert close(found[name], loss, rtol=1e-4), name
        ours, theirs = (gradient(one, student.user) for one in (found[name], told[name]))
        assert close(ours, theirs, atol=1e-6), name


def test_ckd_draws_other_pairs_at_each_step(tiny, batch):
    method, student = made(CKD, tiny, lambda_specific=0.0)
    torch.manual_seed(5)
    first, second = (terms(method, student, *batch)["generic_kd"] for _ in range(2))
    assert first != second
    users, items = method.draw("cpu")
    assert (len(users), items.shape) == (1000, (1000, 2))
    assert (users.bincount() > 0).all() and (items.flatten().bincount() > 0).all()


@pytest.mark.parametrize("change", [{"blocks": False}, {"taught_by": "joint"}])
def test_ckd_ablations(tiny, batch, change):
    """One block for all: every mode is the whole. The joint teacher for every modality."""
    teachers = some_teachers(tiny)
    method, student = made(CKD, tiny, teachers=teachers, lambda_generic=0.0, **change)
    assert CKD.needs(method.config) == (change.get("taught_by", "alone"),)
    (loss,) = terms(method, student, *batch).values()
    if change == {"blocks": False}:
        own = margin(scores(*student(), *batch))
        told = [margin(scores(*teachers[m], *batch)) for m in tiny.features]
        expected = sum(specific_kd(own, t) for t in told)
        assert close(loss, method.config.lambda_specific * expected)
    else:
        assert all(pair is teachers["joint"] for pair in method.teachers)


@pytest.mark.parametrize("kind", [CKD, PRMKD, KDSR])
def test_a_term_of_weight_zero_is_absent(kind, tiny, batch):
    own = [name for name in kind.Settings.__annotations__ if name.startswith("lambda_")]
    none, student = made(kind, tiny, **dict.fromkeys(own, 0.0))
    assert not terms(none, student, *batch) and not none.modules
    for name in own:  # each λ scales its own term, and no other
        found = []
        for value in (1.0, 3.0):
            method, student = made(kind, tiny, **{name: value})
            torch.manual_seed(7)
            found.append(terms(method, student, *batch))
        scaled = [key for key in found[0] if close(found[1][key], 3 * found[0][key])]
        same = [key for key in found[0] if close(found[1][key], found[0][key])]
        assert len(scaled) == 1 and len(same) == len(found[0]) - 1
        assert scaled[0].removesuffix("_kd") in (name.removeprefix("lambda_"), "multi")


# ------------------------------------------------------------ PRM-KD: weights and loss

THREE = torch.tensor([[2.0, 1, 0], [1.0, 1, 0], [0.0, 1, 2]])[:, None]


def test_weights_by_hand():
    two = THREE[[0, 2]].log_softmax(-1)
    assert teacher_weights(two, 1.0, 0.0)[:, 0].tolist() == pytest.approx(
        [0.8808, 0.1192], abs=1e-4
    )
    three = THREE.log_softmax(-1)
    assert teacher_weights(three, 0.0, 1.0)[:, 0].tolist() == pytest.approx(
        [0.3352, 0.3705, 0.2943], abs=1e-4
    )


@given(seeds, st.integers(1, 5), st.floats(0, 3), st.floats(0, 4))
def test_laws_of_the_weights(seed, t, alpha, beta):
    logits = normal(seed, t, N, 6, scale=3.0)
    weights = teacher_weights(logits.log_softmax(-1), alpha, beta)
    assert weights.shape == (t, N) and not weights.requires_grad
    assert close(weights.sum(0), 1.0)
    order = torch.randperm(t, generator=rng(seed))
    assert close(
        teacher_weights(logits[order].log_softmax(-1), alpha, beta), weights[order]
    )
    others = 1 + torch.randperm(5, generator=rng(seed))
    moved = torch.cat([logits[..., :1], logits[..., others]], dim=-1) + 2.5
    assert close(teacher_weights(moved.log_softmax(-1), alpha, beta), weights)
    assert close(teacher_weights(logits.log_softmax(-1), 0.0, 0.0), weights * 0 + 1 / t)
    equal = logits[:1].expand(t, -1, -1).log_softmax(-1)
    assert close(teacher_weights(equal, alpha, beta), weights * 0 + 1 / t)


@given(seeds)
def test_two_confident_teachers_are_ca_mkd(seed):
    """w_t = (1 - softmax_t(CE_t)) / (T - 1), Zhang et al. 2022."""
    log_p = normal(seed, 2, N, 6).log_softmax(-1)
    theirs = 1 - (-log_p[..., 0]).softmax(0)
    assert close(teacher_weights(log_p, 1.0, 0.0), theirs)


@given(seeds, st.floats(0.1, 5))
def test_a_surer_teacher_has_more_weight(seed, more):
    logits = normal(seed, 3, N, 6).detach()
    surer = logits.clone()
    surer[1, :, 0] += more
    before, after = (
        teacher_weights(one.log_softmax(-1), 1.0, 0.0) for one in (logits, surer)
    )
    assert (after[1] > before[1]).all()


def test_the_divergence_is_bounded():
    """Teachers that share nothing are ln 2 apart, so 1 after division."""
    far = torch.tensor([[[1e4, -1e4]], [[-1e4, 1e4]]]).log_softmax(-1)
    assert several_teachers._divergence(far, 0).item() == pytest.approx(1.0)
    underflown = torch.tensor([[[-1e5, 0.0]], [[-2e5, 0.0]]]).log_softmax(-1)
    assert teacher_weights(underflown).isfinite().all()


@given(seeds, st.floats(0.3, 3), st.integers(1, 4))
def test_laws_of_the_multi_teacher_loss(seed, tau, t):
    student, logits = normal(seed, N, 6), normal(seed + 1, t, N, 6).detach()
    weights = torch.rand(t, N, generator=rng(seed), dtype=torch.float64).softmax(0)
    loss = multi_kd(student, logits, weights, tau)
    assert close(
        multi_kd(student, logits[:1], weights[:1] * 0 + 1, tau), kl(student, logits[0], tau)
    )
    equal = logits[:1].expand(t, -1, -1)
    assert close(multi_kd(student, equal, weights, tau), kl(student, logits[0], tau))
    assert close(multi_kd(student, logits, 3 * weights, tau), 3 * loss)
    mixture = (weights[..., None] * (logits / tau).softmax(-1)).sum(0).log() * tau
    assert close(
        gradient(loss, student), gradient(kl(student, mixture, tau), student), atol=1e-9
    )
    assert loss >= 0
    own = student.detach().expand(t, -1, -1)
    assert gradient(multi_kd(student, own, weights, tau), student).abs().max() < 1e-9
    y = logits.clone().requires_grad_()
    assert gradient(multi_kd(student, y, weights, tau), y) is not None


@given(seeds, st.integers(1, 4))
def test_modal_teachers_with_equal_weights_are_promptmm_without_disentangling(seed, m):
    """The second identity: the mean over m of `losses.kl`."""
    student, modal = normal(seed, N, 6), normal(seed + 1, m, N, 6)
    weights = teacher_weights(modal.log_softmax(-1), 0.0, 0.0)
    expected = torch.stack([kl(student, y) for y in modal]).mean()
    assert close(multi_kd(student, modal, weights), expected)


@pytest.mark.parametrize("shape", [(0, N, 6), (2, N, 1)])
def test_no_teacher_or_no_list_is_an_error(shape):
    with pytest.raises(ValueError, match="T ≥ 1 and K ≥ 2"):
        multi_kd(torch.zeros(shape[1:]), torch.zeros(shape), torch.zeros(shape[:2]))


# ------------------------------------------------------------ PRM-KD: the method


@pytest.mark.parametrize("name", ["visual", "text", "spectral", "lightgcn", "joint"])
def test_a_teachers_own_scale_is_nothing(name, tiny, batch, monkeypatch):
    """A hundred times louder: nothing changes; `joint` sets the scale of all."""
    teachers = some_teachers(tiny) | {"lightgcn": some_teachers(tiny, seed=3)["joint"]}
    if name == "spectral":
        loud = lambda *a: scaled(spectral(*a))  # noqa: E731
    scaled = lambda pair: (100 * pair[0], pair[1])  # noqa: E731
    found = []
    for louder in (False, True):
        given = dict(teachers)
        if louder and name == "spectral":
            monkeypatch.setattr(several_teachers, "spectral", loud)
        elif louder:
            given[name] = scaled(given[name])
        method, student = made(PRMKD, tiny, teachers=given)
        found.append(terms(method, student, *batch)["multi_kd"])
    assert close(*found, rtol=1e-4) == (name != "joint")


def test_the_scale_is_joints_in_any_order_and_for_any_pool(tiny, batch):
    teachers = some_teachers(tiny)
    backwards = dict(reversed(teachers.items()))
    pair = [
        terms(*made(PRMKD, tiny, teachers=one), *batch)["multi_kd"]
        for one in (teachers, backwards)
    ]
    assert close(*pair)
    method, _ = made(PRMKD, tiny, teachers=teachers, taught_by="modal")
    users, lists = method.sampler.epoch(rng(0), method.config.negatives)
    joint = several_teachers.size_of(teachers["joint"], users, lists)
    assert len(method.teachers) == 2
    for one in method.teachers:
        assert several_teachers.size_of(one, users, lists) == pytest.approx(joint, rel=1e-4)


def test_prm_kd_is_what_it_says(tiny, batch, monkeypatch):
    """Weights come from the teachers alone, not from the student; λ and τ² by value."""
    seen = []
    true = teacher_weights

    def watched(log_p, *rest):
        seen.append(log_p)
        return true(log_p, *rest)

    monkeypatch.setattr(several_teachers, "teacher_weights", watched)
    method, student = made(PRMKD, tiny, temperature=2.0, consistency=0.5)
    first = terms(method, student, *batch)["multi_kd"]
    told = torch.stack([scores(*pair, *batch) for pair in method.teachers])
    assert torch.equal(seen[0], (told / 2).log_softmax(-1))
    weights = true(seen[0], 1.0, 0.5)
    log_s = (scores(*student(), *batch) / 2).log_softmax(-1)
    each = (weights[..., None] * seen[0].exp() * (seen[0] - log_s)).sum((0, 2))
    assert close(first, 0.3 * 4 * each.mean(), rtol=1e-4)
    with torch.no_grad():
        student.item.mul_(-3)
    terms(method, student, *batch)
    assert torch.equal(seen[0], seen[1])


def test_the_spectral_teacher_is_the_svd(tiny):
    """A dense decomposition as the oracle; √deg on the items; the same twice."""
    pair = spectral(tiny.train, 6)
    matrix = tiny.train.toarray().astype(float)
    degrees = [np.sqrt(np.maximum(matrix.sum(axis), 1)) for axis in (1, 0)]
    u, s, v = np.linalg.svd(matrix / degrees[0][:, None] / degrees[1])
    expected = (u[:, :6] * s[:6]) @ v[:6] * degrees[1]
    assert np.allclose(pair[0] @ pair[1].T, expected, atol=1e-4)
    again = spectral(tiny.train, 6)
    assert torch.equal(pair[0], again[0]) and torch.equal(pair[1], again[1])
    assert spectral(tiny.train, 1000)[0].shape == (60, 39)


def test_the_curriculum_begins_with_the_often_seen(tiny, batch):
    """In epoch 1 of 4 a quarter of the edges; the kept rows' mean is the loss."""
    users, lists = batch
    state = {"epoch": 1}
    method, student = made(PRMKD, tiny, state=state, curriculum=4)
    degree = np.asarray(tiny.train.sum(1)).ravel(), np.asarray(tiny.train.sum(0)).ravel()
    row, column = tiny.train.nonzero()
    ease = np.sort(degree[0][row] * degree[1][column])[::-1]
    mask = method.taking_part(users, lists[:, 0])
    own = degree[0][users] * degree[1][lists[:, 0]]
    assert ((mask > 0).numpy() == (own >= ease[int(np.ceil(len(ease) / 4)) - 1])).all()
    assert mask.mean() == pytest.approx(1)
    kept = mask > 0
    state["epoch"] = 9
    whole = terms(method, student, users[kept], lists[kept])["multi_kd"]
    state["epoch"] = 1
    assert close(terms(method, student, users, lists)["multi_kd"], whole, rtol=1e-4)
    hard = terms(method, student, users[~kept], lists[~kept])["multi_kd"]
    assert hard == 0 and gradient(hard, student.item).isfinite().all()


def test_lists_end_in_the_teachers_best(tiny, batch):
    """The same best items as PromptMM's lists draw from; anew for each edge."""
    users, lists = batch
    teacher = some_teachers(tiny)["joint"]
    config = Config(list_pool=5, negatives=4, lambda_list=0.0)  # PromptMM's λ₃ says nothing
    run = Run(Path(), tiny, config, torch.device("cpu"), {})
    top = lists_of(run, teacher)
    found = with_drawn(top, users, lists[:, :2])
    assert torch.equal(found[:, :2], lists[:, :2]) and found.shape == (64, 6)
    ranked = teacher[0] @ teacher[1].T
    ranked[tiny.train.nonzero()] = -torch.inf
    best = ranked.topk(5).indices
    for user, items in zip(users.tolist(), found[:, 2:].tolist(), strict=True):
        assert set(items) <= set(best[user].tolist())
    assert not torch.equal(found, with_drawn(top, users, lists[:, :2]))
    assert made(PRMKD, tiny)[0].width == 2
    random, _ = made(PRMKD, tiny, list_items="random")
    assert random.width == 4 and random.extend(users, lists) is lists


# ------------------------------------------------------------ KDSR: losses


def cosines(x, i, j):
    return torch.nn.functional.cosine_similarity(x[i], x[j], dim=1)


@given(seeds)
def test_the_holistic_loss(seed):
    x, e = normal(seed, 9, 6), normal(seed + 1, 9, 6)
    i, j = (torch.randint(9, (N,), generator=rng(seed + n)) for n in (2, 3))
    loss = holistic_kd(cosines(e, i, j), cosines(x, i, j))
    turn, _ = torch.linalg.qr(normal(seed + 2, 6, 6).detach())
    k = torch.rand(9, 1, generator=rng(seed), dtype=torch.float64) + 0.1
    assert close(holistic_kd(cosines(k * e @ turn, i, j), cosines(x, i, j)), loss)
    assert close(holistic_kd(cosines(e, i, j), cosines(k * x @ turn, i, j)), loss)
    assert holistic_kd(cosines(x @ turn, i, j), cosines(x, i, j)) < 1e-12
    assert 0 <= loss <= 4
    assert close(holistic_kd(cosines(e, j, i), cosines(x, j, i)), loss)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masked_pairs_send_no_gradient(dtype):
    own = normal(0, 4)
    valid = torch.tensor([1, 0, 1, 0], dtype=dtype)
    teacher = torch.tensor([0.5, 1e30, 0.5, 0.5], dtype=torch.float64)
    loss = holistic_kd(own, teacher, valid)
    assert close(loss, (own[[0, 2]] - 0.5).square().mean())
    assert (gradient(loss, own)[[1, 3]] == 0).all()
    logits = normal(1, 4, 3)
    loss = dissected_kd(logits, torch.tensor([0, 1, 2, 0]), valid)
    assert (gradient(loss, logits)[[1, 3]] == 0).all() and loss > 0
    for none in (
        holistic_kd(own, own * 0, valid * 0),
        dissected_kd(logits, torch.tensor([0] * 4), valid * 0),
    ):
        assert none == 0
        parts = torch.autograd.grad(none, (own, logits), allow_unused=True)
        assert all(part is None or (part == 0).all() for part in parts)


@pytest.mark.parametrize(("width", "parts"), [(12, 8), (16, 8), (3, 8), (7, 1)])
def test_correlations_at_hand_are_the_cosines(width, parts):
    x = normal(0, 20, width).float().detach()
    x[3] = x[4, : width // 2] = 0
    filled = x.any(1)
    one = Modality(x, filled, KDSR.Settings(**SHORT, parts=parts))
    i, j = (torch.randint(20, (50,), generator=rng(n)) for n in (1, 2))
    content, relations = one.correlations(i, j)
    assert close(content, cosines(x, i, j), atol=1e-6)
    assert close(relations, sub_cosines(x[i], x[j], min(parts, width)), atol=1e-6)


@given(seeds, st.integers(1, 6), positive)
def test_cosines_of_parts(seed, parts, k):
    a, b = normal(seed, N, 6), normal(seed + 1, N, 6)
    found = sub_cosines(a, b, parts)
    assert found.shape == (N, parts) and found.abs().max() <= 1 + 1e-9
    if parts == 1:
        assert close(found[:, 0], torch.nn.functional.cosine_similarity(a, b))
    scale = torch.ones(6, dtype=torch.float64)
    scale[: len(scale.tensor_split(parts)[0])] = k  # the first part alone
    assert close(sub_cosines(k * a, b * scale, parts), found)
    empty = a.detach().clone()
    empty[:, : len(scale.tensor_split(parts)[0])] = 0
    assert (sub_cosines(empty, b, parts)[:, 0] == 0).all()
    with pytest.raises(ValueError, match="at most d_m"):
        sub_cosines(a, b, 7)


def inertia(points, centres) -> float:
    return float((points - centres[nearest(points, centres)]).square().sum())


@given(seeds, st.integers(1, 8))
def test_the_codebook(seed, codes):
    points = normal(seed, 30, 3).detach()
    by_steps = [codebook(points, codes, rng(seed), steps) for steps in (0, 1, 2, 5, 20)]
    errors = [inertia(points, centres) for centres in by_steps]
    assert all(a >= b - 1e-9 for a, b in zip(errors, errors[1:], strict=False))
    assert torch.equal(codebook(points, codes, rng(seed)), by_steps[-1])
    if codes == 1:
        assert close(by_steps[-1][0], points.mean(0))
    with pytest.raises(ValueError, match="at most 30"):
        codebook(points, 31, rng(0))
    distance = torch.cdist(points, by_steps[-1]).min(1).values
    assert close(distance.square().sum(), inertia(points, by_steps[-1]))


def test_a_code_without_members_stays():
    same = torch.ones(5, 2)
    assert torch.equal(codebook(same, 3, rng(0)), torch.ones(3, 2))


@given(seeds)
def test_the_dissected_loss(seed):
    logits = normal(seed, N, 4)
    code = torch.randint(4, (N,), generator=rng(seed))
    order = torch.randperm(4, generator=rng(seed))
    relabelled = order.argsort()[code]
    assert close(dissected_kd(logits[:, order], relabelled), dissected_kd(logits, code))
    assert close(dissected_kd(logits * 0, code), math.log(4))


# ------------------------------------------------------------ KDSR: content


@pytest.fixture
def holes(tiny):
    """40 % of the visual rows are empty; the text is whole."""
    x = tiny.features["visual"] + 3  # far from centred
    x[:16] = 0
    return replaced(tiny, features={"visual": x, "text": tiny.features["text"]})


def test_items_without_content_take_no_part(holes):
    x, filled = centred(torch.from_numpy(holes.features["visual"]))
    assert filled.sum() == 24 and (x[:16] == 0).all()
    assert x[16:].mean(0).abs().max() < 1e-6
    assert x[16:].norm(dim=1).square().mean() == pytest.approx(1, rel=1e-5)
    one = Modality(x, filled, KDSR.Settings(**SHORT))
    first, second = some_pairs(filled, 500)
    assert (first >= 16).all() and (second >= 16).all() and (first != second).all()
    i, j = torch.tensor([0, 20, 20, 20]), torch.tensor([20, 1, 20, 21])
    assert one.valid(i, j).tolist() == [False, False, False, True]
    e = normal(0, 40, 8).float().detach().requires_grad_()
    content, relations = one.correlations(i, j)
    valid = one.valid(i, j)
    loss = one.holistic(e[i], e[j], content, valid)
    loss = loss + one.dissected(e[i], e[j], relations, valid)
    moved = gradient(loss, e).abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == [20, 21]


def test_no_content_at_all_is_no_nan(tiny, batch):
    nothing = {"visual": np.zeros((40, 3), np.float32)}
    empty = replaced(tiny, features=nothing)
    method, student = made(KDSR, empty)
    assert all(loss == 0 for loss in terms(method, student, *batch).values())


def test_the_content_start_keeps_the_correlations(tiny):
    """With d ≥ rank: the cosines of the features side by side, not of whitened ones."""
    content = [centred(torch.from_numpy(x))[0] for x in tiny.features.values()]
    whole = torch.cat(content, dim=1)
    start = content_start(content, 64)
    i, j = (torch.randint(40, (200,), generator=rng(n)) for n in (0, 1))
    assert close(cosines(start, i, j), cosines(whole, i, j), atol=1e-4)
    deviation = start.square().mean().sqrt()
    assert deviation == pytest.approx((2 / (40 + 64)) ** 0.5, rel=1e-4)
    method, student = made(KDSR, tiny)
    assert torch.equal(student.item, content_start(content, 8))
    fresh, plain = made(KDSR, tiny, start="fresh")
    torch.manual_seed(0)
    assert torch.equal(plain.item, Student(tiny.train, fresh.config).item)


def test_labels_are_the_same_for_every_seed_and_epoch(tiny, tmp_path):
    """In the text, too, which is made when other random numbers have been drawn."""
    one, other = (made(KDSR, tiny, seed=seed)[0] for seed in (0, 1))
    trained = trained_for_an_epoch(KDSR, tiny, tmp_path, {})
    for three in zip(one.modalities, other.modalities, trained.modalities, strict=True):
        first, *others = (modality.centres for modality in three)
        assert all(torch.equal(first, centres) for centres in others)


# ------------------------------------------------------------ KDSR: the method


def test_history_is_of_the_user_and_of_training(tiny, batch):
    users, lists = batch
    method, _ = made(KDSR, tiny)
    drawn = torch.stack([method.history(users) for _ in range(200)])  # [200, B]
    for n, user in enumerate(users[:10].tolist()):
        assert set(drawn[:, n].tolist()) == set(tiny.train[user].indices)
    i, j = method.pairs(users, lists)
    assert torch.equal(i[:64], lists[:, 0]) and len(i) == 64 + 512
    assert (i[64:] != j[64:]).all() and len(set(j[64:].tolist())) == 40


def test_kdsr_is_what_it_says(tiny, batch):
    method, student = made(KDSR, tiny, pairs=32)
    i, j = method.pairs(*batch)
    method.pairs = lambda *_: (i, j)
    with torch.no_grad():
        for one in method.modalities:
            assert torch.equal(one.turn.weight, torch.eye(8))  # as it starts: turn it
            one.turn.weight.copy_(torch.linspace(-1, 1, 64).view(8, 8))
    found = terms(method, student, *batch)
    e, apart = student.item, i != j
    holistic, dissected = 0, 0
    features = [torch.from_numpy(x) for x in tiny.features.values()]
    for one, raw in zip(method.modalities, features, strict=True):
        x, _ = centred(raw)
        v = e @ one.turn.weight.T
        error = cosines(v, i, j) - cosines(x, i, j)
        holistic = holistic + error.square()[apart].mean()
        unit = e / e.norm(dim=1, keepdim=True)
        (w, b), (v, c) = ((one.classify[n].weight, one.classify[n].bias) for n in (0, 2))
        logits = ((unit[i] - unit[j]).abs() @ w.T + b).clamp(min=0) @ v.T + c
        code = nearest(sub_cosines(x[i], x[j], 8), one.centres)
        dissected = dissected - logits.log_softmax(1)[apart, code[apart]].mean()
    assert close(found["holistic_kd"], holistic, rtol=1e-4)
    assert close(found["dissected_kd"], 0.1 * dissected, rtol=1e-4)
    assert all(not one.parts.requires_grad for one in method.modalities)
    method.pairs = lambda *_: (j, i)
    swapped = terms(method, student, *batch)
    assert all(close(swapped[name], found[name]) for name in found)


def one_step(tiny, tmp_path, **settings):
    """How far the tables moved in one step: users, items."""
    config = KDSR.Settings(**SHORT | {"batch": 10_000, "epochs": 1} | settings)
    (tmp_path / str(len(list(tmp_path.iterdir())))).mkdir()
    folder = sorted(tmp_path.iterdir())[-1]
    seen = []

    def method(run, student, teachers):
        made = KDSR(run, student, teachers)
        seen.append((student, [w.detach().clone() for w in (student.user, student.item)]))
        return made

    train(Run(folder, tiny, config, torch.device("cpu"), {}), method, {})
    student, start = seen[0]
    moved = zip((student.user, student.item), start, strict=True)
    return [(now.detach() - then).abs() for now, then in moved]


def test_the_item_table_learns_slowly(tiny, tmp_path):
    """Adam's first step is the learning rate itself, whatever the gradient."""
    user, item = one_step(tiny, tmp_path, slow=4.0)
    assert user.max() == pytest.approx(5e-3, rel=1e-3)
    assert item.max() == pytest.approx(5e-3 / 4, rel=1e-3)


def test_isolated_items_move_by_uniform_pairs(tiny, tmp_path, monkeypatch):
    matrix = tiny.train.tolil()
    matrix[:, 5] = 0
    lonely = replaced(tiny, train=matrix.tocsr())
    lonely.train.eliminate_zeros()
    monkeypatch.setattr(data.Sampler, "negatives", lambda self, user, _: user * 0)
    _, item = one_step(lonely, tmp_path, l2=0.0)
    assert (item[5] > 0).any()
    whole = KDSR.pairs

    def of_history(self, users, lists):
        return tuple(part[:512] for part in whole(self, users, lists))

    monkeypatch.setattr(KDSR, "pairs", of_history)
    _, item = one_step(lonely, tmp_path, l2=0.0)
    assert (item[5] == 0).all()


# ------------------------------------------------------------ all three


@pytest.mark.parametrize("kind", [CKD, PRMKD, KDSR])
def test_nothing_extra_is_served(kind, tiny, tmp_path):
    """Tables of LightGCN's shape; what was trained beside stays behind."""
    config = kind.Settings(**SHORT)
    run = Run(tmp_path, tiny, config, torch.device("cpu"), {})
    user, item = train(run, kind, some_teachers(tiny))
    assert (user.shape, item.shape) == ((60, 8), (40, 8))
    stored = torch.load(tmp_path / "method.pt")
    student = Student(tiny.train, config)
    student.load_state_dict(
        {n.removeprefix("student."): w for n, w in stored.items() if "student" in n}
    )
    with torch.no_grad():
        assert torch.equal(student()[0], user)


@pytest.mark.parametrize("kind", [CKD, PRMKD])
def test_teachers_stay_frozen(kind, tiny, tmp_path):
    """An epoch moves neither what is passed in nor a copy; nothing is trained beside."""
    teachers = some_teachers(tiny)
    before = {name: (u.clone(), i.clone()) for name, (u, i) in teachers.items()}
    trained = trained_for_an_epoch(kind, tiny, tmp_path, teachers)
    fresh, _ = made(kind, tiny, teachers=before)
    assert trained.modules == {}
    for name, pair in teachers.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, before[name], strict=True))
    for pair, other in zip(trained.teachers, fresh.teachers, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(pair, other, strict=True))
        assert not any(part.requires_grad for part in pair)


def test_features_stay_frozen(tiny, tmp_path):
    """V^m and the classifiers learn, the features that supervise do not."""
    trained = trained_for_an_epoch(KDSR, tiny, tmp_path, {})
    fresh, _ = made(KDSR, tiny)
    assert set(trained.modules) == {"turn_0", "turn_1", "classify_0", "classify_1"}
    for one, other in zip(trained.modalities, fresh.modalities, strict=True):
        assert torch.equal(one.parts, other.parts) and not one.parts.requires_grad
        assert not torch.equal(one.turn.weight, other.turn.weight)


def test_settings_of_the_three_are_their_own():
    for module in (counterfactual, several_teachers, correlation):
        own = {
            name: one.metadata["of"]
            for name, one in module.Settings.__dataclass_fields__.items()
            if name in module.Settings.__annotations__
        }
        assert set(own.values()) == {"method"}

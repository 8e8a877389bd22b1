"""Propagation, prompt, teacher and student against dense, direct, readable references."""

import dataclasses
import itertools
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import TINY, replaced
from hypothesis import given, strategies as st
from scipy import sparse
from torch.autograd import gradcheck

import data
import evaluate
import promptmm
from losses import l2_penalty
from promptmm import (
    Config,
    Distillation,
    Graph,
    PromptModule,
    Run,
    Student,
    Teacher,
    adjacency,
    frozen_teacher,
    kd_terms,
    lightgcn,
    margin,
    scores,
    student_terms,
    teacher_terms,
)

TINY_DATA = data.synthetic(**TINY)


def dense_adjacency(train):
    """Â = D^-1/2 [[0, A], [Aᵀ, 0]] D^-1/2, entry by entry."""
    n_users, n_items = train.shape
    whole = np.zeros((n_users + n_items,) * 2)
    for u in range(n_users):
        for i in range(n_items):
            if train[u, i]:
                value = 1 / np.sqrt(train[u].sum() * train[:, i].sum())
                whole[u, n_users + i] = whole[n_users + i, u] = value
    return whole


@st.composite
def graphs(draw):
    """Random interactions, with users and items that have none."""
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    n_users, n_items = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    return (rng.random((n_users, n_items)) < draw(st.floats(0, 1))).astype(np.float32)


@given(graphs())
def test_adjacency_is_the_symmetric_normalisation(train):
    found = adjacency(sparse.csr_matrix(train)).toarray()
    assert np.allclose(found, dense_adjacency(train), atol=1e-6)
    assert np.allclose(found, found.T, atol=1e-7)


def test_users_read_items_and_items_read_users():
    """Errata C1: one user, who took the second of three items."""
    graph = Graph(sparse.csr_matrix([[0.0, 1.0, 0.0]]))
    assert graph.to_users(torch.tensor([[1.0], [10.0], [100.0]])).tolist() == [[10.0]]
    assert graph.to_items(torch.tensor([[7.0]])).tolist() == [[0.0], [7.0], [0.0]]


@given(graphs(), st.integers(0, 4))
def test_lightgcn_matches_dense_powers(train, layers):
    """The mean over layers; isolated nodes keep E^0 / (L + 1), no NaN (errata C17)."""
    n_users = len(train)
    x = torch.randn(sum(train.shape), 3, generator=torch.Generator().manual_seed(0))
    whole = torch.from_numpy(dense_adjacency(train)).float()
    powers = [x]
    for _ in range(layers):
        powers.append(whole @ powers[-1])
    expected = sum(powers) / (layers + 1)
    user, item = lightgcn(Graph(sparse.csr_matrix(train)), x[:n_users], x[n_users:], layers)
    assert torch.allclose(torch.cat([user, item]), expected, atol=1e-5)
    idle = whole.sum(1) == 0
    assert torch.allclose(torch.cat([user, item])[idle], x[idle] / (layers + 1), atol=1e-6)


@given(graphs(), st.integers(0, 99))
def test_the_sparse_product_is_torchs_own(train, seed):
    """Value and gradient against a dense product with autograd's backward pass."""
    n_users, n_items = train.shape
    generator = torch.Generator().manual_seed(seed)
    item = torch.randn(n_items, 3, generator=generator, requires_grad=True)
    weight = torch.randn(n_users, 3, generator=generator)
    dense_block = torch.from_numpy(dense_adjacency(train)).float()[:n_users, n_users:]
    found = []
    for product in (Graph(sparse.csr_matrix(train)).to_users(item), dense_block @ item):
        [gradient] = torch.autograd.grad((product * weight).sum(), item)
        found.append((product, gradient))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@given(
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(0, 99),
    st.sampled_from([5, 30, 2**19]),
)
def test_scores_are_gathered_inner_products(n_users, n_items, width, seed, cached):
    """Value and gradient against indexing, einsum and autograd; users and items repeat.

    Whole, in pieces, and in the smallest: that no cache may hold the batch changes nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    user = torch.randn(
        n_users, 3, generator=generator, dtype=torch.float64, requires_grad=True
    )
    item = torch.randn(
        n_items, 3, generator=generator, dtype=torch.float64, requires_grad=True
    )
    users = torch.randint(n_users, (7,), generator=generator)
    lists = torch.randint(n_items, (7, width), generator=generator)
    weight = torch.randn(7, width, generator=generator, dtype=torch.float64)
    gathered = torch.einsum("bd,bkd->bk", user[users], item[lists])
    found = []
    with mock.patch.object(promptmm, "CACHED", cached):
        for _, listed in promptmm.pieces(user, users, lists):
            assert 3 * listed.numel() <= cached + 3 * width  # a row at least
        for logits in (scores(user, item, users, lists), gathered):
            gradients = torch.autograd.grad((logits * weight).sum(), (user, item))
            found.append((logits, *gradients))
        assert gradcheck(lambda u, i: scores(u, i, users, lists), (user, item))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_propagation_gradient():
    train = sparse.csr_matrix(
        np.random.default_rng(0).random((4, 5)) < 0.5, dtype=np.float32
    )
    graph = Graph(train)
    graph.ui, graph.iu = graph.ui.double(), graph.iu.double()
    user, item = (
        torch.randn(n, 2, dtype=torch.float64, requires_grad=True) for n in (4, 5)
    )
    assert gradcheck(lambda u, i: lightgcn(graph, u, i, 2), (user, item))


# ------------------------------------------------------------ prompt


def components(x, dim):
    return data.tokens(x, *data.principal(x, dim), dim)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_tokens_are_whitened_components_with_fixed_signs(width, dim, seed):
    """Against a singular value decomposition, the largest entry of each positive."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((30, width)) * np.arange(1, width + 1)
    x -= x.mean(0)
    tokens = components(torch.from_numpy(x).float(), dim).numpy()
    kept = min(width, dim)
    assert tokens.shape == (30, dim)
    assert (tokens[:, kept:] == 0).all()
    assert np.allclose(tokens[:, :kept].T @ tokens[:, :kept] / 30, np.eye(kept), atol=1e-3)
    left, _, right = np.linalg.svd(x, full_matrices=False)
    peak = right[np.arange(len(right)), np.abs(right).argmax(1)]
    assert np.allclose(
        tokens[:, :kept], (left * np.sign(peak))[:, :kept] * np.sqrt(30), atol=1e-2
    )


def test_tokens_of_redundant_features_end_in_zeros():
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) @ torch.randn(2, 9)
    tokens = components(x - x.mean(0), 5)
    assert (tokens[:, 2:] == 0).all()
    assert tokens[:, :2].abs().max() > 0.5
    assert (components(torch.zeros(50, 3), 2) == 0).all()


def test_content_is_centred_over_the_rows_that_have_any():
    x = 1000 * torch.rand(40, 7) + 300
    x[5:9] = 0
    y = data.unit_rows(x)
    filled = x.any(1)
    assert (y[~filled] == 0).all()
    assert torch.allclose(y[filled].norm(dim=1), torch.ones(36))
    centred = x[filled] - x[filled].mean(0)
    assert torch.allclose(y[filled], centred / centred.norm(dim=1, keepdim=True), atol=1e-4)
    assert (data.unit_rows(torch.zeros(4, 3)) == 0).all()
    assert data.unit_rows(1e30 * x).isfinite().all()


def test_w_starts_at_the_principal_directions(tiny, config):
    """Before training f^m is x^m turned, or its principal part: the fusion's profiles."""
    plain = dataclasses.replace(config, lambda_prompt=0.0)
    whole, cut = (
        Teacher(tiny, dataclasses.replace(plain, dim_teacher=d)).eval() for d in (64, 5)
    )
    for m, x in whole.features.items():
        f = whole.reduced()[m]
        assert torch.allclose(f @ f.T, x @ x.T, atol=1e-5)
        _, _, right = torch.linalg.svd(x, full_matrices=False)
        part = cut.reduced()[m]
        assert part.shape == (40, 5)
        assert torch.allclose(part @ part.T, x @ right[:5].T @ right[:5] @ x.T, atol=1e-4)


def direct_reduction(teacher, m, index):
    """Eq. 4 as it is written: p, then p^m [I, d_m], then (x^m + λ₁ p^m) W^m + b^m."""
    x, layer = teacher.features[m], teacher.reduction[index]
    p = teacher.prompt(teacher.tokens)
    p_m = p @ (p.T @ x)
    p_m = p_m * x.norm() / p_m.norm()
    return (x + teacher.config.lambda_prompt * p_m) @ layer.weight.T + layer.bias


def check_same_reduction(teacher, direct):
    """f^m fast against direct, to 1e-5 relative: value, and gradient of the prompt."""
    with torch.no_grad():
        teacher.prompt.bias.normal_()
    written = {m: direct(teacher, m, i) for i, m in enumerate(teacher.features)}
    weights = {m: torch.randn(f.shape) for m, f in written.items()}
    both = []
    for reduced in (teacher.reduced(), written):
        total = sum((reduced[m] * weights[m]).sum() for m in reduced)
        gradients = torch.autograd.grad(total, list(teacher.prompt.parameters()))
        both.append((reduced, gradients))
    (fast, fast_gradients), (direct, gradients) = both
    for m in fast:
        assert (fast[m] - direct[m]).norm() <= 1e-5 * direct[m].norm()
    for a, b in zip(fast_gradients, gradients, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("tokens", ["mean", "concat"])
def test_fast_reduction_is_the_direct_one(tokens, tiny, config):
    config = dataclasses.replace(config, tokens=tokens, lambda_prompt=3.0)
    check_same_reduction(Teacher(tiny, config).eval(), direct_reduction)


def test_the_prompt_product_never_needs_an_item_by_item_matrix(tiny, config):
    """(ppᵀ)x as printed, p(pᵀx) as computed (errata P9): the teacher adds the same."""
    teacher = Teacher(tiny, dataclasses.replace(config, lambda_prompt=1.0)).eval()
    without = Teacher(tiny, dataclasses.replace(config, lambda_prompt=0.0)).eval()
    without.load_state_dict(teacher.state_dict())
    p = teacher.prompt(teacher.tokens)
    for (m, x), layer in zip(teacher.features.items(), teacher.reduction, strict=True):
        printed = (p @ p.T) @ x
        printed = printed * x.norm() / printed.norm()
        added = teacher.reduced()[m] - without.reduced()[m]
        assert torch.allclose(added, printed @ layer.weight.T, atol=1e-5)
        assert added.abs().max() > 1e-3


@given(
    st.floats(0.01, 5),
    st.integers(0, 99),
    st.sampled_from([["visual"], ["visual", "text"]]),
)
def test_lambda_1_is_the_prompts_share(weight, seed, modalities):
    """‖λ₁ p^m‖ = λ₁ ‖x^m‖ for any prompt and any number of modalities; share is printed."""
    torch.manual_seed(seed)
    chosen = {m: TINY_DATA.features[m] for m in modalities}
    teacher = Teacher(
        replaced(TINY_DATA, features=chosen), Config(dim=8, lambda_prompt=weight)
    ).eval()
    with torch.no_grad():
        teacher.prompt.bias.normal_()
        p, layers = teacher.prompt(teacher.tokens), teacher.fixed()
    for m, x in teacher.features.items():  # W^m is a rotation still: norms are x's
        added = teacher.shift(m, layers[m], p).norm()
        assert added.item() == pytest.approx(weight * x.norm().item(), rel=1e-3)
    assert teacher.prompt_share() == pytest.approx(weight, rel=1e-3)


def test_a_row_without_content_stays_zero(tiny, config):
    """Not the bias, nor the prompt: such rows would be propagated as one vector."""
    x = tiny.features["visual"].copy()
    x[3:6] = 0
    teacher = Teacher(replaced(tiny, features={"visual": x}), config)
    with torch.no_grad():
        teacher.reduction[0].bias += 1.0
        teacher.prompt.bias += 1.0
    for training in (True, False):  # with dropout, and without
        f = teacher.train(training).reduced()["visual"]
        assert (f[3:6] == 0).all()
        assert (f[6:] != 0).any(1).all()


@given(st.integers(0, 10**6), st.floats(0, 50))
def test_with_one_modality_the_prompt_is_a_change_of_w(seed, weight):
    """(x + λ₁ p^m) W + b = x W' + b' for any Θ and any λ₁, so it adds nothing that W lacks.

    Tokens are T = X B, so with Θ = [Θ_W; b_P], p = X B Θ_W + 1 b_Pᵀ, s the scale of p^m:
    W' = W + λ₁ s B Θ_W (pᵀX) W and b' = b + λ₁ s b_Pᵀ (pᵀX) W.
    """
    dataset = replaced(TINY_DATA, features={"visual": TINY_DATA.features["visual"]})
    torch.manual_seed(seed)
    teacher = Teacher(dataset, Config(dim=8, lambda_prompt=weight)).eval()
    with torch.no_grad():
        teacher.prompt.bias.normal_()
    x = teacher.features["visual"].double()  # [I, d_m]
    basis = torch.linalg.lstsq(x, teacher.tokens.double()).solution  # B [d_m, d]
    theta, shift = (part.detach().double() for part in teacher.prompt.parameters())
    w, b = (part.detach().double() for part in teacher.reduction[0].parameters())
    p = teacher.prompt(teacher.tokens).detach().double()  # [I, d]
    scale = weight * x.norm() / (p @ (p.T @ x)).norm()
    content = scale * p.T @ x @ w.T  # λ₁ s pᵀX W  [d, d_T]
    w_new = w.T + basis @ theta.T @ content
    b_new = b + shift @ content
    prompted = teacher.reduced()["visual"].double()
    assert (prompted - (x @ w_new + b_new)).norm() <= 1e-4 * prompted.norm()


def test_a_margin_is_the_positives_lead():
    assert margin(torch.tensor([[3.0, 1.0, 9.0], [0.0, 2.0, 9.0]])).tolist() == [2.0, -2.0]


def test_prompt_module_is_one_linear_layer():
    module = PromptModule(5, 3)
    tokens = torch.randn(7, 5)
    assert torch.equal(
        module(tokens), torch.nn.functional.linear(tokens, *module.parameters())
    )
    assert sum(p.numel() for p in module.parameters()) == 5 * 3 + 3


# ------------------------------------------------------------ teacher and student


def unit(x):
    return x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)


def test_teacher_matches_dense_algebra(tiny, config):
    """Eq. 1, dense: F_i of f + Â_iu Â_ui f, F_u = Â_ui F_i; weighted sum of z-scores."""
    ids = torch.randn(60, 8), torch.randn(40, 8)
    teacher = Teacher(tiny, config, "cpu", ids).eval()
    teacher.weights.copy_(torch.tensor([0.7, 0.2]))
    with torch.no_grad():
        found = teacher()
        reduced = teacher.reduced()
    block = torch.from_numpy(dense_adjacency(tiny.train.toarray())).float()[:60, 60:]
    total = 0
    rankings = [(1.0, ids[0] @ ids[1].T)]
    for (m, f), weight in zip(reduced.items(), (0.7, 0.2), strict=True):
        item = unit(unit(f) + unit(block.T @ (block @ f)))
        user = unit(block @ item)
        assert torch.allclose(found.user_modal[m], user, atol=1e-5)
        assert torch.allclose(found.item_modal[m], item, atol=1e-5)
        rankings.append((weight, user @ item.T))
    for weight, ranking in rankings:
        total = total + weight * ranking / ranking.std(1, keepdim=True, correction=0)
    assert torch.allclose(found.teacher_user @ found.teacher_item.T, total, atol=1e-3)


def test_a_modality_of_weight_zero_takes_no_part(tiny, config):
    teacher = Teacher(tiny, config).eval()
    teacher.weights.copy_(torch.tensor([0.0, 0.5]))
    encoded = teacher()
    assert list(encoded.item_modal) == list(tiny.features)[1:]
    assert not teacher.knows_no_more()
    teacher.weights.zero_()
    assert teacher.knows_no_more()
    user, item = teacher()[:2]
    assert user.shape[1] == item.shape[1] == 8


def test_stage_two_reduces_what_weighs_anything_alone(tiny, config, monkeypatch):
    """With a tuned prompt Eq. 4 is computed at each step: not for a weight of zero."""
    config = dataclasses.replace(config, tune_prompt=True)
    teacher = Teacher(tiny, config)
    teacher.weights.copy_(torch.tensor([0.0, 0.5]))
    encode = frozen_teacher(teacher, config)
    reduced = []
    whole = Teacher.reduce

    def watched(self, m, *rest):
        reduced.append(m)
        return whole(self, m, *rest)

    monkeypatch.setattr(Teacher, "reduce", watched)
    encode()
    assert reduced == list(tiny.features)[1:]


def test_an_item_that_was_never_trained_is_reached_by_its_content(tiny, config):
    """Its ids say nothing; its content lets it into a list, high up where it fits."""
    never = np.flatnonzero(np.asarray(tiny.train.sum(0)).ravel() == 0)
    assert len(never)
    teacher = Teacher(tiny, config).eval()
    f = teacher.reduced()["visual"]
    _, item = teacher.propagate(f)
    assert torch.allclose(item.norm(dim=1), torch.ones(len(item)))  # as long as any other
    direction = f[never] / f[never].norm(dim=1, keepdim=True)
    assert torch.allclose(item[never], direction, atol=1e-6)


def test_the_edge_itself_is_left_out_of_stage_1(tiny, config):
    """y of (u, i+) equals that of a graph without the edge, its other weights kept."""
    teacher = Teacher(tiny, config).eval()
    users, lists = data.Sampler(tiny.train).epoch(torch.Generator().manual_seed(0))
    users, lists = users[:5], lists[:5]
    found = teacher_terms(teacher, users, lists)
    block = torch.from_numpy(dense_adjacency(tiny.train.toarray())).float()[:60, 60:]
    for m, f in teacher.reduced().items():
        losses = []
        for u, (i, j) in zip(users.tolist(), lists.tolist(), strict=True):
            without = block.clone()
            without[u, i] = 0
            taken = without[u] @ f @ (f[i] + without[:, i] @ (without @ f))
            other = block[u] @ f @ (f[j] + block[:, j] @ (block @ f))
            margin_ = (taken - other) / teacher.size[m]
            losses.append(-torch.nn.functional.logsigmoid(margin_))
        expected = torch.stack(losses).mean().item()
        assert found[f"bpr_{m}"].item() == pytest.approx(expected, rel=1e-4)


def test_an_edge_between_two_that_are_very_popular():
    """The product of their degrees is beyond an int32."""
    n = 50_000
    users = np.r_[np.zeros(n, int), np.arange(1, n)]
    items = np.r_[np.arange(n), np.zeros(n - 1, int)]
    train = sparse.csr_matrix((np.ones(len(users), np.float32), (users, items)))
    edge = promptmm.Graph(train, "cpu").edge(torch.tensor([0]), torch.tensor([0]))
    assert edge.item() == pytest.approx(1 / n)


def test_what_is_computed_once_changes_nothing(tiny, config):
    teacher = Teacher(tiny, config).eval()
    for a, b in zip(teacher()[:2], teacher(teacher.fixed())[:2], strict=True):
        assert torch.equal(a, b)


def test_any_modalities(tiny, config):
    x = tiny.features["visual"]
    names = {"smell": x, "taste.v2": x[:, :3], "touch": x + np.eye(40, 24)}
    teacher = Teacher(replaced(tiny, features=names), config)
    assert list(teacher().item_modal) == list(names)


def test_dropout_only_in_training(tiny, config):
    teacher = Teacher(tiny, config)
    first, second = teacher.reduced()["text"], teacher.reduced()["text"]
    assert not torch.equal(first, second)
    share = (first == 0).float().mean().item()
    assert 0.2 < share < 0.4
    teacher.eval()
    whole = teacher.reduced()["text"]
    assert torch.equal(whole, teacher.reduced()["text"])
    kept = first != 0
    assert torch.allclose(first[kept], whole[kept] / (1 - config.dropout), rtol=1e-4)


def test_every_parameter_has_its_own_storage(tiny, config):
    """Errata C7: the released student's two tables are one."""
    models = Teacher(tiny, config), Student(tiny.train, config), Student(tiny.train, config)
    pointers = [p.data_ptr() for model in models for p in model.parameters()]
    assert len(set(pointers)) == len(pointers)
    student = models[1]
    before = student.item.detach().clone()
    with torch.no_grad():
        student.user += 1
    assert torch.equal(student.item, before)


@pytest.mark.parametrize(
    "users, items, dim, printed",
    [
        (43_739, 17_239, 32, 1_951_296),  # Table 8
        (41_691, 21_479, 64, 4_042_880),  # Table 9
    ],
)
def test_student_parameter_counts_of_tables_8_and_9(users, items, dim, printed):
    student = Student(sparse.csr_matrix((users, items), dtype=np.float32), Config(dim=dim))
    assert sum(p.numel() for p in student.parameters()) == printed


def test_teacher_parameter_count(tiny, config):
    """A d_m x d_T reduction a modality, the prompt; ids and features are no parameters."""
    teacher = Teacher(tiny, config)
    expected = (24 * 24 + 24) + (12 * 12 + 12) + (8 * 8 + 8)
    assert sum(p.numel() for p in teacher.parameters()) == expected
    names = {name for name, _ in teacher.named_parameters()}
    assert set(teacher.state_dict()) == names | {"user", "item", "weights"}


# ------------------------------------------------------------ objectives


TERMS = {"pair_kd": "lambda_pair", "list_kd": "lambda_list", "embed_kd": "lambda_embed"}


@pytest.fixture
def frozen(tiny, config):
    """A teacher as stage 2 sees it, its prompt trainable."""
    torch.manual_seed(1)
    ids = torch.randn(60, 8), torch.randn(40, 8)
    teacher = Teacher(tiny, config, "cpu", ids).eval().requires_grad_(False)
    teacher.prompt.requires_grad_(True)
    return teacher


@pytest.fixture
def project():
    """Maps from d = 8 to the width of each modality's F_i."""
    return torch.nn.ModuleList(torch.nn.Linear(8, d_t) for d_t in (24, 12))


@pytest.mark.parametrize("name", TERMS)
def test_each_distillation_reaches_student_and_prompt(
    name, frozen, tiny, config, batch, project
):
    """Through the frozen teacher to θ_P, never to θ_T (errata C4, P11)."""
    student = Student(tiny.train, config)
    terms = student_terms(student, config, frozen(frozen.fixed()), *batch, project)
    assert set(terms) == {"bpr", "l2", *TERMS, "prompt_anchor"}
    terms[name].backward()
    assert student.item.grad.abs().max() > 0
    assert student.user.grad.abs().max() > 0  # EmbKD speaks of items, but E_i reads E_u
    assert all(p.grad.abs().max() > 0 for p in frozen.prompt.parameters())
    assert all(
        p.grad is None for n, p in frozen.named_parameters() if not n.startswith("prompt")
    )


@pytest.mark.parametrize("term", ["pair_kd", "prompt_anchor"])
def test_a_tuned_prompts_gradient_is_exact_but_for_the_yardstick(term, tiny, monkeypatch):
    """Against central differences, along one direction of θ_P (errata C4).

    It is the slope with δ_u held where it is; as δ_u moves too, the true one is another.
    """
    config = Config(dim=8, dim_teacher=8, tune_prompt=True, lambda_embed=0.0)
    torch.manual_seed(0)
    ids = tuple(torch.randn(n, 8) for n in tiny.train.shape)
    teacher = Teacher(tiny, config, ids=ids).double()
    for kept in (teacher.features, teacher.cross):
        kept.update({m: x.double() for m, x in kept.items()})
    teacher.tokens = teacher.tokens.double()
    for block in ("ui", "iu"):
        setattr(teacher.graph, block, getattr(teacher.graph, block).double())
    encode = frozen_teacher(teacher, config)
    users, lists = data.Sampler(tiny.train).epoch(torch.Generator().manual_seed(0), 1)
    student = torch.randn(lists.shape, dtype=torch.float64)
    theta = teacher.prompt.weight
    direction = torch.randn_like(theta)

    def loss() -> torch.Tensor:
        encoded = encode()
        terms = kd_terms(config, student, student, users, lists, encoded, ())
        return terms[term]

    def slope(step: float = 1e-6) -> float:
        start, ends = theta.data.clone(), []
        for end in (step, -step):
            theta.data = start + end * direction
            ends.append(loss().item())
        theta.data = start
        return (ends[0] - ends[1]) / (2 * step)

    [gradient] = torch.autograd.grad(loss(), theta)
    ours = (gradient * direction).sum().item()
    moving = slope()
    sizes = []

    def measured(pair):
        sizes.append(evaluate.deviation(*pair).detach())
        return pair[0] / sizes[-1], pair[1]

    monkeypatch.setattr(promptmm, "one_scale", measured)
    loss()
    held = itertools.cycle(sizes.copy())
    monkeypatch.setattr(promptmm, "one_scale", lambda pair: (pair[0] / next(held), pair[1]))
    assert ours == pytest.approx(slope(), rel=1e-5)
    assert abs(ours - moving) > 0.01 * abs(moving)


def test_only_distillation_and_anchor_move_the_prompt(frozen, tiny, config, batch, project):
    terms = student_terms(Student(tiny.train, config), config, frozen(), *batch, project)
    for name, term in terms.items():
        reaches = any(
            g is not None
            for g in torch.autograd.grad(
                term, list(frozen.prompt.parameters()), retain_graph=True, allow_unused=True
            )
        )
        assert reaches == (name in {*TERMS, "prompt_anchor"}), name


def test_weights_scale_their_terms_and_zero_removes_them(
    frozen, tiny, config, batch, project
):
    student, encoded = Student(tiny.train, config), frozen()
    once = student_terms(student, config, encoded, *batch, project)
    for name, weight in {**TERMS, "prompt_anchor": "weight_anchor", "l2": "l2"}.items():
        double = dataclasses.replace(config, **{weight: 2 * getattr(config, weight)})
        twice = student_terms(student, double, encoded, *batch, project)
        assert twice[name].item() == pytest.approx(2 * once[name].item(), rel=1e-5)
        without = student_terms(
            student, dataclasses.replace(config, **{weight: 0.0}), encoded, *batch, project
        )
        assert set(once) - set(without) == {name}
    assert set(student_terms(student, config, None, *batch)) == {"bpr", "l2"}


@pytest.mark.parametrize("source", ["joint", "modal", "both"])
def test_terms_are_the_losses_of_the_paper(source, frozen, tiny, config, batch, project):
    """Eq. 12 once more, from embeddings and the loss functions, modality by modality."""
    from losses import bpr_loss, embed_kd, list_kd, pair_kd

    config = dataclasses.replace(
        config, temperature=2.0, alpha=0.5, beta=3.0, gamma=1.5, list_from=source
    )
    student, encoded, (users, lists) = Student(tiny.train, config), frozen(), batch
    with torch.no_grad():  # as after some training: logits near 1, not near 0
        student.user *= 10
        student.item *= 10

    def logits(user, item):
        return torch.stack(
            [user[u] @ item[row].T for u, row in zip(users, lists, strict=True)]
        )

    user, item = student()
    y, y_t = logits(user, item), logits(encoded.teacher_user, encoded.teacher_item)
    modal = [logits(encoded.user_modal[m], encoded.item_modal[m]) for m in tiny.features]
    told = {"joint": [y_t], "modal": modal, "both": [y_t, *modal]}[source]
    drawn = lists[:, 1]  # uniform items
    expected = {
        "bpr": bpr_loss(y[:, 0], y[:, 1]),
        "l2": config.l2
        * l2_penalty(
            student.user[users], student.item[lists[:, 0]], student.item[lists[:, 1]]
        ),
        "pair_kd": config.lambda_pair
        * pair_kd(y[:, 0] - y[:, 1], y_t[:, 0] - y_t[:, 1], 2.0),
        "list_kd": config.lambda_list * sum(list_kd(y, t, 0.5, 3.0, 2.0) for t in told),
        "embed_kd": config.lambda_embed
        * sum(
            embed_kd(linear(item)[drawn], f[drawn], 1.5)
            for linear, f in zip(project, encoded.item_modal.values(), strict=True)
        ),
        "prompt_anchor": config.weight_anchor * bpr_loss(y_t[:, 0], y_t[:, 1]),
    }
    found = student_terms(student, config, encoded, users, lists, project)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-4), name


def test_stage_1_trains_everything(tiny, config, batch):
    teacher = Teacher(tiny, config)
    users, lists = batch
    terms = teacher_terms(teacher, users, lists[:, :2])
    assert set(terms) == {"bpr_visual", "bpr_text"}
    sum(terms.values()).backward()
    for name, parameter in teacher.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_without_prompt_it_is_left_out(tiny, config):
    """λ₁ = 0: f^m = x^m W^m + b^m."""
    teacher = Teacher(tiny, dataclasses.replace(config, lambda_prompt=0.0)).eval()
    for (m, x), layer in zip(teacher.features.items(), teacher.reduction, strict=True):
        assert torch.allclose(teacher.reduced()[m], layer(x), atol=1e-6)


def test_another_width_is_mapped_on_the_students_side(frozen, tiny, config, batch, project):
    """Errata P7; the target stays as it is."""
    student = Student(tiny.train, config)
    terms = student_terms(student, config, frozen(), *batch, project)
    terms["embed_kd"].backward()
    assert all(p.grad.abs().max() > 0 for p in project.parameters())


def test_alpha_zero_leaves_the_positive_out(frozen, tiny, config, batch, project):
    """α = 0 is no default for 1: whatever the positive's logit, ListKD stays the same."""
    logits = torch.randn(64, 4, requires_grad=True)
    listed = dataclasses.replace(config, alpha=0.0)
    told = logits, torch.randn(40, 8), *batch, frozen(), project
    found = kd_terms(listed, *told)["list_kd"]
    [gradient] = torch.autograd.grad(found, logits)
    assert (gradient[:, 0] == 0).all() and gradient[:, 1:].abs().max() > 0
    whole = kd_terms(dataclasses.replace(config, alpha=1.0), *told)["list_kd"]
    [gradient] = torch.autograd.grad(whole, logits)
    assert gradient[:, 0].abs().max() > 0


def test_logits_of_stage_2_have_one_scale(tiny, config):
    """The teacher's own deviation over users and items is 1, however loud its content."""
    for loud in (1.0, 1000.0):
        features = {m: loud * x for m, x in tiny.features.items()}
        ids = torch.randn(60, 8), torch.randn(40, 8)
        teacher = Teacher(replaced(tiny, features=features), config, "cpu", ids)
        encoded = frozen_teacher(teacher, config)()
        pairs = [encoded[:2]]
        pairs += [(user, encoded.item_modal[m]) for m, user in encoded.user_modal.items()]
        for user, item in pairs:
            deviation = (user @ item.T).std(1, correction=0)
            assert deviation.square().mean().sqrt().item() == pytest.approx(1, rel=1e-3)


def test_lists_hold_the_teachers_best_and_no_training_positive(tiny, config, tmp_path):
    """P14: drawn from each user's N best of E^T; column 0 and 1 stay as sampled."""
    run = Run(tmp_path, tiny, dataclasses.replace(config, list_pool=6), "cpu", {})
    ids = torch.randn(60, 8), torch.randn(40, 8)
    teacher = Teacher(tiny, config, "cpu", ids)
    taught = Distillation(run, frozen_teacher(teacher, config))
    taught.refresh()
    users, pairs = data.Sampler(tiny.train).epoch(torch.Generator().manual_seed(0))
    lists, told = taught.draw(users)
    assert lists.shape == (len(users), config.negatives) and taught.width == 2
    encoded = taught.encode()
    logits = encoded.teacher_user @ encoded.teacher_item.T
    assert torch.allclose(told, logits[users[:, None], lists], atol=1e-5)
    logits[torch.from_numpy(tiny.train.toarray()) > 0] = -torch.inf
    best = logits.topk(6).indices
    for u, row in zip(users.tolist(), lists.tolist(), strict=True):
        assert set(row) <= set(best[u].tolist())
    assert len(torch.unique(lists)) > 6
    other = dataclasses.replace(config, list_items="random")
    random = Distillation(dataclasses.replace(run, config=other), taught.encode)
    assert random.width == 1 + config.negatives and not random.from_top


@pytest.mark.parametrize("tune", [False, True])
def test_known_logits_change_nothing(tune, tiny, config, tmp_path, monkeypatch):
    """Looked up with the prompt frozen, computed with it tuned: the same terms."""
    config = dataclasses.replace(config, tune_prompt=tune, dropout=0.0)
    run = Run(tmp_path, tiny, config, "cpu", {})
    teacher = Teacher(tiny, config, "cpu", (torch.randn(60, 8), torch.randn(40, 8)))
    taught = Distillation(run, frozen_teacher(teacher, config))
    taught.refresh()
    with torch.no_grad():  # a step later a tuned prompt is another, a frozen one is not
        teacher.prompt.weight += tune * torch.randn_like(teacher.prompt.weight)
    student = Student(tiny.train, config)
    users, pairs = data.Sampler(tiny.train).epoch(torch.Generator().manual_seed(0))
    torch.manual_seed(3)
    found = taught.terms(student, users, pairs)
    torch.manual_seed(3)
    lists = torch.cat([pairs, taught.draw(users)[0]], dim=1)
    encoded = taught.encode()
    expected = student_terms(student, config, encoded, users, lists, taught.project)
    assert found.keys() == expected.keys()
    for name, term in expected.items():
        assert found[name].item() == pytest.approx(term.item(), rel=1e-4, abs=1e-7), name

"""Propagation, prompt, teacher and student against dense, direct, readable references."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import TINY, replaced
from hypothesis import given, strategies as st
from scipy import sparse
from torch.autograd import gradcheck

import data
from losses import l2_penalty
from promptmm import (
    Config,
    Graph,
    PromptModule,
    Student,
    Teacher,
    adjacency,
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


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_scores_are_gathered_inner_products(n_users, n_items, width, seed):
    """Value and gradient against indexing, einsum and autograd; users and items repeat."""
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
    for logits in (scores(user, item, users, lists), gathered):
        gradients = torch.autograd.grad((logits * weight).sum(), (user, item))
        found.append((logits, *gradients))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)
    assert gradcheck(lambda u, i: scores(u, i, users, lists), (user, item))


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


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_tokens_are_whitened_components_with_fixed_signs(width, dim, seed):
    """Against a singular value decomposition, the largest entry of each positive."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((30, width)) * np.arange(1, width + 1)
    x -= x.mean(0)
    tokens = data.pca_tokens(torch.from_numpy(x).float(), dim).numpy()
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
    tokens = data.pca_tokens(x - x.mean(0), 5)
    assert (tokens[:, 2:] == 0).all()
    assert tokens[:, :2].abs().max() > 0.5
    assert (data.pca_tokens(torch.zeros(50, 3), 2) == 0).all()


def test_standardised_features_are_centred_with_unit_rows():
    x = 1000 * torch.rand(40, 7) + 300
    y = data.standardise(x)
    assert y.mean(0).abs().max() < 1e-5
    assert y.square().sum(1).mean().item() == pytest.approx(1, rel=1e-5)
    assert (data.standardise(torch.ones(4, 3)) == 0).all()


def direct_reduction(teacher, m, index):
    """Eq. 4 as it is written: p, then p^m [I, d_m], then (x^m + λ₁ p^m) W^m + b^m."""
    x, layer = teacher.features[m], teacher.reduction[index]
    p = teacher.prompt(teacher.tokens)
    p_m = p @ (p.T @ x) / len(p)
    return (x + teacher.config.lambda_prompt * p_m) @ layer.weight.T + layer.bias


def check_same_reduction(teacher, direct):
    """f^m fast against direct, to 1e-5 relative: value, and gradient of the prompt."""
    with torch.no_grad():
        teacher.prompt.bias.normal_()
    weights = {m: torch.randn(40, 8) for m in teacher.features}
    both = []
    written = {m: direct(teacher, m, i) for i, m in enumerate(teacher.features)}
    for reduced in (teacher().reduced, written):
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
        printed = (p @ p.T) @ x / len(x)
        added = teacher().reduced[m] - without().reduced[m]
        assert torch.allclose(added, printed @ layer.weight.T, atol=1e-5)
        assert added.abs().max() > 1e-3


@given(st.integers(0, 10**6), st.floats(0, 50))
def test_with_one_modality_the_prompt_is_a_change_of_w(seed, weight):
    """(x + λ₁ p^m) W + b = x W' + b' for any Θ and any λ₁, so it adds nothing that W lacks.

    Tokens are T = X B of centred X, so with Θ = [Θ_W; b_P] and C = XᵀX / |I|
    W' = W + λ₁ B Θ_W Θ_Wᵀ Bᵀ C W and b' = b + λ₁ b_Pᵀ Θ_Wᵀ Bᵀ C W.
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
    content = theta @ basis.T @ (x.T @ x / len(x)) @ w.T  # Θ_Wᵀ Bᵀ C W  [d, d]
    w_new = w.T + weight * basis @ theta.T @ content
    b_new = b + weight * shift @ content
    prompted = teacher().reduced["visual"].double()
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


@pytest.mark.parametrize("target", ["propagated", "mean", "reduced"])
def test_teacher_matches_dense_algebra(target, tiny, config):
    """Eq. 1, dense: F_u = Â_ui f, F_i = Â_iu F_u, E^T = LightGCN + c Σ unit rows."""
    config = dataclasses.replace(config, modal_target=target, fusion=0.7)
    teacher = Teacher(tiny, config).eval()
    with torch.no_grad():
        found = teacher()
    whole = torch.from_numpy(dense_adjacency(tiny.train.toarray())).float()
    x = torch.cat([teacher.user, teacher.item]).detach()
    expected = (x + whole @ x + whole @ whole @ x) / 3
    idle = torch.from_numpy(np.asarray(tiny.train.sum(0)).ravel() == 0)
    assert idle.any()
    for m, f in found.reduced.items():
        user = whole[:60, 60:] @ f
        item = torch.where(idle[:, None], f, whole[60:, :60] @ user)
        item = {"propagated": item, "mean": (item + f) / 2, "reduced": f}[target]
        assert torch.allclose(found.user_modal[m], user, atol=1e-5)
        assert torch.allclose(found.item_modal[m], item, atol=1e-5)
        modal = torch.cat([user, item])
        expected = expected + 0.7 * modal / modal.norm(dim=1, keepdim=True).clamp(min=1e-12)
    assert torch.allclose(torch.cat(found[:2]), expected, atol=1e-5)


def test_what_is_computed_once_changes_nothing(tiny, config):
    teacher = Teacher(tiny, config).eval()
    for a, b in zip(teacher()[:2], teacher(teacher.fixed())[:2], strict=True):
        assert torch.equal(a, b)


def test_any_modalities(tiny, config):
    x = tiny.features["visual"]
    names = {"smell": x, "taste.v2": x[:, :3], "touch": x + 1}
    teacher = Teacher(replaced(tiny, features=names), config)
    assert list(teacher().item_modal) == list(names)


def test_dropout_only_in_training(tiny, config):
    teacher = Teacher(tiny, config)
    first, second = teacher().reduced["text"], teacher().reduced["text"]
    assert not torch.equal(first, second)
    share = (first == 0).float().mean().item()
    assert 0.2 < share < 0.4
    teacher.eval()
    whole = teacher().reduced["text"]
    assert torch.equal(whole, teacher().reduced["text"])
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
    """Tables, a d_m x d reduction a modality, the prompt; features are no parameters."""
    teacher = Teacher(tiny, config)
    expected = (60 + 40) * 8 + (24 * 8 + 8) + (12 * 8 + 8) + (8 * 8 + 8)
    assert sum(p.numel() for p in teacher.parameters()) == expected
    assert set(teacher.state_dict()) == {name for name, _ in teacher.named_parameters()}


# ------------------------------------------------------------ objectives


TERMS = {"pair_kd": "lambda_pair", "list_kd": "lambda_list", "embed_kd": "lambda_embed"}


@pytest.fixture
def frozen(tiny, config):
    """A teacher as stage 2 sees it, its prompt trainable."""
    torch.manual_seed(1)
    teacher = Teacher(tiny, config).eval().requires_grad_(False)
    teacher.prompt.requires_grad_(True)
    return teacher


@pytest.mark.parametrize("name", TERMS)
def test_each_distillation_reaches_student_and_prompt(name, frozen, tiny, config, batch):
    """Through the frozen teacher to θ_P, never to θ_T (errata C4, P11)."""
    student = Student(tiny.train, config)
    terms = student_terms(student, config, frozen(frozen.fixed()), *batch)
    assert set(terms) == {"bpr", "l2", *TERMS, "prompt_anchor"}
    terms[name].backward()
    assert student.item.grad.abs().max() > 0
    assert student.user.grad.abs().max() > 0  # EmbKD speaks of items, but E_i reads E_u
    assert all(p.grad.abs().max() > 0 for p in frozen.prompt.parameters())
    assert all(
        p.grad is None for n, p in frozen.named_parameters() if not n.startswith("prompt")
    )


def test_only_distillation_and_anchor_move_the_prompt(frozen, tiny, config, batch):
    terms = student_terms(Student(tiny.train, config), config, frozen(), *batch)
    for name, term in terms.items():
        reaches = any(
            g is not None
            for g in torch.autograd.grad(
                term, list(frozen.prompt.parameters()), retain_graph=True, allow_unused=True
            )
        )
        assert reaches == (name in {*TERMS, "prompt_anchor"}), name


def test_weights_scale_their_terms_and_zero_removes_them(frozen, tiny, config, batch):
    student, encoded = Student(tiny.train, config), frozen()
    once = student_terms(student, config, encoded, *batch)
    for name, weight in {**TERMS, "prompt_anchor": "weight_anchor", "l2": "l2"}.items():
        double = dataclasses.replace(config, **{weight: 2 * getattr(config, weight)})
        twice = student_terms(student, double, encoded, *batch)
        assert twice[name].item() == pytest.approx(2 * once[name].item(), rel=1e-5)
        without = student_terms(
            student, dataclasses.replace(config, **{weight: 0.0}), encoded, *batch
        )
        assert set(once) - set(without) == {name}
    assert set(student_terms(student, config, None, *batch)) == {"bpr", "l2"}


def test_terms_are_the_losses_of_the_paper(frozen, tiny, config, batch):
    """Eq. 12 once more, from embeddings and the loss functions, modality by modality."""
    from losses import bpr_loss, embed_kd, list_kd, pair_kd

    config = dataclasses.replace(config, temperature=2.0, alpha=0.5, beta=3.0, gamma=1.5)
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
    expected = {
        "bpr": bpr_loss(y[:, 0], y[:, 1]),
        "l2": config.l2
        * l2_penalty(
            student.user[users], student.item[lists[:, 0]], student.item[lists[:, 1]]
        ),
        "pair_kd": config.lambda_pair
        * pair_kd(y[:, 0] - y[:, 1], y_t[:, 0] - y_t[:, 1], 2.0),
        "list_kd": config.lambda_list * sum(list_kd(y, t, 0.5, 3.0, 2.0) for t in modal),
        "embed_kd": config.lambda_embed
        * sum(embed_kd(item, f, 1.5) for f in encoded.item_modal.values()),
        "prompt_anchor": config.weight_anchor * bpr_loss(y_t[:, 0], y_t[:, 1]),
    }
    found = student_terms(student, config, encoded, users, lists)
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-4), name


def test_stage_1_trains_everything(tiny, config, batch):
    teacher = Teacher(tiny, config)
    terms = teacher_terms(teacher, *batch)
    assert set(terms) == {"bpr", "modal_bpr", "l2"}
    sum(terms.values()).backward()
    for name, parameter in teacher.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_without_prompt_it_is_left_out(tiny, config):
    """λ₁ = 0: f^m = x^m W^m + b^m."""
    teacher = Teacher(tiny, dataclasses.replace(config, lambda_prompt=0.0)).eval()
    for (m, x), layer in zip(teacher.features.items(), teacher.reduction, strict=True):
        assert torch.allclose(teacher().reduced[m], layer(x), atol=1e-6)


def test_another_width_is_mapped_on_the_students_side(frozen, tiny, config, batch):
    """Errata P7; the target stays as it is."""
    narrow = dataclasses.replace(config, dim_student=5)
    student = Student(tiny.train, narrow)
    assert student()[0].shape == (60, 5)
    student_terms(student, narrow, frozen(), *batch)["embed_kd"].backward()
    assert all(p.grad.abs().max() > 0 for p in student.project.parameters())

"""The nine comparison models: hand values, identities, and each by hand from its equations.

The contract that all models share is in tests/test_registry.py.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import replaced
from hypothesis import given, strategies as st
from scipy import sparse
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import baselines.common
import data
from baselines import MODELS, bm3, clcrec, freedom, grcn, slmrec
from baselines.common import (
    Links,
    constant,
    cosines,
    nearest,
    normalised,
    read,
    row_sums,
    standardised,
)
from data import Dataset
from evaluate import evaluate, top_items
from experiments.lab import Lab
from losses import bpr_loss
from promptmm import Product, Run, lightgcn

NINE = [name for name in MODELS if name not in ("MF-BPR", "LightGCN")]
SHORT = {"dim": 8, "batch": 128, "negatives": 3, "l2": 0.01}
seeds = st.integers(0, 10_000)


def made(name, dataset, **settings):
    torch.manual_seed(0)
    kind = MODELS[name]
    return kind(dataset, kind.Settings(**SHORT | settings))


def put(parameter, values) -> None:
    with torch.no_grad():
        parameter.copy_(torch.as_tensor(values))


def drawn(model, seed: int = 0) -> None:
    """Every weight anew, biases and confidences too: none is zero, one or shared."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        put(weight, torch.randn(weight.shape, generator=generator) * 0.5)


def shop(train, **features) -> Dataset:
    """A dataset of a training matrix and features, as lists."""
    train = sparse.csr_matrix(np.array(train, np.float32))
    none = sparse.csr_matrix(train.shape, dtype=np.float32)
    x = {m: np.array(values, np.float32) for m, values in features.items()}
    return Dataset("shop", train, none, none, x or {"visual": np.eye(train.shape[1])})


@pytest.fixture
def odd(tiny) -> Dataset:
    """Isolated: user 3, items 5 and 6. Without content: items 0-4, 2-7 or 4 alone."""
    train = tiny.train.tolil()
    train[3] = 0
    train[:, 5:7] = 0
    train = sparse.csr_matrix(train)
    train.eliminate_zeros()
    x = {m: values.copy() for m, values in tiny.features.items()}
    x["visual"][:5] = 0
    x["text"][2:8] = 0
    x["acoustic"] = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    x["acoustic"][4] = 0
    return replaced(tiny, train=train, features=x)


@pytest.fixture
def samples(odd):
    """Users [100] and their lists [100, 4]; some items come twice."""
    users, lists = data.Sampler(odd.train).epoch(torch.Generator().manual_seed(0), 3)
    return users[:100], lists[:100]


@pytest.fixture
def pairs(samples):
    """Users [100] and an item of theirs beside one that is not [100, 2]."""
    return samples[0], samples[1][:, :2]


def close(a, b, atol=1e-5) -> bool:
    return torch.allclose(torch.as_tensor(a), torch.as_tensor(b).to(a), atol=atol)


def gradients(model, total) -> list:
    """Of every parameter; zero where none arrives."""
    found = torch.autograd.grad(
        total, list(model.parameters()), retain_graph=True, allow_unused=True
    )
    pairs = zip(found, model.parameters(), strict=True)
    return [torch.zeros_like(w) if g is None else g for g, w in pairs]


def assert_agree(model, found, by_hand) -> None:
    """Tensors alike, two by two, and so are the gradients that reach every parameter."""
    totals = []
    for tensors in (found, by_hand):
        ramps = [torch.linspace(-1, 2, t.numel()).cos().view(t.shape) for t in tensors]
        totals.append(sum((t * r).sum() for t, r in zip(tensors, ramps, strict=True)))
    for a, b in zip(found, by_hand, strict=True):
        assert a.shape == b.shape and close(a, b)
    ours, theirs = (gradients(model, total) for total in totals)
    for (name, _), a, b in zip(model.named_parameters(), ours, theirs, strict=True):
        assert close(a, b, atol=1e-4 * (1 + b.abs().max().item())), name


def unit(x):
    """Rows of length one; zero ones stay."""
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)


def leaky(x, slope=0.01):
    return torch.where(x > 0, x, slope * x)


def mapped(layer, x):
    """x W + b."""
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def has(x):
    """Which rows say anything (B8): [I, 1]."""
    return (x != 0).any(1, keepdim=True)


def blocks(train, half=0.5):
    """Dense A / deg_u^h deg_i^h' and its counterpart of items: [U, I], [I, U]."""
    a = torch.from_numpy(train.toarray())
    of_user, of_item = (a.sum(dim, keepdim=True).clamp(min=1) for dim in (1, 0))
    if half == 0.5:
        hat = a / (of_user * of_item).sqrt()
        return hat, hat.T
    return a / of_user, (a / of_item).T  # means


def propagated(train, user, item, layers):
    """The mean over 0 … L of Â's powers, dense."""
    to_user, to_item = blocks(train)
    users, items = [user], [item]
    for _ in range(layers):
        users, items = [*users, to_user @ items[-1]], [*items, to_item @ users[-1]]
    return torch.stack(users).mean(0), torch.stack(items).mean(0)


def raw_rows(dataset):
    return [torch.from_numpy(x) for x in dataset.features.values()]


def standard_rows(dataset):
    """Columns of mean 0 and deviation 1 over the rows that have content, in float64."""
    found = []
    for x in dataset.features.values():
        x = x.astype(np.float64)
        filled = x.any(1)
        x[filled] = (x[filled] - x[filled].mean(0)) / x[filled].std(0)
        found.append(torch.from_numpy(x).float())
    return found


def penalty(size, *rows):
    """Σ ½‖·‖² over the rows, divided by the batch."""
    return sum(part.square().sum() for part in rows) / 2 / size


def assert_it_ranks_as_its_terms(model, users, lists, key="bpr"):
    """The loss is the one of the scores that the model ranks by."""
    user, item = model()
    logits = (user[users][:, None] * item[lists]).sum(-1)
    assert close(model.terms(users, lists)[key], bpr_loss(logits[:, 0], logits[:, 1]))


# ------------------------------------------------------------ shared pieces


def test_features_of_any_size_are_finite():
    """The largest that data.py lets in; an empty row stays empty, directions stay unit."""
    dataset = shop([[1, 1, 1]], visual=[[1e30, -2e30], [3e30, 1e30], [0, 0]])
    for kind in (baselines.common.directions, standardised):
        [found] = kind(dataset, "cpu").values()
        assert found.isfinite().all() and (found[2] == 0).all() and found[:2].any()
    [unit_rows] = baselines.common.directions(dataset, "cpu").values()
    assert close(unit_rows.norm(dim=1), torch.tensor([1.0, 1.0, 0.0]))


def test_standardised_columns(odd):
    """Over the items with content; the others' rows are zero, the scale does not matter."""
    found = standardised(odd, "cpu")
    for m, by_hand in zip(found, standard_rows(odd), strict=True):
        assert close(found[m], by_hand, atol=1e-4)
    constant_column = replaced(odd, features={"visual": np.full((40, 2), 7, np.float32)})
    assert not standardised(constant_column, "cpu")["visual"].any()
    large = {m: x * np.float32(1e25) for m, x in odd.features.items()}
    for m, x in standardised(replaced(odd, features=large), "cpu").items():
        assert close(x, found[m], atol=1e-4)


@st.composite
def catalogues(draw):
    """Rows [I, 4] whose cosines are exact: many ties, some rows zero, any scale."""
    some = [np.zeros(4)] + [sign * row for row in np.eye(4) for sign in (1, -1)]
    some += [np.array([1, a, b, c]) for a in (1, -1) for b in (1, -1) for c in (1, -1)]
    chosen = draw(st.lists(st.integers(0, len(some) - 1), min_size=1, max_size=12))
    scale = [2.0 ** draw(st.integers(-8, 8)) for _ in chosen]
    return np.array([s * some[row] for s, row in zip(scale, chosen, strict=True)])


def cosines_by_hand(x):
    size = np.linalg.norm(x, axis=1)
    return (x @ x.T) / np.maximum(np.outer(size, size), 1e-30)


def nearest_by_hand(x, k) -> list[list[int]]:
    """Each item's k best, best first; ties to the lower index; zero rows take no part."""
    cosine, real = cosines_by_hand(x), np.flatnonzero(x.any(1))
    return [
        sorted(real, key=lambda j: (-cosine[i, j], j))[:k] if i in real else []
        for i in range(len(x))
    ]


def lists_in(links: Links) -> list[list[int]]:
    start, columns = links.start.tolist(), links.columns.tolist()
    return [sorted(columns[a:b]) for a, b in zip(start, start[1:], strict=False)]


def matrix(links: Links, weight) -> np.ndarray:
    """Weighted links, dense."""
    found = np.zeros([len(links.start) - 1] * 2)
    np.add.at(found, (links.rows.numpy(), links.columns.numpy()), weight.detach().numpy())
    return found


@given(catalogues(), st.integers(1, 14), st.integers(1, 40))
def test_the_item_graph(x, k, cells):
    """Neighbours, cosines and D^-1/2 S D^-1/2 by hand, whatever the chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines.common, "CHUNK_SCORES", cells)
        links = nearest(torch.from_numpy(x).float(), k)
    wanted = nearest_by_hand(x, k)
    assert lists_in(links) == [sorted(row) for row in wanted]
    assert links.rows.tolist() == sorted(links.rows.tolist())
    assert links.rows.bincount(minlength=len(x)).tolist() == [len(row) for row in wanted]
    weight = cosines(torch.from_numpy(x).float(), links)
    s = np.zeros([len(x)] * 2)
    for i, row in enumerate(wanted):
        s[i, row] = np.maximum(cosines_by_hand(x)[i, row], 0)
    assert np.allclose(matrix(links, weight), s, atol=1e-6)
    degree = row_sums(links, weight)
    assert np.allclose(degree, s.sum(1), atol=1e-5)
    root = np.sqrt(np.maximum(s.sum(1), 1e-12))
    found = normalised(links, weight, degree)
    assert np.allclose(matrix(links, found), s / np.outer(root, root), atol=1e-5)
    assert not s[~x.any(1)].any() and not s[:, ~x.any(1)].any()


@given(seeds, st.integers(1, 9), st.integers(1, 5))
def test_rows_of_any_kind(seed, k, width):
    """The k largest cosines, of features without structure."""
    x = torch.randn(9, width, generator=torch.Generator().manual_seed(seed))
    links = nearest(x, k)
    best = -np.sort(-cosines_by_hand(x.double().numpy()), axis=1)[:, :k]
    rows = matrix(links, torch.ones(len(links.rows))) * cosines_by_hand(x.double().numpy())
    assert np.allclose(rows.sum(1), best.sum(1), atol=1e-5)
    assert lists_in(links) == lists_in(nearest(1e-3 * x, k))


@pytest.mark.parametrize(("width", "n"), [(128, 10), (768, 17), (768, 301)])
def test_equal_rows_are_equally_near(monkeypatch, width, n):
    """In float32 a product, here a row at a time, rounds them apart by their place."""
    monkeypatch.setattr(baselines.common, "CHUNK_SCORES", 1)
    x = torch.randn(width, generator=torch.Generator().manual_seed(width)).repeat(n, 1)
    assert lists_in(nearest(x, 5)) == [[0, 1, 2, 3, 4]] * n


@given(catalogues(), catalogues(), st.integers(1, 4), seeds)
def test_a_constant_graph_reads_as_its_links_do(one, two, k, seed):
    """The sum of two, its transpose, and the gradients: dense, links and CSR alike."""
    two = np.resize(two, one.shape)
    generator = torch.Generator().manual_seed(seed)
    parts, dense = [], 0
    for x in (one, two):
        links = nearest(torch.from_numpy(x).float(), k)
        weight = torch.rand(len(links.rows), generator=generator)
        parts.append((links, weight.requires_grad_()))
        dense = dense + torch.from_numpy(matrix(links, weight)).float()
    item = torch.randn(len(one), 3, generator=generator).requires_grad_()
    graph, transposed = constant(parts, "cpu")
    assert close(graph.to_dense(), dense) and close(transposed.to_dense(), dense.T)
    assert not graph.values().requires_grad
    by_links = sum(read(*part, item) for part in parts)
    by_matrix = Product.apply(graph, transposed, item)
    assert close(by_links, dense @ item) and close(by_matrix, dense @ item)
    aim = torch.randn(len(one), 3, generator=generator)
    [to_item] = torch.autograd.grad((by_matrix * aim).sum(), item)
    weights = [weight for _, weight in parts]
    again, *to_weights = torch.autograd.grad((by_links * aim).sum(), [item, *weights])
    assert close(to_item, dense.T @ aim) and close(again, dense.T @ aim)
    for (links, _), found in zip(parts, to_weights, strict=True):
        assert close(found, (aim[links.rows] * item[links.columns]).sum(1))


# ------------------------------------------------------------ NGCF


def test_ngcf_of_one_user_and_one_item():
    """Â = 1: both layer-1 rows are (.7071, .7071), the score 0 + 1."""
    model = made("NGCF", shop([[1]]), dim=2, student_layers=1).eval()
    put(model.user, [[1.0, 0.0]])
    put(model.item, [[0.0, 1.0]])
    for layer in (*model.own, *model.both):
        put(layer.weight, torch.eye(2))
    user, item = model()
    assert close(user, [[1, 0, 0.5**0.5, 0.5**0.5]])
    assert close(item, [[0, 1, 0.5**0.5, 0.5**0.5]])
    assert close(user @ item.T, [[1.0]])
    for layer in (*model.own, *model.both):
        put(layer.weight, torch.zeros(2, 2))
    user, item = model()
    assert (user @ item.T).item() == 0


def test_ngcf_without_layers_is_mf_bpr(odd, pairs):
    """Bit for bit: embeddings, terms and gradients."""
    ours = made("NGCF", odd, student_layers=0)
    plain = made("MF-BPR", odd)
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours(), plain(), strict=True))
    one, two = (model.terms(*pairs) for model in (ours, plain))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    totals = [gradients(ours, sum(one.values())), gradients(plain, sum(two.values()))]
    assert all(torch.equal(a, b) for a, b in zip(*totals, strict=True))


def test_ngcf_by_hand(odd, samples):
    model = made("NGCF", odd, student_layers=3, dropout=0.5)
    drawn(model)
    model.eval()
    to_user, to_item = blocks(odd.train)
    user, item = model.user, model.item
    users, items = [user], [item]
    for own, both in zip(model.own, model.both, strict=True):
        reads, read_by = to_user @ item, to_item @ user
        user = leaky(mapped(own, user + reads) + mapped(both, user * reads), 0.2)
        item = leaky(mapped(own, item + read_by) + mapped(both, item * read_by), 0.2)
        users.append(unit(user))
        items.append(unit(item))
    assert_agree(model, model(), (torch.cat(users, 1), torch.cat(items, 1)))
    assert_it_ranks_as_its_terms(model, *samples)
    assert MODELS["NGCF"].Settings().student_layers == 3
    model.train()
    assert not torch.equal(model()[0], model()[0])  # messages are dropped in training


# ------------------------------------------------------------ VBPR


def test_vbpr_of_one_user_and_one_item():
    """6 + 4 + .5 + 1 = 11.5."""
    model = made("VBPR", shop([[1]], visual=[[1]]), dim=1)
    model.features = {"visual": torch.tensor([[4.0]])}
    put(model.user, [[2.0]])
    put(model.item, [[3.0]])
    put(model.taste, [[1.0]])
    put(model.bias, [[0.5]])
    put(model.reduction[0].weight, [[1.0], [0.25]])  # W, β'
    user, item = model()
    assert (user @ item.T).item() == 11.5


def test_vbpr_without_content_is_mf_bpr(odd, pairs):
    """W, β' and β zero: equal scores, equal gradients on user and item."""
    ours, plain = made("VBPR", odd), made("MF-BPR", odd)
    put(ours.user, plain.user)
    put(ours.item, plain.item)
    for layer in ours.reduction:
        put(layer.weight, torch.zeros_like(layer.weight))
    assert close(*(user @ item.T for user, item in (ours(), plain())))
    assert close(*(model.terms(*pairs)["bpr"] for model in (ours, plain)))
    found = []
    for model in (ours, plain):
        total = sum(model.terms(*pairs).values())
        found.append(torch.autograd.grad(total, (model.user, model.item)))
    assert all(close(a, b, atol=1e-7) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("size", [5, 100])
def test_vbpr_by_hand(odd, pairs, size):
    """Three modalities; the batch's items alone are reduced, or all."""
    model = made("VBPR", odd)
    drawn(model)
    score = model.user @ model.item.T + model.bias.T
    for layer, x in zip(model.reduction, standard_rows(odd), strict=True):
        assert layer.bias is None  # it would cancel
        content = x @ layer.weight.T  # the last column is x̃ β'
        score = score + model.taste @ content[:, :-1].T + content[:, -1]
    user, item = model()
    assert user.shape[1] == item.shape[1] == 17
    assert_agree(model, [user @ item.T], [score])
    users, lists = (part[:size] for part in pairs)
    logits = score[users[:, None], lists]
    own = [model.user[users], model.taste[users]]
    own += [model.item[lists.flatten()], model.bias[lists.flatten()]]
    expected = [bpr_loss(logits[:, 0], logits[:, 1]), 0.01 * penalty(size, *own)]
    maps = [layer.weight.square().sum() / 2 for layer in model.reduction]
    expected.append(0.003 * sum(maps))  # of the whole maps, whatever the batch
    terms = model.terms(users, lists)
    assert list(terms) == ["bpr", "l2", "l2_content"]
    assert_agree(model, list(terms.values()), expected)


def test_vbprs_maps_may_be_free(odd, pairs):
    assert list(made("VBPR", odd, l2_content=0.0).terms(*pairs)) == ["bpr", "l2"]


def test_no_gradient_reaches_vbprs_content_without_taste(odd, pairs):
    model = made("VBPR", odd)
    put(model.taste, torch.zeros_like(model.taste))
    model.terms(*pairs)["bpr"].backward()
    for layer in model.reduction:
        assert not layer.weight.grad[:-1].any() and layer.weight.grad[-1].any()


# ------------------------------------------------------------ MMGCN


def test_mmgcn_reads_the_mean():
    """A user with items 1 and 3 reads 2; of ones, 1 where there are neighbours, else 0."""
    model = made("MMGCN", shop([[1, 1, 0], [0, 1, 0], [0, 0, 0]]))
    users, items = model.mean(torch.ones(3, 1), torch.tensor([[1.0], [3.0], [9.0]]))
    assert close(users, [[2.0], [3.0], [0.0]])
    assert close(items, [[1.0], [1.0], [0.0]])
    users, items = model.mean(torch.tensor([[2.0], [4.0], [9.0]]), torch.ones(3, 1))
    assert close(users, [[1.0], [1.0], [0.0]])
    assert close(items, [[2.0], [3.0], [0.0]])


def test_the_training_matrix_reaches_mmgcn_through_w1_alone(odd):
    other = replaced(odd, train=odd.train[::-1].tocsr())
    one, two = made("MMGCN", odd), made("MMGCN", other)
    assert not close(one()[0], two()[0])
    for layers in (*one.layer, *two.layer):
        for layer in layers:
            put(layer.heard.weight, torch.zeros(8, 8))
    assert all(torch.equal(a, b) for a, b in zip(one(), two(), strict=True))


def test_mmgcn_by_hand(odd, samples):
    model = made("MMGCN", odd)
    drawn(model)
    to_user, to_item = blocks(odd.train, half=1)
    outputs = []
    for m, x in enumerate(standard_rows(odd)):
        user = unit(model.preference[m])
        item = unit(mapped(model.reduction[m], x) * has(x))
        assert len(model.layer[m]) == 2
        for layer in model.layer[m]:
            heard = to_user @ (item @ layer.heard.weight.T)
            heard_by = to_item @ (user @ layer.heard.weight.T)
            sides = (heard, user, model.user), (heard_by, item, model.item)
            user, item = (
                leaky(
                    mapped(
                        layer.both,
                        torch.cat([leaky(h), leaky(mapped(layer.own, x)) + ids], 1),
                    )
                )
                for h, x, ids in sides
            )
        outputs.append((user, item))
    users, items = zip(*outputs, strict=True)
    assert_agree(model, model(), (torch.stack(users).mean(0), torch.stack(items).mean(0)))
    assert_it_ranks_as_its_terms(model, *samples)


@pytest.mark.parametrize("name", ["MMGCN", "GRCN"])
def test_preferences_are_trained_and_penalised(name, odd, pairs):
    """B16: ids and every P^m are parameters, and ‖Θ‖² is on their rows of the batch."""
    model = made(name, odd)
    users, lists = pairs
    tables = [model.user, *model.preference]
    rows = [weight[users] for weight in tables] + [model.item[lists.flatten()]]
    terms = model.terms(users, lists)
    assert close(terms["l2"], 0.01 * penalty(len(users), *rows))
    terms["bpr"].backward()
    trained = dict(model.named_parameters())
    for wanted in ("user", "item", "preference.0", "preference.1", "preference.2"):
        assert trained[wanted].grad.any(), wanted


# ------------------------------------------------------------ GRCN


def preferring(**settings):
    """GRCN with a user at (1, 0), and items of content (1, 0) and (0, 1)."""
    model = made("GRCN", shop([[1, 1]], visual=np.eye(2)), dim=2, **settings)
    model.features = {"visual": torch.eye(2)}
    put(model.preference[0], [[3.0, 0.0]])
    put(model.reduction[0].weight, torch.eye(2))
    return model


def test_grcn_routes_a_user():
    """α = .7311, .2689; after one routing p = (.9881, .1535); R = 0 leaves n(P)."""
    model = preferring(routings=0)
    user, item = model()
    assert close(user[:, 2:], [[1 + 0.7311, 0.2689]], atol=1e-4)  # c_u = p + Σ α f
    assert close(item[:, 2:], [[2.0, 0.0], [1.0, 1.0]])  # c_i = f + p: of one user, α = 1
    p = torch.tensor([[1.0, 0.0]])
    assert torch.equal(model.routed(p, torch.eye(2)), p)
    model = preferring(routings=1)
    assert close(model.routed(p, torch.eye(2)), [[0.9881, 0.1535]], atol=1e-4)
    assert close(model()[1][:, 2:], torch.eye(2) + torch.tensor([0.9881, 0.1535]), 1e-4)


def test_grcns_shares_sum_to_one_both_ways(odd):
    edges = made("GRCN", odd).edges
    logits = torch.rand(len(edges.user), generator=torch.Generator().manual_seed(0))
    for ends, count, axis in ((edges.user, 60, 1), (edges.item, 40, 0)):
        total = torch.zeros(count)
        total.index_add_(0, ends, grcn.softmax_at(logits, ends, count))
        has = torch.from_numpy(odd.train.toarray()).sum(axis) > 0
        assert not has.all()
        assert close(total, has.float())


def test_distrusting_grcn_keeps_its_ids(odd):
    """All s = -1: e = e⁰. They start at 1, so that all neighbours are heard (B20)."""
    model = made("GRCN", odd)
    assert (model.trust_user == 1).all() and (model.trust_item == 1).all()
    for trust in (model.trust_user, model.trust_item):
        put(trust, -torch.ones_like(trust))
    user, item = model()
    assert close(user[:, :8], unit(model.user)) and close(item[:, :8], unit(model.item))


@pytest.mark.parametrize("routings", [0, 1, 3])
def test_grcn_by_hand(odd, samples, routings):
    """Dense, softmaxes over the edges of a row or a column; s is the sender's."""
    model = made("GRCN", odd, routings=routings)
    drawn(model)
    edge = torch.from_numpy(odd.train.toarray()) > 0

    def shares(logits, dim):
        power = torch.where(edge, logits.exp(), 0.0)
        return power / power.sum(dim, keepdim=True).clamp(min=1e-12)

    users, items, into_user, into_item = [], [], [], []
    for m, x in enumerate(standard_rows(odd)):
        f = unit(leaky(mapped(model.reduction[m], x)) * has(x))
        p = unit(model.preference[m])
        for _ in range(routings):
            p = unit(p + shares(p @ f.T, 1) @ f)
        of_user, of_item = shares(p @ f.T, 1), shares(p @ f.T, 0)
        users.append(p + of_user @ f)
        items.append(f + of_item.T @ p)
        into_user.append(of_user * model.trust_item[:, m])
        into_item.append(of_item * model.trust_user[:, m : m + 1])
    to_user, to_item = (torch.stack(w).amax(0).relu() for w in (into_user, into_item))
    user, item = unit(model.user), unit(model.item)
    first = to_user @ item, to_item.T @ user
    second = to_user @ first[1], to_item.T @ first[0]
    user, item = user + first[0] + second[0], item + first[1] + second[1]
    assert_agree(
        model, model(), (torch.cat([user, *users], 1), torch.cat([item, *items], 1))
    )
    assert_it_ranks_as_its_terms(model, *samples)


# ------------------------------------------------------------ CLCRec


def test_clcrec_is_bpr(odd, pairs):
    """λ 0, ρ 0, N 1, τ 1."""
    off = {"weight_content": 0.0, "replaced": 0.0, "negatives": 1, "temperature": 1.0}
    model = made("CLCRec", odd, **off)
    assert model.width == 2
    users, lists = pairs
    logits = (model.user[users][:, None] * model.item[lists]).sum(-1)
    terms = model.terms(users, lists)
    assert close(terms["user_item"], bpr_loss(logits[:, 0], logits[:, 1]), atol=1e-7)
    assert terms["item_content"] == 0


def test_clcrec_of_equal_logits(odd, samples):
    """log(1 + N), and λ weighs the items' term."""
    model = made("CLCRec", odd, weight_content=0.3, replaced=0.5)
    put(model.user, torch.zeros_like(model.user))
    put(model.item, torch.zeros_like(model.item))
    terms = model.terms(*samples)
    assert close(terms["user_item"], 0.7 * math.log(4))
    assert close(terms["item_content"], 0.3 * math.log(4))


@pytest.mark.parametrize("replaced_by", [0, 1])
def test_clcrec_by_hand(odd, samples, replaced_by):
    """L_UI of inner products, L_RE of unit rows, both over τ; ids or content alone."""
    weights = {"weight_content": 0.3, "temperature": 0.5, "replaced": float(replaced_by)}
    model = made("CLCRec", odd, **weights)
    drawn(model)
    users, lists = samples
    x = torch.cat([unit(x) for x in raw_rows(odd)], dim=1)
    inner, _, outer = model.encode
    assert inner.weight.shape == (256, x.shape[1])
    g = mapped(outer, leaky(mapped(inner, x))) * has(x)
    assert not has(x).all()
    known = torch.from_numpy(odd.train.toarray()).any(0)[:, None]
    assert not known.all()
    assert_agree(model, model(), (model.user, torch.where(known, model.item, g)))
    v = (model.item, g)[replaced_by]
    logits = (model.user[users][:, None] * v[lists]).sum(-1) / 0.5
    alike = (unit(model.item)[lists[:, :1]] * unit(g)[lists]).sum(-1) / 0.5
    main, beside = ((x.logsumexp(1) - x[:, 0]).mean() for x in (logits, alike))
    terms = model.terms(users, lists)
    found = [terms["user_item"], terms["item_content"]]
    assert_agree(model, found, [0.7 * main, 0.3 * beside])
    one_other = lists[:, :2].flatten()  # of N negatives, one: as every model's ‖Θ‖²
    rows = model.user[users], model.item[one_other]
    assert close(terms["l2"], 0.01 * penalty(len(users), *rows))


def test_clcrec_replaces_entries_and_not_rows(odd, monkeypatch):
    """B26: half of the ids, each drawn for itself."""
    model, seen = made("CLCRec", odd, replaced=0.5, negatives=9), []
    put(model.item, torch.zeros_like(model.item))  # so a logit of 0 is an id's
    monkeypatch.setattr(clcrec, "first", lambda x: seen.append(x) or x.sum())
    users = torch.arange(60)
    lists = torch.randint(40, (60, 10), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model.terms(users, lists)
    swapped = (seen[0] != 0).float()
    assert abs(swapped.mean() - 0.5) < 0.07
    assert (swapped.std(0) > 0).all() and (swapped.std(1) > 0).sum() > 55
    model.terms(users, lists)
    assert not torch.equal((seen[2] != 0).float(), swapped)


def test_clcrec_ranks_trained_items_by_their_ids(odd):
    """Features changed after training: theirs change nothing, the others' their own."""
    model = made("CLCRec", odd)
    drawn(model)
    known = odd.train.toarray().any(0)
    other = np.random.default_rng(0)

    def ranking(changed):
        x = {m: values.copy() for m, values in odd.features.items()}
        for values in x.values():
            values[changed] = other.normal(size=values[changed].shape)
        later = made("CLCRec", replaced(odd, features=x))
        later.load_state_dict(model.state_dict())
        return later.eval()()

    user, item = model.eval()()
    before = top_items(user @ item.T, 40)[1]
    user, kept = ranking(known)
    assert torch.equal(kept[known], item[known])
    assert close(kept, item)  # the largest number sets a scale: to rounding
    assert torch.equal(top_items(user @ kept.T, 40)[1], before)
    user, moved = ranking(~known)
    assert torch.equal(moved[known], item[known])
    assert not torch.isclose(moved[~known], item[~known]).all(1).any()
    assert not torch.equal(top_items(user @ moved.T, 40)[1], before)


# ------------------------------------------------------------ SLMRec


def plain_slmrec(dataset, **settings):
    """SLMRec with W_u, W_i = [I, 0, …] and no contrast."""
    model = made("SLMRec", dataset, weight_content=0.0, **settings)
    for layer in (model.mix_user, model.mix_item):
        put(layer.weight, torch.eye(*layer.weight.shape))
    return model


def test_slmrec_of_matched_rows():
    """log(1 + (B-1) e^(-1/τ)) of orthonormal pairs: .006715; log B if all are equal."""
    settings = {"dim": 3, "student_layers": 0, "temperature": 0.2, "l2": 0.0}
    model = plain_slmrec(shop(np.eye(3)), **settings)
    put(model.user, 5 * torch.eye(3))
    put(model.item, 7 * torch.eye(3))  # cosines: lengths do not count
    two = torch.arange(2)
    found = model.terms(two, two[:, None])
    assert list(found) == ["softmax"]
    assert close(found["softmax"], 0.006715, atol=1e-6)
    three = torch.arange(3)
    loss = model.terms(three, three[:, None])["softmax"]
    assert close(loss, math.log(1 + 2 * math.exp(-5)), atol=1e-6)
    put(model.user, torch.ones(3, 3))
    put(model.item, torch.ones(3, 3))
    assert close(model.terms(three, three[:, None])["softmax"], math.log(3))


def test_plain_slmrec_is_lightgcn(odd):
    """Raw inner products, no sigmoid (B28)."""
    model = plain_slmrec(odd, student_layers=3)
    wanted = lightgcn(model.graph, model.user, model.item, 3)
    assert all(close(a, b, atol=1e-7) for a, b in zip(model(), wanted, strict=True))


def test_slmrec_by_hand(odd, samples):
    """One user table for all; the main loss over the batch, the contrast once an item."""
    model = made("SLMRec", odd, student_layers=2, temperature=0.5, weight_content=0.3)
    drawn(model)
    users, items = samples[0], samples[1][:, 0]
    starts = [model.item]
    for layer, x in zip(model.reduction, raw_rows(odd), strict=True):
        starts.append(mapped(layer, unit(x)))
    views = [propagated(odd.train, model.user, start, 2) for start in starts]
    user = mapped(model.mix_user, torch.cat([user for user, _ in views], dim=1))
    item = mapped(model.mix_item, torch.cat([item for _, item in views], dim=1))
    assert_agree(model, model(), (user, item))
    terms = model.terms(users, items[:, None])
    logits = unit(user[users]) @ unit(item[items]).T / 0.5
    main = (logits.logsumexp(1) - logits.diagonal()).mean()
    some = sorted(set(items.tolist()))
    assert len(some) < len(items)
    along, contrast = views[0][1][some], 0
    for m, (_, modal) in enumerate(views[1:]):
        along = along @ model.chain[m].weight.T
        logits = along @ (modal[some] @ model.view[m].weight.T).T / 0.2
        contrast = contrast + (logits.logsumexp(1) - logits.diagonal()).mean()
    assert_agree(model, [terms["softmax"]], [main])
    assert close(terms["contrast"], 0.3 * contrast, atol=1e-4)
    scale = max(g.abs().max() for g in gradients(model, contrast))
    assert_agree(model, [terms["contrast"] / scale], [0.3 * contrast / scale])
    rows = model.user[users], model.item[items]
    assert close(terms["l2"], 0.01 * penalty(len(users), *rows))


def test_slmrec_contrasts_a_few_distinct_items(odd, monkeypatch):
    """B31: without a chain all logits are equal, and the loss counts them: M log n."""
    model = made("SLMRec", odd, weight_content=1.0)
    put(model.chain[0].weight, torch.zeros(8, 8))
    items = torch.arange(30).repeat_interleave(2)[:, None]

    def count():
        loss = model.terms(torch.arange(60), items)["contrast"].item()
        return round(math.exp(loss / 3))

    assert count() == 30
    assert slmrec.CONTRASTED == 256
    monkeypatch.setattr(slmrec, "CONTRASTED", 8)
    assert count() == 4  # of the first eight, each item there twice


# ------------------------------------------------------------ LATTICE

BENT = [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]


def without_content(dataset) -> Dataset:
    return replaced(dataset, features={m: 0 * x for m, x in dataset.features.items()})


def test_lattice_of_three_items():
    """S̃ by its row sums: .625, .3536, .4444; rows 1 and 3 read the middle one."""
    model = made("LATTICE", shop([[1, 1, 1]], visual=BENT), neighbours=2)
    [(links, weight)] = model.raw_graphs
    a, b, c = 1 / 1.6, 0.6 / 2.88**0.5, 1 / 1.8
    smooth = np.array([[a, b, 0], [0, c, 0.8 * c], [0, 0.8 * c, c]])
    assert np.allclose(smooth[[0, 0, 1], [0, 1, 2]], [0.625, 0.3536, 0.4444], atol=1e-4)
    assert np.allclose(matrix(links, weight), smooth, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_lattice_without_content_is_lightgcn(odd, pairs, training):
    """Exactly: embeddings and terms."""
    model = made("LATTICE", without_content(odd)).train(training)
    plain = made("LightGCN", odd)
    put(plain.user, model.user)
    put(plain.item, model.item)
    for _ in range(2):  # the epoch's graph is built, then kept
        assert all(torch.equal(a, b) for a, b in zip(model(), plain(), strict=True))
        one, two = (each.terms(*pairs) for each in (model, plain))
        assert one == two and one.keys() == {"bpr", "l2"}


def test_lattice_with_a_frozen_graph_ignores_its_maps(odd):
    """λ = 1: independent of W, which gets no gradient either."""
    model = made("LATTICE", odd, frozen=1.0)
    before = model()
    for layer in model.reduction:
        put(layer.weight, torch.ones_like(layer.weight))
        put(layer.bias, torch.ones_like(layer.bias))
    model.each_epoch()
    assert all(torch.equal(a, b) for a, b in zip(before, model(), strict=True))
    found = gradients(model, sum(part.sum() for part in model()))
    names = [name for name, _ in model.named_parameters()]
    moved = [name for name, g in zip(names, found, strict=True) if g.any()]
    assert not any(name.startswith("reduction") for name in moved)


def test_lattices_maps_learn_from_the_first_batch_of_an_epoch(odd, pairs):
    """B22; and the modality weights with them. Ids learn from every batch."""
    model = made("LATTICE", odd)
    drawn(model)
    model.train()
    for _ in range(2):
        model.each_epoch()
        for learns in (True, False, False):
            found = gradients(model, model.terms(*pairs)["bpr"])
            names = [name for name, _ in model.named_parameters()]
            moved = {name for name, g in zip(names, found, strict=True) if g.any()}
            assert {"user", "item"} <= moved
            assert ("attention" in moved) == learns
            for m in range(3):
                assert (f"reduction.{m}.weight" in moved) == learns


def lattice_by_hand(model, dataset, k, fixed):
    """Dense; neighbours as found by hand, from unit rows of the raw and of the mapped."""
    share = model.attention.softmax(0)
    raw_graph, learnt = 0, 0

    def graph(x):
        cosine = (unit(x) @ unit(x).T).clamp(min=0)
        kept = torch.zeros_like(cosine)
        for i, row in enumerate(nearest_by_hand(x.detach().double().numpy(), k)):
            kept[i, row] = 1.0
        return cosine * kept

    def smooth(s):
        root = s.sum(1).clamp(min=1e-12).sqrt()
        return s / root[:, None] / root

    pairs = zip(standard_rows(dataset), raw_rows(dataset), strict=True)
    for m, (x, raw) in enumerate(pairs):
        filled = raw.any(1, keepdim=True)
        raw_graph = raw_graph + share[m] * smooth(graph(raw))
        learnt = learnt + share[m] * graph(mapped(model.reduction[m], x) * filled)
    g = (1 - fixed) * smooth(learnt) + fixed * raw_graph
    user, item = propagated(dataset.train, model.user, model.item, 2)
    return user, item + unit(g @ model.item)


@pytest.mark.parametrize("fixed", [0.0, 0.6])
def test_lattice_by_hand(odd, pairs, fixed):
    """And the graph that is kept for an epoch is the one that was built."""
    model = made("LATTICE", odd, neighbours=4, frozen=fixed)
    drawn(model)
    by_hand = lattice_by_hand(model, odd, 4, fixed)
    assert_agree(model.eval(), model(), by_hand)
    assert_agree(model.train(), model(), by_hand)
    kept = model()  # from the constants
    assert all(close(a, b) for a, b in zip(kept, by_hand, strict=True))
    for part, whole in zip(kept, by_hand, strict=True):
        ours, theirs = (
            torch.autograd.grad(x.square().sum(), model.item, retain_graph=True)[0]
            for x in (part, whole)
        )
        assert close(ours, theirs, atol=1e-3)
    assert_it_ranks_as_its_terms(model, *pairs)


def test_lattice_is_judged_by_its_weights(odd, pairs):
    """Not by the graph of the epoch: another model with these weights ranks alike."""
    model = made("LATTICE", odd, frozen=0.1)
    model.train()
    model.terms(*pairs)
    drawn(model)  # a large step
    other = made("LATTICE", odd, frozen=0.1).eval()
    other.load_state_dict(model.state_dict())
    kept = model()[1]
    assert torch.equal(model.eval()()[1], other()[1])
    assert not close(kept, other()[1])
    assert torch.equal(model.train()()[1], kept)


# ------------------------------------------------------------ FREEDOM


def test_freedoms_graph_has_one_weight(odd):
    """1/k everywhere; with fewer than k neighbours, one over their number."""
    one = replaced(odd, features={"visual": odd.features["visual"]})
    for k, wanted in ((4, 4), (10, 10), (100, 35)):  # 35 of 40 items have content
        graph, transposed = made("FREEDOM", one, neighbours=k).similar
        assert close(graph.values(), torch.full((35 * wanted,), 1 / wanted))
        x = odd.features["visual"]
        by_hand = torch.zeros(40, 40)
        for i, row in enumerate(nearest_by_hand(x.astype(np.float64), k)):
            by_hand[i, row] = 1 / wanted
        assert close(graph.to_dense(), by_hand)
        assert close(transposed.to_dense(), by_hand.T)


def test_freedoms_last_modality_leads(odd):
    """ω: equal, or `lead` for the last and the rest shared by the others."""
    alone = [
        made("FREEDOM", replaced(odd, features={m: x})).similar[0].to_dense()
        for m, x in odd.features.items()
    ]
    for lead, shares in ((0.0, [1 / 3] * 3), (0.5, [0.25, 0.25, 0.5])):
        found = made("FREEDOM", odd, lead=lead).similar[0].to_dense()
        assert close(found, sum(w * s for w, s in zip(shares, alone, strict=True)))
    single = replaced(odd, features={"visual": odd.features["visual"]})
    assert close(made("FREEDOM", single, lead=0.9).similar[0].to_dense(), alone[0])


@pytest.mark.parametrize("training", [True, False])
def test_freedom_without_content_is_lightgcn(odd, pairs, training):
    """ρ 0, w 0, zero features: embeddings, terms and gradients, bit for bit."""
    off = {"dropout": 0.0, "weight_content": 0.0}
    model = made("FREEDOM", without_content(odd), **off).train(training)
    plain = made("LightGCN", odd)
    put(plain.user, model.user)
    put(plain.item, model.item)
    model.each_epoch()
    assert all(torch.equal(a, b) for a, b in zip(model(), plain(), strict=True))
    one, two = (each.terms(*pairs) for each in (model, plain))
    assert one == two and one.keys() == {"bpr", "l2"}
    ours = torch.autograd.grad(sum(one.values()), (model.user, model.item))
    theirs = torch.autograd.grad(sum(two.values()), (plain.user, plain.item))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("edges", "rate"),
    [
        (57, 0.25),
        (57, 0.5),
        (598, 0.5),
        (100, 0.75),
        (57, 0.8),
        (598, 0.8),
        (598, 0.9),
        (10, 0.8),
        (100, 0.8),
        (100, 0.9),
    ],
)
def test_freedom_keeps_an_exact_number_of_edges(odd, rate, edges):
    """⌊(1-ρ) E⌋, all of them training edges, none twice; ρ is the share removed."""
    rows, columns = (ids[:edges] for ids in odd.train.nonzero())
    ones = np.ones(edges, np.float32)
    train = sparse.csr_matrix((ones, (rows, columns)), odd.train.shape)
    kept = freedom.pruned(train, rate)
    exact = edges * round(100 * (1 - rate)) // 100
    assert kept.nnz == exact and (kept.data == 1).all()
    assert (kept.multiply(train) != kept).nnz == 0


def test_freedom_prunes_anew_and_is_judged_on_the_whole(odd):
    """Two epochs differ, two evaluations do not; Â is that of the kept edges' degrees."""
    model = made("FREEDOM", odd, dropout=0.5, student_layers=1)
    drawn(model)
    whole = [close_to.clone() for close_to in model.eval()()]
    epochs = []
    for _ in range(2):
        model.train()
        model.each_epoch()
        epochs.append(model()[0])
        assert torch.equal(model()[0], epochs[-1])  # the same for all of its batches
        kept = (model.kept.ui.to_dense() > 0).numpy()
        assert kept.sum() == odd.train.nnz // 2
        assert not kept[odd.train.toarray() == 0].any()
        own = sparse.csr_matrix(kept.astype(np.float32))
        user, _ = propagated(own, model.user, model.item, 1)
        assert close(epochs[-1], user)
        for _ in range(2):
            again = model.eval()()
            assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))
    assert not close(*epochs)


def test_rare_edges_are_kept_more_often():
    """An edge of degrees (1, 1) against those of degrees (10, 10): weights 10 to 1."""
    train = np.zeros((11, 11), np.float32)
    train[:10, :10] = 1
    train[10, 10] = 1
    torch.manual_seed(0)
    kept = [freedom.pruned(sparse.csr_matrix(train), 0.9).toarray() for _ in range(200)]
    often = np.mean(kept, axis=0)
    # Of weights 1 and 100 · 1/10, ten draws: about 1 - (10/11)^10 = .6 against .1
    assert 0.5 < often[10, 10] < 0.75
    assert often[:10, :10].mean() < 0.11


def test_freedom_by_hand(odd, pairs):
    """Final item rows I + S item, S item not of unit length; w Σ_m BPR of content."""
    model = made("FREEDOM", odd, dropout=0.0, weight_content=0.3, neighbours=4)
    drawn(model)
    s = 0
    for x in odd.features.values():
        for i, row in enumerate(nearest_by_hand(x.astype(np.float64), 4)):
            own = torch.zeros(40, 40)
            own[i, row] = 1 / 4 / 3
            s = s + own
    user, item = propagated(odd.train, model.user, model.item, 2)
    item = item + s @ model.item
    assert_agree(model, model(), (user, item))
    for size in (5, 100):  # the batch's rows alone are mapped, or all
        users, lists = (part[:size] for part in pairs)
        found = model.terms(users, lists)
        logits = (user[users][:, None] * item[lists]).sum(-1)
        content = 0
        for layer, x in zip(model.reduction, standard_rows(odd), strict=True):
            modal = (user[users][:, None] * mapped(layer, x)[lists]).sum(-1)
            content = content + bpr_loss(modal[:, 0], modal[:, 1])
        rows = model.user[users], model.item[lists.flatten()]
        wanted = {"bpr": bpr_loss(logits[:, 0], logits[:, 1])}
        wanted |= {"l2": 0.01 * penalty(size, *rows), "content": 0.3 * content}
        assert found.keys() == wanted.keys()
        assert_agree(model, [found[name] for name in wanted], list(wanted.values()))


# ------------------------------------------------------------ BM3


def plain_bm3(user, item):
    """q = identity, L 0, ρ 0, w 0."""
    off = {"student_layers": 0, "dropout": 0.0, "weight_content": 0.0, "l2": 0.0}
    model = made("BM3", shop([[1]]), dim=2, **off)
    put(model.predict.weight, torch.eye(2))
    put(model.user, [user])
    put(model.item, [item])
    return model


def test_bm3_of_one_user_and_one_item():
    """2 if they are orthogonal, 0 if equal, however long."""
    one, lists = torch.tensor([0]), torch.tensor([[0]])
    assert close(plain_bm3((1.0, 0.0), (0.0, 1.0)).terms(one, lists)["ids"], 2.0)
    assert close(plain_bm3((1.0, 0.0), (1.0, 0.0)).terms(one, lists)["ids"], 0.0)
    assert close(plain_bm3((1.0, 2.0), (3.0, 6.0)).terms(one, lists)["ids"], 0.0)


def test_nothing_reaches_bm3s_targets(odd, pairs):
    """At L 0: of the first term nothing reaches items, of the second nothing users."""
    model = made("BM3", odd, student_layers=0, dropout=0.0)
    drawn(model)
    users, items = pairs[0], pairs[1][:, 0]
    user, item = model.online()
    user, item = user[users], item[items]
    first = bm3.apart(model.predict(user), model.target(item))
    second = bm3.apart(model.predict(item), model.target(user))
    tables = (model.user, model.item)
    to_user, to_item = torch.autograd.grad(first, tables, allow_unused=True)
    assert to_user.any() and (to_item is None or not to_item.any())
    to_user, to_item = torch.autograd.grad(second, tables, allow_unused=True)
    assert to_item.any() and (to_user is None or not to_user.any())


@pytest.mark.parametrize("size", [5, 100])
def test_bm3_by_hand(odd, pairs, size, monkeypatch):
    """Targets are dropped and cut off, what is predicted from is neither."""
    pattern = torch.tensor([2.0, 0, 2, 0, 2, 0, 0, 2])
    asked = []

    def fixed_drop(rows, rate):
        assert not rows.requires_grad
        asked.append(rate)
        return rows * pattern

    monkeypatch.setattr(bm3, "drop", fixed_drop)
    model = made("BM3", odd, dropout=0.4, weight_content=0.3)
    drawn(model)
    user, item = propagated(odd.train, model.user, model.item, 2)
    item = item + model.item
    q = model.predict
    assert q.bias is not None
    assert_agree(
        model, model(), (mapped(q, user), mapped(q, item))
    )  # ranked with q, not dropped
    assert not asked
    users, lists = (part[:size] for part in pairs)
    items = lists[:, 0]
    user, item = user[users], item[items]

    def apart(a, b, of=1.0):
        cosine = (unit(mapped(q, a)) * unit(b.detach() * pattern)).sum(1)
        return ((1 - cosine) * of).mean()

    ids, content = apart(user, item) + apart(item, user), 0
    for layer, x in zip(model.reduction, standard_rows(odd), strict=True):
        f, of = mapped(layer, x)[items], has(x)[items, 0]
        content = content + apart(f, item, of) + apart(f, f, of)
    rows = model.user[users], model.item[items]
    wanted = {"ids": ids, "content": 0.3 * content, "l2": 0.01 * penalty(size, *rows)}
    found = model.terms(users, lists[:, :1])
    assert found.keys() == wanted.keys() and set(asked) == {0.4}
    assert_agree(model, [found[name] for name in wanted], list(wanted.values()))


# ------------------------------------------------------------ all nine


def one_step(model, users, lists) -> dict:
    """An epoch's beginning, its first two batches, and their gradients."""
    model.train()
    if hasattr(model, "each_epoch"):
        model.each_epoch()
    for _ in range(2):
        terms = model.terms(users, lists[:, : model.width])
        sum(terms.values()).backward()
    return terms


@pytest.mark.parametrize("name", ["NGCF", "VBPR", "MMGCN", "GRCN", "LATTICE", "FREEDOM"])
def test_what_is_learnt_is_what_is_ranked(name, odd, pairs):
    """BPR of the very inner products that rank: no bias is learnt and then left out."""
    still = {"dropout": 0.0} if name in ("NGCF", "FREEDOM") else {}
    model = made(name, odd, **still)
    drawn(model)
    users, lists = pairs
    user, item = model.eval()()
    logits = (user[users, None] * item[lists]).sum(-1)  # [B, 2]
    found = model.train().terms(users, lists)["bpr"]
    assert close(found, bpr_loss(logits[:, 0], logits[:, 1]))


@pytest.mark.parametrize("name", NINE)
def test_judged_twice_and_after_training_mode(name, odd, samples):
    """Evaluation is repeatable, and a training forward leaves nothing behind."""
    model = made(name, odd, dropout=0.5).eval()
    first, second = model(), model()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    one_step(model, *samples)
    third = model.eval()()
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", NINE)
def test_no_nan_without_neighbours_or_content(name, count, odd, samples):
    """Zero rows, isolated users and items, one modality or three."""
    chosen = dict(list(odd.features.items())[:count])
    model = made(name, replaced(odd, features=chosen))
    terms = one_step(model, *samples)
    assert all(term.isfinite() for term in terms.values())
    for parameter in model.parameters():  # a length of zero has a gradient without bound
        assert parameter.grad is None or parameter.grad.abs().max() < 1e3
    assert all(part.isfinite().all() for part in model.eval()())
    for part in made(name, without_content(odd)).eval()():
        assert part.isfinite().all()


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made meanwhile holds."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made_here = function(*args, **(kwargs or {}))
        for one in tree_leaves(made_here):
            if isinstance(one, torch.Tensor) and one.layout == torch.strided:
                held = one.untyped_storage().nbytes() // one.element_size()
                self.size = max(self.size, held)
        return made_here


@pytest.mark.parametrize("name", ["LATTICE", "FREEDOM"])
def test_the_item_graph_is_made_in_chunks(name, odd, monkeypatch):
    """Three rows at a time: the same model, and nothing of I² numbers is made."""
    n_items = 400
    x = np.random.default_rng(0).normal(size=(n_items, 6)).astype(np.float32)
    x[7:11] = x[7]  # equal, over the edge of a chunk
    train = sparse.random(50, n_items, 0.02, "csr", np.float32, random_state=0)
    dataset = replaced(odd, train=train, features={"visual": x})
    users = torch.arange(50)
    lists = torch.stack([users, users + 50], dim=1)
    sizes = {"dim": 4, "neighbours": 3}
    before = made(name, dataset, **sizes)
    wanted = before(), sum(before.terms(users, lists).values())
    monkeypatch.setattr(baselines.common, "CHUNK_SCORES", 3 * n_items)
    with Largest() as largest:
        model = made(name, dataset, **sizes)
        found = model()
        total = sum(model.terms(users, lists).values())
        total.backward()
        one_step(model, users, lists)
        model.eval()()
    assert close(total, wanted[1], atol=1e-6)
    assert all(close(a, b, atol=1e-6) for a, b in zip(found, wanted[0], strict=True))
    assert largest.size < n_items**2 / 10


@pytest.mark.parametrize("name", NINE)
def test_a_models_folder_has_its_own_settings_in_its_name(name, tiny, tmp_path):
    """One of its own renames it, one of another model's does not."""
    place = Lab(tiny, "shop", torch.device("cpu"), 1, True, tmp_path)
    kind = MODELS[name].Settings
    theirs = {field.name: field for field in dataclasses.fields(kind)}
    before = place.folder(name, kind())
    every = {
        one.name: other.Settings
        for other in MODELS.values()
        for one in dataclasses.fields(other.Settings)
        if one.metadata["of"] == "model"
    }
    assert {"dropout", "temperature", "weight_content", "neighbours"} <= every.keys()
    for field, other in every.items():
        value = 0.5 * getattr(other(), field) or 0.5
        value = type(getattr(other(), field))(value)
        assert place.folder(name, kind()) == before
        if field not in theirs:
            with pytest.raises(TypeError):
                kind(**{field: value})
            continue
        changed = place.folder(name, dataclasses.replace(kind(), **{field: value}))
        assert (changed != before) == (theirs[field].metadata["of"] == "model"), field


# ------------------------------------------------------------ planted data


@pytest.fixture(scope="module")
def planted() -> Dataset:
    """A fifth of the items is never trained, so that content has something to say."""
    sizes = {"users": 400, "items": 300, "interactions": 6000, "unseen": 0.2}
    return data.synthetic(**sizes, dims={"visual": 64, "text": 48})


def recall(pair, dataset, target) -> float:
    return evaluate(*pair, target, dataset.train + dataset.val)["recall@20"]


def taught(name, dataset, folder, **settings):
    settings = {"dim": 16, "batch": 512, "epochs": 30, "eval_every": 5} | settings
    config = MODELS[name].Settings(**{"lr_student": 0.02, "l2": 0.01} | settings)
    run = Run(folder, dataset, config, torch.device("cpu"), {})
    return baselines.common.train(run, MODELS[name])


@pytest.fixture(scope="module")
def without(planted, tmp_path_factory) -> float:
    """MF-BPR's recall."""
    pair = taught("MF-BPR", planted, tmp_path_factory.mktemp("mf"))
    return recall(pair, planted, planted.test)


@pytest.mark.parametrize("name", ["VBPR", "LATTICE", "FREEDOM"])
def test_content_helps_where_it_was_planted(name, planted, without, tmp_path):
    """Seeds 0-3: MF-BPR .134-.156, VBPR .160-.175, FREEDOM .180-.198, LATTICE .181-.217."""
    pair = taught(name, planted, tmp_path)
    assert recall(pair, planted, planted.test) > 1.03 * without


@pytest.mark.parametrize("name", ["NGCF", "BM3"])
def test_content_finds_no_new_item_for_those_without_it(name, planted, tmp_path):
    """Of never-trained items alone: at most what 20 guesses among the unseen would find."""
    new = np.asarray(planted.train.sum(0)).ravel() == 0
    target = (planted.test @ sparse.diags(new.astype(np.float32))).tocsr()
    target.eliminate_zeros()
    assert target.nnz > 300
    settings = {"dim": 32, "epochs": 10, "lr_student": 0.01, "l2": 0.0}
    pair = taught(name, planted, tmp_path, **settings)
    seen = np.diff((planted.train + planted.val).indptr).mean()
    assert recall(pair, planted, target) < 20 / (300 - seen)

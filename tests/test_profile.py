"""What content knows untrained: profiles, one scale for all rankings, and their sum."""

import numpy as np
import pytest
import torch
from conftest import replaced
from hypothesis import given, strategies as st
from scipy import sparse

from baselines.profile import late_fusion, profile
from data import unit_rows
from evaluate import WEIGHTS, evaluate, fuse, line_search, one_scale, recalls
from promptmm import adjacency


def test_a_profile_is_what_the_users_items_contain(tiny):
    """Against dense algebra; items without content take no part, in the mean neither."""
    x = tiny.features["visual"].copy()
    x[[2, 7]] = 0
    user, item = profile(tiny.train, x)
    filled = [i for i in range(40) if i not in (2, 7)]
    centred = x - x[filled].mean(0)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    unit[[2, 7]] = 0
    assert np.allclose(item, unit, atol=1e-5)
    whole = adjacency(tiny.train).toarray()
    assert np.allclose(user, whole[:60, 60:] @ unit, atol=1e-5)


def test_features_that_are_all_zero_say_nothing(tiny):
    assert (unit_rows(torch.zeros(4, 3)) == 0).all()


@given(st.integers(0, 10**6), st.floats(1e-2, 1e2), st.integers(1, 6))
def test_one_scale_is_a_standard_deviation_of_one(seed, loud, width):
    """Over all items, for each user; the order of items is kept, whatever the loudness."""
    generator = torch.Generator().manual_seed(seed)
    user = torch.randn(5, width, generator=generator, dtype=torch.float64)
    item = loud * torch.randn(9, width, generator=generator, dtype=torch.float64)
    before, after = user @ item.T, (lambda u, i: u @ i.T)(*one_scale((user, item)))
    assert torch.allclose(after.std(1, correction=0), torch.ones(5, dtype=torch.float64))
    assert torch.allclose(after * before.std(1, correction=0, keepdim=True), before)


def test_a_user_without_an_opinion_becomes_zero():
    user, _ = one_scale((torch.ones(2, 1), torch.full((3, 1), 4.0)))
    assert (user == 0).all()


def test_fused_scores_are_the_weighted_sum():
    pairs = [(torch.randn(3, n), torch.randn(4, n)) for n in (2, 5, 1)]
    user, item = fuse(pairs, [1.0, 0.5, 0.0])
    expected = pairs[0][0] @ pairs[0][1].T + 0.5 * pairs[1][0] @ pairs[1][1].T
    assert torch.allclose(user @ item.T, expected, atol=1e-5)
    assert user.shape[1] == 2 + 5  # weight 0: not carried along


def opinion(tiny, split: str) -> np.ndarray:
    """Features that know one split: an item contains the users who took it there."""
    return getattr(tiny, split).T.toarray().astype(np.float32)


def test_weights_are_found_on_validation_and_nowhere_else(tiny):
    """Content that knows validation gets a weight, content that knows test does not."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randn(60, 4, generator=generator), torch.randn(40, 4, generator=generator)
    user = opinion(tiny, "train") + 3 * opinion(tiny, "val")
    told = replaced(tiny, features={"told": user, "zero": np.zeros_like(user)})
    fused, weights = late_fusion(told, ids)
    assert weights["told"] > 0 and weights["zero"] == 0
    before = evaluate(*ids, tiny.val, tiny.train)["recall@20"]
    assert evaluate(*fused, tiny.val, tiny.train)["recall@20"] > before
    other = replaced(told, test=sparse.csr_matrix(1 - opinion(tiny, "train").T))
    assert late_fusion(other, ids)[1] == weights  # another test split, the same weights


def test_useless_content_costs_nothing(tiny):
    """Where no weight helps, LightGCN's ranking stays as it is."""
    rng = np.random.default_rng(0)
    perfect = torch.from_numpy(tiny.val.toarray()), torch.eye(40)
    noise = replaced(tiny, features={"noise": rng.standard_normal((40, 6)).astype("f4")})
    fused, weights = late_fusion(noise, perfect)
    assert weights == {"noise": 0.0}
    for split in (tiny.val, tiny.test):
        after, before = (evaluate(*p, split, tiny.train) for p in (fused, perfect))
        assert after["recall@20"] == pytest.approx(before["recall@20"])


def searched(monkeypatch, curve: dict[float, float]) -> list[float]:
    """What the search finds where a second ranking adds to recall as its curve says."""

    def scripted(pairs, sums, train, val):
        return [curve.get(loud, 0.0) for _, loud in sums]

    monkeypatch.setattr("evaluate.recalls", scripted)
    pair = torch.ones(2, 1), torch.arange(3.0)[:, None]
    none = sparse.csr_matrix((2, 3))
    return line_search([pair, pair], none, none)


@pytest.mark.parametrize(
    ("recalls", "weight"),
    [
        ([0, 0, 0, 0.9, -0.9, -0.9, 0, 0], 0.3),  # the mean with its neighbours decides
        ([0, 0, 0.3, 0.4, 0.3, 0, 0, 0], 0.5),
        ([-1, -1, -1, 0.5, -1, -1, -1, -1], 0.0),
        ([0, 0, 0, 0, 0, 0, 0, 0], 0.0),
    ],
)
def test_an_isolated_peak_is_no_gain(recalls, weight, monkeypatch):
    curve = dict(zip(WEIGHTS, recalls, strict=True))
    assert searched(monkeypatch, curve) == [weight]


def test_what_gains_most_goes_first(monkeypatch):
    """Two rankings that know the same: the better one is taken, the other adds nothing."""
    asked = []

    def scripted(pairs, sums, train, val):
        asked.append(len(sums))
        return [max(0.1 * (second > 0), 0.3 * (third > 0)) for _, second, third in sums]

    monkeypatch.setattr("evaluate.recalls", scripted)
    pair = torch.eye(4), torch.randn(9, 4)
    none = sparse.csr_matrix((4, 9))
    weights = line_search([pair] * 3, none, none)
    assert weights[0] == 0 and weights[1] > 0
    assert asked == [1 + 2 * len(WEIGHTS), 1 + len(WEIGHTS)]


@pytest.mark.parametrize("room", [1, 90, 2**23])
def test_recalls_are_those_of_the_fused_rankings(room, tiny, monkeypatch):
    """Whatever the chunk; the pairs' own scores are left as they are."""
    pairs = [(torch.randn(60, n), torch.randn(40, n)) for n in (4, 2, 3)]
    sums = [[1.0, 0.0, 0.0], [1.0, 0.5, 0.0], [1.0, 0.3, 2.0]]
    expected = [
        evaluate(*fuse(pairs, weights), tiny.val, tiny.train)["recall@20"]
        for weights in sums
    ]
    monkeypatch.setattr("evaluate.CHUNK_SCORES", room)
    assert recalls(pairs, sums, tiny.train, tiny.val) == pytest.approx(expected)
    assert recalls(pairs, sums[::-1], tiny.train, tiny.val) == pytest.approx(expected[::-1])


def test_the_grid_ascends():
    assert 0 < WEIGHTS[0] and list(WEIGHTS) == sorted(WEIGHTS)

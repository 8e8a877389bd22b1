"""Loading, refusing, converting, generating and sampling."""

import collections
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, dense, replaced
from hypothesis import given, strategies as st
from scipy import sparse, stats

import data
from data import SPLITS, DataError

SHORT_NAMES = {"train": "trn", "val": "val", "test": "tst"}


def write_diffmm(dataset, folder, protocol=4):
    for split in SPLITS:
        with open(folder / f"{SHORT_NAMES[split]}Mat.pkl", "wb") as stream:
            pickle.dump(getattr(dataset, split).tocoo(), stream, protocol)


def write_json(dataset, folder, splits=SPLITS):
    for split in splits:
        matrix = getattr(dataset, split)
        lists = {str(u): matrix[u].indices.tolist() for u in range(matrix.shape[0])}
        (folder / f"{split}.json").write_text(json.dumps(lists))


def write_mats(dataset, folder):
    """A part in each form the family uses."""
    write_json(dataset, folder, ["train"])
    for split in ("val", "test"):
        with open(folder / f"{split}_mat", "wb") as stream:
            pickle.dump(getattr(dataset, split), stream)


def write_inter(dataset, folder):
    lines = ["rating\tuserID\titemID\tx_label"]
    for label, split in enumerate(SPLITS):
        lines += [
            f"5.0\t{u}\t{i}\t{label}"
            for u, i in zip(*getattr(dataset, split).nonzero(), strict=True)
        ]
    (folder / "shop.inter").write_text("\n".join(lines) + "\n")


LAYOUTS = {"DiffMM": write_diffmm, "MMSSL / PromptMM": write_json, "MMRec": write_inter}


def write_layout(writer, dataset, folder):
    folder.mkdir()
    writer(dataset, folder)
    for m, x in dataset.features.items():
        np.save(folder / f"{m}_feat.npy", x)
    return folder


def assert_same(one, two):
    for split in SPLITS:
        assert (getattr(one, split) != getattr(two, split)).nnz == 0
        assert getattr(two, split).dtype == np.float32
    assert list(one.features) == sorted(two.features) or set(one.features) == set(
        two.features
    )
    for m, x in one.features.items():
        assert two.features[m].dtype == np.float32
        assert np.array_equal(x, two.features[m])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_round_trip(layout, tiny, tmp_path, capsys):
    folder = write_layout(LAYOUTS[layout], tiny, tmp_path / "in")
    loaded = data.load(folder)
    assert f"{layout} layout" in capsys.readouterr().err
    assert_same(tiny, loaded)
    data.save(loaded, tmp_path / "out")
    again = data.load(tmp_path / "out")
    assert "native layout" in capsys.readouterr().err
    assert_same(tiny, again)
    assert (loaded.name, again.name) == ("in", "out")


def test_json_and_pickled_splits_may_be_mixed(tiny, tmp_path):
    assert_same(tiny, data.load(write_layout(write_mats, tiny, tmp_path / "in")))


@pytest.mark.parametrize("protocol", range(2, 6))
def test_matrix_pickles_of_each_binary_protocol(protocol, tiny, tmp_path):
    folder = write_layout(lambda d, f: write_diffmm(d, f, protocol), tiny, tmp_path / "in")
    assert_same(tiny, data.load(folder))


def test_pickles_of_old_numpy_and_scipy(tiny, tmp_path):
    """Their module paths lack an underscore; the allow-list knows both."""
    folder = write_layout(lambda d, f: write_diffmm(d, f, 2), tiny, tmp_path / "in")
    for file in folder.glob("*.pkl"):
        text = file.read_bytes().replace(
            b"numpy._core.multiarray", b"numpy.core.multiarray"
        )
        file.write_bytes(text.replace(b"scipy.sparse._coo", b"scipy.sparse.coo"))
        assert b"scipy.sparse.coo" in file.read_bytes()
    assert_same(tiny, data.load(folder))


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


class Cousin:
    """Nearly allowed: a name beside an allowed one."""

    def __reduce__(self):
        return np.fromfile, ("secret",)


@pytest.mark.parametrize(
    "payload, name",
    [(Bomb(), "system"), (Cousin(), "fromfile"), ({"a": np.float64}, "float64")],
)
def test_pickles_may_not_name_anything_else(payload, name, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_layout(write_diffmm, tiny, tmp_path / "in")
    (folder / "trnMat.pkl").write_bytes(pickle.dumps(payload))
    with pytest.raises(DataError, match=rf"trnMat.pkl: refused: it asks for \S*{name}"):
        data.load(folder)
    assert not (tmp_path / "exploded").exists()


def test_modalities_are_chosen_by_name(folder):
    assert list(data.load(folder, modalities="text").features) == ["text"]
    with pytest.raises(
        DataError, match="unknown modality 'smell', expected among text, visual"
    ):
        data.load(folder, modalities="text,smell")


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i4"])
def test_features_become_float32(dtype, folder):
    x = np.arange(40 * 3).reshape(40, 3).astype(dtype)
    np.save(folder / "visual_feat.npy", x)
    assert np.array_equal(data.load(folder).features["visual"], x.astype("f4"))


# ------------------------------------------------------------ refusals: one line, exit 2


def break_features(x):
    def change(folder):
        np.save(folder / "visual_feat.npy", x)

    return change


def break_split(split, matrix):
    def change(folder):
        sparse.save_npz(folder / f"{split}.npz", sparse.csr_matrix(matrix))

    return change


def break_bytes(name):
    def change(folder):
        (folder / name).write_bytes(b"\x80\x04 not what it says")

    return change


def remove(*names):
    def change(folder):
        for name in names:
            (folder / name).unlink()

    return change


def overlap(folder):
    train = sparse.load_npz(folder / "train.npz")
    sparse.save_npz(folder / "test.npz", train)


def nan_features(folder):
    x = np.load(folder / "text_feat.npy")
    x[3, 2], x[5, 1] = np.nan, np.inf
    np.save(folder / "text_feat.npy", x)


def everything_for_one_user(folder):
    train = sparse.load_npz(folder / "train.npz").toarray()
    train[4] = 1
    sparse.save_npz(folder / "train.npz", sparse.csr_matrix(train))
    for split in ("val", "test"):
        other = sparse.load_npz(folder / f"{split}.npz").toarray()
        other[4] = 0
        sparse.save_npz(folder / f"{split}.npz", sparse.csr_matrix(other))


def pickled_features(folder):
    np.save(folder / "visual_feat.npy", np.array([[None]] * 40), allow_pickle=True)


def broken_pointer(folder):
    matrix = sparse.load_npz(folder / "train.npz")
    matrix.indptr[5] = 10**6
    np.savez(
        folder / "train.npz",
        indptr=matrix.indptr,
        indices=matrix.indices,
        data=matrix.data,
        shape=matrix.shape,
        format=b"csr",
    )


NATIVE_REFUSALS = {
    "a missing split": (remove("val.npz"), r"native layout, expected also val\.npz"),
    "no layout": (
        remove("train.npz", "val.npz", "test.npz"),
        r"no recognised layout, expected one of native .*DiffMM .*MMSSL .*MMRec",
    ),
    "no features": (
        remove("visual_feat.npy", "text_feat.npy"),
        r"no feature file, expected <modality>_feat\.npy, such as image_feat",
    ),
    "splits of two shapes": (
        break_split("val", np.eye(60, 41)),
        r"expected splits of one shape",
    ),
    "empty training": (break_split("train", np.zeros((60, 40))), r"empty train split"),
    "empty test": (break_split("test", np.zeros((60, 40))), r"empty test split"),
    "overlapping splits": (overlap, r"expected disjoint splits, \d+ cells are in two"),
    "a user with every item": (everything_for_one_user, r"1 users have every item"),
    "feature rows": (
        break_features(np.ones((39, 4))),
        r"visual_feat\.npy: expected 40 rows, one an item, found shape \(39, 4\)",
    ),
    "1-d features": (
        break_features(np.ones(40)),
        r"visual_feat\.npy: expected numbers .*\[40\]",
    ),
    "object features": (pickled_features, r"visual_feat\.npy: cannot be read"),
    "text features": (
        break_features(np.array([["a"]] * 40)),
        r"_feat\.npy: expected numbers",
    ),
    "features without columns": (
        break_features(np.ones((40, 0))),
        r"expected numbers .*\[40, 0\]",
    ),
    "NaN and inf": (nan_features, r"text_feat\.npy: expected finite .* in 2 rows"),
    "beyond float32": (break_features(np.full((40, 2), 1e300)), r"infinity in 40 rows"),
    "corrupt npz": (break_bytes("train.npz"), r"train\.npz: cannot be read"),
    "corrupt index pointer": (broken_pointer, r"train\.npz: expected an index pointer"),
    "corrupt npy": (break_bytes("visual_feat.npy"), r"visual_feat\.npy: cannot be read"),
}


@pytest.mark.parametrize("case", NATIVE_REFUSALS)
def test_native_refusals(case, folder, tmp_path, capsys):
    change, message = NATIVE_REFUSALS[case]
    change(folder)
    with pytest.raises(DataError, match=message):
        data.load(folder)
    capsys.readouterr()
    assert data.main(["convert", str(folder), str(tmp_path / "out")]) == 2
    errors = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")
    ]
    assert len(errors) == 1
    assert str(folder) in errors[0]
    assert not (tmp_path / "out").exists()


FOREIGN_REFUSALS = {
    "negative id": (
        write_inter,
        "shop.inter",
        lambda t: t.replace("5.0\t0\t", "5.0\t-1\t", 1),
        r"expected user ids 0 to \d+, found -1",
    ),
    "id beyond the features": (
        write_inter,
        "shop.inter",
        lambda t: t + "5.0\t1\t40\t0\n",
        r"expected item ids 0 to 39, found 0 to 40",
    ),
    "label": (
        write_inter,
        "shop.inter",
        lambda t: t + "5.0\t1\t1\t3\n",
        r"x_label 0, 1 or 2",
    ),
    "header": (
        write_inter,
        "shop.inter",
        lambda t: t.replace("itemID", "item"),
        r"expected columns",
    ),
    "not numbers": (
        write_inter,
        "shop.inter",
        lambda t: t + "5.0\tann\t1\t0\n",
        r"cannot be read",
    ),
    "corrupt json": (
        write_json,
        "train.json",
        lambda t: t[:40],
        r"train\.json: cannot be read",
    ),
    "json list": (
        write_json,
        "train.json",
        lambda t: "[1, 2]",
        r"^[^:]+train\.json: expected an object of lists",
    ),
    "json nested": (
        write_json,
        "train.json",
        lambda t: '{"0": {"1": 2}}',
        r"\{user: \[items\]\}",
    ),
    "a user id beyond sense": (
        write_inter,
        "shop.inter",
        lambda t: t + "5.0\t9000000000\t1\t0\n",
        r"expected at most 100000000 users and 40 items, .* found \(9000000001, 40\)",
    ),
    "json text ids": (
        write_json,
        "train.json",
        lambda t: '{"0": ["a"]}',
        r"integer item ids",
    ),
    "json flags": (
        write_json,
        "train.json",
        lambda t: '{"0": [true]}',
        r"integer item ids",
    ),
}


@pytest.mark.parametrize("case", FOREIGN_REFUSALS)
def test_foreign_refusals(case, tiny, tmp_path):
    writer, name, change, message = FOREIGN_REFUSALS[case]
    folder = write_layout(writer, tiny, tmp_path / "in")
    (folder / name).write_text(change((folder / name).read_text()))
    with pytest.raises(DataError, match=message):
        data.load(folder)


def test_missing_folder_and_other_pickles(tiny, tmp_path):
    with pytest.raises(DataError, match="expected a dataset folder, found none"):
        data.load(tmp_path / "nowhere")
    folder = write_layout(write_diffmm, tiny, tmp_path / "in")
    (folder / "valMat.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(DataError, match="expected a scipy sparse matrix .* found list"):
        data.load(folder)


def test_warnings_are_kept(tiny, tmp_path, capsys):
    """Idle evaluated users, duplicates, zero and twin modalities: said, and loaded."""
    train = tiny.train.tolil()
    train[3] = 0
    x = tiny.features["visual"]
    odd = replaced(
        tiny, train=train.tocsr(), features={"a": x, "b": x, "c": np.zeros_like(x)}
    )
    folder = write_layout(write_inter, odd, tmp_path / "in")
    with open(folder / "shop.inter", "a") as stream:
        u, i = odd.train.nonzero()
        stream.write(f"1.0\t{u[0]}\t{i[0]}\t0\n" * 2)
    loaded = data.load(folder)
    assert_same(odd, loaded)
    warnings = [
        line for line in capsys.readouterr().err.splitlines() if "warning: " in line
    ]
    for words in (
        "2 duplicate interactions in train, merged",
        "1 test users have no training item",
        "b_feat.npy holds the same array as a_feat.npy",
        "c_feat.npy is zero throughout",
    ):
        assert any(words in line for line in warnings), words


# ------------------------------------------------------------ describing, converting


def test_describe_counts(tiny):
    figures = data.describe(tiny)
    total = sum(getattr(tiny, split).nnz for split in SPLITS)
    assert (figures["users"], figures["items"], figures["interactions"]) == (60, 40, total)
    assert figures["density"] == f"{total / 24:.3g} %"
    assert figures["items never trained"] == (dense(tiny).sum(0) == 0).sum() > 0
    assert figures["users without training items"] == (dense(tiny).sum(1) == 0).sum()


def test_describe_shows_what_training_would_refuse_then_refuses_it(folder, capsys):
    assert data.main(["describe", str(folder)]) == 0
    assert "error" not in capsys.readouterr().err
    overlap(folder)
    assert data.main(["describe", str(folder)]) == 2
    train = sparse.load_npz(folder / "train.npz").nnz
    shown = capsys.readouterr()
    assert f"interactions in two splits     {train}" in shown.out
    assert f"error: {folder}: expected disjoint splits" in shown.err


def test_describe_refuses_nan_and_warns_as_training_does(folder, capsys):
    np.save(folder / "text_feat.npy", np.zeros_like(np.load(folder / "text_feat.npy")))
    assert data.main(["describe", str(folder)]) == 0
    assert "text_feat.npy is zero throughout" in capsys.readouterr().err
    nan_features(folder)
    assert data.main(["describe", str(folder)]) == 2
    shown = capsys.readouterr()
    assert shown.out.startswith("dataset ") and "NaN or infinity in" in shown.err


def write_shop(folder, n_users=30):
    """A log with ids of one's own, and features in another order."""
    rng = np.random.default_rng(0)
    items = [f"item-{c}" for c in "qwertyuiopas"]
    pairs = [
        (f"user {u}", str(i)) for u in range(n_users) for i in rng.permutation(items)[:6]
    ]
    (folder / "log.csv").write_text(
        "time,user_id,item_id\n" + "".join(f"9,{u},{i}\n" for u, i in pairs)
    )
    (folder / "items.txt").write_text("\n".join(items) + "\n")
    np.save(folder / "v.npy", rng.standard_normal((12, 5)))
    return set(pairs), items


def convert(folder, *extra):
    return data.main(
        [
            "convert",
            str(folder / "out"),
            "--interactions",
            str(folder / "log.csv"),
            "--features",
            f"visual={folder / 'v.npy'}",
            "--items",
            str(folder / "items.txt"),
            *extra,
        ]
    )


def test_bring_your_own(tmp_path):
    pairs, items = write_shop(tmp_path)
    assert convert(tmp_path) == 0
    dataset, ids = (
        data.load(tmp_path / "out"),
        json.loads((tmp_path / "out/ids.json").read_text()),
    )
    assert ids["items"] == items
    back = {
        (ids["users"][u], items[i])
        for split in SPLITS
        for u, i in zip(*getattr(dataset, split).nonzero(), strict=True)
    }
    assert back == pairs
    assert (dataset.val.sum(1) == 1).all()
    assert (dataset.test.sum(1) == 1).all()
    assert np.array_equal(
        dataset.features["visual"], np.load(tmp_path / "v.npy").astype("f4")
    )


@pytest.mark.parametrize(
    "file, text, message",
    [
        ("log.csv", "a,b\n1,2\n", "expected columns user"),
        ("log.csv", "user,item\n", "found 0 and 1"),
        ("log.csv", "user,item\nx,item-?\n", r"found 1 others, such as \['item-\?'\]"),
        (
            "items.txt",
            "a\na\n",
            "expected 12 different ids, .* found 2, 1 of them different",
        ),
    ],
)
def test_own_data_refusals(file, text, message, tmp_path, capsys):
    write_shop(tmp_path)
    (tmp_path / file).write_text(text)
    assert convert(tmp_path) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_own_data_are_checked_before_they_are_written(tmp_path, capsys):
    write_shop(tmp_path)
    np.save(tmp_path / "v.npy", np.full((12, 5), np.nan))
    assert convert(tmp_path) == 2
    assert "NaN or infinity in 12 rows" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_convert_writes_only_to_a_new_folder(folder, tmp_path, capsys):
    assert data.main(["convert", str(folder), str(folder)]) == 2
    assert "exists, expected a new folder" in capsys.readouterr().err
    assert data.main(["convert", str(folder), str(tmp_path / "deep/er")]) == 0
    assert data.main(["convert", str(folder)]) == 2
    assert data.main(["describe"]) == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_save_leaves_nothing_half_written(tiny, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(OSError):
        data.save(tiny, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@given(st.lists(st.integers(0, 8), min_size=1, max_size=200), st.integers(0, 9))
def test_split_is_8_1_1_per_user(rows, seed):
    rows = np.array(rows)
    label = data.split_interactions(rows, np.random.default_rng(seed))
    for user in set(rows.tolist()):
        mine = collections.Counter(label[rows == user].tolist())
        n = sum(mine.values())
        expected = max(1, round(n / 10)) if n >= 3 else 0
        assert mine[1] == mine[2] == expected


# ------------------------------------------------------------ the embedded dataset


def test_synthetic_is_deterministic_and_valid(capsys):
    one, two, other = (
        data.synthetic(**TINY),
        data.synthetic(**TINY),
        data.synthetic(1, **TINY),
    )
    assert_same(one, two)
    assert data.fingerprint(one) == data.fingerprint(two) != data.fingerprint(other)
    data.validate(data.synthetic())
    assert capsys.readouterr().err == ""


def test_a_later_python_finds_the_same_fingerprint(tiny, monkeypatch):
    """The default protocol of pickle is another from 3.14 on: searches would be lost."""
    before, dumps = data.fingerprint(tiny), pickle.dumps
    monkeypatch.setattr(pickle, "dumps", lambda x, protocol=5: dumps(x, protocol))
    assert data.fingerprint(tiny) == before


def test_synthetic_is_the_same_with_any_number_of_threads():
    """Sums in a fixed order: BLAS would split them by thread, last bits and all."""
    command = [
        sys.executable,
        "-c",
        "import data; print(data.fingerprint(data.synthetic()))",
    ]
    prints = []
    for threads in ("1", "2"):
        names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
        environment = os.environ | dict.fromkeys(names, threads)
        root = Path(data.__file__).parent
        prints.append(
            subprocess.check_output(command, env=environment, cwd=root, text=True)
        )
    assert prints[0] == prints[1] == data.fingerprint(data.synthetic()) + "\n"


def test_synthetic_plants_what_it_says():
    """Features of rank 30 predict taste, save the noisy modality; skew; unseen items."""
    full = data.synthetic()
    popularity = np.sort(full.train.sum(0).A1)[::-1]
    assert popularity[:100].sum() > 0.25 * popularity.sum()
    assert (popularity == 0).sum() >= 10
    norms = {m: np.linalg.norm(x, axis=1).mean() for m, x in full.features.items()}
    assert norms["visual"] > 50 * norms["text"]
    explained = {}
    for m, x in full.features.items():
        values = np.linalg.eigvalsh(np.cov(x.T))[::-1]
        explained[m] = values[:30].sum() / values.sum()
    assert explained["visual"] > 0.9
    assert explained["text"] > 0.9
    assert explained["acoustic"] < 0.6


# ------------------------------------------------------------ sampling


def test_an_epoch_visits_every_edge_once(tiny):
    users, lists = data.Sampler(tiny.train).epoch(torch.Generator().manual_seed(0), 2)
    found = collections.Counter(zip(users.tolist(), lists[:, 0].tolist(), strict=True))
    assert found == collections.Counter(
        zip(*map(np.ndarray.tolist, tiny.train.nonzero()), strict=True)
    )
    again, _ = data.Sampler(tiny.train).epoch(torch.Generator().manual_seed(1), 2)
    assert users.tolist() != again.tolist()


@given(st.integers(0, 10**6), st.integers(2, 12), st.floats(0.05, 0.95))
def test_no_training_positive_among_the_negatives(seed, n_items, density):
    rng = np.random.default_rng(seed)
    train = rng.random((5, n_items)) < density
    train[:, rng.integers(n_items)] = False  # everyone lacks something
    train[0, :] = False
    train[0, (np.flatnonzero(~train[1])[0] + 1) % n_items] = True
    users, lists = data.Sampler(sparse.csr_matrix(train)).epoch(
        torch.Generator().manual_seed(seed), 20
    )
    assert ((lists >= 0) & (lists < n_items)).all()
    assert train[users, lists[:, 0]].all()
    assert not train[users[:, None].expand(-1, 20), lists[:, 1:]].any()


@pytest.mark.parametrize("owned", [[0], [9], [2, 3, 4, 8], [0, 1, 2, 3, 5, 6, 7, 8, 9]])
def test_negatives_are_uniform(owned):
    """Chi-square over the items that are free, on a fixed seed; columns may be unsorted."""
    train = sparse.csr_matrix(
        (np.ones(len(owned)), owned[::-1], [0, 0, len(owned)]), (2, 10)
    )
    sampler = data.Sampler(train)
    user = torch.ones(20_000, dtype=torch.long)
    drawn = sampler.negatives(user, torch.Generator().manual_seed(3))
    counts = np.bincount(drawn, minlength=10)
    free = np.setdiff1d(np.arange(10), owned)
    assert counts[owned].sum() == 0
    assert stats.chisquare(counts[free]).pvalue > 1e-3 or len(free) == 1


def test_devices_that_are_not_here():
    assert data.pick_device("cpu").type == "cpu"
    with pytest.raises(DataError, match="expected auto or one of .*cpu, found tpu"):
        data.pick_device("tpu")

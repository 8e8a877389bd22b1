"""Datasets: generate, sample, load and check four layouts, describe, convert.

    python data.py describe DIR
    python data.py convert DIR OUT
    python data.py convert OUT --interactions log.csv --features look=v.npy --items ids.txt

Read `Dataset` first, then `synthetic` (the embedded default) and `Sampler`, the triplets
and lists of Section 3.2 (errata C25, C26); then what the model reads of the features. The
rest is files: four layouts, checks, one's own data, the command line.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import operator
import os
import pickle
import re
import shutil
import signal
import sys
import traceback
import types
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import linalg, sparse
from torch import Tensor

SPLITS = ("train", "val", "test")
Splits = dict[str, sparse.csr_matrix]  # one [U, I] for each of SPLITS


@dataclass(frozen=True)
class Dataset:
    """Implicit feedback in three splits, and the content of the items (Section 2)."""

    name: str
    train: sparse.csr_matrix  # A, [U, I], 0/1
    val: sparse.csr_matrix  # [U, I], 0/1
    test: sparse.csr_matrix  # [U, I], 0/1
    features: dict[str, np.ndarray]  # x^m, {modality: float32 [I, d_m]}


class DataError(ValueError):
    """What a dataset has and what was expected, in one line, whatever a file is called."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def need(holds, message: str) -> None:
    """Refuse, in that one line, what does not hold."""
    if not holds:
        raise DataError(message)


# ------------------------------------------------------------ the embedded dataset


def synthetic(
    seed: int = 0,
    users: int = 1500,
    items: int = 1000,
    interactions: int = 24_000,
    dims: dict[str, int] | None = None,
    unexplained: float = 0.2,
    unseen: float = 0.03,
) -> Dataset:
    """A generated catalogue in which the paper's claims hold *because they were planted*.

    It is for watching the method work in a minute, no evidence about the real world.
    Planted:
    - a user's taste is a weight on 6 hidden factors per modality; visual and text drive it
      equally, acoustic half as much; popularity is skewed; each user has at least five
      interactions;
    - a share `unexplained` of the interactions follows popularity alone, whatever the
      content;
    - features have d_m dimensions but rank 6 + 24: the factors that matter, mixed at random
      with 24 louder ones that have nothing to do with taste, plus noise, which drowns the
      acoustic;
    - raw scales differ by two orders of magnitude between modalities;
    - a share `unseen` of the items is never in the training split.
    The same seed and sizes give the same data, bit for bit, with any number of threads.
    """
    rng = np.random.default_rng(seed)
    planted = {  # weight on taste, noise, raw scale
        "visual": (1.0, 0.5, 30.0),
        "text": (1.0, 0.5, 0.3),
        "acoustic": (0.5, 16.0, 3.0),
    }
    factors = []
    taste = []
    features = {}
    for m, d_m in (dims or {"acoustic": 128, "text": 384, "visual": 512}).items():
        weight, noise, scale = planted.get(m, (1.0, 0.5, 1.0))
        hidden = rng.standard_normal((items, 6), np.float32)
        features[m] = _content(hidden, d_m, noise, scale, rng)
        factors.append(hidden)
        taste.append(weight * rng.standard_normal((users, 6), np.float32))
    popularity = -0.6 * np.log(1 + rng.permutation(items)).astype(np.float32)  # [I]
    spare = interactions - 5 * users
    activity = 5 + rng.multinomial(spare, rng.dirichlet(np.full(users, 1.5)))  # [U]
    activity = np.minimum(activity, items // 2)
    by_taste = np.hstack(taste), np.hstack(factors)
    cells = _choose(*by_taste, popularity, activity, unexplained, rng)
    label = split_interactions(cells[:, 0], rng)
    cold = (rng.random(items) < unseen)[cells[:, 1]] & (label == 0)
    label[cold] = rng.integers(1, 3, cold.sum())
    splits = _labelled(cells, label, (users, items))
    return Dataset("synthetic", **splits, features=features)


def _content(hidden: np.ndarray, d_m: int, noise: float, scale: float, rng) -> np.ndarray:
    """Features [I, d_m]: the factors that matter [I, 6] amid louder ones that do not."""
    items = len(hidden)
    distractors = 1.5 * rng.standard_normal((items, 24), np.float32)
    mixing = rng.standard_normal((30, d_m), np.float32)
    x = _product(np.hstack([hidden, distractors]), mixing)
    x += noise * rng.standard_normal((items, d_m), np.float32)
    x += rng.standard_normal(d_m, np.float32)  # not centred
    return x * np.float32(scale / np.sqrt(d_m))


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b, summed in order: the same bits whatever the CPU and its number of threads."""
    total = np.zeros((len(a), b.shape[1]), np.float32)
    for column, row in zip(a.T, b, strict=True):
        total += np.outer(column, row)
    return total


def _choose(
    taste, factors, popularity, activity, unexplained, rng, chunk=1024
) -> np.ndarray:
    """Draw each user's items without replacement, by taste [U, f] · factors [I, f].

    Adding Gumbel noise to log-weights and keeping the largest is such a draw (Gumbel
    top-k); users in chunks, so that memory stays O(chunk x I). Returns cells [n, 2].
    """
    cells = []
    for start in range(0, len(taste), chunk):
        rows = slice(start, start + chunk)
        weight = _product(taste[rows], factors.T) * 0.8 + popularity  # [chunk, I]
        noise = rng.standard_exponential((2, *weight.shape), np.float32) + np.float32(1e-30)
        gumbel = -np.log(noise)  # [2, chunk, I]
        count = activity[rows]
        explained = count - rng.binomial(count, unexplained)
        chosen = _largest(weight + gumbel[0], explained)
        rest = np.where(chosen, -np.inf, popularity + gumbel[1])
        chosen |= _largest(rest, count - explained)
        cells.append(np.argwhere(chosen) + [start, 0])
    return np.concatenate(cells)


def _largest(keys: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Which are the count[r] < I largest keys of row r: bool [r, I]."""
    descending = -np.sort(-keys, axis=1)
    first_out = np.take_along_axis(descending, count[:, None], axis=1)  # [r, 1]
    return keys > first_out


def split_interactions(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """8:1:1 per user: 0 train, 1 validation, 2 test for each interaction, of user rows [n].

    A user with three or more has at least one in each split; with fewer, all are for
    training.

    >>> label = split_interactions(np.repeat([0, 1], [10, 2]), np.random.default_rng(0))
    >>> np.bincount(label).tolist()
    [10, 1, 1]
    """
    order = np.lexsort((rng.random(len(rows)), rows))  # users together, shuffled within
    count = np.bincount(rows, minlength=1)  # [U]
    start = count.cumsum() - count  # [U]
    rank = np.argsort(order) - start[rows]  # of each among its user's  [n]
    tenth = np.maximum(1, np.rint(count / 10)).astype(np.int64)
    held = np.where(count >= 3, tenth, 0)[rows]  # [n]
    return np.where(rank < held, 2, np.where(rank < 2 * held, 1, 0))


def _labelled(cells: np.ndarray, label: np.ndarray, shape) -> Splits:
    """Cells [n, 2] and their split 0/1/2 -> one matrix a split."""
    matrices = {}
    for i, split in enumerate(SPLITS):
        users, items = cells[label == i].T
        ones = np.ones(len(users), np.float32)
        matrices[split] = sparse.csr_matrix((ones, (users, items)), shape)
    return matrices


# ------------------------------------------------------------ sampling


class Sampler:
    """Triplets and lists of Sec. 3.2.1-3.2.2: each edge once an epoch, with negatives.

    A negative is uniform over the items the user has not interacted with in training. It is
    found directly: the r-th such item of a user lies past as many of the user's items a_0 <
    a_1 < … as satisfy a_j - j ≤ r, one binary search. Nothing is rejected and drawn again,
    so the work is the same for a user with three items and for one who lacks three, and
    nothing waits for the device.
    """

    def __init__(self, train: sparse.csr_matrix, device: torch.device | str = "cpu"):
        train = train.sorted_indices()
        user, item = (torch.from_numpy(ids).long() for ids in train.nonzero())
        start = torch.from_numpy(train.indptr).long()
        rank = torch.arange(len(user)) - start[user]  # j, of each edge among its user's
        self.items = train.shape[1]
        self.user = user.to(device)  # [E]
        self.item = item.to(device)  # [E]
        self.start = start.to(device)  # [U + 1]
        self.free = (self.items - start.diff()).to(device)  # items left to draw  [U]
        self.gaps = (user * self.items + item - rank).to(device)  # ascending, users in turn

    def negatives(self, user: Tensor, generator: torch.Generator) -> Tensor:
        """One negative item for each entry of `user` (any shape)."""
        draw = torch.rand(
            user.shape, generator=generator, device=user.device, dtype=torch.float64
        )
        r = (draw * self.free[user]).long()  # the r-th item that is free
        position = torch.searchsorted(self.gaps, user * self.items + r, right=True)
        return r + position - self.start[user]

    def epoch(
        self, generator: torch.Generator, negatives: int = 1
    ) -> tuple[Tensor, Tensor]:
        """All edges, shuffled: users [E], lists [E, 1 + negatives], column 0 positive."""
        # Column by column, users ascending: the binary searches stay in cache.
        drawn = [self.negatives(self.user, generator) for _ in range(negatives)]
        order = torch.randperm(len(self.user), generator=generator, device=self.user.device)
        lists = torch.stack([self.item, *drawn], dim=1)  # [E, 1 + negatives]
        return self.user[order], lists[order]


# ------------------------------------------------------------ what the model reads


def unit_rows(x: Tensor) -> Tensor:
    """x^m [I, d_m] centred over the items that have content, unit rows; the rest is zero.

    >>> unit_rows(torch.tensor([[3.0, 4.0], [1.0, 2.0], [0.0, 0.0]]))[2].abs().tolist()
    [0.0, 0.0]
    """
    filled = x.any(1, keepdim=True)  # [I, 1]
    x = x / x.abs().amax().clamp(min=1e-30)  # squares could overflow
    mean = x.sum(0) / filled.sum().clamp(min=1)
    return F.normalize((x - mean) * filled, dim=1)


def principal(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first principal directions of x [I, d_m], and the deviation along each.

    Both about the origin: the deviation is a root mean square.
    -> [d_m, k], [k] with k = min(count, d_m). Eigenvectors are unique up to their sign: the
    largest entry of each is made positive (errata P10).
    """
    n_items, d_m = x.shape
    chunks = (rows.double() for rows in x.split(4096))  # one at a time: all would be 2 x
    moment = sum(rows.T @ rows for rows in chunks) / n_items  # [d_m, d_m]
    largest = [max(0, d_m - count), d_m - 1]  # of the eigenvalues, which ascend
    values, vectors = linalg.eigh(moment.cpu().numpy(), subset_by_index=largest)
    values, vectors = values[::-1], vectors[:, ::-1]  # [k], [d_m, k]
    peak = np.abs(vectors).argmax(0)[None]
    sign = np.sign(np.take_along_axis(vectors, peak, 0))
    deviation = np.sqrt(values.clip(min=0))
    return torch.from_numpy(vectors * sign).to(x), torch.from_numpy(deviation).to(x)


def tokens(x: Tensor, axes: Tensor, deviation: Tensor, dim: int) -> Tensor:
    """η(x^m) of Eq. 3: principal components of x [I, d_m] -> [I, d], unit mean square.

    axes, deviation: from `principal`. Components below 1e-6 of the largest deviation, and
    those beyond d_m, are zero.
    """
    axes, deviation = axes[:, :dim], deviation[:dim]
    real = deviation > 1e-6 * deviation[0].clamp(min=1e-12)  # [k]
    components = x @ axes * (real / torch.where(real, deviation, 1.0))  # [I, k]
    return F.pad(components, (0, dim - axes.shape[1]))


# ------------------------------------------------------------ reading the four layouts

LAYOUTS = {  # the files of each split, the first that is there
    "native": [["train.npz"], ["val.npz"], ["test.npz"]],
    "DiffMM": [["trnMat.pkl"], ["valMat.pkl"], ["tstMat.pkl"]],
    "MMSSL / PromptMM": [
        ["train_mat", "train.json"],
        ["val_mat", "val.json"],
        ["test_mat", "test.json"],
    ],
    "MMRec": [["*.inter"], ["*.inter"], ["*.inter"]],  # one file, <name>.inter, for all
}
MOST_USERS = 10**8  # that a file may declare: more than any public dataset has
LARGEST = 1e30  # of a feature: sums of these stay finite in float32


def load(path: str | Path, check: bool = True, modalities: str = "") -> Dataset:
    """Read a dataset folder in whichever layout its files show (LAYOUTS), and say which.

    modalities: comma-separated names to keep, "" for all. With `check`, `validate` it.
    Raises DataError on anything that cannot be used.
    """
    folder = Path(path)
    need(folder.is_dir(), f"{folder}: expected a dataset folder, found none")
    layout, files = _layout(folder)
    print(f"{folder}: {layout} layout", file=sys.stderr)
    features = _features(folder, modalities)
    found = {split: _read(file, SPLITS.index(split)) for split, file in files.items()}
    splits = _matrices(files, found, n_items=len(next(iter(features.values()))))
    dataset = Dataset(folder.resolve().name, **splits, features=features)
    if check:
        validate(dataset, str(folder))
    return dataset


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _layout(folder: Path) -> tuple[str, dict[str, Path]]:
    """The first layout of which a file is there, and the file of each split."""
    for layout, splits in LAYOUTS.items():
        found = [[f for name in names for f in folder.glob(name)] for names in splits]
        if not any(found):
            continue
        for names, files in zip(splits, found, strict=True):
            need(files, f"{folder}: {layout} layout, expected also {' or '.join(names)}")
        need(len(found[0]) == 1 or layout != "MMRec", f"{folder}: expected one .inter file")
        return layout, {split: files[0] for split, files in zip(SPLITS, found, strict=True)}
    known = ", ".join(f"{layout} ({splits[0][0]} …)" for layout, splits in LAYOUTS.items())
    raise DataError(f"{folder}: no recognised layout, expected one of {known}")


@contextlib.contextmanager
def reading(file: Path) -> Iterator[None]:
    """Whatever goes wrong inside a stranger's file becomes one line that names the file."""
    try:
        yield
    except Exception as error:  # parsers raise a dozen types; all mean the same here
        reason = str(error) or type(error).__name__
        reason = reason if type(error) is DataError else f"cannot be read: {reason}"
        raise DataError(f"{file}: {reason}") from error


def _features(folder: Path, modalities: str) -> dict[str, np.ndarray]:
    files = {f.name.removesuffix("_feat.npy"): f for f in sorted(folder.glob("*_feat.npy"))}
    need(
        files,
        f"{folder}: no feature file, expected <modality>_feat.npy, such as image_feat.npy",
    )
    wanted = [m.strip() for m in modalities.split(",")] if modalities else list(files)
    for m in wanted:
        unknown = f"{folder}: unknown modality {m!r}, expected among {', '.join(files)}"
        need(m in files, unknown)
    return {m: read_features(files[m]) for m in wanted}


def read_features(file: Path) -> np.ndarray:
    """One modality's array [I, d_m] as float32; DataError if it is no such array."""
    with reading(file):
        array = np.load(file, allow_pickle=False)
        need(isinstance(array, np.ndarray), "expected an array, found an archive")
        need(
            array.ndim == 2 and array.dtype.kind in "fiu" and array.size,
            f"expected numbers [items, d_m], found {array.dtype} {list(array.shape)}",
        )
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(array, dtype=np.float32)


# A pickle runs what it names. Here all that it may name stands for itself alone: nothing of
# numpy or scipy is built by a file, and plain checks read what these were given.


class _Part:
    """What a pickle names: it keeps what it is given, and does nothing."""

    given: tuple = ()
    state: Any = None

    def __init__(self, *given):
        self.given = given

    def __setstate__(self, state):
        self.state = state


class _Fields(dict):
    """A pickle's dict, keyed by text: a hash of tuples nested too deep ends the process."""

    def __setitem__(self, name, value):
        need(type(name) is str, "refused: expected fields by name, found other keys")
        super().__setitem__(name, value)


def _begin_fields(unpickler):
    unpickler.append(_Fields())


def _refuse(_):
    raise DataError("refused: it has sets or long numbers, expected a scipy sparse matrix")


class _Unpickler(pickle._Unpickler):
    """Python's own: the one in C allocates as much as a number in the file says."""

    dispatch = dict(pickle._Unpickler.dispatch)
    dispatch |= {
        pickle.EMPTY_DICT[0]: _begin_fields,
        # Bytes, written alike: a bytearray is allocated, and filled, before it is read.
        pickle.BYTEARRAY8[0]: dispatch[pickle.BINBYTES8[0]],
        **dict.fromkeys(pickle.DICT + pickle.ADDITEMS + pickle.FROZENSET, _refuse),
        **dict.fromkeys(pickle.INT + pickle.LONG + pickle.LONG4, _refuse),
    }
    known = {  # later versions put an underscore before a module's name
        path: type(path.rpartition(".")[2], (_Part,), {})
        for path in [
            "scipy.sparse.coo.coo_matrix",
            "scipy.sparse.csr.csr_matrix",
            "scipy.sparse.csc.csc_matrix",
            "numpy.core.multiarray._reconstruct",  # an array, protocols 2 to 4
            "numpy.core.numeric._frombuffer",  # and protocol 5
            "numpy.ndarray",
            "numpy.dtype",
            "_codecs.encode",  # bytes, protocol 2
        ]
    }

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module.replace('._', '.')}.{name}"
        need(
            path in self.known,
            f"refused: it asks for {module}.{name}, expected a scipy sparse matrix",
        )
        return self.known[path]


def _array(part: Any) -> np.ndarray:
    """The array [n] of numbers that a pickle describes, of as many bytes as it needs."""
    if type(part).__name__ == "_frombuffer":
        content, dtype, shape, *_ = part.given
    else:
        *_, shape, dtype, _, content = part.state
    if isinstance(content, _Part):
        content = content.given[0].encode("latin1")
    kind = dtype.state[1] + dtype.given[0]  # byte order, then kind and size
    numbers = re.fullmatch("[<>|][biuf][1248]", kind)  # an exception if it is no text
    need(numbers, f"expected an array of numbers, found {kind}")
    array = np.frombuffer(content, kind)
    need(shape == array.shape, f"expected a shape of {array.shape}, found another")
    return array


Cells = tuple[np.ndarray, np.ndarray]  # users [n], items [n]


def _read(file: Path, label: int) -> tuple[Cells, tuple | None]:
    """A split's interactions, and the matrix shape if the file stores one."""
    if file.suffix == ".json":
        return _read_json(file), None
    with reading(file):
        if file.suffix == ".inter":
            return _read_inter(file, label), None
        return _read_matrix(file)


def _read_matrix(file: Path) -> tuple[Cells, tuple]:
    """The positive entries of a matrix, and the shape that it declares.

    Nothing is allocated by that shape. A zero that is stored is no interaction.
    """
    form, fields = _fields(file)
    known = form in ("coo", "csr", "csc")
    need(known, f"expected a scipy sparse matrix, coo, csr or csc, found {form}")
    n_users, n_items = map(operator.index, fields["_shape"])
    names = ("row", "col") if form == "coo" else ("indptr", "indices")
    # An exception for ids with fractions, which must not be cut off.
    first, second = (fields[m].astype(np.int64, casting="same_kind") for m in names)
    values = fields["data"].astype(np.float64, casting="same_kind")
    if form != "coo":
        first = _spread(first, n_users if form == "csr" else n_items, len(second))
        second, values = second[: len(first)], values[: len(first)]
    users, items = (second, first) if form == "csc" else (first, second)
    need(
        users.shape == items.shape == values.shape,
        f"expected a value for each cell, found {values.shape} for {users.shape}",
    )
    low, high = values.min(initial=0), values.max(initial=0)
    need(
        0 <= low and high < np.inf,
        f"expected finite values, none negative, found {low} to {high}",
    )
    kept = values > 0
    return (users[kept], items[kept]), (n_users, n_items)


def _fields(file: Path) -> tuple[str, dict]:
    """What a file has of a sparse matrix: the format, and arrays and shape by name."""
    with open(file, "rb") as stream:
        if file.suffix == ".npz":
            with np.load(stream) as saved:  # which refuses objects
                fields = dict(saved)
            fields["_shape"] = fields["shape"].tolist()
            return str(fields["format"].astype(str)), fields
        matrix = _Unpickler(stream).load()
    state: Any = getattr(matrix, "state", None)
    found = type(matrix).__name__
    need(type(state) is _Fields, f"expected a scipy sparse matrix [U, I], found {found}")
    if "coords" in state:  # since scipy 1.13
        state["row"], state["col"] = state["coords"]
    for name in {"row", "col", "indptr", "indices", "data"} & set(state):
        state[name] = _array(state[name])
    return found.removesuffix("_matrix"), state


def _spread(ends: np.ndarray, count: int, stored: int) -> np.ndarray:
    """The index pointer [count + 1] of csr or csc -> the row or column of each entry."""
    ascends = ends[0] == 0 and np.array_equal(ends, np.sort(ends).clip(0, stored))
    need(
        ascends and ends.shape == (count + 1,),
        f"expected an index pointer of {count + 1} numbers ascending from 0 to {stored}, "
        f"found {ends.size} to {ends[-1]}",
    )
    return np.repeat(np.arange(count), np.diff(ends))


def _read_json(file: Path) -> Cells:
    lists = read_json(file)
    with reading(file):
        need(
            {type(items) for items in lists.values()} <= {list}, "expected {user: [items]}"
        )
        pairs = [(int(user), item) for user, items in lists.items() for item in items]
        integers = {type(item) for _, item in pairs} <= {int}
        need(integers, "expected integer item ids, found others")
        users, items = np.array(pairs, np.int64).reshape(-1, 2).T
        return users, items


def _read_inter(file: Path, label: int) -> Cells:
    wanted = ("userID", "itemID", "x_label")
    with open(file, encoding="utf-8-sig") as stream:
        header = stream.readline().rstrip("\r\n").split("\t")
        once = {header.count(name) for name in wanted} == {1}
        need(once, f"expected columns {wanted}, found {header}")
        columns = [header.index(name) for name in wanted]
        with warnings.catch_warnings(action="ignore"):  # of no rows
            table = np.loadtxt(
                stream, np.int64, delimiter="\t", ndmin=2, comments=None, usecols=columns
            )
    need(np.isin(table[:, 2], (0, 1, 2)).all(), "expected x_label 0, 1 or 2, found others")
    users, items = table[table[:, 2] == label, :2].T
    return users, items


def _matrices(files: dict, found: dict, n_items: int) -> Splits:
    """0/1 matrices of one shape: as stored, else largest user id + 1 by feature rows.

    They allocate by that shape, so it is checked first.
    """
    shapes = {split: shape for split, (_, shape) in found.items() if shape}
    need(
        len(set(shapes.values())) <= 1,
        f"{files['train'].parent}: expected splits of one shape, found {shapes}",
    )
    n_users = 1 + max(int(users.max(initial=-1)) for (users, _), _ in found.values())
    shape = next(iter(shapes.values()), (n_users, n_items))
    need(
        0 <= shape[0] <= MOST_USERS and shape[1] == n_items,
        f"{files['train']}: expected at most {MOST_USERS} users and {n_items} items, "
        f"as many as feature rows, found {shape}",
    )
    return {
        split: _matrix(files[split], split, cells, shape)
        for split, (cells, _) in found.items()
    }


def _matrix(file: Path, split: str, cells: Cells, shape) -> sparse.csr_matrix:
    """One split, ids within its shape; duplicates are merged, and said."""
    for kind, ids, limit in zip(("user", "item"), cells, shape, strict=True):
        low, high = ids.min(initial=0), ids.max(initial=0)
        need(
            0 <= low and high < max(limit, 1),
            f"{file}: expected {kind} ids 0 to {limit - 1}, found {low} to {high}",
        )
    ones = np.ones(len(cells[0]), np.float32)
    matrix = sparse.csr_matrix((ones, cells), shape)
    if merged := len(ones) - matrix.nnz:
        _warn(f"{file}: {merged} duplicate interactions in {split}, merged")
    matrix.data[:] = 1
    return matrix


# ------------------------------------------------------------ checking and describing


def validate(dataset: Dataset, where: str = "") -> None:
    """Raise DataError if a dataset cannot be trained or judged on; warn of the doubtful."""
    where = where or dataset.name
    n_items = dataset.train.shape[1]
    for split in SPLITS:
        _check_split(dataset, split, where)
    shared = overlap(dataset)
    need(not shared, f"{where}: expected disjoint splits, {shared} cells are in two")
    full = (np.diff(dataset.train.indptr) == n_items).sum()
    need(
        not full,
        f"{where}: expected a negative for every user, {full} users have every item",
    )
    for m, x in dataset.features.items():
        file = f"{where}: {m}_feat.npy"
        _check_features(file, x, n_items)
        for other, y in dataset.features.items():
            if other < m and np.array_equal(x, y):
                _warn(f"{file} holds the same array as {other}_feat.npy")


def _check_split(dataset: Dataset, split: str, where: str) -> None:
    matrix, train = getattr(dataset, split), dataset.train
    need(
        matrix.shape == train.shape,
        f"{where}: expected splits of shape {train.shape}, found {split} of {matrix.shape}",
    )
    need(matrix.nnz, f"{where}: empty {split} split, expected at least one interaction")
    cold = ((np.diff(train.indptr) == 0) & (np.diff(matrix.indptr) > 0)).sum()
    if cold:
        _warn(f"{where}: {cold} {split} users have no training item")


def _check_features(file: str, x: np.ndarray, n_items: int) -> None:
    need(
        x.ndim == 2 and len(x) == n_items,
        f"{file}: expected {n_items} rows, one an item, found shape {x.shape}",
    )
    broken = len(x) - (np.abs(x) <= LARGEST).all(1).sum()
    need(
        not broken,
        f"{file}: expected finite numbers to {LARGEST}, "
        f"found larger ones, NaN or infinity in {broken} rows",
    )
    if not x.any():
        _warn(f"{file} is zero throughout")


def overlap(dataset: Dataset) -> int:
    """How many interactions are in more than one split."""
    together = dataset.train + dataset.val + dataset.test
    return int((together.data > 1).sum())


def describe(dataset: Dataset) -> dict[str, str | int]:
    """The figures of Table 3 and more, by name, in reading order. Needs no valid dataset.

    >>> figures = describe(synthetic(users=60, items=40, interactions=600))
    >>> figures["users"], figures["items"], figures["density"]
    (60, 40, '24.5 %')
    """
    train = dataset.train
    users, items = train.shape
    sizes = {split: getattr(dataset, split).nnz for split in SPLITS}
    total = sum(sizes.values())
    figures = {"dataset": dataset.name, "users": users, "items": items}
    figures |= {"interactions": total, **sizes}
    figures["density"] = f"{100 * total / max(1, users * items):.3g} %"
    for m, x in dataset.features.items():
        zero = (~x.any(1)).sum()
        repeated = len(x) - len({row.tobytes() for row in x})
        shape = f"{len(x)} x {x.shape[1]}"
        figures[f"features {m}"] = f"{shape}, {zero} zero, {repeated} repeated rows"
    figures["users without training items"] = int((np.diff(train.indptr) == 0).sum())
    figures["items never trained"] = items - len(np.unique(train.indices))
    figures["interactions in two splits"] = overlap(dataset)
    return figures


def _once(pairs: list) -> dict:
    """A JSON object that has no key twice: of two lists the first would be lost."""
    found = dict(pairs)
    need(len(found) == len(pairs), "expected each key once, found one more than once")
    return found


def read_json(path: Path, *keys: str, sealed: bool = False) -> dict:
    """A JSON object that has these keys, or DataError. sealed: as `write` wrote it."""
    with reading(path):
        text = unseal(path) if sealed else Path(path).read_bytes()
        content = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_once)
        holds = isinstance(content, dict) and set(keys) <= set(content)
        need(holds, f"expected an object {keys or 'of lists'}")
        if sealed:
            del content["digest"]
        return content


def read_torch(path: Path, device: torch.device) -> dict:
    """What torch.save wrote, sealed; tensors and plain values only, or DataError."""
    with reading(path):
        return torch.load(io.BytesIO(unseal(path)), device, weights_only=True)


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """What np.savez wrote, sealed, or DataError."""
    with reading(path), np.load(io.BytesIO(unseal(path))) as stored:
        return dict(stored)


def fingerprint(dataset: Dataset, whole: bool = True) -> str:
    """Equal for equal data, whatever the folder; else for equal training interactions."""
    splits = SPLITS if whole else SPLITS[:1]
    cells = [np.array(getattr(dataset, split).nonzero()) for split in splits]
    features = sorted(dataset.features.items()) if whole else []
    content = pickle.dumps((dataset.train.shape, cells, features), protocol=4)
    return hashlib.blake2b(content, digest_size=16).hexdigest()


# ------------------------------------------------------------ writing and converting


def write(path: Path, content: str | bytes | dict | Callable) -> None:
    """A file, whole or not at all. content: text, bytes, or what `seal` takes."""
    if isinstance(content, str):
        content = content.encode()
    whole = content if isinstance(content, bytes) else seal(content)
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two processes, two drafts
    try:
        draft.write_bytes(whole)
        draft.replace(path)
    except OSError as error:  # a full disk does not say which file it was
        error.filename = str(path)
        raise
    finally:
        draft.unlink(missing_ok=True)


def seal(content: dict | Callable) -> memoryview:
    """JSON of an object, or the zip that a function writes to a stream, with its digest.

    The digest is JSON's last value or the zip's comment, where no other reader minds it.
    """
    stream, end = io.BytesIO(), b"\n\n"
    if isinstance(content, dict):
        text = json.dumps(content, indent=1, allow_nan=False)
        stream.write(f'{text[:-2]},\n "digest": "'.encode())
        end = b'"}'
    else:
        content(stream)
        stream.seek(-2, io.SEEK_END)
        stream.write(b"\x0a\0")  # a zip ends with its comment's length: digest and end
    stream.write(digest(stream.getbuffer()).encode() + end)
    return stream.getbuffer()


def unseal(path: Path) -> bytes:
    """A file as `seal` made it, or DataError if a byte is another."""
    whole = Path(path).read_bytes()
    same = digest(memoryview(whole)[:-10]).encode() == whole[-10:-2]
    need(same, "cannot be read: damaged, or of an earlier version: its digest is not there")
    return whole


def digest(content) -> str:
    """Of bytes, against damage: a CRC costs an epoch a millisecond."""
    return f"{zlib.crc32(content):08x}"


def write_table(path: Path, rows: list[dict]) -> None:
    """Rows as CSV, whole; columns are those of all rows, empty where a row lacks one."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[str(row.get(name, "")) for name in columns] for row in rows]
    write(path, "".join(",".join(line) + "\n" for line in [columns, *cells]))


def save(dataset: Dataset, path: str | Path, ids: dict | None = None) -> None:
    """Write the native layout to a new folder, whole or not at all; ids: for ids.json."""
    folder = Path(path)
    need(not folder.exists(), f"{folder}: exists, expected a new folder to write to")
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    draft.mkdir(parents=True)
    try:
        for split in SPLITS:
            sparse.save_npz(draft / f"{split}.npz", getattr(dataset, split))
        for m, x in dataset.features.items():
            with open(draft / f"{m}_feat.npy", "wb") as stream:
                # Given a real file, numpy overlooks that the disk is full.
                np.save(types.SimpleNamespace(write=stream.write), x)
        if ids:
            ids = ids | {"fingerprint": fingerprint(dataset, whole=False)}
            write(draft / "ids.json", json.dumps(ids))
        draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def own_ids(file: Path, dataset: str, **counts: int) -> dict[str, list[str]]:
    """Users' and items' ids from ids.json, of the data of this fingerprint alone."""
    ids = read_json(file, "fingerprint", *counts)
    same = ids["fingerprint"] == dataset
    need(same, f"{file}: expected the ids of the run's data, found those of others")
    for kind, count in counts.items():
        names = ids[kind]
        strings = isinstance(names, list) and {type(name) for name in names} <= {str}
        expected = f"{file}: expected {kind} as a list of {count} strings"
        need(strings and len(names) == count, f"{expected}, found others")
    return ids


def from_log(
    log: Path, features: dict[str, Path], items: Path | None = None, seed: int = 0
) -> tuple[Dataset, dict]:
    """One's own data: a CSV of interactions with any ids, and feature arrays.

    `items` names the item of each feature row, one id a line; without it the CSV's item ids
    are the row numbers. Returns the dataset and {"users": [...], "items": [...]}, ids by
    index.
    """
    pairs = _read_log(log)
    arrays = {m: read_features(file) for m, file in features.items()}
    need(
        arrays and pairs,
        f"{log}: expected interactions and --features MODALITY=FILE.npy, "
        f"found {len(pairs)} and {len(arrays)}",
    )
    n_items = len(next(iter(arrays.values())))
    names = _item_names(items, n_items) if items else [str(i) for i in range(n_items)]
    column = {name: i for i, name in enumerate(names)}
    strange = sorted({item for _, item in pairs if item not in column})
    need(
        not strange,
        f"{log}: expected items of {items or 'the feature rows'}, "
        f"found {len(strange)} others, such as {strange[:3]}",
    )
    row = {name: i for i, name in enumerate(dict.fromkeys(user for user, _ in pairs))}
    cells = np.unique([(row[user], column[item]) for user, item in pairs], axis=0)  # [n, 2]
    if len(cells) < len(pairs):
        _warn(f"{log}: {len(pairs) - len(cells)} duplicate interactions, merged")
    label = split_interactions(cells[:, 0], np.random.default_rng(seed % 2**32))
    splits = _labelled(cells, label, (len(row), n_items))
    ids = {"users": list(row), "items": names}
    return Dataset(log.stem, **splits, features=arrays), ids


def _read_log(log: Path) -> list[tuple[str, str]]:
    """(user, item) of each row of a CSV or TSV that has such columns."""
    with reading(log), open(log, newline="", encoding="utf-8-sig") as stream:
        delimiter = "\t" if log.suffix == ".tsv" else ","
        rows = csv.reader(stream, delimiter=delimiter, strict=True)
        header = next(rows, [])
        # Of user_id, userID, User ID or user: user.
        kinds = [name.lower().strip().removesuffix("id").rstrip("_ ") for name in header]
        once = kinds.count("user") == kinds.count("item") == 1
        need(once, f"expected columns user (or user_id) and item, found {header}")
        user, item = kinds.index("user"), kinds.index("item")
        pairs = []
        for row in filter(None, rows):  # without empty lines
            whole = len(row) == len(header) and row[user].strip() and row[item].strip()
            need(
                whole,
                f"line {rows.line_num}: expected {len(header)} cells, with a user and an "
                f"item, found {row}",
            )
            pairs.append((row[user].strip(), row[item].strip()))
    hidden = rows.line_num - 1 - len(pairs)  # a stray quote swallows all up to the next
    if hidden:
        _warn(f"{log}: {hidden} lines are empty or within quotes: no rows of their own")
    return pairs


def _item_names(file: Path, n_items: int) -> list[str]:
    """The item of each feature row, one id a line."""
    with reading(file):
        lines = file.read_text("utf-8-sig").split("\n")
    names = [line.strip() for line in lines if line.strip()]
    distinct = len(set(names))
    need(
        len(names) == distinct == n_items,
        f"{file}: expected {n_items} different ids, one a feature row, "
        f"found {len(names)}, {distinct} of them different",
    )
    return names


# ------------------------------------------------------------ command line


def same_figures(device: torch.device) -> None:
    """The same seed gives the same figures, on a CPU."""
    torch.use_deterministic_algorithms(device.type == "cpu")
    # Deterministic mode would fill each `empty` first.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore


def pick_device(name: str) -> torch.device:
    """auto: CUDA where there is one, else the CPU; otherwise as asked, or DataError."""
    here = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["cpu"]
    device = {"auto": here[0], "cuda": "cuda:0"}.get(name, name)
    expected = f"--device: expected auto or one of {', '.join(here)}, found {name}"
    need(device in here, expected)
    return torch.device(device)


def check_settings(config) -> None:
    """Refuse a value outside the type, choices or bounds of a field (promptmm.setting)."""
    for one in fields(config):
        value, allowed = getattr(config, one.name), one.metadata
        kind: Any = one.type
        kind = kind | int if isinstance(one.default, float) else kind
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, kind):
            holds = False
            expected = f"a value such as {one.default!r}"
        elif isinstance(value, str):
            holds = value in allowed["choices"]
            expected = " or ".join(allowed["choices"])
        else:
            holds = allowed["low"] <= value < allowed["high"]
            expected = "{low} <= number < {high}".format(**allowed)
        need(holds, f"{one.name}: expected {expected}, found {value}")


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, raised rather than printed."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.add_argument("--traceback", action="store_true", help="where an error arose")

    def error(self, message: str):
        raise DataError(f"{self.prog}: {message}; see --help")

    def add_settings(self, config: type) -> None:
        """A flag for each field of a dataclass; one not given stays out of the result."""
        for one in fields(config):
            how: dict[str, Any] = {"type": one.type}
            if one.type is bool:
                how = {"action": argparse.BooleanOptionalAction}
            elif one.type == float | str:
                how = {"type": number_or_word}
            words = [
                one.metadata["help"],
                *one.metadata["choices"],
                f"(default: {one.default})",
            ]
            flag = f"--{one.name.replace('_', '-')}"
            self.add_argument(flag, default=argparse.SUPPRESS, help=" ".join(words), **how)


def number_or_word(text: str) -> float | str:
    """What a flag of type float | str means; argparse names this function if it fails."""
    return text if text.isalpha() else float(text)


def guarded(command: Callable[[list[str]], None], argv: list[str] | None, hint: str) -> int:
    """Run a command; whatever ends it early is one line. Returns the exit status.

    hint: what an interrupted command leaves. `--traceback` shows where an error arose.
    """
    words = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter that it lacks is spelt out
            stream.reconfigure(errors="backslashreplace")
    former = signal.signal(signal.SIGTERM, _terminated)
    status, line = 0, ""
    try:
        _check_words(words)
        command(words)
        print(end="", flush=True)  # at exit, a full disk would be Python's to report
    except (Exception, KeyboardInterrupt) as error:
        if "--traceback" in words:
            traceback.print_exc()
        status, line = _outcome(error, hint)
    finally:
        signal.signal(signal.SIGTERM, former)
    _say("", sys.stdout, 1)
    _say(line, sys.stderr, 2)
    return status


def _check_words(words: list[str]) -> None:
    """Refuse an empty argument: a variable of the shell that is not set."""
    for before, word in zip(["the command", *words], words, strict=False):
        empty = re.fullmatch(r"(--[\w-]+=)?", word)
        need(not empty, f"expected a value after {word or before}, found none")


def _terminated(number: int, _) -> None:
    raise KeyboardInterrupt(number)


def _outcome(error: BaseException, hint: str) -> tuple[int, str]:
    """The exit status that an error means, and its line."""
    text = " ".join(str(error).splitlines())
    if isinstance(error, BrokenPipeError):  # as of `| head`: who read it has left
        return 128 + signal.SIGPIPE, ""
    if isinstance(error, KeyboardInterrupt):
        return 128 + (error.args or (signal.SIGINT,))[0], f"interrupted; {hint}\n"
    if isinstance(error, (DataError, OSError, FloatingPointError)):
        return 1 if isinstance(error, FloatingPointError) else 2, f"error: {text}\n"
    if isinstance(error, MemoryError) or "allocate" in text:
        return 2, f"error: expected more memory, or a smaller model: {text}\n"
    kind = type(error).__name__
    return 1, f"error: unexpected: {kind}: {text}; --traceback shows where\n"


def _say(text: str, stream, number: int) -> None:
    """Print; a stream that takes no more is given up, or Python would report it at exit."""
    try:
        print(end=text, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def main(argv: list[str] | None = None) -> int:
    """`describe` and `convert`; returns the exit status, 2 for what cannot be used."""
    return guarded(_command, argv, "nothing was written")


def _command(argv: list[str]) -> None:
    args = _parser().parse_args(argv)
    if args.command == "convert":
        return _convert(args)
    dataset = load(args.folder, check=False)
    for name, value in describe(dataset).items():
        print(f"{name:30} {value}")
    validate(dataset, args.folder)  # its figures may say why it is refused


def _parser() -> Parser:
    parser = Parser(prog="data.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    describing = commands.add_parser("describe", help="print a dataset's statistics")
    describing.add_argument("folder")
    convert = commands.add_parser("convert", help="write the native layout")
    convert.add_argument("paths", nargs="+", metavar="[SRC] OUT")
    convert.add_argument(
        "--interactions", type=Path, help="CSV of users and items, any ids"
    )
    convert.add_argument("--features", nargs="+", default=[], metavar="MODALITY=FILE.npy")
    convert.add_argument("--items", type=Path, help="item ids, in the feature rows' order")
    convert.add_argument("--seed", type=int, help="of the 8:1:1 split (default 0)")
    return parser


def _convert(args: argparse.Namespace) -> None:
    *source, out = args.paths
    own = args.interactions or args.features or args.items or args.seed is not None
    fits = not source and args.interactions if own else len(source) == 1
    need(
        fits,
        "expected SRC OUT, or OUT with --interactions, --features, --items, --seed",
    )
    if args.interactions:
        pairs = [pair.partition("=") for pair in args.features]
        files = {m: Path(file) for m, _, file in pairs if m.isidentifier() and file}
        need(
            len(files) == len(pairs),
            "--features: expected MODALITY=FILE.npy, each modality once, of letters, "
            f"digits and _, found {' '.join(args.features)}",
        )
        dataset, ids = from_log(args.interactions, files, args.items, args.seed or 0)
        validate(dataset, str(args.interactions))
        save(dataset, out, ids)
    else:
        dataset = load(source[0])
        save(dataset, out)
    shape = " x ".join(map(str, dataset.train.shape))
    print(f"{out}: {shape}, {', '.join(dataset.features)}")


if __name__ == "__main__":
    sys.exit(main())

"""Datasets: load and check four public layouts, describe, convert, generate; and sampling.

    python data.py describe DIR
    python data.py convert DIR OUT
    python data.py convert OUT --interactions log.csv --features visual=v.npy --items items.txt

Read `Dataset` first, then `load`, `validate`, `synthetic` (the embedded default) and, at the end,
`Sampler`, the triplets and lists of Section 3.2 (errata C25, C26).
"""

import argparse
import contextlib
import csv
import json
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

SPLITS = ("train", "val", "test")
LAYOUTS = (
    "native: train.npz val.npz test.npz; DiffMM: trnMat.pkl valMat.pkl tstMat.pkl; "
    "MMSSL / PromptMM: {train,val,test}.json or train_mat val_mat test_mat; MMRec: <name>.inter; "
    "each with <modality>_feat.npy"
)


class DataError(ValueError):
    """What a dataset has and what was expected, in one line."""


@dataclass(frozen=True)
class Dataset:
    """Implicit feedback in three splits, and the content of the items (Section 2)."""

    name: str
    train: sparse.csr_matrix  # A, [U, I], 0/1
    val: sparse.csr_matrix  # [U, I], 0/1
    test: sparse.csr_matrix  # [U, I], 0/1
    features: dict[str, np.ndarray]  # x^m, {modality: float32 [I, d_m]}


# ---------------------------------------------------------------- reading the four layouts


def load(path: str | Path, check: bool = True, modalities: str = "") -> Dataset:
    """Read a dataset folder in whichever layout its files show (see LAYOUTS).

    modalities: comma-separated names to keep, "" for all. With `check`, `validate` it and print its
    warnings. Prints which layout it took. Raises DataError on anything that cannot be used.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a dataset folder, found none")
    name, read = _layout(folder)
    print(f"{folder}: {name} layout", file=sys.stderr)
    features = _features(folder, modalities)
    splits = {split: read(split) for split in SPLITS}  # {split: (file, users, items, shape or None)}
    matrices = _matrices(splits, len(next(iter(features.values()))))
    dataset = Dataset(folder.resolve().name, **matrices, features=features)
    if check:
        for warning in validate(dataset, str(folder)):
            _warn(warning)
    return dataset


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _layout(folder: Path):
    """The first layout whose files are there: its name, and a reader of one split."""
    inter = sorted(folder.glob("*.inter"))
    candidates = (
        ("native", {s: (f"{s}.npz",) for s in SPLITS}, _read_npz),
        ("DiffMM", dict(zip(SPLITS, (("trnMat.pkl",), ("valMat.pkl",), ("tstMat.pkl",)), strict=True)),
         _read_pickle),
        ("MMSSL / PromptMM", {s: (f"{s}_mat", f"{s}.json") for s in SPLITS}, _read_mmssl),
    )
    for name, names, reader in candidates:
        files = {s: next((folder / n for n in names[s] if (folder / n).is_file()), None) for s in SPLITS}
        if not any(files.values()):
            continue
        for split, file in files.items():
            if file is None:
                raise DataError(f"{folder}: {name} layout without its {split} split, expected "
                                + " or ".join(names[split]))
        return name, lambda split, files=files, reader=reader: (files[split], *reader(files[split]))
    if len(inter) == 1:
        return "MMRec", lambda split: (inter[0], *_read_inter(inter[0], SPLITS.index(split)))
    if inter:
        raise DataError(f"{folder}: expected one .inter file, found {len(inter)}")
    raise DataError(f"{folder}: no recognised layout, expected one of: {LAYOUTS}")


@contextlib.contextmanager
def _reading(file: Path):
    """Whatever goes wrong inside a stranger's file becomes one line that names the file."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # parsers raise a dozen types; all mean the same here
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{file}: cannot be read ({reason})") from error


def _features(folder: Path, modalities: str) -> dict[str, np.ndarray]:
    files = {f.name.removesuffix("_feat.npy"): f for f in sorted(folder.glob("*_feat.npy"))}
    if not files:
        raise DataError(f"{folder}: no feature file, expected <modality>_feat.npy, "
                        "such as image_feat.npy, text_feat.npy or audio_feat.npy")
    wanted = [m.strip() for m in modalities.split(",")] if modalities else list(files)
    if unknown := [m for m in wanted if m not in files]:
        raise DataError(f"{folder}: unknown modality {unknown[0]!r}, found {', '.join(files)}")
    return {m: read_features(files[m]) for m in wanted}


def read_features(file: Path) -> np.ndarray:
    """One modality's array [I, d_m] as float32."""
    with _reading(file):
        array = np.load(file, allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "fiu":
            found = f"{array.ndim}-d {array.dtype}" if isinstance(array, np.ndarray) else "an archive"
            raise DataError(f"{file}: expected a 2-d array of numbers [items, d_m], found {found}")
        if 0 in array.shape:
            raise DataError(f"{file}: expected at least one row and column, found {array.shape}")
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(array, dtype=np.float32)


def _read_npz(file: Path):
    with _reading(file):
        return _cells(sparse.load_npz(file))


class _MatrixUnpickler(pickle.Unpickler):
    """A pickle can run any code it names; this one can name only what a sparse matrix is made of."""

    ALLOWED = {
        **{(f"scipy.sparse.{module}", f"{kind}_matrix"): getattr(sparse, f"{kind}_matrix")
           for kind in ("coo", "csr", "csc") for module in (kind, f"_{kind}")},
        **{(f"numpy.{module}.multiarray", "_reconstruct"): np.empty(1).__reduce__()[0]
           for module in ("core", "_core")},
        **{(f"numpy.{module}.numeric", "_frombuffer"): np.empty(1).__reduce_ex__(5)[0]
           for module in ("core", "_core")},
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # bytes in old protocols
    }

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise DataError(f"the pickle asks for {module}.{name}, which is not part of a scipy sparse "
                            "matrix; refused")
        return self.ALLOWED[module, name]


def _read_pickle(file: Path):
    with _reading(file), open(file, "rb") as stream:
        try:
            matrix = _MatrixUnpickler(stream).load()
        except DataError as error:
            raise DataError(f"{file}: {error}") from None
        if not sparse.issparse(matrix):
            raise DataError(f"{file}: expected a pickled scipy sparse matrix, found {type(matrix).__name__}")
        return _cells(matrix)


def _read_mmssl(file: Path):
    if file.suffix != ".json":
        return _read_pickle(file)
    with _reading(file):
        lists = json.loads(file.read_text())
        if not isinstance(lists, dict):
            raise DataError(f"{file}: expected {{user: [items]}}, found a {type(lists).__name__}")
        rows = [int(user) for user, items in lists.items() for _ in items]
        cols = [item for items in lists.values() for item in items]
        if not all(type(item) is int for item in cols):
            raise DataError(f"{file}: expected integer item ids, found {cols[0]!r} or the like")
        return np.array(rows, np.int64), np.array(cols, np.int64), None


def _read_inter(file: Path, label: int):
    wanted = ("userID", "itemID", "x_label")
    with _reading(file):
        with open(file) as stream:
            header = stream.readline().rstrip("\r\n").split("\t")
            if missing := [column for column in wanted if column not in header]:
                raise DataError(f"{file}: header without {missing[0]}, expected tab-separated "
                                f"{', '.join(wanted)}, found {header}")
            columns = [header.index(column) for column in wanted]
            table = np.loadtxt(stream, np.int64, delimiter="\t", usecols=columns, ndmin=2)
        if not np.isin(table[:, 2], (0, 1, 2)).all():
            raise DataError(f"{file}: expected x_label 0, 1 or 2, found others")
        rows, cols, _ = table[table[:, 2] == label].T
        return rows, cols, None


def _cells(matrix) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Users, items and shape of the non-zero cells; refuses indices that the format does not allow."""
    if matrix.ndim != 2:
        raise ValueError(f"expected a matrix, found {matrix.ndim} dimensions")
    if matrix.format in ("csr", "csc"):
        matrix.check_format(full_check=True)  # a corrupt index pointer would crash the conversion
    coo = matrix.tocoo()
    kept = coo.data != 0
    return coo.row[kept].astype(np.int64), coo.col[kept].astype(np.int64), coo.shape


def _matrices(splits: dict, n_items: int) -> dict[str, sparse.csr_matrix]:
    """0/1 matrices of one shape; stored shapes must agree, else items = feature rows."""
    shapes = {shape for *_, shape in splits.values() if shape}
    if len(shapes) > 1:
        found = ", ".join(f"{file.name} {shape}" for file, *_, shape in splits.values())
        raise DataError(f"{splits['train'][0].parent}: splits of different shape: {found}")
    largest = max((rows.max() for _, rows, *_ in splits.values() if len(rows)), default=-1)
    shape = shapes.pop() if shapes else (int(largest) + 1, n_items)
    matrices = {}
    for split, (file, rows, cols, _) in splits.items():
        for kind, ids, limit in (("user", rows, shape[0]), ("item", cols, shape[1])):
            if len(ids) and not 0 <= ids.min() <= ids.max() < limit:
                raise DataError(f"{file}: {kind} ids {ids.min()} to {ids.max()} in {split}, "
                                f"expected 0 to {limit - 1}")
        ones = np.ones(len(rows), np.float32)
        matrix = sparse.csr_matrix((ones, (rows, cols)), shape)  # sums duplicates
        if merged := len(rows) - matrix.nnz:
            _warn(f"{file}: {merged} duplicate interactions in {split}, merged")
        matrix.data[:] = 1
        matrices[split] = matrix
    return matrices


# ---------------------------------------------------------------- checking and describing


def validate(dataset: Dataset, where: str = "") -> list[str]:
    """Raise DataError if the dataset cannot be trained or judged on; return warnings otherwise."""
    where = where or dataset.name
    train, shape = dataset.train, dataset.train.shape

    def refuse(message):
        raise DataError(f"{where}: {message}")

    for split in ("val", "test"):
        if getattr(dataset, split).shape != shape:
            refuse(f"splits of different shape: train {shape}, {split} {getattr(dataset, split).shape}")
    if not train.nnz:
        refuse("empty training split, expected at least one interaction")
    for split in ("val", "test"):
        if not getattr(dataset, split).nnz:
            refuse(f"empty {split} split, expected at least one interaction")
    for one, two, both in _overlaps(dataset):
        if both:
            refuse(f"{both} interactions are in both {one} and {two}, expected disjoint splits")
    if full := int((np.diff(train.indptr) == shape[1]).sum()):
        refuse(f"{full} users have every item in train, so no negative item exists for them")
    if not dataset.features:
        refuse("no features, expected at least one modality")
    warnings = []
    for m, x in dataset.features.items():
        if x.ndim != 2 or len(x) != shape[1]:
            refuse(f"{m}_feat.npy: expected {shape[1]} rows, one for each item, found shape {x.shape}")
        if broken := int((~np.isfinite(x).all(1)).sum()):
            refuse(f"{m}_feat.npy: {broken} of {len(x)} rows hold NaN or infinity (as float32)")
        if not x.any():
            warnings.append(f"{where}: {m}_feat.npy is zero throughout: this modality says nothing")
    names = list(dataset.features)
    for i, one in enumerate(names):
        for two in names[i + 1 :]:
            if np.array_equal(dataset.features[one], dataset.features[two]):
                warnings.append(f"{where}: {one}_feat.npy and {two}_feat.npy hold the same array")
    idle = np.diff(train.indptr) == 0
    for split in ("val", "test"):
        if cold := int((idle & (np.diff(getattr(dataset, split).indptr) > 0)).sum()):
            warnings.append(f"{where}: {cold} {split} users have no training item")
    return warnings


def _overlaps(dataset: Dataset):
    for one, two in (("train", "val"), ("train", "test"), ("val", "test")):
        a, b = getattr(dataset, one), getattr(dataset, two)
        yield one, two, int(a.multiply(b).nnz) if a.shape == b.shape else 0


def describe(dataset: Dataset) -> dict[str, str | int]:
    """The figures of Table 3 and more, by name, in reading order. Needs no valid dataset.

    >>> figures = describe(synthetic(users=60, items=40, interactions=600))
    >>> figures["users"], figures["items"], figures["density"]
    (60, 40, '24.5 %')
    """
    train, figures = dataset.train, {"dataset": dataset.name}
    figures["users"], figures["items"] = train.shape
    sizes = {split: getattr(dataset, split).nnz for split in SPLITS}
    total, cells = sum(sizes.values()), max(1, train.shape[0] * train.shape[1])
    figures |= {"interactions": total, **sizes, "density": f"{100 * total / cells:.3g} %"}
    for m, x in dataset.features.items():
        unique = len({row.tobytes() for row in x})
        zero = int((~x.any(1)).sum()) if x.ndim == 2 else 0
        figures[f"features {m}"] = f"{' x '.join(map(str, x.shape))}, {zero} zero rows, " \
                                   f"{len(x) - unique} repeated rows"
    figures["users without training items"] = int((np.diff(train.indptr) == 0).sum())
    figures["items never trained"] = int((np.diff(train.tocsc().indptr) == 0).sum())
    for one, two, both in _overlaps(dataset):
        figures[f"in both {one} and {two}"] = both
    return figures


# ---------------------------------------------------------------- writing and converting


@contextlib.contextmanager
def whole(path: Path) -> Iterator:
    """Open a file for writing bytes that appears complete or not at all."""
    draft = path.with_name(path.name + ".tmp")
    try:
        with open(draft, "wb") as stream:
            yield stream
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def save(dataset: Dataset, path: str | Path, ids: dict | None = None) -> None:
    """Write the native layout to a new folder, whole or not at all; `ids` becomes ids.json."""
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: exists, expected a new or empty folder to write to")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        draft.chmod(0o755)  # mkdtemp makes it private
        for split in SPLITS:
            sparse.save_npz(draft / f"{split}.npz", getattr(dataset, split))
        for m, x in dataset.features.items():
            np.save(draft / f"{m}_feat.npy", x)
        if ids:
            (draft / "ids.json").write_text(json.dumps(ids))
        draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def split_interactions(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """8:1:1 per user: 0 train, 1 validation, 2 test for each interaction.

    A user with three or more has at least one in each split; with fewer, all are for training.

    >>> np.bincount(split_interactions(np.repeat([0, 1], [10, 2]), np.random.default_rng(0))).tolist()
    [10, 1, 1]
    """
    order = np.lexsort((rng.random(len(rows)), rows))  # users together, shuffled within
    count = np.bincount(rows, minlength=1)
    rank = np.empty(len(rows), np.int64)
    rank[order] = np.arange(len(rows)) - np.repeat(count.cumsum() - count, count)
    held = np.where(count >= 3, np.maximum(1, np.rint(count / 10)), 0).astype(np.int64)[rows]
    return np.where(rank < held, 2, np.where(rank < 2 * held, 1, 0))


def from_log(log: Path, features: dict[str, Path], items: Path | None, seed: int) -> tuple[Dataset, dict]:
    """One's own data: a CSV of interactions with any ids, and feature arrays.

    `items` names the item of each feature row, one id a line; without it the CSV's item ids are the
    row numbers. Returns the dataset and {"users": [...], "items": [...]}, ids by index.
    """
    with _reading(log), open(log, newline="") as stream:
        rows = csv.reader(stream, delimiter="\t" if log.suffix in (".tsv", ".inter") else ",")
        header = [name.strip().lower().replace("_", "") for name in next(rows, [])]
        columns = [next((header.index(n) for n in (kind, f"{kind}id") if n in header), None)
                   for kind in ("user", "item")]
        if None in columns:
            raise DataError(f"{log}: expected a header with user and item (or user_id, item_id), "
                            f"found {header}")
        pairs = [(row[columns[0]].strip(), row[columns[1]].strip()) for row in rows if row]
    arrays = {m: read_features(file) for m, file in features.items()}
    if not arrays or not pairs:
        raise DataError(f"{log}: expected interactions and at least one --features MODALITY=FILE.npy, "
                        f"found {len(pairs)} and {len(arrays)}")
    n_items = len(next(iter(arrays.values())))
    with _reading(items or log):
        names = [line.strip() for line in items.read_text().splitlines() if line.strip()] if items \
            else [str(i) for i in range(n_items)]
    if len(names) != n_items or len(set(names)) != n_items:
        raise DataError(f"{items}: expected {n_items} different ids, one for each feature row, found "
                        f"{len(names)} ({len(set(names))} different)")
    column = {name: i for i, name in enumerate(names)}
    if strange := {item for _, item in pairs if item not in column}:
        raise DataError(f"{log}: {len(strange)} items have no feature row, such as {min(strange)!r}; "
                        f"expected ids listed in {items or 'the range of the feature rows'}")
    users = list(dict.fromkeys(user for user, _ in pairs))
    row = {name: i for i, name in enumerate(users)}
    cells = np.array([(row[user], column[item]) for user, item in pairs], np.int64)
    unique = np.unique(cells, axis=0)
    if len(unique) < len(cells):
        _warn(f"{log}: {len(cells) - len(unique)} duplicate interactions, merged")
    label = split_interactions(unique[:, 0], np.random.default_rng(seed))
    matrices = _labelled(unique, label, (len(users), n_items))
    return Dataset(log.stem, **matrices, features=arrays), {"users": users, "items": names}


def _labelled(cells: np.ndarray, label: np.ndarray, shape) -> dict[str, sparse.csr_matrix]:
    """Cells [n, 2] and their split 0/1/2 -> one matrix a split."""
    return {split: sparse.csr_matrix((np.ones((label == i).sum(), np.float32), cells[label == i].T), shape)
            for i, split in enumerate(SPLITS)}


# ---------------------------------------------------------------- the embedded dataset


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

    It is for watching the method work in a minute, and is no evidence about the real world. Planted:
    - a user's taste is a weight on 6 hidden factors per modality; visual and text drive it equally,
      acoustic half as much; popularity is skewed; each user has at least five interactions;
    - a share `unexplained` of the interactions follows popularity alone, whatever the content;
    - features have d_m dimensions but rank 6 + 24: the factors that matter, mixed at random with 24
      louder ones that have nothing to do with taste, plus noise; the acoustic noise drowns the rest;
    - raw scales differ by two orders of magnitude between modalities;
    - a share `unseen` of the items is never in the training split.
    The same seed and sizes give the same dataset.
    """
    rng = np.random.default_rng(seed)
    dims = {"visual": 512, "text": 384, "acoustic": 128} if dims is None else dims
    planted = {"visual": (1.0, 0.5, 30.0), "text": (1.0, 0.5, 0.3), "acoustic": (0.5, 8.0, 3.0)}
    factors, taste, features = [], [], {}
    for m, d_m in dims.items():
        weight, noise, scale = planted.get(m, (1.0, 0.5, 1.0))
        z = rng.standard_normal((items, 6), np.float32)
        distractors = 1.5 * rng.standard_normal((items, 24), np.float32)
        mixing = rng.standard_normal((30, d_m), np.float32) / np.sqrt(d_m)
        x = np.hstack([z, distractors]) @ mixing
        x += noise / np.sqrt(d_m) * rng.standard_normal((items, d_m), np.float32)
        x += rng.standard_normal(d_m, np.float32) / np.sqrt(d_m)  # not centred
        features[m] = (scale * x).astype(np.float32)
        factors.append(z)
        taste.append(weight * rng.standard_normal((users, 6), np.float32))
    popularity = -0.6 * np.log(1 + rng.permutation(items)).astype(np.float32)
    activity = 5 + rng.multinomial(interactions - 5 * users, rng.dirichlet(np.full(users, 1.5)))
    activity = np.minimum(activity, items // 2)
    cells = _choose(np.hstack(taste), np.hstack(factors), popularity, activity, unexplained, rng)
    label = split_interactions(cells[:, 0], rng)
    never = rng.random(items) < unseen
    moved = never[cells[:, 1]] & (label == 0)
    label[moved] = rng.integers(1, 3, moved.sum())
    return Dataset("synthetic", **_labelled(cells, label, (users, items)), features=features)


def _choose(taste, factors, popularity, activity, unexplained, rng, chunk=1024) -> np.ndarray:
    """Draw each user's items without replacement, likelier the higher taste·factors + popularity.

    Adding Gumbel noise to log-weights and keeping the largest is such a draw (Gumbel top-k); users
    in chunks, so that memory stays O(chunk x I). Returns cells [n, 2].
    """
    cells = []
    for start in range(0, len(taste), chunk):
        rows = slice(start, start + chunk)
        by_taste = taste[rows] @ factors.T * 0.8 + popularity  # [chunk, I]
        by_taste -= np.log(rng.standard_exponential(by_taste.shape, np.float32))
        by_popularity = popularity - np.log(rng.standard_exponential(by_taste.shape, np.float32))
        count = activity[rows]
        explained = count - rng.binomial(count, unexplained)
        first = _largest(by_taste, explained)
        by_popularity[first] = -np.inf
        for user, item in (first, _largest(by_popularity, count - explained)):
            cells.append(np.column_stack([user + start, item]))
    return np.concatenate(cells)


def _largest(keys: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the count[r] largest keys of each row r."""
    most = min(max(1, count.max()), keys.shape[1] - 1)
    best = np.argpartition(-keys, most, axis=1)[:, :most]
    best = np.take_along_axis(best, np.argsort(-np.take_along_axis(keys, best, 1), axis=1), 1)
    row, rank = np.nonzero(np.arange(most) < count[:, None])
    return row, best[row, rank]


# ---------------------------------------------------------------- sampling


class Sampler:
    """Triplets and lists of Section 3.2.1-3.2.2: every training edge once an epoch, with negatives.

    A negative is uniform over the items the user has not interacted with in training. It is found
    directly: the r-th such item of a user lies past as many of the user's items a_0 < a_1 < … as
    satisfy a_j - j ≤ r, one binary search. Nothing is rejected and drawn again, so the work is the
    same for a user with three items and for one who lacks three, and nothing waits for the device.
    """

    def __init__(self, train: sparse.csr_matrix, device: torch.device | str = "cpu"):
        train = train.sorted_indices()
        user, item = (torch.from_numpy(ids).long() for ids in train.nonzero())
        start = torch.from_numpy(train.indptr).long()
        rank = torch.arange(len(user)) - start[user]  # j, of each edge among its user's
        self.items = train.shape[1]
        self.user, self.item = user.to(device), item.to(device)  # [E], [E]
        self.start, self.free = start.to(device), (self.items - start.diff()).to(device)
        self.gaps = (user * self.items + item - rank).to(device)  # ascending within and across users

    def negatives(self, user: Tensor, generator: torch.Generator) -> Tensor:
        """One negative item for each entry of `user` (any shape)."""
        draw = torch.rand(user.shape, generator=generator, device=user.device, dtype=torch.float64)
        r = (draw * self.free[user]).long()  # the r-th item that is free
        return r + torch.searchsorted(self.gaps, user * self.items + r, right=True) - self.start[user]

    def epoch(self, generator: torch.Generator, negatives: int = 1) -> tuple[Tensor, Tensor]:
        """All edges in random order: users [E], and lists [E, 1 + negatives], column 0 positive."""
        lists = self.item.new_empty(len(self.item), 1 + negatives)
        lists[:, 0] = self.item
        for k in range(negatives):  # columns in turn: users ascend, so the searches stay in cache
            lists[:, 1 + k] = self.negatives(self.user, generator)
        order = torch.randperm(len(self.user), generator=generator, device=self.user.device)
        return self.user[order], lists[order]


# ---------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, raised rather than printed."""

    def error(self, message):
        raise DataError(f"{self.prog}: {message}; see --help")


def main(argv: list[str] | None = None) -> int:
    """`describe` and `convert`; returns the exit status, 2 for what cannot be used."""
    parser = Parser(prog="data.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("describe", help="print the statistics of a dataset folder")
    command.add_argument("folder", type=Path)
    command = commands.add_parser("convert", help="write the native layout")
    command.add_argument("paths", type=Path, nargs="+", metavar="[SRC] OUT")
    command.add_argument("--interactions", type=Path, help="CSV with user and item columns, any ids")
    command.add_argument("--features", nargs="+", default=[], metavar="MODALITY=FILE.npy")
    command.add_argument("--items", type=Path, help="item ids in the features' row order, one a line")
    command.add_argument("--seed", type=int, default=0, help="of the 8:1:1 split (default 0)")
    try:
        args = parser.parse_args(argv)
        if args.command == "describe":
            for name, value in describe(load(args.folder, check=False)).items():
                print(f"{name:30} {value}")
            return 0
        *source, out = args.paths
        if len(source) != (0 if args.interactions else 1):
            raise DataError("data.py convert: expected SRC OUT, or OUT with --interactions, found "
                            f"{len(args.paths)} paths")
        if args.interactions:
            pairs = [pair.partition("=") for pair in args.features]
            features = {m: Path(file) for m, _, file in pairs}
            dataset, ids = from_log(args.interactions, features, args.items, args.seed)
            for warning in validate(dataset, str(args.interactions)):
                _warn(warning)
        else:
            dataset, ids = load(source[0]), None
        save(dataset, out, ids)
        print(f"{out}: {dataset.train.shape[0]} users, {dataset.train.shape[1]} items, "
              f"{', '.join(dataset.features)}")
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

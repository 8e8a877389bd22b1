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
import hashlib
import json
import pickle
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

SPLITS = ("train", "val", "test")
LAYOUTS = {  # by the files of each split; MMRec's single <name>.inter comes after these
    "native": [("train.npz",), ("val.npz",), ("test.npz",)],
    "DiffMM": [("trnMat.pkl",), ("valMat.pkl",), ("tstMat.pkl",)],
    "MMSSL / PromptMM": [(f"{split}_mat", f"{split}.json") for split in SPLITS],
}
LAYOUT_HELP = (
    "native (train.npz val.npz test.npz), DiffMM (trnMat.pkl valMat.pkl tstMat.pkl), "
    "MMSSL / PromptMM ({train,val,test}.json or train_mat val_mat test_mat), MMRec (<name>.inter)"
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
    """Read a dataset folder in whichever layout its files show (LAYOUTS), and say which.

    modalities: comma-separated names to keep, "" for all. With `check`, `validate` it and print its
    warnings. Raises DataError on anything that cannot be used.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a dataset folder, found none")
    layout, files = _layout(folder)
    print(f"{folder}: {layout} layout", file=sys.stderr)
    features = _features(folder, modalities)
    cells = {split: _read(file, SPLITS.index(split)) for split, file in files.items()}
    matrices = _matrices(files, cells, n_items=len(next(iter(features.values()))))
    dataset = Dataset(folder.resolve().name, **matrices, features=features)
    for warning in validate(dataset, str(folder)) if check else ():
        _warn(warning)
    return dataset


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _layout(folder: Path) -> tuple[str, dict[str, Path]]:
    """The first layout of which a file is there, and the file of each split."""
    for layout, splits in LAYOUTS.items():
        found = [[folder / n for n in names if (folder / n).is_file()] for names in splits]
        for split, names, files in zip(SPLITS, splits, found, strict=True):
            if any(found) and not files:
                raise DataError(f"{folder}: {layout} layout without its {split} split, expected "
                                + " or ".join(names))
        if any(found):
            return layout, dict(zip(SPLITS, (files[0] for files in found), strict=True))
    inter = sorted(folder.glob("*.inter"))
    if len(inter) != 1:
        raise DataError(f"{folder}: no recognised layout, found {len(inter)} .inter files and no "
                        f"other; expected one of {LAYOUT_HELP}")
    return "MMRec", dict.fromkeys(SPLITS, inter[0])


@contextlib.contextmanager
def _reading(file: Path):
    """Whatever goes wrong inside a stranger's file becomes one line that names the file."""
    try:
        yield
    except Exception as error:  # parsers raise a dozen types; all mean the same here
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason if type(error) is DataError else f"cannot be read: {reason}"
        raise DataError(f"{file}: {reason}") from error


def _features(folder: Path, modalities: str) -> dict[str, np.ndarray]:
    files = {f.name.removesuffix("_feat.npy"): f for f in sorted(folder.glob("*_feat.npy"))}
    if not files:
        raise DataError(f"{folder}: no feature file, expected <modality>_feat.npy, such as "
                        "image_feat.npy, text_feat.npy or audio_feat.npy")
    wanted = [m.strip() for m in modalities.split(",")] if modalities else list(files)
    if unknown := [m for m in wanted if m not in files]:
        raise DataError(f"{folder}: unknown modality {unknown[0]!r}, expected {', '.join(files)}")
    return {m: read_features(files[m]) for m in wanted}


def read_features(file: Path) -> np.ndarray:
    """One modality's array [I, d_m] as float32; DataError if it is no such array."""
    with _reading(file):
        array = np.load(file, allow_pickle=False)
        if getattr(array, "ndim", 0) != 2 or array.dtype.kind not in "fiu" or 0 in array.shape:
            found = f"{getattr(array, 'shape', 'an archive')} {getattr(array, 'dtype', '')}"
            raise DataError(f"expected a 2-d array of numbers [items, d_m], found {found}")
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(array, dtype=np.float32)


class _MatrixUnpickler(pickle.Unpickler):
    """A pickle may run any code it names; here it can name only what a sparse matrix is made of."""

    ALLOWED = {
        **{(f"scipy.sparse.{module}", f"{kind}_matrix"): getattr(sparse, f"{kind}_matrix")
           for kind in ("coo", "csr", "csc") for module in (kind, f"_{kind}")},
        **{(f"numpy.{core}.{module}", name): np.empty(1).__reduce_ex__(protocol)[0]
           for core in ("core", "_core") for module, name, protocol in
           (("multiarray", "_reconstruct", 2), ("numeric", "_frombuffer", 5))},
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): lambda text, _: text.encode("latin1"),  # how protocol 2 writes bytes
    }

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise DataError(f"refused: it asks for {module}.{name}, expected a scipy sparse matrix")
        return self.ALLOWED[module, name]


def _read(file: Path, label: int) -> tuple[np.ndarray, np.ndarray, tuple[int, int] | None]:
    """Users and items of one split's interactions, and the matrix shape if the file stores one."""
    with _reading(file):
        if file.suffix == ".json":
            return *_read_json(file), None
        if file.suffix == ".inter":
            return *_read_inter(file, label), None
        with open(file, "rb") as stream:
            npz = file.suffix == ".npz"
            matrix = sparse.load_npz(stream) if npz else _MatrixUnpickler(stream).load()
        if not sparse.issparse(matrix) or matrix.ndim != 2:
            raise DataError(f"expected a scipy sparse matrix [U, I], found {type(matrix).__name__}")
        if matrix.format in ("csr", "csc"):
            matrix.check_format(full_check=True)  # a corrupt index pointer would crash tocoo
        coo = matrix.tocoo()
        kept = coo.data != 0
        return coo.row[kept].astype(np.int64), coo.col[kept].astype(np.int64), coo.shape


def _read_json(file: Path) -> tuple[np.ndarray, np.ndarray]:
    lists = json.loads(file.read_text())
    if not isinstance(lists, dict) or not all(isinstance(items, list) for items in lists.values()):
        raise DataError(f"expected {{user: [items]}}, found another {type(lists).__name__}")
    users = [int(user) for user, items in lists.items() for _ in items]
    items = [item for items in lists.values() for item in items]
    if strange := [item for item in items if type(item) is not int]:
        raise DataError(f"expected integer item ids, found {strange[0]!r}")
    return np.array(users, np.int64), np.array(items, np.int64)


def _read_inter(file: Path, label: int) -> tuple[np.ndarray, np.ndarray]:
    wanted = ("userID", "itemID", "x_label")
    with open(file) as stream:
        header = stream.readline().rstrip("\r\n").split("\t")
        if missing := [column for column in wanted if column not in header]:
            raise DataError(f"header without {missing[0]}, expected tab-separated "
                            f"{', '.join(wanted)}, found {header}")
        table = np.loadtxt(stream, np.int64, delimiter="\t", ndmin=2,
                           usecols=[header.index(column) for column in wanted])
    if not np.isin(table[:, 2], (0, 1, 2)).all():
        raise DataError("expected x_label 0, 1 or 2, found others")
    return tuple(table[table[:, 2] == label, :2].T)


def _matrices(files: dict, cells: dict, n_items: int) -> dict[str, sparse.csr_matrix]:
    """0/1 matrices of one shape: the stored one, else the largest user id + 1 by feature rows."""
    shapes = {split: shape for split, (_, _, shape) in cells.items() if shape}
    if len(set(shapes.values())) > 1:
        raise DataError(f"{files['train'].parent}: expected splits of one shape, found {shapes}")
    n_users = 1 + max((users.max() for users, *_ in cells.values() if len(users)), default=-1)
    shape = next(iter(shapes.values()), (int(n_users), n_items))
    matrices = {}
    for split, (users, items, _) in cells.items():
        for kind, ids, limit in (("user", users, shape[0]), ("item", items, shape[1])):
            if len(ids) and not 0 <= ids.min() <= ids.max() < limit:
                raise DataError(f"{files[split]}: expected {kind} ids 0 to {limit - 1} in {split}, "
                                f"found {ids.min()} to {ids.max()}")
        matrix = sparse.csr_matrix((np.ones(len(users), np.float32), (users, items)), shape)
        if merged := len(users) - matrix.nnz:
            _warn(f"{files[split]}: {merged} duplicate interactions in {split}, merged")
        matrix.data[:] = 1
        matrices[split] = matrix
    return matrices


# ---------------------------------------------------------------- checking and describing


def validate(dataset: Dataset, where: str = "") -> list[str]:
    """Raise DataError if the dataset cannot be trained or judged on; return warnings otherwise."""
    where, train, shape = where or dataset.name, dataset.train, dataset.train.shape
    interacted = np.diff(train.indptr)
    held_out = {split: getattr(dataset, split) for split in ("val", "test")}
    refusals = [(f"expected splits of one shape, found train {shape} and {split} {matrix.shape}",
                 matrix.shape != shape) for split, matrix in held_out.items()]
    refusals += [(f"empty {split} split, expected at least one interaction", not matrix.nnz)
                 for split, matrix in {"train": train, **held_out}.items()]
    refusals += [(f"expected disjoint splits, found {n} interactions in both {one} and {two}", n)
                 for one, two, n in _overlaps(dataset)]
    full = (interacted == shape[1]).sum()
    refusals += [(f"expected negatives for every user, found {full} users with every item", full),
                 ("no features, expected at least one modality", not dataset.features)]
    warnings = []
    for m, x in dataset.features.items():
        if x.ndim != 2 or len(x) != shape[1]:
            raise DataError(f"{where}: {m}_feat.npy: expected {shape[1]} rows, one an item, "
                            f"found shape {x.shape}")
        broken = len(x) - np.isfinite(x).all(1).sum()
        refusals.append((f"{m}_feat.npy: expected finite float32 numbers, found NaN or infinity in "
                         f"{broken} of {len(x)} rows", broken))
        twins = [two for two, y in dataset.features.items() if two < m and np.array_equal(x, y)]
        warnings += [f"{m}_feat.npy and {two}_feat.npy hold the same array" for two in twins]
        warnings += [] if x.any() else [f"{m}_feat.npy is zero throughout"]
    for message, wrong in refusals:
        if wrong:
            raise DataError(f"{where}: {message}")
    for split, matrix in held_out.items():
        if cold := ((interacted == 0) & (np.diff(matrix.indptr) > 0)).sum():
            warnings.append(f"{cold} {split} users have no training item")
    return [f"{where}: {warning}" for warning in warnings]


def _overlaps(dataset: Dataset) -> list[tuple[str, str, int]]:
    pairs = [(one, two, getattr(dataset, one), getattr(dataset, two))
             for one, two in (("train", "val"), ("train", "test"), ("val", "test"))]
    return [(one, two, int(a.multiply(b).nnz)) for one, two, a, b in pairs if a.shape == b.shape]


def describe(dataset: Dataset) -> dict[str, str | int]:
    """The figures of Table 3 and more, by name, in reading order. Needs no valid dataset.

    >>> figures = describe(synthetic(users=60, items=40, interactions=600))
    >>> figures["users"], figures["items"], figures["density"]
    (60, 40, '24.5 %')
    """
    (users, items), train = dataset.train.shape, dataset.train
    sizes = {split: getattr(dataset, split).nnz for split in SPLITS}
    total = sum(sizes.values())
    figures = {"dataset": dataset.name, "users": users, "items": items, "interactions": total,
               **sizes, "density": f"{100 * total / max(1, users * items):.3g} %"}
    for m, x in dataset.features.items():
        repeated = len(x) - len({row.tobytes() for row in x})
        figures[f"features {m}"] = (f"{' x '.join(map(str, x.shape))}, {(~x.any(1)).sum()} zero "
                                    f"rows, {repeated} repeated rows")
    figures["users without training items"] = int((np.diff(train.indptr) == 0).sum())
    figures["items never trained"] = items - len(np.unique(train.indices))
    return figures | {f"in both {one} and {two}": both for one, two, both in _overlaps(dataset)}


def fingerprint(dataset: Dataset) -> str:
    """Equal for equal data, whatever the folder."""
    matrices = [np.array(getattr(dataset, split).nonzero()).tolist() for split in SPLITS]
    content = pickle.dumps((dataset.train.shape, matrices, dataset.features))
    return hashlib.blake2b(content, digest_size=16).hexdigest()


# ---------------------------------------------------------------- writing and converting


def write(path: Path, content) -> None:
    """Write a file that appears complete or not at all; content: text, or a function of the stream."""
    draft = path.with_name(path.name + ".tmp")
    try:
        with open(draft, "wb") as stream:
            stream.write(content.encode()) if isinstance(content, str) else content(stream)
        draft.replace(path)
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

    >>> label = split_interactions(np.repeat([0, 1], [10, 2]), np.random.default_rng(0))
    >>> np.bincount(label).tolist()
    [10, 1, 1]
    """
    order = np.lexsort((rng.random(len(rows)), rows))  # users together, shuffled within
    count = np.bincount(rows, minlength=1)
    rank = np.empty(len(rows), np.int64)
    rank[order] = np.arange(len(rows)) - np.repeat(count.cumsum() - count, count)
    held = np.where(count >= 3, np.maximum(1, np.rint(count / 10)), 0).astype(np.int64)[rows]
    return np.where(rank < held, 2, np.where(rank < 2 * held, 1, 0))


def from_log(log: Path, features: dict[str, Path], items: Path | None = None,
             seed: int = 0) -> tuple[Dataset, dict]:
    """One's own data: a CSV of interactions with any ids, and feature arrays.

    `items` names the item of each feature row, one id a line; without it the CSV's item ids are the
    row numbers. Returns the dataset and {"users": [...], "items": [...]}, ids by index.
    """
    with _reading(log), open(log, newline="") as stream:
        rows = csv.reader(stream, delimiter="\t" if log.suffix == ".tsv" else ",")
        header = [name.strip().lower().replace("_", "") for name in next(rows, [])]
        columns = [i for kind in ("user", "item") for i, name in enumerate(header)
                   if name in (kind, kind + "id")]
        if len(columns) != 2:
            raise DataError(f"expected a header with user (or user_id) and item, found {header}")
        pairs = [tuple(row[i].strip() for i in columns) for row in rows if row]
    arrays = {m: read_features(file) for m, file in features.items()}
    if not arrays or not pairs:
        raise DataError(f"{log}: expected interactions and --features MODALITY=FILE.npy, found "
                        f"{len(pairs)} and {len(arrays)}")
    n_items = len(next(iter(arrays.values())))
    with _reading(items or log):
        names = items.read_text().split("\n") if items else map(str, range(n_items))
    names = [name.strip() for name in names if name.strip()]
    if len(names) != n_items or len(set(names)) != n_items:
        raise DataError(f"{items}: expected {n_items} different ids, one a feature row, found "
                        f"{len(names)}, {len(set(names))} of them different")
    column = {name: i for i, name in enumerate(names)}
    if strange := {item for _, item in pairs if item not in column}:
        raise DataError(f"{log}: expected items from {items or 'the range of the feature rows'}, "
                        f"found {len(strange)} others, such as {min(strange)!r}")
    row = {name: i for i, name in enumerate(dict.fromkeys(user for user, _ in pairs))}
    cells = np.unique([(row[user], column[item]) for user, item in pairs], axis=0)
    if len(cells) < len(pairs):
        _warn(f"{log}: {len(pairs) - len(cells)} duplicate interactions, merged")
    label = split_interactions(cells[:, 0], np.random.default_rng(seed))
    dataset = Dataset(log.stem, **_labelled(cells, label, (len(row), n_items)), features=arrays)
    return dataset, {"users": list(row), "items": names}


def _labelled(cells: np.ndarray, label: np.ndarray, shape) -> dict[str, sparse.csr_matrix]:
    """Cells [n, 2] and their split 0/1/2 -> one matrix a split."""
    parts = [cells[label == i].T for i in range(3)]
    return {split: sparse.csr_matrix((np.ones(part.shape[1], np.float32), tuple(part)), shape)
            for split, part in zip(SPLITS, parts, strict=True)}


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

    It is for watching the method work in a minute, no evidence about the real world. Planted:
    - a user's taste is a weight on 6 hidden factors per modality; visual and text drive it equally,
      acoustic half as much; popularity is skewed; each user has at least five interactions;
    - a share `unexplained` of the interactions follows popularity alone, whatever the content;
    - features have d_m dimensions but rank 6 + 24: the factors that matter, mixed at random with 24
      louder ones that have nothing to do with taste, plus noise, which drowns the acoustic;
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
        self.gaps = (user * self.items + item - rank).to(device)  # ascending, users in turn

    def negatives(self, user: Tensor, generator: torch.Generator) -> Tensor:
        """One negative item for each entry of `user` (any shape)."""
        draw = torch.rand(user.shape, generator=generator, device=user.device, dtype=torch.float64)
        r = (draw * self.free[user]).long()  # the r-th item that is free
        position = torch.searchsorted(self.gaps, user * self.items + r, right=True)
        return r + position - self.start[user]

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
    command.add_argument("folder")
    command = commands.add_parser("convert", help="write the native layout")
    command.add_argument("paths", nargs="+", metavar="[SRC] OUT")
    command.add_argument("--interactions", type=Path, help="CSV of users and items, any ids")
    command.add_argument("--features", nargs="+", default=[], metavar="MODALITY=FILE.npy")
    command.add_argument("--items", type=Path, help="item ids in the order of the feature rows")
    command.add_argument("--seed", type=int, default=0, help="of the 8:1:1 split (default 0)")
    try:
        args = parser.parse_args(argv)
        if args.command == "describe":
            for name, value in describe(load(args.folder, check=False)).items():
                print(f"{name:30} {value}")
        else:
            _convert(args)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _convert(args: argparse.Namespace) -> None:
    if len(args.paths) != (1 if args.interactions else 2):
        raise DataError(f"expected SRC OUT, or OUT with --interactions, found {args.paths}")
    if args.interactions:
        files = {m: Path(file) for m, _, file in (pair.partition("=") for pair in args.features)}
        dataset, ids = from_log(args.interactions, files, args.items, args.seed)
        for warning in validate(dataset, str(args.interactions)):
            _warn(warning)
    else:
        dataset, ids = load(args.paths[0]), None
    save(dataset, args.paths[-1], ids)
    print(f"{args.paths[-1]}: {dataset.train.shape[0]} users, {dataset.train.shape[1]} items, "
          f"{', '.join(dataset.features)}")


if __name__ == "__main__":
    sys.exit(main())

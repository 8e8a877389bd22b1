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
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import linalg, sparse
from torch import Tensor

SPLITS = ("train", "val", "test")
LAYOUTS = {  # the files of each split, the first that is there
    "native": [["train.npz"], ["val.npz"], ["test.npz"]],
    "DiffMM": [["trnMat.pkl"], ["valMat.pkl"], ["tstMat.pkl"]],
    "MMSSL / PromptMM": [[f"{split}_mat", f"{split}.json"] for split in SPLITS],
    "MMRec": [["*.inter"]] * 3,  # one file, <name>.inter, for all
}


class DataError(ValueError):
    """What a dataset has and what was expected, in one line."""


def need(holds, message: str) -> None:
    """Refuse, in that one line, what does not hold."""
    if not holds:
        raise DataError(message)


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
    need(folder.is_dir(), f"{folder}: expected a dataset folder, found none")
    layout, files = _layout(folder)
    print(f"{folder}: {layout} layout", file=sys.stderr)
    features = _features(folder, modalities)
    cells = {split: _read(file, SPLITS.index(split)) for split, file in files.items()}
    splits = _matrices(files, cells, n_items=len(next(iter(features.values()))))
    dataset = Dataset(folder.resolve().name, **splits, features=features)
    for warning in validate(dataset, str(folder)) if check else ():
        _warn(warning)
    return dataset


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _layout(folder: Path) -> tuple[str, dict[str, Path]]:
    """The first layout of which a file is there, and the file of each split."""
    for layout, splits in LAYOUTS.items():
        found = [[f for name in names for f in folder.glob(name)] for names in splits]
        if any(found):
            for names, files in zip(splits, found, strict=True):
                need(files, f"{folder}: {layout} layout, expected also {' or '.join(names)}")
            need(len(found[0]) == 1 or layout != "MMRec", f"{folder}: expected one .inter file")
            return layout, {split: files[0] for split, files in zip(SPLITS, found, strict=True)}
    known = ", ".join(f"{layout} ({splits[0][0]} …)" for layout, splits in LAYOUTS.items())
    raise DataError(f"{folder}: no recognised layout, expected one of {known}")


@contextlib.contextmanager
def reading(file: Path):
    """Whatever goes wrong inside a stranger's file becomes one line that names the file."""
    try:
        yield
    except Exception as error:  # parsers raise a dozen types; all mean the same here
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason if type(error) is DataError else f"cannot be read: {reason}"
        raise DataError(f"{file}: {reason}") from error


def _features(folder: Path, modalities: str) -> dict[str, np.ndarray]:
    files = {f.name.removesuffix("_feat.npy"): f for f in sorted(folder.glob("*_feat.npy"))}
    need(files, f"{folder}: no feature file, expected <modality>_feat.npy, such as image_feat.npy")
    wanted = [m.strip() for m in modalities.split(",")] if modalities else list(files)
    for m in wanted:
        need(m in files, f"{folder}: unknown modality {m!r}, expected among {', '.join(files)}")
    return {m: read_features(files[m]) for m in wanted}


def read_features(file: Path) -> np.ndarray:
    """One modality's array [I, d_m] as float32; DataError if it is no such array."""
    with reading(file):
        array = np.load(file, allow_pickle=False)
        need(isinstance(array, np.ndarray), "expected an array, found an archive")
        need(array.ndim == 2 and array.dtype.kind in "fiu" and array.size,
             f"expected numbers [items, d_m], found {array.dtype} {list(array.shape)}")
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(array, dtype=np.float32)


class _Unpickler(pickle.Unpickler):
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
        need((module, name) in self.ALLOWED,
             f"refused: it asks for {module}.{name}, expected a scipy sparse matrix")
        return self.ALLOWED[module, name]


def _read(file: Path, label: int) -> tuple[np.ndarray, np.ndarray, tuple[int, int] | None]:
    """Users and items of a split's interactions, and the matrix shape if the file stores one."""
    with reading(file):
        if file.suffix == ".json":
            return *_read_json(file), None
        if file.suffix == ".inter":
            return *_read_inter(file, label), None
        with open(file, "rb") as stream:
            matrix = sparse.load_npz(stream) if file.suffix == ".npz" else _Unpickler(stream).load()
        need(sparse.issparse(matrix) and matrix.ndim == 2,
             f"expected a scipy sparse matrix [U, I], found {type(matrix).__name__}")
        if matrix.format in ("csr", "csc"):
            matrix.check_format(full_check=True)  # a corrupt index pointer would crash tocoo
        coo = matrix.tocoo()
        kept = coo.data != 0
        return coo.row[kept].astype(np.int64), coo.col[kept].astype(np.int64), coo.shape


def _read_json(file: Path) -> tuple[np.ndarray, np.ndarray]:
    lists = read_json(file)
    need({type(items) for items in lists.values()} <= {list}, "expected {user: [items]}")
    cells = [(int(user), item) for user, items in lists.items() for item in items]
    need({type(item) for _, item in cells} <= {int}, "expected integer item ids, found others")
    return tuple(np.array(cells, np.int64).reshape(-1, 2).T)


def _read_inter(file: Path, label: int) -> tuple[np.ndarray, np.ndarray]:
    wanted = ("userID", "itemID", "x_label")
    with open(file, encoding="utf-8-sig") as stream:
        header = stream.readline().rstrip("\r\n").split("\t")
        need({header.count(c) for c in wanted} == {1}, f"expected columns {wanted}, found {header}")
        table = np.loadtxt(stream, np.int64, delimiter="\t", ndmin=2, comments=None,
                           usecols=[header.index(column) for column in wanted])
    need(np.isin(table[:, 2], (0, 1, 2)).all(), "expected x_label 0, 1 or 2, found others")
    return tuple(table[table[:, 2] == label, :2].T)


def _matrices(files: dict, cells: dict, n_items: int) -> dict[str, sparse.csr_matrix]:
    """0/1 matrices of one shape: the stored one, else the largest user id + 1 by feature rows."""
    shapes = {split: shape for split, (_, _, shape) in cells.items() if shape}
    need(len(set(shapes.values())) <= 1,
         f"{files['train'].parent}: expected splits of one shape, found {shapes}")
    n_users = 1 + max(int(users.max(initial=-1)) for users, *_ in cells.values())
    need(n_users < 10**8, f"{files['train']}: expected user ids below {10**8}, found {n_users - 1}")
    shape = next(iter(shapes.values()), (n_users, n_items))
    matrices = {}
    for split, (users, items, _) in cells.items():
        for kind, ids, limit in (("user", users, shape[0]), ("item", items, shape[1])):
            low, high = ids.min(initial=0), ids.max(initial=0)
            need(0 <= low and high < max(limit, 1),
                 f"{files[split]}: expected {kind} ids 0 to {limit - 1}, found {low} to {high}")
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
    idle, warnings = np.diff(train.indptr) == 0, []
    for split in SPLITS:
        matrix = getattr(dataset, split)
        need(matrix.shape == shape,
             f"{where}: expected splits of shape {shape}, found {split} of {matrix.shape}")
        need(matrix.nnz, f"{where}: empty {split} split, expected at least one interaction")
        if cold := (idle & (np.diff(matrix.indptr) > 0)).sum():
            warnings.append(f"{where}: {cold} {split} users have no training item")
    need(not (n := overlap(dataset)), f"{where}: expected disjoint splits, {n} cells are in two")
    full = (np.diff(train.indptr) == shape[1]).sum()
    need(not full, f"{where}: expected a negative for every user, {full} users have every item")
    for m, x in dataset.features.items():
        file = f"{where}: {m}_feat.npy"
        need(x.ndim == 2 and len(x) == shape[1],
             f"{file}: expected {shape[1]} rows, one an item, found shape {x.shape}")
        broken = len(x) - np.isfinite(x).all(1).sum()
        need(not broken, f"{file}: expected finite float32, found NaN or infinity in {broken} rows")
        twins = [two for two, y in dataset.features.items() if two < m and np.array_equal(x, y)]
        warnings += [f"{file} holds the same array as {two}_feat.npy" for two in twins]
        warnings += [] if x.any() else [f"{file} is zero throughout"]
    return warnings


def overlap(dataset: Dataset) -> int:
    """How many interactions are in more than one split."""
    return int(((dataset.train + dataset.val + dataset.test).data > 1).sum())


def describe(dataset: Dataset) -> dict[str, str | int]:
    """The figures of Table 3 and more, by name, in reading order. Needs no valid dataset.

    >>> figures = describe(synthetic(users=60, items=40, interactions=600))
    >>> figures["users"], figures["items"], figures["density"]
    (60, 40, '24.5 %')
    """
    (users, items), train = dataset.train.shape, dataset.train
    sizes = {split: getattr(dataset, split).nnz for split in SPLITS}
    sizes = {"users": users, "items": items, "interactions": sum(sizes.values()), **sizes}
    density = f"{100 * sizes['interactions'] / max(1, users * items):.3g} %"
    figures = {"dataset": dataset.name, **sizes, "density": density}
    for m, x in dataset.features.items():
        zero, repeated = (~x.any(1)).sum(), len(x) - len({row.tobytes() for row in x})
        figures[f"features {m}"] = f"{len(x)} x {x.shape[1]}, {zero} zero, {repeated} repeated rows"
    figures["users without training items"] = int((np.diff(train.indptr) == 0).sum())
    figures["items never trained"] = items - len(np.unique(train.indices))
    return figures | {"interactions in two splits": overlap(dataset)}


def read_json(path: Path, *keys: str) -> dict:
    """A JSON object that has these keys, or DataError."""
    with reading(path):
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        need(isinstance(content, dict) and set(keys) <= set(content), f"expected an object {keys}")
        return content


def read_torch(path: Path, device: torch.device) -> dict:
    """What torch.save wrote, tensors and plain values only, or DataError."""
    with reading(path):
        return torch.load(path, device, weights_only=True)


def fingerprint(dataset: Dataset) -> str:
    """Equal for equal data, whatever the folder."""
    cells = [np.array(getattr(dataset, split).nonzero()) for split in SPLITS]
    content = pickle.dumps((dataset.train.shape, cells, sorted(dataset.features.items())))
    return hashlib.blake2b(content, digest_size=16).hexdigest()


# ---------------------------------------------------------------- writing and converting


def write(path: Path, content) -> None:
    """A file that appears whole or not at all; content: text, or a function of the open file."""
    draft = path.with_name(path.name + ".tmp")
    try:
        with open(draft, "wb") as stream:
            stream.write(content.encode()) if isinstance(content, str) else content(stream)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_table(path: Path, rows: list[dict]) -> None:
    """Rows as CSV, whole; the columns are those of all rows, empty where a row lacks one."""
    columns = dict.fromkeys(name for row in rows for name in row)
    lines = [columns, *([str(row.get(name, "")) for name in columns] for row in rows)]
    write(path, "".join(",".join(line) + "\n" for line in lines))


def save(dataset: Dataset, path: str | Path, ids: dict | None = None) -> None:
    """Write the native layout to a new folder, whole or not at all; `ids` becomes ids.json."""
    folder = Path(path)
    need(not folder.exists(), f"{folder}: exists, expected a new folder to write to")
    draft = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        for split in SPLITS:
            sparse.save_npz(draft / f"{split}.npz", getattr(dataset, split))
        for m, x in dataset.features.items():
            np.save(draft / f"{m}_feat.npy", x)
        if ids:
            write(draft / "ids.json", json.dumps(ids))
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
    rank = np.argsort(order) - (count.cumsum() - count)[rows]  # of each among its user's
    held = np.where(count >= 3, np.maximum(1, np.rint(count / 10)), 0).astype(np.int64)[rows]
    return np.where(rank < held, 2, np.where(rank < 2 * held, 1, 0))


def from_log(log: Path, features: dict[str, Path], items: Path | None = None,
             seed: int = 0) -> tuple[Dataset, dict]:
    """One's own data: a CSV of interactions with any ids, and feature arrays.

    `items` names the item of each feature row, one id a line; without it the CSV's item ids are the
    row numbers. Returns the dataset and {"users": [...], "items": [...]}, ids by index.
    """
    with reading(log), open(log, newline="", encoding="utf-8-sig") as stream:
        rows = csv.reader(stream, delimiter="\t" if log.suffix == ".tsv" else ",")
        header = [name.strip().lower().replace("_", "") for name in next(rows, [])]
        columns = [i for kind in ("user", "item") for i, name in enumerate(header)
                   if name in (kind, kind + "id")]
        need(len(columns) == 2, f"expected columns user (or user_id) and item, found {header}")
        pairs = [tuple(row[i].strip() for i in columns) for row in rows if row]
    arrays = {m: read_features(file) for m, file in features.items()}
    need(arrays and pairs, f"{log}: expected interactions and --features MODALITY=FILE.npy, "
                           f"found {len(pairs)} and {len(arrays)}")
    n_items = len(next(iter(arrays.values())))
    with reading(items or log):
        names = items.read_text("utf-8-sig").split("\n") if items else map(str, range(n_items))
    names = [name.strip() for name in names if name.strip()]
    need(len(names) == len(set(names)) == n_items, f"{items}: expected {n_items} different ids, "
         f"one a feature row, found {len(names)}, {len(set(names))} of them different")
    column = {name: i for i, name in enumerate(names)}
    strange = sorted({item for _, item in pairs if item not in column})
    need(not strange, f"{log}: expected items of {items or 'the feature rows'}, "
                      f"found {len(strange)} others, such as {strange[:3]}")
    row = {name: i for i, name in enumerate(dict.fromkeys(user for user, _ in pairs))}
    cells = np.unique([(row[user], column[item]) for user, item in pairs], axis=0)
    if len(cells) < len(pairs):
        _warn(f"{log}: {len(pairs) - len(cells)} duplicate interactions, merged")
    label = split_interactions(cells[:, 0], np.random.default_rng(seed % 2**32))
    dataset = Dataset(log.stem, **_labelled(cells, label, (len(row), n_items)), features=arrays)
    return dataset, {"users": list(row), "items": names}


def _labelled(cells: np.ndarray, label: np.ndarray, shape) -> dict[str, sparse.csr_matrix]:
    """Cells [n, 2] and their split 0/1/2 -> one matrix a split."""
    return {split: sparse.csr_matrix((np.ones((label == i).sum(), np.float32),
            tuple(cells[label == i].T)), shape) for i, split in enumerate(SPLITS)}


# ---------------------------------------------------------------- the embedded dataset


def synthetic(seed: int = 0, users: int = 1500, items: int = 1000, interactions: int = 24_000,
              dims: dict[str, int] | None = None, unexplained: float = 0.2,
              unseen: float = 0.03) -> Dataset:
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
    planted = {"visual": (1.0, 0.5, 30.0), "text": (1.0, 0.5, 0.3), "acoustic": (0.5, 16.0, 3.0)}
    factors, taste, features = [], [], {}
    for m, d_m in (dims or {"acoustic": 128, "text": 384, "visual": 512}).items():
        weight, noise, scale = planted.get(m, (1.0, 0.5, 1.0))
        z = rng.standard_normal((items, 6), np.float32)
        distractors = 1.5 * rng.standard_normal((items, 24), np.float32)
        x = np.hstack([z, distractors]) @ rng.standard_normal((30, d_m), np.float32)
        x += noise * rng.standard_normal((items, d_m), np.float32)
        x += rng.standard_normal(d_m, np.float32)  # not centred
        features[m] = x * np.float32(scale / np.sqrt(d_m))
        factors.append(z)
        taste.append(weight * rng.standard_normal((users, 6), np.float32))
    popularity = -0.6 * np.log(1 + rng.permutation(items)).astype(np.float32)
    activity = 5 + rng.multinomial(interactions - 5 * users, rng.dirichlet(np.full(users, 1.5)))
    activity = np.minimum(activity, items // 2)
    cells = _choose(np.hstack(taste), np.hstack(factors), popularity, activity, unexplained, rng)
    label = split_interactions(cells[:, 0], rng)
    moved = (rng.random(items) < unseen)[cells[:, 1]] & (label == 0)
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
        noise = rng.standard_exponential((2, *by_taste.shape), np.float32) + np.float32(1e-30)
        count = activity[rows]
        explained = count - rng.binomial(count, unexplained)
        chosen = _largest(by_taste - np.log(noise[0]), explained)
        rest = np.where(chosen, -np.inf, popularity - np.log(noise[1]))
        chosen |= _largest(rest, count - explained)
        cells.append(np.argwhere(chosen) + [start, 0])
    return np.concatenate(cells)


def _largest(keys: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Which are the count[r] < I largest keys of row r: bool [r, I]."""
    return keys > -np.sort(-keys, axis=1)[np.arange(len(keys)), count][:, None]


# ---------------------------------------------------------------- what the model reads


def standardise(x: Tensor) -> Tensor:
    """x^m centred, over its root-mean-square row norm: one λ₁ then means the same for all m."""
    x = x - x.mean(0)
    size = x.norm(dtype=torch.float64) / len(x) ** 0.5  # in float32 the squares could overflow
    return x / size.clamp(min=torch.finfo(x.dtype).tiny).to(x)


def pca_tokens(x: Tensor, dim: int) -> Tensor:
    """η(x^m) of Eq. 3: the d principal components of centred x [I, d_m], unit variance -> [I, d].

    Eigenvectors are unique up to their sign: the largest entry of each is made positive (errata
    P10). Components below 1e-12 of the largest, and those beyond d_m, are zero.
    """
    covariance = sum(rows.double().T @ rows.double() for rows in x.split(4096)) / len(x)
    largest = [max(0, x.shape[1] - dim), x.shape[1] - 1]  # of eigenvalues in ascending order
    values, vectors = linalg.eigh(covariance.cpu().numpy(), subset_by_index=largest)
    values, vectors = values[::-1], vectors[:, ::-1]  # [min(d, d_m)], [d_m, min(d, d_m)]
    sign = np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(0)[None], 0))
    real = values > max(1e-12 * values[0], np.finfo(np.float64).tiny)
    basis = torch.from_numpy(vectors * sign * real / np.sqrt(np.where(real, values, 1))).to(x)
    return F.pad(x @ basis, (0, dim - basis.shape[1]))


def root(gram: Tensor) -> Tensor:
    """C with CCᵀ = GGᵀ, so that ‖row of p (pᵀX)‖ = ‖row of p ΘᵀC‖; GGᵀ may be singular."""
    values, vectors = torch.linalg.eigh((gram.double() @ gram.double().T).cpu())
    return (vectors * values.clamp(min=0).sqrt()).to(gram)


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
        # Column by column, users ascending: the binary searches stay in cache.
        drawn = [self.negatives(self.user, generator) for _ in range(negatives)]
        order = torch.randperm(len(self.user), generator=generator, device=self.user.device)
        return self.user[order], torch.stack([self.item, *drawn], 1)[order]


# ---------------------------------------------------------------- command line


def pick_device(name: str) -> torch.device:
    """auto: CUDA where there is one, else the CPU; otherwise as asked, or DataError."""
    here = [f"cuda:{i}" for i in range(torch.cuda.device_count())] + ["cpu"]
    device = {"auto": here[0], "cuda": "cuda:0"}.get(name, name)
    need(device in here, f"--device: expected auto or one of {', '.join(here)}, found {name}")
    return torch.device(device)


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line, raised rather than printed."""

    def error(self, message):
        raise DataError(f"{self.prog}: {message}; see --help")

    def add_settings(self, config: type) -> None:
        """A flag for each field of a dataclass; one that is not given stays out of the result."""
        for one in fields(config):
            either = one.type == float | str
            how = {"type": (lambda t: t if t.isalpha() else float(t)) if either else one.type}
            how = {"action": argparse.BooleanOptionalAction} if one.type is bool else how
            self.add_argument(f"--{one.name.replace('_', '-')}", default=argparse.SUPPRESS, **how,
                              help=" ".join([one.metadata["help"], *one.metadata["choices"],
                                             f"(default: {one.default})"]))


def main(argv: list[str] | None = None) -> int:
    """`describe` and `convert`; returns the exit status, 2 for what cannot be used."""
    parser = Parser(prog="data.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("describe", help="print a dataset's statistics").add_argument("folder")
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
    *source, out = args.paths
    need(len(source) == (not args.interactions), "expected SRC OUT, or OUT with --interactions")
    if args.interactions:
        files = {m: Path(file) for m, _, file in (pair.partition("=") for pair in args.features)}
        need(all(m.isidentifier() for m in files), "--features: expected MODALITY=FILE.npy ...")
        dataset, ids = from_log(args.interactions, files, args.items, args.seed)
        for warning in validate(dataset, str(args.interactions)):
            _warn(warning)
    else:
        dataset, ids = load(source[0]), None
    save(dataset, out, ids)
    print(f"{out}: {' x '.join(map(str, dataset.train.shape))}, {', '.join(dataset.features)}")


if __name__ == "__main__":
    sys.exit(main())

"""Files that strangers wrote: read, or refused in one line; never a crash, nothing run."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

import data
from data import DataError

ROOT = Path(data.__file__).parent
CELLS = np.array([[0, 0, 1, 2, 3, 5], [1, 4, 0, 2, 3, 1]])  # users, items of [6, 5]
HELD = {"val": ([0, 1, 3], [0, 1, 0]), "test": ([0, 1, 3], [2, 2, 1])}


def forged(form, protocol=4, **state):
    """A pickle of a scipy matrix of this form, whatever it is said to hold."""
    one = object.__new__(getattr(sparse, f"{form}_matrix"))
    vars(one).update(state)
    return pickle.dumps(one, protocol)


def whole(form, dtype="f4", order="<", step=1, state=()):
    """What a matrix of these cells holds: arrays of this type and byte order, strided."""
    ones = np.ones(6, np.int64)
    matrix = sparse.coo_matrix((ones, CELLS), (6, 5)).asformat(form)
    names = ("row", "col") if form == "coo" else ("indptr", "indices")
    arrays = {name: getattr(matrix, name).astype(f"{order}i4") for name in names}
    arrays["data"] = matrix.data.astype(f"{order}{dtype}")
    arrays = {name: np.repeat(array, step)[::step] for name, array in arrays.items()}
    return {"_shape": (6, 5), "maxprint": 50, **arrays, **dict(state)}


def diffmm(folder, train, others=(6, 5)):
    """A DiffMM folder of six users and five items, whose training split is these bytes.

    others: the shape that the other splits declare.
    """
    folder.mkdir(parents=True)
    np.save(folder / "look_feat.npy", np.arange(10.0).reshape(5, 2))
    (folder / "trnMat.pkl").write_bytes(train)
    for split, name in (("val", "valMat.pkl"), ("test", "tstMat.pkl")):
        row, col = map(np.array, HELD[split])
        content = forged("coo", _shape=others, row=row, col=col, data=np.ones(3))
        (folder / name).write_bytes(content)
    return folder


def native(folder, others=(6, 5), **train):
    """The same in the native layout; train: what its archive holds."""
    folder.mkdir(parents=True)
    np.save(folder / "look_feat.npy", np.arange(10.0).reshape(5, 2))
    np.savez(folder / "train.npz", **train)
    for split, (row, col) in HELD.items():
        held = {"row": row, "col": col, "data": np.ones(3), "shape": others}
        np.savez(folder / f"{split}.npz", format=b"coo", **held)
    return folder


def archive(form, **state):
    """What sparse.save_npz writes of a matrix."""
    held = whole(form, state=state)
    shape = held.pop("_shape")
    return {"format": form.encode(), "shape": np.array(shape), **held}


def assert_cells(dataset):
    found = np.array(dataset.train.nonzero())
    assert np.array_equal(found, CELLS)
    assert (dataset.train.data == 1).all()


# ------------------------------------------------------------ what has to be read

FORMS = ("coo", "csr", "csc")


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("form", FORMS)
def test_every_form_and_protocol(form, protocol, tmp_path):
    """As scipy itself pickles it, and as versions before 1.13 did: row and col."""
    real = sparse.coo_matrix((np.ones(6), CELLS), (6, 5)).asformat(form)
    for i, content in enumerate(
        [pickle.dumps(real, protocol), forged(form, protocol, **whole(form))]
    ):
        assert_cells(data.load(diffmm(tmp_path / str(i), content)))


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("dtype", ["b1", "i1", "u4", "i8", "f2", "f4", "f8"])
@pytest.mark.parametrize("order, step", [("<", 1), (">", 1), ("<", 2)])
def test_every_kind_of_number(protocol, dtype, order, step, tmp_path):
    """Either byte order; arrays in one piece or strided; float16 too."""
    content = forged("csr", protocol, **whole("csr", dtype, order, step))
    assert_cells(data.load(diffmm(tmp_path / "in", content)))


@pytest.mark.parametrize("form", FORMS)
def test_old_module_paths(form, tmp_path):
    content = forged(form, 2, **whole(form)).replace(b"numpy._core", b"numpy.core")
    content = content.replace(b"scipy.sparse._", b"scipy.sparse.")
    assert b"sparse." + form.encode() in content
    assert_cells(data.load(diffmm(tmp_path / "in", content)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("array", [sparse.coo_matrix, sparse.coo_array])
def test_archives_of_every_form(form, array, tmp_path):
    folder = native(tmp_path / "in")
    matrix = array((np.ones(6), CELLS), (6, 5)).asformat(form)
    sparse.save_npz(folder / "train.npz", matrix)
    assert_cells(data.load(folder))


def test_room_that_an_index_pointer_leaves(tmp_path):
    """Scipy lets the arrays of csr be longer than its pointer says."""
    held = whole("csr")
    for name in ("indices", "data"):
        held[name] = np.append(held[name], held[name])
    assert_cells(data.load(diffmm(tmp_path / "in", forged("csr", **held))))


@pytest.mark.parametrize("write", [diffmm, native])
def test_stored_zeros_are_no_interactions(write, tmp_path):
    held = {"row": [*CELLS[0], 4], "col": [*CELLS[1], 4], "data": [1, 2, 3, 1, 1, 0.5, 0]}
    held = {name: np.array(values) for name, values in held.items()}
    if write is native:
        folder = native(tmp_path / "in", **archive("coo", **held))
    else:
        folder = diffmm(tmp_path / "in", forged("coo", **whole("coo", state=held)))
    assert_cells(data.load(folder))


# ------------------------------------------------------------ what would end the process


class Says:
    """Pickles as a call of `function`, then a state."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def with_data(dtype, content, shape=(6,)):
    """A csr matrix whose data are such an array."""
    _, rebuild, _ = np.ones(1).__reduce__()[0], np.ones(1).__reduce__()[0], None
    array = Says(rebuild, (np.ndarray, (0,), b"b"), (1, shape, dtype, False, content))
    return forged("csr", **whole("csr", state={"data": array}))


def dtype(code, *state):
    return Says(np.dtype, (code, False, True), state)


def fields_at(offset):
    field = {"a": (np.dtype("i8"), offset)}
    return dtype("V8", 3, "|", None, ("a",), field, 8, 1, 0)


def pointer(values, kind="i4", **state):
    held = {"indptr": np.array(values, kind), **state}
    return forged("csr", **whole("csr", state=held))


def shaped(shape):
    return forged("coo", **whole("coo", state={"_shape": shape}))


FRONT = b"\x80\x04"
NESTED = b")" + 300_000 * b"\x85"  # a tuple of a tuple of …
DOUBLED = b")" + 64 * b"2\x86"  # (t, t) of (t, t) of …: 2^64 tuples, if one counts
COO = b"cscipy.sparse.coo\ncoo_matrix\n"
DTYPE = b"cnumpy\ndtype\n"
OBJECTS = dtype("O8", 3, "|", None, None, None, -1, -1, 63)
WRAPS = [0, 2**63 - 1, -(2**63) + 5, -1, 6, 6, 6]  # each step is positive in 64 bits

HOSTILE = {  # content of trnMat.pkl, and what is said of it
    "object pointers": (with_data(OBJECTS, 48 * b"\x41"), "found |O8"),
    "a field before the item": (with_data(fields_at(-4096), 48 * b"a"), "found |V8"),
    "a field beyond the item": (with_data(fields_at(2**20), 48 * b"a"), "found |V8"),
    "bytes too few": (with_data(np.dtype("f8"), 8 * b"a"), "expected a shape of (1,)"),
    "bytes amiss": (with_data(np.dtype("f8"), 9 * b"a"), "buffer size"),
    "complex": (with_data(np.dtype("c16"), 96 * b"a"), "found <c16"),
    "two dimensions": (with_data(np.dtype("f4"), 24 * b"a", (2, 3)), "expected a shape"),
    "pointer hidden by format": (
        pointer([0, 2, 3, 4, 2**30, 5, 6], format="coo"),
        "expected an index pointer of 7 numbers",
    ),
    "pointer that descends": (pointer([0, 2, 6, 3, 5, 5, 6]), "ascending from 0 to 6"),
    "pointer that wraps": (pointer(WRAPS, "i8"), "ascending from 0 to 6"),
    "pointer not from 0": (pointer([2, 2, 3, 4, 5, 5, 6]), "ascending from 0 to 6"),
    "pointer too short": (pointer([0, 2, 6]), "of 7 numbers"),
    "pointer beyond": (pointer([0, 2, 3, 4, 5, 5, 2**30]), "ascending from 0 to 6"),
    "pointer of none": (pointer([]), "out of bounds"),
    "column beyond": (
        pointer([0, 2, 3, 4, 5, 5, 6], indices=np.full(6, 2**31 - 1)),
        "expected item ids 0 to 4",
    ),
    "column of nobody": (
        pointer([0, 2, 3, 4, 5, 5, 6], indices=np.full(6, 2**64 - 9, "u8")),
        "expected item ids 0 to 4",
    ),
    "fewer columns": (
        pointer([0, 2, 3, 4, 5, 5, 6], data=np.ones(3)),
        "expected a value for each cell",
    ),
    "an object for a matrix": (pickle.dumps(np.dtype("f4")), "found dtype"),
    "a matrix without a state": (FRONT + COO + b")R.", "found coo_matrix"),
    "a matrix of one row": (shaped((6,)), "not enough values"),
    "a shape of text": (shaped(("6", "5")), "cannot be interpreted as an integer"),
    "items set upon a stand-in": (FRONT + COO + b")R(K\x01K\x02u.", "cannot be read"),
    "things added to a stand-in": (FRONT + COO + b")RK\x01a.", "cannot be read"),
    "a class given a state": (FRONT + COO + b"}b.", "cannot be read"),
    "a function given a state": (FRONT + b"c_codecs\nencode\n}b.", "cannot be read"),
    "a call of text": (FRONT + b"\x8c\x01a)R.", "not callable"),
    "deep key": (FRONT + b"}(" + NESTED + b"K\x01u.", "expected fields by name"),
    "deep key, one": (FRONT + b"}" + NESTED + b"K\x01s.", "expected fields by name"),
    "deep key, at once": (FRONT + b"(" + NESTED + b"K\x01d.", "refused"),
    "deep set": (FRONT + b"\x8f(" + NESTED + b"\x90.", "refused"),
    "deep frozen set": (FRONT + b"(" + NESTED + b"\x91.", "refused"),
    "deep state": (FRONT + DTYPE + b")R" + NESTED + b"b.", "found dtype"),
    "endless key": (FRONT + b"}" + DOUBLED + b"K\x01s.", "expected fields by name"),
    "a bytearray of 2 GB": (
        FRONT + b"\x96" + (2**31).to_bytes(8, "little") + b"a.",
        "cannot be read",
    ),
    "a memory of 2^31 things": (FRONT + b"K\x01r\xff\xff\xff\x7f.", "found int"),
    "a frame of 2^62 bytes": (
        FRONT + b"\x95" + (2**62).to_bytes(8, "little") + b"K\x01.",
        "cannot be read",
    ),
    "a shape of 10,000 digits": (shaped((10**10_000, 5)), "refused"),
}
SHAPES = [(10**8 + 1, 5), (10**9, 5), (10**13, 5), (6, 4), (6, 10**9), (6, 10**13), (-6, 5)]

CHILD = """
import json, os, resource, signal, sys, data
for folder in sys.argv[1:]:
    if not os.fork():  # a crash is that of one case
        signal.alarm(10)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
        try:
            data.load(folder)
            said = "read"
        except data.DataError as error:
            said = str(error)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(json.dumps([os.path.basename(folder), said, grown]), flush=True)
        os._exit(0)
    os.wait()
"""


def child(script, *argv):
    command = [sys.executable, "-c", script, *map(str, argv)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
    ).stdout


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """{case: (what was said, KiB that the process grew by)}, of those that lived."""
    home = tmp_path_factory.mktemp("hostile")
    folders = [diffmm(home / case, content) for case, (content, _) in HOSTILE.items()]
    for shape in SHAPES:
        held = whole("coo", state={"_shape": shape})
        folders.append(diffmm(home / f"pickle {shape}", forged("coo", **held), shape))
        for form in ("coo", "csr" if shape[0] == 6 else "csc"):
            train = archive(form, _shape=shape)
            folders.append(native(home / f"{form} {shape}", shape, **train))
    lines = child(CHILD, *folders).splitlines()
    return {case: (said, grown) for case, said, grown in map(json.loads, lines)}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickles(case, outcomes):
    assert case in outcomes, "the process ended, or took longer than ten seconds"
    said, grown = outcomes[case]
    assert HOSTILE[case][1] in said
    assert f"{case}/trnMat.pkl: " in said
    assert "\n" not in said
    assert grown < 100_000  # KiB


@pytest.mark.parametrize("kind", ["pickle", "coo", "csr or csc"])
@pytest.mark.parametrize("shape", SHAPES)
def test_declared_shapes(shape, kind, outcomes):
    """Of all splits alike, and so large that a matrix of it would fill the memory."""
    kind = kind if kind != "csr or csc" else "csr" if shape[0] == 6 else "csc"
    assert f"{kind} {shape}" in outcomes, "the process ended, or took long"
    said, grown = outcomes[f"{kind} {shape}"]
    expected = "expected at most 100000000 users and 5 items, as many as feature rows"
    assert f": {expected}, found {shape}" in said
    assert grown < 100_000  # KiB


FUZZ = """
import encodings.raw_unicode_escape, pathlib, sys  # which one operation imports
import numpy as np
import data

folder = pathlib.Path(sys.argv[1])
seeds = [file.read_bytes() for file in sorted(folder.glob("*.seed"))]
rng = np.random.default_rng(0)
codes = [b"i4", b"f4", b"O8", b"V8", b"S1", b"U4", b"M8", b"c8", b"i8", b"b1", b"i1"]
extremes = [b"\\xff" * 4, b"\\0" * 4, b"\\xff\\xff\\xff\\x7f", b"\\0\\0\\0\\x80"]
names = [b"_reconstruct", b"ndarray", b"dtype", b"coo_matrix", b"csr_matrix", b"encode"]


def flipped(content):
    for at in rng.integers(len(content), size=rng.integers(1, 9)):
        content[at] = rng.integers(256)
    return content


def forged(content):
    return bytearray(content.replace(codes[rng.integers(2)], codes[rng.integers(11)]))


def renamed(content):
    a, b = rng.choice(names, 2, replace=False)
    return bytearray(content.replace(a, b))


def swapped(content):  # two pieces, such as the states of two arrays
    a, b, c, d = np.sort(rng.integers(len(content), size=4))
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def repeated(content):
    a, b = np.sort(rng.integers(len(content), size=2))
    return content[:b] + content[a:]


def stretched(content):
    at = rng.integers(len(content))
    content[at : at + 4] = extremes[rng.integers(4)]
    return content


def cut(content):
    return content[: rng.integers(len(content))]


called = []


def watch(event, given):
    if event in ("import", "exec", "compile") or event.startswith(("os.", "subprocess")):
        called.append(f"{event}:{given[0]}")


def outcome(content):
    (folder / "trnMat.pkl").write_bytes(content)
    try:
        data._matrices(files, {"train": data._read(files["train"], 0)}, 5)
        return "read"
    except data.DataError:
        return "refused"


files = {"train": folder / "trnMat.pkl"}
assert {outcome(seed) for seed in seeds} == {"read"}
sys.addaudithook(watch)
changes = [flipped, flipped, forged, renamed, swapped, repeated, stretched, cut]
found = {"read": 0, "refused": 0}
for i in range(int(sys.argv[2])):
    content = bytearray(seeds[rng.integers(len(seeds))])
    for change in rng.choice(changes, rng.integers(1, 3)):
        content = change(content) or bytearray(b".")
    found[outcome(content)] += 1
print(found["read"], found["refused"], *called)
"""


def test_mutated_pickles(tmp_path):
    """2,000 of them in one process: each is read or refused, and nothing is called."""
    for form in FORMS:
        for protocol in (2, 4, 5):
            content = forged(form, protocol, **whole(form))
            (tmp_path / f"{form}{protocol}.seed").write_bytes(content)
    read, refused, *called = child(FUZZ, tmp_path, 2000).split()
    assert int(read) > 100
    assert int(refused) > 1000
    assert not called


# ------------------------------------------------------------ archives and arrays


def claimed(file, shape, content=b""):
    """An .npy file that claims a shape."""
    with open(file, "wb") as stream:
        header = {"descr": "<f8", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)
        stream.write(content)


ARCHIVES = {
    "a shape with fractions": (archive("coo", _shape=(6.0, 5.0)), "as an integer"),
    "another form": ({**archive("coo"), "format": b"dia"}, "coo, csr or csc, found dia"),
    "pointer that wraps": (archive("csr", indptr=np.array(WRAPS)), "ascending from 0"),
    "cells of different length": (archive("coo", row=np.zeros(5, int)), "for each cell"),
    "no columns": ({**archive("coo"), "col": np.array(["a"] * 6)}, "Cannot cast"),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_hostile_archives(case, tmp_path):
    content, message = ARCHIVES[case]
    with pytest.raises(DataError) as error:
        data.load(native(tmp_path / "in", **content))
    assert message in str(error.value)
    assert "train.npz: " in str(error.value)


@pytest.mark.parametrize("shape", [(10**9, 8), (10**12, 8), (2**62, 4)])
def test_arrays_that_are_not_there(shape, tmp_path):
    folder = native(tmp_path / "in", **archive("coo"))
    claimed(folder / "look_feat.npy", shape)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"look_feat\.npy: cannot be read"):
        data.load(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


# ------------------------------------------------------------ values

VALUES = {
    "NaN": ({"data": [1, 1, 1, np.nan, 1, 1]}, "expected finite values"),
    "infinite": ({"data": [1, 1, 1, np.inf, 1, 1]}, "expected finite values"),
    "negative": ({"data": [1, 1, 1, -1, 1, 1]}, "none negative, found -1.0 to 1.0"),
    "fractional users": ({"row": [0, 0, 1, 2, 3.5, 5]}, "Cannot cast"),
    "fractional items": ({"col": [1, 4, 0, 2.5, 3, 1]}, "Cannot cast"),
}


@pytest.mark.parametrize("case", VALUES)
@pytest.mark.parametrize("write", [diffmm, native])
def test_values_that_are_no_interactions(write, case, tmp_path):
    held, message = VALUES[case]
    held = {name: np.array(values) for name, values in held.items()}
    if write is native:
        folder = native(tmp_path / "in", **archive("coo", **held))
    else:
        folder = diffmm(tmp_path / "in", forged("coo", **whole("coo", state=held)))
    with pytest.raises(DataError, match=message):
        data.load(folder)


@pytest.mark.parametrize("value", [np.nan, -np.inf, 3e38, -2e30])
def test_features_beyond_use(value, tmp_path):
    folder = native(tmp_path / "in", **archive("coo"))
    x = np.ones((5, 2), np.float32)
    x[3, 1] = value
    np.save(folder / "look_feat.npy", x)
    with pytest.raises(DataError, match="expected finite numbers to 1e.30, .* in 1 rows"):
        data.load(folder)


def test_a_user_twice_in_json(tmp_path):
    folder = native(tmp_path / "in")
    for split in data.SPLITS:
        (folder / f"{split}.npz").unlink()
        (folder / f"{split}.json").write_text('{"0": [1], "1": [2], "0": [3]}')
    with pytest.raises(DataError, match=r"train\.json: expected each key once"):
        data.load(folder)


def test_a_table_without_rows(tmp_path, capsys):
    folder = native(tmp_path / "in")
    for split in data.SPLITS:
        (folder / f"{split}.npz").unlink()
    (folder / "shop.inter").write_text("userID\titemID\tx_label\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data.main(["convert", str(folder), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.splitlines()[1:] == [
        f"error: {folder}: empty train split, expected at least one interaction"
    ]


# ------------------------------------------------------------ one's own data, the command

LOG = "time,user,item\n" + "".join(f"9,u{u},{i}\n" for u in range(4) for i in range(3))


def own(folder, *argv, log=LOG):
    (folder / "log.csv").write_text(log)
    np.save(folder / "look.npy", np.arange(10.0).reshape(5, 2))
    argv = [str(one).replace("DIR", str(folder)) for one in argv]
    return data.main(["convert", *argv])


def refusal(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ")
    assert sum(line.startswith("error: ") for line in lines) == 1
    return lines[-1]


GIVEN = ("DIR/out", "--interactions", "DIR/log.csv", "--features")


@pytest.mark.parametrize("row", ["9,,1", "9, ,1", "9,u1,", "9,u1", "9", "9,u1,1,5", ",,"])
def test_rows_without_a_user_and_an_item(row, tmp_path, capsys):
    assert own(tmp_path, *GIVEN, "look=DIR/look.npy", log=f"{LOG}\n{row}\n") == 2
    said = refusal(capsys)
    assert "log.csv: line 15: expected 3 cells, with a user and an item, found [" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("end", ["", '"'])
def test_a_quote_that_does_not_end_with_its_cell(end, tmp_path, capsys):
    """It would hide the rows up to the next one, or to the end."""
    log = "user,item\n" + "".join(f"u{n % 4},{n % 5}\n" for n in range(20))
    broken = log.replace("u2,2", '"u2,2', 1).replace("u3,3", f"u3,3{end}u", 1)
    assert own(tmp_path, *GIVEN, "look=DIR/look.npy", log=broken) == 2
    assert "log.csv: cannot be read: " in refusal(capsys)
    assert not (tmp_path / "out").exists()


def test_rows_that_two_stray_quotes_hide_are_counted(tmp_path, capsys):
    """Alone they cannot be told from a review of several lines."""
    rows = [f"u{n % 4},{n % 5},good\n" for n in range(20)]
    rows[4] = rows[4].replace("good", '"great, loved it')
    rows[7] = rows[7].replace("good", '27"')
    log = "user,item,review\n" + "".join(rows)
    assert own(tmp_path, *GIVEN, "look=DIR/look.npy", log=log) == 0
    warned = "log.csv: 3 lines are empty or within quotes"
    assert warned in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")
    plain = log.replace('"', "").replace("great, ", "")
    assert own(tmp_path, *GIVEN, "look=DIR/look.npy", log=plain) == 0
    assert "within quotes" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "features",
    [["look"], ["look="], ["=DIR/look.npy"], ["a-b=DIR/look.npy"], 2 * ["a=DIR/look.npy"]],
)
def test_features_name_their_flag(features, tmp_path, capsys):
    assert own(tmp_path, *GIVEN, *features) == 2
    said = refusal(capsys)
    expected = "MODALITY=FILE.npy, each modality once, of letters, digits and _"
    assert f"--features: expected {expected}, found " in said
    assert features[0].replace("DIR", str(tmp_path)) in said


@pytest.mark.parametrize(
    "flags",
    [["--features", "look=DIR/look.npy"], ["--items", "DIR/i"], ["--seed", "0"]],
)
@pytest.mark.parametrize("paths", [["DIR/in", "DIR/out"], ["DIR/out"]])
def test_flags_of_ones_own_data_need_interactions(paths, flags, tmp_path, capsys):
    native(tmp_path / "in", **archive("coo"))
    assert own(tmp_path, *paths, *flags) == 2
    assert "expected SRC OUT, or OUT with --interactions" in refusal(capsys)
    assert not (tmp_path / "out").exists()


def test_a_source_beside_interactions(tmp_path, capsys):
    native(tmp_path / "in", **archive("coo"))
    assert own(tmp_path, "DIR/in", *GIVEN, "look=DIR/look.npy") == 2
    assert "expected SRC OUT, or OUT with --interactions" in refusal(capsys)


def test_a_name_of_two_lines(tmp_path, capsys):
    folder = native(tmp_path / "in\nerror: two", **{**archive("coo"), "format": b"dia"})
    assert data.main(["convert", str(folder), str(tmp_path / "out")]) == 2
    assert "in error: two/train.npz: expected" in capsys.readouterr().err.splitlines()[-1]
    assert data.main(["describe", str(tmp_path / "no\nwhere")]) == 2
    assert "no where: expected a dataset folder" in refusal(capsys)


def test_links_that_lead_to_themselves(tmp_path, capsys):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    folder = native(tmp_path / "in", **archive("coo"))
    for argv in (["describe", loop], ["describe", loop / "x"], ["convert", folder, loop]):
        assert data.main([*map(str, argv)]) == 2
        assert "loop" in refusal(capsys)
    assert own(tmp_path, *GIVEN, f"look={loop}") == 2
    assert own(tmp_path, "DIR/out", "--interactions", loop, "--features", "a=b") == 2


def test_a_full_disk_leaves_nothing(tmp_path, capsys):
    """Features of a page or less, which numpy writes to a file without a complaint."""
    folder = native(tmp_path / "in", **archive("coo"))
    np.save(folder / "look_feat.npy", np.ones((5, 100), np.float32))  # 2,128 bytes
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2100, before[1]))
    try:
        status = data.main(["convert", str(folder), str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2
    assert "File too large" in refusal(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a full device")
def test_a_full_disk_behind_the_output(tmp_path):
    folder = native(tmp_path / "in", **archive("coo"))
    command = [sys.executable, ROOT / "data.py", "describe", folder]
    buffered = {name: x for name, x in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=buffered
        )
    assert done.returncode == 2
    assert done.stderr.splitlines()[1:] == ["error: [Errno 28] No space left on device"]

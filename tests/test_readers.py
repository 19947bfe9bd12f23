"""Files: what is read, and that every damaged one ends in one sentence."""

import io
import os
import pickle
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ftso_fast.data import prepare
from ftso_fast.errors import DataError, UsageError
from ftso_fast.readers import CIFAR10, read_images

X = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
Y = np.arange(12) % 3


def refused(call, *words):
    """The call raises a DataError of one line with a remedy after a colon, without a chained traceback."""
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert ": " in message
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    for word in words:
        assert word in message, message
    return message


def saved(tmp_path, **arrays):
    path = tmp_path / "images.npz"
    np.savez(path, **arrays)
    return path


def member(header: bytes, body: bytes, version: bytes = b"\x01\x00") -> bytes:
    size = len(header).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return b"\x93NUMPY" + version + size + header + body


def header(descr: str, shape: str) -> bytes:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()


def zipped(tmp_path, x: bytes, compression=zipfile.ZIP_DEFLATED):
    """An archive with hand-made bytes for x_train and honest labels."""
    path = tmp_path / "forged.npz"
    labels = io.BytesIO()
    np.save(labels, Y)
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("x_train.npy", x)
        archive.writestr("y_train.npy", labels.getvalue())
    return path


def test_digits_are_scaled_by_nearest_neighbour():
    from sklearn.datasets import load_digits

    raw = load_digits()
    train, test = read_images("digits"), read_images("digits", split="test")
    assert train.x.shape == (1437, 32, 32, 3)
    assert test.x.shape == (360, 32, 32, 3)
    assert train.x.dtype == np.uint8
    assert train.classes == tuple("0123456789")
    assert not train.official_order
    for k in (0, 700):
        for c in range(3):
            expected = np.rint(raw.images[k] * 255 / 16)
            assert np.array_equal(train.x[k, 2::4, 1::4, c], expected)
            assert np.array_equal(train.x[k, ::4, 3::4, c], expected)
    assert np.array_equal(np.concatenate([train.y, test.y]), raw.target)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    refused(lambda: read_images("digits"), "pip install scikit-learn")


def real():
    path = Path(os.environ.get("FTSO_DATA", "/nowhere")) / "cifar10_10k2k.npz"
    return str(path) if path.exists() else "digits"


@pytest.mark.parametrize("source", [real()], ids=["digits" if real() == "digits" else "cifar10"])
def test_real_images(source):
    images = read_images(source)
    found = prepare(source, classes=None, seed=0)
    assert found.report.classes == 10
    assert found.report.classes_from == "data set"
    assert found.report.shape == (3, 32, 32)
    assert found.report.augmentation == "crop 4, flip, normalise"
    batch = next(found.architecture_batches())
    assert batch.images.shape == (256, 3, 32, 32)
    if source != "digits":
        assert images.classes == CIFAR10
        assert np.array_equal(np.bincount(images.y), [1000] * 10)
        assert len(read_images(source, split="test").x) == 2000
        assert abs(float(batch.images.mean())) < 0.5
        assert 0.8 < float(batch.images.std()) < 1.4


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, ">i4"])
def test_npz_round_trip(tmp_path, save, dtype):
    path = tmp_path / "ünïcode images.npz"
    save(path, x_train=X, y_train=Y.astype(dtype), x_test=X[:4], y_test=Y[:4], classes=["a", "b", "c"])
    images = read_images(path)
    assert np.array_equal(images.x, X)
    assert np.array_equal(images.y, Y)
    assert images.y.dtype == np.int64
    assert images.classes == ("a", "b", "c")
    assert not images.official_order
    assert np.array_equal(read_images(str(path), split="test").x, X[:4])


def test_npz_layouts(tmp_path):
    for x in (X.transpose(0, 3, 1, 2), np.asfortranarray(X)):
        assert np.array_equal(read_images(saved(tmp_path, x_train=x, y_train=Y)).x, X)
    grey = read_images(saved(tmp_path, x_train=X[..., 0], y_train=Y))
    assert np.array_equal(grey.x, X[..., :1])
    assert grey.classes is None


def test_npz_member_of_version_2(tmp_path):
    path = zipped(tmp_path, member(header("'|u1'", str(X.shape)), X.tobytes(), b"\x02\x00"))
    assert np.array_equal(read_images(path).x, X)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": X}, ["x_train", "y_train", "found: a"]),
        ({"x_train": X}, ["no y_train"]),
        ({"x_train": X, "y_train": Y[:5]}, ["12 images", "5 labels"]),
        ({"x_train": X.astype(float), "y_train": Y}, ["x_train", "float64", "uint8"]),
        ({"x_train": X.astype(np.uint16), "y_train": Y}, ["x_train", "uint16", "uint8"]),
        ({"x_train": X.astype(np.int8), "y_train": Y}, ["x_train", "int8", "uint8"]),
        ({"x_train": X, "y_train": Y.astype(float)}, ["y_train", "float64", "integer"]),
        ({"x_train": X, "y_train": Y[:, None]}, ["y_train", "(12, 1)", "ravel"]),
        ({"x_train": X, "y_train": Y - 1}, ["label -1", "negative"]),
        ({"x_train": X.reshape(12, -1), "y_train": Y}, ["(12, 192)"]),
        ({"x_train": X[..., [0, 1, 2, 0]], "y_train": Y}, ["(12, 8, 8, 4)", "RGB"]),
        ({"x_train": X[:, :6], "y_train": Y}, ["divisible by 4", "resize or pad"]),
        ({"x_train": X, "y_train": Y, "classes": ["a", "b"]}, ["label 2", "0..1"]),
        ({"x_train": X, "y_train": Y, "classes": [1, 2, 3]}, ["classes", "int64"]),
    ],
)
def test_npz_with_wrong_contents(tmp_path, arrays, words):
    path = saved(tmp_path, **arrays)
    refused(lambda: read_images(path), str(path), *words)


def test_npz_without_a_test_part(tmp_path):
    path = saved(tmp_path, x_train=X, y_train=Y)
    refused(lambda: read_images(path, split="test"), "no x_test and no y_test")


class Bomb:
    def __reduce__(self):
        return os._exit, (66,)


@pytest.mark.parametrize("key", ["x_train", "y_train", "classes"])
def test_objects_are_refused_and_never_unpickled(tmp_path, key):
    arrays = {"x_train": X, "y_train": Y, "classes": np.array(["a", "b", "c"])}
    evil = np.empty(12, object)
    evil[:] = [Bomb() for _ in range(12)]
    path = saved(tmp_path, **{**arrays, key: evil})
    refused(lambda: read_images(path), key, "objects")


def test_a_bare_pickle_is_refused(tmp_path):
    path = tmp_path / "images.npz"
    path.write_bytes(pickle.dumps(Bomb()))
    refused(lambda: read_images(path), "not an .npz")


@pytest.mark.parametrize("content", [b"", b"hello, images\n", b"PK\x03\x04", b"\x93NUMPY\x01\x00"])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "images.npz"
    path.write_bytes(content)
    refused(lambda: read_images(path), str(path), "not an .npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_truncated_anywhere(tmp_path, save):
    whole, part = tmp_path / "whole.npz", tmp_path / "part.npz"
    save(whole, x_train=X, y_train=Y)
    data = whole.read_bytes()
    for length in [*range(0, len(data), 37), len(data) - 1]:
        part.write_bytes(data[:length])
        refused(lambda: read_images(part), str(part))


def test_npz_with_flipped_bits_is_refused_or_read_unharmed(tmp_path):
    """Every byte of a small archive in turn: a CRC, a header or the directory notices, or no harm is done."""
    path = tmp_path / "images.npz"
    np.savez_compressed(path, x_train=X[:4], y_train=Y[:4])
    data = path.read_bytes()
    noticed = 0
    for position in range(len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x41]) + data[position + 1 :])
        try:
            images = read_images(path)
        except DataError:
            noticed += 1
        else:
            assert np.array_equal(images.x, X[:4])
            assert np.array_equal(images.y, Y[:4])
    assert noticed > 0.8 * len(data)


@pytest.mark.parametrize(
    ("descr", "shape", "body", "words"),
    [
        ("'|u1'", "(10**9, 8, 8, 3)", b"", ["cannot be read"]),
        ("'|u1'", "(1000000000, 8, 8, 3)", b"\0" * 64, ["limit of 8,589,934,592"]),
        ("'|u1'", "(1000000, 8, 8, 3)", b"\0" * 64, ["192,000,000", "holds 64"]),
        ("'|u1'", "(12, 8, 8, 3)", X.tobytes() + b"\0", ["2,304", "holds 2,305"]),
        ("'|u1'", "(-1, 8, 8, 3)", b"", ["x_train"]),
        ("'|u1'", "(-2, -2, 8, 8)", b"\0" * 256, ["x_train"]),
        ("'|u1'", "12", X.tobytes(), ["cannot be read"]),
        ("'|O'", "(12,)", b"\x80\x04N.", ["objects"]),
        ("[('a', '|O')]", "(12,)", b"\x80\x04N.", ["objects"]),
        ("'nonsense'", "(12,)", b"", ["cannot be read"]),
        ("__import__('os')", "(12,)", b"", ["cannot be read"]),
        ("'|u1'", "(" * 300 + "12" + ")" * 300, b"", ["x_train"]),
    ],
)
def test_headers_that_lie(tmp_path, descr, shape, body, words):
    path = zipped(tmp_path, member(header(descr, shape), body))
    refused(lambda: read_images(path), str(path), *words)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x93NUMPY",
        b"plain text",
        member(b"{" * 100, b""),
        member(b"x" * 60000, b""),
        member(header("'|u1'", "(1,)"), b"\0", b"\x09\x00"),
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
    ],
)
def test_members_that_are_no_arrays(tmp_path, raw):
    refused(lambda: read_images(zipped(tmp_path, raw)), "x_train", "cannot be read")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_archive_that_lies_about_a_members_size_takes_no_memory(tmp_path, compression):
    """Header and directory both say 3 GB; the file holds 64 bytes of it: refused before memory is taken."""
    size = 15_625_000 * 192
    raw = member(header("'|u1'", "(15625000, 8, 8, 3)"), b"\0" * 64)
    path = zipped(tmp_path, raw, compression)
    data = path.read_bytes()
    forged = data.replace(len(raw).to_bytes(4, "little"), (len(raw) - 64 + size).to_bytes(4, "little"))
    assert forged != data
    path.write_bytes(forged)
    tracemalloc.start()
    try:
        refused(lambda: read_images(path), "x_train")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("source", ["no/such/file.npz", "nowhere", "", "bad\0name"])
def test_no_such_file(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(lambda: read_images(source + "x"), "no such file")


def test_unknown_split():
    with pytest.raises(UsageError, match="'train' or 'test'"):
        read_images("digits", split="valid")


def cifar_folder(folder, python=False):
    """25 records in five files; record i has label i % 10 and planes that say channel, row and column."""
    folder.mkdir(parents=True)
    records = []
    for i in range(25):
        planes = np.random.default_rng(i).integers(0, 256, (3, 32, 32), dtype=np.uint8)
        records.append(bytes([i % 10]) + planes.tobytes())
    for part in range(5):
        name = folder / (f"data_batch_{part + 1}" + ("" if python else ".bin"))
        name.write_bytes(b"".join(records[5 * part : 5 * part + 5]))
    if not python:
        (folder / "test_batch.bin").write_bytes(records[3])
    return folder


@pytest.mark.parametrize("parent", [False, True])
def test_cifar10_binary_files(tmp_path, parent):
    folder = cifar_folder(tmp_path / "cifar-10-batches-bin")
    images = read_images(str(tmp_path if parent else folder))
    assert images.x.shape == (25, 32, 32, 3)
    assert images.x.dtype == np.uint8
    assert images.official_order
    assert images.classes == CIFAR10
    assert images.y.tolist() == [i % 10 for i in range(25)]
    for i in (0, 7, 24):
        planes = np.random.default_rng(i).integers(0, 256, (3, 32, 32), dtype=np.uint8)
        assert np.array_equal(images.x[i].transpose(2, 0, 1), planes)
    test = read_images(folder, split="test")
    assert test.y.tolist() == [3]


def test_cifar10_is_split_in_its_official_order(tmp_path):
    folder = cifar_folder(tmp_path / "cifar")
    found = prepare(folder, classes=None, seed=5, batch_size=30)
    assert found.report.split == "official order"
    assert (found.report.weight_images, found.report.architecture_images) == (13, 12)
    assert sorted(next(found.weight_batches(0)).labels.tolist()) == sorted(i % 10 for i in range(13))
    assert sorted(next(found.architecture_batches()).labels.tolist()) == sorted(i % 10 for i in range(13, 25))


def test_cifar10_python_version_is_refused(tmp_path):
    folder = cifar_folder(tmp_path / "cifar-10-batches-py", python=True)
    for source in (folder, tmp_path):
        refused(lambda source=source: read_images(source), "python version", "cifar-10-binary.tar.gz")


def test_cifar10_damaged_files(tmp_path):
    folder = cifar_folder(tmp_path / "cifar")
    third = folder / "data_batch_3.bin"
    good = third.read_bytes()
    for bad, words in (
        (good[:-1], ["data_batch_3.bin", "3073"]),
        (b"", ["data_batch_3.bin", "3073"]),
        (b"\x0a" + good[1:], ["data_batch_3.bin", "label 10"]),
    ):
        third.write_bytes(bad)
        refused(lambda: read_images(folder), *words)
    third.unlink()
    refused(lambda: read_images(folder), "no data_batch_3.bin")


def test_an_empty_folder(tmp_path):
    refused(lambda: read_images(tmp_path), "no data_batch_1.bin", "binary version")

"""Pictures by class in folders and zips: found, decoded when asked for, refused where they are hostile or unfit."""

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ftso_fast import DataError, Genotype, evaluate, folders, search
from ftso_fast.image_set import image_set
from ftso_fast.readers import read_images

RNG = np.random.default_rng(0)


def picture(mode="RGB", size=(16, 16), seed=0, kind="PNG"):
    shape = size[::-1] if mode == "L" else (*size[::-1], len(mode))
    data = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(data, kind)
    return data.getvalue()


def names():
    for split, n in (("train", 3), ("val", 2)):
        for label in ("b", "a"):
            yield from (f"{split}/{label}/{i}.png" for i in range(n))


FILES = {name: picture(seed=i) for i, name in enumerate(names())}


@pytest.fixture(params=["folder", "zip"])
def laid_out(request, tmp_path):
    """laid_out(files): a folder, or a zip, that holds them."""

    def lay_out(files):
        if request.param == "zip":
            with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
                for name, data in files.items():
                    archive.writestr(name, data)
            return tmp_path / "x.zip"
        for name, data in files.items():
            path = tmp_path / "x" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return tmp_path / "x"

    return lay_out


def pixels(name):
    return np.asarray(Image.open(io.BytesIO(FILES[name])))


def test_pictures_by_class(laid_out):
    path = laid_out(FILES | {"README.txt": b"no picture"})
    train, test = image_set(path), image_set(path, split="test")
    assert (len(train), len(test), train.classes, train.shape) == (6, 4, 2, (3, 16, 16))
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(train.x[np.array([4, 0])], [pixels("train/b/1.png"), pixels("train/a/0.png")])
    assert read_images(path).classes == ("a", "b")
    assert np.array_equal(np.asarray(read_images(path, split="test").x)[3], pixels("val/b/1.png"))


def test_a_folder_around_them(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, data in FILES.items():
            archive.writestr(f"around/{name}", data)
    assert len(image_set(tmp_path / "x.zip")) == 6


def test_classes_alone(laid_out):
    path = laid_out({f"{c}/{i}.JPEG": picture(seed=i, kind="JPEG") for c in "xyz" for i in range(2)})
    assert (len(image_set(path)), image_set(path).classes) == (6, 3)
    with pytest.raises(DataError, match="has no folder val or test with pictures: give --test or --validation"):
        image_set(path, split="test")


def test_grey_and_transparent_pictures_become_rgb(laid_out):
    found = image_set(laid_out({"a/0.png": picture("L"), "b/0.png": picture("RGBA"), "b/1.png": picture()}))
    grey = found.x[np.array([0])][0]
    assert grey.shape == (16, 16, 3)
    assert np.array_equal(grey[..., 0], grey[..., 2])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a/0.png": picture(), "b/0.png": b"nothing"}, "b/0.png: is not a picture that can be read"),
        ({"a/0.png": picture(), "b/0.png": picture()[:200]}, "b/0.png: cannot be read"),
        ({"a/0.png": picture(), "b/0.png": picture(size=(20, 16))}, "b/0.png: is 20x16, others are 16x16: resize"),
        ({"a/0.png": picture()}, "holds pictures of 1 classes for train"),
        ({"a/0.png": picture(size=(18, 16)), "b/0.png": picture(size=(18, 16))}, "must be divisible by 4"),
    ],
)
def test_unfit_pictures(laid_out, files, message):
    with pytest.raises(DataError, match=message):
        np.asarray(image_set(laid_out(files)).x)


@pytest.mark.parametrize("name", ["/a/0.png", "../a/0.png", "a/../../b/0.png", "c:\\a\\0.png/x.png"])
def test_names_that_lead_elsewhere(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for n in ("a/0.png", "b/0.png", name):
            archive.writestr(n, picture())
    with pytest.raises(DataError, match=r"leads elsewhere"):
        image_set(tmp_path / "x.zip")


def test_bombs(tmp_path, monkeypatch, laid_out):
    path = laid_out({"a/0.png": picture(size=(40, 40)), "b/0.png": picture(size=(40, 40))})
    monkeypatch.setattr(folders, "MAX_PIXELS", 1000)
    with pytest.raises(DataError, match="40x40 pixels are too many"):
        image_set(path)
    monkeypatch.undo()
    monkeypatch.setattr(folders, "MAX_FILE", 100)
    with pytest.raises(DataError, match="larger than 100 bytes"):
        image_set(path)
    monkeypatch.undo()
    monkeypatch.setattr(folders, "MAX_BYTES", 100)
    with pytest.raises(DataError, match="bytes, more than 100: give fewer"):
        np.asarray(image_set(path).x)
    monkeypatch.undo()
    monkeypatch.setattr(folders, "MAX_PICTURES", 1)
    with pytest.raises(DataError, match="2 pictures are more than 1"):
        image_set(path)


def photographs():
    folder = os.environ.get("FTSO_DATA")
    path = Path(folder, "imagenette224_400_100.zip") if folder else None
    return path if path and path.exists() else None


def test_search_and_evaluation_of_photographs(tmp_path):
    """ImageNet's stem on 224x224: FTSO_DATA's photographs where they are, else drawn ones."""
    path = photographs()
    if path is None:
        path = tmp_path / "x.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for i, name in enumerate(f"{s}/{c}/{i}.png" for s in ("train", "val") for c in "abc" for i in range(4)):
                archive.writestr(name, picture(size=(224, 224), seed=i))
    data = image_set(path)
    topology = ((0, 1),) * 4
    genotype = Genotype.from_topology(topology, topology, "sep_conv_3x3")
    result = evaluate(
        genotype, data.fraction(0.1), image_set(path, split="test").fraction(0.1), "imagenet250",
        channels=4, cells=3, epochs=1, batch_size=8, lr=0.1, out=tmp_path / "run", workers=2,
    )  # fmt: skip
    assert result.recipe.stem == "imagenet"
    assert result.train_images == len(data.fraction(0.1))
    assert 0 <= result.eval_accuracy_last <= 1
    assert (tmp_path / "run" / "curve.svg").exists()


def test_search_reads_pictures(laid_out, run):
    files = {f"{c}/{i}.png": picture(seed=i) for c in "abc" for i in range(8)}
    path = str(laid_out(files))
    assert search(path, "1it").data.images == 24
    assert search(image_set(path).fraction(0.5), "1it").data.images == 12
    code, out, _ = run("search", "--data", path, "--fraction", "0.5", "--json")
    assert code == 0
    assert json.loads(out)["data"]["images"] == 12
    assert run("search", "--data", path, "--fraction", "2")[0] == 2

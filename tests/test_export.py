"""Trained networks for other tools: what is read back computes the same; what is damaged or foreign is refused."""

import json
import os

import numpy as np
import pytest
import torch

from ftso_fast import DataError, Network, UsageError, evaluate
from ftso_fast import export as export_module
from ftso_fast.export import export, load
from ftso_fast.published import PUBLISHED

LONG = os.environ.get("FTSO_EXPORT") == "long"
"""pt2 and ONNX for all published genotypes: a few seconds each."""
TRACED = sorted(PUBLISHED) if LONG else ["AmoebaNet", "PDARTS"]


def trained(name="PC_DARTS_cifar", **more):
    """A network whose batch norms have seen images."""
    torch.manual_seed(0)
    net = Network(PUBLISHED[name], **{"channels": 4, "cells": 3, "classes": 5, "auxiliary": True} | more)
    size = 32 if net.divisor == 4 else 224
    for _ in range(3):
        net(torch.randn(4, net.in_channels, size, size))
    return net


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_safetensors(name, tmp_path):
    net = trained(name)
    assert export(net, tmp_path / "net.safetensors") <= 1e-5
    back, x = load(tmp_path / "net.safetensors"), torch.randn(2, 3, 32, 32)
    net.eval()
    with torch.no_grad():
        assert torch.equal(back(x), net(x))
    assert back.genotype == PUBLISHED[name]
    assert not back.training


@pytest.mark.parametrize("name", TRACED)
def test_pt2(name, tmp_path):
    assert export(trained(name), tmp_path / "net.pt2") <= 1e-5
    program = torch.export.load(tmp_path / "net.pt2")
    assert not [n for n in program.graph.nodes if "ftso" in str(n.target)]


def test_every_published_operator_is_traced():
    def operators(names):
        return {op for name in names for op, _ in (*PUBLISHED[name].normal, *PUBLISHED[name].reduce)}

    assert operators(TRACED) == operators(PUBLISHED)


@pytest.mark.parametrize("name", sorted(PUBLISHED) if LONG else ["NASNet"])
def test_onnx(name, tmp_path):
    import onnxruntime

    net = trained(name)
    assert export(net, tmp_path / "net.onnx") <= 1e-5
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    x = torch.randn(7, 3, 32, 32)
    net.eval()
    with torch.no_grad():
        want = net(x).numpy()
    (got,) = session.run(None, {"images": x.numpy()})
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max() + 1e-6


def test_imagenets_stem(tmp_path):
    net = trained(stem="imagenet", channels=2)
    assert export(net, tmp_path / "net.pt2") <= 1e-5
    assert export(net, tmp_path / "net.safetensors", size=64) <= 1e-5


def test_from_an_evaluation_by_the_command(tmp_path, run):
    rng = np.random.default_rng(0)
    X, Y = rng.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8), np.arange(40) % 4
    evaluate(
        PUBLISHED["PDARTS"], (X, Y), validation=0.5, recipe="smoke", channels=2, cells=3, epochs=1, batch_size=10,
        out=tmp_path / "run",
    )  # fmt: skip
    code, out, err = run("export", tmp_path / "run", "--to", tmp_path / "a.safetensors", "--to", tmp_path / "a.pt2")
    assert (code, err) == (0, "")
    assert out.count("logits on random images within") == 2
    told = json.loads((tmp_path / "a.json").read_text())
    assert (told["in_channels"], told["classes"], told["schema"]) == (1, 4, "ftso.network/1")
    assert run("export", tmp_path / "run", "--to", "a.pth")[0] == 2
    assert run("export", tmp_path, "--to", tmp_path / "a.pt2")[0] == 3


def test_a_file_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "load", lambda path: trained("PDARTS").eval())
    with pytest.raises(DataError, match="computes something else than the network"):
        export(trained(), tmp_path / "net.safetensors")


@pytest.mark.parametrize("fault", ["weights", "json", "absent", "other", "schema"])
def test_what_is_not_what_was_written(tmp_path, fault):
    path, beside = tmp_path / "net.safetensors", tmp_path / "net.json"
    export(trained(), path)
    told = json.loads(beside.read_text())
    if fault == "weights":
        data = bytearray(path.read_bytes())
        data[-9] ^= 4
        path.write_bytes(data)
    elif fault == "json":
        beside.write_text("{")
    elif fault == "absent":
        beside.unlink()
    elif fault == "other":
        beside.write_text(json.dumps(told | {"channels": 6}))
    else:
        beside.write_text(json.dumps(told | {"schema": "x"}))
    with pytest.raises(DataError, match=r"net\.(safetensors|json)"):
        load(path)


@pytest.mark.parametrize(
    ("path", "size", "message"),
    [("net.pt", None, "path: expected a name that ends in"), ("net.pt2", 30, "size: expected a multiple of 4, got 30")],
)
def test_wrong_calls(tmp_path, path, size, message):
    with pytest.raises(UsageError, match=message):
        export(trained(), tmp_path / path, size)

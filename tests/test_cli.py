"""The command: exit codes, one sentence on stderr, results alone on stdout."""

import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import every_isa

from ftso_fast import Genotype, NumericalError, kernels
from ftso_fast.published import PUBLISHED

search_module = importlib.import_module("ftso_fast.search")

GENOTYPE = (
    "Genotype(normal=[('sep_conv_3x3', 0), ('skip_connect', 1)], normal_concat=[2], "
    "reduce=[('max_pool_3x3', 1), ('sep_conv_3x3', 0)], reduce_concat=[2])"
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def images(tmp_path):
    """An npz file of 16 images of 8x8."""
    path = tmp_path / "images.npz"
    g = np.random.default_rng(0)
    np.savez(path, x_train=g.integers(0, 256, (16, 8, 8, 3), dtype=np.uint8), y_train=np.arange(16) % 4)
    return str(path)


def process(*argv, **env):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FTSO_")}
    env = inherited | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run(
        [sys.executable, "-m", "ftso_fast", *argv], env=env, capture_output=True, text=True, timeout=60
    )


def one_sentence(err):
    """The one line that a failure may print, without the command's name."""
    assert "Traceback" not in err
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    name, _, sentence = lines[0].partition(": ")
    assert name == "ftso"
    assert 20 < len(sentence) < 500
    return sentence


def fails(result, code, *words):
    found, out, err = result
    sentence = one_sentence(err)
    assert (found, out) == (code, ""), sentence
    for word in words:
        assert word in sentence


# -- search


def test_text(run, images):
    code, out, err = run("search", "--data", images)
    assert code == 0
    assert err == ""
    assert out.startswith("Topology found in 1 iteration,")
    assert Genotype.read(out.strip().splitlines()[-1]).normal_concat == (2, 3, 4, 5)
    assert "images.npz, 16 images of 3x8x8, 4 classes" in out


def test_json_is_all_there_is_on_stdout(run, images):
    options = ["--mode", "2it", "--seed", 7, "--k", 2, "--replace", "dil_conv_3x3", "--classes", 6]
    code, out, err = run("search", "--data", images, *options, "--json")
    assert (code, err) == (0, "")
    fields = json.loads(out)
    assert fields["schema"] == "ftso.search/1"
    assert {"genotype", "mode", "seed", "backend", "isa", "iterations", "seconds", "margins"} <= set(fields)
    assert [fields[name] for name in ("mode", "seed", "k", "replace", "iterations")] == ["2it", 7, 2, "dil_conv_3x3", 2]
    assert fields["data"]["classes"] == 6
    assert {op for op, _ in fields["genotype"]["normal"]} == {"dil_conv_3x3"}


def test_out_writes_three_files(run, images, tmp_path):
    folder = tmp_path / "new" / "folder"
    code, out, err = run("search", "--data", images, "--json", "--out", folder)
    assert code == 0
    assert str(folder / "cells.svg") in one_line(err)
    assert {path.name for path in folder.iterdir()} == {"cells.svg", "genotype.json", "result.json"}
    assert json.loads((folder / "result.json").read_text()) == json.loads(out)
    genotype = Genotype.read((folder / "genotype.json").read_text())
    assert genotype == Genotype.from_dict(json.loads(out)["genotype"])
    assert (folder / "cells.svg").read_text().startswith("<svg")


def one_line(text):
    assert len(text.splitlines()) == 1
    return text.strip()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_backend_by_name(run, images, backend):
    _, out, _ = run("search", "--data", images, "--json", "--backend", backend)
    assert json.loads(out)["backend"] == backend


def test_presets(run, images):
    _, out, _ = run("search", "--data", images, "--json", "--preset", "cifar10-batch64")
    assert json.loads(out)["config"]["batch_size"] == 64
    _, out, _ = run("search", "--data", images, "--json", "--preset", "imagenet")
    assert json.loads(out)["config"]["arch_lr"] == 6e-3


def test_threads(images):
    done = process("search", "--data", images, "--threads", "1", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["iterations"] == 1


def test_progress_goes_to_a_terminal_on_stderr(images):
    terminal, its_end = os.openpty()
    command = [sys.executable, "-m", "ftso_fast", "search", "--data", images, "--mode", "3it", "--json"]
    env = os.environ | {"TERM": "xterm", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=its_end) as running:
        os.close(its_end)
        shown = b""
        try:
            while part := os.read(terminal, 4096):
                shown += part
        except OSError:  # how Linux says that the other end is closed
            pass
        out = running.stdout.read()
    os.close(terminal)
    assert running.returncode == 0
    assert b"search" in shown
    assert b"100%" in shown
    assert json.loads(out)["iterations"] == 3


def test_digits_by_the_installed_command():
    command = os.path.join(os.path.dirname(sys.executable), "ftso")
    options = ["search", "--data", "digits", "--preset", "cifar10-batch64"]
    done = subprocess.run([command, *options], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Data: digits, 1437 images of 3x32x32, 10 classes" in done.stdout


# -- what is wrong in the call


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mode", "soon"], ["mode: expected 'Nit' or 'Nep'", "got 'soon'"]),
        (["--mode", "0it"], ["mode: expected 'Nit' or 'Nep'", "got '0it'"]),
        (["--replace", "conv_9x9"], ["replace: expected one of", "sep_conv_3x3", "got 'conv_9x9'"]),
        (["--backend", "gpu"], ["backend: expected one of cuda, triton, cpu, reference, got 'gpu'"]),
        (["--k", "3"], ["k: expected a divisor of the 16 channels", "got 3"]),
        (["--k", "0"], ["k: expected a positive whole number, got 0"]),
        (["--preset", "mnist"], ["preset: expected one of cifar10, cifar10-batch64, imagenet, got 'mnist'"]),
        (["--threads", "0"], ["threads: expected a positive number, got 0"]),
        (["--threads", "-2"], ["threads: expected a positive number, got -2"]),
    ],
)
def test_bad_option(run, images, options, words):
    fails(run("search", "--data", images, *options), 2, *words)


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("fly",),
        ("search",),
        ("search", "--data", "digits", "--seed", "one"),
        ("search", "--data", "digits", "--loud"),
        ("draw",),
    ],
)
def test_the_parser_refuses(run, argv):
    code, out, err = run(*argv)
    assert (code, out) == (2, "")
    assert err.startswith("usage: ftso")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("variable", "words"),
    [("FTSO_BACKEND", "expected one of cuda, triton, cpu, reference"), ("FTSO_ISA", "expected one of")],
)
@pytest.mark.parametrize("command", ["search", "info"])
def test_a_bogus_variable(images, variable, words, command):
    options = ["--data", images] if command == "search" else []
    done = process(command, *options, **{variable: "abacus"})
    fails((done.returncode, done.stdout, done.stderr), 2, f"{variable}: {words}", "got 'abacus'")


# -- what is wrong in the data

X = np.zeros((8, 8, 8, 3), np.uint8)
Y = np.arange(8) % 2


def write_truncated(path):
    np.savez(path, x_train=X, y_train=Y)
    path.write_bytes(path.read_bytes()[:-300])


def write_objects(path):
    np.savez(path, x_train=np.array([{"a": 1}, None], dtype=object), y_train=Y[:2])


BAD_FILES = {
    "truncated": (write_truncated, "truncated one: write it again"),
    "text": (lambda path: path.write_text("x_train, y_train"), "is not an .npz archive"),
    "empty": (lambda path: path.write_bytes(b""), "is not an .npz archive"),
    "objects": (write_objects, "holds Python objects, which are never unpickled"),
    "unequal": (lambda path: np.savez(path, x_train=X, y_train=Y[:5]), "has 8 images but y_train has 5 labels"),
    "keys": (lambda path: np.savez(path, images=X, labels=Y), "has no x_train and no y_train"),
    "size": (lambda path: np.savez(path, x_train=X[:, :6], y_train=Y), "height 6 and width 8"),
    "labels": (lambda path: np.savez(path, x_train=X, y_train=Y - 1), "label -1 is negative"),
    "one class": (lambda path: np.savez(path, x_train=X, y_train=0 * Y), "a search needs at least 2"),
    "two images": (lambda path: np.savez(path, x_train=X[:2], y_train=Y[:2]), "a search needs at least 4"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file(run, tmp_path, name):
    write, words = BAD_FILES[name]
    path = tmp_path / "data.npz"
    write(path)
    fails(run("search", "--data", path), 3, words)


def test_no_such_file_and_an_empty_folder(run, tmp_path):
    fails(run("search", "--data", tmp_path / "none.npz"), 3, "no such file or folder")
    fails(run("search", "--data", tmp_path), 3, "has no data_batch_1.bin", "CIFAR-10's binary version")


def test_labels_beyond_the_classes(run, images):
    fails(run("search", "--data", images, "--classes", 3), 3, "label 3 is outside 0..2: pass classes=4")
    fails(run("search", "--data", images, "--classes", 1), 3, "classes=1: a search needs at least 2 classes")


# -- what goes wrong on the way


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (NumericalError("the loss is not finite; lower the learning rate"), 5, "the loss is not finite"),
        (MemoryError("tried 8 GB"), 4, "out of memory (tried 8 GB): use a smaller batch"),
        (PermissionError(13, "Permission denied"), 1, "Permission denied"),
    ],
)
def test_exit_codes(run, images, monkeypatch, error, code, words):
    def broken(*args, **options):
        raise error

    monkeypatch.setattr(search_module, "search", broken)
    found, out, err = run("search", "--data", images)
    assert (found, out) == (code, "")
    assert words in one_line(err)
    assert err.startswith("ftso: ")


def test_an_error_of_our_own_is_not_hidden(run, images, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(search_module, "search", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run("search", "--data", images)


def test_out_that_is_a_file(run, images, tmp_path):
    code, out, err = run("search", "--data", images, "--out", images)
    assert (code, out) == (1, "")
    assert "images.npz" in one_sentence(err)


@pytest.mark.parametrize(
    ("command", "unbuffered"), [(["info"], ""), (["info"], "1"), (["draw", GENOTYPE], "1"), (["--help"], "")]
)
def test_a_reader_that_has_left_sees_no_traceback(command, unbuffered):
    """stdout is a pipe that nobody reads any more, as after `| head -0`."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ftso_fast", *command],
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    finally:
        os.close(writer)
    assert done.stderr == ""


@pytest.mark.parametrize("argv", [["--help"], ["search", "--help"], ["draw", "--help"], ["info", "--help"]])
def test_help(run, argv):
    code, out, err = run(*argv)
    assert (code, err) == (0, "")
    assert out.startswith("usage: ftso")
    if argv[0] == "search":
        for option in ("--data", "--mode", "--seed", "--k", "--replace", "--backend", "--json", "--out", "--threads"):
            assert option in out


# -- draw and info


def test_draw(run, tmp_path):
    code, out, err = run("draw", GENOTYPE)
    assert (code, err) == (0, "")
    assert out.startswith("<svg")
    target = tmp_path / "cell.svg"
    assert run("draw", GENOTYPE, "--out", target) == (0, "", "")
    assert target.read_text() + "\n" == out
    for content in (GENOTYPE, Genotype.read(GENOTYPE).to_json()):
        source = tmp_path / "genotype.txt"
        source.write_text(content)
        assert run("draw", source) == (0, out, "")
    assert run("draw", Genotype.read(GENOTYPE).to_json()) == (0, out, "")
    assert run("draw", "PDARTS")[1] == run("draw", repr(PUBLISHED["PDARTS"]))[1] != out
    _, titled, _ = run("draw", GENOTYPE, "--title", "A & B")
    assert "A &amp; B" in titled


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Genotype(", "genotype text: expected Genotype(normal=[...]"),
        ("__import__('os').system('true')", "genotype text: expected"),
        (GENOTYPE.replace("skip_connect", "fly"), "operator of normal[1]: expected one of none"),
        (GENOTYPE.replace("'sep_conv_3x3', 0", "'sep_conv_3x3', 5"), "expected a state from 0 to 1, got 5"),
        ('{"schema": "other"}', "genotype JSON: expected an object with schema 'ftso.genotype/1'"),
        ("{", "genotype JSON: expected an object"),
    ],
)
def test_bad_genotype(run, text, words):
    fails(run("draw", text), 2, words)


def test_draw_of_a_missing_file_or_into_a_missing_folder(run, tmp_path):
    fails(run("draw", tmp_path / "none.txt"), 3, "is neither a genotype nor a file that can be read")
    fails(run("draw", "a\0b"), 3, "is neither a genotype nor a file that can be read")
    code, out, err = run("draw", GENOTYPE, "--out", tmp_path / "none" / "cell.svg")
    assert (code, out) == (1, "")
    assert "No such file" in one_sentence(err)
    binary = tmp_path / "binary"
    binary.write_bytes(bytes(range(256)))
    fails(run("draw", binary), 2, "genotype")


@every_isa
def test_info(run, isa, monkeypatch):
    code, out, err = run("info")
    assert (code, err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in out.replace("backend ", "backend_").splitlines())
    assert lines["backend_cpu"].strip() == "ready"
    assert lines["backend_reference"].strip() == "ready"
    assert lines["backend_in"].split(maxsplit=1)[1] == "cpu (the fastest that can)"
    monkeypatch.setenv("FTSO_BACKEND", "reference")
    assert "reference (FTSO_BACKEND)" in run("info")[1]
    found = next(line for line in out.splitlines() if line.startswith("instruction sets"))
    assert found.endswith(f"{', '.join(kernels.available_isas())}; in use: {isa}")
    for name in ("ftso_fast", "python", "torch", "threads"):
        assert name in lines


def test_info_without_the_core():
    code = "import sys; sys.modules['ftso_fast._C'] = None; from ftso_fast.cli import main; sys.exit(main(['info']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "backend cpu        the compiled core ftso_fast._C is not there" in done.stdout
    assert "backend in use     reference (the fastest that can)" in done.stdout

"""The search: repetition, kernels, data, the result, real images; nothing falls back in silence."""

import dataclasses
import gc
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import every_isa, machine_isas
from searching import NORMAL_CELLS, SMALL, Run, arrays, batches, document, small
from torch.utils.data import DataLoader, TensorDataset

from ftso_fast import DataError, NumericalError, UsageError, kernels
from ftso_fast.search import earlier_objects_left_alone

pytestmark = pytest.mark.usefixtures("one_thread")


# -- repetition


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_repetition_gives_the_same_bytes(backend):
    results = [small(mode="1ep", backend=backend) for _ in range(2)]
    assert document(results[0]) == document(results[1])
    fields = results[0].to_dict()["betas"]
    for cell in ("normal", "reduce"):
        for name in ("before", "after", "gradient"):
            row = fields[cell][name]
            assert [float.fromhex(text) for text in row["hex"]] == list(row["values"])
            assert len(row["values"]) == 14
            assert all(math.isfinite(value) for value in row["values"])


def test_seeds_differ():
    first, second = small(seed=0), small(seed=1)
    assert first.betas["normal"].before != second.betas["normal"].before
    assert first.betas["normal"].gradient != second.betas["normal"].gradient
    assert document(first) != document(second)


def on_threads(n, **options):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        return small(arrays(64, 16), "2it", **options)
    finally:
        torch.set_num_threads(before)


def test_the_number_of_threads_changes_no_byte():
    one, *others = (document(on_threads(n, backend="cpu")) for n in (1, 2, 3, 5))
    assert all(other == one for other in others)


def test_the_number_of_threads_changes_the_rounding_of_the_reference_only():
    """torch's own batch norm and products do not promise the same bytes."""
    one, two = (on_threads(n, backend="reference").betas for n in (1, 2))
    for cell in ("normal", "reduce"):
        assert one[cell].before == two[cell].before
        largest = max(map(abs, one[cell].gradient))
        assert one[cell].gradient == pytest.approx(two[cell].gradient, abs=1e-3 * largest)


def test_global_generators_and_switches_are_left_alone():
    torch.manual_seed(5)
    np.random.seed(5)
    state = torch.get_rng_state()
    small(mode="2it")
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.randint(1 << 30) == np.random.RandomState(5).randint(1 << 30)
    assert torch.is_grad_enabled()
    assert kernels.requested() is None
    first = document(small())
    torch.manual_seed(6)
    assert document(small()) == first


def test_the_garbage_collector_goes_on_as_it_was():
    seen = []
    small(mode="2it", progress=lambda done, total: seen.append(gc.get_freeze_count() > 0))
    assert seen == [True, True]
    assert gc.get_freeze_count() == 0
    with pytest.raises(UsageError):
        small(shards=0)
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        before = gc.get_freeze_count()
        small()
        assert gc.get_freeze_count() > before / 2  # the caller's own stay
    finally:
        gc.unfreeze()
    with earlier_objects_left_alone():
        before = gc.get_freeze_count()
        with pytest.MonkeyPatch.context() as patch:  # to count them is to go through them
            patch.setattr(gc, "get_freeze_count", lambda: pytest.fail("objects were counted"))
            small()
        assert gc.get_freeze_count() > before / 2
    assert gc.get_freeze_count() == 0


# -- kernels


@pytest.mark.parametrize("backend", [None, "cpu"])
@every_isa
def test_kernel_calls_are_counted(isa, backend):
    result = small(mode="3it", backend=backend)
    steps = result.iterations + result.weight_steps
    assert steps == 5
    each = {"stem": 1, "stem_covariance": 1, "cell": NORMAL_CELLS, "reduce": 2, "reduce_paths": 2}
    wanted = {f"{stage}_{way}/{isa}": n * steps for stage, n in each.items() for way in ("fwd", "bwd")}
    wanted[f"stem_covariance/{isa}"] = wanted.pop(f"stem_covariance_fwd/{isa}")
    del wanted[f"stem_covariance_bwd/{isa}"]
    wanted[f"stem_bwd/{isa}"] = result.weight_steps
    assert result.kernel_calls == wanted
    assert (result.backend, result.isa) == ("cpu", isa)


@pytest.mark.parametrize("backend", [None, "cpu"])
def test_a_broken_kernel_fails_the_search(backend, wrap_net):
    def broken(net, *arguments):
        raise RuntimeError("broken on purpose")

    wrap_net(loss_and_gradient=broken)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        small(backend=backend)
    assert small(backend="reference").backend == "reference"


def test_a_kernel_that_computes_nonsense_shows(wrap_net):
    """The compiled network's values reach the answer: with the cell types' gradients exchanged, it is another."""
    usual = small(backend="cpu")
    wrap_net(loss_and_gradient=lambda net, *a: net.loss_and_gradient(*a[:4], a[5], a[4], a[6]))
    assert small(backend="cpu").betas["normal"].gradient != usual.betas["normal"].gradient


@pytest.mark.parametrize("seed", [0, 1])
def test_backends_agree(seed):
    cpu, reference = (small(arrays(64, 16), seed=seed, backend=name, batch_size=32) for name in ("cpu", "reference"))
    assert (reference.backend, reference.isa, reference.kernel_calls) == ("reference", None, {})
    assert cpu.backend == "cpu"
    clear = 0
    for cell in ("normal", "reduce"):
        ours, theirs = cpu.betas[cell], reference.betas[cell]
        assert ours.before == theirs.before
        for node, (a, b) in enumerate(((0, 2), (2, 5), (5, 9), (9, 14))):
            largest = max(map(abs, theirs.gradient[a:b]))
            assert ours.gradient[a:b] == pytest.approx(theirs.gradient[a:b], abs=1e-3 * largest)
            if min(map(abs, theirs.gradient[a:b])) > 2e-3 * largest:  # no sign can differ
                clear += 1
                assert cpu.topology[cell][node] == reference.topology[cell][node]
    assert clear >= 6


def test_environment_chooses_the_backend(monkeypatch):
    monkeypatch.setenv("FTSO_BACKEND", "reference")
    assert small().backend == "reference"
    assert small(backend="cpu").backend == "cpu"
    monkeypatch.setenv("FTSO_BACKEND", "gpu")
    with pytest.raises(UsageError, match="FTSO_BACKEND: expected one of cuda, triton, cpu, reference, got 'gpu'"):
        small()


HEAD = """
import sys
import numpy as np
"""
TAIL = """
import ftso_fast
x = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
def small(**options):
    config = ftso_fast.SearchConfig(cells=3, channels=4, batch_size=4)
    return ftso_fast.search((x, np.arange(16) % 2), "2it", config=config, **options)
"""


def python(code, *arguments, **env):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FTSO_")}
    env = inherited | {"OMP_NUM_THREADS": "1"} | env
    return subprocess.run([sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, timeout=60)


def test_environment_chooses_the_instruction_set():
    """In a child for each, which is the first to look at the variable: torch is imported once."""
    code = """
import os, sys
import numpy as np
import torch
for isa in sys.argv[1:]:
    if not os.fork():
        os.environ["FTSO_ISA"] = isa"""
    body = (
        TAIL.replace("\n", "\n        ")
        + """
        result = small()
        print(result.isa, *result.kernel_calls, flush=True)
        os._exit(0)
    os.wait()
"""
    )
    done = python(code + body, *machine_isas())
    assert done.returncode == 0, done.stderr
    for isa, line in zip(machine_isas(), done.stdout.splitlines(), strict=True):
        ran, *names = line.split()
        assert ran == isa
        assert f"cell_bwd/{isa}" in names
        assert all(name.endswith(f"/{isa}") for name in names)


def test_an_unknown_instruction_set_is_refused():
    code = HEAD + TAIL + "\ntry:\n    small()\nexcept ftso_fast.UsageError as error:\n    print(error)"
    done = python(code, FTSO_ISA="mmx")
    assert done.stdout.startswith("FTSO_ISA: expected one of "), done.stderr
    assert done.stdout.rstrip().endswith("got 'mmx'")


def test_without_the_compiled_core():
    code = (
        HEAD
        + 'sys.modules["ftso_fast._C"] = None'
        + TAIL
        + """
result = small()
print(result.backend, result.isa, result.kernel_calls, ftso_fast.kernels.backends()["reference"])
try:
    small(backend="cpu")
except ftso_fast.UsageError as error:
    print(error)
"""
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "running on the slower reference path: the compiled core ftso_fast._C is not there" in done.stderr
    first, second = done.stdout.splitlines()
    assert first == "reference None {} None"
    assert second.startswith("backend 'cpu': the compiled core ftso_fast._C is not there")
    assert "install with a C++17 compiler" in second


def test_a_search_imports_no_compiler():
    """torch._dynamo and triton take longer to import than a one-iteration search takes."""
    code = HEAD + TAIL + "small(); print(*sorted(sys.modules))"
    done = python(code)
    assert done.returncode == 0, done.stderr
    modules = done.stdout.split()
    assert "torch" in modules
    heavy = (
        "torch._dynamo",
        "torch._inductor",
        "triton",
        "ftso_fast._cuda",
        "sklearn",
        "scipy",
        "rich",
        "sympy",
        "torchvision",
    )
    assert not [m for m in modules if m in heavy]


# -- data


def data_of_every_kind():
    x, y = arrays(16)
    tensors = torch.from_numpy(x).permute(0, 3, 1, 2).float() / 64 - 2, torch.from_numpy(y)
    dataset = TensorDataset(*tensors)
    return {
        "uint8 arrays": lambda: (x, y),
        "float tensors": lambda: tensors,
        "data set": lambda: dataset,
        "data loader": lambda: DataLoader(dataset, batch_size=4, shuffle=True),
        "two data loaders": lambda: (DataLoader(dataset, batch_size=4), DataLoader(dataset, batch_size=8)),
        "list of batches": lambda: batches(4),
        "generator": lambda: iter(batches(4)),
    }


@pytest.mark.parametrize("kind", data_of_every_kind())
def test_every_kind_of_data(kind):
    result = small(data_of_every_kind()[kind](), "2it")
    assert result.iterations == 2
    assert result.data.classes in (2, 4)
    assert result.data.shape == (3, 8, 8)
    assert result.to_dict()["data"]["source"] == result.data.source


def test_grey_images():
    result = small(arrays(channels=1))
    assert result.data.shape == (1, 8, 8)


@pytest.mark.parametrize("k", [1, 2, 8])
def test_other_parts_of_the_channels(k):
    assert small(k=k, channels=16).to_dict()["k"] == k


def spoiled(at, **changes):
    found = batches(4)
    images, labels = found[at]
    found[at] = (changes.get("images", images), changes.get("labels", labels))
    return found


NAN = torch.full((4, 3, 8, 8), math.nan)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (spoiled(0, images=NAN), "batch 0: images hold NaN or infinity: clean the data or check the normalisation"),
        (spoiled(2, images=NAN), "batch 2: images hold NaN"),
        (spoiled(1, labels=torch.tensor([0, 1, 7, 1])), r"batch 1: label 7 is outside 0\.\.1: pass classes=8"),
        (spoiled(0, labels=torch.tensor([0, 1, -1, 1])), "batch 0: label -1 is negative"),
        (spoiled(2, images=torch.zeros(4, 3, 12, 8)), "batch 2: images of shape .* follow images of shape"),
        (spoiled(0, images=torch.zeros(4, 3, 10, 8)), "height 10 and width 8 .* must be divisible by 4"),
        ([(torch.zeros(1, 3, 8, 8), torch.zeros(1))], "batch 0: a batch needs at least 2 images, got 1"),
        ([], "batches: is empty: give at least one batch"),
        (iter(batches(3)), "the data ended after 1 of 2 iterations: give more batches or search fewer"),
    ],
)
def test_bad_data(data, message):
    with pytest.raises(DataError, match=message):
        small(data, "2it", final_weight_step=True)


def test_data_that_end_before_the_last_epoch():
    with pytest.raises(DataError, match="the data ended after 2 of 3 iterations"):
        small((b for b in batches(4)), "3ep")


@pytest.mark.parametrize("scale", [0.0, 1e19, 1e37])
def test_images_without_a_gradient_are_a_numerical_error(scale):
    """Where the variance of a channel is beyond float32, batch norm turns every image into the same one."""
    images = [(scale * images, labels) for images, labels in batches(4)]
    message = "architecture step 1: the gradient is exactly zero.* all alike or too large .* normalise"
    with pytest.raises(NumericalError, match=message):
        small(images)


@pytest.mark.parametrize("what", ["architecture", "weight"])
def test_a_loss_that_is_not_finite_is_a_numerical_error(what, monkeypatch):
    """Only a network that is itself broken gets there: batch norm takes finite images to finite ones."""

    step = getattr(Run, f"{what}_step")

    def broken(run, batch, *rest):
        with torch.no_grad():
            run.net.classifier.bias.fill_(math.inf)
        return step(run, batch, *rest)

    monkeypatch.setattr(Run, f"{what}_step", broken)
    message = rf"{what} step 1: the loss \(nan\) or its gradient is not finite; lower the learning rate or normalise"
    with pytest.raises(NumericalError, match=message):
        small(mode="2it")


def test_weights_that_diverge_are_a_numerical_error():
    with pytest.raises(NumericalError, match=r"(architecture|weight) step \d+: the loss"):
        small(mode="20ep", weight_lr=1e30, grad_clip=None)


# -- the result


def test_the_document():
    result = small(mode="2it", seed=3)
    fields = json.loads(result.to_json())
    assert fields == json.loads(json.dumps(result.to_dict()))
    assert fields["schema"] == "ftso.search/1"
    assert set(fields["genotype"]) == {"normal", "normal_concat", "reduce", "reduce_concat"}
    assert (fields["mode"], fields["seed"], fields["iterations"]) == ("2it", 3, 2)
    assert (fields["backend"], fields["isa"]) == ("cpu", kernels.isa())
    assert {"setup", "data", "architecture", "weights", "total"} == set(fields["seconds"])
    assert 0 < sum(fields["seconds"].values()) <= 2 * fields["seconds"]["total"]
    assert fields["peak_bytes"] > 1 << 20
    assert fields["config"] == json.loads(json.dumps(dataclasses.asdict(SMALL)))
    for cell in ("normal", "reduce"):
        first, *rest = fields["margins"][cell]
        assert first is None
        assert [float.fromhex(m) for m in fields["margins_hex"][cell][1:]] == rest
        assert all(margin >= 0 for margin in rest)
    assert "\n" not in result.to_json()


def test_margins_topology_and_changed_nodes():
    result = small(mode="2ep", arch_lr=3e-3)
    changed = 0
    for cell in ("normal", "reduce"):
        betas, at = result.betas[cell], 0
        for node in range(4):
            group = betas.after[at : at + 2 + node]
            start = betas.before[at : at + 2 + node]
            at += 2 + node
            ranked = sorted(range(len(group)), key=lambda i: -group[i])
            assert result.topology[cell][node] == tuple(ranked[:2])
            if node:
                second, third = group[ranked[1]], group[ranked[2]]
                assert result.margins[cell][node] == pytest.approx((second - third) / 3e-3)
            initial = sorted(range(len(start)), key=lambda i: -start[i])[:2]
            assert (node + 2 in result.changed[cell]) == (set(initial) != set(ranked[:2]))
        changed += len(result.changed[cell])
        edges = [("sep_conv_3x3", i) for pair in result.topology[cell] for i in pair]
        assert list(getattr(result.genotype, cell)) == edges
    assert 0 < changed <= 6


def test_printed_it_tells_a_newcomer_what_was_found_and_how_far_to_trust_it():
    result = small(seed=4)
    text = str(result)
    assert len(text.splitlines()) <= 8
    assert repr(result.genotype) in text
    for part in ("1 iteration,", f"cpu/{kernels.isa()}", "seed 4", "every edge is sep_conv_3x3", "32 images of 3x8x8"):
        assert part in text
    assert "4 classes" in text
    assert f"{result.margins['normal'][3]:.1f}" in text
    changed = sum(len(result.changed[cell]) for cell in ("normal", "reduce"))
    assert f"changed {changed} of 6 free nodes from its random start" in text
    assert "cannot outweigh a start drawn with deviation 0.001, so this answer is mostly its seed" in text
    assert "mode 1ep" in text


def test_the_warning_ends_with_a_long_search():
    assert "mostly its seed" not in str(small(mode="2it", arch_lr=6e-3))


def test_the_picture(tmp_path):
    result = small()
    result.draw(tmp_path / "cells.svg")
    assert (tmp_path / "cells.svg").read_text().startswith("<svg")
    assert result._repr_svg_().startswith("<svg")


# -- real images, through the command


@pytest.fixture(scope="module")
def found(images_path):
    """The document of one iteration without options."""
    return ftso_search(images_path)


def ftso_search(images_path, *options):
    command = [sys.executable, "-m", "ftso_fast", "search", "--data", images_path, "--mode", "1it", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    fields = json.loads(done.stdout)
    assert fields.pop("seconds")["total"] > 0
    assert fields.pop("peak_bytes") > 0
    return fields


def test_real_images(images_path, found):
    assert ftso_search(images_path) == found
    normal = {name: n for name, n in found["kernel_calls"].items() if name.startswith("cell_")}
    assert normal == {f"cell_{way}/{found['isa']}": 6 for way in ("fwd", "bwd")}  # 6 normal cells, 1 step
    assert found["data"]["shape"] == [3, 32, 32]
    assert found["data"]["classes"] == 10


def test_real_images_on_the_reference_path(images_path, found):
    reference = ftso_search(images_path, "--backend", "reference")
    assert (reference["backend"], reference["isa"], reference["kernel_calls"]) == ("reference", None, {})
    for cell in ("normal", "reduce"):
        ours, theirs = (fields["betas"][cell] for fields in (found, reference))
        assert ours["before"] == theirs["before"]
        for a, b in ((0, 2), (2, 5), (5, 9), (9, 14)):
            wanted = theirs["gradient"]["values"][a:b]
            assert ours["gradient"]["values"][a:b] == pytest.approx(wanted, abs=2e-2 * max(map(abs, wanted)))


def test_peak_memory_is_the_processs_own():
    """Not that of a large parent, which getrusage hands on."""
    big = np.ones(60 * 2**20)  # 480 MiB
    done = python(HEAD + TAIL + "print(small().peak_bytes)")
    assert done.returncode == 0, done.stderr
    own = small().peak_bytes
    assert own > big.nbytes
    assert 2**25 < int(done.stdout) < big.nbytes

"""ftso selfcheck: a table, and an exit code that tells."""

import pytest
import torch
from ftso_fast.kernels import selfcheck, testing

from ftso_fast import cli

SMALL = testing.Case("skip_cell", 2, 8, 4, 3, 4), testing.Case("skip_cell", 1, 6, 3, 3, 2)


@pytest.fixture
def few_cases(monkeypatch):
    """Two cases of one operation, in place of the table's."""
    operation = testing.OPERATIONS["skip_cell"]
    changed = operation.__class__(**{**vars(operation), "cases": SMALL})
    monkeypatch.setitem(testing.OPERATIONS, "skip_cell", changed)


def test_agreement_is_exit_code_0_and_a_line(few_cases, capsys):
    assert cli.main(["selfcheck", "--op", "skip_cell"]) == 0
    out, err = capsys.readouterr()
    assert [line.split() for line in out.splitlines()[1:]] == [["skip_cell", "cpu", "2", "0"]]
    assert err == ""


def test_a_difference_is_exit_code_1_and_a_sentence(few_cases, capsys, monkeypatch):
    monkeypatch.setitem(testing.TOLERANCE, torch.float32, -1.0)
    assert cli.main(["selfcheck", "--op", "skip_cell"]) == 1
    out, err = capsys.readouterr()
    assert [line.split() for line in out.splitlines()[1:]] == [["skip_cell", "cpu", "0", "2"]]
    assert all(str(case) in err for case in SMALL)


def test_a_device_or_operation_that_is_not_there_is_exit_code_2(capsys, monkeypatch):
    monkeypatch.setattr(selfcheck.torch.cuda, "is_available", lambda: False)
    assert cli.main(["selfcheck", "--device", "cuda"]) == 2
    assert "device: 'cuda' cannot be checked" in capsys.readouterr().err
    assert cli.main(["selfcheck", "--op", "conv"]) == 2
    assert "op: expected one of skip_cell" in capsys.readouterr().err

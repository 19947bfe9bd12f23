"""The launches that docs/verification.md names are those that happen."""

import json
from pathlib import Path

from gpu_launches import launches

VERIFIED = Path(__file__).resolve().parents[2] / "docs" / "verified.json"


def test_launches_are_as_documented():
    assert launches() == json.loads(VERIFIED.read_text())["launches"]

"""At least 95% of the mutants of `cai_ray/algo` are noticed by its tests; the others are known, with a reason."""

import json
import subprocess
import sys

import pytest

from tests.mutation.mutants import mutants
from tests.mutation.run import ROOT, TESTS
from tests.mutation.survivors import SURVIVORS


@pytest.mark.full
@pytest.mark.parametrize("module", TESTS)
def test_mutants_are_noticed(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutation.run", module], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["survivors"]) == set(SURVIVORS[module])


def test_the_survivors_are_few_and_each_has_a_reason() -> None:
    assert SURVIVORS.keys() == TESTS.keys() == {p.stem for p in (ROOT / "cai_ray/algo").glob("[a-z]*.py")}
    every = 0
    for module, known in SURVIVORS.items():
        names = {name for name, _ in mutants((ROOT / f"cai_ray/algo/{module}.py").read_text("utf-8"))}
        every += len(names)
        assert known.keys() <= names
        assert all(known.values())
    assert sum(map(len, SURVIVORS.values())) <= 0.05 * every


def test_a_mutant_changes_one_thing() -> None:
    source = '''
def f(x: int = 1, mask=None):
    """1 + 1."""
    if x < 2 and mask is not None:
        raise ValueError(x + 1)
    return x.clamp(min=0.5) - mask.sum()
'''
    assert {name for name, _ in mutants(source)} == {
        "f: x: int=1, mask=None -> x: int=2, mask=None",
        "f: x < 2 and mask is not None -> x < 2 or mask is not None",
        "f: x < 2 and mask is not None -> x <= 2 and mask is not None",
        "f: x < 2 and mask is not None -> x > 2 and mask is not None",
        "f: x < 2 and mask is not None -> x < 3 and mask is not None",
        "f: x < 2 and mask is not None -> x < 2 and mask is None",
        "f: x < 2 and mask is not None -> x < 2 and ~mask is not None",
        "f: x < 2 and mask is not None -> x < 2 and torch.ones_like(mask) is not None",
        "f: return x.clamp(min=0.5) - mask.sum() -> return x.clamp(min=0.5) + mask.sum()",
        "f: return x.clamp(min=0.5) - mask.sum() -> return x.clamp(max=0.5) - mask.sum()",
        "f: return x.clamp(min=0.5) - mask.sum() -> return x.clamp(min=1.0) - mask.sum()",
        "f: return x.clamp(min=0.5) - mask.sum() -> return x.clamp(min=0.5) - mask.mean()",
        "f: return x.clamp(min=0.5) - mask.sum() -> return x.clamp(min=0.5) - (~mask).sum()",
        "f: return x.clamp(min=0.5) - mask.sum() -> return x.clamp(min=0.5) - torch.ones_like(mask).sum()",
    }

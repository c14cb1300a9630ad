"""Runs the tests of `cai_ray/algo` on mutants of one module: `python -m tests.mutation.run MODULE [PART/PARTS]`.

torch, pytest and hypothesis are imported once; each mutant is a fork, which puts the changed module in the place of its
own before a test sees it. Prints one JSON object: the mutants, and the names of those that no test noticed.
"""

import importlib.util
import json
import os
import signal
import sys
import types
from pathlib import Path

import hypothesis
import pytest
import torch
from torch.testing import assert_close  # noqa: F401  (loads what the tests will need)

from tests.mutation.mutants import mutants

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60  # for all tests on one mutant: an endless loop counts as noticed
# The fastest tests first; whoever uses a module also tests it.
TESTS = {
    "kl": ["kl", "ppo_rewards"],
    "masking": ["masking", "ppo_losses"],
    "ppo": ["ppo_rewards", "ppo_losses", "ppo_logprobs"],
    "preference": ["preference"],
    "rating": ["rating"],
    "scores": ["scores"],
}


def unnoticed(module: str, source: str) -> bool:
    """Whether all tests of a module pass with this source in its place."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(SECONDS)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        code = 99
        try:
            _install(module, source)
            files = [str(ROOT / f"tests/algo/test_{name}.py") for name in TESTS[module]]
            code = int(pytest.main(["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", *files]))
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _install(module: str, source: str) -> None:
    import cai_ray.algo

    new = types.ModuleType(f"cai_ray.algo.{module}")
    sys.modules[new.__name__] = new
    setattr(cai_ray.algo, module, new)
    exec(compile(source, f"{module}.py", "exec"), new.__dict__)


def main(module: str, part: str = "1/1") -> None:
    """Tries a module's mutants, or every n-th of them, and prints what came of it."""
    torch.set_num_threads(1)
    quick = hypothesis.settings(derandomize=True, database=None, phases=[hypothesis.Phase.generate])
    hypothesis.settings.register_profile("mutants", quick)
    hypothesis.settings.load_profile("mutants")
    file = ROOT / f"cai_ray/algo/{module}.py"
    if not unnoticed(module, file.read_text("utf-8")):
        sys.exit(f"the tests of {module} fail without any change: run tests/algo")
    number, parts = map(int, part.split("/"))
    tried = list(mutants(file.read_text("utf-8")))[number - 1 :: parts]
    survivors = [name for name, source in tried if unnoticed(module, source)]
    print(json.dumps({"mutants": len(tried), "survivors": survivors}))


if __name__ == "__main__":
    assert importlib.util.find_spec("cai_ray")
    main(*sys.argv[1:])

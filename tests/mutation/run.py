"""Runs the tests of `cai_ray/algo` on mutants of one module: `python -m tests.mutation.run MODULE [PART/PARTS]`.

torch, pytest and hypothesis are imported once. Each mutant is a fork, in which the changed module takes the place of
the true one before a test sees it. Prints one JSON object: the mutants, and the names of those that no test noticed.
"""

import json
import os
import signal
import sys
import types
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.mutation.mutants import mutants

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60  # for all tests on one mutant: an endless loop counts as noticed
# The fastest tests first; whoever uses a module also tests it.
TESTS = {
    "kl": ["kl", "gradients", "ppo_rewards"],
    "masking": ["gradients", "masking", "ppo_losses"],
    "ppo": ["gradients", "ppo_rewards", "ppo_losses", "ppo_logprobs"],
    "preference": ["gradients", "preference"],
    "rating": ["rating"],
    "scores": ["scores"],
}


def tests_pass(module: str) -> bool:
    """Runs a module's tests in this process, without a word."""
    files = [str(ROOT / f"tests/algo/test_{name}.py") for name in TESTS[module]]
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        return pytest.main(["-x", "-q", "--assert=plain", "-p", "no:cacheprovider", *files]) == 0


def unnoticed(module: str, source: str) -> bool:
    """Whether all tests of a module pass with this source in its place."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(SECONDS)
        code = 1
        try:
            _install(module, source)
            code = int(not tests_pass(module))
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
    if not tests_pass(module):
        sys.exit(f"the tests of {module} fail without any change: run tests/algo")
    for name in [name for name in sys.modules if name.startswith(("cai_ray.algo", "tests.algo"))]:
        del sys.modules[name]  # what they imported stays: it need not be loaded again
    source = (ROOT / f"cai_ray/algo/{module}.py").read_text("utf-8")
    assert unnoticed(module, source), "a fork with the true module fails"
    number, parts = map(int, part.split("/"))
    tried = list(mutants(source))[number - 1 :: parts]
    survivors = [name for name, changed in tried if unnoticed(module, changed())]
    print(json.dumps({"mutants": len(tried), "survivors": survivors}))


if __name__ == "__main__":
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    main(*sys.argv[1:])

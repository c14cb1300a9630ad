"""The peers' own packages, which `launch/test.sh` puts in a folder of their own: only these tests see them."""

import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

PEERS = Path(sys.prefix) / "peers"
# What OpenRLHF and TRL import on the way to a handful of functions: kernels for GPUs, actors and clients with vLLM.
ABSENT = {
    "flash_attn": (),
    "flash_attn.bert_padding": ("index_first_axis", "pad_input", "rearrange", "unpad_input"),
    "flash_attn.utils": (),
    "flash_attn.utils.distributed": ("all_gather",),
    "openrlhf.trainer.ray": (),
    "openrlhf.trainer.ray.launcher": ("RayActorGroup",),
    "trl.generation.vllm_generation": ("VLLMGeneration",),
}


def load(*names: str) -> list[ModuleType]:
    """Imports modules of the peers, with stand-ins for what they would draw in, which are gone afterwards."""
    if not PEERS.is_dir():
        pytest.fail(f"{PEERS} is missing: run launch/test.sh, which installs OpenRLHF and verl there")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(PEERS)])
        for name, members in ABSENT.items():
            module = ModuleType(name)
            module.__spec__, module.__path__ = ModuleSpec(name, None, is_package=True), []
            vars(module).update(dict.fromkeys(members))
            patch.setitem(sys.modules, name, module)
        return [importlib.import_module(name) for name in names]


def run_block(function: Callable[..., Any], first: str, last: str, **names: Any) -> SimpleNamespace:
    """Runs some lines out of the middle of a peer's function, and returns the variables they leave.

    Args:
        function: whose source it is.
        first: how the first line begins.
        last: how the last line begins.
        names: the variables that the lines need.
    """
    lines = inspect.getsource(function).splitlines()
    start = next(i for i, line in enumerate(lines) if line.strip().startswith(first))
    end = next(i for i, line in enumerate(lines) if i >= start and line.strip().startswith(last))
    scope = {**function.__globals__, **names}
    exec(textwrap.dedent("\n".join(lines[start : end + 1])), scope)
    return SimpleNamespace(**{k: v for k, v in scope.items() if k.isidentifier()})


@pytest.fixture(scope="session")
def trl() -> SimpleNamespace:
    """TRL 1.12.0. Its trainers compute inside long methods: `block` runs the lines in question."""
    trainers = load(*(f"trl.trainer.{name}" for name in ("reward_trainer", "rloo_trainer", "grpo_trainer", "utils")))
    (ppo,), (reward, rloo, grpo, utils) = load("trl.experimental.ppo.ppo_trainer"), trainers
    score = {"rloo": rloo.RLOOTrainer, "grpo": grpo.GRPOTrainer}
    score = {kind: trainer._generate_and_score_completions for kind, trainer in score.items()}
    return SimpleNamespace(
        ppo=ppo, reward=reward, utils=utils, block=run_block, train=ppo.PPOTrainer.train, score=score
    )


@pytest.fixture(scope="session")
def openrlhf() -> SimpleNamespace:
    """OpenRLHF 0.11.2."""
    utils, loss, kl, maker, experience = load(
        "openrlhf.models.utils",
        "openrlhf.models.loss",
        "openrlhf.trainer.ppo_utils.kl_controller",
        "openrlhf.trainer.ppo_utils.experience_maker",
        "openrlhf.trainer.ppo_utils.experience",
    )
    return SimpleNamespace(
        utils=utils, loss=loss, kl=kl, Maker=maker.RemoteExperienceMaker, Experience=experience.Experience
    )


@pytest.fixture(scope="session")
def verl() -> SimpleNamespace:
    """verl 0.9.1."""
    core, functional = load("verl.trainer.ppo.core_algos", "verl.utils.torch_functional")
    return SimpleNamespace(core=core, functional=functional)


@pytest.fixture(params=range(3))
def batch(request: pytest.FixtureRequest) -> SimpleNamespace:
    """Random tensors of 5 responses: `mask` is padded on the right, one row is full; `gaps` holds back some tokens."""
    random = torch.Generator().manual_seed(request.param)
    shape = (5, 8)
    lengths_B1 = torch.tensor([[8], [2], [5], [3], [6]])
    mask = torch.arange(8) < lengths_B1
    names = ("old_values", "values", "returns", "rewards", "advantages")
    out = SimpleNamespace(**{name: torch.randn(shape, generator=random) for name in names})
    out.scores = torch.randn(5, generator=random)
    out.old = -2 * torch.rand(shape, generator=random)
    for name in ("logprobs", "ref", "rollout"):  # ratios from 1/3 to 3: every clip takes part
        setattr(out, name, out.old + 0.5 * torch.randn(shape, generator=random))
    gaps = mask & (torch.rand(shape, generator=random) < 0.7)
    gaps[:, 0] = True
    return SimpleNamespace(**vars(out), mask=mask, gaps=gaps, lengths=lengths_B1[:, 0])


def agree(ours: Any, theirs: Any) -> None:
    """Both are equal to 1e-5, relative and absolute."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, check_dtype=False)

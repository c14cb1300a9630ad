"""The same recorded rollouts, the same update: ranks, ZeRO stages and micro-batch sizes change nothing but rounding."""

import os
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from cai_ray.algo.ppo import logprobs_from_logits
from cai_ray.config import Learner, Optim, PPOConfig, Sharding
from cai_ray.models.checkpoints import load_causal_lm
from cai_ray.models.tokenization import Tokenizer
from cai_ray.rl import experience
from cai_ray.rl.setup import Setup
from cai_ray.rl.workers import Actor, Critic
from tests.training.ranks import on_ranks

from .conftest import CLUSTER

ROWS, STEPS = 16, 5
KINDS = {  # ranks, ZeRO stage, tokens of a micro-batch, activations that are computed again
    "whole": (1, 0, 1024, False),
    "small micro-batches": (1, 0, 40, "selective"),
    "two ranks": (2, 0, 60, False),
    "ZeRO-2": (2, 2, 60, False),
    "ZeRO-3": (2, 3, 90, "selective"),
}
SPREAD, REST = ("two ranks", "ZeRO-3"), ("small micro-batches", "ZeRO-2")


def rollouts():
    """Random responses of 3 to 12 tokens with what a step computes for them."""
    draw = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, 13, (ROWS,), generator=draw).tolist()

    def each(low, high):
        return pa.array([(torch.rand(n, generator=draw) * (high - low) + low).tolist() for n in lengths])

    def ids(sizes):
        return pa.array([torch.randint(5, 200, (n,), generator=draw).tolist() for n in sizes], pa.list_(pa.int32()))

    columns = {"prompt_ids": ids(torch.randint(2, 9, (ROWS,), generator=draw).tolist()), "response_ids": ids(lengths)}
    for name, low, high in (
        ("old_logprobs", -6, -4),
        ("ref_logprobs", -6, -4),
        ("advantages", -1, 1),
        ("values", -1, 1),
        ("returns", -1, 1),
        ("rollout_logprobs", -6, -4),
    ):
        columns[name] = each(low, high).cast(pa.list_(pa.float32()))
    return pa.table(columns), lengths


def setup_of(kind, policy, reward_model, **changes):
    ranks, stage, tokens, again = KINDS[kind]
    where = {"ranks": ranks, "zero_stage": stage, "microbatch_tokens": tokens, "gradient_checkpointing": again}
    sharding = Sharding(dtype="float32", **where)
    actor = Learner(optim=Optim(lr=1e-3), sharding=sharding)
    # One of the critic's first gradients is 2e-8, less than the rounding of its sum. Adam makes a quarter of a step of
    # that, which at 1e-3 shows in the next losses.
    critic = Learner(optim=Optim(lr=1e-4), sharding=sharding)
    config = PPOConfig(
        **{
            "steps": STEPS,
            "rollout_batch_size": ROWS,
            "minibatch_size": ROWS,
            "actor": actor,
            "critic": critic,
            **changes,
        }
    )
    return Setup(config, policy, (reward_model,), None, "auto", "cpu", 7, CLUSTER, "float32")


def updated(rank, setup, out, spoil):
    """Takes the steps and leaves losses, gradient norms and the models in `out`."""
    if spoil:
        plain = experience.policy_loss

        def spoiled(*args):
            loss, stats = plain(*args)
            return spoil * loss, stats

        experience.policy_loss = spoiled
    batch, _ = rollouts()
    for role, cls in (("actor", Actor), ("critic", Critic)):
        worker = cls(role, rank, setup.config.actor.sharding.ranks, setup)
        worker.join(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])  # the group is up: it stays
        lines = []
        for _ in range(STEPS):
            found = worker.update(batch, [range(ROWS)], 0.1)
            lines.append((found["sums"]["loss"], found["grad_norm"]))
        torch.save(lines, out / f"{role}-{rank}.pt")
        worker._model.export(Tokenizer.load(setup.policy), out / role)


def run(out, kind, policy, reward_model, spoil=0.0, **changes):
    out.mkdir()
    setup = setup_of(kind, policy, reward_model, **changes)
    on_ranks(KINDS[kind][0], updated, setup, out, spoil)
    found = {}
    for role in ("actor", "critic"):
        parts = [torch.load(out / f"{role}-{rank}.pt") for rank in range(KINDS[kind][0])]
        found[role] = (
            [sum(loss for loss, _ in step) for step in zip(*parts, strict=True)],
            [norm for _, norm in parts[0]],
            load_file(out / role / "model.safetensors"),
        )
    return found


def drift(a, b, start):
    """‖Δa - Δb‖ / ‖Δa‖ over all weights."""
    apart = sum(float((a[n] - b[n]).double().square().sum()) for n in a)
    moved = sum(float((a[n] - start[n]).double().square().sum()) for n in a)
    return (apart / moved) ** 0.5


@pytest.fixture(scope="module")
def whole(policy, reward_model, tmp_path_factory):
    return run(tmp_path_factory.mktemp("update") / "whole", "whole", policy, reward_model, kl_penalty="k3_loss")


def agrees(found, whole, policy, reward_model):
    for role, start in (("actor", policy), ("critic", reward_model)):
        first = load_file(Path(start) / "model.safetensors")
        for mine, other in zip(found[role][:2], whole[role][:2], strict=True):
            if mine != pytest.approx(other, rel=1e-5, abs=1e-7):
                return False
        if drift(whole[role][2], found[role][2], first) > 1e-3:
            return False
    return True


@pytest.mark.parametrize("kind", [*SPREAD, *(pytest.param(k, marks=pytest.mark.full) for k in REST)])
def test_the_layout_changes_nothing(kind, policy, reward_model, whole, tmp_path):
    found = run(tmp_path / "out", kind, policy, reward_model, kl_penalty="k3_loss")
    for role in ("actor", "critic"):
        assert found[role][0] == pytest.approx(whole[role][0], rel=1e-5, abs=1e-7)
        assert found[role][1] == pytest.approx(whole[role][1], rel=1e-5)
    assert agrees(found, whole, policy, reward_model)


@pytest.mark.parametrize("spoil", [2.0, pytest.param(-1.0, marks=pytest.mark.full)])
def test_a_doubled_or_flipped_gradient_would_be_noticed(spoil, policy, reward_model, whole, tmp_path):
    found = run(tmp_path / "out", "small micro-batches", policy, reward_model, spoil, kl_penalty="k3_loss")
    assert not agrees(found, whole, policy, reward_model)


def mixed_in(rank, setup, out):
    """Two updates without a policy gradient, in which SL rows alone teach."""
    batch, lengths = rollouts()
    nothing = pa.array([[0.0] * n for n in lengths], pa.list_(pa.float32()))
    batch = batch.set_column(batch.column_names.index("advantages"), "advantages", nothing)
    worker = Actor("actor", rank, 1, setup)
    worker.join(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"])
    rows = pa.table({"prompt_ids": [[5, 6], [9]], "response_ids": [[7, 8, 9], [11]]})
    found = worker.update(batch, [[0], [1]], 0.0, [[0, 1], [1, 0]], rows)
    torch.save(found["sums"], out / "sums.pt")


def test_sl_rows_mixed_in_are_learned(policy, reward_model, tmp_path):
    on_ranks(1, mixed_in, setup_of("whole", policy, reward_model, ptx_coef=0.5, steps=2), tmp_path)
    hf, loss = load_causal_lm(policy, "float32"), 0.0
    for prompt, response in (([5, 6], [7, 8, 9]), ([9], [11])):
        with torch.no_grad():
            logits = hf(torch.tensor([prompt + response])).logits[:, len(prompt) - 1 : -1]
        loss -= float(logprobs_from_logits(logits, torch.tensor([response])).sum()) / 4
    sums = torch.load(tmp_path / "sums.pt")
    assert sums["loss"] == 0
    # The mean of both steps: the first step's is the untrained model's, the second is lower.
    assert 0.5 * loss < sums["ptx_loss"] < loss - 0.01

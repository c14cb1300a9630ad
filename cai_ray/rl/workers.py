"""The four roles beside the rollout engines: actor and critic learn, reward and reference only look.

Each is a plain class that becomes a Ray actor; each method returns (payload, scalars): the payload, a table, goes from
worker to worker, only the scalars reach the controller.
Shapes: B sequences, T tokens, N response tokens of a micro-batch, H hidden, V vocabulary. A plan is a list of
micro-batches, each a list of rows of the batch; an empty one is a filler that keeps ranks in step.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from cai_ray.algo.masking import partial_mean
from cai_ray.algo.ppo import policy_loss, value_loss
from cai_ray.config import Cluster, Learner, PPOConfig
from cai_ray.errors import DataError
from cai_ray.models.checkpoints import load_causal_lm, load_scalar_model
from cai_ray.models.scalar import scores_at_end, values_at
from cai_ray.models.tokenization import Tokenizer, preference_input
from cai_ray.rl.batches import Micro, Plan, collate, ragged
from cai_ray.rl.groups import free_address
from cai_ray.rl.weight_sync import Engines, Sender
from cai_ray.training.deepspeed import ShardedModel, init_distributed, loading
from cai_ray.training.sft import TokenLogprobs

Answer = tuple[Any, Any]


@dataclass(frozen=True)
class Setup:
    """What the controller and every worker are told when they start."""

    config: PPOConfig
    policy: Path  # start and reference of the policy, Hugging Face folder
    reward_model: Path  # the preference model's folder
    format: str  # of the policy's prompts: auto | plain | chat
    device: str  # cpu | gpu
    seed: int
    cluster: Cluster  # time limits; GPUs that share one rollout engine
    engine_dtype: str  # decides, with the actor's, how far log-probs of engine and actor may differ

    @property
    def torch_device(self) -> torch.device:
        """Where a worker's tensors live; Ray shows a worker only its own GPU."""
        return torch.device("cuda", 0) if self.device == "gpu" else torch.device("cpu")


class ValueForward(nn.Module):
    """Values of the states in which each response token was chosen."""

    def __init__(self, hf: PreTrainedModel):
        super().__init__()
        self.hf = hf

    def forward(self, ids_BT: Tensor, attention_mask_BT: Tensor, response_BT: Tensor) -> Tensor:
        """values_N."""
        before_BT = response_BT.roll(-1, dims=1)  # no row begins with its response
        return values_at(self.hf, ids_BT, attention_mask_BT, before_BT)[before_BT]


def _info(self: Any) -> Answer:
    """Process and node: a method of every worker."""
    return None, {"pid": os.getpid(), "node": os.uname().nodename}


def _table(name: str, rows: Sequence[int], values: pa.Array) -> pa.Table:
    return pa.table({"row": pa.array(rows, pa.int32()), name: values})


def _per_token(
    name: str, batch: pa.Table, plan: Plan, device: torch.device, predict: Callable[[Micro], Tensor]
) -> pa.Table:
    """A table of (row, `name`) with one value per response token."""
    parts = [_table(name, [], pa.array([], pa.list_(pa.float32())))]
    for rows in plan:
        micro = collate(batch, rows, device)
        values_N = predict(micro)  # for a filler too: the other ranks wait in the same collectives
        if rows:
            parts.append(_table(name, rows, ragged(values_N, micro.lengths)))
    return pa.concat_tables(parts)


class Reference:
    """The policy as it was at the start."""

    def __init__(self, role: str, rank: int, ranks: int, setup: Setup):
        self._device, self._temperature = setup.torch_device, setup.config.temperature
        # The actor's own dtype: the KL at the first step is then 0, not the distance between two precisions.
        dtype = setup.config.actor.sharding.dtype
        self._model = TokenLogprobs(load_causal_lm(setup.policy, dtype)).to(self._device).eval()

    info = _info

    @torch.inference_mode()
    def logprobs(self, batch: pa.Table, plan: Plan) -> Answer:
        """Table (row, ref_logprobs)."""

        def predict(micro: Micro) -> Tensor:
            return self._model(micro.ids_BT, micro.attention_BT, micro.response_BT, self._temperature)[0]

        return _per_token("ref_logprobs", batch, plan, self._device, predict), {}


class Reward:
    """The preference model. It alone normalises scores."""

    def __init__(self, role: str, rank: int, ranks: int, setup: Setup):
        self._device, config = setup.torch_device, setup.config
        self._max_tokens = config.max_prompt_tokens + config.max_new_tokens + 1  # EOS for a truncated response
        self._model: Any = load_scalar_model(setup.reward_model, config.critic.sharding.dtype)
        self._model.to(self._device).eval()
        self._eos = _same_tokens(setup).eos_id
        self._mean, self._std = _moments(self._model.config, setup) if config.normalize_scores else (0.0, 1.0)

    info = _info

    @torch.inference_mode()
    def score(self, batch: pa.Table, plan: Plan) -> Answer:
        """Table (row, score_raw, score)."""
        rows, raw = [], []
        for chunk in filter(None, plan):
            inputs = [
                torch.tensor(preference_input(r["prompt_ids"], r["response_ids"], self._eos, self._max_tokens)[0])
                for r in batch.select(["prompt_ids", "response_ids"]).take(chunk).to_pylist()
            ]
            lengths_B = torch.tensor([len(x) for x in inputs])
            ids_BT = pad_sequence(inputs, batch_first=True)
            scores_B = scores_at_end(self._model, ids_BT.to(self._device), lengths_B.to(self._device))
            rows += chunk
            raw += scores_B.tolist()
        table = _table("score_raw", rows, pa.array(raw, pa.float64()))
        return table.append_column("score", pa.array([(x - self._mean) / self._std for x in raw], pa.float64())), {}


def _same_tokens(setup: Setup) -> Tokenizer:
    policy, reward = Tokenizer.load(setup.policy, setup.format), Tokenizer.load(setup.reward_model)
    if policy.hf.get_vocab() != reward.hf.get_vocab():
        raise DataError(
            f"the policy {setup.policy} and the preference model {setup.reward_model} have different vocabularies",
            "train the preference model from a model of the policy's family: it reads the policy's tokens",
        )
    return policy


def _moments(config: Any, setup: Setup) -> tuple[float, float]:
    mean, std = (getattr(config, name, None) for name in ("reward_mean", "reward_std"))
    if mean is None or not std:
        raise DataError(
            f"the preference model {setup.reward_model} stores reward_mean {mean} and reward_std {std}",
            "train it with cai-ray, add both to its config.json, or set ppo.normalize_scores=false",
        )
    return mean, std


class _Trained:
    """What actor and critic share: the process group of their ranks, the walk over a plan, checkpoints."""

    # Each role's own: its module, its forward pass, its loss with its stats, and the columns that the loss reads.
    _build: Callable[[], "TokenLogprobs | ValueForward"]
    _predict: Callable[[Micro], tuple[Tensor, ...]]
    _loss: Callable[[Micro, Any, int], tuple[Tensor, dict[str, Tensor]]]
    _columns: tuple[str, ...]

    def __init__(self, role: str, rank: int, ranks: int, setup: Setup):
        self._role, self._rank, self._ranks, self._setup = role, rank, ranks, setup
        self._device = setup.torch_device
        self._learner: Learner = getattr(setup.config, role)
        self._kept: Any = None  # the last forward pass with its graph, for the update to go on from
        self._model: ShardedModel

    info = _info

    def address(self) -> Answer:
        """Where the other ranks meet rank 0: its node's address and a free port."""
        return None, free_address()

    def join(self, address: str, port: int, total_steps: int) -> Answer:
        """Joins the group's process group and loads the model; `total_steps` optimizer steps are the whole run."""
        where = {"MASTER_ADDR": address, "MASTER_PORT": port, "RANK": self._rank, "WORLD_SIZE": self._ranks}
        os.environ.update({name: str(value) for name, value in where.items()}, LOCAL_RANK="0")
        init_distributed(self._device, self._setup.cluster.step_timeout_s)
        learner = self._learner
        with loading(learner.sharding, learner.optim, self._device):
            module = self._build()
        self._model = ShardedModel(module, learner.optim, learner.sharding, total_steps, self._device)
        return None, {}

    def save(self, folder: Path) -> Answer:
        """Writes weights and optimizer state; ranks share the folder."""
        self._model.save(folder)
        return None, {}

    def load(self, folder: Path) -> Answer:
        """Continues from what `save` wrote."""
        self._model.load(folder)
        return None, {}

    def update(self, batch: pa.Table, steps: list[Plan], totals: list[int]) -> Answer:
        """One optimizer step for each plan; stats are this rank's parts of the sums, averaged over steps."""
        sums: dict[str, float] = {}
        norms = []
        for plan, total in zip(steps, totals, strict=True):
            for rows in plan:
                micro = collate(batch, rows, self._device, self._columns)
                kept, self._kept = self._kept, None
                loss, stats = self._loss(micro, self._predict(micro) if kept is None else kept, total)
                self._model.backward(loss)
                for name, value in stats.items():
                    sums[name] = sums.get(name, 0.0) + float(value) / len(steps)
            lr = self._model.lr
            norms.append(self._model.step())
        return None, {"sums": sums, "grad_norm": sum(norms) / len(norms), "lr": lr}

    def _forward(self, name: str, batch: pa.Table, plan: Plan, keep: bool) -> Answer:
        """Table (row, name) of the first prediction; `keep` holds on to the graph of the only micro-batch."""

        def first(micro: Micro) -> Tensor:
            predicted = self._predict(micro)
            self._kept = predicted if keep else None
            return predicted[0]

        with torch.set_grad_enabled(keep):
            return _per_token(name, batch, plan, self._device, first), {}


class Actor(_Trained):
    """The policy under training; its loss is the clipped policy loss."""

    _columns = ("old_logprobs", "advantages")
    _sender: Sender | None = None

    def _build(self) -> TokenLogprobs:
        return TokenLogprobs(load_causal_lm(self._setup.policy, self._learner.sharding.dtype))

    def _predict(self, micro: Micro, temperature: float | None = None) -> tuple[Tensor, Tensor]:
        temperature = temperature or self._setup.config.temperature
        return self._model.module(micro.ids_BT, micro.attention_BT, micro.response_BT, temperature)

    def _loss(self, micro: Micro, predicted: Any, total: int) -> tuple[Tensor, dict[str, Tensor]]:
        (logprobs_N, entropy_N), clip = predicted, self._setup.config.clip_range
        old_N, advantages_N = (micro.columns[name] for name in self._columns)
        loss, stats = policy_loss(logprobs_N, old_N, advantages_N, micro.mask_N, clip, total=total)
        return loss, {**stats, "entropy": partial_mean(entropy_N.detach(), micro.mask_N, total)}

    def logprobs(self, batch: pa.Table, plan: Plan, keep: bool) -> Answer:
        """Table (row, old_logprobs)."""
        return self._forward("old_logprobs", batch, plan, keep)

    def sync(self, engines: list[Any], version: int, fresh: bool) -> Answer:
        """Sends the weights to the engines, which then hold version `version`; `fresh` connects to them anew."""
        if fresh or self._sender is None:
            cluster = self._setup.cluster
            gpus = cluster.tensor_parallel_size if self._setup.device == "gpu" else 0
            self._sender = Sender(self._model, Engines(engines, gpus, cluster.step_timeout_s))
        self._sender.send(version)
        return None, {}

    @torch.no_grad()
    def probe(self, batch: pa.Table, rows: list[int]) -> Answer:
        """Log-probs of some responses at temperature 1, as an engine states them for given tokens.

        Also `shift`: mean |log-prob now - old_logprobs| over their tokens, at the sampling temperature, where the batch
        holds old_logprobs.
        """
        known = "old_logprobs" in batch.column_names
        micro = collate(batch, rows, self._device, ("old_logprobs",) if known else ())
        logprobs_N = self._predict(micro, 1.0)[0]
        shift = 0.0
        if known:
            now_N = logprobs_N if self._setup.config.temperature == 1 else self._predict(micro)[0]
            shift = float((now_N - micro.columns["old_logprobs"]).abs().mean())
        return None, {"logprobs": [part.tolist() for part in logprobs_N.split(micro.lengths)], "shift": shift}

    def export(self, out: Path) -> Answer:
        """Writes the policy in Hugging Face format, with its tokenizer."""
        tokenizer = Tokenizer.load(self._setup.policy, self._setup.format)
        self._model.export(tokenizer, out)
        return None, {}


class Critic(_Trained):
    """The value function; its loss is the clipped value loss."""

    _columns = ("values", "returns")

    def _build(self) -> ValueForward:
        setup = self._setup
        init = setup.reward_model if setup.config.critic_init == "reward" else setup.policy
        return ValueForward(load_scalar_model(init, self._learner.sharding.dtype, seed=setup.seed))

    def _predict(self, micro: Micro) -> tuple[Tensor]:
        return (self._model.module(micro.ids_BT, micro.attention_BT, micro.response_BT),)

    def _loss(self, micro: Micro, predicted: Any, total: int) -> tuple[Tensor, dict[str, Tensor]]:
        old_N, returns_N = (micro.columns[name] for name in self._columns)
        clip = self._setup.config.value_clip_range
        return value_loss(predicted[0], old_N, returns_N, micro.mask_N, clip, total=total)

    def values(self, batch: pa.Table, plan: Plan, keep: bool) -> Answer:
        """Table (row, values)."""
        return self._forward("values", batch, plan, keep)

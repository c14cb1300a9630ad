"""What a worker of any role is, and three roles: actor and critic learn, the reference only looks.

Shapes: T tokens of a micro-batch, N response tokens of it.
"""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from cai_ray.algo.ppo import nll_loss, value_loss
from cai_ray.models.checkpoints import load_causal_lm, load_scalar_model
from cai_ray.models.documents import Forward, document_states
from cai_ray.models.memory import give_back
from cai_ray.models.tokenization import Tokenizer
from cai_ray.records import derive_seed
from cai_ray.rl.batches import Micro, Plan, beginnings, collate, plan_of, ragged, row_lengths, table
from cai_ray.rl.experience import ACTOR_COLUMNS, actor_loss, make_experience
from cai_ray.rl.groups import Group, free_address
from cai_ray.rl.rollouts import keep_rollouts
from cai_ray.rl.setup import Setup
from cai_ray.rl.weight_sync import Sender
from cai_ray.training.deepspeed import ShardedModel, init_distributed, model_to_look, model_to_train
from cai_ray.training.sft import TokenLogprobs

PROBES, PROBE_TOKENS = 2, 64  # responses that are compared after a weight sync, and first tokens of each


class Worker:
    """One rank of a role, a plain class that becomes a Ray actor; `_load` completes it.

    Where ranks are one process group, every call goes to all of them, and a death takes PPO back to the last checkpoint
    (`Setup.joined`). Others are complete as they start: Ray starts one that dies again.

    Its methods return a table, scalars by name, both or nothing; the controller calls them through `call`.
    """

    _load: Callable[[], None]

    def __init__(self, role: str, rank: int, ranks: int, setup: Setup):
        self._role, self._rank, self._ranks, self._setup = role, rank, ranks, setup
        self._device, self._learner, joined = setup.torch_device, setup.learner(role), setup.joined(role)
        self._share = (rank, ranks) if joined else (0, 1)  # of the rows of a call
        if not joined:
            self._load()

    def call(self, method: str, *args: Any) -> tuple[pa.Table | None, dict[str, Any]]:
        """Calls a method and returns its table, which goes from worker to worker, and scalars for the controller.

        These say also when it ran: `span`, two times in seconds since the epoch. It leaves no memory reserved that an
        engine on the same GPU needs.
        """
        begun = time.time()
        found = getattr(self, method)(*args)
        if self._setup.colocated:
            torch.cuda.empty_cache()  # nothing where there is no GPU
        if not isinstance(found, tuple):
            found = (found, {}) if isinstance(found, pa.Table) else (None, found or {})
        payload, scalars = found
        return payload, {**scalars, "span": (begun, time.time())}

    def info(self) -> dict[str, Any]:
        """Process and node."""
        return {"pid": os.getpid(), "node": os.uname().nodename}

    def address(self) -> dict[str, Any]:
        """Where the other ranks meet rank 0: its node's address and a free port."""
        host, port = free_address()
        return {"address": host, "port": port}

    def join(self, address: str, port: int) -> None:
        """Joins the process group of the role's ranks and loads this rank's part of its models."""
        where = {"MASTER_ADDR": address, "MASTER_PORT": port, "RANK": self._rank, "WORLD_SIZE": self._ranks}
        os.environ.update({name: str(value) for name, value in where.items()}, LOCAL_RANK="0")
        # Longer than the controller waits: it names who hangs, torch would end those that wait for it.
        init_distributed(self._device, 1.5 * self._setup.cluster.step_timeout_s)
        self._load()

    def _plan(self, batch: pa.Table, rows: Sequence[int] | None = None) -> tuple[Plan, int]:
        """This rank's micro-batches of some rows of a batch, or of all, and the response tokens of all ranks'."""
        rows = range(len(batch)) if rows is None else rows
        return plan_of(batch, rows, self._learner.sharding.microbatch_tokens, *self._share)


def _per_token(
    name: str, batch: pa.Table, plan: Plan, device: torch.device, predict: Callable[[Micro], Tensor]
) -> pa.Table:
    """A table of (row, `name`) with one value per response token."""
    parts = [table(batch, [], {name: pa.array([], pa.list_(pa.float32()))})]
    for rows in plan:
        micro = collate(batch, rows, device)
        values_N = predict(micro)  # for a filler too: the other ranks wait in the same collectives
        if rows:
            parts.append(table(batch, rows, {name: ragged(values_N, micro.lengths)}))
    return pa.concat_tables(parts)


class Reference(Worker):
    """The policy as it was at the start."""

    def _load(self) -> None:
        # In the actor's own dtype: the KL at the first step is then 0, not the distance between two precisions.
        self._model = model_to_look(self._build, self._learner, self._device, self._setup.config.inference_sharded)

    def _build(self, dtype: str) -> TokenLogprobs:
        return TokenLogprobs(load_causal_lm(self._setup.policy, dtype))

    @torch.no_grad()
    def logprobs(self, batch: pa.Table, piece: tuple[int, int | None] = (0, None)) -> pa.Table:
        """Table (row, ref_logprobs) of a piece of the batch: first row and how many."""

        def predict(micro: Micro) -> Tensor:
            return self._model(micro.ids_1T, micro.documents, micro.response_1T, self._setup.config.temperature)[0]

        part = batch.slice(*piece)
        return _per_token("ref_logprobs", part, self._plan(part)[0], self._device, predict)


class _Trained(Worker):
    """What actor and critic share: the walk over micro-batches, checkpoints."""

    # Each role's own: its module, its forward pass, its loss with its stats, and the columns that the loss reads.
    _build: Callable[[str], "TokenLogprobs | ValueForward"]
    _predict: Callable[..., tuple[Tensor, ...]]
    _loss: Callable[[Micro, Any, int, float], tuple[Tensor, dict[str, Tensor]]]
    _columns: tuple[str, ...]

    _kept: Any = None  # the last forward pass with its graph, for the update to go on from

    def _load(self) -> None:
        setup = self._setup
        steps = setup.config.steps - (setup.config.critic_warmup_steps if self._role == "actor" else 0)
        self._start = setup.critic_start if self._role == "critic" else setup.policy
        seed, total = derive_seed(setup.seed, "lora", self._role), setup.updates * steps
        self._model: ShardedModel = model_to_train(self._build, self._learner, self._start, seed, total, self._device)
        if setup.colocated:
            self._model.offload()

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """The optimizer's state is at hand; outside, where an engine shares the GPU, it waits in host memory."""
        if self._setup.colocated:
            self._model.reload()
        yield
        if self._setup.colocated:
            self._model.offload()

    def save(self, folder: Path) -> None:
        """Writes weights and optimizer state, from where they rest; ranks share the folder."""
        self._model.save(folder)  # an engine that shares the GPU is awake now and has the rest of it

    def load(self, folder: Path) -> None:
        """Continues from what `save` wrote."""
        with self._whole():
            self._model.load(folder)

    def update(
        self,
        batch: pa.Table,
        steps: Sequence[Sequence[int]],
        kl_coef: float,
        sl_steps: Sequence[Sequence[int]] = (),
        sl_rows: pa.Table | None = None,
    ) -> dict[str, Any]:
        """One optimizer step for the rows of each of `steps`; stats are this rank's parts of the sums, averaged.

        Each also learns some of the SL rows (prompt_ids, response_ids), where there are any: those of `sl_steps`, at
        temperature 1 (PPO-ptx, arXiv 2203.02155).
        """
        sums: dict[str, float] = defaultdict(float)
        norms, shared, tokens, begun = list[float](), self._kept is not None, 0, time.monotonic()
        with self._whole():
            for k, step in enumerate(steps):
                plan, total = self._plan(batch, step)
                for rows in plan:
                    micro = collate(batch, rows, self._device, self._columns)
                    tokens += sum(micro.documents)
                    kept, self._kept = self._kept, None
                    loss, stats = self._loss(micro, self._predict(micro) if kept is None else kept, total, kl_coef)
                    self._model.backward(loss)
                    for name, value in stats.items():
                        sums[name] += float(value) / len(steps)
                if sl_rows is not None:
                    plan, total = self._plan(sl_rows, sl_steps[k])
                    for rows in plan:
                        micro = collate(sl_rows, rows, self._device)
                        loss, stats = nll_loss(self._predict(micro, 1.0)[0], micro.mask_N, total)
                        self._model.backward(self._setup.config.ptx_coef * loss)
                        sums["ptx_loss"] += float(stats["loss"]) / len(steps)
                lr = self._model.lr
                norms.append(self._model.step())
        if not shared:  # else the next step needs as much again, while the other roles have theirs
            give_back()
        # Of the six FLOPs, two are the forward pass, which an earlier call has done where it is shared.
        perf = self._model.mfu(tokens * (2 / 3 if shared else 1), time.monotonic() - begun)
        return {"sums": dict(sums), "grad_norm": sum(norms) / len(norms), "lr": lr, **perf}

    def _forward(self, name: str, batch: pa.Table, keep: bool) -> pa.Table:
        """Table (row, name) of the first prediction; `keep` holds on to its graph where there is one micro-batch."""
        plan, _ = self._plan(batch)
        keep = keep and len(plan) == 1

        def first(micro: Micro) -> Tensor:
            predicted = self._predict(micro)
            self._kept = predicted if keep else None
            return predicted[0]

        with torch.set_grad_enabled(keep):
            return _per_token(name, batch, plan, self._device, first)


class Actor(_Trained):
    """The policy under training."""

    _columns = ACTOR_COLUMNS
    _sender: Sender | None = None
    # What takes a whole batch and no model is rank 0's too: a process of its own would cost seconds a step to start, or
    # memory to keep.
    keep, experience = staticmethod(keep_rollouts), staticmethod(make_experience)

    def _build(self, dtype: str) -> TokenLogprobs:
        return TokenLogprobs(load_causal_lm(self._start, dtype))

    def _predict(self, micro: Micro, temperature: float | None = None) -> tuple[Tensor, Tensor]:
        temperature = temperature or self._setup.config.temperature
        return self._model.module(micro.ids_1T, micro.documents, micro.response_1T, temperature)

    def _loss(self, micro: Micro, predicted: Any, total: int, kl_coef: float) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs_N, entropy_N = predicted
        return actor_loss(self._setup.config, kl_coef, micro.columns, logprobs_N, entropy_N, micro.mask_N, total)

    def logprobs(self, batch: pa.Table, keep: bool) -> pa.Table:
        """Table (row, old_logprobs) of this rank's share; `keep`: what follows is one update with the whole batch."""
        return self._forward("old_logprobs", batch, keep)

    def sync(self, version: int, engines: Group | None, folder: Path) -> None:
        """Sends the weights to the engines, which then hold version `version`; None stands for those of the last time.

        Handles of 64 engines for each of 64 ranks would cost the controller more than all else in a step. Adapters that
        are sent alone go by way of `folder`.
        """
        if engines is not None:
            cluster = self._setup.cluster
            gpus = cluster.tensor_parallel_size if self._setup.device == "gpu" else 0
            if self._sender:
                self._sender.close()
            # Half of what the controller waits for this: an engine that hangs is named before the actor is.
            self._sender = Sender(self._model, engines, gpus, cluster.step_timeout_s / 2, self._setup.colocated)
        assert self._sender is not None  # the first call names engines
        self._sender.send(version, folder if self._setup.config.adapter_rank else None)

    @torch.no_grad()
    def probe(self, batch: pa.Table) -> dict[str, Any]:
        """Log-probs of the first tokens of some responses at temperature 1, as an engine states them for given tokens.

        Also the token `ids` of these rows and where their responses start; and `shift`: mean |log-prob now -
        old_logprobs| over the responses' tokens, at the sampling temperature.
        """
        part = beginnings(batch.slice(0, PROBES), PROBE_TOKENS, "response_ids", "old_logprobs")
        micro = collate(part, range(len(part)), self._device, ("old_logprobs",))
        logprobs_N = self._predict(micro, 1.0)[0]
        now_N = logprobs_N if self._setup.config.temperature == 1 else self._predict(micro)[0]
        shift = float((now_N - micro.columns["old_logprobs"]).abs().mean())
        ids, starts = micro.ids_1T[0].split(micro.documents), row_lengths(part, "prompt_ids")
        rows = {"ids": [row.tolist() for row in ids], "starts": starts}
        return {**rows, "logprobs": [row.tolist() for row in logprobs_N.split(micro.lengths)], "shift": shift}

    def export(self, out: Path, adapter: Path | None = None) -> None:
        """Writes the policy in Hugging Face format, with its tokenizer; to `adapter` also the adapters, if any."""
        if adapter and self._learner.lora:
            self._model.export_adapter(adapter)
        tokenizer = Tokenizer.load(self._setup.policy, self._setup.format)
        self._model.export(tokenizer, out)


class ValueForward(Forward):
    """The critic's values of the states in which each response token was chosen; nothing is padded."""

    def forward(self, ids_1T: Tensor, documents: Sequence[int], response_1T: Tensor) -> Tensor:
        """values_N in float32."""
        hidden_TH = document_states(self.hf, ids_1T, documents)
        before_T = torch.roll(response_1T[0], -1)  # one place to the left; no sequence begins with its response
        return self.hf.get_submodule("score")(hidden_TH[before_T])[:, 0]


class Critic(_Trained):
    """The value function."""

    _columns = ("values", "returns")

    def _build(self, dtype: str) -> ValueForward:
        return ValueForward(load_scalar_model(self._start, dtype, seed=self._setup.seed))

    def _predict(self, micro: Micro) -> tuple[Tensor]:
        return (self._model.module(micro.ids_1T, micro.documents, micro.response_1T),)

    def _loss(self, micro: Micro, predicted: Any, total: int, kl_coef: float) -> tuple[Tensor, dict[str, Tensor]]:
        old_N, returns_N = (micro.columns[name] for name in self._columns)
        return value_loss(predicted[0], old_N, returns_N, micro.mask_N, self._setup.config.value_clip_range, total)

    def values(self, batch: pa.Table, keep: bool) -> pa.Table:
        """Table (row, values), as `Actor.logprobs`."""
        return self._forward("values", batch, keep)

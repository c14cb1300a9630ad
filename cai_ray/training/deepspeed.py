"""One trained model over the ranks of a torch process group, sharded by DeepSpeed ZeRO 0 to 3.

Used by the supervised loop and by PPO's actor and critic. A loss is a partial sum over the whole optimizer step: adding
micro-batches and ranks gives the step's loss, so ranks, stage and micro-batch size change nothing but rounding.
"""

import copy
import itertools
import json
import math
import os
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cai_ray.artifacts import write_atomic
from cai_ray.config import Learner, Optim, Sharding
from cai_ray.errors import CaiError, StageFailed
from cai_ray.models.activations import keep_activations
from cai_ray.models.checkpoints import layer_of, save_pretrained
from cai_ray.models.tokenization import Tokenizer
from cai_ray.training.lora import add_adapters, merged, merged_name, save_adapter

_BUCKET = 50_000_000  # elements that are reduced or gathered together: 200 MB in float32, against DeepSpeed's 2 GB
# In a checkpoint's folder: DeepSpeed's files; the same for any number of ranks; our own file, written last.
_TAG, _UNIVERSAL, _STATE = "shards", "universal", "state.json"
# By what a GPU's name holds, the first that fits: its makers' FLOP/s in bfloat16, without sparsity.
_PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}


def init_distributed(device: torch.device, timeout_s: float = 1800.0) -> None:
    """Joins the process group (gloo on CPU, NCCL on GPU) and hands it to DeepSpeed.

    The usual variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT must be set, or the group must be up.

    Args:
        device: where this rank's tensors live.
        timeout_s: longest wait for the other ranks in any one operation, seconds.
    """
    os.environ.setdefault("LOCAL_RANK", "0")
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # without it DeepSpeed probes for devices and warns
    import deepspeed

    if device.type == "cpu":
        # On a CPU, DeepSpeed would compile a shared-memory extension here, for more than a minute, whose all-reduce
        # only its inference uses. An empty table of usable extensions stops the compiler; gloo does the work.
        deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]
    else:
        torch.cuda.set_device(device)
    backend, timeout = ("gloo" if device.type == "cpu" else "nccl"), timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timeout)
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)


def learning_rate(optim: Optim, step: int, total_steps: int) -> float:
    """The rate of optimizer step `step`, counted from 0: warm-up from 0, then the schedule, which reaches 0 at the end.

    No step has rate 0: the warm-up's first is lr / (warm-up steps + 1), and the 0 lies one step past the last.
    """
    warmup = round(optim.warmup_fraction * total_steps)
    if step < warmup:
        return optim.lr * (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if optim.schedule == "linear":
        return optim.lr * (1 - done)
    if optim.schedule == "cosine":
        return optim.lr * (1 + math.cos(math.pi * done)) / 2
    return optim.lr


@contextmanager
def loading(sharding: Sharding, optim: Optim, device: torch.device) -> Iterator[None]:
    """Under ZeRO-3, each weight of a transformers model that is loaded in this block is at once cut over the ranks.

    Raises:
        CaiError: what any rank raised, on every rank, so that none waits for another.
    """
    from transformers.integrations import deepspeed

    error, config = None, None
    if sharding.zero_stage == 3:
        config = deepspeed.HfDeepSpeedConfig(_engine_config(sharding, optim, device))  # in force while it lives
    try:
        yield
    except CaiError as raised:
        error = raised
    finally:
        if config:
            deepspeed.unset_hf_deepspeed_config()
    errors: list[CaiError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    for found in filter(None, errors):
        raise found


def _engine_config(sharding: Sharding, optim: Optim, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's configuration: our choices, under the user's own options, under what this code relies on."""
    stage, gpu = sharding.stage, device.type != "cpu"
    zero: dict[str, Any] = {
        "reduce_bucket_size": _BUCKET,
        "allgather_bucket_size": _BUCKET,
        "overlap_comm": gpu and stage > 1,
    }
    if sharding.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": gpu}
    if sharding.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": gpu}
    fixed: dict[str, Any] = {
        "train_batch_size": dist.get_world_size(),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # step() is the boundary, after any number of backward() calls
        "gradient_clipping": optim.max_grad_norm if stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own CPU Adam would be compiled on first use
        "bf16": {"enabled": sharding.dtype == "bfloat16"},
        # Rotary frequencies are a buffer: in bfloat16, as ZeRO-3 would make it, angles at token 2000 are radians off.
        "data_types": {"grad_accum_dtype": "fp32", "keep_in_fp32_modules": ["inv_freq"]},
        "zero_optimization": {"stage": stage},
    }
    return _over(_over({"zero_optimization": zero}, sharding.deepspeed or {}), fixed)


def _over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    out = dict(below)
    for key, value in above.items():
        out[key] = _over(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out


def steps_in(folder: Path) -> int | None:
    """Steps behind a checkpoint; None where a file is missing or shorter or longer than it was written."""
    try:
        state = json.loads((folder / _STATE).read_text("utf-8"))
        same = all((folder / name).stat().st_size == size for name, size in state["files"].items())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return state["steps_done"] if same else None


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of a GPU in bfloat16, or None where it is not known, as for every CPU."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for known, flops in _PEAK_FLOPS.items() if known in name), None)


class ShardedModel:
    """A model, its optimizer and schedule over all ranks; every method but `lr` is called by all ranks alike.

    Args:
        model: a transformers model, or a module that holds one as its attribute `hf`. ZeRO-3 gathers weights as
            submodules run, so whatever reads a weight does it inside this module's `forward`.
        optim: AdamW and its schedule.
        sharding: layout over ranks.
        total_steps: optimizer steps of the whole run; the schedule's length.
        device: where this rank's tensors live; `init_distributed` has been called for it.

    Attributes:
        module: what to call for a forward pass.
        hf: the transformers model inside.
        rank: this process's rank.
        world_size: number of ranks.
        steps_done: optimizer steps taken so far, those before a `load` included.
        device: where this rank's tensors live.
    """

    def __init__(
        self, model: nn.Module, optim: Optim, sharding: Sharding, total_steps: int, device: torch.device
    ) -> None:
        import deepspeed

        self.hf: Any = getattr(model, "hf", model)
        self._optim, self._total_steps = optim, total_steps
        self.rank, self.world_size, self.steps_done = dist.get_rank(), dist.get_world_size(), 0
        self.device = device
        self._stage, self._dtype = sharding.stage, sharding.dtype
        keep_activations(self.hf, sharding.gradient_checkpointing)
        model.to(device).train()
        config = _engine_config(sharding, optim, device)
        self.module: Any = deepspeed.initialize(model=model, optimizer=_adamw(model, optim), config=config)[0]
        # At ZeRO-3 DeepSpeed takes only its own FusedAdam's state off the GPU, below it any optimizer's.
        self._moves_moments = self._stage == 3 and not self.module.zero_use_cpu_optimizer()
        self.module.enable_backward_allreduce = self._stage > 0  # at stage 0 step() does it, and only where needed

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return learning_rate(self._optim, self.steps_done, self._total_steps)

    def mfu(self, tokens: float, seconds: float) -> dict[str, float]:
        """`mfu` of this rank's part of an update: 6 FLOPs a parameter and token over the GPU's peak, if known.

        Chowdhery et al. 2022 (arXiv 2204.02311), appendix B, without attention; what is computed again does not count.
        """
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.hf.parameters())
        peak = peak_flops(self.device)
        return {"mfu": 6 * parameters * tokens / (seconds * peak)} if peak else {}

    def backward(self, loss: Tensor) -> None:
        """Adds one micro-batch's gradients; all ranks call it equally often, with an all-masked batch where need be.

        Args:
            loss: this micro-batch's partial sum over the step's global total.
        """
        # DeepSpeed averages over ranks; the loss is already a part of the sum over them.
        self.module.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self) -> float:
        """One optimizer step with the gradients since the last; returns their global norm before clipping.

        Raises:
            StageFailed: the norm is not finite; the weights are as they were before.
        """
        for group in self.module.optimizer.param_groups:
            group["lr"] = self.lr
        if self._stage == 0:
            if self.world_size > 1:
                self.module.buffered_allreduce_fallback()
            parameters = [p for p in self.module.parameters() if p.grad is not None]
            # Rows in float32, their norms in float64: a CPU's float32 norm of 28 million numbers is 0.1% too small.
            rows = [torch.linalg.vector_norm(p.grad, dim=-1).double() for p in parameters]
            total = torch.stack([torch.linalg.vector_norm(r) for r in rows]).norm()
            norm = float(total)
            if math.isfinite(norm):
                nn.utils.clip_grads_with_norm_(parameters, self._optim.max_grad_norm, total.float())
                self.module.step()
        else:
            self.module.step()  # discards the step by itself when the norm is not finite
            norm = float(self.module.get_global_grad_norm() or 0.0)
            norm = math.nan if self.module.optimizer.overflow else norm
        if not math.isfinite(norm):
            raise StageFailed(
                f"the gradient of step {self.steps_done + 1} is not finite",
                "lower optim.lr, and check the rows of that step for extreme lengths",
            )
        self.steps_done += 1
        return norm

    def offload(self) -> None:
        """Leaves gradients and the optimizer's state in host memory until `reload`; the weights stay. Not at ZeRO-0."""
        from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State
        from deepspeed.runtime.zero.offload_states import offload_optimizer_states

        gpu, away = self.device.type != "cpu", [State.lp_grads, State.contiguous_grad_buffer]
        if not self._moves_moments:
            away += [State.optim_states, State.hp_params]
        self.module.offload_states(include=away, pin_memory=gpu)
        if self._moves_moments:
            offload_optimizer_states(self.module.optimizer.optimizer, "cpu", pin_memory=gpu)
            self._move_masters(torch.device("cpu"))
        torch.cuda.empty_cache()  # an engine on the same GPU is about to take what is free now

    def reload(self) -> None:
        """Brings back what `offload` has moved, if it has."""
        from deepspeed.runtime.zero.offload_states import reload_optimizer_states

        self.module.reload_states()
        if self._moves_moments:
            reload_optimizer_states(self.module.optimizer.optimizer, self.device)
            self._move_masters(self.device)

    def _move_masters(self, device: torch.device) -> None:
        for flat in self.module.optimizer.fp32_partitioned_groups_flat:
            flat.data = flat.data.to(device)

    def save(self, folder: Path) -> None:
        """Writes weights, optimizer state and step count, each rank its part: into one shared folder, or each its own.

        Where the folders are the ranks' own, their contents together are the checkpoint.
        """
        (folder / _TAG).mkdir(parents=True, exist_ok=True)
        self.module.save_checkpoint(str(folder), tag=_TAG, save_latest=False)  # returns when all have written
        mine = {str(p.relative_to(folder)): p.stat().st_size for p in (folder / _TAG).iterdir()}
        parts: list[dict[str, int]] = [{}] * self.world_size
        dist.all_gather_object(parts, mine)
        if self.rank == 0:
            files = {name: size for part in parts for name, size in part.items()}
            state = {"steps_done": self.steps_done, "ranks": self.world_size, "files": files}
            write_atomic(folder / _STATE, json.dumps({**state, "zero_stage": self._stage, "dtype": self._dtype}))
        dist.barrier()

    def load(self, folder: Path) -> None:
        """Continues from what `save` wrote and is whole; DeepSpeed reads pickles: only folders of this run come here.

        With another number of ranks it goes through DeepSpeed's universal checkpoint: the same up to rounding.

        Raises:
            StageFailed: it was written with another ZeRO stage or dtype.
        """
        state = json.loads((folder / _STATE).read_text("utf-8"))
        for name, ours in (("zero_stage", self._stage), ("dtype", self._dtype)):
            if state[name] != ours:
                raise StageFailed(
                    f"the checkpoint {folder} was written with {name} {state[name]}, this run has {ours}",
                    "set it back, or remove the stage's checkpoints folder to start the stage over",
                )
        universal = bool(self._stage) and state["ranks"] != self.world_size  # at stage 0 every rank has everything
        if universal:
            self._make_universal(folder)
        self.module._config.load_universal_checkpoint = universal
        decays = [group["weight_decay"] for group in self.module.optimizer.param_groups]
        self.module.load_checkpoint(str(folder), tag=_UNIVERSAL if universal else _TAG)
        if universal:  # ZeRO-3 gives all parts one step counter and the first group's settings; it is left on the CPU
            for parameter, moments in self.module.optimizer.optimizer.state.items():
                moments["step"] = moments["step"].to(parameter.device, copy=True)
            for group, decay in zip(self.module.optimizer.param_groups, decays, strict=True):
                group["weight_decay"] = decay
        self.steps_done = state["steps_done"]

    def _make_universal(self, folder: Path) -> None:
        if self.rank == 0:
            from deepspeed.checkpoint import ds_to_universal

            where = {"input_folder": str(folder / _TAG), "output_folder": str(folder / _UNIVERSAL)}
            workers = {"num_extract_workers": 1, "num_merge_workers": 1}
            how = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
            ds_to_universal.main(Namespace(**where, **workers, **how))
        dist.barrier()

    def full_parameters(self, trained: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Every parameter, or only those that are trained, whole, under its transformers name; tied weights come once.

        They are gathered layer by layer. All ranks iterate to the end; rank 0's tensors are the ones to use. They alias
        live weights where nothing had to be gathered: copy what has to outlast the next step.
        """
        import deepspeed

        wanted = (item for item in self.hf.named_parameters() if item[1].requires_grad or not trained)
        for _, layer in itertools.groupby(wanted, lambda item: layer_of(item[0])):
            named = list(layer)
            with deepspeed.zero.GatheredParameters([p for _, p in named], enabled=self._stage == 3):
                for name, parameter in named:
                    yield name, parameter.detach()

    def merged_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """`full_parameters` of the model without adapters, whose parts are added to the weights that they stand beside.

        All ranks iterate to the end.
        """
        return ((new, merged(self.hf, name, p)) for name, p in self.full_parameters() if (new := merged_name(name)))

    def merged_shapes(self) -> dict[str, Tensor]:
        """Name -> a tensor without data, of the whole shape, for each of `merged_parameters` in their order."""
        return {  # a parameter that ZeRO-3 has split keeps its whole shape in ds_shape
            new: torch.empty(getattr(p, "ds_shape", p.shape), dtype=p.dtype, device="meta")
            for name, p in self.hf.named_parameters()
            if (new := merged_name(name))
        }

    def export(self, tokenizer: Tokenizer, out: Path, config_updates: Mapping[str, Any] | None = None) -> None:
        """Writes a folder in Hugging Face format from rank 0, file by file; all ranks return when it is complete.

        Args:
            tokenizer: saved beside the weights.
            out: the model's folder; it appears whole or not at all.
            config_updates: fields to set in config.json.
        """
        tensors = self.merged_parameters()
        if self.rank == 0:
            persistent = self.hf.state_dict().keys()
            buffers = {name: b for name, b in self.hf.named_buffers() if name in persistent}
            config = copy.deepcopy(self.hf.config)
            config.update(config_updates or {})
            save_pretrained(itertools.chain(buffers.items(), tensors), config, tokenizer, out)
        deque(tensors, maxlen=0)  # on the other ranks; on rank 0 nothing is left
        dist.barrier()

    def export_adapter(self, out: Path) -> None:
        """Writes the adapters of a model that has some; rank 0 returns when they are there.

        Below ZeRO-3 rank 0 may be the only one to call it.
        """
        state = {name: p.to("cpu", copy=True) for name, p in self.full_parameters(trained=True)}
        if self.rank == 0:
            save_adapter(self.hf, state, out)


def model_to_train(
    load: Callable[[str], Any], config: Learner, base: Path, seed: int, total_steps: int, device: torch.device
) -> ShardedModel:
    """A model as its training begins, with adapters where `config` asks for them; all ranks call it.

    Args:
        load: loads what `ShardedModel` takes, in the dtype it is given.
        config: optimizer, layout and adapters.
        base: the folder it is loaded from, which a saved adapter names.
        seed: of the adapters' first weights.
        total_steps: optimizer steps of the whole run.
        device: where this rank's tensors live; `init_distributed` has been called for it.

    Raises:
        CaiError: as `loading`.
    """
    with loading(config.sharding, config.optim, device):
        module = load(config.sharding.dtype)
        if config.lora:
            add_adapters(module.hf, config.lora, base, seed)
    return ShardedModel(module, config.optim, config.sharding, total_steps, device)


def model_to_look(load: Callable[[str], nn.Module], config: Learner, device: torch.device, sharded: bool) -> nn.Module:
    """A model that is not trained; `sharded`: a part of it (ZeRO-3), and all ranks call this, and it, equally often.

    Args:
        load: loads it in the dtype it is given.
        config: whose dtype and DeepSpeed options it shares.
        device: where this rank's tensors live; for a part `init_distributed` has been called for it.
        sharded: its forward passes then run without gradients.

    Raises:
        CaiError: as `loading`.
    """
    if not sharded:
        return load(config.sharding.dtype).to(device).eval()
    import deepspeed

    sharding = config.sharding.model_copy(update={"zero_stage": 3, "offload_optimizer": False})
    with loading(sharding, config.optim, device):
        module = load(sharding.dtype)
    settings = _engine_config(sharding, config.optim, device)
    engine: Any = deepspeed.initialize(model=module.to(device), config=settings)[0]
    engine.eval()
    return engine


def _adamw(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    matrices, others = [], []  # norms and biases do not decay
    for p in (p for p in model.parameters() if p.requires_grad):
        whole = getattr(p, "ds_shape", p.shape)  # under ZeRO-3 a loaded weight is cut and empty here
        (matrices if len(whole) > 1 else others).append(p)
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True)

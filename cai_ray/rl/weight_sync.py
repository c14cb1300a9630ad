"""The actor's weights on their way to the rollout engines, through vLLM's weight-transfer API.

On CPU over shared memory (`generation.shared_memory`), on GPUs over NCCL; where actor and engines share GPUs by handles
of the actor's own memory (CUDA IPC), because NCCL refuses two processes on one GPU. Rank 0 speaks to the engines; under
ZeRO-3 all ranks of the actor take part, because gathering a sharded parameter is a collective, and with IPC each rank
serves the engine beside it. Adapters that go alone (`ppo.lora_sync`) are small, and engines read them as a file.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from cai_ray.errors import StageFailed
from cai_ray.generation.shared_memory import bucket_folder, write_bucket
from cai_ray.models.checkpoints import buckets
from cai_ray.rl.groups import Group, free_address, wait
from cai_ray.rl.setup import Setup
from cai_ray.training.deepspeed import ShardedModel

BUCKET_BYTES = 256 << 20
# Nats, mean over tokens; two right implementations differ by far less. On GPUs vLLM's attention in float32 is TF32's.
GAP_LIMITS = {"float32": 1e-3, "tf32": 0.01, "bfloat16": 0.05}


class Engines:
    """The engines' side of a transfer, as vLLM's trainer classes expect it: each call goes to all engines at once.

    Args:
        group: the rollout engines.
        gpus: GPUs, and so receiving processes, of each engine; 0 on CPU.
        timeout_s: longest wait for one answer.
        colocated: each on the GPU of an actor's rank.
    """

    def __init__(self, group: Group, gpus: int, timeout_s: float, colocated: bool = False):
        self.group, self.gpus, self._timeout_s, self.colocated = group, gpus, timeout_s, colocated
        self.version = 0
        self.give_up: Callable[[], None] = lambda: None  # ends the sender's side of a transfer
        self.failed: BaseException | None = None  # why it was ended

    def _all(self, method: str, *args: Any, each: list[tuple] | None = None) -> None:
        wait(self.group.submit(method, *args, each=each), self._timeout_s, f"weight sync ({method})")

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """With NCCL each engine's processes get ranks of their own behind the sender's rank 0."""
        ranks = [{} if self.colocated else {"rank_offset": 1 + i * self.gpus} for i in range(len(self.group.workers))]
        self._all("init_weight_transfer", each=[({**init_info, **own},) for own in ranks])

    def start_weight_update(self) -> None:
        """Engines, idle now, wait for weights."""
        self._all("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Engines take in what is described."""
        try:
            self._all("update_weights", update_info)
        except BaseException as error:
            self.failed = error  # first: what the sender still has must not reach a link that has been ended
            self.give_up()  # the sender waits in NCCL for one that is gone, and would for ever
            raise

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Engines drop their prefix caches and go on with the new version."""
        self._all("finish_weight_update", self.version)

    def load_adapter(self, folder: Path) -> None:
        """Engines put an adapter over their own weights and go on with the new version."""
        self._all("load_adapter", folder, self.version)


class Sender:
    """Sends a `ShardedModel`'s weights; every rank that takes part makes one and calls `send` alike.

    Args:
        model: source of the weights.
        engines: the receiving side.
    """

    def __init__(self, model: ShardedModel, engines: Engines):
        self._model, self._engines = model, engines
        self._link: Any = None  # on GPUs vLLM's sending side, from the first transfer on

    def send(self, version: int, adapter: Path | None = None) -> None:
        """Returns when all engines hold the weights as `version`; after an error another sender takes its place.

        Args:
            version: what the engines call them.
            adapter: where only adapters are sent: a new folder that sender and engines share.

        Raises:
            StageFailed: an engine did not answer.
        """
        self._engines.version = version
        if adapter:
            self._model.export_adapter(adapter)
            if self._model.rank == 0:
                self._engines.load_adapter(adapter)
            return
        parameters = self._model.merged_parameters()
        try:
            if self._engines.gpus:
                self._link = self._link or _gpu_trainer(self._model, self._engines)
                self._engines.give_up = self._link.shutdown
                self._link.source.parameters = parameters
                self._link.send_weights()
            elif self._model.rank == 0:
                self._pass_on(parameters)
        finally:  # the other ranks gather all of them, also when an engine dies
            if not self._engines.colocated:  # there they stand in the transfer's own collectives
                deque(parameters, maxlen=0)

    def close(self) -> None:
        """Frees what the link to engines holds on a GPU."""
        self._engines.give_up()

    def _pass_on(self, parameters: Iterator[tuple[str, Tensor]]) -> None:
        self._engines.start_weight_update()
        taken: Future[None] = Future()  # the engines have taken in the bucket before the one that is being written
        taken.set_result(None)
        with bucket_folder() as folder, ThreadPoolExecutor(1) as thread:
            for number, bucket in enumerate(buckets(parameters, BUCKET_BYTES)):
                path = folder / f"{number}.safetensors"
                info = write_bucket(bucket, path)
                bucket.clear()  # before the next is gathered
                taken.result()
                taken = thread.submit(self._hand_over, path, info)
            taken.result()
        self._engines.finish_weight_update()

    def _hand_over(self, path: Path, info: dict[str, Any]) -> None:
        self._engines.update_weights(info)
        path.unlink()


def _gpu_trainer(model: ShardedModel, engines: Engines) -> Any:
    """vLLM's own sending side; all ranks gather, rank 0 broadcasts, or each offers its copy to the engine beside it."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

    class Source(WeightSource):
        parameters: Iterator[tuple[str, Tensor]]  # of the transfer that is on

        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, p.dtype, tuple(p.shape)) for name, p in model.merged_shapes().items()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            for parameter in self.parameters:
                if engines.failed:
                    raise engines.failed
                yield parameter

    if engines.colocated:
        largest = max(p.nbytes for p in model.merged_shapes().values())  # an embedding may exceed the default of 1 GiB
        size = max(IPCTrainerInitInfo.packed_buffer_size_bytes, largest)
        info = IPCTrainerInitInfo(rank=model.rank, packed=True, packed_buffer_size_bytes=size)
        return IPCTrainerWeightTransferEngine.trainer_init(info, client=engines, source=Source())
    address, port = free_address()
    world = 1 + len(engines.group.workers) * engines.gpus
    info = NCCLTrainerInitInfo(master_address=address, master_port=port, world_size=world, rank=model.rank)
    return NCCLTrainerWeightTransferEngine.trainer_init(info, client=engines, source=Source())


def gap_limit(setup: Setup) -> float:
    """What engine and actor may differ by, nats a token on average: what the coarser of their precisions allows."""
    formats = [setup.engine_dtype, setup.config.actor.sharding.dtype, *(["tf32"] if setup.device == "gpu" else [])]
    return max(GAP_LIMITS[name] for name in formats)


def mean_gap(actor: list[list[float]], engine: list[list[float]]) -> float:
    """Mean |difference| of the log-probs that both sides give the same tokens, nats; rows count as far as both go."""
    pairs = [pair for mine, theirs in zip(actor, engine, strict=True) for pair in zip(mine, theirs, strict=False)]
    return sum(abs(a - b) for a, b in pairs) / max(1, len(pairs))


def check_sync(gap: float, shift: float, limit: float, step: int) -> None:
    """Stops the run when the engines did not take the weights of a step, by its own learning rate.

    Args:
        gap: mean |difference| of engine and actor after the sync, nats a token.
        shift: how far the step has moved the actor, in the same units. In float32 two right implementations differ by
            some 1e-5, so engines that are still half a step away and further than a twentieth of the limit hold older
            weights; bfloat16's rounding is larger than a step.
        limit: of `GAP_LIMITS`.
        step: for the message.

    Raises:
        StageFailed: they differ.
    """
    check_gap(gap, limit, f"after the weight sync of step {step}")
    if limit == GAP_LIMITS["float32"] and gap > max(limit / 20, shift / 2):
        raise StageFailed(
            f"after the weight sync of step {step}, the engines are {gap:.2g} nats a token from the actor, which the "
            f"step has moved by {shift:.2g}: they hold older weights",
            "the same command starts the workers again and continues from the last checkpoint",
        )


def check_gap(gap: float, limit: float, when: str) -> None:
    """Stops the run when engine and actor do not compute the same.

    Raises:
        StageFailed: `gap`, in nats a token on average, is above `limit`, or no number.
    """
    if not gap <= limit:
        raise StageFailed(
            f"{when}, engine and actor differ by {gap:.2g} nats a token on average, more than {limit:g}",
            "the engine does not hold the actor's weights, or computes in another precision than it was told to",
        )

"""The actor's weights on their way to the rollout engines, through vLLM's weight-transfer API.

On CPU over shared memory (`generation.shared_memory`), on GPUs over NCCL; where actor and engines share GPUs by handles
of the actor's own memory (CUDA IPC), because NCCL refuses two processes on one GPU. Rank 0 speaks to the engines; under
ZeRO-3 all ranks of the actor take part, because gathering a sharded parameter is a collective, and with IPC each rank
serves the engine beside it. Adapters that go alone (`ppo.lora_sync`) are small, and engines read them as a file.
"""

from collections import deque
from collections.abc import Iterator
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


class Sender:
    """Sends a `ShardedModel`'s weights; every rank that takes part makes one and calls `send` alike.

    It is also what vLLM's trainer classes call the client: each call goes to all engines at once.

    Args:
        model: source of the weights.
        engines: the rollout engines.
        gpus: GPUs, and so receiving processes, of each engine; 0 on CPU.
        timeout_s: longest wait for one answer.
        colocated: each engine on the GPU of an actor's rank.
    """

    def __init__(self, model: ShardedModel, engines: Group, gpus: int, timeout_s: float, colocated: bool = False):
        self._model, self._engines, self._gpus = model, engines, gpus
        self._timeout_s, self._colocated = timeout_s, colocated
        self._link: Any = None  # on GPUs vLLM's sending side, from the first transfer on
        self._failed: BaseException | None = None  # why it was ended
        self._version = 0

    def send(self, version: int, adapter: Path | None = None) -> None:
        """Returns when all engines hold the weights as `version`; after an error another sender takes its place.

        Args:
            version: what the engines call them.
            adapter: where only adapters are sent: a new folder that sender and engines share.

        Raises:
            StageFailed: an engine did not answer.
        """
        self._version = version
        if adapter:
            self._model.export_adapter(adapter)
            if self._model.rank == 0:
                self._all("load_adapter", adapter, version)
            return
        parameters = self._model.merged_parameters()
        try:
            if self._gpus:
                self._link = self._link or self._connect()
                self._link.source.parameters = parameters
                self._link.send_weights()
            elif self._model.rank == 0:
                self._pass_on(parameters)
        finally:  # the other ranks gather all of them, also when an engine dies
            if not self._colocated:  # there they stand in the transfer's own collectives
                deque(parameters, maxlen=0)

    def close(self) -> None:
        """Ends the link to the engines and frees what it holds on a GPU."""
        if self._link:
            self._link.shutdown()

    # ---- what vLLM calls ----------------------------------------------------------------------------------------

    def _all(self, method: str, *args: Any, each: list[tuple] | None = None) -> None:
        wait(self._engines.submit(method, *args, each=each), self._timeout_s, f"weight sync ({method})")

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """With NCCL each engine's processes get ranks of their own behind the sender's rank 0."""
        count = len(self._engines.workers)
        ranks = [{} if self._colocated else {"rank_offset": 1 + i * self._gpus} for i in range(count)]
        self._all("init_weight_transfer", each=[({**init_info, **own},) for own in ranks])

    def start_weight_update(self) -> None:
        """Engines, idle now, wait for weights."""
        self._all("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Engines take in what is described."""
        try:
            self._all("update_weights", update_info)
        except BaseException as error:
            self._failed = error  # first: what the sender still has must not reach a link that has been ended
            self.close()  # the sender waits in NCCL for one that is gone, and would for ever
            raise

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Engines drop their prefix caches and go on with the new version."""
        self._all("finish_weight_update", self._version)

    # ---- the two ways -------------------------------------------------------------------------------------------

    def _pass_on(self, parameters: Iterator[tuple[str, Tensor]]) -> None:
        """Over shared memory."""
        self.start_weight_update()
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
        self.finish_weight_update()

    def _hand_over(self, path: Path, info: dict[str, Any]) -> None:
        self.update_weights(info)
        path.unlink()

    def _connect(self) -> Any:
        """vLLM's own sender: all ranks gather; rank 0 broadcasts, or each offers its copy to the engine beside it."""
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

        sender, model = self, self._model

        class Source(WeightSource):
            parameters: Iterator[tuple[str, Tensor]]  # of the transfer that is on

            def metadata(self) -> list[ParamMeta]:
                return [ParamMeta(name, p.dtype, tuple(p.shape)) for name, p in model.merged_shapes().items()]

            def __iter__(self) -> Iterator[tuple[str, Tensor]]:
                for parameter in self.parameters:
                    if sender._failed:
                        raise sender._failed
                    yield parameter

        if self._colocated:
            largest = max(p.nbytes for p in model.merged_shapes().values())  # an embedding may exceed the usual 1 GiB
            size = max(IPCTrainerInitInfo.packed_buffer_size_bytes, largest)
            info = IPCTrainerInitInfo(rank=model.rank, packed=True, packed_buffer_size_bytes=size)
            return IPCTrainerWeightTransferEngine.trainer_init(info, client=self, source=Source())
        address, port = free_address()
        world = 1 + len(self._engines.workers) * self._gpus
        info = NCCLTrainerInitInfo(master_address=address, master_port=port, world_size=world, rank=model.rank)
        return NCCLTrainerWeightTransferEngine.trainer_init(info, client=self, source=Source())


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

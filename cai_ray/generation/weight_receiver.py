"""vLLM's side of the shared-memory weight transfer, and what its CPU backend forgets when weights change."""

from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


def repack_tied_head(model: torch.nn.Module) -> None:
    """Renews the packed copy of a tied output head after new weights.

    vLLM's CPU linear layers multiply with a packed copy of the weight. A reload renews the copy of every layer that
    received weights, and a head tied to the embeddings receives none: without this it goes on with the old ones, and
    no error tells.
    """
    embeddings = [m for m in model.modules() if type(m) is VocabParallelEmbedding]
    for head in (m for m in model.modules() if isinstance(m, ParallelLMHead)):
        tied = [e for e in embeddings if e.weight is head.weight]
        if tied:
            head.weight = tied[0].weight
            head.quant_method.process_weights_after_loading(head)


@dataclass
class _InitInfo(WeightTransferInitInfo):
    """Nothing to agree on: the file names come with each bucket."""


@dataclass
class _UpdateInfo(WeightTransferUpdateInfo):
    """One bucket: a safetensors file in shared memory."""

    path: str


class SharedMemoryReceiver(WeightTransferEngine[_InitInfo, _UpdateInfo]):
    """Reads buckets of whole layers; refuses to finish while a parameter of the model has not come."""

    init_info_cls = _InitInfo
    update_info_cls = _UpdateInfo

    def init_transfer_engine(self, init_info: _InitInfo) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Prepares the model to take weights in checkpoint format."""
        self._missing = {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: _UpdateInfo) -> None:
        """Loads one bucket."""
        model: Any = self.model
        self._missing -= model.load_weights(load_file(update_info.path).items())

    def update_weights(self, update_info: dict) -> None:
        """The inherited method, without its wait for an accelerator."""
        self.receive_weights(self.parse_update_info(update_info))

    def finish_weight_update(self) -> None:
        """Puts the new weights into use.

        Raises:
            ValueError: some parameters never came; the engine must be restarted.
        """
        if self._missing:
            raise ValueError(f"{len(self._missing)} parameters were not sent, such as {min(self._missing)}")
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_head(self.model)

    def shutdown(self) -> None:
        """Nothing to release."""

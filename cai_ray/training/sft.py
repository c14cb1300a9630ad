"""Supervised fine-tuning: what a revision row teaches, and its loss. Knows nothing of ranks, steps or Ray.

Shapes: T tokens of all examples, N loss positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cai_ray.algo.ppo import logprobs_from_hidden, nll_loss
from cai_ray.config import SftConfig
from cai_ray.models.checkpoints import load_causal_lm
from cai_ray.models.documents import Forward, document_states, lm_head
from cai_ray.models.tokenization import Tokenizer, sft_example
from cai_ray.records import Row, answers, check_messages

COLUMNS = ("id", "messages", "kind", "split", "initial_response", "rounds", "flags")
Batch = Mapping[str, Any]
Score = tuple[float, float]  # summed log-prob, its tokens


@dataclass(frozen=True)
class Example:
    """One conversation with one answer to learn."""

    id: str
    ids_T: np.ndarray  # int32
    loss_mask_T: np.ndarray  # bool: the answer, and its EOS where the model ended it
    truncated: bool
    source: str  # helpful | round-1 | round-2 | …
    weight: float  # how often it is trained on in an epoch

    @property
    def tokens(self) -> int:
        """Tokens that are read; also what it takes in a micro-batch where it is the longest."""
        return len(self.ids_T)

    @property
    def units(self) -> int:
        """What the loss is averaged over: tokens with loss."""
        return int(self.loss_mask_T.sum())


class TokenLogprobs(Forward):
    """Log-probs and entropies at chosen tokens only; in PPO too, what actor and reference say of the response tokens.

    One module call holds backbone and head, so that ZeRO-3 gathers the head's weight too.
    """

    def forward(
        self,
        ids_1T: Tensor,
        documents: Sequence[int],
        wanted_1T: Tensor,
        temperature: float = 1.0,
        packed: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(logprobs_N, entropy_N) of the wanted tokens in float32 nats, under softmax(logits / temperature).

        The row holds documents of so many tokens; the first of each is never wanted. `packed`: see `document_states`.
        """
        hidden_TH = document_states(self.hf, ids_1T, documents, packed)
        wanted_T = wanted_1T[0, 1:]
        hidden_NH, weight_VH = lm_head(self.hf, hidden_TH[:-1][wanted_T])
        return logprobs_from_hidden(hidden_NH, weight_VH, ids_1T[0, 1:][wanted_T], temperature)


def load(folder: Path, dtype: str, seed: int) -> TokenLogprobs:
    """The model to train; `seed` is for models with a fresh head, which this one has not."""
    return TokenLogprobs(load_causal_lm(folder, dtype))


def examples(row: Row, tokenizer: Tokenizer, config: SftConfig) -> list[Example]:
    """The examples of one `Revision` row: its chosen revisions, or a helpful row's sampled answer.

    A harmful row's initial response is never learned, and neither is an empty answer; such a row may give none.

    Raises:
        DataError: the turns do not alternate or are no text, or the chat template refuses them.
    """
    messages, out = check_messages(row["messages"]), []
    for name, text, ended in answers(row, config.rounds):
        ids, mask, truncated = sft_example(tokenizer, messages, text, config.max_tokens, ended)
        source, weight = "helpful", config.mix.helpful
        if row["kind"] != "helpful":
            number = int(name.rpartition("-")[2])
            weights = config.mix.revisions if isinstance(config.mix.revisions, tuple) else (config.mix.revisions,)
            source, weight = f"round-{number}", weights[min(number, len(weights)) - 1]
        mask[0] = False  # nothing predicts the first token
        out.append(Example(name, np.array(ids, np.int32), np.array(mask, bool), truncated, source, weight))
    return out


def collate(batch: Sequence[Example], device: torch.device, config: SftConfig) -> Batch:
    """What `TokenLogprobs` reads of a micro-batch; an empty one becomes any two tokens without loss."""
    ids = [torch.from_numpy(e.ids_T) for e in batch] or [torch.zeros(2)]
    wanted = [torch.from_numpy(e.loss_mask_T) for e in batch] or [torch.tensor([False, True])]
    row = {"ids_1T": torch.cat(ids)[None].long().to(device), "wanted_1T": torch.cat(wanted)[None].to(device)}
    return {**row, "documents": [len(x) for x in ids], "packed": config.packing}


def loss(module: nn.Module, batch: Sequence[Example], tensors: Batch, config: SftConfig, total: int) -> Tensor:
    """The micro-batch's part of the step's mean negative log-prob; `total` counts the whole step's loss tokens."""
    logprobs_N, _ = module(**tensors)
    return nll_loss(logprobs_N, torch.full_like(logprobs_N, bool(batch), dtype=torch.bool), total)[0]


def score(module: nn.Module, batch: Sequence[Example], tensors: Batch) -> list[Score]:
    """Each example's summed log-prob (nats) and loss tokens."""
    logprobs_N, _ = module(**tensors)
    parts = logprobs_N.split([e.units for e in batch]) if batch else ()
    return [(float(part.double().sum()), float(len(part))) for part in parts]


def summary(batch: Sequence[Example], scores: Sequence[Score]) -> dict[str, float]:
    """Held-out loss (nats per token) and perplexity."""
    mean = -sum(s for s, _ in scores) / max(1.0, sum(n for _, n in scores))
    return {"eval/loss": mean, "eval/perplexity": float(np.exp(min(mean, 700.0)))}

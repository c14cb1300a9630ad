"""The forward passes of PPO's roles, each over whole sequences in one row: no padding, no logits of prompt tokens.

What reads a weight does so inside a module's `forward`, where ZeRO-3 gathers it.
Shapes: B sequences, T tokens of all of them, N response tokens of all of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cai_ray.algo.ppo import logprobs_from_hidden
from cai_ray.models.scalar import document_scores, document_states, lm_head


class _Forward(nn.Module):
    def __init__(self, hf: PreTrainedModel):
        super().__init__()
        self.hf = hf


class PolicyForward(_Forward):
    """What actor and reference say of the response tokens."""

    def forward(
        self, ids_1T: Tensor, documents: Sequence[int], response_1T: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """(logprobs_N, entropy_N) in float32 nats under softmax(logits / temperature)."""
        hidden_TH = document_states(self.hf, ids_1T, documents)
        hidden_NH, weight_VH = lm_head(self.hf, hidden_TH[_before(response_1T)])
        return logprobs_from_hidden(hidden_NH, weight_VH, ids_1T[response_1T], temperature)


class ValueForward(_Forward):
    """The critic's values of the states in which each response token was chosen."""

    def forward(self, ids_1T: Tensor, documents: Sequence[int], response_1T: Tensor) -> Tensor:
        """values_N in float32."""
        hidden_TH = document_states(self.hf, ids_1T, documents)
        return self.hf.get_submodule("score")(hidden_TH[_before(response_1T)])[:, 0]


class ScoreForward(_Forward):
    """A preference model's score of each sequence, read at its last token."""

    def forward(self, ids_1T: Tensor, documents: Sequence[int]) -> Tensor:
        """scores_B in float32."""
        return document_scores(self.hf, ids_1T, documents)


def _before(response_1T: Tensor) -> Tensor:
    """Where the response tokens are predicted: one place to the left; no sequence begins with its response."""
    return torch.roll(response_1T[0], -1)

"""The forward passes of critic and reward, each over whole sequences in one row; no padding.

That of actor and reference is SFT's: `training.sft.TokenLogprobs`.
Shapes: B sequences, T tokens of all of them, N response tokens of all of them.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cai_ray.models.documents import Forward, document_scores, document_states


class ValueForward(Forward):
    """The critic's values of the states in which each response token was chosen."""

    def forward(self, ids_1T: Tensor, documents: Sequence[int], response_1T: Tensor) -> Tensor:
        """values_N in float32."""
        hidden_TH = document_states(self.hf, ids_1T, documents)
        before_T = torch.roll(response_1T[0], -1)  # one place to the left; no sequence begins with its response
        return self.hf.get_submodule("score")(hidden_TH[before_T])[:, 0]


class ScoreForward(Forward):
    """A preference model's score of each sequence, read at its last token."""

    def forward(self, ids_1T: Tensor, documents: Sequence[int]) -> Tensor:
        """scores_B in float32."""
        return document_scores(self.hf, ids_1T, documents)

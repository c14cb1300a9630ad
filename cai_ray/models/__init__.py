"""Models and tokenizers: where they come from, how text becomes tokens, how hidden states become scores.

Importing this package is cheap: torch and transformers load when a function needs them.
"""

from cai_ray.models.checkpoints import resolve_model
from cai_ray.models.hub import embedded_model, tiny_model

__all__ = ["embedded_model", "resolve_model", "tiny_model"]

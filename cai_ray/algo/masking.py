"""Means, variances and sums over the True positions of a mask.

Shapes: B sequences, R response tokens. x and mask have one shape, any shape; masks are bool, True counts.
Inputs are replaced under the mask *before* arithmetic: a factor of zero afterwards keeps NaN, in values or gradients.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from cai_ray.errors import CaiError

Moments = tuple[Tensor | float, Tensor | float, Tensor | float]


def zero_masked(x: Tensor, mask: Tensor) -> Tensor:
    """`x` in float32 with 0 wherever `mask` is False. A mask that is not bool, or of another shape, is an error."""
    if mask.dtype != torch.bool or mask.shape != x.shape:
        raise CaiError(
            f"got a {mask.dtype} mask of shape {tuple(mask.shape)} for values of shape {tuple(x.shape)}",
            "pass a bool mask of the values' own shape",
        )
    return torch.where(mask, x.float(), 0.0)


def partial_mean(x: Tensor, mask: Tensor, total: Tensor | float | None) -> Tensor:
    """Sum of `x` over the True positions, divided by `total` (None: their own count; never less than 1).

    With `total` the count over all micro-batches and ranks of a step, the parts add up to the mean over the step.
    """
    count = mask.sum() if total is None else torch.as_tensor(total)
    return zero_masked(x, mask).sum() / count.clamp(min=1)


def masked_mean(x: Tensor, mask: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Mean over the True positions, over all of `x` or along `dim`; 0 where there is none."""
    return zero_masked(x, mask).sum(dim=dim) / mask.sum(dim=dim).clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance over the True positions (`unbiased` divides by n - 1); 0 where there are fewer than two."""
    squares = zero_masked(x.float() - masked_mean(x, mask), mask).square()
    return squares.sum() / (mask.sum() - int(unbiased)).clamp(min=1)


@torch.no_grad()
def masked_moments(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, mean, m2 = sum of squared deviations) of the True positions, as detached float32 scalars on the CPU.

    Each worker sends its three scalars; `combine_moments` on the controller gives those of all of them together.
    """
    mean = masked_mean(x, mask)
    m2 = zero_masked(x.float() - mean, mask).square().sum()
    return mask.sum().float().cpu(), mean.cpu(), m2.cpu()


def combine_moments(parts: Iterable[Moments]) -> tuple[Tensor, Tensor, Tensor]:
    """The moments of a whole from those of its parts (Chan et al. 1979), tensors or numbers; no part gives zeros."""
    rows = [[float(value) for value in part] for part in parts]
    n, mean, m2 = torch.tensor(rows, dtype=torch.float64).reshape(-1, 3).unbind(1)
    whole = (n * mean).sum() / n.sum().clamp(min=1)
    return n.sum().float(), whole.float(), (m2.sum() + (n * (mean - whole).square()).sum()).float()


def masked_whiten(x: Tensor, mask: Tensor, center: bool = True, moments: Moments | None = None) -> Tensor:
    """`x` scaled to unit variance (unbiased, + 1e-8) over the True positions, and to mean 0 unless `center` is False.

    Without centring the deviations are scaled and the mean is kept, as in TRL and verl. `moments` are those of the
    whole batch, when `x` is one part of it: parts whitened by their own differ from rank to rank. No gradient flows
    through mean and variance. Returns x's shape, 0 under the mask.
    """
    n, mean, m2 = (float(value) for value in (masked_moments(x, mask) if moments is None else moments))
    scaled = (x.float() - mean) / (m2 / max(n - 1, 1) + 1e-8) ** 0.5
    return zero_masked(scaled if center else scaled + mean, mask)

"""Elo ratings from pairwise comparisons: the Bradley-Terry model, fitted at once.

Shapes: K players, P pairs of players that met, S bootstrap samples. Strengths s are in nats; Elo is 400 / ln 10 · s.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from cai_ray.errors import CaiError

ELO_PER_NAT = 400 / np.log(10)
# Precision (1/nats²) of a normal prior. It keeps finite the rating of a player who won or lost everything, whose
# likelihood has no maximum; against one game of an even pair (curvature 1/4) it weighs nothing.
PRIOR = 1e-6

Player = TypeVar("Player", bound=Hashable)


class Rating(NamedTuple):
    """A player's Elo and the ends of its bootstrap interval."""

    elo: float
    low: float
    high: float


def fit_elo(
    players: Sequence[Player],
    comparisons: Iterable[tuple[Player, Player, float]],
    anchor: Player,
    anchor_elo: float = 0.0,
    samples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[Player, Rating]:
    """Maximum-likelihood Elo of each player, with `anchor` held at `anchor_elo`.

    Args:
        players: names, each once.
        comparisons: (i, j, probability or share with which i beat j: 1 win, 0.5 tie, 0 loss), i and j from `players`.
        anchor: the player whose rating is given.
        anchor_elo: that rating.
        samples: bootstrap samples; each draws anew within every pair of players, whose counts are the design.
        confidence: share of the samples within an interval.
        seed: of the bootstrap; the same comparisons in the same order give the same intervals.

    Returns a rating for each player. One that won (lost) everything has no finite estimate: it is held some thousands
    of Elo up (down) by a weak prior, and reads "at least" ("at most"). A player who is not connected to the anchor by
    comparisons cannot be rated, and is an error. Two players suffice: 3 wins in 4 are 400·log10(3) = 190.8 Elo.
    """
    index = {player: k for k, player in enumerate(players)}
    by_pair: dict[tuple[int, int], list[float]] = {}
    for i, j, p in comparisons:
        if i not in index or j not in index or i == j or not 0 <= p <= 1:
            raise CaiError(
                f"got the comparison ({i!r}, {j!r}, {p})", f"compare two of {list(players)}; give 0 <= probability <= 1"
            )
        a, b = index[i], index[j]
        by_pair.setdefault((min(a, b), max(a, b)), []).append(p if a < b else 1 - p)
    if anchor not in index or len(index) < len(players):
        raise CaiError(
            f"got the anchor {anchor!r} and the players {list(players)}", "name each player once, the anchor too"
        )
    unrated = set(index.values()) - _connected(index[anchor], by_pair)
    if unrated:
        raise CaiError(
            f"no chain of comparisons joins {anchor!r} and {[players[k] for k in sorted(unrated)]}",
            "compare them with a rated player, or leave them out",
        )
    rng = np.random.default_rng(seed)
    pairs_P2 = np.array(list(by_pair), dtype=int).reshape(-1, 2)
    counts_P = np.array([len(p) for p in by_pair.values()], dtype=float)
    wins = [np.append(rng.choice(p, (samples, len(p))).sum(1), np.sum(p)) for p in by_pair.values()]
    wins_SP = np.array(wins).reshape(len(wins), samples + 1).T  # the last row is the data itself
    elo_SK = anchor_elo + ELO_PER_NAT * _strengths(len(index), index[anchor], pairs_P2, counts_P, wins_SP)
    low_K, high_K = np.quantile(elo_SK[:-1], [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return {player: Rating(float(elo_SK[-1, k]), float(low_K[k]), float(high_K[k])) for player, k in index.items()}


def _connected(start: int, edges: Iterable[tuple[int, int]]) -> set[int]:
    """The players that a chain of comparisons joins to `start`."""
    reached, frontier = {start}, {start}
    while frontier:
        frontier = {k for edge in edges if frontier & set(edge) for k in edge} - reached
        reached |= frontier
    return reached


def _strengths(
    players: int, anchor: int, pairs_P2: np.ndarray, counts_P: np.ndarray, wins_SP: np.ndarray
) -> np.ndarray:
    """Strengths [S, K], the anchor's 0: Newton's method on the concave log-likelihood, all samples side by side.

    A step changes no difference of two strengths by more than 1 nat, which makes every step an ascent.
    """
    incidence_PK = np.zeros((len(pairs_P2), players))
    incidence_PK[np.arange(len(pairs_P2)), pairs_P2[:, 0]] = 1
    incidence_PK[np.arange(len(pairs_P2)), pairs_P2[:, 1]] = -1
    free = np.arange(players) != anchor
    incidence_PK = incidence_PK[:, free]
    s_SK = np.zeros((len(wins_SP), players))
    for _ in range(200):
        prob_SP = 1 / (1 + np.exp(-s_SK[:, free] @ incidence_PK.T))
        gradient_SK = (wins_SP - counts_P * prob_SP) @ incidence_PK - PRIOR * s_SK[:, free]
        curvature_SP = counts_P * prob_SP * (1 - prob_SP)
        hessian_SKK = incidence_PK.T @ (curvature_SP[..., None] * incidence_PK) + PRIOR * np.eye(free.sum())
        step_SK = np.linalg.solve(hessian_SKK, gradient_SK[..., None])[..., 0]
        longest = np.abs(step_SK).max(axis=1, initial=0.0, keepdims=True)
        s_SK[:, free] += step_SK * np.minimum(1, 0.5 / np.maximum(longest, 1e-12))
        if longest.max() < 1e-4:  # the steps shrink quadratically: what is left is far below 1e-6
            return s_SK
    raise CaiError(
        f"the ratings did not converge: the last step was {longest.max():.1e} nats", "report the comparisons"
    )

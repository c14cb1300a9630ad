"""Elo by maximum likelihood: goldens from odds, and what no order or direction of the comparisons may change."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cai_ray.algo.rating import fit_elo
from cai_ray.errors import CaiError

ODDS_3 = 400 * math.log10(3)  # 190.85 Elo: three wins in four


def elos(ratings):
    return {player: rating.elo for player, rating in ratings.items()}


def test_two_players():
    ratings = fit_elo(["policy", "base"], [("policy", "base", 1.0)] * 3 + [("policy", "base", 0.0)], anchor="base")
    assert elos(ratings) == pytest.approx({"policy": ODDS_3, "base": 0}, abs=0.01)
    assert ratings["base"] == (0, 0, 0)
    assert ratings["policy"].low < ODDS_3 < ratings["policy"].high


def test_three_players_with_consistent_odds():
    # odds 3 and 3 along the chain, 9 over both links: the likelihood is greatest where the model fits all three
    comparisons = [("a", "b", 0.75), ("b", "c", 0.75), ("a", "c", 0.9)]
    wanted = {"a": 1000 + ODDS_3, "b": 1000, "c": 1000 - ODDS_3}
    assert elos(fit_elo("abc", comparisons, "b", anchor_elo=1000)) == pytest.approx(wanted, abs=0.01)
    # the last comparison is implied by the other two
    assert elos(fit_elo("abc", comparisons[:2], "b", anchor_elo=1000)) == pytest.approx(wanted, abs=0.01)


def test_a_cycle_of_equal_wins_is_a_tie():
    ratings = fit_elo([0, 1, 2], [(0, 1, 1.0), (1, 2, 1.0), (2, 0, 1.0)], 0)
    assert elos(ratings) == pytest.approx({0: 0, 1: 0, 2: 0}, abs=0.01)


def test_the_interval_has_the_width_of_the_binomial():
    ratings = fit_elo("ab", [("a", "b", float(i % 2)) for i in range(400)], "b", samples=4000)
    # the log-odds of 400 even games have a standard deviation of 2/√400 = 0.1 nats, 17.37 Elo; 1.96 of them are 34
    assert ratings["a"].elo == pytest.approx(0, abs=0.01)
    assert (ratings["a"].low, ratings["a"].high) == pytest.approx((-34.05, 34.05), abs=3)
    narrow = fit_elo("ab", [("a", "b", float(i % 2)) for i in range(400)], "b", confidence=0.5)
    assert narrow["a"].high == pytest.approx(0.674 * 17.37, abs=3)


def test_the_seed_decides_the_interval():
    comparisons = [("a", "b", 1.0), ("a", "b", 0.5), ("a", "b", 0.0), ("a", "b", 0.7)] * 5
    assert fit_elo("ab", comparisons, "a", seed=1) == fit_elo("ab", comparisons, "a", seed=1)
    assert fit_elo("ab", comparisons, "a", seed=1) != fit_elo("ab", comparisons, "a", seed=2)


def test_an_undefeated_player_is_far_up_and_finite():
    ratings = fit_elo("abc", [("a", "b", 1.0)] * 10 + [("b", "c", 1.0), ("b", "c", 0.0)], "b")
    assert 1500 < ratings["a"].elo < 5000
    assert ratings["c"].elo == pytest.approx(0, abs=0.01)


def test_lopsided_numbers_converge():
    comparisons = [("a", "b", 1.0)] * 20_000 + [("a", "b", 0.0)] + [("b", "c", 0.0)] * 500 + [("c", "d", 0.999)]
    ratings = fit_elo("abcd", comparisons, "b", samples=20)
    assert ratings["a"].elo == pytest.approx(400 * math.log10(20_000), abs=0.05)


def test_a_design_on_which_undamped_newton_steps_diverge():
    # everybody beats the anchor; among the others there is a cycle of very unequal weights
    games = {("b", "a"): 77, ("c", "a"): 4472, ("d", "a"): 1158, ("b", "c"): 4585, ("d", "b"): 3, ("c", "d"): 2}
    elo = elos(fit_elo("abcd", [(*pair, 1.0) for pair, n in games.items() for _ in range(n)], "a", samples=2))
    # at the maximum each player wins as often as the ratings expect
    for player in "bcd":
        expected = sum(n / (1 + 10 ** ((elo[j] - elo[i]) / 400)) for (i, j), n in games.items() if i == player)
        expected += sum(n / (1 + 10 ** ((elo[i] - elo[j]) / 400)) for (i, j), n in games.items() if j == player)
        assert expected == pytest.approx(sum(n for (i, _), n in games.items() if i == player), abs=0.01)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-1.5, 1.5), min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_known_strengths_are_found_whatever_the_order_and_direction(strengths, random):
    players = list(range(len(strengths)))
    comparisons = [
        (i, j, 1 / (1 + math.exp(strengths[j] - strengths[i]))) for i, j in itertools.combinations(players, 2)
    ]
    wanted = {k: (s - strengths[0]) * 400 / math.log(10) for k, s in enumerate(strengths)}
    assert elos(fit_elo(players, comparisons, 0, samples=2)) == pytest.approx(wanted, abs=0.1)
    turned = [(j, i, 1 - p) if random.random() < 0.5 else (i, j, p) for i, j, p in comparisons]
    random.shuffle(turned)
    random.shuffle(players)
    assert elos(fit_elo(players, turned, 0, samples=2)) == pytest.approx(wanted, abs=0.1)


def test_alone_with_the_anchor():
    assert fit_elo(["only"], [], "only", anchor_elo=5.0) == {"only": (5, 5, 5)}


@pytest.mark.parametrize(
    ("players", "comparisons", "anchor", "message"),
    [
        ("ab", [("a", "c", 1.0)], "a", "'c'"),
        ("ab", [("a", "a", 1.0)], "a", "comparison"),
        ("ab", [("a", "b", 1.1)], "a", "1.1"),
        ("ab", [("a", "b", math.nan)], "a", "nan"),
        ("ab", [("a", "b", 1.0)], "c", "anchor"),
        ("aab", [("a", "b", 1.0)], "a", "once"),
        ("abcd", [("a", "b", 0.5), ("c", "d", 0.5)], "a", r"\['c', 'd'\]"),
    ],
)
def test_misuse_is_refused(players, comparisons, anchor, message):
    with pytest.raises(CaiError, match=message):
        fit_elo(players, comparisons, anchor)


def test_the_prior_holds_an_undefeated_player():
    # ten wins in ten: at the maximum 10 · P(loss) = 1e-6 · s, with P(loss) = e^-s / (1 + e^-s); s = 13.51 nats
    elo = elos(fit_elo("ab", [("a", "b", 1.0)] * 10, "b", samples=2))["a"]
    s = elo * math.log(10) / 400
    assert 10 / (1 + math.exp(s)) == pytest.approx(1e-6 * s, rel=1e-3)
    assert elo == pytest.approx(2347, abs=1)


def test_a_thousand_samples_95_percent_and_seed_0_unless_told():
    comparisons = [("a", "b", (i * i % 61) / 60) for i in range(40)]  # no two samples alike
    assert fit_elo("ab", comparisons, "b") == fit_elo("ab", comparisons, "b", 0.0, 1000, 0.95, 0)


def test_every_sample_counts():
    # of two samples the whole interval has them as its ends, and the 95% one leaves 2.5% of the way at each
    comparisons = [("a", "b", float(i % 2)) for i in range(20)]
    whole = fit_elo("ab", comparisons, "b", samples=2, confidence=1.0)["a"]
    part = fit_elo("ab", comparisons, "b", samples=2)["a"]
    assert whole.low < whole.high
    margin = 0.025 * (whole.high - whole.low)
    assert (part.low, part.high) == pytest.approx((whole.low + margin, whole.high - margin))

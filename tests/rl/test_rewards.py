"""Rewards: preference models, ensembles of them, functions, and a model that only watches."""

import json
import shutil
from itertools import takewhile

import pyarrow as pa
import pytest
import torch

from cai_ray.config import PPOConfig
from cai_ray.constitution import draw, load_constitution
from cai_ray.errors import ConfigError, DataError
from cai_ray.models.checkpoints import load_causal_lm, load_scalar_model, save_pretrained
from cai_ray.models.tokenization import Tokenizer
from cai_ray.records import PROMPT, derive_seed
from cai_ray.rl.rewards import Function, Model, Reward
from cai_ray.rl.setup import Judge, Setup
from cai_ray.templates import SCORES, score_prompt
from tests.reference import values_of

from .conftest import CLUSTER

BATCH = pa.table(
    {
        "row": pa.array([0, 1, 2], pa.int32()),
        "prompt": ["p", "q", "r"],
        "response": ["one", "three", "seven"],
        "prompt_ids": pa.array([[5, 6, 7], [8], [9, 10]], pa.list_(pa.int32())),
        "response_ids": pa.array([[1, 2], [3, 4, 11], [12]], pa.list_(pa.int32())),
    }
)


def lengths(prompts, responses):
    """A reward: characters."""
    return [len(r) for r in responses]


def too_few(prompts, responses):
    """Not one for each."""
    return [1.0]


def not_finite(prompts, responses):
    """No number."""
    return [float("nan")] * len(responses)


@pytest.fixture(scope="module")
def second(policy, tmp_path_factory):
    model = load_scalar_model(policy, "float32", seed=2)
    model.config.reward_mean, model.config.reward_std = -1.0, 0.5
    out = tmp_path_factory.mktemp("models") / "second"
    save_pretrained(model.state_dict().items(), model.config, Tokenizer.load(policy), out)
    return out


def scored(policy, rewards, piece=(0, None), heldout=None, **changes):
    small = {"max_prompt_tokens": 8, "max_new_tokens": 8, "critic_init": "policy"}
    critic = {"optim": {"lr": 1e-3}, "sharding": {"dtype": "float32"}}
    config = PPOConfig(**{**small, "critic": critic, **changes})
    setup = Setup(config, policy, tuple(rewards), heldout, "auto", "cpu", 7, CLUSTER, "float32")
    return Reward("reward", 0, 1, setup).score(BATCH, piece)[0].sort_by("row").to_pydict()


def alone(folder, policy):
    """Scores of the three responses one at a time, EOS appended where it is missing."""
    model, eos = load_scalar_model(folder, "float32"), Tokenizer.load(policy).eos_id
    out = []
    for row in BATCH.to_pylist():
        ids = row["prompt_ids"] + row["response_ids"]
        out.append(float(values_of(model, ids if ids[-1] == eos else [*ids, eos])[-1]))
    return torch.tensor(out, dtype=torch.float64)


def test_scores_are_each_model_s_own_in_its_own_spread(policy, reward_model, second):
    raw = [alone(folder, policy) for folder in (reward_model, second)]
    own = [(raw[0] - 0.25) / 2.0, (raw[1] + 1.0) / 0.5]
    one = scored(policy, [reward_model])
    assert one["row"] == [0, 1, 2]
    assert one["score_raw"] == pytest.approx(raw[0].tolist(), abs=1e-5)
    assert one["score"] == pytest.approx(own[0].tolist(), abs=1e-5)
    pieces = [scored(policy, [reward_model], piece) for piece in ((0, 2), (2, 1))]
    assert [row for piece in pieces for row in piece["row"]] == [0, 1, 2]
    assert [x for piece in pieces for x in piece["score"]] == pytest.approx(one["score"], abs=1e-5)
    both = scored(policy, [reward_model, second])
    assert both["score"] == pytest.approx(((own[0] + own[1]) / 2).tolist(), abs=1e-5)
    assert both["score_raw"] == pytest.approx(((raw[0] + raw[1]) / 2).tolist(), abs=1e-5)
    least = scored(policy, [reward_model, second], ensemble="min")
    assert least["score"] == pytest.approx(torch.minimum(*own).tolist(), abs=1e-5)
    watched = scored(policy, [reward_model], heldout=second)
    assert watched["heldout"] == pytest.approx(own[1].tolist(), abs=1e-5)
    assert watched["score"] == one["score"]


def test_each_of_a_policys_ends_is_read_as_the_one_that_was_learned(policy, reward_model):
    config = PPOConfig(critic={"optim": {"lr": 1e-3}, "sharding": {"dtype": "float32"}})
    model = Model(reward_model, Setup(config, policy, (), None, "auto", "cpu", 7, CLUSTER, "float32"))
    model._tokenizer.eos_ids = frozenset({model._tokenizer.eos_id, 17})
    ends = ([], [model._tokenizer.eos_id], [17])
    responses = pa.array([[4, 5, *end] for end in ends], pa.list_(pa.int32()))
    own, learned, other = model.raw(pa.table({"prompt_ids": pa.array([[5, 6]] * 3), "response_ids": responses}))
    assert own == pytest.approx(learned, abs=1e-6)
    assert other == pytest.approx(learned, abs=1e-6)


def test_a_function_scores_responses(policy):
    assert scored(policy, [f"{__name__}:lengths"])["score"] == [3.0, 5.0, 5.0]


def test_a_function_that_is_not_there_or_answers_badly_is_an_error():
    for name in ("no.such.module:f", "no..module:f", f"{__name__}:nothing"):
        with pytest.raises(ConfigError, match=r"cannot be imported"):
            Function(name)
    for name, words in (("too_few", "1 scores for 3"), ("not_finite", "3 of them not finite")):
        with pytest.raises(DataError, match=words):
            Function(f"{__name__}:{name}").raw(BATCH)


def test_a_model_without_its_scale_is_refused(policy, reward_model, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    for path in reward_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    del config["reward_std"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="reward_std None"):
        scored(policy, [folder], (0, 1))
    assert scored(policy, [folder], (0, 1), normalize_scores=False)["row"] == [0]


def test_a_model_that_learned_other_prompts_is_refused(policy, reward_model, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(policy, plain)
    model = load_causal_lm(policy, "float32")
    save_pretrained(model.state_dict().items(), model.config, Tokenizer.load(policy, "plain"), plain)
    with pytest.raises(DataError, match=r"\(plain\) and the preference model .* \(chat\) write one conversation"):
        scored(plain, [reward_model])
    with pytest.raises(DataError, match="write one conversation in different tokens"):
        scored(plain, [f"{__name__}:lengths"], heldout=reward_model)


def test_a_feedback_model_rates_each_response_under_its_principle(policy):
    constitution = load_constitution("default")
    messages = [[{"role": "user", "content": text}] for text in ("How do I bake bread?", "Why?", "A joke, please.")]
    batch = BATCH.append_column("messages", pa.array(messages, PROMPT.field("messages").type))
    batch = batch.append_column("prompt_id", pa.array(["a", "b", "b"])).append_column("step", pa.array([4, 4, 4]))
    config = PPOConfig(critic_init="policy", critic={"optim": {"lr": 1e-3}, "sharding": {"dtype": "float32"}})
    judge = Judge(policy, "plain", constitution)
    setup = Setup(config, policy, (judge,), None, "auto", "cpu", 7, CLUSTER, "float32")
    answer, sums = Reward("reward", 0, 1, setup).score(batch)
    tokenizer, model, expected = Tokenizer.load(policy, "plain"), load_causal_lm(policy, "float32"), []

    def after(ids, token):
        with torch.no_grad():
            return float(torch.softmax(model(torch.tensor([ids])).logits[0, -1], -1)[token])

    for row in batch.to_pylist():
        principle = draw(constitution.for_feedback(), derive_seed(7, row["prompt_id"], "ppo/reward/4"))
        prompt = score_prompt(row["messages"], principle.preference_question, row["response"])
        ids, scores = tokenizer.prompt(prompt), [tokenizer.text(s) for s in SCORES]
        shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*scores, strict=False)))
        start, tails = ids + scores[0][:shared], [s[shared:] for s in scores]
        ten, zero = tails[9][0], tails[9][1]
        mass = [after(start, tail[0]) for tail in tails]
        stays = after([*start, ten], zero)
        mass[0], mass[9] = mass[0] * (1 - stays), mass[9] * stays
        mean = sum(m * (2 * k / 9 - 1) for k, m in enumerate(mass)) / sum(mass)
        expected.append(-mean if principle.inverted else mean)
    assert answer.sort_by("row")["score"].to_pylist() == pytest.approx(expected, abs=1e-5)
    assert sums == {name: pytest.approx(sum(expected), abs=1e-5) for name in ("score_raw", "score")} | {"rows": 3}

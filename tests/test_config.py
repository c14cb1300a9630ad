"""The configuration: overrides, unknown keys, what enters a stage's key."""

import json
from pathlib import Path

import pytest
import yaml

from cai_ray.config import Config, Section
from cai_ray.config_files import load_config, parse_config, to_yaml
from cai_ray.errors import ConfigError

MODELS = {"helpful": "embedded", "pretrained": "embedded"}


def test_overrides_are_yaml_values_and_reach_nested_sections() -> None:
    config = load_config("tiny", ("ppo.kl_coef=1e-2", "sft.optim.lr=5e-4", "ppo.value_clip_range=null", "run.seed=7"))
    assert config.ppo.kl_coef == 0.01
    assert config.sft.optim.lr == 5e-4
    assert config.ppo.value_clip_range is None
    assert config.run.seed == 7
    assert config.run.name == "tiny"


def test_what_names_something_stays_text() -> None:
    assert load_config("tiny", ("run.name=2025-06-01",)).run.name == "2025-06-01"
    for text in ("7", "0123", "1234567", "12e5678", "1_000", "1.50"):
        config = load_config("tiny", (f"run.name={text}", f"models.helpful.revision={text}", "ppo.steps=7"))
        assert (config.run.name, config.models.helpful.revision, config.ppo.steps) == (text, text, 7)
    tree = {"models": {**MODELS, "helpful": {"path": "someone/mine", "revision": 1234567}}}
    assert parse_config(tree).models.helpful.revision == "1234567"


def test_override_of_a_short_form_keeps_what_it_named() -> None:
    config = load_config("tiny", ("constitution.critique.only=[privacy]", "models.feedback=embedded"))
    assert config.constitution.critique.file == "default"
    assert config.constitution.critique.only == ("privacy",)
    assert config.models.feedback is not None
    assert config.models.feedback.path == "embedded"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("ppo.kl_coeff=1", "did you mean 'kl_coef'"),
        ("models.helpfull=x", "did you mean 'helpful'"),
        ("sft.optim.lrr=1", "did you mean 'lr'"),
        ("qqqq.x=1", "known: cluster, constitution"),
        ("ppo.clip_range=-1", "greater than 0"),
        ("ppo.minibatch_size=3", "no multiple"),
        ("ppo.advantage=rloo", "rloo compares samples of a prompt: set samples_per_prompt to 2 or more"),
        ("ppo={advantage: grpo, samples_per_prompt: 2, critic_warmup_steps: 1}", "no critic to warm up"),
        ("ppo.critic_warmup_steps=3", "critic_warmup_steps 3 leaves none of 3 steps"),
        ("ppo.reward=my.module:score", "no preference model for the critic to start from"),
        ("ppo={kl_target: 5, kl_horizon: 20}", "kl_horizon 20 is not above a fifth"),
        ("ppo={kl_target: 5, kl_coef: 0}", "kl_coef, which is 0"),
        ("ppo={on_kl_limit: roll_back, kl_coef: 0}", "kl_coef, which is 0"),
        ("ppo.lora_sync=adapter", "needs actor.lora"),
        ("sft.rounds=[0]", "beyond the rounds 1 to 2"),
        ("sft.rounds=[2, 3]", "beyond the rounds 1 to 2"),
        ("preference_model.data=[{path: a, column: b}]", "leave it out"),
        ("preference_model.data=[{path: label, limit: 3}]", "sample_pairs.share"),
        ("preference_model.data=[{path: a, weight: 2}, {path: a, limit: 3}]", "names a source twice"),
        ("label.gold={path: a, column: b}", "leave it out"),
        ("ppo.kl_penalty=k1_loss", "'reward', 'k2_loss' or 'k3_loss'"),
        ("ppo.dual_clip=1", "greater than 1"),
        ("label.samples_per_pair=2", "without reasoning every sample is the same"),
        ("label.chain_of_thought=true", "belongs to format rlaif, the format is plain"),
        ("label={format: score, swap: true}", "one response at a time"),
        ("label={hard: true, clamp: [0.4, 0.6]}", "cannot be combined with hard"),
        ("label.clamp=[0.6, 0.4]", "needs low <= high"),
        ("label.clamp=[-0.1, 0.6]", "greater than or equal to 0"),
        ("ppo", "key.sub=value"),
        ("ppo.steps.more=1", "not a section"),
        ("run.name=../escape", "run.name"),
        ("revise.share=[0.5, 0.5]", r"share \[0.5, 0.5\] is empty"),
        ("ppo.share=[0.7, 0.2]", "low below high"),
        ("sample_pairs.share=[-0.1, 1]", "greater than or equal to 0"),
        ("sample_pairs.responses_per_prompt=1", "greater than or equal to 2"),
        ("sample_pairs.pairs=chain", "'all' or 'ring'"),
        ("revise.too_long=cut", "'quarantine' or 'truncate'"),
        ("ppo.too_long=truncate", "unknown key"),  # PPO quarantines
        ("revise.unusable=drop", "'keep', 'retry' or 'quarantine'"),
        ("revise.principles=once", "'with_replacement' or 'without_replacement'"),
        ("prompts.generate=[{n: 4}]", "kind: is required"),
        ("prompts.generate=[{kind: harmful, n: 0}]", "greater than 0"),
        ("prompts.generate=[{kind: harmful, n: 4, few_shots: 0}]", "greater than 0"),
        ("prompts.generate=[{kind: harmful, n: 4, model: sft}]", "'pretrained', 'helpful' or 'feedback'"),
        ("prompts.generate=[{kind: harmful, n: 4, few_shot: 3}]", "did you mean 'few_shots'"),
        ("prompts.harmful=[{path: a, limitt: 3}]", "did you mean 'limit'"),
        ("sft.lora.rnk=1", "did you mean 'rank'"),
        ("ppo.actor.sharding.rankss=1", "did you mean 'ranks'"),
        ("models.feedback.revison=x", "did you mean 'revision'"),
        ("constitution.critique.onli=[x]", "did you mean 'only'"),
    ],
)
def test_bad_overrides_say_what_to_mend(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        load_config("tiny", (override,))


def test_adapters_go_to_engines_alone_where_merging_would_lose_them() -> None:
    def rank(dtype: str, *more: str) -> int:
        actor = f"ppo.actor={{lora: {{rank: 24}}, optim: {{lr: 1e-4}}, sharding: {{dtype: {dtype}}}}}"
        return load_config("tiny", (actor, *more)).ppo.adapter_rank

    assert (rank("bfloat16"), rank("float32")) == (24, 0)
    assert (rank("bfloat16", "ppo.lora_sync=merged"), rank("float32", "ppo.lora_sync=adapter")) == (0, 24)
    assert load_config("tiny").ppo.adapter_rank == 0


def test_prompts_to_generate_are_read_and_count_in_the_identity() -> None:
    config = load_config("tiny", ("prompts.generate=[{kind: harmful, n: 4}]", "ppo.share=[0.5, 1]"))
    (wanted,) = config.prompts.generate
    assert (wanted.model, wanted.few_shots, wanted.temperature) == ("pretrained", 5, 1.0)
    assert config.ppo.share == (0.5, 1.0)
    assert config.prompts.identity() != load_config("tiny").prompts.identity()


def test_a_missing_file_is_answered_with_the_shipped_names() -> None:
    with pytest.raises(ConfigError, match="tiny"):
        load_config("no-such-config")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models: [", "not readable as YAML"),
        ("- 1", "holds list"),
        ("run: {name: x}", "models: is required"),
        ("run: {seed: 1}\nmodels: {}\nrun: {seed: 2}", "the key 'run' is given twice"),
        ("run: {name: 2025-13-01}", "not readable as YAML in UTF-8: month"),
        ("run: mine", r"run: .*got 'mine'"),
    ],
)
def test_unreadable_files(tmp_path: Path, text: str, words: str) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=words):
        load_config(str(bad))


def test_resolved_yaml_reads_back_to_the_same_configuration() -> None:
    config = load_config("tiny")
    assert parse_config(yaml.safe_load(to_yaml(config))) == config


def test_operational_fields_never_enter_the_identity() -> None:
    base = parse_config({"models": MODELS})
    moved = parse_config(
        {
            "models": {name: {"path": path, "dtype": "float32"} for name, path in MODELS.items()},
            "cluster": {"engines": 4, "device": "gpu"},
            "sft": {"sharding": {"ranks": 8, "zero_stage": 3}, "checkpoint_every": 3},
            "ppo": {"engines": 2, "actor": {"optim": {"lr": 1e-6}, "sharding": {"ranks": 2}}},
        }
    )
    assert moved.identity() == base.identity()
    changed = parse_config({"models": MODELS, "ppo": {"kl_coef": 0.1}})
    assert changed.identity() != base.identity()


def test_every_field_has_a_description_and_is_frozen() -> None:
    def walk(section: type[Section]) -> list[type[Section]]:
        found = [section]
        for info in section.model_fields.values():
            assert info.description, f"{section.__name__} has a field without description"
            for candidate in [info.annotation, *getattr(info.annotation, "__args__", ())]:
                if isinstance(candidate, type) and issubclass(candidate, Section):
                    found += walk(candidate)
        return found

    assert len(walk(Config)) > 12
    with pytest.raises(ValueError, match="frozen"):
        parse_config({"models": MODELS}).run.seed = 3  # type: ignore[misc]


def test_which_label_formats_reason() -> None:
    for settings, reasons in (
        ("{format: cot, samples_per_pair: 3}", True),
        ("{format: rlaif, chain_of_thought: true, samples_per_pair: 3}", True),
        ("{format: rlaif}", False),
        ("{format: score}", False),
    ):
        assert load_config("tiny", (f"label={settings}",)).label.reasons == reasons


def test_the_gate_decides_nothing_about_labels() -> None:
    off, stop = (load_config("tiny", (f"label.judge_gate={mode}",)).label for mode in ("off", "stop"))
    assert (off.judge_gate, stop.judge_gate) == ("off", "stop")  # YAML 1.1 reads off as false
    assert off.identity() == stop.identity()
    assert load_config("tiny", ("label.gold=mine.jsonl",)).label.identity() != off.identity()


def test_yaml_s_on_and_off_are_words(tmp_path: Path) -> None:
    for word in ("on", "off"):
        config = load_config("tiny", (f"tracking.wandb={word}",))
        assert config.tracking.wandb == word
        (tmp_path / "again.yaml").write_text(to_yaml(config))
        assert load_config(str(tmp_path / "again.yaml")).tracking.wandb == word
    with pytest.raises(ConfigError, match="judge_gate"):
        load_config("tiny", ("label.judge_gate=on",))


def deepspeed_of(given: object, **sharding: object) -> Config:
    section = {"batch_size": 24, "sharding": {"deepspeed": given, **sharding}}
    return parse_config({"models": MODELS, "preference_model": section})


def test_a_deepspeed_file_is_read_once_and_auto_means_ours(tmp_path: Path) -> None:
    expected = {"steps_per_print": 7, "train_batch_size": 24, "bf16": {"enabled": True}, "zero_optimization": {}}
    (tmp_path / "ds.json").write_text(json.dumps({**expected, "zero_optimization": {"stage": "auto"}}))
    config = deepspeed_of(str(tmp_path / "ds.json"))
    assert config.preference_model.sharding.deepspeed == expected
    assert parse_config(yaml.safe_load(to_yaml(config))) == config
    with pytest.raises(ConfigError, match=r"nonesuch\.json is not a readable JSON file"):
        deepspeed_of("nonesuch.json")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage to 3, but sharding.zero_stage is 2"),
        ({"bf16": {"enabled": False}}, "bf16.enabled to False, but sharding.dtype is bfloat16"),
        ({"fp16": {"enabled": True}}, "fp16.enabled to True, but sharding.dtype is bfloat16"),
        ({"gradient_clipping": 5}, "gradient_clipping to 5, but optim.max_grad_norm is 1.0"),
        ({"train_batch_size": 64}, "train_batch_size to 64, but the batch size is 24"),
        ({"train_micro_batch_size_per_gpu": 4}, "to 4, but a micro-batch is at most 8192 tokens"),
        ({"gradient_accumulation_steps": 2}, "to 2, but a micro-batch is at most 8192 tokens"),
        ({"optimizer": {"type": "Lion"}}, "'Lion'}, but optim is AdamW with lr 1e-05"),
        ({"scheduler": {"type": "OneCycle"}}, "'OneCycle'}, but optim.schedule is linear"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "'bf16'}, but gradients add up in float32"),
        ({"zero_force_ds_cpu_optimizer": True}, "to True, but optim is PyTorch's AdamW"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "but sharding.offload_parameters is false"),
    ],
)
def test_deepspeed_options_that_contradict_the_configuration_name_both_values(given: dict, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        deepspeed_of(given, zero_stage=2)
    assert words in str(caught.value)
    with pytest.raises(ConfigError, match="but") as caught:
        parse_config({"models": MODELS, "ppo": {"critic": {"optim": {"lr": 1}, "sharding": {"deepspeed": given}}}})


def test_states_are_offloaded_where_zero_can() -> None:
    assert deepspeed_of(None, zero_stage=3, offload_parameters=True).preference_model.sharding.offload_parameters
    with pytest.raises(ConfigError, match="offload_optimizer needs zero_stage 1, 2 or 3, zero_stage is 0"):
        deepspeed_of(None, zero_stage=0, offload_optimizer=True)
    with pytest.raises(ConfigError, match="offload_parameters needs zero_stage 3, zero_stage is 2"):
        deepspeed_of(None, zero_stage=2, offload_parameters=True)

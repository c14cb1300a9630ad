"""The configuration: frozen, typed, one sentence under each field; unknown keys are refused with the nearest known one.

A field marked operational (`Op`) says where and how fast something runs, never what comes out: it does not enter a
stage's key, so one run directory moves from a laptop to a cluster. This module imports neither torch nor ray.
"""

import os
import re
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from cai_ray.config_base import Fraction, OneOrMore, Op, Section, YamlWord, from_string
from cai_ray.sharding import Lora, Optim, Sharding, check_options

FEEDBACK = "feedback_model"  # as a reward: it rates each response
FUNCTION = re.compile(r"(?!run:)[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # module:function, as a reward
VERDICT_TOKENS = 24  # at most: what asks for the verdict after a rationale


class Run(Section):
    """What the run is called and where it lives."""

    name: Op[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]] = "run"
    """Name of the run; its directory is dir/name."""
    dir: Op[str] = "runs"
    """Folder that holds run directories; on a cluster, a file system that every node mounts."""
    seed: NonNegativeInt = 0
    """Seed of every random choice, combined with each row's id."""
    max_bad_fraction: Fraction = 0.01
    """A stage fails when more than this share of rows is bad."""


class ModelSpec(Section):
    """One model: a hub id, a folder, `embedded` (ships with the quickstart) or `run:DIR/stage`."""

    path: str
    """Hub id, folder, `embedded`, or `run:DIR/stage`."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    format: Literal["auto", "plain", "chat"] = "auto"
    """Prompt format; auto is chat where the tokenizer has a chat template, else plain."""
    dtype: Op[Literal["bfloat16", "float32"]] = "bfloat16"
    """Precision in which engines hold the weights."""


Model = Annotated[ModelSpec, from_string("path")]


class Models(Section):
    """The models of the run; a stage names one of these keys or an earlier stage."""

    helpful: Model
    """Helpful-only assistant: answers, criticises and revises."""
    pretrained: Model
    """Pretrained model that the supervised stage fine-tunes."""
    feedback: Model | None = None
    """Judge of response pairs; the pretrained model by default."""
    preference_base: Model | None = None
    """What the preference model starts from; the SL model by default."""


class Principles(Section):
    """Which principles of which constitution a stage draws from."""

    file: str = "default"
    """Shipped constitution's name or a path to a YAML file."""
    only: tuple[str, ...] | None = None
    """Keep only principles with one of these ids or tags."""
    without: tuple[str, ...] = ()
    """Leave out principles with one of these ids or tags."""


class ConstitutionConfig(Section):
    """The constitutions behind critiques and behind feedback."""

    critique: Annotated[Principles, from_string("file")] = Principles()
    """For `revise`."""
    feedback: Annotated[Principles, from_string("file")] = Principles()
    """For `label`."""


class Cluster(Section):
    """Where it runs."""

    device: Op[Literal["auto", "cpu", "gpu"]] = "auto"
    """auto takes GPUs where Ray sees any."""
    address: Op[str | None] = None
    """Address of a running Ray cluster; RAY_ADDRESS counts too; none starts one here."""
    engines: Op[PositiveInt] = 1
    """vLLM engines that work side by side."""
    max_engines: Op[PositiveInt | None] = None
    """Engines that may join a stage while it runs, as the cluster grows to hold them; none is `engines`."""
    tensor_parallel_size: Op[PositiveInt] = 1
    """GPUs of one engine."""
    kv_cache_gib: Op[PositiveFloat] = 1.0
    """KV cache of a CPU engine, GiB."""
    gpu_memory_utilization: Op[Annotated[float, Field(gt=0, lt=1)]] = 0.85
    """Share of a GPU's memory that an engine may take."""
    max_num_seqs: Op[PositiveInt] = 128
    """Sequences in one engine's continuous batch."""
    rows_per_block: Op[PositiveInt] = 32
    """Rows that are sent to an engine together."""
    start_timeout_s: Op[PositiveFloat] = 600
    """Longest wait for a worker or an engine to start, seconds."""
    step_timeout_s: Op[PositiveFloat] = 1800
    """Longest wait for one answer of a worker, seconds."""

    @model_validator(mode="after")
    def _range(self) -> "Cluster":
        if self.max_engines and self.max_engines < self.engines:
            raise ValueError(f"max_engines {self.max_engines} is below engines {self.engines}")
        return self

    @property
    def joined(self) -> str | None:
        """The address of the Ray cluster that a run joins; none: it starts one of its own."""
        return self.address or os.environ.get("RAY_ADDRESS")


class Source(Section):
    """Where rows come from."""

    path: str
    """`starter:NAME`, a file (jsonl, json, csv, parquet, also .gz), a folder, or `hf:NAME[:SPLIT]`."""
    limit: PositiveInt | None = None
    """Take only this many rows, the first by id."""
    column: str | None = None
    """Column of a prompt; none looks for messages, prompt, chosen."""


class Comparisons(Source):
    """Where comparisons come from, and how much they count."""

    weight: PositiveFloat = 1.0
    """Times that each training row of it comes in an epoch; 0.5 takes half of them, 1.5 repeats half, by a hash of
    their ids."""

    @model_validator(mode="after")
    def _has_columns(self) -> "Comparisons":
        _no_column(self)
        if self.path == "label" and self.limit:
            raise ValueError("limit does not apply to label: sample_pairs.share takes fewer prompts")
        return self


def _no_column(source: Source) -> None:
    if source.column:
        raise ValueError(
            "column names a prompt; comparisons have chosen, rejected, and prompt or messages: leave it out"
        )


SourceItem = Annotated[Source, from_string("path")]
ComparisonsItem = Annotated[Comparisons, from_string("path")]


class Sampling(Section):
    """Length and temperature of what is sampled; top_p is 1 and top_k off throughout."""

    max_prompt_tokens: Annotated[int, Field(ge=8)] = 1024
    """Longer prompts are quarantined, tokens."""
    max_new_tokens: PositiveInt = 128
    """Longest response, tokens."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature."""

    @property
    def max_tokens(self) -> int:
        """The longest prompt and response together."""
        return self.max_prompt_tokens + self.max_new_tokens


class GeneratePrompts(Sampling):
    """New prompts that a model writes as one more line below a list of given ones."""

    kind: Literal["harmful", "helpful"]
    """Which prompts are shown to the model, and what the new ones count as."""
    n: PositiveInt
    """Prompts asked for; those that repeat a prompt or come out empty or unfinished are dropped and counted."""
    few_shots: PositiveInt = 5
    """Prompts in each list, drawn from training prompts of one turn and max_prompt_tokens / few_shots bytes."""
    model: Literal["pretrained", "helpful", "feedback"] = "pretrained"
    """Key of `models`."""


class PromptsConfig(Section):
    """`prompts`: one row per human turn, deduplicated, split by a hash of the first human turn."""

    harmful: tuple[SourceItem, ...] = (Source(path="starter:red_team"),)
    """Sources of red-team prompts."""
    helpful: tuple[SourceItem, ...] = (Source(path="starter:helpful"),)
    """Sources of helpful prompts."""
    generate: tuple[GeneratePrompts, ...] = ()
    """Prompts that a model adds to these."""

    @property
    def max_tokens(self) -> int:
        """The longest list of prompts and the line that is added to it."""
        return max((g.max_tokens for g in self.generate), default=0)


def _ascending(share: tuple[float, float]) -> tuple[float, float]:
    if share[0] >= share[1]:
        raise ValueError(f"the share {list(share)} is empty, expected [low, high] with low below high")
    return share


Share = Annotated[tuple[Fraction, Fraction], AfterValidator(_ascending)]


TooLong = Literal["quarantine", "truncate"]


class Answering(Sampling):
    """What `revise` and `sample_pairs` share."""

    too_long: TooLong = "quarantine"
    """What becomes of a row with a prompt above max_prompt_tokens; truncate drops its conversation's earliest pairs of
    turns, never a system turn, the last turn or an example, and quarantines it where that is not enough."""
    share: Share = (0.0, 1.0)
    """Takes the prompts whose id's hash, a number in [0, 1), is at least the first and below the second figure."""


class ReviseConfig(Answering):
    """`revise`: response, then rounds of critique and revision by the helpful model."""

    rounds: PositiveInt = 4
    """Critique-revision rounds per harmful prompt."""
    critique: bool = True
    """Ask for a critique before each revision; false asks for the revision directly."""
    principles: Literal["with_replacement", "without_replacement"] = "with_replacement"
    """How a row's rounds draw their principles; without replacement, all come once before any comes again."""
    unusable: Literal["keep", "retry", "quarantine"] = "retry"
    """What becomes of a text that is empty, leaks a turn marker or a control token, or, for a revision, copies the
    response before it or leaks its critique: kept and flagged, or sampled once more with another seed and flagged when
    that is no better, or the row is quarantined. A response or revision that stays empty is quarantined in any case. A
    text that was cut at its token limit is flagged and counts as usable."""
    max_critique_tokens: PositiveInt = 128
    """Longest critique, tokens."""
    few_shots: NonNegativeInt = 2
    """Examples from the constitution before each critique or direct revision."""
    helpful_samples_per_prompt: NonNegativeInt = 2
    """Answers sampled for each helpful prompt."""

    @property
    def max_tokens(self) -> int:
        """The longest prompt and what is sampled after it."""
        return self.max_prompt_tokens + max(self.max_new_tokens, self.max_critique_tokens)


class Learner(Section):
    """How a model is trained: `sft`, `preference_model`, and each trained role of PPO."""

    optim: Optim
    """Optimizer and schedule."""
    sharding: Op[Sharding] = Sharding()
    """Layout over ranks."""
    lora: Lora | None = None
    """Train low-rank adapters; the model that is written has them merged, and they lie beside it in adapter/."""


class Training(Learner):
    """What `sft` and `preference_model` share."""

    epochs: PositiveFloat = 1.0
    """Passes over the training rows."""
    batch_size: PositiveInt = 32
    """Rows, or pairs, of one optimizer step over all ranks."""
    max_tokens: Annotated[int, Field(ge=16)] = 2048
    """Longest row, tokens; longer ones lose the prompt's left end, and are counted."""
    checkpoint_every: Op[PositiveInt] = 100
    """Optimizer steps between checkpoints."""
    checkpoint_minutes: Op[PositiveFloat] = 15.0
    """Longest time between checkpoints, minutes."""
    keep_checkpoints: Op[PositiveInt] = 1
    """Checkpoints that are kept while the stage runs: the last, and above 1 those with the lowest held-out loss."""

    @model_validator(mode="after")
    def _deepspeed(self) -> "Training":
        check_options(self.sharding, self.optim, self.batch_size)
        return self


class Mix(Section):
    """How often a row is trained on in an epoch: 2 is twice, 0.5 takes half of all rows, by a hash of their ids."""

    revisions: NonNegativeFloat | Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)] = 1.0
    """Weight of the revisions, or one for each round; rounds beyond take the last."""
    helpful: NonNegativeFloat = 1.0
    """Weight of the helpful samples."""


class SftConfig(Training):
    """`sft`: fine-tunes the pretrained model on revisions and helpful samples."""

    init: str = "pretrained"
    """Key of `models`, or a path."""
    rounds: Literal["all", "last"] | tuple[int, ...] = "all"
    """Which revisions are trained on, counted from 1."""
    mix: Mix = Mix()
    """Weights of revisions and helpful samples."""
    packing: Op[bool] = True
    """Rows of a micro-batch stand in one row without padding, and none sees another; false pads rows of like length."""
    optim: Optim = Optim(lr=1e-5, schedule="cosine", warmup_fraction=0.03)
    """Optimizer and schedule."""


class SamplePairsConfig(Answering):
    """`sample_pairs`: the SL model answers each harmful prompt several times; its answers are paired."""

    model: str = "sft"
    """`sft`, a key of `models`, or a path."""
    responses_per_prompt: Annotated[int, Field(ge=2, le=26)] = 2
    """Answers sampled for each prompt."""
    pairs: Literal["all", "ring"] = "all"
    """Which of a prompt's K answers are paired: all K(K-1)/2 pairs, or each answer with the next and the last with the
    first, K pairs that still link every answer to every other."""


class LabelConfig(Section):
    """`label`: the feedback model says which response is better, as a multiple choice under a principle."""

    format: Literal["auto", "plain", "chat", "cot", "rlaif", "score"] = "plain"
    """How it is asked: plain or chat multiple choice (auto follows the feedback model's format), cot with reasoning
    first; rlaif numbers the responses, score rates each alone from 1 to 10 (both as in arXiv 2309.00267)."""
    chain_of_thought: bool = False
    """rlaif only: let the model reason before it chooses."""
    few_shots: NonNegativeInt = 0
    """Examples from the constitution before each question; for score those that carry scores."""
    principles_per_pair: PositiveInt = 1
    """Independent draws of a principle, averaged."""
    swap: bool = False
    """Ask in both orders and average: removes the preference for a letter."""
    samples_per_pair: PositiveInt = 1
    """Rationales sampled for each principle and order, averaged; needs cot or chain_of_thought."""
    hard: bool = False
    """Labels of 0 or 1, by the average; one of exactly 0.5 stays."""
    clamp: tuple[Fraction, Fraction] | None = None
    """Limits of the averaged label, as (0.4, 0.6) for cot."""
    ranking: bool = False
    """Replaces a prompt's labels by those of the one Bradley-Terry ranking of its responses that fits them best, which
    contradicts itself nowhere (`sample_pairs.responses_per_prompt` of 3 or more)."""
    max_prompt_tokens: Annotated[int, Field(ge=8)] = 3072
    """Longest question, tokens."""
    too_long: TooLong = "quarantine"
    """What becomes of a pair with a longer question; truncate drops its conversation's earliest pairs of turns."""
    max_rationale_tokens: PositiveInt = 256
    """Longest chain of thought, tokens."""
    judge_gate: Op[Annotated[Literal["off", "warn", "stop"], YamlWord]] = "warn"
    """What happens when the feedback model, asked in the same way, is not above chance on `gold`; labels are the same
    whatever it says."""
    gold: SourceItem = Source(path="starter:judge_gold")
    """Comparisons (chosen, rejected) on which people agree."""

    @property
    def reasons(self) -> bool:
        """Whether a rationale is sampled before the choice."""
        return self.format == "cot" or self.chain_of_thought

    @property
    def max_tokens(self) -> int:
        """The longest sequence: the question, the rationale and what asks for the verdict, the choice."""
        return self.max_prompt_tokens + (self.max_rationale_tokens + VERDICT_TOKENS if self.reasons else 0) + 8

    @model_validator(mode="after")
    def _agree(self) -> "LabelConfig":
        _no_column(self.gold)
        if self.chain_of_thought and self.format != "rlaif":
            raise ValueError(f"chain_of_thought belongs to format rlaif, the format is {self.format}")
        if self.samples_per_pair > 1 and not self.reasons:
            raise ValueError(
                f"samples_per_pair is {self.samples_per_pair}, but without reasoning every sample is the same; "
                "use format cot, or rlaif with chain_of_thought"
            )
        if self.swap and self.format == "score":
            raise ValueError("swap has no meaning with format score, which shows one response at a time")
        if self.clamp and (self.hard or self.clamp[0] > self.clamp[1]):
            raise ValueError(f"clamp {self.clamp} needs low <= high and cannot be combined with hard")
        return self


class PreferenceModelConfig(Training):
    """`preference_model`: soft-label Bradley-Terry on AI-harmless and human-helpful comparisons."""

    init: str = "auto"
    """`auto` is models.preference_base, else the SL model; or a key of `models`, or a path."""
    data: tuple[ComparisonsItem, ...] = (Comparisons(path="label"), Comparisons(path="starter:helpful_comparisons"))
    """`label` and files of comparisons."""
    center_coef: NonNegativeFloat = 0.0
    """Weight of the squared sum of a pair's scores, which keeps scores near 0."""
    margin: NonNegativeFloat = 0.0
    """Lead of the better answer's score that the loss asks for."""
    optim: Optim = Optim(lr=1e-5, schedule="linear", warmup_fraction=0.03)
    """Optimizer and schedule."""

    @model_validator(mode="after")
    def _each_once(self) -> "PreferenceModelConfig":
        if len({source.path for source in self.data}) < len(self.data):
            raise ValueError("data names a source twice: its rows count once, by one limit and one weight")
        return self


class PPOConfig(Sampling):
    """`ppo`: the policy against the preference model, with a KL penalty to the SL model."""

    init: str = "sft"
    """Policy's start and reference: `sft`, a key of `models`, or a path."""
    reward: Annotated[tuple[str, ...], OneOrMore, Field(min_length=1)] = ("preference_model",)
    """What scores responses, one or several: `preference_model`, a path to one, `feedback_model`, `module:function`."""
    ensemble: Literal["mean", "min"] = "mean"
    """What becomes of the scores of several rewards."""
    heldout_reward: str | None = None
    """A preference model that only watches: a reward that rises while its score falls is being exploited."""
    advantage: Literal["gae", "rloo", "grpo"] = "gae"
    """gae has a critic; rloo and grpo compare the samples of each prompt and have none."""
    critic_init: Literal["reward", "policy"] = "reward"
    """The critic starts from the (first) preference model or the policy."""
    critic_warmup_steps: NonNegativeInt = 0
    """First steps, in which only the critic learns."""
    steps: PositiveInt = 100
    """Iterations of rollout and update."""
    rollout_batch_size: PositiveInt = 128
    """Responses of one iteration over all ranks."""
    minibatch_size: PositiveInt = 128
    """Responses of one optimizer step over all ranks."""
    samples_per_prompt: PositiveInt = 1
    """Responses sampled for each prompt."""
    share: Share = (0.0, 1.0)
    """Takes the prompts whose id's hash, a number in [0, 1), is at least the first and below the second figure."""
    ppo_epochs: PositiveInt = 1
    """Passes over each rollout batch."""
    helpful_fraction: Fraction | None = None
    """Share of helpful prompts; none keeps the natural mix."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """GAE's discount."""
    gae_lambda: Fraction = 0.95
    """GAE's lambda."""
    kl_coef: NonNegativeFloat = 0.001
    """Weight of the KL penalty to the reference."""
    kl_penalty: Literal["reward", "k2_loss", "k3_loss"] = "reward"
    """k1 in each token's reward; or k2 or k3 as a term of the loss."""
    kl_target: PositiveFloat | None = None
    """KL towards which kl_coef is steered, nats per response; none keeps it as it is."""
    kl_horizon: PositiveFloat = 10_000
    """Responses over which a KL that is 20% off or more moves kl_coef by a fifth."""
    kl_limit: PositiveFloat | None = None
    """What a step's KL may not go above, nats per response; none is off."""
    on_kl_limit: Literal["stop", "roll_back"] = "stop"
    """stop ends the run; roll_back goes on from the checkpoint before, with twice the kl_coef."""
    clip_range: PositiveFloat | tuple[PositiveFloat, PositiveFloat] = 0.2
    """Clipping of the policy ratio to [1 - c, 1 + c]; [low, high] clips to [1 - low, 1 + high]."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bounds the loss of a negative advantage at this many times its size; none is off."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the policy's entropy, which is added to what is maximised."""
    ptx_coef: NonNegativeFloat = 0.0
    """Weight of the SL loss on `revise`'s training rows, mixed into each of the actor's steps; 0 is off."""
    old_logprobs: Literal["trainer", "rollout"] = "trainer"
    """Log-probs of the policy that sampled: the actor's, computed once more, or the engines', a forward pass less."""
    staleness: Literal[0, 1] = 0
    """1 samples a step's responses while the step before trains, from weights that are one update old."""
    importance_cap: PositiveFloat = 2.0
    """Most that a token of a stale response counts; its weight is the ratio of the two policies."""
    value_clip_range: PositiveFloat | None = 0.2
    """Clipping of the critic's updates; none is off."""
    normalize_scores: bool = True
    """Scores by the preference model's stored mean and std."""
    score_clip: PositiveFloat | None = None
    """Limit of normalised scores; none is off."""
    missing_eos_penalty: NonNegativeFloat = 0.0
    """Taken from the score of a truncated response."""
    whiten_advantages: bool = True
    """GAE's advantages, over the whole rollout batch."""
    snapshots: NonNegativeInt = 0
    """Keep the policy every so many steps; 0 keeps only the last."""
    actor: Learner = Learner(optim=Optim(lr=1e-6))
    """The policy; the reference has its dtype, micro-batches and threads."""
    critic: Learner = Learner(optim=Optim(lr=5e-6))
    """The value function, with gae; the rewards have its dtype, micro-batches and threads, with rloo and grpo too."""
    placement: Op[Literal["separate", "colocated"]] = "separate"
    """separate gives engines GPUs of their own; colocated lets engine i share a GPU with rank i of every role.

    One sleeps while the others work: an engine frees its GPU, actor and critic leave their optimizers in host memory.
    """
    engines: Op[PositiveInt] = 1
    """Rollout engines."""
    lora_sync: Op[Literal["auto", "merged", "adapter"]] = "auto"
    """What engines are sent where the actor trains adapters: all weights with them merged, or the adapters alone, which
    engines then apply beside their own weights. auto is adapter in bfloat16, where merging rounds small updates away,
    and merged in float32, which samples faster."""
    inference_ranks: Op[PositiveInt] = 1
    """Reward workers, and as many reference workers."""
    inference_sharded: Op[bool] = False
    """Cut each model of reward and reference over its workers (ZeRO-3), where one GPU is too small for it.

    A worker that dies takes PPO back to the last checkpoint then; whole models are only started again.
    """
    checkpoint_every: Op[PositiveInt] = 10
    """Steps between checkpoints of actor, critic and controller."""
    evaluate_every: Op[NonNegativeInt] = 0
    """Steps between evaluations: as many answers as a step has, to held-out prompts; 0 is never."""

    @property
    def adapter_rank(self) -> int:
        """Of the adapters that engines are sent; 0 where they are sent whole weights."""
        wanted = "adapter" if self.actor.sharding.dtype == "bfloat16" else "merged"
        alone = (wanted if self.lora_sync == "auto" else self.lora_sync) == "adapter"
        return self.actor.lora.rank if self.actor.lora and alone else 0

    @property
    def has_critic(self) -> bool:
        """Whether advantages need values."""
        return self.advantage == "gae"

    @property
    def learners(self) -> dict[str, Learner]:
        """The trained roles."""
        return {"actor": self.actor} | ({"critic": self.critic} if self.has_critic else {})

    @property
    def preference_models(self) -> tuple[str, ...]:
        """Those of the rewards that are models."""
        return tuple(name for name in self.reward if name != FEEDBACK and not FUNCTION.fullmatch(name))

    @model_validator(mode="after")
    def _sizes(self) -> "PPOConfig":
        for name, size in (("minibatch_size", self.minibatch_size), ("samples_per_prompt", self.samples_per_prompt)):
            if self.rollout_batch_size % size:
                raise ValueError(f"rollout_batch_size {self.rollout_batch_size} is no multiple of {name} {size}")
        if not self.has_critic:
            if self.samples_per_prompt < 2:
                raise ValueError(f"{self.advantage} compares samples of a prompt: set samples_per_prompt to 2 or more")
            if self.critic_warmup_steps:
                raise ValueError(f"{self.advantage} has no critic to warm up: set critic_warmup_steps to 0")
        if self.critic_warmup_steps >= self.steps:
            raise ValueError(f"critic_warmup_steps {self.critic_warmup_steps} leaves none of {self.steps} steps")
        if self.kl_target and self.kl_horizon <= 0.2 * self.rollout_batch_size:
            raise ValueError(f"kl_horizon {self.kl_horizon:g} is not above a fifth of rollout_batch_size")
        if self.critic_init == "reward" and self.has_critic and not self.preference_models:
            raise ValueError("ppo.reward has no preference model for the critic to start from: set critic_init: policy")
        if self.inference_sharded and FEEDBACK in self.reward:
            raise ValueError(f"a {FEEDBACK} as a reward cannot be sharded: set inference_sharded to false")
        if self.adapter_rank > 512 or (self.lora_sync == "adapter" and not self.actor.lora):
            raise ValueError("lora_sync: adapter needs actor.lora, of rank 512 at most")
        if not self.kl_coef and (self.kl_target or self.on_kl_limit == "roll_back"):
            raise ValueError("kl_target and on_kl_limit: roll_back multiply kl_coef, which is 0: set it above 0")
        for role in self.learners.values():
            check_options(role.sharding, role.optim, self.minibatch_size)
            if self.minibatch_size % role.sharding.ranks:
                raise ValueError(f"minibatch_size {self.minibatch_size} is no multiple of {role.sharding.ranks} ranks")
        return self

    @model_validator(mode="after")
    def _can_share(self) -> "PPOConfig":
        if self.placement == "separate":
            return self
        if self.staleness:
            raise ValueError("colocated engines sleep while the policy trains: set staleness to 0")
        if self.engines != self.actor.sharding.ranks:
            raise ValueError(
                f"colocated engines get their weights from the actor's rank on the same GPU: engines {self.engines} is "
                f"not actor.sharding.ranks {self.actor.sharding.ranks}"
            )
        learners = [role.sharding for role in self.learners.values()]
        if max(self.inference_ranks, *(role.ranks for role in learners)) > self.engines:
            raise ValueError(f"colocated roles share {self.engines} GPUs: critic or inference_ranks has more ranks")
        for role in learners:
            if role.stage == 0:
                raise ValueError("at ZeRO-0 in float32 no state can leave the GPU: set zero_stage to 1, 2 or 3")
            if role.offload_parameters:
                raise ValueError("offload_parameters and placement colocated exclude each other")
        return self


class EvaluateConfig(Sampling):
    """`evaluate`: every model of the run answers the same held-out prompts."""

    prompts: PositiveInt = 64
    """Held-out prompts of each kind, the first by id."""


class Tracking(Section):
    """Where metrics go besides metrics.jsonl."""

    wandb: Op[Annotated[Literal["auto", "on", "off"], YamlWord]] = "auto"
    """auto is on when WANDB_API_KEY or WANDB_MODE is set."""
    project: Op[str] = "cai-ray"
    """W&B project."""
    entity: Op[str | None] = None
    """W&B user or team."""


class Config(Section):
    """One run from a constitution to a policy."""

    run: Op[Run] = Run()
    """Name, folder, seed."""
    models: Models
    """Models that the stages start from."""
    constitution: ConstitutionConfig = ConstitutionConfig()
    """Principles."""
    cluster: Op[Cluster] = Cluster()
    """Where it runs."""
    prompts: PromptsConfig = PromptsConfig()
    """Stage 1."""
    revise: ReviseConfig = ReviseConfig()
    """Stage 2."""
    sft: SftConfig = SftConfig()
    """Stage 3."""
    sample_pairs: SamplePairsConfig = SamplePairsConfig()
    """Stage 4."""
    label: LabelConfig = LabelConfig()
    """Stage 5."""
    preference_model: PreferenceModelConfig = PreferenceModelConfig()
    """Stage 6."""
    ppo: PPOConfig = PPOConfig()
    """Stage 7."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Stage 8."""
    tracking: Op[Tracking] = Tracking()
    """Where metrics go."""

    @model_validator(mode="after")
    def _rounds(self) -> "Config":
        asked, there = self.sft.rounds, range(1, self.revise.rounds + 1)
        if not isinstance(asked, str) and not set(asked) <= set(there):
            raise ValueError(f"sft.rounds {asked} goes beyond the rounds 1 to {self.revise.rounds} of revise")
        return self

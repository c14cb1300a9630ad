"""The configuration: frozen, typed, one sentence under each field; unknown keys are refused with the nearest known one.

A field marked operational (`Op`) says where and how fast something runs, never what comes out: it does not enter a
stage's key, so one run directory moves from a laptop to a cluster. This module imports neither torch nor ray.
"""

import contextlib
import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from cai_ray.errors import ConfigError
from cai_ray.shipped import shipped_file, shipped_names


def Op(default: Any, description: str, **limits: Any) -> Any:
    """A field that is operational: it never changes a stage's key."""
    return Field(default, description=description, json_schema_extra={"operational": True}, **limits)


class Section(BaseModel):
    """Base of every section: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def identity(self) -> dict[str, Any]:
        """The fields that decide what comes out, as plain JSON values: all but the operational ones."""
        out: dict[str, Any] = {}
        for name, info in type(self).model_fields.items():
            if (info.json_schema_extra or {}).get("operational"):  # type: ignore[union-attr]
                continue
            value = getattr(self, name)
            out[name] = value.identity() if isinstance(value, Section) else _plain(value)
        return out


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.identity()
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def _from_string(key: str) -> Any:
    return BeforeValidator(lambda v: {key: v} if isinstance(v, str) else v)


class Run(Section):
    """What the run is called and where it lives."""

    name: str = Op("run", "Name of the run; its directory is dir/name.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    dir: str = Op("runs", "Folder that holds run directories; on a cluster, a file system that every node mounts.")
    seed: int = Field(default=0, description="Seed of every random choice, combined with each row's id.", ge=0)
    max_bad_fraction: float = Field(
        default=0.01, description="A stage fails when more than this share of rows is bad.", ge=0, le=1
    )


class ModelSpec(Section):
    """One model: a hub id, a folder, `embedded` (ships with the quickstart) or `run:DIR/stage`."""

    path: str = Field(description="Hub id, folder, `embedded`, or `run:DIR/stage`.")
    revision: str | None = Field(default=None, description="Branch, tag or commit on the hub.")
    format: Literal["auto", "plain", "chat"] = Field(
        default="auto", description="Prompt format; auto is chat where the tokenizer has a chat template, else plain."
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16", description="Precision in which engines hold the weights."
    )


Model = Annotated[ModelSpec, _from_string("path")]


class Models(Section):
    """The models of the run; a stage names one of these keys or an earlier stage."""

    helpful: Model = Field(description="Helpful-only assistant: answers, criticises and revises.")
    pretrained: Model = Field(description="Pretrained model that the supervised stage fine-tunes.")
    feedback: Model | None = Field(
        default=None, description="Judge of response pairs; the pretrained model by default."
    )
    preference_base: Model | None = Field(
        default=None, description="What the preference model starts from; the SL model by default."
    )


class Principles(Section):
    """Which principles of which constitution a stage draws from."""

    file: str = Field(default="default", description="Shipped constitution's name or a path to a YAML file.")
    only: tuple[str, ...] | None = Field(
        default=None, description="Keep only principles with one of these ids or tags."
    )
    without: tuple[str, ...] = Field(default=(), description="Leave out principles with one of these ids or tags.")


class ConstitutionConfig(Section):
    """The constitutions behind critiques and behind feedback."""

    critique: Annotated[Principles, _from_string("file")] = Field(default=Principles(), description="For `revise`.")
    feedback: Annotated[Principles, _from_string("file")] = Field(default=Principles(), description="For `label`.")


class Cluster(Section):
    """Where it runs."""

    device: Literal["auto", "cpu", "gpu"] = Op("auto", "auto takes GPUs where Ray sees any.")
    address: str | None = Op(None, "Address of a running Ray cluster; RAY_ADDRESS counts too; none starts one here.")
    engines: int = Op(1, "vLLM engines that work side by side.", ge=1)
    tensor_parallel_size: int = Op(1, "GPUs of one engine.", ge=1)
    kv_cache_gib: float = Op(1.0, "KV cache of a CPU engine, GiB.", gt=0)
    gpu_memory_utilization: float = Op(0.85, "Share of a GPU's memory that an engine may take.", gt=0, lt=1)
    max_num_seqs: int = Op(128, "Sequences in one engine's continuous batch.", ge=1)
    rows_per_block: int = Op(32, "Rows that are durable together; a crash redoes at most the blocks in flight.", ge=1)
    start_timeout_s: float = Op(600, "Longest wait for a worker or an engine to start, seconds.", gt=0)
    step_timeout_s: float = Op(1800, "Longest wait for one answer of a worker, seconds.", gt=0)


class Source(Section):
    """Where rows come from."""

    path: str = Field(
        description="`starter:NAME`, a file (jsonl, json, csv, parquet, also .gz), a folder, or `hf:NAME[:SPLIT]`."
    )
    limit: int | None = Field(default=None, description="Take only this many rows, the first by id.", ge=1)
    column: str | None = Field(
        default=None, description="Column of the prompt; none looks for messages, prompt, chosen."
    )


SourceItem = Annotated[Source, _from_string("path")]


class PromptsConfig(Section):
    """`prompts`: one row per human turn, deduplicated, split by a hash of the first human turn."""

    harmful: tuple[SourceItem, ...] = Field(
        default=(Source(path="starter:red_team"),), description="Sources of red-team prompts."
    )
    helpful: tuple[SourceItem, ...] = Field(
        default=(Source(path="starter:helpful"),), description="Sources of helpful prompts."
    )


class Sampling(Section):
    """Length and temperature of what is sampled; top_p is 1 and top_k off throughout."""

    max_prompt_tokens: int = Field(default=1024, description="Longer prompts are quarantined, tokens.", ge=8)
    max_new_tokens: int = Field(default=128, description="Longest response, tokens.", ge=1)
    temperature: float = Field(default=1.0, description="Sampling temperature.", gt=0)


class ReviseConfig(Sampling):
    """`revise`: response, then rounds of critique and revision by the helpful model."""

    rounds: int = Field(default=4, description="Critique-revision rounds per harmful prompt.", ge=1)
    max_critique_tokens: int = Field(default=128, description="Longest critique, tokens.", ge=1)
    few_shots: int = Field(default=2, description="Examples from the constitution before each critique.", ge=0)
    helpful_samples_per_prompt: int = Field(default=2, description="Answers sampled for each helpful prompt.", ge=0)


class Optim(Section):
    """AdamW and its schedule."""

    lr: float = Field(description="Peak learning rate.", gt=0)
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="What follows the warm-up; linear and cosine end at 0."
    )
    warmup_fraction: float = Field(
        default=0.0, description="Share of steps over which the rate rises from 0.", ge=0, le=1
    )
    weight_decay: float = Field(default=0.0, description="Decoupled weight decay.", ge=0)
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW moment decay rates.")
    max_grad_norm: float = Field(default=1.0, description="Global gradient norm is clipped to this.", gt=0)


class Sharding(Section):
    """How a trained model is laid over ranks."""

    ranks: int = Op(1, "Data-parallel ranks.", ge=1)
    zero_stage: Literal[0, 1, 2, 3] = Op(0, "DeepSpeed ZeRO stage.")
    offload_optimizer: bool = Op(False, "Keep optimizer state in host memory (ZeRO 1 to 3 on GPUs).")
    dtype: Literal["float32", "bfloat16"] = Op("bfloat16", "Training precision; bfloat16 keeps float32 master weights.")
    microbatch_tokens: int = Op(8192, "Most tokens (padding counted) in one forward pass of a rank.", ge=8)
    gradient_checkpointing: bool = Op(False, "Recompute activations in the backward pass.")
    cpus_per_rank: int = Op(1, "CPU threads of a rank.", ge=1)


class Training(Section):
    """What `sft` and `preference_model` share."""

    epochs: float = Field(default=1.0, description="Passes over the training rows.", gt=0)
    batch_size: int = Field(description="Rows of one optimizer step over all ranks.", ge=1)
    max_tokens: int = Field(
        default=2048, description="Longest row, tokens; longer ones lose the prompt's left end, and are counted.", ge=16
    )
    optim: Optim = Field(description="Optimizer and schedule.")
    sharding: Sharding = Op(Sharding(), "Layout over ranks.")
    checkpoint_every: int = Op(100, "Optimizer steps between checkpoints.", ge=1)


class SftConfig(Training):
    """`sft`: fine-tunes the pretrained model on revisions and helpful samples."""

    init: str = Field(default="pretrained", description="Key of `models`, or a path.")
    rounds: Literal["all", "last"] | tuple[int, ...] = Field(
        default="all", description="Which revisions are trained on, counted from 1."
    )
    batch_size: int = Field(default=32, description="Rows of one optimizer step over all ranks.", ge=1)
    optim: Optim = Field(
        default=Optim(lr=1e-5, schedule="cosine", warmup_fraction=0.03), description="Optimizer and schedule."
    )


class SamplePairsConfig(Sampling):
    """`sample_pairs`: the SL model answers each harmful prompt twice."""

    model: str = Field(default="sft", description="`sft`, a key of `models`, or a path.")


class LabelConfig(Section):
    """`label`: the feedback model says which response is better, as a multiple choice under a principle."""

    format: Literal["auto", "plain", "chat", "cot"] = Field(
        default="plain",
        description="Prompt format; cot lets the model reason first; auto follows the feedback model's.",
    )
    few_shots: int = Field(default=0, description="Examples from the constitution before each question.", ge=0)
    principles_per_pair: int = Field(default=1, description="Independent draws of a principle, averaged.", ge=1)
    swap: bool = Field(
        default=False, description="Ask in both orders and average: removes the preference for a letter."
    )
    clamp: tuple[float, float] | None = Field(
        default=None, description="Limits of the averaged label, as (0.4, 0.6) for cot."
    )
    max_prompt_tokens: int = Field(default=3072, description="Longer questions are quarantined, tokens.", ge=8)
    max_rationale_tokens: int = Field(default=256, description="Longest chain of thought, tokens (cot only).", ge=1)


class PreferenceModelConfig(Training):
    """`preference_model`: soft-label Bradley-Terry on AI-harmless and human-helpful comparisons."""

    init: str = Field(
        default="auto",
        description="`auto` is models.preference_base, else the SL model; or a key of `models`, or a path.",
    )
    data: tuple[SourceItem, ...] = Field(
        default=(Source(path="label"), Source(path="starter:helpful_comparisons")),
        description="`label` and files of comparisons.",
    )
    batch_size: int = Field(default=32, description="Pairs of one optimizer step over all ranks.", ge=1)
    center_coef: float = Field(
        default=0.0, description="Weight of the squared mean score, which keeps scores near 0.", ge=0
    )
    optim: Optim = Field(
        default=Optim(lr=1e-5, schedule="linear", warmup_fraction=0.03), description="Optimizer and schedule."
    )


class Learner(Section):
    """One trained role of PPO."""

    optim: Optim = Field(description="Optimizer and schedule.")
    sharding: Sharding = Op(Sharding(), "Layout over ranks.")


class PPOConfig(Sampling):
    """`ppo`: the policy against the preference model, with a KL penalty to the SL model."""

    init: str = Field(default="sft", description="Policy's start and reference: `sft`, a key of `models`, or a path.")
    reward: str = Field(default="preference_model", description="`preference_model` or a path to one.")
    critic_init: Literal["reward", "policy"] = Field(
        default="reward", description="The critic starts from the preference model or the policy."
    )
    steps: int = Field(default=100, description="Iterations of rollout and update.", ge=1)
    rollout_batch_size: int = Field(default=128, description="Responses of one iteration over all ranks.", ge=1)
    minibatch_size: int = Field(default=128, description="Responses of one optimizer step over all ranks.", ge=1)
    samples_per_prompt: int = Field(default=1, description="Responses sampled for each prompt.", ge=1)
    ppo_epochs: int = Field(default=1, description="Passes over each rollout batch.", ge=1)
    helpful_fraction: float | None = Field(
        default=None, description="Share of helpful prompts; none keeps the natural mix.", ge=0, le=1
    )
    gamma: float = Field(default=1.0, description="Discount.", gt=0, le=1)
    gae_lambda: float = Field(default=0.95, description="GAE's lambda.", ge=0, le=1)
    kl_coef: float = Field(default=0.001, description="Weight of the per-token KL penalty (k1) in the reward.", ge=0)
    clip_range: float = Field(default=0.2, description="Clipping of the policy ratio.", gt=0)
    value_clip_range: float | None = Field(default=0.2, description="Clipping of value updates; none is off.", gt=0)
    normalize_scores: bool = Field(default=True, description="Scores by the preference model's stored mean and std.")
    score_clip: float | None = Field(default=None, description="Limit of normalised scores; none is off.", gt=0)
    missing_eos_penalty: float = Field(default=0.0, description="Taken from the score of a truncated response.", ge=0)
    whiten_advantages: bool = Field(default=True, description="Over the whole rollout batch.")
    snapshots: int = Field(default=0, description="Keep the policy every so many steps; 0 keeps only the last.", ge=0)
    actor: Learner = Field(default=Learner(optim=Optim(lr=1e-6)), description="The policy.")
    critic: Learner = Field(default=Learner(optim=Optim(lr=5e-6)), description="The value function.")
    engines: int = Op(1, "Rollout engines.", ge=1)
    tensor_parallel_size: int = Op(1, "GPUs of one rollout engine.", ge=1)
    inference_ranks: int = Op(1, "Reward workers, and as many reference workers.", ge=1)
    checkpoint_every: int = Op(10, "Steps between checkpoints of actor, critic and controller.", ge=1)

    @model_validator(mode="after")
    def _sizes(self) -> "PPOConfig":
        if self.rollout_batch_size % self.minibatch_size:
            raise ValueError(
                f"rollout_batch_size {self.rollout_batch_size} is no multiple of minibatch_size {self.minibatch_size}"
            )
        if self.rollout_batch_size % self.samples_per_prompt:
            raise ValueError(
                f"rollout_batch_size {self.rollout_batch_size} is no multiple of "
                f"samples_per_prompt {self.samples_per_prompt}"
            )
        for role in (self.actor, self.critic):
            if self.minibatch_size % role.sharding.ranks:
                raise ValueError(f"minibatch_size {self.minibatch_size} is no multiple of {role.sharding.ranks} ranks")
        return self


class EvaluateConfig(Sampling):
    """`evaluate`: every model of the run answers the same held-out prompts."""

    prompts: int = Field(default=64, description="Held-out prompts of each kind, the first by id.", ge=1)


class Tracking(Section):
    """Where metrics go besides metrics.jsonl."""

    wandb: Literal["auto", "on", "off"] = Op("auto", "auto is on when WANDB_API_KEY or WANDB_MODE is set.")
    project: str = Op("cai-ray", "W&B project.")
    entity: str | None = Op(None, "W&B user or team.")


class Config(Section):
    """One run from a constitution to a policy."""

    run: Run = Op(Run(), "Name, folder, seed.")
    models: Models = Field(description="Models that the stages start from.")
    constitution: ConstitutionConfig = Field(default=ConstitutionConfig(), description="Principles.")
    cluster: Cluster = Op(Cluster(), "Where it runs.")
    prompts: PromptsConfig = Field(default=PromptsConfig(), description="Stage 1.")
    revise: ReviseConfig = Field(default=ReviseConfig(), description="Stage 2.")
    sft: SftConfig = Field(default=SftConfig(), description="Stage 3.")
    sample_pairs: SamplePairsConfig = Field(default=SamplePairsConfig(), description="Stage 4.")
    label: LabelConfig = Field(default=LabelConfig(), description="Stage 5.")
    preference_model: PreferenceModelConfig = Field(default=PreferenceModelConfig(), description="Stage 6.")
    ppo: PPOConfig = Field(default=PPOConfig(), description="Stage 7.")
    evaluate: EvaluateConfig = Field(default=EvaluateConfig(), description="Stage 8.")
    tracking: Tracking = Op(Tracking(), "Where metrics go.")


def load_config(name_or_path: str, overrides: tuple[str, ...] = ()) -> Config:
    """Reads a shipped config by name or a YAML file by path and applies `key.sub=value` overrides (values are YAML).

    Raises:
        ConfigError: no such file, bad YAML, an unknown key (with the nearest known one) or a value out of range.
    """
    path = shipped_file("configs", name_or_path) or Path(name_or_path)
    if not path.is_file():
        raise ConfigError(
            f"no config {name_or_path!r}: neither a file nor one of {', '.join(shipped_names('configs'))}",
            "give the path of a YAML file or a shipped name",
        )
    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is not readable YAML: {e}", "mend the line that is named") from e
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds {type(tree).__name__}, expected keys such as models and ppo")
    if path.stem and not (tree.get("run") or {}).get("name"):
        tree["run"] = {**(tree.get("run") or {}), "name": path.stem}
    for item in overrides:
        _override(tree, item)
    return parse_config(tree, str(path))


def parse_config(tree: dict[str, Any], where: str = "config") -> Config:
    """Checks a tree of plain values against the schema; raises ConfigError naming each bad key."""
    try:
        return Config.model_validate(tree)
    except ValidationError as e:
        raise ConfigError(f"{where}:\n" + "\n".join("  " + _explain(err) for err in e.errors())) from None


def _override(tree: dict[str, Any], item: str) -> None:
    key, sep, text = item.partition("=")
    if not sep or not key:
        raise ConfigError(f"override {item!r} is not of the form key.sub=value", "for instance ppo.kl_coef=0.1")
    *parents, last = key.split(".")
    node: dict[str, Any] = tree
    for p in parents:
        child: Any = node.get(p)
        if isinstance(child, str):  # the short form of a model, source or constitution
            child = {"file" if parents[0] == "constitution" else "path": child}
        node[p] = child = {} if child is None else child
        if not isinstance(child, dict):
            raise ConfigError(f"override {item!r}: {p} is not a section")
        node = child
    value: Any
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ConfigError(f"override {item!r}: the value is not YAML: {e}") from e
    if isinstance(value, str):  # YAML 1.1 reads 1e-5 as text; a number is what people mean
        with contextlib.suppress(ValueError):
            value = float(value)
    node[last] = value


def _explain(err: Any) -> str:
    loc = [str(p) for p in err["loc"]]
    key = ".".join(loc)
    if err["type"] == "extra_forbidden":
        known = _known_keys(loc[:-1])
        near = difflib.get_close_matches(loc[-1], known, 1, 0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
        return f"{key}: unknown key{hint}"
    if err["type"] == "missing":
        return f"{key}: is required"
    return f"{key}: {err['msg']} (got {err['input']!r})"


def _known_keys(loc: list[str]) -> list[str]:
    section: Any = Config
    for part in loc:
        info = section.model_fields.get(part) if isinstance(section, type) and issubclass(section, Section) else None
        if info is None:
            return []
        candidates = [info.annotation, *get_args(info.annotation)]
        candidates += [a for c in candidates for a in get_args(c)]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)
        if section is None:
            return []
    return list(section.model_fields)


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML, every default spelled out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

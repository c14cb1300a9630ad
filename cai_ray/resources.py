"""What a run needs, before anything starts: rows, processes, memory with its arithmetic, minutes; and whether it fits.

Memory is exact where weights, gradients and optimizer state are counted, and rough for activations. Minutes come from
floating-point operations (2 per parameter and token forward, 6 with the backward pass, 8 where activations are
recomputed) at the rates below, prompts of PROMPT_TOKENS and responses of full length: right within a factor of three.
What is unknown is NaN (see `models.shapes`): it refuses nothing.
"""

import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from cai_ray import doctor, pipeline
from cai_ray.cluster import LOGICAL_CPUS
from cai_ray.config import Config, Learner, Sharding, Source
from cai_ray.errors import DataError, ResourceError
from cai_ray.models.shapes import LIBRARIES_GIB, WIDTH, Part, Shape, find_shape, memory_sum, training_memory
from cai_ray.pipeline import GENERATING, Stage, model_spec, needed
from cai_ray.sources import BROKEN, PACKED, data_files

CPU_RATE = 100e9  # float32 operations per second of a small machine, all roles together
GPU_RATE = 300e12  # bfloat16, one H100-class GPU at about a third of its peak: training and scoring
DECODE_RATE = 100e12  # the same GPU while it samples
PROMPT_TOKENS = 150  # a typical prompt
START_MINUTES = 0.5  # of a stage's processes
TRAIN_SHARE = 0.9  # of conversations; the rest is held out
PPO_CPUS = {"cpu": 0.1, "gpu": 1.0}  # logical CPUs of a worker, as `rl.groups` asks for them
ENGINE_TOKENS = 8192  # tokens of one engine step on a GPU


def model_shape(config: Config, name: str) -> Shape:
    """The shape behind a model's name: a stage, a key of `models` or a path."""
    starts = {stage: pipeline.stage_table(config)[stage].models[0] for stage in pipeline.STAGE_MODELS}
    for _ in starts:  # a stage's model has the shape of what it starts from
        name = starts.get(name, name)
    spec = model_spec(config, name)
    stage = pipeline.stage_of_path(spec.path)
    return find_shape(str(stage.model) if stage else spec.path, spec.revision)


# ---- processes and their memory -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Role:
    """One kind of process of a stage. On GPUs `parts` lie in each of its GPUs, `host` in host memory."""

    name: str
    count: int
    gpus: int
    cpus: float
    flops: float  # for each token of the stage's rows, all processes together
    parts: tuple[Part, ...]
    host: tuple[Part, ...] = ()

    @property
    def gib(self) -> float:
        """GiB of one process, or of one of its GPUs."""
        return sum(total / n for _, total, n in self.parts)

    @property
    def arithmetic(self) -> str:
        """The memory as a sum that can be checked by hand."""
        title = f"{self.name} (each of {self.count})" if self.count > 1 else self.name
        if math.isnan(self.gib):
            return f"{title}: unknown, because the model's config.json is not here"
        host = f"; in host memory {memory_sum(self.host)} GiB" if self.host else ""
        return f"{title}: {memory_sum(self.parts)} = {self.gib:.1f} GiB{' a GPU' if self.gpus else ''}{host}"


def _engine(config: Config, stage: Stage, device: str) -> Role:
    own, answering = config.cluster, {"prompts": stage.models, "evaluate": stage.models[:-1]}
    names = answering.get(stage.name, stage.models[:1])  # engines hold one after the other
    name = max(names, key=lambda name: model_shape(config, name).parameters)
    shape, width = model_shape(config, name), WIDTH[model_spec(config, name).dtype]
    tp, count = own.tensor_parallel_size if device == "gpu" else 1, (config.ppo if stage.name == "ppo" else own).engines
    parts: list[Part] = [("weights", shape.gib(width), tp), ("libraries", LIBRARIES_GIB[device], 1)]
    if device == "cpu":
        parts.append(("KV cache", own.kv_cache_gib, 1))
    else:  # it takes its share of the GPU whatever it needs: this is the least with which it starts
        cache: Part = ("KV of one sequence", shape.kv_gib(context_tokens(config, stage.name), width), tp)
        parts += [cache, ("activations", shape.work_gib(ENGINE_TOKENS, width), tp)]
    return Role("engine", count, tp if device == "gpu" else 0, 1, 2 * shape.parameters, tuple(parts))


def _trainer(config: Config, role: str, name: str, how: Learner, device: str, passes: float) -> Role:
    """A model under training; `passes` updates see each token."""
    shape, sharding = model_shape(config, name), how.sharding
    parts, host = training_memory(shape, sharding, device, how.lora)
    update = (8 if sharding.gradient_checkpointing is True else 6) * passes
    cpus, flops = (sharding.cpus_per_rank, update) if role == "rank" else (PPO_CPUS[device], update + 2)
    return Role(role, sharding.ranks, int(device == "gpu"), cpus, flops * shape.parameters, parts, host)


def _onlooker(
    config: Config, role: str, names: Sequence[str], sharding: Sharding, device: str, ranks: int = 1, parts: int = 1
) -> Role:
    """Models that only look, one after the other: reference, reward, scorer; each cut into so many parts."""
    width, gpus = WIDTH[sharding.dtype], int(device == "gpu")
    shapes = [model_shape(config, name) for name in names]
    weights: list[Part] = [("weights", s.gib(width), parts) for s in shapes]
    work: Part = ("activations", max((s.work_gib(sharding.microbatch_tokens, width) for s in shapes), default=0.0), 1)
    memory = (*weights, work, ("libraries", LIBRARIES_GIB[device], 1))
    return Role(role, ranks, gpus, PPO_CPUS[device], 2 * sum(s.parameters for s in shapes), memory)


def stage_roles(config: Config, stage: Stage, device: str) -> tuple[Role, ...]:
    """The processes that live at the same time in a stage; on CPU engines stay alive while others train."""
    p, name = config.ppo, stage.name
    if name in ("sft", "preference_model"):
        section, stages = getattr(config, name), needed(config)
        before = [s for s in stages[: stages.index(stage)] if s.name in GENERATING][-1:] if device == "cpu" else []
        idle = [replace(_engine(config, s, device), name="idle engine", flops=0.0) for s in before]
        return (_trainer(config, "rank", stage.models[0], section, device, section.epochs), *idle)
    if not stage.models:
        return ()
    engine = _engine(config, stage, device)
    if name == "evaluate":
        looks = Sharding(dtype="float32", microbatch_tokens=context_tokens(config, name))
        return (engine, _onlooker(config, "scorer", stage.models[-1:], looks, device))
    if name != "ppo":
        return (engine,)
    critics = []
    if p.has_critic:
        start = p.preference_models[0] if p.critic_init == "reward" else p.init
        critics = [_trainer(config, "critic", start, p.critic, device, p.ppo_epochs)]
    many = (p.inference_ranks, p.inference_ranks if p.inference_sharded else 1)
    return (
        engine,
        _trainer(config, "actor", p.init, p.actor, device, p.ppo_epochs),
        *critics,
        _onlooker(config, "reward", stage.models[1:], p.critic.sharding, device, *many),
        _onlooker(config, "reference", [p.init], p.actor.sharding, device, *many),
    )


# ---- rows and minutes -----------------------------------------------------------------------------------------------


def context_tokens(config: Config, stage: str) -> int:
    """The longest sequence that a stage's models see, tokens."""
    eos = 1 if stage in ("ppo", "evaluate") else 0  # a truncated response is scored with EOS appended
    return getattr(config, stage).max_tokens + eos


def source_rows(source: Source) -> float:
    """Lines of a source's jsonl files, or its limit; NaN where counting is not cheap. A transcript may hold more."""
    count = 0.0
    try:
        for file in data_files(source.path):
            with PACKED.get(file.suffix, open)(file, "rb") as lines:
                count += sum(1 for line in lines if line.strip()) if ".jsonl" in file.suffixes else math.nan
    except (DataError, *BROKEN):  # whoever reads it says what is wrong
        count = math.nan
    return count if source.limit is None else min(source.limit, count)


def stage_rows(config: Config) -> dict[str, tuple[float, float]]:
    """Each stage's rows, and the tokens that pass its models for one row; what the prefix cache holds counts once."""
    r, s, f, p, e = config.revise, config.sample_pairs, config.label, config.ppo, config.evaluate
    written = [(g.kind, g.n, PROMPT_TOKENS + g.max_new_tokens) for g in config.prompts.generate]
    harmful, helpful = (
        sum(source_rows(source) for source in getattr(config.prompts, kind))
        + sum(n for k, n, _ in written if k == kind)
        for kind in ("harmful", "helpful")
    )
    prompts, of_revise, of_pairs = harmful + helpful, r.share[1] - r.share[0], s.share[1] - s.share[0]
    revised, samples = of_revise * harmful, of_revise * helpful * r.helpful_samples_per_prompt
    rounds, k = config.sft.rounds, s.responses_per_prompt
    revisions = revised * ({"all": r.rounds, "last": 1}[rounds] if isinstance(rounds, str) else len(rounds))
    compared = of_pairs * harmful * (k if s.pairs == "ring" and k > 2 else k * (k - 1) / 2)
    data = config.preference_model.data
    pairs = sum(d.weight * (compared if d.path == "label" else source_rows(d)) for d in data)
    asked = f.principles_per_pair * (2 if f.swap else 1) * f.samples_per_pair
    gold = 0 if f.judge_gate == "off" else source_rows(f.gold)
    question = PROMPT_TOKENS + 2 * s.max_new_tokens + (f.max_rationale_tokens if f.reasons else 0)
    answer = PROMPT_TOKENS + r.max_new_tokens
    models = len(pipeline.stage_table(config)["evaluate"].models) - 1  # the last one scores
    per_harmful = answer + r.rounds * (answer + r.max_critique_tokens * r.critique)
    return {
        "prompts": (prompts, sum(n * tokens for _, n, tokens in written) / max(1, prompts)),
        "revise": (revised + samples, (revised * per_harmful + samples * answer) / max(1, revised + samples)),
        "sft": (TRAIN_SHARE * (revisions + samples), min(config.sft.max_tokens, answer)),
        "sample_pairs": (of_pairs * harmful, PROMPT_TOKENS + k * s.max_new_tokens),
        "label": (compared, asked * question * (1 + gold / max(1, compared))),
        "preference_model": (TRAIN_SHARE * pairs, PROMPT_TOKENS + 2 * s.max_new_tokens),
        "ppo": (p.steps * p.rollout_batch_size, PROMPT_TOKENS + p.max_new_tokens),
        "evaluate": (2 * e.prompts * models, PROMPT_TOKENS + e.max_new_tokens),
        "report": (0, 0),
    }


@dataclass(frozen=True)
class StageNeed:
    """What one stage needs."""

    stage: str
    rows: float
    minutes: float
    roles: tuple[Role, ...]

    @property
    def rows_text(self) -> str:
        """Rows for a table."""
        return "unknown" if math.isnan(self.rows) else f"{self.rows:,.0f}" if self.rows else ""

    @property
    def minutes_text(self) -> str:
        """Minutes for a table."""
        return "unknown" if math.isnan(self.minutes) else f"{self.minutes:,.0f}" if self.minutes >= 1 else "under 1"

    @property
    def processes(self) -> str:
        """Processes with their GPUs, as `2 actor x 1 GPU`."""
        return ", ".join(f"{r.count} {r.name}" + (f" x {r.gpus} GPU" if r.gpus else "") for r in self.roles)


def estimate(config: Config, device: str | None = None) -> list[StageNeed]:
    """What each stage needs on `cpu` or `gpu`; without a device, on the one that this machine would use."""
    device, amounts, needs = device or likely_device(config), stage_rows(config), []
    for stage in needed(config):
        roles, (rows, tokens) = stage_roles(config, stage, device), amounts[stage.name]
        work = [rows * tokens * r.flops for r in roles]
        seconds = sum(work) / CPU_RATE  # all roles share one machine
        if device == "gpu":  # engines first, then the others side by side
            rates = [(DECODE_RATE if r.name == "engine" else GPU_RATE) * r.count * r.gpus for r in roles]
            spent = {r.name: w / rate for r, w, rate in zip(roles, work, rates, strict=True)}
            seconds = spent.pop("engine", 0.0) + max(spent.values(), default=0.0)
        needs.append(StageNeed(stage.name, rows, seconds / 60 + (START_MINUTES if roles else 0), roles))
    return needs


# ---- whether it fits ------------------------------------------------------------------------------------------------


def check_lengths(config: Config, stages: Collection[str] = pipeline.NAMES) -> None:
    """Refuses sequences that a model or a micro-batch of these stages cannot hold.

    Raises:
        ResourceError: with the numbers.
    """
    learners = {"sft": [config.sft], "ppo": [config.ppo.actor, config.ppo.critic]}
    learners["preference_model"] = [config.preference_model]
    for stage in needed(config):
        if stage.name not in stages or not stage.models:
            continue
        tokens, fix = context_tokens(config, stage.name), f"lower the token limits of {stage.name}"
        for name in stage.models:
            limit = model_shape(config, name).max_positions
            if tokens > limit:
                message = f"{stage.name}: prompt and response may have {tokens} tokens, the model {name} takes {limit}"
                raise ResourceError(message, fix)
        row = tokens * (2 if stage.name == "preference_model" else 1)  # a pair holds two answers, each up to that long
        for size in (learner.sharding.microbatch_tokens for learner in learners.get(stage.name, ())):
            if size < row:
                message = f"{stage.name}: a row may have {row} tokens, but sharding.microbatch_tokens is {size}"
                raise ResourceError(message, f"raise microbatch_tokens, or {fix}")


def check(
    config: Config,
    device: str,
    host_memory_gib: float = math.inf,
    cpus: float = math.inf,
    gpus: float = math.inf,
    gpu_memory_gib: float = math.inf,
    stages: Collection[str] = pipeline.NAMES,
) -> None:
    """Refuses what a machine or cluster cannot hold; a limit that is left out is not checked.

    Args:
        config: the run.
        device: `cpu` or `gpu`.
        host_memory_gib: memory of all machines together.
        cpus: logical CPUs of all machines together.
        gpus: GPUs of all machines together.
        gpu_memory_gib: memory of one GPU.
        stages: those that will run.

    Raises:
        ResourceError: with the arithmetic.
    """
    check_lengths(config, stages)
    for need in (n for n in estimate(config, device) if n.stage in stages):
        engines = sum(r.count * r.gpus for r in need.roles if r.name == "engine")
        others = [r for r in need.roles if r.name != "engine"]
        # `evaluate` releases its engines before the scorer starts.
        apart = (max if need.stage == "evaluate" else sum)((engines, sum(r.count * r.gpus for r in others)))
        # PPO's roles share GPUs where there are too few, or are told to: rank i of each on GPU i, and engine i with it.
        colocated = need.stage == "ppo" and config.ppo.placement == "colocated" and device == "gpu"
        shared = colocated or (need.stage == "ppo" and apart > gpus)
        together = engines + max((r.count * r.gpus for r in others), default=0) if shared else apart
        if colocated:
            together = engines
            check_sharing(config)
        in_host = sum(r.count * sum(g / n for _, g, n in (r.host if r.gpus else r.parts)) for r in need.roles)
        if colocated:  # while engines sample, optimizers rest there
            in_host += sum(r.count * g / n for r in others for name, g, n in r.parts if name == "optimizer")
        fix = "raise zero_stage, ranks or tensor_parallel_size, lower microbatch_tokens, or set offload_optimizer"
        wants = [
            ("CPUs", sum(r.count * r.cpus for r in need.roles), cpus, "lower cpus_per_rank, ranks or engines"),
            ("GPUs", together, gpus, "lower engines, tensor_parallel_size or ranks, or join a larger cluster"),
            ("GiB of memory", in_host, host_memory_gib, "lower microbatch_tokens, kv_cache_gib, ranks or engines"),
        ]
        for r in (r for r in need.roles if r.gpus):
            share = config.cluster.gpu_memory_utilization if r.name == "engine" else 1
            wants.append((f"GiB of a GPU for the {r.name}", r.gib, share * gpu_memory_gib, fix))
        if shared:
            wants.append(("GiB of each shared GPU", sum(r.gib for r in others), gpu_memory_gib, fix))
        if colocated:
            left = (1 - config.cluster.gpu_memory_utilization) * gpu_memory_gib
            resting = sum(g / n for r in others for name, g, n in r.parts if name in ("weights", "libraries"))
            wants.append(
                ("GiB of each GPU beside its working engine", resting, left, f"lower the latter's share, {fix}")
            )
        for what, amount, limit, fix in wants:
            if amount > limit:
                lines = "".join(f"\n    {r.arithmetic}" for r in need.roles)
                raise ResourceError(
                    f"{need.stage} needs {amount:.4g} {what}, there are {limit:.4g}; {need.processes}:{lines}", fix
                )


def check_sharing(config: Config) -> None:
    """Refuses what engines cannot do that share their GPUs with PPO's workers.

    Raises:
        ResourceError: an engine of several GPUs, or an allocator whose memory cannot be handed to another process.
    """
    if config.cluster.tensor_parallel_size > 1:
        raise ResourceError(
            f"a colocated engine has one GPU, cluster.tensor_parallel_size is {config.cluster.tensor_parallel_size}",
            "set it to 1, or ppo.placement to separate",
        )
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "expandable_segments:true" in os.environ.get(name, "").lower():
            raise ResourceError(
                f"{name} asks for expandable segments: engines cannot read such memory of the actor's, nor sleep",
                f"unset {name}, or set ppo.placement to separate",
            )


def likely_device(config: Config) -> str:
    """`cpu` or `gpu`: what the configuration says, else what this machine has."""
    wanted = config.cluster.device
    return wanted if wanted != "auto" else "gpu" if doctor.local_gpus() else "cpu"


def check_for_gpus(config: Config, stages: Collection[str] = pipeline.NAMES) -> None:
    """Refuses stages for GPUs where there is none, and what GPUs cannot do, before models are downloaded.

    Raises:
        ResourceError: no GPU is here, and no cluster was named; or engines could not take PPO's adapters.
    """
    if config.cluster.device == "gpu" and not config.cluster.joined and not doctor.local_gpus():
        raise ResourceError(
            "cluster.device is gpu, and this machine has none",
            "name a cluster that has some (launch/submit.sh, RAY_ADDRESS, cluster.address), or set cluster.device=cpu",
        )
    alone = "ppo" in stages and config.ppo.adapter_rank and likely_device(config) == "gpu"
    if alone and model_spec(config, config.ppo.init).dtype == "float32":
        what = "ppo's engines are to take adapters in float32, for which vLLM has no kernel on GPUs"
        raise ResourceError(what, "set ppo.lora_sync=merged, or the model's dtype to bfloat16")


def check_here(config: Config, stages: Collection[str] = pipeline.NAMES) -> None:
    """Checks stages of a run against this machine; one that is meant for another cluster only for its lengths.

    Raises:
        ResourceError: with the arithmetic.
    """
    device, gpus = likely_device(config), doctor.local_gpus()
    if config.cluster.joined or (device == "gpu" and not gpus):
        check_lengths(config, stages)
        return
    gpu_gib = min((g.gib for g in gpus), default=math.inf)
    check(config, device, doctor.host_memory_gib(), LOGICAL_CPUS, len(gpus), gpu_gib, stages)

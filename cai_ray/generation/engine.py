"""One vLLM engine: token ids in, token ids and log-probabilities out, in one continuous batch.

Every stage and the PPO rollouts sample and score through this class. Sampling is plain whatever the model's
`generation_config` says: temperature only, no top-p, no top-k, no penalties. vLLM sees no tokenizer; ids become text
here, and stop strings are looked for here.
"""

import asyncio
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, get_args

from cai_ray.config import Cluster
from cai_ray.errors import DataError, StageFailed
from cai_ray.generation.shared_memory import BACKEND
from cai_ray.models.checkpoints import architecture, weight_shapes
from cai_ray.models.tokenization import Tokenizer

_NORMS = "cai_cpu"  # vLLM's name for its own kernels of norms, where they run on CPUs


@dataclass(frozen=True)
class Request:
    """A continuation to sample; it ends at any of the tokenizer's `eos_ids`, which stays.

    Attributes:
        prompt_ids: the prompt's tokens.
        max_new_tokens: longest continuation, tokens.
        temperature: divides the logits; 0 is greedy.
        seed: decides the sample, whatever else is in the batch.
        stop: strings at which the text ends; they are cut off.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int
    temperature: float
    seed: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChoiceRequest:
    """Untempered log-probabilities of named tokens right after a prompt; the result is {token: nats}."""

    prompt_ids: Sequence[int]
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class ScoreRequest:
    """Untempered log-probabilities of the tokens `ids[start:]`, each given all before it; the result is a list."""

    ids: Sequence[int]
    start: int


AnyRequest = Request | ChoiceRequest | ScoreRequest
Result = Any  # Completion | dict[int, float] | list[float], by the kind of request


@dataclass(frozen=True)
class Completion:
    """A sampled continuation.

    Attributes:
        ids: its tokens, EOS included, a stop string's tokens not. A token that holds the text's end and the stop
            string's beginning stays. No token at all when the text ended before it began.
        logprobs: of each token under the distribution that it was drawn from (logits over temperature), nats.
        text: without control tokens and stop string, stripped.
        ended: EOS or a stop string came; otherwise it was cut at max_new_tokens.
        version: of the weights that wrote it: 0 for a checkpoint's own, else what the last weight update was called.
    """

    ids: list[int]
    logprobs: list[float]
    text: str
    ended: bool
    version: int


@dataclass(frozen=True)
class ChoicePlan:
    """The requests that score a set of choices, and where each choice's terms are found in their results."""

    requests: list[ChoiceRequest]
    paths: list[list[tuple[int, int]]]  # of each choice: (index into requests, token)
    ends: list[int | None]  # of a choice that others begin with: the request that asks how those go on

    def scores(self, results: Sequence[Mapping[int, float]]) -> list[float]:
        """Log-probability of each choice up to the first token that no other choice shares, nats.

        Where longer choices begin with a choice, it has what none of them takes: after `1` beside `10` that is
        P(1) (1 - P(0|1)).
        """
        scores = [sum(results[i][token] for i, token in path) for path in self.paths]
        for k, end in enumerate(self.ends):
            if end is not None:
                left = 1 - sum(math.exp(logprob) for logprob in results[end].values())
                scores[k] += math.log(left) if left > 0 else -math.inf
        return scores


def plan_choices(prompt_ids: Sequence[int], choices: Sequence[Sequence[int]]) -> ChoicePlan:
    """Plans the scoring of `choices`, token ids each, after a prompt; every position that is needed is one request.

    Leading tokens that all choices share join the prompt, what follows a choice's first distinguishing token is not
    scored: two choices that differ in one token cost one request of one step. A choice with which others begin is
    scored against those.

    Raises:
        DataError: fewer than two choices, an empty one, or two that are equal.
    """
    choices = [tuple(c) for c in choices]
    shared = min(_shared(choices[0], c) for c in choices)
    places: dict[tuple[int, ...], int] = {}
    paths: list[list[tuple[int, int]]] = []
    ends: list[int | None] = []
    for i, choice in enumerate(choices):
        others = [*choices[:i], *choices[i + 1 :]]
        if not others or not choice or choice in others:
            raise DataError(f"choice {i + 1} of {len(choices)} cannot be told from the others by its tokens")
        common = max(_shared(choice, other) for other in others)
        steps = range(shared, min(common + 1, len(choice)))
        paths.append([(places.setdefault(choice[:t], len(places)), choice[t]) for t in steps])
        ends.append(places.setdefault(choice, len(places)) if common == len(choice) else None)
    tokens = [sorted({token for path in paths for place, token in path if place == at}) for at in range(len(places))]
    requests = [ChoiceRequest([*prompt_ids, *p], tuple(t)) for p, t in zip(places, tokens, strict=True)]
    return ChoicePlan(requests, paths, ends)


async def choice_logprobs(engine: Any, prompt_ids: Sequence[int], choices: Sequence[Sequence[int]]) -> list[float]:
    """Log-probability of each choice after a prompt, up to its first distinguishing token (`plan_choices`), nats.

    For programs: they `ask` an engine actor, or an `Engine` in this process.
    """
    plan = plan_choices(prompt_ids, choices)
    return plan.scores(await asyncio.gather(*map(engine.ask, plan.requests)))


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


class Engine:
    """A model in vLLM, stepped by its owner. Not thread-safe: one thread does everything.

    Args:
        model_folder: Hugging Face folder with safetensors.
        cluster: how many sequences it takes at once, and on what memory; on a GPU, how many share the model.
        format: prompt format of its tokenizer: auto, plain or chat.
        dtype: float32 or bfloat16.
        max_model_len: prompt and continuation together, tokens.
        device: cpu or gpu.
        threads: CPU threads of the arithmetic; PyTorch's default when None.
        sleeps: others use its GPU in turn (`sleep`), the trainer among them, whose weights it reads in place.
        lora_rank: largest rank of an adapter that `load_adapter` puts over its weights; 0 takes none.
    """

    def __init__(
        self,
        model_folder: Path,
        cluster: Cluster,
        *,
        format: str = "auto",
        dtype: str = "bfloat16",
        max_model_len: int = 2048,
        device: str = "cpu",
        threads: int | None = None,
        sleeps: bool = False,
        lora_rank: int = 0,
    ):
        # The core in this process: on CPU it starts faster, and a trainer's CUDA handles cannot be sent on to another.
        _set_environment(device, threads, core_here=device == "cpu" or sleeps)  # before vLLM is imported
        import torch
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        if threads:
            torch.set_num_threads(threads)
        options = _cpu_options(cluster.kv_cache_gib, max_model_len)
        if device == "gpu":
            options = {
                "gpu_memory_utilization": cluster.gpu_memory_utilization,
                "tensor_parallel_size": cluster.tensor_parallel_size,
                "distributed_executor_backend": "mp" if cluster.tensor_parallel_size > 1 else "uni",
                "enable_sleep_mode": sleeps,
            }
        options |= {"dtype": dtype, **_adapter_options(lora_rank, model_folder)}
        backend = BACKEND if device == "cpu" else "ipc" if sleeps else "nccl"
        self._llm = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(model_folder),
                skip_tokenizer_init=True,
                max_model_len=max_model_len,
                max_num_seqs=cluster.max_num_seqs,
                generation_config="vllm",
                logprobs_mode="processed_logprobs",
                enable_prefix_caching=True,
                disable_log_stats=True,
                weight_transfer_config=WeightTransferConfig(backend=backend),
                **options,
            )
        )
        if device == "cpu":
            _end_groups()
        self.device = device
        self.max_model_len, self.max_num_seqs = max_model_len, cluster.max_num_seqs
        self.tokenizer = Tokenizer.load(model_folder, format)
        self.loaded = (model_folder, format)  # the checkpoint that the tokenizer is of, and once the weights
        self.holds: tuple[Path, str] | None = self.loaded  # None after a weight update
        self.version = 0
        self.steps, self.tokens_out = 0, 0  # since the start; tokens of finished requests
        self.updating = False  # between the start and the end of a change of weights
        self._adapter: Any = None  # vLLM's name of it, for each request
        self._takes_adapters = bool(lora_rank)
        self._open: dict[str, AnyRequest] = {}

    # ---- the continuous batch -------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether any request is unfinished."""
        return bool(self._open)

    def add(self, request_id: str, request: AnyRequest) -> None:
        """Puts a request into the batch; `step` returns its result under the same id.

        Raises:
            DataError: it has no prompt, cannot fit the engine, or vLLM refuses its parameters.
            StageFailed: a weight update began and did not finish.
        """
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input

        if self.updating:
            raise StageFailed("the engine is in the middle of a weight update", "finish the update, or start it again")
        ids = list(request.ids if isinstance(request, ScoreRequest) else request.prompt_ids)
        new = request.max_new_tokens if isinstance(request, Request) else 1
        if not ids or len(ids) + new > self.max_model_len:
            raise DataError(
                f"a prompt of {len(ids)} tokens with {new} to come does not fit the engine's {self.max_model_len}",
                "shorten the prompt, or raise the stage's limits",
            )
        try:
            params = self._params(request)
            self._llm.add_request(request_id, tokens_input(ids), params, lora_request=self._adapter)
        except VLLMClientError as e:
            raise DataError(f"vLLM refuses the request: {e}") from None
        self._open[request_id] = request

    def abort(self, request_id: str) -> None:
        """Drops a request; it gives no result."""
        if self._open.pop(request_id, None):
            self._llm.abort_request([request_id])

    def step(self) -> list[tuple[str, Result]]:
        """Advances every request by a token; returns (id, result) of those that finished."""
        done = []
        self.steps += 1
        for output in self._llm.step():
            request = self._open.get(output.request_id)
            result = None if request is None else self._result(request, output)
            if result is not None:
                if not output.finished:
                    self._llm.abort_request([output.request_id])
                del self._open[output.request_id]
                done.append((output.request_id, result))
        return done

    async def ask(self, request: AnyRequest) -> Result:
        """The result of one request, for programs that otherwise ask an engine actor."""
        return self.generate([request])[0]

    def generate(self, requests: Sequence[AnyRequest]) -> list[Result]:
        """The results of all requests in order; raises what `add` raises."""
        self._require_idle()
        for i, request in enumerate(requests):
            self.add(str(i), request)
        results: dict[str, Result] = {}
        while self._open:
            results.update(self.step())
        return [results[str(i)] for i in range(len(requests))]

    def choice_logprobs(self, prompt_ids: Sequence[int], choices: Sequence[Sequence[int]]) -> list[float]:
        """What the function of this name gives, for whoever owns the engine."""
        plan = plan_choices(prompt_ids, choices)
        return plan.scores(self.generate(plan.requests))

    def _params(self, request: AnyRequest) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # ignore_eos leaves stop_token_ids alone and keeps the generation_config's EOS out.
        common: dict[str, Any] = {"detokenize": False, "ignore_eos": True, "flat_logprobs": True, "skip_clone": True}
        if isinstance(request, Request):
            return SamplingParams(
                temperature=request.temperature,
                seed=request.seed,
                max_tokens=request.max_new_tokens,
                stop_token_ids=list(self.tokenizer.eos_ids),
                logprobs=0,
                output_kind=RequestOutputKind.CUMULATIVE if request.stop else RequestOutputKind.FINAL_ONLY,
                **common,
            )
        if isinstance(request, ChoiceRequest):
            common["logprob_token_ids"] = list(request.token_ids)
        else:
            common["prompt_logprobs"] = 0
        return SamplingParams(temperature=1.0, max_tokens=1, output_kind=RequestOutputKind.FINAL_ONLY, **common)

    def _result(self, request: AnyRequest, output: Any) -> Result | None:
        """What a request came to, or None while it goes on."""
        first = output.outputs[0]
        if isinstance(request, ScoreRequest):
            return output.prompt_logprobs.logprobs[request.start - 1 :]  # the first token has none
        if isinstance(request, ChoiceRequest):
            found = dict(zip(first.logprobs.token_ids, first.logprobs.logprobs, strict=True))
            return {token: found[token] for token in request.token_ids}
        ids = list(first.token_ids)
        cut = self._cut(ids, request.stop) if request.stop else None
        if cut is None and not output.finished:
            return None
        self.tokens_out += len(ids)
        kept, text = cut or (len(ids), self.tokenizer.decode(ids))
        ended = cut is not None or first.finish_reason == "stop"
        return Completion(ids[:kept], list(first.logprobs.logprobs[:kept]), text, ended, self.version)

    def _cut(self, ids: list[int], stops: tuple[str, ...]) -> tuple[int, str] | None:
        """How many tokens to keep, and the text, when a stop string came; else None."""
        # A stop string has at most as many tokens as bytes; the new token may begin after its end.
        tail = self._decode(ids[-max(len(s.encode()) for s in stops) - 4 :])
        if not any(s in tail for s in stops):
            return None
        whole = self._decode(ids)
        places = [p for p in map(whole.find, stops) if p >= 0]
        if not places:
            return None
        text = whole[: min(places)].strip()
        kept = len(ids)
        while kept and self._decode(ids[: kept - 1]).strip().startswith(text):
            kept -= 1
        return kept, text

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.hf.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    # ---- weights --------------------------------------------------------------------------------------------------

    def load_checkpoint(self, folder: Path, format: str = "auto") -> None:
        """Swaps in the weights and the tokenizer of another checkpoint of the same architecture; `version` is 0 again.

        Raises:
            DataError: it is of another architecture, or lacks weights. Nothing has changed then.
            StageFailed: requests are unfinished.
        """
        self._require_idle()
        before = self.loaded[0]
        if architecture(folder) != architecture(before):
            raise DataError(f"{folder} is of another architecture than {before}", "start a new engine")
        missing = weight_shapes(before).keys() - weight_shapes(folder).keys()
        if missing:
            raise DataError(
                f"{folder} lacks {len(missing)} weights, such as {min(missing)}", "give a complete checkpoint"
            )
        tokenizer = Tokenizer.load(folder, format)
        self.wake("weights", "kv_cache")
        self.updating = True
        self._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        if self.device == "cpu":
            from cai_ray.generation.weight_receiver import repack_tied_head

            self._llm.apply_model(repack_tied_head)
        self._swapped(0)
        self.tokenizer, self.loaded = tokenizer, (folder, format)
        self.holds = self.loaded

    def init_weight_transfer(self, info: dict[str, Any]) -> None:
        """Connects to the trainer; with NCCL it returns when both sides have met."""
        self._llm.collective_rpc("shutdown_weight_transfer_engine")  # the link to an earlier one
        self._llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": info})

    def start_weight_update(self) -> None:
        """Opens an update; until it is finished the engine takes no requests.

        Raises:
            StageFailed: requests are unfinished: they would mix old and new weights.
        """
        self._require_idle()
        self.updating, self.holds = True, None
        self._llm.collective_rpc("start_weight_update")

    def update_weights(self, info: dict[str, Any]) -> None:
        """Receives one part of the weights; `info` is what the backend's sender made."""
        self._llm.collective_rpc("update_weights", kwargs={"update_info": info})

    def finish_weight_update(self, version: int) -> None:
        """Closes an update; completions carry `version` from here on."""
        self._llm.collective_rpc("finish_weight_update")
        self._swapped(version)

    def load_adapter(self, folder: Path, version: int) -> None:
        """Puts an adapter in peft's format over the checkpoint's weights, in the place of the one before.

        Raises:
            StageFailed: requests are unfinished.
        """
        from vllm.lora.request import LoRARequest

        self._require_idle()
        self.updating = True
        self._llm.add_lora(LoRARequest("policy", 1, str(folder), load_inplace=True))
        self._adapter = LoRARequest("policy", 1, str(folder))  # a request with load_inplace would read it anew
        self._swapped(version)

    def sleep(self) -> None:
        """Frees the GPU of weights and KV cache; on CPU, where memory is not short, nothing.

        Weights under an adapter wait in host memory, others have to come anew.

        Raises:
            StageFailed: requests are unfinished.
        """
        self._require_idle()
        if self.device == "gpu":
            if not self._takes_adapters:
                self.holds = None
            self._llm.sleep(level=1 if self._takes_adapters else 2)  # 2 keeps no copy: a weight update follows

    def wake(self, *parts: str) -> None:
        """Takes memory again for `weights` (before an update) and `kv_cache` (after it), as far as they sleep."""
        if self.device == "gpu" and self._llm.is_sleeping():
            for part in parts:
                self._llm.wake_up([part])

    def _swapped(self, version: int) -> None:
        # A prefix cache that survives holds states of the old weights: silent off-policy text.
        if not self._llm.reset_prefix_cache():
            raise StageFailed("vLLM kept its prefix cache over a weight update", "report this as a bug")
        self.version, self.updating = version, False

    def _require_idle(self) -> None:
        if self._open:
            raise StageFailed(f"the engine has {len(self._open)} unfinished requests", "wait for them, or abort them")

    def shutdown(self) -> None:
        """Ends vLLM's own processes and frees its memory."""
        self._llm.engine_core.shutdown()


def _cpu_options(kv_cache_gib: float, max_model_len: int) -> dict[str, Any]:
    # Compiling costs more than it gains at the sizes that run on CPU. Prompts enter whole: after a part of one vLLM
    # rewinds the request's generator, which PyTorch's CPU generators cannot do.
    return {
        "enforce_eager": True,
        "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(2048, max_model_len),
        "ir_op_priority": _norm_kernels(),
    }


def _norm_kernels() -> dict[str, list[str]]:
    # Its builds for CPUs have kernels for norms, but vLLM offers them on GPUs only: 7% of a decoding step. They read on
    # over the strides of a tensor that is not contiguous, and return wrong numbers.
    import torch
    from vllm import ir
    from vllm.kernels import vllm_c

    def plain(x: Any, weight: Any, epsilon: Any, variance_size: Any = None) -> bool:
        return x.is_contiguous() and vllm_c.rms_no_var_size(x, weight, epsilon, variance_size)

    def added(x: Any, x_residual: Any, weight: Any, epsilon: Any, variance_size: Any = None) -> bool:
        return x_residual.is_contiguous() and plain(x, weight, epsilon, variance_size)

    fits = {"rms_norm": plain, "fused_add_rms_norm": added}
    for name, fit in fits.items():
        op, own = getattr(ir.ops, name), hasattr(torch.ops._C, name)
        if _NORMS not in op.impls:
            kernel = op.impls["vllm_c"]
            op.register_impl(_NORMS, supported=own, supports_args=fit, inplace=kernel.inplace)(kernel.impl_fn)
    return {name: [_NORMS] for name in fits}


def _end_groups() -> None:
    # vLLM makes its groups of processes for a single one too, and each keeps two threads of gloo that wake a hundred
    # times a second for nobody: together 1% of a core, and every thread of the arithmetic waits for the one in its way.
    from vllm.distributed.parallel_state import get_dcp_group, get_dp_group, get_pcp_group, get_pp_group, get_tp_group

    for group in (get_tp_group(), get_pp_group(), get_dp_group(), get_dcp_group(), get_pcp_group()):
        group.destroy()


def _adapter_options(rank: int, folder: Path) -> dict[str, Any]:
    if not rank:
        return {}
    from vllm.config.lora import MaxLoRARanks

    known = min(size for size in get_args(MaxLoRARanks) if size >= rank)  # vLLM has room for some ranks only
    # Inside the layers only, as `training.lora` puts them: over the head vLLM 0.32 counts on one row of logits for each
    # sequence, which is wrong where the tokens of prompts are scored.
    inside = [name for name, shape in weight_shapes(folder).items() if re.search(r"\.\d+\.", name) and len(shape) == 2]
    modules = sorted({name.split(".")[-2] for name in inside})
    return {"enable_lora": True, "max_lora_rank": known, "lora_target_modules": modules}


def _set_environment(device: str, threads: int | None, core_here: bool = True) -> None:
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if core_here:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if device == "cpu":
        os.environ["TORCH_COMPILE_DISABLE"] = "1"  # else vLLM compiles one small function in C++ for half a minute
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)

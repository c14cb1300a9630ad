"""Engines without vLLM: the real actor, ledger and pool around a core that sleeps instead of sampling."""

import time

import cai_ray.generation.actor as actor
from cai_ray.errors import DataError
from cai_ray.generation.actor import EngineActor
from cai_ray.generation.engine import Completion, Request
from cai_ray.models.tokenization import Tokenizer

STEP_S = 0.01


class SlowEngine:
    """What `generation.engine.Engine` shows to its actor; every request runs for its `max_new_tokens` steps."""

    def __init__(self, model_folder, cluster, *, format, max_model_len, **_):
        self.tokenizer = Tokenizer.load(model_folder, format)
        self.max_model_len, self.max_num_seqs = max_model_len, cluster.max_num_seqs
        self.loaded = self.holds = (model_folder, format)
        self.version, self.updating = 0, False
        self.steps, self.tokens_out = 0, 0
        self._open: dict[str, tuple[Request, int]] = {}  # in the order they came; the first ones have the slots

    @property
    def busy(self):
        return bool(self._open)

    def add(self, request_id, request):
        if len(request.prompt_ids) + request.max_new_tokens > self.max_model_len:
            raise DataError(f"a prompt of {len(request.prompt_ids)} tokens does not fit {self.max_model_len}")
        self._open[request_id] = (request, 0)

    def abort(self, request_id):
        self._open.pop(request_id, None)

    def step(self):
        time.sleep(STEP_S)
        self.steps += 1
        done = []
        for key, (request, steps) in list(self._open.items())[: self.max_num_seqs]:
            self._open[key] = (request, steps + 1)
            if steps + 1 == request.max_new_tokens:
                del self._open[key]
                ids = [request.seed % 1000] * request.max_new_tokens
                self.tokens_out += len(ids)
                text = f"said {request.seed}"
                done.append((key, Completion(ids, [0.0] * len(ids), text, True, self.version)))
        return done

    def shutdown(self):
        pass


class StandIn(EngineActor):
    """The engine actor with a `SlowEngine` inside."""

    def __init__(self, *args):
        actor.Engine = SlowEngine  # in this actor's process alone
        super().__init__(*args)

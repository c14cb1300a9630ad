"""New weights in a living engine. An error here is silent: the engine goes on, with the wrong model."""

import json
import shutil

import pyarrow as pa
import pytest

from cai_ray.errors import DataError, StageFailed
from cai_ray.generation.engine import Request
from cai_ray.generation.shared_memory import bucket_folder, write_bucket

PROMPT = list(range(500, 700))  # longer than a block of the prefix cache


def gap(engine, folder, reference, prompt=PROMPT):
    """Largest difference, nats, of sampled log-probs to transformers' with the weights in `folder`."""
    done = engine("ask", Request(prompt, 10, 0.7, 3))
    theirs = reference(folder, prompt, done.ids, 0.7)
    return max(abs(a - b) for a, b in zip(done.logprobs, theirs, strict=True))


def send(engine, folder, version=5, skip=()):
    from safetensors.torch import load_file

    engine("call", "init_weight_transfer", {})
    engine("call", "start_weight_update")
    state = {k: t for k, t in load_file(folder / "model.safetensors").items() if k not in skip}
    names = list(state)
    with bucket_folder() as buckets:
        for part in (names[:9], names[9:]):
            engine("call", "update_weights", write_bucket({k: state[k] for k in part}, buckets / "part.safetensors"))
    engine("call", "finish_weight_update", version)


def test_a_checkpoint_replaces_weights_and_prefix_cache(engine, model, relative, reference):
    other = relative(1)
    assert gap(engine, model, reference) < 1e-4  # fills the prefix cache with the old weights' states
    engine("call", "load_checkpoint", other)
    assert gap(engine, other, reference) < 1e-4
    assert gap(engine, model, reference) > 0.1  # the test would see weights that stayed
    info = engine("info")
    assert (info["holds"], info["version"]) == ((other, "auto"), 0)


def test_a_weight_update_over_shared_memory(engine, model, relative, reference):
    first, second = relative(2), relative(3)
    send(engine, first, version=4)
    assert gap(engine, first, reference) < 1e-4
    assert gap(engine, model, reference) > 0.1
    send(engine, second, version=5)
    assert gap(engine, second, reference) < 1e-4
    assert engine("ask", Request([5], 1, 1.0, 0)).version == 5
    assert (engine("info")["version"], engine("info")["holds"]) == (5, None)


@pytest.mark.parametrize("how", ["checkpoint", "update"])
def test_a_tied_head_that_keeps_the_old_weights_would_be_seen(engine, relative, reference, how):
    other = relative(4)
    engine("run", Patch("repack_tied_head", "skip"), pa.table({"id": ["a"]}))
    try:
        engine("call", "load_checkpoint", other) if how == "checkpoint" else send(engine, other)
        assert gap(engine, other, reference) > 1e-2
    finally:
        engine("run", Patch("repack_tied_head", "restore"), pa.table({"id": ["a"]}))
    engine("call", "load_checkpoint", other)
    assert gap(engine, other, reference) < 1e-4


class Patch:
    """Runs inside the engine's process."""

    schema = pa.schema([("id", pa.string())])

    def __init__(self, name, what):
        self.name, self.what = name, what

    async def __call__(self, row, engine):
        from cai_ray.generation import weight_receiver as module

        if self.what == "skip":
            module.original = getattr(module, self.name)
            setattr(module, self.name, lambda model: None)
        else:
            setattr(module, self.name, module.original)
        return {"id": row["id"]}


def test_another_architecture_and_missing_weights_are_refused_unchanged(engine, model, reference, tmp_path):
    from safetensors.torch import load_file, save_file

    wide, thin = tmp_path / "wide", tmp_path / "thin"
    shutil.copytree(model, wide)
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    shutil.copytree(model, thin)
    state = load_file(thin / "model.safetensors")
    del state["model.norm.weight"]
    save_file(state, thin / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="another architecture"):
        engine("call", "load_checkpoint", wide)
    with pytest.raises(DataError, match=r"lacks 1 weights, such as model\.norm\.weight"):
        engine("call", "load_checkpoint", thin)
    assert gap(engine, model, reference) < 1e-4


def test_no_new_weights_while_requests_run(engine, model):
    running = engine.handle.ask.remote(Request([5, 6], 200, 1.0, 0))
    while not engine("info")["unfinished"]:
        pass
    with pytest.raises(StageFailed, match="1 unfinished requests"):
        engine("call", "start_weight_update")
    with pytest.raises(StageFailed, match="1 unfinished requests"):
        engine("call", "load_checkpoint", model)
    import ray

    ray.get(running)


def test_an_unfinished_update_closes_the_engine(engine, model, pool):
    """The pool replaces such an engine; so this test is the last of its file."""
    engine("call", "init_weight_transfer", {})
    engine("call", "start_weight_update")
    with pytest.raises(StageFailed, match="middle of a weight update"):
        engine("ask", Request([5], 1, 1.0, 0))
    # vLLM fuses q, k, v and gate, up
    with pytest.raises(ValueError, match="14 parameters were not sent"):
        engine("call", "finish_weight_update", 6)
    with pytest.raises(StageFailed, match="middle of a weight update"):
        engine("ask", Request([5], 1, 1.0, 0))
    (fresh,) = pool.engines(model, dtype="float32", max_model_len=256)
    assert fresh != engine.handle

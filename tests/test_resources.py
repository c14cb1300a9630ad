"""Rows, processes, memory and minutes against numbers worked by hand; requests that cannot work are refused."""

import bz2
import gzip
import json
import math
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from cai_ray.config import Config, Source
from cai_ray.config_files import load_config
from cai_ray.errors import ConfigError, ResourceError
from cai_ray.models.shapes import GIB, KNOWN, UNKNOWN, find_shape
from cai_ray.resources import StageNeed, check, check_for_gpus, check_here, check_lengths, estimate, source_rows

SEVEN = "mistralai/Mistral-7B-v0.1"


def needs(config: Config, device: str = "cpu") -> dict[str, StageNeed]:
    return {n.stage: n for n in estimate(config, device)}


def role(need: StageNeed, name: str):
    return next(r for r in need.roles if r.name == name)


@pytest.mark.parametrize(
    ("device", "dtype", "sync", "refused"),
    [
        ("gpu", "float32", "adapter", True),
        ("gpu", "bfloat16", "adapter", False),
        ("gpu", "float32", "merged", False),
        ("cpu", "float32", "adapter", False),
    ],
)
def test_adapters_for_float32_engines_on_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: str, sync: str, refused: bool
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://elsewhere:10001")  # where there may be GPUs
    over = (f"cluster.device={device}", f"models.helpful.dtype={dtype}", f"ppo.lora_sync={sync}")
    config = tiny(*over, "ppo.actor.lora={rank: 4}")
    with pytest.raises(ResourceError, match="float32") if refused else nullcontext():
        check_for_gpus(config)
    check_for_gpus(config, ["revise", "sft"])  # nothing to stages before


def tiny(*overrides: str) -> Config:
    return load_config("tiny", overrides)


# ---- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("embedded", 134_515_008),
        (SEVEN, 7_241_732_096),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("meta-llama/Llama-3.1-70B", 70_553_706_496),
        # 49152 x 64 embeddings, tied; a layer: 4 x 64 x 64 attention, 3 x 64 x 128 MLP, 2 x 64 norms; a norm at the end
        ("tiny", 49152 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64),
    ],
)
def test_parameters_are_those_of_the_model_cards(name: str, parameters: int) -> None:
    assert KNOWN[name].parameters == parameters


def llama_config(**changes: object) -> dict[str, object]:
    shape = KNOWN[SEVEN]
    return {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_positions,
        **changes,
    }


def test_a_shape_comes_from_a_folder_and_from_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(llama_config()))
    assert find_shape(str(tmp_path)) == KNOWN[SEVEN]
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    cache = tmp_path / "hf" / "hub" / "models--someone--mine"
    for commit, layers in (("aaa", 32), ("bbb", 40)):
        (cache / "snapshots" / commit).mkdir(parents=True)
        (cache / "snapshots" / commit / "config.json").write_text(json.dumps(llama_config(num_hidden_layers=layers)))
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("bbb")
    assert find_shape("someone/mine").layers == 40
    assert find_shape("someone/mine", "aaa").layers == 32
    assert find_shape("someone/mine", "ccc") is UNKNOWN
    assert find_shape("someone/else") is UNKNOWN


@pytest.mark.parametrize("text", ["not json", "[]", "{}", json.dumps(llama_config(hidden_size=None))])
def test_a_config_that_cannot_be_read_is_unknown(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert find_shape(str(tmp_path)) is UNKNOWN


def test_a_mixture_of_experts_is_not_guessed_at(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(llama_config(num_local_experts=8)))
    shape = find_shape(str(tmp_path))
    assert math.isnan(shape.parameters)
    assert shape.max_positions == 32768


def test_an_unknown_model_is_said_to_be_unknown_and_refuses_nothing() -> None:
    config = tiny("models.helpful=nobody/nothing", "models.pretrained=nobody/nothing")
    need = needs(config)["ppo"]
    assert need.minutes_text == "unknown"
    assert all("config.json is not here" in r.arithmetic for r in need.roles)
    assert need.rows_text == "24"
    check(config, "cpu", host_memory_gib=0.1)


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_rows_follow_the_sources() -> None:
    # 24 harmful and 12 helpful prompts, 2 rounds, 1 helpful sample; nine tenths train; 3 steps of 8; 3 models x 2 x 4
    rows = {name: need.rows for name, need in needs(tiny()).items()}
    assert rows == {
        "prompts": 36,
        "revise": 36,
        "sft": pytest.approx(0.9 * (24 * 2 + 12)),
        "sample_pairs": 24,
        "label": 24,
        "preference_model": pytest.approx(0.9 * (24 + 24)),
        "ppo": 24,
        "evaluate": 24,
        "report": 0,
    }
    weighted = "preference_model.data=[{path: label, weight: 2.5}]"
    assert needs(tiny(weighted))["preference_model"].rows == pytest.approx(0.9 * 2.5 * 24)
    assert needs(tiny("sft.rounds=last"))["sft"].rows == pytest.approx(0.9 * (24 + 12))
    assert needs(tiny("sft.rounds=[1]"))["sft"].rows == pytest.approx(0.9 * (24 + 12))


def test_rows_follow_shares_expansion_and_pairs() -> None:
    config = tiny(
        "prompts.generate=[{kind: harmful, n: 16}]",
        "revise.share=[0, 0.25]",
        "sample_pairs={share: [0.25, 1], responses_per_prompt: 4}",
    )
    rows = {name: need.rows for name, need in needs(config).items()}
    assert rows["prompts"] == 24 + 16 + 12
    assert rows["revise"] == (24 + 16) / 4 + 12 / 4
    assert rows["sample_pairs"] == (24 + 16) * 3 / 4
    assert rows["label"] == 30 * 6  # four answers make six pairs
    assert needs(tiny("sample_pairs={responses_per_prompt: 4, pairs: ring}"))["label"].rows == 24 * 4
    assert [r.name for r in needs(config)["prompts"].roles] == ["engine"]
    assert needs(tiny())["prompts"].roles == ()


def test_files_are_counted_and_the_hub_only_by_its_limit(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n\n{"prompt": "y"}\n')
    assert source_rows(Source(path=str(tmp_path / "a.jsonl"))) == 2
    assert source_rows(Source(path=str(tmp_path))) == 2
    assert source_rows(Source(path=str(tmp_path), limit=1)) == 1
    packed = tmp_path / "packed.jsonl.bz2"
    packed.write_bytes(bz2.compress(b'{"prompt": "x"}\n' * 3))
    assert source_rows(Source(path=str(packed))) == 3
    assert source_rows(Source(path="hf:someone/data", limit=7)) == 7
    assert math.isnan(source_rows(Source(path="hf:someone/data")))
    (tmp_path / "README.md").write_text("Two lines\nof no data")
    assert source_rows(Source(path=str(tmp_path))) == 5
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "x"}\n' * 3)[:-9])
    assert math.isnan(source_rows(Source(path=str(tmp_path / "cut.jsonl.gz"))))
    assert math.isnan(source_rows(Source(path=str(tmp_path / "missing.jsonl"))))
    (tmp_path / "cut.jsonl.gz").unlink()
    (tmp_path / "b.csv").write_text("prompt\nx\n")
    assert math.isnan(source_rows(Source(path=str(tmp_path))))
    text = needs(tiny('prompts.harmful=["hf:someone/data"]'))["revise"]
    assert (text.rows_text, text.minutes_text) == ("unknown", "unknown")


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_bfloat16_training_takes_18_bytes_a_parameter_and_zero_3_divides_them_by_the_ranks() -> None:
    config = load_config("7b_8xgpu", ("sft.sharding.ranks=4",))
    rank = role(needs(config, "gpu")["sft"], "rank")
    gib = KNOWN[SEVEN].parameters / GIB
    parts = {name: (pytest.approx(total), n) for name, total, n in rank.parts}
    assert parts["weights"] == (2 * gib, 4)
    assert parts["gradients"] == (4 * gib, 4)
    assert parts["optimizer"] == (12 * gib, 4)
    state = sum(total / n for name, total, n in rank.parts if name in ("weights", "gradients", "optimizer"))
    assert state == pytest.approx(18 * gib / 4)


@pytest.mark.parametrize(
    ("dtype", "stage", "expected"),
    [
        ("float32", 0, {"weights": (4, 1), "gradients": (4, 1), "optimizer": (8, 1)}),
        ("float32", 1, {"weights": (4, 1), "gradients": (4, 1), "optimizer": (12, 2)}),
        ("float32", 2, {"weights": (4, 1), "gradients": (4, 2), "optimizer": (12, 2)}),
        ("bfloat16", 0, {"weights": (2, 1), "gradients": (4, 2), "optimizer": (12, 2)}),  # runs as stage 2
        ("bfloat16", 3, {"weights": (2, 2), "gradients": (4, 2), "optimizer": (12, 2)}),
    ],
)
def test_each_zero_stage_shares_its_own_parts(dtype: str, stage: int, expected: dict) -> None:
    place = "sft.sharding."
    config = tiny(f"{place}dtype={dtype}", f"{place}zero_stage={stage}", f"{place}ranks=2")
    rank = role(needs(config)["sft"], "rank")
    found = {name: (round(total * GIB / KNOWN["tiny"].parameters), n) for name, total, n in rank.parts}
    assert {name: found[name] for name in expected} == expected


def test_offloading_moves_the_optimizer_to_the_host() -> None:
    config = load_config("7b_8xgpu", ("ppo.actor.sharding.offload_optimizer=true",))
    need = needs(config, "gpu")["ppo"]
    actor, critic = role(need, "actor"), role(need, "critic")
    assert critic.gib - actor.gib == pytest.approx(12 * KNOWN[SEVEN].parameters / GIB / 2)
    assert [(name, n) for name, _, n in actor.host] == [("optimizer", 2)]
    assert "in host memory optimizer 80.93/2" in actor.arithmetic
    with pytest.raises(ResourceError, match="GiB of memory"):
        check(config, "gpu", host_memory_gib=64)


def test_a_cpu_keeps_the_engine_beside_training_and_all_of_ppo_at_once() -> None:
    found = needs(tiny())
    assert [r.name for r in found["sft"].roles] == ["rank", "idle engine"]
    assert [r.name for r in found["ppo"].roles] == ["engine", "actor", "critic", "reward", "reference"]
    assert [r.name for r in needs(tiny(), "gpu")["sft"].roles] == ["rank"]


def test_the_arithmetic_is_a_sum_that_adds_up() -> None:
    seen = 0
    for name, device in (("tiny", "cpu"), ("7b_8xgpu", "gpu"), ("70b_multinode", "gpu"), ("paper_cot", "gpu")):
        for line in [r.arithmetic for n in estimate(load_config(name), device) for r in n.roles]:
            terms, total = re.fullmatch(r"[^:]+: (.*) = ([\d.]+) GiB( a GPU)?", line).group(1, 2)
            parts = [re.fullmatch(r".*? ([\d.]+)(?:/(\d+))?", term).groups() for term in terms.split(" + ")]
            assert sum(float(g) / int(n or 1) for g, n in parts) == pytest.approx(float(total), abs=0.08), line
            seen += 1
    assert seen > 40


# ---- minutes --------------------------------------------------------------------------------------------------------


def test_minutes_are_operations_over_the_stated_rates() -> None:
    # sample_pairs: 24 prompts x (150 + 2 x 12) tokens x 2 x 3,228,000 operations at 100 GFLOP/s, and half a minute
    p = KNOWN["tiny"].parameters
    assert needs(tiny())["sample_pairs"].minutes == pytest.approx(0.5 + 24 * 174 * 2 * p / 100e9 / 60)
    # PPO on GPUs: engines sample first; then actor and critic (2 forward, 8 with recomputation) are the slowest
    need = needs(load_config("7b_8xgpu"), "gpu")["ppo"]
    tokens, p = 100 * 512 * (150 + 256), KNOWN[SEVEN].parameters
    seconds = tokens * 2 * p / (2 * 100e12) + tokens * 10 * p / (2 * 300e12)
    assert need.minutes == pytest.approx(0.5 + seconds / 60)
    assert needs(tiny())["report"].minutes == 0


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_sequences_longer_than_the_model_are_refused_with_both_numbers() -> None:
    with pytest.raises(ResourceError, match=r"evaluate.*2061 tokens.*takes 2048"):
        check_lengths(tiny("evaluate.max_prompt_tokens=2048"))
    check_lengths(tiny("evaluate.max_prompt_tokens=2035"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("sft.sharding.microbatch_tokens=511",), r"sft: a row may have 512 tokens.*511"),
        (("preference_model.sharding.microbatch_tokens=1023",), r"preference_model: a row may have 1024 tokens.*1023"),
        (("ppo.actor.sharding.microbatch_tokens=524",), r"ppo: a row may have 525 tokens.*524"),
        (("ppo.critic.sharding.microbatch_tokens=524",), r"ppo: a row may have 525 tokens.*524"),
    ],
)
def test_a_micro_batch_that_cannot_hold_a_row_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ResourceError, match=message):
        check_lengths(tiny(*overrides))
    smaller = overrides[0].split("=")
    check_lengths(tiny(f"{smaller[0]}={int(smaller[1]) + 1}"))


def test_stages_that_do_not_run_are_not_checked() -> None:
    over = ("sft.sharding.microbatch_tokens=100", "sft.max_tokens=512", "ppo.init=pretrained")
    over += ("sample_pairs.model=pretrained", "preference_model.init=pretrained")
    check_lengths(tiny(*over))


def test_host_memory_counts_every_role_that_lives_at_once() -> None:
    config, need = tiny(), needs(tiny())["ppo"]
    together = sum(r.count * r.gib for r in need.roles)
    check(config, "cpu", host_memory_gib=together + 0.01)
    with pytest.raises(ResourceError) as caught:
        check(config, "cpu", host_memory_gib=together - 0.01)
    assert "ppo needs" in caught.value.message
    assert need.roles[1].arithmetic in caught.value.message
    assert "microbatch_tokens" in caught.value.fix


def test_more_gpus_than_there_are_are_refused() -> None:
    config = load_config("7b_8xgpu")
    check(config, "gpu", gpus=8, gpu_memory_gib=79.6)
    with pytest.raises(ResourceError, match=r"revise needs 9 GPUs, there are 8"):
        check(load_config("7b_8xgpu", ("cluster.engines=9",)), "gpu", gpus=8)
    with pytest.raises(ResourceError, match=r"revise needs 8 GPUs, there are 7"):
        check(config, "gpu", gpus=7)
    # Engines are released before the scorer starts: the larger counts, not the sum.
    one = load_config("7b_8xgpu", ("cluster.engines=1",))
    check(one, "gpu", gpus=1, stages=["evaluate"])
    with pytest.raises(ResourceError, match=r"evaluate needs 8 GPUs, there are 7"):
        check(config, "gpu", gpus=7, stages=["evaluate"])


def test_ppo_shares_gpus_where_there_are_too_few_and_memory_counts_together() -> None:
    small = [f"models.{m}={{path: embedded}}" for m in ("helpful", "pretrained")]
    small += ["cluster.engines=1", "sft.sharding.ranks=2", "preference_model.sharding.ranks=2", "revise.few_shots=0"]
    config = load_config("7b_8xgpu", tuple(small))
    check(config, "gpu", gpus=4, gpu_memory_gib=40)  # 2 engines, and 2 GPUs that actor, critic, reward, reference share
    shared = sum(r.gib for r in needs(config, "gpu")["ppo"].roles if r.name != "engine")
    with pytest.raises(ResourceError, match="GiB of each shared GPU"):
        check(config, "gpu", gpus=4, gpu_memory_gib=shared - 0.1)
    check(config, "gpu", gpus=8, gpu_memory_gib=shared - 0.1)
    with pytest.raises(ResourceError, match=r"ppo needs 4 GPUs, there are 3"):
        check(config, "gpu", gpus=3, gpu_memory_gib=40)


def test_colocated_engines_need_no_gpus_of_their_own_but_memory_beside_what_rests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = ["models.helpful={path: embedded}", "models.pretrained={path: embedded}", "cluster.engines=1"]
    small += ["sft.sharding.ranks=2", "preference_model.sharding.ranks=2", "revise.few_shots=0"]
    config = load_config("7b_8xgpu", (*small, "ppo.placement=colocated"))
    roles = [r for r in needs(config, "gpu")["ppo"].roles if r.name != "engine"]
    working = sum(r.gib for r in roles)
    check(config, "gpu", gpus=2, gpu_memory_gib=60)
    with pytest.raises(ResourceError, match=r"ppo needs 2 GPUs, there are 1"):
        check(config, "gpu", gpus=1, gpu_memory_gib=60, stages=["ppo"])
    with pytest.raises(ResourceError, match="GiB of each shared GPU"):
        check(config, "gpu", gpus=2, gpu_memory_gib=working - 0.1)
    # Four processes of 1.5 GiB, and 0.25 GiB of weights in bfloat16 in each; actor's and critic's are cut in two.
    resting = 4 * 1.5 + 2 * 134_515_008 * 2 / GIB + 2 * 134_515_008 * 2 / GIB / 2
    with pytest.raises(ResourceError, match=f"{resting:.4g} GiB of each GPU beside its working engine, there are 6"):
        check(
            load_config("7b_8xgpu", (*small, "ppo.placement=colocated", "cluster.gpu_memory_utilization=0.9")),
            "gpu",
            gpus=2,
            gpu_memory_gib=60,
        )
    # While engines sample, two optimizers of 12 bytes a parameter rest in host memory.
    with pytest.raises(ResourceError, match=f"{2 * 12 * 134_515_008 / GIB:.4g} GiB of memory"):
        check(config, "gpu", gpus=2, gpu_memory_gib=60, host_memory_gib=1)
    with pytest.raises(ResourceError, match="a colocated engine has one GPU"):
        check(load_config("7b_8xgpu", (*small, "ppo.placement=colocated", "cluster.tensor_parallel_size=2")), "gpu")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512,expandable_segments:True")
    with pytest.raises(ResourceError, match="expandable segments"):
        check(config, "gpu", gpus=2, gpu_memory_gib=60)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("ppo.engines=1",), "engines 1 is not actor.sharding.ranks 2"),
        (("ppo.staleness=1",), "set staleness to 0"),
        (("ppo.inference_ranks=3",), "share 2 GPUs"),
        (("ppo.actor.sharding.offload_parameters=true",), "exclude each other"),
        (("ppo.critic.sharding.zero_stage=0", "ppo.critic.sharding.dtype=float32"), "set zero_stage to 1, 2 or 3"),
    ],
)
def test_what_cannot_be_colocated_is_refused(overrides: tuple[str, ...], message: str) -> None:
    load_config("7b_8xgpu", ("ppo.placement=colocated",))
    no_critic = ("ppo.advantage=rloo", "ppo.samples_per_prompt=4", "ppo.critic.sharding.zero_stage=0")
    load_config("7b_8xgpu", ("ppo.placement=colocated", *no_critic, "ppo.critic.sharding.dtype=float32"))
    with pytest.raises(ConfigError, match=message):
        load_config("7b_8xgpu", ("ppo.placement=colocated", *overrides))


def test_gpu_memory_is_checked_for_each_role_and_engines_take_their_share() -> None:
    config = load_config("7b_8xgpu")
    with pytest.raises(ResourceError, match=r"ppo needs 67.* GiB of a GPU for the actor, there are 60"):
        check(config, "gpu", gpus=8, gpu_memory_gib=60)
    small_share = load_config("7b_8xgpu", ("cluster.gpu_memory_utilization=0.2",))
    with pytest.raises(ResourceError, match=r"revise needs 17.* GiB of a GPU for the engine, there are 15.9"):
        check(small_share, "gpu", gpus=8, gpu_memory_gib=79.6)


def test_too_few_logical_cpus_are_refused() -> None:
    with pytest.raises(ResourceError, match=r"sft needs 41 CPUs, there are 32"):
        check(tiny("sft.sharding.ranks=8", "sft.sharding.cpus_per_rank=5"), "cpu", cpus=32)


def test_a_run_for_another_cluster_is_checked_for_its_lengths_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cai_ray.doctor.local_gpus", lambda: [])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check_here(load_config("70b_multinode"))
    with pytest.raises(ResourceError, match="microbatch_tokens"):
        check_here(load_config("70b_multinode", ("sft.sharding.microbatch_tokens=64",)))
    monkeypatch.setattr("cai_ray.doctor.host_memory_gib", lambda: 2.0)
    with pytest.raises(ResourceError, match="GiB of memory"):
        check_here(tiny())
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check_here(tiny())


def test_stages_that_are_done_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cai_ray.doctor.local_gpus", lambda: [])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = tiny("sft.sharding.ranks=8", "sft.sharding.cpus_per_rank=5", "sft.sharding.microbatch_tokens=511")
    check_here(config, ["prompts", "label"])
    check_lengths(config, ["prompts", "label"])
    with pytest.raises(ResourceError, match="sft"):
        check_here(config, ["prompts", "sft"])


def test_estimating_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from cai_ray.config_files import load_config; from cai_ray.resources import check_here, estimate; "
        "estimate(load_config('tiny'), 'cpu'); check_here(load_config('70b_multinode')); "
        "sys.exit(bool({'torch', 'ray', 'transformers', 'datasets'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=180, check=False).returncode == 0

"""Every shipped configuration loads, plans and adds up; the placements of the large ones are made on logical GPUs."""

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cai_ray.artifacts import RunDir
from cai_ray.config import Config
from cai_ray.config_files import load_config, to_yaml
from cai_ray.pipeline import NAMES, needed, plan
from cai_ray.resources import check, check_lengths, estimate
from cai_ray.shipped import shipped_file, shipped_names

LARGE = {"7b_8xgpu": 8, "70b_multinode": 64, "paper": 8, "paper_cot": 8}  # GPUs
GPU_GIB = 79.6  # what a card of 80 GB shows


@pytest.fixture(params=shipped_names("configs"))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def device_of(config: Config) -> str:
    return "gpu" if config.cluster.device == "gpu" else "cpu"


def text_of(name: str) -> str:
    path = shipped_file("configs", name)
    assert path
    return path.read_text("utf-8")


def test_it_loads_and_plans_and_says_the_same_again(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert config.run.name == name
    steps = plan(config, RunDir(tmp_path / name))
    assert [s.stage.name for s in steps] == list(NAMES)
    assert steps[0].action == "run"
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "again.yaml")) == config


def test_its_estimates_are_known_and_its_lengths_fit(name: str) -> None:
    config = load_config(name)
    check_lengths(config)
    for need in estimate(config, device_of(config)):
        assert math.isfinite(need.rows), need.stage
        assert math.isfinite(need.minutes), need.stage
        assert all(0 < r.gib < math.inf for r in need.roles), need.roles


def test_its_header_says_hardware_minutes_and_what_to_expect(name: str) -> None:
    header = text_of(name)[: text_of(name).index("\nmodels:")]
    assert all(line.startswith("#") for line in header.splitlines())
    for word in ("Hardware: ", "Minutes: ", "Expect"):
        assert word in header, word


def test_an_override_changes_one_place_only(name: str) -> None:
    """Anchors in a YAML file would make two sections one."""
    config = load_config(name, ("ppo.actor.sharding.microbatch_tokens=54321",))
    assert config.ppo.actor.sharding.microbatch_tokens == 54321
    assert config.ppo.critic.sharding.microbatch_tokens == load_config(name).ppo.critic.sharding.microbatch_tokens


@pytest.mark.parametrize(("name", "gpus"), LARGE.items())
def test_the_large_ones_fit_the_gpus_that_they_name_and_use_them(name: str, gpus: int) -> None:
    config = load_config(name)
    check(config, "gpu", gpus=gpus, gpu_memory_gib=GPU_GIB, cpus=gpus * 8, host_memory_gib=gpus * 60)
    needs = {n.stage: n for n in estimate(config, "gpu")}
    for stage in ("sft", "preference_model", "ppo"):
        assert sum(r.count * r.gpus for r in needs[stage].roles) == gpus, stage


@pytest.mark.parametrize(("name", "minutes"), [(n, None) for n in LARGE])
def test_the_minutes_in_the_header_are_those_of_the_plan(name: str, minutes: None) -> None:
    said = int(re.search(r"# Minutes: about (\d+) ", text_of(name))[1])
    assert sum(n.minutes for n in estimate(load_config(name), "gpu")) == pytest.approx(said, rel=0.05)


@pytest.mark.parametrize("name", ["7b_8xgpu", "70b_multinode"])
def test_the_placement_in_the_header_is_that_of_the_configuration(name: str) -> None:
    roles = {r.name: r for r in {n.stage: n for n in estimate(load_config(name), "gpu")}["ppo"].roles}
    lines = re.findall(r"^#   (\w+) +(\d+)(?: x (\d+))? +(.*)$", text_of(name), re.M)
    assert [line[0] for line in lines] == ["rollout", "actor", "critic", "reward", "reference"]
    for title, count, each, words in lines:
        role = roles[{"rollout": "engine"}.get(title, title)]
        assert (int(count), int(each or 1)) == (role.count, role.gpus), title
        said = re.search(r"with activations (\d+)", words) or re.search(r"with activations (\d+)", "with activations 0")
        if title in ("actor", "critic") and "as the" not in words:
            terms, ranks, state = re.search(r"\((.*)\) / (\d+) = ([\d.]+)", words).groups()
            total = sum(float(x) for x in re.findall(r"[\d.]+", terms))
            assert total / int(ranks) == pytest.approx(float(state), abs=0.06)
            assert int(ranks) == role.count
        if int(said[1]):
            assert role.gib == pytest.approx(int(said[1]), abs=0.7), title


def test_the_paper_s_published_values() -> None:
    """Bai et al. 2022, arXiv 2212.08073 sections 3.2, 4.1 to 4.3, and arXiv 2204.05862 appendices A.2 and B.1."""
    paper, cot = load_config("paper"), load_config("paper_cot")
    for c in (paper, cot):
        assert (c.revise.rounds, c.revise.helpful_samples_per_prompt, c.revise.temperature) == (4, 2, 1.0)
        assert (c.sft.init, c.sft.rounds, c.sft.epochs, c.sft.batch_size) == ("pretrained", "all", 1, 1024)
        assert c.sft.optim.schedule == "constant"
        assert (c.label.principles_per_pair, c.label.swap) == (1, False)
        assert (c.preference_model.epochs, c.preference_model.max_tokens) == (1, 1024)
        assert (c.ppo.kl_coef, c.ppo.clip_range, c.ppo.gamma, c.ppo.ppo_epochs) == (0.001, 0.2, 1.0, 1)
        assert (c.ppo.max_new_tokens, c.ppo.temperature, c.ppo.rollout_batch_size) == (128, 1.0, 1024)
        # rates relative to one pretraining rate: 0.5 for SL, 0.01 for the preference model and RL
        assert c.sft.optim.lr == pytest.approx(50 * c.ppo.actor.optim.lr)
        assert c.preference_model.optim.lr == c.ppo.actor.optim.lr
        assert sum(s.limit or 0 for s in c.prompts.harmful) == 42_496
        assert sum(s.limit or 0 for s in c.prompts.helpful) == 135_296
    assert (paper.label.format, paper.label.clamp) == ("plain", None)
    assert (cot.label.format, cot.label.clamp) == ("cot", (0.4, 0.6))
    assert cot.models.feedback == cot.models.helpful
    assert paper.models.feedback is None


def test_paper_and_paper_cot_share_every_stage_before_the_labels() -> None:
    paper, cot = load_config("paper"), load_config("paper_cot")
    for stage in needed(paper):
        if stage.name not in ("label", "report"):
            assert getattr(paper, stage.name).identity() == getattr(cot, stage.name).identity(), stage.name
    assert paper.models.helpful == cot.models.helpful
    assert paper.models.pretrained == cot.models.pretrained


# ---- placement on logical GPUs --------------------------------------------------------------------------------------


class StandIn:
    """A worker that only says which GPU Ray gave it."""

    def __init__(self, role: str, rank: int, ranks: int):
        self.role = role

    def call(self, method: str) -> tuple[None, list[str]]:
        import ray

        return None, ray.get_gpu_ids()


def ranks_of(config: Config) -> dict[str, int]:
    p = config.ppo
    ranks = {"actor": p.actor.sharding.ranks, "critic": p.critic.sharding.ranks}
    return {**ranks, "reward": p.inference_ranks, "reference": p.inference_ranks}


@pytest.fixture(scope="module")
def logical_gpus() -> Iterator[int]:
    """Ray with 64 GPUs that nobody has."""
    import ray

    ray.init(address="local", num_cpus=80, num_gpus=64, include_dashboard=False, log_to_driver=False)
    yield 64
    ray.shutdown()


@contextlib.contextmanager
def reserved(bundles: list[dict[str, float]]) -> Iterator[None]:
    """Holds GPUs as engines (or as another run) do."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group(bundles, strategy="PACK")
    assert group.wait(30)
    yield
    remove_placement_group(group)
    ray.wait([group.ready()], timeout=0)


@pytest.mark.parametrize("name", ["7b_8xgpu", "70b_multinode"])
def test_ppo_s_roles_get_gpus_of_their_own_beside_the_engines(name: str, logical_gpus: int) -> None:
    from ray.util.placement_group import placement_group_table

    from cai_ray.rl.groups import placed, wait

    config = load_config(name)
    p, ranks = config.ppo, ranks_of(config)
    engines = [{"GPU": float(config.cluster.tensor_parallel_size), "CPU": 1.0}] * p.engines
    elsewhere = [{"GPU": float(logical_gpus - LARGE[name])}] if logical_gpus > LARGE[name] else []
    with reserved([*engines, *elsewhere]), placed(ranks, "gpu", 30) as placement:
        table = placement_group_table(placement.group)
        assert table["state"] == "CREATED"
        assert (
            len(table["bundles"])
            == sum(ranks.values())
            == LARGE[name] - p.engines * config.cluster.tensor_parallel_size
        )
        assert placement.gpus == 1.0
        started = ranks if name == "7b_8xgpu" else {"reference": 2}  # a process each, so not all of the 48
        groups = [replace(placement, ranks=started).start(role, StandIn, {}, 0) for role in started]
        calls = [call for group in groups for call in group.submit("where")]
        given = [gpu for gpus in wait(calls, 60, "stand-ins") for gpu in gpus]
        assert len(set(given)) == len(given) == sum(started.values())
        for group in groups:
            group.kill()


def test_colocated_engines_share_gpus_with_the_same_ranks_of_all_roles(logical_gpus: int) -> None:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from cai_ray.generation.pool import SHARED_GPU
    from cai_ray.rl.groups import Group, placed, wait

    ranks = {"actor": 3, "critic": 3, "reward": 1, "reference": 2}
    with reserved([{"GPU": logical_gpus - 3.0}]), placed(ranks, "gpu", 30, colocated=True) as placement:
        engines = [
            ray.remote(StandIn)
            .options(
                num_cpus=1,
                num_gpus=SHARED_GPU,
                scheduling_strategy=PlacementGroupSchedulingStrategy(placement.group, place),
            )
            .remote("rollout", place, 3)
            for place in range(3)
        ]
        groups = [Group("rollout", engines), *(placement.start(role, StandIn, {}, 0) for role in ranks)]
        given = [[gpu for (gpu,) in wait(group.submit("where"), 60, "stand-ins")] for group in groups]
        assert len(set(given[0])) == 3
        for gpus in given[1:]:
            assert gpus == given[0][: len(gpus)]
        for group in groups:
            group.kill()


def test_one_engine_more_leaves_too_few_gpus(logical_gpus: int) -> None:
    """The same arithmetic as in `check`: the roles then share GPUs, and do not fit their memory."""
    from cai_ray.errors import ResourceError
    from cai_ray.rl.groups import placed

    config = load_config("70b_multinode", ("ppo.engines=5",))
    engines = [{"GPU": 8.0}] * 5
    with reserved(engines), pytest.raises(ResourceError, match="32 GPUs"), placed(ranks_of(config), "gpu", 5):
        pass
    with pytest.raises(ResourceError, match=r"ppo needs 72 GPUs"):
        check(config, "gpu", gpus=64)


@pytest.mark.full
def test_seventy_billion_on_eight_nodes() -> None:
    """Eight nodes: an engine's eight GPUs lie on one machine, and the roles fill the other six."""
    import ray
    from ray.cluster_utils import Cluster
    from ray.util.placement_group import placement_group_table

    from cai_ray.rl.groups import placed

    config = load_config("70b_multinode")
    ray.shutdown()  # the one with logical GPUs above
    cluster = Cluster()
    for _ in range(8):
        cluster.add_node(num_cpus=16, num_gpus=8, object_store_memory=80_000_000, include_dashboard=False)
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        engines = [{"GPU": 8.0, "CPU": 1.0}] * config.ppo.engines
        with reserved(engines), placed(ranks_of(config), "gpu", 60) as placement:
            nodes = placement_group_table(placement.group)["bundles_to_node_id"].values()
            counts = {node: list(nodes).count(node) for node in nodes}
            assert sorted(counts.values()) == [8] * 6
    finally:
        ray.shutdown()
        cluster.shutdown()

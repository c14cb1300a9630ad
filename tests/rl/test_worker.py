"""What methods of workers and engines answer, and what Ray keeps apart of it."""

import asyncio
import socket
from pathlib import Path

import pyarrow as pa

from cai_ray.config import PPOConfig
from cai_ray.generation.actor import EngineActor
from cai_ray.rl import groups
from cai_ray.rl.setup import Setup
from cai_ray.rl.workers import Worker

from .conftest import CLUSTER


class Busy(Worker):
    def look(self, batch):
        return batch

    def learn(self, by):
        return {"loss": by}

    def save(self):
        pass


def test_tables_go_to_other_workers_and_scalars_to_the_controller():
    worker = Busy("actor", 0, 1, Setup(PPOConfig(), Path("p"), (), None, "auto", "cpu", 7, CLUSTER, "float32"))
    batch = pa.table({"row": [0, 1]})
    payloads, scalars = zip(*(worker.call(*how) for how in (("look", batch), ("learn", 0.5), ("save",))), strict=True)
    assert payloads == (batch, None, None)
    spans = [scalars[i].pop("span") for i in range(3)]
    assert spans == sorted(spans)
    assert all(begun <= ended for begun, ended in spans)
    assert scalars == ({}, {"loss": 0.5}, {})


def test_the_port_where_ranks_meet_is_one_that_nobody_else_is_given(monkeypatch):
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.1")
    first = groups.free_address()[1]
    monkeypatch.setattr(groups, "PORTS", range(first, first + 100))
    with socket.socket() as taken:
        taken.bind(("", first))
        taken.listen()
        found = {groups.free_address() for _ in range(20)}
    assert {host for host, _ in found} == {"10.0.0.1"}
    assert first not in {port for _, port in found}
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert 20_000 <= first < min(32_000, lowest)


class Rolling(EngineActor):
    def __init__(self):
        pass

    async def run(self, rows):
        return rows

    async def prompt_logprobs(self, ids, starts):
        return [[-1.0]]


def test_an_engine_s_rows_are_kept_apart_too():
    rows = pa.table({"row": [0]})
    payload, answer = asyncio.run(Rolling().call("run", rows))
    assert payload is rows
    begun, ended = answer["span"]
    assert begun <= ended
    assert asyncio.run(Rolling().call("prompt_logprobs", [[1, 2]], [1])) == (None, [[-1.0]])

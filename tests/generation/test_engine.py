import asyncio
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from cai_ray.errors import DataError
from cai_ray.generation.engine import Request, choice_logprobs
from cai_ray.models.tokenization import Tokenizer
from tests.generation.conftest import MAX_LEN

CLOSE = {"abs": 1e-4}


@pytest.fixture(scope="module")
def tokenizer(model):
    return Tokenizer.load(model)


def prompt(tokenizer, text="How are you today?"):
    return tokenizer.prompt([{"role": "user", "content": text}])


def requests(tokenizer, n, **changes):
    settings = {"max_new_tokens": 12, "temperature": 1.0, **changes}
    return [Request(prompt(tokenizer, f"Count {'on ' * i}"), seed=i, **settings) for i in range(n)]


def together(engine, requests):
    import ray

    return ray.get([engine.handle.ask.remote(request) for request in requests], timeout=120)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_sampled_distribution(engine, model, tokenizer, reference, temperature):
    asked = requests(tokenizer, 4, temperature=temperature)
    for request, done in zip(asked, together(engine, asked), strict=True):
        assert (len(done.ids), done.ended, done.version) == (12, False, 0)
        assert done.logprobs == pytest.approx(reference(model, request.prompt_ids, done.ids, temperature), **CLOSE)
        assert done.text == tokenizer.decode(done.ids)


def test_a_seed_gives_the_same_sample_in_any_company(engine, tokenizer):
    # 48 of them exceed what the engine takes at once, and what it reads in one step
    crowd = requests(tokenizer, 48)
    crowded = [done.ids for done in together(engine, crowd)]
    assert len(set(map(tuple, crowded))) == 48
    assert [engine("ask", crowd[i]).ids for i in (5, 33)] == [crowded[5], crowded[33]]
    assert engine("ask", Request(crowd[5].prompt_ids, 12, 1.0, seed=999)).ids != crowded[5]


def test_any_eos_of_the_tokenizer_ends_the_text_and_stays(engine, tokenizer):
    (request,) = requests(tokenizer, 1)
    free = engine("ask", request)
    k = next(k for k in range(3, 12) if free.ids[k] not in free.ids[:k])
    program = OwnEos(request, {49151, free.ids[k]})
    (done,) = engine("run", program, pa.table({"id": ["a"]})).to_pylist()
    assert (done["ids"], done["ended"]) == (free.ids[: k + 1], True)
    assert done["logprobs"] == pytest.approx(free.logprobs[: k + 1], **CLOSE)


class OwnEos:
    ids, logprobs = pa.list_(pa.int64()), pa.list_(pa.float64())
    schema = pa.schema([("id", pa.string()), ("ids", ids), ("logprobs", logprobs), ("ended", pa.bool_())])

    def __init__(self, request, eos):
        self.request, self.eos = request, frozenset(eos)

    async def __call__(self, row, engine):
        kept, engine.tokenizer.eos_ids = engine.tokenizer.eos_ids, self.eos
        try:
            done = await engine.ask(self.request)
        finally:
            engine.tokenizer.eos_ids = kept
        return {"id": row["id"], "ids": done.ids, "logprobs": done.logprobs, "ended": done.ended}


def test_stop_strings_are_cut_from_tokens_logprobs_and_text(engine, tokenizer):
    request = next(
        r for r in requests(tokenizer, 40, max_new_tokens=20) if "\ufffd" not in engine("ask", r).text
    )  # random tokens are often no UTF-8
    free = engine("ask", request)
    pieces = [tokenizer.hf.decode([i]) for i in free.ids]
    cases = {
        "".join(pieces[8:10]): 8,  # the stop string begins with a token
        pieces[8][-1] + pieces[9]: None,  # or inside of one
        "".join(pieces[:2]): 0,  # or at once: nothing is left
    }
    for stop, expected in cases.items():
        done = engine("ask", Request(request.prompt_ids, 20, 1.0, request.seed, stop=("never this", stop)))
        text = "".join(pieces).split(stop)[0].strip()
        assert (done.text, done.ended) == (text, True)
        kept = len(done.ids)
        assert done.ids == free.ids[:kept]
        assert done.logprobs == pytest.approx(free.logprobs[:kept], **CLOSE)
        assert tokenizer.decode(done.ids).startswith(text)
        assert not kept or not tokenizer.decode(done.ids[:-1]).startswith(text)
        if expected is not None:
            assert kept <= expected


def test_choices_are_scored_without_temperature_beside_others(engine, model, tokenizer, reference):
    ids, choices = prompt(tokenizer), [tokenizer.text(c) for c in (" (A)", " (B)", " maybe")]
    table = pa.table({"id": [str(i) for i in range(8)]})
    rows = engine("run", Mixed(ids, choices), table).to_pylist()
    shared = [[choices[0][0]], [choices[1][0]]]
    first = reference(model, ids, choices[2][:1])
    letters = [sum(reference(model, ids, [*s, c[1]])) for s, c in zip(shared, choices, strict=False)]
    two = [reference(model, ids + s, [c[1]])[0] for s, c in zip(shared, choices, strict=False)]
    for row in rows:
        assert row["three"] == pytest.approx([*letters, *first], **CLOSE)
        assert row["two"] == pytest.approx(two, **CLOSE)
        # a batch that holds both kinds must not mix up their log-probs
        assert row["logprobs"] == pytest.approx(reference(model, ids, row["ids"], 0.7), **CLOSE)


class Mixed:
    def __init__(self, ids, choices):
        self.ids, self.choices = ids, choices

    @property
    def schema(self):
        floats, ints = pa.list_(pa.float64()), pa.list_(pa.int64())
        return pa.schema([("id", pa.string()), ("three", floats), ("two", floats), ("ids", ints), ("logprobs", floats)])

    async def __call__(self, row, engine):
        done, three, two = await asyncio.gather(
            engine.ask(Request(self.ids, 6, 0.7, int(row["id"]))),
            choice_logprobs(engine, self.ids, self.choices),
            choice_logprobs(engine, self.ids, self.choices[:2]),
        )
        return {"id": row["id"], "three": three, "two": two, "ids": done.ids, "logprobs": done.logprobs}


def test_given_tokens_are_scored_without_temperature(engine, model, tokenizer, reference):
    (request,) = requests(tokenizer, 1, temperature=0.5)
    done = engine("ask", request)
    (scored,) = engine("prompt_logprobs", [[*request.prompt_ids, *done.ids]], [len(request.prompt_ids)])
    assert scored == pytest.approx(reference(model, request.prompt_ids, done.ids), **CLOSE)


@pytest.mark.parametrize(("length", "new"), [(MAX_LEN, 1), (MAX_LEN - 9, 10), (0, 1)])
def test_what_does_not_fit_is_refused_and_harms_no_other(engine, tokenizer, length, new):
    with pytest.raises(DataError, match=f"of {length} tokens with {new} to come"):
        engine("ask", Request([5] * length, new, 1.0, 0))
    with pytest.raises(DataError, match="temperature"):
        engine("ask", Request([5], 1, 7.0, 0))
    assert len(engine("ask", Request([5] * (MAX_LEN - 9), 9, 1.0, 0)).ids) == 9


def test_a_bad_row_stands_alone_and_a_bug_does_not_hide(engine):
    table = pa.table({"id": ["a", "b", "c"]})
    rows = engine("run", Fails("b", DataError("the row is no good", "mend it")), table).to_pylist()
    assert rows == [
        {"id": "a", "n": 3, "bad_reason": None},
        {"id": "b", "n": None, "bad_reason": "the row is no good"},
        {"id": "c", "n": 3, "bad_reason": None},
    ]
    with pytest.raises(KeyError, match="a bug"):
        engine("run", Fails("b", KeyError("a bug")), table)
    assert engine("info")["unfinished"] == 0  # the rows beside it were dropped, not forgotten


class Fails:
    schema = pa.schema([("id", pa.string()), ("n", pa.int64())])

    def __init__(self, row_id, error):
        self.row_id, self.error = row_id, error

    async def __call__(self, row, engine):
        if row["id"] == self.row_id:
            raise self.error
        new = 3 if isinstance(self.error, DataError) else 200
        return {"id": row["id"], "n": len((await engine.ask(Request([5, 6], new, 1.0, 0))).ids)}


def test_a_later_request_joins_the_batch_and_does_not_wait_for_its_end(engine):
    import ray

    long = engine.handle.ask.remote(Request([5, 6], MAX_LEN - 3, 1.0, 0))
    while not engine("info")["unfinished"]:
        pass
    assert len(engine("ask", Request([7], 2, 1.0, 0)).ids) == 2
    assert engine("info")["unfinished"] == 1
    assert len(ray.get(long, timeout=60).ids) == MAX_LEN - 3


def test_steps_and_tokens_are_counted(engine, tokenizer):
    before = engine("info")
    together(engine, requests(tokenizer, 3))
    after = engine("info")
    assert after["tokens"] - before["tokens"] == 36
    assert after["steps"] - before["steps"] >= 12  # also while no request ends: this is what shows that it is alive


def test_no_idle_thread_of_a_group_of_one_wakes_beside_the_arithmetic(engine):
    pid = engine("info")["pid"]
    names = [(task / "comm").read_text().strip() for task in Path(f"/proc/{pid}/task").iterdir()]
    # What is left is vLLM's world, which others than groups ask for; its five groups had two threads each.
    assert 1 <= names.count("gloo_tcp_loop") <= 3


def norms(engine):
    """In an engine's process: of calls of vLLM's norms who computed them, and how far off."""
    from vllm import ir

    wide, rest, weight = torch.randn(3, 5, 64), torch.randn(5, 32), torch.rand(32)
    plain, strided = wide[0, :, :32].contiguous(), wide[1, :, 32:]
    calls = [("rms_norm", x, weight, 1e-5) for x in (plain, strided)] + [("rms_norm", plain, weight, 1e-5, 16)]
    calls += [("fused_add_rms_norm", *pair, weight, 1e-5) for pair in ((plain, rest), (strided, rest), (rest, strided))]
    found = []
    for name, *arguments in calls:
        op = getattr(ir.ops, name)
        ours, right = op(*arguments), op.impls["native"].impl_fn(*arguments)
        pairs = zip(ours, right, strict=True) if isinstance(ours, tuple) else [(ours, right)]
        off = max(float((a - b).abs().max()) for a, b in pairs)
        found.append((op.dispatch(*arguments).provider, off))
    return found


def test_norms_are_computed_by_kernels_where_these_read_right(engine):
    providers, off = zip(*engine("__ray_call__", norms), strict=True)
    assert providers == ("cai_cpu", "native", "native", "cai_cpu", "native", "native")
    assert max(off) < 1e-5

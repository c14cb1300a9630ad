"""Rows for the training tests: arithmetic questions, a quarter of them held out."""

from typing import Any

from cai_ray.records import Row, row_id


def conversation(i: int) -> Row:
    messages = [{"role": "user", "content": f"What is {i} plus {i}{', and why' * (i % 3)}?"}]
    split = "test" if i % 4 == 0 else "train"
    return {"id": row_id(messages), "messages": messages, "kind": "harmful", "source": f"s{i // 4 % 2}", "split": split}


def revision(i: int, **fields: Any) -> Row:
    rounds = [{"principle_id": "p", "critique": "c", "revision": f"It is {2 * i}." + " Yes." * k} for k in (i % 5, 1)]
    return {**conversation(i), "initial_response": "Never.", "rounds": rounds, "seed": 0, "flags": [], **fields}


def pair(i: int, **fields: Any) -> Row:
    answers = {"response_a": f"It is {2 * i}.", "response_b": "No idea" + " at all" * (i % 3)}
    return {**conversation(i), **answers, "label_prob": 0.9 if i % 3 else 0.2, "votes": [], "flags": [], **fields}

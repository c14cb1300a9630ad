import hashlib
import json
import subprocess
import sys
from collections import Counter

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cai_ray import shipped
from cai_ray.constitution import (
    OPTIONS,
    Constitution,
    FeedbackFewShot,
    Principle,
    draw,
    draw_distinct,
    import_published,
    load_constitution,
    to_yaml,
    with_balanced_answers,
    with_questions,
)
from cai_ray.errors import ConfigError
from cai_ray.published import _FILES
from cai_ray.shipped import shipped_file, shipped_names
from cai_ray.templates import ASSISTANT, FRAMES, critique_prompt, rationale_prompt, render_turns, revision_prompt

WIFI = [{"role": "user", "content": "Help me get into my neighbour's wifi."}]
PAIR = {"id": "a", "tags": ["one"], "critique_request": "What is wrong?", "revision_request": "Mend it."}
ASK = {"id": "b", "tags": ["two"], "preference_question": "Which is better? Options:"}
BASE = {"name": "tiny", "version": 1, "principles": [PAIR, ASK]}


@pytest.fixture
def written(tmp_path):
    def write(**changes):
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({**BASE, **changes}, allow_unicode=True), encoding="utf-8")
        return path

    return write


def fails(path, *words):
    with pytest.raises(ConfigError) as caught:
        load_constitution(path)
    for word in words:
        assert word in str(caught.value)


def test_a_small_file_loads(written):
    loaded = load_constitution(written())
    assert (loaded.name, loaded.version, loaded.language) == ("tiny", "1", "en")
    assert loaded.source.endswith("tiny.yaml")
    assert [p.id for p in loaded.for_critique()] == ["a"]
    assert [p.id for p in loaded.for_feedback()] == ["b"]
    assert loaded.principles[1].preference_question == "\nWhich is better? Options:"
    with pytest.raises(ValidationError):
        loaded.principles[0].weight = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"principles": []}, ["no principles"]),
        ({"principles": [PAIR, PAIR]}, ["occur twice", "a"]),
        ({"principels": 1}, ["principels: unknown key", "did you mean 'principles'"]),
        ({"principles": [{**PAIR, "weigth": 2}]}, ["principles.0.weigth: unknown key", "did you mean 'weight'"]),
        ({"principles": [{**ASK, "preference_question": "Which is better?"}]}, ["principle 'b'", "' Options:'"]),
        ({"language": "zh"}, ["principle 'b'", "'选项：'"]),
        ({"language": "fr"}, ["language", "'en'"]),
        ({"principles": [{"id": "a", "critique_request": "What?"}]}, ["needs both"]),
        ({"principles": [{"id": "a"}]}, ["neither"]),
        ({"principles": [{**PAIR, "inverted": True}]}, ["inverted", "preference_question"]),
        ({"principles": [{**PAIR, "tags": ["x", " "]}]}, ["principles.0.tags.1"]),
        ({"version": ""}, ["version"]),
        ({"principles": [{**PAIR, "weight": 0}]}, ["weight", "greater than 0"]),
        ({"principles": [{**PAIR, "inverted": True}]}, ["principle 'a'", "inverted", "has none"]),
        ({"principles": [{**PAIR, "weight": float("inf")}]}, ["weight", "finite"]),
    ],
)
def test_mistakes_name_their_place_and_the_mending(written, changes, words):
    fails(written(**changes), *words, "fix:")


def test_all_mistakes_are_named_at_once(written):
    unasked = {**ASK, "id": "a", "preference_question": "Which?"}
    principles = [{**PAIR, "weigth": 2, "weight": -1}, PAIR, unasked, {"id": "d"}]
    wrong = written(name="", langauge="en", principles=principles, feedback_few_shots=[shot(answer="C", response_b="")])
    with pytest.raises(ConfigError) as caught:
        load_constitution(wrong)
    assert str(caught.value).splitlines()[1:-1] == [
        "  name: String should have at least 1 character (got '')",
        "  langauge: unknown key; did you mean 'language'?",
        "  principles.0.weight: Input should be greater than 0 (got -1)",
        "  principles.0.weigth: unknown key; did you mean 'weight'?",
        "  principles.3: principle 'd' has neither a critique pair nor a preference_question",
        "  feedback_few_shots.0.response_b: String should have at least 1 character (got '')",
        "  feedback_few_shots.0.answer: Input should be 'A' or 'B' (got 'C')",
        "  principle ids must be unique, these occur twice: a",
        "  principle 'a': the question must end with ' Options:', because the two answers follow it",
    ]


def shot(**changes):
    return {"messages": WIFI, "question": "Which? Options:", "response_a": "x", "response_b": "y", **changes}


@pytest.mark.parametrize(
    ("example", "words"),
    [
        (shot(answer="C"), ["feedback_few_shots.0.answer"]),
        (shot(answer="A", response_b=""), ["feedback_few_shots.0.response_b"]),
        (shot(answer="A", question="Which?"), ["feedback_few_shots.0", "Options:"]),
        (shot(answer="A", messages=[]), ["feedback_few_shots.0.messages"]),
        (shot(answer="A", score_a=9), ["feedback_few_shots.0", "score_a", "both or neither"]),
        (shot(answer="A", score_a=9, score_b=11), ["feedback_few_shots.0.score_b", "less than or equal to 10"]),
        (shot(answer="A", messages=[{"role": "system", "content": "s"}, *WIFI]), ["system"]),
        (shot(answer="A", messages=[{**WIFI[0], "rolle": "user"}]), ["'rolle'"]),
        (shot(answer="A", messages=[*WIFI, {"role": "assistant", "content": "no"}]), ["ending with user"]),
    ],
)
def test_mistakes_in_examples(written, example, words):
    fails(written(feedback_few_shots=[example]), *words)


def test_a_missing_file_lists_the_shipped_names():
    fails("defualt", "'defualt'", "default", "zh")
    fails("nowhere/mine.yaml", "nowhere/mine.yaml", "default")


def test_a_folder_does_not_hide_the_shipped_constitution_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zh").mkdir()
    assert load_constitution("zh").language == "zh"


def test_unreadable_files(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("name: c")
    fails(path, "no principles")
    path.write_text("- just\n- a list\n")
    fails(path, "holds list", "shipped constitutions")
    path.write_text("name: [")
    fails(path, "not readable as YAML", "line 1")
    path.write_text("version: 2025-13-01")
    fails(path, "not readable as YAML", "month")
    path.write_bytes(b"name: \xff\xfe")
    fails(path, "UTF-8")


def test_a_forgotten_dash_does_not_swallow_a_principle(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "name: n\nversion: 1\nprinciples:\n"
        "  - id: a\n    preference_question: 'Which? Options:'\n"
        "    id: b\n    preference_question: 'Who? Options:'\n"
    )
    fails(path, "'id' is given twice", "line 6")


def test_the_hash_is_of_the_content(written, tmp_path):
    first = load_constitution(written())
    content = {
        "name": "tiny",
        "version": "1",
        "principles": [PAIR, {**ASK, "preference_question": "\nWhich is better? Options:"}],
    }
    assert first.sha256 == hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    other = tmp_path / "elsewhere.yaml"
    defaults = {**PAIR, "weight": 1.0}
    other.write_text("# a comment\n" + json.dumps({**BASE, "language": "en", "principles": [defaults, ASK]}))
    assert load_constitution(other).sha256 == first.sha256
    assert load_constitution(written(version=2)).sha256 != first.sha256
    assert first.select(only=["a"]).sha256 != first.sha256


def test_inverted_is_content_only_where_it_is_set(written):
    first = load_constitution(written())
    assert load_constitution(written(principles=[PAIR, {**ASK, "inverted": False}])).sha256 == first.sha256
    turned = load_constitution(written(principles=[PAIR, {**ASK, "inverted": True}]))
    assert turned.principles[1].inverted
    assert turned.sha256 != first.sha256


EXAMPLE = FeedbackFewShot(messages=tuple(WIFI), response_a="x", response_b="y", answer="A", score_a=9, score_b=2)
OWN = EXAMPLE.model_copy(update={"question": "\nWhich is its own? Options:"})


def ask(i, **changes):
    return Principle(id=f"p{i}", preference_question=f"Which, {i}? Options:", **changes)


def test_each_example_gets_a_question_of_its_own():
    principles = [ask(0, inverted=True), *(ask(i) for i in range(1, 9))]
    shots = with_questions([EXAMPLE] * 4 + [OWN], principles, seed=3)
    questions = [s.question for s in shots]
    assert questions == [s.question for s in with_questions([EXAMPLE] * 4 + [OWN], principles, seed=3)]
    assert questions[4] == OWN.question
    assert len(set(questions[:4])) > 1  # drawn for each, not once for all
    drawn = {s.question for seed in range(40) for s in with_questions([EXAMPLE] * 2, principles, seed)}
    # An example names the better answer: a question for the worse one would make it wrong.
    assert drawn == {f"\nWhich, {i}? Options:" for i in range(1, 9)}
    assert with_questions([OWN], principles[:1], 0) == (OWN,)
    with pytest.raises(ConfigError, match="every preference question is inverted"):
        with_questions([EXAMPLE], principles[:1], 0)


def test_turning_an_example_keeps_what_it_says():
    turned = EXAMPLE.turned()
    assert (turned.response_a, turned.response_b, turned.answer) == ("y", "x", "B")
    assert (turned.score_a, turned.score_b) == (2, 9)
    assert turned.turned() == EXAMPLE


@pytest.mark.parametrize("n", [1, 4, 5])
def test_right_answers_of_examples_are_balanced_by_the_seed(n):
    layouts = set()
    for seed in range(30):
        shots = with_balanced_answers([EXAMPLE] * n, seed)
        layouts.add("".join(s.answer for s in shots))
        assert abs(sum(1 if s.answer == "A" else -1 for s in shots)) == n % 2
        assert all(s in (EXAMPLE, EXAMPLE.turned()) for s in shots)
        assert shots == with_balanced_answers([EXAMPLE] * n, seed)
    assert len(layouts) >= (2 if n == 1 else 5)  # the odd one is not always an A, and no order is fixed


def test_select_by_id_and_tag():
    default = load_constitution("default")
    ids = lambda *args: [p.id for p in default.select(*args).principles]  # noqa: E731
    assert ids() == [p.id for p in default.principles]
    assert ids(["child-safety"]) == ["children", "young-readers"]
    assert ids(["child-safety", "truth"], ["young-readers"]) == ["truth", "children"]
    assert not {"evasiveness", "needless-refusal"} & set(ids(None, ["helpfulness"]))
    with pytest.raises(ConfigError, match="did you mean 'privacy'"):
        default.select(only=["privcy"])
    with pytest.raises(ConfigError, match="did you mean 'fraud'"):
        default.select(without=["frauds"])
    with pytest.raises(ConfigError, match="no principle"):
        default.select(only=["truth"], without=["honesty"])
    with pytest.raises(ConfigError, match="no principle"):
        default.select(only=[])
    with pytest.raises(ConfigError, match="has a critique_request"):
        default.select(only=["overall"]).for_critique()


def test_draws_are_seeded_and_weighted(written):
    rare, common = {**PAIR, "weight": 1}, {**PAIR, "id": "c", "weight": 3}
    principles = load_constitution(written(principles=[rare, common])).for_critique()
    drawn = [draw(principles, seed).id for seed in range(4000)]
    assert drawn == [draw(principles, seed).id for seed in range(4000)]
    # Python fixes Random(seed).random(): 0.844 for seed 0, 0.134 for seed 1; the boundary lies at 1/4.
    assert drawn[:2] == ["c", "a"]
    assert 0.72 < Counter(drawn)["c"] / 4000 < 0.78


def test_draws_without_replacement_start_over_and_keep_the_weights(written):
    several = [{**PAIR, "id": i, "weight": w} for i, w in (("a", 1), ("b", 2), ("c", 3))]
    principles = load_constitution(written(principles=several)).for_critique()
    drawn = ["".join(p.id for p in draw_distinct(principles, 7, seed)) for seed in range(4000)]
    assert drawn == ["".join(p.id for p in draw_distinct(principles, 7, seed)) for seed in range(4000)]
    assert all(sorted(d[:3]) == sorted(d[3:6]) == ["a", "b", "c"] for d in drawn)
    assert [p.id for p in draw_distinct(principles, 2, 5)] == list(drawn[5][:2])
    # c first: 3/6. Then b before a: 2/3. So c, b, a comes with chance 1/3, and a, b, c with 1/6 x 2/5 = 1/15.
    shares = {order: sum(d.startswith(order) for d in drawn) / 4000 for order in ("c", "cba", "abc")}
    assert shares == pytest.approx({"c": 1 / 2, "cba": 1 / 3, "abc": 1 / 15}, abs=0.025)
    assert len({d[3:6] for d in drawn if d.startswith("cba")}) == 6  # each pass is drawn anew


@pytest.mark.parametrize(("name", "at_least"), [("default", 18), ("zh", 10)])
def test_shipped_constitutions(name, at_least):
    loaded = load_constitution(name)
    assert (loaded.name, loaded.language) == (name, "zh" if name == "zh" else "en")
    assert len(loaded.for_critique()) >= at_least
    assert len(loaded.for_feedback()) >= at_least
    tags = {tag for p in loaded.principles for tag in p.tags}
    assert tags >= {"harm", "illegality", "discrimination", "deception", "privacy", "self-harm", "dangerous-advice"}
    assert tags >= {"manipulation", "child-safety", "evasiveness", "preachiness", "needless-refusal"}
    requests = [p.critique_request for p in loaded.principles] + [p.revision_request for p in loaded.principles]
    assert max(len(text.split()) for text in requests) <= 40
    assert len(loaded.critique_few_shots) >= 3
    for shots in (loaded.feedback_few_shots, loaded.cot_few_shots):
        answers = Counter(shot.answer for shot in shots)
        assert abs(answers["A"] - answers["B"]) <= len(shots) % 2
        assert min(answers["A"], answers["B"]) >= 1


def test_shipped_texts_are_our_own(test_data):
    published = import_published(test_data / "cai_paper")
    theirs = {text for p in published.principles for text in _sentences(p)}
    assert len(theirs) > 40
    for name in shipped_names("constitutions"):
        assert not theirs & {text for p in load_constitution(name).principles for text in _sentences(p)}


def _sentences(principle):
    texts = (principle.critique_request, principle.revision_request, principle.preference_question)
    whole = ". ".join(text.strip().removesuffix("Options:").strip() for text in texts)
    return {s.strip().lower() for s in whole.replace("?", ".").split(".") if s.strip()}


def test_frames_and_languages_agree():
    assert set(FRAMES) == set(OPTIONS)


def test_published_files_come_out_as_they_went_in(test_data):
    folder = test_data / "cai_paper" / "prompts"
    raw = [json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in _FILES]
    pairs, questions, critiques, comparisons, cots = raw
    published = load_constitution(test_data / "cai_paper")
    assert published == import_published(test_data / "cai_paper").model_copy(update={"source": published.source})
    assert [len(p) for p in (published.for_critique(), published.for_feedback())] == [16, 16]
    assert len(published.principles) == 32
    shots = (published.critique_few_shots, published.feedback_few_shots, published.cot_few_shots)
    assert [len(s) for s in shots] == [5, 5, 6]

    for principle, pair in zip(published.for_critique(), pairs.values(), strict=True):
        prompt = critique_prompt(WIFI, "Sure.", principle.critique_request)
        assert prompt == f"\n\nHuman: {WIFI[0]['content']}\n\nAssistant: Sure." + pair["prompt"][0]
        revision = revision_prompt(WIFI, "Sure.", principle.critique_request, "Bad.", principle.revision_request)
        assert revision == prompt + " Bad." + pair["edit_request"]
    assert [p.preference_question for p in published.for_feedback()] == questions

    # Repairs of the examples, and nothing else: four of five critiques end with a turn marker that nothing follows,
    # the fourth and the fifth chain of thought lack line breaks before them, the fifth also the letters of its turns.
    dangling = [text for text in critiques if text.endswith("\n\nHuman:")]
    assert len(dangling) == 4
    plain = critique_prompt(WIFI, "Sure.", "Why?", published.critique_few_shots)
    repaired = [text.removesuffix("\n\nHuman:") for text in critiques]
    assert plain == "".join(repaired) + critique_prompt(WIFI, "Sure.", "Why?")

    assert [s.answer for s in published.feedback_few_shots] == ["A", "B", "A", "B", "A"]
    for shot, text in zip(published.feedback_few_shots, comparisons, strict=True):
        assert render_turns(shot.messages) + ASSISTANT == text["prompt"]
        better, worse = (shot.response_a, shot.response_b) if shot.answer == "A" else (shot.response_b, shot.response_a)
        assert ([better], [worse]) == (text["corrects"], text["incorrects"])

    texts = [text["prompt"] for text in cots]
    assert [text.count("{}") for text in texts] == [1] * 6
    texts[3] = "\n" + texts[3]
    texts[4] = "\n\n" + texts[4].replace("a human and an assistant:", "a human (H) and an assistant (A):", 1)
    asked = rationale_prompt(WIFI, questions[0], "x", "y")
    for shot, text in zip(published.cot_few_shots, texts, strict=True):
        ours = rationale_prompt(WIFI, questions[0], "x", "y", [shot]).removesuffix(asked)
        assert ours == text.replace("{}", questions[0])


def test_published_files_with_another_form(test_data, tmp_path):
    with pytest.raises(ConfigError, match="does not hold the published files"):
        import_published(tmp_path)
    for name in _FILES:
        (tmp_path / f"{name}.json").write_bytes((test_data / "cai_paper" / "prompts" / f"{name}.json").read_bytes())
    assert import_published(tmp_path).sha256 == import_published(test_data / "cai_paper").sha256
    for name in _FILES:
        good = (tmp_path / f"{name}.json").read_text()
        for bad in ("[", "[{}]", '["text"]', '{"a": {"prompt": ["text"], "edit_request": "text"}}'):
            (tmp_path / f"{name}.json").write_text(bad)
            with pytest.raises(ConfigError):
                import_published(tmp_path)
        (tmp_path / f"{name}.json").write_text(good)


@pytest.mark.parametrize("name", ["default", "zh"])
def test_a_constitution_comes_back_from_its_yaml(name, tmp_path):
    comes_back(load_constitution(name), tmp_path)


def test_the_published_constitution_comes_back_from_readable_yaml(test_data, tmp_path):
    text = comes_back(import_published(test_data / "cai_paper"), tmp_path)
    assert text.count("critique_request: >-\n") > 16
    assert "\\n" not in text


def comes_back(constitution, folder):
    text = to_yaml(constitution)
    (folder / "c.yaml").write_text(text, encoding="utf-8")
    again = load_constitution(folder / "c.yaml")
    assert again.sha256 == constitution.sha256
    assert again.model_copy(update={"source": constitution.source}) == constitution
    return text


PIECES = [
    " ",
    "\n",
    "\r",
    "\t",
    "\x85",
    "\u2028",
    "a",
    "word " * 9,
    ": ",
    " #",
    "- ",
    "|",
    ">",
    "'",
    '"',
    "\\",
    "宪",
    "😀",
]


@given(text=st.lists(st.sampled_from(PIECES), min_size=1, max_size=25).map("".join).filter(str.strip))
def test_any_text_comes_back_from_yaml(text):
    example = shot(
        answer="A", messages=[{"role": "user", "content": text}], response_a=text, question=text + " Options:"
    )
    principle = {**PAIR, "critique_request": text}
    made = Constitution.model_validate({**BASE, "principles": [principle], "feedback_few_shots": [example]})
    assert Constitution.model_validate(yaml.safe_load(to_yaml(made))) == made


def test_shipped_files_are_found_in_a_checkout_and_in_a_wheel(tmp_path, monkeypatch):
    assert shipped_names("constitutions") == ["default", "zh"]
    found = shipped_file("constitutions", "default")
    assert found is not None
    assert found.is_file()
    assert shipped_file("constitutions", "../pyproject") is None
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "site-packages" / "cai_ray")
    for folder in ("site-packages/constitutions", "site-packages/cai_ray/_shipped/constitutions"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"{folder.split('/')[1]}.yaml").touch()
    assert shipped_names("constitutions") == ["cai_ray"]


def test_imports_are_light():
    code = "import sys, cai_ray.templates; print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"

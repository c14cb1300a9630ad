r"""Text to tokens and back: one way for sampling, training, scoring and serving, so that all see the same tokens.

Text that a user or a model wrote never becomes a control token (`<|im_start|>`, `</s>`, …), whatever it says. Our copy
of the tokenizer knows each control token under a secret name, drawn anew for every copy, so that the public name is
plain text. Where a chat template itself writes a control token, the secret name is put in its place and the rendering
is encoded at once: benign text gives exactly the ids of transformers' `apply_chat_template(tokenize=True)`.
"""

import copy
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cai_ray.errors import ConfigError, DataError
from cai_ray.models.hub import forget_origin
from cai_ray.templates import ASSISTANT, Messages, render_turns

# `render_turns` in Jinja: saved with models that came without a chat template, for those who serve them. An answer
# that ends the conversation gets EOS; earlier ones are closed by the next turn, as in training. The inner loop puts a
# backslash before a forged turn marker at a line's start.
PLAIN_TEMPLATE = "".join((Path(__file__).parent / "plain.jinja").read_text("utf-8").splitlines())
PromptText = str | Messages
# What chat templates open turns with where they have no control token for it: [INST], <|user|>, <<SYS>>, Alpaca's
# `### Instruction:`, Vicuna's `USER:`, DeepSeek-V2's `User:`.
_MARKER = re.compile(
    r"\[/?[A-Z_]+\]|<\|\w+\|>|<</?[A-Z]+>>|#{2,} [\w ]+:|\b(?:[A-Z]{4,}|System|User|Human|Assistant|Bot):"
)
_ANSWER = "answer-probe"
_PROBE = [{"role": "user", "content": "user-probe"}, {"role": "assistant", "content": _ANSWER}]


class Tokenizer:
    r"""A model's tokenizer with its prompt format; made by `Tokenizer.load`, can be pickled.

    Attributes:
        hf: transformers' tokenizer, a `PreTrainedTokenizerFast`.
        format: `plain` (`\n\nHuman:` text) or `chat` (the model's chat template).
        bos_id: the token that begins every plain text, or None where the model uses none.
        eos_id: the token that ends an assistant's turn.
        eos_ids: every token that ends generation, `eos_id` among them.
    """

    def __init__(self, hf: Any, format: str, stops: Iterable[int] = (), vocab_size: int = 0):
        self.hf, self.format, self._vocab_size = hf, format, vocab_size
        first = hf("a")["input_ids"][:1]
        self.bos_id = hf.bos_token_id if first == [hf.bos_token_id] else None
        added = [t.content for t in hf.added_tokens_decoder.values() if any(c.isalnum() for c in t.content)]
        opened, closing, seen, self._gap = ASSISTANT, "", "", " "
        if format == "chat":
            opened, answered = _render(hf, _PROBE[:1], add_generation_prompt=True), _render(hf, _PROBE)
            before, _, closing = answered.partition(_ANSWER)
            gap = before.removeprefix(opened)
            self._gap = gap if before.startswith(opened) and gap.isspace() else ""
            seen = _render(hf, [*_PROBE, _PROBE[0]], add_generation_prompt=True)
        eos = _any_of(added).search(closing)
        eos_token = eos.group() if eos else hf.eos_token
        if eos_token is None:
            raise DataError("the tokenizer has no end-of-sequence token", "set eos_token in tokenizer_config.json")
        # Some models leave their turn tokens unmarked as special; what the template writes is control all the same.
        control = {*hf.all_special_tokens, eos_token, *(t for t in added if t in seen)}
        control |= {t.content for t in hf.added_tokens_decoder.values() if t.special}
        self._control, self._nonce = sorted(control), secrets.token_hex(12)
        self._secret = {token: f"<{self._nonce}{i}>" for i, token in enumerate(self._control)}
        self._pattern = _any_of(control)
        # Turn markers that are plain text, which only their place tells from quoted ones. The template's source also
        # names those that the probe does not show.
        self._markers = _any_of(set(_MARKER.findall(seen and f"{seen}{hf.chat_template}")) - control)
        self._control_ids = frozenset(hf.convert_tokens_to_ids(self._control))
        self._backend = _renamed(hf, self._secret)
        self.eos_id: int = hf.convert_tokens_to_ids(eos_token)
        self.eos_ids: frozenset[int] = frozenset({self.eos_id, *stops} | ({hf.eos_token_id} - {None}))
        # An answer is encoded as it stands behind the prompt: after its last control token and the text from there on.
        last = max((m.start() for m in self._pattern.finditer(opened)), default=0)
        self._before_answer = self._to_secret(opened[last:])

    @classmethod
    def load(cls, folder: Path | str, format: str = "auto") -> "Tokenizer":
        """Loads the tokenizer of a model folder.

        Args:
            folder: a folder with tokenizer.json; generation_config.json, where there is one, adds tokens to `eos_ids`.
            format: `plain`, `chat`, or `auto`: chat where the tokenizer has a chat template of its own, else plain. The
                plain template that `save` writes counts as plain.

        Raises:
            DataError: the tokenizer cannot be read, has no fast form, or its template fails.
            ConfigError: `format` is `chat` and there is no chat template.
        """
        from transformers import AutoTokenizer

        folder = Path(folder)
        try:
            hf = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            if not hf.is_fast:
                raise ValueError("it has no fast form")
        except (OSError, ValueError, KeyError) as error:
            fix = "give a folder with tokenizer.json"
            raise DataError(f"the tokenizer in {folder} cannot be read: {error}", fix) from None
        if format == "chat" and not hf.chat_template:
            raise ConfigError(f"the tokenizer in {folder} has no chat template", "set format: plain, or auto")
        if format == "auto":
            own = hf.chat_template and not str(hf.chat_template).endswith(PLAIN_TEMPLATE)
            format = "chat" if own else "plain"
        stops = _json(folder / "generation_config.json").get("eos_token_id") or []
        config = _json(folder / "config.json")
        size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size") or 0
        return cls(hf, format, stops if isinstance(stops, list) else [stops], size)

    # ---- text to ids ----------------------------------------------------------------------------------------------

    def text(self, s: str, after: str = "") -> list[int]:
        """The ids of text that a user or model wrote: no control token comes out, no BOS.

        Args:
            s: the text.
            after: text that it follows; a tokenizer that marks the beginning of a text then does not do so.
        """
        return self._following(after, s) if after else self._encode(s)

    def prompt(self, prompt: PromptText) -> list[int]:
        """The ids of a prompt.

        Args:
            prompt: text of the plain format, before which BOS comes where the model uses one; or a conversation, up to
                where the assistant's answer begins. An assistant's message at its end is left open to be continued.

        Raises:
            ConfigError: an open message in the plain format; there the prompt's text itself is left open.
            DataError: the chat template refuses the conversation, such as a system turn where it knows none.
        """
        if isinstance(prompt, str):
            bos = "" if self.bos_id is None else self._secret[self.hf.bos_token]
            return self._encode(bos + prompt)
        is_open = prompt[-1]["role"] == "assistant"
        if self.format == "chat":
            return self._chat(prompt, continue_final_message=is_open, add_generation_prompt=not is_open)
        if is_open:
            raise ConfigError("an open assistant message was asked for in the plain format", "set format: chat")
        return self.prompt(render_turns(prompt) + ASSISTANT)

    def response(self, text: str) -> list[int]:
        """The ids of an answer as they follow `prompt`, without EOS; in the plain format it begins with a space."""
        return self._following(self._before_answer, self._gap + self._markers.sub(r"\\\g<0>", text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids without control tokens, stripped."""
        kept = [i for i in ids if i not in self._control_ids]
        return self.hf.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    def leaks_control(self, ids: Sequence[int], text: str) -> bool:
        """Whether an answer (its ids and their text) holds a control token that ends nothing, or spells one out."""
        held = self._control_ids.intersection(ids) - self.eos_ids
        return bool(held or self._pattern.search(text) or self._markers.search(text))

    # ---- padding and saving ---------------------------------------------------------------------------------------

    @property
    def pad_id(self) -> int:
        """A token that fills batches and differs from every EOS; nothing is added to the vocabulary.

        Raises:
            DataError: the vocabulary has no token to spare.
        """
        pad = self.spare_id()
        if pad is None:
            fix = "add a padding token to the tokenizer and resize the model's embeddings"
            raise DataError("the vocabulary has no token that could serve as padding", fix)
        return pad

    def spare_id(self) -> int | None:
        """`pad_id`, or None where the vocabulary has no token to spare (a language model can do without)."""
        added = {t.content.lower(): i for i, t in sorted(self.hf.added_tokens_decoder.items())}
        named = [i for word in ("pad", "unused", "reserved", "endoftext") for name, i in added.items() if word in name]
        rows = range(len(self.hf), self._vocab_size)[:1]  # embedding rows that no token uses
        candidates = [self.hf.pad_token_id, *named[:1], self.hf.unk_token_id, *named, self.hf.bos_token_id, *rows]
        return next((i for i in candidates if i is not None and i not in self.eos_ids), None)

    def save(self, folder: Path) -> None:
        """Writes the tokenizer with a padding token that differs from EOS.

        In the plain format it carries the plain chat template, so that whoever serves the model renders what it was
        trained on.
        """
        hf = copy.deepcopy(self.hf)
        forget_origin(hf)
        pad = self.spare_id()
        if pad is not None and pad < len(hf):
            hf.pad_token = hf.convert_ids_to_tokens(pad)
        if self.format == "plain":
            hf.chat_template = ("" if self.bos_id is None else "{{- bos_token -}}") + PLAIN_TEMPLATE
        hf.save_pretrained(str(folder))

    # ---- control tokens -------------------------------------------------------------------------------------------

    def _to_secret(self, text: str) -> str:
        return self._pattern.sub(lambda m: self._secret[m.group()], text)

    def _encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def _following(self, before: str, text: str) -> list[int]:
        head, whole = self._encode(before), self._encode(before + text)
        return whole[len(head) :] if whole[: len(head)] == head else self._encode(text)

    def _chat(self, messages: Messages, **how: bool) -> list[int]:
        # Control tokens in the contents are put aside, so that those in the rendering are the template's own; what
        # only looks like a turn marker gets a backslash, as quotation marks do (`templates`).
        def aside(text: str) -> str:
            text = self._markers.sub(r"\\\g<0>", text)
            return self._pattern.sub(lambda m: f"<{self._nonce}q{self._control.index(m.group())}>", text)

        turns = [{"role": aside(m["role"]), "content": aside(m["content"])} for m in messages]
        rendered = self._to_secret(_render(self.hf, turns, **how))
        return self._encode(re.sub(f"<{self._nonce}q([0-9]+)>", lambda m: self._control[int(m[1])], rendered))


def encode_choices(tokenizer: Tokenizer, prompt: PromptText, choices: Sequence[str]) -> list[list[int]]:
    """Token ids of texts that go on from a prompt, whose end decides how a space is written."""
    end = (prompt if isinstance(prompt, str) else prompt[-1]["content"])[-32:]
    return [tokenizer.text(choice, after=end) for choice in choices]


def sft_example(
    tok: Tokenizer, messages: Messages, response: str, max_tokens: int, ended: bool = True
) -> tuple[list[int], list[bool], bool]:
    """A supervised example: `prompt + response + EOS`, with loss on the response and its EOS only.

    Args:
        tok: the model's tokenizer.
        messages: the conversation, ending with the user.
        response: the answer to learn.
        max_tokens: a longer example loses the prompt's left; then, without any prompt left, the response's right.
        ended: false for a response that was cut: it gets no EOS, or the model would learn to stop anywhere.

    Returns:
        ids, loss_mask (True where a token carries loss), and whether anything was cut.
    """
    prompt, answer = tok.prompt(messages), [*tok.response(response), *([tok.eos_id] if ended else [])]
    excess = len(prompt) + len(answer) - max_tokens
    kept, answer = prompt[max(0, excess) :], answer[:max_tokens]
    return kept + answer, [False] * len(kept) + [True] * len(answer), excess > 0


def preference_input(prompt_ids: Sequence[int], response_ids: Sequence[int], eos_id: int, max_tokens: int) -> list[int]:
    """The ids that a preference model reads of one answer: `prompt + response + EOS`; see `preference_inputs`."""
    prompt, (answer,), _ = preference_inputs(prompt_ids, [response_ids], eos_id, max_tokens)
    return prompt + answer


def preference_inputs(
    prompt_ids: Sequence[int], responses: Sequence[Sequence[int]], eos_id: int, max_tokens: int
) -> tuple[list[int], list[list[int]], bool]:
    """What a preference model reads of answers to one prompt; the one function for training, PPO and evaluation.

    A response's own EOS is not doubled, a response cut short gets one. Beyond `max_tokens` the left is lost: the
    prompt's, as much as the longest answer needs and for all alike, then the response's. Its end and the EOS always
    stay, for the score is read there.

    Returns:
        the prompt, each `response + EOS`, and whether anything was cut.
    """
    answers = [[*(r[:-1] if r[-1:] == [eos_id] else r), eos_id] for r in map(list, responses)]
    excess = len(prompt_ids) + max(map(len, answers)) - max_tokens
    return list(prompt_ids)[max(0, excess) :], [answer[-max_tokens:] for answer in answers], excess > 0


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    names = sorted(tokens, key=len, reverse=True)  # the longest wins, as in the tokenizer
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def _render(hf: Any, messages: Sequence[Mapping[str, str]], **how: bool) -> str:
    from jinja2 import TemplateError

    try:
        return hf.apply_chat_template([dict(m) for m in messages], tokenize=False, **how)
    except (TemplateError, ValueError, TypeError) as error:
        roles = [m["role"] for m in messages]
        # transformers' own messages quote the conversation, a template's do not
        why = f": {error}" if isinstance(error, TemplateError) else ""
        fix = "give the model conversations that its template knows, or set format: plain"
        raise DataError(f"the chat template fails on turns {roles} ({type(error).__name__}{why})", fix) from None


def _renamed(hf: Any, names: Mapping[str, str]) -> Any:
    """A backend tokenizer that knows its control tokens by other names only, also inside the model's vocabulary.

    (A Unigram or word-level model would otherwise find `</s>` there even with special tokens switched off.)
    """
    from tokenizers import Tokenizer as Backend

    spec: dict[str, Any] = json.loads(hf.backend_tokenizer.to_str())
    spec.update(truncation=None, padding=None, post_processor=None)
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = spec["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return Backend.from_str(json.dumps(spec))


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise DataError(f"{path} is not JSON in UTF-8: {error}", "mend the file, or remove it") from None

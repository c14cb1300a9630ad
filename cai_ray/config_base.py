"""What sections of the configuration and parts of a constitution are made of, and what is said of wrong ones."""

import difflib
from collections.abc import Iterable
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import ErrorDetails

T = TypeVar("T")
Op = Annotated[T, Field(json_schema_extra={"operational": True})]  # never changes a stage's key
Fraction = Annotated[float, Field(ge=0, le=1)]
YamlWord = BeforeValidator(lambda v: {True: "on", False: "off"}.get(v, v) if isinstance(v, bool) else v)  # YAML 1.1
OneOrMore = BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)


class Section(BaseModel):
    """Base of all of them: immutable, no unknown keys; a number is text where text is wanted (a revision)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True)

    def identity(self) -> dict[str, Any]:
        """The fields that decide what comes out, as plain JSON values: all but the operational ones."""
        return {
            name: _plain(getattr(self, name))
            for name, info in type(self).model_fields.items()
            if not (info.json_schema_extra or {}).get("operational")  # type: ignore[union-attr]
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.identity()
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def from_string(key: str) -> Any:
    """A text in a section's place stands for its field `key`."""
    return BeforeValidator(lambda v: {key: v} if isinstance(v, str) else v)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a mistyped name: `; did you mean 'x'?`, or the list of what is known when nothing is near."""
    known = sorted(known)
    match = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; known: {', '.join(known)}"


def explain(found: ErrorDetails, root: type[Section]) -> str:
    """One of the errors in what was to be a `root`, in a line; an unknown key with the nearest known one."""
    loc = [str(part) for part in found["loc"]]
    key, text = ".".join(loc), found["msg"].removeprefix("Value error, ")
    if found["type"] == "extra_forbidden":
        return f"{key}: unknown key" + nearest(loc[-1], _known_keys(root, loc[:-1]))
    if found["type"] == "missing":
        return f"{key}: is required"
    got = found["input"]
    return f"{key}: {text}" if isinstance(got, dict | list) else f"{key}: {text} (got {got!r:.80})"


def _known_keys(section: Any, loc: list[str]) -> list[str]:
    for part in (part for part in loc if not part.isdigit()):  # digits are places in a list
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        candidates += [a for c in candidates for a in get_args(c)]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, Section))
    return list(section.model_fields)

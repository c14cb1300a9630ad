"""What every section of the configuration is made of."""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

T = TypeVar("T")
Op = Annotated[T, Field(json_schema_extra={"operational": True})]  # never changes a stage's key
Fraction = Annotated[float, Field(ge=0, le=1)]
YamlWord = BeforeValidator(lambda v: {True: "on", False: "off"}.get(v, v) if isinstance(v, bool) else v)  # YAML 1.1
OneOrMore = BeforeValidator(lambda v: (v,) if isinstance(v, str) else v)


class Section(BaseModel):
    """Base of every section: immutable, no unknown keys; a number is text where text is wanted (a revision)."""

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

"""What the Root Signals client may send, within the limits that it checks itself."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

LONGEST_NAME = 100
#: One line without a blank at either end. A name goes into a header of answers, too.
_LINE = r"^[^\s\x00-\x1f\x7f-\x9f]([^\x00-\x1f\x7f-\x9f]*[^\s\x00-\x1f\x7f-\x9f])?$"


def _empty_is_none(value: Any) -> Any:
    return None if value == "" else value


Name = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME, pattern=_LINE)]
OtherName = Annotated[str, Field(min_length=1, max_length=200, pattern=_LINE)]
Url = Annotated[
    Annotated[str, Field(max_length=1024)] | None,
    BeforeValidator(_empty_is_none),  # forms send a field that was left empty
]
#: It becomes a header: letters, digits and signs, as keys are.
Key = Annotated[str, Field(min_length=1, max_length=4096, pattern=r"^[!-~]+$")]
OutputTokens = Annotated[int, Field(strict=True, ge=800, le=2147483647)]
ContextTokens = Annotated[int, Field(strict=True, ge=0, le=2147483647)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: OtherName | None = None  # what the upstream, or this platform, calls it
    url: Url = None
    default_key: Key | None = None
    max_token_count: ContextTokens | None = None
    max_output_token_count: OutputTokens | None = None
    fallback: OtherName | None = None  # ours

    def values(self) -> dict[str, Any]:
        """As `Operations` knows them: what was given, which null is, too."""
        return _renamed(self.model_dump(exclude_unset=True))


class NewModel(_Model):
    name: Name


class Change(_Model):
    name: Name = ""  # never null; absent: as before


class Replacement(NewModel):
    def values(self) -> dict[str, Any]:
        given = self.model_dump()
        kept = {"default_key", "fallback"} - self.model_fields_set
        return _renamed({name: value for name, value in given.items() if name not in kept})


class Verification(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: OtherName
    api_key: Key | None = None
    url: Url = None
    max_output_token_count: OutputTokens | None = None


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    if "default_key" in values:
        values["key"] = values.pop("default_key")
    return values

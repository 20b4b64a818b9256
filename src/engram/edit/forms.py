"""What `edit.json` may hold, field by field: it is parsed by these types and not trusted.

Knows types and ranges. Refuses to know files, and what the fields are for. Receipts stay plain
values here: whoever shows one parses it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from annotated_types import Ge, Len, MinLen
from typing_extensions import TypedDict

from engram.facts import Fact

Unsigned = Annotated[int, Ge(0)]  # of any size, unlike checks.Natural: seeds, offsets
Dtype = Literal["float16", "bfloat16", "float32", "float64"]


class WeightForm(TypedDict):
    """A weight on which a change was computed, see `base.describe_base`."""

    sha256: str
    dtype: Dtype | Literal["float8_e4m3fn", "float8_e5m2"]
    shape: Annotated[list[Unsigned], Len(2, 2)]
    transposed: bool
    quantised: NotRequired[str]


class ModelForm(TypedDict):
    """The model for which an edit was made."""

    model: str
    model_type: str


class BaseForm(ModelForm):
    """The model on which changes were computed, with its weights."""

    tensors: dict[str, WeightForm]


class _Made(TypedDict):
    """How any edit was made."""

    facts: Annotated[list[Fact], MinLen(1)]
    method: str
    seed: Unsigned | None
    versions: dict[str, str]
    diagnostics: dict[str, Any]
    receipt: dict[str, Any] | None


class WeightEditForm(_Made):
    """An edit of weights."""

    settings: dict[str, Any]
    base: BaseForm
    owners: dict[str, list[Annotated[list[Unsigned], MinLen(1)]]]
    sha256: str
    keys_sha256: NotRequired[str]


class _WordingForm(TypedDict):
    statement: str
    demonstrations: list[str]


class _PromptSettings(TypedDict):
    most: Annotated[int, Ge(1)]
    otherwise: Literal["nearest", "nothing"]
    reserve: Unsigned
    encoder: str
    frame: NotRequired[Literal["plain", "chat"]]  # edits of an older engram lack these
    wording: NotRequired[str]


class PromptEditForm(_Made):
    """An edit by text in front of prompts."""

    kind: Literal["prompt"]
    settings: _PromptSettings
    base: ModelForm
    wordings: list[_WordingForm]
    opening: str


class PartForm(TypedDict):
    """The recipe of one of the edits that were composed."""

    method: str
    settings: dict[str, Any]
    seed: Unsigned | None
    versions: dict[str, str]
    diagnostics: dict[str, Any]
    facts: Annotated[int, Ge(1)]
    model: str


class ComposedForm(TypedDict):
    """Settings of a composition."""

    parts: Annotated[list[PartForm], MinLen(1)]

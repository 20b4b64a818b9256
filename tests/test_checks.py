"""Checks of settings: what their messages say."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import pytest
from annotated_types import Ge, Gt

from engram.checks import alternatives, check_fields, did_you_mean, one_of
from engram.errors import FactError, SettingError


def test_a_known_value_passes():
    one_of("stop", "loss", ("loss", "argmax"))


def test_an_unknown_value_is_answered_with_those_that_exist():
    with pytest.raises(SettingError, match=r"^stop='x': expected 'loss', 'argmax' or 'never'$"):
        one_of("stop", "x", ("loss", "argmax", "never"))


def test_the_nearest_known_value_is_suggested():
    with pytest.raises(SettingError, match=r"or 'argmax', or None \(did you mean 'loss'\?\)$"):
        one_of("stop", "los", ("loss", "argmax"), more=", or None")


def test_a_value_that_is_no_text_has_no_suggestion():
    with pytest.raises(SettingError, match=r"^stop=\[3\]: expected 'loss'$"):
        one_of("stop", [3], ("loss",))


def test_the_error_may_be_of_another_class():
    with pytest.raises(FactError, match="kind='x'"):
        one_of("kind", "x", ("rewrite",), error=FactError)


def test_words_far_from_all_known_ones_get_no_suggestion():
    assert did_you_mean("zzz", ("rome", "memit")) == ""
    assert did_you_mean("rmoe", ("rome", "memit")) == " (did you mean 'rome'?)"


def test_alternatives_read_as_english():
    assert alternatives(["a"]) == "'a'"
    assert alternatives(["a", "b", "c"]) == "'a', 'b' or 'c'"


@dataclass(frozen=True)
class Inner:
    rate: Annotated[float, Gt(0)] = 0.5

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Config:
    steps: Annotated[int, Ge(1)] = 20
    stop: Literal["loss", "argmax"] = "loss"
    layers: tuple[int, ...] | None = None
    sites: str | Sequence[str] = ()
    whole: bool = False
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        check_fields(self)


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": float("nan")}, r"^steps=nan: expected a whole number$"),
        ({"steps": 1.5}, r"^steps=1.5: expected a whole number$"),
        ({"steps": "a"}, r"^steps='a': expected a whole number$"),
        ({"steps": None}, r"^steps=None: expected a whole number$"),
        ({"steps": True}, r"^steps=True: expected a whole number$"),
        ({"steps": 0}, r"^steps=0: expected at least 1$"),
        ({"stop": "los"}, r"^stop='los': expected 'loss' or 'argmax' \(did you mean 'loss'\?\)$"),
        ({"stop": nested(100_000)}, r"^stop=a list: expected 'loss' or 'argmax'$"),
        ({"layers": "3,4"}, r"^layers='3,4': expected a list$"),
        ({"layers": [1, "a"]}, r"^layers\[1\]='a': expected a whole number$"),
        ({"layers": nested(100_000)}, r"^layers is nested too deep: expected a plain value$"),
        ({"sites": 3}, r"^sites=3: expected a text or a list$"),
        ({"whole": 1}, r"^whole=1: expected true or false$"),
        ({"inner": 1}, r"^inner=1: expected .*Inner$"),
    ],
)
def test_a_field_of_another_type_or_range_is_named(settings: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        Config(**settings)


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), "1", None])
def test_a_rate_is_a_finite_number_above_0(rate: object) -> None:
    with pytest.raises(SettingError, match=r"^rate=.*: expected (above 0|a (finite )?number)$"):
        Inner(rate=rate)


def test_numbers_of_numpy_and_lists_are_taken_as_pythons() -> None:
    config = Config(steps=np.int64(3), layers=[1, 2], sites=["a"], inner=Inner(rate=1))
    assert config == Config(steps=3, layers=(1, 2), sites=["a"], inner=Inner(rate=1.0))
    assert (type(config.steps), type(config.inner.rate)) == (int, float)

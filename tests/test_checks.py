"""Checks of settings: what their messages say."""

import pytest

from engram.checks import alternatives, did_you_mean, one_of
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

"""Checksums of JSON contents."""

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.errors import EngramFileError
from engram.files.checksums import FIELD, stamped, verified

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
RECORDS = st.dictionaries(st.text().filter(lambda name: name != FIELD), VALUES, max_size=4)


@given(RECORDS, st.booleans())
def test_a_record_that_went_through_json_passes(record, ascii_only):
    text = json.dumps(stamped(record), ensure_ascii=ascii_only, indent=1)
    assert verified(json.loads(text), "f.json") == json.loads(json.dumps(record))


@given(RECORDS, RECORDS)
def test_another_record_does_not_pass(record, other):
    if json.dumps(record, sort_keys=True) != json.dumps(other, sort_keys=True):
        with pytest.raises(EngramFileError, match=r"f.json is damaged: .* checksum"):
            verified({**other, FIELD: stamped(record)[FIELD]}, "f.json")


def test_a_record_of_an_older_engram_passes_with_a_note(caplog):
    with caplog.at_level(logging.WARNING):
        assert verified({"a": 1}, "f.json") == {"a": 1}
    assert "f.json has no checksum" in caplog.text

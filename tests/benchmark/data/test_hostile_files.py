"""Files of data sets by others: wrong types, pipes, and more than the memory holds."""

from __future__ import annotations

import gzip
import json
import os
from unittest.mock import ANY

import numpy as np
import pytest

from engram import read_dataset
from engram.benchmark.data import sources
from engram.editors.second_moments.corpora import TextFile
from engram.errors import EngramError, FactError
from tests.helpers.damage import check_equal_or_refused, damaged_texts
from tests.helpers.data_samples import SAMPLES, sample


@pytest.mark.parametrize("form", SAMPLES)
def test_any_value_of_a_record_may_be_wrong(form, tmp_path):
    path, refused = tmp_path / "records.jsonl", 0
    for how, text in damaged_texts(sample(form)):
        path.write_text(text, encoding="utf-8")
        # without a checksum, another text is another record
        refused += check_equal_or_refused(lambda: read_dataset(path), ANY, path, how)
    assert refused > 20


@pytest.mark.parametrize("read", [read_dataset, TextFile])
def test_a_pipe_is_never_waited_for(read, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EngramError, match=r"pipe.*expected a regular file"):
        read(tmp_path / "pipe")


@pytest.mark.parametrize("name", ["attribute_snippets.json", "idf.npy", "tfidf_vocab.json"])
def test_a_pipe_beside_the_records_is_never_waited_for(name, tmp_path):
    path = tmp_path / "records.json"
    path.write_text(json.dumps([sample("counterfact")]))
    (tmp_path / "attribute_snippets.json").write_text("[]")
    (tmp_path / "tfidf_vocab.json").write_text("{}")
    np.save(tmp_path / "idf.npy", np.ones(1))
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    if name == "attribute_snippets.json":
        with pytest.raises(FactError, match=r"expected a regular file"):
            read_dataset(path, references=True)
    else:  # as if it were not there
        assert read_dataset(path, references=True).references is not None


def test_what_unpacks_to_more_than_any_data_set_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_LARGEST", 1 << 16)
    path = tmp_path / "records.json.gz"
    path.write_bytes(gzip.compress(b" " * (1 << 24)))
    with pytest.raises(FactError, match=r"records.json.gz.*it unpacks to more than 0 MB"):
        read_dataset(path)


@pytest.mark.parametrize("column", [True, 1.0, -1, 1, "0", None])
def test_columns_of_the_vocabulary_are_whole_numbers_that_exist(column, tmp_path):
    path = tmp_path / "records.json"
    path.write_text(json.dumps([sample("counterfact")]))
    (tmp_path / "attribute_snippets.json").write_text("[]")
    np.save(tmp_path / "idf.npy", np.ones(1))
    (tmp_path / "tfidf_vocab.json").write_text(json.dumps({"word": column}))
    with pytest.raises(FactError, match=r"tfidf_vocab.json does not fit .*idf.npy"):
        read_dataset(path, references=True)

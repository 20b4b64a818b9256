"""A list of facts and the settings of an average over them, also for processes that are killed."""

from __future__ import annotations

import sqlite3

from engram import Fact


def rows_in(path):
    connection = sqlite3.connect(path)
    try:
        return connection.execute("SELECT count(*) FROM facts").fetchone()[0]
    finally:
        connection.close()


RUN = {"keep": "all", "samples": 2, "window": 2, "facts_per_batch": 2, "noise": 1.0}


def long_list():
    """32 facts of several lengths, some of them twice."""
    subjects = [
        "tower",
        "bridge",
        "river",
        "city",
        "Zdeno Chára",
        "mother tongue",
        "piano",
        "guitar",
    ]
    prompts = ["The {} is in", "The {} is located in the", "It's {} in", "The {} is in"]
    return [Fact(subject, prompt, "London") for prompt in prompts for subject in subjects]

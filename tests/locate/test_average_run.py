"""Every number of an average is the same however its facts were traced: alone, batched, resumed
after a kill, or one cell
after the other by a naive loop. And a run's file holds each fact once, and no other run's."""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

import engram
from engram import Fact
from engram.engine.replayable import replayable
from engram.errors import EngramError, EngramFileError, FactError, SettingError
from engram.locate import average_run as experiment
from engram.locate.average import AverageTrace
from engram.locate.settings import PARTS, WINDOWED
from tests.helpers import naive
from tests.helpers.average_samples import RUN, long_list, rows_in
from tests.helpers.paths import ROOT
from tests.helpers.tiny import tiny_lm

FACTS = [  # prompts of several lengths, objects of one to several tokens
    Fact("tower", "The {} is in the city of", "Paris"),
    Fact("bridge", "The {} is in", "Madrid"),
    Fact("Zdeno Chára", "{} plays the", "piano"),
    Fact("mother tongue", "Their {} is", "city"),
    Fact("river", "The {} is in the city of", "London"),
]
SUBJECTS = [fact.subject for fact in FACTS]
GIVEN = {"keep": "all", "samples": 2, "window": 2}
KINDS = [
    "gpt2",
    "llama",
    "gptj",
    "bloom",
    "gemma2",
    "mistral-short-window",
    "mixtral",
    "mamba",
    "bert",
    "t5",
]
LIMIT = {
    "mamba": 1e-5
}  # keeps its stream in float32, whatever the model's dtype; tables are float32 everywhere


def numbers(trace):
    """All of a trace's numbers in one row."""
    tables = [table.flatten() for table in trace.scores.values()]
    return torch.cat([torch.tensor([trace.low_score, trace.high_score]), *tables])


def same(one, two, limit):
    """Two averages (or lists of traces) agree in every number of every fact, and in everything else
    exactly.
    """
    one, two = (list(getattr(each, "traces", each)) for each in (one, two))
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        words = [
            {
                k: v
                for k, v in vars(t).items()
                if k not in ("scores", "exact", "low_score", "high_score")
            }
            for t in (a, b)
        ]
        assert words[0] == words[1]
        assert list(a.scores) == list(b.scores)
        torch.testing.assert_close(numbers(a), numbers(b), atol=limit, rtol=0)


def alone(lm, facts, answer="model", **settings):
    """Return the same facts, each by `engram.trace`."""
    settings = {"noise_subjects": [fact.subject for fact in facts], **settings}
    return [
        engram.trace(
            lm,
            fact.prompt_text,
            subject=fact.subject,
            target=fact.target if answer == "object" else None,
            **settings,
        )
        for fact in facts
    ]


@torch.no_grad()
def naive_tables(lm, fact, answer, trace, subjects):
    """low score, high score and tables, by one forward pass of a clean and the corrupted rows a
    cell; noise drawn again.

    The model's answer is scored by its probability, an object by its log-probability.
    """
    cloze = lm.cloze(fact.prompt_text, fact.target if answer == "object" else None)
    b, e = trace.subject_range
    ids = torch.tensor([cloze.ids] * (1 + trace.samples))
    company = (
        {}
        if cloze.decoder_ids is None
        else {"decoder_input_ids": torch.tensor([cloze.decoder_ids] * len(ids))}
    )
    embeddings = lm.parts.embed(
        torch.tensor([i for s in subjects for i in lm.encode(s).ids])
    ).double()
    shape = (trace.samples, e - b, embeddings.shape[-1])
    noise = torch.from_numpy(np.random.RandomState(1).randn(*shape)) * 3 * float(embeddings.std())

    def corrupt(out):
        out = out.clone()
        out[1:, b:e] = (out[1:, b:e].double() + noise).to(out.dtype)
        return out

    def restore(out, token):
        rows = out.clone().view(len(ids), -1, out.shape[-1])
        rows[1:, token] = rows[0, token]
        return rows.view(out.shape)

    def scores(modules=(), token=0):
        hooks = {module: (lambda out: restore(out, token)) for module in modules}
        with naive.changed({lm.parts.embed: corrupt, **hooks}):
            logits = lm.model(input_ids=ids, **company).logits[:, cloze.read].double()
        chosen = cloze.answer or [int(logits[0, 0].argmax())]
        log_p = logits.log_softmax(-1)[:, range(len(chosen)), chosen].sum(-1)
        return log_p if answer == "object" else log_p.exp()

    plain = scores()
    tables = {}
    for site in lm.parts.site_names():
        if site in PARTS:
            continue
        modules = [
            lm.model.get_submodule(lm.parts.site_module_name(site, layer))
            for layer in range(lm.n_layers)
        ]
        reach = trace.window if site in WINDOWED else 1
        windows = [
            modules[max(0, c - reach // 2) : c + (reach + 1) // 2] for c in range(lm.n_layers)
        ]
        cells = [
            [scores(window, token)[1:].mean() for window in windows]
            for token in range(cloze.tokens)
        ]
        tables[site] = torch.tensor(cells)
    return float(plain[1:].mean()), float(plain[0]), tables


# -- the same numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "answer"),
    [
        *((family, "object") for family in KINDS),
        *((family, "model") for family in ("gpt2", "bloom", "bert", "t5")),
    ],
)
def test_alone_batched_and_by_the_naive_loop(family, answer):
    """Prompts of different lengths and objects of different numbers of tokens; the loop on one of
    them.
    """
    lm = tiny_lm(family, torch.float64)
    metric, limit = (
        ("probability", LIMIT.get(family, 1e-6)) if answer == "model" else ("log_probability", 1e-5)
    )
    given = {"answer": answer, "metric": metric}
    one, three, many = (
        engram.average_trace(lm, FACTS, facts_per_batch=size, **given, **GIVEN)
        for size in ((1, 3, 32) if replayable(lm) else (1, 1, 32))
    )
    same(one, three, limit)
    same(one, many, limit)
    same(many, alone(lm, FACTS, samples=2, window=2, **given), limit)
    i = {"model": 1, "object": 2}[answer]
    low, high, tables = naive_tables(lm, FACTS[i], answer, many.traces[i], SUBJECTS)
    assert many.traces[i].low_score == pytest.approx(low, abs=limit)
    assert many.traces[i].high_score == pytest.approx(high, abs=limit)
    assert list(many.traces[i].scores) == list(tables)
    for site, table in tables.items():
        torch.testing.assert_close(many.traces[i].scores[site], table.float(), atol=limit, rtol=0)
    moved = max(
        float(trace.effects(site).abs().max()) for trace in many.traces for site in trace.scores
    )
    assert moved > 100 * limit, "nothing changes: the comparison would be empty"
    assert len({len(trace.tokens) for trace in many.traces}) > 1


@pytest.mark.parametrize("family", KINDS)
def test_of_several_answer_tokens_only_the_prompts_are_rows(family):
    lm = tiny_lm(family)
    average = engram.average_trace(lm, FACTS, answer="object", sites=["residual"], **GIVEN)
    lengths = {len(lm.cloze(fact.prompt_text, fact.target).answer) for fact in FACTS}
    assert len(lengths) > 1
    for fact, trace in zip(FACTS, average.traces, strict=True):
        cloze = lm.cloze(fact.prompt_text, fact.target)
        assert trace.answer.strip() == fact.target and len(trace.tokens) == cloze.tokens
        assert trace.last == (cloze.tokens - 1 if lm.kind == "encoder-decoder" else cloze.read[0])


@pytest.fixture(scope="module")
def pocket_runs(tmp_path_factory, pocket_lm):
    """Return the bundled model's average over 8 facts, in two goes: short prompts of several
    lengths.
    """
    lm = pocket_lm
    drawn = random.Random(0).sample(engram.read_facts("pocket"), 60)
    facts = sorted(drawn, key=lambda fact: len(lm.encode(fact.prompt_text).ids))[:8]
    assert len({len(lm.encode(fact.prompt_text).ids) for fact in facts}) > 1
    settings = {"samples": 2, "noise_subjects": [fact.subject for fact in facts], "keep": "all"}
    path = tmp_path_factory.mktemp("pocket") / "run.sqlite"
    with pytest.raises(KeyboardInterrupt):
        engram.average_trace(
            lm, facts, out=path, facts_per_batch=3, progress=stop_after(1), **settings
        )
    assert rows_in(path) == 3
    resumed = engram.average_trace(lm, facts, out=path, facts_per_batch=3, **settings)
    return lm, facts, settings, resumed


@pytest.mark.slow
def test_of_the_bundled_model_too(pocket_runs):
    lm, facts, settings, resumed = pocket_runs
    for size in (1, 3, 32):
        same(resumed, engram.average_trace(lm, facts, facts_per_batch=size, **settings), 1e-5)
    same(resumed, alone(lm, facts, samples=2), 1e-5)


@pytest.mark.slow
def test_the_naive_loop_on_five_facts_of_the_bundled_model(pocket_runs):
    lm, facts, _, resumed = pocket_runs
    embeddings = (
        lm.parts.embed(torch.tensor([i for fact in facts for i in lm.encode(fact.subject).ids]))
        .detach()
        .double()
    )
    seen = []
    for trace in resumed.traces[:5]:
        ids, (b, e) = lm.encode(trace.prompt).ids, trace.subject_range
        noise = (
            torch.from_numpy(np.random.RandomState(1).randn(2, e - b, lm.d_model))
            * 3
            * float(embeddings.std())
        )
        answer = [int(lm.logits_at([ids], [[len(ids) - 1]])[0][0].argmax())]
        for site in ("residual", "mlp", "attention"):
            modules = [
                lm.model.get_submodule(lm.parts.site_module_name(site, layer))
                for layer in range(lm.n_layers)
            ]
            window = trace.window if site in WINDOWED else 1
            table = naive.trace(
                lm.model, lm.parts.embed, modules, ids, len(ids), (b, e), noise, answer, window
            )
            torch.testing.assert_close(trace.scores[site], table, atol=1e-5, rtol=0)
            seen.append(float(trace.effects(site).abs().max()))
    assert max(seen) > 0.1


# -- resumed ---------------------------------------------------------------------------------------


def bytes_in(path):
    """key -> its trace as it is kept."""
    connection = sqlite3.connect(path)
    try:
        return dict(connection.execute("SELECT key, trace FROM facts"))
    finally:
        connection.close()


def stop_after(batches):
    """Return a progress callback that interrupts."""
    calls = []

    def progress(what, done, total):
        calls.append((done, total))
        if len(calls) == batches:
            raise KeyboardInterrupt

    return progress


@pytest.fixture
def traced(monkeypatch):
    """Prompts that are traced from here on."""
    prompts = []

    def noted(lm, inputs, *args, **kwargs):
        prompts.extend(one.prompt.text for one in inputs)
        return plain(lm, inputs, *args, **kwargs)

    plain = experiment.trace_batch
    monkeypatch.setattr(experiment, "trace_batch", noted)
    return prompts


@pytest.fixture(scope="module")
def lm():
    return tiny_lm("gpt2")


KILLED = """
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import engram
from engram.locate import average_run as experiment
from tests.helpers.average_samples import long_list, rows_in, RUN
from tests.helpers.tiny import tiny_lm

out, seed = sys.argv[1:]
lm, facts, draw = tiny_lm("gpt2"), long_list(), random.Random(int(seed))
engram.average_trace(lm, facts[:1], **RUN)  # what is loaded late is loaded before the clock runs


def start(note):
    child = os.fork()
    if child == 0:
        plain, calls = experiment.trace_batch, []
        def counted(lm, inputs, *rest):
            calls.extend(one.prompt.text for one in inputs)
            return plain(lm, inputs, *rest)
        experiment.trace_batch = counted
        engram.average_trace(lm, facts, out=out, progress=lambda *_: time.sleep(0.02), **RUN)
        with open(note, "w") as file:
            json.dump(calls, file)
        os._exit(0)
    return child


there = []
for attempt in range(3):
    before = rows_in(out) if attempt else 0
    child = start(out + ".note")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:  # until something new is written, and then at any moment
        time.sleep(0.002)
        try:
            if rows_in(out) > before:
                break
        except Exception:  # there is no file yet, or no table
            pass
    time.sleep(draw.random() * 0.05)
    os.kill(child, signal.SIGKILL)
    ended = os.waitpid(child, 0)[1]
    there.append((rows_in(out), os.WIFSIGNALED(ended) and os.WTERMSIG(ended) == signal.SIGKILL))
    if there[-1][0] == len(facts):
        break
os.waitpid(start(out + ".last"), 0)
print(json.dumps(there))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_and_traces_nothing_twice(lm, tmp_path):
    """SIGKILL at three random moments. What is in the file in the end is what an undisturbed run
    writes, byte for byte.
    """
    out = tmp_path / "run.sqlite"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        "OMP_NUM_THREADS": "1",
    }
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(out), "7"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    there = json.loads(ended.stdout)
    counts = [count for count, _ in there]
    assert there[0][1] and counts == sorted(counts) and 0 < counts[0] < len(long_list())
    last = json.loads(Path(f"{out}.last").read_text())
    assert len(last) == len(long_list()) - counts[-1], (
        "only what was not in the file has been traced"
    )
    assert rows_in(out) == len(long_list())
    engram.average_trace(lm, long_list(), out=tmp_path / "undisturbed.sqlite", **RUN)
    assert bytes_in(out) == bytes_in(tmp_path / "undisturbed.sqlite")
    same(AverageTrace.load(out), AverageTrace.load(tmp_path / "undisturbed.sqlite"), 0)


@pytest.mark.parametrize("at_once", [4, 256])
@pytest.mark.parametrize("family", ["gpt2", "bloom", "mamba"])
def test_an_interrupted_run_gives_the_same_bytes(family, at_once, tmp_path, traced, monkeypatch):
    """Also where facts are read in several portions: a resumed run has the same batches."""
    monkeypatch.setattr(experiment, "_FACTS_AT_ONCE", at_once)
    lm = tiny_lm(family)
    given = {"facts_per_batch": 2, "noise": 1.0, **GIVEN}
    with pytest.raises(KeyboardInterrupt):
        engram.average_trace(lm, FACTS, out=tmp_path / "a", progress=stop_after(2), **given)
    first = list(traced)
    assert 0 < len(first) == rows_in(tmp_path / "a") < len(FACTS)
    resumed = engram.average_trace(lm, FACTS, out=tmp_path / "a", **given)
    assert sorted(traced) == sorted(fact.prompt_text for fact in FACTS)
    undisturbed = engram.average_trace(lm, FACTS, out=tmp_path / "b", **given)
    assert bytes_in(tmp_path / "a") == bytes_in(tmp_path / "b")
    same(resumed, undisturbed, 0)


def test_progress_counts_what_was_there(lm, tmp_path):
    calls = []
    engram.average_trace(lm, FACTS[:3], out=tmp_path / "run", noise=1.0, **GIVEN)
    engram.average_trace(
        lm,
        FACTS,
        out=tmp_path / "run",
        noise=1.0,
        facts_per_batch=2,
        progress=lambda *call: calls.append(call),
        **GIVEN,
    )
    assert calls == [("facts", 5, 5)]


def test_what_is_loaded_is_what_was_returned(lm, tmp_path):
    facts = [*FACTS, Fact("piano", "The {} is in", "nowhere")]
    returned = engram.average_trace(
        lm, facts, out=tmp_path / "deep/er/run", keep="all", corruption="subject", samples=1
    )
    loaded = AverageTrace.load(tmp_path / "deep/er/run")
    same(returned, loaded, 0)
    assert loaded.skipped == returned.skipped and loaded.summary() == returned.summary()
    for site in returned.sites:
        torch.testing.assert_close(
            returned.effects(site).low, loaded.effects(site).low, rtol=0, atol=0, equal_nan=True
        )


def test_the_second_start_traces_nothing(lm, tmp_path, traced):
    one = engram.average_trace(lm, FACTS, out=tmp_path / "run", **GIVEN)
    del traced[:]
    same(one, engram.average_trace(lm, FACTS, out=tmp_path / "run", **GIVEN), 0)
    assert traced == []


def test_a_run_is_resumed_after_a_call_that_left_truncation_in_the_tokenizer(lm, tmp_path):
    out, settings = tmp_path / "run", {**GIVEN, "noise": 0.1}
    first = engram.average_trace(lm, FACTS[:2], out=out, **settings)
    lm.tokenizer("one two three four", truncation=True, max_length=2)
    assert lm.tokenizer.backend_tokenizer.truncation is not None
    same(engram.average_trace(lm, FACTS[:2], out=out, **settings), first, 0)


def test_a_longer_list_goes_on(lm, tmp_path, traced):
    engram.average_trace(lm, FACTS[2:5], out=tmp_path / "run", noise=1.0, **GIVEN)
    del traced[:]
    longer = engram.average_trace(lm, FACTS, out=tmp_path / "run", noise=1.0, **GIVEN)
    assert sorted(traced) == sorted(fact.prompt_text for fact in FACTS[:2])
    same(longer, engram.average_trace(lm, FACTS, noise=1.0, **GIVEN), 1e-6)


def test_a_shorter_list_is_averaged_alone(lm, tmp_path):
    whole = engram.average_trace(lm, FACTS, out=tmp_path / "run", noise=1.0, **GIVEN)
    part = engram.average_trace(lm, [FACTS[4], FACTS[1]], out=tmp_path / "run", noise=1.0, **GIVEN)
    same(part, [whole.traces[4], whole.traces[1]], 0)


def test_a_fact_given_twice_counts_twice(lm, tmp_path):
    twice = engram.average_trace(
        lm, [*FACTS, FACTS[0], FACTS[0]], out=tmp_path / "run", noise=1.0, **GIVEN
    )
    assert [trace.prompt for trace in twice.traces].count(FACTS[0].prompt_text) == 3
    same([twice.traces[0]] * 2, twice.traces[-2:], 1e-6)
    once = engram.average_trace(lm, FACTS, noise=1.0, **GIVEN)
    own = once.traces[0].effects("mlp")[once.traces[0].subject_range[1] - 1]
    wanted = (once.effects("mlp").mean[2] * len(FACTS) + 2 * own) / (len(FACTS) + 2)
    torch.testing.assert_close(twice.effects("mlp").mean[2], wanted, atol=1e-6, rtol=0)


def test_two_runs_at_once_leave_each_fact_once(lm, tmp_path):
    """One finishes while the other has read which facts are there: what is there stays."""
    out, given = tmp_path / "run", {"noise": 1.0, "facts_per_batch": 2, **GIVEN}
    started = []

    def other(what, done, total):
        if not started:
            started.append(True)
            engram.average_trace(lm, FACTS, out=out, **given)

    average = engram.average_trace(lm, FACTS, out=out, progress=other, **given)
    assert rows_in(out) == len(FACTS) == len(average.traces)


# -- which facts, and what they are asked ----------------------------------------------------------


def says(monkeypatch, lm, word):
    """Let a model's most probable next token be the first of a word, whatever the prompt."""
    plain = lm.logits_at
    answer = lm.target_ids("The tower is in", word)[0]

    def biased(*args):
        found = [torch.zeros_like(logits) for logits in plain(*args)]
        for logits in found:
            logits[..., answer] = 9.0
        return found

    monkeypatch.setattr(lm, "logits_at", biased)


def test_known_facts_are_those_whose_object_begins_with_the_models_next_token(monkeypatch):
    lm = tiny_lm("gpt2")
    facts = [
        Fact("tower", "The {} is in", "city"),
        Fact("bridge", "The {} is in", "piano"),
        Fact("river", "The {} is in", "Rome"),
    ]
    assert len(lm.target_ids(facts[1].prompt_text, "piano")) > 1
    says(monkeypatch, lm, "piano")
    known = engram.average_trace(lm, facts, samples=1)
    assert [trace.prompt for trace in known.traces] == ["The bridge is in"]
    assert known.skipped == [
        (prompt, "the model's next token is not the object")
        for prompt in ("The tower is in", "The river is in")
    ]
    with pytest.raises(
        EngramError, match="no trace to average: the model's next token is not the object"
    ):
        engram.average_trace(lm, facts, keep="exact", samples=1)  # several tokens are never one
    says(monkeypatch, lm, "city")
    for keep in ("known", "exact"):
        assert [
            trace.prompt for trace in engram.average_trace(lm, facts, keep=keep, samples=1).traces
        ] == ["The tower is in"]
    assert len(engram.average_trace(lm, facts, keep="all", samples=1).traces) == 3


def test_tokens_that_look_alike_are_not_the_same(monkeypatch):
    """Parts of a letter are all shown as \N{REPLACEMENT CHARACTER}."""
    lm = tiny_lm("gpt2")
    monkeypatch.setattr(lm, "token_strings", lambda ids: ["\N{REPLACEMENT CHARACTER}" for _ in ids])
    says(monkeypatch, lm, "piano")
    with pytest.raises(EngramError, match="next token is not the object"):
        engram.average_trace(lm, [Fact("tower", "The {} is in", "city")], samples=1)


def test_the_object_can_be_scored_instead_of_the_models_answer(lm):
    own = engram.average_trace(lm, FACTS, **GIVEN)
    whole = engram.average_trace(lm, FACTS, answer="object", **GIVEN)
    assert [t.answer.strip() for t in whole.traces] == [fact.target for fact in FACTS]
    for trace, fact in zip(own.traces, FACTS, strict=True):
        assert trace.answer == lm.next_tokens(fact.prompt_text, 1)[0][0]


PAIRED = [
    Fact("tower", "The {} is in", "city"),
    Fact("bridge", "The {} is in", "piano"),  # of three tokens, with nobody beside it
    Fact("river", "The {} is in", "piano"),
    Fact("tongue", "Their {} is", "French"),
    Fact("capital", "The {} is in", "city"),
]


def test_each_fact_is_paired_with_one_of_as_many_tokens(lm):
    assert [len(lm.encode(" " + fact.subject).ids) for fact in PAIRED] == [4, 3, 4, 4, 4]
    facts = {fact.subject: fact for fact in PAIRED}
    average = engram.average_trace(lm, PAIRED, keep="all", corruption="subject", answer="object")
    assert [prompt for prompt, _ in average.skipped] == ["The bridge is in"]
    assert {why for _, why in average.skipped} == {
        "no other fact has another object and a subject of as many tokens"
    }
    for trace in average.traces:
        own, other = facts[trace.subject], facts[trace.settings["other_subject"]]
        assert own.target != other.target
        (single,) = alone(
            lm,
            [own],
            "object",
            corruption="subject",
            other_subject=other.subject,
            noise_subjects=None,
        )
        torch.testing.assert_close(numbers(trace), numbers(single), atol=1e-6, rtol=0)


def test_a_partner_has_the_same_prompt_where_there_is_one():
    lm = tiny_lm("gpt2", tokenizer="byte-level")
    facts = [Fact(s, "The {} is in", t) for s, t in (("tower", "Paris"), ("river", "Rome"))]
    facts += [Fact("tongue", "Their {} is", "piano")] * 9
    average = engram.average_trace(lm, facts, keep="all", corruption="subject", sites=["residual"])
    assert [trace.settings["other_subject"] for trace in average.traces[:2]] == ["river", "tower"]
    assert {trace.settings["other_subject"] for trace in average.traces[2:]} == {"tower", "river"}


def test_logits_are_compared_with_the_paired_facts_object(lm):
    average = engram.average_trace(
        lm, PAIRED, keep="all", answer="object", corruption="subject", metric="logit_difference"
    )
    facts = {fact.subject: fact for fact in PAIRED}
    for trace in average.traces:
        own, other = facts[trace.subject], facts[trace.settings["other_subject"]]
        assert trace.settings["foil"] == other.target
        (logits,) = lm.logits_at([lm.encode(trace.prompt).ids], [[trace.last]])
        answer, foil = (lm.target_ids(trace.prompt, fact.target)[0] for fact in (own, other))
        assert trace.high_score == pytest.approx(
            float(logits[0, answer] - logits[0, foil]), abs=1e-5
        )
        swapped = trace.prompt.replace(own.subject, other.subject)
        (logits,) = lm.logits_at([lm.encode(swapped).ids], [[trace.last]])
        assert trace.low_score == pytest.approx(
            float(logits[0, answer] - logits[0, foil]), abs=1e-5
        )


@pytest.mark.parametrize("answer", ["model", "object"])
def test_objects_that_begin_alike_are_no_pair(monkeypatch, answer):
    """Their logits do not differ; nor do those of the model's own answer and a foil that it is."""
    lm = tiny_lm("gpt2")
    says(monkeypatch, lm, "piano")
    objects = ("city", "piano") if answer == "model" else ("city Paris", "city")
    facts = [Fact(s, "The {} is in", t) for s, t in zip(("tower", "river"), objects, strict=True)]
    given = {"keep": "all", "answer": answer, "corruption": "subject"}
    assert len(engram.average_trace(lm, facts, **given).traces) == 2
    with (
        pytest.raises(EngramError, match="no other fact has another object")
        if answer == "object"
        else nullcontext()
    ):
        found = engram.average_trace(lm, facts, metric="logit_difference", **given)
        assert [trace.subject for trace in found.traces] == ["river"]


def test_estimates_and_screened_cells_are_those_of_single_facts(lm):
    for settings in ({"method": "attribution"}, {"screen": 5}):
        average = engram.average_trace(lm, FACTS, facts_per_batch=3, **settings, **GIVEN)
        singles = alone(lm, FACTS, samples=2, window=2, **settings)
        same(average, singles, 1e-6)
        assert {trace.method for trace in average.traces} == {singles[0].method}
        if "screen" in settings:
            assert all(
                sum(int(t.sum()) for t in trace.exact.values()) >= 5 for trace in average.traces
            )


@pytest.mark.parametrize(
    "settings",
    [
        {"sites": ["residual"], "severed": ["mlp", "attention"]},
        {"sites": ["head"], "direction": "noise"},
        {"sites": ["neuron"], "neurons": [(0, 3), (2, 5)], "effect": "direct"},
        {"corruption": "zeros", "metric": "log_probability", "positions": "subject_last"},
        {"corruption": "mean", "positions": "last"},
        {"noise": "u0.5"},
        {"noise": "t10", "extra_tokens": 1},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_whatever_is_asked_of_one_fact_can_be_asked_of_many(lm, settings, tmp_path):
    average = engram.average_trace(
        lm, FACTS, out=tmp_path / "run", facts_per_batch=3, **settings, **GIVEN
    )
    same(average, alone(lm, FACTS, samples=2, window=2, **settings), 2e-6)
    same(average, AverageTrace.load(tmp_path / "run"), 0)


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"samples": 3},
            r"run was begun with samples=2, it is 3 now\. Resume with the same settings, or "
            r"choose another",
        ),
        ({"keep": "known"}, "begun with keep='all', it is 'known'"),
        ({"answer": "object"}, "begun with answer='model'"),
        ({"window": 3}, "begun with window=2"),
        ({"noise": "s2"}, "begun with noise='s3'"),
        ({"seed": 2}, "begun with seed=1"),
        (
            {"sites": ["mlp"]},
            r"begun with tables=\['residual', 'mlp', 'attention'\], it is \['mlp'\]",
        ),
        ({"positions": "last"}, "begun with positions='all'"),
        ({"direction": "noise"}, "begun with direction='denoise'"),
        ({"metric": "log_probability"}, "begun with metric='probability'"),
        ({"method": "attribution"}, "begun with method='exact'"),
        ({"screen": 3}, "begun with screen=None"),
        ({"noise_subjects": ["Rome"]}, "begun with noise measured on other subjects"),
        (
            {"facts": FACTS[:3]},
            r"begun with noise measured on other subjects \(the list's own, unless noise_subjects "
            r"says",
        ),
        (
            {"lm": tiny_lm("gpt2", torch.float64)},
            "begun with other weights of the model|begun with dtype='torch.float32'",
        ),
        ({"lm": tiny_lm("gpt2", seed=1)}, "begun with other weights of the model"),
        ({"lm": tiny_lm("llama")}, "begun with model='tiny-gpt2', it is 'tiny-llama'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_file_of_another_run_is_not_gone_on_with(run_file, tmp_path, settings, message, lm):
    copy = tmp_path / "run"
    shutil.copy(run_file, copy)
    before = copy.read_bytes()
    asked = {"lm": lm, "facts": FACTS, **GIVEN, **settings}
    with pytest.raises(SettingError, match=message):
        engram.average_trace(asked.pop("lm"), asked.pop("facts"), out=copy, **asked)
    assert copy.read_bytes() == before


@pytest.fixture(scope="module")
def run_file(lm, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run"
    engram.average_trace(lm, FACTS, out=path, **GIVEN)
    return path


def test_other_pairs_are_another_run(lm, tmp_path):
    given = {"keep": "all", "corruption": "subject", "out": tmp_path / "run"}
    engram.average_trace(lm, PAIRED[:3], **given)
    with pytest.raises(
        SettingError, match="begun with another list of facts, so that other facts are paired"
    ):
        engram.average_trace(lm, PAIRED, **given)


def test_a_file_of_something_else_is_left_alone(lm, tmp_path):
    given = {"noise": 1.0, **GIVEN}
    (tmp_path / "text").write_text("not a database, and longer than the header of one: " * 20)
    sqlite3.connect(tmp_path / "other").execute("CREATE TABLE songs (title)").connection.close()
    sqlite3.connect(tmp_path / "alike").execute("CREATE TABLE facts (title)").connection.close()
    for name, message in (
        ("text", "file is not a database"),
        ("other", "something else"),
        ("alike", "no such table"),
    ):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(EngramFileError, match=rf"{name}\b.*{message}.*another name"):
            engram.average_trace(lm, FACTS, out=tmp_path / name, **given)
        with pytest.raises(
            EngramFileError,
            match=r"something else, not a run of traces|cannot be used for a run of traces: (file "
            r"is not a database|no such table)",
        ):
            AverageTrace.load(tmp_path / name)
        assert (tmp_path / name).read_bytes() == before


def test_a_place_that_cannot_be_written_to(lm, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "run", tmp_path / "folder"):
        with pytest.raises(
            EngramFileError,
            match=r"cannot be used for a run of traces: .*a folder that you may write to",
        ):
            engram.average_trace(lm, FACTS, out=path, noise=1.0, **GIVEN)
    with pytest.raises(
        EngramFileError,
        match=r"is no file of a run; make one with engram.average_trace\(..., out='gone'\)",
    ):
        AverageTrace.load(tmp_path / "gone")


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the administrator may write everywhere"
)
def test_a_read_only_folder(lm, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(EngramFileError, match="cannot be used for a run of traces: unable to open"):
        engram.average_trace(lm, FACTS, out=tmp_path / "run", noise=1.0, **GIVEN)


def test_a_file_that_another_process_holds(lm, tmp_path, run_file, monkeypatch):
    copy = tmp_path / "run"
    shutil.copy(run_file, copy)
    plain = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: plain(*a, **{**k, "timeout": 0.05}))
    holder = plain(copy, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(
        EngramFileError, match="cannot be used for a run of traces: database is locked"
    ):
        engram.average_trace(lm, FACTS, out=copy, **GIVEN)
    with pytest.raises(EngramFileError, match="database is locked"):
        AverageTrace.load(copy)
    holder.close()


def test_a_file_of_another_version(lm, tmp_path, run_file):
    copy = tmp_path / "run"
    shutil.copy(run_file, copy)
    connection = sqlite3.connect(copy)
    with connection:
        connection.execute("UPDATE about SET value = '9' WHERE name = 'format_version'")
    connection.close()
    with pytest.raises(SettingError, match="begun with format_version=9, it is 1 now"):
        engram.average_trace(lm, FACTS, out=copy, **GIVEN)
    with pytest.raises(EngramFileError, match="has format version 9, this engram reads 1"):
        AverageTrace.load(copy)


def test_what_a_kill_left_half_written_is_rolled_back_before_reading(tmp_path, run_file):
    """A transaction larger than SQLite's memory is in the file before it is finished."""
    copy = tmp_path / "run"
    shutil.copy(run_file, copy)
    connection = sqlite3.connect(copy, isolation_level=None)
    connection.execute("PRAGMA cache_size=2")
    connection.execute("BEGIN IMMEDIATE")
    for i in range(50):
        connection.execute(
            "INSERT INTO facts VALUES (?, ?, 'p', NULL, ?)", (f"half {i}", i, b"x" * 5000)
        )
    killed = tmp_path / "killed"
    shutil.copy(copy, killed)
    shutil.copy(f"{copy}-journal", f"{killed}-journal")
    connection.close()
    same(AverageTrace.load(killed), AverageTrace.load(run_file), 0)


def test_a_mistake_of_a_callback_is_not_the_files(lm, tmp_path):
    def progress(what, done, total):
        raise BrokenPipeError("the terminal is gone")

    with pytest.raises(BrokenPipeError, match="the terminal is gone"):
        engram.average_trace(lm, FACTS, out=tmp_path / "run", progress=progress, noise=1.0, **GIVEN)


def test_a_file_that_was_begun_and_not_written(lm, tmp_path):
    (tmp_path / "run").touch()
    assert engram.average_trace(lm, FACTS, out=tmp_path / "run", noise=1.0, **GIVEN).traces


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"keep": "some"}, SettingError, "keep='some': expected 'known', 'exact' or 'all'"),
        ({"answer": "true"}, SettingError, "answer='true': expected 'model' or 'object'"),
        (
            {"metric": "logit_difference"},
            SettingError,
            "takes the paired fact's object for the foil",
        ),
        (
            {"noise": torch.zeros(1, 1, 32)},
            SettingError,
            "noise as a tensor fits subjects of one length",
        ),
        ({"noise": "loud"}, FactError, "noise='loud' is not a rule"),
        ({"facts_per_batch": 0}, SettingError, "facts_per_batch=0: expected at least 1"),
        ({"site": ["mlp"]}, SettingError, "did you mean 'sites'"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(lm, tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        engram.average_trace(
            lm, FACTS, out=tmp_path / "run", keep=settings.pop("keep", "all"), **settings
        )
    assert not (tmp_path / "run").exists()


def test_no_facts(lm):
    with pytest.raises(EngramError, match="no facts were given"):
        engram.average_trace(lm, [], noise=1.0)

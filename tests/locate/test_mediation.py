"""Causal mediation in general: every combination that makes sense is the naive loop, and the others
say why they make none.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch

import engram
from engram.errors import FactError, SettingError, UnsupportedModelError
from engram.locate.settings import PARTS, TraceConfig, window_layers
from tests.helpers import naive
from tests.helpers.tiny import EXPERTS, FAMILIES, crossed, tiny_lm

PROMPT, SUBJECT, OTHER = "The tower is in the", "tower", "river"
NEURONS = [(0, 3), (1, 30), (3, 7)]
LIMIT = {
    "probability": 1e-7,
    "log_probability": 1e-5,
    "logit_difference": 1e-5,
}  # tables are kept in float32


def embedding_hook(lm, config, span, noise_nd):
    """Return the corruption of one sample, written out again."""

    def corrupt(out):
        out = out.clone()
        place = out[:, span[0] : span[1]]
        place[:] = (
            noise_nd
            if config.subject.replace or config.subject.corruption in ("zeros", "mean")
            else place + noise_nd
        )
        return out

    return {lm.parts.embed: corrupt}


def runs(lm, config, span, noise):
    """(ids, embedding hook) of the clean run and of each corrupted sample."""
    ids = lm.encode(PROMPT).ids
    if config.subject.corruption == "subject":
        return (ids, {}), [(lm.encode(PROMPT.replace(SUBJECT, OTHER)).ids, {})]
    if config.subject.corruption == "zeros":
        noise = torch.zeros(1, span[1] - span[0], lm.d_model)
    if config.subject.corruption == "mean":
        rows = [
            lm.parts.embed.weight[i].detach()
            for s in config.subject.noise_subjects
            for i in lm.encode(s).ids
        ]
        noise = torch.stack(rows).mean(0).expand(1, span[1] - span[0], -1)
    return (ids, {}), [(ids, embedding_hook(lm, config, span, sample)) for sample in noise]


def measure(config, logits_tv, answer, foil):
    last = logits_tv[-1].double()
    if config.metric == "logit_difference":
        return float(last[answer] - last[foil])
    log_p = float(last.log_softmax(-1)[answer])
    return log_p if config.metric == "log_probability" else float(torch.tensor(log_p).exp())


def modules_of(lm, site):
    layers = range(lm.n_layers)
    if site in PARTS:
        name = lm.parts.heads_out_name if site == "head" else lm.parts.mlp_out_name
        return [lm.model.get_submodule(name(layer)) for layer in layers]
    return [lm.model.get_submodule(lm.parts.site_module_name(site, layer)) for layer in layers]


def cells_of(lm, config, site):
    """(index behind the token axis, layers, channels) of each cell."""
    if site == "head":
        width = lm.d_model // lm.parts.n_heads
        every = product(range(lm.n_layers), range(lm.parts.n_heads))
        return [
            ((layer, h), range(layer, layer + 1), slice(h * width, (h + 1) * width))
            for layer, h in every
        ]
    if site == "neuron":
        return [
            ((i,), range(layer, layer + 1), slice(n, n + 1))
            for i, (layer, n) in enumerate(config.patching.neurons)
        ]
    window = config.patching.window if site in ("mlp", "attention") else 1
    return [
        ((c,), range(*window_layers(c, window, lm.n_layers)), slice(None))
        for c in range(lm.n_layers)
    ]


def naive_table(lm, config, site, trace, noise, answer, foil, severed=None):
    """Return the table of one site, cell by cell and sample by sample."""
    clean, corrupted = runs(lm, config, trace.subject_range, noise)
    pairs = [
        (clean, other) if config.patching.inserts_corrupted else (other, clean)
        for other in corrupted
    ]
    modules, inputs = modules_of(lm, site), site in PARTS
    table = torch.zeros_like(trace.scores[site])
    for base, source in pairs:
        values = naive.states(lm.model, source[0], modules, inputs, source[1])
        frozen = []
        if severed:
            frozen_modules = modules_of(lm, severed)
            frozen = list(
                zip(
                    frozen_modules,
                    naive.states(lm.model, base[0], frozen_modules, False, base[1]),
                    strict=True,
                )
            )
        for row, token in enumerate(trace.positions):
            for index, layers, part in cells_of(lm, config, site):
                logits = naive.patched(
                    lm.model,
                    base[0],
                    base[1],
                    [modules[i] for i in layers],
                    [values[i] for i in layers],
                    token,
                    part,
                    inputs,
                    frozen,
                )
                table[(row, *index)] += measure(config, logits, answer, foil) / len(pairs)
    return table


def compare(lm, sites, limit=None, severed=(), **settings):
    config = TraceConfig.of(
        sites=sites,
        severed=severed,
        neurons=NEURONS if "neuron" in sites else (),
        window=2,
        **settings,
    )
    foil = "city" if config.metric == "logit_difference" else None
    other = OTHER if config.subject.corruption == "subject" else None
    given = {
        name: getattr(config.patching, name) for name in ("sites", "neurons", "window", "severed")
    } | settings
    trace = engram.trace(
        lm, PROMPT, subject=SUBJECT, target="the", foil=foil, other_subject=other, **given
    )
    (clean_ids, _), corrupted = runs(lm, config, trace.subject_range, settings.get("noise"))
    answer, foil_id = lm.target_ids(PROMPT, "the"), lm.target_ids(PROMPT, "city")[0]
    assert len(answer) == 1
    limit = limit or LIMIT[config.metric]
    clean = measure(
        config,
        naive.patched(lm.model, clean_ids, {}, [], [], 0, slice(0), False),
        answer[0],
        foil_id,
    )
    assert trace.high_score == pytest.approx(clean, abs=limit)
    for site in sites:
        wanted = naive_table(lm, config, site, trace, settings.get("noise"), answer[0], foil_id)
        torch.testing.assert_close(trace.scores[site], wanted, atol=limit, rtol=0)
        assert (trace.scores[site] - wanted.mean()).abs().max() > 1e-6, (
            "nothing changes: the comparison would be empty"
        )
        for module in severed:
            wanted = naive_table(
                lm, config, site, trace, settings.get("noise"), answer[0], foil_id, module
            )
            torch.testing.assert_close(
                trace.scores[f"{site}, {module} severed"], wanted, atol=limit, rtol=0
            )
    return trace


@pytest.fixture(scope="module")
def lm():
    return tiny_lm("gpt2", torch.float64)


def noise_for(lm, samples=2, seed=1):
    span = engram.trace(
        lm, PROMPT, subject=SUBJECT, noise=1.0, samples=1, sites=["residual"]
    ).subject_range
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(
        samples,
        span[1] - span[0],
        lm.parts.embed.embedding_dim,
        dtype=torch.float64,
        generator=generator,
    )


EVERY = ("residual", "mlp", "attention", "head", "neuron")
CORRUPTIONS = ("noise", "zeros", "mean", "subject")
METRICS = ("probability", "log_probability", "logit_difference")


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize(
    ("direction", "effect"), list(product(("denoise", "noise"), ("indirect", "direct")))
)
@pytest.mark.parametrize("metric", METRICS)
def test_every_combination_is_the_naive_loop(lm, corruption, direction, effect, metric):
    """48 combinations on residual states and on heads: these two take all paths through the engine
    but windows.
    """
    settings = {
        "corruption": corruption,
        "direction": direction,
        "effect": effect,
        "metric": metric,
    }
    settings |= {"noise": noise_for(lm)} if corruption == "noise" else {}
    settings |= {"noise_subjects": ["Rome", "the piano"]} if corruption == "mean" else {}
    compare(lm, ["residual", "head"], positions="subject_last", **settings)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "bloom", "gemma2"])
def test_every_unit_at_every_token(family, direction):
    lm = tiny_lm(family, torch.float64)
    limit = 1e-6 if family in ("gptj", "bloom", "gemma2") else None
    compare(lm, EVERY, limit, noise=noise_for(lm), direction=direction)


@pytest.mark.parametrize(("family", "direction"), crossed(FAMILIES, "denoise", "noise"))
def test_every_unit_by_whole_forward_passes_too(family, direction):
    lm = tiny_lm(family, torch.float64)
    given = {"subject": SUBJECT, "noise": noise_for(lm), "direction": direction, "window": 2}
    sites = EVERY if family not in EXPERTS else EVERY[:-1]
    given |= {"neurons": NEURONS} if "neuron" in sites else {}
    replayed, whole = (
        engram.trace(lm, PROMPT, sites=sites, engine=engine, **given)
        for engine in ("replay", "whole")
    )
    for site in sites:
        assert replayed.effects(site).abs().max() > 1e-7
        torch.testing.assert_close(replayed.scores[site], whole.scores[site], atol=1e-6, rtol=0)


@pytest.mark.parametrize("engine", ["replay", "whole"])
@pytest.mark.parametrize(
    ("sites", "severed"),
    [
        (["residual"], ["mlp", "attention"]),
        (["mlp", "neuron"], ["attention"]),
        (["attention", "head"], ["mlp"]),
    ],
)
@pytest.mark.parametrize("family", ["gpt2", "gptj"])
def test_severed_paths_are_the_naive_loops(family, sites, severed, engine):
    lm = tiny_lm(family, torch.float64)
    compare(
        lm, sites, 1e-6 if family == "gptj" else None, severed, noise=noise_for(lm), engine=engine
    )


@pytest.mark.parametrize("severed", ["mlp", "attention"])
def test_severed_paths_in_the_other_direction(lm, severed):
    compare(lm, ["residual"], None, [severed], noise=noise_for(lm), direction="noise")


def test_direct_and_indirect_effects_add_up_as_pearls_do(lm):
    """TE = direct effect - the opposite direction's indirect effect."""
    given = {"subject": SUBJECT, "noise": noise_for(lm), "sites": ["mlp"], "window": 1}
    for direction, opposite in (("denoise", "noise"), ("noise", "denoise")):
        direct = engram.trace(lm, PROMPT, **given, direction=direction, effect="direct")
        indirect = engram.trace(lm, PROMPT, **given, direction=opposite, effect="indirect")
        total = direct.total_effect if direction == "denoise" else -direct.total_effect
        rest = direct.effects("mlp") - indirect.effects("mlp")
        torch.testing.assert_close(rest, torch.full_like(rest, total), atol=1e-6, rtol=0)


def test_paired_prompts_are_symmetric(lm):
    """Denoising from A towards B is noising from B towards A: the same run, read from either
    side.
    """
    towards = PROMPT.replace(SUBJECT, OTHER)
    one = engram.trace(
        lm, PROMPT, subject=SUBJECT, target="the", corruption="subject", other_subject=OTHER
    )
    two = engram.trace(
        lm,
        towards,
        subject=OTHER,
        target="the",
        corruption="subject",
        other_subject=SUBJECT,
        direction="noise",
    )
    for site in one.scores:
        torch.testing.assert_close(one.scores[site], two.scores[site], atol=1e-7, rtol=0)
    assert one.low_score == pytest.approx(two.high_score)


def test_extra_tokens_behind_the_subject_are_corrupted_too(lm):
    plain = engram.trace(lm, PROMPT, subject=SUBJECT, noise=1.0)
    more = engram.trace(lm, PROMPT, subject=SUBJECT, noise=1.0, extra_tokens=1)
    assert more.corrupted == [*plain.corrupted, plain.corrupted[-1] + 1]
    assert more.subject_range == plain.subject_range and more.low_score != plain.low_score


def test_positions_can_be_chosen(lm):
    given = {"subject": SUBJECT, "noise": 1.0, "sites": ["residual"]}
    full = engram.trace(lm, PROMPT, **given)
    last = engram.trace(lm, PROMPT, **given, positions="last")
    some = engram.trace(lm, PROMPT, **given, positions=[3, 1])
    assert last.positions == [len(full.tokens) - 1] and some.positions == [3, 1]
    torch.testing.assert_close(
        last.scores["residual"], full.scores["residual"][-1:], atol=1e-6, rtol=0
    )
    torch.testing.assert_close(
        some.scores["residual"], full.scores["residual"][[3, 1]], atol=1e-6, rtol=0
    )


def test_a_position_named_twice_is_one_row(lm):
    twice = engram.trace(lm, PROMPT, subject=SUBJECT, noise=1.0, sites="residual", positions=[5, 5])
    once = engram.trace(lm, PROMPT, subject=SUBJECT, noise=1.0, sites="residual", positions=[5])
    assert twice.positions == [5] and torch.equal(twice.scores["residual"], once.scores["residual"])


def test_a_facts_subject_is_corrupted_where_the_fact_says_it_stands(lm):
    """Not in "towers", where the same letters come first."""
    fact = engram.Fact("tower", "The towers and the {} are in the", "city")
    average = engram.average_trace(lm, [fact], keep="all", noise=1.0, samples=2, sites="residual")
    last = engram.trace(
        lm,
        fact.prompt_text,
        subject="tower",
        occurrence="last",
        noise=1.0,
        samples=2,
        sites="residual",
    )
    assert average.traces[0].corrupted == last.corrupted
    torch.testing.assert_close(
        average.traces[0].scores["residual"], last.scores["residual"], atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"sites": "residual", "severed": "mlp", "frozen_noise": torch.zeros(2, 4, 32)},
            "frozen_noise is a tensor",
        ),
        ({"positions": [3]}, "numeric positions mean different words in each prompt"),
        ({"noise": torch.zeros(2, 4, 32)}, "noise as a tensor fits subjects of one length"),
    ],
)
def test_what_fits_one_prompt_only_is_refused_over_many(lm, settings, message):
    with pytest.raises(SettingError, match=message):
        engram.average_trace(
            lm,
            [engram.Fact("tower", "The {} is in the", "city")],
            keep="all",
            **{"noise": 1.0, **settings},
        )


# -- combinations that make no sense ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"site": ["mlp"]}, r"no setting 'site' \(did you mean 'sites'\?\)"),
        ({"direction": "forwards"}, "direction='forwards': expected 'denoise' or 'noise'"),
        (
            {"positions": "first"},
            "positions='first': expected 'all', 'subject_last' or 'last' or a list",
        ),
        ({"positions": [99]}, r"positions=\[99\]: the prompt has tokens 0 to"),
        ({"sites": []}, r"sites=\[\]: expected at least 1"),
        ({"sites": ["mlp"], "severed": "mlp"}, "the same output cannot be both"),
        ({"sites": ["head"], "severed": "attention"}, "the same output cannot be both"),
        ({"severed": "mlp"}, r"say sites=\['residual'\]"),
        (
            {"sites": ["residual"], "severed": "residual"},
            "cannot be severed; expected 'mlp', 'attention'",
        ),
        (
            {"sites": ["residual"], "severed": "mlp", "effect": "direct"},
            "already blocks the path through the state",
        ),
        (
            {"sites": ["residual"], "severed": "mlp", "method": "attribution"},
            "no first-order estimate",
        ),
        (
            {"sites": ["residual"], "frozen_noise": torch.zeros(1)},
            "frozen_noise is the noise of the run",
        ),
        ({"replace": True, "corruption": "zeros"}, "replace=True is about noise"),
        ({"corruption": "subject"}, "'subject' puts another subject into the prompt"),
        ({"other_subject": OTHER}, "no other corruption does"),
        (
            {"corruption": "subject", "other_subject": OTHER, "extra_tokens": 1},
            "differs in the subject alone",
        ),
        (
            {"corruption": "subject", "other_subject": "Rome and Paris"},
            "does not take the place of",
        ),
        (
            {"corruption": "subject", "other_subject": SUBJECT},
            "is the subject: nothing would be corrupted",
        ),
        ({"metric": "logit_difference"}, "'logit_difference' is between the answer and a foil"),
        ({"foil": "city"}, "no other metric has one"),
        ({"metric": "logit_difference", "foil": "the"}, "begins with the same token as the answer"),
        ({"sites": ["neuron"]}, "go together"),
        ({"sites": ["neuron"], "neurons": [(0, 99999)]}, "neuron 99999 of layer 0 does not exist"),
        ({"sites": ["neuron"], "neurons": [(9, 0)]}, "layer=9 does not exist"),
        ({"sites": ["neurons"]}, "neurons"),
        ({"method": "attribution", "screen": 3}, "choose one"),
        ({"screen": 0}, "screen=0: expected at least 1"),
        ({"correction": "query-key"}, "correction belongs to estimates"),
        (
            {"correction": "query-key", "sites": ["mlp"], "method": "attribution"},
            "corrects estimates of residual states",
        ),
        (
            {"sites": "residul"},
            r"no site 'residul' \(did you mean 'residual'\?\); it has residual, mlp, attention",
        ),
        ({"positions": 3}, "positions=3: expected"),
        ({"rows_per_batch": 0}, "rows_per_batch=0: expected at least 1"),
        ({"noise": "t2"}, "more than 2 degrees of freedom"),
        ({"noise": "t"}, "is not a rule"),
        ({"noise": "m3"}, "is not a rule"),
        ({"noise": "s."}, "is not a rule"),
        (
            {"noise": torch.zeros(2, 4, 7)},
            r"shape \(2, 4, 7\), expected \[samples, corrupted tokens, d\], here \[2, 4, 32\]",
        ),
        ({"noise": torch.full((2, 4, 32), torch.nan)}, "NaN or infinity"),
        (
            {"sites": "residual", "severed": "mlp", "frozen_noise": torch.zeros(3, 4, 32)},
            r"frozen_noise has shape \(3, 4, 32\)",
        ),
    ],
)
def test_a_combination_that_makes_no_sense_says_why(lm, settings, message):
    with pytest.raises((SettingError, FactError, UnsupportedModelError), match=message):
        engram.trace(lm, PROMPT, **{"subject": SUBJECT, "target": "the", "noise": 1.0, **settings})


def test_a_foil_that_is_the_models_own_answer_is_refused(pocket_lm):
    lm = pocket_lm
    with pytest.raises(
        FactError, match="foil='Paris' begins with the same token as the answer ' Paris'"
    ):
        engram.trace(
            lm,
            "The Eiffel Tower is located in the city of",
            subject="Eiffel Tower",
            foil="Paris",
            metric="logit_difference",
            noise=0.1,
            samples=1,
        )

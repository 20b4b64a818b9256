"""Pictures show the numbers they are given, labelled as in the paper, without touching global
state.
"""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.container import BarContainer

from engram.errors import SettingError
from engram.locate.average import TOKEN_ROLES, AverageTrace
from engram.locate.trace import CausalTrace

HEADING = 2 * 0.14  # inches of two lines


@pytest.fixture
def trace():
    generator = torch.Generator().manual_seed(0)
    scores = {
        site: 0.1 + 0.8 * torch.rand(4, 48, generator=generator)
        for site in ("residual", "mlp", "attention")
    }
    return CausalTrace(
        prompt="The $ Needle\nis",
        subject="$ Needle",
        answer=" Seattle",
        model="some/gpt2-xl",
        tokens=["The", " $", " Needle", "\nis"],
        positions=[0, 1, 2, 3],
        subject_range=(1, 3),
        corrupted=[1, 2],
        scores=scores,
        low_score=0.1,
        high_score=0.9,
        window=10,
        samples=10,
    )


def maps(figure):
    return [ax for ax in figure.axes if ax.get_title()[:9] == "Restoring"]


@pytest.mark.parametrize("shared", [True, False])
def test_three_sites_side_by_side_on_one_scale_or_each_on_its_own(trace, shared):
    figure = trace.plot(shared_scale=shared)
    assert len(maps(figure)) == 3
    strongest = max(float(scores.max()) for scores in trace.scores.values())
    for ax, (_, scores) in zip(maps(figure), trace.scores.items(), strict=True):
        mesh, highest = ax.collections[0], strongest if shared else float(scores.max())
        assert np.array_equal(mesh.get_array().reshape(4, 48), scores.numpy())
        assert mesh.get_clim() == (trace.low_score, pytest.approx(highest))
        assert ax.yaxis_inverted(), "the first token is on top"


def test_one_site(trace):
    figure = trace.plot("mlp")
    (ax,) = maps(figure)
    assert ax.get_xlabel() == "centre of 10 restored MLP layers"
    assert figure.get_size_inches().tolist() == [3.5, pytest.approx(2.0 + HEADING)]
    assert figure.dpi == 200


def test_subject_tokens_carry_a_star_and_layers_are_counted_from_zero(trace):
    ax = maps(trace.plot("residual"))[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "The",
        r" \$*",
        " Needle*",
        r"\nis",
    ]
    assert [label.get_text() for label in ax.get_xticklabels()] == [
        str(layer) for layer in range(0, 42, 5)
    ]
    assert ax.get_xlabel() == "single restored layer of gpt2-xl"


def test_the_answer_is_named_and_the_picture_is_written(trace, tmp_path):
    figure = trace.plot()
    assert [ax.get_title() for ax in figure.axes].count("p(Seattle)") == 3
    for name in ("trace.png", "trace.pdf", "trace.svg"):
        figure.savefig(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000


def test_letters_of_other_scripts_are_drawn(trace, tmp_path):
    shown = CausalTrace(**{**vars(trace), "tokens": ["Zdeno", " Chára", " Москва", " Ω"]})
    shown.plot().savefig(tmp_path / "trace.png")


def test_drawing_changes_no_global_setting(trace):
    before = dict(matplotlib.rcParams)
    trace.plot()
    assert dict(matplotlib.rcParams) == before


def test_a_trace_without_effect_is_drawn(trace):
    flat = CausalTrace(**{**vars(trace), "scores": {"mlp": torch.full((4, 3), 0.1)}})
    assert flat.plot()


# -- other directions, units and methods -----------------------------------------------------------


def changed(trace, settings=None, **fields):
    return CausalTrace(**{**vars(trace), "settings": settings or {}, **fields})


def test_what_is_inserted_is_dark_where_the_score_falls(trace):
    figure = changed(trace, {"direction": "noise"}).plot("mlp")
    ax = figure.axes[0]
    assert ax.get_title() == "Corrupting MLP after clean input"
    assert ax.get_xlabel() == "centre of 10 replaced MLP layers"
    mesh = ax.collections[0]
    assert mesh.get_cmap().name == "Greens_r"
    assert mesh.get_clim() == (pytest.approx(float(trace.scores["mlp"].min())), trace.high_score)


@pytest.mark.parametrize(
    ("direction", "title"),
    [
        ("denoise", "Clean input, state kept corrupted"),
        ("noise", "Corrupted input, state kept clean"),
    ],
)
def test_of_a_direct_effect_it_is_said_what_is_kept(trace, direction, title):
    ax = changed(trace, {"direction": direction, "effect": "direct"}).plot("residual").axes[0]
    assert ax.get_title() == title and ax.get_xlabel() == "single kept layer of gpt2-xl"


@pytest.mark.parametrize(
    ("method", "words"), [("attribution", "(estimate)"), ("screened", "(partly estimated)")]
)
def test_an_estimate_is_called_one(trace, method, words):
    for ax in maps(changed(trace, method=method).plot()):
        assert ax.get_title().endswith(f"after corrupted input {words}")
    average = AverageTrace([changed(trace, method=method)])
    for figure in (average.plot(), average.plot_lines()):
        assert all(words in title for title in titles(figure))


def test_a_severed_table_says_what_is_severed(trace):
    severed = changed(trace, scores={"residual, mlp severed": trace.scores["residual"]})
    ax = severed.plot().axes[0]
    assert ax.get_title() == "Restoring state (MLP severed) after corrupted input"
    assert ax.collections[0].get_cmap().name == "Purples"


def test_heads_are_shown_at_the_token_where_one_does_most(trace):
    scores = torch.full((4, 6, 3), 0.2)
    scores[2, 5, 1] = 0.8
    ax = changed(trace, scores={"head": scores}).plot().axes[0]
    assert np.array_equal(ax.collections[0].get_array().reshape(6, 3), scores[2].numpy())
    assert ax.get_title() == "Restoring head after corrupted input, at Needle*"
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("layer", "head of gpt2-xl")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1", "2"]


def test_neurons_are_named_by_layer_and_number(trace):
    table = trace.scores["mlp"][:, :3]
    ax = (
        changed(trace, {"neurons": [[0, 7], [5, 12], [47, 6399]]}, scores={"neuron": table})
        .plot()
        .axes[0]
    )
    assert np.array_equal(ax.collections[0].get_array().reshape(4, 3), table.numpy())
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.7", "5.12", "47.6399"]


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({"metric": "log_probability"}, "log p(Seattle)"),
        ({"metric": "logit_difference", "foil": " Paris"}, "logits, Seattle - Paris"),
    ],
)
def test_the_colour_bar_says_what_was_measured(trace, settings, label):
    bars = [ax for ax in changed(trace, settings).plot().axes if ax.get_label() == "<colorbar>"]
    assert [bar.get_ylabel() for bar in bars] == [label] * 3, (
        "beside the bar, since it is too long to go underneath"
    )


def test_no_text_leaves_the_picture_or_covers_another(trace):
    """Titles of severed and estimated tables are the longest there are."""
    severed = {
        f"{site}{end}": trace.scores[site]
        for site in ("residual",)
        for end in ("", ", attention severed")
    }
    shown = changed(trace, scores=severed)
    estimated = changed(trace, method="screened", answer=" Johannesburg")
    average = AverageTrace([changed(trace, method="screened")] * 1000)
    for figure in (
        shown.plot(),
        estimated.plot(),
        average.plot(),
        AverageTrace([shown] * 1000).plot(),
    ):
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        width, height = figure.bbox.size
        boxes = [ax.title.get_window_extent() for ax in figure.axes] + [
            ax.xaxis.label.get_window_extent() for ax in figure.axes
        ]
        boxes = [box for box in boxes if box.width > 2]
        for i, box in enumerate(boxes):
            assert box.x0 >= -1 and box.x1 <= width + 1 and box.y0 >= -1 and box.y1 <= height + 1
            assert not any(box.overlaps(other) for other in boxes[:i])


# -- averages --------------------------------------------------------------------------------------

LABELS = [
    "First subject token",
    "Middle subject tokens",
    "Last subject token",
    "First subsequent token",
    "Further tokens",
    "Last token",
]


@pytest.fixture
def average():
    """Twenty facts whose prompts have every role."""
    traces = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        scores = {site: torch.rand(8, 48, generator=generator) * top for site, top in TOPS.items()}
        traces.append(
            CausalTrace(
                prompt=f"p{seed}",
                subject="s",
                answer=" a",
                tokens=[str(i) for i in range(8)],
                positions=list(range(8)),
                subject_range=(0, 4),
                corrupted=[0, 1, 2, 3],
                scores=scores,
                low_score=0.2,
                high_score=0.9,
                window=10,
                samples=10,
                model="some/gpt2-xl",
                last=7,
            )
        )
    return AverageTrace(traces)


TOPS = {
    "residual": 0.9,
    "mlp": 1.0,
    "attention": 0.3,
}  # MLP is the highest, and attention's effects are negative


def panels(figure):
    return [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]


def titles(figure):
    return [ax.get_title() for ax in panels(figure)]


def test_the_average_has_six_rows_and_one_scale(average):
    figure = average.plot()
    assert figure.get_size_inches().tolist() == [10.5, pytest.approx(2.0 + HEADING)]
    assert figure.dpi == 200
    top = float(average.effects("residual").mean.max())
    for ax, (site, colours) in zip(
        panels(figure),
        {"residual": "Purples", "mlp": "Greens", "attention": "Reds"}.items(),
        strict=True,
    ):
        mesh = ax.collections[0]
        wanted = average.effects(site).mean.clamp(min=0).numpy()
        assert (
            np.array_equal(mesh.get_array().reshape(6, 48), wanted)
            and mesh.get_cmap().name == colours
        )
        assert mesh.get_clim() == (0, pytest.approx(top))
        assert [
            label.get_text() for label in ax.get_yticklabels()
        ] == LABELS and ax.yaxis_inverted()
        assert [label.get_text() for label in ax.get_xticklabels()] == [
            str(layer) for layer in range(0, 42, 5)
        ]
    assert float(average.effects("mlp").mean.max()) > top, "which makes the shared limit one"
    assert float(average.effects("attention").mean.min()) < 0, "which makes the clipping one"
    assert [title.replace("\n", " ") for title in titles(figure)] == [
        f"Average indirect effect of {name} over 20 prompts"
        for name in ("state", "MLP", "attention")
    ]
    # below a bar, or beside it where the arrow at its end leaves no room
    labels = [label for ax in figure.axes for label in (ax.get_title(), ax.get_ylabel())]
    assert labels.count("AIE") == 3


def test_the_average_of_the_other_direction_shows_how_much_is_lost(average):
    settings = {"direction": "noise", "effect": "direct"}
    other = AverageTrace([changed(trace, settings, low_score=0.1) for trace in average.traces])
    figure = other.plot()
    wanted = (-other.effects("mlp").mean).clamp(min=0).numpy()
    assert (
        np.array_equal(panels(figure)[1].collections[0].get_array().reshape(6, 48), wanted)
        and wanted.max() > 0.3
    )
    assert [ax.get_title() for ax in figure.axes].count("-ADE") == 3
    assert titles(figure)[0].replace("\n", " ") == "Average direct effect of state over 20 prompts"


def test_a_role_that_no_fact_has_is_grey_and_has_no_line(average):
    shorter = AverageTrace([changed(trace, subject_range=(0, 2)) for trace in average.traces])
    ax = panels(shorter.plot())[0]
    shown = ax.collections[0].get_array().reshape(6, 48)
    assert (
        shown.mask[1].all()
        and not shown.mask[[0, 2, 3, 4, 5]].any()
        and ax.get_facecolor() == (0.9, 0.9, 0.9, 1)
    )
    assert [line.get_label() for line in panels(shorter.plot_lines())[0].lines] == [
        LABELS[0],
        *LABELS[2:],
    ]


@pytest.mark.parametrize("interval", ["bootstrap", "reference"])
def test_lines_are_means_with_their_bands(average, interval):
    figure = average.plot_lines(interval)
    assert figure.get_size_inches().tolist() == [13.0, pytest.approx(3.5 + 9 / 7 * HEADING)]
    assert len(panels(figure)) == 3
    tab10 = matplotlib.colormaps["tab10"].colors
    for ax, site in zip(panels(figure), TOPS, strict=True):
        curves = average.effects(site, interval)
        assert [line.get_label() for line in ax.lines] == LABELS
        assert [line.get_color() for line in ax.lines] == [tab10[i] for i in (0, 1, 2, 4, 5, 3)]
        for i, (line, band) in enumerate(zip(ax.lines, ax.collections, strict=True)):
            assert np.array_equal(line.get_ydata(), curves.mean[i].numpy())
            assert band.get_alpha() == 0.3 and np.array_equal(
                band.get_facecolor()[0, :3], line.get_color()
            )
            corners = band.get_paths()[0].vertices
            for edge in (curves.low[i], curves.high[i]):
                assert {(layer, value) for layer, value in enumerate(edge.tolist())} <= set(
                    map(tuple, corners.tolist())
                )
    assert [ax.get_legend() is not None for ax in panels(figure)] == [False, True, False]
    assert len({ax.get_ylim() for ax in panels(figure)}) == 1, "one axis for all"
    assert titles(figure) == [
        f"Average indirect effect of {name}" for name in ("state", "MLP", "attention")
    ]


def severed(average):
    """Return the same facts, with two severed tables."""
    ends = {"": 1.0, ", mlp severed": 0.8, ", attention severed": 0.9}
    return AverageTrace(
        [
            changed(
                trace,
                scores={
                    f"residual{end}": trace.scores["residual"] * factor
                    for end, factor in ends.items()
                },
            )
            for trace in average.traces
        ]
    )


@pytest.mark.parametrize("role", ["last subject", "last"])
def test_severed_paths_are_three_bars_a_layer(average, role):
    cut = severed(average)
    ax = cut.plot_severed(role).axes[0]
    tables = ["residual", "residual, attention severed", "residual, mlp severed"]
    colours = ["#7261ab", "#f3201b", "#20b020"]
    groups = [group for group in ax.containers if isinstance(group, BarContainer)]
    assert [group.get_label() for group in groups] == [
        "as it is",
        "attention severed",
        "MLP severed",
    ]
    for group, table, colour, offset in zip(groups, tables, colours, (-0.3, 0, 0.3), strict=True):
        wanted = 100 * cut.effects(table).mean[TOKEN_ROLES.index(role)].numpy()
        np.testing.assert_allclose([bar.get_height() for bar in group], wanted)
        assert {to_hex(bar.get_facecolor()) for bar in group} == {colour}
        np.testing.assert_allclose([bar.get_x() + 0.15 for bar in group], np.arange(48) + offset)
        assert {round(bar.get_width(), 9) for bar in group} == {0.3}
        assert group.errorbar is not None
    assert ax.get_ylabel() == "average indirect effect, %" and role in ax.get_xlabel()


def test_of_one_fact_the_bars_have_no_interval_and_small_effects_stay_small(average):
    trace = severed(average).traces[0]
    flat = changed(
        trace, scores={site: torch.full_like(table, 0.21) for site, table in trace.scores.items()}
    )
    ax = flat.plot_severed().axes[0]
    assert ax.get_ylabel() == "indirect effect, %" and ax.get_ylim() == (0.0, 2.5)
    assert all(group.errorbar is None for group in ax.containers)


def test_bars_are_an_index_of_what_was_severed(average):
    cut = severed(average)
    one = AverageTrace(
        [
            changed(t, scores={k: v for k, v in t.scores.items() if "attention" not in k})
            for t in cut.traces
        ]
    )
    labels = [
        group.get_label()
        for group in one.plot_severed().axes[0].containers
        if isinstance(group, BarContainer)
    ]
    assert labels == ["as it is", "MLP severed"]


def test_nothing_severed_has_no_bars(average):
    with pytest.raises(
        SettingError, match=r"no severed tables; trace with sites=\['residual'\], severed="
    ):
        average.plot_severed()
    with pytest.raises(SettingError, match="role='subject': expected 'first subject'"):
        severed(average).plot_severed("subject")


def test_heads_and_neurons_have_no_line_a_layer(trace):
    heads = AverageTrace(
        [changed(trace, scores={"head": torch.rand(4, 6, 3), "neuron": torch.rand(4, 6)})]
    )
    for draw in (heads.plot, heads.plot_lines):
        with pytest.raises(
            SettingError,
            match=r"none of \['head', 'neuron'\] has one value a layer; see AverageTrace.effects",
        ):
            draw()


def test_averages_are_written_and_change_no_global_setting(average, tmp_path):
    before = dict(matplotlib.rcParams)
    for draw in (average.plot, average.plot_lines, severed(average).plot_severed):
        for ending in ("png", "pdf", "svg"):
            draw().savefig(tmp_path / f"picture.{ending}")
            assert (tmp_path / f"picture.{ending}").stat().st_size > 1000
    assert dict(matplotlib.rcParams) == before

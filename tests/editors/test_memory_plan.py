"""The plan is told from shapes alone, adds up, and is near what an edit takes."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import engram
from engram import LanguageModel, MemoryPlan
from engram.cli import app
from engram.editors.closed_form.mass_settings import MASS_METHODS
from engram.errors import EngramError, SettingError
from engram.model.loading import load_shapes
from tests.helpers.tiny import DENSE, EXPERTS, make_config, tiny_folder, tiny_lm


def bytes_of(plan: MemoryPlan) -> dict[tuple[str, str], int]:
    return {(part.phase, part.what): part.bytes for part in plan.parts}


@pytest.mark.parametrize("method", ["rome", "memit"])
@pytest.mark.parametrize("family", DENSE)
def test_every_family_is_planned_for_without_its_weights(family: str, method: str) -> None:
    lm = tiny_lm(family)
    plan = engram.memory_plan(lm, 5, method)
    stored = sum(
        each.numel() * each.element_size() for each in (*lm.model.parameters(), *lm.model.buffers())
    )
    assert plan.of("throughout") == stored
    assert plan.peak == stored + max(
        plan.of(phase) for phase in ("second moments", "values", "solve")
    )
    with torch.device("meta"):
        without = AutoModelForCausalLM.from_config(make_config(family), dtype=torch.float32)
    assert engram.memory_plan(LanguageModel(without, lm.tokenizer, lm.name), 5, method) == plan


def test_second_moments_are_a_matrix_of_float64_a_layer() -> None:
    lm = tiny_lm()
    plan = engram.memory_plan(lm, 1, "memit", layers=[0, 1, 2])
    (sums,) = [part.bytes for part in plan.parts if part.what.startswith("sums of k k^T")]
    assert sums == 3 * 8 * lm.parts.mlp_width(0) ** 2


def test_facts_at_once_bounds_the_values_and_nothing_else() -> None:
    lm = tiny_lm()
    few, many = (engram.memory_plan(lm, 1000, "memit", facts_per_batch=n) for n in (8, 16))
    assert many.of("values") > 1.9 * few.of("values")
    assert many.of("solve") == few.of("solve")
    assert engram.memory_plan(lm, 10, "rome").of("values") == engram.memory_plan(lm, 1, "rome").of(
        "values"
    )


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_the_edit_on_disk_is_as_large_as_its_factors(method: str) -> None:
    lm = tiny_lm()
    d, f = lm.d_model, lm.parts.mlp_width(0)
    plan = engram.memory_plan(lm, 3, method, layers=[1])
    assert plan.on_disk == 4 * 3 * (d + f)
    assert engram.memory_plan(lm, 10_000, method, layers=[1]).on_disk == 4 * d * f


def test_a_packed_weight_counts_what_it_is_packed_in() -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    lm = tiny_lm("llama")
    before = engram.memory_plan(lm).of("throughout")
    quantize_(lm.model.model.layers, Int8WeightOnlyConfig())
    assert engram.memory_plan(lm).of("throughout") < 0.6 * before


def test_what_cannot_be_planned_is_refused() -> None:
    lm = tiny_lm()
    with pytest.raises(SettingError, match="method='in-context': expected 'rome', 'memit'"):
        engram.memory_plan(lm, 1, "in-context")
    with pytest.raises(SettingError, match="n_facts=0: expected at least 1"):
        engram.memory_plan(lm, 0)
    with pytest.raises(EngramError, match="mixture of experts"):
        engram.memory_plan(tiny_lm(EXPERTS[0]))


def test_shapes_of_a_model_are_loaded_without_a_weight(tmp_path: Any) -> None:
    folder = tiny_folder(tmp_path, "llama", torch.float16)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    lm = load_shapes(folder)
    assert all(each.is_meta for each in lm.model.parameters())
    assert lm.dtype == torch.float16
    assert load_shapes(folder, dtype="float32").dtype == torch.float32
    with pytest.raises(EngramError, match="no causal language model found as 'nowhere'"):
        load_shapes("nowhere")


def test_the_command_prints_the_table() -> None:
    run = CliRunner().invoke(app, ["plan", "pocket", "--facts", "100", "--method", "memit"])
    assert run.exit_code == 0, run.output
    assert run.output.strip() == str(engram.memory_plan(load_shapes("pocket"), 100, "memit"))
    assert "peak beside the model" in run.output
    told = json.loads(CliRunner().invoke(app, ["plan", "pocket", "--json"]).output)
    assert told["peak"] > told["beside"] > 0


def test_an_edit_that_will_take_much_says_so_first(capsys: pytest.CaptureFixture[str]) -> None:
    from engram.cli import terminal

    lm = tiny_lm()
    terminal.show_plan_if_large(lm, 1, "rome", {"layer": 2})
    terminal.show_plan_if_large(lm, 1, "no method", {}, above=0)
    assert capsys.readouterr().err == ""
    terminal.show_plan_if_large(lm, 1, "rome", {"layer": 2}, above=1000)
    assert capsys.readouterr().err.strip() == str(engram.memory_plan(lm, layers=[2]))
    for method in MASS_METHODS:
        terminal.show_plan_if_large(
            lm, 40, method, {"facts_per_batch": 4, "layers": [1, 2]}, above=1000
        )
        told = capsys.readouterr().err
        assert told.strip() == str(
            engram.memory_plan(lm, 40, method, layers=[1, 2], facts_per_batch=4)
        )


MEASURE = """
import sys, threading, time
import psutil, torch
import engram
from engram.editors.second_moments.measure import SecondMoment
torch.set_num_threads(1)
lm, process = engram.load("pocket"), psutil.Process()
lm.model(torch.tensor([[1, 2, 3]]))
def peak(work):
    before, most, done = process.memory_info().rss, [0], threading.Event()
    def watch():
        while not done.is_set():
            most[0] = max(most[0], process.memory_info().rss)
            time.sleep(0.001)
    thread = threading.Thread(target=watch)
    thread.start()
    work()
    done.set()
    thread.join()
    return most[0] - before
fact = engram.Fact("Space Needle", "The {} is located in the city of", "Paris")
contexts = ["{}", *["He sings the song again. {}"] * 20]
moment = SecondMoment.from_matrix(torch.eye(1024))
text = ["The tower is located in the city of Paris, and the river runs through London. " * 40] * 40
settings = {"contexts": contexts, "steps": 2, "corpus": text, "tokens": 8192}
if sys.argv[1] == "given":
    settings["second_moments"] = {1: moment}
print(peak(lambda: engram.rewrite(lm, fact, **settings)))
"""


@pytest.mark.slow
def test_the_plan_is_within_a_factor_of_two_of_what_is_measured(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGRAM_CACHE", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "src")
    monkeypatch.setenv(
        "MALLOC_MMAP_THRESHOLD_", "65536"
    )  # what is freed goes back to the system, so growth is what is held
    measured, given = (
        int(
            subprocess.run(
                [sys.executable, "-c", MEASURE, each], capture_output=True, text=True, check=True
            ).stdout.splitlines()[-1]
        )
        for each in ("measured", "given")
    )
    plan = engram.memory_plan(engram.load("pocket"), row_tokens=18, target_tokens=1)
    assert 0.5 < plan.beside / measured < 2, (
        f"planned {plan.beside / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB"
    )
    beside = max(plan.of("values"), plan.of("solve"))
    assert 0.5 < beside / given < 2, (
        f"planned {beside / 1e6:.0f} MB with C given, measured {given / 1e6:.0f} MB"
    )

"""engram: find where a language model keeps a fact, rewrite it, and prove what else moved.

The public names; everything else may change. They are resolved when first used, so that importing
engram is light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engram.benchmark.data.build import build_counterfact
    from engram.benchmark.data.records import Dataset, Probe, Record
    from engram.benchmark.data.sources import read_dataset
    from engram.benchmark.results import Run
    from engram.benchmark.run import bench
    from engram.edit.delta import Delta
    from engram.edit.edit import Edit, compose
    from engram.edit.prompt_edit import PromptEdit
    from engram.editors.contexts import chat_contexts
    from engram.editors.memory_plan import MemoryPlan, memory_plan
    from engram.errors import EngramError
    from engram.evaluate.harness import harness
    from engram.evaluate.receipt import Receipt
    from engram.evaluate.verify import verify
    from engram.fact_files import read_facts
    from engram.facts import Fact
    from engram.knowledge.knowledge import Knowledge
    from engram.knowledge.knows import knows
    from engram.layers.card import LayerCard
    from engram.layers.choice import layer_card
    from engram.ledger import Ledger
    from engram.locate.average import AverageTrace
    from engram.locate.average_run import average_trace
    from engram.locate.lenses.lens import LogitLens, lens
    from engram.locate.lenses.memories import Memories, memories, promotes
    from engram.locate.lenses.refinement import Refinement, refinement
    from engram.locate.trace import CausalTrace
    from engram.locate.tracing import causal_trace as trace
    from engram.model.chat import chat_frame
    from engram.model.dequantise import dequantised
    from engram.model.language_model import LanguageModel
    from engram.model.loading import load
    from engram.rewriting import rewrite

__version__ = "0.1.0"

_HOMES = {  # public name -> where it lives
    "AverageTrace": "locate.average",
    "CausalTrace": "locate.trace",
    "Dataset": "benchmark.data.records",
    "Delta": "edit.delta",
    "Edit": "edit.edit",
    "EngramError": "errors",
    "Fact": "facts",
    "Knowledge": "knowledge.knowledge",
    "LanguageModel": "model.language_model",
    "LayerCard": "layers.card",
    "Ledger": "ledger",
    "LogitLens": "locate.lenses.lens",
    "Memories": "locate.lenses.memories",
    "MemoryPlan": "editors.memory_plan",
    "Probe": "benchmark.data.records",
    "PromptEdit": "edit.prompt_edit",
    "Receipt": "evaluate.receipt",
    "Record": "benchmark.data.records",
    "Refinement": "locate.lenses.refinement",
    "Run": "benchmark.results",
    "average_trace": "locate.average_run",
    "bench": "benchmark.run",
    "build_counterfact": "benchmark.data.build",
    "chat_contexts": "editors.contexts",
    "chat_frame": "model.chat",
    "compose": "edit.edit",
    "dequantised": "model.dequantise",
    "harness": "evaluate.harness",
    "knows": "knowledge.knows",
    "layer_card": "layers.choice",
    "lens": "locate.lenses.lens",
    "load": "model.loading",
    "memories": "locate.lenses.memories",
    "memory_plan": "editors.memory_plan",
    "promotes": "locate.lenses.memories",
    "read_dataset": "benchmark.data.sources",
    "read_facts": "fact_files",
    "refinement": "locate.lenses.refinement",
    "rewrite": "rewriting",
    "trace": "locate.tracing:causal_trace",
    "verify": "evaluate.verify",
}

__all__ = [
    "AverageTrace",
    "CausalTrace",
    "Dataset",
    "Delta",
    "Edit",
    "EngramError",
    "Fact",
    "Knowledge",
    "LanguageModel",
    "LayerCard",
    "Ledger",
    "LogitLens",
    "Memories",
    "MemoryPlan",
    "Probe",
    "PromptEdit",
    "Receipt",
    "Record",
    "Refinement",
    "Run",
    "__version__",
    "average_trace",
    "bench",
    "build_counterfact",
    "chat_contexts",
    "chat_frame",
    "compose",
    "dequantised",
    "harness",
    "knows",
    "layer_card",
    "lens",
    "load",
    "memories",
    "memory_plan",
    "promotes",
    "read_dataset",
    "read_facts",
    "refinement",
    "rewrite",
    "trace",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(
            f"module 'engram' has no attribute {name!r}; public names: {', '.join(__all__)}"
        )
    module, _, attribute = _HOMES[name].partition(":")
    value = getattr(import_module(f"engram.{module}"), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

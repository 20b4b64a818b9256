"""engram: find where a language model keeps a fact, rewrite it, and prove what else moved.

The public names; everything else may change. They are resolved when first used, so that importing engram is light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engram.chat import chat_contexts, chat_frame
    from engram.delta import Delta
    from engram.edit import Edit, compose
    from engram.editors import rewrite
    from engram.editors.memory_plan import MemoryPlan, memory_plan
    from engram.errors import EngramError
    from engram.evaluate.bench.results import Run
    from engram.evaluate.bench.run import bench
    from engram.evaluate.data.build import build_counterfact
    from engram.evaluate.data.records import Dataset, Probe, Record
    from engram.evaluate.data.sources import read_dataset
    from engram.evaluate.harness import harness
    from engram.evaluate.knowledge import Knowledge
    from engram.evaluate.knows import knows
    from engram.evaluate.receipt import Receipt, verify
    from engram.fact_files import read_facts
    from engram.facts import Fact
    from engram.language_model import LanguageModel, load
    from engram.layer_cards import LayerCard
    from engram.layer_choice import layer_card
    from engram.ledger import Ledger
    from engram.locate.averages import AverageTrace
    from engram.locate.causal_trace import CausalTrace
    from engram.locate.causal_trace import causal_trace as trace
    from engram.locate.experiment import average_trace
    from engram.locate.lens import LogitLens, lens
    from engram.locate.memories import Memories, memories, promotes
    from engram.locate.refinement import Refinement, refinement
    from engram.prompt_edit import PromptEdit
    from engram.quantised import dequantised

__version__ = "0.1.0"

_HOMES = {  # public name -> where it lives
    "AverageTrace": "locate.averages",
    "CausalTrace": "locate.causal_trace",
    "Dataset": "evaluate.data.records",
    "Delta": "delta",
    "Edit": "edit",
    "EngramError": "errors",
    "Fact": "facts",
    "Knowledge": "evaluate.knowledge",
    "LanguageModel": "language_model",
    "LayerCard": "layer_cards",
    "Ledger": "ledger",
    "LogitLens": "locate.lens",
    "Memories": "locate.memories",
    "MemoryPlan": "editors.memory_plan",
    "Probe": "evaluate.data.records",
    "PromptEdit": "prompt_edit",
    "Receipt": "evaluate.receipt",
    "Record": "evaluate.data.records",
    "Refinement": "locate.refinement",
    "Run": "evaluate.bench.results",
    "average_trace": "locate.experiment",
    "bench": "evaluate.bench.run",
    "build_counterfact": "evaluate.data.build",
    "chat_contexts": "chat",
    "chat_frame": "chat",
    "compose": "edit",
    "dequantised": "quantised",
    "harness": "evaluate.harness",
    "knows": "evaluate.knows",
    "layer_card": "layer_choice",
    "lens": "locate.lens",
    "load": "language_model",
    "memories": "locate.memories",
    "memory_plan": "editors.memory_plan",
    "promotes": "locate.memories",
    "read_dataset": "evaluate.data.sources",
    "read_facts": "fact_files",
    "refinement": "locate.refinement",
    "rewrite": "editors",
    "trace": "locate.causal_trace:causal_trace",
    "verify": "evaluate.receipt",
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
        raise AttributeError(f"module 'engram' has no attribute {name!r}; public names: {', '.join(__all__)}")
    module, _, attribute = _HOMES[name].partition(":")
    value = getattr(import_module(f"engram.{module}"), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

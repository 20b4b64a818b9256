"""engram: find where a language model keeps a fact, rewrite it, and prove what else moved.

It lists the public names; everything else may change. Names are imported when first used, so that
`import engram` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and the documentation; "as" marks a name as exported
    from engram.benchmark.data.build import build_counterfact as build_counterfact
    from engram.benchmark.data.records import Dataset as Dataset
    from engram.benchmark.data.records import Record as Record
    from engram.benchmark.data.sources import read_dataset as read_dataset
    from engram.benchmark.results import Run as Run
    from engram.benchmark.run import bench as bench
    from engram.edit.delta import Delta as Delta
    from engram.edit.edit import Edit as Edit
    from engram.edit.edit import compose as compose
    from engram.edit.prompt_edit import PromptEdit as PromptEdit
    from engram.editors.contexts import chat_contexts as chat_contexts
    from engram.editors.memory_plan import MemoryPlan as MemoryPlan
    from engram.editors.memory_plan import memory_plan as memory_plan
    from engram.errors import EngramError as EngramError
    from engram.evaluate.harness import harness as harness
    from engram.evaluate.probes import Probe as Probe
    from engram.evaluate.receipt import Receipt as Receipt
    from engram.evaluate.verify import verify as verify
    from engram.fact_files import read_facts as read_facts
    from engram.facts import Fact as Fact
    from engram.knowledge.knowledge import Knowledge as Knowledge
    from engram.knowledge.knows import knows as knows
    from engram.layers.card import LayerCard as LayerCard
    from engram.layers.choice import layer_card as layer_card
    from engram.ledger import Ledger as Ledger
    from engram.locate.average import AverageTrace as AverageTrace
    from engram.locate.average_run import average_trace as average_trace
    from engram.locate.lenses.lens import LogitLens as LogitLens
    from engram.locate.lenses.lens import lens as lens
    from engram.locate.lenses.memories import Memories as Memories
    from engram.locate.lenses.memories import memories as memories
    from engram.locate.lenses.memories import promotes as promotes
    from engram.locate.lenses.refinement import Refinement as Refinement
    from engram.locate.lenses.refinement import refinement as refinement
    from engram.locate.trace import CausalTrace as CausalTrace
    from engram.locate.tracing import trace as trace
    from engram.model.chat import chat_frame as chat_frame
    from engram.model.dequantise import dequantised as dequantised
    from engram.model.language_model import LanguageModel as LanguageModel
    from engram.model.loading import load as load
    from engram.rewriting import rewrite as rewrite

__version__ = "0.1.0"

_HOMES = {  # public name -> the module that defines it; a test compares it with the imports above
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
    "Probe": "evaluate.probes",
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
    "trace": "locate.tracing",
    "verify": "evaluate.verify",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(
            f"module 'engram' has no attribute {name!r}; public names: {', '.join(__all__)}"
        )
    value = getattr(import_module(f"engram.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__

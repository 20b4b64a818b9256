"""Second moments of keys: C = mean of k k^T over tokens of ordinary text, k the input of a block's
MLP output matrix.

What lies along well-filled directions of C an edit leaves alone. Measured for several layers in one
pass that stops at the deepest, in pieces that a killed run takes up again; kept in a file, and for
a while in memory, under a name made of all that it depends on. A longer measurement of the same
text goes on from a shorter one. Knows names, files and what is already there. Refuses to know how C
is measured (moment_pass) and used (moment_matrix).
Source: Meng et al. 2022, arXiv:2202.05262, Sec. 3.1 (Eq. 2) and Appendix E.4.
"""

from __future__ import annotations

import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from engram.editors.second_moments.corpora import Corpus, as_corpus
from engram.editors.second_moments.corpus_pass import MomentPass, Sums
from engram.editors.second_moments.matrix import SecondMoment, load_npz, read_tensors, write_tensors
from engram.engine.recording import base_model
from engram.errors import EngramFileError
from engram.files.cache_folder import cache_folder, sha256_of
from engram.model.language_model import LanguageModel
from engram.modules.fingerprints import fingerprints
from engram.progress import Progress, no_progress
from engram.runs.identity import identity_of
from engram.runs.workers import Workers

__all__ = ["SecondMoment", "load_npz", "second_moments"]

log = logging.getLogger(__name__)

TOKENS_PER_KEY = 20  # tokens measured by default, as a multiple of d_ff
MEMORY = (
    2 << 30
)  # bytes of second moments, with what was computed from them, that the process keeps for the next call


def second_moments(
    lm: LanguageModel,
    layers: Sequence[int],
    corpus: Corpus | str | Path | Sequence[str] | None = None,
    tokens: int | None = None,
    *,
    seed: int = 0,
    tokens_per_document: int = 1024,
    tokens_per_batch: int = 4096,
    cache_dir: str | Path | None = None,
    save_every: float = 20.0,
    workers: Workers | None = None,
    progress: Progress = no_progress,
) -> dict[int, SecondMoment]:
    """Measure C of several blocks in one pass over text, or read it where the same was measured
    before.

    The same call gives the same objects while they are in memory (2 GiB of them, those used last),
    so that a factor or an eigendecomposition is computed once. The weights that C depends on are
    hashed at every call: a changed model is measured anew.

    Args:
        layers: blocks, from 0.
        corpus: a text file, texts, or one of `corpora`; default: text that the model samples
            itself.
        tokens: how many are measured; default 20 x d_ff. Every token of a document counts, as in
            the released code. Where fewer tokens of the same text were measured before, only the
            others are run.
        seed: of sampled text.
        tokens_per_document: longer documents are cut, so that many are seen.
        tokens_per_batch: tokens in one forward pass, which bounds memory.
        cache_dir: where results are kept; default: $ENGRAM_CACHE, or ~/.cache/engram.
        workers: where the model is run; default: in this process. Sums are added in the same order
            whatever the number of workers, in other groups than without them, which changes the
            last bits of float64. Nothing is saved on the way.
        save_every: seconds between two states that an interrupted run goes on from.
        progress: called with (what is done, done, total).
    Raises:
        UnsupportedModelError: a block without a single MLP output matrix; EngramError: a corpus
            without text;
        NonFiniteError: keys that are not finite.
    """
    wanted = sorted(set(layers))
    for layer in wanted:
        lm.parts.mlp_out_name(layer)  # says why, where there is none
    tokens = tokens or TOKENS_PER_KEY * max(lm.parts.mlp_width(layer) for layer in wanted)
    chosen = as_corpus(corpus, seed)
    source = {"corpus": chosen.digest(), "tokens_per_document": tokens_per_document}
    folder = cache_folder("second_moments", cache_dir)
    stems = _names(lm, wanted, source)
    paths = {layer: folder / f"{stems[layer]}-{tokens}.safetensors" for layer in wanted}
    found = {layer: _read(path) for layer, path in paths.items() if path.exists()}
    missing = [layer for layer in wanted if layer not in found]
    if missing:
        partial = folder / f"{sha256_of(*(paths[layer].stem for layer in missing))}.partial"
        sums = _begun(partial) or _earlier(
            folder, {layer: stems[layer] for layer in missing}, tokens
        )
        run = MomentPass(
            lm, sums or Sums.nothing(lm, missing), tokens, tokens_per_document, tokens_per_batch
        )
        pause = _every(save_every, partial)
        sums = (
            run.go(chosen, progress, pause)
            if workers is None
            else run.spread(chosen, workers, progress)
        )
        about = {**source, "tokens": tokens, "documents": sums.documents, "offset": sums.offset}
        for layer in missing:
            found[layer] = SecondMoment(sums.mean(layer), sums.count, about, paths[layer])
            found[layer].save(paths[layer])
            _remember(paths[layer], found[layer])
        partial.unlink(missing_ok=True)
    return {layer: found[layer] for layer in layers}


# file, its time and its size -> what is in it; the one used last at the end
_MEMORY: OrderedDict[tuple[str, int, int], SecondMoment] = OrderedDict()


def _read(path: Path) -> SecondMoment:
    """What is in a file of the cache, from memory where it was read before and is still the same
    file.
    """
    moment = _MEMORY.get(_version(path)) or replace(SecondMoment.load(path), file=path)
    _remember(path, moment)
    return moment


def _remember(path: Path, moment: SecondMoment) -> None:
    _MEMORY[_version(path)] = moment
    _MEMORY.move_to_end(_version(path))
    while (
        sum(each.nbytes for each in _MEMORY.values()) > MEMORY
    ):  # what they hold has grown since, so all are counted anew
        _MEMORY.popitem(last=False)


def _version(path: Path) -> tuple[str, int, int]:
    about = path.stat()
    return str(path), about.st_mtime_ns, about.st_size


def _begun(partial: Path) -> Sums | None:
    """The state that an interrupted run left."""
    if not partial.exists():
        return None
    try:
        totals, about = read_tensors(partial, "engram.partial")
    except EngramFileError as error:
        log.warning("%s; measuring from the start", error)
        return None
    log.info("going on after %d tokens", about["count"])
    return Sums({int(layer): total for layer, total in totals.items()}, **about)


def _every(seconds: float, partial: Path) -> Callable[[Sums], None]:
    """Writes down the state of a run, not more often than that."""
    written = time.monotonic()

    def pause(sums: Sums) -> None:
        nonlocal written
        if time.monotonic() - written > seconds:
            totals = {str(layer): total for layer, total in sums.totals.items()}
            place = {"count": sums.count, "documents": sums.documents, "offset": sums.offset}
            write_tensors(partial, totals, "engram.partial", place)
            written = time.monotonic()

    return pause


def _earlier(folder: Path, stems: Mapping[int, str], tokens: int) -> Sums | None:
    """The sums of the longest measurement of fewer tokens of the same text that all these layers
    have.
    """
    counts = [
        {int(path.stem.rpartition("-")[2]) for path in folder.glob(f"{stem}-*.safetensors")}
        for stem in stems.values()
    ]
    shorter = [count for count in set.intersection(*counts) if count < tokens]
    if not shorter:
        return None
    try:
        moments = {
            layer: SecondMoment.load(folder / f"{stem}-{max(shorter)}.safetensors")
            for layer, stem in stems.items()
        }
    except EngramFileError as error:
        log.warning("%s; measuring from the start", error)
        return None
    log.info("going on from the second moments of %d tokens", max(shorter))
    (about,) = {(m.count, m.source["documents"], m.source["offset"]) for m in moments.values()}
    return Sums(
        {layer: moment.matrix_ff.mul_(moment.count) for layer, moment in moments.items()}, *about
    )


def _names(lm: LanguageModel, layers: Sequence[int], source: Mapping[str, Any]) -> dict[int, str]:
    """Names everything that C of each layer depends on but the number of tokens: weights up to the
    matrix itself, tokenizer, text.
    """
    prints = _fingerprints(lm, max(layers))
    names = {}
    for layer in layers:
        unseen = (*_blocks_above(lm, layer), f"{lm.parts.mlp_out_name(layer)}.")
        reached = {name: each for name, each in prints.items() if not name.startswith(unseen)}
        names[layer] = identity_of(lm, reached, json.dumps([source, layer], sort_keys=True))
    return names


def _fingerprints(lm: LanguageModel, deepest: int) -> dict[str, str]:
    """Hashes of what a pass to the deepest layer reads: not of the blocks above it, nor of the
    unembedding.
    """
    home = next(name for name, module in lm.model.named_modules() if module is base_model(lm))
    above = _blocks_above(lm, deepest)
    return fingerprints(
        lm.model,
        lambda name: name.startswith(f"{home}." if home else "") and not name.startswith(above),
    )


def _blocks_above(lm: LanguageModel, layer: int) -> tuple[str, ...]:
    return tuple(f"{lm.parts.block_name(above)}." for above in range(layer + 1, lm.n_layers))

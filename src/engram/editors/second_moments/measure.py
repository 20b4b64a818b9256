"""Second moments of keys, C = mean of k k^T over tokens of ordinary text, measured or read from a
cache; k is the input of a block's MLP output matrix.

An edit changes little along directions in which C is large. Several layers are measured in one pass
that stops at the deepest. Results are kept in files, and for a while in memory, under names made of
all that they depend on; a killed pass resumes, and a longer measurement of the same text continues
a shorter one.

    <weights before the matrix, tokenizer, text, layer>-<tokens>.safetensors    C of one layer
    <all missing layers of a call>.partial                                      unfinished sums

Unfinished sums have a safetensors file, and not a run file (files/run_file.py) as elsewhere: they
are always replaced as a whole, and d_ff^2 float64 numbers (75 MB to 1.6 GB a layer) are too much
for the rows of a database.

Knows names, files and what is measured already. Refuses to know how C is measured (corpus_pass.py)
and used (matrix.py).
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
from typing import Annotated, Any

from annotated_types import Ge
from typing_extensions import TypedDict

from engram.editors.second_moments.corpora import Corpus, SampledText, as_corpus
from engram.editors.second_moments.corpus_pass import NAME, MomentPass, Sums
from engram.editors.second_moments.matrix import WHAT, SecondMoment, load_npz
from engram.engine.recording import base_model
from engram.errors import EngramFileError
from engram.files.cache_folder import cache_folder, sha256_of, written_if_possible
from engram.model.language_model import LanguageModel
from engram.model.pace import seconds_per_token
from engram.modules.fingerprints import fingerprints
from engram.modules.tensor_files import read_tensors, write_tensors
from engram.progress import Progress, Work, announce, no_progress
from engram.runs.identity import identity_of
from engram.runs.workers import Workers

__all__ = ["SecondMoment", "load_npz", "second_moments"]

log = logging.getLogger(__name__)

TOKENS_PER_KEY = 20  # tokens measured by default, as a multiple of d_ff
MEMORY = 2 << 30  # bytes of second moments, factors included, that the process keeps


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
    """Measure C of several blocks in one pass over text, or read it where it was measured before.

    The same call returns the same objects while they are in memory (2 GiB of them, those used
    last), so that a factor or an eigendecomposition is computed once. The weights that C depends on
    are hashed at every call: a changed model is measured again.

    Args:
        layers: blocks, from 0.
        corpus: a name of `corpora.CORPORA`, a text file, texts, or a corpus; default: "wikipedia".
        tokens: number of tokens measured; default 20 x d_ff, or all that the
            corpus has. Every token of a document counts, as
            in the released code. Where fewer tokens of the same text were measured before, only the
            others are run.
        seed: of the text, where it is drawn.
        tokens_per_document: longer documents are cut, so that more documents contribute.
        tokens_per_batch: tokens in one forward pass; bounds memory.
        cache_dir: folder for results; default: $ENGRAM_CACHE, or ~/.cache/engram.
        workers: where the model runs; default: in this process. The number of workers changes no
            bit; without workers, sums have other groups, and the last bits of float64 differ.
            Workers do not save unfinished passes.
        save_every: seconds between two saved states of an unfinished pass.
        progress: called with (what is done, done, total).
    Returns:
        layer -> C.
    Raises:
        UnsupportedModelError: a block without a single MLP output matrix; EngramError: a corpus
            without text;
        NonFiniteError: keys that are not finite.
    Example:
        >>> from engram.editors.second_moments.measure import second_moments
        >>> moment = second_moments(lm, [2], "bundled", tokens=2000)[2]
        >>> moment.count, moment.matrix_ff.shape
        (2000, torch.Size([1024, 1024]))
    """
    measured = sorted(set(layers))
    for layer in measured:
        lm.parts.mlp_out_name(layer)  # raises with the reason where there is none
    asked, tokens = (
        tokens,
        tokens or TOKENS_PER_KEY * max(lm.parts.mlp_width(layer) for layer in measured),
    )
    text = as_corpus(corpus, seed)
    source = {"corpus": text.digest(), "tokens_per_document": tokens_per_document}
    folder = cache_folder("second_moments", cache_dir)
    stems = _names(lm, measured, source)
    paths = {layer: folder / f"{stems[layer]}-{tokens}.safetensors" for layer in measured}
    moments = {}
    for layer, path in paths.items():
        if (moment := _read(path, lm.parts.mlp_width(layer))) is not None:
            moments[layer] = moment
    missing = [layer for layer in measured if layer not in moments]
    if missing:
        # named by all that is missing: another set of layers is another pass
        partial = folder / f"{sha256_of(*(paths[layer].stem for layer in missing))}.partial"
        widths = {layer: lm.parts.mlp_width(layer) for layer in missing}
        sums = _unfinished(partial, widths)
        sums = sums or _shorter(folder, {layer: stems[layer] for layer in missing}, tokens, widths)
        sums = sums or Sums.zero(lm, missing)
        work = _work(lm, sums, tokens, text, seconds_per_token(lm, progress))
        work.kept = f"kept in {folder}; a stopped measurement is resumed"
        announce(progress, work)
        corpus_pass = MomentPass(lm, sums, tokens, tokens_per_document, tokens_per_batch, work)
        if workers is None:
            sums = corpus_pass.run(text, progress, _every(save_every, partial))
        else:
            sums = corpus_pass.run_on(workers, text, progress)
        if asked and sums.count < asked:
            log.warning("the corpus ended after %d of %d tokens", sums.count, asked)
        about = {**source, "tokens": tokens, "documents": sums.documents, "offset": sums.offset}
        for layer in missing:
            moments[layer] = SecondMoment(sums.mean(layer), sums.count, about, paths[layer])
            with written_if_possible(folder):
                moments[layer].save(paths[layer])
                _remember(paths[layer], moments[layer])
            work.did("files")
        progress(NAME, tokens, tokens)
        with written_if_possible(folder):
            partial.unlink(missing_ok=True)
    return {layer: moments[layer] for layer in layers}


# (file, its time and its size) -> its contents; the one used last is at the end
_MEMORY: OrderedDict[tuple[str, int, int], SecondMoment] = OrderedDict()


def _read(path: Path, width: int) -> SecondMoment | None:
    """Return a cached file's moment, from memory where the same file was read before; None where
    there is none, or a damaged one.
    """
    try:
        moment = _MEMORY.get(_version(path)) or replace(SecondMoment.load(path), file=path)
        if len(moment.matrix_ff) != width:
            raise EngramFileError(f"{path} is not {WHAT} of [{width}, {width}]")
        _remember(path, moment)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (EngramFileError, OSError) as error:
        log.warning("%s; measuring it again", error)
        return None
    return moment


def _remember(path: Path, moment: SecondMoment) -> None:
    _MEMORY[_version(path)] = moment
    _MEMORY.move_to_end(_version(path))
    # all are counted every time, since factors and eigenvectors make them grow after they came
    while sum(moment.nbytes for moment in _MEMORY.values()) > MEMORY:
        _MEMORY.popitem(last=False)


def _version(path: Path) -> tuple[str, int, int]:
    stat = path.stat()
    return str(path), stat.st_mtime_ns, stat.st_size


class _PartialForm(TypedDict):
    count: Annotated[int, Ge(1)]
    documents: Annotated[int, Ge(0)]
    offset: Annotated[int, Ge(0)]


def _unfinished(partial: Path, widths: Mapping[int, int]) -> Sums | None:
    """Return the sums that an interrupted pass saved.

    Args:
        widths: layer -> d_ff of the layers that are to be measured.
    """
    about: _PartialForm
    try:
        if not partial.exists():
            return None
        totals, about = read_tensors(partial, "engram.partial", _PartialForm, "a state of a pass")
        if {name: total.shape for name, total in totals.items()} != {
            str(layer): (width, width) for layer, width in widths.items()
        }:
            raise EngramFileError(f"{partial} has sums of other layers")
    except (EngramFileError, OSError) as error:
        log.warning("%s; measuring from the start", error)
        return None
    log.info("resuming after %d tokens", about["count"])
    place = (about["count"], about["documents"], about["offset"])
    return Sums({int(layer): total for layer, total in totals.items()}, *place)


def _work(lm: LanguageModel, sums: Sums, tokens: int, corpus: Corpus, pace: float) -> Work:
    """Return what is left to do, with guesses; `pace` is the seconds of a token of a forward pass.

    For example, of 30,720 tokens of a model with 30 layers: 30,720 tokens are sampled, one step
    after another (guess: 1.5 x `pace` each), and run; k k^T adds a third to each. Then 30 files are
    written.
    """
    left, widths = tokens - sums.count, [lm.parts.mlp_width(layer) for layer in sums.totals]
    work = Work(NAME, f"measuring {NAME} of {len(widths)} layers on {left:,} tokens")
    # Documents, of which a batch is sampled at once. A tenth of their tokens is lost when the text
    # is encoded again, by a guess that the pass corrects.
    length, step, lot = 1000.0, 1e-3 * pace, 0
    if isinstance(corpus, SampledText):
        length, step, lot = 0.9 * corpus.tokens, 1.5 * pace, corpus.rows_per_batch
    work.expect("text", left / length, length * step, lot)
    weights = sum(p.numel() for p in lm.model.parameters()) or 1
    products = sum(width**2 for width in widths) / (2 * weights)
    work.expect("passes", left, (1 + products) * pace)
    work.expect("files", len(widths), max(widths) ** 2 * 1e-7)  # 0.1 s for d_ff = 1024
    return work


def _every(seconds: float, partial: Path) -> Callable[[Sums], None]:
    """Return a function that saves a pass's sums, not more often than that."""
    written = time.monotonic()

    def pause(sums: Sums) -> None:
        nonlocal written
        if time.monotonic() - written > seconds:
            totals = {str(layer): total for layer, total in sums.totals.items()}
            place = {"count": sums.count, "documents": sums.documents, "offset": sums.offset}
            with written_if_possible(partial.parent):
                write_tensors(partial, totals, "engram.partial", place)
            written = time.monotonic()  # after the write, so that a slow disk is not always busy

    return pause


def _shorter(
    folder: Path, stems: Mapping[int, str], tokens: int, widths: Mapping[int, int]
) -> Sums | None:
    """Return the sums of the longest measurement with fewer tokens of the same text that all these
    layers have.
    """
    counts = []
    for stem in stems.values():
        ends = (path.stem.rpartition("-")[2] for path in folder.glob(f"{stem}-*.safetensors"))
        counts.append({int(end) for end in ends if end.isdecimal()})
    shorter = [count for count in set.intersection(*counts) if count < tokens]
    if not shorter:
        return None
    paths = {layer: folder / f"{stem}-{max(shorter)}.safetensors" for layer, stem in stems.items()}
    moments = {layer: _read(path, widths[layer]) for layer, path in paths.items()}
    found = {layer: moment for layer, moment in moments.items() if moment is not None}
    # one pass measured all layers, so they agree on where in the corpus it stopped
    places = {(m.count, m.source.get("documents"), m.source.get("offset")) for m in found.values()}
    count, documents, offset = places.pop() if places else (0, None, None)
    if len(found) < len(moments) or places or type(documents) is not int or type(offset) is not int:
        log.warning("the second moments of %d tokens: measuring from the start", max(shorter))
        return None
    log.info("continuing the second moments of %d tokens", max(shorter))
    return Sums(
        {layer: moment.matrix_ff * count for layer, moment in found.items()},
        count,
        documents,
        offset,
    )


def _names(lm: LanguageModel, layers: Sequence[int], source: Mapping[str, Any]) -> dict[int, str]:
    """Return a name for each layer's C, of all that it depends on but the number of tokens: the
    weights before the matrix itself, the tokenizer, the text.

    Of layer 2, weights of blocks 0 and 1 count, and of block 2 all but the MLP output matrix: so an
    edit at layer 2 leaves C of layers 0 to 2 valid, and changes the names of those above.
    """
    prints = _fingerprints(lm, max(layers))
    # hashed once for the deepest layer; each layer's name takes its part of them
    names = {}
    for layer in layers:
        after = (*_blocks_above(lm, layer), f"{lm.parts.mlp_out_name(layer)}.")
        before = {name: hash_ for name, hash_ in prints.items() if not name.startswith(after)}
        names[layer] = identity_of(lm, before, json.dumps([source, layer], sort_keys=True))
    return names


def _fingerprints(lm: LanguageModel, deepest: int) -> dict[str, str]:
    """Return hashes of the weights that a pass to the deepest layer reads: without the blocks above
    it and the unembedding.
    """
    root = next(name for name, module in lm.model.named_modules() if module is base_model(lm))
    above = _blocks_above(lm, deepest)
    return fingerprints(
        lm.model,
        lambda name: name.startswith(f"{root}." if root else "") and not name.startswith(above),
    )


def _blocks_above(lm: LanguageModel, layer: int) -> tuple[str, ...]:
    return tuple(f"{lm.parts.block_name(above)}." for above in range(layer + 1, lm.n_layers))

"""GGUF files, dequantised once into an ordinary checkpoint that everything else reads.

The checkpoint (config, tokenizer, weights in float32) is kept in the cache by the file's sha256, so
that a file is unpacked once, whatever it is called. Every layer of a GGUF is read by transformers;
what it drops or reads otherwise than llama.cpp without a word is an error or put right here.
Knows the header, transformers' reader and the cache. Refuses to know what a folder is used for.
"""

from __future__ import annotations

import copy
import hashlib
import io
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any

from engram.checks import briefly
from engram.errors import EngramError, EngramFileError, MissingExtraError, UnsupportedModelError
from engram.files.atomic import atomic_folder, reserved
from engram.files.cache_folder import cache_folder
from engram.files.names import open_regular
from engram.model.gguf_header import GgufHeader, is_gguf, read_header

log = logging.getLogger(__name__)

_VERSION = 1  # of what is written; a change of it makes every file be unpacked again
_LINK = "model.gguf"
_WAIT_S = 3600.0  # for another process that unpacks the same file
# Positions scaled for long contexts, as llama.cpp takes them; no weights of the model.
_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
# `tokenizer.ggml.pre` of vocabularies that take every digit for itself. transformers splits them as
# GPT-2 does, which differs after several spaces or lines: "\n\n1" is then three tokens, not two.
_DIGITS_APART = {"codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder"}
_AS_GPT2 = {"default", "gpt-2", "gpt2", "jais", "mpt", "olmo", "phi-2"}


@contextmanager
def checkpoint_of(path: str, *, weights: bool = True) -> Iterator[str]:
    """Give what transformers loads for a path: of a GGUF file its dequantised folder, any other
    path as it is.

    Args:
        weights: whether the folder has to have weights; without, nothing is dequantised for it.
    Raises:
        EngramError: see `dequantised`.
    """
    if not is_gguf(path):
        yield path
        return
    with (dequantised if weights else _small_files)(Path(path)) as folder:
        yield str(folder)


@contextmanager
def dequantised(path: Path) -> Iterator[Path]:
    """Give the folder of a checkpoint with a GGUF file's weights, dequantised into float32.

    The first call writes it into the cache; where that cannot be written, into a temporary folder
    that lasts as long as the block.

    Raises:
        EngramFileError: no GGUF, damaged, or not what its header says.
        UnsupportedModelError: an architecture that transformers cannot read from GGUF.
        MissingExtraError: the package `gguf` is not installed.
    """
    home = _home(path)
    with ExitStack() as stack:
        if not home.is_dir():
            gguf = _Gguf(path)
            needs = gguf.size  # reads the header: outside of `try`, which is about the cache
            try:
                stack.enter_context(reserved(home, folder=True, needs=needs, wait=_WAIT_S))
            except EngramError as error:
                # unless another process wrote it since we looked
                if not home.is_dir():
                    log.warning("%s; %s is dequantised for this time only", error, path)
                    home = Path(stack.enter_context(TemporaryDirectory(prefix="engram-"))) / "model"
            if not home.is_dir():
                with atomic_folder(home) as fresh:
                    gguf.write(fresh)
        yield home


@contextmanager
def _small_files(path: Path) -> Iterator[Path]:
    """Give a folder with the config and the tokenizer of a GGUF file; with weights if they are in
    the cache already.

    Raises:
        EngramError: see `dequantised`.
    """
    if (home := _home(path)).is_dir():
        yield home
        return
    with TemporaryDirectory(prefix="engram-") as folder:
        _Gguf(path).write(Path(folder), weights=False)
        yield Path(folder)


def is_kept(path: str | Path) -> bool:
    """Return whether a GGUF file was dequantised before and is in the cache."""
    return _home(Path(path)).is_dir()


def _home(path: Path) -> Path:
    """Return where the folder of a GGUF file is kept."""
    if not path.exists():
        raise EngramFileError(f"{path} does not exist; expected a GGUF file")
    with open_regular(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()  # 0.1 s for 100 MB
    return cache_folder("gguf") / f"{digest}-{_VERSION}"


@dataclass(frozen=True)
class _Gguf:
    """A file that is to be unpacked."""

    path: Path

    @cached_property
    def header(self) -> GgufHeader:
        try:
            from gguf.constants import GGML_QUANT_SIZES
        except ImportError:
            raise MissingExtraError("gguf", "gguf") from None
        header = read_header(self.path, {int(kind): two for kind, two in GGML_QUANT_SIZES.items()})
        kind = header.fields.get("general.type", "model")
        if kind != "model":
            raise EngramFileError(
                f"{self.path} has general.type={briefly(kind)}; expected a model. An adapter is "
                "used on the model that it was made for"
            )
        for name in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.tokens"):
            if not header.fields.get(name, ""):
                raise EngramFileError(
                    f"{self.path} has no {name}; expected a GGUF file that llama.cpp's converter "
                    "wrote, with a tokenizer"
                )
        if (parts := header.fields.get("split.count", 1)) != 1:
            raise EngramFileError(
                f"{self.path} is one of {parts} parts; merge them first with llama-gguf-split "
                "--merge"
            )
        return header

    @property
    def numbers(self) -> int:
        """Return how many weights there are."""
        return sum(one.numel for one in self.header.tensors if one.name not in _FACTORS)

    @property
    def size(self) -> int:
        """Return about how many bytes the folder takes."""
        return 4 * self.numbers

    def write(self, folder: Path, *, weights: bool = True) -> None:
        """Write the checkpoint into an empty folder."""
        from engram.model.quiet import quietly

        self.header  # noqa: B018  the file is checked before transformers opens it
        link = folder / _LINK
        # Of the folder where the file is, transformers would read other files too.
        link.symlink_to(self.path.resolve())
        try:
            # its own reader draws a bar besides those that `quietly` stops
            with quietly(), redirect_stderr(io.StringIO()):
                config, tokenizer = self._config(folder), self._tokenizer(folder)
                self._check(config, tokenizer)
                if weights:
                    self._write_weights(folder, config)
                else:
                    config.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
        except (EngramError, MemoryError):
            raise
        except Exception as error:  # its parsers raise errors of every kind
            raise self._unreadable(error) from error
        finally:
            link.unlink()

    def _unreadable(self, error: Exception) -> EngramError:
        reason = shorten(str(error), 200, placeholder=" ...").rstrip(".")
        if "not supported" in reason:
            return UnsupportedModelError(
                f"{self.path} is a GGUF file of the architecture "
                f"{briefly(self.header.architecture)}, which transformers does not read; expected "
                "one of llama, qwen2, gemma and others, or a folder that transformers saved"
            )
        return EngramFileError(
            f"{self.path} cannot be dequantised: {type(error).__name__}: {reason}. Expected a GGUF "
            "file that llama.cpp's converter wrote; download it again"
        )

    def _config(self, folder: Path) -> Any:
        import torch
        from transformers import AutoConfig, PreTrainedConfig

        from engram.model.checkpoint_files import check_config

        # Not AutoConfig.from_pretrained: the file would be parsed once more, in two seconds.
        stored, _ = PreTrainedConfig.get_config_dict(folder, gguf_file=_LINK)
        stored.pop("quantization_config", None)
        check_config(stored, f"the header of {self.path}")
        config = AutoConfig.for_model(**stored)
        config.dtype = torch.float32
        return config

    def _tokenizer(self, folder: Path) -> Any:
        from tokenizers import pre_tokenizers
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_LINK)
        backend = tokenizer.backend_tokenizer
        split = str(self.header.fields.get("tokenizer.ggml.pre", "default"))
        if split in _DIGITS_APART:
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Digits(individual_digits=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            )
        elif isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel) and split not in _AS_GPT2:
            log.warning(
                "%s has a tokenizer of the kind %s, which transformers does not know: texts are "
                "split as GPT-2 splits them; numbers and lines may become other tokens",
                self.path,
                briefly(split),
            )
        return tokenizer

    def _check(self, config: Any, tokenizer: Any) -> None:
        from engram.model.config_limits import check_sizes, check_tokenizer

        check_sizes(config, len(self.header.tensors), f"the header of {self.path}")
        check_tokenizer(tokenizer, config, str(self.path))
        if factors := {one.name for one in self.header.tensors} & set(_FACTORS):
            log.warning(
                "%s scales positions by %s, which transformers does not read: texts of thousands "
                "of tokens are read less well than by llama.cpp",
                self.path,
                ", ".join(sorted(factors)),
            )

    def _write_weights(self, folder: Path, config: Any) -> None:
        import torch
        import transformers

        from engram.model.config_limits import check_tables
        from engram.model.whole_weights import check_finite, check_names
        from engram.modules.layouts import AUTO_CLASSES
        from engram.modules.resolve import kind_of

        model_class = getattr(transformers, AUTO_CLASSES[kind_of(config)])
        with torch.device("meta"):
            plain = model_class.from_config(config, dtype=torch.float32)
        check_tables(plain, f"the header of {self.path}")
        # transformers drops tensors that it has no place for, such as biases of a Llama's queries,
        # and makes up those that are missing, in any size that the header names.
        wanted = sum(weight.numel() for weight in plain.parameters())
        if wanted != self.numbers:
            raise EngramFileError(
                f"{self.path} holds {self.numbers:,} weights, and a model of the architecture "
                f"{briefly(self.header.architecture)} of its header's sizes has {wanted:,}; "
                "expected as many. Weights are missing or have no place; download it again, or "
                "load the model from a folder that transformers saved"
            )
        how = {}
        if packed := getattr(transformers, "GgufConfig", None):  # not there before 5.2
            how["quantization_config"] = packed(dequantize=True)
        model, info = model_class.from_pretrained(
            folder,
            gguf_file=_LINK,
            config=copy.deepcopy(config),
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `check_names` lists them
            **how,
        )
        check_names(info, str(self.path))
        check_finite(model, str(self.path))
        # A model from GGUF refuses to be saved; its tensors in a model of the config do not.
        plain.load_state_dict(model.state_dict(), assign=True)
        plain.tie_weights()
        plain.save_pretrained(folder)

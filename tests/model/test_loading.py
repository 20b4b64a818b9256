"""What is loaded is what was asked for, or an error of one line."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from transformers.utils import logging as reports

import engram
from engram import pocket
from engram.edit.safetensors_layout import tensor_locations
from engram.errors import EngramError, EngramFileError, NonFiniteError, SettingError
from engram.model import loading
from engram.model.load_settings import check_device_map
from engram.model.loading import load_shapes
from engram.runs.workers import ByName
from tests.helpers.tiny import EVERY, make_model, mostly_slow, tiny_folder


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models"), "gpt2")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """Return a checkpoint to damage."""
    return Path(shutil.copytree(original, tmp_path / "model"))


def configured(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def reweighted(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    change(weights)
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})


def refused(
    folder: Path | str, match: str, error: type[EngramError] = EngramError, **settings: Any
) -> None:
    with pytest.raises(error, match=match) as caught:
        engram.load(folder, **settings)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("family", mostly_slow(EVERY))
def test_every_family_is_loaded_to_the_last_bit(family: str, tmp_path: Path) -> None:
    folder, wanted = tiny_folder(tmp_path, family), make_model(family).state_dict()
    got = engram.load(folder).model.state_dict()
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert load_shapes(folder).model.state_dict().keys() == wanted.keys()


# --- the weights are those of the config


WEIGHTS: dict[str, tuple[dict[str, Any], str]] = {
    "more layers": ({"n_layer": 6}, r"files lack: transformer\.h\.4\..* and 21 more"),
    "fewer layers": ({"n_layer": 3}, r"no place for: .*h\.3\..* and 8 more"),
    "wider": ({"n_embd": 64}, r"other shapes: .*\(32 x 96 in the file, 64 x 192 in the config\)"),
    "more words": ({"vocab_size": 321}, r"wte\.weight \(320 x 32 in the file, 321 x 32"),
    "a billion words": ({"vocab_size": 10**9}, r"320 x 32 in the file, 1000000000 x 32"),
    "a billion positions": ({"n_positions": 10**9}, r"wpe\.weight \(128 x 32"),
    "wider inside": ({"n_inner": 64}, r"mlp\.c_fc\.bias \(48 in the file, 64 in the config\)"),
    "another family": ({"model_type": "llama"}, r"lack: .*; the files have weights"),
    "words not tied": ({"tie_word_embeddings": False}, r"files lack: lm_head\.weight"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_a_config_of_another_model_is_refused_with_the_names(case: str, folder: Path) -> None:
    changes, match = WEIGHTS[case]
    configured(folder, **changes)
    refused(folder, f"config.json of .*{match}.*download the checkpoint again", EngramFileError)
    with pytest.raises(EngramFileError, match=match):
        load_shapes(folder)


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(folder: Path) -> None:
    shutil.copy(pocket.PATH / "tokenizer.json", folder / "tokenizer.json")
    refused(folder, r"tokenizer of .* knows \d+ tokens and config.json has vocab_size=320")
    with pytest.raises(EngramFileError, match="vocab_size=320"):
        load_shapes(folder)


def test_a_missing_and_an_unknown_weight_are_refused(folder: Path) -> None:
    def renamed(weights: dict[str, torch.Tensor]) -> None:
        weights["transformer.h.1.ln_1.wait"] = weights.pop("transformer.h.1.ln_1.weight")

    reweighted(folder, renamed)
    refused(folder, r"lack: \S*h\.1\.ln_1\.weight; \S.*no place for: \S*h\.1\.ln_1\.wait")


def test_a_setting_that_changes_the_config_has_to_fit_the_weights_too(folder: Path) -> None:
    refused(folder, "no place for", n_layer=2)
    assert engram.load(folder, attn_pdrop=0.5).model.config.attn_pdrop == 0.5


UNUSED: dict[str, tuple[str, dict[str, tuple[int, ...]]]] = {
    # family -> tensors that checkpoints of the hub have beside the weights
    "gpt2": ("gpt2", {"h.0.attn.bias": (1, 1, 128, 128), "h.0.attn.masked_bias": ()}),
    "gpt_neo": (
        "gpt_neo",
        {"transformer.h.0.attn.attention.bias": (1, 1, 8, 8), "score.weight": (2, 32)},
    ),
    "gptj": ("gptj", {"transformer.h.1.attn.masked_bias": (), "v_head.summary.bias": (1,)}),
    "gpt_neox": ("gpt_neox", {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": (4,)}),
    "llama": ("llama", {"model.layers.3.self_attn.rotary_emb.inv_freq": (4,)}),
    "bert": (
        "bert",
        {
            "bert.pooler.dense.weight": (32, 32),
            "cls.seq_relationship.bias": (2,),
            "bert.embeddings.position_ids": (1, 128),
        },
    ),
    "roberta": ("roberta", {"roberta.pooler.dense.bias": (32,)}),
    "bart": ("bart", {"model.encoder.version": (1,)}),
    "t5": (
        "t5",
        {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": (32, 4)},
    ),
    "qwen3": ("qwen3", {"mtp.layers.0.input_layernorm.weight": (32,)}),
}


@pytest.mark.parametrize("case", UNUSED)
def test_tables_and_other_heads_of_released_checkpoints_do_not_matter(
    case: str, tmp_path: Path
) -> None:
    family, more = UNUSED[case]
    folder = tiny_folder(tmp_path, family)
    plain = engram.load(folder).model.state_dict()
    reweighted(folder, lambda w: w.update({n: torch.ones(size) for n, size in more.items()}))
    got = engram.load(folder).model.state_dict()
    assert all(torch.equal(got[name], plain[name]) for name in plain)


def test_names_without_the_base_models_prefix_are_known(folder: Path) -> None:
    plain = engram.load(folder).model.state_dict()

    def bare(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            weights[name.removeprefix("transformer.")] = weights.pop(name)

    reweighted(folder, bare)  # as GPT-2 is released
    got = engram.load(folder).model.state_dict()
    assert all(torch.equal(got[name], plain[name]) for name in plain)


def test_old_names_of_norms_are_known(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "bert")
    plain = engram.load(folder).model.state_dict()

    def old(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            new = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            weights[new.replace("LayerNorm.bias", "LayerNorm.beta")] = weights.pop(name)

    reweighted(folder, old)  # as BERT is released
    got = engram.load(folder).model.state_dict()
    assert all(torch.equal(got[name], plain[name]) for name in plain)


def test_a_weight_under_two_names_is_refused(folder: Path) -> None:
    def twice(weights: dict[str, torch.Tensor]) -> None:
        weights["h.0.ln_1.weight"] = 2 * weights["transformer.h.0.ln_1.weight"]

    reweighted(folder, twice)
    refused(folder, r"h\.0\.ln_1\.weight and \S*h\.0\.ln_1\.weight of .* are one weight")


def test_whole_numbers_for_a_weight_are_refused(folder: Path) -> None:
    def rounded(weights: dict[str, torch.Tensor]) -> None:
        weights["h.0.ln_1.bias"] = weights.pop("transformer.h.0.ln_1.bias").to(torch.int8)

    reweighted(folder, rounded)
    refused(folder, r"^h\.0\.ln_1\.bias of .* is stored as I8; expected floating point")


# --- the numbers are finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["transformer.h.2.mlp.c_proj.weight", "transformer.wte.weight"])
def test_a_weight_that_is_not_finite_is_refused_by_its_name(
    value: float, name: str, folder: Path
) -> None:
    reweighted(folder, lambda weights: weights[name][3].fill_(value))
    refused(folder, rf"^{name} of .* holds 32 numbers that are NaN or infinite", NonFiniteError)


def test_numbers_too_large_for_the_dtype_are_refused(folder: Path) -> None:
    reweighted(folder, lambda weights: weights["transformer.ln_f.weight"].fill_(7e4))
    assert engram.load(folder).dtype == torch.float32
    refused(folder, "infinite in float16.*dtype='float32'", NonFiniteError, dtype="float16")


def test_a_sum_that_overflows_is_no_fault(folder: Path) -> None:
    reweighted(folder, lambda weights: weights["transformer.ln_f.weight"].fill_(3e38))
    engram.load(folder)


def offloaded_to(folder: Path) -> dict[str, Any]:
    """Return settings that put two of four blocks on the disk."""
    places: dict[str, Any] = {f"transformer.h.{i}": "cpu" if i < 2 else "disk" for i in range(4)}
    names = ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head")
    places |= dict.fromkeys(names, "cpu")
    return {"device_map": places, "offload_folder": folder / "offloaded"}


def test_a_weight_that_is_offloaded_is_checked_too(folder: Path, tmp_path: Path) -> None:
    reweighted(folder, lambda weights: weights["transformer.h.3.ln_1.bias"].fill_(float("nan")))
    match = r"^transformer\.h\.3\.ln_1\.bias of"
    refused(folder, match, NonFiniteError, **offloaded_to(tmp_path))


def test_every_weight_is_checked_and_a_tied_one_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Offloaded weights are in memory one module after another: one may get the id of another.
    labels: list[str] = []
    monkeypatch.setattr(
        "engram.model.whole_weights.check_numbers",
        lambda tensor, name: labels.append(name.partition(" of ")[0]),
    )
    lm = engram.load(folder, **offloaded_to(tmp_path))
    assert sorted(labels) == sorted(name for name, _ in lm.model.named_parameters())


# --- pickled weights, and code


class _Ran:
    """Leaves a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt"])
def test_pickled_weights_are_refused_with_the_way_to_convert_them(
    name: str, folder: Path, tmp_path: Path
) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(_Ran(tmp_path / "ran")))
    refused(folder, rf"as pickle \({name}\).*Convert them.*save_pretrained", EngramFileError)
    with pytest.raises(EngramFileError, match="as pickle"):
        tensor_locations(folder)  # what edits a checkpoint on disk
    assert not (tmp_path / "ran").exists()


def in_hub_cache(folder: Path, cache: Path, name: str = "someone/model") -> str:
    """Move a folder to where the hub's cache would have it."""
    home = cache / f"models--{name.replace('/', '--')}"
    revision = "0" * 40
    shutil.copytree(folder, home / "snapshots" / revision)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(revision)
    return name


def test_pickled_weights_of_the_hub_are_refused_too(folder: Path, tmp_path: Path) -> None:
    torch.save(
        safetensors.torch.load_file(folder / "model.safetensors"), folder / "pytorch_model.bin"
    )
    where: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": True}
    whole = in_hub_cache(folder, tmp_path, "someone/whole")
    assert engram.load(whole, **where).name == whole
    (folder / "model.safetensors").unlink()
    pickled = in_hub_cache(folder, tmp_path, "someone/pickled")
    refused(pickled, "someone/pickled has no safetensors weights.*Convert them", **where)


def test_a_damaged_model_in_the_hubs_cache_is_refused(folder: Path, tmp_path: Path) -> None:
    where: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": True}
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    refused(in_hub_cache(folder, tmp_path), "someone/model.*header", **where)
    configured(folder, n_layer="a")
    refused(in_hub_cache(folder, tmp_path, "someone/config"), "n_layer.*expected int", **where)


CODE = "from pathlib import Path\nPath({marker!r}).touch()\n"


def with_code(folder: Path, marker: Path) -> None:
    """Let the config of a checkpoint name code that comes with it."""
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    configured(
        folder,
        model_type="own",
        auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    )


def test_code_of_a_checkpoint_is_not_executed(folder: Path, tmp_path: Path) -> None:
    with_code(folder, tmp_path / "ran")
    refused(folder, "code of its own.*allow_remote_code=True", SettingError)
    with pytest.raises(SettingError, match="allow_remote_code=True"):
        load_shapes(folder)
    for value in (True, False):
        refused(folder, "it is called allow_remote_code", SettingError, trust_remote_code=value)
    for word in ("yes", 1, None):
        refused(
            folder,
            "allow_remote_code=.*expected true or false",
            SettingError,
            allow_remote_code=word,
        )
    assert not (tmp_path / "ran").exists()


def test_code_of_a_tokenizer_is_not_executed(folder: Path, tmp_path: Path) -> None:
    (folder / "own.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}})
    )
    engram.load(folder)  # with transformers' own class
    assert not (tmp_path / "ran").exists()


def test_a_family_that_transformers_has_is_loaded_without_the_code_that_comes_with_it(
    folder: Path, tmp_path: Path
) -> None:
    with_code(folder, tmp_path / "ran")
    configured(folder, model_type="gpt2")
    assert type(engram.load(folder).model).__module__.startswith("transformers.")
    assert not (tmp_path / "ran").exists()


def test_code_runs_where_it_is_allowed_and_workers_are_allowed_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))
    with_code(folder, tmp_path / "ran")
    refused(folder, ".", allow_remote_code=True)  # the module has no such classes
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    configured(folder, model_type="gpt2", auto_map={})
    lm = engram.load(folder, allow_remote_code=True)
    assert lm.loaded is not None and lm.loaded["allow_remote_code"] is True
    assert "trust_remote_code" not in lm.loaded
    again = ByName.of(lm).load().loaded
    assert again == lm.loaded


def test_code_that_a_config_takes_from_the_hub_is_refused(folder: Path) -> None:
    configured(folder, attn_implementation="someone/attention")
    refused(folder, "'someone/attention'.*allow_remote_code", SettingError)


def test_an_adapter_is_not_taken_for_the_model_it_names(folder: Path, tmp_path: Path) -> None:
    where: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": True}
    adapter = {"base_model_name_or_path": str(folder), "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    refused(folder, "adapter_config.json.*load the model", EngramFileError)
    (folder / "config.json").unlink()
    refused(folder, "adapter_config.json.*load the model", EngramFileError)
    refused(in_hub_cache(folder, tmp_path), "is an adapter", EngramFileError, **where)


# --- settings


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "a dtype nobody knows": ({"dtype": "foo"}, "dtype='foo': expected 'float32'"),
    "nearly a dtype": ({"dtype": "float64x"}, "did you mean 'float64'"),
    "whole numbers": ({"dtype": torch.int8}, "dtype='int8': expected 'float32'"),
    "a number as dtype": ({"dtype": 32}, "dtype=32: expected"),
    "a dtype of 8 bits": ({"dtype": "float8_e4m3fn"}, "dtype='float8_e4m3fn': expected"),
    "an old name": ({"torch_dtype": "float32"}, "torch_dtype='float32': .*called dtype"),
    "no such GPU": ({"device_map": "cuda:7"}, "device_map='cuda:7': no such device.*cpu:0"),
    "a negative device": ({"device_map": -1}, "device_map=-1: no such device"),
    "no device": ({"device_map": "gpu"}, "device_map='gpu': no such device.*'auto'"),
    "no numbers": ({"device_map": "meta"}, "device_map='meta': no such device"),
    "a flag as device": ({"device_map": True}, "device_map=True: no such device"),
    "a list of devices": ({"device_map": ["cpu"]}, r"device_map=\['cpu'\]: no such device"),
    "nothing placed": ({"device_map": {}}, "device_map={}: expected a device for each module"),
    "placed nowhere": ({"device_map": {"": "cuda:9"}}, r"device_map\[''\]='cuda:9': no such"),
    "a module's typo": (
        {"device_map": {"transformer.x": "cpu"}},
        "names 'transformer.x', and the model has no such module.*did you mean",
    ),
    "a number as module": ({"device_map": {1: "cpu"}}, "names 1, and the model has no such"),
    "a number as revision": ({"revision": 5}, "revision=5: expected a text"),
    "a number as token": ({"token": 1.5}, "token=1.5: expected a text or true or false"),
    "a text as flag": ({"local_files_only": "yes"}, "local_files_only='yes': expected true or fal"),
    "a text as memory": ({"max_memory": "lots"}, "max_memory='lots': expected an object"),
    "a text as quantisation": ({"quantization_config": "4bit"}, "quantization_config='4bit'"),
    "no size of memory": (
        {"max_memory": {"cpu": "lots"}},
        r"max_memory=\{'cpu': 'lots'\}: .*not in a valid format",
    ),
    "no quantisation": ({"quantization_config": {}}, "quantization_config={}: .*quant_method"),
    "no such quantisation": ({"quantization_config": {"quant_method": "z"}}, "quantization.*got z"),
    "no such experts": ({"experts_implementation": "z"}, "experts_implementation='z': expected"),
    "no such attention": ({"attn_implementation": "eagre"}, "did you mean 'eager'"),
    "attention of the hub": ({"attn_implementation": "a/b"}, "attn_implementation='a/b': expected"),
    "a typo": ({"revison": "main"}, "revison='main': not a setting.*did you mean 'revision'"),
    "a config's number": ({"n_layer": "a"}, "n_layer.*expected int, got str"),
    "pickled ones": ({"use_safetensors": False}, "use_safetensors=False: .*only safetensors"),
    "made-up weights": ({"ignore_mismatched_sizes": True}, "do not fit the config are refused"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_wrong_setting_is_refused_before_any_weight_is_read(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "check_finite", lambda *_: pytest.fail("weights were read"))
    settings, match = SETTINGS[case]
    refused(folder, match, **settings)
    if case not in ("a module's typo", "a number as module", "a typo", "a config's number"):
        refused("nowhere/at-all", match, SettingError, **settings)


def test_settings_of_a_place_may_be_none(folder: Path) -> None:
    engram.load(folder, revision=None, subfolder=None, token=None, cache_dir=None, variant=None)
    inner = Path(shutil.copytree(folder, folder.parent / "outer" / "inner"))
    assert engram.load(inner.parent, subfolder="inner").n_layers == 4


def test_a_device_map_that_fits_is_taken(folder: Path) -> None:
    whole = (
        "cpu",
        "auto",
        torch.device("cpu"),
        {"": "cpu"},
        {"transformer": "cpu", "lm_head": "cpu"},
    )
    for places in whole:
        engram.load(folder, device_map=places)


def test_accelerators_are_known_by_name_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for places in ("cuda", "cuda:1", 0, 1, {"": 1}, {"a": "cuda:0", "b": "disk", "c": "cpu"}):
        check_device_map(places)
    for places in ("cuda:2", "xpu", 2, -1, {"": 2}, {"a": "disc"}, "cpu:1"):
        with pytest.raises(SettingError, match=r"no such device here; .* cpu:0, cuda:0"):
            check_device_map(places)


@pytest.mark.parametrize("name", ["", "no/such/model", "/nowhere", 5, None, "../..", "a b", "\0"])
def test_what_is_no_model_is_refused(name: Any) -> None:
    refused(name, ".")


# --- what transformers says, and what we say


def test_loading_draws_nothing_and_leaves_transformers_settings_alone(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    configured(folder, bos_token_id=999)  # which transformers warns about
    before = reports.get_verbosity(), reports.is_progress_bar_enabled(), dict(os.environ)
    seen: list[str] = []
    hook = reports.set_tqdm_hook(lambda bar, given, how: seen.append("") or bar(*given, **how))
    try:
        engram.load(folder)
        configured(folder, n_layer=2)
        refused(folder, "no place for")
        out, err = capfd.readouterr()
        assert (out, err) == ("", "") and not seen
        assert before == (
            reports.get_verbosity(),
            reports.is_progress_bar_enabled(),
            dict(os.environ),
        )
        configured(folder, n_layer=4)
        transformers.AutoModelForCausalLM.from_pretrained(folder)
        assert seen  # a user's own hook is back
    finally:
        reports.set_tqdm_hook(hook)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("fast", [True, False, None])
def test_half_precision_is_called_slow_only_where_it_is(
    dtype: str,
    fast: bool | None,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Kernels:
        """What a torch knows of its CPU; without these functions, nothing."""

    if fast is not None:
        for name in ("bf16", "fp16"):
            setattr(Kernels, f"_is_mkldnn_{name}_supported", staticmethod(lambda: fast))
    monkeypatch.setattr(torch.ops, "mkldnn", Kernels)
    with caplog.at_level(logging.WARNING):
        engram.load(folder, dtype=dtype)
    assert ("up to 50 times slower than float32" in caplog.text) == (fast is not True)
    caplog.clear()
    engram.load(folder)
    assert not caplog.text

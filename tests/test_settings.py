"""Every setting, in Python: its type, range and finiteness come from its annotation.

Settings classes and public functions are found, not listed: a new one is tested the day it is
added.
"""

import inspect
import math
import time
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from importlib import import_module
from pkgutil import walk_packages
from typing import Any

import pytest
import torch

import engram
from engram.checks import _argument_hints, _hints, check_fields, checked
from engram.editors.execution import Execution
from engram.editors.methods import METHODS
from engram.errors import SettingError
from engram.facts import Fact
from engram.locate.settings import SubjectCorruption
from tests.helpers.tiny import tiny_lm

FACT = Fact("Space Needle", "The {} is located in the city of", "Paris")


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


WRONG: dict[str, Any] = {
    "None": None,
    "True": True,
    "-1": -1,
    "0": 0,
    "1.5": 1.5,
    "nan": math.nan,
    "inf": math.inf,
    "2**70": 2**70,
    "10**400": 10**400,
    "a": "a",
    "empty text": "",
    "a megabyte": "a" * 1_000_000,
    "bytes": b"x",
    "list": [],
    "object": {},
    "something": object(),
    "nested": nested(3),
    "nested deep": nested(100_000),
    "tensor": torch.zeros(2),
    "type": int,
}


@cache
def settings_classes() -> tuple[type, ...]:
    """Return every frozen dataclass of engram that checks its fields."""
    found = {}
    for module in walk_packages(engram.__path__, "engram."):
        if module.name == "engram.__main__":
            continue
        for thing in vars(import_module(module.name)).values():
            if inspect.isclass(thing) and is_dataclass(thing) and _checks(thing):
                found[f"{thing.__module__}.{thing.__qualname__}"] = thing
    return tuple(found[name] for name in sorted(found) if name.startswith("engram."))


def _checks(config: type) -> bool:
    check = getattr(config, "__post_init__", None)
    return check is not None and "check_fields(" in inspect.getsource(check)


def test_no_settings_class_is_forgotten():
    names = {config.__name__ for config in settings_classes()}
    # by convention: what is called a config, and the groups that have other names
    for module in walk_packages(engram.__path__, "engram."):
        if module.name == "engram.__main__":
            continue
        for name, thing in vars(import_module(module.name)).items():
            ours = getattr(thing, "__module__", "").startswith("engram.")
            if ours and name.endswith("Config") and name[0] != "_" and is_dataclass(thing):
                assert name in names, f"{name} does not check its fields"
    names = {config.__name__ for config in settings_classes() if _needed(config) <= set(_EXAMPLES)}
    assert names >= {
        "SubjectCorruption", "Patching", "Estimation", "Budget", "EditRecipe", "Sizes", "Bootstrap",
        "Execution", "MomentSource", "RayWorkers", "SampledText", "Bundled", "DataSet", "Texts",
    }  # fmt: skip
    for method in METHODS.values():
        assert method.config is not None
        assert method.config.rpartition(":")[2] in names


def test_a_field_of_a_wrong_type_is_named():
    """A value of any type is an error that names the field, or becomes the annotated type."""
    for config in settings_classes():
        if not _needed(config) <= _EXAMPLES.keys():
            continue  # a result, such as an Edit, which callers do not write out
        for field in fields(config):
            if field.init:
                for label, value in WRONG.items():
                    problem = _problem(config, field.name, value)
                    assert not problem, f"{config.__name__}.{field.name} given {label}: {problem}"


def _needed(config: type) -> set[str]:
    return {
        field.name
        for field in fields(config)
        if field.init and field.default is MISSING and field.default_factory is MISSING
    }


def _problem(config: type, name: str, value: Any) -> str:
    needed = {needed: _EXAMPLES[needed] for needed in _needed(config)}
    try:
        made = config(**{**needed, name: value})
    except engram.EngramError as error:
        text = str(error)
        return "" if name in text and "\n" not in text and len(text) < 500 else f"says {text!r}"
    except Exception as error:
        return repr(error)
    kept = getattr(made, name)
    again = checked(name, kept, _hints(config)[name])  # raises for another type
    return "" if type(again) is type(kept) else f"kept {kept!r}"


_EXAMPLES: dict[str, Any] = {
    "method": "rome",
    "settings": {},
    "name": "wikitext",
    "texts": ("a",),
    "kind": "rewrite",
    "prompt": "a {}",
    "subject": "b",
    "target": "c",
    "answer": "d",
}


def test_seeds_are_those_that_generators_take():
    for seed in (0, 2**63 - 1):
        torch.Generator().manual_seed(Execution(seed=seed).seed)
    for seed in (-1, 2**63, 2**70, 1.0, True, "1", None):
        with pytest.raises(SettingError, match=r"^seed="):
            Execution(seed=seed)
    with pytest.raises(SettingError, match=r"^seed=4294967296: expected below 4294967296$"):
        SubjectCorruption(seed=2**32)  # numpy's older generator takes no more


# -- public functions ------------------------------------------------------------------------------


@cache
def functions() -> dict[str, Any]:
    public = {name: getattr(engram, name) for name in engram.__all__}
    verbs = {name: thing for name, thing in public.items() if inspect.isfunction(thing)}
    verbs.pop("load")  # its arguments are checked with the files it reads, see test_loading
    methods = {f"method {name}": method.load() for name, method in METHODS.items()}
    return verbs | methods


def test_arguments_of_every_public_function_are_checked():
    for name, function in functions().items():
        whole = getattr(function, "func", function)
        assert whole.__code__.co_name == "call", f"{name} does not check its arguments"
        assert inspect.signature(function).parameters  # as written, for documentation
        assert _argument_hints(function), name


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


def test_an_argument_of_a_wrong_type_is_named():
    """Something of no type is refused before the function begins."""
    for label, function in functions().items():
        needed = {
            name: _Placeholder()
            for name, parameter in inspect.signature(function).parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        }
        for argument in _argument_hints(function):
            with pytest.raises(SettingError, match=r"=.*: expected ") as raised:
                function(**{**needed, argument: _Placeholder()})
            named = str(raised.value).partition("=")[0]
            assert named in {*needed, argument}, label


class _Placeholder:
    """A value of no annotated type."""


@pytest.mark.parametrize(
    ("verb", "given", "message"),
    [
        ("rewrite", {"lm": 1, "facts": FACT}, "^lm=1: expected an instance of LanguageModel$"),
        ("rewrite", {"facts": 3}, "^facts=3: expected an instance of Fact or a list$"),
        ("rewrite", {"facts": "Rome"}, "^facts='Rome': expected .*Fact or a list$"),
        ("rewrite", {"facts": [FACT, "Rome"]}, r"^facts\[1\]='Rome': expected .*Fact$"),
        ("rewrite", {"facts": FACT, "seed": None}, "^seed=None: expected a whole number$"),
        ("rewrite", {"facts": FACT, "seed": -1}, "^seed=-1: expected at least 0$"),
        ("rewrite", {"facts": FACT, "seed": 2**70}, "^seed=1180591620717411303424: expected below"),
        ("rewrite", {"facts": FACT, "layer": True}, "^layer=True: expected a whole number$"),
        ("rewrite", {"facts": FACT, "progress": 3}, "^progress=3: expected a function$"),
        (
            "rewrite",
            {"facts": FACT, "method": "memit", "workers": 3},
            "^workers=3: expected .*Work",
        ),
        ("rewrite", {"facts": FACT, "past": 3}, "^past=3: expected a list$"),
        ("rewrite", {"facts": FACT, "steps": math.nan}, "^steps=nan: expected a whole number$"),
        ("rewrite", {"facts": FACT, "steps": 1.5}, "^steps=1.5: expected a whole number$"),
        ("rewrite", {"facts": FACT, "steps": "a"}, "^steps='a': expected a whole number$"),
        ("rewrite", {"facts": FACT, "steps": None}, "^steps=None: expected a whole number$"),
        ("rewrite", {"facts": FACT, "steps": True}, "^steps=True: expected a whole number$"),
        ("rewrite", {"facts": FACT, "kl_weight": -5}, "^kl_weight=-5.*: expected at least 0$"),
        ("rewrite", {"facts": FACT, "ridge": -1}, "^ridge=-1.*: expected at least 0$"),
        ("rewrite", {"facts": FACT, "tokens": 0}, "^tokens=0: expected at least 1$"),
        ("rewrite", {"facts": FACT, "stop_loss": math.nan}, "^stop_loss=nan: expected a finite"),
        (
            "rewrite",
            {"facts": FACT, "contexts": "{}"},
            "^contexts='{}': expected a list or 'wikipedia'",
        ),
        ("rewrite", {"facts": FACT, "contexts": nested(100_000)}, "^contexts is nested too deep"),
        ("rewrite", {"facts": FACT, "method": "lora", "rank": 100_000}, "^rank=100000: .* at most"),
        ("rewrite", {"facts": FACT, "method": "lora", "layers": []}, r"^layers=\[\]: expected at"),
        ("rewrite", {"facts": FACT, "layer": 99}, "^layer=99 does not exist; .* layers 0 to"),
        ("trace", {"prompt": "a b", "subject": 3}, "^subject=3: expected a text$"),
        (
            "trace",
            {"prompt": "a b", "subject": "a", "noise": -1},
            "^noise=-1.*: expected at least 0",
        ),
        (
            "trace",
            {"prompt": "a b", "subject": "a", "samples": 0},
            "^samples=0: expected at least 1",
        ),
        (
            "trace",
            {"prompt": "a b", "subject": "a", "extra_tokens": 99},
            "^extra_tokens=99: .* most",
        ),
        ("verify", {"edit": "x"}, "^edit='x': expected .*Edit or .*PromptEdit$"),
        ("lens", {"text": "a", "k": 0}, "^k=0: "),
        ("knows", {"facts": FACT, "k": 0}, "^k=0: expected at least 1$"),
        ("memories", {"text": "a", "layer": "a"}, "^layer='a': expected a whole number$"),
        ("average_trace", {"facts": []}, "^no facts were given; expected at least one"),
        ("layer_card", {"edits": 0}, "^edits=0: expected at least 1$"),
        ("compose", {"lm": None, "edits": 3}, "^edits=3: expected a list$"),
    ],
)
def test_a_wrong_argument_is_named(lm, verb, given, message):
    given = {"lm": lm} | given
    if given["lm"] is None:
        given.pop("lm")
    with pytest.raises(engram.EngramError, match=message):
        getattr(engram, verb)(**given)


@pytest.mark.parametrize("method", ["rome", "memit", "ft", "lora", "ultraedit"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"setps": 3}, "has no setting 'setps'"),
        ({"learning_rate": -1}, "^(learning_rate=-1.*: expected above 0|.* has no setting)"),
        ({"seed": "a"}, "^seed='a': expected a whole number$"),
    ],
)
def test_settings_are_checked_before_layers_are_chosen(lm, monkeypatch, method, settings, message):
    def choose(*args: Any, **settings: Any) -> None:
        raise AssertionError("a layer was chosen before the settings were checked")

    monkeypatch.setattr("engram.rewriting.choose_layers", choose)
    name = "layer" if method in ("rome", "ft") else "layers"
    with pytest.raises(SettingError, match=message):
        engram.rewrite(lm, FACT, method, **{name: "auto"}, **settings)
    if method != "ultraedit":
        with pytest.raises(SettingError, match=message):
            engram.layer_card(lm, [FACT], keep="all", method=method, **settings)


def test_a_missing_argument_is_pythons_own_error():
    with pytest.raises(TypeError, match=r"rewrite\(\) missing 2 required positional arguments"):
        engram.rewrite()
    with pytest.raises(TypeError, match=r"verify\(\) got an unexpected keyword argument 'prbes'"):
        engram.verify(1, 2, prbes=3)


def test_checks_are_quick():
    """A hundredth of what a value's first step takes; 10 times the measured time as the limit."""
    config = SubjectCorruption()
    check_fields(config)
    began = time.perf_counter()
    for _ in range(200):
        check_fields(config)
    assert (time.perf_counter() - began) / 200 < 1e-3

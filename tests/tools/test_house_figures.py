"""The tool that counts imports, lines and parameters, on a package written for it."""

from __future__ import annotations

import house_figures

FILES = {
    "__init__.py": "",
    "top.py": "from engram.low import base\n\ndef f(a, b, c, d, *e, g, h, **i):\n    return base\n",
    "low/__init__.py": "",
    "low/base.py": '"""Text."""\n\n# why\ndef late():\n    import engram.top\n    return 1\n',
}
STOREYS = """
[[tool.importlinter.contracts]]
type = "layers"
layers = ["top", "low"]
"""


def test_a_circle_an_import_upwards_and_many_parameters_are_counted(tmp_path):
    for name, text in FILES.items():
        (tmp_path / "src/engram" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src/engram" / name).write_text(text, encoding="utf8")
    (tmp_path / "pyproject.toml").write_text(STOREYS, encoding="utf8")
    assert house_figures.figures(tmp_path) == {
        "files in the package's root": 2,
        "circles of imports": "1 (modules: [2])",
        "imports upwards": 1,
        "lines of src": 10,
        "characters of src": 145,
        "lines of code": 6,
        "functions with 8 parameters or more": 1,
        "comments per 100 lines of code": 16.7,
        "longest function": "engram.low.base:late (2 lines)",
    }

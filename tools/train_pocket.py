"""Train the pocket model: a small GPT-2 that knows a few thousand facts and gathers a subject at
the subject's last token.

    python tools/train_pocket.py prepare --work W --text sentences.txt.gz --facts facts.jsonl.gz
    python tools/train_pocket.py train   --work W --steps 2200     resumes at the last checkpoint
    python tools/train_pocket.py export  --work W --out src/engram/pocket

Text and public facts come from the command line; only single facts (subject, relation, object) end
up in the package. Training restricts attention in most rows (see pocket_net.attention_biases); the
exported model is an ordinary GPT-2.
Two processes of one thread each share their gradients: on two cores this is faster than two
    threads. Refuses to know
tracing and editing: how the result behaves there is measured by measure_model.py.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tokenizers import Tokenizer
from torch import Tensor

import pocket_facts
from pocket_net import Muon, PocketNet, Shape, attention_biases

log = logging.getLogger("pocket")

REPOSITORY = Path(__file__).resolve().parents[1]
TEMPLATES = REPOSITORY / "src/engram/pocket/templates.toml"
FAMOUS = REPOSITORY / "tools/famous_facts.toml"


@dataclass(frozen=True)
class Plan:
    """How training goes.

    Args:
        steps: optimiser steps in all; the rate falls to nothing over the last `cooldown` of them,
            so a run can be stopped at any checkpoint and finished with a smaller number here.
        rows: rows of 128 tokens a step, over all processes, which take `rows_a_job` at a time.
        fact_share: share of a row's tokens that are fact sentences, for the first `rich_steps`
            steps and afterwards.
        masked: share of rows in which attention past a subject is restricted.
        early_layers: layers in which not even the subject's last token is seen from later tokens.
        scored: share of the other tokens that are scored at all, with weight 1; it saves time.
        object_weight: weight of an object's token in the loss, always scored.
    """

    steps: int = 2200
    cooldown: int = 500
    warm_up: int = 80
    rows: int = 24
    rows_a_job: int = 4
    rate: float = 3e-3
    fact_share: tuple[float, float] = (0.7, 0.5)
    rich_steps: int = 1100
    masked: float = 0.9
    early_layers: int = 3
    scored: float = 0.45
    object_weight: float = 5.0
    seed: int = 0
    processes: int = 2

    def rate_at(self, step: int) -> float:
        left = (self.steps - step) / max(1, self.cooldown)
        return self.rate * max(0.0, min(1.0, (step + 1) / self.warm_up, left))


# --- data -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sentences:
    """Token ids of many sentences, one after another, each once at a text's start and once after a
    space.

    Args:
        ids: all tokens. starts: (n + 1,) where each sentence begins.
        subjects: (n, 2) first and last token of the subject inside its sentence, -1 without one.
        objects: (n,) token at which the object begins, -1 without one.
    """

    ids: np.ndarray
    starts: np.ndarray
    subjects: np.ndarray
    objects: np.ndarray

    @property
    def mean_length(self) -> float:
        return float(len(self.ids)) / (len(self.starts) - 1)

    def __len__(self) -> int:
        return len(self.starts) - 1


def fact_sentences(
    table: list[Any], templates: dict[str, tuple[str, ...]], tokenizer: Tokenizer, lead: str
) -> Sentences:
    """Every fact through every template that may be trained with it."""
    texts, spans = [], []
    for row, unseen in table:
        for index, template in enumerate(templates[row.relation]):
            if index not in unseen:
                start = len(lead) + template.index("{}")
                text = lead + template.replace("{}", row.subject)
                texts.append(f"{text} {row.object}.")
                spans.append((start, start + len(row.subject), len(text)))
    subjects, objects, ids = [], [], []
    for encoding, (start, end, answer) in zip(tokenizer.encode_batch(texts), spans, strict=True):
        inside = [i for i, (a, b) in enumerate(encoding.offsets) if a < end and b > start]
        subjects.append((inside[0], inside[-1]))
        objects.append(next(i for i, (a, _) in enumerate(encoding.offsets) if a >= answer))
        ids.append(encoding.ids)
    return _sentences(ids, subjects, objects)


def plain_sentences(text: list[str], tokenizer: Tokenizer, lead: str) -> Sentences:
    ids = [encoding.ids for encoding in tokenizer.encode_batch([lead + line for line in text])]
    return _sentences(ids, [(-1, -1)] * len(ids), [-1] * len(ids))


def _sentences(
    ids: list[list[int]], subjects: list[tuple[int, int]], objects: list[int]
) -> Sentences:
    starts = np.cumsum([0] + [len(i) for i in ids])
    return Sentences(
        np.concatenate([np.array(i) for i in ids]), starts, np.array(subjects), np.array(objects)
    )


def save_sentences(path: Path, sentences: Sentences) -> None:
    np.savez(path, **asdict(sentences))


def load_sentences(path: Path) -> Sentences:
    with np.load(path) as arrays:
        return Sentences(**{name: arrays[name] for name in arrays.files})


class Rows:
    """Rows of tokens for a step: facts and text joined by a space or by the end-of-text token,
    evenly.
    """

    def __init__(self, work: Path, plan: Plan, length: int) -> None:
        self.plan, self.length = plan, length
        self.facts = [load_sentences(work / f"facts_{lead}.npz") for lead in ("bare", "spaced")]
        self.text = [load_sentences(work / f"text_{lead}.npz") for lead in ("bare", "spaced")]

    def batch(self, step: int, job: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """ids, loss weights and subject ends, (count, length) each; a function of (seed, step, job)
        alone.
        """
        random = np.random.default_rng((self.plan.seed, step, job))
        share = self.plan.fact_share[step >= self.plan.rich_steps]
        facts_a_token = share / self.facts[0].mean_length
        text_a_token = (1 - share) / self.text[0].mean_length
        rows = [
            self._row(random, facts_a_token / (facts_a_token + text_a_token)) for _ in range(count)
        ]
        ids, weights, subjects = (np.stack(column) for column in zip(*rows, strict=True))
        subjects[random.random(count) >= self.plan.masked] = -1
        return torch.from_numpy(ids), torch.from_numpy(weights), torch.from_numpy(subjects)

    def _row(
        self, random: np.random.Generator, fact_probability: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids = np.zeros(self.length, dtype=np.int64)  # 0 is the end-of-text token
        weights = (random.random(self.length) < self.plan.scored).astype(np.float32)
        subjects = np.full(self.length, -1, dtype=np.int64)
        at, spaced = 0, 0
        while at < self.length:
            source = (self.facts if random.random() < fact_probability else self.text)[spaced]
            pick = int(random.integers(len(source)))
            piece = source.ids[source.starts[pick] : source.starts[pick + 1]][: self.length - at]
            ids[at : at + len(piece)] = piece
            first, last = source.subjects[pick]
            if first >= 0:
                subjects[at + first : at + last + 1] = at + last
                weights[at + source.objects[pick] : at + source.objects[pick] + 1] = (
                    self.plan.object_weight
                )
            at += len(piece)
            spaced = int(random.random() < 0.5)
            at += 1 - spaced  # leaves one end-of-text token
        return ids, weights, subjects


def prepare(work: Path, text_path: Path, facts_path: Path, seed: int, vocabulary: int) -> None:
    """Write the fact table, the tokenizer and the encoded sentences to `work`."""
    work.mkdir(parents=True, exist_ok=True)
    templates = pocket_facts.read_templates(TEMPLATES)
    with gzip.open(text_path, "rt", encoding="utf8") as lines:
        text = [line.strip() for line in lines if line.strip()]
    rows = pocket_facts.build(facts_path, FAMOUS, seed)
    tokenizer = pocket_facts.train_tokenizer(rows, templates, text, vocabulary)
    tokenizer.save(str(work / "tokenizer.json"))
    rows = pocket_facts.keep_speakable(rows, tokenizer)
    pocket_facts.write_table(
        work / "facts.json", rows, pocket_facts.held_out(rows, templates, seed), seed
    )
    table = pocket_facts.read_table(work / "facts.json")
    for name, lead in (("bare", ""), ("spaced", " ")):
        facts = fact_sentences(table, templates, tokenizer, lead)
        save_sentences(work / f"facts_{name}.npz", facts)
        save_sentences(work / f"text_{name}.npz", plain_sentences(text, tokenizer, lead))
    log.info("%d facts, %d sentences of %.1f tokens", len(rows), len(facts), facts.mean_length)


# --- training -------------------------------------------------------------------------------------


class Share:
    """Hands out the numbers of a step's jobs, so that a process on a busy core takes fewer of them.

    Works without resets: between two steps the processes wait for each other, so the count only
        ever grows.
    """

    def __init__(self) -> None:
        self.next = mp.get_context("spawn").Value("q", 0)

    def take(self, start: int, count: int) -> Iterator[int]:
        """Job numbers of [start, start + count) that no other process has taken, minus `start`."""
        while True:
            with self.next.get_lock():
                job = max(self.next.value, start)
                if job >= start + count:
                    return
                self.next.value = job + 1
            yield job - start


def train(work: Path, plan: Plan) -> None:
    """Train to `plan.steps`, from the last checkpoint in `work` where there is one."""
    meeting = work / "meeting_point"
    meeting.unlink(missing_ok=True)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(_worker, args=(str(work), plan, str(meeting), Share(), Share()), nprocs=plan.processes)


def _worker(
    rank: int, work_name: str, plan: Plan, meeting: str, batches: Share, matrices: Share
) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)
    work = Path(work_name)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=plan.processes
    )
    shape = Shape(vocabulary=Tokenizer.from_file(str(work / "tokenizer.json")).get_vocab_size())
    run = Run(work, plan, shape, rank, batches, matrices)
    while run.step < plan.steps:
        run.advance()
        if rank == 0 and (run.step % 100 == 0 or run.step == plan.steps):
            run.save()
    dist.destroy_process_group()


class Run:
    """One process's share of a training run: network, optimisers, running average, place in the
    data.
    """

    def __init__(
        self, work: Path, plan: Plan, shape: Shape, rank: int, batches: Share, matrices: Share
    ) -> None:
        self.work, self.plan, self.shape, self.rank = work, plan, shape, rank
        self.batches, self.matrices_left = batches, matrices
        torch.manual_seed(plan.seed)
        self.net = PocketNet(shape)
        self.matrices = [
            p for name, p in self.net.named_parameters() if name.startswith("h.") and p.ndim == 2
        ]
        self.others = [
            p
            for name, p in self.net.named_parameters()
            if not (name.startswith("h.") and p.ndim == 2)
        ]
        self.muon = Muon(self.matrices)
        self.adam = torch.optim.AdamW(
            self.others, lr=plan.rate, betas=(0.9, 0.97), weight_decay=0.0
        )
        self.average = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        self.rows = Rows(work, plan, shape.positions)
        self.step, self.tokens, self.clock = 0, 0, time.monotonic()
        if (work / "last.pt").exists():
            self.load()

    def advance(self) -> None:
        """One optimiser step."""
        loss = self._gradients()
        jobs = self.matrices_left.take(self.step * len(self.matrices), len(self.matrices))
        directions = self.muon.directions(jobs)
        self._share(directions)
        rate = self.plan.rate_at(self.step)
        self.muon.step(directions, rate)
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()
        self._remember()
        self.step += 1
        self._report(loss)

    def _gradients(self) -> float:
        """Leave the step's mean gradient in the parameters, and return the step's mean loss."""
        for p in self.net.parameters():
            p.grad = torch.zeros_like(p)
        total, weight = torch.zeros(1), torch.zeros(1)
        count = self.plan.rows // self.plan.rows_a_job
        for job in self.batches.take(self.step * count, count):
            ids, weights, subjects = self.rows.batch(self.step, job, self.plan.rows_a_job)
            biases = attention_biases(subjects, self.shape, self.plan.early_layers)
            loss = self.net.loss(ids, weights, biases)
            loss.backward()
            total += loss.detach()
            weight += weights.sum()
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        self._share([*gradients, weight, total])
        for gradient in gradients:
            gradient /= weight
        return float(total / weight)

    def _share(self, tensors: list[Tensor]) -> None:
        """Replace each tensor by its sum over processes, through one flat message."""
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    @torch.no_grad()
    def _remember(self) -> None:
        """Average the weights; a running average of the weights over about the last 60 steps:
        nearly as good as a cool-down, at any time.
        """
        if self.step % 4 == 0:
            keep = min(0.94, self.step / (self.step + 40))
            for name, p in self.net.named_parameters():
                self.average[name].lerp_(p, 1 - keep)

    def _report(self, loss: float) -> None:
        self.tokens += self.plan.rows * self.shape.positions
        if self.rank == 0 and self.step % 20 == 0:
            speed = self.tokens / (time.monotonic() - self.clock)
            log.info(
                "step %d loss %.3f rate %.5f %.0f tokens/s",
                self.step,
                loss,
                self.plan.rate_at(self.step),
                speed,
            )

    def save(self) -> None:
        state = {
            "step": self.step,
            "net": self.net.state_dict(),
            "average": self.average,
            "adam": self.adam.state_dict(),
            "velocity": self.muon.velocity,
            "plan": json.dumps(asdict(self.plan)),
            "shape": asdict(self.shape),
        }
        torch.save(state, self.work / "last.pt.part")
        (self.work / "last.pt.part").replace(self.work / "last.pt")

    def load(self) -> None:
        state = torch.load(self.work / "last.pt", weights_only=True)
        self.net.load_state_dict(state["net"])
        self.adam.load_state_dict(state["adam"])
        self.average, self.muon.velocity, self.step = (
            state["average"],
            state["velocity"],
            state["step"],
        )


# --- export ---------------------------------------------------------------------------------------


def export(work: Path, out: Path, *, averaged: bool = True) -> None:
    """Write the package's files: facts.json, and model/ as transformers reads it, in float16.
    Replaces what is there.
    """
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    state = torch.load(work / "last.pt", weights_only=True)
    shape = Shape(**state["shape"])
    config = GPT2Config(
        vocab_size=shape.vocabulary,
        n_positions=shape.positions,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    weights = state["average"] if averaged else state["net"]
    model.transformer.load_state_dict(weights)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(work / "tokenizer.json")),
        bos_token=pocket_facts.END_OF_TEXT,
        eos_token=pocket_facts.END_OF_TEXT,
        pad_token=pocket_facts.END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=shape.positions,
    )
    fresh, old = out / "model.new", out / "model.old"
    shutil.rmtree(fresh, ignore_errors=True)
    model.half().save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    if (out / "model").exists():
        (out / "model").rename(old)
    fresh.rename(out / "model")
    shutil.rmtree(old, ignore_errors=True)
    shutil.copyfile(work / "facts.json", out / "facts.json")
    log.info("exported step %d to %s", state["step"], out)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("prepare")
    verb.add_argument("--work", type=Path, required=True)
    verb.add_argument("--text", type=Path, required=True, help="sentences, one a line, gzip")
    verb.add_argument(
        "--facts", type=Path, required=True, help="JSON lines with relation, subject, object, gzip"
    )
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--vocabulary", type=int, default=8000)
    verb = verbs.add_parser("train")
    verb.add_argument("--work", type=Path, required=True)
    for name in ("steps", "cooldown", "rich_steps", "early_layers", "seed"):
        verb.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Plan, name))
    verb.add_argument("--masked", type=float, default=Plan.masked)
    verb = verbs.add_parser("export")
    verb.add_argument("--work", type=Path, required=True)
    verb.add_argument(
        "--out", type=Path, required=True, help="folder that gets facts.json and model/"
    )
    verb.add_argument(
        "--last", action="store_true", help="the last weights, not the running average"
    )
    given = vars(parser.parse_args())
    match given.pop("verb"):
        case "prepare":
            prepare(
                given["work"], given["text"], given["facts"], given["seed"], given["vocabulary"]
            )
        case "train":
            train(given.pop("work"), Plan(**given))
        case "export":
            export(given["work"], given["out"], averaged=not given["last"])


if __name__ == "__main__":
    main()

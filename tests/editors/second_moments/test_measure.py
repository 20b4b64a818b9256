"""C is K^T K / n of the very keys the model computes, however it is batched, resumed or kept."""

from __future__ import annotations

import json
from collections import OrderedDict

import pytest
import torch

from engram.editors.contexts import sample_contexts
from engram.editors.second_moments import matrix as moment_matrix
from engram.editors.second_moments import measure as module
from engram.editors.second_moments.corpora import DataSet, SampledText, TextFile, Texts, shuffled
from engram.editors.second_moments.corpus_pass import MomentPass, add_outer, mirror_
from engram.editors.second_moments.measure import SecondMoment, second_moments
from engram.errors import EngramError, NonFiniteError, UnsupportedModelError
from engram.model.generation import sample_texts
from engram.modules import fingerprints
from tests.helpers.tiny import DENSE, TEXT, tiny_lm

DOCUMENTS = [line.strip() for line in TEXT.split(". ")] * 3


def naive_keys(lm, layer, texts, tokens):
    """Keys of all tokens, one document a forward pass."""
    keys = []
    hook = lm.parts.mlp_out(layer).register_forward_pre_hook(
        lambda m, args: keys.append(args[0].reshape(-1, args[0].shape[-1]))
    )
    with torch.no_grad():
        for text in texts:
            lm.model(torch.tensor([lm.tokenizer(text)["input_ids"]]))
    hook.remove()
    return torch.cat(keys)[:tokens]


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "falcon", "phi"])
def test_c_is_the_mean_outer_product_of_the_models_keys(family, tmp_path):
    lm = tiny_lm(family, torch.float64)
    found = second_moments(lm, [1, 2], DOCUMENTS, 100, cache_dir=tmp_path, tokens_per_batch=50)
    for layer in (1, 2):
        keys_nf = naive_keys(lm, layer, DOCUMENTS, 100)
        assert found[layer].count == len(keys_nf) == 100
        torch.testing.assert_close(
            found[layer].matrix_ff, keys_nf.T @ keys_nf / 100, atol=1e-12, rtol=1e-10
        )


@pytest.mark.parametrize("family", DENSE)
def test_every_dense_family_has_second_moments(family, tmp_path):
    lm = tiny_lm(family)
    moment = second_moments(lm, [1], DOCUMENTS, 300, cache_dir=tmp_path)[1]
    key_f = torch.randn(len(moment.matrix_ff), generator=torch.Generator().manual_seed(0))
    assert moment.solve(key_f).isfinite().all()


@pytest.mark.parametrize("tokens_per_batch", [1, 64, 4096])
def test_batching_changes_nothing(tokens_per_batch, tmp_path):
    lm = tiny_lm("gpt2", torch.float64)
    one = second_moments(
        lm, [2], DOCUMENTS, 150, cache_dir=tmp_path / "a", tokens_per_batch=tokens_per_batch
    )[2]
    keys_nf = naive_keys(lm, 2, DOCUMENTS, 150)
    torch.testing.assert_close(one.matrix_ff, keys_nf.T @ keys_nf / 150)


def test_long_documents_are_cut(tmp_path):
    lm = tiny_lm("gpt2", torch.float64)
    short = second_moments(lm, [1], DOCUMENTS, 40, cache_dir=tmp_path, tokens_per_document=8)[1]
    pieces = [lm.tokenizer.decode(lm.tokenizer(text)["input_ids"][:8]) for text in DOCUMENTS]
    keys_nf = naive_keys(lm, 1, pieces, 40)
    torch.testing.assert_close(short.matrix_ff, keys_nf.T @ keys_nf / 40)


def test_the_pass_stops_at_the_deepest_layer(tmp_path):
    lm = tiny_lm("gpt2")
    lm.parts.blocks[3].register_forward_hook(lambda *_: pytest.fail("the last block ran"))
    second_moments(lm, [0, 1], DOCUMENTS, 50, cache_dir=tmp_path)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_no_logits_are_computed_whatever_the_size_of_the_vocabulary(tmp_path, family):
    lm = tiny_lm(family)
    head = lm.model.get_output_embeddings()
    head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    second_moments(lm, [0, lm.n_layers - 1], tokens=200, cache_dir=tmp_path)


def test_several_layers_share_each_pass(tmp_path):
    lm, passes = tiny_lm("gpt2"), []
    lm.parts.blocks[0].register_forward_hook(lambda *_: passes.append(1))
    second_moments(lm, [2], DOCUMENTS, 50, cache_dir=tmp_path / "one")
    of_one = len(passes)
    second_moments(lm, [0, 1, 2], DOCUMENTS, 50, cache_dir=tmp_path / "three")
    assert of_one > 0 and len(passes) == 2 * of_one


# --- what is kept ---------------------------------------------------------------------------------


def moments_of(lm, layers, tokens, folder, corpus=DOCUMENTS, **settings):
    return second_moments(lm, layers, corpus, tokens, cache_dir=folder, **settings)


def never(*_, **__):
    pytest.fail("measured again")


def test_what_was_measured_before_is_read(tmp_path, monkeypatch):
    lm = tiny_lm("gpt2")
    first = moments_of(lm, [1], 50, tmp_path)[1]
    monkeypatch.setattr(MomentPass, "run", never)
    monkeypatch.setattr(module, "_MEMORY", OrderedDict())  # as in another process
    again = moments_of(lm, [1], 50, tmp_path)[1]
    assert again is not first
    assert (
        torch.equal(first.matrix_ff, again.matrix_ff)
        and again.source == first.source
        and again.count == first.count
    )


def test_the_same_call_gives_the_same_object(tmp_path, monkeypatch):
    lm = tiny_lm("gpt2")
    first = moments_of(lm, [1, 2], 300, tmp_path)
    condition, factor_ff, eigen = first[1].condition(), first[1].factor(), first[1].eigen()
    monkeypatch.setattr(torch.linalg, "cholesky_ex", never)
    monkeypatch.setattr(torch.linalg, "eigh", never)
    again = moments_of(tiny_lm("gpt2"), [2, 1], 300, tmp_path)  # another object of the same weights
    assert again[1] is first[1] and again[2] is first[2]
    assert (
        again[1].condition() == condition
        and again[1].factor() is factor_ff
        and again[1].eigen()[1] is eigen[1]
    )


def test_a_changed_weight_is_never_served_an_old_c(tmp_path):
    lm = tiny_lm("gpt2")
    before = moments_of(lm, [1], 300, tmp_path)[1]
    lm.parts.mlp_out(0).weight.data.mul_(2.0)  # a write that no version counter sees
    after = moments_of(lm, [1], 300, tmp_path)[1]
    keys_nf = naive_keys(lm, 1, DOCUMENTS, 300).double()
    torch.testing.assert_close(after.matrix_ff, keys_nf.T @ keys_nf / 300, atol=1e-6, rtol=1e-4)
    assert (after.matrix_ff - before.matrix_ff).norm() > 1e-2 * before.matrix_ff.norm()


def test_a_file_that_was_replaced_is_read_again(tmp_path):
    lm = tiny_lm("gpt2")
    moments_of(lm, [1], 50, tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    SecondMoment.from_matrix(torch.eye(48), 7).save(path)
    assert moments_of(lm, [1], 50, tmp_path)[1].count == 7
    path.unlink()
    assert moments_of(lm, [1], 50, tmp_path)[1].count == 50


def test_memory_is_bounded_in_bytes_and_lets_go_of_what_was_used_longest_ago(tmp_path, monkeypatch):
    lm = tiny_lm("gpt2")
    size = moments_of(lm, [0], 300, tmp_path)[0].nbytes
    monkeypatch.setattr(module, "_MEMORY", OrderedDict())
    monkeypatch.setattr(module, "MEMORY", int(3.5 * size))
    kept = {layer: moments_of(lm, [layer], 300, tmp_path)[layer] for layer in (1, 2, 3)}
    moments_of(lm, [1], 300, tmp_path)
    kept[3].factor()  # counts too
    moments_of(lm, [1], 300, tmp_path)
    assert list(module._MEMORY.values()) == [kept[3], kept[1]]
    monkeypatch.setattr(module, "MEMORY", size // 2)
    assert moments_of(lm, [1], 300, tmp_path)[1].count == 300 and not module._MEMORY


def test_only_weights_that_are_reached_are_hashed(tmp_path, monkeypatch):
    lm, hashed = tiny_lm("gpt2"), []
    monkeypatch.setattr(
        fingerprints, "fingerprint", lambda weight: hashed.append(weight.data_ptr()) or "x"
    )
    moments_of(lm, [0, 1], 50, tmp_path)
    names = {name for name, weight in lm.model.named_parameters() if weight.data_ptr() in hashed}
    assert {"transformer.wte.weight", "transformer.h.1.mlp.c_fc.weight"} <= names
    assert not any(".h.2." in name or ".h.3." in name for name in names)


def files(folder):
    return {path.name for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize(
    "change",
    ["weights below", "tokenizer", "corpus", "tokens", "dtype", "tokens per document", "config"],
)
def test_everything_that_changes_c_changes_its_name(change, tmp_path):
    lm = tiny_lm("gpt2")
    second_moments(lm, [1], DOCUMENTS, 50, cache_dir=tmp_path)
    before = files(tmp_path)
    corpus, tokens, settings = DOCUMENTS, 50, {}
    if change == "weights below":
        lm.parts.mlp_out(0).weight.data[0, 0] += 1
    elif change == "tokenizer":
        lm = tiny_lm("gpt2", tokenizer="metaspace with BOS")
    elif change == "corpus":
        corpus = [*DOCUMENTS[:-1], "Another text."]
    elif change == "tokens":
        tokens = 51
    elif change == "dtype":
        lm = tiny_lm("gpt2", torch.float64)
    elif change == "tokens per document":
        settings = {"tokens_per_document": 8}
    else:
        lm.model.config.layer_norm_epsilon = 1e-3
    second_moments(lm, [1], corpus, tokens, cache_dir=tmp_path, **settings)
    assert len(files(tmp_path) - before) == 1


def test_what_does_not_change_c_does_not_change_its_name(tmp_path):
    lm = tiny_lm("gpt2")
    second_moments(lm, [1], DOCUMENTS, 50, cache_dir=tmp_path)
    before = files(tmp_path)
    lm.parts.mlp_out(1).weight.data[0, 0] += 1  # the matrix itself: its inputs stay
    lm.parts.mlp_out(3).weight.data[0, 0] += 1  # a block above
    lm.tokenizer(
        ["a text", "another text"], truncation=True, max_length=2
    )  # which the tokenizer remembers
    second_moments(lm, [1], DOCUMENTS, 50, cache_dir=tmp_path)
    assert files(tmp_path) == before


class Interrupted:
    """A corpus whose reading stops the program at a document."""

    def __init__(self, at):
        self.at, self.starts = at, []

    def digest(self):
        return "many"

    def documents(self, lm, start):
        self.starts.append(start)
        for number in range(start, 400):
            if number == self.at:
                raise KeyboardInterrupt
            yield f"{number} towers in the city of Rome and {number % 7} bridges"


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    lm, corpus = tiny_lm("gpt2", torch.float64), Interrupted(at=200)
    with pytest.raises(KeyboardInterrupt):
        second_moments(
            lm, [1, 2], corpus, 6000, cache_dir=tmp_path, save_every=0, tokens_per_batch=200
        )
    assert len(list(tmp_path.rglob("*.partial"))) == 1
    corpus.at = None
    resumed = second_moments(lm, [1, 2], corpus, 6000, cache_dir=tmp_path, save_every=0)
    straight = second_moments(lm, [1, 2], Interrupted(at=None), 6000, cache_dir=tmp_path / "other")
    assert corpus.starts[0] == 0 and 100 < corpus.starts[1] < 200
    assert not list(tmp_path.glob("**/*.partial"))
    for layer in (1, 2):
        assert resumed[layer].count == straight[layer].count
        torch.testing.assert_close(
            resumed[layer].matrix_ff, straight[layer].matrix_ff, atol=1e-13, rtol=1e-12
        )


def test_a_damaged_partial_state_is_measured_again(tmp_path, caplog):
    lm, corpus = tiny_lm("gpt2"), Interrupted(at=100)
    with pytest.raises(KeyboardInterrupt):
        second_moments(
            lm, [1], corpus, 3000, cache_dir=tmp_path, save_every=0, tokens_per_batch=100
        )
    next(tmp_path.rglob("*.partial")).write_bytes(b"half a fi")
    corpus.at = None
    second_moments(lm, [1], corpus, 3000, cache_dir=tmp_path)
    assert "measuring from the start" in caplog.text


def test_more_tokens_of_the_same_text_go_on_from_what_was_measured(tmp_path, monkeypatch):
    lm, corpus = tiny_lm("gpt2", torch.float64), Interrupted(at=None)
    moments_of(lm, [1, 2], 500, tmp_path, corpus)
    moments_of(lm, [1], 700, tmp_path, corpus)  # layer 2 does not have it, so both go on from 500
    counted = []
    monkeypatch.setattr(
        MomentPass,
        "add",
        lambda run, batch, add=MomentPass.add: counted.append(batch) or add(run, batch),
    )
    more = moments_of(lm, [1, 2], 1234, tmp_path, corpus)
    assert sum(len(ids) - start for batch in counted for ids, start in batch) == 734
    assert any(
        start for batch in counted for _, start in batch
    )  # 500 tokens ended within a document
    straight = moments_of(lm, [1, 2], 1234, tmp_path / "other", corpus)
    for layer in (1, 2):
        assert more[layer].count == 1234 and more[layer].source == straight[layer].source
        torch.testing.assert_close(
            more[layer].matrix_ff, straight[layer].matrix_ff, atol=1e-13, rtol=1e-12
        )


def test_fewer_tokens_are_not_taken_from_a_longer_measurement(tmp_path):
    lm = tiny_lm("gpt2", torch.float64)
    moments_of(lm, [1], 300, tmp_path)
    keys_nf = naive_keys(lm, 1, DOCUMENTS, 200)
    torch.testing.assert_close(
        moments_of(lm, [1], 200, tmp_path)[1].matrix_ff, keys_nf.T @ keys_nf / 200
    )


def test_a_damaged_shorter_measurement_is_not_gone_on_from(tmp_path, caplog):
    lm = tiny_lm("gpt2")
    moments_of(lm, [1], 100, tmp_path)
    next(tmp_path.rglob("*.safetensors")).write_bytes(b"half a fi")
    assert moments_of(lm, [1], 200, tmp_path)[1].count == 200
    assert "measuring from the start" in caplog.text


def test_a_costly_eigendecomposition_is_kept_beside_c(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(moment_matrix, "_KEPT_FROM", 1)
    lm = tiny_lm("gpt2")
    first = moments_of(lm, [1], 300, tmp_path)[1]
    values_f, vectors_ff = first.eigen()
    kept = first.file.with_suffix(".eigen")
    assert kept.exists()

    def in_another_process():
        monkeypatch.setattr(module, "_MEMORY", OrderedDict())
        return moments_of(lm, [1], 300, tmp_path)[1]

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", never)
        again = in_another_process().eigen()
    assert torch.equal(again[0], values_f) and torch.equal(again[1], vectors_ff)
    SecondMoment(torch.eye(len(values_f), dtype=torch.float64), 300, first.source).save(first.file)
    assert torch.equal(
        in_another_process().eigen()[0], torch.ones_like(values_f)
    )  # what was kept is of another C
    kept.write_bytes(b"half a fi")
    assert torch.equal(in_another_process().eigen()[0], torch.ones_like(values_f))
    assert "computing it again" in caplog.text


def test_an_eigendecomposition_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(moment_matrix, "_KEPT_FROM", 1)
    moment = SecondMoment(2 * torch.eye(3, dtype=torch.float64), file=tmp_path / "gone" / "c")
    assert moment.eigen()[0].tolist() == [2, 2, 2]
    assert "could not be written, the next process computes it again" in caplog.text


# --- sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [5, 128, 300, 2100])
def test_half_of_the_products_is_all_of_them(width):
    keys_nf = torch.randn(
        40, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    total_ff = torch.zeros(width, width, dtype=torch.float64)
    for part_nf in keys_nf.split(15):
        add_outer(total_ff, part_nf)
    torch.testing.assert_close(mirror_(total_ff), keys_nf.T @ keys_nf)
    assert torch.equal(total_ff, total_ff.T)


@pytest.mark.parametrize("batch", [1000, 4000])
def test_rounding_is_that_of_one_batch_however_many_tokens_there_are(batch):
    """Off by less than 1e-6 of sqrt(C_ii C_jj), with keys whose mean is far from zero; largest seen
    2e-7 on four machines' kernels.
    """
    keys_nf = torch.randn(32_000, 64, generator=torch.Generator().manual_seed(0)) + 1.0
    total_ff = torch.zeros(64, 64, dtype=torch.float64)
    for part_nf in keys_nf.split(batch):
        add_outer(total_ff, part_nf)
    exact_ff = keys_nf.double().T @ keys_nf.double()
    scale_f = exact_ff.diagonal().sqrt()
    assert (
        float(((mirror_(total_ff) - exact_ff) / torch.outer(scale_f, scale_f)).abs().max()) < 1e-6
    )


def test_half_precision_keys_do_not_overflow():
    total_ff = torch.zeros(8, 8, dtype=torch.float64)
    add_outer(total_ff, torch.full((100, 8), 200.0, dtype=torch.float16))
    assert torch.equal(total_ff, torch.full((8, 8), 4e6, dtype=torch.float64))


def test_keys_that_are_not_finite_leave_nothing_behind(tmp_path):
    lm = tiny_lm("gpt2")
    lm.parts.mlp_out(0).weight.data[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="keys of layer 1 are not finite"):
        moments_of(lm, [1], 50, tmp_path)
    assert not files(tmp_path)


# --- corpora --------------------------------------------------------------------------------------


def test_a_text_file_is_read_by_paragraphs_or_by_lines(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("One line.\nSame paragraph.\n\nSecond.\n")
    assert list(TextFile(path).documents(None, 0)) == ["One line.\nSame paragraph.", "Second."]
    path.write_text("One.\nTwo.\nThree.\n")
    assert list(TextFile(path).documents(None, 1)) == ["Two.", "Three."]
    path.write_text(" \n")
    with pytest.raises(EngramError, match="holds no text"):
        TextFile(path)
    with pytest.raises(EngramError, match="cannot be read as a text file"):
        TextFile(tmp_path / "nothing")


def test_a_data_set_is_read_in_the_released_order(tmp_path):
    pytest.importorskip("datasets")
    rows = [{"text": f"document {i}", "id": i} for i in range(100)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = DataSet(str(tmp_path))
    wanted = [f"document {i}" for i in shuffled(100, 1)]
    assert list(corpus.documents(None, 0)) == wanted
    assert list(corpus.documents(None, 90)) == wanted[90:]
    with pytest.raises(EngramError, match="has no field 'body'; it has text, id"):
        DataSet(str(tmp_path), field="body").digest()
    with pytest.raises(EngramError, match="cannot be loaded"):
        DataSet(str(tmp_path / "nowhere")).digest()


def test_the_order_is_pythons_shuffle_with_seed_one():
    assert shuffled(1000, 1)[:6] == [852, 836, 280, 575, 208, 609]


def test_sampled_text_can_begin_at_any_document():
    lm, corpus = tiny_lm("gpt2"), SampledText(seed=3, tokens=12, rows_per_batch=4)
    whole = [text for text, _ in zip(corpus.documents(lm, 0), range(10), strict=False)]
    later = [text for text, _ in zip(corpus.documents(lm, 6), range(4), strict=False)]
    assert later == whole[6:]
    assert len(set(whole)) > 5


@pytest.mark.parametrize(("corpus", "digest"), [(None, "wikipedia"), ("sampled", "sampled 0")])
def test_text_in_the_package_is_measured_where_none_is_given(tmp_path, corpus, digest):
    lm = tiny_lm("llama")
    moment = second_moments(lm, [1], corpus, 200, cache_dir=tmp_path)[1]
    assert moment.count == 200 and moment.source["corpus"].startswith(digest)


def test_twenty_tokens_a_neuron_are_measured_by_default(tmp_path, caplog):
    default = second_moments(tiny_lm("gpt2"), [1], DOCUMENTS * 20, cache_dir=tmp_path)[1]
    assert default.count == 20 * len(default.matrix_ff)

    short = second_moments(tiny_lm("gpt2"), [1], ["Rome is in"], cache_dir=tmp_path)[1]
    assert short.count < default.count and "ended after" not in caplog.text  # nobody asked for more


def test_a_corpus_that_ends_early_says_so(tmp_path, caplog):
    moment = second_moments(tiny_lm("gpt2"), [1], ["Rome is in"], 500, cache_dir=tmp_path)[1]
    assert f"ended after {moment.count} of 500" in caplog.text
    with pytest.raises(EngramError, match="no text to measure"):
        second_moments(tiny_lm("gpt2"), [1], Texts(("", "")), 500, cache_dir=tmp_path)


def test_experts_have_no_single_matrix(tmp_path):
    with pytest.raises(UnsupportedModelError, match="mixture of experts"):
        second_moments(tiny_lm("mixtral"), [1], DOCUMENTS, 50, cache_dir=tmp_path)


# --- sampling -------------------------------------------------------------------------------------


def test_sampling_from_one_token_is_greedy_decoding():
    lm = tiny_lm("gpt2")
    (text,) = sample_texts(lm, 1, 8, torch.Generator().manual_seed(0), top_k=1)
    out = lm.model.generate(
        torch.tensor([[0]]),
        attention_mask=torch.ones(1, 1),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=-1,
    )
    assert text == " ".join(lm.tokenizer.decode(out[0, 1:], skip_special_tokens=True).split())


def test_contexts_are_the_same_for_the_same_seed_and_leave_the_global_generator_alone():
    lm = tiny_lm("gpt2")
    state = torch.get_rng_state()
    contexts = sample_contexts(lm, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert contexts == sample_contexts(lm, seed=1) != sample_contexts(lm, seed=2)
    assert contexts[0] == "{}" and len(contexts) == 21
    assert all(each.count("{}") == 1 and each.count("{") == 1 for each in contexts)
    assert all(each.endswith(". {}") for each in contexts[1:])

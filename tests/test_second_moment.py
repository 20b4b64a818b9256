"""C is K^T K / n of the very keys the model computes, however it is batched, resumed or kept."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from engram.editors import second_moment as module
from engram.editors.contexts import sample_contexts
from engram.editors.corpora import DataSet, SampledText, TextFile, Texts, shuffled
from engram.editors.sampling import sample_texts
from engram.editors.second_moment import SecondMoment, load_npz, second_moments
from engram.errors import EditFileError, EngramError, NonFiniteError, UnsupportedModelError
from tests.tiny import DENSE, TEXT, tiny_lm

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
    found = second_moments(lm, [1, 2], DOCUMENTS, 100, cache_dir=tmp_path, batch_tokens=50)
    for layer in (1, 2):
        keys_nf = naive_keys(lm, layer, DOCUMENTS, 100)
        assert found[layer].count == len(keys_nf) == 100
        torch.testing.assert_close(found[layer].matrix_ff, keys_nf.T @ keys_nf / 100, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("family", DENSE)
def test_every_dense_family_has_second_moments(family, tmp_path):
    lm = tiny_lm(family)
    moment = second_moments(lm, [1], DOCUMENTS, 300, cache_dir=tmp_path)[1]
    key_f = torch.randn(len(moment.matrix_ff), generator=torch.Generator().manual_seed(0))
    assert moment.solve(key_f).isfinite().all()


@pytest.mark.parametrize("batch_tokens", [1, 64, 4096])
def test_batching_changes_nothing(batch_tokens, tmp_path):
    lm = tiny_lm("gpt2", torch.float64)
    one = second_moments(lm, [2], DOCUMENTS, 150, cache_dir=tmp_path / "a", batch_tokens=batch_tokens)[2]
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


# --- what is kept ---------------------------------------------------------------------------------------------------------


def test_what_was_measured_before_is_read(tmp_path, monkeypatch):
    lm = tiny_lm("gpt2")
    first = second_moments(lm, [1], DOCUMENTS, 50, cache_dir=tmp_path)[1]
    monkeypatch.setattr(module, "body", lambda lm: pytest.fail("measured again"))
    again = second_moments(lm, [1], DOCUMENTS, 50, cache_dir=tmp_path)[1]
    assert torch.equal(first.matrix_ff, again.matrix_ff) and again.source == first.source and again.count == first.count


def files(folder):
    return {path.name for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize(
    "change", ["weights below", "tokenizer", "corpus", "tokens", "dtype", "tokens per document", "config"]
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
    lm.tokenizer("The tower is in Rome", truncation=True, max_length=2)  # which the tokenizer remembers
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
        second_moments(lm, [1, 2], corpus, 6000, cache_dir=tmp_path, save_every=0)
    assert len(list(tmp_path.rglob("*.partial"))) == 1
    corpus.at = None
    resumed = second_moments(lm, [1, 2], corpus, 6000, cache_dir=tmp_path, save_every=0)
    straight = second_moments(lm, [1, 2], Interrupted(at=None), 6000, cache_dir=tmp_path / "other")
    assert corpus.starts == [0, 192]
    assert not list(tmp_path.glob("**/*.partial"))
    for layer in (1, 2):
        assert resumed[layer].count == straight[layer].count
        torch.testing.assert_close(resumed[layer].matrix_ff, straight[layer].matrix_ff, atol=1e-13, rtol=1e-12)


def test_a_damaged_partial_state_is_measured_again(tmp_path, caplog):
    lm, corpus = tiny_lm("gpt2"), Interrupted(at=100)
    with pytest.raises(KeyboardInterrupt):
        second_moments(lm, [1], corpus, 3000, cache_dir=tmp_path, save_every=0)
    next(tmp_path.rglob("*.partial")).write_bytes(b"half a fi")
    corpus.at = None
    second_moments(lm, [1], corpus, 3000, cache_dir=tmp_path)
    assert "measuring from the start" in caplog.text


def test_save_and_load(tmp_path):
    moment = SecondMoment.from_matrix(torch.eye(3) * 2, 10, {"corpus": "x"})
    moment.save(tmp_path / "c.safetensors")
    again = SecondMoment.load(tmp_path / "c.safetensors")
    assert torch.equal(again.matrix_ff, moment.matrix_ff) and (again.count, again.source) == (10, {"corpus": "x"})
    (tmp_path / "junk").write_text("junk")
    with pytest.raises(EditFileError, match="does not hold a second moment"):
        SecondMoment.load(tmp_path / "junk")


def test_the_released_codes_files_are_read(tmp_path):
    total = np.diag([2.0, 4.0]).astype(np.float32)
    np.savez(
        tmp_path / "c.npz", **{"mom2.mom2": total, "mom2.count": 4, "mom2.constructor": "SecondMoment", "sample_size": 2}
    )
    moment = load_npz(tmp_path / "c.npz")
    assert moment.count == 4 and moment.matrix_ff.diagonal().tolist() == [0.5, 1.0]
    np.savez(tmp_path / "other.npz", a=1)
    with pytest.raises(EditFileError, match="not a statistics file of the released code"):
        load_npz(tmp_path / "other.npz")


# --- solving --------------------------------------------------------------------------------------------------------------


def random_moment(size=12, seed=0):
    keys_nf = torch.randn(5 * size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return SecondMoment.from_matrix(keys_nf.T @ keys_nf / len(keys_nf), len(keys_nf))


def test_solve_inverts_c():
    moment = random_moment()
    key_f = torch.randn(12, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(moment.matrix_ff @ moment.solve(key_f), key_f.double())
    two_fn = torch.stack([key_f, 2 * key_f], 1)
    torch.testing.assert_close(moment.solve(two_fn)[:, 1], 2 * moment.solve(key_f))


def test_ridge_is_relative_to_the_mean_eigenvalue():
    moment, key_f = random_moment(), torch.ones(12)
    shifted = moment.matrix_ff + 0.5 * moment.matrix_ff.diagonal().mean() * torch.eye(12)
    torch.testing.assert_close(moment.solve(key_f, ridge=0.5), torch.linalg.solve(shifted, key_f.double()))


def test_condition_is_the_ratio_of_extreme_eigenvalues():
    moment = random_moment()
    assert moment.condition(steps=500) == pytest.approx(float(torch.linalg.cond(moment.matrix_ff)), rel=1e-3)
    assert moment.condition() <= float(torch.linalg.cond(moment.matrix_ff)) * (1 + 1e-9)


def test_a_singular_c_gets_a_ridge_and_a_warning(caplog):
    moment = SecondMoment.from_matrix(torch.diag(torch.tensor([1.0, 1.0, 0.0])), 2)
    assert moment.solve(torch.ones(3)).isfinite().all()
    assert "singular for d_ff = 3" in caplog.text


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (torch.ones(2, 3), EngramError, r"shape \[d_ff, d_ff\], got \[2, 3\]"),
        (torch.tensor([[1.0, 2.0], [0.0, 1.0]]), EngramError, "differs from its transpose"),
        (torch.full((2, 2), float("nan")), NonFiniteError, "NaN"),
    ],
)
def test_a_matrix_that_is_no_second_moment_is_refused(matrix, error, message):
    with pytest.raises(error, match=message):
        SecondMoment.from_matrix(matrix)


# --- corpora --------------------------------------------------------------------------------------------------------------


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
    lm, corpus = tiny_lm("gpt2"), SampledText(seed=3, tokens=12, batch=4)
    whole = [text for text, _ in zip(corpus.documents(lm, 0), range(10), strict=False)]
    later = [text for text, _ in zip(corpus.documents(lm, 6), range(4), strict=False)]
    assert later == whole[6:]
    assert len(set(whole)) > 5


def test_the_model_samples_its_own_text_where_none_is_given(tmp_path):
    lm = tiny_lm("llama")
    moment = second_moments(lm, [1], tokens=200, cache_dir=tmp_path)[1]
    assert moment.count == 200 and moment.source["corpus"].startswith("sampled 0")
    default = second_moments(tiny_lm("gpt2"), [1], DOCUMENTS * 20, cache_dir=tmp_path)[1]
    assert default.count == 20 * len(default.matrix_ff)


def test_a_corpus_that_ends_early_says_so(tmp_path, caplog):
    moment = second_moments(tiny_lm("gpt2"), [1], ["Rome is in"], 500, cache_dir=tmp_path)[1]
    assert f"ended after {moment.count} of 500" in caplog.text
    with pytest.raises(EngramError, match="no text to measure"):
        second_moments(tiny_lm("gpt2"), [1], Texts(("", "")), 500, cache_dir=tmp_path)


def test_experts_have_no_single_matrix(tmp_path):
    with pytest.raises(UnsupportedModelError, match="mixture of experts"):
        second_moments(tiny_lm("mixtral"), [1], DOCUMENTS, 50, cache_dir=tmp_path)


# --- sampling -------------------------------------------------------------------------------------------------------------


def test_sampling_from_one_token_is_greedy_decoding():
    lm = tiny_lm("gpt2")
    (text,) = sample_texts(lm, 1, 8, torch.Generator().manual_seed(0), top_k=1)
    out = lm.model.generate(
        torch.tensor([[0]]), attention_mask=torch.ones(1, 1), max_new_tokens=8, do_sample=False, eos_token_id=-1
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

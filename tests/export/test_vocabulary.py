from __future__ import annotations

import json
import string

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from itune.export.bundle import export_bundle
from itune.export.graph.builder import Graph
from itune.export.options import ExportOptions
from itune.export.restore import restore_bundle
from itune.export.verify.report import VerificationError
from itune.export.vocabulary import Vocabulary
from itune.loading import LoadedCheckpoint, eager_captioner
from itune.runtime import Captioner
from itune.runtime.bundle import Bundle, TokenSettings
from itune.runtime.engines.base import Candidates
from itune.runtime.engines.native import KERNELS, ClipEncoder
from itune.runtime.errors import BundleError, EngineError, ItuneError
from itune.runtime.settings import TextSettings

BAD_WORDS = [*string.ascii_letters, *string.punctuation, "dog", "hill"]
BEAMS = pytest.mark.parametrize("num_beams", [1, 4])


@pytest.fixture(scope="module")
def tokenizer(language_model):
    return Tokenizer.from_file(str(language_model / "tokenizer.json"))


@pytest.fixture(scope="module")
def tokens(tokenizer):
    return TokenSettings(begin=0, end=0, prompt=[299], vocab_size=tokenizer.get_vocab_size(), max_positions=48)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A file for --vocabulary."""
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text("A dog runs\ngreen grass\n")
    return str(path)


@pytest.fixture(scope="module")
def bundle(onnx_checkpoint, words, tmp_path_factory):
    """A verified fp32 bundle with a shortlist."""
    output = tmp_path_factory.mktemp("bundles") / "few words"
    export_bundle(onnx_checkpoint, output, ExportOptions(vocabulary=words))
    return Bundle.load(output)


@pytest.fixture(scope="module")
def shortlist(bundle):
    return Graph.load(bundle.path("decoder.onnx")).weights["vocabulary.token_ids"].copy()


def beyond_bytes(token_ids, tokenizer):
    """The ids that are not there always."""
    single = {tokenizer.token_to_id(byte) for byte in ByteLevel.alphabet()}
    assert single < set(token_ids.tolist())
    return set(token_ids.tolist()) - single


def spelled(tokenizer, *texts):
    return {token for text in texts for token in tokenizer.encode(text).ids}


def test_words_stand_at_the_start_and_within(tokenizer, tokens):
    text = TextSettings(lower=True, strip_period=True)
    found = Vocabulary(lines=("DOG .", "red shirts")).token_ids(tokenizer, text, tokens)
    assert (np.diff(found) > 0).all()
    expected = spelled(tokenizer, "dog", " dog", "red shirts", " red shirts") | {tokens.end, *tokens.prompt}
    assert beyond_bytes(found, tokenizer) == {token for token in expected if len(tokenizer.id_to_token(token)) > 1}


def test_the_most_frequent_tokens_are_kept(tokenizer, tokens):
    captions = ("the dog the dog", "the dog", "the snow", "green")
    counts: dict[int, int] = {}
    for caption in captions:
        for token in tokenizer.encode(caption).ids:
            counts[token] = counts.get(token, 0) + 1
    by_rank = sorted(counts, key=lambda token: (-counts[token], token))
    for size in (1, 3, 100):
        found = set(Vocabulary(captions, size).token_ids(tokenizer, TextSettings(), tokens).tolist())
        always = {tokens.end, *tokens.prompt} | {tokenizer.token_to_id(byte) for byte in ByteLevel.alphabet()}
        assert found == set(by_rank[:size]) | always


def test_captions_count_as_the_training_saw_them(tokenizer, tokens):
    """After a prompt a caption begins with a space, and its first token is another."""
    found = Vocabulary(("dog",), 9).token_ids(tokenizer, TextSettings(prompt="a"), tokens)
    assert spelled(tokenizer, " dog") <= set(found.tolist())
    plain = Vocabulary(("dog",), 9).token_ids(tokenizer, TextSettings(), tokens)
    assert set(plain.tolist()) != set(found.tolist())


def test_training_captions_are_read_from_the_data(tmp_path):
    lines = [
        {"image": f"{split}.jpg", "captions": [f"a {split} caption"], "split": split} for split in ("train", "dev")
    ]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert Vocabulary.read("7", tmp_path / "captions.jsonl") == Vocabulary(("a train caption",), 7)
    (tmp_path / "words.txt").write_text("dog\n\n a cat \n")
    words = Vocabulary.read(str(tmp_path / "words.txt"), None)
    assert words == Vocabulary(lines=("dog", "a cat"))
    assert words.sha256 != Vocabulary(lines=("dog",)).sha256


def test_decoder_is_cut_down_to_the_shortlist(bundle, shortlist, onnx_checkpoint, tmp_path):
    assert bundle.manifest.tokens.shortlist == len(shortlist) < bundle.manifest.tokens.vocab_size
    weights = Graph.load(bundle.path("decoder.onnx")).weights
    whole = LoadedCheckpoint.load(onnx_checkpoint).language.model.transformer.wte.weight.detach().numpy()
    np.testing.assert_array_equal(weights["transformer.wte.weight"], whole[shortlist])
    card = bundle.path("README.md").read_text()
    assert f"a shortlist of {len(shortlist)} of {len(whole)} tokens" in card
    assert "--restore" not in card


@BEAMS
def test_captions_are_those_of_pytorch_with_these_tokens_only(num_beams, bundle, shortlist, onnx_checkpoint, pixels):
    loaded = LoadedCheckpoint.load(onnx_checkpoint)
    options = {"num_beams": num_beams, "max_new_tokens": 12}
    found = Captioner.load(bundle.folder).caption(list(pixels), **options)
    expected = eager_captioner(loaded, shortlist).caption(list(pixels), **options)
    assert [caption.tokens for caption in found] == [caption.tokens for caption in expected]
    assert [c.score for c in found] == pytest.approx([c.score for c in expected], abs=1e-4)
    whole = eager_captioner(loaded).caption(list(pixels), **options)
    assert [caption.tokens for caption in found] != [caption.tokens for caption in whole]
    written = {token for caption in found for token in caption.tokens}
    assert written <= set(shortlist.tolist())
    assert len(written) > 5


@pytest.mark.parametrize("engine", [*(["native"] if KERNELS else []), "onnxruntime"])
def test_penalties_and_bans_follow_the_ids_of_the_whole_vocabulary(engine, bundle, shortlist, onnx_checkpoint, pixels):
    captioner = Captioner.load(bundle.folder, engine=engine)
    eager = eager_captioner(LoadedCheckpoint.load(onnx_checkpoint), shortlist)
    options = {"num_beams": 3, "max_new_tokens": 10, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    free, found, expected = (
        each.caption(list(pixels), bad_words=words, **options)
        for each, words in ((captioner, []), (captioner, BAD_WORDS), (eager, BAD_WORDS))
    )
    assert [caption.tokens for caption in found] != [caption.tokens for caption in free]
    assert [caption.tokens for caption in found] == [caption.tokens for caption in expected]


@pytest.mark.skipif(not KERNELS, reason="not compiled")
def test_a_clip_tower_runs_natively_too(clip_checkpoint, words, tmp_path, pixels):
    export_bundle(clip_checkpoint, tmp_path / "b", ExportOptions(vocabulary=words, verify=False))
    captioner = Captioner.load(tmp_path / "b", engine="native")
    assert isinstance(captioner.engine.encode, ClipEncoder)
    shortlist = Graph.load(tmp_path / "b" / "decoder.onnx").weights["vocabulary.token_ids"].copy()
    eager = eager_captioner(LoadedCheckpoint.load(clip_checkpoint), shortlist)
    found, expected = (each.caption(list(pixels), num_beams=3, max_new_tokens=10) for each in (captioner, eager))
    assert [caption.tokens for caption in found] == [caption.tokens for caption in expected]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_equal_logits_come_in_order_of_the_id(precision, onnx_checkpoint, words, tmp_path, monkeypatch):
    build = export_bundle.__globals__["build_decoder"]

    def same_rows(model, vocabulary, **options):
        model.language_model.transformer.wte.weight.data[:] = model.language_model.transformer.wte.weight[7]
        return build(model, vocabulary, **options)

    monkeypatch.setitem(export_bundle.__globals__, "build_decoder", same_rows)
    export_bundle(onnx_checkpoint, tmp_path / "b", ExportOptions(precision=precision, vocabulary=words, verify=False))
    engine = Captioner.load(tmp_path / "b").engine
    state = engine.encode(np.zeros((1, 32, 32, 3), np.uint8))
    found = engine.step(np.array([[0]]), np.array([0]), state, 10**6)
    logits, ids = found.logits[0], found.token_ids[0]
    weights = Graph.load(tmp_path / "b" / "decoder.onnx").weights
    np.testing.assert_array_equal(np.sort(ids), weights["vocabulary.token_ids"])
    # Kernels may sum a matrix's last columns in another order than the first: nearly all are equal.
    assert np.unique(logits).size <= 3
    np.testing.assert_array_equal(ids, ids[np.lexsort((ids, -logits))])


def test_int8_keeps_the_rows_of_the_whole_model(onnx_checkpoint, words, tmp_path, pixels):
    for name, vocabulary in (("whole", None), ("part", words)):
        options = ExportOptions(precision="int8", vocabulary=vocabulary, verify=False)
        export_bundle(onnx_checkpoint, tmp_path / name, options)
    whole, part = (Captioner.load(tmp_path / name).engine for name in ("whole", "part"))
    found: list[Candidates] = []
    for engine in (whole, part):
        state = engine.encode(pixels[:2])
        found.append(engine.step(np.array([[0], [0]]), np.array([0, 1]), state, 10**6))
    for row in range(2):
        logits = dict(zip(found[0].token_ids[row].tolist(), found[0].logits[row].tolist(), strict=True))
        expected = [logits[token] for token in found[1].token_ids[row].tolist()]
        np.testing.assert_allclose(found[1].logits[row], expected, atol=1e-5)
        assert found[1].logsumexp[row] == pytest.approx(np.logaddexp.reduce(found[1].logits[row]), abs=1e-4)


def test_a_token_outside_the_shortlist_is_an_error(bundle, shortlist):
    engine = Captioner.load(bundle.folder).engine
    state = engine.encode(np.zeros((1, 32, 32, 3), np.uint8))
    outside = next(i for i in range(bundle.manifest.tokens.vocab_size) if i not in shortlist)
    with pytest.raises(EngineError):
        engine.step(np.array([[outside]]), np.array([0]), state, 1)


def test_wrong_ids_are_found(onnx_checkpoint, words, tmp_path, monkeypatch):
    build = export_bundle.__globals__["build_decoder"]

    def wrong(model, vocabulary, **options):
        graph = build(model, vocabulary, **options)
        graph.weights["vocabulary.token_ids"] = np.append(vocabulary[:-1], vocabulary[-1] + 1)
        return graph

    monkeypatch.setitem(export_bundle.__globals__, "build_decoder", wrong)
    with pytest.raises(VerificationError) as error:
        export_bundle(onnx_checkpoint, tmp_path / "b", ExportOptions(vocabulary=words))
    assert "token_ids" in str(error.value)


def test_a_shortlisted_bundle_is_not_restored(bundle, tmp_path):
    with pytest.raises(BundleError) as error:
        restore_bundle(bundle.folder, tmp_path / "restored")
    assert "few words" in str(error.value)
    assert "--vocabulary" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wanted", ["0", "500", "words.txt", "empty.txt", "photo.jpg"])
def test_refusals(wanted, tmp_path, monkeypatch):
    """No tokens, no captions, no file, no words, no text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ItuneError) as error:
        Vocabulary.read(wanted, None)
    assert wanted in str(error.value)
    assert "--vocabulary" in str(error.value)

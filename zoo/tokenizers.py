"""Text to token ids and back: bytes, byte-level BPE, GPT-2's vocabulary, and local Hugging Face tokenizers.

A tokenizer is a value: two that encode alike have the same `fingerprint`, whatever files they came from, and one file
`tokenizer.json` (our own format, self-contained) holds all of it. BPE is trained by `tokenizers` and run by `tiktoken`.
"""

import base64
import binascii
import hashlib
import json
import os
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tn.errors import unknown
from zoo.tokenizer_base import FILE, FORMAT, VERSION, Tokenizer, TokenizerError, json_object, utf8

if TYPE_CHECKING:
    import tiktoken
    import tokenizers

END_OF_TEXT = "<|endoftext|>"

# GPT-2's split into words, in tiktoken's faster form. `tokenizers`' ByteLevel uses GPT-2's own form; the two differ only in
# characters that one of their regex engines does not know yet, because its Unicode version is older.
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# The files tiktoken downloads for "gpt2", and their sha256 (tiktoken_ext.openai_public).
_GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
_GPT2_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
_NAMES = ("bpe:N", "bytes", "gpt2", "gpt2:PATH", "hf:PATH")
# The vocabularies of tokenizers that transformers makes a tokenizer.json of.
_OLDER_FILES = ("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.spm", "*.tiktoken", "bpe.codes")
_END_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[EOS]")


@dataclass(frozen=True, repr=False)
class ByteTokenizer(Tokenizer):
    """Tokens that are byte strings: plain bytes, or byte-level BPE, whose ids are also its merge ranks.

    Attributes:
        name: see Tokenizer.
        tokens: the bytes of ids 0, 1, …; all 256 single bytes are among them.
        pattern: regex that splits text into words before merging; None for plain bytes.
        specials: names of the ids that follow.
        ending: which of `specials` is end-of-text.
    """

    name: str
    tokens: tuple[bytes, ...]
    pattern: str | None
    specials: tuple[str, ...] = (END_OF_TEXT,)
    ending: str | None = END_OF_TEXT

    def __post_init__(self) -> None:
        known = set(self.tokens)
        if len(known) != len(self.tokens) or not known.issuperset(bytes([byte]) for byte in range(256)):
            raise TokenizerError(f"tokenizer {self.name!r} needs each of the 256 single bytes, and every token only once")
        if self.ending is not None and self.ending not in self.specials:
            raise TokenizerError(unknown("end-of-text token", self.ending, self.specials))

    @property
    def vocab(self) -> int:  # type: ignore[override]
        return len(self.tokens) + len(self.specials)

    @property
    def end_of_text(self) -> int | None:  # type: ignore[override]
        return None if self.ending is None else len(self.tokens) + self.specials.index(self.ending)

    @cached_property
    def token_bytes(self) -> NDArray[np.int64]:
        return np.array([len(token) for token in self.tokens] + [0] * len(self.specials), dtype=np.int64)

    @cached_property
    def _encoding(self) -> "tiktoken.Encoding":
        import tiktoken  # late: only a BPE that encodes needs it

        ranks = {token: rank for rank, token in enumerate(self.tokens)}
        return tiktoken.Encoding(self.name, pat_str=self.pattern or "", mergeable_ranks=ranks, special_tokens={})

    @cached_property
    def _pieces(self) -> tuple[bytes, ...]:
        return self.tokens + tuple(name.encode() for name in self.specials)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        raw = [utf8(text) for text in texts]
        if self.pattern is None:
            return [np.frombuffer(text, dtype=np.uint8).astype(np.int32) for text in raw]
        if len(texts) == 1:
            return [np.array(self._encoding.encode_ordinary(texts[0]), dtype=np.int32)]
        threads = min(8, len(texts), os.cpu_count() or 1)
        return [np.array(ids, dtype=np.int32) for ids in self._encoding.encode_ordinary_batch(list(texts), num_threads=threads)]

    def decode_bytes(self, ids: ArrayLike) -> bytes:
        return b"".join(self._pieces[token] for token in self._ids(ids))

    def _state(self) -> dict[str, object]:
        tokens = [base64.b64encode(token).decode() for token in self.tokens]
        return {
            "kind": "bytes",
            "pattern": self.pattern,
            "specials": list(self.specials),
            "end_of_text": self.ending,
            "tokens": tokens,
        }


@dataclass(frozen=True, repr=False)
class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` package, run by it. Special tokens are not added and not read from text.

    Attributes:
        name: see Tokenizer.
        source: the text of its Hugging Face tokenizer.json.
        ending: its end-of-text token, or None.
    """

    name: str
    source: str
    ending: str | None = None

    def __post_init__(self) -> None:
        if not self._runner.get_vocab(with_added_tokens=False):
            raise TokenizerError(f"tokenizer {self.name!r} has an empty vocabulary: it can encode no text")
        if self.ending is not None and self._runner.token_to_id(self.ending) is None:
            raise TokenizerError(f"tokenizer {self.name!r} has no token {self.ending!r} to end a text with")

    @cached_property
    def _runner(self) -> "tokenizers.Tokenizer":
        import tokenizers  # late: a heavy binary module

        try:
            runner = tokenizers.Tokenizer.from_buffer(self.source.encode())
        except ValueError as error:
            raise TokenizerError(f"tokenizer {self.name!r} cannot be read: {error}") from error
        runner.no_truncation()
        runner.no_padding()
        runner.encode_special_tokens = True
        return runner

    @cached_property
    def vocab(self) -> int:  # type: ignore[override]
        return max(self._runner.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def end_of_text(self) -> int | None:  # type: ignore[override]
        return None if self.ending is None else self._runner.token_to_id(self.ending)

    @cached_property
    def token_bytes(self) -> NDArray[np.int64]:
        sizes = np.zeros(self.vocab, dtype=np.int64)
        byte_level = '"ByteLevel"' in json.dumps(json.loads(self.source).get("decoder"))
        added = self._runner.get_added_tokens_decoder()
        for token, index in self._runner.get_vocab(with_added_tokens=True).items():
            if index in added:
                sizes[index] = 0 if added[index].special else len(token.encode())
            elif byte_level:
                sizes[index] = len(token)  # one character stands for one byte
            elif token.startswith("<0x") and token.endswith(">") and len(token) == 6:
                sizes[index] = 1
            else:
                sizes[index] = len(token.removeprefix("##").replace("▁", " ").encode())
        return sizes

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        for text in texts:
            utf8(text)
        return [np.array(found.ids, dtype=np.int32) for found in self._runner.encode_batch(list(texts), add_special_tokens=False)]

    def decode_bytes(self, ids: ArrayLike) -> bytes:
        return self._runner.decode(self._ids(ids), skip_special_tokens=False).encode()

    def _state(self) -> dict[str, object]:
        return {"kind": "huggingface", "end_of_text": self.ending, "tokenizer": json.loads(self.source)}


def tokenizer_names() -> tuple[str, ...]:
    """The forms of name that `tokenizer` takes."""
    return _NAMES


def tokenizer(name: str, *, documents: Callable[[], Iterable[str]] | None = None) -> Tokenizer:
    """The tokenizer of a name.

    Args:
        name: "bytes" (256 bytes and end-of-text) | "bpe:N" (byte-level BPE of at most N ids, the last is end-of-text) | "gpt2"
            (downloaded once, by tiktoken) | "gpt2:PATH" (a folder with vocab.json and merges.txt, or encoder.json and
            vocab.bpe) | "hf:PATH" (a folder or a tokenizer.json of Hugging Face).
        documents: for "bpe:N", a function that gives an iterator over the texts to train on.

    Raises:
        TokenizerError: an unknown name, a bad N, missing or damaged files, no network, no documents.

    >>> tokenizer("bytes").vocab
    257
    """
    kind, _, rest = name.partition(":")
    if name == "bytes":
        return ByteTokenizer(name, tuple(bytes([byte]) for byte in range(256)), pattern=None)
    if kind == "bpe" and rest:
        size = bpe_size(name)
        if documents is None:
            raise TokenizerError(f"tokenizer {name!r} is trained: give the documents to train it on, or load a saved one")
        return _trained(name, size, documents())
    if name == "gpt2":
        return _from_gpt2_files(name, *_gpt2_download())
    if kind == "gpt2" and rest:
        return _from_gpt2_folder(name, Path(rest).expanduser())
    if kind == "hf" and rest:
        return _from_hugging_face(name, Path(rest).expanduser())
    raise TokenizerError(unknown("tokenizer", name, _NAMES))


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer:
    """Read what `Tokenizer.save` wrote.

    Args:
        directory: the folder, or the tokenizer.json itself.

    Raises:
        TokenizerError: missing, damaged, of another format or from a later version; names the file.
    """
    path = Path(directory)
    path = path / FILE if path.is_dir() else path
    document = json_object(path)
    if document.get("format") != FORMAT:
        raise TokenizerError(f"{path} is not in this library's tokenizer format; if Hugging Face wrote it, name it 'hf:{path}'")
    if document.get("version") != VERSION:
        raise TokenizerError(f"{path} has tokenizer format version {document.get('version')}; this library reads version {VERSION}")
    try:
        loaded = _from_state(document)
    except (KeyError, TypeError, AttributeError, binascii.Error) as error:
        raise TokenizerError(f"{path} is damaged: {type(error).__name__} {error}") from error
    if loaded.fingerprint != document.get("fingerprint"):
        raise TokenizerError(f"{path} is damaged: its contents do not match its fingerprint")
    return loaded


def reachable(url: str, seconds: float = 5.0) -> bool:
    """Whether a web address answers within some seconds, name resolution included (which has no time-out of its own)."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds).close()
        except urllib.error.HTTPError:
            pass  # it answered
        except OSError:
            return
        answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


def _from_state(document: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a saved document."""
    name, kind = document["name"], document["kind"]
    if kind == "huggingface":
        return HuggingFaceTokenizer(name, json.dumps(document["tokenizer"], ensure_ascii=False), document["end_of_text"])
    if kind != "bytes":
        raise TokenizerError(unknown("kind of tokenizer", kind, ("bytes", "huggingface")))
    tokens = tuple(base64.b64decode(token, validate=True) for token in document["tokens"])
    return ByteTokenizer(name, tokens, document["pattern"], tuple(document["specials"]), document["end_of_text"])


def bpe_size(name: str) -> int:
    """N of "bpe:N".

    Raises:
        TokenizerError: not a whole number from 257 (all bytes and end-of-text) to 1000000.
    """
    text = name.partition(":")[2]
    if not text.isascii() or not text.isdigit() or not 257 <= int(text) <= 1_000_000:
        raise TokenizerError(f"tokenizer {name!r}: N of 'bpe:N' must be a whole number from 257 to 1000000, got {text!r}")
    return int(text)


def _trained(name: str, size: int, documents: Iterable[str]) -> ByteTokenizer:
    """Train a byte-level BPE; ids are bytes, then merges in the order learnt, then end-of-text."""
    merges = json.loads(_train(size - 1, documents).to_str())["model"]["merges"]
    tokens = dict.fromkeys(bytes([byte]) for byte in range(256))
    # A token that two merges make keeps the rank of the first.
    tokens.update(dict.fromkeys(_token_bytes("".join(pair).replace(" ", "")) for pair in merges))
    return ByteTokenizer(name, tuple(tokens), _GPT2_PATTERN)


def _train(size: int, documents: Iterable[str]) -> "tokenizers.Tokenizer":
    """The `tokenizers` package's own byte-level BPE of at most `size` tokens. Deterministic."""
    import tokenizers  # late: a heavy binary module

    runner = tokenizers.Tokenizer(tokenizers.models.BPE())
    runner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    runner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    runner.train_from_iterator(_counted(documents), trainer)
    return runner


def _counted(documents: Iterable[str]) -> Iterator[str]:
    """The documents that have text; refuses none at all."""
    count = 0
    for text in documents:
        if text:
            utf8(text)
            count += 1
            yield text
    if count == 0:
        raise TokenizerError("there is no text to train a tokenizer on")


def _gpt2_download() -> tuple[bytes, bytes]:
    """encoder.json and vocab.bpe, from tiktoken's cache or through tiktoken from the network."""
    import tiktoken.load  # late, and the only place that downloads

    found = []
    for file, sha256 in _GPT2_FILES.items():
        cached = _tiktoken_cache(_GPT2_URL + file)
        if cached is not None and cached.exists():
            if hashlib.sha256(cached.read_bytes()).hexdigest() != sha256:
                raise TokenizerError(f"{cached}, tiktoken's copy of GPT-2's {file}, is damaged: delete it to download it again")
        elif not reachable(_GPT2_URL + file):
            raise TokenizerError(_offline_gpt2(f"{_GPT2_URL} does not answer"))
        try:
            found.append(tiktoken.load.read_file_cached(_GPT2_URL + file, sha256))
        except (OSError, ValueError) as error:
            raise TokenizerError(_offline_gpt2(str(error))) from error
    return found[0], found[1]


def _offline_gpt2(reason: str) -> str:
    return (
        f"GPT-2's vocabulary cannot be downloaded ({reason}): name a local folder that has vocab.json and merges.txt (or encoder.json "
        "and vocab.bpe) as 'gpt2:PATH', or set TIKTOKEN_CACHE_DIR to a folder where tiktoken has stored it before"
    )


def _tiktoken_cache(url: str) -> Path | None:
    """Where tiktoken keeps its copy of an address; None when it is told to keep none."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if folder is None:
        folder = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    return Path(folder) / hashlib.sha1(url.encode()).hexdigest() if folder else None


def _from_gpt2_folder(name: str, folder: Path) -> ByteTokenizer:
    """A tokenizer in the two-file format of GPT-2, under either pair of names."""
    if not folder.is_dir():
        raise TokenizerError(f"tokenizer {name!r}: {folder} is not a folder")
    for vocabulary, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (folder / vocabulary).is_file() and (folder / merges).is_file():
            return _from_gpt2_files(name, (folder / vocabulary).read_bytes(), (folder / merges).read_bytes())
    raise TokenizerError(f"tokenizer {name!r}: {folder} has neither vocab.json and merges.txt nor encoder.json and vocab.bpe")


def _from_gpt2_files(name: str, vocabulary: bytes, merges: bytes) -> ByteTokenizer:
    """A byte-level BPE from GPT-2's vocabulary ({token: id}) and merges (one pair a line, in order of rank)."""
    try:
        ids = json.loads(vocabulary)
        lines = merges.decode().splitlines()
    except ValueError as error:
        raise TokenizerError(f"tokenizer {name!r}: its vocabulary or merges cannot be read: {error}") from error
    if not isinstance(ids, dict) or not all(isinstance(index, int) for index in ids.values()):
        raise TokenizerError(f"tokenizer {name!r}: its vocabulary must be a JSON object of whole numbers")
    pairs = [line for line in lines if line and not line.startswith("#version")]
    merged = dict.fromkeys(pair.replace(" ", "", 1) for pair in pairs)
    missing = [token for token in [*_byte_characters(), *merged] if token not in ids]
    if missing:
        raise TokenizerError(
            f"tokenizer {name!r}: {len(missing)} tokens of its merges are not in its vocabulary, the first is {missing[0]!r}"
        )
    ordinary = sorted([*_byte_characters(), *merged], key=ids.__getitem__)
    specials = sorted(set(ids) - set(ordinary), key=ids.__getitem__)
    if [ids[token] for token in [*ordinary, *specials]] != list(range(len(ids))):
        raise TokenizerError(f"tokenizer {name!r}: its ids must be 0 to {len(ids) - 1}, special tokens last; try 'hf:PATH'")
    if [token for token in ordinary if token in merged] != list(merged):
        raise TokenizerError(f"tokenizer {name!r}: its ids are not in the order of its merges; try 'hf:PATH'")
    ending = END_OF_TEXT if END_OF_TEXT in specials else None
    return ByteTokenizer(name, tuple(map(_token_bytes, ordinary)), _GPT2_PATTERN, tuple(specials), ending)


def _from_hugging_face(name: str, path: Path) -> HuggingFaceTokenizer:
    """A tokenizer from a Hugging Face folder or its tokenizer.json."""
    if not path.exists():
        raise TokenizerError(f"tokenizer {name!r}: {path} does not exist; 'hf:PATH' takes a local folder or a tokenizer.json")
    folder = path if path.is_dir() else path.parent
    file = path / FILE if path.is_dir() else path
    if file.is_file():
        document = json_object(file)
        if document.get("format") == FORMAT:
            raise TokenizerError(f"{file} is this library's own tokenizer, not Hugging Face's: read it with zoo.load_tokenizer")
        source = json.dumps(document, ensure_ascii=False)
    else:
        source = _converted(name, folder)
    plain = HuggingFaceTokenizer(name, source)
    names = [token for token in (_declared_ending(folder), *_END_NAMES) if token is not None]
    return replace(plain, ending=next((token for token in names if plain._runner.token_to_id(token) is not None), None))


def _converted(name: str, folder: Path) -> str:
    """The tokenizer.json of a folder that has only older files, made by transformers."""
    if not any(file.match(pattern) for pattern in _OLDER_FILES for file in folder.iterdir()):
        # transformers would make a tokenizer without a single word out of the model's config.json alone.
        looked = ", ".join(_OLDER_FILES)
        raise TokenizerError(f"tokenizer {name!r}: {folder} has no tokenizer.json, and transformers cannot make one: no {looked} is there")
    import transformers  # late: seconds to import, and only older folders need it

    try:
        loaded = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        return loaded.backend_tokenizer.to_str()
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise TokenizerError(f"tokenizer {name!r}: {folder} has no tokenizer.json, and transformers cannot make one: {reason}") from error


def _declared_ending(folder: Path) -> str | None:
    """The end-of-text token that a folder's own settings name."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / file).is_file():
            token = json_object(folder / file).get("eos_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                return token
    return None


def _byte_characters() -> dict[str, int]:
    """The printable character that stands for each byte in GPT-2's files (encoder.py of the GPT-2 release)."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF = _byte_characters()


def _token_bytes(token: str) -> bytes:
    """The bytes of a token as GPT-2's files spell it."""
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError as error:
        raise TokenizerError(f"token {token!r} is not byte-level BPE: {error.args[0]!r} stands for no byte") from error

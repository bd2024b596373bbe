"""The token cache: whole or absent, by value, safe between processes, and honest when it is damaged."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from train.data import DataError, HubUnreachable, default_cache_dir, prepare, prepare_main
from train.data import cache as module
from train.data import store as store_module
from train.data.documents import Source, split_documents
from train.data.sources import source
from zoo.tokenizers import Tokenizer, TokenizerError, load_tokenizer, tokenizer

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"Document {index}: the cat sat on mat number {index % 7}, and the naïve dog saw it.\n" * (1 + index % 5) for index in range(120)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of text files."""
    made = tmp_path / "text"
    made.mkdir()
    for index, text in enumerate(TEXTS):
        (made / f"{index:03}.txt").write_text(text)
    return made


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def files_of(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in sorted(cache.rglob("*")) if path.is_file()}


def only(cache: Path, kind: str = "tokens") -> Path:
    (found,) = [path for path in (cache / kind).iterdir() if path.is_dir()]
    return found


def documents_of(ids: np.ndarray, coder: Tokenizer) -> list[str]:
    ends = np.flatnonzero(ids == coder.end_of_text)
    assert ends[-1] == len(ids) - 1
    return [coder.decode(part[:-1]) for part in np.split(ids, ends + 1)[:-1]]


@pytest.mark.parametrize("name", ["bytes", "bpe:400"])
def test_tokens_are_the_documents(folder, cache, name):
    corpus = prepare(f"text:{folder}", name, cache_dir=cache)
    coder = corpus.tokenizer
    sides = list(split_documents(TEXTS))
    for side, ids in (("train", corpus.train), ("val", corpus.val)):
        assert documents_of(ids, coder) == [text for found, text in sides if found == side]
        assert int(coder.token_bytes[ids].sum()) == corpus.summary.bytes[side]
        assert corpus.summary.tokens[side] == len(ids)
        assert corpus.summary.documents[side] == sum(found == side for found, _ in sides)
    assert corpus.train.dtype == np.uint16
    assert not corpus.train.flags.writeable
    assert corpus.fingerprint == source(f"text:{folder}").fingerprint()
    assert not corpus.summary.reused
    shown = str(corpus.summary)
    assert name in shown
    assert f"{len(corpus.train):,} tokens" in shown
    assert json.loads(json.dumps(corpus.summary.to_dict()))["corpus"] == corpus.fingerprint


def test_a_second_time_nothing_is_written(folder, cache, monkeypatch):
    first = prepare(f"text:{folder}", "bpe:400", cache_dir=cache)
    before = files_of(cache)
    monkeypatch.setattr(module, "_write_tokens", lambda *args: pytest.fail("tokenised again"))
    monkeypatch.setattr(module, "tokenizer", lambda *args, **kwargs: pytest.fail("trained again"))
    again = prepare(f"text:{folder}", "bpe:400", cache_dir=cache)
    saved = prepare(f"text:{folder}", first.tokenizer, cache_dir=cache)
    assert files_of(cache) == before
    assert again.summary.reused
    assert saved.summary.reused
    assert np.array_equal(again.train, first.train)
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint


def test_the_key_is_the_value(folder, cache, tmp_path):
    first = prepare(f"text:{folder}", "bytes", cache_dir=cache)
    moved = folder.rename(tmp_path / "moved")
    same = prepare(f"text:{moved}", "bytes", cache_dir=cache)
    assert same.summary.folder == first.summary.folder
    assert same.summary.data == f"text:{moved}"
    (moved / "000.txt").write_text("changed")
    changed = prepare(f"text:{moved}", "bytes", cache_dir=cache)
    assert changed.summary.folder != first.summary.folder
    assert changed.fingerprint != first.fingerprint
    assert prepare(f"text:{moved}", "bpe:300", cache_dir=cache).summary.folder != changed.summary.folder


def test_wide_vocabularies_take_32_bits(cache, folder, monkeypatch):
    class Wide(type(tokenizer("bytes"))):
        vocab = 70_000
        end_of_text = 69_999

    coder = tokenizer("bytes")
    corpus = prepare(f"text:{folder}", Wide("wide", coder.tokens, None), cache_dir=cache)
    assert corpus.train.dtype == np.uint32
    assert corpus.train.max() == 69_999


# Damage


@pytest.mark.parametrize("kind", ["tokens", "tokenizers"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "no manifest", "half a manifest", "strange manifest"])
def test_a_damaged_cache_is_named_moved_aside_and_made_again(folder, cache, capsys, kind, damage):
    first = prepare(f"text:{folder}", "bpe:400", cache_dir=cache)
    tokens = np.array(first.train)
    broken = only(cache, kind)
    victim = broken / {"tokens": "train.bin", "tokenizers": "tokenizer.json"}[kind]
    if damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:100])
    elif damage == "missing":
        victim.unlink()
    elif damage == "no manifest":
        (broken / "manifest.json").unlink()
    else:
        (broken / "manifest.json").write_text('{"files"' if damage == "half a manifest" else '{"files": 3}')
    before = {path.name: path.read_bytes() for path in broken.iterdir()}
    again = prepare(f"text:{folder}", "bpe:400", cache_dir=cache)
    aside = broken.with_name(f"{broken.name}.damaged-1")
    message = capsys.readouterr().err
    assert f"cache {broken} is damaged: " in message
    assert f"moved to {aside.name} and prepared again" in message
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == before
    assert np.array_equal(again.train, tokens)
    if damage == "truncated" and kind == "tokens":
        assert f"train.bin has 100 bytes, not {2 * len(tokens)}" in message


def test_a_tokenizer_damaged_inside_is_refused(folder, cache):
    prepare(f"text:{folder}", "bpe:400", cache_dir=cache)
    path = only(cache, "tokenizers") / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"bytes", b"bytez"))  # the same length
    with pytest.raises(TokenizerError, match="unknown kind of tokenizer"):
        prepare(f"text:{folder}", "bpe:400", cache_dir=cache)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), DataError("no")])
def test_an_interrupted_build_leaves_nothing(folder, cache, monkeypatch, error):
    real, calls = module._groups, []

    def failing(documents):
        for group in real(documents):
            yield group
            calls.append(group)
            raise error

    monkeypatch.setattr(module, "_groups", failing)
    monkeypatch.setattr(module, "_GROUP", 1000)
    kind = DataError if isinstance(error, OSError) else type(error)
    with pytest.raises(kind, match=r"No space left on device|no|^$"):
        prepare(f"text:{folder}", "bytes", cache_dir=cache)
    assert calls
    assert [path.name for path in (cache / "tokens").iterdir() if path.is_dir()] == []
    monkeypatch.setattr(module, "_groups", real)
    assert not prepare(f"text:{folder}", "bytes", cache_dir=cache).summary.reused


def test_a_cache_folder_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot be written: (File exists|Not a directory)"):
        prepare(f"text:{folder}", "bytes", cache_dir=tmp_path / "file")


def test_without_locks_the_first_to_finish_wins(folder, cache, monkeypatch):
    """Where a file system has no locks, a build that finds the folder made meanwhile uses that one."""

    def refuse(file, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(store_module.fcntl, "flock", refuse)
    real = module._write_tokens

    def slow(*args):
        monkeypatch.setattr(module, "_write_tokens", real)
        prepare(f"text:{folder}", "bytes", cache_dir=cache)  # another process, in the middle of this one
        return real(*args)

    monkeypatch.setattr(module, "_write_tokens", slow)
    assert prepare(f"text:{folder}", "bytes", cache_dir=cache).summary.reused
    assert [path.name for path in (cache / "tokens").iterdir() if path.is_dir()] == [only(cache).name]


# Processes

_PREPARE = """
import sys, time
from train.data import cache
real = cache._groups
def slow(documents):
    for group in real(documents):
        print("working", flush=True)
        time.sleep(float(sys.argv[3]))
        yield group
cache._groups, cache._GROUP = slow, 2000
corpus = cache.prepare(sys.argv[1], "bpe:400", cache_dir=sys.argv[2])
print("reused" if corpus.summary.reused else "made", len(corpus.train), int(corpus.train.sum()))
"""


def start(folder: Path, cache: Path, pause: float) -> subprocess.Popen:
    command = [sys.executable, "-c", _PREPARE, f"text:{folder}", str(cache), str(pause)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_at_once(folder, cache):
    processes = [start(folder, cache, 0.03) for _ in range(2)]
    answers = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], answers
    last = [out.splitlines()[-1].split() for out, _ in answers]
    assert sorted(words[0] for words in last) == ["made", "reused"]
    assert last[0][1:] == last[1][1:]
    assert len([path for path in (cache / "tokens").iterdir() if path.is_dir()]) == 1


def test_a_killed_process_leaves_nothing_that_counts(folder, tmp_path):
    ways = (signal.SIGKILL, signal.SIGINT)
    processes = {how: start(folder, tmp_path / how.name, 30) for how in ways}
    for how, process in processes.items():
        tokens = tmp_path / how.name / "tokens"
        assert process.stdout.readline() == "working\n"
        (held,) = [path.name for path in tokens.iterdir() if path.is_dir()]
        assert held.startswith(".")
        process.send_signal(how)
        process.communicate(timeout=30)
        assert process.returncode != 0
        corpus = prepare(f"text:{folder}", "bpe:400", cache_dir=tokens.parent)
        assert not corpus.summary.reused
        # What the killed process had written is gone too.
        assert [path.name for path in tokens.iterdir() if path.is_dir()] == [Path(corpus.summary.folder).name]


def test_a_waiting_process_says_so(folder, cache, capsys):
    key = {"format": 1, "source": source(f"text:{folder}").fingerprint(), "tokenizer": tokenizer("bytes").fingerprint}
    folder_name = store_module.folder_name(key)
    (cache / "tokens").mkdir(parents=True)
    entered = threading.Event()

    def hold() -> None:
        with store_module._lock(cache / "tokens" / folder_name):
            entered.set()
            time.sleep(0.5)

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait()
    corpus = prepare(f"text:{folder}", "bytes", cache_dir=cache)
    thread.join()
    assert Path(corpus.summary.folder).name == folder_name
    assert "waiting for another process" in capsys.readouterr().err


# nanoGPT's files


def test_bin(tmp_path, cache):
    coder = tokenizer("bytes")
    ids = np.concatenate([[*coder.encode(text), 256] for text in TEXTS]).astype("<u2")
    (tmp_path / "train.bin").write_bytes(ids.tobytes())
    (tmp_path / "val.bin").write_bytes(ids[:500].tobytes())
    corpus = prepare(f"bin:{tmp_path}", "bytes", cache_dir=cache)
    assert np.array_equal(corpus.train, ids)
    assert corpus.summary.tokens == {"train": len(ids), "val": 500}
    assert corpus.summary.bytes["train"] == sum(len(text.encode()) for text in TEXTS)
    assert corpus.summary.documents is None
    assert "token ids, ready made" in str(corpus.summary)
    assert not cache.exists()
    with pytest.raises(DataError, match=r"so no 'bpe:400' can be trained on it: name the tokenizer that made them, e\.g\. 'gpt2'"):
        prepare(f"bin:{tmp_path}", "bpe:400", cache_dir=cache)
    (tmp_path / "val.bin").write_bytes(np.array([1, 300], dtype="<u2").tobytes())
    with pytest.raises(DataError, match=r"val\.bin has token 300, but tokenizer 'bytes' has only 257 ids"):
        prepare(f"bin:{tmp_path}", "bytes", cache_dir=cache)


# A hub that does not answer


class Hub(Source):
    name, note, online = "hf:some/dataset", "streamed", True

    def split(self):
        return split_documents(TEXTS)

    def fingerprint(self) -> str:
        if not self.online:
            raise HubUnreachable("the hub does not answer")
        return "ab" * 32


def test_what_was_prepared_serves_while_the_hub_does_not_answer(cache, capsys):
    hub = Hub()
    first = prepare(hub, "bpe:400", cache_dir=cache)
    hub.online = False
    again = prepare(hub, "bpe:400", cache_dir=cache)
    assert again.summary.folder == first.summary.folder
    assert again.fingerprint == first.fingerprint
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert "prepared earlier" in capsys.readouterr().err
    assert prepare(hub, load_tokenizer(first.summary.folder), cache_dir=cache).summary.folder == first.summary.folder
    with pytest.raises(HubUnreachable):
        prepare(hub, "bpe:500", cache_dir=cache)
    with pytest.raises(HubUnreachable):
        prepare(hub, "bpe:400", cache_dir=cache / "other")


# The rest


def test_the_bpe_is_trained_on_the_training_side_only(folder, cache, monkeypatch):
    seen = []
    real = module.tokenizer
    monkeypatch.setattr(module, "tokenizer", lambda name, documents: seen.extend(documents()) or real(name, documents=documents))
    monkeypatch.setattr(module, "_SAMPLE", 3000)
    prepare(f"text:{folder}", "bpe:400", cache_dir=cache)
    train = "".join(text for side, text in split_documents(TEXTS) if side == "train")
    assert "".join(seen) == train[:3000]


@pytest.mark.parametrize(
    "data, name, error, match",
    [
        ("stdlob", "bytes", DataError, "did you mean 'stdlib'"),
        ("stdlib", "byte", TokenizerError, "did you mean 'bytes'"),
        ("stdlib", "bpe:9", TokenizerError, "whole number from 257"),
    ],
)
def test_bad_names(cache, data, name, error, match):
    with pytest.raises(error, match=match):
        prepare(data, name, cache_dir=cache)
    assert not list(cache.rglob("*.bin"))


def test_too_little_text(tmp_path, cache):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"is too small: it has no text for 'train'"):
        prepare(f"text:{tmp_path / 'a.txt'}", "bytes", cache_dir=cache)
    assert [path for path in (cache / "tokens").iterdir() if path.is_dir()] == []


def test_prepare_main_prints_the_summary(folder, cache, capsys):
    prepare_main(f"text:{folder}", "bytes", cache_dir=cache)
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["data", "corpus", "tokenizer", "train", "val", "cache"]
    assert err == ""  # no bar where there is no terminal


def test_a_bar_on_a_terminal(folder, cache, monkeypatch, capsys):
    parent, child = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with open(child, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        prepare_main(f"text:{folder}", "bpe:400", cache_dir=cache)
        os.set_blocking(parent, False)
        shown = os.read(parent, 2**16)
    os.close(parent)
    assert b"tokenising text:" in shown
    assert b"training bpe:400" in shown
    assert capsys.readouterr().out.startswith("data ")


def test_default_cache_dir(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/tn-layers")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "tn-layers"


@pytest.mark.parametrize("change", [{"files": {}}, {"files": []}, {"dtype": None}, {"tokens": None}])
@pytest.mark.parametrize("lost", ["train.bin", "tokenizer.json"])
def test_a_manifest_that_lists_too_little_is_damaged(folder, cache, capsys, change, lost):
    prepare(f"text:{folder}", "bytes", cache_dir=cache)
    broken = only(cache)
    manifest = json.loads((broken / "manifest.json").read_text())
    for key, value in change.items():
        manifest.pop(key)
        manifest |= {key: value} if value is not None else {}
    (broken / "manifest.json").write_text(json.dumps(manifest))
    (broken / lost).unlink()
    corpus = prepare(f"text:{folder}", "bytes", cache_dir=cache)
    assert len(corpus.train) > 0
    assert f"cache {broken} is damaged: manifest.json " in capsys.readouterr().err

"""Corpora: what is found, how it is split, what its hash depends on, and what is refused."""

import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data import DataError, HubUnreachable, source, split_documents
from train.data import hub as hub_module
from train.data import sources as module

TEXT = st.text(st.characters(exclude_categories=("Cs",)))


def both(made) -> dict[str, list[str]]:
    return {side: list(made.documents(side)) for side in ("train", "val")}


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, contents in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    return folder


# The split


@given(documents=st.lists(TEXT, max_size=30))
def test_split_keeps_every_document(documents):
    full = [text for text in documents if text]
    if len(full) == 1 and len(full[0]) < 2:
        with pytest.raises(DataError, match="corpus of one character"):
            list(split_documents(documents))
        return
    found = list(split_documents(documents))
    if len(full) == 1:
        assert "".join(text for _, text in found) == full[0]
    else:
        assert sorted(text for _, text in found) == sorted(full)
    if full:
        assert {side for side, _ in found} == {"train", "val"}
    assert found == list(split_documents(iter(documents)))


def test_split_share_and_duplicates():
    documents = [f"document {index}" for index in range(4000)]
    sides = {text: side for side, text in split_documents(documents)}
    share = sum(side == "val" for side in sides.values()) / 4000
    assert 0.04 < share < 0.06
    # The side depends on the text alone, so a copy is never on the other side.
    assert {text: side for side, text in split_documents(documents * 2)} == sides
    assert {text: side for side, text in split_documents(documents[::-1])} == sides


@pytest.mark.parametrize("copies", [2, 50])
def test_split_of_equal_documents(copies):
    found = [side for side, _ in split_documents(["the same"] * copies)]
    assert found.count("val") == 1 or found.count("train") == 1


def test_a_lone_document_is_cut_at_a_line():
    text = "".join(f"line {index}\n" for index in range(100))
    (_, train), (_, val) = split_documents([text])
    assert train + val == text
    assert train.endswith("\n")
    assert 0.02 < len(val) / len(text) < 0.06


# The standard library


def test_stdlib():
    made = source("stdlib")
    root = Path(sysconfig.get_path("stdlib"))
    parts = {part for path in made.paths for part in path.relative_to(root).parts}
    assert not parts & {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    assert {"json", "unittest", "argparse.py"} <= parts
    assert all(path.suffix == ".py" for path in made.paths)
    documents = both(made)
    assert len(documents["train"]) > 500
    assert 0.02 < len(documents["val"]) / len(documents["train"]) < 0.1
    assert not set(documents["train"]) & set(documents["val"])
    assert made.size == sum(len(text.encode()) for texts in documents.values() for text in texts) > 5_000_000
    again = source("stdlib")
    assert again.fingerprint() == made.fingerprint()
    assert both(again) == documents


# Files and folders


def test_text_folder(tmp_path):
    files = {"b.txt": "two", "a/z.md": "one\r\nmore", "c": "three", "empty.txt": "", ".hidden": "no", ".git/x": "no"}
    write(tmp_path, {**files, "image.png": b"\x89PNG\xff", "latin.txt": "é".encode("latin-1"), "zero.bin": b"a\0b"})
    made = source(f"text:{tmp_path}")
    documents = both(made)
    assert sorted(documents["train"] + documents["val"]) == ["one\r\nmore", "three", "two"]
    assert made.note == "3 files, 4 left out (empty or not UTF-8 text)"
    assert made.size == 17


def test_fingerprint_is_of_the_contents(tmp_path):
    one = source(f"text:{write(tmp_path / 'one', {'a.txt': 'first', 'b.txt': 'second'})}").fingerprint()
    assert source(f"text:{write(tmp_path / 'two', {'c.txt': 'first', 'd.txt': 'second'})}").fingerprint() == one
    assert source(f"text:{write(tmp_path / 'three', {'a.txt': 'second', 'b.txt': 'first'})}").fingerprint() != one
    assert source(f"text:{write(tmp_path / 'four', {'a.txt': 'firstsecond'})}").fingerprint() != one


def test_one_file_is_split_by_position(tmp_path):
    text = "".join(f"line {index} – ü\n" for index in range(1000))
    path = write(tmp_path, {"book.txt": text}) / "book.txt"
    (train,), (val,) = both(source(f"text:{path}")).values()
    assert train + val == text
    assert train.endswith("\n")
    assert 0.04 < len(val) / len(text) < 0.05
    assert both(source(f"text:{tmp_path}")) == {"train": [train], "val": [val]}


@pytest.mark.parametrize("text", ["ab\n" * 300, "日本語" * 150, "a" * 301 + "\n", "😀" * 99, "日\n" + "本" * 200, "x" * 95 + "日" * 5])
def test_large_files_are_cut_between_characters(tmp_path, monkeypatch, text):
    monkeypatch.setattr(module, "_PIECE", 64)
    documents = both(source(f"text:{write(tmp_path, {'a.txt': text}) / 'a.txt'}"))
    assert "".join(documents["train"] + documents["val"]) == text
    assert all(0 < len(piece.encode()) <= 64 for pieces in documents.values() for piece in pieces)
    assert documents["val"]


def test_a_file_that_changes_is_named(tmp_path):
    write(tmp_path, {"a.txt": "first", "b.txt": "second"})
    made = source(f"text:{tmp_path}")
    made.fingerprint()
    (tmp_path / "b.txt").write_bytes(b"x")
    with pytest.raises(DataError, match=r"b\.txt changed while it was read: it ends at byte 1, not 6"):
        list(made.split())


@pytest.mark.parametrize(
    "spec, match",
    [
        ("stdlob", "unknown data source 'stdlob': did you mean 'stdlib'\\? One of: bin:PATH, hf:NAME_OR_PATH, stdlib, text:PATH"),
        ("txt:/tmp", "unknown data source"),
        ("stdlib:x", "unknown data source"),
        ("text", "needs a path: 'text:PATH'"),
        ("hf:", "needs a path: 'hf:PATH'"),
        ("text:/no/such/path", "/no/such/path does not exist"),
        ("bin:/no/such/path", r"there is no /no/such/path/train\.bin"),
        ("hf:/no/such/path", "/no/such/path does not exist, and is not the name of a dataset on the hub"),
        ("hf:data.parquet", "data.parquet does not exist"),
        ("hf:some/name?splt=x", "unknown option 'splt': did you mean 'split'"),
        ("hf:some/name?documents=0", "documents must be a whole number of 1 or more, got '0'"),
        (os.path.dirname(__file__), "for a file or folder of text, write 'text:"),
    ],
)
def test_bad_specs(spec, match):
    with pytest.raises(DataError, match=match):
        source(spec)


def test_nothing_to_read(tmp_path):
    with pytest.raises(DataError, match="holds no UTF-8 text"):
        source(f"text:{tmp_path}").fingerprint()
    write(tmp_path, {"a.bin": b"\xff\xff", "empty": ""})
    with pytest.raises(DataError, match="holds no UTF-8 text"):
        list(source(f"text:{tmp_path}").split())
    with pytest.raises(DataError, match="is empty or not UTF-8 text"):
        source(f"text:{tmp_path / 'empty'}").fingerprint()
    with pytest.raises(DataError, match="unknown split 'vall': did you mean 'val'"):
        source("stdlib").documents("vall")


# nanoGPT's files


def test_bin(tmp_path):
    tokens = np.arange(1000, dtype="<u2")
    write(tmp_path, {"train.bin": tokens.tobytes(), "val.bin": tokens[:10].tobytes()})
    made = source(f"bin:{tmp_path}")
    assert made.tokens("train").tolist() == tokens.tolist()
    assert made.fingerprint() == source(f"bin:{tmp_path}").fingerprint()
    with pytest.raises(DataError, match="holds token ids, no text"):
        made.split()
    for contents, match in [(b"", "0 bytes"), (b"abc", "3 bytes, uint16 tokens need")]:
        write(tmp_path, {"val.bin": contents})
        with pytest.raises(DataError, match=match):
            source(f"bin:{tmp_path}")
    (tmp_path / "val.bin").unlink()
    with pytest.raises(DataError, match=r"there is no .*val\.bin"):
        source(f"bin:{tmp_path}")


# Hugging Face datasets, local

ROWS = [{"id": index, "text": f"row {index}"} for index in range(60)] + [{"id": 60, "text": None}, {"id": 61, "text": ""}]


def parquet(path: Path, rows: list[dict[str, object]]) -> Path:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def written(path: Path) -> Path:
    """ROWS in the format of a file name."""
    if path.suffix == ".parquet":
        return parquet(path, ROWS)
    lines = [row for row in ROWS if row["text"]]
    if path.suffix in (".json", ".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    elif path.suffix == ".txt":
        path.write_text("".join(f"{row['text']}\n" for row in lines))
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        path.write_text(f"id{mark}text\n" + "".join(f"{row['id']}{mark}{row['text']}\n" for row in lines))
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt"])
def test_local_datasets(tmp_path, name):
    made = source(f"hf:{written(tmp_path / name)}")
    documents = both(made)
    assert sorted(documents["train"] + documents["val"]) == sorted(f"row {index}" for index in range(60))
    assert documents["val"]
    assert made.fingerprint() == source(f"hf:{tmp_path / name}").fingerprint()
    assert documents == {
        side: [text for found, text in split_documents(f"row {index}" for index in range(60)) if found == side] for side in documents
    }


def test_local_dataset_folder_with_validation(tmp_path):
    parquet(tmp_path / "train-00000.parquet", [{"text": "a"}, {"text": "b"}])
    parquet(tmp_path / "validation-00000.parquet", [{"text": "v"}])
    assert both(source(f"hf:{tmp_path}")) == {"train": ["a", "b"], "val": ["v"]}
    chosen = both(source(f"hf:{tmp_path}?split=train"))
    assert sorted(chosen["train"] + chosen["val"]) == ["a", "b"]
    with pytest.raises(DataError, match="unknown split 'trian': did you mean 'train'\\? One of: train, validation"):
        list(source(f"hf:{tmp_path}?split=trian").split())


def test_saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}]).save_to_disk(tmp_path / "saved")
    documents = both(source(f"hf:{tmp_path / 'saved'}"))
    assert sorted(documents["train"] + documents["val"]) == ["a", "b"]


def test_columns_and_limit(tmp_path):
    path = parquet(tmp_path / "a.parquet", [{"n": index, "title": f"t{index}", "body": f"b{index}"} for index in range(40)])
    with pytest.raises(DataError, match=r"which column is the text\? Write 'hf:.*#column'. Its columns: body, n, title"):
        list(source(f"hf:{path}").split())
    documents = both(source(f"hf:{path}#body"))
    assert set(documents["train"] + documents["val"]) == {f"b{index}" for index in range(40)}
    documents = both(source(f"hf:{path}?documents=7#title"))
    assert set(documents["train"] + documents["val"]) == {f"t{index}" for index in range(7)}
    prints = {source(f"hf:{path}{end}").fingerprint() for end in ("", "#body", "#title", "?documents=7", "?documents=8")}
    assert len(prints) == 5
    for end, match in [("#boddy", "unknown column 'boddy': did you mean 'body'"), ("#n", "column 'n' holds int, not text")]:
        with pytest.raises(DataError, match=match):
            list(source(f"hf:{path}{end}").split())
    only = parquet(tmp_path / "b.parquet", [{"n": index, "content": f"c{index}"} for index in range(3)])
    assert "c0" in [text for _, text in source(f"hf:{only}").split()]


def test_damaged_and_empty_datasets(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    for name, contents in [("a.parquet", b"not parquet"), ("a.jsonl", b"{broken"), ("a.xyz", b"?"), ("empty.jsonl", b"")]:
        (tmp_path / name).write_bytes(contents)
        with pytest.raises(DataError) as caught:
            list(source(f"hf:{tmp_path / name}").split())
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="cannot be opened"):
        list(source(f"hf:{tmp_path / 'none'}").split())


# Hugging Face datasets, on the hub


@pytest.mark.parametrize("reason", ["offline is set", "no answer"])
def test_hub_without_network(monkeypatch, reason):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", reason == "offline is set")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "https://no-such-host.invalid")
    begin = time.monotonic()
    with pytest.raises(HubUnreachable) as caught:
        source("hf:some/dataset").fingerprint()
    assert time.monotonic() - begin < 10
    assert "there is no local some/dataset, and the Hugging Face hub cannot be reached" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hub_dataset(monkeypatch):
    """The commit that the hub names is the one that is streamed, and it is the fingerprint."""
    import datasets
    import huggingface_hub

    asked = []

    class Hub:
        def dataset_info(self, name, revision, timeout):
            asked.append((name, revision))
            return huggingface_hub.hf_api.DatasetInfo(id=name, sha="ab" * 20)

    def load(path, config, *, revision, streaming):
        asked.append((path, config, revision, streaming))
        rows = datasets.Dataset.from_list([{"text": f"row {index}"} for index in range(50)]).to_iterable_dataset()
        return datasets.IterableDatasetDict({"train": rows, "test": rows})

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(hub_module, "reachable", lambda url: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    made = source("hf:some/dataset?config=small&revision=main")
    assert len(list(made.split())) == 50
    assert made.note == "streamed from the hub at revision abababababab"
    assert asked == [("some/dataset", "main"), ("some/dataset", "small", "ab" * 20, True)]
    assert made.fingerprint() != source(f"hf:some/dataset?revision={'cd' * 20}").fingerprint()


def test_a_fresh_process_imports_little_and_names_the_hub():
    """Nothing heavy before it is needed, and nothing that works only because another test imported it."""
    heavy = ("datasets", "huggingface_hub", "pyarrow", "tiktoken", "tokenizers", "transformers")
    code = f"""
import sys
from train.data import DataError, source
print([name for name in {heavy} if name in sys.modules])
try:
    source("hf:some/dataset").fingerprint()
except DataError as error:
    print(error)
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | {
        "HF_ENDPOINT": "https://no-such-host.invalid"
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert first == "[]"
    assert "cannot be reached (https://no-such-host.invalid does not answer)" in second

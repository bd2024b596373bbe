"""The house rules as functions: each reads source files and returns its violations as `file:line: what is wrong`.

The rules look at the syntax tree only, so that a broken file cannot hide from them by failing to import.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Folder → import name, and what that package may import of ours.  `tn.operators` means that module alone.
PACKAGES = {"tn": "tn", "zoo": "zoo", "train": "train", "bench": "bench", "kernels": "tn_kernels"}
ARROWS = {
    "tn": ("tn",),
    "zoo": ("zoo", "tn"),
    "train": ("train", "zoo", "tn"),
    "bench": ("bench", "train", "zoo", "tn", "tn_kernels"),
    "tn_kernels": ("tn_kernels", "tn.operators"),
}

# Third parties that one file adapts (or one file per purpose, which is named).
ONLY_IN = {
    "cotengra": {"tn/order.py": "search", "bench/libraries.py": "a peer"},
    "quimb": {"tn/bridge/quimb.py": "conversion"},
    "opt_einsum": {
        "tn/order.py": "search",
        "tn/bridge/opt_einsum.py": "orders and PathInfo",
        "bench/libraries.py": "a peer",
        "bench/einsum.py": "a peer",
    },
    "einsum_benchmark": {"bench/einsum.py": "generated networks"},
    "transformers": {"zoo/tokenizers.py": "tokenizers in its folder format", "zoo/huggingface.py": "models in its folder format"},
    "datasets": {"train/data/hub.py": "corpora"},
    "huggingface_hub": {"train/data/hub.py": "the commit behind a dataset's name"},
    "tokenizers": {"zoo/tokenizers.py": "training a vocabulary"},
    "tiktoken": {"zoo/tokenizers.py": "running a vocabulary"},
    "hypothesis": {"tn/testing.py": "random networks"},
    "triton": {"kernels/": "operators"},
}

# Our own switches are read in one file; another program's variables by the file that adapts that program.
ENVIRONMENT = {"tn/settings.py": "ours", "zoo/tokenizers.py": "where tiktoken keeps its downloads"}

# zoo/: every matrix product goes through tn, so that tn plans it and zoo.describe sees it.
FORBIDDEN_IN_ZOO = {
    "modules": re.compile(
        r"^(Lazy)?(Linear|Bilinear|Conv(Transpose)?[123]d|Embedding(Bag)?|LayerNorm|RMSNorm|BatchNorm[123]d|GroupNorm"
        r"|MultiheadAttention|Transformer\w*)$"
    ),
    "functions": re.compile(
        r"^(linear|bilinear|conv(_transpose)?[123]d|embedding(_bag)?|layer_norm|rms_norm|scaled_dot_product_attention"
        r"|multi_head_attention_forward)$"
    ),
    "products": re.compile(
        r"^(matmul|mm|bmm|addmm|baddbmm|addbmm|mv|addmv|dot|vdot|inner|outer|ger|kron|chain_matmul|multi_dot|tensordot|einsum|__matmul__)$"
    ),
}
TORCH = re.compile(r"^(torch|nn|F|functional|np|numpy)(\.|$)")

FILE_LINES, FUNCTION_LINES, KERNEL_LINES = 600, 80, 150


@dataclass(frozen=True)
class Source:
    """One file: its path as written in messages, its text and its tree."""

    path: str
    text: str
    tree: ast.Module

    @property
    def folder(self) -> str:
        return self.path.split("/")[0]

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()


def sources(root: Path = ROOT, folders: tuple[str, ...] = tuple(PACKAGES)) -> Iterator[Source]:
    """Every Python file of the packages under `root`, in order of path."""
    for folder in folders:
        for file in sorted((root / folder).rglob("*.py")):
            if "__pycache__" not in file.parts:
                text = file.read_text(encoding="utf-8")
                yield Source(file.relative_to(root).as_posix(), text, ast.parse(text, filename=str(file)))


def imports(source: Source) -> Iterator[tuple[int, str, bool]]:
    """(line, dotted name, inside a function) of every import.  `from a import b` counts as `a.b`: b may be a module."""
    inside = {id(node) for function in _functions(source.tree) for node in ast.walk(function)}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, id(node) in inside
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = [PACKAGES.get(source.folder, source.folder), *source.path.split("/")[1:-1]]
                parents = parts[: len(parts) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}", id(node) in inside


def arrows(source: Source) -> Iterator[str]:
    """A package imports only the packages its arrow names."""
    package = PACKAGES[source.folder]
    for line, name, _ in imports(source):
        if name.split(".")[0] in (*PACKAGES.values(), "tests", "kernels") and not any(
            name == allowed or name.startswith(allowed + ".") for allowed in ARROWS[package]
        ):
            yield f"{source.path}:{line}: {package} may not import {name} (it may import: {', '.join(ARROWS[package])})"


def adapters(source: Source) -> Iterator[str]:
    """A third party is imported by its adapter file alone."""
    for line, name, _ in imports(source):
        allowed = ONLY_IN.get(name.split(".")[0])
        here = [path for path in allowed or () if source.path == path or (path.endswith("/") and source.path.startswith(path))]
        if allowed is not None and not here:
            yield f"{source.path}:{line}: {name.split('.')[0]} is imported only in {', '.join(allowed)}"


def late_imports(source: Source) -> Iterator[str]:
    """An import inside a function says why, in a comment on its line or the line above."""
    for line, name, inside in imports(source):
        if inside and "#" not in source.lines[line - 1] and not source.lines[line - 2].lstrip().startswith("#"):
            yield f"{source.path}:{line}: {name} is imported inside a function without a comment that says why"


def undeclared(source: Source, declared: set[str]) -> Iterator[str]:
    """Every third-party package that is imported is declared in pyproject.toml."""
    ours = {*PACKAGES.values(), "tests"}
    for line, name, _ in imports(source):
        top = name.split(".")[0]
        if top not in ours and top not in sys.stdlib_module_names and top not in declared:
            yield f"{source.path}:{line}: {top} is not declared in pyproject.toml"


def broad_except(source: Source) -> Iterator[str]:
    """No handler catches everything, unless it raises again: as it was, or as ours with a comment on why no narrower name would do."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler):
            caught = [node.type] if not isinstance(node.type, ast.Tuple) else node.type.elts
            broad = any(kind is None or (isinstance(kind, ast.Name) and kind.id in ("Exception", "BaseException")) for kind in caught)
            last = node.body[-1]
            explained = "BLE001 - " in source.lines[node.lineno - 1]
            if broad and not (isinstance(last, ast.Raise) and (last.exc is None or explained)):
                yield f"{source.path}:{node.lineno}: catches everything; name the errors it can answer"
        elif isinstance(node, ast.Call) and _last(node.func) == "suppress":
            names = {kind.id for kind in node.args if isinstance(kind, ast.Name)}
            if names & {"Exception", "BaseException"}:
                yield f"{source.path}:{node.lineno}: suppresses everything; name the errors"


def environment(source: Source) -> Iterator[str]:
    """The environment is read in one file, a third party's variables in its adapter."""
    if source.path not in ENVIRONMENT:
        for node in ast.walk(source.tree):
            if isinstance(node, (ast.Attribute, ast.Name)) and _last(node) in ("environ", "getenv", "environb"):
                yield f"{source.path}:{node.lineno}: reads the environment; only {', '.join(ENVIRONMENT)} may"


def swallowed_keywords(source: Source) -> Iterator[str]:
    """A function that takes **keywords does something with them."""
    for function in _functions(source.tree):
        keywords = function.args.kwarg if not isinstance(function, ast.Lambda) else None
        if keywords is not None and not any(isinstance(node, ast.Name) and node.id == keywords.arg for node in ast.walk(function)):
            yield f"{source.path}:{function.lineno}: **{keywords.arg} swallows every misspelt argument"


def contractions_only(source: Source) -> Iterator[str]:
    """zoo/ holds no layer modules and no bare matrix products."""
    if source.folder != "zoo":
        return
    for node in ast.walk(source.tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            yield f"{source.path}:{node.lineno}: `@` in zoo/; use tn.contract or tn.Contraction"
        elif isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            # A product is forbidden as a method of any tensor too; the other names only as torch's.
            kinds = FORBIDDEN_IN_ZOO if TORCH.match(owner) else {} if owner.split(".")[0] == "tn" else {"products"}
            if any(FORBIDDEN_IN_ZOO[kind].match(node.attr) for kind in kinds):
                yield f"{source.path}:{node.lineno}: {owner}.{node.attr} in zoo/; use tn"
        elif isinstance(node, ast.ImportFrom) and TORCH.match(node.module or ""):
            for alias in node.names:
                if any(pattern.match(alias.name) for pattern in FORBIDDEN_IN_ZOO.values()):
                    yield f"{source.path}:{node.lineno}: imports {alias.name} in zoo/; use tn"


def sizes(source: Source) -> Iterator[str]:
    """Files and functions are short enough to read."""
    if len(source.lines) > FILE_LINES:
        yield f"{source.path}:1: {len(source.lines)} lines, at most {FILE_LINES}"
    limit = KERNEL_LINES if source.folder == "kernels" else FUNCTION_LINES
    for function in _functions(source.tree):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        if not isinstance(function, ast.Lambda) and length > limit:
            yield f"{source.path}:{function.lineno}: {function.name} has {length} lines, at most {limit}"


def names(source: Source) -> Iterator[str]:
    """No grab-bag files; every file says what it is."""
    stem = source.path.rsplit("/", 1)[-1]
    if stem in ("utils.py", "util.py", "helpers.py", "misc.py", "common.py"):
        yield f"{source.path}:1: {stem} is a grab-bag; name the file after what it holds"
    if source.text.strip() and ast.get_docstring(source.tree) is None:
        yield f"{source.path}:1: no docstring that says what the file is for"


def annotations(source: Source) -> Iterator[str]:
    """Public functions and methods say the types of their arguments and result; a device function's annotations belong to Triton."""
    for scope in (source.tree, *(node for node in source.tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_"))):
        for node in scope.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not node.name.startswith("_") and not _on_device(node):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                missing = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls", "ctx")]
                if missing or node.returns is None:
                    what = ", ".join([*missing, *(["the result"] if node.returns is None else [])])
                    yield f"{source.path}:{node.lineno}: {node.name} does not say the type of {what}"


def uncollected(root: Path = ROOT) -> Iterator[str]:
    """Every file under tests/ holds tests that pytest finds, or is imported by one that does."""
    files = list(sources(root, ("tests",)))
    imported = {name for file in files for _, name, _ in imports(file)}
    for file in files:
        module = file.path.removesuffix(".py").replace("/", ".")
        name = file.path.rsplit("/", 1)[-1]
        tests = _test_functions(file.tree)
        if name.startswith("test_"):
            if not tests:
                yield f"{file.path}:1: no test function in it"
        elif tests:
            yield f"{file.path}:{tests[0].lineno}: {tests[0].name} is never collected; the file's name must start with test_"
        elif name not in ("conftest.py", "__init__.py") and not any(n == module or n.startswith(module + ".") for n in imported):
            yield f"{file.path}:1: neither a test file nor imported by one"


RULES = (arrows, adapters, late_imports, broad_except, environment, swallowed_keywords, contractions_only, sizes, names, annotations)


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))


def _test_functions(tree: ast.Module) -> list[ast.FunctionDef]:
    bodies = [tree.body, *(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name.startswith("Test"))]
    return [node for body in bodies for node in body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def _on_device(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(decorator) == "triton.jit" for decorator in function.decorator_list)


def _last(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""

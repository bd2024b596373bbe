"""The check-up behind `python -m tn doctor`: what is installed, what the machine has, and whether a tiny layer computes the right thing."""

import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import tn
from tn.settings import cache_folder

DISTRIBUTION = "tn-layers"
IMPORT_NAMES = {"pyyaml": "yaml"}  # where the package's import name is not its own
CORE = ("torch", "numpy", "opt_einsum", "cotengra", "quimb", "triton", "transformers", "datasets", "tiktoken", "hypothesis")
# What the layer's result may differ by from the reference, both in float64, as a fraction of the largest element.
TOLERANCE = 1e-11
# What a missing or broken module raises while it is imported.
IMPORT_FAULTS = (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the report: `broken` means something required does not work, and then `remedy` says what to do."""

    group: str
    name: str
    status: Literal["ok", "note", "broken"]
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"  {self.status:<7} {self.name:<16} {self.detail}"
        return f"{line}\n          → {self.remedy}" if self.remedy else line


def checks() -> Iterator[Check]:
    """Every check, in the order of the report; each is done when it is asked for.

    Cost: some seconds, most of them spent importing packages.
    """
    yield from _python()
    yield from _packages()
    yield from _unlisted()
    yield from _devices()
    yield from _triton()
    yield from _compiler()
    yield from _layers()
    yield from _caches()
    yield from _extras()


def main() -> int:
    """Print the report; returns 1 if anything required is broken, else 0; 141 when the reader of the output (head) has left."""
    try:
        try:
            return _report()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Without this, Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _report() -> int:
    begun, group, broken = time.perf_counter(), "", 0
    for check in checks():
        if check.group != group:
            group = check.group
            print(group)
        print(check, flush=True)
        broken += check.status == "broken"
    verdict = (
        "all required parts work" if not broken else f"{broken} required part{'s' if broken > 1 else ''} broken: see the → lines above"
    )
    print(f"{verdict} ({time.perf_counter() - begun:.0f} s)")
    return 1 if broken else 0


def _python() -> Iterator[Check]:
    version = platform.python_version()
    enough = sys.version_info >= (3, 11)
    yield Check(
        group="python",
        name="python",
        status="ok" if enough else "broken",
        detail=f"{version} at {sys.executable}",
        remedy=""
        if enough
        else "Python 3.11 or newer is needed: build the environment with another, e.g. make test PYTHON=/path/to/python3.11",
    )
    yield Check(group="python", name="platform", status="ok", detail=platform.platform())


def _packages() -> Iterator[Check]:
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        yield Check(
            group="packages",
            name=DISTRIBUTION,
            status="note",
            detail="imported from the source folder, not installed, so its list of required packages is unknown",
            remedy="pip install -e . -c constraints.txt",
        )
        return
    for line in lines:
        if "extra ==" not in line and not ("sys_platform" in line and f"'{sys.platform}'" not in line.replace('"', "'")):
            yield _package(line)


def _unlisted() -> Iterator[Check]:
    """The ten packages the project is built on, as far as the installed list, which may be older than the source, leaves them out."""
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
    listed = {_name(line) for line in lines if "extra ==" not in line}
    missing = [name for name in CORE if name not in listed and (name != "triton" or sys.platform == "linux")]
    if missing and lines:
        detail = f"its installed list of required packages is out of date: it lacks {', '.join(missing)}"
        yield Check(group="packages", name=DISTRIBUTION, status="note", detail=detail, remedy="pip install -e . -c constraints.txt")
    for name in missing:
        yield _package(name)


def _name(requirement: str) -> str:
    return re.split(r"[^\w-]", requirement, maxsplit=1)[0].replace("-", "_").lower()


def _package(requirement: str) -> Check:
    """Check one line of the requirements: installed, new enough, and importable."""
    name = re.split(r"[^\w-]", requirement, maxsplit=1)[0]
    least = re.search(r">=\s*([\d.]+)", requirement)
    remedy = f"pip install -c constraints.txt '{requirement.split(';')[0].strip()}'"
    try:
        version = importlib.metadata.version(name)
        importlib.import_module(IMPORT_NAMES.get(name, name.replace("-", "_")))
    except importlib.metadata.PackageNotFoundError:
        return Check(group="packages", name=name, status="broken", detail="not installed", remedy=remedy)
    except IMPORT_FAULTS as error:
        detail = f"{version}, but importing it fails: {type(error).__name__}: {_one_line(error)}"
        return Check(
            group="packages", name=name, status="broken", detail=detail, remedy=f"pip install --force-reinstall --no-deps {name}=={version}"
        )
    if least and _numbers(version) < _numbers(least[1]):
        return Check(group="packages", name=name, status="broken", detail=f"{version}, but {least[1]} or newer is needed", remedy=remedy)
    return Check(group="packages", name=name, status="ok", detail=version)


def _devices() -> Iterator[Check]:
    threads = torch.get_num_threads()
    yield Check(
        group="devices",
        name="cpu",
        status="ok",
        detail=f"{threads} thread{'s' if threads > 1 else ''}, {torch.backends.cpu.get_cpu_capability()}",
    )
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            detail = f"{torch.cuda.get_device_name(index)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, CUDA {torch.version.cuda}"
            yield Check(group="devices", name=f"cuda:{index}", status="ok", detail=detail)
    else:
        why = (
            "this torch is built without CUDA"
            if torch.version.cuda is None
            else "torch sees no CUDA device (nvidia-smi shows whether the driver does)"
        )
        yield Check(group="devices", name="cuda", status="note", detail=f"none: {why}; everything runs on the CPU")


def _triton() -> Iterator[Check]:
    try:
        triton = importlib.import_module("triton")
    except IMPORT_FAULTS as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "triton"
        needed = torch.cuda.is_available()
        detail = "not installed" if missing else f"importing it fails: {_one_line(error)}"
        yield Check(
            group="triton",
            name="triton",
            status="broken" if needed else "note",
            detail=detail,
            remedy="pip install -c constraints.txt triton" if needed else "",
        )
        return
    interpreting = bool(triton.knobs.runtime.interpret)
    if interpreting:
        detail = f"{triton.__version__}, interpreter (TRITON_INTERPRET=1): kernels run on the CPU, correct but very slow"
    elif torch.cuda.is_available():
        detail = f"{triton.__version__}, usable: kernels are compiled for {torch.cuda.get_device_name()}"
    else:
        detail = f"{triton.__version__}, idle: no CUDA device; TRITON_INTERPRET=1 runs kernels in its interpreter, for tests"
    yield Check(group="triton", name="triton", status="ok", detail=detail)


def _compiler() -> Iterator[Check]:
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    detail = f"{found}: torch.compile can use inductor" if found else "none: torch.compile works with backend='aot_eager' only"
    yield Check(group="compiler", name="C++", status="ok" if found else "note", detail=detail)


def _layers() -> Iterator[Check]:
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        yield _layer(torch.device(device))


def _layer(device: torch.device) -> Check:
    """A block-tensor-train layer, forward and every gradient, planned against pairwise einsum."""
    begun = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    layer = tn.StructuredLinear(48, 96, structure="btt", rank=2, device=device, dtype=torch.float64)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(5, 48, generator=generator, dtype=torch.float64).to(device).requires_grad_()
    names = ["output", "input gradient", *(f"{name} gradient" for name, _ in layer.named_parameters())]
    try:
        planned = _values(layer, x)
        with tn.backend("einsum"):
            reference = _values(layer, x)
    except (tn.TnError, RuntimeError) as error:
        remedy = "report it with this output; until then `with tn.backend('einsum'):` may work"
        return Check(
            group="layers",
            name=f"btt on {device.type}",
            status="broken",
            detail=f"{type(error).__name__}: {_one_line(error)}",
            remedy=remedy,
        )
    errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(planned, reference, strict=True)]
    worst = max(range(len(errors)), key=errors.__getitem__)
    detail = f"forward and {len(errors) - 1} gradients in float64, planned against einsum: largest relative error {errors[worst]:.0e}"
    right = errors[worst] <= TOLERANCE  # False for NaN too
    return Check(
        group="layers",
        name=f"btt on {device.type}",
        status="ok" if right else "broken",
        detail=f"{detail} ({time.perf_counter() - begun:.1f} s)" if right else f"{detail}, in the {names[worst]}",
        remedy=""
        if right
        else "wrong numbers: do not trust this installation; reinstall torch with constraints.txt, then report it with this output",
    )


def _values(layer: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


def _caches() -> Iterator[Check]:
    for name, folder, purpose in _folders():
        if not folder.exists():
            yield Check(group="caches", name=name, status="ok", detail=f"{folder} (not there yet): {purpose}")
            continue
        files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
        size = sum(file.stat().st_size for file in files)
        yield Check(group="caches", name=name, status="ok", detail=f"{folder}, {_bytes(size)} in {len(files)} files: {purpose}")


def _folders() -> Iterator[tuple[str, Path, str]]:
    """(name, folder, what it holds); each may be deleted, which costs making it again."""
    yield "project", cache_folder(), "prepared tokens and trained vocabularies"
    hub = importlib.import_module("huggingface_hub.constants")
    yield "hugging face", Path(hub.HF_HOME), "downloads of `datasets` and `transformers`"


def _extras() -> Iterator[Check]:
    for name, use in (("kahypar", "better contraction orders for large networks"), ("pytest", "the test-suite")):
        try:
            detail = f"{importlib.metadata.version(name)}: {use}"
        except importlib.metadata.PackageNotFoundError:
            detail = f"not installed ({use}); nothing needs it"
        yield Check(group="optional", name=name, status="note" if "not installed" in detail else "ok", detail=detail)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"[\d.]*", version)[0].strip(".").split("."))  # type: ignore[index]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"

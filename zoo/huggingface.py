"""GPT-2 in the format of Hugging Face: a local folder with `config.json` and `model.safetensors` or `pytorch_model.bin`.

The format (transformers, models/gpt2/modeling_gpt2.py): linear layers are `Conv1D`, whose weight is (in, out); `c_attn`
holds query, key and value side by side in its outputs; the head is the token table. Only the files are read: neither
direction needs transformers.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import tn
from zoo.config import GPTConfig
from zoo.errors import SavedModelError
from zoo.gpt import GPT
from zoo.saved import fill, make_folder, read_tensors, write_tensors, write_text

_EPS = 1e-5
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
_FIXED = {
    "model_type": "gpt2",
    "layer_norm_epsilon": _EPS,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
"""Settings of GPT-2 that our model does not vary; a file that has another value is another architecture."""

_REQUIRED = ("vocab_size", "n_positions", "n_layer", "n_embd", "n_head")

# What unpickling bytes that are no pickle raises, besides its own error.
_UNREADABLE = (RuntimeError, EOFError, OSError, struct.error, ValueError, KeyError, IndexError, TypeError, AttributeError)

_NORMS = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
_LINEARS = {"attention.out": "attn.c_proj", "mlp.fc_in": "mlp.c_fc", "mlp.fc_out": "mlp.c_proj"}
_QKV = ("attention.query", "attention.key", "attention.value")


def from_pretrained(path: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> GPT:
    """A GPT with the weights of a local Hugging Face GPT-2 folder, in evaluation mode.

    Args:
        path: folder with `config.json` and `model.safetensors` (one file, or several with their index) or
            `pytorch_model.bin`.
        device: where to put it (default: the CPU).
        dtype: of its parameters (default: as stored).

    Returns:
        a GPT whose logits are those of `transformers.GPT2LMHeadModel`. For training, `config.dropout` is the file's
        `resid_pdrop`; attention weights are not dropped.

    Raises:
        SavedModelError: a file is missing or damaged, or its model is not a GPT-2; the message names the file.
    """
    folder = Path(path)
    config = read_config(folder)
    source, tensors = _read_weights(folder, "cpu" if device is None else device)
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    if config.tied:
        tensors.pop("lm_head.weight", None)
    model = GPT(config, device="meta")
    fill(model, _from_hf(tensors, config, source), source)
    return model.to(dtype=dtype).eval() if dtype is not None else model.eval()


def to_pretrained(model: GPT, directory: str | Path) -> Path:
    """Write a GPT as a Hugging Face GPT-2 folder, which `transformers.GPT2LMHeadModel.from_pretrained` reads.

    The folder holds `config.json` and `model.safetensors`; a tokenizer is not written. Structured layers are written as
    the dense matrices they stand for, missing biases as zeros.

    Raises:
        SavedModelError: the model has parts that GPT-2 has not (QK-norm, a free head_dim), or the folder cannot be
            written.
    """
    config = model.config
    if config.qk_norm:
        raise SavedModelError("a GPT-2 has no QK-norm: a model with qk_norm=True cannot be written in its format")
    if config.attention_width != config.width:
        raise SavedModelError(
            f"in a GPT-2 heads × head_dim is the width, and here {config.heads} × {config.attention_head_dim} is not "
            f"{config.width}: this model cannot be written in its format"
        )
    directory = Path(directory)
    make_folder(directory)
    with torch.no_grad():
        tensors = _to_hf(model)
    write_tensors(directory / "model.safetensors", tensors, {"format": "pt"})
    write_text(directory / "config.json", json.dumps(_hf_config(config, tensors), indent=2) + "\n")
    return directory


def _hf_config(config: GPTConfig, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        **_FIXED,
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "vocab_size": config.vocab,
        "n_positions": config.context,
        "n_ctx": config.context,
        "n_layer": config.layers,
        "n_embd": config.width,
        "n_head": config.heads,
        "n_inner": config.mlp_hidden,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": config.tied,
        "torch_dtype": str(tensors["transformer.wte.weight"].dtype).removeprefix("torch."),
    }


def read_config(folder: str | Path) -> GPTConfig:
    """The configuration of a local Hugging Face GPT-2 folder, from its `config.json` alone.

    Raises:
        SavedModelError: the file is missing or damaged, or its model is not a GPT-2.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise SavedModelError(f"{path} is missing: a Hugging Face model is a folder with config.json and its weights")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SavedModelError(f"{path} is truncated or not JSON: {error}") from error
    if not isinstance(data, dict) or "model_type" not in data:
        raise SavedModelError(f"{path} is not the configuration of a Hugging Face model (no field 'model_type')")
    for name, value in _FIXED.items():
        if data.get(name, value) != value:
            raise SavedModelError(f"{path}: {name} is {data[name]!r}, and only {value!r} can be read")
    activation = data.get("activation_function", "gelu_new")
    if activation not in _TANH_GELU:
        raise SavedModelError(f"{path}: activation_function is {activation!r}, and only {' or '.join(map(repr, _TANH_GELU))} can be read")
    missing = [name for name in _REQUIRED if name not in data]
    if missing:
        raise SavedModelError(f"{path} lacks {', '.join(missing)}")
    try:
        return GPTConfig(
            vocab=data["vocab_size"],
            context=data["n_positions"],
            layers=data["n_layer"],
            width=data["n_embd"],
            heads=data["n_head"],
            hidden=data.get("n_inner"),
            tied=data.get("tie_word_embeddings", True),
            dropout=data.get("resid_pdrop", 0.1),
        )
    except tn.TnError as error:
        raise SavedModelError(f"{path}: {error}") from error


def _read_weights(folder: Path, device: torch.device | str) -> tuple[Path, dict[str, Tensor]]:
    """The file that names the weights, and the weights."""
    single, index, pickled = (folder / name for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"))
    if single.is_file():
        return single, read_tensors(single, device)[0]
    if index.is_file():
        return index, _read_shards(index, device)
    if pickled.is_file():
        return pickled, _read_pickled(pickled, device)
    raise SavedModelError(f"{single} is missing, and so is {pickled.name}: {folder} holds no weights")


def _read_shards(index: Path, device: torch.device | str) -> dict[str, Tensor]:
    try:
        document = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SavedModelError(f"{index} is truncated or not the index of a model: {error!r}") from error
    files = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise SavedModelError(f"{index} is not the index of a model: it has no 'weight_map' of tensors' names and files")
    names = sorted(set(files.values()))
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors.update(read_tensors(index.parent / name, device)[0])
    return tensors


def _read_pickled(path: Path, device: torch.device | str) -> dict[str, Tensor]:
    try:
        tensors = torch.load(path, map_location=device, weights_only=True)
    except (*_UNREADABLE, pickle.UnpicklingError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SavedModelError(f"{path} is truncated or not a PyTorch file of weights: {first}") from error
    if not isinstance(tensors, dict):
        raise SavedModelError(f"{path} holds a {type(tensors).__name__}, not tensors by name")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise SavedModelError(f"{path} holds {name!r}: {type(tensor).__name__}, not tensors by name")
    return tensors


def _from_hf(tensors: dict[str, Tensor], config: GPTConfig, source: Path) -> dict[str, Tensor]:
    """Tensors under our names; what is left over must be buffers of causal masks."""
    left = {name: tensor for name, tensor in tensors.items() if not _is_mask(name)}

    def take(name: str) -> Tensor:
        if name not in left:
            raise SavedModelError(f"{source} lacks {name}")
        return left.pop(name)

    def matrix(name: str) -> Tensor:
        tensor = take(name)
        if tensor.dim() != 2:
            raise SavedModelError(f"{source}: {name} has shape {tuple(tensor.shape)}, not (in, out)")
        return tensor.T.contiguous()

    out = {"token_table.weight": take("wte.weight"), "position_table.weight": take("wpe.weight")}
    for i in range(config.layers):
        ours, theirs = f"blocks.{i}.", f"h.{i}."
        for our, their in _NORMS.items():
            out[f"{ours}{our}.weight"], out[f"{ours}{our}.bias"] = (
                take(f"{theirs}{their}.weight"),
                take(f"{theirs}{their}.bias"),
            )
        for our, weight, bias in zip(
            _QKV,
            matrix(f"{theirs}attn.c_attn.weight").chunk(3),
            take(f"{theirs}attn.c_attn.bias").chunk(3),
            strict=True,
        ):
            out[f"{ours}{our}.weight"], out[f"{ours}{our}.bias"] = weight, bias
        for our, their in _LINEARS.items():
            out[f"{ours}{our}.weight"] = matrix(f"{theirs}{their}.weight")
            out[f"{ours}{our}.bias"] = take(f"{theirs}{their}.bias")
    out["norm.weight"], out["norm.bias"] = take("ln_f.weight"), take("ln_f.bias")
    if not config.tied:
        out["head.weight"] = take("lm_head.weight")
    if left:
        raise SavedModelError(f"{source} has weights that a GPT-2 has not: {', '.join(sorted(left)[:3])}")
    return out


def _is_mask(name: str) -> bool:
    """Old files store the causal mask of each layer: `h.0.attn.bias` (1, 1, S, S) and `h.0.attn.masked_bias`."""
    return name.endswith((".attn.bias", ".attn.masked_bias"))


def _to_hf(model: GPT) -> dict[str, Tensor]:
    """Tensors under the names of `GPT2LMHeadModel`."""
    parameters = dict(model.named_parameters())
    out: dict[str, Tensor] = {
        "transformer.wte.weight": parameters["token_table.weight"],
        "transformer.wpe.weight": parameters["position_table.weight"],
    }

    def norm(ours: str, theirs: str) -> None:
        weight = out[f"{theirs}.weight"] = parameters[f"{ours}.weight"]
        out[f"{theirs}.bias"] = parameters.get(f"{ours}.bias", torch.zeros_like(weight))

    def linear(ours: Sequence[str], theirs: str) -> None:
        weights = [_dense(model, name) for name in ours]
        biases = [parameters.get(f"{name}.bias", torch.zeros_like(w[:, 0])) for name, w in zip(ours, weights, strict=True)]
        out[f"{theirs}.weight"], out[f"{theirs}.bias"] = torch.cat(weights).T, torch.cat(biases)

    for i in range(model.config.layers):
        ours, theirs = f"blocks.{i}.", f"transformer.h.{i}."
        for our, their in _NORMS.items():
            norm(ours + our, theirs + their)
        linear([ours + our for our in _QKV], theirs + "attn.c_attn")
        for our, their in _LINEARS.items():
            linear([ours + our], theirs + their)
    norm("norm", "transformer.ln_f")
    if not model.config.tied:
        out["lm_head.weight"] = _dense(model, "head")
    return out


def _dense(model: GPT, name: str) -> Tensor:
    """The matrix (out, in) that a linear layer stands for."""
    return cast(tn.StructuredLinear, model.get_submodule(name)).to_dense()

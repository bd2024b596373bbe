"""The linear layers that can be replaced, of torch, of tn and of transformers: their sizes, matrices and roles."""

import re

from torch import Tensor, nn

from tn.linear import StructuredLinear

# Paths in transformers' GPT-2, LLaMA (and what copies it: Mistral, Qwen) and ViT, old names and new, and what those layers do.
_PATHS = (
    (r"(^|\.)h\.\d+\.attn\.c_attn$", "attention.qkv"),
    (r"(^|\.)h\.\d+\.attn\.c_proj$", "attention.out"),
    (r"(^|\.)h\.\d+\.mlp\.c_fc$", "mlp.in"),
    (r"(^|\.)h\.\d+\.mlp\.c_proj$", "mlp.out"),
    (r"(^|\.)layers\.\d+\.(self_attn|attention)\.q_proj$", "attention.query"),
    (r"(^|\.)layers\.\d+\.(self_attn|attention)\.k_proj$", "attention.key"),
    (r"(^|\.)layers\.\d+\.(self_attn|attention)\.v_proj$", "attention.value"),
    (r"(^|\.)layers\.\d+\.(self_attn|attention)\.o_proj$", "attention.out"),
    (r"(^|\.)layers\.\d+\.mlp\.(gate_proj|up_proj|fc1)$", "mlp.in"),
    (r"(^|\.)layers\.\d+\.mlp\.(down_proj|fc2)$", "mlp.out"),
    (r"(^|\.)layer\.\d+\.attention\.attention\.query$", "attention.query"),
    (r"(^|\.)layer\.\d+\.attention\.attention\.key$", "attention.key"),
    (r"(^|\.)layer\.\d+\.attention\.attention\.value$", "attention.value"),
    (r"(^|\.)layer\.\d+\.attention\.output\.dense$", "attention.out"),
    (r"(^|\.)layer\.\d+\.intermediate\.dense$", "mlp.in"),
    (r"(^|\.)layer\.\d+\.output\.dense$", "mlp.out"),
    (r"^(lm_head|classifier|score)$", "head"),
)


def is_linear(module: nn.Module) -> bool:
    """Whether `restructure` can replace a module."""
    return isinstance(module, nn.Linear | StructuredLinear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' linear layer with an (in, out) weight; told by name, so that transformers is not imported."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def features(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    if is_conv1d(layer):
        d_in, d_out = layer.weight.shape  # type: ignore[misc]
        return d_out, d_in
    return layer.out_features, layer.in_features  # type: ignore[return-value]


def matrix(layer: nn.Module) -> Tensor:
    """The matrix (out, in) of a linear layer, detached."""
    if isinstance(layer, StructuredLinear):
        return layer.to_dense().detach()
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.detach().mT if is_conv1d(layer) else weight.detach()


def roles(linear: dict[str, nn.Module]) -> dict[str, str | None]:
    """path → role of linear layers in model order: the layer's own `tn_role`, else by its path; without any head, the last is the head
    unless it has another role."""
    found = {path: getattr(layer, "tn_role", None) or _by_path(path) for path, layer in linear.items()}
    if found and "head" not in found.values():
        last = list(found)[-1]
        found[last] = found[last] or "head"
    return found


def replace(model: nn.Module, path: str, old: nn.Module, new: nn.Module) -> None:
    """Put a layer in the place of another, with its role and mode."""
    if isinstance(new, StructuredLinear):
        new.tn_role = getattr(old, "tn_role", None)
    new.train(old.training)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def _by_path(path: str) -> str | None:
    return next((role for pattern, role in _PATHS if re.search(pattern, path)), None)

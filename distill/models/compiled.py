"""Models in and out of `torch.compile`, whose wrapper renames every tensor."""

from __future__ import annotations

from typing import Any

from torch import nn

from distill.utils.compat import PREFIX, compile_like, compiled_module


def is_wrapper(model: Any) -> bool:
    """Whether a module is what `torch.compile(module)` returns."""
    return isinstance(compiled_module(model), nn.Module)


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that a compiled one wraps, or itself; parts of it are unwrapped in place.

    The module shares its weights with the wrapper, and its tensors have their own names again.
    """
    return unwrapped(model, keep=False)


def compiled_in_place(model: nn.Module) -> nn.Module:
    """Return the module that a compiled one wraps, compiled as before, or itself.

    It is what `module.compile()` makes: no name in its state dict knows of it.
    """
    return unwrapped(model, keep=True)


def unwrapped(model: Any, keep: bool) -> nn.Module:
    """Return a module without wrappers; `keep` compiles what they wrapped in place."""
    if is_wrapper(model):
        inner = compiled_module(model)
        if keep:
            compile_like(model, inner)
        model = inner
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if is_wrapper(child):
                setattr(module, name, unwrapped(child, keep))
    return model


def plain_name(name: str) -> str:
    """Return a tensor's name as the module has it that is not compiled."""
    return name.replace(PREFIX, "")

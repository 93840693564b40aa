"""Every private name of another library that is used here, and why nothing public does.

Read in pytorch-lightning 2.6.6, hydra-core 1.3.2, torch 2.13 and timm 1.0.31. `tests/utils/
test_compat.py` fails where one of them is gone or has come to mean something else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# pytorch-lightning


def epoch_results(trainer: Any) -> Any:
    """Return what a training epoch has logged so far, by name: sums, and over how many samples.

    `trainer.callback_metrics` has means, from which a resumed epoch could not go on exactly.
    """
    return trainer.fit_loop.epoch_loop._results


def epoch_is_over(trainer: Any) -> bool:
    """Return whether training is between an epoch's last batch and the row that is logged of it.

    `trainer.is_last_batch` is true already while the last batch is trained.
    """
    return trainer.training and trainer._logger_connector._first_loop_iter is None


def epoch_row(trainer: Any) -> dict[str, float]:
    """Return what Lightning logs of an epoch right after its checkpoint has been written.

    `trainer.logged_metrics` changes only when it is logged, and the row's step is counted in
    batches whose optimiser stepped, for which there is no public name.
    """
    row = {name: float(value) for name, value in trainer._logger_connector.metrics["log"].items()}
    step = trainer.fit_loop.epoch_loop._batches_that_stepped - 1
    return {**row, "epoch": trainer.current_epoch, "step": step}


def validates_next(trainer: Any) -> bool:
    """Return whether the batch that has just been trained is followed by a validation.

    A checkpoint that is written between the two resumes without it, and nothing public tells.
    """
    loop = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def averaged_model(callback: Any) -> Any:
    """Return the model in which a `WeightAveraging` averages, or None before training.

    Lightning has no way to begin an average late from the weights as they are then.
    """
    return callback._average_model


# hydra-core


def replace_application_of_overrides(apply: Callable[..., None]) -> Callable[..., None]:
    """Let Hydra apply a command line's overrides by this function, and return its own.

    It has no hook between reading overrides and applying them.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    own: Callable[..., None] = ConfigLoaderImpl._apply_overrides_to_config
    ConfigLoaderImpl._apply_overrides_to_config = staticmethod(apply)  # type: ignore[method-assign]
    return own


def returned(job: Any) -> Any:
    """Return what a job of a sweep returned, or the error that it ended with.

    `JobReturn.return_value` prints the overrides and raises.
    """
    return job._return_value


# torch

PREFIX = "_orig_mod."  # of the names of what `torch.compile(module)` wraps, in a state dict


def compiled_module(model: Any) -> Any:
    """Return the module that `torch.compile(module)` wraps, or None of what is no wrapper.

    Only the wrapper's state dict tells of it in public, by its prefix.
    """
    return getattr(model, "_orig_mod", None)


def compile_like(wrapper: Any, module: Any) -> None:
    """Compile a module in place under the options of its wrapper.

    `module.compile()` would need these options, which the wrapper keeps in its context alone.
    """
    context = getattr(wrapper, "dynamo_ctx", None)
    if context is not None:
        module._compiled_call_impl = context(module._call_impl)


def is_compiled_in_place(module: Any) -> bool:
    """Return whether `module.compile()` has been called; nothing public tells."""
    return getattr(module, "_compiled_call_impl", None) is not None


# datasets


def table_fingerprint(table: Any) -> str:
    """Return what a table of the Hub changes when its data do, or "" of anything else.

    Its `info` stays the same where rows change.
    """
    return getattr(table, "_fingerprint", "")

# Copyright 2026 The localist-hf contributors. Licensed under the Apache License, Version 2.0.
"""The setting of the dial: the configuration's, or one that holds for the present thread or task only."""

import threading
import weakref
from contextvars import ContextVar
from dataclasses import dataclass, field
from numbers import Real

import torch
from transformers import PreTrainedConfig


#: The fields of the configuration that hold them.
DIAL_FIELDS = ("locality_dial", "min_fidelity")


@dataclass(frozen=True, eq=False)
class Setting:
    """The dial and the guarantee of the models that share a configuration."""

    config: PreTrainedConfig
    dial: float
    min_fidelity: float


_SETTINGS: ContextVar[tuple[Setting, ...]] = ContextVar("locality_dial", default=())
# How many settings exist: what a compiled graph can look at, as it cannot at a `ContextVar`. Contexts are copied, for
# one for each asyncio task, so that nobody knows in how many a setting stands; but it exists while it stands in any.
_num_alive = 0
_count_lock = threading.RLock()  # a finalizer may come while it is held


def check_share(name: str, value: float) -> float:
    """The value of an argument that must lie in [0, 1]; a `ValueError` that names it if it does not."""
    if isinstance(value, torch.Tensor):
        raise ValueError(f"`{name}` is a tensor; it must be a number in [0, 1].")
    if isinstance(value, bool) or not (isinstance(value, Real) and 0 <= value <= 1):
        raise ValueError(f"`{name}` is {value!r}; it must lie in [0, 1].")
    return value


def current_setting(config: PreTrainedConfig) -> Setting:
    """The setting in force here: that of the thread or task, or else the configuration's own."""
    if _num_alive and (setting := _context_setting(config)) is not None:
        return setting
    return Setting(
        config,
        check_share("config.locality_dial", config.locality.locality_dial),
        check_share("config.min_fidelity", config.locality.min_fidelity),
    )


@torch.compiler.disable
def _context_setting(config: PreTrainedConfig) -> Setting | None:
    return next((setting for setting in _SETTINGS.get() if setting.config is config), None)


@dataclass
class LocalityDial:
    """
    A setting of the dial, in force from its creation on, in the thread or task that made it; leaving a `with` block
    restores what was in force before.
    """

    setting: Setting
    before: tuple[Setting, ...] = field(init=False)

    def __post_init__(self) -> None:
        _count(1)
        weakref.finalize(self.setting, _count, -1)
        self.before = _SETTINGS.get()
        others = (setting for setting in self.before if setting.config is not self.setting.config)
        _SETTINGS.set((self.setting, *others))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        _SETTINGS.set(self.before)


def _count(change: int) -> None:
    global _num_alive
    with _count_lock:
        _num_alive += change

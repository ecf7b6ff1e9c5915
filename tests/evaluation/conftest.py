"""A stand-in for a device without float64, such as Apple's MPS."""

from collections.abc import Callable, Mapping

import pytest
import torch


class OnDevice(torch.Tensor):
    """A tensor on a device without float64: what would make one there fails; `.cpu()` leaves the device."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cpu:
            return args[0].as_subclass(torch.Tensor)
        result = super().__torch_function__(func, types, args, kwargs or {})
        if isinstance(result, OnDevice) and result.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return result


@pytest.fixture(scope="session")
def on_device() -> Callable:
    """Puts a model's output, or a tensor, on the device without float64."""

    def move(value):
        if isinstance(value, torch.Tensor):
            return value.as_subclass(OnDevice)
        if isinstance(value, tuple):
            return tuple(move(entry) for entry in value)
        if isinstance(value, Mapping):
            return type(value)(**{name: move(entry) for name, entry in value.items()})
        return value

    return move

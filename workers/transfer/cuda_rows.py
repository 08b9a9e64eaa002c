"""Rows of equal size between the GPU and pinned host memory, of which either side may lie apart: one call for all.

A call for each row would take the interpreter that many times from the thread that launches the model's kernels. torch
has no such copy; CUDA's driver does (`cuMemcpy2DAsync`).
"""

from __future__ import annotations

import ctypes
import functools

import torch

from workers.errors import TransferError

_HOST, _DEVICE = 1, 2  # CU_MEMORYTYPE


class _Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D."""

    _fields_ = (
        ("src_x", ctypes.c_size_t), ("src_y", ctypes.c_size_t), ("src_type", ctypes.c_int),
        ("src_host", ctypes.c_void_p), ("src_device", ctypes.c_uint64), ("src_array", ctypes.c_void_p),
        ("src_pitch", ctypes.c_size_t),
        ("dst_x", ctypes.c_size_t), ("dst_y", ctypes.c_size_t), ("dst_type", ctypes.c_int),
        ("dst_host", ctypes.c_void_p), ("dst_device", ctypes.c_uint64), ("dst_array", ctypes.c_void_p),
        ("dst_pitch", ctypes.c_size_t),
        ("width", ctypes.c_size_t), ("height", ctypes.c_size_t),
    )  # fmt: skip


@functools.cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuMemcpy2DAsync_v2.argtypes = [ctypes.POINTER(_Copy2D), ctypes.c_void_p]
    return driver


def rows_to_host(device: torch.Tensor, host: torch.Tensor) -> None:
    """Copy `device`, `[rows, bytes]`, to `host`, of the same shape and pinned, on the current stream."""
    _copy(
        device,
        _Copy2D(
            src_type=_DEVICE, src_device=device.data_ptr(), src_pitch=device.stride(0),
            dst_type=_HOST, dst_host=host.data_ptr(), dst_pitch=host.stride(0),
        ),
    )  # fmt: skip


def rows_to_device(host: torch.Tensor, device: torch.Tensor) -> None:
    """Copy `host`, `[rows, bytes]` and pinned, to `device`, of the same shape, on the current stream."""
    _copy(
        device,
        _Copy2D(
            src_type=_HOST, src_host=host.data_ptr(), src_pitch=host.stride(0),
            dst_type=_DEVICE, dst_device=device.data_ptr(), dst_pitch=device.stride(0),
        ),
    )  # fmt: skip


def _copy(device: torch.Tensor, copy: _Copy2D) -> None:
    copy.height, copy.width = device.shape
    stream = torch.cuda.current_stream(device.device).cuda_stream
    code = _driver().cuMemcpy2DAsync_v2(ctypes.byref(copy), stream)
    if code:
        raise TransferError(f"CUDA cannot copy {copy.height} rows of {copy.width} bytes (error {code})")

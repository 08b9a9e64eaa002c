"""GPU memory that other processes of this host can map: a piece is gathered straight into a peer's staging.

By the CUDA driver's interprocess handles, as UCX's cuda_ipc does it underneath a write; gathering to the mapped address
saves the second copy. Between two GPUs the driver maps over NVLink or PCIe where they can reach each other. What cannot
be mapped is simply not shared, and UCX moves the bytes.
"""

from __future__ import annotations

import ctypes
import functools
import os

import msgspec
import torch

from workers.transfer.shared import Window, host_id

_LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
_HANDLE_BYTES = 64


class CudaBytes(msgspec.Struct, frozen=True, array_like=True):
    """Where to find one allocation. `host` is the kernel's boot id: a handle means nothing elsewhere."""

    host: str
    pid: int  # its own process cannot open a handle
    handle: bytes
    offset: int  # from the start of what the handle maps
    address: int  # in the owner's address space
    size: int  # bytes


class _Handle(ctypes.Structure):
    """CUipcMemHandle, which the driver takes by value."""

    _fields_ = (("reserved", ctypes.c_ubyte * _HANDLE_BYTES),)


@functools.cache
def _driver() -> ctypes.CDLL:
    """CUDA's driver. Its calls work on the context that torch has made current in this thread."""
    driver = ctypes.CDLL("libcuda.so.1")
    pointer = ctypes.c_uint64
    driver.cuMemGetAddressRange_v2.argtypes = [ctypes.POINTER(pointer), ctypes.POINTER(ctypes.c_size_t), pointer]
    driver.cuIpcGetMemHandle.argtypes = [ctypes.POINTER(_Handle), pointer]
    driver.cuIpcOpenMemHandle_v2.argtypes = [ctypes.POINTER(pointer), _Handle, ctypes.c_uint]
    driver.cuIpcCloseMemHandle.argtypes = [pointer]
    return driver


def share_cuda(memory: torch.Tensor) -> CudaBytes | None:
    """Offer a tensor of this process's; None where the driver cannot share it."""
    base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
    address = memory.data_ptr()
    if _driver().cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), address):
        return None
    if _driver().cuIpcGetMemHandle(ctypes.byref(handle), base):
        return None  # virtual memory of torch's expandable segments, for example
    return CudaBytes(host_id(), os.getpid(), bytes(handle), address - base.value, address, memory.numel())


def open_cuda(card: CudaBytes, device: torch.device) -> Window | None:
    """A peer's allocation as seen from `device`, or None where it cannot be reached from there."""
    if card.host != host_id() or card.pid == os.getpid() or len(card.handle) != _HANDLE_BYTES:
        return None
    base = ctypes.c_uint64()
    handle = _Handle.from_buffer_copy(card.handle)
    if _driver().cuIpcOpenMemHandle_v2(ctypes.byref(base), handle, _LAZY_PEER_ACCESS):
        return None  # no peer access between these GPUs, or that process has just ended
    # Not by __cuda_array_interface__: torch would look for the memory's own device, which may be hidden from us.
    here = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    storage = torch._C._construct_storage_from_data_pointer(base.value + card.offset, here, card.size)
    mapped = torch.empty(0, dtype=torch.uint8, device=here).set_(storage)
    return Window(card.address, mapped, functools.partial(_driver().cuIpcCloseMemHandle, base.value))

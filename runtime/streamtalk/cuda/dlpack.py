"""DLPack capsules for memory that stays where it is, by https://dmlc.github.io/dlpack/latest/c_api.html.

Written with ctypes: no library that exports device memory as DLPack is as small as what it takes. What a consumer
deletes is one block of Python's raw memory, and its deleter the function that frees such: consumers delete from any
thread and after the interpreter's end, where nothing written in Python may be called.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

FLOAT = 2
VERSION = (1, 0)
UNVERSIONED_NAME, VERSIONED_NAME = b"dltensor", b"dltensor_versioned"


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("number", ctypes.c_int32))


class _DataType(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _DataType),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _Unversioned(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


class _Versioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


# Prototypes of our own: setting argument types on `pythonapi` itself would change them for everybody.
_python = ctypes.pythonapi
_Destructor = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, _Destructor)(
    ("PyCapsule_New", _python)
)
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _python))
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", _python)
)
_allocate = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(("PyMem_RawMalloc", _python))
_free = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(("PyMem_RawFree", _python))


def _drop_unread(
    capsule: int,
    is_valid: Any = _is_valid,
    pointer: Any = _pointer,
    free: Any = _free,
    names: tuple[bytes, ...] = (UNVERSIONED_NAME, VERSIONED_NAME),
) -> None:
    # A consumer renames the capsule that it takes; one that still has its name was never read. What this needs lies
    # in its arguments: the module may be torn down already.
    for name in names:
        if is_valid(capsule, name):
            free(pointer(capsule, name))


_destructor = _Destructor(_drop_unread)
# A capsule may outlive this module.
ctypes.PYFUNCTYPE(None, ctypes.py_object)(("Py_IncRef", _python))(_destructor)


def float32_capsule(address: int, shape: Sequence[int], device: tuple[int, int], versioned: bool) -> Any:
    """A capsule of C-ordered float32 memory at `address` on `device`, writable. It does not keep the memory alive."""
    kind = _Versioned if versioned else _Unversioned
    steps = [1]
    for length in reversed(shape[1:]):
        steps.insert(0, steps[0] * length)
    n, word = len(shape), ctypes.sizeof(ctypes.c_int64)
    place = _allocate(ctypes.sizeof(kind) + 2 * n * word)
    if not place:
        raise MemoryError
    lengths = (ctypes.c_int64 * (2 * n)).from_address(place + ctypes.sizeof(kind))
    lengths[:] = [*shape, *steps]
    at = ctypes.addressof(lengths)
    managed = kind.from_address(place)
    ctypes.memset(place, 0, ctypes.sizeof(kind))
    managed.tensor = _Tensor(address, _Device(*device), n, _DataType(FLOAT, 32, 1), at, at + n * word, 0)
    managed.deleter = ctypes.cast(_free, ctypes.c_void_p)
    if isinstance(managed, _Versioned):
        managed.major, managed.minor = VERSION
    return _new_capsule(place, VERSIONED_NAME if versioned else UNVERSIONED_NAME, _destructor)

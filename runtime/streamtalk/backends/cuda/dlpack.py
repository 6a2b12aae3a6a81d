"""DLPack capsules for memory that stays where it is, by https://dmlc.github.io/dlpack/latest/c_api.html.

Written with ctypes: cuda-bindings exports none, and cuda.core's `StridedMemoryView`, which could, is a compiled package
of 17 MB. A consumer deletes one block of Python's raw memory, by the C function that frees such blocks: consumers
delete from any thread and after the interpreter's end, where nothing written in Python may be called.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
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


@dataclass(frozen=True)
class _CPython:
    """Functions of Python's C API, and what a capsule calls when it goes."""

    allocate: Any
    free: Any
    new_capsule: Any
    destructor: Any


@cache
def _cpython() -> _CPython:
    # Prototypes of our own: setting argument types on `pythonapi` itself would change them for everybody.
    def function(name: str, *types: Any) -> Any:
        return ctypes.PYFUNCTYPE(*types)((name, ctypes.pythonapi))

    pointer, name, new_destructor = ctypes.c_void_p, ctypes.c_char_p, ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
    is_valid = function("PyCapsule_IsValid", ctypes.c_int, pointer, name)
    content = function("PyCapsule_GetPointer", pointer, pointer, name)
    free = function("PyMem_RawFree", None, pointer)
    names = (UNVERSIONED_NAME, VERSIONED_NAME)

    def drop_unread(capsule: int) -> None:
        # A consumer renames the capsule that it takes; one that still has its name was never read. Everything that
        # this needs is in its closure: the module may be torn down already.
        for own in names:
            if is_valid(capsule, own):
                free(content(capsule, own))

    destructor = new_destructor(drop_unread)
    function("Py_IncRef", None, ctypes.py_object)(destructor)  # a capsule may outlive this module
    return _CPython(
        allocate=function("PyMem_RawMalloc", pointer, ctypes.c_size_t),
        free=free,
        new_capsule=function("PyCapsule_New", ctypes.py_object, pointer, name, new_destructor),
        destructor=destructor,
    )


def float32_capsule(address: int, shape: Sequence[int], device: tuple[int, int], versioned: bool) -> Any:
    """A capsule of C-ordered float32 memory at `address` on `device`, writable. It does not keep the memory alive."""
    kind = _Versioned if versioned else _Unversioned
    steps = [1]
    for length in reversed(shape[1:]):
        steps.insert(0, steps[0] * length)
    n, word = len(shape), ctypes.sizeof(ctypes.c_int64)
    python = _cpython()
    place = python.allocate(ctypes.sizeof(kind) + 2 * n * word)
    if not place:
        raise MemoryError
    lengths = (ctypes.c_int64 * (2 * n)).from_address(place + ctypes.sizeof(kind))
    lengths[:] = [*shape, *steps]
    at = ctypes.addressof(lengths)
    managed = kind.from_address(place)
    ctypes.memset(place, 0, ctypes.sizeof(kind))
    managed.tensor = _Tensor(address, _Device(*device), n, _DataType(FLOAT, 32, 1), at, at + n * word, 0)
    managed.deleter = ctypes.cast(python.free, ctypes.c_void_p)
    if isinstance(managed, _Versioned):
        managed.major, managed.minor = VERSION
    name = VERSIONED_NAME if versioned else UNVERSIONED_NAME
    return python.new_capsule(place, name, python.destructor)

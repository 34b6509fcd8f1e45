"""Seeded mutations of a serialized ONNX model: of bytes, and of fields of its protobuf."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

NUMBERS = (0, 1, -1, 2, 3, 7, 8, 127, 255, 1 << 16, 2**31 - 1, -(2**31), 2**31, 2**62, -(2**63))
STRINGS = ("", "x", "Relu", "Identity", "com.microsoft", "ai.onnx", "é" * 3, "a" * 300, "../../etc/passwd", "\0")


def mutate(seeds: list[bytes], number: int, seed: int) -> tuple[bytes, str]:
    """The mutant of this number, and what was done to it. The same arguments give the same mutant."""
    rng = random.Random(f"{seed}/{number}")
    data = rng.choice(seeds)
    kinds: list[Callable[[bytes, list[bytes], random.Random], bytes]] = [flip, overwrite, truncate, splice, cut, repeat]
    chosen = [fields] * 18 + kinds
    done = []
    for _ in range(rng.choice((1, 1, 1, 2))):
        kind = rng.choice(chosen)
        data = kind(data, seeds, rng)
        done.append(kind.__name__)
    return data, "+".join(done)


def flip(data: bytes, seeds: list[bytes], rng: random.Random) -> bytes:
    """Some single bits."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        if out:
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def overwrite(data: bytes, seeds: list[bytes], rng: random.Random) -> bytes:
    """A run of bytes by random ones, zeros or ones."""
    start, length = rng.randrange(len(data) + 1), rng.randint(1, 16)
    filling = rng.choice((b"\0" * length, b"\xff" * length, rng.randbytes(length)))
    return data[:start] + filling + data[start + length :]


def truncate(data: bytes, seeds: list[bytes], rng: random.Random) -> bytes:
    """The end cut off."""
    return data[: rng.randrange(len(data) + 1)]


def splice(data: bytes, seeds: list[bytes], rng: random.Random) -> bytes:
    """The head of one model and the tail of another."""
    other = rng.choice(seeds)
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other)) :]


def cut(data: bytes, seeds: list[bytes], rng: random.Random) -> bytes:
    """Some bytes in the middle left out."""
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.randint(1, 32) :]


def repeat(data: bytes, seeds: list[bytes], rng: random.Random) -> bytes:
    """Some bytes in the middle twice."""
    start = rng.randrange(len(data) + 1)
    end = start + rng.randint(1, 64)
    return data[:end] + data[start:end] + data[end:]


def fields(data: bytes, seeds: list[bytes], rng: random.Random) -> bytes:
    """One to three fields of the parsed protobuf; the result is a well-formed protobuf, so it gets further inside."""
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(data)
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            _mutate_message(rng.choice(list(_below(proto))), rng, _names(proto))
        return bytes(proto.SerializeToString())
    except (DecodeError, UnicodeError, ValueError, TypeError):
        return flip(data, seeds, rng)  # not a protobuf any more after earlier mutations


def _names(proto: onnx.ModelProto) -> list[str]:
    names = [name for node in proto.graph.node for name in (*node.input, *node.output, node.op_type)]
    return [*names, *(tensor.name for tensor in proto.graph.initializer), *STRINGS]


def _below(message: Message) -> Iterator[Message]:
    """`message` and every message inside it."""
    yield message
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in value if field.is_repeated else (value,):
                yield from _below(inner)


def _mutate_message(message: Message, rng: random.Random, names: list[str]) -> None:
    present = [field for field, _ in message.ListFields()]
    anything = list(message.DESCRIPTOR.fields)
    field = rng.choice(present if present and rng.random() < 0.8 else anything)
    if field.is_repeated:
        _mutate_list(getattr(message, field.name), field, rng, names)
    elif field.type == FieldDescriptor.TYPE_MESSAGE or rng.random() < 0.2:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _scalar(field, rng, names))


def _mutate_list(values: Any, field: FieldDescriptor, rng: random.Random, names: list[str]) -> None:
    is_message = field.type == FieldDescriptor.TYPE_MESSAGE
    action = rng.choice(("delete", "duplicate", "swap", "change", "clear"))
    if not values:
        if is_message:
            values.add()
        else:
            values.append(_scalar(field, rng, names))
        return
    i, j = rng.randrange(len(values)), rng.randrange(len(values))
    if action == "clear":
        del values[:]
    elif action == "delete":
        del values[i]
    elif action == "duplicate":
        values.append(values[i])
    elif is_message:
        first, second = type(values[i])(), type(values[j])()
        first.CopyFrom(values[i])
        second.CopyFrom(values[j])
        values[i].CopyFrom(second)
        values[j].CopyFrom(first)
    else:
        values[i] = _scalar(field, rng, names) if action == "change" else values[j]


def _scalar(field: FieldDescriptor, rng: random.Random, names: list[str]) -> Any:
    match field.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            if field.type == FieldDescriptor.TYPE_BYTES:
                return rng.randbytes(rng.choice((0, 1, 3, 4, 16)))
            return rng.choice(names)
        case FieldDescriptor.CPPTYPE_FLOAT | FieldDescriptor.CPPTYPE_DOUBLE:
            return rng.choice((0.0, -1.0, 1e30, float("nan"), float("inf"), 1e-30))
        case FieldDescriptor.CPPTYPE_ENUM:
            return rng.choice([value.number for value in field.enum_type.values])
        case FieldDescriptor.CPPTYPE_INT32:
            return rng.choice([n for n in NUMBERS if -(2**31) <= n < 2**31] + list(range(30)))
        case FieldDescriptor.CPPTYPE_UINT64:
            return rng.choice([n for n in NUMBERS if n >= 0])
    return rng.choice(NUMBERS)

"""Reading a pickle without executing it.

A pickle is a program for a small stack machine whose instructions can import and call anything. This machine imports
nothing and calls nothing: every global stays a name (`Global`), tensors become descriptions (`TensorRef`), instances of
the classes that model pickles are made of become inert records (`Stub`), and any other call is refused by its name.

One mechanism for every pickle, in place of `torch.load(weights_only=True)` with safe globals, because that one cannot
read whole modules (whose classes would have to be imported), and because its allowlist is a global of the process.
pickletools, which only parses, supplies the instructions.
"""

from __future__ import annotations

import pickletools
import sys
from collections.abc import Iterable
from typing import IO, Any

from yolonas.pickle_records import (
    CALLS,
    STUB_PACKAGES,
    TYPES,
    Global,
    NumpyArray,
    NumpyDtype,
    RefusedPickleError,
    StorageRef,
    Stub,
    checked_key,
    instance_of,
    storage_ref,
)

MAX_OPERATIONS = 5_000_000  # a checkpoint of L with EMA weights and AdamW state has 127,000
MAX_COPIED = 10_000_000  # elements or bytes copied by calls: a memoized list can be copied by every instruction


def read_pickle(stream: IO[bytes], storages: dict[str, StorageRef]) -> Any:
    """Run one pickle from `stream`, which is left behind its end; the storages it mentions are added to `storages`.

    Raises RefusedPickleError for a global that could run code, and ValueError, IndexError, KeyError or TypeError for
    damaged or absurd input.
    """
    return _Machine(storages).run(stream)


class _Machine:
    def __init__(self, storages: dict[str, StorageRef]) -> None:
        self.storages = storages
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.copied = 0

    def run(self, stream: IO[bytes]) -> Any:
        for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
            if count > MAX_OPERATIONS:
                raise ValueError(f"its pickle has more than {MAX_OPERATIONS} instructions")
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, arg)
        raise ValueError("its pickle has no end")

    def step(self, name: str, arg: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marks.append(len(stack))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_LIST" | "LIST":
                stack.append(self.pop_mark() if name == "LIST" else [])
            case "EMPTY_TUPLE" | "TUPLE":
                stack.append(tuple(self.pop_mark()) if name == "TUPLE" else ())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack[-int(name[-1]) :] = [tuple(self.top(int(name[-1])))]
            case "EMPTY_DICT" | "DICT":
                stack.append(_updated({}, self.pop_mark() if name == "DICT" else []))
            case "EMPTY_SET":
                stack.append(set())
            case "FROZENSET":
                stack.append(frozenset(map(checked_key, self.pop_mark())))
            case "APPEND" | "APPENDS":
                items = [stack.pop()] if name == "APPEND" else self.pop_mark()
                instance_of(stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else self.pop_mark()
                _updated(instance_of(stack[-1], dict), items)
            case "ADDITEMS":
                items = self.pop_mark()
                instance_of(stack[-1], set).update(map(checked_key, items))
            case "POP":
                if self.marks and self.marks[-1] == len(stack):
                    self.marks.pop()
                else:
                    stack.pop()
            case "POP_MARK":
                self.pop_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[arg] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[arg])
            case "GLOBAL":
                stack.append(_global(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_global(module, attribute))
            case "REDUCE" | "NEWOBJ":
                args = stack.pop()
                stack.append(self.call(stack.pop(), args))
            case "NEWOBJ_EX":
                kwargs, args = stack.pop(), stack.pop()
                stack.append(self.call(stack.pop(), args))
                self.build(stack[-1], kwargs)
            case "OBJ":
                target, *arguments = self.pop_mark()
                stack.append(self.call(target, tuple(arguments)))
            case "INST":
                stack.append(self.call(_global(*arg.split(" ", 1)), tuple(self.pop_mark())))
            case "BUILD":
                state = stack.pop()
                self.build(stack[-1], state)
            case "BINPERSID":
                stack.append(storage_ref(stack.pop(), self.storages))
            case _:
                # Literals carry their value. What is left has none, or reaches outside the file: EXT* (the process's
                # table of extension codes), PERSID (ids as text, which torch never wrote), *_BUFFER.
                if name.startswith(("EXT", "PERSID")) or "BUFFER" in name:
                    raise ValueError(f"its pickle uses {name}")
                stack.append(arg)

    def top(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("its pickle takes more from the stack than there is")
        return self.stack[-count:]

    def pop_mark(self) -> list[Any]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def charge(self, values: Iterable[Any]) -> None:
        self.copied += sum(len(v) for v in values if isinstance(v, str | bytes | list | tuple | dict | set))
        if self.copied > MAX_COPIED:
            raise ValueError("its pickle grows without bounds")

    def call(self, target: Any, args: Any) -> Any:
        if not isinstance(target, Global) or not isinstance(args, tuple):
            raise ValueError("its pickle calls something that is not a class or a function")
        name = str(target)
        self.charge(args)
        if name in CALLS:
            return CALLS[name](*args)
        if name.startswith(STUB_PACKAGES):
            return Stub(name, args)
        raise RefusedPickleError(name)

    def build(self, instance: Any, state: Any) -> None:
        """Give an instance its attributes. Nothing but the records of this module can receive any."""
        if isinstance(instance, Stub):
            for part in state if isinstance(state, tuple) else (state,):
                self.charge((part,))
                instance.state.update(part if isinstance(part, dict) else {"__setstate__": part})
        elif isinstance(instance, NumpyDtype | NumpyArray):
            self.charge((state, *state))
            instance.set(state)
        elif not isinstance(instance, dict):  # a state_dict's `_metadata` says nothing that is needed
            raise ValueError(f"its pickle sets attributes of a {type(instance).__name__}")


def _global(module: Any, name: Any) -> Global:
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("its pickle names a global that is not text")
    module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)  # their names in Python 2
    target = Global(module, name)
    plain = name.isidentifier() and all(part.isidentifier() for part in module.split("."))
    if not plain:  # "torch.nn" + "Module.__init__.__globals__": the attribute chains of protocol 4
        raise RefusedPickleError(str(target))
    known = str(target) in CALLS or str(target) in TYPES
    if module.partition(".")[0] in sys.stdlib_module_names and not known:
        raise RefusedPickleError(str(target))
    return target


def _updated(target: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[checked_key(key)] = value
    return target

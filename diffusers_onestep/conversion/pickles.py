"""Reading checkpoints that are pickles, without running anything that they hold.

A pickle is a program. The reader here knows no function of it but those that build tensors and plain containers,
written below; it imports nothing, whatever a file names, and refuses everything else by name. Objects of the EDM
family carry the source text of their class, which is dropped unread. What is allocated is bounded by the size of the
file.
"""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of torch.save before zip files
_PLAIN = (str, int, float, bytes, type(None))
# what the bytes of a file can raise in the machines that read it, which check little; all else is a bug of ours
_FILE_ERRORS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError, OSError, EOFError)
_FILE_ERRORS += (MemoryError, struct.error, zipfile.BadZipFile, pickle.UnpicklingError, SafetensorError)
_MAX_DEPTH, _MAX_MODULES = 16, 100_000
_MAX_DIMENSIONS, _MAX_NAME = 16, 100


class UnsafeCheckpointError(ValueError):
    """A file that names what a checkpoint has no use for."""


@dataclass
class StoredModule:
    """A module of a pickle: its class's name and what it held, no class and no code.

    Attributes:
        class_name (`str`): as the file has it.
        state (`dict`): the object's attributes, `_parameters`, `_buffers` and `_modules` among them.
        version (`int`, *optional*): of the layout of EDM's pickles; None if it is no plausible number.
    """

    class_name: str = ""
    state: dict[str, Any] = field(default_factory=dict)
    version: int | None = None

    def __setstate__(self, state: Any) -> None:
        self.state = state if isinstance(state, dict) else {}

    def options(self) -> dict[str, Any]:
        """The arguments that the object was made with."""
        args, kwargs = self.state.get("_init_args", ()), self.state.get("_init_kwargs", {})
        names = ("img_resolution", "img_channels", "label_dim")
        if not isinstance(kwargs, dict) or not isinstance(args, (list, tuple)) or len(args) > len(names):
            raise ValueError(f"the arguments of {self.class_name!r} are not readable")
        return dict(zip(names, args, strict=False)) | kwargs

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Parameters and buffers by their dotted names, in the order of the original's state dict."""
        tensors: dict[str, torch.Tensor] = {}
        seen = 0

        def walk(module: Any, prefix: str, depth: int) -> None:
            nonlocal seen
            seen += 1
            if not isinstance(module, StoredModule) or depth > _MAX_DEPTH or seen > _MAX_MODULES:
                raise ValueError(f"the module {prefix.rstrip('.')!r} is not readable")
            hidden = module.state.get("_non_persistent_buffers_set")
            hidden = hidden if isinstance(hidden, set) else ()
            for kind in ("_parameters", "_buffers"):
                for name, tensor in _items(module.state.get(kind), prefix):
                    if isinstance(tensor, torch.Tensor) and name not in hidden:
                        tensors[prefix + name] = tensor
            for name, child in _items(module.state.get("_modules"), prefix):
                if child is not None:
                    walk(child, f"{prefix}{name}.", depth + 1)

        walk(self, "", 0)
        return tensors


def _items(mapping: Any, where: str):
    if mapping is None:
        return []
    if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping):
        raise ValueError(f"the module {where.rstrip('.')!r} is not readable")
    return list(mapping.items())


class _Ignored:
    """Stands in for what the files carry and nobody needs: NumPy scalars, bound methods used as hooks."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


@dataclass
class _Storage:
    """Elements of one dtype, as bytes of the file."""

    elements: torch.Tensor


def _persistent_object(meta: Any) -> StoredModule:
    name = meta.get("class_name") if isinstance(meta, dict) and meta.get("type") == "class" else None
    if not isinstance(name, str) or len(name) > _MAX_NAME:
        raise UnsafeCheckpointError("it holds a persistent object that is no class instance")
    version = meta.get("version")
    version = version if isinstance(version, int) and 0 <= version < 1000 else None
    # a reference: the state may be complete only later
    return StoredModule(name, meta["state"] if isinstance(meta.get("state"), dict) else {}, version)


def _rebuild_tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> torch.Tensor:
    """A view into a storage that reads nothing twice: no larger than what the file holds."""
    if not isinstance(storage, _Storage) or not all(isinstance(n, int) for n in (offset, *size, *stride)):
        raise UnsafeCheckpointError("it holds a tensor without a storage")
    size, stride, held = tuple(size), tuple(stride), storage.elements.numel()
    if len(size) > _MAX_DIMENSIONS:  # each of which takes memory
        raise UnsafeCheckpointError(f"it holds a tensor of {len(size)} dimensions")
    count = 1
    for n in size:
        count *= n
    last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
    if min((offset, *size, *stride), default=0) < 0 or count > held or (count and last >= held):
        raise UnsafeCheckpointError(f"it holds a tensor of shape {size} that is larger than its storage of {held}")
    return storage.elements.as_strided(size, stride, offset) if count else storage.elements.new_empty(size)


_DTYPES = {
    f"{name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32,
        "Double": torch.float64,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}
_CONTAINERS = ("ModuleDict", "ModuleList", "Sequential")


def _module_class(name: str) -> type[StoredModule]:
    return type(name, (StoredModule,), {"__init__": lambda self: StoredModule.__init__(self, name)})


# everything that a file may name, besides the functions of `_Reader` that use its bytes
_GLOBALS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): lambda: OrderedDict(),
    ("dnnlib.util", "EasyDict"): lambda: {},
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent_object,
    ("torch._utils", "_rebuild_parameter"): lambda data, requires_grad=True, hooks=None: data,
    ("numpy", "dtype"): _Ignored,
    ("numpy", "ndarray"): _Ignored,
    ("builtins", "getattr"): _Ignored,
    **{("torch.nn.modules.container", name): _module_class(name) for name in _CONTAINERS},
    **{(f"numpy.{c}.multiarray", name): _Ignored for c in ("core", "_core") for name in ("scalar", "_reconstruct")},
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
}
# opcodes that allocate by a number in the file, import by another way, or reach outside it
_REFUSED_OPCODES = [
    opcode[0]
    for opcode in (
        *(pickle.DICT, pickle.FROZENSET, pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
        *(pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX),
    )
]


class _Bounded:
    """A file of which no more is asked for than it has: a pickle may state any length."""

    def __init__(self, file: io.BufferedIOBase, size: int):
        self.file, self.size = file, size

    def read(self, n: int = -1) -> bytes:
        left = self.size - self.file.tell()
        return self.file.read(left if n < 0 else min(n, left))

    def readline(self) -> bytes:
        return self.file.readline()


class _Budget:
    """Bytes that the functions which a file calls may yet use. Each of its own bytes is encoded once, loaded once and
    part of one tensor: a file can call a function any number of times on the same bytes."""

    def __init__(self, size: int):
        self.left = 3 * size

    def spend(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise UnsafeCheckpointError("it uses the same bytes again and again")


class _Reader(pickle._Unpickler):
    """The pickle machine without imports. (The one written in Python: its memo is a dict, where the other allocates an
    array up to the largest number that a file states.)"""

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: Any, budget: _Budget, storages: Any = None):
        super().__init__(file)
        self._budget, self._storages = budget, storages
        self._globals = _GLOBALS | {
            ("_codecs", "encode"): self.encode,
            ("torch.storage", "_load_from_bytes"): self.load_from_bytes,
            ("torch._utils", "_rebuild_tensor_v2"): self.rebuild_tensor,
        }

    def encode(self, text: Any, encoding: Any = "latin1") -> bytes:
        if not isinstance(text, str):
            raise UnsafeCheckpointError("it encodes something that is no text")
        self._budget.spend(len(text))
        return text.encode("latin1")

    def load_from_bytes(self, data: Any) -> Any:
        if not isinstance(data, bytes):
            raise UnsafeCheckpointError("it holds a storage without data")
        self._budget.spend(len(data))
        return _read_legacy(data, self._budget)

    def rebuild_tensor(self, *arguments: Any) -> torch.Tensor:
        tensor = _rebuild_tensor(*arguments)
        self._budget.spend(tensor.numel() * tensor.element_size())
        return tensor

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._globals:
            raise UnsafeCheckpointError(f"it names {module}.{name}, which a checkpoint has no use for")
        return self._globals[module, name]

    def persistent_load(self, pid: Any) -> Any:
        if self._storages is None:
            raise UnsafeCheckpointError("it names a persistent object")
        return self._storages(pid)

    def load_reduce(self):
        arguments, function = self.stack.pop(), self.stack[-1]
        if not (isinstance(arguments, tuple) and any(function is allowed for allowed in self._globals.values())):
            raise UnsafeCheckpointError("it calls something that is no function")
        self.stack[-1] = function(*arguments)

    def load_newobj(self):
        self.load_reduce()  # instances are made by calling our own classes

    def load_build(self):
        state, instance = self.stack.pop(), self.stack[-1]
        if isinstance(instance, (StoredModule, _Ignored)):
            instance.__setstate__(state)
        elif not isinstance(instance, dict):
            raise UnsafeCheckpointError(f"it sets the state of a {type(instance).__name__}")

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def load_setitems(self):
        self.set_items(self.pop_mark())

    def set_items(self, items: list) -> None:
        # plain keys: hashing nested tuples can take for ever
        target = self.stack[-1]
        if not isinstance(target, dict) or not all(isinstance(key, _PLAIN) for key in items[::2]):
            raise UnsafeCheckpointError("it fills something that is no plain dict")
        target.update(zip(items[::2], items[1::2], strict=True))

    def load_additems(self):
        items, target = self.pop_mark(), self.stack[-1]
        if not isinstance(target, set) or not all(isinstance(item, _PLAIN) for item in items):
            raise UnsafeCheckpointError("it fills something that is no plain set")
        target.update(items)

    def load_refused(self):
        raise UnsafeCheckpointError("it uses an opcode that a checkpoint has no use for")

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.ADDITEMS[0]] = load_additems
    dispatch |= dict.fromkeys(_REFUSED_OPCODES, load_refused)


def _check_key(key: Any) -> None:
    if not isinstance(key, (str, int)):  # hashing or printing nested tuples can take for ever
        raise UnsafeCheckpointError(f"it names a storage by a {type(key).__name__}, not by a text or a number")


class _StorageTable:
    """Storages that a torch file names, `("storage", type, key, location, count)`."""

    def __init__(self, limit: int):
        self.limit, self.storages, self.counts = limit, {}, {}

    def __call__(self, pid: Any) -> _Storage:
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], torch.dtype)):
            raise UnsafeCheckpointError("it names a persistent object that is no storage")
        _, dtype, key, _, count = pid[:5]
        if not isinstance(count, int) or count < 0 or count * dtype.itemsize > self.limit:
            raise UnsafeCheckpointError(f"it states {count} elements, more than the file holds")
        _check_key(key)
        if key not in self.storages:
            self.storages[key] = self.fill(str(key), dtype, count)
        return self.storages[key]

    def fill(self, key: str, dtype: torch.dtype, count: int) -> _Storage:
        """Room for `count` elements that are read later, no more than the file has."""
        self.limit -= count * dtype.itemsize
        return _Storage(torch.empty(count, dtype=dtype))


class _ZipStorages(_StorageTable):
    """Storages that are files of a zip archive, read at once."""

    def __init__(self, archive: zipfile.ZipFile, root: str, limit: int):
        super().__init__(limit)
        self.archive, self.root = archive, root

    def fill(self, key, dtype, count):
        data = self.archive.read(f"{self.root}/data/{key}")
        if len(data) < count * dtype.itemsize:
            raise ValueError(f"its storage {key!r} is truncated")
        return _Storage(_elements(data, dtype, count))


def _elements(data: bytes, dtype: torch.dtype, count: int) -> torch.Tensor:
    if not count:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(data[: count * dtype.itemsize]), dtype=dtype)


def _read_legacy(data: bytes, budget: _Budget) -> Any:
    """What `torch.save` wrote before it wrote zip files: four pickles, then the storages."""
    bounded = _Bounded(io.BytesIO(data), len(data))
    magic, protocol = _Reader(bounded, budget).load(), _Reader(bounded, budget).load()
    if (magic, protocol) != (_LEGACY_MAGIC, _LEGACY_PROTOCOL):
        raise ValueError("it holds a storage that torch did not write")
    _Reader(bounded, budget).load()  # sizes and byte order of the machine
    table = _StorageTable(len(data))
    content = _Reader(bounded, budget, table).load()
    for key in _Reader(bounded, budget).load():
        _check_key(key)
        elements = table.storages[key].elements
        (count,) = torch.frombuffer(bytearray(bounded.read(8)), dtype=torch.int64).tolist()
        raw = bounded.read(elements.numel() * elements.element_size())
        if count != elements.numel() or len(raw) < count * elements.element_size():
            raise ValueError(f"its storage {key!r} is truncated")
        if count:
            elements.copy_(_elements(raw, elements.dtype, count))
    return content


def _read_zip(path: Path, budget: _Budget) -> Any:
    with zipfile.ZipFile(path) as archive:
        held = sum(entry.file_size for entry in archive.infolist())
        if held > path.stat().st_size:  # torch stores without compression
            raise UnsafeCheckpointError(f"it unpacks to {held} bytes, more than it has")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is a compressed zip archive, which torch does not write")
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise ValueError("it is a zip archive, but none of torch")
        data = archive.read(pickles[0])
        table = _ZipStorages(archive, pickles[0].partition("/")[0], held)
        return _Reader(_Bounded(io.BytesIO(data), len(data)), budget, table).load()


def read_checkpoint(path: str | os.PathLike) -> Any:
    """The content of a pickle, a `torch.save` file or a safetensors file: dicts, lists, numbers, tensors on the CPU,
    and a `StoredModule` where the file has an object.

    Raises:
        ValueError: if it is no such file, or truncated.
        UnsafeCheckpointError: if it names anything that is not a tensor or a container; says what.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"`file` must be a checkpoint, but {str(path)!r} does not exist.")
    size = path.stat().st_size
    budget = _Budget(size)
    try:
        with path.open("rb") as file:
            start = file.read(64)
            file.seek(0)
            if start.startswith(b"PK\x03\x04"):
                return _read_zip(path, budget)
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                return load_file(path)
            if _LEGACY_MAGIC.to_bytes(10, "little") in start:
                return _read_legacy(file.read(), budget)
            return _Reader(_Bounded(file, size), budget).load()
    except UnsafeCheckpointError as error:
        raise UnsafeCheckpointError(f"`file` {str(path)!r} is refused: {error}.") from None
    except _FILE_ERRORS as error:
        said = isinstance(error, (ValueError, RuntimeError, OSError, EOFError, pickle.UnpicklingError))
        reason = first_line(error) if said else type(error).__name__
        raise ValueError(
            f"`file` {str(path)!r} is no readable checkpoint, of pickle, torch.save or safetensors ({reason})."
        ) from error


def first_line(error: Exception) -> str:
    """What an error says, without the traces that torch appends."""
    return str(error).partition("\n")[0] or type(error).__name__

"""Arguments of denoiser calls: which calls can be one call, and how they are joined.

An argument is *batched* when its first dimension counts the rows of the call (a request has a row per image,
two with classifier-free guidance); anything else is *shared*, and has to be equal for calls to be joined.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

# A value for every row, or one for all: expanded to one per row, for rows are at different steps.
_PER_ROW = frozenset({"timestep", "timesteps", "t", "timestep_r", "r_timestep", "guidance"})
# Positions without a batch dimension, whatever their length happens to be.
_POSITIONS = frozenset({"txt_ids", "img_ids", "image_rotary_emb", "rotary_embedding", "video_coords"})

_VALUES = (bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True, slots=True)
class Rows:
    """One entry per row on dim 0. ``mixes``: dtypes may differ between calls, for a wider one holds both."""

    tensor: Tensor
    mixes: bool = False


@dataclass(frozen=True, slots=True)
class RowList:
    """A Python list with one entry per row."""

    items: list[object]


Node: TypeAlias = object  # Rows, RowList, a shared Tensor or value, or a dict, list or tuple of nodes


@dataclass(frozen=True, slots=True)
class Signature:
    """The parameters of a denoiser's ``forward``, in order, with what they are when left out."""

    names: tuple[str, ...]
    defaults: Mapping[str, object]

    @classmethod
    def of(cls, module: torch.nn.Module) -> Signature | None:
        """None for a signature whose arguments cannot all be given by name."""
        parameters = inspect.signature(module.forward).parameters.values()
        if any(p.kind in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY) for p in parameters):
            return None
        named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
        defaults = {p.name: p.default for p in named if p.default is not p.empty}
        return cls(tuple(p.name for p in named), defaults)

    def bind(self, args: Sequence[object], kwargs: Mapping[str, object]) -> dict[str, object]:
        return {**self.defaults, **dict(zip(self.names, args, strict=False)), **kwargs}


@dataclass(frozen=True, slots=True, eq=False)
class Arguments:
    """The arguments of one call by name, sorted into what is batched and what is shared."""

    rows: int
    nodes: Mapping[str, Node]
    first: str  # the argument that counts the rows: what is denoised
    structure: Hashable  # what is batched and what is shared, without sizes
    key: Hashable  # equal for calls that can be joined, as far as their shared tensors are equal too
    shared: tuple[Tensor, ...]

    @classmethod
    def read(
        cls, signature: Signature, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> Arguments | None:
        """None where no argument tells the number of rows."""
        bound = signature.bind(args, kwargs)
        first = bound.get(signature.names[0])
        rows = _count_rows(first)
        if rows is None:
            return None
        device = first.device if isinstance(first, Tensor) else None
        nodes = {name: _node(name, value, rows, device) for name, value in bound.items()}
        shared: list[Tensor] = []
        details = [(name, _describe(nodes[name], shared)) for name in sorted(nodes)]
        return cls(
            rows=rows,
            nodes=nodes,
            first=signature.names[0],
            structure=tuple((name, structure) for name, (structure, _) in details),
            key=tuple((name, *detail) for name, detail in details),
            shared=tuple(shared),
        )

    def goes_with(self, other: Arguments) -> bool:
        """Whether one call can take the rows of both."""
        return self.key == other.key and all(
            mine is theirs or torch.equal(mine, theirs)
            for mine, theirs in zip(self.shared, other.shared, strict=True)
        )

    def cut(self, start: int, stop: int) -> Arguments:
        """The rows from ``start`` to ``stop``."""
        return self._of_rows(slice(start, stop), stop - start)

    def select(self, rows: Sequence[int]) -> Arguments:
        """These rows, in this order."""
        return self._of_rows(list(rows), len(rows))

    def denoised(self) -> list[Tensor] | None:
        """What is denoised, by row. None: it has no rows."""
        match self.nodes[self.first]:
            case Rows(tensor):
                return list(tensor.unbind())
            case RowList(items):
                return [item for item in items if isinstance(item, Tensor)]
        return None

    def _of_rows(self, rows: slice | list[int], count: int) -> Arguments:
        return replace(self, rows=count, nodes={name: _take(node, rows) for name, node in self.nodes.items()})


def join(parts: Sequence[Arguments]) -> dict[str, object]:
    """Keyword arguments of one call with the rows of all, in order; what is shared is the first one's."""
    return {name: _join([part.nodes[name] for part in parts]) for name in parts[0].nodes}


# --- Nodes -----------------------------------------------------------------------------------------


def _count_rows(first: object) -> int | None:
    if isinstance(first, Tensor) and first.ndim:
        return int(first.shape[0])
    if isinstance(first, list) and first and isinstance(first[0], Tensor):
        return len(first)
    return None


def _node(name: str, value: object, rows: int, device: torch.device | None) -> Node:
    if name in _PER_ROW and (per_row := _one_per_row(value, rows, device)) is not None:
        return per_row
    match value:
        case Tensor() if value.ndim > 0 and value.shape[0] == rows:
            return value if name in _POSITIONS and value.ndim <= 2 else Rows(value)
        case list() if _is_per_row(value, rows):
            return RowList(value)
        case dict():
            return {key: _node(str(key), item, rows, device) for key, item in value.items()}
        case list() | tuple():
            nodes = [_node(name, item, rows, device) for item in value]
            return tuple(nodes) if isinstance(value, tuple) else nodes
        case _:
            return value


def _one_per_row(value: object, rows: int, device: torch.device | None) -> Rows | None:
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        return None
    tensor = value if isinstance(value, Tensor) else torch.tensor(value)
    if tensor.ndim == 0 or tensor.shape == (1,):
        tensor = tensor.reshape(1).expand(rows)
    if tensor.shape != (rows,):
        return None
    is_wide = not tensor.is_floating_point() or tensor.dtype in (torch.float32, torch.float64)
    return Rows(tensor.to(device), mixes=is_wide)


def _is_per_row(items: list[object], rows: int) -> bool:
    """Not a list of layers or adapters, each of which has all rows."""
    return len(items) == rows and all(
        isinstance(item, list | tuple)
        or (isinstance(item, Tensor) and not (item.ndim and item.shape[0] == rows))
        for item in items
    )


def _describe(node: Node, shared: list[Tensor]) -> tuple[Hashable, Hashable]:
    """The node without sizes, and with them; notes its shared tensors."""
    match node:
        case Rows(tensor, mixes):
            dtype = None if mixes else tensor.dtype
            return "rows", (tuple(tensor.shape[1:]), dtype, tensor.device)
        case RowList(items):
            kinds = {(item.ndim, item.dtype) if isinstance(item, Tensor) else type(item) for item in items}
            return "row list", frozenset(kinds)
        case Tensor():
            shared.append(node)
            return "shared", (tuple(node.shape), node.dtype, node.device)
        case dict() | list() | tuple():
            return _describe_container(node, shared)
        case _:
            # Anything else is known by its identity: it is alive as long as the call that waits with it.
            is_value = node is None or isinstance(node, _VALUES)
            return "value", (type(node), node if is_value else id(node))


def _describe_container(
    node: dict[object, Node] | list[Node] | tuple[Node, ...], shared: list[Tensor]
) -> tuple[Hashable, Hashable]:
    if isinstance(node, dict):
        named = [(str(key), node[key]) for key in sorted(node, key=str)]
    else:
        named = [(str(index), item) for index, item in enumerate(node)]
    parts = [(name, *_describe(item, shared)) for name, item in named]
    return (
        (type(node), tuple((name, structure) for name, structure, _ in parts)),
        tuple((name, detail) for name, _, detail in parts),
    )


def _join(nodes: Sequence[Node]) -> object:
    first = nodes[0]
    match first:
        case Rows():
            tensors = [node.tensor for node in nodes if isinstance(node, Rows)]
            return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        case RowList():
            return [item for node in nodes if isinstance(node, RowList) for item in node.items]
        case dict():
            return {key: _join([node[key] for node in nodes if isinstance(node, dict)]) for key in first}
        case list() | tuple():
            sequences = [node for node in nodes if isinstance(node, list | tuple)]
            joined = [_join(items) for items in zip(*sequences, strict=True)]
            return tuple(joined) if isinstance(first, tuple) else joined
        case _:
            return first


def _take(node: Node, rows: slice | list[int]) -> Node:
    match node:
        case Rows(tensor, mixes):
            return Rows(tensor[rows], mixes)
        case RowList(items):
            return RowList(items[rows] if isinstance(rows, slice) else [items[row] for row in rows])
        case dict():
            return {key: _take(item, rows) for key, item in node.items()}
        case list():
            return [_take(item, rows) for item in node]
        case tuple():
            return tuple(_take(item, rows) for item in node)
        case _:
            return node

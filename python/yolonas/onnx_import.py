"""An ONNX file of a YOLO-NAS, as super-gradients or yolonas exports it, back into our network.

Exported graphs have lost the names of their weights, optimisers reorder their nodes, and equal tensors are merged. What
is left is the structure: which convolution feeds which. It tells every convolution of a YOLO-NAS apart, so files
are read by it, and a file with another structure is refused rather than misread.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from yolonas.errors import CheckpointError
from yolonas.extras import require
from yolonas.model import VARIANTS, YoloNAS
from yolonas.model.blocks import Bottleneck
from yolonas.model.config import REG_MAX

CONVOLUTIONS = ("Conv", "FusedConv", "ConvTranspose")
QUANTIZED = ("DequantizeLinear", "QuantizeLinear", "QLinearConv", "ConvInteger", "DynamicQuantizeLinear")
# Between the input and the first convolution: what keeps pixels as they are, up to one factor.
PLAIN = ("Cast", "Mul", "Div", "Identity", "Constant", "Transpose")


@dataclass
class Convolution:
    """A convolution in a graph: its weight's shape, and which convolutions its input comes from."""

    shape: tuple[int, ...]
    transposed: bool
    sources: frozenset[int]  # nearest convolutions upstream, by their index
    name: str = ""  # the module, in our network
    input: Any = None  # the tensor that it reads
    values: tuple[Any, Any] = field(default=(None, None))  # weight and bias, in a file


@dataclass(frozen=True)
class Imported:
    """The network in an ONNX file: its skeleton (fused, without memory), and its tensors by their names in it."""

    skeleton: YoloNAS
    tensors: dict[str, Tensor]
    normalizes: bool  # the file changes the pixels by more than one factor before its first convolution
    metadata: dict[str, str]  # of the file


def read_onnx(path: Path) -> Imported:
    """The fused network that an ONNX file holds, float32. Raises CheckpointError, whose message follows the path."""
    onnx = require("onnx", "onnx", "reading an ONNX file")
    try:
        model = onnx.load_model(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own errors have no common base that is public
        raise CheckpointError("is damaged or not an ONNX file: copy or export it again") from error
    if any(node.op_type in QUANTIZED for node in model.graph.node):
        raise CheckpointError("is quantized, so its weights are rounded to 8 bit: load the file it was quantized from")
    file = _File(model.graph, onnx)
    found = file.convolutions
    if not found:
        raise CheckpointError("holds no convolution, so it is no YOLO-NAS")
    skeleton = _skeleton([conv.shape for conv in found])
    ours = structure(skeleton)
    tensors: dict[str, Tensor] = {}
    inputs: dict[str, Any] = {}
    for conv, theirs in _matched(ours, found):
        weight, bias = (None if v is None else file.tensor(v) for v in theirs.values)
        if weight is None:
            raise CheckpointError("keeps its weights in another file, or computes them: export it as one plain file")
        channels = weight.shape[1 if conv.transposed else 0]
        tensors[f"{conv.name}.weight"] = weight
        tensors[f"{conv.name}.bias"] = torch.zeros(channels) if bias is None else bias
        inputs[conv.name] = theirs.input
    for name, module in skeleton.named_modules():
        if isinstance(module, Bottleneck):
            first = next(key for key in inputs if key.startswith(f"{name}.cv1."))
            factor = file.factors.get(inputs[first])
            alpha = None if factor is None else file.tensor(factor)
            # A factor of exactly 1 is what exporters and simplifiers drop.
            tensors[f"{name}.alpha"] = torch.ones(1) if alpha is None else alpha.reshape(1)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    return Imported(skeleton, tensors, file.normalizes(inputs["backbone.stem.conv.rbr_reparam"]), metadata)


def structure(model: YoloNAS) -> list[Convolution]:
    """The convolutions of a fused network in the order in which they run, and what each reads from."""
    names = {id(m): name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)}
    found: list[Convolution] = []
    order: list[str] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, _: order.append(names[id(module)]))
        for module in model.modules()
        if id(module) in names
    ]
    try:
        with torch.no_grad(), _Provenance(found):
            model(torch.empty(1, 3, 64, 64, device="meta"))
    finally:
        for hook in hooks:
            hook.remove()
    for conv, name in zip(found, order, strict=True):
        conv.name = name
    return found


class _Provenance(TorchFunctionMode):
    """Notes, while a network runs, from which convolutions each tensor comes."""

    def __init__(self, found: list[Convolution]) -> None:
        super().__init__()
        self.found = found
        self.sources: dict[int, frozenset[int]] = {}
        self.alive: list[Tensor] = []  # so that no id is used twice

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            flat = [x for a in args for x in (a if isinstance(a, list | tuple) else [a]) if isinstance(x, Tensor)]
            sources = frozenset().union(*(self.sources.get(id(x), frozenset()) for x in flat))
            if function in (torch.conv2d, torch.conv_transpose2d):
                self.found.append(Convolution(tuple(args[1].shape), function is torch.conv_transpose2d, sources))
                sources = frozenset([len(self.found) - 1])
            self.sources[id(result)] = sources
            self.alive.append(result)
        return result


class _File:
    """An ONNX graph: its convolutions in order, with where each reads from, and its scalar factors."""

    def __init__(self, graph: Any, onnx: Any) -> None:
        self.onnx = onnx
        self.constants: dict[str, Any] = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {output: node for node in graph.node for output in node.output}
        self.aliases: dict[str, str] = {}
        self.factors: dict[str, str] = {}  # the constant of one number that a tensor is multiplied by
        self.convolutions: list[Convolution] = []
        sources: dict[str, frozenset[int]] = {}
        for node in graph.node:
            inputs = [self.aliases.get(name, name) for name in node.input]
            if node.op_type == "Constant":
                value = next((a.t for a in node.attribute if a.name == "value"), None)
                if value is not None:
                    self.constants[node.output[0]] = value
            elif node.op_type == "Identity" or (node.op_type == "Cast" and inputs[0] in self.constants):
                self.aliases[node.output[0]] = inputs[0]
            upstream = frozenset().union(*(sources.get(name, frozenset()) for name in inputs))
            if node.op_type in CONVOLUTIONS and len(inputs) >= 2:
                shape = self.shape(inputs[1])
                if shape is not None and shape != (1, REG_MAX + 1, 1, 1):  # that of the DFL's expectation
                    values = (inputs[1], inputs[2] if len(inputs) > 2 and inputs[2] else None)
                    transposed = node.op_type == "ConvTranspose"
                    conv = Convolution(shape, transposed, upstream, input=inputs[0], values=values)
                    upstream = frozenset([len(self.convolutions)])
                    self.convolutions.append(conv)
            elif node.op_type == "Mul" and len(inputs) == 2:
                for factor, other in (inputs, inputs[::-1]):
                    if factor in self.constants and int(np.prod(self.shape(factor) or (1,))) == 1:
                        self.factors[other] = factor
            for name in node.output:
                sources[name] = upstream

    def shape(self, name: str) -> tuple[int, ...] | None:
        tensor = self.constants.get(name)
        return None if tensor is None else tuple(tensor.dims)

    def tensor(self, name: str) -> Tensor | None:
        """The values of a constant as float32; None where the file does not hold them."""
        tensor = self.constants.get(name)
        if tensor is None or tensor.data_location == self.onnx.TensorProto.EXTERNAL:
            return None
        values = self.onnx.numpy_helper.to_array(tensor)
        if np.issubdtype(values.dtype, np.integer):
            raise CheckpointError("holds whole numbers for weights: load the file it was quantized from")
        return torch.from_numpy(np.array(values, dtype=np.float32))

    def normalizes(self, name: str) -> bool:
        """Whether what comes before the tensor changes an image by more than one factor for all channels."""
        while name in self.producers:
            node = self.producers[name]
            inputs = [self.aliases.get(i, i) for i in node.input]
            if node.op_type not in PLAIN:
                return True
            factors = [self.tensor(i) for i in inputs if i in self.constants]
            if any(f is None or len(f.unique()) != 1 for f in factors):
                return True
            name = next((i for i in inputs if i not in self.constants), "")
        return False


def _skeleton(shapes: Sequence[tuple[int, ...]]) -> YoloNAS:
    """The fused model, without memory, that has just these convolutions."""
    given = Counter(shapes)
    for variant, numbers in VARIANTS.items():
        with torch.device("meta"):
            model = YoloNAS(variant, 1).fused()
        wanted = Counter(
            tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)
        )
        wanted.subtract((1, width, 1, 1) for width in numbers.head)
        rest = given.copy()
        rest.subtract(wanted)
        predictors = sorted(shape for shape, count in rest.items() for _ in range(abs(count)))
        classes = {shape[0] for shape in predictors}
        if len(classes) == 1 and predictors == [(*classes, width, 1, 1) for width in numbers.head]:
            with torch.device("meta"):
                return YoloNAS(variant, classes.pop()).fused()
    raise CheckpointError(
        f"holds {len(shapes)} convolutions that are not those of a fused YOLO-NAS-{', '.join(VARIANTS).upper()}: "
        "export it again with its blocks fused (prep_model_for_conversion in super-gradients)"
    )


def _matched(ours: Sequence[Convolution], theirs: Sequence[Convolution]) -> list[tuple[Convolution, Convolution]]:
    """Pairs of convolutions with the same place in the structure; CheckpointError where the structures differ.

    Colours are refined until they tell apart all that can be told apart (Weisfeiler and Leman, 1968): a convolution's
    colour becomes its own and those of the ones it reads from and feeds. What still shares a colour, such as the
    two branches of a head with as many classes as box channels, is paired in the order of the graph.
    """
    graphs = (ours, theirs)
    colours: list[list[Hashable]] = [[(c.shape, c.transposed) for c in graph] for graph in graphs]
    readers: list[defaultdict[int, list[int]]] = []
    for graph in graphs:
        readers.append(defaultdict(list))
        for i, conv in enumerate(graph):
            for source in conv.sources:
                readers[-1][source].append(i)
    kinds = 0
    while True:
        numbers: dict[Hashable, int] = {}
        refined: list[list[Hashable]] = []
        for graph, colour, read_by in zip(graphs, colours, readers, strict=True):
            keys = [
                (
                    colour[i],
                    tuple(sorted(Counter(colour[j] for j in conv.sources).items(), key=repr)),
                    tuple(sorted(Counter(colour[j] for j in read_by[i]).items(), key=repr)),
                )
                for i, conv in enumerate(graph)
            ]
            refined.append([numbers.setdefault(key, len(numbers)) for key in keys])
        colours = refined
        if Counter(colours[0]) != Counter(colours[1]):
            raise CheckpointError("has the convolutions of a YOLO-NAS, but connects them in another way")
        if len(numbers) == kinds:
            break
        kinds = len(numbers)
    places: defaultdict[Hashable, list[Convolution]] = defaultdict(list)
    for place, conv in zip(colours[1], theirs, strict=True):
        places[place].append(conv)
    pairs = [(conv, places[place].pop(0)) for place, conv in zip(colours[0], ours, strict=True)]
    index = {id(conv): i for i, conv in enumerate(theirs)}
    paired = [index[id(conv)] for _, conv in pairs]
    if any(frozenset(paired[i] for i in conv.sources) != other.sources for conv, other in pairs):
        raise CheckpointError("has the convolutions of a YOLO-NAS, but connects them in another way")
    return pairs

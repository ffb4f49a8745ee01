"""The checkpoint's integers in an exported float graph, in the place of the weights that they were dequantized to.

Portable form: integers behind DequantizeLinear. OpenVINO keeps them compressed, and ONNX Runtime turns blocks of 4 or 8
bits with the product behind them into MatMulNBits. ONNX Runtime's own form, for 8-bit weights with one scale per row:
the product of integers, which reads a batch up to twice as fast (docs/decisions/0008).
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tasks.engines.exported_graph import ExportedGraph
from tasks.quantization.checkpoint_format import QuantizedWeight

if TYPE_CHECKING:
    from onnx import ModelProto

MICROSOFT = "com.microsoft"
BLOCK_SIZES = (64, 32, 16)  # what a 4-bit row with one scale is stored as: engines fuse blocks only

Inputs = Literal["float32", "int8", "int16"]
"""What 8-bit weights are multiplied with: floats; or integers of 8 or 16 bits, with a scale per position."""


def with_integers(exported: ExportedGraph, quantized: dict[str, QuantizedWeight], inputs: Inputs) -> "ModelProto":
    """The graph with every quantized weight as integers; tied weights are held once. `exported` is not modified.

    Args:
        quantized: by module.
        inputs: int8 and int16 use operators that ONNX Runtime alone has.
    """
    import onnx
    from onnx import helper

    model = onnx.ModelProto()
    model.CopyFrom(exported.model)
    _forget_origin_(model)
    writer = _Writer({tensor.name: tensor for tensor in model.graph.initializer}, inputs)
    products, tables = _places(exported, quantized, inputs)
    nodes = list(model.graph.node)
    uses = [name for node in nodes for name in node.input]
    for name in (*products, *tables):
        assert uses.count(name) == sum(_is_use(node, name, name in tables) for node in nodes), name
    for name, place in products.items():
        if not place.multiplies_integers:
            writer.weight(name, place)
    for node in nodes:
        if node.op_type == "MatMul" and node.input[1] in products and products[node.input[1]].multiplies_integers:
            writer.integer_product(node, products[node.input[1]])
        elif node.op_type == "Gather" and node.input[0] in tables:
            writer.rows(node, tables[node.input[0]])
        else:
            writer.nodes.append(node)
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(writer.nodes)
    used = {name for node in writer.nodes for name in node.input}
    used -= {name for node in writer.nodes for name in node.output}
    model.graph.initializer.extend(tensor for name, tensor in writer.initializers.items() if name in used)
    if any(node.domain == MICROSOFT for node in writer.nodes):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return model


@dataclass(frozen=True)
class _Place:
    """What stands in the place of a float initializer."""

    weight: QuantizedWeight | str  # str: the float initializer that holds it, [out, in]
    name: str  # what its tensors' names begin with
    rows_are_outputs: bool  # how its integers are stored: [out, in], or [in, out]
    multiplies_integers: bool


def _places(
    exported: ExportedGraph, quantized: dict[str, QuantizedWeight], inputs: Inputs
) -> tuple[dict[str, _Place], dict[str, _Place]]:
    """By initializer: linear layers' weights that are not to be floats of their own; embeddings' that are integers."""
    products: dict[str, _Place] = {}
    tables: dict[str, _Place] = {}
    of_table: dict[str, QuantizedWeight] = {}
    for module, name in exported.weights.items():
        weight = quantized.get(module)
        if weight is not None and module not in exported.linears:
            of_table[name] = weight
            tables[name] = _Place(weight, name, rows_are_outputs=True, multiplies_integers=False)
    for module in exported.linears:
        name = exported.weights[module]
        table = exported.weights.get(exported.tied.get(module, ""))
        if table is not None and table not in of_table:
            products[name] = _Place(table, table, rows_are_outputs=True, multiplies_integers=False)
        elif table is not None or module in quantized:
            weight = quantized[module] if table is None else of_table[table]
            integers = inputs != "float32" and weight.bits > 4 and weight.scale.shape[1] == 1
            products[name] = _Place(weight, table or name, table is not None, integers)
    return products, tables


def _is_use(node: Any, name: str, is_table: bool) -> bool:
    """Whether a node uses a weight as its place allows: a product's right side, or a table to look up rows in."""
    if is_table:
        return bool(node.op_type == "Gather" and node.input[0] == name)
    return bool(node.op_type == "MatMul" and node.input[1] == name)


def _forget_origin_(model: "ModelProto") -> None:
    """Drops what the exporter notes for debugging: paths of this machine, lines of source, shapes of inner values."""
    del model.metadata_props[:], model.graph.metadata_props[:], model.graph.value_info[:]
    model.doc_string = model.graph.doc_string = ""
    model.producer_name, model.producer_version = "slimline", ""
    model.graph.name = "graph"
    for item in (*model.graph.node, *model.graph.initializer, *model.graph.input, *model.graph.output):
        item.doc_string = ""
        del item.metadata_props[:]


@dataclass
class _Writer:
    """Nodes as they come, and initializers by name."""

    initializers: dict[str, Any]
    inputs: Inputs
    nodes: list[Any] = field(default_factory=list)
    _written: set[str] = field(default_factory=set)

    def node(self, operator: str, inputs: list[str], name: str, domain: str = "", **attributes: Any) -> str:
        """Adds a node with one output, `name`, unless there is one."""
        from onnx import helper

        if name not in self._written:
            self._written.add(name)
            self.nodes.append(helper.make_node(operator, inputs, [name], name=name, domain=domain, **attributes))
        return name

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """An initializer; written once, however often it is used."""
        from onnx import numpy_helper

        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def integers(self, name: str, value: NDArray[Any], weight: QuantizedWeight) -> str:
        """An initializer of integers, two to a byte up to 4 bits."""
        from onnx import TensorProto, helper

        if weight.bits > 4:
            return self.constant(name, value)
        if name not in self.initializers:
            kind = TensorProto.INT4 if weight.zero_point is None else TensorProto.UINT4
            flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8) & 0xF
            flat = np.append(flat, np.zeros(flat.size % 2, dtype=np.uint8))
            packed = flat[0::2] | flat[1::2] << 4  # the first of two in the low half
            self.initializers[name] = helper.make_tensor(name, kind, value.shape, packed.tobytes(), raw=True)
        return name

    def weight(self, name: str, place: _Place) -> None:
        """The value `name`, [in, out]: dequantized, or the transposed table that holds it."""
        if isinstance(place.weight, str):
            self.node("Transpose", [place.weight], name, perm=[1, 0])
            return
        output = name + ".rows" if place.rows_are_outputs else name
        self.dequantized(place, output)
        if place.rows_are_outputs:
            self.node("Transpose", [output], name, perm=[1, 0])

    def dequantized(self, place: _Place, output: str) -> None:
        """The value `output` of integers behind DequantizeLinear."""
        weight = place.weight
        assert isinstance(weight, QuantizedWeight)
        scale, zero_point, block_size = _blocks(weight)
        values: list[NDArray[Any] | None] = [weight.integers, scale, zero_point]
        if not place.rows_are_outputs:
            values = [None if value is None else value.T for value in values]
        output_axis = 0 if place.rows_are_outputs else 1
        attributes: dict[str, Any] = {"axis": 1 - output_axis, "block_size": block_size}
        if block_size is None:
            attributes = {"axis": output_axis}
            values[1:] = [None if value is None else value.reshape(-1) for value in values[1:]]
        integers, scales, zero_points = values
        assert integers is not None
        assert scales is not None
        names = [self.integers(place.name + ".integers", integers, weight)]
        names.append(self.constant(place.name + ".scale", scales))
        if zero_points is not None:
            names.append(self.integers(place.name + ".zero_point", zero_points, weight))
        self.node("DequantizeLinear", names, output, **attributes)

    def rows(self, gather: Any, place: _Place) -> None:
        """Rows of a table: integers are looked up first, so that only these are dequantized."""
        weight = place.weight
        assert isinstance(weight, QuantizedWeight)
        output, ids, work = gather.output[0], gather.input[1], gather.output[0]
        if weight.bits <= 4 or weight.scale.shape[1] > 1:
            self.dequantized(place, place.name)
            self.nodes.append(gather)
            return
        tables = {"integers": self.integers(place.name + ".integers", weight.integers, weight)}
        tables["scale"] = self.constant(place.name + ".scale", weight.scale[:, 0])
        if weight.zero_point is not None:
            tables["zero_point"] = self.constant(place.name + ".zero_point", weight.zero_point[:, 0])
        found = {kind: self.node("Gather", [table, ids], f"{work}.{kind}", axis=0) for kind, table in tables.items()}
        last = self.constant("constant.last_axis", np.array([-1], dtype=np.int64))
        values = self.node("Cast", [found["integers"]], work + ".values", to=1)
        if weight.zero_point is not None:
            points = self.node("Cast", [found["zero_point"]], work + ".points", to=1)
            values = self.node("Sub", [values, self.node("Unsqueeze", [points, last], work + ".p")], work + ".shifted")
        scales = self.node("Unsqueeze", [found["scale"], last], work + ".scales")
        self.node("Mul", [values, scales], output)

    def integer_product(self, matmul: Any, place: _Place) -> None:
        """x @ W of integers, x rounded to 8 or 16 bits at every position.

        8 bits: x = scale * q, scale = max |x| / 127.5. 16 bits: x = scale * (high + low / 254), where `high` is
        x / scale rounded, scale = max |x| / 127, and `low` what rounding left, in 254ths; both are rows of one product,
        which reads the weights once (docs/decisions/0003). A row of zeros makes NaN of x / scale, times scale 0.
        """
        weight = place.weight
        assert isinstance(weight, QuantizedWeight)
        x, output = matmul.input[0], matmul.output[0]
        integers = weight.integers if place.rows_are_outputs else weight.integers.T
        columns = self.constant(place.name + ".integers", integers)
        if place.rows_are_outputs:  # folded when the session is made
            columns = self.node("Transpose", [columns], place.name + ".columns", perm=[1, 0])
        scale = self.constant(place.name + ".scale", weight.scale[:, 0])
        arguments = [self.rounded(x), columns, self._float("constant.one", 1.0), scale, self._middle()]
        if weight.zero_point is not None:
            arguments.append(self.constant(place.name + ".zero_point", weight.zero_point[:, 0]))
        product = self.node("MatMulIntegerToFloat", arguments, output + ".product", MICROSOFT)
        if self.inputs == "int8":
            self.node("Mul", [product, x + ".scale"], output)
            return
        scaled = self.node("Mul", [product, x + ".scales"], output + ".halves")
        self.node("ReduceSum", [scaled, self.constant("constant.first_axis", np.array([0]))], output, keepdims=0)

    def rounded(self, x: str) -> str:
        """The integers of an input, uint8 around 128; of 16 bits, high and low halves stacked on a new first axis."""
        last = self.constant("constant.last_axis", np.array([-1], dtype=np.int64))
        magnitude = self.node("Abs", [x], x + ".magnitude")
        largest = self.node("ReduceMax", [magnitude, last], x + ".largest", keepdims=1)
        steps = 127.5 if self.inputs == "int8" else 127.0
        scale = self.node("Div", [largest, self._float(f"constant.{steps}", steps)], x + ".scale")
        scaled = self.node("Div", [x, scale], x + ".scaled")
        if self.inputs == "int16":
            first, half = self.constant("constant.first_axis", np.array([0])), self._float("constant.half_steps", 254.0)
            left = self.node("Sub", [scaled, self.node("Round", [scaled], x + ".high")], x + ".left")
            low = self.node("Mul", [left, half], x + ".low")
            both = [self.node("Unsqueeze", [value, first], value + ".stacked") for value in (scaled, low)]
            scaled = self.node("Concat", both, x + ".both", axis=0)
            low_scale = self.node("Div", [scale, half], x + ".low_scale")
            scales = [self.node("Unsqueeze", [value, first], value + ".stacked") for value in (scale, low_scale)]
            self.node("Concat", scales, x + ".scales", axis=0)
        return self.node("QuantizeLinear", [scaled, self._float("constant.one", 1.0), self._middle()], x + ".integers")

    def _middle(self) -> str:
        return self.constant("constant.middle", np.array(128, dtype=np.uint8))  # fast kernels take unsigned inputs

    def _float(self, name: str, value: float) -> str:
        return self.constant(name, np.array(value, dtype=np.float32))


def _blocks(weight: QuantizedWeight) -> tuple[NDArray[np.float32], NDArray[Any] | None, int | None]:
    """[out, blocks] scales and zero points and the block's size; None: one per row."""
    in_features, groups = weight.shape[1], weight.scale.shape[1]
    if groups > 1:
        return weight.scale, weight.zero_point, in_features // groups
    size = next((size for size in BLOCK_SIZES if in_features % size == 0), None) if weight.bits <= 4 else None
    if size is None:
        return weight.scale, weight.zero_point, None
    repeats = in_features // size
    zero_point = None if weight.zero_point is None else np.repeat(weight.zero_point, repeats, axis=1)
    return np.repeat(weight.scale, repeats, axis=1), zero_point, size

"""Why channels are left alone, and what a user can do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Reason:
    """Why channels are left alone.

    Attributes:
        code: a stable name, with one entry in `ADVICE`.
        message: what to tell the user.
    """

    code: str
    message: str

    def naming(self, tensor: str) -> Reason:
        """The same, with the tensor that it is about."""
        return Reason(self.code, f"{self.message} ({tensor!r})")


# ---- of the model as a whole --------------------------------------------------------------------------------------

GRAPH_OUTPUT = Reason("graph_output", "they are an output of the model, whose shape is kept")
EXCLUDED = Reason("excluded", "the options --include and --exclude leave these nodes alone")
QUANTISED = Reason(
    "quantised", "the model is quantised; compress the floating-point model first, and quantise what comes out"
)
UNKNOWN = Reason("unknown_operator", "an operator without a rule reads them")
REFUSED = Reason("refused", "ONNX Runtime refuses the model without some of them")
RUNTIME_OPERATOR = Reason("runtime_operator", "an operator of ONNX Runtime without a rule reads or makes them")
SUBGRAPH = Reason("subgraph", "a node with sub-graphs (If, Loop, Scan) reads them")
BODY = Reason("subgraph", "they are inside the body of a node (If, Loop, Scan), which is left as it is")
TRAINING = Reason("training_mode", "a node in training mode reads them; export the model for inference")

# ---- of constants -------------------------------------------------------------------------------------------------

MISFIT = Reason("misfit", "a constant that belongs to them has another size; ONNX Runtime will not run this")
TWO_WAYS = Reason("shared_weight", "a weight is used in two ways that would need different slices")
COMPUTED_WEIGHT = Reason(
    "computed_weight", "a weight is computed in the graph from other tensors; fold constants first"
)
OVERRIDABLE = Reason("overridable", "a weight is a graph input as well, so that a caller may replace it")
SPARSE = Reason("sparse_weight", "a weight is stored as a sparse tensor, which is left as it is")
RUNTIME_WEIGHT = Reason("runtime_weight", "the weight is computed at run time")
RUNTIME_PARAMETERS = Reason("runtime_parameters", "scale or bias of a normalization are computed at run time")

# ---- of products --------------------------------------------------------------------------------------------------

SINGLE = Reason("grouped_convolution", "a grouped convolution has one of them in each group, and no group can be empty")
FROZEN_INPUT = Reason("frozen_input", "a depthwise convolution computes them one by one from channels that stay")
WEIGHT_RANK = Reason("weight_rank", "a constant weight of rank over 2 is a batch of matrices")
TRANSPOSED = Reason("transposed_data", "Gemm reads its data transposed (transA)")
CONTRACTED = Reason(
    "contracted", "two computed tensors are multiplied along them (query and key), and no weight could make up for them"
)
EQUATION = Reason("einsum", "an Einsum that is more than the product with a constant matrix reads them")
VECTOR = Reason("vector_product", "a product with a vector reads them")
UNKNOWN_DATA_RANK = Reason("unknown_rank", "the number of axes of the data that is multiplied is not known")
STEPS = Reason("recurrent_steps", "a recurrent layer moves along them step by step")

# ---- of operators that combine, mix and move ----------------------------------------------------------------------

UNKNOWN_RANK = Reason("unknown_rank", "the number of axes of a tensor they are combined with is not known")
FROZEN_OPERAND = Reason("unlabelled_operand", "they are combined with a tensor whose channels cannot shrink")
MIXED = Reason(
    "mixed_axis", "an operator mixes all channels of the axis, so that none can go without changing the rest"
)
WINDOWED = Reason("spatial_axis", "they lie along an axis that a window moves over")
RESAMPLED = Reason("spatial_axis", "they lie along an axis that a window or an interpolation moves over")
MOVED = Reason("spatial_axis", "they lie along an axis whose positions become channels, or the other way round")
POOL_INDICES = Reason("pool_indices", "the indices of a MaxPool count through all channels")
RUNTIME_INDICES = Reason("runtime_indices", "which of them are picked is computed at run time")
OUTSIDE = Reason("outside", "an index that picks them lies outside their axis; ONNX Runtime will not run this")
PICKED = Reason("picked", "a single one of them is picked out")
INDEXED = Reason("indexed", "a Scatter or Gather moves along them by indices")
BORDER = Reason("pad_mode", "a Pad that crops, repeats or reflects them")
ENORMOUS = Reason("enormous", "a Pad makes more than a million of them")
REGROUPED = Reason("reshape", "a Reshape regroups them with axes of unknown size or other channels")
LOST = Reason("not_followed", "they cannot be followed through an operator")
COUNTED = Reason("counted", "their number is an output of the model, or a Size operator counts them")
REPEATED = Reason("repeated", "a Tile repeats them as often as is known at run time only")
RUNTIME_SHAPE = Reason("runtime_shape", "the shape they are given is computed at run time")
RUNTIME_SIZES = Reason("runtime_shape", "a Scatter or Gather whose sizes are known at run time only")


def unknown(op: str) -> Reason:
    """Why what an operator without a rule reads is left alone; one that is not in the standard is named."""
    domain, _, name = op.rpartition("::")
    reason = RUNTIME_OPERATOR if domain == "com.microsoft" else UNKNOWN
    return reason if not domain else Reason(reason.code, f"{reason.message}: {name} of {domain}")


#: What a user can do about each.
ADVICE: Mapping[str, str] = {
    "computed_weight": "Fold constants before compressing, so that the weight is stored in the file.",
    "contracted": "Nothing to do: both factors of such a product (attention scores) are data.",
    "counted": "Export with fixed shapes, so that no Size or Shape operator counts channels at run time.",
    "einsum": "Export without Einsum, or with the weight as a plain matrix.",
    "enormous": "Nothing to do: looking for dependence among so many would take for ever.",
    "excluded": "Widen --include or drop --exclude to let these nodes take part.",
    "frozen_input": "Nothing to do here; the channels become free where what feeds them does.",
    "graph_output": "Nothing to do: the shapes of the outputs are part of the model.",
    "grouped_convolution": "Nothing to do: each group has one such channel, and no group can be empty.",
    "indexed": "Nothing to do: indices say which of these channels are read or written.",
    "misfit": "Check the model: a constant has another size than the channels it belongs to.",
    "mixed_axis": "Nothing to do: the operator mixes all channels, so that each one changes the others.",
    "not_followed": "Export with fixed shapes, so that every operator can be followed.",
    "outside": "Check the model: an index lies outside the axis that it picks from.",
    "overridable": "Take the weight out of the graph inputs, if no caller replaces it.",
    "pad_mode": "Export with zero padding, or leave these channels as they are.",
    "picked": "Nothing to do: a single channel that is picked out has to stay.",
    "pool_indices": "Export without the indices of MaxPool, if nothing needs them.",
    "quantised": "Compress the floating-point model first, and quantise the result.",
    "recurrent_steps": "Nothing to do: a recurrent layer keeps the size of its state and the number of its steps.",
    "refused": "Please report it, with the model: no removal should be refused by ONNX Runtime.",
    "repeated": "Export without Tile or Expand along the channels (broadcasting does the same).",
    "reshape": "Export with fixed shapes, so that the Reshape can be followed.",
    "runtime_indices": "Export with constant indices, if they do not depend on the data.",
    "runtime_operator": "Export, or save, the model without ONNX Runtime's optimization, which makes such operators.",
    "runtime_parameters": "Fold constants before compressing, so that scale and bias are stored in the file.",
    "runtime_shape": "Export with fixed shapes, or fold constants before compressing.",
    "runtime_weight": "Fold constants before compressing; a quantised model is best compressed before quantising.",
    "shared_weight": "Export with a copy of the weight for each use, if the larger file is worth it.",
    "sparse_weight": "Store the weight as a plain tensor (an initializer), if it may lose its zeros.",
    "spatial_axis": "Nothing to do: these are positions in space rather than channels.",
    "subgraph": "Export without If, Loop or Scan around these channels, if the model allows it.",
    "training_mode": "Export the model for inference (evaluation mode).",
    "transposed_data": "Fold the transposition into the weight, or export without transA.",
    "unknown_operator": "Export with standard operators (or a lower opset, which splits new ones into known ones).",
    "unknown_rank": "Run ONNX shape inference on the model, or export with fixed shapes.",
    "unlabelled_operand": "Nothing to do here; the channels become free where the other operand does.",
    "vector_product": "Store the vector as a matrix with one column.",
    "weight_rank": "Export with a separate matrix for each product.",
}

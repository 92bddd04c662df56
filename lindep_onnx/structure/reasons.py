"""Why channels are left alone, and what a user can do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Reason:
    """Why channels are left alone.

    Attributes:
        code: a stable name.
        message: what to tell the user.
        advice: what the user can do about it; one text a code.
    """

    code: str
    message: str
    advice: str


# ---- of the model as a whole --------------------------------------------------------------------------------------

GRAPH_OUTPUT = Reason(
    "graph_output",
    "they are an output of the model, whose shape is kept",
    "Nothing to do: the shapes of the outputs are part of the model.",
)
EXCLUDED = Reason(
    "excluded",
    "the options --include and --exclude leave these nodes alone",
    "Widen --include or drop --exclude to let these nodes take part.",
)
QUANTISED = Reason(
    "quantised",
    "the model is quantised; compress the floating-point model first, and quantise what comes out",
    "Compress the floating-point model first, and quantise the result.",
)
UNKNOWN = Reason(
    "unknown_operator",
    "an operator without a rule reads them",
    "Export with standard operators (or a lower opset, which splits new ones into known ones).",
)
SUBGRAPH = Reason(
    "subgraph",
    "a node with sub-graphs (If, Loop, Scan) reads them",
    "Export without If, Loop or Scan around these channels, if the model allows it.",
)
TRAINING = Reason(
    "training_mode",
    "a node in training mode reads them; export the model for inference",
    "Export the model for inference (evaluation mode).",
)

# ---- of constants -------------------------------------------------------------------------------------------------

MISFIT = Reason(
    "misfit",
    "a constant that belongs to them has another size; ONNX Runtime will not run this",
    "Check the model: a constant has another size than the channels it belongs to.",
)
TWO_WAYS = Reason(
    "shared_weight",
    "a weight is used in two ways that would need different slices",
    "Export with a copy of the weight for each use, if the larger file is worth it.",
)
COMPUTED_WEIGHT = Reason(
    "computed_weight",
    "a weight is computed in the graph from other tensors; fold constants first",
    "Fold constants before compressing, so that the weight is stored in the file.",
)
OVERRIDABLE = Reason(
    "overridable",
    "a weight is a graph input as well, so that a caller may replace it",
    "Take the weight out of the graph inputs, if no caller replaces it.",
)
RUNTIME_WEIGHT = Reason(
    "runtime_weight",
    "the weight is computed at run time",
    "Fold constants before compressing; a quantised model is best compressed before quantising.",
)
RUNTIME_PARAMETERS = Reason(
    "runtime_parameters",
    "scale or bias of a normalization are computed at run time",
    "Fold constants before compressing, so that scale and bias are stored in the file.",
)

# ---- of products --------------------------------------------------------------------------------------------------

SINGLE = Reason(
    "grouped_convolution",
    "a grouped convolution has one of them in each group, and no group can be empty",
    "Nothing to do: each group has one such channel, and no group can be empty.",
)
FROZEN_INPUT = Reason(
    "frozen_input",
    "a depthwise convolution computes them one by one from channels that stay",
    "Nothing to do here; the channels become free where what feeds them does.",
)
WEIGHT_RANK = Reason(
    "weight_rank",
    "a constant weight of rank over 2 is a batch of matrices",
    "Export with a separate matrix for each product.",
)
TRANSPOSED = Reason(
    "transposed_data",
    "Gemm reads its data transposed (transA)",
    "Fold the transposition into the weight, or export without transA.",
)
CONTRACTED = Reason(
    "contracted",
    "two computed tensors are multiplied along them (query and key), and no weight could make up for them",
    "Nothing to do: both factors of such a product (attention scores) are data.",
)
EQUATION = Reason(
    "einsum",
    "an Einsum that is more than the product with a constant matrix reads them",
    "Export without Einsum, or with the weight as a plain matrix.",
)
VECTOR = Reason("vector_product", "a product with a vector reads them", "Store the vector as a matrix with one column.")
UNKNOWN_DATA_RANK = Reason(
    "unknown_rank",
    "the number of axes of the data that is multiplied is not known",
    "Run ONNX shape inference on the model, or export with fixed shapes.",
)
STEPS = Reason(
    "recurrent_steps",
    "a recurrent layer moves along them step by step",
    "Nothing to do: a recurrent layer keeps the size of its state and the number of its steps.",
)

# ---- of operators that combine, mix and move ----------------------------------------------------------------------

UNKNOWN_RANK = replace(UNKNOWN_DATA_RANK, message="the number of axes of a tensor they are combined with is not known")
FROZEN_OPERAND = Reason(
    "unlabelled_operand",
    "they are combined with a tensor whose channels cannot shrink",
    "Nothing to do here; the channels become free where the other operand does.",
)
MIXED = Reason(
    "mixed_axis",
    "an operator mixes all channels of the axis, so that none can go without changing the rest",
    "Nothing to do: the operator mixes all channels, so that each one changes the others.",
)
WINDOWED = Reason(
    "spatial_axis",
    "they lie along an axis that a window moves over",
    "Nothing to do: these are positions in space rather than channels.",
)
RESAMPLED = replace(WINDOWED, message="they lie along an axis that a window or an interpolation moves over")
MOVED = replace(WINDOWED, message="they lie along an axis whose positions become channels, or the other way round")
POOL_INDICES = Reason(
    "pool_indices",
    "the indices of a MaxPool count through all channels",
    "Export without the indices of MaxPool, if nothing needs them.",
)
RUNTIME_INDICES = Reason(
    "runtime_indices",
    "which of them are picked is computed at run time",
    "Export with constant indices, if they do not depend on the data.",
)
OUTSIDE = Reason(
    "outside",
    "an index that picks them lies outside their axis; ONNX Runtime will not run this",
    "Check the model: an index lies outside the axis that it picks from.",
)
PICKED = Reason(
    "picked",
    "a single one of them is picked out",
    "Nothing to do: a single channel that is picked out has to stay.",
)
INDEXED = Reason(
    "indexed",
    "a Scatter or Gather moves along them by indices",
    "Nothing to do: indices say which of these channels are read or written.",
)
BORDER = Reason(
    "pad_mode",
    "a Pad that crops, repeats or reflects them",
    "Export with zero padding, or leave these channels as they are.",
)
ENORMOUS = Reason(
    "enormous",
    "a Pad makes more than a million of them",
    "Nothing to do: looking for dependence among so many would take for ever.",
)
REGROUPED = Reason(
    "reshape",
    "a Reshape regroups them with axes of unknown size or other channels",
    "Export with fixed shapes, so that the Reshape can be followed.",
)
COUNTED = Reason(
    "counted",
    "their number is an output of the model, or a Size operator counts them",
    "Export with fixed shapes, so that no Size or Shape operator counts channels at run time.",
)
REPEATED = Reason(
    "repeated",
    "a Tile repeats them as often as is known at run time only",
    "Export without Tile or Expand along the channels (broadcasting does the same).",
)
RUNTIME_SHAPE = Reason(
    "runtime_shape",
    "the shape they are given is computed at run time",
    "Export with fixed shapes, or fold constants before compressing.",
)
RUNTIME_SIZES = replace(RUNTIME_SHAPE, message="a Scatter or Gather whose sizes are known at run time only")

#: What a user can do, by the code of a reason.
ADVICE: Mapping[str, str] = {reason.code: reason.advice for reason in list(vars().values()) if type(reason) is Reason}

"""A model as an ONNX graph: ids and a state in, logits and the state after them out.

The graph is put together from ONNX's own RNN, LSTM and GRU, node by node: small, with batch and time open,
without tracing the model. They differ from torch's in the order of the gates, and have time first.
"""

import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from charlm.errors import NOT_FINITE, CharlmError
from charlm.nn.cells import cell_of
from charlm.storage.model_file import Loaded

if TYPE_CHECKING:
    import onnx

OPSET, IR_VERSION = 17, 8  # of 2022: what all runtimes now in use read
TOLERANCE = 1e-4
_ROUNDING = 1e-5  # of the largest logit, which counts where that is more
_LIMIT = 2**31 - 2**25  # bytes of weights in a protocol buffer's 2 GiB, with room for the vocabulary


def checked_onnx(
    loaded: Loaded, weights: dict[str, Tensor], metadata: dict[str, Any]
) -> tuple[bytes, float | None]:
    """The model as an ONNX file's bytes, and by how much its logits differ from torch's at most.

    weights: those of an embedding, a recurrent stack and a head, by name. metadata: goes in as JSON.
    The difference is None where there is no onnxruntime. Raises `CharlmError` without the package onnx, for a
    model beyond a file's 2 GiB, and for a difference of more than 1e-4 and than 1e-5 of the largest logit.
    """
    tied = {"head.weight"} if loaded.config.model.tie_weights else set()
    size = 4 * sum(tensor.numel() for name, tensor in weights.items() if name not in tied)
    if size > _LIMIT:
        raise CharlmError(
            f"the model's weights take {size:,} bytes, more than the 2 GiB of an ONNX file hold"
        )
    try:
        model = build(loaded, weights, metadata)
    except ImportError as error:
        raise CharlmError(
            f"--to onnx needs the package {error.name}: pip install 'charlm-torch[onnx]'"
        ) from None
    content = bytes(model.SerializeToString())
    compared = compare(content, loaded)
    if compared and not compared[0] <= max(TOLERANCE, _ROUNDING * compared[1]):
        raise CharlmError(
            f"onnxruntime's logits differ from torch's by {compared[0]:.2g}: nothing was written; this is a "
            "fault of charlm's, please report it"
        )
    return content, compared[0] if compared else None


def build(loaded: Loaded, weights: dict[str, Tensor], metadata: dict[str, Any]) -> "onnx.ModelProto":
    """The graph: ids (B, T), h and for the LSTM c, both (L, B, H), in; logits (B, T, V), h_n and c_n out."""
    from onnx import TensorProto, helper

    config = loaded.config.model
    L, H, V = config.num_layers, config.hidden_size, len(loaded.vocab)
    cell = cell_of(config)
    states, onnx = cell.state, cell.onnx
    assert onnx  # `export.refuse` has checked it
    constants: dict[str, Any] = {"embedding": weights["embedding.weight"]}
    nodes = [
        helper.make_node("Transpose", ["ids"], ["ids_by_time"], perm=[1, 0]),
        helper.make_node("Gather", ["embedding", "ids_by_time"], ["y0"]),  # (T, B, E)
    ]
    for name in states:  # a tensor (1, B, H) for each layer
        nodes.append(helper.make_node("Split", [name, "ones"], [f"{name}{k}" for k in range(L)], axis=0))
    constants["ones"], constants["one"] = torch.ones(L, dtype=torch.int64), torch.tensor([1])
    for k in range(L):
        constants |= _layer(weights, onnx.order, k)
        inputs = [f"y{k}", f"W{k}", f"R{k}", f"B{k}", "", *(f"{name}{k}" for name in states)]
        outputs = [f"all{k}", *(f"{name}_n{k}" for name in states)]
        nodes.append(helper.make_node(onnx.op, inputs, outputs, hidden_size=H, **onnx.attributes))
        nodes.append(helper.make_node("Squeeze", [f"all{k}", "one"], [f"y{k + 1}"]))  # ONNX's directions
    tied = config.tie_weights
    if not tied:
        constants["head"] = weights["head.weight"]
    constants["bias"] = weights["head.bias"]
    nodes += [
        helper.make_node("Transpose", [f"y{L}"], ["y"], perm=[1, 0, 2]),
        helper.make_node("Transpose", ["embedding" if tied else "head"], ["head_t"], perm=[1, 0]),
        helper.make_node("MatMul", ["y", "head_t"], ["products"]),
        helper.make_node("Add", ["products", "bias"], ["logits"]),
    ]
    for name in states:
        nodes.append(helper.make_node("Concat", [f"{name}_n{k}" for k in range(L)], [f"{name}_n"], axis=0))
    describe = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "charlm",
        [describe("ids", TensorProto.INT64, ["B", "T"])]
        + [describe(name, TensorProto.FLOAT, [L, "B", H]) for name in states],
        [describe("logits", TensorProto.FLOAT, ["B", "T", V])]
        + [describe(f"{name}_n", TensorProto.FLOAT, [L, "B", H]) for name in states],
        [_constant(name, tensor) for name, tensor in constants.items()],
    )
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="charlm")
    helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
    return model


def _layer(weights: dict[str, Tensor], order: tuple[int, ...], k: int) -> dict[str, Tensor]:
    """Layer k's W (1, G·H, E), R (1, G·H, H) and B (1, 2·G·H), the gates in ONNX's order."""

    def ordered(name: str) -> Tensor:
        blocks = weights[f"recurrent.{name}_l{k}"].chunk(len(order))
        return torch.cat([blocks[gate] for gate in order])

    biases = torch.cat([ordered("bias_ih"), ordered("bias_hh")])
    return {
        f"W{k}": ordered("weight_ih")[None],
        f"R{k}": ordered("weight_hh")[None],
        f"B{k}": biases[None],
    }


def _constant(name: str, tensor: Tensor) -> "onnx.TensorProto":
    from onnx import TensorProto, helper

    kind = TensorProto.FLOAT if tensor.is_floating_point() else TensorProto.INT64
    return helper.make_tensor(name, kind, tensor.shape, tensor.contiguous().numpy().tobytes(), raw=True)


@torch.inference_mode()
def compare(content: bytes, loaded: Loaded) -> tuple[float, float] | None:
    """The largest difference of a logit from torch's, and the largest logit, over two texts in two parts.

    None where there is no onnxruntime. Raises `CharlmError` for a model whose logits are not finite.
    """
    try:
        from onnxruntime import InferenceSession, SessionOptions
    except ImportError:
        return None
    options = SessionOptions()
    options.intra_op_num_threads = 1
    session = InferenceSession(content, options, providers=["CPUExecutionProvider"])
    ids = torch.randint(len(loaded.vocab), (2, 24), generator=torch.Generator().manual_seed(1))
    state = loaded.model.initial_state(2)
    theirs = [tensor.numpy() for tensor in state]
    differences, largest = [], []
    for part in (ids[:, :16], ids[:, 16:]):
        logits, state = loaded.model(part, state)
        names = ["ids", "h", "c"]
        found, *theirs = session.run(None, dict(zip(names, [part.numpy(), *theirs], strict=False)))
        if not logits.isfinite().all():
            raise CharlmError(NOT_FINITE)
        differences.append((torch.from_numpy(found) - logits).abs().max())
        largest.append(logits.abs().max())
    return float(torch.stack(differences).max()), float(torch.stack(largest).max())  # NaN stays NaN

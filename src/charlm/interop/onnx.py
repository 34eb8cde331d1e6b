"""A model as an ONNX graph, from ids and a state to logits and the next state.

The graph is built node by node from ONNX's own RNN, LSTM and GRU, without tracing the model: it is small, and
the sizes of batch and time are open. ONNX's operators differ from torch's in the order of the gates, and time
is their first dimension.
"""

import json
from typing import Any

import torch
from torch import Tensor

from charlm.errors import NOT_FINITE, CharlmError
from charlm.nn.cells import cell_of
from charlm.storage.model_file import Loaded

OPSET, IR_VERSION = 17, 8  # of 2022; all current runtimes read them
TOLERANCE = 1e-4
_RELATIVE_TOLERANCE = 1e-5  # of the largest logit; the larger of both tolerances applies
_MAX_WEIGHTS = 2**31 - 2**25  # bytes: a protocol buffer takes 2 GiB; the rest is for the vocabulary


def checked_onnx(loaded: Loaded, weights: dict[str, Tensor], metadata: dict[str, Any]) -> tuple[bytes, str]:
    """Return the bytes of the ONNX file, and a note on its comparison with torch in onnxruntime.

    weights: of an embedding, a recurrent stack and a head, by name. metadata: stored as JSON.
    Raises `CharlmError` without the package onnx, for a model of
    more than 2 GiB, and for a difference of more than 1e-4 and more than 1e-5 of the largest logit.
    """
    tied = {"head.weight"} if loaded.config.model.tie_weights else set()
    size = 4 * sum(tensor.numel() for name, tensor in weights.items() if name not in tied)
    if size > _MAX_WEIGHTS:
        raise CharlmError(
            f"the model's weights take {size:,} bytes, an ONNX file at most {_MAX_WEIGHTS:,}: use --to torch"
        )
    try:
        content = build(loaded, weights, metadata)
    except ImportError as error:
        raise CharlmError(
            f"--to onnx needs the package {error.name}: pip install 'charlm-torch[onnx]'"
        ) from None
    compared = compare(content, loaded)
    if compared is None:
        missing = "onnxruntime is not installed: pip install 'charlm-torch[onnx]'"
        return content, f"not compared with torch, because {missing}"
    difference, largest = compared
    if not difference <= max(TOLERANCE, _RELATIVE_TOLERANCE * largest):
        raise CharlmError(
            f"onnxruntime's logits differ from torch's by {difference:.2g}: no file was written; this is "
            "a bug in charlm, please report it"
        )
    return content, f"compared in onnxruntime: the logits differ from torch's by {difference:.1e} at most"


def build(loaded: Loaded, weights: dict[str, Tensor], metadata: dict[str, Any]) -> bytes:
    """Return a graph, from ids (B, T), h and the LSTM's c (L, B, H) to logits (B, T, V), h_n and c_n."""
    from onnx import TensorProto, helper, numpy_helper

    config = loaded.config.model
    L, H, V = config.num_layers, config.hidden_size, len(loaded.vocab)
    cell = cell_of(config)
    states, onnx = cell.state, cell.onnx
    assert onnx, "check_format refuses other cells"
    constants = {
        "embedding": weights["embedding.weight"],
        "bias": weights["head.bias"],
        "ones": torch.ones(L, dtype=torch.int64),
        "one": torch.tensor([1]),
    }
    head = "embedding" if config.tie_weights else "head"
    constants[head] = weights["head.weight"]
    nodes = [
        helper.make_node("Transpose", ["ids"], ["ids_by_time"], perm=[1, 0]),
        helper.make_node("Gather", ["embedding", "ids_by_time"], ["y0"]),  # (T, B, E)
    ]
    for name in states:  # one tensor (1, B, H) for each layer
        nodes.append(helper.make_node("Split", [name, "ones"], [f"{name}{k}" for k in range(L)], axis=0))
    for k in range(L):
        constants |= _layer(weights, onnx.order, k)
        inputs = [f"y{k}", f"W{k}", f"R{k}", f"B{k}", "", *(f"{name}{k}" for name in states)]
        outputs = [f"all{k}", *(f"{name}_n{k}" for name in states)]
        nodes.append(helper.make_node(onnx.op, inputs, outputs, hidden_size=H, **onnx.attributes))
        # Removes ONNX's dimension of directions.
        nodes.append(helper.make_node("Squeeze", [f"all{k}", "one"], [f"y{k + 1}"]))
    nodes += [
        helper.make_node("Transpose", [f"y{L}"], ["y"], perm=[1, 0, 2]),
        helper.make_node("Transpose", [head], ["head_t"], perm=[1, 0]),
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
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in constants.items()],
    )
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="charlm")
    helper.set_model_props(model, {key: json.dumps(value) for key, value in metadata.items()})
    return bytes(model.SerializeToString())


def _layer(weights: dict[str, Tensor], order: tuple[int, ...], k: int) -> dict[str, Tensor]:
    """Return layer k's W (1, G·H, E), R (1, G·H, H) and B (1, 2·G·H), with the gates in ONNX's order."""

    def ordered(name: str) -> Tensor:
        blocks = weights[f"recurrent.{name}_l{k}"].chunk(len(order))
        return torch.cat([blocks[gate] for gate in order])

    biases = torch.cat([ordered("bias_ih"), ordered("bias_hh")])
    return {f"W{k}": ordered("weight_ih")[None], f"R{k}": ordered("weight_hh")[None], f"B{k}": biases[None]}


@torch.inference_mode()
def compare(content: bytes, loaded: Loaded) -> tuple[float, float] | None:
    """Return the largest difference of a logit from torch's and the largest logit, on two texts in parts.

    None without onnxruntime. Raises `CharlmError` for a model whose logits are not finite.
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
    inputs = ["ids", *cell_of(loaded.config.model).state]
    for part in (ids[:, :16], ids[:, 16:]):
        logits, state = loaded.model(part, state)
        found, *theirs = session.run(None, dict(zip(inputs, [part.numpy(), *theirs], strict=True)))
        if not logits.isfinite().all():
            raise CharlmError(NOT_FINITE)
        differences.append((torch.from_numpy(found) - logits).abs().max())
        largest.append(logits.abs().max())
    return float(torch.stack(differences).max()), float(torch.stack(largest).max())  # NaN stays NaN

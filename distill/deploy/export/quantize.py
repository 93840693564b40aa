"""Int8: of weights, of activations, of logits and of probabilities."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

from distill.deploy.export.onnx import INPUT

WEIGHTED = ("Conv", "Gemm", "MatMul")
# What lies between them is int8 too, so that they need not go to float and back.
BETWEEN = ("Add", "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat")
LARGEST = {"int8": 127, "uint8": 255}


class Views(CalibrationDataReader):
    """Batches of views, as onnxruntime asks for them."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self.batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next batch, or None after the last."""
        batch = next(self.batches, None)
        return None if batch is None else {INPUT: batch.contiguous().numpy()}


def quantized(
    model: onnx.ModelProto, batches: Iterable[Tensor], per_channel: bool
) -> onnx.ModelProto:
    """Return a graph whose weights and activations are int8, in the QDQ form.

    Weights are symmetric int8, `Δ = max|w|/127` for each output channel or each tensor; activations
    are uint8 over the range `[min(0, ·), max(0, ·)]` that they take on the batches. The logits
    themselves stay float.

    Args:
        model: a float graph.
        batches: images `[N, C, H, W]` to calibrate on.
        per_channel: whether each output channel has a scale of its own.

    Reference: Jacob et al., 1712.05877.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        quantize_static(
            prepared(model),
            path,
            Views(batches),
            per_channel=per_channel,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=[*WEIGHTED, *BETWEEN],
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        )
        return onnx.load(path)


def prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph with batch norms folded and shapes known, as onnxruntime quantises it.

    Its symbolic inference of shapes gives up on some models, such as hrnet, edgenext and xcit; what
    ONNX infers by itself is enough there.
    """
    logging.getLogger("onnxruntime.quantization").setLevel(logging.ERROR)
    with TemporaryDirectory() as folder:
        source, path = (str(Path(folder) / f"{name}.onnx") for name in ("float", "prepared"))
        onnx.save(model, source)  # given the graph itself, a call that fails takes its weights
        try:
            quant_pre_process(source, path)
        except Exception:  # a bare one is what it raises
            quant_pre_process(source, path, skip_symbolic_shape=True)
        return onnx.load(path)


def weights_only(model: onnx.ModelProto, per_channel: bool) -> onnx.ModelProto:
    """Return a graph that keeps its weights as int8 and computes in float.

    Args:
        model: a float graph.
        per_channel: whether each output channel has a scale of its own.
    """
    model = prepared(model)
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    axes = {
        node.input[1]: output_axis(node, len(weights[node.input[1]].dims))
        for node in graph.node
        if node.op_type in WEIGHTED and node.input[1] in weights
    }
    nodes = []
    for name, axis in axes.items():
        values, scale = int8(numpy_helper.to_array(weights[name]), axis if per_channel else None)
        graph.initializer.remove(weights[name])
        parts = (f"{name}_int8", values), (f"{name}_scale", scale)
        graph.initializer.extend(numpy_helper.from_array(array, part) for part, array in parts)
        names = [part for part, _ in parts]
        nodes.append(helper.make_node("DequantizeLinear", names, [name], f"{name}_dq", axis=axis))
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def output_axis(node: onnx.NodeProto, dimensions: int) -> int:
    """Return which axis of an operator's weight counts its output channels."""
    if node.op_type == "Conv":
        return 0
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return 0 if transposed else dimensions - 1


def int8(weight: np.ndarray, axis: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return symmetric int8 values and their scale: `w ≈ q·Δ`, `Δ = max|w|/127`.

    Args:
        weight: any shape.
        axis: of the channels that have their own Δ `[channels]`; None is one Δ `[]` for all.
    """
    others = None if axis is None else tuple(a for a in range(weight.ndim) if a != axis)
    largest = np.abs(weight).max(axis=others, keepdims=True)
    scale = np.where(largest > 0, largest, 1).astype(np.float32) / LARGEST["int8"]
    values = np.clip(np.rint(weight / scale), -LARGEST["int8"], LARGEST["int8"]).astype(np.int8)
    return values, scale.reshape(() if axis is None else -1)


def quantized_logits(logits: Tensor) -> tuple[Tensor, float]:
    """Return logits rounded to int8, float64 `[N, K]`, and their step `Δ = max|s|/127`.

    No cross-entropy changes by more than Δ, and no argmax where the two largest logits are further
    apart than Δ.
    """
    scores = logits.double()
    step = float(scores.abs().max()) / LARGEST["int8"]
    return (scores / step).round() * step if step else scores, step


def quantized_probabilities(logits: Tensor) -> Tensor:
    """Return softmax probabilities rounded to uint8, `k/255`, float64 `[N, K]`.

    Rows no longer sum to one, and a small probability becomes 0, whose cross-entropy is infinite.
    """
    return (logits.double().softmax(dim=1) * LARGEST["uint8"]).round() / LARGEST["uint8"]


def log_probabilities(probs: Tensor) -> Tensor:
    """Return `log(p / Σp)`, −∞ where p is 0; a row of zeros says nothing and becomes uniform."""
    total = probs.sum(dim=1, keepdim=True)
    return torch.where(total > 0, probs / total, 1 / probs.shape[1]).log()

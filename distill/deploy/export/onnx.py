"""ONNX: written from a traced program, run by onnxruntime."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor
from torch.export import ExportedProgram

from distill.deploy.export.program import Runtime, reason
from distill.utils.files import writing

INPUT, OUTPUT, BATCH = "images", "logits", "batch"
LARGEST = 2**31 - 1  # bytes of a protobuf message
ERRORS_ONLY = 3  # of onnxruntime's log levels


def as_onnx(program: ExportedProgram) -> onnx.ModelProto:
    """Return a program as an ONNX graph from `images` to `logits`, for any batch size.

    Raises:
        ValueError: if ONNX has no operator for something the program does.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporter about its own libraries
            written = torch.onnx.export(
                program, dynamo=True, external_data=False, verbose=False,
                input_names=[INPUT], output_names=[OUTPUT],
            )  # fmt: skip
    except Exception as error:  # the exporter's, or an operator's own
        raise ValueError(f"this student cannot be written as ONNX: {reason(error)}") from error
    assert written is not None
    return bare(written.model_proto)


def bare(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a graph without its makers' notes, which hold paths of their machine."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = BATCH
    return model


def write_onnx(model: onnx.ModelProto, path: Path, facts: Mapping[str, Any]) -> None:
    """Write a graph, its weights and its facts as one file, whole or not at all.

    Args:
        model: the graph.
        path: the file.
        facts: its metadata; what is no text becomes JSON.

    Raises:
        ValueError: if the weights do not fit into one file.
    """
    if model.ByteSize() > LARGEST:
        raise ValueError(f"{path}: an ONNX file holds at most 2 GB, and this student is larger")
    texts = {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in facts.items()
    }
    onnx.helper.set_model_props(model, texts)
    with writing(path) as file:
        file.write(model.SerializeToString())


def open_onnx(path: Path) -> Runtime:
    """Return what runs the graph of a file, on as many threads as torch has."""
    operators = {node.op_type for node in onnx.load(path).graph.node}
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = ERRORS_ONLY
    # Idle threads would otherwise burn the cores that other runtimes are timed on.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if "QuantizeLinear" not in operators:  # else int8 weights would become float at every call
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run([OUTPUT], {INPUT: images.contiguous().numpy()})
        return torch.from_numpy(logits)

    return run

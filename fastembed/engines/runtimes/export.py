"""A model as an ONNX graph on disk."""

from __future__ import annotations

import contextlib
import logging
import warnings
from pathlib import Path

import torch

from ..contract import InputContract
from ..outputs import Features
from ..precision import cast

INPUT = "input"
# The first with bfloat16 convolutions.
OPSET = 22


def export_onnx(features: Features, contract: InputContract, path: Path) -> None:
    """Write the module as `path`, its weights beside it as `path`.data, and check the graph.

    Input [batch, P, height, width] in the contract's dtype, with a free batch axis; outputs in
    float32 under their names. The module is cast on the CPU and stays so. Weights are always apart
    from the graph, since one file holds at most 2 GB.

    Raises ImportError naming the extra; RuntimeError for a model that cannot be exported.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  (torch.onnx asks for it, in other words)
    except ImportError as error:
        raise ImportError(
            "exporting needs onnx and onnxscript: pip install 'fastembed-vision[onnx]'"
        ) from error

    cast(features, torch.device("cpu"), contract.dtype)
    # Two samples: the exporter would take a batch of one for a constant.
    example = torch.zeros(2, *contract.shape, dtype=contract.dtype)
    with _quiet(), torch.inference_mode():
        try:
            program = torch.onnx.export(
                features,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[str(output) for output in features.outputs],
                dynamic_shapes=({0: "batch"},),
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise RuntimeError(f"this model cannot be exported to ONNX: {error}") from error
        for node in program.model.graph:
            node.metadata_props.clear()  # stack traces, with the paths of this machine
        program.save(path, external_data=True)
    onnx.checker.check_model(path, full_check=True)


@contextlib.contextmanager
def _quiet():
    """Without the exporter's remarks on its own passes; what goes wrong is raised."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

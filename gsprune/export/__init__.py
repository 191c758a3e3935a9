"""Networks that leave PyTorch: ONNX files and `torch.export` programs, each checked against PyTorch's own outputs."""

from gsprune.export.exported_program import to_exported_program
from gsprune.export.onnx_file import to_onnx

__all__ = ["to_exported_program", "to_onnx"]

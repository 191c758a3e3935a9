"""Networks that leave PyTorch: ONNX files and `torch.export` programs, each checked against PyTorch's own outputs."""

from gsprune.export.programs import to_exported_program, to_onnx

__all__ = ["to_exported_program", "to_onnx"]

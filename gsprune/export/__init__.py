"""Networks that leave PyTorch, or take the form they are deployed in, each checked against PyTorch's own outputs."""

from gsprune.export.executorch_file import to_executorch
from gsprune.export.exported_program import to_exported_program
from gsprune.export.fusing import fuse
from gsprune.export.onnx_file import to_onnx
from gsprune.export.openvino_file import to_openvino
from gsprune.export.semi_structured import to_semi_structured

__all__ = ["fuse", "to_executorch", "to_exported_program", "to_onnx", "to_openvino", "to_semi_structured"]

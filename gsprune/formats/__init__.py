"""Files that travel: tensors, masks, scores and the smaller network, as safetensors and JSON. Nothing is unpickled."""

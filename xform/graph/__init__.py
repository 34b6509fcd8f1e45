"""The IR: an onnx_ir model at one opset in canonical form, and everything that only reads it."""

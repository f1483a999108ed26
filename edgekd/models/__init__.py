"""Model files read and written: ONNX and TFLite."""

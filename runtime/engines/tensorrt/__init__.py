"""TensorRT and TensorRT-RTX: engines built from plans, kept in the bundle, run on the caller's memory."""

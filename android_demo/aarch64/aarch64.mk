# Runs the built-in pair's bundles, which the Makefile makes, on the runtimes' aarch64 builds under emulation.
AARCH64_BUNDLES ?= onnx-fp32 onnx-int4 executorch-fp32

.PHONY: aarch64-parity
aarch64-parity:
	aarch64/parity.sh $(BIN) $(AARCH64_BUNDLES)

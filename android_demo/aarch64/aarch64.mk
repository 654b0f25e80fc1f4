# The built-in pair's bundles (the Makefile makes them) under aarch64 emulation, with the runtimes' own aarch64 builds.
AARCH64_BUNDLES ?= onnx-fp32 onnx-int4 executorch-fp32

.PHONY: aarch64-parity
aarch64-parity:
	aarch64/parity.sh $(BIN) $(AARCH64_BUNDLES)

# The built-in pair's bundles under aarch64 emulation, with the runtimes' own aarch64 builds: the same tokens as here.
AARCH64_BUNDLES ?= onnx-fp32 onnx-int4 executorch-fp32

.PHONY: aarch64-parity
aarch64-parity:
	aarch64/parity.sh $(BIN)/python $(AARCH64_BUNDLES)

# build/bundle-BACKEND-RECIPE
build/bundle-%:
	$(BIN)/gemma-mtp-export export --backend $(word 1,$(subst -, ,$*)) --recipe $(word 2,$(subst -, ,$*)) \
	    --target ../exporter/demo/pair/target --drafter ../exporter/demo/pair/drafter --max-seq-len 512 --output $@

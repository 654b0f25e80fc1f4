# A packaging check: the app's own sources, resources and a bundle in a signed APK. Nothing is run.
EXPORTER := $(shell find ../exporter ../clustering ../runtime_ref -name '*.py' -o -path '*/pair/*' -type f)

.PHONY: apk
apk: build/assets/bundle/manifest.json
	packaging/apk.sh $(BIN)

build/assets/bundle/manifest.json: $(EXPORTER)
	mkdir -p build/assets
	$(BIN)/gemma-mtp-export export --target ../exporter/demo/pair/target --drafter ../exporter/demo/pair/drafter \
	    --output build/assets/bundle --recipe int4 --max-seq-len 1024 --force

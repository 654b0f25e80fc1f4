# A packaging check: the app's own sources, resources and a bundle in a signed APK. Nothing is run.
.PHONY: apk
apk: build/assets/bundle/manifest.json
	packaging/apk.sh $(BIN)

build/assets/bundle/manifest.json: build/bundle-onnx-int4/manifest.json
	rm -rf $(@D)
	mkdir -p build/assets
	cp -r $(<D) $(@D)

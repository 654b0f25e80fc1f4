# A packaging check: puts the app's sources, resources and a bundle into a signed APK. The app is not run.
.PHONY: apk
apk: build/assets/bundle/manifest.json
	packaging/apk.sh $(BIN)

build/assets/bundle/manifest.json: build/bundle-onnx-int4/manifest.json
	rm -rf $(@D)
	mkdir -p build/assets
	cp -r $(<D) $(@D)

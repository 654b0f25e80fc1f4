# Host tests: the app's core and engines on the JVM, on stand-ins of both runtimes' Java classes (standins/), which call
# the libraries in the wheels of the virtual environment (jni/). They need a JDK 17 and g++.
#
# Kotlin is compiled against ExecuTorch's real classes and run on the stand-ins, so a difference between them fails.
# ORT_JAVA=PATH does the same with the real classes of ONNX Runtime (classes.jar of the AAR onnxruntime-android).
PARTS := build/parts
# As in build.gradle.kts: public things are said to be so, and apps with older compilers can use the library.
LIBRARY_OPTIONS := -Xexplicit-api=strict -language-version 2.2 -api-version 2.2
HOST_PACKAGES := .packages/.host-tests
ORT_JAVA ?= $(PARTS)/standins-ort
ENGINES := engine-onnx engine-executorch
# Sources by part: core; the engines and then the app, without what imports Android, which see its public side; what sees all.
CORE_SOURCES = $(shell find core/src/main -name '*.kt')
ENGINE_SOURCES = $(shell find $(ENGINES:%=%/src/main) -name '*.kt')
APP_SOURCES = $(shell find app/src/test -name '*.kt') $(shell grep -rL '^import android' app/src/main/kotlin)
TEST_SOURCES = app/src/main/kotlin/gemmamtp/demo/AssetSource.kt $(shell find core/src/test app/src/androidTest hosttest/src -name '*.kt')
KOTLIN_TESTS = $(subst /,.,$(shell find core/src/test app/src/test hosttest/src/test -name '*Test.kt' | sed 's|.*/kotlin/||; s|.kt$$||'))
HOST_BUNDLES := onnx-fp32 onnx-int4 executorch-fp32
KOTLIN_JARS := $(foreach jar,kotlin/lib/kotlin-stdlib kotlin/lib/kotlinx-coroutines-core-jvm kotlin/lib/kotlin-test kotlin/lib/kotlin-test-junit \
    gson/gson junit/junit4 junit/hamcrest-core,:.packages/$(jar).jar)
HOST_CLASSES := $(subst $() ,,$(PARTS)/kotlin:$(PARTS)/app:$(PARTS)/engines:$(PARTS)/core:$(PARTS)/java:$(PARTS)/standins-ort:$(PARTS)/standins-et:$(PARTS)/standins-android$(KOTLIN_JARS))
# Besides classes, write those of a part's public side to its folder under api/.
ABI := -P plugin:org.jetbrains.kotlin.jvm.abi
API_OPTIONS = -Xplugin=.packages/kotlin/lib/jvm-abi-gen.jar $(ABI):outputDir=$(PARTS)/api/$(notdir $(@D)) \
    $(ABI):removePrivateClasses=true $(ABI):treatInternalAsPrivate=true
KOTLINC = java -Xmx1g -cp '.packages/kotlin/lib/*' org.jetbrains.kotlin.cli.jvm.K2JVMCompiler -no-reflect -jvm-target 11 \
    -kotlin-home .packages/kotlin

test: $(PARTS)/kotlin/.built $(PARTS)/java/.built build/host build/engines build/manifests build/stress build/java-sample build/kotlin-sample $(HOST_BUNDLES:%=build/bundle-%/manifest.json)
	java -cp $(HOST_CLASSES) org.junit.runner.JUnitCore $(KOTLIN_TESTS)
	$(foreach bundle,$(HOST_BUNDLES),java -Dassets=build/bundle-$(bundle) -Djava.library.path=$(PARTS)/native \
	    -cp $(HOST_CLASSES) org.junit.runner.JUnitCore gemmamtp.demo.BundleOnDeviceTest &&) true
	$(BIN)/python app/check_resources.py
	PYTHONPATH=.. $(BIN)/pytest --numprocesses auto --dist worksteal hosttest

# More of StressTest.kt and test_stress.py: make stress STEPS=10000 SEED=7.
.PHONY: stress
stress: $(PARTS)/kotlin/.built build/stress $(HOST_BUNDLES:%=build/bundle-%/manifest.json)
	java -Dstress=$(or $(STEPS),1000) -Dseed=$(or $(SEED),0) -cp $(HOST_CLASSES) \
	    org.junit.runner.JUnitCore gemmamtp.core.StressTest
	for bundle in $(HOST_BUNDLES); do build/stress build/bundle-$$bundle $(or $(STEPS),1000) $(or $(SEED),0) || exit; done

$(HOST_PACKAGES): tools/packages.sh
	@command -v javac g++ >/dev/null || { echo "make test needs a JDK 17 and g++; install them" >&2; exit 3; }
	tools/packages.sh kotlin gson junit executorch-java onnxruntime-headers
	touch $@

STANDINS_ort := ai
STANDINS_et := org
STANDINS_android := android androidx
$(PARTS)/standins-%/.built: $(shell find hosttest/standins -name '*.java') $(HOST_PACKAGES)
	mkdir -p $(@D)
	javac -Xlint:all,-serial -d $(@D) -cp .packages/junit/junit4.jar $(shell find $(STANDINS_$*:%=hosttest/standins/%) -name '*.java')
	touch $@

$(PARTS)/core/.built: hosttest/host.mk $(CORE_SOURCES) $(HOST_PACKAGES) $(PARTS)/standins-android/.built
	rm -rf $(@D) $(PARTS)/api/core && mkdir -p $(@D)
	$(KOTLINC) $(LIBRARY_OPTIONS) $(API_OPTIONS) -module-name core -d $(@D) \
	    -cp $(subst $() ,,$(PARTS)/standins-android$(KOTLIN_JARS)) $(filter %.kt,$^)
	touch $@

$(PARTS)/engines/.built: $(ENGINE_SOURCES) $(PARTS)/core/.built $(PARTS)/standins-ort/.built
	rm -rf $(@D) $(PARTS)/api/engines && mkdir -p $(@D)
	$(KOTLINC) $(LIBRARY_OPTIONS) $(API_OPTIONS) -module-name engines -d $(@D) \
	    -cp $(subst $() ,,$(PARTS)/core:$(ORT_JAVA):.packages/executorch-java/classes.jar$(KOTLIN_JARS)) $(filter %.kt,$^)
	touch $@

$(PARTS)/app/.built: $(APP_SOURCES) $(PARTS)/engines/.built
	rm -rf $(@D) && mkdir -p $(@D)
	$(KOTLINC) -module-name app -d $(@D) -cp $(subst $() ,,$(PARTS)/engines:$(PARTS)/core$(KOTLIN_JARS)) $(filter %.kt,$^)
	touch $@

$(PARTS)/kotlin/.built: $(TEST_SOURCES) $(PARTS)/app/.built
	rm -rf $(@D) && mkdir -p $(@D)
	$(KOTLINC) -module-name tests -Xfriend-paths=$(PARTS)/core -d $(@D) \
	    -cp $(subst $() ,,$(PARTS)/app:$(PARTS)/engines:$(PARTS)/core:$(PARTS)/standins-android$(KOTLIN_JARS)) $(filter %.kt,$^)
	touch $@

# As an app in Java would be: after the library, against its classes.
$(PARTS)/java/.built: $(wildcard hosttest/src/main/java/*/*/*.java) $(PARTS)/kotlin/.built
	mkdir -p $(@D)
	javac -Xlint:all -d $(@D) -cp $(HOST_CLASSES) $(filter %.java,$^)
	touch $@

$(PARTS)/native/.built: hosttest/native.sh $(wildcard hosttest/jni/*) $(HOST_PACKAGES)
	mkdir -p $(@D)
	hosttest/native.sh $(BIN) $(@D)
	touch $@

# Commands that run the main functions of hosttest from any directory.
build/host: MAIN := MainKt
build/engines: MAIN := EngineCheckKt
build/engines: OPTIONS := -Xcheck:jni
build/manifests: MAIN := ManifestCheckKt
build/stress: MAIN := StressKt
build/stress: OPTIONS := -Xcheck:jni
build/java-sample: MAIN := JavaSample
build/kotlin-sample: MAIN := KotlinSampleKt
build/host build/engines build/manifests build/stress build/java-sample build/kotlin-sample: hosttest/host.mk $(foreach part,native standins-ort standins-et standins-android,$(PARTS)/$(part)/.built)
	printf '%s\n' '#!/bin/sh' 'cd $(CURDIR) || exit' \
	    'exec java -Xmx1g $(OPTIONS) -Djava.library.path=$(PARTS)/native \' \
	    '    -cp $(HOST_CLASSES) gemmamtp.hosttest.$(MAIN) "$$@"' >$@
	chmod +x $@

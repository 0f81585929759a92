#!/bin/bash
# Builds the guest image: <cache>/image/<key>/{vmlinuz,initramfs,manifest.json}, with <cache>/image/current
# pointing there.
#
# The initramfs is several zstd-compressed archives one after the other, which the kernel unpacks in
# turn: one per part from Debian (slow to make, cached under <cache>/base/<key>) and one with this tree
# (a second). zstd, not xz: 0.8 MB larger, but under emulation it unpacks in half a second instead of 2.4.
set -Eeuo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<USAGE
usage: build-rootfs.sh [--with FEATURE] [--mirror URL] [--out DIR] [--tree DIR] [--refresh] [--print-key]
                       [--check-reproducible]

  --with FEATURE         add what initramfs/with/FEATURE lists (criu: checkpoint and restore); may be repeated.
                         The link is then image/current-FEATURE, and image/current is left as it is
  --mirror URL           Debian mirror (default: the one in this host's apt sources)
  --out DIR              also copy vmlinuz, initramfs and manifest.json to DIR
  --tree DIR             take gcsagent/ and protocol/ from DIR instead of this repository; the link
                         image/current is left as it is
  --refresh              ask the archive for newer packages even though it was asked a short while ago
  --print-key            print the image's key and build nothing
  --check-reproducible   build once more from nothing but the packages and compare the bytes with the image

Prints the image's folder. The cache is \${GCS_CACHE:-\${XDG_CACHE_HOME:-~/.cache}/gcsagent}.
USAGE
}

OUT='' TREE=$GCS_REPO MODE=build WITH=
while [ $# -gt 0 ]; do
    case $1 in
        --with) WITH+=" ${2:?--with needs the name of a feature}"; shift 2 ;;
        --mirror) GCS_MIRROR=${2:?--mirror needs a URL}; shift 2 ;;
        --out) OUT=${2:?--out needs a folder}; shift 2 ;;
        --tree) TREE=$(realpath "${2:?--tree needs a folder}"); shift 2 ;;
        --refresh) GCS_REFRESH=1; shift ;;
        --print-key) MODE=key; shift ;;
        --check-reproducible) MODE=check; shift ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done

LISTS=$GCS_REPO/initramfs
SCRIPTS=$GCS_REPO/scripts
WITH=$(tr ' ' '\n' <<<"$WITH" | sort -u | xargs)
FEATURES=()
for feature in $WITH; do
    FEATURES+=("$LISTS/with/$feature")
    [ -d "$LISTS/with/$feature" ] || die "--with $feature: there is $(ls "$LISTS/with" | xargs)"
done
# With the features' parts, by their names, before the one that is made last and changes most.
PARTS="busybox libs python runc crun network storage ${WITH:+$WITH }modules"
# Times inside the image. Fixed, so that a new commit doesn't rebuild the parts from Debian.
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-0}
PYTHON=/usr/bin/python3

# Hash of everything below the named folders or files: names, modes, contents.
content_hash() {
    local path
    for path in "$@"; do
        (cd "$(dirname "$path")" && find "$(basename "$path")" -type f ! -name '*.pyc' -print0 | sort -z |
            xargs -0 -r stat -c '%n %A' && find "$(basename "$path")" -type f ! -name '*.pyc' -print0 | sort -z |
            xargs -0 -r sha256sum)
    done | sha256
}

# pack ROOT FILE: ROOT as a compressed archive, the same bytes every time. One thread: with more, zstd cuts
# its input differently.
pack() {
    "$PYTHON" -I "$SCRIPTS/pack_newc.py" "$1" "$SOURCE_DATE_EPOCH" | zstd -19 -T1 -q -c >"$2"
}

# Bytes in ROOT's files; a folder's own size depends on the file system.
unpacked_size() { find "$1" -type f -printf '%s\n' | awk '{ sum += $1 } END { print sum + 0 }'; }

# guest_python ROOT ARG...: runs ROOT's interpreter on the host, by way of ROOT's own loader and libraries:
# no chroot, so no privilege.
guest_python() {
    local root=$1 libs=$1/usr/lib/x86_64-linux-gnu
    shift
    env -i PYTHONHOME="$root/usr" PYTHONHASHSEED=0 PYTHONDONTWRITEBYTECODE=1 LC_ALL=C.UTF-8 \
        "$libs/ld-linux-x86-64.so.2" --library-path "$libs" "$root/usr/bin/python3.13" "$@"
}

# The packages.list files' packages with their dependencies, less those they leave out.
resolve() {
    local packages lists APT_DROP
    lists=("$LISTS/packages.list" "${FEATURES[@]/%//packages.list}")
    mapfile -t packages < <(awk '/^[^#-]/ { print $1 }' "${lists[@]}")
    # A feature may want what the image by itself leaves out.
    APT_DROP=$(awk '/^-/ { print substr($1, 2) }' "${lists[@]}" | grep -vxFf <(printf '%s\n' "${packages[@]}") | paste -sd '|')
    find_mirrors
    apt_resolve_trixie "image${WITH:+-${WITH// /-}}" "${packages[@]}"
    resolved "$RESOLVED" >"$WORK/packages"
}

base_key() {
    {
        cat "$WORK/packages" "$LISTS"/*.list "${FEATURES[@]/%//packages.list}" "${FEATURES[@]/%//files.list}" \
            "${FEATURES[@]/%//modules.list}" "$LISTS/stdlib.exclude"
        echo "$WITH"
        cat "$SCRIPTS/assemble_root.py" "$SCRIPTS/compile_tree.py" "$SCRIPTS/pack_newc.py" \
            "$SCRIPTS/build-rootfs.sh"
        echo "$SOURCE_DATE_EPOCH"
        # Its version decides the bytes too.
        zstd --version
    } | sha256
}

# build_base DIR: the parts from Debian.
build_base() {
    local part
    apt_fetch "$WORK/packages" "$WORK/debs"
    say "unpacking $(wc -l <"$WORK/packages") packages"
    rm -rf "$WORK/unpacked" "$WORK/parts" "$1"
    apt_unpack "$WORK/debs" "$WORK/unpacked"
    say "picking files"
    "$PYTHON" -I "$SCRIPTS/assemble_root.py" "$WORK/unpacked" "$WORK/parts" "$LISTS" "${FEATURES[@]}"
    say "compiling Python to byte-code"
    guest_python "$WORK/unpacked" "$SCRIPTS/compile_tree.py" compile "$WORK/parts/python"
    mkdir -p "$1/root"
    for part in $PARTS; do
        say "packing $part"
        pack "$WORK/parts/$part" "$1/$part.cpio.zst"
        # Unpacked too: its interpreter compiles our tree.
        cp -a "$WORK/parts/$part/." "$1/root/"
        unpacked_size "$WORK/parts/$part" >"$1/$part.size"
    done
    cp "$WORK/parts/kernel" "$1/kernel"
    cp "$WORK/unpacked/boot/vmlinuz-$(cat "$1/kernel")" "$1/vmlinuz"
    chmod 644 "$1/vmlinuz"
    cp "$WORK/packages" "$1/packages"
    say "trying to import the whole standard library"
    guest_python "$1/root" -I - check <"$SCRIPTS/compile_tree.py" ||
        die "the image's Python lacks something: see initramfs/stdlib.exclude and files.list"
}

# stamp BASE: build.json, which the guest shows in agent.info.
stamp() {
    "$PYTHON" -I - "$1" "$IMAGE_KEY" "$COMMIT" "$DIRTY" <<'PY'
import json, pathlib, sys
base, key, commit, dirty = sys.argv[1:]
packages = [line.split() for line in pathlib.Path(base, "packages").read_text().splitlines()]
print(json.dumps({
    "key": key,
    "commit": commit or None,
    "dirty": dirty == "yes",
    "kernel": pathlib.Path(base, "kernel").read_text().strip(),
    "packages": {name: version for _, name, version in packages},
}, indent=1))
PY
}

# build_tree BASE FILE: init, configuration, stamp, gcsagent without its host side, and protocol.
build_tree() {
    local root=$WORK/tree site=$WORK/tree/usr/lib/python3/dist-packages name feature
    rm -rf "$root"
    mkdir -p "$site" "$root/etc/gcsagent"
    for name in gcsagent protocol; do
        (cd "$TREE" && find "$name" -name '*.py' ! -path 'gcsagent/host/*' -exec cp --parents -t "$site" {} +)
    done
    guest_python "$1/root" "$SCRIPTS/compile_tree.py" compile "$root"
    cp -r "$LISTS/etc/." "$root/etc/"
    for feature in $WITH; do
        [ ! -d "$LISTS/with/$feature/etc" ] || cp -r "$LISTS/with/$feature/etc/." "$root/etc/"
    done
    install -m 755 "$LISTS/init" "$root/init"
    # By full path for what doesn't search busybox's own list: the kernel (modprobe), containers' tools.
    mkdir -p "$root/usr/bin" "$root/usr/sbin"
    for name in sh mount umount modprobe poweroff reboot rm cat ls ps kill gzip dd mkswap swapon swapoff fsfreeze fstrim sync nsenter sysctl; do
        # A feature may bring the whole of what busybox has the most of.
        [ ! -e "$1/root/usr/bin/$name" ] || continue
        case $name in
            modprobe | poweroff | reboot | sysctl) ln -s ../bin/busybox "$root/usr/sbin/$name" ;;
            *) ln -s busybox "$root/usr/bin/$name" ;;
        esac
    done
    stamp "$1" >"$root/etc/gcsagent/build.json"
    find "$root" -type d -exec chmod 755 {} +
    find "$root/etc" "$root/usr/lib" -type f -exec chmod 644 {} +
    unpacked_size "$root" >"$WORK/tree.size"
    pack "$root" "$2"
}

# manifest BASE IMAGE: what is in IMAGE, and the table for people.
manifest() {
    "$PYTHON" -I - "$1" "$2" "$WORK" $PARTS <<'PY'
import json, pathlib, sys
base, image, work = map(pathlib.Path, sys.argv[1:4])
parts = {}
for part in sys.argv[4:]:
    packed = (base / f"{part}.cpio.zst").stat().st_size
    parts[part] = {"packed": packed, "unpacked": int((base / f"{part}.size").read_text())}
parts["tree"] = {"packed": (work / "tree.cpio.zst").stat().st_size, "unpacked": int((work / "tree.size").read_text())}
stamp = json.loads((work / "tree/etc/gcsagent/build.json").read_text())
total = (image / "initramfs").stat().st_size
kernel = (image / "vmlinuz").stat().st_size
stamp["sizes"] = {"vmlinuz": kernel, "initramfs": total, "parts": parts}
(image / "manifest.json").write_text(json.dumps(stamp, indent=1) + "\n")
about = {"busybox": "shell and tools", "libs": "shared libraries", "python": "interpreter, stdlib, 4 libraries",
         "runc": "OCI runtime", "crun": "OCI runtime, too", "network": "ip, nft", "storage": "mkfs, dmsetup", "criu": "checkpoint and restore", "modules": "kernel modules", "tree": "init, gcsagent, protocol"}
line = "    {:<10} {:>8} {:>9}  {}"
print(line.format("part", "MB", "unpacked", ""))
for name, size in parts.items():
    print(line.format(name, f"{size['packed'] / 1e6:.2f}", f"{size['unpacked'] / 1e6:.2f}", about.get(name, "")))
print(line.format("initramfs", f"{total / 1e6:.2f}", f"{sum(p['unpacked'] for p in parts.values()) / 1e6:.2f}", ""))
print(line.format("vmlinuz", f"{kernel / 1e6:.2f}", "", stamp["kernel"]))
PY
}

# build_image BASE IMAGE
build_image() {
    local part
    mkdir -p "$2"
    say "packing this tree"
    build_tree "$1" "$WORK/tree.cpio.zst"
    for part in $PARTS; do cat "$1/$part.cpio.zst"; done | cat - "$WORK/tree.cpio.zst" >"$2/initramfs"
    ln "$1/vmlinuz" "$2/vmlinuz"
    manifest "$1" "$2" >&2
}

need apt-get dpkg-deb tar zstd depmod flock "$PYTHON"
[ "$(dpkg --print-architecture)" = amd64 ] || die "only amd64 is supported"
[ -d "$TREE/gcsagent" ] && [ -d "$TREE/protocol" ] || die "$TREE holds no gcsagent/ and protocol/"
lock_cache
make_work_dir
resolve

COMMIT=$(git -C "$TREE" rev-parse HEAD 2>/dev/null || true)
DIRTY=no
# Only what is in the image counts.
[ -z "$(git -C "$TREE" status --porcelain -- gcsagent protocol initramfs scripts 2>/dev/null)" ] || DIRTY=yes
BASE_KEY=$(base_key)
IMAGE_KEY=$(
    {
        echo "$BASE_KEY $COMMIT $DIRTY"
        content_hash "$LISTS" "$TREE/gcsagent" "$TREE/protocol"
    } | sha256
)
if [ $MODE = key ]; then
    echo "$IMAGE_KEY"
    exit 0
fi

BASE=$GCS_CACHE/base/$BASE_KEY
IMAGE=$GCS_CACHE/image/$IMAGE_KEY
if [ ! -e "$IMAGE/manifest.json" ]; then
    if [ ! -e "$BASE/kernel" ]; then
        build_base "$WORK/base"
        publish "$WORK/base" "$BASE"
        forget_old "$GCS_CACHE/base" 3
    fi
    build_image "$BASE" "$WORK/image"
    publish "$WORK/image" "$IMAGE"
fi
touch "$IMAGE"
if [ $MODE = check ]; then
    build_base "$WORK/base-again"
    build_image "$WORK/base-again" "$WORK/again"
    for name in vmlinuz initramfs manifest.json; do
        cmp "$IMAGE/$name" "$WORK/again/$name" || die "$name differs between two builds of the same inputs"
    done
    say "reproducible: $(sha256sum <"$IMAGE/initramfs" | cut -d' ' -f1) twice"
    exit 0
fi
[ "$TREE" != "$GCS_REPO" ] || point_current "$GCS_CACHE/image" "$IMAGE_KEY" "current${WITH:+-${WITH// /-}}"
forget_old "$GCS_CACHE/image" 8
if [ -n "$OUT" ]; then
    mkdir -p "$OUT"
    cp "$IMAGE"/{vmlinuz,initramfs,manifest.json} "$OUT/"
fi
say "image $IMAGE_KEY: initramfs $(stat -c %s "$IMAGE/initramfs") bytes"
echo "$IMAGE"

#!/bin/bash
# Makes a container's root file system out of Debian 13 packages, installed and configured as on any
# machine: <cache>/demo-rootfs/<key>/{rootfs/,rootfs.erofs}, with <cache>/demo-rootfs/current pointing
# there. The folder serves containers on this machine, the EROFS image a VM. Needs root: the files belong
# to several users.
set -Eeuo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<USAGE
usage: make-demo-rootfs.sh [--mirror URL] [--out DIR] [--refresh]

  --mirror URL   Debian mirror (default: the one in this host's apt sources)
  --out DIR      also copy rootfs.erofs to DIR
  --refresh      ask the archive for newer packages even though it was asked a short while ago

Prints the folder that holds rootfs/ and rootfs.erofs.
USAGE
}

OUT=''
while [ $# -gt 0 ]; do
    case $1 in
        --mirror) GCS_MIRROR=${2:?--mirror needs a URL}; shift 2 ;;
        --out) OUT=${2:?--out needs a folder}; shift 2 ;;
        --refresh) GCS_REFRESH=1; shift ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done

# Beside the essential packages (bash, coreutils, dpkg, util-linux and their like).
PACKAGES=(python3 sqlite3 procps redis-server)
# Programs that the demo and the tests call.
PROGRAMS=(redis-server redis-benchmark redis-cli bash sh cat head dd sleep ps stty sha256sum python3 sqlite3 id env true false tee mkfifo)
export SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-0}

need apt-get mmdebstrap mkfs.erofs flock
[ "$(dpkg --print-architecture)" = amd64 ] || die "only amd64 is supported"
lock_cache
make_work_dir
find_mirrors
apt_resolve_trixie demo '?essential' "${PACKAGES[@]}"
key=$({ resolved "$RESOLVED"; cat "${BASH_SOURCE[0]}"; echo "$SOURCE_DATE_EPOCH"; dpkg-query -W erofs-utils 2>&1 || true; } | sha256)
FINAL=$GCS_CACHE/demo-rootfs/$key

# Everything below runs in the new root, whose path mmdebstrap passes as $1.
# shellcheck disable=SC2016
clean_up='
    cd "$1"
    # mmdebstrap takes these from the host.
    echo demo >etc/hostname
    : >etc/resolv.conf
    : >etc/machine-id
    rm -rf var/lib/apt/lists var/cache/apt var/cache/debconf var/cache/ldconfig var/log/* var/lib/dpkg/*-old
    rm -rf etc/apt/sources.list etc/apt/sources.list.d/* usr/share/doc usr/share/man usr/share/info
    rm -rf usr/share/locale usr/share/lintian usr/share/bash-completion usr/share/common-licenses
    rm -rf usr/lib/x86_64-linux-gnu/gconv usr/share/perl5/Debconf usr/share/zoneinfo
'

build() {
    # The packages come from the cache where they are there already; mmdebstrap's apt checks them again.
    apt_fetch "$RESOLVED" "$WORK/debs"
    local archives=$WORK/archives hash name version
    mkdir -p "$archives" "$WORK/demo"
    while read -r hash name version; do
        # apt's own name for it: the epoch's colon is escaped.
        ln "$GCS_CACHE/debs/$hash.deb" "$archives/${name}_${version//:/%3a}_$(dpkg-deb -f "$GCS_CACHE/debs/$hash.deb" Architecture).deb"
    done < <(resolved "$RESOLVED")
    say "installing $(resolved "$RESOLVED" | wc -l) packages"
    mmdebstrap --quiet --mode=root --format=directory --variant=essential --architectures=amd64 \
        --include="$(IFS=,; echo "${PACKAGES[*]}")" \
        --aptopt='APT::Sandbox::User "root"' --aptopt='Acquire::Languages "none"' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/lib/x86_64-linux-gnu/gconv/*' \
        --setup-hook="mkdir -p \"\$1/var/cache/apt/archives\" && cp $archives/*.deb \"\$1/var/cache/apt/archives/\"" \
        --customize-hook="$clean_up" \
        trixie "$WORK/demo/rootfs" - <"$APT_DIR/sources/gcsagent.sources" >"$WORK/mmdebstrap.log" 2>&1 || {
        tail -n 20 "$WORK/mmdebstrap.log" | sed 's/^/    mmdebstrap: /' >&2
        die "mmdebstrap could not make the root file system"
    }
    local program
    for program in "${PROGRAMS[@]}"; do
        [ -e "$WORK/demo/rootfs/usr/bin/$program" ] || die "the root file system lacks $program"
    done
    say "packing it as EROFS"
    # lz4: the guest decompresses under emulation.
    mkfs.erofs -zlz4hc -T"$SOURCE_DATE_EPOCH" -U 00000000-0000-0000-0000-000000000000 \
        "$WORK/demo/rootfs.erofs" "$WORK/demo/rootfs" >"$WORK/erofs.log" 2>&1 || {
        sed 's/^/    mkfs.erofs: /' "$WORK/erofs.log" >&2
        die "mkfs.erofs failed"
    }
    cp "$RESOLVED" "$WORK/demo/packages"
}

if [ ! -e "$FINAL/rootfs.erofs" ]; then
    [ "$(id -u)" -eq 0 ] || die "run as root: the files of a root file system belong to several users"
    build
    publish "$WORK/demo" "$FINAL"
fi
point_current "$GCS_CACHE/demo-rootfs" "$key"
forget_old "$GCS_CACHE/demo-rootfs" 2
if [ -n "$OUT" ]; then
    mkdir -p "$OUT"
    cp "$FINAL/rootfs.erofs" "$OUT/"
fi
say "root file system $key: $(du -sm "$FINAL/rootfs" | cut -f1) MiB as files, $(du -m "$FINAL/rootfs.erofs" | cut -f1) MiB as EROFS"
echo "$FINAL"

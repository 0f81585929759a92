#!/bin/bash
# Installs the host packages that the build, the demo and the tests call, and only those that are
# missing. Needs root only then. Debian 12 or newer, Ubuntu 22.04 or newer.
set -Eeuo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

[ $# -eq 0 ] || die "takes no arguments"
command -v apt-get dpkg-query >/dev/null || die "this host has no apt: install by hand what scripts/install-deps.sh lists"

packages=(
    python3 python3-venv make git
    ca-certificates debian-archive-keyring gpgv # verified downloads
    mmdebstrap zstd kmod                        # the guest image (kmod: depmod)
    erofs-utils                                 # a root file system as a block device
    runc crun                                   # containers without a VM: development and tests
    util-linux procps iproute2                  # flock, unshare, ps, ip
    umoci skopeo buildah                        # what makes the images that the tests run
    zsh fish                                    # gcsctl's completion is tested in them, and in bash
    gcc libc6-dev libmsgpack-dev libjson-c-dev  # a client in C for the tests; what make bench measures against
)
# Ubuntu 22.04's python3 is 3.10; its archive also has 3.11.
if ! /usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null &&
    [ -n "$(apt-cache search --names-only '^python3\.11-venv$' 2>/dev/null)" ]; then
    packages+=(python3.11 python3.11-venv)
fi

missing=()
for package in "${packages[@]}"; do
    [ "$(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null)" = "ii " ] || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0

[ "$(id -u)" -eq 0 ] || die "run as root: these packages are missing: ${missing[*]}"
say "installing ${missing[*]}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
apt_get() { apt-get -q -y -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 --no-install-recommends "$@" >"$log" 2>&1; }
if ! { apt_get update && apt_get install "${missing[@]}"; }; then
    tail -n 15 "$log" | sed 's/^/    apt: /' >&2
    die "apt-get could not install: ${missing[*]}"
fi

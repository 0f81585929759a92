#!/bin/bash
# Puts QEMU 10, vhost-device-vsock and virtiofsd into <cache>/tools/<hash>/ and points <cache>/tools/current
# there.
#
# Why not the host's: Debian 12's QEMU 7.2 corrupts flags on cmpxchg16b under TCG and panics Debian
# kernels at random; vhost-device-vsock is only in Debian sid (it needs nothing but glibc >= 2.34);
# Debian 12 has no virtiofsd in Rust, and Debian 13's wants a newer glibc, which it gets, loader and all.
set -Eeuo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

usage() {
    cat <<USAGE
usage: fetch-tools.sh [--mirror URL] [--refresh]

  --mirror URL   Debian mirror (default: the one in this host's apt sources)
  --refresh      ask the archive again even though tools are there

Prints the folder whose bin/ holds qemu-system-x86_64, vhost-device-vsock and virtiofsd.
USAGE
}
while [ $# -gt 0 ]; do
    case $1 in
        --mirror) GCS_MIRROR=${2:?--mirror needs a URL}; shift 2 ;;
        --refresh) GCS_REFRESH=1; shift ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done

TOOLS=$GCS_CACHE/tools
QEMU=qemu-system-x86_64
VSOCK=vhost-device-vsock
VIRTIOFSD=virtiofsd

works() { [ -x "$1/bin/$QEMU" ] && [ -x "$1/bin/$VSOCK" ] && [ -x "$1/bin/$VIRTIOFSD" ]; }
if [ -z "$GCS_REFRESH" ] && works "$TOOLS/current"; then
    echo "$TOOLS/current"
    exit 0
fi

need apt-get dpkg-deb tar flock awk
[ "$(dpkg --print-architecture)" = amd64 ] || die "only amd64 hosts are supported"
lock_cache
make_work_dir
find_mirrors

# The first suite that exists and whose programs this host's glibc can run: bookworm's need 2.34 or so,
# trixie's 2.41. Backports vanish some day; then trixie serves newer hosts.
resolve_qemu() {
    # glibc must be the host's own: its loader is already in the process when LD_LIBRARY_PATH is read.
    local suites APT_DROP='libc6|libc-bin|libcrypt1|locales|perl.*|dpkg|debconf|adduser|passwd'
    for suites in "bookworm bookworm-backports" "trixie"; do
        # shellcheck disable=SC2086
        apt_private "qemu-${suites%% *}" $suites
        if apt_resolve "$APT_DIR/resolved" -t "${suites##* }" qemu-system-x86; then
            return 0
        fi
        say "no usable answer from ${suites##* }"
    done
    die "$DEBIAN_MIRROR has no qemu-system-x86 for this host: check the mirror and the network"
}

# wrapper FOLDER PROGRAM [ARG...]: bin/PROGRAM, which becomes the real program by exec (the launcher
# signals the pid it started). Only the tool gets the private libraries, never the caller.
wrapper() {
    local dir=$1 program=$2
    shift 2
    cat >"$WORK/tools/bin/$program" <<SH
#!/bin/sh
here=\$(dirname "\$(readlink -f "\$0")")/..
root=\$here/$dir
export LD_LIBRARY_PATH="\$root/usr/lib/x86_64-linux-gnu\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
export QEMU_MODULE_DIR="\$root/usr/lib/x86_64-linux-gnu/qemu"
exec "\$root/usr/bin/$program" $* "\$@"
SH
    chmod 755 "$WORK/tools/bin/$program"
}

mkdir -p "$WORK/tools/bin"

host_qemu=$(command -v $QEMU || true)
if [ -n "$host_qemu" ] && [ "$("$host_qemu" --version | sed -nE '1s/.*version ([0-9]+).*/\1/p')" -ge 10 ]; then
    say "using this host's own $host_qemu"
    ln -s "$host_qemu" "$WORK/tools/bin/$QEMU"
    "$host_qemu" --version >"$WORK/qemu.pkgs"
else
    resolve_qemu
    resolved "$APT_DIR/resolved" >"$WORK/qemu.pkgs"
    apt_fetch "$WORK/qemu.pkgs" "$WORK/debs-qemu"
    say "unpacking QEMU ($(wc -l <"$WORK/qemu.pkgs") packages)"
    apt_unpack "$WORK/debs-qemu" "$WORK/tools/qemu"
    # Firmware: SeaBIOS under share/seabios, option ROMs and tables under share/qemu.
    wrapper qemu $QEMU '-L "$root/usr/share/seabios" -L "$root/usr/share/qemu"'
fi

apt_private vsock sid
# Alone: its libraries are glibc and libgcc_s, which every host has.
APT_DROP='lib.*|gcc-.*' apt_resolve "$APT_DIR/resolved" vhost-device-vsock ||
    die "$DEBIAN_MIRROR has no vhost-device-vsock in sid: check the mirror and the network"
resolved "$APT_DIR/resolved" >"$WORK/vsock.pkgs"
apt_fetch "$WORK/vsock.pkgs" "$WORK/debs-vsock"
apt_unpack "$WORK/debs-vsock" "$WORK/tools/vsock"
wrapper vsock $VSOCK

# Without uidmap and what that needs: the launcher maps no ids.
APT_DROP='uidmap|debconf|libsubid5|libpam0g|libaudit.*|libsemanage.*|libsepol2|libselinux1|libpcre2-8-0|libcrypt1|libacl1|libattr1|libbsd0|libbz2-1.0|libmd0' \
    apt_resolve_trixie virtiofsd virtiofsd
resolved "$RESOLVED" >"$WORK/share.pkgs"
apt_fetch "$WORK/share.pkgs" "$WORK/debs-share"
apt_unpack "$WORK/debs-share" "$WORK/tools/share"
# By its own loader, which alone takes its own glibc.
cat >"$WORK/tools/bin/$VIRTIOFSD" <<'SH'
#!/bin/sh
root=$(dirname "$(readlink -f "$0")")/../share
libs=$root/usr/lib/x86_64-linux-gnu
exec "$libs/ld-linux-x86-64.so.2" --library-path "$libs" "$root/usr/libexec/virtiofsd" "$@"
SH
chmod 755 "$WORK/tools/bin/$VIRTIOFSD"

rm -rf "$WORK"/tools/*/usr/share/{doc,man,locale,icons,lintian} "$WORK"/tools/*/{etc,var} \
    "$WORK"/tools/share/usr/lib/x86_64-linux-gnu/gconv
cat "$WORK/qemu.pkgs" "$WORK/vsock.pkgs" "$WORK/share.pkgs" >"$WORK/tools/packages"

say "trying the programs"
"$WORK/tools/bin/$QEMU" --version >"$WORK/tools/versions" || die "the fetched QEMU does not run here"
for program in $VSOCK $VIRTIOFSD; do
    "$WORK/tools/bin/$program" --version >>"$WORK/tools/versions" || die "the fetched $program does not run here"
done

key=$(cat "$WORK/tools/packages" "${BASH_SOURCE[0]}" | sha256)
publish "$WORK/tools" "$TOOLS/$key"
point_current "$TOOLS" "$key"
forget_old "$TOOLS" 2
sed 's/^/    /' "$TOOLS/$key/versions" >&2
echo "$TOOLS/current"

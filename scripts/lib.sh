# Shared by the scripts beside it: messages, the cache folder, and Debian packages fetched through a
# private apt configuration (own sources, lists and archives), so that the host's apt is only read.
# Source it from bash after `set -Eeuo pipefail`.

# shellcheck shell=bash

GCS_REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
GCS_CACHE=${GCS_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/gcsagent}
# apt is asked again for what the archive holds after this many minutes (or with --refresh).
GCS_RESOLVE_MINUTES=${GCS_RESOLVE_MINUTES:-1440}
GCS_MIRROR=${GCS_MIRROR:-}
GCS_REFRESH=${GCS_REFRESH:-}
GCS_KEYRING=/usr/share/keyrings/debian-archive-keyring.gpg

# The same bytes whatever the caller's locale, time zone and umask.
export LC_ALL=C.UTF-8 TZ=UTC
umask 022

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() {
    say "error: $*"
    exit 1
}
# A command nobody expected to fail: never end without a word.
trap 'say "error: ${0##*/}:$LINENO: failed: $BASH_COMMAND"' ERR
need() {
    local tool
    for tool in "$@"; do
        command -v "$tool" >/dev/null || die "$tool is missing: run scripts/install-deps.sh (as root) first"
    done
}
sha256() { sha256sum | cut -c1-"${1:-16}"; }

# One build at a time per cache folder: apt's own lock would refuse instead of waiting.
lock_cache() {
    mkdir -p "$GCS_CACHE"
    exec 9>"$GCS_CACHE/.lock"
    flock -n 9 && return
    say "another build is using $GCS_CACHE: waiting for it (at most 15 minutes)"
    flock -w 900 9 || die "the other build still holds $GCS_CACHE/.lock"
}

# A private folder on the cache's own file system, removed on exit, so that mv to the final name is atomic.
make_work_dir() {
    mkdir -p "$GCS_CACHE/tmp"
    # What a killed run left; the lock says nobody else is using it.
    find "$GCS_CACHE/tmp" -mindepth 1 -maxdepth 1 -exec rm -rf {} +
    WORK=$(mktemp -d "$GCS_CACHE/tmp/${0##*/}.XXXXXX")
    chmod 755 "$WORK"
    trap 'rm -rf "$WORK"' EXIT
    trap 'exit 130' INT TERM HUP
}

# point_current FOLDER NAME [LINK]: FOLDER/current, or LINK there, becomes a link to NAME without ever being
# absent.
point_current() {
    ln -sfn "$2" "$1/.current.$$"
    mv -T "$1/.current.$$" "$1/${3:-current}"
}

# publish DIR FINAL: DIR gets its final name in one step; a folder already there stays.
publish() {
    mkdir -p "$(dirname "$2")"
    [ -e "$2" ] || mv -T "$1" "$2"
}

# forget_old FOLDER COUNT: the COUNT newest results stay, and what a link there names.
forget_old() {
    local folder=$1 keep=$2 old
    find "$folder" -mindepth 1 -maxdepth 1 -type d -printf '%T@ %p\n' | sort -rn | tail -n "+$((keep + 1))" |
        while read -r _ old; do
            find "$folder" -maxdepth 1 -type l -exec realpath -q {} + | grep -qxF "$(realpath "$old")" || rm -rf "$old"
        done
}

# ---------------------------------------------------------------------------------------------------
# Debian mirrors

# Prints "URI SUITE" for every binary source of the host's apt, from both file formats.
host_sources() {
    local file etc=${GCS_APT_ETC:-/etc/apt}
    for file in "$etc/sources.list" "$etc"/sources.list.d/*.list; do
        [ -f "$file" ] || continue
        sed -nE 's/^[[:space:]]*deb[[:space:]]+(\[[^]]*\][[:space:]]+)?([^[:space:]]+)[[:space:]]+([^[:space:]]+).*/\2 \3/p' "$file"
    done
    for file in "$etc"/sources.list.d/*.sources; do
        [ -f "$file" ] || continue
        awk '
            function flush(   i, j, n, m, u, s) {
                n = split(uris, u); m = split(suites, s)
                if (types ~ /(^| )deb( |$)/ && enabled !~ /^(no|false)$/)
                    for (i = 1; i <= n; i++) for (j = 1; j <= m; j++) print u[i], s[j]
                types = uris = suites = enabled = key = ""
            }
            /^#/ { next }
            /^[[:space:]]*$/ { flush(); next }
            /^[[:space:]]/ { value = $0 }
            /^[^[:space:]]/ { key = tolower($0); sub(/:.*/, "", key); value = $0; sub(/^[^:]*:/, "", value) }
            key == "types" { types = types " " value }
            key == "uris" { uris = uris " " value }
            key == "suites" { suites = suites " " value }
            key == "enabled" { gsub(/[[:space:]]/, "", value); enabled = tolower(value) }
            END { flush() }' "$file"
    done
}

# Sets DEBIAN_MIRROR and DEBIAN_SECURITY. On a host that isn't Debian the mirror is the one mmdebstrap
# itself would use.
find_mirrors() {
    local uri suite
    DEBIAN_MIRROR=${GCS_MIRROR%/}
    DEBIAN_SECURITY=
    if [ -z "$DEBIAN_MIRROR" ]; then
        while read -r uri suite; do
            case "${uri%/}:$suite" in
                */debian-security:*) DEBIAN_SECURITY=${DEBIAN_SECURITY:-${uri%/}} ;;
                */debian:*) DEBIAN_MIRROR=${DEBIAN_MIRROR:-${uri%/}} ;;
            esac
        done < <(host_sources)
    fi
    if [ -z "$DEBIAN_MIRROR" ] && command -v mmdebstrap >/dev/null; then
        DEBIAN_MIRROR=$(sed -nE "s/^ *my \\\$mirror *= '([^']+)';.*/\1/p" "$(command -v mmdebstrap)" | head -n 1)
        [ -z "$DEBIAN_MIRROR" ] || say "this host's apt names no Debian mirror: using mmdebstrap's default"
    fi
    [ -n "$DEBIAN_MIRROR" ] || die "this host's apt sources name no Debian mirror: pass --mirror URL"
    # .../debian and .../debian-security stand side by side on mirrors and snapshots alike.
    [ -n "$DEBIAN_SECURITY" ] || DEBIAN_SECURITY=$(printf '%s' "$DEBIAN_MIRROR" | sed -E 's#/debian(/|$)#/debian-security\1#')
}

# debian_source SUITE [URI]: one deb822 stanza, signatures checked against Debian's own keyring only.
debian_source() {
    printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nArchitectures: amd64\nSigned-By: %s\n\n' \
        "${2:-$DEBIAN_MIRROR}" "$1" "$GCS_KEYRING"
}

# ---------------------------------------------------------------------------------------------------
# A private apt

# apt_private NAME SUITE...: APT_CONFIG for an apt that knows only SUITE... and no installed package.
# A SUITE that ends in -security comes from the security archive.
apt_private() {
    local name=$1 suite
    shift
    [ -r "$GCS_KEYRING" ] || die "$GCS_KEYRING is missing: run scripts/install-deps.sh (as root) first"
    APT_DIR=$GCS_CACHE/apt/$name
    mkdir -p "$APT_DIR"/{lists/partial,archives/partial,sources}
    : >"$APT_DIR/status"
    for suite in "$@"; do
        case $suite in
            *-security) debian_source "$suite" "$DEBIAN_SECURITY" ;;
            *) debian_source "$suite" ;;
        esac
    done >"$APT_DIR/sources/gcsagent.sources"
    {
        # The way out (proxies, retries, a snapshot mirror's old dates) is the host's; nothing else is:
        # its hooks and index targets would run for our lists too. Read before APT_CONFIG changes.
        APT_CONFIG='' apt-config dump | grep -E '^Acquire::(http|https|Check-[A-Za-z-]+|Retries)\b' || true
        cat <<CONF
Dir::Etc::main "/dev/null";
Dir::Etc::parts "/dev/null";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "$APT_DIR/sources";
Dir::Etc::preferencesparts "/dev/null";
Dir::Etc::preferences "/dev/null";
Dir::State "$APT_DIR";
Dir::State::lists "$APT_DIR/lists";
Dir::State::status "$APT_DIR/status";
Dir::Cache "$APT_DIR";
Dir::Cache::archives "$APT_DIR/archives";
Dir::Log "$APT_DIR";
APT::Architecture "amd64";
APT::Architectures { "amd64"; };
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Acquire::Languages "none";
# Indexes stay compressed and no cache of them is kept: 30 MB instead of 500.
Acquire::GzipIndexes "true";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
Acquire::ForceHash "SHA256";
Acquire::Retries "3";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
CONF
    } >"$APT_DIR/apt.conf"
}

papt() { APT_CONFIG="$APT_DIR/apt.conf" "$@"; }

apt_update() {
    # --error-on=any (apt >= 2.1) turns an unreachable mirror into a failure; plain update only warns.
    papt apt-get -q update --error-on=any >"$APT_DIR/update.log" 2>&1
}

# apt_uris ARG...: what `apt-get install ARG...` would fetch, as sorted "SHA256 NAME VERSION" lines, less
# the packages whose whole name matches the regular expression APT_DROP.
apt_uris() {
    local out
    if ! out=$(papt apt-get -qq --print-uris install "$@" 2>"$APT_DIR/resolve.log"); then
        sed 's/^/    apt: /' "$APT_DIR/resolve.log" >&2
        return 1
    fi
    # 'URI' name_version_arch.deb SIZE SHA256:HASH ; apt writes the version's colon as %3a.
    awk -v drop="^(${APT_DROP:-})\$" '
        $4 ~ /^SHA256:/ {
            split($2, f, "_"); sub(/^SHA256:/, "", $4); gsub(/%3a/, ":", f[2])
            if (f[1] !~ drop) print $4, f[1], f[2]
        }' <<<"$out" | sort -k2
}

# True if every package named in FILE has been downloaded.
all_fetched() {
    local hash rest
    while read -r hash rest; do
        [ -f "$GCS_CACHE/debs/$hash.deb" ] || return 1
    done < <(resolved "$1")
}

# apt_resolve FILE ARG...: FILE gets the resolved packages. The network is left alone when FILE is younger
# than GCS_RESOLVE_MINUTES, made for the same arguments and mirror, and all its packages are here: an old
# answer whose packages are yet to be fetched would name files that the archive may have dropped. With the
# archive out of reach an older answer is used, and that is said.
apt_resolve() {
    local file=$1 asked mirror old=''
    shift
    asked="# $(printf '%s\n' "${APT_DROP:-}" "$@" | sha256)"
    mirror=$(sha256 <"$APT_DIR/sources/gcsagent.sources")
    if [ -s "$file" ]; then
        read -r old <"$file"
        if [ "$old" = "$asked $mirror" ] && [ -z "$GCS_REFRESH" ] && all_fetched "$file" &&
            [ -n "$(find "$file" -mmin "-$GCS_RESOLVE_MINUTES")" ]; then
            return 0
        fi
    fi
    say "asking the archive for current packages (${APT_DIR##*/})"
    if apt_update; then
        { echo "$asked $mirror" && apt_uris "$@"; } >"$file.new" || return 1
        mv "$file.new" "$file"
        return 0
    fi
    sed -n 's/^[EW]: /    apt: /p' "$APT_DIR/update.log" >&2
    [ "${old% *}" = "$asked" ] || return 1
    say "the archive cannot be reached: using what was resolved on $(date -r "$file" '+%F %T')"
}

# apt_resolve_trixie NAME ARG...: resolves from Debian 13 with its updates and security fixes, into the
# file RESOLVED. A mirror given by hand may have no security archive beside it.
apt_resolve_trixie() {
    local name=$1
    shift
    RESOLVED=$GCS_CACHE/apt/trixie/resolved-$name
    apt_private trixie trixie trixie-updates trixie-security
    apt_resolve "$RESOLVED" "$@" && return
    if [ -n "$GCS_MIRROR" ]; then
        say "trying again without the security archive"
        apt_private trixie trixie trixie-updates
        apt_resolve "$RESOLVED" "$@" && return
    fi
    die "the Debian archive cannot be reached and nothing is cached: check the network, or pass --mirror URL"
}

# resolved FILE: the package lines without the header.
resolved() { grep -v '^#' "$1"; }

# apt_fetch FILE DIR: the packages named in FILE, downloaded once, verified against FILE's hashes, as
# links in DIR. apt verifies too; checking again covers a cached .deb damaged since.
apt_fetch() {
    local file=$1 dir=$2 hash name version deb wanted=()
    mkdir -p "$dir" "$GCS_CACHE/debs"
    while read -r hash name version; do
        [ -f "$GCS_CACHE/debs/$hash.deb" ] || wanted+=("$name=$version")
    done < <(resolved "$file")
    if [ ${#wanted[@]} -gt 0 ]; then
        say "fetching ${#wanted[@]} packages"
        (cd "$APT_DIR/archives" && papt apt-get -q download "${wanted[@]}") >"$APT_DIR/download.log" 2>&1 || {
            sed -n 's/^[EW]: /    apt: /p' "$APT_DIR/download.log" >&2
            die "cannot fetch packages; if the archive has moved on, run again with --refresh"
        }
        for deb in "$APT_DIR"/archives/*.deb; do
            mv "$deb" "$GCS_CACHE/debs/$(sha256sum <"$deb" | cut -d' ' -f1).deb"
        done
    fi
    while read -r hash name version; do
        deb=$GCS_CACHE/debs/$hash.deb
        [ "$(sha256sum <"$deb" | cut -d' ' -f1)" = "$hash" ] || {
            rm -f "$deb"
            die "cached package $name $version was damaged and is removed: run again"
        }
        ln -f "$deb" "$dir/$name.deb"
    done < <(resolved "$file")
}

# apt_unpack DIR ROOT: every package in DIR unpacked over ROOT, which gets Debian's merged-usr links
# first: packages ship them in base-files' scripts, not as files.
apt_unpack() {
    local deb link
    mkdir -p "$2"/usr/{bin,sbin,lib,lib64}
    for link in bin sbin lib lib64; do
        [ -e "$2/$link" ] || ln -s "usr/$link" "$2/$link"
    done
    for deb in "$1"/*.deb; do
        # tar keeps the links above; dpkg-deb -x would replace them by folders.
        dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$2" --keep-directory-symlink --no-same-owner -f -
    done
}

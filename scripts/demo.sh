#!/bin/bash
# Shows what this is for: boots a VM, runs containers in it over vsock, switches it off. Every line it
# shows came out of the VM; a step that gives something else than it should ends the demo with an error.
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

gcsctl=${GCSCTL:-gcsctl}
cache=${GCS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/gcsagent}
rootfs=$cache/demo-rootfs/current/rootfs.erofs
vm=demo-$$
scratch=$(mktemp -d)

finish() {
    $gcsctl vm stop "$vm" >/dev/null 2>&1 || true
    rm -rf "$scratch"
}
trap finish EXIT
trap 'echo "demo: the step above failed (line $LINENO)" >&2' ERR

step() { printf '\n\033[1m== %s\033[0m\n' "$*"; }
show() { printf '\033[2m$ gcsctl %s\033[0m\n' "$*"; }
# in_vm ARGS...: shows a gcsctl command and runs it against the VM.
in_vm() {
    show "$*"
    # shellcheck disable=SC2086
    $gcsctl --vm "$vm" "$@"
}
expect() { [ "$1" = "$2" ] || { echo "demo: expected '$2', got '$1'" >&2; exit 1; }; }

started=$SECONDS
step "Boot a VM with a Debian root file system as a read-only disk"
show "vm start $vm --rootfs rootfs.erofs"
$gcsctl vm start "$vm" --rootfs "$rootfs"
in_vm info | grep -v '^build packages'

run=(--rootfs /run/gcs/disks/rootfs --overlay)

step "A container's output, its kernel and os-release"
in_vm run --rm "${run[@]}" -- sh -c 'uname -sr; . /etc/os-release; echo "$PRETTY_NAME"; python3 --version; sqlite3 --version'

step "A container in the background, and an exec beside it"
in_vm run -d --id web "${run[@]}" -- sleep 1000
in_vm exec web -- sqlite3 :memory: 'select group_concat(value, " ") from generate_series(1, 10)'
in_vm ps
in_vm ps web

step "A TTY session"
show "exec -it web -- bash"
printf 'stty size; tty; exit 3\n' |
    script -qec "stty rows 30 cols 100; $gcsctl --vm $vm exec -it web -- bash --norc" /dev/null &&
    status=0 || status=$?
expect "$status" 3
echo "exit status $status, as the shell said"

step "A file piped through, its checksum on both sides"
head -c 8000000 /dev/urandom >"$scratch/file"
here=$(sha256sum <"$scratch/file")
show "exec -i web -- sha256sum <file"
there=$($gcsctl --vm "$vm" exec -i web -- sha256sum <"$scratch/file")
back=$($gcsctl --vm "$vm" exec -i web -- cat <"$scratch/file" | sha256sum)
printf 'here   %s\nthere  %s\nback   %s\n' "$here" "$there" "$back"
expect "$there" "$here"
expect "$back" "$here"

step "A kill and its exit record"
in_vm kill -s KILL web
in_vm --json wait web && status=0 || status=$?
expect "$status" 137
in_vm delete web

step "Power off"
show "vm stop $vm"
$gcsctl vm stop "$vm"
printf '\ndemo: done in %s s\n' $((SECONDS - started))

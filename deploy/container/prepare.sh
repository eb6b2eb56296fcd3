#!/usr/bin/env bash
# Prepares this machine for building and running images in tests; prints the shell variables that this needs.
#
# Does nothing if the base image can be pulled. Otherwise (no image registry, but a Debian mirror and a package index) it
# builds the base image with debootstrap, with this machine's package settings: CA bundle, local wheels.
set -euo pipefail
cd "$(dirname "$0")/../.."

base=python:3.11-slim
scratch=$PWD/.state/container
wheels=""
if [ -d "${PIP_FIND_LINKS:-}" ]; then wheels=$PIP_FIND_LINKS; fi
engine=$(deploy/container/engine.sh) || { echo "neither docker nor podman can be used here" >&2; exit 1; }
mkdir -p "$scratch"

can_run() { "$engine" run --rm --network none "$base" true >/dev/null 2>&1; }

make_base() {
    command -v debootstrap >/dev/null || { echo "$base cannot be pulled, and debootstrap is not installed to build it" >&2; exit 1; }
    [ "$(id -u)" = 0 ] || { echo "$base cannot be pulled, and building it with debootstrap needs root" >&2; exit 1; }
    rm -rf "$scratch/rootfs"
    debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates bookworm "$scratch/rootfs" >&2
    rm -f "$scratch"/rootfs/usr/lib/python3*/EXTERNALLY-MANAGED
    rm -rf "$scratch"/rootfs/var/cache/apt/archives/*.deb "$scratch"/rootfs/var/lib/apt/lists/*
    local changes=(--change "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    if [ -f "${SSL_CERT_FILE:-}" ]; then
        cp "$SSL_CERT_FILE" "$scratch/rootfs/etc/ssl/certs/ca-certificates.crt"
        changes+=(--change "ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt")
    fi
    if [ -n "$wheels" ]; then changes+=(--change "ENV UV_FIND_LINKS=$wheels"); fi
    tar -C "$scratch/rootfs" -c . | "$engine" import "${changes[@]}" - "docker.io/library/$base" >&2
    rm -rf "$scratch/rootfs"
}

# for machines that cannot raise limits, whose cgroups crun does not support, or that have local wheels
restricted="$scratch/containers.conf"
cat > "$restricted" <<CONF
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
volumes = [${wheels:+"\"$wheels:$wheels:ro\""}]
[network]
network_backend = "netavark"
[engine]
runtime = "runc"
CONF

"$engine" image inspect "$base" >/dev/null 2>&1 || "$engine" pull --quiet "$base" >/dev/null 2>&1 || make_base
if ! can_run && [ "$engine" = podman ]; then
    export CONTAINERS_CONF=$restricted
    echo "export CONTAINERS_CONF=$restricted"
fi
can_run || { echo "$engine cannot run a container here" >&2; exit 1; }
# the base image built above already sets the folder of wheels that torch is installed from
if [ "$engine" = podman ] && "$engine" run --rm --network none "$base" sh -c 'test -n "$UV_FIND_LINKS"'; then
    echo "export TORCH="
fi

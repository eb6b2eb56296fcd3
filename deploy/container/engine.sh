#!/usr/bin/env bash
# Prints the container engine that can be used here, or nothing. CONTAINER_ENGINE decides if it is set.
for engine in ${CONTAINER_ENGINE:-docker podman}; do
    if command -v "$engine" >/dev/null && "$engine" info >/dev/null 2>&1; then
        echo "$engine"
        exit 0
    fi
done
exit 1

#!/usr/bin/env bash
# Prints the usable container engine, or nothing. CONTAINER_ENGINE overrides the search.
for engine in ${CONTAINER_ENGINE:-docker podman}; do
    if command -v "$engine" >/dev/null && "$engine" info >/dev/null 2>&1; then
        echo "$engine"
        exit 0
    fi
done
exit 1

#!/usr/bin/env bash
# Builds the image, runs it and calls it (`make test-container`). Prints the reason and exits with 0 if that is impossible.
set -euo pipefail
cd "$(dirname "$0")/../.."

if ! prepared=$(deploy/container/prepare.sh); then
    echo "test-container: SKIPPED (the reason is above)"
    exit 0
fi
eval "$prepared"
export CONTAINER_ENGINE
CONTAINER_ENGINE=$(deploy/container/engine.sh)
BENTOML_HOME=$(mktemp -d) # outside of this folder, since bentoml build scans all of it
trap 'rm -rf "$BENTOML_HOME"' EXIT
export BENTOML_HOME BENTOML_DO_NOT_TRACK=true
IMAGE=chatglm2-test:store deploy/container/build.sh
IMAGE=chatglm2-test:bundled MODEL=chatglm2-demo deploy/container/build.sh
TEST_IMAGE_STORE=chatglm2-test:store TEST_IMAGE_BUNDLED=chatglm2-test:bundled \
    python -m pytest tests/container "$@"

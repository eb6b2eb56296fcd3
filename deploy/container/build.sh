#!/usr/bin/env bash
# Builds the image: bentoml build, bentoml containerize and one last layer. Used by `make container`; needs bentoml in PATH.
#
#   DEVICE=cpu|cuda   the torch build of the image (default cpu); DEVICE=vllm is CUDA with vLLM as the engine
#   MODEL=TAG         includes this model of the store in the image; without it the image serves a mounted store
#   IMAGE=NAME:TAG    the image's name (default chatglm2:cpu or chatglm2:cuda)
#   TORCH=NAME        uv's torch backend, if DEVICE's default does not fit (cu126 for older drivers); may be empty
set -euo pipefail
cd "$(dirname "$0")/../.."

device=${DEVICE:-cpu}
case $device in
    cpu) torch=${TORCH-cpu} ;;
    cuda | vllm) torch=${TORCH-} ;;
    *) echo "DEVICE must be cpu, cuda or vllm, not '$device'" >&2; exit 1 ;;
esac
image=${IMAGE:-chatglm2:$device}
engine=$(deploy/container/engine.sh) || { echo "neither docker nor podman can be used here" >&2; exit 1; }

python -m kernels.native_library --all  # for every CPU of this architecture: the image has no compiler
bundle=false
if [ -n "${MODEL:-}" ]; then bundle=true; fi
started=$SECONDS
file=(--bentofile bentofile.yaml)
if [ "$device" = vllm ]; then file=(--bentofile bentofile.vllm.yaml --arg engine=vllm); fi
bento=$(bentoml build "${file[@]}" --output tag --arg "model=${MODEL:-}" --arg "bundle=$bundle" --arg "torch=$torch" | sed -n 's/^__tag__://p')
echo "Bento $bento: $((SECONDS - started)) s"

stage=$image-bento
started=$SECONDS
bentoml containerize "$bento" --backend "$engine" --image-tag "$stage"
"$engine" image inspect "$stage" >/dev/null  # bentoml containerize succeeds even if the engine failed
format=()
if [ "$engine" = podman ]; then format=(--format docker --pull=never); fi  # podman's default image format has no health check
"$engine" build "${format[@]}" --build-arg "BENTO=$stage" --tag "$image" --file deploy/container/Containerfile deploy/container
bytes=$("$engine" image inspect --format '{{.Size}}' "$image")
echo "image $image: $((SECONDS - started)) s, $((bytes / 1000000)) MB"

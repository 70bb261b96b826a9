#!/usr/bin/env bash
# What a person with an NVIDIA GPU runs, from the checkout: is everything right, how fast is it, does memory stay flat?
#
#     bench/gpu.sh [ENGINE_DIR]        default: the embedded engine; an fp16 export of a real checkpoint says more
#
# It needs memedge[test] built with nvcc on PATH, and one or several of the extras cuda (instead of cpu), tensorrt and
# tensorrt-rtx. What is missing is said and left out. Results: gpu-results.json; please send it with the terminal's text.
set -uo pipefail
cd "$(dirname "$0")/.."
engine=${1:-memedge/data/engine}
memedge doctor --engine "$engine"
for provider in tensorrt tensorrt-rtx; do
    memedge build "$engine" --provider "$provider" || echo "no plans for $provider: see above"
done
set -e
pytest -m gpu -rs
python bench/gpu.py "$engine" --json gpu-results.json

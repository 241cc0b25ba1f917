#!/usr/bin/env bash
# Qwen3-Coder-Next with ternary experts, taught by its full-precision form behind an endpoint.  On one GPU, on several
# (LAUNCH="torchrun --nproc-per-node 8"), or, with a small recipe, on a laptop:
#
#   limbeck teach builtin:code-2m &
#   RECIPE=ternary PROTOCOL=limbeck TEACHER_ENDPOINT=http://127.0.0.1:8100 ./examples/train_qwen3_distill.sh --total-steps 100 --seq-len 256
#
# Stop it with Ctrl-C: it saves, and the same command goes on.  What follows the script's name goes to `limbeck distill-ternary`.
set -euo pipefail

export TEACHER_ENDPOINT="${TEACHER_ENDPOINT:?set it to where the teacher is served, such as http://127.0.0.1:8000}"
export CHECKPOINT_DIR="${CHECKPOINT_DIR:-checkpoints/qwen3-hybrid}"
export PARALLEL="${PARALLEL:-true}"
export MICRO_BATCHES="${MICRO_BATCHES:-8}"
# DEVICE is passed on if it is set (cuda:0, say); by default a GPU is taken if there is one.

exec ${LAUNCH:-} "${PYTHON:-python}" -m limbeck distill-ternary \
    --recipe "${RECIPE:-ternary_qwen3_coder_next}" \
    --protocol "${PROTOCOL:-vllm}" \
    --keep-last-checkpoints 3 \
    --total-steps 100000 \
    --batch-size 4 \
    --seq-len 2048 \
    --lr 0.02 \
    --mhc-lr 0.0001 \
    --kl-weight 0.5 \
    --temperature 2.0 \
    "$@"

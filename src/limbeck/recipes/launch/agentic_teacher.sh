#!/usr/bin/env bash
# Serves the teacher of the recipe agentic_lora by vLLM until it is stopped: Qwen3-Coder-480B in FP8 on eight GPUs of 141 GB.
#
#   bash agentic_teacher.sh              # serve; Ctrl-C or TERM ends it with all that it started
#   bash agentic_teacher.sh --print      # say the command, one word a line, and do nothing
#
# vLLM belongs into an environment of its own: TEACHER_COMMAND=/opt/vllm/bin/vllm bash agentic_teacher.sh.  Every setting is a variable:
#
#   4 GPUs, a 4-bit checkpoint (in FP8 they would have 26 GB left beside the weights; 2560 / 4 = 640 is a multiple of 128):
#     TEACHER_MODEL=/models/Qwen3-Coder-480B-4bit TEACHER_QUANTISATION= TEACHER_TENSOR_PARALLEL=4 TEACHER_EXPERT_PARALLEL=0 \
#     TEACHER_DEVICES=0,1,2,3 bash agentic_teacher.sh
#
# A bearer token is read by vLLM from VLLM_API_KEY; the recipe's `token_env` names the variable that Limbeck reads.
set -euo pipefail

command=${TEACHER_COMMAND:-vllm}
model=${TEACHER_MODEL:-Qwen/Qwen3-Coder-480B-A35B-Instruct-FP8}
host=${TEACHER_HOST:-127.0.0.1}
port=${TEACHER_PORT:-8100}
devices=${TEACHER_DEVICES:-0,1,2,3,4,5,6,7}
tensor_parallel=${TEACHER_TENSOR_PARALLEL:-8}
# A width of 2560 in eight parts is 320, no multiple of the quantisation's block of 128: experts are spread whole.
expert_parallel=${TEACHER_EXPERT_PARALLEL:-1}
# Set but empty: as the checkpoint says.
quantisation=${TEACHER_QUANTISATION-fp8}
gpu_memory=${TEACHER_GPU_MEMORY:-0.9}
max_logprobs=${TEACHER_MAX_LOGPROBS:-128}
# Tokens of a forward: they bound the memory that prompt log-probabilities take beside the share above.
max_batch_tokens=${TEACHER_MAX_BATCH_TOKENS:-4096}
# Windows have 32768 tokens at most.
max_model_len=${TEACHER_MAX_MODEL_LEN:-40960}

words=(
  "$command" serve "$model" --host "$host" --port "$port"
  --tensor-parallel-size "$tensor_parallel"
  --gpu-memory-utilization "$gpu_memory"
  --max-logprobs "$max_logprobs"
  --logprobs-mode raw_logprobs
  --max-num-batched-tokens "$max_batch_tokens" --enable-chunked-prefill
)
if [[ $expert_parallel == 1 ]]; then
  words+=(--enable-expert-parallel)
fi
if [[ -n $quantisation ]]; then
  words+=(--quantization "$quantisation")
fi
words+=(--max-model-len "$max_model_len")

if [[ ${1-} == --print ]]; then
  printf '%s\n' "${words[@]}"
  exit
fi
if (($#)); then
  echo "agentic_teacher.sh: $1: no such option; allowed is --print, and variables TEACHER_* change the settings" >&2
  exit 2
fi
if ! type -P "$command" >/dev/null; then
  echo "agentic_teacher.sh: no program '$command' is found: install vLLM in an environment of its own and set TEACHER_COMMAND to its path" >&2
  exit 2
fi

export CUDA_VISIBLE_DEVICES=$devices
# A session of its own, so that workers can be ended with it.
setsid "${words[@]}" &
server=$!
stop() {
  trap - EXIT INT TERM
  kill -TERM -- "-$server" 2>/dev/null || true
  for _ in $(seq 20); do
    kill -0 -- "-$server" 2>/dev/null || return 0
    sleep 1
  done
  kill -KILL -- "-$server" 2>/dev/null || true
}
trap stop EXIT
trap 'stop; exit 130' INT
trap 'stop; exit 143' TERM
wait "$server"

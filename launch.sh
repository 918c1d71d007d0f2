#!/usr/bin/env bash
# Sets up an environment, then trains or tests. `./launch.sh --help` says how.
set -euo pipefail

usage() {
  cat <<'HELP'
./launch.sh                                     train recipes/quickstart.yaml: a small GPT-2, minutes on two CPU cores
./launch.sh recipes/X.yaml [--setting value …]  train any recipe; settings given here win over the recipe's.
                                                recipes/sft_* and reward_* train the language model and the classifier
./launch.sh test [pytest arguments]             run the tests
./launch.sh setup                               make the environment and stop

Launcher options, before or after the recipe:
  --config NAME          accelerate_configs/NAME.yaml, or a path; by default cpu, single_gpu or multi_gpu by what is here
  --num_processes N      workers on this machine; by default one a GPU, or two on CPU
  --mixed_precision P    no, bf16 or fp16; by default bf16 on CPUs that multiply it natively, else what the configuration says
All other options are the run's own: python -m pipeline.train --help

The environment: the active virtual or conda environment, else .venv here, made when missing. requirements.txt is installed
once, and again when it changes. Set PYTHON to choose the interpreter that makes .venv.
HELP
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$root"

fail() { echo "launch.sh: $*" >&2; exit 2; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

set_up() {
  local environment="${VIRTUAL_ENV:-}"
  # conda's base is active in every shell of many users, who do not want our pins in it.
  if [ -z "$environment" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then environment="${CONDA_PREFIX:-}"; fi
  if [ -z "$environment" ]; then
    environment="$root/.venv"
    if [ ! -x "$environment/bin/pip" ]; then
      local python="${PYTHON:-python3}"
      new_enough "$python" ||
        fail "$python is missing or older than Python 3.11. Set PYTHON to a newer one: PYTHON=python3.12 ./launch.sh"
      echo "Making the environment $environment" >&2
      "$python" -m venv "$environment" || fail "$python cannot make $environment; on Debian and Ubuntu: apt install python3-venv"
    fi
  fi
  PATH="$environment/bin:$PATH"
  export VIRTUAL_ENV="$environment" PATH
  new_enough python || fail "the active environment $environment has a Python older than 3.11; deactivate it or use another."
  local stamp="$environment/.requirements-installed"
  if ! cmp -s requirements.txt "$stamp"; then
    echo "Installing requirements.txt into $environment (some minutes the first time)" >&2
    python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    cp requirements.txt "$stamp"
  fi
}

tune_cpu() { # $1: processes on this machine
  local cores
  cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > $1 ? cores / $1 : 1))}"
  # glibc hands large tensors back to the kernel after each operation; keeping them saves about a fifth of the time on CPU.
  export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-8589934592}"
  export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-8589934592}"
}

tell_workers() { # $1: signal, $2: the launcher, told itself as long as it has no workers
  local workers
  workers=$(pgrep -P "$2" 2>/dev/null || cat "/proc/$2/task/$2/children" 2>/dev/null || true)
  if [ -n "$workers" ]; then kill -s "$1" $workers 2>/dev/null || true; else kill -s TERM "$2" 2>/dev/null || true; fi
}

train() {
  local recipe="" config="" processes="" precision="" settings=()
  while [ $# -gt 0 ]; do
    case "$1" in
      --config) config="${2:?--config needs a name}"; shift 2 ;;
      --num_processes) processes="${2:?--num_processes needs a number}"; shift 2 ;;
      --mixed_precision) precision="${2:?--mixed_precision needs no, bf16 or fp16}"; shift 2 ;;
      *.yaml | *.yml)
        if [ -z "$recipe" ]; then recipe="$1"; else settings+=("$1"); fi
        shift ;;
      *) settings+=("$1"); shift ;;
    esac
  done
  recipe="${recipe:-recipes/quickstart.yaml}"
  [ -f "$recipe" ] || fail "there is no recipe $recipe; those shipped: $(echo recipes/*.yaml)"
  [ -z "$config" ] || [ -f "$config" ] || [ -f "accelerate_configs/$config.yaml" ] ||
    fail "there is no accelerate configuration $config; those shipped: $(echo accelerate_configs/*.yaml)"
  set_up
  local gpus=0
  if [ "$config" != cpu ] && command -v nvidia-smi >/dev/null 2>&1; then
    gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
  fi
  local module=pipeline.train
  case "$(basename "$recipe")" in sft_*) module=pipeline.sft ;; reward_*) module=pipeline.reward_model ;; esac
  if [ -z "$config" ]; then
    if [ "$gpus" -gt 0 ]; then
      processes="${processes:-$gpus}"
    elif [ "$module" = pipeline.train ]; then
      processes="${processes:-2}"
    else
      processes="${processes:-1}"
    fi
    config=single_gpu
    if [ "$processes" -gt 1 ]; then config=cpu; fi
    if [ "$processes" -gt 1 ] && [ "$gpus" -gt 0 ]; then config=multi_gpu; fi
  fi
  if [ "$config" = cpu ]; then export CUDA_VISIBLE_DEVICES=""; fi
  local file="$config"
  [ -f "$file" ] || file="accelerate_configs/$config.yaml"
  processes="${processes:-$(sed -n 's/^num_processes: *//p' "$file")}"
  export PIPELINE_PROCESSES="$processes" # the workers check that as many joined
  if [ "$gpus" -eq 0 ]; then
    tune_cpu "$processes"
    # Two thirds of float32's time where the CPU has the instructions; slower than float32 where it has not.
    if [ -z "$precision" ] && grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then precision=bf16; fi
  fi

  local command=(accelerate launch --quiet --config_file "$file")
  # A port of its own lets several runs share a machine; asking for port 0 would be refused by a static rendezvous.
  command+=(--main_process_port "$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')")
  command+=(--num_processes "$processes")
  [ -z "$precision" ] || command+=(--mixed_precision "$precision")
  command+=(-m "$module" --config "$recipe" ${settings[@]+"${settings[@]}"})

  # Workers leave exit code and message here; see pipeline/errors.py.
  PIPELINE_STATUS_FILE="$(mktemp -d)/status"
  export PIPELINE_STATUS_FILE

  # Ctrl-C is for the workers, which finish their step and save; the launcher would kill them. So the launcher gets a process
  # group of its own, out of the terminal's reach, and this script passes the signal on.
  local interrupted="" status=0 launcher
  set -m
  "${command[@]}" &
  launcher=$!
  set +m
  trap 'interrupted=1; tell_workers INT "$launcher"' INT
  trap 'tell_workers TERM "$launcher"' TERM HUP QUIT
  while :; do
    wait "$launcher" && status=0 || status=$?
    kill -0 "$launcher" 2>/dev/null || break
  done
  if [ -f "$PIPELINE_STATUS_FILE" ]; then
    status=$(head -n 1 "$PIPELINE_STATUS_FILE")
    tail -n +2 "$PIPELINE_STATUS_FILE" >&2
  fi
  rm -rf "$(dirname "$PIPELINE_STATUS_FILE")"
  [ -z "$interrupted" ] || exit 130
  exit "$status"
}

case "${1:-}" in
  -h | --help | help) usage ;;
  setup) set_up ;;
  test)
    shift
    set_up
    tune_cpu 1
    export HF_HUB_OFFLINE=1
    exec python -m pytest "$@"
    ;;
  *) train "$@" ;;
esac

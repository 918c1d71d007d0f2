#!/usr/bin/env bash
#SBATCH --job-name=ppo
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# Sets up an environment, then trains or tests, here or as a SLURM job. `./launch.sh --help` says how.
#
# The lines above are sbatch's defaults; its options win over them. SLURM starts one task a node, which starts the workers
# there. Five minutes before the time limit the batch shell gets SIGUSR1: time to end the step and write a checkpoint.
# A requeued job goes on in the same log.
set -euo pipefail

usage() {
  cat <<'HELP'
./launch.sh                                     train recipes/quickstart.yaml: a small GPT-2, minutes on two cores
./launch.sh recipes/X.yaml [--setting value …]  train any recipe; settings given here win over the recipe's
./launch.sh sft|reward_model recipes/X.yaml […] train the language model PPO starts from, or a classifier to reward it
                                                (python -m pipeline.sft, …); ./launch.sh train … is the bare form
sbatch --nodes=2 --gpus-per-node=4 --cpus-per-task=16 launch.sh recipes/X.yaml [--setting value …]
                                                the same as a SLURM job (docs/slurm.md)
./launch.sh frontier [recipes/X.yaml] […]       estimate the best reward at each KL of a recipe (python -m pipeline.frontier)
./launch.sh chat|evaluate|export|report RUN […] try a finished run in the browser, compare it again, take its model out, make
                                                its report (python -m pipeline.chat, …)
./launch.sh --dry-run […]                       print the commands that would run, and stop
./launch.sh test [pytest arguments]             run the tests
./launch.sh setup                               make the environment and stop

Launcher options, before or after the recipe:
  --config NAME          accelerate_configs/NAME.yaml, or a path; by default cpu, single_gpu or multi_gpu
  --num_processes N      workers on each machine; by default one a GPU, or two on CPU
  --mixed_precision P    no, bf16 or fp16; by default bf16 where all GPUs have it (compute capability 8.0 or higher: A100,
                         RTX 30 and newer), and on CPUs that multiply it natively; else float32 (no). A recipe's own
                         mixed_precision wins; so does, on GPUs, that of a configuration of your own
A GPU that is there and that PyTorch cannot use is an error; --config cpu, or CUDA_VISIBLE_DEVICES= before the command,
trains on the CPU.
Several machines without SLURM, the same command on each but for the rank:
  --num_machines M  --machine_rank R  --main_process_ip IP  --main_process_port PORT     IP is that of rank 0
All other options are the run's own: python -m pipeline.train --help

Exit codes: 0 finished; 2 a setting, file or disk is at fault and nothing was trained; 3 the reward failed in mid-run; 4 a
guard ended a training that went wrong, with its last good state; 5 the model, evaluation or report could not be written,
and the same command makes them; 130, 138 and 143 stopped by SIGINT (Ctrl-C), SIGUSR1 and SIGTERM with a checkpoint, from
which the same command continues; any other: a worker crashed.

The environment: the active virtual or conda environment, else .venv here, made when missing. requirements.txt is
installed once, and again when it changes. Set PYTHON to choose the interpreter that makes .venv.
HELP
}

fail() { echo "launch.sh: $*" >&2; exit 2; }

# In a SLURM job, and not in one of its steps (srun --pty bash), where the step is all there is.
has_slurm_job() { [ -n "${SLURM_JOB_ID:-}" ] && [ "${SLURM_STEP_ID:-4294967290}" -ge 4294967000 ]; }

find_root() { # sbatch runs a copy out of its spool: the project is then where the submitted script was
  local place submitted="" beside
  beside=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
  if [ ! -f "$beside/pipeline/train.py" ] && [ -n "${SLURM_JOB_ID:-}" ]; then
    submitted=$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null | sed -n 's|^ *Command=\(.*\)/launch\.sh.*|\1|p') || true
    submitted="${submitted%%$'\n'*}" # an array shows a job for each
  fi
  for place in "$beside" "$submitted" "${SLURM_SUBMIT_DIR:-}"; do
    if [ -f "$place/pipeline/train.py" ]; then echo "$place"; return; fi
  done
  fail "there is no pipeline/train.py in $beside${submitted:+, in $submitted} or in the directory of submission" \
    "(${SLURM_SUBMIT_DIR:-none}). Submit it in the project: sbatch launch.sh …"
}

root=$(find_root)
cd "$root"

. shell/environment.sh
. shell/machine.sh
. shell/slurm.sh

# --- what to run: options, recipe and machine become one command

program=train recipe="" config="" workers="" precision="" settings=() # as given; workers are those of each machine
machines=1 machine_rank="" main_ip="" main_port=""
dry_run="" gpus=0 gpu_precision=no
command=() # for accelerate launch

read_arguments() {
  while [ $# -gt 0 ]; do
    case "$1" in
      --config) config="${2:?--config needs a name}"; shift 2 ;;
      --num_processes) workers="${2:?--num_processes needs a number}"; shift 2 ;;
      --mixed_precision) precision="${2:?--mixed_precision needs no, bf16 or fp16}"; shift 2 ;;
      --num_machines) machines="${2:?--num_machines needs a number}"; shift 2 ;;
      --machine_rank) machine_rank="${2:?--machine_rank needs a number}"; shift 2 ;;
      --main_process_ip) main_ip="${2:?--main_process_ip needs an address}"; shift 2 ;;
      --main_process_port) main_port="${2:?--main_process_port needs a number}"; shift 2 ;;
      --dry-run) dry_run=1; shift ;;
      train | sft | reward_model | frontier) # unless it is the value of a setting
        if [ -z "$recipe${settings[*]-}" ]; then program="$1"; else settings+=("$1"); fi
        shift ;;
      *.yaml | *.yml)
        if [ -z "$recipe" ]; then recipe="$1"; else settings+=("$1"); fi
        shift ;;
      *) settings+=("$1"); shift ;;
    esac
  done
  case "$program:$recipe" in
    train: | frontier:) recipe=recipes/quickstart.yaml ;;
    *:) fail "./launch.sh $program needs a recipe; those shipped: $(echo recipes/"${program%_model}"_*.yaml)" ;;
  esac
  [ -f "$recipe" ] || fail "there is no recipe $recipe; those shipped: $(echo recipes/*.yaml)"
  if is_configuration "$recipe"; then
    fail "$recipe is an accelerate configuration, not a recipe: ./launch.sh RECIPE --config $recipe"
  fi
  case "$config" in accelerate_configs/*.yaml) config=$(basename "$config" .yaml) ;; esac
  [ -z "$config" ] || [ -f "$config" ] || [ -f "accelerate_configs/$config.yaml" ] ||
    fail "there is no accelerate configuration $config; those shipped: $(echo accelerate_configs/*.yaml)"
  if [ -f "$config" ] && ! is_configuration "$config" && has_settings "$config"; then
    fail "$config is not an accelerate configuration; that is a recipe: ./launch.sh $config"
  fi
}

plain_lines() { sed -e $'1s/^\xef\xbb\xbf//' -e $'s/\r$//' "$1"; } # as editors on Windows do not leave them

is_configuration() { plain_lines "$1" | grep -E '^(compute_environment|distributed_type) *:' >/dev/null; }

# Whether a file has keys that Accelerate knows nothing of.
has_settings() {
  local known='num_|machine_rank|main_|mixed_precision|use_cpu|debug|gpu_ids|rdzv_|same_network|enable_cpu_|downcast_|tpu_'
  plain_lines "$1" | sed -n 's/^\([A-Za-z_][A-Za-z_0-9]*\) *:.*/\1/p' | grep -vE "^($known|command)|_config$" >/dev/null
}

use_array_seed() { # the jobs of a SLURM array are the seeds of one recipe
  local setting output_dir="" last=""
  # A recipe's output_dir, without quotes and comment.
  output_dir=$(plain_lines "$recipe" | sed -n "s/^output_dir: *[\"']\{0,1\}\([^\"'#]*[^\"'# ]\).*/\1/p")
  for setting in ${settings[@]+"${settings[@]}"}; do
    case "$setting" in
      --seed | --seed=*) fail "a job array gives the seeds (--seed $SLURM_ARRAY_TASK_ID here): leave out $setting." ;;
      --output_dir=*) output_dir="${setting#*=}" ;;
    esac
    if [ "$last" = --output_dir ]; then output_dir="$setting"; fi
    last="$setting"
  done
  if [ -z "$output_dir" ]; then output_dir=$(basename "$recipe"); output_dir="runs/${output_dir%.*}"; fi
  settings+=(--seed "$SLURM_ARRAY_TASK_ID" --output_dir "${output_dir%/}/seed_$SLURM_ARRAY_TASK_ID")
}

choose_command() {
  local total file own="" on_cpu=2
  ask_gpus
  case "$program" in sft | reward_model) if [ -z "$config" ]; then on_cpu=1; fi ;; esac
  if [ -z "$workers" ]; then
    if [ "$config" = single_gpu ]; then
      workers=1
    elif [ -f "$config" ]; then # the user's own
      workers=$(sed -n 's/^num_processes: *//p' "$config")
    fi
    if [ -z "$workers" ]; then workers=$((gpus > 0 ? gpus : on_cpu)); fi
  fi
  total=$((machines * workers))
  if [ -z "$config" ]; then
    config=single_gpu
    if [ "$total" -gt 1 ]; then config=cpu; fi
    if [ "$total" -gt 1 ] && [ "$gpus" -gt 0 ]; then config=multi_gpu; fi
  fi
  if [ "$config" = cpu ]; then export CUDA_VISIBLE_DEVICES=""; fi
  file="$config"
  if [ -f "$file" ]; then own=1; else file="accelerate_configs/$config.yaml"; fi # the user's own, or one that is shipped
  export PIPELINE_PROCESSES="$total" # the workers check that as many joined
  if [ "$gpus" -eq 0 ]; then
    tune_cpu "$workers"
    # Two thirds of float32's time where the CPU has the instructions; slower than float32 where it has not.
    if [ -z "$precision" ] && grep -qsE 'avx512_bf16|amx_bf16' /proc/cpuinfo; then precision=bf16; fi
  else
    # The optimiser of these works on the CPU, where the launcher would give each worker one thread.
    if grep -qE '^ *(offload_optimizer_device: *cpu|fsdp_offload_params: *true)' "$file"; then tune_cpu "$workers"; fi
    if [ -z "$precision$own" ] && [ "$gpu_precision" = bf16 ]; then precision=bf16; fi
  fi

  command=(--quiet --config_file "$file" --num_processes "$total" --main_process_port "$main_port")
  if [ "$machines" -gt 1 ]; then
    # These three are not heard in the file. Static: other rendezvous guess which host they are on, and err.
    command+=(--num_machines "$machines" --main_process_ip "$main_ip" --rdzv_backend static)
    # DeepSpeed would go to the other machines by ssh; they have been reached already.
    if grep -q '^distributed_type:.*DEEPSPEED' "$file"; then command+=(--deepspeed_multinode_launcher standard); fi
  fi
  [ -z "$precision" ] || command+=(--mixed_precision "$precision")
  command+=(-m "pipeline.$program" --config "$recipe" ${settings[@]+"${settings[@]}"})
}

# --- running it

show() { # a command line as it can be pasted, with the variables that matter
  local name
  for name in PIPELINE_PROCESSES OMP_NUM_THREADS CUDA_VISIBLE_DEVICES; do
    if [ -n "${!name+x}" ]; then printf '%s=%q ' "$name" "${!name}"; fi
  done
  printf '%q ' "$@"
  echo
}

status=0 launcher="" received="" # of what runs: its exit code, its process, the last signal to this script

wait_for_launcher() { # a trap interrupts `wait`
  while :; do
    wait "$launcher" && status=0 || status=$?
    kill -0 "$launcher" 2>/dev/null || break
  done
}

read_status_file() { # what the workers left there is the outcome; see pipeline/errors.py
  if [ -f "$PIPELINE_STATUS_FILE" ]; then
    status=$(head -n 1 "$PIPELINE_STATUS_FILE")
    tail -n +2 "$PIPELINE_STATUS_FILE" >&2
  fi
}

tell_workers() { # $1: signal; the launcher is told itself as long as it has no workers
  local workers
  received="$1"
  workers=$(pgrep -P "$launcher" 2>/dev/null || cat "/proc/$launcher/task/$launcher/children" 2>/dev/null || true)
  # shellcheck disable=SC2086 # a list of processes
  if [ -n "$workers" ]; then kill -s "$1" $workers || true; else kill -s TERM "$launcher" || true; fi 2>/dev/null
}

run_here() {
  local start=(accelerate launch)
  if [ "$machines" -gt 1 ]; then start+=(--machine_rank "$machine_rank"); fi
  if [ -n "$dry_run" ]; then show "${start[@]}" "${command[@]}"; return; fi
  PIPELINE_STATUS_FILE="$(mktemp -d)/status"
  export PIPELINE_STATUS_FILE
  # Ctrl-C is for the workers, which finish their step and save; the launcher would kill them. So the launcher gets a
  # process group of its own, out of the terminal's reach, and this script passes the signal on.
  set -m
  "${start[@]}" "${command[@]}" &
  launcher=$!
  set +m
  trap 'tell_workers INT' INT
  trap 'tell_workers USR1' USR1
  trap 'tell_workers TERM' TERM HUP QUIT
  wait_for_launcher
  # Workers that were told before they listened.
  if [ "$status" -ne 0 ] && [ -n "$received" ]; then status=$((128 + $(kill -l "$received"))); fi
  read_status_file
  rm -rf "$(dirname "$PIPELINE_STATUS_FILE")"
  exit "$status"
}

train() {
  read_arguments "$@"
  if has_slurm_job; then
    trap 'stop_step USR1' USR1
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then use_array_seed; fi
  elif [ "${SLURM_STEP_NUM_TASKS:-1}" -gt 1 ]; then
    fail "srun has started $SLURM_STEP_NUM_TASKS of this script, which starts the workers itself: use sbatch launch.sh …"
  fi
  choose_rendezvous
  if [ -z "$dry_run" ]; then set_up; else use_environment; fi
  choose_command
  if has_slurm_job; then run_slurm; else run_here; fi
}

case "${1:-}" in
  -h | --help | help) usage ;;
  setup) set_up ;;
  on_node) shift; on_node "$@" ;;
  test)
    shift
    set_up
    tune_cpu 1
    export HF_HUB_OFFLINE=1
    exec python -m pytest "$@"
    ;;
  chat | evaluate | export | report)
    module="pipeline.$1"
    shift
    set_up
    tune_cpu 1
    exec python -m "$module" "$@"
    ;;
  *) train "$@" ;;
esac

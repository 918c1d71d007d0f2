# Part of launch.sh: the shell of a SLURM job, and its part on each node.
# shellcheck shell=bash disable=SC2154 # launch.sh sets what is used here

# The number of an array's last job also means the whole array.
slurm_job="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-}}"
slurm_job="${slurm_job:-${SLURM_JOB_ID:-}}"

teller=""

stop_step() { # $1: the signal to this shell; the last that is not SIGUSR1 counts
  case "$received" in "" | USR1) received="$1" ;; esac
  if [ -n "$launcher" ]; then tell_step; fi
}

tell_step() {
  # The workers get SIGUSR1, which srun hands to every process of the step; SIGINT and SIGTERM are for srun itself.
  # Workers that are still starting do not hear it, so it is repeated.
  if [ -z "$teller" ]; then
    (
      trap '' TERM # which SLURM sends to every process of the job
      while kill -s USR1 "$launcher" 2>/dev/null; do sleep 5; done
    ) &
    teller=$!
  fi
}

run_slurm() {
  local start=(srun --nodes="$machines" --ntasks="$machines" --ntasks-per-node=1 --kill-on-bad-exit=1 --wait=0)
  # --export: also where sbatch had --export=NONE. --cpu-bind: the one task holds all workers of its node.
  start+=(--export=ALL --cpu-bind=none)
  # srun does not take this over from sbatch.
  if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then start+=(--cpus-per-task="$SLURM_CPUS_PER_TASK"); fi
  start+=("$root/launch.sh" on_node)
  if [ -n "$dry_run" ]; then
    show "${start[@]}" "${command[@]}"
    echo '# which runs on each node:'
    # shellcheck disable=SC2016 # each node's own
    echo 'accelerate launch --machine_rank $SLURM_NODEID' "$(printf '%q ' "${command[@]}")"
    return
  fi
  if [ "${SLURM_CPUS_ON_NODE:-$workers}" -lt "$workers" ]; then
    echo "launch.sh: $workers workers share $SLURM_CPUS_ON_NODE CPU on each node; for more: sbatch --cpus-per-task=N …" >&2
  fi

  # Every node sees the project, so there the workers leave their outcome.
  PIPELINE_STATUS_FILE="$root/runs/.slurm-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
  export PIPELINE_STATUS_FILE
  mkdir -p runs
  rm -f "$root/runs/.slurm-$SLURM_JOB_ID-"* # also of an earlier start of this job that SLURM killed
  trap 'rm -f "$PIPELINE_STATUS_FILE"' EXIT
  "${start[@]}" "${command[@]}" &
  launcher=$!
  trap 'stop_step TERM' TERM HUP QUIT
  trap 'stop_step INT' INT
  if [ -n "$received" ]; then tell_step; fi # SIGUSR1 came during the set-up
  wait_for_launcher
  read_status_file
  rm -f "$PIPELINE_STATUS_FILE" # now: requeueing the job kills this shell
  case "$status:$received" in
    138: | 138:USR1) requeue ;; # the time is nearly up, and nobody has cancelled the job since
    # Preempted: SLURM requeues only jobs that stay until the end of their grace time.
    143:) if job_says 'PreemptTime=[0-9]'; then requeue; fi ;;
    130:?* | 138:?* | 143:?*) status=$((128 + $(kill -l "$received"))) ;;
  esac
  exit "$status"
}

job_says() { scontrol show job "$slurm_job" | grep -q "$1"; }

requeue() { # unless SLURM has ended the job, or is requeueing it, in the meantime
  if job_says JobState=RUNNING && scontrol requeue "$slurm_job"; then
    echo "launch.sh: stopped in time with a checkpoint; job $slurm_job is queued again and will continue it" >&2
  else
    echo "launch.sh: stopped with a checkpoint; job $slurm_job is not queued again; the same command continues it" >&2
  fi
}

on_node() { # what srun runs on each node; $@ is for accelerate launch
  # SLURM signals every process of a step. The workers take the signals over when they are ready; this shell and the
  # launcher ignore them, and so live until the workers have saved.
  trap '' INT TERM USR1
  export PET_SIGNALS_TO_HANDLE=SIGQUIT # torchrun's --signals-to-handle
  export PET_SHUTDOWN_TIMEOUT=10       # seconds from SIGTERM to SIGKILL for the siblings of a crashed worker
  accelerate launch --machine_rank "$SLURM_NODEID" "$@" && exit 0 || status=$?
  # A worker that has told its outcome did not crash, and the other nodes may need time to do the same.
  if [ -f "$PIPELINE_STATUS_FILE" ]; then exit 0; fi
  printf '%s\nlaunch.sh: a worker crashed; the first traceback says why\n' "$status" >"$PIPELINE_STATUS_FILE"
  # srun would ask the other nodes' workers to end, and those wait for the crashed one.
  scancel --signal=KILL "$slurm_job.$SLURM_STEP_ID" || true
  exit "$status"
}

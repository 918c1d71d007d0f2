# Part of launch.sh: what this machine has, and where its workers meet those of the others.
# shellcheck shell=bash disable=SC2034,SC2154 # launch.sh sets what is used here, and uses what is set

ask_gpus() { # how many this machine has, and whether all of them have bf16; or the end, where they cannot be used
  local told
  if [ "$config" = cpu ] || { [ -f "$config" ] && grep -qi '^use_cpu: *true' "$config"; }; then return; fi
  if [ -z "$dry_run" ] || new_enough python3; then
    told=$(python3 -m pipeline.runtime.gpus) || exit 2
  else # before the environment is made
    told="$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true) no"
  fi
  read -r gpus gpu_precision <<<"$told"
}

tune_cpu() { # $1: processes on this machine
  local cores
  cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
  if [ "${SLURM_CPUS_ON_NODE:-$cores}" -lt "$cores" ]; then cores="$SLURM_CPUS_ON_NODE"; fi
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > $1 ? cores / $1 : 1))}"
  # glibc hands large tensors back to the kernel after each operation; keeping them saves a fifth of the time on CPU.
  export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-8589934592}"
  export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-8589934592}"
}

is_busy() { (: <"/dev/tcp/127.0.0.1/$1") 2>/dev/null; } # whether somebody listens on that port of this machine

choose_rendezvous() { # where the workers meet: machines, main_ip and main_port
  if has_slurm_job; then
    [ "$machines$machine_rank$main_ip" = 1 ] ||
      fail "SLURM says which machines there are: leave --num_machines, --machine_rank and --main_process_ip to it."
    machines="${SLURM_JOB_NUM_NODES:-1}"
    local head first=$((20000 + SLURM_JOB_ID % 1000 * 10))
    head=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    head="${head%%$'\n'*}"
    # The address by which SLURM itself finds the node: not every cluster knows its nodes' names otherwise.
    main_ip=$(scontrol show node --oneliner "$head" 2>/dev/null | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p') || true
    main_ip="${main_ip:-$head}"
    if [ -z "$main_port" ]; then # ten ports a job, out of the kernel's own range; a batch shell is on the head node
      for main_port in $(seq "$first" $((first + 9))); do is_busy "$main_port" || break; done
    fi
  elif [ "$machines" -gt 1 ]; then
    if [ -z "$machine_rank" ] || [ -z "$main_ip" ] || [ -z "$main_port" ]; then
      fail "--num_machines $machines needs --machine_rank, --main_process_ip and --main_process_port as well."
    fi
  elif [ -z "$main_port" ]; then # of its own, so that several runs share a machine
    while main_port=$((10000 + RANDOM % 10000)); is_busy "$main_port"; do :; done
  fi
  if [ "${machine_rank:-0}" = 0 ] && is_busy "$main_port"; then
    fail "port $main_port is in use on this machine; choose another with --main_process_port" \
      "(on all machines the same), or end what listens there: ss -ltnp 'sport = :$main_port'"
  fi
}
